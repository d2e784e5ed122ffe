//! Command lines that users know from tmux, git, docker, kubectl, gh, systemctl and others, and openwork's answers to them,
//! in one table. The test runs each line and compares its output.

use std::fmt::Write as _;
use std::fs;

use crate::support::Host;

/// A command line, its exit status, and a part of its output (standard output, or message and hint).
const HABITS: &[(&str, i32, &str)] = &[
    // The directory you are in, no `--`.
    ("add .", 0, "added shop ("),
    ("ls", 0, "* "),
    ("current", 0, "web\n"),
    ("use shop", 0, "switched to shop ("),
    ("switch -", 0, "switched to web ("),
    ("mv shop store", 0, "renamed to store ("),
    ("rm store", 0, "removed store ("),
    ("run fix the test", 0, "fake: run --attach"),
    ("run -m x/y hi", 0, "-m x/y hi"),
    ("run -w web hi", 0, "projects/web hi"),
    ("version", 0, "openwork "),
    ("completion bash", 0, "_openwork"),
    ("api -X GET /path", 0, "projects/web"),
    ("info -w web", 0, "projects/web"),
    ("prompt", 0, "web\n"),
    // Typos.
    ("swich web", 2, "did you mean `switch`?"),
    ("stauts", 2, "did you mean `status`?"),
    ("switch wbe", 4, "did you mean \"web\"?"),
    ("info web2", 4, "did you mean \"web\"?"),
    ("switch new-dir", 4, "`openwork workspace add ./new-dir` adds the directory"),
    ("info ./new-dir", 4, "`openwork workspace add ./new-dir` adds the directory"),
    ("ls --nmaes", 2, "did you mean `--names`?"),
    // A typo never suggests a stop, a removal or an abort.
    ("daemon stpo", 2, "`openwork help daemon` shows its commands"),
    ("workspace remvoe web", 2, "`openwork help workspace` shows its commands"),
    ("remvoe web", 2, "`openwork help` shows all commands"),
    ("session abotr x", 2, "`openwork help session` shows its commands"),
    // tmux
    ("new -s work", 2, "did you mean `openwork open <dir>`?"),
    ("a -t web", 2, "did you mean `openwork attach`?"),
    ("attach -t web", 2, "did you mean `openwork attach web`?"),
    ("attach -tweb", 2, "did you mean `openwork attach web`?"),
    ("attach-session -t web", 2, "did you mean `openwork attach`?"),
    ("list-sessions", 2, "did you mean `openwork session list`?"),
    ("switch-client -t web", 2, "did you mean `openwork switch <ws>`?"),
    ("rename-session web2", 2, "did you mean `openwork workspace rename <ws> <name>`?"),
    ("kill-session -t web", 2, "`openwork help session`"),
    ("kill-server", 2, "`openwork help daemon`"),
    ("detach", 2, "the server goes on without it"),
    ("info -t web", 2, "use -w WS"),
    // git
    ("init", 2, "did you mean `openwork workspace add .`?"),
    ("clone https://example.com/x.git", 2, "clone with git, then `openwork workspace add <path>`"),
    ("checkout web", 2, "did you mean `openwork switch <ws>`?"),
    ("branch", 2, "did you mean `openwork workspace list`?"),
    ("log", 2, "did you mean `openwork logs`?"),
    ("remote add x https://x", 2, "did you mean `openwork workspace add-remote <base-url>`?"),
    ("config --global x y", 2, "settings are options and variables"),
    ("env -C /tmp", 2, "use -w DIR"),
    ("ls --no-pager", 2, "output is never paged"),
    // docker
    ("ps", 2, "did you mean `openwork instance list`?"),
    ("ps -a", 2, "did you mean `openwork instance list`?"),
    ("exec -it web bash", 2, "did you mean `openwork run -w <ws> MESSAGE`?"),
    ("inspect web", 2, "did you mean `openwork workspace info <ws>`?"),
    ("stats", 2, "did you mean `openwork instance list`?"),
    ("logs --tail 5", 2, "use -n N"),
    ("logs --tail=5 -f", 2, "use -n N"),
    ("logs --since 10m", 2, "use -n N: logs are cut by lines, not by time"),
    ("stop web", 2, "`openwork help daemon`"),
    ("kill web", 2, "`openwork help daemon`"),
    ("restart", 2, "did you mean `openwork daemon restart`?"),
    ("up -d", 2, "did you mean `openwork daemon start`?"),
    ("down", 2, "`openwork help daemon`"),
    ("compose up", 2, "did you mean `openwork daemon start`?"),
    ("pull", 2, "update it as you have installed it"),
    ("daemon -d", 2, "`openwork daemon start` runs it in the background"),
    ("daemon start -p 7000", 2, "use --daemon-port PORT"),
    ("daemon start --host 0.0.0.0", 2, "listens on 127.0.0.1 only"),
    ("ls --format json", 2, "use --json"),
    // kubectl, kubectx
    ("get pods", 2, "did you mean `openwork instance list`?"),
    ("get", 2, "did you mean `openwork workspace list`?"),
    ("describe web", 2, "did you mean `openwork workspace info <ws>`?"),
    ("delete web", 2, "`openwork help workspace`"),
    ("apply -f x.json", 2, "did you mean `openwork workspace import <file>`?"),
    ("config use-context web", 2, "did you mean `openwork switch <ws>`?"),
    ("config current-context", 2, "did you mean `openwork current`?"),
    ("cluster-info", 2, "did you mean `openwork status`?"),
    ("ls -o json", 2, "use --json"),
    ("env -n web", 2, "use -w WS"),
    ("env --context web", 2, "use -w WS"),
    ("session list -A", 2, "use --all"),
    ("ls --watch", 2, "`openwork events`"),
    // gh
    ("auth login", 2, "opencode auth login"),
    ("repo list", 2, "did you mean `openwork workspace list`?"),
    ("browse", 2, "did you mean `openwork attach`?"),
    ("api /path --jq .x", 2, "pipe it to jq"),
    ("api -f a=b /path", 2, "use -d with a JSON body"),
    ("api --method GET /path", 0, "projects/web"),
    ("env -R web", 2, "use -w WS"),
    // systemctl, journalctl
    ("start", 2, "did you mean `openwork daemon start`?"),
    ("enable", 2, "did you mean `openwork service print`?"),
    ("is-active", 2, "did you mean `openwork status`?"),
    ("list-units", 2, "did you mean `openwork instance list`?"),
    ("daemon-reload", 2, "did you mean `openwork daemon restart`?"),
    ("reload", 2, "did you mean `openwork daemon restart`?"),
    ("cat", 2, "did you mean `openwork service print`?"),
    ("logs -u openwork", 2, "`openwork logs daemon`"),
    ("status --user", 2, "always the user's own"),
    ("service status", 2, "did you mean `openwork status`?"),
    // the rest
    ("instance stop web", 2, "did you mean `openwork instance dispose <ws>`?"),
    ("session resume x", 2, "did you mean `openwork attach -- --session <id>`?"),
    ("workspace create x", 2, "did you mean `openwork workspace add <path>`?"),
    ("workspace delete x", 2, "`openwork help workspace`"),
    ("workspaces", 2, "did you mean `openwork workspace list`?"),
    ("sessions", 2, "did you mean `openwork session list`?"),
    ("pwd", 2, "did you mean `openwork workspace path`?"),
    ("whoami", 2, "did you mean `openwork current`?"),
    ("cd web", 2, "did you mean `openwork switch <ws>`?"),
    ("tail", 2, "did you mean `openwork logs -f`?"),
    ("check", 2, "did you mean `openwork doctor`?"),
    ("serve", 2, "did you mean `openwork daemon start`?"),
    ("ask why does it fail", 2, "did you mean `openwork run MESSAGE`?"),
    ("login", 2, "opencode auth login"),
    ("upgrade", 2, "then `openwork daemon restart`"),
    ("ls -v", 2, "`openwork --version` shows the version"),
    ("add new-dir -y", 2, "nothing asks for confirmation"),
];

