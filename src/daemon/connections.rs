//! The open connections of the public port: their limit, the idle ones that wait for a request, and the
//! choice of connections to close when slots run short.
//!
//! Invariants: [`CONNECTION_LIMIT`] and the descriptors of the process limit the number of connections; other
//! users never get the last slots; an unproven connection of another user makes room for one of the owner;
//! an idle connection has no thread; an idle connection that has served a request makes room for any other.
//!
//! The kernel knows which user a connection belongs to, but each query takes two system calls, so the choice
//! of connections to close makes it only when slots run short.

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::net::{RecvFlags, recv};
use rustix::process::{Resource, getrlimit};

use super::head::HEAD_TIME;
use crate::error::{Error, Result};
use crate::system::socket;
use crate::system::wait::{Flag, Watch};

/// The most connections at once: each may take a thread and up to [`PER_CONNECTION`] descriptors.
pub const CONNECTION_LIMIT: usize = 1024;
/// One slot in this many is reserved for the owner: 64 of 1,024 are enough for all clients of one person.
/// At least one is reserved when descriptors are few.
const OWNERS_SHARE: usize = 16;
/// The most descriptors per connection: its own, and three for a connection to the control plane, whose end
/// tiny_http holds twice. A connection to opencode, or an event stream, needs fewer.
const PER_CONNECTION: u64 = 4;
/// The descriptors reserved for everything else: some 20 of the daemon itself, and those that tiny_http has
/// yet to close after a slot is free. tiny_http does not survive running out of descriptors.
const RESERVE: u64 = 64;
/// How long requests in progress may take when the daemon stops: their replies are short.
pub const DRAIN_TIME: Duration = Duration::from_secs(1);
/// How long a thread waits for the next request before it parks its connection: most clients that send
/// several requests send the next within this time, and starting a thread costs more than a request.
const PARK_DELAY: Duration = Duration::from_millis(20);
/// The same while more than half of the slots are taken: only parked connections can make room for others.
/// Long enough to read a request that has arrived.
const PARK_DELAY_WHEN_FULL: Duration = Duration::from_millis(1);
/// How long a connection that was shut down may take to free its slot: its thread only has to wake.
const ENDING_TIME: Duration = Duration::from_millis(250);

/// Numbers for [`Connections::watch`] other than those of connections, which are higher.
const LISTENER: u64 = 0;
const CLOSING: u64 = 1;
const SOONER: u64 = 2;

/// The open connections.
pub struct Connections {
    open: Mutex<Open>,
    closed: Condvar,
    /// Everything that the accepting thread waits for: parked connections, the listener, the flags.
    watch: Watch,
    /// Raised to wake the accepting thread for a connection that is due earlier than its next wake-up.
    sooner: Flag,
}

struct Open {
    /// The number of the newest connection.
    last: u64,
    /// All connections by number, so in the order of their arrival.
    by_id: BTreeMap<u64, Entry>,
    /// The parked connections, by the time when they are closed.
    waiting: BTreeMap<(Instant, u64), Slot>,
    /// The limit of connections, as computed for the newest one.
    limit: usize,
    /// When the accepting thread wakes next.
    wakes_at: Option<Instant>,
    /// The daemon is ending: it admits no connection and parks none.
    closed: bool,
}

struct Entry {
    connection: Arc<Connection>,
    /// Set while the connection is parked: with its number, the key in [`Open::waiting`].
    waits_until: Option<Instant>,
}

impl Open {
    /// Takes a parked connection out.
    fn take(&mut self, id: u64) -> Option<Slot> {
        let until = self.by_id.get_mut(&id)?.waits_until.take()?;
        self.waiting.remove(&(until, id))
    }
}

/// One connection.
pub struct Connection {
    /// The socket.
    pub stream: TcpStream,
    peer: SocketAddr,
    /// Whether the connection is worth its slot: it belongs to the owner, or sent credentials or an accepted
    /// ticket. A request alone proves nothing, since every user may call `/health`.
    proven: AtomicBool,
    /// Whether the connection belongs to the owner; set to true only after the kernel has confirmed it.
    is_owners: OnceLock<bool>,
}

