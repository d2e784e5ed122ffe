//! Looks at the process of opencode, and asks for its health: in a thread that is there before opencode
//! is, so that a lack of threads cannot be taken for silence.

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

/// How long opencode may take to say whether sessions run, before it is restarted for its memory.
const SESSIONS_LIMIT: Duration = Duration::from_secs(5);

/// How long the end of a process may take to be reported, once its sockets are closed: some
/// microseconds, or longer on a machine that is overloaded.
const ENDING_LIMIT: Duration = Duration::from_secs(1);

/// A process that may listen.
pub struct Target {
    /// Counts the processes.
    pub generation: u64,
    /// Its id.
    pub pid: u32,
    /// Which protocol it speaks.
    pub line: Line,
    /// Where it is to listen; its socket is still to be found.
    pub listener: Listener,
    /// What it wants as `Authorization`.
    pub authorization: Arc<str>,
    /// Whether it is the user's own service.
    pub is_service: bool,
}

/// A look at a process.
pub struct Look {
    /// The process.
    pub target: Target,
    /// How long its answer may take.
    pub limit: Duration,
    /// It was ready before.
    pub is_ready: bool,
}

/// Does the looking.
pub struct Prober {
    /// Where the logs are.
    pub data_dir: DataDir,
    /// What opencode has loaded.
    pub store: &'static Store,
    /// Which instances it has loaded.
    pub instances: &'static Instances,
    /// More memory than this, with all that it has started, is too much. Bytes.
    pub max_memory: Option<u64>,
    /// The supervisor.
    pub messages: Sender<Message>,
}

impl Prober {
    /// Looks for as long as the daemon lives.
    pub fn run(self, looks: Receiver<Look>) {
        for look in looks {
            let generation = look.target.generation;
            let report = self.look(look);
            let _ = self.messages.send(Message::Probed { generation, report });
        }
    }

    fn look(&self, look: Look) -> Report {
        let log = self.data_dir.opencode_log();
        if look.is_ready {
            // Another daemon may have started an opencode of its own by now; if nobody asks this one
            // for anything, nothing else would tell.
            let _ = self.store.check_lock();
            // What its watcher does while it grows; and the daemon's own, which grows by lines.
            for log in [&log, &self.data_dir.daemon_log()] {
                let _ = log::bound(log);
            }
        }
        let (mut memory, mut holder) = (None, None);
        let (answer, version) = match find(&look.target) {
            Err(e) => (Answer::NotAsked(Error::Internal(format!("cannot look at opencode: {e}"))), None),
            Ok(None) => (without_listener(&look), None),
            Ok(Some((endpoint, listening))) => {
                holder = Some(listening);
                let (answer, version) = ask(&look, &endpoint);
                if let (Some(version), false) = (&version, look.is_ready) {
                    self.instances.version_is(version);
                }
                if matches!(answer, Answer::Healthy) && look.is_ready {
                    memory = self.weigh(&endpoint);
                }
                (answer, version)
            }
        };
        let service = match (&answer, look.target.line, look.target.is_service) {
            (Answer::Healthy, Line::V2, false) => service::find().map(|service| service.registration.url),
            (..) => None,
        };
        Report {
            answer,
            version,
            socket: holder.map(|holder| holder.inode),
            cpu: process::processor_time(holder.map_or(look.target.pid, |holder| holder.pid)),
            log: std::fs::metadata(&log).map_or(0, |metadata| metadata.len()),
            memory,
            service,
        }
    }

    /// Its memory, and, when that is too much, whether a session runs.
    fn weigh(&self, endpoint: &Endpoint) -> Option<Memory> {
        let max = self.max_memory?;
        let record = self.store.snapshot().opencode.clone()?;
        let exceeds = process::share(&record.processes())? > max;
        let deadline = Instant::now() + SESSIONS_LIMIT;
        let loaded = self.store.latest().opencode.as_ref().map(|engine| engine.instances.clone());
        let loaded = loaded.unwrap_or_default();
        // What cannot be known is taken for a running session.
        let busy = exceeds && self.instances.any_running(endpoint, &loaded, deadline).unwrap_or(true);
        Some(Memory { exceeds, busy })
    }
}

/// How to call a process, if it listens.
///
/// # Errors
/// When this process lacks a resource for the look.
pub fn find(target: &Target) -> io::Result<Option<(Endpoint, Listening)>> {
    let Target { generation, pid, line, listener, authorization, .. } = target;
    let Some(listening) = socket::listening(*pid, listener.address)? else { return Ok(None) };
    let listener = Listener { socket: listening.inode, ..listener.clone() };
    Ok(Some((Endpoint::new(listener, *generation, *line, authorization.clone()), listening)))
}

/// Asks for its health.
fn ask(look: &Look, endpoint: &Endpoint) -> (Answer, Option<String>) {
    let answer = match endpoint.health(Instant::now() + look.limit) {
        Ok(version) => return (Answer::Healthy, Some(version)),
        Err(CallError::Gone(why)) => {
            let listener = socket::listening(look.target.pid, look.target.listener.address);
            match listener {
                Ok(None) => without_listener(look),
                Ok(Some(_)) | Err(_) => Answer::Silent(Error::OpencodeUnavailable(why)),
            }
        }
        Err(CallError::TimedOut) => Answer::Silent(Error::OpencodeTimeout("did not answer")),
        Err(CallError::Failed(e @ (Error::OpencodeAuthFailed(_) | Error::OpencodeUnsupported { .. }))) => {
            Answer::Refused(e)
        }
        Err(CallError::Failed(e @ Error::Overloaded(_))) => Answer::NotAsked(e),
        Err(CallError::Failed(e)) => Answer::Silent(e),
    };
    (answer, None)
}

/// What it means that a process does not listen: one that was ready may be about to end. The kernel
/// closes its sockets before it reports its end.
fn without_listener(look: &Look) -> Answer {
    let patience = if look.is_ready { ENDING_LIMIT } else { Duration::ZERO };
    match wait::wait_until_readable(&look.target.listener.process, Instant::now() + patience) {
        true => Answer::Silent(Error::OpencodeUnavailable("the process has ended".to_owned())),
        false => Answer::Deaf,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};

    use super::*;

    #[test]
    fn closed_connection_is_silence_and_only_a_missing_listener_is_deafness() {
        let bound = TcpListener::bind("127.0.0.1:0").unwrap();
        let SocketAddr::V4(address) = bound.local_addr().unwrap() else { panic!("{bound:?}") };
        let pid = std::process::id();
        let process = Arc::new(process::open(pid).unwrap().unwrap());
        let listener = Listener { address, socket: 0, process };
        let (line, authorization) = (Line::V1, Arc::from("Basic x"));
        let target = Target { generation: 1, pid, line, listener, authorization, is_service: false };
        let look = Look { target, limit: Duration::from_secs(10), is_ready: false };
        let (endpoint, _) = find(&look.target).unwrap().expect("a listener");
        std::thread::scope(|scope| {
            // The listener accepts the connection and closes it without an answer.
            let hanging_up = scope.spawn(|| drop(bound.accept().unwrap()));
            assert!(matches!(ask(&look, &endpoint).0, Answer::Silent(Error::OpencodeUnavailable(_))));
            hanging_up.join().unwrap();
        });
        drop(bound);
        // A process that another test has just forked holds the socket too, until it runs its program.
        let deadline = Instant::now() + Duration::from_secs(30);
        while !matches!(ask(&look, &endpoint).0, Answer::Deaf) {
            assert!(Instant::now() < deadline);
        }
    }
}
