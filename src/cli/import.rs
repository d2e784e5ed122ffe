//! Imports the workspaces of another program: from the state file of OpenWork's own orchestrator, which
//! has the format of ours, or from the `openwork-workspaces.json` of OpenWork's desktop program.
//!
//! Both are an object with a list `workspaces`. A desktop entry also has a `displayName`, may lack any
//! field or have null there, and may hold tokens, which are neither imported nor printed.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::client::Client;
use crate::error::{Code, Error, ErrorBody, Result};
use crate::wire::{AddLocal, AddRemote, WorkspaceList, WorkspaceReply, from_json};
use crate::workspace::{Place, Workspace};

#[derive(Deserialize)]
struct Registry {
    workspaces: Vec<Value>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Entry {
    name: Option<String>,
    display_name: Option<String>,
    path: Option<String>,
    workspace_type: Option<String>,
    base_url: Option<String>,
    directory: Option<String>,
}

/// The outcome for every entry, in the order of the file.
#[derive(Serialize)]
pub struct Import {
    ok: bool,
    /// One for each entry.
    pub workspaces: Vec<Imported>,
}

/// The outcome for one entry.
#[derive(Serialize)]
pub struct Imported {
    /// See [`Outcome`].
    pub outcome: Outcome,
    /// The path or URL in the file; empty when there is none.
    pub source: String,
    /// The entry of our registry, unless it was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Arc<Workspace>>,
    /// Why the entry was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
}

/// What was done with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The entry was added to the registry.
    Added,
    /// The registry already had the entry; nothing changed.
    Kept,
    /// The entry is not valid as a workspace here.
    Refused,
}

impl Outcome {
    /// The word to show to people.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Added => "added",
            Outcome::Kept => "kept",
            Outcome::Refused => "refused",
        }
    }
}

/// Adds the workspaces of a file. Workspaces that exist already stay unchanged; an entry that is refused
/// does not affect the others.
///
/// # Errors
/// When the file cannot be read or has no list `workspaces`; when the daemon cannot be reached or cannot
/// write its state. Workspaces that were added before the error stay.
pub fn import(client: &Client, file: &Path) -> Result<Import> {
    let bytes = fs::read(file).map_err(|e| match e.kind() {
        io::ErrorKind::PermissionDenied => Error::io("read", file, e),
        _ => Error::BadRequest(format!("cannot read {}: {e}", file.display())),
    })?;
    let registry: Registry = from_json(&bytes)
        .map_err(|e| Error::BadRequest(format!("{} has no list of workspaces: {e}", file.display())))?;
    let list: WorkspaceList = client.ask("GET", "/workspaces", &())?;
    let there: Vec<_> = list.workspaces.into_iter().map(|listed| listed.workspace).collect();
    let import_one = |entry: Value| {
        let entry = serde_json::from_value(entry)
            .map_err(|e| (String::new(), Error::BadRequest(format!("not a workspace: {e}"))));
        let (source, added) = match entry {
            Ok(entry) => (source(&entry), add(client, &there, entry)),
            Err((source, e)) => (source, Err(e)),
        };
        match added {
            Ok((outcome, workspace)) => Ok(Imported { outcome, source, workspace: Some(workspace), error: None }),
            Err(e) if is_about_entry(&e) => {
                Ok(Imported { outcome: Outcome::Refused, source, workspace: None, error: Some(e.body()) })
            }
            Err(e) => Err(e),
        }
    };
    let workspaces = registry.workspaces.into_iter().map(import_one).collect::<Result<_>>()?;
    Ok(Import { ok: true, workspaces })
}

fn is_remote(entry: &Entry) -> bool {
    entry.workspace_type.as_deref() == Some("remote")
}

fn source(entry: &Entry) -> String {
    if is_remote(entry) { entry.base_url.clone() } else { entry.path.clone() }.unwrap_or_default()
}

fn add(client: &Client, there: &[Arc<Workspace>], entry: Entry) -> Result<(Outcome, Arc<Workspace>)> {
    let source = source(&entry);
    let place = match is_remote(&entry) {
        true => Place::remote(&source, entry.directory.as_deref())?,
        false => Place::local(Path::new(&source))?,
    };
    if let Some(workspace) = place.entry(there) {
        return Ok((Outcome::Kept, workspace.clone()));
    }
    let ask = |name: Option<String>| -> Result<WorkspaceReply> {
        match is_remote(&entry) {
            true => {
                let body = AddRemote { base_url: source.clone(), directory: entry.directory.clone(), name };
                client.ask("POST", "/workspaces/remote", &body)
            }
            false => client.ask("POST", "/workspaces", &AddLocal { path: source.clone(), name }),
        }
    };
    let name = [&entry.display_name, &entry.name].into_iter().flatten().find(|name| !name.trim().is_empty());
    let reply = match ask(name.cloned()) {
        // The name is taken, or not allowed here: the daemon derives one from the path or host.
        Err(e) if matches!(e.code(), Code::NameTaken | Code::InvalidName) => ask(None),
        other => other,
    }?;
    let outcome = if reply.created == Some(true) { Outcome::Added } else { Outcome::Kept };
    Ok((outcome, reply.workspace.workspace))
}

/// Whether a failure concerns only the entry, and not the daemon.
pub fn is_about_entry(e: &Error) -> bool {
    use Code::*;
    matches!(
        e.code(),
        Usage
            | BadRequest
            | InvalidUrl
            | InvalidName
            | PathNotUtf8
            | PathNotDirectory
            | PathNotFound
            | PermissionDenied
    )
}
