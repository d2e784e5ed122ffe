//! Workspaces: the entry in the state file, the id, the name, the path or URL, and how a selector on
//! the command line finds an entry.
//!
//! New entries are validated here; entries read from a file are accepted as stored.

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::io;
use std::net::Ipv6Addr;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::system::disk;

/// `ws-` and the first 12 hex digits of the SHA-1 of the path, or of the URL and the directory there.
pub type WorkspaceId = String;

/// The longest name, in characters.
const NAME_LIMIT: usize = 100;

/// How long resolving a directory may take: a sleeping disk needs up to ten seconds to spin up.
const RESOLVE_LIMIT: Duration = Duration::from_secs(10);
/// How long resolving the directories of all workspaces may take, in a search through links. A
/// directory on a hanging mount is skipped.
const LINKS_LIMIT: Duration = Duration::from_secs(1);

/// The type of a workspace: `workspaceType` on the wire and in the state file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// A directory of this machine.
    #[default]
    Local,
    /// The URL of an OpenCode server elsewhere: openwork stores it and does not route to it.
    Remote,
    /// A type written by a newer version: the entry is kept and listed, but cannot be used.
    Other(String),
}

impl Kind {
    /// The name on the wire.
    pub fn name(&self) -> &str {
        match self {
            Kind::Local => "local",
            Kind::Remote => "remote",
            Kind::Other(name) => name,
        }
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Kind, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = Kind;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the type of a workspace")
            }

            fn visit_str<E>(self, name: &str) -> std::result::Result<Kind, E> {
                Ok(match name {
                    "local" => Kind::Local,
                    "remote" => Kind::Remote,
                    other => Kind::Other(other.to_owned()),
                })
            }
        }
        deserializer.deserialize_str(Name)
    }
}

/// A workspace, as in the state file and on the wire. Times are Unix milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workspace {
    /// Unique; the same directory or URL always gets the same id.
    pub id: WorkspaceId,
    /// Unique; see [`check_name`].
    #[serde(default)]
    pub name: String,
    /// The resolved directory; empty for a remote workspace.
    #[serde(default)]
    pub path: String,
    /// Local or remote.
    #[serde(default)]
    pub workspace_type: Kind,
    /// The URL of a remote workspace, normalised by [`normalise_url`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_url: Option<String>,
    /// The directory on the remote server; empty or absent when none was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// The time of `workspace add`.
    #[serde(default)]
    pub created_at: Option<u64>,
    /// The time of the last switch to the workspace, or of the last request routed to it.
    #[serde(default)]
    pub last_used_at: Option<u64>,
    /// Fields of other versions and programs, kept as they are.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
    /// See [`Workspace::json`].
    #[serde(skip)]
    json: OnceLock<Box<RawValue>>,
}

impl Workspace {
    /// The workspace as JSON. It is cached: each write of the state file writes every workspace, and
    /// most have not changed. Of ten thousand, a switch takes 5.6 ms with the cache and 11.1 without, and a
    /// list 19.5 and 23.
    pub fn json(&self) -> Option<&RawValue> {
        if let Some(json) = self.json.get() {
            return Some(json);
        }
        let json = serde_json::value::to_raw_value(self).ok()?;
        Some(self.json.get_or_init(|| json))
    }

    /// A mutable workspace, copied if shared: other holders keep the old value. Clears the cached JSON.
    pub fn edit(shared: &mut Arc<Workspace>) -> &mut Workspace {
        let workspace = Arc::make_mut(shared);
        workspace.json = OnceLock::new();
        workspace
    }

    /// Whether our opencode serves the workspace.
    pub fn is_local(&self) -> bool {
        self.workspace_type == Kind::Local
    }

    /// The directory of a local workspace.
    ///
    /// # Errors
    /// `workspace_is_remote`; `bad_request` for a type that this version does not know.
    pub fn local_path(&self) -> Result<&Path> {
        match &self.workspace_type {
            Kind::Local => Ok(Path::new(&self.path)),
            Kind::Remote => Err(Error::WorkspaceIsRemote(self.name.clone())),
            Kind::Other(name) => Err(Error::BadRequest(format!(
                "{} is a workspace of type {name:?}, which openwork {} does not support",
                self.name,
                env!("CARGO_PKG_VERSION")
            ))),
        }
    }

    /// The failure of a call that needs the directory, which has gone.
    pub fn gone(&self) -> Error {
        Error::DirectoryGone { name: self.name.clone(), path: PathBuf::from(&self.path) }
    }

    /// The path or URL to show to people.
    pub fn location(&self) -> String {
        location(&self.workspace_type, &self.path, self.base_url.as_deref(), self.directory.as_deref()).into_owned()
    }
}

