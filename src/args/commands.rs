//! The table of commands: each row has the function that makes its [`Command`].

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use serde::Serialize;

use super::given::Given;
use super::options::{OPTIONS, OptionRow, RUNS_DAEMON};
use super::suggest::unknown_command;
use super::values::{after, choice, number, shown, text};
use super::{Api, Command, CompletedShell, Data, Log, Shell};
use crate::error::{Error, Result};
use crate::wire::{AddRemote, TIMEOUT_HEADER};

/// A row of the table of commands.
#[derive(Serialize)]
pub struct CommandRow {
    /// One or two words.
    pub name: &'static str,
    /// The arguments in the help: `<required>`, `[optional]`.
    pub args: &'static str,
    /// The least and the greatest number of arguments.
    #[serde(skip)]
    pub count: (usize, usize),
    /// Whether it starts a daemon when none runs.
    pub autostart: bool,
    /// The effect, in one line.
    pub summary: &'static str,
    /// Whether it passes arguments on to opencode.
    #[serde(skip)]
    pub passes_on: bool,
    /// Builds the command from the command line, after the number of arguments was checked.
    #[serde(skip)]
    pub make: fn(&mut Given<'_>) -> Result<Command>,
}

impl CommandRow {
    /// The options of this command, without those of every command.
    pub fn options(&self) -> impl Iterator<Item = &'static OptionRow> {
        let name = self.name;
        OPTIONS.iter().filter(move |option| !option.commands.is_empty() && option.is_for(name))
    }

    /// The workspace that the command uses when none is named, for its help; `None` for a command that uses
    /// none, or needs a name.
    pub fn default_workspace(&self) -> Option<&'static str> {
        match self.name {
            "attach" | "run" | "session list" | "wait" | "prompt" => {
                Some("OPENWORK_WORKSPACE, else the workspace of the working directory, else the active one")
            }
            "workspace info" | "workspace path" | "api" | "env" | "instance dispose" | "instance reset" => {
                Some("OPENWORK_WORKSPACE, else the active workspace, wherever you are")
            }
            _ => None,
        }
    }

    /// Whether it runs a daemon, starts one, or describes one.
    pub fn takes_daemon_options(&self) -> bool {
        self.autostart || RUNS_DAEMON.contains(&self.name)
    }
}

