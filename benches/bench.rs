//! What openwork costs: `just bench`. Each figure is printed with its target and, where possible, with the
//! same operation without openwork in the same run: milliseconds depend on the machine, ratios do not. A
//! missed target is printed and fails nothing.
//!
//! Measured is the release build, with the real opencode whose path is in `OPENWORK_TEST_OPENCODE`.
//! Operations that are compared take turns (ABAB), so that a busy machine affects both. All figures are
//! medians.
//!
//! `cargo bench --bench bench -- headline` runs only these sections of [`SECTIONS`].

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

#[allow(dead_code)] // parts that only the tests need
#[path = "../tests/support/http.rs"]
mod http;
#[allow(dead_code)]
#[path = "../tests/support/processes.rs"]
mod processes;

use http::{Reply, Request, basic, local};
use processes::{Process, Signal};

/// A name for the command line, and its measurement.
type Section = (&'static str, fn(&mut Report));

/// One section per cost; a new one is a function and a row.
const SECTIONS: &[Section] = &[
    ("headline", headline),
    ("size", size),
    ("start", start),
    ("idle", idle),
    ("shell", shell),
    ("requests", requests),
    ("routing", routing),
    ("kept", kept),
    ("unused", unused),
    ("streams", streams),
    ("transfer", transfer),
    ("many", many),
    ("restart", restart),
    ("v2", v2),
];

const OPENWORK: &str = env!("CARGO_BIN_EXE_openwork");
/// Basic credentials of `opencode`, `bench`: known, so that opencode can be asked directly.
const PASSWORD: &str = "bench";
/// Longer than the first start of opencode in a new home, so that only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);
/// After this many requests of one kind opencode has reached its full speed.
const WARM_UP: usize = 10_000;

fn main() {
    let mut report = Report::default();
    // Cargo itself adds `--bench`.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    for (name, section) in SECTIONS {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            section(&mut report);
        }
    }
    println!("\n{} of {} targets missed", report.missed, report.targets);
}

// --- The sections ---

/// Projects of the comparison in the README.
const PROJECTS: [&str; 5] = ["web", "api", "docs", "shop", "blog"];
/// opencode keeps working for some seconds after its first answer; its memory settles after that.
const SETTLING: Duration = Duration::from_secs(10);

/// The figures in the README: the memory of five projects, the first answer from another project, commands.
fn headline(report: &mut Report) {
    report.section("Five projects, a session in each");
    let host = Host::new();
    drop(start_by_hand(&host, &host.project(PROJECTS[0]))); // the first in a new home takes several times as long
    let by_hand = {
        let servers = PROJECTS.map(|name| {
            let project = host.project(name);
            let (running, port, ..) = start_by_hand(&host, &project);
            ask(&of_opencode(port, "POST", "/session", &project).json(&json!({})));
            running
        });
        thread::sleep(SETTLING);
        let memory = proportional_memory(&host);
        drop(servers);
        memory
    };
    let daemon = Daemon::start(&host);
    for name in PROJECTS {
        let project = host.project(name);
        run(host.openwork(["workspace", "add"]).arg(&project));
        ask(&of_opencode(daemon.port, "POST", &format!("/w/{name}/session"), &project).json(&json!({})));
    }
    thread::sleep(SETTLING);
    let shared = proportional_memory(&host);
    report.print(&Figure::new("memory of five opencode servers", Bytes(by_hand)));
    report.print(&Figure::new("memory of openwork and its opencode", Bytes(shared)).against(by_hand as f64));

    report.section("First answer from another project");
    let (mut started, mut warm) = (Vec::new(), Vec::new());
    for turn in 0..9 {
        // opencode knows neither: each is another's first.
        let (name, other) = (format!("first-{turn}"), host.project(&format!("other-{turn}")));
        run(host.openwork(["workspace", "add"]).arg(host.project(&name)));
        let start = Instant::now();
        let (_running, _, _, answered) = start_by_hand(&host, &other);
        started.push(ms(answered - start));
        let target = format!("/w/{name}/path");
        warm.push(time(|| drop(ask(&of_opencode(daemon.port, "GET", &target, &host.project(&name))))));
    }
    let (started, warm) = (median(started), median(warm));
    report.print(&Figure::new("a server started for it", Ms(started)));
    report.print(&Figure::new("the warm one, through /w/", Ms(warm)).against(started));

    report.section("Commands");
    let mut names = PROJECTS.into_iter().cycle();
    let [nothing, switch, current, path] = in_turns(
        200,
        [
            &mut || run(&mut Command::new("/bin/true")),
            &mut || run(host.openwork(["switch"]).arg(names.next().expect("a cycle"))),
            &mut || run(&mut host.openwork(["current"])),
            &mut || run(&mut host.openwork(["path", "web"])),
        ],
    );
    report.print(&Figure::new("/bin/true", Ms(nothing)));
    report.print(&Figure::new("openwork switch", Ms(switch)).against(nothing));
    report.print(&Figure::new("openwork current", Ms(current)).against(nothing));
    report.print(&Figure::new("openwork path web, which asks opencode", Ms(path)).against(nothing));
}

