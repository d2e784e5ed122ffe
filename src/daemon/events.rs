//! Who is told what happened: the source of `GET /events`.
//!
//! Publishing never waits. A subscriber that does not read is dropped, and its stream ends: it
//! can subscribe again and read the state anew, which is more than a gap would tell it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use serde::Serialize;

use crate::error::ErrorBody;
use crate::log::now_ms;
use crate::workspace::Workspace;

/// How many events a subscriber may be behind: seconds of the busiest that happens.
const BEHIND_LIMIT: usize = 256;

/// What happened. On the wire its fields stand beside `id`, `type` and `time`.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
#[allow(missing_docs)] // the names say it
pub enum EventKind {
    #[serde(rename = "workspace.added")]
    WorkspaceAdded { workspace: Arc<Workspace>, active_id: String },
    #[serde(rename = "workspace.removed")]
    WorkspaceRemoved { workspace: Arc<Workspace>, active_id: String },
    #[serde(rename = "workspace.renamed")]
    WorkspaceRenamed { workspace: Arc<Workspace>, active_id: String },
    #[serde(rename = "workspace.activated")]
    WorkspaceActivated { workspace: Arc<Workspace>, active_id: String },
    #[serde(rename = "instance.disposed")]
    InstanceDisposed { workspace_id: Option<String>, directory: String },
    #[serde(rename = "instance.fenced")]
    InstanceFenced { workspace_id: Option<String>, directory: String, output: String },
    #[serde(rename = "engine.starting")]
    EngineStarting { generation: u64, pid: u32 },
    #[serde(rename = "engine.ready")]
    EngineReady { generation: u64, pid: u32 },
    #[serde(rename = "engine.exited")]
    EngineExited { generation: u64, pid: u32, reason: String },
    #[serde(rename = "engine.failed")]
    EngineFailed { error: ErrorBody },
}

#[derive(Serialize)]
struct Event<'a> {
    id: u64,
    time: u64,
    #[serde(flatten)]
    kind: &'a EventKind,
}

/// The subscribers.
#[derive(Default)]
pub struct Events {
    last_id: AtomicU64,
    subscribers: Mutex<Subscribers>,
}

#[derive(Default)]
struct Subscribers {
    /// Each with what lives as long as its subscription.
    all: Vec<(SyncSender<Arc<str>>, Weak<()>)>,
    /// There are to be no more.
    closed: bool,
}

/// What happens, from when it was made.
pub struct Subscription {
    events: Receiver<Arc<str>>,
    _alive: Arc<()>,
}

impl Subscription {
    /// The next event, as a server-sent event.
    ///
    /// # Errors
    /// When there is none in that time, or there will be none: the reader was too far behind, or
    /// the daemon ends.
    pub fn next(&self, limit: Duration) -> Result<Arc<str>, RecvTimeoutError> {
        self.events.recv_timeout(limit)
    }
}

impl Events {
    /// Tells everybody. Each subscriber gets the event as one server-sent event.
    pub fn publish(&self, kind: EventKind) {
        let mut subscribers = self.lock();
        // Numbered under the lock, so that everybody sees the numbers in order.
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        if subscribers.all.is_empty() {
            return;
        }
        let Ok(data) = serde_json::to_string(&Event { id, time: now_ms(), kind: &kind }) else { return };
        let text: Arc<str> = format!("id: {id}\ndata: {data}\n\n").into();
        subscribers.all.retain(|(subscriber, _)| match subscriber.try_send(text.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        });
    }

    /// What happens from now on.
    pub fn subscribe(&self) -> Subscription {
        let (sender, events) = sync_channel(BEHIND_LIMIT);
        let alive = Arc::new(());
        let mut subscribers = self.lock();
        // Perhaps nothing happens for days, while somebody comes and goes.
        subscribers.all.retain(|(_, alive)| alive.strong_count() > 0);
        if !subscribers.closed {
            subscribers.all.push((sender, Arc::downgrade(&alive)));
        }
        Subscription { events, _alive: alive }
    }

    /// Ends every subscription, also those to come.
    pub fn close(&self) {
        let mut subscribers = self.lock();
        subscribers.closed = true;
        subscribers.all.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Subscribers> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_gone_is_forgotten() {
        let events = Events::default();
        let stays = events.subscribe();
        for _ in 0..100 {
            drop(events.subscribe());
        }
        assert!(events.lock().all.len() <= 2);
        events.publish(EventKind::EngineReady { generation: 1, pid: 2 });
        assert!(stays.next(Duration::ZERO).unwrap().contains("engine.ready"));
    }

    #[test]
    fn who_comes_after_the_end_does_not_wait() {
        let events = Events::default();
        let before = events.subscribe();
        events.close();
        for subscription in [before, events.subscribe()] {
            assert_eq!(subscription.next(Duration::from_secs(60)).unwrap_err(), RecvTimeoutError::Disconnected);
        }
    }
}
