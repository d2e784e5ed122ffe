//! Probes opencode: its listening socket, its health, its memory. The thread starts before opencode does,
//! so that running out of threads never looks like an opencode that does not answer.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use super::handle::{Message, Report};
use super::policy::{Answer, Memory};
use crate::agent::Listener;
use crate::daemon::engine::{CallError, Endpoint};
use crate::daemon::instances::Instances;
use crate::error::Error;
use crate::line::Line;
use crate::log;
use crate::paths::DataDir;
use crate::service;
use crate::state::Store;
use crate::system::socket::{self, Listening};
use crate::system::{process, wait};

/// How long the list of running sessions may take, before a restart for memory.
const SESSIONS_LIMIT: Duration = Duration::from_secs(5);

/// How long the kernel may take to report the end of a process after it has closed its sockets: some
/// microseconds, or longer on an overloaded machine.
const ENDING_LIMIT: Duration = Duration::from_secs(1);

/// A process to probe.
pub struct Target {
    /// The number of the process.
    pub generation: u64,
    /// The pid of the process.
    pub pid: u32,
    /// The protocol that it speaks.
    pub line: Line,
    /// The address where it shall listen; the socket is yet to be found.
    pub listener: Listener,
    /// The `Authorization` that it accepts.
    pub authorization: Arc<str>,
    /// Whether it is the user's own service.
    pub is_service: bool,
}

/// A probe to make.
pub struct ProbeRequest {
    /// The process.
    pub target: Target,
    /// The time limit for the health call.
    pub limit: Duration,
    /// The process was ready before.
    pub is_ready: bool,
}

/// Makes the probes.
pub struct Prober {
    /// Holds the logs.
    pub data_dir: DataDir,
    /// Holds the record of the process.
    pub store: &'static Store,
    /// Knows the running sessions, and stores the version.
    pub instances: &'static Instances,
    /// The most memory for opencode with its descendants. Bytes.
    pub max_memory: Option<u64>,
    /// The channel to the supervisor.
    pub messages: Sender<Message>,
}

impl Prober {
    /// Makes probes for as long as the daemon lives.
    pub fn run(self, requests: Receiver<ProbeRequest>) {
        for request in requests {
            let generation = request.target.generation;
            let report = self.probe(request);
            let _ = self.messages.send(Message::Probed { generation, report });
        }
    }

    fn probe(&self, request: ProbeRequest) -> Report {
        let log = self.data_dir.opencode_log();
        if request.is_ready {
            // If the lock file was replaced, another daemon may have started an opencode of its own; an idle
            // daemon notices only here.
            let _ = self.store.check_lock();
            // The watcher bounds opencode's log while it grows; the daemon's own log grows slowly enough for
            // this interval.
            for log in [&log, &self.data_dir.daemon_log()] {
                let _ = log::bound(log);
            }
        }
        let (mut memory, mut holder) = (None, None);
        let (answer, version) = match find(&request.target) {
            Err(e) => (Answer::NotSent(Error::Internal(format!("cannot examine opencode: {e}"))), None),
            Ok(None) => (without_listener(&request), None),
            Ok(Some((endpoint, listening))) => {
                holder = Some(listening);
                let (answer, version) = health(&request, &endpoint);
                if let (Some(version), false) = (&version, request.is_ready) {
                    self.instances.version_is(version);
                }
                if matches!(answer, Answer::Healthy) && request.is_ready {
                    memory = self.check_memory(&endpoint);
                }
                (answer, version)
            }
        };
        let service = match (&answer, request.target.line, request.target.is_service) {
            (Answer::Healthy, Line::V2, false) => service::find().map(|service| service.registration.url),
            (..) => None,
        };
        Report {
            answer,
            version,
            socket: holder.map(|holder| holder.inode),
            cpu: process::processor_time(holder.map_or(request.target.pid, |holder| holder.pid)),
            log: std::fs::metadata(&log).map_or(0, |metadata| metadata.len()),
            memory,
            service,
        }
    }

