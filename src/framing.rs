//! Parts of HTTP/1.1 that several modules need: the framing of bodies, the head of a reply, percent coding,
//! Basic credentials.
//!
//! Nothing here reads or writes a socket. Sources of the format: RFC 9112, RFC 3986, RFC 7617.

use std::io;
use std::mem::MaybeUninit;

/// The most header lines of a reply.
const REPLY_HEADER_LIMIT: usize = 128;
/// Memory for the header lines of a reply.
pub type ReplyHeaderRoom<'h> = [MaybeUninit<httparse::Header<'h>>; REPLY_HEADER_LIMIT];

/// The framing of a body, and how much of the body has come. It counts bytes as they pass: the body
/// is neither kept nor decoded.
pub struct Body(Framed);

enum Framed {
    /// The bytes still missing.
    Length(u64),
    Chunked(Chunks),
    /// Until the connection ends.
    ToEnd,
}

/// The position in a chunked body (RFC 9112, 7.1).
struct Chunks {
    at: Chunk,
    /// Bytes of extensions and trailers so far; the sizes of the chunks do not bound them.
    extra: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Chunk {
    /// In the digits of a size.
    Size { size: u64, digits: u8 },
    /// After the digits of this size.
    Extension(u64),
    /// Before the line feed that follows this size.
    SizeEnd(u64),
    /// In the data, of which this many bytes are missing.
    Data(u64),
    /// Before the line feed that follows the data.
    DataEnd,
    /// At the start of a trailer line or of the last line.
    TrailerStart,
    /// In a trailer line.
    Trailer,
    /// Before the line feed of a trailer line.
    TrailerEnd,
    /// Before the last line feed.
    LastEnd,
    /// After the last line feed.
    Done,
}

/// The most bytes of extensions and trailers in one body; few clients send any. Bytes.
const EXTRA_LIMIT: usize = 16 * 1024;

impl Body {
    /// A body with a `Content-Length`.
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

    /// Whether the whole body has come. Never true of a body that ends with the connection.
    pub fn is_done(&self) -> bool {
        match &self.0 {
            Framed::Length(missing) => *missing == 0,
            Framed::Chunked(chunks) => chunks.at == Chunk::Done,
            Framed::ToEnd => false,
        }
    }

    /// Whether the body is whole if the connection ends now.
    pub fn may_end_here(&self) -> bool {
        matches!(self.0, Framed::ToEnd) || self.is_done()
    }

    /// The bytes of the body still to come, of a body with a `Content-Length`.
    pub fn missing(&self) -> Option<u64> {
        if let Framed::Length(missing) = self.0 { Some(missing) } else { None }
    }

    /// Counts the next bytes that came; how many of them belong to the body.
    ///
    /// # Errors
    /// `InvalidData` when the chunks are malformed.
    pub fn advance(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut count = 0;
        while count < bytes.len() && !self.is_done() {
            count += self.step(&bytes[count..])?.0;
        }
        Ok(count)
    }

