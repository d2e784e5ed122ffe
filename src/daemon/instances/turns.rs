//! The beginning, the end and the errors of each turn, each told once, from what opencode's events say.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::daemon::engine::Step;
use crate::daemon::events::{EventKind, EventSession, SessionError};
use crate::workspace::Workspace;

/// The most sessions that are remembered; each takes some hundred bytes, and what is forgotten costs a
/// title or a repeated event.
const SESSIONS: usize = 4096;
/// The longest message of an error that is passed on, in characters: some have a whole reply in them.
const MESSAGE_LIMIT: usize = 1000;

/// What is new of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A turn has begun.
    Started,
    /// No turn runs any more.
    Idle,
    /// Something went wrong in a turn. An abort is among that.
    Error {
        /// OpenCode's name of the kind of error.
        name: String,
        /// For a person; may be empty.
        message: String,
    },
}

/// News of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Its id; an error can be about none.
    pub id: Option<String>,
    /// Its title, once an event has told it.
    pub title: Option<String>,
    /// What is new.
    pub news: News,
}

impl Told {
    /// As an event of the daemon's.
    pub fn event(self, directory: String, workspace: Option<Arc<Workspace>>) -> EventKind {
        let Told { id, title, news } = self;
        let session = EventSession { session_id: id, title, workspace, directory };
        match news {
            News::Started => EventKind::SessionStarted(session),
            News::Idle => EventKind::SessionIdle(session),
            News::Error { name, message } => EventKind::SessionError { session, error: SessionError { name, message } },
        }
    }
}

/// The sessions that events have told of.
#[derive(Debug, Default)]
pub struct Turns(HashMap<String, Known>);

#[derive(Debug, Default)]
struct Known {
    title: Option<String>,
    runs: Option<bool>,
}

/// The turns, also after a panic of another thread: each change of them is whole.
pub fn lock(turns: &Mutex<Turns>) -> MutexGuard<'_, Turns> {
    turns.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Turns {
    /// What opencode says of a turn; what of it is new.
    pub fn observe(&mut self, session: Option<&str>, step: Step) -> Option<Told> {
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
                let news = News::Error { name, message: message.chars().take(MESSAGE_LIMIT).collect() };
                let title = session.and_then(|id| self.0.get(id)?.title.clone());
                Some(Told { id: session.map(str::to_owned), title, news })
            }
            (Step::Titled(_) | Step::Deleted | Step::Runs | Step::Idle, None) => None,
        }
    }

    /// Another opencode: nothing runs in it that is known.
    pub fn begin(&mut self) {
        for known in self.0.values_mut() {
            known.runs = None;
        }
    }

    fn runs(&mut self, id: &str, runs: bool) -> Option<Told> {
        let known = self.known(id);
        let is_new = known.runs.replace(runs) != Some(runs);
        let news = if runs { News::Started } else { News::Idle };
        let title = known.title.clone();
        is_new.then(|| Told { id: Some(id.to_owned()), title, news })
    }

    fn known(&mut self, id: &str) -> &mut Known {
        if self.0.len() >= SESSIONS && !self.0.contains_key(id) {
            self.0.retain(|_, known| known.runs == Some(true));
        }
        // All of them run: no machine has so many turns at once.
        if self.0.len() >= SESSIONS {
            self.0.clear();
        }
        self.0.entry(id.to_owned()).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn news(turns: &mut Turns, id: &str, step: Step) -> Option<News> {
        turns.observe(Some(id), step).map(|told| told.news)
    }

    #[test]
    fn each_turn_is_reported_once() {
        let mut turns = Turns::default();
        for _ in 0..2 {
            assert_eq!(news(&mut turns, "ses_1", Step::Runs), Some(News::Started));
            assert_eq!(news(&mut turns, "ses_1", Step::Runs), None);
            assert_eq!(news(&mut turns, "ses_1", Step::Idle), Some(News::Idle));
            assert_eq!(news(&mut turns, "ses_1", Step::Idle), None);
        }
        // The first word of a turn that began under an earlier daemon.
        assert_eq!(news(&mut turns, "ses_2", Step::Idle), Some(News::Idle));
        // The turn of an opencode that has ended: the next one starts anew.
        assert_eq!(news(&mut turns, "ses_1", Step::Runs), Some(News::Started));
        turns.begin();
        assert_eq!(news(&mut turns, "ses_1", Step::Runs), Some(News::Started));
    }

    #[test]
    fn titles_and_errors_are_reported() {
        let mut turns = Turns::default();
        let failed = || Step::Failed { name: "MessageAbortedError".to_owned(), message: "x".repeat(2000) };
        assert_eq!(turns.observe(Some("ses_1"), Step::Titled(Some("mend".to_owned()))), None);
        let told = turns.observe(Some("ses_1"), failed()).unwrap();
        assert_eq!((told.id.as_deref(), told.title.as_deref()), (Some("ses_1"), Some("mend")));
        let message = "x".repeat(MESSAGE_LIMIT);
        assert_eq!(told.news, News::Error { name: "MessageAbortedError".to_owned(), message });
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
