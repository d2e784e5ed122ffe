//! The transitions of the table in [`Policy::react`]; each returns the next phase.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{
    Action, Answer, Cause, Checked, End, Memory, Notice, Origin, Patience, Phase, Policy, Probe, Ready, Starting,
    StopScope, Then, Want,
};
use crate::daemon::engine::Verb;
use crate::daemon::supervisor::silence::{Progress, Silence};
use crate::error::Error;

impl Policy {
    /// Records the request for a stop. Returns whether the stop keeps opencode.
    pub(super) fn want_stop(&mut self, scope: StopScope, now: Instant) -> bool {
        // Of several requests, the one that ends the most wins, in any order.
        let before = match self.want {
            Want::Stop { scope } if !planted!(self, KeepWins) => scope,
            Want::Stop { .. } | Want::Run => StopScope::DaemonOnly,
        };
        self.want = Want::Stop { scope: scope.max(before) };
        self.stop_by.get_or_insert(now + self.limits.stop);
        self.keeps()
    }

    /// Whether the requested stop keeps opencode.
    fn keeps(&self) -> bool {
        match self.want {
            Want::Run | Want::Stop { scope: StopScope::Service } => false,
            Want::Stop { scope: StopScope::DaemonOnly } => true,
            Want::Stop { scope: StopScope::OwnOpencode } => self.lifecycle.is_service,
        }
    }

    /// Leaves the process, if there is one, to the next daemon.
    pub(super) fn leave(&mut self, out: &mut Vec<Action>) -> Phase {
        out.push(Action::Release);
        Phase::Stopped
    }

    pub(super) fn next_job(&mut self) -> u64 {
        self.job += 1;
        self.job
    }

    /// Begins a start, if opencode is wanted.
    pub(super) fn start(&mut self, out: &mut Vec<Action>) -> Phase {
        if self.want != Want::Run {
            return Phase::Stopped;
        }
        out.push(Action::AskVersion { job: self.next_job(), limit: self.limits.version });
        Phase::Checking
    }

    pub(super) fn launch(&mut self, checked: Checked, out: &mut Vec<Action>) -> Phase {
        if self.want != Want::Run {
            return Phase::Stopped;
        }
        self.lifecycle = checked.lifecycle;
        let start = !self.lifecycle.is_service || self.needed || planted!(self, StartsUnneeded);
        out.push(Action::Launch { job: self.next_job(), start });
        Phase::Launching
    }

    /// The user's service does not run, and was not started.
    pub(super) fn absent(&mut self, now: Instant, out: &mut Vec<Action>) -> Phase {
        if self.want != Want::Run || self.needed {
            return self.start(out);
        }
        Phase::Absent { until: now + self.search_pause, pause: self.search_pause }
    }

    /// The launched process exists.
    pub(super) fn launched(&mut self, now: Instant, out: &mut Vec<Action>) -> Phase {
        self.generation += 1;
        self.restarts += u64::from(std::mem::take(&mut self.restarting));
        out.push(Action::Watch);
        out.push(Action::Publish(Notice::Starting));
        self.arrived(Origin::Launched, Duration::ZERO, now, out)
    }

    pub(super) fn adopt(&mut self, found: Checked, now: Instant, out: &mut Vec<Action>) -> Phase {
        self.generation = 1;
        self.lifecycle = found.lifecycle;
        out.push(Action::Watch);
        self.arrived(Origin::Adopted, found.age, now, out)
    }

    pub(super) fn arrived(&mut self, origin: Origin, age: Duration, now: Instant, out: &mut Vec<Action>) -> Phase {
        self.is_too_large = false;
        let rest = self.limits.ready.saturating_sub(age).max(self.limits.adopt);
        match (self.want, origin) {
            (Want::Stop { .. }, _) if self.keeps() => self.leave(out),
            (Want::Run, _) => Phase::Starting(Starting {
                origin,
                since: now,
                until: now + rest,
                probe_at: if origin == Origin::Adopted { now } else { now + self.limits.start_probe_interval },
                probing: false,
                asked: now,
                listens_since: None,
                patience: if origin == Origin::Adopted { Patience::Unknown } else { Patience::Start },
                progress: Progress::new(now),
            }),
            (Want::Stop { .. }, Origin::Launched) if planted!(self, StopForgetsLaunch) => self.leave(out),
            (Want::Stop { .. }, Origin::Launched) => self.terminate(Then::Stop, now, out),
            // It may have running sessions: dispose its instances before TERM.
            (Want::Stop { .. }, Origin::Adopted) => self.dispose(Then::Stop, now, out),
        }
    }

