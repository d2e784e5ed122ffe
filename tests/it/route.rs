//! `/w/<ws>/…`: OpenCode's calls, moved to the directory of the workspace and otherwise unchanged.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;

use serde_json::{Value, json};

use crate::support::{
    ALL_EVENTS, ESTABLISHED, EVENTS, Host, IS_V2, Reply, Signal, is_alive, kill, passed, read_reply, read_to_close,
    sockets, spelled, wait_for, wait_gone,
};

/// A host with a warm opencode and two workspaces, `p` and `q`.
fn host() -> (Host, PathBuf, PathBuf) {
    let host = Host::new();
    let (p, q) = (host.project("p"), host.project("q"));
    host.openwork(["daemon", "start"]).ok();
    host.add(&p);
    host.add(&q);
    (host, p, q)
}

/// The request as `/echo` received it.
fn echo(reply: &Reply) -> Value {
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()
}

/// The values of a header in an echoed request.
fn header(echo: &Value, name: &str) -> Vec<String> {
    let headers = echo["headers"].as_array().unwrap().iter();
    let of_name = headers.filter(|header| header[0].as_str().unwrap().eq_ignore_ascii_case(name));
    of_name.map(|header| header[1].as_str().unwrap().to_owned()).collect()
}

/// The requests that opencode received, without those of the daemon itself.
fn calls(host: &Host) -> Vec<Value> {
    let requests = host.requests().into_iter();
    let ours = ["/global/", "/api/info", "/api/event", "/api/debug/location"];
    let is_ours = |target: &str| ours.iter().any(|path| target.starts_with(path));
    requests.filter(|request| !is_ours(request["target"].as_str().unwrap())).collect()
}

// --- The directory ---

#[test]
fn call_acts_in_the_directory_of_its_workspace() {
    let (host, p, q) = host();
    for (name, directory) in [("p", &p), ("q", &q), ("@active", &p)] {
        let reply = host.routed("GET", &format!("/w/{name}/path")).send();
        assert_eq!(reply.json()["directory"], directory.to_str().unwrap());
    }
    assert_eq!(host.starts().len(), 1);
}

#[test]
fn unusual_directory_names_reach_opencode() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    for name in ["with space", "ünïcödé", "100%", "%2F", "plus+and&=?#", "quote\"'", "new\nline"] {
        let project = host.project(name);
        let id = host.add(&project);
        let reply = host.routed("GET", &format!("/w/{id}/path")).send();
        assert_eq!(reply.json()["directory"], project.to_str().unwrap());
    }
}

#[test]
fn client_cannot_choose_another_directory() {
    let (host, p, q) = host();
    let other = q.to_str().unwrap();
    for query in [
        format!("directory={other}"),
        format!("x=1&directory={other}&y=2"),
        format!("directory={other}&directory={other}"),
        format!("%64irectory={other}"),
        format!("%64%69%72%65%63%74%6F%72%79={}", other.replace('/', "%2F")),
        format!("location%5Bdirectory%5D={other}"),
        format!("location%5bdirectory%5d={other}"),
        format!("location[directory]={other}"),
        "directory".to_owned(),
        "directory=".to_owned(),
        "workspace=wrk_1".to_owned(),
        "work%73pace=wrk_1".to_owned(),
        "location%5Bworkspace%5D=wrk_1".to_owned(),
        "&&directory=/&&".to_owned(),
    ] {
        for path in ["path", "api/anything"] {
            host.routed("GET", &format!("/w/p/{path}?{query}")).send();
        }
    }
    let with_headers = host.routed("GET", "/w/p/echo?a=b&workspace=wrk_1&location[workspace]=wrk_1&c");
    let with_headers = with_headers.header("X-OpenCode-Workspace", "wrk_1").header("X-OpenCode-Directory", other);
    let got = echo(&with_headers.send());
    assert_eq!((&got["target"], header(&got, "x-opencode-workspace").len()), (&json!(passed("/echo?a=b&c", &p)), 0));
    let with_header = host.routed("GET", "/w/p/path").header("x-opencode-directory", other);
    assert_eq!(with_header.send().json()["directory"], p.to_str().unwrap());
    let twice = host.routed("GET", "/w/p/path").header("X-OpenCode-Directory", other);
    twice.and_header("x-opencode-directory", other).send();

    let directories: Vec<Value> = calls(&host).iter().map(|call| call["directory"].clone()).collect();
    assert!(directories.len() > 11 && directories.iter().all(|of| *of == p.to_str().unwrap()), "{directories:?}");
    assert_eq!(host.instance(&q), [""; 0]);
}

#[test]
fn path_is_forwarded_verbatim() {
    let (host, p, _) = host();
    for path in [
        "/echo/../x",
        "/%2e%2e/q/path",
        "/..%2Fq",
        "//double",
        "/a//b/",
        "/./x",
        "/%41",
        "/a;b=c,d",
        "/x?a=%20+b&&c=d=e?f&g",
        "/?x",
    ] {
        host.routed("GET", &format!("/w/p{path}")).send();
        let call = calls(&host).pop().unwrap();
        assert_eq!((&call["target"], &call["directory"]), (&json!(passed(path, &p)), &json!(p.to_str().unwrap())));
    }
    // The root, with and without its slash.
    for path in ["", "/"] {
        host.routed("GET", &format!("/w/p{path}")).send();
        assert_eq!(calls(&host).pop().unwrap()["target"], "/");
    }
}

#[test]
fn path_cannot_leave_its_workspace() {
    let (host, ..) = host();
    for target in [
        "/w/../workspaces",
        "/w/./p/path",
        "/w//p/path",
        "/w/%2e%2e/workspaces",
        "/w",
        "/w/",
        "/W/p/path",
        "/x/w/p/path",
    ] {
        let reply = host.routed("GET", target).send();
        assert!(matches!(reply.status, 400 | 404), "{target}: {reply:?}");
    }
    assert_eq!(calls(&host), [Value::Null; 0]);
}

