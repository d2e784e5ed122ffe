//! The command line: tables of commands and options, and from argv and environment to a
//! [`Command`], which is plain data. Nothing is touched here; help, suggestions and the tests
//! that look for gaps read the same tables.
//!
//! The tokens are read here and not by a library, since none of the small ones tells
//! `--name --x` (a forgotten value, refused) from `--name=--x` (meant).

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::options::{DEFAULT_IDLE_TTL, EngineOptions, Options};
use crate::wire::TIMEOUT_HEADER;

/// A row of the table of commands.
#[derive(Debug)]
pub struct CommandRow {
    /// One or two words.
    pub name: &'static str,
    /// Its arguments, for people: `<needed>`, `[left out]`.
    pub args: &'static str,
    /// How many arguments it takes.
    pub count: (usize, usize),
    /// What it does, in one line.
    pub summary: &'static str,
    /// Whether it starts a daemon when none runs.
    pub autostart: bool,
    kind: CommandKind,
}

/// Which command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CommandKind {
    DaemonRun,
    DaemonStart,
    DaemonStop,
    DaemonRestart,
    Status,
    WorkspaceAdd,
    WorkspaceAddRemote,
    WorkspaceList,
    WorkspaceSwitch,
    WorkspaceCurrent,
    WorkspaceInfo,
    WorkspacePath,
    WorkspaceRemove,
    WorkspaceRename,
    WorkspaceImport,
    Api,
    Attach,
    Run,
    Env,
    Events,
    InstanceList,
    InstanceDispose,
    Logs,
    StateRepair,
    Completions,
    Man,
    ServicePrint,
    Help,
}

const fn row(
    kind: CommandKind,
    name: &'static str,
    args: &'static str,
    count: (usize, usize),
    autostart: bool,
    summary: &'static str,
) -> CommandRow {
    CommandRow { name, args, count, summary, autostart, kind }
}

/// Every command, in the order of the help.
#[rustfmt::skip]
pub const COMMANDS: &[CommandRow] = &[
    row(CommandKind::Status, "status", "", (0, 0), false, "Show how the daemon and opencode are"),
    row(CommandKind::DaemonRun, "daemon", "", (0, 0), false, "Run the daemon in the foreground"),
    row(CommandKind::DaemonRun, "daemon run", "", (0, 0), false, "The same"),
    row(CommandKind::DaemonStart, "daemon start", "", (0, 0), true, "Start the daemon in the background and wait until opencode is ready"),
    row(CommandKind::DaemonStop, "daemon stop", "", (0, 0), false, "Stop the daemon and opencode"),
    row(CommandKind::DaemonRestart, "daemon restart", "", (0, 0), true, "Start the daemon anew; opencode goes on"),
    row(CommandKind::Status, "daemon status", "", (0, 0), false, "The same as status"),
    row(CommandKind::WorkspaceAdd, "workspace add", "<path>", (1, 1), true, "Add a directory"),
    row(CommandKind::WorkspaceAddRemote, "workspace add-remote", "<base-url>", (1, 1), true, "Add an OpenCode server elsewhere"),
    row(CommandKind::WorkspaceList, "workspace list", "", (0, 0), false, "List the workspaces; * marks the active one"),
    row(CommandKind::WorkspaceSwitch, "workspace switch", "<ws>", (1, 1), true, "Make a workspace the active one"),
    row(CommandKind::WorkspaceCurrent, "workspace current", "", (0, 0), false, "Show the active workspace"),
    row(CommandKind::WorkspaceInfo, "workspace info", "[<ws>]", (0, 1), false, "Show a workspace"),
    row(CommandKind::WorkspacePath, "workspace path", "[<ws>]", (0, 1), true, "Ask OpenCode for the directory of a workspace (warms its instance)"),
    row(CommandKind::WorkspaceRemove, "workspace remove", "<ws>", (1, 1), true, "Take a workspace out of the registry; its files stay"),
    row(CommandKind::WorkspaceRename, "workspace rename", "<ws> <name>", (2, 2), true, "Give a workspace another name"),
    row(CommandKind::WorkspaceImport, "workspace import", "<file>", (1, 1), true, "Add the workspaces of another orchestrator's state file, or of OpenWork desktop's"),
    row(CommandKind::Api, "api", "[<ws>] [METHOD] <path>", (1, 3), true, "Make any OpenCode call in a workspace; prints the body as it comes"),
    row(CommandKind::Attach, "attach", "[<ws>] [-- ARGS]", (0, 1), true, "Open OpenCode's terminal interface in a workspace"),
    row(CommandKind::Run, "run", "[<ws>] -- ARGS", (0, 1), true, "Run `opencode run` in a workspace, against the warm server"),
    row(CommandKind::Env, "env", "[<ws>]", (0, 1), true, "Print what other OpenCode clients need, for eval"),
    row(CommandKind::Events, "events", "", (0, 0), true, "Print what happens, one JSON object a line"),
    row(CommandKind::InstanceList, "instance list", "", (0, 0), true, "List the instances of the local workspaces: busy, warm or cold"),
    row(CommandKind::InstanceDispose, "instance dispose", "[<ws>]", (0, 1), true, "Have OpenCode dispose the instance of a workspace"),
    row(CommandKind::Logs, "logs", "[opencode|daemon]", (0, 1), false, "Print a log (opencode's, if not said)"),
    row(CommandKind::StateRepair, "state repair", "", (0, 0), false, "Save what can be read of a broken state file; the original is kept"),
    row(CommandKind::Completions, "completions", "bash|zsh|fish", (1, 1), false, "Print what completes command lines in a shell"),
    row(CommandKind::Man, "man", "", (0, 0), false, "Print the manual page"),
    row(CommandKind::ServicePrint, "service print", "", (0, 0), false, "Print a unit with which systemd runs the daemon, with these options"),
    row(CommandKind::Help, "help", "[<command>]", (0, 2), false, "Show help"),
];

