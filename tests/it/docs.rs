//! The README and `docs/`: their lists match the program's tables, and their links resolve.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::exercised::tables;

/// The README has to stay short enough to read in one go.
const README_LINES: usize = 200;
/// Set by `just assets`: the test then writes the page instead of comparing it.
const WRITE: &str = "OPENWORK_TEST_WRITE_DOCS";

fn sources() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The README and every page of `docs/`.
pub fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> =
        fs::read_dir(sources().join("docs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    pages.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    pages.push(sources().join("README.md"));
    pages.sort();
    pages
}

fn rows(table: &str) -> impl Iterator<Item = &'static Value> {
    tables()[table].as_array().unwrap().iter()
}

fn field<'a>(row: &'a Value, name: &str) -> &'a str {
    row[name].as_str().unwrap_or_else(|| panic!("no {name} in {row}"))
}

#[test]
fn readme_is_short() {
    let lines = read(&sources().join("README.md")).lines().count();
    assert!(lines <= README_LINES, "{lines} lines");
}

// --- Links ---

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// A page without its fenced blocks.
fn prose(page: &str) -> String {
    page.split("```").step_by(2).collect()
}

/// Asserts that the relative links of a page lead to files, and to headings in them. Returns how many it has.
pub fn assert_links_resolve(page: &Path) -> usize {
    let text = prose(&read(page));
    let targets = text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap());
    let relative: Vec<&str> = targets.filter(|target| !target.starts_with("https://")).collect();
    for link in &relative {
        let (file, heading) = link.split_once('#').unwrap_or((link, ""));
        let target = if file.is_empty() { page.to_owned() } else { page.parent().unwrap().join(file) };
        assert!(target.exists(), "{}: {link}", page.display());
        let has = |text: &str| {
            text.lines().any(|line| line.starts_with('#') && anchor(line.trim_start_matches('#').trim()) == heading)
        };
        assert!(heading.is_empty() || has(&prose(&read(&target))), "{}: {link}", page.display());
    }
    relative.len()
}

#[test]
fn every_link_resolves() {
    let count: usize = pages().iter().map(|page| assert_links_resolve(page)).sum();
    assert!(count > 20, "only {count} links found");
}

// --- Generated tables ---

/// Text for a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;")
}

/// Code for a cell of a table.
fn code(text: &str) -> String {
    format!("`{}`", text.trim_end().replace('|', "\\|"))
}

fn command_table() -> String {
    let mut table = "| command | | daemon | for example |\n|---|---|---|---|\n".to_owned();
    for row in rows("commands") {
        let starts = if row["autostart"] == true { "auto" } else { "" };
        let name = code(&format!("{} {}", field(row, "name"), field(row, "args")));
        let examples: Vec<String> =
            row["examples"].as_array().unwrap().iter().map(|example| code(example.as_str().unwrap())).collect();
        let (summary, examples) = (cell(field(row, "summary")), examples.join("<br>"));
        let _ = writeln!(table, "| {name} | {summary} | {starts} | {examples} |");
    }
    table
}

fn option_table() -> String {
    let mut table = "| option | environment | of | |\n|---|---|---|---|\n".to_owned();
    // Repeat a long list of commands only as "the same".
    let mut last: &[Value] = &[];
    for row in rows("options") {
        let short = row["short"].as_str().map(|short| format!("{short}, ")).unwrap_or_default();
        let value = row["value"].as_str().map(|value| format!(" {value}")).unwrap_or_default();
        let environment = row["env"].as_str().map(code).unwrap_or_default();
        let commands = row["commands"].as_array().unwrap();
        let of = match commands.as_slice() {
            [] => "every command".to_owned(),
            commands if commands.len() > 3 && commands == last => "the same".to_owned(),
            commands => commands.iter().map(|name| code(name.as_str().unwrap())).collect::<Vec<_>>().join(", "),
        };
        last = commands;
        let name = code(&format!("{short}{}{value}", field(row, "name")));
        let _ = writeln!(table, "| {name} | {environment} | {of} | {} |", cell(field(row, "help")));
    }
    table
}

