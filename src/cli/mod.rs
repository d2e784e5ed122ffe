//! The commands: one function each. They ask the daemon, or read; they never write the state.

mod client;
mod complete;
mod help;
mod import;
mod logs;
mod manual;
mod output;
mod passthrough;
mod service;

use std::borrow::Cow;
use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::iter::once;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::client::{Address, Client, decode, to_json};
use self::output::{Output, Waiting, clean, duration, megabytes, note, table};
use crate::agent;
use crate::args::{self, Command, Invocation};
use crate::daemon::{self, Start};
use crate::error::{Code, Error, Result};
use crate::http::percent_encode;
use crate::lock;
use crate::log::{now_ms, timestamp};
use crate::options::Options;
use crate::paths::{self, DataDir};
use crate::state::State;
use crate::system;
use crate::system::process::{self, Process};
use crate::wire::{
    AddLocal, AddRemote, Dispose, DisposeReply, Done, Health, InstanceList, Listed, PathReply, Phase, Rename,
    ResetReply, Shutdown, WorkspaceList, WorkspaceReply,
};
use crate::workspace::{Kind, Workspace, location, looks_like_path};

/// The hidden command by which a client starts a daemon in the background.
pub const DETACHED_COMMAND: &str = "__daemon";
/// The hidden command by which a shell asks what could stand where the cursor is.
pub const COMPLETE_COMMAND: &str = "__complete";
/// How long a daemon may take to reply to a stop: it replies first and stops then.
const STOP_REPLY: Duration = Duration::from_secs(10);
/// How long a daemon that does not respond has for a stop in good order before it is killed.
const TERM_PATIENCE: Duration = Duration::from_secs(2);
/// The environment variable that names a workspace where none is given.
const WORKSPACE_VARIABLE: &str = "OPENWORK_WORKSPACE";

/// Runs a command line; the exit status. A `start` other than that in the foreground is for
/// `daemon`, whose failures go to its log.
pub fn main(argv: &[OsString], start: Start) -> u8 {
    let mut output = Output::new(args::wants_json(argv));
    let result = args::parse(argv, |name| std::env::var_os(name)).and_then(|invocation| {
        if let Some(warning) = invocation.warning {
            note(&format!("warning: {warning}\n"));
        }
        match start {
            Start::Detached | Start::Successor => run_daemon(&invocation, start),
            Start::Foreground => run(invocation, &mut output),
        }
    });
    match result {
        Ok(()) => 0,
        // What opencode answered is the result.
        Err(e @ Error::Refused { json: true, .. }) => e.code().exit_status(),
        // The client that started it has been told, and reports it.
        Err(e) if start != Start::Foreground => {
            crate::log!("{e}");
            e.code().exit_status()
        }
        Err(e) => {
            output.fail(&e);
            e.code().exit_status()
        }
    }
}

fn run_daemon(invocation: &Invocation, start: Start) -> Result<()> {
    let data_dir = DataDir::resolve(invocation.data_dir.as_deref(), invocation.xdg_data_home.as_deref())?;
    daemon::run(&data_dir, &absolute_options(&invocation.daemon)?, start)
}

