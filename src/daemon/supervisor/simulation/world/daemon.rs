//! The simulated daemon: gives events to the policy, carries out its actions, and checks the promises
//! after each.

use super::*;

/// The tolerance of the checks of hangs and starts: a health call and the pause before it.
const SLACK: Duration = Duration::from_secs(16);

impl World {
    /// Gives an event to the policy and carries out its actions.
    pub(super) fn handle(&mut self, event: Event) {
        let Some(mut policy) = self.policy.take() else { return };
        self.note(|| format!("-> {event:?}"));
        self.steps += 1;
        let after_health = self.before(&event);
        let mut actions = std::mem::take(&mut self.actions);
        policy.handle(event, self.now, &mut actions);
        if after_health && policy.phase() == Phase::Waiting {
            self.violates("a long time of health does not reset the backoff");
        }
        self.policy = Some(policy);
        self.carry_out(actions);
    }

    pub(super) fn carry_out(&mut self, mut actions: Vec<Action>) {
        for action in actions.drain(..) {
            // The daemon may be killed between any two actions.
            if !self.calm && self.dice.below(3000) == 0 {
                self.kill_daemon();
                break;
            }
            self.note(|| format!("   {action:?}"));
            self.act(action);
        }
        self.actions = actions;
        self.after();
    }

    /// Records an event for the promises; returns whether it ends a long time of health.
    fn before(&mut self, event: &Event) -> bool {
        let is_failure = match event {
            Event::VersionKnown { result: Err(e), .. } | Event::Launched { result: Err(e), .. } => {
                !matches!(e, Error::Overloaded(_)) && self.stop_requested.is_none()
            }
            Event::Reaped { end: End { port_taken: false, .. }, .. } => self.crashed && self.stop_requested.is_none(),
            Event::Stop { scope } => {
                let (since, keeps) = self.stop_requested.unwrap_or((self.now, true));
                let keeps_now = *scope == StopScope::DaemonOnly || self.shared && *scope == StopScope::OwnOpencode;
                self.stop_requested = Some((since, keeps && keeps_now));
                false
            }
            Event::Need | Event::Suspect { .. } => {
                self.needed = true;
                false
            }
            _ => false,
        };
        if is_failure {
            self.fails();
        }
        is_failure && matches!(event, Event::Reaped { .. }) && self.ended_after_health
    }

