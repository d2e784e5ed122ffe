//! HTTP/1.1 as a client, and what both sides need of its spelling: percent-encoding, Basic
//! credentials.
//!
//! Why not a client library: every byte we send to opencode carries its password, so the
//! connection must be made first and proved to be opencode's own before anything is written to
//! it (`daemon/engine.rs`), and a routed request is passed on byte by byte over the same kind of
//! connection. What is left for a library after that is this page.
//!
//! One request per connection (`Connection: close`), no proxies, no redirects. Source of the
//! format: RFC 9112.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The largest head of a reply, in bytes; opencode's are below 1 KB.
const HEAD_LIMIT: usize = 64 * 1024;
/// The most header lines of a reply.
pub const HEADER_LIMIT: usize = 128;

/// A socket whose reads and writes can be given a time limit.
pub trait Socket: Read + Write {
    /// Limits each following read and write; `None` waits for ever.
    fn limit(&self, limit: Option<Duration>) -> io::Result<()>;
}

impl Socket for TcpStream {
    fn limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)?;
        self.set_write_timeout(limit)
    }
}

impl Socket for &TcpStream {
    fn limit(&self, limit: Option<Duration>) -> io::Result<()> {
        (**self).limit(limit)
    }
}

impl Socket for UnixStream {
    fn limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)?;
        self.set_write_timeout(limit)
    }
}

/// A socket that fails with `TimedOut` after the deadline, however slowly bytes come.
pub struct Timed<S> {
    /// The socket.
    pub socket: S,
    /// `None` waits for ever.
    pub deadline: Option<Instant>,
}

impl<S: Socket> Timed<S> {
    /// Wraps a socket.
    pub fn new(socket: S, deadline: Option<Instant>) -> Timed<S> {
        Timed { socket, deadline }
    }

    fn limit(&self) -> io::Result<()> {
        let Some(deadline) = self.deadline else { return self.socket.limit(None) };
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.limit(Some(rest))
    }

    /// Makes a call of the kernel's within the rest of the time.
    fn within(&mut self, mut call: impl FnMut(&mut S) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            self.limit()?;
            match call(&mut self.socket) {
                // A socket with a time limit is interrupted by Ctrl-Z and fg too.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The kernel's name for its time limit is "would block".
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
                other => return other,
            }
        }
    }
}

impl<S: Socket + Read> Read for Timed<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.within(|socket| socket.read(buffer))
    }
}

impl<S: Socket + Write> Write for Timed<S> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.within(|socket| socket.write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// A request without its body.
pub struct Request<'a> {
    /// Upper case.
    pub method: &'a str,
    /// In origin form, encoded.
    pub target: &'a str,
    /// Sent as they are; `Host` and `Connection` are added.
    pub headers: &'a [(&'a str, &'a str)],
}

impl Request<'_> {
    /// The bytes of its head.
    pub fn head(&self, host: &str) -> Vec<u8> {
        let mut head = format!("{} {} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n", self.method, self.target);
        for (name, value) in self.headers {
            head.push_str(name);
            head.push_str(": ");
            head.push_str(value);
            head.push_str("\r\n");
        }
        head.push_str("\r\n");
        head.into_bytes()
    }
}

/// How a body is framed, and how far it has come. It says of bytes as they pass which belong to
/// the body: nothing is decoded or kept.
pub struct Body(Framed);

enum Framed {
    /// So many bytes are missing.
    Length(u64),
    Chunked(Chunks),
    /// Until the connection ends.
    ToEnd,
}

/// Where in a chunked body we are (RFC 9112, 7.1).
struct Chunks {
    at: Chunk,
    /// Bytes of extensions and trailers, which are nobody's and have no other bound.
    extra: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Chunk {
    /// In the digits of a size.
    Size { size: u64, digits: u8 },
    /// Behind the digits of this size.
    Extension(u64),
    /// Before the line feed behind this size.
    SizeEnd(u64),
    /// So many bytes of data are missing.
    Data(u64),
    /// Before the line feed behind the data.
    DataEnd,
    /// At the start of a trailer line, or of the end.
    TrailerStart,
    /// In a trailer line.
    Trailer,
    /// Before the line feed of a trailer line.
    TrailerEnd,
    /// Before the last line feed.
    LastEnd,
    /// Behind it.
    Done,
}

/// The most bytes of extensions and trailers of a body.
const EXTRA_LIMIT: usize = 16 * 1024;

impl Body {
    /// A body of so many bytes.
    pub fn length(length: u64) -> Body {
        Body(Framed::Length(length))
    }

