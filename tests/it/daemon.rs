//! The daemon: start and stop, foreground and background, ports, and never more than one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

use crate::support::{
    ESTABLISHED, Host, LISTEN, Request, Running, SESSION, Signal, Stranger, close, free_port, is_alive, kill, local,
    loopback, sockets, stat_field, wait_for, wait_gone,
};

/// The open descriptors of a process, as in `ls -l /proc/PID/fd`.
fn descriptors(pid: u32) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(Result::unwrap);
    // A descriptor may be closed during the listing.
    let open = entries
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, fs::read_link(entry.path()).ok()?)));
    open.collect()
}

// --- Start and stop ---

#[test]
fn start_returns_when_opencode_is_ready() {
    let host = Host::new();
    let health = host.openwork(["daemon", "start"]).json();
    assert_eq!((&health["ok"], &health["apiVersion"]), (&json!(true), &json!(1)));
    assert_eq!(health["cliVersion"], env!("CARGO_PKG_VERSION"));
    assert_eq!(health["engine"]["phase"], "ready");
    assert_eq!(health["engine"]["version"], "1.18.33");
    assert_eq!((&health["activeId"], &health["workspaceCount"]), (&json!(""), &json!(0)));

    let (pid, port) = host.lock_text().unwrap();
    assert!(is_alive(pid) && is_alive(host.opencode_pid()));
    assert_eq!(port.to_string(), host.get("OPENWORK_DAEMON_PORT"));
    let daemon = &host.state()["daemon"];
    assert_eq!((&daemon["pid"], &daemon["port"]), (&json!(pid), &json!(port)));
    assert_eq!(daemon["baseUrl"], format!("http://127.0.0.1:{port}"));
    for field in ["pid", "port", "baseUrl", "startedAt"] {
        assert_eq!(health["daemon"][field], daemon[field], "{field}");
    }
}

#[test]
fn stop_returns_when_daemon_and_opencode_are_gone() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    host.openwork(["daemon", "stop"]).ok();
    assert!(!is_alive(daemon) && !is_alive(opencode));
    assert!(host.state()["daemon"].is_null());
    // The lock file stays: every process locks this one file.
    assert!(host.file("daemon.lock").exists());
}

#[test]
fn stop_ends_opencode_even_if_the_daemon_is_killed() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    // Kill the daemon while it has the request.
    kill(daemon, Signal::STOP);
    let stop = host.openwork(["daemon", "stop"]).spawn();
    wait_for("the request to arrive", || sockets(host.port(), ESTABLISHED).iter().any(|(_, received)| *received > 0));
    kill(daemon, Signal::KILL);
    assert!(stop.wait().status.success());
    wait_gone(opencode);
}

#[test]
fn stop_fails_when_the_state_file_is_unreadable() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    let state = host.state();
    kill(host.daemon_pid(), Signal::KILL);
    wait_gone(host.daemon_pid());
    host.write_state("{");
    host.openwork(["daemon", "stop"]).fails(1, "state_corrupt");
    assert!(is_alive(opencode));
    host.write_state(state.to_string());
    host.openwork(["daemon", "stop"]).ok();
    wait_gone(opencode);
}

#[test]
fn starting_and_stopping_twice_is_fine() {
    let host = Host::new();
    host.openwork(["daemon", "stop"]).ok();
    host.openwork(["daemon", "start"]).ok();
    let pids = (host.daemon_pid(), host.opencode_pid());
    host.openwork(["daemon", "start"]).ok();
    assert_eq!((host.daemon_pid(), host.opencode_pid()), pids);
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(host.openwork(["daemon", "stop"]).json()["ok"], true);
}

