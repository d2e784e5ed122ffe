//! The types of the HTTP API and of `--json`, shared by daemon and command line.
//!
//! Every reply is a JSON object with a field `ok`. This module defines the format; docs/http-api.md
//! describes it for users.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use crate::error::{Error, ErrorBody};
use crate::system::disk;
use crate::workspace::Workspace;

/// How long a list waits to learn which directories are missing: a hanging mount would block it for
/// ever.
const MISSING_LIMIT: Duration = Duration::from_secs(1);

/// The version of the HTTP API; it changes only when clients have to change.
pub const API_VERSION: u32 = 1;

/// The request header that says how long the client will wait, in seconds (a decimal number).
pub const TIMEOUT_HEADER: &str = "X-Openwork-Timeout";

/// The request header that names the last event that a client of `/events` has seen; browsers send it too.
pub const LAST_EVENT_HEADER: &str = "Last-Event-ID";

/// The largest body of a control request. Bytes.
pub const BODY_LIMIT: usize = 1024 * 1024;

/// The reply header with the error code; it tells our errors from opencode's.
pub const ERROR_HEADER: &str = "X-Openwork-Error";

/// The reply header with a notice for the user, percent-encoded: what the daemon did with a state file
/// that was edited by hand.
pub const NOTICE_HEADER: &str = "X-Openwork-Notice";

/// Parses JSON.
///
/// # Errors
/// When the bytes are not JSON, or have another shape.
pub fn from_json<'j, T: Deserialize<'j>>(json: &'j [u8]) -> serde_json::Result<T> {
    // Checks UTF-8 once for the whole text instead of once for each string in it.
    serde_json::from_str(std::str::from_utf8(json).map_err(serde::de::Error::custom)?)
}

/// A route of the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The health of daemon and opencode.
    Health,
    /// The OpenAPI description.
    Doc,
    /// The registry.
    List,
    /// Adds a directory.
    AddLocal,
    /// Adds a URL.
    AddRemote,
    /// One workspace.
    Get,
    /// Renames a workspace.
    Rename,
    /// Removes a workspace from the registry.
    Remove,
    /// Makes a workspace the active one.
    Activate,
    /// Moves a workspace to another directory.
    Move,
    /// OpenCode's reply to `GET /path` in a workspace.
    Path,
    /// The instances and their states.
    Instances,
    /// Disposes the instance of a workspace.
    Dispose,
    /// Lifts the fence of a workspace.
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
    /// The event stream, as server-sent events.
    Events,
    /// Waits until opencode is ready; starts it again if it had failed.
    Start,
    /// Replaces the daemon by its successor.
    Restart,
    /// Stops the daemon.
    Shutdown,
}

/// Every control route: method, path (`:id` is a percent-encoded selector), route.
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

/// The daemon or opencode.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessInfo {
    /// Process id.
    pub pid: u32,
    /// The listening port: the daemon's on 127.0.0.1, opencode's on an address of 127.0.0.0/8.
    pub port: u16,
    /// The URL of address and port.
    pub base_url: String,
    /// Unix milliseconds.
    pub started_at: u64,
    /// Resident memory in bytes; null when unknown.
    #[serde(default)]
    pub memory: Option<u64>,
}

/// The state of opencode's supervision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Starting, and not ready yet.
    Starting,
    /// Serving requests.
    Ready,
    /// Being stopped, for good or for a restart.
    Stopping,
    /// In the pause before the restart after a crash.
    Waiting,
    /// Not started again until a request needs opencode.
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

/// The supervision of opencode.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EngineInfo {
    /// The name of a [`Phase`]; a newer daemon may have others.
    pub phase: Cow<'static, str>,
    /// How many opencode processes this daemon has had.
    pub generation: u64,
    /// How many of them replaced a process that had exited on its own.
    pub restarts: u64,
    /// The version of opencode; null until known.
    pub version: Option<String>,
    /// Why opencode is not ready, or why it last was not.
    pub last_error: Option<ErrorBody>,
    /// Whether opencode is the user's own service (`--shared`), or the daemon's own.
    #[serde(default)]
    pub shared: bool,
    /// The URL of the user's own service, which runs beside the daemon's own opencode; null when it does
    /// not run, or is shared.
    #[serde(default)]
    pub service: Option<String>,
}

/// `GET /health`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// Whether opencode is ready.
    pub ok: bool,
    /// [`API_VERSION`].
    pub api_version: u32,
    /// The version of the daemon's binary.
    pub cli_version: String,
    /// The daemon.
    pub daemon: ProcessInfo,
    /// The opencode process, from its start on.
    pub opencode: Option<ProcessInfo>,
    /// The supervision of opencode.
    pub engine: EngineInfo,
    /// The active workspace; empty when there is none.
    pub active_id: String,
    /// The number of workspaces.
    pub workspace_count: usize,
}

/// A workspace in a list.
#[derive(Clone, Debug, Deserialize)]
pub struct Listed {
    /// The entry.
    #[serde(flatten)]
    pub workspace: Arc<Workspace>,
    /// The directory does not exist; on the wire only when true.
    #[serde(default)]
    pub missing: bool,
}

