//! Accesses to the user's directories, which may be on a hung network mount.
//!
//! A hung access (a "check") cannot be cancelled. So every check runs in a thread that its caller does not
//! join, and the caller continues without the answer after a limit. Invariant: at most [`HANGING_LIMIT`]
//! threads hang; hung directories are remembered, and [`all`] skips them until their thread returns.

use std::collections::HashMap;
use std::io;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{Builder, available_parallelism};
use std::time::{Duration, Instant};

/// How many checks may hang at once. Each holds a thread until its mount is back.
const HANGING_LIMIT: usize = 32;
/// A check that takes this long stops blocking the others: [`all`] gives them another thread. A working disk
/// answers within milliseconds.
const STALL: Duration = Duration::from_millis(100);
/// The number of directories that justifies a second thread: a check takes about a microsecond, the start of a
/// thread some tens.
const PER_THREAD: usize = 2000;

/// The number of hung checks, and the parents of the directories that hung in [`all`], with their counts.
/// Siblings of a hung directory are assumed to be on the same mount.
struct Hanging {
    checks: usize,
    above: Option<HashMap<PathBuf, usize>>,
}

static HANGING: Mutex<Hanging> = Mutex::new(Hanging { checks: 0, above: None });
/// [`Hanging::checks`], readable without the lock.
static HUNG_CHECKS: AtomicUsize = AtomicUsize::new(0);

impl Hanging {
    fn lock() -> MutexGuard<'static, Hanging> {
        HANGING.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&mut self, above: Option<&Path>) {
        self.checks += 1;
        HUNG_CHECKS.store(self.checks, Ordering::Relaxed);
        if let Some(above) = above {
            *self.above.get_or_insert_default().entry(above.to_owned()).or_default() += 1;
        }
    }

    fn end(&mut self, above: Option<&Path>) {
        self.checks -= 1;
        HUNG_CHECKS.store(self.checks, Ordering::Relaxed);
        let (Some(above), Some(all)) = (above, &mut self.above) else { return };
        if let Some(count) = all.get_mut(above) {
            *count -= 1;
            if *count == 0 {
                all.remove(above);
            }
        }
    }
}

/// Whether a sibling of this directory hangs.
fn hangs(path: &Path) -> bool {
    if HUNG_CHECKS.load(Ordering::Relaxed) == 0 {
        return false;
    }
    let hanging = Hanging::lock();
    path.parent().is_some_and(|above| hanging.above.as_ref().is_some_and(|all| all.contains_key(above)))
}

/// The states of a check.
const PENDING: u8 = 0;
const RUNNING: u8 = 1;
/// Its caller has given up and counted it as hung.
const GIVEN_UP: u8 = 2;
const DONE: u8 = 3;

/// Work for a thread.
type Work = Box<dyn FnOnce() + Send>;

/// A thread that waits for work, if any: starting a thread takes longer than most checks.
static SPARE: Mutex<Option<Sender<Work>>> = Mutex::new(None);

/// Runs `work` in the spare thread, or in a new thread, which becomes the spare one if there is none by then.
///
/// # Errors
/// If a thread cannot be started.
fn in_thread(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let spare = || SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut work: Work = Box::new(work);
    if let Some(thread) = spare().take() {
        // Only a thread that waits is here, so it takes the work.
        return thread.send(work).map_err(|_| io::ErrorKind::BrokenPipe.into());
    }
    let repeat = move || {
        loop {
            work();
            let (sender, receiver) = channel();
            match &mut *spare() {
                Some(_) => return,
                none => *none = Some(sender),
            }
            match receiver.recv() {
                Ok(next) => work = next,
                Err(_) => return,
            }
        }
    };
    Builder::new().spawn(repeat).map(drop)
}

