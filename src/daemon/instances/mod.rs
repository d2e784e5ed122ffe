//! The instances of opencode: which are loaded and used, the eviction of idle ones, and the fences around
//! workspaces whose loading crashes opencode.
//!
//! opencode 1.x keeps every instance for ever, offers no list of them, and any question about an instance
//! loads it. So the daemon keeps an [`Account`], from the requests that it routes and from opencode's own
//! events, which include clients that call opencode directly. The account is written to the state file with
//! a delay, for a daemon that adopts this opencode. opencode 2.x has a list: the daemon requests it when an
//! event contradicts the account, and before each disposal. The account makes the decisions; this module
//! adds the lock, the clock and the threads.
//!
//! Invariant: no I/O while the lock is held.

pub(super) mod account;
pub(super) mod fence;
mod sessions;
mod turns;

use std::cell::Cell;
use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

pub use self::account::Failure;
use self::account::{Account, Entry, Eviction, Next, Outcome, Sign, Turn};
use self::fence::{Fence, Fences};
use self::turns::Turns;
use super::engine::{CallResult, Endpoint, InstanceEvent, InstanceRef, Step, TurnEvent};
use super::events::{EventKind, Events};
use super::supervisor::handle::Handle;
use crate::error::{Error, Result};
use crate::line::Line;
use crate::log::now_ms;
use crate::state::{FenceRecord, Store};
use crate::workspace::Workspace;

/// How long a request waits for a disposal under way: the time limit of a disposal, which mostly takes some
/// milliseconds.
const DISPOSAL_WAIT: Duration = Duration::from_secs(30);
/// The time limit for the lists of loaded instances and running sessions: opencode reads them from memory.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// The pause between an event and the request for the list: loading one instance sends some ninety events.
const LIST_PAUSE: Duration = Duration::from_millis(100);
/// The pause before the daemon subscribes again after the event stream broke off while opencode lives.
const LISTEN_PAUSE: Duration = Duration::from_secs(1);
/// The time limit for the head of the event stream.
const LISTEN_LIMIT: Duration = Duration::from_secs(10);
/// The longest event that is parsed; longer ones (a large diff) are skipped. Bytes.
const EVENT_LIMIT: u64 = 1024 * 1024;
/// How long the supervisor may take to report the end of opencode: a process that no longer listens is
/// probed for 5 s, and killed 5 s after TERM.
const BLAME_LIMIT: Duration = Duration::from_secs(15);
/// How far the monotonic and the wall clock may drift apart before due times are translated anew: too
/// little to notice, and more than the scheduler takes between two readings. Milliseconds.
const CLOCK_DRIFT: u64 = 100;

/// The instances of opencode.
pub struct Instances {
    store: &'static Store,
    events: &'static Events,
    inner: Mutex<Inner>,
    changed: Condvar,
    /// The directories of sessions. They outlive a restart of opencode.
    sessions: Mutex<HashMap<String, String>>,
    turns: Mutex<Turns>,
}

struct Inner {
    account: Account,
    /// The revision of the account that the store has.
    noted: u64,
    /// The last opencode whose end was reported, and its fences written.
    reported: u64,
    /// The version of opencode, once known.
    version: Option<String>,
    /// When the evicting thread wakes next; `None`: only when it is notified.
    next_wake: Option<Instant>,
    /// When to request opencode's list.
    list_at: Option<Instant>,
    clock: Clock,
}

/// The monotonic and the wall clock, read at the same moment.
#[derive(Clone, Copy)]
struct Clock {
    at: Instant,
    unix_ms: u64,
}

impl Clock {
    fn now() -> Clock {
        Clock { at: Instant::now(), unix_ms: now_ms() }
    }

    /// Translates a time to Unix milliseconds. The same time gives the same number until the wall clock is
    /// set or the machine has slept.
    fn unix_ms(&mut self, at: Instant) -> u64 {
        let now = Clock::now();
        let expected = self.unix_ms + now.at.duration_since(self.at).as_millis() as u64;
        if expected.abs_diff(now.unix_ms) > CLOCK_DRIFT {
            *self = now;
        }
        match at.checked_duration_since(self.at) {
            Some(later) => self.unix_ms + later.as_millis() as u64,
            None => self.unix_ms.saturating_sub(self.at.duration_since(at).as_millis() as u64),
        }
    }
}

