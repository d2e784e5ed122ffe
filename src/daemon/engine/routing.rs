//! How routed requests choose an instance: the headers, parameters and bodies that name a location, and the
//! subject of each path.

use std::path::Path;

use super::{v1, v2};
use crate::error::Result;
use crate::framing::percent_decode;
use crate::line::Line;

/// The query parameter for the credentials of web pages that cannot set a header: the Basic credentials
/// without the scheme, percent-encoded.
pub const TOKEN_PARAMETER: &str = "auth_token";

/// The header that chooses the instance: its directory, percent-encoded once.
pub const DIRECTORY_HEADER: &str = "x-opencode-directory";

/// The headers that choose a location; the second names an experimental workspace of opencode.
pub const LOCATION_HEADERS: [&str; 2] = [DIRECTORY_HEADER, "x-opencode-workspace"];

/// Whether a query parameter with this decoded name chooses a location: a directory, or an experimental
/// workspace of opencode. Ignores case, although opencode compares with case today.
pub fn chooses_location(parameter: &[u8]) -> bool {
    // `location[directory]` and `location[workspace]` are parts of `location`.
    let name = parameter.split(|byte| *byte == b'[').next().unwrap_or_default();
    [&b"directory"[..], b"workspace", b"location"].iter().any(|place| name.eq_ignore_ascii_case(place))
}

/// The subject of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The chosen instance, which the request loads.
    Instance,
    /// A new session, in the directory that the body names, else in the chosen one.
    Creation,
    /// A session in any directory; `loads`: the request loads the instance there.
    Session { id: String, loads: bool },
    /// The whole process, or nothing that opencode knows.
    Process,
}

/// The subject of a request.
pub fn subject(line: Line, method: &str, path: &str) -> Subject {
    match line {
        Line::V1 => v1::subject(path),
        Line::V2 => v2::subject(method, path),
    }
}

/// The parameter that replaces `directory` in the query at paths where `directory` is also the filter of a
/// list.
pub fn directory_filter(line: Line, path: &str, directory: &Path) -> Option<String> {
    match line {
        Line::V1 => v1::directory_filter(path, directory),
        Line::V2 => v2::directory_filter(path, directory),
    }
}

/// The parameter that chooses the instance, beside [`DIRECTORY_HEADER`].
pub fn location_parameter(line: Line, path: &str, directory: &Path) -> Option<String> {
    match line {
        Line::V1 => None,
        Line::V2 => v2::location_parameter(path, directory),
    }
}

/// Rewrites the body of a [`Subject::Creation`] to this directory.
///
/// # Errors
/// `bad_request` when it is not a JSON object.
pub fn relocate(body: &[u8], directory: &str) -> Result<Vec<u8>> {
    v2::relocate(body, directory)
}

/// The parameter by which a request to 2.x chooses the instance.
pub const LOCATION_PARAMETER: &[u8] = b"location[directory]";

/// The segments of a path as opencode's router compares them: without empty segments, percent-decoded, in
/// lower case, up to a `;` or `#` (find-my-way 9 with opencode's options).
pub(super) fn segments(path: &str) -> Vec<Vec<u8>> {
    let path = path.split([';', '#']).next().unwrap_or_default();
    let segments = path.split('/').filter(|segment| !segment.is_empty());
    segments.map(|segment| percent_decode(segment).unwrap_or_else(|| segment.into()).to_ascii_lowercase()).collect()
}

/// Whether a request carries a ticket in its query instead of credentials: the WebSocket of a terminal,
/// opened by a web page that cannot set a header. opencode issues tickets to users with credentials, and
/// checks that each is used once. Other spellings of the path, which no client uses, need credentials.
pub fn takes_ticket(path: &str, query: &str) -> bool {
    let path = path.strip_prefix("/api").unwrap_or(path);
    let id = path.strip_prefix("/pty/").and_then(|rest| rest.strip_suffix("/connect"));
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let has_ticket = query.split('&').any(|p| p.strip_prefix("ticket=").is_some_and(|ticket| !ticket.is_empty()));
    id.is_some_and(|id| !id.is_empty() && id.bytes().all(is_plain)) && has_ticket
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_matched_as_opencode_does() {
        let directory = Path::new("/p");
        for path in ["/session", "/session/", "//session", "/%73ession", "/SESSION", "/session;x", "/session#x"] {
            assert_eq!(directory_filter(Line::V1, path, directory).as_deref(), Some("directory=%252Fp"), "{path}");
            assert_eq!(directory_filter(Line::V2, path, directory), None, "{path}");
        }
        for line in [Line::V1, Line::V2] {
            assert_eq!(directory_filter(line, "/api/session/", directory).as_deref(), Some("directory=%2Fp"));
        }
        for path in ["/session/x", "/sessions", "/%2Fsession", "/session%2F", "/", "/x/session"] {
            assert_eq!(directory_filter(Line::V1, path, directory), None, "{path}");
        }
        for path in ["/global/health", "//global//event/", "/Global/health", "/auth/x", "/api/session", "/doc", "/doc/"]
        {
            assert_eq!(subject(Line::V1, "GET", path), Subject::Process, "{path}");
        }
        for path in ["/path", "/", "/doc/x", "/globals/x", "/x/global/y"] {
            assert_eq!(subject(Line::V1, "GET", path), Subject::Instance, "{path}");
        }
    }

    #[test]
    fn ticket_is_accepted_only_for_a_terminal() {
        for path in ["/pty/pty_1-x/connect", "/api/pty/x/connect"] {
            assert!(takes_ticket(path, "a=b&ticket=t"), "{path}");
            for query in ["", "ticket", "ticket=", "tickets=t", "a=ticket=t", "Ticket=t"] {
                assert!(!takes_ticket(path, query), "{path}?{query}");
            }
        }
        for path in
            ["/pty/connect", "/pty//connect", "/pty/x/y/connect", "/pty/x/connect/", "/pty/%2e%2e/connect", "/x"]
        {
            assert!(!takes_ticket(path, "ticket=t"), "{path}");
        }
    }

    #[test]
    fn location_parameters_are_recognised_in_every_spelling() {
        for name in ["directory", "Directory", "workspace", "location", "location[directory]", "directory[]"] {
            assert!(chooses_location(name.as_bytes()), "{name}");
        }
        for name in ["", "directories", "mydirectory", "path", "[directory]", "auth_token", "ticket"] {
            assert!(!chooses_location(name.as_bytes()), "{name}");
        }
    }
}