/// Runs a check in its own thread; `None` when it exceeds the limit, or when no thread can be started.
pub fn within<T: Send + 'static>(limit: Duration, check: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    if HUNG_CHECKS.load(Ordering::Relaxed) >= HANGING_LIMIT {
        return None;
    }
    let (sender, receiver) = channel();
    let ours = Arc::new(AtomicU8::new(RUNNING));
    let theirs = ours.clone();
    let work = move || {
        let found = check();
        if theirs.swap(DONE, Ordering::AcqRel) == GIVEN_UP {
            Hanging::lock().end(None);
        }
        let _ = sender.send(found);
    };
    in_thread(work).ok()?;
    match receiver.recv_timeout(limit) {
        Ok(found) => Some(found),
        Err(RecvTimeoutError::Disconnected) => None, // the check panicked
        Err(RecvTimeoutError::Timeout) => {
            // Holding the lock across the exchange keeps the thread from ending the check before it is
            // counted.
            let mut hanging = Hanging::lock();
            if ours.compare_exchange(RUNNING, GIVEN_UP, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                hanging.begin(None);
            }
            None
        }
    }
}

/// A check of [`all`].
struct Check<A> {
    state: AtomicU8,
    answer: OnceLock<A>,
}

/// The data shared by the threads of [`all`].
struct Checks<T, A, P, L> {
    items: Vec<T>,
    path: P,
    check: L,
    next: AtomicUsize,
    checks: Vec<Check<A>>,
    /// The number of unfinished items.
    left: AtomicUsize,
}

impl<T, A, P: Fn(&T) -> &Path, L: Fn(&Path) -> A> Checks<T, A, P, L> {
    /// Processes one item after the other, until none is left or a check was given up.
    fn work(&self, done: &Sender<()>) {
        // A thread whose check was given up has been replaced by another.
        let mut was_given_up = false;
        while !was_given_up {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = self.items.get(at) else { return };
            let path = (self.path)(item);
            if !hangs(path) {
                let check = &self.checks[at];
                check.state.store(RUNNING, Ordering::Release);
                let _ = check.answer.set((self.check)(path));
                was_given_up = check.state.swap(DONE, Ordering::AcqRel) == GIVEN_UP;
                if was_given_up {
                    Hanging::lock().end(path.parent());
                }
            }
            if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                let _ = done.send(());
            }
        }
    }

    fn running(&self) -> Vec<usize> {
        (0..self.checks.len()).filter(|at| self.checks[*at].state.load(Ordering::Acquire) == RUNNING).collect()
    }

    /// Counts a check as hung, unless it has just returned.
    fn give_up(&self, at: usize) -> bool {
        let mut hanging = Hanging::lock();
        let state = &self.checks[at].state;
        let given_up = state.compare_exchange(RUNNING, GIVEN_UP, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if given_up {
            hanging.begin((self.path)(&self.items[at]).parent());
        }
        given_up
    }
}