/// The memory of all processes of a host, each page divided by the number of processes that share it: what would be
/// free without them. Bytes.
fn proportional_memory(host: &Host) -> u64 {
    let processes = Process::all_of(&host.path("home"));
    let of = |process: &Process| {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid)).expect("a process");
        1024 * field(&rollup, "\nPss:")
    };
    processes.iter().map(of).sum()
}

fn size(report: &mut Report) {
    report.section("Binary");
    let bytes = fs::metadata(OPENWORK).expect("the binary").len();
    report.print(&Figure::new("size, stripped", Bytes(bytes)).at_most(Bytes(2_300_000)));
}

/// A command without a daemon: the cost of the program itself.
fn start(report: &mut Report) {
    report.section("Command start");
    let [nothing, version] = in_turns(
        500,
        [&mut || run(&mut Command::new("/bin/true")), &mut || run(Command::new(OPENWORK).arg("--version"))],
    );
    report.print(&Figure::new("/bin/true", Ms(nothing)));
    report.print(&Figure::new("openwork --version", Ms(version)).against(nothing).at_most(Times(1.5)));
}

/// A daemon without requests.
fn idle(report: &mut Report) {
    report.section("Idle daemon, opencode ready");
    let host = Host::new();
    let daemon = Daemon::start(&host);
    thread::sleep(Duration::from_secs(1));
    report.print(&Figure::new("resident after a second", Bytes(daemon.memory())).at_most(Bytes(4_500_000)));
    let before = daemon.context_switches();
    thread::sleep(Duration::from_secs(30));
    // In that time the daemon makes three health calls: it wakes up, hands the call to a thread, and receives
    // the result. Threads that have ended by now are not counted.
    let after = daemon.context_switches();
    let switches = after.iter().map(|(thread, count)| count - before.get(thread).unwrap_or(&0)).sum();
    report.print(&Figure::new("context switches in 30 s", Count(switches)).at_most(Count(12)));
}

/// The commands that a shell runs before each prompt, which must be fast whatever the daemon does.
fn shell(report: &mut Report) {
    report.section("Shell prompt");
    let host = Host::new();
    let daemon = Daemon::start(&host);
    run(host.openwork(["workspace", "add"]).arg(host.project("a")));
    ask_for_prompt(report, &host, ["openwork prompt, daemon running", "openwork workspace current"]);
    processes::kill(daemon.pid, Signal::STOP);
    ask_for_prompt(report, &host, ["openwork prompt, daemon frozen", "openwork workspace current"]);
    processes::kill(daemon.pid, Signal::CONT);
    drop(daemon);
    ask_for_prompt(report, &host, ["openwork prompt, no daemon", "openwork workspace current"]);
}

fn ask_for_prompt(report: &mut Report, host: &Host, [prompt_name, current_name]: [&'static str; 2]) {
    let [nothing, prompt, current] = in_turns(
        200,
        [&mut || run(&mut Command::new("/bin/true")), &mut || run(&mut host.openwork(["prompt"])), &mut || {
            run(&mut host.openwork(["workspace", "current"]))
        }],
    );
    report.print(&Figure::new(prompt_name, Ms(prompt)).against(nothing).at_most(Ms(2.0)));
    report.print(&Figure::new(current_name, Ms(current)).against(nothing).at_most(Ms(3.0)));
}

/// A daemon at work.
fn requests(report: &mut Report) {
    report.section("Requests, one connection for each");
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let (opencode, directory) = (daemon.opencode().1, host.project("a"));
    for name in ["a", "b"] {
        run(host.openwork(["workspace", "add"]).arg(host.project(name)));
        daemon.get(&format!("/workspaces/{name}/path")); // creates the instance
    }
    let ask_opencode = || drop(ask(&of_opencode(opencode, "GET", "/path", &directory)));
    let mut names = ["a", "b"].into_iter().cycle();
    let mut activate = || daemon.post(&format!("/workspaces/{}/activate", names.next().expect("a cycle")));
    let [direct, health, path] = in_turns(
        500,
        [&mut || ask_opencode(), &mut || daemon.get("/health"), &mut || daemon.get("/workspaces/a/path")],
    );
    // Measured separately: any request is slower right after a write to the disk.
    let [activation, by_hand] = in_turns(
        500,
        [&mut || activate(), &mut || {
            write_durably(&host.path("by-hand"), &host.path("data/openwork-orchestrator-state.json"))
        }],
    );
    report.print(&Figure::new("opencode's /path, asked directly", Ms(direct)));
    report.print(&Figure::new("GET /health", Ms(health)).against(direct));
    report.print(&Figure::new("GET /workspaces/:id/path", Ms(path)).against(direct));
    report.print(&Figure::new("POST /workspaces/:id/activate", Ms(activation)).against(direct).at_most(Ms(1.0)));
    report.print(&Figure::new("  of it, a durable write by hand", Ms(by_hand)));

    let [nothing, current] = in_turns(
        200,
        [&mut || run(&mut Command::new("/bin/true")), &mut || run(&mut host.openwork(["workspace", "current"]))],
    );
    report.print(&Figure::new("openwork workspace current", Ms(current)).against(nothing).at_most(Ms(3.0)));

    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for turn in 0..1250 {
                    match turn % 5 {
                        0 => daemon.get("/health"),
                        1 => daemon.get("/workspaces"),
                        2 => daemon.get("/workspaces/@active"),
                        3 => daemon.post("/workspaces/a/activate"),
                        _ => daemon.get("/workspaces/b/path"),
                    }
                }
            });
        }
    });
    report.print(
        &Figure::new("resident after 10,000 requests, 8 at a time", Bytes(daemon.memory())).at_most(Bytes(8_000_000)),
    );
}

