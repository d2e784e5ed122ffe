//! The daemon under a service manager: sd_notify(3), sd_listen_fds(3).

use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::event::{PollFd, PollFlags};

use crate::support::{
    DEADLINE, Host, Process, Signal, connect, copy_program, free_port, kill, read_to_close, until, wait_for, wait_gone,
};

/// The variables of a service, meant for the daemon alone.
const SERVICE_VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// The notification socket of a service manager.
struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    fn at(address: &SocketAddr) -> Manager {
        let socket = UnixDatagram::bind_addr(address).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Manager { socket }
    }

    /// The lines of the next datagram.
    fn next(&self) -> Vec<String> {
        let mut buffer = [0; 4096];
        let length = loop {
            match self.socket.recv(&mut buffer) {
                // A pause of the tests (Ctrl-Z) ends a read that has a time limit.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                received => break received.expect("word from the daemon"),
            }
        };
        String::from_utf8(buffer[..length].to_vec()).unwrap().lines().map(str::to_owned).collect()
    }

    /// Waits for a datagram with this line; returns the lines before and in it.
    fn until(&self, wanted: &str) -> Vec<String> {
        let mut lines = Vec::new();
        until(&format!("{wanted:?} from the daemon"), || {
            let next = self.next();
            lines.extend(next.iter().cloned());
            next.iter().any(|line| line.starts_with(wanted)).then_some(())
        });
        lines
    }
}

fn opencode(host: &Host) -> Process {
    Process::of(host.opencode_pid()).expect("opencode")
}

#[test]
fn service_manager_is_notified_of_the_state() {
    let mut host = Host::new();
    let manager = Manager::at(&SocketAddr::from_pathname(host.path("notify")).unwrap());
    host.set("NOTIFY_SOCKET", host.path("notify"));
    let daemon = host.openwork(["daemon"]).spawn();
    manager.until("READY=1");
    // The port accepts connections at READY, although opencode is still starting.
    assert_eq!(host.http("GET", "/health").send().json()["daemon"]["pid"], daemon.pid());
    let told = manager.until("STATUS=opencode is ready (1.18.33)");
    assert!(!told.contains(&"WATCHDOG=1".to_owned()), "no watchdog was requested: {told:?}");
    assert!(SERVICE_VARIABLES.iter().all(|name| opencode(&host).variable(name).is_none()));

    kill(host.opencode_pid(), Signal::KILL);
    manager.until("STATUS=opencode is ready");
    kill(daemon.pid(), Signal::TERM);
    let told = manager.until("STOPPING=1");
    assert!(!told.contains(&"READY=1".to_owned()), "{told:?}");
    assert!(daemon.wait().status.success());
}

