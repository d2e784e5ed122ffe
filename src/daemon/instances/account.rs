//! The account of instances: which are loaded, in use or due for eviction, and which are suspected of killing
//! opencode.
//!
//! Pure: no clock, thread, lock or socket. Callers report events with their times, carry out what
//! [`Account::next`] asks for, and report the outcome with [`Account::evicted`]. Reports about another
//! opencode than the current one (its *generation*) are dropped.
//!
//! The life of an instance in the reports of a caller:
//!
//! ```text
//! begin                          a new opencode, and the instances it has loaded
//!   enter                        a request for the instance arrives; it waits while Entry::Wait
//!     send                       the request goes to opencode; it waits while Turn::Wait
//!       replied                  opencode answers: the instance is loaded
//!   leave                        the request is over
//!   observe                      an event of opencode: any client loaded, used or disposed the instance
//!   listed                       opencode's own list of loaded instances, if it has one
//!   next → Evict … evicted       the instance was idle for too long
//!   dispose … disposed           our own disposal, for an eviction or for a user
//! ended                          opencode has ended, and its instances with it
//! ```
//!
//! Invariants: an instance with a request under way is not evicted; a request waits while its instance is
//! being disposed; only loaded instances of present or former workspaces are evicted; a loaded instance stays
//! in the account until it is disposed.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::fence::{Fence, Fences};
pub use crate::daemon::engine::Sign;

/// Concurrent evictions: enough that one slow language server does not delay the others, and few enough that
/// a hundred instances that are due together do not flood opencode.
const EVICTIONS: usize = 4;
/// The pause after a failed eviction: opencode was not ready or did not answer.
const RETRY: Duration = Duration::from_secs(30);
/// A load within this time after an eviction is a revival: a client attached directly to opencode reloads the
/// instance within some 4 s; a returning person takes longer.
pub const REVIVAL_TIME: Duration = Duration::from_secs(10);
/// How often revivals double the idle time of an instance, at most: 30 minutes become 32 hours.
const MAX_DOUBLINGS: u32 = 6;
/// How long after our own disposal its event may arrive: opencode first sends the earlier events of the
/// instance.
const EVENT_DELAY: Duration = Duration::from_secs(10);
/// How long other instances wait while a suspect is loaded, and a suspect while others are: loading takes 10
/// s at most, unless something is wrong.
pub const SUSPECT_WAIT: Duration = Duration::from_secs(10);
/// How long an instance may still be loading after its client has gone.
const ORPHANED: Duration = Duration::from_secs(10);
/// How many ends are remembered: on a busy machine the next opencode may run, or have ended, before the thread
/// of a failed request asks how its own ended.
const ENDS_LIMIT: usize = 8;

/// Whether a request may go on to its instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The request counts as use until it leaves.
    Entered,
    /// The instance is being disposed: try again afterwards.
    Wait,
}

/// Whether a request that loads an instance may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The request counts as sent.
    Go,
    /// A suspect is loaded alone: try again at that time, or after a reply.
    Wait(Instant),
    /// The opencode that it was meant for has ended.
    Over,
    /// The workspace is fenced.
    Fenced,
}

/// The next action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing, until something happens.
    Nothing,
    /// Look again at that time.
    At(Instant),
    /// Carry out this eviction, and report its outcome.
    Evict(Eviction),
}

/// An eviction under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Eviction {
    /// The opencode it is about.
    pub generation: u64,
    /// The directory of the instance.
    pub directory: String,
    /// When it was decided.
    pub since: Instant,
}

/// Reports the outcome of an eviction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The instance has been disposed.
    Disposed,
    /// A session is running, which counts as use.
    Busy,
    /// The instance was not loaded after all.
    Absent,
    /// opencode could not be asked, or refused.
    Failed,
}

/// Why opencode ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// A verb phrase: `ended with exit status: 1`.
    pub how: String,
    /// Its last lines of output; may be empty.
    pub output: String,
}

