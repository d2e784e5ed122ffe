//! An HTTP/1.1 client for the tests, the soak and the benchmark: one request per connection, unless
//! [`Request::send_on`] is used, sent exactly as described. It depends on nothing else of the harness.

use std::fmt;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Far longer than any reply takes, so that only a hang reaches it.
const DEADLINE: Duration = Duration::from_secs(90);

/// The address of a server on 127.0.0.1.
pub fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

pub fn connect(port: u16) -> TcpStream {
    try_connect(local(port)).expect("connecting")
}

fn try_connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    Ok(stream)
}

// --- Requests ---

#[derive(Clone)]
pub struct Request {
    address: SocketAddr,
    pub method: String,
    pub target: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

/// Why a request got no reply.
#[derive(Debug)]
pub enum NoReply {
    /// The connection was refused: nothing was sent.
    NotConnected(io::Error),
    /// The connection ended or stalled after these bytes of a reply.
    CutOff(Vec<u8>),
}

impl fmt::Display for NoReply {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            NoReply::NotConnected(error) => write!(f, "not connected: {error}"),
            NoReply::CutOff(bytes) => write!(f, "cut off after {:?}", String::from_utf8_lossy(bytes)),
        }
    }
}

impl Request {
    pub fn new(address: SocketAddr, method: &str, target: &str) -> Request {
        let headers = vec![("Host".to_owned(), address.to_string())];
        Request { address, method: method.to_owned(), target: target.to_owned(), headers, body: Vec::new() }
    }

    /// Sets a header, replacing any of the same name.
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.retain(|(key, _)| !key.eq_ignore_ascii_case(name));
        self.and_header(name, value)
    }

    /// Adds a header beside any of the same name.
    pub fn and_header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        self.body = body.as_ref().to_vec();
        self
    }

    pub fn json(self, value: &Value) -> Self {
        self.header("Content-Type", "application/json").body(value.to_string())
    }

    fn bytes(&self) -> Vec<u8> {
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let has_length = self.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        if !has_length && (self.method != "GET" || !self.body.is_empty()) {
            head.push_str(&format!("Content-Length: {}\r\n", self.body.len()));
        }
        head.push_str("\r\n");
        [head.as_bytes(), &self.body].concat()
    }

    /// Connects and sends the request, without reading the reply.
    pub fn open(&self) -> io::Result<TcpStream> {
        let mut stream = try_connect(self.address)?;
        // A server may refuse without reading the whole request.
        let _ = stream.write_all(&self.bytes());
        Ok(stream)
    }

    pub fn send(&self) -> Result<Reply, NoReply> {
        let mut stream = self.open().map_err(NoReply::NotConnected)?;
        read_reply(&mut stream, &self.method)
    }

    /// Sends the request on a connection that has served others, and leaves it open.
    pub fn send_on(&self, stream: &mut TcpStream) -> Result<Reply, NoReply> {
        let _ = stream.write_all(&self.bytes());
        read_reply(stream, &self.method)
    }

    /// Opens a stream of server-sent events, and reads the head of the reply.
    pub fn events(&self) -> (Reply, Events) {
        let mut reader = BufReader::new(self.open().expect("connecting"));
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") && reader.read_until(b'\n', &mut head).expect("a head") > 0 {}
        let reply = Reply::parse(&head).expect("the head of a reply");
        let content_type = reply.header("content-type").unwrap_or_default();
        assert!(reply.status == 200 && content_type.starts_with("text/event-stream"), "{reply:?}");
        (reply, Events { reader })
    }
}

// --- Replies ---

#[derive(Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    /// As received, including chunk framing; [`Reply::whole_body`] removes that.
    pub body: Vec<u8>,
}

impl Reply {
    /// None while the head is incomplete.
    pub fn parse(bytes: &[u8]) -> Option<Reply> {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
        let head = std::str::from_utf8(&bytes[..end]).ok()?;
        let mut lines = head.split("\r\n");
        let status = lines.next()?.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
        let headers = lines.filter_map(|line| line.split_once(": "));
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Some(Reply { status, headers, body: bytes[end + 4..].to_vec() })
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    fn length(&self) -> Option<usize> {
        self.header("content-length")?.parse().ok()
    }

    fn is_chunked(&self) -> bool {
        self.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"))
    }

    /// The connection stays open for another request.
    pub fn is_kept(&self) -> bool {
        self.header("connection") == Some("keep-alive") && self.header("keep-alive") == Some("timeout=10")
    }

    /// The body without its framing; `None` while it is incomplete. Without length or chunks it ends with
    /// the connection.
    pub fn whole_body(&self) -> Option<Vec<u8>> {
        if let Some(length) = self.length() {
            return (self.body.len() >= length).then(|| self.body[..length].to_vec());
        }
        if !self.is_chunked() {
            return Some(self.body.clone());
        }
        let (mut rest, mut body) = (&self.body[..], Vec::new());
        loop {
            let end = rest.windows(2).position(|two| two == b"\r\n")?;
            let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).ok()?, 16).ok()?;
            if size == 0 {
                return rest.ends_with(b"\r\n\r\n").then_some(body);
            }
            body.extend(rest.get(end + 2..end + 2 + size)?);
            rest = rest.get(end + 2 + size + 2..)?;
        }
    }

    pub fn json(&self) -> Value {
        let body = self.whole_body().unwrap_or_else(|| panic!("half a body: {self:?}"));
        serde_json::from_slice(&body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The error code, if this reply is an error.
    pub fn error_code(&self) -> Option<String> {
        let value: Value = serde_json::from_slice(&self.whole_body()?).ok()?;
        value["error"]["code"].as_str().map(str::to_owned)
    }

    /// Asserts that the request is refused with this status and code. Returns the error.
    pub fn refused(&self, status: u16, code: &str) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        let value = self.json();
        assert_eq!((&value["ok"], &value["error"]["code"]), (&false.into(), &code.into()), "{self:?}");
        check_error(&value["error"]);
        value["error"].clone()
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} {:?} {}", self.status, self.headers, String::from_utf8_lossy(&self.body))
    }
}

