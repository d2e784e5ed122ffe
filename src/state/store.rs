//! The state in memory and on disk.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::State;
use super::file::{temporary, write_whole};
use crate::error::Result;
use crate::log::now_ms;
use crate::paths::DataDir;
use crate::workspace::{Workspace, WorkspaceId};

/// How long after a change of `lastUsedAt` it is written at the latest: it is worth no more than
/// one write a second.
const WRITE_BEHIND: Duration = Duration::from_secs(1);

/// The state in memory and on disk.
pub struct Store {
    path: PathBuf,
    /// What readers see. Held for the time of copying a pointer.
    current: Mutex<Arc<State>>,
    /// Held while a change is made and written: changes happen one after the other.
    writing: Mutex<()>,
    /// What is newer in memory than on disk, to be written behind.
    behind: Mutex<Pending>,
    changed: Condvar,
}

/// What is newer in memory than on disk.
#[derive(Default)]
struct Pending {
    used: HashMap<WorkspaceId, u64>,
    instances: Option<Loaded>,
}

/// Which instances are loaded, and which of those are no workspace's.
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

    /// Puts back what could not be written, unless something newer has come.
    fn restore(&mut self, older: Pending) {
        for (id, at) in older.used {
            self.used.entry(id).or_insert(at);
        }
        self.instances = self.instances.take().or(older.instances);
    }
}

/// A lock whose data no panic can have left half-changed: it is only ever replaced.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Reads the file. The caller holds `daemon.lock`.
    ///
    /// # Errors
    /// As [`State::read`].
    pub fn open(data_dir: &DataDir) -> Result<Store> {
        let path = data_dir.state();
        let state = State::read(&path)?;
        // What a crash in the middle of a write has left.
        let _ = fs::remove_file(temporary(&path));
        Ok(Store {
            path,
            current: Mutex::new(Arc::new(state)),
            writing: Mutex::default(),
            behind: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// The state as it is on disk.
    pub fn snapshot(&self) -> Arc<State> {
        lock(&self.current).clone()
    }

    /// Makes a change: it is on disk when this returns, or nothing has changed.
    ///
    /// # Errors
    /// Those of `change`; `state_write_failed`.
    pub fn update<T>(&self, change: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let _writing = lock(&self.writing);
        let mut state = State::clone(&self.snapshot());
        let result = change(&mut state)?;
        let pending = std::mem::take(&mut *lock(&self.behind));
        pending.apply(&mut state);
        state.cli_version = Some(env!("CARGO_PKG_VERSION").to_owned());
        if let Err(e) = write_whole(&self.path, &state) {
            lock(&self.behind).restore(pending);
            return Err(e);
        }
        *lock(&self.current) = Arc::new(state);
        Ok(result)
    }

    /// Notes that a workspace was used; written within a second. Never waits for the disk.
    pub fn touch(&self, id: &str) {
        self.note(|pending| {
            pending.used.insert(id.to_owned(), now_ms());
        });
    }

    /// Notes which instances are loaded, and which of those are no workspace's; written within a
    /// second. Never waits for the disk.
    pub fn note_instances(&self, instances: Vec<String>, strangers: Vec<String>) {
        self.note(|pending| pending.instances = Some(Loaded { instances, strangers }));
    }

    fn note(&self, change: impl FnOnce(&mut Pending)) {
        let mut behind = lock(&self.behind);
        let is_first = behind.is_empty();
        change(&mut behind);
        drop(behind);
        // For the others the writing thread waits already.
        if is_first {
            self.changed.notify_all();
        }
    }

    /// The state with what is still to be written in it.
    pub fn latest(&self) -> Arc<State> {
        let snapshot = self.snapshot();
        let behind = lock(&self.behind);
        if behind.is_empty() {
            return snapshot;
        }
        let mut state = State::clone(&snapshot);
        behind.apply(&mut state);
        Arc::new(state)
    }

    /// Writes behind for as long as the daemon lives; for a thread of its own. The daemon's last
    /// change writes what is left.
    pub fn write_behind(&self) {
        let mut last_write: Option<Instant> = None;
        loop {
            {
                let mut behind = lock(&self.behind);
                while behind.is_empty() {
                    behind = self.changed.wait(behind).unwrap_or_else(PoisonError::into_inner);
                }
                while let Some(rest) = last_write.and_then(|at| WRITE_BEHIND.checked_sub(at.elapsed())) {
                    if rest.is_zero() {
                        break;
                    }
                    behind = self.changed.wait_timeout(behind, rest).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
            if let Err(e) = self.update(|_| Ok(())) {
                crate::log!("{e}");
            }
            last_write = Some(Instant::now());
        }
    }
}
