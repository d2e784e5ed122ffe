//! Occurrences outside the daemon: random faults, requests, and the progress of jobs that it has begun.

use super::*;

impl World {
    pub(super) fn occur(&mut self, what: Occurrence) {
        match what {
            Occurrence::Message(daemon, event) => {
                if daemon == self.daemon && self.policy.is_some() {
                    self.pending -= 1;
                    self.handle(event);
                }
            }
            Occurrence::Daemon => self.start_daemon(),
            Occurrence::Fault => self.random_fault(),
            Occurrence::Retry => self.client(None),
            Occurrence::TurnEnds(index, directory) => self.instance(Step::TurnEnds(index, directory)),
            Occurrence::Instance(daemon, step) => {
                if daemon == self.daemon && self.policy.is_some() {
                    self.instance(step);
                }
            }
            Occurrence::End(index) => self.end(index),
            Occurrence::FindAdopted(daemon, job) => {
                if daemon == self.daemon {
                    self.find_adopted(job);
                }
            }
            Occurrence::Spawned(daemon, job, start) => {
                if daemon == self.daemon {
                    if self.shared { self.find_service(job, start) } else { self.spawn(job) }
                }
            }
            Occurrence::ServiceCommanded(daemon, job, verb) => self.service_commanded(daemon, job, verb),
            Occurrence::Record(daemon, job, index) => self.record(daemon, job, index),
            Occurrence::Exec(daemon, job, index) => self.publish_event(daemon, job, index),
            Occurrence::Sweep(daemon, job, index, reports) => {
                if daemon == self.daemon {
                    self.engines[index].has_descendants = false;
                    if self.disk == Some(index) && !self.engines[index].alive {
                        self.disk = None;
                    }
                    self.pending -= 1;
                    if reports {
                        self.reap(job, index);
                    } else {
                        self.message(Duration::ZERO, Event::Adopted { job, found: None });
                    }
                }
            }
        }
    }

    fn start_daemon(&mut self) {
        if self.policy.is_some() {
            return;
        }
        self.note(|| "a daemon starts".to_owned());
        self.daemon += 1;
        // The user's service is found by its registration, not by the state file.
        let recorded = self.disk.is_some() && !self.shared;
        let mut actions = std::mem::take(&mut self.actions);
        let mut policy = Policy::new(self.limits.clone(), recorded && self.bug != Some(Bug::NeverAdopts), &mut actions);
        policy.bug = self.bug;
        self.policy = Some(policy);
        self.carry_out(actions);
        // Stops often arrive in the middle of a start, and two clients may want different ones.
        if !self.calm && self.dice.chance(150) {
            for _ in 0..2 {
                let (scope, after) = (self.random_scope(500), self.dice.time(0, 60));
                self.message(after, Event::Stop { scope });
            }
        }
    }

    /// Finds the opencode of an earlier daemon; if it has ended, ends its descendants.
    fn find_adopted(&mut self, job: u64) {
        let Some(index) = self.disk else {
            self.pending -= 1;
            return self.message(Duration::ZERO, Event::Adopted { job, found: None });
        };
        let now = self.now;
        if !self.engines[index].alive {
            let after = if self.engines[index].has_descendants { self.dice.time(1, 3000) } else { Duration::ZERO };
            return self.at(after, Occurrence::Sweep(self.daemon, job, index, false));
        }
        self.pending -= 1;
        self.count("an opencode adopted");
        let engine = &mut self.engines[index];
        (engine.proved, engine.was_ready, engine.asked_to_end) = (true, None, false);
        (engine.unanswered, engine.ready_since) = (None, None);
        let age = now.duration_since(engine.started);
        let lifecycle = Lifecycle { disposes: true, kill_after: Duration::from_secs(5), is_service: false };
        self.held = Some(index);
        self.message(Duration::ZERO, Event::Adopted { job, found: Some(Checked { lifecycle, age }) });
    }

    /// Spawns a process, which waits until it is released to run opencode.
    fn spawn(&mut self, job: u64) {
        if self.out_of_resources && self.dice.chance(700) {
            self.pending -= 1;
            return self.message(Duration::ZERO, Event::Launched { job, result: Err(Error::Overloaded("processes")) });
        }
        let index = self.begin();
        let after = self.dice.time(0, 30);
        self.at(after, Occurrence::Record(self.daemon, job, index));
    }

