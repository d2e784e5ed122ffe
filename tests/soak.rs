//! The soak: several workers run commands of every kind while daemon and opencode are killed at random.
//! `just soak`, or
//! `OPENWORK_SOAK_MINUTES=0.5 cargo test --release --test soak -- --nocapture --test-threads=1`.
//!
//! `OPENWORK_SOAK_SEED` repeats the choices of a run, though not its timing. With `OPENWORK_TEST_OPENCODE`
//! the soak runs against that opencode, otherwise against the fake.
//!
//! Every worker owns its workspaces, so it knows their state in the registry: an acknowledged change holds;
//! a change that was cut off may have been made or not, until the worker sees which. A command may fail only
//! if a process that it needs was disturbed while it ran.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{ErrorKind, Read};
use std::iter::repeat;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

#[allow(dead_code, unused_imports)] // parts that only other tests need
#[path = "support/mod.rs"]
mod support;

use support::http::NoReply;
use support::{DEADLINE, FILES, Host, Process, Reply, Request, STATE, Signal, is_alive, local, poll, wait_gone};

// --- Dimensions ---

/// The workers, which run at the same time.
const WORKERS: usize = 5;
/// The workspaces of each worker.
const LOCALS: usize = 9;
const REMOTES: usize = 3;
/// A round: first a storm that kills both processes, then a part in which the daemon lives and is measured.
const ROUND: Duration = Duration::from_secs(150);
const STORM: f64 = 0.65;
/// The longest pause of a worker between commands. Milliseconds.
const PAUSE: u64 = 30;
/// The time between two checkpoints.
const CHECKPOINT: Duration = Duration::from_secs(20);
/// How long after the end of an opencode calls to it may fail: the daemon has to notice first.
const OPENCODE_SLACK: Duration = Duration::from_secs(2);
/// The longest command: it waits for a start of opencode; nothing else takes long.
const SLOWEST: Duration = Duration::from_secs(25);
/// How long after its client has gone a request may still be executed.
const LATE: Duration = Duration::from_secs(5);
/// A stop takes 10 s at worst.
const LONGEST_STOP: Duration = Duration::from_secs(11);
/// After this many violations the soak stops.
const VIOLATIONS: usize = 12;

/// How much more a settled daemon may use late than early. Descriptors: one by chance, the idle connections to
/// opencode that it keeps for some seconds, and two to its control plane, of three descriptors each.
const MORE_DESCRIPTORS: usize = 1 + 8 + 2 * 3;
/// One by chance, and the second thread that the gate, the control plane and the checks of directories each keep.
const MORE_THREADS: usize = 1 + 3;
const MORE_MEMORY_KB: usize = 1024;

/// The crashes, spread over these adds, and the threads that add.
const CRASHES: usize = 200;
const ADDS: usize = 500;
const ADDERS: usize = 4;

fn setting<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// The seed, printed before anything else.
fn seed(test: &str) -> u64 {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let seed = setting("OPENWORK_SOAK_SEED").unwrap_or_else(now);
    println!("{test}: seed {seed}");
    seed
}

/// The command that repeats the run.
fn again(test: &str, seed: u64, minutes: Option<f64>) -> String {
    let mut command = format!("OPENWORK_SOAK_SEED={seed} ");
    if let Some(minutes) = minutes {
        command += &format!("OPENWORK_SOAK_MINUTES={minutes} ");
        if let Ok(opencode) = std::env::var("OPENWORK_TEST_OPENCODE") {
            command += &format!("OPENWORK_TEST_OPENCODE={opencode} ");
        }
    }
    format!("{command}cargo test --release --test soak -- --nocapture {test}")
}

/// Random numbers, the same for the same seed (splitmix64).
struct Chance(u64);

impl Chance {
    /// One of several independent streams of a seed.
    fn of(seed: u64, stream: u64) -> Chance {
        let mut chance = Chance(seed ^ stream.wrapping_mul(0xd134_2543_de82_ef95));
        chance.next();
        chance
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

// --- Commands and requests ---

/// The outcome of a command or a request.
#[derive(Debug)]
enum Outcome {
    /// Exit status 0, or 2xx: acknowledged.
    Done(Value),
    /// Any other status, with the error code.
    Refused { code: String, said: String },
    /// Sent, but without a reply.
    Lost(String),
    /// Not sent: nothing listened.
    Nobody,
}

/// A host, and the environment of its commands.
struct Machine<'a> {
    host: &'a Host,
    env: Vec<(&'static str, OsString)>,
}

impl<'a> Machine<'a> {
    fn new(host: &'a Host, more: &[&'static str]) -> Machine<'a> {
        const NAMES: [&str; 13] = [
            "PATH",
            "HOME",
            "FAKE_OPENCODE_DIR",
            "OPENWORK_DATA_DIR",
            "OPENWORK_OPENCODE_BIN",
            "OPENWORK_DAEMON_PORT",
            "OPENWORK_OPENCODE_PORT",
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
        ];
        let env = NAMES.iter().chain(more).map(|name| (*name, host.get(name).into())).collect();
        Machine { host, env }
    }

    /// Runs a command with `--json`; `killed_after` kills it early. (The harness would keep the output of
    /// every command, which is too much here.)
    fn command(&self, args: &[&str], killed_after: Option<Duration>) -> Outcome {
        let mut child = Command::new(self.host.binary())
            .arg("--json")
            .args(args)
            .current_dir(self.host.home())
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("spawning openwork");
        let mut pipe = child.stdout.take().unwrap();
        let stdout = thread::spawn(move || {
            let mut text = String::new();
            let _ = pipe.read_to_string(&mut text);
            text
        });
        if let Some(after) = killed_after {
            thread::sleep(after);
            let _ = child.kill();
        }
        let Some(status) = poll(DEADLINE, || child.try_wait().unwrap()) else {
            let _ = child.kill();
            let _ = child.wait();
            return Outcome::Lost(format!("did not end within {DEADLINE:?}"));
        };
        let (stdout, mut stderr) = (stdout.join().unwrap(), String::new());
        let _ = child.stderr.take().unwrap().read_to_string(&mut stderr);
        if stderr.contains("panicked at") {
            return Outcome::Refused { code: "a panic".to_owned(), said: stderr };
        }
        match (status.code(), serde_json::from_str::<Value>(&stdout)) {
            (None, _) => Outcome::Lost("killed".to_owned()),
            (Some(0), Ok(value)) => Outcome::Done(value),
            (Some(_), Ok(value)) => Outcome::of_error(&value),
            (Some(code), Err(_)) => Outcome::Refused { code: format!("exit {code}"), said: stdout + &stderr },
        }
    }

    fn http(&self, method: &str, target: &str, body: Option<Value>, credentials: bool) -> Outcome {
        let Some(request) = self.request(method, target, body, credentials) else { return Outcome::Nobody };
        let reply = match request.send() {
            Ok(reply) => reply,
            Err(NoReply::NotConnected(_)) => return Outcome::Nobody,
            Err(cut_off) => return Outcome::Lost(cut_off.to_string()),
        };
        let body = reply.whole_body().unwrap_or_default();
        match serde_json::from_slice::<Value>(&body) {
            Ok(value) if (200..300).contains(&reply.status) => Outcome::Done(value),
            // `/health` answers with 503 while opencode is not ready.
            Ok(value) if target == "/health" && value.get("error").is_none() => Outcome::Done(value),
            Ok(value) => Outcome::of_error(&value),
            Err(_) => {
                let said = String::from_utf8_lossy(&body).into_owned();
                Outcome::Refused { code: format!("status {}", reply.status), said }
            }
        }
    }

