//! The control plane: tiny_http on a socket in the data directory, behind the gate.
//!
//! Every request has a thread, since a handler may wait for opencode. The gate reuses its connections, like a
//! client of the public port: a new connection would cost two more thread switches.
//!
//! Invariants: a connection is reused only after a success that was read to its end; a replaced server still
//! answers on the connections that it has.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder};
use std::time::Duration;

use tiny_http::{Request, Server};

use super::crew::Crew;
use super::{CONTROL_SOCKET, Daemon, api};
use crate::error::{Error, Result};
use crate::system::wait;

/// The most idle connections. Each takes three descriptors, since tiny_http holds its end twice, and one of
/// the four threads that tiny_http has in any case.
const KEPT: usize = 2;
/// The pause before the control plane tries to listen again, after descriptors or memory ran out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);
/// The interval at which a replaced server checks whether its last connection is closed.
const RETIRING_INTERVAL: Duration = Duration::from_millis(100);

/// The servers behind the gate: mostly a single one for the life of the daemon.
pub struct ControlPlane(Mutex<Listening>);

struct Listening {
    serving: Arc<Serving>,
    /// Idle connections to it.
    idle: Vec<UnixStream>,
}

/// A server and its threads.
struct Serving {
    server: Server,
    crew: Crew,
    /// How many connections the gate uses for requests.
    used: AtomicUsize,
    is_replaced: AtomicBool,
}

/// A connection of the gate to the control plane.
pub struct Connection {
    /// The socket.
    pub stream: UnixStream,
    used: Used,
}

/// Counts a connection as used.
struct Used(Arc<Serving>);

impl Drop for Used {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::AcqRel);
    }
}

impl ControlPlane {
    /// Listens in the data directory, which is the working directory.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen() -> Result<ControlPlane> {
        Ok(ControlPlane(Mutex::new(Listening { serving: Serving::listen()?, idle: Vec::new() })))
    }

    fn lock(&self) -> MutexGuard<'_, Listening> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers requests for as long as the daemon lives.
    pub fn serve(&'static self, daemon: &'static Daemon) {
        let serving = self.lock().serving.clone();
        self.work(daemon, &serving);
    }

    /// The work of a thread of a server.
    fn work(&'static self, daemon: &'static Daemon, serving: &Arc<Serving>) {
        while serving.crew.join() {
            let Some(request) = self.wait(daemon, serving) else { return };
            let next = serving.clone();
            match serving.crew.leave(move || self.work(daemon, &next)) {
                Ok(()) => api::handle(daemon, request),
                Err(e) => {
                    crate::log!("cannot start a thread for a request: {e}");
                    api::refuse(daemon, request);
                }
            }
        }
    }

    /// Waits for a request; `None` when the server was replaced and has no connection left.
    fn wait(&'static self, daemon: &'static Daemon, serving: &Arc<Serving>) -> Option<Request> {
        while !serving.is_replaced.load(Ordering::Acquire) {
            match serving.server.recv() {
                Ok(request) => return Some(request),
                Err(_) if serving.is_replaced.load(Ordering::Acquire) => {}
                Err(e) => {
                    crate::log!("the control plane has ended: {e}");
                    if self.replace(daemon, serving).is_err() {
                        thread::sleep(EXHAUSTED_PAUSE);
                    }
                }
            }
        }
        // Wake the other threads of this server.
        serving.server.unblock();
        while serving.used.load(Ordering::Acquire) > 0 {
            if let Ok(Some(request)) = serving.server.recv_timeout(RETIRING_INTERVAL) {
                return Some(request);
            }
        }
        None
    }

    /// Connects to the server, after replacing a server that has ended: tiny_http stops accepting after an error,
    /// for example when descriptors or threads ran out.
    ///
    /// # Errors
    /// `overloaded` without a free descriptor.
    pub fn connect(&'static self, daemon: &'static Daemon) -> Result<Connection> {
        let (used, kept) = {
            let mut listening = self.lock();
            listening.serving.used.fetch_add(1, Ordering::AcqRel);
            (Used(listening.serving.clone()), listening.idle.pop())
        };
        if let Some(stream) = kept.filter(|stream| wait::are_silent([stream.as_fd()])) {
            return Ok(Connection { stream, used });
        }
        let connect = || UnixStream::connect(CONTROL_SOCKET);
        let is_gone = |e: &io::Error| matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound);
        let connected = connect()
            .or_else(|e| if is_gone(&e) && self.replace(daemon, &used.0).is_ok() { connect() } else { Err(e) });
        // If the server was replaced meanwhile, the connection leads to the new one; it will not be kept.
        connected.map(|stream| Connection { stream, used }).map_err(|_| Error::Overloaded("requests"))
    }

    /// Keeps a connection for another request. Call this only after a success that was read to its end.
    pub fn keep(&self, Connection { stream, used }: Connection) {
        let mut listening = self.lock();
        if listening.idle.len() < KEPT && Arc::ptr_eq(&listening.serving, &used.0) {
            listening.idle.push(stream);
        }
    }

    /// Replaces a server that has ended, unless another thread has done so.
    fn replace(&'static self, daemon: &'static Daemon, ended: &Arc<Serving>) -> Result<()> {
        let mut listening = self.lock();
        if Arc::ptr_eq(&listening.serving, ended) {
            let serving = Serving::listen()?;
            let first = serving.clone();
            let started = Builder::new().spawn(move || self.work(daemon, &first));
            started.map_err(|e| Error::Internal(format!("cannot start a thread: {e}")))?;
            crate::log!("the control plane listens again");
            // Dropping a server would remove the socket of the next one.
            std::mem::forget(std::mem::replace(&mut listening.serving, serving));
            listening.idle.clear();
            ended.is_replaced.store(true, Ordering::Release);
            // Wake one of its threads, which wakes the next.
            ended.server.unblock();
        }
        Ok(())
    }
}

impl Serving {
    fn listen() -> Result<Arc<Serving>> {
        let (used, is_replaced) = (AtomicUsize::new(0), AtomicBool::new(false));
        Ok(Arc::new(Serving { server: listen()?, crew: Crew::new(), used, is_replaced }))
    }
}

fn listen() -> Result<Server> {
    let path = Path::new(CONTROL_SOCKET);
    let failed = |what| move |e| Error::io(what, path, e);
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed("remove")(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed("listen on"))?;
    // The directory is private already; this is a second barrier.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed("narrow the mode of"))?;
    Server::from_listener(listener, None).map_err(|e| Error::Internal(format!("cannot serve: {e}")))
}