const fn row(
    name: &'static str,
    args: &'static str,
    count: (usize, usize),
    autostart: bool,
    summary: &'static str,
    make: fn(&mut Given<'_>) -> Result<Command>,
) -> CommandRow {
    CommandRow { name, args, count, autostart, summary, passes_on: false, make }
}

impl CommandRow {
    const fn passing_on(self) -> CommandRow {
        CommandRow { passes_on: true, ..self }
    }
}

/// Every command, in the order of the help.
#[rustfmt::skip]
pub const COMMANDS: &[CommandRow] = &[
    row("status", "", (0, 0), false, "Show the state of the daemon and of opencode", |_| Ok(Command::Status)),
    row("doctor", "", (0, 0), false, "Check everything that openwork depends on, and say what to do; exit status 1 if something is wrong", |_| Ok(Command::Doctor)),
    row("daemon", "", (0, 0), false, "Run the daemon in the foreground", |_| Ok(Command::DaemonRun)),
    row("daemon run", "", (0, 0), false, "The same as daemon", |_| Ok(Command::DaemonRun)),
    row("daemon start", "", (0, 0), true, "Start the daemon in the background and wait until opencode is ready", |_| Ok(Command::DaemonStart)),
    row("daemon stop", "", (0, 0), false, "Stop the daemon and opencode",
        stop),
    row("daemon restart", "", (0, 0), true, "Restart the daemon; opencode keeps running",
        |given| Ok(Command::DaemonRestart { all: given.has("--all"), when_idle: given.has("--when-idle") })),
    row("daemon status", "", (0, 0), false, "The same as status", |_| Ok(Command::Status)),
    row("workspace add", "<path>...", (1, usize::MAX), true, "Add directories", add),
    row("workspace add-remote", "<base-url>", (1, 1), true, "Add a remote OpenCode server", add_remote),
    row("workspace list", "", (0, 0), false, "List the workspaces; * marks the active one",
        |given| Ok(Command::WorkspaceList { quiet: given.has("--quiet"), names: given.has("--names") })),
    row("workspace switch", "[<ws>]", (0, 1), true, "Make a workspace the active one; on a terminal, without <ws>, choose it from a list", 
        |given| Ok(Command::WorkspaceSwitch { selector: given.optional() })),
    row("workspace current", "", (0, 0), false, "Show the active workspace",
        |given| Ok(Command::WorkspaceCurrent { quiet: given.has("--quiet") })),
    row("workspace info", "[<ws>]", (0, 1), false, "Show a workspace",
        |given| Ok(Command::WorkspaceInfo { selector: given.optional() })),
    row("workspace path", "[<ws>]", (0, 1), true, "Ask OpenCode for the directory of a workspace (loads its instance)",
        |given| Ok(Command::WorkspacePath { selector: given.optional() })),
    row("workspace remove", "<ws>...", (0, usize::MAX), true, "Remove workspaces from the registry; their files stay", remove),
    row("workspace rename", "<ws> <name>", (2, 2), true, "Rename a workspace", rename),
    row("workspace move", "<ws> <path>", (2, 2), true, "Point a workspace at the new path of its moved directory",
        |given| Ok(Command::WorkspaceMove { selector: given.next(), path: given.next().into() })),
    row("workspace import", "<file>", (1, 1), true, "Add the workspaces in the state file of another orchestrator or of OpenWork desktop",
        |given| Ok(Command::WorkspaceImport { file: given.next().into() })),
    row("api", "[<ws>] [METHOD] <path>", (1, 3), true, "Make any OpenCode call in a workspace and print the reply as it arrives", api),
    row("attach", "[<ws>] [ARGS]", (0, 1), true, "Open OpenCode's terminal interface in a workspace",
        |given| Ok(Command::Attach { selector: given.optional(), args: given.take_trailing() })).passing_on(),
    row("run", "[-w <ws>] ARGS", (0, 1), true, "Run `opencode run ARGS` in a workspace, against the warm server",
        |given| Ok(Command::Run { selector: given.optional(), args: given.take_trailing() })).passing_on(),
    row("open", "[<dir>]", (0, 1), true, "Add a directory if it is in no workspace, and open OpenCode's terminal interface in it",
        |given| Ok(Command::Open { directory: given.optional().unwrap_or_else(|| ".".into()).into() })),
    row("session list", "[<ws>]", (0, 1), true, "List OpenCode's sessions in a workspace, running ones first (loads its instance)", session_list),
    row("session abort", "<id>", (1, 1), true, "End the running turn of a session",
        |given| Ok(Command::SessionAbort { id: text("<id>", given.next())? })),
    row("wait", "[<ws>]", (0, 1), true, "Wait until no session runs in a workspace, with no limit but --timeout", wait),
    row("env", "[<ws>]", (0, 1), true, "Print the environment for other OpenCode clients, for eval", env),
    row("prompt", "", (0, 0), false, "Print the name of the workspace for a shell prompt, from the state file alone; nothing if there is none",
        |_| Ok(Command::Prompt)),
    row("events", "", (0, 0), true, "Print the daemon's events, one JSON object per line", 
        |given| Ok(Command::Events { since: given.value("--since").map(|id| event_id(&id)).transpose()? })),
    row("instance list", "", (0, 0), true, "List the instances of the local workspaces: busy, warm, cold or fenced", |_| Ok(Command::InstanceList)),
    row("instance dispose", "[<ws>]", (0, 1), true, "Dispose the instance of a workspace in OpenCode",
        |given| Ok(Command::InstanceDispose { force: given.has("--force"), selector: given.optional() })),
    row("instance reset", "[<ws>]", (0, 1), true, "Lift the fence around a workspace whose loading ended opencode",
        |given| Ok(Command::InstanceReset { selector: given.optional() })),
    row("logs", "[opencode|daemon]", (0, 1), false, "Print a log (default: opencode's)", logs),
    row("state repair", "", (0, 0), false, "Save the readable parts of a corrupt state file; the original is kept", |_| Ok(Command::StateRepair)),
    row("completions", "bash|zsh|fish", (1, 1), false, "Print the completion script of a shell", completions),
    row("man", "", (0, 0), false, "Print the manual page", |_| Ok(Command::Man)),
    row("service print", "", (0, 0), false, "Print a systemd unit that runs the daemon with these options", service),
    row("version", "", (0, 0), false, "Show the version", |_| Ok(Command::Version)),
    row("help", "[<command>]", (0, 2), false, "Show help", |given| Ok(Command::Help { topic: help_topic(given)? })),
];

/// Short forms of words anywhere in the name of a command.
pub const ALIASES: &[(&str, &str)] = &[
    ("ws", "workspace"),
    ("ls", "list"),
    ("rm", "remove"),
    ("mv", "rename"),
    ("use", "switch"),
    ("completion", "completions"),
];

/// The first word that may be omitted if no other command has the name: `openwork add .`
pub const OMISSIBLE: &str = "workspace";

/// A word without its alias.
pub fn canonical(word: &OsStr) -> &str {
    let word = word.to_str().unwrap_or_default();
    ALIASES.iter().find(|(short, _)| *short == word).map_or(word, |(_, long)| long)
}

/// Finds the command that these words begin with, and the words that are its arguments. There is no row when
/// there are no words, or only the first word of several commands.
///
/// # Errors
/// `usage`, with the nearest known word.
pub fn find_command<'w>(words: &[&'w OsString]) -> Result<(Option<&'static CommandRow>, Vec<&'w OsString>)> {
    let Some(first) = words.first() else { return Ok((None, Vec::new())) };
    let first = canonical(first);
    let named = |name: &str| COMMANDS.iter().find(|row| row.name == name);
    let both = words.get(1).map(|second| format!("{first} {}", canonical(second)));
    if let Some(row) = both.as_deref().and_then(named) {
        return Ok((Some(row), words[2..].to_vec()));
    }
    let is_group = COMMANDS.iter().any(|row| row.name.split_once(' ').is_some_and(|(group, _)| group == first));
    match (named(first), is_group, words.get(1)) {
        (Some(row), false, _) | (Some(row), true, None) => Ok((Some(row), words[1..].to_vec())),
        (None, true, None) => Ok((None, Vec::new())),
        (_, true, Some(second)) => {
            let in_group = |row: &CommandRow| row.name.split_once(' ').filter(|(group, _)| *group == first);
            let seconds = COMMANDS.iter().filter_map(in_group).map(|(_, second)| second);
            Err(unknown_command(Some(first), &second.to_string_lossy(), None, seconds))
        }
        (None, false, _) => match named(&format!("{OMISSIBLE} {first}")) {
            Some(row) => Ok((Some(row), words[1..].to_vec())),
            None => {
                let names = COMMANDS.iter().flat_map(|row| {
                    let (first, second) = row.name.split_once(' ').unwrap_or((row.name, ""));
                    [row.name, first, if first == OMISSIBLE { second } else { "" }]
                });
                let given = words[0].to_string_lossy();
                let second = words.get(1).map(|second| canonical(second));
                Err(unknown_command(None, &given, second, names.filter(|name| !name.is_empty())))
            }
        },
    }
}

