//! The exchange of one routed request: a thread in `poll` over both sockets copies the request to opencode
//! and the reply to the client as the bytes arrive.
//!
//! Invariants: exactly one head and its body reach opencode, and exactly one the client; memory does not
//! depend on the length of a body or stream; the end of either side is passed to the other at once; a
//! connection is reused only if the request and the reply were complete, their framing gave their ends, and
//! no bytes followed.
//!
//! Sources of the format: RFC 9110 (7.6 on intermediaries, 7.8 on upgrades, 15.2 on interim
//! replies), RFC 9112.

use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::connections::Connection;
use super::head::{Framing, Head};
use super::reply::{connection_headers, cors_headers};
use crate::error::{Error, Result};
use crate::framing::{Body, ReplyHead, head_length, header_room, invalid, is_named};
use crate::system::wait::{Flag, timespec};
use crate::timed::Timed;
use crate::wire::ERROR_HEADER;

/// The initial size of a buffer: larger than most events, and small since many streams stay open for days.
/// Bytes.
const SMALL_BUFFER: usize = 8 * 1024;
/// The size of a buffer after a read has filled it: a large body takes fewer system calls. Bytes.
const LARGE_BUFFER: usize = 128 * 1024;
/// The size of the kernel's socket buffers for a large body. The kernel would grow them to megabytes, which
/// have left the processor's cache when the other side reads them: copying would take almost twice as long.
/// Bytes.
const SOCKET_BUFFER: usize = 128 * 1024;
/// The largest head of a reply; opencode's are below 1 KB. Bytes.
const REPLY_HEAD_LIMIT: usize = 64 * 1024;
/// Room for the headers that are added to a reply: at most this much without an origin. Bytes.
const ADDED_HEADERS: usize = 64;
/// How long a client may take to read the rest of an interim reply before an error reply; it is short.
const INTERIM_TIME: Duration = Duration::from_secs(1);

/// Headers that are about one connection (RFC 9110, 7.6.1).
pub fn is_hop_by_hop(header: &httparse::Header<'_>) -> bool {
    let names = ["connection", "keep-alive", "proxy-connection", "proxy-authorization", "te", "upgrade"];
    names.iter().any(|name| is_named(header, name))
}

/// Adds a header line to a head.
pub fn push_header(head: &mut Vec<u8>, header: &httparse::Header<'_>) {
    for part in [header.name.as_bytes(), b": ", header.value, b"\r\n"] {
        head.extend_from_slice(part);
    }
}

/// A client with a request to route.
pub struct Client<'a> {
    /// The client's connection.
    pub connection: &'a Connection,
    /// The head of the request.
    pub request: &'a Head<'a>,
    /// The bytes that were read after the head.
    pub rest: &'a [u8],
    /// The allowed origin of a web page.
    pub origin: Option<&'a str>,
    /// The head of the request allows the connection to serve another one.
    pub keeps: bool,
}

impl Client<'_> {
    /// The client's socket.
    pub fn stream(&self) -> &TcpStream {
        &self.connection.stream
    }
}

/// The bytes in transit in one direction. No call blocks, even on blocking sockets.
struct Flow {
    /// Holds only the first bytes until the first read allocates a full buffer.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// The sending side has ended.
    ended: bool,
}

impl Flow {
    fn new(first: Vec<u8>) -> Flow {
        Flow { start: 0, end: first.len(), buffer: first, ended: false }
    }

