//! Timeouts of minutes in virtual time, and the table of phases and events.

#[path = "table_tests.rs"]
mod table;

use super::*;

const LIFECYCLE: Lifecycle = Lifecycle { disposes: true, kill_after: Duration::from_secs(5), is_service: false };

/// The user's own service.
const SERVICE: Lifecycle = Lifecycle { disposes: false, kill_after: Duration::ZERO, is_service: true };

/// A policy, the virtual time, and the actions of the last event.
struct Story {
    policy: Policy,
    now: Instant,
    actions: Vec<Action>,
    events: u32,
}

/// More events than any test handles: a policy that reaches it makes no progress.
const ENDLESS: u32 = 5000;

impl Story {
    /// A daemon starts; its state file names no opencode.
    fn new() -> Story {
        let mut actions = Vec::new();
        let policy = Policy::new(Limits::STANDARD, false, &mut actions);
        Story { policy, now: Instant::now(), actions, events: 0 }
    }

    /// A daemon starts; its state file names an opencode.
    fn adopting() -> Story {
        let mut story = Story::new();
        story.policy = Policy::new(Limits::STANDARD, true, &mut story.actions);
        story
    }

    /// The recorded opencode is found; it was started `age` ago.
    fn adopted(&mut self, age: Duration) -> &mut Story {
        let (job, found) = (self.job(), Some(Checked { lifecycle: LIFECYCLE, age }));
        self.happens(Event::Adopted { job, found })
    }

    fn happens(&mut self, event: Event) -> &mut Story {
        self.events += 1;
        assert!(self.events < ENDLESS, "the policy makes no progress");
        self.actions.clear();
        self.policy.handle(event, self.now, &mut self.actions);
        self
    }

    fn job(&self) -> u64 {
        self.policy.job
    }

    /// A process is launched.
    fn launched(&mut self) -> &mut Story {
        let job = self.job();
        let checked = Checked { lifecycle: LIFECYCLE, age: Duration::ZERO };
        self.happens(Event::VersionKnown { job, result: Ok(checked) });
        let job = self.job();
        self.happens(Event::Launched { job, result: Ok(Launched::Running) })
    }

    fn probed(&mut self, answer: Answer, cpu: Duration, log: u64) -> &mut Story {
        let probe = Probe { answer, cpu: Some(cpu), log, heard: false, memory: None };
        let generation = self.policy.generation;
        self.happens(Event::Probed { generation, probe })
    }

    fn ready(&mut self) -> &mut Story {
        self.launched().probed(Answer::Healthy, Duration::ZERO, 0)
    }

    fn exits(&mut self) -> &mut Story {
        self.ended(End { how: "ended".to_owned(), ..End::default() })
    }

    fn ended(&mut self, end: End) -> &mut Story {
        let generation = self.policy.generation;
        self.happens(Event::Exited { generation });
        let job = self.job();
        self.happens(Event::Reaped { job, end })
    }

    fn did(&self, what: &str) -> bool {
        self.actions.iter().any(|action| format!("{action:?}").starts_with(what))
    }

    fn later(&mut self, passed: Duration) -> &mut Story {
        self.now += passed;
        self
    }

    /// The time limit of the probe that the last event requested.
    fn probe_limit(&self) -> Option<Duration> {
        self.actions.iter().find_map(|action| match action {
            Action::Probe { limit, .. } => Some(*limit),
            _ => None,
        })
    }

    /// Advances the time to the next probe and returns its time limit.
    fn next_probe(&mut self) -> Duration {
        self.now = self.policy.next_deadline().expect("a probe is due");
        self.happens(Event::Timer).probe_limit().expect("a probe")
    }

