//! One opencode for many workspaces: instances on demand, and opencode crashing, hanging, rejecting its
//! password, or being of the wrong version.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{
    AUTH, ESTABLISHED, HEALTH, Host, IS_V2, LOADING_CALL, START_TIME, STATE, Signal, VERSION, close, copy_program,
    fake_opencode, is_alive, kill, sockets, stat_field, until, wait_for, wait_gone, write_program,
};

// --- Several workspaces, one process ---

#[test]
fn one_opencode_serves_every_workspace() {
    let host = Host::new();
    let projects = ["a", "b", "c"].map(|name| host.project(name));
    for project in &projects {
        host.add(project);
    }
    let pid = host.opencode_pid();
    for project in &projects {
        let name = project.file_name().unwrap();
        host.openwork(["workspace".as_ref(), "switch".as_ref(), name]).ok();
        let answer = host.openwork(["workspace", "path"]).json();
        assert_eq!(answer["path"]["directory"], project.to_str().unwrap());
        assert_eq!(answer["workspace"]["path"], project.to_str().unwrap());
        assert_eq!(host.opencode_pid(), pid);
    }
    assert_eq!(host.starts().len(), 1);
}

#[test]
fn first_use_loads_the_instance() {
    let host = Host::new();
    let (used, unused) = (host.project("used"), host.project("unused"));
    host.add(&used);
    host.add(&unused);
    host.openwork(["workspace", "switch", "used"]).ok();
    host.openwork(["workspace", "info", "unused"]).ok();
    host.opencode_pid();
    assert_eq!(host.recorded("instances"), [""; 0]);

    host.openwork(["workspace", "path", "used"]).ok();
    host.openwork(["workspace", "path", "used"]).ok();
    assert_eq!(host.instance(&used), ["load"]);
    assert_eq!(host.instance(&unused), [""; 0]);
}

#[test]
fn next_use_reloads_a_disposed_instance() {
    let host = Host::new();
    host.exercises(["command instance dispose"]);
    let project = host.project("p");
    host.add(&project);
    host.openwork(["workspace", "path", "p"]).ok();
    let pid = host.opencode_pid();

    let disposed = host.openwork(["instance", "dispose", "p"]).json();
    assert_eq!(disposed["disposed"], true);
    assert_eq!(disposed["workspace"]["name"], "p");
    assert_eq!(host.instance(&project), ["load", "dispose"]);

    host.openwork(["workspace", "path", "p"]).ok();
    assert_eq!(host.instance(&project), ["load", "dispose", "load"]);
    assert_eq!(host.opencode_pid(), pid);
}

#[test]
fn dispose_skips_an_unloaded_instance() {
    // opencode would load the instance first, just to dispose it.
    let host = Host::new();
    let project = host.project("p");
    host.add(&project);
    host.opencode_pid();
    assert_eq!(host.openwork(["instance", "dispose", "p"]).json()["disposed"], false);
    assert_eq!(host.instance(&project), [""; 0]);

    host.openwork(["workspace", "path", "p"]).ok();
    host.openwork(["instance", "dispose", "p"]).ok();
    assert_eq!(host.openwork(["instance", "dispose", "p"]).json()["disposed"], false);
    assert_eq!(host.instance(&project), ["load", "dispose"]);
}

#[test]
fn dispose_skips_an_instance_lost_in_a_crash() {
    let host = Host::new();
    let project = host.project("p");
    host.add(&project);
    host.openwork(["workspace", "path", "p"]).ok();
    let before = host.opencode_pid();
    kill(before, Signal::KILL);
    wait_for("a new opencode", || host.opencode_pid() != before);
    assert_eq!(host.openwork(["instance", "dispose", "p"]).json()["disposed"], false);
    assert_eq!(host.instance(&project), ["load"]);
}

