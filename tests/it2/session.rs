//! OpenCode's sessions in 2.x: listing them, ending a turn, and waiting for all turns, without loading an instance.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::sessions::{ids, wait_until_asked, web_and_api};
use crate::support::{Host, wait_for};

/// Creates a session in a directory by calling opencode directly.
fn session(host: &Host, directory: &Path) -> String {
    let reply = host.opencode("POST", "/api/session").json(json!({"location": {"directory": directory}})).send();
    reply.json()["data"]["id"].as_str().unwrap().to_owned()
}

/// Makes a session `prompt`, `succeed` or `fail` by calling opencode directly.
fn act(host: &Host, session: &str, what: &str) {
    let target = format!("/api/session/{session}/{what}");
    let reply = host.opencode("POST", &target).json(json!({"text": "x"})).send();
    assert!(matches!(reply.status, 200 | 204), "{reply:?}");
}

#[test]
fn running_sessions_come_first_and_nothing_is_loaded() {
    let (host, web, api) = web_and_api();
    let [first, second, elsewhere] = [&web, &web, &api].map(|directory| session(&host, directory));
    act(&host, &second, "prompt");
    let list = host.openwork(["session", "list", "web"]).json();
    assert_eq!(ids(&list), [&second, &first]);
    let running = &list["sessions"][0];
    assert_eq!(
        (&running["state"], &running["title"], &running["workspace"]["name"], &running["directory"]),
        (&json!("running"), &json!("mend {it}"), &json!("web"), &json!(web))
    );
    assert_eq!((&list["sessions"][1]["state"], &list["sessions"][1]["updatedAt"]), (&json!("idle"), &json!(1)));
    assert_eq!(ids(&host.openwork(["session", "list", "--all"]).json()), [&second, &first]);
    // Also for a workspace that is not loaded.
    assert_eq!(ids(&host.openwork(["session", "list", "api"]).json()), [&elsewhere]);
    assert_eq!(ids(&host.openwork(["session", "list", "--all"]).json()), [&second, &first]);
    assert_eq!((host.instance(&api), host.instance(&web)), (vec![], vec!["load".to_owned()]));
    let instances = host.openwork(["instance", "list"]).json();
    assert_eq!(
        (&instances["instances"][0]["state"], &instances["instances"][1]["state"]),
        (&json!("busy"), &json!("cold"))
    );
}

#[test]
fn abort_ends_the_running_turn_and_loads_nothing() {
    let (host, web, api) = web_and_api();
    let (running, idle) = (session(&host, &web), session(&host, &api));
    act(&host, &running, "prompt");
    let reply = host.openwork(["session", "abort", &running]).json();
    assert_eq!((&reply["aborted"], &reply["session"]["id"]), (&json!(true), &json!(running)));
    assert_eq!(reply["session"]["workspace"]["name"], "web");
    assert_eq!(ids(&host.openwork(["session", "list", "web"]).json()), [&running]);
    host.openwork(["wait", "--all"]).ok();

    // A session of a workspace that is not loaded.
    let reply = host.openwork(["session", "abort", &idle]).json();
    assert_eq!((&reply["aborted"], &reply["session"]["workspace"]["name"]), (&json!(false), &json!("api")));
    let said = host.openwork(["session", "abort", &idle]).ok().stdout;
    assert_eq!(said, format!("no turn is running in mend {{it}} ({idle}) in api\n"));
    assert_eq!(host.instance(&api), [""; 0]);
    for unknown in ["ses_none", "-", "../x"] {
        host.openwork(["session", "abort", unknown]).fails(4, "session_not_found");
    }
}

#[test]
fn abort_does_not_reload_an_instance_disposed_during_a_turn() {
    let (host, web, _) = web_and_api();
    let running = session(&host, &web);
    act(&host, &running, "prompt");
    host.dispose_directly(&web);
    let before = host.instance(&web);
    assert_eq!(before, ["load", "dispose"]);
    let error = host.openwork(["session", "abort", &running]).fails(5, "opencode_error");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("was disposed") && message.contains("daemon restart --all"), "{error}");
    assert_eq!(host.instance(&web), before);
    // The session still runs, so `wait` waits for it.
    host.openwork(["wait", "web", "--timeout", "0.3"]).fails(1, "still_busy");
    act(&host, &running, "succeed");
    host.openwork(["wait", "web"]).ok();
}

