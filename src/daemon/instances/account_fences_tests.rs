//! Fences in virtual time.

use super::*;

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
fn crash_without_a_load_blames_no_workspace() {
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
    story.event(A, Sign::Alive);
    story.begin_loading(A);
    assert!(story.crash().is_empty());
    assert!(!story.account.fences().is_suspect(A, story.now));
    for _ in 0..3 {
        story.event(A, Sign::Alive);
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
    let until = story.now + SUSPECT_WAIT;
    story.enter("/bad");
    story.enter(A);
    assert_eq!((story.send("/bad"), story.send(A)), (Turn::Wait(until), Turn::Wait(until)));
    // A second request for the same instance may go on.
    story.begin_loading("/good");
    story.reply("/good");
    assert_eq!(story.send(A), Turn::Go);
    assert_eq!(story.send("/bad"), Turn::Wait(story.now + SUSPECT_WAIT));
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
    story.pass(SUSPECT_WAIT - secs(1));
    assert_eq!(story.send(A), Turn::Wait(story.now + secs(1)));
    story.pass(secs(1));
    assert_eq!(story.send(A), Turn::Go);
    // Now either may be at fault.
    assert!(story.crash().is_empty());
}

/// The thread of a failed request may ask so late, and must not send the request again.
#[test]
fn end_of_opencode_is_known_while_the_next_ones_run() {
    let mut story = Story::new();
    story.begin_loading(A);
    let failure = Failure { how: "ended".to_owned(), output: String::new() };
    story.account.ended(1, Some(failure.clone()), "1.0.0", story.now);
    for generation in 2..=super::ENDS_LIMIT as u64 {
        story.account.begin(generation, [], story.now);
        assert!(story.account.end_of(generation).is_none());
        let end = story.account.end_of(1).unwrap();
        assert_eq!((&end.failure, &end.loading), (&Some(failure.clone()), &vec![A.to_owned()]));
        story.account.ended(generation, None, "1.0.0", story.now);
    }
    story.account.begin(9, [], story.now);
    story.account.ended(9, None, "1.0.0", story.now);
    assert!(story.account.end_of(1).is_none());
}
