#!/bin/sh
# Prints the directory whose node_modules has OpenCode's SDK for JavaScript: `scripts/sdk.sh VERSION`. The SDK comes from
# npm and is kept below target/, unless OPENWORK_TEST_SDK names one.
set -eu

version=$1
prefix=$(cd "$(dirname "$0")/.." && pwd)/target/sdk

if [ -n "${OPENWORK_TEST_SDK:-}" ]; then
    printf '%s\n' "$OPENWORK_TEST_SDK"
    exit
fi
package=$prefix/node_modules/@opencode-ai/sdk/package.json
if ! grep -qs "\"version\": \"$version\"" "$package"; then
    echo "installing OpenCode's SDK $version of npm below target/ (once) …" >&2
    npm install --prefix "$prefix" --no-save --no-audit --no-fund --loglevel=error "@opencode-ai/sdk@$version" >&2
fi
printf '%s\n' "$prefix"
