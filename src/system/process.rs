//! Processes: their identity, and ending a process with everything that it started.
//!
//! Invariant: no process is signalled by a bare pid, which may have been reused. A process is held by a
//! pidfd, which is opened first and identified afterwards; a group is signalled only while its leader is
//! alive or not yet reaped.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, pidfd_send_signal, waitid,
};

use super::wait::{Flag, has_ended, wait_readable, wait_until_readable};
use crate::options::MARKER;

/// How long a process may take to end once its memory is freed: its files and sockets follow.
const ENDING_LIMIT: Duration = Duration::from_secs(5);

/// How long the sweep waits for killed processes: they are mostly gone within 0.1 s.
const KILLED_LIMIT: Duration = Duration::from_secs(2);

/// The rounds of a sweep: swept processes may be forking. A few rounds catch everything that does not outrun
/// the sweep on purpose, and the bound keeps such a program from blocking the daemon.
const SWEEP_ROUNDS: usize = 20;

/// The unit of times in `/proc/<pid>/stat`: `USER_HZ`, 100 on every architecture that Rust knows.
const TICKS_PER_SECOND: u64 = 100;

/// Children that another thread waits for; [`reap_orphans`] leaves them alone.
static AWAITED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

fn awaited() -> MutexGuard<'static, BTreeSet<u32>> {
    AWAITED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The proof that a process is the one in a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// Clock ticks since boot at which it started.
    pub start_ticks: u64,
    /// The id of the boot in which it started.
    pub boot_id: String,
    /// The value of [`MARKER`] in its environment.
    pub engine_id: String,
}

/// A process that we hold: started by this daemon or an earlier one.
pub struct Process {
    identity: Identity,
    pidfd: Arc<OwnedFd>,
    /// Whether it is a child of this process, which then has to reap it; otherwise init does. A successor has
    /// the children of the daemon that it replaced by exec.
    is_child: bool,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
}

impl Process {
    /// Starts a command in a process group of its own, with the marker in its environment.
    ///
    /// # Errors
    /// Those of fork and exec; `Other` when the process cannot be identified, and is ended again.
    pub fn spawn(command: &mut Command, engine_id: &str) -> io::Result<Process> {
        command.process_group(0);
        Process::spawn_leader(command, engine_id)
    }

    /// Starts a command that creates its own session, and so its own group, with the marker in its
    /// environment.
    ///
    /// # Errors
    /// As for [`Process::spawn`].
    pub fn spawn_leader(command: &mut Command, engine_id: &str) -> io::Result<Process> {
        // Locked during the start: the child may end before it is registered.
        let mut awaited = awaited();
        let mut child = command.env(MARKER, engine_id).spawn()?;
        let pid = child.id();
        awaited.insert(pid);
        drop(awaited);
        let held = open(pid).and_then(|pidfd| {
            let pidfd = pidfd.ok_or_else(|| io::Error::other("the kernel gives no pidfd"))?;
            Ok((pidfd, start_ticks(pid)?, boot_id()?))
        });
        match held {
            Ok((pidfd, start_ticks, boot_id)) => Ok(Process {
                identity: Identity { pid, start_ticks, boot_id, engine_id: engine_id.to_owned() },
                pidfd: Arc::new(pidfd),
                is_child: true,
                stdin: child.stdin.take(),
                stdout: child.stdout.take(),
            }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                self::awaited().remove(&pid);
                Err(e)
            }
        }
    }

    /// Adopts the process with this identity, if it lives and every part of the identity is proved.
    pub fn adopt(identity: &Identity) -> Option<Process> {
        if identity.engine_id.is_empty() || identity.boot_id != boot_id().ok()? {
            return None;
        }
        // Open the pidfd first: then the checks below apply to the process behind it.
        let pidfd = open(identity.pid).ok()??;
        if start_ticks(identity.pid).ok()? != identity.start_ticks {
            return None;
        }
        // A process that is just ending has lost its environment, but may hold its port a moment longer.
        // Waiting for its end is harmless.
        let environ = fs::read(format!("/proc/{}/environ", identity.pid)).unwrap_or_default();
        let is_child = parent(identity.pid) == Some(std::process::id());
        if environ.is_empty() {
            wait_until_readable(&pidfd, Instant::now() + ENDING_LIMIT);
            if is_child {
                reap(&pidfd);
            }
            return None;
        }
        if !has_marker(&environ, &identity.engine_id) || has_ended(&pidfd) {
            return None;
        }
        if is_child {
            awaited().insert(identity.pid);
        }
        let identity = identity.clone();
        Some(Process { identity, pidfd: Arc::new(pidfd), is_child, stdin: None, stdout: None })
    }

