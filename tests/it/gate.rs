//! The public port: allowed callers, limits, malformed requests, and a daemon that survives any input.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use serde_json::json;

use crate::support::random::Random;
use crate::support::{
    Host, LISTEN, NOBODY, Reply, Signal, Stranger, connect, is_root, kill, raise_limit, read_to_close, resources,
    sockets, until, wait_for,
};

/// A host with a daemon and a workspace `p`. Dropping it checks that the same daemon is still healthy
/// and has the same workspaces.
struct Gate {
    host: Host,
    pid: u32,
    names: Vec<String>,
}

impl Gate {
    fn new() -> Gate {
        Gate::with(&[], "")
    }

    fn with(options: &[&str], shell: &str) -> Gate {
        let host = Host::new();
        host.openwork(["daemon", "start"].iter().chain(options)).after(shell).ok();
        host.add(host.project("p"));
        let (pid, names) = (host.daemon_pid(), host.names());
        Gate { host, pid, names }
    }

    /// The correct `Host` header.
    fn authority(&self) -> String {
        format!("127.0.0.1:{}", self.host.port())
    }

    /// A request with these lines after the `Host` header.
    fn request(&self, line: &str, rest: &str) -> String {
        format!("{line} HTTP/1.1\r\nHost: {}\r\n{rest}", self.authority())
    }

    /// A `POST /workspaces` with these header lines.
    fn addition(&self, headers: &str) -> String {
        let body = json!({"path": self.host.project("smuggled")}).to_string();
        self.request("POST /workspaces", &format!("Content-Type: application/json\r\n{headers}\r\n{body}"))
    }

    fn addition_length(&self) -> usize {
        json!({"path": self.host.project("smuggled")}).to_string().len()
    }

    /// The replies to these bytes on a new connection, and on one that has served a request.
    fn raw(&self, bytes: impl AsRef<[u8]>) -> [Vec<u8>; 2] {
        self.host.connections().map(|stream| self.host.send_raw_on(stream, &bytes))
    }

    /// The reply to these bytes, which does not depend on what the connection has served before.
    fn reply(&self, bytes: impl AsRef<[u8]>) -> Reply {
        let [new, served] = self.raw(&bytes).map(|reply| {
            let shown =
                || (String::from_utf8_lossy(bytes.as_ref()).into_owned(), String::from_utf8_lossy(&reply).into_owned());
            let parsed = Reply::parse(&reply).unwrap_or_else(|| panic!("no reply: {:?}", shown()));
            // One request gets exactly one reply.
            let length = parsed.header("content-length").map_or(0, |length| length.parse().unwrap());
            assert_eq!(parsed.body.len(), length, "{:?}", shown());
            // A refusal closes the connection.
            let closes = parsed.header("connection") == Some("close");
            assert!(closes || (parsed.status < 400 && parsed.is_kept()), "{:?}", shown());
            parsed
        });
        assert_eq!((new.status, new.error_code()), (served.status, served.error_code()));
        served
    }

    fn refuses(&self, bytes: impl AsRef<[u8]>, status: u16, code: &str) {
        self.reply(bytes).refused(status, code);
    }

    /// Expects one of these refusals: when a request breaks several rules, their order is not part of the
    /// contract.
    fn refuses_as(&self, bytes: impl AsRef<[u8]>, allowed: &[(u16, &str)]) {
        let reply = self.reply(&bytes);
        let error = reply.json();
        let found = (reply.status, error["error"]["code"].as_str().unwrap());
        assert!(allowed.contains(&found), "{found:?} for {:?}", String::from_utf8_lossy(bytes.as_ref()));
        reply.refused(found.0, found.1);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if !thread::panicking() {
            assert_eq!(self.host.daemon_pid(), self.pid);
            assert_eq!(self.host.health()["ok"], true);
            assert_eq!(self.host.names(), self.names);
        }
    }
}

const BAD_REQUEST: (u16, &str) = (400, "bad_request");
const FORBIDDEN_HOST: (u16, &str) = (403, "forbidden_host");

// --- Host ---

#[test]
fn loopback_hosts_with_the_port_are_accepted() {
    let gate = Gate::new();
    let port = gate.host.port();
    for name in ["127.0.0.1", "localhost", "LocalHost", "[::1]"] {
        gate.host.http("GET", "/health").header("Host", format!("{name}:{port}")).ok();
        gate.host.http("GET", "/workspaces").header("Host", format!("{name}:{port}")).ok();
    }
}

