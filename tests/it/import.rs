//! `workspace import`: workspaces of other programs.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::{Host, Run};

fn import<'h>(host: &'h Host, file: &Path) -> Run<'h> {
    host.openwork(["workspace".as_ref(), "import".as_ref(), file.as_os_str()])
}

fn write(host: &Host, value: &Value) -> PathBuf {
    let file = host.path("other.json");
    fs::write(&file, value.to_string()).unwrap();
    file
}

/// The outcome of each entry, with its name or error code.
fn outcomes(import: &Value) -> Vec<(&str, &str)> {
    let rows = import["workspaces"].as_array().unwrap().iter();
    rows.map(|row| {
        (row["outcome"].as_str().unwrap(), row["workspace"]["name"].as_str().or(row["error"]["code"].as_str()).unwrap())
    })
    .collect()
}

#[test]
fn state_file_of_another_orchestrator_is_imported() {
    let host = Host::new();
    host.exercises(["command workspace current"]);
    let (web, api) = (host.project("web"), host.project("api"));
    host.add(&api);
    let gone = host.path("projects/gone");
    let other = json!({
            "version": 1, "activeId": "ws-1", "daemon": {"pid": 1, "port": 2},
            "workspaces": [
                {"id": "ws-1", "name": "Website", "path": web, "workspaceType": "local", "createdAt": 5},
                {"id": "ws-2", "name": "another name", "path": api, "workspaceType": "local"},
                {"id": "ws-3", "name": "gone", "path": gone, "workspaceType": "local"},
                {"id": "ws-4", "name": "far", "path": "", "workspaceType": "remote", "baseUrl": "https://Example.com/", "directory": "/srv"},
            ],
    });
    let file = write(&host, &other);
    let first = import(&host, &file).json();
    let expected = [("added", "Website"), ("kept", "api"), ("refused", "path_not_found"), ("added", "far")];
    assert_eq!(outcomes(&first), expected);
    assert_eq!(first["workspaces"][2]["source"], gone.to_str().unwrap());
    assert!(!gone.exists());
    assert_eq!(host.names(), ["api", "Website", "far"]);
    // The active workspace of the other program does not replace ours.
    assert_eq!(host.openwork(["workspace", "current"]).ok().stdout, "api\n");

    // For people; the names are taken from the paths where another workspace has them.
    let (blog, docs) = (host.project("blog"), host.project("docs"));
    let entries = json!({"workspaces": [{"name": "Website", "path": blog}, {"path": docs}, {"name": 5}]});
    let text = import(&host, &write(&host, &entries)).ok().stdout;
    let lines: Vec<&str> = text.lines().collect();
    let expected = [format!("added blog ({})", blog.display()), format!("added docs ({})", docs.display())];
    assert_eq!(lines[..2], expected);
    assert!(lines[2].starts_with("refused not a workspace: "), "{text}");
    for name in ["blog", "docs"] {
        host.openwork(["workspace", "remove", name]).ok();
    }
    let file = write(&host, &other);

    // Importing again changes nothing.
    let again = import(&host, &file).json();
    let expected = [("kept", "Website"), ("kept", "api"), ("refused", "path_not_found"), ("kept", "far")];
    assert_eq!(outcomes(&again), expected);
    let text = import(&host, &file).ok().stdout;
    let web = web.to_str().unwrap();
    assert!(text.starts_with(&format!("kept Website ({web})\n")), "{text}");
    assert!(text.contains("\nrefused no such directory: "), "{text}");
}

#[test]
fn workspaces_of_the_desktop_app_are_imported() {
    let host = Host::new();
    let (one, two, three) = (host.project("one"), host.project("two"), host.project("three"));
    let file = write(
        &host,
        &json!({
            "selectedId": "ws_1", "watchedId": null, "activeId": null,
            "workspaces": [
                {"id": "ws_1", "name": "one", "displayName": "First", "path": one, "preset": "starter", "workspaceType": "local", "remoteType": null, "baseUrl": null, "directory": null},
                {"id": "ws_2", "name": "", "displayName": null, "path": two},
                // A taken name, and an invalid one.
                {"id": "ws_3", "name": "First", "path": three, "workspaceType": "local"},
                {"id": "ws_4", "name": "a/b", "path": "", "workspaceType": "remote", "remoteType": "openwork", "baseUrl": "http://host:4096", "directory": null, "openworkToken": "SECRET", "openworkHostToken": "SECRET"},
                {"id": "ws_5", "name": "no url", "workspaceType": "remote", "baseUrl": null},
                {"id": "ws_6", "name": "relative", "path": "some/where"},
                "no workspace",
            ],
        }),
    );
    let first = import(&host, &file).json();
    assert_eq!(
        outcomes(&first),
        [
            ("added", "First"),
            ("added", "two"),
            ("added", "three"),
            ("added", "host"),
            ("refused", "invalid_url"),
            ("refused", "bad_request"),
            ("refused", "bad_request"),
        ]
    );
    assert!(!first.to_string().contains("SECRET") && !host.state().to_string().contains("SECRET"));
}

#[test]
fn file_without_workspaces_is_refused() {
    let host = Host::new();
    host.exercises(["code bad_request", "command workspace import"]);
    for content in ["", "{", "[]", "{}", r#"{"workspaces": {}}"#] {
        let file = host.path("other.json");
        fs::write(&file, content).unwrap();
        let error = import(&host, &file).fails(1, "bad_request");
        assert!(error["message"].as_str().unwrap().contains(file.to_str().unwrap()), "{error}");
    }
    import(&host, &host.path("none")).fails(1, "bad_request");
    import(&host, &host.home()).fails(1, "bad_request");
    host.openwork(["workspace", "import"]).fails(2, "usage");
    // A refused import starts no daemon.
    assert!(host.lock_text().is_none());
    let empty = write(&host, &json!({"workspaces": []}));
    assert_eq!(import(&host, &empty).json(), json!({"ok": true, "workspaces": []}));
}