#[test]
fn busy_instance_is_disposed_only_by_force() {
    let host = Host::new();
    host.exercises(["code instance_busy", "option --force", "route POST /instances/:id/dispose"]);
    let (busy, idle) = (host.project("busy"), host.project("idle"));
    for project in [&busy, &idle] {
        host.add(project);
        host.openwork(["workspace".as_ref(), "path".as_ref(), project.as_os_str()]).ok();
    }
    host.busy(&[&busy]);

    host.openwork(["instance", "dispose", "busy"]).fails(1, "instance_busy");
    host.http("POST", "/instances/busy/dispose").json(json!({})).fails(409, "instance_busy");
    host.http("POST", "/instances/busy/dispose").json(json!({"force": false})).fails(409, "instance_busy");
    assert_eq!(host.instance(&busy), ["load"]);
    host.openwork(["instance", "dispose", "idle"]).ok();

    assert_eq!(host.openwork(["instance", "dispose", "busy", "--force"]).json()["disposed"], true);
    assert_eq!(host.instance(&busy), ["load", "dispose"]);

    host.openwork(["workspace", "path", "busy"]).ok();
    let forced = host.http("POST", "/instances/busy/dispose").json(json!({"force": true})).ok();
    assert_eq!(forced["disposed"], true);
}

// --- Start ---

#[test]
fn opencode_starts_on_loopback_with_password_and_empty_directory() {
    let mut host = Host::new();
    host.set("NOTIFY_SOCKET", "/run/notify");
    host.set("MARKER", "of this shell");
    // The daemon chooses the password, not the shell.
    host.set("OPENCODE_SERVER_PASSWORD", "from the shell");
    host.openwork(["daemon", "start"]).ok();

    let start = host.starts().remove(0);
    let address = Host::start_address(&start);
    assert!(address.ip().is_loopback() && address.ip() != Ipv4Addr::LOCALHOST, "{address}");
    assert_eq!(start["argv"][0], "serve");
    assert_eq!(start["cwd"], host.file("opencode").to_str().unwrap());
    assert_eq!(fs::read_dir(host.file("opencode")).unwrap().count(), 0);

    let environment = host.environment(start["pid"].as_u64().unwrap() as u32);
    let has = |variable: String| environment.contains(&variable);
    let credentials =
        if IS_V2 { "OPENCODE_PASSWORD" } else { "OPENCODE_SERVER_USERNAME=opencode\0OPENCODE_SERVER_PASSWORD" };
    for variable in format!("{credentials}={}", host.password()).split('\0') {
        assert!(has(variable.into()), "{variable}");
    }
    assert!(has(format!("OPENCODE_SERVER_PASSWORD={}", host.password())));
    assert!(has("MARKER=of this shell".into()));
    assert!(!environment.iter().any(|variable| variable.starts_with("NOTIFY_SOCKET=")));
    let engine_id = host.state()["opencode"]["engineId"].as_str().unwrap().to_owned();
    assert!(!engine_id.is_empty() && has(format!("OPENWORK_ENGINE={engine_id}")));
}

#[test]
fn state_file_records_the_identity_of_opencode() {
    let host = Host::new();
    host.exercises(["variable OPENWORK_OPENCODE_PORT"]);
    host.openwork(["daemon", "start"]).ok();
    let pid = host.opencode_pid();
    let opencode = &host.state()["opencode"];
    assert_eq!(opencode["pid"], pid);
    assert_eq!(opencode["port"].to_string(), host.get("OPENWORK_OPENCODE_PORT"));
    assert_eq!(opencode["baseUrl"], format!("http://{}", host.opencode_address()));
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(opencode["bootId"], boot_id.trim());
    assert_eq!(opencode["startTicks"], stat_field(pid, START_TIME));

    host.openwork(["daemon", "stop"]).ok();
    assert!(host.state()["opencode"].is_null());
}

#[test]
fn password_is_generated_once_and_never_shown() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let password = host.password();
    assert!(password.len() == 64 && password.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let mode = fs::metadata(host.file(AUTH)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    // Every `Host` searches command output and logs for the password when it is dropped.
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&arguments).contains(&password), "{:?}", entry.path());
    }
    for command in [&["status"][..], &["status", "--json"], &["logs", "daemon"], &["logs", "opencode"]] {
        host.openwork(command).ok();
    }

    host.openwork(["daemon", "stop"]).ok();
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.password(), password);
}

