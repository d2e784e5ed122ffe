//! The background process: takes the lock, listens, starts its threads, and waits for the end.
//!
//! Threads: the gate (one that accepts, and one per connection that serves a request), the control plane
//! (one that waits, and one per request), the supervisor and its helpers, the delayed writes of the store,
//! eviction, opencode's events, signals. [`run`] returns when opencode has ended, or is left running, and
//! every request is answered; the end of the process ends the threads. So their shared data lives as long as
//! the process, and nothing has to be unwound.
//!
//! Invariant: the process holds `daemon.lock` from before it reads anything until it ends. A held lock means
//! a living daemon; pids in files are only hints.

mod api;
mod connections;
mod control;
mod crew;
pub mod engine;
mod events;
mod exchange;
mod gate;
pub mod handover;
mod head;
mod instances;
mod notify;
mod reply;
mod router;
mod sessions;
mod supervisor;

use std::fs::{OpenOptions, Permissions};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, Builder, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::OFlags;
use serde_json::Map;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXFSZ};
use signal_hook::iterator::Signals;

use self::control::ControlPlane;
use self::engine::Credentials;
use self::events::{EventKind, Events};
use self::gate::Gate;
use self::handover::{End, Ending};
use self::instances::Instances;
use self::notify::Notifier;
use self::supervisor::handle::Handle;
use self::supervisor::{Context, StopScope, Supervisor};
use crate::error::{Error, Result};
use crate::line::Line;
use crate::lock::{self, Lock};
use crate::log::{self, now_ms};
use crate::options::{DEFAULT_PORT, Options};
use crate::paths::{DataDir, create_private};
use crate::state::{Auth, DaemonRecord, State, Store};
use crate::system::{limits, process, signals};
use crate::wire::{API_VERSION, Done, Failure, Health, Phase, ProcessInfo};
use crate::workspace::{Place, Workspace};

/// How long to retry a held lock: a client takes it for a moment to check it.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// The pause between two attempts to take the lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(10);
/// The socket behind the gate, in the data directory, which is the daemon's working directory: the
/// path of a socket is limited to about 100 bytes.
const CONTROL_SOCKET: &str = "control.sock";

/// The shared data of the request handlers.
struct Daemon {
    info: ProcessInfo,
    data_dir: DataDir,
    options: Options,
    ending: Ending,
    /// The accepted `Authorization` headers of routed requests: with the configured user, and with the user
    /// of every 2.x.
    authorizations: [Arc<str>; 2],
    store: &'static Store,
    supervisor: Handle,
    gate: &'static Gate,
    control: &'static ControlPlane,
    instances: &'static Instances,
    events: &'static Events,
    notifier: &'static Notifier,
}

impl Daemon {
    /// Stops the daemon. `client`: the pid of the client that requested it.
    fn stop(&self, scope: StopScope, client: Option<u32>) {
        self.ending.stop();
        self.notifier.stopping();
        self.supervisor.stop(scope, client);
    }

    /// Stops the daemon to replace it by its successor.
    fn restart(&self, scope: StopScope, client: Option<u32>) {
        self.notifier.reloading();
        if self.keeps_opencode(scope) {
            // No request may find a daemon without opencode: finish the requests in progress first; new ones wait
            // for the successor.
            self.gate.close();
            self.gate.drain(false);
        }
        self.supervisor.stop(scope, client);
    }

    /// Whether the current opencode outlives a stop of this scope.
    fn keeps_opencode(&self, scope: StopScope) -> bool {
        match scope {
            StopScope::DaemonOnly => true,
            StopScope::OwnOpencode => self.supervisor.shared().is_some(),
            StopScope::Service => false,
        }
    }

    fn health(&self) -> Health {
        let (state, status) = (self.store.snapshot(), self.supervisor.status());
        let measured = |mut info: ProcessInfo| {
            info.memory = process::memory(info.pid);
            info
        };
        Health {
            ok: status.phase == Phase::Ready,
            api_version: API_VERSION,
            cli_version: env!("CARGO_PKG_VERSION").to_owned(),
            daemon: measured(self.info.clone()),
            engine: status.engine_info(),
            opencode: status.process.map(measured),
            active_id: state.active_id.clone(),
            workspace_count: state.workspaces.len(),
        }
    }

