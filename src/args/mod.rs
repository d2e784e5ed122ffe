//! The command line: tables of commands and options, and the parser from argv and environment to a
//! [`Command`], which is plain data. The parser has no side effects. Help, completion, the manual and the tests
//! for completeness read the same tables.
//!
//! ```text
//! commands   the table of commands, each row with the function that makes its `Command`
//! options    the table of options
//! examples   two of them for the help of each command
//! parser     argv to words and options
//! suggest    hints for unknown words; habits: the words of other programs
//! values     text to ports, durations, origins, …
//! ```

mod commands;
pub mod examples;
mod given;
mod habits;
mod options;
mod parser;
mod suggest;
mod values;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

pub use self::commands::{ALIASES, COMMANDS, CommandRow, METHODS, OMISSIBLE, canonical, find_command};
use self::given::Given;
pub use self::options::{OPTIONS, OptionRow};
use crate::error::{Error, Result};
use crate::options::Options;
use crate::wire::AddRemote;

/// How long a command may take without `--timeout`.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for commands that wait for the start or the stop of opencode, each of which can take half a
/// minute.
const DEFAULT_DAEMON_TIMEOUT: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Debug)]
#[allow(missing_docs)] // the names are those of the table
pub enum Command {
    Help { topic: Option<String> },
    Version,
    DaemonRun,
    DaemonStart,
    DaemonStop { keep_opencode: bool, all: bool, force: bool, when_idle: bool },
    DaemonRestart { all: bool, when_idle: bool },
    Status,
    Doctor,
    WorkspaceAdd { paths: Vec<PathBuf>, name: Option<String>, force: bool },
    WorkspaceAddRemote(AddRemote),
    WorkspaceList { quiet: bool, names: bool },
    WorkspaceSwitch { selector: Option<OsString> },
    WorkspaceCurrent { quiet: bool },
    WorkspaceInfo { selector: Option<OsString> },
    WorkspacePath { selector: Option<OsString> },
    WorkspaceRemove { selectors: Vec<OsString> },
    WorkspaceRemoveMissing,
    WorkspaceRename { selector: OsString, name: String },
    WorkspaceMove { selector: OsString, path: PathBuf },
    WorkspaceImport { file: PathBuf },
    Api(Api),
    Attach { selector: Option<OsString>, args: Vec<OsString> },
    Run { selector: Option<OsString>, args: Vec<OsString> },
    SessionList { selector: Option<OsString>, all: bool, quiet: bool },
    SessionAbort { id: String },
    Wait { selector: Option<OsString>, all: bool },
    Env { selector: Option<OsString>, shell: Shell },
    EnvUnset { shell: Shell },
    Open { directory: PathBuf },
    Prompt,
    Events { since: Option<u64> },
    InstanceList,
    InstanceDispose { selector: Option<OsString>, force: bool },
    InstanceReset { selector: Option<OsString> },
    Logs { log: Log, follow: bool, lines: Option<usize> },
    StateRepair,
    Completions { shell: CompletedShell },
    Man,
    ServicePrint { program: Option<PathBuf>, is_socket: bool },
}

/// The workspace of a command.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    /// Named on the command line.
    Named(&'a OsStr),
    /// Not named: the workspace of the environment or of the working directory, or the active one.
    Default,
}

impl Command {
    /// The workspace that the command uses, for messages about its failures; `None` for a command that uses
    /// none, or removes workspaces.
    pub fn workspace(&self) -> Option<Wanted<'_>> {
        let selector = match self {
            // Without a selector, the command asks for one.
            Command::WorkspaceSwitch { selector } => Some(selector.as_ref()?),
            Command::WorkspaceRename { selector, .. } | Command::WorkspaceMove { selector, .. } => Some(selector),
            Command::WorkspaceInfo { selector }
            | Command::WorkspacePath { selector }
            | Command::Attach { selector, .. }
            | Command::Run { selector, .. }
            | Command::Env { selector, .. }
            | Command::InstanceDispose { selector, .. }
            | Command::InstanceReset { selector } => selector.as_ref(),
            Command::SessionList { selector, all, .. } | Command::Wait { selector, all } => {
                if *all {
                    return None;
                }
                selector.as_ref()
            }
            Command::Api(api) => api.selector.as_ref(),
            _ => return None,
        };
        Some(selector.map_or(Wanted::Default, |selector| Wanted::Named(selector)))
    }
}

/// An OpenCode call.
#[derive(Debug)]
pub struct Api {
    /// The workspace to call it in.
    pub selector: Option<OsString>,
    /// In upper case.
    pub method: String,
    /// With the query, as given.
    pub path: String,
    /// The body.
    pub data: Option<Data>,
    /// Name and value.
    pub headers: Vec<(String, String)>,
    /// Whether to print the head of the reply too.
    pub include: bool,
}

