//! The one thread that owns opencode.
//!
//! It alone starts, watches, adopts and ends the process; everybody else holds a [`Handle`]:
//! reads the published [`Status`], waits on it, and sends [`Event`]s. What is wanted ([`Want`])
//! is apart from what is ([`Phase`]). Anything that may block (asking opencode, waiting for
//! its exit) happens in a short-lived thread that sends an event when it is done, so that the
//! loop always answers at once.
//!
//! Every event carries the generation it is about; one about an earlier process is dropped.
//! A process that an earlier daemon started is no special case: it enters in [`Phase::Starting`]
//! like one that was just launched, and has to answer like it.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::engine::{self, CallError, Endpoint};
use super::events::{EventKind, Events};
use super::instances::{Failure, Instances};
use crate::agent::Listener;
use crate::error::{Error, ErrorBody, Result};
use crate::framing::basic;
use crate::log::{self, now_ms};
use crate::options::EngineOptions;
use crate::paths::DataDir;
use crate::state::{Auth, BinaryRecord, EngineRecord, Store, random_hex};
use crate::system::process::{self, Identity, Process};
use crate::system::socket;
use crate::system::wait::{self, Flag};
use crate::wire::{EngineInfo, Phase as PhaseName, ProcessInfo};

/// How long `--version` may take: half a second warm, more from a cold disk.
const VERSION_LIMIT: Duration = Duration::from_secs(20);
/// How long opencode may take to be ready: 1 to 3 s, and 10 s for the first instance of a HOME.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long an adopted opencode has to answer: it was ready before, but may be busy.
const ADOPT_LIMIT: Duration = Duration::from_secs(10);
/// How often a starting one is looked at: a fraction of what a start takes, since somebody waits.
const LOOK_INTERVAL: Duration = Duration::from_millis(15);
/// How often a ready one is asked.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// How long a starting one may take to answer the first time. Short, since what it is asked in the
/// first moments after it listens (some 0.3 s) it never answers; so it is asked again, and given
/// more time the longer it takes.
const FIRST_PROBE_LIMIT: Duration = Duration::from_millis(50);
/// How long a ready one may take to answer.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// Without an answer for so long it hangs. Long, since a restart costs its users running turns.
const HANG_LIMIT: Duration = Duration::from_secs(60);
/// And how often it has to have been asked in that time.
const HANG_PROBES: u32 = 3;
/// How long disposing all instances may take at an orderly stop.
const DISPOSE_LIMIT: Duration = Duration::from_millis(2500);
/// When TERM is repeated: opencode swallows the first while it installs a plugin.
const TERM_AGAIN: Duration = Duration::from_secs(1);
/// When KILL follows the first TERM.
const KILL_AFTER: Duration = Duration::from_secs(5);
/// After KILL only a process stuck in the kernel is left; it is not waited for longer.
const GIVE_UP_AFTER: Duration = Duration::from_secs(7);
/// The first pause; it doubles.
const BACKOFF_FIRST: Duration = Duration::from_millis(250);
/// The longest pause.
const BACKOFF_LAST: Duration = Duration::from_secs(30);
/// After so much health an exit is the first again.
const HEALTHY_AFTER: Duration = Duration::from_secs(30);
/// So many failures within [`FAILURE_WINDOW`] and it stays down.
const FAILURE_LIMIT: usize = 6;
/// See [`FAILURE_LIMIT`].
const FAILURE_WINDOW: Duration = Duration::from_secs(120);
/// How many ports in a row may turn out to be taken.
const PORT_TRIES: usize = 10;
/// How often a call that finds nobody is made: more often, and it is the call that ends opencode.
const CALL_TRIES: usize = 3;
/// How much of its output is told when it fails. Lines.
const LAST_LINES: usize = 20;

/// What happens to the supervisor.
pub enum Event {
    /// Somebody needs opencode.
    Need,
    /// A call to this generation brought no answer.
    Suspect { generation: u64 },
    /// Stop for good.
    Stop { keep_opencode: bool },
    /// What a binary said when asked for its version.
    Version { attempt: u64, output: io::Result<String> },
    /// The answer to a health call.
    Probed { generation: u64, result: std::result::Result<String, CallError> },
    /// All instances are disposed, or it took too long.
    Disposed { generation: u64 },
    /// The process has ended.
    Exited { generation: u64 },
}

/// What is published.
#[derive(Clone)]
pub struct Status {
    /// As on the wire.
    pub phase: PhaseName,
    /// Counts the processes.
    pub generation: u64,
    /// How many of them replaced one that had ended by itself.
    pub restarts: u64,
    /// Of opencode, once known.
    pub version: Option<String>,
    /// Why it is not ready, or was not before.
    pub last_error: Option<ErrorBody>,
    /// The process while it is ready.
    pub ready: Option<(Endpoint, ProcessInfo)>,
    /// Counts the times that it was given up.
    failures: u64,
    /// Counts the health calls that were answered.
    checks: u64,
    /// It stops for good.
    stopping: bool,
}

impl Status {
    /// As in `/health`.
    pub fn engine_info(&self) -> EngineInfo {
        EngineInfo {
            phase: self.phase.name().into(),
            generation: self.generation,
            restarts: self.restarts,
            version: self.version.clone(),
            last_error: self.last_error.clone(),
        }
    }
}