    /// The identity of the process.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Readable once it has ended.
    pub fn pidfd(&self) -> Arc<OwnedFd> {
        self.pidfd.clone()
    }

    /// Its piped standard input.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.stdin.take()
    }

    /// Its piped standard output.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.stdout.take()
    }

    /// Signals the process and its group. After its end only an unreaped child is signalled: its group id
    /// cannot have been reused.
    pub fn signal(&self, signal: Signal) {
        if !self.is_child && has_ended(&self.pidfd) {
            return;
        }
        // Only one signal for the leader of a group: a second TERM aborts the cleanup of some programs.
        let group = i32::try_from(self.identity.pid).ok().and_then(Pid::from_raw);
        if group.is_none_or(|group| kill_process_group(group, signal).is_err()) {
            let _ = pidfd_send_signal(&self.pidfd, signal);
        }
    }

    /// Waits for its end, ends the rest of its group and every process with its marker, as [`sweep`] does,
    /// and reaps it. Returns its exit status, if it was our child.
    pub fn reap(self, grace: Duration, spared: &[u32]) -> Option<ExitStatus> {
        // Reap it only at the end, so that its group id cannot be reused before.
        wait_until_readable(&self.pidfd, Instant::now() + ENDING_LIMIT);
        let Identity { pid, engine_id, .. } = &self.identity;
        let group = self.is_child.then_some(*pid);
        sweep_all(engine_id, group, grace, spared);
        if !self.is_child {
            return None;
        }
        let status = reap(&self.pidfd);
        awaited().remove(pid);
        status
    }
}

/// Runs a command to its end. Only the command itself is killed at the deadline, not processes that it leaves in
/// the background. `begun` is called once the command has been started.
///
/// # Errors
/// `TimedOut` at the deadline; `Interrupted` when the flag is raised, with the command left running;
/// those of fork, exec and `begun`.
pub fn run(
    command: &mut Command,
    begun: impl FnOnce(Option<ChildStdin>) -> io::Result<()>,
    flag: &Flag,
    deadline: Instant,
) -> io::Result<ExitStatus> {
    // Locked during the start: the child may end before it is registered.
    let mut children = awaited();
    let mut child = command.spawn()?;
    let pid = child.id();
    children.insert(pid);
    drop(children);
    let watched = || -> io::Result<()> {
        let pidfd = open(pid)?.ok_or_else(|| io::Error::other("the kernel gives no pidfd"))?;
        match wait_readable(&pidfd, flag, Some(deadline)) {
            Ok(true) => Ok(()),
            Ok(false) => Err(io::ErrorKind::Interrupted.into()),
            Err(e) => Err(e),
        }
    };
    let ended = begun(child.stdin.take()).and_then(|()| watched());
    let result = match ended {
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Err(e),
        Err(e) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(e)
        }
        Ok(()) => child.wait(),
    };
    awaited().remove(&pid);
    result
}

/// Reaps an ended child, also one that this process started before an exec into its successor. Returns its
/// exit status.
fn reap(pidfd: &OwnedFd) -> Option<ExitStatus> {
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG).ok()??;
    // Encoded as by wait(2).
    let code = status.exit_status().map(|code| code << 8).or_else(|| status.terminating_signal())?;
    Some(ExitStatus::from_raw(code))
}

/// Opens a pidfd for the process with this id; `None` when there is none.
///
/// # Errors
/// `Unsupported` when `/proc` belongs to another PID namespace, where the id is another process. Those of
/// pidfd_open(2), such as a lack of descriptors.
pub fn open(pid: u32) -> io::Result<Option<OwnedFd>> {
    let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    let pidfd = match pidfd_open(id, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(None),
        other => other?,
    };
    // `Pid:` is the id in the namespace of this /proc; -1 once the process has been reaped (fs/pidfs.c).
    let elsewhere = || io::Error::new(io::ErrorKind::Unsupported, "/proc is that of another container");
    let info = match fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(elsewhere()),
        other => other?,
    };
    match info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i64>().ok()) {
        Some(-1) => Ok(None),
        Some(shown) if shown == i64::from(pid) => Ok(Some(pidfd)),
        Some(_) | None => Err(elsewhere()),
    }
}

