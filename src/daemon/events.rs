//! Who is told what happened: the source of `GET /events`.
//!
//! Publishing never waits. A subscriber that does not read is dropped, and its stream ends: it
//! can subscribe again and read the state anew, which is more than a gap would tell it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

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
    subscribers: Mutex<Vec<SyncSender<Arc<str>>>>,
}

impl Events {
    /// Tells everybody. Each subscriber gets the event as one server-sent event.
    pub fn publish(&self, kind: EventKind) {
        let mut subscribers = self.subscribers.lock().unwrap_or_else(PoisonError::into_inner);
        // Numbered under the lock, so that everybody sees the numbers in order.
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        if subscribers.is_empty() {
            return;
        }
        let Ok(data) = serde_json::to_string(&Event { id, time: now_ms(), kind: &kind }) else { return };
        let text: Arc<str> = format!("id: {id}\ndata: {data}\n\n").into();
        subscribers.retain(|subscriber| match subscriber.try_send(text.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        });
    }

    /// What happens from now on. The channel ends when the reader is too far behind.
    pub fn subscribe(&self) -> Receiver<Arc<str>> {
        let (sender, receiver) = sync_channel(BEHIND_LIMIT);
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        receiver
    }

    /// Ends every subscription.
    pub fn close(&self) {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