#[test]
fn status_reports_whether_the_daemon_runs() {
    let host = Host::new();
    host.exercises(["command daemon status"]);
    host.openwork(["status"]).fails(3, "daemon_not_running");
    host.openwork(["daemon", "status"]).fails(3, "daemon_not_running");
    let output = host.openwork(["status"]).exits(3);
    assert!(output.stdout.contains("not running") || output.stderr.contains("not running"), "{output:?}");
    assert!(!host.data().exists());

    let id = host.add(host.project("p"));
    let opencode = host.opencode_pid();
    let status = host.openwork(["status"]).json();
    for field in ["daemon", "opencode"] {
        assert!(status[field]["memory"].as_u64().unwrap() > 100_000, "{status}");
    }
    assert_eq!((&status["opencode"]["pid"], &status["activeId"]), (&json!(opencode), &json!(id)));
    let text = host.openwork(["daemon", "status"]).ok().stdout;
    for part in [&host.daemon_pid().to_string(), &opencode.to_string(), "ready", "1.18.33", "p"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    host.openwork(["daemon", "stop"]).ok();
    host.openwork(["status"]).fails(3, "daemon_not_running");
}

#[test]
fn commands_that_need_no_daemon_start_none() {
    let host = Host::new();
    for command in [&["workspace", "list"][..], &["daemon", "stop"], &["help"], &["--version"]] {
        host.openwork(command).ok();
    }
    host.openwork(["status"]).exits(3);
    host.openwork(["logs"]).output();
    assert_eq!(host.processes(), [0; 0]);
    assert_eq!(host.starts(), [Value::Null; 0]);

    let project = host.project("p");
    let project = project.to_str().unwrap();
    host.openwork(["workspace", "add", project, "--no-autostart"]).fails(3, "daemon_not_running");
    host.openwork(["--no-autostart", "workspace", "path", "p"]).fails(3, "daemon_not_running");
    assert_eq!(host.processes(), [0; 0]);
}

// --- Foreground ---

fn run_in_foreground<'a>(host: &'a Host, command: &[&str]) -> Running<'a> {
    let running = host.openwork(command).spawn();
    wait_for("the daemon to be ready", || host.lock_text().is_some() && host.phase() == "ready");
    assert_eq!(host.daemon_pid(), running.pid());
    running
}

#[test]
fn foreground_daemon_runs_until_a_signal() {
    for (command, signal) in [(&["daemon"][..], Signal::TERM), (&["daemon", "run"], Signal::INT)] {
        let host = Host::new();
        let running = run_in_foreground(&host, command);
        let opencode = host.opencode_pid();
        kill(running.pid(), signal);
        let output = running.wait();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stderr.contains("ready") && output.stdout.is_empty(), "{output:?}");
        assert!(!is_alive(opencode));
    }
}

#[test]
fn foreground_daemon_runs_until_stopped() {
    let host = Host::new();
    host.exercises(["command daemon"]);
    let running = run_in_foreground(&host, &["daemon"]);
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(running.wait().status.code(), Some(0));
}

#[test]
fn shutdown_over_http_stops_the_daemon() {
    let host = Host::new();
    host.exercises(["route POST /shutdown"]);
    host.openwork(["daemon", "start"]).ok();
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    assert_eq!(host.http("POST", "/shutdown").json(json!({})).ok()["ok"], true);
    wait_gone(daemon);
    assert!(!is_alive(opencode));
}

#[test]
fn status_works_with_an_unknown_active_id() {
    let host = Host::new();
    host.exercises(["command status", "route GET /health"]);
    host.write_state(json!({"version": 1, "activeId": "ws-gone", "workspaces": []}).to_string());
    host.openwork(["daemon", "start"]).ok();
    let status = host.openwork(["status"]).ok().stdout;
    assert!(status.contains("active    none (0 in all)"), "{status}");
    let health = host.http("GET", "/health").header("X-Openwork-Timeout", "soon").ok();
    assert_eq!(health["ok"], true);
}

#[test]
fn second_daemon_refuses_to_start() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let pids = (host.daemon_pid(), host.opencode_pid());
    let elsewhere = free_port().to_string();
    let error = host.openwork(["daemon", "--daemon-port", &elsewhere]).fails(1, "daemon_start_failed");
    assert!(error["message"].as_str().unwrap().contains("already running"), "{error}");
    assert_eq!((host.daemon_pid(), host.opencode_pid()), pids);
    assert_eq!(host.starts().len(), 1);
}

#[test]
fn signal_during_start_stops_the_daemon() {
    let host = Host::new();
    host.behave("FAKE_START_MS=60000");
    let running = host.openwork(["daemon"]).spawn();
    wait_for("opencode to be started", || host.starts().len() == 1);
    kill(running.pid(), Signal::TERM);
    assert_eq!(running.wait().status.code(), Some(0));
    assert_eq!(host.processes(), [0; 0]);
}

