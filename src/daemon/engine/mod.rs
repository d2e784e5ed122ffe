//! opencode itself: its command line and its protocol. This module has the parts that both lines share;
//! [`v1`] and [`v2`] have the same functions where the lines differ. The rest of the daemon calls an
//! [`Endpoint`] and does not depend on the line.
//!
//! Invariant: credentials go only to opencode's own socket. The supervisor makes an [`Endpoint`] only after
//! it has seen that the process holds the listening socket, and each connection is proven to lead to that
//! socket (`agent`).

mod events;
mod pool;
mod routing;
mod v1;
mod v2;

pub use self::events::{InstanceEvent, InstanceRef, Sign, Step, TurnEvent};
pub use self::routing::{
    DIRECTORY_HEADER, LOCATION_HEADERS, LOCATION_PARAMETER, Subject, TOKEN_PARAMETER, chooses_location,
    directory_filter, location_parameter, relocate, subject, takes_ticket,
};

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::pool::Pool;
use serde_json::{Map, Value};
use ureq::http::Response;
use ureq::{Agent, Body};

use crate::agent::{self, Limit, Listener};
use crate::error::{Error, Result};
use crate::framing::{basic, is_json, percent_encode};
use crate::line::{Line, V1_PASSWORD, V1_USERNAME, V2_PASSWORD, V2_USERNAME, parse_version};
use crate::lock;
use crate::options::{ALLOCATOR_MARK, EngineOptions, MARKER, SERVICE_VARIABLES};
use crate::state::{Auth, PASSWORD_VARIABLE, Ports, USERNAME_VARIABLE, random_bytes};
use crate::system::{limits, signals};
use crate::wire::from_json;

/// The largest answer that is read; `/path` and `/session/status` are far smaller. Bytes.
const ANSWER_LIMIT: u64 = 8 * 1024 * 1024;

/// The address of a running opencode, for calls.
pub struct Endpoint {
    /// The listening socket, proven to be opencode's own.
    pub listener: Listener,
    /// The number of the process in this daemon.
    pub generation: u64,
    /// The protocol that it speaks.
    pub line: Line,
    /// The value of the `Authorization` header.
    pub authorization: Arc<str>,
    /// The value of the `Host` header.
    pub host: String,
    agent: Agent,
    pool: Pool,
}

/// The failure of a call to opencode.
#[derive(Debug)]
pub enum CallError {
    /// The process has ended or does not listen: its successor may answer.
    Gone(String),
    /// No answer before the deadline.
    TimedOut,
    /// opencode answered with a failure, or the daemon ran out of a resource.
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
    /// The opencode at a listener, with the `Authorization` that it accepts.
    pub fn new(listener: Listener, generation: u64, line: Line, authorization: Arc<str>) -> Arc<Endpoint> {
        let (agent, host) = (listener.agent(), listener.address.to_string());
        Arc::new(Endpoint { listener, generation, line, authorization, host, agent, pool: Pool::default() })
    }

    /// An idle connection that was proven when it was made, if there is one. opencode may be closing it at
    /// this moment, so only requests that may be sent again can use it.
    pub fn kept(&self) -> Option<TcpStream> {
        self.pool.take(&self.listener.process)
    }

    /// Keeps a connection of [`Endpoint::connect`] or [`Endpoint::kept`] for another request.
    pub fn keep(&self, stream: TcpStream) {
        self.pool.put(stream);
    }

    /// Closes connections that have been idle for too long; all of them if opencode is no longer used.
    pub fn close_kept(&self, is_used: bool) {
        match is_used {
            true => self.pool.close_idle(),
            false => self.pool.close(),
        }
    }

    /// Opens a proven connection for a routed request.
    ///
    /// # Errors
    /// Only [`CallError::Gone`] says something about opencode.
    pub fn connect(&self, deadline: Instant) -> std::result::Result<TcpStream, CallError> {
        self.listener.connect(deadline).map_err(|e| self.unreachable(&e))
    }

    /// The error for a failed connection.
    fn unreachable(&self, e: &io::Error) -> CallError {
        match e.kind() {
            _ if limits::is_exhausted(e) => CallError::Failed(Error::Overloaded("connections")),
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => CallError::TimedOut,
            _ => CallError::Gone(format!("no answer from {}: {e}", self.listener.address)),
        }
    }

