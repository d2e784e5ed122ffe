//! The supervisor's blocking jobs: finding the binary and its version; launching, adopting and reaping a
//! process; finding the user's own service, and running the commands that start, restart and stop it. The
//! thread does one job after the other and answers each with a message.
//!
//! Invariants: the identity that proves a process ours is on disk before the process runs opencode; the
//! user's service and its descendants are never signalled ([`Engine`] offers no way to).

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::Signal;

use super::handle::Message;
use super::policy::{Cause, Checked, End};
use super::prober::{self, Target};
use crate::daemon::engine::{self, Credentials, Verb};
use crate::daemon::instances::{Failure, Instances};
use crate::error::{Error, Result};
use crate::line::{Line, migration};
use crate::lock;
use crate::log::{self, now_ms};
use crate::options::EngineOptions;
use crate::paths::{DataDir, find_opencode};
use crate::service::{self, Service};
use crate::state::{Auth, BinaryRecord, EngineRecord, Store, random_hex};
use crate::system;
use crate::system::limits::is_exhausted;
use crate::system::process::{self, Identity, Process};
use crate::system::wait::{self, Flag};

/// How much of opencode's output a failure quotes. Lines.
const LAST_LINES: usize = 20;
/// The longest output of `--version` that is read: a version has a few bytes. Bytes.
const VERSION_LENGTH: usize = 4096;

/// The time limit for `opencode service start` and `restart`. They return when the service answers: after
/// 5 s, another 15 s for the orderly end of its predecessor, and more on a slow machine.
const START_LIMIT: Duration = Duration::from_secs(60);
/// The time limit for `opencode service stop`: an orderly end takes up to 15 s, and the daemon's own stop is
/// limited to 45 s.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How long to wait for the registration after the command has returned; it should exist by then.
const REGISTERED_LIMIT: Duration = Duration::from_secs(5);
/// The interval between searches for the registration.
const REGISTERED_INTERVAL: Duration = Duration::from_millis(50);

/// A job.
pub enum Job {
    /// Find the opencode that the state file names; if it has ended, end its descendants.
    Adopt { job: u64 },
    /// Find the binary and its version.
    Version { job: u64, limit: Duration },
    /// Launch a process; or find the user's service, and start it if `start` is set and it does not run.
    Launch { job: u64, start: bool },
    /// Dispose all instances of opencode.
    Dispose { job: u64, target: Target, deadline: Instant },
    /// End the descendants of a process that has ended, and reap it. `client` is the pid of the client that
    /// requested its end, perhaps one of the descendants.
    Reap { job: u64, ended: EndedProcess, client: Option<u32> },
    /// Run a command of the user's service.
    CommandService { job: u64, ended: EndedProcess, verb: Verb },
}

/// The process of an opencode.
pub enum Engine {
    /// Started by this daemon or an earlier one.
    Ours(Process),
    /// The user's own service.
    Service(Arc<OwnedFd>),
}

impl Engine {
    /// A descriptor that becomes readable when the process ends.
    pub fn pidfd(&self) -> Arc<OwnedFd> {
        match self {
            Engine::Ours(process) => process.pidfd(),
            Engine::Service(pidfd) => pidfd.clone(),
        }
    }

    /// Whether it is the user's own service.
    pub fn is_service(&self) -> bool {
        matches!(self, Engine::Service(_))
    }
}

/// An opencode that was started or found, and recorded.
pub struct Started {
    /// The process.
    pub engine: Engine,
    /// Its record in the state file.
    pub record: EngineRecord,
    /// The `Authorization` that it accepts.
    pub authorization: Arc<str>,
    /// Where its output begins in the log. Bytes.
    pub log_start: u64,
}

/// A process that has ended, or that the daemon no longer uses.
pub struct EndedProcess {
    /// The number of the process.
    pub generation: u64,
    /// The process, not reaped yet.
    pub started: Started,
    /// Why it has ended.
    pub cause: Cause,
}

