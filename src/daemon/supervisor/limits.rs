//! Every constant of time in the supervision of opencode, as data: the policy has none of its own, so
//! that the simulation, and process tests of what takes minutes, can give others.

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
    /// How long an adopted opencode that does not listen yet has at least.
    pub adopt: Duration,
    /// How soon a starting opencode is looked at: a fraction of what a start takes, since somebody
    /// waits.
    pub look_interval: Duration,
    /// How seldom a starting opencode is looked at, once its start has taken long.
    pub look_interval_at_most: Duration,
    /// How long a starting opencode may take to answer the first time. Short: opencode never answers
    /// a request of the first moments after it listens (some 0.3 s), so the request is repeated, with
    /// more time the longer the start takes.
    pub first_probe: Duration,
    /// How often a ready opencode is asked for its health.
    pub probe_interval: Duration,
    /// How long a ready opencode may take to answer.
    pub probe: Duration,
    /// After this long without an answer opencode hangs. Long: a restart costs its users their running
    /// turns.
    pub hang: Duration,
    /// The same for an opencode that is busy all the while.
    pub hang_busy: Duration,
    /// How many health calls have to fail in that time.
    pub hang_probes: u32,
    /// Busy: this part of one core, one in so many, between each two probes.
    pub busy_part: u32,
    /// A start makes progress if its processor time grows by one part in so many of the time that
    /// passes. An idle event loop stays far below.
    pub progress_part: u32,
    /// How long disposing all instances may take at an orderly stop.
    pub dispose: Duration,
    /// When TERM is repeated: opencode swallows the first while it installs a plugin.
    pub term_again: Duration,
    /// How long a killed process is waited for: only the kernel can hold it now.
    pub killed: Duration,
    /// How long what opencode leaves behind has between TERM and KILL: a `git commit` that is killed
    /// leaves its lock in the user's repository.
    pub sweep: Duration,
    /// A stop ends after this long, whatever hangs.
    pub stop: Duration,
    /// The first pause between two starts; it doubles.
    pub backoff_first: Duration,
    /// The longest pause.
    pub backoff_last: Duration,
    /// Healthy this long: the next failure starts a fresh backoff.
    pub healthy: Duration,
    /// This many failures within `failure_window`, and opencode stays down.
    pub failures: usize,
    /// See `failures`.
    pub failure_window: Duration,
    /// How many ports in a row may turn out to be taken.
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
        look_interval: ms(15),
        look_interval_at_most: s(1),
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

    /// The times of this daemon: [`Limits::STANDARD`]. A debug build, which is what the process tests
    /// run, takes a factor from `OPENWORK_TEST_PACE`: what lasts minutes is then that many times
    /// shorter.
    pub fn of_this_daemon() -> Limits {
        let pace = std::env::var("OPENWORK_TEST_PACE").ok().filter(|_| cfg!(debug_assertions));
        let pace = pace.and_then(|pace| pace.parse().ok()).filter(|pace| *pace > 0).unwrap_or(1);
        Limits::STANDARD.paced(pace)
    }

    /// The waits that take long, this many times shorter.
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
