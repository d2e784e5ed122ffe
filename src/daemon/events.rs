//! The daemon's events and their subscribers: the source of `GET /events`.
//!
//! Publishing never waits. The subscription of a reader that falls too far behind ends; the client can
//! subscribe again after the last event that it has seen, and gets a gap event if some of the events since
//! then are no longer kept. A reader that hangs up is noticed at once.
//!
//! Ids start at the start time of the daemon, in Unix milliseconds times 1,000, and count up: ids of the next
//! daemon are larger.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
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

/// How many events are kept for clients that subscribe again.
const KEPT: usize = 1000;
/// The limit of kept events in bytes: a single event can be large, and the daemon has to stay small.
const KEPT_BYTES: usize = 1024 * 1024;

/// The session that an event is about.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EventSession {
    /// OpenCode's id; null when an error is about no session.
    pub session_id: Option<String>,
    /// Null when opencode has not reported it.
    pub title: Option<String>,
    /// Null when the directory is no workspace.
    pub workspace: Option<Arc<Workspace>>,
    /// The directory of its instance.
    pub directory: String,
}

/// What went wrong in a session.
#[derive(Clone, Debug, Serialize)]
pub struct SessionError {
    /// OpenCode's name of the kind of error.
    pub name: String,
    /// For a person; may be empty.
    pub message: String,
}

/// An event. On the wire its fields stand beside `id`, `type` and `time`.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
#[allow(missing_docs)] // the names are clear
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
    #[serde(rename = "session.started")]
    SessionStarted(EventSession),
    #[serde(rename = "session.idle")]
    SessionIdle(EventSession),
    #[serde(rename = "session.error")]
    SessionError {
        #[serde(flatten)]
        session: EventSession,
        error: SessionError,
    },
    /// Events after `since` are no longer kept.
    #[serde(rename = "gap")]
    Gap { since: u64 },
}

#[derive(Serialize)]
struct Event<'a> {
    id: u64,
    time: u64,
    #[serde(flatten)]
    kind: &'a EventKind,
}

impl Event<'_> {
    /// As a server-sent event; `None` when it cannot be written.
    fn text(&self) -> Option<Arc<str>> {
        let data = serde_json::to_string(self).ok()?;
        Some(format!("id: {}\ndata: {data}\n\n", self.id).into())
    }
}

/// The subscribers, and the last events.
#[derive(Default)]
pub struct Events(Mutex<Subscribers>);

#[derive(Default)]
struct Subscribers {
    /// The id of the last event, or one less than the first id.
    last_id: u64,
    /// The latest events with their ids, the oldest first.
    kept: VecDeque<(u64, Arc<str>)>,
    kept_bytes: usize,
    inboxes: Vec<Weak<Inbox>>,
    /// The daemon is ending: there will be no more events.
    closed: bool,
}

impl Subscribers {
    fn keep(&mut self, id: u64, text: Arc<str>) {
        self.kept_bytes += text.len();
        self.kept.push_back((id, text));
        while self.kept.len() > KEPT || self.kept_bytes > KEPT_BYTES {
            let Some((_, oldest)) = self.kept.pop_front() else { return };
            self.kept_bytes -= oldest.len();
        }
    }

    /// The kept events after an id, preceded by a gap event if some are missing.
    fn since(&self, since: u64) -> VecDeque<Arc<str>> {
        let first_kept = self.kept.front().map_or(self.last_id + 1, |(id, _)| *id);
        // An id in the future came from a daemon whose clock was ahead.
        let is_whole = since + 1 >= first_kept && since <= self.last_id;
        let after = if is_whole { since } else { first_kept - 1 };
        // Its id is where the next reconnect continues.
        let gap = Event { id: after, time: now_ms(), kind: &EventKind::Gap { since } };
        let gap = Some(gap).filter(|_| !is_whole).and_then(|gap| gap.text());
        let kept = self.kept.iter().filter(|(id, _)| *id > after).map(|(_, text)| text.clone());
        gap.into_iter().chain(kept).collect()
    }
}

