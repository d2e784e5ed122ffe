//! `openwork doctor`: it finds each problem, and changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Host, Run, STATE, Signal, VERSION, copy_program, fake_opencode, kill, until, wait_gone};

/// Runs the doctor, which must exit with this status, and returns its findings.
fn report(run: Run, exit: i32) -> Value {
    let report = run.exits(exit).object();
    assert_eq!(report["ok"], exit == 0, "{report:#}");
    report
}

fn examine(host: &Host, exit: i32) -> Value {
    report(host.openwork(["doctor", "--json"]), exit)
}

/// Asserts a finding of this kind with this in its message or hint.
fn check(report: &Value, name: &str, verdict: &str, text: &str) {
    let says = |finding: &&Value| {
        finding["name"] == name && finding["verdict"] == verdict && finding.to_string().contains(text)
    };
    assert!(report["checks"].as_array().unwrap().iter().any(|finding| says(&finding)), "{name} {text}: {report:#}");
}

/// Asserts that a check has nothing but `ok`.
fn check_ok(report: &Value, name: &str) {
    let findings: Vec<&Value> =
        report["checks"].as_array().unwrap().iter().filter(|finding| finding["name"] == name).collect();
    let are_ok = findings.iter().all(|finding| finding["verdict"] == "ok" && finding["hint"].is_null());
    assert!(!findings.is_empty() && are_ok, "{name}: {report:#}");
}

/// Every file below a directory: its mode, its times and its content.
fn snapshot(directory: &Path) -> BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let (path, metadata) = (entry.path(), entry.metadata().unwrap());
        let content = if metadata.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        if metadata.is_dir() {
            found.extend(snapshot(&path));
        }
        found.insert(path, (metadata.mode(), metadata.mtime_nsec(), metadata.ctime_nsec(), content));
    }
    found
}

// --- Nothing wrong ---

#[test]
fn machine_without_openwork_is_healthy_and_unchanged() {
    let host = Host::new();
    host.exercises(["command doctor"]);
    let report = examine(&host, 0);
    for name in ["openwork", "data", "daemon", "ports", "opencode", "others", "workspaces"] {
        check_ok(&report, name);
    }
    assert_eq!(report["dataDir"], host.data().to_str().unwrap());
    // Nothing is started or created, and opencode is not even asked for its version.
    assert!(!host.data().exists());
    assert_eq!(host.processes(), [0; 0]);
    assert_eq!((host.starts().len(), host.recorded("versions").len()), (0, 0));
    // A proxy that is not used for this machine causes no warning either.
    let text = host.openwork(["doctor"]).env("NO_PROXY", "localhost,127.0.0.1").ok().stdout;
    assert!(text.starts_with("ok       openwork  ") && text.ends_with("\nnothing is wrong\n"), "{text}");
}

#[test]
fn running_daemon_is_healthy_and_unchanged() {
    let host = Host::new();
    host.add(host.project("p"));
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    fs::set_permissions(host.file(STATE), fs::Permissions::from_mode(0o640)).unwrap();
    fs::set_permissions(host.file("daemon.lock"), fs::Permissions::from_mode(0o640)).unwrap();
    let before = snapshot(&host.data());
    let report = examine(&host, 0);
    assert_eq!(snapshot(&host.data()), before);
    for name in ["state", "daemon", "opencode", "others", "workspaces"] {
        check_ok(&report, name);
    }
    check(&report, "daemon", "ok", &format!("pid {daemon}"));
    check(&report, "opencode", "ok", &format!("{VERSION}, pid {opencode}"));
    check(&report, "data", "warning", "mode 640");
    check(&report, "environment", "ok", "");
    host.runs_one_of_each();
}

// --- Files ---

#[test]
fn unusable_data_directory_is_an_error() {
    let host = Host::new();
    fs::write(host.data(), "").unwrap();
    check(&examine(&host, 1), "data", "wrong", "not a directory");
    let desktop = host.home().join(".openwork/data");
    let run = host.openwork(["doctor", "--json", "--data-dir", desktop.to_str().unwrap()]);
    check(&report(run, 1), "data", "wrong", "desktop app");
    let text = host.openwork(["doctor"]).exits(1).stdout;
    assert!(text.contains("\nwrong    data  ") && text.ends_with("\n1 thing is wrong\n"), "{text}");
}

