//! `/w/<ws>/…`: a stable base URL of OpenCode per workspace. The head is rewritten; after that
//! bytes are copied both ways as they come, by one thread in `poll` over both sockets.
//!
//! Invariants: only what was understood of the request is passed on, with its credentials
//! checked and exactly the directory of its workspace; a request is sent at most once; memory
//! does not depend on the length of a body or stream; the end of either side is passed to the
//! other at once.
//!
//! Sources of the format: RFC 9110 (7.6 on what is passed on, 7.8 on upgrades), RFC 9112.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};

use super::Daemon;
use super::api;
use super::engine::{self, CallError, DIRECTORY_HEADER, Endpoint, TOKEN_PARAMETER};
use super::head::{Framing, Head, cors_headers};
use crate::error::{Error, Result};
use crate::framing::{Body, HEADER_LIMIT, parse_reply_head, percent_decode, percent_encode};
use crate::system::wait::{Flag, timespec};
use crate::wire::TIMEOUT_HEADER;
use crate::workspace::Workspace;

/// What a direction begins with: an event is smaller, and many streams are open for days. Bytes.
const SMALL_BUFFER: usize = 8 * 1024;
/// What it grows to when that is filled: fewer system calls for a large body. Bytes.
const LARGE_BUFFER: usize = 128 * 1024;
/// What the kernel keeps on the way between two sockets. Left to itself it goes up to megabytes for
/// a large body, and those have left the processor's cache when the other side reads them: it takes
/// almost twice as long. Bytes.
const SOCKET_BUFFER: usize = 128 * 1024;
/// The largest head of a reply. Bytes.
const REPLY_HEAD_LIMIT: usize = 64 * 1024;

/// What takes longer has an end worth noting, beside its beginning.
const LONG: Duration = Duration::from_secs(1);

/// The path prefix of routed requests.
pub const PREFIX: &str = "/w/";

/// A client whose request is to be routed.
pub struct Client<'a> {
    /// Its connection.
    pub stream: &'a TcpStream,
    /// What it asks.
    pub request: &'a Head<'a>,
    /// What came behind the head.
    pub rest: &'a [u8],
    /// The web page that asks, if one does and may.
    pub origin: Option<&'a str>,
}

/// Routes a request. Ends when the reply, or the stream, has ended. The connection to opencode is
/// handed back, to be closed when the client has been told of the end: that comes first.
///
/// # Errors
/// While nothing was answered yet: what is to be answered. After that the connection just ends.
pub fn route(daemon: &Daemon, client: &Client<'_>, stop: &Flag) -> Result<TcpStream> {
    let request = client.request;
    let given = match request.only("authorization")? {
        Some(given) => given.to_owned(),
        None => format!("Basic {}", token(request.target).unwrap_or_default()),
    };
    let is_known = same(given.as_bytes(), daemon.authorization.as_bytes());
    let (selector, path, query) = split(request.target).map_err(|e| if is_known { e } else { Error::Unauthorized })?;
    // A ticket wakes nobody: it was made by the opencode that runs.
    let has_ticket = engine::takes_ticket(path, query.unwrap_or_default()) && daemon.supervisor.ready_now().is_some();
    if !is_known && !has_ticket {
        return Err(Error::Unauthorized);
    }
    // Who has only a ticket is told nothing that opencode does not tell.
    let workspace = find(daemon, &selector).map_err(|e| if is_known { e } else { Error::Unauthorized })?;
    let directory = workspace.local_path()?;
    let target = target(path, query, directory);
    let timeout = request.only(TIMEOUT_HEADER)?;
    let begun = Instant::now();
    let deadline = begun + api::timeout(timeout)?;
    let loads = is_known && engine::loads_instance(path);
    if loads {
        daemon.instances.check_fence(&workspace)?;
    }
    let entered = daemon.instances.enter(&workspace, deadline)?;
    if is_known {
        daemon.store.touch(&workspace.id);
    }
    let is_upgrade = request.has_token("connection", "upgrade") && request.only("upgrade")?.is_some();
    // Without a limit of the client's own, an answer may take as long as a turn of the agent;
    // should opencode hang, the supervisor ends it, and that ends the wait.
    let patience = timeout.map(|_| deadline);
    let mut tried = false;
    let result = loop {
        let (endpoint, upstream) = connect(daemon, deadline)?;
        // False when opencode has ended while the request waited for its turn: nothing was sent.
        if loads && !entered.loads(endpoint.generation, deadline)? {
            continue;
        }
        let head = rewrite(request, &target, directory, endpoint.listener.address, is_upgrade);
        let exchanged = Exchange::new(client, &upstream, head, is_upgrade, &|| entered.replied())?.run(patience, stop);
        if let Err(Error::OpencodeFault(_)) = &exchanged {
            // What ended opencode by loading the instance would end the next one too.
            if let Some(why) = entered.blame(&daemon.supervisor, &endpoint) {
                return Err(why);
            }
        }
        match exchanged {
            // opencode was just ending: what only reads may be asked again (RFC 9110, 9.2.2).
            Err(Error::OpencodeFault(_)) if !tried && is_safe(request) => {
                tried = true;
                daemon.supervisor.successor(&endpoint, deadline)?;
            }
            other => break other.map(|()| upstream),
        }
    };
    // The end of a stream is use of the workspace as much as its beginning.
    if begun.elapsed() > LONG {
        daemon.store.touch(&workspace.id);
    }
    result
}

