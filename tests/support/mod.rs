//! The harness: a [`Host`] is a private machine for one test, with a home, a data directory, projects, ports
//! and a scriptable opencode. Tests only spawn `openwork` or call it over HTTP, as users do.
//!
//! Tests wait for conditions, with a deadline that only a broken program reaches. Dropping a host ends its
//! processes and removes its files; if the test failed, it first prints the commands and logs.
//!
//! A test that some machines cannot run is ignored with the reason; it never returns early. Such
//! tests stand in a module named after what they need, by which `scripts/test.sh` runs them where
//! the need is met: `as_root`, which becomes another user, `with_script`, `with_strace`, `with_git`,
//! `with_curl`, `with_tmux`, `with_mandoc`, `with_opencode2`.

pub mod exercised;
pub mod http;
pub mod processes;
pub mod random;
pub mod sessions;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::fs::{FlockOperation, flock};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use serde_json::Value;

use self::exercised::{Exercised, Failure};
pub use self::http::{Events, Reply, Request, base64, basic, connect, local, read_reply, read_to_close, whole_reply};
pub use self::processes::{
    DEADLINE, ESTABLISHED, LISTEN, Process, SESSION, START_TIME, Signal, close, free_port, is_alive, is_root, kill,
    loopback, poll, raise_limit, resources, sockets, stat_field, until, wait_for, wait_gone,
};

/// Whether this test program runs against opencode 2.x: `it` is for 1.x, and `it2`, from the same source, for
/// 2.x.
pub const IS_V2: bool = matches!(env!("CARGO_CRATE_NAME").as_bytes(), b"it2");

/// The version of the fake opencode, unless a test sets another.
pub const VERSION: &str = if IS_V2 { "2.3.2" } else { "1.18.33" };

/// opencode's event stream for all instances.
pub const ALL_EVENTS: &str = if IS_V2 { "/api/event" } else { "/global/event" };

/// opencode's event stream for one directory. 2.x has only the global one.
pub const EVENTS: &str = if IS_V2 { "/api/event" } else { "/event" };

/// opencode's health route.
pub const HEALTH: &str = if IS_V2 { "/api/info" } else { "/global/health" };

/// opencode's route to create and list sessions.
pub const SESSIONS: &str = if IS_V2 { "/api/session" } else { "/session" };

/// A target below `/w/<ws>` for the line under test: the routes of 2.x are below `/api`.
pub fn spelled(target: &str) -> String {
    let Some(rest) = target.strip_prefix("/w/").filter(|_| IS_V2) else { return target.to_owned() };
    let (workspace, call) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    format!("/w/{workspace}{}", spelled_call(call))
}

/// The same for a path of opencode itself.
pub fn spelled_call(call: &str) -> String {
    match call.strip_prefix("/path") {
        _ if !IS_V2 || call.starts_with("/api") || matches!(call, "" | "/" | "/?x") => call.to_owned(),
        Some(query @ "") => format!("{LOADING_CALL}{query}"),
        Some(query) if query.starts_with('?') => format!("{LOADING_CALL}{query}"),
        _ => format!("/api{call}"),
    }
}

/// The target that opencode receives when a call is routed to a directory.
pub fn passed(call: &str, directory: &Path) -> String {
    let call = spelled_call(call);
    if !IS_V2 || !call.starts_with("/api") {
        return call;
    }
    let separator = if call.contains('?') { '&' } else { '?' };
    format!("{call}{separator}location%5Bdirectory%5D={}", directory.to_str().unwrap().replace('/', "%2F"))
}

/// A route of opencode that loads an instance.
pub const LOADING_CALL: &str = if IS_V2 { "/api/location" } else { "/path" };

pub const STATE: &str = "openwork-orchestrator-state.json";
pub const AUTH: &str = "openwork-orchestrator-auth.json";
/// The files that may be in a data directory, without the rotated log of a long-running daemon.
pub const FILES: [&str; 9] = [
    STATE,
    AUTH,
    "daemon.lock",
    "opencode.lock",
    "start.lock",
    "control.sock",
    "daemon.log",
    "opencode.log",
    "opencode.log.1",
];

/// An unprivileged account, to test refusals that root does not get.
pub const NOBODY: u32 = 65534;

// --- The host ---

pub struct Host {
    root: PathBuf,
    data: PathBuf,
    openwork: PathBuf,
    env: Vec<(OsString, OsString)>,
    /// The account that `openwork` runs under, if not ours.
    user: Option<u32>,
    transcript: Mutex<String>,
    exercised: Mutex<Exercised>,
    claims: Mutex<Vec<String>>,
}

impl Host {
    /// A host with the fake opencode.
    pub fn new() -> Host {
        Host::with_opencode(fake_opencode())
    }

