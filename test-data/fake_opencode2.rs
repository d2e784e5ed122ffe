//! The server protocol of a fake `opencode` 2.3. `fake_opencode.rs` includes this file and calls it when `FAKE_VERSION` is
//! 2.x.
//!
//! It answers like a server built from sources of 2.x, according to measurements, and for newer parts according to the
//! sources: everything below `/api` requires Basic auth with the user `opencode`; the query `location[directory]`, else the
//! header, else the working directory chooses the location, which is loaded under exactly that string; sessions outlive a
//! restart, as in a database.
//!
//! It has the keys of `fake_opencode.rs`, and also:
//!
//! | key | effect |
//! |---|---|
//! | `FAKE_HEALTH=status\|health` | has the health route of an earlier 2.0 instead of `/api/info` |
//! | `FAKE_STARTING_MS` | answers 503 for this long after it listens |
//! | `FAKE_STOP_MS` | takes this long to end after TERM |
//! | `FAKE_EVICT_MS` | an eviction takes this long |
//! | `FAKE_STICKY_500` | answers 500 without a body for a missing location, until it is evicted |
//! | `FAKE_REVIVE=DIR` | an attached client loads this directory again as soon as it is evicted |
//! | `FAKE_NO_WEB_UI` | answers 404 to an unknown path outside `/api`, instead of a web page |
//! | `FAKE_SERVICE_FAILS` | `opencode service …` fails |
//! | `FAKE_SERVICE_LATE=SECONDS\|never` | `opencode service start` returns this long before the service registers |
//! | `FAKE_NO_SHUTDOWN_EVENT` | an eviction sends no `location.shutdown`, as before 2.0.5 |
//!
//! It also records `leaks`: directories that were evicted while a session ran in them. The lines of `sessions` are its
//! database: an id and a directory.
//!
//! `opencode service start|restart|stop|status` and `opencode serve --service` imitate the user's own service, which
//! registers like the real one; each start has another port and password. They record `services` (JSON: the verb) and
//! `passwords`; while `$FAKE_OPENCODE_DIR/hold-service` exists, the command does nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{exit, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::{
    base64, chunk, chunked_with_trailers, close_after, die_mid, download, head, interim, json, json_list, leave,
    long_head, ok, raw, reply, server_error, to_end, tunnel, two_replies, Body, Next, Request, Serves, Settings, JSON,
};

/// The number of events of a boot: 75 `plugin.added` and the first state of everything.
const BOOT_EVENTS: usize = 90;
/// The number of events of an eviction.
const EVICT_EVENTS: usize = 10;
/// The pause between two comments of the event stream.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// Routes for the tests that the real opencode lacks.
const MADE_UP: [&str; 13] = [
    "echo", "download", "upload", "slow", "chunked", "leave", "die-first", "die-mid", "interim", "end-streams",
    "stop-listening", "raw", "long-head",
];

struct Server {
    settings: Arc<Settings>,
    cwd: String,
    /// The header that it requires; there is no mode without a password.
    authorization: String,
    started: Instant,
    state: Mutex<State>,
    deaf: Arc<AtomicBool>,
}

#[derive(Default)]
struct State {
    loaded: BTreeSet<String>,
    /// Locations whose failure is remembered.
    failed: BTreeSet<String>,
    /// Running sessions.
    active: BTreeSet<String>,
    /// An event, or None: the stream ends.
    streams: Vec<mpsc::Sender<Option<String>>>,
}

/// The password in the environment; there is no mode without one.
pub fn password() -> String {
    let given = |name: &str| std::env::var(name).ok().filter(|password| !password.is_empty());
    given("OPENCODE_PASSWORD").or_else(|| given("OPENCODE_SERVER_PASSWORD")).unwrap_or_else(|| {
        println!("server password fake");
        "fake".to_owned()
    })
}

// --- The user's own service ---

/// The registration file of the service.
fn registration() -> PathBuf {
    let below_home = || PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".local/state");
    std::env::var_os("XDG_STATE_HOME").map_or_else(below_home, PathBuf::from).join("opencode/service.json")
}