    /// Counts the first of these bytes that are of one kind: how many, and whether they are content
    /// and not framing.
    ///
    /// # Errors
    /// `InvalidData` when the chunks are malformed.
    pub fn step(&mut self, bytes: &[u8]) -> io::Result<(usize, bool)> {
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
    /// Takes a byte of the framing.
    fn framing(&mut self, byte: u8) -> io::Result<()> {
        let malformed = || Err(invalid("malformed chunks"));
        self.at = match (self.at, byte) {
            (Chunk::Data(0), b'\r') => Chunk::DataEnd,
            (Chunk::DataEnd, b'\n') => Chunk::Size { size: 0, digits: 0 },
            (Chunk::Size { size, digits: 1.. }, b'\r') | (Chunk::Extension(size), b'\r') => Chunk::SizeEnd(size),
            (Chunk::Size { size, digits: 1.. }, b';' | b' ' | b'\t') => Chunk::Extension(size),
            (Chunk::Size { size, digits }, byte) => match char::from(byte).to_digit(16) {
                // 15 digits are more than a disk holds, and do not overflow.
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

/// Whether a content type is `application/json`, with or without parameters.
pub fn is_json(content_type: &str) -> bool {
    content_type.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

/// An error of kind `InvalidData`.
pub fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// The length of a head, which ends at its first empty line; `None` while that is missing. The bytes before
/// `from` were searched before.
pub fn head_length(bytes: &[u8], from: usize) -> Option<usize> {
    // Faster than comparing four bytes at each position.
    let mut ends = (from..bytes.len()).filter(|at| bytes[*at] == b'\n').map(|at| at + 1);
    ends.find(|end| bytes[..*end].ends_with(b"\r\n\r\n"))
}

/// Memory for a number of header lines, uninitialised: most heads have a tenth of the most that they may have.
pub fn header_room<'h, const N: usize>() -> [MaybeUninit<httparse::Header<'h>>; N] {
    [const { MaybeUninit::uninit() }; N]
}

/// Whether a header has this name.
pub fn is_named(header: &httparse::Header<'_>, name: &str) -> bool {
    // Most names differ in their length, and each request compares about a hundred.
    header.name.len() == name.len() && header.name.eq_ignore_ascii_case(name)
}

/// The headers of this name.
pub fn named<'h>(headers: &'h [httparse::Header<'h>], name: &str) -> impl Iterator<Item = &'h [u8]> + Clone {
    headers.iter().filter(move |header| is_named(header, name)).map(|header| header.value)
}

/// The tokens of a header that is a list of them.
pub fn tokens<'h>(headers: &'h [httparse::Header<'h>], name: &str) -> impl Iterator<Item = &'h [u8]> {
    named(headers, name).flat_map(|value| value.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii)
}

/// What the head of a reply says.
pub struct ReplyHead<'h> {
    /// 100 to 599.
    pub status: u16,
    /// Of HTTP/1: 0 or 1.
    pub version: u8,
    /// The framing of what follows.
    pub body: Body,
    /// Where the body ends is said in one way, by a length or by chunks.
    pub is_framed: bool,
    /// The body comes in chunks.
    pub is_chunked: bool,
    /// The sender keeps the connection open for another request.
    pub is_kept: bool,
    /// The headers, unchanged.
    pub headers: &'h [httparse::Header<'h>],
}

impl<'h> ReplyHead<'h> {
    /// Parses the head of a reply to a request of this method.
    ///
    /// # Errors
    /// `InvalidData` when the head is not HTTP.
    pub fn parse(head: &'h [u8], method: &str, room: &'h mut ReplyHeaderRoom<'h>) -> io::Result<ReplyHead<'h>> {
        // httparse skips empty lines before the status line.
        if head.starts_with(b"\r") || head.starts_with(b"\n") {
            return Err(invalid("an empty line before the status line"));
        }
        let mut response = httparse::Response::new(&mut []);
        let parsed = httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut response, head, room);
        let parsed = parsed.map_err(|e| invalid(&e.to_string()))?;
        let httparse::Response { code, version, headers, .. } = response;
        let (httparse::Status::Complete(length), Some(status), Some(version)) = (parsed, code, version) else {
            return Err(invalid("an incomplete head"));
        };
        if !(100..600).contains(&status) {
            return Err(invalid("a status that is not between 100 and 599"));
        }
        // httparse takes bare line feeds, so for it the head may end before the empty line that we found.
        if length != head.len() {
            return Err(invalid("lines that do not end with CR LF"));
        }
        let headers = &*headers;
        let (codings, mut lengths) = (named(headers, "transfer-encoding"), named(headers, "content-length"));
        let is_chunked = codings.clone().next().is_some_and(|coding| coding.eq_ignore_ascii_case(b"chunked"));
        let closes = tokens(headers, "connection").any(|option| option.eq_ignore_ascii_case(b"close"));
        let is_framed = match (codings.count(), lengths.clone().count()) {
            (0, 1) => true,
            (1, 0) => is_chunked && version == 1,
            (_, _) => false,
        };
        let body = if method == "HEAD" || status < 200 || matches!(status, 204 | 304) {
            Body::length(0)
        } else if is_chunked {
            Body::chunked()
        } else if let Some(length) = lengths.next() {
            let is_number = !length.is_empty() && length.iter().all(u8::is_ascii_digit);
            let number = std::str::from_utf8(length).ok().filter(|_| is_number).and_then(|length| length.parse().ok());
            Body::length(number.ok_or_else(|| invalid("a Content-Length that is not a number"))?)
        } else {
            Body::to_end()
        };
        Ok(ReplyHead { status, version, body, is_framed, is_chunked, is_kept: version == 1 && !closes, headers })
    }

    /// The value of the first header of this name.
    pub fn header(&self, name: &str) -> Option<&'h [u8]> {
        named(self.headers, name).next()
    }
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
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    let mut encoded = String::with_capacity(3 * bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let digits = [byte >> 4, byte & 15].map(|digit| char::from(DIGITS[usize::from(digit)]));
            encoded.extend(['%', digits[0], digits[1]]);
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
    fn body_length_spans_several_reads() {
        let mut body = Body::length(6);
        assert_eq!((body.advance(b"abcd").unwrap(), body.is_done()), (4, false));
        assert_eq!((body.advance(b"efGET / HTTP/1.1").unwrap(), body.is_done()), (2, true));
        assert_eq!(body.advance(b"more").unwrap(), 0);
    }

    #[test]
    fn body_ends_where_its_framing_says() {
        let chunked = b"5;x=y\r\nhello\r\n0A \r\n0123456789\r\n0\r\nA: b\r\n\r\nGET / HTTP/1.1\r\n";
        let end = chunked.len() - b"GET / HTTP/1.1\r\n".len();
        // Whole, and in every two pieces.
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
    fn chunk_size_has_at_most_fifteen_digits() {
        let body = |digits: usize, size: &str| {
            let chunked = format!("{size:0>digits$}\r\n0123456789abcdefXY\r\n0\r\n\r\n");
            let mut body = Body::chunked();
            body.advance(chunked.as_bytes()).map(|count| (count == chunked.len(), body.is_done()))
        };
        assert_eq!(body(15, "12").unwrap(), (true, true));
        assert_eq!(body(2, "12").unwrap(), (true, true));
        assert!(body(16, "12").is_err());
    }

    #[test]
    fn extensions_and_trailers_are_taken_up_to_sixteen_kibibytes() {
        for (extra, is_taken) in [(16 * 1024, true), (16 * 1024 + 1, false)] {
            for chunked in [
                format!("1;{}\r\nx\r\n0\r\n\r\n", "e".repeat(extra)),
                format!("1\r\nx\r\n0\r\n{}\r\n\r\n", "t".repeat(extra)),
                format!("1;{}\r\nx\r\n0\r\n{}\r\n\r\n", "e".repeat(extra / 2), "t".repeat(extra - extra / 2)),
            ] {
                let mut body = Body::chunked();
                let is_whole = body.advance(chunked.as_bytes()).is_ok_and(|count| count == chunked.len());
                assert_eq!((is_whole, body.is_done()), (is_taken, is_taken), "{extra}");
            }
        }
        for bad in ["1;e\n", "1 \n", "1\r\nx\r\n0\r\nt\n"] {
            assert!(Body::chunked().advance(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn step_tells_content_from_framing() {
        let mut body = Body::chunked();
        let (mut rest, mut content) = (&b"3;e\r\nabc\r\n2\r\nde\r\n0\r\nt: u\r\n\r\nGET"[..], Vec::new());
        while !body.is_done() {
            let (count, is_content) = body.step(rest).unwrap();
            if is_content {
                content.extend_from_slice(&rest[..count]);
            }
            rest = &rest[count..];
        }
        assert_eq!((&content[..], rest), (&b"abcde"[..], &b"GET"[..]));
        assert_eq!(Body::length(2).step(b"abc").unwrap(), (2, true));
        assert_eq!(Body::to_end().step(b"abc").unwrap(), (3, true));
    }

    #[test]
    fn body_reports_missing_bytes_and_possible_end() {
        let mut body = Body::length(3);
        assert_eq!((body.missing(), body.is_done(), body.may_end_here()), (Some(3), false, false));
        body.advance(b"ab").unwrap();
        assert_eq!((body.missing(), body.is_done(), body.may_end_here()), (Some(1), false, false));
        body.advance(b"c").unwrap();
        assert_eq!((body.missing(), body.is_done(), body.may_end_here()), (Some(0), true, true));
        let mut body = Body::chunked();
        assert_eq!((body.missing(), body.may_end_here()), (None, false));
        body.advance(b"0\r\n\r\n").unwrap();
        assert_eq!((body.missing(), body.may_end_here()), (None, true));
        let body = Body::to_end();
        assert_eq!((body.missing(), body.is_done(), body.may_end_here()), (None, false, true));
    }

    #[test]
    fn reply_head_determines_the_end_of_its_body() {
        let framing = |status: u16, headers: &str, method: &str| {
            let head = format!("HTTP/1.1 {status} x\r\n{headers}\r\n");
            let mut room = header_room();
            let body = ReplyHead::parse(head.as_bytes(), method, &mut room)?.body;
            Ok::<_, io::Error>((body.missing(), body.may_end_here()))
        };
        let (nothing, chunks, to_end) = ((Some(0), true), (None, false), (None, true));
        for (status, headers, method, expected) in [
            (200, "Content-Length: 5\r\n", "GET", (Some(5), false)),
            (200, "content-length: 0\r\n", "POST", nothing),
            (200, "Transfer-Encoding: Chunked\r\n", "GET", chunks),
            (200, "Transfer-Encoding: gzip\r\n", "GET", to_end),
            (200, "", "GET", to_end),
            // No body, whatever the head says.
            (200, "Content-Length: 5\r\n", "HEAD", nothing),
            (200, "Transfer-Encoding: chunked\r\n", "HEAD", nothing),
            (103, "Content-Length: 5\r\n", "GET", nothing),
            (199, "", "GET", nothing),
            (204, "", "GET", nothing),
            (304, "Content-Length: 5\r\n", "GET", nothing),
            (404, "Content-Length: 5\r\n", "GET", (Some(5), false)),
        ] {
            assert_eq!(framing(status, headers, method).unwrap(), expected, "{status} {headers:?} {method}");
        }
        assert!(framing(200, "Content-Length: x\r\n", "GET").is_err());
        assert!(framing(200, "no header\r\n", "GET").is_err());
        let mut room = header_room();
        assert!(ReplyHead::parse(b"HTTP/1.1 200 x\r\nA: b", "GET", &mut room).is_err());

        let head = b"HTTP/1.1 201 x\r\nA: b\r\na: c\r\nD: \xff\r\n\r\n";
        let mut room = header_room();
        let head = ReplyHead::parse(head, "GET", &mut room).unwrap();
        assert_eq!(head.status, 201);
        let found = ["a", "A", "d", "e", "ab"].map(|name| head.header(name));
        assert_eq!(found, [Some(&b"b"[..]), Some(b"b"), Some(b"\xff"), None, None]);
    }

    #[test]
    fn head_ends_at_the_first_empty_line() {
        let heads = b"GET / HTTP/1.1\r\nA: b\n\n\r\n\r\nGET / HTTP/1.1\r\n\r\n";
        let first = heads.len() - b"GET / HTTP/1.1\r\n\r\n".len();
        for from in 0..first {
            assert_eq!(head_length(heads, from), Some(first), "{from}");
        }
        assert_eq!(head_length(heads, first), Some(heads.len()));
        for length in 0..first {
            assert_eq!(head_length(&heads[..length], 0), None, "{length}");
        }
    }

    #[test]
    fn json_is_json_with_any_parameters() {
        for good in ["application/json", "Application/JSON", " application/json ; charset=utf-8"] {
            assert!(is_json(good), "{good}");
        }
        for bad in ["", "text/plain", "application/jsonp", "text/plain; application/json", "application/json, x"] {
            assert!(!is_json(bad), "{bad}");
        }
        assert_eq!(invalid("why").kind(), io::ErrorKind::InvalidData);
    }
}