// --- The request ---

#[test]
fn request_is_forwarded_unchanged() {
    let (host, p, _) = host();
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"] {
        let request =
            host.routed(method, "/w/p/echo?a=1&b=%20").header("X-Custom", "one").and_header("x-custom", "two");
        let request =
            request.header("Accept", "a/b;q=0.5, */*").header("Cookie", "c=d").header("Content-Type", "text/x");
        let got = echo(&request.body("the body").send());
        assert_eq!((&got["method"], &got["target"]), (&json!(method), &json!(passed("/echo?a=1&b=%20", &p))));
        assert_eq!((&got["length"], &got["body"]), (&json!(8), &json!("the body")));
        assert_eq!(header(&got, "x-custom"), ["one", "two"]);
        for (name, value) in
            [("accept", "a/b;q=0.5, */*"), ("cookie", "c=d"), ("content-type", "text/x"), ("content-length", "8")]
        {
            assert_eq!(header(&got, name), [value], "{name}");
        }
        // The daemon replaces these.
        assert_eq!(header(&got, "host"), [host.opencode_address().to_string()]);
        assert_eq!(header(&got, "authorization"), [host.credentials()]);
        assert_eq!(header(&got, "x-opencode-directory").len(), 1);
    }
}

#[test]
fn hop_by_hop_headers_are_not_forwarded() {
    let (host, ..) = host();
    let request =
        host.routed("GET", "/w/p/echo").header("Connection", "keep-alive, X-Only-Here").header("X-Only-Here", "1");
    let request =
        request.header("Keep-Alive", "timeout=5").header("Proxy-Connection", "keep-alive").header("TE", "trailers");
    let request = request.header("X-Openwork-Timeout", "10").header("X-Stays", "1");
    let reply = request.send();
    assert!(reply.is_kept(), "{reply:?}");
    let got = echo(&reply);
    for name in ["keep-alive", "proxy-connection", "te", "x-only-here", "x-openwork-timeout", "upgrade"] {
        assert_eq!(header(&got, name), [""; 0], "{name}");
    }
    assert_eq!(header(&got, "x-stays"), ["1"]);
}

#[test]
fn connection_header_cannot_remove_the_framing() {
    let (host, ..) = host();
    // Without its length the body would be parsed as further requests.
    let body = "DELETE /session/evil HTTP/1.1\r\nHost: x\r\n\r\n";
    for named in ["content-length", "close, Content-Length", "Upgrade, content-length"] {
        let request = host.routed("POST", "/w/p/echo").and_header("Connection", named).and_header("Upgrade", "x");
        assert_eq!(echo(&request.body(body).send())["body"], body, "{named}");
    }
    let headers = "Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n";
    let reply = host.send_raw(head(&host, "POST /w/p/echo", headers) + "5\r\nhello\r\n0\r\n\r\n");
    assert_eq!(echo(&Reply::parse(&reply).unwrap())["body"], "hello");
    assert!(calls(&host).iter().all(|call| call["method"] == "POST"));
}

#[test]
fn body_of_any_size_is_forwarded() {
    const SIZE: usize = 5_000_000;
    let (host, ..) = host();
    let bytes = host.routed("POST", "/w/p/upload").body(vec![b'u'; SIZE]).send().json();
    assert_eq!(bytes["bytes"], SIZE);

    let mut chunked = Vec::new();
    for chunk in vec![b'c'; SIZE].chunks(77_777) {
        write!(chunked, "{:x};extension=\"1\"\r\n", chunk.len()).unwrap();
        chunked.extend(chunk);
        chunked.extend(b"\r\n");
    }
    chunked.extend(b"0\r\nX-Trailer: 1\r\n\r\n");
    let head = head(&host, "POST /w/p/upload", "Transfer-Encoding: chunked\r\n");
    let reply = Reply::parse(&host.send_raw([head.as_bytes(), &chunked].concat())).unwrap();
    assert_eq!(reply.json()["bytes"], SIZE);
}

/// The head of a request with credentials.
fn head(host: &Host, line: &str, headers: &str) -> String {
    let (port, credentials) = (host.port(), host.credentials());
    let (method, target) = line.split_once(' ').unwrap();
    let target = spelled(target);
    format!("{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: {credentials}\r\n{headers}\r\n")
}

