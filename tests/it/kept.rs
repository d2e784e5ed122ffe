//! Connections that serve several requests: which are kept and which are closed, that requests do not mix, and that an idle
//! connection costs next to nothing.

use std::collections::HashSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::http::{NoReply, Request};
use crate::support::random::Random;
use crate::support::{
    DEADLINE, ESTABLISHED, Host, Reply, Signal, kill, local, passed, poll, raise_limit, read_reply, read_to_close,
    resources, sockets, spelled, until, wait_for, wait_gone, whole_reply,
};

/// A host with a warm opencode and a workspace `p`.
fn host() -> (Host, PathBuf) {
    host_after("")
}

/// The same with a daemon that is started after a command of the shell.
fn host_after(shell: &str) -> (Host, PathBuf) {
    let host = Host::new();
    let p = host.project("p");
    host.openwork(["daemon", "start"]).after(shell).ok();
    host.add(&p);
    (host, p)
}

/// A request with credentials, and a body of a known length.
fn request(host: &Host, line: &str, headers: &str, body: &str) -> String {
    let (port, credentials) = (host.port(), host.credentials());
    let (method, target) = line.split_once(' ').unwrap();
    let (target, length) = (spelled(target), body.len());
    format!(
        "{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: {credentials}\r\n\
         Content-Length: {length}\r\n{headers}\r\n{body}"
    )
}

/// Sends a request on a connection that is open, and reads its reply.
fn ask(stream: &mut TcpStream, request: &str) -> Reply {
    let _ = stream.write_all(request.as_bytes());
    let method = request.split(' ').next().unwrap();
    read_reply(stream, method).unwrap_or_else(|e| panic!("{e}\nafter {request}"))
}

/// The targets below `/echo` that opencode received.
fn echoes(host: &Host) -> Vec<String> {
    let targets = host.requests().into_iter().map(|request| request["target"].as_str().unwrap().to_owned());
    targets.filter(|target| target.contains("echo")).collect()
}

/// Whether a connection has been closed by the daemon, as far as is known now.
fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let closed = match stream.read(&mut [0; 64]) {
        Ok(0) => true,
        Ok(count) => panic!("{count} bytes that nobody has asked for"),
        Err(e) => e.kind() != ErrorKind::WouldBlock,
    };
    stream.set_nonblocking(false).unwrap();
    closed
}

// --- Kept and closed connections ---

#[test]
fn requests_of_every_kind_follow_each_other() {
    let (host, p) = host();
    for mut stream in host.connections() {
        for round in 0..3 {
            let mut ask = |line: &str, headers: &str, body: &str| {
                let reply = ask(&mut stream, &request(&host, line, headers, body));
                assert!(reply.is_kept(), "{line}: {reply:?}");
                reply
            };
            let json = "Content-Type: application/json\r\n";
            assert_eq!(ask("GET /w/p/path", "", "").json()["directory"], p.to_str().unwrap());
            assert_eq!(ask("GET /workspaces", "", "").json()["workspaces"][0]["name"], "p");
            let body = "b".repeat(100_000 * round);
            let echo = ask(&format!("POST /w/p/echo?round={round}"), "", &body).json();
            assert_eq!(
                (&echo["target"], &echo["body"]),
                (&json!(passed(&format!("/echo?round={round}"), &p)), &json!(body))
            );
            assert_eq!(ask("PATCH /workspaces/p", json, r#"{"name": "p"}"#).json()["workspace"]["name"], "p");
            assert_eq!(ask("HEAD /w/p/echo", "", "").header("content-length"), Some("1000"));
            assert_eq!(ask("GET /w/p/chunked", "", "").whole_body().unwrap(), b"one two ");
            assert_eq!(ask("GET /w/p/download?bytes=1000000", "", "").body.len(), 1_000_000);
            assert_eq!(ask("GET /health", "", "").json()["ok"], true);
        }
        let chunked =
            request(&host, "POST /w/p/echo", "", "").replace("Content-Length: 0", "Transfer-Encoding: chunked");
        let chunked = chunked + "3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nX: y\r\n\r\n";
        let reply = ask(&mut stream, &chunked);
        assert!(reply.is_kept() && reply.json()["body"] == "abcde", "{reply:?}");
        host.is_in_step(stream);
    }
}

#[test]
fn allowed_origin_keeps_its_connection() {
    let (host, _) = host();
    let mut stream = host.served();
    let origin = "Origin: tauri://localhost\r\n";
    let preflight = ask(&mut stream, &request(&host, "OPTIONS /w/p/path", origin, ""));
    assert!(preflight.status == 204 && preflight.is_kept(), "{preflight:?}");
    let reply = ask(&mut stream, &request(&host, "GET /w/p/path", origin, ""));
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, Some("tauri://localhost")));
    // The origin of a request does not apply to the next one.
    let reply = ask(&mut stream, &request(&host, "GET /w/p/path", "", ""));
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, None));
    // An unproven connection is not kept.
    let reply = ask(&mut host.connect(), &request(&host, "OPTIONS /w/p/path", origin, ""));
    assert_eq!((reply.status, reply.header("connection")), (204, Some("close")));
}

