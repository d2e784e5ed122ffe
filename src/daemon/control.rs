//! The control plane: tiny_http on a socket in the data directory, behind the gate.
//!
//! Every request has a thread, since a handler may wait for opencode. The gate sends one request after
//! another on a connection, as a client of the public port does: a new one would cost the turns of two
//! more threads.
//!
//! Invariant: a connection is used again only after a success that was read to its end, and only while the
//! server that accepted it listens.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tiny_http::{Request, Server};

use super::crew::Crew;
use super::{CONTROL_SOCKET, Daemon, api};
use crate::error::{Error, Result};
use crate::system::wait;

/// How many connections are kept while no request needs them. Each costs three descriptors, since
/// tiny_http holds its end twice, and one of the four threads that it has in any case.
const KEPT: usize = 2;
/// The pause before the control plane tries to listen again, when it lacks descriptors or memory.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

/// The server behind the gate.
pub struct ControlPlane {
    listening: Mutex<Listening>,
    crew: Crew,
}

struct Listening {
    server: Arc<Server>,
    /// Connections to it that wait for a request.
    idle: Vec<UnixStream>,
}

/// A connection of the gate to the control plane.
pub struct Connection {
    /// The socket.
    pub stream: UnixStream,
    /// The server that it is connected to.
    server: Arc<Server>,
}

impl ControlPlane {
    /// Listens in the data directory, which is the working directory.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen() -> Result<ControlPlane> {
        let listening = Listening { server: Arc::new(listen()?), idle: Vec::new() };
        Ok(ControlPlane { listening: Mutex::new(listening), crew: Crew::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Listening> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers requests for as long as the daemon lives, each in its own thread.
    pub fn serve(&'static self, daemon: &'static Daemon) {
        while self.crew.join() {
            let request = self.wait();
            match self.crew.leave(move || self.serve(daemon)) {
                Ok(()) => api::handle(daemon, request),
                Err(e) => {
                    crate::log!("cannot start a thread for a request: {e}");
                    api::refuse(daemon, request);
                }
            }
        }
    }

    /// Waits for a request.
    fn wait(&self) -> Request {
        loop {
            let server = self.lock().server.clone();
            match server.recv() {
                Ok(request) => return request,
                // The server was replaced, for the other threads that wait on it too.
                Err(_) if !Arc::ptr_eq(&server, &self.lock().server) => server.unblock(),
                Err(e) => {
                    crate::log!("the control plane has ended: {e}");
                    if self.replace(&server).is_err() {
                        thread::sleep(EXHAUSTED_PAUSE);
                    }
                }
            }
        }
    }

    /// Connects to the server, and first replaces one that has ended: tiny_http stops accepting after an
    /// error, such as a lack of descriptors or threads.
    ///
    /// # Errors
    /// `overloaded` without a free descriptor.
    pub fn connect(&self) -> Result<Connection> {
        let (server, kept) = {
            let mut listening = self.lock();
            (listening.server.clone(), listening.idle.pop())
        };
        if let Some(stream) = kept.filter(|stream| wait::are_silent(&[stream.as_fd()])) {
            return Ok(Connection { stream, server });
        }
        let connect = || UnixStream::connect(CONTROL_SOCKET);
        let is_gone = |e: &io::Error| matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound);
        let connected =
            connect().or_else(|e| if is_gone(&e) && self.replace(&server).is_ok() { connect() } else { Err(e) });
        // After a replacement the connection is the new server's, and is not kept: its server here is the old one.
        connected.map(|stream| Connection { stream, server }).map_err(|_| Error::Overloaded("requests"))
    }

    /// Keeps a connection for another request, after a success that was read to its end.
    pub fn keep(&self, connection: Connection) {
        let mut listening = self.lock();
        if listening.idle.len() < KEPT && Arc::ptr_eq(&listening.server, &connection.server) {
            listening.idle.push(connection.stream);
        }
    }

    /// Replaces a server that has ended, unless another thread has done so.
    fn replace(&self, ended: &Arc<Server>) -> Result<()> {
        let mut listening = self.lock();
        if Arc::ptr_eq(&listening.server, ended) {
            let another = Listening { server: Arc::new(listen()?), idle: Vec::new() };
            crate::log!("the control plane listens again");
            let ended = std::mem::replace(&mut *listening, another).server;
            // Wake a thread that waits on the old server, so that it moves to the new one.
            ended.unblock();
            // Dropping the old server would remove the socket of the new one.
            std::mem::forget(ended);
        }
        Ok(())
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