    /// Probes a starting process when that is due, or ends it when its time is over.
    pub(super) fn probe_starting(&mut self, starting: Starting, now: Instant, out: &mut Vec<Action>) -> Phase {
        let mut starting = match self.overdue(starting, now) {
            Ok(starting) => starting,
            Err(then) => return self.terminate(then, now, out),
        };
        if !starting.probing && now >= starting.probe_at {
            let listens = starting.listens_since.map_or(Duration::ZERO, |since| now.duration_since(since));
            let limit = (self.limits.first_probe + listens / 4).min(self.limits.probe);
            (starting.asked, starting.probing) = (now, true);
            out.push(Action::Probe { limit, ready: false });
        }
        Phase::Starting(starting)
    }

    /// Extends the time of a start that makes progress. When the time is over: the step after the end of
    /// the process.
    pub(super) fn overdue(&self, mut starting: Starting, now: Instant) -> std::result::Result<Starting, Then> {
        if now < starting.until {
            return Ok(starting);
        }
        if let Patience::Ready(silence) = &starting.patience {
            if silence.is_hang(now, &self.limits) {
                return Err(Then::Start);
            }
            starting.until = now + self.limits.probe_interval;
            return Ok(starting);
        }
        let last = starting.since + self.limits.ready_at_most;
        if starting.progress.is_made(now, &self.limits) && now < last && !planted!(self, ImpatientStart) {
            starting.until = (now + self.limits.probe_interval).min(last);
            return Ok(starting);
        }
        let took = now.duration_since(starting.since).as_secs();
        Err(match starting.origin {
            Origin::Adopted => Then::Start,
            Origin::Launched => Then::Fail(Error::OpencodeStartFailed(format!("it was not ready within {took} s"))),
        })
    }

