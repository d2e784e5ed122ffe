#!/usr/bin/env bash
# Write what packages install from the tables of the program: share/man and share/systemd. What else is
# in share/ is part of the program. A test holds all of it to what the program prints.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --locked
openwork() {
    env -u OPENWORK_DATA_DIR -u OPENWORK_DAEMON_PORT -u OPENWORK_OPENCODE_BIN -u OPENWORK_OPENCODE_PORT \
        -u OPENWORK_IDLE_TTL -u XDG_DATA_HOME "${CARGO_TARGET_DIR:-target}/debug/openwork" "$@"
}
openwork man > share/man/openwork.1
openwork service print --program /usr/bin/openwork > share/systemd/openwork.service
openwork service print --socket > share/systemd/openwork.socket
