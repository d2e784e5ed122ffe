//! The state file: the registry of workspaces, and the records of the running processes.
//!
//! Invariants: the daemon is the only writer. A snapshot ([`Store::snapshot`]) shows what is on disk;
//! `lastUsedAt` is written with a delay. A write replaces the file atomically (temporary file, fsync,
//! rename, fsync of the directory), and memory changes only after the disk. Unknown fields survive at every
//! level. An invalid file is never touched.
//!
//! Readers use a snapshot without a lock, so they never wait for the disk.

mod auth;
mod file;
mod records;
mod store;

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

pub use self::auth::{Auth, PASSWORD_VARIABLE, USERNAME_VARIABLE, random_bytes, random_hex};
use self::file::{Stamp, read_whole, read_whole_unchanged};
pub use self::file::{keep_beside, write_whole};
pub use self::records::{Binaries, BinaryRecord, DaemonRecord, EngineRecord, FenceRecord, Ports};
pub use self::store::Store;
use crate::error::{Error, Result};
use crate::log::now_ms;
use crate::nearest::nearest;
use crate::wire::from_json;
use crate::workspace::{self, Place, Workspace, check_name};

/// The version of the file format.
const VERSION: u64 = 1;
/// How many candidates the error about an ambiguous selector names.
const SHOWN_CANDIDATES: usize = 10;

/// The hint about an invalid state file.
const STATE_HINT: &str = "nothing was changed; `openwork state repair` saves what can be read of a state file";

