//! The head of a request, understood or refused.
//!
//! Invariant: a head has exactly one reading (no smuggling). What another server might read
//! otherwise, bare line feeds, two lengths, a length and a coding, is refused; what is passed on is
//! written anew from what was understood.
//!
//! Source of the format: RFC 9112.

use crate::error::{Error, Result};
use crate::wire::BODY_LIMIT;

/// The most header lines; as many as common servers allow.
pub const HEADER_LIMIT: usize = 100;

/// A head that was understood. Header names are compared without case.
pub struct Head<'h> {
    /// As it came; any token.
    pub method: &'h str,
    /// In origin form: begins with `/`, visible ASCII only.
    pub target: &'h str,
    /// As they came.
    pub headers: &'h [httparse::Header<'h>],
    /// Of HTTP/1: 0 or 1.
    pub version: u8,
    /// How the body is framed.
    pub framing: Framing,
}

/// How a body is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// So many bytes; 0 when nothing is said.
    Length(u64),
    /// In chunks.
    Chunked,
}

impl<'h> Head<'h> {
    /// Understands a head, or refuses it: one reading only.
    ///
    /// # Errors
    /// `bad_request`; `too_large` for too many headers or an impossible length.
    pub fn parse(head: &'h [u8], headers: &'h mut [httparse::Header<'h>]) -> Result<Head<'h>> {
        let bad = |why: &str| Error::BadRequest(why.to_owned());
        // The parser takes bare line feeds; another server behind or before us may not.
        let bare = |pair: &[u8]| (pair[1] == b'\n') != (pair[0] == b'\r');
        if head.first() == Some(&b'\n') || head.windows(2).any(bare) {
            return Err(bad("lines must end with CR LF"));
        }
        let mut request = httparse::Request::new(headers);
        match request.parse(head) {
            Ok(httparse::Status::Complete(_)) => {}
            Ok(httparse::Status::Partial) => return Err(bad("the head is not whole")),
            Err(httparse::Error::TooManyHeaders) => {
                return Err(Error::TooLarge { what: "number of headers", limit: HEADER_LIMIT, status: 431 });
            }
            Err(e) => return Err(Error::BadRequest(format!("not an HTTP request: {e}"))),
        }
        let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version) else {
            return Err(bad("the head is not whole"));
        };
        if !target.starts_with('/') || !target.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(bad("the request target must be a path of visible ASCII"));
        }
        let mut head = Head { method, target, headers: request.headers, version, framing: Framing::Length(0) };
        head.framing = head.find_framing()?;
        Ok(head)
    }

    fn find_framing(&self) -> Result<Framing> {
        let bad = |why: &str| Error::BadRequest(why.to_owned());
        match (self.only("transfer-encoding")?, self.only("content-length")?) {
            (Some(_), Some(_)) => Err(bad("both Content-Length and Transfer-Encoding")),
            (Some(coding), None) if self.version == 1 && coding.eq_ignore_ascii_case("chunked") => Ok(Framing::Chunked),
            (Some(_), None) => Err(bad("the only transfer coding is chunked, with HTTP/1.1")),
            (None, Some(length)) if !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit()) => {
                let too_large = Error::TooLarge { what: "body", limit: BODY_LIMIT, status: 413 };
                length.parse().map(Framing::Length).map_err(|_| too_large)
            }
            (None, Some(_)) => Err(bad("Content-Length must be a number")),
            (None, None) => Ok(Framing::Length(0)),
        }
    }

    /// The path of the target, without its query.
    pub fn path(&self) -> &'h str {
        self.target.split_once('?').map_or(self.target, |(path, _)| path)
    }

    /// Whether a header with a list of tokens has this one.
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        let values = self.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
        let mut tokens = values.flat_map(|header| header.value.split(|byte| *byte == b','));
        tokens.any(|given| given.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
    }

    /// The value of a header that may stand there once.
    ///
    /// # Errors
    /// `bad_request` when it stands there twice, or is not visible ASCII.
    pub fn only(&self, name: &str) -> Result<Option<&'h str>> {
        let mut found = self.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
        let Some(first) = found.next() else { return Ok(None) };
        if found.next().is_some() {
            return Err(Error::BadRequest(format!("more than one {name} header")));
        }
        let value = std::str::from_utf8(first.value).ok().filter(|value| value.is_ascii());
        value.map(Some).ok_or_else(|| Error::BadRequest(format!("the {name} header is not ASCII")))
    }
}