    /// `None` if the lock file names no daemon.
    fn request(&self, method: &str, target: &str, body: Option<Value>, credentials: bool) -> Option<Request> {
        let (_, port) = self.host.lock_text()?;
        let mut request = Request::new(local(port), method, target).header("Connection", "close");
        if credentials {
            request = request.header("Authorization", self.host.credentials());
        }
        if method != "GET" {
            request = request.header("Content-Type", "application/json");
        }
        Some(match body {
            Some(body) => request.json(&body),
            None => request,
        })
    }

    /// Keeps a stream of events open for this long.
    fn events(&self, target: &str, credentials: bool, hold: Duration) -> Outcome {
        let request = self.request("GET", target, None, credentials);
        let Some(mut stream) = request.and_then(|request| request.open().ok()) else { return Outcome::Nobody };
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        let mut until = None;
        loop {
            let rest = until.map_or(DEADLINE, |until: Instant| until.saturating_duration_since(Instant::now()));
            stream.set_read_timeout(Some(rest.max(Duration::from_millis(1)))).unwrap();
            match stream.read(&mut buffer) {
                Ok(count @ 1..) => bytes.extend(&buffer[..count]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) && until.is_some() => {
                    return Outcome::Done(Value::Null);
                }
                Ok(0) | Err(_) => return Outcome::Lost("the stream has ended".to_owned()),
            }
            let Some(reply) = Reply::parse(&bytes) else { continue };
            if reply.status != 200 {
                let error = reply.whole_body().and_then(|body| serde_json::from_slice(&body).ok());
                match error {
                    Some(value) => return Outcome::of_error(&value),
                    None => continue,
                }
            }
            until = until.or(Some(Instant::now() + hold));
        }
    }

    /// The processes of this host: pid, arguments and marker.
    fn processes(&self) -> Vec<Running> {
        Process::all_of(&self.host.home()).into_iter().map(Running::from).collect()
    }

    /// `None` if the process does not belong to this host.
    fn running(&self, pid: u32) -> Option<Running> {
        Process::of(pid).filter(|process| process.has_home(&self.host.home())).map(Running::from)
    }

    /// Signals a process of this host, if `is_it` accepts it. The pidfd is opened first, so the pid cannot
    /// have been reused.
    fn signal(&self, pid: u32, is_it: impl Fn(&Running) -> bool, signal: Signal) -> bool {
        let Some(pid_) = Pid::from_raw(pid as i32) else { return false };
        let Ok(pidfd) = pidfd_open(pid_, PidfdFlags::empty()) else { return false };
        self.running(pid).is_some_and(|running| is_it(&running)) && pidfd_send_signal(&pidfd, signal).is_ok()
    }

    fn signal_daemon(&self, signal: Signal) -> Option<u32> {
        let (pid, _) = self.host.lock_text()?;
        self.signal(pid, Running::is_daemon, signal).then_some(pid)
    }

    /// The opencode in the state file: pid and marker.
    fn opencode(&self) -> Option<(u32, String)> {
        let state: Value = serde_json::from_slice(&fs::read(self.host.file(STATE)).ok()?).ok()?;
        Some((state["opencode"]["pid"].as_u64()? as u32, state["opencode"]["engineId"].as_str()?.to_owned()))
    }

    /// The pid of a ready and living opencode.
    fn ready_opencode(&self) -> Option<u32> {
        let Outcome::Done(health) = self.http("GET", "/health", None, false) else { return None };
        let pid = health["opencode"]["pid"].as_u64()? as u32;
        is_alive(pid).then_some(pid)
    }

    /// The processes with this marker.
    fn family(&self, engine: &str) -> Vec<Running> {
        self.processes().into_iter().filter(|running| running.engine.as_deref() == Some(engine)).collect()
    }
}

impl Outcome {
    fn of_error(value: &Value) -> Outcome {
        let code = value["error"]["code"].as_str().unwrap_or("?").to_owned();
        Outcome::Refused { code, said: value.to_string() }
    }
}

#[derive(Clone, Debug)]
struct Running {
    pid: u32,
    argv: Vec<String>,
    engine: Option<String>,
}

impl From<Process> for Running {
    fn from(process: Process) -> Running {
        let engine = process.variable("OPENWORK_ENGINE").map(str::to_owned);
        Running { pid: process.pid, argv: process.argv, engine }
    }
}

impl Running {
    fn is_daemon(&self) -> bool {
        // Started by a command, or by its predecessor at a restart.
        self.argv.iter().any(|arg| arg == "__daemon" || arg == "__successor")
    }

    fn is_opencode(&self) -> bool {
        self.engine.is_some() && self.argv.get(1).is_some_and(|arg| arg == "serve")
    }
}

// --- Observations ---

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    Daemon,
    Opencode,
}

/// A disturbance of a process: a kill, a stop, a restart.
struct Disturbance {
    to: Needs,
    /// `None` while it lasts.
    end: Option<Instant>,
}

#[derive(Default)]
struct Figures {
    /// The count of each command, and the slowest.
    commands: BTreeMap<&'static str, (usize, Duration)>,
    /// The count of each disturbance.
    done: BTreeMap<&'static str, usize>,
    /// The count of each permitted failure.
    cut_off: BTreeMap<(&'static str, String), usize>,
    slowest: Option<(Duration, String)>,
    checkpoints: usize,
    /// The longest time until the children of a killed opencode were gone.
    slowest_sweep: Duration,
    /// Measurements of one daemon: early, late, and the commands between them.
    vitals: Vec<(Vitals, Vitals, usize)>,
}

/// The resources of a daemon.
#[derive(Clone, Copy, Debug)]
struct Vitals {
    pid: u32,
    memory_kb: usize,
    descriptors: usize,
    threads: usize,
}

impl Vitals {
    fn of(pid: u32) -> Option<Vitals> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
        Some(Vitals { pid, memory_kb: field("VmRSS:")?, descriptors, threads: field("Threads:")? })
    }

    /// The resources once descriptors and threads have been constant for 3 s: idle threads stay for 2 s.
    fn settled(pid: u32) -> Option<Vitals> {
        let mut before = Vitals::of(pid)?;
        let mut same = 0;
        poll(Duration::from_secs(20), || {
            thread::sleep(Duration::from_millis(200));
            let now = Vitals::of(pid)?;
            let is_same = (now.descriptors, now.threads) == (before.descriptors, before.threads);
            same = if is_same { same + 1 } else { 0 };
            before = now;
            (same >= 15).then_some(now)
        })
    }
}

impl fmt::Display for Vitals {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} KB, {} descriptors, {} threads", self.memory_kb, self.descriptors, self.threads)
    }
}

