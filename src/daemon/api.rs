//! The routes of the control plane ([`ROUTES`]), one handler each.
//!
//! Every handler has a deadline, and returns a value or a typed error, which become JSON in one place.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tiny_http::Request;

use super::engine::{CallError, Endpoint};
use super::events::EventKind;
use super::handover::Successor;
use super::{Daemon, StopScope, reply, sessions};
use crate::error::{Code, Error, Result};
use crate::framing::{percent_decode, percent_encode};
use crate::line::Line;
use crate::system::process;
use crate::wire::{
    AddLocal, AddRemote, Dispose, DisposeReply, Done, InstanceEntry, InstanceList, InstanceState, Listed, Move,
    NOTICE_HEADER, PathReply, ROUTES, Rename, ResetReply, Restart, RestartReply, Route, RunningSession, Session,
    SessionList, Shutdown, ShutdownReply, Start, TIMEOUT_HEADER, WorkspaceList, WorkspaceReply, from_json,
};
use crate::workspace::{Place, Workspace, existing_directory};

/// The header by which the gate marks a request for `/health` from another user.
pub const STRANGER_HEADER: &str = "X-Openwork-Stranger";
/// The header by which the gate says that the connection is good for another request after a success.
pub const KEEP_HEADER: &str = "X-Openwork-Keep";
/// The header by which the gate passes the allowed origin of a request.
pub const ORIGIN_HEADER: &str = "X-Openwork-Origin";

/// The default timeout of a request: that of a command.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest timeout that a client can ask for. Seconds; a day.
const LONGEST_TIMEOUT: f64 = 86_400.0;
/// How long opencode may take to report the running sessions, for all instances together.
pub const ASK_LIMIT: Duration = Duration::from_secs(2);
/// The pause between two checks whether interrupted sessions have ended; mostly they end at once.
const INTERRUPT_PAUSE: Duration = Duration::from_millis(20);

/// The timeout that a client asks for; 30 s without the header.
///
/// # Errors
/// `bad_request` when it is not a positive number of seconds.
pub fn timeout(header: Option<&str>) -> Result<Duration> {
    let Some(header) = header else { return Ok(DEFAULT_TIMEOUT) };
    match header.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 => Ok(Duration::from_secs_f64(seconds.min(LONGEST_TIMEOUT))),
        _ => Err(Error::BadRequest(format!("{TIMEOUT_HEADER} must be a number of seconds, not {header:?}"))),
    }
}

/// Answers a request, even if its handler panics.
pub fn handle(daemon: &Daemon, mut request: Request) {
    let answer = contain_panic(|| answer(daemon, &mut request));
    match answer_with(daemon, request, answer) {
        None => {}
        Some(AfterReply::Stop { scope, client }) => {
            crate::log!("stopping on request{}", if daemon.keeps_opencode(scope) { "; opencode stays" } else { "" });
            daemon.stop(scope, client);
        }
        Some(AfterReply::Restart { scope, client }) => {
            crate::log!("restarting on request{}", if daemon.keeps_opencode(scope) { "; opencode stays" } else { "" });
            daemon.restart(scope, client);
        }
    }
}

/// Runs a handler. A panic, whose message is already in the log, fails only this request.
fn contain_panic<T>(handler: impl FnOnce() -> Result<T>) -> Result<T> {
    // A panic leaves no shared data half-changed: its owner changes it in closures, under a lock that
    // survives a panic.
    catch_unwind(AssertUnwindSafe(handler))
        .unwrap_or_else(|_| Err(Error::Internal("a bug: see `openwork logs daemon`".to_owned())))
}

/// Refuses a request for which there is no thread.
pub fn refuse(daemon: &Daemon, request: Request) {
    answer_with(daemon, request, Err(Error::Overloaded("threads")));
}

