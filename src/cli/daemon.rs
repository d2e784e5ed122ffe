//! The commands about the daemon itself: start, stop, restart, status.

use std::borrow::Cow;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::VERSION;
use super::client::{Address, Client, decode};
use super::output::{self, Output, Waiting, duration, megabytes, note, table};
use super::session;
use super::workspace::named;
use crate::error::{Code, Error, Result};
use crate::line::{Line, migration};
use crate::lock;
use crate::log::now_ms;
use crate::options::Options;
use crate::state::{Auth, BinaryRecord, State};
use crate::system;
use crate::system::process::{self, Process};
use crate::wire::{Health, Phase, ProcessInfo, Session, Shutdown, ShutdownReply, WorkspaceReply};

/// How long a daemon may take to reply to a stop: it replies before it stops.
const STOP_REPLY: Duration = Duration::from_secs(10);
/// The interval between checks whether a daemon has adopted an opencode, which takes some milliseconds.
const TAKE_OVER_INTERVAL: Duration = Duration::from_millis(10);
/// The limit for the daemon's own wait until no session runs, before it stops. Short: if the command is
/// interrupted meanwhile, the daemon must not stop much later.
const IDLE_CHECK: Duration = Duration::from_secs(1);
/// How long an unresponsive daemon has between TERM and KILL.
const TERM_PATIENCE: Duration = Duration::from_secs(2);

/// Starts the daemon, and waits until opencode is ready.
pub fn start(client: &Client, out: &mut Output) -> Result<()> {
    let asks_for_options = client.autostart.as_ref().is_some_and(|options| !options.is_default());
    let running = client.find()?;
    if let (Some(address), true) = (&running, asks_for_options) {
        note(&format!(
            "the daemon already runs on port {}; `openwork daemon restart` applies the options\n",
            address.port
        ));
    }
    wait_until_ready(client, out, running.is_none())
}

/// Waits for opencode, and prints the addresses of both. Notes when a new daemon has adopted an opencode that
/// does not match its options.
fn wait_until_ready(client: &Client, out: &mut Output, is_new: bool) -> Result<()> {
    let before = last_line(client);
    client.ensure()?;
    let waiting = Waiting::new("opencode");
    let health: Health = client.ask("POST", "/start", &())?;
    drop(waiting);
    note_migration(before, &health);
    let is_shared = client.autostart.as_ref().map(|options| options.engine.shared);
    if is_new && is_shared.is_some_and(|shared| shared != health.engine.shared) {
        note("openwork's opencode keeps running; `openwork daemon restart --all` changes to the shared one\n");
    } else if is_new && keeps_another_opencode(client, &health)? {
        note("opencode keeps running with its port and program; `openwork daemon restart --all` changes them\n");
    }
    out.print(&health, |health| {
        let opencode = health.opencode.as_ref().map_or_else(String::new, |opencode| opencode.base_url.clone());
        let version = health.engine.version.as_deref().unwrap_or_default();
        format!("openwork is ready on {}, opencode {version} on {opencode}\n", health.daemon.base_url)
    })
}

/// The line of the opencode that was last started, from the state file.
pub fn last_line(client: &Client) -> Option<Line> {
    let binaries = State::read(&client.data_dir.state()).ok()?.binaries?;
    Line::of(&binaries.opencode?.actual_version?)
}

/// Notes the consequences of a change of opencode's line.
pub fn note_migration(before: Option<Line>, health: &Health) {
    let now = health.engine.version.as_deref().and_then(Line::of);
    if let Some(warning) = now.and_then(|now| migration(before, now)) {
        note(&format!("{warning}\n"));
    }
}

/// Whether the daemon has adopted an opencode that does not match the options.
fn keeps_another_opencode(client: &Client, health: &Health) -> Result<bool> {
    let (Some(options), Some(opencode)) = (&client.autostart, &health.opencode) else { return Ok(false) };
    let binary = State::read(&client.data_dir.state())?.binaries.unwrap_or_default().opencode.map(|known| known.path);
    let is_another = |wanted: &Path| binary.as_deref().is_some_and(|path| Path::new(path) != wanted);
    let other_port = options.engine.port.is_some_and(|port| port != opencode.port);
    let url = |ip| format!("http://{ip}:{}", opencode.port);
    let other_host = options.engine.host.is_some_and(|ip| url(ip) != opencode.base_url);
    // The user chose the port and the program of a shared opencode.
    if health.engine.shared {
        return Ok(false);
    }
    Ok(other_port || other_host || options.engine.binary.as_deref().is_some_and(is_another))
}

