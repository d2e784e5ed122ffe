//! Threads that each take the next request themselves and serve it, with one always waiting.
//!
//! A request that is handed from a thread that takes it to one that serves it waits once more
//! for a processor, which takes longer than all that is done for a small one. Nor is a thread
//! started for each: those that have served wait for the next for a moment. The last one waits
//! without a limit, so that a burst leaves no threads behind and an idle daemon is not woken.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Builder, Scope};
use std::time::Duration;

/// How long a thread waits that is not the last: requests of one client come closer together.
const IDLE_LIMIT: Duration = Duration::from_secs(2);

/// How many threads wait at most: one that waits for a connection has a descriptor for it already.
const WAITING_LIMIT: usize = 8;

/// What waiting for a request has brought.
pub enum Taken<R> {
    /// One.
    Request(R),
    /// None in that time.
    Nothing,
    /// There will be no more; so it is for each thread that asks.
    Closed,
}

/// What threads are for.
pub trait Service: Sync {
    /// What is taken and served.
    type Request;

    /// How many threads wait, or are about to.
    fn waiting(&self) -> &AtomicUsize;

    /// Waits for a request; not much longer than the limit, if there is one.
    fn take(&self, limit: Option<Duration>) -> Taken<Self::Request>;

    /// Serves it, however long that takes. A panic is the end of this request only.
    fn serve(&self, request: Self::Request);

    /// Does not serve it, for want of a thread that would wait for the next.
    fn refuse(&self, request: Self::Request);
}

/// Starts the first thread, or one more.
///
/// # Errors
/// When there is no thread to be had.
pub fn start<'scope, S: Service>(service: &'scope S, scope: &'scope Scope<'scope, '_>) -> io::Result<()> {
    service.waiting().fetch_add(1, Ordering::Relaxed);
    if let Err(e) = Builder::new().spawn_scoped(scope, || work(service, scope)) {
        service.waiting().fetch_sub(1, Ordering::Relaxed);
        return Err(e);
    }
    Ok(())
}

/// What each thread does.
fn work<'scope, S: Service>(service: &'scope S, scope: &'scope Scope<'scope, '_>) {
    let waiting = service.waiting();
    loop {
        let is_last = waiting.load(Ordering::Relaxed) == 1;
        match service.take((!is_last).then_some(IDLE_LIMIT)) {
            Taken::Closed => return,
            Taken::Nothing => {
                let others = |waiting: usize| (waiting > 1).then(|| waiting - 1);
                if waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, others).is_ok() {
                    return;
                }
            }
            Taken::Request(request) => {
                let was_last = waiting.fetch_sub(1, Ordering::Relaxed) == 1;
                if was_last && start(service, scope).is_err() {
                    service.refuse(request);
                } else if catch_unwind(AssertUnwindSafe(|| service.serve(request))).is_err() {
                    // It has said so on standard error.
                    crate::log!("a request failed (see above)");
                }
                if waiting.load(Ordering::Relaxed) >= WAITING_LIMIT {
                    return;
                }
                waiting.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}
