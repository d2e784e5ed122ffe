//! The data directory: atomic writes, refusal of invalid files, private modes, and no foreign symlinks.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::{Value, json};

use crate::support::{
    AUTH, FILES, Host, Request, STATE, Signal, VERSION, free_port, is_alive, kill, local, wait_for, wait_gone,
};

fn litter(host: &Host) -> Vec<String> {
    let names = fs::read_dir(host.data()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !FILES.contains(&name.as_str()) && name != "opencode").collect()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

// --- Invalid files ---

/// Checks that every command that reads the state refuses this content and leaves it untouched.
fn check_refused(content: &[u8], code: &str) {
    let host = Host::new();
    host.write_state(content);
    let project = host.project("p");
    let project = project.to_str().unwrap();
    for command in [
        &["workspace", "list"][..],
        &["workspace", "current"],
        &["workspace", "info", "p"],
        &["workspace", "add", project],
        &["workspace", "path"],
        &["daemon", "start"],
    ] {
        let error = host.openwork(command).fails(1, code);
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(host.file(STATE).to_str().unwrap()), "{message}");
    }
    // The listing for people reads the file through other code.
    let list = host.openwork(["workspace", "list"]).exits(1);
    assert!(list.stdout.is_empty() && list.stderr.contains(host.file(STATE).to_str().unwrap()), "{list:?}");
    assert_eq!(fs::read(host.file(STATE)).unwrap(), content);
    assert_eq!(litter(&host), [""; 0]);
    wait_for("the refused daemons to end", || host.processes().is_empty());
}

#[test]
fn invalid_json_is_refused_untouched() {
    for content in
        [&b""[..], b"\n", b"{", b"\x00\x00\x00", b"not json", b"{}{}", b"{\"version\": 1, \"workspaces\": [\xff]}"]
    {
        check_refused(content, "state_corrupt");
    }
}

#[test]
fn truncated_file_is_refused_untouched() {
    let whole = json!({"version": 1, "activeId": "ws-a", "workspaces": [{"id": "ws-a", "name": "a", "path": "/a"}]});
    let whole = whole.to_string();
    for length in [1, whole.len() / 2, whole.len() - 1] {
        check_refused(&whole.as_bytes()[..length], "state_corrupt");
    }
}

#[test]
fn wrong_shape_is_refused_untouched() {
    for content in [
        json!([]),
        json!(null),
        json!("text"),
        json!({"version": 1, "workspaces": {}}),
        json!({"version": 1, "workspaces": [1]}),
        json!({"version": 1, "workspaces": [{"name": "without an id", "path": "/p"}]}),
        json!({"version": 1, "workspaces": [{"id": 1, "name": "a", "path": "/p"}]}),
        json!({"version": 1, "workspaces": [{"id": "ws-a", "name": ["a"], "path": "/p"}]}),
        json!({"version": 1, "workspaces": [{"id": "ws-a", "name": "a", "path": "/p", "createdAt": "today"}]}),
        json!({"version": 1, "workspaces": [{"id": "ws-a", "name": "a", "path": "/p", "lastUsedAt": -1}]}),
        json!({"version": 1, "workspaces": [{"id": "ws-a", "name": "a", "path": "/p", "workspaceType": 7}]}),
        json!({"version": 1, "workspaces": [], "daemon": 5}),
        json!({"version": 1, "workspaces": [], "opencode": {"pid": "1"}}),
        json!({"version": 1, "workspaces": [], "activeId": 7}),
        json!({"version": "1", "workspaces": []}),
        json!({"version": -1, "workspaces": []}),
    ] {
        check_refused(content.to_string().as_bytes(), "state_corrupt");
    }
}

#[test]
fn newer_version_is_refused_untouched() {
    for version in [2, 1_000_000] {
        let content = json!({"version": version, "workspaces": [], "shape": "of the future"});
        check_refused(content.to_string().as_bytes(), "state_too_new");
        // Also when its workspaces are none that this version can read.
        let content = json!({"version": version, "workspaces": {"by": "name"}});
        check_refused(content.to_string().as_bytes(), "state_too_new");
    }
}

#[test]
fn directory_as_state_file_is_refused_untouched() {
    let host = Host::new();
    host.exercises(["code state_corrupt"]);
    fs::create_dir_all(host.file(STATE).join("something")).unwrap();
    host.openwork(["workspace", "list"]).fails(1, "state_corrupt");
    host.openwork(["workspace", "add", "/tmp"]).fails(1, "state_corrupt");
    assert!(host.file(STATE).join("something").is_dir());
}

#[test]
fn change_that_cannot_be_synced_is_undone() {
    let host = Host::unprivileged();
    host.exercises(["code state_write_failed"]);
    host.add(host.project("a"));
    let before = fs::read(host.file(STATE)).unwrap();
    // The directory can be written but not opened: the rename works, its fsync does not.
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o300)).unwrap();
    let failed = host.http("PATCH", "/workspaces/a").json(json!({"name": "b"})).send();
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o700)).unwrap();
    failed.refused(500, "state_write_failed");
    assert_eq!(fs::read(host.file(STATE)).unwrap(), before);
    assert_eq!(host.names(), ["a"]);
}

