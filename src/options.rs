//! The options of a daemon: plain data, from the command line to the daemon.

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

/// The environment variable that marks opencode and everything that it starts.
pub const MARKER: &str = "OPENWORK_ENGINE";

/// The variable with the service manager's notification socket. Children must not inherit it.
pub const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// How long the service manager waits for a sign of life, in microseconds.
pub const WATCHDOG_USEC: &str = "WATCHDOG_USEC";
/// The process that [`WATCHDOG_USEC`] applies to.
pub const WATCHDOG_PID: &str = "WATCHDOG_PID";

/// How many sockets the service manager passes.
pub const LISTEN_FDS: &str = "LISTEN_FDS";
/// The process that [`LISTEN_FDS`] applies to.
pub const LISTEN_PID: &str = "LISTEN_PID";

/// The variables that a service manager sets for one process alone. Neither opencode nor a daemon that a
/// command starts from within a service may inherit them.
pub const SERVICE_VARIABLES: [&str; 6] =
    [NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID, LISTEN_FDS, LISTEN_PID, "LISTEN_FDNAMES"];

/// Settings of glibc's allocator in the environment of a daemon in the background, unless the user has
/// set them: one pool for all threads, returned to the system when free. Otherwise the memory of a burst
/// of large requests stays resident for weeks, in the pool of each thread: after 300 bodies of 1 MB, 60 at
/// once, 66 to 80 MB instead of 3 to 6.
const ALLOCATOR: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "1"), ("MALLOC_TRIM_THRESHOLD_", "131072")];

/// The environment variable that lists which of [`ALLOCATOR`] openwork has set, separated by commas. opencode
/// does not inherit those.
pub const ALLOCATOR_MARK: &str = "OPENWORK_ALLOCATOR";

/// The variables of [`ALLOCATOR`] for which `ours` holds, and [`ALLOCATOR_MARK`] with their names.
pub fn allocator(ours: impl Fn(&str) -> bool) -> Vec<(&'static str, String)> {
    let ours: Vec<_> = ALLOCATOR.into_iter().filter(|(name, _)| ours(name)).collect();
    let names: Vec<&str> = ours.iter().map(|(name, _)| *name).collect();
    let mark = (ALLOCATOR_MARK, names.join(","));
    ours.into_iter().map(|(name, value)| (name, value.to_owned())).chain([mark]).collect()
}

/// The default of `--daemon-port`, until another port was used.
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
        // Always explicit, so that the daemon does not read the variable again.
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
    /// The memory limit for opencode with its children, in bytes; no limit when absent.
    pub max_memory: Option<u64>,
    /// Use the user's own service of opencode 2.x instead of an opencode of our own.
    pub shared: bool,
}
