//! Processes as Linux sees them: which one it is, watching it, ending it and all it started,
//! who holds a socket. Everything that depends on the operating system is here; another system
//! is another such file.
//!
//! Invariant: nothing is ever signalled by a bare process id that could meanwhile be another's.
//! A process is held by a pidfd, opened first and identified after; a group is signalled only
//! while its leader is alive or not yet reaped.

use std::fs;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, WaitId, WaitIdOptions, getrlimit, kill_process_group, pidfd_open,
    pidfd_send_signal, setrlimit, waitid,
};

use crate::options::MARKER;

/// How long a process may take to end, once its memory is gone: files and sockets follow.
const ENDING_LIMIT: Duration = Duration::from_secs(5);

/// How long it is waited for what was swept to be gone: a killed process mostly is within 0.1 s.
const SWEEP_LIMIT: Duration = Duration::from_secs(2);

/// What proves that a process is the one that was written down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// Clock ticks since boot at which it started.
    pub start_ticks: u64,
    /// Of the boot in which it started.
    pub boot_id: String,
    /// The value of [`MARKER`] in its environment.
    pub engine_id: String,
}

/// A process that we hold: started by us, or by a daemon before us.
pub struct Process {
    identity: Identity,
    pidfd: Arc<OwnedFd>,
    /// None when another daemon has started it: then init reaps it.
    child: Option<Child>,
}

impl Process {
    /// Starts a command in a process group of its own, with the marker in its environment.
    pub fn spawn(command: &mut Command, engine_id: &str) -> io::Result<Process> {
        let mut child = command.env(MARKER, engine_id).process_group(0).spawn()?;
        match hold(&child) {
            Ok((pidfd, start_ticks, boot_id)) => {
                let identity = Identity { pid: child.id(), start_ticks, boot_id, engine_id: engine_id.to_owned() };
                Ok(Process { identity, pidfd: Arc::new(pidfd), child: Some(child) })
            }
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
        }
    }

    /// Takes over the process with this identity, if it lives and all of it is proved.
    pub fn adopt(identity: &Identity) -> Option<Process> {
        if identity.engine_id.is_empty() || identity.boot_id != boot_id().ok()? {
            return None;
        }
        // Held first, identified after: what is proved below is true of what is held.
        let pidfd = open(identity.pid)?;
        if start_ticks(identity.pid).ok()? != identity.start_ticks {
            return None;
        }
        // One that is just ending has lost its environment, and may hold its port for a moment
        // more. To wait for its end harms nobody.
        let environ = fs::read(format!("/proc/{}/environ", identity.pid)).unwrap_or_default();
        if environ.is_empty() {
            wait_until_readable(&pidfd, Instant::now() + ENDING_LIMIT);
            return None;
        }
        let proved = has_marker(&environ, &identity.engine_id) && !has_ended(&pidfd);
        proved.then(|| Process { identity: identity.clone(), pidfd: Arc::new(pidfd), child: None })
    }

    /// What proves it.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Readable once it has ended.
    pub fn pidfd(&self) -> Arc<OwnedFd> {
        self.pidfd.clone()
    }

    /// The standard input we gave it.
    pub fn take_stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.child.as_mut()?.stdin.take()
    }

    /// The standard output we piped.
    pub fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.as_mut()?.stdout.take()
    }

    /// Signals it and its group. One that has ended is not signalled, unless it is a child
    /// that has not been reaped: then its group is still its own.
    pub fn signal(&self, signal: Signal) {
        if self.child.is_none() && has_ended(&self.pidfd) {
            return;
        }
        let _ = pidfd_send_signal(&self.pidfd, signal);
        if let Some(group) = i32::try_from(self.identity.pid).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, signal);
        }
    }

    /// After its end: ends what is left of its group and of everything that carries its marker,
    /// then reaps it. Its exit status, if it was a child of ours.
    pub fn bury(mut self) -> Option<ExitStatus> {
        // Not reaped yet, so that the id of its group cannot have become another's.
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        if self.child.is_some() {
            self.signal(Signal::KILL);
        }
        let status = self.child.as_mut().and_then(|child| child.wait().ok());
        sweep(&self.identity.engine_id);
        status
    }
}

