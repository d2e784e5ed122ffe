//! The daemon's events: `GET /events` and `openwork events`.

use serde_json::{Value, json};

use crate::support::{Events, Host, Signal, free_port, kill, wait_for};

fn next(events: &mut Events, kind: &str) -> Value {
    let event = events.find(|_| true).expect("the stream to stay open");
    assert_eq!(event["type"], kind, "{event}");
    event
}

#[test]
fn registry_changes_are_published() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let mut events = host.http("GET", "/events").events();
    let (a, b) = (host.add(host.project("a")), host.add(host.project("b")));
    host.add(host.project("b"));
    host.openwork(["workspace", "rename", "b", "c"]).ok();
    host.openwork(["workspace", "switch", "c"]).ok();
    host.openwork(["workspace", "remove", "c"]).ok();

    let told = [
        ("workspace.added", &a, "a", a.as_str()),
        ("workspace.added", &b, "b", &a),
        // Adding an existing workspace again publishes nothing.
        ("workspace.renamed", &b, "c", &a),
        ("workspace.activated", &b, "c", &b),
        ("workspace.removed", &b, "c", ""),
    ]
    .map(|(kind, id, name, active)| {
        let event = next(&mut events, kind);
        assert_eq!((&event["workspace"]["id"], &event["workspace"]["name"]), (&id.as_str().into(), &name.into()));
        assert_eq!(event["activeId"], active);
        assert!(event["time"].as_u64().unwrap() > 1_700_000_000_000);
        event["id"].as_u64().unwrap()
    });
    assert!(told.is_sorted_by(|a, b| a + 1 == *b), "{told:?}");
}

#[test]
fn lifecycle_of_opencode_is_published() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let mut events = host.http("GET", "/events").events();
    let before = host.opencode_pid();
    kill(before, Signal::KILL);
    assert_eq!(next(&mut events, "engine.exited")["pid"], before);
    let starting = next(&mut events, "engine.starting");
    let ready = next(&mut events, "engine.ready");
    assert_eq!((&starting["generation"], &ready["generation"]), (&2.into(), &2.into()));
    assert_eq!(ready["pid"], host.opencode_pid());

    host.behave("FAKE_AUTH=reject");
    kill(host.opencode_pid(), Signal::KILL);
    let failed = events.find(|event| event["type"] == "engine.failed").unwrap();
    assert_eq!(failed["error"]["code"], "opencode_auth_failed");
}

#[test]
fn disposals_are_published() {
    let host = Host::new();
    let project = host.project("p");
    let id = host.add(&project);
    host.openwork(["workspace", "path", "p"]).ok();
    let mut events = host.http("GET", "/events").events();
    host.openwork(["instance", "dispose", "p"]).ok();
    let event = next(&mut events, "instance.disposed");
    assert_eq!((&event["workspaceId"], &event["directory"]), (&id.into(), &project.to_str().unwrap().into()));
}

#[test]
fn turns_are_published_with_workspace_and_title() {
    let host = Host::new();
    let project = host.project("p");
    let id = host.add(&project);
    host.openwork(["workspace", "path", "p"]).ok();
    host.wait_for_subscription();
    let mut events = host.http("GET", "/events").events();
    host.openwork(["api", "p", "POST", "/session/ses_fake/prompt_async"]).ok();
    host.openwork(["session", "abort", "ses_fake"]).ok();
    for kind in ["session.started", "session.error", "session.idle"] {
        let event = next(&mut events, kind);
        assert_eq!((&event["sessionId"], &event["title"]), (&"ses_fake".into(), &"mend {it}".into()), "{event}");
        assert_eq!((&event["workspace"]["id"], &event["directory"]), (&json!(id), &json!(project)));
        let error = json!({"name": "MessageAbortedError", "message": "Aborted"});
        assert_eq!(event.get("error"), (kind == "session.error").then_some(&error));
    }
    // Each event came once: the next is this one.
    host.openwork(["workspace", "rename", "p", "q"]).ok();
    next(&mut events, "workspace.renamed");
}

