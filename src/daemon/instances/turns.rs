//! What opencode's events say of turns: the beginning, the end and the errors of each.
//!
//! opencode 1.18 tells of each step of a turn that the session is busy, and twice of its end
//! (`session.status` and `session.idle`); here each is told once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::daemon::events::{EventKind, EventSession, SessionError};
use crate::wire::from_json;
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

/// The properties of `session.*`.
#[derive(Deserialize)]
struct Properties {
    #[serde(rename = "sessionID")]
    session_id: Option<String>,
    status: Option<Status>,
    error: Option<EngineError>,
    info: Option<Info>,
}

#[derive(Deserialize)]
struct Status {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct EngineError {
    name: Option<String>,
    data: Option<ErrorData>,
}

#[derive(Deserialize)]
struct ErrorData {
    message: Option<String>,
}

#[derive(Deserialize)]
struct Info {
    id: String,
    title: Option<String>,
}

/// An event of `GET /global/event` (1.x).
#[derive(Deserialize)]
struct Event<'a> {
    directory: Option<String>,
    #[serde(borrow)]
    payload: Option<Payload<'a>>,
}

#[derive(Deserialize)]
struct Payload<'a> {
    #[serde(rename = "type")]
    kind: String,
    /// Looked into only where that is of use: some are large.
    #[serde(borrow)]
    properties: Option<&'a RawValue>,
}

impl Turns {
    /// An event of opencode's; what it tells that is new, and in which directory.
    pub fn observe(&mut self, event: &[u8]) -> Option<(String, Told)> {
        let Event { directory, payload } = from_json(event).ok()?;
        let Payload { kind, properties } = payload?;
        let directory = directory.filter(|directory| directory.starts_with('/'))?;
        self.told(&kind, properties).map(|told| (directory, told))
    }

    /// Another opencode: nothing runs in it that is known.
    pub fn begin(&mut self) {
        for known in self.0.values_mut() {
            known.runs = None;
        }
    }

    /// An event with its properties; what it tells that is new.
    fn told(&mut self, kind: &str, properties: Option<&RawValue>) -> Option<Told> {
        let what = kind.strip_prefix("session.")?;
        let Properties { session_id, status, error, info } = from_json(properties?.get().as_bytes()).ok()?;
        match what {
            "created" | "updated" => {
                let Info { id, title } = info?;
                self.known(&id).title = title.filter(|title| !title.is_empty());
                None
            }
            "deleted" => {
                self.0.remove(&info?.id);
                None
            }
            "status" => match status?.kind.as_str() {
                "idle" => self.runs(session_id?, false),
                _ => self.runs(session_id?, true),
            },
            "idle" => self.runs(session_id?, false),
            "error" => {
                let EngineError { name, data } = error?;
                let message = data.and_then(|data| data.message).unwrap_or_default();
                let news = News::Error {
                    name: name.unwrap_or_default(),
                    message: message.chars().take(MESSAGE_LIMIT).collect(),
                };
                let title = session_id.as_ref().and_then(|id| self.0.get(id)?.title.clone());
                Some(Told { id: session_id, title, news })
            }
            _ => None,
        }
    }

    fn runs(&mut self, id: String, runs: bool) -> Option<Told> {
        let known = self.known(&id);
        let is_new = known.runs.replace(runs) != Some(runs);
        let news = if runs { News::Started } else { News::Idle };
        let title = known.title.clone();
        is_new.then_some(Told { id: Some(id), title, news })
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

    fn told(turns: &mut Turns, kind: &str, properties: &str) -> Option<Told> {
        turns.told(kind, Some(&RawValue::from_string(properties.to_owned()).unwrap()))
    }

    fn news(turns: &mut Turns, kind: &str, properties: &str) -> Option<News> {
        told(turns, kind, properties).map(|told| told.news)
    }

    const BUSY: &str = r#"{"sessionID":"ses_1","status":{"type":"busy"}}"#;
    const RETRY: &str = r#"{"sessionID":"ses_1","status":{"type":"retry","attempt":1,"message":"x","next":2}}"#;
    const IDLE: &str = r#"{"sessionID":"ses_1","status":{"type":"idle"}}"#;

    #[test]
    fn each_turn_begins_and_ends_once() {
        let mut turns = Turns::default();
        for _ in 0..2 {
            assert_eq!(news(&mut turns, "session.status", BUSY), Some(News::Started));
            assert_eq!(news(&mut turns, "session.status", BUSY), None);
            assert_eq!(news(&mut turns, "session.status", RETRY), None);
            assert_eq!(news(&mut turns, "session.status", IDLE), Some(News::Idle));
            assert_eq!(news(&mut turns, "session.idle", r#"{"sessionID":"ses_1"}"#), None);
        }
        // The first word of a turn that began under an earlier daemon.
        assert_eq!(news(&mut turns, "session.idle", r#"{"sessionID":"ses_2"}"#), Some(News::Idle));
        // The turn of an opencode that has ended: the next one starts anew.
        assert_eq!(news(&mut turns, "session.status", BUSY), Some(News::Started));
        turns.begin();
        assert_eq!(news(&mut turns, "session.status", BUSY), Some(News::Started));
    }

    #[test]
    fn titles_and_errors_are_told() {
        let mut turns = Turns::default();
        let info = r#"{"sessionID":"ses_1","info":{"id":"ses_1","title":"mend","time":{}}}"#;
        assert_eq!(told(&mut turns, "session.updated", info), None);
        let error = r#"{"sessionID":"ses_1","error":{"name":"MessageAbortedError","data":{"message":"Aborted"}}}"#;
        let news = News::Error { name: "MessageAbortedError".to_owned(), message: "Aborted".to_owned() };
        let expected = Told { id: Some("ses_1".to_owned()), title: Some("mend".to_owned()), news };
        assert_eq!(told(&mut turns, "session.error", error), Some(expected));
        let bare = told(&mut turns, "session.error", r#"{"error":{"name":"UnknownError"}}"#).unwrap();
        assert_eq!((bare.id, bare.title), (None, None));
        for (kind, other) in [
            ("message.updated", info),
            ("session.compacted", IDLE),
            ("session.status", "{}"),
            ("session.idle", "[]"),
            ("session.error", r#"{"error":"text"}"#),
        ] {
            assert_eq!(told(&mut turns, kind, other), None, "{kind} {other}");
        }
    }

    #[test]
    fn only_so_many_are_remembered() {
        let mut turns = Turns::default();
        for n in 0..3 * SESSIONS {
            let status = format!(r#"{{"sessionID":"ses_{n}","status":{{"type":"{}"}}}}"#, ["busy", "idle"][n % 2]);
            assert!(told(&mut turns, "session.status", &status).is_some());
            assert!(turns.0.len() <= SESSIONS);
        }
    }
}
