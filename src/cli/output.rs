//! One value, printed for people or as JSON.
//!
//! Invariants: results go to standard output, everything else to standard error; a closed pipe ends
//! the output quietly, and any other failure to write is an error; text for people contains no
//! control characters from names, paths or logs.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::termios::tcgetwinsize;
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use crate::error::{Error, Result};
use crate::wire::Failure;
use crate::workspace::is_unprintable;

/// How long a wait may last before the terminal shows what the command waits for.
const SILENCE: Duration = Duration::from_secs(1);

/// The widest column that a table pads the others to, in columns of a terminal: longer than most paths.
const MAX_COLUMN_WIDTH: usize = 300;
/// The widest cell of a table that does not fit the terminal, in its columns: long enough to tell names apart.
const CUT_CELL_WIDTH: usize = 32;

/// The output of a command.
pub struct Output {
    json: bool,
    closed: bool,
}

impl Output {
    /// Prints for people, or JSON.
    pub fn new(json: bool) -> Output {
        Output { json, closed: false }
    }

    /// Whether it prints JSON.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Whether the reader has closed the pipe.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Prints a value: as one JSON object, or as the text that `human` makes of it, with its newline.
    ///
    /// # Errors
    /// When writing fails, unless the reader has closed the pipe.
    pub fn print<T: Serialize>(&mut self, value: &T, human: impl FnOnce(&T) -> String) -> Result<()> {
        if self.json {
            let mut line =
                serde_json::to_string(value).map_err(|e| Error::Internal(format!("cannot write JSON: {e}")))?;
            line.push('\n');
            self.write(line.as_bytes())
        } else {
            self.write(human(value).as_bytes())
        }
    }

    /// Prints bytes unchanged.
    ///
    /// # Errors
    /// As [`Output::print`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.closed {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            other => other.map_err(|e| Error::io("write to", "standard output", e)),
        }
    }

    /// Reports a failure: as JSON on standard output, else on standard error.
    pub fn fail(&mut self, error: &Error) {
        // A failure of standard output goes to standard error.
        if self.json && self.print(&Failure::from(error), |_| String::new()).is_ok() {
            return;
        }
        let label = if colour(&io::stderr()) { "\x1b[1;31merror:\x1b[0m" } else { "error:" };
        let mut text = format!("{label} {}\n", clean_lines(&error.to_string()));
        if let Some(hint) = error.hint() {
            let _ = writeln!(text, "hint: {}", clean_lines(&hint));
        }
        note(&text);
    }
}

/// Prints to standard error; a failure there cannot be reported anywhere.
pub fn note(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// A word in a colour (an escape sequence), where standard output is a terminal that wants colour.
pub fn coloured(escape: &str, word: &str) -> String {
    if colour(&io::stdout()) { format!("{escape}{word}\x1b[0m") } else { word.to_owned() }
}

/// Whether to use colour: only on a terminal, never with `NO_COLOR` or `TERM=dumb`.
fn colour(stream: &impl IsTerminal) -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    stream.is_terminal() && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Text for one line, its control characters replaced.
pub fn clean(text: &str) -> Cow<'_, str> {
    // Most text is plain ASCII, and lists are long.
    if text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Cow::Borrowed(text);
    }
    text.chars().map(|c| if is_unprintable(c) { '\u{fffd}' } else { c }).collect::<String>().into()
}

/// Text of several lines, its control characters but line ends and tabs replaced.
pub fn clean_lines(text: &str) -> String {
    text.chars().map(|c| if is_unprintable(c) && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// Rows with aligned columns and cleaned cells, without spaces at the ends of lines. On a terminal that the
/// rows are too wide for, long cells are cut in all columns but the last; elsewhere nothing is cut.
pub fn table<'a, const N: usize>(rows: impl IntoIterator<Item = [Cow<'a, str>; N]> + Clone) -> String {
    table_for(rows, screen_width())
}