fn hold(child: &Child) -> io::Result<(OwnedFd, u64, String)> {
    let pidfd = open(child.id()).ok_or_else(|| io::Error::other("the kernel gives no pidfd"))?;
    Ok((pidfd, start_ticks(child.id())?, boot_id()?))
}

/// Holds the process with this id, whichever that is; `None` when there is none.
pub fn open(pid: u32) -> Option<OwnedFd> {
    pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()
}

/// Whether the process behind a pidfd has ended.
pub fn has_ended(pidfd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // Not to know is not to have seen the end.
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

/// A file descriptor that becomes readable for everyone, once and for good.
pub struct Flag(OwnedFd);

impl Flag {
    /// A flag that is down.
    pub fn new() -> io::Result<Flag> {
        Ok(Flag(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Raises it.
    pub fn raise(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Whether it is up.
    pub fn is_raised(&self) -> bool {
        has_ended(&self.0) // readable, all the same
    }
}

impl AsFd for Flag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A duration as the kernel takes it.
pub fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() }
}

/// Waits until a descriptor is ready for this, but no longer than the limit, if there is one.
///
/// # Errors
/// `WouldBlock` at the limit, as of a socket with one; `ConnectionAborted` when the flag is raised.
pub fn wait_ready(fd: impl AsFd, events: PollFlags, limit: Option<Duration>, flag: &Flag) -> io::Result<()> {
    let mut fds = [PollFd::new(&fd, events), PollFd::new(flag, PollFlags::IN)];
    loop {
        match poll(&mut fds, limit.map(timespec).as_ref()) {
            Ok(0) => return Err(io::ErrorKind::WouldBlock.into()),
            Ok(_) if !fds[1].revents().is_empty() => return Err(io::ErrorKind::ConnectionAborted.into()),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Reads what a process prints, until it has ended or prints no more: one that it has started may
/// hold the pipe open for longer.
///
/// # Errors
/// Those of reading; `ConnectionAborted` when the flag is raised.
pub fn read_output(pipe: ChildStdout, pidfd: &OwnedFd, limit: usize, flag: &Flag) -> io::Result<String> {
    rustix::io::ioctl_fionbio(&pipe, true)?;
    let (mut pipe, mut output) = (pipe, Vec::new());
    loop {
        let mut fds = [
            PollFd::new(&pipe, PollFlags::IN),
            PollFd::new(pidfd, PollFlags::IN),
            PollFd::from_borrowed_fd(flag.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            other => other?,
        };
        let [_, ended, raised] = fds.map(|fd| !fd.revents().is_empty());
        if raised {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let mut buffer = [0; 4096];
        let over = match pipe.read(&mut buffer) {
            Ok(0) => true,
            Ok(count) => {
                output.extend_from_slice(&buffer[..count]);
                output.len() >= limit
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => ended,
            Err(e) => return Err(e),
        };
        if over {
            return Ok(String::from_utf8_lossy(&output).into_owned());
        }
    }
}

/// Waits until a descriptor is readable, or a flag is raised: then false.
pub fn wait_readable(fd: impl AsFd, flag: &Flag) -> io::Result<bool> {
    let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(flag, PollFlags::IN)];
    loop {
        match poll(&mut fds, None) {
            Ok(_) => return Ok(fds[1].revents().is_empty()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Waits until a descriptor is readable; a pidfd is when its process has ended. False at the
/// deadline.
pub fn wait_until_readable(fd: impl AsFd, deadline: Instant) -> bool {
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timespec(rest))) {
            Err(Errno::INTR) => {}
            Ok(0) | Err(_) => return false,
            Ok(_) => return true,
        }
    }
}

/// Ends everything of our user that carries the marker of this engine, whatever group, session
/// or parent it has by now. What has emptied its own environment is not found.
pub fn sweep(engine_id: &str) {
    let deadline = Instant::now() + SWEEP_LIMIT;
    // What is being swept may be forking; a few rounds catch up with anything that is not
    // made to outrun us, and the bound keeps such a thing from holding us up.
    for _ in 0..20 {
        let swept = sweep_once(engine_id);
        if swept.is_empty() {
            return;
        }
        // Gone, with its sockets, before another is started.
        for pidfd in swept {
            wait_until_readable(&pidfd, deadline);
        }
    }
}

/// One round: what was signalled.
fn sweep_once(engine_id: &str) -> Vec<OwnedFd> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let ourselves = std::process::id();
    let mut swept = Vec::new();
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // The environment of another user's process cannot be read, but by root: then it is
        // one that has changed its user, and as much ours.
        if pid == ourselves || !carries_marker(pid, engine_id) {
            continue;
        }
        let Some(pidfd) = open(pid) else { continue };
        // Looked at again, now that it cannot become another.
        if carries_marker(pid, engine_id) && pidfd_send_signal(&pidfd, Signal::KILL).is_ok() {
            swept.push(pidfd);
        }
    }
    swept
}

/// Whether the environment of a process has our marker. A zombie's is empty.
fn carries_marker(pid: u32, engine_id: &str) -> bool {
    fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environ| has_marker(&environ, engine_id))
}

fn has_marker(environ: &[u8], engine_id: &str) -> bool {
    let wanted = format!("{MARKER}={engine_id}");
    environ.split(|byte| *byte == 0).any(|entry| entry == wanted.as_bytes())
}

/// When a process started, in clock ticks since boot: field 22 of `/proc/<pid>/stat` (proc(5)).
fn start_ticks(pid: u32) -> io::Result<u64> {
    stat_field(pid, 22)
}

/// A numeric field of `/proc/<pid>/stat`, counted from 1 as in proc(5); 4 and above.
fn stat_field(pid: u32, field: usize) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the name in parentheses and may itself have spaces and parentheses.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name
        .split_ascii_whitespace()
        .nth(field - 3)
        .and_then(|value| value.parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The id of this boot.
fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Resident memory of everything that carries the marker of an engine, in bytes. Pages that
/// several of them share are counted for each.
pub fn family_memory(engine_id: &str) -> Option<u64> {
    let pids = fs::read_dir("/proc").ok()?.flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let family: Vec<u64> = pids.filter(|pid| carries_marker(*pid, engine_id)).filter_map(memory).collect();
    if family.is_empty() { None } else { Some(family.iter().sum()) }
}

/// Resident memory of a process in bytes: `VmRSS` of `/proc/<pid>/status`.
pub fn memory(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

/// The inode of the socket that listens on 127.0.0.1 at this port, if it belongs to the process, or
/// to one of the group that it leads (a wrapper that starts the real opencode and stays).
///
/// # Errors
/// When that cannot be known, as for want of descriptors: it is no reason to end anything.
pub fn listening(process: &Process, port: u16) -> io::Result<Option<u32>> {
    let Some(inode) = listening_inode(port)? else { return Ok(None) };
    let wanted = format!("socket:[{inode}]");
    let leader = process.identity.pid;
    if holds(leader, &wanted)? {
        return Ok(Some(inode));
    }
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if stat_field(pid, 5).is_ok_and(|group| group == u64::from(leader)) && holds(pid, &wanted)? {
            return Ok(Some(inode));
        }
    }
    Ok(None)
}

/// Whether a process has this socket open.
fn holds(pid: u32, socket: &str) -> io::Result<bool> {
    match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(entries) => Ok(entries
            .flatten()
            .any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == Path::new(socket)))),
        Err(e) if is_lack(&e) => Err(e),
        // It has ended, or is another user's.
        Err(_) => Ok(false),
    }
}

/// Whether it is us who lack something, descriptors or memory: that says nothing about others.
pub fn is_lack(e: &io::Error) -> bool {
    let lacks = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS, Errno::ADDRNOTAVAIL];
    lacks.iter().any(|lack| e.raw_os_error() == Some(lack.raw_os_error()))
}

/// As many descriptors as the daemon can use: three for each connection, and those of its own.
const DESCRIPTORS: u64 = 4096;

/// The limit before [`raise_descriptor_limit`].
static DESCRIPTORS_BEFORE: OnceLock<Rlimit> = OnceLock::new();

/// Raises the soft limit of descriptors as far as is useful and allowed. What is started later
/// inherits it: see [`restore_descriptor_limit`].
pub fn raise_descriptor_limit() {
    let before = getrlimit(Resource::Nofile);
    let wanted = before.maximum.map_or(DESCRIPTORS, |maximum| maximum.min(DESCRIPTORS));
    if before.current.is_some_and(|current| current < wanted) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..before });
        let _ = DESCRIPTORS_BEFORE.set(before);
    }
}

