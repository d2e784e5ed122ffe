//! The public port: accepts all connections.
//!
//! The gate reads the head of a request under a deadline, applies the policy before it reads anything else,
//! reads a bounded body, and hands the request to the control plane (`control.sock`) or to the router.
//! tiny_http does not listen here itself, since it limits neither heads nor bodies nor time, a single
//! `Content-Length: 50000000000` ends the process, and it cannot stream a routed request.
//!
//! A connection has a thread while it serves a request, and for a moment after. Then it is parked: the
//! accepting thread waits for the next requests of all parked connections.
//!
//! Invariants: a refused request gets one of our errors, and its connection is closed; a client can end only
//! its own connection; a forwarded request has exactly one reading (no smuggling), because its head is
//! rewritten from the parsed one; the policy applies to each request, whatever the same connection was allowed
//! before; a connection serves another request only if the last request and its reply were complete, with
//! nothing in between.
//!
//! Sources of the format: RFC 9110, RFC 9112; the Fetch standard for `Origin` and
//! `Sec-Fetch-Site`.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use super::connections::{CONNECTION_LIMIT, Connection, Connections, DRAIN_TIME, Slot};
use super::crew::Crew;
use super::events::{Next, Subscription};
use super::exchange::Client;
use super::head::{Framing, HEAD_TIME, Head};
use super::reply::KEEP_TIME;
use super::router::Routed;
use super::{Daemon, api, reply, router};
use crate::error::{Error, Result};
use crate::framing::{ReplyHead, head_length, header_room, is_json};
use crate::system::wait::{self, Flag};
use crate::timed::Timed;
use crate::wire::{BODY_LIMIT, LAST_EVENT_HEADER, TIMEOUT_HEADER};

/// The largest head; browsers and clients stay below 8 KiB. Bytes.
const HEAD_LIMIT: usize = 16 * 1024;
/// How long the body of a control request may take: 1 MiB over loopback takes milliseconds.
const BODY_TIME: Duration = Duration::from_secs(5);
/// The size of the chunks in which replies of the control plane are copied. Bytes.
const COPY_CHUNK: usize = 64 * 1024;
/// How long a client may take to read a reply.
const REPLY_TIME: Duration = Duration::from_secs(10);
/// How long after the deadline of a request the control plane may report the timeout.
const CONTROL_GRACE: Duration = Duration::from_secs(2);
/// How long the gate reads on after its last reply: closing a socket with unread bytes resets the
/// connection, and the client would lose the reply.
const LINGER_TIME: Duration = Duration::from_millis(500);
/// How much the gate reads in that time, at most. Bytes.
const LINGER_LIMIT: u64 = 1024 * 1024;
/// How long the accepting thread may take to end: it admits one more connection at most, which may have to wait
/// for a slot.
const CLOSING_TIME: Duration = Duration::from_secs(1);
/// The pause after descriptors or memory for a connection ran out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);
/// The interval between comments on an idle event stream, which show that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// The web pages that may send requests: those of OpenWork's desktop program.
const ORIGINS: [&str; 3] = ["tauri://localhost", "http://tauri.localhost", "https://tauri.localhost"];

/// The public port.
pub struct Gate {
    listener: TcpListener,
    /// As in a `Host` header.
    port: String,
    origins: Vec<String>,
    /// Raised to end the accepting thread.
    closing: Flag,
    /// Raised once it has ended.
    closed: Flag,
    /// Raised when the daemon ends: routed streams break off.
    stop: Flag,
    connections: Connections,
    crew: Crew,
    /// Locked by the thread that waits for connections; true once the gate is closed.
    turn: Mutex<bool>,
}