struct Soak<'a> {
    machine: Machine<'a>,
    is_fake: bool,
    begin: Instant,
    /// Held for reading by every command, and for writing by a checkpoint.
    quiet: RwLock<()>,
    disturbances: Mutex<Vec<Disturbance>>,
    figures: Mutex<Figures>,
    violations: Mutex<Vec<String>>,
    /// The latest commands and disturbances.
    recent: Mutex<VecDeque<String>>,
    done: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Soak<'a> {
    fn new(machine: Machine<'a>, is_fake: bool) -> Soak<'a> {
        Soak {
            machine,
            is_fake,
            begin: Instant::now(),
            quiet: RwLock::default(),
            disturbances: Mutex::default(),
            figures: Mutex::default(),
            violations: Mutex::default(),
            recent: Mutex::default(),
            done: AtomicBool::new(false),
        }
    }

    fn is_done(&self) -> bool {
        self.done.load(Ordering::Relaxed)
    }

    fn note(&self, line: &str) {
        const KEPT: usize = 400;
        let mut recent = lock(&self.recent);
        if recent.len() == KEPT {
            recent.pop_front();
        }
        let line: String = line.chars().take(400).collect();
        recent.push_back(format!("{:9.3} {line}", self.begin.elapsed().as_secs_f64()));
    }

    fn violation(&self, what: String) {
        let what = format!("{:.3} s: {what}", self.begin.elapsed().as_secs_f64());
        self.note(&format!("VIOLATION {what}"));
        println!("VIOLATION {what}");
        let recent: Vec<_> = lock(&self.recent).iter().rev().take(40).rev().cloned().collect();
        println!("  {}", recent.join("\n  "));
        let mut violations = lock(&self.violations);
        violations.push(what);
        if violations.len() >= VIOLATIONS {
            self.done.store(true, Ordering::Relaxed);
        }
    }

    /// Whether a needed process was disturbed since then.
    fn was_disturbed(&self, needs: Needs, since: Instant) -> bool {
        lock(&self.disturbances).iter().any(|Disturbance { to, end }| match to {
            Needs::Daemon => end.is_none_or(|end| end >= since),
            Needs::Opencode => needs == *to && end.is_none_or(|end| end + OPENCODE_SLACK >= since),
        })
    }

    /// Disturbs a process.
    fn disturb<T>(&self, what: &'static str, to: Needs, act: impl FnOnce() -> T) -> T {
        self.note(&format!("BEGIN {what}"));
        let index = {
            let mut disturbances = lock(&self.disturbances);
            disturbances.push(Disturbance { to, end: None });
            disturbances.len() - 1
        };
        let result = act();
        lock(&self.disturbances)[index].end = Some(Instant::now());
        *lock(&self.figures).done.entry(what).or_default() += 1;
        self.note(&format!("END {what}"));
        result
    }

    /// Counts a command, and reports a violation if its failure is not permitted.
    fn judge(&self, name: &'static str, text: &str, needs: Needs, since: Instant, outcome: &Outcome) {
        let took = since.elapsed();
        {
            let mut figures = lock(&self.figures);
            let (count, slowest) = figures.commands.entry(name).or_default();
            *count += 1;
            *slowest = took.max(*slowest);
            if figures.slowest.as_ref().is_none_or(|(slowest, _)| took > *slowest) {
                figures.slowest = Some((took, text.to_owned()));
            }
        }
        let short = match outcome {
            Outcome::Done(_) => "done".to_owned(),
            other => format!("{other:?}"),
        };
        self.note(&format!("{text} [{} ms] {short}", took.as_millis()));
        if took > SLOWEST {
            self.violation(format!("{text} took {took:?}"));
        }
        let (code, said) = match outcome {
            Outcome::Done(_) => return,
            Outcome::Nobody => ("nobody there".to_owned(), String::new()),
            Outcome::Lost(how) => ("cut off".to_owned(), how.clone()),
            Outcome::Refused { code, said } => (code.clone(), said.clone()),
        };
        let is_of_opencode = code.starts_with("opencode_");
        let disturbed = match needs {
            // The daemon answers whatever opencode does.
            Needs::Daemon => self.was_disturbed(Needs::Daemon, since),
            Needs::Opencode if is_of_opencode || matches!(outcome, Outcome::Lost(_)) => {
                self.was_disturbed(Needs::Opencode, since)
            }
            Needs::Opencode => self.was_disturbed(Needs::Daemon, since),
        };
        let may_be = match outcome {
            Outcome::Nobody => true,
            Outcome::Lost(_) => disturbed,
            Outcome::Refused { .. } => {
                // Not `daemon_unresponsive`: a daemon that is killed or stops does so at once.
                const ABOUT_PROCESSES: [&str; 2] = ["daemon_not_running", "daemon_start_failed"];
                disturbed && (is_of_opencode || ABOUT_PROCESSES.contains(&code.as_str()))
            }
            Outcome::Done(_) => true,
        };
        if !may_be {
            self.violation(format!("{text} failed after {took:?} without a disturbance: {code} {said}"));
        }
        *lock(&self.figures).cut_off.entry((name, code)).or_default() += 1;
    }
}

// --- Workers ---

/// A workspace of a worker.
struct Entry {
    /// A path, or a base URL.
    place: String,
    is_local: bool,
    id: String,
    /// The possible states: absent, or present with a name. A single one when the state is known.
    may_be: Vec<Option<String>>,
    /// States that an abandoned request may still bring about, and since when.
    late: Vec<(Option<String>, Instant)>,
}

impl Entry {
    fn new(place: String, is_local: bool) -> Entry {
        let digest = sha1_smol::Sha1::from(&place).digest().to_string();
        Entry { id: format!("ws-{}", &digest[..12]), place, is_local, may_be: vec![None], late: Vec::new() }
    }

    fn is_present(&self) -> bool {
        !self.may_be.contains(&None)
    }

    fn is_absent(&self) -> bool {
        self.may_be == [None]
    }

    /// A change was requested without a reply.
    fn also(&mut self, other: Option<String>) {
        self.late.push((other.clone(), Instant::now()));
        if !self.may_be.contains(&other) {
            self.may_be.push(other);
        }
    }

    /// A change was acknowledged, or its result was seen.
    fn is_now(&mut self, state: Option<String>) {
        self.late.retain(|(late, since)| *late != state && since.elapsed() < LATE);
        self.may_be = vec![state];
        self.may_be.extend(self.late.iter().map(|(late, _)| late.clone()));
    }

    /// The workspace was seen to be present, under some name.
    fn is_some(&mut self) {
        let is_late = self.late.iter().any(|(late, since)| late.is_none() && since.elapsed() < LATE);
        self.may_be.retain(|state| state.is_some() || is_late);
    }

    /// The workspace was seen in this state. An impossible state is an error.
    fn seen(&mut self, found: Option<&str>) -> Result<(), String> {
        let found = found.map(str::to_owned);
        let before = self.may_be.clone();
        self.is_now(found.clone());
        match before.contains(&found) {
            true => Ok(()),
            false => Err(format!("{} {} is {found:?}; acknowledged is {before:?}", self.id, self.place)),
        }
    }
}

/// The names in a registry, by id.
fn listed(list: &Value) -> BTreeMap<String, String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let workspaces = list["workspaces"].as_array().into_iter().flatten();
    workspaces.map(|workspace| (text(&workspace["id"]), text(&workspace["name"]))).collect()
}

struct Worker<'a, 'b> {
    soak: &'a Soak<'b>,
    number: usize,
    chance: Chance,
    entries: Vec<Entry>,
    names: usize,
}

impl<'a, 'b> Worker<'a, 'b> {
    fn new(soak: &'a Soak<'b>, number: usize, seed: u64) -> Worker<'a, 'b> {
        let local = |k| soak.machine.host.project(format!("w{number}-{k}")).to_str().unwrap().to_owned();
        let remote = |k| format!("https://w{number}-{k}.example");
        let locals = (0..LOCALS).map(|k| Entry::new(local(k), true));
        let remotes = (0..REMOTES).map(|k| Entry::new(remote(k), false));
        let entries = locals.chain(remotes).collect();
        Worker { soak, number, chance: Chance::of(seed, number as u64 + 1), entries, names: 0 }
    }