/// The soft limit that somebody else is to have, if ours was raised.
pub fn descriptor_limit_before() -> Option<u64> {
    DESCRIPTORS_BEFORE.get().and_then(|before| before.current)
}

/// Lowers the soft limit of this process to that of [`descriptor_limit_before`].
pub fn restore_descriptor_limit(current: u64) {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(current), ..limit });
}

/// What the kernel says of a TCP socket.
struct TcpSocket {
    user: u32,
    inode: u32,
}

/// Asks the kernel for the IPv4 socket between two addresses; `remote` is 0.0.0.0:0 of one that
/// listens. One that is IPv6 and connected to a mapped address is found too.
///
/// Asked by sock_diag(7) and not by reading `/proc/net/tcp`: that walks the kernel's whole table,
/// which takes 100 times as long (2 ms), and every control request asks. Where there is no
/// sock_diag (it is a module), the table is read after all.
///
/// # Errors
/// When there is no descriptor to ask through.
fn tcp_socket(local: SocketAddrV4, remote: SocketAddrV4) -> io::Result<Option<TcpSocket>> {
    let found = match diagnosed(local, remote) {
        Err(e) if is_lack(&e) => return Err(e),
        Err(_) => listed(local, remote),
        Ok(found) => found,
    };
    // What its owner has closed has no inode, and says that it is root's.
    Ok(found.filter(|socket| socket.inode != 0))
}

