//! A simulation of the policy in virtual time, with random faults; it checks the supervisor's promises
//! after each step. The seed determines the whole run: setting `OPENWORK_SIMULATION_SEED` to the seed that
//! a violation prints replays it.
//!
//! A run takes five seconds, or `OPENWORK_SIMULATION_SECONDS`. Another test plants each [`Bug`] in the
//! policy and requires that the simulation finds it.

mod world;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use self::world::{Outcome, World};

/// A bug to plant in the policy, in the test of the simulation itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Events about an earlier process are applied to the current one.
    OldExit,
    /// A stop that keeps opencode overrides an earlier stop that ends it.
    KeepWins,
    /// A start is ended after its first limit although it makes progress.
    ImpatientStart,
    /// A probe that was never sent counts as silence of opencode.
    LackIsSilence,
    /// A single health call without an answer counts as a hang.
    ImpatientHang,
    /// A busy hang is ended as early as an idle one.
    IgnoresBusy,
    /// A restart for memory does not wait for running sessions.
    CutsTurns,
    /// The next process is launched before the previous one and its descendants have ended.
    LaunchesEarly,
    /// A process that survived KILL is forgotten.
    ForgetsStuck,
    /// A crash loop goes on for ever.
    NeverGivesUp,
    /// Waiting requests do not learn of a failure.
    SilentFailure,
    /// No probe follows a successful one.
    ForgetsProbe,
    /// A hang is never detected.
    NeverHangs,
    /// Health never resets the backoff.
    NeverForgives,
    /// KILL never follows TERM.
    NeverKills,
    /// A stop during a launch leaves the process behind.
    StopForgetsLaunch,
    /// The daemon does not look for the process of an earlier daemon.
    NeverAdopts,
    /// An eviction does not check for running sessions.
    EvictsBusy,
    /// A request does not wait for the end of an eviction.
    DoesNotWait,
    /// The user's own service is signalled like our own opencode.
    SignalsService,
    /// The user's own service is started although no request needs it.
    StartsUnneeded,
}

/// Each bug, with the promise that it breaks.
const BUGS: [(Bug, &str); 21] = [
    (Bug::OldExit, "the daemon reaps a living process"),
    (Bug::KeepWins, "a stop leaves processes behind"),
    (Bug::ImpatientStart, "the daemon ends an opencode that works"),
    (Bug::LackIsSilence, "the daemon ends an opencode that works"),
    (Bug::ImpatientHang, "the daemon ends an opencode that works"),
    (Bug::IgnoresBusy, "the daemon ends an opencode that works"),
    (Bug::CutsTurns, "a restart for memory cuts a turn"),
    (Bug::LaunchesEarly, "two opencodes live at once"),
    (Bug::ForgetsStuck, "the daemon launches a second process"),
    (Bug::NeverGivesUp, "opencode fails repeatedly and is not given up"),
    (Bug::SilentFailure, "a waiting request does not learn of a failure"),
    (Bug::ForgetsProbe, "no further event is due"),
    (Bug::NeverHangs, "opencode does not get ready after the last fault"),
    (Bug::NeverForgives, "a long time of health does not reset the backoff"),
    (Bug::NeverKills, "virtual time stands still"),
    (Bug::StopForgetsLaunch, "a stop leaves processes behind"),
    (Bug::NeverAdopts, "two opencodes live at once"),
    (Bug::EvictsBusy, "an eviction cuts a turn"),
    (Bug::DoesNotWait, "an eviction cuts a request"),
    (Bug::SignalsService, "the daemon signals the user's service"),
    (Bug::StartsUnneeded, "the daemon starts the user's service without need"),
];

/// The duration of a run unless the environment sets one.
const DEFAULT_RUN: Duration = Duration::from_secs(5);

/// Fewer lives than a default run simulates on two slow cores without optimisation.
const LIVES: u64 = 300;

/// Pseudo-random numbers from a seed (splitmix64, by Sebastiano Vigna).
pub struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to `end` - 1.
    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// True with this probability, in thousandths.
    fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    /// A duration between these numbers of milliseconds.
    fn time(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(from * 1000 + self.below((to - from).max(1) * 1000))
    }
}

/// The statistics of a run.
#[derive(Default)]
struct Report {
    lives: u64,
    steps: u64,
    virtual_time: Duration,
    faults: BTreeMap<&'static str, u64>,
}

/// Simulates one life after the other, from this seed on, until the time is over or a promise is broken.
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
