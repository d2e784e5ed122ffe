//! A fake `opencode` 1.18 for the tests. It uses only std, so the harness compiles it with `rustc` alone.
//!
//! It answers like the real opencode, according to measurements: Basic auth on every route; one instance per directory,
//! loaded by any request for it (even the request to dispose it); the directory comes from the query, else from the
//! header, else from the working directory, and need not exist. It also has routes and misbehaviour for the tests.
//!
//! While the file `burn` exists, it uses the processor.
//!
//! `FAKE_*` variables control its behaviour, and `KEY=VALUE` lines in `$FAKE_OPENCODE_DIR/behaviour`, which are read at
//! each start and take precedence.
//!
//! | key | effect |
//! |---|---|
//! | `FAKE_VERSION` | the version that it reports; with 2.x it behaves like that line (`fake_opencode2.rs`) |
//! | `FAKE_START_MS` | waits this long before it listens |
//! | `FAKE_NEVER_LISTEN` | never listens |
//! | `FAKE_NEVER_HEALTHY` | listens, but the health call hangs |
//! | `FAKE_HANG_FILE` | no request is answered while this file exists (else `$FAKE_OPENCODE_DIR/hang`) |
//! | `FAKE_AUTH=reject` | answers 401 to any password |
//! | `FAKE_HINT` | an interim reply precedes each 401 by 100 ms |
//! | `FAKE_FAIL=/path` | answers 500 on this path |
//! | `FAKE_CRASH_ON_START=CODE` | prints 30 lines and exits with CODE |
//! | `FAKE_CRASH_FIRST=N` | the same with CODE 1, but only at the first N starts |
//! | `FAKE_EXIT_WHEN_READY` | exits with 3 when asked for all events, which openwork does once it is ready |
//! | `FAKE_IGNORE_TERM` | ignores every TERM |
//! | `FAKE_SWALLOW_TERM` | ignores the first TERM, as opencode does while it installs a plugin |
//! | `FAKE_GRANDCHILD` | leaves a `sleep` in its own session, like the agent's shells |
//! | `FAKE_FLOOD_LOG=BYTES` | prints this much before it listens |
//! | `FAKE_FLOODS=N` | N times after it listens, prints 11 MB and waits until its log is truncated |
//! | `FAKE_PRINT_MS` | prints a line at this interval, from its start on |
//! | `FAKE_AGENT=COMMAND` | the first start runs this in a shell in its own session, like the agent |
//! | `FAKE_MEMORY=BYTES` | uses this much memory |
//! | `FAKE_CLIENT_EXIT=CODE` | the exit status of `attach` and `run` |
//! | `FAKE_LOAD_MS` | loading an instance takes this long |
//! | `FAKE_POISON=DIR` | prints a line and exits with 7 half-way through loading this directory (also: the lines of `$FAKE_OPENCODE_DIR/poison`) |
//! | `FAKE_ONE_REQUEST` | closes a connection instead of answering a second request on it |
//! | `FAKE_BUSY=DIR` | a session runs there (also: the lines of `$FAKE_OPENCODE_DIR/busy`) |
//!
//! While `$FAKE_OPENCODE_DIR/hold` exists, it does not begin to listen; while `hold-disposals` exists, no disposal ends;
//! while `hold-memory` exists, FAKE_MEMORY has no effect. The lines of `answers`, each a path and a body, replace its
//! replies on these paths; with the body `fails`, the reply is a 500.
//!
//! It records in `$FAKE_OPENCODE_DIR`, a line each: `versions` (calls of `--version`),
//! `starts` (JSON: pid, port, argv, cwd), `clients` (`attach` and `run`: pid, argv, cwd),
//! `requests` (JSON: method, directory, target, authorized, number of the connection), `unanswered` (targets
//! of `FAKE_ONE_REQUEST`), `hangs` (targets that it keeps waiting),
//! `loadings` (directories whose loading has begun), `instances` (`load DIR`, `dispose DIR`),
//! `streams` (`open TARGET`, `close TARGET`), `signals` (`TERM`),
//! `grandchildren` (pids), `floods` (`cut` or `not cut`), and `env-<pid>`, the environment it was started
//! or called with.

#[path = "fake_opencode2.rs"]
mod v2;

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{exit, Command};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

fn main() {
    let argv: Vec<String> = std::env::args().skip(1).collect();
    let settings = Settings::load();
    match argv.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--version"] => {
            settings.record("versions", &std::process::id().to_string());
            let name = if settings.is_v2() { "opencode v" } else { "" };
            println!("{name}{}", settings.version());
        }
        ["serve", "--service"] if settings.is_v2() => v2::serve_users(&argv, settings),
        ["service", verb] if settings.is_v2() => v2::service(verb, &settings),
        ["serve", ..] => serve(&argv, settings),
        ["attach" | "run", ..] | ["--server", ..] => {
            settings.record_process("clients", &argv, "");
            println!("fake: {}", argv.join(" "));
            exit(settings.number("FAKE_CLIENT_EXIT").unwrap_or(0) as i32);
        }
        _ => {
            eprintln!("fake opencode: unknown arguments {argv:?}");
            exit(1);
        }
    }
}

