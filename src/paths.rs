//! The data directory and how files in it are opened.
//!
//! Invariants: the directory is ours and 0700; files are 0600 by an explicit mode and not by the umask, which
//! opencode would inherit; symbolic links in it are never followed.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::error::{Error, Result};

/// The directory with all files of openwork; docs/files.md lists them.
#[derive(Clone, Debug)]
pub struct DataDir(PathBuf);

impl DataDir {
    /// `given` (the option, else `OPENWORK_DATA_DIR`), else `$XDG_DATA_HOME/openwork` when that is
    /// absolute, else `~/.local/share/openwork`. Never `~/.openwork`: OpenWork's desktop program
    /// stops the daemon that it finds there. Creates nothing.
    pub fn resolve(given: Option<&Path>, xdg_data_home: Option<&Path>) -> Result<DataDir> {
        let path = match (given, xdg_data_home) {
            (Some(given), _) => absolute(given)?,
            (None, Some(xdg)) if xdg.is_absolute() => xdg.join("openwork"),
            (None, _) => home()?.join(".local/share/openwork"),
        };
        Ok(DataDir(path))
    }

    /// Refuses a directory of another user, and a path through another user's symbolic link in a
    /// world-writable directory: such a link could make any directory of ours the data directory. A directory
    /// that does not exist yet is fine.
    ///
    /// # Errors
    /// `permission_denied`.
    pub fn check_owner(&self) -> Result<()> {
        if self.0.ancestors().any(is_planted_link) {
            return Err(self.denied("the path of the data directory has a symbolic link of another user"));
        }
        match fs::metadata(&self.0) {
            Ok(metadata) if metadata.uid() == rustix::process::geteuid().as_raw() => Ok(()),
            Ok(metadata) => {
                Err(self.denied(&format!("the data directory belongs to another user (uid {})", metadata.uid())))
            }
            Err(e) if is_absent(&e) => Ok(()),
            Err(e) => match self.closed_ancestor() {
                Some((directory, owner)) => Err(self.denied(&format!(
                    "the data directory lies in {}, which is closed to this user (its owner is uid {owner})",
                    directory.display()
                ))),
                None => Err(Error::io("look at", &self.0, e)),
            },
        }
    }

    /// The directory of another user above the data directory that this user may not enter, and the id of
    /// its owner.
    fn closed_ancestor(&self) -> Option<(&Path, u32)> {
        let (path, metadata) = self.0.ancestors().skip(1).find_map(|path| Some((path, fs::metadata(path).ok()?)))?;
        (metadata.uid() != rustix::process::geteuid().as_raw()).then_some((path, metadata.uid()))
    }

    /// Creates the directory if it does not exist, and narrows it to 0700 if it is wider.
    ///
    /// # Errors
    /// `permission_denied` when the directory belongs to another user; when it is shared (`/`, the home
    /// directory, or one with the sticky bit), which narrowing would break; and when root would create it in
    /// the home directory of a user, as with sudo, who could not use it afterwards. Nothing is created then.
    pub fn create(&self) -> Result<()> {
        let path = &self.0;
        self.check_owner()?;
        let missing: Vec<&Path> =
            path.ancestors().take_while(|p| fs::metadata(p).is_err_and(|e| is_absent(&e))).collect();
        let above = missing.last().and_then(|missing| fs::metadata(missing.parent()?).ok());
        let is_another = |owner: &Metadata| rustix::process::geteuid().is_root() && owner.uid() != 0;
        if above.as_ref().is_some_and(is_another) {
            let what = "the data directory would lie in a directory of another user: run openwork as that user, \
                        or name another --data-dir";
            return Err(self.denied(what));
        }
        for directory in missing.into_iter().rev() {
            create_private(directory).map_err(|e| Error::io("create the data directory", path, e))?;
        }
        self.check_owner()?;
        let metadata = fs::metadata(path).map_err(|e| Error::io("look at", path, e))?;
        if !metadata.is_dir() {
            return Err(Error::io("create the data directory", path, io::ErrorKind::AlreadyExists.into()));
        }
        let mode = metadata.mode() & 0o7777;
        let resolved = fs::canonicalize(path).map_err(|e| Error::io("resolve", path, e))?;
        let is_home = home::home_dir().is_some_and(|home| fs::canonicalize(home).is_ok_and(|h| h == resolved));
        if mode & 0o1000 != 0 || resolved.parent().is_none() || is_home {
            return Err(self.denied("not a directory for openwork alone (name one below it)"));
        }
        if mode != 0o700 {
            fs::set_permissions(path, Permissions::from_mode(0o700))
                .map_err(|e| Error::io("narrow the mode of", path, e))?;
        }
        Ok(())
    }

