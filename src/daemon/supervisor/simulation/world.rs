//! The simulated world: opencode processes, a disk, clients, and random faults.
//!
//! The world repeats the steps of the supervisor's thread and its helpers in virtual time and in the same
//! order, and may kill the daemon between any two of them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use self::instances::{DIRECTORIES, Request, Step};
use super::{Bug, Dice};
use crate::daemon::engine::{Lifecycle, SERVICE_LIFECYCLE, Verb};
use crate::daemon::instances::account::Account;
use crate::daemon::instances::fence::Fences;
use crate::daemon::supervisor::limits::Limits;
use crate::daemon::supervisor::policy::{
    Action, Answer, Checked, End, Event, Launched, Memory, Notice, Policy, Probe, StopScope,
};
use crate::error::Error;
use crate::wire::Phase;

/// How long random faults last, at most, before the world calms down.
const FAULT_TIME: Duration = Duration::from_secs(3600);
/// opencode must be ready within this time after the last fault: a busy hang is given ten minutes, and a
/// busy start may follow it.
const RECOVERY: Duration = Duration::from_secs(1500);
/// This many events at one moment mean that virtual time stands still.
const MAX_AT_ONCE: u32 = 10_000;

/// The result of a life.
pub struct Outcome {
    /// How many events the policy has handled.
    pub steps: u64,
    /// The virtual time of the life.
    pub lived: Duration,
    /// How often each fault happened.
    pub faults: BTreeMap<&'static str, u64>,
    /// A broken promise, and the last steps before it.
    pub broken: Option<String>,
}

/// An opencode process.
#[derive(Debug)]
struct Engine {
    alive: bool,
    /// The daemon has released the process to run opencode.
    execed: bool,
    /// Descendants live on after the process, for example the real opencode behind a wrapper.
    has_descendants: bool,
    /// The current daemon has launched or adopted the process.
    proved: bool,
    listens_at: Option<Instant>,
    answers_at: Option<Instant>,
    crashes_at: Option<Instant>,
    takes_port: bool,
    /// The process answers no request.
    silent: bool,
    /// The process no longer listens.
    not_listening: bool,
    /// The process rejects our password.
    rejects_password: bool,
    /// When the process began to use processor time.
    busy: Option<Instant>,
    /// The log grows during the start.
    prints: bool,
    too_large: bool,
    /// Which instances are loaded.
    loaded: [bool; DIRECTORIES.len()],
    /// Which of them have a running session.
    turns: [bool; DIRECTORIES.len()],
    /// A session ran at the last probe.
    seen_turn: bool,
    /// How many TERM signals the process ignores.
    ignored_terms: u32,
    unkillable: bool,
    /// KILL was sent to an unkillable process: the kernel ends it later.
    doomed: bool,
    /// Processor time, and when it was last updated.
    cpu_time: Duration,
    cpu_updated_at: Instant,
    /// The process listened at the first probe after its adoption, so it was ready before. None before that
    /// probe.
    was_ready: Option<bool>,
    /// TERM was sent, or a disposal has begun.
    asked_to_end: bool,
    started: Instant,
    ready_since: Option<Instant>,
    /// How long the process had been ready when it ended.
    healthy_for: Option<Duration>,
    /// The first probe without an answer since the last sign of life, and how many there were.
    unanswered: Option<(Instant, u32)>,
    /// The process was busy all that time.
    busy_throughout: bool,
}

impl Engine {
    fn used(&mut self, now: Instant) -> Duration {
        let passed = now.duration_since(self.cpu_updated_at);
        self.cpu_time += if self.busy.is_some() { passed / 2 } else { passed / 2000 };
        self.cpu_updated_at = now;
        self.cpu_time
    }
}

/// A request that waits for opencode, as `Handle::wait` does.
struct Client {
    deadline: Instant,
    failures: u64,
    checks: u64,
    suspect: Option<u64>,
}

/// An occurrence in the world. The first number of most is the daemon that it belongs to, the second the job.
enum Occurrence {
    /// The policy gets an event.
    Message(u64, Event),
    /// A process is spawned; the user's service only if the flag is set.
    Spawned(u64, u64, bool),
    /// The process is recorded.
    Record(u64, u64, usize),
    /// The process is released to run opencode.
    Exec(u64, u64, usize),
    /// A command of the user's service is done.
    ServiceCommanded(u64, u64, Verb),
    /// A process ends.
    End(usize),
    /// The descendants of a process have ended; with the flag, this answers the job that reaps it.
    Sweep(u64, u64, usize, bool),
    /// The search for the opencode of an earlier daemon is over.
    FindAdopted(u64, u64),
    /// A random fault, the end of one, or a request.
    Fault,
    /// A daemon starts.
    Daemon,
    /// A client tries again.
    Retry,
    /// A turn of this process, in this directory, ends.
    TurnEnds(usize, usize),
    /// A step in the account of instances.
    Instance(u64, Step),
}

