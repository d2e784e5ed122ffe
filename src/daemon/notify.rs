//! Notifications to the service manager that started the daemon, by the protocol of sd_notify(3): datagrams
//! of `NAME=value` lines to the Unix socket in `NOTIFY_SOCKET`.
//!
//! Invariant: a notification never blocks or fails the daemon. If the manager's queue is full, the datagram
//! is dropped, and a later one makes up for it.

use std::ffi::OsStr;
use std::fmt::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::supervisor::handle::Status;
use crate::options::{NOTIFY_SOCKET, WATCHDOG_PID, WATCHDOG_USEC};
use crate::wire::Phase;

/// The longest text of `STATUS=` about a failure, which may quote opencode's output. Characters.
const STATUS_LENGTH: usize = 200;

/// The service manager, if there is one.
pub struct Notifier {
    manager: Option<(UnixDatagram, SocketAddr)>,
    /// How long the manager waits for a sign of life before it ends the daemon.
    watchdog: Option<Duration>,
}

impl Notifier {
    /// The service manager that the environment names.
    pub fn from_environment() -> Notifier {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let manager = variable(NOTIFY_SOCKET).and_then(|name| {
            let socket = UnixDatagram::unbound().ok()?;
            socket.set_nonblocking(true).ok()?;
            Some((socket, address(&name)?))
        });
        let number = |name| variable(name)?.to_str()?.parse::<u64>().ok();
        // Without WATCHDOG_PID, the variable is for any process that has it: sd_watchdog_enabled(3).
        let is_ours = match variable(WATCHDOG_PID) {
            Some(_) => number(WATCHDOG_PID) == Some(u64::from(std::process::id())),
            None => true,
        };
        let watchdog = number(WATCHDOG_USEC).filter(|limit| is_ours && *limit > 0).map(Duration::from_micros);
        Notifier { manager, watchdog }
    }

    /// Reports that the daemon listens.
    pub fn ready(&self) {
        self.send("READY=1\nWATCHDOG=1");
    }

    /// Reports that the daemon is about to become its successor, which will report that it is ready.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let microseconds = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1000;
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}\nSTATUS=becoming its successor"));
    }

    /// Reports that the daemon is stopping.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    fn send(&self, lines: &str) {
        if let Some((socket, address)) = &self.manager {
            let _ = socket.send_to_addr(lines.as_bytes(), address);
        }
    }
}

/// A path, or the name of an abstract socket after `@`.
fn address(name: &OsStr) -> Option<SocketAddr> {
    match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name).ok(),
        [b'/', ..] => SocketAddr::from_pathname(name).ok(),
        // sd_notify(3) also has addresses for virtual machines, which do not apply here.
        _ => None,
    }
}

/// The reports of the supervisor's thread: the state of opencode, and its own signs of life.
pub struct Reporter {
    notifier: &'static Notifier,
    /// The status reported last.
    status: String,
    /// When the next sign of life is due.
    due: Instant,
}

impl Reporter {
    /// A reporter that has reported nothing yet.
    pub fn new(notifier: &'static Notifier) -> Reporter {
        Reporter { notifier, status: String::new(), due: Instant::now() }
    }

    /// Reports a changed status, and a due sign of life. Returns when the next sign of life is due, if the
    /// manager expects one.
    pub fn report(&mut self, status: impl FnOnce() -> Status, now: Instant) -> Option<Instant> {
        self.notifier.manager.as_ref()?;
        let status = describe(&status());
        if status != self.status {
            self.notifier.send(&format!("STATUS={status}"));
            self.status = status;
        }
        let limit = self.notifier.watchdog?;
        if now >= self.due {
            self.notifier.send("WATCHDOG=1");
            // Half of the time, as sd_watchdog_enabled(3) recommends.
            self.due = now + limit / 2;
        }
        Some(self.due)
    }
}

/// One line for `systemctl status`.
fn describe(status: &Status) -> String {
    let mut text = match status.phase {
        Phase::Starting => "opencode is starting",
        Phase::Ready => "opencode is ready",
        Phase::Stopping => "opencode is stopping",
        Phase::Waiting => "opencode has ended and is started again soon",
        Phase::Failed => "opencode has failed; the next request that needs it starts it again",
    }
    .to_owned();
    if let Some(version) = status.version.as_ref().filter(|_| status.phase == Phase::Ready) {
        let _ = write!(text, " ({version})");
    }
    if let Some(error) = status.last_error.as_ref().filter(|_| status.phase != Phase::Ready) {
        let message = error.message.chars().map(|c| if c.is_control() { ' ' } else { c });
        let _ = write!(text, ": {}", message.take(STATUS_LENGTH).collect::<String>());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_a_path_or_an_abstract_name() {
        let named = |name: &str| address(OsStr::new(name));
        assert_eq!(named("/run/notify").unwrap().as_pathname().unwrap().to_str(), Some("/run/notify"));
        assert_eq!(named("@a b").unwrap().as_abstract_name(), Some(&b"a b"[..]));
        for none in ["", "notify", "vsock:2:1"] {
            assert!(named(none).is_none(), "{none}");
        }
        assert!(named(&format!("/{}", "a".repeat(200))).is_none());
    }
}
