#!/usr/bin/env bash
# Demonstrates openwork with a real opencode: `scripts/demo.sh VERSION`. It uses OPENWORK_OPENCODE_BIN, else an
# opencode 1.x on PATH, else it installs VERSION.
#
# The demo runs in a temporary directory with its own HOME and leaves nothing behind. It checks everything that it
# shows; at the first deviation it prints the problem and exits with 1.
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck source=scripts/stage.sh
source scripts/stage.sh "$1"

dim='' new='' plain='' terminal=''
if [[ -t 1 && ${TERM:-dumb} != dumb ]]; then
    terminal=1
    if [[ -z ${NO_COLOR:-} ]]; then dim=$'\e[2m' new=$'\e[33m' plain=$'\e[0m'; fi
fi

engine=-    # opencode's pid, if there is one
expected='' # the expected pid, once it is known
restarts=0
mark=$dim # its colour: dim, unless the pid is new

row() { printf "$dim%8s$plain  %-32s  $mark%12s$plain  %s\n" "$@"; }

# Runs a command of openwork and shows its time and its output: `step ARGUMENT …`.
step() {
    local command="openwork $*" start ms
    # Show the running command, until its row replaces it.
    if [[ $terminal ]]; then printf "$dim%8s$plain  %s" … "$command"; fi
    start=${EPOCHREALTIME/[^0-9]/}
    answer=$(openwork "$@" 2>"$work/error") || die "$command: $(<"$work/error")"
    ms=$(((${EPOCHREALTIME/[^0-9]/} - start) / 1000))
    if [[ $terminal ]]; then printf '\r\e[K'; fi
    look
    row "$ms" "$command" "$engine" "${answer/ (*)/}"
}

# Determines opencode's pid, and checks that it is the expected one.
look() {
    local health
    engine=-
    health=$(openwork status --json) || true # after `daemon stop` there is none
    if [[ $health =~ \"opencode\":\{\"pid\":([0-9]+) ]]; then engine=${BASH_REMATCH[1]}; fi
    if [[ $health =~ \"restarts\":([0-9]+) ]]; then restarts=${BASH_REMATCH[1]}; fi
    [[ -z $expected || $engine == "$expected" ]] || die "opencode was $expected, and is $engine now"
}

# Asks opencode, through openwork, in which directory it works: `path PROJECT [WORKSPACE]`.
path() {
    step workspace path "${@:2}"
    [[ $answer == "$work/$1" ]] || die "the directory of $1 is $work/$1, not $answer"
    [[ $engine != - ]] || die "opencode has answered, and has no process id"
    expected=$engine mark=$dim
}

mkdir "$work/shop" "$work/blog"
printf '%s, opencode %s: two projects, one server\n' \
    "$("$openwork" --version)" "$(HOME=$home "$opencode" --version)"
printf '%s\n\n' "${dim}In a new home, as here, the first start of opencode takes some seconds longer.$plain"
row ms command 'opencode pid' answer
cd "$work"

step workspace add shop
step workspace add blog
mark=$new
path shop shop
path blog blog
step workspace switch blog
path blog

killed=$engine
ours | grep -qx "$killed" || die "process $killed is none of ours"
kill -9 "$killed"
printf '%8s  %s\n' '' "kill -9 $killed"
expected='' mark=$new
path blog
[[ $engine != "$killed" ]] || die "opencode was killed, and is still $killed"
[[ $restarts == 1 ]] || die "opencode was restarted $restarts times, not once"

step instance dispose blog
[[ $answer == disposed* ]] || die "$answer"
path blog
path shop shop

[[ $(openwork status --json) =~ \"daemon\":\{\"pid\":([0-9]+) ]] || die 'no daemon'
daemon=${BASH_REMATCH[1]}
ours | grep -qx "$daemon" || die "process $daemon is none of ours"
kill -9 "$daemon"
printf '%8s  %s\n' '' "kill -9 $daemon, which is the daemon"
path shop shop

expected=''
step daemon stop
[[ -z $(ours) ]] || die "left running: $(ours | tr '\n' ' ')"
printf '\n%s\n%s\n' "One opencode for both, started again once: when it was killed. It outlived the daemon." \
    'Nothing of it is left.'
