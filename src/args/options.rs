//! The table of options.

use serde::Serialize;

/// A row of the table of options.
#[derive(Debug, Serialize)]
pub struct OptionRow {
    /// With its dashes.
    pub name: &'static str,
    /// One letter, with its dash.
    pub short: Option<&'static str>,
    /// What its value is called; `None` for a flag.
    pub value: Option<&'static str>,
    /// The environment variable that sets it too.
    pub env: Option<&'static str>,
    /// The commands that take it; empty for all.
    pub commands: &'static [&'static str],
    /// The effect, in one line. An option with a different effect in each command has all of them here.
    pub help: &'static str,
    /// The effect in each command, for an option that has several.
    #[serde(skip)]
    pub help_by_command: &'static [(&'static str, &'static str)],
}

/// The commands that run, start or describe a daemon.
pub const RUNS_DAEMON: &[&str] = &["daemon", "daemon run", "daemon start", "daemon restart", "doctor", "service print"];

/// The commands that take a workspace as their first argument.
const TAKES_WORKSPACE: &[&str] = &[
    "workspace switch",
    "workspace info",
    "workspace path",
    "workspace remove",
    "workspace rename",
    "workspace move",
    "api",
    "attach",
    "run",
    "session list",
    "wait",
    "env",
    "instance dispose",
    "instance reset",
];

const fn flag(name: &'static str, commands: &'static [&'static str], help: &'static str) -> OptionRow {
    OptionRow { name, short: None, value: None, env: None, commands, help, help_by_command: &[] }
}

const fn value(
    name: &'static str,
    value: &'static str,
    commands: &'static [&'static str],
    help: &'static str,
) -> OptionRow {
    OptionRow { name, short: None, value: Some(value), env: None, commands, help, help_by_command: &[] }
}

impl OptionRow {
    const fn short(self, short: &'static str) -> OptionRow {
        OptionRow { short: Some(short), ..self }
    }

    const fn env(self, env: &'static str) -> OptionRow {
        OptionRow { env: Some(env), ..self }
    }

    const fn by_command(self, help_by_command: &'static [(&'static str, &'static str)]) -> OptionRow {
        OptionRow { help_by_command, ..self }
    }

    /// Whether a command takes it.
    pub fn is_for(&self, command: &str) -> bool {
        self.commands.is_empty() || self.commands.contains(&command)
    }

    /// The effect in a command.
    pub fn help_for(&self, command: &str) -> &'static str {
        self.help_by_command.iter().find(|(of, _)| *of == command).map_or(self.help, |(_, help)| help)
    }
}

