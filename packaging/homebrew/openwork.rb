# For Homebrew on Linux. The URL and checksum are those of the output of `cargo package`: the project has no
# public address yet.
class Openwork < Formula
  desc "Keeps one opencode server alive for many workspaces"
  url "file:///path/to/openwork-orchestrator-0.2.0.crate"
  sha256 "0000000000000000000000000000000000000000000000000000000000000000"
  license "MIT"

  depends_on "rust" => :build
  depends_on :linux

  def install
    system "cargo", "install", *std_cargo_args
    man1.install "share/man/openwork.1"
    bash_completion.install "share/completions/openwork.bash" => "openwork"
    zsh_completion.install "share/completions/_openwork"
    fish_completion.install "share/completions/openwork.fish"
    # Homebrew itself installs only the README, which links to these.
    system "bash", "packaging/docs.sh", prefix
    (prefix/"third-party-notices").write Utils.safe_popen_read("bash", "packaging/notices.sh")
  end

  service do
    run [opt_bin/"openwork", "daemon"]
    keep_alive crashed: true
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/openwork --version")
    assert_match "not running", shell_output("#{bin}/openwork status 2>&1", 3)
  end
end