/// Words that are short for another; for any word of a command.
pub const ALIASES: &[(&str, &str)] = &[("ws", "workspace"), ("ls", "list"), ("rm", "remove")];

/// A row of the table of options.
#[derive(Debug)]
pub struct OptionRow {
    /// With its dashes.
    pub name: &'static str,
    /// One letter, with its dash.
    pub short: Option<&'static str>,
    /// What its value is called; none when it takes none.
    pub value: Option<&'static str>,
    /// The environment variable that says the same.
    pub env: Option<&'static str>,
    /// The commands that take it; none named means all.
    pub commands: &'static [&'static str],
    /// What it does, in one line.
    pub help: &'static str,
}

const RUNS_DAEMON: &[&str] = &["daemon", "daemon run", "daemon start", "daemon restart", "service print"];

#[rustfmt::skip]
/// Every option, in the order of the help.
pub const OPTIONS: &[OptionRow] = &[
    OptionRow { name: "--json", short: None, value: None, env: None, commands: &[], help: "Print the result, or the error, as one JSON object" },
    OptionRow { name: "--data-dir", short: None, value: Some("DIR"), env: Some("OPENWORK_DATA_DIR"), commands: &[], help: "Where everything is kept" },
    OptionRow { name: "--no-autostart", short: None, value: None, env: None, commands: &[], help: "Fail rather than start the daemon" },
    OptionRow { name: "--timeout", short: None, value: Some("SECONDS"), env: None, commands: &[], help: "For the whole command (30; to start and stop 60; none for api, events and logs -f)" },
    OptionRow { name: "--help", short: Some("-h"), value: None, env: None, commands: &[], help: "Show help" },
    OptionRow { name: "--version", short: Some("-V"), value: None, env: None, commands: &[], help: "Show the version" },
    OptionRow { name: "--name", short: None, value: Some("NAME"), env: None, commands: &["workspace add", "workspace add-remote"], help: "Call it so (else after the directory or host)" },
    OptionRow { name: "--directory", short: None, value: Some("DIR"), env: None, commands: &["workspace add-remote"], help: "The directory there" },
    OptionRow { name: "--quiet", short: Some("-q"), value: None, env: None, commands: &["workspace list", "workspace current"], help: "Print ids only" },
    OptionRow { name: "--force", short: None, value: None, env: None, commands: &["instance dispose"], help: "Even when a session is running" },
    OptionRow { name: "--data", short: Some("-d"), value: Some("BODY"), env: None, commands: &["api"], help: "The body: text, @file, or @- for standard input" },
    OptionRow { name: "--header", short: Some("-H"), value: Some("NAME:VALUE"), env: None, commands: &["api"], help: "A header; can be given several times" },
    OptionRow { name: "--include", short: Some("-i"), value: None, env: None, commands: &["api"], help: "Print the head of the reply too" },
    OptionRow { name: "--shell", short: None, value: Some("SHELL"), env: None, commands: &["env"], help: "For sh (also bash, zsh) or fish" },
    OptionRow { name: "--follow", short: Some("-f"), value: None, env: None, commands: &["logs"], help: "Go on printing what is added" },
    OptionRow { name: "--lines", short: Some("-n"), value: Some("N"), env: None, commands: &["logs"], help: "Only the last N lines" },
    OptionRow { name: "--keep-opencode", short: None, value: None, env: None, commands: &["daemon stop"], help: "Leave opencode running, for the next daemon to take over" },
    OptionRow { name: "--all", short: None, value: None, env: None, commands: &["daemon restart"], help: "Start opencode anew too" },
    OptionRow { name: "--daemon-port", short: None, value: Some("PORT"), env: Some("OPENWORK_DAEMON_PORT"), commands: RUNS_DAEMON, help: "Listen there (else on the port used last, 6174, or any)" },
    OptionRow { name: "--opencode-bin", short: None, value: Some("FILE"), env: Some("OPENWORK_OPENCODE_BIN"), commands: RUNS_DAEMON, help: "The opencode to start (else from PATH, or ~/.opencode/bin)" },
    OptionRow { name: "--opencode-port", short: None, value: Some("PORT"), env: Some("OPENWORK_OPENCODE_PORT"), commands: RUNS_DAEMON, help: "Have opencode listen there (else on the port used last, 6175, or any)" },
    OptionRow { name: "--idle-ttl", short: None, value: Some("DURATION"), env: Some("OPENWORK_IDLE_TTL"), commands: RUNS_DAEMON, help: "Dispose instances unused for so long: 90s, 30m (if not said), 2h; 0 is never" },
    OptionRow { name: "--cors", short: None, value: Some("ORIGIN"), env: None, commands: RUNS_DAEMON, help: "A web page that may ask; can be given several times" },
    OptionRow { name: "--daemon-host", short: None, value: Some("HOST"), env: None, commands: RUNS_DAEMON, help: "Only 127.0.0.1 or localhost" },
    OptionRow { name: "--opencode-host", short: None, value: Some("ADDRESS"), env: None, commands: RUNS_DAEMON, help: "Have opencode listen on this address of 127.0.0.0/8" },
];