#[test]
fn connection_is_closed_when_the_client_asks() {
    let (host, _) = host();
    for line in ["GET /w/p/path", "GET /workspaces", "GET /health"] {
        let plain = request(&host, line, "", "");
        for closing in [
            request(&host, line, "Connection: close\r\n", ""),
            request(&host, line, "Connection: keep-alive, Close\r\n", ""),
            request(&host, line, "Connection: x\r\nConnection: close\r\n", ""),
            plain.replace("HTTP/1.1", "HTTP/1.0"),
            request(&host, line, "Connection: keep-alive\r\n", "").replace("HTTP/1.1", "HTTP/1.0"),
        ] {
            for mut stream in host.connections() {
                let reply = ask(&mut stream, &closing);
                assert_eq!((reply.status, reply.header("connection")), (200, Some("close")), "{closing}");
                assert_eq!(read_to_close(&mut stream), b"");
            }
        }
    }
}

#[test]
fn reply_without_a_certain_end_closes_the_connection() {
    let (host, _) = host();
    for mut stream in host.connections() {
        let reply = ask(&mut stream, &request(&host, "GET /w/p/to-end", "", ""));
        assert_eq!((reply.header("connection"), &reply.body[..]), (Some("close"), &b"to the end"[..]));
        assert_eq!(read_to_close(&mut stream), b"");
    }
    for mut stream in host.connections() {
        let _ = stream.write_all(request(&host, "GET /w/p/die-mid", "", "").as_bytes());
        assert!(read_to_close(&mut stream).ends_with(b"half "));
    }
}

#[test]
fn bytes_after_a_reply_are_dropped() {
    let (host, _) = host();
    let mut stream = host.connect();
    for _ in 0..20 {
        let reply = ask(&mut stream, &request(&host, "GET /w/p/two-replies", "", ""));
        assert_eq!((reply.status, &reply.body[..]), (200, &b"asked"[..]));
        assert!(reply.is_kept());
        assert_eq!(ask(&mut stream, &request(&host, "GET /w/p/echo?after", "", "")).json()["method"], "GET");
    }
    host.is_in_step(stream);
}

// --- The connections to opencode ---

/// The numbers of the connections on which opencode got requests for this path.
fn connections_of(host: &Host, path: &str) -> Vec<u64> {
    let requests = host.requests().into_iter();
    let of_path = requests.filter(|request| request["target"].as_str().unwrap().contains(path));
    of_path.map(|request| request["connection"].as_u64().unwrap()).collect()
}

fn distinct(numbers: &[u64]) -> usize {
    numbers.iter().collect::<HashSet<_>>().len()
}

#[test]
fn connection_to_opencode_is_reused() {
    let (host, _) = host();
    let mut stream = host.connect();
    for _ in 0..20 {
        assert_eq!(ask(&mut stream, &request(&host, "GET /w/p/echo?same", "", "")).status, 200);
    }
    // One, unless this machine was busy with something else for seconds.
    assert!(distinct(&connections_of(&host, "?same")) < 5);
    // The same for every client.
    for _ in 0..20 {
        assert_eq!(host.routed("GET", "/w/p/echo?others").send().status, 200);
    }
    assert!(distinct(&connections_of(&host, "?others")) < 5);
    // Also after a reply whose body comes in many pieces.
    for _ in 0..20 {
        assert_eq!(ask(&mut stream, &request(&host, "GET /w/p/download?bytes=300000", "", "")).body.len(), 300_000);
    }
    assert!(distinct(&connections_of(&host, "/download")) < 5);
    // A request that must not be repeated never uses a connection that opencode may be closing.
    for method in ["POST", "DELETE", "GET"] {
        for _ in 0..5 {
            let body = if method == "GET" { "body" } else { "" };
            ask(&mut stream, &request(&host, &format!("{method} /w/p/echo?once"), "", body));
        }
    }
    assert_eq!(distinct(&connections_of(&host, "?once")), 15);
}