    /// Sends a request and reads the head of the reply.
    fn send(
        &self,
        (method, target): (&str, &str),
        directory: Option<&Path>,
        body: Option<&[u8]>,
        limit: Limit,
    ) -> CallResult<Response<Body>> {
        let encoded = directory.map(|directory| percent_encode(directory.as_os_str().as_encoded_bytes()));
        let mut headers = vec![("Authorization", &*self.authorization)];
        if let Some(directory) = &encoded {
            headers.push((DIRECTORY_HEADER, directory));
        }
        if body.is_some() {
            headers.push(("Content-Type", "application/json"));
        }
        // Some versions of ureq refuse a DELETE with a body, even an empty one.
        let body = body.or((!matches!(method, "GET" | "DELETE")).then_some(&[][..]));
        agent::call(&self.agent, self.listener.address, (method, target), &headers, body, limit)
            .map_err(|e| self.failed(e))
    }

    /// The error for a failed call.
    fn failed(&self, e: ureq::Error) -> CallError {
        match e {
            e if agent::is_timeout(&e) => CallError::TimedOut,
            ureq::Error::Io(e) => self.unreachable(&e),
            // Not HTTP, truncated, or too large.
            e => fault(&format!("invalid response: {e}")),
        }
    }

    /// Sends a request and reads the whole reply. Status 401 is an error.
    fn request(
        &self,
        request: (&str, &str),
        directory: Option<&Path>,
        body: Option<&[u8]>,
        deadline: Instant,
    ) -> CallResult<Reply> {
        let mut response = self.send(request, directory, body, Limit::Whole(deadline))?;
        let status = response.status().as_u16();
        let content_type = response.headers().get("content-type").and_then(|value| value.to_str().ok());
        let is_json = content_type.is_some_and(is_json);
        let body = response.body_mut().with_config().limit(ANSWER_LIMIT).read_to_vec();
        let body = body.map_err(|e| self.failed(e))?;
        match status {
            401 => Err(CallError::Failed(Error::OpencodeAuthFailed(self.listener.address.port()))),
            status => Ok(Reply { status, is_json, body }),
        }
    }

    /// Sends a request and reads its JSON answer.
    fn ask(&self, method: &str, target: &str, directory: Option<&Path>, deadline: Instant) -> CallResult<Value> {
        self.request((method, target), directory, None, deadline)?.json((method, target))
    }

    /// The server-sent events of all instances, for as long as the connection lives.
    pub fn events(&self, deadline: Instant) -> CallResult<impl Read + use<>> {
        let target = match self.line {
            Line::V1 => v1::EVENTS,
            Line::V2 => v2::EVENTS,
        };
        let response = self.send(("GET", target), None, None, Limit::Head(deadline))?;
        match response.status().as_u16() {
            200 => Ok(response.into_body().into_reader()),
            status => Err(fault(&format!("GET {target}: status {status}"))),
        }
    }

    /// Parses an event about an instance; `None` for other events.
    pub fn instance_event(&self, event: &[u8]) -> Option<InstanceEvent> {
        match self.line {
            Line::V1 => v1::instance_event(event),
            Line::V2 => v2::instance_event(event),
        }
    }

    /// The steps of turns in an event, in order: none in most events, two at the end of a turn that failed.
    pub fn turn_events(&self, event: &[u8]) -> Vec<TurnEvent> {
        match self.line {
            Line::V1 => v1::turn_event(event).into_iter().collect(),
            Line::V2 => v2::turn_events(event),
        }
    }

    /// Makes a health call; returns the version.
    ///
    /// # Errors
    /// [`Error::OpencodeUnsupported`] for a 2.x that is too old.
    pub fn health(&self, deadline: Instant) -> CallResult<String> {
        match self.line {
            Line::V1 => v1::health(self, deadline),
            Line::V2 => v2::health(self, deadline),
        }
    }

    /// The directories of an instance, `directory` among them. Loads the instance.
    pub fn path(&self, directory: &Path, deadline: Instant) -> CallResult<Map<String, Value>> {
        match self.line {
            Line::V1 => v1::path(self, directory, deadline),
            Line::V2 => v2::path(self, directory, deadline),
        }
    }