/// Whether a request changes nothing, so that it may be sent twice.
fn is_safe(request: &Head<'_>) -> bool {
    matches!(request.method, "GET" | "HEAD") && request.framing == Framing::Length(0)
}

/// The local workspace that is meant, if its directory is there: opencode would answer for one
/// that is not.
fn find(daemon: &Daemon, selector: &str) -> Result<Arc<Workspace>> {
    let workspace = daemon.store.snapshot().find(selector)?.clone();
    let directory = workspace.local_path()?;
    match directory.is_dir() {
        true => Ok(workspace),
        false => Err(Error::PathNotFound(directory.to_owned())),
    }
}

/// The credentials in the query, where a web page cannot send a header.
fn token(target: &str) -> Option<String> {
    let (_, query) = target.split_once('?')?;
    let mut parameters = query.split('&').filter_map(|parameter| parameter.split_once('='));
    let (_, value) = parameters.find(|(name, _)| *name == TOKEN_PARAMETER)?;
    String::from_utf8(percent_decode(value)?).ok()
}

/// Compares without telling by its time where the difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

/// The selector in a target, the path behind it and the query, as they are spelled.
fn split(target: &str) -> Result<(String, &str, Option<&str>)> {
    let rest = target.strip_prefix(PREFIX).unwrap_or_default();
    let (selector, rest) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let decoded = percent_decode(selector).and_then(|bytes| String::from_utf8(bytes).ok());
    let selector =
        decoded.ok_or_else(|| Error::BadRequest(format!("{selector:?} in the path is not percent-encoded UTF-8")))?;
    if selector == "-" {
        return Err(Error::WorkspaceNotFound(selector));
    }
    let (path, query) = rest.split_once('?').map_or((rest, None), |(path, query)| (path, Some(query)));
    Ok((selector, if path.is_empty() { "/" } else { path }, query))
}

/// The target for opencode: as spelled, but for the parameters that would win over the header
/// with the directory of the workspace. Where one is also a filter, it becomes that directory.
fn target(path: &str, query: Option<&str>, directory: &Path) -> String {
    let mut target = path.to_owned();
    let name = |parameter: &str| {
        let name = parameter.split('=').next().unwrap_or_default().replace('+', " ");
        percent_decode(&name).unwrap_or_default()
    };
    let Some(query) = query else { return target };
    let names_directory = |parameter: &&str| [&b"directory"[..], b"location[directory]"].contains(&&*name(parameter));
    let (named, mut kept): (Vec<&str>, Vec<&str>) = query.split('&').partition(names_directory);
    let filter = engine::directory_filter(path, directory);
    if named.iter().any(|parameter| name(parameter) == b"directory") {
        kept.extend(filter.as_deref());
    }
    if !kept.is_empty() {
        target.push('?');
        target.push_str(&kept.join("&"));
    }
    target
}