// --- Settings and records ---

struct Settings {
    values: HashMap<String, String>,
    dir: Option<PathBuf>,
}

impl Settings {
    fn load() -> Settings {
        let dir = std::env::var_os("FAKE_OPENCODE_DIR").map(PathBuf::from);
        let mut values: HashMap<String, String> =
            std::env::vars().filter(|(key, _)| key.starts_with("FAKE_")).collect();
        let file = dir.as_ref().and_then(|dir| fs::read_to_string(dir.join("behaviour")).ok());
        for line in file.iter().flat_map(|text| text.lines()) {
            if let Some((key, value)) = line.split_once('=') {
                values.insert(key.to_owned(), value.to_owned());
            }
        }
        Settings { values, dir }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.text(key).map(|text| text.parse().unwrap_or_else(|_| panic!("{key}={text} is not a number")))
    }

    fn version(&self) -> &str {
        self.text("FAKE_VERSION").unwrap_or("1.18.33")
    }

    fn is_v2(&self) -> bool {
        self.version().starts_with("2.")
    }

    fn file(&self, name: &str) -> Option<PathBuf> {
        self.dir.as_ref().map(|dir| dir.join(name))
    }

    /// Appends one line. A single write to a file opened for appending, so that lines of several
    /// processes do not mix.
    fn record(&self, name: &str, line: &str) {
        if let Some(path) = self.file(name) {
            let mut file = OpenOptions::new().create(true).append(true).open(path).expect("a record file");
            file.write_all(format!("{line}\n").as_bytes()).expect("writing a record");
        }
    }

    /// Appends a record of this process as JSON, and saves its environment.
    fn record_process(&self, name: &str, argv: &[String], more: &str) {
        let pid = std::process::id();
        let cwd = std::env::current_dir().expect("a working directory").display().to_string();
        if let Some(path) = self.file(&format!("env-{pid}")) {
            let environ = fs::read("/proc/self/environ").expect("its own environment");
            fs::write(path, environ).expect("recording the environment");
        }
        let argv = json_list(argv, |arg| json(arg));
        self.record(name, &format!("{{\"pid\":{pid},{more}\"argv\":{argv},\"cwd\":{}}}", json(&cwd)));
    }

    /// The number of starts so far, including this one.
    fn starts(&self) -> u64 {
        let text = self.file("starts").and_then(|path| fs::read_to_string(path).ok());
        text.map_or(1, |text| text.lines().count() as u64)
    }

    /// The reply that a test has set for this path.
    fn answer(&self, path: &str) -> Option<String> {
        let answers = self.file("answers").and_then(|file| fs::read_to_string(file).ok())?;
        answers.lines().find_map(|line| line.strip_prefix(path)?.strip_prefix(' ').map(str::to_owned))
    }

    fn is_hanging(&self) -> bool {
        let file = self.text("FAKE_HANG_FILE").map(PathBuf::from).or_else(|| self.file("hang"));
        file.is_some_and(|path| path.exists())
    }

    /// The directories in which sessions run, set by a test.
    fn busy_directories(&self) -> Vec<String> {
        let file = self.file("busy").and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        self.text("FAKE_BUSY").into_iter().chain(file.lines()).map(str::to_owned).collect()
    }

    /// Ends the turn in a directory; returns whether one ran.
    fn unbusy(&self, directory: &str) -> bool {
        let Some((path, text)) = self.file("busy").and_then(|path| Some((path.clone(), fs::read_to_string(path).ok()?)))
        else {
            return false;
        };
        let left: Vec<&str> = text.lines().filter(|line| *line != directory).collect();
        fs::write(path, left.iter().map(|line| format!("{line}\n")).collect::<String>()).expect("the busy file");
        left.len() < text.lines().count()
    }

    fn is_busy(&self, directory: &str) -> bool {
        self.lists("busy", "FAKE_BUSY", directory)
    }

    /// Ends the running session in this directory.
    fn end_turn(&self, directory: &str) {
        let Some(path) = self.file("busy") else { return };
        let busy = fs::read_to_string(&path).unwrap_or_default();
        let rest: String = busy.lines().filter(|line| *line != directory).map(|line| format!("{line}\n")).collect();
        fs::write(path, rest).expect("writing who is busy");
    }

    /// Whether a directory is a line of this file, or the value of this variable.
    fn lists(&self, file: &str, key: &str, directory: &str) -> bool {
        let file = self.file(file).and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        self.text(key) == Some(directory) || file.lines().any(|line| line == directory)
    }
}