#[test]
fn password_goes_only_to_the_started_process() {
    // opencode is started but does not listen; another process takes its port.
    let host = Host::new();
    host.exercises(["option --timeout"]);
    host.behave("FAKE_NEVER_LISTEN=1");
    let starting = host.openwork(["daemon", "start", "--timeout", "4", "--json"]).spawn();
    wait_for("opencode to be started", || host.starts().len() == 1);
    let squatter = TcpListener::bind(Host::start_address(&host.starts()[0])).unwrap();
    squatter.set_nonblocking(true).unwrap();
    let mut heard = Vec::new();
    while is_alive(starting.pid()) {
        if let Ok((mut stream, _)) = squatter.accept() {
            stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            let mut buffer = [0; 4096];
            let count = stream.read(&mut buffer).unwrap_or(0);
            heard.extend_from_slice(&buffer[..count]);
            let _ = stream.write_all(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n");
        }
        thread::yield_now();
    }
    let heard = String::from_utf8_lossy(&heard).to_lowercase();
    assert!(!heard.contains("authorization"), "{heard}");
    // The stranger's 401 does not count as a reply of opencode.
    assert_eq!(starting.wait().object()["error"]["code"], "opencode_timeout");
}

#[test]
fn version_is_queried_once_per_binary() {
    let host = Host::new();
    host.exercises(["variable OPENWORK_OPENCODE_BIN"]);
    let binary = host.path("opencode");
    copy_program(fake_opencode(), &binary);
    let asked_by_a_start = || {
        host.openwork(["daemon", "start"]).env("OPENWORK_OPENCODE_BIN", &binary).ok();
        let version = host.health()["engine"]["version"].as_str().unwrap().to_owned();
        host.openwork(["daemon", "stop"]).ok();
        (host.recorded("versions").len(), version)
    };
    assert_eq!(asked_by_a_start(), (1, VERSION.to_owned()));
    assert_eq!(asked_by_a_start(), (1, VERSION.to_owned()));

    // An upgrade in place.
    let touch = |path: &Path| assert!(Command::new("touch").args(["-d", "@0"]).arg(path).status().unwrap().success());
    touch(&binary);
    host.behave("FAKE_VERSION=1.99.0");
    assert_eq!(asked_by_a_start(), (2, "1.99.0".to_owned()));
    assert_eq!(asked_by_a_start(), (2, "1.99.0".to_owned()));

    // npm gives every file the same date: the next binary has the path, size and time of the last.
    let next = host.path("next");
    copy_program(fake_opencode(), &next);
    touch(&next);
    fs::rename(&next, &binary).unwrap();
    host.behave("FAKE_VERSION=1.99.1");
    assert_eq!(asked_by_a_start(), (3, "1.99.1".to_owned()));

    // Another binary behind the same link.
    let link = host.path("link");
    symlink(&binary, &link).unwrap();
    let asked_by_link = || {
        host.openwork(["daemon", "start"]).env("OPENWORK_OPENCODE_BIN", &link).ok();
        host.openwork(["daemon", "stop"]).ok();
        host.recorded("versions").len()
    };
    assert_eq!((asked_by_link(), asked_by_link()), (4, 4));
    let moved = host.path("moved");
    fs::rename(&binary, &moved).unwrap();
    fs::remove_file(&link).unwrap();
    symlink(&moved, &link).unwrap();
    assert_eq!(asked_by_link(), 5);
}

#[test]
fn replaced_binary_is_queried_at_the_next_start() {
    let mut host = Host::new();
    let binary = host.path("opencode");
    copy_program(fake_opencode(), &binary);
    host.set("OPENWORK_OPENCODE_BIN", &binary);
    host.openwork(["daemon", "start"]).ok();
    let before = host.opencode_pid();
    let next = host.path("next");
    copy_program(fake_opencode(), &next);
    fs::rename(&next, &binary).unwrap();
    host.behave("FAKE_VERSION=1.99.0");
    kill(before, Signal::KILL);
    until("the next opencode", || (host.opencode_pid() != before).then_some(()));
    assert_eq!(host.health()["engine"]["version"], "1.99.0");
}

#[test]
fn opencode_is_found_on_path_and_in_home() {
    let mut host = Host::new();
    host.exercises(["option --opencode-bin"]);
    let place = |dir: &Path| {
        fs::create_dir_all(dir).unwrap();
        symlink(fake_opencode(), dir.join("opencode")).unwrap();
        dir.to_owned()
    };
    let at_home = place(&host.path("home/.opencode/bin"));
    let on_path = place(&host.path("bin"));
    host.unset("OPENWORK_OPENCODE_BIN");
    let found = |host: &Host| {
        host.openwork(["daemon", "start"]).ok();
        let path = host.state()["binaries"]["opencode"]["path"].as_str().unwrap().to_owned();
        host.openwork(["daemon", "stop"]).ok();
        path
    };
    // Not the PATH of the tests, which may have an opencode in it.
    let empty = host.project("empty");
    host.set("PATH", &empty);
    assert!(found(&host).starts_with(at_home.to_str().unwrap()));
    host.set("PATH", format!("{}:{}", empty.display(), on_path.display()));
    assert!(found(&host).starts_with(on_path.to_str().unwrap()));
    // The option takes precedence over both.
    let given = at_home.join("opencode");
    host.openwork(["daemon", "start", "--opencode-bin", given.to_str().unwrap()]).ok();
    assert_eq!(host.state()["binaries"]["opencode"]["path"], given.to_str().unwrap());
}

// --- Failed starts ---

/// cron and git hooks start daemons too, with a PATH of their own.
#[test]
fn missing_opencode_error_names_the_path_of_the_daemon() {
    let mut host = Host::new();
    let opencode = host.get("OPENWORK_OPENCODE_BIN").to_owned();
    host.unset("OPENWORK_OPENCODE_BIN");
    host.set("PATH", "/nowhere/bin:/nor/here");
    host.add(host.project("p"));
    let bin = host.project("bin");
    std::os::unix::fs::symlink(opencode, bin.join("opencode")).unwrap();
    host.set("PATH", bin);
    let error = host.openwork(["workspace", "path"]).fails(5, "opencode_not_found");
    assert!(error["message"].as_str().unwrap().contains("PATH of the daemon, /nowhere/bin:/nor/here"), "{error}");
    assert!(error["hint"].as_str().unwrap().contains("`openwork daemon restart`"), "{error}");
    host.openwork(["daemon", "restart"]).ok();
    host.openwork(["workspace", "path"]).ok();
}

#[test]
fn registry_works_without_opencode() {
    let mut host = Host::new();
    host.exercises(["code opencode_not_found"]);
    host.set("OPENWORK_OPENCODE_BIN", host.path("no-such-opencode"));
    host.add(host.project("p"));
    host.openwork(["workspace", "path", "p"]).fails(5, "opencode_not_found");
    host.http("GET", "/workspaces/p/path").fails(503, "opencode_not_found");
    host.openwork(["daemon", "start"]).fails(5, "opencode_not_found");

    let health = host.health();
    assert_eq!(health["ok"], false);
    assert_eq!(health["opencode"], Value::Null);
    assert_eq!(health["engine"]["phase"], "failed");
    assert_eq!(health["engine"]["lastError"]["code"], "opencode_not_found");
    let status = host.openwork(["status"]).ok();
    assert!(status.stdout.contains("failed"), "{status:?}");
    assert_eq!(host.names(), ["p"]);
}

#[test]
fn unsupported_major_version_is_refused() {
    let host = Host::new();
    host.exercises(["code opencode_unsupported"]);
    for version in ["3.0.0", "0.15.0"] {
        host.behave(&format!("FAKE_VERSION={version}"));
        let error = host.openwork(["daemon", "start"]).fails(5, "opencode_unsupported");
        assert!(error["message"].as_str().unwrap().contains(version), "{error}");
        host.http("POST", "/start").json(json!({})).fails(503, "opencode_unsupported");
        host.openwork(["daemon", "stop"]).ok();
    }
    assert_eq!(host.starts(), [Value::Null; 0]);
}

#[test]
fn stop_does_not_wait_for_a_version() {
    let mut host = Host::new();
    let binary = host.path("opencode");
    write_program(&binary, "#!/bin/sh\ntouch \"$FAKE_OPENCODE_DIR/asked\"\nexec sleep 1000\n");
    host.set("OPENWORK_OPENCODE_BIN", &binary);
    let starting = host.openwork(["daemon", "start", "--json"]).spawn();
    wait_for("the version to be asked for", || host.path("fake/asked").exists());
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(starting.wait().object()["error"]["code"], "opencode_unavailable");
    assert_eq!(host.processes(), [0; 0]);
}

#[test]
fn binary_that_cannot_be_run_is_reported() {
    let mut host = Host::new();
    let binary = host.path("opencode");
    write_program(&binary, "#!/no/such/interpreter\n");
    host.set("OPENWORK_OPENCODE_BIN", &binary);
    let error = host.openwork(["daemon", "start"]).fails(5, "opencode_start_failed");
    assert!(error["message"].as_str().unwrap().contains("cannot be run"), "{error}");
    // After the repair, opencode starts without further action.
    write_program(&binary, &format!("#!/bin/sh\nexec '{}' \"$@\"\n", fake_opencode().display()));
    host.openwork(["daemon", "start"]).ok();
}

/// A process that no state file names could never be proved ours again.
#[test]
fn opencode_that_cannot_be_recorded_is_not_started() {
    let host = Host::unprivileged();
    let p = host.project("p");
    host.openwork(["daemon", "start"]).ok();
    host.add(&p);
    let first = host.opencode_pid();
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o500)).unwrap();
    kill(first, Signal::KILL);
    wait_gone(first);
    let error = host.openwork(["workspace", "path", "p"]).fails(1, "state_write_failed");
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(error["message"].as_str().unwrap().contains(STATE), "{error}");
    assert_eq!((host.starts().len(), host.processes()), (1, vec![host.daemon_pid()]));
    host.openwork(["workspace", "path", "p"]).ok();
    assert_eq!(host.starts().len(), 2);
    host.runs_one_of_each();
}