    /// Records the failure of a start or a process; too many within the window, and opencode must be given up.
    fn fails(&mut self) {
        let window = self.limits.failure_window;
        while self.failed.front().is_some_and(|at| self.now.duration_since(*at) > window) {
            self.failed.pop_front();
        }
        self.failed.push_back(self.now);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Adopt { job } => {
                let after = self.dice.time(0, 20);
                self.pending += 1;
                self.at(after, Occurrence::FindAdopted(self.daemon, job));
            }
            Action::AskVersion { job, limit } => {
                let (after, result) = self.version(limit);
                self.message(after, Event::VersionKnown { job, result });
            }
            // The job is answered in any case, here at its usual time.
            Action::Cancel => {}
            Action::Launch { job, start } => {
                if self.held.is_some() {
                    self.violates("the daemon launches a second process");
                }
                if self.shared && start && !self.needed {
                    self.violates("the daemon starts the user's service without need");
                }
                let after = self.dice.time(0, 5);
                self.pending += 1;
                self.at(after, Occurrence::Spawned(self.daemon, job, start));
            }
            Action::CommandService { job, verb } => {
                let Some(index) = self.held.take() else {
                    return self.violates("the daemon ends a service it does not hold");
                };
                if self.stop_requested.is_none() && !self.recycled {
                    self.may_end(index);
                }
                let generation = self.policy.as_ref().map_or(0, Policy::generation);
                self.account_ends(generation);
                (self.watched, self.recycled) = (None, false);
                let after = self.dice.time(100, 20_000);
                self.pending += 1;
                self.at(after, Occurrence::ServiceCommanded(self.daemon, job, verb));
            }
            Action::Watch => {
                let generation = self.policy.as_ref().map_or(0, Policy::generation);
                self.watched = Some(generation);
                let adopted = self.held.is_some_and(|index| self.engines[index].was_ready.is_none());
                self.account_begins(generation, adopted);
                if self.held.is_some_and(|index| !self.engines[index].alive) {
                    self.tell_exit();
                }
            }
            Action::Probe { limit, .. } => self.probe(limit),
            Action::Dispose { job, limit } => {
                let Some(index) = self.held else { return self.violates("the daemon disposes without a process") };
                let now = self.now;
                let answers = self.engines[index].alive && !self.engines[index].silent;
                if self.recycled && self.engines[index].seen_turn {
                    self.violates("a restart for memory cuts a turn");
                }
                let after = if answers { self.dice.time(5, 1500).min(limit) } else { limit };
                if answers {
                    // Disposing the instances ends their running sessions properly.
                    self.engines[index].turns = Default::default();
                    self.engines[index].loaded = Default::default();
                }
                self.engines[index].asked_to_end = true;
                self.engines[index].used(now);
                self.message(after, Event::Disposed { job });
            }
            Action::Signal(signal) => self.signal(signal),
            Action::Reap { job, .. } => {
                let Some(index) = self.held.take() else { return self.violates("the daemon reaps without a process") };
                // A service that refuses its own password is left alone.
                if self.engines[index].alive && !self.shared {
                    return self.violates("the daemon reaps a living process");
                }
                let generation = self.policy.as_ref().map_or(0, Policy::generation);
                self.account_ends(generation);
                (self.watched, self.recycled) = (None, false);
                // Descendants that ignore TERM are killed after the grace period.
                let after =
                    if self.engines[index].has_descendants { self.dice.time(1, 3000) } else { self.dice.time(0, 20) };
                self.pending += 1;
                self.at(after, Occurrence::Sweep(self.daemon, job, index, true));
            }
            Action::Release => {
                (self.held, self.watched) = (None, None);
            }
            Action::Publish(notice) => self.published(&notice),
            Action::Log(_) => {}
        }
    }

    fn version(&mut self, limit: Duration) -> (Duration, crate::error::Result<Checked>) {
        let lifecycle = match self.dice.chance(500) {
            _ if self.shared => SERVICE_LIFECYCLE,
            true => Lifecycle { disposes: true, kill_after: Duration::from_secs(5), is_service: false },
            false => Lifecycle { disposes: false, kill_after: Duration::from_secs(15), is_service: false },
        };
        if self.no_binary {
            return (Duration::ZERO, Err(Error::OpencodeNotFound(String::new())));
        }
        if self.out_of_resources && self.dice.chance(700) {
            return (Duration::ZERO, Err(Error::Overloaded("processes")));
        }
        if !self.calm && self.dice.chance(10) {
            self.count("a version check that times out");
            return (limit, Err(Error::OpencodeStartFailed(String::new())));
        }
        // The version is mostly on record.
        let after = if self.dice.chance(900) { Duration::ZERO } else { self.dice.time(200, 900) };
        (after, Ok(Checked { lifecycle, age: Duration::ZERO }))
    }

    /// Probes the process.
    fn probe(&mut self, limit: Duration) {
        let Some(index) = self.held else { return self.violates("the daemon probes without a process") };
        let generation = self.policy.as_ref().map_or(0, Policy::generation);
        let (now, calm) = (self.now, self.calm);
        if self.out_of_resources && self.dice.chance(800) {
            self.count("a health call that is not sent");
            let answer = Answer::NotSent(Error::Overloaded("connections"));
            let probe = Probe { answer, cpu: None, log: 0, heard: false, memory: None };
            return self.message(Duration::ZERO, Event::Probed { generation, probe });
        }
        let engine = &mut self.engines[index];
        let listens = engine.alive && !engine.not_listening && engine.listens_at.is_some_and(|at| at <= now);
        let answers = listens && !engine.silent && engine.answers_at.is_some_and(|at| at <= now);
        let longest = if calm || self.dice.chance(990) { 5 } else { 4000 };
        let latency = self.dice.time(0, longest);
        let answered = answers && latency < limit;
        let cpu = Some(engine.used(now));
        let log = if engine.prints { now.duration_since(engine.started).as_secs() } else { 0 };
        let answer = match (listens, answered, engine.rejects_password) {
            (false, ..) if engine.alive => Answer::NotListening,
            (true, true, true) => Answer::Refused(Error::OpencodeAuthFailed(1)),
            (true, true, false) => Answer::Healthy,
            (true, false, _) | (false, ..) => Answer::Silent(Error::OpencodeTimeout("")),
        };
        let after = if listens { if answered { latency } else { limit } } else { Duration::ZERO };
        engine.was_ready.get_or_insert(listens);
        match answer {
            Answer::Healthy => engine.unanswered = None,
            Answer::Silent(_) => {
                if engine.unanswered.is_none() {
                    engine.busy_throughout = engine.busy.is_some();
                }
                engine.unanswered.get_or_insert((now, 0)).1 += 1;
            }
            Answer::NotListening | Answer::Refused(_) | Answer::NotSent(_) => {}
        }
        let heard = answers && !answered;
        if heard {
            engine.unanswered = None;
        }
        engine.seen_turn = engine.turns.contains(&true);
        let memory = answered.then_some(Memory { exceeds: engine.too_large, busy: engine.seen_turn });
        let probe = Probe { answer, cpu, log, heard, memory };
        self.message(after, Event::Probed { generation, probe });
    }

    fn signal(&mut self, signal: Signal) {
        let Some(index) = self.held else { return self.violates("the daemon signals a process it does not hold") };
        let now = self.now;
        if self.shared {
            return self.violates("the daemon signals the user's service");
        }
        if !self.engines[index].proved {
            return self.violates("the daemon signals a process that is not proved ours");
        }
        if !self.engines[index].alive {
            // The daemon does not know yet that it has ended by itself.
            self.engines[index].asked_to_end = true;
            return;
        }
        // Once it may be signalled, a process may be signalled again, even if it answers in between.
        if self.stop_requested.is_none() && !self.recycled && !self.engines[index].asked_to_end {
            self.may_end(index);
        }
        let engine = &mut self.engines[index];
        engine.used(now);
        engine.asked_to_end = true;
        let ends = match signal {
            Signal::KILL if engine.unkillable => {
                engine.doomed = true;
                Some(self.dice.time(3000, 120_000))
            }
            Signal::KILL => Some(Duration::from_millis(1)),
            _ if engine.ignored_terms > 0 => {
                engine.ignored_terms -= 1;
                None
            }
            _ if engine.unkillable => None,
            _ => Some(self.dice.time(1, 2000)),
        };
        if let Some(after) = ends {
            self.at(after, Occurrence::End(index));
        }
    }

    /// Checks that a process may be ended: it has hung for long enough, or its start has.
    fn may_end(&mut self, index: usize) {
        let (now, limits) = (self.now, &self.limits);
        let engine = &self.engines[index];
        let was_ready = engine.ready_since.is_some();
        let silent = engine.unanswered.map(|(since, count)| (now.duration_since(since) + SLACK, count));
        let deserved = match silent {
            _ if engine.not_listening || engine.rejects_password || engine.doomed => true,
            Some((silent, count)) if was_ready || engine.was_ready == Some(true) => {
                let limit = if engine.busy_throughout { limits.hang_busy } else { limits.hang };
                count >= limits.hang_probes && silent >= limit
            }
            _ if was_ready => false,
            // A start, perhaps one that an earlier daemon has begun.
            _ => {
                let took = now.duration_since(engine.started) + SLACK;
                // The last probe may have come before it became busy.
                let is_busy = engine.busy.is_some_and(|since| now.duration_since(since) > SLACK);
                took >= if engine.prints || is_busy { limits.ready_at_most } else { limits.ready }
            }
        };
        if !deserved {
            self.violates("the daemon ends an opencode that works");
        }
    }

    fn published(&mut self, notice: &Notice) {
        match notice {
            Notice::Ready { .. } => {
                let now = self.now;
                self.needed = false;
                if let Some(index) = self.held {
                    let engine = &mut self.engines[index];
                    (engine.unanswered, engine.ready_since) = (None, Some(now));
                }
            }
            Notice::Failed { .. } => {
                self.failed.clear();
                self.count("opencode given up");
            }
            Notice::TooLarge { recycled } => self.recycled = *recycled,
            Notice::Starting | Notice::Exited { .. } => {}
        }
    }

    /// The promises that hold at any time.
    fn after(&mut self) {
        if self.failed.len() >= self.limits.failures {
            self.violates("opencode fails repeatedly and is not given up");
        }
        while self.engines.get(self.past).is_some_and(|engine| !engine.alive && !engine.has_descendants) {
            self.past += 1;
        }
        let execed = || self.engines.iter().enumerate().skip(self.past).filter(|(_, engine)| engine.execed);
        let unrecorded = execed().any(|(index, engine)| engine.alive && self.disk != Some(index));
        if execed().filter(|(_, engine)| engine.alive || engine.has_descendants).count() > 1 {
            self.violates("two opencodes live at once");
        } else if unrecorded {
            self.violates("a living process is not on disk");
        }
        let Some(policy) = &self.policy else { return };
        let phase = policy.phase();
        if policy.is_stopped() {
            let (since, keeps) = self.stop_requested.unwrap_or((self.now, true));
            if self.now.duration_since(since) > self.limits.stop {
                self.violates("a stop takes too long");
            }
            let stuck = self.engines.iter().any(|engine| engine.unkillable || engine.doomed);
            // A service that the daemon has not found may stay.
            if !keeps
                && !stuck
                && !self.shared
                && self.engines.iter().any(|engine| engine.execed && (engine.alive || engine.has_descendants))
            {
                self.violates("a stop leaves processes behind");
            }
            return self.end_daemon();
        }
        let rests = policy.next_deadline().is_none() && self.pending == 0;
        if rests && phase != Phase::Failed {
            return self.violates("no further event is due");
        }
        let (failures, checks, generation) = (policy.failures(), policy.checks(), policy.generation());
        let (stopping, is_ready) = (policy.is_stopping(), phase == Phase::Ready);
        self.clients.retain(|client| {
            let trusted = client.suspect.is_none_or(|suspect| generation > suspect || checks > client.checks);
            let failed = phase == Phase::Failed && failures > client.failures;
            !(stopping || failed || is_ready && trusted)
        });
        if rests && !self.clients.is_empty() {
            self.violates("a waiting request does not learn of a failure");
        }
    }

    /// The daemon has stopped.
    fn end_daemon(&mut self) {
        self.policy = None;
        self.forget();
        if !self.is_over {
            let after = self.dice.time(0, 5000);
            self.at(after, Occurrence::Daemon);
        }
    }

    /// Discards the state that ends with a daemon.
    fn forget(&mut self) {
        self.daemon += 1;
        (self.pending, self.held, self.watched, self.stop_requested, self.recycled) = (0, None, None, None, false);
        self.failed.clear();
        self.clients.clear();
        self.requests.clear();
        (self.account, self.account_due) = (Account::new(Some(instances::IDLE_TTL), Fences::default()), None);
        for engine in self.engines.iter_mut().skip(self.past) {
            engine.proved = false;
        }
    }

    /// Kills the daemon: its jobs end with it.
    pub(super) fn kill_daemon(&mut self) {
        self.note(|| "the daemon is killed".to_owned());
        self.count("a daemon killed");
        self.policy = None;
        self.forget();
        let after = self.dice.time(0, 3000);
        self.at(after, Occurrence::Daemon);
    }
}
