//! How everybody else sees opencode: what the supervisor publishes, and what can be asked of it.
//!
//! Below both the supervisor and `instances`: neither has to know the other to read the [`Status`].

use std::mem;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::policy::{Answer, Checked, End, Ends, Memory};
use super::worker::Started;
use crate::daemon::engine::{CallError, Endpoint};
use crate::error::{Error, ErrorBody, Result};
use crate::state::EngineRecord;
use crate::system::process::Process;
use crate::system::wait;
use crate::wire::{EngineInfo, Phase, ProcessInfo};

/// How often a call that finds nobody is made: more often, and it is the call that ends opencode.
const CALL_TRIES: usize = 3;

/// What reaches the supervisor's thread: wishes of others, and what its helpers have done or seen.
pub enum Message {
    /// Somebody needs opencode.
    Need,
    /// A call to this generation brought no answer.
    Suspect { generation: u64 },
    /// Stop for good. The process `client` asked for that, perhaps from within opencode.
    Stop { ends: Ends, client: Option<u32> },
    /// The opencode of an earlier daemon was looked for.
    Adopted { job: u64, found: Option<(Process, EngineRecord, Checked)> },
    /// The binary was found and asked for its version.
    Version { job: u64, result: Result<(String, Checked)> },
    /// A process was started, or the user's service found, and written down; `None` when the service does
    /// not run, and was not to be started.
    Launched { job: u64, result: Result<Option<Started>> },
    /// A look at the process, and mostly a health call.
    Probed { generation: u64, report: Report },
    /// All instances are disposed, or that took too long.
    Disposed { job: u64 },
    /// The process has ended.
    Exited { generation: u64 },
    /// All that the process left is ended too.
    Buried { job: u64, end: End },
    /// One of the supervisor's helpers has panicked: without it there is no supervision.
    Broken,
}

/// What a look at the process found.
pub struct Report {
    /// What it answered.
    pub answer: Answer,
    /// The version that it told.
    pub version: Option<String>,
    /// The inode of the socket that listens.
    pub socket: Option<u32>,
    /// Processor time of the process that listens, else of the leader.
    pub cpu: Option<Duration>,
    /// The size of its log. Bytes.
    pub log: u64,
    /// Its memory, where that is limited.
    pub memory: Option<Memory>,
    /// The URL of the user's own service, if that runs beside it.
    pub service: Option<String>,
}

/// What is published.
#[derive(Clone)]
pub struct Status {
    /// As on the wire.
    pub phase: Phase,
    /// Counts the processes.
    pub generation: u64,
    /// How many of them replaced one that had ended by itself.
    pub restarts: u64,
    /// Of opencode, once known.
    pub version: Option<String>,
    /// Why it is not ready, or was not before.
    pub last_error: Option<ErrorBody>,
    /// The process, from the moment it exists.
    pub process: Option<ProcessInfo>,
    /// How to call it, while it is ready.
    pub ready: Option<Endpoint>,
    /// The URL of the user's own service, if that runs beside it.
    pub service: Option<String>,
    /// Whether it is the user's own service; while there is no process, whether the next one will be.
    pub shared: bool,
    /// What the user's service that was used last wants as `Authorization`.
    pub(super) service_authorization: Option<Arc<str>>,
    /// Counts the times that it was given up.
    pub(super) failures: u64,
    /// Counts the health calls that were answered.
    pub(super) checks: u64,
    /// It stops for good.
    pub(super) stopping: bool,
}

impl Status {
    /// As in `/health`.
    pub fn engine_info(&self) -> EngineInfo {
        EngineInfo {
            phase: self.phase.name().into(),
            generation: self.generation,
            restarts: self.restarts,
            version: self.version.clone(),
            last_error: self.last_error.clone(),
            shared: self.shared,
            service: self.service.clone(),
        }
    }
}

/// What the supervisor and all handles share.
pub(super) struct Shared {
    status: Mutex<Status>,
    changed: Condvar,
    /// The generation whose event stream said something since the last look, or 0. Not an atomic:
    /// some 32-bit processors have none of 64 bits.
    heard: Mutex<u64>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what everybody sees.
    pub(super) fn publish(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Whether the event stream of this generation said something since the last time this was asked.
    pub(super) fn was_heard(&self, generation: u64) -> bool {
        mem::take(&mut *self.heard.lock().unwrap_or_else(PoisonError::into_inner)) == generation
    }
}

/// How everybody else sees opencode.
#[derive(Clone)]
pub struct Handle {
    pub(super) shared: Arc<Shared>,
    pub(super) messages: Sender<Message>,
}

impl Handle {
    /// A handle that sends to the supervisor's channel.
    pub fn new(messages: Sender<Message>) -> Handle {
        let status = Status {
            phase: Phase::Starting,
            generation: 0,
            restarts: 0,
            version: None,
            last_error: None,
            process: None,
            ready: None,
            service: None,
            shared: false,
            service_authorization: None,
            failures: 0,
            checks: 0,
            stopping: false,
        };
        let shared = Shared { status: Mutex::new(status), changed: Condvar::new(), heard: Mutex::new(0) };
        Handle { shared: Arc::new(shared), messages }
    }

    /// How it is now.
    pub fn status(&self) -> Status {
        self.shared.lock().clone()
    }

    /// Whether opencode is the user's own service, and what that wants as `Authorization`: the value of the
    /// one that was used last, if there was one. Cheap.
    pub fn shared(&self) -> Option<Option<Arc<str>>> {
        let status = self.shared.lock();
        status.shared.then(|| status.service_authorization.clone())
    }