/// Writes the complete reply, which the gate passes on unchanged. Returns the action to take after it.
fn answer_with(daemon: &Daemon, request: Request, answer: Result<Answer>) -> Option<AfterReply> {
    let method = request.method().to_string();
    let origin = header(&request, ORIGIN_HEADER).map(str::to_owned);
    let origin = origin.as_deref();
    let keeps = header(&request, KEEP_HEADER).is_some();
    let (reply, after) = match answer {
        Ok(Answer { status, body, after }) => {
            // Only commands that a person runs get the notice, and not a poller of /health.
            let is_for_a_person = request.url().starts_with("/workspaces") || request.url() == "/start";
            let notice = is_for_a_person.then(|| daemon.store.take_notice()).flatten();
            let notice = notice.map(|notice| format!("{NOTICE_HEADER}: {}\r\n", percent_encode(notice.as_bytes())));
            let headers = notice.unwrap_or_default();
            // Unhealthy is an answer, and closes the connection as an error does.
            (reply::json(&method, status, &headers, &body, origin, keeps && status < 400), after)
        }
        Err(e) => (reply::error(&method, &e, origin), None),
    };
    // Bypass tiny_http's own writer: it writes a list of ten thousand workspaces in pieces of 8 KiB, with a
    // thread switch for each.
    let mut writer = request.into_writer();
    if let Err(e) = writer.write_all(&reply).and_then(|()| writer.flush()) {
        crate::log!("a reply was not taken: {e}");
    }
    after
}

/// The value of a header.
fn header<'r>(request: &'r Request, name: &'static str) -> Option<&'r str> {
    request.headers().iter().find(|header| header.field.equiv(name)).map(|header| header.value.as_str())
}

/// A reply, and the action to take after it.
struct Answer {
    status: u16,
    body: Vec<u8>,
    after: Option<AfterReply>,
}

/// An action after a reply.
enum AfterReply {
    Stop { scope: StopScope, client: Option<u32> },
    Restart { scope: StopScope, client: Option<u32> },
}

impl Answer {
    fn new(status: u16, value: &impl Serialize) -> Result<Answer> {
        let body = serde_json::to_vec(value).map_err(|e| Error::Internal(format!("cannot write JSON: {e}")))?;
        Ok(Answer { status, body, after: None })
    }
}