#[test]
fn fields_of_other_programs_survive() {
    let host = Host::new();
    host.exercises(["command workspace switch"]);
    let opencode = host.get("OPENWORK_OPENCODE_BIN").to_owned();
    // Numbers keep all their digits.
    let numbers: Vec<f64> = (1..200).map(|n| (f64::from(n) * 0.7).sin() * 10f64.powi(n % 60 - 30)).collect();
    host.write_state(
        json!({
            "version": 1, "future": {"a": [1], "numbers": numbers}, "workspaces": [{"id": "ws-a", "name": "a", "path": "/", "icon": {"b": null}}],
            "ports": {"daemon": 0, "opencode": 0, "router": 7},
            "binaries": {"sidecar": 1, "opencode": {"path": opencode, "expectedVersion": "1"}},
        })
        .to_string(),
    );
    host.openwork(["daemon", "start"]).ok();
    host.openwork(["workspace", "switch", "a"]).ok();
    let state = host.state();
    assert_eq!(state["future"], json!({"a": [1], "numbers": numbers}));
    assert_eq!(state["workspaces"][0]["icon"], json!({"b": null}));
    assert_eq!(state["ports"]["router"], 7);
    assert_eq!(state["binaries"]["sidecar"], 1);
    assert_eq!(state["binaries"]["opencode"]["expectedVersion"], "1");
    assert!(state["binaries"]["opencode"]["actualVersion"].is_string(), "{state}");
}

#[test]
fn repair_does_not_replace_a_symlink() {
    let host = Host::new();
    fs::create_dir_all(host.data()).unwrap();
    let elsewhere = host.path("elsewhere.json");
    fs::write(&elsewhere, "{}").unwrap();
    std::os::unix::fs::symlink(&elsewhere, host.file(STATE)).unwrap();
    host.openwork(["workspace", "list"]).fails(1, "state_corrupt");
    host.openwork(["state", "repair"]).fails(1, "permission_denied");
    assert_eq!(fs::read_link(host.file(STATE)).unwrap(), elsewhere);
}

#[test]
fn invalid_password_file_is_refused_untouched() {
    for content in ["", "{}", "not json", r#"{"opencodeUsername": "opencode", "opencodePassword": ""}"#] {
        let host = Host::new();
        host.write_state(json!({"version": 1, "workspaces": []}).to_string());
        fs::write(host.file(AUTH), content).unwrap();
        let error = host.openwork(["daemon", "start"]).fails(1, "state_corrupt");
        assert!(!error["hint"].as_str().unwrap().contains("state repair"), "{error}");
        assert_eq!(fs::read_to_string(host.file(AUTH)).unwrap(), content);
    }
}

#[test]
fn workspace_of_an_unknown_type_is_kept_but_unusable() {
    let host = Host::new();
    host.write_state(
        json!({"version": 1, "activeId": "ws-1", "workspaces": [
            {"id": "ws-1", "name": "far", "path": "/p", "workspaceType": "distant", "orbit": 7},
            {"id": "ws-2", "name": "near", "path": host.project("near")},
        ]})
        .to_string(),
    );
    let is_listed = |host: &Host| {
        assert_eq!(host.names(), ["far", "near"]);
        let list = host.openwork(["workspace", "list"]).ok();
        assert!(list.stdout.contains("type \"distant\", not supported"), "{list:?}");
        let info = host.openwork(["workspace", "info", "far"]).ok();
        assert!(info.stdout.contains("distant"), "{info:?}");
    };
    is_listed(&host);
    for command in [&["workspace", "path", "far"][..], &["instance", "dispose", "far"], &["env", "far"]] {
        let error = host.openwork(command).fails(1, "bad_request");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("far") && message.contains("\"distant\""), "{message}");
    }
    host.routed("GET", "/w/far/path").fails(400, "bad_request");
    is_listed(&host);
    // Other workspaces work, and the registry commands accept this one.
    host.openwork(["workspace", "path", "near"]).ok();
    host.openwork(["workspace", "rename", "far", "farther"]).ok();
    let entry = &host.state()["workspaces"][0];
    assert_eq!((&entry["workspaceType"], &entry["orbit"]), (&json!("distant"), &json!(7)));
    host.openwork(["workspace", "remove", "farther"]).ok();
    assert_eq!(host.names(), ["near"]);
}

// --- Edits by hand ---

/// The copies kept beside the state file under this name.
fn kept_as(host: &Host, name: &str) -> Vec<PathBuf> {
    let names = litter(host).into_iter().filter(|kept| kept.starts_with(&format!("{STATE}.{name}-")));
    names.map(|name| host.file(&name)).collect()
}

/// Replaces the state file, as an editor does.
fn edit(host: &Host, content: impl AsRef<[u8]>) {
    let draft = host.path("draft");
    fs::write(&draft, content).unwrap();
    fs::rename(draft, host.file(STATE)).unwrap();
}