/// The whole file: the format of OpenWork's own orchestrator, with additional fields.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// The version of the format.
    pub version: u64,
    /// Null when it does not run.
    #[serde(default)]
    pub daemon: Option<DaemonRecord>,
    /// Null when it does not run.
    #[serde(default)]
    pub opencode: Option<EngineRecord>,
    /// The remembered versions of binaries.
    #[serde(default)]
    pub binaries: Option<Binaries>,
    /// The version of the openwork that wrote the file.
    #[serde(default)]
    pub cli_version: Option<String>,
    /// The ports last used.
    #[serde(default)]
    pub ports: Ports,
    /// Workspaces that may not be loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fences: Vec<FenceRecord>,
    /// The active workspace; empty when none is.
    #[serde(default)]
    pub active_id: String,
    /// The previously active workspace; empty when there was none.
    #[serde(default)]
    pub previous_id: String,
    /// In the order they were added.
    #[serde(serialize_with = "as_json")]
    pub workspaces: Vec<Arc<Workspace>>,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Serializes each workspace as the JSON that it keeps.
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
    /// Reads the state file; without a file the registry is empty.
    ///
    /// # Errors
    /// `state_corrupt`, `state_too_new`; nothing is touched.
    pub fn read(path: &Path) -> Result<State> {
        Ok(State::read_stamped(path)?.map_or_else(State::default, |(state, _)| state))
    }

    /// Reads the state file, with its stamp; `None` when it does not exist.
    fn read_stamped(path: &Path) -> Result<Option<(State, Stamp)>> {
        let Some((bytes, stamp)) = read_whole(path, STATE_HINT)? else { return Ok(None) };
        Ok(Some((State::parse(path, &bytes)?, stamp)))
    }

    /// As [`State::read`], without changing the mode of the file; `None` when it does not exist.
    ///
    /// # Errors
    /// As [`State::read`].
    pub fn read_unchanged(path: &Path) -> Result<Option<State>> {
        let Some((bytes, _)) = read_whole_unchanged(path, STATE_HINT)? else { return Ok(None) };
        State::parse(path, &bytes).map(Some)
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<State> {
        let corrupt = |why: String| Error::StateCorrupt { path: path.to_owned(), why, hint: STATE_HINT };
        match from_json::<State>(bytes) {
            Ok(state) if state.version == VERSION => Ok(state),
            Ok(State { version, .. }) if version < VERSION => Err(corrupt(format!("there is no version {version}"))),
            Ok(State { version, .. }) => Err(Error::StateTooNew { path: path.to_owned(), version }),
            Err(_) if bytes.is_empty() => Err(corrupt("the file is empty".to_owned())),
            Err(e) => {
                // A newer format may not parse: then its version decides the error.
                let version = from_json::<Value>(bytes).ok().and_then(|v| v.get("version")?.as_u64());
                Err(match version {
                    Some(version) if version > VERSION => Error::StateTooNew { path: path.to_owned(), version },
                    _ => corrupt(format!("not a state file: {e}")),
                })
            }
        }
    }

    /// This state with the registry of a file that was edited by hand: workspaces, active workspace, ports
    /// for the next start, and fields of other programs. The records of the running processes stay.
    fn with_registry_of(&self, edited: State) -> State {
        State {
            version: VERSION,
            daemon: self.daemon.clone(),
            opencode: self.opencode.clone(),
            binaries: self.binaries.clone(),
            cli_version: self.cli_version.clone(),
            fences: self.fences.clone(),
            ..edited
        }
    }

    /// The differences to another registry in a few words; `None` when they are equal.
    fn difference(&self, other: &State) -> Option<String> {
        let same = |a: &Workspace, b: &Workspace| serde_json::to_value(a).ok() == serde_json::to_value(b).ok();
        let names = |of: &State, wanted: &dyn Fn(&Workspace) -> bool| -> Vec<String> {
            of.workspaces.iter().filter(|w| wanted(w)).map(|w| format!("{} ({})", w.name, w.id)).collect()
        };
        let parts = [
            ("added", names(other, &|w| self.get(&w.id).is_none())),
            ("removed", names(self, &|w| other.get(&w.id).is_none())),
            ("changed", names(other, &|w| self.get(&w.id).is_some_and(|before| !same(before, w)))),
        ];
        let parts: Vec<String> = parts
            .into_iter()
            .filter(|(_, names)| !names.is_empty())
            .map(|(what, names)| format!("{what} {}", names.join(", ")))
            .collect();
        let rest = |state: &State| {
            let State { active_id, previous_id, ports, extra, workspaces, .. } = state;
            let order: Vec<&str> = workspaces.iter().map(|w| w.id.as_str()).collect();
            serde_json::to_value((active_id, previous_id, ports, extra, order)).ok()
        };
        match parts.is_empty() {
            false => Some(parts.join("; ")),
            true if rest(self) != rest(other) => Some("no workspace added, removed or changed".to_owned()),
            true => None,
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

    /// The workspace that a selector means: by exact id, exact name, a path in it (the deepest wins), or a
    /// unique prefix of a name or id. `@active` is the active workspace, `-` the previous one. A path must be
    /// absolute. Accesses the disk, so not for use in [`Store::update`].
    ///
    /// # Errors
    /// `workspace_not_found`, `workspace_ambiguous`, `no_active_workspace`.
    pub fn find(&self, selector: &str) -> Result<&Arc<Workspace>> {
        let not_found = || Error::no_workspace(selector);
        match selector {
            "-" => return self.get(&self.previous_id).ok_or_else(not_found),
            // Probably a script's unset variable; as a prefix it would match everything.
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
        // Every id begins with `ws-`, so that alone is no prefix.
        let is_prefix = |w: &&Arc<Workspace>| {
            w.name.starts_with(selector) || (selector.len() > "ws-".len() && w.id.starts_with(selector))
        };
        let candidates: Vec<_> = self.workspaces.iter().filter(is_prefix).collect();
        match candidates[..] {
            [] => Err(self.unknown(selector)),
            [one] => Ok(one),
            _ => Err(ambiguous(selector, &candidates)),
        }
    }

    /// No workspace is called so; the nearest name is what was probably meant.
    fn unknown(&self, selector: &str) -> Error {
        let near = nearest(selector, self.workspaces.iter().map(|workspace| workspace.name.as_str()));
        let hint = near.map(|name| format!("did you mean {name:?}?"));
        Error::WorkspaceNotFound { selector: selector.to_owned(), hint }
    }

    /// The local workspace with exactly this directory, as stored.
    pub fn local_at(&self, directory: &str) -> Option<&Arc<Workspace>> {
        self.workspaces.iter().find(|workspace| workspace.is_local() && workspace.path == directory)
    }

    /// The workspace with exactly this id, name or directory, or `@active`. For changes: a request that is
    /// repeated after its workspace has gone must not match another one by prefix or containment.
    ///
    /// # Errors
    /// `workspace_not_found`, `workspace_ambiguous`, `no_active_workspace`.
    pub fn find_exactly(&self, selector: &str) -> Result<&Arc<Workspace>> {
        let at_path = || self.local_at(selector).filter(|_| !selector.is_empty());
        let found = self.identified(selector)?.or_else(at_path);
        found.ok_or_else(|| self.unknown(selector))
    }

    /// The workspace with this id or name, or `@active`.
    fn identified(&self, selector: &str) -> Result<Option<&Arc<Workspace>>> {
        if selector == "@active" {
            return self.active().map(Some).ok_or(Error::NoActiveWorkspace);
        }
        if let Some(found) = self.get(selector) {
            return Ok(Some(found));
        }
        // Our names are unique, but another program may have stored duplicates.
        let named: Vec<_> = self.workspaces.iter().filter(|w| w.name == selector).collect();
        match named[..] {
            [] => Ok(None),
            [one] => Ok(Some(one)),
            _ => Err(ambiguous(selector, &named)),
        }
    }

    /// The deepest workspace that is or contains this directory. Accesses the disk.
    fn containing(&self, path: &Path) -> Option<&Arc<Workspace>> {
        let path = workspace::resolve_as_far_as_possible(path);
        let local = || self.workspaces.iter().filter(|w| w.is_local() && !w.path.is_empty());
        let depth = |path: &Path| path.components().count();
        let stored = local().filter(|w| path.starts_with(&w.path)).max_by_key(|w| depth(Path::new(&w.path)));
        // A stored path may go through a link, written by another program or created since.
        stored.or_else(|| workspace::containing_through_links(&path, &self.workspaces))
    }

    /// Adds a workspace; an existing one only gets the given name, if any. The first workspace becomes
    /// active. Returns the workspace, and whether it was created.
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
        self.known(id)
    }

    /// Removes a workspace; if it was active, none is active afterwards.
    ///
    /// # Errors
    /// `workspace_not_found`.
    pub fn remove(&mut self, id: &str) -> Result<Arc<Workspace>> {
        let index = self.workspaces.iter().position(|w| w.id == id);
        let index = index.ok_or_else(|| Error::no_workspace(id))?;
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
        self.known(id)
    }

    /// Moves a local workspace to another directory: it keeps name and times, and gets a new path and so a
    /// new id. Returns the entry before and after.
    ///
    /// # Errors
    /// `workspace_not_found`, `workspace_is_remote`; `bad_request` when another workspace is there.
    pub fn relocate(&mut self, id: &str, place: Place) -> Result<(Arc<Workspace>, Arc<Workspace>)> {
        let before = self.known(id)?;
        before.local_path()?;
        if let Some(other) = place.entry(&self.workspaces).filter(|other| other.id != id) {
            return Err(Error::BadRequest(format!("that is the workspace {} ({}) already", other.name, other.id)));
        }
        let Workspace { id: new_id, path, .. } = place.into_workspace(before.name.clone(), now_ms());
        for role in [&mut self.active_id, &mut self.previous_id] {
            if role == id {
                role.clone_from(&new_id);
            }
        }
        let workspace = self.get_mut(id)?;
        workspace.id.clone_from(&new_id);
        workspace.path = path;
        Ok((before, self.known(&new_id)?))
    }

    fn known(&self, id: &str) -> Result<Arc<Workspace>> {
        self.get(id).cloned().ok_or_else(|| Error::no_workspace(id))
    }

    fn get_mut(&mut self, id: &str) -> Result<&mut Workspace> {
        let found = self.workspaces.iter_mut().find(|w| w.id == id);
        found.map(Workspace::edit).ok_or_else(|| Error::no_workspace(id))
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

/// The error for a selector that matches several workspaces.
fn ambiguous(selector: &str, candidates: &[&Arc<Workspace>]) -> Error {
    let shown = candidates.iter().take(SHOWN_CANDIDATES).map(|w| format!("{} ({})", w.name, w.id));
    let rest = candidates.len().checked_sub(SHOWN_CANDIDATES).filter(|rest| *rest > 0);
    let candidates = shown.chain(rest.map(|rest| format!("and {rest} more"))).collect();
    Error::WorkspaceAmbiguous { selector: selector.to_owned(), candidates }
}