fn answer(daemon: &Daemon, request: &mut Request) -> Result<Answer> {
    let method = request.method().to_string();
    let (route, selector) = find_route(&method, request.url().split('?').next().unwrap_or_default())?;
    let patience = timeout(header(request, TIMEOUT_HEADER));
    // `/health` never waits, so its timeout may be invalid.
    let patience = if route == Route::Health { DEFAULT_TIMEOUT } else { patience? };
    let deadline = Instant::now() + patience;
    let mut body = Vec::new();
    // The gate limits its size.
    request.as_reader().read_to_end(&mut body).map_err(|e| Error::BadRequest(format!("the body did not come: {e}")))?;
    let one = |workspace: Arc<Workspace>, created| WorkspaceReply {
        ok: true,
        active_id: daemon.store.snapshot().active_id.clone(),
        workspace: Listed::new(&workspace),
        created,
    };
    match route {
        Route::Health => {
            let mut health = daemon.health();
            if header(request, STRANGER_HEADER).is_some() {
                // Other users must not see opencode's output, nor an id, which would confirm a guessed path.
                health.engine.last_error = None;
                health.engine.service = None;
                health.active_id.clear();
            }
            // Health checks expect a 503. The body is the same in both cases.
            Answer::new(if health.ok { 200 } else { 503 }, &health)
        }
        Route::Doc => {
            let body = include_bytes!("../../share/openapi.json").to_vec();
            Ok(Answer { status: 200, body, after: None })
        }
        Route::List => {
            let state = daemon.store.latest();
            let workspaces = Listed::all(&state.workspaces);
            Answer::new(200, &WorkspaceList { ok: true, active_id: state.active_id.clone(), workspaces })
        }
        Route::AddLocal => {
            let AddLocal { path, name } = parse(&body)?;
            let (workspace, created) = daemon.add(Place::local(Path::new(&path))?, name.as_deref())?;
            Answer::new(if created { 201 } else { 200 }, &one(workspace, Some(created)))
        }
        Route::AddRemote => {
            let AddRemote { base_url, directory, name } = parse(&body)?;
            let (workspace, created) = daemon.add(Place::remote(&base_url, directory.as_deref())?, name.as_deref())?;
            Answer::new(if created { 201 } else { 200 }, &one(workspace, Some(created)))
        }
        Route::Get => Answer::new(200, &one(daemon.store.latest().find(&selector)?.clone(), None)),
        Route::Rename => {
            let Rename { name } = parse(&body)?;
            let event = |workspace, active_id| EventKind::WorkspaceRenamed { workspace, active_id };
            let workspace =
                daemon.change(|state| state.find_exactly(&selector), event, |state, id| state.rename(id, &name))?;
            Answer::new(200, &one(workspace, None))
        }
        Route::Remove => {
            let event = |workspace, active_id| EventKind::WorkspaceRemoved { workspace, active_id };
            let workspace =
                daemon.change(|state| state.find_exactly(&selector), event, |state, id| state.remove(id))?;
            daemon.instances.reset(&workspace.path);
            Answer::new(200, &one(workspace, None))
        }
        Route::Activate => {
            let event = |workspace, active_id| EventKind::WorkspaceActivated { workspace, active_id };
            let workspace = daemon.change(|state| state.find(&selector), event, |state, id| state.activate(id))?;
            daemon.instances.touch(&workspace.path);
            Answer::new(200, &one(workspace, None))
        }
        Route::Move => {
            let Move { path } = parse(&body)?;
            let workspace = daemon.relocate(&selector, Path::new(&path))?;
            Answer::new(200, &one(workspace, None))
        }
        Route::Path => {
            let workspace = daemon.store.latest().find(&selector)?.clone();
            let path = call_loaded(daemon, &workspace, deadline, |endpoint, path| endpoint.path(path, deadline))?;
            Answer::new(200, &PathReply { ok: true, workspace, path: path.into() })
        }
        Route::Sessions => {
            let sessions = sessions::all(daemon, deadline)?;
            Answer::new(200, &SessionList { ok: true, sessions })
        }
        Route::WorkspaceSessions => {
            let workspace = daemon.store.snapshot().find(&selector)?.clone();
            let ask = |endpoint: &Endpoint| sessions::of(daemon, endpoint, &workspace.path, deadline);
            let found = match daemon.instances.line() {
                // It reads what is stored, and loads nothing.
                Some(Line::V2) => {
                    workspace.local_path().and_then(existing_directory)?;
                    daemon.supervisor.call(deadline, |endpoint| ask(endpoint))?
                }
                Some(Line::V1) | None => call_loaded(daemon, &workspace, deadline, |endpoint, _| ask(endpoint))?,
            };
            let sessions = sessions::described(daemon, found);
            Answer::new(200, &SessionList { ok: true, sessions })
        }
        Route::Abort => Answer::new(200, &sessions::abort(daemon, &selector, deadline)?),
        Route::Idle => {
            sessions::wait_until_idle(daemon, None, deadline)?;
            Answer::new(200, &Done { ok: true })
        }
        Route::WorkspaceIdle => {
            let workspace = daemon.store.snapshot().find(&selector)?.clone();
            workspace.local_path()?;
            sessions::wait_until_idle(daemon, Some(&workspace), deadline)?;
            Answer::new(200, &Done { ok: true })
        }
        Route::Instances => Answer::new(200, &instances(daemon, deadline)),
        // The gate streams events itself.
        Route::Events => Err(Error::NotFound("/events".to_owned())),
        Route::Dispose => {
            let Dispose { force } = parse(&body)?;
            let workspace = daemon.store.latest().find(&selector)?.clone();
            let disposed = dispose(daemon, &workspace, force, deadline)?;
            Answer::new(200, &DisposeReply { ok: true, disposed, workspace })
        }
        Route::Reset => {
            let workspace = daemon.store.snapshot().find(&selector)?.clone();
            workspace.local_path()?;
            let reset = daemon.instances.reset(&workspace.path);
            Answer::new(200, &ResetReply { ok: true, reset, workspace })
        }
        Route::Start => {
            let Start { workspace } = parse(&body)?;
            let workspace = workspace.map(|id| daemon.store.snapshot().find(&id).cloned()).transpose()?;
            daemon.supervisor.endpoint(deadline)?;
            // Only now is the version of opencode known.
            workspace.map_or(Ok(()), |workspace| daemon.instances.check_fence(&workspace))?;
            Answer::new(200, &daemon.health())
        }
        Route::Restart => {
            // Allowed web pages may use opencode, but not choose a program that runs as the user.
            if let Some(origin) = header(request, ORIGIN_HEADER) {
                return Err(Error::ForbiddenOrigin(format!("the web page {origin:?}")));
            }
            let restart: Restart = parse(&body)?;
            if restart.when_idle {
                sessions::wait_until_idle(daemon, None, deadline)?;
            }
            let successor = Successor::new(&restart, &daemon.data_dir, daemon.options.arguments())?;
            let scope = match (restart.all, successor.is_shared()) {
                (false, _) => StopScope::DaemonOnly,
                // A daemon that shares the user's service no longer has no reason to end it.
                (true, false) => StopScope::OwnOpencode,
                (true, true) => StopScope::Service,
            };
            let sessions = ended_by(daemon, scope, deadline);
            daemon.ending.hand_over(successor)?;
            let reply = Answer::new(200, &RestartReply { ok: true, started_at: daemon.info.started_at, sessions })?;
            Ok(Answer { after: Some(AfterReply::Restart { scope, client: restart.client }), ..reply })
        }
        Route::Shutdown => {
            let shutdown: Shutdown = parse(&body)?;
            if shutdown.when_idle {
                sessions::wait_until_idle(daemon, None, deadline)?;
            }
            let scope = match shutdown {
                Shutdown { keep_opencode: true, .. } => StopScope::DaemonOnly,
                Shutdown { all: true, .. } => StopScope::Service,
                Shutdown { .. } => StopScope::OwnOpencode,
            };
            let sessions = ended_by(daemon, scope, deadline);
            let keeps_service = scope == StopScope::OwnOpencode && daemon.keeps_opencode(scope);
            let reply = Answer::new(200, &ShutdownReply { ok: true, sessions, keeps_service })?;
            Ok(Answer { after: Some(AfterReply::Stop { scope, client: shutdown.client }), ..reply })
        }
    }
}

