//! The registry: adding, naming, listing, moving and removing workspaces.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{Host, wait_for};

/// The id for a path or URL, computed with an independent SHA-1.
fn id_of(text: &str) -> String {
    let script = r#"printf %s "$1" | sha1sum"#;
    let output = Command::new("sh").args(["-c", script, "sh", text]).output().expect("running sha1sum");
    format!("ws-{}", std::str::from_utf8(&output.stdout[..12]).unwrap())
}

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

// --- Adding directories ---

#[test]
fn add_derives_the_id_from_the_path() {
    let host = Host::new();
    host.exercises(["command workspace add"]);
    let project = host.project("openwork");
    let added = host.openwork(["workspace", "add", utf8(&project)]).json();
    let workspace = &added["workspace"];
    assert_eq!(workspace["id"], id_of(utf8(&project)));
    assert_eq!(workspace["name"], "openwork");
    assert_eq!(workspace["path"], utf8(&project));
    assert_eq!(workspace["workspaceType"], "local");
    assert!(workspace["createdAt"].as_u64().unwrap() > 1_700_000_000_000);
    assert_eq!(added["created"], true);
    // The first workspace becomes active.
    assert_eq!(added["activeId"], workspace["id"]);

    let state = host.state();
    assert_eq!(state["version"], 1);
    assert_eq!(state["activeId"], workspace["id"]);
    assert_eq!(state["workspaces"], json!([workspace]));
}

#[test]
fn second_workspace_does_not_become_active() {
    let host = Host::new();
    let first = host.add(host.project("a"));
    let added = host.openwork(["workspace", "add", utf8(&host.project("b"))]).json();
    assert_eq!(added["activeId"], first);
}

#[test]
fn directory_is_left_untouched() {
    let host = Host::new();
    let project = host.project("p");
    fs::write(project.join("file"), "content").unwrap();
    fs::set_permissions(&project, fs::Permissions::from_mode(0o750)).unwrap();
    let looks = || {
        let metadata = fs::metadata(&project).unwrap();
        let names: Vec<_> = fs::read_dir(&project).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        (names, metadata.mode(), metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec())
    };
    let before = looks();
    host.add(&project);
    host.openwork(["workspace", "path", "p"]).ok();
    host.openwork(["instance", "dispose", "p"]).ok();
    host.openwork(["workspace", "rename", "p", "q"]).ok();
    host.openwork(["workspace", "remove", "q"]).ok();
    assert_eq!(looks(), before);
}

#[test]
fn every_path_to_a_directory_is_the_same_workspace() {
    let host = Host::new();
    let project = host.project("dir/real");
    let id = host.add(&project);
    symlink(&project, host.path("link")).unwrap();
    symlink("link", host.path("chain")).unwrap();
    let parent = host.path("projects/dir");
    for (cwd, path) in [
        (host.home(), format!("{}/", project.display())),
        (host.home(), format!("{}/../dir/./real", parent.display())),
        (host.home(), utf8(&host.path("link")).to_owned()),
        (host.home(), utf8(&host.path("chain")).to_owned()),
        (parent.clone(), "real".to_owned()),
        (parent.clone(), "./real/".to_owned()),
        (project.clone(), ".".to_owned()),
        (project.join("../.."), "dir/real".to_owned()),
    ] {
        let added = host.openwork(["workspace", "add", &path]).cwd(&cwd).json();
        assert_eq!(added["workspace"]["id"], *id, "{path} in {}", cwd.display());
        assert_eq!((&added["created"], &added["workspace"]["path"]), (&json!(false), &json!(utf8(&project))));
    }
    assert_eq!(host.names(), ["real"]);
}

#[test]
fn tilde_expands_to_home() {
    let host = Host::new();
    fs::create_dir(host.home().join("code")).unwrap();
    let added = host.openwork(["workspace", "add", "~/code"]).json();
    assert_eq!(added["workspace"]["path"], utf8(&host.home().join("code")));
    let added = host.openwork(["workspace", "add", "~", "--force"]).json();
    assert_eq!(added["workspace"]["path"], utf8(&host.home()));
}

