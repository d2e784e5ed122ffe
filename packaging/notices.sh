#!/usr/bin/env bash
# Print the licences of all crates that are linked into the binary, with their texts.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fetch --locked >&2
sources=${CARGO_HOME:-$HOME/.cargo}/registry/src
[[ ! -d vendor ]] || sources=$PWD
cargo tree --locked --edges normal --prefix none --no-dedupe --format '{p}	{l}' | sed '1d; s/ v/-/; s/ ([^)]*)//' |
    LC_ALL=C sort -u | while IFS=$'\t' read -r crate license; do
        printf '=== %s: %s\n\n' "$crate" "$license"
        found=
        for file in "$sources"/*/"$crate"/{LICEN[SC]E,COPYING,COPYRIGHT,NOTICE,UNLICENSE}* "$sources"/*/"${crate%-*}"/{LICEN[SC]E,COPYING,NOTICE}*; do
            [[ -f $file ]] || continue
            found=1
            printf -- '--- %s\n' "${file##*/}"
            cat "$file"
            echo
        done
        [[ $found ]] || printf '(the crate has no file with the text)\n\n'
    done
