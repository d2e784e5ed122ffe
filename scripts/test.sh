#!/usr/bin/env bash
# Runs the tests, against the fake opencode and then against the real one: `scripts/test.sh VERSION`
# (the real one is installed below target/); `scripts/test.sh` for the fake only, `scripts/test.sh
# VERSION real` for the real one only.
#
# `cargo test` runs what every machine can. A test that needs more is ignored there, with the reason,
# and stands in a module named after its need. Here each of these modules runs where the machine has
# what it needs; the others are listed at the end. RUST_TEST_THREADS says how many tests run at once,
# OPENWORK_TEST_USER which user cargo's runner makes of root, if it does.
set -euo pipefail
cd "$(dirname "$0")/.."

met=() unmet=()
# `need MODULE COMMAND …`: the need is met when the command succeeds.
need() {
    if "${@:2}" </dev/null >/dev/null 2>&1; then met+=("$1::"); else unmet+=("$1"); fi
}
both() { "$1" "$2" && "$3" "$4"; }
need as_root test "${OPENWORK_TEST_USER:-$(id -u)}" = 0
need with_script script --version
need with_git git --version
need with_strace strace true
need with_curl curl --version
need with_mandoc mandoc -T lint share/man/openwork.1
need with_tmux both tmux -V git --version
need with_opencode2 test -x "${OPENWORK_TEST_OPENCODE2:-}"

# `run TARGET …`: the tests of a target that need nothing, then those whose need is met.
run() {
    cargo test --locked "$@"
    if ((${#met[@]})); then cargo test --locked "$@" -- --ignored "${met[@]}"; fi
}

if [[ ${2-} != real ]]; then run --bins --test it --test it2; fi
if (($#)); then
    opencode=$(scripts/opencode.sh "$1")
    sdk=$(scripts/sdk.sh "$1")
    export OPENWORK_TEST_OPENCODE=$opencode OPENWORK_TEST_SDK=$sdk
    run --test real
fi
if ((${#unmet[@]})); then echo "not run, since this machine lacks what they need: ${unmet[*]}"; fi
