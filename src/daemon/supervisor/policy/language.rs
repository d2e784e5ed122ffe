//! The events that the policy handles, and the actions that it returns.

use std::time::Duration;

use rustix::process::Signal;

use crate::daemon::engine::{Lifecycle, Verb};
use crate::error::{Error, ErrorBody, Result};

/// Facts about an opencode before it is launched or adopted.
#[derive(Clone, Copy, Debug)]
pub struct Checked {
    /// How its line behaves.
    pub lifecycle: Lifecycle,
    /// The age of an adopted process; zero before a launch.
    pub age: Duration,
}

/// The outcome of a health call.
#[derive(Debug)]
pub enum Answer {
    /// The process answered the health call within the limit.
    Healthy,
    /// The process does not listen.
    NotListening,
    /// The process listens, but gave no valid answer within the limit.
    Silent(Error),
    /// The process rejects our password.
    Refused(Error),
    /// We ran out of a resource; the probe was never sent.
    NotSent(Error),
}

/// The memory of opencode with its descendants, against the limit.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// It exceeds the limit.
    pub exceeds: bool,
    /// A session is running.
    pub busy: bool,
}

/// The result of a probe.
#[derive(Debug)]
pub struct Probe {
    /// The outcome of the health call.
    pub answer: Answer,
    /// Processor time of the process that listens, else of the leader; none when it cannot be read.
    pub cpu: Option<Duration>,
    /// The size of opencode's log. Bytes.
    pub log: u64,
    /// The event stream carried a message since the last probe.
    pub heard: bool,
    /// Memory use, if it is limited.
    pub memory: Option<Memory>,
}

/// The end of a process.
#[derive(Debug, Default)]
pub struct End {
    /// The pid.
    pub pid: u32,
    /// `ended with exit status: 3`.
    pub how: String,
    /// The last lines of its output.
    pub output: String,
    /// Another process listens on its port.
    pub port_taken: bool,
}

/// Which opencode a stop of the daemon ends. Of several requests the widest wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StopScope {
    /// opencode keeps running, for the next daemon.
    DaemonOnly,
    /// Our own opencode; the user's own service keeps running.
    OwnOpencode,
    /// The user's own service too.
    Service,
}

/// The outcome of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launched {
    /// A process runs and is recorded.
    Running,
    /// The user's service does not run, and the job was not to start it.
    Absent,
}

/// An event for the policy.
#[derive(Debug)]
pub enum Event {
    /// A request needs opencode.
    Need,
    /// A call to this generation got no answer.
    Suspect { generation: u64 },
    /// Stop the daemon.
    Stop { scope: StopScope },
    /// The search for the opencode of an earlier daemon is over.
    Adopted { job: u64, found: Option<Checked> },
    /// The version check of the binary is over.
    VersionKnown { job: u64, result: Result<Checked> },
    /// The launch, or the search for the user's service, is over.
    Launched { job: u64, result: Result<Launched> },
    /// A probe is over.
    Probed { generation: u64, probe: Probe },
    /// opencode has disposed its instances, or did not in time.
    Disposed { job: u64 },
    /// The process has ended.
    Exited { generation: u64 },
    /// The descendants of the process have ended too; its record is removed.
    Reaped { job: u64, end: End },
    /// The time of [`Policy::next_deadline`] has come.
    Timer,
}

/// An action for the supervisor.
#[derive(Debug)]
pub enum Action {
    /// Find the opencode of an earlier daemon; if it has ended, end its descendants.
    Adopt { job: u64 },
    /// Find the binary and its version.
    AskVersion { job: u64, limit: Duration },
    /// Interrupt `--version` or a command of the user's service; the job still gets its answer.
    Cancel,
    /// Launch opencode, recorded before it runs; or find the user's service, and start it if `start` is set.
    Launch { job: u64, start: bool },
    /// Report the end of the new process.
    Watch,
    /// Probe the process; `ready`: it was ready before.
    Probe { limit: Duration, ready: bool },
    /// Dispose all instances.
    Dispose { job: u64, limit: Duration },
    /// Send a signal to the process and its group.
    Signal(Signal),
    /// End the descendants of the process, reap it, remove its record.
    Reap { job: u64, cause: Cause },
    /// Run a command of the user's service; answered by [`Event::Reaped`].
    CommandService { job: u64, verb: Verb },
    /// Leave the process to the next daemon.
    Release,
    /// Publish an event.
    Publish(Notice),
    /// Log an error.
    Log(Error),
}

/// Why a process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It exited, or others sent it a signal.
    Itself,
    /// We ended it because it had failed.
    Failure,
    /// We ended it for a stop or an orderly restart.
    Wanted,
}

/// Notice about the current process.
#[derive(Debug)]
pub enum Notice {
    /// The process was launched.
    Starting,
    /// The process is ready.
    Ready { adopted: bool },
    /// The process has ended.
    Exited { how: String, pid: u32 },
    /// opencode was given up and stays down.
    Failed { error: ErrorBody },
    /// opencode uses too much memory; it is restarted now or, while sessions run, later.
    TooLarge { recycled: bool },
}
