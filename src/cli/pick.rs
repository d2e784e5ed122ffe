//! Lets the user choose a workspace on a terminal: prints a numbered list and reads a line. The terminal
//! stays out of raw mode, so an interrupted command leaves nothing to restore.

use std::borrow::Cow;
use std::io::{self, BufRead, IsTerminal};

use super::client::{Client, decode};
use super::output::{Output, clean, table};
use super::workspace::read_list;
use crate::error::{Error, Result};
use crate::wire::{Listed, WorkspaceList};

/// How many workspaces are listed, to fit on a screen; the others are found by typing.
const LISTED_LIMIT: usize = 30;

/// Asks for a workspace and returns its id.
///
/// # Errors
/// `usage` without a terminal, or when the result is wanted as JSON; `bad_request` when nothing was chosen.
pub fn workspace(client: &Client, out: &mut Output) -> Result<String> {
    if out.is_json() || !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err(Error::Usage {
            message: "`workspace switch` needs a workspace: only a terminal is asked".to_owned(),
            hint: Some("openwork workspace switch <ws>".to_owned()),
        });
    }
    let list: WorkspaceList = decode(&read_list(client)?)?;
    let all: Vec<&Listed> = list.workspaces.iter().collect();
    if all.is_empty() {
        return Err(Error::NoActiveWorkspace);
    }
    let mut candidates = all.clone();
    show(out, &candidates, &list.active_id)?;
    let mut lines = io::stdin().lock().lines();
    loop {
        out.write(b"switch to (a number, or a part of a name): ")?;
        let typed = lines.next().transpose().map_err(|e| Error::io("read from", "standard input", e))?;
        let typed = typed.unwrap_or_default();
        let typed = typed.trim();
        if typed.is_empty() {
            return Err(Error::BadRequest("no workspace was chosen".to_owned()));
        }
        match matching(&candidates, &all, typed)[..] {
            [one] => return Ok(one.workspace.id.clone()),
            [] => out.write(format!("no workspace has {:?} in its name\n", clean(typed)).as_bytes())?,
            ref several => {
                candidates = several.to_vec();
                show(out, &candidates, &list.active_id)?;
            }
        }
    }
}

/// The workspaces that match the typed text: a number of the list, a whole name, or part of a name, in any case.
/// Names that begin with the text come first.
fn matching<'w>(shown: &[&'w Listed], all: &[&'w Listed], typed: &str) -> Vec<&'w Listed> {
    let name = |listed: &&&Listed| listed.workspace.name.to_lowercase();
    let wanted = typed.to_lowercase();
    if let Some(exact) = all.iter().find(|listed| listed.workspace.name == typed) {
        return vec![exact];
    }
    let number = typed.parse::<usize>().ok().and_then(|number| number.checked_sub(1));
    if let Some(one) = number.and_then(|at| shown.get(at)) {
        return vec![one];
    }
    let begin: Vec<&Listed> = all.iter().filter(|listed| name(listed).starts_with(&wanted)).copied().collect();
    match begin.is_empty() {
        false => begin,
        true => all.iter().filter(|listed| name(listed).contains(&wanted)).copied().collect(),
    }
}

fn show(out: &mut Output, workspaces: &[&Listed], active_id: &str) -> Result<()> {
    let row = |(at, listed): (usize, &&Listed)| {
        let workspace = &listed.workspace;
        let mark = if workspace.id == active_id { "*" } else { "" };
        let missing = if listed.missing { " (missing)" } else { "" };
        let place = workspace.location() + missing;
        [(at + 1).to_string().into(), mark.into(), Cow::from(workspace.name.clone()), place.into()]
    };
    let rows: Vec<[Cow<'_, str>; 4]> = workspaces.iter().take(LISTED_LIMIT).enumerate().map(row).collect();
    out.write(table(rows).as_bytes())?;
    match workspaces.len().checked_sub(LISTED_LIMIT) {
        None | Some(0) => Ok(()),
        Some(rest) => out.write(format!("and {rest} more\n").as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::workspace::Place;

    #[test]
    fn input_is_a_number_a_name_or_part_of_one() {
        let listed = |name: &str| Listed {
            workspace: Arc::new(Place::Local(format!("/{name}")).into_workspace(name.to_owned(), 0)),
            missing: false,
        };
        let all = ["web", "website", "API-server", "my-api", "3"].map(listed);
        let all: Vec<&Listed> = all.iter().collect();
        let found = |shown: &[&Listed], typed: &str| {
            matching(shown, &all, typed).iter().map(|listed| listed.workspace.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(found(&all, "2"), ["website"]);
        assert_eq!(found(&all, "web"), ["web"]);
        assert_eq!(found(&all, "we"), ["web", "website"]);
        assert_eq!(found(&all, "api"), ["API-server"]);
        assert_eq!(found(&all, "server"), ["API-server"]);
        assert_eq!(found(&all, "nothing"), [""; 0]);
        // A name that is a number, and numbers of a list that has become shorter.
        assert_eq!(found(&all, "3"), ["3"]);
        assert_eq!(found(&all[3..], "1"), ["my-api"]);
        assert_eq!(found(&all[3..], "5"), [""; 0]);
    }
}
