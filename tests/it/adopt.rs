//! opencode outlives its daemon, and the next daemon adopts it if it is proved ours.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{
    ALL_EVENTS, AUTH, Host, IS_V2, LOADING_CALL, START_TIME, STATE, Signal, Stranger, is_alive, kill, stat_field,
    wait_for, wait_gone,
};

fn kill_daemon(host: &Host) {
    let daemon = host.daemon_pid();
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
}

/// Changes the state file while no daemon runs.
fn edit_state(host: &Host, change: impl FnOnce(&mut Value)) {
    let mut state = host.state();
    change(&mut state);
    fs::write(host.file(STATE), state.to_string()).unwrap();
}

// --- Adopted ---

#[test]
fn next_daemon_adopts_opencode_of_a_killed_daemon() {
    let host = Host::new();
    let project = host.project("p");
    host.add(&project);
    host.openwork(["workspace", "path", "p"]).ok();
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    let mut events = host.opencode("GET", ALL_EVENTS).events();
    kill_daemon(&host);
    assert!(is_alive(opencode));

    host.openwork(["workspace", "path", "p"]).ok();
    assert_ne!(host.daemon_pid(), daemon);
    assert_eq!(host.opencode_pid(), opencode);
    assert_eq!(host.starts().len(), 1);
    assert_eq!(host.instance(&project), ["load"]);

    // The stream of a direct client stayed open.
    host.dispose_directly(&project);
    let (kind, directory) = match IS_V2 {
        true => ("/type", "/location/directory"),
        false => ("/payload/type", "/directory"),
    };
    let disposal = if IS_V2 { "location.shutdown" } else { "server.instance.disposed" };
    let disposed = events.find(|event| event.pointer(kind).is_some_and(|kind| kind == disposal)).unwrap();
    assert_eq!(disposed.pointer(directory).unwrap(), project.to_str().unwrap());
}

#[test]
fn status_names_the_opencode_of_a_killed_daemon() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    kill_daemon(&host);
    let error = host.openwork(["status"]).fails(3, "daemon_not_running");
    assert_eq!(error["message"], format!("the daemon is not running; its opencode (pid {opencode}) still is"));
    assert!(
        error["hint"].as_str().unwrap().starts_with("`openwork daemon start` starts a daemon that adopts"),
        "{error}"
    );
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.opencode_pid(), opencode);
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(host.openwork(["status"]).fails(3, "daemon_not_running")["message"], "the daemon is not running");
}

#[test]
fn stop_ends_opencode_left_by_a_killed_daemon() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    kill_daemon(&host);
    assert!(is_alive(opencode));
    assert_eq!(host.openwork(["daemon", "stop"]).json()["stopped"], true);
    wait_gone(opencode);
    assert_eq!(host.starts().len(), 1, "no opencode was started just to be stopped");
    assert_eq!(host.openwork(["daemon", "stop"]).json()["stopped"], false);
}

#[test]
fn opencode_missing_from_the_state_file_gets_no_second_beside_it() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    kill_daemon(&host);
    edit_state(&host, |state| state["opencode"] = Value::Null);

    let error = host.openwork(["daemon", "start"]).fails(5, "opencode_start_failed");
    assert!(error["message"].as_str().unwrap().contains(&format!("kill {opencode}")), "{error}");
    assert_eq!(host.starts().len(), 1);
    assert!(is_alive(opencode));

    kill(opencode, Signal::TERM);
    wait_gone(opencode);
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.starts().len(), 2);
}

#[test]
fn adopted_opencode_is_restarted_when_it_dies() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    kill_daemon(&host);
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.opencode_pid(), opencode);
    kill(opencode, Signal::KILL);
    wait_for("another opencode", || host.starts().len() == 2);
    assert_ne!(host.opencode_pid(), opencode);
    assert_eq!(host.health()["engine"]["restarts"], 1);
}

#[test]
fn stop_ends_adopted_opencode_and_its_children() {
    let host = Host::new();
    host.exercises(["command daemon start", "command daemon stop"]);
    host.behave("FAKE_GRANDCHILD=1\nFAKE_SWALLOW_TERM=1");
    host.openwork(["daemon", "start"]).ok();
    kill_daemon(&host);
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.starts().len(), 1);
    assert_eq!(host.processes().len(), 3);
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(host.processes(), [0; 0]);
    assert_eq!(host.recorded("signals"), ["TERM", "TERM"]);
}

