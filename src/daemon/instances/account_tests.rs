//! The account in virtual time: scenarios, and a random walk that checks the invariants.

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

    /// A request that is sent and not answered yet.
    fn begin_loading(&mut self, directory: &str) {
        self.enter(directory);
        assert_eq!(self.send(directory), Turn::Go);
    }

    fn told(&mut self, directory: &str, sign: Sign) {
        let ours = directory != "/stranger";
        self.account.told(self.account.generation(), directory, sign, || ours, self.now);
    }

    /// opencode ends by itself, and another is started. Returns the fenced directories.
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

    /// The eviction that is asked for now.
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
    // What is being disposed is not due.
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
        story.told(A, sign);
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
    story.told(A, Sign::Disposed);
    assert!(story.account.is_loaded(A));
    // A second disposal event means that another client disposed it.
    story.reply(A);
    story.told(A, Sign::Disposed);
    assert!(!story.account.is_loaded(A));
}

#[test]
fn event_of_an_own_disposal_may_arrive_for_ten_seconds() {
    for (later, is_own) in [(Duration::ZERO, true), (TOLD_WITHIN - secs(1), true), (TOLD_WITHIN, false)] {
        let mut story = Story::new();
        story.request(A);
        let since = story.account.dispose(A, story.now);
        story.account.disposed(1, A, since, true, story.now);
        story.pass(later);
        let since = story.account.dispose(B, story.now);
        story.account.disposed(1, B, since, true, story.now);
        story.pass(Duration::from_millis(1));
        story.request(A);
        story.told(A, Sign::Disposed);
        assert_eq!(story.account.is_loaded(A), is_own, "{later:?}");
    }
}

#[test]
fn foreign_disposal_does_not_hide_a_load_under_way() {
    let mut story = Story::new();
    story.request(A);
    story.begin_loading(A);
    story.told(A, Sign::Disposed);
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
    story.told(A, Sign::Alive);
    let mut expected = TTL;
    for n in 0..DOUBLINGS + 3 {
        assert_eq!(story.due(A), Some(expected), "{n}");
        story.pass(expected);
        let eviction = story.eviction();
        story.evict(&eviction);
        story.pass(REVIVAL - secs(1));
        story.told(A, Sign::Alive);
        expected = TTL * (1 << (n + 1).min(DOUBLINGS));
    }
    story.pass(story.due(A).unwrap());
    let eviction = story.eviction();
    story.evict(&eviction);
    story.pass(REVIVAL);
    story.told(A, Sign::Alive);
    assert_eq!(story.due(A), Some(TTL));
}

#[test]
fn evictions_are_remembered_for_as_long_as_a_client_may_revive() {
    let mut story = Story::new();
    story.request(A);
    story.pass(REVIVAL - secs(1));
    story.request(B);
    story.pass(secs(1));
    story.request("/c");
    for directory in [A, B, "/c"] {
        story.pass(story.due(directory).unwrap());
        let eviction = story.eviction();
        assert_eq!(eviction.directory, directory);
        story.evict(&eviction);
        if directory == B {
            // The eviction of another does not hide that a client has revived this one.
            assert_eq!(story.account.evicted.len(), 2);
        }
    }
    assert_eq!(story.account.evicted.len(), 2, "the first was evicted too long ago");
    story.told(B, Sign::Alive);
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
    story.told("/stranger", Sign::Used);
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
    story.account.told(1, A, Sign::Used, || true, story.now);
    story.account.listed(1, &[A.to_owned()], story.now, |_| true, story.now);
    assert_eq!(story.account.send(1, B, story.now), Turn::Over);
    assert!(!story.account.is_loaded(A) && !story.account.is_loaded(B));
}

