//! The protocol of opencode 2.x; `v1.rs` has the same functions.
//!
//! 2.x calls its instances *locations* and identifies each by the exact string in the request. It lists the
//! loaded locations and the running sessions without loading a location.
//!
//! Sources of the protocol: measurements of a server built from the sources of August 2026, and for newer
//! parts the sources of 2.0.18 to 2.3.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::routing::{Subject, segments};
use super::{
    CallError, CallResult, Endpoint, InstanceEvent, InstanceRef, Lifecycle, SessionInfo, Sign, Step, TurnEvent, fault,
};
use crate::error::Error;
use crate::framing::{percent_decode, percent_encode};
use crate::line::{Line, V1_PASSWORD, V2_PASSWORD};
use crate::state::Auth;
use crate::wire::from_json;

/// The time limit for a disposal. opencode answers after the teardown: 4.2 s with one MCP server that
/// ignores TERM.
pub const DISPOSE_LIMIT: Duration = Duration::from_secs(30);

/// 2.x has no call that disposes all locations: it disposes them at TERM, which took up to 6.8 s.
pub const LIFECYCLE: Lifecycle = Lifecycle { disposes: false, kill_after: Duration::from_secs(15), is_service: false };

/// The exit status after TERM or INT.
pub const CLEAN_EXIT: i32 = 130;

/// The event stream of the whole process.
pub const EVENTS: &str = "/api/event";