/// The running sessions that such a stop ends.
fn ended_by(daemon: &Daemon, scope: StopScope, deadline: Instant) -> Vec<Session> {
    if daemon.keeps_opencode(scope) { Vec::new() } else { sessions::running_now(daemon, deadline) }
}

/// Makes a call in a workspace. It loads the instance if necessary, and counts as use.
///
/// # Errors
/// `workspace_is_remote`, `path_not_found`, `workspace_fenced`, and those of the call.
fn call_loaded<T>(
    daemon: &Daemon,
    workspace: &Workspace,
    deadline: Instant,
    ask: impl Fn(&Endpoint, &Path) -> std::result::Result<T, CallError>,
) -> Result<T> {
    let directory = workspace.local_path()?;
    // opencode would answer for a missing directory.
    existing_directory(directory).map_err(|e| match e.code() {
        Code::PathNotFound => workspace.gone(),
        _ => e,
    })?;
    daemon.instances.check_fence(workspace)?;
    let entered = daemon.instances.enter(workspace, deadline)?;
    let answer = daemon.supervisor.call(deadline, |endpoint| {
        // Connect first: an opencode that is already gone must not be blamed on this request.
        endpoint.connect(deadline)?;
        // Before the answer: even a call that times out has loaded the instance.
        if !entered.loads(endpoint.generation, deadline).map_err(CallError::Failed)? {
            return Err(CallError::Gone("it has ended".to_owned()));
        }
        ask(endpoint, directory).map_err(|e| match e {
            // A load that ended opencode would end the next one too, so do not repeat the call.
            CallError::Gone(_) | CallError::Failed(Error::OpencodeFault(_)) => {
                entered.blame(&daemon.supervisor, endpoint).map_or(e, CallError::Failed)
            }
            CallError::TimedOut | CallError::Failed(_) => e,
        })
    })?;
    entered.replied();
    daemon.store.touch(&workspace.id);
    Ok(answer)
}

