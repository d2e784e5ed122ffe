//! Finds the daemon, starts it when none runs, and calls it.
//!
//! Invariant: the client sends nothing to a port until it has checked that the process named in
//! `daemon.lock` holds the listening socket there, holds that file open, and runs under our own user; each
//! connection is then proven to lead to that socket (`agent`). Any process may have taken the port of a dead
//! daemon, or the port number of a daemon in another container or on another machine.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use ureq::Body;
use ureq::http::Response;

use super::DETACHED_COMMAND;
use super::http::{self, Request};
use super::output::{Waiting, clean, note};
use crate::agent::{self, Limit, Listener};
use crate::error::{Code, Error, Result};
use crate::framing::{percent_decode, percent_encode};
use crate::options::{DEFAULT_PORT, MARKER, Options, SERVICE_VARIABLES, allocator};
use crate::paths::DataDir;
use crate::state::State;
use crate::system::{self, process, socket, wait};
use crate::timed::Timed;
use crate::wire::{
    BODY_LIMIT, Done, Failure, Health, LAST_EVENT_HEADER, NOTICE_HEADER, Restart, RestartReply, Session,
    TIMEOUT_HEADER, from_json,
};
use crate::{lock, log};

/// How often a lock is polled while another process is about to take or release it.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// How much longer than its deadline the client waits for a reply, so that the daemon, which knows what
/// is late, reports the timeout.
const GRACE: Duration = Duration::from_secs(1);
/// How long a daemon may hold the lock and refuse connections while it shuts down.
const LEAVING: Duration = Duration::from_secs(2);
/// How long a service manager may take to start the daemon. Its fork and exec take milliseconds; a unit
/// that fails, or serves another data directory, delays each start by this much.
const WAKING: Duration = Duration::from_secs(3);
/// The largest reply accepted, enough for a list of a million workspaces. Bytes.
const REPLY_LIMIT: u64 = 512 * 1024 * 1024;
/// The largest error object accepted. Bytes.
const FAILURE_LIMIT: u64 = 1024 * 1024;
/// How long a command waits for the daemon when the state file has the same answer.
const STATE_FALLBACK_WAIT: Duration = Duration::from_millis(250);
/// How many lines of its log are shown when a daemon exits without reporting why.
const LAST_LINES: usize = 10;

/// Whether a daemon started by this command must not inherit this variable. With the marker of an agent's
/// shell, the daemon would look like a child of the opencode that it will end; with a service's variables, it
/// would report to the service manager in that service's name.
fn is_not_the_daemons(name: &OsStr) -> bool {
    name == MARKER || SERVICE_VARIABLES.iter().any(|variable| name == *variable)
}

/// A running daemon.
#[derive(Clone, Debug)]
pub struct Address {
    /// Process id.
    pub pid: u32,
    /// On 127.0.0.1.
    pub port: u16,
    /// The listening socket there, proven to be the daemon's.
    listener: Listener,
    /// When it took the lock: the only field by which a successor differs from its predecessor.
    since: SystemTime,
}

/// Who holds the lock.
enum Holder {
    /// A process that does not listen: it is starting or shutting down.
    Unreachable,
    Listening(Address),
}

/// A command's connection to the daemon.
pub struct Client {
    /// Where its files are.
    pub data_dir: DataDir,
    /// The deadline of the whole command.
    pub deadline: Instant,
    /// The options of a daemon that this command may start; `None` when it may not start one.
    pub autostart: Option<Options>,
}

impl Client {
    /// Finds the running daemon; waits for a daemon that is about to listen.
    ///
    /// # Errors
    /// `daemon_elsewhere`; `daemon_unresponsive` when it does not listen before the deadline.
    pub fn find(&self) -> Result<Option<Address>> {
        loop {
            match self.holder()? {
                None => return Ok(None),
                Some(Holder::Listening(address)) => return Ok(Some(address)),
                Some(Holder::Unreachable) if Instant::now() < self.deadline => std::thread::sleep(POLL_INTERVAL),
                Some(Holder::Unreachable) => {
                    let why = "a process holds daemon.lock, and no port is proven to be its own";
                    return Err(Error::DaemonUnresponsive(why.to_owned()));
                }
            }
        }
    }

