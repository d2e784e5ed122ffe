//! Selectors: how commands and requests name a workspace.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::json;

use crate::support::{Host, Run};

/// The id of the workspace in the output.
fn id(run: Run) -> String {
    run.json()["workspace"]["id"].as_str().unwrap().to_owned()
}

fn info(host: &Host, selector: &str) -> String {
    id(host.openwork(["workspace", "info", selector]))
}

/// Percent-encodes everything, as a careful client may.
fn encode(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

#[test]
fn ids_names_and_their_prefixes_select() {
    let host = Host::new();
    let app = host.add(host.project("app"));
    let api = host.add(host.project("api-server"));
    for (selector, found) in
        [(app.as_str(), &app), ("app", &app), ("api-server", &api), ("api", &api), (&app[..8], &app), (&api[..8], &api)]
    {
        assert_eq!(info(&host, selector), *found, "{selector}");
    }
    for unknown in ["nope", "APP", "ws-ffffffffffff", "app-", "", "pp"] {
        host.openwork(["workspace", "info", unknown]).fails(4, "workspace_not_found");
    }
}

#[test]
fn exact_name_is_not_ambiguous() {
    let host = Host::new();
    let app = host.add(host.project("app"));
    let two = host.add(host.project("app-two"));
    host.add(host.project("app-three"));
    assert_eq!(info(&host, "app"), app);
    assert_eq!(info(&host, "app-tw"), two);

    let error = host.openwork(["workspace", "info", "app-t"]).fails(4, "workspace_ambiguous");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("app-two") && message.contains("app-three"), "{message}");
    let error = host.openwork(["workspace", "remove", "ap"]).fails(4, "workspace_ambiguous");
    assert!(error["message"].as_str().unwrap().contains(&app));
    host.openwork(["daemon", "start"]).ok();
    host.http("GET", "/workspaces/app-t").fails(409, "workspace_ambiguous");
    assert_eq!(host.names().len(), 3);
}

#[test]
fn path_selects_the_workspace_that_contains_it() {
    let host = Host::new();
    let outer = host.add(host.project("outer"));
    let inner = host.add(host.project("outer/packages/inner"));
    let sources = host.project("outer/packages/inner/src");
    let docs = host.project("outer/docs");
    // Its path starts like another workspace's path.
    let beside = host.project("outer-too");
    let text = |path: &Path| path.to_str().unwrap().to_owned();

    assert_eq!(info(&host, &text(&sources)), inner);
    assert_eq!(info(&host, &text(&docs)), outer);
    assert_eq!(info(&host, &text(&host.project("outer"))), outer);
    assert_eq!(info(&host, &text(&sources.join("not/there/yet"))), inner);
    host.openwork(["workspace", "info", &text(&beside)]).fails(4, "workspace_not_found");
    host.openwork(["workspace", "info", "/"]).fails(4, "workspace_not_found");

    for (cwd, selector, found) in [
        (&sources, ".", &inner),
        (&sources, "..", &inner),
        (&sources, "../..", &outer),
        (&docs, ".", &outer),
        (&docs, "../packages/inner", &inner),
        (&docs, "./", &outer),
    ] {
        let run = host.openwork(["workspace", "info", selector]).cwd(cwd);
        assert_eq!(id(run), *found, "{selector} in {}", cwd.display());
    }
    host.openwork(["workspace", "info", "."]).cwd(&beside).fails(4, "workspace_not_found");
    // Without a slash the selector is a name.
    host.openwork(["workspace", "info", "packages"]).cwd(host.project("outer")).fails(4, "workspace_not_found");

    symlink(&sources, host.path("link")).unwrap();
    assert_eq!(info(&host, &text(&host.path("link"))), inner);
}

#[test]
fn tilde_path_selects() {
    let host = Host::new();
    fs::create_dir_all(host.home().join("code/deep")).unwrap();
    let added = host.openwork(["workspace", "add", "~", "--force"]).json();
    let home = added["workspace"]["id"].as_str().unwrap();
    let code = host.add(host.home().join("code"));
    assert_eq!(info(&host, "~"), home);
    assert_eq!(info(&host, "~/code"), code);
    assert_eq!(info(&host, "~/code/deep/"), code);
}

