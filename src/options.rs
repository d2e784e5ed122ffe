//! What a daemon can be told: plain data, from the command line to the daemon.

use std::path::PathBuf;
use std::time::Duration;

/// The environment variable by which everything that opencode starts is known to be its.
pub const MARKER: &str = "OPENWORK_ENGINE";

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
        let EngineOptions { binary, port } = &self.engine;
        self.port.or(*port).is_none()
            && binary.is_none()
            && self.origins.is_empty()
            && self.idle_ttl == Some(DEFAULT_IDLE_TTL)
    }
}

/// What it can be told about opencode.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// The one to start; searched for when absent.
    pub binary: Option<PathBuf>,
    /// Its port; chosen when absent.
    pub port: Option<u16>,
}