/// Every option, in the order of the help.
#[rustfmt::skip]
pub const OPTIONS: &[OptionRow] = &[
    flag("--json", &[], "Print the result, or the error, as one JSON object"),
    value("--data-dir", "DIR", &[], "Keep all files in this directory").env("OPENWORK_DATA_DIR"),
    flag("--no-autostart", &[], "Do not start the daemon"),
    value("--timeout", "SECONDS", &[], "Limit the whole command (default: 30; daemon commands 60; api, events, wait, --when-idle and logs -f none)"),
    flag("--help", &[], "Show help").short("-h"),
    flag("--version", &[], "Show the version").short("-V"),
    value("--workspace", "WS", TAKES_WORKSPACE, "Name the workspace, instead of an argument").short("-w"),
    value("--name", "NAME", &["workspace add", "workspace add-remote"], "Name the workspace (default: its directory or host)"),
    value("--directory", "DIR", &["workspace add-remote"], "The directory on the remote server"),
    flag("--quiet", &["workspace list", "workspace current", "session list"], "Print only ids").short("-q"),
    flag("--force", &["instance dispose", "daemon stop", "workspace add"], "instance dispose: Dispose even while a session is running. daemon stop: End even a daemon that does not respond. workspace add: Add even / or the home directory")
        .by_command(&[("instance dispose", "Dispose even while a session is running"), ("daemon stop", "End even a daemon that does not respond"), ("workspace add", "Add even / or the home directory")]),
    flag("--names", &["workspace list"], "Print only names"),
    flag("--missing", &["workspace remove"], "Remove every workspace whose directory has gone"),
    flag("--unset", &["env"], "Print commands that unset the variables"),
    value("--method", "METHOD", &["api"], "Use this method: GET, POST, …; the word before the path does the same").short("-X"),
    value("--data", "BODY", &["api"], "Send this body: text, @file, or @- for standard input").short("-d"),
    value("--header", "NAME:VALUE", &["api"], "Send this header; repeatable").short("-H"),
    flag("--include", &["api"], "Print the head of the reply too").short("-i"),
    value("--shell", "SHELL", &["env"], "Write for sh (also bash, zsh) or fish"),
    flag("--follow", &["logs"], "Keep printing new lines").short("-f"),
    value("--lines", "N", &["logs"], "Print only the last N lines").short("-n"),
    value("--since", "ID", &["events"], "Begin after this event; an event `gap` stands for events that are no longer kept"),
    flag("--keep-opencode", &["daemon stop"], "Leave opencode running for the next daemon"),
    value("--program", "FILE", &["service print"], "The openwork that the unit runs (default: this one)"),
    flag("--socket", &["service print"], "Print the socket unit instead: a connection starts the daemon"),
    flag("--all", &["daemon stop", "daemon restart", "session list", "wait"], "daemon stop: Stop even a shared opencode. daemon restart: Restart opencode too, even a shared one. session list: List the sessions of every loaded workspace. wait: Wait until no session runs in any workspace")
        .by_command(&[("daemon stop", "Stop even a shared opencode"), ("daemon restart", "Restart opencode too, even a shared one"), ("session list", "List the sessions of every loaded workspace"), ("wait", "Wait until no session runs in any workspace")]),
    flag("--when-idle", &["daemon stop", "daemon restart"], "First wait until no session runs, with no limit but --timeout"),
    value("--daemon-port", "PORT", RUNS_DAEMON, "Listen on this port (default: the last one, 6174, or any)").env("OPENWORK_DAEMON_PORT"),
    value("--opencode-bin", "FILE", RUNS_DAEMON, "Run this opencode, 1.x or 2.x (default: from PATH, or ~/.opencode/bin)").env("OPENWORK_OPENCODE_BIN"),
    value("--opencode-port", "PORT", RUNS_DAEMON, "Have opencode listen on this port (default: the last one, else a random one)").env("OPENWORK_OPENCODE_PORT"),
    value("--idle-ttl", "DURATION", RUNS_DAEMON, "Dispose instances unused for this long: 90s, 30m (the default), 2h; 0 for never").env("OPENWORK_IDLE_TTL"),
    value("--max-memory", "SIZE", RUNS_DAEMON, "Restart opencode when it uses more than this and no session runs: 800M, 2G").env("OPENWORK_MAX_MEMORY"),
    flag("--shared", RUNS_DAEMON, "Share the server that plain opencode 2.x runs, instead of starting one of openwork's own").env("OPENWORK_SHARED"),
    value("--cors", "ORIGIN", RUNS_DAEMON, "Allow calls from web pages of this origin; repeatable"),
    value("--opencode-workdir", "DIR", RUNS_DAEMON, "Accepted for compatibility, without effect"),
    flag("--allow-external", RUNS_DAEMON, "Accepted for compatibility, without effect"),
    value("--daemon-host", "HOST", RUNS_DAEMON, "Only 127.0.0.1 or localhost"),
    value("--opencode-host", "ADDRESS", RUNS_DAEMON, "Have opencode listen on this address of 127.0.0.0/8 (default: the last one, else a random one)"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_help_has_the_effect_in_each_command() {
        for row in OPTIONS.iter().filter(|row| !row.help_by_command.is_empty()) {
            let commands: Vec<&str> = row.help_by_command.iter().map(|(command, _)| *command).collect();
            assert_eq!(commands, row.commands, "{}", row.name);
            let all: Vec<String> =
                row.help_by_command.iter().map(|(command, help)| format!("{command}: {help}")).collect();
            assert_eq!(row.help, all.join(". "));
        }
    }
}