#[test]
fn expect_100_continue_is_answered() {
    let (host, ..) = host();
    let mut stream = host.connect();
    stream
        .write_all(
            head(&host, "POST /w/p/echo", "Connection: close\r\nExpect: 100-continue\r\nContent-Length: 4\r\n")
                .as_bytes(),
        )
        .unwrap();
    let mut interim = [0; 12];
    stream.read_exact(&mut interim).unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100");
    stream.write_all(b"body").unwrap();
    let rest = read_to_close(&mut stream);
    let rest = String::from_utf8(rest).unwrap();
    assert!(rest.contains("HTTP/1.1 200") && rest.contains(r#""body":"body""#), "{rest}");
}

#[test]
fn bytes_after_a_request_are_not_forwarded() {
    let (host, p, _) = host();
    let hidden = head(&host, "POST /w/p/session", "Content-Length: 0\r\n");
    for request in [
        head(&host, "GET /w/p/echo", "") + &hidden,
        head(&host, "POST /w/p/echo", "Content-Length: 4\r\n") + "body" + &hidden,
        head(&host, "POST /w/p/echo", "Transfer-Encoding: chunked\r\n") + "4\r\nbody\r\n0\r\n\r\n" + &hidden,
    ] {
        for stream in host.connections() {
            let reply = Reply::parse(&host.send_raw_on(stream, &request)).unwrap();
            let length: usize = reply.header("content-length").unwrap().parse().unwrap();
            assert_eq!((reply.status, reply.body.len(), reply.header("connection")), (200, length, Some("close")));
        }
    }
    let calls = calls(&host);
    assert!(calls.len() == 6 && calls.iter().all(|call| call["target"] == passed("/echo", &p)), "{calls:?}");
}

#[test]
fn bytes_after_a_split_body_are_not_forwarded() {
    let (host, p, _) = host();
    let hidden = head(&host, "POST /w/p/session", "Content-Length: 0\r\n");
    let pieces = [
        ("Content-Length: 8\r\n", "the ", "body"),
        ("Transfer-Encoding: chunked\r\n", "4\r\nthe ", "\r\n4\r\nbody\r\n0\r\n\r\n"),
    ];
    let connections = pieces.into_iter().flat_map(|pieces| host.connections().map(|stream| (pieces, stream)));
    for (count, ((framing, first, last), mut stream)) in connections.enumerate() {
        let request = head(&host, "POST /w/p/echo", framing) + first;
        stream.write_all(request.as_bytes()).unwrap();
        // Send the second piece once the first has reached opencode.
        wait_for("opencode to have the head", || calls(&host).len() == count + 1);
        stream.write_all((last.to_owned() + &hidden).as_bytes()).unwrap();
        assert_eq!(echo(&Reply::parse(&read_to_close(&mut stream)).unwrap())["body"], "the body");
    }
    let calls = calls(&host);
    assert!(calls.len() == 4 && calls.iter().all(|call| call["target"] == passed("/echo", &p)), "{calls:?}");
}

#[test]
fn conflicting_lengths_are_refused() {
    let (host, ..) = host();
    for headers in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        "Content-Length: 4\r\nContent-Length: 5\r\n",
        "Content-Length: 4, 5\r\n",
        "Content-Length: +4\r\n",
        "Content-Length: 0x4\r\n",
        "Content-Length : 4\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    ] {
        let request = head(&host, "POST /w/p/echo", headers) + "0\r\n\r\n";
        for stream in host.connections() {
            let reply = Reply::parse(&host.send_raw_on(stream, &request)).unwrap();
            reply.refused(400, "bad_request");
        }
    }
    assert_eq!(calls(&host), [Value::Null; 0]);
}

#[test]
fn malformed_chunks_are_refused() {
    let (host, ..) = host();
    for chunks in ["zz\r\n", "-1\r\n", "4\r\nbodyX", "ffffffffffffffffff\r\n", "4 4\r\nbody\r\n0\r\n\r\n", "\r\n"] {
        let request = head(&host, "POST /w/p/upload", "Transfer-Encoding: chunked\r\n") + chunks;
        // The daemon may refuse or close, but must neither accept the body nor wait.
        for stream in host.connections() {
            let reply = Reply::parse(&host.send_raw_on(stream, &request));
            assert!(reply.is_none_or(|reply| reply.status >= 400), "{chunks:?}");
        }
    }
    host.routed("GET", "/w/p/path").send();
}

#[test]
fn truncated_request_is_dropped() {
    let (host, ..) = host();
    let ends = [Shutdown::Write, Shutdown::Both];
    for (end, mut stream) in ends.into_iter().flat_map(|end| host.connections().map(|stream| (end, stream))) {
        let head = head(&host, "POST /w/p/upload", "Content-Length: 1000\r\n");
        stream.write_all((head + "not all of it").as_bytes()).unwrap();
        stream.shutdown(end).unwrap();
        let reply = Reply::parse(&read_to_close(&mut stream));
        assert!(reply.is_none_or(|reply| reply.status >= 400));
    }
    wait_for("no request to be under way", || streams(&host, "p") == 0);
}

/// How many requests are under way in a workspace.
fn streams(host: &Host, name: &str) -> u64 {
    let instances = host.http("GET", "/instances").ok();
    let instances = instances["instances"].as_array().unwrap().iter();
    let mut of_name = instances.filter(|instance| instance["workspace"]["name"] == name);
    of_name.next().unwrap()["openStreams"].as_u64().unwrap()
}

// --- The reply ---

#[test]
fn reply_is_forwarded_unchanged() {
    let (host, ..) = host();
    let page = if IS_V2 { "/w/p/" } else { "/w/p/anything" };
    let html = host.routed("GET", page).send();
    assert_eq!((html.status, html.header("content-type")), (200, Some("text/html")));
    assert!(html.body.starts_with(b"<!doctype html>"));

    let large = host.routed("GET", "/w/p/download?bytes=5000000").send();
    assert!(large.body.len() == 5_000_000 && large.body.iter().all(|byte| *byte == b'd'));

    // Chunks and trailers stay as they are.
    let chunked = host.send_raw(head(&host, "GET /w/p/chunked", ""));
    let reply = Reply::parse(&chunked).unwrap();
    assert_eq!((reply.header("transfer-encoding"), reply.header("trailer")), (Some("chunked"), Some("x-parts")));
    assert_eq!(String::from_utf8(reply.body).unwrap(), "4\r\none \r\n4\r\ntwo \r\n0\r\nx-parts: 2\r\n\r\n");

    // A reply to HEAD has no body, whatever its length says.
    let of_head = Reply::parse(&host.send_raw(head(&host, "HEAD /w/p/echo", ""))).unwrap();
    assert_eq!((of_head.status, of_head.header("content-length"), of_head.body.len()), (200, Some("1000"), 0));
}

#[test]
fn error_reply_is_forwarded_unchanged() {
    let host = Host::new();
    host.behave("FAKE_FAIL=/path");
    host.openwork(["daemon", "start"]).ok();
    host.add(host.project("p"));
    let reply = host.routed("GET", "/w/p/path").send();
    assert_eq!((reply.status, &reply.json()["name"]), (500, &json!("UnknownError")));
    assert_eq!(reply.header("x-openwork-error"), None);
}

#[test]
fn events_are_forwarded_at_once() {
    let (host, p, _) = host();
    let mut of_instance = host.routed("GET", "/w/p/event").events();
    let mut of_all = host.routed("GET", &format!("/w/q{ALL_EVENTS}")).events();
    // 2.x has one stream for all, with events of one form.
    let is =
        |event: &Value, kind: &str| event[if IS_V2 { "" } else { "payload" }]["type"] == kind || event["type"] == kind;
    of_instance.find(|event| event["type"] == "server.connected").unwrap();
    of_all.find(|event| is(event, "server.connected")).unwrap();
    wait_for("the stream to be counted", || streams(&host, "p") == 1);

    host.routed("POST", "/w/p/session").send();
    of_instance.find(|event| event["type"] == "session.created").unwrap();
    let event = of_all.find(|event| is(event, "session.created")).unwrap();
    let directory = if IS_V2 { &event["location"]["directory"] } else { &event["directory"] };
    assert_eq!(directory, p.to_str().unwrap());

    host.openwork(["workspace", "path", "p"]).ok();
    host.dispose_directly(&p);
    match IS_V2 {
        true => drop(of_instance.find(|event| event["type"] == "location.shutdown").unwrap()),
        // The stream of the instance ends with it; the global stream stays.
        false => assert_eq!(of_instance.find(|event| event["type"] == "no such"), None),
    }
    of_all.find(|event| is(event, if IS_V2 { "location.shutdown" } else { "server.instance.disposed" })).unwrap();
    drop(of_instance);
    wait_for("the stream to be done", || streams(&host, "p") == 0);
}

#[test]
fn client_disconnect_reaches_opencode() {
    let (host, p, _) = host();
    let events = host.routed("GET", "/w/p/event").events();
    let target = passed(EVENTS, &p);
    assert!(host.recorded("streams").contains(&format!("open {target}")));
    drop(events);
    wait_for("its end to be passed on", || host.recorded("streams").contains(&format!("close {target}")));
}

#[test]
fn client_that_resets_its_connection_ends_its_request() {
    let (host, ..) = host();
    let mut stream = host.connect();
    stream.write_all(head(&host, "GET /w/p/slow?ms=600000", "").as_bytes()).unwrap();
    wait_for("the request to reach opencode", || streams(&host, "p") == 1);
    // Closing it resets it.
    set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
    wait_for("the request to be over", || streams(&host, "p") == 0);
}

/// As a server does that refuses a large body.
#[test]
fn reply_before_the_end_of_the_body_reaches_the_client() {
    let (host, ..) = host();
    let target = raw("HTTP/1.1 413 Content Too Large\r\nContent-Length: 9\r\n\r\ntoo large");
    for stream in host.connections() {
        let request = head(&host, &format!("POST {target}"), "Content-Length: 50000000\r\n");
        thread::scope(|scope| {
            let mut writer = stream.try_clone().unwrap();
            scope.spawn(move || {
                let _ = writer.write_all(request.as_bytes());
                while writer.write_all(&[b'b'; 100_000]).is_ok() {}
            });
            let mut reader = stream.try_clone().unwrap();
            let reply = read_reply(&mut reader, "POST").unwrap_or_else(|e| panic!("{e}"));
            assert_eq!((reply.status, &reply.body[..]), (413, &b"too large"[..]));
            let _ = stream.shutdown(Shutdown::Both);
        });
    }
    assert_eq!(host.health()["engine"]["restarts"], 0);
}

/// opencode closes a connection of which it has not read everything, which resets the connection.
#[test]
fn connection_reset_by_opencode_during_a_body_is_an_error_or_ends_the_reply() {
    let (host, ..) = host();
    let begun = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf";
    for (bytes, stream) in ["", begun].into_iter().flat_map(|bytes| host.connections().map(|stream| (bytes, stream))) {
        let request = head(&host, &format!("POST {}", raw(bytes)), "Content-Length: 50000000\r\n");
        let reply = thread::scope(|scope| {
            let mut writer = stream.try_clone().unwrap();
            scope.spawn(move || {
                let _ = writer.write_all(request.as_bytes());
                while writer.write_all(&[b'b'; 100_000]).is_ok() {}
            });
            let mut reader = stream.try_clone().unwrap();
            let reply = read_to_close(&mut reader);
            let _ = stream.shutdown(Shutdown::Both);
            reply
        });
        let reply = Reply::parse(&reply).unwrap();
        match bytes {
            "" => drop(reply.refused(502, "opencode_error")),
            _ => assert_eq!((reply.status, &reply.body[..]), (200, &b"half"[..])),
        }
    }
    assert_eq!((host.starts().len(), &host.health()["engine"]["restarts"]), (1, &json!(0)));
}

#[test]
fn opencode_dying_before_its_reply_is_an_error() {
    let (host, p, _) = host();
    let reply = host.routed("POST", "/w/p/die-first").send();
    reply.refused(502, "opencode_error");
    assert_eq!(reply.header("x-openwork-error"), Some("opencode_error"));
    // opencode may have executed it, so it is not repeated.
    assert_eq!(calls(&host).iter().filter(|call| call["target"] == passed("/die-first", &p)).count(), 1);
}

#[test]
fn only_safe_requests_are_retried() {
    let (host, ..) = host();
    for (method, body, times) in [
        ("GET", "", 2),
        ("HEAD", "", 2),
        ("GET", "body", 1),
        ("POST", "", 1),
        ("PUT", "body", 1),
        ("PATCH", "", 1),
        ("DELETE", "", 1),
        ("OPTIONS", "", 1),
    ] {
        let before = calls(&host).len();
        let request = host.routed(method, "/w/p/die-first").header("Content-Length", body.len().to_string());
        assert_eq!(request.body(body).send().status, 502, "{method}");
        let sent = &calls(&host)[before..];
        assert_eq!(sent.len(), times, "{method} {body:?}: {sent:?}");
    }
}

#[test]
fn request_waits_for_the_disposal_of_its_instance() {
    let host = Host::new();
    let (p, q) = (host.project("p"), host.project("q"));
    host.openwork(["daemon", "start", "--idle-ttl", "1s"]).ok();
    host.add(&p);
    host.add(&q);
    let _stream = host.routed("GET", "/w/q/event").events();
    let hold = host.path("fake/hold-disposals");
    fs::write(&hold, "").unwrap();
    host.routed("GET", "/w/p/path").send();
    let is_disposal = |call: &Value| call["target"] == "/instance/dispose" || call["method"] == "DELETE";
    wait_for("the disposal to begin", || host.requests().iter().any(is_disposal));
    let before = calls(&host).len();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| host.routed("GET", "/w/p/path").send());
        // Requests to other instances pass, and give this one time to be sent by mistake.
        for _ in 0..20 {
            host.routed("GET", "/w/q/path").send();
        }
        assert!(calls(&host)[before..].iter().all(|call| call["directory"] == q.to_str().unwrap()));
        // No longer than the client.
        let impatient = host.routed("GET", "/w/p/path").header("X-Openwork-Timeout", "0.2");
        impatient.fails(504, "opencode_timeout");
        fs::remove_file(&hold).unwrap();
        assert_eq!(waiting.join().unwrap().json()["directory"], p.to_str().unwrap());
    });
    assert_eq!(host.instance(&p)[..3], ["load", "dispose", "load"]);
}

