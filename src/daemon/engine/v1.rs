//! The protocol of opencode 1.x; `v2.rs` has the same functions.
//!
//! Sources of the protocol: the OpenAPI document of 1.18.33 (`GET /doc`), and measurements of that version.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::routing::{Subject, segments};
use super::{CallResult, Endpoint, InstanceEvent, InstanceRef, Lifecycle, SessionInfo, Sign, Step, TurnEvent, fault};
use crate::framing::percent_encode;
use crate::line::{V1_PASSWORD, V1_USERNAME};
use crate::state::Auth;
use crate::wire::from_json;

/// The time limit for a disposal, which mostly takes some milliseconds.
pub const DISPOSE_LIMIT: Duration = Duration::from_secs(10);

/// A call disposes all instances before TERM, so little work is left for TERM.
pub const LIFECYCLE: Lifecycle = Lifecycle { disposes: true, kill_after: Duration::from_secs(5), is_service: false };

/// The exit status after TERM or INT.
pub const CLEAN_EXIT: i32 = 0;

/// The beginning of every session's id.
const SESSION_PREFIX: &str = "ses";

/// The event stream of all instances.
pub const EVENTS: &str = "/global/event";

/// The credentials in the environment of `opencode serve`.
pub fn credentials(auth: &Auth) -> [(&'static str, String); 2] {
    [(V1_USERNAME, auth.opencode_username.clone()), (V1_PASSWORD, auth.opencode_password.clone())]
}

/// `GET /global/health`: the version.
pub fn health(endpoint: &Endpoint, deadline: Instant) -> CallResult<String> {
    let answer = endpoint.ask("GET", "/global/health", None, deadline)?;
    match (&answer["healthy"], &answer["version"]) {
        (Value::Bool(true), Value::String(version)) => Ok(version.clone()),
        _ => Err(fault("opencode reports that it is not healthy")),
    }
}

/// `GET /path`: the directories of an instance. Loads the instance.
pub fn path(endpoint: &Endpoint, directory: &Path, deadline: Instant) -> CallResult<Map<String, Value>> {
    match endpoint.ask("GET", "/path", Some(directory), deadline)? {
        Value::Object(path) if path.get("directory").is_some_and(Value::is_string) => Ok(path),
        _ => Err(fault("GET /path: no directory in the answer")),
    }
}

/// `GET /session/status`: the ids of the running sessions of an instance. Loads the instance.
pub fn running_sessions(endpoint: &Endpoint, directory: &Path, deadline: Instant) -> CallResult<Vec<String>> {
    match endpoint.ask("GET", "/session/status", Some(directory), deadline)? {
        Value::Object(sessions) => {
            let is_idle = |status: &Value| status.get("type").and_then(Value::as_str) == Some("idle");
            Ok(sessions.into_iter().filter(|(_, status)| !is_idle(status)).map(|(id, _)| id).collect())
        }
        _ => Err(fault("GET /session/status: not an object")),
    }
}

/// `GET /session`: the sessions of a directory; 1.18 lists the last hundred. Loads the instance.
pub fn sessions(endpoint: &Endpoint, directory: &Path, deadline: Instant) -> CallResult<Vec<SessionInfo>> {
    let filter = directory_filter("/session", directory).unwrap_or_default();
    match endpoint.ask("GET", &format!("/session?{filter}"), Some(directory), deadline)? {
        Value::Array(sessions) => Ok(sessions.iter().filter_map(SessionInfo::of).collect()),
        _ => Err(fault("GET /session: not a list")),
    }
}

/// `GET /session/:id`: a session; `None` when there is no such session. Loads the instance.
pub fn session(endpoint: &Endpoint, directory: &Path, id: &str, deadline: Instant) -> CallResult<Option<SessionInfo>> {
    // opencode answers 500 to any other id.
    if !id.starts_with(SESSION_PREFIX) {
        return Ok(None);
    }
    let target = format!("/session/{}", percent_encode(id.as_bytes()));
    let reply = endpoint.request(("GET", &target), Some(directory), None, deadline)?;
    match reply.status {
        // Status 400: the text cannot be an id.
        400 | 404 => Ok(None),
        _ => Ok(SessionInfo::of(&reply.json(("GET", &target))?)),
    }
}

/// `POST /session/:id/abort`: ends the running turn of a session in this directory. Loads the instance.
pub fn abort(endpoint: &Endpoint, directory: &Path, id: &str, deadline: Instant) -> CallResult<()> {
    let target = format!("/session/{}/abort", percent_encode(id.as_bytes()));
    endpoint.ask("POST", &target, Some(directory), deadline).map(|_| ())
}

/// `POST /instance/dispose`. Loads the instance first if it is not loaded.
pub fn dispose(endpoint: &Endpoint, directory: &Path, deadline: Instant) -> CallResult<()> {
    endpoint.ask("POST", "/instance/dispose", Some(directory), deadline).map(|_| ())
}

/// `POST /global/dispose`: disposes all instances with their children.
pub fn dispose_all(endpoint: &Endpoint, deadline: Instant) -> CallResult<()> {
    endpoint.ask("POST", "/global/dispose", None, deadline).map(|_| ())
}

/// An event of `GET /global/event`.
#[derive(Deserialize)]
struct Event<'a> {
    directory: Option<String>,
    #[serde(borrow)]
    payload: Payload<'a>,
}

#[derive(Deserialize)]
struct Payload<'a> {
    #[serde(rename = "type")]
    kind: String,
    /// Parsed only for events about turns, since some are large.
    #[serde(borrow)]
    properties: Option<&'a RawValue>,
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