/// The path, or the URL and the directory there, to show to people.
pub fn location<'a>(kind: &Kind, path: &'a str, base_url: Option<&'a str>, directory: Option<&str>) -> Cow<'a, str> {
    match (kind, base_url, directory) {
        (Kind::Remote, Some(url), None | Some("")) => url.into(),
        (Kind::Remote, Some(url), Some(directory)) => format!("{url} {directory}").into(),
        (Kind::Remote, None, _) | (Kind::Local, ..) => path.into(),
        (Kind::Other(name), url, _) => {
            let place = if path.is_empty() { url.unwrap_or_default() } else { path };
            format!("{place} (type {name:?}, not supported)").trim_start().to_owned().into()
        }
    }
}

/// A validated directory or URL that can be added.
pub enum Place {
    /// A resolved directory.
    Local(String),
    /// A normalised URL, and the directory on that server if one was given.
    Remote { base_url: String, directory: Option<String> },
}

impl Place {
    /// An existing directory, resolved as by `realpath`.
    ///
    /// # Errors
    /// `bad_request` for a relative path, `path_not_found`, `path_not_directory`,
    /// `path_not_utf8`, `permission_denied`.
    pub fn local(path: &Path) -> Result<Place> {
        if !path.is_absolute() {
            return Err(match path.as_os_str().is_empty() {
                true => Error::PathNotFound(path.to_owned()),
                false => Error::BadRequest(format!("the path must be absolute: {}", path.display())),
            });
        }
        let resolved = existing_directory(path)?;
        resolved.into_os_string().into_string().map(Place::Local).map_err(|path| Error::PathNotUtf8(path.into()))
    }

    /// A remote server.
    ///
    /// # Errors
    /// `invalid_url`; `bad_request` for a directory with control characters.
    pub fn remote(base_url: &str, directory: Option<&str>) -> Result<Place> {
        let directory = directory.filter(|directory| !directory.is_empty());
        if directory.is_some_and(|directory| directory.chars().any(char::is_control)) {
            return Err(Error::BadRequest("the directory contains a control character".to_owned()));
        }
        Ok(Place::Remote { base_url: normalise_url(base_url)?, directory: directory.map(str::to_owned) })
    }

    /// The id of a workspace at this place.
    pub fn id(&self) -> WorkspaceId {
        let hash = match self {
            Place::Local(path) => sha1_smol::Sha1::from(path),
            Place::Remote { base_url, directory: None } => sha1_smol::Sha1::from(base_url),
            Place::Remote { base_url, directory: Some(directory) } => {
                sha1_smol::Sha1::from(format!("{base_url}::{directory}"))
            }
        };
        let mut hex = hash.digest().to_string();
        hex.truncate(12);
        format!("ws-{hex}")
    }

    /// The existing entry for this place: by id, or, if another program made the entry with an id of its
    /// own, by path or URL. Does not touch the disk.
    pub fn entry<'w>(&self, workspaces: &'w [Arc<Workspace>]) -> Option<&'w Arc<Workspace>> {
        let id = self.id();
        let is_it = |w: &&Arc<Workspace>| match self {
            Place::Local(path) => w.is_local() && w.path == *path,
            Place::Remote { base_url, directory } => {
                !w.is_local()
                    && w.base_url.as_ref() == Some(base_url)
                    && w.directory.as_deref().unwrap_or_default() == directory.as_deref().unwrap_or_default()
            }
        };
        workspaces.iter().find(|w| w.id == id).or_else(|| workspaces.iter().find(is_it))
    }

    /// An existing entry whose path leads to this place through a link, as another program may have
    /// stored it. Touches the disk.
    pub fn linked_entry<'w>(&self, workspaces: &'w [Arc<Workspace>]) -> Option<&'w Arc<Workspace>> {
        let Place::Local(path) = self else { return None };
        let found = workspaces.iter().zip(real_paths(workspaces));
        found.filter(|(_, at)| at.as_deref() == Some(Path::new(path))).map(|(workspace, _)| workspace).next()
    }

    /// The default name: the last component of the path, or the host. Characters that a name must not
    /// contain become `-`.
    pub fn derived_name(&self) -> String {
        let source = match self {
            Place::Local(path) => Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or("root"),
            Place::Remote { base_url, .. } => {
                let authority = base_url.split("://").nth(1).unwrap_or_default();
                let authority = authority.split('/').next().unwrap_or_default();
                // Drop the port, but keep the colons of an IPv6 address.
                match authority.rfind(':') {
                    Some(colon) if !authority.ends_with(']') => &authority[..colon],
                    _ => authority,
                }
            }
        };
        let mut name: String =
            source.chars().take(NAME_LIMIT).map(|c| if forbidden_in_name(c) { '-' } else { c }).collect();
        // `-` is not allowed as the first character either, so drop instead of replace.
        while name.starts_with(FORBIDDEN_FIRST) {
            name.remove(0);
        }
        if name.is_empty() {
            name.push_str("workspace");
        }
        if is_id(&name) { format!("workspace-{name}") } else { name }
    }

    /// A new entry for this place.
    pub fn into_workspace(self, name: String, now: u64) -> Workspace {
        let id = self.id();
        let (path, workspace_type, base_url, directory) = match self {
            Place::Local(path) => (path, Kind::Local, None, None),
            Place::Remote { base_url, directory } => {
                (String::new(), Kind::Remote, Some(base_url), Some(directory.unwrap_or_default()))
            }
        };
        Workspace {
            id,
            name,
            path,
            workspace_type,
            base_url,
            directory,
            created_at: Some(now),
            last_used_at: Some(now),
            extra: Map::new(),
            json: OnceLock::new(),
        }
    }
}