    fn add(&self, place: Place, name: Option<&str>) -> Result<(Arc<Workspace>, bool)> {
        let state = self.store.latest();
        let existing = place.entry(&state.workspaces).or_else(|| place.linked_entry(&state.workspaces)).cloned();
        let ((workspace, created), active_id) = match (existing, name) {
            (Some(existing), Some(name)) if name != existing.name => self.store.update(|state| {
                let renamed = state.rename(&existing.id, name)?;
                Ok(((renamed, false), state.active_id.clone()))
            })?,
            // An existing workspace needs no write.
            (Some(existing), _) => return Ok((existing, false)),
            (None, _) => self.store.update(|state| Ok((state.add(place, name)?, state.active_id.clone())))?,
        };
        // A client may have loaded its instance directly before.
        self.instances.register(&workspace.path);
        if created {
            self.events.publish(EventKind::WorkspaceAdded { workspace: workspace.clone(), active_id });
        } else if name.is_some() {
            self.events.publish(EventKind::WorkspaceRenamed { workspace: workspace.clone(), active_id });
        }
        Ok((workspace, created))
    }

    /// Changes the workspace that `find` selects, and publishes the event.
    fn change(
        &self,
        find: impl FnOnce(&State) -> Result<&Arc<Workspace>>,
        event: impl FnOnce(Arc<Workspace>, String) -> EventKind,
        change: impl FnOnce(&mut State, &str) -> Result<Arc<Workspace>>,
    ) -> Result<Arc<Workspace>> {
        // Outside of the update: finding a workspace by path accesses its disk, which may hang.
        let id = find(&self.store.latest())?.id.clone();
        let (workspace, active_id) = self.store.update(|state| Ok((change(state, &id)?, state.active_id.clone())))?;
        // Its instance stays subject to eviction, even if this change removes the workspace.
        self.instances.register(&workspace.path);
        self.events.publish(event(workspace.clone(), active_id));
        Ok(workspace)
    }

    /// Moves a workspace to another directory. Clients that follow the registry see one workspace removed and
    /// another added.
    fn relocate(&self, selector: &str, path: &Path) -> Result<Arc<Workspace>> {
        let id = self.store.latest().find_exactly(selector)?.id.clone();
        let place = Place::local(path)?;
        let ((before, after), active_id) =
            self.store.update(|state| Ok((state.relocate(&id, place)?, state.active_id.clone())))?;
        if before.id != after.id {
            // The instance of the old directory is evicted like any other.
            self.instances.register(&before.path);
            self.instances.register(&after.path);
            self.events.publish(EventKind::WorkspaceRemoved { workspace: before, active_id: active_id.clone() });
            self.events.publish(EventKind::WorkspaceAdded { workspace: after.clone(), active_id });
        }
        Ok(after)
    }
}

/// How a daemon starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// As the command of a terminal or a service manager.
    Foreground,
    /// In the background, for a client: in its own session, without the client's descriptors. Reports on
    /// standard output in one line of JSON whether it listens.
    Detached,
    /// By exec in the process of another daemon.
    Successor,
}

/// Runs a daemon to its end.
///
/// # Errors
/// Whatever keeps the daemon from starting. A detached one also reports it on standard output.
pub fn run(data_dir: &DataDir, options: &Options, start: Start) -> Result<()> {
    signals::unblock_all();
    limits::raise_descriptor_limit();
    let passed = if start == Start::Foreground { passed_listener(options)? } else { None };
    let detached = start == Start::Detached;
    if detached {
        limits::close_inherited_descriptors();
        // Fails only for the leader of a group, which a spawned process is not.
        let _ = rustix::process::setsid();
    }
    // Handled from here on, whatever the parent ignored. HUP, USR1 and USR2 have no meaning here; with XFSZ
    // handled, a write beyond the file size limit fails like one on a full disk.
    let handled = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGCHLD, SIGXFSZ]);
    let signals = handled.map_err(|e| Error::Internal(format!("cannot handle signals: {e}")));
    if start == Start::Successor {
        let (lock, listener) = handover::receive(data_dir)?;
        return prepare(data_dir).and_then(|()| serve(data_dir, options, start, lock, signals?, Some(listener), || {}));
    }
    let tell = |outcome: std::result::Result<(), &Error>| {
        if detached {
            tell_starter(outcome);
        }
    };
    let prepared = limits::require_descriptors().and_then(|()| prepare(data_dir));
    let result = prepared.and_then(|()| match take_lock(data_dir)? {
        Some(lock) => serve(data_dir, options, start, lock, signals?, passed, || tell(Ok(()))),
        // Another start won the race: a daemon runs, as the client wanted.
        None if detached => {
            tell(Ok(()));
            Ok(())
        }
        None => Err(Error::DaemonStartFailed(format!("one is already running in {}", data_dir.path().display()))),
    });
    if let Err(e) = &result {
        tell(Err(e));
    }
    result
}