/// A call to opencode through the URL of a workspace, against the same call directly.
fn routing(report: &mut Report) {
    report.section("Routing, one connection for each");
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let (opencode, directory) = (daemon.opencode().1, host.project("a"));
    run(host.openwork(["workspace", "add"]).arg(&directory));
    // At first opencode compiles its handlers on another thread, which would dominate on a machine with few
    // processors.
    for _ in 0..WARM_UP {
        ask(&of_opencode(opencode, "GET", "/path", &directory));
    }
    let [direct, routed] = in_turns(
        1000,
        [&mut || drop(ask(&of_opencode(opencode, "GET", "/path", &directory))), &mut || {
            drop(ask(&of_opencode(daemon.port, "GET", "/w/a/path", &directory)))
        }],
    );
    report.print(&Figure::new("GET /path, asked directly", Ms(direct)));
    report.print(&Figure::new("GET /w/a/path", Ms(routed)).against(direct).at_most(Ms(direct + 0.2)));

    // Both streams get each event; a reader for each notes the time.
    let mut near = stream(&of_opencode(opencode, "GET", "/event", &directory));
    let mut far = stream(&of_opencode(daemon.port, "GET", "/w/a/event", &directory));
    let mut later = Vec::new();
    for _ in 0..200 {
        ask(&of_opencode(opencode, "POST", "/session", &directory).json(&json!({})));
        let arrival = |stream: &mut TcpStream| {
            let mut seen = Vec::new();
            let mut buffer = [0; 4096];
            while !String::from_utf8_lossy(&seen).contains("session.created") {
                let count = stream.read(&mut buffer).expect("an event");
                seen.extend_from_slice(&buffer[..count]);
            }
            Instant::now()
        };
        let (first, second) = thread::scope(|scope| {
            let near = scope.spawn(|| arrival(&mut near));
            let far = scope.spawn(|| arrival(&mut far));
            (near.join().expect("an event"), far.join().expect("an event"))
        });
        later.push(second.saturating_duration_since(first).as_secs_f64() * 1e3);
        // Drain the other events before the next one.
        for stream in [&mut near, &mut far] {
            drain(stream);
        }
    }
    report.print(&Figure::new("an event arrives later by", Ms(median(later))).at_most(Ms(1.0)));
}

/// The same on connections that are kept, as clients that pool them have it.
fn kept(report: &mut Report) {
    report.section("Routing, kept connections");
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let (opencode, directory) = (daemon.opencode().1, host.project("a"));
    run(host.openwork(["workspace", "add"]).arg(&directory));
    let ways = [(opencode, "/path"), (daemon.port, "/w/a/path")];
    let requests =
        ways.map(|(port, target)| of_opencode(port, "GET", target, &directory).header("Connection", "keep-alive"));
    let connect = || ways.map(|(port, _)| http::connect(port));
    let ask_on = |request: &Request, stream: &mut TcpStream| {
        let reply = request.send_on(stream).unwrap_or_else(|e| panic!("{}: {e}", request.target));
        assert_eq!(reply.status, 200, "{reply:?}");
    };
    let [mut warm, _] = connect();
    for _ in 0..WARM_UP {
        ask_on(&requests[0], &mut warm);
    }
    // Only now: the daemon closes a connection on which nothing has come for two seconds.
    let [mut near, mut far] = connect();
    let [direct, routed] =
        in_turns(3000, [&mut || ask_on(&requests[0], &mut near), &mut || ask_on(&requests[1], &mut far)]);
    report.print(&Figure::new("a plain loop, directly", Ms(direct)));
    report.print(&Figure::new("  through /w/", Ms(routed)).against(direct).at_most(Times(1.2)));
    let mut pairs: Vec<[TcpStream; 2]> = (0..8).map(|_| connect()).collect();
    let mut all_ask = |way: usize| {
        thread::scope(|scope| {
            for pair in &mut pairs {
                let (request, ask_on) = (&requests[way], &ask_on);
                scope.spawn(move || (0..50).for_each(|_| ask_on(request, &mut pair[way])));
            }
        });
    };
    let all_ask = std::cell::RefCell::new(&mut all_ask);
    let [direct, routed] =
        in_turns(40, [&mut || (all_ask.borrow_mut())(0), &mut || (all_ask.borrow_mut())(1)]).map(|all| all / 50.0);
    report.print(&Figure::new("eight loops at once, a request of each, directly", Ms(direct)));
    report.print(&Figure::new("  through /w/", Ms(routed)).against(direct).at_most(Times(1.2)));

    let Some(sdk) = std::env::var_os("OPENWORK_TEST_SDK").map(PathBuf::from) else {
        return println!("  without OPENWORK_TEST_SDK, fetch and the SDK are not measured");
    };
    // A module is looked for from where the file is.
    let script = sdk.join("fetch.mjs");
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("test-data/fetch.mjs"), &script).expect("a copy");
    let mut node = host.command("node");
    node.arg(&script).env("DIRECT_URL", format!("http://127.0.0.1:{opencode}")).env("DIRECTORY", &directory);
    node.env("FORWARDED_URL", format!("http://127.0.0.1:{}", forwarder(opencode)));
    node.env("ROUTED_URL", format!("http://127.0.0.1:{}/w/a", daemon.port));
    let output = node.env("CREDENTIALS", basic("opencode", PASSWORD)).stderr(Stdio::inherit()).output().expect("node");
    let results: Value = serde_json::from_slice(&output.stdout).expect("what node has measured");
    for (name, what, at_once) in [
        ("fetch", "node's fetch, directly", "node's fetch, eight at once, directly"),
        ("sdk", "the SDK, directly", "the SDK, eight at once, directly"),
    ] {
        for (kind, what) in [("inARow", what), ("atOnce", at_once)] {
            let median = |way: usize| results[name][kind][way].as_f64().expect("a median");
            let [direct, forwarded, routed] = [0, 1, 2].map(median);
            report.print(&Figure::new(what, Ms(direct)));
            report.print(&Figure::new("  through a forwarder that only copies", Ms(forwarded)).against(direct));
            report.print(&Figure::new("  through /w/", Ms(routed)).against(direct).at_most(Times(1.2)));
        }
    }
}