/// Does the jobs.
pub struct Worker {
    /// Holds the logs, the lock and opencode's working directory.
    pub data_dir: DataDir,
    /// The options that concern opencode.
    pub options: EngineOptions,
    /// The credentials that opencode starts with.
    pub auth: Auth,
    /// The same as `Authorization` values.
    pub credentials: Credentials,
    /// Records the process in the state file.
    pub store: &'static Store,
    /// The instances that opencode has loaded.
    pub instances: &'static Instances,
    /// The time between TERM and KILL for descendants that outlive opencode.
    pub grace: Duration,
    /// The channel to the supervisor.
    pub messages: Sender<Message>,
    /// Raised at a stop: interrupts `--version` and commands of the user's service.
    pub stopping: Arc<Flag>,
    /// The binary that was found last, its version and its line.
    pub binary: Option<(PathBuf, String, Line)>,
}

impl Worker {
    /// Does jobs for as long as the daemon lives.
    pub fn run(mut self, jobs: Receiver<Job>) {
        for job in jobs {
            let message = match job {
                Job::Adopt { job } => Message::Adopted { job, found: self.adopt() },
                Job::Version { job, limit } => Message::Version { job, result: self.version(limit) },
                Job::Launch { job, start } if self.options.shared => {
                    Message::Launched { job, result: self.find_service(start) }
                }
                Job::Launch { job, .. } => Message::Launched { job, result: self.launch().map(Some) },
                Job::Dispose { job, target, deadline } => {
                    if let Ok(Some((endpoint, _))) = prober::find(&target) {
                        let _ = endpoint.dispose_all(deadline);
                    }
                    Message::Disposed { job }
                }
                Job::Reap { job, ended, client } => Message::Reaped { job, end: self.reap(ended, client) },
                Job::CommandService { job, ended, verb } => {
                    Message::Reaped { job, end: self.command_service(ended, verb) }
                }
            };
            let _ = self.messages.send(message);
        }
    }

    fn adopt(&self) -> Option<(Process, EngineRecord, Checked)> {
        // The user's service is found by its registration, not by our record.
        let record = self.store.snapshot().opencode.clone().filter(|record| record.service.is_none())?;
        let Some(process) = Process::adopt(&record.identity()) else {
            if !record.engine_id.is_empty() {
                process::sweep(&record.engine_id, self.grace, &[]);
            }
            return None;
        };
        crate::log!("found opencode (pid {}) of an earlier daemon", record.pid);
        let age = Duration::from_millis(now_ms().saturating_sub(record.started_at));
        let lifecycle = engine::lifecycle(record.line());
        Some((process, record, Checked { lifecycle, age }))
    }

    /// Finds the binary, and its version: the recorded one, else from `--version`.
    fn version(&mut self, limit: Duration) -> Result<(String, Checked)> {
        let (binary, metadata) = find_opencode(self.options.binary.as_deref())?;
        let mut record = BinaryRecord::of(&binary, &metadata);
        let known = self.store.snapshot().binaries.as_ref().and_then(|binaries| binaries.opencode.clone());
        let before = known.as_ref().and_then(|known| Line::of(known.actual_version.as_deref()?));
        let (version, line) =
            match known.filter(|known| known.is_same_file(&record)).and_then(|known| known.actual_version) {
                Some(version) => engine::check_version(&binary, &version)?,
                None => {
                    let (version, line) = self.ask_version(&binary, limit)?;
                    record.actual_version = Some(version.clone());
                    self.remember(record);
                    (version, line)
                }
            };
        if let Some(warning) = migration(before, line) {
            crate::log!("{warning}");
        }
        if self.options.shared && line == Line::V1 {
            return Err(Error::OpencodeUnsupported { path: binary, version, shared: true });
        }
        self.instances.version_is(&version);
        self.binary = Some((binary, version.clone(), line));
        let lifecycle = if self.options.shared { engine::SERVICE_LIFECYCLE } else { engine::lifecycle(line) };
        Ok((version, Checked { lifecycle, age: Duration::ZERO }))
    }