    fn pending(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether the buffer has room for a read, or can get it.
    fn has_room(&self) -> bool {
        !self.ended && (self.is_empty() || self.end < self.buffer.len())
    }

    /// Reads the bytes that have arrived and returns their number; sets `ended` at the end. `other` is the
    /// socket that they will be written to.
    fn read(&mut self, stream: &TcpStream, other: &TcpStream) -> io::Result<usize> {
        if self.is_empty() {
            let size = self.buffer.len();
            if size < SMALL_BUFFER {
                self.buffer = vec![0; SMALL_BUFFER];
            } else if self.end == size && size < LARGE_BUFFER {
                // A read filled the buffer, so this is not a stream of small events.
                self.buffer = vec![0; LARGE_BUFFER];
                // A failure only costs speed.
                let _ = set_socket_recv_buffer_size(stream, SOCKET_BUFFER);
                let _ = set_socket_send_buffer_size(other, SOCKET_BUFFER);
            }
            (self.start, self.end) = (0, 0);
        }
        match recv(stream, &mut self.buffer[self.end..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => {
                self.ended = true;
                Ok(0)
            }
            Ok((count, _)) => {
                self.end += count;
                Ok(count)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(e) => Err(e.into()),
        }
    }

    /// Writes as much as the socket accepts.
    fn write(&mut self, stream: &TcpStream) -> io::Result<()> {
        while !self.is_empty() {
            match send(stream, self.pending(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.start += count,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Takes the pending bytes out.
    fn take(&mut self) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.buffer);
        bytes.truncate(self.end);
        bytes.drain(..self.start);
        (self.start, self.end) = (0, 0);
        bytes
    }

    /// Adds bytes after the pending ones.
    fn push(&mut self, bytes: &[u8]) {
        let mut pending = self.take();
        pending.extend_from_slice(bytes);
        self.replace(pending);
    }

    /// Replaces the pending bytes.
    fn replace(&mut self, bytes: Vec<u8>) {
        let ended = self.ended;
        *self = Flow::new(bytes);
        self.ended = ended;
    }
}

/// The connection headers of an event stream. The connection serves no further request, but with `close`,
/// Node's client would take a stream that breaks off for a complete one, and OpenCode's SDK would not
/// reconnect.
const KEEP_ALIVE_HEADERS: &[u8] = b"Connection: keep-alive\r\nKeep-Alive: timeout=0\r\n";

fn is_event_stream(reply: &ReplyHead<'_>) -> bool {
    reply.header("content-type").is_some_and(|value| value.starts_with(b"text/event-stream"))
}

/// The progress of the reply.
enum Reply {
    /// The head is incomplete.
    Head,
    /// The body is being passed on.
    Body(Body),
    /// After an upgrade: both directions are raw bytes.
    Tunnel,
}

/// The result of [`Exchange::wait_for_reply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The head of a reply has arrived.
    Reply,
    /// opencode has accepted an upgrade.
    Tunnel,
    /// The client has closed its connection.
    ClientGone,
}

/// Which connections can serve another request after an exchange.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// The client's connection; the reply has told the client so.
    pub client: bool,
    /// The connection to opencode.
    pub upstream: bool,
}

/// A request and its reply in transit.
pub struct Exchange<'a> {
    client: &'a Client<'a>,
    upstream: &'a TcpStream,
    up: Flow,
    down: Flow,
    /// Interim replies (1xx) that the client has not read yet.
    interim: Flow,
    /// The rest of the body of the request.
    body: Body,
    /// Bytes after the request. They belong to the tunnel of an upgrade; otherwise they are dropped.
    early: &'a [u8],
    reply: Reply,
    is_upgrade: bool,
    /// The end of the client's side was passed on.
    half_closed: bool,
    /// Which connections can serve another request after this one.
    kept: Kept,
}

impl<'a> Exchange<'a> {
    /// An exchange of a request with its rewritten head, over a connection to opencode that is idle.
    ///
    /// # Errors
    /// `bad_request` when the bytes of the body so far are malformed.
    pub fn new(
        client: &'a Client<'a>,
        upstream: &'a TcpStream,
        head: Vec<u8>,
        is_upgrade: bool,
    ) -> Result<Exchange<'a>> {
        let mut body = match client.request.framing {
            Framing::Length(length) => Body::length(length),
            Framing::Chunked => Body::chunked(),
        };
        let mut first = head;
        let belonging = body.advance(client.rest).map_err(bad_chunks)?;
        first.extend_from_slice(&client.rest[..belonging]);
        Ok(Exchange {
            client,
            upstream,
            up: Flow::new(first),
            down: Flow::new(Vec::new()),
            interim: Flow::new(Vec::new()),
            body,
            early: &client.rest[belonging..],
            reply: Reply::Head,
            is_upgrade,
            half_closed: false,
            kept: Kept { client: client.keeps && !is_upgrade, upstream: !is_upgrade },
        })
    }

    /// Sends the head of the request, without waiting: an idle connection accepts it at once.
    /// [`Exchange::wait_for_reply`] sends what it did not accept, and reports a failure.
    pub fn send(&mut self) {
        let _ = self.up.write(self.upstream);
    }

    /// Sends the rest of the request and waits for the head of the reply, without passing the reply on yet.
    /// Passes interim replies on. `deadline` limits the wait.
    ///
    /// # Errors
    /// The error to reply with; `opencode_error` when opencode ends without a reply.
    pub fn wait_for_reply(&mut self, deadline: Option<Instant>, stop: &Flag) -> Result<Answer> {
        loop {
            let goes_on = self.step(deadline, stop).inspect_err(|_| self.end_interim());
            match (goes_on?, &self.reply) {
                (false, _) => return Ok(Answer::ClientGone),
                (true, Reply::Head) => {}
                (true, Reply::Body(_)) => return Ok(Answer::Reply),
                (true, Reply::Tunnel) => return Ok(Answer::Tunnel),
            }
        }
    }

    /// Passes the reply on to its end, or the tunnel both ways. An error reply is no longer possible: after a
    /// failure the connection just ends.
    pub fn pass_on(mut self, stop: &Flag) -> Kept {
        let mut goes_on = self.down.write(self.client.stream()).is_ok();
        while goes_on && !self.is_over() {
            goes_on = self.step(None, stop).unwrap_or(false);
        }
        let is_whole = matches!(&self.reply, Reply::Body(body) if body.is_done()) && self.down.is_empty();
        // opencode would take unsent bytes of the request, or the end of the client's side, for a part of the
        // next request.
        let is_sent = self.body.is_done() && self.up.is_empty() && !self.half_closed;
        Kept {
            client: self.kept.client && goes_on && is_whole,
            upstream: self.kept.upstream && goes_on && is_whole && is_sent && !self.down.ended,
        }
    }

    /// Writes the rest of an interim reply, so that an error reply can follow it.
    fn end_interim(&mut self) {
        let stream = self.client.stream();
        if !self.interim.is_empty() {
            let _ = Timed::new(stream, Some(Instant::now() + INTERIM_TIME)).write_all(self.interim.pending());
        }
    }

    /// Waits until a socket is ready, and copies bytes; false when the client has closed the connection or the
    /// reply broke off.
    fn step(&mut self, deadline: Option<Instant>, stop: &Flag) -> Result<bool> {
        let tunnel = matches!(self.reply, Reply::Tunnel);
        let waits_for_head = matches!(self.reply, Reply::Head);
        let reads_client = self.up.has_room() && (tunnel || !self.body.is_done());
        // Read the next interim reply only after the client has read the last one.
        let reads_upstream = self.down.has_room() && self.interim.is_empty();
        let writes_client = !self.interim.is_empty() || !(waits_for_head || self.down.is_empty());
        let mut client_events = PollFlags::empty();
        let mut upstream_events = PollFlags::empty();
        // RDHUP reports the end of the client's side without reading bytes that must not be passed on.
        let waits_for_end = !self.half_closed && !tunnel && self.body.is_done() && self.up.is_empty();
        client_events.set(PollFlags::RDHUP, waits_for_end);
        client_events.set(PollFlags::IN, reads_client);
        client_events.set(PollFlags::OUT, writes_client);
        upstream_events.set(PollFlags::IN, reads_upstream);
        upstream_events.set(PollFlags::OUT, !self.up.is_empty());
        let timeout = deadline.map(remaining).transpose()?;
        let client = self.client.stream();
        let mut fds = [
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(client.as_fd(), client_events),
            PollFd::from_borrowed_fd(self.upstream.as_fd(), upstream_events),
        ];
        // poll would always report a socket that has ended, even with no events requested.
        let watched = if upstream_events.is_empty() { 2 } else { 3 };
        match poll(&mut fds[..watched], timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::Internal(format!("cannot wait for a connection: {e}"))),
        }
        let [stopping, client_ready, upstream_ready] = fds.map(|fd| fd.revents());
        if !stopping.is_empty() {
            return Err(Error::OpencodeUnavailable("the daemon is stopping".to_owned()));
        }
        let gone = PollFlags::ERR | PollFlags::HUP;
        // The client has closed the connection, not only its sending side: it expects no reply.
        if client_ready.intersects(gone) {
            return Ok(false);
        }
        if reads_client && client_ready.intersects(PollFlags::IN) {
            self.read_client()?;
        }
        if upstream_ready.intersects(PollFlags::IN | gone) && reads_upstream && !self.read_upstream()? {
            return Ok(false);
        }
        // The socket mostly accepts bytes at once, so write without polling first.
        let sent = self.up.write(self.upstream);
        if let Err(e) = sent {
            // opencode may have replied before it closed the connection: read and pass on that reply.
            if self.down.ended && matches!(self.reply, Reply::Head) {
                return Err(broken(&e));
            }
            self.forget_client();
        }
        self.pass_end_of_client(client_ready.intersects(PollFlags::RDHUP));
        let written = match waits_for_head {
            true => self.interim.write(client),
            false => self.down.write(client),
        };
        Ok(written.is_ok())
    }

