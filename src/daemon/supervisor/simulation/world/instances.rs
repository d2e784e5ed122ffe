//! The account of instances in the world: requests that load them, turns that run in them, and
//! evictions, with the same steps as the threads around the account.

use super::*;
use crate::daemon::instances::account::{Entry, Eviction, Next, Outcome as Evicted, Turn};

/// The workspaces of this world.
pub(super) const DIRECTORIES: [&str; 3] = ["/a", "/b", "/c"];
/// Unused for so long, an instance is evicted: short, so that many are.
pub(super) const IDLE_TTL: Duration = Duration::from_secs(60);

/// A request that has entered.
pub(super) struct Request {
    directory: usize,
    /// The opencode that it was sent to.
    sent: Option<u64>,
    replied: bool,
}

/// What happens to requests, turns and evictions.
pub(super) enum Step {
    /// A client asks for an instance.
    Ask(usize),
    /// opencode answers a request.
    Reply(u64),
    /// A request is over.
    Leave(u64),
    /// A turn ends.
    TurnEnds(usize, usize),
    /// opencode is asked whether a session runs there.
    AskWhetherBusy(Eviction),
    /// The instance has been disposed.
    Disposed(Eviction, Instant),
    /// [`Account::first_due`] has come.
    Due,
}

impl World {
    /// The account of a daemon, which has found or launched this opencode.
    pub(super) fn account_begins(&mut self, generation: u64, adopted: bool) {
        let Some(index) = self.held else { return };
        let loaded: Vec<_> = (0..DIRECTORIES.len())
            .filter(|at| adopted && self.engines[index].loaded[*at])
            .map(|at| (DIRECTORIES[at].to_owned(), true))
            .collect();
        self.account.begin(generation, loaded, self.now);
        self.look_at_account();
    }

    /// The account of an opencode that has ended.
    pub(super) fn account_ends(&mut self, generation: u64) {
        self.account.ended(generation, None, "", self.now);
    }

    /// Evicts what is due, and comes back when the next is.
    pub(super) fn look_at_account(&mut self) {
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

    /// A step that ends with this daemon.
    pub(super) fn step(&mut self, after: Duration, step: Step) {
        self.at(after, Happening::Instance(self.daemon, step));
    }

    pub(super) fn instance(&mut self, step: Step) {
        match step {
            Step::Ask(directory) => self.ask_instance(directory),
            Step::Reply(number) => self.reply(number),
            Step::Leave(number) => {
                if let Some(request) = self.requests.remove(&number) {
                    let unanswered = request.sent.filter(|_| !request.replied);
                    self.account.leave(DIRECTORIES[request.directory], unanswered, self.now);
                    self.look_at_account();
                }
            }
            Step::TurnEnds(index, directory) => {
                self.engines[index].turns[directory] = false;
                let generation = self.policy.as_ref().map_or(0, Policy::generation);
                if self.held == Some(index) && self.watched == Some(generation) {
                    // Its event stream says that a session is idle now.
                    let used = crate::daemon::instances::account::Sign::Used;
                    self.account.told(generation, DIRECTORIES[directory], used, || true, self.now);
                    self.look_at_account();
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
                        self.breaks("an eviction cuts a request");
                    }
                    self.engines[index].loaded[directory] = false;
                }
                self.account.disposed(eviction.generation, &eviction.directory, since, done, self.now);
                self.account.evicted(&eviction, if done { Evicted::Disposed } else { Evicted::Failed }, self.now);
                self.look_at_account();
            }
            Step::Due => {
                self.account_due = None;
                self.look_at_account();
            }
        }
    }

    /// A client asks for an instance: it waits while that is being disposed, and for opencode.
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
        if self.dice.often(500) && !self.engines[index].turns[directory] {
            self.count("a turn");
            self.engines[index].turns[directory] = true;
            let after = self.dice.time(1000, 600_000);
            // A turn is opencode's: it outlives its daemon.
            self.at(after, Happening::TurnEnds(index, directory));
        }
        self.look_at_account();
    }

    /// An eviction asks before it disposes.
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
                    self.breaks("an eviction cuts a turn");
                }
                self.count("an eviction");
                let since = self.account.dispose(&eviction.directory, self.now);
                let after = self.dice.time(1, 3000);
                return self.step(after, Step::Disposed(eviction, since));
            }
        };
        self.account.evicted(&eviction, outcome, self.now);
        self.look_at_account();
    }
}

fn index_of(eviction: &Eviction) -> usize {
    DIRECTORIES.iter().position(|directory| *directory == eviction.directory).expect("a directory of this world")
}
