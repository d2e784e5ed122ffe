#!/usr/bin/env bash
# Install the binary, share/ and the documentation: `[DESTDIR=DIR] packaging/install.sh BINARY [PREFIX]`.
# PREFIX defaults to /usr. ZSH_FUNCTIONS and FISH_COMPLETIONS, relative to the prefix, are for distributions
# that keep the completions of packages elsewhere.
set -euo pipefail
umask 022
binary=$(realpath "${1:?the binary}") prefix=${2:-/usr}
cd "$(dirname "$0")/.."
root=${DESTDIR:-}$prefix
put() { install -D -m 644 "$1" "$root/$2"; }
# Some distributions' builds have already installed it.
[[ $binary -ef $root/bin/openwork ]] || install -D -m 755 "$binary" "$root/bin/openwork"
put share/man/openwork.1 share/man/man1/openwork.1
put share/completions/openwork.bash share/bash-completion/completions/openwork
put share/completions/_openwork "${ZSH_FUNCTIONS:-share/zsh/site-functions}/_openwork"
put share/completions/openwork.fish "${FISH_COMPLETIONS:-share/fish/vendor_completions.d}/openwork.fish"
# Not enabled: each user has a daemon of their own, which starts on demand.
for unit in openwork.service openwork.socket; do
    put "share/systemd/$unit" "lib/systemd/user/$unit"
    sed -i "s|/usr/bin/openwork|$prefix/bin/openwork|g" "$root/lib/systemd/user/$unit"
done
bash packaging/docs.sh "$root/share/doc/openwork"