#[test]
fn opencode_dying_during_its_reply_breaks_the_connection() {
    let (host, ..) = host();
    for stream in host.connections() {
        let reply = Reply::parse(&host.send_raw_on(stream, head(&host, "GET /w/p/die-mid", ""))).unwrap();
        assert_eq!((reply.status, reply.header("content-length")), (200, Some("10")));
        assert_eq!(reply.body, b"half ");
    }
}

#[test]
fn interim_replies_reach_a_slow_reader_complete() {
    const COUNT: usize = 4000;
    let (host, ..) = host();
    let request = head(&host, &format!("GET /w/p/interim?count={COUNT}"), "");
    let mut stream = host.connect();
    stream.write_all(request.replace("Host:", "Connection: close\r\nHost:").as_bytes()).unwrap();
    let port = stream.local_addr().unwrap().port();
    let waiting = || sockets(port, ESTABLISHED).iter().map(|(_, waiting)| *waiting).sum::<u32>();
    wait_for("the client's buffer to fill", || waiting() > 50_000);
    let text = String::from_utf8(read_to_close(&mut stream)).unwrap();
    let (interim, reply) = text.split_at(text.find("HTTP/1.1 200").expect("the reply"));
    for (number, one) in interim.split_terminator("\r\n\r\n").enumerate() {
        assert_eq!(one, format!("HTTP/1.1 103 Early Hints\r\nLink: <{number}{}>", "x".repeat(1000)));
    }
    assert_eq!(interim.matches("HTTP/1.1 103").count(), COUNT);
    assert!(reply.ends_with("\r\n\r\ntrue"), "{reply}");

    // HTTP/1.0 has no interim replies.
    let old = host.send_raw(request.replace("HTTP/1.1", "HTTP/1.0"));
    assert!(!String::from_utf8(old).unwrap().contains(" 103 "));
}