#[test]
fn event_ids_survive_reconnect_and_restart() {
    let host = Host::new();
    host.exercises(["option --since"]);
    host.openwork(["daemon", "start"]).ok();
    let mut events = host.http("GET", "/events").events();
    let names = ["a", "b", "c"];
    for name in names {
        host.add(host.project(name));
    }
    let ids = names.map(|_| next(&mut events, "workspace.added")["id"].as_u64().unwrap());
    assert!(
        ids[0] / 1000 > 1_700_000_000_000
            && ids[0] / 1000 <= host.health()["daemon"]["startedAt"].as_u64().unwrap() + 60_000
    );
    drop(events);
    let mut events = host.http("GET", "/events").header("Last-Event-ID", ids[0].to_string()).events();
    for (id, name) in [(ids[1], "b"), (ids[2], "c")] {
        let event = next(&mut events, "workspace.added");
        assert_eq!((&event["id"], &event["workspace"]["name"]), (&json!(id), &json!(name)));
    }
    let since = |id: u64| {
        let lines = host.openwork(["events", "--timeout", "1", "--since", &id.to_string()]).ok().stdout;
        lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(since(ids[1])[0]["id"], ids[2]);
    assert_eq!(since(ids[2]), [Value::Null; 0]);

    // The next daemon continues the numbering, but has none of the earlier events.
    host.openwork(["daemon", "restart"]).ok();
    let told = since(ids[1]);
    assert_eq!((&told[0]["type"], &told[0]["since"]), (&json!("gap"), &json!(ids[1])));
    assert!(told.iter().all(|event| event["id"].as_u64().unwrap() > ids[2]), "{told:?}");
    assert_eq!(
        since(told[0]["id"].as_u64().unwrap()).first().map(|event| &event["type"]),
        told.get(1).map(|event| &event["type"])
    );

    host.http("GET", "/events").header("Last-Event-ID", "x").fails(400, "bad_request");
    host.openwork(["events", "--since", "x"]).fails(2, "usage");
}

#[test]
fn events_command_prints_one_line_per_event() {
    let host = Host::new();
    host.exercises(["command events"]);
    host.openwork(["daemon", "start"]).ok();
    let printing = [&["events"][..], &["events", "--json"]].map(|args| host.openwork(args).spawn());
    // Events before both have subscribed are lost, so repeat the change.
    let mut n = 0;
    wait_for("both to print", || {
        n += 1;
        host.add(host.project(format!("p{n}")));
        printing.iter().all(|command| command.stdout_so_far().ends_with("}\n"))
    });
    host.openwork(["events", "--since", "18446744073709551615"]).fails(2, "usage");
    for command in printing {
        kill(command.pid(), Signal::TERM);
        let output = command.wait();
        for line in output.stdout.lines() {
            let event: Value = serde_json::from_str(line).unwrap();
            assert_eq!(event["type"], "workspace.added");
        }
    }
}

#[test]
fn events_command_follows_a_restarted_daemon() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let printing = host.openwork(["events"]).spawn();
    let printed = || -> Vec<Value> {
        let text = printing.stdout_so_far();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let mut n = 0;
    let mut change = || {
        n += 1;
        host.add(host.project(format!("p{n}")));
        let name = format!("p{n}");
        printed().iter().any(|event| event["workspace"]["name"] == name.as_str())
    };
    wait_for("the command to print", &mut change);
    // In place, and at another port, where no daemon runs for a moment.
    let other = free_port().to_string();
    for restart in [&["daemon", "restart"][..], &["daemon", "restart", "--daemon-port", &other]] {
        let before = printed().len();
        host.openwork(restart).ok();
        wait_for("the command to print again", &mut change);
        // A gap event stands for events that may have been lost.
        assert_eq!(printed()[before]["type"], "gap", "{:?}", printed());
    }
    let last = printed().last().unwrap()["id"].clone();
    host.openwork(["daemon", "stop"]).ok();
    let output = printing.wait();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(output.stderr.starts_with("error: the daemon has ended\nhint: `openwork events --since "), "{output:?}");
    assert!(last.as_u64().is_some(), "{last}");
}

#[test]
fn stream_ends_with_the_daemon() {
    let host = Host::new();
    host.exercises(["route GET /events"]);
    host.openwork(["daemon", "start"]).ok();
    let mut events = host.http("GET", "/events").events();
    host.openwork(["daemon", "stop"]).ok();
    while events.find(|_| true).is_some() {}
}

#[test]
fn reader_that_falls_behind_is_dropped() {
    // More than the socket buffers of both sides can hold.
    const CHANGES: usize = 4000;
    let host = Host::new();
    host.exercises(["route PATCH /workspaces/:id"]);
    let deep = format!("{}/p", vec!["d".repeat(250); 14].join("/"));
    host.add(host.project(deep));
    let mut deaf = host.http("GET", "/events").events();
    let mut last = 0;
    for n in 0..CHANGES {
        let change = serde_json::json!({"name": format!("n{n}")});
        host.http("PATCH", "/workspaces/@active").json(change).ok();
        last = n;
    }
    let mut told = 0;
    while let Some(event) = deaf.find(|_| true) {
        told += 1;
        assert_ne!(event["workspace"]["name"], format!("n{last}"), "all {told} events were kept for the reader");
    }
}

#[test]
fn timeout_ends_a_stream_successfully() {
    let host = Host::new();
    host.exercises(["option -f"]);
    host.openwork(["daemon", "start"]).ok();
    for command in [&["events"][..], &["logs", "-f"]] {
        let output = host.openwork(command.iter().chain(&["--timeout", "1"])).ok();
        assert_eq!(output.stderr, "", "{output:?}");
    }
}