#[test]
fn orchestrator_test_sequence_passes() {
    let host = Host::new();
    host.exercises(["command daemon run"]);
    host.hold(true);
    let (daemon_port, opencode_port) = (free_port(), free_port());
    let data = host.data();
    let daemon = host
        .openwork(
            ["daemon", "run", "--data-dir", data.to_str().unwrap(), "--daemon-host", "127.0.0.1"]
                .map(str::to_owned)
                .into_iter()
                .chain([
                    "--daemon-port".to_owned(),
                    daemon_port.to_string(),
                    "--opencode-port".to_owned(),
                    opencode_port.to_string(),
                ]),
        )
        .spawn();
    let status = || Request::new(local(daemon_port), "GET", "/health").send().map_or(0, |reply| reply.status);
    wait_for("the daemon to listen", || status() != 0);
    assert_eq!(status(), 503);
    // The script takes the first 2xx as the sign that opencode is ready.
    host.hold(false);
    wait_for("a 2xx of /health", || (200..300).contains(&status()));
    let opencode = || host.openwork(["daemon", "status"]).json()["opencode"]["pid"].clone();
    let pid = opencode();
    assert!(pid.is_u64(), "{pid}");
    let workspaces = ["a", "b"].map(|name| (host.project(name), host.add(host.project(name))));
    for (project, id) in &workspaces {
        let path = host.openwork(["workspace", "path", id]).json();
        assert_eq!(path["path"]["directory"], project.to_str().unwrap());
    }
    assert_eq!(opencode(), pid);
    assert_eq!(host.openwork(["instance", "dispose", &workspaces[0].1]).json()["disposed"], true);
    host.openwork(["workspace", "path", &workspaces[0].1]).ok();
    assert_eq!((opencode(), host.starts().len()), (pid, 1));
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(daemon.wait().status.code(), Some(0));
}

// --- Background ---

#[test]
fn background_daemon_has_its_own_session() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    // Our session may be 0 in a container entered from outside, which getsid of rustix does not take.
    let sessions = [host.daemon_pid(), std::process::id()].map(|pid| stat_field(pid, SESSION));
    assert_ne!(sessions[0], sessions[1]);
    // The daemon does not keep the working directory either.
    let cwd = fs::read_link(format!("/proc/{}/cwd", host.daemon_pid())).unwrap();
    assert!(cwd == Path::new("/") || cwd == host.data(), "{cwd:?}");
}

#[test]
fn daemon_inherits_no_descriptors() {
    let host = Host::new();
    let (held, fifo) = (host.path("held"), host.path("other"));
    let lines = format!("exec 9>{} 5>{}", held.display(), fifo.display());
    // If the daemon inherited the pipes that this test reads, `ok` would never return.
    host.openwork(["daemon", "start"]).after(&lines).ok();
    let inputs = [PathBuf::from("/dev/null"), host.file("opencode.lock")];
    for (pid, input) in [host.daemon_pid(), host.opencode_pid()].into_iter().zip(inputs) {
        let open = descriptors(pid);
        assert!(open.iter().all(|(_, path)| *path != held && *path != fifo), "{open:?}");
        assert_eq!(open.iter().find(|(fd, _)| *fd == 0).unwrap().1, input);
        for standard in [1, 2] {
            let (_, path) = open.iter().find(|(fd, _)| *fd == standard).unwrap();
            assert!(path.starts_with(host.data()) || path.ends_with("null"), "{open:?}");
        }
    }
    // opencode does not inherit the daemon's lock.
    let lock = host.file("daemon.lock");
    let open = descriptors(host.opencode_pid());
    assert!(open.iter().all(|(_, path)| *path != lock), "{open:?}");
}

#[test]
fn daemon_survives_a_hangup() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let pids = (host.daemon_pid(), host.opencode_pid());
    kill(pids.0, Signal::HUP);
    // The second HUP is delivered only after the first has been handled.
    kill(pids.0, Signal::HUP);
    host.add(host.project("p"));
    host.openwork(["workspace", "path", "p"]).ok();
    assert_eq!((host.daemon_pid(), host.opencode_pid()), pids);
}

// --- Only one ---

