//! The daemon's events and their subscribers: the source of `GET /events`.
//!
//! Publishing never waits. The subscription of a reader that falls too far behind ends: the client
//! can subscribe again and read the state anew, which tells it more than a gap would. A reader that
//! hangs up is noticed at once.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use serde::Serialize;

use crate::error::{Error, ErrorBody, Result};
use crate::log::now_ms;
use crate::system::wait::{self, Woken};
use crate::workspace::Workspace;

/// How many events a subscriber may be behind: the busiest daemon publishes them in seconds.
const BEHIND_LIMIT: usize = 256;

/// An event. On the wire its fields stand beside `id`, `type` and `time`.
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
    #[serde(rename = "engine.recycled")]
    EngineRecycled { generation: u64, pid: u32 },
    #[serde(rename = "engine.oversize")]
    EngineTooLarge { generation: u64, pid: u32 },
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
    inboxes: Vec<Weak<Inbox>>,
    /// The daemon ends: there are no more events.
    closed: bool,
}

/// The events that a subscriber has not taken yet.
struct Inbox {
    /// An eventfd: readable while there is something to take, or to learn.
    news: OwnedFd,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<Arc<str>>,
    /// Nothing more will come.
    over: bool,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event; false when the subscriber is too far behind, which ends its subscription.
    fn push(&self, event: &Arc<str>) -> bool {
        let mut queue = self.lock();
        queue.over |= queue.events.len() >= BEHIND_LIMIT;
        if !queue.over {
            queue.events.push_back(event.clone());
        }
        let _ = rustix::io::write(&self.news, &1u64.to_ne_bytes());
        !queue.over
    }

    fn close(&self) {
        self.lock().over = true;
        let _ = rustix::io::write(&self.news, &1u64.to_ne_bytes());
    }
}

/// The events from one moment on.
pub struct Subscription(Arc<Inbox>);

/// What a subscriber learns next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// An event, as a server-sent event.
    Event(Arc<str>),
    /// Nothing has happened in that time.
    Quiet,
    /// The reader has hung up.
    HungUp,
    /// There will be no more: the reader was too far behind, or the daemon ends.
    Over,
}

impl Subscription {
    /// The next event, unless the reader at the other end of this connection hangs up first.
    pub fn next(&self, reader: impl AsFd, limit: Duration) -> Next {
        let deadline = Instant::now() + limit;
        loop {
            {
                let mut queue = self.0.lock();
                // Reset under the lock, so that no event falls between the reset and the look.
                let _ = rustix::io::read(&self.0.news, &mut [0; 8]);
                if let Some(event) = queue.events.pop_front() {
                    return Next::Event(event);
                }
                if queue.over {
                    return Next::Over;
                }
            }
            match wait::wait_with_peer(&self.0.news, &reader, deadline) {
                Ok(Woken::Readable) => {}
                Ok(Woken::TimedOut) => return Next::Quiet,
                Ok(Woken::HungUp) | Err(_) => return Next::HungUp,
            }
        }
    }
}

impl Events {
    /// Hands an event to every subscriber.
    pub fn publish(&self, kind: EventKind) {
        let mut subscribers = self.lock();
        // Numbered under the lock, so that every subscriber sees the numbers in order.
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        if subscribers.inboxes.is_empty() {
            return;
        }
        let Ok(data) = serde_json::to_string(&Event { id, time: now_ms(), kind: &kind }) else { return };
        let text: Arc<str> = format!("id: {id}\ndata: {data}\n\n").into();
        subscribers.inboxes.retain(|inbox| inbox.upgrade().is_some_and(|inbox| inbox.push(&text)));
    }

    /// Subscribes to the events from now on.
    ///
    /// # Errors
    /// `overloaded` without a descriptor for the subscription.
    pub fn subscribe(&self) -> Result<Subscription> {
        let news = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let news = news.map_err(|_| Error::Overloaded("connections"))?;
        let mut subscribers = self.lock();
        let queue = Mutex::new(Queue { over: subscribers.closed, ..Queue::default() });
        let inbox = Arc::new(Inbox { news, queue });
        // Publishing drops the inboxes of readers that have gone, and may not happen for days.
        subscribers.inboxes.retain(|inbox| inbox.strong_count() > 0);
        subscribers.inboxes.push(Arc::downgrade(&inbox));
        Ok(Subscription(inbox))
    }

    /// Ends every subscription, also those to come.
    pub fn close(&self) {
        let mut subscribers = self.lock();
        subscribers.closed = true;
        for inbox in subscribers.inboxes.drain(..).filter_map(|inbox| inbox.upgrade()) {
            inbox.close();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Subscribers> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const EVENT: EventKind = EventKind::EngineReady { generation: 1, pid: 2 };
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn readers_that_have_gone_are_forgotten() {
        let (reader, _client) = UnixStream::pair().unwrap();
        let events = Events::default();
        let stays = events.subscribe().unwrap();
        for _ in 0..100 {
            drop(events.subscribe());
        }
        assert!(events.lock().inboxes.len() <= 2);
        events.publish(EVENT);
        assert!(matches!(stays.next(&reader, LONG), Next::Event(event) if event.contains("engine.ready")));
        assert_eq!(stays.next(&reader, Duration::ZERO), Next::Quiet);
    }

    #[test]
    fn a_reader_that_hangs_up_is_noticed_while_nothing_happens() {
        let (reader, client) = UnixStream::pair().unwrap();
        let events = Events::default();
        let subscription = events.subscribe().unwrap();
        drop(client);
        assert_eq!(subscription.next(&reader, LONG), Next::HungUp);
    }

    #[test]
    fn a_reader_that_falls_behind_gets_what_was_kept_and_then_the_end() {
        let (reader, _client) = UnixStream::pair().unwrap();
        let events = Events::default();
        let slow = events.subscribe().unwrap();
        for _ in 0..=BEHIND_LIMIT {
            events.publish(EVENT);
        }
        for _ in 0..BEHIND_LIMIT {
            assert!(matches!(slow.next(&reader, LONG), Next::Event(_)));
        }
        assert_eq!(slow.next(&reader, LONG), Next::Over);
    }

    #[test]
    fn no_subscription_outlives_the_end() {
        let (reader, _client) = UnixStream::pair().unwrap();
        let events = Events::default();
        let before = events.subscribe().unwrap();
        events.close();
        for subscription in [before, events.subscribe().unwrap()] {
            assert_eq!(subscription.next(&reader, LONG), Next::Over);
        }
    }
}