    /// Gives each probe this answer at its time limit, with this processor use, until the policy ends the
    /// process. Returns how long that took; `None` when it did not happen within `limit`. With `prints`, the
    /// log grows.
    fn time_until_ended(
        &mut self,
        limit: Duration,
        answer: impl Fn() -> Answer,
        part_of_a_core: f64,
        prints: bool,
    ) -> Option<Duration> {
        let begun = self.now;
        while self.now < begun + limit {
            self.now = self.policy.next_deadline().expect("a deadline").max(self.now);
            self.happens(Event::Timer);
            if let (Some(limit), false) = (self.probe_limit(), self.did("Signal")) {
                self.now += limit;
                let passed = self.now - begun;
                let log = if prints { passed.as_secs() } else { 0 };
                self.probed(answer(), passed.mul_f64(part_of_a_core), log);
            }
            if self.did("Signal") {
                return Some(self.now - begun);
            }
        }
        None
    }
}

fn silent() -> Answer {
    Answer::Silent(Error::OpencodeTimeout("did not answer"))
}

const MINUTE: Duration = Duration::from_secs(60);

#[track_caller]
fn check_between(found: Option<Duration>, from: Duration, to: Duration) {
    assert!(found.is_some_and(|found| (from..=to).contains(&found)), "{found:?}");
}

#[test]
fn idle_hang_is_ended_after_one_minute_and_busy_hang_after_ten() {
    for (part_of_a_core, limit) in [(0.0, MINUTE), (0.05, MINUTE), (0.2, 10 * MINUTE), (1.5, 10 * MINUTE)] {
        let mut story = Story::new();
        let ended = story.ready().time_until_ended(20 * MINUTE, silent, part_of_a_core, false);
        check_between(ended, limit, limit + Duration::from_secs(16));
    }
}

#[test]
fn sign_of_life_restarts_the_minute() {
    let mut story = Story::new();
    assert_eq!(story.ready().time_until_ended(50 * Duration::from_secs(1), silent, 0.0, false), None);
    story.probed(Answer::Healthy, Duration::ZERO, 0);
    assert_eq!(story.time_until_ended(50 * Duration::from_secs(1), silent, 0.0, false), None);
    // A message on the event stream is a sign of life too.
    let generation = story.policy.generation;
    let probe = Probe { answer: silent(), cpu: None, log: 0, heard: true, memory: None };
    story.happens(Event::Probed { generation, probe });
    assert_eq!(story.time_until_ended(50 * Duration::from_secs(1), silent, 0.0, false), None);
}

#[test]
fn unsent_probe_does_not_count_as_silence() {
    let mut story = Story::new();
    let not_sent = || Answer::NotSent(Error::Overloaded("connections"));
    assert_eq!(story.ready().time_until_ended(60 * MINUTE, not_sent, 0.0, false), None);
}

#[test]
fn start_that_could_not_be_checked_is_not_stuck() {
    let not_sent = || Answer::NotSent(Error::Overloaded("connections"));
    let ended = Story::new().launched().time_until_ended(60 * MINUTE, not_sent, 0.0, false);
    check_between(ended, 10 * MINUTE, 10 * MINUTE + Duration::from_secs(6));
}

#[test]
fn probes_of_a_start_are_frequent_and_short_at_first() {
    let mut story = Story::new();
    story.launched();
    let begun = story.now;
    let ms = Duration::from_millis;
    // Nothing listens: the pause grows with the age of the start.
    for (waited, pause) in [(15, 15), (900, 15), (32_000, 500), (64_000, 1000), (300_000, 1000)] {
        story.next_probe();
        story.now = begun + ms(waited);
        story.probed(Answer::NotListening, ms(waited), 0);
        assert_eq!(story.policy.next_deadline().map(|due| due - story.now), Some(ms(pause)), "{waited} ms");
    }
    // It listens and does not answer yet: each probe gets more time.
    story.next_probe();
    story.probed(silent(), ms(300_000), 0);
    let listens = story.now;
    for (after, limit) in [(2000, 550), (4000, 1050), (8000, 2050), (20_000, 5000), (40_000, 5000)] {
        story.now = listens + ms(after);
        let used = story.now - begun;
        assert_eq!(story.happens(Event::Timer).probe_limit(), Some(ms(limit)), "{after} ms");
        story.probed(silent(), used, 0);
    }
}