    /// The directories of the loaded instances; `None` from 1.x, which has no list.
    pub fn loaded(&self, deadline: Instant) -> CallResult<Option<Vec<String>>> {
        match self.line {
            Line::V1 => Ok(None),
            Line::V2 => v2::loaded(self, deadline).map(Some),
        }
    }

    /// The running sessions, of this directory or of all.
    pub fn running(&self, directory: &Path, deadline: Instant) -> CallResult<Running> {
        match self.line {
            Line::V1 => v1::running_sessions(self, directory, deadline).map(Running::Here),
            Line::V2 => v2::active_sessions(self, deadline).map(Running::Anywhere),
        }
    }

    /// The directory of a session; `None` when there is no such session, and from 1.x, which would load an
    /// instance to find out.
    pub fn session_directory(&self, id: &str, deadline: Instant) -> CallResult<Option<String>> {
        match self.line {
            Line::V1 => Ok(None),
            Line::V2 => v2::session_directory(self, id, deadline),
        }
    }

    /// The title of a session, for display: `None` when it has none, or when the call fails. 1.x loads the
    /// instance of the directory.
    pub fn session_title(&self, directory: &Path, id: &str, deadline: Instant) -> Option<String> {
        self.session(directory, id, deadline).ok()??.title
    }

    /// The sessions of a directory, the most recently updated first; opencode lists about a hundred at most.
    /// 1.x loads the instance.
    pub fn sessions(&self, directory: &Path, deadline: Instant) -> CallResult<Vec<SessionInfo>> {
        match self.line {
            Line::V1 => v1::sessions(self, directory, deadline),
            Line::V2 => v2::sessions(self, directory, deadline),
        }
    }

    /// A session; `None` when there is no such session. 1.x loads the instance of the directory.
    pub fn session(&self, directory: &Path, id: &str, deadline: Instant) -> CallResult<Option<SessionInfo>> {
        match self.line {
            Line::V1 => v1::session(self, directory, id, deadline),
            Line::V2 => v2::session(self, id, deadline),
        }
    }

    /// Ends the running turn of a session in this directory, whose instance is loaded.
    pub fn abort(&self, directory: &Path, id: &str, deadline: Instant) -> CallResult<()> {
        match self.line {
            Line::V1 => v1::abort(self, directory, id, deadline),
            Line::V2 => v2::interrupt(self, id, deadline),
        }
    }

    /// Ends the running turns of these sessions before a disposal, if the line needs that.
    pub fn interrupt(&self, sessions: &[String], deadline: Instant) -> CallResult<()> {
        match self.line {
            // A disposal ends turns properly.
            Line::V1 => Ok(()),
            Line::V2 => sessions.iter().try_for_each(|id| v2::interrupt(self, id, deadline)),
        }
    }

    /// Disposes an instance; 1.x first loads an instance that is not loaded.
    pub fn dispose(&self, directory: &Path, deadline: Instant) -> CallResult<()> {
        match self.line {
            Line::V1 => v1::dispose(self, directory, deadline),
            Line::V2 => v2::dispose(self, directory, deadline),
        }
    }

    /// How long a disposal may take.
    pub fn dispose_limit(&self) -> Duration {
        match self.line {
            Line::V1 => v1::DISPOSE_LIMIT,
            Line::V2 => v2::DISPOSE_LIMIT,
        }
    }

    /// Disposes all instances with their children, if the line has a call for that.
    pub fn dispose_all(&self, deadline: Instant) -> CallResult<()> {
        match self.line {
            Line::V1 => v1::dispose_all(self, deadline),
            // 2.x disposes them at TERM.
            Line::V2 => Ok(()),
        }
    }
}

/// How the supervisor starts and ends an opencode of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifecycle {
    /// Whether an orderly stop disposes all instances by a call before TERM.
    pub disposes: bool,
    /// When KILL follows the first TERM.
    pub kill_after: Duration,
    /// Whether it is the user's own service, which is never signalled: only its own command starts, restarts
    /// and stops it.
    pub is_service: bool,
}

/// The lifecycle of the user's own service.
pub const SERVICE_LIFECYCLE: Lifecycle = Lifecycle { disposes: false, kill_after: Duration::ZERO, is_service: true };

/// The lifecycle of our own opencode of a line.
pub fn lifecycle(line: Line) -> Lifecycle {
    match line {
        Line::V1 => v1::LIFECYCLE,
        Line::V2 => v2::LIFECYCLE,
    }
}

