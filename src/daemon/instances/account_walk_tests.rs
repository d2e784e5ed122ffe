//! A random walk of the account in virtual time, which checks its invariants.

use super::*;

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
const MAX_STEP: Duration = Duration::from_millis(200);

impl World {
    fn is_ours(directory: &str) -> bool {
        directory != "/stranger"
    }

    fn deliver(&mut self) {
        for (directory, sign) in std::mem::take(&mut self.events) {
            let generation = self.account.generation();
            self.account.observe(generation, directory, sign, || World::is_ours(directory), self.now);
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
        let pause = random.below(MAX_STEP.as_millis() as u64);
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
            let longest = WALK_TTL * (1 << MAX_DOUBLINGS) + Duration::from_secs(1);
            if is_idle {
                let idle = truth.used.map(|used| self.now.duration_since(used));
                assert!(idle.is_some_and(|idle| idle <= longest), "{directory} stays loaded, unused for {idle:?}");
                let due = usage.due.unwrap_or(self.now);
                assert!(self.now.saturating_duration_since(due) < Duration::from_secs(1), "{directory} is overdue");
            }
        }
    }
}

const WALK_TTL: Duration = Duration::from_secs(1);

#[test]
fn random_walk_keeps_the_invariants() {
    // A failure prints its seed; run that seed alone to reproduce it.
    let mut evicted = 0;
    for seed in 0..200 {
        let now = Instant::now();
        let mut account = Account::new(Some(WALK_TTL), Fences::default());
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
