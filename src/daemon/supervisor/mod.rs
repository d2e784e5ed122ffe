//! The one thread that owns opencode.
//!
//! Only this thread starts, watches, adopts and ends the process; the rest of the daemon holds a
//! [`Handle`]. The [`policy`] makes every decision and has no side effects. Helper threads do everything
//! that may block (disk writes, calls to opencode, ending its descendants) and report with a [`Message`].
//! This thread translates messages into events of the policy, and the policy's actions into jobs, signals
//! and notices; it never blocks, so it always reacts at once.
//!
//! The helper threads start before opencode does: running out of threads can end the daemon at its
//! start, and never looks like a failure of opencode later.
//!
//! ```text
//! handle    what the rest of the daemon sees of opencode
//! policy    the decisions; limits: its times; silence: evidence that an unresponsive process works
//! worker    version, launch, adoption, reaping: one job after the other
//! prober    checks the listening socket and the health of the process
//! watcher   detects the exit of the process, bounds its log
//! ```

pub mod handle;
mod limits;
mod policy;
mod prober;
mod silence;
#[cfg(test)]
mod simulation;
mod watcher;
mod worker;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::Builder;
use std::time::Instant;

use super::engine::{Credentials, Endpoint};
use super::events::{EventKind, Events};
use super::instances::Instances;
use super::notify::{Notifier, Reporter};
use crate::agent::Listener;
use crate::error::{Error, Result};
use crate::options::EngineOptions;
use crate::paths::DataDir;
use crate::state::{Auth, EngineRecord, Store};
use crate::system::wait::Flag;
use crate::wire::ProcessInfo;

use self::handle::{Handle, Message, Report};
use self::limits::Limits;
pub use self::policy::StopScope;
use self::policy::{Action, Answer, Cause, Event, Launched, Notice, Policy, Probe};
use self::prober::{ProbeRequest, Prober, Target};
use self::watcher::Watcher;
use self::worker::{EndedProcess, Engine, Job, Started, Worker};

/// The supervisor's dependencies.
pub struct Context {
    /// Holds the logs, the lock and opencode's working directory.
    pub data_dir: DataDir,
    /// The options that concern opencode.
    pub options: EngineOptions,
    /// The credentials that opencode starts with.
    pub auth: Auth,
    /// Records the process in the state file.
    pub store: &'static Store,
    /// The instances that opencode has loaded.
    pub instances: &'static Instances,
    /// Publishes the daemon's events.
    pub events: &'static Events,
    /// Notifies the service manager.
    pub notifier: &'static Notifier,
}

/// The process under supervision.
struct Held {
    started: Started,
    /// The address for calls, once the listening socket is known.
    endpoint: Option<Arc<Endpoint>>,
}

impl Held {
    fn new(started: Started) -> Held {
        Held { started, endpoint: None }
    }

    fn target(&self, generation: u64) -> Target {
        let Started { engine, record, authorization, .. } = &self.started;
        Target {
            generation,
            pid: record.pid,
            line: record.line(),
            listener: Listener { address: record.address(), socket: 0, process: engine.pidfd() },
            authorization: authorization.clone(),
            is_service: engine.is_service(),
        }
    }
}

/// The state of the supervisor's thread.
pub struct Supervisor {
    handle: Handle,
    receiver: Receiver<Message>,
    jobs: Sender<Job>,
    probes: Sender<ProbeRequest>,
    watcher: Arc<Watcher>,
    /// Interrupts `--version` and commands of the user's service.
    stopping: Arc<Flag>,
    data_dir: DataDir,
    /// The credentials of an opencode of our own.
    credentials: Credentials,
    /// Whether the next opencode is the user's own service.
    is_shared: bool,
    /// The `Authorization` of the user's service that was used last.
    service_authorization: Option<Arc<str>>,
    store: &'static Store,
    instances: &'static Instances,
    events: &'static Events,
    notifier: &'static Notifier,
    limits: Limits,
    held: Option<Held>,
    version: Option<String>,
    /// The URL of the user's own service, if one runs beside our opencode.
    service: Option<String>,
    /// The user has been told about that service.
    is_service_reported: bool,
    /// The pid of the client that requested the stop; it may be a descendant of opencode.
    client: Option<u32>,
}