#[test]
fn edit_while_the_daemon_runs_is_adopted() {
    let host = Host::new();
    let ids = ["a", "b"].map(|name| host.add(host.project(name)));
    let opencode = host.opencode_pid();
    let before = host.state();
    let mut state = before.clone();
    state["workspaces"][0]["name"] = "first".into();
    state["workspaces"][0]["icon"] = "star".into();
    state["workspaces"].as_array_mut().unwrap().remove(1);
    state["activeId"] = "".into();
    // An edit cannot change the daemon's records of its processes, their programs and their ends.
    for name in ["daemon", "opencode", "binaries", "cliVersion"] {
        assert!(!state[name].is_null(), "{name}");
        state[name] = Value::Null;
    }
    state["fences"] = json!([{"directory": host.project("a"), "version": VERSION}]);
    edit(&host, state.to_string());

    let list = host.openwork(["workspace", "list"]).ok();
    assert!(list.stdout.contains("first") && !list.stdout.contains("  b  "), "{list:?}");
    let said = format!("{STATE} was edited by hand; the daemon has taken the edit over");
    let changes = format!("removed b ({}); changed first ({})", ids[1], ids[0]);
    assert!(list.stderr.contains(&said) && list.stderr.contains(&changes), "{list:?}");
    let log = fs::read_to_string(host.file("daemon.log")).unwrap();
    assert!(log.contains(&said), "{log}");
    // The notice comes once.
    assert_eq!(host.openwork(["workspace", "list"]).ok().stderr, "");
    let now = host.state();
    assert_eq!((&now["workspaces"][0]["icon"], &now["opencode"]["pid"]), (&json!("star"), &json!(opencode)));
    for name in ["daemon", "binaries", "cliVersion", "fences"] {
        assert_eq!(now[name], before[name], "{name}");
    }
    assert!(kept_as(&host, "edited").is_empty());

    // The next change builds on the edit.
    state["workspaces"][0]["name"] = "second".into();
    edit(&host, state.to_string());
    host.openwork(["workspace", "rename", "second", "third"]).ok();
    host.openwork(["workspace", "rename", "b", "c"]).fails(4, "workspace_not_found");
    assert_eq!(host.names(), ["third"]);
    assert_eq!((host.opencode_pid(), host.starts().len()), (opencode, 1));
}

#[test]
fn edit_before_a_restart_survives_it() {
    let host = Host::new();
    host.add(host.project("a"));
    let opencode = host.opencode_pid();
    let mut state = host.state();
    state["workspaces"][0]["name"] = "edited".into();
    state["opencode"] = Value::Null;
    edit(&host, state.to_string());
    host.openwork(["daemon", "restart"]).ok();
    assert_eq!(host.names(), ["edited"]);
    assert_eq!((host.opencode_pid(), host.starts().len()), (opencode, 1));
}

#[test]
fn unreadable_edit_is_kept_as_a_backup() {
    let host = Host::new();
    host.add(host.project("a"));
    host.opencode_pid(); // its start is in the state file
    for content in [&b"{ garbage"[..], br#"{"version": 2, "workspaces": []}"#] {
        edit(&host, content);
        let switch = host.openwork(["workspace", "switch", "a"]).ok();
        let kept = kept_as(&host, "edited");
        assert_eq!(kept.len(), 1);
        let name = kept[0].file_name().unwrap().to_str().unwrap();
        assert!(switch.stderr.contains(name), "{switch:?}");
        assert!(fs::read_to_string(host.file("daemon.log")).unwrap().contains(name));
        assert_eq!(fs::read(&kept[0]).unwrap(), content);
        assert_eq!((host.names(), host.state()["workspaces"][0]["name"].as_str()), (vec!["a".to_owned()], Some("a")));
        fs::remove_file(&kept[0]).unwrap();
    }
}

#[test]
fn touched_or_removed_file_is_rewritten() {
    let host = Host::new();
    host.add(host.project("a"));
    host.opencode_pid(); // its start is in the state file
    let before = fs::read(host.file(STATE)).unwrap();
    edit(&host, &before);
    assert_eq!(host.openwork(["workspace", "switch", "a"]).ok().stderr, "");
    fs::remove_file(host.file(STATE)).unwrap();
    assert_eq!(host.openwork(["workspace", "list"]).ok().stderr, "");
    assert_eq!(host.state()["workspaces"][0]["name"], "a");
    assert_eq!(litter(&host), [""; 0]);
}

// --- Two daemons ---

#[test]
fn daemon_without_its_lock_file_stops_and_leaves_opencode() {
    let host = Host::new();
    host.add(host.project("a"));
    let (first, opencode, port) = (host.daemon_pid(), host.opencode_pid(), host.port());
    fs::remove_file(host.file("daemon.lock")).unwrap();
    // Without the lock file the first daemon is invisible.
    host.openwork(["daemon", "start"]).env("OPENWORK_DAEMON_PORT", free_port().to_string()).ok();
    let second = host.daemon_pid();
    assert!(second != first && is_alive(first));
    assert_eq!(host.opencode_pid(), opencode);
    host.add(host.project("b"));

    let late = Request::new(local(port), "POST", "/workspaces").json(&json!({"path": host.project("c")}));
    late.send().unwrap().refused(500, "state_write_failed");
    wait_gone(first);
    let log = fs::read_to_string(host.file("daemon.log")).unwrap();
    assert!(log.contains("stopping, since another daemon may run over the same files"), "{log}");
    assert_eq!(host.names(), ["a", "b"]);
    assert_eq!(host.state()["daemon"]["pid"], second);
    host.openwork(["workspace", "path", "b"]).ok();
    assert_eq!((host.opencode_pid(), host.starts().len()), (opencode, 1));
    host.runs_one_of_each();
}

