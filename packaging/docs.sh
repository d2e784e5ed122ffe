#!/usr/bin/env bash
# Install the README, CHANGELOG.md, docs/ and the description of the HTTP API: `packaging/docs.sh DIRECTORY`.
# Links to files that only the sources have become plain text, so that every link leads somewhere.
set -euo pipefail
umask 022
into=$(realpath --canonicalize-missing "${1:?the directory}")
cd "$(dirname "$0")/.."
put() { install -D -m 644 "$1" "$into/${2:-$1}"; }
put README.md
put CHANGELOG.md
put share/openapi.json openapi.json
for file in docs/*; do put "$file"; done
for page in README.md docs/*.md; do
    directory=$into/$(dirname "$page")
    { grep -oE '\]\([^)]+\)' "$page" || true; } | sed 's/^](//; s/)$//' | sort -u | while IFS= read -r link; do
        file=${link%%#*}
        # A target that is not a file of the sources is a web address, or an example that looks like a link.
        if [[ ! -e $(dirname "$page")/$file || -e $directory/$file ]]; then continue; fi
        sed -i "s|\[\([^]]*\)\](${link//./\\.})|\1|g" "$into/$page"
    done
done
