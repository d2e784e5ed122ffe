//! The public port: every connection comes in here.
//!
//! The gate reads the head under a deadline, refuses what the policy refuses before anything else is
//! read, reads a bounded body, and hands the request to the control plane (`control.sock`) or to the
//! router. Why tiny_http does not listen here itself: it bounds neither heads nor bodies nor time, a
//! single `Content-Length: 50000000000` ends the process, and it cannot stream a routed call.
//!
//! Invariants: a refused request is answered with one of our errors and its connection is closed;
//! nothing a client sends ends more than its own connection; a request that is passed on has exactly
//! one reading (no smuggling), because its head is written anew from the parsed one.
//!
//! Sources of the format: RFC 9110, RFC 9112; the Fetch standard for `Origin` and
//! `Sec-Fetch-Site`.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use super::connections::{CONNECTION_LIMIT, Connection, Connections, DRAIN_TIME};
use super::events::{Next, Subscription};
use super::head::{Framing, HEAD_TIME, HEADER_LIMIT, Head};
use super::{Daemon, api, exchange, reply, router};
use crate::error::{Error, Result};
use crate::framing::is_json;
use crate::system::wait::{self, Flag};
use crate::timed::Timed;
use crate::wire::{BODY_LIMIT, LAST_EVENT_HEADER, TIMEOUT_HEADER};

/// The largest head; browsers and clients stay below 8 KiB. Bytes.
const HEAD_LIMIT: usize = 16 * 1024;
/// How long the body of a control request may take: 1 MiB over loopback needs milliseconds.
const BODY_TIME: Duration = Duration::from_secs(5);
/// How much of a reply of the control plane is passed on at once. Bytes.
const PIECE: usize = 64 * 1024;
/// How long a client may take to read a reply.
const REPLY_TIME: Duration = Duration::from_secs(10);
/// How much longer than the deadline of a request the control plane may take to report it.
const CONTROL_GRACE: Duration = Duration::from_secs(2);
/// How long the gate goes on reading after its reply: closing a socket with unread bytes resets the
/// connection, and the client would lose the reply.
const LINGER_TIME: Duration = Duration::from_millis(500);
/// How much the gate reads in that time. Bytes.
const LINGER_LIMIT: u64 = 1024 * 1024;
/// How long the thread that accepts may take to end. It takes in one more connection at most, which
/// may have to wait for a slot.
const CLOSING_TIME: Duration = Duration::from_secs(1);
/// The pause when descriptors or memory for a connection are lacking: until some are free again.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);
/// How often an event stream shows that it is alive while nothing happens.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// The web pages that may send requests: those of OpenWork's desktop program.
const ORIGINS: [&str; 3] = ["tauri://localhost", "http://tauri.localhost", "https://tauri.localhost"];

/// The public port.
pub struct Gate {
    listener: TcpListener,
    port: u16,
    origins: Vec<String>,
    /// Raised when no more connections are to be accepted.
    closing: Flag,
    /// Raised when no more connections are accepted.
    closed: Flag,
    /// Raised when the daemon ends: routed streams break off.
    stop: Flag,
    connections: Connections,
}