#[test]
fn crash_loop_fails_with_the_last_output() {
    let host = Host::new();
    host.exercises(["code opencode_start_failed", "route POST /start"]);
    host.behave("FAKE_CRASH_ON_START=77");
    let error = host.openwork(["daemon", "start"]).fails(5, "opencode_start_failed");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("boom line 30") && message.contains("77"), "{message}");
    assert_eq!(host.starts().len(), 6);
    assert_eq!(host.phase(), "failed");
    let status = host.openwork(["status"]).ok();
    assert!(status.stdout.contains("boom line 30"), "{status:?}");

    // Each further request causes one more attempt.
    host.add(host.project("p"));
    host.openwork(["workspace", "path", "p"]).fails(5, "opencode_start_failed");
    assert_eq!(host.starts().len(), 7);
    host.http("POST", "/start").json(json!({})).fails(503, "opencode_start_failed");
    assert_eq!(host.starts().len(), 8);

    host.behave("");
    let started = host.http("POST", "/start").json(json!({})).ok();
    assert_eq!((&started["engine"]["phase"], &started["engine"]["lastError"]), (&json!("ready"), &Value::Null));
    assert_eq!(host.starts().len(), 9);
}

#[test]
fn opencode_is_restarted_until_it_stays_up() {
    let host = Host::new();
    host.behave("FAKE_CRASH_FIRST=3");
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.starts().len(), 4);
}