/// A field of the registration. No parser: the fake writes it, and tests write it plainly.
fn registered(field: &str) -> Option<String> {
    let text = fs::read_to_string(registration()).ok()?;
    let (_, rest) = text.split_once(&format!("\"{field}\":"))?;
    Some(rest.split([',', '}']).next()?.trim_matches('"').to_owned())
}

/// The process of the service, if it lives.
fn registered_process() -> Option<String> {
    let pid = registered("pid")?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let is_dead = stat.rsplit(')').next()?.trim_start().starts_with(['Z', 'X']);
    (!is_dead).then_some(pid)
}

/// Removes the registration of this process at an orderly end.
pub fn unregister() {
    if registered("pid") == Some(std::process::id().to_string()) {
        let _ = fs::remove_file(registration());
    }
}

/// `opencode service start|restart|stop|status`.
pub fn service(verb: &str, settings: &Settings) {
    settings.record_process("services", &[verb.to_owned()], "");
    if settings.has("FAKE_SERVICE_FAILS") {
        eprintln!("fake: no service today");
        exit(1);
    }
    while settings.file("hold-service").is_some_and(|path| path.exists()) {
        thread::sleep(Duration::from_millis(5));
    }
    let wait = |what: &str, holds: &dyn Fn() -> bool| {
        let given_up = Instant::now() + Duration::from_secs(30);
        while !holds() {
            assert!(Instant::now() < given_up, "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    };
    if matches!(verb, "restart" | "stop") {
        if let Some(pid) = registered_process() {
            // The shell's own: the program is in a package that a build need not have.
            Command::new("sh").args(["-c", "kill \"$0\"", &pid]).status().expect("running sh");
            wait("the service does not end", &|| registered_process().is_none());
        }
    }
    if matches!(verb, "start" | "restart") {
        if let Some(late) = settings.text("FAKE_SERVICE_LATE") {
            let script = "[ $0 = never ] || { sleep \"$0\"; exec \"$1\" serve --service; }";
            let mut server = Command::new("setsid");
            server.args(["sh", "-c", script, late]).arg(std::env::current_exe().expect("its own program"));
            server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            server.spawn().expect("starting setsid");
        } else if registered_process().is_none() {
            let program = std::env::current_exe().expect("its own program");
            let mut server = Command::new("setsid");
            server.arg(program).args(["serve", "--service"]);
            server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            server.spawn().expect("starting setsid");
            wait("the service does not register", &|| registered_process().is_some());
        }
    }
    println!("{}", registered_process().and_then(|_| registered("url")).unwrap_or_else(|| "stopped".to_owned()));
}

/// `opencode serve --service`: the server of all clients of the user.
pub fn serve_users(argv: &[String], settings: Settings) {
    std::env::set_current_dir(std::env::var_os("HOME").expect("HOME")).expect("entering HOME");
    let settings = Arc::new(settings);
    super::catch_term(&settings);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    settings.record_process("starts", argv, &format!("\"port\":{port},"));
    super::misbehave_before_listening(&settings);
    // A different one each time, so that clients must find the service again.
    let mut random = [0; 16];
    fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random)).expect("random bytes");
    let password: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    settings.record("passwords", &password);
    let version = settings.version();
    let pid = std::process::id();
    let text = format!(
        "{{\"id\":\"fake-{pid}\",\"version\":{},\"url\":\"http://127.0.0.1:{port}\",\"pid\":{pid},\"password\":{}}}",
        json(version),
        json(&password)
    );
    let new = registration().with_extension(format!("{pid}.tmp"));
    fs::create_dir_all(new.parent().expect("a directory")).expect("the directory of the registration");
    let mut file = fs::OpenOptions::new().create(true).write(true).mode(0o600).open(&new).expect("a registration");
    io::Write::write_all(&mut file, text.as_bytes()).expect("writing the registration");
    fs::rename(&new, registration()).expect("registering");
    serve(settings, listener, password);
}

// --- Serving ---

pub fn serve(settings: Arc<Settings>, listener: TcpListener, password: String) {
    super::misbehave_while_listening(&settings);
    let server = Arc::new(Server {
        settings,
        cwd: std::env::current_dir().expect("a working directory").display().to_string(),
        authorization: format!("Basic {}", base64(&format!("opencode:{password}"))),
        started: Instant::now(),
        state: Mutex::default(),
        deaf: Arc::default(),
    });
    let deaf = Arc::clone(&server.deaf);
    super::accept(listener, &deaf, move |stream| super::converse(&*server, stream));
}

/// The id of the running session that a test has put into a directory with the file `busy`.
fn busy_session(directory: &str) -> String {
    directory.bytes().fold("ses_busy".to_owned(), |id, byte| format!("{id}{byte:02x}"))
}

impl Serves for Server {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn directory(&self, request: &Request) -> String {
        self.location(request)
    }

    fn authorizes(&self, request: &Request) -> bool {
        let wants = request.path().starts_with("/api") || request.path() == "/openapi.json";
        if request.path().ends_with("/connect") && request.query("ticket").as_deref() == Some("good") {
            return true;
        }
        // The query takes precedence over the header.
        let given = match request.query("auth_token") {
            Some(token) => Some(format!("Basic {token}")),
            None => request.header("authorization").map(str::to_owned),
        };
        !wants
            || (self.settings.text("FAKE_AUTH") != Some("reject")
                && given.as_deref() == Some(self.authorization.as_str()))
    }

    /// Closes, since it leaves the body unread.
    fn unauthorized(&self, stream: &TcpStream) -> io::Result<Next> {
        let headers = "www-authenticate: Basic realm=\"Secure Area\"\r\nContent-Type: application/json\r\n";
        let body = br#"{"_tag":"UnauthorizedError","message":"Authentication required"}"#;
        reply(stream, "401 Unauthorized", headers, body)?;
        Ok(Next::Close)
    }

    fn route(&self, request: &Request, reader: &mut BufReader<TcpStream>, stream: &TcpStream) -> io::Result<Next> {
        let mut body = Body::of(request, reader);
        let fails = |path: &str| path == request.path() || (path == "/path" && request.path() == "/api/location");
        if self.settings.text("FAKE_FAIL").is_some_and(fails) {
            return server_error(stream);
        }
        let starting = Duration::from_millis(self.settings.number("FAKE_STARTING_MS").unwrap_or(0));
        if request.path().starts_with("/api/") && self.started.elapsed() < starting {
            let body = match request.path() {
                "/api/info" => self.info(),
                _ => r#"{"code":"service_starting"}"#.to_owned(),
            };
            reply(stream, "503 Service Unavailable", "Content-Type: application/json\r\nRetry-After: 1\r\n", body.as_bytes())?;
            return Ok(Next::Close);
        }
        let path = request.path().strip_prefix("/api/");
        // What the real one does not have, it has below /api, as calls of a location, and beside it.
        let made_up = request.path().strip_prefix('/').filter(|name| MADE_UP.contains(name));
        let segments: Vec<&str> = path.or(made_up).map_or_else(Vec::new, |path| path.split('/').collect());
        let next = match (request.method.as_str(), &segments[..]) {
            ("GET", ["info" | "status" | "health"]) if self.health_route() == segments[0] => {
                while self.settings.has("FAKE_NEVER_HEALTHY") {
                    thread::park();
                }
                ok(stream, JSON, self.info().as_bytes())
            }
            ("GET", ["event"]) if self.settings.has("FAKE_EXIT_WHEN_READY") => leave(),
            ("GET", ["event"]) => self.events(request, stream),
            ("GET", ["debug", "location"]) => {
                let loaded: Vec<String> = self.state().loaded.iter().cloned().collect();
                let list = json_list(&loaded, |directory| format!("{{\"directory\":{}}}", json(directory)));
                ok(stream, JSON, list.as_bytes())
            }
            ("DELETE", ["debug", "location"]) => {
                self.evict(&self.location(request));
                no_content(stream)
            }
            ("GET", ["session", "active"]) => {
                let active: Vec<String> = self.active().into_iter().collect();
                let entries: Vec<String> =
                    active.iter().map(|id| format!("{}:{{\"type\":\"running\"}}", json(id))).collect();
                ok(stream, JSON, format!("{{\"data\":{{{}}}}}", entries.join(",")).as_bytes())
            }
            ("GET", ["session"]) => {
                let wanted = request.query("directory");
                let sessions: Vec<String> = self
                    .sessions()
                    .iter()
                    .filter(|(_, directory)| wanted.as_ref().is_none_or(|wanted| wanted == *directory))
                    .map(|(id, directory)| session(id, directory))
                    .collect();
                let cursor = r#""cursor":{"previous":null,"next":null}"#;
                ok(stream, JSON, format!("{{\"data\":[{}],{cursor}}}", sessions.join(",")).as_bytes())
            }
            ("POST", ["session"] | ["session", "import"] | ["experimental", "session", "import"]) => {
                let mut bytes = Vec::new();
                body.read_to_end(&mut bytes)?;
                let text = String::from_utf8_lossy(&bytes).into_owned();
                self.settings.record("bodies", &text);
                let directory = directory_of(&text).unwrap_or_else(|| self.cwd.clone());
                self.create(stream, &directory)
            }
            (_, ["session" | "form" | "permission" | "pty" | "shell", ..]) | (_, ["experimental", "session", ..])
                if segments.contains(&"connect") && request.is("upgrade", "websocket") =>
            {
                if let Err(failed) = self.boot(&self.location(request)) {
                    return failed.reply(stream);
                }
                return tunnel(&mut body.reader, stream);
            }
            (method, ["session", id, rest @ ..] | ["experimental", "session", id, rest @ ..]) => {
                self.session_call(method, id, rest, stream)
            }
            ("GET" | "HEAD", ["location"]) => match self.boot(&self.location(request)) {
                Err(failed) => failed.reply(stream),
                Ok(()) => {
                    let directory = json(&self.location(request));
                    let project = r#"{"id":"global","directory":"/","canonical":"/"}"#;
                    ok(stream, JSON, format!("{{\"directory\":{directory},\"project\":{project}}}").as_bytes())
                }
            },
            ("GET", [name @ ("agent" | "pty" | "shell" | "mcp" | "form")]) => match self.boot(&self.location(request)) {
                Err(failed) => failed.reply(stream),
                Ok(()) => {
                    let directory = json(&self.location(request));
                    self.settings.record("asked", name);
                    ok(stream, JSON, format!("{{\"location\":{{\"directory\":{directory}}},\"data\":[]}}").as_bytes())
                }
            },
            (method, ["echo"]) => match self.boot(&self.location(request)) {
                Err(failed) => failed.reply(stream),
                Ok(()) => echo(method, request, &mut body, stream),
            },
            ("GET", ["download"]) => download(stream, request.number("bytes")),
            ("POST", ["upload"]) => {
                let count = io::copy(&mut body, &mut io::sink())?;
                ok(stream, JSON, format!("{{\"bytes\":{count}}}").as_bytes())
            }
            (_, ["slow"]) => {
                let booted = self.boot(&self.location(request));
                thread::sleep(Duration::from_millis(request.number("ms")));
                match booted {
                    Ok(()) => ok(stream, JSON, b"true"),
                    Err(failed) => failed.reply(stream),
                }
            }
            ("GET", ["chunked"]) => chunked_with_trailers(stream),
            ("POST", ["leave"]) => leave(),
            (_, ["die-first"]) => return Ok(Next::Close),
            (_, ["die-mid"]) => die_mid(stream),
            (_, ["to-end"]) => to_end(stream),
            (_, ["close-after"]) => close_after(stream),
            (_, ["two-replies"]) => two_replies(stream),
            ("GET", ["interim"]) => interim(stream, request.number("count")),
            ("POST", ["raw"]) => return raw(stream, &request.query("reply").unwrap_or_default()),
            ("GET", ["long-head"]) => long_head(stream, request.number("bytes")),
            ("POST", ["end-streams"]) => {
                for stream in self.state().streams.drain(..) {
                    let _ = stream.send(None);
                }
                ok(stream, JSON, b"true")
            }
            ("POST", ["stop-listening"]) => {
                self.deaf.store(true, Ordering::SeqCst);
                // So that it is looked at.
                let _ = TcpStream::connect(stream.local_addr()?);
                ok(stream, JSON, b"true")
            }
            (_, []) => match request.method.as_str() {
                "GET" if request.path() == "/openapi.json" => ok(stream, JSON, br#"{"openapi":"3.1.0"}"#),
                "GET" | "HEAD" if !self.settings.has("FAKE_NO_WEB_UI") => {
                    ok(stream, "text/html", b"<!doctype html>\n<html lang=\"en\"></html>\n")
                }
                "GET" | "HEAD" => nothing(stream, "404 Not Found"),
                _ => nothing(stream, "405 Method Not Allowed"),
            },
            _ => nothing(stream, "404 Not Found"),
        };
        let next = next?;
        io::copy(&mut body, &mut io::sink())?;
        Ok(next)
    }
}

impl Server {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the state")
    }

    /// Query, header, working directory; an empty value is none.
    fn location(&self, request: &Request) -> String {
        let given = |value: Option<String>| value.filter(|value| !value.is_empty());
        let header = request.header("x-opencode-directory").map(super::percent_decode);
        given(request.query("location[directory]")).or(given(header)).unwrap_or_else(|| self.cwd.clone())
    }

    fn health_route(&self) -> &str {
        self.settings.text("FAKE_HEALTH").unwrap_or("info")
    }

    fn info(&self) -> String {
        let version = json(self.settings.version());
        let pid = std::process::id();
        format!("{{\"version\":{version},\"pid\":{pid},\"urls\":[],\"paths\":{{\"tmp\":\"/tmp\"}},\"healthy\":true}}")
    }

    // --- Sessions ---

    /// Id and directory of every session that was ever created.
    fn sessions(&self) -> BTreeMap<String, String> {
        let text = self.settings.file("sessions").and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        let mut sessions = BTreeMap::new();
        for (id, directory) in lines {
            match directory {
                "deleted" => drop(sessions.remove(id)),
                _ => drop(sessions.insert(id.to_owned(), directory.to_owned())),
            }
        }
        for directory in self.settings.busy_directories() {
            sessions.insert(busy_session(&directory), directory);
        }
        sessions
    }

    fn active(&self) -> BTreeSet<String> {
        let mut active = self.state().active.clone();
        active.extend(self.settings.busy_directories().iter().map(|directory| busy_session(directory)));
        active
    }

    fn create(&self, stream: &TcpStream, directory: &str) -> io::Result<Next> {
        let id = format!("ses_{:04}", self.sessions().len() + 1);
        self.settings.record("sessions", &format!("{id} {directory}"));
        self.settings.record("created", directory);
        let data = format!(
            "\"sessionID\":{},\"location\":{{\"directory\":{}}}",
            json(&id),
            json(directory)
        );
        self.publish("session.created", Some(directory), &data);
        ok(stream, JSON, format!("{{\"data\":{}}}", session(&id, directory)).as_bytes())
    }

    fn session_call(&self, method: &str, id: &str, rest: &[&str], stream: &TcpStream) -> io::Result<Next> {
        let Some(directory) = self.sessions().get(id).cloned() else {
            let body = format!("{{\"_tag\":\"SessionNotFoundError\",\"sessionID\":{},\"message\":\"no\"}}", json(id));
            reply(stream, "404 Not Found", "Content-Type: application/json\r\n", body.as_bytes())?;
            return Ok(Next::KeepAlive);
        };
        let of_session = format!("\"sessionID\":{}", json(id));
        match (method, rest) {
            ("GET", []) => ok(stream, JSON, format!("{{\"data\":{}}}", session(id, &directory)).as_bytes()),
            ("GET", ["message"]) => ok(stream, JSON, br#"{"data":[],"cursor":{}}"#),
            ("DELETE", []) => {
                self.settings.record("sessions", &format!("{id} deleted"));
                self.publish("session.deleted", Some(&directory), &of_session);
                no_content(stream)
            }
            ("POST", ["prompt"]) => {
                if let Err(failed) = self.boot(&directory) {
                    return failed.reply(stream);
                }
                self.state().active.insert(id.to_owned());
                // Events about the start and the end of a turn have no directory.
                self.publish("session.execution.started", None, &of_session);
                self.publish("session.step.started", Some(&directory), &of_session);
                ok(stream, JSON, format!("{{\"data\":{{\"id\":\"msg_fake\",{of_session}}}}}").as_bytes())
            }
            // The real opencode does this by itself.
            ("POST", [end @ ("succeed" | "fail")]) => {
                self.state().active.remove(id);
                let (kind, error) = match *end {
                    "fail" => ("failed", ",\"error\":{\"type\":\"provider.quota\",\"message\":\"no more\"}"),
                    _ => ("succeeded", ""),
                };
                self.publish(&format!("session.execution.{kind}"), None, &format!("{of_session}{error}"));
                no_content(stream)
            }
            ("POST", ["interrupt"]) => {
                if let Err(failed) = self.boot(&directory) {
                    return failed.reply(stream);
                }
                let interrupted = self.state().active.remove(id) | self.settings.unbusy(&directory);
                if interrupted {
                    self.publish("session.execution.interrupted", None, &format!("{of_session},\"reason\":\"user\""));
                }
                ok(stream, JSON, format!("{{\"interrupted\":{interrupted}}}").as_bytes())
            }
            _ => nothing(stream, "404 Not Found"),
        }
    }

    // --- Locations ---

    fn boot(&self, directory: &str) -> Result<(), Failed> {
        if !directory.starts_with('/') || !Path::new(directory).is_dir() || self.state().failed.contains(directory) {
            if !self.state().loaded.contains(directory) {
                if self.settings.has("FAKE_STICKY_500") {
                    self.state().failed.insert(directory.to_owned());
                    return Err(Failed::Sticky);
                }
                return Err(Failed::NotFound(directory.to_owned()));
            }
        }
        if !self.state().loaded.contains(directory) {
            self.settings.record("loadings", directory);
            let half = Duration::from_millis(self.settings.number("FAKE_LOAD_MS").unwrap_or(0) / 2);
            thread::sleep(half);
            if self.settings.lists("poison", "FAKE_POISON", directory) {
                eprintln!("fake: plugin of {directory} ends the process");
                exit(7);
            }
            thread::sleep(half);
        }
        if self.state().loaded.insert(directory.to_owned()) {
            self.settings.record("instances", &format!("load {directory}"));
            for number in 0..BOOT_EVENTS {
                let kind = if number < 75 { "plugin.added" } else { "agent.updated" };
                self.publish(kind, Some(directory), "");
            }
        }
        Ok(())
    }

    fn evict(&self, directory: &str) {
        self.state().failed.remove(directory);
        if !self.state().loaded.contains(directory) {
            return;
        }
        while self.settings.file("hold-disposals").is_some_and(|path| path.exists()) {
            thread::sleep(Duration::from_millis(5));
        }
        let sessions = self.sessions();
        if self.active().iter().any(|id| sessions.get(id).is_some_and(|of| of == directory)) {
            self.settings.record("leaks", directory);
        } else {
            thread::sleep(Duration::from_millis(self.settings.number("FAKE_EVICT_MS").unwrap_or(0)));
        }
        self.state().loaded.remove(directory);
        self.settings.record("instances", &format!("dispose {directory}"));
        for _ in 0..EVICT_EVENTS {
            self.publish("mcp.status.changed", Some(directory), "");
        }
        if !self.settings.has("FAKE_NO_SHUTDOWN_EVENT") {
            self.publish("location.shutdown", Some(directory), "");
        }
        if self.settings.text("FAKE_REVIVE") == Some(directory) {
            let _ = self.boot(directory);
        }
    }

    // --- Events ---

    /// Tells every stream; `data` is the inside of an object.
    fn publish(&self, kind: &str, directory: Option<&str>, data: &str) {
        let location = directory.map(|directory| format!("\"location\":{{\"directory\":{}}},", json(directory)));
        let event = format!(
            "{{\"id\":\"evt_fake\",\"created\":1,\"type\":\"{kind}\",{}\"data\":{{{data}}}}}",
            location.unwrap_or_default()
        );
        // A subscriber that cannot be reached has disconnected.
        self.state().streams.retain(|stream| stream.send(Some(event.clone())).is_ok());
    }

    /// Server-sent events of the whole process, until the client goes away.
    fn events(&self, request: &Request, stream: &TcpStream) -> io::Result<Next> {
        let (events, received) = mpsc::channel();
        self.state().streams.push(events.clone());
        let mut gone = stream.try_clone()?;
        thread::spawn(move || {
            let _ = io::copy(&mut gone, &mut io::sink());
            let _ = events.send(None);
        });
        self.settings.record("streams", &format!("open {}", request.target));
        let sent = (|| {
            let headers = "Content-Type: text/event-stream\r\nCache-Control: no-cache, no-transform\r\n\
                X-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n";
            head(stream, "200 OK", headers)?;
            let first = r#"{"id":"evt_fake","type":"server.connected","data":{}}"#;
            chunk(stream, format!("data: {first}\n\n: heartbeat\n\n").as_bytes())?;
            loop {
                match received.recv_timeout(HEARTBEAT) {
                    Ok(Some(event)) => chunk(stream, format!("data: {event}\n\n").as_bytes())?,
                    Err(RecvTimeoutError::Timeout) => chunk(stream, b": heartbeat\n\n")?,
                    Ok(None) | Err(RecvTimeoutError::Disconnected) => return chunk(stream, b""),
                }
            }
        })();
        self.settings.record("streams", &format!("close {}", request.target));
        sent.map(|()| Next::Close)
    }
}

/// Why a location cannot be loaded.
enum Failed {
    NotFound(String),
    Sticky,
}

impl Failed {
    fn reply(self, stream: &TcpStream) -> io::Result<Next> {
        match self {
            Failed::Sticky => defect(stream),
            Failed::NotFound(directory) => {
                let directory = json(&directory);
                let body = format!(
                    "{{\"_tag\":\"LocationNotFoundError\",\"location\":{{\"directory\":{directory}}},\"message\":\"no\"}}"
                );
                reply(stream, "404 Not Found", "Content-Type: application/json\r\n", body.as_bytes())?;
                Ok(Next::KeepAlive)
            }
        }
    }
}

fn session(id: &str, directory: &str) -> String {
    format!(
        "{{\"id\":{},\"projectID\":\"global\",\"title\":\"mend {{it}}\",\"time\":{{\"created\":1,\"updated\":1}},\
         \"location\":{{\"directory\":{}}}}}",
        json(id),
        json(directory)
    )
}

/// The directory of the location in the body of a creation. No parser: openwork writes it, and tests
/// write it plainly.
fn directory_of(body: &str) -> Option<String> {
    let (_, rest) = body.split_once("\"location\"")?;
    let (_, rest) = rest.split_once("\"directory\"")?;
    let (_, rest) = rest.split_once('"')?;
    let mut directory = String::new();
    let mut characters = rest.chars();
    loop {
        match characters.next()? {
            '"' => return Some(directory),
            '\\' => directory.push(characters.next()?),
            c => directory.push(c),
        }
    }
}

fn echo<R: io::BufRead>(
    method: &str,
    request: &Request,
    body: &mut Body<'_, R>,
    stream: &TcpStream,
) -> io::Result<Next> {
    if method == "HEAD" {
        return head(stream, "200 OK", "Content-Length: 1000\r\n").map(|()| Next::KeepAlive);
    }
    let mut bytes = Vec::new();
    body.read_to_end(&mut bytes)?;
    let headers = json_list(&request.headers, |(name, value)| format!("[{},{}]", json(name), json(value)));
    let echo = format!(
        "{{\"method\":{},\"target\":{},\"headers\":{headers},\"length\":{},\"body\":{}}}",
        json(&request.method),
        json(&request.target),
        bytes.len(),
        json(&String::from_utf8_lossy(&bytes)),
    );
    ok(stream, JSON, echo.as_bytes())
}

fn no_content(stream: &TcpStream) -> io::Result<Next> {
    nothing(stream, "204 No Content")
}

/// A reply without a body.
fn nothing(stream: &TcpStream, status: &str) -> io::Result<Next> {
    let length = if status.starts_with("204") { "" } else { "Content-Length: 0\r\n" };
    head(stream, status, length)?;
    Ok(Next::KeepAlive)
}

/// A failure without a body.
fn defect(stream: &TcpStream) -> io::Result<Next> {
    reply(stream, "500 Internal Server Error", "", b"")?;
    Ok(Next::Close)
}
