//! Every command, option, variable, route and error code of the tables in `openwork help --json`
//! is exercised by some test.
//!
//! A test claims what it exercises with [`Host::exercises`](crate::support::Host::exercises), and
//! fails if it does not. Here the claims in the sources are compared with the tables. So a gap
//! fails under any runner, in any order and beside any filter, without running another test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::exercised::everything;

/// Table entries that no process test can exercise, and why.
const EXCEPTIONS: &[(&str, &str)] =
    &[("code internal", "needs a bug; a unit test of src/daemon/api.rs covers the panic of a handler")];

/// The sources of these tests.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        match path.is_dir() {
            true => found.extend(sources(&path)),
            false => found.push(path),
        }
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    found
}

/// The claims of all tests, and the file that each is in.
fn claims() -> BTreeMap<String, PathBuf> {
    let mut claims = BTreeMap::new();
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    for path in ["it", "it2"].iter().flat_map(|directory| sources(&tests.join(directory))) {
        let text = fs::read_to_string(&path).unwrap();
        // The markers are split, because this file is scanned as well.
        for call in text.split(concat!(".exercises", "([")).skip(1) {
            let list = call.split(concat!("]", ")")).next().unwrap_or_default();
            let names = list.split('"').skip(1).step_by(2);
            claims.extend(names.map(|name| (name.to_owned(), path.clone())));
        }
    }
    claims
}

#[test]
fn every_table_entry_is_exercised() {
    let (everything, claims) = (everything(), claims());
    for kind in ["command", "option", "variable", "route", "code"] {
        assert!(everything.iter().any(|name| name.starts_with(kind)), "no {kind} in the tables");
    }
    let unknown: Vec<_> = claims.iter().filter(|(name, _)| !everything.contains(*name)).collect();
    assert!(unknown.is_empty(), "claimed to be exercised, and not in the tables: {unknown:?}");

    let excepted: BTreeSet<&str> = EXCEPTIONS.iter().map(|(name, _)| *name).collect();
    let missing: Vec<_> =
        everything.iter().filter(|name| !claims.contains_key(*name) && !excepted.contains(name.as_str())).collect();
    assert!(
        missing.is_empty(),
        "no test exercises {missing:?}: write one, with `host.exercises([…])` at its head to claim them"
    );
    let needless: Vec<_> =
        EXCEPTIONS.iter().filter(|(name, _)| claims.contains_key(*name) || !everything.contains(*name)).collect();
    assert!(needless.is_empty(), "needless exceptions: {needless:?}");
}
