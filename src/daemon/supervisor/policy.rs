//! The supervisor's decisions as a pure state machine: an event and the time go in, actions come out.
//! The policy uses no clock, thread, process or file, so a simulation can run it through a million days.
//!
//! Invariants: at most one process exists, and a launch follows only after the previous process and its
//! descendants have ended; at most one job is under way, and the policy drops answers to earlier jobs and
//! about earlier processes; the desired state ([`Want`]) is apart from the actual one ([`Phase`]).
//!
//! An adopted opencode enters [`Phase::Starting`] like one that was just launched, and must pass the same
//! health check. So does the user's own service ([`Lifecycle::is_service`]), with three differences: the
//! service is never signalled (where our own opencode gets TERM, the service's own command restarts it);
//! the service keeps running when the daemon stops; and after the service has ended, the daemon looks for
//! it, and starts it only when a request needs it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::limits::Limits;
use super::silence::{Progress, Silence};
use crate::daemon::engine::Lifecycle;
use crate::error::{Error, ErrorBody};
use crate::wire::Phase as PhaseName;

/// Whether a test of the simulation has planted this bug in the policy.
#[cfg(test)]
macro_rules! planted {
    ($policy:expr, $bug:ident) => {
        $policy.bug == Some(crate::daemon::supervisor::simulation::Bug::$bug)
    };
}
#[cfg(not(test))]
macro_rules! planted {
    ($policy:expr, $bug:ident) => {
        false
    };
}

mod language;
mod steps;
#[cfg(test)]
mod tests;

pub use self::language::{Action, Answer, Cause, Checked, End, Event, Launched, Memory, Notice, Probe, StopScope};

/// The desired state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Run,
    Stop { scope: StopScope },
}

/// How the daemon got its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Launched,
    Adopted,
}

/// The step that follows the end of a process.
#[derive(Debug)]
enum Then {
    /// The daemon stops.
    Stop,
    /// The process was ended because of this failure: restart it with backoff, or give up.
    Fail(Error),
    /// Start another process at once.
    Start,
}

/// A process that has not passed a health check yet.
#[derive(Debug)]
struct Starting {
    origin: Origin,
    since: Instant,
    until: Instant,
    probe_at: Instant,
    probing: bool,
    /// When the last probe was sent.
    asked: Instant,
    listens_since: Option<Instant>,
    patience: Patience,
    progress: Progress,
}

/// How long a process without an answer is given.
#[derive(Debug)]
enum Patience {
    /// A starting process: as long as the start makes progress.
    Start,
    /// An adopted process before its first probe.
    Unknown,
    /// An adopted process that listens was ready before: as long as a ready process that stopped answering.
    Ready(Silence),
}

/// A process that has passed a health check.
#[derive(Debug)]
struct Ready {
    since: Instant,
    /// When the last probe was sent.
    asked: Instant,
    /// Begins with the first unanswered probe.
    silence: Option<Silence>,
    probe_at: Instant,
    probing: bool,
}

/// The actual state.
#[derive(Debug)]
enum Phase {
    /// Looking for the opencode of an earlier daemon.
    Adopting,
    /// Finding the binary and its version.
    Checking,
    /// Starting a process and recording it.
    Launching,
    /// The process has not passed a health check yet.
    Starting(Starting),
    /// The process has passed a health check.
    Ready(Ready),
    /// An orderly stop has begun: opencode disposes its instances.
    Disposing { until: Instant, then: Then },
    /// TERM was first sent at `since`; the next follows at `again`.
    Terminating { since: Instant, again: Instant, then: Then },
    /// KILL was sent.
    Killed { since: Instant, then: Then },
    /// The process has survived KILL.
    Stuck,
    /// The process has ended; its descendants are being ended.
    Reaping { was_ready: bool, then: Option<Then> },
    /// A pause before the next start.
    Waiting { until: Instant },
    /// The user's service does not run and no request needs it: the daemon looks for it at `until`, and
    /// doubles the pause each time.
    Absent { until: Instant, pause: Duration },
    /// opencode stays down until a request needs it.
    Failed,
    /// The supervisor has finished.
    Stopped,
}