    /// Discards the rest of the request: opencode no longer reads it.
    fn forget_client(&mut self) {
        self.kept = Kept::default();
        self.up = Flow::new(Vec::new());
        self.up.ended = true;
        self.body = Body::length(0);
        self.half_closed = true;
    }

    /// Reads the next bytes of the request, or of a tunnel.
    fn read_client(&mut self) -> Result<()> {
        let before = self.up.end - self.up.start;
        // A broken connection counts as the end of the client's side.
        let count = self.up.read(self.client.stream(), self.upstream).unwrap_or_else(|_| {
            self.up.ended = true;
            0
        });
        if !matches!(self.reply, Reply::Tunnel) {
            let new = &self.up.pending()[before..];
            let belonging = self.body.advance(new).map_err(bad_chunks)?;
            self.up.end -= count - belonging;
            // The beginning of the next request is dropped here, so the connection cannot serve it.
            self.kept.client &= belonging == count;
        }
        Ok(())
    }

    /// Reads the next bytes of the reply; false when it is malformed after its beginning was passed on.
    fn read_upstream(&mut self) -> Result<bool> {
        let before = self.down.end - self.down.start;
        match (self.down.read(self.upstream, self.client.stream()), &mut self.reply) {
            (Err(e), Reply::Head) => return Err(broken(&e)),
            // Pass on the bytes before the break; opencode reads no more of the request.
            (Err(_), _) => {
                self.down.ended = true;
                self.forget_client();
            }
            (Ok(_), Reply::Head) => self.take_head()?,
            (Ok(_), Reply::Body(body)) => {
                let pending = self.down.pending();
                let new = &pending[before.min(pending.len())..];
                match body.advance(new) {
                    Ok(belonging) => {
                        self.kept.upstream &= belonging == new.len();
                        self.down.end = self.down.start + before + belonging;
                    }
                    Err(_) => return Ok(false),
                }
            }
            (Ok(_), Reply::Tunnel) => {}
        }
        Ok(true)
    }

