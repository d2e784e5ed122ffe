//! The public port: every connection comes through here, and one request of each.
//!
//! The gate reads the head under a deadline, refuses what the policy refuses before anything
//! else is read, reads a bounded body, and hands the request to the control plane behind it
//! (`control.sock`). Why in front of an HTTP server that could listen itself: tiny_http has no
//! bound on heads, bodies and time, and a single `Content-Length: 50000000000` ends the process;
//! and a routed call has to be streamed, which it cannot do.
//!
//! Invariants: what is refused is answered with one of our errors, and the connection is closed;
//! nothing a client sends ends more than its own connection; a request that is passed on has
//! exactly one reading (no smuggling), since only what was understood here is written anew.
//!
//! Sources of the format: RFC 9110, RFC 9112; the Fetch standard for `Origin` and
//! `Sec-Fetch-Site`.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit};

use super::events::Subscription;
use super::head::{Framing, HEADER_LIMIT, Head, cors_headers};
use super::router;
use super::{Daemon, api};
use crate::error::{Error, Result};
use crate::framing::is_json;
use crate::http::{self, Response, Timed};
use crate::system::socket;
use crate::system::wait::{self, Flag};
use crate::wire::{BODY_LIMIT, ERROR_HEADER, Failure, TIMEOUT_HEADER};

/// The largest head; browsers and clients stay below 8 KiB. Bytes.
const HEAD_LIMIT: usize = 16 * 1024;
/// How long a head may take: it is one packet.
const HEAD_TIME: Duration = Duration::from_secs(2);
/// How long the body of a control request may take.
const BODY_TIME: Duration = Duration::from_secs(5);
/// How many connections at once: each is a thread, and up to two descriptors.
const CONNECTION_LIMIT: usize = 1024;
/// How much of an answer is passed on at once. Bytes.
const PIECE: usize = 64 * 1024;
/// How many descriptors a connection may come to need: its own, and for the request it passes on
/// the two ends of another.
const PER_CONNECTION: u64 = 3;
/// How many descriptors are kept for the requests of the connections that are taken: the library
/// behind the gate does not survive it when there is none.
const RESERVE: u64 = 32;
/// How long a client may take to read a reply.
const REPLY_TIME: Duration = Duration::from_secs(10);
/// How much longer than the request's own deadline the control plane may take to say so.
const CONTROL_GRACE: Duration = Duration::from_secs(2);
/// How long what a client still sends is read after the reply: closing a socket with unread
/// bytes would take the reply from it.
const LINGER_TIME: Duration = Duration::from_millis(500);
/// How much of it. Bytes.
const LINGER_LIMIT: u64 = 1024 * 1024;
/// How long requests in flight may take when the daemon stops: their replies are short.
const DRAIN_TIME: Duration = Duration::from_secs(1);
/// The pause when descriptors or memory for a connection are lacking: until some come back.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

/// How often a stream of events says that it is still there, when nothing happens.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// The web pages that may ask: those of OpenWork's desktop program.
const ORIGINS: [&str; 3] = ["tauri://localhost", "http://tauri.localhost", "https://tauri.localhost"];

/// The public port.
pub struct Gate {
    listener: TcpListener,
    port: u16,
    origins: Vec<String>,
    /// Raised when no more connections are to be accepted.
    closing: Flag,
    /// Raised when the daemon ends: routed streams break off.
    stop: Flag,
    connections: Connections,
}

/// The open connections, so that they can be counted and ended.
#[derive(Default)]
struct Connections {
    open: Mutex<Open>,
    closed: Condvar,
}

#[derive(Default)]
struct Open {
    last: u64,
    by_id: HashMap<u64, Arc<Connection>>,
    /// No more are taken in.
    closed: bool,
}

/// One connection.
pub struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    /// Its head has not come yet: it may be ended without loss.
    reading: AtomicBool,
}

