//! The harness: a [`Host`] is a machine of its own for one test, with a home, a data directory,
//! projects, ports and an opencode that does as it is told. `openwork` is only ever spawned, or
//! spoken to over HTTP, as its users do.
//!
//! Waiting is for a condition, before a deadline that only a broken program reaches. A host
//! cleans up when it is dropped, also by a panic, and then shows what was run and logged.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub use rustix::process::Signal;
use rustix::process::{Pid, geteuid, kill_process};
use serde_json::Value;

pub const STATE: &str = "openwork-orchestrator-state.json";
pub const AUTH: &str = "openwork-orchestrator-auth.json";
/// The files there may be in a data directory, but for an earlier log of a daemon that has run for long.
pub const FILES: [&str; 8] =
    [STATE, AUTH, "daemon.lock", "start.lock", "control.sock", "daemon.log", "opencode.log", "opencode.log.1"];

/// Far beyond what anything here takes, so that only a hang reaches it.
const DEADLINE: Duration = Duration::from_secs(90);

/// An account without rights, for what root is never refused.
pub const NOBODY: u32 = 65534;

// --- The host ---

pub struct Host {
    root: PathBuf,
    data: PathBuf,
    openwork: PathBuf,
    env: Vec<(OsString, OsString)>,
    /// The account `openwork` runs under, if not ours.
    user: Option<u32>,
    transcript: Mutex<String>,
}

impl Host {
    /// One with the fake opencode.
    pub fn new() -> Host {
        Host::with_opencode(fake_opencode())
    }

    pub fn with_opencode(opencode: &Path) -> Host {
        observed().host_made();
        let root = temp_dir();
        let mut host = Host {
            data: root.join("data"),
            root,
            openwork: PathBuf::from(env!("CARGO_BIN_EXE_openwork")),
            env: Vec::new(),
            user: None,
            transcript: Mutex::default(),
        };
        for dir in ["home", "projects", "fake"] {
            fs::create_dir(host.path(dir)).unwrap();
        }
        host.set("PATH", std::env::var_os("PATH").unwrap());
        host.set("HOME", host.home());
        host.set("FAKE_OPENCODE_DIR", host.path("fake"));
        host.set("OPENWORK_DATA_DIR", host.data());
        host.set("OPENWORK_OPENCODE_BIN", opencode);
        host.set("OPENWORK_DAEMON_PORT", free_port().to_string());
        host.set("OPENWORK_OPENCODE_PORT", free_port().to_string());
        // Whoever sends a loopback call through a proxy fails here.
        for name in ["http_proxy", "https_proxy", "all_proxy"] {
            host.set(name, "http://127.0.0.1:9");
            host.set(&name.to_uppercase(), "http://127.0.0.1:9");
        }
        host
    }

