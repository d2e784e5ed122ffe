//! Two examples for the help of each command: its most common use, and another one.

/// The name of a command, and two shell lines that use it, each with its effect.
type Example = (&'static str, [(&'static str, &'static str); 2]);

/// The examples of every command; a test parses them all.
#[rustfmt::skip]
pub const EXAMPLES: &[Example] = &[
    ("status", [("openwork status", "what runs"), ("openwork status --json | jq .opencode.baseUrl", "a field of it")]),
    ("doctor", [("openwork doctor", "finds problems, and says what to do"), ("openwork doctor --json | jq '.checks[] | select(.verdict != \"ok\")'", "for a script")]),
    ("daemon", [("openwork daemon", "in the foreground, until Ctrl-C"), ("openwork daemon --idle-ttl 2h --max-memory 2G", "with settings")]),
    ("daemon run", [("openwork daemon run", "in the foreground, until Ctrl-C"), ("openwork daemon run --daemon-port 7000", "on a port of your own")]),
    ("daemon start", [("openwork daemon start", "returns when opencode is ready"), ("openwork daemon start --max-memory 2G", "with settings")]),
    ("daemon stop", [("openwork daemon stop", "names the running sessions that it ends"), ("openwork daemon stop --when-idle", "waits for them first")]),
    ("daemon restart", [("openwork daemon restart", "after an update of openwork"), ("openwork daemon restart --all --when-idle", "after an update of opencode, once no session runs")]),
    ("daemon status", [("openwork daemon status", "what runs"), ("openwork daemon status --json", "for a script")]),
    ("workspace add", [("openwork add .", "the working directory"), ("openwork add ~/code/web ~/code/api", "several directories")]),
    ("workspace add-remote", [("openwork add-remote https://dev.example.com", "a remote server"), ("openwork add-remote http://10.0.0.2:4096 --directory /srv/web --name web", "one directory on it")]),
    ("workspace list", [("openwork ls", "* marks the active one"), ("openwork ls --names", "for a menu of your own")]),
    ("workspace switch", [("openwork switch web", "by name, or its beginning"), ("openwork switch -", "back to the previous one")]),
    ("workspace current", [("openwork current", "the name of the active one"), ("openwork current -q", "its id")]),
    ("workspace info", [("openwork info", "the active one"), ("openwork info .", "that of this directory")]),
    ("workspace path", [("openwork workspace path web", "as OpenCode reports it"), ("openwork path", "of the active one")]),
    ("workspace remove", [("openwork rm web", "its files stay"), ("openwork rm --missing", "all whose directory has gone")]),
    ("workspace rename", [("openwork rename web site", "a new name"), ("openwork mv . site", "that of this directory")]),
    ("workspace move", [("openwork workspace move web ~/work/web", "after `mv ~/code/web ~/work/web`"), ("openwork move - .", "the previous one, to this directory")]),
    ("workspace import", [("openwork workspace import ~/.openwork/openwork-orchestrator/openwork-orchestrator-state.json", "from OpenWork's orchestrator"), ("openwork import openwork-workspaces.json", "from OpenWork desktop")]),
    ("api", [("openwork api web /session", "a GET in a workspace"), ("openwork api -X POST /session -d '{\"title\": \"x\"}'", "with a body, in the active one")]),
    ("attach", [("openwork attach", "where you are"), ("openwork attach web --continue", "arguments after the workspace go to opencode")]),
    ("run", [("openwork run \"fix the test\"", "where you are"), ("openwork run -w web -m provider/model \"why does it fail?\"", "in another workspace, with an option of opencode")]),
    ("open", [("openwork open", "this directory"), ("openwork open ~/code/web", "another one")]),
    ("session list", [("openwork session list", "where you are, running ones first"), ("openwork session list --all", "everywhere")]),
    ("session abort", [("openwork session abort ses_1a2b3c", "as `openwork session list` shows it"), ("openwork session list -q web | head -1 | xargs -r openwork session abort", "the first one")]),
    ("wait", [("openwork wait web && notify-send done", "when the agent has finished"), ("openwork wait --all --timeout 600", "at most ten minutes")]),
    ("env", [("eval \"$(openwork env web)\"", "for an OpenCode client or the SDK"), ("openwork env --shell fish | source", "in fish")]),
    ("prompt", [("PS1='$(openwork prompt) \\$ '", "in bash"), ("openwork prompt --json", "for a status line")]),
    ("events", [("openwork events", "until Ctrl-C"), ("openwork events | jq -r 'select(.type == \"session.idle\") | .title'", "the sessions that finish")]),
    ("instance list", [("openwork instance list", "loaded and unloaded ones"), ("openwork instance list --json | jq .memory", "the memory of opencode")]),
    ("instance dispose", [("openwork instance dispose web", "frees its memory; refused while a session runs"), ("openwork instance dispose web --force", "even then")]),
    ("instance reset", [("openwork instance reset web", "after the cause was fixed"), ("openwork instance reset", "of the active one")]),
    ("logs", [("openwork logs -f", "opencode's log, as it grows"), ("openwork logs daemon -n 20", "the last lines of the daemon's log")]),
    ("state repair", [("openwork state repair", "when `openwork doctor` says so"), ("openwork state repair --json", "what was saved, for a script")]),
    ("completions", [("source <(openwork completions bash)", "in ~/.bashrc"), ("openwork completions fish > ~/.config/fish/completions/openwork.fish", "for fish")]),
    ("man", [("openwork man | man -l -", "without installing it"), ("openwork man > ~/.local/share/man/man1/openwork.1", "for `man openwork`")]),
    ("service print", [("openwork service print > ~/.config/systemd/user/openwork.service", "then `systemctl --user enable --now openwork`"), ("openwork service print --socket > ~/.config/systemd/user/openwork.socket", "to start it on demand")]),
    ("version", [("openwork version", "of this command"), ("openwork status --json | jq .cliVersion", "of the daemon")]),
    ("help", [("openwork help workspace", "a group of commands"), ("openwork help --json", "the tables, for programs")]),
];

/// The examples of a command.
pub fn of(name: &str) -> &'static [(&'static str, &'static str)] {
    EXAMPLES.iter().find(|(of, _)| *of == name).map_or(&[], |(_, examples)| examples)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::args::{COMMANDS, parse};

    /// The words of the first call of openwork in a line of a shell.
    fn words(line: &str) -> Vec<OsString> {
        let start = line.find("openwork ").expect("a call") + "openwork ".len();
        let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
        for c in line[start..].chars() {
            match c {
                '"' | '\'' if quote == Some(c) => quote = None,
                '"' | '\'' if quote.is_none() => quote = Some(c),
                '|' | '>' | '&' | ')' if quote.is_none() => break,
                ' ' if quote.is_none() => words.push(std::mem::take(&mut word)),
                _ => word.push(c),
            }
        }
        words.push(word);
        words.into_iter().filter(|word| !word.is_empty()).map(OsString::from).collect()
    }

    #[test]
    fn every_command_has_examples_that_are_right() {
        for row in COMMANDS {
            assert_eq!(of(row.name).len(), 2, "{}", row.name);
        }
        assert_eq!(EXAMPLES.len(), COMMANDS.len());
        for (name, examples) in EXAMPLES {
            for (line, _) in examples {
                let parsed = parse(&words(line), |_| None).unwrap_or_else(|e| panic!("{line}: {e}"));
                // `version` shows where the version of the daemon is, too.
                let is_beside = *name == "version" && parsed.name == "status" || line.contains("xargs");
                assert!(parsed.name == *name || is_beside, "{line} is {}", parsed.name);
            }
        }
    }
}
