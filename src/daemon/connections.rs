//! The open connections of the public port: how many there may be, and which of them go first.
//!
//! Invariants: the number of connections is bounded by [`CONNECTION_LIMIT`] and by the descriptors
//! the process may have; connections of other users never take the last slots; a connection of
//! another user that has proven nothing makes room for one of the owner's.
//!
//! The kernel knows whose a connection is, but each look costs two calls to it: it is asked only
//! when slots are short.

use std::collections::BTreeMap;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit};

use crate::error::{Error, Result};
use crate::system::socket;

/// The most connections at once: each is a thread and up to [`PER_CONNECTION`] descriptors.
pub const CONNECTION_LIMIT: usize = 1024;
/// One slot in so many is kept for the owner: 64 of 1,024 are enough for all clients of one person,
/// and at least one is kept when descriptors are few.
const OWNERS_SHARE: usize = 16;
/// The descriptors a connection may come to need: its own, and three for a connection to the control
/// plane, whose end tiny_http holds twice. One to opencode, or an event stream, needs fewer.
const PER_CONNECTION: u64 = 4;
/// The descriptors kept for everything else: some 20 of the daemon itself, and those of connections
/// whose slot is free already while tiny_http has yet to close its ends. It does not survive a lack.
const RESERVE: u64 = 64;
/// How long requests under way may take when the daemon stops: their replies are short.
pub const DRAIN_TIME: Duration = Duration::from_secs(1);
/// How long a connection that is ended may take to give its slot back: its thread only has to wake.
const ENDING_TIME: Duration = Duration::from_millis(250);

/// The open connections.
#[derive(Default)]
pub struct Connections {
    open: Mutex<Open>,
    closed: Condvar,
}

#[derive(Default)]
struct Open {
    last: u64,
    /// In the order in which they were opened.
    by_id: BTreeMap<u64, Arc<Connection>>,
    /// The daemon ends: no more connections are taken in.
    closed: bool,
}

/// One connection.
pub struct Connection {
    /// The socket.
    pub stream: TcpStream,
    peer: SocketAddr,
    /// Whether the client has proven that the connection is worth its slot: by being the owner's, or with
    /// credentials or a ticket. A request alone proves nothing, since every user can ask `/health`.
    proven: AtomicBool,
    is_owners: OnceLock<bool>,
}

/// The slot of a connection. Dropping it ends the connection, also when serving it panics.
pub struct Slot {
    connections: &'static Connections,
    id: u64,
    connection: Arc<Connection>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let _ = self.connection.stream.shutdown(Shutdown::Both);
        self.connections.lock().by_id.remove(&self.id);
        self.connections.closed.notify_all();
    }
}

impl Connection {
    /// A connection that was accepted.
    pub fn new(stream: TcpStream, peer: SocketAddr) -> Connection {
        Connection { stream, peer, proven: AtomicBool::new(false), is_owners: OnceLock::new() }
    }

    /// Notes that the connection is worth its slot.
    pub fn prove(&self) {
        self.proven.store(true, Ordering::Relaxed);
    }

    fn is_unproven(&self) -> bool {
        !self.proven.load(Ordering::Relaxed)
    }

    /// Requires that the client belongs to the user of the daemon, or to root.
    ///
    /// # Errors
    /// `forbidden_user`, also when the client has gone; `overloaded` without a descriptor for the look.
    pub fn check_user(&self) -> Result<()> {
        match socket::peer_user(&self.stream, self.peer) {
            Ok(Some(user)) if user == 0 || user == rustix::process::geteuid().as_raw() => {
                self.prove();
                Ok(())
            }
            Ok(Some(_) | None) => Err(Error::ForbiddenUser),
            Err(_) => Err(Error::Overloaded("connections")),
        }
    }

    /// The same as a remembered answer, for the choice of the connections that go first.
    fn is_owners(&self) -> bool {
        *self.is_owners.get_or_init(|| self.check_user().is_ok())
    }
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a connection a slot.
    ///
    /// # Errors
    /// `overloaded` when there is none for it, or the daemon ends.
    pub fn admit(&'static self, connection: &Arc<Connection>) -> Result<Slot> {
        let full = || Error::Overloaded("connections");
        let usable = usable_descriptors();
        let limit = usize::try_from(usable / PER_CONNECTION).unwrap_or(usize::MAX).min(CONNECTION_LIMIT);
        let owners = (limit / OWNERS_SHARE).max(1);
        let has_room = || self.lock().by_id.len() < limit && has_descriptors(&connection.stream, usable);
        let open = self.lock().by_id.len();
        if open + owners >= limit && !connection.is_owners() {
            return Err(full());
        }
        if !has_room() {
            self.end_a_strangers();
            if !has_room() {
                return Err(full());
            }
        }
        let mut open = self.lock();
        if open.closed {
            return Err(full());
        }
        open.last += 1;
        let id = open.last;
        open.by_id.insert(id, connection.clone());
        Ok(Slot { connections: self, id, connection: connection.clone() })
    }

    /// Ends the oldest connection of another user that has proven nothing, if there is one, and
    /// waits until its slot is free.
    fn end_a_strangers(&self) {
        let unproven: Vec<_> =
            self.lock().by_id.iter().filter(|(_, c)| c.is_unproven()).map(|(id, c)| (*id, c.clone())).collect();
        let Some((id, connection)) = unproven.into_iter().find(|(_, c)| !c.is_owners() && c.is_unproven()) else {
            return;
        };
        let _ = connection.stream.shutdown(Shutdown::Both);
        drop(connection);
        let deadline = Instant::now() + ENDING_TIME;
        let mut open = self.lock();
        while open.by_id.contains_key(&id) {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return;
            }
            open = self.closed.wait_timeout(open, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends all connections after their reply or after [`DRAIN_TIME`]; with `at_once`, it does not wait
    /// for those that have proven nothing.
    pub fn drain(&self, at_once: bool) {
        let deadline = Instant::now() + DRAIN_TIME;
        let mut open = self.lock();
        open.closed = true;
        while !open.by_id.is_empty() {
            let rest = deadline.saturating_duration_since(Instant::now());
            for connection in open.by_id.values() {
                if rest.is_zero() || (at_once && connection.is_unproven()) {
                    let _ = connection.stream.shutdown(Shutdown::Both);
                }
            }
            if rest.is_zero() {
                return;
            }
            open = self.closed.wait_timeout(open, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Whether more descriptors are free than are kept.
fn has_descriptors(any: &TcpStream, usable: u64) -> bool {
    // The kernel gives the lowest that is free.
    let lowest = fcntl_dupfd_cloexec(any, 0).map(|free| free.as_raw_fd() as u64);
    lowest.is_ok_and(|lowest| lowest < usable)
}

/// How many descriptors connections may use: all but those that are kept.
fn usable_descriptors() -> u64 {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::from(u32::MAX));
    limit - RESERVE.min(limit / 4)
}