/// The instances of the local workspaces. opencode is asked only about loaded ones.
fn instances(daemon: &Daemon, deadline: Instant) -> InstanceList {
    let (state, endpoint) = (daemon.store.latest(), daemon.supervisor.ready_now());
    // Do not wait for a hung opencode: show its last known state.
    let deadline = deadline.min(Instant::now() + ASK_LIMIT);
    if let Some(endpoint) = &endpoint {
        let _ = daemon.instances.list(endpoint, deadline);
    }
    let describe = |workspace: &Arc<Workspace>| {
        let usage = daemon.instances.usage(&workspace.path);
        let endpoint = endpoint.as_ref().filter(|_| usage.loaded);
        let sessions =
            endpoint.map_or_else(Vec::new, |endpoint| running_sessions(daemon, endpoint, workspace, deadline));
        let state = match (usage.fenced, usage.loaded, sessions.is_empty()) {
            (true, _, _) => InstanceState::Fenced,
            (false, false, _) => InstanceState::Cold,
            (false, true, true) => InstanceState::Warm,
            (false, true, false) => InstanceState::Busy,
        };
        let evict_at = usage.evict_at.filter(|_| state == InstanceState::Warm);
        let (state, open_streams) = (state.name().into(), usage.streams);
        InstanceEntry { workspace: workspace.clone(), state, open_streams, sessions, evict_at }
    };
    InstanceList {
        ok: true,
        instances: state.workspaces.iter().filter(|workspace| workspace.is_local()).map(describe).collect(),
        memory: state.opencode.as_ref().and_then(|engine| process::resident(&engine.processes())),
    }
}

/// The running sessions of a loaded instance; none when opencode does not answer. A session whose title is
/// unknown is listed without one.
fn running_sessions(
    daemon: &Daemon,
    endpoint: &Endpoint,
    workspace: &Workspace,
    deadline: Instant,
) -> Vec<RunningSession> {
    let directory = Path::new(&workspace.path);
    let ids = daemon.instances.running(endpoint, &workspace.path, deadline).unwrap_or_default();
    ids.into_iter().map(|id| RunningSession { title: endpoint.session_title(directory, &id, deadline), id }).collect()
}