fn run(invocation: Invocation, out: &mut Output) -> Result<()> {
    // Only for commands that need it: help does not fail without a home directory.
    let client = || -> Result<Client> {
        let data_dir = DataDir::resolve(invocation.data_dir.as_deref(), invocation.xdg_data_home.as_deref())?;
        data_dir.check_owner()?;
        Ok(Client {
            data_dir,
            deadline: Instant::now() + invocation.timeout,
            autostart: invocation.autostart.then(|| absolute_options(&invocation.daemon)).transpose()?,
        })
    };
    match invocation.command {
        Command::Help { ref topic } => help::print(out, topic.as_deref()),
        Command::Version => version(out),
        Command::DaemonRun => run_daemon(&invocation, Start::Foreground),
        Command::Completions { shell } => print_text(out, complete::script(shell)),
        Command::Man => print_text(out, &manual::page()),
        Command::ServicePrint => print_text(out, &service(&invocation)?),
        Command::DaemonStart => start(&client()?, out),
        Command::DaemonStop { keep_opencode, force } => stop(&client()?, out, keep_opencode, force),
        Command::DaemonRestart { all } => restart(&client()?, out, all),
        Command::Status => status(&client()?, out),
        Command::WorkspaceAdd { ref path, ref name } => add(&client()?, out, path, name.clone()),
        Command::WorkspaceAddRemote { ref base_url, ref directory, ref name } => {
            let body = AddRemote { base_url: base_url.clone(), directory: directory.clone(), name: name.clone() };
            print_added(out, &client()?.ask("POST", "/workspaces/remote", &body)?)
        }
        Command::WorkspaceList { quiet } => list(&client()?, out, quiet),
        Command::WorkspaceCurrent { quiet } => current(&client()?, out, quiet),
        Command::WorkspaceInfo { ref selector } => info(&client()?, out, selector.as_deref()),
        Command::WorkspaceSwitch { ref selector } => switch(&client()?, out, selector),
        Command::WorkspaceRemove { ref selector } => remove(&client()?, out, selector),
        Command::WorkspaceRename { ref selector, ref name } => rename(&client()?, out, selector, name),
        Command::WorkspaceImport { ref file } => import(&client()?, out, file),
        Command::WorkspacePath { ref selector } => path(&client()?, out, selector.as_deref()),
        Command::Api(ref call) => passthrough::api(&client()?, out, call, invocation.timeout_given),
        Command::Attach { ref selector, ref args } => Err(passthrough::attach(&client()?, selector.as_deref(), args)),
        Command::Run { ref selector, ref args } => Err(passthrough::run(&client()?, selector.as_deref(), args)),
        Command::Env { ref selector, shell } => passthrough::env(&client()?, out, selector.as_deref(), shell),
        Command::Events => events(&client()?, out, invocation.timeout_given),
        Command::InstanceList => instances(&client()?, out),
        Command::InstanceDispose { ref selector, force } => dispose(&client()?, out, selector.as_deref(), force),
        Command::InstanceReset { ref selector } => reset(&client()?, out, selector.as_deref()),
        Command::StateRepair => repair(&client()?, out),
        Command::Logs { log, follow, lines } => {
            let client = client()?;
            let until = invocation.timeout_given.then_some(client.deadline);
            logs::print(&client, out, log, follow, until, lines)
        }
    }
}

fn version(out: &mut Output) -> Result<()> {
    #[derive(Serialize)]
    struct Version {
        ok: bool,
        version: &'static str,
    }
    let version = Version { ok: true, version: env!("CARGO_PKG_VERSION") };
    out.print(&version, |version| format!("openwork {}\n", version.version))
}

fn current(client: &Client, out: &mut Output, quiet: bool) -> Result<()> {
    let reply = read_one(client, "@active")?;
    out.print(&reply, |reply| {
        let Workspace { id, name, .. } = &*reply.workspace.workspace;
        format!("{}\n", clean(if quiet { id } else { name }))
    })
}

fn switch(client: &Client, out: &mut Output, selector: &OsStr) -> Result<()> {
    let id = resolve(client, Some(selector))?.workspace.workspace.id.clone();
    let reply: WorkspaceReply = client.ask("POST", &by_id(&id, "/activate"), &())?;
    out.print(&reply, |reply| format!("switched to {}\n", named(&reply.workspace.workspace)))
}

fn remove(client: &Client, out: &mut Output, selector: &OsStr) -> Result<()> {
    let mut found = resolve(client, Some(selector))?;
    let target = by_id(&found.workspace.workspace.id, "");
    let asked = Cell::new(0);
    let reply = client.with_daemon(|address| {
        asked.set(asked.get() + 1);
        client.ask_at::<WorkspaceReply>(address, "DELETE", &target, &())
    });
    let reply = match reply {
        // The daemon that was asked first has removed it, and ended before it could say so.
        Err(e) if e.code() == Code::WorkspaceNotFound && asked.get() > 1 => {
            if found.active_id == found.workspace.workspace.id {
                found.active_id.clear();
            }
            found
        }
        other => other?,
    };
    out.print(&reply, |reply| {
        let files = if reply.workspace.workspace.is_local() { "; its files stay" } else { "" };
        format!("removed {}{files}\n", named(&reply.workspace.workspace))
    })
}

fn rename(client: &Client, out: &mut Output, selector: &OsStr, name: &str) -> Result<()> {
    let id = resolve(client, Some(selector))?.workspace.workspace.id.clone();
    let reply: WorkspaceReply = client.ask("PATCH", &by_id(&id, ""), &Rename { name: name.to_owned() })?;
    out.print(&reply, |reply| format!("renamed to {}\n", named(&reply.workspace.workspace)))
}

