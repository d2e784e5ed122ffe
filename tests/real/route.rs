//! OpenCode's own clients through `/w/<ws>/…`: its SDK, a terminal, its TUI and its command line,
//! with a stand-in for a provider of models, so that sessions run.
//!
//! `OPENWORK_TEST_SDK` is the directory whose `node_modules` hold `@opencode-ai/sdk`.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;

use serde_json::{Value, json};

use crate::support::{ESTABLISHED, Host, Signal, is_alive, kill, read_to_close, sockets, until, wait_for, wait_gone};
use crate::{disposal, path, real};

/// A project that OpenCode takes for one of its own: a repository with a commit.
fn repository(host: &Host, name: &str) -> PathBuf {
    let project = host.project(name);
    for args in [
        &["init", "--quiet"][..],
        &["-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "--quiet", "--allow-empty", "-m", name],
    ] {
        let mut git = Command::new("git");
        let status = git.args(args).current_dir(&project).env("HOME", host.home()).status().expect("running git");
        assert!(status.success(), "git {args:?}: {status}");
    }
    project
}

/// The state of a workspace's instance.
fn state(host: &Host, name: &str) -> String {
    let list = host.openwork(["instance", "list"]).json();
    let mut instances = list["instances"].as_array().unwrap().iter();
    let instance = instances.find(|instance| instance["workspace"]["name"] == name);
    instance.unwrap()["state"].as_str().unwrap().to_owned()
}

// --- A program of node's ---

/// A script of test-data/ on its way. Dropped, it is killed, and shows what it complained of.
struct Script {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    stderr: PathBuf,
}

impl Script {
    fn start(host: &Host, name: &str, args: &[&Path], env: &[(&str, &str)]) -> Script {
        // A copy, beside which it finds the modules that it imports.
        let script = host.path(name);
        fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("test-data").join(name), &script).unwrap();
        let stderr = host.path(format!("{name}.stderr"));
        let mut child = Command::new("node")
            .arg(script)
            .args(args)
            .env_clear()
            .env("PATH", host.get("PATH"))
            .env("HOME", host.home())
            .envs(env.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&stderr).unwrap())
            .spawn()
            .expect("running node");
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Script { child, stdin, stdout: BufReader::new(stdout), stderr }
    }

    /// The next line that it prints.
    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: the script says {line:?}"))
    }

    fn tell(&mut self) {
        self.stdin.write_all(b"\n").unwrap();
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- {}\n{}", self.stderr.display(), fs::read_to_string(&self.stderr).unwrap_or_default());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// --- The SDK ---

#[test]
fn the_sdk_has_one_url_per_workspace() {
    let sdk = std::env::var_os("OPENWORK_TEST_SDK").map(PathBuf::from);
    let sdk = sdk.expect("OPENWORK_TEST_SDK is to name where @opencode-ai/sdk is; `just test` installs it");
    let modules = sdk.join("node_modules");
    assert!(modules.join("@opencode-ai/sdk").is_dir(), "there is no SDK in {}", modules.display());
    let host = real();
    symlink(modules, host.path("node_modules")).unwrap();
    let (a, b) = (repository(&host, "A"), repository(&host, "B"));
    host.openwork(["daemon", "start"]).ok();
    let urls = [&a, &b].map(|project| format!("http://127.0.0.1:{}/w/{}", host.port(), host.add(project)));
    let mut script = Script::start(
        &host,
        "sdk.mjs",
        &[],
        &[
            ("URL_A", &urls[0]),
            ("URL_B", &urls[1]),
            ("DIRECTORY_A", a.to_str().unwrap()),
            ("DIRECTORY_B", b.to_str().unwrap()),
            ("CREDENTIALS", &host.credentials()),
        ],
    );
    assert_eq!(script.line()["step"], "paths");
    assert_eq!(script.line()["step"], "streams");
    let before = host.opencode_pid();
    kill(before, Signal::KILL);
    script.tell();
    let again = script.line();
    assert_eq!(again["step"], "again");
    // It was no end that the SDK takes for the end of all events.
    for workspace in ["a", "b"] {
        assert!(!again["errors"][workspace].as_array().unwrap().is_empty(), "{again}");
    }
    assert_ne!(host.opencode_pid(), before);
}

// --- A terminal ---

/// A client of a terminal of opencode (RFC 6455).
struct Terminal {
    stream: TcpStream,
    seen: String,
}

impl Terminal {
    fn open(host: &Host, workspace: &str) -> Terminal {
        let pty = host.routed("POST", &format!("/w/{workspace}/pty")).json(json!({})).send();
        assert_eq!(pty.status, 200, "{pty:?}");
        let pty = pty.json();
        let target = format!("/w/{workspace}/pty/{}/connect", pty["id"].as_str().unwrap());
        let mut stream = host.connect();
        let head = format!(
            "GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nAuthorization: {}\r\nConnection: keep-alive, Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            host.port(),
            host.credentials()
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.extend(byte);
        }
        let head = String::from_utf8(head).unwrap().to_lowercase();
        assert!(head.starts_with("http/1.1 101 "), "{head}");
        for header in
            ["upgrade: websocket", "connection: upgrade", "sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="]
        {
            assert!(head.contains(header), "{head}");
        }
        Terminal { stream, seen: String::new() }
    }

    /// Sends a short frame; the key that a client has to mask it with is 0.
    fn send(&mut self, opcode: u8, payload: &[u8]) {
        let length = u8::try_from(payload.len()).ok().filter(|length| *length < 126).expect("a short frame");
        let head = [0x80 | opcode, 0x80 | length, 0, 0, 0, 0];
        self.stream.write_all(&[&head, payload].concat()).unwrap();
    }

    fn type_line(&mut self, line: &str) {
        self.send(1, format!("{line}\r").as_bytes());
    }

    /// The next frame: opcode and payload.
    fn receive(&mut self) -> (u8, Vec<u8>) {
        let mut read = |count: usize| {
            let mut bytes = vec![0; count];
            self.stream.read_exact(&mut bytes).expect("a frame");
            bytes
        };
        let head = read(2);
        let length = match head[1] {
            126 => read(2).iter().fold(0, |length, byte| length << 8 | usize::from(*byte)),
            127 => read(8).iter().fold(0, |length, byte| length << 8 | usize::from(*byte)),
            length => usize::from(length),
        };
        (head[0] & 0x0f, read(length))
    }

    /// Waits until the terminal has shown this.
    fn shows(&mut self, text: &str) {
        while !self.seen.contains(text) {
            let (opcode, payload) = self.receive();
            assert!(opcode < 8, "the terminal has ended; before: {}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&payload));
        }
    }
}

#[test]
fn a_terminal_of_opencode_is_in_its_workspace() {
    let host = real();
    host.openwork(["daemon", "start"]).ok();
    let (a, b) = (host.project("A"), host.project("B"));
    host.add(&a);
    host.add(&b);
    let mut terminal = Terminal::open(&host, "A");
    let mut other = Terminal::open(&host, "B");
    terminal.type_line("echo hello-$((40+2))");
    terminal.shows("hello-42");
    for (terminal, project) in [(&mut terminal, &a), (&mut other, &b)] {
        terminal.type_line("echo \"in <$(pwd)>\"");
        terminal.shows(&format!("in <{}>", project.display()));
    }
    // Much of it, in frames of all sizes.
    terminal.type_line("seq -s, 1 30000");
    let numbers: Vec<String> = (1..=30_000).map(|number| number.to_string()).collect();
    terminal.shows(&numbers.join(","));

    // It ends as clients end it, and when opencode ends.
    terminal.send(8, &1000_u16.to_be_bytes());
    while terminal.receive().0 != 8 {}
    assert_eq!(read_to_close(&mut terminal.stream), b"");
    let before = host.opencode_pid();
    kill(before, Signal::KILL);
    read_to_close(&mut other.stream);
    wait_gone(before);
    let mut again = Terminal::open(&host, "B");
    again.type_line("echo again-$((40+2))");
    again.shows("again-42");
}

#[test]
fn a_client_that_goes_away_is_gone_for_opencode() {
    let host = real();
    host.add(host.project("p"));
    path(&host, &["p"]);
    let port = host.get("OPENWORK_OPENCODE_PORT").parse().unwrap();
    let connections = || sockets(port, ESTABLISHED).len();
    // Health probes come and go.
    let before = until("a quiet moment", || Some(connections()).filter(|_| state(&host, "p") == "warm"));
    let mut streams: Vec<_> = (0..10).map(|_| host.routed("GET", "/w/p/event").events()).collect();
    for stream in &mut streams {
        stream.find(|event| event["type"] == "server.connected").unwrap();
    }
    assert!(connections() >= before + 2 * 10, "both ends of each are in the table");
    drop(streams);
    wait_for("opencode to be rid of them", || connections() <= before);
    const CLOSE_WAIT: &str = "08";
    wait_for("it to have closed its side", || sockets(port, CLOSE_WAIT).is_empty());
}