/// Whether a command ends the daemon or a session, or removes a workspace. `name` may omit the first word.
pub fn is_ending(name: &str) -> bool {
    ["daemon stop", "workspace remove", "remove", "session abort"].contains(&name)
}

/// The topic of `help`: a command, or the first word of several.
fn help_topic(given: &Given<'_>) -> Result<Option<String>> {
    let words: Vec<&OsString> = given.words.iter().collect();
    let (row, _) = find_command(&words)?;
    let group = words.first().map(|word| canonical(word));
    Ok(row.map(|row| row.name).or(group).map(str::to_owned))
}

fn add(given: &mut Given<'_>) -> Result<Command> {
    let paths: Vec<PathBuf> = std::mem::take(&mut given.words).into_iter().map(PathBuf::from).collect();
    let name = given.name()?;
    if name.is_some() && paths.len() > 1 {
        return Err(Error::Usage {
            message: format!("--name is for one directory, not for {}", paths.len()),
            hint: Some("add them one by one, or leave out --name".to_owned()),
        });
    }
    Ok(Command::WorkspaceAdd { paths, name, force: given.has("--force") })
}

fn add_remote(given: &mut Given<'_>) -> Result<Command> {
    let not_text = |url: OsString| Error::InvalidUrl { url: shown(&url).into_owned(), why: "it is not UTF-8" };
    Ok(Command::WorkspaceAddRemote(AddRemote {
        base_url: given.next().into_string().map_err(not_text)?,
        directory: given.value("--directory").map(|directory| text("--directory", directory)).transpose()?,
        name: given.name()?,
    }))
}

