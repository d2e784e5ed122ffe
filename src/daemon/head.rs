//! The head of a request, parsed or refused.
//!
//! Invariant: a head has exactly one reading (no smuggling). A head that another server might read
//! differently (bare line feeds, two lengths, a length and a coding) is refused, and the router
//! writes a new head from the parsed one.
//!
//! Source of the format: RFC 9112.

use std::mem::MaybeUninit;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::framing::{named, tokens};
use crate::wire::BODY_LIMIT;

/// The most header lines; as many as common servers allow.
const HEADER_LIMIT: usize = 100;
/// Memory for the header lines of a request.
pub type HeaderRoom<'h> = [MaybeUninit<httparse::Header<'h>>; HEADER_LIMIT];

/// How long a head may take from its first byte on, and how long a new connection waits for that byte:
/// a head fits into one packet.
pub const HEAD_TIME: Duration = Duration::from_secs(2);

/// A parsed head. Header names are compared without case.
pub struct Head<'h> {
    /// A token, unchanged.
    pub method: &'h str,
    /// In origin form: a path of visible ASCII, perhaps with a query.
    pub target: &'h str,
    /// The headers, unchanged.
    pub headers: &'h [httparse::Header<'h>],
    /// Of HTTP/1: 0 or 1.
    pub version: u8,
    /// The framing of the body.
    pub framing: Framing,
}

/// The framing of the body of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// A length in bytes; 0 when the head has neither a length nor a coding.
    Length(u64),
    /// The chunked coding.
    Chunked,
}

impl<'h> Head<'h> {
    /// Parses a head.
    ///
    /// # Errors
    /// `bad_request` for an invalid or ambiguous head; `too_large` for too many headers or a length beyond 64
    /// bits.
    pub fn parse(head: &'h [u8], room: &'h mut HeaderRoom<'h>) -> Result<Head<'h>> {
        let bad = |why: &str| Error::BadRequest(why.to_owned());
        // httparse takes bare line feeds; the server behind us may not.
        let bare = |pair: &[u8]| (pair[1] == b'\n') != (pair[0] == b'\r');
        if head.first() == Some(&b'\n') || head.windows(2).any(bare) {
            return Err(bad("lines must end with CR LF"));
        }
        let mut request = httparse::Request::new(&mut []);
        match request.parse_with_uninit_headers(head, room) {
            Ok(httparse::Status::Complete(_)) => {}
            Ok(httparse::Status::Partial) => return Err(bad("the head is incomplete")),
            Err(httparse::Error::TooManyHeaders) => {
                return Err(Error::TooLarge { what: "number of headers", limit: HEADER_LIMIT, status: 431 });
            }
            Err(e) => return Err(Error::BadRequest(format!("not an HTTP request: {e}"))),
        }
        let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version) else {
            return Err(bad("the head is incomplete"));
        };
        // httparse before 1.10 takes any visible characters.
        if !method.bytes().all(is_token_byte) {
            return Err(bad("the method is not a token"));
        }
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

    /// The tokens of a header that is a list of them.
    pub fn tokens(&self, name: &str) -> impl Iterator<Item = &'h [u8]> {
        tokens(self.headers, name)
    }

    /// Whether a header that is a list of tokens contains this one.
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.tokens(name).any(|given| given.eq_ignore_ascii_case(token.as_bytes()))
    }

    /// Whether the connection may serve another request after this one, as far as its head says: the
    /// client means to keep it (RFC 9112, 9.3), and nothing `rest` holds comes after the body.
    pub fn keeps_connection(&self, rest: &[u8]) -> bool {
        let ends_whole = match self.framing {
            Framing::Length(length) => rest.len() as u64 <= length,
            // The reader of the body finds its end.
            Framing::Chunked => true,
        };
        let is_plain = self.method != "CONNECT" && !self.has_token("connection", "upgrade");
        self.version == 1 && !self.has_token("connection", "close") && is_plain && ends_whole
    }

    /// The value of a header that may occur once.
    ///
    /// # Errors
    /// `bad_request` when it occurs twice or is not ASCII.
    pub fn only(&self, name: &str) -> Result<Option<&'h str>> {
        let mut found = named(self.headers, name);
        let Some(first) = found.next() else { return Ok(None) };
        if found.next().is_some() {
            return Err(Error::BadRequest(format!("more than one {name} header")));
        }
        let value = std::str::from_utf8(first).ok().filter(|value| value.is_ascii());
        value.map(Some).ok_or_else(|| Error::BadRequest(format!("the {name} header is not ASCII")))
    }
}