/// The credentials in the environment of `opencode serve`. The user is always `opencode`.
pub fn credentials(auth: &Auth) -> [(&'static str, String); 2] {
    // The first takes precedence; the second replaces an inherited value.
    [(V2_PASSWORD, auth.opencode_password.clone()), (V1_PASSWORD, auth.opencode_password.clone())]
}

/// `GET /api/info`: the version. Versions that are too old have this route under other names.
pub fn health(endpoint: &Endpoint, deadline: Instant) -> CallResult<String> {
    let reply = endpoint.request(("GET", "/api/info"), None, None, deadline)?;
    // The status is 503 while opencode starts.
    if reply.status == 404 {
        let version = "a 2.x without GET /api/info".to_owned();
        return Err(CallError::Failed(Error::OpencodeUnsupported { path: "opencode".into(), version, shared: false }));
    }
    match reply.json(("GET", "/api/info"))?.get("version") {
        Some(Value::String(version)) if Line::of(version) == Some(Line::V2) => Ok(version.clone()),
        _ => Err(fault("GET /api/info: no version of 2.x in the answer")),
    }
}

/// The query parameter that chooses a location. Always pass a resolved path: opencode takes each spelling of
/// a directory for a different location.
pub fn location(directory: &Path) -> String {
    format!("location%5Bdirectory%5D={}", percent_encode(directory.as_os_str().as_encoded_bytes()))
}

fn at_location(path: &str, directory: &Path) -> String {
    format!("{path}?{}", location(directory))
}

/// `GET /api/location`, in the form of `GET /path` of 1.x. Loads the location.
pub fn path(endpoint: &Endpoint, directory: &Path, deadline: Instant) -> CallResult<Map<String, Value>> {
    let answer = endpoint.ask("GET", &at_location("/api/location", directory), Some(directory), deadline)?;
    // Another directory would mean that opencode did not understand the parameter.
    if answer["directory"].as_str().map(Path::new) != Some(directory) {
        return Err(fault("GET /api/location: the answer is about another directory"));
    }
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    // 2.x no longer returns these directories; they follow from the environment, which it has from us.
    let home = variable("HOME").unwrap_or_default();
    let below = |name: &str, default: &str| variable(name).unwrap_or_else(|| format!("{home}/{default}"));
    let (state, config) = (below("XDG_STATE_HOME", ".local/state"), below("XDG_CONFIG_HOME", ".config"));
    let path = [
        ("home", Value::from(&*home)),
        ("state", Value::from(state + "/opencode")),
        ("config", Value::from(config + "/opencode")),
        ("worktree", answer["project"]["directory"].clone()),
        ("directory", answer["directory"].clone()),
    ];
    Ok(path.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

/// `GET /api/session/active`: the ids of all running sessions.
pub fn active_sessions(endpoint: &Endpoint, deadline: Instant) -> CallResult<Vec<String>> {
    let answer = endpoint.ask("GET", "/api/session/active", None, deadline)?;
    let active = answer["data"].as_object().ok_or_else(|| fault("GET /api/session/active: no data"))?;
    Ok(active.keys().cloned().collect())
}

/// `GET /api/session/:id`: the directory of a session; `None` when there is no such session.
pub fn session_directory(endpoint: &Endpoint, id: &str, deadline: Instant) -> CallResult<Option<String>> {
    let target = format!("/api/session/{}", percent_encode(id.as_bytes()));
    let reply = endpoint.request(("GET", &target), None, None, deadline)?;
    if matches!(reply.status, 400 | 404) {
        return Ok(None);
    }
    let answer = reply.json(("GET", &target))?;
    match answer["data"]["location"]["directory"].as_str() {
        Some(directory) => Ok(Some(directory.to_owned())),
        None => Err(fault(&format!("GET {target}: no directory in the answer"))),
    }
}

/// `GET /api/session`: the sessions of a directory, the most recently updated first.
pub fn sessions(endpoint: &Endpoint, directory: &Path, deadline: Instant) -> CallResult<Vec<SessionInfo>> {
    let filter = directory_filter("/api/session", directory).unwrap_or_default();
    let answer = endpoint.ask("GET", &format!("/api/session?{filter}"), None, deadline)?;
    let list = answer["data"].as_array().ok_or_else(|| fault("GET /api/session: no data"))?;
    Ok(list.iter().filter_map(SessionInfo::of).collect())
}

/// `GET /api/session/:id`: a session; `None` when there is no such session.
pub fn session(endpoint: &Endpoint, id: &str, deadline: Instant) -> CallResult<Option<SessionInfo>> {
    let target = format!("/api/session/{}", percent_encode(id.as_bytes()));
    let reply = endpoint.request(("GET", &target), None, None, deadline)?;
    match reply.status {
        400 | 404 => Ok(None),
        _ => Ok(SessionInfo::of(&reply.json(("GET", &target))?["data"])),
    }
}

/// `POST /api/session/:id/interrupt`: ends the running turn of a session. Loads its location.
pub fn interrupt(endpoint: &Endpoint, id: &str, deadline: Instant) -> CallResult<()> {
    let target = format!("/api/session/{}/interrupt", percent_encode(id.as_bytes()));
    endpoint.request(("POST", &target), None, None, deadline)?.success(("POST", &target))
}

/// `GET /api/debug/location`: the directories of the loaded locations.
pub fn loaded(endpoint: &Endpoint, deadline: Instant) -> CallResult<Vec<String>> {
    let answer = endpoint.ask("GET", "/api/debug/location", None, deadline)?;
    let list = answer.as_array().ok_or_else(|| fault("GET /api/debug/location: not a list"))?;
    Ok(list.iter().filter_map(|entry| Some(entry["directory"].as_str()?.to_owned())).collect())
}

/// `DELETE /api/debug/location`, always with a directory: without one, opencode disposes the location of its
/// own working directory. Do not call this while a session runs there: once the location is loaded again,
/// its MCP servers would live for ever.
pub fn dispose(endpoint: &Endpoint, directory: &Path, deadline: Instant) -> CallResult<()> {
    let target = at_location("/api/debug/location", directory);
    endpoint.request(("DELETE", &target), Some(directory), None, deadline)?.success(("DELETE", &target))
}

/// An event of `GET /api/event`.
#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    location: Option<Location>,
    data: Option<Data>,
}

#[derive(Deserialize)]
struct Location {
    directory: Option<String>,
}

#[derive(Deserialize)]
struct Data {
    #[serde(rename = "sessionID")]
    session: Option<String>,
    location: Option<Location>,
}

/// Parses an event about a location; `None` for other events.
pub fn instance_event(event: &[u8]) -> Option<InstanceEvent> {
    let Event { kind, location, data } = from_json(event).ok()?;
    let directory_of = |location: Option<Location>| location.and_then(|location| location.directory);
    let (session, moved) = data.map_or((None, None), |data| (data.session, directory_of(data.location)));
    // The data of events about the creation and move of a session has its new directory.
    let directory = moved.or(directory_of(location)).filter(|directory| directory.starts_with('/'));
    let sign = match kind.split('.').next().unwrap_or_default() {
        // Events that clients cause. None of the ninety or so events of loading a location, and the ten of an
        // eviction, are among them.
        "session" | "permission" | "form" | "pty" | "shell" => Sign::Used,
        _ if kind == "location.shutdown" => Sign::Disposed,
        _ => Sign::Alive,
    };
    match (directory, session) {
        (Some(directory), session) => {
            Some(InstanceEvent { sign, instance: InstanceRef::Directory(directory), session })
        }
        // Events about the start and the end of a turn have no directory.
        (None, Some(session)) => Some(InstanceEvent { sign, instance: InstanceRef::Session(session), session: None }),
        (None, None) => None,
    }
}

/// An event of `GET /api/event` about a session.
#[derive(Deserialize)]
struct SessionEvent<'a> {
    #[serde(rename = "type")]
    kind: String,
    location: Option<Location>,
    /// Parsed only for events about turns, since some are large.
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct TurnData {
    #[serde(rename = "sessionID")]
    session: Option<String>,
    title: Option<String>,
    status: Option<Kind>,
    error: Option<Failure>,
    reason: Option<String>,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Failure {
    #[serde(rename = "type")]
    kind: Option<String>,
    message: Option<String>,
}

/// The steps of turns in an event, in order. `session.execution.*` start and end turns; early versions also
/// send `session.status` and `session.idle` as 1.x does.
pub fn turn_events(event: &[u8]) -> Vec<TurnEvent> {
    let understood = || {
        let SessionEvent { kind, location, data } = from_json(event).ok()?;
        let what = kind.strip_prefix("session.")?;
        let is_about_turns = what.starts_with("execution.")
            || matches!(what, "created" | "renamed" | "updated" | "deleted" | "status" | "idle");
        let data: TurnData = from_json(data.filter(|_| is_about_turns)?.get().as_bytes()).ok()?;
        Some((what.to_owned(), location.and_then(|location| location.directory), data))
    };
    let Some((what, directory, data)) = understood() else { return Vec::new() };
    let TurnData { session: Some(session), title, status, error, reason } = data else { return Vec::new() };
    let ends_with = |name: Option<String>, message: Option<String>| {
        vec![Step::Failed { name: name.unwrap_or_default(), message: message.unwrap_or_default() }, Step::Idle]
    };
    let steps = match (what.as_str(), status, error) {
        ("execution.started", ..) => vec![Step::Runs],
        ("execution.succeeded" | "idle", ..) => vec![Step::Idle],
        ("execution.failed", _, error) => {
            let Failure { kind, message } = error.unwrap_or(Failure { kind: None, message: None });
            ends_with(kind, message)
        }
        // By the user, a shutdown, or a newer turn.
        ("execution.interrupted", ..) => ends_with(Some("interrupted".to_owned()), reason),
        ("status", Some(status), _) => vec![if status.kind == "idle" { Step::Idle } else { Step::Runs }],
        ("created" | "renamed" | "updated", ..) if title.is_some() => {
            vec![Step::Titled(title.filter(|title| !title.is_empty()))]
        }
        ("deleted", ..) => vec![Step::Deleted],
        (..) => Vec::new(),
    };
    let instance = match directory.filter(|directory| directory.starts_with('/')) {
        Some(directory) => InstanceRef::Directory(directory),
        None => InstanceRef::Session(session.clone()),
    };
    let turn = |step| TurnEvent { instance: instance.clone(), session: Some(session.clone()), step };
    steps.into_iter().map(turn).collect()
}

/// The subject of a request.
pub fn subject(method: &str, path: &str) -> Subject {
    let segments = segments(path);
    let segments: Vec<&[u8]> = segments.iter().map(Vec::as_slice).collect();
    let Some((b"api", rest)) = segments.split_first().map(|(first, rest)| (*first, rest)) else {
        return Subject::Process;
    };
    let rest = rest.strip_prefix(&[&b"experimental"[..]]).unwrap_or(rest);
    match rest {
        [] | [b"info" | b"status" | b"health" | b"server" | b"event"] | [b"debug" | b"migration", ..] => {
            Subject::Process
        }
        [b"session"] | [b"session", b"import"] if method == "POST" => Subject::Creation,
        [b"session"] | [b"session", b"active" | b"stats" | b"import"] => Subject::Process,
        [b"session", _, ..] => match session_id(path) {
            Some(id) => Subject::Session { id, loads: !reads_session(method, rest) },
            None => Subject::Process,
        },
        [..] => Subject::Instance,
    }
}

/// Whether a request about a session only reads stored data, so that it does not load the location.
fn reads_session(method: &str, rest: &[&[u8]]) -> bool {
    let is_stored = match rest {
        [_, _] | [_, _, b"message" | b"export" | b"log", ..] => true,
        [..] => false,
    };
    is_stored && matches!(method, "GET" | "HEAD")
}

/// The id of a session in a path, with its case: ids are case-sensitive.
fn session_id(path: &str) -> Option<String> {
    let mut segments = path.split([';', '#']).next()?.split('/').filter(|segment| !segment.is_empty());
    segments.find(|segment| segment.eq_ignore_ascii_case("session"))?;
    String::from_utf8(percent_decode(segments.next()?)?).ok()
}

/// The parameter that chooses the location of a request, at paths that take one. The header alone would do,
/// but clients send the parameter, so that way is better tested in opencode.
pub fn location_parameter(path: &str, directory: &Path) -> Option<String> {
    let is_api = segments(path).first().is_some_and(|first| first == b"api");
    is_api.then(|| location(directory))
}

/// The parameter that replaces `directory` in the query of `GET /api/session`, where it is a filter that
/// opencode compares literally.
pub fn directory_filter(path: &str, directory: &Path) -> Option<String> {
    let segments = segments(path);
    let is_list = segments.iter().map(Vec::as_slice).eq([&b"api"[..], b"session"]);
    is_list.then(|| format!("directory={}", percent_encode(directory.as_os_str().as_encoded_bytes())))
}

/// Rewrites the body of a creation or import to this directory.
///
/// # Errors
/// `bad_request` when it is not a JSON object.
pub fn relocate(body: &[u8], directory: &str) -> crate::error::Result<Vec<u8>> {
    let bad = |why: String| Error::BadRequest(format!("the body of a session has to be a JSON object: {why}"));
    let body = if body.trim_ascii().is_empty() { b"{}" } else { body };
    let mut object: Map<String, Value> = from_json(body).map_err(|e| bad(e.to_string()))?;
    // Replace the whole location: an experimental workspace in it would take precedence.
    object.insert("location".to_owned(), json!({"directory": directory}));
    serde_json::to_vec(&object).map_err(|e| bad(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_determines_the_subject_of_a_request() {
        let session = |id: &str, loads| Subject::Session { id: id.to_owned(), loads };
        for (request, expected) in [
            ("GET /api/info", Subject::Process),
            ("GET /api/event", Subject::Process),
            ("GET /api/debug/location", Subject::Process),
            ("DELETE /api/debug/location", Subject::Process),
            ("GET /", Subject::Process),
            ("GET /openapi.json", Subject::Process),
            ("GET /api/session", Subject::Process),
            ("GET /api/session/active", Subject::Process),
            ("POST /api/session", Subject::Creation),
            ("POST /api/session/", Subject::Creation),
            ("POST //API/%73ession", Subject::Creation),
            ("POST /api/session/import", Subject::Creation),
            ("POST /api/experimental/session/import", Subject::Creation),
            ("GET /api/session/ses_aB", session("ses_aB", false)),
            ("GET /api/session/ses_1/message", session("ses_1", false)),
            ("GET /api/experimental/session/ses_1/export", session("ses_1", false)),
            ("GET /api/session/ses_1/form", session("ses_1", true)),
            ("DELETE /api/session/ses_1", session("ses_1", true)),
            ("POST /api/session/ses_1/prompt", session("ses_1", true)),
            ("POST /api/session/ses_1/message", session("ses_1", true)),
            ("GET /api/location", Subject::Instance),
            ("GET /api/pty/pty_1/connect", Subject::Instance),
            ("POST /api/experimental/generate", Subject::Instance),
        ] {
            let (method, path) = request.split_once(' ').unwrap();
            assert_eq!(subject(method, path), expected, "{request}");
        }
    }

    #[test]
    fn turns_name_a_session_and_other_events_a_directory() {
        let told = |event: &str| instance_event(event.as_bytes());
        let at = |directory: &str| InstanceRef::Directory(directory.to_owned());
        let created = told(
            r#"{"id":"evt_1","created":1,"type":"session.created","location":{"directory":"/a"},
                "data":{"sessionID":"ses_1","location":{"directory":"/b"}}}"#,
        );
        assert_eq!(
            created,
            Some(InstanceEvent { sign: Sign::Used, instance: at("/b"), session: Some("ses_1".to_owned()) })
        );
        let started = told(r#"{"id":"evt_1","type":"session.execution.started","data":{"sessionID":"ses_1"}}"#);
        assert_eq!(
            started,
            Some(InstanceEvent { sign: Sign::Used, instance: InstanceRef::Session("ses_1".to_owned()), session: None })
        );
        let booted = told(r#"{"id":"evt_1","type":"plugin.added","location":{"directory":"/a"},"data":{"id":"x"}}"#);
        assert_eq!(booted, Some(InstanceEvent { sign: Sign::Alive, instance: at("/a"), session: None }));
        let shut_down = told(r#"{"id":"evt_1","type":"location.shutdown","location":{"directory":"/a"},"data":{}}"#);
        assert_eq!(shut_down.unwrap().sign, Sign::Disposed);
        for kind in ["permission.requested", "form.created", "pty.exited", "shell.created"] {
            let event = format!(r#"{{"type":"{kind}","location":{{"directory":"/a"}},"data":{{}}}}"#);
            assert_eq!(told(&event).unwrap().sign, Sign::Used, "{kind}");
        }
        assert_eq!(told(r#"{"id":"evt_1","type":"server.connected","data":{}}"#), None);
    }

    #[test]
    fn executions_are_turns() {
        let steps = |event: &str| {
            let turns = turn_events(event.as_bytes());
            assert!(turns.iter().all(|turn| turn.session.as_deref() == Some("ses_1")), "{turns:?}");
            assert!(turns.iter().all(|turn| turn.instance == InstanceRef::Session("ses_1".to_owned())), "{turns:?}");
            turns.into_iter().map(|turn| turn.step).collect::<Vec<_>>()
        };
        let of = |kind: &str, more: &str| {
            steps(&format!(
                r#"{{"id":"evt_1","created":1,"type":"session.{kind}","data":{{"sessionID":"ses_1"{more}}}}}"#
            ))
        };
        let failed = |name: &str, message: &str| Step::Failed { name: name.to_owned(), message: message.to_owned() };
        assert_eq!(of("execution.started", ""), [Step::Runs]);
        assert_eq!(of("execution.succeeded", ""), [Step::Idle]);
        let error = r#","error":{"type":"provider.quota","message":"no more"}"#;
        assert_eq!(of("execution.failed", error), [failed("provider.quota", "no more"), Step::Idle]);
        assert_eq!(of("execution.failed", ""), [failed("", ""), Step::Idle]);
        let interrupted = of("execution.interrupted", r#","reason":"user""#);
        assert_eq!(interrupted, [failed("interrupted", "user"), Step::Idle]);
        assert_eq!(of("status", r#","status":{"type":"retry"}"#), [Step::Runs]);
        assert_eq!(of("status", r#","status":{"type":"idle"}"#), [Step::Idle]);
        assert_eq!(of("renamed", r#","title":"mend""#), [Step::Titled(Some("mend".to_owned()))]);
        assert_eq!(of("deleted", ""), [Step::Deleted]);
        for kind in ["text.delta", "step.started", "created", "status"] {
            assert_eq!(of(kind, ""), []);
        }
        for other in [r#"{"type":"session.execution.started","data":{}}"#, r#"{"type":"server.connected"}"#, "x"] {
            assert_eq!(turn_events(other.as_bytes()), []);
        }
        let located = r#"{"type":"session.idle","location":{"directory":"/a"},"data":{"sessionID":"ses_1"}}"#;
        assert_eq!(turn_events(located.as_bytes())[0].instance, InstanceRef::Directory("/a".to_owned()));
    }

    #[test]
    fn session_body_is_rewritten_to_the_workspace() {
        for body in [
            "",
            " {} ",
            r#"{"location":{"directory":"/b"}}"#,
            r#"{"location":{"directory":"/b","workspaceID":"wrk_1"}}"#,
            r#"{"location":null}"#,
            r#"{"location":"/b"}"#,
            r#"{"location":{"directory":"/a"},"location":{"directory":"/b"}}"#,
        ] {
            let moved = relocate(body.as_bytes(), "/a").unwrap();
            assert_eq!(moved, br#"{"location":{"directory":"/a"}}"#, "{body}");
        }
        let moved = relocate(br#"{"title":"t","location":{}}"#, "/a").unwrap();
        assert_eq!(
            serde_json::from_slice::<Value>(&moved).unwrap(),
            json!({"title": "t", "location": {"directory": "/a"}})
        );
        for body in ["[]", "null", "x", "{", "{}{}"] {
            assert!(relocate(body.as_bytes(), "/a").is_err(), "{body}");
        }
    }
}
