//! The manual page, for man(1). Commands, options and errors come from the tables of `args` and `error`, so
//! the page is complete; the prose is in `assets/manual-*.man`.

use std::fmt::Write;

use super::help::spelled;
use crate::args::{COMMANDS, OPTIONS};
use crate::error::Code;

/// The page as roff, with the macros of man(7).
pub fn page() -> String {
    let mut page = format!(".TH OPENWORK 1 {DATE} \"openwork {}\" \"User Commands\"\n", env!("CARGO_PKG_VERSION"));
    let [before, between, after] = PARTS;
    page.push_str(before);
    for row in COMMANDS {
        entry(&mut page, &format!("{} {}", bold(row.name), plain(row.args)), row.summary);
        let own: Vec<String> = row.options().map(|option| bold(option.name)).collect();
        if !own.is_empty() {
            let _ = writeln!(page, ".br\nOptions: {}.", own.join(", "));
        }
    }
    page.push_str(between);
    for row in OPTIONS {
        entry(&mut page, &bold(&spelled(row)), row.help);
        if let Some(env) = row.env {
            let _ = writeln!(page, ".br\nEnvironment: {}.", bold(env));
        }
    }
    page.push_str(after);
    page.push_str(
        ".SH ERRORS\nWith \\fB\\-\\-json\\fR a failure has one of these codes; the number is the exit status.\n",
    );
    for code in Code::ALL {
        let _ = writeln!(page, ".br\n{} {}", plain(code.name()), code.exit_status());
    }
    wrapped(&page)
}

/// The date of this version, for the foot of the page: fixed, so that builds are reproducible.
const DATE: &str = "2026-11-26";
/// The longest line of text, by the conventions of roff. Bytes.
const LINE_LENGTH: usize = 80;

/// Breaks the text of the page into lines. Requests, the tag after `.TP`, and unfilled text (`.nf`) keep
/// their lines.
fn wrapped(page: &str) -> String {
    let mut text = String::with_capacity(page.len());
    let (mut is_tag, mut is_filled) = (false, true);
    for line in page.lines() {
        if line.starts_with('.') || is_tag || !is_filled {
            is_tag = line == ".TP";
            is_filled = line != ".nf" && (is_filled || line == ".fi");
            let _ = writeln!(text, "{line}");
            continue;
        }
        let mut length = 0;
        for word in line.split(' ') {
            if length > 0 && length + 1 + word.len() > LINE_LENGTH {
                // A line that starts with `.` or `'` would be a request.
                text.push_str(if word.starts_with(['.', '\'']) { "\n\\&" } else { "\n" });
                length = 0;
            } else if length > 0 {
                text.push(' ');
                length += 1;
            }
            length += word.len();
            text.push_str(word);
        }
        text.push('\n');
    }
    text
}

/// The prose before the commands, between commands and options, and after the options.
const PARTS: [&str; 3] = [
    include_str!("../assets/manual-1.man"),
    include_str!("../assets/manual-2.man"),
    include_str!("../assets/manual-3.man"),
];

fn entry(page: &mut String, what: &str, about: &str) {
    let _ = writeln!(page, ".TP\n{}\n{}.", what.trim_end(), plain(about));
}

fn bold(text: &str) -> String {
    format!("\\fB{}\\fR", plain(text))
}

/// Text escaped for roff.
fn plain(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}