/// Connects to opencode, which is woken if it is down. Nothing was sent before, so that it may
/// be tried again.
fn connect(daemon: &Daemon, deadline: Instant) -> Result<(Endpoint, TcpStream)> {
    daemon.supervisor.call(deadline, |endpoint| {
        let stream = endpoint.connect(deadline)?;
        stream.set_nonblocking(true).map_err(|e| CallError::Gone(e.to_string()))?;
        Ok((endpoint.clone(), stream))
    })
}

/// Headers that are about one connection (RFC 9110, 7.6.1).
fn is_hop_by_hop(name: &str) -> bool {
    ["connection", "keep-alive", "proxy-connection", "proxy-authorization", "te", "upgrade"]
        .iter()
        .any(|hop| name.eq_ignore_ascii_case(hop))
}

/// The head for opencode.
fn rewrite(request: &Head<'_>, target: &str, directory: &Path, address: SocketAddrV4, is_upgrade: bool) -> Vec<u8> {
    let mut head = format!("{} {target} HTTP/1.{}\r\nHost: {address}\r\n", request.method, request.version);
    head.push_str(if is_upgrade { "Connection: Upgrade\r\n" } else { "Connection: close\r\n" });
    let encoded = percent_encode(directory.as_os_str().as_encoded_bytes());
    head.push_str(&format!("{DIRECTORY_HEADER}: {encoded}\r\n"));
    let mut head = head.into_bytes();
    for header in request.headers {
        let replaced = ["host", DIRECTORY_HEADER, TIMEOUT_HEADER].iter().any(|n| header.name.eq_ignore_ascii_case(n));
        let keeps_upgrade = is_upgrade && header.name.eq_ignore_ascii_case("upgrade");
        // How the body is framed is for opencode as it is, whatever a client says of it.
        let frames = ["content-length", "transfer-encoding"].iter().any(|n| header.name.eq_ignore_ascii_case(n));
        let is_named = request.has_token("connection", header.name) && !frames;
        let dropped = replaced || is_hop_by_hop(header.name) || is_named;
        if keeps_upgrade || !dropped {
            push_header(&mut head, header);
        }
    }
    head.extend_from_slice(b"\r\n");
    head
}

fn push_header(head: &mut Vec<u8>, header: &httparse::Header<'_>) {
    for part in [header.name.as_bytes(), b": ", header.value, b"\r\n"] {
        head.extend_from_slice(part);
    }
}

/// Bytes on their way in one direction.
struct Flow {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// The reader's side has ended.
    ended: bool,
}

impl Flow {
    fn new(first: Vec<u8>) -> Flow {
        let end = first.len();
        let mut buffer = first;
        buffer.resize(end.max(SMALL_BUFFER), 0);
        Flow { buffer, start: 0, end, ended: false }
    }