/// What a web page is told of an allowed origin: never that it may send credentials of its own.
pub fn cors_headers(origin: Option<&str>) -> String {
    match origin {
        Some(origin) => format!("Access-Control-Allow-Origin: {origin}\r\nVary: Origin\r\n"),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// xorshift64: enough of a random number to break a parser, and the same every time.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % bound as u64) as usize
        }

        fn one_of<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
            choices[self.below(choices.len())]
        }
    }

    /// Parts of requests, good and bad, of which a head is put together.
    const LINES: &[&[u8]] = &[
        b"GET /health HTTP/1.1\r\n",
        b"POST /workspaces HTTP/1.1\r\n",
        b"GET /w/a/b?c=%00 HTTP/1.0\r\n",
        b"PRI * HTTP/2.0\r\n",
        b"GET http://127.0.0.1/ HTTP/1.1\r\n",
        b"CONNECT h:1 HTTP/1.1\r\n",
        b"OPTIONS * HTTP/1.1\r\n",
        b"GET / HTTP/9.9\r\n",
        b"GET  /  HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET /\xc3\xa9 HTTP/1.1\r\n",
        b"get\t/ HTTP/1.1\r\n",
        b"\r\n\r\n",
    ];
    const HEADERS: &[&[u8]] = &[
        b"Host: 127.0.0.1:1\r\n",
        b"host:localhost:1\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Content-Length:\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"content-length: 6\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: \x0bchunked\r\n",
        b"transfer-encoding : chunked\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"X: a\r\n b\r\n",
        b"X: a\nY: b\r\n",
        b"X: \0\r\n",
        b": x\r\n",
        b"X\r\n",
        b"Origin: null\r\n",
        b"Origin: http://\xff\r\n",
        b"X: \r Content-Length: 7\r\n",
        b"Connection: upgrade, close\r\n",
    ];

    #[test]
    fn whatever_is_sent_has_one_reading_or_none() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let (mut accepted, mut refused) = (0, 0);
        for _ in 0..200_000 {
            let mut head = random.one_of(LINES).to_vec();
            for _ in 0..random.below(6) {
                head.extend_from_slice(random.one_of(HEADERS));
            }
            head.extend_from_slice(b"\r\n");
            for _ in 0..random.below(4) {
                let at = random.below(head.len());
                match random.below(4) {
                    0 => head[at] = random.below(256) as u8,
                    1 => drop(head.remove(at)),
                    2 => head.insert(at, *random.one_of(&[&b'\r', &b'\n', &0, &b' ', &b':', &0xff])),
                    _ => head.truncate(at.max(1)),
                }
                if head.is_empty() {
                    head.push(b'\n');
                }
            }
            // Its end is where it is found first, as in read_head.
            if let Some(at) = head.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                head.truncate(at + 4);
            }
            let mut headers = [httparse::EMPTY_HEADER; HEADER_LIMIT];
            let Ok(request) = Head::parse(&head, &mut headers) else {
                refused += 1;
                continue;
            };
            accepted += 1;
            let text = String::from_utf8_lossy(&head);
            assert!(request.target.starts_with('/') && request.target.is_ascii(), "{text}");
            let lower = text.to_ascii_lowercase();
            let lengths = lower.lines().filter(|line| line.starts_with("content-length:")).count();
            let codings = lower.lines().filter(|line| line.starts_with("transfer-encoding:")).count();
            let expected = match (lengths, codings) {
                (0, 0) => request.framing == Framing::Length(0),
                (1, 0) => matches!(request.framing, Framing::Length(_)),
                (0, 1) => request.framing == Framing::Chunked,
                _ => false,
            };
            assert!(expected, "{lengths} lengths, {codings} codings: {text}");
            assert!(!text.contains('\0') && !text.replace("\r\n", "").contains(['\r', '\n']), "{text:?}");
        }
        assert!(accepted > 1000 && refused > 1000, "{accepted} accepted, {refused} refused");
    }
}