#[test]
fn paths_over_http_must_be_absolute() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let project = host.project("p");
    for path in ["p", "./p", "~", "~/p", "projects/p"] {
        host.http("POST", "/workspaces").json(json!({"path": path})).fails(400, "bad_request");
    }
    let add = || host.http("POST", "/workspaces").json(json!({"path": utf8(&project), "name": "over http"})).send();
    let reply = add();
    assert_eq!(reply.status, 201);
    assert_eq!(reply.json()["created"], true);
    let reply = add();
    assert_eq!(reply.status, 200);
    assert_eq!((&reply.json()["created"], &reply.json()["ok"]), (&json!(false), &json!(true)));
    assert_eq!(host.names(), ["over http"]);
}

#[test]
fn paths_that_are_no_directory_are_refused() {
    let host = Host::new();
    host.exercises(["code path_not_directory", "code path_not_found"]);
    host.add(host.project("p"));
    let before = host.state()["workspaces"].clone();
    let (missing, file) = (host.path("does/not/exist"), host.path("file"));
    fs::write(&file, "").unwrap();

    let error = host.openwork(["workspace", "add", utf8(&missing)]).fails(1, "path_not_found");
    assert!(error["message"].as_str().unwrap().contains(utf8(&missing)), "{error}");
    assert!(!host.path("does").exists());
    host.openwork(["workspace", "add", utf8(&file)]).fails(1, "path_not_directory");
    host.openwork(["workspace", "add", utf8(&file.join("below"))]).fails(1, "path_not_directory");

    let post = |path: &str| host.http("POST", "/workspaces").json(json!({"path": path}));
    post(utf8(&missing)).fails(404, "path_not_found");
    post(utf8(&file)).fails(400, "path_not_directory");
    post("/nul\0").fails(400, "path_not_utf8");
    post("").fails(404, "path_not_found");
    // A link that leads to itself, and a name that no file can have.
    let circle = host.path("circle");
    std::os::unix::fs::symlink(&circle, &circle).unwrap();
    for path in [utf8(&circle).to_owned(), format!("/{}", "long".repeat(100))] {
        let error = post(&path).fails(400, "bad_request");
        assert!(error["message"].as_str().unwrap().contains("cannot resolve"), "{error}");
    }
    assert_eq!(host.state()["workspaces"], before);
}

#[test]
fn non_utf8_path_is_refused() {
    let host = Host::new();
    host.exercises(["code path_not_utf8"]);
    let project = host.project(OsStr::from_bytes(b"caf\xe9"));
    let add = host.openwork([OsStr::new("workspace"), OsStr::new("add"), project.as_os_str()]);
    add.fails(1, "path_not_utf8");
    // A UTF-8 link to such a directory is refused as well.
    symlink(&project, host.path("link")).unwrap();
    host.openwork(["workspace", "add", utf8(&host.path("link"))]).fails(1, "path_not_utf8");
    assert_eq!(host.names(), [""; 0]);
}

#[test]
fn inaccessible_path_is_refused() {
    let host = Host::unprivileged();
    let project = host.project("locked/p");
    let locked = host.path("projects/locked");
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o000)).unwrap();
    host.openwork(["workspace", "add", utf8(&project)]).fails(1, "permission_denied");
    host.http("POST", "/workspaces").json(json!({"path": utf8(&project)})).fails(403, "permission_denied");
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o755)).unwrap();
    host.add(&project);
}

