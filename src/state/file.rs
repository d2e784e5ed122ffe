//! Files that are read and replaced whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::paths::{self, open_private};

/// The content of a file of ours; `None` when it does not exist.
///
/// # Errors
/// `state_corrupt`, with this hint.
pub fn read_whole(path: &Path, hint: &'static str) -> Result<Option<Vec<u8>>> {
    let corrupt = |what: &str, e: io::Error| {
        let why = format!("{what}: {e}");
        Error::StateCorrupt { path: path.to_owned(), why, hint }
    };
    let mut file = match open_private(path, OpenOptions::new().read(true)) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Err(Error::io("read", path, e)),
        Err(e) => return Err(corrupt("cannot be opened", e)),
    };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|e| corrupt("cannot be read", e))?;
    Ok(Some(bytes))
}

pub fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// Replaces a file whole: a crash or a full disk at any point leaves the old one or the new one.
pub fn write_whole(path: &Path, value: &impl Serialize) -> Result<()> {
    let temporary = temporary(path);
    let directory = path.parent().unwrap_or(Path::new("/"));
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| Error::StateWriteFailed { what, path, source }
    };
    let write = || {
        // Created anew, so that nothing that was planted there is written to.
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
        fs::rename(&temporary, path).map_err(failed("replace", path))?;
        Ok(parent)
    };
    let parent = write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })?;
    // The new file is in place, and nothing that is said can change that; only its survival of a
    // power cut hangs on this.
    if let Err(e) = parent.sync_all() {
        crate::log!("{}", Error::io("sync", directory, e));
    }
    Ok(())
}