/// Forwards requests and replies that arrive in one piece, each connection in a thread of its own: the least
/// that a program between client and opencode can cost. Returns its port.
fn forwarder(opencode: u16) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let forward = move |client: TcpStream| -> io::Result<()> {
        let opencode = http::connect(opencode);
        client.set_nodelay(true)?;
        let mut bytes = vec![0; 64 * 1024];
        loop {
            for (mut from, mut to) in [(&client, &opencode), (&opencode, &client)] {
                match from.read(&mut bytes)? {
                    0 => return Ok(()),
                    count => to.write_all(&bytes[..count])?,
                }
            }
        }
    };
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            thread::spawn(move || forward(client));
        }
    });
    port
}

/// Connections that have served a request and are not used.
fn unused(report: &mut Report) {
    report.section("200 idle connections");
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let directory = host.project("a");
    run(host.openwork(["workspace", "add"]).arg(&directory));
    let request = of_opencode(daemon.port, "GET", "/w/a/path", &directory).header("Connection", "keep-alive");
    let open = |count: usize| {
        let served = |_| {
            let mut stream = http::connect(daemon.port);
            request.send_on(&mut stream).expect("a reply");
            stream
        };
        let streams: Vec<TcpStream> = (0..count).map(served).collect();
        // Threads that have served them wait a moment for more.
        thread::sleep(Duration::from_secs(1));
        streams
    };
    drop(open(200)); // warm up: the first threads leave memory behind once
    thread::sleep(Duration::from_secs(1));
    let [alone] = in_turns(300, [&mut || daemon.get("/health")]);
    let (memory, threads) = (daemon.memory(), daemon.context_switches().len());
    let streams = open(200);
    let more = daemon.memory().saturating_sub(memory);
    let more_threads = daemon.context_switches().len().saturating_sub(threads);
    let [beside] = in_turns(300, [&mut || daemon.get("/health")]);
    report.print(&Figure::new("resident memory, more than before", Bytes(more)).at_most(Bytes(1_000_000)));
    report.print(&Figure::new("threads, more than before", Count(more_threads as u64)).at_most(Count(0)));
    report.print(&Figure::new("GET /health without them", Ms(alone)));
    report.print(&Figure::new("GET /health beside them", Ms(beside)).against(alone));
    drop(streams);
}

/// Many open streams, as editors and terminals keep them.
fn streams(report: &mut Report) {
    report.section("200 open event streams");
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let directory = host.project("a");
    run(host.openwork(["workspace", "add"]).arg(&directory));
    let ask_routed = || drop(ask(&of_opencode(daemon.port, "GET", "/w/a/path", &directory)));
    let [before] = in_turns(300, [&mut || ask_routed()]);
    let empty = daemon.memory();
    let open: Vec<TcpStream> =
        (0..200).map(|_| stream(&of_opencode(daemon.port, "GET", "/w/a/event", &directory))).collect();
    let each = daemon.memory().saturating_sub(empty) / 200;
    let [after] = in_turns(300, [&mut || ask_routed()]);
    drop(open);
    report.print(&Figure::new("resident memory for each", Bytes(each)).at_most(Bytes(80_000)));
    report.print(&Figure::new("GET /w/a/path without them", Ms(before)));
    report.print(&Figure::new("GET /w/a/path beside them", Ms(after)).against(before));
}