/// `inet_diag_req_v2` out, `inet_diag_msg` back (linux/inet_diag.h), each behind an `nlmsghdr`
/// (linux/netlink.h).
fn diagnosed(local: SocketAddrV4, remote: SocketAddrV4) -> io::Result<Option<TcpSocket>> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLM_F_REQUEST: u16 = 1;
    const NLMSG_ERROR: u16 = 2;
    const NO_SUCH_SOCKET: i32 = -(Errno::NOENT.raw_os_error());
    const AF_INET: u8 = 2;
    const IPPROTO_TCP: u8 = 6;
    let mut request = Vec::with_capacity(72);
    request.extend_from_slice(&72u32.to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request.extend_from_slice(&[0; 8]); // sequence, sender
    request.extend_from_slice(&[AF_INET, IPPROTO_TCP, 0, 0]);
    request.extend_from_slice(&u32::MAX.to_ne_bytes()); // in any state
    request.extend_from_slice(&local.port().to_be_bytes());
    request.extend_from_slice(&remote.port().to_be_bytes());
    for address in [local.ip(), remote.ip()] {
        request.extend_from_slice(&address.octets());
        request.extend_from_slice(&[0; 12]); // of 16, for IPv6
    }
    request.extend_from_slice(&[0; 4]); // on any interface
    request.extend_from_slice(&[0xff; 8]); // without a cookie
    let socket =
        socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG))?;
    send(&socket, &request, SendFlags::empty())?;
    let mut reply = [0; 1024];
    let (length, _) = recv(&socket, &mut reply, RecvFlags::empty())?;
    let reply = &reply[..length];
    let number = |at: usize| Some(u32::from_ne_bytes(reply.get(at..at + 4)?.try_into().ok()?));
    let kind = reply.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    match (kind, number(16)) {
        (Some(SOCK_DIAG_BY_FAMILY), _) => {
            let (user, inode) = number(80).zip(number(84)).ok_or(io::ErrorKind::InvalidData)?;
            Ok(Some(TcpSocket { user, inode }))
        }
        (Some(NLMSG_ERROR), Some(error)) if error as i32 == NO_SUCH_SOCKET => Ok(None),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// The same from `/proc/net/tcp` (proc_net(5)).
fn listed(local: SocketAddrV4, remote: SocketAddrV4) -> Option<TcpSocket> {
    // An address stands there in the machine's byte order: `0100007F:1F90`.
    let spelled = |a: SocketAddrV4| format!("{:08X}:{:04X}", u32::from_ne_bytes(a.ip().octets()), a.port());
    let find = |file: &str, prefix: &str| {
        let table = fs::read_to_string(file).ok()?;
        let addresses = format!(": {prefix}{} {prefix}{} ", spelled(local), spelled(remote));
        let row = &table[table.find(&addresses)? + addresses.len()..];
        // State, queues, timer, retransmissions, user, timeouts, inode.
        let mut fields = row.split_ascii_whitespace().skip(4);
        Some(TcpSocket { user: fields.next()?.parse().ok()?, inode: fields.nth(1)?.parse().ok()? })
    };
    let mapped = format!("{:08X}{:08X}{:08X}", 0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]));
    find("/proc/net/tcp", "").or_else(|| find("/proc/net/tcp6", &mapped))
}