fn path(client: &Client, out: &mut Output, selector: Option<&OsStr>) -> Result<()> {
    let target = target(client, selector, "/path")?;
    client.ensure()?;
    let waiting = Waiting::new("opencode");
    let reply: PathReply = client.ask("GET", &target, &())?;
    drop(waiting);
    out.print(&reply, |reply| format!("{}\n", clean(reply.path["directory"].as_str().unwrap_or_default())))
}

fn dispose(client: &Client, out: &mut Output, selector: Option<&OsStr>, force: bool) -> Result<()> {
    let id = resolve(client, selector)?.workspace.workspace.id.clone();
    let target = format!("/instances/{}/dispose", percent_encode(id.as_bytes()));
    let reply: DisposeReply = client.ask("POST", &target, &Dispose { force })?;
    out.print(&reply, |reply| {
        let done = if reply.disposed { "disposed the instance of" } else { "no instance was loaded of" };
        format!("{done} {}\n", clean(&reply.workspace.name))
    })
}

fn reset(client: &Client, out: &mut Output, selector: Option<&OsStr>) -> Result<()> {
    let id = encoded(client, selector)?;
    let reply: ResetReply = client.ask("POST", &format!("/instances/{id}/reset"), &())?;
    out.print(&reply, |reply| {
        let done = if reply.reset { "lifted the fence of" } else { "there was no fence around" };
        format!("{done} {}\n", clean(&reply.workspace.name))
    })
}

/// Prints what is a file of another program's.
fn print_text(out: &mut Output, text: &str) -> Result<()> {
    #[derive(Serialize)]
    struct Text<'a> {
        ok: bool,
        text: &'a str,
    }
    out.print(&Text { ok: true, text }, |printed| printed.text.to_owned())
}

fn service(invocation: &Invocation) -> Result<String> {
    let program = std::env::current_exe().map_err(|e| Error::Internal(format!("cannot find this program: {e}")))?;
    let data_dir = DataDir::resolve(invocation.data_dir.as_deref(), invocation.xdg_data_home.as_deref())?;
    let is_named = invocation.data_dir.is_some() || invocation.xdg_data_home.is_some();
    service::unit(&program, is_named.then_some(data_dir.path()), &absolute_options(&invocation.daemon)?)
}

/// What could stand where the last of these words is, for a shell.
pub fn complete(words: &[OsString]) -> u8 {
    complete::print(words);
    0
}

/// The daemon works in another directory.
fn absolute_options(options: &Options) -> Result<Options> {
    let mut options = options.clone();
    if let Some(binary) = &options.engine.binary {
        options.engine.binary = Some(paths::absolute(binary)?);
    }
    Ok(options)
}

/// A workspace for people: its name and where it is.
fn named(workspace: &Workspace) -> String {
    format!("{} ({})", clean(&workspace.name), clean(&workspace.location()))
}

fn print_added(out: &mut Output, reply: &WorkspaceReply) -> Result<()> {
    out.print(reply, |reply| {
        let done = if reply.created == Some(true) { "added" } else { "already there:" };
        let active = if reply.active_id == reply.workspace.workspace.id { ", active" } else { "" };
        format!("{done} {} as {}{active}\n", named(&reply.workspace.workspace), reply.workspace.workspace.id)
    })
}

fn start(client: &Client, out: &mut Output) -> Result<()> {
    let asks_for_options = client.autostart.as_ref().is_some_and(|options| !options.is_default());
    let running = client.find()?;
    if let (Some(address), true) = (&running, asks_for_options) {
        note(&format!("the daemon already runs, on port {}; `openwork daemon restart` takes options\n", address.port));
    }
    wait_until_ready(client, out, running.is_none())
}

/// Waits for opencode, and prints where it and the daemon are. A daemon that is new may have been
/// given options that its opencode was not started with.
fn wait_until_ready(client: &Client, out: &mut Output, is_new: bool) -> Result<()> {
    client.ensure()?;
    let waiting = Waiting::new("opencode");
    let health: Health = client.ask("POST", "/start", &())?;
    drop(waiting);
    if is_new && keeps_another_opencode(client, &health)? {
        note("opencode goes on as it was: its port and program are those of the next one (`daemon restart --all`)\n");
    }
    out.print(&health, |health| {
        let opencode = health.opencode.as_ref().map_or_else(String::new, |opencode| opencode.base_url.clone());
        let version = health.engine.version.as_deref().unwrap_or_default();
        format!("openwork is ready on {}, opencode {version} on {opencode}\n", health.daemon.base_url)
    })
}

