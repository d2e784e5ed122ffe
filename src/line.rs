//! The two lines of opencode, 1.x and 2.x, which speak different protocols. The version of the binary
//! determines the line. Their client arguments are here, since `attach` and `run` need them without a
//! daemon; the rest is in `daemon::engine`.

use std::ffi::OsString;

/// A line of opencode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// 1.x.
    V1,
    /// 2.x, from the first version with `GET /api/info`.
    V2,
}

/// The variables with the credentials of opencode 1.x and its clients.
pub const V1_USERNAME: &str = "OPENCODE_SERVER_USERNAME";
/// See [`V1_USERNAME`]. 2.x reads it too, if its own variable is not set.
pub const V1_PASSWORD: &str = "OPENCODE_SERVER_PASSWORD";
/// The variable with the password of opencode 2.x and its clients.
pub const V2_PASSWORD: &str = "OPENCODE_PASSWORD";

/// The only user name that opencode 2.x accepts, whatever its environment says.
pub const V2_USERNAME: &str = "opencode";

impl Line {
    /// The line of a version, `1.18.33`.
    pub fn of(version: &str) -> Option<Line> {
        match version.split('.').next() {
            Some("1") => Some(Line::V1),
            Some("2") => Some(Line::V2),
            Some(_) | None => None,
        }
    }

    /// The arguments of opencode's terminal interface, connected to a server.
    pub fn attach(self, url: OsString, directory: OsString) -> Vec<OsString> {
        match self {
            Line::V1 => vec!["attach".into(), url, "--dir".into(), directory],
            // 2.x takes the directory from the working directory.
            Line::V2 => vec!["--server".into(), url],
        }
    }

    /// The first arguments of `opencode run`, connected to a server.
    pub fn run(self, url: OsString, directory: OsString) -> Vec<OsString> {
        match self {
            Line::V1 => vec!["run".into(), "--attach".into(), url, "--dir".into(), directory],
            // 2.x takes the directory from `PWD`, or else from the working directory.
            Line::V2 => vec!["run".into(), "--server".into(), url],
        }
    }
}

/// The warning when a data directory switches to another line of opencode.
pub fn migration(before: Option<Line>, now: Line) -> Option<&'static str> {
    match (before, now) {
        (Some(Line::V1), Line::V2) => Some(
            "opencode 2.x migrates the sessions of 1.x at its first start, one way: 1.x will not see what is done from \
             now on",
        ),
        (Some(Line::V2), Line::V1) => {
            Some("opencode 1.x does not see what 2.x has done: 2.x has migrated the sessions, one way")
        }
        (None, _) | (Some(Line::V1), Line::V1) | (Some(Line::V2), Line::V2) => None,
    }
}

/// The version in the output of `opencode --version`: `1.18.33` or `opencode v2.3.2`. Previews of 2.x print
/// another name and are not recognised.
pub fn parse_version(output: &str) -> Option<&str> {
    let output = output.trim();
    let version = output.strip_prefix("opencode ").unwrap_or(output).trim_start().trim_start_matches('v');
    let is_plausible = version.len() <= 100 && version.bytes().all(|byte| byte.is_ascii_graphic());
    let starts_with_number = version.split('.').next().is_some_and(|major| major.parse::<u32>().is_ok());
    (is_plausible && starts_with_number).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_determines_the_line() {
        for (output, version, line) in [
            ("1.18.33\n", Some("1.18.33"), Some(Line::V1)),
            ("v1.2.3", Some("1.2.3"), Some(Line::V1)),
            ("opencode v2.3.2\n", Some("2.3.2"), Some(Line::V2)),
            ("opencode v2.0.11-beta.1", Some("2.0.11-beta.1"), Some(Line::V2)),
            ("opencode 2.10.0", Some("2.10.0"), Some(Line::V2)),
            ("opencode v3.0.0", Some("3.0.0"), None),
            ("0.15.0", Some("0.15.0"), None),
            ("11.0.0", Some("11.0.0"), None),
            ("20.0.0", Some("20.0.0"), None),
            ("opencode2 v2.0.0", None, None),
            ("opencode", None, None),
            ("opencode v2.0.0\nand more", None, None),
            ("", None, None),
        ] {
            assert_eq!(parse_version(output), version, "{output:?}");
            assert_eq!(version.and_then(Line::of), line, "{output:?}");
        }
    }
}