#[test]
fn unusual_directory_names_work() {
    let host = Host::new();
    for name in
        ["with space", "ünïcödé", "'quote\"", "new\nline", "%2F", "per%cent", "ws-0123456789ab", "-dash", ".dot"]
    {
        let project = host.project(name);
        let id = host.add(&project);
        assert_eq!(id, id_of(utf8(&project)), "{name}");
        // OpenCode gets exactly the same string.
        assert_eq!(host.openwork(["workspace", "path", &id]).json()["path"]["directory"], utf8(&project));
    }
    host.openwork(["workspace", "add", "/", "--force"]).ok();
}

// --- Names ---

#[test]
fn taken_derived_name_gets_a_number() {
    let host = Host::new();
    host.exercises(["command workspace remove"]);
    for dir in ["a/same", "b/same", "c/same"] {
        host.add(host.project(dir));
    }
    host.openwork(["workspace", "remove", "same-2"]).ok();
    host.add(host.project("d/same"));
    assert_eq!(host.names(), ["same", "same-3", "same-2"]);
}

#[test]
fn derived_names_are_valid() {
    let host = Host::new();
    host.exercises(["command workspace info"]);
    let longest = "x".repeat(200);
    for dir in ["-x", ".hidden", "~tilde", "@at", "a\u{202e}b", "tab\tnew\nline", "ws-0123456789ab", "...", &longest] {
        let id = host.add(host.project(dir));
        let name = host.openwork(["workspace", "info", &id]).json()["workspace"]["name"].clone();
        let name = name.as_str().unwrap();
        assert!((1..=100).contains(&name.chars().count()), "{name:?}");
        assert!(!name.starts_with(['-', '.', '~', '@']), "{name:?}");
        assert!(!name.contains(|c: char| c.is_control() || c == '\u{202e}'), "{name:?}");
        assert_ne!(name, dir);
        // The name selects exactly this workspace.
        assert_eq!(host.openwork(["workspace", "info", name]).json()["workspace"]["id"], *id);
    }
}

#[test]
fn given_name_is_kept_unchanged() {
    let host = Host::new();
    let longest = "é".repeat(100);
    for (n, name) in ["My Project", "日本語", "a.b-c~d@e", "ws-x", &longest].into_iter().enumerate() {
        let project = host.project(n.to_string());
        host.openwork(["workspace", "add", utf8(&project), "--name", name]).ok();
        assert_eq!(host.openwork(["workspace", "info", name]).json()["workspace"]["name"], name);
    }
}

#[test]
fn invalid_names_are_refused() {
    let host = Host::new();
    let (project, other) = (host.project("p"), host.project("other"));
    host.add(&other);
    let too_long = "x".repeat(101);
    let bad =
        ["", "a/b", "-x", ".x", "~x", "@x", "ws-0123456789ab", "a\nb", "a\u{7f}", "a\u{202e}b", "\u{2066}", &too_long];
    for name in bad {
        let option = format!("--name={name}");
        host.openwork(["workspace", "add", utf8(&project), &option]).fails(1, "invalid_name");
        host.openwork(["workspace", "rename", "other", "--", name]).fails(1, "invalid_name");
        let add = host.http("POST", "/workspaces").json(json!({"path": utf8(&project), "name": name}));
        add.fails(400, "invalid_name");
        host.http("PATCH", "/workspaces/other").json(json!({"name": name})).fails(400, "invalid_name");
    }
    assert_eq!(host.names(), ["other"]);
}

#[test]
fn taken_names_are_refused() {
    let host = Host::new();
    host.exercises(["code name_taken"]);
    host.add(host.project("a"));
    host.add(host.project("b"));
    let before = host.state()["workspaces"].clone();
    let third = host.project("c");
    host.openwork(["workspace", "add", utf8(&third), "--name", "a"]).fails(1, "name_taken");
    host.openwork(["workspace", "add", utf8(&host.project("b")), "--name", "a"]).fails(1, "name_taken");
    host.openwork(["workspace", "add-remote", "http://h", "--name", "a"]).fails(1, "name_taken");
    host.openwork(["workspace", "rename", "b", "a"]).fails(1, "name_taken");
    host.http("PATCH", "/workspaces/b").json(json!({"name": "a"})).fails(409, "name_taken");
    assert_eq!(host.state()["workspaces"], before);
}

