//! The state in memory and on disk.
//!
//! Invariant: under a lock of the store only the disk of the data directory is accessed, and under the lock
//! that readers take none at all.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::State;
use super::file::{Stamp, keep_beside, replace_whole, temporary};
use crate::error::{Error, Result};
use crate::lock;
use crate::log::now_ms;
use crate::paths::{DataDir, is_absent};
use crate::workspace::{Workspace, WorkspaceId};

/// The longest delay before a change of `lastUsedAt` is written: it is worth at most one write a second.
const WRITE_BEHIND: Duration = Duration::from_secs(1);

/// Changes in memory that are not on disk yet.
#[derive(Clone, Default)]
struct Pending {
    used: HashMap<WorkspaceId, u64>,
    instances: Option<Loaded>,
}

/// The loaded instances, and those of them that belong to no workspace.
#[derive(Clone)]
struct Loaded {
    instances: Vec<String>,
    strangers: Vec<String>,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.used.is_empty() && self.instances.is_none()
    }

    fn apply(&self, state: &mut State) {
        if let (Some(loaded), Some(engine)) = (&self.instances, &mut state.opencode) {
            engine.instances.clone_from(&loaded.instances);
            engine.strangers = Some(loaded.strangers.clone());
        }
        if self.used.is_empty() {
            return;
        }
        for workspace in &mut state.workspaces {
            if let Some(&at) = self.used.get(&workspace.id) {
                if workspace.last_used_at.is_none_or(|before| before < at) {
                    Workspace::edit(workspace).last_used_at = Some(at);
                }
            }
        }
    }

    /// Merges changes that could not be written; newer ones win.
    fn restore(&mut self, older: Pending) {
        for (id, at) in older.used {
            self.used.entry(id).or_insert(at);
        }
        self.instances = self.instances.take().or(older.instances);
    }
}

/// The part that readers see.
struct Shared {
    /// The state on disk.
    current: Arc<State>,
    /// The stamp of its file; `None` when there is no file yet.
    stamp: Option<Stamp>,
    /// Changes for the next write.
    behind: Pending,
    /// Changes of the write under way.
    under_way: Pending,
    /// A message for the next client.
    notice: Option<String>,
}

/// The lock file at the path is no longer the one that this daemon holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Another daemon holds the lock there, and has adopted our opencode.
    pub is_taken_over: bool,
}

/// The state in memory and on disk.
pub struct Store {
    path: PathBuf,
    lock_path: PathBuf,
    /// Device and inode of the lock file that this daemon holds.
    lock_id: (u64, u64),
    /// Never held during I/O.
    shared: Mutex<Shared>,
    /// Held while a change is made and written: it serialises changes.
    writing: Mutex<()>,
    changed: Condvar,
    lost: OnceLock<Lost>,
    on_loss: OnceLock<Box<dyn Fn(Lost) + Send + Sync>>,
}

