//! Daily use: the prompt, `open`, plain names, and undoing `env`.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::support::{Host, Signal, kill, on_terminal};

#[test]
fn prompt_shows_the_workspace_of_the_directory() {
    let host = Host::new();
    host.exercises(["command prompt"]);
    // Without a workspace the prompt is empty, succeeds, and starts no daemon.
    assert_eq!(host.openwork(["prompt"]).ok().stdout, "");
    assert_eq!(host.openwork(["prompt"]).json()["workspace"], json!(null));
    assert!(host.lock_text().is_none());

    let (web, api) = (host.project("web"), host.project("api"));
    host.add(&web);
    let id = host.add(&api);
    let inside = host.project("api/src");
    let prompt = |directory: &Path| host.openwork(["prompt"]).cwd(directory).ok().stdout;
    assert_eq!([prompt(&host.home()), prompt(&web), prompt(&inside)], ["web\n", "web\n", "api\n"]);
    assert_eq!(host.openwork(["prompt"]).cwd(&web).env("OPENWORK_WORKSPACE", &id).ok().stdout, "api\n");
    assert_eq!(host.openwork(["prompt"]).env("OPENWORK_WORKSPACE", "none").ok().stdout, "");
    assert_eq!(host.openwork(["prompt"]).json()["workspace"]["name"], "web");

    // No command waits for a frozen daemon or asks it for its version: the state file has the answers.
    kill(host.daemon_pid(), Signal::STOP);
    assert_eq!(prompt(&inside), "api\n");
    assert_eq!(host.openwork(["current"]).ok().stdout, "web\n");
    assert_eq!(host.openwork(["ls", "--names"]).ok().stdout, "web\napi\n");
    kill(host.daemon_pid(), Signal::CONT);
    host.openwork(["daemon", "stop"]).ok();
    host.write_state("{");
    assert_eq!(host.openwork(["prompt"]).ok().stdout, "");
}

#[test]
fn documented_bash_prompt_works() {
    let host = Host::new();
    host.add(host.project("it's"));
    let docs = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/prompt.md")).unwrap();
    let snippet = docs.split("```bash\n").nth(1).unwrap().split("```").next().unwrap();
    let script = format!("PS1='$ '\n{snippet}\nprintf '%s' \"${{PS1@P}}\"");
    let mut path = vec![host.binary().parent().unwrap().to_owned()];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
    let prompt = Command::new("bash")
        .args(["--norc", "-c", &script])
        .env("PATH", std::env::join_paths(path).unwrap())
        .env("OPENWORK_DATA_DIR", host.data())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(prompt.stdout).unwrap(), "[it's] $ ");
}

#[test]
fn open_adds_the_directory_and_attaches() {
    let host = Host::new();
    host.exercises(["command open"]);
    let project = host.project("p");
    let output = host.openwork(["open"]).on_terminal("").cwd(&project).ok();
    assert!(output.stdout.starts_with("fake: attach "), "{output:?}");
    assert!(output.stderr.starts_with("added p ("), "{output:?}");
    // A directory inside a workspace is not added.
    let inside = host.project("p/src");
    let output = host.openwork(["open", inside.to_str().unwrap()]).on_terminal("").ok();
    assert!(output.stdout.contains(project.to_str().unwrap()) && output.stderr.is_empty(), "{output:?}");
    assert_eq!(host.names(), ["p"]);
    host.openwork(["open", "/no/such"]).on_terminal("").fails(1, "path_not_found");
    let error = host.openwork(["open"]).on_terminal("").cwd(host.home()).fails(2, "usage");
    assert!(error["hint"].as_str().unwrap().contains("--force"), "{error}");
}

#[test]
fn several_directories_are_added_at_once() {
    let host = Host::new();
    let [web, api, shop] = ["web", "api", "shop"].map(|name| host.project(name).to_str().unwrap().to_owned());
    let output = host.openwork(["add", &web, &api]).ok();
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert!(lines[0].starts_with("added web (") && lines[0].ends_with(", active"), "{output:?}");
    assert!(lines[1].starts_with("added api (") && lines.len() == 2, "{output:?}");

    // A failure does not keep the others from being added; the first one is the exit status.
    let output = host.openwork(["add", &api, "/no/such", "~", &shop]).exits(1);
    assert!(output.stdout.starts_with("already there: api ("), "{output:?}");
    assert!(output.stdout.lines().nth(1).unwrap().starts_with("added shop ("), "{output:?}");
    assert!(output.stderr.starts_with("error: no such directory: /no/such\nerror: "), "{output:?}");
    assert_eq!(host.names(), ["web", "api", "shop"]);

    let output = host.openwork(["add", "--json", "~", &web]).exits(2);
    let added = output.object();
    assert_eq!((&added["ok"], &added["error"]["code"]), (&json!(false), &json!("usage")));
    assert_eq!(added["workspaces"][0]["error"], added["error"]);
    let [path, created, name] = [
        &added["workspaces"][1]["path"],
        &added["workspaces"][1]["created"],
        &added["workspaces"][1]["workspace"]["name"],
    ];
    assert_eq!((path, created, name), (&json!(web), &json!(false), &json!("web")));
    let added = host.openwork(["add", &web, &api]).json();
    assert_eq!(added["workspaces"].as_array().unwrap().len(), 2);
    assert_eq!(added["activeId"], added["workspaces"][0]["workspace"]["id"]);

    host.openwork(["add", &web, &api, "--name", "x"]).fails(2, "usage");
    host.openwork(["add"]).fails(2, "usage");
}