    /// Rewrites the head of the reply for the client, once the head is complete.
    fn take_head(&mut self) -> Result<()> {
        loop {
            let Some(length) = head_length(self.down.pending(), 0) else {
                if self.down.pending().len() >= REPLY_HEAD_LIMIT {
                    return Err(Error::OpencodeFault("the head of its reply is too long".to_owned()));
                }
                if self.down.ended {
                    return Err(Error::OpencodeFault("it closed the connection without a reply".to_owned()));
                }
                if self.down.end == self.down.buffer.len() {
                    self.down.buffer.resize(REPLY_HEAD_LIMIT, 0);
                }
                return Ok(());
            };
            let arrived = self.down.take();
            let (head, rest) = arrived.split_at(length);
            let not_http = |e| Error::OpencodeFault(format!("its reply is not HTTP: {e}"));
            let mut room = header_room();
            let mut reply = ReplyHead::parse(head, self.client.request.method, &mut room).map_err(not_http)?;
            let is_tunnel = reply.status == 101;
            if is_tunnel && !self.is_upgrade {
                return Err(not_http(invalid("an upgrade that the request did not ask for")));
            }
            if reply.status < 200 && !is_tunnel {
                // HTTP/1.0 has no interim replies (RFC 9110, 15.2), and a client whose ticket opencode has not
                // accepted gets none.
                if self.client.request.version > 0 && self.client.connection.is_proven() {
                    let mut interim = self.interim.take();
                    self.push_reply_head(&mut interim, head, &reply);
                    self.interim.replace(interim);
                }
                self.down.replace(rest.to_vec());
                continue;
            }
            let belonging = if is_tunnel { rest.len() } else { reply.body.advance(rest).map_err(not_http)? };
            self.kept = self.kept_after(&reply);
            self.kept.upstream &= belonging == rest.len();
            // The rest of an unread interim reply goes before the reply.
            let mut bytes = self.interim.take();
            bytes.reserve(arrived.len() + ADDED_HEADERS);
            self.push_reply_head(&mut bytes, head, &reply);
            bytes.extend_from_slice(&rest[..belonging]);
            self.reply = if is_tunnel {
                self.up.push(self.early);
                Reply::Tunnel
            } else {
                Reply::Body(reply.body)
            };
            self.down.replace(bytes);
            return Ok(());
        }
    }