#[test]
fn other_hosts_are_refused() {
    let gate = Gate::new();
    gate.host.exercises(["code forbidden_host"]);
    let port = gate.host.port();
    for name in [
        "evil.example:PORT",
        "127.0.0.1.evil.example:PORT",
        "localhost.evil.example:PORT",
        "evil.example",
        "127.0.0.1",
        "localhost",
        "127.0.0.1:1",
        "127.0.0.1:0PORT",
        "127.0.0.1:+PORT",
        "127.0.0.1:PORT0",
        "127.0.0.1:PORT:PORT",
        "127.0.0.1:PORT.evil.example",
        "127.0.0.1:PORT, evil.example",
        "evil.example, 127.0.0.1:PORT",
        "user@127.0.0.1:PORT",
        "evil.example@127.0.0.1:PORT",
        "127.0.0.1:PORT/",
        "http://127.0.0.1:PORT",
        "127.0.0.2:PORT",
        "127.1:PORT",
        "0.0.0.0:PORT",
        "0:PORT",
        "2130706433:PORT",
        "0x7f000001:PORT",
        "0177.0.0.1:PORT",
        "[::]:PORT",
        "[::ffff:127.0.0.1]:PORT",
        "::1:PORT",
        "localhost.:PORT",
        "localhost%00:PORT",
        "",
    ] {
        let name = name.replace("PORT", &port.to_string());
        for path in ["/health", "/workspaces"] {
            let request = format!("GET {path} HTTP/1.1\r\nHost: {name}\r\n\r\n");
            gate.refuses_as(request, &[FORBIDDEN_HOST, BAD_REQUEST]);
        }
    }
    gate.refuses("GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403, "forbidden_host");
}

#[test]
fn exactly_one_host_header_is_required() {
    let gate = Gate::new();
    let good = format!("Host: {}\r\n", gate.authority());
    for hosts in [
        "".to_owned(),
        format!("{good}{good}"),
        format!("{good}Host: evil.example\r\n"),
        format!("Host: evil.example\r\n{good}"),
    ] {
        gate.refuses_as(format!("GET /health HTTP/1.1\r\n{hosts}\r\n"), &[FORBIDDEN_HOST, BAD_REQUEST]);
    }
}

#[test]
fn host_is_checked_before_the_body() {
    // The body never comes.
    let gate = Gate::new();
    let head = "POST /workspaces HTTP/1.1\r\nHost: evil.example\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n";
    gate.refuses(head, 403, "forbidden_host");
}

// --- Origin ---

#[test]
fn allowed_origins_are_echoed() {
    let gate = Gate::with(&["--cors", "http://localhost:5173", "--cors", "https://app.example"], "");
    gate.host.exercises(["option --cors"]);
    for origin in [
        "tauri://localhost",
        "http://tauri.localhost",
        "https://tauri.localhost",
        "http://localhost:5173",
        "https://app.example",
    ] {
        for path in ["/health", "/workspaces", "/workspaces/nope"] {
            let request = gate.host.http("GET", path).header("Origin", origin).header("Sec-Fetch-Site", "cross-site");
            let reply = request.send();
            assert!(matches!(reply.status, 200 | 404), "{reply:?}");
            assert_eq!(reply.header("access-control-allow-origin"), Some(origin));
            assert_eq!(reply.header("vary"), Some("Origin"));
            assert_eq!(reply.header("access-control-allow-credentials"), None);
        }
    }
    assert_eq!(gate.host.http("GET", "/health").send().header("access-control-allow-origin"), None);
}

#[test]
fn other_origins_are_refused() {
    let gate = Gate::new();
    for origin in [
        "http://evil.example",
        "null",
        "",
        "*",
        "tauri://localhost.evil.example",
        "tauri://localhost/",
        "http://tauri.localhost:8080",
        "http://tauri.localhost.evil.example",
        "http://evil.example/http://tauri.localhost",
        "http://localhost",
        "tauri://localhost, http://evil.example",
    ] {
        for (method, path) in
            [("GET", "/health"), ("GET", "/workspaces"), ("OPTIONS", "/workspaces"), ("POST", "/shutdown")]
        {
            let reply = gate.host.http(method, path).header("Origin", origin).send();
            reply.refused(403, "forbidden_origin");
            assert_eq!(reply.header("access-control-allow-origin"), None);
        }
    }
    let own = format!("http://{}", gate.authority());
    gate.host.http("GET", "/workspaces").header("Origin", own).fails(403, "forbidden_origin");
    let two = gate.request("GET /health", "Origin: tauri://localhost\r\nOrigin: http://evil.example\r\n\r\n");
    gate.refuses_as(two, &[(403, "forbidden_origin"), BAD_REQUEST]);
}

#[test]
fn cross_site_fetches_are_refused() {
    let gate = Gate::new();
    gate.host.exercises(["code forbidden_origin"]);
    let fetch = |site: &str| gate.host.http("GET", "/health").header("Sec-Fetch-Site", site);
    for site in ["none", "same-origin"] {
        fetch(site).ok();
    }
    for site in ["cross-site", "same-site", "", "None of that", "same-origin, cross-site"] {
        fetch(site).fails(403, "forbidden_origin");
    }
}

#[test]
fn preflight_from_an_allowed_origin_is_answered() {
    let gate = Gate::new();
    for path in ["/health", "/workspaces", "/workspaces/p"] {
        let preflight = gate.host.http("OPTIONS", path).header("Origin", "tauri://localhost");
        let reply = preflight.header("Access-Control-Request-Method", "DELETE").send();
        assert_eq!((reply.status, &reply.body[..]), (204, &b""[..]), "{reply:?}");
        assert_eq!(reply.header("access-control-allow-origin"), Some("tauri://localhost"));
        assert_eq!(reply.header("access-control-expose-headers"), Some("X-Openwork-Error"));
        assert_eq!(
            reply.header("access-control-allow-headers"),
            Some("authorization, content-type, x-opencode-directory, x-openwork-timeout")
        );
        let methods = reply.header("access-control-allow-methods").unwrap();
        assert!(["GET", "POST", "PATCH", "DELETE"].iter().all(|method| methods.contains(method)), "{methods}");
    }
}

// --- User ---

/// Tests that need two users: root and an unprivileged account.
mod as_root {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;

    use super::*;

    #[test]
    #[ignore = "needs root, to become another user"]
    fn other_users_see_only_health() {
        let gate = Gate::new();
        gate.host.exercises(["code forbidden_user"]);
        let get = |path: &str| {
            gate.host.send_raw_as_another_user(&gate.request(&format!("GET {path}"), "Connection: close\r\n\r\n"))
        };
        assert_eq!(get("/health").status, 200);
        for path in ["/workspaces", "/workspaces/p", "/workspaces/p/path", "/events", "/nope"] {
            get(path).refused(403, "forbidden_user");
        }
        let shutdown = "Content-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}";
        let shutdown = gate.host.send_raw_as_another_user(&gate.request("POST /shutdown", shutdown));
        shutdown.refused(403, "forbidden_user");
    }

    #[test]
    #[ignore = "needs root, to become another user"]
    fn other_users_cannot_lock_out_the_owner() {
        let gate = Gate::with(&[], "ulimit -n 4500");
        // More half-open heads than there are slots, again and again.
        let script = r#"trap '' PIPE; ulimit -n 4096; while :; do
            for n in $(seq 1100); do { exec {fd}<>"/dev/tcp/127.0.0.1/$0" && printf 'GET /x HTTP/1.1\r\n' >&$fd; } || break; done
            echo; sleep 1; for fd in /proc/self/fd/*; do fd=${fd##*/}; [ "$fd" -gt 2 ] && eval "exec $fd>&-"; done
        done 2>/dev/null"#;
        let mut bash = Command::new("bash");
        bash.args(["-c", script, &gate.host.port().to_string()]).uid(NOBODY).current_dir("/");
        let mut attacker = Stranger::new(bash.stdout(Stdio::piped()));
        let mut rounds = BufReader::new(attacker.0.stdout.take().unwrap()).lines();
        rounds.next().expect("a first round").unwrap();
        wait_for("most slots to be the attacker's", || resources(gate.pid).1 > 500);
        let replies: Vec<_> =
            (0..200).map(|_| gate.host.http("GET", "/workspaces").try_send().map(|r| r.status)).collect();
        drop(attacker);
        assert!(replies.iter().all(|status| *status == Some(200)), "{replies:?}");
    }

    #[test]
    #[ignore = "needs root, to become another user"]
    fn requests_of_other_users_yield_to_the_owner() {
        // 48 slots, 3 of them the owner's: fewer than the owner has streams open.
        const STREAMS: usize = 40;
        let gate = Gate::with(&[], "ulimit -n 256");
        // Complete requests whose connections stay open as long as the daemon allows.
        let script = r#"trap '' PIPE; while :; do
            for n in $(seq 100); do { exec {fd}<>"/dev/tcp/127.0.0.1/$0" && printf %s "$1" >&$fd; } || break; done
            echo; for fd in /proc/self/fd/*; do fd=${fd##*/}; [ "$fd" -gt 2 ] && eval "exec $fd>&-"; done
        done 2>/dev/null"#;
        let request = gate.request("GET /health", "\r\n");
        let mut attackers: Vec<_> = (0..3)
            .map(|_| {
                let mut bash = Command::new("bash");
                bash.args(["-c", script, &gate.host.port().to_string(), &request]).uid(NOBODY).current_dir("/");
                Stranger::new(bash.stdout(Stdio::piped()))
            })
            .collect();
        for attacker in &mut attackers {
            BufReader::new(attacker.0.stdout.as_mut().unwrap()).lines().next().expect("a first round").unwrap();
        }
        let streams: Vec<_> = (0..STREAMS)
            .map(|_| {
                let mut stream = gate.host.connect();
                stream.write_all(gate.request("GET /events", "\r\n").as_bytes()).unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                (line, stream)
            })
            .collect();
        drop(attackers);
        let refused: Vec<_> = streams.iter().map(|(line, _)| line).filter(|line| !line.contains(" 200 ")).collect();
        assert!(refused.is_empty(), "{} of {STREAMS}: {refused:?}", refused.len());
    }

    #[test]
    #[ignore = "needs root, to become another user"]
    fn bodies_of_other_users_are_not_read() {
        let gate = Gate::new();
        // The largest length for the owner. The body never comes, and the daemon does not wait for it.
        let body = "Content-Type: application/json\r\nContent-Length: 1048576\r\n\r\n";
        assert_eq!(gate.host.send_raw_as_another_user(&gate.request("GET /health", body)).status, 200);
        gate.host.send_raw_as_another_user(&gate.request("POST /health", body)).refused(405, "method_not_allowed");
    }

    #[test]
    #[ignore = "needs root, to become another user"]
    fn closed_connection_of_another_user_changes_nothing() {
        let gate = Gate::new();
        gate.host.health();
        let (descriptors, _) = resources(gate.pid);
        // The kernel reports a closed connection as root's.
        let script = r#"exec 3<>"/dev/tcp/127.0.0.1/$0" && printf %s "$1" >&3"#;
        let request = gate.request("DELETE /workspaces/p", "\r\n");
        let mut bash = Command::new("bash");
        bash.args(["-c", script, &gate.host.port().to_string(), &request]).uid(NOBODY).current_dir("/");
        kill(gate.pid, Signal::STOP);
        let status = bash.status();
        let (port, user) = (format!(":{:04X}", gate.host.port()), NOBODY.to_string());
        wait_for("the kernel to forget whose the connection was", || {
            let table = fs::read_to_string("/proc/net/tcp").unwrap();
            let mut rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            !rows.any(|row| row[2].ends_with(&port) && row[7] == user)
        });
        kill(gate.pid, Signal::CONT);
        assert!(status.unwrap().success());
        // The daemon accepts connections in order, so the earlier one has been handled by now.
        gate.host.health();
        wait_for("the daemon to close the connection", || resources(gate.pid).0 <= descriptors);
        gate.host.http("GET", "/workspaces/p").ok();
    }
}

