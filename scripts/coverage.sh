#!/usr/bin/env bash
# Shows which lines of src/ the tests run, by file: `scripts/coverage.sh`; `--html` also writes the sources with their
# counts below target/coverage/html. Uses only the fake opencode.
#
# The counters are in memory-mapped files, so that a daemon that is killed, or executes another program, is counted up to
# that moment.
set -euo pipefail
cd "$(dirname "$0")/.."

llvm=$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
host=$(rustc -vV | sed -n 's/^host: //p')

# `tool NAME`: the path of an LLVM tool of the compiler's version: an older one cannot read its counts.
tool() {
    local path
    for path in "$(rustc --print sysroot)/lib/rustlib/$host/bin/$1" "$1-$llvm" "$1"; do
        if "$path" --version 2>/dev/null | grep -q "LLVM version $llvm\."; then
            printf '%s\n' "$path"
            return
        fi
    done
    echo "there is no $1 of LLVM $llvm: \`rustup component add llvm-tools\`, or your distribution's llvm-$llvm" >&2
    return 1
}
profdata=$(tool llvm-profdata)
cov=$(tool llvm-cov)

export CARGO_TARGET_DIR=$PWD/target/coverage
export RUSTFLAGS="-C instrument-coverage -C llvm-args=-runtime-counter-relocation"
profiles=$CARGO_TARGET_DIR/profiles
rm -rf "$profiles"
mkdir -p "$profiles"
chmod 1777 "$profiles" # some tests run openwork as another user
# %c: counted while it happens. %8m: eight files that all processes share.
export LLVM_PROFILE_FILE=$profiles/%8m%c.profraw

failed=0
# Print the table even if a test failed; the exit status reports the failure.
scripts/test.sh || { failed=$? && echo "a test failed: what would have run after it is not counted" >&2; }
objects=("$CARGO_TARGET_DIR/debug/openwork")
while read -r program; do objects+=(--object "$program"); done < <(
    cargo test --locked --no-run --bins --message-format=json-render-diagnostics 2>/dev/null |
        sed -n 's/.*"test":true}.*"executable":"\([^"]*\)".*/\1/p'
)
"$profdata" merge --sparse --output "$CARGO_TARGET_DIR/all.profdata" "$profiles"
sources=(--instr-profile "$CARGO_TARGET_DIR/all.profdata" --ignore-filename-regex '/(registry|rustc|tests|target)/')
# Columns of the report: regions, functions, lines, branches, each with two more.
"$cov" report "${objects[@]}" "${sources[@]}" |
    awk 'BEGIN { row("file", "lines", "missed", "run") }
         function row(file, lines, missed, run) { printf "%-32s %8s %8s %8s\n", file, lines, missed, run }
         NF == 13 && $8 ~ /^[0-9]+$/ { row($1, $8, $9, $10) }'
if [[ ${1:-} == --html ]]; then
    "$cov" show "${objects[@]}" "${sources[@]}" --format html --output-dir "$CARGO_TARGET_DIR/html"
    echo "target/coverage/html/index.html"
fi
exit "$failed"