#[test]
fn opencode_that_keeps_exiting_is_given_up() {
    let host = Host::new();
    host.behave("FAKE_EXIT_WHEN_READY=1");
    host.openwork(["daemon", "start"]).output();
    wait_for("opencode to be given up", || host.phase() == "failed");
    assert_eq!(host.starts().len(), 6);
    let error = host.health()["engine"]["lastError"].clone();
    assert_eq!(error["code"], "opencode_unavailable");
    assert!(error["message"].as_str().unwrap().contains("fake: leaving"), "{error}");
}

#[test]
fn rejected_password_fails_at_once() {
    let host = Host::new();
    host.exercises(["code opencode_auth_failed"]);
    host.behave("FAKE_AUTH=reject");
    host.openwork(["daemon", "start"]).fails(5, "opencode_auth_failed");
    assert_eq!(host.phase(), "failed");
    // The command causes one more attempt after an earlier failure.
    let starts = host.starts().len();
    assert!(matches!(starts, 1 | 2), "{:?}", host.starts());
    // The process that rejected the password is ended.
    wait_gone(host.starts()[starts - 1]["pid"].as_u64().unwrap() as u32);

    host.http("POST", "/start").json(json!({})).fails(502, "opencode_auth_failed");
    assert_eq!(host.starts().len(), starts + 1);
}

