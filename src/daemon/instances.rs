//! Which instances opencode has loaded, as far as we know.
//!
//! opencode has no list of them, and asking about one that is not loaded loads it. So account is
//! kept of what was routed, and it is written into the state file (behind), for the daemon that
//! adopts this opencode.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::state::Store;

/// The account.
pub struct Instances<'env> {
    store: &'env Store,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    /// Of the opencode that this is about.
    generation: u64,
    directories: BTreeSet<String>,
}

impl<'env> Instances<'env> {
    /// An account of nothing.
    pub fn new(store: &'env Store) -> Instances<'env> {
        Instances { store, loaded: Mutex::default() }
    }

    /// Another opencode: this is what it has loaded.
    pub fn begin(&self, generation: u64, directories: Vec<String>) {
        let mut loaded = self.lock();
        *loaded = Loaded { generation, directories: directories.into_iter().collect() };
    }

    /// An instance has been loaded, or may have been. News of an earlier opencode is dropped.
    pub fn loaded(&self, generation: u64, directory: &str) {
        self.change(generation, |directories| directories.insert(directory.to_owned()));
    }

    /// An instance has been disposed.
    pub fn disposed(&self, generation: u64, directory: &str) {
        self.change(generation, |directories| directories.remove(directory));
    }

    /// Whether an instance is loaded.
    pub fn is_loaded(&self, directory: &str) -> bool {
        self.lock().directories.contains(directory)
    }

    /// Whether an instance is loaded in this opencode.
    pub fn is_loaded_in(&self, generation: u64, directory: &str) -> bool {
        let loaded = self.lock();
        loaded.generation == generation && loaded.directories.contains(directory)
    }

    fn lock(&self) -> MutexGuard<'_, Loaded> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, generation: u64, change: impl FnOnce(&mut BTreeSet<String>) -> bool) {
        let mut loaded = self.lock();
        if loaded.generation == generation && change(&mut loaded.directories) {
            self.store.note_instances(loaded.directories.iter().cloned().collect());
        }
    }
}