#[test]
fn interim_reply_before_a_malformed_reply_reaches_the_client() {
    let (host, ..) = host();
    let hint = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";
    for malformed in ["nonsense\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"] {
        let target = raw(&format!("{hint}{malformed}"));
        let reply = host.send_raw(head(&host, &format!("POST {target}"), "Content-Length: 0\r\n"));
        let rest = String::from_utf8(reply).unwrap();
        let rest = rest.strip_prefix(hint).unwrap_or_else(|| panic!("{rest}"));
        Reply::parse(rest.as_bytes()).unwrap().refused(502, "opencode_error");
    }
}

/// The target of a call that opencode answers with exactly these bytes.
fn raw(bytes: &str) -> String {
    let encoded: String = bytes.bytes().map(|byte| format!("%{byte:02X}")).collect();
    format!("/w/p/raw?reply={encoded}")
}

#[test]
fn malformed_reply_is_an_error_of_opencode() {
    let (host, ..) = host();
    for bytes in [
        "nonsense\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "HTTP/1.1 200 OK\r\nX: cut off",
        "HTTP/1.1 200 OK\nContent-Length: 2\n\nab\r\n\r\n",
        "\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab",
        "\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab",
        "HTTP/1.1 099 x\r\nContent-Length: 2\r\n\r\nab",
        "HTTP/1.1 600 x\r\nContent-Length: 2\r\n\r\nab",
        "HTTP/1.1 101 Switching Protocols\r\nContent-Length: 0\r\n\r\n",
        "",
    ] {
        let reply = host.routed("POST", &raw(bytes)).send();
        let error = reply.refused(502, "opencode_error");
        assert!(error["message"].as_str().unwrap().contains("reply"), "{bytes:?}: {error}");
    }
    // The client has the beginning of this one, and sees that it breaks off.
    let broken = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n";
    let stream = host.connect();
    let request = head(&host, &format!("POST {}", raw(&(broken.to_owned() + "zz\r\n"))), "Content-Length: 0\r\n");
    let reply = Reply::parse(&host.send_raw_on(stream, request));
    assert!(reply.is_none_or(|reply| reply.status == 502 || reply.whole_body().is_none()), "taken for a whole reply");
    assert_eq!(host.starts().len(), 1, "opencode is not blamed for its replies");
}

/// A client, and `openwork api`, would take the reply for an error of openwork.
#[test]
fn header_of_our_errors_does_not_come_from_opencode() {
    let (host, ..) = host();
    let target = raw("HTTP/1.1 500 x\r\nx-openwork-error: unauthorized\r\nx-other: 1\r\nContent-Length: 2\r\n\r\nab");
    let reply = host.routed("POST", &target).send();
    assert_eq!((reply.status, reply.header("x-openwork-error"), reply.header("x-other")), (500, None, Some("1")));
    assert_eq!(reply.body, b"ab");
}