#[test]
fn adding_again_changes_only_a_given_name() {
    let host = Host::new();
    let project = host.project("p");
    host.openwork(["workspace", "add", utf8(&project), "--name", "mine"]).ok();
    let again = host.openwork(["workspace", "add", utf8(&project)]).json();
    assert_eq!((&again["created"], &again["workspace"]["name"]), (&json!(false), &json!("mine")));
    let again = host.openwork(["workspace", "add", utf8(&project), "--name", "yours"]).json();
    assert_eq!((&again["created"], &again["workspace"]["name"]), (&json!(false), &json!("yours")));
    assert_eq!(host.names(), ["yours"]);
}

#[test]
fn renaming_keeps_everything_else() {
    let host = Host::new();
    host.exercises(["command workspace rename"]);
    let id = host.add(host.project("p"));
    let before = host.state()["workspaces"][0].clone();
    let renamed = host.openwork(["workspace", "rename", "p", "new name"]).json();
    assert_eq!(renamed["workspace"]["name"], "new name");
    assert_eq!(renamed["activeId"], *id);
    let mut after = host.state()["workspaces"][0].clone();
    assert_eq!(after["name"], "new name");
    after["name"] = "p".into();
    assert_eq!(after, before);
    // Renaming to the current name is no conflict.
    host.openwork(["workspace", "rename", "new name", "new name"]).ok();
    let renamed = host.http("PATCH", &format!("/workspaces/{id}")).json(json!({"name": "over http"})).ok();
    assert_eq!(renamed["workspace"]["name"], "over http");
}

// --- Remotes ---

#[test]
fn remote_urls_are_normalised() {
    let host = Host::new();
    host.exercises(["command workspace add-remote"]);
    for (given, stored, name) in [
        ("HTTPS://Example.COM:443/", "https://example.com", "example.com"),
        ("http://example.com:80/Path/", "http://example.com/Path", "example.com-2"),
        ("https://example.com:8443/a/b", "https://example.com:8443/a/b", "example.com-3"),
        ("http://127.0.0.1:4096", "http://127.0.0.1:4096", "127.0.0.1"),
    ] {
        let added = host.openwork(["workspace", "add-remote", given]).json();
        let workspace = &added["workspace"];
        assert_eq!((&workspace["baseUrl"], &workspace["name"]), (&json!(stored), &json!(name)));
        assert_eq!(workspace["id"], id_of(stored));
        assert_eq!((&workspace["workspaceType"], &workspace["path"]), (&json!("remote"), &json!("")));
        assert_eq!(host.openwork(["workspace", "add-remote", stored]).json()["created"], false);
    }
}

#[test]
fn remote_directory_makes_a_separate_workspace() {
    let host = Host::new();
    host.exercises(["option --directory", "route POST /workspaces/remote"]);
    let add = |directory: &str| {
        let args = ["workspace", "add-remote", "https://h.example", "--directory", directory];
        host.openwork(args).json()["workspace"].clone()
    };
    assert_eq!(add("/srv/a")["id"], id_of("https://h.example::/srv/a"));
    assert_eq!(add("/srv/b")["id"], id_of("https://h.example::/srv/b"));
    let plain = host.http("POST", "/workspaces/remote").json(json!({"baseUrl": "https://h.example"})).ok();
    assert_eq!(plain["workspace"]["id"], id_of("https://h.example"));
    assert_eq!(plain["created"], true);
    let again = json!({"baseUrl": "https://h.example/", "directory": "/srv/a", "name": "there"});
    let reply = host.http("POST", "/workspaces/remote").json(again).send();
    assert_eq!((reply.status, &reply.json()["workspace"]["directory"]), (200, &json!("/srv/a")));
    assert_eq!(host.names(), ["there", "h.example-2", "h.example-3"]);
}

