//! Threads that wait for work of one kind, and do themselves what they have found: to hand it to another
//! thread would take longer than most requests.
//!
//! Invariants: while one of them works, another one waits; at most [`SPARE`] wait.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;

/// How many threads wait at most: the one that is woken by work, and the one that takes its place then.
/// More would save the start of a thread when requests come together, and hold memory for days.
const SPARE: usize = 2;

/// The threads that wait for work of one kind.
pub struct Crew {
    /// How many there are that do not work.
    waiting: AtomicUsize,
}

impl Crew {
    /// No threads yet.
    pub const fn new() -> Crew {
        Crew { waiting: AtomicUsize::new(0) }
    }

    /// Counts this thread among those that wait. False when there are enough: it is to end.
    pub fn join(&self) -> bool {
        let another = |waiting: usize| (waiting < SPARE).then_some(waiting + 1);
        self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, another).is_ok()
    }

    /// Counts this thread among those that work. The last one that has waited starts another one first,
    /// which runs `member`; that has to begin with [`Crew::join`].
    ///
    /// # Errors
    /// Those of starting a thread: no other one may be waiting now, so this one has to [`Crew::join`] again.
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