#[test]
fn long_head_of_a_reply_passes_up_to_its_limit() {
    let (host, ..) = host();
    for bytes in [100, 9_000, 20_000, 60_000] {
        let reply = host.routed("GET", &format!("/w/p/long-head?bytes={bytes}")).send();
        assert_eq!((reply.status, reply.header("x-long").unwrap().len()), (200, bytes));
        assert_eq!(reply.body, b"true");
    }
    let error = host.routed("GET", "/w/p/long-head?bytes=70000").send().refused(502, "opencode_error");
    assert!(error["message"].as_str().unwrap().contains("too long"), "{error}");
}

// --- Upgrades ---

/// Opens a tunnel and sends `at_once` with the request. Returns the tunnel and the echo.
fn upgrade(host: &Host, at_once: &str) -> (TcpStream, Vec<u8>) {
    let mut stream = host.connect();
    let headers = "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n";
    let request = head(host, "GET /w/p/pty/x/connect", headers) + at_once;
    stream.write_all(request.as_bytes()).unwrap();
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        bytes.push(byte[0]);
    }
    let reply = Reply::parse(&bytes).unwrap();
    assert_eq!(reply.status, 101);
    assert!(reply.header("connection").unwrap().eq_ignore_ascii_case("upgrade"), "{reply:?}");
    assert_eq!((reply.header("upgrade"), reply.header("sec-websocket-accept")), (Some("websocket"), Some("fake")));
    let mut first = vec![0; at_once.len()];
    stream.read_exact(&mut first).unwrap();
    (stream, first)
}

#[test]
fn upgrade_opens_a_tunnel() {
    let (host, ..) = host();
    // Bytes sent before the reply belong to the tunnel.
    let (mut stream, first) = upgrade(&host, "at once");
    assert_eq!(first, b"at once");
    let large = vec![b't'; 1_000_000];
    thread::scope(|scope| {
        let mut writer = stream.try_clone().unwrap();
        let sent = &large;
        scope.spawn(move || {
            writer.write_all(sent).unwrap();
            // Half-closing leaves the other direction open.
            writer.shutdown(Shutdown::Write).unwrap();
        });
        assert!(read_to_close(&mut stream) == large);
    });
    wait_for("the tunnel to be done", || streams(&host, "p") == 0);
}

#[test]
fn tunnel_ends_with_opencode() {
    let (host, ..) = host();
    let (mut stream, _) = upgrade(&host, "");
    kill(host.opencode_pid(), Signal::KILL);
    assert_eq!(read_to_close(&mut stream), b"");
}

// --- Credentials and origins ---

#[test]
fn routes_require_the_credentials_of_opencode() {
    let (host, ..) = host();
    host.exercises(["code unauthorized"]);
    let password = host.password();
    let encode = |text: &str| format!("Basic {}", crate::support::base64(text));
    let wrong = [
        encode(&format!("opencode:{}", "0".repeat(64))),
        encode(&format!("opencode:{}", &password[..63])),
        encode(&format!("opencode:{password}0")),
        encode(&format!("root:{password}")),
        encode("opencode:"),
        host.credentials().replace("Basic ", "Bearer "),
        host.credentials().replace("Basic ", ""),
        format!("{}=", host.credentials()),
        "Basic".to_owned(),
        "".to_owned(),
    ];
    for target in ["/w/p/path", "/w/nope/path", "/w/p/global/health", "/w/"] {
        for credentials in &wrong {
            let reply = host.http("GET", target).header("Authorization", credentials).send();
            reply.refused(401, "unauthorized");
            assert!(reply.header("www-authenticate").unwrap().starts_with("Basic"), "{reply:?}");
            assert_eq!(reply.header("x-openwork-error"), Some("unauthorized"));
        }
        host.http("GET", target).fails(401, "unauthorized");
    }
    assert_eq!(calls(&host), [Value::Null; 0]);
    // The control plane needs none.
    host.http("GET", "/workspaces").ok();
}

#[test]
fn allowed_origin_may_call_routes() {
    let (host, ..) = host();
    let origin = "tauri://localhost";
    let reply = host.routed("GET", "/w/p/path").header("Origin", origin).send();
    let values = |name: &str| {
        let headers = reply.headers.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
        headers.map(|(_, value)| value.as_str()).collect::<Vec<_>>()
    };
    // Only the daemon's headers, without opencode's beside them.
    assert_eq!((values("access-control-allow-origin"), values("vary")), (vec![origin], vec!["Origin"]));
    let preflight = host.http("OPTIONS", "/w/p/session").header("Origin", origin);
    assert_eq!(preflight.send().status, 204);
    host.routed("GET", "/w/p/path").header("Origin", "http://evil.example").fails(403, "forbidden_origin");
    host.routed("GET", "/w/p/path").header("Host", "evil.example").fails(403, "forbidden_host");
    assert_eq!(calls(&host).len(), 1);
}

// --- Selectors ---

#[test]
fn routes_need_a_known_local_workspace() {
    let (host, p, _) = host();
    host.openwork(["workspace", "add-remote", "http://h.example"]).ok();
    for (target, status, code) in [
        ("/w/nope/path", 404, "workspace_not_found"),
        ("/w/-/path", 404, "workspace_not_found"),
        ("/w/h.example/path", 409, "workspace_is_remote"),
        ("/w/%zz/path", 400, "bad_request"),
        ("/w/%ff/path", 400, "bad_request"),
    ] {
        let reply = host.routed("GET", target).send();
        reply.refused(status, code);
        assert_eq!(reply.header("x-openwork-error"), Some(code));
    }
    fs::remove_dir(&p).unwrap();
    host.routed("GET", "/w/p/path").fails(404, "path_not_found");
    host.openwork(["workspace", "remove", "p"]).ok();
    host.routed("GET", "/w/p/path").fails(404, "workspace_not_found");
    host.routed("GET", "/w/@active/path").fails(409, "no_active_workspace");
    assert_eq!(calls(&host), [Value::Null; 0]);
}