#[test]
fn connection_closed_by_opencode_is_not_reused() {
    let (host, _) = host();
    let mut stream = host.connect();
    for _ in 0..20 {
        assert_eq!(ask(&mut stream, &request(&host, "GET /w/p/close-after", "", "")).json(), "the last");
        assert!(ask(&mut stream, &request(&host, "GET /w/p/path", "", "")).is_kept());
    }
    // A connection is not reused after a truncated reply, or a reply without framing.
    for target in ["/w/p/die-mid", "/w/p/to-end", "/w/p/die-first", "/w/p/two-replies"] {
        let _ = host.routed("GET", target).try_send();
        let path = target.trim_start_matches("/w/p");
        let before = *connections_of(&host, path).last().unwrap();
        host.routed("GET", &format!("/w/p/echo?after{path}")).send();
        assert_ne!(connections_of(&host, &format!("?after{path}"))[0], before, "{target}");
    }
}

#[test]
fn request_lost_on_a_closing_connection_is_repeated() {
    let host = Host::new();
    host.behave("FAKE_ONE_REQUEST=1");
    host.openwork(["daemon", "start"]).ok();
    host.add(host.project("p"));
    let mut stream = host.connect();
    for number in 0..10 {
        assert_eq!(ask(&mut stream, &request(&host, &format!("GET /w/p/echo?get={number}"), "", "")).status, 200);
        assert_eq!(ask(&mut stream, &request(&host, &format!("POST /w/p/echo?post={number}"), "", "x")).status, 200);
    }
    let lost = host.recorded("unanswered");
    assert!(lost.iter().any(|target| target.contains("?get=")), "{lost:?}");
    assert!(!lost.iter().any(|target| target.contains("?post=")), "{lost:?}");
    assert_eq!((host.starts().len(), &host.health()["engine"]["restarts"]), (1, &json!(0)));
}

#[test]
fn connection_to_opencode_does_not_outlive_it() {
    let (host, p) = host();
    let mut stream = host.connect();
    let path = request(&host, "GET /w/p/path", "", "");
    for _ in 0..3 {
        assert_eq!(ask(&mut stream, &path).json()["directory"], p.to_str().unwrap());
        let before = host.opencode_pid();
        kill(before, Signal::KILL);
        wait_gone(before);
        assert_eq!(ask(&mut stream, &path).json()["directory"], p.to_str().unwrap());
        assert_ne!(host.opencode_pid(), before);
    }
    // The same when the next daemon adopts it.
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
    assert_eq!(read_to_close(&mut stream), b"");
    host.openwork(["daemon", "start"]).ok();
    let mut stream = host.connect();
    assert_eq!(ask(&mut stream, &path).json()["directory"], p.to_str().unwrap());
    assert_eq!(host.opencode_pid(), opencode);
}

#[test]
fn idle_connection_does_not_count_as_use() {
    let host = Host::new();
    let p = host.project("p");
    host.openwork(["daemon", "start", "--idle-ttl", "1s"]).ok();
    host.add(&p);
    let mut stream = host.connect();
    assert!(ask(&mut stream, &request(&host, "GET /w/p/path", "", "")).is_kept());
    wait_for("the instance to be evicted", || host.instance(&p).contains(&"dispose".to_owned()));
    drop(stream);
}

// --- Checks of each request ---

