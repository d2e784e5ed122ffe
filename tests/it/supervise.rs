//! Supervision: a working opencode is left alone, a hung one is ended, and the processes of the agent end
//! gracefully. Timeouts of minutes are shortened by `OPENWORK_TEST_PACE`, which only a debug build reads,
//! or covered by the simulation of the policy.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{
    HEALTH, Host, IS_V2, NOBODY, SESSION, Signal, fake_opencode, is_alive, is_root, kill, stat_field, until, wait_for,
    wait_gone, write_program,
};

/// A host whose daemon supervises this many times faster.
fn paced(mut host: Host, pace: u32) -> Host {
    host.set("OPENWORK_TEST_PACE", pace.to_string());
    host
}

fn log(host: &Host) -> String {
    fs::read_to_string(host.file("daemon.log")).unwrap_or_default()
}

/// Waits until the daemon has logged this text `count` more times.
fn wait_for_notes(host: &Host, what: &str, count: usize) {
    let notes = || log(host).matches(what).count();
    let before = notes();
    wait_for(what, || notes() >= before + count);
}

/// The health calls that were answered so far.
fn health_calls(host: &Host) -> usize {
    host.requests().iter().filter(|request| request["target"] == HEALTH).count()
}

// --- Hangs, real and apparent ---

#[test]
#[cfg_attr(not(debug_assertions), ignore = "only a debug build takes shorter times")]
fn hung_opencode_is_detected_and_ended() {
    let host = paced(Host::new(), 30);
    host.openwork(["daemon", "start"]).ok();
    let pid = host.opencode_pid();
    host.hang(true);
    wait_gone(pid);
    host.hang(false);
    assert_ne!(host.opencode_pid(), pid);
    assert_eq!(host.health()["engine"]["restarts"], 1);
    assert!(log(&host).contains("has not answered for"), "{}", log(&host));
}

#[test]
#[cfg_attr(not(debug_assertions), ignore = "only a debug build takes shorter times")]
fn busy_opencode_that_does_not_answer_is_left_alone() {
    let host = paced(Host::new(), 20);
    host.openwork(["daemon", "start"]).ok();
    let pid = host.opencode_pid();
    host.burn(true);
    host.hang(true);
    // At this pace an idle opencode is ended after three seconds, five failed calls.
    wait_for_notes(&host, "did not answer", 12);
    assert!(is_alive(pid));
    host.hang(false);
    assert_eq!(host.opencode_pid(), pid);
    host.burn(false);

    // The same for an opencode that is adopted while it is busy.
    kill(host.daemon_pid(), Signal::KILL);
    wait_gone(host.daemon_pid());
    host.burn(true);
    host.hang(true);
    host.openwork(["daemon", "start", "--timeout", "8"]).fails(5, "opencode_timeout");
    assert!(is_alive(pid));
    host.hang(false);
    assert_eq!(host.opencode_pid(), pid);
    assert_eq!(host.starts().len(), 1);
    host.burn(false);
}

#[test]
#[cfg_attr(not(debug_assertions), ignore = "only a debug build takes shorter times")]
fn thread_or_descriptor_shortage_ends_nothing() {
    let host = paced(Host::unprivileged(), 20);
    host.openwork(["daemon", "start"]).ok();
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    // As the daemon's own user: root in a container may lack the capability.
    let limit = |limit: &str| {
        let mut prlimit = Command::new("prlimit");
        if is_root() {
            prlimit.uid(NOBODY).gid(NOBODY);
        }
        let status = prlimit.args(["--pid", &daemon.to_string(), limit]).status().expect("prlimit");
        assert!(status.success(), "{limit}");
    };

    // No further thread or process: the daemon keeps asking.
    limit("--nproc=1:");
    let before = health_calls(&host);
    wait_for("more health calls", || health_calls(&host) > before + 8);
    // No free descriptor: the daemon cannot even examine opencode.
    limit("--nofile=3:");
    wait_for_notes(&host, "cannot examine opencode", 10);
    limit("--nofile=1024:");
    assert!(is_alive(opencode));

    // A start waits until the resource is back.
    kill(opencode, Signal::KILL);
    wait_for_notes(&host, "too many processes", 3);
    limit("--nproc=2000:");
    assert_ne!(host.opencode_pid(), opencode);
}

