//! `openwork` started the way OpenWork's desktop app starts its own orchestrator.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{AUTH, Host, Signal, basic, kill, wait_for, wait_gone};

const USERNAME: &str = "OPENWORK_OPENCODE_USERNAME";
const PASSWORD: &str = "OPENWORK_OPENCODE_PASSWORD";

#[test]
fn orchestrator_command_line_is_accepted() {
    let host = Host::new();
    host.exercises(["option --opencode-workdir", "option --allow-external", "command daemon run"]);
    let (data, workdir) = (host.data(), host.project("workdir"));
    let daemon = host
        .openwork(["daemon", "run", "--data-dir", data.to_str().unwrap(), "--daemon-host", "127.0.0.1"].iter().chain(
            &[
                "--opencode-host",
                "127.0.0.1",
                "--opencode-workdir",
                workdir.to_str().unwrap(),
                "--allow-external",
                "--cors",
                "*",
            ],
        ))
        .spawn();
    wait_for("opencode to be ready", || host.lock_text().is_some() && host.phase() == "ready");
    // `--cors '*'` does not open the daemon to web pages.
    host.http("GET", "/workspaces").header("Origin", "http://evil.example").fails(403, "forbidden_origin");
    assert_eq!(fs::read_dir(&workdir).unwrap().count(), 0);
    let opencode = &host.starts()[0];
    assert_ne!(Path::new(opencode["cwd"].as_str().unwrap()), workdir);
    host.openwork(["daemon", "stop"]).ok();
    let output = daemon.wait();
    assert!(output.stderr.contains("--cors '*' is ignored"), "{output:?}");
    // An explicit origin beside it still works.
    let output = host.openwork(["daemon", "start", "--cors", "*", "--cors=http://good.example"]).ok();
    assert!(output.stderr.contains("--cors '*' is ignored"), "{output:?}");
    host.http("GET", "/workspaces").header("Origin", "http://good.example").ok();
    host.http("GET", "/workspaces").header("Origin", "http://evil.example").fails(403, "forbidden_origin");
}

/// The status of a routed call with these credentials.
fn status(host: &Host, credentials: &str) -> u16 {
    let (user, password) = credentials.split_once(':').unwrap();
    host.http("GET", "/w/@active/path").header("Authorization", basic(user, password)).send().status
}

#[test]
fn credentials_can_be_given() {
    let mut host = Host::new();
    host.set(USERNAME, "desktop");
    host.set(PASSWORD, "first secret");
    host.add(host.project("p"));
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(status(&host, "desktop:first secret"), 200);
    assert_eq!(status(&host, "opencode:first secret"), 401);
    // Commands and the next daemon read them from the file, without the variables.
    host.unset(USERNAME);
    host.unset(PASSWORD);
    host.openwork(["api", "/path"]).ok();
    host.openwork(["daemon", "restart"]).ok();
    assert_eq!(status(&host, "desktop:first secret"), 200);

    // An opencode that runs with other credentials is not adopted.
    let before = host.opencode_pid();
    let daemon = host.daemon_pid();
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
    host.set(PASSWORD, "second secret");
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(status(&host, "desktop:second secret"), 200);
    assert_eq!(status(&host, "desktop:first secret"), 401);
    assert_ne!(host.opencode_pid(), before);

    // opencode gets them as its own variables; no argument contains the password.
    for start in host.starts() {
        assert!(!start["argv"].to_string().contains("secret"), "{start}");
        let environment = host.environment(start["pid"].as_u64().unwrap() as u32);
        assert!(!environment.iter().any(|variable| variable.starts_with(PASSWORD)), "{start}");
    }
    for pid in host.processes() {
        let argv = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&argv).contains("secret"));
    }
}

#[test]
fn invalid_credentials_are_refused() {
    let host = Host::new();
    for (name, value) in [(USERNAME, "a:b"), (USERNAME, "a\nb"), (PASSWORD, "a\u{7f}secret")] {
        let error = host.openwork(["daemon", "start"]).env(name, value).fails(2, "usage");
        assert!(error["message"].as_str().unwrap().contains(name) && !error.to_string().contains("secret"), "{error}");
    }
    assert!(!host.file(AUTH).exists());
    // An empty variable is ignored; other fields of the file survive.
    host.openwork(["daemon", "start"]).env(PASSWORD, "").ok();
    host.openwork(["daemon", "stop"]).ok();
    let mut auth: Value = serde_json::from_slice(&fs::read(host.file(AUTH)).unwrap()).unwrap();
    assert_eq!(auth["opencodePassword"].as_str().map(str::len), Some(64));
    auth["projectDir"] = json!("/p");
    fs::write(host.file(AUTH), auth.to_string()).unwrap();
    host.openwork(["daemon", "start"]).env(PASSWORD, "given").ok();
    auth["opencodePassword"] = json!("given");
    assert_eq!(serde_json::from_slice::<Value>(&fs::read(host.file(AUTH)).unwrap()).unwrap(), auth);
}
