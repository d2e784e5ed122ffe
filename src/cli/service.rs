//! systemd units that run the daemon for a user.
//!
//! systemd does not have the shell's environment, so the daemon's settings there become arguments in
//! the unit.

use std::ffi::{OsStr, OsString};
use std::iter::once;
use std::path::Path;

use crate::error::{Error, Result};
use crate::options::{DEFAULT_PORT, Options, allocator};

/// The unit, which runs `program` as `openwork daemon` with these options, in this data directory if one
/// was named.
///
/// # Errors
/// `usage` for a path that a unit cannot contain: a unit is UTF-8 without control characters.
pub fn unit(program: &Path, data_dir: Option<&Path>, options: &Options) -> Result<String> {
    let data_dir = data_dir.map(|data_dir| {
        let mut argument = OsString::from("--data-dir=");
        argument.push(data_dir);
        argument
    });
    let options = if options.is_default() { Vec::new() } else { options.arguments() };
    let arguments = |first: &str, rest: &[OsString]| {
        let words = once(OsStr::new(first)).chain(data_dir.as_deref()).chain(rest.iter().map(OsString::as_os_str));
        // systemd expands variables in every word but the program.
        words.map(|argument| Ok(word(argument)?.replace('$', "$$"))).collect::<Result<Vec<_>>>()
    };
    let program = word(program.as_os_str())?;
    let run = format!("{program} {}", arguments("daemon", &options)?.join(" "));
    // The unit passes it through a shell.
    let ask = format!("{} {}", program.replace('$', "$$"), arguments("status", &[])?.join(" "));
    // The same as for a daemon in the background.
    let variables: Vec<String> = allocator(|_| true).iter().map(|(name, value)| format!("{name}={value}")).collect();
    let unit = include_str!("../assets/openwork.service");
    Ok(unit.replace("@VARIABLES@", &variables.join(" ")).replace("@COMMAND@", &run).replace("@STATUS@", &ask))
}

/// The unit of the socket at which systemd listens for the daemon until there is one.
pub fn socket_unit(options: &Options) -> String {
    let port = options.port.unwrap_or(DEFAULT_PORT);
    include_str!("../assets/openwork.socket").replace("@PORT@", &port.to_string())
}

/// A word as it stands in `ExecStart=`, systemd.service(5), "Command lines".
fn word(word: &OsStr) -> Result<String> {
    let text = word.to_str().filter(|text| !text.contains(char::is_control));
    let text = text
        .ok_or_else(|| Error::usage(format!("a unit cannot hold {:?}: name another path", word.to_string_lossy())))?;
    let plain = text.replace('%', "%%");
    let is_simple = |c: char| c.is_alphanumeric() || "/-_.=:,%$@+".contains(c);
    match text.chars().all(is_simple) {
        true => Ok(plain),
        false => Ok(format!("\"{}\"", plain.replace('\\', "\\\\").replace('"', "\\\""))),
    }
}