#[test]
fn missing_directory_is_selected_by_its_path() {
    let host = Host::new();
    let project = host.project("gone");
    host.add(&project);
    fs::remove_dir(&project).unwrap();
    host.openwork(["workspace", "remove", project.to_str().unwrap()]).ok();
    assert_eq!(host.names(), [""; 0]);
}

#[test]
fn dash_selects_the_previous_workspace() {
    let host = Host::new();
    let (a, b) = (host.add(host.project("a")), host.add(host.project("b")));
    host.openwork(["workspace", "switch", "-"]).fails(4, "workspace_not_found");
    host.openwork(["workspace", "switch", "b"]).ok();
    assert_eq!(info(&host, "-"), a);
    assert_eq!(id(host.openwork(["workspace", "switch", "-"])), a);
    assert_eq!(id(host.openwork(["workspace", "switch", "-"])), b);
    // Switching to the active workspace keeps the previous one.
    host.openwork(["workspace", "switch", "b"]).ok();
    assert_eq!(info(&host, "-"), a);
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(info(&host, "-"), a);
    host.openwork(["workspace", "remove", "a"]).ok();
    host.openwork(["workspace", "switch", "-"]).fails(4, "workspace_not_found");
}

#[test]
fn omitted_selector_is_the_variable_or_the_active_workspace() {
    let host = Host::new();
    let (a, b) = (host.add(host.project("a")), host.add(host.project("b")));
    let path = || host.openwork(["workspace", "path"]);
    assert_eq!(id(path()), a);
    assert_eq!(id(path().env("OPENWORK_WORKSPACE", "b")), b);
    assert_eq!(id(path().env("OPENWORK_WORKSPACE", host.project("b"))), b);
    assert_eq!(id(path().env("OPENWORK_WORKSPACE", "")), a);
    path().env("OPENWORK_WORKSPACE", "nope").fails(4, "workspace_not_found");
    // An argument takes precedence over the variable.
    assert_eq!(id(host.openwork(["workspace", "path", "a"]).env("OPENWORK_WORKSPACE", "b")), a);
    // `current` reports the active workspace, whatever the variable says.
    assert_eq!(id(host.openwork(["workspace", "current"]).env("OPENWORK_WORKSPACE", "b")), a);
}

#[test]
fn every_command_takes_every_selector() {
    let host = Host::new();
    let project = host.project("the project");
    let id = host.add(&project);
    host.add(host.project("other"));
    for selector in [id.as_str(), "the project", "the p", project.to_str().unwrap()] {
        host.openwork(["workspace", "switch", selector]).ok();
        host.openwork(["workspace", "info", selector]).ok();
        host.openwork(["workspace", "path", selector]).ok();
        host.openwork(["instance", "dispose", selector]).ok();
        host.openwork(["workspace", "rename", selector, "the project"]).ok();
        host.openwork(["workspace", "remove", selector]).ok();
        host.add(&project);
    }
    for command in [["workspace", "switch"], ["workspace", "path"], ["instance", "dispose"], ["workspace", "remove"]] {
        host.openwork(command.iter().chain(&["nope"])).fails(4, "workspace_not_found");
    }
    host.openwork(["workspace", "rename", "nope", "new"]).fails(4, "workspace_not_found");
}

