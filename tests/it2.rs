//! The process tests against opencode 2.x: those modules of `it` that involve opencode, from the same
//! source, and the tests of 2.x alone. `support::IS_V2` tells a test which line it runs against.

#![allow(dead_code, unused_imports, reason = "not every helper of the harness is about 2.x")]

#[path = "it/adopt.rs"]
mod adopt;
#[path = "it/engine.rs"]
mod engine;
#[path = "it/evict.rs"]
mod evict;
#[path = "it/fence.rs"]
mod fence;
#[path = "it/kept.rs"]
mod kept;
#[path = "it/passthrough.rs"]
mod passthrough;
#[path = "it/repeat.rs"]
mod repeat;
#[path = "it/restart.rs"]
mod restart;
#[path = "it/route.rs"]
mod route;
#[path = "it2/session.rs"]
mod session;
#[path = "it2/shared.rs"]
mod shared;
#[path = "it/supervise.rs"]
mod supervise;
#[path = "support/mod.rs"]
mod support;
#[path = "it2/v2.rs"]
mod v2;