    /// Asks the supervisor to stop; it replies by ending. The process `client` is the one that asks,
    /// if that is known: it is spared when what opencode has started is ended.
    pub fn stop(&self, ends: Ends, client: Option<u32>) {
        let _ = self.messages.send(Message::Stop { ends, client });
    }

    /// The event stream of this generation has said something: a sign of life. Cheap.
    pub fn heard(&self, generation: u64) {
        *self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner) = generation;
    }

    /// A ready opencode: waits until there is one. One that had failed is tried once more.
    ///
    /// # Errors
    /// Why it failed; `opencode_timeout` at the deadline; `opencode_unavailable` while stopping.
    pub fn endpoint(&self, deadline: Instant) -> Result<Endpoint> {
        self.wait(None, deadline)
    }

    /// opencode if it is ready now; nobody is woken.
    pub fn ready_now(&self) -> Option<Endpoint> {
        self.shared.lock().ready.clone()
    }

    /// This generation of opencode, if it is ready now; nobody is woken.
    pub fn ready_in(&self, generation: u64) -> Option<Endpoint> {
        self.ready_now().filter(|endpoint| endpoint.generation == generation)
    }

    /// opencode once it is ready, without asking for it; `None` when the supervisor stops.
    pub fn wait_ready(&self) -> Option<Endpoint> {
        let mut status = self.shared.lock();
        loop {
            match &status.ready {
                _ if status.stopping => return None,
                Some(endpoint) => return Some(endpoint.clone()),
                None => status = self.shared.changed.wait(status).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Waits while this generation is the current one, at most for so long.
    pub fn wait_while(&self, generation: u64, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut status = self.shared.lock();
        while status.generation == generation && status.ready.is_some() && !status.stopping {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return;
            }
            status = self.shared.changed.wait_timeout(status, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Runs a call against opencode, again against its successor if it was gone.
    ///
    /// # Errors
    /// As [`Handle::endpoint`], and those of the call.
    pub fn call<T>(
        &self,
        deadline: Instant,
        mut call: impl FnMut(&Endpoint) -> std::result::Result<T, CallError>,
    ) -> Result<T> {
        let mut endpoint = self.endpoint(deadline)?;
        for _ in 1..CALL_TRIES {
            match call(&endpoint) {
                Err(CallError::Gone(_)) => endpoint = self.successor(&endpoint, deadline)?,
                other => return other.map_err(Error::from),
            }
        }
        call(&endpoint).map_err(Error::from)
    }

    /// A ready opencode after a call to `endpoint` found nobody there.
    ///
    /// # Errors
    /// As [`Handle::endpoint`].
    pub fn successor(&self, endpoint: &Endpoint, deadline: Instant) -> Result<Endpoint> {
        self.wait(Some(endpoint.generation), deadline)
    }

    /// Whether an opencode is still there after a call to it broke off: it is looked at again. What
    /// cannot be said by the deadline counts as alive.
    pub fn survives(&self, endpoint: &Endpoint, deadline: Instant) -> bool {
        let mut status = self.shared.lock();
        let checks = status.checks;
        let is_current = |status: &Status| {
            status.ready.is_some()
                && status.generation == endpoint.generation
                && !wait::has_ended(&endpoint.listener.process)
        };
        if is_current(&status) {
            let _ = self.messages.send(Message::Suspect { generation: endpoint.generation });
        }
        while is_current(&status) {
            let rest = deadline.saturating_duration_since(Instant::now());
            if status.checks > checks || rest.is_zero() {
                return true;
            }
            status = self.shared.changed.wait_timeout(status, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    /// With `suspect`, an opencode of that generation is believed only after another look at it.
    fn wait(&self, suspect: Option<u64>, deadline: Instant) -> Result<Endpoint> {
        let mut status = self.shared.lock();
        let (failures, checks) = (status.failures, status.checks);
        let trusted =
            |status: &Status| suspect.is_none_or(|suspect| status.generation > suspect || status.checks > checks);
        if !(status.phase == Phase::Ready && trusted(&status)) {
            let _ = self.messages.send(match suspect {
                Some(generation) => Message::Suspect { generation },
                None => Message::Need,
            });
        }
        loop {
            if let (Some(endpoint), true) = (&status.ready, trusted(&status)) {
                return Ok(endpoint.clone());
            }
            if status.stopping {
                return Err(Error::OpencodeUnavailable("the daemon is stopping".to_owned()));
            }
            if status.phase == Phase::Failed && status.failures > failures {
                let body = status.last_error.clone();
                let unknown = || Error::OpencodeUnavailable("it has failed".to_owned());
                return Err(body.map_or_else(unknown, Error::unavailable));
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(Error::OpencodeTimeout("was not ready"));
            }
            status = self.shared.changed.wait_timeout(status, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};
    use std::sync::mpsc::channel;

    use super::*;
    use crate::agent::Listener;
    use crate::line::Line;
    use crate::system::process;

    #[test]
    fn requests_for_one_opencode_never_reach_the_next() {
        let handle = Handle::new(channel().0);
        let bound = TcpListener::bind("127.0.0.1:0").unwrap();
        let SocketAddr::V4(address) = bound.local_addr().unwrap() else { panic!("{bound:?}") };
        let process = Arc::new(process::open(std::process::id()).unwrap().unwrap());
        let listener = Listener { address, socket: 0, process };
        for generation in [1, 2] {
            let endpoint = Endpoint::new(listener.clone(), generation, Line::V1, "".into());
            handle.shared.publish(|status| status.ready = Some(endpoint));
            let ready: Vec<u64> = (0..4).filter(|generation| handle.ready_in(*generation).is_some()).collect();
            assert_eq!(ready, [generation]);
        }
        handle.shared.publish(|status| status.ready = None);
        assert!(handle.ready_in(2).is_none());
    }
}