    /// Runs a command or request, and judges its outcome.
    fn ask(
        &mut self,
        name: &'static str,
        needs: Needs,
        text: String,
        ask: impl FnOnce(&Machine) -> Outcome,
    ) -> Outcome {
        let since = Instant::now();
        let outcome = ask(&self.soak.machine);
        let expected = matches!(&outcome, Outcome::Refused { code, .. } if code == "workspace_not_found");
        let counted = if expected { &Outcome::Done(Value::Null) } else { &outcome };
        self.soak.judge(name, &format!("w{} {text}", self.number), needs, since, counted);
        outcome
    }

    fn command(&mut self, name: &'static str, needs: Needs, args: &[&str]) -> Outcome {
        let text = format!("openwork {}", args.join(" "));
        self.ask(name, needs, text, |machine| machine.command(args, None))
    }

    fn http(&mut self, name: &'static str, needs: Needs, method: &str, target: &str, body: Option<Value>) -> Outcome {
        let credentials = target.starts_with("/w/");
        let text = format!("{method} {target} {}", body.as_ref().map(Value::to_string).unwrap_or_default());
        self.ask(name, needs, text, |machine| machine.http(method, target, body, credentials))
    }

    fn new_name(&mut self) -> String {
        self.names += 1;
        format!("w{}-{}", self.number, self.names)
    }

    fn saw(&mut self, at: usize, found: Option<&str>, by: &str) {
        if let Err(what) = self.entries[at].seen(found) {
            self.soak.violation(format!("w{} {by}: {what}", self.number));
        }
    }

    /// One random action of a user.
    fn act(&mut self) {
        let at = self.chance.below(self.entries.len() as u64) as usize;
        let local = self.chance.below(LOCALS as u64) as usize;
        let over_http = self.chance.percent(45);
        match self.chance.below(100) {
            0..24 => self.add(at, over_http),
            24..38 => self.remove(at, over_http),
            38..48 => self.rename(at, over_http),
            48..54 => self.switch(at, over_http),
            54..62 => self.list(over_http),
            62..70 => self.info(at, over_http),
            70..78 => self.path(local, over_http),
            78..83 => self.dispose(local, over_http),
            83..90 => self.call(local, over_http),
            90..94 => self.stream(local),
            94..97 => self.status(over_http),
            97..99 => self.instances(over_http),
            _ => self.killed_add(at),
        }
    }

    fn selector(&mut self, at: usize) -> String {
        let Entry { id, place, is_local, .. } = &self.entries[at];
        if *is_local && self.chance.percent(30) { place.clone() } else { id.clone() }
    }

    fn target(&mut self, at: usize, tail: &str) -> String {
        format!("/workspaces/{}{tail}", self.selector(at).replace('/', "%2F"))
    }

    fn add(&mut self, at: usize, over_http: bool) {
        let (place, is_local) = (self.entries[at].place.clone(), self.entries[at].is_local);
        let name = self.new_name();
        let outcome = match (over_http, is_local) {
            (false, true) => self.command("add", Needs::Daemon, &["workspace", "add", &place, "--name", &name]),
            (false, false) => self.command("add", Needs::Daemon, &["workspace", "add-remote", &place, "--name", &name]),
            (true, true) => self.http(
                "POST /workspaces",
                Needs::Daemon,
                "POST",
                "/workspaces",
                Some(json!({"path": place, "name": name})),
            ),
            (true, false) => {
                let body = json!({"baseUrl": place, "name": name});
                self.http("POST /workspaces", Needs::Daemon, "POST", "/workspaces/remote", Some(body))
            }
        };
        match outcome {
            Outcome::Done(added) => {
                let (was_present, number) = (self.entries[at].is_present(), self.number);
                let workspace = &added["workspace"];
                if workspace["id"] != self.entries[at].id.as_str() || workspace["name"] != name.as_str() {
                    self.soak.violation(format!("w{number} adding {place} as {name}: {added}"));
                }
                if was_present && added["created"] == true {
                    self.soak.violation(format!("w{number} an acknowledged add was lost: {place} is created again"));
                }
                self.entries[at].is_now(Some(name));
            }
            Outcome::Nobody => {}
            Outcome::Refused { .. } | Outcome::Lost(_) => self.entries[at].also(Some(name)),
        }
    }

    /// An add whose command is killed.
    fn killed_add(&mut self, at: usize) {
        let Entry { place, is_local, .. } = &self.entries[at];
        if !is_local {
            return;
        }
        let (place, name) = (place.clone(), self.new_name());
        let after = Duration::from_micros(self.chance.below(12_000));
        let args = ["workspace", "add", &place, "--name", &name];
        let outcome = self.soak.machine.command(&args, Some(after));
        self.soak.note(&format!("w{} killed add {place} {name}", self.number));
        *lock(&self.soak.figures).done.entry("kill -9 of a command").or_default() += 1;
        match outcome {
            Outcome::Done(_) => self.entries[at].is_now(Some(name)),
            _ => self.entries[at].also(Some(name)),
        }
    }

    fn remove(&mut self, at: usize, over_http: bool) {
        let since = Instant::now();
        let outcome = if over_http {
            let target = self.target(at, "");
            self.http("DELETE /workspaces", Needs::Daemon, "DELETE", &target, None)
        } else {
            let selector = self.selector(at);
            self.command("remove", Needs::Daemon, &["workspace", "remove", &selector])
        };
        match outcome {
            Outcome::Done(_) => {
                if self.entries[at].is_absent() {
                    self.soak.violation(format!(
                        "w{} an acknowledged remove was lost: {}",
                        self.number, self.entries[at].place
                    ));
                }
                self.entries[at].is_now(None);
            }
            // The client repeated a remove that had succeeded before it was cut off.
            Outcome::Refused { code, .. }
                if code == "workspace_not_found" && self.soak.was_disturbed(Needs::Daemon, since) =>
            {
                if self.entries[at].is_present() {
                    *lock(&self.soak.figures)
                        .cut_off
                        .entry(("remove", "done, but reported as not found".to_owned()))
                        .or_default() += 1;
                }
                self.entries[at].is_now(None);
            }
            Outcome::Refused { code, .. } if code == "workspace_not_found" => self.saw(at, None, "remove"),
            Outcome::Nobody => {}
            Outcome::Refused { .. } | Outcome::Lost(_) => self.entries[at].also(None),
        }
    }

    fn rename(&mut self, at: usize, over_http: bool) {
        let name = self.new_name();
        let outcome = if over_http {
            let target = self.target(at, "");
            self.http("PATCH /workspaces", Needs::Daemon, "PATCH", &target, Some(json!({"name": name})))
        } else {
            let selector = self.selector(at);
            self.command("rename", Needs::Daemon, &["workspace", "rename", &selector, &name])
        };
        match outcome {
            Outcome::Done(_) => {
                if self.entries[at].is_absent() {
                    self.soak
                        .violation(format!("w{} what was removed is renamed: {}", self.number, self.entries[at].place));
                }
                self.entries[at].is_now(Some(name));
            }
            Outcome::Refused { code, .. } if code == "workspace_not_found" => self.saw(at, None, "rename"),
            Outcome::Nobody => {}
            Outcome::Refused { .. } | Outcome::Lost(_) => self.entries[at].also(Some(name)),
        }
    }

