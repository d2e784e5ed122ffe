//! What packages ship: completions, the manual page, the unit for systemd.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::docs;
use crate::support::{Host, on_terminal, wait_for};

fn tables(host: &Host) -> Value {
    host.openwork(["help"]).json()
}

fn rows<'a>(tables: &'a Value, table: &str) -> impl Iterator<Item = &'a Value> {
    tables[table].as_array().unwrap().iter()
}

fn field<'a>(row: &'a Value, name: &str) -> &'a str {
    row[name].as_str().unwrap_or_else(|| panic!("no {name} in {row}"))
}

// --- Completions ---

/// The completions after these words.
fn completions(host: &Host, words: &[&str]) -> Vec<String> {
    let words = ["__complete"].iter().chain(words);
    let lines = host.openwork(words).ok().stdout;
    lines.lines().map(|line| line.split('\t').next().unwrap().to_owned()).collect()
}

#[test]
fn every_command_is_completed() {
    let host = Host::new();
    for row in rows(&tables(&host), "commands") {
        let words: Vec<&str> = field(row, "name").split(' ').collect();
        for count in 0..words.len() {
            let mut before = words[..count].to_vec();
            before.push("");
            let found = completions(&host, &before);
            assert!(found.contains(&words[count].to_owned()), "{words:?}: {found:?}");
            before.insert(0, "help");
            assert!(completions(&host, &before).contains(&words[count].to_owned()), "help {words:?}");
        }
    }
    assert_eq!(completions(&host, &["ws", ""]), completions(&host, &["workspace", ""]));
    for nothing in [&["no-such-command", ""][..], &["status", ""], &["workspace", "no-such-command", ""], &[]] {
        assert_eq!(completions(&host, nothing), [""; 0], "{nothing:?}");
    }
}

#[test]
fn every_option_is_completed_where_it_applies() {
    let host = Host::new();
    let tables = tables(&host);
    for row in rows(&tables, "commands") {
        let mut words: Vec<&str> = field(row, "name").split(' ').collect();
        words.push("-");
        let found = completions(&host, &words);
        for option in rows(&tables, "options") {
            let is_for_all = option["commands"].as_array().unwrap().is_empty();
            let is_taken = is_for_all || row["options"].as_array().unwrap().contains(&option["name"]);
            assert_eq!(found.contains(&field(option, "name").to_owned()), is_taken, "{option} of {row}");
        }
    }
    // An option that was given is not offered again, unless it is repeatable.
    let found = completions(&host, &["daemon", "--cors", "http://a", "--idle-ttl=1h", "--"]);
    assert!(found.contains(&"--cors".to_owned()) && !found.contains(&"--idle-ttl".to_owned()), "{found:?}");
}

#[test]
fn values_and_arguments_are_completed() {
    let host = Host::new();
    for (words, found) in [
        (&["env", "--shell", ""][..], &["sh", "fish"][..]),
        (&["logs", "-f", ""], &["opencode", "daemon"]),
        (&["completions", ""], &["bash", "zsh", "fish"]),
        (&["--data-dir", ""], &[":directories"]),
        (&["workspace", "add", ""], &[":directories"]),
        (&["workspace", "import", ""], &[":files"]),
        (&["daemon", "start", "--opencode-bin", ""], &[":files"]),
        (&["daemon", "start", "--opencode-bin", "=", "/o"], &[":files"]),
        (&["run", "web", "--", ""], &[":files"]),
        (&["run", ""], &[":files"]),
        (&["attach", "web", ""], &[":files"]),
        (&["workspace", "add", "--name", ""], &[]),
    ] {
        assert_eq!(completions(&host, words), found, "{words:?}");
    }
    let found = completions(&host, &["api", "web", ""]);
    assert!(found.contains(&"DELETE".to_owned()), "{found:?}");
}

