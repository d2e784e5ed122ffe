//! Help, from the tables of `args`.

use std::fmt::Write;

use serde::Serialize;

use super::output::Output;
use crate::args::{ALIASES, COMMANDS, CommandRow, OMISSIBLE, OPTIONS, OptionRow, examples};
use crate::error::{Code, Result};
use crate::wire::ROUTES;

const ABOUT: &str = "openwork keeps one opencode server alive and routes its calls to many workspaces by directory.";

/// The notes below the overview.
const NOTES: &str = "
The word `workspace` is optional and can be shortened to `ws`; `ls`, `rm`, `mv` and `use` are short for list, remove,
rename and switch. <ws> is an id, a name, the beginning of either, a path in the workspace, or - for the previously
active one. The default is OPENWORK_WORKSPACE, else (for attach, run, session list, wait and prompt) the workspace of the
working directory, else the active one.
`openwork help <command>` shows more; `openwork help --json` prints the tables.
";

#[derive(Serialize)]
struct Tables {
    ok: bool,
    version: &'static str,
    commands: Vec<Described>,
    options: &'static [OptionRow],
    errors: Vec<ErrorTable>,
    routes: Vec<RouteTable>,
}

/// A row with what follows from the other tables.
#[derive(Serialize)]
struct Described {
    #[serde(flatten)]
    row: &'static CommandRow,
    aliases: Vec<String>,
    options: Vec<&'static str>,
    /// Lines of a shell.
    examples: Vec<&'static str>,
}

#[derive(Serialize)]
struct ErrorTable {
    code: &'static str,
    exit: u8,
    http: &'static [u16],
}

#[derive(Serialize)]
struct RouteTable {
    method: &'static str,
    path: &'static str,
}

/// Prints help about everything, about a command, or about the commands that share a first word.
///
/// # Errors
/// When the output cannot be written.
pub fn print(out: &mut Output, topic: Option<&str>) -> Result<()> {
    out.print(&tables(), |_| match topic.and_then(|topic| COMMANDS.iter().find(|row| row.name == topic)) {
        Some(row) => command_help(row) + &siblings(row),
        None => overview(topic),
    })
}

fn tables() -> Tables {
    let described = |row: &'static CommandRow| Described {
        row,
        aliases: aliases(row.name),
        options: row.options().map(|option| option.name).collect(),
        examples: examples::of(row.name).iter().map(|(line, _)| *line).collect(),
    };
    Tables {
        ok: true,
        version: env!("CARGO_PKG_VERSION"),
        commands: COMMANDS.iter().map(described).collect(),
        options: OPTIONS,
        errors: Code::ALL
            .iter()
            .map(|code| ErrorTable { code: code.name(), exit: code.exit_status(), http: code.http() })
            .collect(),
        routes: ROUTES.iter().map(|(method, path, _)| RouteTable { method, path }).collect(),
    }
}

/// The other spellings of a command: its last word by its alias, and `workspace` left out or short.
fn aliases(name: &str) -> Vec<String> {
    let short = |word: &str| ALIASES.iter().find(|(_, long)| *long == word).map(|(short, _)| *short);
    let (first, last) = name.split_once(' ').unwrap_or(("", name));
    let firsts = match first {
        OMISSIBLE => vec!["workspace ", "ws ", ""],
        "" => vec![""],
        _ => return short(last).map(|last| format!("{first} {last}")).into_iter().collect(),
    };
    let lasts = [Some(last), short(last)];
    let spellings = firsts.iter().flat_map(|first| lasts.iter().flatten().map(move |last| format!("{first}{last}")));
    spellings.filter(|spelling| spelling != name).collect()
}

fn overview(group: Option<&str>) -> String {
    let mut text = format!("{ABOUT}\n\nusage: openwork <command> [arguments] [options]\n\ncommands:\n");
    let in_group = |row: &&CommandRow| group.is_none_or(|group| row.name.split(' ').next() == Some(group));
    rows(
        &mut text,
        COMMANDS.iter().filter(in_group).map(|row| (format!("{} {}", row.name, row.args), row.summary.to_owned())),
    );
    text.push_str("\noptions of every command:\n");
    rows(&mut text, OPTIONS.iter().filter(|row| row.commands.is_empty()).map(|row| described(row, "")));
    text.push_str(NOTES);
    text
}

/// The commands that share the first word of this one.
fn siblings(row: &CommandRow) -> String {
    let mut text = String::new();
    let is_sibling = |other: &&CommandRow| other.name.split_once(' ').is_some_and(|(group, _)| group == row.name);
    rows(&mut text, COMMANDS.iter().filter(is_sibling).map(|row| (row.name.to_owned(), row.summary.to_owned())));
    if text.is_empty() { text } else { format!("\ncommands:\n{text}") }
}

fn command_help(row: &CommandRow) -> String {
    let usage = format!("openwork {} [options] {}", row.name, row.args);
    let mut text = format!("{}\n\nusage: {}\n", row.summary, usage.trim_end());
    if let Some(default) = row.default_workspace() {
        let _ = writeln!(text, "  default workspace: {default}");
    }
    let also: Vec<String> = aliases(row.name).into_iter().map(|alias| format!("openwork {alias}")).collect();
    if !also.is_empty() {
        let _ = writeln!(text, "  also: {}", also.join(", "));
    }
    if row.options().next().is_some() {
        text.push_str("\noptions:\n");
        rows(&mut text, row.options().map(|option| described(option, row.name)));
    }
    text.push_str("\nexamples:\n");
    let example = |(line, about): &(&str, &str)| ((*line).to_owned(), (*about).to_owned());
    rows(&mut text, examples::of(row.name).iter().map(example));
    let global = OPTIONS.iter().filter(|option| option.commands.is_empty()).map(spelled);
    let _ = writeln!(text, "\nand for every command (`openwork help`): {}", global.collect::<Vec<_>>().join("; "));
    text
}

/// An option as users write it: `-q, --quiet`, `--name NAME`.
pub fn spelled(row: &OptionRow) -> String {
    let short = row.short.map_or_else(String::new, |short| format!("{short}, "));
    let value = row.value.map_or_else(String::new, |value| format!(" {value}"));
    format!("{short}{}{value}", row.name)
}

fn described(row: &OptionRow, command: &str) -> (String, String) {
    let env = row.env.map_or_else(String::new, |env| format!(" [{env}]"));
    (spelled(row), format!("{}{env}", row.help_for(command)))
}

fn rows(text: &mut String, rows: impl Iterator<Item = (String, String)>) {
    let rows: Vec<(String, String)> = rows.collect();
    let width = rows.iter().map(|(left, _)| left.trim_end().chars().count()).max().unwrap_or(0);
    for (left, right) in rows {
        let _ = writeln!(text, "  {:width$}  {right}", left.trim_end());
    }
}
