//! `daemon restart`: the daemon becomes its successor in place. The port and the lock are never free.

use std::collections::BTreeSet;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use serde_json::json;

use crate::support::{AUTH, Host, Signal, fake_opencode, free_port, is_alive, kill, until, wait_for, wait_gone};

fn started_at(host: &Host) -> u64 {
    host.health()["daemon"]["startedAt"].as_u64().unwrap()
}

#[test]
fn restart_keeps_pid_port_lock_and_opencode() {
    let host = Host::new();
    host.exercises(["command daemon restart"]);
    let project = host.project("p");
    let id = host.add(&project);
    host.openwork(["workspace", "path", "p"]).ok();
    let (daemon, port, opencode, before) = (host.daemon_pid(), host.port(), host.opencode_pid(), started_at(&host));
    for _ in 0..3 {
        host.openwork(["daemon", "restart"]).ok();
        assert_eq!((host.daemon_pid(), host.port(), host.opencode_pid()), (daemon, port, opencode));
    }
    assert!(started_at(&host) > before);
    assert_eq!(host.openwork(["workspace", "current"]).json()["workspace"]["id"], id.as_str());
    assert_eq!(host.state()["daemon"]["pid"], daemon);
    host.openwork(["workspace", "path", "p"]).ok();
    assert_eq!(host.starts().len(), 1);
    host.runs_one_of_each();
}

#[test]
fn restart_refuses_no_connection_and_never_frees_the_port() {
    const CLIENTS: usize = 8;
    const RESTARTS: usize = 20;
    let host = Host::new();
    host.add(host.project("p"));
    host.openwork(["workspace", "path", "p"]).ok();
    let port = host.port();
    let (done, asked, failures) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (host, done, asked, failures) = (&host, &done, &asked, &failures);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    // Every connection is accepted and every request answered, by either daemon.
                    if TcpStream::connect(("127.0.0.1", port)).is_err() {
                        failures.fetch_add(1, Ordering::Relaxed);
                    }
                    let target = if client % 2 == 0 { "/health" } else { "/w/p/path" };
                    match host.routed("GET", target).try_send() {
                        // The successor reports 503 until it has checked opencode.
                        Some(reply) if reply.status == 200 || (target == "/health" && reply.status == 503) => {}
                        other => panic!("{target}: {other:?}"),
                    }
                    asked.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if let Ok(taken) = TcpListener::bind(("127.0.0.1", port)) {
                    drop(taken);
                    panic!("the port was free");
                }
            }
        });
        for _ in 0..RESTARTS {
            host.openwork(["daemon", "restart"]).ok();
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(failures.into_inner(), 0, "refused connections");
    assert!(asked.into_inner() > RESTARTS, "clients were busy meanwhile");
    assert_eq!(host.starts().len(), 1);
}

#[test]
fn successor_takes_environment_and_options_of_the_client() {
    let mut host = Host::new();
    for option in ["OPENWORK_DAEMON_PORT", "OPENWORK_OPENCODE_PORT", "OPENWORK_OPENCODE_BIN"] {
        host.unset(option);
    }
    std::os::unix::fs::symlink(fake_opencode(), host.path("opencode")).unwrap();
    host.set("PATH", format!("{}:{}", host.path("").display(), host.get("PATH")));
    host.openwork(["daemon", "start", "--idle-ttl", "77m"]).env("ONLY_BEFORE", "1").ok();
    let pid = host.daemon_pid();
    let environment = || fs::read(format!("/proc/{pid}/environ")).unwrap();
    let arguments = || String::from_utf8(fs::read(format!("/proc/{pid}/cmdline")).unwrap()).unwrap();
    host.openwork(["daemon", "restart"]).env("ONLY_AFTER", "ä\u{1}=2").env("NOTIFY_SOCKET", "/nowhere").ok();
    let variables: BTreeSet<String> =
        environment().split(|byte| *byte == 0).map(|v| String::from_utf8_lossy(v).into_owned()).collect();
    assert!(variables.contains("ONLY_AFTER=ä\u{1}=2"), "{variables:?}");
    assert!(
        variables.iter().all(|v| !v.starts_with("ONLY_BEFORE") && !v.starts_with("NOTIFY_SOCKET")),
        "{variables:?}"
    );
    // Without options of its own, the successor has those of the daemon.
    assert!(arguments().contains("--idle-ttl=4620s"), "{:?}", arguments());
    host.openwork(["daemon", "restart", "--idle-ttl", "1h"]).ok();
    assert!(arguments().contains("--idle-ttl=3600s"), "{:?}", arguments());
    assert_eq!(host.daemon_pid(), pid);
}

#[test]
fn restart_to_another_port_starts_a_new_daemon() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let (daemon, opencode, port) = (host.daemon_pid(), host.opencode_pid(), free_port());
    host.openwork(["daemon", "restart", "--daemon-port", &port.to_string()]).ok();
    assert_eq!((host.port(), host.opencode_pid()), (port, opencode));
    assert_ne!(host.daemon_pid(), daemon);
}

