//! OpenCode's sessions: listing them, aborting a turn, and waiting until none runs.
//!
//! opencode 1.x loads an instance to answer a question about it. Sessions run only in loaded instances, so only
//! those are asked. 2.x answers without loading an instance, except for an abort.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::Daemon;
use super::api::ASK_LIMIT;
use super::engine::{CallError, CallResult, Endpoint, SessionInfo};
use crate::error::{Error, Result};
use crate::line::Line;
use crate::wire::{AbortReply, Phase, Session, SessionState};
use crate::workspace::Workspace;

/// The interval between requests for the running sessions while a client waits: too short to notice, and
/// opencode answers in less than a millisecond.
const INTERVAL: Duration = Duration::from_millis(250);
/// How long the last request of a wait may exceed the deadline. The client waits a second beyond it.
const LAST_REQUEST_EXTRA: Duration = Duration::from_millis(500);

/// A session, the directory of its instance, and whether a turn runs in it.
pub type Found = (SessionInfo, String, SessionState);

/// The sessions as reported to clients: running ones first, then the most recently updated.
pub fn described(daemon: &Daemon, found: Vec<Found>) -> Vec<Session> {
    let registry = daemon.store.snapshot();
    let describe = |(SessionInfo { id, title, updated_at, .. }, directory, state): Found| {
        let workspace = registry.local_at(&directory).cloned();
        Session { id, title, workspace, directory, state, updated_at }
    };
    let mut sessions: Vec<Session> = found.into_iter().map(describe).collect();
    sessions.sort_by_key(|session| (session.state, std::cmp::Reverse(session.updated_at)));
    sessions
}

/// The sessions of a directory; 1.x loads the instance. opencode limits its list, but running sessions are
/// always included here.
///
/// # Errors
/// Those of the calls.
pub fn of(daemon: &Daemon, endpoint: &Endpoint, directory: &str, deadline: Instant) -> CallResult<Vec<Found>> {
    let path = Path::new(directory);
    let mut running = daemon.instances.running(endpoint, directory, deadline)?;
    let mut found = Vec::new();
    for session in endpoint.sessions(path, deadline)? {
        // opencode's own filter is less strict.
        if session.directory.as_deref().is_some_and(|of| of != directory) {
            continue;
        }
        let is_running = running.iter().position(|id| *id == session.id);
        let state = is_running.map_or(SessionState::Idle, |at| {
            running.swap_remove(at);
            SessionState::Running
        });
        found.push((session, directory.to_owned(), state));
    }
    for id in running {
        found.push((looked_up(endpoint, directory, id, deadline), directory.to_owned(), SessionState::Running));
    }
    Ok(found)
}

/// A running session, with its details if opencode answers in time.
fn looked_up(endpoint: &Endpoint, directory: &str, id: String, deadline: Instant) -> SessionInfo {
    let known = endpoint.session(Path::new(directory), &id, deadline).ok().flatten();
    known.unwrap_or(SessionInfo { id, title: None, directory: None, updated_at: None })
}

/// The sessions of all loaded instances.
///
/// # Errors
/// Those of the calls; `opencode_timeout` when opencode does not become ready in time.
pub fn all(daemon: &Daemon, deadline: Instant) -> Result<Vec<Session>> {
    let Some(endpoint) = opencode(daemon, deadline)? else { return Ok(Vec::new()) };
    // The list of opencode 2.x is more recent than the account.
    daemon.instances.list(&endpoint, deadline)?;
    let mut found = Vec::new();
    for directory in daemon.instances.loaded() {
        found.extend(of(daemon, &endpoint, &directory, deadline)?);
    }
    Ok(described(daemon, found))
}

/// The running sessions, if a ready opencode answers quickly.
pub fn running_now(daemon: &Daemon, deadline: Instant) -> Vec<Session> {
    let deadline = deadline.min(Instant::now() + ASK_LIMIT);
    let Some(endpoint) = daemon.supervisor.ready_now() else { return Vec::new() };
    let running = running(daemon, &endpoint, None, deadline).unwrap_or_default();
    let look_up = |(directory, id): (String, String)| {
        (looked_up(&endpoint, &directory, id, deadline), directory, SessionState::Running)
    };
    described(daemon, running.into_iter().map(look_up).collect())
}

