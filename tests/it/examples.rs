//! Runs the examples in the README and in `docs/` unchanged: in a fresh home with some projects, one page after the other,
//! on a terminal. The output must be what the page shows. Numbers, ids and the home differ between runs: they are compared
//! by position, and later commands of the page get the values of this run.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::docs::{pages, read};
use crate::support::{DEADLINE, Host, fake_opencode};

/// Pages about opencode 2.x, and its version.
const OF_2_X: [&str; 1] = ["opencode-versions.md"];
const VERSION_2_X: &str = "2.3.2";

/// The directory of the projects on the pages, and the port of their daemon.
const HOME: &str = "/home/me";
const PORT: &str = "6174";
const PROJECTS: [&str; 5] = ["web", "api", "docs", "shop", "blog"];

/// A marker before the status of a command that no output contains.
const MARK: char = '\u{1e}';

/// Commands whose output comes from OpenCode: the pages do not show it.
const OF_OPENCODE: [&str; 3] = ["openwork attach", "openwork run", "openwork open"];

/// Commands that are not run here, by their beginning, and why.
const NOT_RUN: &[(&str, &str)] = &[
    ("cargo install", "builds the program that these tests are about, and puts it where the user has others"),
    ("just", "a recipe of the developers'; what it calls is checked by its use"),
    ("systemctl --user", "takes a user manager: systemd.rs and `just try-systemd` have the units"),
    ("OPENWORK_SIMULATION_SEED=", "a test of this program, with a seed that a failure has printed"),
];

/// Commands that run until they are interrupted, by their beginning. They get two seconds.
const ENDLESS: [&str; 2] = ["curl -N", "openwork events"];

/// Languages of blocks other than shell, and where they are run, or why not.
const OTHER_LANGUAGES: &[(&str, &str)] = &[
    ("text", "no command"),
    ("js", "run by tests/real/route.rs, with the SDK that it imports"),
    ("bash", "run by everyday.rs, which looks at the prompt"),
    ("zsh", "takes a shell that few machines have"),
    ("fish", "takes a shell that few machines have"),
    ("toml", "a setting of starship's"),
];

// --- Examples ---

struct Example {
    command: String,
    /// `None` if the block shows no output at all.
    output: Option<Vec<String>>,
}

/// The fenced blocks of a page: language and text.
fn blocks(page: &str) -> Vec<(&str, &str)> {
    let fenced = page.split("```").skip(1).step_by(2);
    fenced.map(|block| block.split_once('\n').expect("a language")).collect()
}

fn examples(language: &str, text: &str) -> Vec<Example> {
    match language {
        "console" => transcript(text),
        "sh" => text
            .replace("\\\n", " ")
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| Example { command: line.to_owned(), output: None })
            .collect(),
        _ => {
            let is_known = OTHER_LANGUAGES.iter().any(|(name, _)| *name == language);
            assert!(is_known, "a block of the language {language:?}: examples are `sh` or `console`");
            Vec::new()
        }
    }
}

/// The commands after `$ `, each with the lines up to the next.
fn transcript(text: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    for line in text.lines() {
        match (line.strip_prefix("$ "), examples.last_mut()) {
            (Some(command), _) => examples.push(Example { command: command.to_owned(), output: Some(Vec::new()) }),
            (None, Some(Example { output: Some(lines), .. })) => lines.push(line.to_owned()),
            (None, _) => panic!("output without a command: {line}"),
        }
    }
    examples
}

fn is_run(command: &str) -> bool {
    !NOT_RUN.iter().any(|(start, _)| command.starts_with(start))
}

// --- What is compared ---

/// A line with its numbers and ids masked, and these by themselves. Columns may be wider or narrower.
fn shape(line: &str) -> (String, Vec<String>) {
    let (mut shape, mut values) = (String::new(), Vec::new());
    let mut rest = line;
    while let Some(c) = rest.chars().next() {
        let prefix = ["ws-", "ses_"].into_iter().find(|prefix| rest.starts_with(prefix)).unwrap_or_default();
        let length = match prefix {
            "" if c.is_ascii_digit() => rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len()),
            "" => 0,
            _ => {
                prefix.len()
                    + rest[prefix.len()..]
                        .find(|c: char| !c.is_ascii_alphanumeric())
                        .unwrap_or(rest[prefix.len()..].len())
            }
        };
        if length > 0 {
            let value = rest[..length].trim_end_matches('.');
            values.push(value.to_owned());
            shape.push_str(prefix);
            shape.push('#');
            rest = &rest[value.len()..];
        } else {
            if !c.is_whitespace() {
                shape.push(c);
            } else if !shape.ends_with(' ') {
                shape.push(' ');
            }
            rest = &rest[c.len_utf8()..];
        }
    }
    // Durations and sizes on another machine can be of another unit.
    for (unit, instead) in [("#h #m", "#s"), ("#m #s", "#s"), ("# kB", "# MB"), ("# GB", "# MB")] {
        shape = shape.replace(unit, instead);
    }
    (shape.trim().to_owned(), values)
}