#[test]
fn events_are_counted_and_published() {
    let mut story = Story::new();
    assert!(story.launched().did("Watch") && story.did("Publish(Starting)"));
    assert!(story.probed(Answer::Healthy, Duration::ZERO, 0).did("Publish(Ready { adopted: false })"));
    let counts = |story: &Story| (story.policy.generation(), story.policy.restarts(), story.policy.checks());
    assert_eq!(counts(&story), (1, 0, 0));
    for checks in 1..=3 {
        story.next_probe();
        story.probed(Answer::Healthy, Duration::ZERO, 0);
        assert_eq!(counts(&story), (1, 0, checks));
    }
    assert!(story.policy.last_error().is_none());
    for restarts in 1..=2 {
        story.exits();
        assert_eq!(story.policy.last_error().map(|error| &*error.code), Some("opencode_unavailable"));
        story.now = story.policy.next_deadline().unwrap_or(story.now);
        story.happens(Event::Timer);
        story.launched().probed(Answer::Healthy, Duration::ZERO, 0);
        assert_eq!(counts(&story), (1 + restarts, restarts, 3));
        assert!(story.policy.last_error().is_none() && !story.policy.is_stopping());
    }
    story.happens(Event::Stop { scope: StopScope::DaemonOnly });
    assert!(story.policy.is_stopping() && story.policy.is_stopped());

    let mut story = Story::adopting();
    story.adopted(MINUTE).next_probe();
    assert!(story.probed(Answer::Healthy, Duration::ZERO, 0).did("Publish(Ready { adopted: true })"));
    assert_eq!((counts(&story), story.policy.failures()), ((1, 0, 0), 0));
}

#[test]
fn answer_to_an_earlier_job_is_dropped() {
    let mut story = Story::new();
    story.ready().exceed_memory();
    let earlier = story.job();
    // The disposal exceeds its limit, and the next opencode is ready before the answer arrives.
    story.later(Duration::from_secs(3)).happens(Event::Timer);
    story.exits().ready().exceed_memory();
    assert_ne!(story.job(), earlier);
    assert!(story.happens(Event::Disposed { job: earlier }).actions.is_empty());
    let job = story.job();
    assert!(story.happens(Event::Disposed { job }).did("Signal"));
}

#[test]
fn suspended_time_does_not_count_as_silence() {
    let mut story = Story::new();
    story.ready().later(Duration::from_secs(10)).happens(Event::Timer);
    // The machine sleeps for hours with a health call under way.
    story.later(300 * MINUTE).probed(silent(), Duration::ZERO, 0);
    assert!(!story.did("Signal"));
    check_between(story.time_until_ended(20 * MINUTE, silent, 0.0, false), Duration::from_secs(40), 2 * MINUTE);
}

#[test]
fn suspended_time_does_not_count_during_an_adoption() {
    let mut story = Story::adopting();
    story.adopted(60 * MINUTE).next_probe();
    // The machine sleeps for hours with a probe under way.
    story.later(300 * MINUTE).probed(silent(), Duration::ZERO, 0);
    let woke = story.now;
    while !story.did("Signal") {
        story.later(Duration::from_secs(1)).happens(Event::Timer);
        if story.probe_limit().is_some() {
            story.probed(silent(), Duration::ZERO, 0);
        }
    }
    check_between(Some(story.now - woke), Duration::from_secs(55), MINUTE);
}

#[test]
fn start_has_one_minute_or_ten_while_it_makes_progress() {
    for (part_of_a_core, prints, limit) in
        [(0.0, false, MINUTE), (0.001, false, MINUTE), (0.1, false, 10 * MINUTE), (0.0, true, 10 * MINUTE)]
    {
        for answer in [silent, || Answer::NotListening] {
            let mut story = Story::new();
            let ended = story.launched().time_until_ended(20 * MINUTE, answer, part_of_a_core, prints);
            check_between(ended, limit, limit + Duration::from_secs(15));
        }
    }
}

#[test]
fn adopted_opencode_gets_the_same_time() {
    for (part_of_a_core, limit) in [(0.0, MINUTE), (0.2, 10 * MINUTE)] {
        let mut story = Story::adopting();
        let ended = story.adopted(60 * MINUTE).time_until_ended(20 * MINUTE, silent, part_of_a_core, false);
        check_between(ended, limit, limit + Duration::from_secs(8));
    }
}