/// The events that a subscriber has not received yet.
struct Inbox {
    /// An eventfd, readable when there is an event or the end.
    news: OwnedFd,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<Arc<str>>,
    /// How many earlier events the subscription started with.
    replayed: usize,
    /// No more events will come.
    over: bool,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event; false when the subscriber is too far behind, which ends its subscription.
    fn push(&self, event: &Arc<str>) -> bool {
        let mut queue = self.lock();
        queue.over |= queue.events.len() >= queue.replayed + BEHIND_LIMIT;
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

/// A subscription to the events.
pub struct Subscription(Arc<Inbox>);

/// The result of waiting for an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// An event, as a server-sent event.
    Event(Arc<str>),
    /// No event in that time.
    Quiet,
    /// The reader has hung up.
    HungUp,
    /// No more events: the reader was too far behind, or the daemon is ending.
    Over,
}

impl Subscription {
    /// The next event, unless the reader at the other end of this connection hangs up first.
    pub fn next(&self, reader: impl AsFd, limit: Duration) -> Next {
        let deadline = Instant::now() + limit;
        loop {
            {
                let mut queue = self.0.lock();
                // Reset under the lock, so that no event comes between the reset and the check.
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
    /// No events yet; the first one gets the id after this.
    pub fn after(last_id: u64) -> Events {
        Events(Mutex::new(Subscribers { last_id, ..Subscribers::default() }))
    }

    /// Sends an event to every subscriber, and keeps it for clients that subscribe again.
    pub fn publish(&self, kind: EventKind) {
        let mut subscribers = self.lock();
        // Numbered under the lock, so that every subscriber sees the numbers in order.
        let id = subscribers.last_id + 1;
        let Some(text) = (Event { id, time: now_ms(), kind: &kind }).text() else { return };
        subscribers.last_id = id;
        subscribers.keep(id, text.clone());
        subscribers.inboxes.retain(|inbox| inbox.upgrade().is_some_and(|inbox| inbox.push(&text)));
    }

    /// Subscribes to the events from now on. With `since` they start after that id, preceded by an
    /// [`EventKind::Gap`] if some of them are no longer kept.
    ///
    /// # Errors
    /// `overloaded` without a descriptor for the subscription.
    pub fn subscribe(&self, since: Option<u64>) -> Result<Subscription> {
        let news = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let news = news.map_err(|_| Error::Overloaded("connections"))?;
        let mut subscribers = self.lock();
        let events = since.map_or_else(VecDeque::new, |since| subscribers.since(since));
        let queue = Queue { over: subscribers.closed, replayed: events.len(), events };
        let inbox = Arc::new(Inbox { news, queue: Mutex::new(queue) });
        // Publishing also drops the inboxes of closed subscriptions, but may not happen for days.
        subscribers.inboxes.retain(|inbox| inbox.strong_count() > 0);
        subscribers.inboxes.push(Arc::downgrade(&inbox));
        Ok(Subscription(inbox))
    }

    /// Ends every subscription, including later ones.
    pub fn close(&self) {
        let mut subscribers = self.lock();
        subscribers.closed = true;
        for inbox in subscribers.inboxes.drain(..).filter_map(|inbox| inbox.upgrade()) {
            inbox.close();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Subscribers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const EVENT: EventKind = EventKind::EngineReady { generation: 1, pid: 2 };
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn closed_subscriptions_are_forgotten() {
        let (reader, _client) = UnixStream::pair().unwrap();
        let events = Events::default();
        let stays = events.subscribe(None).unwrap();
        for _ in 0..100 {
            drop(events.subscribe(None));
        }
        assert!(events.lock().inboxes.len() <= 2);
        events.publish(EVENT);
        assert!(matches!(stays.next(&reader, LONG), Next::Event(event) if event.contains("engine.ready")));
        assert_eq!(stays.next(&reader, Duration::ZERO), Next::Quiet);
    }

    #[test]
    fn hangup_is_noticed_without_an_event() {
        let (reader, client) = UnixStream::pair().unwrap();
        let events = Events::default();
        let subscription = events.subscribe(None).unwrap();
        drop(client);
        assert_eq!(subscription.next(&reader, LONG), Next::HungUp);
    }

    #[test]
    fn slow_reader_gets_its_backlog_and_then_the_end() {
        let (reader, _client) = UnixStream::pair().unwrap();
        let events = Events::default();
        let slow = events.subscribe(None).unwrap();
        for _ in 0..=BEHIND_LIMIT {
            events.publish(EVENT);
        }
        for _ in 0..BEHIND_LIMIT {
            assert!(matches!(slow.next(&reader, LONG), Next::Event(_)));
        }
        assert_eq!(slow.next(&reader, LONG), Next::Over);
    }

    /// The ids of the available events; a gap's is negative.
    fn ids(subscription: &Subscription) -> Vec<i64> {
        let (reader, _client) = UnixStream::pair().unwrap();
        let mut ids = Vec::new();
        while let Next::Event(event) = subscription.next(&reader, Duration::ZERO) {
            let id: i64 = event.split(['\n', ' ']).nth(1).unwrap().parse().unwrap();
            ids.push(if event.contains("\"gap\"") { -id } else { id });
        }
        ids
    }

    #[test]
    fn reconnect_replays_missed_events_or_reports_a_gap() {
        let events = Events::after(5000);
        let since = |since| ids(&events.subscribe(Some(since)).unwrap());
        assert_eq!(since(5000), [0; 0]);
        // An id of an earlier daemon: the events in between are unknown.
        assert_eq!(since(4000), [-5000]);
        for _ in 0..3 {
            events.publish(EVENT);
        }
        assert_eq!(since(4000), [-5000, 5001, 5002, 5003]);
        assert_eq!(since(5000), [5001, 5002, 5003]);
        assert_eq!(since(5002), [5003]);
        assert_eq!(since(5003), [0; 0]);
        // An id of a daemon whose clock was ahead.
        assert_eq!(since(u64::MAX - 1), [-5000, 5001, 5002, 5003]);
        for _ in 0..KEPT {
            events.publish(EVENT);
        }
        assert_eq!(since(5002)[..2], [-5003, 5004]);
        assert_eq!(since(5003).len(), KEPT);
        // A replay does not reduce the room for new events.
        let slow = events.subscribe(Some(5003)).unwrap();
        for _ in 0..BEHIND_LIMIT {
            events.publish(EVENT);
        }
        assert_eq!(ids(&slow).len(), KEPT + BEHIND_LIMIT);
    }

    #[test]
    fn kept_events_are_limited_in_bytes() {
        let events = Events::after(0);
        let large = "x".repeat(KEPT_BYTES / 4);
        for _ in 0..10 {
            let error = ErrorBody { code: "internal".to_owned(), message: large.clone(), hint: None };
            events.publish(EventKind::EngineFailed { error });
        }
        let subscription = events.subscribe(Some(0)).unwrap();
        assert_eq!(ids(&subscription), [-7, 8, 9, 10]);
    }

    #[test]
    fn close_ends_every_subscription() {
        let (reader, _client) = UnixStream::pair().unwrap();
        let events = Events::default();
        let before = events.subscribe(None).unwrap();
        events.close();
        for subscription in [before, events.subscribe(None).unwrap()] {
            assert_eq!(subscription.next(&reader, LONG), Next::Over);
        }
    }
}