#[test]
fn workspaces_are_completed_without_a_daemon() {
    let host = Host::new();
    host.write_state(
        json!({"version": 1, "workspaces": [{"id": "ws-a", "name": "my web", "path": "/w"}, {"id": "ws-b", "name": "b\nc"}]})
            .to_string(),
    );
    for command in [&["switch"][..], &["info"], &["path"], &["rm"], &["rename"]] {
        let words: Vec<&str> = ["ws"].iter().chain(command).chain(&[""]).copied().collect();
        assert_eq!(completions(&host, &words), ["my web", "b\u{fffd}c"]);
    }
    for command in [
        &["attach", ""][..],
        &["run", "-w", ""],
        &["env", "--workspace", ""],
        &["instance", "dispose", ""],
        &["rm", "a", ""],
    ] {
        assert_eq!(completions(&host, command), ["my web", "b\u{fffd}c"], "{command:?}");
    }
    assert!(completions(&host, &["api", ""]).contains(&"my web".to_owned()));
    // The second argument is no workspace.
    assert_eq!(completions(&host, &["ws", "rename", "my web", ""]), [""; 0]);
    let elsewhere = host.path("elsewhere");
    assert_eq!(completions(&host, &["--data-dir", elsewhere.to_str().unwrap(), "env", ""]), [""; 0]);
    assert!(host.lock_text().is_none());

    // A corrupt state file must not print errors while somebody types.
    host.write_state("{");
    assert_eq!(completions(&host, &["env", ""]), [""; 0]);
}

#[test]
fn each_shell_has_a_completion_script() {
    let host = Host::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = host.openwork(["completions", shell]).ok().stdout;
        assert!(script.contains("openwork __complete"), "{script}");
        assert_eq!(host.openwork(["completions", shell]).json(), json!({"ok": true, "text": script}));
    }
    host.openwork(["completions"]).fails(2, "usage");
    host.openwork(["completions", "tcsh"]).fails(2, "usage");
}

/// Runs the script in a real bash and checks its replies.
#[test]
fn bash_completion_works() {
    let host = Host::new();
    host.exercises(["command completions", "variable OPENWORK_DATA_DIR"]);
    host.write_state(
        json!({"version": 1, "workspaces": [{"id": "ws-a", "name": "my web", "path": "/w"}, {"id": "ws-b", "name": "it's"}]})
            .to_string(),
    );
    let script = host.openwork(["completions", "bash"]).ok().stdout;
    let driver = r#"
        compopt() { :; } # there is no completion under way
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        current=${COMP_WORDS[COMP_CWORD]} # an opening quote is no part of it
        _openwork openwork "${current#[\"\']}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let complete = |words: &[&str]| {
        let path = format!("{}:{}", host.binary().parent().unwrap().display(), std::env::var("PATH").unwrap());
        let mut bash = Command::new("bash");
        bash.args(["-c", &format!("{script}{driver}"), "bash", "openwork"]).args(words).env_clear();
        bash.env("PATH", path).env("OPENWORK_DATA_DIR", host.data()).env("HOME", host.home());
        let output = bash.output().expect("bash, which this test needs");
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(complete(&["workspace", "sw"]), ["switch"]);
    assert_eq!(complete(&["workspace", "switch", ""]), ["my\\ web", "it\\'s"]);
    assert_eq!(complete(&["workspace", "switch", "my\\ w"]), ["my\\ web"]);
    assert_eq!(complete(&["workspace", "switch", "'my"]), ["my web"]);
    assert_eq!(complete(&["workspace", "add", "/pro"]), ["/proc"]);
    assert_eq!(complete(&["daemon", "stop", "--k"]), ["--keep-opencode"]);
}

