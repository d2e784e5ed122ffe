//! What takes minutes, told in virtual time; and the table of phases and events.

use std::fmt::Write as _;

use super::*;

const MANNERS: Manners = Manners { disposes: true, kill_after: Duration::from_secs(5) };

/// A policy with its time, and what it did last.
struct Story {
    policy: Policy,
    now: Instant,
    actions: Vec<Action>,
}

impl Story {
    /// A daemon starts and finds nothing of an earlier one.
    fn new() -> Story {
        let mut actions = Vec::new();
        let policy = Policy::new(Limits::STANDARD, false, &mut actions);
        Story { policy, now: Instant::now(), actions }
    }

    fn happens(&mut self, event: Event) -> &mut Story {
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
        let checked = Checked { manners: MANNERS, age: Duration::ZERO };
        self.happens(Event::VersionKnown { job, result: Ok(checked) });
        let job = self.job();
        self.happens(Event::Launched { job, result: Ok(()) })
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
        let generation = self.policy.generation;
        self.happens(Event::Exited { generation });
        let job = self.job();
        self.happens(Event::Buried { job, end: End { how: "ended".to_owned(), ..End::default() } })
    }

    fn did(&self, what: &str) -> bool {
        self.actions.iter().any(|action| format!("{action:?}").starts_with(what))
    }

    fn later(&mut self, passed: Duration) -> &mut Story {
        self.now += passed;
        self
    }

