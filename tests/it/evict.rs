//! Unused instances are evicted, and no others.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{ALL_EVENTS, EVENTS, Host, IS_V2, SESSIONS, Signal, kill, wait_for, wait_gone};

/// A daemon with an idle time, and no workspaces.
fn host(idle_ttl: &str) -> Host {
    let mut host = Host::new();
    host.set("OPENWORK_IDLE_TTL", idle_ttl);
    host.openwork(["daemon", "start"]).ok();
    host
}

/// Makes workspaces and has opencode load them, in this order.
fn warm<const N: usize>(host: &Host, names: [&str; N]) -> [std::path::PathBuf; N] {
    names.map(|name| {
        let project = host.project(name);
        host.add(&project);
        host.openwork(["workspace", "path", name]).ok();
        project
    })
}

fn wait_disposed(host: &Host, directory: &Path) {
    wait_for("the disposal", || host.instance(directory).ends_with(&["dispose".to_owned()]));
}

/// The entry of a workspace in `instance list`.
fn instance(host: &Host, name: &str) -> Value {
    let list = host.openwork(["instance", "list"]).json();
    let mut entries = list["instances"].as_array().unwrap().iter();
    entries.find(|entry| entry["workspace"]["name"] == name).unwrap().clone()
}

#[test]
fn idle_instance_is_evicted() {
    let host = host("1s");
    let mut events = host.http("GET", "/events").events();
    let [idle] = warm(&host, ["idle"]);
    let event = events.find(|event| event["type"] == "instance.disposed").unwrap();
    assert_eq!(event["directory"], idle.to_str().unwrap());
    assert_eq!(host.instance(&idle), ["load", "dispose"]);
    assert_eq!(instance(&host, "idle")["state"], "cold");
    // The next use loads it again.
    host.openwork(["workspace", "path", "idle"]).ok();
    assert_eq!(instance(&host, "idle")["state"], "warm");
    wait_disposed(&host, &idle);
}

#[test]
fn instance_with_a_running_session_is_kept() {
    let host = host("1s");
    host.busy(&[&host.project("busy")]);
    let [busy, idle] = warm(&host, ["busy", "idle"]);
    // It was used before the idle one, so it would have been due first.
    wait_disposed(&host, &idle);
    assert_eq!(host.instance(&busy), ["load"]);
    assert_eq!(instance(&host, "busy")["state"], "busy");
    host.busy(&[]);
    wait_disposed(&host, &busy);
}

#[test]
fn instance_with_unknown_sessions_is_kept() {
    let host = host("1s");
    let asked = if IS_V2 { "/api/session/active" } else { "/session/status" };
    host.answer(asked, "[]");
    let [unknown] = warm(&host, ["unknown"]);
    let looks = || host.requests().iter().filter(|request| request["target"] == asked).count();
    wait_for("it to be looked at more than once", || looks() > 1);
    assert_eq!(host.instance(&unknown), ["load"]);
    host.answer("", "");
    wait_disposed(&host, &unknown);
}

#[test]
fn instance_with_an_open_stream_is_kept() {
    let host = host("1s");
    host.add(host.project("watched"));
    let mut events = host.routed("GET", &format!("/w/watched{EVENTS}")).events();
    let [watched, idle] = warm(&host, ["watched", "idle"]);
    wait_disposed(&host, &idle);
    assert_eq!(host.instance(&watched), ["load"]);
    let entry = instance(&host, "watched");
    assert_eq!((&entry["openStreams"], &entry["evictAt"]), (&json!(1), &Value::Null));
    // The stream stays open.
    host.routed("POST", &format!("/w/watched{SESSIONS}")).json(json!({})).send();
    events.find(|event| event["type"] == "session.created").unwrap();
    drop(events);
    wait_disposed(&host, &watched);
}

#[test]
fn unloaded_instance_is_left_alone() {
    let host = host("1s");
    let cold = host.project("cold");
    host.add(&cold);
    let [idle] = warm(&host, ["idle"]);
    wait_disposed(&host, &idle);
    host.openwork(["instance", "list"]).ok();
    // Even asking whether a session runs would load the instance.
    let asked = host.requests().into_iter().filter(|request| request["directory"] == cold.to_str().unwrap());
    assert_eq!(asked.count(), 0);
    assert_eq!(instance(&host, "cold")["state"], "cold");
}

#[test]
fn directory_that_is_no_workspace_is_not_evicted() {
    let host = host("1s");
    let stranger = host.project("stranger");
    host.use_directly(&stranger);
    let [idle] = warm(&host, ["idle"]);
    wait_disposed(&host, &idle);
    assert_eq!(host.instance(&stranger), ["load"]);
}

