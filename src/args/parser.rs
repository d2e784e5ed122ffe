//! Splits argv into words and options.
//!
//! Parsing has two steps. The first reads from left to right and expands every option to its long name:
//! `-fn5` becomes `--follow`, `--lines`, `5`. It stops where the arguments for opencode begin. It rejects
//! unknown options, and a value that looks like an option: the real value is more often forgotten than meant
//! that way (`--name=--x` is explicit). The second step extracts the options with pico-args.
//!
//! pico-args' own splitting at `=` is not used: it strips quotes from values, and cannot tell
//! `--name --x` from `--name=--x`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use pico_args::Arguments;

use super::commands::{CommandRow, canonical, find_command};
use super::given::Given;
use super::options::{OPTIONS, OptionRow};
use super::suggest;
use super::values::{after, shown};
use crate::error::{Error, Result};

/// A command line in parts.
pub struct Parsed<'e> {
    /// The command; `None` when there is none, or only the first word of several.
    pub row: Option<&'static CommandRow>,
    /// Its arguments and options.
    pub given: Given<'e>,
    /// The first word of the command line, without its alias.
    first: Option<String>,
}

impl Parsed<'_> {
    /// The topic of `--help`: the command, or the first word of several.
    pub fn topic(&self) -> Option<String> {
        self.row.map(|row| row.name.to_owned()).or_else(|| self.first.clone())
    }
}

/// Parses a command line.
///
/// # Errors
/// `usage`, with the nearest word that fits.
pub fn parse<'e>(argv: &[OsString], env: &'e dyn Fn(&str) -> Option<OsString>) -> Result<Parsed<'e>> {
    let SpelledOut { spelled, shortened, mut trailing } = spell_out(argv)?;
    let mut arguments = Arguments::from_vec(spelled);
    let mut options = Vec::new();
    for row in OPTIONS {
        let values = match row.value {
            Some(_) => arguments.values_from_os_str(row.name, unmark).map_err(|e| Error::usage(e.to_string()))?,
            None => std::iter::from_fn(|| arguments.contains(row.name).then(OsString::new)).collect(),
        };
        if !values.is_empty() {
            options.push((row, values));
        }
    }
    let mut words = arguments.finish();
    if passes_on(&words.iter().collect::<Vec<_>>()).is_none() {
        words.append(&mut trailing);
    }
    let words: Vec<&OsString> = words.iter().collect();
    let (row, rest) = find_command(&words)?;
    let first = words.first().map(|word| canonical(word).to_owned());
    let mut words: VecDeque<OsString> = rest.into_iter().cloned().collect();
    // `-w` names the first argument of every command that takes a workspace.
    let workspace = options.iter().find(|(row, _)| row.name == "--workspace").and_then(|(_, values)| values.last());
    words.extend(workspace.cloned());
    words.rotate_right(usize::from(workspace.is_some()));
    Ok(Parsed { row, given: Given { words, trailing, options, shortened, env }, first })
}

/// The command of these words, if it passes arguments on to opencode.
fn passes_on(words: &[&OsString]) -> Option<&'static CommandRow> {
    find_command(words).ok().and_then(|(row, _)| row).filter(|row| row.passes_on)
}

/// Prefixed to each value, so that pico-args mistakes none for an option.
const MARK: u8 = b'=';

fn unmark(value: &OsStr) -> std::result::Result<OsString, Infallible> {
    let bytes = value.as_bytes();
    Ok(OsStr::from_bytes(bytes.strip_prefix(&[MARK]).unwrap_or(bytes)).to_owned())
}

/// A command line with every option by its long name, followed by its marked value.
struct SpelledOut {
    spelled: Vec<OsString>,
    /// As [`Given::shortened`].
    shortened: Vec<&'static str>,
    /// The arguments after `--`, or for opencode.
    trailing: Vec<OsString>,
}

