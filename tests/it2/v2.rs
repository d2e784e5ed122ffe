//! opencode 2.x alone: where requests act, sessions, disposals, versions, clients.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::{
    Host, LOADING_CALL, Reply, Request, Signal, basic, copy_program, fake_opencode, kill, local, read_to_close,
    wait_for, wait_gone,
};

/// A host with a warm opencode and two workspaces, `a` and `b`.
fn host() -> (Host, PathBuf, PathBuf) {
    let host = Host::new();
    let (a, b) = (host.project("a"), host.project("b"));
    host.openwork(["daemon", "start"]).ok();
    host.add(&a);
    host.add(&b);
    (host, a, b)
}

fn encoded(path: &Path) -> String {
    path.to_str().unwrap().replace('/', "%2F")
}

/// The `location` parameter for a directory.
fn location(path: &Path) -> String {
    format!("location%5Bdirectory%5D={}", encoded(path))
}

/// The entry of a workspace in `instance list`.
fn instance(host: &Host, name: &str) -> Value {
    let list = host.openwork(["instance", "list"]).json();
    let mut entries = list["instances"].as_array().unwrap().iter();
    entries.find(|entry| entry["workspace"]["name"] == name).unwrap().clone()
}

fn last_used(host: &Host, name: &str) -> u64 {
    host.openwork(["workspace", "info", name]).json()["workspace"]["lastUsedAt"].as_u64().unwrap()
}

/// Creates a session in a directory by calling opencode directly.
fn session(host: &Host, directory: &Path) -> String {
    let reply = host.opencode("POST", "/api/session").json(json!({"location": {"directory": directory}})).send();
    reply.json()["data"]["id"].as_str().unwrap().to_owned()
}

/// The requests that opencode received, without those of the daemon itself.
fn calls(host: &Host) -> Vec<Value> {
    let ours = ["/api/info", "/api/event", "/api/debug/location", "/api/session/active"];
    let is_ours = |call: &Value| ours.iter().any(|path| call["target"] == *path);
    host.requests().into_iter().filter(|call| !is_ours(call)).collect()
}

// --- Where requests act ---