#[test]
fn each_request_is_checked_by_itself() {
    let (host, _) = host();
    let good = request(&host, "GET /w/p/echo?good", "", "");
    let before = echoes(&host).len();
    let host_line = format!("Host: 127.0.0.1:{}", host.port());
    for (bad, status, code) in [
        (good.replace(&host_line, "Host: evil.example"), 403, "forbidden_host"),
        (good.replace(&host_line, &format!("Host: 127.0.0.2:{}", host.port())), 403, "forbidden_host"),
        (good.replace("Content-", "Origin: http://evil.example\r\nContent-"), 403, "forbidden_origin"),
        (good.replace("Content-", "Sec-Fetch-Site: cross-site\r\nContent-"), 403, "forbidden_origin"),
        (good.replace("Basic ", "Basic x"), 401, "unauthorized"),
        (good.replace("Authorization", "X-Authorization"), 401, "unauthorized"),
        (good.replace("GET /w", "GET http://127.0.0.1/w"), 400, "bad_request"),
        (good.replace("\r\n", "\n"), 400, "bad_request"),
    ] {
        let mut stream = host.connect();
        for _ in 0..2 {
            assert!(ask(&mut stream, &good).is_kept());
        }
        let reply = ask(&mut stream, &bad.replace("?good", "?bad"));
        reply.refused(status, code);
        assert_eq!(reply.header("connection"), Some("close"), "{bad}");
        assert_eq!(read_to_close(&mut stream), b"");
    }
    let echoes = &echoes(&host)[before..];
    assert!(echoes.len() == 16 && echoes.iter().all(|target| target.contains("?good")), "{echoes:?}");
}

#[test]
fn nothing_of_a_request_is_in_the_next() {
    let (host, p) = host();
    let mut stream = host.connect();
    let more = "X-First: 1\r\nCookie: a=b\r\nX-Openwork-Timeout: 5\r\nOrigin: tauri://localhost\r\n";
    ask(&mut stream, &request(&host, "POST /w/p/echo?first", more, "the first body"));
    let echo = ask(&mut stream, &request(&host, "GET /w/p/echo?second", "", "")).json();
    assert_eq!((&echo["target"], &echo["body"]), (&json!(passed("/echo?second", &p)), &json!("")));
    let names: HashSet<String> = echo["headers"].as_array().unwrap().iter().map(name_of).collect();
    let expected = ["host", "authorization", "x-opencode-directory", "content-length", "connection"];
    assert!(names.iter().all(|name| expected.contains(&name.as_str())), "{names:?}");
}

fn name_of(header: &Value) -> String {
    header[0].as_str().unwrap().to_ascii_lowercase()
}

#[test]
fn of_two_requests_at_once_one_is_answered() {
    let (host, _) = host();
    for line in ["GET /w/p/echo?one", "GET /workspaces"] {
        for mut stream in host.connections() {
            let two = request(&host, line, "", "") + &request(&host, "POST /w/p/echo?two", "", "");
            let reply = ask(&mut stream, &two);
            assert_eq!((reply.status, reply.header("connection")), (200, Some("close")), "{reply:?}");
            assert_eq!(read_to_close(&mut stream), b"");
        }
    }
    assert!(echoes(&host).iter().all(|target| target.contains("?one")));
}

/// Closing a socket with unread bytes resets the connection: the client would lose what is still under way.
#[test]
fn reply_before_unread_requests_arrives_whole() {
    /// More than the buffer of a client that does not read, and less than both sides take together.
    const BYTES: usize = 250_000;
    let (host, _) = host();
    for connect in [Host::connect, Host::served] {
        let mut stream = connect(&host);
        let request = request(&host, &format!("GET /w/p/download?bytes={BYTES}"), "", "");
        // More requests than the daemon reads with the first.
        stream.write_all(request.repeat(500).as_bytes()).unwrap();
        wait_for("the daemon to end the connection", || sockets(host.port(), ESTABLISHED).is_empty());
        let reply = Reply::parse(&read_to_close(&mut stream)).unwrap();
        assert_eq!((reply.header("connection"), reply.body.len()), (Some("close"), BYTES));
    }
}

#[test]
fn head_timeout_starts_with_the_first_byte() {
    let (host, _) = host();
    let whole = request(&host, "GET /w/p/path", "", "");
    let mut stream = host.served();
    // Longer than a head may take.
    thread::sleep(Duration::from_millis(2500));
    assert!(ask(&mut stream, &whole).is_kept());
    stream.write_all(&whole.as_bytes()[..20]).unwrap();
    let reply = Reply::parse(&read_to_close(&mut stream)).expect("an answer");
    reply.refused(400, "bad_request");
}