/// Ends every process of our user with the marker of this engine, whatever its group, session or parent,
/// except the spared ones: TERM first, and KILL after the grace. A process that emptied its own environment
/// is not found.
pub fn sweep(engine_id: &str, grace: Duration, spared: &[u32]) {
    sweep_all(engine_id, None, grace, spared);
}

/// The same, with the members of a group whose leader is not reaped yet.
fn sweep_all(engine_id: &str, group: Option<u32>, grace: Duration, spared: &[u32]) {
    let term_until = Instant::now() + grace;
    let kill_until = term_until + KILLED_LIMIT;
    let mut asked = BTreeSet::new();
    for _ in 0..SWEEP_ROUNDS {
        let found: Vec<_> = family(engine_id, group).into_iter().filter(|(pid, _)| !spared.contains(pid)).collect();
        let kills = Instant::now() >= term_until;
        for (pid, pidfd) in &found {
            // Each gets only one TERM: a second one aborts the cleanup of some programs.
            if kills || asked.insert(*pid) {
                let _ = pidfd_send_signal(pidfd, if kills { Signal::KILL } else { Signal::TERM });
            }
        }
        if found.is_empty() {
            return;
        }
        // Their sockets have to be gone before another opencode starts.
        for (_, pidfd) in &found {
            wait_until_readable(pidfd, if kills { kill_until } else { term_until });
        }
    }
}

/// Every living process with the marker of an engine, or in this group. Each was checked while its pidfd was
/// open.
fn family(engine_id: &str, group: Option<u32>) -> Vec<(u32, OwnedFd)> {
    let ourselves = std::process::id();
    // Root can also read the environment of processes of other users: a process with the marker that changed
    // its user is still ours.
    let belongs = |pid: u32| {
        let in_group = || group.is_some_and(|group| stat_field(pid, 5).is_ok_and(|of| of == u64::from(group)));
        carries_marker(pid, engine_id) || in_group()
    };
    pids()
        .filter(|pid| *pid != ourselves && belongs(*pid))
        .filter_map(|pid| Some((pid, open(pid).ok()??)))
        .filter(|(pid, pidfd)| belongs(*pid) && !has_ended(pidfd))
        .collect()
}

/// A process and its ancestors with the marker of an engine: for a command that the agent started, the shells
/// and scripts that wait for the command.
pub fn ancestors(pid: u32, engine_id: &str) -> Vec<u32> {
    // The process itself may have dropped the marker, while its parent has it.
    let mut line = vec![pid];
    let mut next = parent(pid);
    while let Some(pid) = next.filter(|pid| carries_marker(*pid, engine_id) && !line.contains(pid)) {
        line.push(pid);
        next = parent(pid);
    }
    line
}

/// Reaps orphans that were reparented to this process, if it is pid 1 of its namespace: in a container
/// nothing else does. Children that another thread waits for are left alone.
pub fn reap_orphans() {
    if std::process::id() != 1 {
        return;
    }
    let awaited = awaited();
    for pid in pids().filter(|pid| !awaited.contains(pid) && parent(*pid) == Some(1)) {
        if let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            let _ = waitid(WaitId::Pid(id), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        }
    }
}

/// The ids of all processes.
fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The processes of our own user, without this one.
pub fn all_of_ours() -> impl Iterator<Item = u32> {
    let ourselves = std::process::id();
    pids().filter(move |pid| *pid != ourselves && is_ours(*pid))
}

/// The command line of a process; `None` when the process has ended.
pub fn arguments(pid: u32) -> Option<Vec<OsString>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok().filter(|bytes| !bytes.is_empty())?;
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
    Some(bytes.split(|byte| *byte == 0).map(|argument| OsStr::from_bytes(argument).to_owned()).collect())
}

