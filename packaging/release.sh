#!/usr/bin/env bash
# Build the binary for a package, and print its path: nothing in it tells where it was built.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo_home=${CARGO_HOME:-$HOME/.cargo}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/package
# Beside the flags of the distribution: cargo takes one of the two variables only.
read -ra flags <<<"${RUSTFLAGS:-}"
flags+=("--remap-path-prefix=$cargo_home=/cargo" "--remap-path-prefix=$PWD=/openwork")
CARGO_ENCODED_RUSTFLAGS=$(IFS=$'\x1f' && echo "${flags[*]}")
export CARGO_ENCODED_RUSTFLAGS
cargo build --release --locked >&2
echo "$CARGO_TARGET_DIR/release/openwork"
