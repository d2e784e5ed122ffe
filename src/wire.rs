//! What goes over HTTP and into `--json`: one set of types for both sides.
//!
//! Every reply is a JSON object with `ok`. The source of the format is this module; the README
//! describes it for users.

use std::num::NonZero;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Builder, available_parallelism};

use rustix::fs::{Access, AtFlags, Mode, OFlags, accessat, open};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use crate::error::{Error, ErrorBody};
use crate::workspace::Workspace;

/// Of the control plane; it changes when a client would have to.
pub const API_VERSION: u32 = 1;

/// The header by which a client says how long it will wait, in seconds (a decimal number).
pub const TIMEOUT_HEADER: &str = "X-Openwork-Timeout";

/// The largest body of a control request. Bytes.
pub const BODY_LIMIT: usize = 1024 * 1024;

/// The header with the code of an error that is ours and not opencode's.
pub const ERROR_HEADER: &str = "X-Openwork-Error";

/// A value from its JSON.
///
/// # Errors
/// When it is not JSON, or not of that shape.
pub fn from_json<'j, T: Deserialize<'j>>(json: &'j [u8]) -> serde_json::Result<T> {
    // Whether it is UTF-8 is seen once for all of it, and not for each string in it.
    serde_json::from_str(std::str::from_utf8(json).map_err(serde::de::Error::custom)?)
}

/// A route of the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// How the daemon and opencode are.
    Health,
    /// What the routes are, as OpenAPI.
    Doc,
    /// The registry.
    List,
    /// Adds a directory.
    AddLocal,
    /// Adds a URL.
    AddRemote,
    /// One workspace.
    Get,
    /// Gives it another name.
    Rename,
    /// Takes it out of the registry.
    Remove,
    /// Makes it the active one.
    Activate,
    /// Asks OpenCode for its directory.
    Path,
    /// How the instances are.
    Instances,
    /// Disposes its instance.
    Dispose,
    /// Lifts its fence.
    Reset,
    /// What happens, as server-sent events.
    Events,
    /// Waits for opencode to be ready, trying again if it had failed.
    Start,
    /// Has the daemon become its successor.
    Restart,
    /// Stops the daemon.
    Shutdown,
}

/// Every control route: method, path (`:id` stands for a selector, percent-encoded), which.
pub const ROUTES: &[(&str, &str, Route)] = &[
    ("GET", "/health", Route::Health),
    ("GET", "/doc", Route::Doc),
    ("GET", "/workspaces", Route::List),
    ("POST", "/workspaces", Route::AddLocal),
    ("POST", "/workspaces/remote", Route::AddRemote),
    ("GET", "/workspaces/:id", Route::Get),
    ("PATCH", "/workspaces/:id", Route::Rename),
    ("DELETE", "/workspaces/:id", Route::Remove),
    ("POST", "/workspaces/:id/activate", Route::Activate),
    ("GET", "/workspaces/:id/path", Route::Path),
    ("GET", "/instances", Route::Instances),
    ("POST", "/instances/:id/dispose", Route::Dispose),
    ("POST", "/instances/:id/reset", Route::Reset),
    ("GET", "/events", Route::Events),
    ("POST", "/start", Route::Start),
    ("POST", "/restart", Route::Restart),
    ("POST", "/shutdown", Route::Shutdown),
];

/// A process as the outside sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessInfo {
    /// Process id.
    pub pid: u32,
    /// Where it listens: the daemon on 127.0.0.1, opencode on an address of 127.0.0.0/8.
    pub port: u16,
    /// The same as a URL.
    pub base_url: String,
    /// Unix milliseconds.
    pub started_at: u64,
    /// Resident memory in bytes; null when the kernel does not say.
    #[serde(default)]
    pub memory: Option<u64>,
}

/// What the supervisor is doing with opencode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// On its way.
    Starting,
    /// Answering.
    Ready,
    /// Being ended, to be started again or not.
    Stopping,
    /// Pausing after a crash.
    Waiting,
    /// Given up until somebody asks for it.
    Failed,
}

impl Phase {
    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Starting => "starting",
            Phase::Ready => "ready",
            Phase::Stopping => "stopping",
            Phase::Waiting => "waiting",
            Phase::Failed => "failed",
        }
    }
}

