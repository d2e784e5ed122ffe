//! Which process holds a file lock.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use rustix::process::{Signal, geteuid, pidfd_send_signal};

use super::process::open;
use super::wait::{has_ended, wait_until_readable};

/// A process that is proven to hold a lock.
pub struct Holder {
    /// Process id.
    pub pid: u32,
    /// Readable once the process has ended.
    pub pidfd: OwnedFd,
}

impl Holder {
    /// Ends the process with TERM, or with KILL if it is still there at the deadline (a frozen process
    /// gets a TERM only when it is woken). Its group is not signalled: what it has started goes on.
    pub fn end(&self, deadline: Instant) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
        if !wait_until_readable(&self.pidfd, deadline) {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
    }
}

/// The process of our own user that holds the flock(2) lock on this file, which lies at `path`;
/// `None` when none is proven to, as when the holder lives in another container.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn holder(file: &File, path: &Path) -> io::Result<Option<Holder>> {
    let file = file.metadata()?;
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if !entry.metadata().is_ok_and(|process| process.uid() == geteuid().as_raw()) {
            continue;
        }
        // Held first, looked at after: what is true of the number is true of a process that still runs.
        let Ok(Some(pidfd)) = open(pid) else { continue };
        if has_locked(pid, &file, path) && !has_ended(&pidfd) {
            return Ok(Some(Holder { pid, pidfd }));
        }
    }
    Ok(None)
}

/// Whether a process has this file, which lies at `path`, open with an exclusive lock on it, by proc(5): `/proc/<pid>/fdinfo/<fd>`
/// has a line `lock: <n>: FLOCK  ADVISORY  WRITE <pid> …` for it.
pub fn has_locked(pid: u32, file: &fs::Metadata, path: &Path) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    entries.flatten().any(|entry| {
        // By its name first: a look at a file on a network mount that hangs would never return.
        let is_named_so = fs::read_link(entry.path()).is_ok_and(|target| target.file_name() == path.file_name());
        let is_file = || fs::metadata(entry.path()).is_ok_and(|at| (at.dev(), at.ino()) == (file.dev(), file.ino()));
        let info = Path::new("/proc").join(pid.to_string()).join("fdinfo").join(entry.file_name());
        let is_locked = || {
            let info = fs::read_to_string(info).unwrap_or_default();
            info.lines().any(|line| line.starts_with("lock:") && line.contains("FLOCK") && line.contains("WRITE"))
        };
        is_named_so && is_file() && is_locked()
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_holder_of_a_lock_has_locked_the_file_and_not_only_opened_it() {
        let path = std::env::temp_dir().join(format!("openwork-holder-{}", std::process::id()));
        let ours = File::create(&path).unwrap();
        assert!(holder(&ours, &path).unwrap().is_none());
        let mut lock = fd_lock::RwLock::new(ours.try_clone().unwrap());
        let guard = lock.try_write().unwrap();
        assert_eq!(holder(&ours, &path).unwrap().map(|holder| holder.pid), Some(std::process::id()));
        drop(guard);
        // A process that has only opened it holds nothing.
        let mut other = Command::new("sleep").arg("60").stdin(File::open(&path).unwrap()).spawn().unwrap();
        assert!(holder(&ours, &path).unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
        fs::remove_file(&path).unwrap();
    }
}
