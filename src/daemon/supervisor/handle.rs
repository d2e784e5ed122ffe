//! The rest of the daemon's view of opencode: the status that the supervisor publishes, and the requests
//! that it takes.
//!
//! This module lies below both the supervisor and `instances`, so that neither depends on the other to
//! read the [`Status`].

use std::mem;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::policy::{Answer, Checked, End, Memory, StopScope};
use super::worker::Started;
use crate::daemon::engine::{CallError, Endpoint};
use crate::error::{Error, ErrorBody, Result};
use crate::state::EngineRecord;
use crate::system::process::Process;
use crate::system::wait;
use crate::wire::{EngineInfo, Phase, ProcessInfo};

/// How many times a call is sent when each opencode ends under it: after three, the call itself is the
/// likely cause.
const CALL_TRIES: usize = 3;

/// A message to the supervisor's thread: a request of the daemon, or a helper's result.
pub enum Message {
    /// A request needs opencode.
    Need,
    /// A call to this generation got no answer.
    Suspect { generation: u64 },
    /// Stop. `client` is the pid of the client that requested it, perhaps a descendant of opencode.
    Stop { scope: StopScope, client: Option<u32> },
    /// The search for the opencode of an earlier daemon is over.
    Adopted { job: u64, found: Option<(Process, EngineRecord, Checked)> },
    /// The binary's version, and how its line behaves.
    Version { job: u64, result: Result<(String, Checked)> },
    /// A process was started, or the user's service found, and recorded; `None` when the service does not
    /// run and the job was not to start it.
    Launched { job: u64, result: Result<Option<Started>> },
    /// The result of a probe.
    Probed { generation: u64, report: Report },
    /// opencode has disposed its instances, or did not in time.
    Disposed { job: u64 },
    /// The process has ended.
    Exited { generation: u64 },
    /// The descendants of the process have ended too.
    Reaped { job: u64, end: End },
    /// A helper thread panicked: supervision cannot continue without it.
    Broken,
}

/// The result of a probe.
pub struct Report {
    /// The outcome of the health call.
    pub answer: Answer,
    /// The version in the answer.
    pub version: Option<String>,
    /// The inode of the listening socket.
    pub socket: Option<u32>,
    /// Processor time of the process that listens, else of the leader.
    pub cpu: Option<Duration>,
    /// The size of opencode's log. Bytes.
    pub log: u64,
    /// Memory use, if it is limited.
    pub memory: Option<Memory>,
    /// The URL of the user's own service, if one runs beside our opencode.
    pub service: Option<String>,
}

/// The published state of opencode.
#[derive(Clone)]
pub struct Status {
    /// As on the wire.
    pub phase: Phase,
    /// The number of the current process.
    pub generation: u64,
    /// How many processes replaced a failed one.
    pub restarts: u64,
    /// The version of opencode, once known.
    pub version: Option<String>,
    /// The last failure; none once opencode is ready again.
    pub last_error: Option<ErrorBody>,
    /// The process, from the moment it exists.
    pub process: Option<ProcessInfo>,
    /// The address for calls, while opencode is ready.
    pub ready: Option<Arc<Endpoint>>,
    /// The URL of the user's own service, if one runs beside our opencode.
    pub service: Option<String>,
    /// Whether opencode is the user's own service; while there is no process, whether the next one will be.
    pub shared: bool,
    /// The `Authorization` of the user's service that was used last.
    pub(super) service_authorization: Option<Arc<str>>,
    /// How many times opencode was given up.
    pub(super) failures: u64,
    /// How many probes of a ready process it answered.
    pub(super) checks: u64,
    /// A stop was requested.
    pub(super) stopping: bool,
}

impl Status {
    /// The engine as `/health` shows it.
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

/// The state that the supervisor and all handles share.
pub(super) struct Shared {
    status: Mutex<Status>,
    changed: Condvar,
    /// The generation whose event stream carried a message since the last probe, or 0. Not an atomic, since
    /// some 32-bit processors lack 64-bit atomics.
    heard: Mutex<u64>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the status and wakes the waiting requests.
    pub(super) fn publish(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Whether the event stream of this generation carried a message since the last call.
    pub(super) fn was_heard(&self, generation: u64) -> bool {
        mem::take(&mut *self.heard.lock().unwrap_or_else(PoisonError::into_inner)) == generation
    }
}

/// Access to opencode for the rest of the daemon.
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

    /// The current status.
    pub fn status(&self) -> Status {
        self.shared.lock().clone()
    }

    /// If opencode is the user's own service: the `Authorization` of the service that was used last, if
    /// there was one. Takes only a lock.
    pub fn shared(&self) -> Option<Option<Arc<str>>> {
        let status = self.shared.lock();
        status.shared.then(|| status.service_authorization.clone())
    }

    /// Asks the supervisor to stop; its thread ends when it has. `client` is the pid of the requesting
    /// client, if known: it and its ancestors are spared when the descendants of opencode are ended.
    pub fn stop(&self, scope: StopScope, client: Option<u32>) {
        let _ = self.messages.send(Message::Stop { scope, client });
    }

    /// Records a message on the event stream of this generation as a sign of life. Takes only a lock.
    pub fn heard(&self, generation: u64) {
        *self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner) = generation;
    }

    /// Waits for a ready opencode. An opencode that was given up gets one more attempt.
    ///
    /// # Errors
    /// The failure of the start; `opencode_timeout` at the deadline; `opencode_unavailable` while stopping.
    pub fn endpoint(&self, deadline: Instant) -> Result<Arc<Endpoint>> {
        self.wait(None, deadline)
    }

    /// opencode if it is ready now; does not wake the supervisor.
    pub fn ready_now(&self) -> Option<Arc<Endpoint>> {
        self.shared.lock().ready.clone()
    }

    /// This generation of opencode, if it is ready now; does not wake the supervisor.
    pub fn ready_in(&self, generation: u64) -> Option<Arc<Endpoint>> {
        self.ready_now().filter(|endpoint| endpoint.generation == generation)
    }

    /// Waits for a ready opencode without requesting a start; `None` when the supervisor stops.
    pub fn wait_ready(&self) -> Option<Arc<Endpoint>> {
        let mut status = self.shared.lock();
        loop {
            match &status.ready {
                _ if status.stopping => return None,
                Some(endpoint) => return Some(endpoint.clone()),
                None => status = self.shared.changed.wait(status).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Waits until this generation is no longer ready, at most for `limit`.
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

    /// Calls opencode; if it has ended, calls its successor.
    ///
    /// # Errors
    /// As [`Handle::endpoint`], and those of the call.
    pub fn call<T>(
        &self,
        deadline: Instant,
        mut call: impl FnMut(&Arc<Endpoint>) -> std::result::Result<T, CallError>,
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

    /// Waits for a ready opencode after a call found that `endpoint` no longer answers.
    ///
    /// # Errors
    /// As [`Handle::endpoint`].
    pub fn successor(&self, endpoint: &Endpoint, deadline: Instant) -> Result<Arc<Endpoint>> {
        self.wait(Some(endpoint.generation), deadline)
    }

    /// Whether opencode is still alive after a call to it broke off, by a new probe. Without a result at the
    /// deadline opencode counts as alive.
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

    /// With `suspect`, trusts an opencode of that generation only after a new probe.
    fn wait(&self, suspect: Option<u64>, deadline: Instant) -> Result<Arc<Endpoint>> {
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