    /// Who holds `daemon.lock` now.
    fn holder(&self) -> Result<Option<Holder>> {
        let path = self.data_dir.daemon_lock();
        let Some(mut file) = lock::if_held(&path)? else { return Ok(None) };
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(|e| Error::io("read", &path, e))?;
        let since = file.metadata().and_then(|file| file.modified()).map_err(|e| Error::io("look at", &path, e))?;
        // `<pid> <port> <place>`; empty until the daemon listens. Version 0.1.0 wrote no place.
        let Some(line) = text.strip_suffix('\n') else { return Ok(Some(Holder::Unreachable)) };
        let mut words = line.split(' ');
        let numbers = (|| Some((words.next()?.parse::<u32>().ok()?, words.next()?.parse::<u16>().ok()?)))();
        let Some((pid, port)) = numbers else { return Ok(Some(Holder::Unreachable)) };
        if let (Some(place), Ok(here)) = (words.next(), process::place()) {
            if place != here {
                return Err(Error::DaemonElsewhere(format!("{} is held", path.display())));
            }
        }
        let listener =
            prove(pid, port, &file, &path).map_err(|e| Error::io("look at the daemon that holds", &path, e))?;
        Ok(Some(match listener {
            Some(listener) => Holder::Listening(Address { pid, port, listener, since }),
            // The text is that of an earlier daemon, or the daemon is shutting down.
            None => Holder::Unreachable,
        }))
    }

    /// Finds a daemon that accepts connections, or starts one if allowed: for requests that must not be
    /// repeated.
    ///
    /// # Errors
    /// As for [`Client::ensure`].
    pub fn reach(&self) -> Result<Address> {
        self.with_daemon(|address| self.connect(address).map(|_| address.clone()))
    }

    /// Finds the daemon, or starts one if allowed.
    ///
    /// # Errors
    /// `daemon_not_running`, and those of [`Client::start`].
    pub fn ensure(&self) -> Result<Address> {
        match (self.find()?, &self.autostart) {
            (Some(address), _) => Ok(address),
            (None, Some(options)) => self.start(options),
            (None, None) => Err(Error::DaemonNotRunning),
        }
    }

    /// Starts a daemon, or returns the one that another process starts first.
    ///
    /// # Errors
    /// The daemon's own error; `daemon_start_failed` when it reports none.
    pub fn start(&self, options: &Options) -> Result<Address> {
        self.start_without(options, &[])
    }