/// Reads replies until `enough`; false when the connection ends, or nothing more comes for a while.
fn read_until(stream: &mut TcpStream, bytes: &mut Vec<u8>, enough: impl Fn(&[u8]) -> bool) -> bool {
    let mut buffer = [0; 4096];
    while !enough(bytes) {
        match stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(count) => bytes.extend(&buffer[..count]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    true
}

/// Requests that no client sends, each before one that a client does, on one connection for as long as
/// that is kept: each reply is the one to its request.
#[test]
fn reply_does_not_depend_on_earlier_requests() {
    const REQUESTS: usize = 1000;
    /// Long enough for most replies. It only decides what is sent next.
    const A_WHILE: Duration = Duration::from_millis(100);
    let (host, p) = host();
    let leak = "X-Leak: leak\r\n";
    let chunked = request(&host, "POST /w/p/echo?seed", leak, "");
    let chunked = chunked.replace("Content-Length: 0", "Transfer-Encoding: chunked") + "5\r\nhello\r\n0\r\n\r\n";
    let seeds = [
        request(&host, "GET /w/p/echo?seed", leak, ""),
        request(&host, "POST /w/p/echo?seed", leak, &request(&host, "DELETE /w/p/echo?evil", "", "")),
        chunked,
        request(&host, "GET /workspaces", "Origin: tauri://localhost\r\n", ""),
        request(&host, "POST /workspaces/p/activate", "Content-Type: application/json\r\n", "{}"),
        request(&host, "GET /w/p/path", "X-Leak: leak\r\nX-Openwork-Timeout: 3\r\n", ""),
    ];
    let mut random = Random(0xc0ffee);
    let (mut kept, mut in_step) = (None, 0);
    for number in 0..REQUESTS {
        let mut first = seeds[random.below(seeds.len())].clone().into_bytes();
        for _ in 0..random.below(3) {
            random.mutate(&mut first);
        }
        let mut stream: TcpStream = kept.take().unwrap_or_else(|| host.connect());
        stream.set_read_timeout(Some(A_WHILE)).unwrap();
        let _ = stream.write_all(&first);
        let mut bytes = Vec::new();
        // Mostly wait for the reply, as clients do.
        let waits = random.below(4) > 0;
        let is_replied = waits && read_until(&mut stream, &mut bytes, |bytes| whole_reply(bytes, "GET").is_some());
        let is_kept = is_replied && whole_reply(&bytes, "GET").is_some_and(|reply| reply.is_kept());
        let replies = bytes.len();
        let marked = format!("/w/p/echo?marked={number}");
        let _ = stream.write_all(request(&host, &format!("GET {marked}"), "", "").as_bytes());
        let shown =
            |bytes: &[u8]| (String::from_utf8_lossy(&first).into_owned(), String::from_utf8_lossy(bytes).into_owned());
        if is_kept {
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let is_whole = read_until(&mut stream, &mut bytes, |bytes| whole_reply(&bytes[replies..], "GET").is_some());
            assert!(is_whole, "{:?}", shown(&bytes));
            let reply = whole_reply(&bytes[replies..], "GET").unwrap();
            assert!(reply.status == 200 && reply.is_kept(), "{:?}", shown(&bytes));
            let echo = reply.json();
            let target = passed(&format!("/echo?marked={number}"), &p);
            assert_eq!((&echo["method"], &echo["target"], &echo["body"]), (&json!("GET"), &json!(target), &json!("")));
            assert!(!echo["headers"].as_array().unwrap().iter().any(|header| name_of(header) == "x-leak"), "{echo}");
            in_step += 1;
            kept = Some(stream);
        } else {
            // Whatever the daemon sends must be valid replies, and must end.
            let _ = stream.shutdown(Shutdown::Write);
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            bytes.extend(read_to_close(&mut stream));
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let reply = Reply::parse(rest).unwrap_or_else(|| panic!("{:?}", shown(&bytes)));
                let length: usize = reply.header("content-length").map_or(0, |length| length.parse().unwrap());
                rest = reply.body.get(length..).map(|left| &rest[rest.len() - left.len()..]).unwrap_or_default();
            }
        }
    }
    assert!(in_step > REQUESTS / 10, "{in_step}");
    let requests = host.requests();
    let targets: Vec<&str> = requests.iter().map(|request| request["target"].as_str().unwrap()).collect();
    let marked: Vec<_> = targets.iter().filter(|target| target.contains("marked=")).collect();
    assert_eq!(marked.iter().collect::<HashSet<_>>().len(), marked.len(), "a request was sent twice");
    assert!(!targets.iter().any(|target| target.contains("evil")), "a body became a request");
    assert!(requests.iter().all(|request| request["authorized"] == true));
}

// --- Idle connections ---

/// Resident memory of a process. Bytes.
fn resident(pid: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

/// Connections that have served a request each.
fn idle(host: &Host, count: usize) -> Vec<TcpStream> {
    let request = request(host, "GET /w/p/path", "", "");
    let open = |_| {
        let mut stream = host.connect();
        assert!(ask(&mut stream, &request).is_kept());
        stream
    };
    (0..count).map(open).collect()
}

#[test]
fn idle_connection_has_no_thread() {
    const COUNT: usize = 200;
    let (host, _) = host();
    let pid = host.daemon_pid();
    // Warm up: the first threads leave memory behind once.
    drop(idle(&host, 50));
    let open = || sockets(host.port(), ESTABLISHED).len();
    wait_for("them to be gone", || open() == 0);
    let threads = resources(pid).1;
    let memory = resident(pid);
    // The daemon itself starts a thread now and then.
    let few = threads + COUNT / 20;
    let streams = until("as many to be idle at the same time", || {
        let streams = idle(&host, COUNT);
        poll(Duration::from_secs(5), || (resources(pid).1 <= few).then_some(()))?;
        // On a slow machine the time of the first ones is over by then.
        (open() >= COUNT).then_some(streams)
    });
    let more = resident(pid).saturating_sub(memory);
    assert!(more < 1_000_000, "{more} bytes more for {COUNT} idle connections");
    host.health();
    drop(streams);
}

#[test]
fn abandoned_connections_are_closed_after_their_time() {
    let (host, _) = host();
    host.health();
    let before = resources(host.daemon_pid());
    raise_limit();
    // More than there are slots: the oldest make room.
    let mut streams = Vec::new();
    for _ in 0..10 {
        streams.extend(idle(&host, 200));
    }
    host.health();
    host.openwork(["workspace", "list"]).ok();
    for stream in &mut streams {
        assert_eq!(read_to_close(stream), b"");
    }
    wait_for("descriptors and threads to be back", || {
        let now = resources(host.daemon_pid());
        now.0 <= before.0 && now.1 <= before.1
    });
}

#[test]
fn idle_connections_go_first() {
    // 48 slots.
    let (host, _) = host_after("ulimit -n 256");
    let mut events: Vec<_> = (0..20).map(|_| host.http("GET", "/events").events()).collect();
    // Each crew may keep one thread more than it needed so far.
    let threads = resources(host.daemon_pid()).1 + 2;
    let mut streams = idle(&host, 10);
    for _ in 0..10 {
        // A connection is idle when its thread has left it.
        wait_for("them to be idle", || resources(host.daemon_pid()).1 <= threads);
        // The connection in use is not the oldest.
        assert!(ask(&mut streams[9], &request(&host, "GET /workspaces", "", "")).is_kept());
        wait_for("it to be idle", || resources(host.daemon_pid()).1 <= threads);
        streams.extend(idle(&host, 10));
    }
    wait_for("the oldest to be closed", || is_closed(&mut streams[0]));
    assert!(!is_closed(&mut streams[9]));
    host.is_in_step(streams.pop().unwrap());
    host.openwork(["workspace", "rename", "p", "q"]).ok();
    for events in &mut events {
        assert!(events.find(|event| event["type"] == "workspace.renamed").is_some());
    }
}

#[test]
fn client_disconnect_leaves_nothing() {
    let (host, _) = host();
    host.health();
    let pid = host.daemon_pid();
    let before = resources(pid);
    for _ in 0..10 {
        drop(idle(&host, 100));
    }
    wait_for("descriptors and threads to be back", || {
        let now = resources(pid);
        now.0 <= before.0 && now.1 <= before.1
    });
}

// --- The end of a daemon ---

#[test]
fn restart_closes_idle_connections_and_no_request() {
    let (host, p) = host();
    let mut streams = idle(&host, 20);
    let pid = host.daemon_pid();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let request = request(&host, "GET /w/p/path", "", "");
                    let (mut stream, mut count) = (host.connect(), 0);
                    while !is_over.load(Ordering::Relaxed) {
                        let _ = stream.write_all(request.as_bytes());
                        match read_reply(&mut stream, "GET") {
                            Ok(reply) => {
                                assert_eq!(reply.json()["directory"], p.to_str().unwrap());
                                count += 1;
                                if !reply.is_kept() {
                                    stream = host.connect();
                                }
                            }
                            // As clients do with a connection that is closed while it is idle.
                            Err(NoReply::CutOff(bytes)) if bytes.is_empty() => stream = host.connect(),
                            Err(e) => panic!("{e}"),
                        }
                    }
                    count
                })
            })
            .collect();
        for _ in 0..3 {
            host.openwork(["daemon", "restart"]).ok();
        }
        is_over.store(true, Ordering::Relaxed);
        let counts: Vec<usize> = clients.into_iter().map(|client| client.join().unwrap()).collect();
        assert!(counts.iter().all(|count| *count > 10), "{counts:?}");
    });
    for stream in &mut streams {
        assert_eq!(read_to_close(stream), b"");
    }
    assert_eq!(host.daemon_pid(), pid);
}

