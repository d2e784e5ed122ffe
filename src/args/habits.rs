//! Words and options that users know from other programs, and their names in openwork.
//!
//! Invariant, checked by a test: no hint is a command that stops or removes anything, so that nobody who
//! mistypes a command confirms a stop. For words that mean a stop, the hint names the help that has the command.

/// The meaning of such a word in openwork.
#[derive(Clone, Copy, Debug)]
pub enum Habit {
    /// A command of openwork, perhaps with arguments.
    Is(&'static str),
    /// An explanation, where openwork has no command or several.
    Says(&'static str),
}

use Habit::{Is, Says};

/// Words of other programs that no command of openwork has, without the word `workspace`: one word, or the first
/// two of a command line. Two words take precedence.
#[rustfmt::skip]
pub const WORDS: &[(&str, Habit)] = &[
    // tmux, screen
    ("new", Is("open <dir>")),
    ("new-session", Is("open <dir>")),
    ("new-window", Is("open <dir>")),
    ("a", Is("attach")),
    ("at", Is("attach")),
    ("attach-session", Is("attach")),
    ("switch-client", Is("switch <ws>")),
    ("select-window", Is("switch <ws>")),
    ("list-sessions", Is("session list")),
    ("list-windows", Is("workspace list")),
    ("list-clients", Is("instance list")),
    ("rename-session", Is("workspace rename <ws> <name>")),
    ("rename-window", Is("workspace rename <ws> <name>")),
    ("display-message", Is("prompt")),
    ("has-session", Is("workspace info <ws>")),
    ("kill-session", Says("`openwork help session` has the commands about sessions")),
    ("kill-window", Says("`openwork help workspace` has the commands about workspaces")),
    ("kill-server", Says("`openwork help daemon` has the commands about the daemon")),
    ("detach", Says("leave OpenCode's interface with its own keys: the server goes on without it")),
    // git
    ("init", Is("workspace add .")),
    ("clone", Says("clone with git, then `openwork workspace add <path>`")),
    ("checkout", Is("switch <ws>")),
    ("co", Is("switch <ws>")),
    ("branch", Is("workspace list")),
    ("log", Is("logs")),
    ("st", Is("status")),
    ("diff", Says("`git diff` in the directory (`openwork workspace info`) shows what the agent has changed")),
    ("remote", Is("workspace add-remote <base-url>")),
    ("worktree", Is("workspace add <path>")),
    ("config", Says("settings are options and variables: `openwork help daemon run` lists them")),
    ("stash", Says("openwork keeps no files: the directories are yours, and git's")),
    // docker, compose
    ("ps", Is("instance list")),
    ("container", Is("instance list")),
    ("stats", Is("instance list")),
    ("top", Is("instance list")),
    ("exec", Is("run -w <ws> MESSAGE")),
    ("inspect", Is("workspace info <ws>")),
    ("start", Is("daemon start")),
    ("up", Is("daemon start")),
    ("pull", Says("openwork ships no opencode: update it as you have installed it, then `openwork daemon restart`")),
    ("images", Is("workspace list")),
    ("system", Is("status")),
    ("compose", Is("daemon start")),
    ("down", Says("`openwork help daemon` has the commands about the daemon")),
    ("stop", Says("`openwork help daemon` has the commands about the daemon")),
    ("kill", Says("`openwork help daemon` has the commands about the daemon")),
    ("restart", Is("daemon restart")),
    ("rmi", Says("`openwork help workspace` has the commands about workspaces")),
    ("prune", Says("`openwork help workspace remove`: --missing means those whose directory has gone")),
    // kubectl, kubectx
    ("get", Is("workspace list")),
    ("get pods", Is("instance list")),
    ("get events", Is("events")),
    ("get nodes", Is("status")),
    ("describe", Is("workspace info <ws>")),
    ("create", Is("workspace add <path>")),
    ("apply", Is("workspace import <file>")),
    ("delete", Says("`openwork help workspace` has the commands about workspaces")),
    ("config use-context", Is("switch <ws>")),
    ("config current-context", Is("current")),
    ("config get-contexts", Is("workspace list")),
    ("use-context", Is("switch <ws>")),
    ("ctx", Is("switch <ws>")),
    ("cluster-info", Is("status")),
    ("rollout", Is("daemon restart")),
    ("port-forward", Says("the daemon's port has every workspace below /w/<ws>/ (`openwork env` has the URL)")),
    ("explain", Is("help")),
    // gh
    ("auth", Says("openwork has no login of its own; opencode's is `opencode auth login`")),
    ("login", Says("openwork has no login of its own; opencode's is `opencode auth login`")),
    ("repo", Is("workspace list")),
    ("repo list", Is("workspace list")),
    ("repo clone", Says("clone with git, then `openwork workspace add <path>`")),
    ("browse", Is("attach")),
    ("extension", Says("openwork has no extensions; `openwork events` and `--json` are for scripts")),
    ("alias", Says("openwork has no aliases of its own: use those of your shell")),
    // systemctl, journalctl
    ("enable", Is("service print")),
    ("disable", Says("`systemctl --user disable openwork` if you have installed the unit")),
    ("is-active", Is("status")),
    ("is-enabled", Is("doctor")),
    ("is-failed", Is("doctor")),
    ("list-units", Is("instance list")),
    ("reload", Is("daemon restart")),
    ("daemon-reload", Is("daemon restart")),
    ("cat", Is("service print")),
    ("journal", Is("logs")),
    ("service install", Is("service print")),
    ("service enable", Is("service print")),
    ("service start", Is("daemon start")),
    ("service status", Is("status")),
    ("service stop", Says("`openwork help daemon` has the commands about the daemon")),
    // the shell, opencode and the rest
    ("cd", Is("switch <ws>")),
    ("go", Is("switch <ws>")),
    ("select", Is("switch <ws>")),
    ("activate", Is("switch <ws>")),
    ("pwd", Is("workspace path")),
    ("which", Is("workspace info")),
    ("whoami", Is("current")),
    ("active", Is("current")),
    ("show", Is("workspace info")),
    ("tail", Is("logs -f")),
    ("watch", Is("events")),
    ("ping", Is("status")),
    ("health", Is("status")),
    ("check", Is("doctor")),
    ("diagnose", Is("doctor")),
    ("repair", Is("state repair")),
    ("serve", Is("daemon start")),
    ("server", Is("daemon start")),
    ("tui", Is("attach")),
    ("ui", Is("attach")),
    ("web", Says("openwork has no web page; `openwork env` has the URL for OpenCode's clients")),
    ("ask", Is("run MESSAGE")),
    ("chat", Is("attach")),
    ("continue", Is("attach -- --continue")),
    ("sessions", Is("session list")),
    ("workspaces", Is("workspace list")),
    ("instances", Is("instance list")),
    ("projects", Is("workspace list")),
    ("abort", Says("`openwork help session` has the commands about sessions")),
    ("dispose", Is("instance dispose <ws>")),
    ("unload", Is("instance dispose <ws>")),
    ("upgrade", Says("update openwork as you have installed it, then `openwork daemon restart`; opencode keeps running")),
    ("update", Says("update openwork as you have installed it, then `openwork daemon restart`; opencode keeps running")),
    ("uninstall", Says("remove openwork as you have installed it; its data is in the directory that `openwork doctor` names")),
    // second words
    ("instance stop", Is("instance dispose <ws>")),
    ("instance kill", Is("instance dispose <ws>")),
    ("instance unload", Is("instance dispose <ws>")),
    ("instance remove", Is("instance dispose <ws>")),
    ("instance restart", Is("instance dispose <ws>")),
    ("instance start", Is("workspace path <ws>")),
    ("instance load", Is("workspace path <ws>")),
    ("session kill", Says("`openwork help session` has the commands about sessions")),
    ("session stop", Says("`openwork help session` has the commands about sessions")),
    ("session remove", Says("`openwork help session` has the commands about sessions; sessions are deleted in OpenCode")),
    ("session attach", Is("attach -- --session <id>")),
    ("session resume", Is("attach -- --session <id>")),
    ("session new", Is("run MESSAGE")),
    ("session show", Is("session list")),
    ("daemon reload", Is("daemon restart")),
    ("daemon logs", Is("logs daemon")),
    ("daemon log", Is("logs daemon")),
    ("daemon enable", Is("service print")),
    ("daemon kill", Says("`openwork help daemon` has the commands about the daemon")),
    ("daemon down", Says("`openwork help daemon` has the commands about the daemon")),
    ("workspace new", Is("workspace add <path>")),
    ("workspace create", Is("workspace add <path>")),
    ("workspace init", Is("workspace add .")),
    ("workspace select", Is("workspace switch <ws>")),
    ("workspace activate", Is("workspace switch <ws>")),
    ("workspace set", Is("workspace switch <ws>")),
    ("workspace show", Is("workspace info")),
    ("workspace get", Is("workspace info")),
    ("workspace describe", Is("workspace info")),
    ("workspace open", Is("open <dir>")),
    ("workspace delete", Says("`openwork help workspace` has the commands about workspaces")),
    ("workspace prune", Says("`openwork help workspace remove`: --missing means those whose directory has gone")),
    ("state show", Is("workspace list --json")),
    ("state check", Is("doctor")),
];

/// Options of other programs: the option that the command must take for the hint to apply (`None`: any
/// command), and the hint.
#[rustfmt::skip]
pub const OPTIONS: &[(&str, Option<&str>, &str)] = &[
    // the calls of curl and gh
    ("-f", Some("--data"), "use -d with a JSON body"),
    ("-F", Some("--data"), "use -d with a JSON body"),
    ("--field", Some("--data"), "use -d with a JSON body"),
    ("--input", Some("--data"), "use -d @FILE, or -d @- for standard input"),
    ("-s", Some("--data"), "nothing but the body is printed"),
    ("--silent", Some("--data"), "nothing but the body is printed"),
    ("-u", Some("--data"), "openwork adds the credentials itself"),
    // docker, kubectl, journalctl
    ("--tail", Some("--lines"), "use -n N"),
    ("--last", Some("--lines"), "use -n N"),
    ("--since", Some("--lines"), "use -n N: logs are cut by lines, not by time"),
    ("--unit", Some("--lines"), "openwork has two logs: `openwork logs opencode` and `openwork logs daemon`"),
    ("-u", Some("--lines"), "openwork has two logs: `openwork logs opencode` and `openwork logs daemon`"),
    ("-o", None, "use --json"),
    ("--output", None, "use --json"),
    ("--format", None, "use --json, and jq"),
    ("--jq", None, "use --json, and pipe it to jq"),
    ("--template", None, "use --json, and jq"),
    ("--no-trunc", Some("--names"), "nothing is cut but on a terminal: pipe it to cat, or use --json"),
    ("-A", Some("--all"), "use --all"),
    ("-a", Some("--all"), "use --all"),
    ("--all-namespaces", Some("--all"), "use --all"),
    ("--detach", Some("--daemon-port"), "`openwork daemon start` runs it in the background"),
    ("-d", Some("--daemon-port"), "`openwork daemon start` runs it in the background"),
    ("-p", Some("--daemon-port"), "use --daemon-port PORT"),
    ("--port", Some("--daemon-port"), "use --daemon-port PORT"),
    ("--publish", Some("--daemon-port"), "use --daemon-port PORT"),
    ("--host", Some("--daemon-port"), "the daemon listens on 127.0.0.1 only; use an SSH tunnel"),
    ("--hostname", Some("--daemon-port"), "the daemon listens on 127.0.0.1 only; use an SSH tunnel"),
    ("-m", Some("--max-memory"), "use --max-memory SIZE"),
    ("--memory", Some("--max-memory"), "use --max-memory SIZE"),
    ("--restart", Some("--daemon-port"), "a crash is followed by a restart in any case"),
    // which workspace
    ("-C", Some("--workspace"), "use -w DIR, or go there"),
    ("--cwd", Some("--workspace"), "use -w DIR, or go there"),
    ("--dir", Some("--workspace"), "use -w DIR, or go there"),
    ("--project", Some("--workspace"), "use -w WS"),
    ("--context", Some("--workspace"), "use -w WS"),
    ("--namespace", Some("--workspace"), "use -w WS"),
    ("--repo", Some("--workspace"), "use -w WS"),
    ("-R", Some("--workspace"), "use -w WS"),
    ("-t", Some("--workspace"), "use -w WS"),
    ("-n", Some("--workspace"), "use -w WS"),
    ("-s", Some("--workspace"), "use -w WS"),
    // everywhere
    ("--verbose", None, "`openwork logs daemon` says what the daemon does"),
    ("-v", None, "`openwork --version` shows the version, `openwork logs daemon` what the daemon does"),
    ("--debug", None, "`openwork logs daemon` says what the daemon does"),
    ("--yes", None, "nothing asks for confirmation"),
    ("-y", None, "nothing asks for confirmation"),
    ("--no-pager", None, "output is never paged"),
    ("--user", None, "openwork is always the user's own"),
    ("--watch", None, "`openwork events` tells what changes"),
    ("--config", None, "settings are options and variables: `openwork help daemon run` lists them"),
];

/// The meaning of the first words of a command line; `first` without its alias.
pub fn of_words(first: &str, second: Option<&str>) -> Option<Habit> {
    let find = |words: &str| WORDS.iter().find(|(known, _)| *known == words).map(|(_, habit)| *habit);
    second.and_then(|second| find(&format!("{first} {second}"))).or_else(|| find(first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{COMMANDS, OPTIONS as OURS, find_command};
    use std::ffi::OsString;

    #[test]
    fn habits_lead_to_harmless_commands() {
        for (words, habit) in WORDS {
            let Is(command) = habit else { continue };
            let given: Vec<OsString> = command.split(' ').map(OsString::from).collect();
            let (row, _) = find_command(&given.iter().collect::<Vec<_>>()).unwrap_or_else(|e| panic!("{words}: {e}"));
            let name = row.unwrap_or_else(|| panic!("{words}: {command}")).name;
            assert!(!["daemon stop", "workspace remove", "session abort"].contains(&name), "{words}: {command}");
        }
    }

    #[test]
    fn habits_hide_no_command() {
        for (words, _) in WORDS {
            assert!(COMMANDS.iter().all(|row| row.name != *words), "{words}");
            let given: Vec<OsString> = words.split(' ').map(OsString::from).collect();
            let found = find_command(&given.iter().collect::<Vec<_>>());
            assert!(found.is_err(), "{words} is a command");
        }
        let mut words: Vec<&str> = WORDS.iter().map(|(words, _)| *words).collect();
        words.sort_unstable();
        let all = words.len();
        words.dedup();
        assert_eq!(words.len(), all);
    }

    #[test]
    fn option_habits_name_our_options() {
        for (name, needs, _) in OPTIONS {
            assert!(needs.is_none_or(|needs| OURS.iter().any(|row| row.name == needs)), "{name}");
        }
    }
}