    /// Adds a process with random behaviour.
    fn begin(&mut self) -> usize {
        let (now, calm, shared) = (self.now, self.calm, self.shared);
        let dice = &mut self.dice;
        let kind = if calm { 0 } else { dice.below(100) };
        let after = |wait: Duration| Some(now + wait);
        let (listens_at, answers_at, crashes_at) = match kind {
            0..60 => {
                let at = dice.time(100, 3000);
                (after(at), after(at + dice.time(0, 500)), None)
            }
            60..70 => {
                let at = dice.time(3000, 55_000);
                (after(at), after(at + dice.time(0, 2000)), None)
            }
            // A first start: minutes of work.
            70..75 => {
                let at = dice.time(60_000, 570_000);
                (after(at), after(at), None)
            }
            75..80 => (None, None, None),
            80..83 => (after(dice.time(100, 3000)), None, None),
            83..95 => (None, None, after(dice.time(0, 2000))),
            _ => {
                let at = dice.time(100, 3000);
                (after(at), after(at), after(at + dice.time(0, 60_000)))
            }
        };
        let works = (70..75).contains(&kind);
        let engine = Engine {
            alive: true,
            execed: false,
            // The descendants of a service are left alone.
            has_descendants: dice.chance(200) && !shared,
            proved: true,
            listens_at,
            answers_at,
            crashes_at,
            takes_port: (83..87).contains(&kind),
            silent: false,
            not_listening: false,
            rejects_password: !calm && dice.chance(20),
            busy: None,
            prints: works,
            too_large: false,
            loaded: Default::default(),
            turns: Default::default(),
            seen_turn: false,
            ignored_terms: if dice.chance(100) {
                1
            } else if dice.chance(50) && !calm {
                u32::MAX
            } else {
                0
            },
            unkillable: !calm && dice.chance(30),
            doomed: false,
            cpu_time: Duration::ZERO,
            cpu_updated_at: now,
            was_ready: Some(false),
            asked_to_end: false,
            started: now,
            ready_since: None,
            healthy_for: None,
            unanswered: None,
            busy_throughout: false,
        };
        self.engines.push(engine);
        self.engines.len() - 1
    }

    fn record(&mut self, daemon: u64, job: u64, index: usize) {
        if daemon != self.daemon {
            // The daemon has died, which closed standard input: the process ends before it runs opencode.
            return self.forget_untold(index);
        }
        // A command of an earlier daemon ended the service before it registered, and perhaps started another.
        if !self.engines[index].alive {
            return self.find_service(job, false);
        }
        if self.disk_fails {
            self.count("a disk that is full");
            self.forget_untold(index);
            self.pending -= 1;
            let error = Error::OpencodeStartFailed(String::new());
            return self.message(Duration::ZERO, Event::Launched { job, result: Err(error) });
        }
        self.disk = Some(index);
        let after = self.dice.time(0, 3);
        self.at(after, Occurrence::Exec(self.daemon, job, index));
    }

    fn forget_untold(&mut self, index: usize) {
        (self.engines[index].alive, self.engines[index].has_descendants) = (false, false);
    }

    fn publish_event(&mut self, daemon: u64, job: u64, index: usize) {
        if daemon != self.daemon {
            return self.forget_untold(index);
        }
        // The same, after it registered.
        if !self.engines[index].alive {
            return self.find_service(job, false);
        }
        self.engines[index].execed = true;
        if let Some(at) = self.engines[index].crashes_at {
            let after = at.saturating_duration_since(self.now);
            self.at(after, Occurrence::End(index));
        }
        self.held = Some(index);
        self.pending -= 1;
        self.message(Duration::ZERO, Event::Launched { job, result: Ok(Launched::Running) });
    }

    /// A process ends.
    fn end(&mut self, index: usize) {
        if !self.engines[index].alive {
            return;
        }
        self.note(|| format!("process {index} ends"));
        let health = self.engines[index].ready_since.map(|since| self.now.duration_since(since));
        (self.engines[index].alive, self.engines[index].healthy_for) = (false, health);
        if self.held == Some(index) {
            self.tell_exit();
        }
    }

    /// Reports the end of a process, mostly at once, sometimes twice.
    pub(super) fn tell_exit(&mut self) {
        let Some(generation) = self.watched else { return };
        let after = if self.dice.chance(950) { Duration::ZERO } else { self.dice.time(0, 200) };
        self.message(after, Event::Exited { generation });
        if self.dice.chance(100) {
            self.count("an exit reported twice");
            let after = self.dice.time(1, 20_000);
            self.message(after, Event::Exited { generation });
        }
    }

    /// Answers the job that reaps a process.
    fn reap(&mut self, job: u64, index: usize) {
        let engine = &self.engines[index];
        let port_taken = engine.takes_port && engine.ready_since.is_none();
        // Users may end their service at any time: only a failed start counts.
        let is_failure = !self.shared || engine.ready_since.is_none() && !engine.alive;
        self.crashed = !engine.asked_to_end && is_failure;
        self.ended_after_health = engine.healthy_for.is_some_and(|health| health >= self.limits.healthy);
        self.message(Duration::ZERO, Event::Reaped { job, end: End { port_taken, ..End::default() } });
    }