/// The inode of the socket that listens on 127.0.0.1 at this port.
///
/// # Errors
/// When there is no descriptor to ask the kernel through.
pub fn listening_inode(port: u16) -> io::Result<Option<u32>> {
    let nobody = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
    Ok(tcp_socket(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), nobody)?.map(|socket| socket.inode))
}

/// The user at the other end of a connection that was accepted on `ours` from `theirs`, both on
/// loopback. `None` when it is already closed.
///
/// # Errors
/// When there is no descriptor to ask the kernel through.
pub fn user_of_connection(ours: SocketAddr, theirs: SocketAddr) -> io::Result<Option<u32>> {
    let (SocketAddr::V4(ours), SocketAddr::V4(theirs)) = (ours, theirs) else { return Ok(None) };
    Ok(tcp_socket(theirs, ours)?.map(|socket| socket.user))
}

/// Closes every descriptor above standard error. A daemon inherits whatever the shell had open:
/// with `exec 9>lock; openwork …` it would hold that lock for weeks.
pub fn close_inherited_descriptors() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return };
    let listed: Vec<i32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(|fd| *fd > 2).collect();
    for fd in listed {
        // The descriptor of the listing itself is closed by now.
        if fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_err() {
            continue;
        }
        // SAFETY: called as the first thing in a process that has opened nothing yet, so no
        // value owns this descriptor, and no other thread runs that could be given its number.
        #[allow(unsafe_code)]
        unsafe {
            rustix::io::close(fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn output_ends_with_the_process() {
        // What it leaves behind holds the pipe open.
        let mut command = Command::new("sh");
        command.args(["-c", "echo 1.2.3; sleep 60 &"]).process_group(0);
        let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        let pidfd = open(child.id()).unwrap();
        let output = read_output(child.stdout.take().unwrap(), &pidfd, 4096, &Flag::new().unwrap());
        let group = Pid::from_child(&child);
        child.wait().unwrap();
        rustix::process::kill_process_group(group, Signal::KILL).unwrap();
        assert_eq!(output.unwrap(), "1.2.3\n");
    }

    #[test]
    fn the_kernel_knows_whose_a_connection_is() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = listener.local_addr().unwrap();
        let me = rustix::process::geteuid().as_raw();
        for address in [ours, SocketAddr::new("::ffff:127.0.0.1".parse().unwrap(), ours.port())] {
            let client = TcpStream::connect(address).unwrap();
            let (accepted, theirs) = listener.accept().unwrap();
            assert_eq!(user_of_connection(ours, theirs).unwrap(), Some(me), "{address}");
            let (SocketAddr::V4(local), SocketAddr::V4(remote)) = (theirs, ours) else { panic!("{theirs} {ours}") };
            let found = listed(local, remote).unwrap();
            if let Ok(asked) = diagnosed(local, remote) {
                assert_eq!(asked.map(|socket| (socket.user, socket.inode)), Some((me, found.inode)));
            }
            drop((client, accepted));
            assert_eq!(user_of_connection(ours, theirs).unwrap(), None, "closed");
        }
        assert!(listening_inode(ours.port()).unwrap().is_some());
        drop(listener);
        assert_eq!(listening_inode(ours.port()).unwrap(), None);
    }
}
