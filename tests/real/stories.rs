//! Tests for both lines of opencode, each against the real one.

use std::fs;
use std::thread;

use crate::path;
use crate::support::{Host, Signal, is_alive, kill, wait_gone};

pub fn one_opencode_serves_every_workspace(host: &Host, line: &str) {
    let projects = ["a", "b", "c"].map(|name| host.project(name));
    for project in &projects {
        host.add(project);
    }
    host.openwork(["daemon", "start"]).ok();
    let pid = host.opencode_pid();
    for project in &projects {
        host.openwork(["workspace", "switch", project.to_str().unwrap()]).ok();
        let answer = path(host, &[]);
        assert_eq!(answer["directory"], project.to_str().unwrap());
        assert_eq!(answer["home"], host.home().to_str().unwrap());
        assert_eq!(host.opencode_pid(), pid);
        // opencode wrote nothing into the project.
        assert_eq!(fs::read_dir(project).unwrap().count(), 0);
    }
    assert!(host.health()["engine"]["version"].as_str().unwrap().starts_with(line));
}

pub fn many_requests_cause_one_restart(host: &Host) {
    let project = host.project("p");
    host.add(&project);
    path(host, &["p"]);
    let before = host.opencode_pid();
    kill(before, Signal::KILL);
    thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                let answer = host.http("GET", "/workspaces/p/path").header("X-Openwork-Timeout", "80").ok();
                assert_eq!(answer["path"]["directory"], project.to_str().unwrap());
            });
        }
    });
    assert_ne!(host.opencode_pid(), before);
    assert_eq!(
        (host.health()["engine"]["generation"].as_u64(), host.health()["engine"]["restarts"].as_u64()),
        (Some(2), Some(1))
    );
}

pub fn stop_leaves_nothing(host: &Host) {
    host.add(host.project("p"));
    path(host, &["p"]);
    let opencode = host.opencode_pid();
    host.openwork(["daemon", "stop"]).ok();
    assert!(!is_alive(opencode));
    assert_eq!(host.processes(), [0; 0]);
    // It starts again on the same port at once.
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.health()["opencode"]["port"].to_string(), host.get("OPENWORK_OPENCODE_PORT"));
}

/// The next daemon takes over the opencode of one that was killed.
pub fn opencode_outlives_its_daemon(host: &Host) {
    let project = host.project("p");
    host.add(&project);
    path(host, &["p"]);
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
    assert_eq!(path(host, &["p"])["directory"], project.to_str().unwrap());
    assert_ne!(host.daemon_pid(), daemon);
    assert_eq!(host.opencode_pid(), opencode);
    host.openwork(["daemon", "restart"]).ok();
    assert_eq!(host.opencode_pid(), opencode);
}
