#!/usr/bin/env bash
# Build the binary for a package, without paths of the build machine in it, and print its path.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo_home=${CARGO_HOME:-$HOME/.cargo}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/package
# Keep the distribution's RUSTFLAGS: cargo ignores them if CARGO_ENCODED_RUSTFLAGS is set.
read -ra flags <<<"${RUSTFLAGS:-}"
flags+=("--remap-path-prefix=$cargo_home=/cargo" "--remap-path-prefix=$PWD=/openwork")
CARGO_ENCODED_RUSTFLAGS=$(IFS=$'\x1f' && echo "${flags[*]}")
export CARGO_ENCODED_RUSTFLAGS
cargo build --release --locked >&2
echo "$CARGO_TARGET_DIR/release/openwork"
