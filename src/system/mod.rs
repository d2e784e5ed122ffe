//! All that knows Linux: another operating system is another such folder.
//!
//! - `process`: processes by pidfd, their identity, the marker in their environment, the sweep
//! - `socket`: who listens on a port, and whose connection one is
//! - `lock`: which process holds a file lock
//! - `wait`: poll(2) on flags, pipes, sockets and pidfds
//! - `disk`: directories that may lie on a mount that hangs
//! - `filesystem`: what a directory lies on, and what is free there
//! - `signals`: what this process and those it starts do about signals
//! - `limits`: resource limits, and inherited descriptors

pub mod disk;
pub mod filesystem;
pub mod limits;
pub mod lock;
pub mod process;
pub mod signals;
pub mod socket;
pub mod wait;