    pub(super) fn probed_starting(
        &mut self,
        mut starting: Starting,
        probe: Probe,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Phase {
        starting.probing = false;
        let waited = now.duration_since(starting.since) / 64;
        starting.probe_at = now + waited.clamp(self.limits.start_probe_interval, self.limits.max_start_probe_interval);
        match probe.answer {
            // The probe was never sent: that says nothing about the process.
            Answer::NotSent(_) => starting.progress.assume(now),
            Answer::Healthy | Answer::NotListening | Answer::Silent(_) | Answer::Refused(_) => {
                starting.progress.sample(probe.cpu, probe.log, now, &self.limits);
            }
        }
        match (probe.answer, starting.origin) {
            (Answer::Healthy, origin) => return self.ready(origin, now, out),
            // A service that refuses its own password may still serve other clients: leave it alone.
            (Answer::Refused(e), _) if self.lifecycle.is_service => return self.reap(false, Some(Then::Fail(e)), out),
            (Answer::Refused(e), Origin::Launched) => return self.terminate(Then::Fail(e), now, out),
            // Our own opencode has another password: the file with the credentials was removed since.
            (Answer::Refused(_), Origin::Adopted) => return self.terminate(Then::Start, now, out),
            (Answer::Silent(_), _) => {
                starting.listens_since.get_or_insert(now);
                if matches!(starting.patience, Patience::Unknown) {
                    starting.patience = Patience::Ready(Silence::new(starting.asked.max(now - self.limits.probe)));
                }
                if let Patience::Ready(silence) = &mut starting.patience {
                    silence.probed(probe.cpu, now, &self.limits);
                }
            }
            (Answer::NotListening, _) => {
                if matches!(starting.patience, Patience::Unknown) {
                    starting.patience = Patience::Start;
                }
            }
            (Answer::NotSent(_), _) => {}
        }
        match self.overdue(starting, now) {
            Ok(starting) => Phase::Starting(starting),
            Err(then) => self.terminate(then, now, out),
        }
    }

    pub(super) fn ready(&mut self, origin: Origin, now: Instant, out: &mut Vec<Action>) -> Phase {
        (self.last_attempt, self.needed) = (false, false);
        (self.taken_ports, self.search_pause) = (0, self.limits.backoff_first);
        self.last_error = None;
        out.push(Action::Publish(Notice::Ready { adopted: origin == Origin::Adopted }));
        let probe_at = now + self.limits.probe_interval;
        Phase::Ready(Ready { since: now, asked: now, silence: None, probe_at, probing: false })
    }

    /// Probes a ready process when that is due.
    pub(super) fn probe_ready(&mut self, mut ready: Ready, now: Instant, out: &mut Vec<Action>) -> Phase {
        if !ready.probing && now >= ready.probe_at {
            (ready.asked, ready.probing) = (now, true);
            out.push(Action::Probe { limit: self.limits.probe, ready: true });
        }
        Phase::Ready(ready)
    }

    pub(super) fn probed_ready(
        &mut self,
        mut ready: Ready,
        probe: Probe,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Phase {
        (ready.probe_at, ready.probing) = (now + self.limits.probe_interval, planted!(self, ForgetsProbe));
        match probe.answer {
            Answer::Healthy => {
                ready.silence = None;
                self.needed = false;
                self.checks += 1;
                return self.check_memory(ready, probe.memory, now, out);
            }
            Answer::NotSent(e) if !planted!(self, LackIsSilence) => out.push(Action::Log(e)),
            Answer::NotListening => {
                self.reset_backoff(&ready, now);
                let error = Error::OpencodeUnavailable("it no longer listens".to_owned());
                return self.terminate(Then::Fail(error), now, out);
            }
            Answer::Silent(_) | Answer::Refused(_) | Answer::NotSent(_) if probe.heard => ready.silence = None,
            Answer::Silent(e) | Answer::Refused(e) | Answer::NotSent(e) => {
                // While the daemon itself was suspended it sent no probe: that time does not count.
                let since = ready.asked.max(now - self.limits.probe);
                let silence = ready.silence.get_or_insert_with(|| Silence::new(since));
                silence.probed(probe.cpu, now, &self.limits);
                let (is_hang, silent) = (self.is_hang(silence, now), silence.since(now).as_secs());
                out.push(Action::Log(e));
                if is_hang {
                    self.reset_backoff(&ready, now);
                    let error = Error::OpencodeUnavailable(format!("it has not answered for {silent} s"));
                    return self.terminate(Then::Fail(error), now, out);
                }
            }
        }
        Phase::Ready(ready)
    }

    /// Whether a process that was ready has been silent for too long.
    fn is_hang(&self, silence: &Silence, now: Instant) -> bool {
        if planted!(self, ImpatientHang) {
            return true;
        }
        if planted!(self, IgnoresBusy) {
            return silence.since(now) >= self.limits.hang;
        }
        silence.is_hang(now, &self.limits) && !planted!(self, NeverHangs)
    }

    /// Restarts a process that uses too much memory, unless a session runs.
    pub(super) fn check_memory(
        &mut self,
        ready: Ready,
        memory: Option<Memory>,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Phase {
        match memory {
            Some(Memory { exceeds: true, busy }) if !busy || planted!(self, CutsTurns) => {
                out.push(Action::Publish(Notice::TooLarge { recycled: true }));
                self.dispose(Then::Start, now, out)
            }
            Some(Memory { exceeds: true, busy: true }) => {
                if !std::mem::replace(&mut self.is_too_large, true) {
                    out.push(Action::Publish(Notice::TooLarge { recycled: false }));
                }
                Phase::Ready(ready)
            }
            Some(Memory { exceeds, .. }) => {
                self.is_too_large = exceeds;
                Phase::Ready(ready)
            }
            None => Phase::Ready(ready),
        }
    }

    /// Begins an orderly stop.
    pub(super) fn dispose(&mut self, then: Then, now: Instant, out: &mut Vec<Action>) -> Phase {
        if !self.lifecycle.disposes {
            return self.terminate(then, now, out);
        }
        out.push(Action::Dispose { job: self.next_job(), limit: self.limits.dispose });
        Phase::Disposing { until: now + self.limits.dispose, then }
    }

    pub(super) fn terminate(&mut self, then: Then, now: Instant, out: &mut Vec<Action>) -> Phase {
        if self.lifecycle.is_service && !planted!(self, SignalsService) {
            return self.command_service(then, out);
        }
        out.push(Action::Signal(Signal::TERM));
        Phase::Terminating { since: now, again: now + self.limits.term_again, then }
    }

    /// Stops or restarts the user's service by its own command.
    fn command_service(&mut self, then: Then, out: &mut Vec<Action>) -> Phase {
        let verb = match then {
            Then::Stop => Verb::Stop,
            Then::Start | Then::Fail(_) => Verb::Restart,
        };
        out.push(Action::CommandService { job: self.next_job(), verb });
        Phase::Reaping { was_ready: false, then: Some(then) }
    }

    pub(super) fn reap(&mut self, was_ready: bool, then: Option<Then>, out: &mut Vec<Action>) -> Phase {
        let cause = match (&then, self.want) {
            (None, Want::Run) => Cause::Itself,
            (Some(Then::Fail(_)), Want::Run) => Cause::Failure,
            (Some(Then::Start | Then::Stop), Want::Run) | (_, Want::Stop { .. }) => Cause::Wanted,
        };
        out.push(Action::Reap { job: self.next_job(), cause });
        if planted!(self, LaunchesEarly) {
            return self.start(out);
        }
        Phase::Reaping { was_ready, then }
    }

    /// The kernel holds the process. Its record stays in the state file, so that no other opencode is
    /// started beside it and the next daemon finds it.
    pub(super) fn stuck(&mut self, out: &mut Vec<Action>) -> Phase {
        match self.want {
            Want::Stop { .. } => self.leave(out),
            Want::Run => {
                let why = "the previous process has not ended, even after KILL".to_owned();
                self.give_up(Error::OpencodeStartFailed(why), out);
                if planted!(self, ForgetsStuck) { Phase::Failed } else { Phase::Stuck }
            }
        }
    }

    /// Resets the backoff after a long time of health.
    pub(super) fn reset_backoff(&mut self, ready: &Ready, now: Instant) {
        if now.duration_since(ready.since) >= self.limits.healthy && !planted!(self, NeverForgives) {
            self.consecutive_failures = 0;
        }
    }

    /// The process and its descendants have ended: take the next step.
    pub(super) fn reaped(
        &mut self,
        was_ready: bool,
        then: Option<Then>,
        end: End,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Phase {
        let End { pid, how, output, port_taken } = end;
        out.push(Action::Publish(Notice::Exited { how: how.clone(), pid }));
        let with_output = |what: String| match output.is_empty() {
            true => what,
            false => format!("{what}; its last output:\n{output}"),
        };
        match (then, self.want) {
            (_, Want::Stop { .. }) | (Some(Then::Stop), _) => Phase::Stopped,
            (Some(Then::Start), Want::Run) => self.start(out),
            (Some(Then::Fail(Error::OpencodeStartFailed(why))), Want::Run) => {
                self.failed(Error::OpencodeStartFailed(with_output(why)), now, out)
            }
            (Some(Then::Fail(error)), Want::Run) => self.failed(error, now, out),
            (None, Want::Run) if !was_ready && port_taken && self.taken_ports < self.limits.port_tries => {
                self.taken_ports += 1;
                self.start(out)
            }
            (None, Want::Run) if was_ready && self.lifecycle.is_service => {
                // Its user, or an upgrade, ends it as often as they like: nothing is given up for that.
                self.restarting = true;
                self.again(
                    Error::OpencodeUnavailable(format!("its service {how}")),
                    self.consecutive_failures,
                    now,
                    out,
                )
            }
            (None, Want::Run) => {
                let when = if was_ready { "" } else { " before it was ready" };
                let why = with_output(format!("opencode {how}{when}"));
                let error = if was_ready { Error::OpencodeUnavailable(why) } else { Error::OpencodeStartFailed(why) };
                self.failed(error, now, out)
            }
        }
    }

    /// A start or a process has failed: start again, at once or after a backoff, or give up.
    pub(super) fn failed(&mut self, error: Error, now: Instant, out: &mut Vec<Action>) -> Phase {
        if self.want != Want::Run {
            return Phase::Stopped;
        }
        self.restarting = self.generation > 0;
        // We ran out of a resource: that says nothing about opencode.
        let is_ours = matches!(error, Error::Overloaded(_));
        if !is_ours {
            while self.recent.front().is_some_and(|at| now.duration_since(*at) > self.limits.failure_window) {
                self.recent.pop_front();
            }
            self.recent.push_back(now);
        }
        let is_final = matches!(
            error,
            Error::OpencodeNotFound(_) | Error::OpencodeUnsupported { .. } | Error::OpencodeAuthFailed(_)
        ) || matches!(error, Error::PortInUse { .. }) && self.generation == 0;
        let is_last = self.last_attempt && !is_ours;
        if is_final || is_last || (self.recent.len() >= self.limits.failures && !planted!(self, NeverGivesUp)) {
            self.give_up(error, out);
            return Phase::Failed;
        }
        // A resource that ran out is rarely back at once: always pause.
        let pauses = if is_ours { self.consecutive_failures.max(1) } else { self.consecutive_failures };
        self.again(error, pauses, now, out)
    }

    /// Starts opencode again, after the backoff for this many consecutive failures.
    fn again(&mut self, error: Error, pauses: u32, now: Instant, out: &mut Vec<Action>) -> Phase {
        self.last_error = Some(error.body());
        out.push(Action::Log(error));
        self.consecutive_failures += 1;
        if pauses == 0 {
            return self.start(out);
        }
        let pause = self.limits.backoff_first.saturating_mul(1 << (pauses - 1).min(16)).min(self.limits.backoff_last);
        Phase::Waiting { until: now + pause }
    }

    pub(super) fn give_up(&mut self, error: Error, out: &mut Vec<Action>) {
        (self.last_attempt, self.needed) = (false, false);
        self.consecutive_failures = 0;
        self.recent.clear();
        if !planted!(self, SilentFailure) {
            self.failures += 1;
        }
        self.last_error = Some(error.body());
        out.push(Action::Publish(Notice::Failed { error: error.body() }));
        out.push(Action::Log(error));
    }
}