/// The usage of an instance.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Whether the instance is loaded.
    pub loaded: bool,
    /// Requests in progress, streams among them.
    pub streams: usize,
    /// When the instance is due for eviction, Unix milliseconds; none while it is in use, or without an idle
    /// limit.
    pub evict_at: Option<u64>,
    /// Whether a fence prevents loading the instance.
    pub fenced: bool,
}

/// A request in progress; the instance counts as used until this is dropped.
pub struct Use<'a> {
    instances: &'a Instances,
    workspace: &'a Workspace,
    /// The opencode that the request was sent to, until it replies.
    unanswered: Cell<Option<u64>>,
}

impl Use<'_> {
    /// Call this before sending the request, which loads the instance, to this opencode. Waits while another
    /// instance must be loaded alone. Returns false when that opencode has ended.
    ///
    /// # Errors
    /// `workspace_fenced`; `opencode_timeout` at the deadline.
    pub fn loads(&self, generation: u64, deadline: Instant) -> Result<bool> {
        let directory = &self.workspace.path;
        let mut inner = self.instances.lock();
        loop {
            let now = Instant::now();
            match inner.account.send(generation, directory, now) {
                Turn::Go => {
                    self.unanswered.set(Some(generation));
                    self.instances.settle(&mut inner);
                    return Ok(true);
                }
                Turn::Over => return Ok(false),
                Turn::Fenced => return Err(fenced(&mut inner, self.workspace)),
                Turn::Wait(_) if now >= deadline => {
                    return Err(Error::OpencodeTimeout("was still loading another instance"));
                }
                Turn::Wait(until) => inner = self.instances.wait(inner, until.min(deadline)),
            }
        }
    }

    /// Call this when the reply begins.
    pub fn replied(&self) {
        if let Some(generation) = self.unanswered.take() {
            let mut inner = self.instances.lock();
            if inner.account.replied(generation, &self.workspace.path) {
                self.instances.changed.notify_all();
            }
        }
    }

    /// Call this when the connection to this opencode broke before a reply. If opencode crashed while the
    /// request loaded the instance, returns the error; the request must not be sent again then. `None` when
    /// opencode lives, when openwork stopped it, or when the instance was loaded before.
    pub fn blame(&self, supervisor: &Handle, endpoint: &Endpoint) -> Option<Error> {
        let deadline = Instant::now() + BLAME_LIMIT;
        let generation = self.unanswered.get().filter(|generation| *generation == endpoint.generation)?;
        if supervisor.survives(endpoint, deadline) {
            return None;
        }
        let mut inner = self.instances.lock();
        // The supervisor reports the end before it starts the next opencode.
        while inner.account.generation() == generation && inner.reported != generation && Instant::now() < deadline {
            inner = self.instances.wait(inner, deadline);
        }
        let directory = &self.workspace.path;
        let end = inner.account.end_of(generation)?;
        let failure = end.failure.clone().filter(|_| end.loading.contains(directory))?;
        if inner.account.fences().get(directory).is_some() {
            return Some(fenced(&mut inner, self.workspace));
        }
        let Failure { how, output } = failure;
        let mut why = format!("it {how} while it loaded the instance of {}", self.workspace.name);
        if !output.is_empty() {
            why.push_str(&format!("; its last output:\n{output}"));
        }
        Some(Error::OpencodeUnavailable(why))
    }
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        let mut inner = self.instances.lock();
        let unanswered = self.unanswered.take();
        inner.account.leave(&self.workspace.path, unanswered, Instant::now());
        if unanswered.is_some() {
            self.instances.changed.notify_all();
        }
        self.instances.settle(&mut inner);
    }
}

