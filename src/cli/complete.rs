//! Completion of command lines: a short script for each shell asks `openwork __complete` for the candidates
//! at the cursor. The candidates come from the tables of `args` and, for workspaces, from the state file;
//! no daemon is called or started.
//!
//! `openwork __complete WORD…` takes the words after `openwork` up to the cursor, of which the last may
//! be empty or incomplete, and prints a line for each candidate: the word, a tab, a description. The
//! shell drops candidates that do not start with the word. `:directories` or `:files` instead asks the
//! shell to complete those itself.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::path::Path;

use crate::args::{
    COMMANDS, CommandRow, CompletedShell, METHODS, OMISSIBLE, OPTIONS, OptionRow, canonical, find_command,
};
use crate::paths::DataDir;
use crate::state::State;

use super::output::clean;

/// The completion script of a shell.
pub fn script(shell: CompletedShell) -> &'static str {
    match shell {
        CompletedShell::Bash => include_str!("../../share/completions/openwork.bash"),
        CompletedShell::Zsh => include_str!("../../share/completions/_openwork"),
        CompletedShell::Fish => include_str!("../../share/completions/openwork.fish"),
    }
}

/// The candidates for the cursor.
enum Found {
    Words(Vec<(String, String)>),
    Directories,
    Files,
}

impl Found {
    fn words<'a>(words: impl IntoIterator<Item = (&'a str, &'a str)>) -> Found {
        Found::Words(words.into_iter().map(|(word, about)| (word.to_owned(), about.to_owned())).collect())
    }

    fn nothing() -> Found {
        Found::Words(Vec::new())
    }
}

/// Prints the candidates for the last word; nothing when there are none.
pub fn print(words: &[OsString]) {
    let text = match found(words) {
        Found::Directories => ":directories\n".to_owned(),
        Found::Files => ":files\n".to_owned(),
        Found::Words(words) => words.iter().map(|(word, about)| format!("{word}\t{}\n", clean(about))).collect(),
    };
    // Ignore a failure: the shell would not show it.
    let _ = io::stdout().write_all(text.as_bytes());
}

fn found(words: &[OsString]) -> Found {
    let Some((current, before)) = words.split_last() else { return Found::nothing() };
    let mut given: Vec<(&OptionRow, &OsStr)> = Vec::new();
    let mut arguments: Vec<&OsString> = Vec::new();
    let mut rest = before.iter();
    let mut is_behind = false;
    while let Some(word) = rest.next() {
        let bytes = word.as_encoded_bytes();
        if is_behind || !bytes.starts_with(b"-") || bytes == b"-" {
            arguments.push(word);
            continue;
        }
        if bytes == b"--" {
            is_behind = true;
            continue;
        }
        let (name, attached) = match word.to_str().and_then(|word| word.split_once('=')) {
            Some((name, value)) => (name, Some(OsStr::new(value))),
            None => (word.to_str().unwrap_or_default(), None),
        };
        let Some(row) = OPTIONS.iter().find(|row| row.name == name || row.short == Some(name)) else { continue };
        match (row.value, attached) {
            (None, _) => given.push((row, OsStr::new(""))),
            (Some(_), Some(value)) => given.push((row, value)),
            // bash splits at `=`.
            (Some(_), None) => match rest.next().map(|value| if value == "=" { rest.next() } else { Some(value) }) {
                Some(Some(value)) => given.push((row, value)),
                _ => return value_of(row, &given),
            },
        }
    }
    let Ok((row, own)) = find_command(&arguments) else { return Found::nothing() };
    let takes_options = !is_behind && current.as_encoded_bytes().starts_with(b"-");
    match row {
        _ if takes_options => options(row, &given),
        Some(CommandRow { name: "help", .. }) => next_words(&own),
        // Some commands are also the first word of others.
        Some(row) if !own.is_empty() || !is_first_word(row.name) => argument(row, own.len(), is_behind, &given),
        _ => next_words(&arguments),
    }
}

/// The options that a command still takes.
fn options(row: Option<&CommandRow>, given: &[(&OptionRow, &OsStr)]) -> Found {
    let is_for = |option: &&OptionRow| option.commands.is_empty() || row.is_some_and(|row| option.is_for(row.name));
    let repeats = |option: &OptionRow| ["--header", "--cors"].contains(&option.name);
    let is_new = |option: &&OptionRow| repeats(option) || !given.iter().any(|(row, _)| row.name == option.name);
    let help = |option: &'static OptionRow| row.map_or(option.help, |row| option.help_for(row.name));
    Found::words(OPTIONS.iter().filter(is_for).filter(is_new).map(|option| (option.name, help(option))))
}