#[test]
fn request_below_w_acts_in_its_workspace() {
    let (host, a, b) = host();
    let query = format!("/w/a/api/location?{}&directory={}", location(&b), encoded(&b));
    let routed = host.routed("GET", &query).header("x-opencode-directory", encoded(&b)).send();
    assert_eq!(routed.json()["directory"], json!(a));

    for path in ["/api/session", "/api/session/import", "/api/experimental/session/import"] {
        let target = format!("/w/a{path}?{}", location(&b));
        let body = json!({"title": "t", "location": {"directory": b, "workspaceID": "wrk_1"}});
        let created = host.routed("POST", &target).header("x-opencode-directory", encoded(&b)).json(body).send();
        assert_eq!(created.json()["data"]["location"]["directory"], json!(a), "{path}");
    }
    // Without a body, and with a chunked one.
    assert_eq!(host.routed("POST", "/w/a/api/session").send().status, 200);
    let mut stream = host.connect();
    let body = json!({"location": {"directory": b}}).to_string();
    let head = format!(
        "POST /w/a/api/session HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nAuthorization: {}\r\n\
         Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
        host.port(),
        host.credentials(),
        body.len(),
    );
    stream.write_all(head.as_bytes()).unwrap();
    let reply = String::from_utf8(read_to_close(&mut stream)).unwrap();
    assert!(reply.contains("100 Continue") && reply.contains("HTTP/1.1 200 OK"), "{reply}");
    assert_eq!(host.recorded("created"), vec![a.to_str().unwrap(); 5]);
    let bodies = host.recorded("bodies");
    let first: Value = serde_json::from_str(&bodies[0]).unwrap();
    assert_eq!(first, json!({"title": "t", "location": {"directory": a}}));

    // The connection is good for another request, of which the first takes nothing.
    let mut stream = host.served();
    let create =
        Request::new(local(host.port()), "POST", "/w/a/api/session").header("Authorization", host.credentials());
    let reply = create.json(&json!({"title": "t".repeat(1000)})).send_on(&mut stream).unwrap_or_else(|e| panic!("{e}"));
    assert!(reply.status == 200 && reply.is_kept(), "{reply:?}");
    host.is_in_step(stream);
    // In two pieces.
    let mut stream = host.connect();
    let (first, rest) = head.split_at(head.len() - 20);
    stream.write_all(first.as_bytes()).unwrap();
    host.health();
    stream.write_all(rest.as_bytes()).unwrap();
    assert!(String::from_utf8(read_to_close(&mut stream)).unwrap().contains("HTTP/1.1 200 OK"));
    // Bytes after the body are not a second request.
    let mut stream = host.connect();
    let two = head.replace("Expect: 100-continue\r\n", "") + &head;
    stream.write_all(two.as_bytes()).unwrap();
    let reply = Reply::parse(&read_to_close(&mut stream)).unwrap();
    assert_eq!((reply.status, reply.header("connection")), (200, Some("close")));
    assert_eq!(host.recorded("created").len(), 8);

    host.routed("POST", "/w/a/api/session").body("[]").send().refused(400, "bad_request");
    let compressed = host.routed("POST", "/w/a/api/session").header("Content-Encoding", "gzip").body("x");
    compressed.send().refused(415, "unsupported_media_type");
    // 64 MiB are not too long, but must arrive.
    for (length, status, code) in [(67_108_864, 400, "bad_request"), (67_108_865, 413, "too_large")] {
        let declared = format!("POST /w/a/api/session HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n", host.port())
            + &format!("Authorization: {}\r\nContent-Length: {length}\r\n\r\n", host.credentials());
        let mut stream = host.connect();
        stream.write_all(declared.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        Reply::parse(&read_to_close(&mut stream)).unwrap().refused(status, code);
    }
    assert_eq!(host.recorded("created").len(), 8);
    assert_eq!(host.instance(&b), [""; 0]);
}

#[test]
fn session_list_below_w_is_limited_to_its_workspace() {
    let (host, a, b) = host();
    let ids = [session(&host, &a), session(&host, &b)];
    let target = format!("/w/a/api/session?directory={}&limit=5", encoded(&b));
    let listed = host.routed("GET", &target).send().json();
    let listed: Vec<_> = listed["data"].as_array().unwrap().iter().map(|session| session["id"].clone()).collect();
    assert_eq!(listed, [json!(ids[0])]);
}

#[test]
fn request_at_the_root_chooses_its_directory() {
    let (host, a, b) = host();
    let by_query = host.routed("GET", &format!("/api/location?{}", location(&b)));
    assert_eq!(by_query.header("x-opencode-directory", encoded(&a)).send().json()["directory"], json!(b));
    let by_header = host.routed("GET", "/api/location").header("x-opencode-directory", encoded(&a));
    assert_eq!(by_header.send().json()["directory"], json!(a));
    let body = json!({"location": {"directory": b}}).to_string();
    let created = host.routed("POST", "/api/session").header("Content-Type", "application/json").body(&body).send();
    assert_eq!(created.json()["data"]["location"]["directory"], json!(b));
    assert_eq!(host.recorded("bodies"), [body], "passed on as it is");
    // The use counts for the workspace in which the request acts.
    let used = last_used(&host, "b");
    wait_for("the next millisecond", || {
        host.routed("GET", &format!("/api/location?{}", location(&b))).send();
        last_used(&host, "b") > used
    });
    assert_eq!((&instance(&host, "a")["state"], &instance(&host, "b")["state"]), (&json!("warm"), &json!("warm")));
    // The daemon's own routes stay its own.
    assert_eq!(host.http("GET", "/health").send().status, 200);
}

#[test]
fn without_credentials_nothing_reaches_opencode() {
    let (host, a, _) = host();
    let id = session(&host, &a);
    let before = calls(&host).len();
    let at = location(&a);
    for (method, target) in [
        ("GET", "/api/info".to_owned()),
        ("GET", format!("/api/location?{at}")),
        ("GET", "/api/event".to_owned()),
        ("POST", "/api/session".to_owned()),
        ("POST", format!("/api/session/{id}/prompt")),
        ("GET", format!("/api/pty/x/connect?ticket=good&{at}")),
        ("GET", format!("/api/pty/x/connect?ticket=&{at}")),
        ("GET", "/w/a/api/location".to_owned()),
        ("POST", "/w/a/api/session".to_owned()),
    ] {
        host.http(method, &target).fails(401, "unauthorized");
        let wrong = basic("opencode", &"0".repeat(64));
        host.http(method, &target).header("Authorization", wrong).fails(401, "unauthorized");
    }
    assert_eq!(calls(&host).len(), before);
}

#[test]
fn both_the_given_user_and_opencode_are_accepted() {
    let mut host = Host::new();
    host.set("OPENWORK_OPENCODE_USERNAME", "somebody");
    host.add(host.project("a"));
    host.openwork(["workspace", "path", "a"]).ok();
    for user in ["somebody", "opencode"] {
        let call = host.http("GET", "/w/a/api/location").header("Authorization", basic(user, &host.password()));
        assert_eq!(call.send().status, 200, "{user}");
    }
}

/// Opens the WebSocket of a terminal and checks that it echoes.
fn terminal(host: &Host, target: &str, credentials: &str) {
    let mut stream: TcpStream = host.connect();
    let head = format!(
        "GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n{credentials}Connection: Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\ntyped",
        host.port()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).unwrap();
    assert_eq!(&begin, b"HTTP/1.1 101", "{target}");
    let mut rest = Vec::new();
    while !rest.ends_with(b"typed") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        rest.push(byte[0]);
    }
}