#[test]
fn unwritable_data_directory_is_an_error() {
    let host = Host::unprivileged();
    host.write_state(r#"{"version":1,"workspaces":[]}"#);
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o500)).unwrap();
    let report = examine(&host, 1);
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o700)).unwrap();
    check(&report, "data", "wrong", "Permission denied");
    fs::set_permissions(host.path("projects"), fs::Permissions::from_mode(0o500)).unwrap();
    let nowhere = host.path("projects/data");
    let run = host.openwork(["doctor", "--json", "--data-dir", nowhere.to_str().unwrap()]);
    let report = self::report(run, 1);
    fs::set_permissions(host.path("projects"), fs::Permissions::from_mode(0o700)).unwrap();
    check(&report, "data", "wrong", "cannot create");
}

#[test]
fn readable_files_and_links_are_reported() {
    let host = Host::new();
    host.write_state(r#"{"version":1,"workspaces":[]}"#);
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o755)).unwrap();
    check(&examine(&host, 0), "data", "warning", "mode 755");
    let elsewhere = host.path("elsewhere.json");
    fs::rename(host.file(STATE), &elsewhere).unwrap();
    symlink(&elsewhere, host.file(STATE)).unwrap();
    check(&examine(&host, 1), "data", "wrong", "symbolic link");
    fs::remove_file(host.file(STATE)).unwrap();
    for lock in ["daemon.lock", "start.lock", "opencode.lock"] {
        symlink(&elsewhere, host.file(lock)).unwrap();
        check(&examine(&host, 1), "data", "wrong", lock);
        fs::remove_file(host.file(lock)).unwrap();
    }
}

mod as_root {
    use super::*;
    use crate::support::NOBODY;
    use std::os::unix::fs::chown;

    #[test]
    #[ignore = "needs root, to become another user"]
    fn files_of_another_user_are_reported() {
        let host = Host::new();
        host.write_state(r#"{"version":1,"workspaces":[]}"#);
        chown(host.file(STATE), Some(NOBODY), None).unwrap();
        check(&examine(&host, 1), "data", "wrong", "belongs to another user (uid 65534)");
        chown(host.data(), Some(NOBODY), None).unwrap();
        let wrong = examine(&host, 1);
        check(&wrong, "data", "wrong", "the data directory belongs to another user (uid 65534)");
        let error = host.openwork(["workspace", "list"]).fails(1, "permission_denied");
        assert!(error["message"].as_str().unwrap().contains("belongs to another user (uid 65534)"), "{error}");

        // A directory of ours within one that the user cannot enter.
        let other = Host::unprivileged();
        let closed = other.path("closed");
        fs::create_dir(&closed).unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
        let inside = closed.join("data");
        let arguments = ["doctor", "--json", "--data-dir", inside.to_str().unwrap()];
        let report = report(other.openwork(arguments), 1);
        check(&report, "data", "wrong", "closed to this user (its owner is uid 0)");
        let list = ["workspace", "list", "--data-dir", inside.to_str().unwrap()];
        other.openwork(list).fails(1, "permission_denied");
    }
}

#[test]
fn unreadable_state_file_is_an_error_and_untouched() {
    let host = Host::new();
    for (text, told) in [("{", "state repair"), (r#"{"version":7,"workspaces":[]}"#, "newer")] {
        host.write_state(text);
        check(&examine(&host, 1), "state", "wrong", told);
        assert_eq!(fs::read_to_string(host.file(STATE)).unwrap(), text);
    }
    host.write_state(r#"{"version":1,"workspaces":[]}"#);
    fs::write(host.file("openwork-orchestrator-auth.json"), "{").unwrap();
    check(&examine(&host, 1), "state", "wrong", "not a credentials file");
}

#[test]
fn oversized_log_is_reported() {
    let host = Host::new();
    host.write_state(r#"{"version":1,"workspaces":[]}"#);
    fs::File::create(host.file("opencode.log")).unwrap().set_len(30 * 1024 * 1024).unwrap();
    check(&examine(&host, 0), "logs", "warning", "31.5 MB");
}

#[test]
fn directories_that_have_gone_are_named() {
    let host = Host::new();
    for name in ["here", "gone", "away"] {
        host.add(host.project(name));
    }
    host.openwork(["daemon", "stop"]).ok();
    check(&examine(&host, 0), "workspaces", "ok", "3");
    for name in ["gone", "away"] {
        fs::remove_dir(host.project(name)).unwrap();
    }
    let report = examine(&host, 0);
    check(&report, "workspaces", "warning", "gone, away");
    check(&report, "workspaces", "warning", "workspace move");
}

#[test]
fn names_of_no_workspace_are_reported() {
    let host = Host::new();
    host.add(host.project("p"));
    host.openwork(["daemon", "stop"]).ok();
    let run = |value: &str| report(host.openwork(["doctor", "--json"]).env("OPENWORK_WORKSPACE", value), 0);
    check(&run("nix"), "workspaces", "warning", "OPENWORK_WORKSPACE");
    for value in ["p", "./projects/p", ""] {
        check_ok(&run(value), "workspaces");
    }
    let mut state = host.state();
    state["activeId"] = "ws-ffffffffffff".into();
    let fence = json!({"directory": "/poison", "version": VERSION, "output": "boom"});
    state["fences"] = json!([fence]);
    host.write_state(state.to_string());
    let report = examine(&host, 1);
    check(&report, "workspaces", "warning", "ws-ffffffffffff");
    check(&report, "workspaces", "wrong", "/poison");
    check(&report, "workspaces", "wrong", "openwork instance reset");
}

// --- Processes ---

#[test]
fn unresponsive_daemon_is_an_error() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    kill(host.daemon_pid(), Signal::STOP);
    let report = examine(&host, 1);
    kill(host.daemon_pid(), Signal::CONT);
    check(&report, "daemon", "wrong", "does not respond");
}

#[test]
fn orphaned_opencode_is_reported_and_left_alone() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    let daemon = host.daemon_pid();
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
    check(&examine(&host, 0), "daemon", "warning", &format!("its opencode (pid {opencode}) is"));
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.opencode_pid(), opencode);
}

#[test]
fn failed_opencode_is_an_error() {
    let host = Host::new();
    host.behave("FAKE_CRASH_ON_START=9");
    host.openwork(["daemon", "start"]).exits(5);
    let report = examine(&host, 1);
    check(&report, "opencode", "wrong", "given up");
    check(&report, "opencode", "wrong", "openwork logs");
}

#[test]
fn opencode_that_is_to_be_started_again_is_a_warning() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    // opencode waits for its next start, since no request needs it now.
    host.behave("FAKE_CRASH_ON_START=9");
    kill(opencode, Signal::KILL);
    let report = until("opencode to wait for its next start", || {
        let report = host.openwork(["doctor", "--json"]).output().object();
        report.to_string().contains("is started again soon").then_some(report)
    });
    check(&report, "opencode", "warning", "openwork logs");
    host.behave("");
}