/// Whether opencode exits with this status after TERM or INT, which others may have sent.
pub fn is_clean_exit(line: Line, status: ExitStatus) -> bool {
    status.code()
        == Some(match line {
            Line::V1 => v1::CLEAN_EXIT,
            Line::V2 => v2::CLEAN_EXIT,
        })
}

/// The result of a call to opencode.
pub type CallResult<T> = std::result::Result<T, CallError>;

/// A whole reply of opencode.
struct Reply {
    status: u16,
    is_json: bool,
    body: Vec<u8>,
}

impl Reply {
    /// The JSON of a successful reply.
    fn json(&self, request: (&str, &str)) -> CallResult<Value> {
        self.success(request)?;
        let unexpected = |why: &str| self.unexpected(request, why);
        // opencode answers an unknown route with 200 and a web page.
        if self.status != 200 || !self.is_json {
            return Err(unexpected("the answer is not JSON"));
        }
        from_json(&self.body).map_err(|e| unexpected(&format!("the answer is not JSON: {e}")))
    }

    /// Requires a status of success.
    fn success(&self, request: (&str, &str)) -> CallResult<()> {
        if matches!(self.status, 200 | 204) {
            return Ok(());
        }
        let start: String = String::from_utf8_lossy(&self.body).chars().take(300).collect();
        Err(self.unexpected(request, &format!("status {}: {}", self.status, start.trim())))
    }

    fn unexpected(&self, (method, target): (&str, &str), what: &str) -> CallError {
        fault(&format!("{method} {target}: {what}"))
    }
}

/// The error for an invalid answer.
fn fault(why: &str) -> CallError {
    CallError::Failed(Error::OpencodeFault(why.to_owned()))
}

/// The ids of the running sessions.
#[derive(Debug)]
pub enum Running {
    /// Those of the requested instance.
    Here(Vec<String>),
    /// Those of all instances.
    Anywhere(Vec<String>),
}

impl Running {
    /// Whether no session runs.
    pub fn is_empty(&self) -> bool {
        let (Running::Here(sessions) | Running::Anywhere(sessions)) = self;
        sessions.is_empty()
    }
}

/// A session of opencode.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// The id.
    pub id: String,
    /// The title, if it has one.
    pub title: Option<String>,
    /// The working directory.
    pub directory: Option<String>,
    /// When it was last updated, Unix milliseconds.
    pub updated_at: Option<u64>,
}

impl SessionInfo {
    /// Parses an object with `id`, `title`, `time.updated`, and `directory` (1.x) or `location.directory`.
    fn of(session: &Value) -> Option<SessionInfo> {
        let text = |name: &str| session[name].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        // opencode may send numbers with a fraction.
        let updated = &session["time"]["updated"];
        let updated_at = updated.as_u64().or_else(|| updated.as_f64().map(|ms| ms as u64));
        let directory = text("directory").or_else(|| session["location"]["directory"].as_str().map(str::to_owned));
        Some(SessionInfo { id: text("id")?, title: text("title"), directory, updated_at })
    }
}

/// How many random ports to try: with most of them free, two taken ones in a row are rare.
const PORT_TRIES: usize = 100;

/// Chooses the address where opencode listens: the host and port of the options, else those used last, else
/// random ones. opencode 1.18 answers some requests without the password and loads a directory for them: a
/// web page can send such requests to a known address, but cannot search 2^40 addresses.
///
/// # Errors
/// `port_in_use` for the port of the options; `opencode_start_failed` when no port is free.
pub fn choose_address(options: &EngineOptions, ports: &Ports) -> Result<SocketAddrV4> {
    let last = ports.opencode_address();
    let ip = match options.host.or(last.map(|last| *last.ip())) {
        Some(ip) => ip,
        None => random_loopback()?,
    };
    if let Some(port) = options.port {
        return match is_free(SocketAddrV4::new(ip, port)) {
            true => Ok(SocketAddrV4::new(ip, port)),
            false => Err(Error::PortInUse { port, option: "--opencode-port" }),
        };
    }
    if let Some(address) = last.map(|last| SocketAddrV4::new(ip, last.port())).filter(|address| is_free(*address)) {
        return Ok(address);
    }
    for _ in 0..PORT_TRIES {
        let port = u16::from_ne_bytes(random_bytes()?);
        // Ports below 1024 are reserved to root.
        if port >= 1024 && is_free(SocketAddrV4::new(ip, port)) {
            return Ok(SocketAddrV4::new(ip, port));
        }
    }
    let listener = TcpListener::bind((ip, 0)).and_then(|listener| listener.local_addr());
    let port = listener.map_err(|e| Error::OpencodeStartFailed(format!("no free port on {ip}: {e}")))?.port();
    Ok(SocketAddrV4::new(ip, port))
}

