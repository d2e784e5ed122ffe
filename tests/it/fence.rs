//! A workspace whose loading kills opencode is fenced, and the others keep working.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use serde_json::{Value, json};

use crate::support::{
    HEALTH, Host, IS_V2, LOADING_CALL, Reply, STATE, Signal, VERSION, kill, passed, wait_for, wait_gone,
};

/// A host with a ready opencode, a workspace that kills opencode when it is loaded, and a good one.
fn host() -> (Host, PathBuf) {
    let host = Host::new();
    let bad = host.project("bad");
    host.add(&bad);
    host.add(host.project("good"));
    poison(&host, &[&bad]);
    host.openwork(["daemon", "start"]).ok();
    (host, bad)
}

fn poison(host: &Host, directories: &[&Path]) {
    let lines: String = directories.iter().map(|path| format!("{}\n", path.display())).collect();
    fs::write(host.path("fake/poison"), lines).unwrap();
}

/// How often opencode began to load a directory.
fn loadings(host: &Host, directory: &Path) -> usize {
    host.recorded("loadings").iter().filter(|loaded| Path::new(loaded) == directory).count()
}

/// Loads the bad workspace until it is fenced.
fn fence(host: &Host) {
    host.openwork(["workspace", "path", "bad"]).fails(5, "opencode_unavailable");
    host.openwork(["workspace", "path", "bad"]).fails(5, "workspace_fenced");
}

fn state(host: &Host, name: &str) -> Value {
    let list = host.openwork(["instance", "list"]).json();
    let mut instances = list["instances"].as_array().unwrap().iter();
    instances.find(|instance| instance["workspace"]["name"] == name).unwrap()["state"].clone()
}

fn message(reply: &Reply) -> String {
    reply.json()["error"]["message"].as_str().unwrap().to_owned()
}

#[test]
fn fatal_request_fails_with_the_cause_and_is_not_retried() {
    let (host, bad) = host();
    let reply = host.routed("GET", "/w/bad/path").send();
    reply.refused(503, "opencode_unavailable");
    let why = format!(
        "opencode is not available: it ended with exit status: 7 while it loaded the instance of bad; its last \
         output:\n{}server listening on http://{}\nfake: plugin of {} ends the process",
        if IS_V2 { "" } else { "opencode " },
        Host::start_address(&host.starts()[0]),
        bad.display()
    );
    assert_eq!(message(&reply), why);
    assert_eq!(loadings(&host, &bad), 1);
    wait_for("another opencode", || host.starts().len() == 2 && host.phase() == "ready");
    // The control plane loads instances as well.
    poison(&host, &[&bad, &host.project("good")]);
    let reply = host.http("GET", "/workspaces/good/path").send();
    reply.refused(503, "opencode_unavailable");
    assert!(message(&reply).contains("while it loaded the instance of good"), "{reply:?}");
    assert_eq!(loadings(&host, &host.project("good")), 1);
}

#[test]
fn workspace_that_kills_opencode_twice_is_fenced() {
    let (host, bad) = host();
    let mut events = host.http("GET", "/events").events();
    host.exercises(["code workspace_fenced"]);
    fence(&host);
    let event = events.find(|event| event["type"] == "instance.fenced").unwrap();
    assert_eq!(event["directory"], bad.to_str().unwrap());
    assert!(event["workspaceId"].as_str().unwrap().starts_with("ws-"));
    assert!(event["output"].as_str().unwrap().ends_with("ends the process"));
    assert_eq!((state(&host, "bad"), state(&host, "good")), (json!("fenced"), json!("cold")));

    // From now on no kind of request reaches opencode.
    wait_for("another opencode", || host.starts().len() == 3 && host.phase() == "ready");
    let reply = host.routed("POST", "/w/bad/echo").body("{}").send();
    reply.refused(503, "workspace_fenced");
    assert_eq!(reply.header("x-openwork-error"), Some("workspace_fenced"));
    assert!(message(&reply).contains("ends the process"));
    host.http("GET", "/workspaces/bad/path").fails(503, "workspace_fenced");
    host.openwork(["api", "bad", LOADING_CALL]).fails(5, "workspace_fenced");
    host.openwork(["attach", "bad"]).on_terminal("").fails(5, "workspace_fenced");
    host.openwork(["run", "bad", "--", "hello"]).fails(5, "workspace_fenced");
    assert_eq!((host.recorded("clients").len(), loadings(&host, &bad), host.starts().len()), (0, 2, 3));
    // Requests that need no instance still go through, and so do other workspaces.
    assert_eq!(host.routed("GET", &format!("/w/bad{HEALTH}")).send().status, 200);
    host.openwork(["workspace", "path", "good"]).ok();
    host.openwork(["attach", "good"]).on_terminal("").ok();
    assert_eq!((state(&host, "good"), host.starts().len()), (json!("warm"), 3));
}