    /// Lets a random fault begin or end, or a request arrive.
    fn random_fault(&mut self) {
        if self.calm {
            return;
        }
        let after = match self.dice.below(10) {
            0..5 => self.dice.time(0, 2000),
            5..9 => self.dice.time(0, 40_000),
            _ => self.dice.time(0, 300_000),
        };
        self.at(after, Occurrence::Fault);
        match self.dice.below(100) {
            0..20 => self.client(None),
            20..30 => {
                let generation = self.policy.as_ref().map_or(0, Policy::generation);
                let old = generation.saturating_sub(self.dice.below(2));
                self.client(Some(old));
            }
            30..36 => {
                let scope = self.random_scope(400);
                self.ask_to_stop(scope);
                // Another client may want a different stop.
                if self.dice.chance(300) {
                    let (scope, after) = (self.random_scope(500), self.dice.time(0, 8000));
                    self.message(after, Event::Stop { scope });
                }
            }
            36..38 if self.policy.is_some() => self.kill_daemon(),
            38..41 => {
                self.count("a disk that fails, or works again");
                self.disk_fails = !self.disk_fails && self.dice.chance(500);
            }
            41..47 => {
                self.count("a lack of threads and descriptors, or its end");
                self.out_of_resources = !self.out_of_resources && self.dice.chance(500);
            }
            47..48 => {
                self.count("a binary that goes, or comes back");
                self.no_binary = !self.no_binary && self.dice.chance(300);
            }
            _ => self.engine_fault(),
        }
    }

    /// Lets a random fault of the process begin or end.
    fn engine_fault(&mut self) {
        let now = self.now;
        let Some(index) = self.disk.filter(|index| self.engines[*index].alive && self.engines[*index].execed) else {
            return;
        };
        let (kind, swap) = (self.dice.below(100), self.dice.chance(500));
        let engine = &mut self.engines[index];
        engine.used(now);
        match kind {
            0..12 => {
                engine.silent = !engine.silent;
                engine.busy = (engine.silent && swap).then_some(now);
                engine.busy_throughout &= engine.busy.is_some();
                engine.turns[0] |= engine.busy.is_some();
                engine.loaded[0] |= engine.busy.is_some();
                self.count("an opencode that hangs, idle or busy, or answers again");
            }
            12..14 if engine.ready_since.is_some() => {
                engine.not_listening = true;
                self.count("an opencode that no longer listens");
            }
            14..22 => {
                self.count("a crash");
                self.end(index);
            }
            22..42 => {
                let directory = self.dice.below(DIRECTORIES.len() as u64) as usize;
                self.step(Duration::ZERO, Step::Ask(directory));
            }
            42..50 => {
                engine.too_large = !engine.too_large;
                self.count("too much memory, or no more");
            }
            50..60 if engine.silent => {
                engine.busy = swap.then_some(engine.busy.unwrap_or(now));
                engine.busy_throughout &= swap;
            }
            _ => {}
        }
    }

    /// Sends a request that needs opencode.
    fn client(&mut self, suspect: Option<u64>) {
        let Some(policy) = &self.policy else { return };
        let deadline = self.now + self.dice.time(1000, 60_000);
        self.clients.push(Client { deadline, failures: policy.failures(), checks: policy.checks(), suspect });
        let event = match suspect {
            Some(generation) => Event::Suspect { generation },
            None => Event::Need,
        };
        self.message(Duration::ZERO, event);
    }

    pub(super) fn ask_to_stop(&mut self, scope: StopScope) {
        if self.policy.is_some() {
            self.count("a stop");
            self.message(Duration::ZERO, Event::Stop { scope });
        }
    }

    /// A random kind of stop; one that keeps opencode with this probability, in thousandths.
    fn random_scope(&mut self, nothing: u64) -> StopScope {
        match (self.dice.chance(nothing), self.shared && self.dice.chance(300)) {
            (true, _) => StopScope::DaemonOnly,
            (false, false) => StopScope::OwnOpencode,
            (false, true) => StopScope::Service,
        }
    }

    /// Finds the user's service; with `start`, starts it if it does not run.
    fn find_service(&mut self, job: u64, start: bool) {
        let running = self.disk.filter(|index| self.engines[*index].alive && self.engines[*index].execed);
        if let Some(index) = running {
            self.count("a service found");
            let engine = &mut self.engines[index];
            (engine.was_ready, engine.asked_to_end) = (None, false);
            (engine.unanswered, engine.ready_since) = (None, None);
            self.held = Some(index);
            self.pending -= 1;
            return self.message(Duration::ZERO, Event::Launched { job, result: Ok(Launched::Running) });
        }
        if start {
            return self.spawn(job);
        }
        self.pending -= 1;
        self.message(Duration::ZERO, Event::Launched { job, result: Ok(Launched::Absent) });
    }

    /// A command has stopped or restarted the user's service, or failed. The command runs on when its daemon
    /// is killed.
    fn service_commanded(&mut self, daemon: u64, job: u64, verb: Verb) {
        if self.calm || self.dice.chance(900) {
            self.count("a service ended by its own command");
            let running: Vec<usize> = (0..self.engines.len()).filter(|index| self.engines[*index].alive).collect();
            for index in running {
                self.end(index);
            }
            if verb == Verb::Restart {
                let next = self.begin();
                self.engines[next].execed = true;
                self.disk = Some(next);
            }
        }
        if daemon == self.daemon {
            self.pending -= 1;
            (self.crashed, self.ended_after_health) = (false, false);
            self.message(Duration::ZERO, Event::Reaped { job, end: End::default() });
        }
    }
}