#[test]
fn six_failures_in_two_minutes_are_too_many() {
    let mut story = Story::new();
    let mut starts = 1;
    while story.launched().exits().policy.phase() != PhaseName::Failed {
        starts += 1;
        while !story.did("AskVersion") {
            story.now = story.policy.next_deadline().unwrap();
            story.happens(Event::Timer);
        }
    }
    assert_eq!(starts, 6);
    assert_eq!(story.policy.next_deadline(), None, "it stays down");

    // A request asks for one attempt more.
    assert!(story.happens(Event::Need).did("AskVersion"));
    story.launched().exits();
    assert_eq!((story.policy.phase(), story.policy.failures()), (PhaseName::Failed, 2));
}

#[test]
fn taken_port_is_changed_ten_times_without_a_failure() {
    let taken = || End { how: "ended".to_owned(), port_taken: true, ..End::default() };
    let mut story = Story::new();
    for _ in 0..2 {
        for _ in 0..10 {
            assert!(story.launched().ended(taken()).did("AskVersion"));
            assert!(!story.did("Log"), "{:?}", story.actions);
        }
        // A launch that gets its port resets the count.
        story.ready();
        // A ready process had its port, so its end is a failure even when the port is taken now.
        story.ended(taken());
        assert_eq!(story.policy.last_error().map(|error| &*error.code), Some("opencode_unavailable"));
        story.now = story.policy.next_deadline().unwrap_or(story.now);
        story.happens(Event::Timer);
    }
    for _ in 0..10 {
        story.launched().ended(taken());
    }
    story.launched().ended(taken());
    assert_eq!(story.policy.last_error().map(|error| &*error.code), Some("opencode_start_failed"));
}

#[test]
fn failures_are_forgotten_after_two_minutes() {
    for (apart, phase) in [(24_000, PhaseName::Failed), (24_001, PhaseName::Waiting)] {
        let mut story = Story::new();
        let begun = story.now;
        for n in 0..6 {
            story.now = begun + Duration::from_millis(apart) * n;
            story.happens(Event::Timer);
            story.launched().exits();
        }
        assert_eq!(story.policy.phase(), phase, "six failures, {apart} ms apart");
    }
}

#[test]
fn taken_requested_port_is_final_only_at_the_first_start() {
    let in_use = || Err(Error::PortInUse { port: 1, option: "--opencode-port" });
    let mut story = Story::new();
    let job = story.job();
    story.happens(Event::VersionKnown { job, result: in_use() });
    assert_eq!(story.policy.phase(), PhaseName::Failed);

    let mut story = Story::new();
    story.ready().exits();
    let job = story.job();
    story.happens(Event::VersionKnown { job, result: in_use() });
    assert_eq!(story.policy.phase(), PhaseName::Waiting);
}

#[test]
fn start_that_failed_without_a_process_counts_no_restart() {
    let mut story = Story::new();
    let job = story.job();
    story.happens(Event::VersionKnown { job, result: Err(Error::OpencodeStartFailed(String::new())) });
    assert_eq!(story.ready().policy.restarts(), 0);
}

#[test]
fn backoff_doubles_and_health_resets_it() {
    let mut story = Story::new();
    let mut pauses = Vec::new();
    for _ in 0..12 {
        // Too rare to give opencode up.
        story.ready().later(Duration::from_secs(25)).exits();
        let due = story.policy.next_deadline().filter(|_| !story.did("AskVersion"));
        pauses.push(due.map_or(0, |due| (due - story.now).as_millis()));
        if let Some(due) = due {
            story.now = due;
            story.happens(Event::Timer);
        }
    }
    assert_eq!(pauses, [0, 250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000, 30_000]);
    story.ready().later(Duration::from_secs(30)).exits();
    assert!(story.did("AskVersion"), "healthy for thirty seconds: the next failure starts a fresh backoff");
}

