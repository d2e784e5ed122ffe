#!/usr/bin/env bash
# Run the tests with the lowest version of each crate that Cargo.toml allows. Cargo resolves and compiles in a copy of the
# sources, so that Cargo.lock does not change.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/floors
copy=$CARGO_TARGET_DIR/sources
rm -rf "$copy"
mkdir -p "$copy"
cp -a Cargo.toml LICENSE README.md CHANGELOG.md benches docs packaging share src test-data tests "$copy"
cd "$copy"
# The option is unstable; the variable lets a stable cargo accept it.
RUSTC_BOOTSTRAP=1 cargo -Z direct-minimal-versions generate-lockfile
cargo tree --depth 1 --edges normal
cargo test --locked
