//! The state file: the registry of workspaces and what is known of the running processes.
//!
//! Invariants: the daemon is the only writer. What readers see ([`Store::snapshot`]) is on disk,
//! but for `lastUsedAt`, which is written behind. A write replaces the file whole (temporary
//! file, fsync, rename, fsync of the directory), and memory changes only after the disk has.
//! Fields that we do not know survive at every level. A file that cannot be understood is never
//! touched.
//!
//! Readers take a snapshot and hold no lock while they use it, so that nobody who only reads
//! ever waits for the disk.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::log::now_ms;
use crate::paths::{self, DataDir, open_private};
use crate::system::process::Identity;
use crate::wire::from_json;
use crate::workspace::{self, Place, Workspace, WorkspaceId, check_name};

/// The version of the file that we read and write.
const VERSION: u64 = 1;
/// How long after a change of `lastUsedAt` it is written at the latest: it is worth no more than
/// one write a second.
const WRITE_BEHIND: Duration = Duration::from_secs(1);

/// How many workspaces are named that an ambiguous selector could mean.
const SHOWN_CANDIDATES: usize = 10;

/// What to do about a state file that makes no sense.
const STATE_HINT: &str = "nothing was changed; `openwork state repair` saves what can be read of a state file";

/// What to do about a credentials file that makes no sense.
const AUTH_HINT: &str =
    "nothing was changed; restore the file, or end opencode and remove it: the next daemon makes a new password";

