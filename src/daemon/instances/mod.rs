//! Which instances opencode has loaded, who uses them, and the eviction of those nobody uses.
//!
//! opencode keeps every instance for ever, has no list of them, and loads one by being asked
//! about it. So account is kept here: of what is routed, and of what `/global/event` tells of
//! clients that go to opencode directly. It is written into the state file (behind), for the
//! daemon that adopts this opencode.
//!
//! Invariants: nothing is asked about an instance that is not loaded in this account; one with
//! an open stream is not evicted; a request that comes while its instance is being evicted waits
//! for the end of that, so that it is never cut off.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::engine::Endpoint;
use super::events::{EventKind, Events};
use super::supervisor::Handle;
use crate::error::{Error, Result};
use crate::log::now_ms;
use crate::state::Store;
use crate::wire::from_json;

/// How long an eviction may take; then it is tried again later.
const EVICTION_LIMIT: Duration = Duration::from_secs(10);
/// How long a request waits for the end of an eviction: it takes some milliseconds.
const PATIENCE: Duration = EVICTION_LIMIT;
/// The pause before events are listened to again, when they ended and opencode did not.
const LISTEN_PAUSE: Duration = Duration::from_secs(1);
/// How long the head of the event stream may take.
const LISTEN_LIMIT: Duration = Duration::from_secs(10);
/// The longest event that is read whole; longer ones (a large diff) are only skipped. Bytes.
const EVENT_LIMIT: u64 = 1024 * 1024;

/// The account.
pub struct Instances {
    store: &'static Store,
    /// Unused for so long, an instance is disposed; never when absent.
    idle_ttl: Option<Duration>,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    /// Of the opencode that this is about.
    generation: u64,
    by_directory: HashMap<String, Instance>,
    /// What we are disposing ourselves, and since when: opencode tells of it too, and perhaps only
    /// when it is loaded again.
    own_disposals: Vec<(String, Instant)>,
    /// When the evicting thread looks next; `None`: when it is woken.
    next_look: Option<Instant>,
}

impl Inner {
    /// Of what is neither loaded nor in use there is nothing to be known.
    fn forget_unused(&mut self, directory: &str) {
        if self.by_directory.get(directory).is_some_and(|instance| !instance.loaded && instance.streams == 0) {
            self.by_directory.remove(directory);
        }
    }
}

struct Instance {
    loaded: bool,
    /// When a request that loads it was last on its way.
    loaded_at: Option<Instant>,
    /// Requests under way, streams among them.
    streams: usize,
    used: Instant,
    used_ms: u64,
    evicting: bool,
}

impl Instance {
    fn new() -> Instance {
        let used = Instant::now();
        Instance { loaded: false, loaded_at: None, streams: 0, used, used_ms: now_ms(), evicting: false }
    }

    fn touch(&mut self) {
        (self.used, self.used_ms) = (Instant::now(), now_ms());
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
}

/// A request under way; it counts as use until it is dropped.
pub struct Use<'a> {
    instances: &'a Instances,
    directory: &'a str,
}

impl Use<'_> {
    /// The request goes to this opencode, and loads the instance.
    pub fn loads(&self, generation: u64) {
        self.instances.change(generation, self.directory, |instance| {
            (instance.loaded, instance.loaded_at) = (true, Some(Instant::now()));
        });
    }
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        let mut inner = self.instances.lock();
        if let Some(instance) = inner.by_directory.get_mut(self.directory) {
            instance.streams -= 1;
            instance.touch();
        }
        inner.forget_unused(self.directory);
        self.instances.schedule(&inner);
    }
}