struct Scheduled {
    at: Instant,
    number: u64,
    what: Occurrence,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Scheduled) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Scheduled) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Scheduled) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

pub struct World {
    dice: Dice,
    /// All opencodes of this life are the user's own service.
    shared: bool,
    /// A request has needed opencode since it was last ready.
    needed: bool,
    bug: Option<Bug>,
    limits: Limits,
    begun: Instant,
    now: Instant,
    number: u64,
    agenda: BinaryHeap<Reverse<Scheduled>>,
    policy: Option<Policy>,
    /// The number of the current daemon: the jobs of a daemon end with it.
    daemon: u64,
    /// Messages under way to this daemon.
    pending: u32,
    engines: Vec<Engine>,
    /// The process that the daemon holds.
    held: Option<usize>,
    /// The generation as which that process is watched.
    watched: Option<u64>,
    /// The process that the state file names.
    disk: Option<usize>,
    disk_fails: bool,
    /// The daemon runs out of threads and descriptors.
    out_of_resources: bool,
    no_binary: bool,
    /// Random faults are over.
    calm: bool,
    /// The final stop was requested: no daemon follows.
    is_over: bool,
    clients: Vec<Client>,
    account: Account,
    /// When the account is checked next.
    account_due: Option<Instant>,
    /// Requests in progress, by number.
    requests: BTreeMap<u64, Request>,
    /// When a stop was requested, and whether it keeps opencode.
    stop_requested: Option<(Instant, bool)>,
    /// opencode is being restarted for its memory.
    recycled: bool,
    /// The failures within the window since opencode was last given up.
    failed: VecDeque<Instant>,
    /// The last process crashed.
    crashed: bool,
    /// The last process ended after a long time of health.
    ended_after_health: bool,
    /// All engines before this index have ended with their descendants.
    past: usize,
    keeps_history: bool,
    faults: BTreeMap<&'static str, u64>,
    steps: u64,
    history: VecDeque<String>,
    broken: Option<String>,
    actions: Vec<Action>,
}

impl World {
    pub fn new(seed: u64, bug: Option<Bug>) -> World {
        let begun = Instant::now();
        let mut dice = Dice(seed);
        let shared = dice.chance(250);
        World {
            dice,
            shared,
            needed: false,
            bug,
            limits: Limits::STANDARD,
            begun,
            now: begun,
            number: 0,
            agenda: BinaryHeap::new(),
            policy: None,
            daemon: 0,
            pending: 0,
            engines: Vec::new(),
            held: None,
            watched: None,
            disk: None,
            disk_fails: false,
            out_of_resources: false,
            no_binary: false,
            calm: false,
            is_over: false,
            clients: Vec::new(),
            account: Account::new(Some(instances::IDLE_TTL), Fences::default()),
            account_due: None,
            requests: BTreeMap::new(),
            stop_requested: None,
            recycled: false,
            failed: VecDeque::new(),
            crashed: false,
            ended_after_health: false,
            past: 0,
            keeps_history: false,
            faults: BTreeMap::new(),
            steps: 0,
            history: VecDeque::new(),
            broken: None,
            actions: Vec::new(),
        }
    }

    /// The same with a history of the last steps, for the message. Formatting takes most of the time, so
    /// only a replay has one.
    pub fn with_history(self) -> World {
        World { keeps_history: true, ..self }
    }

    // --- A life ---

