//! HTTP/1.1 as `openwork api` passes it through: the caller's headers and body go out as they are, and
//! the head and body of the reply come back as they were sent. Other calls go through `agent`.
//!
//! One request per connection (`Connection: close`). Source of the format: RFC 9112.

use std::io::{self, BufRead, BufReader, Read};

use crate::framing::{Body, ReplyHead, header_room, invalid};
use crate::wire::ERROR_HEADER;

/// The largest head of a reply; opencode's are below 1 KB. Bytes.
const HEAD_LIMIT: usize = 64 * 1024;

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

/// The most memory that is reserved for a body before it arrives. Bytes.
const PREALLOCATION_LIMIT: u64 = 4 * 1024 * 1024;

/// A reply after its head has arrived; the body is read from it.
pub struct Response<S: Read> {
    /// 200 to 599, or 101.
    pub status: u16,
    /// The head, unchanged.
    pub head: Vec<u8>,
    /// The code of an error of openwork itself.
    pub error_code: Option<String>,
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
            let mut room = header_room();
            let reply = ReplyHead::parse(&head, method, &mut room)?;
            let error_code = reply.header(ERROR_HEADER).map(|code| String::from_utf8_lossy(code).into_owned());
            let ReplyHead { status, body, .. } = reply;
            // Interim replies such as 100 Continue precede the reply; 101 is the reply to an upgrade.
            if status >= 200 || status == 101 {
                return Ok(Response { status, head, error_code, body, reader });
            }
        }
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
        let expected = self.body.missing().map_or(0, |length| length.min(PREALLOCATION_LIMIT));
        let mut bytes = Vec::with_capacity(expected as usize);
        self.by_ref().take(limit as u64 + 1).read_to_end(&mut bytes)?;
        if bytes.len() > limit { Err(invalid("a body over the limit")) } else { Ok(bytes) }
    }
}

/// The content of the body, without its framing.
impl<S: Read> Read for Response<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.body.is_done() && !buffer.is_empty() {
            // Read directly into the caller's buffer, so that a long body takes few reads.
            if let Some(missing) = self.body.missing() {
                let wanted = usize::try_from(missing).unwrap_or(usize::MAX).min(buffer.len());
                let count = self.reader.read(&mut buffer[..wanted])?;
                self.body.advance(&buffer[..count])?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read_by_their_framing() {
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
        let long = |length| format!("HTTP/1.1 200 OK\r\nX: {}\r\nContent-Length: 0\r\n\r\n", "x".repeat(length));
        assert_eq!(Response::read(long(60_000).as_bytes(), "GET").unwrap().head, long(60_000).as_bytes());
        assert!(Response::read(long(70_000).as_bytes(), "GET").is_err());
    }
}
