//! The options of a daemon: plain data, from the command line to the daemon.

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

/// The environment variable that marks everything that opencode starts as its own.
pub const MARKER: &str = "OPENWORK_ENGINE";

/// The socket on which a service manager expects our readiness, and not that of our children.
pub const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// How long the service manager waits for a sign of life, in microseconds, and of which process.
pub const WATCHDOG_USEC: &str = "WATCHDOG_USEC";
/// See [`WATCHDOG_USEC`].
pub const WATCHDOG_PID: &str = "WATCHDOG_PID";

/// How many sockets the service manager passes, to which process, and what they are called.
pub const LISTEN_FDS: &str = "LISTEN_FDS";
/// See [`LISTEN_FDS`].
pub const LISTEN_PID: &str = "LISTEN_PID";

/// What a service manager tells one process in its environment, and no other: neither opencode nor a
/// daemon that a command starts from within a service.
pub const SERVICE_VARIABLES: [&str; 6] =
    [NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID, LISTEN_FDS, LISTEN_PID, "LISTEN_FDNAMES"];

/// Settings of glibc's allocator in the environment of a daemon in the background, unless the user has
/// set them: one pool for all threads, returned to the system when free. Otherwise the memory of a burst
/// of large requests stays resident for weeks, in the pool of each thread: after 300 bodies of 1 MB, 60 at
/// once, 66 to 80 MB instead of 3 to 6.
const ALLOCATOR: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "1"), ("MALLOC_TRIM_THRESHOLD_", "131072")];

/// The environment variable that lists which of [`ALLOCATOR`] openwork has set, separated by commas:
/// opencode does not get those.
pub const ALLOCATOR_MARK: &str = "OPENWORK_ALLOCATOR";

/// Those of [`ALLOCATOR`] that openwork may set, by `ours`, and [`ALLOCATOR_MARK`] with their names.
pub fn allocator(ours: impl Fn(&str) -> bool) -> Vec<(&'static str, String)> {
    let ours: Vec<_> = ALLOCATOR.into_iter().filter(|(name, _)| ours(name)).collect();
    let names: Vec<&str> = ours.iter().map(|(name, _)| *name).collect();
    let mark = (ALLOCATOR_MARK, names.join(","));
    ours.into_iter().map(|(name, value)| (name, value.to_owned())).chain([mark]).collect()
}

/// The default of `--daemon-port`, while no other was used.
pub const DEFAULT_PORT: u16 = 6174;

/// The default of `--idle-ttl`.
pub const DEFAULT_IDLE_TTL: Duration = Duration::from_secs(30 * 60);

/// The option for [`EngineOptions::shared`].
pub const SHARED: &str = "--shared";

/// The options of a daemon.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The port to listen on; chosen when absent.
    pub port: Option<u16>,
    /// The options for opencode.
    pub engine: EngineOptions,
    /// An instance unused for this long is disposed; never when absent.
    pub idle_ttl: Option<Duration>,
    /// Origins of web pages that may call the daemon, beside the built-in ones.
    pub origins: Vec<String>,
}

impl Options {
    /// Whether all options have their defaults.
    pub fn is_default(&self) -> bool {
        let EngineOptions { binary, port, host, max_memory, shared } = &self.engine;
        self.port.or(*port).is_none()
            && host.is_none()
            && max_memory.is_none()
            && !shared
            && binary.is_none()
            && self.origins.is_empty()
            && self.idle_ttl == Some(DEFAULT_IDLE_TTL)
    }

    /// The options as arguments of `openwork daemon`.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments = Vec::new();
        let option = |arguments: &mut Vec<OsString>, name: &str, value: &OsStr| {
            let mut argument = OsString::from(format!("{name}="));
            argument.push(value);
            arguments.push(argument);
        };
        if let Some(port) = self.port {
            option(&mut arguments, "--daemon-port", port.to_string().as_ref());
        }
        if let Some(port) = self.engine.port {
            option(&mut arguments, "--opencode-port", port.to_string().as_ref());
        }
        if let Some(host) = self.engine.host {
            option(&mut arguments, "--opencode-host", host.to_string().as_ref());
        }
        if let Some(binary) = &self.engine.binary {
            option(&mut arguments, "--opencode-bin", binary.as_ref());
        }
        if let Some(bytes) = self.engine.max_memory {
            option(&mut arguments, "--max-memory", bytes.to_string().as_ref());
        }
        if self.engine.shared {
            arguments.push(SHARED.into());
        }
        // Always: the variable of this command must not be read again by the daemon.
        option(&mut arguments, "--idle-ttl", format!("{}s", self.idle_ttl.unwrap_or_default().as_secs()).as_ref());
        for origin in &self.origins {
            option(&mut arguments, "--cors", origin.as_ref());
        }
        arguments
    }
}

/// The options for opencode.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// The program; searched for when absent.
    pub binary: Option<PathBuf>,
    /// The port for opencode; chosen when absent.
    pub port: Option<u16>,
    /// The address for opencode, in 127.0.0.0/8; chosen when absent.
    pub host: Option<Ipv4Addr>,
    /// More memory than this, with all that opencode has started, is too much. Bytes; no limit when
    /// absent.
    pub max_memory: Option<u64>,
    /// Use the user's own service of opencode 2.x instead of an opencode of our own.
    pub shared: bool,
}