#[test]
fn new_connection_is_answered_during_a_restart() {
    let (host, p) = host();
    let request = request(&host, "GET /w/p/path", "", "");
    // The daemon waits for a new connection for no longer than for any, and this machine may be slow.
    let is_answered = (0..10).any(|_| {
        let (mut new, mut idle) = (host.connect(), host.served());
        thread::scope(|scope| {
            let restart = scope.spawn(|| host.openwork(["daemon", "restart"]).ok());
            // The daemon has begun to end.
            assert_eq!(read_to_close(&mut idle), b"");
            let _ = new.write_all(request.as_bytes());
            let reply = read_reply(&mut new, "GET");
            restart.join().unwrap();
            reply.is_ok_and(|reply| reply.json()["directory"] == p.to_str().unwrap())
        })
    });
    assert!(is_answered);
}

#[test]
fn requests_in_flight_at_a_stop_get_their_reply() {
    let (host, _) = host();
    let ask_until_gone = || {
        let (address, mut replies) = (local(host.port()), Vec::new());
        while let Ok(reply) = Request::new(address, "GET", "/workspaces").send() {
            replies.push(reply);
        }
        replies
    };
    let stop = |_| {
        host.openwork(["daemon", "start"]).ok();
        let replies = thread::scope(|scope| {
            let clients: Vec<_> = (0..8).map(|_| scope.spawn(ask_until_gone)).collect();
            host.openwork(["daemon", "stop"]).ok();
            clients.into_iter().flat_map(|client| client.join().unwrap()).collect::<Vec<_>>()
        });
        replies.len() >= 16 && replies.iter().all(|reply| reply.status == 200)
    };
    // A busy machine may take longer for a request than a stop waits.
    wait_for("three stops in a row to end no request", || (0..3).all(stop));
}