/// The slot of a connection. Dropping it closes the connection, even when serving it panics. Do not drop it
/// while holding the lock of [`Connections`].
pub struct Slot {
    connections: &'static Connections,
    id: u64,
    /// The connection.
    pub connection: Arc<Connection>,
    /// When the connection is closed unless a request arrives.
    waits_until: Instant,
    /// The connection has served a request, so its client expects that it may be closed.
    has_served: bool,
}

impl Slot {
    /// Records that the connection has served a request, and may be idle for `keep_time`.
    pub fn served(&mut self, keep_time: Duration) {
        self.has_served = true;
        self.waits_until = Instant::now() + keep_time;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let _ = self.connection.stream.shutdown(Shutdown::Both);
        self.connections.lock().by_id.remove(&self.id);
        self.connections.closed.notify_all();
    }
}

/// What an idle connection has received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Received {
    Nothing,
    /// The first bytes of a request.
    Bytes,
    /// The client closed the connection.
    End,
}

impl Connection {
    /// An accepted connection.
    pub fn new(stream: TcpStream, peer: SocketAddr) -> Connection {
        Connection { stream, peer, proven: AtomicBool::new(false), is_owners: OnceLock::new() }
    }

    /// Records that the connection is worth its slot.
    pub fn prove(&self) {
        self.proven.store(true, Ordering::Relaxed);
    }

    /// Whether the connection is worth its slot.
    pub fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Relaxed)
    }

    /// Requires that the client belongs to the daemon's user, or to root.
    ///
    /// A confirmation by the kernel is cached: it is about the socket at the other end, the source of all
    /// bytes of this connection. A refusal is not.
    ///
    /// # Errors
    /// `forbidden_user`, also when the client has closed the connection; `overloaded` when descriptors run
    /// out.
    pub fn check_user(&self) -> Result<()> {
        if self.is_owners.get() == Some(&true) {
            return Ok(());
        }
        match socket::peer_user(&self.stream, self.peer) {
            Ok(Some(user)) if user == 0 || user == rustix::process::geteuid().as_raw() => {
                self.prove();
                let _ = self.is_owners.set(true);
                Ok(())
            }
            Ok(Some(_) | None) => Err(Error::ForbiddenUser),
            Err(_) => Err(Error::Overloaded("connections")),
        }
    }

    /// The same for the choice of connections to close, with refusals cached too.
    fn is_owners(&self) -> bool {
        match self.is_owners.get() {
            Some(is_owners) => *is_owners,
            None => {
                let is_owners = self.check_user().is_ok();
                *self.is_owners.get_or_init(|| is_owners)
            }
        }
    }

    /// Whether the client has sent unread bytes, or has closed the connection.
    fn received(&self) -> Received {
        match recv(&self.stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((1.., _)) => Received::Bytes,
            Err(Errno::AGAIN | Errno::INTR) => Received::Nothing,
            Ok((0, _)) | Err(_) => Received::End,
        }
    }
}

/// The result of [`Connections::wait`].
#[derive(Default)]
pub struct Ready {
    /// Connections that have received the beginning of a request.
    pub requests: Vec<Slot>,
    /// A connection can be accepted.
    pub connection: bool,
    /// The flag for the end is raised.
    pub closing: bool,
}