/// What readline makes of it, in a bash that is typed to. `say` is a function that is completed as openwork is.
#[test]
fn bash_completes_quoted_and_unquoted_words() {
    let host = Host::new();
    let names = ["my web", "it's", "a$b", "say \"hi\"", "back\\slash", "`tick`", "plain", "quote'"];
    let entry = |(at, name): (usize, &&str)| json!({"id": format!("ws-{at}"), "name": name, "path": "/w"});
    let workspaces: Vec<Value> = names.iter().enumerate().map(entry).collect();
    host.write_state(json!({"version": 1, "workspaces": workspaces}).to_string());
    fs::create_dir_all(host.path("d/my dir")).unwrap();
    let script = host.path("completion");
    fs::write(&script, host.openwork(["completions", "bash"]).ok().stdout).unwrap();
    let mut path = host.binary().parent().unwrap().as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap());
    let begin = format!(
        "PS1= PS2=; source '{}'; say() {{ printf '<%s>' \"$@\"; echo .; }}; complete -F _openwork say\n",
        script.display()
    );
    for (typed, said) in [
        ("switch my", "my web"),
        ("switch my\\ w", "my web"),
        ("switch \"my", "my web"),
        ("switch \"my w", "my web"),
        ("switch 'my w", "my web"),
        ("switch it", "it's"),
        ("switch \"it", "it's"),
        ("switch 'it", "it's"),
        ("switch a", "a$b"),
        ("switch \"a", "a$b"),
        ("switch 'a", "a$b"),
        ("switch \"say", "say \"hi\""),
        ("switch 'say", "say \"hi\""),
        ("switch \"back", "back\\slash"),
        ("switch \"\\`", "`tick`"),
        ("switch '`", "`tick`"),
        ("switch pl", "plain"),
        ("switch 'quote", "quote'"),
        ("switch \"quote", "quote'"),
        ("add d/my", "d/my dir/"),
    ] {
        let mut bash = Command::new("bash");
        bash.args(["--noprofile", "--norc", "-i"]).env_clear().env("PATH", &path).env("HOME", host.home());
        bash.env("OPENWORK_DATA_DIR", host.data())
            .env("TERM", "dumb")
            .env("INPUTRC", "/dev/null")
            .current_dir(host.path("."));
        let typing = format!("{begin}say {typed}\t\nexit\n");
        let output = on_terminal(bash, &typing);
        let command = typed.split(' ').next().unwrap();
        assert!(output.contains(&format!("<{command}><{said}>.\n")), "{typed}: {output:?}");
    }
}

// --- The manual page ---

#[test]
fn manual_covers_the_tables() {
    let host = Host::new();
    host.exercises(["command man"]);
    let tables = tables(&host);
    let page = host.openwork(["man"]).ok().stdout;
    assert_eq!(host.openwork(["man"]).json()["text"], page.as_str());
    assert!(page.starts_with(".TH OPENWORK 1 "), "{page}");
    let has = |text: &str| page.contains(&text.replace('-', "\\-"));
    let flowing = page.replace("\n\\&", " ").replace('\n', " ");
    let says = |text: &str| flowing.contains(&text.replace('-', "\\-"));
    for row in rows(&tables, "commands") {
        assert!(has(&format!("\n\\fB{}\\fR", field(row, "name"))) && says(field(row, "summary")), "{row}");
    }
    for row in rows(&tables, "options") {
        assert!(has(field(row, "name")) && says(field(row, "help")), "{row}");
        assert!(row["env"].as_str().is_none_or(|env| has(&format!("Environment: \\fB{env}\\fR"))), "{row}");
    }
    for row in rows(&tables, "errors") {
        assert!(has(&format!("\n{} {}\n", field(row, "code"), row["exit"])), "{row}");
    }
    // No line of text starts with a roff request by accident.
    let known = [".TH", ".SH", ".TP", ".B", ".BR", ".I", ".IR", ".RI", ".PP", ".br", ".nf", ".fi"];
    for line in page.lines().filter(|line| line.starts_with(['.', '\''])) {
        assert!(known.contains(&line.split(' ').next().unwrap()), "{line}");
    }
}

/// mandoc warns about lines over 80 bytes. Tags of lists cannot be broken, so they are exempt.
#[test]
fn manual_fits_80_columns() {
    let page = Host::new().openwork(["man"]).ok().stdout;
    let mut is_tag = false;
    for line in page.lines() {
        assert!(is_tag || line.len() <= 80, "{line}");
        is_tag = line == ".TP";
    }
}

mod with_mandoc {
    use super::*;

    #[test]
    #[ignore = "needs mandoc"]
    fn mandoc_accepts_the_manual() {
        let host = Host::new();
        let page = host.path("openwork.1");
        fs::write(&page, host.openwork(["man"]).ok().stdout).unwrap();
        let mandoc = Command::new("mandoc").args(["-T", "lint", "-W", "warning"]).arg(&page).output();
        let output = mandoc.expect("mandoc, which this test needs");
        assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    }
}

// --- What packages install ---