/// Disposes the instance of a workspace; false when it is not loaded.
fn dispose(daemon: &Daemon, workspace: &Workspace, force: bool, deadline: Instant) -> Result<bool> {
    workspace.local_path()?;
    // Start neither opencode nor the instance just to dispose it. opencode's own list is newer than the
    // account.
    if let Some(endpoint) = daemon.supervisor.ready_now() {
        let _ = daemon.instances.list(&endpoint, deadline.min(Instant::now() + ASK_LIMIT));
    }
    if !daemon.instances.is_loaded(&workspace.path) {
        return Ok(false);
    }
    let disposed = daemon.supervisor.call(deadline, |endpoint| {
        if !daemon.instances.is_loaded_in(endpoint.generation, &workspace.path) {
            return Ok(false);
        }
        let running = || daemon.instances.running(endpoint, &workspace.path, deadline);
        let busy =
            |sessions: usize| CallError::Failed(Error::InstanceBusy { workspace: workspace.name.clone(), sessions });
        if !force {
            let sessions = running()?.len();
            if sessions > 0 {
                return Err(busy(sessions));
            }
        } else if endpoint.line == Line::V2 {
            // 2.x leaks the MCP servers of a turn that runs during the disposal.
            let mut sessions = running()?;
            endpoint.interrupt(&sessions, deadline)?;
            while !sessions.is_empty() {
                if Instant::now() >= deadline {
                    return Err(busy(sessions.len()));
                }
                thread::sleep(INTERRUPT_PAUSE);
                sessions = running()?;
            }
        }
        daemon.instances.dispose(endpoint, &workspace.path, deadline)?;
        Ok(true)
    })?;
    if disposed {
        let (workspace_id, directory) = (Some(workspace.id.clone()), workspace.path.clone());
        daemon.events.publish(EventKind::InstanceDisposed { workspace_id, directory });
    }
    Ok(disposed)
}

/// The body as JSON; an empty one is `{}`.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    // Command lines of this and earlier versions send `null` where there is nothing to say.
    let body = if matches!(body, b"" | b"null") { b"{}" } else { body };
    // serde would also accept an array of the values.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(Error::BadRequest("the body is not a JSON object".to_owned()));
    }
    from_json(body).map_err(|e| Error::BadRequest(format!("the body is not what is expected here: {e}")))
}

/// The route, and the selector in its path.
fn find_route(method: &str, path: &str) -> Result<(Route, String)> {
    let segments: Vec<&str> = path.split('/').collect();
    let matches = |pattern: &str| {
        let pattern: Vec<&str> = pattern.split('/').collect();
        pattern.len() == segments.len()
            && pattern.iter().zip(&segments).all(|(wanted, given)| *wanted == ":id" || wanted == given)
    };
    // A literal path wins over a selector of the same form: `/workspaces/remote`.
    let pattern = match ROUTES.iter().find(|(.., pattern, _)| *pattern == path) {
        Some((_, pattern, _)) => pattern,
        None => match ROUTES.iter().find(|(_, pattern, _)| matches(pattern)) {
            Some((_, pattern, _)) => pattern,
            None => return Err(Error::NotFound(path.to_owned())),
        },
    };
    let candidates = || ROUTES.iter().filter(|(_, p, _)| p == pattern || (matches(p) && p.contains(":id")));
    let Some((_, pattern, route)) = candidates().find(|(m, ..)| *m == method) else {
        let mut allow: Vec<&str> = candidates().map(|(method, ..)| *method).collect();
        allow.sort_unstable();
        return Err(Error::MethodNotAllowed {
            method: method.to_owned(),
            path: path.to_owned(),
            allow: allow.join(", "),
        });
    };
    let position = pattern.split('/').position(|segment| segment == ":id");
    let selector = position.and_then(|position| segments.get(position)).copied().unwrap_or_default();
    let decoded = percent_decode(selector).and_then(|bytes| String::from_utf8(bytes).ok());
    match decoded {
        // `-` exists only on the command line.
        Some(selector) if selector == "-" && !pattern.starts_with("/sessions/") => Err(Error::no_workspace(selector)),
        Some(selector) => Ok((*route, selector)),
        None => Err(Error::BadRequest(format!("{selector:?} in the path is not percent-encoded UTF-8"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_fails_only_its_request() {
        let panics = || -> Result<Answer> { panic!("a bug, for the test") };
        let failed = contain_panic(panics).err().expect("an error");
        assert_eq!((failed.code(), failed.http_status()), (Code::Internal, 500));
        // The thread can go on.
        assert_eq!(contain_panic(|| Ok(5)).ok(), Some(5));
        assert_eq!(
            contain_panic(|| Err::<(), _>(Error::Overloaded("x"))).err().map(|e| e.code()),
            Some(Code::Overloaded)
        );
    }
}