#[test]
fn default_port_taken_during_a_start_is_changed() {
    let mut host = Host::new();
    host.unset("OPENWORK_OPENCODE_PORT");
    host.hold(true);
    host.add(host.project("p"));
    // The port was free when opencode was started, but is taken by the time opencode binds it.
    wait_for("opencode to be started", || host.starts().len() == 1);
    let taken = Host::start_address(&host.starts()[0]);
    let _faster = TcpListener::bind(taken).unwrap();
    host.hold(false);
    host.openwork(["workspace", "path", "p"]).ok();
    assert_eq!(host.starts().len(), 2);
    let address = host.opencode_address();
    assert_eq!(address.ip(), taken.ip());
    assert_ne!(address.port(), taken.port());
}

// --- Slow and hung ---

#[test]
fn requests_wait_for_a_slow_start_until_the_deadline() {
    let host = Host::new();
    host.hold(true);
    host.add(host.project("p"));
    host.openwork(["workspace", "path", "p", "--timeout", "1"]).fails(5, "opencode_timeout");
    let in_a_hurry = host.http("GET", "/workspaces/p/path").header("X-Openwork-Timeout", "1");
    in_a_hurry.fails(504, "opencode_timeout");
    assert_eq!(host.phase(), "starting");

    let waiting = host.openwork(["workspace", "path", "p"]).spawn();
    host.hold(false);
    assert!(waiting.wait().status.success());
    assert_eq!(host.starts().len(), 1);
}

#[test]
fn impostor_on_the_port_of_opencode_gets_no_password() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    host.add(host.project("p"));
    let (pid, address) = (host.opencode_pid(), host.opencode_address());
    host.opencode("POST", "/stop-listening").send();
    let impostor = until("the port", || TcpListener::bind(address).ok());
    impostor.set_nonblocking(true).unwrap();
    let asked = host.openwork(["api", "p", LOADING_CALL, "--timeout", "20"]).spawn();
    let path = host.openwork(["workspace", "path", "p", "--timeout", "20"]).spawn();
    // The daemon ends an opencode that no longer listens, and starts another.
    let mut heard = Vec::new();
    wait_for("another opencode", || {
        while let Ok((mut stream, _)) = impostor.accept() {
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
            let _ = stream.read_to_end(&mut heard);
        }
        !is_alive(pid)
    });
    assert_eq!(String::from_utf8_lossy(&heard), "");
    close(impostor);
    assert!(asked.wait().status.success() && path.wait().status.success());
}

#[test]
fn listening_opencode_is_not_yet_ready() {
    let host = Host::new();
    host.exercises(["code opencode_timeout"]);
    host.behave("FAKE_NEVER_HEALTHY=1");
    host.openwork(["daemon", "start", "--timeout", "2"]).fails(5, "opencode_timeout");
    let health = host.health();
    assert_eq!((&health["ok"], &health["engine"]["phase"]), (&json!(false), &json!("starting")));
    // `/health` shows the process from the moment it exists.
    assert_eq!(health["opencode"]["pid"], host.starts()[0]["pid"]);
}

#[test]
fn hung_opencode_delays_only_requests_to_it() {
    let host = Host::new();
    host.add(host.project("p"));
    let pid = host.opencode_pid();
    host.hang(true);
    host.openwork(["workspace", "path", "p", "--timeout", "1"]).fails(5, "opencode_timeout");
    host.add(host.project("q"));
    assert_eq!(host.health()["ok"], true);
    assert_eq!(host.names(), ["p", "q"]);

    host.hang(false);
    host.openwork(["workspace", "path", "p"]).ok();
    assert_eq!(host.opencode_pid(), pid);
}

#[test]
fn failed_reply_is_an_opencode_error() {
    let host = Host::new();
    host.exercises(["code opencode_error"]);
    host.behave("FAKE_FAIL=/path");
    host.add(host.project("p"));
    host.openwork(["workspace", "path", "p"]).fails(5, "opencode_error");
    host.http("GET", "/workspaces/p/path").fails(502, "opencode_error");
}

// --- Exits ---