impl OptionRow {
    /// Whether a command takes it.
    pub fn is_for(&self, command: &str) -> bool {
        self.commands.is_empty() || self.commands.contains(&command)
    }
}

impl CommandRow {
    /// The options of this command beside those that stand everywhere.
    pub fn options(&self) -> impl Iterator<Item = &'static OptionRow> {
        let name = self.name;
        OPTIONS.iter().filter(move |option| !option.commands.is_empty() && option.is_for(name))
    }
}

/// What is to be done.
#[derive(Debug)]
#[allow(missing_docs)] // the names are those of the table
pub enum Command {
    Help { topic: Option<String> },
    Version,
    DaemonRun,
    DaemonStart,
    DaemonStop { keep_opencode: bool },
    DaemonRestart { all: bool },
    Status,
    WorkspaceAdd { path: PathBuf, name: Option<String> },
    WorkspaceAddRemote { base_url: String, directory: Option<String>, name: Option<String> },
    WorkspaceList { quiet: bool },
    WorkspaceSwitch { selector: OsString },
    WorkspaceCurrent { quiet: bool },
    WorkspaceInfo { selector: Option<OsString> },
    WorkspacePath { selector: Option<OsString> },
    WorkspaceRemove { selector: OsString },
    WorkspaceRename { selector: OsString, name: String },
    WorkspaceImport { file: PathBuf },
    Api(Api),
    Attach { selector: Option<OsString>, args: Vec<OsString> },
    Run { selector: Option<OsString>, args: Vec<OsString> },
    Env { selector: Option<OsString>, shell: Shell },
    Events,
    InstanceList,
    InstanceDispose { selector: Option<OsString>, force: bool },
    Logs { log: Log, follow: bool, lines: Option<usize> },
    StateRepair,
    Completions { shell: CompletedShell },
    Man,
    ServicePrint,
}

/// A call of OpenCode's.
#[derive(Debug)]
pub struct Api {
    /// In which workspace.
    pub selector: Option<OsString>,
    /// Upper case.
    pub method: String,
    /// With its query, as spelled.
    pub path: String,
    /// What is sent.
    pub data: Option<Data>,
    /// Name and value.
    pub headers: Vec<(String, String)>,
    /// The head of the reply is printed too.
    pub include: bool,
}

/// The body of a call.
#[derive(Debug)]
pub enum Data {
    /// As given.
    Text(OsString),
    /// What is in a file.
    File(PathBuf),
    /// What comes on standard input.
    Stdin,
}

/// For which shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shell {
    /// sh, bash, zsh and their kind.
    Sh,
    /// fish.
    Fish,
}

/// A shell that command lines are completed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // their names
pub enum CompletedShell {
    Bash,
    Zsh,
    Fish,
}

/// Which log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// What opencode says.
    Opencode,
    /// What the daemon says.
    Daemon,
}