/// The columns of the terminal that is standard output, if it is one.
fn screen_width() -> Option<usize> {
    let stdout = io::stdout();
    let size = stdout.is_terminal().then(|| tcgetwinsize(&stdout).ok()).flatten()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

fn table_for<'a, const N: usize>(
    rows: impl IntoIterator<Item = [Cow<'a, str>; N]> + Clone,
    screen: Option<usize>,
) -> String {
    let mut widths = [0; N];
    let mut count = 0;
    for row in rows.clone() {
        count += 1;
        for (cell, widest) in row.iter().zip(&mut widths) {
            *widest = (*widest).max(width(&clean(cell)));
        }
    }
    // A wider cell sticks out, which is better than padding every row.
    widths = widths.map(|width| width.min(MAX_COLUMN_WIDTH));
    let cuts = screen.is_some_and(|screen| widths.iter().map(|width| width + 2).sum::<usize>() > screen + 2);
    if cuts {
        for width in widths.iter_mut().rev().skip(1) {
            *width = (*width).min(CUT_CELL_WIDTH);
        }
    }
    let spaces = " ".repeat(widths.iter().max().unwrap_or(&0) + 2);
    let mut text = String::with_capacity(count * widths.iter().map(|width| width + 2).sum::<usize>());
    for row in rows {
        for (at, (cell, widest)) in row.iter().zip(&widths).enumerate() {
            let mut cell = clean(cell);
            if cuts && at + 1 < N && width(&cell) > *widest {
                cell = cut(&cell, *widest).into();
            }
            text.push_str(&cell);
            text.push_str(&spaces[..widest.saturating_sub(width(&cell)) + 2]);
        }
        text.truncate(text.bytes().rposition(|byte| byte != b' ').map_or(0, |last| last + 1));
        text.push('\n');
    }
    text
}

/// How many columns of a terminal a clean text takes: two for wide characters, none for combining ones.
fn width(text: &str) -> usize {
    // Lists are long, and most of their text is ASCII.
    if text.is_ascii() { text.len() } else { text.width() }
}

/// Cuts a text to this many columns, with `…` for the rest.
fn cut(text: &str, columns: usize) -> String {
    // Measure prefixes: a sequence of several characters (an emoji) can be narrower than their sum.
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    let fitting = ends.take_while(|end| width(&text[..*end]) < columns).last().unwrap_or(0);
    format!("{}…", &text[..fitting])
}

/// Bytes as people read them.
pub fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A duration as people read it, from milliseconds.
pub fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m {s}s"),
        (0, h, m, _) => format!("{h}h {m}m"),
        (d, h, ..) => format!("{d}d {h}h"),
    }
}

/// Tells a terminal what the command waits for, from the first second until it is dropped.
pub struct Waiting(Option<(Sender<()>, JoinHandle<()>)>);

impl Waiting {
    /// Starts a wait for `what`, a noun phrase.
    pub fn new(what: &'static str) -> Waiting {
        if !io::stderr().is_terminal() {
            return Waiting(None);
        }
        let (done, wait) = channel();
        let thread = std::thread::Builder::new().spawn(move || {
            if wait.recv_timeout(SILENCE) == Err(RecvTimeoutError::Timeout) {
                note(&format!("waiting for {what} …"));
                let _ = wait.recv();
                note("\r\x1b[K");
            }
        });
        Waiting(thread.ok().map(|thread| (done, thread)))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some((done, thread)) = self.0.take() {
            drop(done);
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned_and_escaped() {
        let rows = [["a".into(), "é\x1b[31m".into(), "".into()], ["long".into(), "b".into(), "".into()]];
        assert_eq!(table(rows), "a     é\u{fffd}[31m\nlong  b\n");
    }

    /// Each second column begins in the same column of the terminal.
    #[test]
    fn tables_align_by_terminal_columns() {
        // Wide; e and a combining accent; a zero-width joiner that makes one emoji of two; a flag.
        let names = ["plain", "日本", "e\u{301}te\u{301}", "👩\u{200d}💻", "ｆｕｌｌ"];
        let text = table_for(names.map(|name| [Cow::from(name), "x".into()]), None);
        assert_eq!(text, "plain     x\n日本      x\ne\u{301}te\u{301}       x\n👩\u{200d}💻        x\nｆｕｌｌ  x\n");
    }

    #[test]
    fn long_names_are_cut_when_the_terminal_is_narrow() {
        let (long, wide) = ("n".repeat(60), "日".repeat(30));
        let rows = || {
            [
                [Cow::from("NAME"), "WHERE".into()],
                [long.clone().into(), "/p".into()],
                [wide.clone().into(), "/q".into()],
            ]
        };
        let cut = table_for(rows(), Some(66));
        let expected = format!("NAME{}WHERE\n{}…  /p\n{}…   /q\n", " ".repeat(30), "n".repeat(31), "日".repeat(15));
        assert_eq!(cut, expected);
        // What fits, and what is for a file or a pipe, is whole.
        for screen in [Some(67), None] {
            let whole = table_for(rows(), screen);
            assert!(whole.contains(&long) && whole.contains(&wide), "{whole}");
        }
        // The last column is a path, which somebody may want to copy.
        let path = "/p".repeat(40);
        assert!(table_for([[Cow::from("name"), path.clone().into()]], Some(20)).contains(&path));
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(999), "0s");
        assert_eq!(duration(61_000), "1m 1s");
        assert_eq!(duration(3_600_000), "1h 0m");
        assert_eq!(duration(90_000_000), "1d 1h");
    }
}
