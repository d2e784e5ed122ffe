//! The world of a simulation: an opencode or several, a disk, clients, and chance.
//!
//! What the supervisor's thread and its helpers do for real is done here in virtual time, with the
//! same steps in the same order, and may end between any two of them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use self::instances::{DIRECTORIES, Request, Step};
use super::{Bug, Dice};
use crate::daemon::engine::{Manners, SERVICE_MANNERS, Verb};
use crate::daemon::instances::account::Account;
use crate::daemon::instances::fence::Fences;
use crate::daemon::supervisor::limits::Limits;
use crate::daemon::supervisor::policy::{
    Action, Answer, Checked, End, Ends, Event, Launched, Memory, News, Policy, Probe,
};
use crate::error::Error;
use crate::wire::Phase;

/// How long a life lasts before the world calms down.
const TROUBLE: Duration = Duration::from_secs(3600);
/// Within this time after the last fault opencode is ready: a hang that uses the processor is given ten
/// minutes, and there may be a start that does too.
const RECOVERY: Duration = Duration::from_secs(1500);
/// So many events at one moment, and nothing moves any more.
const SPIN: u32 = 10_000;

/// What a life was like.
pub struct Outcome {
    /// Events that the policy has handled.
    pub steps: u64,
    /// How long it was.
    pub lived: Duration,
    /// How often what happened.
    pub faults: BTreeMap<&'static str, u64>,
    /// A broken promise, and the last steps before it.
    pub broken: Option<String>,
}

/// An opencode process.
#[derive(Debug)]
struct Engine {
    alive: bool,
    /// It was told to become opencode.
    told: bool,
    /// What it has started still lives, for example the real one behind a wrapper.
    leaves: bool,
    /// In this daemon's life it was launched, or adopted.
    proved: bool,
    listens_at: Option<Instant>,
    answers_at: Option<Instant>,
    crashes_at: Option<Instant>,
    takes_port: bool,
    /// It answers nothing.
    silent: bool,
    deaf: bool,
    refuses: bool,
    /// Since when it uses the processor.
    busy: Option<Instant>,
    /// Its log grows while it starts.
    prints: bool,
    too_large: bool,
    /// The instances that it has loaded.
    loaded: [bool; DIRECTORIES.len()],
    /// In which of them a session runs.
    turns: [bool; DIRECTORIES.len()],
    /// One did at the last look.
    seen_turn: bool,
    swallows: u32,
    unkillable: bool,
    doomed: bool,
    used: Duration,
    used_at: Instant,
    /// It listened when it was adopted: it was ready before. Not known before the first look.
    was_ready: Option<bool>,
    /// It was told to end.
    asked_to_end: bool,
    started: Instant,
    ready_since: Option<Instant>,
    /// How long it had been ready when it ended.
    fell_after: Option<Duration>,
    /// When it was first asked without an answer since, and how often.
    unanswered: Option<(Instant, u32)>,
    /// It was busy all that time.
    busy_throughout: bool,
}

impl Engine {
    fn used(&mut self, now: Instant) -> Duration {
        let passed = now.duration_since(self.used_at);
        self.used += if self.busy.is_some() { passed / 2 } else { passed / 2000 };
        self.used_at = now;
        self.used
    }
}

/// A request that waits for opencode, as `Handle::wait` does.
struct Client {
    deadline: Instant,
    failures: u64,
    checks: u64,
    suspect: Option<u64>,
}

/// What happens at some time.
enum Happening {
    /// The policy of this daemon gets an event.
    Message(u64, Event),
    /// A process was started for this job; the user's service only if that was wanted.
    Spawned(u64, u64, bool),
    /// It is to be written down.
    Record(u64, u64, usize),
    /// It is told to become opencode.
    Tell(u64, u64, usize),
    /// A command has done this with the user's service.
    Ordered(u64, u64, Verb),
    /// A process ends.
    End(usize),
    /// What a process left is ended.
    Sweep(u64, u64, usize, bool),
    /// The opencode of an earlier daemon is looked for.
    Look(u64, u64),
    /// Something goes wrong, or right, or somebody comes.
    Weather,
    /// A daemon is started.
    Daemon,
    /// Somebody asks again.
    Person,
    /// A turn of this process ends.
    TurnEnds(usize, usize),
    /// Something happens to the account of this daemon.
    Instance(u64, Step),
}

