#!/usr/bin/env bash
# Build a Debian package of the release binary and share/: `DEBFULLNAME=… DEBEMAIL=… packaging/deb.sh`.
# It needs cargo and dpkg-dev. The result is target/package/openwork_VERSION_ARCH.deb; the build is reproducible:
# the same sources and toolchain give the same bytes.
set -euo pipefail
umask 022
cd "$(dirname "$0")/.."
: "${DEBFULLNAME:?the name of the maintainer}" "${DEBEMAIL:?the address of the maintainer}"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
architecture=$(dpkg --print-architecture)
# Default to the date of the man page in share/.
date=$(sed -n '1s/^\.TH OPENWORK 1 \([0-9-]*\) .*/\1/p' share/man/openwork.1)
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(date --utc --date "$date" +%s)}

out=target/package
binary=$(packaging/release.sh)

root=$out/root
rm -rf "$root"
DESTDIR=$root ZSH_FUNCTIONS=share/zsh/vendor-completions packaging/install.sh "$binary"
doc=$root/usr/share/doc/openwork
packaging/notices.sh >"$doc/third-party-notices"
cat >"$doc/changelog" <<EOF
openwork ($version) unstable; urgency=medium

  * See CHANGELOG.md for what is new in this version.

 -- $DEBFULLNAME <$DEBEMAIL>  $(LC_ALL=C date --utc --date "@$SOURCE_DATE_EPOCH" '+%a, %d %b %Y %H:%M:%S +0000')
EOF
{
    cat <<EOF
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: openwork-orchestrator
Comment: The binary has crates linked in whose notices are in third-party-notices.gz.

Files: *
Copyright: $(sed -n 's/^Copyright (c) //p' LICENSE)
License: Expat

License: Expat
EOF
    sed -n '/^Permission is hereby/,$p' LICENSE | sed 's/^$/./; s/^/ /'
} >"$doc/copyright"
# The pages of docs/ stay uncompressed: they link to each other.
gzip -9n "$doc"/{changelog,third-party-notices,openapi.json} "$root/usr/share/man/man1/openwork.1"

mkdir -p "$root/DEBIAN" "$out/debian"
printf 'Source: openwork\n\nPackage: openwork\nArchitecture: any\n' >"$out/debian/control"
depends=$(cd "$out" && dpkg-shlibdeps -O root/usr/bin/openwork | sed -n 's/^shlibs:Depends=//p')
cat >"$root/DEBIAN/control" <<EOF
Package: openwork
Version: $version
Architecture: $architecture
Maintainer: $DEBFULLNAME <$DEBEMAIL>
Installed-Size: $(du --apparent-size -sk "$root/usr" | cut -f1)
Depends: $depends
Section: devel
Priority: optional
Description: one opencode server for many workspaces
 openwork keeps exactly one "opencode serve" process alive, with a password,
 and routes the calls of OpenCode clients to many project directories. A
 daemon in the background restarts opencode after a crash, takes over the
 opencode of a daemon that was killed, and disposes of idle instances.
 .
 opencode itself is not part of this package.
EOF
install -m 755 packaging/postinst "$root/DEBIAN/postinst"
(cd "$root" && find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
find "$root" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +
dpkg-deb --root-owner-group --build "$root" "$out/openwork_${version}_$architecture.deb"