impl Supervisor {
    /// Starts the helper threads of a supervisor that is yet to run.
    ///
    /// # Errors
    /// When threads or descriptors run out.
    pub fn new(handle: &Handle, receiver: Receiver<Message>, context: Context) -> Result<Supervisor> {
        let Context { data_dir, options, auth, store, instances, events, notifier } = context;
        let no_flag = |e| Error::Internal(format!("cannot start the supervisor: {e}"));
        let stopping = Arc::new(Flag::new().map_err(no_flag)?);
        let watcher = Arc::new(Watcher::new(data_dir.opencode_log()).map_err(no_flag)?);
        let limits = Limits::of_this_daemon();
        let credentials = Credentials::new(&auth);
        let ((jobs, for_worker), (probes, for_prober)) = (channel(), channel());
        let messages = || handle.messages.clone();
        let prober = Prober {
            data_dir: data_dir.clone(),
            store,
            instances,
            max_memory: options.max_memory,
            messages: messages(),
        };
        let is_shared = options.shared;
        let worker = Worker {
            data_dir: data_dir.clone(),
            options,
            auth,
            credentials: credentials.clone(),
            store,
            instances,
            grace: limits.sweep,
            messages: messages(),
            stopping: stopping.clone(),
            binary: None,
        };
        help(messages(), move || worker.run(for_worker))?;
        help(messages(), move || prober.run(for_prober))?;
        let (watching, exits) = (watcher.clone(), messages());
        help(messages(), move || watching.run(&exits))?;
        Ok(Supervisor {
            handle: handle.clone(),
            receiver,
            jobs,
            probes,
            watcher,
            stopping,
            data_dir,
            credentials,
            is_shared,
            service_authorization: None,
            store,
            instances,
            events,
            notifier,
            limits,
            held: None,
            version: None,
            service: None,
            is_service_reported: false,
            client: None,
        })
    }