impl Instances {
    /// An account of nothing.
    pub fn new(store: &'static Store, idle_ttl: Option<Duration>) -> Instances {
        Instances { store, idle_ttl, inner: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another opencode: this is what it has loaded.
    pub fn begin(&self, generation: u64, directories: Vec<String>) {
        let mut inner = self.lock();
        inner.generation = generation;
        inner.own_disposals.clear();
        inner.by_directory.retain(|_, instance| {
            instance.loaded = false;
            instance.streams > 0
        });
        for directory in directories {
            inner.by_directory.entry(directory).or_insert_with(Instance::new).loaded = true;
        }
        self.schedule(&inner);
    }

    /// A request for an instance begins. One that is just being evicted is waited for.
    ///
    /// # Errors
    /// `opencode_timeout` at the deadline.
    pub fn enter<'a>(&'a self, directory: &'a str, deadline: Instant) -> Result<Use<'a>> {
        let patience = Instant::now() + PATIENCE;
        let mut inner = self.lock();
        while inner.by_directory.get(directory).is_some_and(|instance| instance.evicting) {
            let now = Instant::now();
            if now >= deadline {
                return Err(Error::OpencodeTimeout("did not dispose the instance"));
            }
            let rest = patience.min(deadline).saturating_duration_since(now);
            if rest.is_zero() {
                break;
            }
            inner = self.changed.wait_timeout(inner, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        let instance = inner.by_directory.entry(directory.to_owned()).or_insert_with(Instance::new);
        instance.streams += 1;
        instance.touch();
        Ok(Use { instances: self, directory })
    }

    /// Somebody means to use an instance.
    pub fn touch(&self, directory: &str) {
        let mut inner = self.lock();
        if let Some(instance) = inner.by_directory.get_mut(directory) {
            instance.touch();
        }
        self.schedule(&inner);
    }

    /// An instance is going to be disposed: [`Instances::disposed`] is told since when.
    pub fn disposing(&self, directory: &str) -> Instant {
        let now = Instant::now();
        let mut inner = self.lock();
        inner.own_disposals.retain(|(_, since)| now.duration_since(*since) < EVICTION_LIMIT);
        inner.own_disposals.push((directory.to_owned(), now));
        now
    }

    /// An instance has been disposed. What has loaded it since that was begun is more than that.
    pub fn disposed(&self, generation: u64, directory: &str, since: Instant) {
        self.change(generation, directory, |instance| instance.loaded &= instance.loaded_at > Some(since));
    }

    /// opencode tells that an instance was disposed, by whomever.
    fn told_disposed(&self, generation: u64, directory: &str) {
        let own = {
            let mut inner = self.lock();
            let own = inner.own_disposals.iter().position(|(own, _)| own == directory);
            own.map(|own| inner.own_disposals.swap_remove(own))
        };
        match own {
            // Again, since what the instance did last was told in between.
            Some((_, since)) => self.disposed(generation, directory, since),
            None => self.change(generation, directory, |instance| instance.loaded = false),
        }
    }

    /// Whether an instance is loaded.
    pub fn is_loaded(&self, directory: &str) -> bool {
        self.lock().by_directory.get(directory).is_some_and(|instance| instance.loaded)
    }

    /// Whether an instance is loaded in this opencode.
    pub fn is_loaded_in(&self, generation: u64, directory: &str) -> bool {
        let inner = self.lock();
        inner.generation == generation && inner.by_directory.get(directory).is_some_and(|instance| instance.loaded)
    }

    /// How an instance is used.
    pub fn usage(&self, directory: &str) -> Usage {
        let inner = self.lock();
        let Some(instance) = inner.by_directory.get(directory) else { return Usage::default() };
        let due = self.idle_ttl.filter(|_| instance.loaded && instance.streams == 0);
        Usage {
            loaded: instance.loaded,
            streams: instance.streams,
            evict_at: due.map(|ttl| instance.used_ms + ttl.as_millis() as u64),
        }
    }

    /// Changes what is known of an instance. News of an earlier opencode is dropped.
    fn change(&self, generation: u64, directory: &str, change: impl FnOnce(&mut Instance)) {
        let mut inner = self.lock();
        if inner.generation != generation {
            return;
        }
        let instance = inner.by_directory.entry(directory.to_owned()).or_insert_with(Instance::new);
        let before = instance.loaded;
        change(instance);
        let after = instance.loaded;
        inner.forget_unused(directory);
        if before != after {
            let loaded = inner.by_directory.iter().filter(|(_, instance)| instance.loaded);
            self.store.note_instances(loaded.map(|(directory, _)| directory.clone()).collect());
        }
        self.schedule(&inner);
    }

    /// When the instance that is due first is due.
    fn first_due(&self, inner: &Inner) -> Option<(Instant, String)> {
        let ttl = self.idle_ttl?;
        let candidates = inner.by_directory.iter().filter(|(_, i)| i.loaded && i.streams == 0 && !i.evicting);
        let (directory, instance) = candidates.min_by_key(|(_, instance)| instance.used)?;
        Some((instance.used + ttl, directory.clone()))
    }

    /// Wakes the evicting thread only if it would otherwise look too late: use makes due times
    /// later, so that it mostly need not be woken.
    fn schedule(&self, inner: &Inner) {
        let too_late = match (inner.next_look, self.idle_ttl) {
            (None, Some(_)) => self.first_due(inner).is_some(),
            (Some(_), _) | (_, None) => false,
        };
        if too_late {
            self.changed.notify_all();
        }
    }

    /// Disposes instances as they become due, for as long as the daemon lives.
    pub fn evict(&self, supervisor: &Handle, events: &Events) {
        let mut inner = self.lock();
        loop {
            let due = self.first_due(&inner);
            inner.next_look = due.as_ref().map(|(at, _)| *at);
            let rest = due.as_ref().map(|(at, _)| at.saturating_duration_since(Instant::now()));
            match (due, rest) {
                (Some((_, directory)), Some(Duration::ZERO)) => {
                    let generation = inner.generation;
                    if let Some(instance) = inner.by_directory.get_mut(&directory) {
                        instance.evicting = true;
                    }
                    drop(inner);
                    let disposed = self.evict_one(supervisor, events, generation, &directory);
                    inner = self.lock();
                    if let Some(instance) = inner.by_directory.get_mut(&directory) {
                        instance.evicting = false;
                        if !disposed {
                            instance.touch(); // busy, or not to be had: looked at again in as long
                        }
                    }
                    self.changed.notify_all();
                }
                (Some(_), Some(rest)) => {
                    inner = self.changed.wait_timeout(inner, rest).unwrap_or_else(PoisonError::into_inner).0;
                }
                (None, _) | (_, None) => {
                    inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Disposes an instance, unless it is not a workspace's, or a session is running in it.
    fn evict_one(&self, supervisor: &Handle, events: &Events, generation: u64, directory: &str) -> bool {
        let state = self.store.snapshot();
        let Some(workspace) = state.workspaces.iter().find(|w| w.is_local() && w.path == directory) else {
            return false;
        };
        let Some(endpoint) = supervisor.ready_now().filter(|endpoint| endpoint.generation == generation) else {
            return false;
        };
        let (path, deadline) = (Path::new(directory), Instant::now() + EVICTION_LIMIT);
        match endpoint.running_sessions(path, deadline) {
            Ok(0) => {}
            Ok(_) | Err(_) => return false,
        }
        let since = self.disposing(directory);
        if endpoint.dispose(path, deadline).is_err() {
            return false;
        }
        crate::log!("disposed the idle instance of {}", workspace.name);
        self.disposed(generation, directory, since);
        let (workspace_id, directory) = (Some(workspace.id.clone()), directory.to_owned());
        events.publish(EventKind::InstanceDisposed { workspace_id, directory });
        true
    }

    /// Listens to opencode's own events until the supervisor stops and the daemon ends.
    pub fn listen(&self, supervisor: &Handle) {
        while let Some(endpoint) = supervisor.wait_ready() {
            if let Err(e) = self.listen_once(&endpoint) {
                crate::log!("the event stream of opencode broke off: {e}");
            }
            // When opencode has ended, the next one is waited for without a pause.
            supervisor.wait_while(endpoint.generation, LISTEN_PAUSE);
        }
    }

    fn listen_once(&self, endpoint: &Endpoint) -> io::Result<()> {
        let lost = |e| io::Error::other(crate::error::Error::from(e).to_string());
        let mut reader = BufReader::new(endpoint.events(Instant::now() + LISTEN_LIMIT).map_err(lost)?);
        let mut line = Vec::new();
        loop {
            line.clear();
            if reader.by_ref().take(EVENT_LIMIT).read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            if let Some(data) = line.strip_prefix(b"data:") {
                if let Ok(event) = from_json(data) {
                    self.observe(endpoint.generation, event);
                }
            }
        }
    }

    fn observe(&self, generation: u64, event: EngineEvent) {
        // Events about no instance have no directory, or "global".
        let Some(directory) = event.directory.filter(|directory| directory.starts_with('/')) else { return };
        let kind = event.payload.kind;
        match kind.split('.').next().unwrap_or_default() {
            "server" if kind == "server.instance.disposed" => self.told_disposed(generation, &directory),
            "server" | "global" => {}
            // What somebody does; the rest an instance does by itself (watching files, say).
            "session" | "message" | "permission" | "question" | "pty" | "todo" | "tui" | "command" => {
                self.change(generation, &directory, |instance| {
                    instance.loaded = true;
                    instance.touch();
                });
            }
            _ => self.change(generation, &directory, |instance| instance.loaded = true),
        }
    }
}

/// An event of `GET /global/event`.
#[derive(Deserialize)]
struct EngineEvent {
    directory: Option<String>,
    payload: Payload,
}

#[derive(Deserialize)]
struct Payload {
    #[serde(rename = "type")]
    kind: String,
}