#[test]
fn another_openwork_on_the_path_is_reported() {
    let mut host = Host::new();
    let directory = host.path("another");
    fs::create_dir(&directory).unwrap();
    let another = directory.join("openwork");
    copy_program(host.binary(), &another);
    let path = host.get("PATH").to_owned();
    host.set("PATH", format!("{}:{path}", directory.display()));
    let report = host.openwork(["doctor", "--json"]).output().object();
    check(&report, "openwork", "warning", another.to_str().unwrap());
    // A link to this program is the same program.
    fs::remove_file(&another).unwrap();
    symlink(host.binary(), &another).unwrap();
    check_ok(&host.openwork(["doctor", "--json"]).output().object(), "openwork");
}

#[test]
fn missing_or_unusable_opencode_is_an_error() {
    let mut host = Host::new();
    host.set("OPENWORK_OPENCODE_BIN", host.path("none"));
    check(&examine(&host, 1), "opencode", "wrong", "is not a program");
    host.unset("OPENWORK_OPENCODE_BIN");
    host.set("PATH", host.path("a/bin"));
    check(&examine(&host, 1), "opencode", "wrong", "neither in ~/.opencode/bin nor on the PATH");
    // An older line, known from npm's description of the package.
    npm_package(&host.path("a"), "0.15.31");
    check(&examine(&host, 1), "opencode", "wrong", "0.15.31");
    npm_package(&host.path("a"), "1.18.33");
    check(&examine(&host, 0), "opencode", "ok", "1.18.33");
}

/// Puts an opencode into `bin` of a directory, and npm's description of its package beside it.
fn npm_package(directory: &Path, version: &str) {
    fs::create_dir_all(directory.join("bin")).unwrap();
    let program = directory.join("bin/opencode");
    let _ = fs::remove_file(&program);
    copy_program(fake_opencode(), &program);
    let package = json!({"name": "opencode-ai", "version": version});
    fs::write(directory.join("package.json"), package.to_string()).unwrap();
}