#[test]
fn next_daemon_does_not_evict_a_directory_that_is_no_workspace() {
    let host = host("1s");
    let stranger = host.project("stranger");
    let [_keeps_the_list_written] = warm(&host, ["p"]);
    host.wait_for_subscription();
    host.use_directly(&stranger);
    wait_for("the state file to be written", || host.state()["opencode"]["strangers"] == json!([stranger]));
    kill(host.daemon_pid(), Signal::KILL);
    let [idle] = warm(&host, ["idle"]);
    wait_disposed(&host, &idle);
    assert_eq!(host.instance(&stranger), ["load"]);
}

#[test]
fn instance_of_a_removed_workspace_is_evicted() {
    let host = host("1s");
    let mut events = host.http("GET", "/events").events();
    let [routed] = warm(&host, ["routed"]);
    host.openwork(["workspace", "remove", "routed"]).ok();
    wait_disposed(&host, &routed);
    let event = events.find(|event| event["type"] == "instance.disposed").unwrap();
    assert_eq!((&event["directory"], &event["workspaceId"]), (&json!(routed), &Value::Null));

    // Loaded by a client that calls opencode directly.
    let direct = host.project("direct");
    host.add(&direct);
    host.wait_for_subscription();
    host.use_directly(&direct);
    wait_for("the instance to be listed as warm", || instance(&host, "direct")["state"] == "warm");
    host.openwork(["workspace", "remove", "direct"]).ok();
    wait_disposed(&host, &direct);
}

/// Earlier versions listed the loaded directories without saying which of them belong to no workspace.
#[test]
fn state_file_of_an_earlier_version_tells_workspaces_from_other_directories() {
    let host = host("1s");
    let stranger = host.project("stranger");
    let stream = host.add(host.project("p"));
    let stream = host.routed("GET", &format!("/w/{stream}{EVENTS}")).events();
    let [p] = warm(&host, ["p"]);
    host.wait_for_subscription();
    host.use_directly(&stranger);
    wait_for("the state file to be written", || host.state()["opencode"]["strangers"] == json!([stranger]));
    let daemon = host.daemon_pid();
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
    drop(stream);
    let mut state = host.state();
    state["opencode"].as_object_mut().unwrap().remove("strangers");
    host.write_state(state.to_string());
    host.openwork(["daemon", "start"]).ok();
    wait_disposed(&host, &p);
    assert_eq!(host.instance(&stranger), ["load"]);
}

#[test]
fn next_daemon_evicts_the_instance_of_a_removed_workspace() {
    let host = host("1s");
    host.add(host.project("removed"));
    // A stream keeps the instance until the daemon is gone.
    let stream = host.routed("GET", &format!("/w/removed{EVENTS}")).events();
    let [removed, _other] = warm(&host, ["removed", "other"]);
    wait_for("the state file to be written", || {
        host.state()["opencode"]["instances"].as_array().is_some_and(|loaded| loaded.contains(&json!(removed)))
    });
    host.openwork(["workspace", "remove", "removed"]).ok();
    kill(host.daemon_pid(), Signal::KILL);
    drop(stream);
    assert_eq!(host.instance(&removed), ["load"]);
    host.openwork(["daemon", "start"]).ok();
    wait_disposed(&host, &removed);
}

#[test]
fn renamed_workspace_and_missing_directory_are_evicted() {
    let host = host("1s");
    let [renamed, gone] = warm(&host, ["renamed", "gone"]);
    host.openwork(["workspace", "rename", "renamed", "other"]).ok();
    fs::remove_dir_all(&gone).unwrap();
    wait_disposed(&host, &renamed);
    wait_disposed(&host, &gone);
    assert!(!gone.exists());
}

#[test]
fn instance_loaded_before_its_workspace_was_added_is_evicted() {
    let host = host("1s");
    let late = host.project("late");
    host.wait_for_subscription();
    host.use_directly(&late);
    let [idle] = warm(&host, ["idle"]);
    wait_disposed(&host, &idle);
    assert_eq!(host.instance(&late), ["load"]);
    host.add(&late);
    wait_disposed(&host, &late);
}

#[test]
fn loads_and_disposals_by_direct_clients_are_noticed() {
    let host = host("1s");
    let direct = host.project("direct");
    host.add(&direct);
    host.wait_for_subscription();
    host.use_directly(&direct);
    wait_disposed(&host, &direct);
}

#[test]
fn disposals_by_clients_that_go_to_opencode_directly_are_seen() {
    let host = host("1h");
    let direct = host.project("direct");
    host.add(&direct);
    host.wait_for_subscription();
    host.use_directly(&direct);
    wait_for("the instance to be listed as warm", || instance(&host, "direct")["state"] == "warm");
    host.dispose_directly(&direct);
    wait_for("the instance to be listed as cold", || instance(&host, "direct")["state"] == "cold");
}