#[test]
fn root_may_use_the_daemon_of_another_user() {
    let host = Host::unprivileged();
    host.exercises(["route GET /workspaces"]);
    host.openwork(["daemon", "start"]).ok();
    host.http("GET", "/workspaces").ok();
}

// --- Routes ---

#[test]
fn unknown_routes_are_not_found() {
    let gate = Gate::new();
    gate.host.exercises(["code not_found"]);
    for path in [
        "/",
        "/nope",
        "/HEALTH",
        "/health/",
        "//health",
        "/./health",
        "/workspaces/p/nope",
        "/workspaces/p/path/more",
        "/healthz",
    ] {
        gate.host.http("GET", path).fails(404, "not_found");
    }
    gate.host.http("GET", "/health?with=query").ok();
}

#[test]
fn wrong_method_lists_the_allowed_methods() {
    let gate = Gate::new();
    gate.host.exercises(["code method_not_allowed"]);
    for (method, path, allowed) in [
        ("DELETE", "/health", &["GET"][..]),
        ("BREW", "/health", &["GET"]),
        ("PUT", "/workspaces", &["GET", "POST"]),
        ("POST", "/workspaces/p", &["GET", "PATCH", "DELETE"]),
        ("GET", "/workspaces/p/activate", &["POST"]),
        ("GET", "/shutdown", &["POST"]),
        ("POST", "/events", &["GET"]),
        ("GET", "/instances/p/dispose", &["POST"]),
    ] {
        let reply = gate.host.http(method, path).send();
        reply.refused(405, "method_not_allowed");
        let allow = reply.header("allow").expect("an Allow header");
        let mut allow: Vec<&str> = allow.split(", ").filter(|method| !matches!(*method, "HEAD" | "OPTIONS")).collect();
        allow.sort_unstable();
        let mut allowed = allowed.to_vec();
        allowed.sort_unstable();
        assert_eq!(allow, allowed, "{path}");
    }
}

