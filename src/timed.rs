//! A deadline for a socket: the operating system only limits each single read and write.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A socket whose reads and writes can be given a time limit.
pub trait Socket: Read + Write {
    /// Limits each following read; `None` waits for ever.
    fn limit_reads(&self, limit: Option<Duration>) -> io::Result<()>;
    /// Limits each following write; `None` waits for ever.
    fn limit_writes(&self, limit: Option<Duration>) -> io::Result<()>;
}

macro_rules! sockets {
    ($($socket:ty),*) => { $(
        impl Socket for $socket {
            fn limit_reads(&self, limit: Option<Duration>) -> io::Result<()> {
                self.set_read_timeout(limit)
            }

            fn limit_writes(&self, limit: Option<Duration>) -> io::Result<()> {
                self.set_write_timeout(limit)
            }
        }
    )* };
}

sockets!(TcpStream, &TcpStream, &UnixStream);

/// A socket that fails with `TimedOut` after the deadline, however slowly bytes arrive.
pub struct Timed<S> {
    /// The socket.
    pub socket: S,
    /// `None` waits for ever.
    pub deadline: Option<Instant>,
}

impl<S: Socket> Timed<S> {
    /// Wraps a socket.
    pub fn new(socket: S, deadline: Option<Instant>) -> Timed<S> {
        Timed { socket, deadline }
    }

    /// Makes a system call within the remaining time.
    fn within(
        &mut self,
        limit: impl Fn(&S, Option<Duration>) -> io::Result<()>,
        mut call: impl FnMut(&mut S) -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            let rest = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if rest.is_some_and(|rest| rest.is_zero()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            limit(&self.socket, rest)?;
            match call(&mut self.socket) {
                // Ctrl-Z and fg interrupt a call with a timeout.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The kernel reports a timeout as "would block".
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
                other => return other,
            }
        }
    }
}

impl<S: Socket> Read for Timed<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.within(S::limit_reads, |socket| socket.read(buffer))
    }
}

impl<S: Socket> Write for Timed<S> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.within(S::limit_writes, |socket| socket.write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}
