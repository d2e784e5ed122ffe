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
    /// The process that took the lock: this one, or one whose open file this one has inherited.
    pub taken_by: u32,
    /// Readable once the process has ended.
    pub pidfd: OwnedFd,
}

impl Holder {
    /// Ends the process with TERM, or with KILL if it still runs at the deadline (a stopped process handles
    /// TERM only when it is continued). Its group is not signalled, so its children keep running.
    pub fn end(&self, deadline: Instant) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
        if !wait_until_readable(&self.pidfd, deadline) {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
    }
}

/// The process of our own user that holds the flock(2) lock on this file at `path`; `None` when no process is
/// proven to, for example because the holder is in another container.
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
        // Open the process before checking its pid: if it has not ended after the check, the pid
        // was its own.
        let Ok(Some(pidfd)) = open(pid) else { continue };
        if let Some(taken_by) = locker(pid, &file, path).filter(|_| !has_ended(&pidfd)) {
            return Ok(Some(Holder { pid, taken_by, pidfd }));
        }
    }
    Ok(None)
}

/// Whether a process has this file, which lies at `path`, open with an exclusive lock on it.
pub fn has_locked(pid: u32, file: &fs::Metadata, path: &Path) -> bool {
    locker(pid, file, path).is_some()
}

/// The process that took the exclusive lock on this file, which lies at `path`, if the process `pid` has
/// it open, by proc(5): `/proc/<pid>/fdinfo/<fd>` has a line `lock: <n>: FLOCK  ADVISORY  WRITE <locker> …`.
fn locker(pid: u32, file: &fs::Metadata, path: &Path) -> Option<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    entries.flatten().find_map(|entry| {
        // Compare names first: stat on a file on a hung network mount would never return.
        let is_named_so = fs::read_link(entry.path()).is_ok_and(|target| target.file_name() == path.file_name());
        let is_file = || fs::metadata(entry.path()).is_ok_and(|at| (at.dev(), at.ino()) == (file.dev(), file.ino()));
        let info = Path::new("/proc").join(pid.to_string()).join("fdinfo").join(entry.file_name());
        if !is_named_so || !is_file() {
            return None;
        }
        fs::read_to_string(info).ok()?.lines().find_map(|line| {
            let mut fields = line.strip_prefix("lock:")?.split_ascii_whitespace();
            let [_, "FLOCK", _, "WRITE", locker] = [(); 5].map(|()| fields.next().unwrap_or_default()) else {
                return None;
            };
            locker.parse().ok()
        })
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn opening_a_file_is_not_holding_its_lock() {
        let path = std::env::temp_dir().join(format!("openwork-holder-{}", std::process::id()));
        let ours = File::create(&path).unwrap();
        assert!(holder(&ours, &path).unwrap().is_none());
        let mut lock = fd_lock::RwLock::new(ours.try_clone().unwrap());
        let guard = lock.try_write().unwrap();
        let us = std::process::id();
        assert_eq!(holder(&ours, &path).unwrap().map(|holder| (holder.pid, holder.taken_by)), Some((us, us)));
        drop(guard);
        // A process that only has the file open does not hold the lock.
        let mut other = Command::new("sleep").arg("60").stdin(File::open(&path).unwrap()).spawn().unwrap();
        assert!(holder(&ours, &path).unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
        // A process that inherits the open file holds the lock that we took.
        let mut passed_on = fd_lock::RwLock::new(File::create(&path).unwrap());
        std::mem::forget(passed_on.try_write().unwrap());
        let mut heir = Command::new("sleep").arg("60").stdin(passed_on.into_inner()).spawn().unwrap();
        let found = holder(&ours, &path).unwrap().map(|holder| (holder.pid, holder.taken_by));
        heir.kill().unwrap();
        heir.wait().unwrap();
        assert_eq!(found, Some((heir.id(), us)));
        fs::remove_file(&path).unwrap();
    }
}
