//! Waiting for descriptors: flags that wake every waiter, pipes, sockets, pidfds.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ChildStdout;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};
use rustix::io::Errno;

/// Whether the process behind a pidfd has ended.
pub fn has_ended(pidfd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // If poll fails, the end has not been seen.
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Whether all descriptors are neither readable nor hung up; false also when poll fails.
pub fn are_silent<const N: usize>(descriptors: [BorrowedFd<'_>; N]) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut watched = descriptors.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN | PollFlags::RDHUP));
    poll(&mut watched, Some(&now)).is_ok_and(|ready| ready == 0)
}

/// A descriptor that is readable for every waiter while the flag is up.
pub struct Flag(OwnedFd);

impl Flag {
    /// A flag that is down.
    pub fn new() -> io::Result<Flag> {
        Ok(Flag(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Raises the flag.
    pub fn raise(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Lowers the flag.
    pub fn lower(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8][..]);
    }

    /// Whether the flag is up.
    pub fn is_raised(&self) -> bool {
        has_ended(&self.0) // which only checks whether it is readable
    }
}

impl AsFd for Flag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A duration in the kernel's form.
pub fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() }
}

/// A set of descriptors to wait for, each with a number. The cost of a wait does not depend on the size of the
/// set (epoll(7)). Closing a descriptor removes it.
pub struct Watch(OwnedFd);

/// The most numbers that one wait returns; the others are returned by the next.
const WATCH_BATCH: usize = 64;

impl Watch {
    /// Watches nothing yet.
    pub fn new() -> io::Result<Watch> {
        Ok(Watch(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Watches a descriptor.
    ///
    /// # Errors
    /// Those of the operating system, such as its limit of watched descriptors.
    pub fn add(&self, fd: impl AsFd, number: u64) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        Ok(epoll::add(&self.0, fd, epoll::EventData::new_u64(number), flags)?)
    }

    /// Stops watching a descriptor.
    pub fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.0, fd);
    }

    /// Waits until descriptors are readable or hung up, and returns their numbers: none at the
    /// deadline, or when a signal interrupts the wait.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn wait(&self, deadline: Option<Instant>) -> io::Result<Vec<u64>> {
        let rest = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
        let mut events = Vec::with_capacity(WATCH_BATCH);
        match epoll::wait(&self.0, spare_capacity(&mut events), rest.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(events.iter().map(|event| event.data.u64()).collect()),
            Err(e) => Err(e.into()),
        }
    }
}

/// Reads the output of a process until it ends, closes its output, or has printed `limit` bytes. Does not wait for
/// a child of the process that keeps the pipe open.
///
/// # Errors
/// `TimedOut` at the deadline; `Interrupted` when the flag is raised; those of reading.
pub fn read_output(
    pipe: ChildStdout,
    pidfd: &OwnedFd,
    limit: usize,
    flag: &Flag,
    deadline: Instant,
) -> io::Result<String> {
    rustix::io::ioctl_fionbio(&pipe, true)?;
    let (mut pipe, mut output) = (pipe, Vec::new());
    loop {
        let mut fds =
            [PollFd::new(&pipe, PollFlags::IN), PollFd::new(pidfd, PollFlags::IN), PollFd::new(flag, PollFlags::IN)];
        let rest = deadline.saturating_duration_since(Instant::now());
        match poll(&mut fds, Some(&timespec(rest))) {
            Err(Errno::INTR) => continue,
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            other => other?,
        };
        if !fds[2].revents().is_empty() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let ended = !fds[1].revents().is_empty();
        let mut buffer = [0; 4096];
        let over = match pipe.read(&mut buffer) {
            Ok(0) => true,
            Ok(count) => {
                output.extend_from_slice(&buffer[..count]);
                output.len() >= limit
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => ended,
            Err(e) => return Err(e),
        };
        if over {
            return Ok(String::from_utf8_lossy(&output).into_owned());
        }
    }
}

/// Waits until a descriptor is readable (true) or a flag is raised (false).
///
/// # Errors
/// `TimedOut` at the deadline, if there is one; those of poll(2).
pub fn wait_readable(fd: impl AsFd, flag: &Flag, deadline: Option<Instant>) -> io::Result<bool> {
    let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(flag, PollFlags::IN)];
    loop {
        let rest = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
        match poll(&mut fds, rest.as_ref()) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(fds[1].revents().is_empty()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Why [`wait_with_peer`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The descriptor is readable.
    Readable,
    /// The peer has closed its side of the connection, or reset it.
    HungUp,
    /// Neither, before the deadline.
    TimedOut,
}

/// Waits until a descriptor is readable or the peer of a socket hangs up. Data from the peer is not read and
/// does not end the wait.
///
/// # Errors
/// Those of poll(2).
pub fn wait_with_peer(fd: impl AsFd, peer: impl AsFd, deadline: Instant) -> io::Result<Woken> {
    loop {
        let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&peer, PollFlags::RDHUP)];
        let rest = timespec(deadline.saturating_duration_since(Instant::now()));
        match poll(&mut fds, Some(&rest)) {
            Ok(0) => return Ok(Woken::TimedOut),
            Ok(_) if !fds[1].revents().is_empty() => return Ok(Woken::HungUp),
            Ok(_) => return Ok(Woken::Readable),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Waits until the deadline, a raised flag, or the end of the connection in both directions.
pub fn pause(flag: &Flag, connection: impl AsFd, deadline: Instant) {
    loop {
        let rest = timespec(deadline.saturating_duration_since(Instant::now()));
        // The kernel reports POLLHUP without being asked.
        let mut fds = [PollFd::new(flag, PollFlags::IN), PollFd::new(&connection, PollFlags::empty())];
        if !matches!(poll(&mut fds, Some(&rest)), Err(Errno::INTR)) {
            return;
        }
    }
}

/// Waits until a descriptor is readable; a pidfd is readable once its process has ended. False at the
/// deadline.
pub fn wait_until_readable(fd: impl AsFd, deadline: Instant) -> bool {
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timespec(rest))) {
            Err(Errno::INTR) => {}
            Ok(0) | Err(_) => return false,
            Ok(_) => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    use rustix::process::{Pid, Signal};

    use super::super::process::open;
    use super::*;

    #[test]
    fn raised_flag_wakes_every_waiter_until_it_is_lowered() {
        let (flag, far) = (Flag::new().unwrap(), Instant::now() + Duration::from_secs(60));
        assert!(!flag.is_raised());
        for _ in 0..2 {
            flag.raise();
            assert!(flag.is_raised() && wait_until_readable(&flag, far));
        }
        let quiet = Flag::new().unwrap();
        assert!(!wait_readable(&quiet, &flag, Some(far)).unwrap(), "the flag, not the descriptor");
        flag.lower();
        assert!(!flag.is_raised());
        let over = wait_readable(&quiet, &flag, Some(Instant::now()));
        assert_eq!(over.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn output_is_awaited_until_the_deadline_or_a_stop() {
        let mut child = Command::new("sleep").arg("60").stdout(Stdio::piped()).spawn().unwrap();
        let pidfd = open(child.id()).unwrap().unwrap();
        let pipe = || child.stdout.as_ref().unwrap().as_fd().try_clone_to_owned().unwrap().into();
        let flag = Flag::new().unwrap();
        let late = read_output(pipe(), &pidfd, 4096, &flag, Instant::now() + Duration::from_millis(10));
        flag.raise();
        let stopped = read_output(pipe(), &pidfd, 4096, &flag, Instant::now() + Duration::from_secs(60));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(stopped.unwrap_err().kind(), io::ErrorKind::Interrupted);
    }

    #[test]
    fn output_ends_with_the_process() {
        // The background sleep keeps the pipe open.
        let mut command = Command::new("sh");
        command.args(["-c", "echo 1.2.3; sleep 60 &"]).process_group(0);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let pidfd = open(child.id()).unwrap().unwrap();
        let (flag, deadline) = (Flag::new().unwrap(), Instant::now() + Duration::from_secs(60));
        let output = read_output(child.stdout.take().unwrap(), &pidfd, 4096, &flag, deadline);
        let group = Pid::from_child(&child);
        child.wait().unwrap();
        rustix::process::kill_process_group(group, Signal::KILL).unwrap();
        assert_eq!(output.unwrap(), "1.2.3\n");
    }
}