#[test]
fn commands_succeed_while_a_killed_daemon_is_dying() {
    // For some milliseconds a killed daemon still holds its lock and port, and answers nothing.
    let host = Host::new();
    host.add(host.project("p"));
    for command in
        [&["daemon", "start"][..], &["workspace", "path"], &["workspace", "switch", "p"], &["daemon", "stop"]]
    {
        for _ in 0..5 {
            host.openwork(["daemon", "start"]).ok();
            kill(host.daemon_pid(), Signal::KILL);
            host.openwork(command).ok();
        }
    }
}

#[test]
fn restart_keeps_opencode() {
    let host = Host::new();
    host.exercises(["command daemon restart", "option --all"]);
    host.add(host.project("p"));
    let started_at = || host.health()["daemon"]["startedAt"].as_u64();
    let (opencode, before) = (host.opencode_pid(), started_at());
    host.openwork(["daemon", "restart"]).ok();
    assert!(started_at() > before);
    assert_eq!(host.opencode_pid(), opencode);
    assert_eq!((host.starts().len(), host.names()), (1, vec!["p".to_owned()]));

    host.openwork(["daemon", "restart", "--all"]).ok();
    assert_ne!(host.opencode_pid(), opencode);
    assert!(!is_alive(opencode));
    assert_eq!(host.starts().len(), 2);
}

#[test]
fn next_daemon_adopts_opencode_kept_by_a_stop() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    host.openwork(["daemon", "stop", "--keep-opencode"]).ok();
    assert!(!is_alive(daemon) && is_alive(opencode));
    assert_eq!(host.state()["opencode"]["pid"], opencode);
    assert!(host.state()["daemon"].is_null());
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.opencode_pid(), opencode);

    host.http("POST", "/shutdown").json(json!({"keepOpencode": true})).ok();
    wait_gone(host.daemon_pid());
    assert!(is_alive(opencode));
    host.openwork(["daemon", "start"]).ok();
    assert_eq!((host.opencode_pid(), host.starts().len()), (opencode, 1));
}

#[test]
fn stop_keeping_opencode_does_not_wait_for_replies() {
    let host = Host::new();
    host.exercises(["code opencode_unavailable"]);
    host.add(host.project("p"));
    host.openwork(["workspace", "path", "p"]).ok();
    host.hang(true);
    thread::scope(|scope| {
        let path = host.http("GET", "/workspaces/p/path").header("X-Openwork-Timeout", "60");
        let waiting = scope.spawn(|| path.send());
        wait_for("opencode to get the request", || {
            host.recorded("hangs").iter().any(|target| target.starts_with(LOADING_CALL))
        });
        let start = Instant::now();
        host.openwork(["daemon", "stop", "--keep-opencode"]).ok();
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        waiting.join().unwrap().refused(503, "opencode_unavailable");
    });
    host.hang(false);
}

#[test]
fn stop_keeping_opencode_does_not_revoke_another_stop() {
    let host = Host::new();
    host.behave("FAKE_SWALLOW_TERM=1");
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    let stopping = host.openwork(["daemon", "stop"]).spawn();
    // Perhaps twice: TERM is repeated for an opencode that ignores the first.
    wait_for("opencode to be told to end", || !host.recorded("signals").is_empty());
    host.openwork(["daemon", "stop", "--keep-opencode"]).ok();
    assert_eq!(stopping.wait().status.code(), Some(0));
    assert!(!is_alive(opencode));
    assert!(host.state()["opencode"].is_null());
}

#[test]
fn daemon_killed_during_a_start_leaves_one_opencode() {
    let host = Host::new();
    host.behave("FAKE_START_MS=1500");
    host.add(host.project("p"));
    wait_for("opencode to be started", || host.starts().len() == 1);
    kill_daemon(&host);
    host.openwork(["workspace", "path", "p"]).ok();
    // Whether the daemon waited for the first opencode or started another: only one is left.
    let opencode = host.opencode_pid();
    let others =
        host.starts().into_iter().map(|start| start["pid"].as_u64().unwrap() as u32).filter(|pid| *pid != opencode);
    for other in others {
        wait_gone(other);
    }
}

