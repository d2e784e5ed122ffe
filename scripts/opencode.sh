#!/bin/sh
# Prints the path of the opencode for the tests: `scripts/opencode.sh VERSION`. It comes from npm and is kept below
# target/. OPENWORK_TEST_OPENCODE names an existing one, for example for a distribution that builds without a network.
set -eu

version=$1
prefix=$(cd "$(dirname "$0")/.." && pwd)/target/opencode
# opencode --version creates directories in HOME: keep them out of the user's.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

is_pinned() {
    [ -x "$1" ] && [ "$(env -i PATH="$PATH" HOME="$scratch" "$1" --version 2>/dev/null)" = "$version" ]
}

# The command that npm links works only after the package's install script, which newer npm does not run by default. The
# binary itself is in the package for the platform; there may be several (musl, processors without AVX2).
find_pinned() {
    for binary in "$prefix"/node_modules/.bin/opencode "$prefix"/node_modules/opencode-*/bin/opencode; do
        if is_pinned "$binary"; then
            printf '%s\n' "$binary"
            return 0
        fi
    done
    return 1
}

if [ -n "${OPENWORK_TEST_OPENCODE:-}" ]; then
    printf '%s\n' "$OPENWORK_TEST_OPENCODE"
    exit
fi
if find_pinned; then
    exit
fi
if ! command -v npm >/dev/null; then
    echo "opencode $version cannot be installed without npm; or name one in OPENWORK_TEST_OPENCODE" >&2
    exit 1
fi
echo "installing opencode $version of npm below target/ (once; it takes some 400 MB) …" >&2
npm install --prefix "$prefix" --no-save --no-audit --no-fund --loglevel=error "opencode-ai@$version" >&2
if ! find_pinned; then
    echo "npm has installed opencode-ai@$version below $prefix, and no binary in it runs here" >&2
    exit 1
fi
