//! Resource limits of this process, and the descriptors it inherits.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{Error, Result};
use crate::options::{LISTEN_FDS, LISTEN_PID};

/// Whether this process ran out of a resource: descriptors, memory, threads or ports. Such an
/// error says nothing about the other side of a call.
pub fn is_exhausted(e: &io::Error) -> bool {
    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS, Errno::ADDRNOTAVAIL];
    exhausted.iter().any(|errno| e.raw_os_error() == Some(errno.raw_os_error()))
}

/// The descriptors that the daemon can use: four for each connection, and its own.
const DESCRIPTORS: u64 = 4096 + 64;

/// The limit before [`raise_descriptor_limit`].
static DESCRIPTORS_BEFORE: OnceLock<Rlimit> = OnceLock::new();

/// Raises the soft limit of descriptors as far as is useful and allowed. Children inherit it: see
/// [`restore_descriptor_limit`].
pub fn raise_descriptor_limit() {
    let before = getrlimit(Resource::Nofile);
    let wanted = before.maximum.map_or(DESCRIPTORS, |maximum| maximum.min(DESCRIPTORS));
    if before.current.is_some_and(|current| current < wanted) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..before });
        let _ = DESCRIPTORS_BEFORE.set(before);
    }
}

/// The fewest descriptors that a daemon can work with: some 25 of its own, and those of a few connections.
const DESCRIPTORS_NEEDED: u64 = 48;

/// Requires enough descriptors for a daemon. With fewer it would start, and then fail at each request.
///
/// # Errors
/// `daemon_start_failed`.
pub fn require_descriptors() -> Result<()> {
    match getrlimit(Resource::Nofile).current {
        Some(limit) if limit < DESCRIPTORS_NEEDED => Err(Error::DaemonStartFailed(format!(
            "the limit of open files is {limit}, and openwork needs {DESCRIPTORS_NEEDED}: raise it (`ulimit -n 1024`)"
        ))),
        _ => Ok(()),
    }
}

/// The soft limit before it was raised, for other programs; `None` if it was not.
pub fn descriptor_limit_before() -> Option<u64> {
    DESCRIPTORS_BEFORE.get().and_then(|before| before.current)
}

/// Restores the soft limit of this process, as given by [`descriptor_limit_before`].
pub fn restore_descriptor_limit(current: u64) {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(current), ..limit });
}

/// Closes every descriptor above standard error. Otherwise a daemon would keep whatever the shell had open:
/// after `exec 9>lock; openwork …` it would hold that lock for weeks.
pub fn close_inherited_descriptors() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return };
    let listed: Vec<i32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(|fd| *fd > 2).collect();
    for fd in listed {
        // The descriptor of the directory listing is already closed.
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

/// The first descriptor that a service manager passes: `SD_LISTEN_FDS_START` of sd_listen_fds(3).
const FIRST_PASSED: RawFd = 3;

/// Takes the socket that a service manager passed to this process (socket activation, by the protocol of
/// sd_listen_fds(3)); `None` when it passed none, or when the socket was already taken.
///
/// # Errors
/// `InvalidInput` when there are several: the daemon would not answer on the others. `NotFound` when the
/// environment announces one and the descriptor is not open.
pub fn take_passed_socket() -> io::Result<Option<OwnedFd>> {
    static IS_TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    if number(LISTEN_PID) != Some(std::process::id()) {
        return Ok(None);
    }
    match number(LISTEN_FDS) {
        None | Some(0) => return Ok(None),
        Some(1) => {}
        Some(2..) => return Err(io::ErrorKind::InvalidInput.into()),
    }
    if fs::symlink_metadata(format!("/proc/self/fd/{FIRST_PASSED}")).is_err() {
        return Err(io::ErrorKind::NotFound.into());
    }
    if IS_TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(None);
    }
    // SAFETY: the descriptor is open, and has been since before this program started: `LISTEN_PID` is
    // the id of this very process, and is set only by the program that passes the descriptor on. So
    // nothing that this process opened was given its number and no other value owns it; and the flag
    // above lets it be taken only once.
    #[allow(unsafe_code)]
    let socket = unsafe { OwnedFd::from_raw_fd(FIRST_PASSED) };
    // opencode must not inherit it.
    fcntl_setfd(&socket, FdFlags::CLOEXEC)?;
    Ok(Some(socket))
}