/// Whether the opencode that was taken over is not the one that was asked for.
fn keeps_another_opencode(client: &Client, health: &Health) -> Result<bool> {
    let (Some(options), Some(opencode)) = (&client.autostart, &health.opencode) else { return Ok(false) };
    let binary = State::read(&client.data_dir.state())?.binaries.unwrap_or_default().opencode.map(|known| known.path);
    let is_another = |wanted: &Path| binary.as_deref().is_some_and(|path| Path::new(path) != wanted);
    let other_port = options.engine.port.is_some_and(|port| port != opencode.port);
    let url = |ip| format!("http://{ip}:{}", opencode.port);
    let other_host = options.engine.host.is_some_and(|ip| url(ip) != opencode.base_url);
    Ok(other_port || other_host || options.engine.binary.as_deref().is_some_and(is_another))
}

#[derive(Serialize)]
struct Stopped {
    ok: bool,
    stopped: bool,
}

fn stop(client: &Client, out: &mut Output, keep_opencode: bool, force: bool) -> Result<()> {
    let stopped = Stopped { ok: true, stopped: stop_running(client, keep_opencode, force)? };
    out.print(&stopped, |stopped| {
        let done = match (stopped.stopped, keep_opencode) {
            (false, _) => "the daemon is not running",
            (true, false) => "stopped",
            (true, true) => "stopped; opencode keeps running",
        };
        format!("{done}\n")
    })
}

/// Stops the daemon, with `force` also one that does not respond; whether one was running.
fn stop_running(client: &Client, keep_opencode: bool, force: bool) -> Result<bool> {
    let mut stopped = false;
    loop {
        match stop_one(client, keep_opencode, force, stopped) {
            Ok(true) => stopped = true,
            Ok(false) => return Ok(stopped),
            Err(e @ Error::DaemonUnresponsive(_)) if force => {
                end_unresponsive(client, e)?;
                stopped = true;
            }
            Err(e) => return Err(e),
        }
    }
}

/// Stops the daemon that runs now; false when there is none, or `stopped` says that this command has
/// stopped one already: then the user has started the next one.
fn stop_one(client: &Client, keep_opencode: bool, force: bool, stopped: bool) -> Result<bool> {
    let soon = |limit| client.deadline.min(Instant::now() + limit);
    let within = |deadline| Client { data_dir: client.data_dir.clone(), deadline, autostart: None };
    let found = if force { within(soon(STOP_REPLY)).find() } else { client.find() };
    let address = match found? {
        Some(_) if stopped => return Ok(false),
        Some(address) => address,
        // The opencode of a daemon that was killed, perhaps just now, while it was asked to stop. The
        // next daemon takes that opencode over and ends it in good order; its port does not matter.
        None if !keep_opencode && has_orphan(client)? => {
            client.start_without(&Options::default(), &["OPENWORK_DAEMON_PORT", "OPENWORK_OPENCODE_PORT"])?
        }
        None => return Ok(false),
    };
    let daemon = process::open(address.pid);
    match within(soon(STOP_REPLY)).ask_at::<Done>(&address, "POST", "/shutdown", &Shutdown { keep_opencode }) {
        Ok(Done { .. }) | Err(Error::DaemonNotRunning) => {}
        Err(e) => return Err(e),
    }
    if let Some(daemon) = daemon {
        client.wait_until_gone(&daemon)?;
    }
    Ok(true)
}

/// Ends a daemon that does not respond, if it is proven to be ours: a process of our user that holds
/// the lock. Its opencode stays, as after a crash.
fn end_unresponsive(client: &Client, unresponsive: Error) -> Result<()> {
    let path = client.data_dir.daemon_lock();
    let Some(file) = lock::if_held(&path)? else { return Ok(()) };
    let holder = system::lock::holder(&file, &path).map_err(|e| Error::io("find the process that holds", &path, e))?;
    let Some(holder) = holder else { return Err(unresponsive) };
    note(&format!("ending the daemon (pid {}), which does not respond\n", holder.pid));
    holder.end(client.deadline.min(Instant::now() + TERM_PATIENCE));
    // Killing takes no time, but the deadline may have passed in the attempts before.
    let patient = Client { data_dir: client.data_dir.clone(), deadline: Instant::now() + STOP_REPLY, autostart: None };
    patient.wait_until_gone(&holder.pidfd)
}

