//! What the daemon does in the world: its policy is given events, its actions are carried out, and the
//! promises are looked at after each.

use super::*;

/// How much later than a promise an end may come: a health call and the pause before it.
const SLACK: Duration = Duration::from_secs(16);

impl World {
    /// The policy handles an event, and what it wants is begun.
    pub(super) fn handle(&mut self, event: Event) {
        let Some(mut policy) = self.policy.take() else { return };
        self.note(|| format!("-> {event:?}"));
        self.steps += 1;
        let after_health = self.before(&event);
        let mut actions = std::mem::take(&mut self.actions);
        policy.handle(event, self.now, &mut actions);
        if after_health && policy.phase() == Phase::Waiting {
            self.breaks("after a long time of health a failure is not forgiven");
        }
        self.policy = Some(policy);
        self.carry_out(actions);
    }

    pub(super) fn carry_out(&mut self, mut actions: Vec<Action>) {
        for action in actions.drain(..) {
            // A daemon may be killed between any two things that it does.
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

    /// What an event means for the promises; whether it ends a long time of health.
    fn before(&mut self, event: &Event) -> bool {
        let is_failure = match event {
            Event::VersionKnown { result: Err(e), .. } | Event::Launched { result: Err(e), .. } => {
                !matches!(e, Error::Overloaded(_)) && self.stop_asked.is_none()
            }
            Event::Buried { end: End { port_taken: false, .. }, .. } => {
                self.fell_by_itself && self.stop_asked.is_none()
            }
            Event::Stop { ends } => {
                let (since, keeps) = self.stop_asked.unwrap_or((self.now, true));
                let keeps_now = *ends == Ends::Nothing || self.shared && *ends == Ends::Ours;
                self.stop_asked = Some((since, keeps && keeps_now));
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
        is_failure && matches!(event, Event::Buried { .. }) && self.ended_after_health
    }

    /// A start or a process has failed: so often within the window, and opencode stays down.
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
                self.at(after, Happening::Look(self.daemon, job));
            }
            Action::AskVersion { job, limit } => {
                let (after, result) = self.version(limit);
                self.message(after, Event::VersionKnown { job, result });
            }
            // The answer comes by itself; here it is only not sooner.
            Action::Cancel => {}
            Action::Launch { job, start } => {
                if self.held.is_some() {
                    self.breaks("a process is launched beside one that is held");
                }
                if self.shared && start && !self.needed {
                    self.breaks("the user's service is started, and nobody needs it");
                }
                let after = self.dice.time(0, 5);
                self.pending += 1;
                self.at(after, Happening::Spawned(self.daemon, job, start));
            }
            Action::Order { job, verb } => {
                let Some(index) = self.held.take() else { return self.breaks("no service is ended") };
                if self.stop_asked.is_none() && !self.recycled {
                    self.may_end(index);
                }
                let generation = self.policy.as_ref().map_or(0, Policy::generation);
                self.account_ends(generation);
                (self.watched, self.recycled) = (None, false);
                let after = self.dice.time(100, 20_000);
                self.pending += 1;
                self.at(after, Happening::Ordered(self.daemon, job, verb));
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
                let Some(index) = self.held else { return self.breaks("nothing is disposed") };
                let now = self.now;
                let answers = self.engines[index].alive && !self.engines[index].silent;
                if self.recycled && self.engines[index].seen_turn {
                    self.breaks("a restart for memory cuts a turn");
                }
                let after = if answers { self.dice.time(5, 1500).min(limit) } else { limit };
                if answers {
                    // Their instances are disposed, and what runs in them is ended properly.
                    self.engines[index].turns = Default::default();
                    self.engines[index].loaded = Default::default();
                }
                self.engines[index].asked_to_end = true;
                self.engines[index].used(now);
                self.message(after, Event::Disposed { job });
            }
            Action::Signal(signal) => self.signal(signal),
            Action::Bury { job, .. } => {
                let Some(index) = self.held.take() else { return self.breaks("nothing is buried") };
                // A service that refuses its own password is left alone.
                if self.engines[index].alive && !self.shared {
                    return self.breaks("a living process is buried");
                }
                let generation = self.policy.as_ref().map_or(0, Policy::generation);
                self.account_ends(generation);
                (self.watched, self.recycled) = (None, false);
                // What ignores TERM is killed after the grace.
                let after = if self.engines[index].leaves { self.dice.time(1, 3000) } else { self.dice.time(0, 20) };
                self.pending += 1;
                self.at(after, Happening::Sweep(self.daemon, job, index, true));
            }
            Action::Release => {
                (self.held, self.watched) = (None, None);
            }
            Action::Tell(news) => self.told(&news),
            Action::Note(_) => {}
        }
    }

    fn version(&mut self, limit: Duration) -> (Duration, crate::error::Result<Checked>) {
        let manners = match self.dice.often(500) {
            _ if self.shared => SERVICE_MANNERS,
            true => Manners { disposes: true, kill_after: Duration::from_secs(5), is_service: false },
            false => Manners { disposes: false, kill_after: Duration::from_secs(15), is_service: false },
        };
        if self.no_binary {
            return (Duration::ZERO, Err(Error::OpencodeNotFound(String::new())));
        }
        if self.lacks && self.dice.often(700) {
            return (Duration::ZERO, Err(Error::Overloaded("processes")));
        }
        if !self.calm && self.dice.often(10) {
            self.count("a version that does not come");
            return (limit, Err(Error::OpencodeStartFailed(String::new())));
        }
        // Mostly it is remembered.
        let after = if self.dice.often(900) { Duration::ZERO } else { self.dice.time(200, 900) };
        (after, Ok(Checked { manners, age: Duration::ZERO }))
    }

    /// A look at the process, and perhaps a health call.
    fn probe(&mut self, limit: Duration) {
        let Some(index) = self.held else { return self.breaks("nothing is asked for its health") };
        let generation = self.policy.as_ref().map_or(0, Policy::generation);
        let (now, calm) = (self.now, self.calm);
        if self.lacks && self.dice.often(800) {
            self.count("a health call that is not sent");
            let answer = Answer::NotAsked(Error::Overloaded("connections"));
            let probe = Probe { answer, cpu: None, log: 0, heard: false, memory: None };
            return self.message(Duration::ZERO, Event::Probed { generation, probe });
        }
        let engine = &mut self.engines[index];
        let listens = engine.alive && !engine.deaf && engine.listens_at.is_some_and(|at| at <= now);
        let answers = listens && !engine.silent && engine.answers_at.is_some_and(|at| at <= now);
        let longest = if calm || self.dice.often(990) { 5 } else { 4000 };
        let latency = self.dice.time(0, longest);
        let answered = answers && latency < limit;
        let cpu = Some(engine.used(now));
        let log = if engine.prints { now.duration_since(engine.started).as_secs() } else { 0 };
        let answer = match (listens, answered, engine.refuses) {
            (false, ..) if engine.alive => Answer::Deaf,
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
            Answer::Deaf | Answer::Refused(_) | Answer::NotAsked(_) => {}
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
        let Some(index) = self.held else { return self.breaks("a process that is not held is signalled") };
        let now = self.now;
        if self.shared {
            return self.breaks("the user's service is signalled");
        }
        if !self.engines[index].proved {
            return self.breaks("a process that is not proved ours is signalled");
        }
        if !self.engines[index].alive {
            return;
        }
        // What the process does after the first signal is no reason against the next.
        if self.stop_asked.is_none() && !self.recycled && !self.engines[index].asked_to_end {
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
            _ if engine.swallows > 0 => {
                engine.swallows -= 1;
                None
            }
            _ if engine.unkillable => None,
            _ => Some(self.dice.time(1, 2000)),
        };
        if let Some(after) = ends {
            self.at(after, Happening::End(index));
        }
    }

    /// Whether a process has deserved to be ended: it answered nothing for long, and was not busy.
    fn may_end(&mut self, index: usize) {
        let (now, limits) = (self.now, &self.limits);
        let engine = &self.engines[index];
        let was_ready = engine.ready_since.is_some();
        let silent = engine.unanswered.map(|(since, count)| (now.duration_since(since) + SLACK, count));
        let deserved = match silent {
            _ if engine.deaf || engine.refuses || engine.doomed => true,
            Some((silent, count)) if was_ready || engine.was_ready == Some(true) => {
                let limit = if engine.busy_throughout { limits.hang_busy } else { limits.hang };
                count >= limits.hang_probes && silent >= limit
            }
            _ if was_ready => false,
            // A start, or what is left of one that an earlier daemon has begun.
            _ => {
                let took = now.duration_since(engine.started) + SLACK;
                // The last look may have been before it became busy.
                let is_busy = engine.busy.is_some_and(|since| now.duration_since(since) > SLACK);
                took >= if engine.prints || is_busy { limits.ready_at_most } else { limits.ready }
            }
        };
        if !deserved {
            self.breaks("an opencode that lives is ended");
        }
    }

    fn told(&mut self, news: &News) {
        match news {
            News::Ready { .. } => {
                let now = self.now;
                self.needed = false;
                if let Some(index) = self.held {
                    let engine = &mut self.engines[index];
                    (engine.unanswered, engine.ready_since) = (None, Some(now));
                }
            }
            News::Failed { .. } => {
                self.failed.clear();
                self.count("opencode given up");
            }
            News::TooLarge { recycled } => self.recycled = *recycled,
            News::Starting | News::Exited { .. } => {}
        }
    }

    /// The promises that hold at any time.
    fn after(&mut self) {
        if self.failed.len() >= self.limits.failures {
            self.breaks("opencode fails again and again, and is not given up");
        }
        while self.engines.get(self.past).is_some_and(|engine| !engine.alive && !engine.leaves) {
            self.past += 1;
        }
        let told = || self.engines.iter().enumerate().skip(self.past).filter(|(_, engine)| engine.told);
        let unrecorded = told().any(|(index, engine)| engine.alive && self.disk != Some(index));
        if told().filter(|(_, engine)| engine.alive || engine.leaves).count() > 1 {
            self.breaks("two of ours live");
        } else if unrecorded {
            self.breaks("a living process is not on disk");
        }
        let Some(policy) = &self.policy else { return };
        let phase = policy.phase();
        if policy.is_stopped() {
            let (since, keeps) = self.stop_asked.unwrap_or((self.now, true));
            if self.now.duration_since(since) > self.limits.stop {
                self.breaks("a stop takes too long");
            }
            let stuck = self.engines.iter().any(|engine| engine.unkillable || engine.doomed);
            // A service that the daemon had not found is none of its business.
            if !keeps
                && !stuck
                && !self.shared
                && self.engines.iter().any(|engine| engine.told && (engine.alive || engine.leaves))
            {
                self.breaks("a stop leaves something behind");
            }
            return self.end_daemon();
        }
        let rests = policy.next_deadline().is_none() && self.pending == 0;
        if rests && phase != Phase::Failed {
            return self.breaks("nothing happens any more");
        }
        let (failures, checks, generation) = (policy.failures(), policy.checks(), policy.generation());
        let (stopping, is_ready) = (policy.is_stopping(), phase == Phase::Ready);
        self.clients.retain(|client| {
            let trusted = client.suspect.is_none_or(|suspect| generation > suspect || checks > client.checks);
            let failed = phase == Phase::Failed && failures > client.failures;
            !(stopping || failed || is_ready && trusted)
        });
        if rests && !self.clients.is_empty() {
            self.breaks("who waits is told of no failure");
        }
    }

    /// The daemon has ended in good order.
    fn end_daemon(&mut self) {
        self.policy = None;
        self.forget();
        if !self.is_over {
            let after = self.dice.time(0, 5000);
            self.at(after, Happening::Daemon);
        }
    }

    /// What ends with a daemon.
    fn forget(&mut self) {
        self.daemon += 1;
        (self.pending, self.held, self.watched, self.stop_asked, self.recycled) = (0, None, None, None, false);
        self.failed.clear();
        self.clients.clear();
        self.requests.clear();
        (self.account, self.account_due) = (Account::new(Some(instances::IDLE_TTL), Fences::default()), None);
        for engine in self.engines.iter_mut().skip(self.past) {
            engine.proved = false;
        }
    }

    /// The daemon is killed: nothing that it has begun goes on, but for what the kernel does.
    pub(super) fn kill_daemon(&mut self) {
        self.note(|| "the daemon is killed".to_owned());
        self.count("a daemon killed");
        self.policy = None;
        self.forget();
        let after = self.dice.time(0, 3000);
        self.at(after, Happening::Daemon);
    }
}