    pub fn with_opencode(opencode: &Path) -> Host {
        let root = temp_dir();
        let mut host = Host {
            data: root.join("data"),
            root,
            // As openwork itself names it, also where target/ is a link.
            openwork: fs::canonicalize(env!("CARGO_BIN_EXE_openwork")).unwrap(),
            env: Vec::new(),
            user: None,
            transcript: Mutex::default(),
            exercised: Mutex::default(),
            claims: Mutex::default(),
        };
        for dir in ["home", "projects", "fake"] {
            host.make_dir(&host.path(dir));
        }
        host.set("PATH", std::env::var_os("PATH").unwrap());
        host.set("HOME", host.home());
        host.set("FAKE_OPENCODE_DIR", host.path("fake"));
        host.set("FAKE_VERSION", VERSION);
        host.set("OPENWORK_DATA_DIR", host.data());
        host.set("OPENWORK_OPENCODE_BIN", opencode);
        host.set("OPENWORK_DAEMON_PORT", free_port().to_string());
        host.set("OPENWORK_OPENCODE_PORT", free_port().to_string());
        // `just coverage` collects its counters there.
        if let Some(profiles) = std::env::var_os("LLVM_PROFILE_FILE") {
            host.set("LLVM_PROFILE_FILE", profiles);
        }
        // A loopback call that goes through a proxy fails.
        for name in ["http_proxy", "https_proxy", "all_proxy"] {
            host.set(name, "http://127.0.0.1:9");
            host.set(&name.to_uppercase(), "http://127.0.0.1:9");
        }
        host
    }

    /// A host whose `openwork` is subject to permissions even if the tests run as root.
    pub fn unprivileged() -> Host {
        let mut host = Host::new();
        if !is_root() {
            return host;
        }
        host.user = Some(NOBODY);
        // The account may lack access to the build directory.
        let programs = [("openwork", host.openwork.clone()), ("opencode", fake_opencode().to_owned())];
        for (name, from) in programs {
            copy_program(&from, &host.path(name));
            host.hand_over(&host.path(name));
        }
        host.openwork = host.path("openwork");
        // The account cannot write to root's counters.
        if let Some(profiles) = std::env::var_os("LLVM_PROFILE_FILE") {
            host.set("LLVM_PROFILE_FILE", Path::new(&profiles).with_file_name("unprivileged-%8m%c.profraw"));
        }
        host.set("OPENWORK_OPENCODE_BIN", host.path("opencode"));
        for dir in [".", "home", "projects", "fake"] {
            host.hand_over(&host.path(dir));
        }
        host
    }

    /// Gives a file of the harness to the account of the commands.
    fn hand_over(&self, path: &Path) {
        if let Some(user) = self.user {
            chown(path, Some(user), Some(user)).unwrap();
        }
    }

