#!/usr/bin/env bash
# Runs the tests: `scripts/test.sh [VERSION|- [TARGET …]]`. Without a target: `it` and `it2`, which take a
# fake opencode, and with a version `real`, for which that opencode is installed below target/.
#
# `cargo test` runs the tests that work on every machine. It ignores tests that need more, with the reason; they are in
# modules named after their need. This script runs each of these modules if the machine meets the need, and lists the
# others at the end. RUST_TEST_THREADS sets the number of concurrent tests; the default with the fake is four per
# processor, since they mostly wait. OPENWORK_TEST_USER names the user to which cargo's runner switches from root, if
# it does.
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

version=${1:--}
targets=("${@:2}")
if ((${#targets[@]} == 0)); then
    targets=(it it2)
    if [[ $version != - ]]; then targets+=(real); fi
fi
fakes=()
for target in "${targets[@]}"; do
    if [[ $target != real ]]; then fakes+=(--test "$target"); fi
done
if ((${#fakes[@]})); then
    RUST_TEST_THREADS=${RUST_TEST_THREADS:-$((4 * $(nproc)))} run --bins "${fakes[@]}"
fi
if [[ " ${targets[*]} " == *" real "* ]]; then
    opencode=$(scripts/opencode.sh "$version")
    sdk=$(scripts/sdk.sh "$version")
    export OPENWORK_TEST_OPENCODE=$opencode OPENWORK_TEST_SDK=$sdk
    run --test real
fi
if ((${#unmet[@]})); then echo "not run, since this machine lacks what they need: ${unmet[*]}"; fi
