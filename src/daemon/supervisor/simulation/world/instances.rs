//! Instances in the simulated world: requests load them, turns run in them, and the account evicts them, in
//! the same steps as the threads around the account.

use super::*;
use crate::daemon::instances::account::{Entry, Eviction, Next, Outcome as Evicted, Turn};

/// The directories of the simulated workspaces.
pub(super) const DIRECTORIES: [&str; 3] = ["/a", "/b", "/c"];
/// The idle time before an eviction: short, so that evictions are frequent.
pub(super) const IDLE_TTL: Duration = Duration::from_secs(60);

/// A request in progress.
pub(super) struct Request {
    directory: usize,
    /// The generation of opencode that the request was sent to.
    sent: Option<u64>,
    replied: bool,
}

/// A step of a request, a turn or an eviction.
pub(super) enum Step {
    /// A request for an instance arrives.
    Ask(usize),
    /// opencode answers a request.
    Reply(u64),
    /// A request is over.
    Leave(u64),
    /// A turn ends.
    TurnEnds(usize, usize),
    /// An eviction checks for running sessions.
    AskWhetherBusy(Eviction),
    /// The instance has been disposed.
    Disposed(Eviction, Instant),
    /// [`Account::first_due`] has come.
    Due,
}

impl World {
    /// The daemon has launched or adopted an opencode.
    pub(super) fn account_begins(&mut self, generation: u64, adopted: bool) {
        let Some(index) = self.held else { return };
        let loaded: Vec<_> = (0..DIRECTORIES.len())
            .filter(|at| adopted && self.engines[index].loaded[*at])
            .map(|at| (DIRECTORIES[at].to_owned(), true))
            .collect();
        self.account.begin(generation, loaded, self.now);
        self.evict_due();
    }

    /// The daemon's opencode has ended.
    pub(super) fn account_ends(&mut self, generation: u64) {
        self.account.ended(generation, None, "", self.now);
    }

    /// Begins the evictions that are due, and schedules the next check.
    pub(super) fn evict_due(&mut self) {
        loop {
            match self.account.next(self.now) {
                Next::Evict(eviction) => {
                    let after = self.dice.time(0, 30);
                    self.step(after, Step::AskWhetherBusy(eviction));
                }
                Next::At(at) => {
                    if self.account_due.is_none_or(|due| at < due || due <= self.now) {
                        self.account_due = Some(at);
                        self.step(at - self.now, Step::Due);
                    }
                    return;
                }
                Next::Nothing => return,
            }
        }
    }

    /// Schedules a step that a death of the daemon cancels.
    pub(super) fn step(&mut self, after: Duration, step: Step) {
        self.at(after, Occurrence::Instance(self.daemon, step));
    }

    pub(super) fn instance(&mut self, step: Step) {
        match step {
            Step::Ask(directory) => self.ask_instance(directory),
            Step::Reply(number) => self.reply(number),
            Step::Leave(number) => {
                if let Some(request) = self.requests.remove(&number) {
                    let unanswered = request.sent.filter(|_| !request.replied);
                    self.account.leave(DIRECTORIES[request.directory], unanswered, self.now);
                    self.evict_due();
                }
            }
            Step::TurnEnds(index, directory) => {
                self.engines[index].turns[directory] = false;
                let generation = self.policy.as_ref().map_or(0, Policy::generation);
                if self.held == Some(index) && self.watched == Some(generation) {
                    // The event stream reports that the session is idle.
                    let used = crate::daemon::instances::account::Sign::Used;
                    self.account.observe(generation, DIRECTORIES[directory], used, || true, self.now);
                    self.evict_due();
                }
            }
            Step::AskWhetherBusy(eviction) => self.ask_whether_busy(eviction),
            Step::Disposed(eviction, since) => {
                let directory = index_of(&eviction);
                let engine =
                    self.held.filter(|_| self.policy.as_ref().map(Policy::generation) == Some(eviction.generation));
                let done = engine.is_some_and(|index| self.engines[index].alive && !self.engines[index].silent);
                if let (Some(index), true) = (engine, done) {
                    if self.requests.values().any(|request| request.directory == directory && request.sent.is_some()) {
                        self.violates("an eviction cuts a request");
                    }
                    self.engines[index].loaded[directory] = false;
                }
                self.account.disposed(eviction.generation, &eviction.directory, since, done, self.now);
                self.account.evicted(&eviction, if done { Evicted::Disposed } else { Evicted::Failed }, self.now);
                self.evict_due();
            }
            Step::Due => {
                self.account_due = None;
                self.evict_due();
            }
        }
    }

