//! Holds the table of phases and events in docs/supervisor.md to the code.

use std::fmt::Write as _;

use super::*;

/// The file that has the table.
const TABLE: &str = "docs/supervisor.md";

/// A policy in each phase.
pub(super) fn phases() -> Vec<Story> {
    let stories: [fn(&mut Story); 14] = [
        |story| *story = Story::adopting(),
        |_| {},
        |story| {
            let job = story.job();
            let result = Ok(Checked { lifecycle: LIFECYCLE, age: Duration::ZERO });
            story.happens(Event::VersionKnown { job, result });
        },
        |story| {
            story.launched();
        },
        |story| {
            story.ready();
        },
        |story| {
            story.ready().exceed_memory();
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
            story.searched(Launched::Absent);
        },
        |story| {
            let job = story.job();
            story.happens(Event::VersionKnown { job, result: Err(Error::OpencodeNotFound(String::new())) });
        },
        |story| {
            story.happens(Event::Stop { scope: StopScope::OwnOpencode });
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
    pub(super) fn exceed_memory(&mut self) {
        let memory = Some(Memory { exceeds: true, busy: false });
        let probe = Probe { answer: Answer::Healthy, cpu: None, log: 0, heard: false, memory };
        let generation = self.policy.generation;
        self.happens(Event::Probed { generation, probe });
    }

    /// The name of the phase.
    pub(super) fn phase(&self) -> String {
        name(&self.policy.phase)
    }
}

/// The name of a value's variant.
pub(super) fn name(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}").split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
}

/// An event of each kind, about the current job or process.
pub(super) fn events(policy: &Policy) -> Vec<(&'static str, Event)> {
    let (job, generation) = (policy.job, policy.generation);
    let checked = || Checked { lifecycle: LIFECYCLE, age: Duration::ZERO };
    let probe = |answer| Probe { answer, cpu: None, log: 0, heard: false, memory: None };
    vec![
        ("Need", Event::Need),
        ("Suspect", Event::Suspect { generation }),
        ("Stop", Event::Stop { scope: StopScope::OwnOpencode }),
        ("Stop, keeping opencode", Event::Stop { scope: StopScope::DaemonOnly }),
        ("Adopted, found", Event::Adopted { job, found: Some(checked()) }),
        ("Adopted, nothing", Event::Adopted { job, found: None }),
        ("VersionKnown", Event::VersionKnown { job, result: Ok(checked()) }),
        ("VersionKnown, failed", Event::VersionKnown { job, result: Err(Error::OpencodeStartFailed(String::new())) }),
        ("Launched", Event::Launched { job, result: Ok(Launched::Running) }),
        ("Launched, failed", Event::Launched { job, result: Err(Error::OpencodeStartFailed(String::new())) }),
        ("Probed, Healthy", Event::Probed { generation, probe: probe(Answer::Healthy) }),
        ("Probed, NotListening", Event::Probed { generation, probe: probe(Answer::NotListening) }),
        ("Probed, Silent", Event::Probed { generation, probe: probe(silent()) }),
        ("Probed, Refused", Event::Probed { generation, probe: probe(Answer::Refused(Error::OpencodeAuthFailed(1))) }),
        ("Probed, NotSent", Event::Probed { generation, probe: probe(Answer::NotSent(Error::Overloaded(""))) }),
        ("Disposed", Event::Disposed { job }),
        ("Exited", Event::Exited { generation }),
        ("Reaped", Event::Reaped { job, end: End::default() }),
        ("Timer, when due", Event::Timer),
    ]
}

/// The effect of each event in each phase as a Markdown table, without events that have none.
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
                    Action::Publish(notice) => format!("Publish {}", name(notice)),
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
fn table_matches_the_documentation() {
    let table = table();
    println!("{table}");
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(TABLE);
    if std::env::var_os("OPENWORK_WRITE_TABLE").is_some() {
        let text = std::fs::read_to_string(&path).unwrap();
        let (head, _) = text.split_once("| phase |").unwrap();
        std::fs::write(&path, format!("{head}{table}")).unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.ends_with(&table), "OPENWORK_WRITE_TABLE=1 cargo test table_matches writes it into {TABLE}");
}