    /// One whose `openwork` is subject to permissions even if the tests run as root.
    pub fn unprivileged() -> Host {
        let mut host = Host::new();
        if !is_root() {
            return host;
        }
        // The account need not be able to read where the build has put them.
        let binaries = [("openwork", host.openwork.clone()), ("opencode", fake_opencode().to_owned())];
        for (name, from) in binaries {
            copy_program(&from, &host.path(name));
        }
        host.openwork = host.path("openwork");
        host.set("OPENWORK_OPENCODE_BIN", host.path("opencode"));
        for dir in [".", "home", "projects", "fake"] {
            chown(host.path(dir), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        host.user = Some(NOBODY);
        host
    }

    /// Sets a variable for the commands to come.
    pub fn set(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.unset(name);
        self.env.push((name.into(), value.as_ref().to_owned()));
    }

    pub fn unset(&mut self, name: &str) {
        self.env.retain(|(key, _)| key != name);
    }

    /// The value of a variable the commands have.
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

    /// Says where the commands to come, by whatever means, have their data directory.
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
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// The state file as it is on disk.
    pub fn state(&self) -> Value {
        serde_json::from_slice(&fs::read(self.file(STATE)).unwrap()).unwrap()
    }

    /// Puts a state file where the daemon will look for one.
    pub fn write_state(&self, bytes: impl AsRef<[u8]>) {
        if !self.data().exists() {
            fs::create_dir(self.data()).unwrap();
            fs::set_permissions(self.data(), fs::Permissions::from_mode(0o700)).unwrap();
        }
        fs::write(self.file(STATE), bytes).unwrap();
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

    /// What the lock file says: pid and port.
    pub fn lock_text(&self) -> Option<(u32, u16)> {
        let text = fs::read_to_string(self.file("daemon.lock")).ok()?;
        let (pid, port) = text.strip_suffix('\n')?.split_once(' ')?;
        Some((pid.parse().ok()?, port.parse().ok()?))
    }

    pub fn daemon_pid(&self) -> u32 {
        self.lock_text().expect("a daemon in daemon.lock").0
    }

    pub fn port(&self) -> u16 {
        self.lock_text().expect("a daemon in daemon.lock").1
    }

    pub fn health(&self) -> Value {
        let reply = self.http("GET", "/health").send();
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()
    }

    pub fn phase(&self) -> String {
        self.health()["engine"]["phase"].as_str().unwrap().to_owned()
    }

    /// Waits for opencode and returns its pid.
    pub fn opencode_pid(&self) -> u32 {
        until("opencode to be ready", || self.health()["opencode"]["pid"].as_u64()) as u32
    }

    pub fn http(&self, method: &str, target: &str) -> Http<'_> {
        Http::to(Some(self), self.port(), method, target)
    }

    /// A call to opencode itself, past the daemon, with its credentials.
    pub fn opencode(&self, method: &str, target: &str) -> Http<'_> {
        let port = until("opencode to be ready", || self.health()["opencode"]["port"].as_u64());
        Http::to(None, port as u16, method, target).header("Authorization", self.credentials())
    }

    /// A call of OpenCode's through the daemon: `/w/<ws>/…`, with its credentials.
    pub fn routed(&self, method: &str, target: &str) -> Http<'_> {
        self.http(method, target).header("Authorization", self.credentials())
    }

    /// What opencode wants in the `Authorization` header.
    pub fn credentials(&self) -> String {
        format!("Basic {}", base64(&format!("opencode:{}", self.password())))
    }

    pub fn connect(&self) -> TcpStream {
        connect(self.port())
    }

    /// Sends these bytes as they are, and returns what comes until the connection closes, which
    /// is for the daemon to do. That it has not read them all by then is no failure.
    pub fn send_raw(&self, bytes: impl AsRef<[u8]>) -> Vec<u8> {
        let mut stream = self.connect();
        let _ = stream.write_all(bytes.as_ref());
        read_to_close(&mut stream)
    }

    // --- The fake opencode ---

    /// Lines of `KEY=VALUE` that its next start obeys, instead of those before.
    pub fn behave(&self, lines: &str) {
        fs::write(self.path("fake/behaviour"), lines).unwrap();
    }

    /// While it hangs, it answers nothing.
    pub fn hang(&self, hangs: bool) {
        let file = self.path("fake/hang");
        if hangs { fs::write(file, "").unwrap() } else { fs::remove_file(file).unwrap() }
    }

    /// The directories in which it says a session is running.
    pub fn busy(&self, directories: &[&Path]) {
        let lines: String = directories.iter().map(|path| format!("{}\n", path.display())).collect();
        fs::write(self.path("fake/busy"), lines).unwrap();
    }

