//! OpenCode's own calls and clients: `api`, `env`, `attach`, `run`.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{EVENTS, Host, IS_V2, LOADING_CALL, SESSIONS, Signal, copy_program, kill, wait_for};

/// A host with two workspaces, `p`, which is active, and `q`.
fn host() -> Host {
    let host = Host::new();
    host.add(host.project("p"));
    host.add(host.project("q"));
    host
}

/// Runs `api` with these arguments and returns the JSON reply.
fn api(host: &Host, args: &[&str]) -> Value {
    let output = host.openwork(["api"].iter().chain(args)).ok();
    assert_eq!(output.stderr, "", "{output:?}");
    serde_json::from_str(&output.stdout).unwrap()
}

fn header<'a>(echo: &'a Value, name: &str) -> Option<&'a str> {
    let mut headers = echo["headers"].as_array().unwrap().iter();
    let found = headers.find(|header| header[0].as_str().unwrap().eq_ignore_ascii_case(name));
    found.map(|header| header[1].as_str().unwrap())
}

// --- api ---

#[test]
fn api_makes_any_call() {
    let host = host();
    host.exercises(["command api"]);
    let directory = |answer: Value| answer["directory"].as_str().unwrap().to_owned();
    let (p, q) = (host.project("p"), host.project("q"));
    assert_eq!(directory(api(&host, &[LOADING_CALL])), p.to_str().unwrap());
    assert_eq!(directory(api(&host, &["q", LOADING_CALL])), q.to_str().unwrap());
    assert_eq!(directory(api(&host, &["q", "GET", LOADING_CALL])), q.to_str().unwrap());
    assert_eq!(directory(api(&host, &["GET", LOADING_CALL])), p.to_str().unwrap());
    let output = host.openwork(["api", LOADING_CALL]).cwd(&q).env("OPENWORK_WORKSPACE", ".").ok();
    assert!(output.stdout.contains("projects/q"), "{output:?}");

    let got = api(&host, &["DELETE", "/echo?a=1&b=%20#"]);
    assert_eq!((&got["method"], header(&got, "content-length")), (&json!("DELETE"), Some("0")));
}