#[test]
fn concurrent_commands_share_one_daemon() {
    let host = Host::new();
    let projects: Vec<PathBuf> = (0..20).map(|n| host.project(format!("p{n}"))).collect();
    let commands: Vec<Running> =
        projects.iter().map(|project| host.openwork(["workspace", "add", project.to_str().unwrap()]).spawn()).collect();
    for command in commands {
        let output = command.wait();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
    assert_eq!(host.names().len(), 20);
    host.opencode_pid();
    assert_eq!(host.starts().len(), 1);
    host.runs_one_of_each();
}

#[test]
fn concurrent_starts_wait_for_opencode() {
    let host = Host::new();
    host.behave("FAKE_START_MS=500");
    let commands: Vec<Running> = (0..8).map(|_| host.openwork(["daemon", "start", "--json"]).spawn()).collect();
    for command in commands {
        let health = command.wait().object();
        assert_eq!((&health["ok"], &health["daemon"]["pid"]), (&json!(true), &json!(host.daemon_pid())));
    }
    assert_eq!(host.starts().len(), 1);
}

#[test]
fn stuck_start_of_another_client_times_out() {
    let host = Host::new();
    host.exercises(["code daemon_start_failed"]);
    host.openwork(["daemon", "start"]).ok();
    host.openwork(["daemon", "stop"]).ok();
    // Hold the lock like a client that is starting a daemon.
    let lock = File::open(host.file("start.lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    host.openwork(["daemon", "start", "--timeout", "1"]).fails(1, "daemon_start_failed");
    host.openwork(["workspace", "add", "/tmp", "--timeout", "1"]).fails(1, "daemon_start_failed");
    drop(lock);
    host.openwork(["daemon", "start"]).ok();
}

#[test]
fn adding_does_not_wait_for_opencode() {
    let host = Host::new();
    host.behave("FAKE_NEVER_LISTEN=1");
    host.add(host.project("p"));
    host.openwork(["workspace", "switch", "p"]).ok();
    assert_eq!(host.phase(), "starting");
}

// --- Ports ---

#[test]
fn ports_are_remembered() {
    let mut host = Host::new();
    host.exercises(["option --opencode-port"]);
    let ports = |host: &Host| {
        let health = host.openwork(["daemon", "start"]).json();
        host.openwork(["daemon", "stop"]).ok();
        [health["daemon"]["port"].to_string(), health["opencode"]["port"].to_string()]
    };
    let asked_for = [host.get("OPENWORK_DAEMON_PORT"), host.get("OPENWORK_OPENCODE_PORT")].map(str::to_owned);
    assert_eq!(ports(&host), asked_for);
    host.unset("OPENWORK_DAEMON_PORT");
    host.unset("OPENWORK_OPENCODE_PORT");
    assert_eq!(ports(&host), asked_for);

    // Options take precedence over variables.
    let given = [free_port(), free_port()].map(|port| port.to_string());
    host.set("OPENWORK_DAEMON_PORT", &asked_for[0]);
    let options = ["--daemon-port", &given[0], "--opencode-port", &given[1]];
    host.openwork(["daemon", "start"].iter().chain(&options)).ok();
    assert_eq!([host.port().to_string(), host.health()["opencode"]["port"].to_string()], given);
}

#[test]
fn requested_port_in_use_is_an_error() {
    let host = Host::new();
    host.exercises(["code port_in_use", "variable OPENWORK_DAEMON_PORT"]);
    for (variable, ip) in [("OPENWORK_DAEMON_PORT", "127.0.0.1"), ("OPENWORK_OPENCODE_PORT", "127.83.12.9")] {
        let taken = TcpListener::bind((ip, 0)).unwrap();
        let port = taken.local_addr().unwrap().port().to_string();
        let start = host.openwork(["daemon", "start", "--opencode-host", "127.83.12.9"]);
        let error = start.env(variable, &port).fails(1, "port_in_use");
        assert!(error["message"].as_str().unwrap().contains(&port), "{error}");
        host.openwork(["daemon", "stop"]).ok();
    }
    assert_eq!(host.starts(), [Value::Null; 0]);
    host.openwork(["daemon", "start"]).ok();
}

#[test]
fn restart_to_a_taken_port_keeps_the_daemon() {
    let host = Host::new();
    host.exercises(["option --daemon-port"]);
    host.openwork(["daemon", "start"]).ok();
    let pid = host.daemon_pid();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("--daemon-port={}", taken.local_addr().unwrap().port());
    host.openwork(["daemon", "restart", &port]).fails(1, "port_in_use");
    assert_eq!((host.daemon_pid(), is_alive(pid)), (pid, true));
}

#[test]
fn restart_warns_about_options_that_opencode_does_not_get() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let pid = host.opencode_pid();
    let port = format!("--opencode-port={}", free_port());
    for options in [&port, "--opencode-host=127.1.2.3", "--opencode-bin=/bin/true"] {
        let output = host.openwork(["daemon", "restart", options]).ok();
        assert!(output.stderr.contains("opencode keeps running with its port and program"), "{output:?}");
        assert_eq!(host.opencode_pid(), pid);
    }
    let output = host.openwork(["daemon", "restart", "--all", &port]).ok();
    assert!(!output.stderr.contains("keeps running"), "{output:?}");
    assert!(output.stdout.contains(port.split_once('=').unwrap().1), "{output:?}");
}

#[test]
fn taken_default_ports_are_avoided() {
    let mut host = Host::new();
    host.exercises(["command workspace path"]);
    host.unset("OPENWORK_DAEMON_PORT");
    host.unset("OPENWORK_OPENCODE_PORT");
    let defaults = [6174, 6175];
    // If a bind fails, another process has the port, so it is taken either way.
    let _taken = defaults.map(|port| TcpListener::bind(("127.0.0.1", port)));
    host.openwork(["daemon", "start"]).ok();
    let health = host.health();
    let ports = [&health["daemon"]["port"], &health["opencode"]["port"]];
    assert_ne!(ports[0], ports[1]);
    assert!(!ports.iter().any(|port| defaults.iter().any(|default| **port == *default)), "{health}");
    host.add(host.project("p"));
    host.openwork(["workspace", "path", "p"]).ok();
}

#[test]
fn only_loopback_addresses_are_accepted() {
    let host = Host::new();
    host.exercises(["option --daemon-host", "option --opencode-host"]);
    for option in ["--daemon-host", "--opencode-host"] {
        for address in ["0.0.0.0", "::", "192.0.2.1", "example.com"] {
            host.openwork(["daemon", "start", option, address]).fails(2, "usage");
        }
    }
    // The daemon has only 127.0.0.1; opencode may use any host address of 127.0.0.0/8.
    host.openwork(["daemon", "start", "--daemon-host", "127.0.0.2"]).fails(2, "usage");
    for address in ["127.0.0.0", "127.255.255.255", "128.0.0.1", "127.1", ""] {
        host.openwork(["daemon", "start", "--opencode-host", address]).fails(2, "usage");
    }
    let unit = host.openwork(["service", "print", "--opencode-host", "127.8.9.10"]).ok().stdout;
    assert!(unit.contains(" --opencode-host=127.8.9.10"), "{unit}");
    assert_eq!(host.processes(), [0; 0]);
    host.openwork(["daemon", "start", "--daemon-host", "127.0.0.1", "--opencode-host", "localhost"]).ok();
    for port in [host.port(), host.opencode_address().port()] {
        assert_eq!(sockets(port, LISTEN), [(loopback(), 0)]);
    }
}

#[test]
fn opencode_listens_on_a_random_loopback_address() {
    let mut host = Host::new();
    host.unset("OPENWORK_OPENCODE_PORT");
    let started_at = |host: &Host, options: &[&str]| {
        host.openwork(["daemon", "start"].iter().chain(options)).ok();
        let address = host.opencode_address();
        assert_eq!(sockets(address.port(), LISTEN).len(), 1);
        host.openwork(["daemon", "stop"]).ok();
        address
    };
    // openwork 0.1 recorded only the port, and used 127.0.0.1.
    host.write_state(json!({"version": 1, "workspaces": [], "ports": {"daemon": 0, "opencode": 6175}}).to_string());
    let random = started_at(&host, &[]);
    assert!(random.ip().is_loopback() && random.ip() != Ipv4Addr::LOCALHOST && random.port() != 6175, "{random}");
    // The state file keeps the address and the port.
    assert_eq!(started_at(&host, &[]), random);
    let ports = &host.state()["ports"];
    assert_eq!((&ports["opencodeHost"], &ports["opencode"]), (&json!(random.ip().to_string()), &json!(random.port())));
    let another = Host::new();
    assert_ne!(started_at(&another, &[]).ip(), random.ip());

    // Each option sets its own half of the address, and later starts keep it.
    let port = free_port();
    let with_port = started_at(&host, &["--opencode-port", &port.to_string()]);
    assert_eq!(with_port, SocketAddr::new(random.ip(), port));
    let options = ["--opencode-host", "127.0.0.1", "--opencode-port", &port.to_string()];
    assert_eq!(started_at(&host, &options).to_string(), format!("127.0.0.1:{port}"));
    assert_eq!(started_at(&host, &[]).to_string(), format!("127.0.0.1:{port}"));

    // A taken port is replaced; the address stays.
    let _taken = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let changed = started_at(&host, &[]);
    assert_eq!(changed.ip().to_string(), "127.0.0.1");
    assert_ne!(changed.port(), port);
}

#[test]
fn opencode_of_openwork_0_1_keeps_its_address_until_replaced() {
    let host = Host::new();
    host.openwork(["daemon", "start", "--opencode-host", "127.0.0.1"]).ok();
    let (pid, address) = (host.opencode_pid(), host.opencode_address());
    host.openwork(["daemon", "stop", "--keep-opencode"]).ok();
    let mut state = host.state();
    state["ports"].as_object_mut().unwrap().remove("opencodeHost").unwrap();
    let binary = state["binaries"]["opencode"].as_object_mut().unwrap();
    for field in ["resolved", "inode", "changed"] {
        binary.remove(field).unwrap();
    }
    host.write_state(state.to_string());
    host.openwork(["daemon", "start"]).ok();
    assert_eq!((host.opencode_pid(), host.opencode_address()), (pid, address));
    // The record of 0.1 does not show whether the binary was replaced.
    assert!(!host.openwork(["status"]).ok().stdout.contains("was replaced"));
    host.openwork(["workspace", "add", "/tmp"]).ok();
    host.openwork(["workspace", "path", "/tmp"]).ok();
    host.openwork(["daemon", "restart", "--all"]).ok();
    assert_ne!(host.opencode_address().ip(), address.ip());
}

// --- Unresponsive daemons ---

#[test]
fn unresponsive_daemon_times_out() {
    let host = Host::new();
    host.exercises(["code daemon_unresponsive"]);
    host.openwork(["daemon", "start"]).ok();
    let daemon = host.daemon_pid();
    kill(daemon, Signal::STOP);
    for command in [&["status"][..], &["workspace", "add", "/tmp"], &["daemon", "start"], &["workspace", "path"]] {
        host.openwork(command.iter().chain(&["--timeout", "1"])).fails(1, "daemon_unresponsive");
    }
    kill(daemon, Signal::CONT);
    wait_for("the daemon to answer again", || host.openwork(["status"]).output().status.success());
    assert_eq!(host.daemon_pid(), daemon);
}

#[test]
fn force_stops_a_frozen_daemon() {
    let host = Host::new();
    host.add(host.project("p"));
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    kill(daemon, Signal::STOP);
    let error = host.openwork(["daemon", "stop", "--timeout", "1"]).fails(1, "daemon_unresponsive");
    assert!(error["hint"].as_str().unwrap().contains("`openwork daemon stop --force`"), "{error}");
    assert!(is_alive(daemon) && is_alive(opencode));
    // A new daemon adopts opencode and stops it properly.
    let output = host.openwork(["daemon", "stop", "--force"]).ok();
    assert!(output.stderr.contains(&format!("pid {daemon}")), "{output:?}");
    assert!(!is_alive(daemon) && !is_alive(opencode));
    assert!(host.requests().iter().any(|request| request["target"] == "/global/dispose"));
    assert_eq!(host.processes(), [0; 0]);
    assert_eq!(host.names(), ["p"]);
}

#[test]
fn force_kills_only_an_unresponsive_daemon() {
    let host = Host::new();
    host.exercises(["option --force"]);
    assert_eq!(host.openwork(["daemon", "stop", "--force"]).ok().stdout, "the daemon is not running\n");
    host.add(host.project("p"));
    host.opencode_pid();
    let output = host.openwork(["daemon", "stop", "--force"]).ok();
    assert_eq!((&*output.stdout, &*output.stderr), ("stopped\n", ""));
    // A responsive daemon stops by itself.
    assert!(fs::read_to_string(host.file("daemon.log")).unwrap().contains("stopping on request"));
    // --keep-opencode works with --force as well.
    host.openwork(["daemon", "start"]).ok();
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    kill(daemon, Signal::STOP);
    host.openwork(["daemon", "stop", "--force", "--keep-opencode"]).ok();
    assert!(!is_alive(daemon) && is_alive(opencode));
}

/// The lock file names a process that does not hold the lock.
#[test]
fn force_kills_only_the_lock_holder() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let daemon = host.daemon_pid();
    let stranger = Stranger::idle();
    let text = fs::read_to_string(host.file("daemon.lock")).unwrap();
    kill(daemon, Signal::STOP);
    fs::write(host.file("daemon.lock"), text.replace(&daemon.to_string(), &stranger.pid().to_string())).unwrap();
    host.openwork(["daemon", "stop", "--force"]).ok();
    assert!(!is_alive(daemon) && is_alive(stranger.pid()));
}

#[test]
fn port_of_a_dead_daemon_is_not_trusted() {
    // Another process may by now have the pid or port that a dead daemon left in the lock file.
    let host = Host::new();
    host.exercises(["code daemon_not_running", "option --no-autostart"]);
    host.add(host.project("p"));
    let (daemon, port) = host.lock_text().unwrap();
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
    let stranger = TcpListener::bind(("127.0.0.1", port)).unwrap();
    stranger.set_nonblocking(true).unwrap();
    host.openwork(["status"]).fails(3, "daemon_not_running");
    host.openwork(["workspace", "add", "/tmp", "--no-autostart"]).fails(3, "daemon_not_running");
    assert_eq!(host.names(), ["p"]);
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(stranger.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    close(stranger);
    host.openwork(["daemon", "start"]).ok();
    assert_ne!(host.daemon_pid(), daemon);
}

#[test]
fn failed_start_reports_the_cause() {
    let host = Host::new();
    // A directory in place of the first file that the daemon opens.
    fs::create_dir_all(host.file("daemon.lock")).unwrap();
    let output = host.openwork(["daemon", "start"]).exits(1);
    assert!(output.stderr.contains("daemon.lock"), "{output:?}");
    let output = host.openwork(["workspace", "add", "/tmp"]).exits(1);
    assert!(output.stderr.contains("daemon.lock"), "{output:?}");
    assert_eq!(host.processes(), [0; 0]);
}

// --- Logs ---

#[test]
fn logs_work_without_a_daemon() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    host.openwork(["daemon", "stop"]).ok();
    let opencode = host.openwork(["logs", "opencode"]).ok().stdout;
    assert!(opencode.contains("opencode server listening on"), "{opencode}");
    let daemon = host.openwork(["logs", "daemon"]).ok().stdout;
    assert_eq!(daemon, fs::read_to_string(host.file("daemon.log")).unwrap());
    let last = host.openwork(["logs", "daemon", "--lines", "1"]).ok().stdout;
    assert_eq!((last.lines().count(), daemon.lines().last()), (1, last.lines().next()));
    assert_eq!(host.processes(), [0; 0]);
}

#[test]
fn logs_follow_the_file() {
    let host = Host::new();
    host.exercises(["option --follow"]);
    host.openwork(["daemon", "start"]).ok();
    let mut log = File::options().append(true).open(host.file("opencode.log")).unwrap();
    for options in [["-f", "-n", "0"], ["--follow", "--lines", "0"]] {
        let following = host.openwork(["logs", "opencode"].iter().chain(&options)).spawn();
        // Write repeatedly: lines written before `logs` follows count as old ones.
        let mut writes_and_sees = |line: &str| {
            wait_for(line, || {
                log.write_all(line.as_bytes()).unwrap();
                following.stdout_so_far().contains(line)
            });
        };
        writes_and_sees("a new line\n");
        // `logs` survives truncation, which the daemon does to an oversized log.
        File::options().write(true).open(host.file("opencode.log")).unwrap().set_len(0).unwrap();
        writes_and_sees("after the cut\n");
        // A line is printed once it is complete.
        log.write_all("h\u{e4}".as_bytes().split_at(2).0).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(500));
        log.write_all("\u{e4}lf\n".as_bytes().split_at(1).1).unwrap();
        wait_for("the whole line", || following.stdout_so_far().contains("h\u{e4}lf\n"));
        kill(following.pid(), Signal::TERM);
        following.wait();
    }
}
