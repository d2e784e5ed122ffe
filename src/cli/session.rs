//! OpenCode's sessions: list them, end a turn, wait until none runs.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::iter::once;
use std::time::{Duration, Instant};

use super::client::Client;
use super::output::{Output, Waiting, clean, duration, table};
use super::workspace::{read_one, selector_here, target};
use crate::error::{Code, Result};
use crate::framing::percent_encode;
use crate::log::now_ms;
use crate::wire::{AbortReply, Done, Health, Session, SessionList};

/// How long one request for the end of all sessions lasts: a command that is interrupted leaves the
/// daemon a request that waits no longer than that.
const WAIT_ROUND: Duration = Duration::from_secs(30);

/// A session for people: its title, else its id, and its workspace.
pub fn described(session: &Session) -> String {
    let place = session.workspace.as_ref().map_or(&session.directory, |workspace| &workspace.name);
    match &session.title {
        Some(title) => format!("{} ({}) in {}", clean(title), clean(&session.id), clean(place)),
        None => format!("{} in {}", clean(&session.id), clean(place)),
    }
}

/// Lists the sessions of a workspace, or of everything that is loaded.
pub fn list(client: &Client, out: &mut Output, selector: Option<&OsStr>, all: bool, quiet: bool) -> Result<()> {
    let target = match all {
        true => "/sessions".to_owned(),
        false => target(client, Some(&selector_here(client, selector)?), "/sessions")?,
    };
    client.ensure()?;
    let waiting = Waiting::new("opencode");
    let list: SessionList = client.ask("GET", &target, &())?;
    drop(waiting);
    out.print(&list, |list| {
        if quiet {
            return list.sessions.iter().map(|session| format!("{}\n", clean(&session.id))).collect();
        }
        if list.sessions.is_empty() {
            return "no sessions\n".to_owned();
        }
        let now = now_ms();
        let titles = ["ID", "STATE", "UPDATED", "WORKSPACE", "TITLE"].map(Cow::from);
        let rows = list.sessions.iter().map(|session| {
            let place = session.workspace.as_ref().map_or(&session.directory, |workspace| &workspace.name);
            let ago = |at: u64| format!("{} ago", duration(now.saturating_sub(at)));
            [
                Cow::from(&session.id),
                session.state.name().into(),
                session.updated_at.map_or_else(String::new, ago).into(),
                Cow::from(place),
                session.title.as_deref().unwrap_or_default().into(),
            ]
        });
        table(once(titles).chain(rows))
    })
}

/// Ends the running turn of a session.
pub fn abort(client: &Client, out: &mut Output, id: &str) -> Result<()> {
    let target = format!("/sessions/{}/abort", percent_encode(id.as_bytes()));
    let reply: AbortReply = client.ask("POST", &target, &())?;
    out.print(&reply, |reply| {
        let done = if reply.aborted { "ended the running turn of" } else { "no turn is running in" };
        format!("{done} {}\n", described(&reply.session))
    })
}

/// Waits until no session runs in a workspace, or anywhere.
pub fn wait(
    client: &Client,
    out: &mut Output,
    selector: Option<&OsStr>,
    all: bool,
    until: Option<Instant>,
) -> Result<()> {
    let (target, place) = match all {
        true => ("/idle".to_owned(), None),
        false => {
            // Another workspace may be the active one before the wait is over.
            let selector = selector_here(client, selector)?;
            let workspace = read_one(client, &selector.to_string_lossy())?.workspace.workspace;
            (format!("/workspaces/{}/idle", percent_encode(workspace.id.as_bytes())), Some(workspace))
        }
    };
    client.ensure()?;
    until_idle(client, &target, until)?;
    out.print(&Done { ok: true }, |_| match place {
        Some(workspace) => format!("no session is running in {}\n", clean(&workspace.name)),
        None => "no session is running\n".to_owned(),
    })
}

/// Waits until no session runs, by `GET /idle` or that of a workspace; for ever when `until` is absent.
///
/// # Errors
/// `still_busy` at that time; `daemon_not_running`, and those of [`Client::ask`].
pub fn until_idle(client: &Client, target: &str, until: Option<Instant>) -> Result<()> {
    let _waiting = Waiting::new("the running sessions to end");
    let started = |client: &Client| Some(client.read::<Health>("/health").ok()??.daemon.started_at);
    loop {
        let round = Instant::now() + WAIT_ROUND;
        let deadline = until.map_or(round, |until| until.min(round));
        let client = Client { data_dir: client.data_dir.clone(), deadline, autostart: client.autostart.clone() };
        let daemon = started(&client);
        match client.ask::<Done>("GET", target, &()) {
            Err(e) if is_late(e.code()) && until.is_none_or(|until| Instant::now() < until) => {}
            // The daemon restarted in place meanwhile.
            Err(_) if started(&client).is_some_and(|now| daemon.is_some_and(|before| before != now)) => {}
            other => return other.map(|_| ()),
        }
    }
}

/// Whether a wait for idleness ended without it.
pub fn is_late(code: Code) -> bool {
    // While opencode starts or hangs, it does not list its sessions; the supervisor takes care of that.
    matches!(code, Code::StillBusy | Code::OpencodeTimeout)
}