// --- Malformed requests ---

#[test]
fn input_that_is_not_http_is_refused_or_dropped() {
    let gate = Gate::new();
    let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    let endless = vec![b'A'; 100_000];
    for bytes in [
        &b"\r\n\r\n"[..],
        b"\0\0\0\0\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\xff\xfe\xfd\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        hello,
        &endless,
    ] {
        for bytes in gate.raw(bytes) {
            assert!(bytes.is_empty() || Reply::parse(&bytes).is_some_and(|reply| (400..=505).contains(&reply.status)));
        }
    }
}

#[test]
fn malformed_heads_are_refused() {
    let gate = Gate::new();
    let good = gate.request("GET /health", "\r\n");
    assert_eq!(gate.reply(&good).status, 200);
    for bad in [
        good.replace("\r\n", "\n"),
        gate.request("GET /health", "X: a\0b\r\n\r\n"),
        gate.request("GET /health", "X\0: a\r\n\r\n"),
        gate.request("GET /health", "X : a\r\n\r\n"),
        gate.request("GET /health", " X: folded\r\n\r\n"),
        gate.request("GET /health", "X: a\r\n folded\r\n\r\n"),
        gate.request("GET /health", ": no name\r\n\r\n"),
        gate.request("GET /health", "no colon\r\n\r\n"),
        gate.request("GET /health", "X: a\rb\r\n\r\n"),
        gate.request("GET /hea\tlth", "\r\n"),
        gate.request("GET  /health", "\r\n"),
        gate.request("G@T{} /health", "\r\n"),
        gate.request(" GET /health", "\r\n"),
        gate.request("GET health", "\r\n"),
        gate.request("GET *", "\r\n"),
        gate.request(&format!("GET http://{}/health", gate.authority()), "\r\n"),
        gate.request("GET http://evil.example/health", "\r\n"),
        gate.request(&format!("CONNECT {}", gate.authority()), "\r\n"),
        good.replace("HTTP/1.1", "HTTP/2.0"),
        good.replace("HTTP/1.1", "http/1.1"),
    ] {
        gate.refuses(&bad, 400, "bad_request");
    }
}

#[test]
fn invalid_percent_encoding_is_refused() {
    let gate = Gate::new();
    for selector in ["%", "%4", "%zz", "%g0", "p%", "%+1"] {
        gate.host.http("GET", &format!("/workspaces/{selector}")).fails(400, "bad_request");
    }
    // A selector has to be UTF-8.
    for selector in ["%ff", "%c3%28", "%ed%a0%80"] {
        gate.host.http("DELETE", &format!("/workspaces/{selector}")).fails(400, "bad_request");
    }
    // An encoded slash is no separator.
    gate.host.http("GET", "/workspaces/p%2Fpath").fails(404, "workspace_not_found");
}

// --- Lengths, and request smuggling ---