/// How to stop the daemon.
#[derive(Clone, Copy)]
pub struct Stop {
    /// Leave opencode running for the next daemon.
    pub keep_opencode: bool,
    /// Stop the user's own service too, if the daemon shares it.
    pub all: bool,
    /// End even a daemon that does not respond.
    pub force: bool,
}

/// A preceding wait until no session runs.
#[derive(Clone, Copy)]
pub struct WhenIdle {
    /// The time limit of the command. Without `is_limit`, it starts after the wait.
    pub timeout: Duration,
    /// The user set the limit, so it includes the wait.
    pub is_limit: bool,
}

/// Acts as soon as no session runs. `act` gets the time that it may wait for sessions that have started
/// since.
fn when_idle<T>(
    client: &Client,
    when: Option<WhenIdle>,
    act: impl Fn(&Client, Option<Duration>) -> Result<T>,
) -> Result<T> {
    let Some(WhenIdle { timeout, is_limit }) = when else { return act(client, None) };
    let until = is_limit.then_some(client.deadline);
    loop {
        match session::until_idle(&client.until(client.deadline), "/idle", until) {
            // A daemon that does not run has no sessions.
            Ok(()) | Err(Error::DaemonNotRunning) => {}
            Err(e) => return Err(e),
        }
        let deadline = until.unwrap_or_else(|| Instant::now() + timeout);
        let client = Client { autostart: client.autostart.clone(), ..client.until(deadline) };
        match act(&client, Some(IDLE_CHECK)) {
            Err(e) if session::is_late(e.code()) && until.is_none_or(|until| Instant::now() < until) => {}
            other => return other,
        }
    }
}

#[derive(Serialize)]
struct Stopped {
    ok: bool,
    stopped: bool,
    /// The running sessions that ended with opencode.
    sessions: Vec<Session>,
    #[serde(skip)]
    keeps_service: bool,
}

/// A daemon's reply to a stop.
#[derive(Default)]
struct StopResult {
    /// The running sessions that ended with opencode.
    sessions: Vec<Session>,
    /// The daemon shared the user's own service, which keeps running.
    keeps_service: bool,
}

/// Stops the daemon and opencode.
pub fn stop(client: &Client, out: &mut Output, how: Stop, when: Option<WhenIdle>) -> Result<()> {
    let (stopped, result) = when_idle(client, when, |client, idle| stop_running(client, how, idle))?;
    let StopResult { sessions, keeps_service } = result;
    out.print(&Stopped { ok: true, stopped, sessions, keeps_service }, |stopped| {
        let done = match (stopped.stopped, how.keep_opencode, stopped.keeps_service) {
            (false, ..) => "the daemon is not running",
            (true, true, _) => "stopped; opencode keeps running",
            (true, false, true) => "stopped; the shared opencode keeps running (`--all` stops it too)",
            (true, false, false) => "stopped",
        };
        ended(&stopped.sessions) + done + "\n"
    })
}

/// A line for each session that ended with opencode.
fn ended(sessions: &[Session]) -> String {
    sessions.iter().map(|session| format!("ended the running turn of {}\n", session::described(session))).collect()
}

/// Stops the daemon; with `force`, even one that does not respond. Returns whether a daemon was running, and
/// its reply.
fn stop_running(client: &Client, how: Stop, idle: Option<Duration>) -> Result<(bool, StopResult)> {
    let mut stopped = false;
    let mut all = StopResult::default();
    loop {
        match stop_one(client, how, stopped, idle) {
            Ok(Some(StopResult { sessions, keeps_service })) => {
                stopped = true;
                all.sessions.extend(sessions);
                all.keeps_service |= keeps_service;
            }
            Ok(None) => return Ok((stopped, all)),
            Err(e @ Error::DaemonUnresponsive(_)) if how.force => {
                end_unresponsive(client, e)?;
                stopped = true;
            }
            Err(e) => return Err(e),
        }
    }
}