fn remove(given: &mut Given<'_>) -> Result<Command> {
    let selectors = Vec::from(std::mem::take(&mut given.words));
    let hint = Some("openwork workspace remove <ws>..., or --missing".to_owned());
    let message = match (selectors.is_empty(), given.has("--missing")) {
        (false, false) => return Ok(Command::WorkspaceRemove { selectors }),
        (true, true) => return Ok(Command::WorkspaceRemoveMissing),
        (true, false) => "`workspace remove` needs more arguments",
        (false, true) => "--missing means every workspace whose directory has gone, and one is named too",
    };
    Err(Error::Usage { message: message.to_owned(), hint })
}

fn rename(given: &mut Given<'_>) -> Result<Command> {
    let selector = given.next();
    Ok(Command::WorkspaceRename { selector, name: super::values::name(given.next())? })
}

/// The value of `--since`.
fn event_id(value: &OsStr) -> Result<u64> {
    let id = value.to_str().and_then(|text| text.parse::<u64>().ok()).filter(|id| *id < u64::MAX);
    id.ok_or_else(|| Error::usage(format!("--since: {} is not the id of an event", shown(value))))
}

fn stop(given: &mut Given<'_>) -> Result<Command> {
    let (keep_opencode, all) = (given.has("--keep-opencode"), given.has("--all"));
    if keep_opencode && all {
        return Err(Error::usage("--keep-opencode leaves opencode running, and --all stops it even when it is shared"));
    }
    Ok(Command::DaemonStop { keep_opencode, all, force: given.has("--force"), when_idle: given.has("--when-idle") })
}

/// Refuses a workspace together with `--all`.
fn all_or_one(given: &mut Given<'_>) -> Result<(Option<OsString>, bool)> {
    let (selector, all) = (given.optional(), given.has("--all"));
    match (&selector, all) {
        (Some(selector), true) => {
            let message = format!("--all means every workspace, and {} is named too", shown(selector));
            Err(Error::Usage { message, hint: Some("leave one of them out".to_owned()) })
        }
        _ => Ok((selector, all)),
    }
}

fn session_list(given: &mut Given<'_>) -> Result<Command> {
    let (selector, all) = all_or_one(given)?;
    Ok(Command::SessionList { selector, all, quiet: given.has("--quiet") })
}

fn wait(given: &mut Given<'_>) -> Result<Command> {
    let (selector, all) = all_or_one(given)?;
    Ok(Command::Wait { selector, all })
}

fn env(given: &mut Given<'_>) -> Result<Command> {
    let shell = match given.value("--shell").as_ref().map(|shell| shown(shell)).as_deref() {
        None | Some("sh" | "bash" | "zsh" | "dash" | "ksh") => Shell::Sh,
        Some("fish") => Shell::Fish,
        Some(other) => return Err(choice("shell", other, "sh (also for bash and zsh) or fish")),
    };
    if !given.has("--unset") {
        return Ok(Command::Env { selector: given.optional(), shell });
    }
    match given.optional() {
        None => Ok(Command::EnvUnset { shell }),
        Some(selector) => {
            Err(Error::usage(format!("--unset is for every workspace, and {} is named", shown(&selector))))
        }
    }
}

fn logs(given: &mut Given<'_>) -> Result<Command> {
    let log = match given.optional().as_ref().map(|log| shown(log)).as_deref() {
        None | Some("opencode") => Log::Opencode,
        Some("daemon") => Log::Daemon,
        Some(other) => return Err(choice("log", other, "opencode or daemon")),
    };
    let lines = given.value("--lines").map(|lines| number(given.typed("--lines"), &lines)).transpose()?;
    Ok(Command::Logs { log, follow: given.has("--follow"), lines })
}