impl Gate {
    /// A gate at a listening socket on 127.0.0.1; `origins` are allowed beside the usual ones.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn new(listener: TcpListener, origins: &[String]) -> io::Result<Gate> {
        // The thread that accepts waits for connections and for the end.
        listener.set_nonblocking(true)?;
        // The standard library asks for 128; a client beyond that waits a second to try again.
        rustix::net::listen(&listener, CONNECTION_LIMIT as i32)?;
        let port = listener.local_addr()?.port();
        let origins = ORIGINS.iter().map(|origin| (*origin).to_owned()).chain(origins.iter().cloned()).collect();
        let (closing, closed, stop) = (Flag::new()?, Flag::new()?, Flag::new()?);
        Ok(Gate { listener, port, origins, closing, closed, stop, connections: Connections::default() })
    }

    /// The listening socket.
    pub fn listener(&self) -> &TcpListener {
        &self.listener
    }

    /// Accepts connections until [`Gate::close`], and gives each a thread.
    pub fn serve(&'static self, daemon: &'static Daemon) {
        use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        loop {
            let accepted = match wait::wait_readable(&self.listener, &self.closing, None) {
                Ok(true) => self.listener.accept(),
                Ok(false) => return self.closed.raise(),
                Err(e) => Err(e),
            };
            match accepted {
                Ok((stream, peer)) => self.take(daemon, stream, peer),
                Err(e) if matches!(e.kind(), Interrupted | ConnectionAborted | WouldBlock) => {}
                Err(e) => {
                    crate::log!("cannot accept a connection: {e}");
                    thread::sleep(EXHAUSTED_PAUSE);
                }
            }
        }
    }

    /// Gives a connection a thread, or refuses it.
    fn take(&'static self, daemon: &'static Daemon, stream: TcpStream, peer: SocketAddr) {
        let connection = Arc::new(Connection::new(stream, peer));
        let slot = match self.connections.admit(&connection) {
            Ok(slot) => Arc::new(slot),
            // The daemon ends: a connection that comes so late is closed as if it had not been accepted.
            Err(_) if self.stop.is_raised() => return,
            Err(e) => return refuse(&connection.stream, &e),
        };
        // Without a thread the work is dropped, and must not end the connection before the refusal.
        let (kept, refused) = (slot.clone(), connection.clone());
        let work = move || {
            let _slot = slot;
            // A panic costs only this connection; standard error has its message.
            if catch_unwind(AssertUnwindSafe(|| self.connection(daemon, &connection))).is_err() {
                crate::log!("a request failed (see above)");
            }
        };
        if let Err(e) = Builder::new().spawn(work) {
            crate::log!("cannot start a thread for a connection: {e}");
            refuse(&refused.stream, &Error::Overloaded("threads"));
        }
        drop(kept);
    }

    /// Accepts no more connections: [`Gate::serve`] ends. Connections that come wait at the listening
    /// socket, which stays open: nobody else can listen there while `daemon.lock` names it.
    pub fn close(&self) {
        self.closing.raise();
        wait::wait_until_readable(&self.closed, Instant::now() + CLOSING_TIME);
    }

    /// Ends the connections, each after its reply, but within [`DRAIN_TIME`]. With `at_once`, those
    /// whose request has not come are not waited for, and streams break off.
    pub fn drain(&self, at_once: bool) {
        if at_once {
            self.stop.raise();
        }
        self.connections.drain(at_once);
        self.stop.raise();
    }

    /// Serves a connection, which is one request.
    fn connection(&self, daemon: &Daemon, connection: &Connection) {
        let stream = &connection.stream;
        let _ = stream.set_nodelay(true);
        let mut buffer = [0; HEAD_LIMIT];
        let (head_length, length) = match read_head(stream, &mut buffer) {
            Ok(Some(lengths)) => lengths,
            Ok(None) => return,
            Err(e) => return send(stream, &reply::error("GET", &e, None)),
        };
        let (head, rest) = buffer[..length].split_at(head_length);
        let mut headers = [httparse::EMPTY_HEADER; HEADER_LIMIT];
        let request = match Head::parse(head, &mut headers) {
            Ok(request) => request,
            Err(e) => return send(stream, &reply::error("GET", &e, None)),
        };
        let origin = match self.admissible(&request) {
            Ok(origin) => origin,
            Err(e) => return send(stream, &reply::error(request.method, &e, None)),
        };
        if let (Some(origin), "OPTIONS") = (origin, request.method) {
            return send(stream, &reply::preflight(origin));
        }
        let result = match request.path() {
            path if router::is_routed(path) => {
                let routed = router::route(
                    daemon,
                    &exchange::Client { connection, request: &request, rest, origin },
                    &self.stop,
                );
                let _ = stream.set_nonblocking(false);
                routed.map(|upstream| {
                    finish(stream);
                    drop(upstream);
                })
            }
            "/events" if request.method == "GET" => connection
                .check_user()
                .and_then(|()| daemon.events.subscribe(last_event_id(&request)?))
                .map(|subscription| stream_events(stream, &subscription, origin)),
            _ => self.control(daemon, connection, &request, rest, origin),
        };
        if let Err(e) = result {
            send(stream, &reply::error(request.method, &e, origin));
        }
    }

    /// Refuses requests that no client of ours sends and a web page might. Returns the origin, if
    /// there is one.
    fn admissible<'h>(&self, request: &Head<'h>) -> Result<Option<&'h str>> {
        let host = request.only("host")?.unwrap_or_default();
        let (name, port) = host.rsplit_once(':').unwrap_or((host, ""));
        let is_ours = ["127.0.0.1", "localhost", "[::1]"].iter().any(|ours| name.eq_ignore_ascii_case(ours));
        if !is_ours || port != self.port.to_string() {
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

    /// Hands a request to the control plane, and passes its reply on as it comes.
    fn control(
        &self,
        daemon: &Daemon,
        connection: &Connection,
        request: &Head<'_>,
        rest: &[u8],
        origin: Option<&str>,
    ) -> Result<()> {
        let is_stranger = match connection.check_user() {
            Err(Error::ForbiddenUser) if request.path() == "/health" => true,
            other => other.map(|()| false)?,
        };
        // The body of another user's request would take memory, and `/health` needs none.
        let body = if is_stranger { Vec::new() } else { read_body(&connection.stream, request, rest)? };
        let timeout = request.only(TIMEOUT_HEADER)?;
        let timeout = timeout.filter(|_| request.path() != "/health");
        let deadline = Instant::now() + api::timeout(timeout)? + CONTROL_GRACE;
        let mut passed_on = format!(
            "{} {} HTTP/1.1\r\nHost: openwork\r\nConnection: close\r\nContent-Length: {}\r\n",
            request.method,
            request.target,
            body.len()
        );
        let stranger = is_stranger.then_some("yes");
        for (name, value) in [(TIMEOUT_HEADER, timeout), (api::STRANGER_HEADER, stranger), (api::ORIGIN_HEADER, origin)]
        {
            if let Some(value) = value {
                passed_on.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        passed_on.push_str("\r\n");
        // Behind a path that another daemon has taken over, the socket is the other one's too.
        daemon.store.check_lock()?;
        let mut upstream = Timed::new(daemon.control.connect()?, Some(deadline));
        let lost = |e: io::Error| match e.kind() {
            io::ErrorKind::TimedOut => Error::Internal("the control plane does not answer".to_owned()),
            // Every handler replies: tiny_http had no thread to read the request with.
            _ => Error::Overloaded("threads"),
        };
        upstream.write_all(passed_on.as_bytes()).and_then(|()| upstream.write_all(&body)).map_err(lost)?;
        // The end of the daemon does not wait for a handler that waits for opencode.
        if !wait::wait_readable(&upstream.socket, &self.stop, Some(deadline)).map_err(lost)?
            && !wait::wait_until_readable(&upstream.socket, Instant::now() + DRAIN_TIME / 2)
        {
            return Err(Error::OpencodeUnavailable("the daemon is stopping".to_owned()));
        }
        let mut buffer = vec![0; PIECE];
        let mut count = upstream.read(&mut buffer).map_err(lost)?;
        if count == 0 {
            return Err(lost(io::ErrorKind::UnexpectedEof.into()));
        }
        let mut client = Timed::new(&connection.stream, Some(Instant::now() + REPLY_TIME));
        let mut is_taken = true;
        while count > 0 {
            // Also for a client that has gone, the reply is read to its end: by then tiny_http lets go
            // of its descriptors, which are part of this slot.
            is_taken = is_taken && client.write_all(&buffer[..count]).is_ok();
            // A reply that breaks off cannot be replaced by an error: the connection just ends.
            count = upstream.read(&mut buffer).unwrap_or(0);
        }
        finish(&connection.stream);
        Ok(())
    }
}

/// Reads until the end of the head. Returns the length of the head and of all that came; `None` when
/// the client has gone.
fn read_head(stream: &TcpStream, buffer: &mut [u8; HEAD_LIMIT]) -> Result<Option<(usize, usize)>> {
    let deadline = Instant::now() + HEAD_TIME;
    let mut length: usize = 0;
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        // The end of the head may begin in what came before.
        let from = length.saturating_sub(3);
        let read = match rest.is_zero() {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => stream.set_read_timeout(Some(rest)).and_then(|()| (&*stream).read(&mut buffer[length..])),
        };
        match read {
            Ok(0) => return Ok(None),
            Ok(count) => {
                length += count;
                if let Some(at) = buffer[from..length].windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                    return Ok(Some((from + at + 4, length)));
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && length > 0 => {
                return Err(Error::BadRequest(format!("the head did not come within {} s", HEAD_TIME.as_secs())));
            }
            Err(_) => return Ok(None),
        }
        if length == buffer.len() {
            let status = if buffer.contains(&b'\n') { 431 } else { 414 };
            return Err(Error::TooLarge { what: "head", limit: HEAD_LIMIT, status });
        }
        // The end of a head with bare line feeds would never be found.
        if buffer[from..length].windows(2).any(|pair| pair == b"\n\n") {
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
    // The buffer grows with what comes, not with what Content-Length promises.
    (&mut stream).take(missing as u64).read_to_end(&mut body).map_err(|e| match e.kind() {
        io::ErrorKind::TimedOut => Error::BadRequest(format!("the body did not come within {} s", BODY_TIME.as_secs())),
        _ => Error::BadRequest(format!("the body did not come: {e}")),
    })?;
    match body.len() == length {
        true => Ok(body),
        false => Err(Error::BadRequest("the body is shorter than its Content-Length".to_owned())),
    }
}

/// Sends a whole reply and ends the connection.
fn send(stream: &TcpStream, reply: &[u8]) {
    if Timed::new(stream, Some(Instant::now() + REPLY_TIME)).write_all(reply).is_ok() {
        finish(stream);
    }
}

/// Ends a connection after the last byte of a reply was written.
fn finish(stream: &TcpStream) {
    if stream.shutdown(Shutdown::Write).is_ok() {
        let timed = Timed::new(stream, Some(Instant::now() + LINGER_TIME));
        let _ = io::copy(&mut timed.take(LINGER_LIMIT), &mut io::sink());
    }
}

/// The last event that a client of `/events` has seen.
///
/// # Errors
/// `bad_request` when it is none of our ids.
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

/// Refuses a connection without reading from it, and without waiting.
fn refuse(stream: &TcpStream, error: &Error) {
    let _ = stream.set_nonblocking(true);
    let _ = (&*stream).write(&reply::error("GET", error, None));
    let _ = stream.shutdown(Shutdown::Write);
}
