//! What a process without an answer may still have going for it: processor time, and a growing log.

use std::time::{Duration, Instant};

use super::limits::Limits;

/// The processor time of a process at one moment.
type Sample = Option<Duration>;

/// Whether a process has used at least one part in `part` of a core between two samples.
fn was_busy(before: Sample, after: Sample, passed: Duration, part: u32) -> bool {
    match (before, after) {
        (Some(before), Some(after)) => after.saturating_sub(before) >= passed / part,
        (None, _) | (_, None) => false,
    }
}

/// A process that answered before and does not now.
#[derive(Debug)]
pub struct Silence {
    since: Instant,
    probes: u32,
    /// When the last sample was taken; none before the first.
    sampled: Option<(Instant, Sample)>,
    /// It was busy between each two samples.
    busy: bool,
}

impl Silence {
    /// Begins now, or then.
    pub fn new(since: Instant) -> Silence {
        Silence { since, probes: 0, sampled: None, busy: true }
    }

    /// How long it lasts.
    pub fn since(&self, now: Instant) -> Duration {
        now.duration_since(self.since)
    }

    /// A health call brought no answer.
    pub fn probed(&mut self, cpu: Sample, now: Instant, limits: &Limits) {
        self.probes += 1;
        match self.sampled {
            None => self.sampled = Some((now, cpu)),
            // Ticks of processor time are coarse: a short interval says nothing.
            Some((at, before)) if now.duration_since(at) >= limits.probe_interval / 2 => {
                self.busy &= was_busy(before, cpu, now.duration_since(at), limits.busy_part);
                self.sampled = Some((now, cpu));
            }
            Some(_) => {}
        }
    }

    /// Whether the process is to be ended for it.
    pub fn is_hang(&self, now: Instant, limits: &Limits) -> bool {
        let limit = if self.busy { limits.hang_busy } else { limits.hang };
        self.probes >= limits.hang_probes && self.since(now) >= limit
    }
}

/// Whether a start goes on: its log or its processor time grows.
#[derive(Debug)]
pub struct Progress {
    sampled: (Instant, Sample, u64),
    made: bool,
}

impl Progress {
    /// None yet.
    pub fn new(now: Instant) -> Progress {
        Progress { sampled: (now, Some(Duration::ZERO), 0), made: true }
    }

    /// Looks again, unless the last look was just now.
    pub fn look(&mut self, cpu: Sample, log: u64, now: Instant, limits: &Limits) {
        let (at, before, size) = self.sampled;
        if now.duration_since(at) >= limits.probe_interval / 2 {
            self.made = log != size || was_busy(before, cpu, now.duration_since(at), limits.progress_part);
            self.sampled = (now, cpu, log);
        }
    }

    /// The process could not be looked at: that says nothing against it.
    pub fn assume(&mut self, now: Instant) {
        self.made = true;
        self.sampled.0 = now;
    }

    /// Whether it was made at the last look, which was not long ago.
    pub fn is_made(&self, now: Instant, limits: &Limits) -> bool {
        self.made && now.duration_since(self.sampled.0) <= limits.probe_interval * 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits::STANDARD;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn busy_is_who_uses_the_processor_between_each_two_looks() {
        for (used, limit) in [([5, 5], LIMITS.hang_busy), ([5, 0], LIMITS.hang), ([0, 5], LIMITS.hang)] {
            let begun = Instant::now();
            let (mut silence, mut now, mut cpu) = (Silence::new(begun), begun, Duration::ZERO);
            for used in used.into_iter().cycle() {
                now += s(15);
                cpu += s(used);
                silence.probed(Some(cpu), now, &LIMITS);
                assert_eq!(silence.since(now), now - begun);
                if silence.is_hang(now, &LIMITS) {
                    break;
                }
            }
            assert_eq!(now - begun, limit, "{used:?}");
        }
    }

    #[test]
    fn looks_soon_after_each_other_say_nothing_about_the_processor() {
        let begun = Instant::now();
        let mut silence = Silence::new(begun);
        // Its time is counted in ticks: of these looks, four a second, most find it unchanged.
        for n in 0..4 * 120 {
            let cpu = s(n / 16) / 2;
            silence.probed(Some(cpu), begun + Duration::from_millis(250) * n as u32, &LIMITS);
        }
        assert!(!silence.is_hang(begun + s(120), &LIMITS));
    }

    #[test]
    fn hang_needs_more_than_one_late_probe() {
        let begun = Instant::now();
        let mut silence = Silence::new(begun);
        let now = begun + s(3600);
        for is_hang in [false, false, true] {
            silence.probed(None, now, &LIMITS);
            assert_eq!(silence.is_hang(now, &LIMITS), is_hang);
        }
    }
}
