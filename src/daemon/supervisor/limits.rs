//! The time constants of supervision, as data: the policy has none of its own, so the simulation, and
//! process tests of waits that take minutes, can use others.

use std::time::Duration;

/// The times and counts that the policy decides by.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How long `--version` may take: half a second warm, more from a cold disk.
    pub version: Duration,
    /// How long a start may take without growth of its log or processor time: opencode needs 1 to 3 s,
    /// and 10 s for the first instance of a HOME.
    pub ready: Duration,
    /// How long a start may take in any case: the first one after an upgrade can migrate a database
    /// for minutes.
    pub ready_at_most: Duration,
    /// The least time for an adopted opencode that does not listen yet, however old it is.
    pub adopt: Duration,
    /// The first interval between probes of a starting opencode: a fraction of a start, since requests wait
    /// for it.
    pub start_probe_interval: Duration,
    /// The longest interval between probes of a starting opencode; it grows with the time that the start
    /// has taken.
    pub max_start_probe_interval: Duration,
    /// The first time limit for a health call to a starting opencode. Short, since opencode never answers
    /// requests of the first 0.3 s or so after it listens: the call is repeated, with a limit that grows
    /// with the time since opencode listens.
    pub first_probe: Duration,
    /// The interval between probes of a ready opencode.
    pub probe_interval: Duration,
    /// The time limit for a health call to a ready opencode.
    pub probe: Duration,
    /// opencode without an answer for this long hangs. Long, since a restart costs users their running
    /// turns.
    pub hang: Duration,
    /// The same for an opencode that is busy all that time.
    pub hang_busy: Duration,
    /// How many health calls must fail in that time.
    pub hang_probes: u32,
    /// Busy means at least 1/`busy_part` of a core between each two probes.
    pub busy_part: u32,
    /// A start makes progress while it uses at least 1/`progress_part` of a core. An idle event loop stays
    /// far below.
    pub progress_part: u32,
    /// The time limit for disposing all instances at an orderly stop.
    pub dispose: Duration,
    /// The interval between TERM signals: opencode ignores the first while it installs a plugin.
    pub term_again: Duration,
    /// How long to wait for a process after KILL: only the kernel can hold it now.
    pub killed: Duration,
    /// The time between TERM and KILL for descendants that outlive opencode: a killed `git commit` leaves
    /// its lock in the user's repository.
    pub sweep: Duration,
    /// The time limit for a stop, whatever hangs.
    pub stop: Duration,
    /// The first backoff between two starts; each further one is twice as long.
    pub backoff_first: Duration,
    /// The longest backoff.
    pub backoff_last: Duration,
    /// Healthy this long: the next failure starts a fresh backoff.
    pub healthy: Duration,
    /// This many failures within `failure_window`, and opencode stays down.
    pub failures: usize,
    /// See `failures`.
    pub failure_window: Duration,
    /// How many consecutive launches may find their port taken before that counts as a failure.
    pub port_tries: u32,
}

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

impl Limits {
    /// The times of a real daemon.
    pub const STANDARD: Limits = Limits {
        version: s(20),
        ready: s(60),
        ready_at_most: s(600),
        adopt: s(10),
        start_probe_interval: ms(15),
        max_start_probe_interval: s(1),
        first_probe: ms(50),
        probe_interval: s(10),
        probe: s(5),
        hang: s(60),
        hang_busy: s(600),
        hang_probes: 3,
        busy_part: 10,
        progress_part: 100,
        dispose: ms(2500),
        term_again: s(1),
        killed: s(2),
        sweep: s(2),
        stop: s(45),
        backoff_first: ms(250),
        backoff_last: s(30),
        healthy: s(30),
        failures: 6,
        failure_window: s(120),
        port_tries: 10,
    };

    /// The times of this daemon: [`Limits::STANDARD`]. Debug builds divide the long ones by
    /// `OPENWORK_TEST_PACE`, for process tests.
    pub fn of_this_daemon() -> Limits {
        let pace = std::env::var("OPENWORK_TEST_PACE").ok().filter(|_| cfg!(debug_assertions));
        let pace = pace.and_then(|pace| pace.parse().ok()).filter(|pace| *pace > 0).unwrap_or(1);
        Limits::STANDARD.paced(pace)
    }

    /// Divides the long waits by `pace`.
    fn paced(self, pace: u32) -> Limits {
        Limits {
            ready: self.ready / pace,
            ready_at_most: self.ready_at_most / pace,
            adopt: self.adopt / pace,
            probe_interval: self.probe_interval / pace,
            probe: self.probe / pace,
            hang: self.hang / pace,
            hang_busy: self.hang_busy / pace,
            healthy: self.healthy / pace,
            failure_window: self.failure_window / pace,
            ..self
        }
    }
}