    /// Makes a directory with mode 0755, whatever the umask.
    fn make_dir(&self, path: &Path) {
        fs::create_dir(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        self.hand_over(path);
    }

    fn write(&self, path: &Path, bytes: impl AsRef<[u8]>) {
        fs::write(path, bytes).unwrap();
        self.hand_over(path);
    }

    /// Claims that the test exercises these table entries (see [`exercised`]). Dropping the host checks the
    /// claims.
    pub fn exercises<const N: usize>(&self, claims: [&str; N]) {
        let mut all = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend(claims.map(str::to_owned));
    }

    fn exercised(&self) -> MutexGuard<'_, Exercised> {
        self.exercised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_error(&self, reply: &Reply) {
        if let Some(code) = reply.error_code() {
            self.exercised().codes.insert((code, Failure::Http(reply.status)));
        }
    }

    /// Sets a variable for the following commands.
    pub fn set(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.unset(name);
        self.env.push((name.into(), value.as_ref().to_owned()));
    }

    pub fn unset(&mut self, name: &str) {
        self.env.retain(|(key, _)| key != name);
    }

    /// The value of a variable of the commands.
    pub fn get(&self, name: &str) -> &str {
        let (_, value) = self.env.iter().find(|(key, _)| key == name).expect("a variable of the host");
        value.to_str().unwrap()
    }

    pub fn binary(&self) -> &Path {
        &self.openwork
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    pub fn home(&self) -> PathBuf {
        self.path("home")
    }

    pub fn data(&self) -> PathBuf {
        self.data.clone()
    }

    /// Tells the harness where the following commands have their data directory.
    pub fn data_is(&mut self, path: PathBuf) {
        self.data = path;
    }

    /// A file in the data directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.data().join(name)
    }

    /// Makes a directory for a workspace.
    pub fn project(&self, name: impl AsRef<Path>) -> PathBuf {
        let path = self.path("projects").join(name);
        let missing: Vec<&Path> = path.ancestors().take_while(|path| !path.exists()).collect();
        for path in missing.into_iter().rev() {
            self.make_dir(path);
        }
        path
    }

    /// The state file as it is on disk.
    pub fn state(&self) -> Value {
        serde_json::from_slice(&fs::read(self.file(STATE)).unwrap()).unwrap()
    }

    /// Writes the state file before a daemon starts.
    pub fn write_state(&self, bytes: impl AsRef<[u8]>) {
        if !self.data().exists() {
            self.make_dir(&self.data());
            fs::set_permissions(self.data(), fs::Permissions::from_mode(0o700)).unwrap();
        }
        self.write(&self.file(STATE), bytes);
    }

    pub fn password(&self) -> String {
        self.find_password().expect("a password in the auth file")
    }

    fn find_password(&self) -> Option<String> {
        let auth: Value = serde_json::from_slice(&fs::read(self.file(AUTH)).ok()?).ok()?;
        auth["opencodePassword"].as_str().filter(|password| !password.is_empty()).map(str::to_owned)
    }

    // --- Commands ---

    pub fn openwork<I>(&self, args: I) -> Run<'_>
    where
        I: IntoIterator<Item: AsRef<OsStr>>,
    {
        Run {
            host: self,
            args: args.into_iter().map(|arg| arg.as_ref().to_owned()).collect(),
            env: Vec::new(),
            cwd: self.root.clone(),
            shell: None,
            stdin: Stdio::null(),
            stdout: Stdio::piped(),
            terminal: None,
            secret: false,
        }
    }

    /// Adds a workspace and returns its id.
    pub fn add(&self, path: impl AsRef<OsStr>) -> String {
        let added = self.openwork([OsStr::new("workspace"), OsStr::new("add"), path.as_ref()]).json();
        added["workspace"]["id"].as_str().unwrap().to_owned()
    }

    /// The names in the registry, in order.
    pub fn names(&self) -> Vec<String> {
        let list = self.openwork(["workspace", "list"]).json();
        let names = list["workspaces"].as_array().unwrap().iter();
        names.map(|workspace| workspace["name"].as_str().unwrap().to_owned()).collect()
    }

    // --- The daemon ---

    /// The pid and the port in the lock file.
    pub fn lock_text(&self) -> Option<(u32, u16)> {
        let text = fs::read_to_string(self.file("daemon.lock")).ok()?;
        let mut words = text.strip_suffix('\n')?.split(' ');
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    }

    pub fn daemon_pid(&self) -> u32 {
        self.lock_text().expect("a daemon in daemon.lock").0
    }

    pub fn port(&self) -> u16 {
        self.lock_text().expect("a daemon in daemon.lock").1
    }

    /// The body of `/health`. Checks that its status matches.
    pub fn health(&self) -> Value {
        let reply = self.http("GET", "/health").send();
        let health = reply.json();
        let expected = if health["ok"] == true { 200 } else { 503 };
        assert_eq!(reply.status, expected, "{reply:?}");
        health
    }

    pub fn phase(&self) -> String {
        self.health()["engine"]["phase"].as_str().unwrap().to_owned()
    }

    /// Waits until opencode is ready, and returns its pid.
    pub fn opencode_pid(&self) -> u32 {
        let ready = || Some(self.health()).filter(|health| health["ok"] == true);
        until("opencode to be ready", ready)["opencode"]["pid"].as_u64().expect("a pid") as u32
    }

    pub fn http(&self, method: &str, target: &str) -> Http<'_> {
        Http { host: Some(self), request: Request::new(local(self.port()), method, target) }
    }

    /// Waits for opencode and returns its address.
    pub fn opencode_address(&self) -> SocketAddr {
        self.opencode_pid();
        let health = self.health();
        let url = health["opencode"]["baseUrl"].as_str().expect("the URL of opencode");
        url.strip_prefix("http://").unwrap().parse().expect("an address and a port")
    }

    /// Calls opencode directly, so that it loads and uses the instance of a directory.
    pub fn use_directly(&self, directory: &Path) {
        let directory = directory.display();
        let reply = match IS_V2 {
            false => self.opencode("POST", &format!("/session?directory={directory}")).send(),
            true => {
                self.opencode("GET", &format!("/api/location?location[directory]={directory}")).send();
                let body = serde_json::json!({"location": {"directory": directory.to_string()}});
                self.opencode("POST", "/api/session").json(body).send()
            }
        };
        assert_eq!(reply.status, 200, "{reply:?}");
    }

    /// Makes opencode end the event streams of a workspace.
    pub fn end_streams(&self, workspace: &str) {
        let target = format!("/w/{workspace}{}", if IS_V2 { "/end-streams" } else { "/instance/dispose" });
        assert_eq!(self.http("POST", &target).header("Authorization", self.credentials()).send().status, 200);
    }

    /// Calls opencode directly, so that it disposes the instance of a directory.
    pub fn dispose_directly(&self, directory: &Path) {
        let directory = directory.display();
        let reply = match IS_V2 {
            false => self.opencode("POST", &format!("/instance/dispose?directory={directory}")).send(),
            true => self.opencode("DELETE", &format!("/api/debug/location?location[directory]={directory}")).send(),
        };
        assert!(matches!(reply.status, 200 | 204), "{reply:?}");
    }

