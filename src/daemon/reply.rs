//! The complete replies that the daemon writes itself. [`super::exchange`] passes opencode's replies on.
//!
//! Each function returns a whole reply or a whole head. Sources of the format: RFC 9110, RFC 9112;
//! the Fetch standard for CORS.

use std::time::Duration;

use crate::error::Error;
use crate::wire::{ERROR_HEADER, Failure, TIMEOUT_HEADER};

/// How long a connection waits for its next request. Clients that pool connections reuse one up to a
/// second or two before that, and rarely know a use for it after more.
pub const KEEP_TIME: Duration = Duration::from_secs(10);

/// The header lines about the reuse of the connection.
pub fn connection_headers(keeps: bool) -> &'static str {
    match keeps {
        true => "Connection: keep-alive\r\nKeep-Alive: timeout=10\r\n",
        false => "Connection: close\r\n",
    }
}

/// A reply with a JSON body. `headers` are complete lines; a reply to `HEAD` ends with its head.
pub fn json(method: &str, status: u16, headers: &str, body: &[u8], origin: Option<&str>, keeps: bool) -> Vec<u8> {
    let mut reply = head(status, keeps, origin);
    reply.push_str(headers);
    reply.push_str("Content-Type: application/json\r\nCache-Control: no-store\r\n");
    reply.push_str(&format!("X-Content-Type-Options: nosniff\r\nContent-Length: {}\r\n\r\n", body.len()));
    let mut reply = reply.into_bytes();
    if method != "HEAD" {
        reply.extend_from_slice(body);
    }
    reply
}

/// The reply that reports an error. It always closes the connection.
pub fn error(method: &str, error: &Error, origin: Option<&str>) -> Vec<u8> {
    // The header tells a client that the error is ours and not opencode's.
    let mut headers = format!("{ERROR_HEADER}: {}\r\n", error.code().name());
    match error {
        Error::Unauthorized => headers.push_str("WWW-Authenticate: Basic realm=\"opencode\"\r\n"),
        Error::MethodNotAllowed { allow, .. } => headers.push_str(&format!("Allow: {allow}\r\n")),
        _ => {}
    }
    let body = serde_json::to_vec(&Failure::from(error)).unwrap_or_default();
    json(method, error.http_status(), &headers, &body, origin, false)
}

/// The reply to a CORS preflight of an allowed origin.
pub fn preflight(origin: &str, keeps: bool) -> Vec<u8> {
    let mut reply = head(204, keeps, Some(origin));
    reply.push_str("Access-Control-Allow-Methods: GET, POST, PUT, PATCH, DELETE\r\n");
    let headers = format!("authorization, content-type, x-opencode-directory, {}", TIMEOUT_HEADER.to_ascii_lowercase());
    reply.push_str(&format!("Access-Control-Allow-Headers: {headers}\r\n\r\n"));
    reply.into_bytes()
}

/// The head of a stream of server-sent events that lasts as long as the connection.
pub fn event_stream(origin: Option<&str>) -> String {
    head(200, false, origin) + "Content-Type: text/event-stream\r\nCache-Control: no-store\r\n\r\n"
}

/// The header lines that let a web page of an allowed origin read the reply. Credentials of the
/// browser's own (cookies) are never allowed.
pub fn cors_headers(origin: Option<&str>) -> String {
    match origin {
        Some(origin) => format!(
            "Access-Control-Allow-Origin: {origin}\r\nAccess-Control-Expose-Headers: {ERROR_HEADER}\r\nVary: Origin\r\n"
        ),
        None => String::new(),
    }
}

/// The status line, and the header lines that every reply has.
fn head(status: u16, keeps: bool, origin: Option<&str>) -> String {
    let (reason, connection) = (reason(status), connection_headers(keeps));
    format!("HTTP/1.1 {status} {reason}\r\n{connection}{}", cors_headers(origin))
}

/// The reason phrase of a status (RFC 9110, 15).
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_connection_announces_its_time() {
        assert!(connection_headers(true).ends_with(&format!("Keep-Alive: timeout={}\r\n", KEEP_TIME.as_secs())));
    }
}