    fn denied(&self, what: &str) -> Error {
        Error::PermissionDenied { what: what.to_owned(), path: self.0.clone() }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The registry: the state file.
    pub fn state(&self) -> PathBuf {
        self.0.join("openwork-orchestrator-state.json")
    }

    /// opencode's credentials.
    pub fn auth(&self) -> PathBuf {
        self.0.join("openwork-orchestrator-auth.json")
    }

    /// Locked by the daemon for its whole life; its text says where the daemon listens.
    pub fn daemon_lock(&self) -> PathBuf {
        self.0.join("daemon.lock")
    }

    /// Locked by a client while it starts a daemon.
    pub fn start_lock(&self) -> PathBuf {
        self.0.join("start.lock")
    }

    /// Held by opencode for as long as it lives.
    pub fn opencode_lock(&self) -> PathBuf {
        self.0.join("opencode.lock")
    }

    /// The output of a background daemon.
    pub fn daemon_log(&self) -> PathBuf {
        self.0.join("daemon.log")
    }

    /// The output of opencode.
    pub fn opencode_log(&self) -> PathBuf {
        self.0.join("opencode.log")
    }

    /// Every file that is kept, whether it exists or not.
    pub fn files(&self) -> [PathBuf; 7] {
        [
            self.state(),
            self.auth(),
            self.daemon_lock(),
            self.start_lock(),
            self.opencode_lock(),
            self.daemon_log(),
            self.opencode_log(),
        ]
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

/// Makes a path absolute: relative to the home directory when it is `~` or starts with `~/`, otherwise to the
/// working directory. Purely lexical; the disk is not read.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    if let Ok(rest) = path.strip_prefix("~") {
        // Joining an empty path would append a slash.
        return Ok(if rest.as_os_str().is_empty() { home()? } else { home()?.join(rest) });
    }
    std::path::absolute(path).map_err(|e| Error::io("make absolute the path", path, e))
}

/// The opencode to start: `given` (the option), else `opencode` on this process's PATH, else
/// `~/.opencode/bin/opencode`, where its own installer puts it.
///
/// # Errors
/// `opencode_not_found`.
pub fn find_opencode(given: Option<&Path>) -> Result<(PathBuf, Metadata)> {
    let executable = |path: &Path| {
        fs::metadata(path).ok().filter(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    };
    if let Some(given) = given {
        return match executable(given) {
            Some(metadata) => Ok((given.to_owned(), metadata)),
            None => Err(Error::OpencodeNotFound(format!("{} is not a program", given.display()))),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join("opencode"))
        .chain(home().ok().map(|home| home.join(".opencode/bin/opencode")))
        .find_map(|candidate| executable(&candidate).map(|metadata| (candidate, metadata)))
        .ok_or_else(|| {
            // Daemons are also started by cron and git hooks, whose PATH differs from a shell's.
            let path = path.to_string_lossy();
            Error::OpencodeNotFound(format!("neither in ~/.opencode/bin nor on the PATH of the daemon, {path}"))
        })
}

/// Whether a path is a symbolic link of another user in a world-writable directory. Kernels refuse to follow
/// such links only with `fs.protected_symlinks`.
fn is_planted_link(path: &Path) -> bool {
    let Ok(link) = fs::symlink_metadata(path) else { return false };
    let is_writable = || path.parent().and_then(|p| fs::metadata(p).ok()).is_some_and(|p| p.mode() & 0o002 != 0);
    link.is_symlink() && ![0, rustix::process::geteuid().as_raw()].contains(&link.uid()) && is_writable()
}

/// Whether an error means that nothing exists at the path.
pub fn is_absent(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Creates a directory with mode 0700, whatever the umask; an existing one stays unchanged.
pub fn create_private(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        // By path, since under umask 777 the new directory cannot be opened.
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(0o700)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
    }
}

/// Opens a file of the data directory, with mode 0600 and never through a symbolic link.
pub fn open_private(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let (file, metadata) = open_regular(path, options.mode(0o600))?;
    if metadata.mode() & 0o7777 != 0o600 {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    Ok(file)
}

/// Opens a regular file for reading, never through a symbolic link, without changing its mode: for checks
/// that must change nothing.
pub fn open_unchanged(path: &Path) -> io::Result<File> {
    open_regular(path, OpenOptions::new().read(true)).map(|(file, _)| file)
}

fn open_regular(path: &Path, options: &mut OpenOptions) -> io::Result<(File, Metadata)> {
    // NONBLOCK keeps a planted FIFO from blocking the open; regular files ignore it.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = options.custom_flags(flags.bits() as i32).open(path)?;
    let metadata = file.metadata()?;
    match metadata.is_file() {
        true => Ok((file, metadata)),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
    }
}