#[test]
fn restart_is_a_reload_for_the_service_manager() {
    let host = Host::new();
    let name = format!("openwork-test-{}", host.path("").display());
    let manager = Manager::at(&SocketAddr::from_abstract_name(&name).unwrap());
    let daemon = host.openwork(["daemon"]).env("NOTIFY_SOCKET", format!("@{name}"));
    // `$$` in bash and dash is the pid that the daemon gets by exec.
    let daemon = daemon.env("WATCHDOG_USEC", "500000").after("export WATCHDOG_PID=$$").spawn();
    manager.until("STATUS=opencode is ready");
    let before = opencode(&host).pid;

    // The client belongs to another service, whose manager must hear nothing.
    let other = Manager::at(&SocketAddr::from_pathname(host.path("other")).unwrap());
    other.socket.set_nonblocking(true).unwrap();
    let mut restart = host.openwork(["daemon", "restart"]).env("NOTIFY_SOCKET", host.path("other"));
    for (name, value) in [("WATCHDOG_USEC", "1"), ("WATCHDOG_PID", "1"), ("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "x")] {
        restart = restart.env(name, value);
    }
    restart.after("export LISTEN_PID=$$").ok();
    let told = manager.until("RELOADING=1");
    let time = told.iter().find_map(|line| line.strip_prefix("MONOTONIC_USEC=")).expect("the time of the reload");
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec;
    assert!((now - 90..=now).contains(&(time.parse::<i64>().unwrap() / 1_000_000)), "{told:?}");
    let told = manager.until("READY=1");
    assert!(!told.iter().any(|line| line == "STOPPING=1"), "{told:?}");
    manager.until("WATCHDOG=1");
    assert_eq!((host.daemon_pid(), opencode(&host).pid), (daemon.pid(), before));
    let successor = Process::of(daemon.pid()).unwrap();
    assert_eq!(successor.variable("WATCHDOG_USEC"), Some("500000"));
    assert_eq!(successor.variable("WATCHDOG_PID"), Some(&*daemon.pid().to_string()));
    assert!(["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"].iter().all(|name| successor.variable(name).is_none()));
    assert!(other.socket.recv(&mut [0; 64]).is_err());
    host.openwork(["daemon", "stop"]).ok();
    manager.until("STOPPING=1");
    assert!(daemon.wait().status.success());
}

#[test]
fn watchdog_is_fed_in_every_phase() {
    let mut host = Host::new();
    let manager = Manager::at(&SocketAddr::from_pathname(host.path("notify")).unwrap());
    host.set("NOTIFY_SOCKET", host.path("notify"));
    host.set("WATCHDOG_USEC", "200000");
    let hold = host.path("fake/hold");
    fs::write(&hold, "").unwrap();
    let lives = |times: usize| (0..times).for_each(|_| drop(manager.until("WATCHDOG=1")));
    let daemon = host.openwork(["daemon"]).spawn();
    manager.until("STATUS=opencode is starting");
    lives(4);
    fs::remove_file(&hold).unwrap();
    manager.until("STATUS=opencode is ready");
    lives(4);
    // From now on every start fails.
    fs::write(host.path("fake/behaviour"), "FAKE_CRASH_ON_START=9\n").unwrap();
    kill(host.opencode_pid(), Signal::KILL);
    manager.until("STATUS=opencode has failed");
    lives(4);
    host.openwork(["daemon", "stop"]).ok();
    assert!(daemon.wait().status.success());

    // The inherited variables are meant for another process.
    let daemon = host.openwork(["daemon"]).env("WATCHDOG_PID", "1").spawn();
    let told = manager.until("STATUS=opencode has failed");
    manager.socket.set_nonblocking(true).unwrap();
    let ready = told.iter().filter(|line| *line == "WATCHDOG=1").count();
    assert_eq!(ready, 1, "only the one that comes with READY=1: {told:?}");
    host.openwork(["daemon", "stop"]).ok();
    daemon.wait();
}

// --- Socket activation ---

/// Passes descriptor 0 on as systemd passes a socket: as descriptor 3, with the variables that announce it.
const PASS_ON: &str = "exec 3<&0 0</dev/null; export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=openwork.socket";

fn passed(socket: impl Into<OwnedFd>) -> Stdio {
    Stdio::from(socket.into())
}

/// A request, which waits for its reply.
fn ask(port: u16) -> TcpStream {
    let mut stream = connect(port);
    write!(stream, "GET /health HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n").unwrap();
    stream
}

fn assert_answered(mut stream: TcpStream) {
    let reply = String::from_utf8(read_to_close(&mut stream)).unwrap();
    assert!(reply.starts_with("HTTP/1.1 ") && reply.contains("\"apiVersion\":1"), "{reply}");
}

#[test]
fn connection_made_before_the_daemon_is_answered() {
    let mut host = Host::new();
    host.unset("OPENWORK_DAEMON_PORT");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, free_port())).unwrap();
    let port = listener.local_addr().unwrap().port();
    let start = || host.openwork(["daemon"]).stdin(passed(listener.try_clone().unwrap())).after(PASS_ON).spawn();

    let early = ask(port);
    let daemon = start();
    assert_answered(early);
    assert_eq!((host.daemon_pid(), host.port()), (daemon.pid(), port));
    let before = opencode(&host);
    assert!(SERVICE_VARIABLES.iter().all(|name| before.variable(name).is_none()));
    let socket = format!("socket:[{}]", rustix::fs::fstat(&listener).unwrap().st_ino);
    let held = |pid: u32| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        open.filter(|entry| fs::read_link(entry.path()).is_ok_and(|to| to.to_str() == Some(&socket))).count()
    };
    assert_eq!(held(before.pid), 0, "opencode holds the port of the daemon");

    // The port outlives a daemon that is killed, and the next one takes opencode over.
    kill(daemon.pid(), Signal::KILL);
    daemon.wait();
    let early = ask(port);
    let daemon = start();
    assert_answered(early);
    assert_eq!(opencode(&host).pid, before.pid);

    // A restart keeps the socket and leaks no descriptor.
    let count = held(daemon.pid());
    host.openwork(["daemon", "restart"]).ok();
    assert_eq!((host.daemon_pid(), host.port(), held(daemon.pid())), (daemon.pid(), port, count));
    assert_answered(ask(port));
    host.openwork(["daemon", "stop"]).ok();
    assert!(daemon.wait().status.success());
    // The socket of the service manager still accepts connections.
    drop(ask(port));
}