/// Whether an opencode lives whose daemon was killed.
fn has_orphan(client: &Client) -> Result<bool> {
    let engine = State::read(&client.data_dir.state())?.opencode;
    Ok(engine.is_some_and(|engine| Process::adopt(&engine.identity()).is_some()))
}

fn restart(client: &Client, out: &mut Output, all: bool) -> Result<()> {
    if client.autostart.is_none() {
        return Err(Error::usage("--no-autostart does not go with `daemon restart`"));
    }
    // One that works is not ended for one that could not start.
    let port = client.autostart.as_ref().and_then(|options| options.port);
    if let (Some(port), Some(address)) = (port, client.find()?) {
        let is_taken = |e: std::io::Error| e.kind() == std::io::ErrorKind::AddrInUse;
        if port != address.port && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err_and(is_taken) {
            return Err(Error::PortInUse { port, option: "--daemon-port" });
        }
    }
    let is_elsewhere = |address: &Address| port.is_some_and(|port| port != address.port);
    match client.find()? {
        Some(address) if !is_elsewhere(&address) && client.hand_over(&address, all)? => {}
        // A daemon of 0.1.0 cannot hand over, and at another port there is nothing to hand over.
        Some(_) | None => drop(stop_running(client, !all, false)?),
    }
    wait_until_ready(client, out, true)
}

fn status(client: &Client, out: &mut Output) -> Result<()> {
    let health: Health = client.read("/health")?.ok_or(Error::DaemonNotRunning)?;
    if out.is_json() {
        return out.print(&health, |_| String::new());
    }
    let active = match health.active_id.as_str() {
        "" => None,
        // It may have been removed since, or be missing in the file of another program.
        _ => match client.read::<WorkspaceReply>("/workspaces/@active") {
            Err(e) if e.code().exit_status() == Code::NoActiveWorkspace.exit_status() => None,
            other => other?,
        },
    };
    out.print(&health, |health| human_status(health, active.as_ref()))
}

fn human_status(health: &Health, active: Option<&WorkspaceReply>) -> String {
    let process = |name: &str, state: &str, info: Option<&crate::wire::ProcessInfo>, version: &str| {
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
        process("opencode", health.engine.phase.name(), health.opencode.as_ref(), version),
    ]);
    text.push_str(&format!("restarts  {}\n", health.engine.restarts));
    let active = active.map_or_else(|| "none".to_owned(), |active| named(&active.workspace.workspace));
    text.push_str(&format!("active    {active} ({} in all)\n", health.workspace_count));
    if let (Some(error), true) = (&health.engine.last_error, health.engine.phase != Phase::Ready) {
        text.push_str(&format!("last error: {}\n", output::clean_lines(&error.message)));
    }
    text
}

fn add(client: &Client, out: &mut Output, path: &Path, name: Option<String>) -> Result<()> {
    if path.as_os_str().is_empty() {
        return Err(Error::PathNotFound(path.to_owned()));
    }
    let path = paths::absolute(path)?;
    let Some(text) = path.to_str() else { return Err(Error::PathNotUtf8(path)) };
    let reply = client.ask("POST", "/workspaces", &AddLocal { path: text.to_owned(), name })?;
    print_added(out, &reply)
}

/// What is shown of a workspace in a list: there may be ten thousand.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Row<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    path: Cow<'a, str>,
    workspace_type: Kind,
    base_url: Option<String>,
    directory: Option<String>,
    #[serde(default)]
    missing: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rows<'a> {
    active_id: String,
    #[serde(borrow)]
    workspaces: Vec<Row<'a>>,
}

