# The version of the real opencode, and of its SDK, for the tests; both come from npm.
opencode := "1.18.33"

# List the recipes
[private]
default:
    @"{{ just_executable() }}" --justfile "{{ justfile() }}" --list --unsorted

# Demonstrate openwork with a real opencode, in a temporary directory
demo:
    scripts/demo.sh {{ opencode }}

# Run the tests: against a fake opencode, then against the real one
test:
    scripts/test.sh {{ opencode }}

# Format and lint, warnings denied, and compile with the oldest toolchain if rustup has it
lint:
    cargo fmt --check
    cargo clippy --locked --bins --tests --benches --test real --test soak -- --deny warnings
    scripts/oldest.sh

# Run all checks: lint and test
check: lint test

# Show which lines the tests run, by file; `just coverage --html` also writes pages
coverage *options:
    scripts/coverage.sh {{ options }}

# Measure the cost of openwork against the same work without it: all sections, or the named ones
bench *sections:
    opencode=$(scripts/opencode.sh {{ opencode }}) && sdk=$(scripts/sdk.sh {{ opencode }}) && \
        OPENWORK_TEST_OPENCODE="$opencode" OPENWORK_TEST_SDK="$sdk" cargo bench --locked --bench bench -- {{ sections }}

# Run commands of every kind while both processes are killed at random; `just soak 2 real`: two minutes, the real opencode
soak minutes="10" real="":
    if [ "{{ real }}" = real ]; then \
        opencode=$(scripts/opencode.sh {{ opencode }}) || exit; export OPENWORK_TEST_OPENCODE="$opencode"; \
    else unset OPENWORK_TEST_OPENCODE; fi; \
    OPENWORK_SOAK_MINUTES={{ minutes }} cargo test --release --locked --test soak -- --nocapture --test-threads=1

# Simulate the supervisor through months of virtual time, for this many minutes
simulate minutes="10":
    OPENWORK_SIMULATION_SECONDS=$(({{ minutes }} * 60)) cargo test --locked --profile simulate --bins \
        supervisor::simulation -- --nocapture --test-threads=1

# Run the tests with the oldest crates that Cargo.toml allows
floors:
    scripts/floors.sh

# Write share/, which packages install, from the tables of the program
assets:
    scripts/assets.sh

# Record docs/recording.svg, the picture in the README, from a run with a real opencode
recording:
    scripts/recording.sh {{ opencode }}

# Build a Debian package below target/package; DEBFULLNAME and DEBEMAIL name the maintainer
deb:
    packaging/deb.sh

# Try the units with a separate systemd user manager; as root
try-systemd:
    packaging/try-systemd.sh

# Install the binary where cargo does
install:
    cargo install --locked --path .