    /// Checks a reply about one workspace against its possible states.
    fn read(&mut self, at: usize, outcome: &Outcome, by: &str) {
        match outcome {
            Outcome::Done(reply) => {
                let name = reply["workspace"]["name"].as_str().map(str::to_owned);
                self.saw(at, name.as_deref(), by);
            }
            Outcome::Refused { code, .. } if code == "workspace_not_found" => self.saw(at, None, by),
            Outcome::Refused { .. } | Outcome::Lost(_) | Outcome::Nobody => {}
        }
    }

    fn switch(&mut self, at: usize, over_http: bool) {
        let outcome = if over_http {
            let target = self.target(at, "/activate");
            self.http("POST …/activate", Needs::Daemon, "POST", &target, None)
        } else {
            let selector = self.selector(at);
            self.command("switch", Needs::Daemon, &["workspace", "switch", &selector])
        };
        self.read(at, &outcome, "switch");
    }

    fn info(&mut self, at: usize, over_http: bool) {
        let outcome = if over_http {
            let target = self.target(at, "");
            self.http("GET /workspaces/:id", Needs::Daemon, "GET", &target, None)
        } else {
            let selector = self.selector(at);
            self.command("info", Needs::Daemon, &["workspace", "info", &selector])
        };
        self.read(at, &outcome, "info");
    }

    fn list(&mut self, over_http: bool) {
        let outcome = match over_http {
            true => self.http("GET /workspaces", Needs::Daemon, "GET", "/workspaces", None),
            false => self.command("list", Needs::Daemon, &["workspace", "list"]),
        };
        if let Outcome::Done(list) = outcome {
            self.compare(&listed(&list), "list");
        }
    }

    /// Checks a list of the registry against the possible states.
    fn compare(&mut self, listed: &BTreeMap<String, String>, by: &str) {
        for at in 0..self.entries.len() {
            let found = listed.get(&self.entries[at].id).cloned();
            self.saw(at, found.as_deref(), by);
        }
    }

    fn path(&mut self, at: usize, over_http: bool) {
        let outcome = if over_http {
            let target = self.target(at, "/path");
            self.http("GET …/path", Needs::Opencode, "GET", &target, None)
        } else {
            let selector = self.selector(at);
            self.command("path", Needs::Opencode, &["workspace", "path", &selector])
        };
        self.read(at, &outcome, "path");
        if let Outcome::Done(reply) = outcome {
            self.is_directory(at, &reply["path"]);
        }
    }

    /// Checks that opencode got the right directory.
    fn is_directory(&self, at: usize, path: &Value) {
        if path["directory"] != self.entries[at].place.as_str() {
            self.soak.violation(format!("w{} {} is routed to {path}", self.number, self.entries[at].place));
        }
    }

    fn dispose(&mut self, at: usize, over_http: bool) {
        let outcome = if over_http {
            let target = format!("/instances/{}/dispose", self.entries[at].id);
            self.http("POST …/dispose", Needs::Opencode, "POST", &target, None)
        } else {
            let selector = self.selector(at);
            self.command("dispose", Needs::Opencode, &["instance", "dispose", &selector])
        };
        self.read(at, &outcome, "dispose");
    }

    fn call(&mut self, at: usize, over_http: bool) {
        let id = self.entries[at].id.clone();
        let outcome = match (over_http, self.chance.percent(75)) {
            (true, true) => self.http("/w/ GET", Needs::Opencode, "GET", &format!("/w/{id}/path"), None),
            (false, true) => self.command("api GET", Needs::Opencode, &["api", &id, "/path"]),
            (true, false) => {
                self.http("/w/ POST", Needs::Opencode, "POST", &format!("/w/{id}/session"), Some(json!({})))
            }
            (false, false) => self.command("api POST", Needs::Opencode, &["api", &id, "/session", "-d", "{}"]),
        };
        match outcome {
            Outcome::Done(reply) => {
                // The output of the command has the status beside the body.
                self.is_directory(at, if over_http { &reply } else { &reply["body"] });
                if self.entries[at].is_absent() {
                    self.soak
                        .violation(format!("w{} what was removed is routed: {}", self.number, self.entries[at].place));
                }
                self.entries[at].is_some();
            }
            Outcome::Refused { code, .. } if code == "workspace_not_found" => self.saw(at, None, "a call"),
            Outcome::Refused { .. } | Outcome::Lost(_) | Outcome::Nobody => {}
        }
    }

    fn stream(&mut self, at: usize) {
        let hold = Duration::from_millis(self.chance.below(1200));
        if self.chance.percent(30) {
            self.ask("GET /events", Needs::Daemon, "GET /events".to_owned(), |machine| {
                machine.events("/events", false, hold)
            });
            return;
        }
        let target = format!("/w/{}/event", self.entries[at].id);
        let outcome = self
            .ask("/w/ stream", Needs::Opencode, format!("GET {target}"), |machine| machine.events(&target, true, hold));
        if matches!(outcome, Outcome::Refused { code, .. } if code == "workspace_not_found") {
            self.saw(at, None, "a stream");
        }
    }

    fn status(&mut self, over_http: bool) {
        let since = Instant::now();
        let outcome = match over_http {
            true => self.soak.machine.http("GET", "/health", None, false),
            false => self.soak.machine.command(&["status"], None),
        };
        // "Not running" is a valid answer.
        let none = matches!(&outcome, Outcome::Refused { code, .. } if code == "daemon_not_running");
        let counted = if none { &Outcome::Done(Value::Null) } else { &outcome };
        self.soak.judge("status", &format!("w{} status", self.number), Needs::Daemon, since, counted);
        if let Outcome::Done(health) = &outcome {
            if !health["daemon"]["pid"].is_u64() || !health["engine"]["phase"].is_string() {
                self.soak.violation(format!("w{} status: {health}", self.number));
            }
        }
    }

    fn instances(&mut self, over_http: bool) {
        let outcome = match over_http {
            true => self.http("GET /instances", Needs::Opencode, "GET", "/instances", None),
            false => self.command("instance list", Needs::Opencode, &["instance", "list"]),
        };
        if let Outcome::Done(list) = outcome {
            let listed: BTreeSet<_> = list["instances"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|instance| instance["workspace"]["id"].as_str())
                .map(str::to_owned)
                .collect();
            for at in 0..LOCALS {
                let name = self.entries[at]
                    .may_be
                    .iter()
                    .find(|may_be| may_be.is_some() == listed.contains(&self.entries[at].id));
                if name.is_none() {
                    self.soak.violation(format!("w{} instance list: {}: {list}", self.number, self.entries[at].place));
                }
            }
        }
    }
}

// --- Disturbances ---

