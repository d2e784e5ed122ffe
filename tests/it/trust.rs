//! The command line sends bytes to a port only if the holder of `daemon.lock` listens there.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::support::{AUTH, Host, Signal, Stranger, is_alive, kill, wait_gone};

/// Makes a data directory with credentials and a `daemon.lock` with this text, locked by this process.
pub fn held(host: &Host, text: &str) -> File {
    host.write_state(r#"{"version":1,"activeId":"","workspaces":[]}"#);
    fs::write(host.file(AUTH), format!(r#"{{"opencodeUsername":"opencode","opencodePassword":"{}"}}"#, "5".repeat(64)))
        .unwrap();
    let path = host.file("daemon.lock");
    let lock = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, text).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    lock
}

/// Commands of every kind that would send something to the daemon.
const COMMANDS: [&[&str]; 8] = [
    &["status"],
    &["workspace", "switch", "p"],
    &["workspace", "path", "p"],
    &["instance", "list"],
    &["api", "p", "/path"],
    &["env", "p"],
    &["events"],
    &["daemon", "stop"],
];

/// Runs commands beside an impostor that listens, and returns what it was sent.
fn sent_to(impostor: &TcpListener, commands: impl FnOnce()) -> Vec<u8> {
    impostor.set_nonblocking(true).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let sent = scope.spawn(|| {
            let mut sent = Vec::new();
            while !done.load(Ordering::Relaxed) {
                match impostor.accept() {
                    Ok((mut stream, _)) => {
                        stream.set_nonblocking(false).unwrap();
                        stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
                        let _ = stream.read_to_end(&mut sent);
                    }
                    Err(_) => thread::sleep(Duration::from_millis(5)),
                }
            }
            sent
        });
        commands();
        done.store(true, Ordering::Relaxed);
        sent.join().unwrap()
    })
}

#[test]
fn port_of_another_process_gets_no_byte() {
    let host = Host::new();
    let idle = Stranger::idle();
    let impostor = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = impostor.local_addr().unwrap().port();
    // The situation while `state repair` holds the lock after a daemon was killed, and other processes have
    // its pid and its port.
    for text in [format!("{} {port}\n", idle.pid()), format!("4194000 {port}\n")] {
        let lock = held(&host, &text);
        let sent = sent_to(&impostor, || {
            for command in COMMANDS {
                let command = command.iter().copied().chain(["--timeout", "0.3", "--no-autostart"]);
                host.openwork(command).fails(1, "daemon_unresponsive");
            }
        });
        assert_eq!(String::from_utf8_lossy(&sent), "");
        drop(lock);
    }
}

#[test]
fn listener_without_the_lock_gets_no_byte() {
    let host = Host::new();
    let impostor = TcpListener::bind("127.0.0.1:0").unwrap();
    // The pid and the port are this process's, but another process holds the lock.
    let text = format!("{} {}\n", std::process::id(), impostor.local_addr().unwrap().port());
    let lock = held(&host, &text);
    let _holder = Stranger::new(Command::new("sleep").arg("600").stdin(lock));
    let sent = sent_to(&impostor, || {
        host.openwork(["status", "--timeout", "0.3"]).fails(1, "daemon_unresponsive");
        host.openwork(["api", "p", "/path", "--timeout", "0.3"]).fails(1, "daemon_unresponsive");
    });
    assert_eq!(String::from_utf8_lossy(&sent), "");
}

#[test]
fn daemon_in_another_container_is_reported() {
    let host = Host::new();
    host.exercises(["code daemon_elsewhere"]);
    let impostor = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = "00000000-0000-0000-0000-000000000000/pid:[1]/net:[1]";
    let text = format!("{} {} {place}\n", std::process::id(), impostor.local_addr().unwrap().port());
    let _lock = held(&host, &text);
    let start = Instant::now();
    let sent = sent_to(&impostor, || {
        for command in COMMANDS {
            host.openwork(command.iter().copied()).fails(1, "daemon_elsewhere");
        }
        host.openwork(["daemon", "start"]).fails(1, "daemon_elsewhere");
        // Listing reads the state file, wherever the daemon is.
        host.openwork(["workspace", "list"]).json();
    });
    assert_eq!(String::from_utf8_lossy(&sent), "");
    assert!(start.elapsed() < Duration::from_secs(30), "waited for a daemon elsewhere: {:?}", start.elapsed());
}