/// Checks the rules for every error, on the command line and over HTTP.
pub fn check_error(error: &Value) {
    let message = error["message"].as_str().expect("a message");
    assert!(!message.is_empty() && !message.ends_with('.'), "{message:?}");
    assert!(error.get("hint").is_none_or(|hint| hint.as_str().is_some_and(|hint| !hint.is_empty())), "{error}");
}

/// Reads one reply by its framing, or else to the end of the connection. The server may keep the
/// connection open.
pub fn read_reply(stream: &mut TcpStream, method: &str) -> Result<Reply, NoReply> {
    let (mut head, mut buffer) = (Vec::new(), [0; 16 * 1024]);
    let mut reply: Option<Reply> = None;
    loop {
        if let Some(reply) = &reply {
            let has_no_body = method == "HEAD" || matches!(reply.status, 204 | 304);
            let is_framed = reply.is_chunked() || reply.length().is_some();
            let is_whole = match reply.length() {
                Some(length) => reply.body.len() >= length,
                None => reply.is_chunked() && reply.body.ends_with(b"\r\n\r\n") && reply.whole_body().is_some(),
            };
            if has_no_body || (is_framed && is_whole) {
                return Ok(reply.clone());
            }
        }
        let count = match stream.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // A reset may follow a complete reply.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            Err(_) => return Err(NoReply::CutOff(head)),
        };
        if count == 0 {
            let whole = reply.filter(|reply| reply.whole_body().is_some());
            return whole.ok_or(NoReply::CutOff(head));
        }
        match &mut reply {
            Some(reply) => reply.body.extend(&buffer[..count]),
            None => {
                head.extend(&buffer[..count]);
                reply = Reply::parse(&head);
            }
        }
    }
}

/// The reply at the start of these bytes, after any interim ones, once it is whole.
pub fn whole_reply(mut bytes: &[u8], method: &str) -> Option<Reply> {
    loop {
        let reply = Reply::parse(bytes)?;
        let has_no_body = method == "HEAD" || matches!(reply.status, 204 | 304);
        match reply.status {
            100 | 102.. if reply.status < 200 => bytes = &bytes[bytes.len() - reply.body.len()..],
            _ if has_no_body || reply.whole_body().is_some() => return Some(reply),
            _ => return None,
        }
    }
}

/// Reads until the other side closes or resets the connection.
pub fn read_to_close(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return bytes,
            Ok(count) => bytes.extend(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return bytes,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("the connection is left open: {error}, after {bytes:?}"),
        }
    }
}

/// A stream of server-sent events whose data is JSON.
pub struct Events {
    reader: BufReader<TcpStream>,
}

impl Events {
    /// The next event for which `holds` is true; `None` if the stream ends first.
    pub fn find(&mut self, holds: impl Fn(&Value) -> bool) -> Option<Value> {
        // Comments go on for ever: the time limit of the socket alone never ends the wait.
        let deadline = Instant::now() + DEADLINE;
        let mut line = String::new();
        while self.reader.read_line(&mut line).expect("an event before the deadline") > 0 {
            // The stream ended in the middle of a line.
            if !line.ends_with('\n') {
                return None;
            }
            let event = line.strip_prefix("data: ").map(|data| serde_json::from_str(data).unwrap());
            if let Some(event) = event.filter(&holds) {
                return Some(event);
            }
            assert!(Instant::now() < deadline, "no such event before the deadline");
            line.clear();
        }
        None
    }
}

/// The `Authorization` header for a user and a password.
pub fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64(&format!("{user}:{password}")))
}

pub fn base64(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in text.as_bytes().chunks(3) {
        let bytes = [0, 1, 2].map(|at| u32::from(*group.get(at).unwrap_or(&0)));
        let bits = bytes[0] << 16 | bytes[1] << 8 | bytes[2];
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) & 63;
            out.push(if digit <= group.len() { DIGITS[value as usize] as char } else { '=' });
        }
    }
    out
}