    /// A body in chunks.
    pub fn chunked() -> Body {
        Body(Framed::Chunked(Chunks { at: Chunk::Size { size: 0, digits: 0 }, extra: 0 }))
    }

    /// A body that ends with the connection.
    pub fn to_end() -> Body {
        Body(Framed::ToEnd)
    }

    /// Whether all of it has come; one that ends with the connection never says so.
    pub fn is_done(&self) -> bool {
        match &self.0 {
            Framed::Length(missing) => *missing == 0,
            Framed::Chunked(chunks) => chunks.at == Chunk::Done,
            Framed::ToEnd => false,
        }
    }

    /// Whether the end of the connection would be its end.
    pub fn may_end_here(&self) -> bool {
        matches!(self.0, Framed::ToEnd) || self.is_done()
    }

    /// How many of these bytes, the next that came, belong to the body.
    ///
    /// # Errors
    /// `InvalidData` when the chunks are not well formed.
    pub fn advance(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut count = 0;
        while count < bytes.len() && !self.is_done() {
            count += self.step(&bytes[count..])?.0;
        }
        Ok(count)
    }

    /// The same for the first bytes of one kind: how many, and whether they are content.
    fn step(&mut self, bytes: &[u8]) -> io::Result<(usize, bool)> {
        let available = bytes.len() as u64;
        match &mut self.0 {
            Framed::ToEnd => Ok((bytes.len(), true)),
            Framed::Length(missing) => {
                let count = available.min(*missing);
                *missing -= count;
                Ok((count as usize, true))
            }
            Framed::Chunked(Chunks { at: Chunk::Data(missing), .. }) if *missing > 0 => {
                let count = available.min(*missing);
                *missing -= count;
                Ok((count as usize, true))
            }
            Framed::Chunked(chunks) => {
                chunks.framing(bytes[0])?;
                Ok((1, false))
            }
        }
    }
}

impl Chunks {
    /// Takes a byte that is not content.
    fn framing(&mut self, byte: u8) -> io::Result<()> {
        let malformed = || Err(invalid("malformed chunks"));
        self.at = match (self.at, byte) {
            (Chunk::Data(0), b'\r') => Chunk::DataEnd,
            (Chunk::DataEnd, b'\n') => Chunk::Size { size: 0, digits: 0 },
            (Chunk::Size { size, digits: 1.. }, b'\r') | (Chunk::Extension(size), b'\r') => Chunk::SizeEnd(size),
            (Chunk::Size { size, digits: 1.. }, b';' | b' ' | b'\t') => Chunk::Extension(size),
            (Chunk::Size { size, digits }, byte) => match char::from(byte).to_digit(16) {
                // 15 digits are more than a disk holds, and cannot overflow.
                Some(digit) if digits < 15 => Chunk::Size { size: size << 4 | u64::from(digit), digits: digits + 1 },
                Some(_) | None => return malformed(),
            },
            (Chunk::SizeEnd(0), b'\n') => Chunk::TrailerStart,
            (Chunk::SizeEnd(size), b'\n') => Chunk::Data(size),
            (Chunk::TrailerStart, b'\r') => Chunk::LastEnd,
            (Chunk::Trailer, b'\r') => Chunk::TrailerEnd,
            (Chunk::TrailerEnd, b'\n') => Chunk::TrailerStart,
            (Chunk::LastEnd, b'\n') => Chunk::Done,
            (at @ Chunk::Extension(_), byte) | (at @ (Chunk::TrailerStart | Chunk::Trailer), byte)
                if byte != b'\n' && self.extra < EXTRA_LIMIT =>
            {
                self.extra += 1;
                if at == Chunk::TrailerStart { Chunk::Trailer } else { at }
            }
            _ => return malformed(),
        };
        Ok(())
    }
}

/// The most memory that is taken for a body before it has come. Bytes.
const PROMISE_LIMIT: u64 = 4 * 1024 * 1024;

/// A reply whose head has come; the body is read from it.
pub struct Response<S: Read> {
    /// 200 to 599, or 101.
    pub status: u16,
    /// The head as it came.
    pub head: Vec<u8>,
    headers: Vec<(String, String)>,
    body: Body,
    reader: BufReader<S>,
}

impl<S: Read> Response<S> {
    /// Reads the head of a reply to a request of this method.
    ///
    /// # Errors
    /// `UnexpectedEof` when the other side closes first, `InvalidData` when it is not HTTP.
    pub fn read(socket: S, method: &str) -> io::Result<Response<S>> {
        let mut reader = BufReader::with_capacity(16 * 1024, socket);
        loop {
            let head = read_head(&mut reader)?;
            let ReplyHead { status, headers, body } = parse_reply_head(&head, method)?;
            // 100 Continue and its kind come before the reply; an upgrade is one.
            if status >= 200 || status == 101 {
                return Ok(Response { status, head, headers, body, reader });
            }
        }
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    /// The socket it comes from.
    pub fn socket_mut(&mut self) -> &mut S {
        self.reader.get_mut()
    }

    /// The whole body, if it is no longer than `limit` bytes.
    ///
    /// # Errors
    /// `UnexpectedEof` when it is cut short, `InvalidData` when it is longer.
    pub fn bytes(mut self, limit: usize) -> io::Result<Vec<u8>> {
        let expected = if let Framed::Length(length) = self.body.0 { length.min(PROMISE_LIMIT) } else { 0 };
        let mut bytes = Vec::with_capacity(expected as usize);
        self.by_ref().take(limit as u64 + 1).read_to_end(&mut bytes)?;
        if bytes.len() > limit { Err(invalid("a body over the limit")) } else { Ok(bytes) }
    }
}

/// The content of the body, without its framing.
impl<S: Read> Read for Response<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.body.is_done() && !buffer.is_empty() {
            // Into its place at once: a long body is read in large pieces.
            if let Framed::Length(missing) = &mut self.body.0 {
                let wanted = usize::try_from(*missing).unwrap_or(usize::MAX).min(buffer.len());
                let count = self.reader.read(&mut buffer[..wanted])?;
                *missing -= count as u64;
                return if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(count) };
            }
            let available = self.reader.fill_buf()?;
            if available.is_empty() {
                return if self.body.may_end_here() { Ok(0) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
            let available = &available[..available.len().min(buffer.len())];
            let (count, is_content) = self.body.step(available)?;
            if is_content {
                buffer[..count].copy_from_slice(&available[..count]);
            }
            self.reader.consume(count);
            if is_content {
                return Ok(count);
            }
        }
        Ok(0)
    }
}

/// Whether a content type is `application/json`, with or without parameters.
pub fn is_json(content_type: &str) -> bool {
    content_type.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn read_head(reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let limit = (HEAD_LIMIT - head.len()) as u64;
        if limit == 0 {
            return Err(invalid("a head over the limit"));
        }
        if reader.by_ref().take(limit).read_until(b'\n', &mut head)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(head)
}

/// What the head of a reply says.
pub struct ReplyHead {
    /// 100 to 599.
    pub status: u16,
    /// How what follows is framed.
    pub body: Body,
    headers: Vec<(String, String)>,
}

/// Understands the head of a reply to a request of this method.
///
/// # Errors
/// `InvalidData` when it is not HTTP.
pub fn parse_reply_head(head: &[u8], method: &str) -> io::Result<ReplyHead> {
    let mut headers = [httparse::EMPTY_HEADER; HEADER_LIMIT];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response.parse(head).map_err(|e| invalid(&e.to_string()))?;
    let (httparse::Status::Complete(_), Some(status)) = (parsed, response.code) else {
        return Err(invalid("a head that is not whole"));
    };
    let owned =
        |header: &httparse::Header<'_>| (header.name.to_owned(), String::from_utf8_lossy(header.value).into_owned());
    let headers: Vec<(String, String)> = response.headers.iter().map(owned).collect();
    let body = if method == "HEAD" || status < 200 || matches!(status, 204 | 304) {
        Body::length(0)
    } else if find(&headers, "transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        Body::chunked()
    } else if let Some(length) = find(&headers, "content-length") {
        Body::length(length.parse().map_err(|_| invalid("a length that is no number"))?)
    } else {
        Body::to_end()
    };
    Ok(ReplyHead { status, body, headers })
}

fn find<'h>(headers: &'h [(String, String)], name: &str) -> Option<&'h str> {
    headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

/// The value of an `Authorization` header with Basic credentials (RFC 7617).
pub fn basic(user: &str, password: &str) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut value = String::from("Basic ");
    for chunk in format!("{user}:{password}").as_bytes().chunks(3) {
        let group = chunk.iter().fold(0u32, |group, byte| group << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let digit_value = (group >> (18 - 6 * digit) & 63) as usize;
            value.push(if digit <= chunk.len() { char::from(ALPHABET[digit_value]) } else { '=' });
        }
    }
    value
}