/// A file of `share/`, as it is in the sources.
fn shared(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("share").join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// So that cross builds of packages need not run the program.
#[test]
fn share_matches_the_output_of_the_program() {
    let mut host = Host::new();
    host.exercises(["option --socket"]);
    for variable in ["OPENWORK_DATA_DIR", "OPENWORK_OPENCODE_BIN", "OPENWORK_DAEMON_PORT", "OPENWORK_OPENCODE_PORT"] {
        host.unset(variable);
    }
    for (file, command) in [
        ("man/openwork.1", &["man"][..]),
        ("completions/openwork.bash", &["completions", "bash"]),
        ("completions/_openwork", &["completions", "zsh"]),
        ("completions/openwork.fish", &["completions", "fish"]),
        ("systemd/openwork.service", &["service", "print", "--program", "/usr/bin/openwork"]),
        ("systemd/openwork.socket", &["service", "print", "--socket"]),
    ] {
        let printed = host.openwork(command).ok().stdout;
        assert!(shared(file) == printed, "share/{file} is not what {command:?} prints: run `just assets`");
    }
}

#[test]
fn shared_openapi_matches_the_served_one() {
    let host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let served = host.http("GET", "/doc").send().json();
    assert_eq!(served, serde_json::from_str::<Value>(&shared("openapi.json")).unwrap());
    assert_eq!(served["info"]["version"], env!("CARGO_PKG_VERSION"));
}

/// Relative paths of all files below a directory, sorted.
fn files_below(root: &Path) -> Vec<PathBuf> {
    let (mut files, mut directories) = (Vec::new(), vec![root.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { directories.push(path) } else { files.push(path.strip_prefix(root).unwrap().to_owned()) }
        }
    }
    files.sort();
    files
}

/// Packages install only a part of the sources, and pages link to more than that.
#[test]
fn installed_pages_link_only_to_installed_files() {
    let host = Host::new();
    let root = host.path("root");
    let mut install = Command::new("bash");
    install.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/install.sh"));
    install.arg(host.binary()).arg("/opt/it").env("DESTDIR", &root);
    let output = install.output().expect("bash, which this test needs");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");

    let prefix = root.join("opt/it");
    let (pages, others): (Vec<PathBuf>, Vec<PathBuf>) =
        files_below(&prefix).into_iter().partition(|path| path.extension().is_some_and(|extension| extension == "md"));
    let others: Vec<&str> = others.iter().map(|path| path.to_str().unwrap()).collect();
    assert_eq!(
        others,
        [
            "bin/openwork",
            "lib/systemd/user/openwork.service",
            "lib/systemd/user/openwork.socket",
            "share/bash-completion/completions/openwork",
            "share/doc/openwork/docs/recording.svg",
            "share/doc/openwork/openapi.json",
            "share/fish/vendor_completions.d/openwork.fish",
            "share/man/man1/openwork.1",
            "share/zsh/site-functions/_openwork",
        ]
    );
    let count: usize = pages.iter().map(|page| docs::assert_links_resolve(&prefix.join(page))).sum();
    assert!(count > 20, "only {count} links found in {pages:?}");
    // Links are all that changes: an example with the look of a link stays.
    let prompt = docs::read(&prefix.join("share/doc/openwork/docs/prompt.md"));
    assert_eq!(prompt, docs::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/prompt.md")));

    let unit = docs::read(&prefix.join("lib/systemd/user/openwork.service"));
    assert_eq!(exec_start(&unit)[0], "/opt/it/bin/openwork");
}

// --- The unit for systemd ---

fn exec_start(unit: &str) -> Vec<String> {
    words_of(unit, "ExecStart=")
}

/// The words of a command line in a unit, by the rules of systemd.service(5).
fn words_of(unit: &str, key: &str) -> Vec<String> {
    let line = unit.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{unit}"));
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    let mut rest = line.chars();
    while let Some(c) = rest.next() {
        match c {
            '"' | '\'' if quote == Some(c) => quote = None,
            '"' | '\'' if quote.is_none() => quote = Some(c),
            ' ' if quote.is_none() => words.push(std::mem::take(&mut word)),
            '\\' => word.push(rest.next().unwrap()),
            '%' | '$' => {
                assert_eq!(rest.next(), Some(c), "{line}");
                word.push(c);
            }
            _ => word.push(c),
        }
    }
    words.push(word);
    words
}

#[test]
fn unit_runs_the_daemon() {
    let mut host = Host::new();
    let awkward = host.path("a \"b\" 100% $HOME \\");
    host.set("OPENWORK_DATA_DIR", &awkward);
    host.data_is(awkward);
    let unit = host.openwork(["service", "print", "--idle-ttl", "2h"]).ok().stdout;
    assert_eq!(host.openwork(["service", "print", "--idle-ttl", "2h"]).json()["text"], unit.as_str());
    assert!(host.lock_text().is_none());
    let words = exec_start(&unit);
    assert_eq!((Path::new(&words[0]), &*words[1]), (host.binary(), "daemon"), "{unit}");
    // systemd does not have the shell's environment, so all of it has to be in the arguments.
    let mut daemon = host.openwork(&words[1..]);
    for variable in ["OPENWORK_DATA_DIR", "OPENWORK_OPENCODE_BIN", "OPENWORK_DAEMON_PORT", "OPENWORK_OPENCODE_PORT"] {
        daemon = daemon.env(variable, "");
    }
    let daemon = daemon.spawn();
    wait_for("opencode to be ready", || host.lock_text().is_some() && host.phase() == "ready");
    assert_eq!(host.daemon_pid(), daemon.pid());
    // The condition fails while a daemon runs, and a usage error is not retried.
    let condition = words_of(&unit, "ExecCondition=");
    let is_met = || Command::new(&condition[0]).args(&condition[1..]).env_clear().status().unwrap().code();
    assert_eq!(is_met(), Some(1));
    host.openwork(["daemon", "--idle-ttl=soon"]).exits(2);
    let has = |line: &str| unit.lines().any(|given| given == line);
    for line in ["Type=notify", "Restart=on-failure", "RestartPreventExitStatus=2", "OOMPolicy=continue"] {
        assert!(has(line), "{line}: {unit}");
    }
    host.openwork(["daemon", "stop"]).ok();
    assert!(daemon.wait().status.success());
    assert_eq!(is_met(), Some(0));
}

/// Otherwise systemd would restart a daemon that was stopped on purpose.
#[test]
fn stop_succeeds_when_the_state_file_is_not_writable() {
    let host = Host::unprivileged();
    let daemon = host.openwork(["daemon"]).spawn();
    wait_for("opencode to be ready", || host.lock_text().is_some() && host.phase() == "ready");
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o500)).unwrap();
    host.openwork(["daemon", "stop"]).ok();
    let output = daemon.wait();
    fs::set_permissions(host.data(), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.contains("cannot"), "{output:?}");
    assert_eq!(host.processes(), [0; 0]);
}

