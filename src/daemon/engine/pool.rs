//! Idle connections to opencode that can serve further requests.
//!
//! Invariants: a pool belongs to one [`super::Endpoint`], so to one process and one listening socket, and
//! ends with it; each connection was proven when it was made; a connection that was closed, or that received
//! data nobody requested, is not used again.

use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::system::wait;

/// The most idle connections: more than the concurrent requests of a browser (6). Requests beyond that open
/// new ones.
const POOL_LIMIT: usize = 8;
/// How long an idle connection is kept. Node's server, on which 2.x may run, closes it after 5 s; Bun's
/// keeps it for more than two minutes.
const POOL_TIME: Duration = Duration::from_secs(4);

/// The connections, each with the time since when it is idle, the most recently used last.
#[derive(Default)]
pub struct Pool(Mutex<Vec<(Instant, TcpStream)>>);

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Vec<(Instant, TcpStream)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes out a connection that is open and silent, if its process lives.
    pub fn take(&self, process: &OwnedFd) -> Option<TcpStream> {
        self.close_idle();
        loop {
            let (_, stream) = self.lock().pop()?;
            if wait::are_silent([process.as_fd(), stream.as_fd()]) {
                return Some(stream);
            }
        }
    }

    /// Puts in a connection after a complete reply of known length.
    pub fn put(&self, stream: TcpStream) {
        let mut connections = self.lock();
        if connections.len() == POOL_LIMIT {
            connections.remove(0);
        }
        connections.push((Instant::now(), stream));
    }

    /// Closes the connections that have been idle for too long.
    pub fn close_idle(&self) {
        self.lock().retain(|(since, _)| since.elapsed() < POOL_TIME);
    }

    /// Closes all connections.
    pub fn close(&self) {
        self.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::system::process;

    #[test]
    fn only_a_silent_connection_to_a_living_process_is_used_again() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let living = process::open(child.id()).unwrap().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pair = || {
            let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (ours, listener.accept().unwrap().0)
        };
        let pool = Pool::default();
        let [(first, _a), (second, mut talking), (third, closed)] = [pair(), pair(), pair()];
        let address = first.local_addr().unwrap();
        [first, second, third].into_iter().for_each(|stream| pool.put(stream));
        talking.write_all(b"HTTP/1.1 200 OK\r\n").unwrap();
        drop(closed);
        assert_eq!(pool.take(&living).unwrap().local_addr().unwrap(), address);
        assert!(pool.take(&living).is_none());

        let kept: Vec<_> = (0..=POOL_LIMIT).map(|_| pair()).collect();
        let (ours, _theirs): (Vec<_>, Vec<_>) = kept.into_iter().unzip();
        ours.into_iter().for_each(|stream| pool.put(stream));
        assert_eq!(pool.lock().len(), POOL_LIMIT);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(pool.take(&living).is_none());
        assert_eq!(pool.lock().len(), 0);
    }
}