#[test]
fn reset_lifts_the_fence() {
    let (host, bad) = host();
    host.exercises(["command instance reset", "route POST /instances/:id/reset"]);
    assert_eq!(host.openwork(["instance", "reset", "bad"]).json()["reset"], false);
    fence(&host);
    assert_eq!(host.state()["fences"][0]["directory"], bad.to_str().unwrap());
    poison(&host, &[]);
    host.openwork(["workspace", "path", "bad"]).fails(5, "workspace_fenced");
    let reset = host.openwork(["instance", "reset", "bad"]).json();
    assert_eq!((&reset["reset"], &reset["workspace"]["name"]), (&json!(true), &json!("bad")));
    assert_eq!(host.state()["fences"], Value::Null);
    host.openwork(["workspace", "path", "bad"]).ok();
    assert_eq!(state(&host, "bad"), "warm");
    // The reset also forgot the earlier deaths.
    host.openwork(["instance", "dispose", "bad"]).ok();
    poison(&host, &[&bad]);
    host.openwork(["workspace", "path", "bad"]).fails(5, "opencode_unavailable");
    assert_eq!(host.http("POST", "/instances/bad/reset").ok()["reset"], false);
    assert_eq!(host.openwork(["instance", "reset", "bad"]).ok().stdout, "there was no fence around bad\n");
    fence(&host);
    assert_eq!(host.openwork(["instance", "reset", "bad"]).ok().stdout, "lifted the fence of bad\n");

    host.openwork(["workspace", "add-remote", "http://h.example", "--name", "far"]).ok();
    host.openwork(["instance", "reset", "far"]).fails(1, "workspace_is_remote");
    host.openwork(["instance", "reset", "nowhere"]).fails(4, "workspace_not_found");
}

#[test]
fn removing_a_workspace_lifts_its_fence() {
    let (host, bad) = host();
    fence(&host);
    host.openwork(["workspace", "remove", "bad"]).ok();
    assert_eq!(host.state()["fences"], Value::Null);
    poison(&host, &[]);
    host.add(&bad);
    host.openwork(["workspace", "path", "bad"]).ok();
}

#[test]
fn fence_outlives_the_daemon_but_not_an_upgrade_of_opencode() {
    let (host, bad) = host();
    fence(&host);
    host.openwork(["daemon", "restart"]).ok();
    host.openwork(["workspace", "path", "bad"]).fails(5, "workspace_fenced");
    host.openwork(["daemon", "stop"]).ok();
    host.openwork(["workspace", "path", "bad"]).fails(5, "workspace_fenced");
    assert_eq!(loadings(&host, &bad), 2);
    // Fields of other versions of openwork survive.
    host.openwork(["daemon", "stop"]).ok();
    let mut file = host.state();
    assert_eq!(file["fences"][0]["version"], VERSION);
    file["fences"][0]["later"] = json!("kept");
    fs::write(host.file(STATE), file.to_string()).unwrap();
    poison(&host, &[&bad, &host.project("good")]);
    host.openwork(["workspace", "path", "good"]).fails(5, "opencode_unavailable");
    host.openwork(["workspace", "path", "good"]).fails(5, "workspace_fenced");
    let fences = host.state()["fences"].clone();
    assert_eq!((fences.as_array().unwrap().len(), &fences[0]["later"]), (2, &json!("kept")));

    host.openwork(["daemon", "stop"]).ok();
    poison(&host, &[]);
    host.behave(&format!("FAKE_VERSION={VERSION}4"));
    // The version of a binary is remembered; forget it, so that opencode is asked again.
    let mut file = host.state();
    file["binaries"] = Value::Null;
    fs::write(host.file(STATE), file.to_string()).unwrap();
    host.openwork(["workspace", "path", "bad"]).ok();
    assert_eq!(host.state()["fences"], Value::Null);
}