#[test]
fn own_resource_shortage_is_not_a_failure() {
    let mut story = Story::new();
    for _ in 0..100 {
        let job = story.job();
        story.happens(Event::VersionKnown { job, result: Err(Error::Overloaded("processes")) });
        story.now = story.policy.next_deadline().expect("a pause");
        assert!(story.happens(Event::Timer).did("AskVersion"));
    }
    assert_eq!(story.policy.failures(), 0);
}

#[test]
fn stop_is_orderly_and_bounded() {
    let mut story = Story::new();
    story.ready();
    let begun = story.now;
    assert!(story.happens(Event::Stop { scope: StopScope::OwnOpencode }).did("Dispose"));
    let mut signals = Vec::new();
    while !story.policy.is_stopped() {
        story.now = story.policy.next_deadline().expect("a deadline of the stop");
        story.happens(Event::Timer);
        let at = (story.now - begun).as_millis();
        signals.extend(story.actions.iter().filter_map(|action| match action {
            Action::Signal(signal) => Some((at, *signal)),
            _ => None,
        }));
    }
    let term = |at| (at, Signal::TERM);
    let expected = [term(2500), term(3500), term(4500), term(5500), term(6500), (7500, Signal::KILL)];
    assert_eq!(signals, expected);
    assert!(story.did("Release"), "a process that survives KILL is left alone");
}

#[test]
fn stop_is_bounded_whatever_hangs() {
    let mut hangs = 0;
    for mut story in table::phases() {
        story.happens(Event::Stop { scope: StopScope::OwnOpencode });
        let asked = story.now;
        // No job is ever answered.
        while !story.policy.is_stopped() {
            story.now = story.policy.next_deadline().expect("a deadline of the stop");
            story.happens(Event::Timer);
        }
        if story.now == asked + Limits::STANDARD.stop {
            hangs += 1;
            assert!(story.did("Log(OpencodeUnavailable") && story.did("Release"), "{:?}", story.actions);
        }
        assert!(story.now <= asked + Limits::STANDARD.stop);
        // The end is reported once.
        assert_eq!(story.policy.next_deadline(), None);
        assert!(story.happens(Event::Timer).actions.is_empty() && story.policy.is_stopped());
    }
    assert_eq!(hangs, 4, "adopting, checking, launching and burying wait for an answer");
}

#[test]
fn early_timer_changes_nothing() {
    let mut checked = 0;
    for mut story in table::phases() {
        let Some(due) = story.policy.next_deadline().filter(|due| *due > story.now) else { continue };
        story.now = due - Duration::from_millis(1);
        let before = format!("{:?}", story.policy.phase);
        story.happens(Event::Timer);
        assert!(story.actions.is_empty(), "{before}: {:?}", story.actions);
        assert_eq!(format!("{:?}", story.policy.phase), before);
        checked += 1;
    }
    assert_eq!(checked, 7, "starting, ready, disposing, terminating, killed, waiting and absent have a time");
}

#[test]
fn only_a_suspicion_about_this_opencode_hastens_the_next_probe() {
    let mut story = Story::new();
    story.ready().exits().ready();
    let due = story.policy.next_deadline();
    story.later(Duration::from_secs(1)).happens(Event::Suspect { generation: 1 });
    assert_eq!(story.policy.next_deadline(), due);
    story.happens(Event::Suspect { generation: 2 });
    assert_eq!(story.policy.next_deadline(), Some(story.now));
    assert!(story.happens(Event::Timer).did("Probe"));
}

#[test]
fn final_stop_wins_over_a_stop_that_keeps_opencode() {
    // In Launching and Adopting no process exists yet: the stops apply once it does.
    for adopts in [false, true] {
        for (stops, ends) in [
            (&[false][..], true),
            (&[true], false),
            (&[false, true], true),
            (&[true, false], true),
            (&[true, true], false),
        ] {
            let mut story = if adopts { Story::adopting() } else { Story::new() };
            if !adopts {
                let (job, result) = (story.job(), Ok(Checked { lifecycle: LIFECYCLE, age: Duration::ZERO }));
                story.happens(Event::VersionKnown { job, result });
            }
            for keeps in stops {
                story.happens(Event::Stop {
                    scope: if *keeps { StopScope::DaemonOnly } else { StopScope::OwnOpencode },
                });
            }
            let job = story.job();
            match adopts {
                true => story.adopted(MINUTE),
                false => story.happens(Event::Launched { job, result: Ok(Launched::Running) }),
            };
            assert_eq!(story.did("Release"), !ends, "{adopts} {stops:?}");
            assert_eq!(story.did("Dispose") || story.did("Signal"), ends, "{adopts} {stops:?}");
        }
    }
}

