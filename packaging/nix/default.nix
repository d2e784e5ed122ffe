# `nix-build packaging/nix`, from a checkout.
{ pkgs ? import <nixpkgs> { } }:

let
  manifest = (builtins.fromTOML (builtins.readFile ../../Cargo.toml)).package;
in
pkgs.rustPlatform.buildRustPackage {
  pname = "openwork";
  inherit (manifest) version;
  src = pkgs.lib.cleanSource ../..;
  cargoLock.lockFile = ../../Cargo.lock;
  # The tests run these; Nix provides bash, coreutils, grep and sed anyway.
  nativeCheckInputs = [ pkgs.util-linux ];
  postInstall = ''
    bash packaging/install.sh "$out/bin/openwork" "$out"
    bash packaging/notices.sh >"$out/share/doc/openwork/third-party-notices"
  '';
  meta = {
    inherit (manifest) description;
    license = pkgs.lib.licenses.mit;
    platforms = pkgs.lib.platforms.linux;
    mainProgram = "openwork";
  };
}
