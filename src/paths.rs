//! The data directory and how files in it are opened.
//!
//! Invariants: the directory is ours and 0700; files are 0600, each by its own mode and never by
//! the umask, which opencode would inherit; a symbolic link in it is never followed.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::error::{Error, Result};

/// Where openwork keeps everything; see the README's table of files.
#[derive(Clone, Debug)]
pub struct DataDir(PathBuf);

impl DataDir {
    /// `given` (the option, else `OPENWORK_DATA_DIR`), else `$XDG_DATA_HOME/openwork` when that is
    /// absolute, else `~/.local/share/openwork`. Never `~/.openwork`: OpenWork's desktop program
    /// stops the daemon it finds there. Nothing is created.
    pub fn resolve(given: Option<&Path>, xdg_data_home: Option<&Path>) -> Result<DataDir> {
        let path = match (given, xdg_data_home) {
            (Some(given), _) => absolute(given)?,
            (None, Some(xdg)) if xdg.is_absolute() => xdg.join("openwork"),
            (None, _) => home()?.join(".local/share/openwork"),
        };
        Ok(DataDir(path))
    }

    /// Makes the directory when it is not there, and narrows it to 0700 when it is wider.
    ///
    /// # Errors
    /// `permission_denied` when it belongs to another user, or is one that others use too
    /// (`/`, the home directory, one with the sticky bit), which narrowing would break.
    pub fn create(&self) -> Result<()> {
        let path = &self.0;
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(path).map_err(|e| Error::io("create the data directory", path, e))?;
        let metadata = fs::metadata(path).map_err(|e| Error::io("look at", path, e))?;
        let denied = |what: &str| Error::PermissionDenied { what: what.to_owned(), path: path.clone() };
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(denied("the data directory belongs to another user"));
        }
        let mode = metadata.mode() & 0o7777;
        let resolved = fs::canonicalize(path).map_err(|e| Error::io("resolve", path, e))?;
        let is_home = home::home_dir().is_some_and(|home| fs::canonicalize(home).is_ok_and(|h| h == resolved));
        if mode & 0o1000 != 0 || resolved.parent().is_none() || is_home {
            return Err(denied("not a directory for openwork alone (name one below it)"));
        }
        if mode != 0o700 {
            fs::set_permissions(path, Permissions::from_mode(0o700))
                .map_err(|e| Error::io("narrow the mode of", path, e))?;
        }
        Ok(())
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The registry: the state file.
    pub fn state(&self) -> PathBuf {
        self.0.join("openwork-orchestrator-state.json")
    }

    /// The credentials of opencode.
    pub fn auth(&self) -> PathBuf {
        self.0.join("openwork-orchestrator-auth.json")
    }

    /// Held by the daemon for its whole life; says where it listens.
    pub fn daemon_lock(&self) -> PathBuf {
        self.0.join("daemon.lock")
    }

    /// Held by the client that is starting a daemon.
    pub fn start_lock(&self) -> PathBuf {
        self.0.join("start.lock")
    }

    /// What the daemon says when it runs in the background.
    pub fn daemon_log(&self) -> PathBuf {
        self.0.join("daemon.log")
    }

    /// What opencode says.
    pub fn opencode_log(&self) -> PathBuf {
        self.0.join("opencode.log")
    }

    /// The working directory of `opencode serve`; empty.
    pub fn opencode_cwd(&self) -> PathBuf {
        self.0.join("opencode")
    }
}

/// The user's home directory.
pub fn home() -> Result<PathBuf> {
    home::home_dir()
        .filter(|home| home.is_absolute())
        .ok_or_else(|| Error::usage("no home directory: set HOME, or use --data-dir"))
}

/// `path` against the working directory, `~` and `~/…` against the home directory; lexically,
/// without asking the disk.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    if let Ok(rest) = path.strip_prefix("~") {
        // Joining nothing would leave a slash at the end.
        return Ok(if rest.as_os_str().is_empty() { home()? } else { home()?.join(rest) });
    }
    std::path::absolute(path).map_err(|e| Error::io("make absolute the path", path, e))
}

/// Opens a file of the data directory: never through a symbolic link, and 0600.
pub fn open_private(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    // NONBLOCK: a planted FIFO must not hold us up. It means nothing for a regular file.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = options.mode(0o600).custom_flags(flags.bits() as i32).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    if metadata.mode() & 0o7777 != 0o600 {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    Ok(file)
}
