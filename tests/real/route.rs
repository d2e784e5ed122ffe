//! OpenCode's own clients through `/w/<ws>/…`: SDK, terminal, TUI and command line. A stand-in for a model
//! provider lets sessions run.
//!
//! `OPENWORK_TEST_SDK` is the directory whose `node_modules` has `@opencode-ai/sdk`.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{ESTABLISHED, Host, Signal, kill, poll, read_to_close, sockets, until, wait_for, wait_gone};
use crate::{disposal, path, real};

/// A project that OpenCode recognises as one: a repository with a commit.
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

// --- node scripts ---

/// A running script of test-data/. Dropping it kills the script and, if the test failed, shows its errors.
struct Script {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    stderr: PathBuf,
}

impl Script {
    fn start(host: &Host, name: &str, args: &[&Path], env: &[(&str, &str)]) -> Script {
        // A copy beside the `node_modules` that it imports from.
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

    /// The next line of output.
    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: the script printed {line:?}"))
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

// --- A terminal ---

/// A WebSocket client (RFC 6455) of a terminal of opencode.
struct Terminal {
    stream: TcpStream,
    seen: String,
}

impl Terminal {
    fn open(host: &Host, workspace: &str) -> Terminal {
        let target = format!("/w/{workspace}/pty/{}/connect", Terminal::make(host, workspace));
        Terminal::connect(host, &target, &format!("Authorization: {}\r\n", host.credentials()))
    }

    /// Creates a terminal and returns its id.
    fn make(host: &Host, workspace: &str) -> String {
        let pty = host.routed("POST", &format!("/w/{workspace}/pty")).json(json!({})).send();
        assert_eq!(pty.status, 200, "{pty:?}");
        pty.json()["id"].as_str().unwrap().to_owned()
    }

    fn connect(host: &Host, target: &str, headers: &str) -> Terminal {
        let mut stream = host.connect();
        let head = format!(
            "GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n{headers}Connection: keep-alive, Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            host.port(),
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
        // The key and the accept value are the example of RFC 6455.
        for value in ["upgrade: websocket", "connection: upgrade", "-accept: s3pplmbitxaq9kygzzhzrbk+xoo="] {
            assert!(head.contains(value), "{head}");
        }
        Terminal { stream, seen: String::new() }
    }

    /// Sends a short frame, masked with the key 0.
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

    /// Waits until the terminal has shown this text.
    fn shows(&mut self, text: &str) {
        while !self.seen.contains(text) {
            let (opcode, payload) = self.receive();
            assert!(opcode < 8, "the terminal has ended; before: {}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&payload));
        }
    }
}

#[test]
fn terminal_runs_in_its_workspace() {
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
    // Much output, in frames of all sizes.
    terminal.type_line("seq -s, 1 30000");
    let numbers: Vec<String> = (1..=30_000).map(|number| number.to_string()).collect();
    terminal.shows(&numbers.join(","));

    // A terminal ends with a close frame, and when opencode dies.
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
fn web_page_opens_a_terminal_with_a_ticket() {
    let host = real();
    host.openwork(["daemon", "start"]).ok();
    let workspace = host.add(host.project("p"));
    let id = Terminal::make(&host, "p");
    let ticket = host.routed("POST", &format!("/w/p/pty/{id}/connect-token")).header("X-OpenCode-Ticket", "1");
    let ticket = ticket.send().json()["ticket"].as_str().unwrap().to_owned();
    let target = format!("/w/{workspace}/pty/{id}/connect?ticket={ticket}");
    let mut terminal = Terminal::connect(&host, &target, "Origin: tauri://localhost\r\n");
    terminal.type_line("echo hello-$((40+2))");
    terminal.shows("hello-42");
}

/// Every query or header parameter of opencode's API whose name suggests a location.
fn places(description: &Value) -> BTreeSet<String> {
    let is_like_a_place = |name: &str| {
        ["director", "workspace", "location", "worktree", "root", "cwd"].iter().any(|word| name.contains(word))
    };
    let mut places = BTreeSet::new();
    let operations =
        description["paths"].as_object().unwrap().values().flat_map(|path| path.as_object().unwrap().values());
    for parameter in operations.flat_map(|operation| operation["parameters"].as_array().into_iter().flatten()) {
        let (place, name) = (parameter["in"].as_str().unwrap(), parameter["name"].as_str().unwrap());
        let parts = parameter["schema"]["properties"].as_object();
        let parts = parts.into_iter().flatten().map(|(part, _)| format!("{name}[{part}]"));
        for name in parts.chain([name.to_owned()]) {
            if place != "path" && is_like_a_place(&name.to_lowercase()) {
                places.insert(format!("{place} {name}"));
            }
        }
    }
    places
}

#[test]
fn no_api_parameter_leaves_the_workspace() {
    let host = real();
    host.openwork(["daemon", "start"]).ok();
    let (p, q) = (host.project("p"), host.project("q"));
    host.add(&p);
    let places = places(&host.opencode("GET", "/doc").send().json());
    // `roots` limits a list of sessions to those without a parent. A new name has to be examined.
    let known = [
        "query directory",
        "query location",
        "query location[directory]",
        "query location[workspace]",
        "query roots",
        "query workspace",
    ];
    assert_eq!(places, known.map(str::to_owned).into());
    let elsewhere = q.to_str().unwrap();
    for place in places.iter().filter_map(|place| place.strip_prefix("query ")) {
        for value in [elsewhere, "wrk_1"] {
            for path in ["path", "api/location"] {
                let reply = host.routed("GET", &format!("/w/p/{path}?{place}={value}")).send();
                assert_eq!(reply.json()["directory"], p.to_str().unwrap(), "{path}?{place}={value}");
            }
        }
    }
    for (name, value) in [("x-opencode-directory", elsewhere), ("x-opencode-workspace", "wrk_1")] {
        let reply = host.routed("GET", "/w/p/path").header(name, value).send();
        assert_eq!(reply.json()["directory"], p.to_str().unwrap(), "{name}");
    }
}

#[test]
fn large_messages_arrive_complete() {
    let host = real();
    host.openwork(["daemon", "start"]).ok();
    host.add(host.project("p"));
    let session = host.routed("POST", "/w/p/session").json(json!({})).send().json();
    let target = format!("/session/{}/message", session["id"].as_str().unwrap());
    let text: String = (0..1_000_000).map(|number| format!("{number} ")).collect();
    let message = host.path("message");
    fs::write(&message, json!({"noReply": true, "parts": [{"type": "text", "text": text}]}).to_string()).unwrap();
    let api = |args: &[&str]| {
        let output = host.openwork(["api", "p", &target].iter().chain(args)).ok();
        serde_json::from_str::<Value>(&output.stdout).unwrap()
    };
    let echo = api(&["-d", &format!("@{}", message.display())]);
    assert!(echo["parts"][0]["text"] == text, "the echo differs");
    let kept = api(&[]);
    assert!(kept[0]["parts"][0]["text"] == text, "the stored text differs");
}

#[test]
fn client_disconnect_reaches_opencode() {
    let host = real();
    host.add(host.project("p"));
    path(&host, &["p"]);
    let port = host.get("OPENWORK_OPENCODE_PORT").parse().unwrap();
    let connections = || sockets(port, ESTABLISHED).len();
    let mut streams: Vec<_> = (0..10).map(|_| host.routed("GET", "/w/p/event").events()).collect();
    for stream in &mut streams {
        stream.find(|event| event["type"] == "server.connected").unwrap();
    }
    assert!(connections() > streams.len(), "the daemon's own connection is missing");
    drop(streams);
    wait_for("opencode to lose the connections", || connections() == 1);
    const CLOSE_WAIT: &str = "08";
    wait_for("opencode to close its side", || sockets(port, CLOSE_WAIT).is_empty());
}

// --- Running sessions ---

/// A host whose opencode uses the stand-in for a model provider.
struct Provided {
    // Dropped in this order: the script before the directory that it works in.
    _provider: Script,
    host: Host,
}

impl Provided {
    fn new() -> Provided {
        let host = real();
        let mut provider = Script::start(&host, "provider.mjs", &[&host.path("fake")], &[]);
        let port = provider.line();
        let config = json!({
            "provider": {"stand-in": {
                "npm": "@ai-sdk/openai-compatible", // bundled with opencode
                "name": "Stand-in",
                "options": {"baseURL": format!("http://127.0.0.1:{port}/v1"), "apiKey": "none"},
                "models": {"one": {"name": "One"}},
            }},
            "model": "stand-in/one",
            "small_model": "stand-in/one",
        });
        let place = host.home().join(".config/opencode");
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("opencode.json"), config.to_string()).unwrap();
        Provided { _provider: provider, host }
    }

    /// Starts the daemon, and opencode in an environment in which it can reach the provider.
    fn start(&self, options: &[&str]) {
        let start = self.host.openwork(["daemon", "start"].iter().chain(options));
        start.env("NO_PROXY", "127.0.0.1").env("no_proxy", "127.0.0.1").ok();
    }

    /// Begins a turn that lasts until [`Provided::release`], and returns its session.
    fn hold(&self, workspace: &str) -> String {
        let session = self.host.openwork(["api", workspace, "/session", "-d", "{}"]).ok();
        let session = serde_json::from_str::<Value>(&session.stdout).unwrap()["id"].as_str().unwrap().to_owned();
        let prompt = json!({"parts": [{"type": "text", "text": "hold it"}]}).to_string();
        let target = format!("/session/{session}/prompt_async");
        self.host.openwork(["api", workspace, &target, "-d", &prompt]).ok();
        let is_held = |line: &String| serde_json::from_str::<Value>(line).unwrap()["holds"] == true;
        wait_for("the turn to begin", || self.host.recorded("completions").iter().any(is_held));
        session
    }

    fn release(&self) {
        fs::write(self.host.path("fake/release"), "").unwrap();
    }

    /// The directories whose instances opencode has ever loaded, by its log, which may lag a moment.
    fn loaded(&self) -> BTreeSet<PathBuf> {
        let log = fs::read_to_string(self.host.home().join(".local/share/opencode/log/opencode.log")).unwrap();
        let loads = log.lines().filter_map(|line| line.split_once("message=\"creating instance\" directory="));
        loads.map(|(_, directory)| PathBuf::from(directory)).collect()
    }
}

#[test]
fn busy_instance_is_disposed_by_force() {
    let provided = Provided::new();
    let host = &provided.host;
    provided.start(&[]);
    let project = host.project("p");
    host.add(&project);
    let mut events = host.opencode("GET", "/global/event").events();
    provided.hold("p");
    host.openwork(["instance", "dispose", "p"]).fails(1, "instance_busy");
    assert_eq!(host.openwork(["instance", "dispose", "p", "--force"]).json()["disposed"], true);
    disposal(&mut events, &project);
    // The last events of the turn come first.
    wait_for("the list to show it", || state(host, "p") == "cold");
}

#[test]
fn running_sessions_are_listed_waited_for_and_aborted() {
    let provided = Provided::new();
    let host = &provided.host;
    provided.start(&[]);
    let project = host.project("p");
    host.add(&project);
    let quiet = host.routed("POST", "/w/p/session").json(json!({"title": "quiet"})).send().json();
    let mut events = host.http("GET", "/events").events();
    let session = provided.hold("p");
    let list = host.openwork(["session", "list", "p"]).json();
    let told = |at: usize| (list["sessions"][at]["id"].clone(), list["sessions"][at]["state"].clone());
    assert_eq!([told(0), told(1)], [(json!(session), json!("running")), (quiet["id"].clone(), json!("idle"))]);
    assert_eq!((&list["sessions"][1]["title"], list["sessions"].as_array().unwrap().len()), (&json!("quiet"), 2));
    assert!(list["sessions"][0]["updatedAt"].as_u64().unwrap() > 1_700_000_000_000);

    host.openwork(["wait", "p", "--timeout", "1"]).fails(1, "still_busy");
    let waiting = host.openwork(["wait", "--all"]).spawn();
    host.openwork(["session", "abort", "ses_none"]).fails(4, "session_not_found");
    assert_eq!(host.openwork(["session", "abort", quiet["id"].as_str().unwrap()]).json()["aborted"], false);
    assert_eq!(host.openwork(["session", "abort", &session]).json()["aborted"], true);
    assert!(waiting.wait().status.success());
    assert_eq!(host.openwork(["session", "list", "--all"]).json()["sessions"][0]["state"], "idle");
    for kind in ["session.started", "session.error", "session.idle"] {
        let event = events.find(|event| event["type"].as_str().unwrap().starts_with("session.")).unwrap();
        assert_eq!((&event["type"], &event["sessionId"]), (&json!(kind), &json!(session)), "{event}");
        assert_eq!((&event["workspace"]["name"], event["title"].is_string()), (&json!("p"), true), "{event}");
    }

    let session = provided.hold("p");
    let running = || host.openwork(["session", "list", "p"]).json()["sessions"][0]["state"] == "running";
    wait_for("the turn to be listed", running);
    let stopped = host.openwork(["daemon", "stop"]).json();
    assert_eq!(stopped["sessions"][0]["id"], session.as_str());
}

#[test]
fn reply_arrives_when_its_turn_ends() {
    let provided = Provided::new();
    let host = &provided.host;
    provided.start(&[]);
    host.add(host.project("p"));
    let session = host.routed("POST", "/w/p/session").json(json!({})).send().json();
    let prompt = json!({"parts": [{"type": "text", "text": "hold on"}]});
    let target = format!("/w/p/session/{}/message", session["id"].as_str().unwrap());
    thread::scope(|scope| {
        let turn = scope.spawn(|| host.routed("POST", &target).json(prompt).send());
        wait_for("the turn to begin", || state(host, "p") == "busy");
        assert!(!turn.is_finished());
        provided.release();
        let reply = turn.join().unwrap();
        assert!(reply.status == 200 && String::from_utf8_lossy(&reply.body).contains("you said: hold on"), "{reply:?}");
    });
}

/// A terminal 200 columns wide, closed on drop.
struct Tmux {
    socket: PathBuf,
}

impl Tmux {
    /// Runs `openwork` with these arguments in a new terminal.
    fn run(host: &Host, args: &[&str]) -> Tmux {
        let tmux = Tmux { socket: host.path("tmux") };
        let start = format!(
            "exec tmux -S '{}' -f /dev/null new-session -d -x 200 -y 50 -- \"$0\" \"$@\"",
            tmux.socket.display()
        );
        host.openwork(args).after(&start).ok();
        tmux
    }

    fn command(&self, args: &[&str]) -> String {
        let output = Command::new("tmux").arg("-S").arg(&self.socket).args(args).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn screen(&self) -> String {
        self.command(&["capture-pane", "-p"])
    }

    /// Waits until the screen shows this text.
    fn shows(&self, text: &str) {
        if poll(Duration::from_secs(150), || self.screen().contains(text).then_some(())).is_none() {
            panic!("{text:?} is not on the screen:\n{}", self.screen());
        }
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        self.command(&["kill-server"]);
    }
}

mod with_tmux {
    use super::*;

    #[test]
    #[ignore = "needs tmux, for a terminal that shows a screen, and git"]
    fn attach_opens_the_tui_in_the_workspace() {
        let provided = Provided::new();
        let host = &provided.host;
        provided.start(&[]);
        let (a, b) = (repository(host, "A"), repository(host, "B"));
        host.add(&a);
        host.add(&b);
        let tmux = Tmux::run(host, &["attach", "B"]);
        tmux.shows("Ask anything");
        tmux.shows("projects/B");
        // Run a shell command in the TUI, before and after a restart of opencode.
        for (word, kills) in [("first", true), ("second", false)] {
            // Switching the prompt to shell mode takes a moment.
            until("the prompt of a shell", || {
                tmux.command(&["send-keys", "!"]);
                poll(Duration::from_secs(2), || tmux.screen().contains("exit shell mode").then_some(()))
            });
            tmux.command(&["send-keys", "-l", &format!("echo {word}-$((40+2)) in $(basename $PWD)")]);
            tmux.command(&["send-keys", "Enter"]);
            tmux.shows(&format!("{word}-42 in B"));
            if kills {
                let before = host.opencode_pid();
                kill(before, Signal::KILL);
                wait_gone(before);
                host.opencode_pid();
            }
        }
    }
}

/// The directory of modules that has OpenCode's SDK.
fn modules() -> PathBuf {
    let sdk = std::env::var_os("OPENWORK_TEST_SDK").map(PathBuf::from);
    let sdk = sdk.expect("OPENWORK_TEST_SDK is to name where @opencode-ai/sdk is; `just test` installs it");
    let modules = sdk.join("node_modules");
    assert!(modules.join("@opencode-ai/sdk").is_dir(), "there is no SDK in {}", modules.display());
    modules
}

/// The programs in the README and in docs/clients.md, unchanged. Their output is in the comment after `// `.
#[test]
fn sdk_examples_print_the_documented_output() {
    let host = real();
    symlink(modules(), host.path("node_modules")).unwrap();
    let project = host.home().join("code/web");
    fs::create_dir_all(&project).unwrap();
    let id = host.add(&project);
    let session = json!({"title": "fix the failing test"});
    assert_eq!(host.routed("POST", &format!("/w/{id}/session")).json(session).send().status, 200);
    let variables = host.openwork(["env", "web"]).secret().json()["variables"].clone();
    for page in ["README.md", "docs/clients.md"] {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap();
        let programs: Vec<&str> = text.split("```js\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
        assert!(!programs.is_empty(), "no program in {page}");
        for program in programs {
            let file = host.path("example.mjs");
            fs::write(&file, program).unwrap();
            let mut node = Command::new("node");
            node.arg(file).env_clear().env("PATH", host.get("PATH")).env("HOME", host.home());
            let texts = variables.as_object().unwrap().iter().map(|(name, value)| (name, value.as_str().unwrap()));
            let output = node.envs(texts).output().expect("running node");
            let expected = program.rsplit("// ").next().unwrap();
            let printed = String::from_utf8_lossy(&output.stdout).replace(host.home().to_str().unwrap(), "/home/me");
            assert!(output.status.success() && printed == expected, "{page}: {output:?}, not {expected}");
        }
    }
}

/// Tests that need a repository: OpenCode lists only such projects.
mod with_git {
    use super::*;

    #[test]
    #[ignore = "needs git, for a repository"]
    fn sdk_uses_one_url_per_workspace() {
        let host = real();
        symlink(modules(), host.path("node_modules")).unwrap();
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
        // The SDK saw an error, which it retries, and not the end of the stream.
        for workspace in ["a", "b"] {
            assert!(!again["errors"][workspace].as_array().unwrap().is_empty(), "{again}");
        }
        assert_ne!(host.opencode_pid(), before);
    }

    #[test]
    #[ignore = "needs git, for a repository"]
    fn session_list_is_limited_to_its_workspace() {
        let host = real();
        host.openwork(["daemon", "start"]).ok();
        // Directories without a repository are one project to OpenCode.
        let ids = ["p", "with space", "%41", "100%", "A"].map(|name| {
            let project = host.project(name);
            let id = host.add(&project);
            let made = host.routed("POST", &format!("/w/{id}/session")).json(json!({})).send().json();
            assert_eq!(made["directory"], project.to_str().unwrap());
            (id, project)
        });
        for (id, project) in &ids {
            for list in ["/session", "/experimental/session", "/session/", "//session", "/%73ession", "/SESSION"] {
                // Whatever directory the client asks for.
                let list = host.routed("GET", &format!("/w/{id}{list}?limit=50&directory=%2Felsewhere")).send().json();
                let directories = list.as_array().unwrap().iter().map(|session| session["directory"].as_str().unwrap());
                assert_eq!(directories.collect::<Vec<_>>(), [project.to_str().unwrap()]);
            }
            let list = host.routed("GET", &format!("/w/{id}/api/session?directory=%2Felsewhere")).send().json();
            let sessions = list["data"].as_array().unwrap().iter();
            let directories = sessions.map(|session| session["location"]["directory"].as_str().unwrap());
            assert_eq!(directories.collect::<Vec<_>>(), [project.to_str().unwrap()]);
        }
    }

    #[test]
    #[ignore = "needs git, for a repository"]
    fn idle_instance_is_evicted_and_the_busy_one_kept() {
        let provided = Provided::new();
        let host = &provided.host;
        provided.start(&[]);
        let (a, b, c) = (repository(host, "A"), repository(host, "B"), repository(host, "C"));
        for project in [&a, &b, &c] {
            host.add(project);
        }
        let disposed = RefCell::new(Vec::new());
        let mut events = host.opencode("GET", "/global/event").events();
        let mut wait_for_disposal = |project: &Path| {
            events.find(|event| {
                let is_disposal = event["payload"]["type"] == "server.instance.disposed";
                if is_disposal {
                    disposed.borrow_mut().push(PathBuf::from(event["directory"].as_str().unwrap()));
                }
                is_disposal && disposed.borrow().last().is_some_and(|last| last == project)
            })
        };

        // The first turn in a new home may begin slowly. The restart keeps opencode and the turn.
        let session = provided.hold("A");
        host.openwork(["daemon", "restart", "--idle-ttl", "5s"]).ok();
        assert_eq!(state(host, "A"), "busy");
        let list = host.openwork(["instance", "list"]).json();
        let running = &list["instances"][0]["sessions"];
        assert_eq!((running.as_array().unwrap().len(), running[0]["id"].as_str()), (1, Some(&*session)));
        let title = host.openwork(["api", "A", &format!("/session/{session}")]).json()["body"]["title"].clone();
        assert_eq!(running[0]["title"], title);
        host.openwork(["instance", "dispose", "A"]).fails(1, "instance_busy");
        for _ in 0..2 {
            path(host, &["B"]);
            wait_for_disposal(&b).expect("the stream to stay open");
            wait_for("the list to show it", || state(host, "B") == "cold");
            assert_eq!([state(host, "A"), state(host, "C")], ["busy", "cold"]);
        }
        // By the second eviction of B, A would have been due as well.
        assert_eq!(*disposed.borrow(), [b.as_path(), &b]);

        // After its turn has ended, A is evicted.
        provided.release();
        wait_for_disposal(&a).expect("the stream to stay open");
        assert_eq!(*disposed.borrow(), [b.as_path(), &b, &a]);
        wait_for("the list to show it", || state(host, "A") == "cold");
        wait_for("opencode to have logged it", || provided.loaded().len() >= 2);
        let messages = host.openwork(["api", "A", &format!("/session/{session}/message")]).ok();
        assert!(messages.stdout.contains("you said: hold it"), "{messages:?}");
        host.openwork(["daemon", "stop"]).ok();
        assert_eq!(provided.loaded(), BTreeSet::from([a, b]));
    }

    #[test]
    #[ignore = "needs git, for a repository"]
    fn run_executes_opencode_run_in_the_workspace() {
        let provided = Provided::new();
        let host = &provided.host;
        provided.start(&[]);
        let (a, b) = (repository(host, "A"), repository(host, "B"));
        host.add(&a);
        host.add(&b);
        let pid = host.opencode_pid();
        // opencode colours its progress output even without a terminal.
        let run =
            |words: &[&str]| host.openwork(["run", "B", "--"].iter().chain(words)).after("exec 2>\"$HOME/progress\"");
        let output = run(&["hello", "there"]).ok();
        assert_eq!(output.stdout.trim(), "you said: hello there");
        let sessions = host.openwork(["api", "B", "/session"]).ok();
        let sessions: Value = serde_json::from_str(&sessions.stdout).unwrap();
        assert_eq!((sessions.as_array().unwrap().len(), &sessions[0]["directory"]), (1, &json!(b)));
        // The exit status is opencode's.
        run(&["--model", "no/such", "hello"]).exits(1);
        assert_eq!(host.opencode_pid(), pid);
    }
}

/// Tests with curl.
mod with_curl {
    use super::*;

    #[test]
    #[ignore = "needs curl"]
    fn env_is_enough_for_curl() {
        let host = real();
        let (a, b) = (host.project("A"), host.project("it's B"));
        host.add(&a);
        host.add(&b);
        host.openwork(["daemon", "start"]).ok();
        let curl = "eval \"$(\"$0\" \"$@\")\"\n\
                    exec curl -sS --fail -u \"$OPENCODE_SERVER_USERNAME:$OPENCODE_SERVER_PASSWORD\" \"$OPENCODE_BASE_URL/path\"";
        for project in [&a, &b] {
            let output = host.openwork(["env", project.to_str().unwrap()]).after(curl).ok();
            let path: Value = serde_json::from_str(&output.stdout).unwrap();
            assert_eq!(path["directory"], project.to_str().unwrap());
        }
    }
}
