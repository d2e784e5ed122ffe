#!/usr/bin/env bash
# Write the files made from the tables of the program: share/man and share/systemd, which packages install, and
# docs/commands.md. The rest of share/ is part of the program. Tests compare all of it with the program's output.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --locked
openwork() {
    env -u OPENWORK_DATA_DIR -u OPENWORK_DAEMON_PORT -u OPENWORK_OPENCODE_BIN -u OPENWORK_OPENCODE_PORT \
        -u OPENWORK_IDLE_TTL -u OPENWORK_SHARED -u XDG_DATA_HOME "${CARGO_TARGET_DIR:-target}/debug/openwork" "$@"
}
openwork man > share/man/openwork.1
openwork service print --program /usr/bin/openwork > share/systemd/openwork.service
openwork service print --socket > share/systemd/openwork.socket
# The test that compares the tables of docs/commands.md writes them.
OPENWORK_TEST_WRITE_DOCS=1 cargo test --quiet --locked --test it -- --exact \
    docs::commands_page_matches_the_tables
