//! Parses the values of options: ports, durations, sizes, origins.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Duration;

use super::options::OPTIONS;
use crate::error::{Error, Result};

/// The longest `--timeout`, short enough that `Instant + Duration` cannot overflow. Seconds.
const LONGEST_TIMEOUT: f64 = 86_400.0;
/// The longest duration, short enough that a time so far away does not overflow. Seconds.
const TEN_YEARS: u64 = 10 * 365 * 86_400;

/// The `--cors` value of OpenWork's desktop program, every web page: accepted and ignored.
pub const ANY_ORIGIN: &str = "*";

pub fn not_loopback(option: &str, allowed: &str, host: &OsStr) -> Error {
    Error::Usage {
        message: format!("{option}: only {allowed} is allowed, not {}", shown(host)),
        hint: Some("to reach it from elsewhere, use an SSH tunnel".to_owned()),
    }
}

/// Parses an address in 127.0.0.0/8 that a server can listen on.
pub fn opencode_host(value: &OsStr) -> Result<Ipv4Addr> {
    let address = match value.to_str() {
        Some("localhost") => Some(Ipv4Addr::LOCALHOST),
        text => text.and_then(|text| text.parse::<Ipv4Addr>().ok()),
    };
    // The first and the last address of the network are reserved.
    let is_usable = |address: &Ipv4Addr| {
        address.is_loopback() && !matches!(address.octets(), [127, 0, 0, 0] | [127, 255, 255, 255])
    };
    address.filter(is_usable).ok_or_else(|| not_loopback("--opencode-host", "an address of 127.0.0.0/8", value))
}

/// An origin as browsers send it: `scheme://host[:port]`.
pub fn origin(value: OsString) -> Result<String> {
    let value = text("--cors", value)?;
    let host = value.split_once("://").map_or("", |(_, host)| host);
    if host.is_empty() || host.contains(['/', '?', '#', '@', '*']) || !value.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Error::usage(format!("--cors: {value:?} is not an origin (scheme://host[:port])")));
    }
    Ok(value)
}

pub fn port(option: &str, value: &OsStr) -> Result<u16> {
    let port = value.to_str().and_then(|text| text.parse::<u16>().ok()).filter(|port| *port != 0);
    port.ok_or_else(|| Error::usage(format!("{}: {} is not a port (1 to 65535)", spelled(option), shown(value))))
}

/// A count.
///
/// # Errors
/// `usage`.
pub fn number(option: &str, value: &OsStr) -> Result<usize> {
    let number = value.to_str().and_then(|text| text.parse().ok());
    number.ok_or_else(|| Error::usage(format!("{option}: {} is not a number", shown(value))))
}

/// `--timeout`.
///
/// # Errors
/// `usage`.
pub fn seconds(value: &OsStr) -> Result<Duration> {
    let seconds = value.to_str().and_then(|text| text.parse::<f64>().ok());
    seconds
        .filter(|seconds| *seconds > 0.0 && *seconds <= LONGEST_TIMEOUT)
        .map(Duration::from_secs_f64)
        .ok_or_else(|| Error::usage(format!("--timeout: {} is not a number of seconds, at most a day", shown(value))))
}

/// `90s`, `30m`, `2h`, `1d`; `0` is no time at all.
pub fn duration(option: &str, value: &OsStr) -> Result<Duration> {
    let text = value.to_str().unwrap_or_default();
    let (number, unit) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3600),
        Some((at, 'd')) => (&text[..at], 86_400),
        _ if text == "0" => ("0", 1),
        _ => ("", 1),
    };
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let seconds = number.parse::<u64>().ok().filter(|_| is_number).and_then(|number| number.checked_mul(unit));
    seconds.filter(|seconds| *seconds <= TEN_YEARS).map(Duration::from_secs).ok_or_else(|| {
        let (option, value) = (spelled(option), shown(value));
        Error::usage(format!("{option}: {value} is not a duration (90s, 30m, 2h, 1d; at most ten years; 0 for never)"))
    })
}

/// `800M`, `2G`, or a number of bytes; units are powers of 1024.
///
/// # Errors
/// `usage`.
pub fn bytes(option: &str, value: &OsStr) -> Result<u64> {
    let text = value.to_str().unwrap_or_default();
    let (number, shift) = match text.char_indices().last() {
        Some((at, 'K')) => (&text[..at], 10),
        Some((at, 'M')) => (&text[..at], 20),
        Some((at, 'G')) => (&text[..at], 30),
        Some((at, 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let number = number.parse::<u64>().ok().filter(|number| is_number && *number > 0);
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| Error::usage(format!("{}: {} is not a size (800M, 2G, bytes)", spelled(option), shown(value))))
}

/// A flag in the environment: `1` or `true`, `0` or `false`.
///
/// # Errors
/// `usage`.
pub fn switch(option: &str, value: &OsStr) -> Result<bool> {
    match value.to_str() {
        Some("1" | "true") => Ok(true),
        Some("0" | "false") => Ok(false),
        _ => Err(Error::usage(format!("{}: {} is neither 1 nor 0", spelled(option), shown(value)))),
    }
}

/// An option as messages name it, with the environment variable that may have set it.
fn spelled(option: &str) -> String {
    match OPTIONS.iter().find(|row| row.name == option).and_then(|row| row.env) {
        Some(env) => format!("{option} ({env})"),
        None => option.to_owned(),
    }
}

/// A word for a message; bytes that are not UTF-8 are replaced.
pub fn shown(value: &OsStr) -> Cow<'_, str> {
    value.to_string_lossy()
}

/// Text.
///
/// # Errors
/// `usage` when the value is not UTF-8.
pub fn text(option: &str, value: OsString) -> Result<String> {
    value.into_string().map_err(|value| Error::usage(format!("{option}: {} is not UTF-8", shown(&value))))
}

/// The name of a workspace as text; the daemon checks whether it is valid.
///
/// # Errors
/// `invalid_name` when it is not UTF-8.
pub fn name(value: OsString) -> Result<String> {
    value.into_string().map_err(|name| Error::InvalidName { name: shown(&name).into_owned(), why: "it is not UTF-8" })
}

/// The error for a word outside a short list of choices.
pub fn choice(what: &str, given: &str, known: &str) -> Error {
    Error::Usage { message: format!("unknown {what} `{given}`"), hint: Some(format!("use {known}")) }
}

/// The part of an argument after the first occurrence of a byte.
pub fn after(arg: &OsStr, byte: u8) -> OsString {
    let bytes = arg.as_bytes();
    let at = bytes.iter().position(|given| *given == byte).map_or(bytes.len(), |at| at + 1);
    OsString::from_vec(bytes[at..].to_vec())
}