/// Large bodies, with the fake opencode: the real one has no such call.
fn transfer(report: &mut Report) {
    report.section("1 GB");
    let host = Host::with_opencode(stand_in());
    let daemon = Daemon::start(&host);
    let (opencode, directory) = (daemon.opencode().1, host.project("a"));
    run(host.openwork(["workspace", "add"]).arg(&directory));
    let before = daemon.memory();
    let down = |port, target: &str| {
        download(&of_opencode(port, "GET", &format!("{target}?bytes={GIGABYTE}"), &directory));
    };
    let up = |port, target: &str| upload(of_opencode(port, "POST", target, &directory));
    let [direct_down, routed_down, direct_up, routed_up] = in_turns(
        5,
        [
            &mut || down(opencode, "/download"),
            &mut || down(daemon.port, "/w/a/download"),
            &mut || up(opencode, "/upload"),
            &mut || up(daemon.port, "/w/a/upload"),
        ],
    );
    // At least 70 % of the speed is at most 1 / 0.7 of the time.
    report.print(&Figure::new("down, directly", Ms(direct_down)));
    report.print(&Figure::new("down, through /w/", Ms(routed_down)).against(direct_down).at_most(Times(1.43)));
    report.print(&Figure::new("up, directly", Ms(direct_up)));
    report.print(&Figure::new("up, through /w/", Ms(routed_up)).against(direct_up).at_most(Times(1.43)));
    report.print(&Figure::new("resident memory, more than before", Bytes(daemon.memory().saturating_sub(before))));
}

/// Routing to opencode 2.x, with the limits of 1.x. No 2.x can be installed from where the real 1.x comes, so
/// the tests' stand-in is asked: it answers at once, and what is added is openwork's alone.
fn v2(report: &mut Report) {
    report.section("Routing to 2.x, a stand-in");
    let mut host = Host::with_opencode(stand_in());
    host.version = "2.3.2";
    let daemon = Daemon::start(&host);
    let (opencode, directory) = (daemon.opencode().1, host.project("a"));
    run(host.openwork(["workspace", "add"]).arg(&directory));
    let create = |port, target: &str| {
        let body = json!({"location": {"directory": directory}});
        ask(&of_opencode(port, "POST", target, &directory).json(&body)).json()
    };
    let session = create(opencode, "/api/session")["data"]["id"].as_str().expect("a session").to_owned();
    let get = |port, target: &str| drop(ask(&of_opencode(port, "GET", target, &directory)));
    let (messages, routed) = (format!("/api/session/{session}/message"), format!("/w/a/api/session/{session}/message"));
    let [direct, below_w, at_root, of_session, session_below_w] = in_turns(
        1000,
        [
            &mut || get(opencode, "/api/location"),
            &mut || get(daemon.port, "/w/a/api/location"),
            &mut || get(daemon.port, "/api/location"),
            &mut || get(opencode, &messages),
            &mut || get(daemon.port, &routed),
        ],
    );
    let [created, created_below_w] = in_turns(
        200,
        [&mut || drop(create(opencode, "/api/session/import")), &mut || {
            drop(create(daemon.port, "/w/a/api/session/import"))
        }],
    );
    let limit = |direct: f64| Ms(direct + 0.2);
    report.print(&Figure::new("GET /api/location, asked directly", Ms(direct)));
    report.print(&Figure::new("GET /w/a/api/location", Ms(below_w)).against(direct).at_most(limit(direct)));
    report.print(&Figure::new("GET /api/location, at the root", Ms(at_root)).against(direct).at_most(limit(direct)));
    report.print(&Figure::new("messages of a session, asked directly", Ms(of_session)));
    report.print(
        &Figure::new("  through /w/, booked where it is", Ms(session_below_w))
            .against(of_session)
            .at_most(limit(of_session)),
    );
    report.print(&Figure::new("a session imported directly", Ms(created)));
    report.print(
        &Figure::new("  through /w/, its body written anew", Ms(created_below_w))
            .against(created)
            .at_most(limit(created)),
    );
}

/// A registry larger than any real one.
fn many(report: &mut Report) {
    report.section("10,000 workspaces");
    let host = Host::new();
    let workspaces: Vec<Value> = (0..10_000)
        .map(|number| {
            let name = format!("project-{number}");
            let (id, path) = (format!("ws-{number:012x}"), host.project(&name));
            json!({"id": id, "name": name, "path": path, "workspaceType": "local", "createdAt": 1, "lastUsedAt": 1})
        })
        .collect();
    let state = json!({"version": 1, "activeId": "ws-000000000000", "workspaces": workspaces});
    fs::write(host.path("data/openwork-orchestrator-state.json"), state.to_string()).expect("a state file");
    let daemon = Daemon::start(&host);
    let mut names = ["project-5000", "project-9999"].into_iter().cycle();
    let mut switch = || run(host.openwork(["workspace", "switch"]).arg(names.next().expect("a cycle")));
    let [nothing, list] = in_turns(
        50,
        [&mut || run(&mut Command::new("/bin/true")), &mut || run(&mut host.openwork(["workspace", "list"]))],
    );
    // Measured separately, as above.
    let [switch] = in_turns(50, [&mut || switch()]);
    report.print(&Figure::new("openwork workspace list", Ms(list)).against(nothing).at_most(Ms(15.0)));
    report.print(&Figure::new("openwork workspace switch", Ms(switch)).against(nothing).at_most(Ms(10.0)));
    report.print(&Figure::new("resident after 50 of each", Bytes(daemon.memory())).at_most(Bytes(20_000_000)));
}