#[test]
#[cfg_attr(not(debug_assertions), ignore = "only a debug build takes shorter times")]
fn start_that_makes_progress_is_waited_for() {
    let host = paced(Host::new(), 10);
    // A start gets six seconds at this pace, and then as long as it made progress in the last two.
    host.behave("FAKE_START_MS=9000\nFAKE_PRINT_MS=50");
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.starts().len(), 1);
}

#[test]
#[cfg_attr(not(debug_assertions), ignore = "only a debug build takes shorter times")]
fn start_without_progress_is_ended() {
    let host = paced(Host::new(), 30);
    host.behave("FAKE_NEVER_LISTEN=1");
    host.openwork(["daemon", "start", "--timeout", "1"]).fails(5, "opencode_timeout");
    wait_gone(host.starts()[0]["pid"].as_u64().unwrap() as u32);
    host.behave("");
    host.opencode_pid();
    assert!(log(&host).contains("was not ready within"), "{}", log(&host));
}

#[test]
#[cfg_attr(not(debug_assertions), ignore = "only a debug build takes shorter times")]
fn health_resets_the_failure_count() {
    // At this pace one second of health resets the count, and six failures in four seconds are too many.
    let host = paced(Host::new(), 30);
    host.openwork(["daemon", "start"]).ok();
    for _ in 0..8 {
        let (pid, before) = (host.opencode_pid(), health_calls(&host));
        wait_for("some health", || health_calls(&host) > before + 4);
        kill(pid, Signal::KILL);
        wait_for("the next opencode", || host.opencode_pid() != pid);
    }
    assert_eq!(host.health()["engine"]["restarts"], 8);
}

// --- Start ---

#[test]
fn opencode_leads_its_session_and_survives_the_daemon() {
    let host = Host::new();
    host.behave("FAKE_AGENT=sleep 1000");
    host.openwork(["daemon", "start"]).ok();
    let opencode = host.opencode_pid();
    assert_eq!(stat_field(opencode, SESSION), u64::from(opencode));
    // The kernel sends HUP to an orphaned process group that has a stopped member.
    kill(opencode, Signal::STOP);
    kill(host.daemon_pid(), Signal::KILL);
    wait_gone(host.daemon_pid());
    kill(opencode, Signal::CONT);
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.opencode_pid(), opencode);
}

/// A line of `/proc/PID/status` with a mask of signals.
fn mask(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:"))).unwrap();
    u64::from_str_radix(line.trim(), 16).unwrap()
}

#[test]
fn signals_are_reset_to_their_defaults() {
    let host = Host::new();
    let ignoring = "trap '' INT QUIT CHLD USR1 TERM HUP ALRM WINCH";
    host.openwork(["daemon", "start"]).after(ignoring).ok();
    let opencode = host.opencode_pid();
    // The fake ignores PIPE like every Rust program; two signals belong to the C library.
    let ours = !(1 << (13 - 1) | 1 << (32 - 1) | 1 << (33 - 1));
    assert_eq!((mask(opencode, "SigIgn") & ours, mask(opencode, "SigBlk")), (0, 0));
    // The daemon reaps its children and ends on TERM, whatever was ignored before.
    kill(opencode, Signal::KILL);
    wait_for("the next opencode", || host.opencode_pid() != opencode);
    assert!(log(&host).contains("ended with signal: 9"), "{}", log(&host));
    let daemon = host.daemon_pid();
    kill(daemon, Signal::TERM);
    wait_gone(daemon);
}

#[test]
fn blocked_signals_are_unblocked() {
    let host = Host::new();
    let program = host.binary().display().to_string();
    let line = format!("exec env --block-signal=TERM --block-signal=CHLD '{program}' daemon start; :");
    host.openwork(["daemon", "start"]).after(&line).ok();
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    assert_eq!((mask(opencode, "SigBlk"), mask(daemon, "SigBlk")), (0, 0));
    kill(daemon, Signal::TERM);
    wait_gone(daemon);
    assert!(!is_alive(opencode));
}

#[test]
fn unused_signals_do_nothing() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let pids = (host.daemon_pid(), host.opencode_pid());
    for signal in [Signal::USR1, Signal::USR2, Signal::HUP] {
        kill(pids.0, signal);
    }
    assert_eq!((host.daemon_pid(), host.opencode_pid()), pids);
    assert_eq!(host.phase(), "ready");
}

