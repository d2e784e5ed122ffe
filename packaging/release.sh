#!/usr/bin/env bash
# Build the binary for a package, and print its path: nothing in it tells where it was built.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo_home=${CARGO_HOME:-$HOME/.cargo}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/package
export CARGO_ENCODED_RUSTFLAGS=
printf -v CARGO_ENCODED_RUSTFLAGS -- '--remap-path-prefix=%s=/cargo\x1f--remap-path-prefix=%s=/openwork' "$cargo_home" "$PWD"
cargo build --release --locked >&2
echo "$CARGO_TARGET_DIR/release/openwork"