    /// A direct call to opencode, with its credentials.
    pub fn opencode(&self, method: &str, target: &str) -> Http<'_> {
        let request = Request::new(self.opencode_address(), method, target);
        Http { host: None, request }.header("Authorization", self.credentials())
    }

    /// A call to opencode through the daemon, `/w/<ws>/…`, with its credentials.
    pub fn routed(&self, method: &str, target: &str) -> Http<'_> {
        self.http(method, &spelled(target)).header("Authorization", self.credentials())
    }

    /// The `Authorization` header for opencode.
    pub fn credentials(&self) -> String {
        match self.is_shared() {
            true => basic("opencode", &self.recorded("passwords").pop().expect("a service that was started")),
            false => basic("opencode", &self.password()),
        }
    }

    /// Whether the user's own service is the opencode of its daemons.
    fn is_shared(&self) -> bool {
        self.env.iter().any(|(name, value)| name == "OPENWORK_SHARED" && value == "1")
    }

    pub fn connect(&self) -> TcpStream {
        connect(self.port())
    }

    /// A connection that has served a request, and is open for another.
    pub fn served(&self) -> TcpStream {
        let mut stream = self.connect();
        let reply = Request::new(local(self.port()), "GET", "/workspaces").send_on(&mut stream);
        let reply = reply.unwrap_or_else(|e| panic!("{e}"));
        assert!(reply.status == 200 && reply.is_kept(), "{reply:?}");
        stream
    }

    /// Waits until the daemon listens to opencode's events: only then does it see direct clients.
    pub fn wait_for_subscription(&self) {
        wait_for("the subscription", || self.recorded("streams").contains(&format!("open {ALL_EVENTS}")));
    }

    /// A new connection, and one that has served a request before.
    pub fn connections(&self) -> [TcpStream; 2] {
        [self.connect(), self.served()]
    }

    /// Sends these bytes as they are on a new connection, and returns all that comes: to the end of the
    /// connection, or of a reply after which the connection is kept. Such a connection is good for
    /// another request. The daemon need not have read all bytes by then.
    pub fn send_raw(&self, bytes: impl AsRef<[u8]>) -> Vec<u8> {
        self.send_raw_on(self.connect(), bytes)
    }

    /// The same on a connection of [`Host::connections`].
    pub fn send_raw_on(&self, mut stream: TcpStream, bytes: impl AsRef<[u8]>) -> Vec<u8> {
        let bytes = bytes.as_ref();
        let _ = stream.write_all(bytes);
        let method = String::from_utf8_lossy(bytes.split(|byte| *byte == b' ').next().unwrap_or_default());
        let (mut reply, mut buffer) = (Vec::new(), [0; 4096]);
        while !whole_reply(&reply, &method).is_some_and(|reply| reply.is_kept()) {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => reply.extend(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("the connection is left open: {error}, after {reply:?}"),
            }
        }
        if whole_reply(&reply, &method).is_some_and(|reply| reply.is_kept()) {
            self.is_in_step(stream);
        }
        Reply::parse(&reply).iter().for_each(|reply| self.note_error(reply));
        reply
    }

    /// Asserts that a connection has nothing more to say about the requests before, and serves another.
    pub fn is_in_step(&self, mut stream: TcpStream) {
        let last = format!("GET /health HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: close\r\n\r\n", self.port());
        stream.write_all(last.as_bytes()).expect("a connection that is kept");
        let bytes = read_to_close(&mut stream);
        let reply = Reply::parse(&bytes).unwrap_or_else(|| panic!("{:?}", String::from_utf8_lossy(&bytes)));
        assert_eq!((&reply.json()["apiVersion"], reply.header("connection")), (&1.into(), Some("close")), "{reply:?}");
    }

    /// The same as another user of the machine. Needs root.
    pub fn send_raw_as_another_user(&self, bytes: &str) -> Reply {
        const SCRIPT: &str = r#"exec 3<>"/dev/tcp/127.0.0.1/$0" && printf %s "$1" >&3 && cat <&3"#;
        let mut bash = Command::new("bash");
        bash.args(["-c", SCRIPT, &self.port().to_string(), bytes]).uid(NOBODY).current_dir("/");
        let output = bash.output().expect("running bash");
        let reply = Reply::parse(&output.stdout).unwrap_or_else(|| panic!("{output:?}"));
        self.note_error(&reply);
        reply
    }

    // --- The fake opencode ---

    /// Sets the behaviour of the next start: lines of `KEY=VALUE`, which replace the earlier ones.
    pub fn behave(&self, lines: &str) {
        self.write(&self.path("fake/behaviour"), lines);
    }

    /// Sets the answer of the fake on a path, until the next one is set; none with an empty path.
    pub fn answer(&self, path: &str, body: &str) {
        self.write(&self.path("fake/answers"), format!("{path} {body}\n"));
    }

    /// While the fake hangs, it answers nothing.
    pub fn hang(&self, hangs: bool) {
        let file = self.path("fake/hang");
        if hangs { self.write(&file, "") } else { fs::remove_file(file).unwrap() }
    }

    /// While the fake is held, a start does not listen.
    pub fn hold(&self, holds: bool) {
        let file = self.path("fake/hold");
        if holds { self.write(&file, "") } else { fs::remove_file(file).unwrap() }
    }

    /// While the fake burns, it uses the processor.
    pub fn burn(&self, burns: bool) {
        let file = self.path("fake/burn");
        if burns { self.write(&file, "") } else { fs::remove_file(file).unwrap() }
    }

    /// Sets the directories in which the fake reports a running session.
    pub fn busy(&self, directories: &[&Path]) {
        let lines: String = directories.iter().map(|path| format!("{}\n", path.display())).collect();
        self.write(&self.path("fake/busy"), lines);
    }

    /// The lines that the fake recorded under this name.
    pub fn recorded(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.path("fake").join(name)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn recorded_json(&self, name: &str) -> Vec<Value> {
        self.recorded(name).iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The address in the arguments of a start.
    pub fn start_address(start: &Value) -> SocketAddr {
        let argument = |at: usize| start["argv"][at].as_str().unwrap();
        assert_eq!((argument(1), argument(3)), ("--hostname", "--port"), "{start}");
        SocketAddr::new(argument(2).parse().unwrap(), argument(4).parse().unwrap())
    }

    /// Every start so far, as `{pid, port, argv, cwd}`.
    pub fn starts(&self) -> Vec<Value> {
        self.recorded_json("starts")
    }

    /// Every request so far, as `{method, directory, target, authorized}`.
    pub fn requests(&self) -> Vec<Value> {
        self.recorded_json("requests")
    }

    /// The history of the instance of a directory: `load` and `dispose`, in order.
    pub fn instance(&self, directory: &Path) -> Vec<String> {
        let events = self.recorded("instances");
        let events = events.iter().filter_map(|line| line.split_once(' '));
        events.filter(|(_, path)| Path::new(path) == directory).map(|(event, _)| event.to_owned()).collect()
    }

    /// The environment of a start, as `NAME=value`.
    pub fn environment(&self, pid: u32) -> Vec<String> {
        let bytes = fs::read(self.path(format!("fake/env-{pid}"))).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        text.split_terminator('\0').map(str::to_owned).collect()
    }

    // --- Processes ---

    /// The processes of this host: the daemon, opencode and its children, and running commands.
    pub fn processes(&self) -> Vec<u32> {
        Process::all_of(&self.home()).into_iter().map(|process| process.pid).collect()
    }

    /// Asserts that the daemon and its opencode run, and nothing else.
    pub fn runs_one_of_each(&self) {
        let mut expected = [self.daemon_pid(), self.opencode_pid()];
        expected.sort_unstable();
        let mut running = self.processes();
        running.sort_unstable();
        assert_eq!(running, expected);
    }

    /// The processes whose pids were recorded somewhere and that still belong to this host.
    fn recorded_processes(&self) -> BTreeSet<u32> {
        let mut pids: Vec<u32> = self.lock_text().into_iter().map(|(pid, _)| pid).collect();
        pids.extend(self.starts().iter().filter_map(|start| Some(start["pid"].as_u64()? as u32)));
        pids.extend(self.recorded("grandchildren").iter().filter_map(|pid| pid.parse::<u32>().ok()));
        let state = fs::read(self.file(STATE)).unwrap_or_default();
        let state: Value = serde_json::from_slice(&state).unwrap_or_default();
        pids.extend(state["opencode"]["pid"].as_u64().map(|pid| pid as u32));
        let home = self.home();
        let is_ours = |pid: &u32| Process::of(*pid).is_some_and(|process| process.has_home(&home));
        pids.into_iter().filter(is_ours).collect()
    }

    /// Ends every process of this host. Returns those that `daemon stop` failed to end.
    fn clean_up(&self) -> Vec<String> {
        for name in ["fake/hang", "fake/hold", "fake/hold-service"] {
            let _ = fs::remove_file(self.path(name));
        }
        let running = self.recorded_processes();
        for pid in &running {
            kill(*pid, Signal::CONT);
        }
        let daemon_runs = self.lock_text().is_some_and(|(pid, _)| running.contains(&pid));
        let mut left = Vec::new();
        if daemon_runs {
            let mut stop = self.openwork(["daemon", "stop"]).env("OPENWORK_DATA_DIR", &self.data);
            if self.is_shared() {
                stop.args.push("--all".into());
            }
            stop.spawn().finish();
            let running = Process::all_of(&self.home()).into_iter();
            left = running.map(|process| format!("{} {}", process.pid, process.argv.join(" "))).collect();
        }
        for pid in self.recorded_processes() {
            kill(pid, Signal::KILL);
        }
        left
    }

    // --- Diagnostics ---

    fn note(&self, text: &str) {
        self.transcript().push_str(text);
    }

    fn transcript(&self) -> MutexGuard<'_, String> {
        self.transcript.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self) {
        eprintln!("--- what was run\n{}", self.transcript());
        for name in ["daemon.lock", STATE, "daemon.log", "opencode.log"] {
            const TAIL: usize = 8000;
            let bytes = fs::read(self.file(name)).unwrap_or_default();
            let tail = &bytes[bytes.len().saturating_sub(TAIL)..];
            eprintln!("--- {name}\n{}", String::from_utf8_lossy(tail));
        }
    }

    /// Where the password leaked, if it did.
    fn leaked_password(&self) -> Option<&'static str> {
        let passwords: Vec<String> = self.find_password().into_iter().chain(self.recorded("passwords")).collect();
        let has_one = |text: &str| passwords.iter().any(|password| text.contains(password));
        if has_one(&self.transcript()) {
            return Some("the output of a command");
        }
        let names = ["daemon.log", "daemon.log.1", "opencode.log", "opencode.log.1", "daemon.lock", STATE];
        names.into_iter().find(|name| {
            let bytes = fs::read(self.file(name)).unwrap_or_default();
            has_one(&String::from_utf8_lossy(&bytes))
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let panicking = thread::panicking();
        if panicking {
            self.show();
        }
        let left = self.clean_up();
        let leaked = self.leaked_password();
        let log = fs::read_to_string(self.file("daemon.log")).unwrap_or_default();
        let _ = fs::remove_dir_all(&self.root);
        // These hold in every test.
        if !panicking {
            assert!(left.is_empty(), "left running by `daemon stop`: {left:?}");
            assert_eq!(leaked, None, "the password is in");
            assert!(!log.contains("panicked"), "{log}");
            let exercised = self.exercised();
            assert_eq!(exercised.broken_promises(), [""; 0], "not the status that `openwork help --json` promises");
            let claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
            let untrue: Vec<_> = claims.iter().filter(|claim| !exercised.has(claim)).collect();
            assert!(untrue.is_empty(), "claimed to be exercised, and not: {untrue:?}");
        }
    }
}

// --- Processes beside openwork's ---

/// A process unrelated to openwork. It is killed at the end of the test, even if the test fails.
pub struct Stranger(pub Child);

impl Stranger {
    pub fn new(command: &mut Command) -> Stranger {
        Stranger(command.spawn().expect("spawning a process"))
    }

    /// A process that does nothing.
    pub fn idle() -> Stranger {
        Stranger::new(Command::new("sleep").arg("1000").stdin(Stdio::null()))
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

// --- Commands ---

#[must_use = "the command runs only with one of: ok, fails, json, …"]
pub struct Run<'a> {
    host: &'a Host,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    cwd: PathBuf,
    shell: Option<String>,
    stdin: Stdio,
    stdout: Stdio,
    terminal: Option<File>,
    secret: bool,
}

impl<'a> Run<'a> {
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.into(), value.as_ref().to_owned()));
        self
    }

    pub fn cwd(mut self, path: impl AsRef<Path>) -> Self {
        self.cwd = path.as_ref().to_owned();
        self
    }

    /// Runs the command from a shell, after these lines: `umask 0`, an open descriptor.
    pub fn after(mut self, shell: &str) -> Self {
        self.shell = Some(shell.to_owned());
        self
    }

    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.stdin = stdin.into();
        self
    }

    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Self {
        self.stdout = stdout.into();
        self
    }

    /// Gives it a terminal to read from and to print to, on which this has been typed. What it prints there
    /// is its standard output; standard error is a pipe.
    pub fn on_terminal(mut self, typed: &str) -> Self {
        let (mut ours, theirs) = terminal();
        ours.write_all(typed.as_bytes()).unwrap();
        self.stdin = theirs.try_clone().unwrap().into();
        self.stdout = theirs.into();
        self.terminal = Some(ours);
        self
    }

    /// The output is meant to contain the password.
    pub fn secret(mut self) -> Self {
        self.secret = true;
        self
    }

    /// Runs the command to its end, whatever its exit status.
    pub fn output(self) -> Output {
        self.spawn().wait()
    }

    pub fn exits(self, code: i32) -> Output {
        let output = self.output();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        output
    }

    pub fn ok(self) -> Output {
        self.exits(0)
    }

    /// Runs the command with `--json`, asserts success and returns the printed object.
    pub fn json(mut self) -> Value {
        self.args.insert(0, "--json".into());
        let output = self.ok();
        let value = output.object();
        assert!(value["ok"].is_boolean(), "{output:?}");
        value
    }

    /// Runs the command with `--json`, asserts this exit status and error code, and returns the error.
    pub fn fails(mut self, exit: i32, code: &str) -> Value {
        self.args.insert(0, "--json".into());
        let host = self.host;
        let output = self.exits(exit);
        let value = output.object();
        assert_eq!((&value["ok"], &value["error"]["code"]), (&false.into(), &code.into()), "{output:?}");
        http::check_error(&value["error"]);
        host.exercised().codes.insert((code.to_owned(), Failure::Exit(exit)));
        value["error"].clone()
    }

    pub fn spawn(self) -> Running<'a> {
        let host = self.host;
        let mut command = match &self.shell {
            None => Command::new(&host.openwork),
            Some(lines) => {
                let mut command = Command::new("sh");
                command.arg("-c").arg(format!("{lines}\nexec \"$0\" \"$@\"")).arg(&host.openwork);
                command
            }
        };
        command.args(&self.args).current_dir(&self.cwd).env_clear();
        command.envs(host.env.iter().map(|(name, value)| (name, value)));
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        if let Some(user) = host.user {
            command.uid(user).gid(user);
        }
        host.exercised().variables.extend(command.get_envs().map(|(name, _)| name.to_string_lossy().into_owned()));
        command.stdin(self.stdin).stdout(self.stdout).stderr(Stdio::piped());
        let mut child = command.spawn().expect("spawning openwork");
        // `Command` keeps copies of the pipe ends.
        drop(command);
        Running {
            host,
            args: self.args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect(),
            is_on_terminal: self.terminal.is_some(),
            // Its standard output may have been made a pipe after all.
            stdout: match (child.stdout.take(), self.terminal) {
                (None, Some(terminal)) => Capture::of(Some(terminal)),
                (pipe, _) => Capture::of(pipe),
            },
            stderr: Capture::of(child.stderr.take()),
            child,
            secret: self.secret,
        }
    }
}