/// The body of a call.
#[derive(Debug)]
pub enum Data {
    /// The text itself.
    Text(OsString),
    /// The content of a file.
    File(PathBuf),
    /// Standard input.
    Stdin,
}

/// The shell that `env` writes for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shell {
    /// sh, bash, zsh and their kind.
    Sh,
    /// fish.
    Fish,
}

/// A shell with completion of command lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // their names
pub enum CompletedShell {
    Bash,
    Zsh,
    Fish,
}

/// A log file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// The output of opencode.
    Opencode,
    /// The output of the daemon.
    Daemon,
}

/// A command, and the options that every command has.
#[derive(Debug)]
pub struct Invocation {
    /// What to do.
    pub command: Command,
    /// Its name in the table of commands.
    pub name: &'static str,
    /// `--data-dir`, else `OPENWORK_DATA_DIR`.
    pub data_dir: Option<PathBuf>,
    /// `XDG_DATA_HOME`.
    pub xdg_data_home: Option<PathBuf>,
    /// Whether the command may start a daemon.
    pub autostart: bool,
    /// Whether to print JSON.
    pub json: bool,
    /// For the whole command.
    pub timeout: Duration,
    /// Whether `timeout` was given; else it is the default.
    pub timeout_given: bool,
    /// The options of a daemon that this command starts.
    pub daemon: Options,
    /// A warning about the command line, which is carried out nevertheless.
    pub warning: Option<&'static str>,
}

/// Whether to print JSON, even if the rest of the command line has a mistake.
pub fn wants_json(argv: &[OsString]) -> bool {
    argv.iter().take_while(|arg| *arg != "--").any(|arg| arg == "--json")
}

/// Parses a command line.
///
/// # Errors
/// `usage`, with the nearest known word.
pub fn parse(argv: &[OsString], env: impl Fn(&str) -> Option<OsString>) -> Result<Invocation> {
    let env = |name: &str| env(name).filter(|value| !value.is_empty());
    let parsed = parser::parse(argv, &env)?;
    let given = &parsed.given;
    if given.value("--data-dir").is_some_and(|value| value.is_empty()) {
        return Err(Error::usage("--data-dir needs a value (DIR)"));
    }
    let timeout = given.value("--timeout").map(|text| values::seconds(&text)).transpose()?;
    let mut invocation = Invocation {
        command: Command::Version,
        name: "version",
        data_dir: given.value("--data-dir").map(PathBuf::from),
        xdg_data_home: env("XDG_DATA_HOME").map(PathBuf::from),
        autostart: false,
        timeout: timeout.unwrap_or(DEFAULT_TIMEOUT),
        timeout_given: timeout.is_some(),
        json: given.has("--json"),
        daemon: Options::default(),
        warning: None,
    };
    if given.has("--version") {
        return Ok(invocation);
    }
    let row = match parsed.row {
        Some(row) if !given.has("--help") => row,
        _ => {
            invocation.command = Command::Help { topic: parsed.topic() };
            return Ok(invocation);
        }
    };
    check_options(row, given)?;
    check_count(row, given)?;
    // An environment with mistakes harms only a command that can start a daemon.
    if row.takes_daemon_options() {
        invocation.daemon = given.daemon_options()?;
        let any = given.values("--cors").iter().any(|origin| origin == values::ANY_ORIGIN);
        invocation.warning =
            any.then_some("--cors '*' is ignored: every web page could call the daemon; name the origins");
    }
    if row.name.starts_with("daemon ") {
        invocation.timeout = timeout.unwrap_or(DEFAULT_DAEMON_TIMEOUT);
    }
    invocation.autostart = row.autostart && !given.has("--no-autostart");
    invocation.name = row.name;
    let mut given = parsed.given;
    invocation.command = (row.make)(&mut given)?;
    Ok(invocation)
}

/// Refuses options of other commands.
fn check_options(row: &CommandRow, given: &Given<'_>) -> Result<()> {
    match given.options().find(|option| !option.is_for(row.name)) {
        None => Ok(()),
        Some(option) => Err(suggest::foreign_option(option, given.typed(option.name), row)),
    }
}

/// Refuses too many and too few arguments.
fn check_count(row: &CommandRow, given: &Given<'_>) -> Result<()> {
    let (least, most) = row.count;
    let message = match given.words.get(most) {
        Some(word) => format!("unexpected argument: {}", values::shown(word)),
        None if given.words.len() < least => format!("`{}` needs more arguments", row.name),
        None => return Ok(()),
    };
    Err(Error::Usage { message, hint: Some(format!("openwork {} {}", row.name, row.args).trim_end().to_owned()) })
}