#[test]
fn terminals_are_tunnelled_below_w_and_at_the_root() {
    let (host, a, _) = host();
    let id = host.add(&a);
    host.openwork(["workspace", "path", "a"]).ok();
    let credentials = format!("Authorization: {}\r\n", host.credentials());
    terminal(&host, "/w/a/api/pty/x/connect", &credentials);
    terminal(&host, &format!("/api/pty/x/connect?{}", location(&a)), &credentials);
    // A web page has a ticket instead of credentials.
    terminal(&host, &format!("/w/{id}/api/pty/x/connect?ticket=good"), "");
    terminal(&host, &format!("/api/pty/x/connect?ticket=good&{}", location(&a)), "");
    let directories = calls(&host).into_iter().filter(|call| call["target"].as_str().unwrap().contains("/connect"));
    assert!(directories.map(|call| call["directory"].clone()).all(|directory| directory == json!(a)));
}

// --- Sessions ---

#[test]
fn session_call_counts_as_use_where_the_session_runs() {
    let (host, a, b) = host();
    let there = session(&host, &b);
    let (used_a, used_b) = (last_used(&host, "a"), last_used(&host, "b"));
    for target in [format!("/w/a/api/session/{there}/prompt"), format!("/api/session/{there}/prompt")] {
        let before = last_used(&host, "b");
        wait_for("the use to be counted", || {
            assert_eq!(host.routed("POST", &target).json(json!({"text": "x"})).send().status, 200);
            last_used(&host, "b") > before
        });
    }
    assert!(last_used(&host, "b") > used_b);
    assert_eq!(last_used(&host, "a"), used_a);
    assert_eq!((host.instance(&a), host.instance(&b)), (vec![], vec!["load".to_owned()]));
    assert_eq!(instance(&host, "b")["state"], "busy");
    // For an unknown session the client gets opencode's own reply.
    let unknown = host.routed("GET", "/w/a/api/session/ses_none").send();
    assert_eq!((unknown.status, &unknown.json()["_tag"]), (404, &json!("SessionNotFoundError")));
}

#[test]
fn session_older_than_the_daemon_keeps_its_instance_busy() {
    let mut host = Host::new();
    host.set("OPENWORK_IDLE_TTL", "1s");
    let (a, b) = (host.project("a"), host.project("b"));
    host.add(&a);
    host.add(&b);
    let there = session(&host, &a);
    let daemon = host.daemon_pid();
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
    host.openwork(["daemon", "start"]).ok();
    // The events of a turn name only the session; the daemon asks opencode for its directory.
    host.opencode("POST", &format!("/api/session/{there}/prompt")).json(json!({"text": "x"})).send();
    wait_for("the turn to be seen", || instance(&host, "a")["state"] == "busy");
    host.openwork(["workspace", "path", "b"]).ok();
    wait_for("the idle instance to be evicted", || host.instance(&b) == ["load", "dispose"]);
    assert_eq!(host.instance(&a), ["load"]);
    host.opencode("POST", &format!("/api/session/{there}/interrupt")).send();
    wait_for("the other to be evicted", || host.instance(&a) == ["load", "dispose"]);
    assert_eq!(host.recorded("leaks"), [""; 0]);
}