/// Stops the daemon that runs now; `None` when there is none. When this command has already stopped one
/// (`stopped`), also `None`: somebody has started the next one since. With a limit in `idle`, sessions that
/// still run then are an error.
fn stop_one(
    client: &Client,
    Stop { keep_opencode, all, force }: Stop,
    stopped: bool,
    idle: Option<Duration>,
) -> Result<Option<StopResult>> {
    let soon = |limit| client.until(client.deadline.min(Instant::now() + limit));
    let found = if force { soon(STOP_REPLY).find() } else { client.find() };
    let address = match found? {
        Some(_) if stopped => return Ok(None),
        Some(address) => address,
        // A killed daemon, perhaps killed during this stop, left an opencode. Start a daemon, at any port, that
        // adopts the opencode and stops it properly.
        None if !keep_opencode && orphan(&State::read(&client.data_dir.state())?).is_some() => {
            let address =
                client.start_without(&Options::default(), &["OPENWORK_DAEMON_PORT", "OPENWORK_OPENCODE_PORT"])?;
            wait_until_taken_over(&soon(STOP_REPLY), &address);
            address
        }
        None => return Ok(None),
    };
    let daemon = process::open(address.pid).map_err(elsewhere)?;
    let shutdown = Shutdown { keep_opencode, all, client: Some(std::process::id()), when_idle: idle.is_some() };
    let result = match soon(idle.unwrap_or(STOP_REPLY)).ask_at(&address, "POST", "/shutdown", &shutdown) {
        Ok(ShutdownReply { sessions, keeps_service, .. }) => StopResult { sessions, keeps_service },
        Err(Error::DaemonNotRunning) => StopResult::default(),
        Err(e) => return Err(e),
    };
    if let Some(daemon) = daemon {
        client.wait_until_gone(&daemon)?;
    }
    Ok(Some(result))
}

/// Waits until a daemon has adopted the opencode that it found, or failed to: before, it knows no sessions, and
/// could not end them properly. Gives up at the client's deadline.
fn wait_until_taken_over(client: &Client, address: &Address) {
    while Instant::now() < client.deadline {
        match client.ask_at::<Health>(address, "GET", "/health", &()) {
            Ok(health) if health.engine.phase == "starting" => std::thread::sleep(TAKE_OVER_INTERVAL),
            Ok(_) | Err(_) => return,
        }
    }
}

/// Ends a daemon that does not respond, if it is proven ours: a process of our user that holds the lock. Its
/// opencode stays, as after a crash.
fn end_unresponsive(client: &Client, unresponsive: Error) -> Result<()> {
    let path = client.data_dir.daemon_lock();
    let Some(file) = lock::if_held(&path)? else { return Ok(()) };
    let holder = system::lock::holder(&file, &path).map_err(|e| Error::io("find the process that holds", &path, e))?;
    let Some(holder) = holder else { return Err(unresponsive) };
    note(&format!("ending the daemon (pid {}), which does not respond\n", holder.pid));
    holder.end(client.deadline.min(Instant::now() + TERM_PATIENCE));
    // KILL takes effect at once, but the earlier attempts may have used up the deadline.
    let patient = Client { data_dir: client.data_dir.clone(), deadline: Instant::now() + STOP_REPLY, autostart: None };
    patient.wait_until_gone(&holder.pidfd)
}

/// The error when the process of a daemon cannot be opened.
fn elsewhere(e: std::io::Error) -> Error {
    match e.kind() {
        std::io::ErrorKind::Unsupported => Error::DaemonElsewhere(e.to_string()),
        _ => Error::Internal(format!("cannot hold the daemon's process: {e}")),
    }
}

/// The pid of an opencode that outlived its daemon.
pub fn orphan(state: &State) -> Option<u32> {
    let record = state.opencode.as_ref()?;
    Process::adopt(&record.identity()).map(|_| record.pid)
}

/// Restarts the daemon, with `all` opencode too.
pub fn restart(client: &Client, out: &mut Output, all: bool, when: Option<WhenIdle>) -> Result<()> {
    if client.autostart.is_none() {
        return Err(Error::usage("`daemon restart` cannot be used with --no-autostart"));
    }
    // Check first that the successor can have its credentials and its port: otherwise, a working daemon would
    // be stopped for nothing.
    Auth::check_loading(&client.data_dir)?;
    let port = client.autostart.as_ref().and_then(|options| options.port);
    if let (Some(port), Some(address)) = (port, client.find()?) {
        let is_taken = |e: std::io::Error| e.kind() == std::io::ErrorKind::AddrInUse;
        if port != address.port && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err_and(is_taken) {
            return Err(Error::PortInUse { port, option: "--daemon-port" });
        }
    }
    let is_elsewhere = |address: &Address| port.is_some_and(|port| port != address.port);
    when_idle(client, when, |client, idle| {
        let handed_over = match client.find()? {
            Some(address) if !is_elsewhere(&address) => client.hand_over(&address, all, idle)?,
            Some(_) | None => None,
        };
        let sessions = match handed_over {
            Some(sessions) => sessions,
            // A daemon of 0.1.0 cannot hand over, and at another port there is nothing to hand over.
            None => {
                // If the next daemon shares no service, leave the service running.
                let is_shared = client.autostart.as_ref().is_some_and(|options| options.engine.shared);
                let how = Stop { keep_opencode: !all, all: all && is_shared, force: false };
                stop_running(client, how, idle)?.1.sessions
            }
        };
        note(&ended(&sessions));
        Ok(())
    })?;
    // The wait may have used up the deadline.
    let rest = when.filter(|when| !when.is_limit).map(|when| Instant::now() + when.timeout);
    let client = Client { autostart: client.autostart.clone(), ..client.until(rest.unwrap_or(client.deadline)) };
    wait_until_ready(&client, out, true)
}