#[test]
fn switch_names_the_variable_that_overrides_it() {
    let host = Host::new();
    host.add(host.project("web"));
    let api = host.add(host.project("api"));
    let switch = |variable: &str| {
        let output = host.openwork(["switch", "api"]).env("OPENWORK_WORKSPACE", variable).ok();
        assert!(output.stdout.starts_with("switched to api ("), "{output:?}");
        output.stderr
    };
    assert_eq!(
        switch("web"),
        "note: OPENWORK_WORKSPACE=web overrides the active workspace in this shell; `unset OPENWORK_WORKSPACE` ends \
         that\n"
    );
    for agrees in ["", "api", &api] {
        assert_eq!(switch(agrees), "");
    }
}

#[test]
fn prompt_that_begins_with_a_workspace_gets_a_hint() {
    let host = Host::new();
    host.add(host.project("web"));
    host.openwork(["daemon", "start"]).ok();
    let run = |args: &[&str]| {
        let mut command = Command::new(host.binary());
        command.args(args).env("OPENWORK_DATA_DIR", host.data()).env_remove("OPENWORK_WORKSPACE");
        on_terminal(command, "")
    };
    let hint = "web is part of the prompt; `openwork run -w web …` runs in the workspace web\n";
    let printed = run(&["run", "web", "hi"]);
    // The hint does not change the meaning.
    assert!(printed.contains(hint) && printed.contains("web hi"), "{printed}");
    for other in
        [&["run", "web"][..], &["run", "webs", "hi"], &["run", "-w", "web", "web", "hi"], &["run", "web", "--", "hi"]]
    {
        let printed = run(other);
        assert!(!printed.contains("part of the prompt"), "{printed}");
    }
    // Without a terminal there is no hint.
    assert_eq!(host.openwork(["run", "web", "hi"]).ok().stderr, "");
}

#[test]
fn home_and_root_are_added_only_by_force() {
    let host = Host::new();
    host.exercises(["option --force"]);
    for place in [host.home().to_str().unwrap(), "/", "~", "/tmp/.."] {
        let error = host.openwork(["workspace", "add", place]).fails(2, "usage");
        assert!(error["hint"].as_str().unwrap().contains("--force"), "{error}");
    }
    assert!(host.names().is_empty());
    host.openwork(["add", "/", "--force", "--name", "root"]).ok();
    host.openwork(["add", "~", "--force", "--name", "home"]).ok();
    assert_eq!(host.names(), ["root", "home"]);
    assert_eq!(host.openwork(["workspace", "list", "--names"]).ok().stdout, "root\nhome\n");
}

#[test]
fn switch_on_a_terminal_asks_for_the_workspace() {
    let host = Host::new();
    for name in ["web", "website", "api-server"] {
        host.add(host.project(name));
    }
    let switch = |typed: &str| host.openwork(["switch"]).on_terminal(typed);
    let output = switch("3\n").ok();
    assert!(output.stdout.starts_with("1  *  web         "), "{output:?}");
    assert!(output.stdout.contains("\nswitch to (a number, or a part of a name): "), "{output:?}");
    assert!(output.stdout.contains("switched to api-server (") && output.stderr.is_empty(), "{output:?}");
    let current = || host.openwork(["current"]).ok().stdout;
    assert_eq!(current(), "api-server\n");
    // An ambiguous answer, and one without a match, are asked again.
    switch("nothing\nwe\n2\n").ok();
    assert_eq!(current(), "website\n");
    switch("SERV\n").ok();
    assert_eq!(current(), "api-server\n");
    // Without a choice nothing changes. Without a terminal, and with --json, the command does not ask.
    for typed in ["\n", "\u{4}"] {
        let output = switch(typed).exits(1);
        assert!(output.stderr.contains("no workspace was chosen"), "{output:?}");
    }
    host.openwork(["switch"]).fails(2, "usage");
    host.openwork(["switch"]).on_terminal("1\n").fails(2, "usage");
    assert_eq!(current(), "api-server\n");
}

