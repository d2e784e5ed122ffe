#!/usr/bin/env bash
# Print the licences, with their texts, of all crates linked into the binary.
set -euo pipefail
cd "$(dirname "$0")/.."
# Ask cargo where the crates are: in its registry, a vendor directory or the distribution's directory.
declare -A directory_of
while IFS= read -r manifest; do
    # Published manifests have both at the head of [package].
    name=$(sed -n '/^name = "\(.*\)"/{s//\1/p;q}' "$manifest")
    version=$(sed -n '/^version = "\(.*\)"/{s//\1/p;q}' "$manifest")
    directory_of[$name-$version]=${manifest%/Cargo.toml}
done < <(cargo metadata --locked --format-version 1 | grep -o '"manifest_path":"[^"]*"' | cut -d '"' -f 4)

cargo tree --locked --edges normal --prefix none --no-dedupe --format $'{p}\t{l}' | sed '1d; s/ v/-/; s/ ([^)]*)//' |
    LC_ALL=C sort -u | while IFS=$'\t' read -r crate license; do
        printf '=== %s: %s\n\n' "$crate" "$license"
        found=
        for file in "${directory_of[$crate]}"/{LICEN[SC]E,COPYING,COPYRIGHT,NOTICE,UNLICENSE}*; do
            [[ -f $file ]] || continue
            found=1
            printf -- '--- %s\n' "${file##*/}"
            cat "$file"
            echo
        done
        [[ $found ]] || printf '(the crate has no file with the text)\n\n'
    done
