//! The owner of a TCP socket: the process that listens on an address, the user behind a connection.
//!
//! Invariants: a connection is identified by both of its addresses and counts only while it is
//! established; a listener never answers for a connection, nor a connection for a listener.

use std::fs::{self, ReadDir};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::Path;

use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};
use rustix::process::geteuid;

use super::limits::is_exhausted;
use super::process::{is_ours, stat_field};

/// States of a TCP socket that matter here, as the kernel numbers them (`net/tcp_states.h`).
const ESTABLISHED: u8 = 1;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;
const LISTEN: u8 = 10;

/// The states of an established connection. A half-closed one still waits for the reply.
const CONNECTED: [u8; 4] = [ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT];

/// The remote address of a listening socket in the kernel's tables.
const NOBODY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);

/// A listening socket.
#[derive(Clone, Copy, Debug)]
pub struct Listening {
    /// Its inode.
    pub inode: u32,
    /// A process that holds it.
    pub pid: u32,
}

/// The socket that listens on this address, if it belongs to the process or to a member of its process group
/// (a wrapper may start the real opencode as a child).
///
/// # Errors
/// When this process lacks a resource, such as descriptors, for the check: no reason to end anything.
pub fn listening(leader: u32, address: SocketAddrV4) -> io::Result<Option<Listening>> {
    let Some(inode) = listening_inode(address)? else { return Ok(None) };
    let wanted = format!("socket:[{inode}]");
    if holds(leader, &wanted)? {
        return Ok(Some(Listening { inode, pid: leader }));
    }
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if stat_field(pid, 5).is_ok_and(|group| group == u64::from(leader)) && holds(pid, &wanted)? {
            return Ok(Some(Listening { inode, pid }));
        }
    }
    Ok(None)
}

/// The inode of the socket that listens on this address, if the process itself holds it.
///
/// # Errors
/// When this process lacks a resource for the check.
pub fn listening_itself(pid: u32, address: SocketAddrV4) -> io::Result<Option<u32>> {
    let Some(inode) = listening_inode(address)? else { return Ok(None) };
    Ok(holds(pid, &format!("socket:[{inode}]"))?.then_some(inode))
}

/// The descriptors of a process, as links in `/proc/<pid>/fd`; `None` when it has ended or belongs to another
/// user.
fn open_files(pid: u32) -> io::Result<Option<ReadDir>> {
    match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(entries) => Ok(Some(entries)),
        Err(e) if is_exhausted(&e) => Err(e),
        Err(_) => Ok(None),
    }
}

/// Whether a process has this socket open.
fn holds(pid: u32, socket: &str) -> io::Result<bool> {
    let mut entries = open_files(pid)?.into_iter().flatten().flatten();
    Ok(entries.any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == Path::new(socket))))
}

/// Whether a service manager of our user listens on this address, to start a daemon on a connection (socket
/// activation). A manager whose descriptors cannot be read counts as listening.
///
/// # Errors
/// When this process lacks a resource for the check.
pub fn is_held_by_service_manager(address: SocketAddrV4) -> io::Result<bool> {
    let found = tcp_socket(address, NOBODY)?.filter(|socket| socket.state == LISTEN);
    let Some(socket) = found.filter(|socket| socket.user == geteuid().as_raw()) else { return Ok(false) };
    let wanted = format!("socket:[{}]", socket.inode);
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let is_manager = fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name == "systemd\n");
        if is_manager && is_ours(pid) && (open_files(pid)?.is_none() || holds(pid, &wanted)?) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The inode of the socket that listens on exactly this address.
///
/// # Errors
/// When this process lacks a resource for the check.
pub fn listening_inode(address: SocketAddrV4) -> io::Result<Option<u32>> {
    let found = tcp_socket(address, NOBODY)?;
    Ok(found.filter(|socket| socket.state == LISTEN).map(|socket| socket.inode))
}

/// The user at the other end of an accepted loopback connection; `None` when either end is closed.
///
/// # Errors
/// When this process lacks a resource for the check.
pub fn peer_user(stream: &TcpStream, peer: SocketAddr) -> io::Result<Option<u32>> {
    let (SocketAddr::V4(ours), SocketAddr::V4(theirs)) = (stream.local_addr()?, peer) else { return Ok(None) };
    let connected = |local, remote| -> io::Result<Option<TcpSocket>> {
        Ok(tcp_socket(local, remote)?.filter(|socket| CONNECTED.contains(&socket.state)))
    };
    let Some(peer) = connected(theirs, ours)? else { return Ok(None) };
    // After a client resets its connection, another user's connection could get the same two addresses.
    // That needs a new socket on our side too; so while our socket is still the one between these
    // addresses, the peer found above is its peer.
    let inode = u32::try_from(fstat(stream)?.st_ino).ok();
    Ok(connected(ours, theirs)?.filter(|own| Some(own.inode) == inode).map(|_| peer.user))
}

