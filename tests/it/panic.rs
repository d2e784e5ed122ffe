//! A bug in a handler is the matter of one request.

#![cfg(debug_assertions)] // what is asked for here, only such a build does

use std::fs;

use crate::support::Host;

#[test]
fn a_panicking_handler_harms_nobody_else() {
    let host = Host::new();
    host.add(host.project("a"));
    let pid = host.daemon_pid();
    for _ in 0..50 {
        host.http("GET", "/workspaces?panic").fails(500, "internal");
        host.http("GET", "/workspaces/a").ok();
    }
    host.http("POST", "/workspaces/a/activate?panic").json(serde_json::json!({})).fails(500, "internal");
    host.openwork(["workspace", "switch", "a"]).ok();
    assert_eq!(host.daemon_pid(), pid);
    // Every other test is to have a log without these.
    assert!(fs::read_to_string(host.file("daemon.log")).unwrap().contains("asked to panic"));
    fs::write(host.file("daemon.log"), "").unwrap();
}