impl Serialize for Listed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const FIELD: &str = "missing";
        match (self.missing, self.workspace.extra.contains_key(FIELD)) {
            (false, false) => self.workspace.json().serialize(serializer),
            (missing, _) => {
                // A field `missing` in the state file would be a second one of this name.
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
    /// Checks whether the directory of a local workspace exists. On a hanging mount it is assumed to.
    pub fn new(workspace: &Arc<Workspace>) -> Listed {
        let missing = Listed::all(std::slice::from_ref(workspace)).first().is_some_and(|listed| listed.missing);
        Listed { workspace: workspace.clone(), missing }
    }

    /// As [`Listed::new`], for many workspaces.
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
    /// In the order of `workspace add`.
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
    /// The workspace of the request.
    pub workspace: Listed,
    /// Only in replies to an addition: whether the workspace is new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<bool>,
}

/// `GET /workspaces/:id/path`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PathReply {
    /// Always true.
    pub ok: bool,
    /// The workspace of the request.
    pub workspace: Arc<Workspace>,
    /// OpenCode's own reply: `home`, `state`, `config`, `worktree`, `directory`.
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
    /// Not loaded, and requests for it are refused: loading it has crashed opencode twice.
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
    /// The session id of OpenCode.
    pub id: String,
    /// Null when OpenCode does not reply in time.
    pub title: Option<String>,
}

/// An instance in a list.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceEntry {
    /// The workspace of the instance.
    pub workspace: Arc<Workspace>,
    /// The name of an [`InstanceState`]; a newer daemon may have others.
    pub state: Cow<'static, str>,
    /// The open requests and streams through the daemon.
    pub open_streams: usize,
    /// The running sessions of the instance.
    #[serde(default)]
    pub sessions: Vec<RunningSession>,
    /// When the instance will be evicted as idle, in Unix milliseconds; null while in use, or when
    /// eviction is off.
    pub evict_at: Option<u64>,
}

/// `GET /instances`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InstanceList {
    /// Always true.
    pub ok: bool,
    /// An entry for each local workspace.
    pub instances: Vec<InstanceEntry>,
    /// Resident memory of opencode and its descendants, in bytes; null when opencode does not run.
    pub memory: Option<u64>,
}

/// `POST /instances/:id/dispose`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DisposeReply {
    /// Always true.
    pub ok: bool,
    /// False when the instance was not loaded.
    pub disposed: bool,
    /// The workspace of the request.
    pub workspace: Arc<Workspace>,
}

/// `POST /instances/:id/reset`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResetReply {
    /// Always true.
    pub ok: bool,
    /// False when the workspace was not fenced.
    pub reset: bool,
    /// The workspace of the request.
    pub workspace: Arc<Workspace>,
}

/// Whether a turn is running in a session.
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

/// A session of OpenCode.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// The session id of OpenCode.
    pub id: String,
    /// Null when the session has no title, or OpenCode does not reply in time.
    pub title: Option<String>,
    /// Null when the directory is not a workspace: a client of opencode itself made the session.
    pub workspace: Option<Arc<Workspace>>,
    /// The directory of the session.
    pub directory: String,
    /// See [`SessionState`].
    pub state: SessionState,
    /// Unix milliseconds; null when OpenCode does not reply in time.
    pub updated_at: Option<u64>,
}

/// `GET /sessions` and `GET /workspaces/:id/sessions`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionList {
    /// Always true.
    pub ok: bool,
    /// Running sessions first, then by time of the last update, newest first.
    pub sessions: Vec<Session>,
}

/// `POST /sessions/:id/abort`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AbortReply {
    /// Always true.
    pub ok: bool,
    /// False when no turn was running.
    pub aborted: bool,
    /// The session as it was before the abort.
    pub session: Session,
}

/// `POST /shutdown`; the daemon stops after the reply.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ShutdownReply {
    /// Always true.
    pub ok: bool,
    /// The running sessions that end with opencode.
    #[serde(default)]
    pub sessions: Vec<Session>,
    /// Whether opencode is the user's own service, which keeps running.
    #[serde(default)]
    pub keeps_service: bool,
}

/// A reply that only says `ok`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Done {
    /// Always true.
    pub ok: bool,
}

/// An error reply.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// Always false.
    pub ok: bool,
    /// The error.
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
    /// An absolute path.
    pub path: String,
    /// Default: derived from the path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Body of `POST /workspaces/remote`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddRemote {
    /// An http or https URL.
    pub base_url: String,
    /// The directory on the remote server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// Default: derived from the host.
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
    /// An absolute path.
    pub path: String,
}

/// Body of `POST /instances/:id/dispose`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Dispose {
    /// Dispose even when a session is running.
    #[serde(default)]
    pub force: bool,
}

/// Body of `POST /start`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Start {
    /// The workspace that the client will use; an error if it is fenced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<String>,
}

/// Body of `POST /restart`. The strings are percent-encoded, because they may not be UTF-8.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Restart {
    /// The path of the openwork binary to restart into.
    pub program: String,
    /// Options of `openwork daemon`, as `--name=value`; default: those of the running daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<Vec<String>>,
    /// The environment of the successor, as `NAME=VALUE`.
    pub environment: Vec<String>,
    /// Restart opencode too.
    #[serde(default)]
    pub all: bool,
    /// As in [`Shutdown`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<u32>,
    /// Wait until no session runs before stopping anything.
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
    /// Leave opencode running, for the next daemon to adopt.
    #[serde(default)]
    pub keep_opencode: bool,
    /// Also stop the user's own service, by its own command, if the daemon shares it.
    #[serde(default)]
    pub all: bool,
    /// The process id of the client. If an agent in opencode started the client, the stop spares it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<u32>,
    /// Wait until no session runs before stopping anything.
    #[serde(default)]
    pub when_idle: bool,
}