#[test]
fn event_stream_that_fails_is_opened_again() {
    let host = Host::new();
    host.answer(ALL_EVENTS, "fails");
    let p = host.project("p");
    host.openwork(["daemon", "start"]).ok();
    host.add(&p);
    let asked = || host.requests().iter().filter(|request| request["target"] == ALL_EVENTS).count();
    wait_for("another attempt", || asked() > 1);
    let log = fs::read_to_string(host.file("daemon.log")).unwrap();
    assert!(log.contains(&format!("GET {ALL_EVENTS}: status 500")), "{log}");
    host.answer("", "");
    host.wait_for_subscription();
    wait_for("the daemon to see a direct client", || {
        host.use_directly(&p);
        instance(&host, "p")["state"] == "warm"
    });
    assert_eq!(host.starts().len(), 1);
}

#[test]
fn direct_calls_postpone_eviction() {
    let host = host("2s");
    let [direct, idle] = warm(&host, ["direct", "idle"]);
    // Repeated direct calls keep it longer than the other instance, which was used last.
    wait_for("the other instance to be disposed", || {
        host.use_directly(&direct);
        host.instance(&idle) == ["load", "dispose"]
    });
    assert_eq!(host.instance(&direct), ["load"]);
}

#[test]
fn zero_idle_ttl_disables_eviction() {
    let host = host("0");
    warm(&host, ["p"]);
    let entry = instance(&host, "p");
    assert_eq!((&entry["state"], &entry["evictAt"]), (&json!("warm"), &Value::Null));
}

#[test]
fn instance_list_shows_state_and_sessions() {
    let host = host("1h");
    host.exercises(["command instance list", "variable OPENWORK_IDLE_TTL"]);
    let [busy, _] = warm(&host, ["busy", "warm"]);
    host.add(host.project("cold"));
    host.openwork(["workspace", "add-remote", "http://h.example"]).ok();
    host.busy(&[&busy]);
    let list = host.openwork(["instance", "list"]).json();
    let states: Vec<_> = list["instances"].as_array().unwrap().iter().map(|entry| entry["state"].clone()).collect();
    // A remote workspace has no instance here.
    assert_eq!(states, ["busy", "warm", "cold"]);
    let sessions = [0, 1, 2].map(|n| list["instances"][n]["sessions"].clone());
    let id = sessions[0][0]["id"].as_str().unwrap();
    assert!(id.starts_with(if IS_V2 { "ses_busy" } else { "ses_fake" }), "{id}");
    assert_eq!(sessions, [json!([{"id": id, "title": "mend {it}"}]), json!([]), json!([])]);
    assert!(list["memory"].as_u64().unwrap() > 100_000);
    let used = list["instances"][1]["workspace"]["lastUsedAt"].as_u64().unwrap();
    let due = list["instances"][1]["evictAt"].as_u64().unwrap();
    // Both times come from the same clock, read shortly after each other.
    assert!((3_599_000..=3_601_000).contains(&(due - used)), "{list}");
    assert_eq!(list["instances"][2]["evictAt"], Value::Null);
    assert_eq!(host.http("GET", "/instances").ok()["instances"], list["instances"]);

    let text = host.openwork(["instance", "ls"]).ok().stdout;
    for word in ["busy", "warm", "cold", "UNLOADS IN", "mend {it}"] {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn crash_unloads_every_instance() {
    let host = host("1s");
    let [p] = warm(&host, ["p"]);
    let before = host.opencode_pid();
    kill(before, Signal::KILL);
    wait_for("another opencode", || host.opencode_pid() != before);
    assert_eq!(instance(&host, "p")["state"], "cold");
    let [idle] = warm(&host, ["idle"]);
    wait_disposed(&host, &idle);
    assert_eq!(host.instance(&p), ["load"]);
}

#[test]
fn next_daemon_knows_the_loaded_instances() {
    let host = host("1s");
    let [p] = warm(&host, ["p"]);
    // A stream keeps the instance until the daemon is gone.
    let events = host.opencode("GET", &format!("{EVENTS}?directory={}", p.display())).events();
    let daemon = host.daemon_pid();
    host.openwork(["daemon", "stop", "--keep-opencode"]).ok();
    wait_gone(daemon);
    let before = host.instance(&p);
    host.openwork(["daemon", "start"]).ok();
    if before == ["load"] {
        wait_disposed(&host, &p);
    }
    drop(events);
}

#[test]
fn invalid_idle_ttl_is_refused() {
    let host = Host::new();
    host.exercises(["option --idle-ttl"]);
    for time in ["soon", "-1s", "1", "1x", "", "1.5h", "999999999999999999999s"] {
        host.openwork(["daemon", "start", &format!("--idle-ttl={time}")]).fails(2, "usage");
    }
    for time in ["90s", "30m", "2h", "0"] {
        host.openwork(["daemon", "start", "--idle-ttl", time]).ok();
    }
}
