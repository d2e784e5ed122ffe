//! OpenCode's sessions: list, abort, and wait.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::sessions::{ids, wait_until_asked, web_and_api};
use crate::support::{Host, read_reply, wait_for};

#[test]
fn running_sessions_are_listed_first() {
    let (host, web, _) = web_and_api();
    host.exercises(["command session list", "route GET /workspaces/:id/sessions", "option -q"]);
    let list = host.openwork(["session", "list", "web"]).json();
    assert_eq!(ids(&list), ["ses_old", "ses_fake"], "by the time of their last change");
    host.busy(&[&web]);
    let list = host.openwork(["session", "list", "web"]).json();
    assert_eq!(ids(&list), ["ses_fake", "ses_old"]);
    let running = &list["sessions"][0];
    assert_eq!(
        (&running["state"], &running["title"], &running["updatedAt"], &running["workspace"]["name"]),
        (&json!("running"), &json!("mend {it}"), &json!(1_700_000_000_000_u64), &json!("web"))
    );
    assert_eq!((&list["sessions"][1]["state"], &list["sessions"][1]["title"]), (&json!("idle"), &Value::Null));
    assert_eq!(host.openwork(["session", "list", "-w", "web", "-q"]).ok().stdout, "ses_fake\nses_old\n");
    let table = host.openwork(["session", "list", "web"]).ok().stdout;
    assert!(table.lines().next().unwrap().starts_with("ID "), "{table}");
    assert!(table.lines().nth(1).unwrap().contains("mend {it}"), "{table}");
    assert_eq!(host.http("GET", "/workspaces/web/sessions").ok()["sessions"], list["sessions"]);
}

#[test]
fn empty_list_of_sessions_says_so() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    // Nothing is loaded, so nothing is asked.
    assert_eq!(host.openwork(["session", "list", "--all"]).ok().stdout, "no sessions\n");
    assert_eq!(host.openwork(["session", "list", "--all", "--quiet"]).ok().stdout, "");
}

/// opencode's list has only the latest, and those of directories that contain the one asked for.
#[test]
fn session_list_has_running_ones_and_no_other_directories() {
    let (host, web, _) = web_and_api();
    host.busy(&[&web]);
    let other = json!([{"id": "ses_other", "title": "t", "directory": "/elsewhere", "time": {"updated": 2}}]);
    host.answer("/session", &other.to_string());
    let list = host.openwork(["session", "list", "-w", "web"]).json();
    assert_eq!(ids(&list), ["ses_fake"]);
    let session = &list["sessions"][0];
    assert_eq!((&session["state"], &session["title"]), (&json!("running"), &json!("mend {it}")), "{session}");
}

#[test]
fn sessions_cannot_be_listed_before_opencode_is_ready() {
    let host = Host::new();
    host.hold(true);
    let starting = host.openwork(["daemon", "start"]).spawn();
    wait_for("the daemon to listen", || host.lock_text().is_some());
    wait_for("opencode to be starting", || host.phase() == "starting");
    let list = || host.http("GET", "/sessions").header("X-Openwork-Timeout", "0.3");
    list().fails(504, "opencode_timeout");
    host.hold(false);
    assert!(starting.wait().status.success());
    assert_eq!(list().ok()["sessions"], json!([]));
}

#[test]
fn wait_fails_without_a_list_of_running_sessions() {
    let (host, web, _) = web_and_api();
    host.busy(&[&web]);
    host.answer("/session/status", "[]");
    host.openwork(["wait", "web"]).fails(5, "opencode_error");
    // Sessions were running at the last answer.
    host.answer("", "");
    let waiting = host.openwork(["wait", "web", "--timeout", "3", "--json"]).spawn();
    wait_until_asked(&host);
    host.hang(true);
    let error = waiting.wait().object();
    host.hang(false);
    assert_eq!(error["error"]["code"], "still_busy", "{error}");
}

#[test]
fn session_list_uses_the_working_directory() {
    let (host, web, api) = web_and_api();
    host.openwork(["workspace", "switch", "web"]).ok();
    let of = |directory: &PathBuf| {
        let list = host.openwork(["session", "list"]).cwd(directory).json();
        list["sessions"][0]["workspace"]["name"].clone()
    };
    assert_eq!([of(&web), of(&api), of(&host.home())], ["web", "api", "web"]);
}