    /// The lines it has put down under this name.
    pub fn recorded(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.path("fake").join(name)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn recorded_json(&self, name: &str) -> Vec<Value> {
        self.recorded(name).iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Every start so far, as `{pid, port, argv, cwd}`.
    pub fn starts(&self) -> Vec<Value> {
        self.recorded_json("starts")
    }

    /// Every request so far, as `{method, directory, target, authorized}`.
    pub fn requests(&self) -> Vec<Value> {
        self.recorded_json("requests")
    }

    /// What happened to the instance of this directory: `load`, `dispose`, in order.
    pub fn instance(&self, directory: &Path) -> Vec<String> {
        let events = self.recorded("instances");
        let events = events.iter().filter_map(|line| line.split_once(' '));
        events.filter(|(_, path)| Path::new(path) == directory).map(|(event, _)| event.to_owned()).collect()
    }

    /// The environment a start was given, as `NAME=value`.
    pub fn environment(&self, pid: u32) -> Vec<String> {
        let bytes = fs::read(self.path(format!("fake/env-{pid}"))).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        text.split_terminator('\0').map(str::to_owned).collect()
    }

    // --- Processes ---

    /// All that runs with the environment of this host: the daemon, opencode, what opencode has
    /// started, and commands that have not ended.
    pub fn processes(&self) -> Vec<u32> {
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| is_alive(*pid) && self.owns(*pid)).collect()
    }

    /// That the daemon and its opencode run, and nothing else.
    pub fn runs_one_of_each(&self) {
        let mut expected = [self.daemon_pid(), self.opencode_pid()];
        expected.sort_unstable();
        let mut running = self.processes();
        running.sort_unstable();
        assert_eq!(running, expected);
    }

    fn owns(&self, pid: u32) -> bool {
        let mine = format!("HOME={}", self.home().display());
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split(|byte| *byte == 0).any(|variable| variable == mine.as_bytes())
    }

    /// Those whose pids have been put down, by whomever, and that are still this host's.
    fn recorded_processes(&self) -> BTreeSet<u32> {
        let mut pids: Vec<u32> = self.lock_text().into_iter().map(|(pid, _)| pid).collect();
        pids.extend(self.starts().iter().filter_map(|start| Some(start["pid"].as_u64()? as u32)));
        pids.extend(self.recorded("grandchildren").iter().filter_map(|pid| pid.parse::<u32>().ok()));
        let state = fs::read(self.file(STATE)).unwrap_or_default();
        let state: Value = serde_json::from_slice(&state).unwrap_or_default();
        pids.extend(state["opencode"]["pid"].as_u64().map(|pid| pid as u32));
        pids.into_iter().filter(|pid| is_alive(*pid) && self.owns(*pid)).collect()
    }

    /// Ends all that runs here. Returns what `daemon stop` should have ended and has not.
    fn clean_up(&self) -> Vec<String> {
        let _ = fs::remove_file(self.path("fake/hang"));
        let running = self.recorded_processes();
        for pid in &running {
            kill(*pid, Signal::CONT);
        }
        let daemon_runs = self.lock_text().is_some_and(|(pid, _)| running.contains(&pid));
        let mut left = Vec::new();
        if daemon_runs {
            let stop = self.openwork(["daemon", "stop"]).env("OPENWORK_DATA_DIR", &self.data);
            stop.spawn().finish();
            left = self.processes().into_iter().map(command_line).collect();
        }
        for pid in self.recorded_processes() {
            kill(pid, Signal::KILL);
        }
        left
    }

    // --- When it fails ---

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

    /// Where the password is to be seen and should not be.
    fn leaked_password(&self) -> Option<&'static str> {
        let password = self.find_password()?;
        if self.transcript().contains(&password) {
            return Some("the output of a command");
        }
        let names = ["daemon.log", "daemon.log.1", "opencode.log", "opencode.log.1", "daemon.lock", STATE];
        names.into_iter().find(|name| {
            let bytes = fs::read(self.file(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).contains(&password)
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
        observed().live_hosts -= 1;
        // What every test shows, whatever else it is about.
        if !panicking {
            assert!(left.is_empty(), "left running by `daemon stop`: {left:?}");
            assert_eq!(leaked, None, "the password is in");
            assert!(!log.contains("panicked"), "{log}");
        }
    }
}

// --- Commands ---

#[must_use = "it runs when it is told how to end: ok, fails, json, …"]
pub struct Run<'a> {
    host: &'a Host,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    cwd: PathBuf,
    shell: Option<String>,
    stdin: Stdio,
    stdout: Stdio,
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

    /// Runs it from a shell, after these lines: `umask 0`, a descriptor left open.
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

    /// What it prints has the password in it, and is meant to.
    pub fn secret(mut self) -> Self {
        self.secret = true;
        self
    }

    /// Runs it to its end, whatever that is.
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

    /// Runs it with `--json`; it succeeds and prints one object, which is returned.
    pub fn json(mut self) -> Value {
        self.args.insert(0, "--json".into());
        let output = self.ok();
        let value = output.object();
        assert!(value["ok"].is_boolean(), "{output:?}");
        value
    }

    /// Runs it with `--json`; it fails with this exit status and this code. Returns the error.
    pub fn fails(mut self, exit: i32, code: &str) -> Value {
        self.args.insert(0, "--json".into());
        let output = self.exits(exit);
        let value = output.object();
        assert_eq!((&value["ok"], &value["error"]["code"]), (&false.into(), &code.into()), "{output:?}");
        check_error(&value["error"]);
        observed().codes.insert((code.to_owned(), Outcome::Exit(exit)));
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
        observed().variables.extend(command.get_envs().map(|(name, _)| name.to_string_lossy().into_owned()));
        command.stdin(self.stdin).stdout(self.stdout).stderr(Stdio::piped());
        let mut child = command.spawn().expect("spawning openwork");
        // The command holds copies of the ends of pipes it was given.
        drop(command);
        Running {
            host,
            args: self.args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect(),
            stdout: Capture::of(child.stdout.take()),
            stderr: Capture::of(child.stderr.take()),
            child,
            secret: self.secret,
        }
    }
}

/// The rules that every error keeps.
fn check_error(error: &Value) {
    let message = error["message"].as_str().expect("a message");
    assert!(!message.is_empty() && !message.ends_with('.'), "{message:?}");
    assert!(error.get("hint").is_none_or(|hint| hint.as_str().is_some_and(|hint| !hint.is_empty())), "{error}");
}

/// A command on its way. Dropped before it has ended, it is killed.
pub struct Running<'a> {
    host: &'a Host,
    args: Vec<String>,
    child: Child,
    stdout: Capture,
    stderr: Capture,
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
        // A terminal's escapes are for a terminal.
        for text in [&output.stdout, &output.stderr] {
            assert!(!text.contains('\x1b'), "{output:?}");
        }
        assert!(!output.stderr.contains("panicked at"), "{output:?}");
        output
    }