#[test]
fn new_requests_follow_the_active_workspace() {
    let (host, p, q) = host();
    let mut events = host.routed("GET", "/w/@active/event").events();
    host.openwork(["workspace", "switch", "q"]).ok();
    let directory = |host: &Host| host.routed("GET", "/w/@active/path").send().json()["directory"].clone();
    assert_eq!(directory(&host), q.to_str().unwrap());
    // Requests under way stay with their workspace.
    host.routed("POST", "/w/p/session").send();
    events.find(|event| event["type"] == "session.created").unwrap();
    host.openwork(["workspace", "switch", "-"]).ok();
    assert_eq!(directory(&host), p.to_str().unwrap());
}

// --- opencode down ---

#[test]
fn request_restarts_a_dead_opencode() {
    let (host, p, _) = host();
    let before = host.opencode_pid();
    kill(before, Signal::KILL);
    // A request that reaches the dying process must not be repeated, so wait for its end.
    wait_gone(before);
    thread::scope(|scope| {
        for n in 0..32 {
            let (host, p) = (&host, &p);
            scope.spawn(move || match n % 2 {
                0 => assert_eq!(host.routed("GET", "/w/p/path").send().json()["directory"], p.to_str().unwrap()),
                // Not a byte of this request had been sent yet.
                _ => assert_eq!(
                    echo(&host.routed("POST", "/w/p/echo").body("x".repeat(100_000)).send())["length"],
                    100_000
                ),
            });
        }
    });
    assert_eq!(host.starts().len(), 2);
    assert!(!is_alive(before));
}

#[test]
fn failed_start_of_opencode_is_reported() {
    let host = Host::new();
    host.behave("FAKE_NEVER_LISTEN=1");
    host.add(host.project("p"));
    let reply = host.routed("GET", "/w/p/path").header("X-Openwork-Timeout", "1").send();
    reply.refused(504, "opencode_timeout");
    assert_eq!(reply.header("x-openwork-error"), Some("opencode_timeout"));

    let host = Host::new();
    host.behave("FAKE_AUTH=reject");
    host.add(host.project("p"));
    host.routed("GET", "/w/p/path").fails(502, "opencode_auth_failed");
}

#[test]
fn workspace_url_outlives_opencode_and_the_daemon() {
    let (host, p, _) = host();
    let port = host.port();
    let still_there = || {
        assert_eq!(host.routed("GET", "/w/p/path").send().json()["directory"], p.to_str().unwrap());
        assert_eq!(host.port(), port);
    };
    still_there();
    kill(host.opencode_pid(), Signal::KILL);
    still_there();
    host.openwork(["daemon", "restart", "--all"]).ok();
    still_there();
    let daemon = host.daemon_pid();
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
    host.openwork(["daemon", "start"]).ok();
    still_there();
}

#[test]
fn stop_ends_streams_and_tunnels() {
    let (host, ..) = host();
    let mut events = host.routed("GET", "/w/p/event").events();
    let (mut tunnel, _) = upgrade(&host, "");
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(events.find(|event| event["type"] == "no such"), None);
    assert_eq!(read_to_close(&mut tunnel), b"");
}

#[test]
fn many_streams_do_not_block_requests() {
    let (host, ..) = host();
    let mut streams: Vec<_> = (0..200).map(|_| host.routed("GET", "/w/p/event").events()).collect();
    host.routed("GET", "/w/p/path").send();
    host.routed("POST", "/w/p/session").send();
    for events in &mut streams {
        events.find(|event| event["type"] == "session.created").unwrap();
    }
    assert_eq!(self::streams(&host, "p"), 200);
    drop(streams);
    wait_for("the streams to be done", || self::streams(&host, "p") == 0);
}

#[test]
fn use_updates_last_used_at() {
    let (host, ..) = host();
    let used = || {
        let list = host.http("GET", "/workspaces").ok();
        list["workspaces"][1]["lastUsedAt"].as_u64().unwrap()
    };
    let added = used();
    wait_for("a later last use", || {
        host.routed("GET", "/w/q/path").send();
        used() > added
    });
}

#[test]
fn credentials_are_accepted_in_every_form() {
    let (host, p, _) = host();
    let credentials = host.credentials();
    let token = credentials.strip_prefix("Basic ").unwrap();
    for scheme in ["basic", "BASIC", "bAsIc"] {
        let reply = host.http("GET", &spelled("/w/p/path")).header("Authorization", format!("{scheme} {token}")).send();
        assert_eq!(reply.json()["directory"], p.to_str().unwrap(), "{scheme}");
    }
    let encoded = token.replace('=', "%3D").replace('+', "%2B").replace('/', "%2F");
    for token in [token, &encoded] {
        let reply = host.http("GET", &spelled(&format!("/w/p/path?x=1&auth_token={token}"))).send();
        assert_eq!(reply.json()["directory"], p.to_str().unwrap(), "{token}");
    }
    for query in ["", "?auth_token=", "?auth_token=wrong", "?auth_token=%zz", &format!("?auth_tokens={token}")] {
        host.http("GET", &spelled(&format!("/w/p/path{query}"))).fails(401, "unauthorized");
    }
    // The header takes precedence, as in opencode.
    let wrong = host.http("GET", &format!("/w/p/path?auth_token={token}")).header("Authorization", "Basic wrong");
    wrong.fails(401, "unauthorized");
}

// --- Tickets ---

/// Opens a terminal's WebSocket without credentials, and returns all that comes.
fn with_ticket(host: &Host, target: &str) -> String {
    String::from_utf8(host.send_raw(ticket_head(host, "GET", target, "websocket"))).unwrap()
}

fn ticket_head(host: &Host, method: &str, target: &str, upgrade: &str) -> String {
    let headers = format!("Connection: Upgrade\r\nUpgrade: {upgrade}\r\nSec-WebSocket-Key: x\r\n");
    let target = spelled(target);
    format!("{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n{headers}\r\n", host.port())
}