/// Directory and id of each running session, in one workspace or anywhere.
fn running(
    daemon: &Daemon,
    endpoint: &Endpoint,
    only: Option<&Workspace>,
    deadline: Instant,
) -> CallResult<Vec<(String, String)>> {
    daemon.instances.all_running(endpoint, only.map(|only| only.path.as_str()), deadline)
}

/// Waits for a ready opencode; `None` when opencode does not run.
///
/// # Errors
/// `opencode_timeout` when it is neither ready nor given up at the deadline.
fn opencode(daemon: &Daemon, deadline: Instant) -> Result<Option<Arc<Endpoint>>> {
    loop {
        match (daemon.supervisor.ready_now(), daemon.supervisor.status().phase) {
            (Some(endpoint), _) => return Ok(Some(endpoint)),
            // Without a process there is no session.
            (None, Phase::Waiting | Phase::Failed) => return Ok(None),
            // An opencode that is being adopted may have running sessions.
            (None, Phase::Starting | Phase::Stopping | Phase::Ready) => pause(deadline)?,
        }
    }
}

/// Pauses before the next attempt.
///
/// # Errors
/// `opencode_timeout` at the deadline.
fn pause(deadline: Instant) -> Result<()> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(Error::OpencodeTimeout("was not ready")),
        rest => {
            thread::sleep(INTERVAL.min(rest));
            Ok(())
        }
    }
}

/// Ends the running turn of a session.
///
/// # Errors
/// `session_not_found`; those of the calls.
pub fn abort(daemon: &Daemon, id: &str, deadline: Instant) -> Result<AbortReply> {
    let not_found = || Error::SessionNotFound(id.to_owned());
    let endpoint = opencode(daemon, deadline)?.ok_or_else(not_found)?;
    let describe = |session, directory, state| described(daemon, vec![(session, directory, state)]).pop();
    let running = running(daemon, &endpoint, None, deadline)?;
    if let Some((directory, id)) = running.into_iter().find(|(_, running)| running == id) {
        if endpoint.line == Line::V2 {
            daemon.instances.list(&endpoint, deadline)?;
            if !daemon.instances.is_loaded(&directory) {
                return Err(Error::OpencodeFault(format!(
                    "{id} still runs in an instance that was disposed; to abort it would load {directory} again, and \
                     leave the MCP servers of that instance running for ever: wait for its end, or restart opencode \
                     (`openwork daemon restart --all`)"
                )));
            }
        }
        let session = looked_up(&endpoint, &directory, id.clone(), deadline);
        endpoint.abort(Path::new(&directory), &id, deadline)?;
        let session = describe(session, directory, SessionState::Running).ok_or_else(not_found)?;
        return Ok(AbortReply { ok: true, aborted: true, session });
    }
    // In 1.x, every loaded instance knows all sessions, and a request to any other would load it.
    let askable = match endpoint.line {
        Line::V1 => daemon.instances.loaded(),
        Line::V2 => vec!["/".to_owned()],
    };
    for directory in askable {
        if let Some(session) = endpoint.session(Path::new(&directory), id, deadline)? {
            let directory = session.directory.clone().unwrap_or(directory);
            let session = describe(session, directory, SessionState::Idle).ok_or_else(not_found)?;
            return Ok(AbortReply { ok: true, aborted: false, session });
        }
    }
    Err(not_found())
}

/// Waits until no session runs in a workspace, or anywhere.
///
/// # Errors
/// `still_busy` at the deadline; `opencode_timeout` when opencode does not say in time.
pub fn wait_until_idle(daemon: &Daemon, only: Option<&Workspace>, deadline: Instant) -> Result<()> {
    let mut sessions = 0;
    loop {
        let limit = deadline.max(Instant::now() + LAST_REQUEST_EXTRA);
        let asked = match opencode(daemon, limit)? {
            Some(endpoint) => running(daemon, &endpoint, only, limit),
            None => return Ok(()),
        };
        match asked {
            Ok(running) if running.is_empty() => return Ok(()),
            Ok(running) => sessions = running.len(),
            // The next iteration finds out whether opencode is back.
            Err(CallError::Gone(_)) => {}
            // No answer, but sessions were running at the last one.
            Err(CallError::TimedOut) if sessions > 0 && Instant::now() >= deadline => {}
            Err(e) => return Err(e.into()),
        }
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            let place = only.map_or_else(|| "opencode".to_owned(), |workspace| workspace.name.clone());
            return Err(Error::StillBusy { place, sessions });
        }
        thread::sleep(INTERVAL.min(rest));
    }
}
