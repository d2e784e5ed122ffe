//! What the supervisor decides, without doing any of it: an event and the time go in, actions come
//! out. No clock, thread, process or file is touched here, so a simulation can live through a million
//! days of it.
//!
//! Invariants: at most one process exists, and none is launched before all of the one before has
//! ended; at most one job is under way, and an answer to an earlier job, or about an earlier process,
//! is dropped; what is wanted ([`Want`]) is apart from what is ([`Phase`]).
//!
//! An opencode that an earlier daemon started is no special case: it enters in [`Phase::Starting`]
//! like one that was just launched, and has to answer like it. Nor is the user's own service
//! ([`Manners::is_service`]), but that it is never signalled: where an opencode of our own gets TERM, the
//! service is restarted by its own command; where the daemon stops, the service stays; and where it has
//! ended, it is looked for, and started only when a request needs it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::limits::Limits;
use super::silence::{Progress, Silence};
use crate::daemon::engine::Manners;
use crate::error::{Error, ErrorBody};
use crate::wire::Phase as PhaseName;

/// Whether this policy has a bug that a test of the simulation has planted.
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

pub use self::language::{Action, Answer, Cause, Checked, End, Ends, Event, Launched, Memory, News, Probe};

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Run,
    Stop { ends: Ends },
}

/// Where a process comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Launched,
    Adopted,
}

/// What comes after the end of a process.
#[derive(Debug)]
enum Then {
    /// Nothing: the daemon stops.
    Stop,
    /// The process had failed so.
    Fail(Error),
    /// Another is started at once.
    Start,
}

/// A process that has not answered yet.
#[derive(Debug)]
struct Starting {
    origin: Origin,
    since: Instant,
    until: Instant,
    look_at: Instant,
    probing: bool,
    /// When it was last asked.
    asked: Instant,
    listens_since: Option<Instant>,
    patience: Patience,
    progress: Progress,
}

/// What a process without an answer is measured by.
#[derive(Debug)]
enum Patience {
    /// It is starting: as long as that makes progress.
    Start,
    /// It was adopted, and was not looked at yet.
    Unknown,
    /// It was adopted and listens, so it was ready before: as a ready one that is silent.
    Ready(Silence),
}

/// A process that has answered.
#[derive(Debug)]
struct Ready {
    since: Instant,
    /// When it was last asked.
    asked: Instant,
    /// Since it was asked without an answer.
    silence: Option<Silence>,
    probe_at: Instant,
    probing: bool,
}

/// What is.
#[derive(Debug)]
enum Phase {
    /// The opencode of an earlier daemon is being looked for.
    Adopting,
    /// A binary is being asked for its version.
    Checking,
    /// A process is being started and written down.
    Launching,
    /// A process is there and has not answered yet.
    Starting(Starting),
    /// A process is there and has answered.
    Ready(Ready),
    /// A process is on its way out: its instances are being disposed.
    Disposing { until: Instant, then: Then },
    /// TERM was sent, first at `since`, next at `again`.
    Terminating { since: Instant, again: Instant, then: Then },
    /// KILL was sent.
    Killed { since: Instant, then: Then },
    /// Not even KILL has ended the process.
    Stuck,
    /// The process has ended; what it left is being ended.
    Burying { was_ready: bool, then: Option<Then> },
    /// A pause before the next start.
    Waiting { until: Instant },
    /// The user's service does not run, and nobody needs it: it is looked for at `until`, and after twice
    /// the pause next time.
    Absent { until: Instant, pause: Duration },
    /// opencode stays down until somebody asks for it.
    Failed,
    /// The end of the supervisor.
    Stopped,
}

/// The state machine.
pub struct Policy {
    limits: Limits,
    phase: Phase,
    want: Want,
    /// When a stop ends, whatever hangs.
    stop_by: Option<Instant>,
    /// The number of the job that is under way, or was last.
    job: u64,
    generation: u64,
    restarts: u64,
    failures: u64,
    checks: u64,
    last_error: Option<ErrorBody>,
    manners: Manners,
    /// Failures in a row, for the pause.
    in_a_row: u32,
    /// Recent failures, for giving up.
    recent: VecDeque<Instant>,
    /// The next launch replaces a process that had failed.
    restarting: bool,
    /// A request has asked for opencode, which was not ready then, and has not been since. Only the user's
    /// service waits for that.
    needed: bool,
    /// The pause before the user's service is looked for again.
    look_pause: Duration,
    /// The next failure is final: somebody has asked for one more attempt.
    last_attempt: bool,
    /// Ports that turned out to be taken, in a row.
    taken_ports: u32,
    /// It was told that this process takes too much memory.
    is_too_large: bool,
    #[cfg(test)]
    pub bug: Option<crate::daemon::supervisor::simulation::Bug>,
}

