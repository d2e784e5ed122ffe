//! Lock files: `daemon.lock`, `start.lock` and `opencode.lock`.
//!
//! The lock is that of flock(2): it belongs to the open file, so every process that inherits the
//! descriptor holds it too, and the kernel releases it when the last of them exits. Lock files are
//! never deleted: a lock on a deleted file protects nothing.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use fd_lock::RwLock;

use crate::error::{Error, Result};
use crate::paths::{open_private, open_unchanged};

/// A lock, released on drop.
pub struct Lock {
    /// The locked file.
    pub file: File,
}

/// Opens or creates a lock file and tries to lock it exclusively; `None` when another process holds it. The
/// file is emptied at once: clients would take the text of the last holder for the address of this one.
pub fn try_exclusive(path: &Path) -> Result<Option<Lock>> {
    let file = open_private(path, OpenOptions::new().read(true).write(true).create(true));
    let mut lock = RwLock::new(file.map_err(|e| Error::io("open", path, e))?);
    // The guard would release the lock; without it the lock lasts as long as the open file.
    let locked = lock.try_write().map(std::mem::forget);
    let Some(()) = if_free(locked).map_err(|e| Error::io("lock", path, e))? else { return Ok(None) };
    let file = lock.into_inner();
    file.set_len(0).map_err(|e| Error::io("empty", path, e))?;
    Ok(Some(Lock { file }))
}

/// The file, if a process holds its lock. The check takes a shared lock for a moment, so concurrent checks
/// do not mistake each other for a holder.
pub fn if_held(path: &Path) -> Result<Option<File>> {
    let file = match open_unchanged(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| Error::io("open", path, e))?,
    };
    let lock = RwLock::new(file);
    let locked = lock.try_read().map(drop);
    Ok(match if_free(locked).map_err(|e| Error::io("lock", path, e))? {
        Some(()) => None,
        None => Some(lock.into_inner()),
    })
}

/// `None` when another process holds the lock.
fn if_free(locked: io::Result<()>) -> io::Result<Option<()>> {
    match locked {
        Ok(()) => Ok(Some(())),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lasts_as_long_as_the_open_file() {
        let path = std::env::temp_dir().join(format!("openwork-lock-{}", std::process::id()));
        assert!(if_held(&path).unwrap().is_none());
        let lock = try_exclusive(&path).unwrap().expect("a free lock");
        assert!(if_held(&path).unwrap().is_some());
        assert!(try_exclusive(&path).unwrap().is_none());

        // A duplicate of the descriptor, as a successor inherits it by exec, is enough to keep the lock.
        let inherited = Lock { file: lock.file.try_clone().unwrap() };
        drop(lock);
        assert!(if_held(&path).unwrap().is_some());
        drop(inherited);
        assert!(if_held(&path).unwrap().is_none());
        // A check leaves no lock behind.
        assert!(try_exclusive(&path).unwrap().is_some());
        std::fs::remove_file(&path).unwrap();
    }
}