/// The end of an opencode.
#[derive(Clone, Debug)]
pub struct End {
    /// Which one.
    pub generation: u64,
    /// `None` when openwork ended it.
    pub failure: Option<Failure>,
    /// The directories whose instances were being loaded.
    pub loading: Vec<String>,
}

/// How an instance is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Whether it is loaded.
    pub loaded: bool,
    /// Requests under way, streams among them.
    pub streams: usize,
    /// When it is due to be evicted; none while in use, or never.
    pub due: Option<Instant>,
}

/// The load state of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    Cold,
    /// A request through openwork that loads it was sent at this time; no reply yet.
    Loading(Instant),
    /// An event mentioned it at this time: a direct client has loaded it, or is loading it.
    Reported(Instant),
    /// It has answered a request.
    Loaded,
}

#[derive(Debug)]
struct Instance {
    load: Load,
    /// When a request that loads it was last sent.
    sent: Option<Instant>,
    /// When a client last abandoned such a request before the reply.
    given_up: Option<Instant>,
    /// Requests sent to this opencode and not answered yet.
    unanswered: usize,
    /// Requests under way, streams among them.
    streams: usize,
    /// Disposals and evictions under way, for which requests wait.
    held: usize,
    evicting: bool,
    /// Its directory is a workspace, or was one while the instance was loaded.
    ours: bool,
    used: Instant,
    /// The earliest time for the next eviction.
    not_before: Option<Instant>,
    /// How often its idle time is doubled.
    doublings: u32,
}

impl Instance {
    fn new(now: Instant) -> Instance {
        Instance {
            load: Load::Cold,
            sent: None,
            given_up: None,
            unanswered: 0,
            streams: 0,
            held: 0,
            evicting: false,
            ours: false,
            used: now,
            not_before: None,
            doublings: 0,
        }
    }

    fn is_loaded(&self) -> bool {
        self.load != Load::Cold
    }

    /// Whether a request of ours is loading it at this time.
    fn is_loading(&self, now: Instant) -> bool {
        let is_wanted = self.unanswered > 0 || self.given_up.is_some_and(|at| now.duration_since(at) < ORPHANED);
        matches!(self.load, Load::Loading(_)) && is_wanted
    }
}

/// The account. See the module documentation.
pub struct Account {
    idle_ttl: Option<Duration>,
    generation: u64,
    /// The last ends, oldest first.
    ends: VecDeque<End>,
    instances: HashMap<String, Instance>,
    /// Our own disposals, with their start: opencode also sends an event for each, perhaps only after the
    /// instance is loaded again.
    own_disposals: Vec<(String, Instant)>,
    /// When our own disposal of a directory last ended: a list that was requested before does not reflect it.
    disposed: HashMap<String, Instant>,
    /// Recently evicted directories: when, and how often their idle time had been doubled.
    evicted: HashMap<String, (Instant, u32)>,
    fences: Fences,
    /// Counts the changes of what is loaded.
    revision: u64,
}

impl Account {
    /// An empty account. An instance unused for `idle_ttl` is evicted; never when absent.
    pub fn new(idle_ttl: Option<Duration>, fences: Fences) -> Account {
        Account {
            idle_ttl,
            generation: 0,
            ends: VecDeque::new(),
            instances: HashMap::new(),
            own_disposals: Vec::new(),
            disposed: HashMap::new(),
            evicted: HashMap::new(),
            fences,
            revision: 0,
        }
    }

    // --- opencode ---

    /// Another opencode was started or adopted, with these loaded instances, and whether each is ours.
    pub fn begin(&mut self, generation: u64, loaded: impl IntoIterator<Item = (String, bool)>, now: Instant) {
        self.generation = generation;
        self.clear(now);
        for (directory, ours) in loaded {
            let instance = self.instances.entry(directory).or_insert_with(|| Instance::new(now));
            (instance.load, instance.ours) = (Load::Loaded, ours);
        }
        self.revision += 1;
    }