#[test]
fn invalid_urls_are_refused() {
    let host = Host::new();
    host.exercises(["code invalid_url"]);
    for url in [
        "",
        "example.com",
        "/path",
        "ftp://h",
        "file:///etc",
        "http://",
        "http:///path",
        "http://u:p@h",
        "http://u@h",
        "http://h?q=1",
        "http://h#f",
        "http://h:0",
        "http://h:65536",
        "http://h:x",
        "http://h h",
        "http://h/a b",
        "http://[::1",
        "javascript:alert(1)",
        "http://h\n",
    ] {
        host.openwork(["workspace", "add-remote", url]).fails(1, "invalid_url");
        host.http("POST", "/workspaces/remote").json(json!({"baseUrl": url})).fails(400, "invalid_url");
    }
    let with_bell = json!({"baseUrl": "http://h", "directory": "/srv\u{7}"});
    host.http("POST", "/workspaces/remote").json(with_bell).fails(400, "bad_request");
    assert_eq!(host.names(), [""; 0]);
}

#[test]
fn remote_workspace_has_no_instance() {
    let host = Host::new();
    host.openwork(["workspace", "add-remote", "http://h.example"]).ok();
    host.openwork(["workspace", "path", "h.example"]).fails(1, "workspace_is_remote");
    host.openwork(["instance", "dispose", "h.example"]).fails(1, "workspace_is_remote");
    host.http("GET", "/workspaces/h.example/path").fails(409, "workspace_is_remote");
    host.http("POST", "/instances/h.example/dispose").json(json!({})).fails(409, "workspace_is_remote");
    // All other commands treat it like any workspace.
    host.openwork(["workspace", "switch", "h.example"]).ok();
    host.openwork(["workspace", "rename", "h.example", "there"]).ok();
    host.openwork(["workspace", "remove", "there"]).ok();
}

// --- Listing, switching, removing ---

#[test]
fn list_marks_the_active_workspace() {
    let host = Host::new();
    host.exercises(["option -q"]);
    let (a, b) = (host.add(host.project("a")), host.add(host.project("b")));
    host.openwork(["workspace", "switch", "b"]).ok();
    let list = host.openwork(["workspace", "list"]).ok();
    let marked: Vec<&str> = list.stdout.lines().filter(|line| line.contains('*')).collect();
    assert!(matches!(marked[..], [line] if line.contains('b') && line.contains(utf8(&host.project("b")))), "{list:?}");
    assert_eq!(host.openwork(["workspace", "list", "-q"]).ok().stdout, format!("{a}\n{b}\n"));
    assert_eq!(host.openwork(["ws", "ls", "-q"]).ok().stdout, format!("{a}\n{b}\n"));

    let json = host.openwork(["workspace", "list"]).json();
    assert_eq!((&json["ok"], &json["activeId"]), (&json!(true), &json!(b)));
    let over_http = host.http("GET", "/workspaces").ok();
    assert_eq!(over_http, json);
}

#[test]
fn current_follows_switch() {
    let host = Host::new();
    host.exercises(["route POST /workspaces/:id/activate"]);
    let (alpha, beta) = (host.add(host.project("alpha")), host.add(host.project("beta")));
    let switched = host.openwork(["workspace", "switch", "beta"]).json();
    assert_eq!((&switched["activeId"], &switched["workspace"]["id"]), (&json!(beta), &json!(beta)));
    assert_eq!(host.openwork(["workspace", "current"]).json()["workspace"]["id"], *beta);
    let current = host.openwork(["workspace", "current"]).ok().stdout;
    assert!(current.contains("beta") && !current.contains("alpha"), "{current}");
    assert_eq!((&host.state()["activeId"], &host.state()["previousId"]), (&json!(beta), &json!(alpha)));

    let switched = host.http("POST", &format!("/workspaces/{alpha}/activate")).ok();
    assert_eq!((&switched["activeId"], &switched["workspace"]["id"]), (&json!(alpha), &json!(alpha)));
    assert_eq!(host.health()["activeId"], *alpha);
    assert_eq!(host.health()["workspaceCount"], 2);
}