/// A TCP socket as the kernel reports it.
struct TcpSocket {
    state: u8,
    user: u32,
    inode: u32,
}

/// Asks the kernel for the IPv4 socket between exactly these two addresses; an IPv6 socket that is
/// connected to a mapped address counts as one.
///
/// This uses sock_diag(7): reading `/proc/net/tcp` walks the kernel's whole table and takes 100 times as long
/// (2 ms), and every control request needs the check. Without the sock_diag module the table is read.
///
/// # Errors
/// When this process lacks a resource for the check.
fn tcp_socket(local: SocketAddrV4, remote: SocketAddrV4) -> io::Result<Option<TcpSocket>> {
    let found = match diagnosed(local, remote) {
        Err(e) if is_exhausted(&e) => return Err(e),
        Err(_) => listed(local, remote),
        Ok(found) => found,
    };
    // A socket that its owner has closed has no inode and is reported as root's.
    Ok(found.filter(|socket| socket.inode != 0))
}

/// `inet_diag_req_v2` out, `inet_diag_msg` back (linux/inet_diag.h), each behind an `nlmsghdr`
/// (linux/netlink.h).
fn diagnosed(local: SocketAddrV4, remote: SocketAddrV4) -> io::Result<Option<TcpSocket>> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLM_F_REQUEST: u16 = 1;
    const AF_INET: u8 = 2;
    const IPPROTO_TCP: u8 = 6;
    let mut request = Vec::with_capacity(72);
    request.extend_from_slice(&72u32.to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request.extend_from_slice(&[0; 8]); // sequence, sender
    request.extend_from_slice(&[AF_INET, IPPROTO_TCP, 0, 0]);
    request.extend_from_slice(&u32::MAX.to_ne_bytes()); // the kernel ignores states in an exact lookup
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
    understand(&reply[..length], local, remote)
}

/// Parses the kernel's reply. The kernel looks for a connection first and then for any listener that would
/// accept one, so the reply counts only if it is about exactly these two addresses.
fn understand(reply: &[u8], local: SocketAddrV4, remote: SocketAddrV4) -> io::Result<Option<TcpSocket>> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLMSG_ERROR: u16 = 2;
    const NO_SUCH_SOCKET: i32 = -(Errno::NOENT.raw_os_error());
    let short = || io::Error::from(io::ErrorKind::InvalidData);
    let bytes = |at: usize, length: usize| reply.get(at..at + length).ok_or_else(short);
    let number = |at: usize| Ok::<_, io::Error>(u32::from_ne_bytes(bytes(at, 4)?.try_into().map_err(|_| short())?));
    let kind = bytes(4, 2)?;
    match u16::from_ne_bytes([kind[0], kind[1]]) {
        SOCK_DIAG_BY_FAMILY => {
            let is_at = |address: SocketAddrV4, port_at: usize, ip_at: usize| {
                let is_ip = match bytes(ip_at, 16)? {
                    [ip @ .., 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] => ip == address.ip().octets(),
                    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ip @ ..] => ip == address.ip().octets(),
                    _ => false,
                };
                Ok::<_, io::Error>(is_ip && bytes(port_at, 2)? == address.port().to_be_bytes())
            };
            let is_it = is_at(local, 20, 24)? && is_at(remote, 22, 40)?;
            let socket = TcpSocket { state: bytes(17, 1)?[0], user: number(80)?, inode: number(84)? };
            Ok(is_it.then_some(socket))
        }
        NLMSG_ERROR if number(16)? as i32 == NO_SUCH_SOCKET => Ok(None),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// The same from `/proc/net/tcp` (proc_net(5)).
