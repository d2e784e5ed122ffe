//! Reading files and replacing them atomically.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::log::now_ms;
use crate::paths::{self, open_private};

/// Identifies the version of a file: another file, or a change, has another stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn new(metadata: &Metadata) -> Stamp {
        Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// The stamp of the file at this path now, without following a link; `None` when there is none.
    pub fn of(path: &Path) -> io::Result<Option<Stamp>> {
        match fs::symlink_metadata(path) {
            Ok(metadata) => Ok(Some(Stamp::new(&metadata))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// The content of a private file, and its stamp before the read; `None` when it does not exist.
///
/// # Errors
/// `state_corrupt`, with this hint; `permission_denied`.
pub fn read_whole(path: &Path, hint: &'static str) -> Result<Option<(Vec<u8>, Stamp)>> {
    read_opened(path, open_private(path, OpenOptions::new().read(true)), hint)
}

/// The same, but the mode of the file stays as it is.
///
/// # Errors
/// As [`read_whole`].
pub fn read_whole_unchanged(path: &Path, hint: &'static str) -> Result<Option<(Vec<u8>, Stamp)>> {
    read_opened(path, paths::open_unchanged(path), hint)
}

fn read_opened(path: &Path, opened: io::Result<File>, hint: &'static str) -> Result<Option<(Vec<u8>, Stamp)>> {
    let corrupt = |what: &str, e: io::Error| {
        let why = format!("{what}: {e}");
        Error::StateCorrupt { path: path.to_owned(), why, hint }
    };
    let mut file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Err(Error::io("read", path, e)),
        Err(e) => return Err(corrupt("cannot be opened", e)),
    };
    let unreadable = |e| corrupt("cannot be read", e);
    let stamp = Stamp::new(&file.metadata().map_err(unreadable)?);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(Some((bytes, stamp)))
}

/// Keeps a file as `<name>.<why>-<now>` beside it: by a hard link, or by moving it where that is impossible
/// (a directory, a file system without links).
///
/// # Errors
/// `state_write_failed`; the file then stays in place.
pub fn keep_beside(path: &Path, why: &str) -> Result<PathBuf> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{why}-{}", now_ms()));
    let kept = PathBuf::from(name);
    fs::hard_link(path, &kept).or_else(|_| fs::rename(path, &kept)).map_err(|source| Error::StateWriteFailed {
        what: "keep the original as",
        path: kept.clone(),
        source,
    })?;
    Ok(kept)
}

/// The temporary file that is written first and then renamed to this path.
pub fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// Replaces a file atomically: a crash or a full disk leaves the old file or the new one. Returns the stamp
/// of the new file.
///
/// # Errors
/// `state_write_failed`; the old file is then untouched.
pub fn write_whole(path: &Path, value: &impl Serialize) -> Result<Stamp> {
    replace_whole(path, value, || Ok(()))
}

/// The same, but calls `last` right before the rename.
///
/// # Errors
/// As [`write_whole`], and those of `last`.
pub fn replace_whole(path: &Path, value: &impl Serialize, last: impl FnOnce() -> Result<()>) -> Result<Stamp> {
    let temporary = temporary(path);
    let directory = path.parent().unwrap_or(Path::new("/"));
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| Error::StateWriteFailed { what, path, source }
    };
    let write = || {
        // Create a new file, and never write into a planted one.
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &temporary)(e)),
            _ => {}
        }
        let file = paths::open_private(&temporary, OpenOptions::new().write(true).create_new(true))
            .map_err(failed("create", &temporary))?;
        let mut writer = BufWriter::with_capacity(64 * 1024, file);
        serde_json::to_writer_pretty(&mut writer, value)
            .map_err(io::Error::from)
            .and_then(|()| writer.write_all(b"\n"))
            .and_then(|()| writer.flush())
            .map_err(failed("write", &temporary))?;
        writer.get_ref().sync_all().map_err(failed("sync", &temporary))?;
        let parent = File::open(directory).map_err(failed("open", directory))?;
        last()?;
        fs::rename(&temporary, path).map_err(failed("replace", path))?;
        Ok((parent, writer.get_ref().metadata()))
    };
    let (parent, metadata) = write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })?;
    // The new file is in place; only its survival of a power cut depends on this.
    if let Err(e) = parent.sync_all() {
        crate::log!("{}", Error::io("sync", directory, e));
    }
    metadata.map(|metadata| Stamp::new(&metadata)).map_err(failed("look at", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_that_cannot_be_examined_is_not_taken_for_removed() {
        let path = std::env::temp_dir().join(format!("openwork-stamp-{}", std::process::id()));
        assert_eq!(Stamp::of(&path).unwrap(), None);
        fs::write(&path, "").unwrap();
        let empty = Stamp::of(&path).unwrap();
        assert!(empty.is_some());
        assert!(Stamp::of(&path.join("below a file")).is_err());
        fs::write(&path, "longer").unwrap();
        assert_ne!(Stamp::of(&path).unwrap(), empty);
        fs::remove_file(&path).unwrap();
    }
}
