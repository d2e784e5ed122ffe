//! A real opencode 2.x, whose path is in `OPENWORK_TEST_OPENCODE2`: none can be installed from where 1.x comes.
//! `scripts/test.sh` runs these where the variable is set.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Host, basic, is_alive, wait_for, wait_gone};
use crate::{path, stories, with_real};

/// A host with a real opencode 2.x.
fn real() -> Host {
    let opencode = std::env::var_os("OPENWORK_TEST_OPENCODE2").map(PathBuf::from);
    with_real(&opencode.expect("OPENWORK_TEST_OPENCODE2 is to name an opencode 2.x"))
}

/// The state of a workspace's instance.
fn state(host: &Host, name: &str) -> Value {
    let list = host.openwork(["instance", "list"]).json();
    let mut instances = list["instances"].as_array().unwrap().iter();
    instances.find(|instance| instance["workspace"]["name"] == name).unwrap()["state"].clone()
}

/// Creates a session through a workspace, and returns its directory.
fn created(host: &Host, target: &str, body: &Value) -> Value {
    let reply = host.routed("POST", target).header("X-Openwork-Timeout", "80").json(body.clone()).send();
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()["data"]["location"]["directory"].clone()
}

#[test]
#[ignore = "needs a real opencode 2.x, named in OPENWORK_TEST_OPENCODE2"]
fn one_opencode_serves_every_workspace() {
    stories::one_opencode_serves_every_workspace(&real(), "2.");
}

#[test]
#[ignore = "needs a real opencode 2.x, named in OPENWORK_TEST_OPENCODE2"]
fn many_requests_cause_one_restart() {
    stories::many_requests_cause_one_restart(&real());
}

#[test]
#[ignore = "needs a real opencode 2.x, named in OPENWORK_TEST_OPENCODE2"]
fn opencode_outlives_its_daemon() {
    stories::opencode_outlives_its_daemon(&real());
}

#[test]
#[ignore = "needs a real opencode 2.x, named in OPENWORK_TEST_OPENCODE2"]
fn stop_leaves_nothing() {
    stories::stop_leaves_nothing(&real());
}

#[test]
#[ignore = "needs a real opencode 2.x, named in OPENWORK_TEST_OPENCODE2"]
fn requests_act_in_their_workspace() {
    let host = real();
    let (a, b) = (host.project("a"), host.project("b"));
    host.add(&a);
    host.add(&b);
    path(&host, &["a"]);
    let encoded = |path: &Path| path.to_str().unwrap().replace('/', "%2F");
    let of_b = format!("location%5Bdirectory%5D={}", encoded(&b));
    let below_w = host.routed("GET", &format!("/w/a/api/location?{of_b}")).header("X-Openwork-Timeout", "80").send();
    assert_eq!(below_w.json()["directory"], json!(a));
    let at_root = host.routed("GET", &format!("/api/location?{of_b}")).header("X-Openwork-Timeout", "80").send();
    assert_eq!(at_root.json()["directory"], json!(b));
    let body = json!({"location": {"directory": b}});
    assert_eq!(created(&host, "/w/a/api/session", &body), json!(a));
    assert_eq!(created(&host, "/api/session", &body), json!(b));
    host.http("GET", "/api/info").fails(401, "unauthorized");
    assert_eq!(host.openwork(["session", "list", "b"]).json()["sessions"].as_array().unwrap().len(), 1);
}

#[test]
#[ignore = "needs a real opencode 2.x, named in OPENWORK_TEST_OPENCODE2"]
fn idle_instance_is_evicted_and_reloaded_by_the_next_use() {
    let mut host = real();
    host.set("OPENWORK_IDLE_TTL", "2s");
    let project = host.project("p");
    host.add(&project);
    for _ in 0..2 {
        assert_eq!(path(&host, &["p"])["directory"], project.to_str().unwrap());
        wait_for("the idle one to be disposed", || state(&host, "p") == "cold");
    }
    // A stream prevents an eviction, but not a requested disposal.
    path(&host, &["p"]);
    let _stream = host.routed("GET", "/w/p/api/event").events();
    assert_eq!(host.openwork(["instance", "dispose", "p"]).json()["disposed"], true);
}

#[test]
#[ignore = "needs a real opencode 2.x, named in OPENWORK_TEST_OPENCODE2"]
fn service_of_the_user_is_shared() {
    let mut host = real();
    host.set("OPENWORK_SHARED", "1");
    let project = host.project("p");
    host.add(&project);
    assert_eq!(path(&host, &["p"])["directory"], project.to_str().unwrap());
    let service = host.opencode_pid();
    let registration = std::fs::read_to_string(host.home().join(".local/state/opencode/service.json")).unwrap();
    let registration: Value = serde_json::from_str(&registration).unwrap();
    assert_eq!(registration["pid"], service);
    let credentials = basic("opencode", registration["password"].as_str().unwrap());
    let located = host.http("GET", "/w/p/api/location").header("Authorization", credentials).send();
    assert_eq!(located.json()["directory"], json!(project));
    host.openwork(["daemon", "stop"]).ok();
    assert!(is_alive(service));

    // The user restarts the service.
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.opencode_pid(), service);
    let mut restart = Command::new(host.get("OPENWORK_OPENCODE_BIN"));
    restart.args(["service", "restart"]).env_clear().env("PATH", host.get("PATH")).env("HOME", host.home());
    let restart = restart.stdin(Stdio::null()).stdout(Stdio::null()).status();
    assert!(restart.unwrap().success());
    wait_gone(service);
    wait_for("the next one to be found", || host.health()["ok"] == true && host.opencode_pid() != service);
    host.openwork(["daemon", "stop", "--all"]).ok();
    assert_eq!(host.processes(), [0; 0]);
}