#[test]
fn ended_opencode_loads_nothing() {
    let mut story = Story::new();
    assert!(story.account.ended(1, None, "1.0.0", story.now).is_empty());
    story.told(A, Sign::Used);
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
    // The request still waits: opencode may be carrying the disposal out.
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
    assert!(story.account.end().is_none() && story.account.is_loaded(A), "that is not the current one");
    story.account.ended(1, failure(), "1.0.0", story.now);
    story.account.ended(1, None, "1.0.0", story.now);
    let end = story.account.end().unwrap();
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
fn whose_a_directory_is_is_forgotten_with_its_opencode() {
    let mut story = Story::new();
    story.request(A);
    story.crash();
    // Meanwhile the workspace was removed, and a client that calls opencode directly loads it.
    story.account.told(story.account.generation(), A, Sign::Used, || false, story.now);
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
fn nothing_is_remembered_of_what_is_neither_loaded_nor_used() {
    let mut story = Story::new();
    for n in 0..10 {
        let directory = format!("/{n}");
        story.enter(&directory);
        story.leave(&directory);
        story.request(&directory);
        let since = story.account.dispose(&directory, story.now);
        story.account.disposed(1, &directory, since, true, story.now);
        story.request(&directory);
        story.told(&directory, Sign::Disposed);
        story.told(&directory, Sign::Disposed);
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
    story.told(A, Sign::Used);
    check(&story, false);
    story.told("/stranger", Sign::Alive);
    check(&story, true);
    story.account.register("/stranger");
    check(&story, true);
    story.account.register("/stranger");
    story.account.register("/unknown");
    check(&story, false);
    story.told(A, Sign::Disposed);
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
    story.told(A, Sign::Used);
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
fn list_decides_what_is_loaded() {
    let mut story = Story::new();
    story.request(A);
    story.pass(secs(1));
    let asked = story.now;
    story.pass(secs(1));
    // Loaded or mentioned after the request for the list: the list says nothing about them.
    story.begin_loading("/sent");
    story.told("/told", Sign::Alive);
    story.account.listed(1, &[B.to_owned(), "/stranger".to_owned()], asked, |d| d != "/stranger", story.now);
    let loaded: BTreeMap<_, _> = story.account.loaded().collect();
    let expected = [("/b", true), ("/sent", true), ("/stranger", false), ("/told", true)];
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
    story.told(A, Sign::Disposed);
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
    story.pass(TOLD_WITHIN - secs(1));
    dispose(&mut story, B);
    // The list was asked for before either, and is answered only now.
    story.account.listed(1, &[A.to_owned(), B.to_owned()], asked, |_| true, story.now);
    assert!(!story.account.is_loaded(A) && !story.account.is_loaded(B));
    story.pass(secs(1));
    dispose(&mut story, "/c");
    assert_eq!((story.account.disposed.len(), story.account.own_disposals.len()), (2, 2));
}

// --- Fences ---

#[test]
fn workspace_that_kills_opencode_twice_is_fenced() {
    let mut story = Story::new();
    story.request(B);
    story.begin_loading(A);
    assert!(story.crash().is_empty());
    assert!(story.account.fences().get(A).is_none());
    story.request(B);
    assert_eq!(story.send(A), Turn::Go);
    assert_eq!(story.crash(), [A]);
    assert_eq!(story.account.fences().get(A).unwrap().output, "boom");
    assert_eq!((story.send(A), story.account.is_loaded(A)), (Turn::Fenced, false));
    story.request(B);
    assert!(story.account.fences().reset(A));
    assert_eq!(story.send(A), Turn::Go);
}

#[test]
fn crash_without_a_load_under_way_blames_nobody() {
    let mut story = Story::new();
    for _ in 0..5 {
        story.request(A);
        story.enter(A);
        story.send(A);
        // A second request for a loaded instance loads nothing.
        assert!(story.crash().is_empty());
        story.leave(A);
    }
    story.begin_loading(A);
    // openwork itself ends opencode.
    story.account.ended(story.account.generation(), None, "1.0.0", story.now);
    assert!(!story.account.fences().is_suspect(A, story.now));
}

#[test]
fn load_continues_after_its_client_gives_up() {
    for (later, suspected) in [(Duration::ZERO, true), (ORPHANED - secs(1), true), (ORPHANED, false)] {
        let mut story = Story::new();
        story.begin_loading(A);
        story.pass(secs(100));
        story.account.leave(A, Some(1), story.now);
        story.pass(later);
        story.crash();
        assert_eq!(story.account.fences().is_suspect(A, story.now), suspected, "{later:?}");
    }
}

#[test]
fn load_by_a_direct_client_is_not_blamed_but_shares_the_blame() {
    let mut story = Story::new();
    // A direct client is loading it, and a fence could not keep that client away.
    story.told(A, Sign::Alive);
    story.begin_loading(A);
    assert!(story.crash().is_empty());
    assert!(!story.account.fences().is_suspect(A, story.now));
    for _ in 0..3 {
        story.told(A, Sign::Alive);
        story.begin_loading(B);
        // Either instance may be at fault.
        assert!(story.crash().is_empty());
    }
    assert!(story.account.fences().is_suspect(B, story.now));
    story.begin_loading(B);
    assert_eq!(story.crash(), [B]);
}

#[test]
fn suspects_are_loaded_alone() {
    let mut story = Story::new();
    story.begin_loading("/bad");
    story.begin_loading("/good");
    assert!(story.crash().is_empty());
    for directory in ["/bad", "/good"] {
        story.leave(directory);
    }

    story.begin_loading("/good");
    let until = story.now + ALONE;
    story.enter("/bad");
    story.enter(A);
    assert_eq!((story.send("/bad"), story.send(A)), (Turn::Wait(until), Turn::Wait(until)));
    // A second request for the same instance may go on.
    story.begin_loading("/good");
    story.reply("/good");
    assert_eq!(story.send(A), Turn::Go);
    assert_eq!(story.send("/bad"), Turn::Wait(story.now + ALONE));
    story.reply(A);
    assert_eq!(story.send("/bad"), Turn::Go);
    // Requests for loaded instances do not wait.
    assert_eq!(story.send(A), Turn::Go);
    assert_eq!(story.crash(), ["/bad"]);
}

#[test]
fn wait_for_a_suspect_is_bounded() {
    let mut story = Story::new();
    story.begin_loading("/bad");
    story.crash();
    assert_eq!(story.send("/bad"), Turn::Go);
    story.enter(A);
    story.pass(ALONE - secs(1));
    assert_eq!(story.send(A), Turn::Wait(story.now + secs(1)));
    story.pass(secs(1));
    assert_eq!(story.send(A), Turn::Go);
    // Now either may be at fault.
    assert!(story.crash().is_empty());
}

#[test]
fn end_of_opencode_is_remembered_until_the_next_start() {
    let mut story = Story::new();
    story.begin_loading(A);
    let failure = Failure { how: "ended".to_owned(), output: String::new() };
    story.account.ended(1, Some(failure.clone()), "1.0.0", story.now);
    let end = story.account.end().unwrap();
    assert_eq!((end.generation, &end.failure, &end.loading), (1, &Some(failure), &vec![A.to_owned()]));
    story.account.begin(2, [], story.now);
    assert!(story.account.end().is_none());
}

// --- A random walk ---

/// Reproducible random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// The true state of an instance, whatever the account believes.
#[derive(Clone, Default)]
struct Truth {
    loaded: bool,
    running: bool,
    /// Requests that opencode has answered and that are still open.
    streams: usize,
    /// When somebody last used it.
    used: Option<Instant>,
}

/// A world with an opencode, clients of both kinds, and the account that watches them.
struct World {
    account: Account,
    now: Instant,
    truth: BTreeMap<&'static str, Truth>,
    /// Events that opencode has sent and the account has not seen yet.
    events: Vec<(&'static str, Sign)>,
    /// Evictions under way, and when each is carried out.
    evictions: Vec<(Eviction, Instant)>,
    /// How many instances were evicted.
    evicted: u64,
}

const DIRECTORIES: [&str; 6] = ["/a", "/b", "/c", "/d", "/e", "/stranger"];
/// How long a step of the world takes at most.
const STEP: Duration = Duration::from_millis(200);

impl World {
    fn is_ours(directory: &str) -> bool {
        directory != "/stranger"
    }

    fn deliver(&mut self) {
        for (directory, sign) in std::mem::take(&mut self.events) {
            let generation = self.account.generation();
            self.account.told(generation, directory, sign, || World::is_ours(directory), self.now);
        }
    }

    /// Uses an instance, and so loads it.
    fn uses(&mut self, directory: &'static str) {
        let truth = self.truth.entry(directory).or_default();
        (truth.loaded, truth.used) = (true, Some(self.now));
    }

    fn step(&mut self, random: &mut Random) {
        let directory = DIRECTORIES[random.below(DIRECTORIES.len() as u64) as usize];
        let is_held = self.evictions.iter().any(|(eviction, _)| eviction.directory == directory);
        let generation = self.account.generation();
        match random.below(100) {
            // A request through openwork, which may stay open.
            0..15 if World::is_ours(directory) => {
                let entry = self.account.enter(directory, self.now);
                assert_eq!(entry == Entry::Wait, is_held, "{directory} while it is being disposed");
                if entry == Entry::Entered {
                    assert_eq!(self.account.send(generation, directory, self.now), Turn::Go);
                    self.uses(directory);
                    self.account.replied(generation, directory);
                    self.truth.entry(directory).or_default().streams += 1;
                }
            }
            15..40 if self.truth.get(directory).is_some_and(|truth| truth.streams > 0) => {
                self.truth.entry(directory).or_default().streams -= 1;
                self.account.leave(directory, None, self.now);
                // The end of a stream counts as use.
                self.truth.entry(directory).or_default().used = Some(self.now);
            }
            // A direct client; the event comes a little later.
            40..50 => {
                self.uses(directory);
                self.events.push((directory, Sign::Used));
            }
            50..52 if self.truth.get(directory).is_some_and(|truth| truth.loaded && !is_held) => {
                self.truth.entry(directory).or_default().loaded = false;
                self.events.push((directory, Sign::Disposed));
            }
            // A session starts or ends, which opencode reports too.
            52..62 if self.truth.get(directory).is_some_and(|truth| truth.loaded) => {
                let truth = self.truth.entry(directory).or_default();
                truth.running = !truth.running;
                self.uses(directory);
                self.events.push((directory, Sign::Used));
            }
            62..63 => {
                self.account.ended(generation, None, "1.0.0", self.now);
                self.account.begin(generation + 1, [], self.now);
                self.events.clear();
                for truth in self.truth.values_mut() {
                    (truth.loaded, truth.running) = (false, false);
                }
            }
            _ => {}
        }
        let pause = random.below(STEP.as_millis() as u64);
        self.now += Duration::from_millis(pause);
        self.deliver();
        self.evict(random);
        self.check();
    }

    /// The work of the evicting threads.
    fn evict(&mut self, random: &mut Random) {
        let (over, under_way) = std::mem::take(&mut self.evictions).into_iter().partition(|(_, at)| *at <= self.now);
        self.evictions = under_way;
        for (eviction, _) in Vec::<(Eviction, Instant)>::into_iter(over) {
            let is_current = eviction.generation == self.account.generation();
            let directory = *DIRECTORIES.iter().find(|known| **known == eviction.directory).unwrap();
            let truth = self.truth.entry(directory).or_default();
            let outcome = match (is_current, truth.running) {
                (false, _) => Outcome::Failed,
                (true, true) => Outcome::Busy,
                (true, false) => Outcome::Disposed,
            };
            if outcome == Outcome::Disposed {
                assert_eq!(truth.streams, 0, "{directory} was evicted under an open stream");
                truth.loaded = false;
                self.evicted += 1;
                let since = self.account.dispose(directory, self.now);
                self.events.push((directory, Sign::Disposed));
                self.account.disposed(eviction.generation, directory, since, true, self.now);
            }
            if outcome == Outcome::Busy {
                truth.used = Some(self.now);
            }
            self.account.evicted(&eviction, outcome, self.now);
        }
        self.deliver();
        while let Next::Evict(eviction) = self.account.next(self.now) {
            let truth = &self.truth[eviction.directory.as_str()];
            assert!(truth.loaded, "{} was asked about and is not loaded", eviction.directory);
            assert_eq!(truth.streams, 0, "{} is evicted with a stream", eviction.directory);
            assert!(World::is_ours(&eviction.directory), "a stranger is evicted");
            let at = self.now + Duration::from_millis(random.below(200));
            self.evictions.push((eviction, at));
        }
    }

    fn check(&self) {
        for (directory, truth) in &self.truth {
            let usage = self.account.usage(directory);
            assert_eq!(usage.loaded, truth.loaded, "{directory} is known as it is");
            assert_eq!(usage.streams, truth.streams, "{directory}");
            let is_idle = truth.loaded && !truth.running && truth.streams == 0 && World::is_ours(directory);
            // Revivals give an instance up to 64 times the idle time.
            let longest = TTL_OF_WALK * (1 << DOUBLINGS) + Duration::from_secs(1);
            if is_idle {
                let idle = truth.used.map(|used| self.now.duration_since(used));
                assert!(idle.is_some_and(|idle| idle <= longest), "{directory} stays loaded, unused for {idle:?}");
                let due = usage.due.unwrap_or(self.now);
                assert!(self.now.saturating_duration_since(due) < Duration::from_secs(1), "{directory} is overdue");
            }
        }
    }
}

const TTL_OF_WALK: Duration = Duration::from_secs(1);

#[test]
fn random_walk_keeps_the_invariants() {
    // A failure prints its seed; run that seed alone to reproduce it.
    let mut evicted = 0;
    for seed in 0..200 {
        let now = Instant::now();
        let mut account = Account::new(Some(TTL_OF_WALK), Fences::default());
        account.begin(1, [], now);
        let mut world = World { account, now, truth: BTreeMap::new(), events: vec![], evictions: vec![], evicted: 0 };
        let mut random = Random(seed);
        let walk = std::panic::AssertUnwindSafe(|| {
            for _ in 0..2000 {
                world.step(&mut random);
            }
        });
        if let Err(panic) = std::panic::catch_unwind(walk) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
        evicted += world.evicted;
    }
    assert!(evicted > 2000, "a walk with only {evicted} evictions shows little");
}