/// The state machine.
pub struct Policy {
    limits: Limits,
    phase: Phase,
    want: Want,
    /// The deadline of a stop, whatever hangs.
    stop_by: Option<Instant>,
    /// The number of the current job, or of the last one.
    job: u64,
    generation: u64,
    restarts: u64,
    failures: u64,
    checks: u64,
    last_error: Option<ErrorBody>,
    lifecycle: Lifecycle,
    /// Consecutive failures; they determine the backoff.
    consecutive_failures: u32,
    /// The failures within `failure_window`; too many, and opencode is given up.
    recent: VecDeque<Instant>,
    /// The next launch replaces a failed process.
    restarting: bool,
    /// A request has needed opencode since it was last ready. The user's service is started only then.
    needed: bool,
    /// The pause before the next search for the user's service.
    search_pause: Duration,
    /// A request asked for one attempt after opencode was given up: the next failure is final.
    last_attempt: bool,
    /// Consecutive launches whose port turned out to be taken.
    taken_ports: u32,
    /// The warning that this process uses too much memory was published.
    is_too_large: bool,
    #[cfg(test)]
    pub bug: Option<crate::daemon::supervisor::simulation::Bug>,
}

impl Policy {
    /// The policy of a starting daemon. `recorded`: the state file names an opencode.
    pub fn new(limits: Limits, recorded: bool, out: &mut Vec<Action>) -> Policy {
        let lifecycle = Lifecycle { disposes: false, kill_after: Duration::ZERO, is_service: false };
        let search_pause = limits.backoff_first;
        let mut policy = Policy {
            limits,
            phase: Phase::Failed,
            want: Want::Run,
            stop_by: None,
            job: 0,
            generation: 0,
            restarts: 0,
            failures: 0,
            checks: 0,
            last_error: None,
            lifecycle,
            consecutive_failures: 0,
            recent: VecDeque::new(),
            restarting: false,
            needed: false,
            search_pause,
            last_attempt: false,
            taken_ports: 0,
            is_too_large: false,
            #[cfg(test)]
            bug: None,
        };
        policy.phase = if recorded {
            out.push(Action::Adopt { job: policy.next_job() });
            Phase::Adopting
        } else {
            policy.start(out)
        };
        policy
    }

    /// When [`Event::Timer`] is due unless another event comes first.
    pub fn next_deadline(&self) -> Option<Instant> {
        let own = match &self.phase {
            Phase::Adopting | Phase::Checking | Phase::Launching | Phase::Reaping { .. } => None,
            Phase::Starting(Starting { until, probe_at, probing: false, .. }) => Some(*until.min(probe_at)),
            Phase::Starting(Starting { until, probing: true, .. }) => Some(*until),
            Phase::Ready(Ready { probe_at, probing: false, .. }) => Some(*probe_at),
            Phase::Ready(Ready { probing: true, .. }) => None,
            Phase::Disposing { until, .. } | Phase::Waiting { until } | Phase::Absent { until, .. } => Some(*until),
            Phase::Terminating { since, again, .. } => Some(*again.min(&(*since + self.lifecycle.kill_after))),
            Phase::Killed { since, .. } => Some(*since + self.limits.killed),
            Phase::Stuck | Phase::Failed => None,
            Phase::Stopped => return None,
        };
        [own, self.stop_by].into_iter().flatten().min()
    }

    /// Handles an event: appends actions to `out`, in the order in which to carry them out.
    pub fn handle(&mut self, event: Event, now: Instant, out: &mut Vec<Action>) {
        if self.is_stale(&event) {
            return;
        }
        let phase = std::mem::replace(&mut self.phase, Phase::Stopped);
        self.phase = match self.stop_by {
            Some(by) if now >= by && !matches!(phase, Phase::Stopped) => {
                out.push(Action::Log(Error::OpencodeUnavailable("it did not end in time".to_owned())));
                self.leave(out)
            }
            _ => self.react(phase, event, now, out),
        };
    }

    /// Whether an event is about an earlier job or process.
    fn is_stale(&self, event: &Event) -> bool {
        match event {
            Event::Adopted { job, .. }
            | Event::VersionKnown { job, .. }
            | Event::Launched { job, .. }
            | Event::Disposed { job }
            | Event::Reaped { job, .. } => *job != self.job,
            Event::Probed { generation, .. } | Event::Exited { generation } => {
                *generation != self.generation && !planted!(self, OldExit)
            }
            Event::Need | Event::Suspect { .. } | Event::Stop { .. } | Event::Timer => false,
        }
    }