/// A running command, killed on drop.
pub struct Running<'a> {
    host: &'a Host,
    args: Vec<String>,
    child: Child,
    stdout: Capture,
    stderr: Capture,
    is_on_terminal: bool,
    secret: bool,
}

impl Running<'_> {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn stdout_so_far(&self) -> String {
        self.stdout.text()
    }

    pub fn wait(mut self) -> Output {
        let output = self.finish().unwrap_or_else(|| {
            panic!("{:?} does not end, or leaves its output open\n{}", self.args, self.stderr.text())
        });
        // Escapes are only for a terminal.
        for text in [&output.stdout, &output.stderr] {
            assert!(!text.contains('\x1b'), "{output:?}");
        }
        assert!(!output.stderr.contains("panicked at"), "{output:?}");
        output
    }

    /// `None` if the command, or a process that holds its output, has not ended by the deadline.
    fn finish(&mut self) -> Option<Output> {
        let status = poll(DEADLINE, || self.child.try_wait().unwrap())?;
        poll(DEADLINE, || (self.stdout.is_done() && self.stderr.is_done()).then_some(()))?;
        let (args, mut stdout, stderr) = (self.args.clone(), self.stdout.text(), self.stderr.text());
        if self.is_on_terminal {
            stdout = stdout.replace("\r\n", "\n");
        }
        let output = Output { args, status, stdout, stderr };
        match self.secret {
            true => self.host.note(&format!("$ openwork {}\n[secret]\n", self.args.join(" "))),
            false => self.host.note(&format!("{output:?}\n")),
        }
        self.host.exercised().commands.insert((output.args.clone(), output.status.code()));
        Some(output)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both ends of a terminal without echo: ours, and that of a command.
fn terminal() -> (File, File) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let theirs = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let mut settings = tcgetattr(&theirs).unwrap();
    settings.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&theirs, OptionalActions::Now, &settings).unwrap();
    (File::from(ours), theirs)
}