#[test]
fn answer_of_another_shape_is_an_opencode_error() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    host.add(host.project("p"));
    let path = &["workspace", "path", "p"];
    let sessions = &["session", "list", "-w", "p"];
    let dispose = &["instance", "dispose", "p"];
    host.openwork(path).ok();
    let asked: [(&str, &str, &[&str]); 4] = match IS_V2 {
        false => [
            ("/path", "[]", path),
            ("/session", "{}", sessions),
            ("/session/status", "[]", sessions),
            ("/session/status", "[]", dispose),
        ],
        true => [
            ("/api/location", r#"{"directory":"/elsewhere"}"#, path),
            ("/api/session", "[]", sessions),
            ("/api/session/active", "[]", sessions),
            ("/api/session/active", "[]", dispose),
        ],
    };
    for (target, other, command) in asked {
        for body in [other, "null", "not JSON", "<!doctype html>"] {
            host.answer(target, body);
            let error = host.openwork(command).fails(5, "opencode_error");
            assert!(error["message"].as_str().unwrap().contains(target), "{error}");
        }
    }
    host.answer("", "");
    host.openwork(path).ok();
    assert_eq!((host.starts().len(), &host.health()["engine"]["restarts"]), (1, &json!(0)));
}

#[test]
fn opencode_reporting_itself_unhealthy_is_not_ready() {
    let host = Host::new();
    host.answer(HEALTH, r#"{"healthy":false,"version":null}"#);
    let starting = host.openwork(["daemon", "start"]).spawn();
    let asked = || host.requests().iter().filter(|request| request["target"] == HEALTH).count();
    wait_for("opencode to be asked more than once", || asked() > 1);
    assert_eq!(host.phase(), "starting");
    host.answer("", "");
    assert!(starting.wait().status.success());
    assert_eq!(host.starts().len(), 1);
}

#[test]
fn many_requests_cause_one_restart() {
    let host = Host::new();
    host.exercises(["route GET /workspaces/:id/path"]);
    let project = host.project("p");
    host.add(&project);
    let (before, port) = (host.opencode_pid(), host.health()["opencode"]["port"].clone());
    kill(before, Signal::KILL);
    // A request that reaches the dying process must not be repeated, so wait for its end.
    wait_gone(before);
    thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                let answer = host.http("GET", "/workspaces/p/path").ok();
                assert_eq!(answer["path"]["directory"], project.to_str().unwrap());
            });
        }
    });
    assert_eq!(host.starts().len(), 2);
    let health = host.health();
    assert_ne!(health["opencode"]["pid"], before);
    assert_eq!(health["opencode"]["port"], port);
    assert_eq!((&health["engine"]["generation"], &health["engine"]["restarts"]), (&json!(2), &json!(1)));
}

#[test]
fn exit_is_noticed_without_a_request() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    for killed in 1..=3 {
        let pid = host.opencode_pid();
        kill(pid, Signal::KILL);
        wait_for("the next opencode", || host.starts().len() == killed + 1);
        wait_for("readiness", || host.health()["engine"]["generation"] == killed + 1 && host.phase() == "ready");
    }
    assert_eq!(host.health()["engine"]["restarts"], 3);
}

#[test]
fn opencode_that_exits_is_restarted() {
    let host = Host::new();
    host.add(host.project("p"));
    host.opencode("POST", "/leave").try_send();
    wait_for("the next opencode", || host.starts().len() == 2);
    host.openwork(["workspace", "path", "p"]).ok();
}

// --- Stop ---

/// Pids of every started fake and of the grandchildren in their own sessions.
fn descendants(host: &Host) -> Vec<u32> {
    let starts = host.starts().into_iter().map(|start| start["pid"].as_u64().unwrap() as u32);
    starts.chain(host.recorded("grandchildren").iter().map(|pid| pid.parse().unwrap())).collect()
}

#[test]
fn stop_is_orderly() {
    let host = Host::new();
    let project = host.project("p");
    host.add(&project);
    host.openwork(["workspace", "path", "p"]).ok();
    let pid = host.opencode_pid();
    host.openwork(["daemon", "stop"]).ok();
    assert!(!is_alive(pid));
    if !IS_V2 {
        // Instances are disposed first, so that their processes end properly. 2.x does that on TERM.
        assert_eq!(host.instance(&project), ["load", "dispose"]);
        assert_eq!(host.requests().last().unwrap()["target"], "/global/dispose");
    }
    assert_eq!(host.recorded("signals"), ["TERM"]);
}

