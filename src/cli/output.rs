//! One value, printed for people or as JSON.
//!
//! Invariants: results go to standard output and everything else to standard error; a reader
//! that has closed the pipe ends the output quietly, and any other failure to write is an error;
//! what is printed for people holds no control characters of names, paths or logs.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::wire::Failure;
use crate::workspace::is_unprintable;

/// How long is waited before it is said what for.
const SILENCE: Duration = Duration::from_secs(1);

/// The widest column of a table that others are padded to, in characters: longer than paths are.
const WIDEST: usize = 300;

/// Where results go.
pub struct Output {
    json: bool,
    closed: bool,
}

impl Output {
    /// Output for people, or as JSON.
    pub fn new(json: bool) -> Output {
        Output { json, closed: false }
    }

    /// Whether JSON is wanted.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Whether nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Prints a value: as one JSON object, or as `human` makes of it (which ends with a newline).
    ///
    /// # Errors
    /// When it cannot be written, but for a closed pipe.
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

    /// Prints bytes as they are.
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
        // What cannot be said on standard output is said on the other.
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

/// Prints to standard error; a failure to do so is nobody's.
pub fn note(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Whether colour is wanted: only on a terminal, never with `NO_COLOR` or `TERM=dumb`.
fn colour(stream: &impl IsTerminal) -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    stream.is_terminal() && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Text without control characters, for one line; as it is when it is plain ASCII.
pub fn clean(text: &str) -> Cow<'_, str> {
    // Mostly there is nothing to do, and lists are long.
    if text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Cow::Borrowed(text);
    }
    text.chars().map(|c| if is_unprintable(c) { '\u{fffd}' } else { c }).collect::<String>().into()
}

/// Text without control characters, but for line ends and tabs.
pub fn clean_lines(text: &str) -> String {
    text.chars().map(|c| if is_unprintable(c) && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// Rows with their columns aligned, each cell cleaned; without spaces at the ends of lines.
pub fn table<'a, const N: usize>(rows: impl IntoIterator<Item = [Cow<'a, str>; N]> + Clone) -> String {
    let width = |cell: &Cow<'_, str>| match cell {
        Cow::Borrowed(plain) => plain.len(),
        Cow::Owned(cleaned) => cleaned.chars().count(),
    };
    let mut widths = [0; N];
    let mut count = 0;
    for row in rows.clone() {
        count += 1;
        for (cell, widest) in row.iter().zip(&mut widths) {
            *widest = (*widest).max(width(&clean(cell)));
        }
    }
    // What is wider sticks out: padding all rows for it would be worse.
    widths = widths.map(|width| width.min(WIDEST));
    let spaces = " ".repeat(widths.iter().max().unwrap_or(&0) + 2);
    let mut text = String::with_capacity(count * widths.iter().map(|width| width + 2).sum::<usize>());
    for row in rows {
        for (cell, widest) in row.iter().zip(&widths) {
            let cell = clean(cell);
            text.push_str(&cell);
            text.push_str(&spaces[..widest.saturating_sub(width(&cell)) + 2]);
        }
        text.truncate(text.bytes().rposition(|byte| byte != b' ').map_or(0, |last| last + 1));
        text.push('\n');
    }
    text
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

/// Says on a terminal what is waited for, once it takes more than a second, until it is dropped.
pub struct Waiting(Option<(Sender<()>, JoinHandle<()>)>);

impl Waiting {
    /// Begins to wait for something.
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
    fn tables_are_aligned_and_clean() {
        let rows = [["a".into(), "é\x1b[31m".into(), "".into()], ["long".into(), "b".into(), "".into()]];
        assert_eq!(table(rows), "a     é\u{fffd}[31m\nlong  b\n");
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(999), "0s");
        assert_eq!(duration(61_000), "1m 1s");
        assert_eq!(duration(3_600_000), "1h 0m");
        assert_eq!(duration(90_000_000), "1d 1h");
    }
}