/// Resolves an existing directory.
///
/// # Errors
/// As [`Place::local`]; `internal` when the file system does not respond.
pub fn existing_directory(path: &Path) -> Result<PathBuf> {
    let given = path.to_owned();
    disk::within(RESOLVE_LIMIT, move || resolve_directory(&given)).unwrap_or_else(|| {
        let hangs = io::Error::new(io::ErrorKind::TimedOut, "the file system does not respond");
        Err(Error::io("resolve", path, hangs))
    })
}

fn resolve_directory(path: &Path) -> Result<PathBuf> {
    let resolved = fs::canonicalize(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Error::PathNotFound(path.to_owned()),
        io::ErrorKind::NotADirectory => Error::PathNotDirectory(path.to_owned()),
        io::ErrorKind::InvalidInput => Error::PathNotUtf8(path.to_owned()), // NUL
        io::ErrorKind::PermissionDenied => Error::io("resolve", path, e),
        _ => Error::BadRequest(format!("cannot resolve {}: {e}", path.display())),
    })?;
    match fs::metadata(&resolved) {
        Ok(metadata) if metadata.is_dir() => Ok(resolved),
        Ok(_) => Err(Error::PathNotDirectory(resolved)),
        Err(e) => Err(Error::io("look at", &resolved, e)),
    }
}

/// Characters that a name must not start with: it would look like an option, a path or a selector.
const FORBIDDEN_FIRST: [char; 4] = ['-', '.', '~', '@'];

/// Control and bidi-control characters, and `/`, which would make the name look like a path.
fn forbidden_in_name(c: char) -> bool {
    c == '/' || is_unprintable(c)
}

/// Control characters and bidi controls, which could disguise text: never printed as they are.
pub fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