    /// None if it has not ended before the deadline, and with it whoever holds its output.
    fn finish(&mut self) -> Option<Output> {
        let status = poll(DEADLINE, || self.child.try_wait().unwrap())?;
        poll(DEADLINE, || (self.stdout.is_done() && self.stderr.is_done()).then_some(()))?;
        let (args, stdout, stderr) = (self.args.clone(), self.stdout.text(), self.stderr.text());
        let output = Output { args, status, stdout, stderr };
        match self.secret {
            true => self.host.note(&format!("$ openwork {}\n[secret]\n", self.args.join(" "))),
            false => self.host.note(&format!("{output:?}\n")),
        }
        observed().commands.insert((output.args.clone(), output.status.code()));
        Some(output)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What comes out of a pipe, read by a thread so that the pipe never fills.
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
    /// Standard output, which is one JSON object.
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

#[must_use = "it is sent when it is told how to end: send, ok, fails"]
pub struct Http<'a> {
    host: Option<&'a Host>,
    port: u16,
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl<'a> Http<'a> {
    fn to(host: Option<&'a Host>, port: u16, method: &str, target: &str) -> Self {
        let headers = vec![("Host".to_owned(), format!("127.0.0.1:{port}"))];
        Http { host, port, method: method.to_owned(), target: target.to_owned(), headers, body: Vec::new() }
    }

    /// Sets a header; of one that is there already, the value changes.
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.retain(|(key, _)| !key.eq_ignore_ascii_case(name));
        self.and_header(name, value)
    }

    /// Adds a header, to one of that name too.
    pub fn and_header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        self.body = body.as_ref().to_vec();
        self
    }

    pub fn json(self, value: Value) -> Self {
        self.header("Content-Type", "application/json").body(value.to_string())
    }

    fn bytes(&self) -> Vec<u8> {
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let has_length = self.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        if !has_length && (self.method != "GET" || !self.body.is_empty()) {
            head.push_str(&format!("Content-Length: {}\r\n", self.body.len()));
        }
        head.push_str("\r\n");
        [head.as_bytes(), &self.body].concat()
    }

    fn open(&self) -> Option<TcpStream> {
        let mut stream = try_connect(self.port)?;
        // A server that refuses early need not read to the end.
        let _ = stream.write_all(&self.bytes());
        Some(stream)
    }

    pub fn send(self) -> Reply {
        let request = format!("{} {}", self.method, self.target);
        self.try_send().unwrap_or_else(|| panic!("no reply to {request}"))
    }

    /// None if the other side is not there, or goes away before it has replied.
    pub fn try_send(self) -> Option<Reply> {
        let reply = Reply::parse(&read_reply(&mut self.open()?))?;
        self.put_down(&reply);
        Some(reply)
    }

    /// It is done: a status of 200 or 201, and `ok`.
    pub fn ok(self) -> Value {
        let reply = self.send();
        assert!(matches!(reply.status, 200 | 201), "{reply:?}");
        let value = reply.json();
        assert_eq!(value["ok"], true, "{reply:?}");
        value
    }