/// Locks, also after a panic of another thread: the data is only ever replaced as a whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Reads the state file. The caller holds `daemon.lock`, whose open file is `held`.
    ///
    /// # Errors
    /// As [`State::read`].
    pub fn open(data_dir: &DataDir, held: &File) -> Result<Store> {
        let (path, lock_path) = (data_dir.state(), data_dir.daemon_lock());
        let held = held.metadata().map_err(|e| Error::io("examine", &lock_path, e))?;
        let (state, stamp) = State::read_stamped(&path)?.map_or_else(Default::default, |(s, stamp)| (s, Some(stamp)));
        // A crash during a write may have left it.
        let _ = fs::remove_file(temporary(&path));
        let (behind, under_way) = (Pending::default(), Pending::default());
        Ok(Store {
            path,
            lock_path,
            lock_id: (held.dev(), held.ino()),
            shared: Mutex::new(Shared { current: Arc::new(state), stamp, behind, under_way, notice: None }),
            writing: Mutex::default(),
            changed: Condvar::new(),
            lost: OnceLock::new(),
            on_loss: OnceLock::new(),
        })
    }

    /// Sets the function that is called once when the lock file turns out to be another one: the daemon must
    /// end, since a second one may run on the same files.
    pub fn when_lost(&self, act: impl Fn(Lost) + Send + Sync + 'static) {
        let _ = self.on_loss.set(Box::new(act));
    }

    /// Whether the lock file turned out to be another one, so that the files belong to another daemon.
    pub fn lost(&self) -> Option<Lost> {
        self.lost.get().copied()
    }

    /// The state on disk.
    pub fn snapshot(&self) -> Arc<State> {
        lock(&self.shared).current.clone()
    }

    /// The state with pending changes and edits by hand.
    pub fn latest(&self) -> Arc<State> {
        if self.was_edited() {
            let writing = lock(&self.writing);
            if self.was_edited() {
                if let Err(e) = self.write(&writing, |_| Ok(())) {
                    crate::log!("{e}");
                }
            }
        }
        let (current, pending) = {
            let shared = lock(&self.shared);
            if shared.behind.is_empty() && shared.under_way.is_empty() {
                return shared.current.clone();
            }
            let mut pending = shared.behind.clone();
            pending.restore(shared.under_way.clone());
            (shared.current.clone(), pending)
        };
        let mut state = State::clone(&current);
        pending.apply(&mut state);
        Arc::new(state)
    }

    /// Makes a change: it is on disk when this returns, or nothing has changed. `change` must not access the
    /// disk.
    ///
    /// # Errors
    /// Those of `change`; `state_write_failed`.
    pub fn update<T>(&self, change: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        self.write(&lock(&self.writing), change)
    }

    fn write<T>(&self, _writing: &MutexGuard<'_, ()>, change: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        self.check_lock()?;
        let before = self.snapshot();
        let (edit, seen) = self.read_edit(&before);
        let mut state = match &edit {
            Edit::None | Edit::Invalid(_) | Edit::Late => State::clone(&before),
            Edit::Valid { state, .. } => State::clone(state),
        };
        let result = change(&mut state)?;
        let pending = {
            let mut shared = lock(&self.shared);
            shared.under_way = std::mem::take(&mut shared.behind);
            shared.under_way.clone()
        };
        pending.apply(&mut state);
        state.cli_version = Some(env!("CARGO_PKG_VERSION").to_owned());
        let mut notice = None;
        let written = replace_whole(&self.path, &state, || {
            // The write took milliseconds, in which the file may have been edited.
            let edit = if Stamp::of(&self.path).is_ok_and(|found| found != seen) { Edit::Late } else { edit };
            notice = self.keep_edit(edit)?;
            Ok(())
        });
        let mut shared = lock(&self.shared);
        let pending = std::mem::take(&mut shared.under_way);
        match written {
            Ok(stamp) => {
                let state = Arc::new(state);
                let old = std::mem::replace(&mut shared.current, state);
                shared.stamp = Some(stamp);
                if let Some(notice) = notice {
                    crate::log!("{notice}");
                    shared.notice = Some(notice);
                }
                drop(shared);
                drop(old); // perhaps with ten thousand workspaces, which readers need not wait for
                Ok(result)
            }
            Err(e) => {
                shared.behind.restore(pending);
                Err(e)
            }
        }
    }

    /// Checks that the lock file is still the one that this daemon holds: a second daemon can start after the
    /// lock file was removed, or the data directory removed and created again.
    ///
    /// # Errors
    /// `state_write_failed` when it is another file; the daemon then stops.
    pub fn check_lock(&self) -> Result<()> {
        let is_ours = match fs::symlink_metadata(&self.lock_path) {
            Ok(found) => (found.dev(), found.ino()) == self.lock_id,
            Err(e) if is_absent(&e) => false,
            Err(e) => return Err(Error::io("examine", &self.lock_path, e)),
        };
        if is_ours && self.lost.get().is_none() {
            return Ok(());
        }
        let mut is_first = false;
        let lost = *self.lost.get_or_init(|| {
            is_first = true;
            Lost { is_taken_over: self.is_taken_over() }
        });
        if let (true, Some(act)) = (is_first, self.on_loss.get()) {
            act(lost);
        }
        let gone = "daemon.lock is no longer the file that this daemon has locked; it was removed, or its directory";
        Err(Error::StateWriteFailed { what: "use", path: self.path.clone(), source: io::Error::other(gone) })
    }

    /// Whether another daemon holds the lock at the path now and has our opencode in its state file.
    fn is_taken_over(&self) -> bool {
        let Some(ours) = &self.snapshot().opencode else { return false };
        let is_held = lock::if_held(&self.lock_path).is_ok_and(|held| held.is_some());
        is_held
            && State::read(&self.path)
                .is_ok_and(|state| state.opencode.is_some_and(|theirs| theirs.engine_id == ours.engine_id))
    }

    /// Whether the file has changed since the last read or write.
    fn was_edited(&self) -> bool {
        // Read it first: a concurrent write by the daemon must not look like an edit.
        let known = lock(&self.shared).stamp;
        Stamp::of(&self.path).is_ok_and(|found| found != known)
    }

    /// The edit of the file by hand, and the stamp of the version that was read.
    fn read_edit(&self, ours: &State) -> (Edit, Option<Stamp>) {
        let known = lock(&self.shared).stamp;
        if !self.was_edited() {
            return (Edit::None, known);
        }
        match State::read_stamped(&self.path) {
            Ok(Some((edited, stamp))) => match ours.difference(&edited) {
                Some(difference) => {
                    (Edit::Valid { state: Box::new(ours.with_registry_of(edited)), difference }, Some(stamp))
                }
                None => (Edit::None, Some(stamp)),
            },
            // The file was removed: it is simply written again.
            Ok(None) => (Edit::None, None),
            Err(e) => (Edit::Invalid(e), Stamp::of(&self.path).ok().flatten()),
        }
    }

    /// Keeps a copy of an edit that is about to be lost. Returns the message about the edit.
    fn keep_edit(&self, edit: Edit) -> Result<Option<String>> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        match edit {
            Edit::None => Ok(None),
            Edit::Valid { difference, .. } => {
                Ok(Some(format!("{name} was edited by hand; the daemon has taken the edit over: {difference}")))
            }
            Edit::Late if Stamp::of(&self.path).is_ok_and(|found| found.is_none()) => Ok(None),
            Edit::Late => {
                let kept = keep_beside(&self.path, "edited")?;
                let kept = kept.file_name().unwrap_or_default().to_string_lossy();
                Ok(Some(format!("{name} was edited by hand during a write; the edit is kept beside it as {kept}")))
            }
            Edit::Invalid(e) => {
                let kept = keep_beside(&self.path, "edited")?;
                let kept = kept.file_name().unwrap_or_default().to_string_lossy();
                Ok(Some(format!(
                    "{name} was edited by hand and cannot be read ({e}); the edit is kept beside it as {kept}, and \
                     the registry is as it was before"
                )))
            }
        }
    }

    /// Leaves a message for the next client.
    pub fn tell(&self, notice: String) {
        lock(&self.shared).notice = Some(notice);
    }

    /// Takes the message for the next client.
    pub fn take_notice(&self) -> Option<String> {
        lock(&self.shared).notice.take()
    }

    /// Records that a workspace was used; written within a second. Never waits for the disk.
    pub fn touch(&self, id: &str) {
        self.note(|pending| {
            pending.used.insert(id.to_owned(), now_ms());
        });
    }

    /// Records the loaded instances, and those of them that belong to no workspace; written within a second.
    /// Never waits for the disk.
    pub fn note_instances(&self, instances: Vec<String>, strangers: Vec<String>) {
        self.note(|pending| pending.instances = Some(Loaded { instances, strangers }));
    }

    fn note(&self, change: impl FnOnce(&mut Pending)) {
        let mut shared = lock(&self.shared);
        let is_first = shared.behind.is_empty();
        change(&mut shared.behind);
        drop(shared);
        // If changes were pending before, the writing thread is already awake.
        if is_first {
            self.changed.notify_all();
        }
    }

    /// Writes pending changes for as long as the daemon lives, in its own thread. The last change of the
    /// daemon writes the rest.
    pub fn write_behind(&self) {
        let mut last_write: Option<Instant> = None;
        while self.lost().is_none() {
            {
                let mut shared = lock(&self.shared);
                while shared.behind.is_empty() {
                    shared = self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
                }
                while let Some(rest) = last_write.and_then(|at| WRITE_BEHIND.checked_sub(at.elapsed())) {
                    if rest.is_zero() {
                        break;
                    }
                    shared = self.changed.wait_timeout(shared, rest).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
            if let Err(e) = self.update(|_| Ok(())) {
                crate::log!("{e}");
            }
            last_write = Some(Instant::now());
        }
    }
}

/// An edit of the state file by hand since the daemon last read or wrote it.
enum Edit {
    /// None, or none that changes the registry.
    None,
    /// A valid edit: the state with its registry, and the differences.
    Valid { state: Box<State>, difference: String },
    /// An invalid edit.
    Invalid(Error),
    /// An edit during a write, too late to be merged.
    Late,
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::path::Path;

    use super::*;
    use crate::paths::open_private;
    use crate::workspace::Place;

    struct Scratch(PathBuf);

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// A store with one workspace, in a directory of its own.
    fn store(name: &str) -> (Scratch, Store, String) {
        let path = std::env::temp_dir().join(format!("openwork-store-{}-{name}", std::process::id()));
        let data_dir = DataDir::resolve(Some(&path), None).unwrap();
        data_dir.create().unwrap();
        let held =
            open_private(&data_dir.daemon_lock(), OpenOptions::new().read(true).write(true).create(true)).unwrap();
        let store = Store::open(&data_dir, &held).unwrap();
        let (workspace, _) = store.update(|state| state.add(Place::Local("/nowhere".to_owned()), None)).unwrap();
        (Scratch(path), store, workspace.id.clone())
    }

    fn last_used(state: &State, id: &str) -> Option<u64> {
        state.get(id).unwrap().last_used_at
    }

    fn in_file(store: &Store) -> State {
        State::read(&store.path).unwrap()
    }

    #[test]
    fn pending_use_is_visible_until_written() {
        let (_scratch, store, id) = store("pending");
        let at = 1 << 50;
        lock(&store.shared).behind.used.insert(id.clone(), at);
        assert_ne!(last_used(&store.snapshot(), &id), Some(at));
        assert_eq!(last_used(&store.latest(), &id), Some(at));
        // A write is under way.
        let mut shared = lock(&store.shared);
        shared.under_way = std::mem::take(&mut shared.behind);
        drop(shared);
        assert_eq!(last_used(&store.latest(), &id), Some(at));
        // Later use is newer than what is being written.
        lock(&store.shared).behind.used.insert(id.clone(), at + 1);
        assert_eq!(last_used(&store.latest(), &id), Some(at + 1));
        store.update(|_| Ok(())).unwrap();
        assert_eq!(last_used(&in_file(&store), &id), Some(at + 1));
    }

    #[test]
    fn failed_write_is_retried_with_the_next() {
        let (_scratch, store, id) = store("failed");
        let at = 1 << 50;
        lock(&store.shared).behind.used.insert(id.clone(), at);
        let in_the_way = temporary(&store.path);
        fs::create_dir(&in_the_way).unwrap();
        let failed = store.update(|state| state.rename(&id, "other")).unwrap_err();
        assert!(matches!(failed, Error::StateWriteFailed { .. }), "{failed}");
        assert_eq!(store.snapshot().get(&id).unwrap().name, "nowhere");
        assert_eq!(last_used(&store.latest(), &id), Some(at));
        // A newer use must win.
        lock(&store.shared).behind.used.insert(id.clone(), at + 1);
        store.update(|state| state.rename(&id, "other")).unwrap_err();
        fs::remove_dir(&in_the_way).unwrap();
        store.update(|_| Ok(())).unwrap();
        let state = in_file(&store);
        assert_eq!((last_used(&state, &id), state.get(&id).unwrap().name.as_str()), (Some(at + 1), "nowhere"));
    }

    /// Changes compare strings only; callers resolve links before they take the lock.
    #[test]
    fn changes_do_not_touch_the_disk_of_a_workspace() {
        let (scratch, store, id) = store("strings");
        let (directory, link) = (scratch.0.join("directory"), scratch.0.join("link"));
        fs::create_dir(&directory).unwrap();
        std::os::unix::fs::symlink(&directory, &link).unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        store
            .update(|state| {
                let (linked, _) = state.add(Place::Local(text(&link)), None)?;
                let place = Place::Local(text(&directory));
                assert!(place.entry(&state.workspaces).is_none());
                assert_eq!(place.linked_entry(&state.workspaces).map(|w| w.id.clone()), Some(linked.id.clone()));
                let (second, created) = state.add(place, None)?;
                assert!(created && second.id != linked.id);
                state.relocate(&second.id, Place::Local("/elsewhere".to_owned()))?;
                state.rename(&linked.id, "linked")?;
                state.activate(&linked.id)?;
                state.remove(&id)
            })
            .unwrap();
    }

    #[test]
    fn edit_during_a_write_is_kept() {
        let (scratch, store, id) = store("late");
        store
            .update(|state| {
                fs::rename(&store.path, scratch.0.join("old")).unwrap();
                fs::write(&store.path, "by hand").unwrap();
                state.rename(&id, "other")
            })
            .unwrap();
        assert_eq!(in_file(&store).get(&id).unwrap().name, "other");
        let notice = store.take_notice().expect("a notice");
        let kept = notice.rsplit(' ').next().unwrap();
        assert_eq!(fs::read_to_string(scratch.0.join(kept)).unwrap(), "by hand");
        assert_eq!(store.take_notice(), None);
    }

    #[test]
    fn replaced_lock_file_is_reported_once_and_stops_every_write() {
        let (scratch, store, id) = store("lost");
        let lost = Arc::new(Mutex::new(Vec::new()));
        let seen = lost.clone();
        store.when_lost(move |what| lock(&seen).push(what));
        let lock_file = scratch.0.join("daemon.lock");
        fs::rename(&lock_file, scratch.0.join("moved")).unwrap();
        fs::write(&lock_file, "").unwrap();
        let before = fs::read(&store.path).unwrap();
        for _ in 0..2 {
            store.update(|state| state.rename(&id, "other")).unwrap_err();
        }
        // Restoring the old lock file does not help: another daemon may have run meanwhile.
        fs::rename(scratch.0.join("moved"), &lock_file).unwrap();
        store.update(|state| state.rename(&id, "other")).unwrap_err();
        assert_eq!(*lock(&lost), [Lost { is_taken_over: false }]);
        assert_eq!(fs::read(&store.path).unwrap(), before);
    }
}
