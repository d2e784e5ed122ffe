//! opencode itself: how it is found, started and asked. All that depends on its protocol
//! (`opencode serve` 1.x) is here, so that another can stand beside it.
//!
//! Invariant: credentials are written only to a connection that is opencode's own. The supervisor
//! has seen that the process holds the listening socket before it makes an [`Endpoint`], and each
//! connection is proven to lead to that socket (`agent`).

use std::fs::{self, Metadata};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use ureq::http::Response;
use ureq::{Agent, Body};

use crate::agent::{self, Limit, Listener};
use crate::error::{Error, Result};
use crate::framing::{is_json, percent_decode, percent_encode};
use crate::options::{ALLOCATOR_MARK, EngineOptions, NOTIFY_SOCKET};
use crate::state::{Auth, BinaryRecord, PASSWORD_VARIABLE, Ports, USERNAME_VARIABLE, random_bytes};
use crate::system::process::Process;
use crate::system::{limits, signals};
use crate::wire::from_json;

/// The largest answer that is read whole; `/path` and `/session/status` are far below. Bytes.
const ANSWER_LIMIT: u64 = 8 * 1024 * 1024;

/// What the supervisor has to know of a line of opencode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manners {
    /// Whether one call disposes all instances in good order before TERM.
    pub disposes: bool,
    /// When KILL follows the first TERM.
    pub kill_after: Duration,
}

/// opencode 1.x: what it disposes is disposed before TERM, so that little is left for it to do then.
pub const MANNERS: Manners = Manners { disposes: true, kill_after: Duration::from_secs(5) };

/// A running opencode that can be asked.
#[derive(Clone)]
pub struct Endpoint {
    /// Where it listens, proven to be its own socket.
    pub listener: Listener,
    /// Counts the processes of this daemon.
    pub generation: u64,
    /// The value of the `Authorization` header.
    authorization: Arc<str>,
    agent: Agent,
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
    /// opencode at a listener, which takes these credentials.
    pub fn new(listener: Listener, generation: u64, authorization: Arc<str>) -> Endpoint {
        let agent = listener.agent();
        Endpoint { listener, generation, authorization, agent }
    }

    /// A proven connection, for a request that is routed.
    ///
    /// # Errors
    /// Of these, only [`CallError::Gone`] says something about opencode.
    pub fn connect(&self, deadline: Instant) -> std::result::Result<TcpStream, CallError> {
        self.listener.connect(deadline).map_err(|e| self.unreachable(&e))
    }

    /// What it means that no connection could be had.
    fn unreachable(&self, e: &io::Error) -> CallError {
        match e.kind() {
            _ if limits::is_exhausted(e) => CallError::Failed(Error::Overloaded("connections")),
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => CallError::TimedOut,
            _ => CallError::Gone(format!("no answer from {}: {e}", self.listener.address)),
        }
    }

    /// Sends a request without a body; the reply with its head read.
    fn send(
        &self,
        method: &str,
        target: &str,
        directory: Option<&Path>,
        limit: Limit,
    ) -> std::result::Result<Response<Body>, CallError> {
        let encoded = directory.map(|directory| percent_encode(directory.as_os_str().as_encoded_bytes()));
        let mut headers = vec![("Authorization", &*self.authorization)];
        if let Some(directory) = &encoded {
            headers.push((DIRECTORY_HEADER, directory));
        }
        let body = (method != "GET").then_some(&[][..]);
        agent::call(&self.agent, self.listener.address, (method, target), &headers, body, limit)
            .map_err(|e| self.failed(e))
    }

    /// What it means that a call failed.
    fn failed(&self, e: ureq::Error) -> CallError {
        match e {
            e if agent::is_timeout(&e) => CallError::TimedOut,
            ureq::Error::Io(e) => self.unreachable(&e),
            // Not HTTP, cut short, or beyond the limits.
            e => CallError::Failed(Error::OpencodeFault(format!("invalid response: {e}"))),
        }
    }