    /// It is refused with this status and code. Returns the error.
    pub fn fails(self, status: u16, code: &str) -> Value {
        self.send().refused(status, code)
    }

    /// Opens a stream of events that stays. It has begun when this returns.
    pub fn events(self) -> Events {
        let mut reader = BufReader::new(self.open().expect("connecting"));
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") && reader.read_until(b'\n', &mut head).expect("a head") > 0 {}
        let reply = Reply::parse(&head).expect("the head of a reply");
        let content_type = reply.header("content-type").unwrap_or_default();
        assert!(reply.status == 200 && content_type.starts_with("text/event-stream"), "{reply:?}");
        self.put_down(&reply);
        Events { reader }
    }

    fn put_down(&self, reply: &Reply) {
        let Some(host) = self.host else { return };
        let path = self.target.split('?').next().unwrap_or_default();
        host.note(&format!("> {} {}\n< {reply:?}\n", self.method, self.target));
        observed().requests.insert((self.method.clone(), path.to_owned(), reply.status));
    }
}

pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn parse(bytes: &[u8]) -> Option<Reply> {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
        let head = std::str::from_utf8(&bytes[..end]).ok()?;
        let mut lines = head.split("\r\n");
        let status = lines.next()?.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
        let headers = lines.filter_map(|line| line.split_once(": "));
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Some(Reply { status, headers, body: bytes[end + 4..].to_vec() })
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// It says that this is refused, and why. Returns the error.
    pub fn refused(&self, status: u16, code: &str) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        let value = self.json();
        assert_eq!((&value["ok"], &value["error"]["code"]), (&false.into(), &code.into()), "{self:?}");
        check_error(&value["error"]);
        observed().codes.insert((code.to_owned(), Outcome::Http(status)));
        value["error"].clone()
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} {:?} {}", self.status, self.headers, String::from_utf8_lossy(&self.body))
    }
}

/// Server-sent events with JSON in them.
pub struct Events {
    reader: BufReader<TcpStream>,
}

impl Events {
    /// The next event for which this holds; None if the stream ends before.
    pub fn find(&mut self, holds: impl Fn(&Value) -> bool) -> Option<Value> {
        let mut line = String::new();
        while self.reader.read_line(&mut line).expect("an event before the deadline") > 0 {
            // Cut off in the middle of a line, it has ended as well.
            if !line.ends_with('\n') {
                return None;
            }
            let event = line.strip_prefix("data: ").map(|data| serde_json::from_str(data).unwrap());
            if let Some(event) = event.filter(&holds) {
                return Some(event);
            }
            line.clear();
        }
        None
    }
}

pub fn connect(port: u16) -> TcpStream {
    try_connect(port).expect("connecting")
}

fn try_connect(port: u16) -> Option<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    Some(stream)
}

/// All that comes until the other side closes, or resets.
pub fn read_to_close(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return bytes,
            Ok(count) => bytes.extend(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return bytes,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("the connection is left open: {error}, after {bytes:?}"),
        }
    }
}

/// One reply: as long as its length says, else to the end of the connection.
fn read_reply(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(count @ 1..) => bytes.extend(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => return bytes,
        }
        let reply = Reply::parse(&bytes);
        let length = reply.as_ref().and_then(|reply| reply.header("content-length")?.parse().ok());
        if length.is_some_and(|length: usize| reply.is_some_and(|reply| reply.body.len() >= length)) {
            return bytes;
        }
    }
}

pub fn base64(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in text.as_bytes().chunks(3) {
        let bytes = [0, 1, 2].map(|at| u32::from(*group.get(at).unwrap_or(&0)));
        let bits = bytes[0] << 16 | bytes[1] << 8 | bytes[2];
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) & 63;
            out.push(if digit <= group.len() { DIGITS[value as usize] as char } else { '=' });
        }
    }
    out
}

// --- Waiting, processes, places ---

/// The first value there is within this time.
pub fn poll<T>(limit: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return Some(value);
        }
        if Instant::now() > deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until there is a value, and returns it.
pub fn until<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    poll(DEADLINE, condition).unwrap_or_else(|| panic!("waited in vain for {what}"))
}

/// Waits until this holds.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    until(what, || condition().then_some(()));
}

pub fn wait_gone(pid: u32) {
    wait_for(&format!("process {pid} to end"), || !is_alive(pid));
}

/// Fields of `/proc/<pid>/stat`: the session, and the start in clock ticks since boot.
pub const SESSION: usize = 6;
pub const START_TIME: usize = 22;