/// How opencode's supervision goes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EngineInfo {
    /// See [`Phase`].
    pub phase: Phase,
    /// Counts the processes this daemon has had.
    pub generation: u64,
    /// How many of them replaced one that had ended by itself.
    pub restarts: u64,
    /// opencode's version, once known.
    pub version: Option<String>,
    /// Why it is not ready, or was not before.
    pub last_error: Option<ErrorBody>,
}

/// `GET /health`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// Whether opencode is ready.
    pub ok: bool,
    /// [`API_VERSION`].
    pub api_version: u32,
    /// Of the daemon's binary.
    pub cli_version: String,
    /// The daemon.
    pub daemon: ProcessInfo,
    /// opencode; null until it is ready.
    pub opencode: Option<ProcessInfo>,
    /// Its supervision.
    pub engine: EngineInfo,
    /// The active workspace; empty when there is none.
    pub active_id: String,
    /// How many there are.
    pub workspace_count: usize,
}

/// A workspace in a list.
#[derive(Clone, Debug, Deserialize)]
pub struct Listed {
    /// The entry.
    #[serde(flatten)]
    pub workspace: Arc<Workspace>,
    /// The directory has gone; on the wire only when it has.
    #[serde(default)]
    pub missing: bool,
}

impl Serialize for Listed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const FIELD: &str = "missing";
        match (self.missing, self.workspace.extra.contains_key(FIELD)) {
            (false, false) => self.workspace.json().serialize(serializer),
            (missing, _) => {
                // A field of this name in the file would be there twice, and say something else.
                let mut workspace = Workspace::clone(&self.workspace);
                workspace.extra.remove(FIELD);
                if missing {
                    workspace.extra.insert(FIELD.to_owned(), true.into());
                }
                workspace.serialize(serializer)
            }
        }
    }
}

impl Listed {
    /// Looks whether the directory of a local one is there.
    pub fn new(workspace: &Arc<Workspace>) -> Listed {
        let missing = workspace.is_local() && !Path::new(&workspace.path).is_dir();
        Listed { workspace: workspace.clone(), missing }
    }

    /// Looks for those in the order they were added; a directory that follows one beside it is
    /// looked for from the one above them, and not from the root.
    fn some(workspaces: &[Arc<Workspace>]) -> Vec<Listed> {
        let mut listed = Vec::with_capacity(workspaces.len());
        let (mut above, mut opened, mut place) = ("", None, String::new());
        for workspace in workspaces {
            let (parent, name) = workspace.path.rsplit_once('/').unwrap_or_default();
            if parent != above {
                (above, opened) = (parent, None);
            } else if opened.is_none() && !parent.is_empty() {
                opened = open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok();
            }
            listed.push(match &opened {
                Some(above) => {
                    // With the slash it is a directory, or an error.
                    place.clear();
                    place.extend([name, "/"]);
                    let missing = accessat(above, &*place, Access::EXISTS, AtFlags::empty()).is_err();
                    Listed { workspace: workspace.clone(), missing }
                }
                None => Listed::new(workspace),
            });
        }
        listed
    }

    /// Looks for many; on several processors when it is worth it.
    pub fn all(workspaces: &[Arc<Workspace>]) -> Vec<Listed> {
        // A look takes about a microsecond, to start a thread some tens, and it may be late: hence
        // small parts, which are for whoever comes first.
        const PART: usize = 500;
        let parts: Vec<_> = workspaces.chunks(PART).map(|part| (part, OnceLock::new())).collect();
        let threads = if parts.len() < 3 { 1 } else { available_parallelism().map_or(1, NonZero::get).min(8) };
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some((part, listed)) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                let _ = listed.set(Listed::some(part));
            }
        };
        thread::scope(|scope| {
            for _ in 1..threads {
                let _ = Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        parts.into_iter().filter_map(|(_, listed)| listed.into_inner()).flatten().collect()
    }
}

/// `GET /workspaces`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkspaceList {
    /// Always true.
    pub ok: bool,
    /// The active workspace; empty when there is none.
    pub active_id: String,
    /// In the order they were added.
    pub workspaces: Vec<Listed>,
}

/// A reply about one workspace.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkspaceReply {
    /// Always true.
    pub ok: bool,
    /// The active workspace; empty when there is none.
    pub active_id: String,
    /// The one asked about.
    pub workspace: Listed,
    /// Of an addition: whether it was not there before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<bool>,
}

