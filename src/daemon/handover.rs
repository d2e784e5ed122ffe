//! `daemon restart`: the daemon becomes its successor by exec. The process keeps its pid, the lock and the
//! listening socket, so neither is ever free, and new connections wait in the socket's queue.
//!
//! The successor is this program with [`COMMAND`] as its first argument, the listening socket as standard
//! input and the locked file as standard output: standard streams are the only descriptors that safe code can
//! inherit.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::framing::percent_decode;
use crate::lock::Lock;
use crate::options::{NOTIFY_SOCKET, SERVICE_VARIABLES, SHARED, WATCHDOG_PID, WATCHDOG_USEC};
use crate::paths::DataDir;
use crate::system::limits;
use crate::wire::Restart;

/// The hidden command of a successor, before the arguments of `openwork daemon`.
pub const COMMAND: &str = "__successor";

/// How the daemon ends.
#[derive(Default)]
pub enum End {
    /// Not requested.
    #[default]
    None,
    /// The process ends.
    Stop,
    /// The process becomes another program.
    Successor(Successor),
}

/// How the daemon is to end: a stop wins over a restart, whichever comes first.
#[derive(Default)]
pub struct Ending(Mutex<End>);

impl Ending {
    /// Requests a stop.
    pub fn stop(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = End::Stop;
    }

    /// Requests a restart as this successor.
    ///
    /// # Errors
    /// `opencode_unavailable` when the daemon is already stopping.
    pub fn hand_over(&self, successor: Successor) -> Result<()> {
        let mut end = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*end, End::Stop) {
            return Err(Error::OpencodeUnavailable("the daemon is stopping".to_owned()));
        }
        *end = End::Successor(successor);
        Ok(())
    }

    /// Takes the decision.
    pub fn take(&self) -> End {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The program that a daemon becomes.
pub struct Successor {
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
}

impl Successor {
    /// The successor that a client asks for. Without options in the request, it keeps `own`.
    ///
    /// # Errors
    /// `bad_request` when the request is malformed, or names no program.
    pub fn new(restart: &Restart, data_dir: &DataDir, own: Vec<OsString>) -> Result<Successor> {
        let decode = |text: &String| {
            let bytes = percent_decode(text);
            bytes.map(OsString::from_vec).ok_or_else(|| Error::BadRequest(format!("{text:?} is not percent-encoded")))
        };
        let program = PathBuf::from(decode(&restart.program)?);
        rustix::fs::access(&program, rustix::fs::Access::EXEC_OK)
            .map_err(|e| Error::BadRequest(format!("cannot run {}: {}", program.display(), io::Error::from(e))))?;
        let options = match &restart.options {
            Some(options) => options.iter().map(decode).collect::<Result<_>>()?,
            None => own,
        };
        let mut data_dir_option = OsString::from("--data-dir=");
        data_dir_option.push(data_dir.path());
        let variable = |text: &String| {
            let text = decode(text)?.into_vec();
            let at = text.iter().position(|byte| *byte == b'=').filter(|at| *at > 0);
            let at = at.ok_or_else(|| Error::BadRequest("a variable is NAME=VALUE".to_owned()))?;
            Ok((OsString::from_vec(text[..at].to_vec()), OsString::from_vec(text[at + 1..].to_vec())))
        };
        Ok(Successor {
            program,
            arguments: [COMMAND.into(), data_dir_option].into_iter().chain(options).collect(),
            environment: restart.environment.iter().map(variable).collect::<Result<_>>()?,
        })
    }

    /// Whether the successor uses the user's own service.
    pub fn is_shared(&self) -> bool {
        self.arguments.iter().any(|argument| argument == SHARED)
    }

    /// Becomes the successor; returns only on failure.
    pub fn succeed(self, lock: &Lock, listener: &TcpListener) -> Error {
        let failed = |e| Error::io("run", &self.program, e);
        let (listener, lock) = match (listener.try_clone(), lock.file.try_clone()) {
            (Ok(listener), Ok(lock)) => (listener, lock),
            (Err(e), _) | (_, Err(e)) => return failed(e),
        };
        // The successor, and through it opencode, inherits the limit.
        if let Some(limit) = limits::descriptor_limit_before() {
            limits::restore_descriptor_limit(limit);
        }
        let mut command = Command::new(&self.program);
        command.arg0("openwork").args(&self.arguments).env_clear().envs(self.environment.iter().cloned());
        // The service manager that started this process keeps watching it, and not a manager of the client. A
        // socket that the manager passed continues as standard input.
        for name in SERVICE_VARIABLES {
            command.env_remove(name);
        }
        for name in [NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        failed(command.stdin(std::os::fd::OwnedFd::from(listener)).stdout(lock).exec())
    }
}

/// Receives the lock and the listening socket from the predecessor. Standard input and output become
/// `/dev/null`.
///
/// # Errors
/// `internal` when the standard streams are not from a predecessor.
pub fn receive(data_dir: &DataDir) -> Result<(Lock, TcpListener)> {
    let failed = |e: io::Error| Error::Internal(format!("cannot take over from a daemon: {e}"));
    let listener = TcpListener::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
    let file = File::from(io::stdout().as_fd().try_clone_to_owned().map_err(failed)?);
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").map_err(failed)?;
    rustix::stdio::dup2_stdin(&null).and_then(|()| rustix::stdio::dup2_stdout(&null)).map_err(|e| failed(e.into()))?;
    let path = data_dir.daemon_lock();
    let is_same = match (file.metadata(), std::fs::metadata(&path)) {
        (Ok(held), Ok(there)) => (held.dev(), held.ino()) == (there.dev(), there.ino()),
        (Err(_), _) | (_, Err(_)) => false,
    };
    if !is_same || !rustix::net::sockopt::socket_acceptconn(&listener).is_ok_and(|listens| listens) {
        return Err(Error::Internal(format!("no predecessor has handed over {}", path.display())));
    }
    Ok((Lock { file }, listener))
}