#[test]
fn habits_work_or_name_the_right_command() {
    let host = Host::new();
    host.add(host.project("web"));
    let shop = host.project("shop");
    host.project("shop/new-dir");
    host.openwork(["daemon", "start"]).ok();
    let mut table = String::new();
    for (line, exit, expected) in HABITS {
        let output = host.openwork(line.split(' ')).cwd(&shop).output();
        let text = format!("{}{}", output.stdout, output.stderr).replace("hint: ", "");
        let _ = writeln!(
            table,
            "| `openwork {line}` | {exit} | {} |",
            text.lines().take(2).collect::<Vec<_>>().join(" — ")
        );
        assert_eq!(output.status.code(), Some(*exit), "{line}: {output:?}");
        assert!(text.contains(expected), "{line}: {expected} in {output:?}");
    }
    // No line has ended or changed anything by mistake.
    assert_eq!(host.names(), ["web"]);
    host.runs_one_of_each();
    // Writes the whole table, for a reader.
    if let Some(path) = std::env::var_os("OPENWORK_TEST_HABITS") {
        fs::write(path, table).unwrap();
    }
}

#[test]
fn invalid_variable_is_named_as_the_cause() {
    let host = Host::new();
    host.add(host.project("web"));
    for command in [&["info"][..], &["env"], &["path"], &["run", "hi"], &["session", "list"], &["wait"]] {
        let error = host.openwork(command).env("OPENWORK_WORKSPACE", "wbe").fails(4, "workspace_not_found");
        let message = error["message"].as_str().unwrap();
        assert!(message.starts_with("OPENWORK_WORKSPACE is \"wbe\": no workspace"), "{error}");
        assert_eq!(error["hint"], "did you mean \"web\"?");
    }
    // The variable does not matter for a workspace named on the command line.
    let error = host.openwork(["info", "wbe"]).env("OPENWORK_WORKSPACE", "nix").fails(4, "workspace_not_found");
    assert!(!error.to_string().contains("OPENWORK_WORKSPACE"), "{error}");
}

#[test]
fn directory_that_is_no_workspace_can_be_added() {
    let host = Host::new();
    host.add(host.project("web"));
    host.project("my site");
    let hint = |command: &[&str]| {
        let error = host.openwork(command).cwd(host.path("projects")).on_terminal("").fails(4, "workspace_not_found");
        error["hint"].as_str().unwrap().to_owned()
    };
    assert_eq!(hint(&["info", "my site"]), "`openwork workspace add './my site'` adds the directory");
    assert_eq!(hint(&["attach", "my site"]), "`openwork open './my site'` adds the directory and attaches");
    // A removal does not suggest to add the directory.
    assert_eq!(hint(&["rm", "my site"]), "`openwork workspace list` shows all workspaces");
}
