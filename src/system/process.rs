//! Processes as Linux sees them: which one it is, ending it and all it started.
//!
//! Invariant: nothing is ever signalled by a bare process id that could meanwhile be another's.
//! A process is held by a pidfd, opened first and identified after; a group is signalled only
//! while its leader is alive or not yet reaped.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, pidfd_send_signal, waitid,
};

use super::wait::{has_ended, wait_until_readable};
use crate::options::MARKER;

/// How long a process may take to end, once its memory is gone: files and sockets follow.
const ENDING_LIMIT: Duration = Duration::from_secs(5);

/// How long it is waited for what was swept to be gone: a killed process mostly is within 0.1 s.
const SWEEP_LIMIT: Duration = Duration::from_secs(2);

/// What proves that a process is the one that was written down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// Clock ticks since boot at which it started.
    pub start_ticks: u64,
    /// Of the boot in which it started.
    pub boot_id: String,
    /// The value of [`MARKER`] in its environment.
    pub engine_id: String,
}

/// A process that we hold: started by us, or by a daemon before us.
pub struct Process {
    identity: Identity,
    pidfd: Arc<OwnedFd>,
    /// None when another daemon has started it: then init reaps it.
    child: Option<Child>,
}

impl Process {
    /// Starts a command in a process group of its own, with the marker in its environment.
    pub fn spawn(command: &mut Command, engine_id: &str) -> io::Result<Process> {
        let mut child = command.env(MARKER, engine_id).process_group(0).spawn()?;
        match hold(&child) {
            Ok((pidfd, start_ticks, boot_id)) => {
                let identity = Identity { pid: child.id(), start_ticks, boot_id, engine_id: engine_id.to_owned() };
                Ok(Process { identity, pidfd: Arc::new(pidfd), child: Some(child) })
            }
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
        }
    }

    /// Takes over the process with this identity, if it lives and all of it is proved.
    pub fn adopt(identity: &Identity) -> Option<Process> {
        if identity.engine_id.is_empty() || identity.boot_id != boot_id().ok()? {
            return None;
        }
        // Held first, identified after: what is proved below is true of what is held.
        let pidfd = open(identity.pid)?;
        if start_ticks(identity.pid).ok()? != identity.start_ticks {
            return None;
        }
        // One that is just ending has lost its environment, and may hold its port for a moment
        // more. To wait for its end harms nobody.
        let environ = fs::read(format!("/proc/{}/environ", identity.pid)).unwrap_or_default();
        if environ.is_empty() {
            wait_until_readable(&pidfd, Instant::now() + ENDING_LIMIT);
            return None;
        }
        let proved = has_marker(&environ, &identity.engine_id) && !has_ended(&pidfd);
        proved.then(|| Process { identity: identity.clone(), pidfd: Arc::new(pidfd), child: None })
    }

    /// What proves it.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Readable once it has ended.
    pub fn pidfd(&self) -> Arc<OwnedFd> {
        self.pidfd.clone()
    }

    /// The standard input we gave it.
    pub fn take_stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.child.as_mut()?.stdin.take()
    }

    /// The standard output we piped.
    pub fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.as_mut()?.stdout.take()
    }

    /// Signals it and its group. One that has ended is not signalled, unless it is a child
    /// that has not been reaped: then its group is still its own.
    pub fn signal(&self, signal: Signal) {
        if self.child.is_none() && has_ended(&self.pidfd) {
            return;
        }
        let _ = pidfd_send_signal(&self.pidfd, signal);
        if let Some(group) = i32::try_from(self.identity.pid).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, signal);
        }
    }

    /// After its end: ends what is left of its group and of everything that carries its marker,
    /// then reaps it. Its exit status, if it was a child of ours.
    pub fn bury(mut self) -> Option<ExitStatus> {
        // Not reaped yet, so that the id of its group cannot have become another's.
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        if self.child.is_some() {
            self.signal(Signal::KILL);
        }
        let status = match &mut self.child {
            Some(child) => child.wait().ok(),
            None => reap(&self.pidfd),
        };
        sweep(&self.identity.engine_id);
        status
    }
}