/// Shows the state of the daemon and of opencode.
pub fn status(client: &Client, out: &mut Output) -> Result<()> {
    let reply = client.read_bytes("/health")?.ok_or_else(|| not_running(client))?;
    let health: Health = decode(&reply)?;
    // Print the reply unchanged: a newer daemon may send fields that this version does not know.
    if out.is_json() {
        out.write(&reply)?;
        return out.write(b"\n");
    }
    let active = match health.active_id.as_str() {
        "" => None,
        // The active workspace may have been removed, or be missing in a file of another program.
        _ => match client.read::<WorkspaceReply>("/workspaces/@active") {
            Err(e) if e.code().exit_status() == Code::NoActiveWorkspace.exit_status() => None,
            other => other?,
        },
    };
    let replaced = replaced_binary(client);
    out.print(&health, |health| human_status(health, active.as_ref(), replaced.as_ref()))
}

/// `daemon_not_running`, which names the opencode that the last daemon left running, if any.
fn not_running(client: &Client) -> Error {
    let e = Error::DaemonNotRunning;
    let state = State::read(&client.data_dir.state()).unwrap_or_default();
    let Some(opencode) = orphan(&state) else { return e };
    let hint = "`openwork daemon start` starts a daemon that adopts this opencode; `openwork daemon stop` ends it";
    let message = format!("the daemon is not running; its opencode (pid {opencode}) still is");
    e.reworded(message, Some(hint.to_owned()))
}

/// The opencode that was last started, if its file is another one now.
fn replaced_binary(client: &Client) -> Option<BinaryRecord> {
    let known = State::read(&client.data_dir.state()).ok()?.binaries?.opencode?;
    let path = Path::new(&known.path);
    let now = BinaryRecord::of(path, &std::fs::metadata(path).ok()?);
    (known.is_about_a_file() && !now.is_same_file(&known)).then_some(known)
}

fn human_status(health: &Health, active: Option<&WorkspaceReply>, replaced: Option<&BinaryRecord>) -> String {
    let process = |name: &str, state: &str, info: Option<&ProcessInfo>, version: &str| {
        let about = info.map(|info| {
            [
                info.base_url.clone(),
                format!("pid {}", info.pid),
                format!("up {}", duration(now_ms().saturating_sub(info.started_at))),
                info.memory.map_or_else(String::new, megabytes),
                format!("version {version}"),
            ]
        });
        let [url, pid, up, memory, version] = about.unwrap_or_default();
        [name.to_owned(), state.to_owned(), url, pid, up, memory, version].map(Cow::from)
    };
    let version = health.engine.version.as_deref().unwrap_or("unknown");
    let mut text = table([
        process("daemon", "running", Some(&health.daemon), &health.cli_version),
        process("opencode", &health.engine.phase, health.opencode.as_ref(), version),
    ]);
    text.push_str(&format!("restarts  {}\n", health.engine.restarts));
    match (health.engine.shared, &health.opencode) {
        (false, _) => {}
        (true, Some(_)) => text.push_str("shared    opencode is the server that plain `opencode` uses too\n"),
        (true, None) => text.push_str("shared    plain `opencode` has no server now; the next call starts it\n"),
    }
    let active = active.map_or_else(|| "none".to_owned(), |active| named(&active.workspace.workspace));
    text.push_str(&format!("active    {active} ({} in all)\n", health.workspace_count));
    if health.cli_version != VERSION {
        text.push_str(&format!("openwork  version {VERSION}; `openwork daemon restart` updates the daemon\n"));
    }
    if let (Some(replaced), true) = (replaced, health.opencode.is_some()) {
        let path = output::clean_lines(&replaced.path);
        text.push_str(&format!("opencode  {path} was replaced; `openwork daemon restart --all` starts the new one\n"));
    }
    if let Some(url) = &health.engine.service {
        let url = output::clean_lines(url);
        text.push_str(&format!(
            "service   plain `opencode` has a server of its own on {url}; `openwork daemon restart --all --shared` has \
             one for both\n"
        ));
    }
    if let (Some(error), true) = (&health.engine.last_error, health.engine.phase != Phase::Ready.name()) {
        text.push_str(&format!("last error: {}\n", output::clean_lines(&error.message)));
    }
    text
}
