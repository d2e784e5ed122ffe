//! Whether everything there is has been exercised: every command, option, variable, route and
//! error code of the tables in `openwork help --json`, by what the tests have really called.
//!
//! The harness puts down what it runs and what comes of it. That is complete when all other
//! tests have ended, so this one has to be the last, and has nothing to say of a part of them.

use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::support::{Host, Observed, Outcome, is_root, observed, poll};

/// What takes a build with debug assertions: only that can be made to panic from outside.
const OF_DEBUG: &[&str] = &["code internal"];

/// Codes that are in the table for features to come. Whoever brings the feature takes its code out here.
const UPCOMING: &[&str] = &[
    "code still_busy",
    "code daemon_elsewhere",
    "code daemon_too_old",
    "code session_not_found",
    "code workspace_fenced",
];

/// What takes the rights of root: to become somebody else.
const OF_ROOT: &[&str] = &["code forbidden_user"];

/// Names of the tests that a run of this program with these arguments would run.
fn tests(arguments: impl IntoIterator<Item = String>) -> Vec<String> {
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program).args(arguments).arg("--list").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

/// Waits until all other tests have ended. False if only some of them are run.
fn all_others_have_ended() -> bool {
    const LIMIT: Duration = Duration::from_secs(600);
    let all = tests([]);
    if tests(std::env::args().skip(1)) != all {
        return false;
    }
    let me = thread::current().name().map(str::to_owned).unwrap();
    // On a single thread they are run one after the other, and have been.
    if me == "main" {
        return true;
    }
    let ended = || {
        let observed = observed();
        let missing = all.iter().filter(|test| **test != me && !observed.tests.contains(*test)).count();
        (missing == 0 && observed.live_hosts == 0).then_some(())
    };
    poll(LIMIT, ended).expect("the other tests to end");
    true
}

/// The names in one column of a table.
fn names<'a>(tables: &'a Value, table: &str, column: &'a str) -> impl Iterator<Item = &'a str> {
    tables[table].as_array().unwrap().iter().filter_map(move |row| row[column].as_str())
}

/// The command of these arguments: the longest name that stands in them in one piece, unless
/// it is what help is asked for.
fn command_of<'a>(arguments: &[String], names: &[&'a str]) -> Option<&'a str> {
    if arguments.iter().any(|argument| argument == "help") {
        return Some("help");
    }
    let stands_there = |name: &&&str| {
        let words: Vec<&str> = name.split(' ').collect();
        arguments.windows(words.len()).any(|window| window == words)
    };
    names.iter().filter(stands_there).max_by_key(|name| name.len()).copied()
}

/// Whether a path is one of a route, in which `:id` stands for any one part.
fn is_of_route(path: &str, route: &str) -> bool {
    let (path, route): (Vec<&str>, Vec<&str>) = (path.split('/').collect(), route.split('/').collect());
    // A literal part is not an id: /workspaces/remote is no workspace.
    path.len() == route.len()
        && path.iter().zip(&route).all(|(part, of)| of.starts_with(':') && *part != "remote" || part == of)
}

/// The exit status of what has not been understood.
const USAGE: i32 = 2;

/// What is in the tables, each as `kind name`, and whether it has been exercised.
fn judge(tables: &Value, observed: &Observed) -> Vec<(String, bool)> {
    let commands: Vec<&str> = names(tables, "commands", "name").collect();
    let succeeded = |(arguments, exit): &&(Vec<String>, Option<i32>)| {
        // One that goes on until a signal has no status.
        matches!(exit, None | Some(0)) && !arguments.iter().any(|argument| matches!(argument.as_str(), "--help" | "-h"))
    };
    let run: Vec<&str> = observed
        .commands
        .iter()
        .filter(succeeded)
        .filter_map(|(arguments, _)| command_of(arguments, &commands))
        .collect();
    let given = |option: &str| {
        let is_it = |argument: &String| {
            argument == option || argument.strip_prefix(option).is_some_and(|rest| rest.starts_with('='))
        };
        observed.commands.iter().any(|(arguments, exit)| *exit != Some(USAGE) && arguments.iter().any(is_it))
    };
    let mut judged = Vec::new();
    judged.extend(commands.iter().map(|name| (format!("command {name}"), run.contains(name))));
    for column in ["name", "short"] {
        judged.extend(names(tables, "options", column).map(|name| (format!("option {name}"), given(name))));
    }
    let variables = names(tables, "options", "env");
    judged.extend(variables.map(|name| (format!("variable {name}"), observed.variables.contains(name))));
    for row in tables["routes"].as_array().unwrap() {
        let (method, path) = (row["method"].as_str().unwrap(), row["path"].as_str().unwrap());
        let requested = observed
            .requests
            .iter()
            .any(|(of, target, status)| of == method && *status < 400 && is_of_route(target, path));
        judged.push((format!("route {method} {path}"), requested));
    }
    for code in names(tables, "errors", "code") {
        let seen = observed.codes.iter().any(|(of, _)| of == code);
        judged.push((format!("code {code}"), seen));
    }
    judged
}

#[test]
fn everything_there_is_has_been_exercised() {
    if !all_others_have_ended() {
        eprintln!("some of the tests are not run, so that nothing can be said");
        return;
    }
    let host = Host::new();
    let tables = host.openwork(["help"]).json();
    let observed = observed();
    let judged = judge(&tables, &observed);
    for kind in ["command", "option", "variable", "route", "code"] {
        assert!(judged.iter().any(|(name, _)| name.starts_with(kind)), "no {kind} in the tables");
    }
    let of = |exercised: bool| judged.iter().filter(move |(_, is)| *is == exercised).map(|(name, _)| name.as_str());
    let can_be = |name: &&str| {
        (is_root() || !OF_ROOT.contains(name))
            && (cfg!(debug_assertions) || !OF_DEBUG.contains(name))
            && !UPCOMING.contains(name)
    };
    let missing: Vec<&str> = of(false).filter(can_be).collect();
    assert_eq!(missing, [""; 0], "never exercised");

    let produced: Vec<&str> = of(true).filter(|name| UPCOMING.contains(name)).collect();
    assert_eq!(produced, [""; 0], "no longer upcoming");

    // And each failed with the statuses that the table promises for it.
    for (code, outcome) in &observed.codes {
        let rows = tables["errors"].as_array().unwrap();
        let row = rows.iter().find(|row| row["code"] == **code).unwrap_or_else(|| panic!("{code} is not in the table"));
        let promised = match outcome {
            Outcome::Exit(exit) => row["exit"] == *exit,
            Outcome::Http(status) => row["http"].as_array().unwrap().contains(&(*status).into()),
        };
        assert!(promised, "{code} with {outcome:?}: {row}");
    }
}