    /// The same, without these variables of the environment.
    ///
    /// # Errors
    /// As for [`Client::start`].
    pub fn start_without(&self, options: &Options, variables: &[&str]) -> Result<Address> {
        let _waiting = Waiting::new("the daemon to start");
        self.data_dir.create()?;
        let path = self.data_dir.start_lock();
        loop {
            let lock = lock::try_exclusive(&path)?;
            if let Some(address) = self.find()? {
                return Ok(address);
            }
            if lock.is_some() {
                if let Some(address) = self.wake(options)? {
                    return Ok(address);
                }
                self.spawn(options, variables)?;
                // A daemon that loses the race for the lock exits and reports success: there is another.
                return self.find()?.ok_or_else(|| Error::DaemonStartFailed("it has ended again".to_owned()));
            }
            if Instant::now() >= self.deadline {
                return Err(Error::DaemonStartFailed("another start is under way and does not end".to_owned()));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Connects to the daemon's port if the service manager holds it (socket activation). The connection
    /// alone makes it start the daemon; no byte is sent.
    ///
    /// # Errors
    /// As for [`Client::find`].
    fn wake(&self, options: &Options) -> Result<Option<Address>> {
        // The daemon itself reports a state file that cannot be read.
        let last = State::read(&self.data_dir.state()).map_or(0, |state| state.ports.daemon);
        let ports = options.port.map_or_else(|| vec![last, DEFAULT_PORT], |port| vec![port]);
        let deadline = self.deadline.min(Instant::now() + WAKING);
        for address in ports.into_iter().map(|port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)) {
            let no_look = |e| Error::Internal(format!("cannot see who listens on {address}: {e}"));
            if !socket::is_held_by_service_manager(address).map_err(no_look)? {
                continue;
            }
            let limit = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let Ok(_connection) = TcpStream::connect_timeout(&address.into(), limit) else { continue };
            while Instant::now() < deadline {
                if let Some(address) = self.find()? {
                    return Ok(Some(address));
                }
                std::thread::sleep(POLL_INTERVAL);
            }
        }
        // The unit may be broken, or serve another data directory.
        Ok(None)
    }

    /// Spawns the daemon and waits for the one line in which it reports success or failure.
    fn spawn(&self, options: &Options, without: &[&str]) -> Result<()> {
        let failed = |why: String| Error::DaemonStartFailed(why);
        let program = std::env::current_exe().map_err(|e| failed(format!("cannot find this program: {e}")))?;
        let log_path = self.data_dir.daemon_log();
        let log = log::open(&log_path).map_err(|e| Error::io("open", &log_path, e))?;
        let log_start = log.metadata().map_or(0, |metadata| metadata.len());
        let mut command = Command::new(&program);
        command.arg(DETACHED_COMMAND).arg("--data-dir").arg(self.data_dir.path());
        command.args(options.arguments());
        for variable in without.iter().chain(&[MARKER]).chain(&SERVICE_VARIABLES) {
            command.env_remove(variable);
        }
        command.envs(allocator(|name| std::env::var_os(name).is_none()));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().map_err(|e| failed(format!("cannot run {}: {e}", program.display())))?;
        let stdout = child.stdout.take().ok_or_else(|| failed("no pipe to it".to_owned()))?;
        if !wait::wait_until_readable(&stdout, self.deadline) {
            return Err(failed("it has not said that it listens before the deadline".to_owned()));
        }
        let mut line = String::new();
        let _ = BufReader::new(stdout).read_line(&mut line);
        match (decode::<Done>(line.as_bytes()), decode::<Failure>(line.as_bytes())) {
            (Ok(Done { ok: true }), _) => Ok(()),
            (_, Ok(failure)) => Err(Error::reported(failure.error, 500)),
            _ => {
                let lines = log::tail(&log_path, log_start, LAST_LINES).unwrap_or_default();
                Err(failed(format!("it ended without a word; its log:\n{}", lines.join("\n"))))
            }
        }
    }

    /// Sends a request to the daemon, which is started first if none runs and that is allowed.
    ///
    /// # Errors
    /// Those of [`Client::ensure`], what the daemon replies, `daemon_unresponsive`.
    pub fn ask<T: DeserializeOwned>(&self, method: &str, target: &str, body: &impl Serialize) -> Result<T> {
        self.with_daemon(|address| self.ask_at(address, method, target, body))
    }

    /// Reads from a running daemon; starts none.
    ///
    /// # Errors
    /// What the daemon replies; `daemon_unresponsive`.
    pub fn read<T: DeserializeOwned>(&self, target: &str) -> Result<Option<T>> {
        self.read_bytes(target)?.map(|reply| decode(&reply)).transpose()
    }

    /// The same, unparsed.
    ///
    /// # Errors
    /// As for [`Client::read`].
    pub fn read_bytes(&self, target: &str) -> Result<Option<Vec<u8>>> {
        let read = || match self.find()? {
            Some(address) => self.exchange(&address, "GET", target, None, self.deadline).map(Some),
            None => Ok(None),
        };
        // A daemon that has exited may have a successor: ask once more.
        let not_running = |result| if matches!(result, Err(Error::DaemonNotRunning)) { None } else { Some(result) };
        not_running(read()).or_else(|| not_running(read())).unwrap_or(Ok(None))
    }

    /// The daemon's reply, unparsed, if it arrives at once; `None` otherwise. The state file has the same
    /// answer, so a daemon that is starting, hung or stopped is not waited for.
    ///
    /// # Errors
    /// What the daemon replies.
    pub fn read_soon(&self, target: &str) -> Result<Option<Vec<u8>>> {
        let Ok(Some(Holder::Listening(address))) = self.holder() else { return Ok(None) };
        if process::is_stopped(address.pid) {
            return Ok(None);
        }
        let deadline = self.deadline.min(Instant::now() + STATE_FALLBACK_WAIT);
        match self.exchange(&address, "GET", target, None, deadline) {
            Err(Error::DaemonNotRunning | Error::DaemonUnresponsive(_)) => Ok(None),
            other => other.map(Some),
        }
    }

    /// Calls `ask` with the daemon, and again with its successor if the daemon was shutting down.
    ///
    /// # Errors
    /// Those of [`Client::ensure`] and of `ask`.
    pub fn with_daemon<T>(&self, ask: impl Fn(&Address) -> Result<T>) -> Result<T> {
        let address = self.ensure()?;
        match ask(&address) {
            Err(Error::DaemonNotRunning) if self.autostart.is_some() => ask(&self.ensure()?),
            // The daemon was stopping, and its opencode with it. After a restart, its successor has an
            // opencode; after a stop, a request that was only waiting must not start a daemon again.
            Err(e) if e.code() == Code::OpencodeUnavailable && self.is_leaving(&address) => match self.find()? {
                Some(next) => ask(&next),
                None => Err(e),
            },
            other => other,
        }
    }

    /// Sends a request to this daemon.
    ///
    /// # Errors
    /// The daemon's error; `daemon_unresponsive`; `daemon_not_running` when the daemon exits instead.
    pub fn ask_at<T: DeserializeOwned>(
        &self,
        address: &Address,
        method: &str,
        target: &str,
        body: &impl Serialize,
    ) -> Result<T> {
        let body = if method == "GET" || method == "DELETE" { None } else { Some(to_json(body)?) };
        decode(&self.exchange(address, method, target, body.as_deref(), self.deadline)?)
    }

    /// Sends a request and returns the reply, if that is not an error.
    fn exchange(
        &self,
        address: &Address,
        method: &str,
        target: &str,
        body: Option<&[u8]>,
        deadline: Instant,
    ) -> Result<Vec<u8>> {
        let timeout = seconds_until(deadline);
        let mut headers = vec![(TIMEOUT_HEADER, timeout.as_str())];
        headers.extend(body.map(|_| ("Content-Type", "application/json")));
        // The daemon reports what it waited for; a command that falls back to the state file does not need
        // to know.
        let grace = if deadline < self.deadline { Duration::ZERO } else { GRACE };
        let mut response = self.call(address, (method, target), &headers, body, Limit::Whole(deadline + grace))?;
        let notice = response.headers().get(NOTICE_HEADER).and_then(|notice| percent_decode(notice.to_str().ok()?));
        if let Some(notice) = notice {
            note(&format!("note: {}\n", clean(&String::from_utf8_lossy(&notice))));
        }
        let status = response.status().as_u16();
        let reply = response.body_mut().with_config().limit(REPLY_LIMIT).read_to_vec();
        let reply = reply.map_err(|e| self.failed(address, e))?;
        // While opencode is not ready, `/health` has status 503 and its usual body.
        let is_health = target == "/health" && status == 503 && decode::<Failure>(&reply).is_err();
        if (200..300).contains(&status) || is_health {
            return Ok(reply);
        }
        Err(failure(status, &reply))
    }

    fn call(
        &self,
        address: &Address,
        request: (&str, &str),
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
        limit: Limit,
    ) -> Result<Response<Body>> {
        let listener = &address.listener;
        agent::call(&listener.agent(), listener.address, request, headers, body, limit)
            .map_err(|e| self.failed(address, e))
    }

    /// Opens the stream of the daemon's events, from now on or after the event `since`. With `ends`, the
    /// stream lasts until the command's deadline; then a read fails with `TimedOut`.
    ///
    /// # Errors
    /// The daemon's error; `daemon_unresponsive`; `daemon_not_running` when the daemon exits instead.
    pub fn events(&self, ends: bool, since: Option<u64>) -> Result<impl Read + use<>> {
        let address = self.reach()?;
        let timeout = seconds_until(self.deadline);
        let since = since.map(|since| since.to_string());
        let mut headers = vec![(TIMEOUT_HEADER, timeout.as_str())];
        headers.extend(since.as_deref().map(|since| (LAST_EVENT_HEADER, since)));
        let limit = if ends { Limit::Whole(self.deadline) } else { Limit::Head(self.deadline) };
        let mut response = self.call(&address, ("GET", "/events"), &headers, None, limit)?;
        if response.status().as_u16() != 200 {
            let status = response.status().as_u16();
            let reply = response.body_mut().with_config().limit(FAILURE_LIMIT).read_to_vec();
            return Err(failure(status, &reply.map_err(|e| self.failed(&address, e))?));
        }
        Ok(response.into_body().into_reader())
    }

    /// Sends an OpenCode request unchanged, and returns the reply once its head has arrived; the deadline, if
    /// there is one, is for the head.
    ///
    /// # Errors
    /// `daemon_unresponsive`; `daemon_not_running` when the daemon exits instead; those of `write_body`, which
    /// leave the request incomplete.
    pub fn open(
        &self,
        address: &Address,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        deadline: Option<Instant>,
        write_body: impl FnOnce(&mut Timed<TcpStream>) -> Result<io::Result<()>>,
    ) -> Result<http::Response<Timed<TcpStream>>> {
        let timeout = deadline.map(seconds_until);
        let mut all = headers.to_vec();
        all.extend(timeout.as_deref().map(|timeout| (TIMEOUT_HEADER, timeout)));
        let head = Request { method, target, headers: &all }.head(&address.listener.address.to_string());
        let mut stream = Timed::new(self.connect(address)?, deadline.map(|deadline| deadline + GRACE));
        let written = match stream.write_all(&head) {
            Ok(()) => write_body(&mut stream)?,
            other => other,
        };
        match (written, http::Response::read(stream, method)) {
            // A server that refuses the body still replies.
            (_, Ok(response)) => Ok(response),
            (Err(e), Err(_)) | (Ok(()), Err(e)) => Err(self.lost(address, &e)),
        }
    }

    /// The error of a failed call.
    fn failed(&self, address: &Address, e: ureq::Error) -> Error {
        let e = match e {
            e if agent::is_timeout(&e) => io::ErrorKind::TimedOut.into(),
            ureq::Error::Io(e) => e,
            e => io::Error::other(e),
        };
        self.lost(address, &e)
    }

    /// The error of a broken connection.
    pub fn lost(&self, address: &Address, e: &io::Error) -> Error {
        match e.kind() != io::ErrorKind::TimedOut && self.is_leaving(address) {
            true => Error::DaemonNotRunning,
            false => Error::DaemonUnresponsive(format!("port {}: {e}", address.port)),
        }
    }

    /// Connects to the daemon.
    fn connect(&self, address: &Address) -> Result<TcpStream> {
        let deadline = self.deadline.max(Instant::now() + Duration::from_millis(1));
        address.listener.connect(deadline).map_err(|e| self.lost(address, &e))
    }

    /// Replaces the daemon by its successor: this program, with this environment, and with the options of
    /// this command if it has any. With `all`, opencode is stopped first, and the running sessions that end
    /// with it are returned. With a limit in `idle`, sessions that still run at the limit are an error. `None`
    /// when the daemon does not support this.
    ///
    /// # Errors
    /// The daemon's error, such as `still_busy`; `daemon_unresponsive`.
    pub fn hand_over(&self, address: &Address, all: bool, idle: Option<Duration>) -> Result<Option<Vec<Session>>> {
        let program = std::env::current_exe();
        let program = program.map_err(|e| Error::Internal(format!("cannot find this program: {e}")))?;
        let options = self.autostart.as_ref().filter(|options| !options.is_default());
        let encode = |text: &OsStr| percent_encode(text.as_bytes());
        let variables = std::env::vars_os().filter(|(name, _)| !is_not_the_daemons(name));
        let allocator = allocator(|name| std::env::var_os(name).is_none());
        let allocator = allocator.into_iter().map(|(name, value)| (name.into(), value.into()));
        let variable = |(name, value): (OsString, OsString)| format!("{}={}", encode(&name), encode(&value));
        let restart = Restart {
            program: encode(program.as_os_str()),
            options: options.map(|options| options.arguments().iter().map(|option| encode(option)).collect()),
            environment: variables.chain(allocator).map(variable).collect(),
            all,
            client: Some(std::process::id()),
            when_idle: idle.is_some(),
        };
        // The environment is too large for a request.
        if to_json(&restart)?.len() > BODY_LIMIT {
            return Ok(None);
        }
        let asking = self.until(idle.map_or(self.deadline, |limit| self.deadline.min(Instant::now() + limit)));
        let before: RestartReply = match asking.ask_at(address, "POST", "/restart", &restart) {
            Err(e) if e.code() == Code::NotFound => return Ok(None),
            other => other?,
        };
        let _waiting = Waiting::new("the daemon to restart");
        loop {
            // A daemon that exited instead has logged why, and the caller starts a new one.
            let Some(health) = self.read::<Health>("/health")? else { return Ok(Some(before.sessions)) };
            if health.daemon.started_at != before.started_at {
                return Ok(Some(before.sessions));
            }
            if Instant::now() >= self.deadline {
                return Err(Error::DaemonUnresponsive("it has not restarted before the deadline".to_owned()));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// The same client with another deadline, which starts no daemon.
    pub fn until(&self, deadline: Instant) -> Client {
        Client { data_dir: self.data_dir.clone(), deadline, autostart: None }
    }

    /// Whether a daemon that no longer answers is shutting down: within a moment its lock is free, or held by
    /// a successor or another daemon.
    fn is_leaving(&self, address: &Address) -> bool {
        let patience = self.deadline.min(Instant::now() + LEAVING);
        loop {
            match self.holder() {
                Ok(Some(Holder::Listening(holder))) if (holder.pid, holder.since) == (address.pid, address.since) => {}
                Ok(_) => return true,
                Err(_) => return false,
            }
            if Instant::now() >= patience {
                return false;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits until the daemon behind a pidfd has exited.
    ///
    /// # Errors
    /// `daemon_unresponsive` at the deadline.
    pub fn wait_until_gone(&self, daemon: &OwnedFd) -> Result<()> {
        let _waiting = Waiting::new("the daemon to stop");
        if wait::wait_until_readable(daemon, self.deadline) {
            return Ok(());
        }
        Err(Error::DaemonUnresponsive("it has not ended before the deadline".to_owned()))
    }
}

/// Whether the process that the lock file names is a daemon of ours: it runs under our own user,
/// holds the lock, and holds the listening socket at the port.
///
/// # Errors
/// When this process runs out of a resource that the check needs.
fn prove(pid: u32, port: u16, lock: &File, path: &Path) -> io::Result<Option<Listener>> {
    // Open the pidfd before the checks, so that they hold for the process behind it.
    let Some(process) = process::open(pid)?.filter(|_| process::is_ours(pid)) else { return Ok(None) };
    if !system::lock::has_locked(pid, &lock.metadata()?, path) {
        return Ok(None);
    }
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    let socket = socket::listening_itself(pid, address)?.filter(|_| !wait::has_ended(&process));
    Ok(socket.map(|socket| Listener { address, socket, process: Arc::new(process) }))
}

/// The time until a deadline as a value of [`TIMEOUT_HEADER`].
fn seconds_until(deadline: Instant) -> String {
    let rest = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    format!("{:.3}", rest.as_secs_f64())
}

/// Parses a reply of the daemon.
pub fn decode<'r, T: Deserialize<'r>>(reply: &'r [u8]) -> Result<T> {
    from_json(reply).map_err(|e| Error::DaemonUnresponsive(format!("invalid response: {e}")))
}

/// The error in a reply of the daemon.
pub fn failure(status: u16, reply: &[u8]) -> Error {
    match decode::<Failure>(reply) {
        Ok(failure) => Error::reported(failure.error, status),
        Err(e) => e,
    }
}

/// Serialises the body of a request.
pub fn to_json(body: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(body).map_err(|e| Error::Internal(format!("cannot write JSON: {e}")))
}