#[test]
fn environment_too_large_for_a_request_is_passed_on_all_the_same() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    // A megabyte, three times as long when it is encoded.
    let large = "/".repeat(100_000);
    let restart = (0..10).fold(host.openwork(["daemon", "restart"]), |run, n| run.env(&format!("LARGE_{n}"), &large));
    restart.ok();
    assert_eq!(host.opencode_pid(), opencode);
    assert_ne!(host.daemon_pid(), daemon);
    let environ = fs::read(format!("/proc/{}/environ", host.daemon_pid())).unwrap();
    assert!(environ.len() > 1_000_000, "{}", environ.len());
}

#[test]
fn successor_needs_a_predecessor() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let pid = host.daemon_pid();
    let data_dir = host.data();
    let output = host.openwork(["__successor", "--data-dir", data_dir.to_str().unwrap()]).output();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stderr.contains("no predecessor has handed over"), "{output:?}");
    assert_eq!(host.daemon_pid(), pid);
    host.runs_one_of_each();
}

#[test]
fn restart_all_replaces_opencode() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let (daemon, opencode, port) = (host.daemon_pid(), host.opencode_pid(), host.port());
    host.openwork(["daemon", "restart", "--all"]).ok();
    assert_eq!((host.daemon_pid(), host.port()), (daemon, port));
    assert!(host.opencode_pid() != opencode && !is_alive(opencode));
    host.runs_one_of_each();
}

#[test]
fn opencode_is_reaped_and_replaced_after_a_restart() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    host.openwork(["daemon", "restart"]).ok();
    let opencode = host.opencode_pid();
    kill(opencode, Signal::KILL);
    wait_gone(opencode);
    until("another opencode", || host.health()["opencode"]["pid"].as_u64().filter(|pid| *pid != u64::from(opencode)));
    // The daemon is still its parent after exec, so it has to reap it.
    wait_for("opencode to be reaped", || !fs::exists(format!("/proc/{opencode}")).unwrap());
}

#[test]
fn invalid_successor_program_changes_nothing() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let (daemon, before) = (host.daemon_pid(), started_at(&host));
    let restart = |body| host.http("POST", "/restart").json(body).fails(400, "bad_request");
    restart(json!({"program": "/nowhere/openwork", "environment": []}));
    restart(json!({"program": "/", "environment": ["=x"]}));
    restart(json!({"program": "%zz", "environment": []}));
    restart(json!({"environment": []}));
    assert_eq!((host.daemon_pid(), started_at(&host)), (daemon, before));
}

#[test]
fn waiting_command_continues_after_a_restart() {
    let host = Host::new();
    host.behave("FAKE_LOAD_MS=2500");
    host.add(host.project("p"));
    host.openwork(["daemon", "start"]).ok();
    let before = started_at(&host);
    let path = host.openwork(["workspace", "path", "p"]).spawn();
    wait_for("the loading to begin", || !host.recorded("loadings").is_empty());
    host.openwork(["daemon", "restart"]).ok();
    assert!(started_at(&host) > before);
    let output = path.wait();
    assert_eq!((output.status.code(), &*output.stderr), (Some(0), ""), "{output:?}");
    assert_eq!(host.starts().len(), 1);
}

#[test]
fn web_pages_cannot_restart_the_daemon() {
    let host = Host::new();
    host.openwork(["daemon", "start", "--cors", "http://localhost:3000"]).ok();
    let (daemon, before) = (host.daemon_pid(), started_at(&host));
    let body = json!({"program": "/bin/sh", "environment": []}).to_string();
    for origin in ["tauri://localhost", "http://tauri.localhost", "http://localhost:3000"] {
        let request = host.http("POST", "/restart").header("Origin", origin);
        request.header("Content-Type", "application/json").body(&body).fails(403, "forbidden_origin");
    }
    assert_eq!((host.daemon_pid(), started_at(&host)), (daemon, before));
}

#[test]
fn invalid_credentials_do_not_restart_the_daemon() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let (daemon, before) = (host.daemon_pid(), started_at(&host));
    for (variable, value) in [
        ("OPENWORK_OPENCODE_USERNAME", "a:b"),
        ("OPENWORK_OPENCODE_PASSWORD", "a\nb"),
        ("OPENWORK_OPENCODE_PASSWORD", "\u{7f}"),
    ] {
        host.openwork(["daemon", "restart"]).env(variable, value).fails(2, "usage");
    }
    let stored = fs::read(host.file(AUTH)).unwrap();
    fs::write(host.file(AUTH), "{").unwrap();
    host.openwork(["daemon", "restart"]).fails(1, "state_corrupt");
    fs::write(host.file(AUTH), stored).unwrap();
    assert_eq!((host.daemon_pid(), started_at(&host)), (daemon, before));
    host.openwork(["daemon", "restart"]).ok();
}

#[test]
fn failed_successor_is_replaced() {
    let host = Host::new();
    host.exercises(["route POST /restart"]);
    host.openwork(["daemon", "start"]).ok();
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    // /bin/sh finds no script named "daemon" and exits at once. Nix has no other program below /bin.
    host.http("POST", "/restart").json(json!({"program": "/bin/sh", "environment": []})).ok();
    wait_gone(daemon);
    assert!(is_alive(opencode));
    host.openwork(["daemon", "start"]).ok();
    assert_eq!((host.opencode_pid(), host.starts().len()), (opencode, 1));
}