struct Scheduled {
    at: Instant,
    number: u64,
    what: Happening,
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
    /// opencode is the user's own service: a life long.
    shared: bool,
    /// A request has asked for opencode since it was last ready.
    needed: bool,
    bug: Option<Bug>,
    limits: Limits,
    begun: Instant,
    now: Instant,
    number: u64,
    agenda: BinaryHeap<Reverse<Scheduled>>,
    policy: Option<Policy>,
    /// Counts the daemons: what one has begun ends with it.
    daemon: u64,
    /// Messages to this daemon that are on their way.
    pending: u32,
    engines: Vec<Engine>,
    /// The process that the daemon holds.
    held: Option<usize>,
    /// It is watched, as this generation.
    watched: Option<u64>,
    /// The engine that the disk names.
    disk: Option<usize>,
    disk_fails: bool,
    lacks: bool,
    no_binary: bool,
    calm: bool,
    /// The last stop has been asked for: no daemon follows.
    is_over: bool,
    clients: Vec<Client>,
    account: Account,
    /// When it is looked at next.
    account_due: Option<Instant>,
    /// Requests that have entered, by number.
    requests: BTreeMap<u64, Request>,
    stop_asked: Option<(Instant, bool)>,
    recycled: bool,
    /// The last start of an opencode failed so, since the last time that it was given up.
    failed: VecDeque<Instant>,
    /// The last process ended by itself.
    fell_by_itself: bool,
    /// It did so after a long time of health.
    ended_after_health: bool,
    /// Engines before this one are of the past.
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
        let shared = dice.often(250);
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
            lacks: false,
            no_binary: false,
            calm: false,
            is_over: false,
            clients: Vec::new(),
            account: Account::new(Some(instances::IDLE_TTL), Fences::default()),
            account_due: None,
            requests: BTreeMap::new(),
            stop_asked: None,
            recycled: false,
            failed: VecDeque::new(),
            fell_by_itself: false,
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

    /// The same, but the last steps are kept, for a message: words cost most of the time.
    pub fn with_history(self) -> World {
        World { keeps_history: true, ..self }
    }

    // --- A life ---

    /// An hour of trouble, then peace: opencode has to come back. Then a stop, and nothing is left.
    pub fn live(mut self) -> Outcome {
        self.at(Duration::ZERO, Happening::Daemon);
        self.at(Duration::from_millis(1), Happening::Weather);
        let trouble = self.begun + self.dice.time(10_000, TROUBLE.as_millis() as u64);
        self.until(trouble, |_| false);
        self.make_peace();
        let bound = self.now + RECOVERY;
        let works = |world: &World| {
            let is_ready = world.policy.as_ref().is_some_and(|policy| policy.phase() == Phase::Ready);
            is_ready && world.held.is_some_and(|index| !world.engines[index].silent && world.engines[index].alive)
        };
        if !self.until(bound, works) {
            self.breaks("after the last fault opencode does not get ready");
        }
        self.is_over = true;
        self.ask_to_stop(if self.shared { Ends::Service } else { Ends::Ours });
        let bound = self.now + self.limits.stop + Duration::from_secs(1);
        if !self.until(bound, |world| world.policy.is_none()) {
            self.breaks("a stop does not end");
        }
        if self.engines.iter().any(|engine| engine.alive || engine.leaves) {
            self.breaks("a stop leaves something behind");
        }
        let lived = self.now.duration_since(self.begun);
        Outcome { steps: self.steps, lived, faults: self.faults, broken: self.broken }
    }

    /// Goes on until then, or until this holds: whether it does.
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
            if at_once > SPIN {
                self.breaks("time stands still");
            }
            self.now = self.now.max(at);
            match self.agenda.peek() {
                Some(Reverse(next)) if next.at <= self.now => {
                    if let Some(Reverse(Scheduled { what, .. })) = self.agenda.pop() {
                        self.happen(what);
                    }
                }
                _ => self.handle(Event::Timer),
            }
            self.clients.retain(|client| client.deadline > self.now);
        }
        true
    }

    /// From now on everything works, but for what hangs already.
    fn make_peace(&mut self) {
        self.calm = true;
        // The last fault is often a hang.
        let last = self.disk.filter(|index| self.engines[*index].told && self.engines[*index].alive);
        if let Some(index) = last.filter(|_| self.dice.often(200)) {
            (self.engines[index].silent, self.engines[index].busy_throughout) = (true, false);
        }
        (self.disk_fails, self.lacks, self.no_binary) = (false, false, false);
        for (index, engine) in self.engines.iter_mut().enumerate() {
            (engine.unkillable, engine.too_large, engine.swallows) = (false, false, 0);
            // Whose service it is mends its password.
            engine.refuses &= !self.shared;
            if engine.alive && engine.doomed {
                self.number += 1;
                let what = Happening::End(index);
                self.agenda.push(Reverse(Scheduled { at: self.now, number: self.number, what }));
            }
        }
        // A daemon on its way out is followed by another anyway.
        if self.policy.is_none() {
            self.at(Duration::ZERO, Happening::Daemon);
        }
        // Whoever needs opencode asks again, as people do.
        for minute in 0..RECOVERY.as_secs() / 60 {
            self.at(Duration::from_secs(60 * minute + 1), Happening::Person);
        }
    }

    // --- Bookkeeping ---

    fn at(&mut self, after: Duration, what: Happening) {
        self.number += 1;
        self.agenda.push(Reverse(Scheduled { at: self.now + after, number: self.number, what }));
    }

    /// A message to the daemon of now.
    fn message(&mut self, after: Duration, event: Event) {
        self.pending += 1;
        self.at(after, Happening::Message(self.daemon, event));
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

    fn breaks(&mut self, promise: &str) {
        if self.broken.is_none() {
            let at = self.now.duration_since(self.begun).as_secs_f64();
            let history: Vec<_> = self.history.iter().map(String::as_str).collect();
            self.broken = Some(format!("{promise}, at {at:.3} s\n{}", history.join("\n")));
        }
    }
}

mod doing;
mod happening;
mod instances;
