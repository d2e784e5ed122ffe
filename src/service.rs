//! The user's own opencode service (2.x): plain `opencode` starts one server for all its clients
//! (`opencode serve --service`), leaves it running, and registers it in a file with its URL, process id
//! and password. With `--shared`, that server is openwork's opencode too.
//!
//! Invariants: a registration counts only if the file belongs to our user and nobody else can read it;
//! a service counts only if its process is our user's and holds the socket that listens at its URL. The
//! password of anything else is never sent anywhere. Nothing here signals a process.
//!
//! Source of the format: the sources of 2.x; the file has mode 0600, is replaced by a rename once the
//! server listens, and is removed at an orderly end.

use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use crate::agent::Listener;
use crate::error::{Error, Result};
use crate::framing::basic;
use crate::line::V2_USERNAME;
use crate::paths::{home, is_absent, open_unchanged};
use crate::system::{process, socket, wait};
use crate::wire::from_json;

/// The largest registration that is read; a real one has some 250. Bytes.
const LENGTH_LIMIT: u64 = 64 * 1024;

/// The registration of a service.
#[derive(Clone, Deserialize)]
pub struct Registration {
    /// The URL, such as `http://127.0.0.1:49374`.
    pub url: String,
    /// The pid of the service.
    pub pid: u32,
    /// The password of the Basic credentials; the user is `opencode`.
    pub password: String,
    /// The version of opencode.
    #[serde(default)]
    pub version: Option<String>,
}

/// A running service, proved to be our user's.
#[derive(Clone)]
pub struct Service {
    /// The registration.
    pub registration: Registration,
    /// The socket that it holds.
    pub listener: Listener,
}

/// Where the service registers: `opencode/service.json` in `$XDG_STATE_HOME`, else in `~/.local/state`.
///
/// # Errors
/// `usage` without a home directory.
pub fn path() -> Result<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|state| state.is_absolute());
    let state = match state {
        Some(state) => state,
        None => home()?.join(".local/state"),
    };
    Ok(state.join("opencode/service.json"))
}

/// The running service, if it can be trusted.
pub fn find() -> Option<Service> {
    prove(read(&path().ok()?).ok()??).ok()?
}

/// The `Authorization` of the registered service, even if it does not run.
pub fn authorization() -> Option<String> {
    Some(read(&path().ok()?).ok()??.authorization())
}

/// Reads a registration; `None` when there is none.
///
/// # Errors
/// `opencode_unavailable` for a file that another user could have written or read, or an invalid one.
pub fn read(path: &Path) -> Result<Option<Registration>> {
    let refused = |why: &str| Err(Error::OpencodeUnavailable(format!("{} {why}", path.display())));
    let mut file = match open_unchanged(path) {
        Ok(file) => file,
        Err(e) if is_absent(&e) => return Ok(None),
        Err(e) => return refused(&format!("cannot be read: {e}")),
    };
    let metadata = file.metadata().map_err(|e| Error::io("look at", path, e))?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return refused("belongs to another user, and is not trusted");
    }
    if metadata.mode() & 0o077 != 0 {
        return refused("is open to other users, and not trusted: its mode should be 0600");
    }
    let mut bytes = Vec::new();
    if let Err(e) = (&mut file).take(LENGTH_LIMIT).read_to_end(&mut bytes) {
        return refused(&format!("cannot be read: {e}"));
    }
    match from_json::<Registration>(&bytes) {
        Ok(registration) if registration.password.is_empty() => refused("has no password"),
        Ok(registration) => Ok(Some(registration)),
        // Keep the text out of the message, since it contains the password.
        Err(_) => refused("is not the registration of an opencode service"),
    }
}

/// Proves the service of a registration; `None` when it has ended, does not listen yet, or is not our user's.
///
/// # Errors
/// `opencode_unavailable` for a URL outside 127.0.0.0/8; `overloaded` when this process runs out of a
/// resource that the check needs.
pub fn prove(registration: Registration) -> Result<Option<Service>> {
    let Some(address) = registration.address() else {
        let url = &registration.url;
        return Err(Error::OpencodeUnavailable(format!(
            "the opencode service listens on {url:?}, and openwork uses it on 127.0.0.1 only: `opencode service unset \
             hostname`"
        )));
    };
    // Open the pidfd before the checks, so that they hold for the process behind it.
    let looked_at = || -> io::Result<Option<Listener>> {
        let Some(held) = process::open(registration.pid)? else { return Ok(None) };
        if !process::is_ours(registration.pid) {
            return Ok(None);
        }
        let listening = socket::listening(registration.pid, address)?;
        let listener = listening.map(|found| Listener { address, socket: found.inode, process: Arc::new(held) });
        Ok(listener.filter(|listener| !wait::has_ended(&listener.process)))
    };
    match looked_at() {
        Ok(listener) => Ok(listener.map(|listener| Service { registration, listener })),
        Err(_) => Err(Error::Overloaded("descriptors")),
    }
}

