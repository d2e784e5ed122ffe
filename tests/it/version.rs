//! A daemon of another version than the command line.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use serde_json::json;

use crate::support::Host;
use crate::trust::held;

const OURS: &str = env!("CARGO_PKG_VERSION");

/// Serves as a daemon of this version that knows only `/health`.
fn serve(listener: TcpListener, version: &'static str) {
    let pid = std::process::id();
    let port = listener.local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}");
    let health = json!({
        "ok": true, "apiVersion": 1, "cliVersion": version, "activeId": "", "workspaceCount": 0,
        "daemon": {"pid": pid, "port": port, "baseUrl": url, "startedAt": 0}, "opencode": null,
        "engine": {"phase": "ready", "generation": 1, "restarts": 0, "version": "1.18.33", "lastError": null},
    });
    let unknown = json!({"ok": false, "error": {"code": "not_found", "message": "no such route"}});
    let answer = move |stream: TcpStream| {
        let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
        let Some(request) = lines.next() else { return };
        lines.find(|line| line.is_empty());
        let (status, body) = match request.starts_with("GET /health ") {
            true => (200, health.to_string()),
            false => (404, unknown.to_string()),
        };
        let head = format!("HTTP/1.1 {status} \r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        let _ = write!(&stream, "{head}Content-Type: application/json\r\n\r\n{body}");
    };
    thread::spawn(move || listener.incoming().flatten().for_each(answer));
}

/// A host with such a daemon, which holds the lock until the returned file is dropped.
fn host(version: &'static str) -> (Host, fs::File) {
    let host = Host::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let text = format!("{} {}\n", std::process::id(), listener.local_addr().unwrap().port());
    serve(listener, version);
    let lock = held(&host, &text);
    (host, lock)
}

#[test]
fn request_unknown_to_an_older_daemon_is_daemon_too_old() {
    let (host, _lock) = host("0.0.9");
    host.exercises(["code daemon_too_old"]);
    for command in [&["workspace", "switch", "p"][..], &["instance", "list"], &["workspace", "add", "/tmp"]] {
        let error = host.openwork(command).fails(1, "daemon_too_old");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("0.0.9") && message.contains(&command[..2].join(" ")), "{error}");
        assert!(error["hint"].as_str().unwrap().contains("`openwork daemon restart`"), "{error}");
    }
}

#[test]
fn request_unknown_to_the_same_version_is_not_found() {
    let (host, _lock) = host(OURS);
    host.openwork(["instance", "list"]).fails(1, "not_found");
    assert!(!host.openwork(["status"]).ok().stdout.contains("daemon restart"));
}

#[test]
fn status_shows_both_versions() {
    let (host, _lock) = host("0.0.9");
    let status = host.openwork(["status"]).ok().stdout;
    assert!(status.contains("version 0.0.9") && status.contains(&format!("version {OURS};")), "{status}");
    // JSON is `/health` unchanged.
    assert_eq!(host.openwork(["status"]).json()["cliVersion"], "0.0.9");
}

#[test]
fn doctor_warns_of_another_version() {
    let (host, _lock) = host("0.0.1");
    let text = host.openwork(["doctor"]).output().stdout;
    assert!(text.contains(&format!("the daemon is openwork 0.0.1, this is {OURS}")), "{text}");
    assert!(text.contains("`openwork daemon restart` starts this version"), "{text}");
}

/// Tests that need a terminal.
mod with_script {
    use super::*;

    #[test]
    #[ignore = "needs script(1), for a terminal"]
    fn terminal_shows_a_note_about_another_version() {
        let (host, _lock) = host("0.0.9");
        let typescript = host.path("typescript");
        let on_a_terminal = |command: &str| {
            let command = format!("\"{}\" {command}", host.binary().display());
            let script = format!("exec script -qec '{command}' '{}' >/dev/null", typescript.display());
            host.openwork([""; 0]).after(&script).output();
            fs::read_to_string(&typescript).unwrap()
        };
        let note = format!("note: the daemon is openwork 0.0.9, this is {OURS}");
        assert_eq!(on_a_terminal("instance list").matches(&note).count(), 1);
        assert!(!on_a_terminal("status").contains(&note));
        let elsewhere = host.openwork(["instance", "list"]).exits(1);
        assert!(!elsewhere.stderr.contains(&note), "{elsewhere:?}");
    }
}
