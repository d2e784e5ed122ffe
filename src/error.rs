//! Every failure, in one table.
//!
//! A row of [`errors!`] is a variant of [`Error`] with the data of the failure, its public code,
//! the exit status of a command that ends with it, the HTTP status of a reply that reports it, its
//! message and, where the remedy is known, a hint. Codes are stable: rows may be added, but no code
//! is ever renamed or given another status.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The hint of a row as an `Option<&str>`.
macro_rules! optional {
    () => {
        None
    };
    ($hint:expr) => {
        $hint.into()
    };
}

macro_rules! errors {
    ($(
        $(#[$doc:meta])*
        $variant:ident $(($($value:ident: $value_type:ty),*))? $({ $($field:ident: $field_type:ty),* })?,
        $name:literal, $exit:literal, [$($http:literal),*], ($($message:tt)*) $(, $hint:expr)?;
    )*) => {
        /// The stable name of a kind of failure.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Code { $(#[doc = $name] $variant,)* }

        impl Code {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The name in JSON.
            pub fn name(self) -> &'static str {
                match self { $(Code::$variant => $name,)* }
            }

            /// The exit status of a command that fails with this code.
            pub fn exit_status(self) -> u8 {
                match self { $(Code::$variant => $exit,)* }
            }

            /// The HTTP statuses of replies with this code; empty for failures that only a command can have.
            pub fn http(self) -> &'static [u16] {
                match self { $(Code::$variant => &[$($http),*],)* }
            }
        }

        /// A failure, with its data.
        #[derive(Debug)]
        #[allow(dead_code, reason = "codes that later features bring are in the table from the start")]
        pub enum Error {
            $($(#[$doc])* $variant $(($($value_type),*))? $({ $($field: $field_type),* })?,)*
            /// opencode answered a call of `openwork api` with a status of 400 or more. The reply is the
            /// result of the command and has been printed; with `json` it is the whole output.
            Refused { status: u16, json: bool },
            /// The doctor has found something wrong, and has printed what.
            Unhealthy,
            /// A failure with this code was printed with the result of the command.
            Printed(Code),
            /// A failure that the daemon or the supervisor has already reported as JSON.
            Reported { code: Code, body: ErrorBody, status: u16 },
            /// The directory of a workspace has gone.
            DirectoryGone { name: String, path: PathBuf },
            /// The operating system refused an operation on a path.
            Io { what: &'static str, path: PathBuf, source: io::Error },
        }

        impl Error {
            /// The row of the table.
            pub fn code(&self) -> Code {
                match self {
                    $(Error::$variant { .. } => Code::$variant,)*
                    // The call failed, not opencode.
                    Error::Refused { .. } => Code::BadRequest,
                    Error::Unhealthy => Code::Internal,
                    Error::Printed(code) => *code,
                    Error::DirectoryGone { .. } => Code::PathNotFound,
                    Error::Reported { code, .. } => *code,
                    Error::Io { source, .. } => match source.kind() {
                        io::ErrorKind::PermissionDenied => Code::PermissionDenied,
                        io::ErrorKind::NotADirectory => Code::PathNotDirectory,
                        _ => Code::Internal,
                    },
                }
            }

            /// What to do about the failure, where that is known.
            #[allow(unused_variables, reason = "most hints need none of the fields")]
            pub fn hint(&self) -> Option<String> {
                let hint: Option<&str> = match self {
                    $(Error::$variant $(($($value),*))? $({ $($field),* })? => optional!($($hint)?),)*
                    Error::Reported { body, .. } => body.hint.as_deref(),
                    Error::DirectoryGone { .. } => {
                        Some("`openwork workspace move <ws> <path>` follows a directory that was moved")
                    }
                    Error::Refused { .. } | Error::Unhealthy | Error::Printed(_) | Error::Io { .. } => None,
                };
                hint.map(str::to_owned)
            }
        }

        impl fmt::Display for Error {
            #[allow(unused_variables, reason = "some fields are only for the hint or the status")]
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Error::$variant $(($($value),*))? $({ $($field),* })? => write!(f, $($message)*),)*
                    Error::Refused { status, .. } => write!(f, "opencode answered with status {status}"),
                    Error::Unhealthy => write!(f, "something is wrong"),
                    Error::Printed(code) => write!(f, "{}", code.name()),
                    Error::DirectoryGone { name, path } => {
                        write!(f, "the directory of workspace {name} has gone: {}", shown(path))
                    }
                    Error::Reported { body, .. } => write!(f, "{}", body.message),
                    Error::Io { what, path, source } => write!(f, "cannot {what} {}: {source}", shown(path)),
                }
            }
        }
    };
}

