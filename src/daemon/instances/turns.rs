//! Reduces opencode's events to the start, the end and the errors of each turn, once each.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::daemon::engine::Step;
use crate::daemon::events::{EventKind, EventSession, SessionError};
use crate::workspace::Workspace;

/// The most sessions to remember, at some hundred bytes each. Forgetting one costs its title, or repeats an
/// event.
const SESSIONS: usize = 4096;
/// The longest error message that is published, in characters: some contain a whole reply.
const MESSAGE_LIMIT: usize = 1000;

/// A change of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A turn has started.
    Started,
    /// The turn has ended.
    Idle,
    /// A turn failed or was aborted.
    Error {
        /// OpenCode's name for the kind of error.
        name: String,
        /// A message for people; may be empty.
        message: String,
    },
}

/// A change, and the session that it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionChange {
    /// The id of the session; some errors have none.
    pub id: Option<String>,
    /// The title of the session, if known.
    pub title: Option<String>,
    /// The change.
    pub change: Change,
}

impl SessionChange {
    /// The change as an event of the daemon.
    pub fn event(self, directory: String, workspace: Option<Arc<Workspace>>) -> EventKind {
        let SessionChange { id, title, change } = self;
        let session = EventSession { session_id: id, title, workspace, directory };
        match change {
            Change::Started => EventKind::SessionStarted(session),
            Change::Idle => EventKind::SessionIdle(session),
            Change::Error { name, message } => {
                EventKind::SessionError { session, error: SessionError { name, message } }
            }
        }
    }
}

/// The sessions known from events.
#[derive(Debug, Default)]
pub struct Turns(HashMap<String, Known>);

#[derive(Debug, Default)]
struct Known {
    title: Option<String>,
    runs: Option<bool>,
}

/// Locks the turns. After a panic of another thread they are still consistent, since each update is atomic.
pub fn lock(turns: &Mutex<Turns>) -> MutexGuard<'_, Turns> {
    turns.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Turns {
    /// Records an event of opencode; returns the change, if the event brings one.
    pub fn observe(&mut self, session: Option<&str>, step: Step) -> Option<SessionChange> {
        match (step, session) {
            (Step::Titled(title), Some(id)) => {
                self.known(id).title = title;
                None
            }
            (Step::Deleted, Some(id)) => {
                self.0.remove(id);
                None
            }
            (Step::Runs, Some(id)) => self.runs(id, true),
            (Step::Idle, Some(id)) => self.runs(id, false),
            (Step::Failed { name, message }, session) => {
                let change = Change::Error { name, message: message.chars().take(MESSAGE_LIMIT).collect() };
                let title = session.and_then(|id| self.0.get(id)?.title.clone());
                Some(SessionChange { id: session.map(str::to_owned), title, change })
            }
            (Step::Titled(_) | Step::Deleted | Step::Runs | Step::Idle, None) => None,
        }
    }

    /// Another opencode began: whether turns run in it is unknown.
    pub fn begin(&mut self) {
        for known in self.0.values_mut() {
            known.runs = None;
        }
    }

    fn runs(&mut self, id: &str, runs: bool) -> Option<SessionChange> {
        let known = self.known(id);
        let is_new = known.runs.replace(runs) != Some(runs);
        let change = if runs { Change::Started } else { Change::Idle };
        let title = known.title.clone();
        is_new.then(|| SessionChange { id: Some(id.to_owned()), title, change })
    }

    fn known(&mut self, id: &str) -> &mut Known {
        if self.0.len() >= SESSIONS && !self.0.contains_key(id) {
            self.0.retain(|_, known| known.runs == Some(true));
        }
        // No machine has this many running turns: the records are wrong.
        if self.0.len() >= SESSIONS {
            self.0.clear();
        }
        self.0.entry(id.to_owned()).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(turns: &mut Turns, id: &str, step: Step) -> Option<Change> {
        turns.observe(Some(id), step).map(|change| change.change)
    }

    #[test]
    fn each_turn_is_reported_once() {
        let mut turns = Turns::default();
        for _ in 0..2 {
            assert_eq!(change(&mut turns, "ses_1", Step::Runs), Some(Change::Started));
            assert_eq!(change(&mut turns, "ses_1", Step::Runs), None);
            assert_eq!(change(&mut turns, "ses_1", Step::Idle), Some(Change::Idle));
            assert_eq!(change(&mut turns, "ses_1", Step::Idle), None);
        }
        // The end of a turn that started under an earlier daemon.
        assert_eq!(change(&mut turns, "ses_2", Step::Idle), Some(Change::Idle));
        // opencode ended during a turn: the next start is reported again.
        assert_eq!(change(&mut turns, "ses_1", Step::Runs), Some(Change::Started));
        turns.begin();
        assert_eq!(change(&mut turns, "ses_1", Step::Runs), Some(Change::Started));
    }

    #[test]
    fn titles_and_errors_are_reported() {
        let mut turns = Turns::default();
        let failed = || Step::Failed { name: "MessageAbortedError".to_owned(), message: "x".repeat(2000) };
        assert_eq!(turns.observe(Some("ses_1"), Step::Titled(Some("mend".to_owned()))), None);
        let change = turns.observe(Some("ses_1"), failed()).unwrap();
        assert_eq!((change.id.as_deref(), change.title.as_deref()), (Some("ses_1"), Some("mend")));
        let message = "x".repeat(MESSAGE_LIMIT);
        assert_eq!(change.change, Change::Error { name: "MessageAbortedError".to_owned(), message });
        assert_eq!(turns.observe(Some("ses_1"), Step::Deleted), None);
        assert_eq!(turns.observe(Some("ses_1"), failed()).unwrap().title, None);
        let bare = turns.observe(None, failed()).unwrap();
        assert_eq!((bare.id, bare.title), (None, None));
        assert_eq!(turns.observe(None, Step::Idle), None);
    }

    #[test]
    fn remembered_sessions_are_limited() {
        let mut turns = Turns::default();
        for n in 0..3 * SESSIONS {
            let step = if n % 2 == 0 { Step::Runs } else { Step::Idle };
            assert!(turns.observe(Some(&format!("ses_{n}")), step).is_some());
            assert!(turns.0.len() <= SESSIONS);
        }
    }
}