#[test]
fn selectors_over_http_are_percent_encoded() {
    let host = Host::new();
    let project = host.project("ünï & co/100%");
    let id = host.add(&project);
    host.openwork(["workspace", "rename", &id, "näme with ?#%"]).ok();
    let found = |selector: &str| host.http("GET", &format!("/workspaces/{selector}")).ok()["workspace"]["id"].clone();
    assert_eq!(found(&id), *id);
    assert_eq!(found("@active"), *id);
    assert_eq!(found("%40active"), *id);
    for selector in ["näme with ?#%", "näme", project.to_str().unwrap(), &id[..7]] {
        assert_eq!(found(&encode(selector)), *id, "{selector}");
    }
    host.http("GET", &format!("/workspaces/{}/path", encode(project.to_str().unwrap()))).ok();
    host.http("GET", "/workspaces/nope").fails(404, "workspace_not_found");
    for bad in ["%", "%4", "%zz", "%ff", "a%00b"] {
        let reply = host.http("GET", &format!("/workspaces/{bad}")).send();
        assert!(matches!(reply.status, 400 | 404), "{bad}: {reply:?}");
    }

    // `-` exists only on the command line.
    host.add(host.project("other"));
    host.openwork(["workspace", "switch", "other"]).ok();
    host.http("GET", "/workspaces/-").fails(404, "workspace_not_found");
    host.http("DELETE", "/workspaces/@active").ok();
    host.http("GET", "/workspaces/@active").fails(409, "no_active_workspace");
    host.http("POST", "/workspaces/@active/activate").json(json!({})).fails(409, "no_active_workspace");
}

// --- Entries of other programs ---

#[test]
fn shared_name_is_ambiguous() {
    let host = Host::new();
    host.exercises(["code workspace_ambiguous"]);
    let (one, two) = (host.project("1/app"), host.project("2/app"));
    let entry = |id: &str, path: &Path| json!({"id": id, "name": "app", "path": path});
    let (a, b) = (entry("ws-00000000000a", &one), entry("ws-00000000000b", &two));
    host.write_state(json!({"version": 1, "workspaces": [a, b]}).to_string());
    for command in ["info", "remove", "switch"] {
        let error = host.openwork(["workspace", command, "app"]).fails(4, "workspace_ambiguous");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("ws-00000000000a") && message.contains("ws-00000000000b"), "{message}");
    }
    assert_eq!(info(&host, two.to_str().unwrap()), "ws-00000000000b");
}

#[test]
fn entry_without_a_path_contains_nothing() {
    let host = Host::new();
    host.exercises(["code workspace_not_found"]);
    host.write_state(json!({"version": 1, "workspaces": [{"id": "ws-00000000000a", "name": "nowhere"}]}).to_string());
    host.openwork(["workspace", "info", "/"]).fails(4, "workspace_not_found");
    host.openwork(["workspace", "remove", "/does/not/exist"]).fails(4, "workspace_not_found");
    assert_eq!(info(&host, "nowhere"), "ws-00000000000a");
}

#[test]
fn symlinked_path_selects_the_same_directory() {
    let host = Host::new();
    let real = host.project("real");
    let link = host.path("projects/link");
    symlink(&real, &link).unwrap();
    let id = "ws-00000000000a";
    host.write_state(json!({"version": 1, "workspaces": [{"id": id, "name": "stored", "path": link}]}).to_string());
    for path in [&link, &real, &real.join("below")] {
        assert_eq!(info(&host, path.to_str().unwrap()), id);
    }
    let again = host.openwork(["workspace".as_ref(), "add".as_ref(), real.as_os_str()]).json();
    assert_eq!((&again["created"], &again["workspace"]["id"]), (&json!(false), &json!(id)));
}

#[test]
fn name_with_a_slash_selects() {
    let host = Host::new();
    let project = host.project("p");
    let id = "ws-00000000000a";
    host.write_state(json!({"version": 1, "workspaces": [{"id": id, "name": "a/b", "path": project}]}).to_string());
    assert_eq!(info(&host, "a/b"), id);
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(info(&host, "a/b"), id);
}

#[test]
fn dot_dot_in_a_missing_path_is_lexical() {
    let host = Host::new();
    let a = host.project("a");
    host.add(&a);
    let b = host.add(host.project("b"));
    assert_eq!(info(&host, a.join("gone/../../b").to_str().unwrap()), b);
    host.openwork(["workspace", "remove", a.join("gone/../../c").to_str().unwrap()]).fails(4, "workspace_not_found");
}

#[test]
fn relative_paths_over_http_select_nothing() {
    let host = Host::new();
    host.add(host.data().parent().unwrap());
    for relative in [".", "..", "opencode/", "~"] {
        host.http("DELETE", &format!("/workspaces/{}", encode(relative))).fails(404, "workspace_not_found");
    }
}