#[test]
fn file_size_limit_fails_the_write_and_not_the_daemon() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).after("ulimit -f 16").ok();
    let daemon = host.daemon_pid();
    let failed = (0..200).find_map(|n| {
        let project = host.project(format!("{n}-{}", "x".repeat(100)));
        let reply = host.http("POST", "/workspaces").json(json!({"path": project})).send();
        (reply.status != 201).then_some(reply)
    });
    failed.expect("a file that is too large").refused(500, "state_write_failed");
    assert_eq!(host.phase(), "ready");
    assert_eq!(host.daemon_pid(), daemon);
}

/// How many descriptors a process may have open, softly and at most (`/proc/PID/limits`).
fn descriptors(pid: u32) -> (u64, u64) {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let mut numbers = line.split_ascii_whitespace().map(|number| number.parse().unwrap_or(u64::MAX));
    (numbers.next().unwrap(), numbers.next().unwrap())
}

#[test]
fn descriptor_limit_is_raised_for_the_daemon_alone() {
    const SHELL: u64 = 256;
    let host = Host::new();
    let shell = format!("ulimit -S -n {SHELL}");
    host.openwork(["daemon", "start"]).after(&shell).ok();
    let (soft, hard) = descriptors(host.daemon_pid());
    assert_eq!(soft, hard.min(4096 + 64));
    let opencode = host.opencode_pid();
    assert_eq!(descriptors(opencode), (SHELL, hard));

    // A successor of the daemon starts where the daemon had started.
    host.openwork(["daemon", "restart"]).after(&shell).ok();
    assert_eq!(descriptors(host.daemon_pid()), (soft, hard));
    kill(opencode, Signal::KILL);
    wait_for("the next opencode", || host.opencode_pid() != opencode);
    assert_eq!(descriptors(host.opencode_pid()), (SHELL, hard));
}

#[test]
fn variables_of_git_hooks_are_not_passed_on() {
    let mut host = Host::new();
    let listed = Command::new("git").args(["rev-parse", "--local-env-vars"]).stderr(Stdio::null()).output();
    let listed = listed.map(|output| String::from_utf8(output.stdout).unwrap()).unwrap_or_default();
    let usual = ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_QUARANTINE_PATH"];
    let names: Vec<&str> = listed.lines().chain(usual).collect();
    for name in &names {
        host.set(name, "/nowhere");
    }
    host.set("GIT_EDITOR", "vi");
    host.openwork(["daemon", "start"]).ok();
    let environment = host.environment(host.opencode_pid());
    let has = |name: &str| environment.iter().any(|variable| variable.starts_with(&format!("{name}=")));
    assert!(has("GIT_EDITOR"));
    for name in names {
        assert!(!has(name), "{name}");
    }
}

#[test]
fn opencode_may_run_behind_a_wrapper() {
    let mut host = Host::new();
    // Like the scripts of package managers, the wrapper stays while the real opencode listens.
    let wrapper = host.path("wrapper");
    let script = format!("#!/bin/sh\n'{}' \"$@\"\nexit $?\n", fake_opencode().display());
    write_program(&wrapper, &script);
    host.set("OPENWORK_OPENCODE_BIN", &wrapper);
    host.openwork(["daemon", "start"]).ok();
    let real = |start: usize| host.starts()[start]["pid"].as_u64().unwrap() as u32;
    assert_ne!(real(0), host.opencode_pid());

    // The wrapper is killed; the real opencode would keep the port.
    kill(host.opencode_pid(), Signal::KILL);
    wait_for("the next opencode", || host.starts().len() == 2 && host.phase() == "ready");
    assert!(!is_alive(real(0)) && is_alive(real(1)));
    assert_eq!(Host::start_address(&host.starts()[0]), Host::start_address(&host.starts()[1]));
    assert_eq!(host.processes().len(), 3);
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(host.processes(), [0; 0]);
}

// --- Processes of the agent ---

#[test]
fn processes_of_the_agent_get_term_before_kill() {
    for crash in [false, true] {
        let host = Host::new();
        host.behave(
            "FAKE_AGENT=trap 'echo asked >> $FAKE_OPENCODE_DIR/asked; exit' TERM; \
             (trap '' TERM; echo >> $FAKE_OPENCODE_DIR/deaf; exec sleep 1000) & \
             while :; do sleep 0.1; done",
        );
        host.openwork(["daemon", "start"]).ok();
        wait_for("the agent", || !host.recorded("deaf").is_empty());
        match crash {
            true => kill(host.opencode_pid(), Signal::KILL),
            false => drop(host.openwork(["daemon", "stop"]).ok()),
        }
        wait_for("the TERM to arrive", || host.recorded("asked") == ["asked"]);
        if crash {
            wait_for("the next opencode", || host.starts().len() == 2 && host.phase() == "ready");
            host.runs_one_of_each();
        } else {
            assert_eq!(host.processes(), [0; 0]);
        }
    }
}