/// What stands with every command.
#[derive(Debug)]
pub struct Invocation {
    /// What is to be done.
    pub command: Command,
    /// The option, else `OPENWORK_DATA_DIR`.
    pub data_dir: Option<PathBuf>,
    /// `XDG_DATA_HOME`.
    pub xdg_data_home: Option<PathBuf>,
    /// A daemon may be started.
    pub autostart: bool,
    /// For the whole command.
    pub timeout: Duration,
    /// It was asked for, and is not only the default.
    pub timeout_given: bool,
    /// What a daemon that has to be started is told.
    pub daemon: Options,
}

/// Whether the result is wanted as JSON, even if the rest cannot be understood.
pub fn wants_json(argv: &[OsString]) -> bool {
    argv.iter().take_while(|arg| *arg != "--").any(|arg| arg == "--json")
}

/// Understands a command line.
///
/// # Errors
/// `usage`, with the nearest known word.
pub fn parse(argv: &[OsString], env: impl Fn(&str) -> Option<OsString>) -> Result<Invocation> {
    let Tokens { given, mut words, mut trailing } = tokens(argv)?;
    let has = |name: &str| given.iter().any(|(row, _)| row.name == name);
    // Where arguments are for opencode, they are behind `--`; elsewhere those are like others.
    let passes_on =
        matches!(find_command(&words), Ok((Some(CommandRow { kind: CommandKind::Attach | CommandKind::Run, .. }), _)));
    if !passes_on {
        words.append(&mut trailing);
    }
    let (row, args) = find_command(&words)?;
    let env = |name: &str| env(name).filter(|value| !value.is_empty());
    let value = |name: &str| {
        let option = given.iter().rev().find(|(row, _)| row.name == name).and_then(|(_, value)| value.clone());
        option.or_else(|| env(OPTIONS.iter().find(|row| row.name == name)?.env?))
    };
    let timeout = value("--timeout").map(|text| seconds(&text)).transpose()?;
    if value("--data-dir").is_some_and(|value| value.is_empty()) {
        return Err(Error::usage("--data-dir needs a value (DIR)"));
    }
    let invocation = |command, autostart, patience, daemon| Invocation {
        command,
        data_dir: value("--data-dir").map(PathBuf::from),
        xdg_data_home: env("XDG_DATA_HOME").map(PathBuf::from),
        autostart: autostart && !has("--no-autostart"),
        timeout: timeout.unwrap_or(Duration::from_secs(patience)),
        timeout_given: timeout.is_some(),
        daemon,
    };
    if has("--version") {
        return Ok(invocation(Command::Version, false, 30, Options::default()));
    }
    let row = match row {
        Some(row) if !has("--help") => row,
        _ => {
            let topic = row.map(|row| row.name.to_owned()).or_else(|| group_of(&words));
            return Ok(invocation(Command::Help { topic }, false, 30, Options::default()));
        }
    };
    for (option, _) in &given {
        if !option.is_for(row.name) {
            return Err(Error::Usage {
                message: format!("{} is not for `{}`", option.name, row.name),
                hint: Some(format!("`openwork help {}` shows what is", row.name)),
            });
        }
    }
    let (least, most) = row.count;
    if args.len() < least || args.len() > most {
        let what = match args.len() < least {
            true => "needs more arguments",
            false if row.args.ends_with("-- ARGS") => "takes what is for opencode behind `--`",
            false => "takes fewer arguments",
        };
        return Err(Error::Usage {
            message: format!("`{}` {what}", row.name),
            hint: Some(format!("openwork {} {}", row.name, row.args).trim_end().to_owned()),
        });
    }
    let origins = given.iter().filter(|(row, _)| row.name == "--cors").filter_map(|(_, value)| value.clone());
    // Without a daemon to be started, nobody's environment has to be right.
    let options = match row.autostart || matches!(row.kind, CommandKind::DaemonRun | CommandKind::ServicePrint) {
        true => daemon_options(&value, origins.collect())?,
        false => Options::default(),
    };
    let count = args.len();
    let mut args = args.into_iter();
    let mut next = || args.next().cloned().unwrap_or_default();
    let optional = args_or_none(row, &words);
    let patience = if row.name.starts_with("daemon ") { 60 } else { 30 };
    let command = match row.kind {
        CommandKind::Help => Command::Help { topic: help_topic(&words)? },
        CommandKind::Status => Command::Status,
        CommandKind::DaemonRun => Command::DaemonRun,
        CommandKind::DaemonStart => Command::DaemonStart,
        CommandKind::DaemonStop => Command::DaemonStop { keep_opencode: has("--keep-opencode") },
        CommandKind::DaemonRestart => Command::DaemonRestart { all: has("--all") },
        CommandKind::WorkspaceAdd => Command::WorkspaceAdd { path: next().into(), name: name(value("--name"))? },
        CommandKind::WorkspaceAddRemote => Command::WorkspaceAddRemote {
            base_url: next()
                .into_string()
                .map_err(|url| Error::InvalidUrl { url: url.to_string_lossy().into_owned(), why: "it is not UTF-8" })?,
            directory: value("--directory").map(|directory| text("--directory", directory)).transpose()?,
            name: name(value("--name"))?,
        },
        CommandKind::WorkspaceList => Command::WorkspaceList { quiet: has("--quiet") },
        CommandKind::WorkspaceCurrent => Command::WorkspaceCurrent { quiet: has("--quiet") },
        CommandKind::WorkspaceSwitch => Command::WorkspaceSwitch { selector: next() },
        CommandKind::WorkspaceInfo => Command::WorkspaceInfo { selector: optional },
        CommandKind::WorkspacePath => Command::WorkspacePath { selector: optional },
        CommandKind::WorkspaceRemove => Command::WorkspaceRemove { selector: next() },
        CommandKind::WorkspaceRename => {
            let selector = next();
            Command::WorkspaceRename { selector, name: name(Some(next()))?.unwrap_or_default() }
        }
        CommandKind::WorkspaceImport => Command::WorkspaceImport { file: next().into() },
        CommandKind::Api => {
            let headers = given.iter().filter(|(row, _)| row.name == "--header").filter_map(|(_, value)| value.clone());
            let words: Vec<OsString> = std::iter::repeat_with(&mut next).take(count).collect();
            Command::Api(api(words, value("--data"), headers.collect(), has("--include"))?)
        }
        CommandKind::Attach => Command::Attach { selector: optional, args: trailing.into_iter().cloned().collect() },
        CommandKind::Run => Command::Run { selector: optional, args: trailing.into_iter().cloned().collect() },
        CommandKind::Env => Command::Env {
            selector: optional,
            shell: match value("--shell").as_ref().map(|shell| shell.to_string_lossy()).as_deref() {
                None | Some("sh" | "bash" | "zsh" | "dash" | "ksh") => Shell::Sh,
                Some("fish") => Shell::Fish,
                Some(other) => return Err(not_one_of("shell", other, "sh (also for bash and zsh) or fish")),
            },
        },
        CommandKind::Events => Command::Events,
        CommandKind::InstanceList => Command::InstanceList,
        CommandKind::InstanceDispose => Command::InstanceDispose { selector: optional, force: has("--force") },
        CommandKind::StateRepair => Command::StateRepair,
        CommandKind::Completions => Command::Completions {
            shell: match &*shown(&next()) {
                "bash" => CompletedShell::Bash,
                "zsh" => CompletedShell::Zsh,
                "fish" => CompletedShell::Fish,
                other => return Err(not_one_of("shell", other, "bash, zsh or fish")),
            },
        },
        CommandKind::Man => Command::Man,
        CommandKind::ServicePrint => Command::ServicePrint,
        CommandKind::Logs => Command::Logs {
            log: match optional.as_ref().map(|log| log.to_string_lossy()).as_deref() {
                None | Some("opencode") => Log::Opencode,
                Some("daemon") => Log::Daemon,
                Some(other) => return Err(not_one_of("log", other, "opencode or daemon")),
            },
            follow: has("--follow"),
            lines: value("--lines").map(|lines| number("--lines", &lines)).transpose()?,
        },
    };
    Ok(invocation(command, row.autostart, patience, options))
}