/// Whether a byte may stand in a token, such as a method (RFC 9110, 5.6.2).
fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::framing::{head_length, header_room};

    #[test]
    fn method_must_be_a_token_and_target_a_path() {
        // httparse from 1.10 on refuses these itself.
        assert!(!b"\"(),/:;<=>?@[\\]{} \t\x7f\xe9".iter().any(|byte| is_token_byte(*byte)));
        let accepts = |line: &str| {
            let head = format!("{line} HTTP/1.1\r\n\r\n");
            Head::parse(head.as_bytes(), &mut header_room()).is_ok()
        };
        for good in ["GET /", "PROPFIND /a?b", "x!$%&'*+-.^_`|~0 /", "GET /;#%23"] {
            assert!(accepts(good), "{good}");
        }
        for bad in ["G@T{} /", "G/T /", "G,T /", "(GET) /", "G\"T /", "GET #", "GET /\u{e9}", "GET *"] {
            assert!(!accepts(bad), "{bad}");
        }
    }

    /// The framing of a head with these header lines, or the status of its refusal.
    fn parsed<T>(line: &str, headers: &str, check: impl FnOnce(&Head<'_>) -> T) -> std::result::Result<T, u16> {
        let text = format!("{line}\r\n{headers}\r\n");
        let mut room = header_room();
        let parsed = Head::parse(text.as_bytes(), &mut room);
        parsed.map(|head| check(&head)).map_err(|e| e.http_status())
    }

    #[test]
    fn conflicting_framing_is_refused() {
        use Framing::{Chunked, Length};
        for (version, headers, expected) in [
            (1, "", Ok(Length(0))),
            (1, "Content-Length: 0\r\n", Ok(Length(0))),
            (1, "content-length: 018446744073709551615\r\n", Ok(Length(u64::MAX))),
            (0, "Content-Length: 5\r\n", Ok(Length(5))),
            (1, "Transfer-Encoding: CHUNKED\r\n", Ok(Chunked)),
            // Servers of HTTP/1.0 know no chunks.
            (0, "Transfer-Encoding: chunked\r\n", Err(400)),
            (1, "Transfer-Encoding: gzip\r\n", Err(400)),
            (1, "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", Err(400)),
            (1, "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", Err(400)),
            (1, "Content-Length: 5\r\nContent-Length: 5\r\n", Err(400)),
            (1, "Content-Length: +5\r\n", Err(400)),
            (1, "Content-Length: -5\r\n", Err(400)),
            (1, "Content-Length: 5, 5\r\n", Err(400)),
            (1, "Content-Length:\r\n", Err(400)),
            (1, "Content-Length: \u{e9}\r\n", Err(400)),
            (1, "Content-Length: 18446744073709551616\r\n", Err(413)),
        ] {
            let found = parsed(&format!("POST / HTTP/1.{version}"), headers, |head| head.framing);
            assert_eq!(found, expected, "HTTP/1.{version} {headers:?}");
        }
    }

    #[test]
    fn lines_end_with_both_characters() {
        let parse = |head: &[u8]| Head::parse(head, &mut header_room()).is_ok();
        assert!(parse(b"GET / HTTP/1.1\r\nA: b\r\n\r\n"));
        for bad in [
            &b"\nGET / HTTP/1.1\r\n\r\n"[..],
            b"GET / HTTP/1.1\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\rC: d\r\n\r\n",
            b"GET / HTTP/1.1\n\n",
            b"GET / HTTP/1.1\r\nA: b\r\n",
        ] {
            assert!(!parse(bad), "{:?}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn header_lines_are_limited_to_a_hundred() {
        let headers = |count| "A: b\r\n".repeat(count);
        assert_eq!(parsed("GET / HTTP/1.1", &headers(HEADER_LIMIT), |head| head.headers.len()), Ok(HEADER_LIMIT));
        assert_eq!(parsed("GET / HTTP/1.1", &headers(HEADER_LIMIT + 1), |_| ()), Err(431));
    }

    #[test]
    fn head_is_split_into_its_parts() {
        let headers = "Host: h\r\nConnection: keep-alive,\tUpgrade\r\nconnection: X\r\nLatin: \u{e9}\r\n";
        let check = |head: &Head<'_>| {
            assert_eq!((head.method, head.target, head.path(), head.version), ("GET", "/a?b?c", "/a", 1));
            for (name, token, expected) in [
                ("connection", "upgrade", true),
                ("CONNECTION", "x", true),
                ("connection", "keep-alive", true),
                ("connection", "keep", false),
                ("connection", "h", false),
                ("upgrade", "upgrade", false),
            ] {
                assert_eq!(head.has_token(name, token), expected, "{name}: {token}");
            }
            assert_eq!(head.only("HOST").unwrap(), Some("h"));
            assert_eq!(head.only("origin").unwrap(), None);
            assert!(head.only("connection").is_err() && head.only("latin").is_err());
        };
        parsed("GET /a?b?c HTTP/1.1", headers, check).unwrap();
        assert_eq!(parsed("GET /a HTTP/1.1", "", |head| head.path().to_owned()).unwrap(), "/a");
    }

    /// xorshift64: random enough to break a parser, and the same in every run.
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

    /// Parts of good and bad requests, from which heads are put together.
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
    fn mutated_head_has_one_reading_or_none() {
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
            // A head ends at its first empty line, as in read_head.
            if let Some(length) = head_length(&head, 0) {
                head.truncate(length);
            }
            let mut room = header_room();
            let Ok(request) = Head::parse(&head, &mut room) else {
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
