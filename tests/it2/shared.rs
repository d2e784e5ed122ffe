//! The user's own service, which plain opencode 2.x runs.

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::support::{Host, wait_for};

/// Registers a process as the service.
fn register(host: &Host, url: &str, pid: u32, mode: u32) {
    let path = host.home().join(".local/state/opencode/service.json");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let registration = json!({"id": "x", "version": "2.3.2", "url": url, "pid": pid, "password": "of the service"});
    let new = path.with_extension("new");
    fs::write(&new, registration.to_string()).unwrap();
    fs::set_permissions(&new, Permissions::from_mode(mode)).unwrap();
    fs::rename(new, path).unwrap();
}

#[test]
fn a_service_beside_openworks_own_is_told_once_and_shown() {
    let mut host = Host::new();
    host.set("OPENWORK_TEST_PACE", "20");
    let started = host.openwork(["daemon", "start"]).ok();
    assert!(!started.stderr.contains("plain `opencode`"), "{started:?}");
    assert_eq!(host.health()["engine"]["service"], Value::Null);

    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", socket.local_addr().unwrap());
    // Neither what others may have written nor what names another process is one.
    register(&host, &url, std::process::id(), 0o644);
    register(&host, &url, host.daemon_pid(), 0o600);
    assert!(!host.openwork(["status"]).ok().stdout.contains("plain `opencode`"));
    register(&host, &url, std::process::id(), 0o600);
    wait_for("the service to be seen", || host.health()["engine"]["service"] == json!(url));
    for times in [1, 0] {
        let told = host.openwork(["workspace", "add", host.project("a").to_str().unwrap()]).ok();
        assert_eq!(told.stderr.matches(&format!("a server of its own on {url}")).count(), times, "{told:?}");
    }
    assert!(host.openwork(["status"]).ok().stdout.contains(&format!("a server of its own on {url}")));
    drop(socket);
    wait_for("its end to be seen", || host.health()["engine"]["service"] == Value::Null);
}