    /// opencode has ended. With a failure it ended by itself, and instances that were being loaded become
    /// suspects. Returns the directories that are now fenced.
    pub fn ended(
        &mut self,
        generation: u64,
        failure: Option<Failure>,
        version: &str,
        now: Instant,
    ) -> Vec<(String, Fence)> {
        if generation != self.generation || self.is_over() {
            return Vec::new();
        }
        let of = |is: &dyn Fn(&Instance) -> bool| -> Vec<String> {
            self.instances.iter().filter(|(_, i)| is(i)).map(|(directory, _)| directory.clone()).collect()
        };
        let loading = if failure.is_some() { of(&|i| i.is_loading(now)) } else { Vec::new() };
        let recently_reported =
            |i: &Instance| matches!(i.load, Load::Reported(at) if now.duration_since(at) < SUSPECT_WAIT);
        let certain = loading.len() == 1 && of(&recently_reported).is_empty();
        let mut fenced = Vec::new();
        if let Some(Failure { how, output }) = &failure {
            let output = if output.is_empty() { format!("opencode {how}") } else { output.clone() };
            let fence = Fence { version: version.to_owned(), output };
            let directories = self.fences.died(&loading, certain, &fence, now);
            fenced = directories.into_iter().map(|directory| (directory, fence.clone())).collect();
        }
        if self.ends.len() == ENDS_LIMIT {
            self.ends.pop_front();
        }
        self.ends.push_back(End { generation, failure, loading });
        self.clear(now);
        self.revision += 1;
        fenced
    }

    /// How this opencode ended, if it has.
    pub fn end_of(&self, generation: u64) -> Option<&End> {
        self.ends.iter().find(|end| end.generation == generation)
    }