/// A request after opencode was killed, against the same by hand: starting another opencode in the same home,
/// until it has answered the same request.
fn restart(report: &mut Report) {
    report.section("opencode killed");
    let host = Host::new();
    let project = host.project("a");
    drop(start_by_hand(&host, &project)); // the first in a new home takes several times as long
    let (mut healthy, mut own, mut answered) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..5 {
        let (killed, ..) = start_by_hand(&host, &project);
        let start = Instant::now();
        drop(killed);
        let (_running, _, health, path) = start_by_hand(&host, &project);
        healthy.push(ms(health - start));
        own.push(ms(path - start));
        drop(_running);

        // A new daemon each time: the second restart in a row would pause first.
        let daemon = Daemon::start(&host);
        run(host.openwork(["workspace", "add"]).arg(&project));
        daemon.get("/workspaces/a/path");
        let (pid, _) = daemon.opencode();
        answered.push(time(|| {
            kill(&host, pid);
            daemon.get("/workspaces/a/path");
        }));
        assert_ne!(daemon.opencode().0, pid, "opencode was killed");
    }
    let (own, answered) = (median(own), median(answered));
    report.print(&Figure::new("started again by hand, until it is healthy", Ms(median(healthy))));
    report.print(&Figure::new("  and has answered /path", Ms(own)));
    report.print(
        &Figure::new("GET /workspaces/:id/path after a kill", Ms(answered)).against(own).at_most(Ms(own + 50.0)),
    );
}

/// Starts opencode without openwork: the process, its port, when it answered, and when it had answered for a directory.
fn start_by_hand(host: &Host, project: &Path) -> (Running, u16, Instant, Instant) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = listener.local_addr().expect("a port").port();
    drop(listener);
    let mut command = host.command(opencode_binary());
    command.args(["serve", "--hostname", "127.0.0.1", "--port", &port.to_string()]);
    let opencode = Running(silent(command.env("OPENCODE_SERVER_PASSWORD", PASSWORD)).spawn().expect("opencode"));
    let start = Instant::now();
    // opencode never answers requests of the first moments after it listens, so send another every few
    // milliseconds until one is answered.
    let mut asked: Vec<TcpStream> = Vec::new();
    while !asked.iter_mut().any(|stream| matches!(stream.read(&mut [0; 1024]), Ok(1..))) {
        assert!(start.elapsed() < PATIENCE, "opencode does not answer");
        thread::sleep(Duration::from_millis(5));
        if let Ok(stream) = of_opencode(port, "GET", "/global/health", project).open() {
            stream.set_nonblocking(true).expect("a socket");
            asked.push(stream);
        }
    }
    let healthy = Instant::now();
    ask(&of_opencode(port, "GET", "/path", project));
    (opencode, port, healthy, Instant::now())
}

// --- Measuring ---

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// How long something takes. Milliseconds.
fn time(what: impl FnOnce()) -> f64 {
    let start = Instant::now();
    what();
    ms(start.elapsed())
}

/// Runs these in turns, `times` times. The median of each, in milliseconds.
fn in_turns<const N: usize>(times: usize, mut what: [&mut dyn FnMut(); N]) -> [f64; N] {
    let mut samples = [const { Vec::new() }; N];
    what.iter_mut().for_each(|what| what()); // not the first: it finds cold caches
    for _ in 0..times {
        for (what, samples) in what.iter_mut().zip(&mut samples) {
            samples.push(time(what));
        }
    }
    samples.map(median)
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// Runs a command, which has to succeed.
fn run(command: &mut Command) {
    let status = silent(command).status().expect("a program");
    assert!(status.success(), "{command:?}: {status}");
}

fn silent(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null())
}

/// The least that a registry must do per change to survive a power cut.
fn write_durably(path: &Path, content: &Path) {
    let bytes = fs::read(content).expect("a state file");
    let temporary = path.with_extension("tmp");
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(path.parent().unwrap_or(path))?.sync_all()
    };
    write().expect("a write");
}

// --- The figures ---

/// A measured quantity.
#[derive(Clone, Copy)]
enum Quantity {
    Ms(f64),
    Bytes(u64),
    Count(u64),
    /// The ratio to the same without openwork.
    Times(f64),
}
use Quantity::{Bytes, Count, Ms, Times};

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Ms(ms) if *ms < 100.0 => format!("{ms:.2} ms"),
            Ms(ms) => format!("{ms:.0} ms"),
            Bytes(bytes) => format!("{:.2} MB", *bytes as f64 / 1e6),
            Count(count) => count.to_string(),
            Times(times) => format!("{times:.2}×"),
        };
        f.pad(&text)
    }
}