fn list(client: &Client, out: &mut Output, quiet: bool) -> Result<()> {
    let list = match client.read_soon("/workspaces")? {
        Some(list) => list,
        None => {
            let state = State::read(&client.data_dir.state())?;
            let workspaces = Listed::all(&state.workspaces);
            to_json(&WorkspaceList { ok: true, active_id: state.active_id, workspaces })?
        }
    };
    if out.is_json() {
        out.write(&list)?;
        return out.write(b"\n");
    }
    let Rows { active_id, workspaces } = decode(&list)?;
    if quiet {
        let ids: String = workspaces.iter().map(|row| format!("{}\n", clean(&row.id))).collect();
        return out.write(ids.as_bytes());
    }
    if workspaces.is_empty() {
        note("no workspaces yet: add one with `openwork workspace add <path>`\n");
        return Ok(());
    }
    let rows = workspaces.iter().map(|row| {
        let mark = if row.id == active_id { "*" } else { "" };
        let mut place = location(row.workspace_type, &row.path, row.base_url.as_deref(), row.directory.as_deref());
        if row.missing {
            place += " (missing)";
        }
        [mark.into(), Cow::from(&*row.name), Cow::from(&*row.id), place]
    });
    out.write(table(once(["", "NAME", "ID", "WHERE"].map(Cow::from)).chain(rows)).as_bytes())
}

fn info(client: &Client, out: &mut Output, selector: Option<&OsStr>) -> Result<()> {
    let reply = read_one(client, &text_selector(client, selector)?)?;
    out.print(&reply, |reply| {
        let workspace = &reply.workspace.workspace;
        let date = |ms: Option<u64>| ms.filter(|ms| *ms > 0).map_or_else(|| "unknown".to_owned(), timestamp);
        let row = |name: &'static str, value: String| [Cow::from(name), value.into()];
        let is_active = reply.active_id == workspace.id;
        let missing = if reply.workspace.missing { " (missing)" } else { "" };
        table([
            row("id", workspace.id.clone()),
            row("name", workspace.name.clone()),
            row("type", if workspace.is_local() { "local".to_owned() } else { "remote".to_owned() }),
            row("where", workspace.location() + missing),
            row("active", if is_active { "yes".to_owned() } else { "no".to_owned() }),
            row("created", date(workspace.created_at)),
            row("last used", date(workspace.last_used_at)),
        ])
    })
}

fn instances(client: &Client, out: &mut Output) -> Result<()> {
    let list: InstanceList = client.ask("GET", "/instances", &())?;
    out.print(&list, |list| {
        let now = now_ms();
        let titles = ["WORKSPACE", "STATE", "STREAMS", "LAST USED", "UNLOADS IN"].map(Cow::from);
        let rows = list.instances.iter().map(|instance| {
            let ago =
                |at: u64| if at == 0 { String::new() } else { format!("{} ago", duration(now.saturating_sub(at))) };
            [
                Cow::from(&instance.workspace.name),
                instance.state.name().into(),
                instance.open_streams.to_string().into(),
                instance.workspace.last_used_at.map_or_else(String::new, ago).into(),
                instance.evict_at.map_or_else(String::new, |at| duration(at.saturating_sub(now))).into(),
            ]
        });
        let memory = list.memory.map_or_else(|| "not running".to_owned(), megabytes);
        format!("{}opencode and what it has started: {memory}\n", table(once(titles).chain(rows)))
    })
}

fn import(client: &Client, out: &mut Output, file: &Path) -> Result<()> {
    let import = import::import(client, file)?;
    out.print(&import, |import| {
        let line = |one: &import::Imported| {
            let what = match (&one.workspace, &one.error) {
                (Some(workspace), _) => named(workspace),
                (None, Some(error)) => clean(&error.message).into_owned(),
                (None, None) => String::new(),
            };
            format!("{} {what}\n", one.outcome.name())
        };
        import.workspaces.iter().map(line).collect()
    })
}

/// The one command that writes the state file: the daemon, which else does, refuses to start on it.
fn repair(client: &Client, out: &mut Output) -> Result<()> {
    let path = client.data_dir.state();
    client.data_dir.create()?;
    let lock = lock::try_exclusive(&client.data_dir.daemon_lock())?
        .ok_or_else(|| Error::BadRequest("a daemon is running, and its registry is whole: stop it first".to_owned()))?;
    let repair = crate::repair::repair(&path)?;
    drop(lock);
    out.print(&repair, |repair| {
        let Some(original) = &repair.original else {
            return format!(
                "nothing to repair in {} (workspaces: {})\n",
                clean(&path.to_string_lossy()),
                repair.workspaces.len()
            );
        };
        let mut text =
            format!("{}: {}\n", clean(&path.to_string_lossy()), clean(repair.problem.as_deref().unwrap_or_default()));
        text.push_str(&format!("the original is kept as {}\n", clean(original)));
        for workspace in &repair.workspaces {
            text.push_str(&format!("saved {}\n", named(workspace)));
        }
        for refused in &repair.refused {
            text.push_str(&format!("could not save {}\n", clean(refused)));
        }
        text.push_str(&format!("saved in all: {}\n", repair.workspaces.len()));
        text
    })
}