impl Gate {
    /// A gate at a listening socket on 127.0.0.1; `origins` are allowed in addition to the default ones.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn new(listener: TcpListener, origins: &[String]) -> io::Result<Gate> {
        // The accepting thread waits for connections and for the end.
        listener.set_nonblocking(true)?;
        // The standard library's backlog is 128; a client beyond that retries after a second.
        rustix::net::listen(&listener, CONNECTION_LIMIT as i32)?;
        let port = listener.local_addr()?.port().to_string();
        let origins = ORIGINS.iter().map(|origin| (*origin).to_owned()).chain(origins.iter().cloned()).collect();
        let (closing, closed, stop) = (Flag::new()?, Flag::new()?, Flag::new()?);
        let connections = Connections::new(&listener, &closing)?;
        let (crew, turn) = (Crew::new(), Mutex::new(false));
        Ok(Gate { listener, port, origins, closing, closed, stop, connections, crew, turn })
    }

    /// The listening socket.
    pub fn listener(&self) -> &TcpListener {
        &self.listener
    }

    /// Serves connections until [`Gate::close`]: when connections are ready, this thread serves one, and starts
    /// threads for the others.
    pub fn serve(&'static self, daemon: &'static Daemon) {
        while self.crew.join() {
            let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
            let mut slots = Vec::new();
            while slots.is_empty() && !*turn {
                slots = self.wait(&mut turn);
            }
            let mine = slots.pop();
            for slot in slots {
                self.start(daemon, slot);
            }
            let Some(slot) = mine else { return };
            if let Err(e) = self.crew.leave(move || self.serve(daemon)) {
                no_thread(&slot, &e);
                continue;
            }
            drop(turn);
            self.attend(daemon, slot);
        }
    }

    /// Waits for events. Returns the connections to serve; sets `is_closed` when there will be no more.
    fn wait(&'static self, is_closed: &mut bool) -> Vec<Slot> {
        let ready = match self.connections.wait() {
            Ok(ready) => ready,
            Err(e) => {
                crate::log!("cannot wait for connections: {e}");
                thread::sleep(EXHAUSTED_PAUSE);
                return Vec::new();
            }
        };
        let mut slots = ready.requests;
        if ready.closing {
            *is_closed = true;
            slots.extend(self.connections.close());
            self.closed.raise();
        } else if ready.connection {
            slots.extend(self.accept());
        }
        slots
    }

    /// Accepts a connection.
    fn accept(&'static self) -> Option<Slot> {
        use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        match self.listener.accept() {
            Ok((stream, peer)) => {
                let _ = stream.set_nodelay(true);
                let connection = Arc::new(Connection::new(stream, peer));
                self.connections.admit(&connection).inspect_err(|e| refuse(&connection.stream, e)).ok()
            }
            Err(e) if matches!(e.kind(), Interrupted | ConnectionAborted | WouldBlock) => None,
            Err(e) => {
                crate::log!("cannot accept a connection: {e}");
                thread::sleep(EXHAUSTED_PAUSE);
                None
            }
        }
    }

    /// Gives a connection a thread, or refuses it.
    fn start(&'static self, daemon: &'static Daemon, slot: Slot) {
        // If no thread starts, `work` is dropped, and must not close the connection before the refusal.
        let slot = Arc::new(Mutex::new(Some(slot)));
        let take = |slot: &Mutex<Option<Slot>>| slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let taken = slot.clone();
        let work = move || {
            if let Some(slot) = take(&taken) {
                self.attend(daemon, slot);
                self.serve(daemon);
            }
        };
        if let Err(e) = Builder::new().spawn(work) {
            take(&slot).iter().for_each(|slot| no_thread(slot, &e));
        }
    }

    /// Serves a connection. A panic costs only this connection; standard error has its message.
    fn attend(&'static self, daemon: &'static Daemon, slot: Slot) {
        if catch_unwind(AssertUnwindSafe(|| self.connection(daemon, slot))).is_err() {
            crate::log!("a request failed (see above)");
        }
    }

    /// Stops accepting connections: [`Gate::serve`] ends. New connections wait in the queue of the listening
    /// socket, which stays open: no other process can listen there while `daemon.lock` names the port.
    pub fn close(&self) {
        self.closing.raise();
        wait::wait_until_readable(&self.closed, Instant::now() + CLOSING_TIME);
    }

    /// Closes the connections, each after its reply, within [`DRAIN_TIME`]. With `at_once`, does not wait for
    /// unproven connections, and ends streams.
    pub fn drain(&self, at_once: bool) {
        if at_once {
            self.stop.raise();
        }
        self.connections.drain(at_once);
        self.stop.raise();
    }

    /// Serves the requests of a connection until it ends, or is idle for a moment and is parked.
    fn connection(&'static self, daemon: &'static Daemon, mut slot: Slot) {
        let connection = slot.connection.clone();
        let mut buffer = [0; HEAD_LIMIT];
        loop {
            let patience = self.connections.patience(&slot);
            let (head_length, length) = match read_head(&connection.stream, &mut buffer, patience) {
                Ok(HeadRead::Head { head, all }) => (head, all),
                Ok(HeadRead::Nothing) => match self.connections.park(slot) {
                    Some(with_thread) => {
                        slot = with_thread;
                        continue;
                    }
                    None => return,
                },
                Ok(HeadRead::End) => return,
                Err(e) => return send(&connection.stream, &reply::error("GET", &e, None)),
            };
            let (head, rest) = buffer[..length].split_at(head_length);
            if !self.request(daemon, &connection, head, rest) {
                return;
            }
            slot.served(KEEP_TIME);
        }
    }

    /// Serves a request, whose head was read with these bytes after it. Returns whether the connection can serve
    /// another request; otherwise it was closed.
    fn request(&self, daemon: &'static Daemon, connection: &Connection, head: &[u8], rest: &[u8]) -> bool {
        let stream = &connection.stream;
        let refuse = |method: &str, e: &Error, origin| {
            send(stream, &reply::error(method, e, origin));
            false
        };
        let mut room = header_room();
        let request = match Head::parse(head, &mut room) {
            Ok(request) => request,
            Err(e) => return refuse("GET", &e, None),
        };
        let origin = match self.admissible(&request) {
            Ok(origin) => origin,
            Err(e) => return refuse(request.method, &e, None),
        };
        let keeps = request.keeps_connection(rest) && !self.connections.is_closed();
        if let (Some(origin), "OPTIONS") = (origin, request.method) {
            // A preflight has no body, and does not prove the connection.
            let keeps = keeps && request.framing == Framing::Length(0) && connection.is_proven();
            return send_whole(stream, &reply::preflight(origin, keeps), keeps);
        }
        let client = Client { connection, request: &request, rest, origin, keeps };
        let result = match request.path() {
            path if router::is_routed(path) => {
                router::route(daemon, &client, &self.stop).map(|Routed { upstream, keeps }| {
                    if !keeps {
                        finish(stream);
                    }
                    drop(upstream);
                    keeps
                })
            }
            "/events" if request.method == "GET" => connection
                .check_user()
                .and_then(|()| daemon.events.subscribe(last_event_id(&request)?))
                .map(|subscription| {
                    stream_events(stream, &subscription, origin);
                    false
                }),
            _ => self.control(daemon, &client),
        };
        result.unwrap_or_else(|e| refuse(request.method, &e, origin))
    }

    /// Refuses requests that web pages might send and clients never do. Returns the origin, if the request has
    /// one.
    fn admissible<'h>(&self, request: &Head<'h>) -> Result<Option<&'h str>> {
        let host = request.only("host")?.unwrap_or_default();
        let (name, port) = host.rsplit_once(':').unwrap_or((host, ""));
        let is_ours = ["127.0.0.1", "localhost", "[::1]"].iter().any(|ours| name.eq_ignore_ascii_case(ours));
        if !is_ours || port != self.port {
            return Err(Error::ForbiddenHost(host.to_owned()));
        }
        match request.only("origin")? {
            Some(origin) if self.origins.iter().any(|allowed| allowed == origin) => Ok(Some(origin)),
            Some(origin) => Err(Error::ForbiddenOrigin(format!("the web page {origin:?}"))),
            None => match request.only("sec-fetch-site")? {
                None | Some("none" | "same-origin") => Ok(None),
                Some(site) => Err(Error::ForbiddenOrigin(format!("a web page from elsewhere ({site})"))),
            },
        }
    }

    /// Hands a request to the control plane, and passes its reply on as it arrives. Returns whether the
    /// connection can serve another request; otherwise it was closed.
    fn control(&self, daemon: &'static Daemon, client: &Client<'_>) -> Result<bool> {
        let Client { connection, request, rest, origin, keeps } = *client;
        let is_stranger = match connection.check_user() {
            Err(Error::ForbiddenUser) if request.path() == "/health" => true,
            other => other.map(|()| false)?,
        };
        // Do not read the body of another user's request, which would take memory: `/health` needs none.
        let body = if is_stranger { Vec::new() } else { read_body(&connection.stream, request, rest)? };
        let timeout = request.only(TIMEOUT_HEADER)?;
        let timeout = timeout.filter(|_| request.path() != "/health");
        let deadline = Instant::now() + api::timeout(timeout)? + CONTROL_GRACE;
        let mut passed_on = format!(
            "{} {} HTTP/1.1\r\nHost: openwork\r\nContent-Length: {}\r\n",
            request.method,
            request.target,
            body.len()
        );
        // Unread bytes of a stranger's body may follow.
        let keeps = keeps && !is_stranger;
        let yes = |is_so: bool| is_so.then_some("yes");
        for (name, value) in [
            (TIMEOUT_HEADER, timeout),
            (api::STRANGER_HEADER, yes(is_stranger)),
            (api::KEEP_HEADER, yes(keeps)),
            (api::ORIGIN_HEADER, origin),
        ] {
            if let Some(value) = value {
                passed_on.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        passed_on.push_str("\r\n");
        // If another daemon has taken over the data directory, `control.sock` belongs to it.
        daemon.store.check_lock()?;
        let deadline = Some(deadline);
        let control = daemon.control.connect(daemon)?;
        let lost = |e: io::Error| match e.kind() {
            io::ErrorKind::TimedOut => Error::Internal("the control plane does not answer".to_owned()),
            // Every handler replies, so tiny_http had no thread to read the request.
            _ => Error::Overloaded("threads"),
        };
        let mut upstream = Timed::new(&control.stream, deadline);
        upstream.write_all(passed_on.as_bytes()).and_then(|()| upstream.write_all(&body)).map_err(lost)?;
        // When the daemon ends, do not wait for a handler that waits for opencode.
        if !wait::wait_readable(&control.stream, &self.stop, deadline).map_err(lost)?
            && !wait::wait_until_readable(&control.stream, Instant::now() + DRAIN_TIME / 2)
        {
            return Err(Error::OpencodeUnavailable("the daemon is stopping".to_owned()));
        }
        let passed = pass_reply(&mut upstream, &connection.stream, request.method).map_err(lost)?;
        if passed.is_whole {
            daemon.control.keep(control);
        }
        if !passed.keeps {
            finish(&connection.stream);
        }
        Ok(passed.keeps)
    }
}

/// The outcome of passing on a reply of the control plane.
struct Passed {
    /// The reply was a success, and ended where its framing says.
    is_whole: bool,
    /// The client has received the whole reply, and its connection can serve another request.
    keeps: bool,
}

/// Passes a reply of the control plane on as it arrives.
///
/// # Errors
/// When no reply arrives. If a reply breaks off, it is too late for an error: the connection just ends.
fn pass_reply(upstream: &mut impl Read, client: &TcpStream, method: &str) -> io::Result<Passed> {
    let mut buffer = vec![0; COPY_CHUNK];
    let mut length = 0;
    let head_length = loop {
        let count = upstream.read(&mut buffer[length..])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        length += count;
        if let Some(head_length) = head_length(&buffer[..length], 0) {
            break head_length;
        }
    };
    let mut room = header_room();
    let reply = ReplyHead::parse(&buffer[..head_length], method, &mut room)?;
    // Only our handlers send this header, not replies that tiny_http generates itself.
    let keeps = reply.header("keep-alive").is_some();
    let ReplyHead { status, mut body, .. } = reply;
    let mut belonging = head_length + body.advance(&buffer[head_length..length])?;
    let mut client = Timed::new(client, Some(Instant::now() + REPLY_TIME));
    let (mut is_taken, mut is_exact) = (true, true);
    loop {
        // Read the reply to its end even after the client has closed the connection: only then is tiny_http done.
        is_taken = is_taken && client.write_all(&buffer[..belonging]).is_ok();
        is_exact &= belonging == length;
        if body.is_done() {
            return Ok(Passed { is_whole: is_exact && status < 400, keeps: keeps && is_taken && is_exact });
        }
        length = upstream.read(&mut buffer).unwrap_or(0);
        if length == 0 {
            return Ok(Passed { is_whole: false, keeps: false });
        }
        belonging = body.advance(&buffer[..length]).unwrap_or(0);
    }
}

/// The result of [`read_head`].
enum HeadRead {
    /// A head, and perhaps more: the length of the head, and of all bytes read.
    Head { head: usize, all: usize },
    /// No byte in time.
    Nothing,
    /// The client closed the connection.
    End,
}

/// Reads a head, within [`HEAD_TIME`] of its first byte, which must arrive within `patience`.
fn read_head(stream: &TcpStream, buffer: &mut [u8; HEAD_LIMIT], patience: Duration) -> Result<HeadRead> {
    let mut deadline = Instant::now() + patience;
    let mut length: usize = 0;
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        let from = length;
        let read = match rest.is_zero() {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => stream.set_read_timeout(Some(rest)).and_then(|()| (&*stream).read(&mut buffer[length..])),
        };
        match read {
            Ok(0) => return Ok(HeadRead::End),
            Ok(count) => {
                if length == 0 {
                    deadline = Instant::now() + HEAD_TIME;
                }
                length += count;
                if let Some(head) = head_length(&buffer[..length], from) {
                    return Ok(HeadRead::Head { head, all: length });
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && length == 0 => return Ok(HeadRead::Nothing),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(Error::BadRequest(format!("the head did not come within {} s", HEAD_TIME.as_secs())));
            }
            Err(_) => return Ok(HeadRead::End),
        }
        if length == buffer.len() {
            let status = if buffer.contains(&b'\n') { 431 } else { 414 };
            return Err(Error::TooLarge { what: "head", limit: HEAD_LIMIT, status });
        }
        // A head with bare line feeds would never end.
        if buffer[from.saturating_sub(1)..length].windows(2).any(|pair| pair == b"\n\n") {
            return Err(Error::BadRequest("lines must end with CR LF".to_owned()));
        }
    }
}

/// Reads the body of a control request.
fn read_body(stream: &TcpStream, request: &Head<'_>, rest: &[u8]) -> Result<Vec<u8>> {
    let Framing::Length(length) = request.framing else { return Err(Error::LengthRequired) };
    let too_large = Error::TooLarge { what: "body", limit: BODY_LIMIT, status: 413 };
    let length = usize::try_from(length).ok().filter(|length| *length <= BODY_LIMIT).ok_or(too_large)?;
    if length == 0 {
        return Ok(Vec::new());
    }
    let content_type = request.only("content-type")?.unwrap_or_default();
    if !is_json(content_type) {
        return Err(Error::UnsupportedMediaType(content_type.to_owned()));
    }
    let mut stream = Timed::new(stream, Some(Instant::now() + BODY_TIME));
    if request.only("expect")?.is_some_and(|value| value.eq_ignore_ascii_case("100-continue")) {
        let _ = stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
    }
    let mut body = rest[..rest.len().min(length)].to_vec();
    let missing = length - body.len();
    // The buffer grows with the bytes received, not with Content-Length.
    (&mut stream).take(missing as u64).read_to_end(&mut body).map_err(|e| match e.kind() {
        io::ErrorKind::TimedOut => Error::BadRequest(format!("the body did not come within {} s", BODY_TIME.as_secs())),
        _ => Error::BadRequest(format!("the body did not come: {e}")),
    })?;
    match body.len() == length {
        true => Ok(body),
        false => Err(Error::BadRequest("the body is shorter than its Content-Length".to_owned())),
    }
}

/// Sends a whole reply and closes the connection.
fn send(stream: &TcpStream, reply: &[u8]) {
    send_whole(stream, reply, false);
}

/// Sends a whole reply, and closes the connection unless the reply keeps it. Returns whether the connection
/// can serve another request.
fn send_whole(stream: &TcpStream, reply: &[u8], keeps: bool) -> bool {
    let is_taken = Timed::new(stream, Some(Instant::now() + REPLY_TIME)).write_all(reply).is_ok();
    if is_taken && !keeps {
        finish(stream);
    }
    is_taken && keeps
}

/// Closes a connection after the last byte of a reply was written.
fn finish(stream: &TcpStream) {
    if stream.shutdown(Shutdown::Write).is_ok() {
        let timed = Timed::new(stream, Some(Instant::now() + LINGER_TIME));
        let _ = io::copy(&mut timed.take(LINGER_LIMIT), &mut io::sink());
    }
}

/// The last event that a client of `/events` has seen.
///
/// # Errors
/// `bad_request` for an invalid id.
fn last_event_id(request: &Head<'_>) -> Result<Option<u64>> {
    let Some(id) = request.only(LAST_EVENT_HEADER)?.filter(|id| !id.is_empty()) else { return Ok(None) };
    let number = id.parse::<u64>().ok().filter(|id| *id < u64::MAX);
    number
        .map(Some)
        .ok_or_else(|| Error::BadRequest(format!("{LAST_EVENT_HEADER} must be the id of an event, not {id:?}")))
}

/// `GET /events`: server-sent events until the client hangs up, does not read, or the daemon stops.
fn stream_events(stream: &TcpStream, events: &Subscription, origin: Option<&str>) {
    let mut text: Arc<str> = reply::event_stream(origin).into();
    while Timed::new(stream, Some(Instant::now() + REPLY_TIME)).write_all(text.as_bytes()).is_ok() {
        text = match events.next(stream, HEARTBEAT) {
            Next::Event(event) => event,
            Next::Quiet => ": still here\n\n".into(),
            Next::HungUp => return,
            Next::Over => return finish(stream),
        };
    }
}

/// Refuses a connection that gets no thread.
fn no_thread(slot: &Slot, e: &io::Error) {
    crate::log!("cannot start a thread for a connection: {e}");
    refuse(&slot.connection.stream, &Error::Overloaded("threads"));
}

/// Refuses a connection without reading from it or blocking.
fn refuse(stream: &TcpStream, error: &Error) {
    let _ = stream.set_nonblocking(true);
    let _ = (&*stream).write(&reply::error("GET", error, None));
    let _ = stream.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection accepted later would be lost when the process becomes its successor.
    #[test]
    fn close_returns_once_no_more_connections_are_accepted() {
        let gate = Gate::new(TcpListener::bind("127.0.0.1:0").unwrap(), &[]).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                // Accept here: the accepting thread may be busy.
                assert!(wait::wait_until_readable(&gate.closing, Instant::now() + Duration::from_secs(60)));
                thread::sleep(CLOSING_TIME / 10);
                gate.closed.raise();
            });
            gate.close();
            assert!(gate.closed.is_raised());
        });
    }
}