    fn ask_version(&self, binary: &Path, limit: Duration) -> Result<(String, Line)> {
        let failed = |why: String| Error::OpencodeStartFailed(format!("{} --version {why}", binary.display()));
        let mut command = engine::version_command(binary, &self.data_dir.opencode_cwd());
        let spawned = Process::spawn(&mut command, &random_hex::<16>()?);
        let mut process = spawned.map_err(|e| spawn_failed(e, |e| failed(format!("cannot be run: {e}"))))?;
        let stdout = process.take_stdout();
        let deadline = Instant::now() + limit;
        let read = |stdout| wait::read_output(stdout, &process.pidfd(), VERSION_LENGTH, &self.stopping, deadline);
        let output = stdout.map_or(Ok(String::new()), read);
        // The output is complete: end the process with its descendants.
        process.signal(Signal::KILL);
        process.reap(Duration::ZERO, &[]);
        match output {
            Ok(output) if output.trim().is_empty() => Err(failed("printed nothing".to_owned())),
            Ok(output) => engine::check_version(binary, &output),
            Err(e) => Err(failed(format!("failed: {e}"))),
        }
    }

    /// Records the version of a binary. After a failed write, the next start runs `--version` again.
    fn remember(&self, record: BinaryRecord) {
        let written = self.store.update(|state| {
            let known = &mut state.binaries.get_or_insert_default().opencode;
            let extra = known.take().filter(|known| known.path == record.path).map(|known| known.extra);
            *known = Some(BinaryRecord { extra: extra.unwrap_or_default(), ..record });
            Ok(())
        });
        if let Err(e) = written {
            crate::log!("{e}");
        }
    }

    /// The binary, version and line of the last version check.
    fn binary(&self) -> Result<&(PathBuf, String, Line)> {
        self.binary.as_ref().ok_or_else(|| Error::Internal("a launch came before its version check".to_owned()))
    }

    /// Launches opencode; the process waits until it is recorded before it runs opencode.
    fn launch(&self) -> Result<Started> {
        let (binary, version, line) = self.binary()?;
        let lock = self.data_dir.opencode_lock();
        require_unlocked(&lock)?;
        let address = engine::choose_address(&self.options, &self.store.snapshot().ports)?;
        let engine_id = random_hex::<16>()?;
        let log_path = self.data_dir.opencode_log();
        let log = log::open(&log_path).map_err(|e| Error::io("open", &log_path, e))?;
        let log_too = log.try_clone().map_err(|e| Error::io("open", &log_path, e))?;
        let log_start = log.metadata().map_or(0, |metadata| metadata.len());
        let mut command = engine::launch_command(binary, *line, address, &self.auth, &lock);
        command.current_dir(self.data_dir.opencode_cwd()).stdout(log).stderr(log_too);
        let failed = |e| Error::OpencodeStartFailed(format!("cannot start {}: {e}", binary.display()));
        let mut process = Process::spawn_leader(&mut command, &engine_id).map_err(|e| spawn_failed(e, failed))?;
        let Identity { pid, start_ticks, boot_id, engine_id } = process.identity().clone();
        let record = EngineRecord {
            pid,
            port: address.port(),
            base_url: format!("http://{address}"),
            started_at: now_ms(),
            engine_id,
            start_ticks,
            boot_id,
            version: Some(version.clone()),
            instances: Vec::new(),
            strangers: None,
            service: None,
            extra: serde_json::Map::new(),
        };
        let written = self.store.update(|state| {
            state.opencode = Some(record.clone());
            state.ports.keep_opencode_address(address);
            Ok(())
        });
        let unblocked = written.and_then(|()| {
            engine::unblock(process.take_stdin())
                .map_err(|e| Error::OpencodeStartFailed(format!("it ended at once: {e}")))
        });
        if let Err(e) = unblocked {
            process.signal(Signal::KILL); // it has not run opencode yet, so nothing is lost
            process.reap(Duration::ZERO, &[]);
            self.forget();
            return Err(e);
        }
        crate::log!("starting {} on {address} (pid {pid})", binary.display());
        let authorization = self.credentials.of(*line).clone();
        Ok(Started { engine: Engine::Ours(process), record, authorization, log_start })
    }