#[test]
fn listing_all_sessions_loads_nothing() {
    let (host, web, api) = web_and_api();
    host.exercises(["route GET /sessions", "option --all"]);
    host.busy(&[&web]);
    for list in [host.openwork(["session", "list", "--all"]).json(), host.http("GET", "/sessions").ok()] {
        assert_eq!(ids(&list), ["ses_fake", "ses_old"]);
    }
    assert!(host.instance(&api).is_empty());
    host.openwork(["session", "list", "web", "--all"]).fails(2, "usage");
    // A client that calls opencode directly has loaded a directory that is no workspace.
    let stranger = host.project("stranger");
    host.wait_for_subscription();
    host.opencode("POST", &format!("/session?directory={}", stranger.display())).send();
    let of_stranger = || {
        let list = host.openwork(["session", "list", "--all"]).json();
        let sessions = list["sessions"].as_array().unwrap().clone();
        sessions.into_iter().find(|session| session["directory"] == stranger.to_str().unwrap())
    };
    wait_for("the daemon to know of it", || of_stranger().is_some());
    assert_eq!(of_stranger().unwrap()["workspace"], Value::Null);
}

#[test]
fn abort_ends_the_running_turn() {
    let (host, web, _) = web_and_api();
    host.exercises(["command session abort", "route POST /sessions/:id/abort", "code session_not_found"]);
    host.busy(&[&web]);
    let reply = host.openwork(["session", "abort", "ses_fake"]).json();
    assert_eq!((&reply["aborted"], &reply["session"]["id"]), (&json!(true), &json!("ses_fake")));
    assert_eq!(reply["session"]["workspace"]["name"], "web");
    assert_eq!(host.openwork(["instance", "list"]).json()["instances"][0]["state"], "warm");

    let reply = host.openwork(["session", "abort", "ses_fake"]).ok();
    assert_eq!(reply.stdout, "no turn is running in mend {it} (ses_fake) in web\n");
    assert_eq!(host.http("POST", "/sessions/ses_fake/abort").ok()["aborted"], false);
    for unknown in ["ses_none", "nosuch", "-", "../x"] {
        let error = host.openwork(["session", "abort", unknown]).fails(4, "session_not_found");
        assert_eq!(error["hint"], "`openwork session list` shows the sessions of a workspace");
    }
}

#[test]
fn removing_a_workspace_names_its_running_sessions() {
    let (host, web, api) = web_and_api();
    host.busy(&[&web]);
    // No session runs in the other workspace.
    assert_eq!(host.openwork(["workspace", "remove", "api"]).ok().stderr, "");
    host.add(&api);
    let output = host.openwork(["workspace", "remove", "web", "api"]).ok();
    assert_eq!(
        output.stderr,
        format!(
            "mend {{it}} is still running in web ({}), and goes on: `openwork session list --all` shows it, `openwork \
             session abort <id>` ends it\n",
            web.display()
        )
    );
    // The turn still runs, and can be ended.
    assert_eq!(host.openwork(["session", "list", "--all"]).json()["sessions"][0]["state"], "running");
    assert_eq!(host.openwork(["session", "abort", "ses_fake"]).json()["aborted"], true);
}

#[test]
fn wait_returns_when_sessions_are_idle() {
    let (host, web, api) = web_and_api();
    host.exercises(["command wait", "route GET /idle", "route GET /workspaces/:id/idle", "code still_busy"]);
    host.busy(&[&web]);
    // No session runs in the other workspace, and asking does not load it.
    host.openwork(["wait", "api"]).ok();
    assert!(host.instance(&api).is_empty());
    host.http("GET", "/workspaces/api/idle").ok();

    let error = host.openwork(["wait", "web", "--timeout", "0.3"]).fails(1, "still_busy");
    assert_eq!(error["message"], "web: 1 session still running at the deadline");
    host.openwork(["wait", "--all", "--timeout", "0.3"]).fails(1, "still_busy");
    host.http("GET", "/idle").header("X-Openwork-Timeout", "0.3").fails(409, "still_busy");

    let waiting = [vec!["wait", "web"], vec!["wait", "--all"]].map(|command| host.openwork(command).spawn());
    wait_until_asked(&host);
    host.busy(&[]);
    for command in waiting {
        let output = command.wait();
        assert!(output.status.success(), "{output:?}");
        assert!(output.stdout.starts_with("no session is running"), "{output:?}");
    }
    host.http("GET", "/idle").ok();
    host.openwork(["wait"]).cwd(&web).ok();
}