#[test]
fn packaged_unit_has_no_paths_of_the_builder() {
    let mut host = Host::new();
    host.exercises(["code usage", "command service print", "option --program"]);
    for variable in ["OPENWORK_DATA_DIR", "OPENWORK_OPENCODE_BIN", "OPENWORK_DAEMON_PORT", "OPENWORK_OPENCODE_PORT"] {
        host.unset(variable);
    }
    let unit = host.openwork(["service", "print"]).ok().stdout;
    assert_eq!(exec_start(&unit), [host.binary().to_str().unwrap(), "daemon"]);
    assert!(!unit.contains(host.home().to_str().unwrap()), "{unit}");
    // The unit may run another binary than the one that prints it.
    for (program, runs) in [("/usr/bin/openwork", "/usr/bin/openwork".into()), ("bin/a b", host.path("bin/a b"))] {
        let unit = host.openwork(["service", "print", "--program", program]).ok().stdout;
        assert_eq!(exec_start(&unit), [runs.to_str().unwrap(), "daemon"]);
        assert!(!unit.contains(host.binary().to_str().unwrap()), "{unit}");
    }
    host.openwork(["service", "print", "--program="]).fails(2, "usage");
    host.openwork(["service", "print", "--data-dir", "/a\nb"]).fails(2, "usage");
    host.openwork(["service", "print", "--idle-ttl", "soon"]).fails(2, "usage");
    host.openwork(["service"]).ok();
    // Units of time and size are spelled out.
    let unit = host.openwork(["service", "print", "--idle-ttl", "2d", "--max-memory", "512K"]).ok().stdout;
    let expected = [host.binary().to_str().unwrap(), "daemon", "--max-memory=524288", "--idle-ttl=172800s"];
    assert_eq!(exec_start(&unit), expected);
}
