//! Shared parts of the tests about OpenCode's sessions, for both lines.

use std::path::PathBuf;

use serde_json::Value;

use super::{Host, IS_V2, wait_for};

/// A host with two workspaces, `web` (loaded) and `api`, and their directories.
pub fn web_and_api() -> (Host, PathBuf, PathBuf) {
    let host = Host::new();
    let (web, api) = (host.project("web"), host.project("api"));
    host.add(&web);
    host.add(&api);
    host.openwork(["workspace", "path", "web"]).ok();
    (host, web, api)
}

/// The ids in a list of sessions.
pub fn ids(list: &Value) -> Vec<&str> {
    list["sessions"].as_array().unwrap().iter().map(|session| session["id"].as_str().unwrap()).collect()
}

/// Waits until the daemon has asked opencode for running sessions.
pub fn wait_until_asked(host: &Host) {
    let target = if IS_V2 { "/api/session/active" } else { "/session/status" };
    let before = host.requests().len();
    wait_for("opencode to be asked for running sessions", || {
        host.requests()[before..].iter().any(|request| request["target"] == target)
    });
}