/// Runs a command to its end on a terminal on which `typed` is typed, and returns its output.
pub fn on_terminal(mut command: Command, typed: &str) -> String {
    let (mut ours, theirs) = terminal();
    command.stdin(theirs.try_clone().unwrap()).stdout(theirs.try_clone().unwrap()).stderr(theirs);
    let mut child = command.spawn().unwrap();
    // Its copies of the terminal would keep it open.
    drop(command);
    let printed = Capture::of(Some(ours.try_clone().unwrap()));
    ours.write_all(typed.as_bytes()).unwrap();
    let ended = poll(DEADLINE, || child.try_wait().unwrap());
    if ended.is_none() {
        let _ = child.kill();
        let _ = child.wait();
        panic!("{typed:?} does not end: {}", printed.text());
    }
    poll(DEADLINE, || printed.is_done().then_some(()));
    printed.text().replace("\r\n", "\n")
}

/// The output of a pipe, read by a thread so that the pipe never fills.
struct Capture {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Capture {
    fn of(pipe: Option<impl Read + Send + 'static>) -> Capture {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&bytes);
        let read = |mut pipe: Box<dyn Read + Send>| {
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                    shared.lock().unwrap().extend(&buffer[..count]);
                }
            })
        };
        let reader = pipe.map(|pipe| read(Box::new(pipe)));
        Capture { bytes, reader }
    }

    fn is_done(&self) -> bool {
        self.reader.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap()).into_owned()
    }
}