fn completions(given: &mut Given<'_>) -> Result<Command> {
    let shell = match &*shown(&given.next()) {
        "bash" => CompletedShell::Bash,
        "zsh" => CompletedShell::Zsh,
        "fish" => CompletedShell::Fish,
        other => return Err(choice("shell", other, "bash, zsh or fish")),
    };
    Ok(Command::Completions { shell })
}

fn service(given: &mut Given<'_>) -> Result<Command> {
    let program = given.value("--program").map(PathBuf::from);
    if program.as_ref().is_some_and(|program| program.as_os_str().is_empty()) {
        return Err(Error::usage("--program needs a value (FILE)"));
    }
    Ok(Command::ServicePrint { program, is_socket: given.has("--socket") })
}

/// The HTTP methods that `api` knows: any other word is a workspace.
pub const METHODS: [&str; 7] = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"];

/// Headers that openwork sets itself.
const OWN_HEADERS: [&str; 6] =
    ["Host", "Connection", "Authorization", "Content-Length", "Transfer-Encoding", TIMEOUT_HEADER];

/// Parses the arguments of `api`: the path comes last, workspace and method before it.
fn api(given: &mut Given<'_>) -> Result<Command> {
    let mut words = Vec::from(std::mem::take(&mut given.words));
    let path = text("<path>", words.pop().unwrap_or_default())?;
    if !path.starts_with('/') || !path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Error::Usage {
            message: format!("{path:?} is not an OpenCode path: it must start with / and be percent-encoded"),
            hint: Some("openwork api [<ws>] [METHOD] <path>".to_owned()),
        });
    }
    let is_method = |word: &OsString| METHODS.iter().any(|method| word == method);
    let option = given.value("--method").map(|method| {
        let known = METHODS.iter().find(|known| method.eq_ignore_ascii_case(known));
        known.copied().ok_or_else(|| choice("method", &shown(&method), &METHODS.join(", ")))
    });
    let option = option.transpose()?;
    let method = match words.pop() {
        Some(word) if is_method(&word) && option.is_none() => Some(text("METHOD", word)?),
        // With --method, every word before the path is the workspace.
        Some(word) if words.is_empty() && option.is_some() => {
            words.push(word);
            None
        }
        Some(word) if words.is_empty() => {
            if let Some(method) = METHODS.iter().find(|method| word.eq_ignore_ascii_case(method)) {
                return Err(Error::Usage {
                    message: format!("{word:?} could be a method or a workspace"),
                    hint: Some(format!("write {method}, or the id of the workspace")),
                });
            }
            words.push(word);
            None
        }
        Some(word) => return Err(Error::usage(format!("{word:?} is not an HTTP method such as GET or POST"))),
        None => None,
    };
    let data = given.value("--data");
    let default = if data.is_some() { "POST" } else { "GET" };
    let data = data.map(|data| match data.as_encoded_bytes() {
        b"@-" => Data::Stdin,
        [b'@', ..] => Data::File(after(&data, b'@').into()),
        _ => Data::Text(data),
    });
    Ok(Command::Api(Api {
        selector: words.pop(),
        method: method.unwrap_or_else(|| option.unwrap_or(default).to_owned()),
        path,
        data,
        headers: {
            let typed = given.typed("--header");
            given.values("--header").into_iter().map(|value| header(typed, value)).collect::<Result<_>>()?
        },
        include: given.has("--include"),
    }))
}

/// A header from the `NAME:VALUE` of an option.
fn header(option: &str, header: OsString) -> Result<(String, String)> {
    let header = text(option, header)?;
    let is_name = |name: &str| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.!#$%&'*+^`|~".contains(&b))
    };
    match header.split_once(':') {
        Some((name, _)) if OWN_HEADERS.iter().any(|own| name.eq_ignore_ascii_case(own)) => {
            Err(Error::usage(format!("{option}: openwork sets {name} itself")))
        }
        Some((name, value)) if is_name(name) && !value.contains(char::is_control) => {
            Ok((name.to_owned(), value.trim().to_owned()))
        }
        _ => Err(Error::usage(format!("{option}: {header:?} is not NAME:VALUE"))),
    }
}