    /// Sends a request and reads its JSON answer.
    fn ask(
        &self,
        method: &str,
        target: &str,
        directory: Option<&Path>,
        deadline: Instant,
    ) -> std::result::Result<Value, CallError> {
        let mut response = self.send(method, target, directory, Limit::Whole(deadline))?;
        let status = response.status().as_u16();
        let content_type = response.headers().get("content-type").and_then(|value| value.to_str().ok());
        let is_json = content_type.is_some_and(is_json);
        let body = response.body_mut().with_config().limit(ANSWER_LIMIT).read_to_vec();
        let body = body.map_err(|e| self.failed(e))?;
        if status == 401 {
            return Err(CallError::Failed(Error::OpencodeAuthFailed(self.listener.address.port())));
        }
        let unexpected = |what: String| CallError::Failed(Error::OpencodeFault(format!("{method} {target}: {what}")));
        if status != 200 {
            let start: String = String::from_utf8_lossy(&body).chars().take(300).collect();
            return Err(unexpected(format!("status {status}: {}", start.trim())));
        }
        // opencode answers an unknown route with 200 and a web page.
        if !is_json {
            return Err(unexpected("the answer is not JSON".to_owned()));
        }
        from_json(&body).map_err(|e| unexpected(format!("the answer is not JSON: {e}")))
    }