#[test]
fn swallowed_term_is_sent_again() {
    let host = Host::new();
    host.behave("FAKE_SWALLOW_TERM=1");
    host.openwork(["daemon", "start"]).ok();
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(host.recorded("signals"), ["TERM", "TERM"]);
    assert_eq!(host.processes(), [0; 0]);
}

#[test]
fn opencode_ignoring_term_is_killed() {
    let host = Host::new();
    host.behave("FAKE_IGNORE_TERM=1");
    host.openwork(["daemon", "start"]).ok();
    host.openwork(["daemon", "stop"]).ok();
    assert!(host.recorded("signals").len() >= 2, "{:?}", host.recorded("signals"));
    assert_eq!(host.processes(), [0; 0]);
}

#[test]
fn stop_ends_a_hung_opencode() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    host.hang(true);
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(host.processes(), [0; 0]);
}

#[test]
fn stop_ends_a_starting_opencode() {
    let host = Host::new();
    host.behave("FAKE_NEVER_LISTEN=1");
    host.add(host.project("p"));
    wait_for("opencode to be started", || host.starts().len() == 1);
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(host.processes(), [0; 0]);
}

#[test]
fn stop_fails_requests_waiting_for_opencode() {
    let host = Host::new();
    host.behave("FAKE_NEVER_LISTEN=1");
    host.openwork(["daemon", "start", "--timeout", "1"]).fails(5, "opencode_timeout");
    host.add(host.project("p"));
    // Closing connections would be counted below.
    wait_for("earlier connections to be gone", || sockets(host.port(), ESTABLISHED).is_empty());
    let waiting = host.openwork(["workspace", "path", "p", "--json"]).spawn();
    thread::scope(|scope| {
        let asking = scope.spawn(|| host.http("GET", "/workspaces/p/path").fails(503, "opencode_unavailable"));
        // Both requests have been sent and read.
        let read = || sockets(host.port(), ESTABLISHED).into_iter().filter(|(_, received)| *received == 0).count();
        wait_for("both to be waiting", || read() == 2);
        host.openwork(["daemon", "stop"]).ok();
        asking.join().unwrap();
    });
    let output = waiting.wait();
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert_eq!(output.object()["error"]["code"], "opencode_unavailable");
}

#[test]
fn stop_sweeps_detached_children() {
    let host = Host::new();
    host.behave("FAKE_GRANDCHILD=1");
    host.openwork(["daemon", "start"]).ok();
    let descendants = descendants(&host);
    assert!(descendants.len() == 2 && descendants.iter().all(|pid| is_alive(*pid)));
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(host.processes(), [0; 0]);
}

#[test]
fn detached_children_are_swept_after_a_crash() {
    let host = Host::new();
    host.behave("FAKE_GRANDCHILD=1");
    host.openwork(["daemon", "start"]).ok();
    let orphans = descendants(&host);
    host.behave("");
    kill(host.opencode_pid(), Signal::KILL);
    for pid in orphans {
        wait_gone(pid);
    }
    wait_for("the next opencode", || host.phase() == "ready" && host.starts().len() == 2);
    host.runs_one_of_each();
}

// --- Log ---

#[test]
fn opencode_log_is_bounded() {
    const LIMIT: u64 = 10_000_000;
    const KEPT: u64 = 1_000_000;
    let host = Host::new();
    host.behave("FAKE_FLOOD_LOG=12000000");
    host.openwork(["daemon", "start"]).ok();
    let log = host.file("opencode.log");
    let size = |path: &Path| fs::metadata(path).map_or(0, |metadata| metadata.len());
    wait_for("the log to be truncated", || size(&log) < LIMIT);
    let kept = size(&host.file("opencode.log.1"));
    assert!((KEPT / 2..=KEPT * 2).contains(&kept), "{kept}");

    // opencode still appends at the end: truncation leaves no hole of NUL bytes.
    host.behave("");
    kill(host.opencode_pid(), Signal::KILL);
    wait_for("the next opencode", || host.starts().len() == 2 && host.phase() == "ready");
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("listening") && !text.contains('\0'), "{text:?}");
}
