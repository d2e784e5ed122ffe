//! The instances of opencode: which are loaded, who uses them, the eviction of those nobody uses,
//! and the fences around workspaces whose loading ends opencode.
//!
//! opencode 1.x keeps every instance for ever, has no list of them, and loads one by being asked
//! about it. Hence the [`Account`] of what is routed, and of what opencode's events tell of clients
//! that call opencode directly. It is written into the state file (behind), for the daemon that
//! adopts this opencode. opencode 2.x has a list: whenever its events hint at something that the
//! account does not know, and before each disposal, it is asked for. The account decides; this module
//! has its lock, its clock and its threads.
//!
//! Invariant: the lock is never held over I/O.

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
use super::engine::{CallResult, Endpoint, Place, Step, Told, Turn as Turned};
use super::events::{EventKind, Events};
use super::supervisor::handle::Handle;
use crate::error::{Error, Result};
use crate::line::Line;
use crate::log::now_ms;
use crate::state::{FenceRecord, Store};
use crate::workspace::Workspace;

/// How long a request waits for a disposal under way, which mostly takes some milliseconds: as long as
/// one may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long opencode may take to say what it has loaded and what runs: it reads a table in memory.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// The pause between a hint and the question that it causes: some ninety events tell of one boot.
const LIST_PAUSE: Duration = Duration::from_millis(100);
/// The pause before events are listened to again, when they ended and opencode did not.
const LISTEN_PAUSE: Duration = Duration::from_secs(1);
/// How long the head of the event stream may take.
const LISTEN_LIMIT: Duration = Duration::from_secs(10);
/// The longest event that is read whole; longer ones (a large diff) are only skipped. Bytes.
const EVENT_LIMIT: u64 = 1024 * 1024;
/// How long the end of opencode may take to be reported: one that no longer listens and does not
/// heed TERM is killed after 5 s, and looked at for 5 s before.
const BLAME_LIMIT: Duration = Duration::from_secs(15);
/// By how much the two clocks may drift apart before due times are translated anew: less than
/// anybody notices, more than the scheduler takes between two readings. Milliseconds.
const CLOCK_DRIFT: u64 = 100;

/// The instances of opencode.
pub struct Instances {
    store: &'static Store,
    events: &'static Events,
    inner: Mutex<Inner>,
    changed: Condvar,
    /// The directories of sessions. A session stays where it is, whatever process serves it.
    sessions: Mutex<HashMap<String, String>>,
    turns: Mutex<Turns>,
}

struct Inner {
    account: Account,
    /// The revision of the account that the store was told of.
    noted: u64,
    /// The last opencode whose end has been reported, and its consequences written down.
    reported: u64,
    /// The version of opencode, once known.
    version: Option<String>,
    /// When the evicting thread looks next; `None`: when it is woken.
    next_look: Option<Instant>,
    /// When opencode is asked for its list.
    list_at: Option<Instant>,
    clock: Clock,
}

/// The two clocks, read at the same moment.
#[derive(Clone, Copy)]
struct Clock {
    at: Instant,
    unix_ms: u64,
}

impl Clock {
    fn now() -> Clock {
        Clock { at: Instant::now(), unix_ms: now_ms() }
    }

    /// A moment to come, in Unix milliseconds. The same moment gives the same number, until the
    /// wall clock is set or the machine has slept.
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

/// How an instance is used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// It is loaded.
    pub loaded: bool,
    /// Requests under way, streams among them.
    pub streams: usize,
    /// When it is due to be evicted, Unix milliseconds; none while in use, or never.
    pub evict_at: Option<u64>,
    /// It may not be loaded.
    pub fenced: bool,
}

/// A request under way; it counts as use until it is dropped.
pub struct Use<'a> {
    instances: &'a Instances,
    workspace: &'a Workspace,
    /// The opencode that the request was sent to and that has not replied yet.
    unanswered: Cell<Option<u64>>,
}

