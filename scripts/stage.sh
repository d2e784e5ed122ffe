# Sourced by demo.sh and recording.sh, with the version of opencode to install if OPENWORK_OPENCODE_BIN names none and
# PATH has no opencode 1.x.
#
# Everything runs in a temporary directory, $work, with its own HOME, $home. Neither files nor processes stay,
# however the script ends.
# shellcheck shell=bash

# A quoted path keeps its spaces here; quotes and backslashes in it would be escaped.
openwork=$(cargo build --release --locked --message-format=json-render-diagnostics |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
opencode_given=${OPENWORK_OPENCODE_BIN:-}
# Use neither the settings nor the data of the user.
# shellcheck disable=SC2086 # names of variables, which have no spaces
unset ${!OPENWORK_@} ${!OPENCODE_@} ${!XDG_@}
export OPENCODE_DISABLE_AUTOUPDATE=1 OPENCODE_DISABLE_MODELS_FETCH=1

work=$(mktemp -d "${TMPDIR:-/tmp}/openwork.XXXXXX")
work=$(cd "$work" && pwd -P) # openwork resolves symbolic links, and we compare
home=$work/home

# The processes of this run, which alone have this HOME.
ours() { grep -lsxzF "HOME=$home" /proc/[0-9]*/environ | cut -d/ -f3 || true; }

cleanup() {
    trap '' INT TERM # once is enough
    openwork daemon stop --timeout 20 >"$work/stopped" 2>&1 || true
    # Necessary only after a failure: openwork leaves no processes.
    for pid in $(ours); do kill -9 "$pid" 2>/dev/null || true; done
    rm -rf "$work"
}

die() {
    printf '\n%s\n' "${0##*/} failed: $1" >&2
    tail -n 20 "$work"/data/*.log >&2 2>/dev/null || true
    exit 1
}

openwork() { HOME=$home OPENWORK_DATA_DIR=$work/data OPENWORK_OPENCODE_BIN=$opencode "$openwork" "$@"; }

opencode='' # until it is found
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

opencode=${opencode_given:-$(command -v opencode || true)}
# Use the temporary HOME, since opencode creates its directories there even for --version.
mkdir "$home"
if [[ $opencode != /* || $(HOME=$home "$opencode" --version 2>/dev/null) != ?(v)1.* ]]; then
    opencode=$(scripts/opencode.sh "$1")
fi