#[test]
fn switch_on_a_terminal_shows_the_first_of_many_workspaces() {
    let host = Host::new();
    let output = host.openwork(["switch"]).on_terminal("1\n").exits(4);
    assert!(output.stderr.contains("no workspace is active"), "{output:?}");
    for n in 0..35 {
        host.add(host.project(format!("p{n:02}")));
    }
    let output = host.openwork(["switch"]).on_terminal("p34\n").ok();
    assert!(output.stdout.contains("\nand 5 more\n"), "{output:?}");
    assert!(!output.stdout.contains("projects/p30\n"), "{output:?}");
    assert!(output.stdout.contains("switched to p34 ("), "{output:?}");
}

#[test]
fn workspaces_whose_directories_have_gone_are_removed_at_once() {
    let host = Host::new();
    host.exercises(["option --missing"]);
    for name in ["here", "gone", "away"] {
        host.add(host.project(name));
    }
    host.openwork(["workspace", "add-remote", "http://example.com"]).ok();
    let missing = || host.openwork(["workspace", "remove", "--missing"]);
    let output = missing().ok();
    assert_eq!((&*output.stdout, &*output.stderr), ("", "no directory is missing\n"));
    for name in ["gone", "away"] {
        fs::remove_dir(host.project(name)).unwrap();
    }
    host.openwork(["workspace", "remove", "--missing", "here"]).fails(2, "usage");
    host.openwork(["workspace", "remove"]).fails(2, "usage");
    let removed = missing().json();
    let names: Vec<&str> =
        removed["workspaces"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["gone", "away"]);
    assert_eq!(host.names(), ["here", "example.com"]);
    assert_eq!(missing().json()["workspaces"], json!([]));
}

#[test]
fn missing_directory_error_names_workspace_and_path() {
    let host = Host::new();
    let project = host.project("web");
    host.openwork(["workspace", "add", project.to_str().unwrap(), "--name", "site"]).ok();
    host.opencode_pid();
    fs::remove_dir(&project).unwrap();
    for command in [&["env", "site"][..], &["workspace", "path", "site"], &["run", "hi"], &["api", "/path"]] {
        let error = host.openwork(command).exits(1);
        let told = format!("{}{}", error.stdout, error.stderr);
        assert!(told.contains("site") && told.contains(project.to_str().unwrap()), "{error:?}");
    }
    let error = host.openwork(["env"]).env("OPENWORK_WORKSPACE", "site").fails(1, "path_not_found");
    assert!(error["message"].as_str().unwrap().starts_with("OPENWORK_WORKSPACE is \"site\": "), "{error}");
    assert!(error["hint"].as_str().unwrap().contains("openwork workspace move"), "{error}");
}

#[test]
fn list_names_prints_only_names() {
    let host = Host::new();
    host.exercises(["option --names"]);
    host.add(host.project("b"));
    host.add(host.project("a"));
    assert_eq!(host.openwork(["ws", "ls", "--names"]).ok().stdout, "b\na\n");
}

#[test]
fn env_unset_removes_what_env_sets() {
    let mut host = Host::new();
    host.exercises(["option --unset"]);
    host.set("PATH", std::env::var_os("PATH").unwrap());
    for name in ["NO_PROXY", "no_proxy"] {
        host.unset(name);
    }
    host.add(host.project("p"));
    let env = host.openwork(["env"]).secret().json();
    assert_eq!(env["variables"]["OPENCODE_BASE_URL"], env["OPENCODE_BASE_URL"]);
    assert_eq!(env["variables"].as_object().unwrap().len(), 8);

    let variables = "OPENCODE|OPENWORK_(WORKSPACE|DIRECTORY)|NO_PROXY|no_proxy";
    let script = format!(
        "eval \"$(\"$0\" env)\"; {}\neval \"$(\"$0\" env --unset)\"; {}; exit 0",
        count(variables),
        count(variables)
    );
    let output = host.openwork(["env"]).secret().after(&script).ok();
    assert_eq!(output.stdout, "8\n0\n");
    assert!(host.openwork(["env", "--unset", "--shell", "fish"]).ok().stdout.contains("set -e OPENCODE_BASE_URL\n"));
    // A NO_PROXY list with more entries than openwork writes belongs to the user.
    let unset = host.openwork(["env", "--unset"]).env("NO_PROXY", "10.0.0.1,127.0.0.1").ok().stdout;
    assert!(!unset.contains("unset NO_PROXY"), "{unset}");
    host.openwork(["env", "p", "--unset"]).fails(2, "usage");
}

/// A shell command that prints how many of these variables are set.
fn count(variables: &str) -> String {
    format!("env | grep -cE '^({variables})[A-Z_]*='")
}