/// `GET /workspaces/:id/path`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PathReply {
    /// Always true.
    pub ok: bool,
    /// The one asked about.
    pub workspace: Arc<Workspace>,
    /// OpenCode's own answer: `home`, `state`, `config`, `worktree`, `directory`.
    pub path: Value,
}

/// Whether opencode has loaded an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstanceState {
    /// Loaded, and a session is running.
    Busy,
    /// Loaded.
    Warm,
    /// Not loaded.
    Cold,
    /// Not to be loaded: that has ended opencode twice.
    Fenced,
}

impl InstanceState {
    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            InstanceState::Busy => "busy",
            InstanceState::Warm => "warm",
            InstanceState::Cold => "cold",
            InstanceState::Fenced => "fenced",
        }
    }
}

/// A session whose turn is running.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunningSession {
    /// OpenCode's id of it.
    pub id: String,
    /// Null when OpenCode does not say in time.
    pub title: Option<String>,
}

/// An instance in a list.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceEntry {
    /// Whose it is.
    pub workspace: Arc<Workspace>,
    /// See [`InstanceState`].
    pub state: InstanceState,
    /// Requests under way through the daemon, streams among them.
    pub open_streams: usize,
    /// The sessions that are running in it.
    #[serde(default)]
    pub sessions: Vec<RunningSession>,
    /// When it will be disposed for want of use, Unix milliseconds; null while in use, or never.
    pub evict_at: Option<u64>,
}

/// `GET /instances`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InstanceList {
    /// Always true.
    pub ok: bool,
    /// Of the local workspaces.
    pub instances: Vec<InstanceEntry>,
    /// Resident memory of opencode and all it has started, in bytes; null when it does not run.
    pub memory: Option<u64>,
}

/// `POST /instances/:id/dispose`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DisposeReply {
    /// Always true.
    pub ok: bool,
    /// False when it was not loaded.
    pub disposed: bool,
    /// The one asked about.
    pub workspace: Arc<Workspace>,
}

/// `POST /instances/:id/reset`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResetReply {
    /// Always true.
    pub ok: bool,
    /// False when it was not fenced.
    pub reset: bool,
    /// The one asked about.
    pub workspace: Arc<Workspace>,
}

/// A reply without content.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Done {
    /// Always true.
    pub ok: bool,
}

/// A reply that is an error.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// Always false.
    pub ok: bool,
    /// What happened.
    pub error: ErrorBody,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Failure {
        Failure { ok: false, error: error.body() }
    }
}

/// Body of `POST /workspaces`.
#[derive(Debug, Serialize, Deserialize)]
pub struct AddLocal {
    /// Absolute.
    pub path: String,
    /// Derived from the path when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Body of `POST /workspaces/remote`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddRemote {
    /// http or https.
    pub base_url: String,
    /// The directory there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// Derived from the host when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Body of `PATCH /workspaces/:id`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Rename {
    /// The new name.
    pub name: String,
}

/// Body of `POST /instances/:id/dispose`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Dispose {
    /// Even when a session is running.
    #[serde(default)]
    pub force: bool,
}

/// Body of `POST /start`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Start {
    /// The workspace whose instance is wanted: refused if it is fenced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<String>,
}

/// Body of `POST /restart`. The strings are percent-encoded, since none of them has to be UTF-8.
#[derive(Debug, Serialize, Deserialize)]
pub struct Restart {
    /// The path of the openwork that the daemon becomes.
    pub program: String,
    /// Options of `openwork daemon`, each with its value behind `=`; those of the daemon when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<Vec<String>>,
    /// Its environment, as `NAME=VALUE`.
    pub environment: Vec<String>,
    /// opencode is stopped, and started anew.
    #[serde(default)]
    pub all: bool,
}

/// `POST /restart`; the daemon restarts after the reply.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RestartReply {
    /// Always true.
    pub ok: bool,
    /// `daemon.startedAt` of `/health` until the successor answers. Unix milliseconds.
    pub started_at: u64,
}

/// Body of `POST /shutdown`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Shutdown {
    /// opencode stays, for the next daemon to adopt.
    #[serde(default)]
    pub keep_opencode: bool,
}