/// The listening socket that a service manager passes to this daemon, if any.
///
/// # Errors
/// `usage` for anything but one socket that listens on 127.0.0.1, at the requested port.
fn passed_listener(options: &Options) -> Result<Option<TcpListener>> {
    let refused = |what: &str| Error::Usage {
        message: format!("cannot listen where the service manager does: {what}"),
        hint: Some(format!("a socket unit for openwork has one line ListenStream=127.0.0.1:{DEFAULT_PORT}")),
    };
    let socket = limits::take_passed_socket().map_err(|e| match e.kind() {
        io::ErrorKind::InvalidInput => refused("it passes several sockets"),
        _ => refused(&format!("it passes no socket ({e})")),
    })?;
    let Some(listener) = socket.map(TcpListener::from) else { return Ok(None) };
    if !rustix::net::sockopt::socket_acceptconn(&listener).is_ok_and(|listens| listens) {
        return Err(refused("its socket takes no connections"));
    }
    match listener.local_addr() {
        Ok(SocketAddr::V4(address)) if *address.ip() != Ipv4Addr::LOCALHOST => {
            Err(refused(&format!("{} is not 127.0.0.1", address.ip())))
        }
        Ok(SocketAddr::V4(address)) if options.port.is_some_and(|port| port != address.port()) => {
            Err(refused(&format!("port {} is not the one of --daemon-port", address.port())))
        }
        Ok(SocketAddr::V4(_)) => Ok(Some(listener)),
        Ok(SocketAddr::V6(address)) => Err(refused(&format!("{} is not 127.0.0.1", address.ip()))),
        Err(_) => Err(refused("its socket is not of the internet")),
    }
}

