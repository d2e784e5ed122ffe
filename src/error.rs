//! Everything that can go wrong, once.
//!
//! [`Code`] is the public table: the name a script matches on, the exit status of the command
//! and the HTTP status of the reply. [`Error`] is what happened, with the data of the failure.
//! Codes are stable: one may be added, none renamed or given another status.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::paths::AUTH_FILE;

macro_rules! codes {
    ($($variant:ident $name:literal $exit:literal [$($http:literal),*],)*) => {
        /// The stable name of a kind of failure.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Code { $(#[doc = $name] $variant,)* }

        impl Code {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The name on the wire and in `--json`.
            pub fn name(self) -> &'static str {
                match self { $(Code::$variant => $name,)* }
            }

            /// The exit status of a command that fails so.
            pub fn exit_status(self) -> u8 {
                match self { $(Code::$variant => $exit,)* }
            }

            /// The HTTP statuses it is answered with; none when it never crosses the wire.
            pub fn http(self) -> &'static [u16] {
                match self { $(Code::$variant => &[$($http),*],)* }
            }
        }
    };
}

codes! {
    Usage "usage" 2 [],
    BadRequest "bad_request" 1 [400],
    InvalidUrl "invalid_url" 1 [400],
    InvalidName "invalid_name" 1 [400],
    PathNotUtf8 "path_not_utf8" 1 [400],
    PathNotDirectory "path_not_directory" 1 [400],
    PathNotFound "path_not_found" 1 [404],
    PermissionDenied "permission_denied" 1 [403],
    ForbiddenHost "forbidden_host" 1 [403],
    ForbiddenOrigin "forbidden_origin" 1 [403],
    ForbiddenUser "forbidden_user" 1 [403],
    Unauthorized "unauthorized" 1 [401],
    NotFound "not_found" 1 [404],
    MethodNotAllowed "method_not_allowed" 1 [405],
    NameTaken "name_taken" 1 [409],
    InstanceBusy "instance_busy" 1 [409],
    WorkspaceIsRemote "workspace_is_remote" 1 [409],
    LengthRequired "length_required" 1 [411],
    TooLarge "too_large" 1 [413, 414, 431],
    UnsupportedMediaType "unsupported_media_type" 1 [415],
    Overloaded "overloaded" 1 [503],
    PortInUse "port_in_use" 1 [503],
    StateCorrupt "state_corrupt" 1 [500],
    StateTooNew "state_too_new" 1 [500],
    StateWriteFailed "state_write_failed" 1 [500],
    DaemonStartFailed "daemon_start_failed" 1 [],
    DaemonUnresponsive "daemon_unresponsive" 1 [],
    Internal "internal" 1 [500],
    DaemonNotRunning "daemon_not_running" 3 [],
    WorkspaceNotFound "workspace_not_found" 4 [404],
    WorkspaceAmbiguous "workspace_ambiguous" 4 [409],
    NoActiveWorkspace "no_active_workspace" 4 [409],
    OpencodeNotFound "opencode_not_found" 5 [503],
    OpencodeUnsupported "opencode_unsupported" 5 [503],
    OpencodeStartFailed "opencode_start_failed" 5 [503],
    OpencodeAuthFailed "opencode_auth_failed" 5 [502],
    OpencodeUnavailable "opencode_unavailable" 5 [503],
    OpencodeTimeout "opencode_timeout" 5 [504],
    OpencodeFault "opencode_error" 5 [502],
}

/// A failure as it stands in JSON: `{"code", "message", "hint"}`, `hint` when there is one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// [`Code::name`].
    pub code: String,
    /// What happened, for a person; names the file, workspace or address.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// What went wrong, with the data of the failure.
