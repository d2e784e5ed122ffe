//! Hints for unknown words: the openwork name of a word from another program, else the nearest known word.

use std::ffi::OsStr;

use super::commands::{CommandRow, canonical, is_ending};
use super::habits::{self, Habit};
use super::options::{OPTIONS, OptionRow};
use crate::error::Error;
use crate::nearest::nearest;

/// The error for an unknown command: `given` is its first word, followed by `next`, or the second word after
/// `group`. `known`: the words of commands at that position.
pub fn unknown_command<'k>(
    group: Option<&str>,
    given: &str,
    next: Option<&str>,
    known: impl Iterator<Item = &'k str>,
) -> Error {
    let word = canonical(OsStr::new(given));
    let habit = match group {
        Some(group) => habits::of_words(group, Some(word)),
        None => habits::of_words(word, next),
    };
    let full = |word: &str| group.map_or_else(|| word.to_owned(), |group| format!("{group} {word}"));
    // Never suggest a stop or a removal for a typo.
    let near = || nearest(word, known.filter(|word| !is_ending(&full(word))));
    let hint = match (habit, group) {
        (Some(Habit::Is(command)), _) => format!("did you mean `openwork {command}`?"),
        (Some(Habit::Says(text)), _) => text.to_owned(),
        (None, group) => match (near(), group) {
            (Some(word), _) => format!("did you mean `{}`?", full(word)),
            (None, Some(group)) => format!("`openwork help {group}` shows its commands"),
            (None, None) => "`openwork help` shows all commands".to_owned(),
        },
    };
    Error::Usage { message: format!("unknown command `{}`", full(given)), hint: Some(hint) }
}

/// The error for an unknown option. With a command, the hint is an option that the command takes.
pub fn unknown_option(given: &str, row: Option<&CommandRow>) -> Error {
    let takes = |option: &&OptionRow| row.is_none_or(|row| option.is_for(row.name));
    let hint = by_habit(given, row).map(str::to_owned).unwrap_or_else(|| {
        match (nearest(given, OPTIONS.iter().filter(takes).map(|option| option.name)), row) {
            (Some(word), _) => format!("did you mean `{word}`?"),
            (None, Some(row)) => format!("`openwork help {}` shows its options", row.name),
            (None, None) => "`openwork help` shows all commands".to_owned(),
        }
    });
    Error::Usage { message: format!("unknown option `{given}`"), hint: Some(hint) }
}

/// The error for an option that the command does not take. `typed`: its name on the command line.
pub fn foreign_option(option: &OptionRow, typed: &str, row: &CommandRow) -> Error {
    let habit = by_habit(option.name, Some(row)).or_else(|| by_habit(option.short?, Some(row)));
    let hint = habit.map_or_else(|| format!("`openwork help {}` shows its options", row.name), str::to_owned);
    Error::Usage { message: format!("`{}` does not take {typed}", row.name), hint: Some(hint) }
}

/// The error for `attach -t web`, as with tmux: opencode's clients have no option -t.
pub fn tmux_target(target: Option<&OsStr>) -> Error {
    let workspace = target.filter(|target| !target.as_encoded_bytes().starts_with(b"-"));
    let workspace = workspace.map_or_else(|| "<ws>".into(), OsStr::to_string_lossy);
    Error::Usage {
        message: "`attach` does not take -t".to_owned(),
        hint: Some(format!("did you mean `openwork attach {workspace}`? After `--`, options are opencode's")),
    }
}

/// The hint for an option of another program, if it applies to the command.
fn by_habit(given: &str, row: Option<&CommandRow>) -> Option<&'static str> {
    let takes = |needed: &str| {
        let is_it = |option: &&OptionRow| option.name == needed;
        row.is_some_and(|row| OPTIONS.iter().find(is_it).is_some_and(|option| option.is_for(row.name)))
    };
    // Several short options may be combined, with a value after them.
    let first = given.get(..2).filter(|_| !given.starts_with("--"));
    let of = |name: &str| {
        let fits = |(known, needs, _): &&(&str, Option<&str>, &str)| *known == name && needs.is_none_or(takes);
        habits::OPTIONS.iter().find(fits).map(|(.., hint)| *hint)
    };
    of(given).or_else(|| of(first?))
}