/// Checks the path of each item; `None` for those without an answer within the limit, and for siblings of
/// hung directories.
pub fn all<T: Send + Sync + 'static, A: Clone + Send + Sync + 'static>(
    limit: Duration,
    items: Vec<T>,
    path: impl Fn(&T) -> &Path + Send + Sync + 'static,
    check: impl Fn(&Path) -> A + Send + Sync + 'static,
) -> Vec<Option<A>> {
    let count = items.len();
    let new_check = || Check { state: AtomicU8::new(PENDING), answer: OnceLock::new() };
    let checks = (0..count).map(|_| new_check()).collect();
    let checks =
        Arc::new(Checks { items, path, check, next: AtomicUsize::new(0), checks, left: AtomicUsize::new(count) });
    let (done, finished) = channel();
    let start = || {
        let (checks, done) = (checks.clone(), done.clone());
        HUNG_CHECKS.load(Ordering::Relaxed) < HANGING_LIMIT && in_thread(move || checks.work(&done)).is_ok()
    };
    let threads = match count / PER_THREAD {
        // The number of processors is read from the files of the control group, which takes longer than one check.
        0 | 1 => 1,
        several => several.min(available_parallelism().map_or(1, NonZero::get)),
    };
    let deadline = Instant::now() + limit;
    let mut running = Vec::new();
    let mut threads = if count == 0 { 0 } else { (0..threads).filter(|_| start()).count() };
    while threads > 0 && finished.recv_timeout(STALL).is_err() {
        // A check that was already running in the last round counts as hung; its answer is still used if it
        // comes before the deadline.
        let now = checks.running();
        for at in now.iter().filter(|at| running.contains(*at)) {
            if checks.give_up(*at) && !start() {
                threads -= 1;
            }
        }
        running = now;
        if Instant::now() >= deadline {
            break;
        }
    }
    checks.checks.iter().map(|check| check.answer.get().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Condvar;

    use super::*;

    /// A mount that hangs until it is told to answer.
    #[derive(Clone, Default)]
    struct Mount(Arc<(Mutex<bool>, Condvar)>);

    impl Mount {
        fn wait(&self) {
            let (answers, changed) = &*self.0;
            drop(changed.wait_while(answers.lock().unwrap(), |answers| !*answers).unwrap());
        }

        fn answer(&self) {
            *self.0.0.lock().unwrap() = true;
            self.0.1.notify_all();
        }
    }

    fn until(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !condition() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A single test, since hung mounts are remembered for the whole process.
    #[test]
    fn hung_mount_blocks_no_caller() {
        let mount = Mount::default();
        let check = |mount: &Mount| {
            let mount = mount.clone();
            move |path: &Path| {
                if path.starts_with("/hung") {
                    mount.wait();
                }
                path.starts_with("/there")
            }
        };
        let paths = || -> Vec<PathBuf> {
            let more = (0..50).map(|n| format!("/hung/{n}"));
            ["/there/a", "/hung/a", "/gone/b", "/hung/c", "/there/d"]
                .into_iter()
                .map(PathBuf::from)
                .chain(more.map(PathBuf::from))
                .collect()
        };
        let ask = |seconds| all(Duration::from_secs(seconds), paths(), |path| path, check(&mount));
        let expected = [Some(true), None, Some(false), None, Some(true)];
        // One thread hangs, and siblings of the hung directory are skipped.
        until("the other answers", || {
            let answers = ask(1);
            assert_eq!((answers[1], answers[3], &answers[5..]), (None, None, &[None; 50][..]));
            answers[..5] == expected
        });
        until("one check to hang", || HUNG_CHECKS.load(Ordering::Relaxed) == 1);
        // From then on no call waits, and no further thread hangs.
        assert_eq!(ask(60)[..5], expected);
        assert_eq!(HUNG_CHECKS.load(Ordering::Relaxed), 1);

        let hung = mount.clone();
        assert_eq!(within(Duration::from_millis(10), move || hung.wait()), None);
        assert_eq!(within(Duration::from_secs(60), || 7), Some(7));
        assert_eq!(HUNG_CHECKS.load(Ordering::Relaxed), 2);
        // The number of hung threads is limited.
        for _ in 2..HANGING_LIMIT {
            let hung = mount.clone();
            within(Duration::ZERO, move || hung.wait());
        }
        assert_eq!(within(Duration::from_secs(60), || 7), None);
        assert_eq!(ask(60), [None; 55]);

        // Once the mount is back, everything is checked again.
        mount.answer();
        until("the checks that hung to end", || HUNG_CHECKS.load(Ordering::Relaxed) == 0);
        let answers = ask(60);
        assert_eq!(answers[..5], [Some(true), Some(false), Some(false), Some(false), Some(true)]);
        assert_eq!(answers[5..], [Some(false); 50]);
        assert_eq!(all(Duration::from_secs(60), Vec::<PathBuf>::new(), |path| path, check(&mount)), [None; 0]);
    }

    #[test]
    fn thread_of_a_check_serves_the_next() {
        let id = || {
            // Wait for the thread to become the spare one.
            std::thread::sleep(Duration::from_millis(1));
            within(Duration::from_secs(60), || std::thread::current().id()).unwrap()
        };
        // Tests that run at the same time may take it.
        assert!((0..10_000).any(|_| id() == id()));
    }

    #[test]
    fn many_directories_are_checked_in_parallel() {
        let paths: Vec<PathBuf> = (0..3 * PER_THREAD).map(|n| PathBuf::from(format!("/p/{n}"))).collect();
        let is_even = |path: &Path| path.to_str().unwrap().ends_with(['0', '2', '4', '6', '8']);
        // The other test of this process may use up all threads for a while.
        until("an answer for each", || {
            let answers = all(Duration::from_secs(60), paths.clone(), |path| path, is_even);
            answers.iter().zip(&paths).all(|(answer, path)| *answer == Some(is_even(path)))
        });
    }
}