#[test]
fn daemon_with_a_recreated_directory_stops_with_its_opencode() {
    let host = Host::new();
    host.add(host.project("a"));
    let (first, old, port) = (host.daemon_pid(), host.opencode_pid(), host.port());
    fs::remove_dir_all(host.data()).unwrap();
    host.openwork(["daemon", "start"]).env("OPENWORK_DAEMON_PORT", free_port().to_string()).ok();
    host.add(host.project("b"));
    assert_ne!((host.daemon_pid(), host.opencode_pid()), (first, old));

    let late = Request::new(local(port), "POST", "/workspaces").json(&json!({"path": host.project("c")}));
    late.send().unwrap().refused(500, "state_write_failed");
    wait_gone(first);
    wait_gone(old);
    assert_eq!(host.names(), ["b"]);
    host.openwork(["workspace", "path", "b"]).ok();
    host.runs_one_of_each();
}

#[test]
fn daemon_notices_a_recreated_directory_without_a_request() {
    let mut host = Host::new();
    host.set("OPENWORK_TEST_PACE", "10");
    host.openwork(["daemon", "start"]).ok();
    let (first, old) = (host.daemon_pid(), host.opencode_pid());
    fs::remove_dir_all(host.data()).unwrap();
    host.openwork(["daemon", "start"]).env("OPENWORK_DAEMON_PORT", free_port().to_string()).ok();
    assert_ne!((host.daemon_pid(), host.opencode_pid()), (first, old));
    wait_gone(first);
    wait_gone(old);
    host.runs_one_of_each();
}

#[test]
fn daemon_with_a_removed_directory_stops_with_its_opencode() {
    let host = Host::new();
    let foreground = host.openwork(["daemon", "run"]).spawn();
    wait_for("the daemon", || host.lock_text().is_some());
    let opencode = host.opencode_pid();
    let port = host.port();
    fs::remove_dir_all(host.data()).unwrap();
    // A read request notices it as well.
    Request::new(local(port), "GET", "/workspaces").send().unwrap();
    let output = foreground.wait();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.contains("daemon.lock is no longer the file"), "{output:?}");
    assert!(!is_alive(opencode) && !host.data().exists());
}

// --- Repair ---

#[test]
fn repair_saves_readable_entries() {
    let host = Host::new();
    let (a, b) = (host.project("a"), host.project("b"));
    let (ids, remote) = ([host.add(&a), host.add(&b)], "https://h.example");
    host.openwork(["workspace", "add-remote", remote]).ok();
    host.openwork(["workspace", "switch", "b"]).ok();
    host.openwork(["daemon", "stop"]).ok();
    let whole = fs::read_to_string(host.file(STATE)).unwrap();
    let last = whole.find(remote).unwrap();
    // Truncate the file in the middle of the last entry.
    fs::write(host.file(STATE), &whole[..last]).unwrap();

    let report = host.openwork(["state", "repair"]).json();
    assert_eq!(report["repaired"], true);
    let saved: Vec<&Value> = report["workspaces"].as_array().unwrap().iter().map(|entry| &entry["id"]).collect();
    assert_eq!(saved, [&ids[0], &ids[1]]);
    assert_eq!((host.names(), host.state()["activeId"].as_str()), (vec!["a".into(), "b".into()], Some(&*ids[1])));
    let kept = kept_as(&host, "corrupt");
    assert_eq!(report["original"], kept[0].to_str().unwrap());
    assert_eq!(fs::read_to_string(&kept[0]).unwrap(), whole[..last]);
    assert_eq!((kept.len(), mode(&host.file(STATE))), (1, 0o600));

    host.openwork(["workspace", "path", "b"]).ok();
    host.add(host.project("c"));
}

#[test]
fn repair_of_an_unusable_file_starts_empty() {
    for content in ["", "garbage", "[]"] {
        let host = Host::new();
        host.write_state(content);
        let output = host.openwork(["state", "repair"]).ok();
        assert!(output.stdout.contains(kept_as(&host, "corrupt")[0].to_str().unwrap()), "{output:?}");
        assert_eq!(fs::read_to_string(&kept_as(&host, "corrupt")[0]).unwrap(), content);
        host.add(host.project("p"));
    }
    // A directory is moved aside as well.
    let host = Host::new();
    fs::create_dir_all(host.file(STATE).join("something")).unwrap();
    host.openwork(["state", "repair"]).ok();
    assert!(kept_as(&host, "corrupt")[0].join("something").is_dir());
    host.add(host.project("p"));
}