impl Connections {
    /// No connections yet. `listener` accepts them until `closing` is raised.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn new(listener: &TcpListener, closing: &Flag) -> io::Result<Connections> {
        let (watch, sooner) = (Watch::new()?, Flag::new()?);
        watch.add(listener, LISTENER)?;
        watch.add(closing, CLOSING)?;
        watch.add(&sooner, SOONER)?;
        let open = Open {
            last: SOONER,
            by_id: BTreeMap::new(),
            waiting: BTreeMap::new(),
            limit: CONNECTION_LIMIT,
            wakes_at: None,
            closed: false,
        };
        Ok(Connections { open: Mutex::new(open), closed: Condvar::new(), watch, sooner })
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a connection a slot.
    ///
    /// # Errors
    /// `overloaded` when no slot is free and none can be freed.
    pub fn admit(&'static self, connection: &Arc<Connection>) -> Result<Slot> {
        let full = || Error::Overloaded("connections");
        let usable = usable_descriptors();
        let limit = usize::try_from(usable / PER_CONNECTION).unwrap_or(usize::MAX).min(CONNECTION_LIMIT);
        let owners = (limit / OWNERS_SHARE).max(1);
        let open = || self.lock().by_id.len();
        let has_room = || open() < limit && has_descriptors(&connection.stream, usable);
        if open() + owners >= limit && !connection.is_owners() && !self.close_idle() {
            return Err(full());
        }
        if !has_room() {
            if !self.close_idle() {
                self.close_unproven();
            }
            if !has_room() {
                return Err(full());
            }
        }
        let mut open = self.lock();
        open.limit = limit;
        open.last += 1;
        let id = open.last;
        open.by_id.insert(id, Entry { connection: connection.clone(), waits_until: None });
        let waits_until = Instant::now() + HEAD_TIME;
        Ok(Slot { connections: self, id, connection: connection.clone(), waits_until, has_served: false })
    }

    /// How long the thread of a connection waits for a request before it parks the connection.
    pub fn patience(&self, slot: &Slot) -> Duration {
        let open = self.lock();
        match (open.closed, open.by_id.len() * 2 > open.limit) {
            // Check once: the client expects that an idle connection may be closed.
            (true, _) if slot.has_served => PARK_DELAY_WHEN_FULL,
            // A client that has just connected expects a reply, and connections are no longer parked.
            (true, _) => slot.waits_until.saturating_duration_since(Instant::now()),
            (false, true) => PARK_DELAY_WHEN_FULL,
            (false, false) => PARK_DELAY,
        }
    }

    /// Parks a connection: it waits for a request without a thread, until the slot's time is over. While the
    /// daemon is ending, returns a connection that still expects a reply, for its thread to wait.
    pub fn park(&self, slot: Slot) -> Option<Slot> {
        let mut open = self.lock();
        if open.closed {
            drop(open);
            return Some(slot).filter(|slot| !slot.has_served && slot.waits_until > Instant::now());
        }
        if self.watch.add(&slot.connection.stream, slot.id).is_err() {
            drop(open);
            return None;
        }
        let until = slot.waits_until;
        if let Some(entry) = open.by_id.get_mut(&slot.id) {
            entry.waits_until = Some(until);
        }
        let is_sooner = open.wakes_at.is_none_or(|wakes_at| until < wakes_at);
        open.waiting.insert((until, slot.id), slot);
        if is_sooner {
            open.wakes_at = Some(until);
            self.sooner.raise();
        }
        None
    }

