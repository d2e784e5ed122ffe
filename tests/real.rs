//! The same story against the real opencode 1.x, whose path is in `OPENWORK_TEST_OPENCODE`:
//! `cargo test --test real`; and, in `with_opencode2`, against a real 2.x, where there is one.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

#[path = "real/route.rs"]
mod route;
#[path = "real/stories.rs"]
mod stories;
#[allow(dead_code, unused_imports)] // parts that only the tests with the fake opencode need
#[path = "support/mod.rs"]
mod support;
#[path = "real/v2.rs"]
mod with_opencode2;

use support::{Host, Signal, kill, wait_gone};

/// A host with a real opencode 1.x that downloads nothing that it can do without.
fn real() -> Host {
    let opencode = std::env::var_os("OPENWORK_TEST_OPENCODE").map(PathBuf::from);
    with_real(&opencode.expect("OPENWORK_TEST_OPENCODE is to name an opencode; `just test` installs one"))
}

fn with_real(opencode: &Path) -> Host {
    assert!(opencode.is_file(), "there is no {}", opencode.display());
    let mut host = Host::with_opencode(opencode);
    for switch in ["OPENCODE_DISABLE_AUTOUPDATE", "OPENCODE_DISABLE_MODELS_FETCH"] {
        host.set(switch, "1");
    }
    host
}

/// The output of `workspace path`. The first instance in a new home may take long.
fn path(host: &Host, selector: &[&str]) -> Value {
    host.openwork(["workspace", "path", "--timeout", "80"].iter().chain(selector)).json()["path"].clone()
}

/// Waits until opencode's global events report the disposal of an instance.
fn disposal(events: &mut support::Events, directory: &Path) {
    let is_it = |event: &Value| {
        event["payload"]["type"] == "server.instance.disposed" && event["directory"] == directory.to_str().unwrap()
    };
    events.find(is_it).expect("the stream to stay open");
}

#[test]
fn one_opencode_serves_every_workspace() {
    stories::one_opencode_serves_every_workspace(&real(), "1.");
}

#[test]
fn many_requests_cause_one_restart() {
    stories::many_requests_cause_one_restart(&real());
}

#[test]
fn stop_leaves_nothing() {
    stories::stop_leaves_nothing(&real());
}

#[test]
fn next_use_reloads_a_disposed_instance() {
    let host = real();
    let project = host.project("p");
    host.add(&project);
    host.openwork(["daemon", "start"]).ok();
    let pid = host.opencode_pid();
    let mut events = host.opencode("GET", "/global/event").events();
    // Not loaded yet: nothing to dispose.
    assert_eq!(host.openwork(["instance", "dispose", "p"]).json()["disposed"], false);
    for _ in 0..2 {
        assert_eq!(path(&host, &["p"])["directory"], project.to_str().unwrap());
        assert_eq!(host.openwork(["instance", "dispose", "p"]).json()["disposed"], true);
        disposal(&mut events, &project);
    }
    assert_eq!(host.opencode_pid(), pid);
}

#[test]
fn next_daemon_adopts_opencode_of_a_killed_daemon() {
    let host = real();
    let project = host.project("p");
    host.add(&project);
    path(&host, &["p"]);
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    let mut events = host.opencode("GET", "/global/event").events();
    kill(daemon, Signal::KILL);
    wait_gone(daemon);

    path(&host, &["p"]);
    assert_ne!(host.daemon_pid(), daemon);
    assert_eq!(host.opencode_pid(), opencode);
    // The stream of a direct client stayed open.
    let query = format!("/instance/dispose?directory={}", project.display());
    host.opencode("POST", &query).send();
    disposal(&mut events, &project);

    host.openwork(["daemon", "restart"]).ok();
    assert_eq!(host.opencode_pid(), opencode);
}

#[test]
fn opencode_works_at_any_loopback_address() {
    let host = real();
    let project = host.project("p");
    host.add(&project);
    host.openwork(["daemon", "restart", "--all", "--opencode-host", "127.83.12.9"]).ok();
    path(&host, &["p"]);
    let (pid, address) = (host.opencode_pid(), host.opencode_address());
    assert_eq!(address.ip().to_string(), "127.83.12.9");
    // Direct calls work too, and the next daemon adopts it.
    assert_eq!(host.opencode("GET", "/global/health").send().status, 200);
    let daemon = host.daemon_pid();
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
    path(&host, &["p"]);
    assert_eq!((host.opencode_pid(), host.opencode_address()), (pid, address));
}

#[test]
fn workspace_whose_plugin_kills_opencode_is_fenced() {
    let mut host = real();
    // opencode installs packages before it loads a plugin; offline that fails, so let it fail at once.
    host.set("npm_config_fetch_retries", "0");
    let (bad, good) = (host.project("bad"), host.project("good"));
    let plugin = host.path("end.js");
    fs::write(&plugin, "console.error('the plugin ends it'); process.exit(7)\n").unwrap();
    let config = json!({"plugin": [format!("file://{}", plugin.display())]});
    fs::write(bad.join("opencode.json"), config.to_string()).unwrap();
    for project in [&bad, &good] {
        host.add(project);
    }
    path(&host, &["good"]);
    let first = host.openwork(["workspace", "path", "bad", "--timeout", "80"]).fails(5, "opencode_unavailable");
    let message = first["message"].as_str().unwrap();
    assert!(message.contains("exit status: 7 while it loaded the instance of bad"), "{message}");
    assert!(message.contains("the plugin ends it"), "{message}");
    path(&host, &["good"]);
    let reply = host.routed("GET", "/w/bad/session").header("X-Openwork-Timeout", "80").send();
    reply.refused(503, "workspace_fenced");
    path(&host, &["good"]);
    let pid = host.opencode_pid();
    host.openwork(["api", "bad", "/session"]).fails(5, "workspace_fenced");
    host.openwork(["run", "bad", "--", "hello"]).fails(5, "workspace_fenced");
    assert_eq!((host.opencode_pid(), host.health()["engine"]["restarts"].as_u64()), (pid, Some(2)));

    fs::remove_file(bad.join("opencode.json")).unwrap();
    host.openwork(["instance", "reset", "bad"]).ok();
    assert_eq!(path(&host, &["bad"])["directory"], bad.to_str().unwrap());
    assert_eq!(host.opencode_pid(), pid);
}