struct Shared {
    status: Mutex<Status>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How everybody else sees opencode.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
    events: Sender<Event>,
}

impl Handle {
    /// A handle, and what [`Supervisor::new`] needs of it.
    pub fn new(events: Sender<Event>) -> Handle {
        let status = Status {
            phase: PhaseName::Starting,
            generation: 0,
            restarts: 0,
            version: None,
            last_error: None,
            ready: None,
            failures: 0,
            checks: 0,
            stopping: false,
        };
        Handle { shared: Arc::new(Shared { status: Mutex::new(status), changed: Condvar::new() }), events }
    }

    /// How it is now.
    pub fn status(&self) -> Status {
        self.shared.lock().clone()
    }

    /// Asks the supervisor to stop; it replies by ending.
    pub fn stop(&self, keep_opencode: bool) {
        let _ = self.events.send(Event::Stop { keep_opencode });
    }

    /// A ready opencode: waits until there is one. One that had failed is tried once more.
    ///
    /// # Errors
    /// Why it failed; `opencode_timeout` at the deadline; `opencode_unavailable` while stopping.
    pub fn endpoint(&self, deadline: Instant) -> Result<Endpoint> {
        self.wait(None, deadline)
    }

    /// opencode if it is ready now; nobody is woken.
    pub fn ready_now(&self) -> Option<Endpoint> {
        self.shared.lock().ready.as_ref().map(|(endpoint, _)| endpoint.clone())
    }