    /// Finds the user's service; with `start`, starts it first if it does not run. `None` when it does not
    /// run.
    fn find_service(&self, start: bool) -> Result<Option<Started>> {
        require_unlocked(&self.data_dir.opencode_lock())?;
        let path = service::path()?;
        let find = || service::read(&path)?.map_or(Ok(None), service::prove);
        let mut found = find()?;
        if found.is_none() && start {
            self.command(Verb::Start, START_LIMIT)?;
            let deadline = Instant::now() + REGISTERED_LIMIT;
            found = find()?;
            while found.is_none() && Instant::now() < deadline && !self.stopping.is_raised() {
                thread::sleep(REGISTERED_INTERVAL);
                found = find()?;
            }
            if found.is_none() {
                return Err(Error::OpencodeStartFailed(format!(
                    "`opencode service start` succeeded, but {} names no running service of this user",
                    path.display()
                )));
            }
        }
        let Some(Service { registration, listener }) = found else { return Ok(None) };
        let log_start = std::fs::metadata(self.data_dir.opencode_log()).map_or(0, |metadata| metadata.len());
        let record = EngineRecord {
            pid: registration.pid,
            port: listener.address.port(),
            base_url: format!("http://{}", listener.address),
            started_at: process::started_at(registration.pid).unwrap_or_else(now_ms),
            engine_id: String::new(),
            start_ticks: 0,
            boot_id: String::new(),
            version: registration.version.clone().or_else(|| Some(self.binary.as_ref()?.1.clone())),
            instances: Vec::new(),
            strangers: None,
            service: Some(path.to_string_lossy().into_owned()),
            extra: serde_json::Map::new(),
        };
        self.store.update(|state| {
            state.opencode = Some(record.clone());
            Ok(())
        })?;
        crate::log!("found the opencode service (pid {}) on {}", record.pid, record.base_url);
        let authorization = registration.authorization().into();
        Ok(Some(Started { engine: Engine::Service(listener.process), record, authorization, log_start }))
    }