#[test]
fn command_of_the_agent_survives_the_stop_it_requests() {
    for command in ["daemon stop", "daemon restart --all"] {
        let mut host = Host::new();
        let program = host.binary().to_owned();
        host.set("OPENWORK_BINARY", program);
        host.behave(&format!(
            "FAKE_AGENT=sleep 1000 & sh -c '$OPENWORK_BINARY {command} > $FAKE_OPENCODE_DIR/output 2>&1; \
             echo $? > $FAKE_OPENCODE_DIR/status'; true"
        ));
        host.openwork(["daemon", "start"]).output();
        let status = until("the command to end", || host.recorded("status").first().cloned());
        assert_eq!(status, "0", "{command}: {:?}", host.recorded("output"));
        if command == "daemon stop" {
            wait_for("all to end", || host.processes().is_empty());
        } else {
            wait_for("the next opencode", || host.starts().len() == 2 && host.phase() == "ready");
            wait_for("the rest to end", || host.processes().len() == 2);
        }
    }
}

// --- Log and memory ---

#[test]
fn log_is_truncated_while_it_grows() {
    let host = Host::new();
    host.behave("FAKE_FLOODS=4");
    host.openwork(["daemon", "start"]).ok();
    wait_for("all floods", || host.recorded("floods").len() == 4);
    assert_eq!(host.recorded("floods"), ["cut"; 4]);
}

#[test]
#[cfg_attr(not(debug_assertions), ignore = "only a debug build takes shorter times")]
fn oversized_opencode_is_recycled_when_idle() {
    let host = paced(Host::new(), 30);
    host.exercises(["option --max-memory", "variable OPENWORK_MAX_MEMORY"]);
    host.behave("FAKE_MEMORY=200000000");
    // Before the session runs it would be restarted at once.
    let hold = host.path("fake/hold-memory");
    fs::write(&hold, "").unwrap();
    host.openwork(["daemon", "start", "--max-memory", "100M"]).env("OPENWORK_MAX_MEMORY", "1K").ok();
    let project = host.project("p");
    host.busy(&[&project]);
    host.add(&project);
    let mut events = host.http("GET", "/events").events();
    host.openwork(["workspace", "path", "p"]).ok();
    let pid = host.opencode_pid();
    fs::remove_file(hold).unwrap();
    let kind = |event: &Value| event["type"].as_str().unwrap_or_default().to_owned();
    let warning = events.find(|event| kind(event).starts_with("engine.")).unwrap();
    assert_eq!((kind(&warning), &warning["pid"]), ("engine.oversize".to_owned(), &json!(pid)));
    let before = health_calls(&host);
    wait_for("more health calls", || health_calls(&host) > before + 4);
    assert!(is_alive(pid));

    host.behave("");
    host.busy(&[]);
    let recycled = events.find(|event| kind(event).starts_with("engine.")).unwrap();
    assert_eq!((kind(&recycled), &recycled["pid"]), ("engine.recycled".to_owned(), &json!(pid)));
    wait_for("the next opencode", || host.opencode_pid() != pid);
    // Its instances are disposed first.
    assert_eq!(host.instance(&project), if IS_V2 { vec!["load"] } else { vec!["load", "dispose"] });
    assert_eq!((host.starts().len(), &host.health()["engine"]["restarts"]), (2, &json!(0)));

    for size in ["0", "-1", "1.5G", "much", "1Q", "99999999999T"] {
        host.openwork(["daemon", "start", &format!("--max-memory={size}")]).fails(2, "usage");
    }
}

#[test]
#[cfg_attr(not(debug_assertions), ignore = "only a debug build takes shorter times")]
fn daemon_log_is_bounded() {
    // Probes look at it: three a second at this pace.
    let host = paced(Host::new(), 30);
    host.openwork(["daemon", "start"]).ok();
    let mut log = fs::OpenOptions::new().append(true).open(host.file("daemon.log")).unwrap();
    log.write_all("a line of the daemon\n".repeat(600_000).as_bytes()).unwrap();
    wait_for("the log to be cut", || log.metadata().unwrap().len() < 1_000_000);
    let kept = fs::metadata(host.file("daemon.log.1")).unwrap().len();
    assert!((500_000..=2_000_000).contains(&kept), "{kept}");
}