// --- Instances ---

#[test]
fn disposal_names_its_directory_and_ends_turns_first() {
    let (host, a, b) = host();
    host.openwork(["workspace", "path", "a"]).ok();
    host.openwork(["workspace", "path", "b"]).ok();
    let running = session(&host, &a);
    host.routed("POST", &format!("/w/a/api/session/{running}/prompt")).json(json!({"text": "x"})).send();
    host.openwork(["instance", "dispose", "a"]).fails(1, "instance_busy");
    // A running turn is ended first; otherwise its MCP servers would live for ever.
    assert_eq!(host.openwork(["instance", "dispose", "--force", "a"]).json()["disposed"], true);
    assert_eq!(host.recorded("leaks"), [""; 0]);
    assert_eq!((host.instance(&a), host.instance(&b)), (vec!["load".into(), "dispose".into()], vec!["load".into()]));
    assert_eq!(host.openwork(["instance", "dispose", "a"]).json()["disposed"], false);
    let disposals = host.requests().into_iter().filter(|call| call["method"] == "DELETE");
    let targets: Vec<_> = disposals.map(|call| call["target"].clone()).collect();
    assert_eq!(targets, [json!(format!("/api/debug/location?{}", location(&a)))]);
}

#[test]
fn instance_list_comes_from_opencode() {
    let (host, a, b) = host();
    // Listed although no event announced it.
    host.opencode("GET", &format!("/api/location?{}", location(&a))).send();
    assert_eq!((&instance(&host, "a")["state"], &instance(&host, "b")["state"]), (&json!("warm"), &json!("cold")));
    host.opencode("DELETE", &format!("/api/debug/location?{}", location(&a))).send();
    assert_eq!(instance(&host, "a")["state"], "cold");
    // Creating a session loads nothing.
    session(&host, &b);
    assert_eq!(instance(&host, "b")["state"], "cold");
    assert_eq!(host.openwork(["instance", "dispose", "b"]).json()["disposed"], false);
    assert_eq!(host.instance(&b), [""; 0]);
}

#[test]
fn loads_and_disposals_elsewhere_do_not_count_as_use() {
    let mut host = Host::new();
    host.set("OPENWORK_IDLE_TTL", "2s");
    let (a, b) = (host.project("a"), host.project("b"));
    host.openwork(["daemon", "start"]).ok();
    host.add(&a);
    host.add(&b);
    host.openwork(["workspace", "path", "a"]).ok();
    // Each boot of another instance sends ninety events, and each disposal ten.
    wait_for("the idle instance to be evicted", || {
        host.use_directly(&b);
        host.dispose_directly(&b);
        host.instance(&a) == ["load", "dispose"]
    });
}

#[test]
fn revived_instance_gets_twice_the_idle_time() {
    let mut host = Host::new();
    host.set("OPENWORK_IDLE_TTL", "1s");
    let a = host.project("a");
    host.behave(&format!("FAKE_REVIVE={}", a.display()));
    host.openwork(["daemon", "start"]).ok();
    host.add(&a);
    host.openwork(["workspace", "path", "a"]).ok();
    let revived = || host.instance(&a).len() >= 3;
    wait_for("the client to revive it", revived);
    wait_for("the instance to be listed", || instance(&host, "a")["state"] == "warm");
    let due = || instance(&host, "a")["evictAt"].as_u64();
    wait_for("the idle time to double more than once", || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
        due().is_some_and(|due| due > now + 3000)
    });
}

#[test]
fn requests_wait_half_a_minute_for_a_disposal() {
    let mut host = Host::new();
    host.set("OPENWORK_IDLE_TTL", "1s");
    // Longer than the time limit for 1.x.
    host.behave("FAKE_EVICT_MS=11000");
    let a = host.project("a");
    host.add(&a);
    host.openwork(["workspace", "path", "a"]).ok();
    let is_asked = || host.requests().iter().any(|call| call["method"] == "DELETE");
    wait_for("the disposal to begin", is_asked);
    // During the disposal, an instance that is about to end would answer it.
    host.openwork(["workspace", "path", "a"]).ok();
    assert_eq!(host.instance(&a), ["load", "dispose", "load"]);
    let log = std::fs::read_to_string(host.file("daemon.log")).unwrap();
    assert!(log.contains(&format!("disposed the idle instance of {}", a.display())), "{log}");
    // The stop does not wait for remaining disposals.
    host.openwork(["daemon", "stop"]).ok();
}