#[test]
fn commands_page_matches_the_tables() {
    const BEGIN: &str = "<!-- Made from the program's tables by `just assets`: edit those. -->\n";
    const END: &str = "<!-- end -->\n";
    let path = sources().join("docs/commands.md");
    let page = read(&path);
    let mut made = String::new();
    let mut rest = page.as_str();
    for table in [command_table(), option_table()] {
        let (before, after) = rest.split_once(BEGIN).expect("the mark before a table");
        let (_, after) = after.split_once(END).expect("the mark after a table");
        let _ = write!(made, "{before}{BEGIN}\n{table}\n{END}");
        rest = after;
    }
    made.push_str(rest);
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, &made).unwrap();
    }
    assert!(
        page == made || std::env::var_os(WRITE).is_some(),
        "docs/commands.md is not what the tables say: run `just assets`"
    );
}

/// The rows of the tables on a page, as cells.
fn table_rows(page: &str) -> Vec<Vec<String>> {
    let rows = page.lines().filter(|line| line.starts_with("| "));
    rows.map(|row| {
        row.trim_matches('|').replace("\\|", "\u{0}").split('|').map(|cell| cell.trim().replace('\u{0}', "|")).collect()
    })
    .collect()
}

#[test]
fn http_api_page_lists_every_route_and_error() {
    let page = read(&sources().join("docs/http-api.md"));
    let rows_of_page = table_rows(&page);
    for row in rows("routes") {
        let route = format!("`{} {}`", field(row, "method"), field(row, "path"));
        assert!(rows_of_page.iter().any(|cells| cells[0].contains(&route)), "no row for {route}");
    }
    for row in rows("errors") {
        let http: Vec<String> = row["http"].as_array().unwrap().iter().map(Value::to_string).collect();
        let (name, exit, http) = (code(field(row, "code")), row["exit"].to_string(), http.join(", "));
        let found = rows_of_page.iter().find(|cells| cells[0] == name).unwrap_or_else(|| panic!("no row for {name}"));
        assert_eq!((&found[2], &found[3]), (&exit, &http), "{name}");
    }
    let errors = rows_of_page.iter().filter(|cells| cells.len() == 4 && cells[0].starts_with('`'));
    let known: BTreeSet<String> = rows("errors").map(|row| code(field(row, "code"))).collect();
    for cells in errors {
        assert!(known.contains(&cells[0]), "no such error: {}", cells[0]);
    }
}

// --- Promises ---

/// The names of the tests in a file, or in all files below a directory.
fn tests_in(path: &Path) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let files: Vec<PathBuf> = match path.is_dir() {
        true => fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect(),
        false => vec![path.to_owned()],
    };
    for file in files {
        if file.is_dir() {
            names.extend(tests_in(&file));
            continue;
        }
        let text = read(&file);
        for test in text.split("#[test]").skip(1) {
            let name = test.split("fn ").nth(1).and_then(|rest| rest.split('(').next()).unwrap_or_default();
            names.insert(name.to_owned());
        }
    }
    names
}

#[test]
fn every_promise_names_existing_tests() {
    let page = read(&sources().join("docs/reliability.md"));
    let (_, promises) = page.split_once("| promise | tests |").expect("the table of promises");
    let mut count = 0;
    for row in table_rows(promises) {
        let tests: Vec<&str> = row[1].split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty(), "no test for: {}", row[0]);
        for test in tests {
            let parts: Vec<&str> = test.split("::").collect();
            let (module, name) = (parts[0], parts[parts.len() - 1]);
            let place = match module {
                _ if parts.len() == 1 => sources().join("src"),
                "real" => sources().join("tests"),
                "simulation" => sources().join("src/daemon/supervisor/simulation"),
                "v2" => sources().join("tests/it2/v2.rs"),
                module => sources().join("tests/it").join(format!("{module}.rs")),
            };
            assert!(tests_in(&place).contains(name), "no test {test}, which holds: {}", row[0]);
            count += 1;
        }
    }
    assert!(count > 50, "only {count} tests named");
}
