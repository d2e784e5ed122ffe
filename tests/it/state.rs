//! The data directory: files whole whatever happens, refused when they cannot be understood,
//! private, and never reached through somebody else's links.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::{Value, json};

use crate::support::{AUTH, FILES, Host, STATE, Signal, kill, wait_for, wait_gone};

fn litter(host: &Host) -> Vec<String> {
    let names = fs::read_dir(host.data()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !FILES.contains(&name.as_str()) && name != "opencode").collect()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

// --- Files that cannot be understood ---

/// Every command that reads the state refuses it, and leaves it as it is.
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
    // For people it is read in another way.
    let list = host.openwork(["workspace", "list"]).exits(1);
    assert!(list.stdout.is_empty() && list.stderr.contains(host.file(STATE).to_str().unwrap()), "{list:?}");
    assert_eq!(fs::read(host.file(STATE)).unwrap(), content);
    assert_eq!(litter(&host), [""; 0]);
    wait_for("those that were refused to end", || host.processes().is_empty());
}

#[test]
fn what_is_not_json_is_refused_untouched() {
    for content in
        [&b""[..], b"\n", b"{", b"\x00\x00\x00", b"not json", b"{}{}", b"{\"version\": 1, \"workspaces\": [\xff]}"]
    {
        check_refused(content, "state_corrupt");
    }
}

#[test]
fn a_truncated_file_is_refused_untouched() {
    let whole = json!({"version": 1, "activeId": "ws-a", "workspaces": [{"id": "ws-a", "name": "a", "path": "/a"}]});
    let whole = whole.to_string();
    for length in [1, whole.len() / 2, whole.len() - 1] {
        check_refused(&whole.as_bytes()[..length], "state_corrupt");
    }
}

#[test]
fn what_has_another_shape_is_refused_untouched() {
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
        json!({"version": 1, "workspaces": [{"id": "ws-a", "name": "a", "path": "/p", "workspaceType": "distant"}]}),
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
fn a_newer_version_is_refused_untouched() {
    for version in [2, 1_000_000] {
        let content = json!({"version": version, "workspaces": [], "shape": "of the future"});
        check_refused(content.to_string().as_bytes(), "state_too_new");
    }
}

#[test]
fn a_directory_in_its_place_is_refused_untouched() {
    let host = Host::new();
    host.exercises(["code state_corrupt"]);
    fs::create_dir_all(host.file(STATE).join("something")).unwrap();
    host.openwork(["workspace", "list"]).fails(1, "state_corrupt");
    host.openwork(["workspace", "add", "/"]).fails(1, "state_corrupt");
    assert!(host.file(STATE).join("something").is_dir());
}

#[test]
fn what_is_said_not_to_be_changed_is_not() {
    let host = Host::unprivileged();
    host.exercises(["code state_write_failed"]);
    host.add(host.project("a"));
    let before = fs::read(host.file(STATE)).unwrap();
    // Files can be replaced there, and that cannot be made durable.
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o300)).unwrap();
    let failed = host.http("PATCH", "/workspaces/a").json(json!({"name": "b"})).send();
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o700)).unwrap();
    failed.refused(500, "state_write_failed");
    assert_eq!(fs::read(host.file(STATE)).unwrap(), before);
    assert_eq!(host.names(), ["a"]);
}