#[test]
fn wait_returns_when_sessions_are_idle() {
    let (host, web, api) = web_and_api();
    let running = session(&host, &web);
    act(&host, &running, "prompt");
    host.openwork(["wait", "api"]).ok();
    let error = host.openwork(["wait", "web", "--timeout", "0.3"]).fails(1, "still_busy");
    assert_eq!(error["message"], "web: 1 session still running at the deadline");
    host.openwork(["wait", "--all", "--timeout", "0.3"]).fails(1, "still_busy");
    let waiting = [vec!["wait", "web"], vec!["wait", "--all"]].map(|command| host.openwork(command).spawn());
    wait_until_asked(&host);
    act(&host, &running, "succeed");
    for command in waiting {
        let output = command.wait();
        assert!(output.status.success(), "{output:?}");
    }
    assert_eq!(host.instance(&api), [""; 0]);
}

#[test]
fn when_idle_waits_for_the_sessions() {
    let (host, web, _) = web_and_api();
    let running = session(&host, &web);
    act(&host, &running, "prompt");
    for command in ["stop", "restart"] {
        let limit = ["daemon", command, "--when-idle", "--timeout", "0.3"];
        host.openwork(limit).fails(1, "still_busy");
    }
    let opencode = host.opencode_pid();
    let restarting = host.openwork(["daemon", "restart", "--all", "--when-idle"]).spawn();
    wait_until_asked(&host);
    assert_eq!(host.opencode_pid(), opencode);
    act(&host, &running, "succeed");
    assert!(restarting.wait().status.success());
    assert_ne!(host.opencode_pid(), opencode);

    act(&host, &running, "prompt");
    let stopping = host.openwork(["daemon", "stop", "--when-idle", "--json"]).spawn();
    wait_until_asked(&host);
    act(&host, &running, "succeed");
    let stopped = stopping.wait().object();
    assert_eq!((&stopped["stopped"], &stopped["sessions"]), (&json!(true), &json!([])));

    // The stop names the session that it ends.
    host.openwork(["daemon", "start"]).ok();
    act(&host, &running, "prompt");
    let stopped = host.openwork(["daemon", "stop"]).ok().stdout;
    assert_eq!(stopped, format!("ended the running turn of mend {{it}} ({running}) in web\nstopped\n"));
}

#[test]
fn turns_are_published_with_workspace_and_title() {
    let (host, web, _) = web_and_api();
    host.wait_for_subscription();
    let stranger = host.project("stranger");
    let (ours, theirs) = (session(&host, &web), session(&host, &stranger));
    let mut events = host.http("GET", "/events").events();
    let mut next = |kind: &str, id: &str| {
        let is_of_session = |event: &Value| event["type"].as_str().unwrap().starts_with("session.");
        let event = events.find(is_of_session).expect("an event");
        assert_eq!((&event["type"], &event["sessionId"]), (&json!(kind), &json!(id)), "{event}");
        assert_eq!(event["title"], "mend {it}", "{event}");
        event
    };
    // Turns that end by the user, by a failure, and normally.
    act(&host, &ours, "prompt");
    let started = next("session.started", &ours);
    assert_eq!((&started["workspace"]["name"], &started["directory"]), (&json!("web"), &json!(web)));
    host.openwork(["session", "abort", &ours]).ok();
    assert_eq!(next("session.error", &ours)["error"], json!({"name": "interrupted", "message": "user"}));
    next("session.idle", &ours);
    act(&host, &theirs, "prompt");
    let started = next("session.started", &theirs);
    assert_eq!((&started["workspace"], &started["directory"]), (&Value::Null, &json!(stranger)));
    act(&host, &theirs, "fail");
    assert_eq!(next("session.error", &theirs)["error"], json!({"name": "provider.quota", "message": "no more"}));
    next("session.idle", &theirs);
    act(&host, &ours, "prompt");
    next("session.started", &ours);
    act(&host, &ours, "succeed");
    // Each event came once: the next is this one.
    assert_eq!(next("session.idle", &ours).get("error"), None);
}