pub fn is_id(name: &str) -> bool {
    name.strip_prefix("ws-")
        .is_some_and(|hex| hex.len() == 12 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

/// Checks the name of a workspace: 1 to 100 characters; no control or bidi-control character and no
/// `/`; not starting with `-`, `.`, `~` or `@`; not of the form of an id.
///
/// # Errors
/// `invalid_name`, with the rule that was broken.
pub fn check_name(name: &str) -> Result<()> {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.chars().count() > NAME_LIMIT {
        "it is longer than 100 characters"
    } else if name.contains('/') {
        "it contains a /"
    } else if name.chars().any(forbidden_in_name) {
        "it contains a control character"
    } else if name.starts_with(FORBIDDEN_FIRST) {
        "it starts with one of - . ~ @"
    } else if is_id(name) {
        "it has the form of an id"
    } else {
        return Ok(());
    };
    Err(Error::InvalidName { name: name.to_owned(), why })
}

/// Normalises a base URL to the form that is stored: scheme and host in lower case, no default port, no
/// trailing `/`.
///
/// # Errors
/// `invalid_url`: not http or https, no host, a bad port, credentials, a query or a fragment.
pub fn normalise_url(url: &str) -> Result<String> {
    let bad = |why| Error::InvalidUrl { url: url.to_owned(), why };
    let (scheme, rest) = url.split_once("://").ok_or_else(|| bad("it has no scheme"))?;
    let scheme = scheme.to_ascii_lowercase();
    let default_port = match scheme.as_str() {
        "http" => 80,
        "https" => 443,
        _ => return Err(bad("only http and https are supported")),
    };
    if rest.bytes().any(|b| !b.is_ascii_graphic() || b"\\\"<>^`{|}".contains(&b)) {
        return Err(bad("it contains a character that must be percent-encoded"));
    }
    if rest.contains(['?', '#']) {
        return Err(bad("it has a query or a fragment"));
    }
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    if authority.contains('@') {
        return Err(bad("it contains credentials"));
    }
    let (host, port) = match authority.rfind(':') {
        Some(colon) if !authority.ends_with(']') => (&authority[..colon], Some(&authority[colon + 1..])),
        _ => (authority, None),
    };
    let valid_host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')),
    };
    if !valid_host {
        return Err(bad(if host.is_empty() { "it has no host" } else { "the host is not valid" }));
    }
    let port = match port {
        None | Some("") => default_port,
        Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => {
            port.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(|| bad("the port is out of range"))?
        }
        Some(_) => return Err(bad("the port is not a number")),
    };
    let mut normal = format!("{scheme}://{}", host.to_ascii_lowercase());
    if port != default_port {
        normal.push_str(&format!(":{port}"));
    }
    normal.push_str(path.trim_end_matches('/'));
    Ok(normal)
}

/// Whether a selector is a path.
pub fn looks_like_path(selector: &str) -> bool {
    selector.contains('/') || matches!(selector, "." | "..") || selector.starts_with('~')
}

/// Resolves the links in the part of a path that exists, so that a workspace can still be named by a
/// directory that has been deleted. In the rest `..` means the component above, since there are no links.
/// A path on a hanging mount is returned unchanged.
pub fn resolve_as_far_as_possible(path: &Path) -> PathBuf {
    let given = path.to_owned();
    disk::within(RESOLVE_LIMIT, move || resolve_existing_part(&given)).unwrap_or_else(|| path.to_owned())
}

fn resolve_existing_part(path: &Path) -> PathBuf {
    let resolved = path.ancestors().find_map(|ancestor| Some((fs::canonicalize(ancestor).ok()?, ancestor)));
    let Some((mut resolved, ancestor)) = resolved else { return path.to_owned() };
    for component in path.strip_prefix(ancestor).into_iter().flat_map(Path::components) {
        match component {
            Component::ParentDir => {
                resolved.pop();
            }
            component => resolved.push(component),
        }
    }
    resolved
}

/// The workspace whose directory, with links resolved, is or contains this path; of several, the
/// deepest. Touches the disk.
pub fn containing_through_links<'w>(path: &Path, workspaces: &'w [Arc<Workspace>]) -> Option<&'w Arc<Workspace>> {
    let found = workspaces.iter().zip(real_paths(workspaces));
    let containing = found.filter_map(|(workspace, at)| Some((workspace, at.filter(|at| path.starts_with(at))?)));
    containing.max_by_key(|(_, at)| at.components().count()).map(|(workspace, _)| workspace)
}

/// The directories of local workspaces with links resolved; `None` for a directory that does not exist
/// or is on a hanging mount.
fn real_paths(workspaces: &[Arc<Workspace>]) -> Vec<Option<PathBuf>> {
    let resolve = |at: &Path| fs::canonicalize(at).ok();
    let resolved = disk::all(LINKS_LIMIT, workspaces.to_vec(), |w| Path::new(&w.path), resolve);
    workspaces.iter().zip(resolved).map(|(w, at)| at.flatten().filter(|_| w.is_local())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_normalised() {
        for (given, stored) in [
            ("HTTP://Example.COM:80/", "http://example.com"),
            ("https://example.com:443/a/B/", "https://example.com/a/B"),
            ("https://example.com:8443", "https://example.com:8443"),
            ("http://[::1]:4096/", "http://[::1]:4096"),
            ("http://[::1]", "http://[::1]"),
            ("http://h:", "http://h"),
        ] {
            assert_eq!(normalise_url(given).unwrap(), stored, "{given}");
        }
        for bad in [
            "",
            "example.com",
            "ftp://example.com",
            "http://",
            "http:///x",
            "http://u:p@h",
            "http://u@h",
            "http://h?q",
            "http://h#f",
            "http://h:0",
            "http://h:65536",
            "http://h:x",
            "http://h:+1",
            "http://h h",
            "http://[::1",
            "http://[zz]",
            "http://ex\\ample",
            "http://exämple",
            "http://h/\n",
            "http://:80",
        ] {
            assert!(normalise_url(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn derived_names_are_valid() {
        for path in ["/", "/a/.config", "/a/--x", "/a/@~.-", "/a/b\u{202e}c\n", "/a/ws-abc123def456", "/a/ünï"] {
            let name = Place::Local(path.to_owned()).derived_name();
            check_name(&name).unwrap_or_else(|e| panic!("{path:?} gives {name:?}: {e}"));
        }
        let long = format!("/{}", "é".repeat(120));
        check_name(&Place::Local(long).derived_name()).unwrap();
        let host = |url: &str| Place::remote(url, None).unwrap().derived_name();
        assert_eq!(host("https://Example.com:8080/x"), "example.com");
        assert_eq!(host("http://[::1]:1"), "[::1]");
    }
}