fn value_of(row: &OptionRow, given: &[(&OptionRow, &OsStr)]) -> Found {
    match (row.name, row.value) {
        ("--workspace", _) => workspaces(given),
        ("--method", _) => Found::words(METHODS.map(|method| (method, ""))),
        ("--shell", _) => Found::words([("sh", "also for bash and zsh"), ("fish", "")]),
        ("--data-dir", _) => Found::Directories,
        (_, Some("FILE")) => Found::Files,
        _ => Found::nothing(),
    }
}

fn is_first_word(word: &str) -> bool {
    COMMANDS.iter().any(|row| row.name.split_once(' ').is_some_and(|(first, _)| first == word))
}

/// The next word of a command's name.
fn next_words(words: &[&OsString]) -> Found {
    let Some(first) = words.first().map(|word| canonical(word)) else {
        let mut found: Vec<(String, String)> = Vec::new();
        for row in COMMANDS {
            let (first, second) = row.name.split_once(' ').unwrap_or((row.name, ""));
            if first == OMISSIBLE {
                found.push((second.to_owned(), row.summary.to_owned()));
            }
            match found.iter_mut().find(|(word, _)| word == first) {
                // The first word of several commands is described by their second words.
                Some((_, about)) => *about = format!("{about}, {second}").trim_start_matches(", ").to_owned(),
                None if is_first_word(first) => found.push((first.to_owned(), second.to_owned())),
                None => found.push((first.to_owned(), row.summary.to_owned())),
            }
        }
        return Found::Words(found);
    };
    let second = |row: &'static CommandRow| Some((row.name.strip_prefix(first)?.strip_prefix(' ')?, row.summary));
    match words.len() {
        1 => Found::words(COMMANDS.iter().filter_map(second)),
        _ => Found::nothing(),
    }
}

/// The candidates for an argument, by its name in the table of commands.
fn argument(row: &CommandRow, position: usize, is_behind: bool, given: &[(&OptionRow, &OsStr)]) -> Found {
    let arguments: Vec<&str> = row.args.split(' ').map(|argument| argument.trim_matches(['[', ']'])).collect();
    let repeated = arguments.last().and_then(|last| last.strip_suffix("..."));
    let argument = match arguments.get(position) {
        // Arguments for opencode, which openwork does not know.
        _ if row.passes_on && (is_behind || position > 0 || arguments[0] != "<ws>") => return Found::Files,
        Some(argument) => argument.trim_end_matches("..."),
        None => repeated.unwrap_or_default(),
    };
    match (row.name, argument) {
        ("api", "<ws>") => match workspaces(given) {
            Found::Words(mut words) => {
                words.extend(METHODS.map(|method| (method.to_owned(), "method".to_owned())));
                Found::Words(words)
            }
            other => other,
        },
        ("api", "METHOD") => Found::words(METHODS.map(|method| (method, ""))),
        ("open" | "workspace add" | "workspace move", "<path>" | "<dir>") => Found::Directories,
        (_, "<file>") => Found::Files,
        (_, "<ws>") => workspaces(given),
        (_, words) if words.contains('|') => Found::words(words.split('|').map(|word| (word, ""))),
        _ => Found::nothing(),
    }
}

/// The names of the workspaces in the state file.
fn workspaces(given: &[(&OptionRow, &OsStr)]) -> Found {
    let option = given.iter().rev().find(|(row, _)| row.name == "--data-dir").map(|(_, value)| (*value).to_owned());
    let variable = |name| std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
    let data_dir = option.or_else(|| variable("OPENWORK_DATA_DIR"));
    let xdg_data_home = variable("XDG_DATA_HOME");
    let data_dir = DataDir::resolve(data_dir.as_deref().map(Path::new), xdg_data_home.as_deref().map(Path::new));
    let Ok(state) = data_dir.and_then(|data_dir| State::read(&data_dir.state())) else { return Found::nothing() };
    Found::Words(state.workspaces.iter().map(|w| (clean(&w.name).into_owned(), w.location())).collect())
}