impl Policy {
    /// A policy at the start of the daemon. `recorded`: the state file names an opencode.
    pub fn new(limits: Limits, recorded: bool, out: &mut Vec<Action>) -> Policy {
        let manners = Manners { disposes: false, kill_after: Duration::ZERO, is_service: false };
        let look_pause = limits.backoff_first;
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
            manners,
            in_a_row: 0,
            recent: VecDeque::new(),
            restarting: false,
            needed: false,
            look_pause,
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

    /// When [`Event::Timer`] is due, if nothing happens before.
    pub fn next_deadline(&self) -> Option<Instant> {
        let own = match &self.phase {
            Phase::Adopting | Phase::Checking | Phase::Launching | Phase::Burying { .. } => None,
            Phase::Starting(Starting { until, look_at, probing: false, .. }) => Some(*until.min(look_at)),
            Phase::Starting(Starting { until, probing: true, .. }) => Some(*until),
            Phase::Ready(Ready { probe_at, probing: false, .. }) => Some(*probe_at),
            Phase::Ready(Ready { probing: true, .. }) => None,
            Phase::Disposing { until, .. } | Phase::Waiting { until } | Phase::Absent { until, .. } => Some(*until),
            Phase::Terminating { since, again, .. } => Some(*again.min(&(*since + self.manners.kill_after))),
            Phase::Killed { since, .. } => Some(*since + self.limits.killed),
            Phase::Stuck | Phase::Failed => None,
            Phase::Stopped => return None,
        };
        [own, self.stop_by].into_iter().flatten().min()
    }

    /// What follows from an event at this time: added to `out`, to be done in this order.
    pub fn handle(&mut self, event: Event, now: Instant, out: &mut Vec<Action>) {
        if self.is_stale(&event) {
            return;
        }
        let phase = std::mem::replace(&mut self.phase, Phase::Stopped);
        self.phase = match self.stop_by {
            Some(by) if now >= by && !matches!(phase, Phase::Stopped) => {
                out.push(Action::Note(Error::OpencodeUnavailable("it does not end in time".to_owned())));
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
            | Event::Buried { job, .. } => *job != self.job,
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
            // Somebody needs opencode, or has met one that does not answer.
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
                | Killed { .. } | Burying { .. } | Waiting { .. }), Event::Need | Event::Suspect { .. }) => {
                self.needed = true;
                phase
            }

            // The daemon is to stop.
            (Starting(_) | Ready(_), Event::Stop { ends }) if self.want_stop(ends, now) => self.leave(out),
            // An adopted opencode may serve sessions, which are closed in good order.
            (Starting(self::Starting { origin: Origin::Adopted, .. }) | Ready(_), Event::Stop { .. }) => {
                self.dispose(Then::Stop, now, out)
            }
            (Starting(_), Event::Stop { .. }) => self.terminate(Then::Stop, now, out),
            (Disposing { until, .. }, Event::Stop { ends }) => {
                self.want_stop(ends, now);
                Disposing { until, then: Then::Stop }
            }
            (Terminating { since, again, .. }, Event::Stop { ends }) => {
                self.want_stop(ends, now);
                Terminating { since, again, then: Then::Stop }
            }
            (Killed { since, .. }, Event::Stop { ends }) => {
                self.want_stop(ends, now);
                Killed { since, then: Then::Stop }
            }
            (Burying { was_ready, .. }, Event::Stop { ends }) => {
                self.want_stop(ends, now);
                Burying { was_ready, then: Some(Then::Stop) }
            }
            (Checking, Event::Stop { ends }) => {
                self.want_stop(ends, now);
                out.push(Action::Cancel);
                Checking
            }
            // The user's service stays, whatever its command is about to do.
            (Launching, Event::Stop { ends }) if self.want_stop(ends, now) && self.manners.is_service => {
                out.push(Action::Cancel);
                Launching
            }
            // What is under way there cannot be taken back: its answer decides.
            (phase @ (Adopting | Launching), Event::Stop { ends }) => {
                self.want_stop(ends, now);
                phase
            }
            (Stuck | Waiting { .. } | Absent { .. } | Failed | Stopped, Event::Stop { ends }) => {
                self.want_stop(ends, now);
                Stopped
            }

            // Jobs are answered.
            (Adopting, Event::Adopted { found: None, .. }) => self.start(out),
            (Adopting, Event::Adopted { found: Some(found), .. }) => self.adopt(found, now, out),
            (Checking, Event::VersionKnown { result: Ok(checked), .. }) => self.launch(checked, out),
            (Checking, Event::VersionKnown { result: Err(e), .. }) => self.failed(e, now, out),
            (Launching, Event::Launched { result: Ok(Launched::Running), .. }) => self.launched(now, out),
            (Launching, Event::Launched { result: Ok(Launched::Absent), .. }) => self.absent(now, out),
            (Launching, Event::Launched { result: Err(e), .. }) => self.failed(e, now, out),
            (Disposing { then, .. }, Event::Disposed { .. }) => self.terminate(then, now, out),
            (Burying { was_ready, then }, Event::Buried { end, .. }) => self.buried(was_ready, then, end, now, out),
            // None of these is under way then.
            (phase @ (Checking | Launching | Starting(_) | Ready(_) | Disposing { .. } | Terminating { .. } | Killed { .. }
                | Stuck | Burying { .. } | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::Adopted { .. }) => phase,
            (phase @ (Adopting | Launching | Starting(_) | Ready(_) | Disposing { .. } | Terminating { .. } | Killed { .. }
                | Stuck | Burying { .. } | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::VersionKnown { .. }) => phase,
            (phase @ (Adopting | Checking | Starting(_) | Ready(_) | Disposing { .. } | Terminating { .. } | Killed { .. }
                | Stuck | Burying { .. } | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::Launched { .. }) => phase,
            (phase @ (Adopting | Checking | Launching | Starting(_) | Ready(_) | Terminating { .. } | Killed { .. }
                | Stuck | Burying { .. } | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::Disposed { .. }) => phase,
            (phase @ (Adopting | Checking | Launching | Starting(_) | Ready(_) | Disposing { .. } | Terminating { .. }
                | Killed { .. } | Stuck | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::Buried { .. }) => phase,

            // The process was looked at.
            (Starting(starting), Event::Probed { probe, .. }) => self.probed_starting(starting, probe, now, out),
            (Ready(ready), Event::Probed { probe, .. }) => self.probed_ready(ready, probe, now, out),
            (phase @ (Adopting | Checking | Launching | Disposing { .. } | Terminating { .. } | Killed { .. } | Stuck
                | Burying { .. } | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::Probed { .. }) => phase,

            // The process has ended.
            (Starting(_), Event::Exited { .. }) => self.bury(false, None, out),
            (Ready(ready), Event::Exited { .. }) => {
                self.forgive(&ready, now);
                self.bury(true, None, out)
            }
            (Disposing { then, .. } | Terminating { then, .. } | Killed { then, .. }, Event::Exited { .. }) => {
                self.bury(false, Some(then), out)
            }
            (Stuck, Event::Exited { .. }) => self.bury(false, Some(Then::Start), out),
            (phase @ (Adopting | Checking | Launching | Burying { .. } | Waiting { .. } | Absent { .. } | Failed
                | Stopped), Event::Exited { .. }) => phase,

            // Time has passed.
            (Starting(starting), Event::Timer) => self.look(starting, now, out),
            (Ready(ready), Event::Timer) => self.ask(ready, now, out),
            (Disposing { until, then }, Event::Timer) if now >= until => self.terminate(then, now, out),
            (Terminating { since, then, .. }, Event::Timer)
                if now >= since + self.manners.kill_after && !planted!(self, NeverKills) =>
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
                self.look_pause = (pause * 2).min(self.limits.probe_interval);
                out.push(Action::Launch { job: self.next_job(), start: false });
                Launching
            }
            (phase @ (Adopting | Checking | Launching | Disposing { .. } | Terminating { .. } | Killed { .. } | Stuck
                | Burying { .. } | Waiting { .. } | Absent { .. } | Failed | Stopped), Event::Timer) => phase,
        }
    }

    /// The phase as it is published.
    pub fn phase(&self) -> PhaseName {
        match &self.phase {
            // A look for the user's service starts nothing.
            Phase::Checking | Phase::Launching if self.manners.is_service && !self.needed => PhaseName::Waiting,
            Phase::Adopting | Phase::Checking | Phase::Launching | Phase::Starting(_) => PhaseName::Starting,
            Phase::Ready(_) => PhaseName::Ready,
            Phase::Disposing { .. } | Phase::Terminating { .. } | Phase::Killed { .. } | Phase::Stopped => {
                PhaseName::Stopping
            }
            Phase::Burying { then: Some(_), .. } => PhaseName::Stopping,
            Phase::Burying { then: None, .. } | Phase::Waiting { .. } | Phase::Absent { .. } => PhaseName::Waiting,
            Phase::Stuck | Phase::Failed => PhaseName::Failed,
        }
    }

    /// Whether the supervisor has nothing more to do.
    pub fn is_stopped(&self) -> bool {
        matches!(self.phase, Phase::Stopped)
    }

    /// Whether the daemon is to stop.
    pub fn is_stopping(&self) -> bool {
        self.want != Want::Run
    }

    /// Counts the processes; 0 before the first.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How many processes replaced one that had failed.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    /// How often opencode was given up.
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// How many health calls of ready processes were answered.
    pub fn checks(&self) -> u64 {
        self.checks
    }

    /// Why opencode is not ready, or was not before.
    pub fn last_error(&self) -> Option<&ErrorBody> {
        self.last_error.as_ref()
    }
}
