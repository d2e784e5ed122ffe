//! The open connections of the public port: how many there may be, which of them wait for a request,
//! and which go first.
//!
//! Invariants: the number of connections is bounded by [`CONNECTION_LIMIT`] and by the descriptors
//! the process may have; connections of other users never take the last slots; a connection of
//! another user that has proven nothing makes room for one of the owner's; a connection that waits
//! for a request has no thread, and one that has served a request before makes room for any other.
//!
//! The kernel knows whose a connection is, but each look costs two calls to it: for the choice of the
//! connections that go first it is asked only when slots are short.

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

/// The most connections at once: each may be a thread and up to [`PER_CONNECTION`] descriptors.
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
/// How long a thread waits for the next request before its connection waits without it: clients that
/// ask one thing after another do so within this time, and a thread costs more than a request.
const BETWEEN: Duration = Duration::from_millis(20);
/// The same while more than half of the slots are taken, since only connections without a thread make
/// room for others: enough to read what is there.
const BETWEEN_MANY: Duration = Duration::from_millis(1);
/// How long a connection that is ended may take to give its slot back: its thread only has to wake.
const ENDING_TIME: Duration = Duration::from_millis(250);

/// The numbers under which [`Connections::watch`] knows what is no connection; connections have higher
/// ones.
const LISTENER: u64 = 0;
const CLOSING: u64 = 1;
const SOONER: u64 = 2;

/// The open connections.
pub struct Connections {
    open: Mutex<Open>,
    closed: Condvar,
    /// The connections that wait for a request, and what else the thread that accepts waits for.
    watch: Watch,
    /// Raised when that thread would wake too late for a connection that waits.
    sooner: Flag,
}

struct Open {
    /// The number of the last connection.
    last: u64,
    /// By number, which is the order in which they were opened.
    by_id: BTreeMap<u64, Entry>,
    /// Those that wait for a request without a thread, by the time at which they are closed.
    waiting: BTreeMap<(Instant, u64), Slot>,
    /// How many there may be, as computed for the last one that was accepted.
    limit: usize,
    /// When the thread that accepts wakes by itself.
    wakes_at: Option<Instant>,
    /// The daemon ends: no more connections are taken in, and none waits for a request.
    closed: bool,
}

struct Entry {
    connection: Arc<Connection>,
    /// With the number, the key in [`Open::waiting`].
    waits_until: Option<Instant>,
}

impl Open {
    /// Ends the wait of a connection.
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
    /// Whether the client has proven that the connection is worth its slot: by being the owner's, or with
    /// credentials or a ticket. A request alone proves nothing, since every user can ask `/health`.
    proven: AtomicBool,
    /// Set to true only by the kernel's word.
    is_owners: OnceLock<bool>,
}

/// The slot of a connection. Dropping it ends the connection, also when serving it panics. Not to be
/// dropped under the lock of [`Connections`].
pub struct Slot {
    connections: &'static Connections,
    id: u64,
    /// Its connection.
    pub connection: Arc<Connection>,
    /// When the connection is closed if no request has begun to come.
    waits_until: Instant,
    /// The connection has served a request, so its client expects that it may be closed.
    has_served: bool,
}

impl Slot {
    /// Notes that the connection has served a request, and waits this long for the next one.
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

/// What a client has sent while its connection waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Nothing,
    /// The first bytes of a request.
    Bytes,
    /// Its end of the connection.
    End,
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

    /// Whether the connection is worth its slot.
    pub fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Relaxed)
    }

    /// Requires that the client belongs to the user of the daemon, or to root.
    ///
    /// The kernel is asked until it has said yes. What it says is about the socket at the other end,
    /// from which all bytes of this connection come, so a yes holds for as long as the connection lives.
    ///
    /// # Errors
    /// `forbidden_user`, also when the client has gone; `overloaded` without a descriptor for the look.
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

    /// The same for the choice of the connections that go first: also a no is remembered.
    fn is_owners(&self) -> bool {
        match self.is_owners.get() {
            Some(is_owners) => *is_owners,
            None => {
                let is_owners = self.check_user().is_ok();
                *self.is_owners.get_or_init(|| is_owners)
            }
        }
    }

    /// What the client has sent that was not read.
    fn sent(&self) -> Sent {
        match recv(&self.stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((1.., _)) => Sent::Bytes,
            Err(Errno::AGAIN | Errno::INTR) => Sent::Nothing,
            Ok((0, _)) | Err(_) => Sent::End,
        }
    }
}