    fn pending(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether there is, or can be made, room to read into.
    fn has_room(&self) -> bool {
        !self.ended && (self.is_empty() || self.end < self.buffer.len())
    }

    /// Reads what is there; how many bytes. Nothing with `ended` set is the end.
    fn read(&mut self, mut stream: &TcpStream) -> io::Result<usize> {
        if self.is_empty() {
            // It was filled at once before: this is no stream of small events.
            if self.end == self.buffer.len() && self.end < LARGE_BUFFER {
                self.buffer.resize(LARGE_BUFFER, 0);
            }
            (self.start, self.end) = (0, 0);
        }
        match stream.read(&mut self.buffer[self.end..]) {
            Ok(0) => {
                self.ended = true;
                Ok(0)
            }
            Ok(count) => {
                self.end += count;
                Ok(count)
            }
            Err(e) if is_later(&e) => Ok(0),
            Err(e) => Err(e),
        }
    }

    /// Writes what can be written.
    fn write(&mut self, mut stream: &TcpStream) -> io::Result<()> {
        while !self.is_empty() {
            match stream.write(&self.buffer[self.start..self.end]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.start += count,
                Err(e) if is_later(&e) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Adds to what is pending.
    fn push(&mut self, bytes: &[u8]) {
        let pending = [self.pending(), bytes].concat();
        self.replace(pending);
    }

    /// Replaces what is pending.
    fn replace(&mut self, bytes: Vec<u8>) {
        let ended = self.ended;
        *self = Flow::new(bytes);
        self.ended = ended;
    }
}

fn is_later(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// What is said of the connection of an event stream. One request is all it serves, as always; but
/// of a stream that breaks off, node's client says that it has ended well if `close` was said, and
/// OpenCode's SDK then does not connect again.
const STAYS_OPEN: &[u8] = b"Connection: keep-alive\r\nKeep-Alive: timeout=0\r\n";

fn is_event_stream(header: &httparse::Header<'_>) -> bool {
    header.name.eq_ignore_ascii_case("content-type") && header.value.starts_with(b"text/event-stream")
}

fn is_chunked(header: &httparse::Header<'_>) -> bool {
    header.name.eq_ignore_ascii_case("transfer-encoding") && header.value.eq_ignore_ascii_case(b"chunked")
}

/// How far the reply has come.
enum Reply {
    /// Its head is not whole yet.
    Head,
    /// Its body is being passed on.
    Body(Body),
    /// It was an upgrade: both directions are bytes.
    Tunnel,
}

/// A request and its reply on their way.
struct Exchange<'a> {
    client: &'a Client<'a>,
    upstream: &'a TcpStream,
    up: Flow,
    down: Flow,
    /// What is left of the body of the request.
    body: Body,
    /// What came behind the request: of a tunnel, if it becomes one, and nobody's else.
    early: &'a [u8],
    reply: Reply,
    /// Called when the head of the reply has come.
    replied: &'a dyn Fn(),
    is_upgrade: bool,
    /// The end of the client's side was passed on.
    half_closed: bool,
}

impl<'a> Exchange<'a> {
    fn new(
        client: &'a Client<'a>,
        upstream: &'a TcpStream,
        head: Vec<u8>,
        is_upgrade: bool,
        replied: &'a dyn Fn(),
    ) -> Result<Exchange<'a>> {
        let mut body = match client.request.framing {
            Framing::Length(length) => Body::length(length),
            Framing::Chunked => Body::chunked(),
        };
        let mut first = head;
        let belonging = body.advance(client.rest).map_err(bad_chunks)?;
        first.extend_from_slice(&client.rest[..belonging]);
        let failed = |e| Error::Internal(format!("cannot pass on: {e}"));
        client.stream.set_nonblocking(true).map_err(failed)?;
        for socket in [client.stream, upstream] {
            // Without it they work as well, only more slowly.
            let _ = set_socket_recv_buffer_size(socket, SOCKET_BUFFER);
            let _ = set_socket_send_buffer_size(socket, SOCKET_BUFFER);
        }
        Ok(Exchange {
            client,
            upstream,
            up: Flow::new(first),
            down: Flow::new(Vec::new()),
            body,
            early: &client.rest[belonging..],
            reply: Reply::Head,
            replied,
            is_upgrade,
            half_closed: false,
        })
    }

    /// Passes everything on until the end.
    fn run(mut self, deadline: Option<Instant>, stop: &Flag) -> Result<()> {
        // A new connection takes a head at once; what else happens is seen below.
        let _ = self.up.write(self.upstream);
        loop {
            let result = self.step(deadline, stop);
            match (result, &self.reply) {
                (Ok(true), _) => {}
                (Ok(false), _) => return Ok(()),
                // Nothing was answered yet: it can be said in words.
                (Err(e), Reply::Head) => return Err(e),
                (Err(_), Reply::Body(_) | Reply::Tunnel) => return Ok(()),
            }
        }
    }

    /// Waits for something to do and does it; whether there is more.
    fn step(&mut self, deadline: Option<Instant>, stop: &Flag) -> Result<bool> {
        let tunnel = matches!(self.reply, Reply::Tunnel);
        let reads_client = self.up.has_room() && (tunnel || !self.body.is_done());
        let mut client_events = PollFlags::empty();
        let mut upstream_events = PollFlags::empty();
        // The end of the client's side is seen without reading what must not be passed on.
        let waits_for_end = !self.half_closed && !tunnel && self.body.is_done() && self.up.is_empty();
        client_events.set(PollFlags::RDHUP, waits_for_end);
        client_events.set(PollFlags::IN, reads_client);
        client_events.set(PollFlags::OUT, !self.down.is_empty() && !matches!(self.reply, Reply::Head));
        upstream_events.set(PollFlags::IN, self.down.has_room());
        upstream_events.set(PollFlags::OUT, !self.up.is_empty());
        let waits_for_head = matches!(self.reply, Reply::Head);
        let timeout = match deadline.filter(|_| waits_for_head) {
            Some(deadline) => Some(remaining(deadline)?),
            None => None,
        };
        let client = self.client.stream;
        let mut fds = [
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(client.as_fd(), client_events),
            PollFd::from_borrowed_fd(self.upstream.as_fd(), upstream_events),
        ];
        // One that has ended, and of which nothing is wanted, would be ready for ever.
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
        // A client that has gone, and not only sends no more, wants no answer.
        if client_ready.intersects(gone) {
            return Ok(false);
        }
        if reads_client && client_ready.intersects(PollFlags::IN) {
            self.read_client()?;
        }
        if upstream_ready.intersects(PollFlags::IN | gone) && self.down.has_room() && !self.read_upstream()? {
            return Ok(false);
        }
        // Without another look whether it can be written: mostly it can.
        let sent = self.up.write(self.upstream);
        if let Err(e) = sent {
            // It may have answered before it closed; that is still to be read, or passed on.
            if self.down.ended && matches!(self.reply, Reply::Head) {
                return Err(broken(&e));
            }
            self.forget_client();
        }
        self.pass_end_of_client(client_ready.intersects(PollFlags::RDHUP));
        if waits_for_head && matches!(self.reply, Reply::Head) {
            return Ok(true);
        }
        if self.down.write(client).is_err() {
            return Ok(false);
        }
        Ok(!self.is_over())
    }

    /// What the client sends is for nobody any more.
    fn forget_client(&mut self) {
        self.up = Flow::new(Vec::new());
        self.up.ended = true;
        self.body = Body::length(0);
        self.half_closed = true;
    }

    /// Reads of the request what belongs to it.
    fn read_client(&mut self) -> Result<()> {
        let before = self.up.end - self.up.start;
        // A client that broke off is one that has ended.
        let count = self.up.read(self.client.stream).unwrap_or_else(|_| {
            self.up.ended = true;
            0
        });
        if !matches!(self.reply, Reply::Tunnel) {
            let new = &self.up.pending()[before..];
            let belonging = self.body.advance(new).map_err(bad_chunks)?;
            self.up.end -= count - belonging;
        }
        Ok(())
    }

    /// Reads of the reply; false when it broke off and nothing can be said any more.
    fn read_upstream(&mut self) -> Result<bool> {
        let before = self.down.end - self.down.start;
        match (self.down.read(self.upstream), &mut self.reply) {
            (Err(e), Reply::Head) => return Err(broken(&e)),
            // What came before is still to be passed on; nobody is there for what else comes.
            (Err(_), _) => {
                self.down.ended = true;
                self.forget_client();
            }
            (Ok(_), Reply::Head) => self.take_head()?,
            (Ok(_), Reply::Body(body)) => {
                let pending = self.down.pending();
                match body.advance(&pending[before.min(pending.len())..]) {
                    Ok(belonging) => self.down.end = self.down.start + before + belonging,
                    Err(_) => return Ok(false),
                }
            }
            (Ok(_), Reply::Tunnel) => {}
        }
        Ok(true)
    }

    /// Once the head of the reply is whole: makes it the client's.
    fn take_head(&mut self) -> Result<()> {
        loop {
            let pending = self.down.pending();
            let Some(at) = pending.windows(4).position(|bytes| bytes == b"\r\n\r\n") else {
                if pending.len() >= REPLY_HEAD_LIMIT {
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
            let (head, rest) = pending.split_at(at + 4);
            let reply = parse_reply_head(head, self.client.request.method);
            let reply = reply.map_err(|e| Error::OpencodeFault(format!("its reply is not HTTP: {e}")))?;
            let mut bytes = self.reply_head(head, reply.status);
            if (100..200).contains(&reply.status) && reply.status != 101 {
                // 100 Continue: the reply is still to come, and this is for the client at once.
                let mut stream = self.client.stream;
                let _ = stream.write(&bytes);
                let rest = rest.to_vec();
                self.down.replace(rest);
                continue;
            }
            (self.replied)();
            let mut body = reply.body;
            self.reply = if reply.status == 101 && self.is_upgrade {
                bytes.extend_from_slice(rest);
                self.up.push(self.early);
                Reply::Tunnel
            } else {
                let broken = |e| Error::OpencodeFault(format!("its reply is not HTTP: {e}"));
                let belonging = body.advance(rest).map_err(broken)?;
                bytes.extend_from_slice(&rest[..belonging]);
                Reply::Body(body)
            };
            self.down.replace(bytes);
            return Ok(());
        }
    }

    /// The head of the reply as the client gets it.
    fn reply_head(&self, head: &[u8], status: u16) -> Vec<u8> {
        let mut headers = [httparse::EMPTY_HEADER; HEADER_LIMIT];
        let mut parsed = httparse::Response::new(&mut headers);
        let _ = parsed.parse(head); // it was understood before
        let line = head.iter().position(|byte| *byte == b'\n').map_or(head.len(), |at| at + 1);
        let mut bytes = head[..line].to_vec();
        let is_tunnel = status == 101 && self.is_upgrade;
        for header in parsed.headers.iter() {
            let cors = self.client.origin.is_some()
                && (header.name.to_ascii_lowercase().starts_with("access-control-")
                    || header.name.eq_ignore_ascii_case("vary"));
            if !cors && (is_tunnel || !is_hop_by_hop(header.name)) {
                push_header(&mut bytes, header);
            }
        }
        if !is_tunnel && status >= 200 {
            // One that ends with the connection has to say so.
            let is_stream = parsed.headers.iter().any(is_event_stream) && parsed.headers.iter().any(is_chunked);
            let asked_to_close = self.client.request.has_token("connection", "close");
            bytes.extend_from_slice(if is_stream && !asked_to_close { STAYS_OPEN } else { b"Connection: close\r\n" });
        }
        bytes.extend_from_slice(cors_headers(self.client.origin).as_bytes());
        bytes.extend_from_slice(b"\r\n");
        bytes
    }

    /// Passes on, once and after all that came before it, that the client sends no more.
    fn pass_end_of_client(&mut self, hung_up: bool) {
        // What it has sent before its end is still to be read.
        let body_is_over = self.body.is_done() && !matches!(self.reply, Reply::Tunnel);
        let ended = self.up.ended || (hung_up && body_is_over);
        if ended && !self.half_closed && self.up.is_empty() {
            self.half_closed = true;
            let _ = self.upstream.shutdown(Shutdown::Write);
        }
    }

    /// Whether all is passed on.
    fn is_over(&mut self) -> bool {
        if !self.down.is_empty() {
            return false;
        }
        match &self.reply {
            Reply::Head => false,
            Reply::Body(body) => body.is_done() || self.down.ended,
            Reply::Tunnel => {
                if self.down.ended {
                    let _ = self.client.stream.shutdown(Shutdown::Write);
                }
                self.down.ended && (self.up.ended && self.up.is_empty())
            }
        }
    }
}

/// How long until the deadline.
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
    Error::BadRequest(format!("the body is not as it is framed: {e}"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{split, target};

    #[test]
    fn only_the_directory_is_taken_out_of_a_target() {
        for (given, selector, passed) in [
            ("/w/a", "a", "/"),
            ("/w/a?x=1", "a", "/?x=1"),
            ("/w/a/session?limit=2", "a", "/session?limit=2"),
            ("/w/a/s?directory=/x", "a", "/s"),
            ("/w/a/s?a=%20&directory=%2Fx&b", "a", "/s?a=%20&b"),
            ("/w/a/s?%64irectory=/x&location%5Bdirectory%5D=/y&q=directory", "a", "/s?q=directory"),
            ("/w/a/session?directory=/x&limit=2", "a", "/session?limit=2&directory=%252Fhome%252Fme"),
            ("/w/a/../b//c/%2e%2e", "a", "/../b//c/%2e%2e"),
            ("/w/%2Fhome%2Fme/x", "/home/me", "/x"),
            ("/w//x", "", "/x"),
        ] {
            let (found, path, query) = split(given).unwrap();
            let target = target(path, query, Path::new("/home/me"));
            assert_eq!((found.as_str(), target.as_str()), (selector, passed), "{given}");
        }
        for bad in ["/w/%zz/x", "/w/%ff/x", "/w/-/x"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}