/// What takes strace, to have system calls fail.
mod with_strace {
    use super::*;

    #[test]
    #[cfg_attr(debug_assertions, ignore = "needs strace(1), to take inotify away")]
    #[cfg_attr(not(debug_assertions), ignore = "only a debug build takes shorter times")]
    fn without_inotify_the_probes_bound_its_log() {
        let host = paced(Host::new(), 30);
        host.behave("FAKE_FLOODS=1");
        let fails = "exec strace -f -o /dev/null -e trace=inotify_init1 -e inject=inotify_init1:error=EMFILE";
        let daemon = host.openwork(["daemon", "run"]).after(&format!("{fails} \"$0\" \"$@\"")).spawn();
        wait_for("the flood", || !host.recorded("floods").is_empty());
        assert_eq!(host.recorded("floods"), ["cut"]);
        host.openwork(["daemon", "stop"]).ok();
        assert!(daemon.wait().stderr.contains("cannot watch opencode's log"));
    }
}

/// Tests in PID namespaces, as in containers.
mod as_root {
    use super::*;

    /// Runs a command as the first process of a PID namespace.
    fn first_process(host: &Host, mount_proc: bool, line: &str) -> std::process::Output {
        let mut unshare = Command::new("unshare");
        unshare.args(["--pid", "--fork", "--kill-child"]);
        if mount_proc {
            unshare.arg("--mount-proc");
        }
        unshare.args(["sh", "-c", line]).env("OPENWORK_BINARY", host.binary());
        for name in ["HOME", "FAKE_OPENCODE_DIR", "OPENWORK_DATA_DIR", "OPENWORK_OPENCODE_BIN"] {
            unshare.env(name, host.get(name));
        }
        for name in ["OPENWORK_DAEMON_PORT", "OPENWORK_OPENCODE_PORT"] {
            unshare.env(name, host.get(name));
        }
        unshare.output().expect("unshare")
    }

    #[test]
    #[ignore = "needs root, for a PID namespace"]
    fn daemon_as_pid_1_reaps_orphans() {
        let host = Host::new();
        host.behave("FAKE_AGENT=(sleep 0.1 &) ; exec sleep 1000");
        // The daemon is process 1; another process looks for zombies, and then stops it.
        let line = "(while [ ! -s $OPENWORK_DATA_DIR/daemon.lock ]; do sleep 0.1; done; \
                    $OPENWORK_BINARY daemon start; sleep 1; \
                    grep -c '^State:.Z' /proc/[0-9]*/status | grep -v ':0' | wc -l > $FAKE_OPENCODE_DIR/zombies; \
                    $OPENWORK_BINARY daemon stop) & exec $OPENWORK_BINARY daemon run";
        first_process(&host, true, line);
        assert_eq!(host.recorded("zombies").first().map(|line| line.trim().to_owned()), Some("0".to_owned()));
        assert_eq!(host.starts().len(), 1);
    }

    #[test]
    #[ignore = "needs root, for a PID namespace"]
    fn process_unproven_by_proc_is_not_signalled() {
        // In a PID namespace without its own /proc, an entry of /proc is about another process.
        let host = Host::new();
        host.openwork(["daemon", "start"]).ok();
        let opencode = host.opencode_pid();
        kill(host.daemon_pid(), Signal::KILL);
        wait_gone(host.daemon_pid());
        // Inside, an unrelated process gets the pid that opencode has outside.
        let line = format!(
            "echo {} > /proc/sys/kernel/ns_last_pid; sleep 1000 & \
             echo $! > $FAKE_OPENCODE_DIR/stranger; \
             $OPENWORK_BINARY daemon stop; $OPENWORK_BINARY daemon start; \
             kill -0 $! && echo alive >> $FAKE_OPENCODE_DIR/stranger",
            opencode - 1
        );
        let output = first_process(&host, false, &line);
        assert_eq!(host.recorded("stranger"), [&opencode.to_string(), "alive"], "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("container"), "{output:?}");
        assert!(is_alive(opencode));
        assert_eq!(host.starts().len(), 1);
        host.openwork(["daemon", "start"]).ok();
        assert_eq!(host.opencode_pid(), opencode);
    }
}