/// The error of a request for a fenced workspace.
fn fenced(inner: &mut Inner, workspace: &Workspace) -> Error {
    let output = inner.account.fences().get(&workspace.path).map(|fence| fence.output.clone());
    Error::WorkspaceFenced { workspace: workspace.name.clone(), output: output.unwrap_or_default() }
}

impl Instances {
    /// No instances yet, and the fences of the state file. An instance unused for `idle_ttl` is evicted;
    /// without `idle_ttl`, never.
    pub fn new(store: &'static Store, events: &'static Events, idle_ttl: Option<Duration>) -> Instances {
        let mut fences = Fences::default();
        fences.restore(store.snapshot().fences.iter().map(|record| {
            let FenceRecord { directory, version, output, .. } = record.clone();
            (directory, Fence { version, output })
        }));
        let account = Account::new(idle_ttl, fences);
        let noted = account.revision();
        let inner =
            Inner { account, noted, reported: 0, version: None, next_wake: None, list_at: None, clock: Clock::now() };
        Instances {
            store,
            events,
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            sessions: Mutex::default(),
            turns: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>, until: Instant) -> MutexGuard<'a, Inner> {
        let rest = until.saturating_duration_since(Instant::now());
        self.changed.wait_timeout(inner, rest).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Call this after a change of the account: passes the loaded instances to the store, and wakes the
    /// evicting thread if that has no due time. Using an instance postpones its due time, so a thread that
    /// has one need not be woken.
    fn settle(&self, inner: &mut Inner) {
        if inner.noted != inner.account.revision() {
            inner.noted = inner.account.revision();
            let (mut loaded, mut strangers) = (Vec::new(), Vec::new());
            for (directory, ours) in inner.account.loaded() {
                loaded.push(directory.clone());
                if !ours {
                    strangers.push(directory.clone());
                }
            }
            self.store.note_instances(loaded, strangers);
        }
        if inner.next_wake.is_none() && inner.account.first_due().is_some() {
            self.changed.notify_all();
        }
    }

    // --- The supervisor's reports ---

    /// Another opencode was started or adopted, with these loaded instances. `strangers` are those whose
    /// directory is no workspace; `None` in a state file of an earlier version.
    pub fn begin(&self, generation: u64, loaded: Vec<String>, strangers: Option<&[String]>) {
        let state = self.store.snapshot();
        let loaded = loaded.into_iter().map(|directory| {
            let ours = match strangers {
                Some(strangers) => !strangers.contains(&directory),
                None => state.local_at(&directory).is_some(),
            };
            (directory, ours)
        });
        turns::lock(&self.turns).begin();
        let mut inner = self.lock();
        inner.account.begin(generation, loaded, Instant::now());
        // The state file already has these instances.
        inner.noted = inner.account.revision();
        self.settle(&mut inner);
        self.changed.notify_all();
    }

    /// Records the version of opencode, and lifts the fences that another version caused.
    pub fn version_is(&self, version: &str) {
        let mut inner = self.lock();
        inner.version = Some(version.to_owned());
        let lifted = inner.account.fences().version_is(version);
        drop(inner);
        if lifted {
            crate::log!("opencode has another version: lifted the fences around workspaces");
            self.write_fences();
        }
    }

    /// opencode has ended; `failure` is `None` when openwork stopped it.
    pub fn ended(&self, generation: u64, failure: Option<Failure>) {
        let mut inner = self.lock();
        let version = inner.version.clone().unwrap_or_default();
        let fenced = inner.account.ended(generation, failure, &version, Instant::now());
        inner.noted = inner.account.revision();
        drop(inner);
        // Fences are on disk before their events are published.
        if !fenced.is_empty() {
            self.write_fences();
        }
        self.lock().reported = generation;
        self.changed.notify_all();
        let state = self.store.snapshot();
        for (directory, Fence { output, .. }) in fenced {
            let workspace = state.local_at(&directory);
            let workspace_id = workspace.map(|workspace| workspace.id.clone());
            crate::log!("fenced {directory}: opencode ended twice while loading it");
            self.events.publish(EventKind::InstanceFenced { workspace_id, directory, output });
        }
    }

    /// Writes the fences to the state file. They hold in this daemon even if that fails.
    fn write_fences(&self) {
        let written = self.store.update(|state| {
            // Read inside the update: updates are serialised, so the last one writes the latest fences.
            let mut inner = self.lock();
            let before = std::mem::take(&mut state.fences);
            let all = inner.account.fences().all();
            state.fences = all
                .map(|(directory, fence)| {
                    let known =
                        before.iter().find(|known| known.directory == *directory && known.output == fence.output);
                    known.cloned().unwrap_or_else(|| FenceRecord {
                        directory: directory.clone(),
                        version: fence.version.clone(),
                        output: fence.output.clone(),
                        fenced_at: now_ms(),
                        extra: serde_json::Map::new(),
                    })
                })
                .collect();
            Ok(())
        });
        if let Err(e) = written {
            crate::log!("{e}");
        }
    }

    // --- Requests ---

    /// Refuses requests that need the instance of a fenced workspace before they cost anything. Refuses none
    /// while the version of opencode is unknown, since a new version lifts the fence.
    ///
    /// # Errors
    /// `workspace_fenced`.
    pub fn check_fence(&self, workspace: &Workspace) -> Result<()> {
        let mut inner = self.lock();
        match inner.version.is_some() && inner.account.fences().get(&workspace.path).is_some() {
            true => Err(fenced(&mut inner, workspace)),
            false => Ok(()),
        }
    }

    /// Lifts the fence of a directory; returns whether there was one.
    pub fn reset(&self, directory: &str) -> bool {
        let was_fenced = self.lock().account.fences().reset(directory);
        if was_fenced {
            self.write_fences();
        }
        was_fenced
    }

    /// Begins a request for the instance of a workspace, after a disposal under way.
    ///
    /// # Errors
    /// `opencode_timeout` at the deadline.
    pub fn enter<'a>(&'a self, workspace: &'a Workspace, deadline: Instant) -> Result<Use<'a>> {
        let wait_until = Instant::now() + DISPOSAL_WAIT;
        let mut inner = self.lock();
        loop {
            let now = Instant::now();
            match inner.account.enter(&workspace.path, now) {
                Entry::Entered => break,
                Entry::Wait if now >= deadline => {
                    return Err(Error::OpencodeTimeout("did not dispose the instance"));
                }
                Entry::Wait if now >= wait_until => {
                    inner.account.enter_anyway(&workspace.path, now);
                    break;
                }
                Entry::Wait => inner = self.wait(inner, wait_until.min(deadline)),
            }
        }
        self.settle(&mut inner);
        Ok(Use { instances: self, workspace, unanswered: Cell::new(None) })
    }

    /// Counts as use of an instance.
    pub fn touch(&self, directory: &str) {
        self.lock().account.touch(directory, Instant::now());
    }

    /// A directory is a workspace, or was until now: its instance may be evicted.
    pub fn register(&self, directory: &str) {
        let mut inner = self.lock();
        inner.account.register(directory);
        self.settle(&mut inner);
    }

    /// Disposes an instance, while requests for it wait.
    ///
    /// # Errors
    /// Those of the call.
    pub fn dispose(&self, endpoint: &Endpoint, directory: &str, deadline: Instant) -> CallResult<()> {
        let since = self.lock().account.dispose(directory, Instant::now());
        let result = endpoint.dispose(Path::new(directory), deadline);
        let mut inner = self.lock();
        inner.account.disposed(endpoint.generation, directory, since, result.is_ok(), Instant::now());
        // A client may have loaded it again before opencode replied.
        self.list_soon(&mut inner, endpoint);
        self.settle(&mut inner);
        self.changed.notify_all();
        result
    }

    // --- Questions to opencode ---

    /// The line of opencode, once known.
    pub fn line(&self) -> Option<Line> {
        self.lock().version.as_deref().and_then(Line::of)
    }

    /// Updates the account from opencode's list of loaded instances, if it has one.
    ///
    /// # Errors
    /// Those of the call.
    pub fn list(&self, endpoint: &Endpoint, deadline: Instant) -> CallResult<()> {
        let asked = Instant::now();
        let Some(directories) = endpoint.loaded(deadline)? else { return Ok(()) };
        let state = self.store.snapshot();
        let ours = |directory: &str| state.local_at(directory).is_some();
        let mut inner = self.lock();
        inner.account.listed(endpoint.generation, &directories, asked, ours, Instant::now());
        self.settle(&mut inner);
        Ok(())
    }

    /// Whether an instance is loaded.
    pub fn is_loaded(&self, directory: &str) -> bool {
        self.lock().account.is_loaded(directory)
    }

    /// The directories whose instances are loaded, workspaces or not.
    pub fn loaded(&self) -> Vec<String> {
        self.lock().account.loaded().map(|(directory, _)| directory.clone()).collect()
    }

    /// Whether an instance is loaded in this opencode.
    pub fn is_loaded_in(&self, generation: u64, directory: &str) -> bool {
        let inner = self.lock();
        inner.account.generation() == generation && inner.account.is_loaded(directory)
    }

    /// The usage of an instance.
    pub fn usage(&self, directory: &str) -> Usage {
        let mut inner = self.lock();
        let account::Usage { loaded, streams, due } = inner.account.usage(directory);
        let evict_at = due.map(|due| inner.clock.unix_ms(due));
        let fenced = inner.account.fences().get(directory).is_some();
        Usage { loaded, streams, evict_at, fenced }
    }

    // --- Eviction ---

    /// Evicts instances as they become due, for as long as the daemon lives.
    pub fn evict(&'static self, supervisor: &'static Handle) {
        let mut inner = self.lock();
        loop {
            let now = Instant::now();
            if inner.list_at.is_some_and(|at| at <= now) {
                inner.list_at = None;
                drop(inner);
                if let Some(endpoint) = supervisor.ready_now() {
                    // After a failure, the next event causes another request.
                    let _ = self.list(&endpoint, now + ASK_LIMIT);
                }
                inner = self.lock();
                continue;
            }
            let next = match inner.account.next(now) {
                Next::Evict(eviction) => {
                    drop(inner);
                    let shared = eviction.clone();
                    // In a thread of its own, since a slow eviction must not delay the others.
                    if Builder::new().spawn(move || self.evict_one(supervisor, &shared)).is_err() {
                        self.evict_one(supervisor, &eviction);
                    }
                    inner = self.lock();
                    continue;
                }
                Next::At(at) => Some(at),
                Next::Nothing => None,
            };
            inner.next_wake = next;
            inner = match [next, inner.list_at].into_iter().flatten().min() {
                Some(at) => self.wait(inner, at),
                None => self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn evict_one(&self, supervisor: &Handle, eviction: &Eviction) {
        let outcome = self.try_to_evict(supervisor, eviction);
        let mut inner = self.lock();
        inner.account.evicted(eviction, outcome, Instant::now());
        self.settle(&mut inner);
        self.changed.notify_all();
    }

    /// Disposes an instance, unless a session is running in it.
    fn try_to_evict(&self, supervisor: &Handle, eviction: &Eviction) -> Outcome {
        let Eviction { generation, directory, .. } = eviction;
        let Some(endpoint) = supervisor.ready_in(*generation) else { return Outcome::Failed };
        let deadline = Instant::now() + endpoint.dispose_limit();
        match endpoint.loaded(deadline) {
            Ok(Some(loaded)) if !loaded.contains(directory) => return Outcome::Absent,
            Ok(_) => {}
            Err(_) => return Outcome::Failed,
        }
        match self.running(&endpoint, directory, deadline) {
            Ok(sessions) if sessions.is_empty() => {}
            Ok(_) => return Outcome::Busy,
            Err(_) => return Outcome::Failed,
        }
        if self.dispose(&endpoint, directory, deadline).is_err() {
            return Outcome::Failed;
        }
        crate::log!("disposed the idle instance of {directory}");
        let state = self.store.snapshot();
        let workspace = state.local_at(directory);
        let (workspace_id, directory) = (workspace.map(|workspace| workspace.id.clone()), directory.clone());
        self.events.publish(EventKind::InstanceDisposed { workspace_id, directory });
        Outcome::Disposed
    }

    // --- opencode's own events ---

    /// Follows opencode's own events until the supervisor stops.
    pub fn listen(&self, supervisor: &Handle) {
        while let Some(endpoint) = supervisor.wait_ready() {
            if let Err(e) = self.listen_once(supervisor, &endpoint) {
                crate::log!("the event stream of opencode broke off: {e}");
            }
            // Returns at once when opencode has ended: no pause before the next one.
            supervisor.wait_while(endpoint.generation, LISTEN_PAUSE);
        }
    }

    fn listen_once(&self, supervisor: &Handle, endpoint: &Endpoint) -> io::Result<()> {
        let lost = |e| io::Error::other(crate::error::Error::from(e).to_string());
        let mut reader = BufReader::new(endpoint.events(Instant::now() + LISTEN_LIMIT).map_err(lost)?);
        // The list covers events from before the subscription.
        self.list_soon(&mut self.lock(), endpoint);
        let mut line = Vec::new();
        loop {
            line.clear();
            if reader.by_ref().take(EVENT_LIMIT).read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            supervisor.heard(endpoint.generation);
            let Some(data) = line.strip_prefix(b"data:") else { continue };
            if let Some(event) = endpoint.instance_event(data) {
                self.observe(endpoint, event);
            }
            for turn in endpoint.turn_events(data) {
                self.publish_turn(endpoint, turn);
            }
        }
    }

    /// Publishes a change of a turn.
    fn publish_turn(&self, endpoint: &Endpoint, TurnEvent { instance, session, step }: TurnEvent) {
        // Release the lock before the event is published: locks are never nested.
        let change = turns::lock(&self.turns).observe(session.as_deref(), step);
        let Some(mut change) = change else { return };
        let Some(directory) = self.directory_of(endpoint, instance) else { return };
        if let (Line::V2, Some(id), None) = (endpoint.line, &change.id, &change.title) {
            // Events of 2.x lack the title, and requesting it loads no instance.
            let deadline = Instant::now() + ASK_LIMIT;
            change.title = endpoint.session_title(Path::new(&directory), id, deadline);
            turns::lock(&self.turns).observe(Some(id), Step::Titled(change.title.clone()));
        }
        let state = self.store.snapshot();
        let workspace = state.local_at(&directory).cloned();
        self.events.publish(change.event(directory, workspace));
    }

    /// The directory that an event is about.
    fn directory_of(&self, endpoint: &Endpoint, instance: InstanceRef) -> Option<String> {
        match instance {
            InstanceRef::Directory(directory) => Some(directory),
            InstanceRef::Session(id) => {
                self.session_directory(endpoint, &id, Instant::now() + ASK_LIMIT).ok().flatten()
            }
        }
    }

    fn observe(&self, endpoint: &Endpoint, InstanceEvent { sign, instance, session }: InstanceEvent) {
        let Some(directory) = self.directory_of(endpoint, instance) else { return };
        if let Some(id) = session {
            self.remember_session(&id, &directory);
        }
        let now = Instant::now();
        let ours = || self.store.snapshot().local_at(&directory).is_some();
        let mut inner = self.lock();
        match endpoint.line {
            Line::V1 => inner.account.observe(endpoint.generation, &directory, sign, ours, now),
            // 2.x also sends events about instances that are not loaded (a session was created, say), so only
            // its list shows whether one is.
            Line::V2 => {
                if sign == Sign::Used {
                    inner.account.touch(&directory, now);
                }
                if (sign == Sign::Disposed) == inner.account.is_loaded(&directory) {
                    self.list_soon(&mut inner, endpoint);
                }
            }
        }
        self.settle(&mut inner);
    }

    /// Schedules a request for opencode's list, if it has one.
    fn list_soon(&self, inner: &mut Inner, endpoint: &Endpoint) {
        if endpoint.line == Line::V2 && inner.list_at.is_none() {
            inner.list_at = Some(Instant::now() + LIST_PAUSE);
            self.changed.notify_all();
        }
    }
}