#[test]
fn disposals_are_noticed_without_shutdown_events() {
    let mut host = Host::new();
    host.set("OPENWORK_IDLE_TTL", "1s");
    host.behave("FAKE_NO_SHUTDOWN_EVENT=1");
    let a = host.project("a");
    host.openwork(["daemon", "start"]).ok();
    host.add(&a);
    host.use_directly(&a);
    wait_for("the eviction", || host.instance(&a) == ["load", "dispose"]);
    host.use_directly(&a);
    wait_for("the instance to be listed", || instance(&host, "a")["state"] == "warm");
    host.dispose_directly(&a);
    wait_for("the disposal to be noticed", || instance(&host, "a")["state"] == "cold");
}

#[test]
fn path_reply_has_the_shape_of_1_x() {
    let (host, a, _) = host();
    let path = host.openwork(["workspace", "path", "a"]).json()["path"].clone();
    let mut names: Vec<_> = path.as_object().unwrap().keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["config", "directory", "home", "state", "worktree"]);
    assert_eq!((&path["directory"], &path["home"]), (&json!(a), &json!(host.home())));
    assert_eq!((&path["worktree"], &path["state"]), (&json!("/"), &json!(host.path("home/.local/state/opencode"))));
    assert!(host.requests().iter().any(|call| call["target"].as_str().unwrap().starts_with(LOADING_CALL)));
}

// --- Starts and versions ---

#[test]
fn opencode_starts_with_both_password_variables() {
    let mut host = Host::new();
    host.set("OPENCODE_PASSWORD", "of the shell");
    host.set("OPENCODE_SERVER_PASSWORD", "of the shell");
    host.openwork(["daemon", "start"]).ok();
    let environment = host.environment(host.opencode_pid());
    let password = host.password();
    for name in ["OPENCODE_PASSWORD", "OPENCODE_SERVER_PASSWORD"] {
        assert!(environment.contains(&format!("{name}={password}")), "{name}");
    }
    assert_eq!(host.openwork(["status"]).json()["engine"]["version"], "2.3.2");
}

#[test]
fn status_503_means_still_starting() {
    let host = Host::new();
    host.behave("FAKE_STARTING_MS=1500");
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(host.starts().len(), 1);
}

#[test]
fn older_2_x_is_refused() {
    for health in ["status", "health"] {
        let host = Host::new();
        host.behave(&format!("FAKE_HEALTH={health}"));
        let error = host.openwork(["daemon", "start"]).fails(5, "opencode_unsupported");
        assert!(error["message"].as_str().unwrap().contains("GET /api/info"), "{error}");
        // The command causes one more attempt after an earlier failure.
        assert!(matches!(host.starts().len(), 1 | 2), "{:?}", host.starts());
        assert_eq!(host.processes(), [host.daemon_pid()]);
    }
}

/// A host whose opencode can be replaced by [`replace`].
fn replaceable(version: &str) -> Host {
    let mut host = Host::new();
    copy_program(fake_opencode(), &host.path("opencode"));
    host.set("OPENWORK_OPENCODE_BIN", host.path("opencode"));
    host.behave(&format!("FAKE_VERSION={version}"));
    host
}

/// Replaces the binary with another version, as an upgrade does.
fn replace(host: &Host, version: &str) {
    copy_program(fake_opencode(), &host.path("new"));
    std::fs::rename(host.path("new"), host.path("opencode")).unwrap();
    host.behave(&format!("FAKE_VERSION={version}"));
}