impl Soak<'_> {
    fn kill_daemon(&self) {
        if self.machine.host.lock_text().is_none_or(|(pid, _)| !is_alive(pid)) {
            return;
        }
        self.disturb("kill -9 of the daemon", Needs::Daemon, || {
            if let Some(pid) = self.machine.signal_daemon(Signal::KILL) {
                wait_gone(pid);
            }
        });
    }

    fn kill_opencode(&self, watched: bool) {
        let Some((pid, engine)) = self.machine.opencode() else { return };
        if !is_alive(pid) {
            return;
        }
        let is_it = |running: &Running| running.engine.as_ref() == Some(&engine);
        let killed = self.disturb("kill -9 of opencode", Needs::Opencode, || {
            let killed = self.machine.signal(pid, is_it, Signal::KILL);
            if killed {
                wait_gone(pid);
            }
            killed
        });
        if killed && watched {
            self.is_swept(&engine, "kill -9 of opencode");
        }
    }

    /// Checks that the children of an opencode are gone soon. Needs a running daemon.
    fn is_swept(&self, engine: &str, after: &str) {
        let since = Instant::now();
        if poll(Duration::from_secs(10), || self.machine.family(engine).is_empty().then_some(())).is_none() {
            self.violation(format!("left by {after}: {:?}", self.machine.family(engine)));
        }
        let mut figures = lock(&self.figures);
        figures.slowest_sweep = figures.slowest_sweep.max(since.elapsed());
    }

    /// Runs a command, which must succeed.
    fn run(&self, name: &'static str, args: &[&str]) -> Option<Value> {
        let since = Instant::now();
        let outcome = self.machine.command(args, None);
        let took = since.elapsed();
        self.note(&format!("openwork {} [{} ms] {outcome:?}", args.join(" "), took.as_millis()));
        {
            let mut figures = lock(&self.figures);
            let (count, slowest) = figures.commands.entry(name).or_default();
            *count += 1;
            *slowest = took.max(*slowest);
        }
        // The fake is ready at once.
        if took > LONGEST_STOP && (args.contains(&"stop") || (self.is_fake && args.contains(&"restart"))) {
            self.violation(format!("openwork {} took {took:?}", args.join(" ")));
        }
        match outcome {
            Outcome::Done(value) => Some(value),
            other => {
                self.violation(format!("openwork {} after {took:?}: {other:?}", args.join(" ")));
                None
            }
        }
    }

    /// Checks that the same opencode is ready as before.
    fn is_kept(&self, before: Option<u32>, what: &str) {
        let Some(before) = before else { return };
        self.run("daemon start", &["daemon", "start"]);
        let after = self.machine.ready_opencode();
        if after != Some(before) {
            self.violation(format!("opencode was {before} before a {what}, and is {after:?}"));
        }
    }

    fn restart(&self, all: bool) {
        let before = self.machine.ready_opencode();
        if all {
            self.disturb("restart --all", Needs::Daemon, || {
                self.run("daemon restart", &["daemon", "restart", "--all"])
            });
            return;
        }
        self.disturb("restart", Needs::Daemon, || self.run("daemon restart", &["daemon", "restart"]));
        self.is_kept(before, "restart");
    }

    fn stop(&self, keep: bool) {
        let (before, engine) = (self.machine.ready_opencode(), self.machine.opencode());
        if keep {
            let args = ["daemon", "stop", "--keep-opencode"];
            self.disturb("stop --keep-opencode", Needs::Daemon, || self.run("daemon stop", &args));
            return self.is_kept(before, "stop --keep-opencode");
        }
        let stopped = self.disturb("stop", Needs::Daemon, || self.run("daemon stop", &["daemon", "stop"]));
        if let (Some(stopped), Some((_, engine))) = (stopped, engine) {
            let left = self.machine.family(&engine);
            if stopped["stopped"] == true && !left.is_empty() {
                self.violation(format!("left by `daemon stop`: {left:?}"));
            }
        }
    }

    /// One random disturbance.
    fn strike(&self, chance: &mut Chance) {
        match chance.below(100) {
            0..26 => self.kill_daemon(),
            26..52 => self.kill_opencode(false),
            52..62 => {
                // Both, in either order.
                if chance.percent(50) {
                    self.kill_opencode(false);
                    self.kill_daemon();
                } else {
                    self.kill_daemon();
                    self.kill_opencode(false);
                }
            }
            62..72 => {
                let before = self.machine.ready_opencode();
                self.kill_daemon();
                self.is_kept(before, "kill -9 of the daemon");
            }
            72..82 => self.restart(false),
            82..85 => self.restart(true),
            85..91 => self.stop(false),
            91..95 => self.stop(true),
            95..97 => {
                if self.machine.host.lock_text().is_some_and(|(pid, _)| is_alive(pid)) {
                    self.disturb("TERM to the daemon", Needs::Daemon, || {
                        if let Some(pid) = self.machine.signal_daemon(Signal::TERM) {
                            wait_gone(pid);
                        }
                    });
                }
            }
            _ => {
                // A daemon that is stopped for a moment loses nothing.
                if let Some(pid) = self.machine.signal_daemon(Signal::STOP) {
                    self.note("STOP of the daemon");
                    thread::sleep(Duration::from_millis(chance.below(400)));
                    self.machine.signal(pid, Running::is_daemon, Signal::CONT);
                    *lock(&self.figures).done.entry("STOP of the daemon for a moment").or_default() += 1;
                }
            }
        }
    }

    fn sleep_until(&self, until: Instant) {
        while Instant::now() < until && !self.is_done() {
            thread::sleep(until.saturating_duration_since(Instant::now()).min(Duration::from_millis(50)));
        }
    }

    /// Disturbs the processes for this long, with checkpoints in between.
    fn torment(&self, chance: &mut Chance, total: Duration, workers: &[Mutex<Worker>]) {
        let rounds = (total.as_secs_f64() / ROUND.as_secs_f64()).round().max(1.0);
        let round = total.div_f64(rounds);
        for number in 0..rounds as u32 {
            let begin = self.begin + round * number;
            let (storm_ends, ends) = (begin + round.mul_f64(STORM), begin + round);
            let mut checkpoint_at = Instant::now() + CHECKPOINT;
            while Instant::now() < storm_ends && !self.is_done() {
                self.strike(chance);
                let pause = if chance.percent(30) { chance.below(100) } else { chance.below(2500) };
                self.sleep_until((Instant::now() + Duration::from_millis(pause)).min(storm_ends));
                if Instant::now() >= checkpoint_at {
                    self.checkpoint(workers);
                    checkpoint_at = Instant::now() + CHECKPOINT;
                }
            }
            // From here on the daemon lives. Let it warm up first.
            self.checkpoint(workers);
            let calm = ends.saturating_duration_since(Instant::now());
            self.sleep_until(Instant::now() + calm / 4);
            let early = self.checkpoint(workers);
            let commands = || lock(&self.figures).commands.values().map(|(count, _)| count).sum::<usize>();
            let before = commands();
            let gap = ends.saturating_duration_since(Instant::now()) / 5;
            for _ in 0..4 {
                self.sleep_until(Instant::now() + gap);
                self.kill_opencode(true);
            }
            self.sleep_until(ends);
            let late = self.checkpoint(workers);
            if let (Some(early), Some(late)) = (early, late) {
                self.is_flat(early, late);
                let between = commands() - before;
                lock(&self.figures).vitals.push((early, late, between));
            }
            if self.is_done() {
                return;
            }
        }
        // The last round must not use more than the first.
        let vitals: Vec<_> = lock(&self.figures).vitals.iter().map(|(_, late, _)| *late).collect();
        if let (Some(first), Some(last)) = (vitals.first(), vitals.last()) {
            self.is_flat(Vitals { pid: last.pid, ..*first }, *last);
        }
    }

    fn is_flat(&self, early: Vitals, late: Vitals) {
        let flat = early.pid == late.pid
            && late.descriptors <= early.descriptors + MORE_DESCRIPTORS
            && late.threads <= early.threads + MORE_THREADS
            && late.memory_kb <= early.memory_kb + MORE_MEMORY_KB;
        if !flat {
            self.violation(format!("not steady: {early} (pid {}), then {late} (pid {})", early.pid, late.pid));
        }
    }

    /// Pauses every worker and checks everything. Returns the resources of the settled daemon.
    fn checkpoint(&self, workers: &[Mutex<Worker>]) -> Option<Vitals> {
        let _quiet = self.quiet.write().unwrap_or_else(PoisonError::into_inner);
        self.note("CHECKPOINT");
        self.run("daemon start", &["daemon", "start"])?;
        if let Some(list) = self.run("list", &["workspace", "list"]) {
            let listed = listed(&list);
            for worker in workers {
                lock(worker).compare(&listed, "checkpoint");
            }
            let is_listed = |entry: &&Entry| listed.contains_key(&entry.id);
            let ours = workers.iter().map(|worker| lock(worker).entries.iter().filter(is_listed).count());
            let problem = check_registry(&self.machine, &list, ours.sum());
            problem.into_iter().for_each(|problem| self.violation(problem));
        }
        let mut problem = None;
        poll(Duration::from_secs(10), || {
            problem = check_processes(&self.machine, self.is_fake);
            problem.is_none().then_some(())
        });
        problem.into_iter().chain(check_directory(self.machine.host)).for_each(|problem| self.violation(problem));
        let vitals = self.machine.host.lock_text().and_then(|(pid, _)| Vitals::settled(pid));
        if vitals.is_none() {
            self.violation("the daemon does not settle".to_owned());
        }
        let mut figures = lock(&self.figures);
        figures.checkpoints += 1;
        let at = self.begin.elapsed().as_secs();
        let commands = figures.commands.values().map(|(count, _)| count).sum::<usize>();
        println!(
            "{at:4} s  {commands:6} commands, daemon {}",
            vitals.map(|vitals| vitals.to_string()).unwrap_or_default()
        );
        vitals
    }
}