#[test]
fn repair_leaves_an_intact_file_alone() {
    let host = Host::new();
    host.exercises(["code state_too_new", "command state repair"]);
    assert_eq!(host.openwork(["state", "repair"]).json()["repaired"], false);
    host.add(host.project("p"));
    // A running daemon owns the file, so repair refuses.
    host.openwork(["state", "repair"]).exits(1);
    host.openwork(["daemon", "stop"]).ok();
    let before = fs::read(host.file(STATE)).unwrap();
    assert_eq!(host.openwork(["state", "repair"]).json()["repaired"], false);
    assert_eq!((fs::read(host.file(STATE)).unwrap(), kept_as(&host, "corrupt")), (before, vec![]));

    // A newer version is not corrupt.
    let newer = json!({"version": 2, "workspaces": {}}).to_string();
    fs::write(host.file(STATE), &newer).unwrap();
    host.openwork(["state", "repair"]).fails(1, "state_too_new");
    assert_eq!(fs::read_to_string(host.file(STATE)).unwrap(), newer);
}

#[test]
fn failed_repair_changes_nothing() {
    let host = Host::unprivileged();
    host.write_state("garbage");
    // Unreadable: nothing can be saved, and starting empty would be no repair.
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(host.file(STATE), fs::Permissions::from_mode(0o000)).unwrap();
    host.openwork(["state", "repair"]).fails(1, "permission_denied");
    fs::set_permissions(host.file(STATE), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(fs::read_to_string(host.file(STATE)).unwrap(), "garbage");
    // Not writable: the original stays in place.
    let in_the_way = host.file(&format!("{STATE}.tmp"));
    fs::create_dir(&in_the_way).unwrap();
    host.openwork(["state", "repair"]).fails(1, "state_write_failed");
    assert_eq!(fs::read_to_string(host.file(STATE)).unwrap(), "garbage");
    fs::remove_dir(&in_the_way).unwrap();
    host.openwork(["state", "repair"]).ok();
    host.add(host.project("p"));
}

#[test]
fn repair_lists_what_it_could_not_save() {
    let host = Host::new();
    host.write_state(
        r#"{"version": 1, "workspaces": [
            {"id": "ws-1", "name": "local", "path": "/local", "createdAt": "never"},
            {"id": "ws-2", "name": "far", "path": "", "workspaceType": "remote", "baseUrl": "https://h", "directory": "/srv"},
            {"id": "ws-3", "name": "nowhere", "workspaceType": "local"},
            {"id": "ws-1", "name": "again", "path": "/again"}, {"broken"#,
    );
    let output = host.openwork(["state", "repair"]).ok();
    for line in [
        "saved local (/local)",
        "saved far (https://h /srv)",
        "could not save ws-3: neither path nor baseUrl",
        "could not save ws-1: a duplicate",
        "could not save fields other than the workspaces: only the original has them",
        "saved in all: 2",
    ] {
        assert!(output.stdout.lines().any(|found| found == line), "{line}: {output:?}");
    }
    assert_eq!(host.names(), ["local", "far"]);
}

#[test]
fn repair_clears_the_address_of_a_dead_daemon() {
    let host = Host::new();
    host.add(host.project("p"));
    let daemon = host.daemon_pid();
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
    assert!(host.lock_text().is_some());
    host.openwork(["state", "repair"]).ok();
    assert_eq!(fs::read_to_string(host.file("daemon.lock")).unwrap(), "");
    host.openwork(["daemon", "stop"]).ok();
}

// --- Writing ---

/// Tests that need strace, to see system calls.
mod with_strace {
    use super::*;

    #[test]
    #[ignore = "needs strace(1), to see what is synced"]
    fn change_is_synced_before_and_after_the_rename() {
        let host = Host::new();
        let trace = host.path("trace");
        let calls = "fsync,rename,renameat,renameat2";
        let strace = format!("exec strace -f -y -e trace={calls} -o '{}' \"$0\" \"$@\"", trace.display());
        let daemon = host.openwork(["daemon", "run"]).after(&strace).spawn();
        wait_for("the daemon", || host.lock_text().is_some());
        host.add(host.project("p"));
        host.openwork(["daemon", "stop"]).ok();
        daemon.wait();
        let trace = fs::read_to_string(trace).unwrap();
        let temporary = format!("<{}.tmp>", host.file(STATE).display());
        let directory = format!("<{}>", host.data().display());
        let calls: String = trace
            .lines()
            .filter_map(|line| match () {
                () if line.contains("fsync(") && line.contains(&temporary) => Some('f'),
                () if line.contains("rename") && line.contains(&format!("{STATE}\"")) => Some('r'),
                () if line.contains("fsync(") && line.contains(&directory) => Some('d'),
                () => None,
            })
            .collect();
        let renames = calls.matches('r').count();
        assert!(renames > 2 && calls.matches("frd").count() == renames, "{calls}\n{trace}");
    }
}

#[test]
fn state_file_is_always_complete() {
    let host = Host::new();
    host.exercises(["route POST /workspaces"]);
    host.openwork(["daemon", "start"]).ok();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut sizes = BTreeSet::new();
            while !done.load(Ordering::Relaxed) {
                sizes.insert(host.state()["workspaces"].as_array().unwrap().len());
            }
            sizes
        });
        for n in 0..50 {
            let project = host.project(format!("p{n}"));
            host.http("POST", "/workspaces").json(json!({"path": project})).ok();
            // On disk before the reply.
            assert_eq!(host.state()["workspaces"].as_array().unwrap().len(), n + 1);
        }
        done.store(true, Ordering::Relaxed);
        assert!(!reader.join().unwrap().is_empty());
    });
    assert_eq!(litter(&host), [""; 0]);
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(litter(&host), [""; 0]);
}