#[test]
fn fields_of_other_programs_survive_at_every_level() {
    let host = Host::new();
    host.exercises(["command workspace switch"]);
    let opencode = host.get("OPENWORK_OPENCODE_BIN").to_owned();
    // Each with all its digits.
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
fn a_link_in_its_place_is_not_repaired_away() {
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
fn a_password_file_that_is_none_is_refused_untouched() {
    for content in ["", "{}", "not json", r#"{"opencodeUsername": "opencode", "opencodePassword": ""}"#] {
        let host = Host::new();
        host.write_state(json!({"version": 1, "workspaces": []}).to_string());
        fs::write(host.file(AUTH), content).unwrap();
        let error = host.openwork(["daemon", "start"]).fails(1, "state_corrupt");
        assert!(!error["hint"].as_str().unwrap().contains("state repair"), "{error}");
        assert_eq!(fs::read_to_string(host.file(AUTH)).unwrap(), content);
    }
}

// --- Repair ---

/// The originals that a repair has kept.
fn kept(host: &Host) -> Vec<PathBuf> {
    let names = litter(host).into_iter().filter(|name| name.starts_with(&format!("{STATE}.corrupt-")));
    names.map(|name| host.file(&name)).collect()
}

#[test]
fn a_repair_saves_what_can_be_read() {
    let host = Host::new();
    let (a, b) = (host.project("a"), host.project("b"));
    let (ids, remote) = ([host.add(&a), host.add(&b)], "https://h.example");
    host.openwork(["workspace", "add-remote", remote]).ok();
    host.openwork(["workspace", "switch", "b"]).ok();
    host.openwork(["daemon", "stop"]).ok();
    let whole = fs::read_to_string(host.file(STATE)).unwrap();
    let last = whole.find(remote).unwrap();
    // Cut off in the middle of the last entry.
    fs::write(host.file(STATE), &whole[..last]).unwrap();

    let report = host.openwork(["state", "repair"]).json();
    assert_eq!(report["repaired"], true);
    let saved: Vec<&Value> = report["workspaces"].as_array().unwrap().iter().map(|entry| &entry["id"]).collect();
    assert_eq!(saved, [&ids[0], &ids[1]]);
    assert_eq!((host.names(), host.state()["activeId"].as_str()), (vec!["a".into(), "b".into()], Some(&*ids[1])));
    let kept = kept(&host);
    assert_eq!(report["original"], kept[0].to_str().unwrap());
    assert_eq!(fs::read_to_string(&kept[0]).unwrap(), whole[..last]);
    assert_eq!((kept.len(), mode(&host.file(STATE))), (1, 0o600));

    host.openwork(["workspace", "path", "b"]).ok();
    host.add(host.project("c"));
}

#[test]
fn a_repair_of_what_has_nothing_begins_anew() {
    for content in ["", "garbage", "[]"] {
        let host = Host::new();
        host.write_state(content);
        let output = host.openwork(["state", "repair"]).ok();
        assert!(output.stdout.contains(kept(&host)[0].to_str().unwrap()), "{output:?}");
        assert_eq!(fs::read_to_string(&kept(&host)[0]).unwrap(), content);
        host.add(host.project("p"));
    }
    // A directory too is out of the way.
    let host = Host::new();
    fs::create_dir_all(host.file(STATE).join("something")).unwrap();
    host.openwork(["state", "repair"]).ok();
    assert!(kept(&host)[0].join("something").is_dir());
    host.add(host.project("p"));
}

#[test]
fn what_needs_no_repair_is_left_alone() {
    let host = Host::new();
    host.exercises(["code state_too_new", "command state repair"]);
    assert_eq!(host.openwork(["state", "repair"]).json()["repaired"], false);
    host.add(host.project("p"));
    // One that is being used is whole, and its daemon's.
    host.openwork(["state", "repair"]).exits(1);
    host.openwork(["daemon", "stop"]).ok();
    let before = fs::read(host.file(STATE)).unwrap();
    assert_eq!(host.openwork(["state", "repair"]).json()["repaired"], false);
    assert_eq!((fs::read(host.file(STATE)).unwrap(), kept(&host)), (before, vec![]));

    // One of the future is not broken.
    let newer = json!({"version": 2, "workspaces": {}}).to_string();
    fs::write(host.file(STATE), &newer).unwrap();
    host.openwork(["state", "repair"]).fails(1, "state_too_new");
    assert_eq!(fs::read_to_string(host.file(STATE)).unwrap(), newer);
}

// --- Writing ---

#[test]
fn the_file_is_whole_at_every_moment() {
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
fn what_was_acknowledged_survives_a_kill() {
    let host = Host::new();
    // More than there is time for.
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
            // Each round dies at another point of the writing.
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
fn a_change_that_cannot_be_written_is_none() {
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
        // opencode has the umask of the shell.
        let pid = &host.starts()[0]["pid"];
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains(&format!("Umask:\t{umask:04o}")), "{status}");
    }
}

/// Under umask 777 a directory is useless to its owner, unless it gets a mode of its own.
#[test]
fn every_directory_that_is_made_can_be_used() {
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
fn a_directory_of_ours_is_narrowed() {
    let host = Host::new();
    fs::create_dir(host.data()).unwrap();
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o755)).unwrap();
    host.add(host.project("p"));
    assert_eq!(mode(&host.data()), 0o700);
}

#[test]
fn a_directory_of_another_is_refused() {
    let host = Host::unprivileged();
    host.exercises(["code permission_denied", "option --data-dir"]);
    host.openwork(["daemon", "start", "--data-dir", "/usr"]).fails(1, "permission_denied");
    for args in [&["workspace", "add", "/"][..], &["workspace", "list"], &["status"], &["logs"], &["daemon", "stop"]] {
        let error = host.openwork([args, &["--data-dir", "/usr"]].concat()).fails(1, "permission_denied");
        assert!(error["message"].as_str().unwrap().contains("another user"), "{error}");
    }
}

/// What takes two users: root, and an account without rights.
mod as_root {
    use std::os::unix::fs::chown;

    use super::*;
    use crate::support::NOBODY;

    #[test]
    #[ignore = "needs root, to make a directory of another user"]
    fn a_directory_of_another_is_refused_whatever_its_mode() {
        let host = Host::unprivileged();
        fs::create_dir(host.data()).unwrap();
        fs::set_permissions(host.data(), fs::Permissions::from_mode(0o777)).unwrap();
        host.openwork(["daemon", "start"]).fails(1, "permission_denied");
        host.openwork(["workspace", "add", "/"]).fails(1, "permission_denied");
        assert_eq!(fs::read_dir(host.data()).unwrap().count(), 0);
        assert_eq!(mode(&host.data()), 0o777);
    }

    /// sudo, which keeps HOME.
    #[test]
    #[ignore = "needs root, to make a directory of another user"]
    fn root_makes_nothing_in_the_home_of_another() {
        let mut host = Host::new();
        host.unset("OPENWORK_DATA_DIR");
        chown(host.home(), Some(NOBODY), Some(NOBODY)).unwrap();
        for args in [&["daemon", "start"][..], &["daemon"], &["workspace", "add", "/"], &["state", "repair"]] {
            host.openwork(args).fails(1, "permission_denied");
        }
        host.openwork(["workspace", "list"]).ok();
        assert_eq!(fs::read_dir(host.home()).unwrap().count(), 0);
    }

    #[test]
    #[ignore = "needs root, to make a directory of another user"]
    fn root_is_refused_too_lest_it_hand_its_daemon_to_the_owner() {
        let host = Host::new();
        fs::create_dir(host.data()).unwrap();
        chown(host.data(), Some(NOBODY), Some(NOBODY)).unwrap();
        host.openwork(["daemon", "start"]).fails(1, "permission_denied");
        assert_eq!(fs::read_dir(host.data()).unwrap().count(), 0);
    }
}

#[test]
fn a_directory_that_cannot_be_made_is_an_error() {
    let host = Host::unprivileged();
    let locked = host.project("locked");
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    let data = locked.join("data");
    let data = data.to_str().unwrap();
    host.openwork(["daemon", "start", "--data-dir", data]).fails(1, "permission_denied");
    host.openwork(["workspace", "add", "/", "--data-dir", data]).fails(1, "permission_denied");
    // A file in its place, or on the way to it.
    fs::write(host.path("file"), "").unwrap();
    for data in [host.path("file"), host.path("file/below")] {
        let output = host.openwork(["daemon", "start", "--data-dir", data.to_str().unwrap()]).exits(1);
        assert!(output.stderr.contains(data.to_str().unwrap()), "{output:?}");
    }
}

#[test]
fn its_place_follows_option_variable_and_home() {
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
    // One that is relative is to be ignored.
    fs::remove_dir_all(host.home().join(".local")).unwrap();
    host.set("XDG_DATA_HOME", "xdg");
    made_by(&mut host, &[], "home/.local/share/openwork");
    // OpenWork's own program would stop the daemon there.
    assert!(!host.home().join(".openwork").exists());
}

// --- Links ---

#[test]
fn a_planted_link_is_not_followed() {
    for name in [STATE, AUTH, "daemon.lock", "start.lock", "control.sock", "daemon.log", "opencode.log", "opencode"] {
        for dangling in [false, true] {
            let host = Host::new();
            fs::create_dir(host.data()).unwrap();
            let victim = host.path("victim");
            if !dangling {
                fs::write(&victim, "precious").unwrap();
                fs::set_permissions(&victim, fs::Permissions::from_mode(0o640)).unwrap();
            }
            symlink(&victim, host.file(name)).unwrap();
            // It may be an error or the link may be replaced; the other end is not touched.
            host.openwork(["daemon", "start"]).output();
            host.openwork(["workspace", "add", "/"]).output();
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
fn what_is_read_is_not_read_through_a_link() {
    let host = Host::new();
    let elsewhere = host.path("elsewhere.json");
    fs::write(&elsewhere, json!({"version": 1, "workspaces": []}).to_string()).unwrap();
    fs::create_dir(host.data()).unwrap();
    symlink(&elsewhere, host.file(STATE)).unwrap();
    host.openwork(["workspace", "list"]).fails(1, "state_corrupt");
    host.openwork(["daemon", "start"]).fails(1, "state_corrupt");
}