#[test]
fn line_without_disposal_has_its_own_kill_time() {
    let mut story = Story::new();
    story.ready();
    story.policy.lifecycle = Lifecycle { disposes: false, kill_after: Duration::from_secs(15), is_service: false };
    let begun = story.now;
    assert!(story.happens(Event::Stop { scope: StopScope::OwnOpencode }).did("Signal"));
    while !story.did("Signal(\"Signal::KILL\")") {
        story.now = story.policy.next_deadline().unwrap();
        story.happens(Event::Timer);
    }
    assert_eq!(story.now - begun, Duration::from_secs(15));
}

#[test]
fn oversized_opencode_is_recycled_after_its_sessions() {
    let mut story = Story::new();
    story.ready();
    let weighed = |story: &mut Story, exceeds, busy| {
        story.later(Duration::from_secs(10)).happens(Event::Timer);
        let memory = Some(Memory { exceeds, busy });
        let probe = Probe { answer: Answer::Healthy, cpu: None, log: 0, heard: false, memory };
        let generation = story.policy.generation;
        story.happens(Event::Probed { generation, probe });
    };
    weighed(&mut story, true, true);
    assert!(story.did("Publish(TooLarge { recycled: false })"));
    weighed(&mut story, true, true);
    assert!(story.actions.is_empty(), "reported once");
    weighed(&mut story, true, false);
    assert!(story.did("Publish(TooLarge { recycled: true })") && story.policy.phase() == PhaseName::Stopping);
    let job = story.job();
    story.happens(Event::Disposed { job });
    story.exits();
    assert!(story.did("AskVersion"));
    assert_eq!(story.policy.restarts(), 0, "nothing has failed");
}

// --- The user's own service ---

impl Story {
    /// A daemon that shares the user's service, after a search with this outcome.
    fn sharing(launched: Launched) -> Story {
        let mut story = Story::new();
        story.searched(launched);
        story
    }

    /// The version check and the search for the service are over.
    fn searched(&mut self, launched: Launched) -> &mut Story {
        if matches!(self.policy.phase, Phase::Checking) {
            let job = self.job();
            self.happens(Event::VersionKnown { job, result: Ok(Checked { lifecycle: SERVICE, age: Duration::ZERO }) });
        }
        let job = self.job();
        self.happens(Event::Launched { job, result: Ok(launched) })
    }

    /// A daemon whose service is ready.
    fn serving() -> Story {
        let mut story = Story::sharing(Launched::Running);
        story.probed(Answer::Healthy, Duration::ZERO, 0);
        assert_eq!(story.policy.phase(), PhaseName::Ready);
        story
    }

    fn due(&mut self) -> &mut Story {
        self.now = self.policy.next_deadline().expect("a deadline");
        self.happens(Event::Timer)
    }
}

