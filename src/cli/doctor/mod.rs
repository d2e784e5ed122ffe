//! `openwork doctor`: looks at everything that can keep openwork from working, and says what to do.
//!
//! Invariants: the doctor changes nothing, not even the mode of a file, and starts nothing; opencode is not
//! even asked for its version, since that creates directories. Every check ends on its own: a daemon or a
//! disk that hangs is a finding, not a wait. A finding names variables of the environment, never values.
//!
//! ```text
//! files      data directory, state file, credentials, logs, directories of workspaces
//! processes  daemon, opencode, ports, environment, and other opencodes over the same data
//! service    the unit for systemd
//! ```

mod files;
mod processes;
mod service;

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::client::Client;
use super::output::{Output, clean, clean_lines, coloured};
use crate::args::Invocation;
use crate::error::{Error, Result};
use crate::options::Options;
use crate::paths::DataDir;
use crate::state::State;

/// The time limit for the daemon's answer: it answers within milliseconds, and a starting daemon listens
/// within a second.
const DAEMON_LIMIT: Duration = Duration::from_secs(3);
/// The column in which the messages begin, behind verdict and name.
const MESSAGE_COLUMN: usize = 22;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// Nothing to do.
    Ok,
    /// Works, but may surprise.
    Warning,
    /// Does not work, or soon will not.
    Wrong,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Wrong => "wrong",
        }
    }

    /// The escape sequence of its colour.
    fn colour(self) -> &'static str {
        match self {
            Verdict::Ok => "\x1b[32m",
            Verdict::Warning => "\x1b[33m",
            Verdict::Wrong => "\x1b[1;31m",
        }
    }
}

/// The result of a check.
#[derive(Debug, Serialize)]
struct Finding {
    /// The check.
    name: &'static str,
    verdict: Verdict,
    message: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

/// The findings so far.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, name: &'static str, message: impl Into<String>) {
        self.0.push(Finding { name, verdict: Verdict::Ok, message: message.into(), hint: None });
    }

    fn warning(&mut self, name: &'static str, message: impl Into<String>, hint: impl Into<String>) {
        self.0.push(Finding { name, verdict: Verdict::Warning, message: message.into(), hint: Some(hint.into()) });
    }

    fn wrong(&mut self, name: &'static str, message: impl Into<String>, hint: impl Into<String>) {
        self.0.push(Finding { name, verdict: Verdict::Wrong, message: message.into(), hint: Some(hint.into()) });
    }

    /// A failure of openwork's own, with its own hint.
    fn failed(&mut self, name: &'static str, e: &Error) {
        self.0.push(Finding { name, verdict: Verdict::Wrong, message: e.to_string(), hint: e.hint() });
    }

    /// Whether a check has found something of this kind.
    fn has(&self, name: &str, verdict: Verdict) -> bool {
        self.0.iter().any(|finding| finding.name == name && finding.verdict == verdict)
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.0.iter().filter(|finding| finding.verdict == verdict).count()
    }
}

/// What `doctor --json` prints.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    /// Whether nothing is wrong; warnings do not count.
    ok: bool,
    data_dir: String,
    checks: Vec<Finding>,
}

/// The input of the checks.
struct Patient<'a> {
    client: &'a Client,
    /// The options that this environment and command line give a daemon.
    options: &'a Options,
    /// The state file; empty if it cannot be read.
    state: State,
}

/// Looks at everything, and prints what was found.
///
/// # Errors
/// [`Error::Unhealthy`], with exit status 1, when something is wrong; the findings have been printed.
pub fn examine(invocation: &Invocation, out: &mut Output) -> Result<()> {
    let data_dir = DataDir::resolve(invocation.data_dir.as_deref(), invocation.xdg_data_home.as_deref())?;
    let deadline = Instant::now() + invocation.timeout;
    let client = Client { data_dir, deadline, autostart: None };
    let mut findings = Findings::default();
    program(&mut findings);
    files::data_directory(&mut findings, &client.data_dir);
    let is_readable = !findings.has(files::DATA, Verdict::Wrong);
    let state = if is_readable { files::contents(&mut findings, &client.data_dir) } else { State::default() };
    let patient = Patient { client: &client, options: &invocation.daemon, state };
    if is_readable {
        let running = processes::daemon(&mut findings, &patient, DAEMON_LIMIT);
        processes::ports(&mut findings, &patient, running.as_ref());
        processes::opencode(&mut findings, &patient, running.as_ref());
        processes::environment(&mut findings, &patient, running.as_ref());
        processes::others(&mut findings, &patient, running.as_ref());
        files::workspaces(&mut findings, &patient.state);
        service::unit(&mut findings, &client.data_dir, running.as_ref().map(|running| running.pid));
    }
    let ok = findings.count(Verdict::Wrong) == 0;
    let summary = summary(&findings);
    let report = Report { ok, data_dir: client.data_dir.path().to_string_lossy().into_owned(), checks: findings.0 };
    out.print(&report, |report| report.checks.iter().map(line).collect::<String>() + &summary)?;
    if ok { Ok(()) } else { Err(Error::Unhealthy) }
}

/// A finding for people.
fn line(finding: &Finding) -> String {
    let Finding { name, verdict, message, hint } = finding;
    let indent = " ".repeat(MESSAGE_COLUMN);
    let inner = |text: &str| clean_lines(text).replace('\n', &format!("\n{indent}"));
    let spaces = " ".repeat("warning".len() - verdict.name().len());
    let verdict = coloured(verdict.colour(), verdict.name());
    let mut text = format!("{verdict}{spaces}  {:<13}{}\n", clean(name), inner(message));
    if let Some(hint) = hint {
        text.push_str(&format!("{indent}{}\n", inner(hint)));
    }
    text
}

fn summary(findings: &Findings) -> String {
    match (findings.count(Verdict::Wrong), findings.count(Verdict::Warning)) {
        (0, 0) => "nothing is wrong\n".to_owned(),
        (0, 1) => "nothing is wrong; 1 warning\n".to_owned(),
        (0, warnings) => format!("nothing is wrong; {warnings} warnings\n"),
        (1, _) => "1 thing is wrong\n".to_owned(),
        (wrong, _) => format!("{wrong} things are wrong\n"),
    }
}

/// Checks this program, and the program that the name `openwork` starts.
fn program(findings: &mut Findings) {
    const NAME: &str = "openwork";
    let version = super::VERSION;
    let Ok(program) = std::env::current_exe() else {
        return findings.ok(NAME, version);
    };
    let message = format!("{version}, {}", program.display());
    let first = on_path("openwork");
    match first.and_then(|first| std::fs::canonicalize(first).ok()) {
        Some(first) if std::fs::canonicalize(&program).is_ok_and(|program| program != first) => {
            findings.warning(NAME, message, format!("`openwork` on the PATH is another program: {}", first.display()))
        }
        Some(_) | None => findings.ok(NAME, message),
    }
}

/// The first program of this name on the PATH.
fn on_path(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    let directories = std::env::split_paths(&path).filter(|directory| directory.is_absolute());
    directories.map(|directory| directory.join(name)).find(|candidate| Path::is_file(candidate))
}
