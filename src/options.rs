//! What a daemon can be told: plain data, from the command line to the daemon.

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

/// The environment variable by which everything that opencode starts is known to be its.
pub const MARKER: &str = "OPENWORK_ENGINE";

/// Where a service manager is told that *we* are ready: no business of what we start.
pub const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// What a daemon in the background has in its environment for glibc's allocator, unless its user has
/// said something: one pool for all threads, given back to the system when it is free. Else a
/// burst of large requests would stay resident, in each thread's own pool, for weeks.
const ALLOCATOR: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "1"), ("MALLOC_TRIM_THRESHOLD_", "131072")];

/// The environment variable that names those of [`ALLOCATOR`] that are ours, separated by commas:
/// they are not passed on to opencode.
pub const ALLOCATOR_MARK: &str = "OPENWORK_ALLOCATOR";

/// Those of [`ALLOCATOR`] that are `ours` to set, with [`ALLOCATOR_MARK`] that says which.
pub fn allocator(ours: impl Fn(&str) -> bool) -> Vec<(&'static str, String)> {
    let ours: Vec<_> = ALLOCATOR.into_iter().filter(|(name, _)| ours(name)).collect();
    let names: Vec<&str> = ours.iter().map(|(name, _)| *name).collect();
    let mark = (ALLOCATOR_MARK, names.join(","));
    ours.into_iter().map(|(name, value)| (name, value.to_owned())).chain([mark]).collect()
}

/// How long an instance may be unused, if nothing is said.
pub const DEFAULT_IDLE_TTL: Duration = Duration::from_secs(30 * 60);

/// What a daemon can be told.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The port to listen on; chosen when absent.
    pub port: Option<u16>,
    /// About opencode.
    pub engine: EngineOptions,
    /// Unused for so long, an instance is disposed; never when absent.
    pub idle_ttl: Option<Duration>,
    /// Web pages that may ask, beside the usual ones.
    pub origins: Vec<String>,
}

impl Options {
    /// Whether nothing was asked for.
    pub fn is_default(&self) -> bool {
        let EngineOptions { binary, port, host } = &self.engine;
        self.port.or(*port).is_none()
            && host.is_none()
            && binary.is_none()
            && self.origins.is_empty()
            && self.idle_ttl == Some(DEFAULT_IDLE_TTL)
    }

    /// The same as arguments of `openwork daemon`.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments = Vec::new();
        let mut option = |name: &str, value: &OsStr| {
            let mut argument = OsString::from(format!("{name}="));
            argument.push(value);
            arguments.push(argument);
        };
        if let Some(port) = self.port {
            option("--daemon-port", port.to_string().as_ref());
        }
        if let Some(port) = self.engine.port {
            option("--opencode-port", port.to_string().as_ref());
        }
        if let Some(host) = self.engine.host {
            option("--opencode-host", host.to_string().as_ref());
        }
        if let Some(binary) = &self.engine.binary {
            option("--opencode-bin", binary.as_ref());
        }
        // Also when it is never: said by the environment, it would hold for the daemon only.
        option("--idle-ttl", format!("{}s", self.idle_ttl.unwrap_or_default().as_secs()).as_ref());
        for origin in &self.origins {
            option("--cors", origin.as_ref());
        }
        arguments
    }
}

/// What it can be told about opencode.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// The one to start; searched for when absent.
    pub binary: Option<PathBuf>,
    /// The port for opencode; chosen when absent.
    pub port: Option<u16>,
    /// The address for opencode, in 127.0.0.0/8; chosen when absent.
    pub host: Option<Ipv4Addr>,
}
