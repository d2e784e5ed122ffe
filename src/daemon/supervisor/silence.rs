//! Evidence that a process without an answer still works: processor time, and a growing log.

use std::time::{Duration, Instant};

use super::limits::Limits;

/// The processor time of a process at one moment; none when it could not be read.
type Sample = Option<Duration>;

/// Whether a process used at least 1/`part` of a core between two samples.
fn was_busy(before: Sample, after: Sample, passed: Duration, part: u32) -> bool {
    match (before, after) {
        (Some(before), Some(after)) => after.saturating_sub(before) >= passed / part,
        (None, _) | (_, None) => false,
    }
}

/// The time in which a process that was ready gives no answer.
#[derive(Debug)]
pub struct Silence {
    since: Instant,
    probes: u32,
    /// The last sample and its time.
    sampled: Option<(Instant, Sample)>,
    /// The process was busy between each two samples.
    busy: bool,
}

impl Silence {
    /// A silence that began at `since`.
    pub fn new(since: Instant) -> Silence {
        Silence { since, probes: 0, sampled: None, busy: true }
    }

    /// How long the silence has lasted.
    pub fn since(&self, now: Instant) -> Duration {
        now.duration_since(self.since)
    }

    /// Records a health call without an answer.
    pub fn probed(&mut self, cpu: Sample, now: Instant, limits: &Limits) {
        self.probes += 1;
        match self.sampled {
            None => self.sampled = Some((now, cpu)),
            // The kernel counts processor time in coarse ticks: short intervals prove nothing.
            Some((at, before)) if now.duration_since(at) >= limits.probe_interval / 2 => {
                self.busy &= was_busy(before, cpu, now.duration_since(at), limits.busy_part);
                self.sampled = Some((now, cpu));
            }
            Some(_) => {}
        }
    }

    /// Whether the silence has lasted long enough to end the process.
    pub fn is_hang(&self, now: Instant, limits: &Limits) -> bool {
        let limit = if self.busy { limits.hang_busy } else { limits.hang };
        self.probes >= limits.hang_probes && self.since(now) >= limit
    }
}

/// The progress of a start: growth of its log or processor time.
#[derive(Debug)]
pub struct Progress {
    sampled: (Instant, Sample, u64),
    /// When a sample last showed progress.
    seen: Option<Instant>,
    /// When progress was assumed, until the next sample.
    assumed: Option<Instant>,
}

impl Progress {
    /// The progress of a process that was just launched or adopted.
    pub fn new(now: Instant) -> Progress {
        Progress { sampled: (now, Some(Duration::ZERO), 0), seen: None, assumed: Some(now) }
    }

    /// Takes a sample, unless the last one is too recent to compare with.
    pub fn sample(&mut self, cpu: Sample, log: u64, now: Instant, limits: &Limits) {
        let (at, before, size) = self.sampled;
        if now.duration_since(at) >= limits.probe_interval / 2 {
            if log != size || was_busy(before, cpu, now.duration_since(at), limits.progress_part) {
                self.seen = Some(now);
            }
            self.sampled = (now, cpu, log);
            self.assumed = None;
        }
    }

    /// Assumes progress: the probe was never sent, which says nothing about the process.
    pub fn assume(&mut self, now: Instant) {
        self.assumed = Some(now);
        self.sampled.0 = now;
    }

    /// Whether a recent sample showed progress. One sample without it is no proof: on a busy machine the
    /// process may get no processor for that long.
    pub fn is_made(&self, now: Instant, limits: &Limits) -> bool {
        let is_recent = |at| now.duration_since(at) <= limits.probe_interval * 2;
        self.seen.is_some_and(is_recent) || self.assumed.is_some_and(is_recent)
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
    fn busy_means_processor_time_between_each_two_samples() {
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
    fn samples_in_quick_succession_are_ignored() {
        let begun = Instant::now();
        let mut silence = Silence::new(begun);
        // Processor time grows in ticks: at four samples a second, most find it unchanged.
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

    #[test]
    fn one_sample_without_progress_does_not_end_a_start() {
        let begun = Instant::now();
        let mut progress = Progress::new(begun);
        let mut sample = |log, at| progress.sample(None, log, begun + s(at), &LIMITS);
        sample(1, 50);
        sample(1, 60);
        assert!(progress.is_made(begun + s(60), &LIMITS));
        assert!(progress.is_made(begun + s(70), &LIMITS));
        assert!(!progress.is_made(begun + s(71), &LIMITS));
    }

    #[test]
    fn progress_is_assumed_until_a_sample_is_taken() {
        let begun = Instant::now();
        let mut progress = Progress::new(begun);
        assert!(progress.is_made(begun + s(10), &LIMITS));
        progress.sample(None, 0, begun + s(10), &LIMITS);
        assert!(!progress.is_made(begun + s(10), &LIMITS));
        progress.assume(begun + s(11));
        assert!(progress.is_made(begun + s(12), &LIMITS));
    }
}