    /// Runs until a stop has ended opencode, or left it to the next daemon.
    pub fn run(mut self) {
        let mut actions = Vec::new();
        let recorded = self.store.snapshot().opencode.is_some();
        let mut policy = Policy::new(self.limits.clone(), recorded, &mut actions);
        let mut reporter = Reporter::new(self.notifier);
        loop {
            for action in actions.drain(..) {
                self.act(action, policy.generation());
            }
            self.publish(&policy);
            if policy.is_stopped() {
                return;
            }
            let report_at = reporter.report(|| self.handle.status(), Instant::now());
            let message = match [policy.next_deadline(), report_at].into_iter().flatten().min() {
                None => self.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => self.receiver.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            let event = match message {
                Ok(message) => self.event(message),
                // Only the report to the service manager was due.
                Err(RecvTimeoutError::Timeout) if policy.next_deadline().is_none_or(|at| at > Instant::now()) => {
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => Event::Timer,
                // Unreachable, since `handle` holds a sender; continuing would spin.
                Err(RecvTimeoutError::Disconnected) => Event::Stop { scope: StopScope::DaemonOnly },
            };
            policy.handle(event, Instant::now(), &mut actions);
        }
    }

    /// Translates a message into an event of the policy, and keeps the data that the policy does not need.
    fn event(&mut self, message: Message) -> Event {
        match message {
            Message::Need => Event::Need,
            Message::Suspect { generation } => Event::Suspect { generation },
            Message::Stop { scope, client } => {
                self.client = client;
                Event::Stop { scope }
            }
            Message::Adopted { job, found: None } => Event::Adopted { job, found: None },
            Message::Adopted { job, found: Some((process, record, checked)) } => {
                // Output from before the adoption does not explain a later failure.
                let log_start = std::fs::metadata(self.data_dir.opencode_log()).map_or(0, |metadata| metadata.len());
                let authorization = self.credentials.of(record.line()).clone();
                let engine = Engine::Ours(process);
                self.held = Some(Held::new(Started { engine, record, authorization, log_start }));
                Event::Adopted { job, found: Some(checked) }
            }
            Message::Version { job, result } => {
                let result = result.map(|(version, checked)| {
                    self.version = Some(version);
                    checked
                });
                Event::VersionKnown { job, result }
            }
            Message::Launched { job, result } => {
                let result = result.map(|started| match started {
                    Some(started) => {
                        if started.engine.is_service() {
                            self.service_authorization = Some(started.authorization.clone());
                        }
                        self.held = Some(Held::new(started));
                        Launched::Running
                    }
                    None => Launched::Absent,
                });
                Event::Launched { job, result }
            }
            Message::Probed { generation, report } => {
                Event::Probed { generation, probe: self.probe(generation, report) }
            }
            Message::Disposed { job } => Event::Disposed { job },
            Message::Exited { generation } => Event::Exited { generation },
            Message::Reaped { job, end } => Event::Reaped { job, end },
            Message::Broken => panic!("a helper thread of the supervisor panicked"),
        }
    }

    fn probe(&mut self, generation: u64, report: Report) -> Probe {
        let Report { answer, version, socket, cpu, log, memory, service } = report;
        if matches!(answer, Answer::Healthy) {
            self.service = service;
            self.report_service();
        }
        if version.is_some() {
            self.version = version;
        }
        if let (Some(held), Some(socket)) = (&mut self.held, socket) {
            let is_known = held.endpoint.as_ref().is_some_and(|known| known.listener.socket == socket);
            if !is_known {
                let Target { line, listener, authorization, .. } = held.target(generation);
                let listener = Listener { socket, ..listener };
                held.endpoint = Some(Endpoint::new(listener, generation, line, authorization));
            }
        }
        Probe { answer, cpu, log, heard: self.handle.shared.was_heard(generation), memory }
    }

    /// Tells the user, once, about a service that runs beside our opencode: both work on the same data,
    /// each with its own events, running sessions and MCP servers.
    fn report_service(&mut self) {
        if let (Some(url), false) = (&self.service, self.is_service_reported) {
            let notice = format!(
                "plain `opencode` has a server of its own on {url}, which knows nothing of what runs in openwork's; \
                 `openwork daemon restart --all --shared` has one for both"
            );
            crate::log!("{notice}");
            self.store.tell(notice);
            self.is_service_reported = true;
        }
    }

    /// Carries out an action of the policy, or hands it to a helper.
    fn act(&mut self, action: Action, generation: u64) {
        match action {
            Action::Adopt { job } => self.job(Job::Adopt { job }),
            Action::AskVersion { job, limit } => self.job(Job::Version { job, limit }),
            Action::Cancel => self.stopping.raise(),
            Action::Launch { job, start } => self.job(Job::Launch { job, start }),
            Action::Watch => {
                let Some(held) = &self.held else { return };
                let EngineRecord { instances, strangers, .. } = &held.started.record;
                self.instances.begin(generation, instances.clone(), strangers.as_deref());
                self.watcher.watch(Some((held.started.engine.pidfd(), generation)));
            }
            Action::Probe { limit, ready } => {
                let Some(held) = &self.held else { return };
                let _ = self.probes.send(ProbeRequest { target: held.target(generation), limit, is_ready: ready });
            }
            Action::Dispose { job, limit } => {
                let Some(held) = &self.held else { return };
                let (target, deadline) = (held.target(generation), Instant::now() + limit);
                self.job(Job::Dispose { job, target, deadline });
            }
            Action::Signal(signal) => {
                // The user's service is never signalled.
                if let Some(Held { started: Started { engine: Engine::Ours(process), .. }, .. }) = &self.held {
                    process.signal(signal);
                }
            }
            Action::Reap { job, cause } => {
                let Some(Held { started, .. }) = self.held.take() else { return };
                self.job(Job::Reap { job, ended: EndedProcess { generation, started, cause }, client: self.client });
            }
            Action::CommandService { job, verb } => {
                let Some(Held { started, .. }) = self.held.take() else { return };
                self.job(Job::CommandService {
                    job,
                    ended: EndedProcess { generation, started, cause: Cause::Wanted },
                    verb,
                });
            }
            Action::Release => self.watcher.watch(None),
            Action::Publish(notice) => self.publish_event(notice, generation),
            Action::Log(error) => crate::log!("{error}"),
        }
    }

    fn job(&self, job: Job) {
        let _ = self.jobs.send(job);
    }

    fn publish_event(&self, notice: Notice, generation: u64) {
        let pid = self.held.as_ref().map_or(0, |held| held.started.record.pid);
        self.events.publish(match notice {
            Notice::Starting => EventKind::EngineStarting { generation, pid },
            Notice::Ready { adopted } => {
                let how = if adopted { "adopted" } else { "ready" };
                let version = self.version.as_deref().unwrap_or_default();
                let address = self.held.as_ref().map(|held| held.started.record.base_url.as_str()).unwrap_or_default();
                crate::log!("opencode {version} is {how} on {address} (pid {pid})");
                EventKind::EngineReady { generation, pid }
            }
            Notice::Exited { how, pid } => EventKind::EngineExited { generation, pid, reason: how },
            Notice::Failed { error } => EventKind::EngineFailed { error },
            Notice::TooLarge { recycled: true } => {
                crate::log!("opencode uses more than --max-memory, and no session runs: restarting it");
                EventKind::EngineRecycled { generation, pid }
            }
            Notice::TooLarge { recycled: false } => {
                crate::log!("opencode uses more than --max-memory: restarting it as soon as no session runs");
                EventKind::EngineTooLarge { generation, pid }
            }
        });
    }

    /// Publishes the status to all handles.
    fn publish(&self, policy: &Policy) {
        let generation = policy.generation();
        let process = self.held.as_ref().map(|Held { started: Started { record, .. }, .. }| ProcessInfo {
            pid: record.pid,
            port: record.port,
            base_url: record.base_url.clone(),
            started_at: record.started_at,
            memory: None,
        });
        let shared = self.held.as_ref().map_or(self.is_shared, |held| held.started.engine.is_service());
        let is_ready = policy.phase() == crate::wire::Phase::Ready;
        let endpoint = self.held.as_ref().and_then(|held| held.endpoint.clone());
        // Every probe leads here, so closing idle connections needs no timer of its own.
        endpoint.iter().for_each(|endpoint| endpoint.close_kept(is_ready));
        let ready = endpoint.filter(|_| is_ready);
        self.handle.shared.publish(|status| {
            status.phase = policy.phase();
            status.generation = generation;
            status.restarts = policy.restarts();
            status.version.clone_from(&self.version);
            status.last_error = policy.last_error().cloned();
            status.process = process;
            status.ready = ready;
            status.service.clone_from(&self.service);
            status.shared = shared;
            status.service_authorization.clone_from(&self.service_authorization);
            status.failures = policy.failures();
            status.checks = policy.checks();
            status.stopping = policy.is_stopping();
        });
    }
}

/// Reports a panic of a helper thread to the supervisor.
struct Guard(Sender<Message>);

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.0.send(Message::Broken);
        }
    }
}

/// Starts a helper thread.
///
/// # Errors
/// When the system cannot start a thread.
fn help(messages: Sender<Message>, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let guard = Guard(messages);
    let started = Builder::new().spawn(move || {
        let _guard = guard;
        work();
    });
    started.map(|_| ()).map_err(|e| Error::Internal(format!("cannot start a thread: {e}")))
}