fn listed(local: SocketAddrV4, remote: SocketAddrV4) -> Option<TcpSocket> {
    // The table prints an address in the machine's byte order, `0100007F:1F90`.
    let spelled = |a: SocketAddrV4| format!("{:08X}:{:04X}", u32::from_ne_bytes(a.ip().octets()), a.port());
    let find = |file: &str, prefix: &str| {
        let table = fs::read_to_string(file).ok()?;
        let addresses = format!(": {prefix}{} {prefix}{} ", spelled(local), spelled(remote));
        let row = &table[table.find(&addresses)? + addresses.len()..];
        // State, queues, timer, retransmissions, user, timeouts, inode.
        let mut fields = row.split_ascii_whitespace();
        let state = u8::from_str_radix(fields.next()?, 16).ok()?;
        Some(TcpSocket { state, user: fields.nth(3)?.parse().ok()?, inode: fields.nth(1)?.parse().ok()? })
    };
    let mapped = format!("{:08X}{:08X}{:08X}", 0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]));
    find("/proc/net/tcp", "").or_else(|| find("/proc/net/tcp6", &mapped))
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};

    use super::*;

    fn v4(address: SocketAddr) -> SocketAddrV4 {
        let SocketAddr::V4(address) = address else { panic!("{address}") };
        address
    }

    #[test]
    fn kernel_reports_the_user_of_a_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = listener.local_addr().unwrap();
        let me = rustix::process::geteuid().as_raw();
        for address in [ours, SocketAddr::new("::ffff:127.0.0.1".parse().unwrap(), ours.port())] {
            let client = TcpStream::connect(address).unwrap();
            let (accepted, theirs) = listener.accept().unwrap();
            assert_eq!(peer_user(&accepted, theirs).unwrap(), Some(me), "{address}");
            let (local, remote) = (v4(theirs), v4(ours));
            let found = listed(local, remote).unwrap();
            if let Ok(asked) = diagnosed(local, remote) {
                let asked = asked.map(|socket| (socket.state, socket.user, socket.inode));
                assert_eq!(asked, Some((ESTABLISHED, me, found.inode)));
            }
            client.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(peer_user(&accepted, theirs).unwrap(), Some(me), "half closed");
            drop(client);
            eventually("closed", || peer_user(&accepted, theirs).unwrap().is_none());
        }
        assert!(listening_inode(v4(ours)).unwrap().is_some());
        drop(listener);
        eventually("no longer listening", || listening_inode(v4(ours)).unwrap().is_none());
    }

    /// Waits until the condition holds after a close: a process that another test has just forked keeps the
    /// socket open until its exec.
    fn eventually(what: &str, holds: impl Fn() -> bool) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !holds() {
            assert!(std::time::Instant::now() < deadline, "{what}");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    #[test]
    fn listener_belongs_to_its_process() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = v4(listener.local_addr().unwrap());
        let me = std::process::id();
        let inode = listening_inode(address).unwrap();
        assert!(inode.is_some());
        assert_eq!(listening_itself(me, address).unwrap(), inode);
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(listening_itself(other.id(), address).unwrap(), None);
        other.kill().unwrap();
        other.wait().unwrap();
        drop(listener);
        assert_eq!(listening_itself(me, address).unwrap(), None);
    }

    #[test]
    fn listener_is_not_taken_for_a_connection() {
        let ours = TcpListener::bind("127.0.0.1:0").unwrap();
        let (mut gone, theirs) = {
            let client = TcpStream::connect(ours.local_addr().unwrap()).unwrap();
            let (accepted, theirs) = ours.accept().unwrap();
            drop(client);
            (accepted, theirs)
        };
        // The client's FIN has arrived, so its port is free.
        assert_eq!(io::Read::read(&mut gone, &mut [0; 1]).unwrap(), 0);
        drop(gone);
        let again = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = v4(ours.local_addr().unwrap());
        for address in [v4(again.local_addr().unwrap()), v4(theirs)] {
            // In both tables: neither a listener on the client's address nor a closed connection is the
            // client's connection.
            for found in [diagnosed(address, ours).unwrap_or_default(), listed(address, ours)] {
                assert!(found.is_none_or(|socket| socket.inode == 0 && !CONNECTED.contains(&socket.state)));
            }
        }
    }

    #[test]
    fn reply_must_match_both_addresses() {
        let (local, remote): (SocketAddrV4, SocketAddrV4) =
            ("127.0.0.1:1000".parse().unwrap(), "127.0.0.2:2000".parse().unwrap());
        let mut reply = vec![0; 88];
        reply[4..6].copy_from_slice(&20u16.to_ne_bytes());
        (reply[16], reply[17]) = (2, ESTABLISHED);
        reply[20..22].copy_from_slice(&1000u16.to_be_bytes());
        reply[22..24].copy_from_slice(&2000u16.to_be_bytes());
        reply[24..28].copy_from_slice(&[127, 0, 0, 1]);
        reply[40..44].copy_from_slice(&[127, 0, 0, 2]);
        reply[80..84].copy_from_slice(&7u32.to_ne_bytes());
        reply[84..88].copy_from_slice(&9u32.to_ne_bytes());
        let found = understand(&reply, local, remote).unwrap().unwrap();
        assert_eq!((found.state, found.user, found.inode), (ESTABLISHED, 7, 9));
        for at in [20, 22, 24, 40, 30] {
            let mut other = reply.clone();
            other[at] ^= 1;
            assert!(understand(&other, local, remote).unwrap().is_none(), "byte {at}");
        }
        for cut in 0..reply.len() {
            assert!(understand(&reply[..cut], local, remote).is_err(), "cut at {cut}");
        }
        // Only "no such socket" is a valid error reply.
        reply[4..6].copy_from_slice(&2u16.to_ne_bytes());
        reply[16..20].copy_from_slice(&(-Errno::NOENT.raw_os_error()).to_ne_bytes());
        assert!(understand(&reply, local, remote).unwrap().is_none());
        reply[16..20].copy_from_slice(&(-Errno::PERM.raw_os_error()).to_ne_bytes());
        assert!(understand(&reply, local, remote).is_err());
    }
}