/// A stop waits for a client that has begun to ask, and not for one that has never shown itself.
#[test]
fn stop_closes_a_silent_connection_before_it_answers_the_last_request() {
    // The daemon waits for a second, and this machine may be busy.
    wait_for("a stop in this order", || {
        let host = Host::new();
        host.openwork(["daemon", "start"]).ok();
        let (mut silent, mut asking) = (host.connect(), host.served());
        let request = request(&host, "GET /workspaces", "", "");
        let (begin, rest) = request.split_at(20);
        asking.write_all(begin.as_bytes()).unwrap();
        host.health();
        let stop = host.openwork(["daemon", "stop"]).spawn();
        assert_eq!(read_to_close(&mut silent), b"");
        // Longer than the daemon takes to end once it has waited, and not as long as it waits.
        thread::sleep(Duration::from_millis(300));
        let _ = asking.write_all(rest.as_bytes());
        let reply = read_reply(&mut asking, "GET");
        assert!(stop.wait().status.success());
        reply.is_ok_and(|reply| reply.status == 200)
    });
}

#[test]
fn stop_closes_idle_connections() {
    let (host, _) = host();
    let mut streams = idle(&host, 50);
    host.openwork(["daemon", "stop"]).ok();
    for stream in &mut streams {
        assert!(is_closed(stream));
    }
}

/// What takes two users: root, and an account without rights.
mod as_root {
    use super::*;

    #[test]
    #[ignore = "needs root, to become another user"]
    fn connection_of_another_user_is_not_kept() {
        let (host, _) = host();
        let request = format!("GET /health HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n\r\n", host.port());
        let reply = host.send_raw_as_another_user(&request);
        assert_eq!((reply.status, reply.header("connection")), (200, Some("close")), "{reply:?}");
    }
}