/// The methods there are: any other word is a workspace.
pub const METHODS: [&str; 7] = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"];

/// Headers that a call has already.
const OWN_HEADERS: [&str; 6] =
    ["Host", "Connection", "Authorization", "Content-Length", "Transfer-Encoding", TIMEOUT_HEADER];

/// The arguments of `api`: the path is the last, before it the method and the workspace.
fn api(mut words: Vec<OsString>, data: Option<OsString>, headers: Vec<OsString>, include: bool) -> Result<Api> {
    let path = text("<path>", words.pop().unwrap_or_default())?;
    if !path.starts_with('/') || !path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Error::Usage {
            message: format!("{path:?} is not a path of OpenCode's: it starts with / and is percent-encoded"),
            hint: Some("openwork api [<ws>] [METHOD] <path>".to_owned()),
        });
    }
    let is_method = |word: &OsString| METHODS.iter().any(|method| word == method);
    let method = match words.pop() {
        Some(word) if is_method(&word) => Some(text("METHOD", word)?),
        Some(word) if words.is_empty() => {
            if let Some(method) = METHODS.iter().find(|method| word.eq_ignore_ascii_case(method)) {
                return Err(Error::Usage {
                    message: format!("{word:?} is neither a method nor clearly a workspace"),
                    hint: Some(format!("{method}, or the id of the workspace")),
                });
            }
            words.push(word);
            None
        }
        Some(word) => return Err(Error::usage(format!("{word:?} is not a method, like GET or POST"))),
        None => None,
    };
    let default = if data.is_some() { "POST" } else { "GET" };
    let data = data.map(|data| match data.as_encoded_bytes() {
        b"@-" => Data::Stdin,
        [b'@', ..] => Data::File(after(&data, b'@').into()),
        _ => Data::Text(data),
    });
    let header = |header: OsString| {
        let header = text("--header", header)?;
        let is_name = |name: &str| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.!#$%&'*+^`|~".contains(&b))
        };
        match header.split_once(':') {
            Some((name, _)) if OWN_HEADERS.iter().any(|own| name.eq_ignore_ascii_case(own)) => {
                Err(Error::usage(format!("--header: {name} is set by openwork itself")))
            }
            Some((name, value)) if is_name(name) && !value.contains(char::is_control) => {
                Ok((name.to_owned(), value.trim().to_owned()))
            }
            _ => Err(Error::usage(format!("--header: {header:?} is not NAME:VALUE"))),
        }
    };
    Ok(Api {
        selector: words.pop(),
        method: method.unwrap_or_else(|| default.to_owned()),
        path,
        data,
        headers: headers.into_iter().map(header).collect::<Result<_>>()?,
        include,
    })
}

