//! Process tests of `openwork`, one module for each feature. opencode is the fake of
//! `test-data/fake_opencode.rs`.

mod adopt;
mod cli;
mod coverage;
mod daemon;
mod doc;
mod docs;
mod doctor;
mod engine;
mod events;
mod everyday;
mod evict;
mod examples;
mod fence;
mod gate;
mod habits;
mod import;
mod kept;
mod orchestrator;
mod packages;
mod passthrough;
mod registry;
mod repeat;
mod restart;
mod route;
mod selectors;
mod session;
mod state;
mod supervise;
#[path = "../support/mod.rs"]
mod support;
mod systemd;
mod trust;
mod version;