/// A line of the report.
struct Figure {
    what: &'static str,
    value: Quantity,
    ratio: Option<f64>,
    target: Option<Quantity>,
}

impl Figure {
    fn new(what: &'static str, value: Quantity) -> Figure {
        Figure { what, value, ratio: None, target: None }
    }

    /// Compares with the same without openwork, in the same unit.
    fn against(mut self, base: f64) -> Figure {
        self.ratio = match self.value {
            Ms(value) => Some(value / base),
            Bytes(value) => Some(value as f64 / base),
            Count(_) | Times(_) => None,
        };
        self
    }

    /// Sets a target; in [`Times`] it applies to the ratio.
    fn at_most(mut self, target: Quantity) -> Figure {
        self.target = Some(target);
        self
    }

    /// Whether the target, if any, is met.
    fn is_ok(&self) -> Option<bool> {
        Some(match (self.target?, self.value) {
            (Times(target), _) => self.ratio? <= target,
            (Ms(target), Ms(value)) => value <= target,
            (Bytes(target), Bytes(value)) | (Count(target), Count(value)) => value <= target,
            (Ms(_) | Bytes(_) | Count(_), _) => panic!("{}: a target in another unit", self.what),
        })
    }
}

#[derive(Default)]
struct Report {
    targets: usize,
    missed: usize,
}

impl Report {
    fn section(&mut self, name: &str) {
        println!("\n{name:<46} {:>10}  {:>8}  {:>10}", "median", "ratio", "at most");
    }

    fn print(&mut self, figure: &Figure) {
        let ratio = figure.ratio.map_or_else(String::new, |ratio| Times(ratio).to_string());
        let target = figure.target.map_or_else(String::new, |target| target.to_string());
        let verdict = match figure.is_ok() {
            Some(true) => "ok",
            Some(false) => "over",
            None => "",
        };
        self.targets += usize::from(figure.target.is_some());
        self.missed += usize::from(verdict == "over");
        let line = format!("  {:<44} {:>10}  {ratio:>8}  {target:>10}  {verdict}", figure.what, figure.value);
        println!("{}", line.trim_end());
    }
}

// --- The host ---

fn opencode_binary() -> PathBuf {
    let path = std::env::var_os("OPENWORK_TEST_OPENCODE").map(PathBuf::from);
    path.expect("OPENWORK_TEST_OPENCODE is to name an opencode; `just bench` installs one")
}

/// Bytes.
const GIGABYTE: u64 = 1_000_000_000;

/// The tests' imitation of opencode, compiled.
fn stand_in() -> PathBuf {
    let binary = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench-opencode");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("test-data/fake_opencode.rs");
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    run(Command::new(compiler).args(["-O", "--edition", "2021", "-o"]).args([&binary, &source]));
    binary
}

/// A home, a data directory and projects.
struct Host {
    root: PathBuf,
    opencode: PathBuf,
    /// The version of the stand-in; the real opencode reports its own.
    version: &'static str,
    guard: Child,
}

/// A shell that outlives the benchmark, even after an interrupt: when its standard input closes, it ends
/// every process of this home and removes the directory.
const GUARD: &str = r#"
    trap "" INT TERM HUP
    cat
    HOME="$1/home" "$2" daemon stop --data-dir "$1/data"
    for process in $(grep -lsxzF "HOME=$1/home" /proc/[0-9]*/environ | cut -d/ -f3); do
        kill -9 "$process"
    done
    rm -rf "$1"
"#;

impl Host {
    fn new() -> Host {
        Host::with_opencode(opencode_binary())
    }

    fn with_opencode(opencode: PathBuf) -> Host {
        // Below target/, so on a real disk: /tmp may be in memory, where durable writes cost nothing.
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("bench-{}", std::process::id()));
        let make = |path: PathBuf| DirBuilder::new().recursive(true).mode(0o700).create(path);
        for name in ["home", "projects", "data"] {
            make(root.join(name)).expect("a directory");
        }
        let root = root.canonicalize().expect("a path");
        let mut guard = Command::new("/bin/sh");
        guard.args(["-c", GUARD, "sh"]).arg(&root).arg(OPENWORK);
        let guard = silent(&mut guard).stdin(Stdio::piped()).spawn().expect("a shell");
        let host = Host { root, opencode, version: "1.18.33", guard };
        let auth = json!({"opencodeUsername": "opencode", "opencodePassword": PASSWORD});
        fs::write(host.path("data/openwork-orchestrator-auth.json"), auth.to_string()).expect("a file");
        host
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    fn project(&self, name: &str) -> PathBuf {
        let path = self.path("projects").join(name);
        fs::create_dir_all(&path).expect("a directory");
        path
    }