/// Options with their values, and the other words, in their order.
struct Tokens<'a> {
    given: Vec<(&'static OptionRow, Option<OsString>)>,
    words: Vec<&'a OsString>,
    /// The words behind `--`.
    trailing: Vec<&'a OsString>,
}

fn tokens(argv: &[OsString]) -> Result<Tokens<'_>> {
    let mut tokens = Tokens { given: Vec::new(), words: Vec::new(), trailing: Vec::new() };
    let mut rest = argv.iter();
    while let Some(arg) = rest.next() {
        let bytes = arg.as_encoded_bytes();
        if bytes == b"--" {
            tokens.trailing.extend(rest);
            break;
        }
        if !bytes.starts_with(b"-") || bytes == b"-" {
            tokens.words.push(arg);
            continue;
        }
        let lossy = arg.to_string_lossy();
        let (name, mut attached) = match lossy.split_once('=') {
            Some((name, _)) if name.starts_with("--") => (name, Some(after(arg, b'='))),
            _ => (&*lossy, None),
        };
        let find = |name: &str| OPTIONS.iter().find(|row| row.name == name || row.short == Some(name));
        let mut row = find(name);
        // Short ones together, the last perhaps with its value: `-fn5`.
        if row.is_none() && !bytes.starts_with(b"--") {
            for (at, letter) in bytes.iter().enumerate().skip(1) {
                let behind = &bytes[at + 1..];
                row = find(&format!("-{}", char::from(*letter)));
                match row {
                    Some(short) if short.value.is_none() && !behind.is_empty() => tokens.given.push((short, None)),
                    _ => {
                        attached = Some(OsString::from_vec(behind.to_vec())).filter(|value| !value.is_empty());
                        break;
                    }
                }
            }
        }
        let row = row.ok_or_else(|| unknown("option", name, OPTIONS.iter().map(|row| row.name)))?;
        let value = match (row.value, attached) {
            (None, None) => None,
            (None, Some(_)) => return Err(Error::usage(format!("{} takes no value", row.name))),
            (Some(_), Some(value)) => Some(value),
            (Some(what), None) => match rest.next() {
                Some(value) if !value.as_encoded_bytes().starts_with(b"--") => Some(value.clone()),
                Some(value) => {
                    return Err(Error::Usage {
                        message: format!("{} needs a value ({what}), not {}", row.name, shown(value)),
                        hint: Some(format!("{}={} if it is meant", row.name, shown(value))),
                    });
                }
                None => return Err(Error::usage(format!("{} needs a value ({what})", row.name))),
            },
        };
        tokens.given.push((row, value));
    }
    Ok(tokens)
}

/// What stands after the first such byte, whatever that is.
fn after(arg: &OsStr, byte: u8) -> OsString {
    let bytes = arg.as_bytes();
    let at = bytes.iter().position(|given| *given == byte).map_or(bytes.len(), |at| at + 1);
    OsString::from_vec(bytes[at..].to_vec())
}