/// Percent-encodes everything but unreserved characters (RFC 3986, 2.3).
pub fn percent_encode(bytes: &[u8]) -> String {
    let mut encoded = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Undoes percent-encoding; `None` for a `%` without two hex digits. `+` is a plus.
pub fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let (high, low) = (bytes.next()?, bytes.next()?);
                let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
                digit(high)? << 4 | digit(low)?
            }
            other => other,
        });
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_credentials_are_base64() {
        assert_eq!(basic("Aladdin", "open sesame"), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(basic("a", "b"), "Basic YTpi");
        assert_eq!(basic("", "bc"), "Basic OmJj");
        assert_eq!(basic("ab", "c"), "Basic YWI6Yw==");
    }

    #[test]
    fn percent_coding_is_reversible() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(percent_decode(&percent_encode(&bytes)).unwrap(), bytes);
        assert_eq!(percent_encode("/a b+é%".as_bytes()), "%2Fa%20b%2B%C3%A9%25");
        for bad in ["%", "%2", "%zz", "a%+1"] {
            assert_eq!(percent_decode(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_body_ends_where_its_framing_says() {
        let chunked = b"5;x=y\r\nhello\r\n0A \r\n0123456789\r\n0\r\nA: b\r\n\r\nGET / HTTP/1.1\r\n";
        let end = chunked.len() - b"GET / HTTP/1.1\r\n".len();
        // In one piece, and in any two.
        for cut in 0..chunked.len() {
            let mut body = Body::chunked();
            let first = body.advance(&chunked[..cut]).unwrap();
            assert_eq!(first, cut.min(end));
            let second = if body.is_done() { 0 } else { body.advance(&chunked[cut..]).unwrap() };
            assert_eq!(first + second, end, "cut at {cut}");
            assert!(body.is_done());
        }
        for bad in ["\r\n", "x\r\n", "-1\r\n", "5\n", "1\r\nab", "0\r\n\n", "1000000000000000\r\n", "1\r\na\n", ";\r\n"]
        {
            assert!(Body::chunked().advance(bad.as_bytes()).is_err(), "{bad:?}");
        }
        let endless = format!("1;{}", "x".repeat(EXTRA_LIMIT + 1));
        assert!(Body::chunked().advance(endless.as_bytes()).is_err());
        assert_eq!(Body::length(3).advance(b"abcd").unwrap(), 3);
        assert_eq!(Body::to_end().advance(b"abcd").unwrap(), 4);
    }

    #[test]
    fn replies_are_read_as_they_are_framed() {
        let read = |text: &'static str, method| Response::read(text.as_bytes(), method).unwrap().bytes(100);
        assert_eq!(read("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabcd", "GET").unwrap(), b"ab");
        assert_eq!(
            read("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "GET").unwrap(),
            b"abc"
        );
        assert_eq!(read("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nxyz", "GET").unwrap(), b"xyz");
        assert_eq!(read("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", "HEAD").unwrap(), b"");
        assert!(read("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", "GET").is_err(), "cut short");
        assert!(Response::read("nonsense\r\n\r\n".as_bytes(), "GET").is_err());
        assert!(Response::read("HTTP/1.1 200 OK\r\n".as_bytes(), "GET").is_err());
    }
}