    /// Compares the memory of opencode with its limit; above it, asks whether a session runs.
    fn check_memory(&self, endpoint: &Endpoint) -> Option<Memory> {
        let max = self.max_memory?;
        let record = self.store.snapshot().opencode.clone()?;
        let exceeds = process::share(&record.processes())? > max;
        let deadline = Instant::now() + SESSIONS_LIMIT;
        let loaded = self.store.latest().opencode.as_ref().map(|engine| engine.instances.clone());
        let loaded = loaded.unwrap_or_default();
        // Without an answer, assume that a session runs.
        let busy = exceeds && self.instances.any_running(endpoint, &loaded, deadline).unwrap_or(true);
        Some(Memory { exceeds, busy })
    }
}

/// Finds the listening socket of a process; `None` when it does not listen.
///
/// # Errors
/// When the daemon runs out of a resource that the search needs.
pub fn find(target: &Target) -> io::Result<Option<(Arc<Endpoint>, Listening)>> {
    let Target { generation, pid, line, listener, authorization, .. } = target;
    let Some(listening) = socket::listening(*pid, listener.address)? else { return Ok(None) };
    let listener = Listener { socket: listening.inode, ..listener.clone() };
    Ok(Some((Endpoint::new(listener, *generation, *line, authorization.clone()), listening)))
}

/// Makes a health call; returns the version with a healthy answer.
fn health(request: &ProbeRequest, endpoint: &Endpoint) -> (Answer, Option<String>) {
    let answer = match endpoint.health(Instant::now() + request.limit) {
        Ok(version) => return (Answer::Healthy, Some(version)),
        Err(CallError::Gone(why)) => {
            let listener = socket::listening(request.target.pid, request.target.listener.address);
            match listener {
                Ok(None) => without_listener(request),
                Ok(Some(_)) | Err(_) => Answer::Silent(Error::OpencodeUnavailable(why)),
            }
        }
        Err(CallError::TimedOut) => Answer::Silent(Error::OpencodeTimeout("did not answer")),
        Err(CallError::Failed(e @ (Error::OpencodeAuthFailed(_) | Error::OpencodeUnsupported { .. }))) => {
            Answer::Refused(e)
        }
        Err(CallError::Failed(e @ Error::Overloaded(_))) => Answer::NotSent(e),
        Err(CallError::Failed(e)) => Answer::Silent(e),
    };
    (answer, None)
}

/// The answer for a process that does not listen. A process that was ready may be ending: the kernel
/// closes its sockets before it reports the end.
fn without_listener(request: &ProbeRequest) -> Answer {
    let patience = if request.is_ready { ENDING_LIMIT } else { Duration::ZERO };
    match wait::wait_until_readable(&request.target.listener.process, Instant::now() + patience) {
        true => Answer::Silent(Error::OpencodeUnavailable("the process has ended".to_owned())),
        false => Answer::NotListening,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};

    use super::*;

    #[test]
    fn closing_a_connection_still_counts_as_listening() {
        let bound = TcpListener::bind("127.0.0.1:0").unwrap();
        let SocketAddr::V4(address) = bound.local_addr().unwrap() else { panic!("{bound:?}") };
        let pid = std::process::id();
        let process = Arc::new(process::open(pid).unwrap().unwrap());
        let listener = Listener { address, socket: 0, process };
        let (line, authorization) = (Line::V1, Arc::from("Basic x"));
        let target = Target { generation: 1, pid, line, listener, authorization, is_service: false };
        let request = ProbeRequest { target, limit: Duration::from_secs(10), is_ready: false };
        let (endpoint, _) = find(&request.target).unwrap().expect("a listener");
        std::thread::scope(|scope| {
            // The listener accepts the connection and closes it without an answer.
            let hanging_up = scope.spawn(|| drop(bound.accept().unwrap()));
            assert!(matches!(health(&request, &endpoint).0, Answer::Silent(Error::OpencodeUnavailable(_))));
            hanging_up.join().unwrap();
        });
        drop(bound);
        // A process that another test has just forked also holds the socket, until its exec.
        let deadline = Instant::now() + Duration::from_secs(30);
        while !matches!(health(&request, &endpoint).0, Answer::NotListening) {
            assert!(Instant::now() < deadline);
        }
    }
}