/// A word without its alias.
pub fn canonical(word: &OsStr) -> &str {
    let word = word.to_str().unwrap_or_default();
    ALIASES.iter().find(|(short, _)| *short == word).map_or(word, |(_, long)| long)
}

/// The row of a command, and its arguments. No row: nothing, or only the first word of several
/// commands, was given.
///
/// # Errors
/// `usage`, with the nearest known word.
pub fn find_command<'w>(words: &[&'w OsString]) -> Result<(Option<&'static CommandRow>, Vec<&'w OsString>)> {
    let Some(first) = words.first() else { return Ok((None, Vec::new())) };
    let first = canonical(first);
    let second = words.get(1).map(|word| canonical(word));
    let named = |name: &str| COMMANDS.iter().find(|row| row.name == name);
    if let Some(row) = second.and_then(|second| named(&format!("{first} {second}"))) {
        return Ok((Some(row), words[2..].to_vec()));
    }
    let is_group = COMMANDS.iter().any(|row| row.name.split_once(' ').is_some_and(|(group, _)| group == first));
    match (named(first), is_group, words.get(1)) {
        (Some(row), false, _) | (Some(row), true, None) => Ok((Some(row), words[1..].to_vec())),
        (None, true, None) => Ok((None, Vec::new())),
        (_, true, Some(second)) => {
            let given = format!("{first} {}", second.to_string_lossy());
            Err(unknown("command", &given, COMMANDS.iter().map(|row| row.name).filter(|name| name.starts_with(first))))
        }
        (None, false, _) => {
            let given = words[0].to_string_lossy();
            // The second word of a command alone: `ls`, `add`.
            let is_meant = |row: &&CommandRow| row.name.split_once(' ').is_some_and(|(_, second)| second == first);
            if let Some(row) = COMMANDS.iter().find(is_meant) {
                return Err(Error::Usage {
                    message: format!("unknown command `{given}`"),
                    hint: Some(format!("did you mean `{}`?", row.name)),
                });
            }
            let names = COMMANDS.iter().flat_map(|row| [row.name, row.name.split(' ').next().unwrap_or_default()]);
            Err(unknown("command", &given, names))
        }
    }
}

/// The first word, when it is that of several commands.
fn group_of(words: &[&OsString]) -> Option<String> {
    words.first().map(|word| canonical(word).to_owned())
}

/// The command, or first word of commands, that help is asked for.
fn help_topic(words: &[&OsString]) -> Result<Option<String>> {
    let words = words.get(1..).unwrap_or_default();
    let (row, _) = find_command(words)?;
    Ok(row.map(|row| row.name.to_owned()).or_else(|| group_of(words)))
}

/// The one argument that may be left out.
fn args_or_none(row: &CommandRow, words: &[&OsString]) -> Option<OsString> {
    words.get(row.name.split(' ').count()).map(|word| (*word).clone())
}

fn daemon_options(value: &impl Fn(&str) -> Option<OsString>, origins: Vec<OsString>) -> Result<Options> {
    let not_loopback = |name: &str, allowed: &str, host: &OsStr| Error::Usage {
        message: format!("{name}: only {allowed} is allowed, not {}", shown(host)),
        hint: Some("to reach it from elsewhere, use an SSH tunnel".to_owned()),
    };
    if let Some(host) = value("--daemon-host") {
        if host != "127.0.0.1" && host != "localhost" {
            return Err(not_loopback("--daemon-host", "127.0.0.1", &host));
        }
    }
    let opencode_host = match value("--opencode-host") {
        None => None,
        Some(host) => {
            let address = if host == "localhost" {
                Some(Ipv4Addr::LOCALHOST)
            } else {
                host.to_str().and_then(|text| text.parse().ok())
            };
            // The first address of the network and the last, its broadcast address, belong to no host.
            let usable = |address: &Ipv4Addr| {
                address.is_loopback() && !matches!(address.octets(), [127, 0, 0, 0] | [127, 255, 255, 255])
            };
            Some(
                address
                    .filter(usable)
                    .ok_or_else(|| not_loopback("--opencode-host", "an address of 127.0.0.0/8", &host))?,
            )
        }
    };
    let port = |name| value(name).map(|port| self::port(name, &port)).transpose();
    let binary = value("--opencode-bin").map(PathBuf::from);
    if binary.as_ref().is_some_and(|binary| binary.as_os_str().is_empty()) {
        return Err(Error::usage("--opencode-bin needs a value (FILE)"));
    }
    let origins = origins.into_iter().map(origin).collect::<Result<_>>()?;
    let engine = EngineOptions { binary, port: port("--opencode-port")?, host: opencode_host };
    let idle_ttl = match value("--idle-ttl") {
        Some(text) => duration("--idle-ttl", &text)?,
        None => DEFAULT_IDLE_TTL,
    };
    let idle_ttl = Some(idle_ttl).filter(|ttl| !ttl.is_zero());
    Ok(Options { port: port("--daemon-port")?, engine, idle_ttl, origins })
}