#[test]
fn content_length_must_be_one_number() {
    let gate = Gate::new();
    let length = gate.addition_length();
    for value in [
        "-1".to_owned(),
        format!("+{length}"),
        format!("{length:#x}"),
        format!("{length}.0"),
        format!("{length} {length}"),
        format!("{length}, {length}"),
        format!("{length},{}", length + 1),
        format!("{length};"),
        "".to_owned(),
        "none".to_owned(),
        "1e2".to_owned(),
        "\u{661}".to_owned(),
    ] {
        gate.refuses(gate.addition(&format!("Content-Length: {value}\r\n")), 400, "bad_request");
    }
    for lines in [
        format!("Content-Length: {length}\r\nContent-Length: {length}\r\n"),
        format!("Content-Length: {length}\r\nContent-Length: 0\r\n"),
        format!("content-length: 0\r\nCONTENT-LENGTH: {length}\r\n"),
        format!("Content-Length : {length}\r\n"),
        format!("Content-Length\t: {length}\r\n"),
    ] {
        gate.refuses(gate.addition(&lines), 400, "bad_request");
    }
}

#[test]
fn absurd_length_is_refused_at_once() {
    let gate = Gate::new();
    // The daemon neither waits for the body nor allocates for it.
    for value in ["1048577", "50000000000", "9223372036854775807", "18446744073709551615"] {
        gate.refuses(gate.addition(&format!("Content-Length: {value}\r\n")), 413, "too_large");
    }
    // More digits than any integer type holds.
    let endless = gate.addition(&format!("Content-Length: {}\r\n", "9".repeat(40)));
    gate.refuses_as(endless, &[(413, "too_large"), BAD_REQUEST]);
}

#[test]
fn chunked_control_requests_are_refused() {
    let gate = Gate::new();
    gate.host.exercises(["code length_required"]);
    let length = gate.addition_length();
    let chunked = gate.addition("Transfer-Encoding: chunked\r\n").replacen('{', &format!("{length:x}\r\n{{"), 1);
    gate.refuses(chunked + "\r\n0\r\n\r\n", 411, "length_required");
}

#[test]
fn conflicting_lengths_are_refused() {
    let gate = Gate::new();
    let length = gate.addition_length();
    for lines in [
        format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n"),
        format!("Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n"),
        format!("Content-Length: {length}\r\nTransfer-Encoding: identity\r\n"),
        format!("Content-Length: {length}\r\nTransfer-Encoding:\r\n"),
        format!("Content-Length: {length}\r\nTransfer-Encoding: xchunked\r\n"),
        format!("Content-Length: {length}\r\nTransfer-Encoding : chunked\r\n"),
        format!("Content-Length: {length}\r\ntransfer-encoding:\tchunked\r\n"),
    ] {
        gate.refuses(gate.addition(&lines), 400, "bad_request");
    }
    for lines in [
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: \"chunked\"\r\n",
    ] {
        gate.refuses_as(gate.addition(lines), &[BAD_REQUEST, (411, "length_required")]);
    }
}

#[test]
fn bytes_after_a_request_are_not_executed() {
    let gate = Gate::new();
    let hidden = gate.addition(&format!("Content-Length: {}\r\n", gate.addition_length()));
    // A request hidden after a GET, in its body, or after a refused one is never executed; `reply` checks
    // that there is only one reply.
    assert_eq!(gate.reply(gate.request("GET /health", "\r\n") + &hidden).status, 200);
    let body = gate.request("GET /health", &format!("Content-Length: {}\r\n\r\n{hidden}", hidden.len()));
    gate.reply(body);
    let refused = gate.request("POST /workspaces", "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n");
    gate.refuses(refused + &hidden, 400, "bad_request");
    gate.refuses(gate.request("GET /nope", "\r\n") + &hidden, 404, "not_found");
}

// --- Bodies ---