/// Reaps a process that has ended, if it is a child of ours: one that this process started as another
/// program, before it became its own successor.
fn reap(pidfd: &OwnedFd) -> Option<ExitStatus> {
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG).ok()??;
    // As wait(2) spells it.
    let raw = status.exit_status().map(|code| code << 8).or(status.terminating_signal());
    raw.map(ExitStatus::from_raw)
}

fn hold(child: &Child) -> io::Result<(OwnedFd, u64, String)> {
    let pidfd = open(child.id()).ok_or_else(|| io::Error::other("the kernel gives no pidfd"))?;
    Ok((pidfd, start_ticks(child.id())?, boot_id()?))
}

/// Holds the process with this id, whichever that is; `None` when there is none.
pub fn open(pid: u32) -> Option<OwnedFd> {
    pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()
}

/// Ends everything of our user that carries the marker of this engine, whatever group, session
/// or parent it has by now. What has emptied its own environment is not found.
pub fn sweep(engine_id: &str) {
    let deadline = Instant::now() + SWEEP_LIMIT;
    // What is being swept may be forking; a few rounds catch up with anything that is not
    // made to outrun us, and the bound keeps such a thing from holding us up.
    for _ in 0..20 {
        let swept = sweep_once(engine_id);
        if swept.is_empty() {
            return;
        }
        // Gone, with its sockets, before another is started.
        for pidfd in swept {
            wait_until_readable(&pidfd, deadline);
        }
    }
}

/// One round: what was signalled.
fn sweep_once(engine_id: &str) -> Vec<OwnedFd> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let ourselves = std::process::id();
    let mut swept = Vec::new();
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // The environment of another user's process cannot be read, but by root: then it is
        // one that has changed its user, and as much ours.
        if pid == ourselves || !carries_marker(pid, engine_id) {
            continue;
        }
        let Some(pidfd) = open(pid) else { continue };
        // Looked at again, now that it cannot become another.
        if carries_marker(pid, engine_id) && pidfd_send_signal(&pidfd, Signal::KILL).is_ok() {
            swept.push(pidfd);
        }
    }
    swept
}

/// Whether the environment of a process has our marker. A zombie's is empty.
fn carries_marker(pid: u32, engine_id: &str) -> bool {
    fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environ| has_marker(&environ, engine_id))
}

fn has_marker(environ: &[u8], engine_id: &str) -> bool {
    let wanted = format!("{MARKER}={engine_id}");
    environ.split(|byte| *byte == 0).any(|entry| entry == wanted.as_bytes())
}

/// When a process started, in clock ticks since boot: field 22 of `/proc/<pid>/stat` (proc(5)).
fn start_ticks(pid: u32) -> io::Result<u64> {
    stat_field(pid, 22)
}

/// A numeric field of `/proc/<pid>/stat`, counted from 1 as in proc(5); 4 and above.
pub fn stat_field(pid: u32, field: usize) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the name in parentheses and may itself have spaces and parentheses.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name
        .split_ascii_whitespace()
        .nth(field - 3)
        .and_then(|value| value.parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The id of this boot.
fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Where this process lives, as one word: the boot, the pid namespace and the network namespace.
/// Elsewhere, its process id and its ports mean something else.
///
/// # Errors
/// When `/proc` is not there, or is another namespace's.
pub fn place() -> io::Result<String> {
    let namespace =
        |kind: &str| Ok::<_, io::Error>(fs::read_link(format!("/proc/self/ns/{kind}"))?.display().to_string());
    Ok(format!("{}/{}/{}", boot_id()?, namespace("pid")?, namespace("net")?))
}

/// Whether a process runs under this process's own user.
pub fn is_ours(pid: u32) -> bool {
    fs::metadata(format!("/proc/{pid}")).is_ok_and(|process| process.uid() == rustix::process::geteuid().as_raw())
}

/// Resident memory of everything that carries the marker of an engine, in bytes. Pages that
/// several of them share are counted for each.
pub fn family_memory(engine_id: &str) -> Option<u64> {
    let pids = fs::read_dir("/proc").ok()?.flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let family: Vec<u64> = pids.filter(|pid| carries_marker(*pid, engine_id)).filter_map(memory).collect();
    if family.is_empty() { None } else { Some(family.iter().sum()) }
}

/// Resident memory of a process in bytes: `VmRSS` of `/proc/<pid>/status`.
pub fn memory(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}