    /// Runs a command of the user's service; its output goes to opencode's log.
    fn command(&self, verb: Verb, limit: Duration) -> Result<()> {
        let (binary, ..) = self.binary()?;
        let what = format!("{} service {}", binary.display(), verb.name());
        let log_path = self.data_dir.opencode_log();
        let log = log::open(&log_path).map_err(|e| Error::io("open", &log_path, e))?;
        let log_too = log.try_clone().map_err(|e| Error::io("open", &log_path, e))?;
        let log_start = log.metadata().map_or(0, |metadata| metadata.len());
        let mut command = engine::service_command(binary, verb);
        command.current_dir(self.data_dir.opencode_cwd()).stdout(log).stderr(log_too);
        crate::log!("running {what}");
        let failed = |why: String| Error::OpencodeStartFailed(format!("`{what}` {why}"));
        match process::run(&mut command, engine::unblock, &self.stopping, Instant::now() + limit) {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => {
                let output = log::tail(&log_path, log_start, LAST_LINES).unwrap_or_default().join("\n");
                Err(failed(format!("ended with {status}; its last output:\n{output}")))
            }
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                Err(failed(format!("did not end within {} s", limit.as_secs())))
            }
            Err(e) => Err(spawn_failed(e, |e| failed(format!("failed: {e}")))),
        }
    }

    /// Stops or restarts the user's service by its own command. A failure of the command goes to the log;
    /// the next search finds the actual state of the service.
    fn command_service(&self, ended: EndedProcess, verb: Verb) -> End {
        let EndedProcess { generation, started: Started { record, .. }, .. } = ended;
        let limit = match verb {
            Verb::Start | Verb::Restart => START_LIMIT,
            Verb::Stop => STOP_LIMIT,
        };
        let how = match self.command(verb, limit) {
            Ok(()) => format!("ended by `opencode service {}`", verb.name()),
            Err(e) => {
                crate::log!("{e}");
                format!("not ended by `opencode service {}`", verb.name())
            }
        };
        self.instances.ended(generation, None);
        self.forget();
        End { pid: record.pid, how, output: String::new(), port_taken: false }
    }

    fn reap(&self, ended: EndedProcess, client: Option<u32>) -> End {
        let EndedProcess { generation, started: Started { engine, record, log_start, .. }, cause } = ended;
        let (address, line) = (record.address(), record.line());
        let process = match engine {
            Engine::Ours(process) => process,
            Engine::Service(_) => return self.leave(generation, &record, cause),
        };
        let Identity { pid, engine_id, .. } = process.identity().clone();
        let spared = client.map_or_else(Vec::new, |client| process::ancestors(client, &engine_id));
        let status = process.reap(self.grace, &spared);
        let how = status.map_or_else(|| "ended".to_owned(), |status| format!("ended with {status}"));
        crate::log!("opencode (pid {pid}) {how}");
        let output = log::tail(&self.data_dir.opencode_log(), log_start, LAST_LINES).unwrap_or_default().join("\n");
        let failed = match cause {
            // A workspace may have caused the hang.
            Cause::Failure => true,
            Cause::Itself => {
                !status.is_some_and(|status| was_sent_a_signal(status) || engine::is_clean_exit(line, status))
            }
            Cause::Wanted => false,
        };
        let failure = failed.then(|| Failure { how: how.clone(), output: output.clone() });
        self.instances.ended(generation, failure);
        self.forget();
        End { pid, how, output, port_taken: self.options.port.is_none() && !engine::is_free(address) }
    }

    /// Forgets the user's service without touching its descendants.
    fn leave(&self, generation: u64, record: &EngineRecord, cause: Cause) -> End {
        let how = match cause {
            Cause::Itself => "has ended",
            Cause::Failure | Cause::Wanted => "is left alone",
        };
        crate::log!("the opencode service (pid {}) {how}", record.pid);
        // Only its parent learns the exit status of a process. A service that ended while it loaded a
        // workspace may have crashed because of it.
        let failure = (cause == Cause::Itself).then(|| Failure { how: how.to_owned(), output: String::new() });
        self.instances.ended(generation, failure);
        self.forget();
        End { pid: record.pid, how: how.to_owned(), output: String::new(), port_taken: false }
    }

    /// Removes the record of a process that has ended from the state file. A failed write is harmless: the
    /// recorded identity matches no living process.
    fn forget(&self) {
        let written = self.store.update(|state| {
            state.opencode = None;
            Ok(())
        });
        if let Err(e) = written {
            crate::log!("{e}");
        }
    }
}

/// Requires that no opencode holds `opencode.lock`; such an opencode is missing from the state file.
///
/// # Errors
/// `opencode_start_failed` when an opencode holds it.
fn require_unlocked(path: &Path) -> Result<()> {
    let Some(file) = lock::if_held(path)? else { return Ok(()) };
    let failed = |e| Error::io("look for the holder of", path, e);
    Err(Error::OpencodeStartFailed(match system::lock::holder(&file, path).map_err(failed)? {
        None => "another one still runs over this data directory, in another container or on another machine: \
                 end it there"
            .to_owned(),
        Some(holder) => {
            let opencode = holder.taken_by;
            if !system::lock::has_locked(opencode, &file.metadata().map_err(failed)?, path) {
                // opencode has ended; a command that it started inherited the lock as standard input.
                return Ok(());
            }
            format!("another one, which the state file does not name, still runs: end it with `kill {opencode}`")
        }
    }))
}

/// The error for a failed spawn: `Overloaded` when processes or descriptors ran out, else `other`.
fn spawn_failed(e: std::io::Error, other: impl FnOnce(std::io::Error) -> Error) -> Error {
    let no_process = e.raw_os_error() == Some(Errno::AGAIN.raw_os_error());
    if no_process || is_exhausted(&e) { Error::Overloaded("processes") } else { other(e) }
}

/// Whether a process was ended by a signal that others send: the user, or the kernel when memory runs out.
/// A program that crashes exits, or raises other signals.
fn was_sent_a_signal(status: ExitStatus) -> bool {
    let sent = [Signal::HUP, Signal::INT, Signal::KILL, Signal::TERM];
    status.signal().is_some_and(|signal| sent.iter().any(|sent| sent.as_raw() == signal))
}