impl Registration {
    /// The `Authorization` that the service accepts.
    pub fn authorization(&self) -> String {
        basic(V2_USERNAME, &self.password)
    }

    /// The address of the service, if it is in 127.0.0.0/8.
    fn address(&self) -> Option<SocketAddrV4> {
        let rest = self.url.strip_prefix("http://")?.trim_end_matches('/');
        let (host, port) = rest.rsplit_once(':')?;
        let ip = if host == "localhost" { Ipv4Addr::LOCALHOST } else { host.parse().ok()? };
        Some(SocketAddrV4::new(ip, port.parse().ok()?)).filter(|address| address.ip().is_loopback())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::net::TcpListener;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn registration(url: &str, pid: u32) -> Registration {
        Registration { url: url.to_owned(), pid, password: "secret".to_owned(), version: None }
    }

    #[test]
    fn service_must_hold_the_socket_at_its_url() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", socket.local_addr().unwrap());
        let me = std::process::id();
        let service = prove(registration(&url, me)).unwrap().expect("this process listens there");
        assert_eq!(service.listener.address.to_string(), url["http://".len()..]);
        assert!(prove(registration(&format!("{url}/"), me)).unwrap().is_some());

        // Another process of ours, a process that has ended, and a port where nothing listens.
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(prove(registration(&url, other.id())).unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(prove(registration(&url, other.id())).unwrap().is_none());
        assert!(prove(registration(&url, 0)).unwrap().is_none());
        drop(socket);
        assert!(prove(registration(&url, me)).unwrap().is_none());
    }

    #[test]
    fn service_must_listen_on_loopback() {
        let address = |url: &str| registration(url, 1).address().map(|address| address.to_string());
        for (url, expected) in [
            ("http://127.0.0.1:49374", Some("127.0.0.1:49374")),
            ("http://127.0.0.2:1/", Some("127.0.0.2:1")),
            ("http://localhost:1", Some("127.0.0.1:1")),
            ("http://0.0.0.0:1", None),
            ("http://192.0.2.1:1", None),
            ("http://[::1]:1", None),
            ("http://127.0.0.1.example.com:1", None),
            ("http://127.0.0.1:1@192.0.2.1:1", None),
            ("https://127.0.0.1:1", None),
            ("http://127.0.0.1", None),
            ("", None),
        ] {
            assert_eq!(address(url).as_deref(), expected, "{url}");
        }
        assert!(prove(registration("http://0.0.0.0:1", 1)).is_err());
    }

    #[test]
    fn registration_must_be_private_to_our_user() {
        let directory = std::env::temp_dir().join(format!("openwork-service-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let path = directory.join("service.json");
        assert!(read(&path).unwrap().is_none());
        let good = r#"{"id":"x","version":"2.3.2","url":"http://127.0.0.1:1","pid":5,"password":"secret"}"#;
        fs::write(&path, good).unwrap();
        for mode in [0o644, 0o640, 0o604, 0o620, 0o601] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert!(read(&path).is_err(), "{mode:o}");
        }
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let found = read(&path).unwrap().unwrap();
        assert_eq!((found.pid, found.password.as_str(), found.version.as_deref()), (5, "secret", Some("2.3.2")));

        let link = directory.join("link.json");
        symlink(&path, &link).unwrap();
        assert!(read(&link).is_err());
        assert!(read(&directory).is_err());
        for bad in ["", "[]", r#"{"url":"http://127.0.0.1:1","pid":5}"#, &good.replace("secret", "")] {
            fs::write(&path, bad).unwrap();
            let error = read(&path).err().expect(bad).to_string();
            assert!(!error.contains("secret"), "{error}");
        }
        fs::remove_dir_all(&directory).unwrap();
    }
}