#[test]
fn api_body_is_text_file_or_stdin() {
    let host = host();
    host.exercises(["option --data", "option -d"]);
    let file = host.path("body");
    fs::write(&file, "of a file").unwrap();
    let from_file = format!("@{}", file.display());
    for (data, body) in [(r#"{"a": 1}"#, r#"{"a": 1}"#), ("", ""), (&from_file, "of a file")] {
        for option in ["-d", "--data"] {
            let got = api(&host, &["/echo", option, data]);
            assert_eq!((&got["method"], &got["body"]), (&json!("POST"), &json!(body)));
            assert_eq!(header(&got, "content-type"), Some("application/json"));
            assert_eq!(header(&got, "content-length"), Some(&*body.len().to_string()));
        }
    }
    assert_eq!(api(&host, &["PUT", "/echo", "-d", "x"])["method"], "PUT");

    // Standard input has no known length.
    let large = vec![b'i'; 3_000_000];
    fs::write(&file, &large).unwrap();
    let output = host.openwork(["api", "/upload", "-d", "@-"]).stdin(File::open(&file).unwrap()).ok();
    assert_eq!(output.stdout, r#"{"bytes":3000000}"#);
    assert_eq!(host.openwork(["api", "/upload", "-d", &from_file]).ok().stdout, r#"{"bytes":3000000}"#);
    for unreadable in ["@/does/not/exist", "@/proc", "@/proc/self/mem"] {
        host.openwork(["api", "/upload", "-d", unreadable]).fails(2, "usage");
    }
    // The size of a file in /proc says 0, whatever its content.
    let version = fs::read_to_string("/proc/version").unwrap();
    assert_eq!(api(&host, &["/echo", "-d", "@/proc/version"])["body"], version);
}

#[test]
fn method_can_be_given_as_an_option() {
    let host = host();
    host.exercises(["option --method", "option -X"]);
    for args in [&["-X", "DELETE", "/echo"][..], &["-XDELETE", "q", "/echo"], &["q", "/echo", "--method=delete"]] {
        assert_eq!(api(&host, args)["method"], "DELETE", "{args:?}");
    }
    // Unlike with curl, --method GET with a body stays a GET.
    assert_eq!(api(&host, &["-X", "PATCH", "/echo", "-d", "{}"])["method"], "PATCH");
    host.openwork(["api", "-X", "FETCH", "/echo"]).fails(2, "usage");
    // The word before the path is then a workspace, whatever its name.
    host.openwork(["api", "-X", "POST", "GET", "/echo"]).fails(4, "workspace_not_found");
}

#[test]
fn api_sends_and_shows_headers() {
    let host = host();
    host.exercises(["option --header", "option -H", "option --include", "option -i"]);
    let got = api(&host, &["/echo", "-d", "x", "-H", "X-A: b: c", "--header", "content-type:text/x"]);
    assert_eq!((header(&got, "x-a"), header(&got, "content-type")), (Some("b: c"), Some("text/x")));
    for option in ["-i", "--include"] {
        let output = host.openwork(["api", option, LOADING_CALL]).ok();
        let (head, body) = output.stdout.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("Content-Type: application/json"), "{head}");
        assert!(serde_json::from_str::<Value>(body).is_ok(), "{body}");
    }
    for bad in ["no colon", ": no name", "X: a\nInjected: b", "Bad Name: x"] {
        host.openwork(["api", "/echo", "-H", bad]).fails(2, "usage");
    }
}

#[test]
fn api_prints_the_body_unchanged() {
    let host = host();
    assert_eq!(host.openwork(["api", "/anything"]).ok().stdout, "<!doctype html>\n<html lang=\"en\"></html>\n");
    assert_eq!(host.openwork(["api", "/chunked"]).ok().stdout, "one two ");
    let downloaded = host.path("downloaded");
    host.openwork(["api", "/download?bytes=5000000"]).stdout(File::create(&downloaded).unwrap()).ok();
    assert_eq!(fs::metadata(&downloaded).unwrap().len(), 5_000_000);
    let full = File::options().write(true).open("/dev/full").unwrap();
    host.openwork(["api", "/download?bytes=5000000"]).stdout(full).exits(1);
    // A truncated body is a failure.
    let output = host.openwork(["api", "/die-mid"]).output();
    assert!(!output.status.success() && output.stdout == "half ", "{output:?}");
}

#[test]
fn api_prints_a_stream_as_it_arrives() {
    let host = host();
    let streaming = host.openwork(["api", EVENTS]).spawn();
    wait_for("the first event", || streaming.stdout_so_far().contains("server.connected"));
    host.openwork(["api", "POST", SESSIONS]).ok();
    wait_for("the next event", || streaming.stdout_so_far().contains("session.created"));
    kill(streaming.pid(), Signal::TERM);
    let output = streaming.wait();
    assert_eq!(output.stderr, "", "{output:?}");
    wait_for("the disconnect to reach opencode", || {
        host.recorded("streams").iter().any(|line| line.starts_with(&format!("close {EVENTS}")))
    });
    // A stream that opencode ends.
    let streaming = host.openwork(["api", EVENTS]).spawn();
    wait_for("the first event", || streaming.stdout_so_far().contains("server.connected"));
    host.end_streams("p");
    assert_eq!(streaming.wait().status.code(), Some(0));
}

#[test]
fn api_fails_on_an_error_status() {
    let host = host();
    host.opencode_pid();
    host.behave("FAKE_FAIL=/path");
    kill(host.opencode_pid(), Signal::KILL);
    wait_for("the next opencode", || host.starts().len() == 2 && host.phase() == "ready");
    // The body of an error reply is still printed.
    let output = host.openwork(["api", LOADING_CALL]).exits(1);
    assert_eq!(serde_json::from_str::<Value>(&output.stdout).unwrap()["name"], "UnknownError");
    let output = host.openwork(["api", LOADING_CALL, "--json"]).exits(1);
    let value = output.object();
    assert_eq!((&value["ok"], &value["status"]), (&json!(false), &json!(500)));

    let value = host.openwork(["api", "/echo"]).json();
    assert_eq!((&value["status"], &value["body"]["method"]), (&json!(200), &json!("GET")));
    assert_eq!(
        host.openwork(["api", "/anything"]).json()["body"].as_str().map(|html| html.starts_with('<')),
        Some(true)
    );
}

#[test]
fn api_reports_errors_of_openwork() {
    let host = host();
    host.openwork(["workspace", "add-remote", "http://h.example"]).ok();
    host.openwork(["api", "nope", LOADING_CALL]).fails(4, "workspace_not_found");
    host.openwork(["api", "h.example", LOADING_CALL]).fails(1, "workspace_is_remote");
    host.openwork(["api", "POST", "/die-first"]).fails(5, "opencode_error");
    for bad in [
        &["api"][..],
        &["api", "p"],
        &["api", "p", "path"],
        &["api", "p", "GET", "x", LOADING_CALL],
        &["api", "p", "G ET", LOADING_CALL],
        &["api", "/path\r\nX: y"],
    ] {
        host.openwork(bad).fails(2, "usage");
    }
    host.openwork(["daemon", "stop"]).ok();
    host.openwork(["api", LOADING_CALL, "--no-autostart"]).fails(3, "daemon_not_running");
    host.behave("FAKE_NEVER_LISTEN=1");
    host.openwork(["api", LOADING_CALL, "--timeout", "1"]).fails(5, "opencode_timeout");
}

// --- env ---

#[test]
fn env_configures_any_client() {
    let host = Host::new();
    host.exercises(["command env"]);
    let project = host.project("it's $HOME \"`x`\" \\ ünï");
    let id = host.add(&project);
    let run = host.openwork(["env"]).secret();
    let json = run.json();
    let url = format!("http://127.0.0.1:{}/w/{id}", host.port());
    for (name, value) in [
        ("OPENCODE_BASE_URL", url.as_str()),
        ("OPENCODE_SERVER_USERNAME", "opencode"),
        ("OPENCODE_SERVER_PASSWORD", &host.password()),
        ("OPENWORK_WORKSPACE", &id),
        ("OPENWORK_DIRECTORY", project.to_str().unwrap()),
    ] {
        assert_eq!(json[name], value, "{name}");
    }
    assert!(json["NO_PROXY"].as_str().unwrap().contains("127.0.0.1"));

    // A shell that evaluates the output gets the same values.
    let lines = host.openwork(["env"]).secret().ok().stdout;
    assert!(lines.lines().all(|line| line.starts_with("export ")), "{}", lines.lines().count());
    let script = format!(
        "{lines}\nprintf '%s|' \"$OPENCODE_BASE_URL\" \"$OPENWORK_WORKSPACE\" \"$OPENWORK_DIRECTORY\" \"$NO_PROXY\""
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let expected = format!("{url}|{id}|{}|{}|", project.display(), json["NO_PROXY"].as_str().unwrap());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);

    // The values work.
    host.routed("GET", &format!("/w/{id}/path")).send();
    let mut inside = host.openwork(["workspace", "info"]);
    inside = inside.env("OPENWORK_WORKSPACE", json["OPENWORK_WORKSPACE"].as_str().unwrap());
    assert_eq!(inside.json()["workspace"]["id"], *id);
}

#[test]
fn env_supports_other_shells() {
    let host = Host::new();
    host.exercises(["option --shell"]);
    host.add(host.project("it's a \\ p"));
    let fish = host.openwork(["env", "--shell", "fish"]).secret().ok().stdout;
    assert!(fish.lines().all(|line| line.starts_with("set -gx ")), "{}", fish.lines().count());
    assert!(fish.contains(r"it\'s a \\ p'"), "the quoting of fish");
    host.openwork(["env", "--shell", "powershell"]).fails(2, "usage");
    let kept = host.openwork(["env", "--json"]).env("NO_PROXY", "internal.example,localhost").secret().ok().object();
    assert_eq!(kept["NO_PROXY"], "internal.example,localhost,127.0.0.1,127.0.0.0/8");
}

#[test]
fn env_needs_a_local_workspace() {
    let host = Host::new();
    host.exercises(["code no_active_workspace", "code workspace_is_remote"]);
    host.openwork(["env"]).fails(4, "no_active_workspace");
    host.openwork(["workspace", "add-remote", "http://h.example"]).ok();
    host.openwork(["env"]).fails(1, "workspace_is_remote");
    let gone = host.project("gone");
    host.add(&gone);
    fs::remove_dir(&gone).unwrap();
    host.openwork(["env", "gone"]).fails(1, "path_not_found");
}

// --- attach, run ---

/// The arguments and the environment of the last opencode client.
fn client(host: &Host) -> (Vec<String>, Vec<String>) {
    let calls = host.recorded("clients");
    let call: Value = serde_json::from_str(calls.last().unwrap()).unwrap();
    let argv = call["argv"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap().to_owned()).collect();
    (argv, host.environment(call["pid"].as_u64().unwrap() as u32))
}

fn check_client(host: &Host, directory: &Path, command: &str, after: &[&str]) {
    let (argv, environment) = client(host);
    let id = host.openwork(["workspace", "info", directory.to_str().unwrap()]).json()["workspace"]["id"].clone();
    let url = format!("http://127.0.0.1:{}/w/{}", host.port(), id.as_str().unwrap());
    let directory = directory.to_str().unwrap();
    let expected = match (command, IS_V2) {
        ("attach", false) => [&["attach", &url, "--dir", directory], after].concat(),
        ("run", false) => [&["run", "--attach", &url, "--dir", directory], after].concat(),
        ("attach", true) => [&["--server", &url], after].concat(),
        ("run", true) => [&["run", "--server", &url], after].concat(),
        _ => panic!("{command}"),
    };
    assert_eq!(argv, expected);
    let has = |variable: String| environment.contains(&variable);
    assert!(has(format!("OPENCODE_SERVER_PASSWORD={}", host.password())));
    assert!(has("OPENCODE_SERVER_USERNAME=opencode".to_owned()));
    if IS_V2 {
        assert!(has(format!("OPENCODE_PASSWORD={}", host.password())));
        assert!(has(format!("PWD={directory}")));
    }
    assert!(environment.iter().any(|variable| variable.starts_with("NO_PROXY=") && variable.contains("127.0.0.1")));
}

#[test]
fn attach_starts_opencode_in_the_workspace() {
    let host = host();
    host.exercises(["command attach"]);
    let output = host.openwork(["attach"]).on_terminal("").ok();
    assert!(output.stdout.starts_with(if IS_V2 { "fake: --server " } else { "fake: attach " }), "{output:?}");
    check_client(&host, &host.project("p"), "attach", &[]);
    host.openwork(["attach", "q", "--", "--continue", "--json", "--"]).on_terminal("").ok();
    check_client(&host, &host.project("q"), "attach", &["--continue", "--json", "--"]);
}

#[test]
fn run_starts_opencode_in_the_workspace() {
    let host = host();
    host.exercises(["command run"]);
    host.openwork(["run", "--", "say hello", "-x"]).ok();
    check_client(&host, &host.project("p"), "run", &["say hello", "-x"]);
    host.openwork(["run", "q", "--", "say hello"]).ok();
    check_client(&host, &host.project("q"), "run", &["say hello"]);
}

#[test]
fn exit_status_of_opencode_is_passed_on() {
    let host = host();
    host.opencode_pid();
    host.behave("FAKE_CLIENT_EXIT=42");
    host.openwork(["run", "--", "x"]).exits(42);
    host.openwork(["attach"]).on_terminal("").exits(42);
}

#[test]
fn attach_and_run_fail_without_opencode() {
    let host = host();
    host.openwork(["attach", "nope"]).on_terminal("").fails(4, "workspace_not_found");
    host.openwork(["run", "nope", "--", "x"]).fails(4, "workspace_not_found");
    host.openwork(["daemon", "stop"]).ok();
    host.behave("FAKE_AUTH=reject");
    host.openwork(["attach"]).on_terminal("").fails(5, "opencode_auth_failed");
    assert_eq!(host.recorded("clients"), [""; 0]);
}

#[test]
fn api_shows_a_reply_that_comes_before_the_body_is_sent() {
    let host = host();
    let file = host.path("large");
    fs::write(&file, vec![b'b'; 20_000_000]).unwrap();
    let raw = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 9\r\n\r\ntoo large";
    let target = format!("/raw?reply={}", raw.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>());
    let output = host.openwork(["api", "p", &target, "--data", &format!("@{}", file.display())]).output();
    assert_eq!((output.status.code(), &*output.stdout), (Some(1), "too large"), "{output:?}");
    // A device has no length.
    assert_eq!(api(&host, &["p", "POST", "/echo", "--data", "@/dev/null"])["length"], 0);
}

#[test]
fn head_requests_report_errors() {
    let host = host();
    host.openwork(["api", "nope", "HEAD", LOADING_CALL]).fails(4, "workspace_not_found");
    host.openwork(["workspace", "remove", "p"]).ok();
    host.openwork(["api", "HEAD", LOADING_CALL]).fails(4, "no_active_workspace");
    host.openwork(["api", "q", "HEAD", LOADING_CALL]).ok();
}

#[test]
fn timeout_covers_the_whole_reply() {
    let host = host();
    let output = host.openwork(["api", EVENTS, "--timeout", "1"]).exits(5);
    assert!(output.stdout.contains("server.connected"), "{output:?}");
    host.openwork(["api", EVENTS, "--timeout", "1"]).fails(5, "opencode_timeout");
}

#[test]
fn given_header_replaces_the_default() {
    let host = host();
    let got = api(&host, &["/echo", "-H", "Accept: text/plain"]);
    let accepted = got["headers"].as_array().unwrap().iter().filter(|header| header[0] == "Accept");
    assert_eq!(accepted.map(|header| header[1].as_str().unwrap()).collect::<Vec<_>>(), ["text/plain"]);
}

#[test]
fn env_keeps_no_proxy_entries() {
    let host = host();
    let no_proxy = |upper: &str, lower: &str| {
        let env = host.openwork(["env"]).env("NO_PROXY", upper).env("no_proxy", lower).secret().json();
        assert_eq!(env["NO_PROXY"], env["no_proxy"]);
        env["NO_PROXY"].as_str().unwrap().to_owned()
    };
    assert_eq!(no_proxy("", ".corp"), ".corp,127.0.0.1,localhost,127.0.0.0/8");
    assert_eq!(no_proxy("a, localhost", "b,a"), "a,localhost,b,127.0.0.1,127.0.0.0/8");
}

#[test]
fn moved_opencode_is_looked_up_again() {
    let mut host = Host::new();
    let (bin, other) = (host.project("bin"), host.project("other"));
    copy_program(Path::new(host.get("OPENWORK_OPENCODE_BIN")), &bin.join("opencode"));
    host.unset("OPENWORK_OPENCODE_BIN");
    host.set("PATH", &bin);
    let project = host.project("p");
    host.add(&project);
    host.openwork(["attach"]).on_terminal("").ok();
    fs::rename(bin.join("opencode"), other.join("opencode")).unwrap();
    for command in ["attach", "run"] {
        let error = host.openwork([command]).on_terminal("").fails(5, "opencode_not_found");
        assert!(error["message"].as_str().unwrap().contains(bin.to_str().unwrap()), "{error}");
    }
    host.set("PATH", &other);
    host.openwork(["attach"]).on_terminal("").ok();
    check_client(&host, &project, "attach", &[]);
}

/// Ctrl-Z and fg interrupt a read that has a timeout.
#[test]
fn api_survives_being_suspended() {
    let host = Host::new();
    host.add(host.project("p"));
    host.openwork(["daemon", "start"]).ok();
    let call = host.openwork(["api", EVENTS, "--timeout", "60"]).spawn();
    wait_for("the stream", || call.stdout_so_far().contains("server.connected"));
    for _ in 0..3 {
        kill(call.pid(), Signal::STOP);
        let stat = format!("/proc/{}/stat", call.pid());
        wait_for("the pause", || fs::read_to_string(&stat).unwrap().contains(") T "));
        kill(call.pid(), Signal::CONT);
        wait_for("the end of the pause", || !fs::read_to_string(&stat).unwrap().contains(") T "));
    }
    // The stream stays open.
    host.openwork(["workspace", "path", "p"]).ok();
    host.openwork(["instance", "dispose", "--force"]).ok();
    let disposal = if IS_V2 { "location.shutdown" } else { "server.instance.disposed" };
    wait_for("an event after the pause", || call.stdout_so_far().contains(disposal));
    kill(call.pid(), Signal::TERM);
    call.wait();
}

#[test]
fn unknown_arguments_go_to_opencode() {
    let host = Host::new();
    let (p, q) = (host.project("p"), host.project("q"));
    host.add(&p);
    host.add(&q);
    for (line, directory, after) in [
        (&["attach", "-c"][..], &p, &["-c"][..]),
        (&["attach", "q", "--continue", "--json"], &q, &["--continue", "--json"]),
        (&["attach", "--timeout", "60", "q", "--no-autostart", "-s", "x"], &q, &["-s", "x"]),
        (&["attach", "-w", "q", "-c"], &q, &["-c"]),
    ] {
        host.openwork(line).on_terminal("").ok();
        check_client(&host, directory, "attach", after);
    }
    for (line, directory, after) in [
        (&["run", "fix the test"][..], &p, &["fix the test"][..]),
        (&["run", "fix", "-w", "q", "--help"], &p, &["fix", "-w", "q", "--help"]),
        (&["run", "-m", "x/y", "hi", "--", "--json"], &p, &["-m", "x/y", "hi", "--", "--json"]),
        (&["run", "-w", "q", "--timeout=60", "-f", "file", "hi"], &q, &["-f", "file", "hi"]),
        (&["--timeout", "60", "run", "q", "--", "hi", "-x"], &q, &["hi", "-x"]),
        (&["run", "--", "q"], &p, &["q"]),
    ] {
        host.openwork(line).ok();
        check_client(&host, directory, "run", after);
    }
    // Before opencode's first argument, --help is ours.
    for line in [&["run", "--help"][..], &["attach", "-h"]] {
        assert!(host.openwork(line).ok().stdout.contains("usage: openwork "), "{line:?}");
    }
    host.openwork(["run", "nope", "--", "x"]).fails(4, "workspace_not_found");
}

#[test]
fn without_a_terminal_there_is_no_interface() {
    let host = host();
    let before = host.recorded("clients").len();
    let error = host.openwork(["attach", "p"]).fails(2, "usage");
    assert!(error["message"].as_str().unwrap().contains("standard input is none"), "{error}");
    assert!(error["hint"].as_str().unwrap().contains("`openwork run MESSAGE`"), "{error}");
    let pipe = host.openwork(["attach"]).on_terminal("").stdout(std::process::Stdio::piped()).exits(2);
    assert!(pipe.stderr.contains("standard output is none"), "{pipe:?}");
    // Refused before anything is done.
    host.openwork(["open"]).cwd(host.project("new")).fails(2, "usage");
    assert_eq!((host.names(), host.recorded("clients").len()), (vec!["p".to_owned(), "q".to_owned()], before));
    // opencode's help needs no terminal.
    host.openwork(["attach", "p", "--", "--help"]).ok();
    check_client(&host, &host.project("p"), "attach", &["--help"]);
}

#[test]
fn attach_and_run_use_the_working_directory() {
    let host = Host::new();
    let (p, q) = (host.project("p"), host.project("q"));
    host.add(&p);
    let id = host.add(&q);
    let inside = host.project("q/src");
    host.openwork(["attach"]).on_terminal("").cwd(&inside).ok();
    check_client(&host, &q, "attach", &[]);
    host.openwork(["run", "hi"]).cwd(&q).ok();
    check_client(&host, &q, "run", &["hi"]);
    // The option wins over the directory, and so does the variable.
    host.openwork(["run", "-w", "p", "hi"]).cwd(&inside).ok();
    check_client(&host, &p, "run", &["hi"]);
    host.openwork(["attach"]).on_terminal("").cwd(&p).env("OPENWORK_WORKSPACE", &id).ok();
    check_client(&host, &q, "attach", &[]);
    // Outside every workspace it is the active one; other commands use the active one everywhere.
    host.openwork(["attach"]).on_terminal("").cwd(host.home()).ok();
    check_client(&host, &p, "attach", &[]);
    let url = host.openwork(["env"]).cwd(&inside).secret().json();
    assert_eq!(url["OPENWORK_DIRECTORY"], p.to_str().unwrap());
}
