//! Everything specific to Linux: a port to another operating system replaces this folder.
//!
//! - `process`: processes by pidfd, their identity, the marker in their environment, the sweep
//! - `socket`: the process behind a listener, the user behind a connection
//! - `lock`: which process holds a file lock
//! - `wait`: poll(2) on flags, pipes, sockets and pidfds
//! - `disk`: directories that may be on a hung mount
//! - `filesystem`: the kind of a file system, and its free space
//! - `signals`: signal masks and dispositions of this process and its children
//! - `limits`: resource limits, and inherited descriptors

pub mod disk;
pub mod filesystem;
pub mod limits;
pub mod lock;
pub mod process;
pub mod signals;
pub mod socket;
pub mod wait;