fn spell_out(argv: &[OsString]) -> Result<SpelledOut> {
    let mut spelled: Vec<OsString> = Vec::with_capacity(argv.len());
    let mut shortened: Vec<&'static str> = Vec::new();
    let mut words: Vec<&OsString> = Vec::new();
    let mut at = 0;
    while let Some(arg) = argv.get(at) {
        if arg == "--" {
            return Ok(SpelledOut { spelled, shortened, trailing: argv[at + 1..].to_vec() });
        }
        if let Some(row) = passes_on(&words) {
            if let (Some(attached), true) =
                (arg.as_bytes().strip_prefix(b"-t"), row.name == "attach" && words.len() == 1)
            {
                let next = argv.get(at + 1).map(OsString::as_os_str);
                let target = if attached.is_empty() { next } else { Some(OsStr::from_bytes(attached)) };
                return Err(suggest::tmux_target(target));
            }
            if is_for_opencode(row, words.len() - 1, &argv[at..]) {
                return Ok(SpelledOut { spelled, shortened, trailing: argv[at..].to_vec() });
            }
        }
        at += 1;
        if is_word(arg) {
            spelled.push(arg.clone());
            words.push(arg);
            continue;
        }
        let (flags, row, attached) = option(arg, argv)?;
        let is_short = !arg.as_bytes().starts_with(b"--");
        shortened.retain(|name| *name != row.name);
        shortened.extend(flags.iter().copied().chain([row]).filter(|_| is_short).map(|row| row.name));
        spelled.extend(flags.into_iter().map(|flag| flag.name.into()));
        spelled.push(row.name.into());
        let typed = if is_short { row.short.unwrap_or(row.name) } else { row.name };
        match (row.value, attached) {
            (None, None) => {}
            (None, Some(_)) => return Err(Error::usage(format!("{typed} takes no value"))),
            (Some(_), Some(value)) => spelled.push(marked(&value)),
            (Some(what), None) => match argv.get(at) {
                Some(value) if !value.as_bytes().starts_with(b"--") => {
                    spelled.push(marked(value));
                    at += 1;
                }
                Some(value) => {
                    return Err(misplaced(row, typed, argv).unwrap_or_else(|| Error::Usage {
                        message: format!("{typed} needs a value ({what}), not {}", shown(value)),
                        hint: Some(format!("write {}={} if that is the value", row.name, shown(value))),
                    }));
                }
                None => {
                    let missing = || Error::usage(format!("{typed} needs a value ({what})"));
                    return Err(misplaced(row, typed, argv).unwrap_or_else(missing));
                }
            },
        }
    }
    Ok(SpelledOut { spelled, shortened, trailing: Vec::new() })
}

/// Whether an argument is a word and not an option. A lone `-` is the previously active workspace.
fn is_word(arg: &OsStr) -> bool {
    let bytes = arg.as_bytes();
    !bytes.starts_with(b"-") || bytes == b"-"
}

/// Whether the arguments of `attach` or `run` go to opencode from here on: from the first one that is neither
/// the workspace nor an option of openwork. `words`: how many arguments precede it.
fn is_for_opencode(row: &CommandRow, words: usize, rest: &[OsString]) -> bool {
    let Some(arg) = rest.first() else { return false };
    if is_word(arg) {
        // The first word after `attach` is the workspace; after `run` only if `--` follows it.
        let is_workspace = row.args.starts_with("[<ws>]") || rest.get(1).is_some_and(|next| next == "--");
        return words > 0 || !is_workspace;
    }
    let is_ours = |option: &&OptionRow| option.is_for(row.name);
    !option(arg, &[]).is_ok_and(|(flags, last, _)| flags.iter().all(is_ours) && is_ours(&last))
}

/// Flags, then an option with the value that is attached to it.
type Spelled = (Vec<&'static OptionRow>, &'static OptionRow, Option<OsString>);

/// The options of one argument.
fn option(arg: &OsStr, argv: &[OsString]) -> Result<Spelled> {
    if arg.as_bytes().starts_with(b"--") { long(arg, argv) } else { short(arg, argv) }
}

/// `--name` or `--name=value`.
fn long(arg: &OsStr, argv: &[OsString]) -> Result<Spelled> {
    let at = arg.as_bytes().iter().position(|byte| *byte == b'=');
    let name = String::from_utf8_lossy(&arg.as_bytes()[..at.unwrap_or(arg.len())]);
    match OPTIONS.iter().find(|row| row.name == name) {
        Some(row) => Ok((Vec::new(), row, at.map(|_| after(arg, b'=')))),
        None => Err(unknown_option(&name, argv)),
    }
}

/// `-x`, or several combined, the last one perhaps with its value: `-fn5`.
fn short(arg: &OsStr, argv: &[OsString]) -> Result<Spelled> {
    let mut flags = Vec::new();
    for (at, letter) in arg.as_bytes().iter().enumerate().skip(1) {
        let behind = &arg.as_bytes()[at + 1..];
        let name = format!("-{}", char::from(*letter));
        let row = OPTIONS.iter().find(|row| row.short == Some(&*name));
        match row.ok_or_else(|| unknown_option(&arg.to_string_lossy(), argv))? {
            row if row.value.is_none() && !behind.is_empty() => flags.push(row),
            row => {
                return Ok((
                    flags,
                    row,
                    Some(behind).filter(|b| !b.is_empty()).map(|b| OsString::from_vec(b.to_vec())),
                ));
            }
        }
    }
    Err(unknown_option(&arg.to_string_lossy(), argv))
}

fn marked(value: &OsStr) -> OsString {
    OsString::from_vec([&[MARK], value.as_bytes()].concat())
}

/// The error to report before a missing value of an option: the command is unknown, or does not take the
/// option.
fn misplaced(option: &OptionRow, typed: &str, argv: &[OsString]) -> Option<Error> {
    let words: Vec<&OsString> = argv.iter().filter(|arg| is_word(arg)).collect();
    match find_command(&words) {
        Ok((Some(row), _)) if !option.is_for(row.name) => Some(suggest::foreign_option(option, typed, row)),
        Err(e) if argv.first().is_some_and(|first| is_word(first)) => Some(e),
        Ok(_) | Err(_) => None,
    }
}