    /// Waits for the next event, and closes the connections that have been idle for too long.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn wait(&self) -> io::Result<Ready> {
        let mut ready = Ready { requests: self.take_overdue(), ..Ready::default() };
        // Requests that arrived at the last moment do not wait any longer.
        let deadline = if ready.requests.is_empty() { self.lock().wakes_at } else { Some(Instant::now()) };
        for number in self.watch.wait(deadline)? {
            match number {
                LISTENER => ready.connection = true,
                CLOSING => ready.closing = true,
                SOONER => self.sooner.lower(),
                id => {
                    let slot = self.lock().take(id);
                    let Some(slot) = slot else { continue };
                    self.watch.remove(&slot.connection.stream);
                    if slot.connection.received() != Received::End {
                        ready.requests.push(slot);
                    }
                }
            }
        }
        Ok(ready)
    }

    /// Closes the connections that have been idle for too long, and returns those that have just received a
    /// request.
    fn take_overdue(&self) -> Vec<Slot> {
        let mut open = self.lock();
        let later = open.waiting.split_off(&(Instant::now(), 0));
        let overdue = std::mem::replace(&mut open.waiting, later);
        for (_, id) in overdue.keys() {
            if let Some(entry) = open.by_id.get_mut(id) {
                entry.waits_until = None;
            }
        }
        open.wakes_at = open.waiting.first_key_value().map(|((until, _), _)| *until);
        drop(open);
        self.close_except(overdue.into_values(), |slot| slot.connection.received() == Received::Bytes)
    }

    /// Closes parked connections, except those for which `stays` holds, which it returns.
    fn close_except(&self, slots: impl Iterator<Item = Slot>, stays: impl Fn(&Slot) -> bool) -> Vec<Slot> {
        slots.inspect(|slot| self.watch.remove(&slot.connection.stream)).filter(stays).collect()
    }

    /// Closes the parked connection that is due first, of those that have served a request; false when there
    /// is none.
    fn close_idle(&self) -> bool {
        let mut open = self.lock();
        let mut waiting = open.waiting.iter().filter(|(_, slot)| slot.has_served);
        let found = waiting.find(|(_, slot)| slot.connection.received() != Received::Bytes).map(|((_, id), _)| *id);
        let slot = found.and_then(|id| open.take(id));
        drop(open);
        slot.is_some()
    }

    /// Closes the oldest unproven connection of another user, if there is one, and waits until its slot is
    /// free.
    fn close_unproven(&self) {
        let unproven: Vec<_> = {
            let open = self.lock();
            let all = open.by_id.iter().map(|(id, entry)| (*id, &entry.connection));
            all.filter(|(_, c)| !c.is_proven()).map(|(id, c)| (id, c.clone())).collect()
        };
        let found = unproven.into_iter().find(|(_, c)| !c.is_owners() && !c.is_proven());
        let Some((id, connection)) = found else { return };
        let slot = self.lock().take(id);
        if slot.is_some() {
            return drop(slot);
        }
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

    /// Whether the daemon is ending: connections are closed after their reply.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Stops admitting connections, and closes the idle ones. Returns those whose clients expect a reply: a
    /// request has begun to arrive, or the connection is new.
    pub fn close(&self) -> Vec<Slot> {
        let mut open = self.lock();
        open.closed = true;
        let waiting = std::mem::take(&mut open.waiting);
        for entry in open.by_id.values_mut() {
            entry.waits_until = None;
        }
        drop(open);
        self.close_except(waiting.into_values(), |slot| match slot.connection.received() {
            Received::Bytes => true,
            Received::Nothing => !slot.has_served,
            Received::End => false,
        })
    }

    /// Closes all connections after their reply, or after [`DRAIN_TIME`]; with `at_once`, closes unproven ones
    /// without waiting. Call [`Connections::close`] first.
    pub fn drain(&self, at_once: bool) {
        let deadline = Instant::now() + DRAIN_TIME;
        let mut open = self.lock();
        while !open.by_id.is_empty() {
            let rest = deadline.saturating_duration_since(Instant::now());
            for Entry { connection, .. } in open.by_id.values() {
                if rest.is_zero() || (at_once && !connection.is_proven()) {
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

/// Whether more descriptors are free than are reserved.
fn has_descriptors(any: &TcpStream, usable: u64) -> bool {
    // The kernel returns the lowest free descriptor.
    let lowest = fcntl_dupfd_cloexec(any, 0).map(|free| free.as_raw_fd() as u64);
    lowest.is_ok_and(|lowest| lowest < usable)
}

/// How many descriptors connections may use: all but the reserved ones.
fn usable_descriptors() -> u64 {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::from(u32::MAX));
    limit - RESERVE.min(limit / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_wait_for_less_once_half_of_the_slots_are_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let closing = Flag::new().unwrap();
        let connections: &'static Connections = Box::leak(Box::new(Connections::new(&listener, &closing).unwrap()));
        let mut clients = Vec::new();
        let mut admit = || {
            clients.push(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
            let (stream, peer) = listener.accept().unwrap();
            connections.admit(&Arc::new(Connection::new(stream, peer))).unwrap()
        };
        let (first, mut second, _third) = (admit(), admit(), admit());
        connections.lock().limit = 6;
        assert_eq!(connections.patience(&first), PARK_DELAY);
        connections.lock().limit = 5;
        assert_eq!(connections.patience(&first), PARK_DELAY_WHEN_FULL);
        // The daemon ends: the client of a new connection still expects a reply, that of an idle one does not.
        assert_eq!(connections.close().len(), 0);
        assert!(connections.patience(&first) > PARK_DELAY);
        second.served(HEAD_TIME);
        assert_eq!(connections.patience(&second), PARK_DELAY_WHEN_FULL);
    }
}
