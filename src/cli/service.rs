//! A systemd unit that runs the daemon for a user.
//!
//! systemd does not have the shell's environment, so its settings for the daemon become arguments in
//! the unit.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use crate::error::{Error, Result};
use crate::options::{Options, allocator};

/// The unit, which runs `program` as `openwork daemon` with these options, in this data directory if one
/// was named.
///
/// # Errors
/// `usage` for a path that a unit cannot contain: a unit is UTF-8 without control characters.
pub fn unit(program: &Path, data_dir: Option<&Path>, options: &Options) -> Result<String> {
    let mut arguments = vec![program.as_os_str().to_owned(), "daemon".into()];
    if let Some(data_dir) = data_dir {
        let mut argument = OsString::from("--data-dir=");
        argument.push(data_dir);
        arguments.push(argument);
    }
    if !options.is_default() {
        arguments.extend(options.arguments());
    }
    let mut command = arguments.iter().map(|argument| word(argument)).collect::<Result<Vec<_>>>()?;
    // systemd expands variables in every word but the program.
    command.iter_mut().skip(1).for_each(|word| *word = word.replace('$', "$$"));
    // The same as for a daemon in the background.
    let variables: Vec<String> = allocator(|_| true).iter().map(|(name, value)| format!("{name}={value}")).collect();
    let unit = include_str!("../assets/openwork.service");
    Ok(unit.replace("@VARIABLES@", &variables.join(" ")).replace("@COMMAND@", &command.join(" ")))
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
