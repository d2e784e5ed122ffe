//! The command line: what it accepts, what it refuses, and how it prints.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::support::{Host, wait_for};

/// The columns of a table in `help --json`.
fn column(table: &Value, field: &str) -> Vec<String> {
    table.as_array().unwrap().iter().map(|row| row[field].as_str().unwrap().to_owned()).collect()
}

// --- Help ---

#[test]
fn version_matches_the_package() {
    let host = Host::new();
    host.exercises(["option --version", "option -V"]);
    let version = concat!("openwork ", env!("CARGO_PKG_VERSION"), "\n");
    for option in ["--version", "-V"] {
        assert_eq!(host.openwork([option]).ok().stdout, version);
    }
    assert_eq!(host.openwork(["--version"]).json()["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn help_shows_every_command() {
    let host = Host::new();
    host.exercises(["option -h"]);
    let tables = host.openwork(["help"]).json();
    let commands = column(&tables["commands"], "name");
    for help in [&["help"][..], &["--help"], &["-h"]] {
        let text = host.openwork(help).ok().stdout;
        for command in &commands {
            assert!(text.contains(command), "{command} in {text}");
        }
    }
}

#[test]
fn help_for_a_command_shows_its_options() {
    let host = Host::new();
    let tables = host.openwork(["help"]).json();
    for row in tables["commands"].as_array().unwrap() {
        let words: Vec<&str> = row["name"].as_str().unwrap().split(' ').collect();
        let asked_first = host.openwork(["help"].iter().chain(&words)).ok().stdout;
        for option in row["options"].as_array().unwrap() {
            assert!(asked_first.contains(option.as_str().unwrap()), "{option} in {asked_first}");
        }
        assert!(asked_first.contains(row["summary"].as_str().unwrap()), "{asked_first}");
        let examples = row["examples"].as_array().unwrap();
        let are_shown =
            examples.iter().all(|example| asked_first.contains(&format!("\n  {}", example.as_str().unwrap())));
        assert!(examples.len() == 2 && are_shown, "{asked_first}");
        // The options of every command are one line, and the last.
        let last = asked_first.lines().filter(|line| line.contains("--data-dir DIR")).collect::<Vec<_>>();
        assert!(last.len() == 1 && last[0].contains("--json; "), "{asked_first}");
        for asked_last in ["--help", "-h"] {
            assert_eq!(host.openwork(words.iter().chain(&[asked_last])).ok().stdout, asked_first);
        }
    }
    host.openwork(["help", "no-such-command"]).fails(2, "usage");
}

#[test]
fn shared_option_says_what_it_does_in_each_command() {
    let host = Host::new();
    for (command, option, effect) in [
        ("instance dispose", "--force", "Dispose even while a session is running"),
        ("daemon stop", "--force", "End even a daemon that does not respond"),
        ("workspace add", "--force", "Add even / or the home directory"),
        ("daemon stop", "--all", "Stop even a shared opencode"),
        ("daemon restart", "--all", "Restart opencode too, even a shared one"),
        ("session list", "--all", "List the sessions of every loaded workspace"),
        ("wait", "--all", "Wait until no session runs in any workspace"),
    ] {
        let help = host.openwork(["help"].into_iter().chain(command.split(' '))).ok().stdout;
        let line = help.lines().find(|line| line.trim_start().starts_with(option)).unwrap();
        assert_eq!(line.trim_start().trim_start_matches(option).trim(), effect, "{command}");
    }
}

#[test]
fn help_names_the_default_workspace() {
    let host = Host::new();
    let here = "OPENWORK_WORKSPACE, else the workspace of the working directory, else the active one";
    let active = "OPENWORK_WORKSPACE, else the active workspace, wherever you are";
    for (default, commands) in [
        (here, &["attach", "run", "session list", "wait", "prompt"][..]),
        (active, &["env", "api", "workspace path", "workspace info", "instance dispose", "instance reset"]),
    ] {
        for command in commands {
            let help = host.openwork(["help"].into_iter().chain(command.split(' '))).ok().stdout;
            assert!(help.contains(&format!("  default workspace: {default}\n")), "{help}");
        }
    }
    // The behaviour matches, as two commands that print the workspace show.
    let web = host.project("web");
    host.add(host.project("api"));
    host.add(&web);
    assert!(host.openwork(["info"]).cwd(&web).ok().stdout.contains("/api"));
    assert_eq!(host.openwork(["wait"]).cwd(&web).ok().stdout, "no session is running in web\n");
}

#[test]
fn aliases_show_the_help_of_their_command() {
    let host = Host::new();
    host.exercises(["option --help"]);
    let help = |command: &str| host.openwork(command.split(' ').chain(["--help"])).ok().stdout;
    for row in host.openwork(["help"]).json()["commands"].as_array().unwrap() {
        for alias in row["aliases"].as_array().unwrap() {
            assert_eq!(help(alias.as_str().unwrap()), help(row["name"].as_str().unwrap()), "{alias}");
        }
    }
}

#[test]
fn help_tables_are_consistent() {
    let host = Host::new();
    let tables = host.openwork(["help"]).json();
    assert_eq!(tables["version"], env!("CARGO_PKG_VERSION"));
    let options = column(&tables["options"], "name");
    for row in tables["commands"].as_array().unwrap() {
        for option in row["options"].as_array().unwrap() {
            assert!(options.contains(&option.as_str().unwrap().to_owned()), "{option} of {row}");
        }
    }
    for table in ["commands", "options"] {
        let mut names = column(&tables[table], "name");
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all, "{table}");
    }
}

#[test]
fn error_codes_keep_their_meaning() {
    // Code, exit status, HTTP statuses. Scripts rely on them: none may change its meaning.
    let promised = "
usage 2
bad_request 1 400
invalid_url 1 400
invalid_name 1 400
path_not_utf8 1 400
path_not_directory 1 400
path_not_found 1 404
permission_denied 1 403
forbidden_host 1 403
forbidden_origin 1 403
forbidden_user 1 403
unauthorized 1 401
not_found 1 404
method_not_allowed 1 405
name_taken 1 409
instance_busy 1 409
still_busy 1 409
daemon_elsewhere 1
daemon_too_old 1
workspace_is_remote 1 409
length_required 1 411
too_large 1 413 414 431
unsupported_media_type 1 415
overloaded 1 503
port_in_use 1 503
state_corrupt 1 500
state_too_new 1 500
state_write_failed 1 500
daemon_start_failed 1
daemon_unresponsive 1
internal 1 500
daemon_not_running 3
workspace_not_found 4 404
session_not_found 4 404
workspace_ambiguous 4 409
no_active_workspace 4 409
opencode_not_found 5 503
opencode_unsupported 5 503
opencode_start_failed 5 503
opencode_auth_failed 5 502
opencode_unavailable 5 503
opencode_timeout 5 504
opencode_error 5 502
workspace_fenced 5 503
";
    let host = Host::new();
    host.exercises(["command help"]);
    let tables = host.openwork(["help"]).json();
    let rows = tables["errors"].as_array().unwrap().iter();
    let found: String = rows
        .map(|row| {
            let statuses: String = row["http"].as_array().unwrap().iter().map(|status| format!(" {status}")).collect();
            format!("{} {}{statuses}\n", row["code"].as_str().unwrap(), row["exit"])
        })
        .collect();
    assert_eq!(found, promised[1..]);
}

// --- Mistakes ---

/// Checks that the error for a mistyped word suggests the right one.
fn check_suggests(host: &Host, args: &[&str], suggestion: &str) {
    let error = host.openwork(args).fails(2, "usage");
    assert!(error.to_string().contains(suggestion), "{suggestion} in {error}");
    let output = host.openwork(args).exits(2);
    assert!(output.stdout.is_empty() && output.stderr.contains(suggestion), "{output:?}");
}

#[test]
fn unknown_commands_and_options_suggest_the_nearest() {
    let host = Host::new();
    for (args, suggestion) in [
        (&["workspce", "list"][..], "workspace"),
        (&["statsu"], "status"),
        (&["workspace", "lst"], "list"),
        (&["ws", "swich", "p"], "switch"),
        (&["daemon", "strat"], "start"),
        (&["instance", "dipose", "p"], "dispose"),
        (&["workspace", "list", "--jsn"], "--json"),
        (&["workspace", "add", "/tmp", "--nmae", "n"], "--name"),
        (&["status", "--data-dri=/x"], "--data-dir"),
    ] {
        check_suggests(&host, args, suggestion);
    }
    for args in [&["frobnicate"][..], &["workspace", "frobnicate"], &["--frobnicate"], &["-x"], &[""]] {
        host.openwork(args).fails(2, "usage");
    }
    assert_eq!(host.processes(), [0; 0]);
}

#[test]
fn partial_and_bare_words_get_suggestions() {
    let host = Host::new();
    check_suggests(&host, &["statu"], "`status`");
    check_suggests(&host, &["swich", "p"], "`switch`");
}

#[test]
fn workspace_prefix_is_optional() {
    let host = Host::new();
    host.exercises(["command version"]);
    host.project("web");
    host.openwork(["add", "projects/web"]).ok();
    host.openwork(["add", host.project("api").to_str().unwrap()]).ok();
    assert_eq!(host.openwork(["ls", "-q"]).ok().stdout.lines().count(), 2);
    host.openwork(["use", "api"]).ok();
    assert_eq!(host.openwork(["current"]).ok().stdout, "api\n");
    host.openwork(["mv", "api", "server"]).ok();
    host.openwork(["switch", "-"]).ok();
    host.openwork(["info", "server"]).ok();
    host.openwork(["rm", "web", "server"]).ok();
    assert_eq!(host.names(), [""; 0]);
    assert_eq!(host.openwork(["version"]).ok().stdout, host.openwork(["--version"]).ok().stdout);
    assert_eq!(host.openwork(["completion", "bash"]).ok().stdout, host.openwork(["completions", "bash"]).ok().stdout);
    // `status` is also a command itself, which takes precedence.
    assert_eq!(host.openwork(["status"]).json()["workspaceCount"], 0);
}

#[test]
fn removing_several_workspaces_is_all_or_nothing() {
    let host = Host::new();
    for name in ["a", "b", "c"] {
        host.add(host.project(name));
    }
    host.openwork(["workspace", "remove", "a", "nope"]).fails(4, "workspace_not_found");
    assert_eq!(host.names(), ["a", "b", "c"]);
    // A workspace named twice is removed once.
    let removed = host.openwork(["workspace", "remove", "a", "c", "./projects/a"]).json();
    let names = removed["workspaces"].as_array().unwrap().iter().map(|workspace| &workspace["name"]);
    assert_eq!(names.collect::<Vec<_>>(), ["a", "c"]);
    assert_eq!(removed["activeId"], "");
    assert_eq!(host.names(), ["b"]);
}

#[test]
fn workspace_option_selects_the_workspace() {
    let host = Host::new();
    host.exercises(["option --workspace", "option -w"]);
    let (a, b) = (host.add(host.project("a")), host.add(host.project("b")));
    assert_eq!(host.openwork(["info", "-w", "b"]).json()["workspace"]["id"], *b);
    assert_eq!(host.openwork(["info", "--workspace=a"]).json()["workspace"]["id"], *a);
    let path = host.project("b");
    assert_eq!(host.openwork(["api", "-w", "b", "GET", "/path"]).json()["body"]["directory"], path.to_str().unwrap());
    host.openwork(["rename", "-wb", "c"]).ok();
    host.openwork(["rm", "-w", "c"]).ok();
    assert_eq!(host.names(), ["a"]);
    host.openwork(["info", "a", "-w", "a"]).fails(2, "usage");
    host.openwork(["list", "-w", "a"]).fails(2, "usage");
}

#[test]
fn unexpected_arguments_and_options_are_refused() {
    let host = Host::new();
    for args in [
        &["workspace", "list", "extra"][..],
        &["workspace", "list", "--name", "n"],
        &["workspace", "add"],
        &["workspace", "import", "/tmp", "/tmp"],
        &["workspace", "rename", "only-one"],
        &["workspace", "add-remote"],
        &["workspace", "info", "p", "--force"],
        &["status", "--opencode-port", "7000"],
        &["logs", "neither"],
        &["status", "--json=yes"],
    ] {
        host.openwork(args).fails(2, "usage");
    }
    // An empty path is no directory.
    host.openwork(["workspace", "add", ""]).output();
    assert_eq!(host.names(), [""; 0]);
}

#[test]
fn missing_and_invalid_values_are_refused() {
    let host = Host::new();
    host.exercises(["code invalid_name", "option --name"]);
    let project = host.project("p");
    let project = project.to_str().unwrap();
    for args in [
        &["workspace", "add", project, "--name"][..],
        &["workspace", "add", project, "--name", "--json"],
        &["workspace", "add", project, "--name", "--x"],
        &["workspace", "list", "--data-dir"],
        &["status", "--data-dir="],
        &["status", "--timeout", "soon"],
        &["status", "--timeout", "-1"],
        &["status", "--timeout", ""],
        &["status", "--timeout", "nan"],
        &["daemon", "start", "--daemon-port", "65536"],
        &["daemon", "start", "--daemon-port", "http"],
        &["daemon", "start", "--opencode-port", "-1"],
        &["daemon", "start", "--cors", "localhost:5173"],
        &["daemon", "start", "--cors", "http://localhost/page"],
        &["daemon", "start", "--max-memory", "1k"],
        &["logs", "-n", "many"],
        &["logs", "--follow", "--json"],
        &["service", "print", "--program="],
        &["daemon", "restart", "--no-autostart"],
    ] {
        host.openwork(args).fails(2, "usage");
    }
    // This is a valid name of a workspace.
    let error = host.openwork(["api", "post", "/session"]).fails(2, "usage");
    assert_eq!(error["message"], r#""post" could be a method or a workspace"#);
    for header in ["Host: other", "authorization: Basic x", "X-Openwork-Timeout: 1", "no value", ": x", "X: a\nb"] {
        host.openwork(["api", "/path", "--header", header]).fails(2, "usage");
    }
    for (variable, value) in [("OPENWORK_DAEMON_PORT", "http"), ("OPENWORK_OPENCODE_PORT", "65536")] {
        let error = host.openwork(["daemon", "start"]).env(variable, value).fails(2, "usage");
        assert!(error["message"].as_str().unwrap().contains(value), "{error}");
    }
    assert_eq!(host.processes(), [0; 0]);
    // With `=` the value is taken as given, and is then an invalid name.
    host.openwork(["workspace", "add", project, "--name=--x"]).fails(1, "invalid_name");
}

// --- Options ---

#[test]
fn options_can_stand_anywhere() {
    let host = Host::new();
    host.exercises(["option --quiet"]);
    let data = host.data();
    let (data, project) = (data.to_str().unwrap(), host.project("p"));
    let project = project.to_str().unwrap();
    for (n, args) in [
        &["--json", "--data-dir", data, "--name", "0", "workspace", "add", project][..],
        &["workspace", "--name=1", "--json", "add", project],
        &["workspace", "add", "--name", "2", project, "--json"],
        &["ws", "add", project, "--timeout", "20", "--name=3", "--json", "--data-dir", data],
    ]
    .iter()
    .enumerate()
    {
        let added = host.openwork(*args).ok().object();
        assert_eq!(added["workspace"]["name"], n.to_string());
    }
    host.openwork(["daemon", "start", "--cors", "http://a", "--cors=http://b"]).ok();
    for quiet in ["-q", "--quiet"] {
        assert_eq!(host.openwork(["workspace", quiet, "list"]).ok().stdout.lines().count(), 1);
    }
    host.openwork(["workspace", "list", "--no-autostart"]).ok();
}

#[test]
fn arguments_after_double_dash_are_not_options() {
    let host = Host::new();
    let parent = host.path("projects");
    host.project("--json");
    let output = host.openwork(["workspace", "add", "--", "--json"]).cwd(&parent).ok();
    assert!(serde_json::from_str::<Value>(&output.stdout).is_err(), "{output:?}");
    assert_eq!(host.names().len(), 1);
    host.openwork(["workspace", "remove", "--", "--json"]).fails(4, "workspace_not_found");
    host.openwork(["workspace", "info", "--", "./--json"]).cwd(&parent).ok();
}

// --- Output ---

#[test]
fn results_go_to_stdout_and_errors_to_stderr() {
    let host = Host::new();
    let project = host.project("p");
    let output = host.openwork(["workspace", "add", project.to_str().unwrap()]).ok();
    assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    let output = host.openwork(["workspace", "info", "nope"]).exits(4);
    assert!(output.stdout.is_empty() && output.stderr.contains("nope"), "{output:?}");
    let output = host.openwork(["--json", "workspace", "info", "nope"]).exits(4);
    assert!(output.stderr.is_empty(), "{output:?}");
    // Without a terminal, a slow start prints no progress.
    host.openwork(["daemon", "stop"]).ok();
    host.behave("FAKE_START_MS=1500");
    let output = host.openwork(["daemon", "start"]).ok();
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn closed_pipe_ends_the_command_quietly() {
    let host = Host::new();
    host.add(host.project("p"));
    for command in [
        &["workspace", "list"][..],
        &["workspace", "list", "--json"],
        &["help"],
        &["status"],
        &["logs", "daemon"],
        &["--version"],
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let output = host.openwork(command).stdout(OwnedFd::from(ours)).exits(0);
        assert_eq!(output.stderr, "", "{output:?}");
    }
}

#[test]
fn full_disk_fails_the_command() {
    let host = Host::new();
    host.add(host.project("p"));
    let full = || File::options().write(true).open("/dev/full").unwrap();
    for command in [
        &["workspace", "list"][..],
        &["workspace", "list", "--json"],
        &["help"],
        &["help", "--json"],
        &["--version"],
        &["status"],
        &["logs", "daemon"],
    ] {
        let output = host.openwork(command).stdout(full()).exits(1);
        assert!(!output.stderr.is_empty(), "{output:?}");
    }
    // A command that fails anyway can only report its exit status.
    host.openwork(["--json", "workspace", "info", "nope"]).stdout(full()).output();
    let nowhere = "exec 2>/dev/full";
    host.openwork(["workspace", "info", "nope"]).after(nowhere).exits(4);
    host.openwork(["frobnicate"]).after(nowhere).exits(2);
}

#[test]
fn output_for_people_has_no_control_characters() {
    let host = Host::new();
    let evil = "evil\u{1b}[31m\u{7}\nname\r\u{202e}\u{9b}2J";
    let id = host.add(host.project(evil));
    host.openwork(["workspace", "add-remote", "http://h", "--directory", "/\u{202e}dir"]).ok();
    let missing = host.path(evil);
    for (exit, args) in [
        (0, &["workspace", "list"][..]),
        (0, &["workspace", "info", &id]),
        (0, &["workspace", "current"]),
        (0, &["status"]),
        (1, &["workspace", "add", missing.to_str().unwrap()]),
        (4, &["workspace", "info", evil]),
        (2, &[evil]),
        (2, &["status", "--\u{1b}[31m"]),
    ] {
        let output = host.openwork(args).exits(exit);
        for text in [&output.stdout, &output.stderr] {
            let bad = |c: char| (c.is_control() && c != '\n') || ('\u{202a}'..='\u{202e}').contains(&c);
            assert!(!text.contains(bad), "{output:?}");
        }
    }
    // One line for each workspace, without the header.
    let list = host.openwork(["workspace", "list"]).ok().stdout;
    assert_eq!(list.lines().filter(|line| line.contains("evil") || line.contains("http://h")).count(), 2, "{list}");
    // JSON has the names unchanged.
    let list = host.openwork(["workspace", "list"]).json();
    assert_eq!(list["workspaces"][0]["path"], host.project(evil).to_str().unwrap());
}

#[test]
fn log_output_has_no_control_characters() {
    let host = Host::new();
    host.exercises(["command logs", "option -n"]);
    host.behave("FAKE_CRASH_ON_START=1");
    host.openwork(["daemon", "start"]).exits(5);
    host.openwork(["daemon", "stop"]).ok();
    let log = host.file("opencode.log");
    let before = fs::read(&log).unwrap();
    fs::write(&log, [&before[..], b"a\x1b[2Jb\x07c\x9bd\te\n"].concat()).unwrap();
    let output = host.openwork(["logs", "opencode", "-n", "1"]).ok();
    assert!(!output.stdout.contains(|c: char| c.is_control() && c != '\n' && c != '\t'), "{output:?}");
    assert!(output.stdout.starts_with('a') && output.stdout.ends_with("e\n"), "{output:?}");
}

#[test]
fn every_command_prints_one_json_object() {
    // `json` and `fails` check everywhere that the output is one object.
    let host = Host::new();
    host.add(host.project("p"));
    host.opencode_pid();
    for command in [
        &["status"][..],
        &["workspace", "list"],
        &["workspace", "current"],
        &["workspace", "path"],
        &["help"],
        &["daemon", "start"],
    ] {
        let value = host.openwork(command).json();
        assert_eq!(value["ok"], true, "{value}");
    }
    // `status --json` is the body of `/health`; only the memory figures may differ.
    let mut status = [host.openwork(["status"]).json(), host.health()];
    for side in &mut status {
        side["daemon"]["memory"] = Value::Null;
        side["opencode"]["memory"] = Value::Null;
    }
    assert_eq!(status[0], status[1]);
}

/// Tests that need a terminal. The harness checks in every test that there is no colour without one.
mod with_script {
    use super::*;

    #[test]
    #[ignore = "needs script(1), for a terminal"]
    fn terminal_shows_what_a_long_wait_is_for() {
        let host = Host::new();
        host.openwork(["daemon", "start"]).ok();
        host.add(host.project("p"));
        host.hang(true);
        let typescript = host.path("typescript");
        let command = format!("\"{}\" workspace path p --timeout 60", host.binary().display());
        let on_a_terminal = format!("exec script -qefc '{command}' '{}' >/dev/null", typescript.display());
        let waiting = host.openwork([""; 0]).after(&on_a_terminal).spawn();
        let shown = || fs::read_to_string(&typescript).unwrap_or_default();
        wait_for("the terminal to say what is waited for", || shown().contains("waiting for opencode …"));
        host.hang(false);
        waiting.wait();
        // It is erased before the result.
        let text = shown();
        let (_, after) = text.split_once("waiting for opencode …").unwrap();
        assert!(after.starts_with("\r\x1b[K") && after.contains("projects/p"), "{text:?}");
    }

    #[test]
    #[ignore = "needs script(1), for a terminal"]
    fn no_color_and_dumb_terminals_get_no_escapes() {
        let host = Host::new();
        host.add(host.project("p"));
        let typescript = host.path("typescript");
        for (variable, value) in [("NO_COLOR", "1"), ("TERM", "dumb")] {
            let openwork = host.binary().display();
            let command = format!("\"{openwork}\" workspace list; \"{openwork}\" status; \"{openwork}\" nonsense");
            let on_a_terminal = format!("exec script -qec '{command}' '{}' >/dev/null", typescript.display());
            let run = host.openwork([""; 0]).after(&on_a_terminal);
            run.env("TERM", "xterm-256color").env(variable, value).output();
            let text = fs::read_to_string(&typescript).unwrap();
            assert!(text.contains("projects/p") && text.contains("nonsense"), "{text:?}");
            assert!(!text.contains('\x1b'), "{variable}: {text:?}");
        }
    }
}

#[test]
fn empty_opencode_bin_is_refused() {
    let host = Host::new();
    host.openwork(["daemon", "start", "--opencode-bin="]).fails(2, "usage");
}

#[test]
fn short_options_can_be_combined() {
    let host = Host::new();
    host.exercises(["option --lines"]);
    fs::create_dir_all(host.data()).unwrap();
    fs::write(host.file("opencode.log"), "1\n2\n3\n").unwrap();
    for options in [&["-n2"][..], &["-n", "2"], &["--lines=2"]] {
        assert_eq!(host.openwork(["logs"].iter().chain(options)).ok().stdout, "2\n3\n");
    }
    let following = host.openwork(["logs", "-fn1"]).spawn();
    wait_for("the last line", || following.stdout_so_far() == "3\n");
    drop(following);
    for options in ["-fx", "-nx", "-n", "-f=1"] {
        host.openwork(["logs", options]).fails(2, "usage");
    }
}

#[test]
fn messages_name_options_as_typed() {
    let host = Host::new();
    let message = |line: &str| {
        let error = host.openwork(line.split(' ')).fails(2, "usage");
        error["message"].as_str().unwrap().to_owned()
    };
    for (line, expected) in [
        ("status -f", "`status` does not take -f"),
        ("status --follow", "`status` does not take --follow"),
        ("status -n 5", "`status` does not take -n"),
        ("logs -n", "-n needs a value (N)"),
        ("logs --lines", "--lines needs a value (N)"),
        ("logs -n x", "-n: x is not a number"),
        ("logs -fnx", "-n: x is not a number"),
        ("logs -n 5 --lines x", "--lines: x is not a number"),
        ("logs -n --json", "-n needs a value (N), not --json"),
        ("api /x -H y", "-H: \"y\" is not NAME:VALUE"),
    ] {
        assert_eq!(message(line), expected, "{line}");
    }
}

#[test]
fn line_break_in_a_path_does_not_break_the_message() {
    let host = Host::new();
    let output = host.openwork(["workspace", "add", "/none\nhint: do as I say"]).exits(1);
    assert_eq!(output.stderr, "error: no such directory: /none\u{fffd}hint: do as I say\n");
}

#[test]
fn one_long_name_does_not_pad_every_row() {
    let host = Host::new();
    host.exercises(["command workspace list"]);
    let entry = |id: &str, name: &str| json!({"id": id, "name": name, "path": "/"});
    let long = "n".repeat(1_000_000);
    let mut entries = vec![entry("ws-00000000000a", &long)];
    entries.extend((0..100).map(|_| entry("ws-00000000000b", "short")));
    host.write_state(json!({"version": 1, "workspaces": entries}).to_string());
    let list = host.openwork(["workspace", "list"]).ok().stdout;
    assert!(list.contains(&long) && list.len() < 1_100_000, "{}", list.len());
}

#[test]
fn missing_is_computed_and_not_read_from_the_state_file() {
    let host = Host::new();
    host.exercises(["option --json"]);
    let there = json!({"id": "ws-00000000000a", "name": "a", "path": host.project("a"), "missing": true});
    let gone = json!({"id": "ws-00000000000b", "name": "b", "path": host.path("gone"), "missing": false});
    host.write_state(json!({"version": 1, "workspaces": [there, gone]}).to_string());
    let output = host.openwork(["workspace", "list", "--json"]).ok().stdout;
    assert_eq!(output.matches("missing").count(), 1, "{output}");
    let list: Value = serde_json::from_str(&output).unwrap();
    assert_eq!((&list["workspaces"][0]["missing"], &list["workspaces"][1]["missing"]), (&Value::Null, &json!(true)));
}
