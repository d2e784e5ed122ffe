//! Which entries of the tables in `openwork help --json` a test exercises: commands, options, variables,
//! routes and error codes.
//!
//! A test claims them with [`Host::exercises`](super::Host::exercises), and dropping the host checks the
//! claims. `coverage.rs` reads the claims from the sources and compares them with the tables. So neither
//! check depends on which tests run, in which order, or in which process.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;

/// The exit status of a usage error.
const USAGE: i32 = 2;

/// How a command or a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    Exit(i32),
    Http(u16),
}

/// The commands and requests of a host.
#[derive(Default)]
pub struct Exercised {
    /// Arguments and exit status of every command; `None` when a signal ended it.
    pub commands: BTreeSet<(Vec<String>, Option<i32>)>,
    /// Every environment variable of a command.
    pub variables: BTreeSet<String>,
    /// Method, path and status of every HTTP request.
    pub requests: BTreeSet<(String, String, u16)>,
    /// Every error code, with the status it came with.
    pub codes: BTreeSet<(String, Failure)>,
}

/// `openwork help --json`.
pub fn tables() -> &'static Value {
    static TABLES: OnceLock<Value> = OnceLock::new();
    TABLES.get_or_init(|| {
        let output = Command::new(env!("CARGO_BIN_EXE_openwork")).args(["help", "--json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).expect("the tables")
    })
}

fn rows(table: &str) -> impl Iterator<Item = &'static Value> {
    tables()[table].as_array().unwrap_or_else(|| panic!("no table of {table}")).iter()
}

fn column(table: &str, column: &'static str) -> impl Iterator<Item = &'static str> {
    rows(table).filter_map(move |row| row[column].as_str())
}

/// Every table entry, in the form of a claim: `command daemon start`, `option --name`, `variable NAME`,
/// `route GET /health`, `code usage`.
pub fn everything() -> BTreeSet<String> {
    let named = |kind: &'static str, names: Vec<String>| names.into_iter().map(move |name| format!("{kind} {name}"));
    let of = |table, field| column(table, field).map(str::to_owned).collect::<Vec<_>>();
    let routes =
        rows("routes").map(|row| format!("{} {}", row["method"].as_str().unwrap(), row["path"].as_str().unwrap()));
    named("command", of("commands", "name"))
        .chain(named("option", of("options", "name")))
        .chain(named("option", of("options", "short")))
        .chain(named("variable", of("options", "env")))
        .chain(named("route", routes.collect()))
        .chain(named("code", of("errors", "code")))
        .collect()
}

impl Exercised {
    /// Whether a claim is true of what happened.
    pub fn has(&self, claim: &str) -> bool {
        let (kind, name) = claim.split_once(' ').unwrap_or((claim, ""));
        match kind {
            "command" => self.has_run(name),
            "option" => self.has_given(name),
            "variable" => self.variables.contains(name),
            "route" => self.has_requested(name),
            "code" => self.codes.iter().any(|(code, _)| code == name),
            _ => false,
        }
    }

    /// The command succeeded, or ran until a signal.
    fn has_run(&self, name: &str) -> bool {
        let succeeded = |(arguments, exit): &&(Vec<String>, Option<i32>)| {
            matches!(exit, None | Some(0))
                && !arguments.iter().any(|argument| matches!(argument.as_str(), "--help" | "-h"))
        };
        let commands: Vec<&str> = column("commands", "name").collect();
        let mut run = self.commands.iter().filter(succeeded);
        run.any(|(arguments, _)| command_of(arguments, &commands) == Some(name))
    }

    fn has_given(&self, option: &str) -> bool {
        let is_option = |argument: &String| {
            argument == option || argument.strip_prefix(option).is_some_and(|rest| rest.starts_with('='))
        };
        self.commands.iter().any(|(arguments, exit)| *exit != Some(USAGE) && arguments.iter().any(is_option))
    }

    fn has_requested(&self, route: &str) -> bool {
        let (method, path) = route.split_once(' ').unwrap_or_default();
        self.requests.iter().any(|(of, target, status)| of == method && *status < 400 && is_of_route(target, path))
    }

    /// The errors whose exit or HTTP status differs from the table.
    pub fn broken_promises(&self) -> Vec<String> {
        let kept = |(code, failure): &&(String, Failure)| {
            let row = rows("errors").find(|row| row["code"] == **code);
            row.is_some_and(|row| match failure {
                Failure::Exit(exit) => row["exit"] == *exit,
                Failure::Http(status) => row["http"].as_array().unwrap().contains(&(*status).into()),
            })
        };
        let broken = self.codes.iter().filter(|failure| !kept(failure));
        broken.map(|(code, failure)| format!("{code} with {failure:?}")).collect()
    }
}

/// The command that these arguments call: the longest command name among them.
fn command_of<'a>(arguments: &[String], names: &[&'a str]) -> Option<&'a str> {
    // A completion request has the words of another command.
    if arguments.first().is_some_and(|argument| argument.starts_with("__")) {
        return None;
    }
    if arguments.iter().any(|argument| argument == "help") {
        return Some("help");
    }
    let stands_there = |name: &&&str| {
        let words: Vec<&str> = name.split(' ').collect();
        arguments.windows(words.len()).any(|window| window == words)
    };
    names.iter().filter(stands_there).max_by_key(|name| name.len()).copied()
}

/// Whether a path belongs to a route, in which `:id` matches any one segment.
fn is_of_route(path: &str, route: &str) -> bool {
    let (path, route): (Vec<&str>, Vec<&str>) = (path.split('/').collect(), route.split('/').collect());
    // /workspaces/remote is a route of its own and no workspace.
    path.len() == route.len()
        && path.iter().zip(&route).all(|(part, of)| of.starts_with(':') && *part != "remote" || part == of)
}