#[test]
fn loaded_instances_are_not_blamed_for_a_crash() {
    let (host, bad) = host();
    poison(&host, &[]);
    for round in 1..=3 {
        host.openwork(["workspace", "path", "bad"]).ok();
        let before = host.opencode_pid();
        // opencode is killed during a turn, for example by the OOM killer.
        thread::scope(|scope| {
            let turn = scope.spawn(|| host.routed("POST", "/w/bad/slow?ms=60000").send());
            wait_for("the turn", || {
                host.requests().iter().filter(|request| request["target"] == passed("/slow?ms=60000", &bad)).count()
                    == round
            });
            kill(before, Signal::KILL);
            assert_eq!(turn.join().unwrap().status, 502);
        });
        wait_gone(before);
    }
    host.openwork(["workspace", "path", "bad"]).ok();
    assert_eq!(loadings(&host, &bad), 4);
}

#[test]
fn kill_during_loading_is_not_blamed_on_the_workspace() {
    let (host, bad) = host();
    poison(&host, &[]);
    host.behave("FAKE_LOAD_MS=1000");
    host.openwork(["daemon", "restart", "--all"]).ok();
    for round in 1..=3 {
        thread::scope(|scope| {
            let reply = scope.spawn(|| host.routed("GET", "/w/bad/path").send().status);
            wait_for("the loading", || loadings(&host, &bad) == 2 * round - 1);
            kill(host.opencode_pid(), Signal::KILL);
            // The workspace is not at fault, so the request is repeated.
            assert_eq!(reply.join().unwrap(), 200);
        });
        host.openwork(["instance", "dispose", "bad"]).ok();
    }
    assert_eq!(state(&host, "bad"), "cold");
}

#[test]
fn stop_during_loading_is_not_blamed_on_the_workspace() {
    let (host, bad) = host();
    poison(&host, &[]);
    host.behave("FAKE_LOAD_MS=60000");
    host.openwork(["daemon", "restart", "--all"]).ok();
    for _ in 0..3 {
        thread::scope(|scope| {
            let before = loadings(&host, &bad);
            scope.spawn(|| host.routed("GET", "/w/bad/path").send());
            wait_for("the loading", || loadings(&host, &bad) > before);
            host.openwork(["daemon", "restart", "--all"]).ok();
        });
    }
    assert_eq!(state(&host, "bad"), "cold");
}

#[test]
fn only_the_faulty_one_of_several_loading_workspaces_is_fenced() {
    let (host, bad) = host();
    host.behave("FAKE_LOAD_MS=2000");
    host.openwork(["daemon", "restart", "--all"]).ok();
    let names = ["bad", "good", "c", "d"];
    for name in &names[2..] {
        host.add(host.project(name));
    }
    let load_all = || {
        thread::scope(|scope| {
            let replies = names.map(|name| {
                let host = &host;
                scope.spawn(move || host.routed("GET", &format!("/w/{name}/path")).send().status)
            });
            replies.map(|reply| reply.join().unwrap())
        })
    };
    assert_eq!(load_all(), [503; 4]);
    // Now each is loaded alone, in any order.
    assert_eq!(load_all()[1..], [200; 3]);
    assert_eq!(loadings(&host, &bad), 2);
    assert_eq!(names.map(|name| state(&host, name) == "fenced"), [true, false, false, false]);
}
