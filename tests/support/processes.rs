//! Processes, sockets and ports as the kernel shows them, and waiting for conditions; for tests, soak and
//! benchmark. Independent of the rest of the harness.

use std::cell::RefCell;
use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::fstat;
pub use rustix::process::Signal;
use rustix::process::{Pid, Resource, Rlimit, geteuid, getrlimit, kill_process, setrlimit};

/// Far longer than any condition takes, so that only a hang reaches it.
pub const DEADLINE: Duration = Duration::from_secs(90);

// --- Waiting ---

/// Polls until the condition gives a value; `None` after this time.
pub fn poll<T>(limit: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return Some(value);
        }
        if Instant::now() > deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the condition gives a value, and returns it.
pub fn until<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    poll(DEADLINE, condition).unwrap_or_else(|| panic!("timed out waiting for {what}"))
}

/// Waits until the condition holds.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    until(what, || condition().then_some(()));
}

pub fn wait_gone(pid: u32) {
    wait_for(&format!("process {pid} to end"), || !is_alive(pid));
}

// --- Processes ---

/// A running process.
#[derive(Clone, Debug)]
pub struct Process {
    pub pid: u32,
    pub argv: Vec<String>,
    /// As `NAME=value`.
    environ: Vec<String>,
}

impl Process {
    /// `None` when the process does not run, or cannot be read.
    pub fn of(pid: u32) -> Option<Process> {
        let read = |name: &str| {
            let bytes = fs::read(format!("/proc/{pid}/{name}")).ok()?;
            let parts = bytes.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned());
            Some(parts.filter(|part| !part.is_empty()).collect())
        };
        let process = Process { pid, argv: read("cmdline")?, environ: read("environ")? };
        is_alive(pid).then_some(process)
    }

    /// All processes with this home, and so of one host: the daemon, opencode and its children, and running
    /// commands.
    pub fn all_of(home: &Path) -> Vec<Process> {
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter_map(Process::of).filter(|process| process.has_home(home)).collect()
    }

    pub fn has_home(&self, home: &Path) -> bool {
        self.variable("HOME").is_some_and(|value| Path::new(value) == home)
    }

    pub fn variable(&self, name: &str) -> Option<&str> {
        self.environ.iter().find_map(|variable| variable.strip_prefix(name)?.strip_prefix('='))
    }
}

/// Fields of `/proc/<pid>/stat`: the session, and the start in clock ticks since boot.
pub const SESSION: usize = 6;
pub const START_TIME: usize = 22;

/// A numeric field of `/proc/<pid>/stat`, counted from 1 as in proc(5); 4 and above.
pub fn stat_field(pid: u32, field: usize) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(field - 3).unwrap().parse().unwrap()
}

/// Whether the process runs, and is no zombie.
pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    // If the main thread ends first, the process looks like a zombie while other threads still run.
    state.is_some_and(|state| !"ZX".contains(state) || threads > 1)
}

/// Sends a signal. After STOP every thread of the process has stopped: the kernel lets each run on until it gets
/// a processor.
pub fn kill(pid: u32, signal: Signal) {
    let target = Pid::from_raw(pid as i32).expect("a pid");
    // The process may have ended in the meantime.
    if kill_process(target, signal).is_ok() && signal == Signal::STOP {
        wait_for(&format!("the threads of process {pid} to stop"), || is_stopped(pid));
    }
}

/// Whether no thread of the process runs.
fn is_stopped(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    threads.flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // A thread that has ended has no state any more.
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['T', 't', 'Z', 'X']))
    })
}

pub fn is_root() -> bool {
    geteuid().is_root()
}

// --- Sockets and ports ---

/// States of a socket in the kernel's table.
pub const ESTABLISHED: &str = "01";
pub const LISTEN: &str = "0A";

/// 127.0.0.1 in the kernel's table, which prints the four bytes as a number of the processor's order.
pub fn loopback() -> String {
    format!("{:08X}", u32::from_ne_bytes([127, 0, 0, 1]))
}

/// The rows of the kernel's table for this local port: address, state, and the receive queue in bytes (for a
/// listening socket: in connections).
fn table(port: u16) -> Vec<(String, String, u32)> {
    let tables = ["tcp", "tcp6"].map(|name| fs::read_to_string(format!("/proc/net/{name}")).unwrap_or_default());
    let rows = tables.iter().flat_map(|table| table.lines()).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[1].ends_with(&format!(":{port:04X}")))
        .map(|row| {
            let (address, _) = row[1].split_once(':').unwrap();
            let (_, received) = row[4].split_once(':').unwrap();
            (address.to_owned(), row[3].to_owned(), u32::from_str_radix(received, 16).unwrap())
        })
        .collect()
}

/// The sockets in this state at this local port: address, and receive queue.
pub fn sockets(port: u16, state: &str) -> Vec<(String, u32)> {
    let rows = table(port).into_iter().filter(|(_, of, _)| of == state);
    rows.map(|(address, _, received)| (address, received)).collect()
}

/// A free port, reserved while the calling thread lives: no other test gets it, in this process, another run
/// or another work tree, and the kernel does not use it for connections.
///
/// The port is not bound for that: a process that another thread forks at that moment would hold the socket
/// until its exec, and the daemon would find the port taken. Instead, the claim is a socket in the abstract
/// namespace, which has the scope of ports and disappears with this process.
pub fn free_port() -> u16 {
    const FIRST: u32 = 20_000;
    /// Stays below 32768, where the kernel's ports for connections begin.
    const COUNT: u32 = 12_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    thread_local! {
        static CLAIMS: RefCell<Vec<UnixListener>> = const { RefCell::new(Vec::new()) };
    }
    loop {
        // Processes with consecutive pids start far apart.
        let offset = std::process::id().wrapping_mul(397).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = (FIRST + offset % COUNT) as u16;
        let name = SocketAddr::from_abstract_name(format!("openwork-test-port-{port}")).unwrap();
        let Ok(claim) = UnixListener::bind_addr(&name) else { continue };
        if table(port).is_empty() {
            CLAIMS.with_borrow_mut(|claims| claims.push(claim));
            return port;
        }
    }
}

/// Closes a listener and waits until the socket is gone: a process that another thread has just forked holds
/// it until its exec. The port may have another listener by then.
pub fn close(listener: TcpListener) {
    let inode = fstat(&listener).unwrap().st_ino.to_string();
    drop(listener);
    let tables = || ["tcp", "tcp6"].map(|name| fs::read_to_string(format!("/proc/net/{name}")).unwrap_or_default());
    let is_listed = |table: &String| table.lines().any(|line| line.split_whitespace().nth(9) == Some(inode.as_str()));
    wait_for("the listener to be closed", || !tables().iter().any(is_listed));
}

/// Descriptors and threads of a process.
pub fn resources(pid: u32) -> (usize, usize) {
    let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    (count("fd"), count("task"))
}

/// As many descriptors for this process as it may have.
pub fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
}
