//! The client repeats a change when the daemon dies before the reply; the repetition must not hit another
//! workspace.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::json;

use crate::support::{Host, compiled};

/// The preloaded library that kills a daemon between the write and the reply.
fn die_after_write() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| compiled("die_after_write.so", &["die_after_write.rs"], &["--crate-type", "cdylib"]))
}

/// A host with the workspaces `web` (active) and `web-api`, whose daemons die after a write when told to.
fn host() -> Host {
    let mut host = Host::new();
    let order = host.path("die");
    host.set("LD_PRELOAD", die_after_write());
    host.set("DIE_AFTER_WRITE", order);
    host.add(host.project("web"));
    host.add(host.project("web-api"));
    // The running daemon has loaded the library, and so will each next one.
    host
}

/// Makes the daemon die after its next write; `change` has to notice and ask the next daemon.
fn dies_during(host: &Host, change: impl FnOnce()) {
    let before = host.daemon_pid();
    fs::write(host.path("die"), "").unwrap();
    change();
    assert!(!host.path("die").exists(), "the daemon did not die");
    assert_ne!(host.daemon_pid(), before);
}

#[test]
#[cfg_attr(target_feature = "crt-static", ignore = "a static binary loads no library that ends it")]
fn repeated_remove_removes_one_workspace() {
    let host = host();
    dies_during(&host, || {
        let removed = host.openwork(["workspace", "remove", "web"]).json();
        assert_eq!((&removed["workspace"]["name"], &removed["activeId"]), (&json!("web"), &json!("")));
    });
    assert_eq!(host.names(), ["web-api"]);
    // A workspace that an earlier command removed is not found.
    host.openwork(["workspace", "remove", "web-api"]).ok();
    host.openwork(["workspace", "remove", "web-api"]).fails(4, "workspace_not_found");
}

#[test]
#[cfg_attr(target_feature = "crt-static", ignore = "a static binary loads no library that ends it")]
fn repeated_rename_renames_one_workspace() {
    let host = host();
    dies_during(&host, || {
        let renamed = host.openwork(["workspace", "rename", "web", "site"]).json();
        assert_eq!(renamed["workspace"]["name"], "site");
    });
    assert_eq!(host.names(), ["site", "web-api"]);
}

#[test]
#[cfg_attr(target_feature = "crt-static", ignore = "a static binary loads no library that ends it")]
fn repeated_switch_can_still_be_undone() {
    let host = host();
    for selector in ["web-api", "-"] {
        dies_during(&host, || {
            host.openwork(["workspace", "switch", selector]).ok();
        });
    }
    assert_eq!(host.openwork(["workspace", "current"]).ok().stdout, "web\n");
    host.openwork(["workspace", "switch", "-"]).ok();
    assert_eq!(host.openwork(["workspace", "current"]).ok().stdout, "web-api\n");
}

#[test]
#[cfg_attr(target_feature = "crt-static", ignore = "a static binary loads no library that ends it")]
fn repeated_add_adds_one_workspace() {
    let host = host();
    dies_during(&host, || {
        host.openwork(["workspace", "add", host.project("c").to_str().unwrap(), "--name", "c"]).ok();
    });
    assert_eq!(host.names(), ["web", "web-api", "c"]);
}

#[test]
#[cfg_attr(target_feature = "crt-static", ignore = "a static binary loads no library that ends it")]
fn repeated_move_moves_one_workspace() {
    let host = host();
    let moved = host.project("moved");
    let to = moved.to_str().unwrap();
    dies_during(&host, || {
        let reply = host.openwork(["workspace", "move", "web", to]).json();
        assert_eq!((&reply["workspace"]["name"], &reply["workspace"]["path"]), (&json!("web"), &json!(to)));
    });
    assert_eq!(host.openwork(["workspace", "info", "web"]).json()["workspace"]["path"], to);
    assert_eq!(host.names(), ["web", "web-api"]);
}

#[test]
#[cfg_attr(target_feature = "crt-static", ignore = "a static binary loads no library that ends it")]
fn daemon_that_dies_before_it_listens_is_reported_with_its_log() {
    let host = host();
    host.openwork(["daemon", "stop"]).ok();
    let started = host.starts().len();
    fs::write(host.path("die"), "").unwrap();
    let error = host.openwork(["daemon", "start"]).fails(1, "daemon_start_failed");
    assert!(error["message"].as_str().unwrap().contains("its log:"), "{error}");
    assert!(!host.path("die").exists(), "the daemon did not die");
    assert_eq!((host.processes(), host.starts().len()), (vec![], started));
    // Its leftover files do not prevent the next start.
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.names(), ["web", "web-api"]);
}

#[test]
fn remove_and_rename_over_http_take_no_abbreviation() {
    let host = Host::new();
    let id = host.add(host.project("web-api"));
    let inside = host.project("web-api/inside");
    let inside = inside.to_str().unwrap().replace('/', "%2F");
    for selector in ["web", &id[..8], &inside] {
        let path = format!("/workspaces/{selector}");
        host.http("GET", &path).ok();
        host.http("DELETE", &path).fails(404, "workspace_not_found");
        host.http("PATCH", &path).json(json!({"name": "other"})).fails(404, "workspace_not_found");
        host.http("POST", &format!("{path}/activate")).ok();
        host.http("POST", &format!("/instances/{selector}/dispose")).ok();
    }
    assert_eq!(host.names(), ["web-api"]);
    // On the command line abbreviations are fine: the command resolves them first.
    let directory = host.project("web-api").to_str().unwrap().replace('/', "%2F");
    host.http("PATCH", &format!("/workspaces/{directory}")).json(json!({"name": "site"})).ok();
    host.openwork(["workspace", "rename", "si", "web"]).ok();
    host.openwork(["workspace", "remove", "./inside"]).cwd(host.project("web-api")).ok();
    assert_eq!(host.names(), [""; 0]);
}
