//! opencode itself: how it is found, started and asked. All that depends on its protocol
//! (`opencode serve` 1.x) is here, so that another can stand beside it.
//!
//! Invariant: credentials are written only to a connection that is opencode's own. The supervisor
//! has seen that the process holds the listening socket before it hands out an [`Endpoint`]; while
//! that socket listens nobody else can there; so one look *after* connecting, whether it is still
//! the same, proves whom we are connected to.

use std::fs::{self, Metadata};
use std::io::{self, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::http::{Request, Response, Timed, percent_encode};
use crate::options::{ALLOCATOR_MARK, NOTIFY_SOCKET};
use crate::paths;
use crate::state::{Auth, BinaryRecord};
use crate::system::process::Process;
use crate::system::{limits, socket, wait};
use crate::wire::from_json;

/// The largest answer that is read whole; `/path` and `/session/status` are far below. Bytes.
const ANSWER_LIMIT: usize = 8 * 1024 * 1024;

/// A running opencode that can be asked.
#[derive(Clone)]
pub struct Endpoint {
    /// Where it listens, on loopback.
    pub address: SocketAddrV4,
    /// Counts the processes of this daemon.
    pub generation: u64,
    /// The value of the `Authorization` header.
    pub authorization: Arc<str>,
    /// Of the process that it is, or that leads it.
    pub pidfd: Arc<OwnedFd>,
    /// The inode of the socket that listens there.
    pub socket: u32,
}

/// Why a call brought no answer.
#[derive(Debug)]
pub enum CallError {
    /// The process has ended or does not listen: it may be worth asking its successor.
    Gone(String),
    /// Not in time.
    TimedOut,
    /// It answered, and the answer is a failure.
    Failed(Error),
}

impl From<CallError> for Error {
    fn from(e: CallError) -> Error {
        match e {
            CallError::Gone(why) => Error::OpencodeUnavailable(why),
            CallError::TimedOut => Error::OpencodeTimeout("did not answer"),
            CallError::Failed(e) => e,
        }
    }
}

impl Endpoint {
    /// Connects, and makes sure that it is opencode that was connected to.
    pub fn connect(&self, deadline: Instant) -> std::result::Result<TcpStream, CallError> {
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(CallError::TimedOut);
        }
        let failed = |e: io::Error| match e.kind() {
            _ if limits::is_exhausted(&e) => CallError::Failed(Error::Overloaded("connections")),
            io::ErrorKind::TimedOut => CallError::TimedOut,
            _ => CallError::Gone(format!("cannot connect to {}: {e}", self.address)),
        };
        let stream = TcpStream::connect_timeout(&self.address.into(), rest).map_err(failed)?;
        if wait::has_ended(&self.pidfd) {
            return Err(CallError::Gone("the process has ended".to_owned()));
        }
        if socket::listening_inode(self.address).map_err(failed)? != Some(self.socket) {
            return Err(CallError::Gone("it no longer listens".to_owned()));
        }
        // Requests and events are small and somebody waits for each.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    /// Sends a request without a body; the reply with its head read.
    pub fn send(
        &self,
        method: &str,
        target: &str,
        directory: Option<&Path>,
        deadline: Instant,
    ) -> std::result::Result<Response<Timed<TcpStream>>, CallError> {
        let encoded = directory.map(|directory| percent_encode(directory.as_os_str().as_encoded_bytes()));
        let mut headers = vec![("Authorization", &*self.authorization), ("Accept", "*/*")];
        if let Some(directory) = &encoded {
            headers.push((DIRECTORY_HEADER, directory));
        }
        if method != "GET" {
            headers.push(("Content-Length", "0"));
        }
        let head = Request { method, target, headers: &headers }.head(&self.address.to_string());
        let mut stream = Timed::new(self.connect(deadline)?, Some(deadline));
        stream.write_all(&head).and_then(|()| Response::read(stream, method)).map_err(lost)
    }

    /// Sends a request and reads its JSON answer.
    fn ask(
        &self,
        method: &str,
        target: &str,
        directory: Option<&Path>,
        deadline: Instant,
    ) -> std::result::Result<Value, CallError> {
        let response = self.send(method, target, directory, deadline)?;
        let (status, is_json) = (response.status, response.is_json());
        let body = response.bytes(ANSWER_LIMIT).map_err(lost)?;
        if status == 401 {
            return Err(CallError::Failed(Error::OpencodeAuthFailed(self.address.port())));
        }
        let unexpected = |what: String| CallError::Failed(Error::OpencodeFault(format!("{method} {target}: {what}")));
        if status != 200 {
            let start: String = String::from_utf8_lossy(&body).chars().take(300).collect();
            return Err(unexpected(format!("status {status}: {}", start.trim())));
        }
        // An unknown route is answered with 200 and a web page.
        if !is_json {
            return Err(unexpected("the answer is not JSON".to_owned()));
        }
        from_json(&body).map_err(|e| unexpected(format!("the answer is not JSON: {e}")))
    }

    /// `GET /global/health`: its version.
    pub fn health(&self, deadline: Instant) -> std::result::Result<String, CallError> {
        let answer = self.ask("GET", "/global/health", None, deadline)?;
        match (&answer["healthy"], &answer["version"]) {
            (Value::Bool(true), Value::String(version)) => Ok(version.clone()),
            _ => Err(CallError::Failed(Error::OpencodeFault("it says that it is not healthy".to_owned()))),
        }
    }

    /// `GET /path`: the directories of an instance, which is created if it was not there.
    pub fn path(&self, directory: &Path, deadline: Instant) -> std::result::Result<Map<String, Value>, CallError> {
        match self.ask("GET", "/path", Some(directory), deadline)? {
            Value::Object(path) if path.get("directory").is_some_and(Value::is_string) => Ok(path),
            _ => Err(CallError::Failed(Error::OpencodeFault("GET /path: no directory in the answer".to_owned()))),
        }
    }

    /// `GET /session/status`: how many sessions are running in an instance. Loads the instance.
    pub fn running_sessions(&self, directory: &Path, deadline: Instant) -> std::result::Result<usize, CallError> {
        match self.ask("GET", "/session/status", Some(directory), deadline)? {
            Value::Object(sessions) => {
                let is_idle = |status: &Value| status.get("type").and_then(Value::as_str) == Some("idle");
                Ok(sessions.values().filter(|status| !is_idle(status)).count())
            }
            _ => Err(CallError::Failed(Error::OpencodeFault("GET /session/status: not an object".to_owned()))),
        }
    }

    /// `POST /instance/dispose`. Loads the instance first if it was not loaded.
    pub fn dispose(&self, directory: &Path, deadline: Instant) -> std::result::Result<(), CallError> {
        self.ask("POST", "/instance/dispose", Some(directory), deadline).map(|_| ())
    }

    /// `POST /global/dispose`: ends every instance with its children, orderly.
    pub fn dispose_all(&self, deadline: Instant) -> std::result::Result<(), CallError> {
        self.ask("POST", "/global/dispose", None, deadline).map(|_| ())
    }
}

/// The query parameter by which web pages give credentials where they can set no header: the part
/// of the Basic credentials behind the scheme, percent-encoded.
pub const TOKEN_PARAMETER: &str = "auth_token";

/// The header that says which instance is meant; percent-encoded once.
pub const DIRECTORY_HEADER: &str = "x-opencode-directory";

/// The parameter that `directory` in the query becomes at paths at which it does not only say which
/// instance is meant, as the header does, but also which sessions are listed: those of that
/// directory, and not all of the project (which directories outside of git share). opencode decodes
/// it once more than usual, but for the coming protocol (`/api`).
pub fn directory_filter(path: &str, directory: &Path) -> Option<String> {
    let once = percent_encode(directory.as_os_str().as_encoded_bytes());
    let value = match path {
        "/session" | "/experimental/session" => percent_encode(once.as_bytes()),
        "/api/session" => once,
        _ => return None,
    };
    Some(format!("directory={value}"))
}

/// Whether a call to this path loads the instance: all do but those about no instance, and
/// those of the coming protocol (`/api`), which have their own kind.
pub fn loads_instance(path: &str) -> bool {
    !["/global/", "/auth/", "/api/"].iter().any(|prefix| path.starts_with(prefix)) && path != "/doc"
}

/// Whether a call may have a ticket in its query for credentials: a terminal's, opened by a web
/// page that can set no header. It was given out to somebody with credentials, works once, and
/// opencode checks it.
pub fn takes_ticket(path: &str, query: &str) -> bool {
    let path = path.strip_prefix("/api").unwrap_or(path);
    let id = path.strip_prefix("/pty/").and_then(|rest| rest.strip_suffix("/connect"));
    id.is_some_and(|id| !id.is_empty() && !id.contains('/')) && query.split('&').any(|p| p.starts_with("ticket="))
}

/// A connection that broke, or an answer that is not HTTP.
fn lost(e: io::Error) -> CallError {
    match e.kind() {
        io::ErrorKind::TimedOut => CallError::TimedOut,
        io::ErrorKind::InvalidData => CallError::Failed(Error::OpencodeFault(format!("not an answer: {e}"))),
        _ => CallError::Gone(format!("the connection broke: {e}")),
    }
}

/// The opencode to start: `given` (the option), else `opencode` on PATH, else
/// `~/.opencode/bin/opencode`, where its own installer puts it.
///
/// # Errors
/// `opencode_not_found`.
pub fn find_binary(given: Option<&Path>) -> Result<(PathBuf, Metadata)> {
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
        .chain(paths::home().ok().map(|home| home.join(".opencode/bin/opencode")))
        .find_map(|candidate| executable(&candidate).map(|metadata| (candidate, metadata)))
        .ok_or_else(|| Error::OpencodeNotFound("neither on PATH nor in ~/.opencode/bin".to_owned()))
}

/// What is remembered of a binary, its version still to be asked.
pub fn record(path: &Path, metadata: &Metadata) -> BinaryRecord {
    BinaryRecord {
        path: path.to_string_lossy().into_owned(),
        actual_version: None,
        source: Some("external".to_owned()),
        size: Some(metadata.len()),
        modified: Some(format!("{}.{:09}", metadata.mtime(), metadata.mtime_nsec())),
        extra: Map::new(),
    }
}

/// The command that asks a binary for its version.
pub fn version_command(binary: &Path, cwd: &Path) -> Command {
    let mut command = Command::new(binary);
    command
        .arg("--version")
        .env_remove(NOTIFY_SOCKET)
        .current_dir(cwd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// Reads what `--version` prints.
///
/// # Errors
/// `opencode_unsupported` for another major version than 1: 2.x speaks another protocol.
pub fn check_version(binary: &Path, output: &str) -> Result<String> {
    let version = output.trim().trim_start_matches('v');
    let plausible = version.len() <= 100 && !version.contains(char::is_control);
    if plausible && version.split('.').next() == Some("1") {
        return Ok(version.to_owned());
    }
    let version = version.lines().next().unwrap_or_default().chars().take(100).collect();
    Err(Error::OpencodeUnsupported { path: binary.to_owned(), version })
}

/// The command that starts opencode: this program, which waits for [`Launch::go`] and then
/// becomes opencode under the same process id.
///
/// Why: what proves that the process is ours has to be on disk before it can do anything, or a
/// daemon killed at the wrong moment leaves an opencode that the next one does not know, and
/// starts a second over the same HOME. If the daemon dies first, the pipe closes and nothing
/// has been started.
pub fn launch_command(binary: &Path, address: SocketAddrV4, auth: &Auth) -> Command {
    // Not current_exe(): that is a path, which after an upgrade is another program's or nobody's.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("openwork")
        .arg(LAUNCH_COMMAND)
        .arg(limits::descriptor_limit_before().map_or_else(String::new, |limit| limit.to_string()))
        .arg(binary)
        .args(["serve", "--hostname", &address.ip().to_string(), "--port", &address.port().to_string()])
        .env("OPENCODE_SERVER_USERNAME", &auth.opencode_username)
        .env("OPENCODE_SERVER_PASSWORD", &auth.opencode_password)
        .stdin(Stdio::piped());
    let ours = std::env::var(ALLOCATOR_MARK).unwrap_or_default();
    for name in ours.split(',').chain(NOT_PASSED_ON).filter(|name| !name.is_empty()) {
        command.env_remove(name);
    }
    command
}

/// What is not passed on: what is about the daemon alone, and what `openwork env` says of one
/// workspace, which the agent's shells of all would believe.
const NOT_PASSED_ON: [&str; 5] =
    [NOTIFY_SOCKET, ALLOCATOR_MARK, "OPENWORK_WORKSPACE", "OPENWORK_DIRECTORY", "OPENCODE_BASE_URL"];

/// The hidden command of this program behind [`launch_command`].
pub const LAUNCH_COMMAND: &str = "__launch";

/// Lets a launched process become opencode.
pub fn go(process: &mut Process) -> io::Result<()> {
    let mut stdin = process.take_stdin().ok_or(io::ErrorKind::BrokenPipe)?;
    stdin.write_all(b"\n")
}

/// The launched process: waits for the word, then becomes the command. Returns only on failure.
pub fn become_when_told(command: &[std::ffi::OsString]) -> u8 {
    let mut word = [0];
    if !matches!(io::stdin().read(&mut word), Ok(1)) {
        return 1; // the daemon is gone: nothing is to be started
    }
    let Some(([limit, program], arguments)) = command.split_first_chunk() else { return 1 };
    if let Some(limit) = limit.to_str().and_then(|limit| limit.parse().ok()) {
        limits::restore_descriptor_limit(limit);
    }
    let error = Command::new(program).args(arguments).stdin(Stdio::null()).exec();
    let _ = writeln!(io::stderr(), "openwork: cannot run {}: {error}", Path::new(program).display());
    127
}
