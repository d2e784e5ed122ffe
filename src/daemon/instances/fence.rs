//! Fences around workspaces whose loading kills opencode.
//!
//! A death of opencode counts against the workspaces whose instances were being loaded. If only one was being
//! loaded, the death is certainly its fault. If several were, each is a suspect and is loaded alone the next
//! time, which clears it or makes the second death certain. A workspace with [`DEATHS_TO_FENCE`] within [`WINDOW`],
//! the last of them certain, is fenced until a reset or another version of opencode.
//!
//! Pure: no clock, thread, lock or disk.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// The deaths that fence a workspace. A single one may be a coincidence: another crash, or a lack of memory.
const DEATHS_TO_FENCE: usize = 2;
/// Deaths further apart are not counted together: the user has probably changed the workspace in between.
pub const WINDOW: Duration = Duration::from_secs(600);

/// Why a workspace is fenced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The version of opencode that ended.
    pub version: String,
    /// The last output of opencode before its second death.
    pub output: String,
}

struct Death {
    at: Instant,
    /// No other instance was being loaded.
    certain: bool,
}

/// Deaths by directory, and the fenced directories.
#[derive(Default)]
pub struct Fences {
    deaths: HashMap<String, Vec<Death>>,
    fenced: BTreeMap<String, Fence>,
}

impl Fences {
    /// Restores the fences of an earlier daemon.
    pub fn restore(&mut self, fences: impl IntoIterator<Item = (String, Fence)>) {
        self.fenced.extend(fences);
    }

    /// Counts a death of opencode while these directories were being loaded. `certain`: nothing else can be
    /// at fault. Returns the directories that are newly fenced.
    pub fn died(&mut self, loading: &[String], certain: bool, fence: &Fence, now: Instant) -> Vec<String> {
        self.deaths.retain(|_, deaths| {
            deaths.retain(|death| now.duration_since(death.at) < WINDOW);
            !deaths.is_empty()
        });
        let mut fenced = Vec::new();
        for directory in loading {
            let deaths = self.deaths.entry(directory.clone()).or_default();
            deaths.push(Death { at: now, certain });
            if certain && deaths.len() >= DEATHS_TO_FENCE {
                self.deaths.remove(directory);
                self.fenced.insert(directory.clone(), fence.clone());
                fenced.push(directory.clone());
            }
        }
        fenced
    }

    /// An instance was loaded: it is cleared of the deaths in which it was one of several.
    pub fn loaded(&mut self, directory: &str) {
        if let Some(deaths) = self.deaths.get_mut(directory) {
            deaths.retain(|death| death.certain);
            if deaths.is_empty() {
                self.deaths.remove(directory);
            }
        }
    }

    /// Whether a directory has to be loaded alone.
    pub fn is_suspect(&self, directory: &str, now: Instant) -> bool {
        let deaths = self.deaths.get(directory);
        deaths.is_some_and(|deaths| deaths.iter().any(|death| now.duration_since(death.at) < WINDOW))
    }

    /// The fence around a directory.
    pub fn get(&self, directory: &str) -> Option<&Fence> {
        self.fenced.get(directory)
    }

    /// Every fence.
    pub fn all(&self) -> impl Iterator<Item = (&String, &Fence)> {
        self.fenced.iter()
    }

    /// Lifts the fence of a directory and forgets its deaths; whether there was a fence.
    pub fn reset(&mut self, directory: &str) -> bool {
        self.deaths.remove(directory);
        self.fenced.remove(directory).is_some()
    }

    /// opencode has this version: fences for other versions are lifted. Returns whether there were any.
    pub fn version_is(&mut self, version: &str) -> bool {
        let before = self.fenced.len();
        self.fenced.retain(|_, fence| fence.version == version);
        self.fenced.len() < before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence() -> Fence {
        Fence { version: "1.2.3".to_owned(), output: "boom".to_owned() }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn two_certain_deaths_within_ten_minutes_fence_a_workspace() {
        let (mut fences, start) = (Fences::default(), Instant::now());
        assert!(fences.died(&names(&["a"]), true, &fence(), start).is_empty());
        assert_eq!(fences.get("a"), None);
        let later = start + WINDOW - Duration::from_millis(1);
        assert!(fences.is_suspect("a", later));
        assert_eq!(fences.died(&names(&["a"]), true, &fence(), later), ["a"]);
        assert_eq!(fences.get("a"), Some(&fence()));
        assert_eq!(fences.get("b"), None);
    }

    #[test]
    fn deaths_ten_minutes_apart_fence_no_workspace() {
        let (mut fences, start) = (Fences::default(), Instant::now());
        for n in 0..20 {
            assert!(fences.died(&names(&["a"]), true, &fence(), start + WINDOW * n).is_empty());
        }
        assert!(!fences.is_suspect("a", start + WINDOW * 20));
    }

    #[test]
    fn shared_deaths_make_suspects_and_a_lone_death_fences() {
        let (mut fences, now) = (Fences::default(), Instant::now());
        for _ in 0..5 {
            assert!(fences.died(&names(&["good", "bad"]), false, &fence(), now).is_empty());
        }
        assert!(fences.is_suspect("good", now) && fences.is_suspect("bad", now));
        fences.loaded("good");
        assert!(!fences.is_suspect("good", now));
        assert_eq!(fences.died(&names(&["bad"]), true, &fence(), now), ["bad"]);
        // The good one was cleared, so its next death is its first.
        assert!(fences.died(&names(&["good"]), true, &fence(), now).is_empty());
    }

    #[test]
    fn successful_load_does_not_clear_a_certain_death() {
        let (mut fences, now) = (Fences::default(), Instant::now());
        fences.died(&names(&["a"]), true, &fence(), now);
        fences.loaded("a");
        assert_eq!(fences.died(&names(&["a"]), true, &fence(), now), ["a"]);
    }

    #[test]
    fn reset_forgets_the_deaths() {
        let (mut fences, now) = (Fences::default(), Instant::now());
        assert!(!fences.reset("a"));
        fences.died(&names(&["a"]), true, &fence(), now);
        assert!(!fences.reset("a"));
        fences.died(&names(&["a"]), true, &fence(), now);
        assert_eq!(fences.get("a"), None);
        fences.died(&names(&["a"]), true, &fence(), now);
        assert!(fences.reset("a"));
        assert_eq!(fences.get("a"), None);
        assert!(fences.died(&names(&["a"]), true, &fence(), now).is_empty());
    }

    #[test]
    fn new_version_of_opencode_lifts_every_fence() {
        let mut fences = Fences::default();
        fences.restore([("a".to_owned(), fence())]);
        assert!(!fences.version_is("1.2.3"));
        assert_eq!(fences.all().collect::<Vec<_>>(), [(&"a".to_owned(), &fence())]);
        assert!(fences.version_is("1.2.4"));
        assert_eq!(fences.all().count(), 0);
    }
}