#[test]
fn body_must_be_declared_as_json() {
    let gate = Gate::new();
    gate.host.exercises(["code unsupported_media_type"]);
    let rename = |content_type: &str| {
        gate.host.http("PATCH", "/workspaces/p").header("Content-Type", content_type).body(r#"{"name": "p"}"#)
    };
    for content_type in
        ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/json;charset=UTF-8"]
    {
        rename(content_type).ok();
    }
    for content_type in [
        "text/plain",
        "text/plain; application/json",
        "application/jsonx",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
    ] {
        rename(content_type).fails(415, "unsupported_media_type");
    }
    gate.host.http("PATCH", "/workspaces/p").body(r#"{"name": "p"}"#).fails(415, "unsupported_media_type");
}

#[test]
fn empty_body_is_an_empty_object() {
    let gate = Gate::new();
    assert_eq!(gate.host.http("POST", "/instances/p/dispose").ok()["disposed"], false);
    gate.host.http("POST", "/workspaces").header("Content-Type", "application/json").fails(400, "bad_request");
}

#[test]
fn malformed_bodies_are_refused() {
    let gate = Gate::new();
    let deep = format!("{{\"path\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    for body in [
        &b"not json"[..],
        b"{",
        b"{\"path\": \"/\"",
        b"{\"path\": \"/\"} trailing",
        b"[]",
        b"null",
        b"\"/\"",
        b"{}",
        b"{\"path\": 5}",
        b"{\"path\": null}",
        b"{\"path\": [\"/\"]}",
        b"{\"path\": \"/\", \"name\": {}}",
        b"{\"path\": \"\xff\"}",
        b"{\"path\": \"\\ud800\"}",
        b"\xef\xbb\xbf{\"path\": \"/\"}",
        deep.as_bytes(),
    ] {
        let request = gate.host.http("POST", "/workspaces").header("Content-Type", "application/json").body(body);
        request.fails(400, "bad_request");
    }
    for (path, body) in [
        ("/instances/p/dispose", json!({"force": "yes"})),
        ("/workspaces/remote", json!({"baseUrl": 1})),
        ("/shutdown", json!({"keepOpencode": 1})),
    ] {
        gate.host.http("POST", path).json(body).fails(400, "bad_request");
    }
}

#[test]
fn body_size_is_limited() {
    const LIMIT: usize = 1024 * 1024;
    let gate = Gate::new();
    let body = |length: usize| format!("{{\"name\": \"p\"{}}}", " ".repeat(length - 13));
    let rename = |length: usize| {
        gate.host.http("PATCH", "/workspaces/p").header("Content-Type", "application/json").body(body(length))
    };
    rename(LIMIT).ok();
    rename(LIMIT + 1).fails(413, "too_large");
}

#[test]
fn missing_body_times_out() {
    let gate = Gate::new();
    let head = gate.request("POST /workspaces", "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{");
    // The daemon may reply or just close; `send_raw` checks that it does not leave the connection open.
    for bytes in gate.raw(&head) {
        assert!(bytes.is_empty() || Reply::parse(&bytes).is_some_and(|reply| (400..=408).contains(&reply.status)));
    }
    // A body that ends early.
    for mut stream in gate.host.connections() {
        stream.write_all(head.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        read_to_close(&mut stream);
    }
}

// --- Heads ---

#[test]
fn head_size_is_limited() {
    let gate = Gate::new();
    gate.host.exercises(["code too_large"]);
    let with_header = |length: usize| gate.request("GET /health", &format!("X: {}\r\n\r\n", "x".repeat(length)));
    assert_eq!(gate.reply(with_header(15_000)).status, 200);
    for length in [17_000, 200_000] {
        gate.refuses(with_header(length), 431, "too_large");
    }
    let long_path = gate.request(&format!("GET /{}", "x".repeat(100_000)), "\r\n");
    gate.refuses_as(long_path, &[(414, "too_large"), (431, "too_large")]);
    let many = gate.request("GET /health", &("X: x\r\n".repeat(300_000) + "\r\n"));
    gate.refuses(many, 431, "too_large");
    let few = gate.request("GET /health", &("X: x\r\n".repeat(50) + "\r\n"));
    assert_eq!(gate.reply(few).status, 200);
}

#[test]
fn ten_megabyte_head_is_not_read() {
    let gate = Gate::new();
    let endless = gate.request("GET /health", &format!("X: {}", "x".repeat(10_000_000)));
    gate.refuses(endless, 431, "too_large");
}

#[test]
fn incomplete_head_times_out() {
    let gate = Gate::new();
    let head = gate.request("GET /health", "");
    // An empty and a partial head.
    gate.raw("");
    gate.raw(&head);
    // A byte at a time, for ever.
    for mut stream in gate.host.connections() {
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        wait_for("the connection to be closed", || {
            stream.write_all(b"x").is_err() || matches!(stream.read(&mut [0; 512]), Ok(0))
        });
    }
}

// --- Load ---

/// Opens this many connections and sends these bytes on each.
fn open_many(gate: &Gate, count: usize, bytes: &str) -> Vec<TcpStream> {
    // The backlog: beyond it the kernel drops new connections.
    const QUEUE: usize = 100;
    raise_limit();
    let port = gate.host.port();
    let mut streams = Vec::new();
    for n in 1..=count {
        let mut stream = connect(port);
        // The daemon may have refused and closed it already.
        let _ = stream.write_all(bytes.as_bytes());
        streams.push(stream);
        if n % QUEUE == 0 {
            wait_for("the queue to drain", || sockets(port, LISTEN).iter().all(|(_, waiting)| *waiting == 0));
        }
    }
    streams
}

#[test]
fn idle_and_half_open_connections_block_no_others() {
    let gate = Gate::new();
    gate.host.health();
    let before = resources(gate.pid);
    let half = gate.request("POST /workspaces", "Content-Length: 10\r\n");
    let mut idle = open_many(&gate, 300, "");
    idle.extend(open_many(&gate, 300, &half));
    gate.host.health();
    gate.host.openwork(["workspace", "list"]).ok();
    gate.host.openwork(["workspace", "path", "p"]).ok();
    // The daemon closes them by itself and leaks nothing.
    for stream in &mut idle {
        read_to_close(stream);
    }
    wait_for("descriptors and threads to be released", || {
        let now = resources(gate.pid);
        now.0 <= before.0 && now.1 <= before.1
    });
}

#[test]
fn connections_above_the_limit_are_refused() {
    const LIMIT: usize = 1024;
    /// Connections of the commands before, which may not be closed yet.
    const CLOSING: usize = 8;
    let gate = Gate::with(&[], "ulimit -n 4500");
    gate.host.exercises(["code overloaded"]);
    // Streams of events stay open, however long it takes to open them all.
    let request = gate.request("GET /events", "\r\n");
    raise_limit();
    let mut streams = Vec::new();
    let mut open_all = || {
        loop {
            let mut stream = gate.host.connect();
            // A connection that is turned away may be closed already.
            let _ = stream.write_all(request.as_bytes());
            let mut status = [0; 12];
            match stream.read_exact(&mut status) {
                Ok(()) if status.ends_with(b"200") => streams.push(stream),
                _ => return streams.len(),
            }
        }
    };
    // Until the commands before have gone, and even a connection that sends nothing is turned away.
    let (open, turned_away) =
        until("a connection to be turned away", || Some((open_all(), Reply::parse(&gate.host.send_raw(""))?)));
    assert!((LIMIT - CLOSING..=LIMIT).contains(&open), "{open}");
    turned_away.refused(503, "overloaded");
    assert_eq!(turned_away.header("x-openwork-error"), Some("overloaded"));
    drop(streams);
    wait_for("the daemon to accept connections again", || {
        gate.host.http("GET", "/health").try_send().is_some_and(|reply| reply.status == 200)
    });
}

#[test]
fn closed_event_streams_free_their_slots() {
    let gate = Gate::new();
    gate.host.health();
    let before = resources(gate.pid);
    // More streams than there are slots, while no event is written to them.
    for _ in 0..1200 {
        drop(gate.host.http("GET", "/events").events());
    }
    assert_eq!(gate.host.http("GET", "/health").send().status, 200);
    wait_for("the daemon to release them", || {
        let now = resources(gate.pid);
        now.0 <= before.0 && now.1 <= before.1
    });
}

#[test]
fn thread_exhaustion_is_reported_and_survived() {
    let host = Host::unprivileged();
    host.openwork(["daemon", "start"]).ok();
    host.add(host.project("p"));
    let (daemon, opencode) = (host.daemon_pid(), host.opencode_pid());
    // As the daemon's own user: root may lack the capability to limit others.
    let limit = |soft: &str| {
        let mut prlimit = Command::new("prlimit");
        prlimit.args(["--pid", &daemon.to_string(), &format!("--nproc={soft}:")]);
        if is_root() {
            prlimit.uid(NOBODY).gid(NOBODY);
        }
        assert!(prlimit.status().unwrap().success());
    };
    // The user has more threads than this, so the next one is refused; streams take those that wait.
    limit("1");
    let mut streams = Vec::new();
    for target in ["/health", "/workspaces", "/w/p/path"] {
        let reply = until("no thread to be left", || {
            let reply = host.routed("GET", target).send();
            if reply.status == 200 {
                let mut stream = host.connect();
                let head = format!("GET /events HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n\r\n", host.port());
                stream.write_all(head.as_bytes()).unwrap();
                streams.push(stream);
            }
            (reply.status != 200).then_some(reply)
        });
        reply.refused(503, "overloaded");
        assert_eq!(reply.header("x-openwork-error"), Some("overloaded"));
    }
    let hard = getrlimit(Resource::Nproc).maximum;
    limit(&hard.map_or("unlimited".to_owned(), |hard| hard.to_string()));
    host.routed("GET", "/w/p/path").send();
    host.http("GET", "/workspaces").ok();
    assert_eq!((host.daemon_pid(), host.opencode_pid()), (daemon, opencode));
}

/// Tests that need strace, to see system calls.
mod with_strace {
    use super::*;

    #[test]
    #[ignore = "needs strace(1), to see threads start"]
    fn requests_one_after_another_start_no_thread() {
        const COUNT: usize = 20;
        let host = Host::new();
        let trace = host.path("trace");
        let strace = format!("exec strace -f -e trace=clone,clone3 -o '{}' \"$0\" \"$@\"", trace.display());
        let daemon = host.openwork(["daemon", "run"]).after(&strace).spawn();
        wait_for("the daemon", || host.lock_text().is_some());
        host.add(host.project("p"));
        let ask = || {
            host.health();
            host.routed("GET", "/w/p/path").send();
            // A thread has to come back before it can serve the next connection.
            thread::sleep(Duration::from_millis(20));
        };
        let started = || fs::read_to_string(&trace).unwrap().matches("CLONE_THREAD").count();
        // A thread per request would be twice as many as `COUNT` in each round. On a busy machine, threads may
        // come back late, and others are started in their place.
        wait_for("a round in which hardly a thread is started", || {
            let before = started();
            (0..COUNT).for_each(|_| ask());
            started() - before < COUNT / 2
        });
        host.openwork(["daemon", "stop"]).ok();
        daemon.wait();
    }
}

#[test]
fn daemon_refuses_to_start_with_too_few_descriptors() {
    let host = Host::new();
    for limit in [12, 16, 47] {
        let error = host.openwork(["daemon", "start"]).after(&format!("ulimit -n {limit}")).output();
        assert_eq!(error.status.code(), Some(1), "{limit}: {error:?}");
        host.openwork(["status"]).fails(3, "daemon_not_running");
    }
    let start = host.openwork(["daemon", "start"]).after("ulimit -n 47");
    let error = start.fails(1, "daemon_start_failed");
    assert!(error["message"].as_str().unwrap().contains("ulimit -n 1024"), "{error}");
    host.openwork(["daemon", "start"]).after("ulimit -n 48").ok();
    host.openwork(["workspace", "path", &host.add(host.project("p"))]).ok();
}

#[test]
fn descriptor_exhaustion_is_survived() {
    let gate = Gate::with(&[], "ulimit -n 64");
    gate.host.health();
    let before = resources(gate.pid);
    let mut streams = open_many(&gate, 200, "");
    // Read each until the daemon closes it; connections still in the queue follow.
    for stream in &mut streams {
        read_to_close(stream);
    }
    // A client sees the close before the daemon's descriptor is free.
    wait_for("descriptors to be released", || resources(gate.pid).0 <= before.0);
    gate.host.openwork(["workspace", "path", "p"]).ok();
}

#[test]
fn last_descriptors_are_reserved_for_requests() {
    let gate = Gate::with(&[], "ulimit -n 64");
    gate.host.health();
    let before = resources(gate.pid);
    let ask = |request: &str, rest: &str| {
        let mut stream = gate.host.connect();
        // A connection that is turned away may be closed already.
        let _ = stream.write_all(gate.request(request, rest).as_bytes());
        let mut status = [0; 12];
        stream.read_exact(&mut status).expect("an answer");
        (String::from_utf8_lossy(&status[9..]).into_owned(), stream)
    };
    let half = "Content-Type: application/json\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n";
    let mut held = Vec::new();
    loop {
        match ask("POST /workspaces", half) {
            (status, stream) if status == "100" => held.push(stream),
            (status, _) => break assert_eq!(status, "503"),
        }
        let (status, _) = ask("GET /health", "\r\n");
        assert!(status == "200" || status == "503", "{status}");
    }
    assert!(held.len() > 10, "{}", held.len());
    drop(held);
    wait_for("descriptors to be released", || resources(gate.pid).0 <= before.0);
    gate.host.health();
}

#[test]
fn descriptor_shortage_is_not_blamed_on_opencode() {
    let gate = Gate::with(&[], "ulimit -n 128");
    let pid = gate.host.opencode_pid();
    let (descriptors, _) = resources(gate.pid);
    let head = format!("Authorization: {}\r\n\r\n", gate.host.credentials());
    let request = gate.request("GET /w/p/event", &head);
    // All requests arrive before the daemon sees the first, and each needs a second descriptor.
    kill(gate.pid, Signal::STOP);
    let mut streams: Vec<TcpStream> = (0..120).map(|_| gate.host.connect()).collect();
    for stream in &mut streams {
        stream.write_all(request.as_bytes()).unwrap();
    }
    kill(gate.pid, Signal::CONT);
    let mut taken = 0;
    for stream in &mut streams {
        let mut status = [0; 12];
        match stream.read_exact(&mut status) {
            Ok(()) if status.ends_with(b"200") => taken += 1,
            Ok(()) => assert!(status.ends_with(b"503"), "{}", String::from_utf8_lossy(&status)),
            // Refused before its request was read, so a reset overtook the refusal.
            Err(e) => assert!(matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof), "{e}"),
        }
    }
    assert!((10..120).contains(&taken), "{taken}");
    drop(streams);
    wait_for("descriptors to be released", || resources(gate.pid).0 <= descriptors);
    let health = gate.host.health();
    assert_eq!((gate.host.opencode_pid(), &health["engine"]["restarts"]), (pid, &json!(0)));
}

#[test]
fn control_plane_restarts_for_the_next_request() {
    let gate = Gate::new();
    let socket = gate.host.file("control.sock");
    for _ in 0..5 {
        fs::remove_file(&socket).unwrap();
        // The connections that are kept still lead to the server before.
        wait_for("another socket", || {
            thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| gate.host.health());
                }
            });
            socket.exists()
        });
    }
}