/// What [`Connections::wait`] has waited for.
#[derive(Default)]
pub struct Ready {
    /// Connections on which a request has begun to come.
    pub requests: Vec<Slot>,
    /// A connection can be accepted.
    pub connection: bool,
    /// The flag is raised.
    pub closing: bool,
}

impl Connections {
    /// No connections yet. `listener` is what they are accepted from, and `closing` ends that.
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
    /// `overloaded` when there is none for it.
    pub fn admit(&'static self, connection: &Arc<Connection>) -> Result<Slot> {
        let full = || Error::Overloaded("connections");
        let usable = usable_descriptors();
        let limit = usize::try_from(usable / PER_CONNECTION).unwrap_or(usize::MAX).min(CONNECTION_LIMIT);
        let owners = (limit / OWNERS_SHARE).max(1);
        let open = || self.lock().by_id.len();
        let has_room = || open() < limit && has_descriptors(&connection.stream, usable);
        if open() + owners >= limit && !connection.is_owners() && !self.end_one_that_waits() {
            return Err(full());
        }
        if !has_room() {
            if !self.end_one_that_waits() {
                self.end_a_strangers();
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

    /// How long the thread of a connection waits for a request, before the connection waits without it.
    pub fn patience(&self, slot: &Slot) -> Duration {
        let open = self.lock();
        match (open.closed, open.by_id.len() * 2 > open.limit) {
            // One look: the client expects that an idle connection is closed.
            (true, _) if slot.has_served => BETWEEN_MANY,
            // A client that has just connected expects a reply, and nothing waits without a thread any more.
            (true, _) => slot.waits_until.saturating_duration_since(Instant::now()),
            (false, true) => BETWEEN_MANY,
            (false, false) => BETWEEN,
        }
    }

    /// Lets a connection wait for a request without a thread: until one begins to come, or until the
    /// time is over for which the slot says that it waits. Returns a connection that can only wait with a
    /// thread, since the daemon ends.
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

    /// Waits for something to do, and closes the connections that have waited for too long.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn wait(&self) -> io::Result<Ready> {
        let mut ready = Ready { requests: self.take_overdue(), ..Ready::default() };
        // What came at the last moment is not kept waiting.
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
                    if slot.connection.sent() != Sent::End {
                        ready.requests.push(slot);
                    }
                }
            }
        }
        Ok(ready)
    }

    /// Closes the connections that have waited for too long. Returns those on which a request has just
    /// begun to come.
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
        self.close_but(overdue.into_values(), |slot| slot.connection.sent() == Sent::Bytes)
    }

    /// Closes connections that have waited, and returns the others.
    fn close_but(&self, slots: impl Iterator<Item = Slot>, stays: impl Fn(&Slot) -> bool) -> Vec<Slot> {
        slots.inspect(|slot| self.watch.remove(&slot.connection.stream)).filter(stays).collect()
    }

    /// Closes the connection that has waited longest for another request; false when there is none.
    fn end_one_that_waits(&self) -> bool {
        let mut open = self.lock();
        let mut waiting = open.waiting.iter().filter(|(_, slot)| slot.has_served);
        let found = waiting.find(|(_, slot)| slot.connection.sent() != Sent::Bytes).map(|((_, id), _)| *id);
        let slot = found.and_then(|id| open.take(id));
        drop(open);
        slot.is_some()
    }

    /// Ends the oldest connection of another user that has proven nothing, if there is one, and
    /// waits until its slot is free.
    fn end_a_strangers(&self) {
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

    /// Whether the daemon ends, so that a connection is closed after its reply.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Takes no more connections in, and closes the idle ones. Returns those whose clients expect a reply:
    /// a request has begun to come, or the connection is new.
    pub fn close(&self) -> Vec<Slot> {
        let mut open = self.lock();
        open.closed = true;
        let waiting = std::mem::take(&mut open.waiting);
        for entry in open.by_id.values_mut() {
            entry.waits_until = None;
        }
        drop(open);
        self.close_but(waiting.into_values(), |slot| match slot.connection.sent() {
            Sent::Bytes => true,
            Sent::Nothing => !slot.has_served,
            Sent::End => false,
        })
    }

    /// Ends all connections after their reply or after [`DRAIN_TIME`]; with `at_once`, it does not wait
    /// for those that have proven nothing. [`Connections::close`] comes first.
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