fn json(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn session(id: &str, title: &str, directory: &str, updated: u64) -> String {
    format!(
        "{{\"id\":\"{id}\",\"title\":{},\"directory\":{},\"time\":{{\"created\":1,\"updated\":{updated}}}}}",
        json(title),
        json(directory),
    )
}

fn json_list<T>(items: &[T], item: impl Fn(&T) -> String) -> String {
    format!("[{}]", items.iter().map(item).collect::<Vec<_>>().join(","))
}

// --- Starting ---

fn serve(argv: &[String], settings: Settings) {
    let option = |name: &str| {
        let at = argv.iter().position(|arg| arg == name)?;
        argv.get(at + 1).cloned()
    };
    let hostname = option("--hostname").unwrap_or_else(|| "127.0.0.1".to_owned());
    let port: u16 = option("--port").and_then(|port| port.parse().ok()).unwrap_or(4096);
    settings.record_process("starts", argv, &format!("\"port\":{port},"));
    let settings = Arc::new(settings);
    catch_term(&settings);
    misbehave_before_listening(&settings);

    let listener = TcpListener::bind((hostname.as_str(), port)).unwrap_or_else(|_| {
        // The exact message of 1.18.33 about a taken port.
        eprintln!("\x1b[91m\x1b[1mError: \x1b[0mUnexpected error\n\nServeError");
        exit(1);
    });
    if settings.is_v2() {
        println!("server listening on http://{hostname}:{port}");
        return v2::serve(settings, listener, v2::password());
    }
    println!("opencode server listening on http://{hostname}:{port}");
    misbehave_while_listening(&settings);

    let password = std::env::var("OPENCODE_SERVER_PASSWORD").ok();
    let username = std::env::var("OPENCODE_SERVER_USERNAME").unwrap_or_else(|_| "opencode".to_owned());
    let server = Arc::new(Server {
        settings,
        cwd: std::env::current_dir().expect("a working directory").display().to_string(),
        authorization: password.map(|password| format!("Basic {}", base64(&format!("{username}:{password}")))),
        instances: Mutex::default(),
        deaf: Arc::default(),
    });
    let deaf = Arc::clone(&server.deaf);
    accept(listener, &deaf, move |stream| converse(&*server, stream));
}

/// Serves each connection in its own thread. Once it is deaf, it lives on without listening.
fn accept(listener: TcpListener, deaf: &AtomicBool, serve: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static) {
    let serve = Arc::new(serve);
    for stream in listener.incoming().flatten() {
        if deaf.load(Ordering::SeqCst) {
            break;
        }
        let serve = Arc::clone(&serve);
        thread::spawn(move || {
            // A client that disconnects does not affect the others.
            let _ = serve(stream);
        });
    }
    drop(listener);
    loop {
        thread::park();
    }
}

fn misbehave_before_listening(settings: &Arc<Settings>) {
    let burning = Arc::clone(settings);
    thread::spawn(move || loop {
        match burning.file("burn").is_some_and(|path| path.exists()) {
            true => (0..1_000_000).for_each(|n| _ = std::hint::black_box(n)),
            false => thread::sleep(Duration::from_millis(20)),
        }
    });
    if let Some(ms) = settings.number("FAKE_PRINT_MS") {
        thread::spawn(move || loop {
            println!("fake: at work");
            thread::sleep(Duration::from_millis(ms));
        });
    }
    if settings.has("FAKE_GRANDCHILD") {
        let child = Command::new("setsid").args(["sleep", "1000"]).spawn().expect("starting setsid");
        settings.record("grandchildren", &child.id().to_string());
    }
    if let Some(bytes) = settings.number("FAKE_FLOOD_LOG") {
        let line = format!("fake: {}\n", "x".repeat(93));
        let mut stdout = io::stdout().lock();
        for _ in 0..bytes.div_ceil(line.len() as u64) {
            stdout.write_all(line.as_bytes()).expect("writing to the log");
        }
    }
    let boom = |code: u64| {
        for n in 1..=30 {
            eprintln!("fake: boom line {n}");
        }
        exit(code as i32);
    };
    if let Some(code) = settings.number("FAKE_CRASH_ON_START") {
        boom(code);
    }
    if settings.number("FAKE_CRASH_FIRST").is_some_and(|n| settings.starts() <= n) {
        boom(1);
    }
    if let Some(ms) = settings.number("FAKE_START_MS") {
        thread::sleep(Duration::from_millis(ms));
    }
    while settings.has("FAKE_NEVER_LISTEN") {
        thread::park();
    }
    while settings.file("hold").is_some_and(|path| path.exists()) {
        thread::sleep(Duration::from_millis(5));
    }
}

fn misbehave_while_listening(settings: &Arc<Settings>) {
    if let Some(command) = settings.text("FAKE_AGENT").filter(|_| settings.starts() == 1) {
        let child = Command::new("setsid").args(["sh", "-c", command]).spawn().expect("starting setsid");
        settings.record("grandchildren", &child.id().to_string());
    }
    if let Some(bytes) = settings.number("FAKE_MEMORY") {
        let hold = settings.file("hold-memory");
        thread::spawn(move || {
            while hold.as_ref().is_some_and(|path| path.exists()) {
                thread::sleep(Duration::from_millis(5));
            }
            // Other than zero, or the kernel does not give it.
            std::mem::forget(vec![1u8; bytes as usize]);
        });
    }
    if let Some(floods) = settings.number("FAKE_FLOODS") {
        let settings = Arc::clone(settings);
        thread::spawn(move || flood(&settings, floods));
    }
}

/// Fills the log until it is truncated, `FAKE_FLOODS` times.
fn flood(settings: &Settings, floods: u64) {
    const FILL: usize = 11_000_000;
    let log = fs::File::open("/proc/self/fd/1").expect("its own log");
    let size = || log.metadata().expect("the size of the log").len();
    for _ in 0..floods {
        let line = format!("fake: {}\n", "y".repeat(93));
        let mut stdout = io::stdout().lock();
        for _ in 0..FILL.div_ceil(line.len()) {
            stdout.write_all(line.as_bytes()).expect("writing to the log");
        }
        drop(stdout);
        // Sooner than a probe looks at it.
        let cut = (0..500).any(|_| {
            thread::sleep(Duration::from_millis(10));
            size() < FILL as u64 / 2
        });
        settings.record("floods", if cut { "cut" } else { "not cut" });
    }
}

/// Where the signal handler writes a byte, since it may do little else.
static TERM_PIPE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_term(_: i32) {
    unsafe { write(TERM_PIPE.load(Ordering::SeqCst), b"T".as_ptr(), 1) };
}

unsafe extern "C" {
    fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
    fn write(fd: i32, bytes: *const u8, count: usize) -> isize;
}

fn catch_term(settings: &Arc<Settings>) {
    const SIGINT: i32 = 2;
    const SIGTERM: i32 = 15;
    let (mut reader, writer) = UnixStream::pair().expect("a pair of sockets");
    TERM_PIPE.store(writer.as_raw_fd(), Ordering::SeqCst);
    std::mem::forget(writer);
    unsafe { signal(SIGTERM, on_term) };
    if settings.is_v2() {
        unsafe { signal(SIGINT, on_term) };
    }
    let settings = Arc::clone(settings);
    thread::spawn(move || {
        for count in 1.. {
            reader.read_exact(&mut [0]).expect("the signal pipe");
            settings.record("signals", "TERM");
            let swallowed = settings.has("FAKE_SWALLOW_TERM") && count == 1;
            if !swallowed && !settings.has("FAKE_IGNORE_TERM") {
                if !settings.is_v2() {
                    exit(0);
                }
                v2::unregister();
                thread::sleep(Duration::from_millis(settings.number("FAKE_STOP_MS").unwrap_or(0)));
                exit(130);
            }
        }
    });
}

// --- Serving ---

struct Server {
    settings: Arc<Settings>,
    cwd: String,
    /// The header that it requires; none without a password.
    authorization: Option<String>,
    instances: Mutex<Instances>,
    /// It lives on without listening.
    deaf: Arc<AtomicBool>,
}

#[derive(Default)]
struct Instances {
    loaded: BTreeSet<String>,
    streams: Vec<Subscription>,
}

struct Subscription {
    /// None for `/global/event`, which outlives the instances.
    directory: Option<String>,
    /// An event, or None: the stream ends.
    events: mpsc::Sender<Option<String>>,
}

struct Request {
    method: String,
    target: String,
    headers: Vec<(String, String)>,
}

impl Request {
    /// None at the end of the connection.
    fn read(reader: &mut impl BufRead) -> io::Result<Option<Request>> {
        let mut lines = Vec::new();
        loop {
            let mut line = Vec::new();
            if reader.read_until(b'\n', &mut line)? == 0 {
                return Ok(None);
            }
            let line = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
            match line.is_empty() {
                true if lines.is_empty() => continue,
                true => break,
                false => lines.push(line),
            }
        }
        let mut words = lines[0].split(' ');
        let mut word = || words.next().unwrap_or_default().to_owned();
        let (method, target) = (word(), word());
        let headers = lines[1..].iter().filter_map(|line| line.split_once(':'));
        let headers = headers.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect();
        Ok(Some(Request { method, target, headers }))
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    fn is(&self, name: &str, value: &str) -> bool {
        self.header(name).is_some_and(|header| header.eq_ignore_ascii_case(value))
    }

    fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    fn query(&self, name: &str) -> Option<String> {
        let (_, query) = self.target.split_once('?')?;
        let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let decode = |text: &str| percent_decode(&text.replace('+', " "));
        pairs.find(|(key, _)| decode(key) == name).map(|(_, value)| decode(value))
    }

    fn number(&self, name: &str) -> u64 {
        self.query(name).and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    /// The directory it is about: query, header, working directory, in this order.
    fn directory(&self, cwd: &str) -> String {
        let key = if self.path().starts_with("/api/") { "location[directory]" } else { "directory" };
        let header = || self.header("x-opencode-directory").map(percent_decode);
        // Like the real opencode, decode the query once more than usual, except for `/api`.
        let query = self.query(key).map(|value| if key == "directory" { percent_decode(&value) } else { value });
        query.or_else(header).unwrap_or_else(|| cwd.to_owned())
    }
}

/// The body of a request, read as the length or the chunks say.
struct Body<'a, R: BufRead> {
    reader: &'a mut R,
    chunked: bool,
    /// Of the body, or of the chunk.
    left: u64,
    ended: bool,
}

impl<'a, R: BufRead> Body<'a, R> {
    fn of(request: &Request, reader: &'a mut R) -> Body<'a, R> {
        let chunked = request.is("transfer-encoding", "chunked");
        let left = request.header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
        Body { reader, chunked, left: if chunked { 0 } else { left }, ended: !chunked && left == 0 }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    fn next_chunk(&mut self) -> io::Result<()> {
        let size = self.line()?;
        let size = size.split(';').next().unwrap_or_default();
        self.left = u64::from_str_radix(size, 16).map_err(|_| io::Error::other("a bad chunk size"))?;
        if self.left == 0 {
            self.ended = true;
            while !self.line()?.is_empty() {}
        }
        Ok(())
    }
}

impl<R: BufRead> Read for Body<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.ended && self.chunked && self.left == 0 {
            self.next_chunk()?;
        }
        if self.ended || buffer.is_empty() {
            return Ok(0);
        }
        let wanted = buffer.len().min(self.left as usize);
        let count = self.reader.read(&mut buffer[..wanted])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        if self.left == 0 {
            match self.chunked {
                true => self.ended = self.line().is_err(),
                false => self.ended = true,
            }
        }
        Ok(count)
    }
}

/// Whether the connection takes another request.
enum Next {
    KeepAlive,
    Close,
}

const JSON: &str = "application/json";

/// Counts the connections.
static NEXT_CONNECTION: AtomicU64 = AtomicU64::new(1);

/// A server of either line.
trait Serves {
    fn settings(&self) -> &Settings;

    /// Where the request acts.
    fn directory(&self, request: &Request) -> String;

    fn authorizes(&self, request: &Request) -> bool;

    fn unauthorized(&self, stream: &TcpStream) -> io::Result<Next>;

    fn route(&self, request: &Request, reader: &mut BufReader<TcpStream>, stream: &TcpStream) -> io::Result<Next>;
}

/// Serves the requests of a connection. Like the real opencode, it keeps every connection open.
fn converse(server: &impl Serves, stream: TcpStream) -> io::Result<()> {
    let settings = server.settings();
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let connection = NEXT_CONNECTION.fetch_add(1, Ordering::SeqCst);
    let mut is_first = true;
    while let Some(request) = Request::read(&mut reader)? {
        if !is_first && settings.has("FAKE_ONE_REQUEST") {
            settings.record("unanswered", &request.target);
            break;
        }
        is_first = false;
        if settings.is_hanging() {
            settings.record("hangs", &request.target);
        }
        while settings.is_hanging() {
            thread::sleep(Duration::from_millis(20));
        }
        let authorized = server.authorizes(&request);
        settings.record(
            "requests",
            &format!(
                "{{\"method\":{},\"directory\":{},\"target\":{},\"authorized\":{authorized},\"connection\":{connection}}}",
                json(&request.method),
                json(&server.directory(&request)),
                json(&request.target),
            ),
        );
        if request.is("expect", "100-continue") {
            (&stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let next = match authorized {
            true if settings.answer(request.path()).is_some() => {
                match settings.answer(request.path()).unwrap_or_default().as_str() {
                    "fails" => server_error(&stream)?,
                    page if page.starts_with('<') => ok(&stream, "text/html", page.as_bytes())?,
                    body => ok(&stream, JSON, body.as_bytes())?,
                }
            }
            true => server.route(&request, &mut reader, &stream)?,
            false => server.unauthorized(&stream)?,
        };
        if matches!(next, Next::Close) {
            break;
        }
    }
    stream.shutdown(Shutdown::Both)
}

impl Serves for Server {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn directory(&self, request: &Request) -> String {
        request.directory(&self.cwd)
    }

    fn authorizes(&self, request: &Request) -> bool {
        // Like the real opencode, accept a ticket instead of credentials only here.
        if request.path() == "/pty/x/connect" && request.query("ticket").as_deref() == Some("good") {
            return true;
        }
        let wanted = self.authorization.as_deref();
        self.settings.text("FAKE_AUTH") != Some("reject")
            && (wanted.is_none() || request.header("authorization") == wanted)
    }

    /// Closes, since it leaves the body unread.
    fn unauthorized(&self, mut stream: &TcpStream) -> io::Result<Next> {
        if self.settings.text("FAKE_HINT").is_some() {
            stream.write_all(b"HTTP/1.1 103 Early Hints\r\n\r\n")?;
            thread::sleep(Duration::from_millis(100));
        }
        let challenge = "www-authenticate: Basic realm=\"Secure Area\"\r\n";
        reply(stream, "401 Unauthorized", challenge, b"")?;
        Ok(Next::Close)
    }

    fn route(&self, request: &Request, reader: &mut BufReader<TcpStream>, stream: &TcpStream) -> io::Result<Next> {
        let directory = request.directory(&self.cwd);
        let is_global = request.path().starts_with("/global/");
        if self.settings.text("FAKE_FAIL") == Some(request.path()) || (!is_global && Path::new(&directory).is_file()) {
            return server_error(stream);
        }
        if !is_global {
            self.load(&directory);
        }
        let mut body = Body::of(request, reader);
        let next = match (request.method.as_str(), request.path()) {
            ("GET", "/global/health") => {
                while self.settings.has("FAKE_NEVER_HEALTHY") {
                    thread::park();
                }
                let health = format!("{{\"healthy\":true,\"version\":{}}}", json(self.settings.version()));
                ok(stream, JSON, health.as_bytes())
            }
            ("POST", "/global/dispose") => {
                self.dispose_all();
                ok(stream, JSON, b"true")
            }
            ("GET", "/global/event") if self.settings.has("FAKE_EXIT_WHEN_READY") => leave(),
            ("GET", "/global/event") => self.events(request, None, stream),
            ("GET", "/event") => self.events(request, Some(directory), stream),
            ("GET", "/path") => {
                let home = std::env::var("HOME").unwrap_or_default();
                let path = format!(
                    "{{\"home\":{},\"state\":{},\"config\":{},\"worktree\":\"/\",\"directory\":{}}}",
                    json(&home),
                    json(&format!("{home}/.local/state/opencode")),
                    json(&format!("{home}/.config/opencode")),
                    json(&directory),
                );
                ok(stream, JSON, path.as_bytes())
            }
            ("GET", "/session/status") => {
                let busy = self.settings.is_busy(&directory);
                ok(stream, JSON, if busy { br#"{"ses_fake":{"type":"busy"}}"# } else { b"{}" })
            }
            ("GET", "/session/ses_fake") => {
                let session = session("ses_fake", "mend {it}", &directory, 1_700_000_000_000);
                ok(stream, JSON, session.as_bytes())
            }
            ("GET", "/session") => {
                let old = session("ses_old", "", &directory, 1_800_000_000_000);
                let running = session("ses_fake", "mend {it}", &directory, 1_700_000_000_000);
                ok(stream, JSON, format!("[{old},{running}]").as_bytes())
            }
            ("GET", path) if path.starts_with("/session/") => {
                let content_type = format!("Content-Type: {JSON}\r\n");
                // 1.18 answers so to any id that does not start with `ses`.
                let (status, name) = match path.starts_with("/session/ses") {
                    true => ("404 Not Found", "NotFoundError"),
                    false => ("500 Internal Server Error", "UnknownError"),
                };
                let body = format!("{{\"name\":\"{name}\",\"data\":{{}}}}");
                reply(stream, status, &content_type, body.as_bytes()).map(|()| Next::KeepAlive)
            }
            ("POST", "/session/ses_fake/prompt_async") => {
                // Like the real opencode, report busy at each step.
                let info = session("ses_fake", "mend {it}", &directory, 1_700_000_000_000);
                self.publish(&directory, "session.updated", &format!("{{\"sessionID\":\"ses_fake\",\"info\":{info}}}"));
                let status = "{\"sessionID\":\"ses_fake\",\"status\":{\"type\":\"busy\"}}";
                self.publish(&directory, "session.status", status);
                self.publish(&directory, "session.status", status);
                self.settings.record("busy", &directory);
                ok(stream, JSON, b"true")
            }
            ("POST", "/session/ses_fake/abort") => {
                self.settings.end_turn(&directory);
                let error = "{\"name\":\"MessageAbortedError\",\"data\":{\"message\":\"Aborted\"}}";
                self.publish(&directory, "session.error", &format!("{{\"sessionID\":\"ses_fake\",\"error\":{error}}}"));
                let status = "{\"sessionID\":\"ses_fake\",\"status\":{\"type\":\"idle\"}}";
                self.publish(&directory, "session.status", status);
                self.publish(&directory, "session.idle", "{\"sessionID\":\"ses_fake\"}");
                ok(stream, JSON, b"true")
            }
            ("POST", "/session") => {
                self.publish(&directory, "session.created", "{}");
                ok(stream, JSON, format!("{{\"id\":\"ses_fake\",\"directory\":{}}}", json(&directory)).as_bytes())
            }
            ("POST", "/instance/dispose") => {
                self.dispose(&directory);
                ok(stream, JSON, b"true")
            }
            ("HEAD", "/echo") => head(stream, "200 OK", "Content-Length: 1000\r\n").map(|()| Next::KeepAlive),
            (_, "/echo") => {
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
            ("POST", "/upload") => {
                let count = io::copy(&mut body, &mut io::sink())?;
                ok(stream, JSON, format!("{{\"bytes\":{count}}}").as_bytes())
            }
            ("GET", "/download") => download(stream, request.number("bytes")),
            (_, "/slow") => {
                thread::sleep(Duration::from_millis(request.number("ms")));
                ok(stream, JSON, b"true")
            }
            ("GET", "/chunked") => chunked_with_trailers(stream),
            ("POST", "/leave") => leave(),
            (_, "/die-first") => return Ok(Next::Close),
            (_, "/die-mid") => die_mid(stream),
            (_, "/to-end") => to_end(stream),
            (_, "/close-after") => close_after(stream),
            (_, "/two-replies") => two_replies(stream),
            ("POST", "/stop-listening") => {
                self.deaf.store(true, Ordering::SeqCst);
                // So that it is looked at.
                let _ = TcpStream::connect(stream.local_addr()?);
                ok(stream, JSON, b"true")
            }
            ("GET", "/interim") => interim(stream, request.number("count")),
            ("POST", "/raw") => return raw(stream, &request.query("reply").unwrap_or_default()),
            ("GET", "/long-head") => long_head(stream, request.number("bytes")),
            ("GET", "/pty/x/connect") if request.is("upgrade", "websocket") => {
                return tunnel(&mut body.reader, stream);
            }
            _ => ok(stream, "text/html", b"<!doctype html>\n<html lang=\"en\"></html>\n"),
        };
        let next = next?;
        io::copy(&mut body, &mut io::sink())?;
        Ok(next)
    }
}

impl Server {
    fn load(&self, directory: &str) {
        if !self.instances.lock().expect("the instances").loaded.contains(directory) {
            self.settings.record("loadings", directory);
            let half = Duration::from_millis(self.settings.number("FAKE_LOAD_MS").unwrap_or(0) / 2);
            thread::sleep(half);
            if self.settings.lists("poison", "FAKE_POISON", directory) {
                eprintln!("fake: plugin of {directory} ends the process");
                exit(7);
            }
            thread::sleep(half);
        }
        let mut instances = self.instances.lock().expect("the instances");
        if instances.loaded.insert(directory.to_owned()) {
            self.settings.record("instances", &format!("load {directory}"));
        }
    }

    fn dispose(&self, directory: &str) {
        while self.settings.file("hold-disposals").is_some_and(|path| path.exists()) {
            thread::sleep(Duration::from_millis(5));
        }
        self.publish(directory, "server.instance.disposed", &format!("{{\"directory\":{}}}", json(directory)));
        let mut instances = self.instances.lock().expect("the instances");
        instances.loaded.remove(directory);
        self.settings.record("instances", &format!("dispose {directory}"));
        instances.streams.retain(|stream| {
            let ends = stream.directory.as_deref() == Some(directory);
            if ends {
                let _ = stream.events.send(None);
            }
            !ends
        });
    }

    /// Tells the streams of this directory, and those of all.
    fn publish(&self, directory: &str, kind: &str, properties: &str) {
        let payload = format!("{{\"id\":\"evt_fake\",\"type\":\"{kind}\",\"properties\":{properties}}}");
        let of_all = format!("{{\"directory\":{},\"project\":\"global\",\"payload\":{payload}}}", json(directory));
        let mut instances = self.instances.lock().expect("the instances");
        // A subscriber that cannot be reached has disconnected.
        instances.streams.retain(|stream| match &stream.directory {
            None => stream.events.send(Some(of_all.clone())).is_ok(),
            Some(of) if of == directory => stream.events.send(Some(payload.clone())).is_ok(),
            Some(_) => true,
        });
    }

    fn dispose_all(&self) {
        let loaded = self.instances.lock().expect("the instances").loaded.clone();
        for directory in loaded {
            self.dispose(&directory);
        }
    }

    /// Server-sent events, until the instance is disposed or the client goes away.
    fn events(&self, request: &Request, directory: Option<String>, stream: &TcpStream) -> io::Result<Next> {
        const HEARTBEAT: Duration = Duration::from_secs(10);
        let is_global = directory.is_none();
        let (events, received) = mpsc::channel();
        {
            let mut instances = self.instances.lock().expect("the instances");
            instances.streams.push(Subscription { directory, events: events.clone() });
        }
        let mut gone = stream.try_clone()?;
        thread::spawn(move || {
            let _ = io::copy(&mut gone, &mut io::sink());
            let _ = events.send(None);
        });
        let simple = |kind: &str| {
            let payload = format!("{{\"id\":\"evt_fake\",\"type\":\"{kind}\",\"properties\":{{}}}}");
            if is_global {
                format!("{{\"payload\":{payload}}}")
            } else {
                payload
            }
        };
        self.settings.record("streams", &format!("open {}", request.target));
        let sent = (|| {
            head(stream, "200 OK", "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n")?;
            let mut event = simple("server.connected");
            loop {
                chunk(stream, format!("data: {event}\n\n").as_bytes())?;
                event = match received.recv_timeout(HEARTBEAT) {
                    Ok(Some(event)) => event,
                    Err(RecvTimeoutError::Timeout) => simple("server.heartbeat"),
                    Ok(None) | Err(RecvTimeoutError::Disconnected) => return chunk(stream, b""),
                }
            }
        })();
        self.settings.record("streams", &format!("close {}", request.target));
        sent.map(|()| Next::Close)
    }
}

fn leave() -> ! {
    eprintln!("fake: leaving");
    exit(3);
}

// --- Replies ---

fn head(mut stream: &TcpStream, status: &str, headers: &str) -> io::Result<()> {
    stream.write_all(format!("HTTP/1.1 {status}\r\nVary: Origin\r\n{headers}\r\n").as_bytes())
}

fn reply(mut stream: &TcpStream, status: &str, headers: &str, body: &[u8]) -> io::Result<()> {
    head(stream, status, &format!("{headers}Content-Length: {}\r\n", body.len()))?;
    stream.write_all(body)
}

fn ok(stream: &TcpStream, content_type: &str, body: &[u8]) -> io::Result<Next> {
    reply(stream, "200 OK", &format!("Content-Type: {content_type}\r\n"), body)?;
    Ok(Next::KeepAlive)
}

fn server_error(stream: &TcpStream) -> io::Result<Next> {
    let body = br#"{"name":"UnknownError","data":{"message":"Unexpected server error.","ref":"err_fake"}}"#;
    reply(stream, "500 Internal Server Error", "Content-Type: application/json\r\n", body)?;
    Ok(Next::Close)
}

/// One chunk; an empty one is the last.
fn chunk(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(format!("{:x}\r\n", bytes.len()).as_bytes())?;
    stream.write_all(bytes)?;
    stream.write_all(b"\r\n")
}

fn download(mut stream: &TcpStream, bytes: u64) -> io::Result<Next> {
    head(stream, "200 OK", &format!("Content-Type: application/octet-stream\r\nContent-Length: {bytes}\r\n"))?;
    io::copy(&mut io::repeat(b'd').take(bytes), &mut stream)?;
    Ok(Next::KeepAlive)
}

fn chunked_with_trailers(mut stream: &TcpStream) -> io::Result<Next> {
    head(stream, "200 OK", "Transfer-Encoding: chunked\r\nTrailer: x-parts\r\n")?;
    chunk(stream, b"one ")?;
    chunk(stream, b"two ")?;
    stream.write_all(b"0\r\nx-parts: 2\r\n\r\n")?;
    Ok(Next::KeepAlive)
}

/// Many interim replies of 1 KiB, and then the reply.
fn interim(mut stream: &TcpStream, count: u64) -> io::Result<Next> {
    for number in 0..count {
        write!(stream, "HTTP/1.1 103 Early Hints\r\nLink: <{number}{}>\r\n\r\n", "x".repeat(1000))?;
    }
    ok(stream, JSON, b"true")
}

/// These bytes instead of a reply.
fn raw(mut stream: &TcpStream, bytes: &str) -> io::Result<Next> {
    stream.write_all(bytes.as_bytes())?;
    Ok(Next::Close)
}

/// A reply with a header of this length.
fn long_head(stream: &TcpStream, bytes: u64) -> io::Result<Next> {
    reply(stream, "200 OK", &format!("X-Long: {}\r\n", "l".repeat(bytes as usize)), b"true")?;
    Ok(Next::Close)
}

fn die_mid(mut stream: &TcpStream) -> io::Result<Next> {
    head(stream, "200 OK", "Content-Length: 10\r\n")?;
    stream.write_all(b"half ")?;
    Ok(Next::Close)
}

/// A reply that ends with the connection.
fn to_end(mut stream: &TcpStream) -> io::Result<Next> {
    head(stream, "200 OK", "Content-Type: text/plain\r\n")?;
    stream.write_all(b"to the end")?;
    Ok(Next::Close)
}

/// A whole reply, and then the end of the connection without notice.
fn close_after(stream: &TcpStream) -> io::Result<Next> {
    ok(stream, JSON, b"\"the last\"")?;
    Ok(Next::Close)
}

/// A reply, followed by one that no request asked for.
fn two_replies(mut stream: &TcpStream) -> io::Result<Next> {
    let one = |text: &str| format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len());
    stream.write_all((one("asked") + &one("not asked")).as_bytes())?;
    Ok(Next::KeepAlive)
}

/// Switches protocols and sends back whatever comes, until the client ends its side.
fn tunnel(reader: &mut impl Read, mut stream: &TcpStream) -> io::Result<Next> {
    let headers = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: fake\r\n";
    head(stream, "101 Switching Protocols", headers)?;
    io::copy(reader, &mut stream)?;
    Ok(Next::Close)
}

// --- Encodings ---

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let code = text.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (bytes[at], code) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn base64(text: &str) -> String {
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