    /// The table of phases and events.
    #[rustfmt::skip]
    fn react(&mut self, phase: Phase, event: Event, now: Instant, out: &mut Vec<Action>) -> Phase {
        use Phase::*;
        match (phase, event) {
            // A request needs opencode, or got no answer from it.
            (Failed, Event::Need | Event::Suspect { .. }) => {
                (self.last_attempt, self.needed) = (true, true);
                self.start(out)
            }
            (Absent { .. }, Event::Need | Event::Suspect { .. }) => {
                self.needed = true;
                self.start(out)
            }
            (Stuck, Event::Need | Event::Suspect { .. }) => self.stuck(out),
            (Ready(ready), Event::Suspect { generation }) if generation == self.generation => {
                self.needed = true;
                Ready(self::Ready { probe_at: now, ..ready })
            }
            (phase @ (Ready(_) | Stopped), Event::Need | Event::Suspect { .. }) => phase,
            (phase @ (Adopting | Checking | Launching | Starting(_) | Disposing { .. } | Terminating { .. }
                | Killed { .. } | Reaping { .. } | Waiting { .. }), Event::Need | Event::Suspect { .. }) => {
                self.needed = true;
                phase
            }

            // The daemon shall stop.
            (Starting(_) | Ready(_), Event::Stop { scope }) if self.want_stop(scope, now) => self.leave(out),
            // An adopted opencode may have running sessions: dispose its instances before TERM.
            (Starting(self::Starting { origin: Origin::Adopted, .. }) | Ready(_), Event::Stop { .. }) => {
                self.dispose(Then::Stop, now, out)
            }
            (Starting(_), Event::Stop { .. }) => self.terminate(Then::Stop, now, out),
            (Disposing { until, .. }, Event::Stop { scope }) => {
                self.want_stop(scope, now);
                Disposing { until, then: Then::Stop }
            }
            (Terminating { since, again, .. }, Event::Stop { scope }) => {
                self.want_stop(scope, now);
                Terminating { since, again, then: Then::Stop }
            }
            (Killed { since, .. }, Event::Stop { scope }) => {
                self.want_stop(scope, now);
                Killed { since, then: Then::Stop }
            }
            (Reaping { was_ready, .. }, Event::Stop { scope }) => {
                self.want_stop(scope, now);
                Reaping { was_ready, then: Some(Then::Stop) }
            }
            (Checking, Event::Stop { scope }) => {
                self.want_stop(scope, now);
                out.push(Action::Cancel);
                Checking
            }
            // The user's service stays, so the stop need not wait for its command.
            (Launching, Event::Stop { scope }) if self.want_stop(scope, now) && self.lifecycle.is_service => {
                out.push(Action::Cancel);
                Launching
            }
            // The job cannot be cancelled: its answer decides.
            (phase @ (Adopting | Launching), Event::Stop { scope }) => {
                self.want_stop(scope, now);
                phase
            }
            (Stuck | Waiting { .. } | Absent { .. } | Failed | Stopped, Event::Stop { scope }) => {
                self.want_stop(scope, now);
                Stopped
            }

            // Answers to jobs.
            (Adopting, Event::Adopted { found: None, .. }) => self.start(out),
            (Adopting, Event::Adopted { found: Some(found), .. }) => self.adopt(found, now, out),
            (Checking, Event::VersionKnown { result: Ok(checked), .. }) => self.launch(checked, out),
            (Checking, Event::VersionKnown { result: Err(e), .. }) => self.failed(e, now, out),
            (Launching, Event::Launched { result: Ok(Launched::Running), .. }) => self.launched(now, out),
            (Launching, Event::Launched { result: Ok(Launched::Absent), .. }) => self.absent(now, out),
            (Launching, Event::Launched { result: Err(e), .. }) => self.failed(e, now, out),
            (Disposing { then, .. }, Event::Disposed { .. }) => self.terminate(then, now, out),
            (Reaping { was_ready, then }, Event::Reaped { end, .. }) => self.reaped(was_ready, then, end, now, out),
            // No such job is under way in these phases.
            (phase @ (Checking | Launching | Starting(_) | Ready(_) | Disposing { .. } | Terminating { .. } | Killed { .. }
                | Stuck | Reaping { .. } | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::Adopted { .. }) => phase,
            (phase @ (Adopting | Launching | Starting(_) | Ready(_) | Disposing { .. } | Terminating { .. } | Killed { .. }
                | Stuck | Reaping { .. } | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::VersionKnown { .. }) => phase,
            (phase @ (Adopting | Checking | Starting(_) | Ready(_) | Disposing { .. } | Terminating { .. } | Killed { .. }
                | Stuck | Reaping { .. } | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::Launched { .. }) => phase,
            (phase @ (Adopting | Checking | Launching | Starting(_) | Ready(_) | Terminating { .. } | Killed { .. }
                | Stuck | Reaping { .. } | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::Disposed { .. }) => phase,
            (phase @ (Adopting | Checking | Launching | Starting(_) | Ready(_) | Disposing { .. } | Terminating { .. }
                | Killed { .. } | Stuck | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::Reaped { .. }) => phase,

            // Results of probes.
            (Starting(starting), Event::Probed { probe, .. }) => self.probed_starting(starting, probe, now, out),
            (Ready(ready), Event::Probed { probe, .. }) => self.probed_ready(ready, probe, now, out),
            (phase @ (Adopting | Checking | Launching | Disposing { .. } | Terminating { .. } | Killed { .. } | Stuck
                | Reaping { .. } | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::Probed { .. }) => phase,

            // The process has ended.
            (Starting(_), Event::Exited { .. }) => self.reap(false, None, out),
            (Ready(ready), Event::Exited { .. }) => {
                self.reset_backoff(&ready, now);
                self.reap(true, None, out)
            }
            (Disposing { then, .. } | Terminating { then, .. } | Killed { then, .. }, Event::Exited { .. }) => {
                self.reap(false, Some(then), out)
            }
            (Stuck, Event::Exited { .. }) => self.reap(false, Some(Then::Start), out),
            (phase @ (Adopting | Checking | Launching | Reaping { .. } | Waiting { .. } | Absent { .. } | Failed
                | Stopped), Event::Exited { .. }) => phase,

            // Time has passed.
            (Starting(starting), Event::Timer) => self.probe_starting(starting, now, out),
            (Ready(ready), Event::Timer) => self.probe_ready(ready, now, out),
            (Disposing { until, then }, Event::Timer) if now >= until => self.terminate(then, now, out),
            (Terminating { since, then, .. }, Event::Timer)
                if now >= since + self.lifecycle.kill_after && !planted!(self, NeverKills) =>
            {
                out.push(Action::Signal(Signal::KILL));
                Killed { since: now, then }
            }
            (Terminating { since, again, then }, Event::Timer) if now >= again => {
                out.push(Action::Signal(Signal::TERM));
                Terminating { since, again: now + self.limits.term_again, then }
            }
            (Killed { since, .. }, Event::Timer) if now >= since + self.limits.killed => self.stuck(out),
            (Waiting { until }, Event::Timer) if now >= until => self.start(out),
            (Absent { until, pause }, Event::Timer) if now >= until => {
                self.search_pause = (pause * 2).min(self.limits.probe_interval);
                out.push(Action::Launch { job: self.next_job(), start: false });
                Launching
            }
            (phase @ (Adopting | Checking | Launching | Disposing { .. } | Terminating { .. } | Killed { .. } | Stuck
                | Reaping { .. } | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::Timer) => phase,
        }
    }

    /// The published phase.
    pub fn phase(&self) -> PhaseName {
        match &self.phase {
            // Only looking for the user's service starts nothing.
            Phase::Checking | Phase::Launching if self.lifecycle.is_service && !self.needed => PhaseName::Waiting,
            Phase::Adopting | Phase::Checking | Phase::Launching | Phase::Starting(_) => PhaseName::Starting,
            Phase::Ready(_) => PhaseName::Ready,
            Phase::Disposing { .. } | Phase::Terminating { .. } | Phase::Killed { .. } | Phase::Stopped => {
                PhaseName::Stopping
            }
            Phase::Reaping { then: Some(_), .. } => PhaseName::Stopping,
            Phase::Reaping { then: None, .. } | Phase::Waiting { .. } | Phase::Absent { .. } => PhaseName::Waiting,
            Phase::Stuck | Phase::Failed => PhaseName::Failed,
        }
    }

    /// Whether the supervisor has nothing more to do.
    pub fn is_stopped(&self) -> bool {
        matches!(self.phase, Phase::Stopped)
    }

    /// Whether a stop was requested.
    pub fn is_stopping(&self) -> bool {
        self.want != Want::Run
    }

    /// The number of the current process; 0 before the first.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How many processes replaced a failed one.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    /// How often opencode was given up.
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// How many probes of a ready process it answered.
    pub fn checks(&self) -> u64 {
        self.checks
    }

    /// The last failure; none once opencode is ready again.
    pub fn last_error(&self) -> Option<&ErrorBody> {
        self.last_error.as_ref()
    }
}