#[test]
fn wait_survives_a_restart() {
    let (host, web, _) = web_and_api();
    host.busy(&[&web]);
    let waiting = host.openwork(["wait", "web"]).spawn();
    wait_until_asked(&host);
    host.openwork(["daemon", "restart"]).ok();
    wait_until_asked(&host);
    host.busy(&[]);
    assert!(waiting.wait().status.success());
}

#[test]
fn stop_names_the_sessions_it_ends() {
    let (host, web, _) = web_and_api();
    host.busy(&[&web]);
    let output = host.openwork(["daemon", "stop"]).ok();
    assert_eq!(output.stdout, "ended the running turn of mend {it} (ses_fake) in web\nstopped\n");

    host.openwork(["workspace", "path", "web"]).ok();
    let output = host.openwork(["daemon", "restart", "--all"]).ok();
    assert_eq!(output.stderr, "ended the running turn of mend {it} (ses_fake) in web\n");
    // Before it has a title.
    host.openwork(["workspace", "path", "web"]).ok();
    host.answer("/session/ses_fake", &json!({"id": "ses_fake", "title": "", "directory": web}).to_string());
    let output = host.openwork(["daemon", "restart", "--all"]).ok();
    assert_eq!(output.stderr, "ended the running turn of ses_fake in web\n");
    host.answer("", "");
    host.openwork(["workspace", "path", "web"]).ok();
    // Keeping opencode ends no session.
    assert_eq!(host.openwork(["daemon", "restart"]).ok().stderr, "");
    assert_eq!(host.openwork(["daemon", "stop", "--keep-opencode"]).json()["sessions"], json!([]));
    let stopped = host.openwork(["daemon", "stop"]).json();
    assert_eq!(ids(&stopped), ["ses_fake"]);
}

#[test]
fn request_that_waits_for_opencode_is_answered_when_the_daemon_stops() {
    let (host, ..) = web_and_api();
    let hold = host.path("fake/hold-disposals");
    fs::write(&hold, "").unwrap();
    let stopping = host.openwork(["daemon", "stop"]).spawn();
    wait_for("opencode to be stopping", || host.phase() == "stopping");
    let mut asking = host.connect();
    let request = format!("GET /sessions HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n\r\n", host.port());
    asking.write_all(request.as_bytes()).unwrap();
    // Connections are accepted in order.
    host.health();
    fs::remove_file(&hold).unwrap();
    let reply = read_reply(&mut asking, "GET").unwrap_or_else(|e| panic!("{e}"));
    reply.refused(503, "opencode_unavailable");
    assert!(stopping.wait().status.success());
}

#[test]
fn when_idle_waits_for_the_sessions() {
    let (host, web, _) = web_and_api();
    host.exercises(["option --when-idle"]);
    host.busy(&[&web]);
    for command in ["stop", "restart"] {
        let limit = ["daemon", command, "--when-idle", "--timeout", "0.3"];
        host.openwork(limit).fails(1, "still_busy");
    }
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    let restarting = host.openwork(["daemon", "restart", "--all", "--when-idle"]).spawn();
    wait_until_asked(&host);
    assert_eq!(host.opencode_pid(), opencode);
    host.busy(&[]);
    assert!(restarting.wait().status.success());
    assert_ne!(host.opencode_pid(), opencode);

    host.openwork(["workspace", "path", "web"]).ok();
    host.busy(&[&web]);
    let stopping = host.openwork(["daemon", "stop", "--when-idle", "--json"]).spawn();
    wait_until_asked(&host);
    assert_eq!(host.daemon_pid(), daemon);
    host.busy(&[]);
    let stopped = stopping.wait().object();
    assert_eq!((&stopped["stopped"], &stopped["sessions"]), (&json!(true), &json!([])));
    // No session is left.
    host.openwork(["daemon", "stop", "--when-idle"]).ok();
}