#[test]
fn info_shows_the_entry() {
    let host = Host::new();
    host.exercises(["route GET /workspaces/:id"]);
    let project = host.project("p");
    let id = host.add(&project);
    let info = host.openwork(["workspace", "info", "p"]).json();
    assert_eq!(info["workspace"], host.state()["workspaces"][0]);
    assert_eq!(info, host.http("GET", &format!("/workspaces/{id}")).ok());
    let text = host.openwork(["workspace", "info", "p"]).ok().stdout;
    assert!(text.contains(&id) && text.contains(utf8(&project)), "{text}");
}

#[test]
fn removing_the_active_workspace_leaves_none_active() {
    let host = Host::new();
    host.exercises(["route DELETE /workspaces/:id"]);
    let a = host.add(host.project("a"));
    host.add(host.project("b"));
    let removed = host.openwork(["workspace", "remove", "a"]).json();
    assert_eq!((&removed["activeId"], &removed["workspace"]["id"]), (&json!(""), &json!(a)));
    assert_eq!(host.state()["activeId"], "");
    host.openwork(["workspace", "current"]).fails(4, "no_active_workspace");
    host.openwork(["workspace", "path"]).fails(4, "no_active_workspace");
    assert!(host.project("a").exists());

    host.http("DELETE", "/workspaces/b").ok();
    assert_eq!(host.names(), [""; 0]);
    host.http("DELETE", "/workspaces/b").fails(404, "workspace_not_found");
    // In an empty registry the first workspace becomes active again.
    let first = host.add(host.project("c"));
    assert_eq!(host.health()["activeId"], *first);
}

#[test]
fn missing_directory_is_marked_and_not_used() {
    let host = Host::new();
    let project = host.project("gone");
    let id = host.add(&project);
    host.opencode_pid();
    fs::remove_dir(&project).unwrap();
    let list = host.openwork(["workspace", "list"]).json();
    assert_eq!(list["workspaces"][0]["missing"], true);
    assert!(host.openwork(["workspace", "list"]).ok().stdout.contains("missing"));

    host.openwork(["workspace", "path", "gone"]).fails(1, "path_not_found");
    host.http("GET", &format!("/workspaces/{id}/path")).fails(404, "path_not_found");
    assert_eq!(host.recorded("instances"), [""; 0]);

    // The workspace works again once the directory is back.
    host.project("gone");
    host.openwork(["workspace", "path", "gone"]).ok();
    assert_eq!(host.openwork(["workspace", "list"]).json()["workspaces"][0].get("missing"), None);
}

#[test]
fn use_updates_last_used_at() {
    let host = Host::new();
    host.add(host.project("p"));
    let used = || host.state()["workspaces"][0]["lastUsedAt"].as_u64().unwrap();
    let added = used();
    // Repeat until the clock has advanced.
    wait_for("a later use to be written", || {
        host.openwork(["workspace", "path", "p"]).ok();
        used() > added
    });
    let last = host.openwork(["workspace", "info", "p"]).json()["workspace"]["lastUsedAt"].as_u64().unwrap();
    host.openwork(["daemon", "stop"]).ok();
    assert!(used() >= last);
}

// --- Without a daemon, and foreign state files ---

#[test]
fn reading_needs_no_daemon() {
    let host = Host::new();
    assert_eq!(host.openwork(["workspace", "list"]).json()["workspaces"], json!([]));
    host.openwork(["workspace", "current"]).fails(4, "no_active_workspace");
    host.openwork(["workspace", "info", "p"]).fails(4, "workspace_not_found");
    assert!(!host.data().exists());

    let id = host.add(host.project("p"));
    let list = host.openwork(["workspace", "list"]).json();
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(host.openwork(["workspace", "list"]).json(), list);
    assert_eq!(host.openwork(["workspace", "current"]).json()["workspace"]["id"], *id);
    assert_eq!(host.openwork(["workspace", "info", &id]).json()["workspace"]["id"], *id);
    assert_eq!(host.processes(), [0; 0]);
}