#[test]
fn unsuitable_activation_socket_is_refused() {
    let host = Host::new();
    let port = host.get("OPENWORK_DAEMON_PORT").parse::<u16>().unwrap();
    let refused = |socket: Stdio, why: &str| {
        let daemon = host.openwork(["daemon"]).stdin(socket).after(PASS_ON);
        let message = daemon.fails(2, "usage")["message"].as_str().unwrap().to_owned();
        assert!(message.contains(why), "{message}");
    };
    let tcp = |address: &str| passed(TcpListener::bind(address).unwrap());
    refused(tcp("0.0.0.0:0"), "0.0.0.0 is not 127.0.0.1");
    refused(tcp("127.0.0.2:0"), "127.0.0.2 is not 127.0.0.1");
    refused(tcp("127.0.0.1:0"), "is not the one of --daemon-port");
    refused(passed(UnixListener::bind(host.path("unix")).unwrap()), "not of the internet");
    refused(passed(UdpSocket::bind(("127.0.0.1", port)).unwrap()), "takes no connections");
    refused(Stdio::null(), "takes no connections");
    let lines = "export LISTEN_PID=$$ LISTEN_FDS=1; exec 3<&-";
    host.openwork(["daemon"]).after(lines).fails(2, "usage");
    let lines = "export LISTEN_PID=$$ LISTEN_FDS=2; exec 3</dev/null 4</dev/null";
    host.openwork(["daemon"]).after(lines).fails(2, "usage");
    assert!(host.lock_text().is_none());

    // Variables meant for another process are ignored, and a manager may pass no socket.
    for (pid, sockets) in [("1", "1"), ("$$", "0"), ("$$", "")] {
        let lines = format!("export LISTEN_PID={pid} LISTEN_FDS={sockets}");
        let daemon = host.openwork(["daemon"]).after(&lines).spawn();
        wait_for("the daemon to listen", || host.lock_text() == Some((daemon.pid(), port)));
        host.openwork(["daemon", "stop"]).ok();
        assert!(daemon.wait().status.success());
    }
}

/// A process that clients take for a service manager: it has that name and holds the listening socket.
struct SocketUnit(Child);

impl SocketUnit {
    fn new(host: &Host, listener: &TcpListener) -> SocketUnit {
        let bash = Command::new("sh").args(["-c", "command -v bash"]).output().unwrap().stdout;
        let program = host.path("systemd");
        copy_program(Path::new(String::from_utf8(bash).unwrap().trim_end()), &program);
        let mut manager = Command::new(program);
        manager.args(["-c", "read line"]).stdin(Stdio::piped()).stdout(passed(listener.try_clone().unwrap()));
        SocketUnit(manager.spawn().unwrap())
    }
}

impl Drop for SocketUnit {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn command_starts_the_daemon_through_the_service_manager() {
    let mut host = Host::new();
    let port = host.get("OPENWORK_DAEMON_PORT").parse::<u16>().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    let _unit = SocketUnit::new(&host, &listener);
    let service = host.openwork(["daemon"]).stdin(passed(listener.try_clone().unwrap())).after(PASS_ON);
    thread::scope(|scope| {
        let started = scope.spawn(|| {
            let mut wanted = [PollFd::new(&listener, PollFlags::IN)];
            rustix::event::poll(&mut wanted, None).unwrap();
            service.spawn()
        });
        let project = host.project("web");
        host.add(&project);
        let daemon = started.join().unwrap();
        assert_eq!((host.daemon_pid(), host.port()), (daemon.pid(), port));
        host.openwork(["daemon", "stop"]).ok();
        daemon.wait();
    });

    // A unit for another data directory starts nothing here; the client gives up on it soon.
    host.unset("OPENWORK_DAEMON_PORT");
    host.openwork(["daemon", "start"]).ok();
    assert_ne!(host.port(), port);
    let pid = host.daemon_pid();
    host.openwork(["daemon", "stop"]).ok();
    wait_gone(pid);
}