pub struct Output {
    args: Vec<String>,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// Standard output as one JSON object.
    pub fn object(&self) -> Value {
        let value: Value = serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        assert!(value.is_object() && self.stdout.ends_with("}\n"), "{self:?}");
        value
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Output { args, status, stdout, stderr } = self;
        write!(f, "$ openwork {}\n[{status}]\n{stdout}[stderr] {stderr}", args.join(" "))
    }
}

// --- HTTP ---

/// A request of the host, recorded in its transcript.
#[must_use = "the request is sent only with one of: send, ok, fails"]
pub struct Http<'a> {
    /// `None` for a server that is not openwork.
    host: Option<&'a Host>,
    request: Request,
}

impl Http<'_> {
    /// Sets a header, replacing any of the same name.
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.request = self.request.header(name, value);
        self
    }

    /// Adds a header beside any of the same name.
    pub fn and_header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.request = self.request.and_header(name, value);
        self
    }

    pub fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        self.request = self.request.body(body);
        self
    }

    pub fn json(mut self, value: Value) -> Self {
        self.request = self.request.json(&value);
        self
    }

    pub fn send(self) -> Reply {
        let reply = self.request.send();
        let reply = reply.unwrap_or_else(|e| panic!("{} {}: {e}", self.request.method, self.request.target));
        self.note(&reply);
        reply
    }

    /// `None` if the connection is refused, or ends before the reply is complete.
    pub fn try_send(self) -> Option<Reply> {
        let reply = self.request.send().ok()?;
        self.note(&reply);
        Some(reply)
    }

    /// Asserts success: a status of 200 or 201, and `ok`.
    pub fn ok(self) -> Value {
        let reply = self.send();
        assert!(matches!(reply.status, 200 | 201), "{reply:?}");
        let value = reply.json();
        assert_eq!(value["ok"], true, "{reply:?}");
        value
    }

    /// Asserts a refusal with this status and code. Returns the error.
    pub fn fails(self, status: u16, code: &str) -> Value {
        self.send().refused(status, code)
    }

    /// Opens a stream of events, and waits for its head.
    pub fn events(self) -> Events {
        let (reply, events) = self.request.events();
        self.note(&reply);
        events
    }

    fn note(&self, reply: &Reply) {
        let Some(host) = self.host else { return };
        let Request { method, target, .. } = &self.request;
        let path = target.split('?').next().unwrap_or_default();
        host.note(&format!("> {method} {target}\n< {reply:?}\n"));
        host.exercised().requests.insert((method.clone(), path.to_owned(), reply.status));
        host.note_error(reply);
    }
}