    /// A request for an instance arrives; it waits while that instance is being disposed.
    fn ask_instance(&mut self, directory: usize) {
        let again = |world: &mut World| world.step(Duration::from_millis(200), Step::Ask(directory));
        let is_held = self.account.enter(DIRECTORIES[directory], self.now) == Entry::Wait;
        if is_held && self.bug != Some(Bug::DoesNotWait) {
            return again(self);
        }
        if is_held {
            self.account.enter_anyway(DIRECTORIES[directory], self.now);
        }
        self.number += 1;
        let number = self.number;
        let generation = self.policy.as_ref().map_or(0, Policy::generation);
        let is_ready = self.policy.as_ref().is_some_and(|policy| policy.phase() == Phase::Ready);
        let mut request = Request { directory, sent: None, replied: false };
        let stays = if is_ready { self.dice.time(10, 60_000) } else { Duration::ZERO };
        if is_ready && self.account.send(generation, DIRECTORIES[directory], self.now) == Turn::Go {
            request.sent = Some(generation);
            let after = self.dice.time(1, 500).min(stays);
            self.step(after, Step::Reply(number));
        }
        self.requests.insert(number, request);
        self.step(stays, Step::Leave(number));
    }

    /// opencode answers: the instance is loaded, and often a turn begins in it.
    fn reply(&mut self, number: u64) {
        let Some(index) = self.held.filter(|index| self.engines[*index].alive && !self.engines[*index].silent) else {
            return;
        };
        let generation = self.policy.as_ref().map_or(0, Policy::generation);
        let Some(request) = self.requests.get_mut(&number).filter(|request| request.sent == Some(generation)) else {
            return;
        };
        request.replied = true;
        let directory = request.directory;
        self.account.replied(generation, DIRECTORIES[directory]);
        self.engines[index].loaded[directory] = true;
        if self.dice.chance(500) && !self.engines[index].turns[directory] {
            self.count("a turn");
            self.engines[index].turns[directory] = true;
            let after = self.dice.time(1000, 600_000);
            // A turn runs in opencode, so it outlives the daemon.
            self.at(after, Occurrence::TurnEnds(index, directory));
        }
        self.evict_due();
    }

    /// An eviction checks for running sessions before it disposes the instance.
    fn ask_whether_busy(&mut self, eviction: Eviction) {
        let directory = index_of(&eviction);
        let is_ready = self
            .policy
            .as_ref()
            .is_some_and(|policy| policy.phase() == Phase::Ready && policy.generation() == eviction.generation);
        let engine = self.held.filter(|index| is_ready && self.engines[*index].alive && !self.engines[*index].silent);
        let outcome = match engine {
            None => Evicted::Failed,
            Some(index) if self.engines[index].turns[directory] && self.bug != Some(Bug::EvictsBusy) => Evicted::Busy,
            Some(index) => {
                if self.engines[index].turns[directory] {
                    self.violates("an eviction cuts a turn");
                }
                self.count("an eviction");
                let since = self.account.dispose(&eviction.directory, self.now);
                let after = self.dice.time(1, 3000);
                return self.step(after, Step::Disposed(eviction, since));
            }
        };
        self.account.evicted(&eviction, outcome, self.now);
        self.evict_due();
    }
}

fn index_of(eviction: &Eviction) -> usize {
    DIRECTORIES.iter().position(|directory| *directory == eviction.directory).expect("a directory of this world")
}