/// Writes one line to the waiting client, and then detaches from the pipe, which the client closes soon.
fn tell_starter(outcome: std::result::Result<(), &Error>) {
    let line = match outcome {
        Ok(()) => serde_json::to_string(&Done { ok: true }),
        Err(e) => serde_json::to_string(&Failure::from(e)),
    };
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{}", line.unwrap_or_default());
    let _ = stdout.flush();
    if let Ok(null) = OpenOptions::new().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

/// Creates the data directory and makes it the working directory.
fn prepare(data_dir: &DataDir) -> Result<()> {
    data_dir.create()?;
    let cwd = data_dir.opencode_cwd();
    create_private(&cwd).map_err(|e| Error::io("create", &cwd, e))?;
    // Through a descriptor, so that a planted link is not followed.
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
    OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(&cwd)
        .and_then(|directory| directory.set_permissions(Permissions::from_mode(0o700)))
        .map_err(|e| Error::io("narrow the mode of", &cwd, e))?;
    std::env::set_current_dir(data_dir.path()).map_err(|e| Error::io("enter", data_dir.path(), e))
}

/// Takes the lock; `None` when another daemon holds it.
fn take_lock(data_dir: &DataDir) -> Result<Option<Lock>> {
    let path = data_dir.daemon_lock();
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        if let Some(lock) = lock::try_exclusive(&path)? {
            return Ok(Some(lock));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(LOCK_INTERVAL);
    }
}

/// Serves until the end, on the socket that a predecessor or a service manager passed, or on a new one.
fn serve(
    data_dir: &DataDir,
    options: &Options,
    start: Start,
    lock: Lock,
    mut signals: Signals,
    passed: Option<TcpListener>,
    listening: impl FnOnce(),
) -> Result<()> {
    let _ = log::bound(&data_dir.daemon_log());
    let store = forever(Store::open(data_dir, &lock.file)?);
    let auth = Auth::load_or_create(data_dir)?;
    let listener = passed.map_or_else(|| bind(options.port, &store.snapshot()), Ok)?;
    let no_socket = |e| Error::Internal(format!("cannot listen: {e}"));
    let port = listener.local_addr().map_err(no_socket)?.port();
    let gate = forever(Gate::new(listener, &options.origins).map_err(no_socket)?);
    let control = forever(ControlPlane::listen()?);
    let info = ProcessInfo {
        pid: std::process::id(),
        port,
        base_url: format!("http://127.0.0.1:{port}"),
        started_at: now_ms(),
        memory: None,
    };
    store.update(|state| {
        let ProcessInfo { pid, port, base_url, started_at, .. } = info.clone();
        let shared = options.engine.shared;
        state.daemon = Some(DaemonRecord { pid, port, base_url, started_at, shared, extra: Map::new() });
        state.ports.daemon = port;
        Ok(())
    })?;
    if start == Start::Successor {
        // The predecessor's text is right for its successor; the new mtime tells clients that there is one.
        lock.file
            .set_modified(SystemTime::now())
            .map_err(|e| Error::io("set the time of", data_dir.daemon_lock(), e))?;
    } else {
        // The place tells clients whether the pid and the port mean anything where they run.
        let place = process::place().map(|place| format!(" {place}")).unwrap_or_default();
        (&lock.file)
            .write_all(format!("{} {port}{place}\n", info.pid).as_bytes())
            .map_err(|e| Error::io("write", data_dir.daemon_lock(), e))?;
    }
    crate::log!("openwork {} (pid {}) listens on {}", env!("CARGO_PKG_VERSION"), info.pid, info.base_url);

    let events = forever(Events::after(now_ms() * 1000));
    let instances = forever(Instances::new(store, events, options.idle_ttl));
    let (sender, receiver) = channel();
    let supervisor = Handle::new(sender);
    let credentials = Credentials::new(&auth);
    let authorizations = [Line::V1, Line::V2].map(|line| credentials.of(line).clone());
    let (data_dir, options, ending) = (data_dir.clone(), options.clone(), Ending::default());
    let engine = options.engine.clone();
    let notifier = forever(Notifier::from_environment());
    let context = Context { data_dir: data_dir.clone(), options: engine, auth, store, instances, events, notifier };
    let daemon = forever(Daemon {
        info,
        data_dir,
        options,
        ending,
        authorizations,
        store,
        supervisor,
        gate,
        control,
        instances,
        events,
        notifier,
    });
    let handle = &daemon.supervisor;
    let supervision = Supervisor::new(handle, receiver, context)?;
    // Without all of its threads the daemon would hold the lock and answer nothing, so a failed start of a
    // thread ends it. The supervisor comes last, so that there is no opencode yet.
    spawn(|| store.write_behind())?;
    spawn(|| gate.serve(daemon))?;
    spawn(|| instances.evict(handle))?;
    spawn(|| instances.listen(handle))?;
    spawn(|| control.serve(daemon))?;
    spawn(move || {
        for signal in signals.forever() {
            match signal {
                SIGTERM | SIGINT => {
                    crate::log!("stopping on signal {signal}");
                    daemon.stop(StopScope::OwnOpencode, None);
                }
                SIGCHLD => process::reap_orphans(),
                _ => {}
            }
        }
    })?;
    store.when_lost(move |lost| {
        let opencode = if lost.is_taken_over { "opencode is the other daemon's now" } else { "opencode ends too" };
        crate::log!("stopping, since another daemon may run over the same files: {opencode}");
        notifier.stopping();
        handle.stop(if lost.is_taken_over { StopScope::DaemonOnly } else { StopScope::OwnOpencode }, None);
    });
    let supervision = spawn(|| supervision.run())?;
    notifier.ready();
    listening();
    let supervised = supervision.join();
    gate.close();
    let successor = match daemon.ending.take() {
        End::Successor(successor) if supervised.is_ok() => Some(successor),
        End::Successor(_) | End::Stop | End::None => None,
    };
    if successor.is_none() {
        events.close();
    }
    gate.drain(successor.is_none());
    let written = store.update(|state| {
        state.daemon = None;
        Ok(())
    });
    // A stale record is harmless: the lock contradicts it.
    if let Err(e) = &written {
        crate::log!("{e}");
    }
    if let Some(successor) = successor {
        return Err(successor.succeed(&lock, gate.listener()));
    }
    // Otherwise the socket may belong to the other daemon.
    if store.lost().is_none() {
        let _ = std::fs::remove_file(CONTROL_SOCKET);
    }
    // The lock is held until the process has ended.
    std::mem::forget(lock);
    if supervised.is_err() {
        crate::log!("the supervisor failed; opencode is left for the next daemon");
        // A service manager restarts a daemon that a signal ended; exit status 1 would mean that a restart
        // fails in the same way (see the unit).
        std::process::abort();
    }
    crate::log!("stopped");
    match (written, store.lost()) {
        // The failure makes a service manager start another daemon, in a new directory.
        (Err(e), Some(_)) => Err(e),
        (Ok(()) | Err(_), _) => Ok(()),
    }
}

/// Leaks a value, since the daemon's threads share it for the life of the process.
fn forever<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

/// Starts one of the daemon's threads.
///
/// # Errors
/// When the system has no thread for it.
fn spawn(work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    Builder::new().spawn(work).map_err(|e| Error::Internal(format!("cannot start a thread: {e}")))
}

/// Binds the requested port; without one, the port used last, then 6174, then any.
fn bind(port: Option<u16>, state: &State) -> Result<TcpListener> {
    let try_port = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    let failed = |e| Error::Internal(format!("cannot listen on 127.0.0.1: {e}"));
    if let Some(port) = port {
        return try_port(port).map_err(|e| match e.kind() {
            io::ErrorKind::AddrInUse => Error::PortInUse { port, option: "--daemon-port" },
            io::ErrorKind::PermissionDenied => Error::PermissionDenied {
                what: format!("not allowed to listen on port {port}"),
                path: Path::new("--daemon-port").to_owned(),
            },
            _ => failed(e),
        });
    }
    for port in [state.ports.daemon, DEFAULT_PORT] {
        if let (true, Ok(listener)) = (port != 0, try_port(port)) {
            return Ok(listener);
        }
    }
    try_port(0).map_err(failed)
}
