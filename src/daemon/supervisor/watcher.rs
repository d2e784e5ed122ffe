//! Sees the end of the process, and bounds its log while that grows: one thread in `poll`, without a
//! wake-up as long as nothing happens.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

use super::handle::Message;
use crate::log;
use crate::system::wait::{Flag, timespec};

/// How long the log may grow unseen after a look at it: four looks a second cost nothing.
const LOG_PAUSE: Duration = Duration::from_millis(250);
/// The same after the log had to be cut: something writes without end, gigabytes within seconds.
const FLOOD_PAUSE: Duration = Duration::from_millis(20);

/// The process that is watched, with its generation.
type Watched = Option<(Arc<OwnedFd>, u64)>;

/// How the supervisor tells the watcher what to watch.
pub struct Watcher {
    watched: Mutex<Watched>,
    changed: Flag,
    log: PathBuf,
}

impl Watcher {
    /// A watcher of nothing; `log` is bounded whenever a process is watched.
    ///
    /// # Errors
    /// Without a descriptor for it.
    pub fn new(log: PathBuf) -> io::Result<Watcher> {
        Ok(Watcher { watched: Mutex::default(), changed: Flag::new()?, log })
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on this process is watched, or none.
    pub fn watch(&self, watched: Watched) {
        *self.lock() = watched;
        self.changed.raise();
    }

    /// Watches for as long as the daemon lives.
    pub fn run(&self, messages: &Sender<Message>) {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        if let Err(e) = &inotify {
            // The probes bound the log too, every ten seconds.
            crate::log!("cannot watch opencode's log: {e}");
        }
        let inotify = inotify.ok();
        let mut arm_at = None;
        loop {
            let watched = self.lock().clone();
            if arm_at.is_some_and(|at| Instant::now() >= at) {
                arm_at = self.bound(inotify.as_ref());
            }
            let mut fds = vec![PollFd::new(&self.changed, PollFlags::IN)];
            fds.extend(inotify.iter().map(|inotify| PollFd::new(inotify, PollFlags::IN)));
            fds.extend(watched.iter().map(|(pidfd, _)| PollFd::new(pidfd, PollFlags::IN)));
            let rest = arm_at.map(|at| timespec(at.saturating_duration_since(Instant::now())));
            match poll(&mut fds, rest.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => {
                    crate::log!("cannot wait for opencode: {e}");
                    std::thread::sleep(LOG_PAUSE);
                }
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                self.changed.lower();
                arm_at.get_or_insert_with(Instant::now);
            }
            if let (Some(inotify), true) = (&inotify, ready.get(1).copied().unwrap_or_default()) {
                // What it says is only that there is something to look at.
                while rustix::io::read(inotify, &mut [0; 1024][..]).is_ok_and(|count| count > 0) {}
                arm_at.get_or_insert_with(|| Instant::now() + LOG_PAUSE);
            }
            if let (Some((pidfd, generation)), true) = (watched, ready.last().copied().unwrap_or_default()) {
                if crate::system::wait::has_ended(&pidfd) {
                    let _ = messages.send(Message::Exited { generation });
                    let mut current = self.lock();
                    if current.as_ref().is_some_and(|(_, of)| *of == generation) {
                        *current = None;
                    }
                }
            }
        }
    }

    /// Bounds the log and has its next growth reported. When this is to be done again, if it is to be
    /// done without a report.
    fn bound(&self, inotify: Option<&OwnedFd>) -> Option<Instant> {
        // First the watch, then the look: what grows in between is reported.
        let armed =
            inotify.map(|inotify| inotify::add_watch(inotify, &self.log, WatchFlags::MODIFY | WatchFlags::ONESHOT));
        let cut = log::bound(&self.log).unwrap_or_default();
        match armed {
            Some(Ok(_)) if cut => Some(Instant::now() + FLOOD_PAUSE),
            Some(_) | None => None,
        }
    }
}
