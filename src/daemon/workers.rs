//! Threads for short jobs: one that is idle takes the next, else another is started.
//!
//! To start a thread costs about as much as to answer a small request. An idle one leaves after
//! a moment, so that a burst leaves no threads behind and an idle daemon is not woken.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, Scope};
use std::time::Duration;

/// How long a thread waits for the next job: requests of one client come closer together.
const IDLE_LIMIT: Duration = Duration::from_secs(2);

type Job<'job> = Box<dyn FnOnce() + Send + 'job>;

/// The threads and what they are to do. Jobs may borrow what outlives the workers.
#[derive(Default)]
pub struct Workers<'job> {
    inner: Mutex<Inner<'job>>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner<'job> {
    /// Never more than there are idle threads.
    jobs: VecDeque<Job<'job>>,
    idle: usize,
    closed: bool,
}

impl<'job> Workers<'job> {
    fn lock(&self) -> MutexGuard<'_, Inner<'job>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a job done.
    ///
    /// # Errors
    /// When no thread is idle and none can be started; the job is dropped.
    pub fn run<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        job: impl FnOnce() + Send + 'job,
    ) -> io::Result<()> {
        let mut inner = self.lock();
        if inner.idle > inner.jobs.len() {
            inner.jobs.push_back(Box::new(job));
            self.changed.notify_one();
            return Ok(());
        }
        drop(inner);
        let work = move || {
            do_one(job);
            while let Some(job) = self.next() {
                do_one(job);
            }
        };
        Builder::new().spawn_scoped(scope, work).map(|_| ())
    }

    /// The next job for an idle thread; `None` when it is to leave.
    fn next(&self) -> Option<Job<'job>> {
        let mut inner = self.lock();
        inner.idle += 1;
        if inner.jobs.is_empty() && !inner.closed {
            inner = self.changed.wait_timeout(inner, IDLE_LIMIT).unwrap_or_else(PoisonError::into_inner).0;
        }
        inner.idle -= 1;
        inner.jobs.pop_front()
    }

    /// Lets idle threads leave at once.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

/// A job that panics has said so on standard error, and takes nothing with it.
fn do_one(job: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(job)).is_err() {
        crate::log!("a request failed (see above)");
    }
}
