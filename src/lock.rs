//! Lock files: `daemon.lock` and `start.lock`.
//!
//! flock(2), since the lock belongs to the open file and ends with the process, however that
//! ends. Lock files are never deleted: a lock on a deleted file protects nothing.
//!
//! Why not a crate for it: their guards borrow the lock, which "try until a deadline, then keep
//! for life" cannot be written with; and rustix, which we have, makes the same call safely.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::paths::open_private;

/// A lock that is held until it is dropped.
pub struct Lock {
    /// The locked file.
    pub file: File,
}

/// Opens a lock file, made if it is not there, and tries to lock it for us alone; `None` when it
/// is held.
pub fn try_exclusive(path: &Path) -> Result<Option<Lock>> {
    let file = open_private(path, OpenOptions::new().read(true).write(true).create(true));
    let file = file.map_err(|e| Error::io("open", path, e))?;
    let locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
    Ok(held(locked).map_err(|e| Error::io("lock", path, e))?.map(|()| Lock { file }))
}

/// The file, if somebody holds its lock: to look does not disturb others who look.
pub fn if_held(path: &Path) -> Result<Option<File>> {
    let file = match open_private(path, OpenOptions::new().read(true)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| Error::io("open", path, e))?,
    };
    let locked = flock(&file, FlockOperation::NonBlockingLockShared);
    Ok(match held(locked).map_err(|e| Error::io("lock", path, e))? {
        Some(()) => None,
        None => Some(file),
    })
}

/// `None` when somebody else holds it.
fn held(locked: rustix::io::Result<()>) -> io::Result<Option<()>> {
    match locked {
        Ok(()) => Ok(Some(())),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(e.into()),
    }
}