#[derive(Debug)]
pub enum Error {
    /// The command line is not one of ours.
    Usage { message: String, hint: Option<String> },
    /// A request that cannot be understood.
    BadRequest(String),
    /// Not a base URL that a remote workspace can have.
    InvalidUrl { url: String, why: &'static str },
    /// Not a name that a workspace can have.
    InvalidName { name: String, why: &'static str },
    /// A path that is not UTF-8 or has a NUL in it.
    PathNotUtf8(PathBuf),
    /// There is something there, but no directory.
    PathNotDirectory(PathBuf),
    /// There is nothing there.
    PathNotFound(PathBuf),
    /// The operating system, or the owner of a file, says no.
    PermissionDenied { what: String, path: PathBuf },
    /// The `Host` header is not one of loopback's with our port.
    ForbiddenHost(String),
    /// A web page that is not on the list has sent this.
    ForbiddenOrigin(String),
    /// The connection belongs to another user of this machine.
    ForbiddenUser,
    /// No credentials of opencode, or wrong ones.
    Unauthorized,
    /// No such route.
    NotFound(String),
    /// The route is there, but not for this method.
    MethodNotAllowed { method: String, path: String, allow: String },
    /// Another workspace has the name.
    NameTaken { name: String, id: String },
    /// A session is running in the instance.
    InstanceBusy { workspace: String, sessions: usize },
    /// Asked for something that only a local workspace has.
    WorkspaceIsRemote(String),
    /// A body without `Content-Length`.
    LengthRequired,
    /// More than the limit: body (413), target (414) or head (431).
    TooLarge { what: &'static str, limit: usize, status: u16 },
    /// A body that is not declared as JSON.
    UnsupportedMediaType(String),
    /// All connections, threads or descriptors are in use.
    Overloaded(&'static str),
    /// A port was asked for and something else has it.
    PortInUse { port: u16, option: &'static str },
    /// The state file is there and cannot be understood.
    StateCorrupt { path: PathBuf, why: String },
    /// The state file was written by a newer version.
    StateTooNew { path: PathBuf, version: u64 },
    /// The state file could not be replaced; the old one is as it was.
    StateWriteFailed { what: &'static str, path: PathBuf, source: io::Error },
    /// The daemon could not be started.
    DaemonStartFailed(String),
    /// A daemon holds the lock and does not answer.
    DaemonUnresponsive(String),
    /// A bug, or a file that should be there and is not.
    Internal(String),
    /// No daemon, and none is to be started.
    DaemonNotRunning,
    /// No workspace is meant by the selector.
    WorkspaceNotFound(String),
    /// Several are.
    WorkspaceAmbiguous { selector: String, candidates: Vec<String> },
    /// No selector was given and none is active.
    NoActiveWorkspace,
    /// There is no opencode to start.
    OpencodeNotFound(String),
    /// It is of a version whose protocol we do not speak.
    OpencodeUnsupported { path: PathBuf, version: String },
    /// It was started and did not become ready.
    OpencodeStartFailed(String),
    /// It does not take the password it was given.
    OpencodeAuthFailed(u16),
    /// It is not running and cannot be waited for.
    OpencodeUnavailable(String),
    /// It did not become ready, or answer, before the deadline.
    OpencodeTimeout(&'static str),
    /// It answered with something that is not an answer.
    OpencodeFault(String),
    /// opencode answered a call of the user's with a status of 400 or more. It has its own words
    /// for it, which are printed; as JSON they are the result.
    Refused { status: u16, json: bool },
    /// A failure that the daemon or a file of ours reported in words.
    Reported { code: Code, body: ErrorBody, status: u16 },
    /// The operating system refused an operation on a path.
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A refused operation: what was tried, on which path.
    pub fn io(what: &'static str, path: impl AsRef<Path>, source: io::Error) -> Error {
        Error::Io { what, path: path.as_ref().to_owned(), source }
    }

    /// A mistake on the command line without further advice.
    pub fn usage(message: impl Into<String>) -> Error {
        Error::Usage { message: message.into(), hint: None }
    }

    /// What was reported in words, with its code found again. An unknown code is `internal`.
    pub fn reported(body: ErrorBody, status: u16) -> Error {
        let code = Code::ALL.iter().copied().find(|code| code.name() == body.code);
        Error::Reported { code: code.unwrap_or(Code::Internal), body, status }
    }

    /// The reason, reported in words, why opencode cannot be had.
    pub fn unavailable(body: ErrorBody) -> Error {
        let code = Code::ALL.iter().find(|code| code.name() == body.code);
        let status = code.and_then(|code| code.http().first().copied()).unwrap_or(503);
        Error::reported(body, status)
    }

    /// Which row of the table this is.
    pub fn code(&self) -> Code {
        match self {
            Error::Usage { .. } => Code::Usage,
            Error::BadRequest(_) => Code::BadRequest,
            Error::InvalidUrl { .. } => Code::InvalidUrl,
            Error::InvalidName { .. } => Code::InvalidName,
            Error::PathNotUtf8(_) => Code::PathNotUtf8,
            Error::PathNotDirectory(_) => Code::PathNotDirectory,
            Error::PathNotFound(_) => Code::PathNotFound,
            Error::PermissionDenied { .. } => Code::PermissionDenied,
            Error::ForbiddenHost(_) => Code::ForbiddenHost,
            Error::ForbiddenOrigin(_) => Code::ForbiddenOrigin,
            Error::ForbiddenUser => Code::ForbiddenUser,
            Error::Unauthorized => Code::Unauthorized,
            Error::NotFound(_) => Code::NotFound,
            Error::MethodNotAllowed { .. } => Code::MethodNotAllowed,
            Error::NameTaken { .. } => Code::NameTaken,
            Error::InstanceBusy { .. } => Code::InstanceBusy,
            Error::WorkspaceIsRemote(_) => Code::WorkspaceIsRemote,
            Error::LengthRequired => Code::LengthRequired,
            Error::TooLarge { .. } => Code::TooLarge,
            Error::UnsupportedMediaType(_) => Code::UnsupportedMediaType,
            Error::Overloaded(_) => Code::Overloaded,
            Error::PortInUse { .. } => Code::PortInUse,
            Error::StateCorrupt { .. } => Code::StateCorrupt,
            Error::StateTooNew { .. } => Code::StateTooNew,
            Error::StateWriteFailed { .. } => Code::StateWriteFailed,
            Error::DaemonStartFailed(_) => Code::DaemonStartFailed,
            Error::DaemonUnresponsive(_) => Code::DaemonUnresponsive,
            Error::Internal(_) => Code::Internal,
            Error::DaemonNotRunning => Code::DaemonNotRunning,
            Error::WorkspaceNotFound(_) => Code::WorkspaceNotFound,
            Error::WorkspaceAmbiguous { .. } => Code::WorkspaceAmbiguous,
            Error::NoActiveWorkspace => Code::NoActiveWorkspace,
            Error::OpencodeNotFound(_) => Code::OpencodeNotFound,
            Error::OpencodeUnsupported { .. } => Code::OpencodeUnsupported,
            Error::OpencodeStartFailed(_) => Code::OpencodeStartFailed,
            Error::OpencodeAuthFailed(_) => Code::OpencodeAuthFailed,
            Error::OpencodeUnavailable(_) => Code::OpencodeUnavailable,
            Error::OpencodeTimeout(_) => Code::OpencodeTimeout,
            Error::OpencodeFault(_) => Code::OpencodeFault,
            // Not one of opencode's row: the call was made.
            Error::Refused { .. } => Code::BadRequest,
            Error::Reported { code, .. } => *code,
            Error::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => Code::PermissionDenied,
            Error::Io { source, .. } if source.kind() == io::ErrorKind::NotADirectory => Code::PathNotDirectory,
            Error::Io { .. } => Code::Internal,
        }
    }

    /// The HTTP status of a reply that says so.
    pub fn http_status(&self) -> u16 {
        match self {
            Error::TooLarge { status, .. } | Error::Reported { status, .. } => *status,
            other => other.code().http().first().copied().unwrap_or(500),
        }
    }

    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Error::Usage { hint, .. } => return hint.clone(),
            Error::Reported { body, .. } => return body.hint.clone(),
            Error::InvalidUrl { .. } => "give http://HOST[:PORT][/PATH] or https://…, without user, query or fragment",
            Error::NameTaken { .. } => "choose another name, or rename that workspace first",
            Error::InstanceBusy { .. } => "wait for the session to end, or use --force",
            Error::PortInUse { .. } => "choose another port, or leave the option out to have a free one taken",
            Error::StateCorrupt { path, .. } if path.ends_with(AUTH_FILE) => {
                "nothing was changed; put the file back, or end opencode and remove it: another password is made then"
            }
            Error::StateCorrupt { .. } => {
                "nothing was changed; `openwork state repair` saves what can be read of a state file"
            }
            Error::StateTooNew { .. } => "nothing was changed; use the openwork that wrote it, or another --data-dir",
            Error::StateWriteFailed { .. } => {
                "nothing was changed; look at the free space and the rights of the data directory"
            }
            Error::DaemonUnresponsive(_) => {
                "look at `openwork logs daemon`; end the process named in daemon.lock if it is stuck"
            }
            Error::DaemonNotRunning => "start it with `openwork daemon start`",
            Error::WorkspaceNotFound(_) => "`openwork workspace list` shows what there is",
            Error::WorkspaceAmbiguous { .. } => "give more of the name or id",
            Error::NoActiveWorkspace => "choose one with `openwork workspace switch <ws>`, or name it",
            Error::OpencodeNotFound(_) => {
                "install it (npm install -g opencode-ai), or name it: `openwork daemon restart --opencode-bin FILE`"
            }
            Error::OpencodeUnsupported { .. } => {
                "install opencode 1.x, or name another: `openwork daemon restart --opencode-bin FILE`"
            }
            Error::OpencodeStartFailed(_) => "look at `openwork logs opencode`; `openwork daemon start` tries again",
            Error::OpencodeTimeout(_) => "try again with a longer --timeout; `openwork status` shows how opencode is",
            _ => return None,
        };
        Some(hint.to_owned())
    }

    /// The failure as it stands in JSON.
    pub fn body(&self) -> ErrorBody {
        ErrorBody { code: self.code().name().to_owned(), message: self.to_string(), hint: self.hint() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage { message, .. } => write!(f, "{message}"),
            Error::BadRequest(why) => write!(f, "{why}"),
            Error::InvalidUrl { url, why } => write!(f, "not a base URL: {url:?}: {why}"),
            Error::InvalidName { name, why } => write!(f, "not a name for a workspace: {name:?}: {why}"),
            Error::PathNotUtf8(path) => write!(f, "the path is not UTF-8 without NUL: {}", shown(path)),
            Error::PathNotDirectory(path) => write!(f, "not a directory: {}", shown(path)),
            Error::PathNotFound(path) => write!(f, "no such directory: {}", shown(path)),
            Error::PermissionDenied { what, path } => write!(f, "{what}: {}", shown(path)),
            Error::ForbiddenHost(host) => write!(f, "requests for host {host:?} are not answered here"),
            Error::ForbiddenOrigin(origin) => write!(f, "requests of {origin} are not answered"),
            Error::ForbiddenUser => write!(f, "only the user whose daemon this is may ask it"),
            Error::Unauthorized => write!(f, "credentials of opencode are needed, as printed by `openwork env`"),
            Error::NotFound(path) => write!(f, "no such route: {path}"),
            Error::MethodNotAllowed { method, path, allow } => {
                write!(f, "{method} is not for {path}: use {allow}")
            }
            Error::NameTaken { name, id } => write!(f, "the name {name:?} is taken by {id}"),
            Error::InstanceBusy { workspace, sessions } => {
                write!(f, "{workspace}: {sessions} running session{}", if *sessions == 1 { "" } else { "s" })
            }
            Error::WorkspaceIsRemote(name) => {
                write!(f, "{name} is remote: only a local workspace has an instance here")
            }
            Error::LengthRequired => write!(f, "a body needs a Content-Length"),
            Error::TooLarge { what, limit, .. } => write!(f, "the {what} is larger than {limit} bytes"),
            Error::UnsupportedMediaType(found) => write!(f, "the body must be application/json, not {found:?}"),
            Error::Overloaded(what) => write!(f, "too many {what} at once"),
            Error::PortInUse { port, option } => write!(f, "port {port} ({option}) is in use"),
            Error::StateCorrupt { path, why } => write!(f, "{}: {why}", shown(path)),
            Error::StateTooNew { path, version } => {
                write!(f, "{}: version {version} is newer than this openwork", shown(path))
            }
            Error::StateWriteFailed { what, path, source } | Error::Io { what, path, source } => {
                write!(f, "cannot {what} {}: {source}", shown(path))
            }
            Error::DaemonStartFailed(why) => write!(f, "the daemon did not start: {why}"),
            Error::DaemonUnresponsive(why) => write!(f, "the daemon does not answer: {why}"),
            Error::Internal(why) => write!(f, "{why}"),
            Error::DaemonNotRunning => write!(f, "the daemon is not running"),
            Error::WorkspaceNotFound(selector) => write!(f, "no workspace {selector:?}"),
            Error::WorkspaceAmbiguous { selector, candidates } => {
                write!(f, "{selector:?} could be {}", candidates.join(", "))
            }
            Error::NoActiveWorkspace => write!(f, "no workspace is active"),
            Error::OpencodeNotFound(why) => write!(f, "no opencode to start: {why}"),
            Error::OpencodeUnsupported { path, version } => {
                write!(f, "{} is version {version:?}, and only 1.x is supported", shown(path))
            }
            Error::OpencodeStartFailed(why) => write!(f, "opencode did not start: {why}"),
            Error::OpencodeAuthFailed(port) => {
                write!(f, "opencode on port {port} refuses the password it was started with")
            }
            Error::OpencodeUnavailable(why) => write!(f, "opencode is not available: {why}"),
            Error::OpencodeTimeout(what) => write!(f, "opencode {what} before the deadline"),
            Error::OpencodeFault(why) => write!(f, "opencode: {why}"),
            Error::Refused { status, .. } => write!(f, "opencode answered with status {status}"),
            Error::Reported { body, .. } => write!(f, "{}", body.message),
        }
    }
}

/// A path without the control characters that a name can have, which would make other lines of it.
fn shown(path: &Path) -> String {
    path.to_string_lossy().replace(char::is_control, "\u{fffd}")
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::StateWriteFailed { source, .. } | Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