    /// A command that neither sees the user's settings nor touches the user's files.
    fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        let inherited = std::env::var_os("PATH").map(|path| ("PATH", path));
        command.env_clear().envs(inherited).env("HOME", self.path("home")).env("FAKE_VERSION", self.version);
        // Where the stand-in for 2.x has its sessions.
        if self.version.starts_with("2.") {
            command.env("FAKE_OPENCODE_DIR", self.path("data/opencode"));
        }
        command.env("OPENCODE_DISABLE_AUTOUPDATE", "1").env("OPENCODE_DISABLE_MODELS_FETCH", "1");
        command
    }

    fn openwork<const N: usize>(&self, arguments: [&str; N]) -> Command {
        let mut command = self.command(OPENWORK);
        command.env("OPENWORK_DATA_DIR", self.path("data")).env("OPENWORK_OPENCODE_BIN", &self.opencode);
        command.args(arguments);
        command
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

/// A process of ours, killed on drop.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running daemon with a ready opencode.
struct Daemon<'host> {
    host: &'host Host,
    pid: u32,
    port: u16,
}

impl Daemon<'_> {
    /// Starts it in the background, as users do.
    fn start(host: &Host) -> Daemon<'_> {
        // Direct calls expect opencode at 127.0.0.1.
        run(&mut host.openwork(["daemon", "start", "--opencode-host", "127.0.0.1"]));
        let lock = fs::read_to_string(host.path("data/daemon.lock")).expect("a lock file");
        let [pid, port, ..] = lock.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("no pid and port: {lock}")
        };
        Daemon { host, pid: pid.parse().expect("a process id"), port: port.parse().expect("a port") }
    }

    fn get(&self, target: &str) {
        ask(&Request::new(local(self.port), "GET", target).header("Connection", "close"));
    }

    fn post(&self, target: &str) {
        ask(&Request::new(local(self.port), "POST", target).header("Connection", "close"));
    }

    /// Process id and port.
    fn opencode(&self) -> (u32, u16) {
        let health = ask(&Request::new(local(self.port), "GET", "/health")).json();
        let number = |name: &str| health["opencode"][name].as_u64().expect("a ready opencode");
        (number("pid") as u32, number("port") as u16)
    }

    /// Resident memory in bytes.
    fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).expect("a process");
        1024 * field(&status, "VmRSS:")
    }

    /// The context switches of each thread since its start.
    fn context_switches(&self) -> BTreeMap<PathBuf, u64> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid)).expect("a process");
        let switches =
            |status: &str| field(status, "\nvoluntary_ctxt_switches:") + field(status, "\nnonvoluntary_ctxt_switches:");
        tasks
            .flatten()
            .filter_map(|task| Some((task.path(), switches(&fs::read_to_string(task.path().join("status")).ok()?))))
            .collect()
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        // If that fails, the guard of the host ends it.
        let _ = silent(&mut self.host.openwork(["daemon", "stop"])).status();
    }
}

/// A number in a file of /proc.
fn field(text: &str, name: &str) -> u64 {
    let rest = text.split_once(name).map_or("", |(_, rest)| rest);
    rest.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
}

/// Kills a process, if it is one of this host.
fn kill(host: &Host, pid: u32) {
    if Process::of(pid).is_some_and(|process| process.has_home(&host.path("home"))) {
        processes::kill(pid, Signal::KILL);
    }
}

// --- HTTP ---

/// A request that works for this directory both directly and through `/w/`.
fn of_opencode(port: u16, method: &str, target: &str, directory: &Path) -> Request {
    // The path above our directories may have characters that need encoding.
    let encoded: String = directory.to_str().expect("UTF-8").bytes().map(|byte| format!("%{byte:02X}")).collect();
    let request = Request::new(local(port), method, target).header("Connection", "close");
    request.header("Authorization", basic("opencode", PASSWORD)).header("x-opencode-directory", encoded)
}

/// Sends a request on its own connection. The status has to be 200.
fn ask(request: &Request) -> Reply {
    let reply = request.send().unwrap_or_else(|e| panic!("{} {}: {e}", request.method, request.target));
    assert_eq!(reply.status, 200, "{} {}: {reply:?}", request.method, request.target);
    reply
}

/// Opens a stream of events, and waits for the first.
fn stream(request: &Request) -> TcpStream {
    let mut stream = request.open().expect("a connection");
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&seen).contains("data:") {
        let count = stream.read(&mut buffer).expect("an event");
        assert!(count > 0, "{}: the stream has ended", request.target);
        seen.extend_from_slice(&buffer[..count]);
    }
    stream
}

/// Reads until nothing arrives for a moment.
fn drain(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(Duration::from_millis(20))).expect("a socket");
    while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {}
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
}

/// Reads a gigabyte; the head counts as part of it.
fn download(request: &Request) {
    let mut stream = request.open().expect("a connection");
    let (mut seen, mut buffer) = (0, vec![0; 256 * 1024]);
    while seen < GIGABYTE {
        let count = stream.read(&mut buffer).expect("a body");
        assert!(count > 0, "{}: the body is cut short", request.target);
        seen += count as u64;
    }
}

/// Sends a gigabyte, and waits for the reply.
fn upload(request: Request) {
    let mut stream = request.header("Content-Length", GIGABYTE.to_string()).open().expect("a connection");
    io::copy(&mut io::repeat(b'u').take(GIGABYTE), &mut stream).expect("to be heard");
    assert!(stream.read(&mut [0; 4096]).expect("an answer") > 0);
}