/// The place of a connection among the open ones. Dropped, it ends the connection, also when
/// serving it panics.
struct Place {
    connections: &'static Connections,
    id: u64,
    connection: Arc<Connection>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.connection.stream.shutdown(Shutdown::Both);
        self.connections.release(self.id);
    }
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection in, unless there are too many.
    fn admit(&'static self, connection: &Arc<Connection>) -> Result<Place> {
        let usable = usable_descriptors();
        let has_descriptors = has_descriptors(&connection.stream, usable);
        let mut open = self.lock();
        let promised = (open.by_id.len() as u64 + 1) * PER_CONNECTION > usable;
        if promised || !has_descriptors || open.closed || open.by_id.len() >= CONNECTION_LIMIT {
            return Err(Error::Overloaded("connections"));
        }
        open.last += 1;
        let id = open.last;
        open.by_id.insert(id, connection.clone());
        Ok(Place { connections: self, id, connection: connection.clone() })
    }

    fn release(&self, id: u64) {
        self.lock().by_id.remove(&id);
        self.closed.notify_all();
    }

    /// Ends all after they were answered, or [`DRAIN_TIME`] is over; `at_once`, if they have asked
    /// nothing yet.
    fn drain(&self, at_once: bool) {
        let deadline = Instant::now() + DRAIN_TIME;
        let mut open = self.lock();
        open.closed = true;
        while !open.by_id.is_empty() {
            let rest = deadline.saturating_duration_since(Instant::now());
            for connection in open.by_id.values() {
                if rest.is_zero() || (at_once && connection.reading.load(Ordering::Relaxed)) {
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

/// How many descriptors there may be, but for those that are kept.
fn usable_descriptors() -> u64 {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::from(u32::MAX));
    limit - RESERVE.min(limit / 4)
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
        let (closing, stop) = (Flag::new()?, Flag::new()?);
        Ok(Gate { listener, port, origins, closing, stop, connections: Connections::default() })
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
                Ok(false) => return,
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
        let connection = Arc::new(Connection { stream, peer, reading: AtomicBool::new(true) });
        let place = match self.connections.admit(&connection) {
            Ok(place) => place,
            // The daemon ends: a connection that comes so late is closed like one not accepted.
            Err(_) if self.stop.is_raised() => return,
            Err(e) => return refuse(&connection.stream, &e),
        };
        let refused = connection.clone();
        let work = move || {
            let _place = place;
            // A panic costs this connection only; it has said so on standard error.
            if catch_unwind(AssertUnwindSafe(|| self.connection(daemon, &connection))).is_err() {
                crate::log!("a request failed (see above)");
            }
        };
        if let Err(e) = Builder::new().spawn(work) {
            crate::log!("cannot start a thread for a connection: {e}");
            refuse(&refused.stream, &Error::Overloaded("threads"));
        }
    }

    /// Accepts no more connections: `accepting`, the thread of [`Gate::serve`], ends. Those that come
    /// wait at the listening socket, which stays open: nobody else can listen there while
    /// `daemon.lock` names it.
    pub fn close(&self, accepting: JoinHandle<()>) {
        self.closing.raise();
        let _ = accepting.join();
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

    /// Serves the one request of a connection.
    fn connection(&self, daemon: &Daemon, connection: &Connection) {
        let stream = &connection.stream;
        let _ = stream.set_nodelay(true);
        let mut buffer = [0; HEAD_LIMIT];
        let (head_length, length) = match read_head(stream, &mut buffer) {
            Ok(Some(lengths)) => lengths,
            Ok(None) => return,
            Err(e) => return reply_error(stream, &e, "GET", None),
        };
        connection.reading.store(false, Ordering::Relaxed);
        let (head, rest) = buffer[..length].split_at(head_length);
        let mut headers = [httparse::EMPTY_HEADER; HEADER_LIMIT];
        let request = match Head::parse(head, &mut headers) {
            Ok(request) => request,
            Err(e) => return reply_error(stream, &e, "GET", None),
        };
        let origin = match self.admissible(&request) {
            Ok(origin) => origin,
            Err(e) => return reply_error(stream, &e, request.method, None),
        };
        if request.method == "OPTIONS" && origin.is_some() {
            let methods = "Access-Control-Allow-Methods: GET, POST, PUT, PATCH, DELETE\r\n";
            let headers = "Access-Control-Allow-Headers: authorization, content-type, x-opencode-directory\r\n";
            return send(stream, head_of(204, origin) + methods + headers, None, false);
        }
        let result = match request.path() {
            path if path.starts_with(router::PREFIX) => {
                let routed =
                    router::route(daemon, &router::Client { stream, request: &request, rest, origin }, &self.stop);
                let _ = stream.set_nonblocking(false);
                routed.map(|upstream| {
                    finish(stream);
                    drop(upstream);
                })
            }
            "/events" if request.method == "GET" => {
                check_user(connection).map(|()| stream_events(stream, &daemon.events.subscribe(), origin))
            }
            _ => self.control(daemon, connection, &request, rest, origin),
        };
        if let Err(e) = result {
            reply_error(stream, &e, request.method, origin);
        }
    }

    /// Refuses what no client of ours sends and a web page might. Returns the origin, if there
    /// is one.
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

    /// Hands a request to the control plane, and its answer to the client.
    fn control(
        &self,
        daemon: &Daemon,
        connection: &Connection,
        request: &Head<'_>,
        rest: &[u8],
        origin: Option<&str>,
    ) -> Result<()> {
        let ours = match check_user(connection) {
            Err(Error::ForbiddenUser) if request.path() == "/health" => false,
            other => other.map(|()| true)?,
        };
        let body = read_body(&connection.stream, request, rest)?;
        let timeout = request.only(TIMEOUT_HEADER)?;
        let timeout = timeout.filter(|_| request.path() != "/health");
        let deadline = Instant::now() + api::timeout(timeout)? + CONTROL_GRACE;
        let length = body.len().to_string();
        let mut headers = vec![("Content-Length", length.as_str())];
        if let Some(timeout) = timeout {
            headers.push((TIMEOUT_HEADER, timeout));
        }
        if !ours {
            headers.push((api::STRANGER_HEADER, "yes"));
        }
        let head = http::Request { method: request.method, target: request.target, headers: &headers }.head("openwork");
        let mut upstream = Timed::new(daemon.control.connect()?, Some(deadline));
        let lost = |e: io::Error| Error::Internal(format!("the control plane does not answer: {e}"));
        upstream.write_all(&head).and_then(|()| upstream.write_all(&body)).map_err(lost)?;
        // A handler that waits for opencode is not waited for when the daemon ends.
        if !wait::wait_readable(&upstream.socket, &self.stop, Some(deadline)).map_err(lost)?
            && !wait::wait_until_readable(&upstream.socket, Instant::now() + DRAIN_TIME / 2)
        {
            return Err(Error::OpencodeUnavailable("the daemon is stopping".to_owned()));
        }
        let mut response = Response::read(upstream, request.method).map_err(lost)?;
        let mut head = head_of(response.status, origin);
        for name in ["Allow", ERROR_HEADER] {
            if let Some(value) = response.header(name) {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        push_json_headers(&mut head, response.header("Content-Length").unwrap_or("0"));
        // The whole answer, or as much of it as goes at once.
        let mut buffer = head.into_bytes();
        response.by_ref().take(PIECE as u64).read_to_end(&mut buffer).map_err(lost)?;
        let mut client = Timed::new(&connection.stream, Some(Instant::now() + REPLY_TIME));
        while !buffer.is_empty() && client.write_all(&buffer).is_ok() {
            buffer.clear();
            // What is written cannot be taken back: the end of the connection says the rest.
            if response.by_ref().take(PIECE as u64).read_to_end(&mut buffer).is_err() {
                break;
            }
        }
        finish(&connection.stream);
        Ok(())
    }
}

/// Control routes are for the daemon's own user, and for root.
fn check_user(connection: &Connection) -> Result<()> {
    match socket::peer_user(&connection.stream, connection.peer) {
        Ok(Some(user)) if user == 0 || user == rustix::process::geteuid().as_raw() => Ok(()),
        Ok(Some(_) | None) => Err(Error::ForbiddenUser),
        Err(_) => Err(Error::Overloaded("connections")),
    }
}

/// Reads until the end of the head: its length, and that of all that came. `None` when the
/// client has gone.
fn read_head(stream: &TcpStream, buffer: &mut [u8; HEAD_LIMIT]) -> Result<Option<(usize, usize)>> {
    let deadline = Instant::now() + HEAD_TIME;
    let mut length: usize = 0;
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        // The end may stand across what came before and what comes now.
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
        // An end of the head with bare line feeds would never be found.
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
    // Grows as it comes: memory is not given for a mere promise.
    (&mut stream).take(missing as u64).read_to_end(&mut body).map_err(|e| match e.kind() {
        io::ErrorKind::TimedOut => Error::BadRequest(format!("the body did not come within {} s", BODY_TIME.as_secs())),
        _ => Error::BadRequest(format!("the body did not come: {e}")),
    })?;
    match body.len() == length {
        true => Ok(body),
        false => Err(Error::BadRequest("the body is shorter than its Content-Length".to_owned())),
    }
}

fn reply_error(stream: &TcpStream, error: &Error, method: &str, origin: Option<&str>) {
    let body = serde_json::to_vec(&Failure::from(error)).unwrap_or_default();
    let mut head = head_of(error.http_status(), origin);
    // By this our errors are told from opencode's.
    head.push_str(&format!("{ERROR_HEADER}: {}\r\n", error.code().name()));
    if matches!(error, Error::Unauthorized) {
        head.push_str("WWW-Authenticate: Basic realm=\"opencode\"\r\n");
    }
    send(stream, head, Some(&body), method == "HEAD");
}

/// The head of an answer of ours, but for its body and its end.
fn head_of(status: u16, origin: Option<&str>) -> String {
    format!("HTTP/1.1 {status} {}\r\nConnection: close\r\n{}", reason(status), cors_headers(origin))
}

/// Answers, and reads on a little, so that the answer is not lost.
fn send(stream: &TcpStream, mut head: String, body: Option<&[u8]>, head_only: bool) {
    match body {
        Some(body) => push_json_headers(&mut head, &body.len().to_string()),
        None => head.push_str("\r\n"),
    }
    let mut bytes = head.into_bytes();
    if let (Some(body), false) = (body, head_only) {
        bytes.extend_from_slice(body);
    }
    let mut timed = Timed::new(stream, Some(Instant::now() + REPLY_TIME));
    if timed.write_all(&bytes).is_ok() {
        finish(stream);
    }
}

/// The rest of a head, about a body of JSON.
fn push_json_headers(head: &mut String, length: &str) {
    head.push_str("Content-Type: application/json\r\nCache-Control: no-store\r\n");
    head.push_str(&format!("X-Content-Type-Options: nosniff\r\nContent-Length: {length}\r\n\r\n"));
}

/// Ends a connection after the last byte was written.
fn finish(stream: &TcpStream) {
    if stream.shutdown(Shutdown::Write).is_ok() {
        let timed = Timed::new(stream, Some(Instant::now() + LINGER_TIME));
        let _ = io::copy(&mut timed.take(LINGER_LIMIT), &mut io::sink());
    }
}

/// `GET /events`: server-sent events until the client goes, does not read, or the daemon stops.
fn stream_events(stream: &TcpStream, events: &Subscription, origin: Option<&str>) {
    let mut head = head_of(200, origin);
    head.push_str("Content-Type: text/event-stream\r\nCache-Control: no-store\r\n\r\n");
    let mut text: Arc<str> = head.into();
    while Timed::new(stream, Some(Instant::now() + REPLY_TIME)).write_all(text.as_bytes()).is_ok() {
        text = match events.next(HEARTBEAT) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => ": still here\n\n".into(),
            Err(RecvTimeoutError::Disconnected) => return finish(stream),
        };
    }
}

/// Refuses a connection without reading from it, and without waiting.
fn refuse(stream: &TcpStream, error: &Error) {
    let body = serde_json::to_string(&Failure::from(error)).unwrap_or_default();
    let status = error.http_status();
    let text = format!(
        "HTTP/1.1 {status} {}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        reason(status),
        body.len(),
    );
    let _ = stream.set_nonblocking(true);
    let _ = (&*stream).write(text.as_bytes());
    let _ = stream.shutdown(Shutdown::Write);
}

/// The words of a status (RFC 9110, 15).
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Unknown",
    }
}
