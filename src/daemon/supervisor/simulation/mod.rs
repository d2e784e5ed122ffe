//! The policy lives through days of virtual time in a world that does its worst, and after each step
//! the promises of the supervisor are looked at. A seed decides everything: the one that is printed
//! with a violation replays it (`OPENWORK_SIMULATION_SEED`).
//!
//! By itself a run takes some seconds; `OPENWORK_SIMULATION_SECONDS` says how long. Each promise is
//! shown to bite: a [`Bug`] that is planted in the policy is found.

mod world;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use self::world::{Outcome, World};

/// What is wrong with a policy, in a test of the simulation itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// News of an earlier process is taken for news of the current one.
    OldExit,
    /// A stop that keeps opencode takes back one that does not.
    KeepWins,
    /// A start is ended after its time although it makes progress.
    ImpatientStart,
    /// A lack of resources of ours is taken for silence of opencode.
    LackIsSilence,
    /// One health call without an answer is a hang.
    ImpatientHang,
    /// A hang that uses the processor is ended as one that does not.
    IgnoresBusy,
    /// Too much memory restarts opencode while sessions run.
    CutsTurns,
    /// The next process is started before all of the one before has ended.
    Hasty,
    /// A process that KILL has not ended is forgotten.
    ForgetsStuck,
    /// A crash loop goes on for ever.
    NeverGivesUp,
    /// Nobody is told of a failure.
    SilentFailure,
    /// A health call that was answered is not followed by another.
    ForgetsProbe,
    /// A hang is never found.
    NeverHangs,
    /// Failures are never forgiven.
    NeverForgives,
    /// KILL never follows TERM.
    NeverKills,
    /// A stop leaves what still starts.
    StopForgetsLaunch,
    /// A process that an earlier daemon has left is not looked for.
    NeverAdopts,
    /// An eviction does not ask whether a session runs.
    EvictsBusy,
    /// A request does not wait for the end of an eviction.
    DoesNotWait,
    /// The user's own service is ended as an opencode of ours.
    SignalsService,
    /// The user's own service is started although no request needs it.
    StartsUnneeded,
}

/// Each bug, with the promise that it breaks.
const BUGS: [(Bug, &str); 21] = [
    (Bug::OldExit, "a living process is buried"),
    (Bug::KeepWins, "a stop leaves something behind"),
    (Bug::ImpatientStart, "an opencode that lives is ended"),
    (Bug::LackIsSilence, "an opencode that lives is ended"),
    (Bug::ImpatientHang, "an opencode that lives is ended"),
    (Bug::IgnoresBusy, "an opencode that lives is ended"),
    (Bug::CutsTurns, "a restart for memory cuts a turn"),
    (Bug::Hasty, "two of ours live"),
    (Bug::ForgetsStuck, "a process is launched beside one that is held"),
    (Bug::NeverGivesUp, "opencode fails again and again, and is not given up"),
    (Bug::SilentFailure, "who waits is told of no failure"),
    (Bug::ForgetsProbe, "nothing happens any more"),
    (Bug::NeverHangs, "after the last fault opencode does not get ready"),
    (Bug::NeverForgives, "after a long time of health a failure is not forgiven"),
    (Bug::NeverKills, "time stands still"),
    (Bug::StopForgetsLaunch, "a stop leaves something behind"),
    (Bug::NeverAdopts, "two of ours live"),
    (Bug::EvictsBusy, "an eviction cuts a turn"),
    (Bug::DoesNotWait, "an eviction cuts a request"),
    (Bug::SignalsService, "the user's service is signalled"),
    (Bug::StartsUnneeded, "the user's service is started, and nobody needs it"),
];

/// How long a run takes by itself.
const DEFAULT_RUN: Duration = Duration::from_secs(5);

/// Fewer lives than a run has in that time, on two slow cores and without optimisation.
const LIVES: u64 = 300;

/// Numbers by chance, decided by a seed (splitmix64, by Sebastiano Vigna).
pub struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below this.
    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// True so many times out of a thousand.
    fn often(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    /// A time between these, in milliseconds.
    fn time(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(from * 1000 + self.below((to - from).max(1) * 1000))
    }
}

/// What a run has seen.
#[derive(Default)]
struct Report {
    lives: u64,
    steps: u64,
    virtual_time: Duration,
    faults: BTreeMap<&'static str, u64>,
}

/// Runs one life after the other, from this seed on, until the time is over or a promise is broken.
fn run(seed: u64, lives: u64, limit: Duration, bug: Option<Bug>) -> (Report, Result<(), (u64, String)>) {
    let (begun, mut report) = (Instant::now(), Report::default());
    for seed in seed..seed.saturating_add(lives) {
        let Outcome { steps, lived, faults, broken } = World::new(seed, bug).live();
        report.lives += 1;
        report.steps += steps;
        report.virtual_time += lived;
        for (fault, count) in faults {
            *report.faults.entry(fault).or_default() += count;
        }
        if broken.is_some() {
            let replayed = World::new(seed, bug).with_history().live();
            return (report, Err((seed, replayed.broken.expect("a seed decides everything"))));
        }
        if begun.elapsed() >= limit {
            break;
        }
    }
    (report, Ok(()))
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}")))
}

#[test]
fn no_promise_is_broken() {
    let limit = number("OPENWORK_SIMULATION_SECONDS").map_or(DEFAULT_RUN, Duration::from_secs);
    let replayed = number("OPENWORK_SIMULATION_SEED");
    let by_clock = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = replayed.unwrap_or_else(|| by_clock() >> 8 << 20);
    println!("the first seed is {seed}");
    let begun = Instant::now();
    let lives = if replayed.is_some() { 1 } else { u64::MAX };
    let (report, result) = run(seed, lives, limit, None);
    let rate = report.steps as f64 / begun.elapsed().as_secs_f64();
    let days = report.virtual_time.as_secs_f64() / 86_400.0;
    println!(
        "{} lives of daemons and opencodes, {days:.1} days, {} events of the policy, {rate:.0} a second",
        report.lives, report.steps
    );
    for (fault, count) in &report.faults {
        println!("{count:>10} {fault}");
    }
    if let Err((seed, broken)) = result {
        panic!("OPENWORK_SIMULATION_SEED={seed} replays it: {broken}");
    }
}

#[test]
fn every_planted_bug_is_found() {
    for (bug, promise) in BUGS {
        let mut first = 1;
        // A bug may break more promises than its own.
        loop {
            let (_, result) = run(first, LIVES + 1 - first, Duration::MAX, Some(bug));
            let Err((seed, broken)) = result else { panic!("{bug:?} is not found in {LIVES} lives") };
            first = seed + 1;
            if broken.starts_with(promise) {
                println!("{bug:?}: seed {seed}: {}", broken.lines().next().unwrap_or_default());
                break;
            }
        }
    }
}

#[test]
fn same_seed_gives_the_same_life() {
    let tell = || {
        let outcome = World::new(7, None).live();
        (outcome.steps, outcome.lived, outcome.faults)
    };
    assert_eq!(tell(), tell());
}