    /// Health calls are answered so, with so much use of the processor, until the process is told to
    /// end: how long that took; nothing when the time was over before. It prints every `prints`.
    fn until_it_is_ended(
        &mut self,
        limit: Duration,
        answer: impl Fn() -> Answer,
        part_of_a_core: f64,
        prints: bool,
    ) -> Option<Duration> {
        let begun = self.now;
        while self.now < begun + limit {
            self.now = self.policy.next_deadline().expect("something to wait for").max(self.now);
            self.happens(Event::Timer);
            if !self.did("Signal") && self.did("Probe") {
                self.now += Duration::from_millis(100);
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
fn a_hang_is_ended_after_a_minute_and_a_busy_one_after_ten() {
    for (part_of_a_core, limit) in [(0.0, MINUTE), (0.05, MINUTE), (0.2, 10 * MINUTE), (1.5, 10 * MINUTE)] {
        let mut story = Story::new();
        let ended = story.ready().until_it_is_ended(20 * MINUTE, silent, part_of_a_core, false);
        check_between(ended, limit, limit + Duration::from_secs(25));
    }
}

#[test]
fn a_sign_of_life_begins_the_minute_anew() {
    let mut story = Story::new();
    assert_eq!(story.ready().until_it_is_ended(50 * Duration::from_secs(1), silent, 0.0, false), None);
    story.probed(Answer::Healthy, Duration::ZERO, 0);
    assert_eq!(story.until_it_is_ended(50 * Duration::from_secs(1), silent, 0.0, false), None);
    // What its event stream says is one too.
    let generation = story.policy.generation;
    let probe = Probe { answer: silent(), cpu: None, log: 0, heard: true, memory: None };
    story.happens(Event::Probed { generation, probe });
    assert_eq!(story.until_it_is_ended(50 * Duration::from_secs(1), silent, 0.0, false), None);
}

#[test]
fn what_was_never_asked_is_not_silent() {
    let mut story = Story::new();
    let not_asked = || Answer::NotAsked(Error::Overloaded("connections"));
    assert_eq!(story.ready().until_it_is_ended(60 * MINUTE, not_asked, 0.0, false), None);
}

#[test]
fn time_in_which_the_daemon_was_stopped_does_not_count() {
    let mut story = Story::new();
    story.ready().later(Duration::from_secs(10)).happens(Event::Timer);
    // The machine sleeps for hours with a health call under way.
    story.later(300 * MINUTE).probed(silent(), Duration::ZERO, 0);
    assert!(!story.did("Signal"));
    check_between(story.until_it_is_ended(20 * MINUTE, silent, 0.0, false), Duration::from_secs(40), 2 * MINUTE);
}

#[test]
fn a_start_has_a_minute_and_ten_as_long_as_it_goes_on() {
    for (part_of_a_core, prints, limit) in
        [(0.0, false, MINUTE), (0.001, false, MINUTE), (0.1, false, 10 * MINUTE), (0.0, true, 10 * MINUTE)]
    {
        for answer in [silent, || Answer::Deaf] {
            let mut story = Story::new();
            let ended = story.launched().until_it_is_ended(20 * MINUTE, answer, part_of_a_core, prints);
            check_between(ended, limit, limit + Duration::from_secs(15));
        }
    }
}

#[test]
fn an_adopted_one_has_as_long_as_one_of_our_own() {
    for (part_of_a_core, limit) in [(0.0, MINUTE), (0.2, 10 * MINUTE)] {
        let mut story = Story::new();
        story.policy = Policy::new(Limits::STANDARD, true, &mut story.actions);
        let found = Some(Checked { manners: MANNERS, age: 60 * MINUTE });
        let job = story.job();
        story.happens(Event::Adopted { job, found });
        let ended = story.until_it_is_ended(20 * MINUTE, silent, part_of_a_core, false);
        check_between(ended, limit, limit + Duration::from_secs(25));
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
fn the_pause_doubles_and_health_forgives() {
    let mut story = Story::new();
    let mut pauses = Vec::new();
    for _ in 0..12 {
        // So seldom that it is not given up.
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
    assert!(story.did("AskVersion"), "thirty seconds of health, and the next failure is the first again");
}

#[test]
fn a_lack_of_ours_is_no_failure_of_opencode() {
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
fn a_stop_is_orderly_and_has_a_bound() {
    let mut story = Story::new();
    story.ready();
    let begun = story.now;
    assert!(story.happens(Event::Stop { keep_opencode: false }).did("Dispose"));
    let mut signals = Vec::new();
    while !story.policy.is_stopped() {
        story.now = story.policy.next_deadline().expect("a stop goes on");
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
    assert!(story.did("Release"), "what not even KILL has ended is left");
}

#[test]
fn a_stop_for_good_wins_over_one_that_keeps_opencode() {
    // Launching and Adopting: the process is not there yet, so both stops are remembered until it is.
    for adopts in [false, true] {
        for (stops, ends) in [
            (&[false][..], true),
            (&[true], false),
            (&[false, true], true),
            (&[true, false], true),
            (&[true, true], false),
        ] {
            let mut story = Story::new();
            if adopts {
                story.policy = Policy::new(Limits::STANDARD, true, &mut story.actions);
            } else {
                let (job, result) = (story.job(), Ok(Checked { manners: MANNERS, age: Duration::ZERO }));
                story.happens(Event::VersionKnown { job, result });
            }
            for keep_opencode in stops {
                story.happens(Event::Stop { keep_opencode: *keep_opencode });
            }
            let (job, found) = (story.job(), Checked { manners: MANNERS, age: MINUTE });
            match adopts {
                true => story.happens(Event::Adopted { job, found: Some(found) }),
                false => story.happens(Event::Launched { job, result: Ok(()) }),
            };
            assert_eq!(story.did("Release"), !ends, "{adopts} {stops:?}");
            assert_eq!(story.did("Dispose") || story.did("Signal"), ends, "{adopts} {stops:?}");
        }
    }
}

#[test]
fn a_line_without_disposal_has_its_own_time() {
    let mut story = Story::new();
    story.ready();
    story.policy.manners = Manners { disposes: false, kill_after: Duration::from_secs(15) };
    let begun = story.now;
    assert!(story.happens(Event::Stop { keep_opencode: false }).did("Signal"));
    while !story.did("Signal(\"Signal::KILL\")") {
        story.now = story.policy.next_deadline().unwrap();
        story.happens(Event::Timer);
    }
    assert_eq!(story.now - begun, Duration::from_secs(15));
}

#[test]
fn too_much_memory_waits_for_the_sessions() {
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
    assert!(story.did("Tell(TooLarge { recycled: false })"));
    weighed(&mut story, true, true);
    assert!(story.actions.is_empty(), "told once");
    weighed(&mut story, true, false);
    assert!(story.did("Tell(TooLarge { recycled: true })") && story.policy.phase() == PhaseName::Stopping);
    let job = story.job();
    story.happens(Event::Disposed { job });
    story.exits();
    assert!(story.did("AskVersion"));
    assert_eq!(story.policy.restarts(), 0, "nothing has failed");
}

// --- The table ---

/// Where the table stands.
const TABLE: &str = "docs/supervisor.md";

/// A policy in each phase.
fn phases() -> Vec<Story> {
    let stories: [fn(&mut Story); 13] = [
        |story| story.policy = Policy::new(Limits::STANDARD, true, &mut story.actions),
        |_| {},
        |story| {
            let job = story.job();
            let result = Ok(Checked { manners: MANNERS, age: Duration::ZERO });
            story.happens(Event::VersionKnown { job, result });
        },
        |story| {
            story.launched();
        },
        |story| {
            story.ready();
        },
        |story| {
            story.ready().weigh_for_the_table();
        },
        |story| {
            story.launched().probed(Answer::Refused(Error::OpencodeAuthFailed(1)), Duration::ZERO, 0);
        },
        |story| {
            story.launched().probed(Answer::Refused(Error::OpencodeAuthFailed(1)), Duration::ZERO, 0);
            story.later(Duration::from_secs(5)).happens(Event::Timer);
        },
        |story| {
            story.launched().probed(Answer::Refused(Error::OpencodeAuthFailed(1)), Duration::ZERO, 0);
            story.later(Duration::from_secs(5)).happens(Event::Timer);
            story.later(Duration::from_secs(2)).happens(Event::Timer);
        },
        |story| {
            story.launched().happens(Event::Exited { generation: 1 });
        },
        |story| {
            story.launched().exits().launched().exits();
        },
        |story| {
            let job = story.job();
            story.happens(Event::VersionKnown { job, result: Err(Error::OpencodeNotFound(String::new())) });
        },
        |story| {
            story.happens(Event::Stop { keep_opencode: false });
            let job = story.job();
            story.happens(Event::VersionKnown { job, result: Err(Error::Overloaded("")) });
        },
    ];
    let tell = |tell: fn(&mut Story)| {
        let mut story = Story::new();
        tell(&mut story);
        story
    };
    stories.map(tell).into_iter().collect()
}

impl Story {
    fn weigh_for_the_table(&mut self) {
        let memory = Some(Memory { exceeds: true, busy: false });
        let probe = Probe { answer: Answer::Healthy, cpu: None, log: 0, heard: false, memory };
        self.happens(Event::Probed { generation: 1, probe });
    }

    /// The name of the phase.
    fn phase(&self) -> String {
        name(&self.policy.phase)
    }
}

/// The first word of what is shown of a value.
fn name(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}").split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
}

/// An event of each kind, about the job or the process of now.
fn events(policy: &Policy) -> Vec<(&'static str, Event)> {
    let (job, generation) = (policy.job, policy.generation);
    let checked = || Checked { manners: MANNERS, age: Duration::ZERO };
    let probe = |answer| Probe { answer, cpu: None, log: 0, heard: false, memory: None };
    vec![
        ("Need", Event::Need),
        ("Suspect", Event::Suspect { generation }),
        ("Stop", Event::Stop { keep_opencode: false }),
        ("Stop, keeping opencode", Event::Stop { keep_opencode: true }),
        ("Adopted, found", Event::Adopted { job, found: Some(checked()) }),
        ("Adopted, nothing", Event::Adopted { job, found: None }),
        ("VersionKnown", Event::VersionKnown { job, result: Ok(checked()) }),
        ("VersionKnown, failed", Event::VersionKnown { job, result: Err(Error::OpencodeStartFailed(String::new())) }),
        ("Launched", Event::Launched { job, result: Ok(()) }),
        ("Launched, failed", Event::Launched { job, result: Err(Error::OpencodeStartFailed(String::new())) }),
        ("Probed, Healthy", Event::Probed { generation, probe: probe(Answer::Healthy) }),
        ("Probed, Deaf", Event::Probed { generation, probe: probe(Answer::Deaf) }),
        ("Probed, Silent", Event::Probed { generation, probe: probe(silent()) }),
        ("Probed, Refused", Event::Probed { generation, probe: probe(Answer::Refused(Error::OpencodeAuthFailed(1))) }),
        ("Probed, NotAsked", Event::Probed { generation, probe: probe(Answer::NotAsked(Error::Overloaded(""))) }),
        ("Disposed", Event::Disposed { job }),
        ("Exited", Event::Exited { generation }),
        ("Buried", Event::Buried { job, end: End::default() }),
        ("Timer, when due", Event::Timer),
    ]
}

/// What each event does in each phase, as a table; what changes nothing is left out.
fn table() -> String {
    let mut table = "| phase | event | next phase | actions |\n|---|---|---|---|\n".to_owned();
    for at in 0..phases().len() {
        for event in 0..events(&phases()[at].policy).len() {
            let mut story = phases().swap_remove(at);
            let before = story.phase();
            let (what, event) = events(&story.policy).swap_remove(event);
            if matches!(event, Event::Timer) {
                let Some(due) = story.policy.next_deadline() else { continue };
                story.now = due;
            }
            let untouched = format!("{:?}", story.policy.phase);
            story.happens(event);
            if story.actions.is_empty() && format!("{:?}", story.policy.phase) == untouched {
                continue;
            }
            let actions: Vec<_> = story
                .actions
                .iter()
                .map(|action| match action {
                    Action::Tell(news) => format!("Tell {}", name(news)),
                    Action::Signal(signal) => if *signal == Signal::TERM { "TERM" } else { "KILL" }.to_owned(),
                    other => name(other),
                })
                .collect();
            let _ = writeln!(table, "| {before} | {what} | {} | {} |", story.phase(), actions.join(", "));
        }
    }
    table
}

#[test]
fn the_table_is_in_the_documentation() {
    let table = table();
    println!("{table}");
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(TABLE);
    if std::env::var_os("OPENWORK_WRITE_TABLE").is_some() {
        let text = std::fs::read_to_string(&path).unwrap();
        let (head, _) = text.split_once("| phase |").unwrap();
        std::fs::write(&path, format!("{head}{table}")).unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.ends_with(&table), "OPENWORK_WRITE_TABLE=1 cargo test the_table writes it into {TABLE}");
}
