//! What `openwork` does, told through spawned processes: a module per feature. Where a test
//! needs opencode it has the imitation of `test-data/fake_opencode.rs`.

mod adopt;
mod cli;
// In the order of names, in which tests are begun, it has to come last.
mod daemon;
mod doc;
mod engine;
mod events;
mod evict;
mod gate;
mod import;
mod packages;
mod panic;
mod passthrough;
mod registry;
mod route;
mod selectors;
mod state;
mod support;
#[path = "coverage.rs"]
mod z_coverage;
