//! Resource limits of this process, and the descriptors it inherits.

use std::fs;
use std::io;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Whether this process ran out of a resource: descriptors, memory, threads or ports. Such an
/// error says nothing about the other side of a call.
pub fn is_exhausted(e: &io::Error) -> bool {
    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS, Errno::ADDRNOTAVAIL];
    exhausted.iter().any(|errno| e.raw_os_error() == Some(errno.raw_os_error()))
}

/// As many descriptors as the daemon can use: three for each connection, and those of its own.
const DESCRIPTORS: u64 = 4096;

/// The limit before [`raise_descriptor_limit`].
static DESCRIPTORS_BEFORE: OnceLock<Rlimit> = OnceLock::new();

/// Raises the soft limit of descriptors as far as is useful and allowed. What is started later
/// inherits it: see [`restore_descriptor_limit`].
pub fn raise_descriptor_limit() {
    let before = getrlimit(Resource::Nofile);
    let wanted = before.maximum.map_or(DESCRIPTORS, |maximum| maximum.min(DESCRIPTORS));
    if before.current.is_some_and(|current| current < wanted) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..before });
        let _ = DESCRIPTORS_BEFORE.set(before);
    }
}

/// The soft limit that somebody else is to have, if ours was raised.
pub fn descriptor_limit_before() -> Option<u64> {
    DESCRIPTORS_BEFORE.get().and_then(|before| before.current)
}

/// Lowers the soft limit of this process to that of [`descriptor_limit_before`].
pub fn restore_descriptor_limit(current: u64) {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(current), ..limit });
}

/// Closes every descriptor above standard error. A daemon inherits whatever the shell had open:
/// with `exec 9>lock; openwork …` it would hold that lock for weeks.
pub fn close_inherited_descriptors() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return };
    let listed: Vec<i32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(|fd| *fd > 2).collect();
    for fd in listed {
        // The descriptor of the listing itself is closed by now.
        if fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_err() {
            continue;
        }
        // SAFETY: called as the first thing in a process that has opened nothing yet, so no
        // value owns this descriptor, and no other thread runs that could be given its number.
        #[allow(unsafe_code)]
        unsafe {
            rustix::io::close(fd);
        }
    }
}