/// The error for an unknown option; the hint names one that the command takes. If the command line begins
/// with an unknown command, the error is about the command, since the options are those of another program.
fn unknown_option(given: &str, argv: &[OsString]) -> Error {
    let words: Vec<&OsString> = argv.iter().filter(|arg| !arg.as_bytes().starts_with(b"-")).collect();
    match find_command(&words) {
        Ok((row, _)) => suggest::unknown_option(given, row),
        Err(e) if argv.first().is_some_and(|first| is_word(first)) => e,
        Err(_) => suggest::unknown_option(given, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::COMMANDS;

    fn parsed(line: &[&str]) -> Result<Parsed<'static>> {
        parse(&line.iter().map(OsString::from).collect::<Vec<_>>(), &|_| None)
    }

    fn given(line: &[&str]) -> Result<Given<'static>> {
        parsed(line).map(|parsed| parsed.given)
    }

    #[test]
    fn every_command_is_found_by_its_name() {
        for row in COMMANDS {
            let found = parsed(&row.name.split(' ').collect::<Vec<_>>()).unwrap();
            assert_eq!(found.row.map(|row| row.name), Some(row.name));
        }
    }

    #[test]
    fn values_are_taken_verbatim() {
        for value in ["--json", "--name", "=", "=x", "'quoted'", "\"", "-", "-f", "", "a=b"] {
            let line = ["workspace", "add", ".", &format!("--name={value}")];
            assert_eq!(given(&line).unwrap().value("--name").unwrap(), value);
            assert!(!given(&line).unwrap().has("--json"));
        }
        for value in ["=", "=x", "'quoted'", "\"", "-", "-f", "", "a=b"] {
            let line = ["workspace", "add", "--name", value, "."];
            assert_eq!(given(&line).unwrap().value("--name").unwrap(), value);
            assert_eq!(given(&line).unwrap().words, ["."]);
        }
        for value in ["--json", "--name", "--x", "--"] {
            assert!(given(&["workspace", "add", ".", "--name", value]).is_err(), "{value}");
        }
    }

    #[test]
    fn options_are_read_from_left_to_right() {
        let line = given(&["api", "-HA:1", "/x", "--header", "B:2", "-d", "1", "--header=A:3", "-d2"]).unwrap();
        assert_eq!(line.values("--header"), ["A:1", "B:2", "A:3"]);
        assert_eq!(line.value("--data").unwrap(), "2");
        assert_eq!(line.words, ["/x"]);
    }

    #[test]
    fn short_options_can_be_combined() {
        let line = given(&["logs", "-fn5"]).unwrap();
        assert!(line.has("--follow"));
        assert_eq!(line.value("--lines").unwrap(), "5");
        assert_eq!(given(&["logs", "-fn", "5"]).unwrap().value("--lines").unwrap(), "5");
        assert!(given(&["logs", "-fx5"]).is_err());
        assert!(given(&["logs", "-f="]).is_err());
    }

    #[test]
    fn arguments_after_openwork_options_go_to_opencode() {
        let check = |line: &str, words: &[&str], trailing: &[&str]| {
            let given = given(&line.split(' ').collect::<Vec<_>>()).unwrap();
            assert_eq!((Vec::from(given.words), given.trailing), (own(words), own(trailing)), "{line}");
        };
        fn own(words: &[&str]) -> Vec<OsString> {
            words.iter().map(OsString::from).collect()
        }
        check("attach", &[], &[]);
        check("attach web", &["web"], &[]);
        check("attach - -c", &["-"], &["-c"]);
        check("attach web hi --json", &["web"], &["hi", "--json"]);
        check("attach web -- --json --", &["web"], &["--json", "--"]);
        check("attach --json web -fq", &["web"], &["-fq"]);
        check("run web", &[], &["web"]);
        check("run web -- hi", &["web"], &["hi"]);
        check("run hi there -- x", &[], &["hi", "there", "--", "x"]);
        check("run -w web --no-autostart hi -w x", &["web"], &["hi", "-w", "x"]);
        check("run --model x -- hi", &[], &["--model", "x", "--", "hi"]);
        // Of other commands, the words after `--` are ordinary arguments.
        check("info -- -w", &["-w"], &[]);
        check("rm -w a b", &["a", "b"], &[]);
        assert!(given(&["env", "-c"]).is_err());
    }

    #[test]
    fn suggestion_is_an_option_of_the_command() {
        let hint = |line: &[&str]| given(line).err().and_then(|e| e.hint()).unwrap();
        assert_eq!(hint(&["logs", "--flow"]), "did you mean `--follow`?");
        // --force is nearer, and `logs` does not take it.
        assert_eq!(hint(&["logs", "--folce"]), "did you mean `--follow`?");
        assert_eq!(hint(&["instance", "dispose", "--folce"]), "did you mean `--force`?");
    }
}