impl Use<'_> {
    /// The request is about to be sent to this opencode, and loads the instance. Waits while another
    /// instance has to be loaded alone. False when that opencode has ended.
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

    /// opencode has begun to answer.
    pub fn replied(&self) {
        if let Some(generation) = self.unanswered.take() {
            let mut inner = self.instances.lock();
            if inner.account.replied(generation, &self.workspace.path) {
                self.instances.changed.notify_all();
            }
        }
    }

    /// After the connection to this opencode broke before a reply: why, if opencode ended while the
    /// request loaded the instance. Such a request is not to be sent again. None when opencode lives,
    /// when it was stopped, or when the instance had been loaded before.
    pub fn blame(&self, supervisor: &Handle, endpoint: &Endpoint) -> Option<Error> {
        let deadline = Instant::now() + BLAME_LIMIT;
        let generation = self.unanswered.get().filter(|generation| *generation == endpoint.generation)?;
        if supervisor.survives(endpoint, deadline) {
            return None;
        }
        let mut inner = self.instances.lock();
        // The supervisor reports the end, and then starts another.
        while inner.account.generation() == generation && inner.reported != generation && Instant::now() < deadline {
            inner = self.instances.wait(inner, deadline);
        }
        let directory = &self.workspace.path;
        let end = inner.account.end().filter(|end| end.generation == generation)?;
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
    /// Nothing is loaded; the fences are those of the state file. An instance unused for `idle_ttl`
    /// is disposed; never when absent.
    pub fn new(store: &'static Store, events: &'static Events, idle_ttl: Option<Duration>) -> Instances {
        let mut fences = Fences::default();
        fences.restore(store.snapshot().fences.iter().map(|record| {
            let FenceRecord { directory, version, output, .. } = record.clone();
            (directory, Fence { version, output })
        }));
        let account = Account::new(idle_ttl, fences);
        let noted = account.revision();
        let inner =
            Inner { account, noted, reported: 0, version: None, next_look: None, list_at: None, clock: Clock::now() };
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

    /// After a change of the account: notes what is loaded, and wakes the evicting thread if it would
    /// otherwise look too late. Use makes due times later, so that it mostly need not be woken.
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
        if inner.next_look.is_none() && inner.account.first_due().is_some() {
            self.changed.notify_all();
        }
    }

    // --- The supervisor's reports ---

    /// Another opencode has been started or adopted: what it has loaded, and which of that is no
    /// workspace's (not known for what an earlier version has written).
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
        // What is loaded comes from the state file, or is nothing: there is no news in it.
        inner.noted = inner.account.revision();
        self.settle(&mut inner);
        self.changed.notify_all();
    }

    /// opencode is of this version: fences that another version has earned are lifted.
    pub fn version_is(&self, version: &str) {
        let mut inner = self.lock();
        inner.version = Some(version.to_owned());
        let lifted = inner.account.fences().version_is(version);
        drop(inner);
        if lifted {
            crate::log!("opencode is of another version: fences around workspaces are lifted");
            self.write_fences();
        }
    }

    /// opencode has ended: with a failure by itself, without one because we wanted it to.
    pub fn ended(&self, generation: u64, failure: Option<Failure>) {
        let mut inner = self.lock();
        let version = inner.version.clone().unwrap_or_default();
        let fenced = inner.account.ended(generation, failure, &version, Instant::now());
        inner.noted = inner.account.revision();
        drop(inner);
        // What is told of a fence is on disk before.
        if !fenced.is_empty() {
            self.write_fences();
        }
        self.lock().reported = generation;
        self.changed.notify_all();
        let state = self.store.snapshot();
        for (directory, Fence { output, .. }) in fenced {
            let workspace = state.local_at(&directory);
            let workspace_id = workspace.map(|workspace| workspace.id.clone());
            crate::log!("fenced {directory}: loading it has ended opencode twice");
            self.events.publish(EventKind::InstanceFenced { workspace_id, directory, output });
        }
    }

    /// Puts the fences into the state file. They hold in this daemon even if that fails.
    fn write_fences(&self) {
        let written = self.store.update(|state| {
            // Read in here: changes of the file come one after the other.
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

    /// Refuses what needs the instance of a fenced workspace, before it costs anything. While the
    /// version of opencode is not known yet, nothing is refused: it may lift the fence.
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

    /// Lifts the fence of a directory; whether there was one.
    pub fn reset(&self, directory: &str) -> bool {
        let was_fenced = self.lock().account.fences().reset(directory);
        if was_fenced {
            self.write_fences();
        }
        was_fenced
    }

    /// A request for the instance of a workspace begins. A disposal under way is waited for.
    ///
    /// # Errors
    /// `opencode_timeout` at the deadline.
    pub fn enter<'a>(&'a self, workspace: &'a Workspace, deadline: Instant) -> Result<Use<'a>> {
        let patience = Instant::now() + PATIENCE;
        let mut inner = self.lock();
        loop {
            let now = Instant::now();
            match inner.account.enter(&workspace.path, now) {
                Entry::Entered => break,
                Entry::Wait if now >= deadline => {
                    return Err(Error::OpencodeTimeout("did not dispose the instance"));
                }
                Entry::Wait if now >= patience => {
                    inner.account.enter_anyway(&workspace.path, now);
                    break;
                }
                Entry::Wait => inner = self.wait(inner, patience.min(deadline)),
            }
        }
        self.settle(&mut inner);
        Ok(Use { instances: self, workspace, unanswered: Cell::new(None) })
    }

    /// Somebody means to use an instance.
    pub fn touch(&self, directory: &str) {
        self.lock().account.touch(directory, Instant::now());
    }

    /// A directory is, or was until now, a workspace's: its instance is evicted like any other.
    pub fn register(&self, directory: &str) {
        let mut inner = self.lock();
        inner.account.register(directory);
        self.settle(&mut inner);
    }

    /// Disposes an instance; requests for it wait meanwhile.
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

    /// Asks opencode for its list of what is loaded, if it has one.
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

    /// How an instance is used.
    pub fn usage(&self, directory: &str) -> Usage {
        let mut inner = self.lock();
        let account::Usage { loaded, streams, due } = inner.account.usage(directory);
        let evict_at = due.map(|due| inner.clock.unix_ms(due));
        let fenced = inner.account.fences().get(directory).is_some();
        Usage { loaded, streams, evict_at, fenced }
    }

    // --- Eviction ---

    /// Disposes instances as they become due, for as long as the daemon lives.
    pub fn evict(&'static self, supervisor: &'static Handle) {
        let mut inner = self.lock();
        loop {
            let now = Instant::now();
            if inner.list_at.is_some_and(|at| at <= now) {
                inner.list_at = None;
                drop(inner);
                if let Some(endpoint) = supervisor.ready_now() {
                    // Without an answer, the next hint asks again.
                    let _ = self.list(&endpoint, now + ASK_LIMIT);
                }
                inner = self.lock();
                continue;
            }
            let next = match inner.account.next(now) {
                Next::Evict(eviction) => {
                    drop(inner);
                    let shared = eviction.clone();
                    // One that takes long must not hold up the others.
                    if Builder::new().spawn(move || self.evict_one(supervisor, &shared)).is_err() {
                        self.evict_one(supervisor, &eviction);
                    }
                    inner = self.lock();
                    continue;
                }
                Next::At(at) => Some(at),
                Next::Nothing => None,
            };
            inner.next_look = next;
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

    /// Listens to opencode's own events until the supervisor stops and the daemon ends.
    pub fn listen(&self, supervisor: &Handle) {
        while let Some(endpoint) = supervisor.wait_ready() {
            if let Err(e) = self.listen_once(supervisor, &endpoint) {
                crate::log!("the event stream of opencode broke off: {e}");
            }
            // When opencode has ended, the next one is waited for without a pause.
            supervisor.wait_while(endpoint.generation, LISTEN_PAUSE);
        }
    }

    fn listen_once(&self, supervisor: &Handle, endpoint: &Endpoint) -> io::Result<()> {
        let lost = |e| io::Error::other(crate::error::Error::from(e).to_string());
        let mut reader = BufReader::new(endpoint.events(Instant::now() + LISTEN_LIMIT).map_err(lost)?);
        // What happened before the stream began is in the list.
        self.list_soon(&mut self.lock(), endpoint);
        let mut line = Vec::new();
        loop {
            line.clear();
            if reader.by_ref().take(EVENT_LIMIT).read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            supervisor.heard(endpoint.generation);
            let Some(data) = line.strip_prefix(b"data:") else { continue };
            if let Some(told) = endpoint.understand(data) {
                self.observe(endpoint, told);
            }
            for turn in endpoint.turns(data) {
                self.tell(endpoint, turn);
            }
        }
    }

    /// Tells what is new of a turn.
    fn tell(&self, endpoint: &Endpoint, Turned { place, session, step }: Turned) {
        // Released before the event is published, which has a lock of its own.
        let told = turns::lock(&self.turns).observe(session.as_deref(), step);
        let Some(mut told) = told else { return };
        let Some(directory) = self.directory_of(endpoint, place) else { return };
        if let (Line::V2, Some(id), None) = (endpoint.line, &told.id, &told.title) {
            // Its events do not say; and to ask loads nothing.
            let deadline = Instant::now() + ASK_LIMIT;
            told.title = endpoint.session_title(Path::new(&directory), id, deadline);
            turns::lock(&self.turns).observe(Some(id), Step::Titled(told.title.clone()));
        }
        let state = self.store.snapshot();
        let workspace = state.local_at(&directory).cloned();
        self.events.publish(told.event(directory, workspace));
    }

    /// The directory of what an event is about.
    fn directory_of(&self, endpoint: &Endpoint, place: Place) -> Option<String> {
        match place {
            Place::Directory(directory) => Some(directory),
            Place::Session(id) => self.session_directory(endpoint, &id, Instant::now() + ASK_LIMIT).ok().flatten(),
        }
    }

    fn observe(&self, endpoint: &Endpoint, Told { sign, place, session }: Told) {
        let Some(directory) = self.directory_of(endpoint, place) else { return };
        if let Some(id) = session {
            self.remember_session(&id, &directory);
        }
        let now = Instant::now();
        let ours = || self.store.snapshot().local_at(&directory).is_some();
        let mut inner = self.lock();
        match endpoint.line {
            Line::V1 => inner.account.told(endpoint.generation, &directory, sign, ours, now),
            // It has a list, and tells of what is not loaded too: of a session that is created, say.
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

    /// Has opencode be asked for its list, if it has one.
    fn list_soon(&self, inner: &mut Inner, endpoint: &Endpoint) {
        if endpoint.line == Line::V2 && inner.list_at.is_none() {
            inner.list_at = Some(Instant::now() + LIST_PAUSE);
            self.changed.notify_all();
        }
    }
}
