#!/usr/bin/env bash
# Run the units of share/ under a separate systemd user manager (as root, on Linux with systemd):
# a first connection starts the daemon, a killed daemon is replaced, a hand-over is a reload, a hung
# daemon is killed by the watchdog, and opencode (the stand-in of the tests) outlives all of it.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} != inside ]]; then
    cargo build --locked
    rustc -A warnings --edition 2021 -o target/opencode-stand-in test-data/fake_opencode.rs
    exec unshare --mount --pid --fork --kill-child --mount-proc "$0" inside
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/user/0
export HOME=$work/home XDG_RUNTIME_DIR=/run/user/0
unset DBUS_SESSION_BUS_ADDRESS XDG_CONFIG_HOME XDG_DATA_HOME NOTIFY_SOCKET
units=$HOME/.config/systemd/user
mkdir -p "$units" "$HOME/.opencode/bin" "$work/fake"
cp target/opencode-stand-in "$HOME/.opencode/bin/opencode"
openwork=$work/openwork
cp "${CARGO_TARGET_DIR:-target}/debug/openwork" "$openwork"
options=(--opencode-bin "$HOME/.opencode/bin/opencode")
"$openwork" service print "${options[@]}" >"$units/openwork.service"
"$openwork" service print --socket --daemon-port 16174 >"$units/openwork.socket"
mkdir "$units/openwork.service.d"
printf '[Service]\nEnvironment=FAKE_OPENCODE_DIR=%s\nWatchdogSec=2\n' "$work/fake" >"$units/openwork.service.d/test.conf"

fail() {
    echo "FAILED: $*" >&2
    systemctl --user status --no-pager openwork.service openwork.socket >&2 || true
    cat "$HOME"/.local/share/openwork/*.log "$work/manager.log" >&2 || true
    exit 1
}
until_true() {
    local what=$1 deadline=$((SECONDS + 30))
    shift
    until "$@"; do ((SECONDS < deadline)) || fail "timed out waiting for $what"; sleep 0.05; done
    echo "ok: $what"
}
show() { systemctl --user show --property "$1" --value openwork.service; }
# shellcheck disable=SC2053 # the value may be a pattern
is() { [[ $(show "$1") == $2 ]]; }
health() { curl --silent --max-time 20 http://127.0.0.1:16174/health; }
engine() { health | sed -n 's/.*"opencode":{"pid":\([0-9]*\).*/\1/p'; }
is_ready() { [[ -n $(engine) ]] && is StatusText 'opencode is ready*'; }

systemd-analyze --user --man=no verify "$units/openwork.service" "$units/openwork.socket" || fail "the units have mistakes"
/lib/systemd/systemd --user >"$work/manager.log" 2>&1 &
until_true "the user manager to run" test -S "$XDG_RUNTIME_DIR/systemd/private"
until_true "the socket unit to listen" systemctl --user start openwork.socket
is ActiveState inactive || fail "the daemon runs already"

health | grep -q '"apiVersion":1' || fail "the first connection is not answered"
echo "ok: the first connection starts the daemon and is answered"
until_true "READY and opencode's phase to be shown" is_ready
daemon=$(show MainPID) opencode=$(engine)

kill -KILL "$daemon"
health | grep -q '"apiVersion":1' || fail "the connection after a kill is not answered"
until_true "the daemon to be replaced" is_ready
[[ $(show MainPID) != "$daemon" && $(engine) == "$opencode" ]] || fail "opencode did not outlive the daemon"

daemon=$(show MainPID)
"$openwork" daemon restart || fail "daemon restart"
until_true "the hand-over to end" is_ready
[[ $(show MainPID) == "$daemon" && $(engine) == "$opencode" ]] || fail "the restart was no hand-over in place"
is ActiveState active || fail "the unit is $(show ActiveState) after a hand-over"
sleep 3 # longer than the watchdog waits
[[ $(show MainPID) == "$daemon" ]] || fail "the successor gives no signs of life"
echo "ok: the successor feeds the watchdog"

kill -STOP "$daemon"
until_true "the watchdog to kill a daemon that hangs" bash -c "! kill -0 $daemon 2>/dev/null"
health | grep -q '"apiVersion":1' || fail "the connection after a hang is not answered"
until_true "the daemon to be replaced" is_ready
[[ $(engine) == "$opencode" ]] || fail "opencode did not outlive the hang"

"$openwork" daemon stop || fail "daemon stop"
until_true "the unit to be inactive" is ActiveState inactive
[[ $(show Result) == success ]] || fail "a stop is a failure: $(show Result)"
"$openwork" daemon start || fail "daemon start"
until_true "a command to have the manager start the daemon" is ActiveState active
"$openwork" status
systemctl --user status --no-pager openwork.service | sed -n 1,12p

systemctl --user stop openwork.service openwork.socket
"$openwork" daemon start "${options[@]}" || fail "daemon start without systemd"
systemctl --user start openwork.service || true
[[ $(show ActiveState) == inactive && $(show NRestarts) == 0 ]] || fail "the unit does not yield to a daemon that runs"
echo "ok: beside a daemon that runs the unit is skipped ($(show Result))"
"$openwork" daemon stop
kill -TERM %1
echo "all of it works"