/// The environment that a process of our user was started with; `None` when the process has ended.
pub fn environment(pid: u32) -> Option<BTreeMap<OsString, OsString>> {
    let bytes = fs::read(format!("/proc/{pid}/environ")).ok().filter(|bytes| !bytes.is_empty())?;
    let variable = |entry: &[u8]| {
        let at = entry.iter().position(|byte| *byte == b'=')?;
        Some((OsStr::from_bytes(&entry[..at]).to_owned(), OsStr::from_bytes(&entry[at + 1..]).to_owned()))
    };
    Some(bytes.split(|byte| *byte == 0).filter_map(variable).collect())
}

/// The working directory of a process of our user.
pub fn working_directory(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/cwd")).ok()
}

/// Whether systemd has started a process as this unit, by the control group of the process.
pub fn is_of_unit(pid: u32, unit: &str) -> bool {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    groups.lines().any(|line| line.split('/').any(|part| part == unit))
}

/// The parent of a process.
pub fn parent(pid: u32) -> Option<u32> {
    stat_field(pid, 4).ok()?.try_into().ok()
}

/// The processor time that a process has used, in all its threads.
pub fn processor_time(pid: u32) -> Option<Duration> {
    let ticks = stat_field(pid, 14).ok()? + stat_field(pid, 15).ok()?;
    Some(Duration::from_millis(ticks * (1000 / TICKS_PER_SECOND)))
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
    stat_text(pid, field)?.parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

/// A field of `/proc/<pid>/stat`, counted from 1; 3 and above.
fn stat_text(pid: u32, field: usize) -> io::Result<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the name in parentheses and may itself have spaces and parentheses.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let value = after_name.split_ascii_whitespace().nth(field - 3);
    value.map(str::to_owned).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Whether a process is stopped, by SIGSTOP or a debugger: it answers nothing until it is woken.
pub fn is_stopped(pid: u32) -> bool {
    stat_text(pid, 3).is_ok_and(|state| matches!(&*state, "T" | "t"))
}

/// When a process started, in Unix milliseconds.
pub fn started_at(pid: u32) -> Option<u64> {
    let ticks = start_ticks(pid).ok()?;
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let boot: u64 = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(boot * 1000 + ticks * (1000 / TICKS_PER_SECOND))
}

/// The id of this boot.
fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// The place of this process as one word: the boot, the pid namespace and the network namespace. In another
/// place its pid and ports mean nothing.
///
/// # Errors
/// When `/proc` is missing, or belongs to another namespace.
pub fn place() -> io::Result<String> {
    let namespace =
        |kind: &str| Ok::<_, io::Error>(fs::read_link(format!("/proc/self/ns/{kind}"))?.display().to_string());
    Ok(format!("{}/{}/{}", boot_id()?, namespace("pid")?, namespace("net")?))
}

/// Whether a process runs under our user.
pub fn is_ours(pid: u32) -> bool {
    fs::metadata(format!("/proc/{pid}")).is_ok_and(|process| process.uid() == rustix::process::geteuid().as_raw())
}

/// Everything that carries the marker of an engine.
pub fn marked(engine_id: &str) -> Vec<u32> {
    pids().filter(|pid| carries_marker(*pid, engine_id)).collect()
}

/// A process with its descendants, except those whose parent has ended.
pub fn descendants(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = pids().filter_map(|pid| Some((pid, parent(pid)?))).collect();
    let mut found = vec![root];
    let mut at = 0;
    while let Some(above) = found.get(at).copied() {
        found.extend(parents.iter().filter(|(_, parent)| *parent == above).map(|(pid, _)| *pid));
        at += 1;
    }
    found
}

/// Resident memory of these processes, in bytes; pages that several of them share are counted for each.
/// None when none of them lives.
pub fn resident(pids: &[u32]) -> Option<u64> {
    total(pids, memory)
}

/// The proportional share (PSS) of these processes, in bytes: pages that several of them share are
/// counted once. None when none of them lives.
pub fn share(pids: &[u32]) -> Option<u64> {
    total(pids, |pid| kilobytes(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?, "Pss:"))
}

fn total(pids: &[u32], of: impl Fn(u32) -> Option<u64>) -> Option<u64> {
    let found: Vec<u64> = pids.iter().filter_map(|pid| of(*pid)).collect();
    if found.is_empty() { None } else { Some(found.iter().sum()) }
}

/// Resident memory of a process in bytes: `VmRSS` of `/proc/<pid>/status`.
pub fn memory(pid: u32) -> Option<u64> {
    kilobytes(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "VmRSS:")
}

/// A line like `VmRSS:    1234 kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}