#[test]
fn different_opencode_on_the_path_is_reported() {
    let mut host = Host::new();
    npm_package(&host.path("a"), VERSION);
    npm_package(&host.path("b"), VERSION);
    host.unset("OPENWORK_OPENCODE_BIN");
    let system = host.get("PATH").to_owned();
    host.set("PATH", format!("{}:{system}", host.path("a/bin").display()));
    host.openwork(["daemon", "start"]).ok();
    check_ok(&examine(&host, 0), "opencode");
    host.set("PATH", format!("{}:{system}", host.path("b/bin").display()));
    let report = examine(&host, 0);
    check(&report, "opencode", "warning", "this shell would start");
    check(&report, "environment", "warning", host.path("b/bin").to_str().unwrap());
    host.set("PATH", format!("{}:{system}", host.path("a/bin").display()));
    let program = host.path("a/bin/opencode");
    fs::remove_file(&program).unwrap();
    copy_program(fake_opencode(), &program);
    check(&examine(&host, 0), "opencode", "warning", "was replaced");
    fs::remove_file(&program).unwrap();
    check(&examine(&host, 0), "opencode", "warning", "has gone");
}

#[test]
fn going_back_to_an_older_line_of_opencode_is_warned_of() {
    let mut host = Host::new();
    let record = |version: &str| json!({"opencode": {"path": "/elsewhere/opencode", "actualVersion": version}});
    npm_package(&host.path("a"), "1.18.33");
    host.set("OPENWORK_OPENCODE_BIN", host.path("a/bin/opencode"));
    host.write_state(json!({"version": 1, "workspaces": [], "binaries": record("2.3.2")}).to_string());
    check(&examine(&host, 0), "opencode", "warning", "opencode 1.x does not see what 2.x has done");
    npm_package(&host.path("a"), "2.3.2");
    check_ok(&examine(&host, 0), "opencode");
    host.write_state(json!({"version": 1, "workspaces": [], "binaries": record("1.18.33")}).to_string());
    check(&examine(&host, 0), "opencode", "warning", "one way");
}

#[test]
fn port_of_another_process_is_reported() {
    let mut host = Host::new();
    let (taken, other) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let port = taken.local_addr().unwrap().port();
    host.set("OPENWORK_DAEMON_PORT", port.to_string());
    host.set("OPENWORK_OPENCODE_PORT", other.local_addr().unwrap().port().to_string());
    let report = examine(&host, 1);
    check(&report, "ports", "wrong", &format!("127.0.0.1:{port}, where the daemon is to listen"));
    check(&report, "ports", "wrong", "where opencode is to listen");
    check(&report, "ports", "wrong", &format!("pid {}", std::process::id()));
    // A port that no option requests may be in use.
    host.unset("OPENWORK_DAEMON_PORT");
    host.unset("OPENWORK_OPENCODE_PORT");
    host.write_state(json!({"version": 1, "workspaces": [], "ports": {"daemon": port}}).to_string());
    check(&examine(&host, 0), "ports", "warning", &format!("127.0.0.1:{port}"));
}

#[test]
fn port_that_the_daemon_lacks_is_reported() {
    let mut host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    host.set("OPENWORK_DAEMON_PORT", "1");
    check(&examine(&host, 0), "ports", "warning", "asks for 1,");
    host.openwork(["doctor", "--daemon-port", "none"]).fails(2, "usage");
}

#[test]
fn variables_missing_from_opencode_are_named_and_never_shown() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let doctor = || host.openwork(["doctor", "--json"]);
    check(&report(doctor(), 0), "environment", "warning", "http_proxy is set, and NO_PROXY");
    check_ok(&report(doctor().env("NO_PROXY", "a, 127.0.0.1"), 0), "environment");
    let report = report(doctor().env("MODEL_API_KEY", "very-secret").env("XDG_DATA_HOME", "relative"), 0);
    check(&report, "environment", "warning", "MODEL_API_KEY");
    check(&report, "environment", "warning", "openwork daemon restart --all");
    check(&report, "environment", "warning", "XDG_DATA_HOME is relative");
    assert!(!report.to_string().contains("very-secret"), "{report}");
}

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process with the command line of an opencode, and the home of a host.
fn opencode_beside(host: &Host, arguments: &[&str], variables: &[(&str, &str)]) -> Running {
    let mut bash = Command::new("bash");
    bash.arg0("opencode").args(["-c", "read -r _"]).args(arguments);
    bash.env_clear().env("PATH", host.get("PATH")).env("HOME", host.home());
    bash.envs(variables.iter().copied()).stdin(Stdio::piped());
    Running(bash.current_dir(host.path("projects")).spawn().unwrap())
}