    /// `GET /global/event`: server-sent events of all instances, for as long as the connection lives.
    pub fn events(&self, deadline: Instant) -> std::result::Result<impl Read + use<>, CallError> {
        let response = self.send("GET", "/global/event", None, Limit::Head(deadline))?;
        match response.status().as_u16() {
            200 => Ok(response.into_body().into_reader()),
            status => Err(CallError::Failed(Error::OpencodeFault(format!("GET /global/event: status {status}")))),
        }
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

    /// `GET /session/status`: the ids of the sessions that are running in an instance. Loads the
    /// instance.
    pub fn running_sessions(&self, directory: &Path, deadline: Instant) -> std::result::Result<Vec<String>, CallError> {
        match self.ask("GET", "/session/status", Some(directory), deadline)? {
            Value::Object(sessions) => {
                let is_idle = |status: &Value| status.get("type").and_then(Value::as_str) == Some("idle");
                Ok(sessions.into_iter().filter(|(_, status)| !is_idle(status)).map(|(id, _)| id).collect())
            }
            _ => Err(CallError::Failed(Error::OpencodeFault("GET /session/status: not an object".to_owned()))),
        }
    }

    /// `GET /session/:id`: the title of a session; none when it has none. Loads the instance.
    pub fn session_title(
        &self,
        directory: &Path,
        id: &str,
        deadline: Instant,
    ) -> std::result::Result<Option<String>, CallError> {
        let target = format!("/session/{}", percent_encode(id.as_bytes()));
        let session = self.ask("GET", &target, Some(directory), deadline)?;
        Ok(session.get("title").and_then(Value::as_str).filter(|title| !title.is_empty()).map(str::to_owned))
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

/// The header that chooses the instance: its directory, percent-encoded once.
pub const DIRECTORY_HEADER: &str = "x-opencode-directory";

/// The headers that choose a place; the second one an experimental workspace of opencode's.
pub const PLACE_HEADERS: [&str; 2] = [DIRECTORY_HEADER, "x-opencode-workspace"];

/// Whether a query parameter with this decoded name chooses a place: a directory, or an experimental
/// workspace of opencode's, which may be anywhere. opencode compares with case today.
pub fn chooses_place(parameter: &[u8]) -> bool {
    // `location[directory]` and `location[workspace]` are parts of `location`.
    let name = parameter.split(|byte| *byte == b'[').next().unwrap_or_default();
    [&b"directory"[..], b"workspace", b"location"].iter().any(|place| name.eq_ignore_ascii_case(place))
}

/// The segments of a path as opencode's router compares them: without empty ones, percent-decoded, in
/// lower case, up to a `;` or `#` (find-my-way 9, with the options that opencode gives it).
fn segments(path: &str) -> Vec<Vec<u8>> {
    let path = path.split([';', '#']).next().unwrap_or_default();
    let segments = path.split('/').filter(|segment| !segment.is_empty());
    segments.map(|segment| percent_decode(segment).unwrap_or_else(|| segment.into()).to_ascii_lowercase()).collect()
}

/// The parameter that takes the place of `directory` in the query at paths where `directory` is also
/// a filter: it limits the list of sessions to those of that directory, which the header does not.
/// opencode decodes the value once more than usual, except for the 2.x protocol (`/api`).
pub fn directory_filter(path: &str, directory: &Path) -> Option<String> {
    let once = percent_encode(directory.as_os_str().as_encoded_bytes());
    let segments = segments(path);
    let value = match segments.iter().map(Vec::as_slice).collect::<Vec<_>>()[..] {
        [b"session"] | [b"experimental", b"session"] => percent_encode(once.as_bytes()),
        [b"api", b"session"] => once,
        _ => return None,
    };
    Some(format!("directory={value}"))
}

/// Whether a call to this path loads the instance: all do but those about no instance, and those of
/// the 2.x protocol (`/api`), which has instances of its own.
pub fn loads_instance(path: &str) -> bool {
    let segments = segments(path);
    match segments.iter().map(Vec::as_slice).collect::<Vec<_>>()[..] {
        [b"global" | b"auth" | b"api", _, ..] | [b"doc"] => false,
        [..] => true,
    }
}

/// Whether a call may have a ticket in its query for credentials: a terminal's WebSocket, opened by a
/// web page that can set no header. opencode gives tickets to users with credentials, takes each once,
/// and checks it. Other spellings of the path, which no client uses, need credentials.
pub fn takes_ticket(path: &str, query: &str) -> bool {
    let path = path.strip_prefix("/api").unwrap_or(path);
    let id = path.strip_prefix("/pty/").and_then(|rest| rest.strip_suffix("/connect"));
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let has_ticket = query.split('&').any(|p| p.strip_prefix("ticket=").is_some_and(|ticket| !ticket.is_empty()));
    id.is_some_and(|id| !id.is_empty() && id.bytes().all(is_plain)) && has_ticket
}

/// How often a random port may turn out to be taken: with most of them free, twice is rare.
const PORT_TRIES: usize = 100;

/// Where opencode is to listen: the address and port asked for, else those used last, else random
/// ones. opencode 1.18 answers some requests without the password, and loads a directory for them:
/// a web page can send such requests to a known address, and cannot search 2^40 of them.
///
/// # Errors
/// `port_in_use` for a port that was asked for; `opencode_start_failed` when no port is free.
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
        // Those below 1024 are root's.
        if port >= 1024 && is_free(SocketAddrV4::new(ip, port)) {
            return Ok(SocketAddrV4::new(ip, port));
        }
    }
    let listener = TcpListener::bind((ip, 0)).and_then(|listener| listener.local_addr());
    let port = listener.map_err(|e| Error::OpencodeStartFailed(format!("no free port on {ip}: {e}")))?.port();
    Ok(SocketAddrV4::new(ip, port))
}

/// A random address of 127.0.0.0/8 outside of 127.0.0.0/16, where other programs have theirs;
/// 127.0.0.1 where the loopback interface has no other.
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

/// Whether nothing listens there.
pub fn is_free(address: SocketAddrV4) -> bool {
    TcpListener::bind(address).is_ok()
}

/// What is remembered of a binary, its version still to be asked.
pub fn record(path: &Path, metadata: &Metadata) -> BinaryRecord {
    let time = |seconds: i64, nanoseconds: i64| Some(format!("{seconds}.{nanoseconds:09}"));
    BinaryRecord {
        path: path.to_string_lossy().into_owned(),
        actual_version: None,
        source: Some("external".to_owned()),
        size: Some(metadata.len()),
        modified: time(metadata.mtime(), metadata.mtime_nsec()),
        resolved: fs::canonicalize(path).ok().map(|path| path.to_string_lossy().into_owned()),
        inode: Some(metadata.ino()),
        changed: time(metadata.ctime(), metadata.ctime_nsec()),
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
    for name in ours.split(',').chain(NOT_PASSED_ON).chain(ABOUT_ONE_REPOSITORY).filter(|name| !name.is_empty()) {
        command.env_remove(name);
    }
    command
}

/// What is not passed on: what is about the daemon alone, and what `openwork env` says of one
/// workspace, which the agent's shells of all would believe.
const NOT_PASSED_ON: [&str; 7] = [
    NOTIFY_SOCKET,
    ALLOCATOR_MARK,
    USERNAME_VARIABLE,
    PASSWORD_VARIABLE,
    "OPENWORK_WORKSPACE",
    "OPENWORK_DIRECTORY",
    "OPENCODE_BASE_URL",
];

/// What git says to a hook about the one repository it runs in (`git rev-parse --local-env-vars`, and
/// the quarantine of a push): opencode would work in that repository whatever the workspace.
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

/// Lets a launched process become opencode.
pub fn go(process: &mut Process) -> io::Result<()> {
    let mut stdin = process.take_stdin().ok_or(io::ErrorKind::BrokenPipe)?;
    stdin.write_all(b"\n")
}

/// The launched process: leaves the daemon's session, waits until the daemon has recorded it, then
/// becomes opencode. Returns only on failure.
pub fn exec_once_recorded(command: &[std::ffi::OsString]) -> u8 {
    // In a session of the daemon's, opencode would be orphaned by the daemon's end, and the kernel would
    // send HUP to it as soon as anything in its group is stopped.
    let _ = rustix::process::setsid();
    let mut word = [0];
    if !matches!(io::stdin().read(&mut word), Ok(1)) {
        return 1; // the daemon is gone: nothing is to be started
    }
    let Some(([limit, program], arguments)) = command.split_first_chunk() else { return 1 };
    if let Some(limit) = limit.to_str().and_then(|limit| limit.parse().ok()) {
        limits::restore_descriptor_limit(limit);
    }
    signals::reset_at_exec();
    let error = Command::new(program).args(arguments).stdin(Stdio::null()).exec();
    let _ = writeln!(io::stderr(), "openwork: cannot run {}: {error}", Path::new(program).display());
    127
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_routed_as_opencode_routes_it() {
        let directory = Path::new("/p");
        for path in ["/session", "/session/", "//session", "/%73ession", "/SESSION", "/session;x", "/session#x"] {
            assert_eq!(directory_filter(path, directory).as_deref(), Some("directory=%252Fp"), "{path}");
        }
        assert_eq!(directory_filter("/api/session/", directory).as_deref(), Some("directory=%2Fp"));
        for path in ["/session/x", "/sessions", "/%2Fsession", "/session%2F", "/", "/x/session"] {
            assert_eq!(directory_filter(path, directory), None, "{path}");
        }
        for path in ["/global/health", "//global//event/", "/Global/health", "/auth/x", "/api/session", "/doc", "/doc/"]
        {
            assert!(!loads_instance(path), "{path}");
        }
        for path in ["/path", "/", "/doc/x", "/globals/x", "/x/global/y"] {
            assert!(loads_instance(path), "{path}");
        }
    }

    #[test]
    fn a_ticket_is_taken_for_a_terminal_only() {
        for path in ["/pty/pty_1-x/connect", "/api/pty/x/connect"] {
            assert!(takes_ticket(path, "a=b&ticket=t"), "{path}");
            for query in ["", "ticket", "ticket=", "tickets=t", "a=ticket=t", "Ticket=t"] {
                assert!(!takes_ticket(path, query), "{path}?{query}");
            }
        }
        for path in
            ["/pty/connect", "/pty//connect", "/pty/x/y/connect", "/pty/x/connect/", "/pty/%2e%2e/connect", "/x"]
        {
            assert!(!takes_ticket(path, "ticket=t"), "{path}");
        }
    }

    #[test]
    fn parameters_of_a_place_are_known_in_every_spelling() {
        for name in ["directory", "Directory", "workspace", "location", "location[directory]", "directory[]"] {
            assert!(chooses_place(name.as_bytes()), "{name}");
        }
        for name in ["", "directories", "mydirectory", "path", "[directory]", "auth_token", "ticket"] {
            assert!(!chooses_place(name.as_bytes()), "{name}");
        }
    }
}
