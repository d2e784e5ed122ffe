//! `openwork logs`: reads the log files, whether a daemon runs or not.

use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::client::Client;
use super::output::{Output, clean_lines};
use crate::args::Log;
use crate::error::{Error, Result};
use crate::paths::open_private;

/// How often `--follow` looks for new lines: people read no faster.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Serialize)]
struct Lines {
    ok: bool,
    log: &'static str,
    lines: Vec<String>,
}

/// Prints a log or its last lines, and with `follow` new lines too, until `until` if there is one.
///
/// # Errors
/// `usage` for `follow` with JSON, an object without an end; when the log cannot be read.
pub fn print(
    client: &Client,
    out: &mut Output,
    log: Log,
    follow: bool,
    until: Option<Instant>,
    last: Option<usize>,
) -> Result<()> {
    if follow && out.is_json() {
        return Err(Error::usage(
            "--follow and --json exclude each other: a followed log never becomes one JSON object",
        ));
    }
    let (path, name) = match log {
        Log::Opencode => (client.data_dir.opencode_log(), "opencode"),
        Log::Daemon => (client.data_dir.daemon_log(), "daemon"),
    };
    let failed = |e| Error::io("read", &path, e);
    let mut position = 0;
    let mut lines = Vec::new();
    match open_private(&path, OpenOptions::new().read(true)) {
        Ok(file) => position = read_lines(BufReader::new(file), follow, &mut lines).map_err(failed)?,
        // A log that does not exist yet is empty.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
    }
    if let Some(last) = last {
        lines.drain(..lines.len().saturating_sub(last));
    }
    out.print(&Lines { ok: true, log: name, lines }, |lines| text(&lines.lines))?;
    while follow && !out.is_closed() && until.is_none_or(|until| Instant::now() < until) {
        std::thread::sleep(FOLLOW_INTERVAL);
        let mut file = match open_private(&path, OpenOptions::new().read(true)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(failed(e)),
        };
        // The daemon truncates a log that has grown too long.
        if file.metadata().map_err(failed)?.len() < position {
            position = 0;
        }
        file.seek(SeekFrom::Start(position)).map_err(failed)?;
        let mut lines = Vec::new();
        position += read_lines(BufReader::new(file), follow, &mut lines).map_err(failed)?;
        if !lines.is_empty() {
            out.write(text(&lines).as_bytes())?;
        }
    }
    Ok(())
}

/// Reads lines to the end of the file and returns how many bytes they have. Bytes that are not UTF-8
/// are replaced. With `whole`, a last line without its end is left for the next read.
fn read_lines(mut reader: impl BufRead, whole: bool, lines: &mut Vec<String>) -> io::Result<u64> {
    let mut length = 0;
    loop {
        let mut line = Vec::new();
        let count = reader.read_until(b'\n', &mut line)?;
        if count == 0 || (whole && !line.ends_with(b"\n")) {
            return Ok(length);
        }
        length += count as u64;
        let text = String::from_utf8_lossy(&line);
        lines.push(text.trim_end_matches(['\n', '\r']).to_owned());
    }
}

fn text(lines: &[String]) -> String {
    lines.iter().map(|line| clean_lines(line) + "\n").collect()
}
