//! What goes over HTTP and into `--json`: one set of types for both sides.
//!
//! Every reply is a JSON object with `ok`. The source of the format is this module;
//! docs/http-api.md describes it for users.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use crate::error::{Error, ErrorBody};
use crate::system::disk;
use crate::workspace::Workspace;

/// How long a list waits to know which directories have gone: those on a mount that hangs would keep
/// it for ever.
const MISSING_LIMIT: Duration = Duration::from_secs(1);

/// Of the control plane; it changes when a client would have to.
pub const API_VERSION: u32 = 1;

/// The header by which a client says how long it will wait, in seconds (a decimal number).
pub const TIMEOUT_HEADER: &str = "X-Openwork-Timeout";

/// The header by which a client of `/events` names the last event that it has seen, as browsers do.
pub const LAST_EVENT_HEADER: &str = "Last-Event-ID";

/// The largest body of a control request. Bytes.
pub const BODY_LIMIT: usize = 1024 * 1024;

/// The header with the code of an error that is ours and not opencode's.
pub const ERROR_HEADER: &str = "X-Openwork-Error";

/// The header with what the daemon has to say beside its reply, percent-encoded: what it did with a
/// state file that was edited by hand.
pub const NOTICE_HEADER: &str = "X-Openwork-Notice";

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
    /// Moves it to another directory.
    Move,
    /// Asks OpenCode for its directory.
    Path,
    /// How the instances are.
    Instances,
    /// Disposes its instance.
    Dispose,
    /// Lifts its fence.
    Reset,
    /// The sessions of all loaded instances.
    Sessions,
    /// The sessions of a workspace.
    WorkspaceSessions,
    /// Ends the running turn of a session.
    Abort,
    /// Waits until no session runs.
    Idle,
    /// Waits until no session runs in a workspace.
    WorkspaceIdle,
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
    ("POST", "/workspaces/:id/move", Route::Move),
    ("GET", "/workspaces/:id/path", Route::Path),
    ("GET", "/instances", Route::Instances),
    ("POST", "/instances/:id/dispose", Route::Dispose),
    ("POST", "/instances/:id/reset", Route::Reset),
    ("GET", "/sessions", Route::Sessions),
    ("GET", "/workspaces/:id/sessions", Route::WorkspaceSessions),
    ("POST", "/sessions/:id/abort", Route::Abort),
    ("GET", "/idle", Route::Idle),
    ("GET", "/workspaces/:id/idle", Route::WorkspaceIdle),
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// The name of a [`Phase`]; a newer daemon may have others.
    pub phase: Cow<'static, str>,
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
    /// opencode, from the moment its process exists.
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
    /// Looks whether the directory of a local one is there. On a mount that hangs it is taken to be.
    pub fn new(workspace: &Arc<Workspace>) -> Listed {
        let missing = Listed::all(std::slice::from_ref(workspace)).first().is_some_and(|listed| listed.missing);
        Listed { workspace: workspace.clone(), missing }
    }

    /// The same for many.
    pub fn all(workspaces: &[Arc<Workspace>]) -> Vec<Listed> {
        let are_there = disk::all(MISSING_LIMIT, workspaces.to_vec(), |w| Path::new(&w.path), Path::is_dir);
        let listed = workspaces.iter().zip(are_there);
        let listed = listed.map(|(workspace, is_there)| Listed {
            workspace: workspace.clone(),
            missing: workspace.is_local() && is_there == Some(false),
        });
        listed.collect()
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// The name of an [`InstanceState`]; a newer daemon may have others.
    pub state: Cow<'static, str>,
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

/// Whether the agent is at work in a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SessionState {
    /// A turn is running.
    Running,
    /// No turn is running.
    Idle,
}

impl SessionState {
    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            SessionState::Running => "running",
            SessionState::Idle => "idle",
        }
    }
}

/// A session of OpenCode's.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// OpenCode's id of it.
    pub id: String,
    /// Null when it has none, or OpenCode does not say in time.
    pub title: Option<String>,
    /// Null when its directory is no workspace: a client that calls opencode directly has made it.
    pub workspace: Option<Arc<Workspace>>,
    /// The directory of its instance.
    pub directory: String,
    /// See [`SessionState`].
    pub state: SessionState,
    /// Unix milliseconds; null when OpenCode does not say in time.
    pub updated_at: Option<u64>,
}

/// `GET /sessions` and `GET /workspaces/:id/sessions`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionList {
    /// Always true.
    pub ok: bool,
    /// Running ones first, then the most recently updated ones.
    pub sessions: Vec<Session>,
}

/// `POST /sessions/:id/abort`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AbortReply {
    /// Always true.
    pub ok: bool,
    /// False when no turn was running in it.
    pub aborted: bool,
    /// The session, as it was before.
    pub session: Session,
}

/// `POST /shutdown`; the daemon stops after the reply.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShutdownReply {
    /// Always true.
    pub ok: bool,
    /// The running sessions that end with opencode.
    #[serde(default)]
    pub sessions: Vec<Session>,
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

/// Body of `POST /workspaces/:id/move`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Move {
    /// Absolute.
    pub path: String,
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
#[serde(rename_all = "camelCase")]
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
    /// As in [`Shutdown`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<u32>,
    /// Waits until no session runs, before anything is stopped.
    #[serde(default)]
    pub when_idle: bool,
}

/// `POST /restart`; the daemon restarts after the reply.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RestartReply {
    /// Always true.
    pub ok: bool,
    /// `daemon.startedAt` of `/health` until the successor answers. Unix milliseconds.
    pub started_at: u64,
    /// The running sessions that end with opencode.
    #[serde(default)]
    pub sessions: Vec<Session>,
}

/// Body of `POST /shutdown`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Shutdown {
    /// opencode stays, for the next daemon to adopt.
    #[serde(default)]
    pub keep_opencode: bool,
    /// The process that asks. When an agent within opencode has started it, it survives what it asks
    /// for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<u32>,
    /// Waits until no session runs, before anything is stopped.
    #[serde(default)]
    pub when_idle: bool,
}