#[test]
fn replaced_opencode_is_noticed_at_the_next_start() {
    let host = replaceable("1.18.33");
    let a = host.project("a");
    host.add(&a);
    host.openwork(["workspace", "path", "a"]).ok();
    let first = host.opencode_pid();
    assert_eq!(host.health()["engine"]["version"], "1.18.33");
    assert!(!host.openwork(["status"]).ok().stdout.contains("was replaced"));
    replace(&host, "2.3.2");
    assert!(host.openwork(["status"]).ok().stdout.contains("opencode was replaced"));
    // A client of 2.x cannot talk to a server of 1.x.
    let error = host.openwork(["run", "a", "hello"]).fails(5, "opencode_unavailable");
    assert!(error["message"].as_str().unwrap().contains("2.3.2"), "{error}");
    kill(first, Signal::KILL);
    wait_gone(first);
    wait_for("the next opencode", || host.starts().len() == 2 && host.phase() == "ready");
    assert_eq!(host.health()["engine"]["version"], "2.3.2");
    let path = host.openwork(["workspace", "path", "a"]).json();
    assert_eq!(path["path"]["directory"], json!(a));
    assert_eq!(host.routed("GET", "/w/a/api/location").send().json()["directory"], json!(a));
    let log = std::fs::read_to_string(host.file("daemon.log")).unwrap();
    assert!(log.contains("2.x migrates the sessions of 1.x"), "{log}");
    // Downgrade again.
    host.openwork(["daemon", "stop"]).ok();
    replace(&host, "1.18.33");
    let told = host.openwork(["daemon", "start"]).ok();
    assert!(told.stderr.contains("1.x does not see what 2.x has done"), "{told:?}");
    host.openwork(["workspace", "path", "a"]).ok();
    host.routed("GET", "/api/location").fails(404, "not_found");
    host.openwork(["daemon", "stop"]).ok();
    replace(&host, "2.3.2");
    let told = host.openwork(["run", "a", "--", "hello"]).ok();
    assert!(told.stderr.contains("2.x migrates the sessions of 1.x"), "{told:?}");
    let told = host.openwork(["daemon", "start"]).ok();
    assert!(!told.stderr.contains("migrates"), "the warning came twice: {told:?}");
}

#[test]
fn stop_waits_for_an_orderly_end() {
    let host = Host::new();
    host.behave("FAKE_STOP_MS=6500\nFAKE_GRANDCHILD=1");
    host.openwork(["daemon", "start"]).ok();
    host.openwork(["daemon", "stop"]).ok();
    assert!(host.processes().is_empty());
    let log = std::fs::read_to_string(host.file("daemon.log")).unwrap();
    assert!(log.contains("ended with exit status: 130"), "{log}");
    // 2.x has no call that disposes everything, so none is made.
    assert!(host.requests().iter().all(|call| call["authorized"] == true && call["method"] == "GET"));
}

#[test]
fn running_opencode_is_adopted_by_its_own_protocol() {
    for (running, replaced_by) in [("1.18.33", "2.3.2"), ("2.3.2", "1.18.33")] {
        let host = replaceable(running);
        let a = host.project("a");
        host.add(&a);
        host.openwork(["workspace", "path", "a"]).ok();
        let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
        replace(&host, replaced_by);
        kill(daemon, Signal::KILL);
        wait_gone(daemon);
        host.openwork(["daemon", "start"]).ok();
        assert_eq!((host.opencode_pid(), host.starts().len()), (opencode, 1));
        assert_eq!(host.health()["engine"]["version"], running);
        assert_eq!(host.openwork(["workspace", "path", "a"]).json()["path"]["directory"], json!(a));
        assert_eq!(host.instance(&a), ["load"]);
    }
}

// --- Clients ---

#[test]
fn clients_run_in_the_directory_of_the_workspace() {
    let (host, a, _) = host();
    let id = host.add(&a);
    let url = format!("http://127.0.0.1:{}/w/{id}", host.port());
    host.openwork(["attach", "a", "--", "--continue"]).on_terminal("").ok();
    host.openwork(["run", "a", "--", "--format", "json", "hello"]).ok();
    let clients: Vec<Value> = host.recorded("clients").iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(clients[0]["argv"], json!(["--server", url, "--continue"]));
    assert_eq!(clients[1]["argv"], json!(["run", "--server", url, "--format", "json", "hello"]));
    let password = host.password();
    for client in clients {
        assert_eq!(client["cwd"], json!(a));
        let environment = host.environment(client["pid"].as_u64().unwrap() as u32);
        assert!(environment.contains(&format!("PWD={}", a.display())));
        assert!(environment.contains(&format!("OPENCODE_PASSWORD={password}")));
        assert!(!client["argv"].to_string().contains(&password));
    }
    let env = host.openwork(["env", "a"]).secret().ok().stdout;
    for name in ["OPENCODE_PASSWORD", "OPENCODE_SERVER_PASSWORD"] {
        assert!(env.contains(&format!("export {name}='{password}'\n")), "{name}");
    }
}