    /// Up to an hour of faults, then calm, in which opencode must get ready; then a stop, which must leave no
    /// process behind.
    pub fn live(mut self) -> Outcome {
        self.at(Duration::ZERO, Occurrence::Daemon);
        self.at(Duration::from_millis(1), Occurrence::Fault);
        let trouble = self.begun + self.dice.time(10_000, FAULT_TIME.as_millis() as u64);
        self.until(trouble, |_| false);
        self.end_faults();
        let bound = self.now + RECOVERY;
        let works = |world: &World| {
            let is_ready = world.policy.as_ref().is_some_and(|policy| policy.phase() == Phase::Ready);
            is_ready && world.held.is_some_and(|index| !world.engines[index].silent && world.engines[index].alive)
        };
        if !self.until(bound, works) {
            self.violates("opencode does not get ready after the last fault");
        }
        self.is_over = true;
        self.ask_to_stop(if self.shared { StopScope::Service } else { StopScope::OwnOpencode });
        let bound = self.now + self.limits.stop + Duration::from_secs(1);
        if !self.until(bound, |world| world.policy.is_none()) {
            self.violates("a stop does not end");
        }
        if self.engines.iter().any(|engine| engine.alive || engine.has_descendants) {
            self.violates("a stop leaves processes behind");
        }
        let lived = self.now.duration_since(self.begun);
        Outcome { steps: self.steps, lived, faults: self.faults, broken: self.broken }
    }

    /// Runs until `end`, or until the condition holds; returns whether it does.
    fn until(&mut self, end: Instant, holds: impl Fn(&World) -> bool) -> bool {
        let mut at_once = 0;
        while self.broken.is_none() {
            if holds(self) {
                return true;
            }
            let due = self.policy.as_ref().and_then(Policy::next_deadline);
            let next = self.agenda.peek().map(|Reverse(next)| next.at);
            let at = match (due, next) {
                (Some(due), Some(next)) => due.min(next),
                (Some(at), None) | (None, Some(at)) => at,
                (None, None) => end,
            };
            if at >= end {
                self.now = end;
                return false;
            }
            at_once = if at <= self.now { at_once + 1 } else { 0 };
            if at_once > MAX_AT_ONCE {
                self.violates("virtual time stands still");
            }
            self.now = self.now.max(at);
            match self.agenda.peek() {
                Some(Reverse(next)) if next.at <= self.now => {
                    if let Some(Reverse(Scheduled { what, .. })) = self.agenda.pop() {
                        self.occur(what);
                    }
                }
                _ => self.handle(Event::Timer),
            }
            self.clients.retain(|client| client.deadline > self.now);
        }
        true
    }

    /// Ends all faults except hangs that have begun.
    fn end_faults(&mut self) {
        self.calm = true;
        // The last fault is often a hang.
        let last = self.disk.filter(|index| self.engines[*index].execed && self.engines[*index].alive);
        if let Some(index) = last.filter(|_| self.dice.chance(200)) {
            (self.engines[index].silent, self.engines[index].busy_throughout) = (true, false);
        }
        (self.disk_fails, self.out_of_resources, self.no_binary) = (false, false, false);
        for (index, engine) in self.engines.iter_mut().enumerate() {
            (engine.unkillable, engine.too_large, engine.ignored_terms) = (false, false, 0);
            // The user corrects the password of their service.
            engine.rejects_password &= !self.shared;
            if engine.alive && engine.doomed {
                self.number += 1;
                let what = Occurrence::End(index);
                self.agenda.push(Reverse(Scheduled { at: self.now, number: self.number, what }));
            }
        }
        // A daemon that is about to end is followed by another anyway.
        if self.policy.is_none() {
            self.at(Duration::ZERO, Occurrence::Daemon);
        }
        // A client tries again every minute.
        for minute in 0..RECOVERY.as_secs() / 60 {
            self.at(Duration::from_secs(60 * minute + 1), Occurrence::Retry);
        }
    }

    // --- Bookkeeping ---

    fn at(&mut self, after: Duration, what: Occurrence) {
        self.number += 1;
        self.agenda.push(Reverse(Scheduled { at: self.now + after, number: self.number, what }));
    }

    /// Sends an event to the current daemon.
    fn message(&mut self, after: Duration, event: Event) {
        self.pending += 1;
        self.at(after, Occurrence::Message(self.daemon, event));
    }

    fn count(&mut self, fault: &'static str) {
        *self.faults.entry(fault).or_default() += 1;
    }

    fn note(&mut self, what: impl FnOnce() -> String) {
        if self.keeps_history {
            let at = self.now.duration_since(self.begun).as_secs_f64();
            if self.history.len() >= 40 {
                self.history.pop_front();
            }
            let what = what();
            self.history.push_back(format!("{at:>10.3} {what}"));
        }
    }

    fn violates(&mut self, promise: &str) {
        if self.broken.is_none() {
            let at = self.now.duration_since(self.begun).as_secs_f64();
            let history: Vec<_> = self.history.iter().map(String::as_str).collect();
            self.broken = Some(format!("{promise}, at {at:.3} s\n{}", history.join("\n")));
        }
    }
}

mod daemon;
mod environment;
mod instances;
