//! A deadline for a socket: the operating system only limits each single read and write.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A socket whose reads and writes can be given a time limit.
pub trait Socket: Read + Write {
    /// Limits each following read and write; `None` waits for ever.
    fn limit(&self, limit: Option<Duration>) -> io::Result<()>;
}

impl Socket for TcpStream {
    fn limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)?;
        self.set_write_timeout(limit)
    }
}

impl Socket for &TcpStream {
    fn limit(&self, limit: Option<Duration>) -> io::Result<()> {
        (**self).limit(limit)
    }
}

impl Socket for UnixStream {
    fn limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)?;
        self.set_write_timeout(limit)
    }
}

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

    fn limit(&self) -> io::Result<()> {
        let Some(deadline) = self.deadline else { return self.socket.limit(None) };
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.limit(Some(rest))
    }

    /// Makes a system call within the remaining time.
    fn within(&mut self, mut call: impl FnMut(&mut S) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            self.limit()?;
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

impl<S: Socket + Read> Read for Timed<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.within(|socket| socket.read(buffer))
    }
}

impl<S: Socket + Write> Write for Timed<S> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.within(|socket| socket.write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}
