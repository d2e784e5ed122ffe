//! What the policy is told, and what it answers.

use std::time::Duration;

use rustix::process::Signal;

use crate::daemon::engine::{Manners, Verb};
use crate::error::{Error, ErrorBody, Result};

/// What is known of an opencode before it is started or adopted.
#[derive(Clone, Copy, Debug)]
pub struct Checked {
    /// How its line behaves.
    pub manners: Manners,
    /// How long ago it was started; nothing for one that is still to be launched.
    pub age: Duration,
}

/// What a look at the process found.
#[derive(Debug)]
pub enum Answer {
    /// It answered the health call within the limit.
    Healthy,
    /// Nothing of it listens.
    Deaf,
    /// It listens, and did not answer properly within the limit.
    Silent(Error),
    /// It does not take our password.
    Refused(Error),
    /// We ran out of a resource: the question was never sent.
    NotAsked(Error),
}

/// How much memory opencode takes with all that it has started.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// More than it may.
    pub exceeds: bool,
    /// A session is running.
    pub busy: bool,
}

/// A look at the process.
#[derive(Debug)]
pub struct Probe {
    /// What it answered.
    pub answer: Answer,
    /// Processor time of the process that listens, else of the leader; none when it cannot be read.
    pub cpu: Option<Duration>,
    /// The size of its log. Bytes.
    pub log: u64,
    /// Its event stream has said something since the last look.
    pub heard: bool,
    /// Its memory, where that is limited.
    pub memory: Option<Memory>,
}

/// How a process ended.
#[derive(Debug, Default)]
pub struct End {
    /// Its id.
    pub pid: u32,
    /// `ended with exit status: 3`.
    pub how: String,
    /// The last lines of its output.
    pub output: String,
    /// Somebody else listens where it should have.
    pub port_taken: bool,
}

/// What a stop of the daemon ends beside it. Of several wishes the widest wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ends {
    /// opencode keeps running, for the next daemon.
    Nothing,
    /// An opencode of our own; the user's own service stays.
    Ours,
    /// The user's own service too.
    Service,
}

/// What a launch has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launched {
    /// A process, which is on disk.
    Running,
    /// The user's service does not run, and was not to be started.
    Absent,
}

/// What happens.
#[derive(Debug)]
pub enum Event {
    /// Somebody needs opencode.
    Need,
    /// A call to this generation brought no answer.
    Suspect { generation: u64 },
    /// Stop for good.
    Stop { ends: Ends },
    /// The opencode of an earlier daemon was looked for.
    Adopted { job: u64, found: Option<Checked> },
    /// The binary was found and asked for its version.
    VersionKnown { job: u64, result: Result<Checked> },
    /// A process was started, or the user's service was looked for.
    Launched { job: u64, result: Result<Launched> },
    /// The process was looked at.
    Probed { generation: u64, probe: Probe },
    /// All instances are disposed, or that took too long.
    Disposed { job: u64 },
    /// The process has ended.
    Exited { generation: u64 },
    /// All that it left has ended too, the record is off the disk.
    Buried { job: u64, end: End },
    /// [`Policy::next_deadline`] has come.
    Timer,
}

/// What is to be done.
#[derive(Debug)]
pub enum Action {
    /// Look for the opencode of an earlier daemon; end what it left if it does not live.
    Adopt { job: u64 },
    /// Find the binary and ask for its version.
    AskVersion { job: u64, limit: Duration },
    /// Do not wait any longer for a version, or for a command of the user's service; the job is answered
    /// all the same.
    Cancel,
    /// Start a process, and write it down before it can do anything. The user's service is looked for, and
    /// started only when `start` says so.
    Launch { job: u64, start: bool },
    /// A process is there: have its end reported.
    Watch,
    /// Look at the process and ask for its health; whether it was ready before.
    Probe { limit: Duration, ready: bool },
    /// Dispose all instances.
    Dispose { job: u64, limit: Duration },
    /// Send this to the process and its group.
    Signal(Signal),
    /// End all that the process left, reap it, take the record off the disk.
    Bury { job: u64, cause: Cause },
    /// Have its own command do this with the user's service; answered by [`Event::Buried`].
    Order { job: u64, verb: Verb },
    /// Leave the process as it is, for the next daemon.
    Release,
    /// Tell whoever listens to events.
    Tell(News),
    /// For the log.
    Note(Error),
}

/// Why a process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// By itself, or by somebody else's signal.
    Itself,
    /// We have ended it, since it had failed.
    Failure,
    /// That was wanted.
    Wanted,
}

/// What is told of the current process.
#[derive(Debug)]
pub enum News {
    /// It was launched.
    Starting,
    /// It answers; and was adopted.
    Ready { adopted: bool },
    /// It has ended.
    Exited { how: String, pid: u32 },
    /// opencode stays down.
    Failed { error: ErrorBody },
    /// It takes too much memory, and is restarted now or, while sessions run, later.
    TooLarge { recycled: bool },
}