/// Parses an event about a turn; `None` for other events. 1.18 reports a busy session for each step of a
/// turn, and the end of a turn twice (`session.status` and `session.idle`).
pub fn turn_event(event: &[u8]) -> Option<TurnEvent> {
    let Event { directory, payload: Payload { kind, properties } } = from_json(event).ok()?;
    let directory = directory.filter(|directory| directory.starts_with('/'))?;
    let what = kind.strip_prefix("session.")?;
    let Properties { session_id, status, error, info } = from_json(properties?.get().as_bytes()).ok()?;
    let (session, step) = match what {
        "created" | "updated" => {
            let Info { id, title } = info?;
            (Some(id), Step::Titled(title.filter(|title| !title.is_empty())))
        }
        "deleted" => (Some(info?.id), Step::Deleted),
        "status" if status.as_ref()?.kind != "idle" => (Some(session_id?), Step::Runs),
        "status" | "idle" => (Some(session_id?), Step::Idle),
        "error" => {
            let EngineError { name, data } = error?;
            let message = data.and_then(|data| data.message).unwrap_or_default();
            (session_id, Step::Failed { name: name.unwrap_or_default(), message })
        }
        _ => return None,
    };
    Some(TurnEvent { instance: InstanceRef::Directory(directory), session, step })
}

/// Parses an event about an instance; `None` for other events.
pub fn instance_event(event: &[u8]) -> Option<InstanceEvent> {
    let Event { directory, payload: Payload { kind, .. } } = from_json(event).ok()?;
    // Events about no instance have no directory, or the directory "global".
    let directory = directory.filter(|directory| directory.starts_with('/'))?;
    let sign = match kind.split('.').next().unwrap_or_default() {
        "server" if kind == "server.instance.disposed" => Sign::Disposed,
        "server" | "global" => return None,
        // Events that clients cause; the others come from the instance itself (watching files, say).
        "session" | "message" | "permission" | "question" | "pty" | "todo" | "tui" | "command" => Sign::Used,
        _ => Sign::Alive,
    };
    Some(InstanceEvent { sign, instance: InstanceRef::Directory(directory), session: None })
}

/// The parameter that replaces `directory` in the query at paths where `directory` is also a filter: only
/// the parameter limits the list of sessions to a directory, not the header. opencode decodes the value once
/// more than usual, except in its early form of the 2.x protocol.
pub fn directory_filter(path: &str, directory: &Path) -> Option<String> {
    let once = percent_encode(directory.as_os_str().as_encoded_bytes());
    let segments = segments(path);
    let value = match segments.iter().map(Vec::as_slice).collect::<Vec<_>>()[..] {
        [b"session"] | [b"experimental", b"session"] => percent_encode(once.as_bytes()),
        [b"api", b"session"] => once,
        _ => return None,
    };
    Some(format!("directory={value}"))
}

/// The subject of a request. All requests load the instance, except those about none, and those of the early
/// form of the 2.x protocol (`/api`), which has instances of its own.
pub fn subject(path: &str) -> Subject {
    let segments = segments(path);
    match segments.iter().map(Vec::as_slice).collect::<Vec<_>>()[..] {
        [b"global" | b"auth" | b"api", _, ..] | [b"doc"] => Subject::Process,
        [..] => Subject::Instance,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_turns() {
        let step = |kind: &str, properties: &str| {
            let event = format!(r#"{{"directory":"/a","payload":{{"type":"{kind}","properties":{properties}}}}}"#);
            let turn = turn_event(event.as_bytes())?;
            assert_eq!(turn.instance, InstanceRef::Directory("/a".to_owned()));
            Some((turn.session, turn.step))
        };
        let of = |step| Some((Some("ses_1".to_owned()), step));
        let status = |kind: &str| format!(r#"{{"sessionID":"ses_1","status":{{"type":"{kind}"}}}}"#);
        assert_eq!(step("session.status", &status("busy")), of(Step::Runs));
        assert_eq!(step("session.status", &status("retry")), of(Step::Runs));
        assert_eq!(step("session.status", &status("idle")), of(Step::Idle));
        assert_eq!(step("session.idle", r#"{"sessionID":"ses_1"}"#), of(Step::Idle));
        let info = r#"{"sessionID":"ses_1","info":{"id":"ses_1","title":"mend","time":{}}}"#;
        assert_eq!(step("session.updated", info), of(Step::Titled(Some("mend".to_owned()))));
        assert_eq!(step("session.deleted", info), of(Step::Deleted));
        let failed = |name: &str, message: &str| Step::Failed { name: name.to_owned(), message: message.to_owned() };
        let error = r#"{"sessionID":"ses_1","error":{"name":"MessageAbortedError","data":{"message":"Aborted"}}}"#;
        assert_eq!(step("session.error", error), of(failed("MessageAbortedError", "Aborted")));
        assert_eq!(
            step("session.error", r#"{"error":{"name":"UnknownError"}}"#),
            Some((None, failed("UnknownError", "")))
        );
        for (kind, other) in [
            ("message.updated", info),
            ("session.compacted", &status("idle")),
            ("session.status", "{}"),
            ("session.idle", "[]"),
            ("session.error", r#"{"error":"text"}"#),
        ] {
            assert_eq!(step(kind, other), None, "{kind} {other}");
        }
        assert_eq!(turn_event(br#"{"payload":{"type":"session.idle","properties":{"sessionID":"ses_1"}}}"#), None);
    }
}