/// The daemon that runs, or ran.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DaemonRecord {
    /// Process id.
    pub pid: u32,
    /// Of its listening socket.
    pub port: u16,
    /// `http://127.0.0.1:<port>`.
    pub base_url: String,
    /// Unix milliseconds.
    pub started_at: u64,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The opencode that runs, with what proves it ours. Written before it can do anything.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EngineRecord {
    /// Process id; it leads its process group.
    pub pid: u32,
    /// Of its listening socket.
    pub port: u16,
    /// `http://<address>:<port>`, an address of 127.0.0.0/8.
    pub base_url: String,
    /// Unix milliseconds.
    pub started_at: u64,
    /// Random; in its environment as `OPENWORK_ENGINE`.
    #[serde(default)]
    pub engine_id: String,
    /// Start time of the process in clock ticks since boot, `/proc/<pid>/stat` field 22.
    #[serde(default)]
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id` when it was started.
    #[serde(default)]
    pub boot_id: String,
    /// Directories whose instances are loaded, as far as is known; written behind.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub instances: Vec<String>,
    /// Those of them that are and were no workspace's; absent in the files of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strangers: Option<Vec<String>>,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl EngineRecord {
    /// What proves a process to be this one.
    pub fn identity(&self) -> Identity {
        Identity {
            pid: self.pid,
            start_ticks: self.start_ticks,
            boot_id: self.boot_id.clone(),
            engine_id: self.engine_id.clone(),
        }
    }

    /// Where opencode listens. A base URL that is not an address of 127.0.0.0/8 (other programs
    /// write `localhost`) means 127.0.0.1.
    pub fn address(&self) -> SocketAddrV4 {
        let given = self.base_url.strip_prefix("http://").and_then(|rest| rest.parse::<SocketAddrV4>().ok());
        let ip = given.map(|address| *address.ip()).filter(Ipv4Addr::is_loopback);
        SocketAddrV4::new(ip.unwrap_or(Ipv4Addr::LOCALHOST), self.port)
    }
}

/// A binary and its version, remembered with size and time: asking costs half a second.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BinaryRecord {
    /// Where it is.
    #[serde(default)]
    pub path: String,
    /// What it said when asked.
    #[serde(default)]
    pub actual_version: Option<String>,
    /// Always `external`: we ship none.
    #[serde(default)]
    pub source: Option<String>,
    /// Bytes, when it was asked.
    #[serde(default)]
    pub size: Option<u64>,
    /// Modification time, Unix nanoseconds in decimal, when it was asked.
    #[serde(default)]
    pub modified: Option<String>,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A workspace that may not be loaded, since that has ended opencode twice.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FenceRecord {
    /// The directory of the workspace.
    pub directory: String,
    /// The version of opencode that ended; another version is given another try.
    #[serde(default)]
    pub version: String,
    /// The last output of opencode before its end.
    #[serde(default)]
    pub output: String,
    /// Unix milliseconds.
    #[serde(default)]
    pub fenced_at: u64,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The binaries we know.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Binaries {
    /// The opencode last started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opencode: Option<BinaryRecord>,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The ports last used, so that addresses stay the same; 0 is none yet.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ports {
    /// The daemon's.
    #[serde(default)]
    pub daemon: u16,
    /// opencode's.
    #[serde(default)]
    pub opencode: u16,
    /// The address of 127.0.0.0/8 that opencode listened on; openwork 0.1 wrote none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opencode_host: Option<String>,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Ports {
    /// Where opencode listened last. `None` for openwork 0.1, which used 127.0.0.1:6175, where any
    /// web page can find it.
    pub fn opencode_address(&self) -> Option<SocketAddrV4> {
        let ip = self.opencode_host.as_ref()?.parse::<Ipv4Addr>().ok().filter(Ipv4Addr::is_loopback)?;
        (self.opencode != 0).then(|| SocketAddrV4::new(ip, self.opencode))
    }

    /// Keeps the address for the next start.
    pub fn keep_opencode_address(&mut self, address: SocketAddrV4) {
        self.opencode = address.port();
        self.opencode_host = Some(address.ip().to_string());
    }
}

/// The whole file. The shape is that of OpenWork's own orchestrator, with fields added.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Of the shape.
    pub version: u64,
    /// Null when none runs.
    #[serde(default)]
    pub daemon: Option<DaemonRecord>,
    /// Null when none runs.
    #[serde(default)]
    pub opencode: Option<EngineRecord>,
    /// Versions remembered.
    #[serde(default)]
    pub binaries: Option<Binaries>,
    /// Of the openwork that wrote this.
    #[serde(default)]
    pub cli_version: Option<String>,
    /// Ports last used.
    #[serde(default)]
    pub ports: Ports,
    /// Workspaces that may not be loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fences: Vec<FenceRecord>,
    /// The active workspace; empty when none is.
    #[serde(default)]
    pub active_id: String,
    /// The one before it; empty when there was none.
    #[serde(default)]
    pub previous_id: String,
    /// In the order they were added.
    #[serde(serialize_with = "as_json")]
    pub workspaces: Vec<Arc<Workspace>>,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Each workspace by the JSON it keeps.
fn as_json<S: Serializer>(workspaces: &[Arc<Workspace>], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_seq(workspaces.iter().map(|workspace| workspace.json()))
}

impl Default for State {
    fn default() -> State {
        State {
            version: VERSION,
            daemon: None,
            opencode: None,
            binaries: None,
            cli_version: None,
            ports: Ports::default(),
            fences: Vec::new(),
            active_id: String::new(),
            previous_id: String::new(),
            workspaces: Vec::new(),
            extra: Map::new(),
        }
    }
}

impl State {
    /// Reads the state file; one that is not there is an empty registry.
    ///
    /// # Errors
    /// `state_corrupt`, `state_too_new`; nothing is touched.
    pub fn read(path: &Path) -> Result<State> {
        let corrupt = |why: String| Error::StateCorrupt { path: path.to_owned(), why, hint: STATE_HINT };
        let Some(bytes) = read_whole(path, STATE_HINT)? else { return Ok(State::default()) };
        match from_json::<State>(&bytes) {
            Ok(state) if state.version == VERSION => Ok(state),
            Ok(State { version, .. }) if version < VERSION => Err(corrupt(format!("there is no version {version}"))),
            Ok(State { version, .. }) => Err(Error::StateTooNew { path: path.to_owned(), version }),
            Err(_) if bytes.is_empty() => Err(corrupt("the file is empty".to_owned())),
            Err(e) => {
                // A newer file may have another shape: its version says so before our shape fails.
                let version = from_json::<Value>(&bytes).ok().and_then(|v| v.get("version")?.as_u64());
                Err(match version {
                    Some(version) if version > VERSION => Error::StateTooNew { path: path.to_owned(), version },
                    _ => corrupt(format!("not a state file: {e}")),
                })
            }
        }
    }

    /// The workspace with this id.
    pub fn get(&self, id: &str) -> Option<&Arc<Workspace>> {
        self.workspaces.iter().find(|workspace| workspace.id == id)
    }

    /// The active workspace.
    pub fn active(&self) -> Option<&Arc<Workspace>> {
        self.get(&self.active_id)
    }

    /// Which workspace a selector means: exact id, exact name, a path in or of it (deepest
    /// first), a unique prefix of a name or of an id. `@active` is the active one, `-` the one
    /// before it. A path must be absolute here.
    ///
    /// # Errors
    /// `workspace_not_found`, `workspace_ambiguous`, `no_active_workspace`.
    pub fn find(&self, selector: &str) -> Result<&Arc<Workspace>> {
        let not_found = || Error::WorkspaceNotFound(selector.to_owned());
        match selector {
            "-" => return self.get(&self.previous_id).ok_or_else(not_found),
            // A script's unset variable, which is a prefix of everything.
            "" => return Err(not_found()),
            _ => {}
        }
        if let Some(found) = self.identified(selector)? {
            return Ok(found);
        }
        if workspace::looks_like_path(selector) {
            let path = Path::new(selector);
            return path.is_absolute().then(|| self.containing(path)).flatten().ok_or_else(not_found);
        }
        // Every id begins with `ws-`: that much of it says nothing.
        let is_prefix = |w: &&Arc<Workspace>| {
            w.name.starts_with(selector) || (selector.len() > "ws-".len() && w.id.starts_with(selector))
        };
        let candidates: Vec<_> = self.workspaces.iter().filter(is_prefix).collect();
        match candidates[..] {
            [] => Err(not_found()),
            [one] => Ok(one),
            _ => Err(ambiguous(selector, &candidates)),
        }
    }

    /// The workspace that is this directory or contains it, the deepest first.
    /// The workspace with this id, this name or this directory, or `@active`. For changes: when a
    /// request is repeated after its workspace has gone, it must not find another one, of which the
    /// selector is a prefix, or which contains the directory.
    ///
    /// # Errors
    /// `workspace_not_found`, `workspace_ambiguous`, `no_active_workspace`.
    pub fn find_exactly(&self, selector: &str) -> Result<&Arc<Workspace>> {
        let at_path = || self.workspaces.iter().find(|w| w.is_local() && !w.path.is_empty() && w.path == selector);
        let found = self.identified(selector)?.or_else(at_path);
        found.ok_or_else(|| Error::WorkspaceNotFound(selector.to_owned()))
    }

    /// The workspace with this id or name, or `@active`.
    fn identified(&self, selector: &str) -> Result<Option<&Arc<Workspace>>> {
        if selector == "@active" {
            return self.active().map(Some).ok_or(Error::NoActiveWorkspace);
        }
        if let Some(found) = self.get(selector) {
            return Ok(Some(found));
        }
        // Names are unique here, but perhaps not in the file of another program.
        let named: Vec<_> = self.workspaces.iter().filter(|w| w.name == selector).collect();
        match named[..] {
            [] => Ok(None),
            [one] => Ok(Some(one)),
            _ => Err(ambiguous(selector, &named)),
        }
    }

    fn containing(&self, path: &Path) -> Option<&Arc<Workspace>> {
        let path = workspace::resolve_as_far_as_possible(path);
        let local = || self.workspaces.iter().filter(|w| w.is_local() && !w.path.is_empty());
        let depth = |path: &Path| path.components().count();
        let stored = local().filter(|w| path.starts_with(&w.path)).max_by_key(|w| depth(Path::new(&w.path)));
        // Another program may have stored a path with a link in it, or a link has come since.
        stored.or_else(|| {
            let resolved = local().filter_map(|w| Some((fs::canonicalize(&w.path).ok()?, w)));
            let containing = resolved.filter(|(at, _)| path.starts_with(at));
            containing.max_by_key(|(at, _)| depth(at)).map(|(_, w)| w)
        })
    }

    /// Adds what is not there; what is there only gets the name, if one was given.
    /// The first workspace becomes active. Returns it and whether it was created.
    ///
    /// # Errors
    /// `invalid_name`, `name_taken`.
    pub fn add(&mut self, place: Place, name: Option<&str>) -> Result<(Arc<Workspace>, bool)> {
        if let Some(existing) = place.entry(&self.workspaces).cloned() {
            let id = existing.id.clone();
            return Ok((name.map_or(Ok(existing), |name| self.rename(&id, name))?, false));
        }
        let name = match name {
            Some(name) => {
                self.check_free_name(name, &place.id())?;
                name.to_owned()
            }
            None => self.free_name(place.derived_name()),
        };
        let workspace = Arc::new(place.into_workspace(name, now_ms()));
        if self.workspaces.is_empty() {
            self.active_id.clone_from(&workspace.id);
        }
        self.workspaces.push(workspace.clone());
        Ok((workspace, true))
    }

    /// Gives a workspace another name.
    ///
    /// # Errors
    /// `invalid_name`, `name_taken`, `workspace_not_found`.
    pub fn rename(&mut self, id: &str, name: &str) -> Result<Arc<Workspace>> {
        self.check_free_name(name, id)?;
        let workspace = self.get_mut(id)?;
        name.clone_into(&mut workspace.name);
        Ok(self.find(id)?.clone())
    }

    /// Removes a workspace; if it was active, none is.
    ///
    /// # Errors
    /// `workspace_not_found`.
    pub fn remove(&mut self, id: &str) -> Result<Arc<Workspace>> {
        let index = self.workspaces.iter().position(|w| w.id == id);
        let index = index.ok_or_else(|| Error::WorkspaceNotFound(id.to_owned()))?;
        for role in [&mut self.active_id, &mut self.previous_id] {
            if role == id {
                role.clear();
            }
        }
        Ok(self.workspaces.remove(index))
    }

    /// Makes a workspace the active one.
    ///
    /// # Errors
    /// `workspace_not_found`.
    pub fn activate(&mut self, id: &str) -> Result<Arc<Workspace>> {
        self.get_mut(id)?.last_used_at = Some(now_ms());
        if self.active_id != id {
            self.previous_id = std::mem::replace(&mut self.active_id, id.to_owned());
        }
        Ok(self.find(id)?.clone())
    }

    fn get_mut(&mut self, id: &str) -> Result<&mut Workspace> {
        let found = self.workspaces.iter_mut().find(|w| w.id == id);
        found.map(Workspace::edit).ok_or_else(|| Error::WorkspaceNotFound(id.to_owned()))
    }

    fn check_free_name(&self, name: &str, for_id: &str) -> Result<()> {
        check_name(name)?;
        match self.workspaces.iter().find(|w| w.name == name && w.id != for_id) {
            Some(holder) => Err(Error::NameTaken { name: name.to_owned(), id: holder.id.clone() }),
            None => Ok(()),
        }
    }

    /// The name itself, or with `-2`, `-3`, … when it is taken.
    pub fn free_name(&self, name: String) -> String {
        let taken: std::collections::HashSet<&str> = self.workspaces.iter().map(|w| w.name.as_str()).collect();
        if !taken.contains(name.as_str()) {
            return name;
        }
        let numbered = |n: usize| {
            let suffix = format!("-{n}");
            let base: String = name.chars().take(100 - suffix.len()).collect();
            base + &suffix
        };
        (2..).map(numbered).find(|name| !taken.contains(name.as_str())).unwrap_or(name)
    }
}

/// The selector could mean any of these.
fn ambiguous(selector: &str, candidates: &[&Arc<Workspace>]) -> Error {
    let shown = candidates.iter().take(SHOWN_CANDIDATES).map(|w| format!("{} ({})", w.name, w.id));
    let rest = candidates.len().checked_sub(SHOWN_CANDIDATES).filter(|rest| *rest > 0);
    let candidates = shown.chain(rest.map(|rest| format!("and {rest} more"))).collect();
    Error::WorkspaceAmbiguous { selector: selector.to_owned(), candidates }
}

/// Variables by which the environment of a daemon gives opencode's credentials, as that of OpenWork's
/// own orchestrator does.
pub const USERNAME_VARIABLE: &str = "OPENWORK_OPENCODE_USERNAME";
/// See [`USERNAME_VARIABLE`].
pub const PASSWORD_VARIABLE: &str = "OPENWORK_OPENCODE_PASSWORD";

/// The credentials of opencode: made once, kept.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Auth {
    /// The user name of the Basic credentials.
    pub opencode_username: String,
    /// The password: 32 random bytes as hex.
    pub opencode_password: String,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Auth {
    /// Reads the credentials, creating them when there are none. A user name or password that is
    /// given replaces the stored one for good: commands read the file.
    ///
    /// # Errors
    /// `state_corrupt` when the file makes no sense: a new password would lock us out of an opencode
    /// that runs with the old one. `usage` for given ones that cannot be sent.
    pub fn load_or_create(data_dir: &DataDir, username: Option<String>, password: Option<String>) -> Result<Auth> {
        let path = data_dir.auth();
        let stored = Auth::read(&path)?;
        let is_stored = stored.is_some() && username.is_none() && password.is_none();
        let mut auth = match stored {
            Some(auth) => auth,
            None => {
                let opencode_password = random_hex::<32>()?;
                Auth { opencode_username: "opencode".to_owned(), opencode_password, extra: Map::new() }
            }
        };
        if is_stored {
            return Ok(auth);
        }
        auth.opencode_username = username.unwrap_or(auth.opencode_username);
        auth.opencode_password = password.unwrap_or(auth.opencode_password);
        auth.check().map_err(|why| Error::usage(format!("{USERNAME_VARIABLE}, {PASSWORD_VARIABLE}: {why}")))?;
        write_whole(&path, &auth)?;
        Ok(auth)
    }

    /// Whether opencode can run with these, and HTTP carry them.
    fn check(&self) -> std::result::Result<(), &'static str> {
        let (name, password) = (&self.opencode_username, &self.opencode_password);
        // Without a password anybody could make opencode run anything.
        if name.is_empty() || password.is_empty() {
            return Err("the user name or the password is empty");
        }
        if name.contains(|c: char| c == ':' || c.is_control()) || password.contains(char::is_control) {
            return Err("the user name or the password has a character that cannot be sent");
        }
        Ok(())
    }

    /// Reads the credentials; none when there is no file.
    ///
    /// # Errors
    /// `state_corrupt`, as for [`Auth::load_or_create`].
    pub fn read(path: &Path) -> Result<Option<Auth>> {
        let corrupt = |why: String| Error::StateCorrupt { path: path.to_owned(), why, hint: AUTH_HINT };
        let Some(bytes) = read_whole(path, AUTH_HINT)? else { return Ok(None) };
        let auth: Auth = from_json(&bytes).map_err(|e| corrupt(format!("not a credentials file: {e}")))?;
        auth.check().map_err(|why| corrupt(why.to_owned()))?;
        Ok(Some(auth))
    }
}

/// Random bytes from the kernel.
pub fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let source = Path::new("/dev/urandom");
    let mut bytes = [0; N];
    File::open(source).and_then(|mut file| file.read_exact(&mut bytes)).map_err(|e| Error::io("read", source, e))?;
    Ok(bytes)
}

/// Random bytes as hex.
pub fn random_hex<const N: usize>() -> Result<String> {
    Ok(random_bytes::<N>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The state in memory and on disk.
pub struct Store {
    path: PathBuf,
    /// What readers see. Held for the time of copying a pointer.
    current: Mutex<Arc<State>>,
    /// Held while a change is made and written: changes happen one after the other.
    writing: Mutex<()>,
    /// What is newer in memory than on disk, to be written behind.
    behind: Mutex<Pending>,
    changed: Condvar,
}

/// What is newer in memory than on disk.
#[derive(Default)]
struct Pending {
    used: HashMap<WorkspaceId, u64>,
    instances: Option<Loaded>,
}

/// Which instances are loaded, and which of those are no workspace's.
struct Loaded {
    instances: Vec<String>,
    strangers: Vec<String>,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.used.is_empty() && self.instances.is_none()
    }

    fn apply(&self, state: &mut State) {
        if let (Some(loaded), Some(engine)) = (&self.instances, &mut state.opencode) {
            engine.instances.clone_from(&loaded.instances);
            engine.strangers = Some(loaded.strangers.clone());
        }
        if self.used.is_empty() {
            return;
        }
        for workspace in &mut state.workspaces {
            if let Some(&at) = self.used.get(&workspace.id) {
                if workspace.last_used_at.is_none_or(|before| before < at) {
                    Workspace::edit(workspace).last_used_at = Some(at);
                }
            }
        }
    }

    /// Puts back what could not be written, unless something newer has come.
    fn restore(&mut self, older: Pending) {
        for (id, at) in older.used {
            self.used.entry(id).or_insert(at);
        }
        self.instances = self.instances.take().or(older.instances);
    }
}

/// A lock whose data no panic can have left half-changed: it is only ever replaced.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Reads the file. The caller holds `daemon.lock`.
    ///
    /// # Errors
    /// As [`State::read`].
    pub fn open(data_dir: &DataDir) -> Result<Store> {
        let path = data_dir.state();
        let state = State::read(&path)?;
        // What a crash in the middle of a write has left.
        let _ = fs::remove_file(temporary(&path));
        Ok(Store {
            path,
            current: Mutex::new(Arc::new(state)),
            writing: Mutex::default(),
            behind: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// The state as it is on disk.
    pub fn snapshot(&self) -> Arc<State> {
        lock(&self.current).clone()
    }

    /// Makes a change: it is on disk when this returns, or nothing has changed.
    ///
    /// # Errors
    /// Those of `change`; `state_write_failed`.
    pub fn update<T>(&self, change: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let _writing = lock(&self.writing);
        let mut state = State::clone(&self.snapshot());
        let result = change(&mut state)?;
        let pending = std::mem::take(&mut *lock(&self.behind));
        pending.apply(&mut state);
        state.cli_version = Some(env!("CARGO_PKG_VERSION").to_owned());
        if let Err(e) = write_whole(&self.path, &state) {
            lock(&self.behind).restore(pending);
            return Err(e);
        }
        *lock(&self.current) = Arc::new(state);
        Ok(result)
    }

    /// Notes that a workspace was used; written within a second. Never waits for the disk.
    pub fn touch(&self, id: &str) {
        self.note(|pending| {
            pending.used.insert(id.to_owned(), now_ms());
        });
    }

    /// Notes which instances are loaded, and which of those are no workspace's; written within a
    /// second. Never waits for the disk.
    pub fn note_instances(&self, instances: Vec<String>, strangers: Vec<String>) {
        self.note(|pending| pending.instances = Some(Loaded { instances, strangers }));
    }

    fn note(&self, change: impl FnOnce(&mut Pending)) {
        let mut behind = lock(&self.behind);
        let is_first = behind.is_empty();
        change(&mut behind);
        drop(behind);
        // For the others the writing thread waits already.
        if is_first {
            self.changed.notify_all();
        }
    }

    /// The state with what is still to be written in it.
    pub fn latest(&self) -> Arc<State> {
        let snapshot = self.snapshot();
        let behind = lock(&self.behind);
        if behind.is_empty() {
            return snapshot;
        }
        let mut state = State::clone(&snapshot);
        behind.apply(&mut state);
        Arc::new(state)
    }

    /// Writes behind for as long as the daemon lives; for a thread of its own. The daemon's last
    /// change writes what is left.
    pub fn write_behind(&self) {
        let mut last_write: Option<Instant> = None;
        loop {
            {
                let mut behind = lock(&self.behind);
                while behind.is_empty() {
                    behind = self.changed.wait(behind).unwrap_or_else(PoisonError::into_inner);
                }
                while let Some(rest) = last_write.and_then(|at| WRITE_BEHIND.checked_sub(at.elapsed())) {
                    if rest.is_zero() {
                        break;
                    }
                    behind = self.changed.wait_timeout(behind, rest).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
            if let Err(e) = self.update(|_| Ok(())) {
                crate::log!("{e}");
            }
            last_write = Some(Instant::now());
        }
    }
}

/// The content of a file of ours; `None` when it does not exist.
///
/// # Errors
/// `state_corrupt`, with this hint.
fn read_whole(path: &Path, hint: &'static str) -> Result<Option<Vec<u8>>> {
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

fn temporary(path: &Path) -> PathBuf {
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