/// A random address of 127.0.0.0/8 outside 127.0.0.0/16, which other programs use; 127.0.0.1 if the
/// loopback interface has no other.
fn random_loopback() -> Result<Ipv4Addr> {
    loop {
        let ip = match random_bytes::<3>()? {
            [0, ..] | [255, 255, 255] => continue,
            [a, b, c] => Ipv4Addr::new(127, a, b, c),
        };
        return Ok(match TcpListener::bind((ip, 0)) {
            Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => Ipv4Addr::LOCALHOST,
            _ => ip,
        });
    }
}

/// Whether nothing listens at an address.
pub fn is_free(address: SocketAddrV4) -> bool {
    TcpListener::bind(address).is_ok()
}

/// The command `opencode --version`.
pub fn version_command(binary: &Path, cwd: &Path) -> Command {
    let mut command = Command::new(binary);
    for name in SERVICE_VARIABLES {
        command.env_remove(name);
    }
    command.arg("--version").current_dir(cwd).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

/// Parses the output of `--version`.
///
/// # Errors
/// `opencode_unsupported` for major versions other than 1 and 2, and for previews of 2.x.
pub fn check_version(binary: &Path, output: &str) -> Result<(String, Line)> {
    let version = parse_version(output);
    if let Some((version, line)) = version.and_then(|version| Some((version.to_owned(), Line::of(version)?))) {
        return Ok((version, line));
    }
    let version = output.trim().lines().next().unwrap_or_default().chars().take(100).collect();
    Err(Error::OpencodeUnsupported { path: binary.to_owned(), version, shared: false })
}

/// The credentials of our own opencode, as values of the `Authorization` header.
#[derive(Clone)]
pub struct Credentials {
    v1: Arc<str>,
    v2: Arc<str>,
}

impl Credentials {
    /// The credentials in the auth file. Its user name applies to 1.x; 2.x has a fixed one.
    pub fn new(auth: &Auth) -> Credentials {
        let value = |user: &str| basic(user, &auth.opencode_password).into();
        Credentials { v1: value(&auth.opencode_username), v2: value(V2_USERNAME) }
    }

    /// The credentials for a line.
    pub fn of(&self, line: Line) -> &Arc<str> {
        match line {
            Line::V1 => &self.v1,
            Line::V2 => &self.v2,
        }
    }
}

/// The command that starts opencode: this program, which waits for [`unblock`] and then becomes opencode
/// with the same pid.
///
/// The identity of the process must be on disk before opencode runs: otherwise a daemon that is killed in
/// between leaves an opencode that the next daemon does not know, and a second one starts over the same
/// HOME. If the daemon dies first, the pipe closes and the process ends without running opencode.
///
/// The process also takes `opencode.lock` and passes it on as the standard input of opencode, which does not
/// read it. While opencode lives, no daemon starts another one over the same data directory, not even a
/// daemon in another container that cannot see the process, or one that has lost its record.
pub fn launch_command(binary: &Path, line: Line, address: SocketAddrV4, auth: &Auth, lock: &Path) -> Command {
    let mut command = launcher(binary, Some(lock));
    command.args(["serve", "--hostname", &address.ip().to_string(), "--port", &address.port().to_string()]);
    command.envs(match line {
        Line::V1 => v1::credentials(auth),
        Line::V2 => v2::credentials(auth),
    });
    command
}

/// The command of opencode that starts, restarts or stops the user's own service; like [`launch_command`],
/// it waits for [`unblock`]. The service has its own password and may outlive our opencode, so it inherits
/// neither our password nor our marker.
pub fn service_command(binary: &Path, verb: Verb) -> Command {
    let mut command = launcher(binary, None);
    command.args(["service", verb.name()]);
    for name in [MARKER, V1_USERNAME, V1_PASSWORD, V2_PASSWORD] {
        command.env_remove(name);
    }
    command
}

/// The command of this program that becomes `binary`, with the lock that it takes before. The caller adds
/// the arguments.
fn launcher(binary: &Path, lock: Option<&Path>) -> Command {
    // Not current_exe(): after an upgrade its path may be missing, or name another program.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("openwork")
        .arg(LAUNCH_COMMAND)
        .arg(limits::descriptor_limit_before().map_or_else(String::new, |limit| limit.to_string()))
        .arg(lock.unwrap_or(Path::new("")))
        .arg(binary)
        .stdin(Stdio::piped());
    let ours = std::env::var(ALLOCATOR_MARK).unwrap_or_default();
    let not_passed_on = NOT_PASSED_ON.into_iter().chain(SERVICE_VARIABLES).chain(ABOUT_ONE_REPOSITORY);
    for name in ours.split(',').chain(not_passed_on).filter(|name| !name.is_empty()) {
        command.env_remove(name);
    }
    command
}

/// A subcommand of `opencode service`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Starts the service unless it runs.
    Start,
    /// Ends the service and starts another.
    Restart,
    /// Ends the service.
    Stop,
}

