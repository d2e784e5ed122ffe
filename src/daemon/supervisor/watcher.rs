//! Detects the exit of the process and bounds its log while that grows: one thread in `poll`, without
//! wake-ups while nothing happens.

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

/// The interval between checks of a growing log: four checks a second cost nothing.
const LOG_PAUSE: Duration = Duration::from_millis(250);
/// The same after the log was truncated: a flood can write gigabytes within seconds.
const FLOOD_PAUSE: Duration = Duration::from_millis(20);

/// The watched process and its generation.
type Watched = Option<(Arc<OwnedFd>, u64)>;

/// The watcher, shared by its thread and the supervisor.
pub struct Watcher {
    watched: Mutex<Watched>,
    changed: Flag,
    log: PathBuf,
}

impl Watcher {
    /// A watcher that watches no process yet; `log` is opencode's log.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new(log: PathBuf) -> io::Result<Watcher> {
        Ok(Watcher { watched: Mutex::default(), changed: Flag::new()?, log })
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the watched process; `None` watches none.
    pub fn watch(&self, watched: Watched) {
        *self.lock() = watched;
        self.changed.raise();
    }

    /// Watches for as long as the daemon lives.
    pub fn run(&self, messages: &Sender<Message>) {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        if let Err(e) = &inotify {
            // Without inotify the probes still bound the log, every ten seconds.
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
                // The events themselves carry nothing of interest.
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

    /// Bounds the log and arms inotify for its next growth. Returns when to check again without waiting for
    /// inotify, if the log was just truncated.
    fn bound(&self, inotify: Option<&OwnedFd>) -> Option<Instant> {
        // Arm first, then check: inotify reports growth in between.
        let armed =
            inotify.map(|inotify| inotify::add_watch(inotify, &self.log, WatchFlags::MODIFY | WatchFlags::ONESHOT));
        let cut = log::bound(&self.log).unwrap_or_default();
        match armed {
            Some(Ok(_)) if cut => Some(Instant::now() + FLOOD_PAUSE),
            Some(_) | None => None,
        }
    }
}