/// The events of the daemon, a line each, until it ends, nobody reads, or the time is over, if one
/// was given.
fn events(client: &Client, out: &mut Output, timeout_given: bool) -> Result<()> {
    let mut lines = BufReader::new(client.events(timeout_given)?);
    let mut line = Vec::new();
    while !out.is_closed() {
        line.clear();
        match lines.read_until(b'\n', &mut line) {
            Ok(1..) => {}
            Err(e) if agent::is_io_timeout(&e) => return Ok(()),
            Ok(0) | Err(_) => return Err(Error::DaemonNotRunning),
        }
        if let Some(data) = line.strip_prefix(b"data: ") {
            out.write(data)?;
        }
    }
    Ok(())
}

/// Reads about one workspace: from the daemon, or from the state file when none answers at once.
fn read_one(client: &Client, selector: &str) -> Result<WorkspaceReply> {
    match client.read_soon(&format!("/workspaces/{}", percent_encode(selector.as_bytes())))? {
        Some(reply) => decode(&reply),
        None => {
            let state = State::read(&client.data_dir.state())?;
            let workspace = Listed::new(state.find(selector)?);
            Ok(WorkspaceReply { ok: true, active_id: state.active_id.clone(), workspace, created: None })
        }
    }
}

/// A selector as the daemon understands it: a path is made absolute, `-` is looked up, and one
/// that is left out is `OPENWORK_WORKSPACE`, else the active one.
fn text_selector(client: &Client, selector: Option<&OsStr>) -> Result<String> {
    let from_environment = || std::env::var_os(WORKSPACE_VARIABLE).filter(|value| !value.is_empty());
    let Some(selector) = selector.map(OsStr::to_owned).or_else(from_environment) else {
        return Ok("@active".to_owned());
    };
    let not_found = |selector: &OsStr| Error::WorkspaceNotFound(selector.to_string_lossy().into_owned());
    if selector == "-" {
        let state = State::read(&client.data_dir.state())?;
        return Ok(state.find("-")?.id.clone());
    }
    let is_path = looks_like_path(&String::from_utf8_lossy(selector.as_bytes())) && !is_stored_name(client, &selector);
    let selector = if is_path { paths::absolute(Path::new(&selector))?.into_os_string() } else { selector };
    match selector.to_str() {
        // A workspace without a name, or an unset variable: neither means anything.
        None | Some("") => Err(not_found(&selector)),
        Some(text) => Ok(text.to_owned()),
    }
}

/// Whether it is a name that looks like a path: no new one does, but another program's may.
fn is_stored_name(client: &Client, selector: &OsStr) -> bool {
    if selector.as_bytes().starts_with(b"/") || matches!(selector.as_bytes(), b"." | b"..") {
        return false;
    }
    let state = State::read(&client.data_dir.state());
    state.is_ok_and(|state| state.workspaces.iter().any(|workspace| selector == OsStr::new(&workspace.name)))
}

/// A selector as a segment of a request target.
fn encoded(client: &Client, selector: Option<&OsStr>) -> Result<String> {
    Ok(percent_encode(text_selector(client, selector)?.as_bytes()))
}

/// The workspace that a selector means. A change is asked for by its id: when the daemon ends before
/// it replies, the request is repeated, and by then the selector may mean another workspace.
fn resolve(client: &Client, selector: Option<&OsStr>) -> Result<WorkspaceReply> {
    client.ask("GET", &target(client, selector, "")?, &())
}

/// The target of a change of one workspace.
fn by_id(id: &str, tail: &str) -> String {
    format!("/workspaces/{}{tail}", percent_encode(id.as_bytes()))
}

/// The target of a request about one workspace.
fn target(client: &Client, selector: Option<&OsStr>, tail: &str) -> Result<String> {
    Ok(format!("/workspaces/{}{tail}", encoded(client, selector)?))
}