/// Whether a line matches the page, where `…` stands for any text.
fn fits(shape: &str, expected: &str) -> bool {
    let parts: Vec<&str> = expected.split('…').map(str::trim).collect();
    let (first, last) = (parts[0], parts[parts.len() - 1]);
    if parts.len() == 1 {
        return shape == expected;
    }
    let middle = shape.strip_prefix(first).and_then(|rest| rest.strip_suffix(last));
    let Some(mut rest) = middle else { return false };
    parts[1..parts.len() - 1].iter().all(|part| match rest.split_once(part) {
        Some((_, after)) => {
            rest = after;
            true
        }
        None => false,
    })
}

/// The pairs of lines to compare. A line `…` of the page stands for any number of lines.
fn beside<'a>(lines: &'a [String], page: &'a [String]) -> Option<Vec<(&'a String, &'a String)>> {
    let (before, after) = match page.iter().position(|line| line == "…") {
        Some(gap) => (gap, page.len() - gap - 1),
        None if lines.len() == page.len() => (page.len(), 0),
        None => return None,
    };
    let from = lines.len().checked_sub(after).filter(|from| *from >= before)?;
    let (head, tail) = (lines[..before].iter().zip(page), lines[from..].iter().zip(&page[page.len() - after..]));
    Some(head.chain(tail).collect())
}

// --- The terminal ---