#[test]
fn acknowledged_changes_survive_a_kill() {
    let host = Host::new();
    // More than a round has time for.
    const ADDITIONS: usize = 2000;
    let mut acknowledged = Vec::new();
    for round in 0..5 {
        host.openwork(["daemon", "start"]).ok();
        let daemon = host.daemon_pid();
        thread::scope(|scope| {
            let adding = scope.spawn(|| {
                let mut added = Vec::new();
                for n in 0..ADDITIONS {
                    let project = host.project(format!("{round}-{n}"));
                    let request = host.http("POST", "/workspaces").json(json!({"path": project}));
                    match request.try_send() {
                        Some(reply) if reply.status == 201 => added.push(reply.json()["workspace"]["id"].clone()),
                        _ => break,
                    }
                }
                added
            });
            // Each round kills the daemon after a different number of writes.
            wait_for("some additions", || host.state()["workspaces"].as_array().map_or(0, Vec::len) > round * 7);
            kill(daemon, Signal::KILL);
            acknowledged.extend(adding.join().unwrap());
        });
        wait_gone(daemon);
        let state = host.state();
        let ids: Vec<&Value> = state["workspaces"].as_array().unwrap().iter().map(|entry| &entry["id"]).collect();
        assert!(acknowledged.iter().all(|id| ids.contains(&id)), "{acknowledged:?} in {state}");
    }
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(litter(&host), [""; 0]);
}

#[test]
fn failed_write_changes_nothing() {
    let host = Host::unprivileged();
    host.openwork(["daemon", "start"]).ok();
    host.add(host.project("before"));
    let before = fs::read(host.file(STATE)).unwrap();
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o500)).unwrap();
    let project = host.project("p");
    let add = || host.http("POST", "/workspaces").json(json!({"path": project}));
    add().fails(500, "state_write_failed");
    host.openwork(["workspace", "rename", "before", "after"]).fails(1, "state_write_failed");
    host.openwork(["workspace", "remove", "before"]).fails(1, "state_write_failed");
    assert_eq!(host.names(), ["before"]);
    assert_eq!(fs::read(host.file(STATE)).unwrap(), before);

    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o700)).unwrap();
    add().ok();
    assert_eq!(host.names(), ["before", "p"]);
}

// --- The directory ---

#[test]
fn modes_are_right_under_any_umask() {
    for umask in [0o000, 0o027, 0o177] {
        let host = Host::new();
        host.openwork(["daemon", "start"]).after(&format!("umask {umask:o}")).ok();
        let data = host.data();
        assert_eq!(mode(&data), 0o700);
        for entry in fs::read_dir(&data).unwrap().map(Result::unwrap) {
            let kind = entry.file_type().unwrap();
            let expected = if kind.is_dir() { 0o700 } else { 0o600 };
            assert_eq!(mode(&entry.path()), expected, "{:?} under {umask:o}", entry.path());
        }
        assert!(fs::symlink_metadata(data.join("control.sock")).unwrap().file_type().is_socket());
        // opencode keeps the umask of the shell.
        let pid = &host.starts()[0]["pid"];
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains(&format!("Umask:\t{umask:04o}")), "{status}");
    }
}

/// Under umask 777 a directory is useless to its owner, unless it gets a mode of its own.
#[test]
fn created_directories_are_usable_under_any_umask() {
    let mut host = Host::unprivileged();
    host.unset("OPENWORK_DATA_DIR");
    let data = host.home().join(".local/share/openwork");
    host.data_is(data.clone());
    host.openwork(["state", "repair"]).after("umask 777").ok();
    for directory in data.ancestors().take_while(|directory| *directory != host.home()) {
        assert_eq!(mode(directory), 0o700, "{}", directory.display());
    }
    assert_eq!(mode(&data.join("daemon.lock")), 0o600);
    host.add(host.project("p"));
}

#[test]
fn last_use_is_written_after_a_failed_write() {
    let host = Host::new();
    let id = host.add(host.project("p"));
    host.openwork(["workspace", "path", "p"]).ok();
    let last_used = || host.state()["workspaces"][0]["lastUsedAt"].as_u64().unwrap();
    let added = last_used();
    wait_for("the first use to be written", || last_used() > added);
    let before = last_used();
    // A directory blocks the temporary file.
    let in_the_way = host.file(&format!("{STATE}.tmp"));
    fs::create_dir(&in_the_way).unwrap();
    host.openwork(["workspace", "path", "p"]).ok();
    let failure = format!("remove {}: ", in_the_way.display());
    wait_for("a write to fail", || fs::read_to_string(host.file("daemon.log")).unwrap().contains(&failure));
    assert_eq!(last_used(), before);
    let known = host.http("GET", &format!("/workspaces/{id}")).ok()["workspace"]["lastUsedAt"].as_u64().unwrap();
    assert!(known > before);
    fs::remove_dir(&in_the_way).unwrap();
    wait_for("the use to be written", || last_used() == known);
}

