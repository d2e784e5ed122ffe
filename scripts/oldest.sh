#!/usr/bin/env bash
# Compile everything, including the tests, with the oldest toolchain that Cargo.toml allows, if rustup has it
# (`rustup toolchain install 1.85 --profile minimal`). clippy detects newer functions of the standard library; only the
# toolchain itself detects newer features of the language.
set -euo pipefail
cd "$(dirname "$0")/.."
oldest=$(sed -n 's/^rust-version = "\([0-9.]*\)".*/\1/p' Cargo.toml)
toolchain=$(rustup toolchain list 2>/dev/null | grep --max-count=1 --only-matching --extended-regexp "^$oldest(\.[0-9]+)?-[^ ]+" || true)
if [[ -z $toolchain ]]; then
    echo "not compiled with Rust $oldest: rustup does not have it"
    exit
fi
echo "compiling with $toolchain"
# Use a separate directory: with a shared one, each toolchain would recompile everything.
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/oldest rustup run "$toolchain" \
    cargo check --quiet --locked --bins --tests --benches --test real --test soak
