//! A pool of threads that wait for work and carry it out themselves: handing it to another thread would take
//! longer than most requests.
//!
//! Invariants: while a thread works, another one waits; at most [`SPARE`] threads wait.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;

/// The most waiting threads: one that takes the next work, and one that then takes its place. More would save
/// the start of a thread when requests arrive together, but hold memory for days.
const SPARE: usize = 2;

/// The threads of a pool.
pub struct Crew {
    /// How many threads wait.
    waiting: AtomicUsize,
}

impl Crew {
    /// No threads yet.
    pub const fn new() -> Crew {
        Crew { waiting: AtomicUsize::new(0) }
    }

    /// Counts this thread as waiting. False if enough threads wait: this thread shall end.
    pub fn join(&self) -> bool {
        let another = |waiting: usize| (waiting < SPARE).then_some(waiting + 1);
        self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, another).is_ok()
    }

    /// Counts this thread as working. If no other thread waits, first starts one that runs `member`, which must
    /// begin with [`Crew::join`].
    ///
    /// # Errors
    /// Those of starting a thread: perhaps no thread waits now, so this one must [`Crew::join`] again.
    pub fn leave(&self, member: impl FnOnce() + Send + 'static) -> io::Result<()> {
        match self.waiting.fetch_sub(1, Ordering::Relaxed) {
            1 => Builder::new().spawn(member).map(drop),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn last_thread_that_waits_starts_another_before_it_works() {
        static CREW: Crew = Crew::new();
        let (sender, started) = channel();
        let start = move || sender.send(CREW.join()).unwrap();
        assert!(CREW.join() && CREW.join() && !CREW.join(), "two wait");
        CREW.leave(|| unreachable!("another one waits")).unwrap();
        CREW.leave(start).unwrap();
        assert!(started.recv_timeout(Duration::from_secs(60)).unwrap(), "the new one waits");
        assert!(CREW.join() && !CREW.join(), "one that has worked waits again, the next one ends");
    }
}