    /// Which connections can serve another request after a reply with this head.
    fn kept_after(&self, reply: &ReplyHead<'_>) -> Kept {
        let has_no_body = self.client.request.method == "HEAD" || matches!(reply.status, 204 | 304);
        // While the client still sends the request, or has sent bytes after it, the start of the next request
        // is uncertain. Bytes that arrive from now on stay unread until the reply is over.
        let is_read = self.body.is_done() && self.early.is_empty();
        let is_framed = reply.version == 1 && (has_no_body || reply.is_framed);
        Kept {
            client: self.kept.client && is_read && is_framed && !is_event_stream(reply),
            // A body in a reply that must not have one would be taken for the next reply.
            upstream: self.kept.upstream && reply.is_kept && reply.is_framed && !has_no_body,
        }
    }

    /// Adds the head of a reply, rewritten for the client.
    fn push_reply_head(&self, bytes: &mut Vec<u8>, head: &[u8], reply: &ReplyHead<'_>) {
        let is_tunnel = reply.status == 101;
        let status_line = head.split_inclusive(|byte| *byte == b'\n').next();
        bytes.extend_from_slice(status_line.unwrap_or_default());
        for header in reply.headers {
            let cors = self.client.origin.is_some()
                && !is_named(header, "access-control-expose-headers")
                && (header.name.to_ascii_lowercase().starts_with("access-control-") || is_named(header, "vary"));
            // This header marks our own errors.
            let is_passed = !cors && !is_named(header, ERROR_HEADER);
            if is_passed && (is_tunnel || !is_hop_by_hop(header)) {
                push_header(bytes, header);
            }
        }
        if !is_tunnel && reply.status >= 200 {
            let is_stream = is_event_stream(reply) && reply.is_chunked;
            match is_stream && !self.client.request.has_token("connection", "close") {
                true => bytes.extend_from_slice(KEEP_ALIVE_HEADERS),
                // A reply that ends with the connection must say `close`.
                false => bytes.extend_from_slice(connection_headers(self.kept.client).as_bytes()),
            }
        }
        bytes.extend_from_slice(cors_headers(self.client.origin).as_bytes());
        bytes.extend_from_slice(b"\r\n");
    }