/// A state file as OpenWork's own orchestrator or a later openwork might write it.
fn foreign_state(project: &Path) -> Value {
    json!({
        "version": 1,
        "daemon": null,
        "opencode": null,
        "cliVersion": "9.9.9",
        "binaries": {"opencode": null, "other": {"path": "/x", "nested": {"deep": [1, 2, {"er": null}]}}},
        "activeId": "ws-of-others",
        "future": {"list": [1, "two", 3.5, true], "big": 9_007_199_254_740_993_u64},
        "workspaces": [
            {"id": "ws-of-others", "name": "not/a valid name", "path": project, "workspaceType": "local",
             "createdAt": 1, "lastUsedAt": 2, "colour": "green", "options": {"a": {"b": "c"}}},
            {"id": "ws-elsewhere", "name": "elsewhere", "path": "", "workspaceType": "remote",
             "baseUrl": "HTTPS://As.Stored/?q", "directory": "", "createdAt": 3, "token": [null]},
        ],
    })
}

#[test]
fn unknown_fields_survive_at_every_level() {
    let host = Host::new();
    let foreign = foreign_state(&host.project("p"));
    host.write_state(foreign.to_string());
    host.add(host.project("new"));
    host.openwork(["workspace", "rename", "elsewhere", "renamed"]).ok();
    host.openwork(["workspace", "path", "ws-of-others"]).ok();
    host.openwork(["daemon", "stop"]).ok();

    let state = host.state();
    assert_eq!(state["future"], foreign["future"]);
    assert_eq!(state["binaries"]["other"], foreign["binaries"]["other"]);
    assert_eq!(state["binaries"]["opencode"]["actualVersion"], "1.18.33");
    for field in ["colour", "options", "name", "path", "createdAt"] {
        assert_eq!(state["workspaces"][0][field], foreign["workspaces"][0][field], "{field}");
    }
    for field in ["token", "baseUrl", "directory", "createdAt"] {
        assert_eq!(state["workspaces"][1][field], foreign["workspaces"][1][field], "{field}");
    }
    assert_eq!(state["workspaces"][1]["name"], "renamed");
}

#[test]
fn entries_are_read_as_stored() {
    let host = Host::new();
    host.write_state(foreign_state(&host.project("p")).to_string());
    let list = host.openwork(["workspace", "list"]).json();
    assert_eq!(list["activeId"], "ws-of-others");
    assert_eq!(host.openwork(["workspace", "info", "ws-of-others"]).json()["workspace"]["name"], "not/a valid name");
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.openwork(["workspace", "list"]).json(), list);
    assert_eq!(host.openwork(["workspace", "info", "ws-elsewhere"]).json()["workspace"]["colour"], Value::Null);
}

#[test]
fn body_must_be_an_object() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let path = host.project("p");
    host.http("POST", "/workspaces").json(json!([path])).fails(400, "bad_request");
    host.http("POST", "/workspaces").json(json!("p")).fails(400, "bad_request");
    assert_eq!(host.names(), [""; 0]);
}

// --- Moving ---