/// An origin as browsers send it: `scheme://host[:port]`.
fn origin(value: OsString) -> Result<String> {
    let value = text("--cors", value)?;
    let host = value.split_once("://").map_or("", |(_, host)| host);
    if host.is_empty() || host.contains(['/', '?', '#', '@', '*']) || !value.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Error::usage(format!("--cors: {value:?} is not an origin (scheme://host[:port])")));
    }
    Ok(value)
}

fn port(option: &str, value: &OsStr) -> Result<u16> {
    let port = value.to_str().and_then(|text| text.parse::<u16>().ok()).filter(|port| *port != 0);
    port.ok_or_else(|| Error::usage(format!("{}: {} is not a port (1 to 65535)", spelled(option), shown(value))))
}

fn number(option: &str, value: &OsStr) -> Result<usize> {
    let number = value.to_str().and_then(|text| text.parse().ok());
    number.ok_or_else(|| Error::usage(format!("{option}: {} is not a number", shown(value))))
}

fn seconds(value: &OsStr) -> Result<Duration> {
    // A day is for ever, and Instant + Duration must not overflow.
    let seconds = value.to_str().and_then(|text| text.parse::<f64>().ok()).filter(|s| *s > 0.0 && *s <= 86_400.0);
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| Error::usage(format!("--timeout: {} is not a number of seconds, up to a day", shown(value))))
}

/// `90s`, `30m`, `2h`, `1d`; `0` is nothing.
fn duration(option: &str, value: &OsStr) -> Result<Duration> {
    let text = value.to_str().unwrap_or_default();
    let (number, unit) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3600),
        Some((at, 'd')) => (&text[..at], 86_400),
        _ if text == "0" => ("0", 1),
        _ => ("", 1),
    };
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let seconds = number.parse::<u64>().ok().filter(|_| is_number).and_then(|number| number.checked_mul(unit));
    // Ten years are for ever, and a time so far away still can be reckoned with.
    let seconds = seconds.filter(|seconds| *seconds <= 10 * 365 * 86_400);
    seconds.map(Duration::from_secs).ok_or_else(|| {
        let (option, value) = (spelled(option), shown(value));
        Error::usage(format!("{option}: {value} is not a duration (90s, 30m, 2h, 1d; at most ten years; 0 is never)"))
    })
}

/// An option with the variable that may have said it instead.
fn spelled(option: &str) -> String {
    match OPTIONS.iter().find(|row| row.name == option).and_then(|row| row.env) {
        Some(env) => format!("{option} ({env})"),
        None => option.to_owned(),
    }
}

/// What is not known to be text, for a message.
fn shown(value: &OsStr) -> std::borrow::Cow<'_, str> {
    value.to_string_lossy()
}

fn text(option: &str, value: OsString) -> Result<String> {
    value.into_string().map_err(|value| Error::usage(format!("{option}: {} is not UTF-8", shown(&value))))
}

/// A name is checked where it is used; here it only has to be text.
fn name(value: Option<OsString>) -> Result<Option<String>> {
    let not_text =
        |name: OsString| Error::InvalidName { name: name.to_string_lossy().into_owned(), why: "it is not UTF-8" };
    value.map(|value| value.into_string().map_err(not_text)).transpose()
}

fn not_one_of(what: &str, given: &str, known: &str) -> Error {
    Error::Usage { message: format!("unknown {what} `{given}`"), hint: Some(format!("it is {known}")) }
}

/// An unknown word, with the nearest known one if it is near.
fn unknown<'k>(what: &str, given: &str, known: impl Iterator<Item = &'k str>) -> Error {
    // Of two equally near, the one that was only begun, then the one of the same length: letters are
    // swapped more often than left out.
    let rank =
        |word: &'k str| (distance(given, word), !word.starts_with(given), given.len().abs_diff(word.len()), word);
    let nearest = known.map(rank).min();
    // Further away than a third of the word is another word.
    let near = nearest.filter(|(distance, .., word)| *distance <= word.chars().count().div_ceil(3));
    Error::Usage {
        message: format!("unknown {what} `{given}`"),
        hint: Some(match near {
            Some((.., word)) => format!("did you mean `{word}`?"),
            None => "`openwork help` shows what there is".to_owned(),
        }),
    }
}

/// How many characters must be put in, left out or changed (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, b) in b.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