#[test]
fn another_opencode_over_the_same_data_is_reported() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let told = |verdict: &str, text: &str| check(&examine(&host, 0), "others", verdict, text);
    {
        let beside = opencode_beside(&host, &["serve"], &[]);
        told("warning", &format!("opencode (pid {}", beside.0.id()));
    }
    {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let registration = host.home().join(".local/state/opencode/service.json");
        fs::create_dir_all(registration.parent().unwrap()).unwrap();
        let url = format!("http://{}", socket.local_addr().unwrap());
        let service = json!({"url": url, "pid": std::process::id(), "password": "very-secret"});
        fs::write(&registration, service.to_string()).unwrap();
        fs::set_permissions(&registration, fs::Permissions::from_mode(0o600)).unwrap();
        told("warning", &format!("on {url}"));
        assert!(!examine(&host, 0).to_string().contains("very-secret"));
        // With --shared, the service is not another opencode.
        host.openwork(["daemon", "stop"]).ok();
        check_ok(&report(host.openwork(["doctor", "--json"]).env("OPENWORK_SHARED", "1"), 0), "others");
        host.openwork(["daemon", "start"]).ok();
        fs::set_permissions(&registration, fs::Permissions::from_mode(0o644)).unwrap();
        told("warning", "is open to other users");
        fs::remove_file(&registration).unwrap();
    }
    // Clients, opencodes over other data, and those of another openwork are not reported.
    let elsewhere = host.path("elsewhere");
    let _others = [
        opencode_beside(&host, &["attach", "http://127.0.0.1:1"], &[]),
        opencode_beside(&host, &["serve"], &[("XDG_DATA_HOME", elsewhere.to_str().unwrap())]),
        opencode_beside(&host, &["serve"], &[("OPENWORK_ENGINE", "another")]),
    ];
    check_ok(&examine(&host, 0), "others");
}

#[test]
fn opencode_left_by_an_earlier_daemon_is_reported() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let mut bash = Command::new("bash");
    bash.arg0("opencode").args(["-c", "read -r _", "serve"]).env_clear().stdin(Stdio::piped());
    bash.env("PATH", host.get("PATH"))
        .env("OPENWORK_ENGINE", "gone")
        .env("HOME", host.path("projects"))
        .current_dir(host.file("opencode"));
    let left = Running(bash.spawn().unwrap());
    check(&examine(&host, 0), "others", "warning", &format!("opencode (pid {}", left.0.id()));
}

// --- The unit ---

#[test]
fn broken_unit_is_reported() {
    let mut host = Host::new();
    for variable in ["OPENWORK_DATA_DIR", "OPENWORK_OPENCODE_BIN", "OPENWORK_DAEMON_PORT", "OPENWORK_OPENCODE_PORT"] {
        host.unset(variable);
    }
    let units = host.home().join(".config/systemd/user");
    fs::create_dir_all(units.join("default.target.wants")).unwrap();
    let unit = units.join("openwork.service");
    fs::create_dir_all(host.home().join(".opencode/bin")).unwrap();
    copy_program(fake_opencode(), &host.home().join(".opencode/bin/opencode"));

    fs::write(&unit, "[Service]\nExecStart=/no/such/openwork daemon\n").unwrap();
    check(&examine(&host, 1), "service", "wrong", "/no/such/openwork, which does not exist");
    fs::write(&unit, "[Service]\nExecStart=/bin/sh daemon\n").unwrap();
    check(&examine(&host, 0), "service", "warning", "another openwork: /bin/sh");
    fs::write(&unit, host.openwork(["service", "print"]).ok().stdout).unwrap();
    check(&examine(&host, 0), "service", "ok", "not enabled");
    symlink(&unit, units.join("default.target.wants/openwork.service")).unwrap();
    check(&examine(&host, 0), "service", "ok", "is enabled");
    let elsewhere = host.path("elsewhere");
    let run = host.openwork(["doctor", "--json", "--data-dir", elsewhere.to_str().unwrap()]);
    check(&report(run, 0), "service", "warning", "another data directory");
    host.data_is(host.home().join(".local/share/openwork"));
    host.openwork(["daemon", "start"]).ok();
    check(&examine(&host, 0), "service", "warning", "was started by a command");
    host.openwork(["daemon", "stop"]).ok();
    fs::remove_file(&unit).unwrap();
    symlink("/dev/null", &unit).unwrap();
    check(&examine(&host, 0), "service", "ok", "masked");
}