/// A numeric field of `/proc/<pid>/stat`, counted from 1 as in proc(5); 4 and above.
pub fn stat_field(pid: u32, field: usize) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(field - 3).unwrap().parse().unwrap()
}

/// Whether it runs, and is not only waiting to be reaped.
pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    // The first of its threads to end is a zombie until all have, and till then it holds files.
    state.is_some_and(|state| !"ZX".contains(state) || threads > 1)
}

/// A process for a message.
fn command_line(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    format!("{pid} {}", String::from_utf8_lossy(&bytes).replace('\0', " "))
}

pub fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("a pid");
    // One that has gone in the meantime is no failure.
    let _ = kill_process(pid, signal);
}

/// States of a socket in the kernel's table.
pub const ESTABLISHED: &str = "01";
pub const LISTEN: &str = "0A";

/// 127.0.0.1 there.
pub const LOOPBACK: &str = "0100007F";

/// The sockets in this state at this port of our own: address, and how much waits to be
/// received (of one that listens, how many connections).
pub fn sockets(port: u16, state: &str) -> Vec<(String, u32)> {
    let tables = ["tcp", "tcp6"].map(|name| fs::read_to_string(format!("/proc/net/{name}")).unwrap_or_default());
    let rows = tables.iter().flat_map(|table| table.lines()).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[1].ends_with(&format!(":{port:04X}")) && row[3] == state)
        .map(|row| {
            let (address, _) = row[1].split_once(':').unwrap();
            let (_, received) = row[4].split_once(':').unwrap();
            (address.to_owned(), u32::from_str_radix(received, 16).unwrap())
        })
        .collect()
}

pub fn is_root() -> bool {
    geteuid().is_root()
}

/// A port that is free, that no other test gets, and that the kernel gives to nobody by chance.
pub fn free_port() -> u16 {
    const FIRST: u32 = 20_000;
    const COUNT: u32 = 12_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        // Far apart for processes with pids in a row, such as a second test target.
        let offset = std::process::id().wrapping_mul(397).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = (FIRST + offset % COUNT) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A new directory under its real path.
fn temp_dir() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let base = std::env::temp_dir().canonicalize().unwrap();
    loop {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = base.join(format!("openwork-it-{}-{n}", std::process::id()));
        // One that is there is left from a test that was killed.
        if fs::create_dir(&dir).is_ok() {
            return dir;
        }
    }
}

/// Copies a program. Not in this process: what a thread has open for writing, the children of
/// the others have too until they run, and then it cannot be run itself.
pub fn copy_program(from: &Path, to: &Path) {
    assert!(Command::new("cp").args([from, to]).status().unwrap().success());
}

/// Compiles the fake opencode, if that has not been done.
pub fn fake_opencode() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("test-data/fake_opencode.rs");
        let binary = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake_opencode");
        let written = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        if written(&binary) > written(&source) {
            return binary;
        }
        let unfinished = binary.with_extension(std::process::id().to_string());
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let status = Command::new(rustc)
            .args(["-O", "--edition", "2021", "-o"])
            .args([&unfinished, &source])
            .status()
            .expect("running rustc");
        assert!(status.success(), "the fake opencode does not compile");
        // By a rename, for a run at the same time may be using it.
        fs::rename(&unfinished, &binary).unwrap();
        binary
    })
}

// --- What the tests have exercised, for the test that asks whether it is everything ---

#[derive(Default)]
pub struct Observed {
    /// Arguments and exit status of every command.
    pub commands: BTreeSet<(Vec<String>, Option<i32>)>,
    /// Every variable a command has had.
    pub variables: BTreeSet<String>,
    /// Method, path and status of every HTTP request.
    pub requests: BTreeSet<(String, String, u16)>,
    /// Every error that a test has asserted.
    pub codes: BTreeSet<(String, Outcome)>,
    /// The tests that have made a host.
    pub tests: BTreeSet<String>,
    pub live_hosts: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    Exit(i32),
    Http(u16),
}

impl Observed {
    fn host_made(&mut self) {
        // libtest names the thread after the test.
        self.tests.extend(thread::current().name().map(str::to_owned));
        self.live_hosts += 1;
    }
}

pub fn observed() -> MutexGuard<'static, Observed> {
    static OBSERVED: OnceLock<Mutex<Observed>> = OnceLock::new();
    OBSERVED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}