/// Checks that the state file is valid and matches the daemon's list.
fn check_registry(machine: &Machine, list: &Value, count: usize) -> Option<String> {
    let state: Value = match serde_json::from_slice(&fs::read(machine.host.file(STATE)).unwrap_or_default()) {
        Ok(state) => state,
        Err(e) => return Some(format!("the state file is invalid: {e}")),
    };
    let (on_disk, told) = (listed(&state), listed(list));
    let entries = list["workspaces"].as_array().map_or(0, Vec::len);
    let names: BTreeSet<_> = told.values().collect();
    let active = list["activeId"].as_str().unwrap_or("?");
    if state["version"] != 1 || on_disk != told {
        return Some(format!("the state file differs from the daemon's list: {state}, {list}"));
    }
    if entries != told.len() || entries != names.len() || entries != count {
        return Some(format!("expected {count} distinct workspaces: {list}"));
    }
    if !active.is_empty() && !told.contains_key(active) {
        return Some(format!("the active workspace does not exist: {list}"));
    }
    None
}

/// Checks that one daemon and one opencode run, and nothing else.
fn check_processes(machine: &Machine, is_fake: bool) -> Option<String> {
    let running = machine.processes();
    let daemons: Vec<u32> = running.iter().filter(|running| running.is_daemon()).map(|running| running.pid).collect();
    let opencodes: Vec<u32> =
        running.iter().filter(|running| running.is_opencode()).map(|running| running.pid).collect();
    let engines: BTreeSet<_> = running.iter().filter_map(|running| running.engine.clone()).collect();
    let others = running.iter().filter(|running| running.engine.is_none() && !running.is_daemon()).count();
    let (pid, engine) = machine.opencode().unwrap_or_default();
    let lock = machine.host.lock_text().map(|(pid, _)| pid);
    let right = daemons == Vec::from_iter(lock)
        && opencodes == [pid]
        && engines == BTreeSet::from([engine])
        && others == 0
        // The fake and its one grandchild.
        && (!is_fake || running.len() == 3);
    (!right).then(|| format!("there should be one daemon ({lock:?}) and one opencode ({pid}): {running:?}"))
}

/// Checks that the data directory has only its own files, all private.
fn check_directory(host: &Host) -> Option<String> {
    let mode = |path: &Path| fs::symlink_metadata(path).map_or(0, |metadata| metadata.permissions().mode() & 0o7777);
    let wrong = |path: &Path| {
        let is_file = FILES.iter().chain(&["daemon.log.1"]).any(|name| path == host.file(name)) && mode(path) == 0o600;
        let is_cwd = path == host.file("opencode") && mode(path) == 0o700;
        !is_file && !is_cwd
    };
    let found: Vec<PathBuf> = fs::read_dir(host.data()).ok()?.flatten().map(|entry| entry.path()).collect();
    let litter: Vec<_> = found.iter().filter(|path| wrong(path)).map(|path| (path, mode(path))).collect();
    let in_cwd = fs::read_dir(host.file("opencode")).map_or(0, Iterator::count);
    let right = litter.is_empty() && in_cwd == 0 && mode(&host.data()) == 0o700;
    (!right).then(|| format!("litter, or a wrong mode, in the data directory: {litter:?}, {in_cwd} in opencode/"))
}

// --- The tests ---

#[test]
fn soak() {
    let seed = seed("soak");
    let minutes: f64 = setting("OPENWORK_SOAK_MINUTES").unwrap_or(10.0);
    let again = again("soak", seed, Some(minutes));
    println!("again: {again}");
    let opencode = std::env::var_os("OPENWORK_TEST_OPENCODE").filter(|path| !path.is_empty()).map(PathBuf::from);
    let mut host = match &opencode {
        Some(path) => {
            assert!(path.is_file(), "OPENWORK_TEST_OPENCODE: there is no {}", path.display());
            Host::with_opencode(path)
        }
        None => Host::new(),
    };
    host.behave("FAKE_GRANDCHILD=1\nFAKE_START_MS=100\n");
    let switches = ["OPENCODE_DISABLE_AUTOUPDATE", "OPENCODE_DISABLE_MODELS_FETCH"];
    switches.iter().for_each(|switch| host.set(switch, "1"));
    // Short, so that evictions happen all the time.
    host.set("OPENWORK_IDLE_TTL", "3s");
    let machine = Machine::new(&host, &[switches[0], switches[1], "OPENWORK_IDLE_TTL"]);
    if opencode.is_some() {
        // The first instance in a new home may take long.
        let first = machine.host.project("first");
        let first = first.to_str().unwrap();
        machine.command(&["workspace", "add", first], None);
        machine.command(&["workspace", "path", first, "--timeout", "80"], None);
        machine.command(&["workspace", "remove", first], None);
    }

    let soak = Soak::new(machine, opencode.is_none());
    let workers: Vec<_> = (0..WORKERS).map(|number| Mutex::new(Worker::new(&soak, number, seed))).collect();
    let total = Duration::from_secs_f64(minutes * 60.0);
    thread::scope(|scope| {
        for worker in &workers {
            scope.spawn(|| {
                let _end = EndAll(&soak);
                while !soak.is_done() {
                    let pause = {
                        let _busy = soak.quiet.read().unwrap_or_else(PoisonError::into_inner);
                        let mut worker = lock(worker);
                        worker.act();
                        worker.chance.below(PAUSE)
                    };
                    thread::sleep(Duration::from_millis(pause));
                }
            });
        }
        let _end = EndAll(&soak);
        soak.torment(&mut Chance::of(seed, 0), total, &workers);
    });
    soak.finish(&workers);
    report(&soak, minutes, opencode.as_deref());
    let violations = lock(&soak.violations);
    let recent = lock(&soak.recent).iter().cloned().collect::<Vec<_>>().join("\n");
    assert!(violations.is_empty(), "{recent}\n\n{}\n\nrun it again: {again}", violations.join("\n"));
}

