//! The daemon's log and the bound on every log.
//!
//! The daemon logs to its standard error. In the background that is `daemon.log`, opened for appending,
//! so the file can be truncated while a process writes to it.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::paths::open_private;

/// A log larger than this is cut. Bytes.
pub const LIMIT: u64 = 10 * 1024 * 1024;
/// How much of the end is kept, in a file with the suffix `.1`. Bytes.
const KEPT_BYTES: u64 = 1024 * 1024;

/// Unix time in milliseconds: for display and for files, never for timeouts.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// Formats Unix milliseconds as `2026-01-31T12:00:00.000Z`.
pub fn timestamp(ms: u64) -> String {
    let (days, rest) = ((ms / 86_400_000) as i64, ms % 86_400_000);
    // Days to date: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600_000, rest / 60_000 % 60, rest / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", rest % 1000)
}

/// Writes a line to the daemon's log. Errors are ignored: a full disk must not stop the daemon.
pub fn line(message: fmt::Arguments<'_>) {
    let line = format!("{} {message}\n", timestamp(now_ms()));
    let _ = io::stderr().write_all(line.as_bytes());
}

/// Writes a line to the daemon's log; takes what `format!` takes.
#[macro_export]
macro_rules! log {
    ($($arg:tt)*) => { $crate::log::line(format_args!($($arg)*)) };
}

/// Opens a log for appending, after cutting it if it is too large.
pub fn open(path: &Path) -> io::Result<File> {
    bound(path)?;
    open_private(path, OpenOptions::new().append(true).create(true))
}

/// Cuts a log of more than 10 MB: copies the last 1 MB to a file with the suffix `.1`, and truncates the
/// log. Lines written between the two steps are lost; the writing process need not reopen the file.
/// Returns whether the log was cut.
///
/// # Errors
/// When either file cannot be opened or written.
pub fn bound(path: &Path) -> io::Result<bool> {
    let mut log = match open_private(path, OpenOptions::new().read(true).write(true)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    let length = log.metadata()?.len();
    if length <= LIMIT {
        return Ok(false);
    }
    let mut old = path.as_os_str().to_owned();
    old.push(".1");
    let mut kept = open_private(Path::new(&old), OpenOptions::new().write(true).create(true))?;
    kept.set_len(0)?;
    log.seek(SeekFrom::Start(length - KEPT_BYTES))?;
    io::copy(&mut (&mut log).take(KEPT_BYTES), &mut kept)?;
    log.set_len(0)?;
    Ok(true)
}

/// Reads the last lines of a log: at most `lines`, none from before the byte `from`, and from at most
/// the last 1 MB. Invalid UTF-8 is replaced.
pub fn tail(path: &Path, from: u64, lines: usize) -> io::Result<Vec<String>> {
    let mut log = open_private(path, OpenOptions::new().read(true))?;
    let length = log.metadata()?.len();
    // A log that is now shorter than `from` has been cut.
    let from = if length < from { 0 } else { from };
    log.seek(SeekFrom::Start(from.max(length.saturating_sub(KEPT_BYTES))))?;
    let mut bytes = Vec::new();
    log.take(KEPT_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    Ok(all[all.len().saturating_sub(lines)..].iter().map(|line| (*line).to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::timestamp;

    #[test]
    fn timestamps_are_iso_8601() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(timestamp(951_827_696_789), "2000-02-29T12:34:56.789Z");
        assert_eq!(timestamp(1_735_689_599_999), "2024-12-31T23:59:59.999Z");
    }
}
