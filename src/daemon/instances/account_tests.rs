//! Scenarios for the account in virtual time. Other files have those about fences, and a random walk that checks
//! the invariants.

#[path = "account_fences_tests.rs"]
mod fences;
#[path = "account_walk_tests.rs"]
mod walk;

use std::collections::BTreeMap;

use super::*;

const TTL: Duration = Duration::from_secs(60);
const A: &str = "/a";
const B: &str = "/b";

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// An account of a running opencode, and the time.
struct Story {
    account: Account,
    now: Instant,
}

impl Story {
    fn new() -> Story {
        let now = Instant::now();
        let mut account = Account::new(Some(TTL), Fences::default());
        account.begin(1, [], now);
        Story { account, now }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    fn enter(&mut self, directory: &str) {
        assert_eq!(self.account.enter(directory, self.now), Entry::Entered);
    }

    fn send(&mut self, directory: &str) -> Turn {
        self.account.send(self.account.generation(), directory, self.now)
    }

    fn reply(&mut self, directory: &str) {
        self.account.replied(self.account.generation(), directory);
    }

    fn leave(&mut self, directory: &str) {
        self.account.leave(directory, None, self.now);
    }

    /// A request from its beginning to its end.
    fn request(&mut self, directory: &str) {
        self.enter(directory);
        assert_eq!(self.send(directory), Turn::Go);
        self.reply(directory);
        self.leave(directory);
    }

    /// A request that was sent and not answered yet.
    fn begin_loading(&mut self, directory: &str) {
        self.enter(directory);
        assert_eq!(self.send(directory), Turn::Go);
    }

    fn event(&mut self, directory: &str, sign: Sign) {
        let ours = directory != "/stranger";
        self.account.observe(self.account.generation(), directory, sign, || ours, self.now);
    }

    /// opencode crashes, and the next one starts. Returns the fenced directories.
    fn crash(&mut self) -> Vec<String> {
        let generation = self.account.generation();
        let failure = Failure { how: "ended with exit status: 1".to_owned(), output: "boom".to_owned() };
        let fenced = self.account.ended(generation, Some(failure), "1.0.0", self.now);
        self.account.begin(generation + 1, [], self.now);
        fenced.into_iter().map(|(directory, _)| directory).collect()
    }

    fn next(&mut self) -> Next {
        self.account.next(self.now)
    }

    /// The eviction that is due now.
    fn eviction(&mut self) -> Eviction {
        match self.next() {
            Next::Evict(eviction) => eviction,
            other => panic!("no eviction, but {other:?}"),
        }
    }

    /// Carries an eviction out.
    fn evict(&mut self, eviction: &Eviction) {
        let since = self.account.dispose(&eviction.directory, self.now);
        self.account.disposed(eviction.generation, &eviction.directory, since, true, self.now);
        self.account.evicted(eviction, Outcome::Disposed, self.now);
    }

    fn due(&self, directory: &str) -> Option<Duration> {
        self.account.usage(directory).due.map(|due| due.duration_since(self.now))
    }
}

// --- Eviction ---

#[test]
fn instance_is_due_after_the_idle_time() {
    let mut story = Story::new();
    assert_eq!(story.next(), Next::Nothing);
    story.request(A);
    let due = story.now + TTL;
    assert_eq!(story.next(), Next::At(due));
    story.pass(TTL - Duration::from_millis(1));
    assert_eq!(story.next(), Next::At(due));
    story.pass(Duration::from_millis(1));
    let eviction = story.eviction();
    assert_eq!((eviction.generation, eviction.directory.as_str(), eviction.since), (1, A, due));
    // An eviction is returned only once.
    assert_eq!(story.next(), Next::Nothing);
    story.evict(&eviction);
    assert_eq!(story.account.usage(A), Usage::default());
    assert_eq!(story.next(), Next::Nothing);
}

#[test]
fn the_first_that_is_due_is_known_without_an_eviction() {
    let mut story = Story::new();
    assert_eq!(story.account.first_due(), None);
    story.request(A);
    let due = story.now + TTL;
    story.pass(secs(1));
    story.request(B);
    assert_eq!(story.account.first_due(), Some(due));
    // An instance that is being disposed is not due.
    story.account.dispose(A, story.now);
    assert_eq!(story.account.first_due(), Some(due + secs(1)));
    story.account.dispose(B, story.now);
    assert_eq!(story.account.first_due(), None);
}

#[test]
fn nothing_is_evicted_without_an_idle_time() {
    let now = Instant::now();
    let mut account = Account::new(None, Fences::default());
    account.begin(1, [(A.to_owned(), true)], now);
    assert_eq!(account.next(now + secs(1_000_000)), Next::Nothing);
}

#[test]
fn use_postpones_eviction() {
    let mut story = Story::new();
    story.request(A);
    for sign in [Sign::Used, Sign::Alive] {
        story.pass(secs(40));
        story.event(A, sign);
    }
    // Activity of the instance itself does not count as use.
    assert_eq!(story.due(A), Some(TTL - secs(40)));
    story.account.touch(A, story.now);
    assert_eq!(story.due(A), Some(TTL));
    story.enter(A);
    assert_eq!(story.due(A), None);
    story.pass(TTL * 10);
    assert_eq!(story.next(), Next::Nothing);
    story.leave(A);
    assert_eq!(story.due(A), Some(TTL));
}

#[test]
fn running_session_counts_as_use() {
    let mut story = Story::new();
    story.request(A);
    for _ in 0..3 {
        story.pass(TTL);
        let eviction = story.eviction();
        story.account.evicted(&eviction, Outcome::Busy, story.now);
        assert_eq!(story.due(A), Some(TTL));
    }
}

#[test]
fn failed_eviction_is_retried_and_does_not_count_as_use() {
    let mut story = Story::new();
    story.request(A);
    story.pass(TTL);
    let eviction = story.eviction();
    story.account.evicted(&eviction, Outcome::Failed, story.now);
    assert!(story.account.is_loaded(A));
    assert_eq!(story.due(A), Some(RETRY));
    story.pass(RETRY);
    let eviction = story.eviction();
    story.account.evicted(&eviction, Outcome::Absent, story.now);
    assert!(!story.account.is_loaded(A));
}

#[test]
fn request_waits_for_a_disposal_under_way() {
    let mut story = Story::new();
    story.request(A);
    story.pass(TTL);
    let eviction = story.eviction();
    assert_eq!(story.account.enter(A, story.now), Entry::Wait);
    assert_eq!(story.account.enter(B, story.now), Entry::Entered);
    let since = story.account.dispose(A, story.now);
    story.account.disposed(1, A, since, true, story.now);
    assert_eq!(story.account.enter(A, story.now), Entry::Wait);
    story.account.evicted(&eviction, Outcome::Disposed, story.now);
    assert_eq!(story.account.enter(A, story.now), Entry::Entered);

    // The same for a disposal by the user.
    let since = story.account.dispose("/c", story.now);
    assert_eq!(story.account.enter("/c", story.now), Entry::Wait);
    story.account.disposed(1, "/c", since, false, story.now);
    assert_eq!(story.account.enter("/c", story.now), Entry::Entered);
}

#[test]
fn request_sent_during_a_disposal_reloads_the_instance() {
    let mut story = Story::new();
    story.request(A);
    let since = story.account.dispose(A, story.now);
    story.pass(secs(10));
    story.account.enter_anyway(A, story.now);
    assert_eq!(story.send(A), Turn::Go);
    story.account.disposed(1, A, since, true, story.now);
    assert!(story.account.is_loaded(A));
    // The late event of that disposal does not undo the load either.
    story.event(A, Sign::Disposed);
    assert!(story.account.is_loaded(A));
    // A second disposal event means that another client disposed it.
    story.reply(A);
    story.event(A, Sign::Disposed);
    assert!(!story.account.is_loaded(A));
}

#[test]
fn event_of_an_own_disposal_may_arrive_for_ten_seconds() {
    for (later, is_own) in [(Duration::ZERO, true), (EVENT_DELAY - secs(1), true), (EVENT_DELAY, false)] {
        let mut story = Story::new();
        story.request(A);
        let since = story.account.dispose(A, story.now);
        story.account.disposed(1, A, since, true, story.now);
        story.pass(later);
        let since = story.account.dispose(B, story.now);
        story.account.disposed(1, B, since, true, story.now);
        story.pass(Duration::from_millis(1));
        story.request(A);
        story.event(A, Sign::Disposed);
        assert_eq!(story.account.is_loaded(A), is_own, "{later:?}");
    }
}

#[test]
fn foreign_disposal_does_not_hide_a_load_under_way() {
    let mut story = Story::new();
    story.request(A);
    story.begin_loading(A);
    story.event(A, Sign::Disposed);
    assert!(story.account.is_loaded(A));
    story.reply(A);
    story.leave(A);
    assert!(story.account.is_loaded(A));
}

#[test]
fn concurrent_evictions_are_limited() {
    let mut story = Story::new();
    let directories: Vec<_> = (0..10).map(|n| format!("/{n}")).collect();
    for directory in &directories {
        story.request(directory);
    }
    story.pass(TTL);
    let mut under_way = Vec::new();
    while let Next::Evict(eviction) = story.next() {
        under_way.push(eviction);
    }
    assert_eq!((under_way.len(), story.next()), (EVICTIONS, Next::Nothing));
    story.evict(&under_way.remove(0));
    story.eviction();
    assert_eq!(story.next(), Next::Nothing);
}

#[test]
fn each_revival_doubles_the_idle_time() {
    let mut story = Story::new();
    story.event(A, Sign::Alive);
    let mut expected = TTL;
    for n in 0..MAX_DOUBLINGS + 3 {
        assert_eq!(story.due(A), Some(expected), "{n}");
        story.pass(expected);
        let eviction = story.eviction();
        story.evict(&eviction);
        story.pass(REVIVAL_TIME - secs(1));
        story.event(A, Sign::Alive);
        expected = TTL * (1 << (n + 1).min(MAX_DOUBLINGS));
    }
    story.pass(story.due(A).unwrap());
    let eviction = story.eviction();
    story.evict(&eviction);
    story.pass(REVIVAL_TIME);
    story.event(A, Sign::Alive);
    assert_eq!(story.due(A), Some(TTL));
}

#[test]
fn evictions_are_remembered_for_as_long_as_a_client_may_revive() {
    let mut story = Story::new();
    story.request(A);
    story.pass(REVIVAL_TIME - secs(1));
    story.request(B);
    story.pass(secs(1));
    story.request("/c");
    for directory in [A, B, "/c"] {
        story.pass(story.due(directory).unwrap());
        let eviction = story.eviction();
        assert_eq!(eviction.directory, directory);
        story.evict(&eviction);
        if directory == B {
            // The eviction of another instance does not hide that a client has revived this one.
            assert_eq!(story.account.evicted.len(), 2);
        }
    }
    assert_eq!(story.account.evicted.len(), 2, "the first was evicted too long ago");
    story.event(B, Sign::Alive);
    assert_eq!(story.due(B), Some(TTL * 2));
}

#[test]
fn request_does_not_double_the_idle_time() {
    let mut story = Story::new();
    story.request(A);
    story.pass(TTL);
    let eviction = story.eviction();
    story.evict(&eviction);
    story.request(A);
    assert_eq!(story.due(A), Some(TTL));
}

#[test]
fn only_present_and_former_workspaces_are_evicted() {
    let mut story = Story::new();
    story.event("/stranger", Sign::Used);
    assert!(story.account.is_loaded("/stranger"));
    assert_eq!(story.due("/stranger"), None);
    story.pass(TTL * 2);
    assert_eq!(story.next(), Next::Nothing);
    // Registering it once is enough, even if the workspace is removed again.
    let revision = story.account.revision();
    story.account.register("/stranger");
    assert_ne!(story.account.revision(), revision);
    assert_eq!(story.eviction().directory, "/stranger");
}

// --- Generations ---

#[test]
fn new_opencode_has_loaded_nothing() {
    let mut story = Story::new();
    story.request(A);
    story.enter(B);
    story.send(B);
    story.crash();
    assert!(!story.account.is_loaded(A) && !story.account.is_loaded(B));
    assert_eq!(story.account.usage(B).streams, 1);
    // Reports about the earlier opencode are dropped.
    story.account.replied(1, B);
    story.account.observe(1, A, Sign::Used, || true, story.now);
    story.account.listed(1, &[A.to_owned()], story.now, |_| true, story.now);
    assert_eq!(story.account.send(1, B, story.now), Turn::Over);
    assert!(!story.account.is_loaded(A) && !story.account.is_loaded(B));
}

#[test]
fn ended_opencode_loads_nothing() {
    let mut story = Story::new();
    assert!(story.account.ended(1, None, "1.0.0", story.now).is_empty());
    story.event(A, Sign::Used);
    story.enter(A);
    assert_eq!(story.send(A), Turn::Over);
    assert!(!story.account.is_loaded(A));
}

#[test]
fn stale_eviction_changes_nothing() {
    let mut story = Story::new();
    story.request(A);
    story.pass(TTL);
    let eviction = story.eviction();
    story.crash();
    // The request still waits, since opencode may still be disposing the instance.
    assert_eq!(story.account.enter(A, story.now), Entry::Wait);
    story.account.evicted(&eviction, Outcome::Absent, story.now);
    story.request(A);
    assert!(story.account.is_loaded(A));
    story.account.evicted(&eviction, Outcome::Absent, story.now);
    assert!(story.account.is_loaded(A));
}

#[test]
fn second_end_of_an_opencode_changes_nothing() {
    let mut story = Story::new();
    story.request(A);
    story.begin_loading(B);
    let failure = || Some(Failure { how: "ended".to_owned(), output: String::new() });
    story.account.ended(2, failure(), "1.0.0", story.now);
    assert!(story.account.end_of(2).is_none() && story.account.is_loaded(A), "that is not the current one");
    story.account.ended(1, failure(), "1.0.0", story.now);
    story.account.ended(1, None, "1.0.0", story.now);
    let end = story.account.end_of(1).unwrap();
    assert_eq!((end.failure.is_some(), &*end.loading), (true, &[B.to_owned()][..]));
}

#[test]
fn late_reply_of_an_earlier_opencode_is_ignored() {
    let mut story = Story::new();
    story.begin_loading(A);
    story.crash();
    assert_eq!(story.send(A), Turn::Go);
    story.account.replied(1, A);
    story.account.leave(A, Some(1), story.now);
    // It is still being loaded, so this is its second death.
    assert_eq!(story.crash(), [A]);
}

#[test]
fn request_that_outlives_opencode_loads_like_any_other() {
    let mut story = Story::new();
    story.begin_loading(A);
    story.crash();
    assert_eq!(story.send(A), Turn::Go);
    story.reply(A);
    story.leave(A);
    story.pass(TTL);
    assert_eq!(story.eviction().directory, A);
}

#[test]
fn ownership_of_a_directory_ends_with_its_opencode() {
    let mut story = Story::new();
    story.request(A);
    story.crash();
    // Meanwhile the workspace was removed, and a client that calls opencode directly loads it.
    story.account.observe(story.account.generation(), A, Sign::Used, || false, story.now);
    assert_eq!((story.account.is_loaded(A), story.due(A)), (true, None));
}

#[test]
fn evictions_under_way_count_beyond_the_end_of_opencode() {
    let mut story = Story::new();
    let directories: Vec<_> = (0..2 * EVICTIONS).map(|n| format!("/{n}")).collect();
    directories.iter().for_each(|directory| story.request(directory));
    story.pass(TTL);
    let under_way: Vec<_> = (0..EVICTIONS).map(|_| story.eviction()).collect();
    story.crash();
    for directory in directories.iter().filter(|directory| under_way.iter().all(|e| e.directory != **directory)) {
        story.request(directory);
    }
    story.pass(TTL);
    assert_eq!(story.next(), Next::Nothing);
    story.account.evicted(&under_way[0], Outcome::Failed, story.now);
    story.eviction();
}

#[test]
fn unused_entries_are_dropped() {
    let mut story = Story::new();
    for n in 0..10 {
        let directory = format!("/{n}");
        story.enter(&directory);
        story.leave(&directory);
        story.request(&directory);
        let since = story.account.dispose(&directory, story.now);
        story.account.disposed(1, &directory, since, true, story.now);
        story.request(&directory);
        story.event(&directory, Sign::Disposed);
        story.event(&directory, Sign::Disposed);
    }
    assert_eq!(story.account.instances.len(), 0);
}

#[test]
fn revision_changes_only_with_the_loaded_instances() {
    let mut story = Story::new();
    let mut before = (story.account.revision(), BTreeMap::new());
    let mut check = |story: &Story, changes: bool| {
        let loaded: BTreeMap<_, _> =
            story.account.loaded().map(|(directory, ours)| (directory.clone(), ours)).collect();
        assert_eq!((story.account.revision() > before.0, loaded != before.1), (changes, changes), "{loaded:?}");
        assert!(story.account.revision() >= before.0);
        before = (story.account.revision(), loaded);
    };
    story.begin_loading(A);
    check(&story, true);
    story.reply(A);
    story.leave(A);
    story.request(A);
    story.account.touch(A, story.now);
    story.event(A, Sign::Used);
    check(&story, false);
    story.event("/stranger", Sign::Alive);
    check(&story, true);
    story.account.register("/stranger");
    check(&story, true);
    story.account.register("/stranger");
    story.account.register("/unknown");
    check(&story, false);
    story.event(A, Sign::Disposed);
    check(&story, true);
    story.account.ended(1, None, "1.0.0", story.now);
    check(&story, true);
    story.account.begin(2, [(B.to_owned(), true)], story.now);
    check(&story, true);
}

#[test]
fn disposal_in_an_earlier_opencode_changes_nothing() {
    let mut story = Story::new();
    story.request(A);
    let since = story.account.dispose(A, story.now);
    story.crash();
    // A client that calls opencode directly has loaded it in the next one.
    story.event(A, Sign::Used);
    story.account.disposed(1, A, since, true, story.now);
    assert!(story.account.is_loaded(A));
    assert_eq!(story.account.enter(A, story.now), Entry::Entered);
}

#[test]
fn adopted_opencode_keeps_its_loaded_instances() {
    let mut story = Story::new();
    story.account.begin(2, [(A.to_owned(), true), ("/stranger".to_owned(), false)], story.now);
    let loaded: BTreeMap<_, _> = story.account.loaded().collect();
    assert_eq!(loaded, BTreeMap::from([(&A.to_owned(), true), (&"/stranger".to_owned(), false)]));
    story.pass(TTL);
    assert_eq!(story.eviction().directory, A);
    assert_eq!(story.next(), Next::Nothing);
}

// --- opencode's list ---

#[test]
fn list_of_opencode_overrides_the_account() {
    let mut story = Story::new();
    story.request(A);
    story.pass(secs(1));
    let asked = story.now;
    story.pass(secs(1));
    // Loaded or mentioned after the request for the list: the list says nothing about them.
    story.begin_loading("/sent");
    story.event("/reported", Sign::Alive);
    story.account.listed(1, &[B.to_owned(), "/stranger".to_owned()], asked, |d| d != "/stranger", story.now);
    let loaded: BTreeMap<_, _> = story.account.loaded().collect();
    let expected = [("/b", true), ("/reported", true), ("/sent", true), ("/stranger", false)];
    assert_eq!(loaded.into_iter().map(|(d, ours)| (d.as_str(), ours)).collect::<Vec<_>>(), expected);
    assert_eq!(story.due(B), Some(TTL));
}

#[test]
fn list_is_ignored_for_instances_under_disposal() {
    let mut story = Story::new();
    let listed = |story: &mut Story, asked| {
        story.account.listed(1, &[A.to_owned()], asked, |_| true, story.now);
        story.account.is_loaded(A)
    };
    story.request(A);
    let since = story.account.dispose(A, story.now);
    story.event(A, Sign::Disposed);
    let asked = story.now;
    assert!(!listed(&mut story, asked), "while it is being disposed");
    story.pass(secs(1));
    story.account.disposed(1, A, since, true, story.now);
    assert!(!listed(&mut story, asked), "asked for before the disposal was over");
    story.enter(A);
    let asked = story.now;
    assert!(listed(&mut story, asked), "somebody else has loaded it since");
}

#[test]
fn disposals_are_remembered_for_ten_seconds() {
    let mut story = Story::new();
    let asked = story.now;
    let dispose = |story: &mut Story, directory: &str| {
        let since = story.account.dispose(directory, story.now);
        story.account.disposed(1, directory, since, true, story.now);
    };
    story.pass(secs(1));
    dispose(&mut story, A);
    story.pass(EVENT_DELAY - secs(1));
    dispose(&mut story, B);
    // The list was requested before both, and arrives only now.
    story.account.listed(1, &[A.to_owned(), B.to_owned()], asked, |_| true, story.now);
    assert!(!story.account.is_loaded(A) && !story.account.is_loaded(B));
    story.pass(secs(1));
    dispose(&mut story, "/c");
    assert_eq!((story.account.disposed.len(), story.account.own_disposals.len()), (2, 2));
}