    /// Passes the end of the client's side on, once, after all bytes before it.
    fn pass_end_of_client(&mut self, hung_up: bool) {
        // Bytes that the client sent before may still be unread.
        let body_is_over = self.body.is_done() && !matches!(self.reply, Reply::Tunnel);
        let ended = self.up.ended || (hung_up && body_is_over);
        if ended && !self.half_closed && self.up.is_empty() {
            self.half_closed = true;
            let _ = self.upstream.shutdown(Shutdown::Write);
        }
    }

    /// Whether the exchange is complete.
    fn is_over(&mut self) -> bool {
        if !self.down.is_empty() {
            return false;
        }
        match &self.reply {
            Reply::Head => false,
            Reply::Body(body) => body.is_done() || self.down.ended,
            Reply::Tunnel => {
                if self.down.ended {
                    let _ = self.client.stream().shutdown(Shutdown::Write);
                }
                self.down.ended && (self.up.ended && self.up.is_empty())
            }
        }
    }
}

/// The time until the deadline.
fn remaining(deadline: Instant) -> Result<Timespec> {
    let rest = deadline.saturating_duration_since(Instant::now());
    if rest.is_zero() {
        return Err(Error::OpencodeTimeout("did not answer"));
    }
    Ok(timespec(rest))
}

fn broken(e: &io::Error) -> Error {
    Error::OpencodeFault(format!("the connection broke before a reply: {e}"))
}

fn bad_chunks(e: io::Error) -> Error {
    Error::BadRequest(format!("the body does not match its framing: {e}"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use rustix::net::sockopt::{socket_recv_buffer_size, socket_send_buffer_size};

    use super::*;
    use crate::system::wait::wait_until_readable;

    /// Both ends of a connection.
    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    /// A stream of small events, open for days, keeps its small buffer. A large body gets a large buffer, and
    /// socket buffers of a size that does not slow it down.
    #[test]
    fn only_a_large_body_gets_large_buffers() {
        const LARGE: usize = 400_000;
        let (opencode, upstream) = connection();
        let (client, _other_end) = connection();
        let mut flow = Flow::new(Vec::new());
        let pass = |flow: &mut Flow| {
            assert!(wait_until_readable(&upstream, Instant::now() + Duration::from_secs(60)));
            let count = flow.read(&upstream, &client).unwrap();
            flow.start = flow.end;
            count
        };
        for _ in 0..3 {
            (&opencode).write_all(b"data: {}\n\n").unwrap();
            assert_eq!(pass(&mut flow), 10);
            assert!((4096..=16384).contains(&flow.buffer.len()), "{}", flow.buffer.len());
        }
        thread::scope(|scope| {
            scope.spawn(|| (&opencode).write_all(&vec![b'b'; LARGE]).unwrap());
            let mut count = 0;
            while count < LARGE {
                count += pass(&mut flow);
            }
        });
        assert!(flow.buffer.len() >= 64 * 1024, "{}", flow.buffer.len());
        let kernel = [socket_recv_buffer_size(&upstream).unwrap(), socket_send_buffer_size(&client).unwrap()];
        assert!(kernel.iter().all(|size| (100_000..1_000_000).contains(size)), "{kernel:?}");
    }
}