    /// The current opencode.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    fn is_over(&self) -> bool {
        self.end_of(self.generation).is_some()
    }

    /// Marks everything as not loaded; requests and disposals under way stay in the account.
    fn clear(&mut self, now: Instant) {
        self.own_disposals.clear();
        self.disposed.clear();
        self.evicted.clear();
        self.instances.retain(|_, instance| {
            let Instance { streams, held, evicting, ours, .. } = *instance;
            *instance = Instance { streams, held, evicting, ours, ..Instance::new(now) };
            streams > 0 || held > 0
        });
    }

    // --- Requests ---

    /// A request for the instance of a workspace begins.
    pub fn enter(&mut self, directory: &str, now: Instant) -> Entry {
        let instance = self.instances.entry(directory.to_owned()).or_insert_with(|| Instance::new(now));
        if instance.held > 0 {
            return Entry::Wait;
        }
        self.enter_anyway(directory, now);
        Entry::Entered
    }

    /// A request begins although its instance is being disposed, because that takes too long.
    pub fn enter_anyway(&mut self, directory: &str, now: Instant) {
        let instance = self.instances.entry(directory.to_owned()).or_insert_with(|| Instance::new(now));
        instance.streams += 1;
        instance.used = now;
        self.register(directory);
    }

    /// A request that has entered is about to be sent to this opencode, and loads the instance.
    pub fn send(&mut self, generation: u64, directory: &str, now: Instant) -> Turn {
        if generation != self.generation || self.is_over() {
            return Turn::Over;
        }
        if self.fences.get(directory).is_some() {
            return Turn::Fenced;
        }
        let before = self.instances.get(directory).map_or(Load::Cold, |instance| instance.load);
        if before == Load::Cold {
            if let Some(until) = self.turn_at(directory, now) {
                return Turn::Wait(until);
            }
        }
        let instance = self.instances.entry(directory.to_owned()).or_insert_with(|| Instance::new(now));
        instance.unanswered += 1;
        instance.sent = Some(now);
        if before == Load::Cold {
            instance.load = Load::Loading(now);
            // A request through openwork is no revival by a direct client.
            instance.doublings = 0;
            self.evicted.remove(directory);
            self.revision += 1;
        }
        Turn::Go
    }

    /// When an instance may be loaded, if not now.
    fn turn_at(&self, directory: &str, now: Instant) -> Option<Instant> {
        let suspect = self.fences.is_suspect(directory, now);
        let loading = self.instances.iter().filter(|(other, i)| *other != directory && i.is_loading(now));
        loading
            .filter(|(other, _)| suspect || self.fences.is_suspect(other, now))
            .filter_map(|(_, instance)| match instance.load {
                Load::Loading(since) => Some(since + SUSPECT_WAIT),
                Load::Cold | Load::Reported(_) | Load::Loaded => None,
            })
            .filter(|until| *until > now)
            .max()
    }

    /// opencode has begun to answer a request that was sent: its instance is loaded. Returns whether it
    /// was being loaded, for which requests to other instances may wait.
    pub fn replied(&mut self, generation: u64, directory: &str) -> bool {
        let Some(instance) = self.current(generation, directory) else { return false };
        instance.unanswered = instance.unanswered.saturating_sub(1);
        let was_loading = matches!(instance.load, Load::Loading(_) | Load::Reported(_));
        if was_loading {
            instance.load = Load::Loaded;
            self.fences.loaded(directory);
        }
        was_loading
    }

    /// A request is over. `unanswered`: the generation that it was sent to without a reply.
    pub fn leave(&mut self, directory: &str, unanswered: Option<u64>, now: Instant) {
        if let Some(instance) = unanswered.and_then(|generation| self.current(generation, directory)) {
            instance.unanswered = instance.unanswered.saturating_sub(1);
            instance.given_up = Some(now);
        }
        if let Some(instance) = self.instances.get_mut(directory) {
            instance.streams = instance.streams.saturating_sub(1);
            instance.used = now;
        }
        self.forget_unused(directory);
    }

    /// Counts as use of an instance.
    pub fn touch(&mut self, directory: &str, now: Instant) {
        if let Some(instance) = self.instances.get_mut(directory) {
            instance.used = now;
        }
    }

    /// A directory is a workspace. Its instance stays ours after the workspace is removed.
    pub fn register(&mut self, directory: &str) {
        if let Some(instance) = self.instances.get_mut(directory) {
            if !std::mem::replace(&mut instance.ours, true) && instance.is_loaded() {
                self.revision += 1;
            }
        }
    }

    /// An instance of the current opencode.
    fn current(&mut self, generation: u64, directory: &str) -> Option<&mut Instance> {
        let is_current = generation == self.generation && !self.is_over();
        self.instances.get_mut(directory).filter(|_| is_current)
    }

    /// Drops the entry of an instance that is neither loaded nor in use.
    fn forget_unused(&mut self, directory: &str) {
        let is_unused = |instance: &Instance| !instance.is_loaded() && instance.streams == 0 && instance.held == 0;
        if self.instances.get(directory).is_some_and(is_unused) {
            self.instances.remove(directory);
        }
    }

    // --- Events and lists of opencode ---

    /// An event of opencode about an instance. `ours` is called when the account does not know whether the
    /// directory is a workspace.
    pub fn observe(&mut self, generation: u64, directory: &str, sign: Sign, ours: impl FnOnce() -> bool, now: Instant) {
        if generation != self.generation || self.is_over() {
            return;
        }
        match sign {
            Sign::Disposed => self.observe_disposed(directory, now),
            Sign::Alive | Sign::Used => {
                self.found(directory, ours, now);
                if let (Sign::Used, Some(instance)) = (sign, self.instances.get_mut(directory)) {
                    instance.used = now;
                    instance.load = Load::Loaded;
                }
            }
        }
    }

    /// An instance was found to be loaded.
    fn found(&mut self, directory: &str, ours: impl FnOnce() -> bool, now: Instant) {
        let instance = self.instances.entry(directory.to_owned()).or_insert_with(|| Instance::new(now));
        if instance.is_loaded() {
            return;
        }
        instance.load = Load::Reported(now);
        instance.ours = instance.ours || ours();
        instance.used = now;
        instance.not_before = None;
        if let Some((evicted_at, doublings)) = self.evicted.remove(directory) {
            let revived = now.duration_since(evicted_at) < REVIVAL_TIME;
            instance.doublings = if revived { (doublings + 1).min(MAX_DOUBLINGS) } else { 0 };
        }
        self.revision += 1;
    }

    fn observe_disposed(&mut self, directory: &str, now: Instant) {
        let own = self.own_disposals.iter().position(|(own, _)| own == directory);
        match own.map(|own| self.own_disposals.swap_remove(own)) {
            // Apply our disposal again: earlier events of the instance have marked it as loaded meanwhile.
            Some((_, since)) => self.gone(directory, since),
            None => {
                if let Some(instance) = self.instances.get_mut(directory) {
                    // A request under way may be loading it again.
                    let load = if instance.unanswered > 0 { Load::Loading(now) } else { Load::Cold };
                    self.set_load(directory, load);
                }
            }
        }
    }

    /// An instance was disposed by a disposal that began at `since`; a request sent later has loaded it
    /// again.
    fn gone(&mut self, directory: &str, since: Instant) {
        if self.instances.get(directory).is_some_and(|instance| instance.sent.is_none_or(|sent| sent <= since)) {
            self.set_load(directory, Load::Cold);
        }
    }

    fn set_load(&mut self, directory: &str, load: Load) {
        if let Some(instance) = self.instances.get_mut(directory) {
            let before = instance.is_loaded();
            instance.load = load;
            if before != instance.is_loaded() {
                self.revision += 1;
            }
        }
        self.forget_unused(directory);
    }

    /// opencode's own list of loaded instances, requested at `asked`. Only 2.x has one.
    pub fn listed(
        &mut self,
        generation: u64,
        directories: &[String],
        asked: Instant,
        ours: impl Fn(&str) -> bool,
        now: Instant,
    ) {
        if generation != self.generation || self.is_over() {
            return;
        }
        let is_settled = |account: &Account, directory: &str| {
            let is_held = account.instances.get(directory).is_some_and(|instance| instance.held > 0);
            !is_held && account.disposed.get(directory).is_none_or(|at| *at <= asked)
        };
        for directory in directories {
            if is_settled(self, directory) {
                self.found(directory, || ours(directory), now);
            }
        }
        // An instance first mentioned after the request may be missing from the list.
        let reported_before = |load: Load| !matches!(load, Load::Reported(at) if at > asked);
        let absent = |(directory, instance): (&String, &Instance)| {
            let is_absent = instance.is_loaded() && reported_before(instance.load) && !directories.contains(directory);
            is_absent.then(|| directory.clone())
        };
        for directory in self.instances.iter().filter_map(absent).collect::<Vec<_>>() {
            if self.instances.get(&directory).is_some_and(|instance| instance.unanswered == 0) {
                self.gone(&directory, asked);
            }
        }
    }

    // --- Disposals and evictions ---

    /// Our own disposal begins: requests wait for it. Returns its start, for [`Account::disposed`].
    pub fn dispose(&mut self, directory: &str, now: Instant) -> Instant {
        self.own_disposals.retain(|(_, since)| now.duration_since(*since) < EVENT_DELAY);
        self.own_disposals.push((directory.to_owned(), now));
        self.instances.entry(directory.to_owned()).or_insert_with(|| Instance::new(now)).held += 1;
        now
    }

    /// Our own disposal is over.
    pub fn disposed(&mut self, generation: u64, directory: &str, since: Instant, done: bool, now: Instant) {
        if let Some(instance) = self.instances.get_mut(directory) {
            instance.held = instance.held.saturating_sub(1);
        }
        if done && generation == self.generation && !self.is_over() {
            self.gone(directory, since);
            self.disposed.retain(|_, at| now.duration_since(*at) < EVENT_DELAY);
            self.disposed.insert(directory.to_owned(), now);
        }
        self.forget_unused(directory);
    }

    /// When the next eviction is due, without starting it.
    pub fn first_due(&self) -> Option<Instant> {
        self.instances.values().filter(|instance| instance.held == 0).filter_map(|i| self.due(i)).min()
    }

    /// When an instance is due for eviction, unless it is used before.
    fn due(&self, instance: &Instance) -> Option<Instant> {
        let ttl = self.idle_ttl.filter(|_| instance.is_loaded() && instance.ours && instance.streams == 0)?;
        let due = instance.used + ttl.saturating_mul(1 << instance.doublings);
        Some(instance.not_before.map_or(due, |not_before| due.max(not_before)))
    }

    /// The next action. A returned eviction counts as started.
    pub fn next(&mut self, now: Instant) -> Next {
        let evicting = self.instances.values().filter(|instance| instance.evicting).count();
        let candidates = self.instances.iter().filter(|(_, instance)| instance.held == 0);
        let first = candidates.filter_map(|(directory, i)| Some((self.due(i)?, directory))).min();
        match first {
            None => Next::Nothing,
            Some((due, _)) if due > now => Next::At(due),
            // Checked again when one of them ends.
            Some(_) if evicting >= EVICTIONS => Next::Nothing,
            Some((_, directory)) => {
                let directory = directory.clone();
                if let Some(instance) = self.instances.get_mut(&directory) {
                    instance.held += 1;
                    instance.evicting = true;
                }
                Next::Evict(Eviction { generation: self.generation, directory, since: now })
            }
        }
    }

    /// Reports the outcome of an eviction.
    pub fn evicted(&mut self, eviction: &Eviction, outcome: Outcome, now: Instant) {
        let Eviction { generation, directory, since } = eviction;
        let retry = now + self.idle_ttl.unwrap_or(RETRY).min(RETRY);
        let is_current = *generation == self.generation && !self.is_over();
        let Some(instance) = self.instances.get_mut(directory) else { return };
        instance.held = instance.held.saturating_sub(1);
        instance.evicting = false;
        let doublings = instance.doublings;
        if is_current {
            match outcome {
                Outcome::Disposed => {
                    self.evicted.retain(|_, (at, _)| now.duration_since(*at) < REVIVAL_TIME);
                    self.evicted.insert(directory.clone(), (now, doublings));
                }
                Outcome::Busy => instance.used = now,
                Outcome::Absent => self.gone(directory, *since),
                Outcome::Failed => instance.not_before = Some(retry),
            }
        }
        self.forget_unused(directory);
    }

    // --- Queries ---

    /// Whether an instance is loaded.
    pub fn is_loaded(&self, directory: &str) -> bool {
        self.instances.get(directory).is_some_and(Instance::is_loaded)
    }

    /// How an instance is used.
    pub fn usage(&self, directory: &str) -> Usage {
        let Some(instance) = self.instances.get(directory) else { return Usage::default() };
        Usage { loaded: instance.is_loaded(), streams: instance.streams, due: self.due(instance) }
    }

    /// Every loaded instance, and whether its directory is or was a workspace.
    pub fn loaded(&self) -> impl Iterator<Item = (&String, bool)> {
        self.instances.iter().filter(|(_, i)| i.is_loaded()).map(|(directory, i)| (directory, i.ours))
    }

    /// A counter that changes with [`Account::loaded`].
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The fences around workspaces.
    pub fn fences(&mut self) -> &mut Fences {
        &mut self.fences
    }
}

#[cfg(test)]
#[path = "account_tests.rs"]
mod tests;