// --- Not adopted ---

#[test]
fn opencode_rejecting_the_password_is_ended_before_a_new_start() {
    let host = Host::new();
    host.behave("FAKE_GRANDCHILD=1");
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    kill_daemon(&host);
    // The process is ours and alive, but no longer takes our password.
    let auth = json!({"opencodeUsername": "opencode", "opencodePassword": "5".repeat(64)});
    fs::write(host.file(AUTH), auth.to_string()).unwrap();
    host.behave("");
    host.openwork(["daemon", "start"]).ok();
    assert!(!is_alive(opencode));
    assert_eq!(host.starts().len(), 2);
    assert_eq!(host.processes().len(), 2);
}

#[test]
#[cfg_attr(not(debug_assertions), ignore = "only a debug build takes shorter times")]
fn hung_opencode_is_ended_before_a_new_start() {
    let mut host = Host::new();
    host.set("OPENWORK_TEST_PACE", "30");
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    kill_daemon(&host);
    kill(opencode, Signal::STOP);
    host.openwork(["daemon", "start"]).ok();
    assert!(!is_alive(opencode));
    assert_eq!(host.starts().len(), 2);
}

#[test]
fn opencode_that_died_with_its_daemon_is_replaced() {
    let host = Host::new();
    host.behave("FAKE_GRANDCHILD=1");
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    kill(host.daemon_pid(), Signal::STOP);
    kill(opencode, Signal::KILL);
    kill_daemon(&host);
    host.behave("");
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.starts().len(), 2);
    // The child that it had started is gone as well.
    assert_eq!(host.processes().len(), 2);
}

/// Points the `opencode` record of the state file at an unrelated process, and checks that no daemon
/// touches that process.
fn check_left_alone(change: impl FnOnce(&mut Value, u32)) {
    let host = Host::new();
    let stranger = Stranger::idle();
    host.openwork(["daemon", "start"]).ok();
    host.openwork(["daemon", "stop", "--keep-opencode"]).ok();
    let opencode = host.state()["opencode"]["pid"].as_u64().unwrap() as u32;
    kill(opencode, Signal::KILL);
    wait_gone(opencode);
    edit_state(&host, |state| change(&mut state["opencode"], stranger.pid()));

    host.openwork(["daemon", "start"]).ok();
    assert_ne!(host.opencode_pid(), stranger.pid());
    host.openwork(["daemon", "stop"]).ok();
    assert!(is_alive(stranger.pid()));
}

#[test]
fn process_that_reused_the_pid_is_not_signalled() {
    check_left_alone(|opencode, stranger| opencode["pid"] = stranger.into());
}

#[test]
fn process_without_the_engine_id_is_not_signalled() {
    check_left_alone(|opencode, stranger| {
        opencode["pid"] = stranger.into();
        opencode["startTicks"] = stat_field(stranger, START_TIME).into();
    });
}

#[test]
fn empty_engine_id_proves_nothing() {
    check_left_alone(|opencode, stranger| {
        opencode["pid"] = stranger.into();
        opencode["startTicks"] = stat_field(stranger, START_TIME).into();
        opencode["engineId"] = "".into();
    });
}

/// A living opencode of ours that does not match the state file is not adopted. It has our marker, so it is ended before
/// another one is started.
fn check_replaced(change: impl FnOnce(&mut Value)) {
    let host = Host::new();
    host.exercises(["option --keep-opencode"]);
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    host.openwork(["daemon", "stop", "--keep-opencode"]).ok();
    edit_state(&host, |state| change(&mut state["opencode"]));
    host.openwork(["daemon", "start"]).ok();
    assert_ne!(host.opencode_pid(), opencode);
    host.runs_one_of_each();
}

#[test]
fn opencode_from_before_a_reboot_is_not_adopted() {
    check_replaced(|opencode| opencode["bootId"] = "00000000-0000-0000-0000-000000000000".into());
}

#[test]
fn process_with_another_start_time_is_not_adopted() {
    // A process of the agent has our marker too, and can get the pid of an opencode that has ended.
    check_replaced(|opencode| opencode["startTicks"] = (opencode["startTicks"].as_u64().unwrap() + 1).into());
}