// --- Places ---

/// Makes a new directory, and returns its real path.
fn temp_dir() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let base = std::env::temp_dir().canonicalize().unwrap();
    loop {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = base.join(format!("openwork-it-{}-{n}", std::process::id()));
        // An existing one is left from a killed test.
        if fs::create_dir(&dir).is_ok() {
            return dir;
        }
    }
}

/// Copies a program, with cp(1): a child that another thread forks meanwhile would inherit a file open for
/// writing, and a program that is open for writing cannot be run.
pub fn copy_program(from: &Path, to: &Path) {
    assert!(Command::new("cp").args([from, to]).status().unwrap().success());
}

/// Writes a script that can be run, by the shell for the same reason.
pub fn write_program(path: &Path, text: &str) {
    let mut write = Command::new("sh");
    write.args(["-c", "printf %s \"$0\" > \"$1\" && chmod 755 \"$1\"", text]).arg(path);
    assert!(write.status().unwrap().success());
}

/// The fake opencode.
pub fn fake_opencode() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| compiled("fake_opencode", &["fake_opencode.rs", "fake_opencode2.rs"], &[]))
}

/// Compiles the first of these sources of test-data with these arguments of rustc, unless the result is
/// newer than all of them. A user who cannot run the compiler can use the result of another user.
pub fn compiled(name: &str, sources: &[&str], arguments: &[&str]) -> PathBuf {
    let source = |name: &&str| Path::new(env!("CARGO_MANIFEST_DIR")).join("test-data").join(name);
    let sources: Vec<PathBuf> = sources.iter().map(source).collect();
    let binary = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let written = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let is_built = || sources.iter().all(|source| written(&binary) > written(source));
    if is_built() {
        return binary;
    }
    // Under a runner with one process per test, one compiles and the others wait.
    let lock = File::create(binary.with_extension("lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    if is_built() {
        return binary;
    }
    let unfinished = binary.with_extension(std::process::id().to_string());
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut command = Command::new(rustc);
    command.args(["-O", "--edition", "2021"]).args(arguments).arg("-o").args([&unfinished, &sources[0]]);
    assert!(command.status().expect("running rustc").success(), "{name} does not compile");
    // Replace atomically: another run may be using the old binary.
    fs::rename(&unfinished, &binary).unwrap();
    binary
}