#[test]
fn own_directory_is_made_private() {
    let host = Host::new();
    fs::create_dir(host.data()).unwrap();
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o755)).unwrap();
    host.add(host.project("p"));
    assert_eq!(mode(&host.data()), 0o700);
}

#[test]
fn directory_of_another_user_is_refused() {
    let host = Host::unprivileged();
    host.exercises(["code permission_denied", "option --data-dir"]);
    host.openwork(["daemon", "start", "--data-dir", "/proc"]).fails(1, "permission_denied");
    for args in [&["workspace", "add", "/tmp"][..], &["workspace", "list"], &["status"], &["logs"], &["daemon", "stop"]]
    {
        let error = host.openwork([args, &["--data-dir", "/proc"]].concat()).fails(1, "permission_denied");
        assert!(error["message"].as_str().unwrap().contains("another user"), "{error}");
    }
}

/// What takes two users: root, and an account without rights.
mod as_root {
    use std::os::unix::fs::{chown, lchown};

    use super::*;
    use crate::support::NOBODY;

    #[test]
    #[ignore = "needs root, to make a directory of another user"]
    fn directory_of_another_user_is_refused_whatever_its_mode() {
        let host = Host::unprivileged();
        fs::create_dir(host.data()).unwrap();
        fs::set_permissions(host.data(), fs::Permissions::from_mode(0o777)).unwrap();
        host.openwork(["daemon", "start"]).fails(1, "permission_denied");
        host.openwork(["workspace", "add", "/tmp"]).fails(1, "permission_denied");
        assert_eq!(fs::read_dir(host.data()).unwrap().count(), 0);
        assert_eq!(mode(&host.data()), 0o777);
    }

    #[test]
    #[ignore = "needs root, to make a link of another user"]
    fn symlink_of_another_user_cannot_choose_the_data_directory() {
        let host = Host::new();
        let (shared, open) = (host.project("shared"), host.project("open"));
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777)).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
        let link = shared.join("link");
        symlink(&open, &link).unwrap();
        lchown(&link, Some(NOBODY), Some(NOBODY)).unwrap();
        for data in [link.clone(), link.join("openwork")] {
            for command in [&["daemon", "start"][..], &["workspace", "add", "/"], &["state", "repair"]] {
                let option = ["--data-dir", data.to_str().unwrap()];
                host.openwork(command.iter().chain(&option)).fails(1, "permission_denied");
            }
        }
        assert_eq!((mode(&open), fs::read_dir(&open).unwrap().count()), (0o755, 0));
        // The user's own symlink is fine.
        lchown(&link, Some(0), Some(0)).unwrap();
        let option = ["--data-dir", link.to_str().unwrap()];
        host.openwork(["state", "repair"].iter().chain(&option)).ok();
    }

    /// As under a sudo that keeps HOME.
    #[test]
    #[ignore = "needs root, to make a directory of another user"]
    fn root_creates_nothing_in_the_home_of_another_user() {
        let mut host = Host::new();
        host.unset("OPENWORK_DATA_DIR");
        chown(host.home(), Some(NOBODY), Some(NOBODY)).unwrap();
        for args in [&["daemon", "start"][..], &["daemon"], &["workspace", "add", "/tmp"], &["state", "repair"]] {
            host.openwork(args).fails(1, "permission_denied");
        }
        host.openwork(["workspace", "list"]).ok();
        assert_eq!(fs::read_dir(host.home()).unwrap().count(), 0);
    }

    #[test]
    #[ignore = "needs root, for a root directory of its own"]
    fn root_directory_is_refused_untouched() {
        let host = Host::new();
        let script = r#"
            set -e
            mount -t tmpfs -o mode=755 none "$0"
            cd "$0"
            for directory in bin lib lib64 usr; do
                if [ -L "/$directory" ]; then cp -P "/$directory" .; continue; fi
                if [ -d "/$directory" ]; then mkdir "$directory"; mount --rbind "/$directory" "$directory"; fi
            done
            mkdir dev proc
            mount --rbind /dev dev
            mount --rbind /proc proc
            cp "$1" openwork
            before=$(ls -A)
            HOME=/proc chroot . /openwork daemon start --data-dir / --json || echo "status $?"
            stat -c 'mode %a' .
            [ "$before" = "$(ls -A)" ]
        "#;
        let mut unshare = Command::new("unshare");
        let (root, program) = (host.project("root"), host.binary());
        let output = unshare.args(["--mount", "sh", "-c", script]).arg(root).arg(program).output().expect("unshare");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains("permission_denied"), "{text} {:?}", output.stderr);
        assert!(text.ends_with("status 1\nmode 755\n"), "{text}");
    }

    #[test]
    #[ignore = "needs root, to make a directory of another user"]
    fn root_does_not_use_the_directory_of_another_user() {
        let host = Host::new();
        fs::create_dir(host.data()).unwrap();
        chown(host.data(), Some(NOBODY), Some(NOBODY)).unwrap();
        host.openwork(["daemon", "start"]).fails(1, "permission_denied");
        assert_eq!(fs::read_dir(host.data()).unwrap().count(), 0);
    }
}