#[test]
fn unread_replies_do_no_harm() {
    let gate = Gate::new();
    let pipelined = gate.request("GET /workspaces", "\r\n").repeat(100_000);
    for _ in 0..3 {
        let mut stream = gate.host.connect();
        // A reset ends it at the latest: the daemon reads only the first request.
        let _ = stream.write_all(pipelined.as_bytes());
    }
    // Clients that disconnect before the reply.
    for _ in 0..100 {
        gate.host.connect().write_all(gate.request("GET /workspaces/p/path", "\r\n").as_bytes()).unwrap();
    }
}

/// A proxy or a client would give up on a silent connection.
#[test]
fn quiet_event_stream_shows_that_it_is_alive() {
    let gate = Gate::new();
    let request = gate.request("GET /events", "\r\n");
    let mut stream = gate.host.connect();
    stream.write_all(request.as_bytes()).unwrap();
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    assert!(lines.any(|line| line == ": still here"));
}

#[test]
fn burst_of_requests_is_answered() {
    let gate = Gate::new();
    thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| {
                for stream in gate.host.connections() {
                    gate.host.is_in_step(stream);
                }
                for _ in 0..5 {
                    let request = gate.host.http("GET", "/workspaces").header("Connection", "close");
                    assert_eq!(request.send().header("connection"), Some("close"));
                }
            });
        }
    });
}

