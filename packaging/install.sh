#!/usr/bin/env bash
# Install the binary, share/ and the documentation: `[DESTDIR=DIR] packaging/install.sh BINARY [PREFIX]`.
# PREFIX is /usr unless it is given. ZSH_FUNCTIONS and FISH_COMPLETIONS, below the prefix, are for
# distributions with directories of their own for the completions of packages.
set -euo pipefail
umask 022
binary=$(realpath "${1:?the binary}") prefix=${2:-/usr}
cd "$(dirname "$0")/.."
root=${DESTDIR:-}$prefix
put() { install -D -m 644 "$1" "$root/$2"; }
# The build of some distributions has put it in its place.
[[ $binary -ef $root/bin/openwork ]] || install -D -m 755 "$binary" "$root/bin/openwork"
put share/man/openwork.1 share/man/man1/openwork.1
put share/completions/openwork.bash share/bash-completion/completions/openwork
put share/completions/_openwork "${ZSH_FUNCTIONS:-share/zsh/site-functions}/_openwork"
put share/completions/openwork.fish "${FISH_COMPLETIONS:-share/fish/vendor_completions.d}/openwork.fish"
# For users to enable: the daemon belongs to a user, and starts when it is needed.
for unit in openwork.service openwork.socket; do
    put "share/systemd/$unit" "lib/systemd/user/$unit"
    sed -i "s|/usr/bin/openwork|$prefix/bin/openwork|g" "$root/lib/systemd/user/$unit"
done
bash packaging/docs.sh "$root/share/doc/openwork"