#[test]
fn move_updates_path_and_id() {
    let host = Host::new();
    host.exercises(["command workspace move", "route POST /workspaces/:id/move"]);
    let before = host.project("before");
    let (id, other) = (host.add(&before), host.add(host.project("other")));
    host.openwork(["workspace", "switch", "other"]).ok();
    host.openwork(["workspace", "switch", "before"]).ok();
    host.openwork(["workspace", "rename", "before", "mine"]).ok();
    let entry = |host: &Host| host.http("GET", "/workspaces/mine").ok()["workspace"].clone();
    let old = entry(&host);
    let mut events = host.http("GET", "/events").events();
    let after = host.path("projects/after");
    fs::rename(&before, &after).unwrap();

    let output = host.openwork(["workspace", "move", "mine", "projects/after"]).ok();
    let new = entry(&host);
    assert!(output.stdout.contains(after.to_str().unwrap()) && output.stdout.contains(new["id"].as_str().unwrap()));
    assert_eq!(new["path"], after.to_str().unwrap());
    assert_ne!(new["id"], id);
    for field in ["name", "createdAt", "lastUsedAt", "workspaceType"] {
        assert_eq!(new[field], old[field], "{field}");
    }
    // The id is derived from the new directory.
    assert_eq!(host.add(&after), new["id"]);
    assert_eq!(host.state()["activeId"], new["id"]);
    let removed = events.find(|event| event["type"] == "workspace.removed").unwrap();
    let added = events.find(|event| event["type"] == "workspace.added").unwrap();
    assert_eq!((&removed["workspace"]["id"], &added["workspace"]["id"]), (&json!(id), &new["id"]));
    assert_eq!((&removed["activeId"], &added["activeId"]), (&new["id"], &new["id"]));
    let path = host.openwork(["workspace", "path", "mine"]).ok();
    assert_eq!(path.stdout.trim_end(), after.to_str().unwrap());

    // The previous workspace keeps that role under its new id.
    host.openwork(["workspace", "switch", "other"]).ok();
    let third = host.project("third");
    let moved = host.http("POST", "/workspaces/mine/move").json(json!({"path": third})).ok();
    assert_eq!(host.state()["previousId"], moved["workspace"]["id"]);
    assert_eq!(moved["activeId"], other);
    host.openwork(["workspace", "switch", "-"]).ok();
    assert_eq!(host.state()["activeId"], moved["workspace"]["id"]);
    // Moving to the current directory changes nothing.
    let again = host.http("POST", "/workspaces/mine/move").json(json!({"path": third})).ok();
    assert_eq!(again["workspace"]["id"], moved["workspace"]["id"]);
    assert_eq!(host.names(), ["mine", "other"]);
}

#[test]
fn move_to_an_invalid_place_is_refused() {
    let host = Host::new();
    let ids = ["a", "b"].map(|name| host.add(host.project(name)));
    host.openwork(["workspace", "add-remote", "https://h.example", "--name", "far"]).ok();
    let b = host.project("b");
    let move_to = |selector: &str, path: &Path| {
        let target = format!("/workspaces/{selector}/move");
        host.http("POST", &target).json(json!({"path": path}))
    };
    let taken = move_to("a", &b).fails(400, "bad_request");
    assert!(taken["message"].as_str().unwrap().contains(&ids[1]), "{taken}");
    host.openwork(["workspace", "move", "a", b.to_str().unwrap()]).fails(1, "bad_request");
    move_to("far", &host.project("c")).fails(409, "workspace_is_remote");
    move_to("a", Path::new("relative")).fails(400, "bad_request");
    move_to("a", &host.path("nowhere")).fails(404, "path_not_found");
    move_to("none", &host.project("c")).fails(404, "workspace_not_found");
    // Changes of the registry take no abbreviation.
    move_to(&ids[0][..9], &host.project("c")).fails(404, "workspace_not_found");
    host.openwork(["workspace", "move", "a", ""]).fails(1, "path_not_found");
    assert_eq!(host.names(), ["a", "b", "far"]);
}

#[test]
fn numbered_name_keeps_the_length_limit() {
    let host = Host::new();
    let name = "é".repeat(120);
    for parent in ["x", "y"] {
        let dir = host.project(parent).join(&name);
        fs::create_dir(&dir).unwrap();
        host.add(&dir);
    }
    assert_eq!(host.names(), ["é".repeat(100), format!("{}-2", "é".repeat(98))]);
}
