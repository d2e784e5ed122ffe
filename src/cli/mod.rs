//! The commands, one function each. They ask the daemon, or read files; only `state repair` writes.

mod client;
mod complete;
mod daemon;
mod doctor;
mod help;
mod http;
mod import;
mod logs;
mod manual;
mod output;
mod passthrough;
mod pick;
mod service;
mod session;
mod workspace;

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::iter::once;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::client::{Client, decode};
use self::daemon::WhenIdle;
use self::output::{Output, clean, duration, megabytes, note, table};
use self::workspace::{WORKSPACE_VARIABLE, from_environment, named};
use crate::args::{self, Command, Invocation, Wanted};
use crate::daemon::Start;
use crate::error::{Code, Error, Result};
use crate::framing::percent_encode;
use crate::log::now_ms;
use crate::options::Options;
use crate::paths::{self, DataDir};
use crate::wire::{Dispose, DisposeReply, InstanceList, ResetReply, RunningSession};
use crate::workspace::looks_like_path;
use crate::{agent, lock};

/// The hidden command by which a client starts a daemon in the background.
pub const DETACHED_COMMAND: &str = "__daemon";
/// The hidden command by which a shell asks for the candidates at the cursor.
pub const COMPLETE_COMMAND: &str = "__complete";
/// The version of this command.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Runs a command line and returns its exit status. A `start` other than the one in the foreground is for
/// `daemon`, whose failures go to its log.
pub fn main(argv: &[OsString], start: Start) -> u8 {
    let parsed = args::parse(argv, |name| std::env::var_os(name));
    let json = parsed.as_ref().map_or_else(|_| args::wants_json(argv), |invocation| invocation.json);
    let mut output = Output::new(json);
    let result = parsed.and_then(|invocation| {
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
        // The result has been printed: opencode's reply, or what the doctor has found.
        Err(e @ (Error::Refused { json: true, .. } | Error::Unhealthy | Error::Printed(_))) => e.code().exit_status(),
        // The client that started this daemon reports the error to its user.
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
    crate::daemon::run(&data_dir, &absolute_options(&invocation.daemon)?, start)
}

fn run(invocation: Invocation, out: &mut Output) -> Result<()> {
    // Created only by commands that need it: `help` works without a home directory.
    let client = || -> Result<Client> {
        let data_dir = DataDir::resolve(invocation.data_dir.as_deref(), invocation.xdg_data_home.as_deref())?;
        data_dir.check_owner()?;
        Ok(Client {
            data_dir,
            deadline: Instant::now() + invocation.timeout,
            autostart: invocation.autostart.then(|| absolute_options(&invocation.daemon)).transpose()?,
        })
    };
    // Commands about the daemon itself report its version in their own way.
    let is_about_daemon = matches!(
        invocation.command,
        // The prompt does not call the daemon.
        Command::Prompt
            | Command::DaemonStart
            | Command::DaemonStop { .. }
            | Command::DaemonRestart { .. }
            | Command::Status
    );
    let asking = || {
        let client = client()?;
        if std::io::stderr().is_terminal() && !is_about_daemon {
            note_other_version(&client);
        }
        Ok(client)
    };
    let result = run_command(&invocation, asking, out);
    match result {
        // The daemon is older and lacks the route.
        Err(e) if matches!(e.code(), Code::NotFound | Code::MethodNotAllowed) => match other_version(&client()?) {
            Some(version) => Err(Error::DaemonTooOld { what: format!("`openwork {}`", invocation.name), version }),
            None => Err(e),
        },
        Err(e) => Err(explained(e, &invocation.command)),
        Ok(()) => Ok(()),
    }
}

/// A word quoted for a shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/-_.=:,%@+~".contains(c);
    if word.chars().all(is_plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

/// Adds to a failure about a workspace what the daemon does not know: that the environment has named the
/// workspace, or that a directory has this name.
fn explained(e: Error, command: &Command) -> Error {
    let code = e.code();
    let is_about_workspace = matches!(
        code,
        Code::WorkspaceNotFound | Code::WorkspaceAmbiguous | Code::WorkspaceIsRemote | Code::PathNotFound
    );
    let Some(wanted) = command.workspace().filter(|_| is_about_workspace) else { return e };
    let body = e.body();
    match wanted {
        Wanted::Default => {
            let Some(value) = from_environment() else { return e };
            let message = format!("{WORKSPACE_VARIABLE} is {:?}: {}", value.to_string_lossy(), body.message);
            e.reworded(message, body.hint)
        }
        Wanted::Named(name) if code == Code::WorkspaceNotFound && Path::new(name).is_dir() => {
            let name = name.to_string_lossy();
            let path = quoted(&if looks_like_path(&name) { name.into_owned() } else { format!("./{name}") });
            let done = match command {
                Command::Attach { .. } => format!("`openwork open {path}` adds the directory and attaches"),
                _ => format!("`openwork workspace add {path}` adds the directory"),
            };
            e.reworded(body.message, Some(done))
        }
        Wanted::Named(_) => e,
    }
}

fn run_command(invocation: &Invocation, client: impl Fn() -> Result<Client>, out: &mut Output) -> Result<()> {
    let idle = WhenIdle { timeout: invocation.timeout, is_limit: invocation.timeout_given };
    let wanted = |when_idle: bool| when_idle.then_some(idle);
    match &invocation.command {
        Command::Help { topic } => help::print(out, topic.as_deref()),
        Command::Version => version(out),
        Command::DaemonRun => run_daemon(invocation, Start::Foreground),
        Command::Completions { shell } => print_text(out, complete::script(*shell)),
        Command::Man => print_text(out, &manual::page()),
        Command::ServicePrint { is_socket: true, .. } => print_text(out, &service::socket_unit(&invocation.daemon)),
        Command::ServicePrint { program, is_socket: false } => {
            print_text(out, &service(invocation, program.as_deref())?)
        }
        Command::DaemonStart => daemon::start(&client()?, out),
        Command::DaemonStop { keep_opencode, all, force, when_idle } => {
            let stop = daemon::Stop { keep_opencode: *keep_opencode, all: *all, force: *force };
            daemon::stop(&client()?, out, stop, wanted(*when_idle))
        }
        Command::DaemonRestart { all, when_idle } => daemon::restart(&client()?, out, *all, wanted(*when_idle)),
        Command::Status => daemon::status(&client()?, out),
        Command::Doctor => doctor::examine(invocation, out),
        Command::WorkspaceAdd { paths, name, force } => workspace::add(&client()?, out, paths, name.clone(), *force),
        Command::WorkspaceAddRemote(body) => workspace::add_remote(&client()?, out, body),
        Command::WorkspaceList { quiet, names } => workspace::list(&client()?, out, *quiet, *names),
        Command::WorkspaceCurrent { quiet } => workspace::current(&client()?, out, *quiet),
        Command::WorkspaceInfo { selector } => workspace::info(&client()?, out, selector.as_deref()),
        Command::WorkspaceSwitch { selector } => workspace::switch(&client()?, out, selector.as_deref()),
        Command::WorkspaceRemove { selectors } => workspace::remove(&client()?, out, selectors),
        Command::WorkspaceRemoveMissing => workspace::remove_missing(&client()?, out),
        Command::WorkspaceRename { selector, name } => workspace::rename(&client()?, out, selector, name),
        Command::WorkspaceMove { selector, path } => workspace::relocate(&client()?, out, selector, path),
        Command::WorkspaceImport { file } => workspace::import(&client()?, out, file),
        Command::WorkspacePath { selector } => workspace::path(&client()?, out, selector.as_deref()),
        Command::Api(call) => passthrough::api(&client()?, out, call, invocation.timeout_given),
        Command::Attach { selector, args } => Err(passthrough::attach(&client()?, selector.as_deref(), args)),
        Command::Run { selector, args } => Err(passthrough::run(&client()?, selector.as_deref(), args)),
        Command::SessionList { selector, all, quiet } => {
            session::list(&client()?, out, selector.as_deref(), *all, *quiet)
        }
        Command::SessionAbort { id } => session::abort(&client()?, out, id),
        Command::Wait { selector, all } => {
            let client = client()?;
            let until = invocation.timeout_given.then_some(client.deadline);
            session::wait(&client, out, selector.as_deref(), *all, until)
        }
        Command::Env { selector, shell } => passthrough::env(&client()?, out, selector.as_deref(), *shell),
        Command::EnvUnset { shell } => passthrough::env_unset(out, *shell),
        Command::Open { directory } => {
            passthrough::check_terminal(&[])?;
            let client = client()?;
            let id = workspace::at(&client, directory)?;
            Err(passthrough::attach(&client, Some(id.as_ref()), &[]))
        }
        // A prompt never fails, and never waits.
        Command::Prompt => workspace::prompt(client().ok().as_ref(), out),
        Command::Events { since } => events(&client()?, out, invocation.timeout_given, *since),
        Command::InstanceList => instances(&client()?, out),
        Command::InstanceDispose { selector, force } => dispose(&client()?, out, selector.as_deref(), *force),
        Command::InstanceReset { selector } => reset(&client()?, out, selector.as_deref()),
        Command::StateRepair => repair(&client()?, out),
        Command::Logs { log, follow, lines } => {
            let client = client()?;
            let until = invocation.timeout_given.then_some(client.deadline);
            logs::print(&client, out, *log, *follow, until, *lines)
        }
    }
}

/// The version of the daemon, if one answers at once and is of another version than this command.
fn other_version(client: &Client) -> Option<String> {
    /// The field of `/health` that all versions have.
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Version {
        cli_version: String,
    }
    let health = client.read_soon("/health").ok()??;
    let Version { cli_version } = decode(&health).ok()?;
    Some(cli_version).filter(|version| version != VERSION)
}

fn note_other_version(client: &Client) {
    if let Some(version) = other_version(client) {
        let version = clean(&version);
        note(&format!(
            "note: the daemon is openwork {version}, this is {VERSION}; `openwork daemon restart` updates it\n"
        ));
    }
}

fn version(out: &mut Output) -> Result<()> {
    #[derive(Serialize)]
    struct Version {
        ok: bool,
        version: &'static str,
    }
    let version = Version { ok: true, version: VERSION };
    out.print(&version, |version| format!("openwork {}\n", version.version))
}

fn dispose(client: &Client, out: &mut Output, selector: Option<&OsStr>, force: bool) -> Result<()> {
    let id = workspace::resolve(client, selector)?.workspace.workspace.id.clone();
    let target = format!("/instances/{}/dispose", percent_encode(id.as_bytes()));
    let reply: DisposeReply = client.ask("POST", &target, &Dispose { force })?;
    out.print(&reply, |reply| {
        let done = if reply.disposed { "disposed the instance of" } else { "no instance was loaded of" };
        format!("{done} {}\n", clean(&reply.workspace.name))
    })
}

fn reset(client: &Client, out: &mut Output, selector: Option<&OsStr>) -> Result<()> {
    let id = workspace::resolve(client, selector)?.workspace.workspace.id.clone();
    let target = format!("/instances/{}/reset", percent_encode(id.as_bytes()));
    let reply: ResetReply = client.ask("POST", &target, &())?;
    out.print(&reply, |reply| {
        let done = if reply.reset { "lifted the fence of" } else { "there was no fence around" };
        format!("{done} {}\n", clean(&reply.workspace.name))
    })
}

/// Prints a file for another program.
fn print_text(out: &mut Output, text: &str) -> Result<()> {
    #[derive(Serialize)]
    struct Text<'a> {
        ok: bool,
        text: &'a str,
    }
    out.print(&Text { ok: true, text }, |printed| printed.text.to_owned())
}

fn service(invocation: &Invocation, program: Option<&Path>) -> Result<String> {
    // systemd requires an absolute path. The file need not exist yet: packages name the file that they install.
    let program = program.map_or_else(std::env::current_exe, std::path::absolute);
    let program = program.map_err(|e| Error::Internal(format!("cannot find the program: {e}")))?;
    let data_dir = DataDir::resolve(invocation.data_dir.as_deref(), invocation.xdg_data_home.as_deref())?;
    let is_named = invocation.data_dir.is_some() || invocation.xdg_data_home.is_some();
    service::unit(&program, is_named.then_some(data_dir.path()), &absolute_options(&invocation.daemon)?)
}

/// Prints the candidates for the last of these words, for a shell.
pub fn complete(words: &[OsString]) -> u8 {
    complete::print(words);
    0
}

/// The options with absolute paths, since the daemon works in another directory.
fn absolute_options(options: &Options) -> Result<Options> {
    let mut options = options.clone();
    if let Some(binary) = &options.engine.binary {
        options.engine.binary = Some(paths::absolute(binary)?);
    }
    Ok(options)
}

/// Running sessions by their titles, or ids where a title is not known.
fn titles_of(sessions: &[RunningSession]) -> String {
    let titles = sessions.iter().map(|session| session.title.as_deref().unwrap_or(&session.id));
    titles.collect::<Vec<_>>().join(", ")
}

fn instances(client: &Client, out: &mut Output) -> Result<()> {
    let list: InstanceList = client.ask("GET", "/instances", &())?;
    out.print(&list, |list| {
        let now = now_ms();
        let titles = ["WORKSPACE", "STATE", "STREAMS", "LAST USED", "UNLOADS IN", "RUNNING"].map(Cow::from);
        let rows = list.instances.iter().map(|instance| {
            let ago =
                |at: u64| if at == 0 { String::new() } else { format!("{} ago", duration(now.saturating_sub(at))) };
            [
                Cow::from(&instance.workspace.name),
                Cow::from(&*instance.state),
                instance.open_streams.to_string().into(),
                instance.workspace.last_used_at.map_or_else(String::new, ago).into(),
                instance.evict_at.map_or_else(String::new, |at| duration(at.saturating_sub(now))).into(),
                titles_of(&instance.sessions).into(),
            ]
        });
        let memory = list.memory.map_or_else(|| "not running".to_owned(), megabytes);
        format!("{}opencode and what it has started: {memory}\n", table(once(titles).chain(rows)))
    })
}

/// Repairs the state file. The daemon, otherwise its only writer, refuses to start with a corrupt one.
fn repair(client: &Client, out: &mut Output) -> Result<()> {
    let path = client.data_dir.state();
    client.data_dir.create()?;
    let lock = lock::try_exclusive(&client.data_dir.daemon_lock())?.ok_or_else(|| {
        Error::BadRequest("a daemon is running, so the state file is not corrupt; stop the daemon first".to_owned())
    })?;
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

/// How long a daemon that ends may take to be followed by its successor: a restart ends all sessions of
/// opencode first, within 45 s.
const SUCCESSOR_LIMIT: Duration = Duration::from_secs(60);
/// How long no daemon may run between the two of a restart: at another port, the next one starts only after
/// the first has ended.
const WITHOUT_DAEMON: Duration = Duration::from_secs(2);
/// The interval between looks for the successor.
const SUCCESSOR_INTERVAL: Duration = Duration::from_millis(50);

/// Prints the daemon's events, one a line, until the daemon ends without a successor, the reader closes the
/// pipe, or the given time is over. Follows a daemon that restarts: a `gap` event stands for events that
/// were lost meanwhile.
fn events(client: &Client, out: &mut Output, timeout_given: bool, since: Option<u64>) -> Result<()> {
    // Ids of a daemon begin at its start time in microseconds, so those of a successor are larger.
    let mut last = since.unwrap_or_else(|| now_ms() * 1000);
    let mut stream: Box<dyn Read> = Box::new(client.events(timeout_given, since)?);
    loop {
        let mut lines = BufReader::new(stream);
        let mut line = Vec::new();
        loop {
            if out.is_closed() {
                return Ok(());
            }
            line.clear();
            match lines.read_until(b'\n', &mut line) {
                Ok(1..) => {}
                Err(e) if agent::is_io_timeout(&e) => return Ok(()),
                Ok(0) | Err(_) => break,
            }
            if let Some(data) = line.strip_prefix(b"data: ") {
                out.write(data)?;
            }
            if let Some(id) =
                line.strip_prefix(b"id: ").and_then(|id| std::str::from_utf8(id).ok()?.trim().parse().ok())
            {
                last = id;
            }
        }
        stream = match events_of_successor(client, timeout_given, last)? {
            Some(stream) => stream,
            None => return Ok(()),
        };
    }
}

/// The events of the next daemon, after those up to `last`. `None` when the given time is over.
///
/// # Errors
/// `daemon_not_running`, with the way to resume, when no daemon follows.
fn events_of_successor(client: &Client, timeout_given: bool, last: u64) -> Result<Option<Box<dyn Read>>> {
    let patience = Instant::now() + WITHOUT_DAEMON;
    let limit = Instant::now() + SUCCESSOR_LIMIT;
    let next = client.until(if timeout_given { client.deadline } else { limit });
    loop {
        std::thread::sleep(SUCCESSOR_INTERVAL);
        match next.events(timeout_given, Some(last)) {
            Ok(stream) => return Ok(Some(Box::new(stream))),
            Err(_) if timeout_given && Instant::now() >= client.deadline => return Ok(None),
            Err(Error::DaemonNotRunning) if Instant::now() < patience => {}
            Err(e @ Error::DaemonNotRunning) => {
                let hint = format!("`openwork events --since {last}` starts a daemon and resumes");
                return Err(e.reworded("the daemon has ended".to_owned(), Some(hint)));
            }
            Err(e) => return Err(e),
        }
    }
}