    /// opencode once it is ready, without asking for it; `None` when the supervisor stops.
    pub fn wait_ready(&self) -> Option<Endpoint> {
        let mut status = self.shared.lock();
        loop {
            match &status.ready {
                _ if status.stopping => return None,
                Some((endpoint, _)) => return Some(endpoint.clone()),
                None => status = self.shared.changed.wait(status).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Waits while this generation is the current one, at most for so long.
    pub fn wait_while(&self, generation: u64, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut status = self.shared.lock();
        while status.generation == generation && status.ready.is_some() && !status.stopping {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return;
            }
            status = self.shared.changed.wait_timeout(status, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Runs a call against opencode, again against its successor if it was gone.
    ///
    /// # Errors
    /// As [`Handle::endpoint`], and those of the call.
    pub fn call<T>(
        &self,
        deadline: Instant,
        mut call: impl FnMut(&Endpoint) -> std::result::Result<T, CallError>,
    ) -> Result<T> {
        let mut endpoint = self.endpoint(deadline)?;
        for _ in 1..CALL_TRIES {
            match call(&endpoint) {
                Err(CallError::Gone(_)) => endpoint = self.successor(&endpoint, deadline)?,
                other => return other.map_err(Error::from),
            }
        }
        call(&endpoint).map_err(Error::from)
    }

    /// A ready opencode after a call to `endpoint` found nobody there.
    ///
    /// # Errors
    /// As [`Handle::endpoint`].
    pub fn successor(&self, endpoint: &Endpoint, deadline: Instant) -> Result<Endpoint> {
        self.wait(Some(endpoint.generation), deadline)
    }

    /// Whether an opencode is still there after a call to it broke off: it is looked at again. What
    /// cannot be said by the deadline counts as alive.
    pub fn survives(&self, endpoint: &Endpoint, deadline: Instant) -> bool {
        let mut status = self.shared.lock();
        let checks = status.checks;
        let is_current = |status: &Status| {
            status.ready.is_some()
                && status.generation == endpoint.generation
                && !wait::has_ended(&endpoint.listener.process)
        };
        if is_current(&status) {
            let _ = self.events.send(Event::Suspect { generation: endpoint.generation });
        }
        while is_current(&status) {
            let rest = deadline.saturating_duration_since(Instant::now());
            if status.checks > checks || rest.is_zero() {
                return true;
            }
            status = self.shared.changed.wait_timeout(status, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    /// With `suspect`, an opencode of that generation is believed only after another look at it.
    fn wait(&self, suspect: Option<u64>, deadline: Instant) -> Result<Endpoint> {
        let mut status = self.shared.lock();
        let (failures, checks) = (status.failures, status.checks);
        let trusted =
            |status: &Status| suspect.is_none_or(|suspect| status.generation > suspect || status.checks > checks);
        if !(status.phase == PhaseName::Ready && trusted(&status)) {
            let _ = self.events.send(match suspect {
                Some(generation) => Event::Suspect { generation },
                None => Event::Need,
            });
        }
        loop {
            if let (Some((endpoint, _)), true) = (&status.ready, trusted(&status)) {
                return Ok(endpoint.clone());
            }
            if status.stopping {
                return Err(Error::OpencodeUnavailable("the daemon is stopping".to_owned()));
            }
            if status.phase == PhaseName::Failed && status.failures > failures {
                let body = status.last_error.clone();
                let unknown = || Error::OpencodeUnavailable("it has failed".to_owned());
                return Err(body.map_or_else(unknown, Error::unavailable));
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(Error::OpencodeTimeout("was not ready"));
            }
            status = self.shared.changed.wait_timeout(status, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What is wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Want {
    Run,
    Stop { keep_opencode: bool },
}

/// What is.
enum Phase {
    /// A binary is being asked for its version.
    Checking { process: Process, until: Instant, binary: PathBuf, record: BinaryRecord },
    /// A process is there and has not answered yet.
    Starting {
        process: Process,
        until: Instant,
        look_at: Instant,
        probing: bool,
        origin: Origin,
        /// Since when it is known to listen.
        listens_since: Option<Instant>,
    },
    /// A process is there and has answered.
    Ready {
        process: Process,
        since: Instant,
        /// When it was last asked.
        asked: Instant,
        /// When it was first asked without an answer, and how often that was since.
        unanswered: Option<(Instant, u32)>,
        probe_at: Instant,
        probing: bool,
    },
    /// A process is on its way out.
    Ending { process: Process, step: Step, then: Then },
    /// A pause before the next start.
    Waiting { until: Instant },
    /// Given up.
    Failed,
    /// The end of the supervisor.
    Stopped,
}

/// Where a process comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// Launched now.
    Launched,
    /// Started by a daemon before this one.
    Adopted,
}

/// How far the end of a process has come.
enum Step {
    /// Its instances are being disposed.
    Disposing { until: Instant },
    /// TERM was sent for the first time at `since`, and last at `again - TERM_AGAIN`.
    Terminating { since: Instant, again: Instant },
    /// KILL was sent.
    Killed { since: Instant },
}

/// What comes after the end of a process.
enum Then {
    /// Nothing: the daemon stops.
    Stop,
    /// It had failed so.
    Fail(Error),
    /// Another is started at once.
    Start,
}

/// The thread's own data.
pub struct Supervisor {
    shared: Arc<Shared>,
    sender: Sender<Event>,
    receiver: Receiver<Event>,
    data_dir: DataDir,
    options: EngineOptions,
    auth: Auth,
    /// The value of the `Authorization` header.
    authorization: Arc<str>,
    store: &'static Store,
    instances: &'static Instances,
    events: &'static Events,
    phase: Phase,
    want: Want,
    generation: u64,
    /// Of the current process.
    address: SocketAddrV4,
    /// The inode of the socket that listens there.
    socket: u32,
    started_at: u64,
    version: Option<String>,
    /// Counts version checks, so that a late answer is known as such.
    attempt: u64,
    /// Ends the watcher of the current process.
    release: Option<Arc<Flag>>,
    /// Failures in a row, for the pause.
    in_a_row: u32,
    /// Recent failures, for giving up.
    recent: VecDeque<Instant>,
    /// The next launch replaces one that had failed.
    restarting: bool,
    /// The next failure is final: somebody has asked for one more attempt.
    last_attempt: bool,
    /// Ports that turned out to be taken, in a row.
    taken_ports: usize,
    /// Where the output of the current process begins in the log. Bytes.
    log_start: u64,
}

/// What the supervisor works with.
pub struct Context {
    /// Where the files are.
    pub data_dir: DataDir,
    /// What was asked for.
    pub options: EngineOptions,
    /// The credentials it is started with.
    pub auth: Auth,
    /// Where the process is written down.
    pub store: &'static Store,
    /// Which instances it has loaded.
    pub instances: &'static Instances,
    /// Who is told.
    pub events: &'static Events,
}

impl Supervisor {
    /// A supervisor that has done nothing yet.
    pub fn new(handle: &Handle, receiver: Receiver<Event>, context: Context) -> Supervisor {
        let Context { data_dir, options, auth, store, instances, events } = context;
        Supervisor {
            shared: handle.shared.clone(),
            sender: handle.events.clone(),
            receiver,
            data_dir,
            options,
            authorization: basic(&auth.opencode_username, &auth.opencode_password).into(),
            auth,
            store,
            instances,
            events,
            phase: Phase::Failed,
            want: Want::Run,
            generation: 0,
            address: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0),
            socket: 0,
            started_at: 0,
            version: None,
            attempt: 0,
            release: None,
            in_a_row: 0,
            recent: VecDeque::new(),
            restarting: false,
            last_attempt: false,
            taken_ports: 0,
            log_start: 0,
        }
    }

    /// Runs until it is told to stop and opencode is gone, or kept.
    pub fn run(mut self) {
        if !self.adopt() {
            self.start();
        }
        self.publish();
        while !matches!(self.phase, Phase::Stopped) {
            let event = match self.next_deadline() {
                None => self.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => self.receiver.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match event {
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {}
                // Cannot be, since we hold a sender; but to go on would be to spin.
                Err(RecvTimeoutError::Disconnected) => self.handle(Event::Stop { keep_opencode: true }),
            }
            self.do_what_is_due(Instant::now());
            self.publish();
        }
    }

    /// When something is to be done, if nothing happens before.
    fn next_deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Checking { until, .. } | Phase::Waiting { until } => Some(*until),
            Phase::Starting { until, probing: true, .. } => Some(*until),
            Phase::Starting { until, look_at, probing: false, .. } => Some(*until.min(look_at)),
            Phase::Ready { probing: true, .. } => None,
            Phase::Ready { probe_at, probing: false, .. } => Some(*probe_at),
            Phase::Ending { step: Step::Disposing { until }, .. } => Some(*until),
            Phase::Ending { step: Step::Terminating { since, again }, .. } => Some(*again.min(&(*since + KILL_AFTER))),
            Phase::Ending { step: Step::Killed { since }, .. } => Some(*since + (GIVE_UP_AFTER - KILL_AFTER)),
            Phase::Failed | Phase::Stopped => None,
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Need => self.needed(),
            Event::Suspect { generation } => self.suspected(generation),
            Event::Stop { keep_opencode } => self.stop(keep_opencode),
            Event::Version { attempt, output } if attempt == self.attempt => self.version_known(output),
            Event::Probed { generation, result } if generation == self.generation => self.probed(result),
            Event::Disposed { generation } if generation == self.generation => self.disposed(),
            Event::Exited { generation } if generation == self.generation => self.exited(),
            Event::Version { .. } | Event::Probed { .. } | Event::Disposed { .. } | Event::Exited { .. } => {}
        }
    }

    fn needed(&mut self) {
        if let (Phase::Failed, Want::Run) = (&self.phase, self.want) {
            self.last_attempt = true;
            self.start();
        }
    }

    fn suspected(&mut self, suspect: u64) {
        match &mut self.phase {
            // It lives: it is asked at once. If it has ended, its watcher says so.
            Phase::Ready { probe_at, .. } if suspect == self.generation => *probe_at = Instant::now(),
            Phase::Failed => self.needed(),
            Phase::Ready { .. }
            | Phase::Checking { .. }
            | Phase::Starting { .. }
            | Phase::Ending { .. }
            | Phase::Waiting { .. }
            | Phase::Stopped => {}
        }
    }

    fn do_what_is_due(&mut self, now: Instant) {
        // Its watcher says so too, if there could be one.
        if matches!(&self.phase, Phase::Ending { process, .. } if wait::has_ended(&process.pidfd())) {
            return self.exited();
        }
        match &mut self.phase {
            Phase::Checking { until, .. } if now >= *until => {
                self.version_known(Err(io::ErrorKind::TimedOut.into()));
            }
            Phase::Starting { until, origin: Origin::Adopted, .. } if now >= *until => self.end(false, Then::Start),
            Phase::Starting { until, origin: Origin::Launched, .. } if now >= *until => {
                let error = Error::OpencodeStartFailed(
                    self.with_last_lines(format!("it was not ready within {} s", READY_LIMIT.as_secs())),
                );
                self.end(false, Then::Fail(error));
            }
            Phase::Starting { process, look_at, probing: probing @ false, listens_since, .. } if now >= *look_at => {
                let _ = log::bound(&self.data_dir.opencode_log());
                if let Ok(Some(socket)) = socket::listening(process, self.address) {
                    self.socket = socket;
                    *probing = true;
                    let since = *listens_since.get_or_insert(now);
                    let patience = FIRST_PROBE_LIMIT + now.duration_since(since) / 4;
                    self.probe(patience.min(PROBE_LIMIT));
                } else {
                    *look_at = now + LOOK_INTERVAL;
                }
            }
            Phase::Ready { asked, probe_at, probing: probing @ false, .. } if now >= *probe_at => {
                (*asked, *probing) = (now, true);
                // Once per probe is often enough for logs that grow by lines.
                self.bound_logs();
                self.probe(PROBE_LIMIT);
            }
            Phase::Ending { process, step, .. } => match step {
                Step::Disposing { until } if now >= *until => {
                    process.signal(Signal::TERM);
                    *step = Step::Terminating { since: now, again: now + TERM_AGAIN };
                }
                Step::Terminating { since, .. } if now >= *since + KILL_AFTER => {
                    process.signal(Signal::KILL);
                    *step = Step::Killed { since: now };
                }
                Step::Terminating { again, .. } if now >= *again => {
                    process.signal(Signal::TERM);
                    *again = now + TERM_AGAIN;
                }
                Step::Killed { since } if now >= *since + (GIVE_UP_AFTER - KILL_AFTER) => self.give_up_ending(),
                Step::Disposing { .. } | Step::Terminating { .. } | Step::Killed { .. } => {}
            },
            Phase::Waiting { until } if now >= *until => self.start(),
            Phase::Checking { .. }
            | Phase::Starting { .. }
            | Phase::Ready { .. }
            | Phase::Waiting { .. }
            | Phase::Failed
            | Phase::Stopped => {}
        }
    }

    /// Takes over the opencode of a daemon before us, if it lives and is proved to be ours.
    /// What it left behind when it does not live is ended.
    fn adopt(&mut self) -> bool {
        let Some(record) = self.store.snapshot().opencode.clone() else { return false };
        let Some(process) = Process::adopt(&record.identity()) else {
            if !record.engine_id.is_empty() {
                process::sweep(&record.engine_id);
            }
            return false;
        };
        crate::log!("found opencode (pid {}) of an earlier daemon", record.pid);
        let now = Instant::now();
        self.address = record.address();
        self.started_at = record.started_at;
        self.generation = 1;
        // What it printed before is not about what happens now.
        self.log_start = std::fs::metadata(self.data_dir.opencode_log()).map_or(0, |metadata| metadata.len());
        self.instances.begin(self.generation, record.instances, record.strangers.as_deref());
        self.watch(&process);
        // One that listens was ready; one that does not yet is given the rest of its time.
        let age = Duration::from_millis(now_ms().saturating_sub(record.started_at));
        let listens = matches!(socket::listening(&process, self.address), Ok(Some(_)));
        let rest = if listens { ADOPT_LIMIT } else { READY_LIMIT.saturating_sub(age) };
        let until = now + rest.max(ADOPT_LIMIT);
        self.phase = Phase::Starting {
            process,
            until,
            look_at: now,
            probing: false,
            origin: Origin::Adopted,
            listens_since: None,
        };
        true
    }

    /// Begins a start: finds the binary and its version.
    fn start(&mut self) {
        self.release = None;
        let (binary, metadata) = match crate::paths::find_opencode(self.options.binary.as_deref()) {
            Ok(found) => found,
            Err(e) => return self.failed(e),
        };
        let record = engine::record(&binary, &metadata);
        let known = self.store.snapshot().binaries.as_ref().and_then(|binaries| binaries.opencode.clone());
        if let Some(version) = known.filter(|known| known.is_same_file(&record)).and_then(|known| known.actual_version)
        {
            return self.version_checked(&binary, engine::check_version(&binary, &version));
        }
        self.attempt += 1;
        let failed = |e| Error::OpencodeStartFailed(format!("cannot run {} --version: {e}", binary.display()));
        let spawned = random_hex::<16>().and_then(|id| {
            let mut command = engine::version_command(&binary, &self.data_dir.opencode_cwd());
            Process::spawn(&mut command, &id).map_err(failed)
        });
        let mut process = match spawned {
            Ok(process) => process,
            Err(e) => return self.failed(e),
        };
        let (sender, attempt, stdout) = (self.sender.clone(), self.attempt, process.take_stdout());
        let pidfd = process.pidfd();
        let asked = in_background(move || {
            // A version is a few bytes; whatever says more is no opencode.
            let read = |stdout| wait::read_output(stdout, &pidfd, 4096);
            let _ = sender.send(Event::Version { attempt, output: stdout.map_or(Ok(String::new()), read) });
        });
        self.phase = Phase::Checking { process, until: Instant::now() + VERSION_LIMIT, binary, record };
        if let Err(e) = asked {
            self.version_known(Err(e));
        }
    }

    fn version_known(&mut self, output: io::Result<String>) {
        let phase = std::mem::replace(&mut self.phase, Phase::Failed);
        let Phase::Checking { process, binary, mut record, .. } = phase else {
            self.phase = phase;
            return;
        };
        // It has said what it was asked; nothing of it stays.
        process.signal(Signal::KILL);
        process.bury();
        let failed = |why: String| Err(Error::OpencodeStartFailed(format!("{} --version {why}", binary.display())));
        let checked = match output {
            Ok(output) if output.trim().is_empty() => failed("printed nothing".to_owned()),
            Ok(output) => engine::check_version(&binary, &output),
            Err(e) => failed(format!("failed: {e}")),
        };
        if let Ok(version) = &checked {
            record.actual_version = Some(version.clone());
            let written = self.store.update(|state| {
                let known = &mut state.binaries.get_or_insert_default().opencode;
                let extra = known.take().filter(|known| known.path == record.path).map(|known| known.extra);
                *known = Some(BinaryRecord { extra: extra.unwrap_or_default(), ..record });
                Ok(())
            });
            if let Err(e) = written {
                crate::log!("{e}"); // only to be asked again
            }
        }
        self.version_checked(&binary, checked);
    }

    fn version_checked(&mut self, binary: &std::path::Path, checked: Result<String>) {
        match checked.and_then(|version| {
            self.instances.version_is(&version);
            self.version = Some(version);
            self.launch(binary)
        }) {
            Ok(()) => {}
            Err(e) => self.failed(e),
        }
    }

    /// Starts the process: it is written down before it can do anything.
    fn launch(&mut self, binary: &std::path::Path) -> Result<()> {
        let address = engine::choose_address(&self.options, &self.store.snapshot().ports)?;
        let engine_id = random_hex::<16>()?;
        let (log_path, cwd) = (self.data_dir.opencode_log(), self.data_dir.opencode_cwd());
        let log = log::open(&log_path).map_err(|e| Error::io("open", &log_path, e))?;
        let log_too = log.try_clone().map_err(|e| Error::io("open", &log_path, e))?;
        self.log_start = log.metadata().map_or(0, |metadata| metadata.len());
        let mut command = engine::launch_command(binary, address, &self.auth);
        command.current_dir(&cwd).stdout(log).stderr(log_too);
        let mut process = Process::spawn(&mut command, &engine_id)
            .map_err(|e| Error::OpencodeStartFailed(format!("cannot start {}: {e}", binary.display())))?;
        let Identity { pid, start_ticks, boot_id, engine_id } = process.identity().clone();
        let record = EngineRecord {
            pid,
            port: address.port(),
            base_url: format!("http://{address}"),
            started_at: now_ms(),
            engine_id,
            start_ticks,
            boot_id,
            instances: Vec::new(),
            strangers: None,
            extra: serde_json::Map::new(),
        };
        self.started_at = record.started_at;
        let written = self.store.update(|state| {
            state.opencode = Some(record);
            state.ports.keep_opencode_address(address);
            Ok(())
        });
        let told = written.and_then(|()| {
            engine::go(&mut process).map_err(|e| Error::OpencodeStartFailed(format!("it ended at once: {e}")))
        });
        if let Err(e) = told {
            process.signal(Signal::KILL); // it waits for the word, and nothing is lost with it
            process.bury();
            return Err(e);
        }
        if std::mem::take(&mut self.restarting) {
            self.shared.lock().restarts += 1;
        }
        self.generation += 1;
        self.address = address;
        self.instances.begin(self.generation, Vec::new(), None);
        self.watch(&process);
        crate::log!("starting {} on {address} (pid {pid})", binary.display());
        self.events.publish(EventKind::EngineStarting { generation: self.generation, pid });
        let now = Instant::now();
        self.phase = Phase::Starting {
            process,
            until: now + READY_LIMIT,
            look_at: now + LOOK_INTERVAL,
            probing: false,
            origin: Origin::Launched,
            listens_since: None,
        };
        Ok(())
    }

    /// Keeps the logs from growing without end.
    fn bound_logs(&self) {
        for log in [self.data_dir.opencode_log(), self.data_dir.daemon_log()] {
            let _ = log::bound(&log);
        }
    }

    /// Has the end of the process reported.
    fn watch(&mut self, process: &Process) {
        let (pidfd, sender, generation) = (process.pidfd(), self.sender.clone(), self.generation);
        let release = match Flag::new() {
            Ok(flag) => Arc::new(flag),
            Err(e) => {
                crate::log!("cannot watch opencode: {e}"); // its health is still asked for
                return;
            }
        };
        self.release = Some(release.clone());
        let watching = in_background(move || {
            if let Ok(true) = wait::wait_readable(&pidfd, &release, None) {
                let _ = sender.send(Event::Exited { generation });
            }
        });
        if let Err(e) = watching {
            crate::log!("cannot watch opencode: {e}");
        }
    }

    /// Has the health of the process asked.
    fn probe(&self, limit: Duration) {
        let (Phase::Starting { process, .. } | Phase::Ready { process, .. }) = &self.phase else { return };
        let (endpoint, sender, generation) = (self.endpoint(process), self.sender.clone(), self.generation);
        let asked = in_background(move || {
            let result = endpoint.health(Instant::now() + limit);
            let _ = sender.send(Event::Probed { generation, result });
        });
        if asked.is_err() {
            let _ = self.sender.send(Event::Probed { generation, result: Err(CallError::TimedOut) });
        }
    }

    fn endpoint(&self, process: &Process) -> Endpoint {
        let listener = Listener { address: self.address, socket: self.socket, process: process.pidfd() };
        Endpoint::new(listener, self.generation, self.authorization.clone())
    }

    fn probed(&mut self, result: std::result::Result<String, CallError>) {
        let now = Instant::now();
        if let (Phase::Starting { process, .. } | Phase::Ready { process, .. }, Err(CallError::Gone(_))) =
            (&self.phase, &result)
        {
            if wait::has_ended(&process.pidfd()) {
                return self.exited(); // its watcher says the same, if there is one
            }
        }
        match (&mut self.phase, result) {
            (Phase::Starting { .. }, Ok(version)) => self.ready(version, now),
            (
                Phase::Starting { origin: Origin::Launched, .. },
                Err(CallError::Failed(e @ Error::OpencodeAuthFailed(_))),
            ) => {
                self.end(false, Then::Fail(e));
            }
            // It is ours and has another password: somebody has removed the file.
            (Phase::Starting { .. }, Err(CallError::Failed(Error::OpencodeAuthFailed(_)))) => {
                self.end(false, Then::Start)
            }
            (Phase::Starting { look_at, probing, .. }, Err(_)) => {
                *probing = false;
                *look_at = now + LOOK_INTERVAL;
            }
            (Phase::Ready { unanswered, probe_at, probing, .. }, Ok(version)) => {
                (*unanswered, *probe_at, *probing) = (None, now + PROBE_INTERVAL, false);
                self.version = Some(version);
                self.shared.lock().checks += 1;
            }
            // It was not asked, for want of something of ours.
            (Phase::Ready { probe_at, probing, .. }, Err(CallError::Failed(e @ Error::Overloaded(_)))) => {
                (*probe_at, *probing) = (now + PROBE_INTERVAL, false);
                crate::log!("cannot ask opencode: {e}");
            }
            (Phase::Ready { process, asked, unanswered, probe_at, probing, .. }, Err(e)) => {
                (*probe_at, *probing) = (now + PROBE_INTERVAL, false);
                let deaf = matches!(e, CallError::Gone(_));
                // Time in which we were stopped ourselves, and nobody asked, is no sign of anything.
                let (since, count) = unanswered.get_or_insert(((*asked).max(now - PROBE_LIMIT), 0));
                *count += 1;
                let hung = now.duration_since(*since) >= HANG_LIMIT && *count >= HANG_PROBES;
                crate::log!("opencode does not answer: {}", Error::from(e));
                if deaf && matches!(socket::listening(process, self.address), Ok(found) if found != Some(self.socket)) {
                    let error = Error::OpencodeUnavailable("it no longer listens".to_owned());
                    self.end(false, Then::Fail(error));
                } else if hung {
                    let error = format!("it has not answered for {} s", HANG_LIMIT.as_secs());
                    self.end(false, Then::Fail(Error::OpencodeUnavailable(error)));
                }
            }
            (
                Phase::Checking { .. } | Phase::Ending { .. } | Phase::Waiting { .. } | Phase::Failed | Phase::Stopped,
                _,
            ) => {}
        }
    }

    fn ready(&mut self, version: String, now: Instant) {
        let phase = std::mem::replace(&mut self.phase, Phase::Failed);
        let Phase::Starting { process, origin, .. } = phase else { return };
        let pid = process.identity().pid;
        let how = if origin == Origin::Adopted { "adopted" } else { "ready" };
        crate::log!("opencode {version} is {how} on {} (pid {pid})", self.address);
        self.instances.version_is(&version);
        self.version = Some(version);
        self.last_attempt = false;
        self.taken_ports = 0;
        self.phase = Phase::Ready {
            process,
            since: now,
            asked: now,
            unanswered: None,
            probe_at: now + PROBE_INTERVAL,
            probing: false,
        };
        self.bound_logs();
        self.events.publish(EventKind::EngineReady { generation: self.generation, pid });
    }

    fn stop(&mut self, keep_opencode: bool) {
        // Stopping for good wins over keeping, whichever comes first.
        let keep_opencode = keep_opencode && !matches!(self.want, Want::Stop { keep_opencode: false });
        self.want = Want::Stop { keep_opencode };
        match (&mut self.phase, keep_opencode) {
            (Phase::Starting { .. } | Phase::Ready { .. }, true) => {
                if let Some(release) = self.release.take() {
                    release.raise();
                }
                self.phase = Phase::Stopped;
            }
            (Phase::Ready { .. }, false) => self.end(true, Then::Stop),
            (Phase::Starting { .. }, false) => self.end(false, Then::Stop),
            (Phase::Ending { then, .. }, _) => *then = Then::Stop,
            (Phase::Checking { .. }, _) => {
                if let Phase::Checking { process, .. } = std::mem::replace(&mut self.phase, Phase::Stopped) {
                    process.signal(Signal::KILL);
                    process.bury();
                }
            }
            (Phase::Waiting { .. } | Phase::Failed | Phase::Stopped, _) => self.phase = Phase::Stopped,
        }
    }

    /// Begins the end of the process.
    fn end(&mut self, orderly: bool, then: Then) {
        self.forgive();
        let phase = std::mem::replace(&mut self.phase, Phase::Failed);
        let (Phase::Starting { process, .. } | Phase::Ready { process, .. } | Phase::Ending { process, .. }) = phase
        else {
            self.phase = phase;
            return;
        };
        let now = Instant::now();
        let step = if orderly {
            let (endpoint, sender, generation) = (self.endpoint(&process), self.sender.clone(), self.generation);
            let until = now + DISPOSE_LIMIT;
            let asked = in_background(move || {
                let _ = endpoint.dispose_all(until);
                let _ = sender.send(Event::Disposed { generation });
            });
            Step::Disposing { until: if asked.is_ok() { until } else { now } }
        } else {
            process.signal(Signal::TERM);
            Step::Terminating { since: now, again: now + TERM_AGAIN }
        };
        self.phase = Phase::Ending { process, step, then };
    }

    /// The failures before a long time of health count no more.
    fn forgive(&mut self) {
        if matches!(self.phase, Phase::Ready { since, .. } if since.elapsed() >= HEALTHY_AFTER) {
            self.in_a_row = 0;
        }
    }

    fn disposed(&mut self) {
        if let Phase::Ending { step: Step::Disposing { until }, .. } = &mut self.phase {
            *until = Instant::now();
        }
    }

    /// Not even KILL has ended it: the kernel holds it. It stays written down, so that the next
    /// daemon finds it.
    fn give_up_ending(&mut self) {
        crate::log!("opencode ({}) does not end, even when killed", self.address);
        if let Some(release) = self.release.take() {
            release.raise();
        }
        match self.want {
            Want::Stop { .. } => self.phase = Phase::Stopped,
            Want::Run => {
                let error = Error::OpencodeStartFailed("the one before does not end, even when killed".to_owned());
                self.give_up(&error);
            }
        }
    }

    /// The process has ended: what is left of it is ended too, and what comes next begins.
    fn exited(&mut self) {
        self.release = None;
        self.forgive();
        let phase = std::mem::replace(&mut self.phase, Phase::Failed);
        let (process, then) = match phase {
            Phase::Ending { process, then, .. } => (process, Some(then)),
            Phase::Starting { process, .. } => (process, None),
            Phase::Ready { process, .. } => (process, None),
            Phase::Checking { .. } | Phase::Waiting { .. } | Phase::Failed | Phase::Stopped => {
                self.phase = phase;
                return;
            }
        };
        let was_ready = self.shared.lock().ready.is_some();
        let (pid, generation) = (process.identity().pid, self.generation);
        let status = process.bury();
        let how = status.map_or_else(|| "ended".to_owned(), |status| format!("ended with {status}"));
        crate::log!("opencode (pid {pid}) {how}");
        self.events.publish(EventKind::EngineExited { generation, pid, reason: how.clone() });
        let by_itself = match (&then, self.want) {
            // Ended by us, for a hang that may well be the doing of a workspace.
            (Some(Then::Fail(_)), Want::Run) => true,
            (None, Want::Run) => !status.is_some_and(was_sent_a_signal),
            (Some(Then::Start | Then::Stop), _) | (_, Want::Stop { .. }) => false,
        };
        self.instances.ended(generation, by_itself.then(|| Failure { how: how.clone(), output: self.last_lines() }));
        if let Err(e) = self.store.update(|state| {
            state.opencode = None;
            Ok(())
        }) {
            crate::log!("{e}"); // its identity matches no process, so nothing is lost
        }
        match (then, self.want) {
            (_, Want::Stop { .. }) | (Some(Then::Stop), _) => self.phase = Phase::Stopped,
            (Some(Then::Start), Want::Run) => self.start(),
            (Some(Then::Fail(error)), Want::Run) => self.failed(error),
            (None, Want::Run) if !was_ready && self.port_was_taken() => self.start(),
            (None, Want::Run) => {
                let when = if was_ready { "" } else { " before it was ready" };
                let error = self.with_last_lines(format!("opencode {how}{when}"));
                self.failed(match was_ready {
                    true => Error::OpencodeUnavailable(error),
                    false => Error::OpencodeStartFailed(error),
                });
            }
        }
    }

    /// Whether a start failed because somebody was faster at a port that nobody asked for.
    fn port_was_taken(&mut self) -> bool {
        let taken = self.options.port.is_none() && !engine::is_free(self.address) && self.taken_ports < PORT_TRIES;
        if taken {
            self.taken_ports += 1;
        }
        taken
    }

    /// A start or a process has failed: again, after a pause, or not at all.
    fn failed(&mut self, error: Error) {
        let now = Instant::now();
        while self.recent.front().is_some_and(|at| now.duration_since(*at) > FAILURE_WINDOW) {
            self.recent.pop_front();
        }
        self.recent.push_back(now);
        self.restarting = self.generation > 0;
        let final_by_nature = matches!(
            error,
            Error::OpencodeNotFound(_) | Error::OpencodeUnsupported { .. } | Error::OpencodeAuthFailed(_)
        ) || matches!(error, Error::PortInUse { .. }) && self.generation == 0;
        if final_by_nature || self.last_attempt || self.recent.len() >= FAILURE_LIMIT {
            return self.give_up(&error);
        }
        crate::log!("{error}");
        self.shared.lock().last_error = Some(error.body());
        let pause = match self.in_a_row {
            0 => Duration::ZERO,
            n => BACKOFF_FIRST.saturating_mul(1 << (n - 1).min(16)).min(BACKOFF_LAST),
        };
        self.in_a_row += 1;
        self.phase = Phase::Waiting { until: now + pause };
        if pause.is_zero() {
            self.start();
        }
    }

    fn give_up(&mut self, error: &Error) {
        crate::log!("{error}");
        self.phase = Phase::Failed;
        self.last_attempt = false;
        self.in_a_row = 0;
        self.recent.clear();
        {
            let mut status = self.shared.lock();
            status.failures += 1;
            status.last_error = Some(error.body());
        }
        self.events.publish(EventKind::EngineFailed { error: error.body() });
    }

    /// What happened, with the last lines of the output of the current process.
    fn with_last_lines(&self, what: String) -> String {
        match self.last_lines() {
            lines if lines.is_empty() => what,
            lines => format!("{what}; its last output:\n{lines}"),
        }
    }

    /// The last lines of the output of the current process; may be empty.
    fn last_lines(&self) -> String {
        log::tail(&self.data_dir.opencode_log(), self.log_start, LAST_LINES).unwrap_or_default().join("\n")
    }

    /// Tells everybody how it is.
    fn publish(&self) {
        let mut status = self.shared.lock();
        status.phase = match &self.phase {
            Phase::Checking { .. } | Phase::Starting { .. } => PhaseName::Starting,
            Phase::Ready { .. } => PhaseName::Ready,
            Phase::Ending { .. } | Phase::Stopped => PhaseName::Stopping,
            Phase::Waiting { .. } => PhaseName::Waiting,
            Phase::Failed => PhaseName::Failed,
        };
        status.stopping = self.want != Want::Run;
        status.generation = self.generation;
        status.version.clone_from(&self.version);
        status.ready = match &self.phase {
            Phase::Ready { process, .. } => {
                let info = ProcessInfo {
                    pid: process.identity().pid,
                    port: self.address.port(),
                    base_url: format!("http://{}", self.address),
                    started_at: self.started_at,
                    memory: None,
                };
                Some((self.endpoint(process), info))
            }
            _ => None,
        };
        if status.ready.is_some() {
            status.last_error = None;
        }
        self.shared.changed.notify_all();
    }
}

/// Runs something that may block.
fn in_background(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().spawn(work).map(|_| ())
}

/// Whether a process was ended by a signal that other processes send: the user, or the kernel for
/// want of memory. A program that fails by itself exits, or raises another signal.
fn was_sent_a_signal(status: ExitStatus) -> bool {
    let sent = [Signal::HUP, Signal::INT, Signal::KILL, Signal::TERM];
    status.signal().is_some_and(|signal| sent.iter().any(|sent| sent.as_raw() == signal))
}