#[rustfmt::skip]
errors! {
    /// The command line has a mistake.
    Usage { message: String, hint: Option<String> }, "usage", 2, [], ("{message}"), hint.as_deref();
    /// A malformed request, or one that cannot be fulfilled.
    BadRequest(why: String), "bad_request", 1, [400], ("{why}");
    /// A URL that a remote workspace cannot have.
    InvalidUrl { url: String, why: &'static str }, "invalid_url", 1, [400], ("invalid base URL {url:?}: {why}"),
        "give http://HOST[:PORT][/PATH] or https://…, without user, query or fragment";
    /// A name that a workspace cannot have.
    InvalidName { name: String, why: &'static str }, "invalid_name", 1, [400], ("invalid workspace name {name:?}: {why}");
    /// A path with bytes that are not UTF-8, or with NUL.
    PathNotUtf8(path: PathBuf), "path_not_utf8", 1, [400], ("the path is not valid UTF-8, or contains NUL: {}", shown(path));
    /// The path names something other than a directory.
    PathNotDirectory(path: PathBuf), "path_not_directory", 1, [400], ("not a directory: {}", shown(path));
    /// Nothing exists at the path.
    PathNotFound(path: PathBuf), "path_not_found", 1, [404], ("no such directory: {}", shown(path));
    /// The operating system, or the owner of a file, forbids it.
    PermissionDenied { what: String, path: PathBuf }, "permission_denied", 1, [403], ("{what}: {}", shown(path));
    /// The `Host` header does not name this port on loopback.
    ForbiddenHost(host: String), "forbidden_host", 1, [403], ("host {host:?} is not allowed");
    /// The request comes from a web page that is not on the allowlist.
    ForbiddenOrigin(page: String), "forbidden_origin", 1, [403], ("{page} is not allowed to call the daemon");
    /// The connection belongs to another user of this machine.
    ForbiddenUser, "forbidden_user", 1, [403], ("only the user who runs the daemon may call it");
    /// A routed request without opencode's credentials, or with wrong ones.
    Unauthorized, "unauthorized", 1, [401], ("missing or wrong opencode credentials (`openwork env` prints them)");
    /// No such route.
    NotFound(path: String), "not_found", 1, [404], ("no such route: {path}");
    /// The route exists, but not for this method.
    MethodNotAllowed { method: String, path: String, allow: String }, "method_not_allowed", 1, [405],
        ("{method} is not allowed for {path}: use {allow}");
    /// Another workspace has the name.
    NameTaken { name: String, id: String }, "name_taken", 1, [409], ("the name {name:?} is already taken by {id}"),
        "choose another name, or rename that workspace first";
    /// Sessions are running in the instance.
    InstanceBusy { workspace: String, sessions: usize }, "instance_busy", 1, [409],
        ("{workspace}: {sessions} running session{}", if *sessions == 1 { "" } else { "s" }),
        "wait for the session to end, or use --force";
    /// Sessions were still running at the deadline of a wait. `place`: a workspace, or opencode.
    StillBusy { place: String, sessions: usize }, "still_busy", 1, [409],
        ("{place}: {sessions} session{} still running at the deadline", if *sessions == 1 { "" } else { "s" }),
        "wait longer with --timeout";
    /// A daemon that cannot be reached from here holds the lock.
    DaemonElsewhere(why: String), "daemon_elsewhere", 1, [],
        ("the daemon runs in another container or on another machine: {why}"),
        "use openwork there, or another --data-dir here";
    /// The running daemon is too old for the request. `what`: a noun phrase.
    DaemonTooOld { what: String, version: String }, "daemon_too_old", 1, [],
        ("the running daemon (openwork {version}) does not support {what}"),
        "`openwork daemon restart` starts this version; opencode keeps running";
    /// Only a local workspace has an instance.
    WorkspaceIsRemote(name: String), "workspace_is_remote", 1, [409],
        ("{name} is a remote workspace: only a local one has an instance here");
    /// A request body without `Content-Length`.
    LengthRequired, "length_required", 1, [411], ("a request body needs a Content-Length");
    /// Above the limit: body (413), target (414) or head (431).
    TooLarge { what: &'static str, limit: usize, status: u16 }, "too_large", 1, [413, 414, 431],
        ("the {what} is larger than {limit} bytes");
    /// A body that is not declared as JSON.
    UnsupportedMediaType(found: String), "unsupported_media_type", 1, [415],
        ("the body must be application/json, not {found:?}");
    /// All connections, threads or descriptors are in use.
    Overloaded(what: &'static str), "overloaded", 1, [503], ("too many {what} at once");
    /// Another process has the requested port.
    PortInUse { port: u16, option: &'static str }, "port_in_use", 1, [503], ("port {port} ({option}) is already in use"),
        "choose another port, or leave the option out to get a free one";
    /// The content of the file is invalid.
    StateCorrupt { path: PathBuf, why: String, hint: &'static str }, "state_corrupt", 1, [500], ("{}: {why}", shown(path)), *hint;
    /// A newer version wrote the state file.
    StateTooNew { path: PathBuf, version: u64 }, "state_too_new", 1, [500],
        ("{}: version {version} is newer than this openwork supports", shown(path)),
        "nothing was changed; use the openwork that wrote it, or another --data-dir";
    /// The state file could not be replaced; the old one is untouched.
    StateWriteFailed { what: &'static str, path: PathBuf, source: io::Error }, "state_write_failed", 1, [500],
        ("cannot {what} {}: {source}", shown(path)),
        "nothing was changed; check the free space and the permissions of the data directory";
    /// The daemon could not be started.
    DaemonStartFailed(why: String), "daemon_start_failed", 1, [], ("the daemon did not start: {why}");
    /// A daemon holds the lock and does not respond.
    DaemonUnresponsive(why: String), "daemon_unresponsive", 1, [], ("the daemon does not respond: {why}"),
        "check `openwork logs daemon`; `openwork daemon stop --force` ends a daemon that is stuck";
    /// A bug, or an unexpected failure of the operating system.
    Internal(why: String), "internal", 1, [500], ("{why}");
    /// No daemon runs, and the command must not start one.
    DaemonNotRunning, "daemon_not_running", 3, [], ("the daemon is not running"), "start it with `openwork daemon start`";
    /// The selector matches no workspace.
    WorkspaceNotFound { selector: String, hint: Option<String> }, "workspace_not_found", 4, [404],
        ("no workspace {selector:?}"), hint.as_deref().unwrap_or("`openwork workspace list` shows all workspaces");
    /// opencode has no such session.
    SessionNotFound(id: String), "session_not_found", 4, [404], ("no session {id:?}"),
        "`openwork session list` shows the sessions of a workspace";
    /// The selector matches several workspaces.
    WorkspaceAmbiguous { selector: String, candidates: Vec<String> }, "workspace_ambiguous", 4, [409],
        ("{selector:?} could be {}", candidates.join(", ")), "give more of the name or id";
    /// No selector was given, and no workspace is active.
    NoActiveWorkspace, "no_active_workspace", 4, [409], ("no workspace is active"),
        "choose one with `openwork workspace switch <ws>`, or name it";
    /// There is no opencode to start.
    OpencodeNotFound(why: String), "opencode_not_found", 5, [503], ("no opencode to start: {why}"),
        "`openwork daemon restart` uses the PATH of this shell; or name the program with --opencode-bin FILE, or \
         install it (npm install -g opencode-ai)";
    /// opencode is of a version whose protocol openwork does not speak.
    OpencodeUnsupported { path: PathBuf, version: String, shared: bool }, "opencode_unsupported", 5, [503],
        ("{} is version {version:?}; {}", shown(path), match shared {
            true => "--shared needs 2.x, whose service is what openwork shares",
            false => "openwork works with 1.x, and with 2.x that has GET /api/info",
        }),
        match shared {
            true => "leave out --shared (OPENWORK_SHARED), or name a 2.x: `openwork daemon restart --shared --opencode-bin FILE`",
            false => "install a current opencode, or name another: `openwork daemon restart --opencode-bin FILE`",
        };
    /// opencode was started and did not become ready.
    OpencodeStartFailed(why: String), "opencode_start_failed", 5, [503], ("opencode did not start: {why}"),
        "check `openwork logs opencode`; `openwork daemon start` tries again";
    /// opencode refuses the password it was started with.
    OpencodeAuthFailed(port: u16), "opencode_auth_failed", 5, [502],
        ("opencode on port {port} refuses the password it was started with");
    /// opencode is not running, or ended during the request.
    OpencodeUnavailable(why: String), "opencode_unavailable", 5, [503], ("opencode is not available: {why}");
    /// opencode was not ready, or did not answer, before the deadline.
    OpencodeTimeout(what: &'static str), "opencode_timeout", 5, [504], ("opencode {what} before the deadline"),
        "try again with a longer --timeout; `openwork status` shows the state of opencode";
    /// opencode's reply is invalid.
    OpencodeFault(why: String), "opencode_error", 5, [502], ("opencode: {why}");
    /// Loading the instance of the workspace ended opencode twice. `output`: opencode's last lines.
    WorkspaceFenced { workspace: String, output: String }, "workspace_fenced", 5, [503],
        ("{workspace} is fenced: loading it ended opencode twice; its last output:\n{output}"),
        "mend the cause, then `openwork instance reset <ws>`";
}

/// A failure in JSON: `{"code", "message", "hint"}`; `hint` is optional.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// [`Code::name`].
    pub code: String,
    /// For people; names the file, workspace or address.
    pub message: String,
    /// What to do about the failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// The result type of this program.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An operation on a path that the operating system refused.
    pub fn io(what: &'static str, path: impl AsRef<Path>, source: io::Error) -> Error {
        Error::Io { what, path: path.as_ref().to_owned(), source }
    }

    /// A mistake on the command line without further advice.
    pub fn usage(message: impl Into<String>) -> Error {
        Error::Usage { message: message.into(), hint: None }
    }

    /// No workspace, and no guess at what was meant.
    pub fn no_workspace(selector: impl Into<String>) -> Error {
        Error::WorkspaceNotFound { selector: selector.into(), hint: None }
    }

    /// A failure that arrived as JSON. A code that this version does not know becomes `internal`.
    pub fn reported(body: ErrorBody, status: u16) -> Error {
        let code = Code::ALL.iter().copied().find(|code| code.name() == body.code);
        Error::Reported { code: code.unwrap_or(Code::Internal), body, status }
    }

    /// The same failure in other words.
    pub fn reworded(&self, message: String, hint: Option<String>) -> Error {
        let body = ErrorBody { message, hint, ..self.body() };
        Error::Reported { code: self.code(), body, status: self.http_status() }
    }

    /// A failure that arrived as JSON without a status: the first status of its code is used.
    pub fn unavailable(body: ErrorBody) -> Error {
        let code = Code::ALL.iter().find(|code| code.name() == body.code);
        let status = code.and_then(|code| code.http().first().copied()).unwrap_or(503);
        Error::reported(body, status)
    }

    /// The HTTP status of a reply that reports the failure.
    pub fn http_status(&self) -> u16 {
        match self {
            Error::TooLarge { status, .. } | Error::Reported { status, .. } => *status,
            other => other.code().http().first().copied().unwrap_or(500),
        }
    }

    /// The failure in JSON.
    pub fn body(&self) -> ErrorBody {
        ErrorBody { code: self.code().name().to_owned(), message: self.to_string(), hint: self.hint() }
    }
}

/// A path on one line: its control characters, line ends among them, are replaced.
fn shown(path: &Path) -> String {
    path.to_string_lossy().replace(char::is_control, "\u{fffd}")
}

impl std::error::Error for Error {}