/// A shell whose commands have a terminal.
struct Shell {
    bash: Child,
    commands: ChildStdin,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl Shell {
    fn start(host: &Host) -> Shell {
        let bin = host.path("bin");
        fs::create_dir(&bin).unwrap();
        symlink(host.binary(), bin.join("openwork")).unwrap();
        symlink(fake_opencode(), bin.join("opencode")).unwrap();
        for project in PROJECTS {
            fs::create_dir_all(host.home().join("code").join(project)).unwrap();
        }
        let (terminal, screen) = terminal();
        let mut bash = Command::new("bash");
        bash.args(["--norc", "--noprofile"]).env_clear().current_dir(host.home());
        bash.env("PATH", format!("{}:{}", bin.display(), host.get("PATH"))).env("HOME", host.home());
        bash.env("TERM", "dumb").env("OPENWORK_DAEMON_PORT", host.get("OPENWORK_DAEMON_PORT"));
        for variable in ["FAKE_OPENCODE_DIR", "FAKE_VERSION"] {
            bash.env(variable, host.get(variable));
        }
        if let Some(profiles) = std::env::var_os("LLVM_PROFILE_FILE") {
            bash.env("LLVM_PROFILE_FILE", profiles);
        }
        let mut bash = bash.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(terminal).spawn().expect("bash");
        let (sender, output) = mpsc::channel();
        thread::spawn(move || {
            let mut screen = File::from(screen);
            let mut buffer = [0; 4096];
            // An error means the end: no process has the terminal open.
            while let Ok(count @ 1..) = screen.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        let mut commands = bash.stdin.take().unwrap();
        // The terminal neither echoes nor changes what is written, and is wide enough for every line of the pages.
        writeln!(commands, "exec 3>&2; stty raw -echo rows 40 cols 120 <&3").unwrap();
        Shell { bash, commands, output, seen: String::new() }
    }

    /// Runs a command, and returns its exit status and what it has printed.
    fn run(&mut self, command: &str) -> (String, String) {
        let script = format!(
            "{{ {command}\n}} <&3 >&3 2>&3\n__status=$?; printf '\\036%s\\n' \"$__status\" >&3; (exit \"$__status\")\n"
        );
        self.commands.write_all(script.as_bytes()).expect("a shell that reads");
        loop {
            if let Some((output, rest)) = self.seen.clone().split_once(MARK) {
                if let Some((status, rest)) = rest.split_once('\n') {
                    self.seen = rest.to_owned();
                    return (status.to_owned(), output.to_owned());
                }
            }
            let more = self.output.recv_timeout(DEADLINE);
            let more = more.unwrap_or_else(|_| panic!("{command:?} does not end; so far:\n{}", self.seen));
            self.seen.push_str(&String::from_utf8(more).expect("UTF-8"));
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.bash.kill();
        let _ = self.bash.wait();
    }
}

/// Both ends of a terminal.
fn terminal() -> (OwnedFd, OwnedFd) {
    let screen = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
    grantpt(&screen).unwrap();
    unlockpt(&screen).unwrap();
    let name = ptsname(&screen, Vec::new()).unwrap();
    let terminal = open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    (terminal, screen)
}

// --- The tests ---

/// Runs the examples of a page that a machine without curl can run, or all of them.
fn run_page(page: &Path, with_curl: bool) -> usize {
    let text = read(page);
    let examples: Vec<Example> =
        blocks(&text).into_iter().flat_map(|(language, text)| examples(language, text)).collect();
    let mut host = Host::new();
    if OF_2_X.iter().any(|name| page.ends_with(name)) {
        host.set("FAKE_VERSION", VERSION_2_X);
    }
    let data = host.home().join(".local/share/openwork");
    host.data_is(data);
    let mut shell = Shell::start(&host);
    let home = host.home().canonicalize().unwrap().to_str().unwrap().to_owned();
    // The values on the page, and their values here.
    let mut known =
        vec![(PORT.to_owned(), host.get("OPENWORK_DAEMON_PORT").to_owned()), (HOME.to_owned(), home.clone())];
    let mut count = 0;
    for (index, example) in examples.iter().enumerate() {
        if !is_run(&example.command) || example.command.contains("curl ") && !with_curl {
            continue;
        }
        count += 1;
        let command = known.iter().fold(example.command.clone(), |text, (page, here)| text.replace(page, here));
        let is_endless = ENDLESS.iter().any(|start| command.starts_with(start));
        let (status, printed) = match is_endless {
            true => shell.run(&format!("timeout 2 {command}\ntest $? = 124")),
            false => shell.run(&command),
        };
        // A command that waits shows that on a line, which its output then replaces.
        let lines: Vec<String> =
            printed.lines().map(|line| line.rsplit("\x1b[K").next().unwrap().replace(&home, HOME)).collect();
        let shown =
            || format!("{}: `{command}` exited with {status} and printed\n{}", page.display(), lines.join("\n"));
        let asks_for_status = examples.get(index + 1).is_some_and(|next| next.command == "echo $?");
        assert!(status == "0" || asks_for_status, "{}", shown());
        let Some(expected) = &example.output else { continue };
        if OF_OPENCODE.iter().any(|start| example.command.starts_with(start)) {
            continue;
        }
        for (line, expected) in beside(&lines, expected).unwrap_or_else(|| panic!("not so many lines; {}", shown())) {
            let ((shape, values), (expected_shape, expected_values)) = (self::shape(line), self::shape(expected));
            assert!(fits(&shape, &expected_shape), "the page has\n{expected}\n{}", shown());
            // A short number can be part of others.
            let pairs = expected_values.into_iter().zip(values).filter(|(page, _)| page.len() >= 4);
            if !expected.contains('…') {
                known.extend(pairs.filter(|(page, _)| page != PORT));
            }
        }
    }
    count
}

#[test]
fn examples_do_what_they_say() {
    let count: usize = pages().iter().map(|page| run_page(page, false)).sum();
    assert!(count > 30, "only {count} commands run");
}

#[test]
fn skipped_examples_exist_in_the_docs() {
    let texts: Vec<String> = pages().iter().map(|page| read(page)).collect();
    let all: Vec<(&str, &str)> = texts.iter().flat_map(|text| blocks(text)).collect();
    let commands: Vec<Example> = all.iter().flat_map(|(language, text)| examples(language, text)).collect();
    for (start, why) in NOT_RUN {
        assert!(
            commands.iter().any(|example| example.command.starts_with(start)),
            "no example begins with {start}: {why}"
        );
    }
    for (name, why) in OTHER_LANGUAGES {
        assert!(all.iter().any(|(language, _)| language == name), "no block of {name}: {why}");
    }
}

#[test]
fn lines_are_compared_by_words() {
    let same = |line: &str, page: &str| fits(&shape(line).0, &shape(page).0);
    assert!(same("daemon  pid 1  up 1m 3s  900.1 kB", "daemon    pid 10881  up 8s  3.6 MB"));
    assert!(same("{\"id\":\"ses_1a\",\"x\":1}", "{\"id\":\"ses_dfc24\", …}"));
    assert!(same("added web (/home/me) as ws-0123456789ab", "added web (/home/me) as ws-cfe7c084e085"));
    for (line, page) in
        [("a b", "a  c"), ("a", "a 1"), ("{\"x\":1}", "{\"id\": …}"), ("added ws-1, active", "added ws-2")]
    {
        assert!(!same(line, page), "{line} {page}");
    }
    let lines = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    for (printed, page, count) in
        [("a b", "a b", Some(2)), ("a b c", "a … c", Some(2)), ("a", "a …", Some(1)), ("a", "a b", None)]
    {
        assert_eq!(beside(&lines(printed), &lines(page)).map(|pairs| pairs.len()), count, "{printed} {page}");
    }
    assert_eq!(shape("at 127.0.0.1:80 ws-a1.").1, ["127.0.0.1", "80", "ws-a1"]);
}

mod with_curl {
    use super::*;

    #[test]
    #[ignore = "needs curl"]
    fn examples_with_curl_do_what_they_say() {
        let with_curl = |page: &&std::path::PathBuf| read(page).contains("curl ");
        let count: usize = pages().iter().filter(with_curl).map(|page| run_page(page, true)).sum();
        assert!(count > 5, "only {count} commands run");
    }
}