#[test]
fn port_of_a_killed_daemon_is_not_trusted() {
    let mut host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let (daemon, port) = (host.daemon_pid(), host.port());
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
    let impostor = TcpListener::bind(("127.0.0.1", port)).unwrap();
    host.unset("OPENWORK_DAEMON_PORT");
    let sent = sent_to(&impostor, || {
        host.openwork(["status"]).fails(3, "daemon_not_running");
        host.openwork(["workspace", "list"]).json();
        // Another daemon is started, at another port.
        host.add(host.project("p"));
        host.openwork(["api", "p", "/path"]).ok();
    });
    assert_eq!(String::from_utf8_lossy(&sent), "");
}

#[test]
fn frozen_daemon_does_not_delay_reads_of_the_state_file() {
    let host = Host::new();
    let project = host.project("p");
    host.add(&project);
    kill(host.daemon_pid(), Signal::STOP);
    for command in [&["workspace", "current"][..], &["workspace", "list"], &["workspace", "info", "p"]] {
        let start = Instant::now();
        let output = host.openwork(command.iter().copied()).ok();
        assert!(output.stdout.contains('p'), "{output:?}");
        assert!(start.elapsed() < Duration::from_secs(5), "{command:?}: {:?}", start.elapsed());
    }
    assert!(is_alive(host.daemon_pid()));
}

/// Tests that need two users: root, who owns the daemon, and an unprivileged account.
mod as_root {
    use std::io::Write;
    use std::net::{SocketAddr, TcpStream};

    use rustix::net::sockopt::{set_socket_linger, set_socket_reuseaddr};
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    use rustix::process::Uid;
    use rustix::thread::set_thread_res_uid;

    use super::*;
    use crate::support::NOBODY;

    /// A connection of another user, from a port that others may listen on.
    fn connect_as_nobody(port: u16) -> TcpStream {
        let connected = thread::spawn(move || {
            // Only for this thread: the kernel assigns its sockets to that user.
            let nobody = Uid::from_raw(NOBODY);
            set_thread_res_uid(nobody, nobody, nobody).unwrap();
            let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
            set_socket_reuseaddr(&socket, true).unwrap();
            bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
            connect(&socket, &SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
            TcpStream::from(socket)
        });
        connected.join().unwrap()
    }

    #[test]
    #[ignore = "needs root, to become another user"]
    fn request_of_another_user_is_not_taken_for_the_owners() {
        let host = Host::new();
        host.openwork(["daemon", "start"]).ok();
        let (port, project) = (host.port(), host.project("planted"));
        let body = format!(r#"{{"path":"{}"}}"#, project.display());
        let request = format!(
            "POST /workspaces HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len(),
        );
        for attempt in 0..50 {
            let mut stream = connect_as_nobody(port);
            // Hold back the end until the owner listens at the client's address.
            let (held_back, rest) = request.split_at(request.len() - if attempt % 2 == 0 { 1 } else { body.len() + 2 });
            stream.write_all(held_back.as_bytes()).unwrap();
            let owners = TcpListener::bind(stream.local_addr().unwrap()).unwrap();
            stream.write_all(rest.as_bytes()).unwrap();
            // A reset removes the connection before the daemon checks whose it is.
            set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
            drop(stream);
            // The daemon accepts connections in order, so the earlier one has been handled by now.
            host.health();
            drop(owners);
        }
        assert_eq!(host.openwork(["workspace", "list"]).json()["workspaces"].as_array().unwrap().len(), 0);
    }
}