#[test]
fn service_is_never_signalled() {
    let silence = |story: &mut Story, answer: fn() -> Answer| {
        while !story.did("CommandService") {
            assert!(!story.did("Signal"), "{:?}", story.actions);
            story.due();
            if story.did("Probe") {
                story.probed(answer(), Duration::ZERO, 0);
            }
        }
        assert!(story.did("CommandService { job: 3, verb: Restart }"), "{:?}", story.actions);
        let job = story.job();
        assert!(story.happens(Event::Reaped { job, end: End::default() }).did("Publish(Exited"));
    };
    // Its own command restarts a service that hangs or no longer listens,
    silence(&mut Story::serving(), silent);
    silence(&mut Story::serving(), || Answer::NotListening);
    // a service that never gets ready,
    silence(&mut Story::sharing(Launched::Running), silent);
    // and a service that uses too much memory.
    let mut story = Story::serving();
    story.exceed_memory();
    assert!(
        story.did("Publish(TooLarge")
            && story.actions.iter().any(|action| matches!(action, Action::CommandService { .. }))
    );
    // A service that refuses its own password may still serve other clients: it is left alone.
    let mut story = Story::sharing(Launched::Running);
    assert!(story.probed(Answer::Refused(Error::OpencodeAuthFailed(1)), Duration::ZERO, 0).did("Reap"));
    let job = story.job();
    story.happens(Event::Reaped { job, end: End::default() });
    assert_eq!(story.policy.phase(), PhaseName::Failed);
}

#[test]
fn stop_leaves_the_service_unless_asked_to_end_it() {
    for scope in [StopScope::DaemonOnly, StopScope::OwnOpencode] {
        let mut story = Story::serving();
        assert!(story.happens(Event::Stop { scope }).did("Release"));
        assert!(story.policy.is_stopped());
        // In the middle of a start, the stop interrupts the command.
        let mut story = Story::sharing(Launched::Absent);
        story.happens(Event::Need);
        let job = story.job();
        let checked = Checked { lifecycle: SERVICE, age: Duration::ZERO };
        story.happens(Event::VersionKnown { job, result: Ok(checked) });
        assert!(story.happens(Event::Stop { scope }).did("Cancel"));
        assert!(story.searched(Launched::Running).did("Release"));
    }
    let mut story = Story::serving();
    assert!(story.happens(Event::Stop { scope: StopScope::Service }).did("CommandService { job: 3, verb: Stop }"));
    let job = story.job();
    assert!(story.happens(Event::Reaped { job, end: End::default() }).policy.is_stopped());
}

#[test]
fn service_starts_only_when_a_request_needs_it() {
    let mut story = Story::sharing(Launched::Absent);
    let mut pauses = Vec::new();
    for _ in 0..8 {
        assert_eq!(story.policy.phase(), PhaseName::Waiting);
        pauses.push((story.policy.next_deadline().unwrap() - story.now).as_millis());
        assert!(
            story.due().did("Launch { job: ") && story.did(&format!("Launch {{ job: {}, start: false", story.job()))
        );
        assert_eq!(story.policy.phase(), PhaseName::Waiting, "looking for the service is not a start");
        story.searched(Launched::Absent);
    }
    assert_eq!(pauses, [250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
    // A request arrives while the daemon looks for the service.
    story.due().happens(Event::Need);
    assert!(story.searched(Launched::Absent).did("AskVersion"));
    let job = story.job();
    story.happens(Event::VersionKnown { job, result: Ok(Checked { lifecycle: SERVICE, age: Duration::ZERO }) });
    assert!(story.did(&format!("Launch {{ job: {}, start: true", story.job())));
    story.searched(Launched::Running).probed(Answer::Healthy, Duration::ZERO, 0);

    // The user may end the service any number of times: the daemon looks for it and never gives up.
    for _ in 0..20 {
        story.exits();
        if !story.did("AskVersion") {
            story.due();
        }
        let job = story.job();
        story.happens(Event::VersionKnown { job, result: Ok(Checked { lifecycle: SERVICE, age: Duration::ZERO }) });
        assert!(story.did(&format!("Launch {{ job: {}, start: false", story.job())), "{:?}", story.actions);
        story.searched(Launched::Running).probed(Answer::Healthy, Duration::ZERO, 0);
        assert_eq!(story.policy.phase(), PhaseName::Ready);
    }
    // A request got no answer because the service had ended.
    let generation = story.policy.generation;
    story.later(MINUTE).happens(Event::Suspect { generation });
    story.exits();
    let job = story.job();
    story.happens(Event::VersionKnown { job, result: Ok(Checked { lifecycle: SERVICE, age: Duration::ZERO }) });
    assert!(story.did(&format!("Launch {{ job: {}, start: true", story.job())));
}