/// Ends all threads when one ends, also by a panic.
struct EndAll<'a, 'b>(&'a Soak<'b>);

impl Drop for EndAll<'_, '_> {
    fn drop(&mut self) {
        self.0.done.store(true, Ordering::Relaxed);
    }
}

impl Soak<'_> {
    /// Checks that a stop leaves no process and that the state file is complete.
    fn finish(&self, workers: &[Mutex<Worker>]) {
        self.run("daemon stop", &["daemon", "stop"]);
        let left = self.machine.processes();
        if !left.is_empty() {
            self.violation(format!("left by `daemon stop`: {left:?}"));
        }
        if let Some(list) = self.run("list", &["workspace", "list"]) {
            for worker in workers {
                lock(worker).compare(&listed(&list), "the end");
            }
        }
        check_directory(self.machine.host).into_iter().for_each(|problem| self.violation(problem));
    }
}

fn report(soak: &Soak, minutes: f64, opencode: Option<&Path>) {
    let figures = lock(&soak.figures);
    let commands: usize = figures.commands.values().map(|(count, _)| count).sum();
    let log = fs::read_to_string(soak.machine.host.file("daemon.log")).unwrap_or_default();
    let logged = |what: &str| log.lines().filter(|line| line.contains(what)).count();
    println!(
        "\n--- {minutes} minutes against {}",
        opencode.map_or("the fake".into(), |path| path.display().to_string())
    );
    println!("commands: {commands}, from {WORKERS} workers; {} checkpoints", figures.checkpoints);
    for (name, (count, slowest)) in &figures.commands {
        println!("  {count:7}  {name} (slowest {} ms)", slowest.as_millis());
    }
    println!("disturbances:");
    for (what, count) in &figures.done {
        println!("  {count:7}  {what}");
    }
    println!(
        "in the log: daemons {}, opencodes started {}, adopted {}",
        logged("listens on"),
        logged("starting "),
        logged(" is adopted on "),
    );
    println!("permitted failures:");
    for ((name, code), count) in &figures.cut_off {
        println!("  {count:7}  {name}: {code}");
    }
    if let Some((took, text)) = &figures.slowest {
        println!("slowest: {} ms, {text}", took.as_millis());
    }
    println!("the children of a killed opencode were gone after at most {} ms", figures.slowest_sweep.as_millis());
    for (early, late, commands) in &figures.vitals {
        println!("one daemon, {commands} commands apart: {early}; {late}");
    }
    println!("violations: {}", lock(&soak.violations).len());
}

/// Kills the daemon at random moments of adds.
#[test]
fn nothing_acknowledged_is_missing_after_200_crashes() {
    const TEST: &str = "nothing_acknowledged_is_missing_after_200_crashes";
    let seed = seed(TEST);
    let again = again(TEST, seed, None);
    println!("again: {again}");
    let host = Host::new();
    host.behave("FAKE_GRANDCHILD=1\n");
    let machine = Machine::new(&host, &[]);
    let name = |n: usize| format!("p{n}");
    let projects: Vec<String> = (0..ADDS).map(|n| host.project(name(n)).to_str().unwrap().to_owned()).collect();
    let mut chance = Chance::of(seed, 0);
    let mut struck = BTreeSet::new();
    while struck.len() < CRASHES {
        struck.insert(chance.below(ADDS as u64) as usize);
    }
    let (acknowledged, cut_off) = (Mutex::new(BTreeSet::new()), Mutex::new(BTreeMap::new()));
    let [next, crashes, landed] = [(); 3].map(|()| AtomicUsize::new(0));
    // The acknowledged adds that are not in the file after a crash.
    let missing = || {
        let before = lock(&acknowledged).clone();
        let bytes = fs::read(host.file(STATE)).unwrap_or_default();
        let state: Value = serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{e}: the state file; {again}"));
        let there: BTreeSet<String> = listed(&state).into_values().collect();
        before.into_iter().filter(|n| !there.contains(&name(*n))).collect::<Vec<_>>()
    };
    thread::scope(|scope| {
        // A rendezvous channel: an add waits until the killing thread is free.
        let (strike, strikes) = sync_channel::<Duration>(0);
        for adder in 0..ADDERS {
            let (strike, machine, host) = (strike.clone(), &machine, &host);
            let (next, struck, projects) = (&next, &struck, &projects);
            let (acknowledged, cut_off, landed) = (&acknowledged, &cut_off, &landed);
            let mut chance = Chance::of(seed, adder as u64 + 1);
            scope.spawn(move || {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(path) = projects.get(n) else { return };
                    // Repeat until acknowledged; the first try may be struck.
                    for is_first in [true].into_iter().chain(repeat(false)) {
                        let over_http = chance.percent(60);
                        let moment = Duration::from_micros(chance.below(if over_http { 4_000 } else { 12_000 }));
                        if over_http && host.lock_text().is_none_or(|(pid, _)| !is_alive(pid)) {
                            // Requests do not start a daemon.
                            machine.command(&["daemon", "start"], None);
                        }
                        if is_first && struck.contains(&n) {
                            strike.send(moment).expect("the killing thread");
                        }
                        let body = json!({"path": path, "name": format!("p{n}")});
                        let mut outcome = match over_http {
                            true => machine.http("POST", "/workspaces", Some(body), false),
                            false => Outcome::Nobody,
                        };
                        if matches!(outcome, Outcome::Nobody) {
                            outcome = machine.command(&["workspace", "add", path, "--name", &format!("p{n}")], None);
                        }
                        let how = match outcome {
                            Outcome::Done(added) => {
                                let was_there = !is_first && added["created"] == false;
                                landed.fetch_add(usize::from(was_there), Ordering::Relaxed);
                                lock(acknowledged).insert(n);
                                break;
                            }
                            Outcome::Refused { code, .. } => code,
                            Outcome::Lost(_) | Outcome::Nobody => "no reply".to_owned(),
                        };
                        *lock(cut_off).entry(how).or_insert(0) += 1;
                    }
                }
            });
        }
        drop(strike);
        for moment in strikes {
            let pid = poll(DEADLINE, || host.lock_text().map(|(pid, _)| pid).filter(|pid| is_alive(*pid)));
            let pid = pid.expect("a daemon");
            thread::sleep(moment);
            if machine.signal(pid, Running::is_daemon, Signal::KILL) {
                wait_gone(pid);
                crashes.fetch_add(1, Ordering::Relaxed);
            }
            assert_eq!(missing(), [0; 0], "acknowledged but not on disk; {again}");
        }
    });
    let outcome = machine.command(&["daemon", "start"], None);
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}; {again}");
    let Outcome::Done(list) = machine.command(&["workspace", "list"], None) else { panic!("no list; {again}") };
    println!(
        "{} crashes in {ADDS} adds, all acknowledged in the end; tries cut off: {:?}, of which {} had been done",
        crashes.load(Ordering::Relaxed),
        lock(&cut_off),
        landed.load(Ordering::Relaxed),
    );
    assert_eq!(missing(), [0; 0], "acknowledged but missing; {again}");
    assert_eq!(check_registry(&machine, &list, ADDS), None, "{again}");
    let mut problem = None;
    poll(Duration::from_secs(10), || {
        problem = check_processes(&machine, true);
        problem.is_none().then_some(())
    });
    assert_eq!(problem, None, "{again}");
    assert_eq!(check_directory(&host), None, "{again}");
    assert!(crashes.load(Ordering::Relaxed) >= CRASHES * 9 / 10, "too few crashes; {again}");
}