// --- Random input ---

#[test]
fn mutated_requests_get_one_reply_or_none() {
    const REQUESTS: usize = 4000;
    let gate = Gate::new();
    let seeds = [
        gate.request("GET /health", "\r\n"),
        gate.request("GET /workspaces/p", "Origin: tauri://localhost\r\nX-Openwork-Timeout: 1\r\n\r\n"),
        gate.request(
            "PATCH /workspaces/p",
            "Content-Type: application/json\r\nContent-Length: 13\r\n\r\n{\"name\": \"p\"}",
        ),
        gate.request("POST /workspaces/%70/activate", "Content-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"),
    ];
    let mut random = Random(0x5eed);
    for n in 0..REQUESTS {
        let mut bytes = seeds[n % seeds.len()].clone().into_bytes();
        for _ in 0..=random.below(4) {
            random.mutate(&mut bytes);
        }
        let mut stream = gate.host.connect();
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let reply = read_to_close(&mut stream);
        if reply.is_empty() {
            continue;
        }
        let parsed = Reply::parse(&reply).unwrap_or_else(|| panic!("{bytes:?} {reply:?}"));
        let length = parsed.header("content-length").map_or(0, |length| length.parse::<usize>().unwrap());
        assert_eq!(parsed.body.len(), length, "{:?}", String::from_utf8_lossy(&bytes));
    }
    // A mutated request may have renamed the workspace.
    gate.host.http("PATCH", "/workspaces/@active").json(json!({"name": "p"})).ok();
}