#[test]
fn ticket_opens_the_terminal_of_a_loaded_instance() {
    let (host, p, _) = host();
    let id = host.add(&p);
    host.routed("GET", "/w/p/path").send();
    let mut stream = host.connect();
    let head = ticket_head(&host, "GET", &format!("/w/{id}/pty/x/connect?ticket=good"), "WebSocket");
    stream.write_all((head + "typed").as_bytes()).unwrap();
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).unwrap();
    assert_eq!(&begin, b"HTTP/1.1 101");
    // An open terminal keeps its instance from eviction.
    wait_for("the stream to be counted", || streams(&host, "p") == 1);
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(read_to_close(&mut stream).ends_with(b"typed"));
}

#[test]
fn refused_ticket_reveals_and_changes_nothing() {
    let host = Host::new();
    host.behave("FAKE_HINT=1");
    host.openwork(["daemon", "start"]).ok();
    let (p, q) = (host.project("p"), host.project("q"));
    let (loaded, cold) = (host.add(&p), host.add(&q));
    host.openwork(["workspace", "add-remote", "https://example.com", "--name", "far"]).ok();
    host.routed("GET", "/w/p/path").send();
    let used = host.http("GET", "/workspaces/q").ok()["workspace"]["lastUsedAt"].clone();
    let before = calls(&host).len();
    let ticket = "pty/x/connect?ticket";
    let replies: Vec<String> = thread::scope(|scope| {
        let targets = [
            format!("/w/{loaded}/{ticket}=bad"),
            format!("/w/{cold}/{ticket}=good"),
            format!("/w/ws-000000000000/{ticket}=good"),
            format!("/w/p/{ticket}=good"),
            format!("/w/far/{ticket}=good"),
            format!("/w/@active/{ticket}=good"),
            format!("/w/{}/{ticket}=good", loaded.trim_end_matches(|last: char| last.is_ascii_alphanumeric())),
            format!("/w/-/{ticket}=good"),
            format!("/w/%zz/{ticket}=good"),
        ];
        let asked: Vec<_> = targets.into_iter().map(|target| scope.spawn(|| with_ticket(&host, &{ target }))).collect();
        asked.into_iter().map(|asked| asked.join().unwrap()).collect()
    });
    Reply::parse(replies[0].as_bytes()).unwrap().refused(401, "unauthorized");
    for reply in &replies[1..] {
        assert_eq!(reply, &replies[0]);
    }
    // Only the ticket for a loaded instance was passed to opencode.
    assert_eq!(calls(&host).len() - before, 1);
    assert_eq!(host.instance(&q), [""; 0]);
    assert_eq!((streams(&host, "p"), streams(&host, "q")), (0, 0));
    assert_eq!(host.http("GET", "/workspaces/q").ok()["workspace"]["lastUsedAt"], used);
}

#[test]
fn ticket_is_valid_only_for_a_websocket() {
    let (host, p, _) = host();
    let id = host.add(&p);
    host.routed("GET", "/w/p/path").send();
    let before = calls(&host).len();
    let target = |path: &str| format!("/w/{id}/{path}");
    for request in [
        ticket_head(&host, "POST", &target("pty/x/connect?ticket=good"), "websocket"),
        ticket_head(&host, "HEAD", &target("pty/x/connect?ticket=good"), "websocket"),
        ticket_head(&host, "GET", &target("pty/x/connect?ticket=good"), "h2c"),
        ticket_head(&host, "GET", &target("pty/x/connect?ticket=good"), "websocket")
            .replace("Connection: Upgrade\r\n", ""),
        ticket_head(&host, "GET", &target("pty/x/connect?ticket="), "websocket"),
        ticket_head(&host, "GET", &target("pty/x/connect?x=ticket"), "websocket"),
        ticket_head(&host, "GET", &target("pty/x/y/connect?ticket=good"), "websocket"),
        ticket_head(&host, "GET", &target("pty/../connect?ticket=good"), "websocket"),
        ticket_head(&host, "GET", &target("path?ticket=good"), "websocket"),
    ] {
        let reply = Reply::parse(&host.send_raw(&request)).unwrap();
        assert_eq!((reply.status, reply.header("x-openwork-error")), (401, Some("unauthorized")), "{request}");
    }
    assert_eq!(calls(&host).len(), before);
}

#[test]
fn unanswered_ticket_check_times_out() {
    let (host, p, _) = host();
    let id = host.add(&p);
    host.routed("GET", "/w/p/path").send();
    host.hang(true);
    let reply = with_ticket(&host, &format!("/w/{id}/pty/x/connect?ticket=good"));
    host.hang(false);
    Reply::parse(reply.as_bytes()).unwrap().refused(401, "unauthorized");
}

#[test]
fn known_and_unknown_workspaces_look_alike_without_credentials() {
    let (host, p, _) = host();
    let id = host.add(&p);
    for method in ["GET", "HEAD", "POST", "OPTIONS", "PROPFIND"] {
        for rest in ["", "/", "/path", "/pty/x/connect?ticket=good", "/global/health", "?x"] {
            for origin in ["", "Origin: tauri://localhost\r\n"] {
                let ask = |selector: &str| {
                    let line = format!("{method} /w/{selector}{rest} HTTP/1.1\r\n");
                    host.send_raw(format!("{line}Host: 127.0.0.1:{}\r\n{origin}\r\n", host.port()))
                };
                let unknown = ask("nope");
                let status = Reply::parse(&unknown).unwrap().status;
                let preflight = method == "OPTIONS" && !origin.is_empty();
                assert_eq!(status, if preflight { 204 } else { 401 });
                for selector in ["p", &id, "@active", "-", "%ff", &p.to_str().unwrap().replace('/', "%2F"), "ws"] {
                    assert_eq!(ask(selector), unknown, "{method} {selector}{rest}");
                }
            }
        }
    }
}