#[test]
fn shared_directory_is_refused_untouched() {
    let host = Host::unprivileged();
    let shared = host.project("shared");
    for (directory, before) in [(host.home(), 0o750), (shared, 0o1777)] {
        fs::set_permissions(&directory, fs::Permissions::from_mode(before)).unwrap();
        for command in [&["daemon", "start"][..], &["workspace", "add", "/tmp"], &["state", "repair"]] {
            let option = ["--data-dir", directory.to_str().unwrap()];
            host.openwork(command.iter().chain(&option)).fails(1, "permission_denied");
        }
        assert_eq!((mode(&directory), fs::read_dir(&directory).unwrap().count()), (before, 0));
    }
    host.openwork(["daemon", "start", "--data-dir", "/"]).fails(1, "permission_denied");
}

#[test]
fn directory_that_cannot_be_created_is_an_error() {
    let host = Host::unprivileged();
    let locked = host.project("locked");
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    let data = locked.join("data");
    let data = data.to_str().unwrap();
    host.openwork(["daemon", "start", "--data-dir", data]).fails(1, "permission_denied");
    host.openwork(["workspace", "add", "/tmp", "--data-dir", data]).fails(1, "permission_denied");
    // A file in place of the directory, or of a parent.
    fs::write(host.path("file"), "").unwrap();
    for data in [host.path("file"), host.path("file/below")] {
        let output = host.openwork(["daemon", "start", "--data-dir", data.to_str().unwrap()]).exits(1);
        assert!(output.stderr.contains(data.to_str().unwrap()), "{output:?}");
    }
}

#[test]
fn data_directory_follows_option_variable_and_home() {
    let mut host = Host::new();
    let made_by = |host: &mut Host, args: &[&str], place: &str| {
        let place = host.path(place);
        host.data_is(place);
        host.openwork(["daemon", "start"].iter().chain(args)).ok();
        assert!(host.lock_text().is_some(), "{:?}", host.data());
        host.openwork(["daemon", "stop"].iter().chain(args)).ok();
    };
    made_by(&mut host, &[], "data");
    made_by(&mut host, &["--data-dir", "relative"], "relative");
    host.unset("OPENWORK_DATA_DIR");
    made_by(&mut host, &[], "home/.local/share/openwork");
    host.set("XDG_DATA_HOME", host.path("xdg"));
    made_by(&mut host, &[], "xdg/openwork");
    // A relative XDG_DATA_HOME is ignored.
    fs::remove_dir_all(host.home().join(".local")).unwrap();
    host.set("XDG_DATA_HOME", "xdg");
    made_by(&mut host, &[], "home/.local/share/openwork");
    // OpenWork's own app would stop a daemon that it finds there.
    assert!(!host.home().join(".openwork").exists());
}

// --- Links ---

/// What there may be in a data directory that another user could have planted.
const ENTRIES: [&str; 9] = [
    STATE,
    AUTH,
    "daemon.lock",
    "start.lock",
    "opencode.lock",
    "control.sock",
    "daemon.log",
    "opencode.log",
    "opencode",
];

#[test]
fn planted_symlink_is_not_followed() {
    for name in ENTRIES {
        for dangling in [false, true] {
            let host = Host::new();
            fs::create_dir(host.data()).unwrap();
            let victim = host.path("victim");
            if !dangling {
                fs::write(&victim, "precious").unwrap();
                fs::set_permissions(&victim, fs::Permissions::from_mode(0o640)).unwrap();
            }
            symlink(&victim, host.file(name)).unwrap();
            // openwork may fail or replace the link, but must not touch the target.
            host.openwork(["daemon", "start"]).output();
            host.openwork(["workspace", "add", "/tmp"]).output();
            host.openwork(["daemon", "stop"]).output();
            match dangling {
                true => assert!(!victim.exists(), "{name}"),
                false => {
                    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious", "{name}");
                    assert_eq!(mode(&victim), 0o640, "{name}");
                }
            }
        }
    }
}

#[test]
fn files_are_not_read_through_a_symlink() {
    let host = Host::new();
    let elsewhere = host.path("elsewhere.json");
    fs::write(&elsewhere, json!({"version": 1, "workspaces": []}).to_string()).unwrap();
    fs::create_dir(host.data()).unwrap();
    symlink(&elsewhere, host.file(STATE)).unwrap();
    host.openwork(["workspace", "list"]).fails(1, "state_corrupt");
    host.openwork(["daemon", "start"]).fails(1, "state_corrupt");
}

#[test]
fn planted_fifo_blocks_no_command() {
    for name in ENTRIES {
        let host = Host::new();
        fs::create_dir(host.data()).unwrap();
        let fifo = host.file(name);
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        for command in [&["daemon", "start"][..], &["workspace", "list"], &["state", "repair"], &["logs"]] {
            host.openwork(command).output();
        }
        // No open blocks on the FIFO: it is refused or replaced.
        let is_there = fs::symlink_metadata(&fifo).is_ok_and(|metadata| metadata.file_type().is_fifo());
        let is_refused = !host.openwork(["daemon", "start"]).output().status.success();
        assert!(is_refused || !is_there || name.ends_with("log"), "{name}");
        host.openwork(["daemon", "stop"]).output();
        wait_for("everything to end", || host.processes().is_empty());
        // The harness reads these files.
        let _ = fs::remove_file(&fifo);
    }
}