impl Verb {
    /// The spelling on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Verb::Start => "start",
            Verb::Restart => "restart",
            Verb::Stop => "stop",
        }
    }
}

/// Variables that opencode must not inherit: those of the daemon itself, and those that `openwork env` sets
/// for one workspace, which would mislead the agent's shells in all others.
const NOT_PASSED_ON: [&str; 6] = [
    ALLOCATOR_MARK,
    USERNAME_VARIABLE,
    PASSWORD_VARIABLE,
    "OPENWORK_WORKSPACE",
    "OPENWORK_DIRECTORY",
    "OPENCODE_BASE_URL",
];

/// Variables that git sets for a hook about its repository (`git rev-parse --local-env-vars`, and the
/// quarantine of a push): with them, opencode would work in that repository in every workspace.
const ABOUT_ONE_REPOSITORY: [&str; 17] = [
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_CONFIG",
    "GIT_CONFIG_COUNT",
    "GIT_CONFIG_PARAMETERS",
    "GIT_DIR",
    "GIT_GRAFT_FILE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_INTERNAL_SUPER_PREFIX",
    "GIT_NO_REPLACE_OBJECTS",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_QUARANTINE_PATH",
    "GIT_REPLACE_REF_BASE",
    "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
];

/// The hidden command of this program behind [`launch_command`].
pub const LAUNCH_COMMAND: &str = "__launch";

/// Lets a launched process become opencode, by a byte on its standard input.
pub fn unblock(stdin: Option<ChildStdin>) -> io::Result<()> {
    let mut stdin = stdin.ok_or(io::ErrorKind::BrokenPipe)?;
    stdin.write_all(b"\n")
}

/// The launched process: leaves the daemon's session, waits until the daemon has recorded it, locks
/// `opencode.lock`, then becomes opencode. Returns only on failure.
pub fn exec_once_recorded(command: &[std::ffi::OsString]) -> u8 {
    // In the daemon's session, the end of the daemon would orphan opencode's process group, and the kernel
    // would send HUP to it as soon as any member is stopped.
    let _ = rustix::process::setsid();
    let mut word = [0];
    if !matches!(io::stdin().read(&mut word), Ok(1)) {
        return 1; // the daemon has died: start nothing
    }
    let Some(([limit, lock, program], arguments)) = command.split_first_chunk() else { return 1 };
    // Commands of the user's service take no lock: the service is not our own opencode.
    let locked = if lock.is_empty() { Ok(None) } else { lock::try_exclusive(Path::new(lock)) };
    let stdin = match locked {
        Ok(Some(lock)) => lock.file.into(),
        // A command that an earlier opencode left behind holds the lock; the daemon has checked that no
        // opencode does.
        Ok(None) => Stdio::null(),
        Err(e) => {
            let _ = writeln!(io::stderr(), "openwork: {e}");
            return 1;
        }
    };
    if let Some(limit) = limit.to_str().and_then(|limit| limit.parse().ok()) {
        limits::restore_descriptor_limit(limit);
    }
    signals::reset_at_exec();
    let error = Command::new(program).args(arguments).stdin(stdin).exec();
    let _ = writeln!(io::stderr(), "openwork: cannot run {}: {error}", Path::new(program).display());
    127
}
