//! The commands about the registry, and which workspace a selector means.

use std::borrow::Cow;
use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::iter::once;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::client::{Client, decode, to_json};
use super::import::{Imported, import as import_file, is_about_entry};
use super::output::{Output, Waiting, clean, note, table};
use super::{pick, titles_of};
use crate::error::{Code, Error, ErrorBody, Result};
use crate::framing::percent_encode;
use crate::log::timestamp;
use crate::paths;
use crate::state::State;
use crate::wire::{
    AddLocal, AddRemote, InstanceList, Listed, Move, PathReply, Rename, RunningSession, WorkspaceList, WorkspaceReply,
};
use crate::workspace::{Kind, Workspace, existing_directory, location, looks_like_path};

/// The environment variable that names the default workspace.
pub const WORKSPACE_VARIABLE: &str = "OPENWORK_WORKSPACE";

/// A workspace for people: its name and where it is.
pub fn named(workspace: &Workspace) -> String {
    format!("{} ({})", clean(&workspace.name), clean(&workspace.location()))
}

/// Shows the active workspace.
pub fn current(client: &Client, out: &mut Output, quiet: bool) -> Result<()> {
    let reply = read_one(client, "@active")?;
    out.print(&reply, |reply| {
        let Workspace { id, name, .. } = &*reply.workspace.workspace;
        format!("{}\n", clean(if quiet { id } else { name }))
    })
}

/// Makes a workspace the active one; without a selector, the one that is chosen on the terminal.
pub fn switch(client: &Client, out: &mut Output, selector: Option<&OsStr>) -> Result<()> {
    let id = match selector {
        Some(selector) => resolve(client, Some(selector))?.workspace.workspace.id.clone(),
        None => pick::workspace(client, out)?,
    };
    let reply: WorkspaceReply = client.ask("POST", &by_id(&id, "/activate"), &())?;
    out.print(&reply, |reply| format!("switched to {}\n", named(&reply.workspace.workspace)))?;
    note_overriding_variable(&reply.workspace.workspace);
    Ok(())
}

/// Warns that the environment still names another workspace than the one that is now active.
fn note_overriding_variable(active: &Workspace) {
    let Some(value) = from_environment().filter(|value| *value != *active.id && *value != *active.name) else { return };
    let value = value.to_string_lossy();
    note(&format!(
        "note: {WORKSPACE_VARIABLE}={} overrides the active workspace in this shell; `unset {WORKSPACE_VARIABLE}` ends \
         that\n",
        clean(&value)
    ));
}

/// The reply to the removal of several workspaces.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Removed {
    ok: bool,
    active_id: String,
    workspaces: Vec<Listed>,
}

/// Removes workspaces from the registry: all of them, or none when a selector is wrong.
pub fn remove(client: &Client, out: &mut Output, selectors: &[OsString]) -> Result<()> {
    let mut found: Vec<WorkspaceReply> = Vec::new();
    for selector in selectors {
        let reply = resolve(client, Some(selector))?;
        if !found.iter().any(|other| other.workspace.workspace.id == reply.workspace.workspace.id) {
            found.push(reply);
        }
    }
    let running = running_in(client, &found);
    let removed = found.into_iter().map(|found| remove_one(client, found)).collect::<Result<Vec<_>>>()?;
    for (workspace, sessions) in running {
        note(&format!(
            "{} is still running in {}, and goes on: `openwork session list --all` shows it, `openwork session abort \
             <id>` ends it\n",
            clean(&titles_of(&sessions)),
            named(&workspace)
        ));
    }
    match &removed[..] {
        [one] => out.print(one, removed_line),
        several => print_removed(out, several, String::new()),
    }
}

/// The running sessions of these workspaces; none when the daemon does not answer.
fn running_in(client: &Client, found: &[WorkspaceReply]) -> Vec<(Arc<Workspace>, Vec<RunningSession>)> {
    let Ok(list) = client.ask::<InstanceList>("GET", "/instances", &()) else { return Vec::new() };
    let is_found = |id: &str| found.iter().any(|found| found.workspace.workspace.id == id);
    let busy = list.instances.into_iter().filter(|entry| !entry.sessions.is_empty() && is_found(&entry.workspace.id));
    busy.map(|entry| (entry.workspace, entry.sessions)).collect()
}

/// Removes every local workspace whose directory has gone. A directory on a hung mount counts as present.
pub fn remove_missing(client: &Client, out: &mut Output) -> Result<()> {
    let list: WorkspaceList = client.ask("GET", "/workspaces", &())?;
    let found = list.workspaces.into_iter().filter(|listed| listed.missing).map(|workspace| WorkspaceReply {
        ok: true,
        active_id: list.active_id.clone(),
        workspace,
        created: None,
    });
    let removed = found.map(|found| remove_one(client, found)).collect::<Result<Vec<_>>>()?;
    if removed.is_empty() && !out.is_json() {
        note("no directory is missing\n");
    }
    print_removed(out, &removed, list.active_id)
}

/// `active_id`: of an empty list.
fn print_removed(out: &mut Output, removed: &[WorkspaceReply], active_id: String) -> Result<()> {
    let active_id = removed.last().map_or(active_id, |reply| reply.active_id.clone());
    let workspaces = removed.iter().map(|reply| reply.workspace.clone()).collect();
    out.print(&Removed { ok: true, active_id, workspaces }, |_| removed.iter().map(removed_line).collect())
}

fn removed_line(reply: &WorkspaceReply) -> String {
    let workspace = &reply.workspace.workspace;
    let files = if workspace.is_local() && !reply.workspace.missing { "; its files stay" } else { "" };
    format!("removed {}{files}\n", named(workspace))
}

fn remove_one(client: &Client, mut found: WorkspaceReply) -> Result<WorkspaceReply> {
    let target = by_id(&found.workspace.workspace.id, "");
    let asked = Cell::new(0);
    let reply = client.with_daemon(|address| {
        asked.set(asked.get() + 1);
        client.ask_at::<WorkspaceReply>(address, "DELETE", &target, &())
    });
    match reply {
        // The first daemon removed it and ended before it replied.
        Err(e) if e.code() == Code::WorkspaceNotFound && asked.get() > 1 => {
            if found.active_id == found.workspace.workspace.id {
                found.active_id.clear();
            }
            Ok(found)
        }
        other => other,
    }
}

/// Renames a workspace.
pub fn rename(client: &Client, out: &mut Output, selector: &OsStr, name: &str) -> Result<()> {
    let id = resolve(client, Some(selector))?.workspace.workspace.id.clone();
    let reply: WorkspaceReply = client.ask("PATCH", &by_id(&id, ""), &Rename { name: name.to_owned() })?;
    out.print(&reply, |reply| format!("renamed to {}\n", named(&reply.workspace.workspace)))
}

/// Asks OpenCode for the directory of a workspace.
pub fn path(client: &Client, out: &mut Output, selector: Option<&OsStr>) -> Result<()> {
    let target = target(client, selector, "/path")?;
    client.ensure()?;
    let waiting = Waiting::new("opencode");
    let reply: PathReply = client.ask("GET", &target, &())?;
    drop(waiting);
    out.print(&reply, |reply| format!("{}\n", clean(reply.path["directory"].as_str().unwrap_or_default())))
}

fn print_added(out: &mut Output, reply: &WorkspaceReply) -> Result<()> {
    out.print(reply, |reply| {
        let done = if reply.created == Some(true) { "added" } else { "already there:" };
        let active = if reply.active_id == reply.workspace.workspace.id { ", active" } else { "" };
        format!("{done} {} as {}{active}\n", named(&reply.workspace.workspace), reply.workspace.workspace.id)
    })
}

/// Adds directories. With several, a failure does not keep the others from being added.
///
/// # Errors
/// The first failure, which has been printed if there are several directories.
pub fn add(client: &Client, out: &mut Output, paths: &[PathBuf], name: Option<String>, force: bool) -> Result<()> {
    if let [path] = paths {
        return print_added(out, &add_directory(client, path, name, force)?);
    }
    let mut all = Added { ok: true, active_id: String::new(), workspaces: Vec::new(), error: None };
    let mut first = None;
    for path in paths {
        let result = add_directory(client, path, None, force);
        let mut one =
            AddResult { path: path.to_string_lossy().into_owned(), workspace: None, created: None, error: None };
        match result {
            Ok(reply) => {
                if !out.is_json() {
                    print_added(out, &reply)?;
                }
                all.active_id = reply.active_id;
                (one.workspace, one.created) = (Some(reply.workspace), reply.created);
            }
            // Without a daemon, the other directories would fail the same way.
            Err(e) if !is_about_entry(&e) => return Err(e),
            Err(e) => {
                if !out.is_json() {
                    out.fail(&e);
                }
                first.get_or_insert(e.code());
                one.error = Some(e.body());
                all.ok = false;
                all.error = all.error.or_else(|| one.error.clone());
            }
        }
        all.workspaces.push(one);
    }
    if out.is_json() {
        out.print(&all, |_| String::new())?;
    }
    first.map_or(Ok(()), |code| Err(Error::Printed(code)))
}

/// The result of `workspace add` with several directories.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Added {
    ok: bool,
    active_id: String,
    workspaces: Vec<AddResult>,
    /// The first failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorBody>,
}

/// The result for one directory: either `workspace` and `created`, or `error`.
#[derive(Default, Serialize)]
struct AddResult {
    /// The argument.
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    workspace: Option<Listed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorBody>,
}

/// Adds a directory. `/` and the home directory need `force`, since the agent could change everything in them.
fn add_directory(client: &Client, path: &Path, name: Option<String>, force: bool) -> Result<WorkspaceReply> {
    let path = directory(path)?;
    let resolved = std::fs::canonicalize(&path).unwrap_or_else(|_| (&path).into());
    let home = paths::home().ok().and_then(|home| std::fs::canonicalize(home).ok());
    let is_home = home.is_some_and(|home| home == resolved);
    if !force && (is_home || resolved == Path::new("/")) {
        let what = if is_home { "your home directory" } else { "the root of all directories" };
        return Err(Error::Usage {
            message: format!("{} is {what}: the agent would work in all of it", clean(&path)),
            hint: Some("add a directory in it, or say --force with `openwork workspace add`".to_owned()),
        });
    }
    client.ask("POST", "/workspaces", &AddLocal { path, name })
}

/// The id of the workspace that contains a directory, which is added if there is none.
pub fn at(client: &Client, directory: &Path) -> Result<String> {
    let directory = existing_directory(&paths::absolute(directory)?)?;
    let Some(text) = directory.to_str() else { return Err(Error::PathNotUtf8(directory)) };
    let target = format!("/workspaces/{}", percent_encode(text.as_bytes()));
    let reply = match client.ask::<WorkspaceReply>("GET", &target, &()) {
        Err(e) if e.code() == Code::WorkspaceNotFound => {
            let reply = add_directory(client, &directory, None, false)?;
            note(&format!("added {}\n", named(&reply.workspace.workspace)));
            reply
        }
        other => other?,
    };
    Ok(reply.workspace.workspace.id.clone())
}

/// Prints the name of the default workspace in the working directory, from the state file alone. Prints nothing
/// when there is none, or the file cannot be read.
pub fn prompt(client: Option<&Client>, out: &mut Output) -> Result<()> {
    #[derive(Serialize)]
    struct Prompt {
        ok: bool,
        workspace: Option<Arc<Workspace>>,
    }
    let state = client.and_then(|client| State::read(&client.data_dir.state()).ok()).unwrap_or_default();
    let here = || paths::absolute(Path::new(".")).ok()?.into_os_string().into_string().ok();
    let found = match from_environment().and_then(|value| value.into_string().ok()) {
        Some(selector) => state.find(&selector).ok(),
        None => here().and_then(|directory| state.find(&directory).ok()).or_else(|| state.active()),
    };
    out.print(&Prompt { ok: true, workspace: found.cloned() }, |prompt| {
        prompt.workspace.as_ref().map_or_else(String::new, |workspace| format!("{}\n", clean(&workspace.name)))
    })
}

/// A directory in the form for the daemon: absolute.
fn directory(path: &Path) -> Result<String> {
    if path.as_os_str().is_empty() {
        return Err(Error::PathNotFound(path.to_owned()));
    }
    paths::absolute(path)?.into_os_string().into_string().map_err(|path| Error::PathNotUtf8(path.into()))
}

/// Follows the directory of a workspace to another path.
pub fn relocate(client: &Client, out: &mut Output, selector: &OsStr, path: &Path) -> Result<()> {
    let path = directory(path)?;
    let target = by_id(&resolve(client, Some(selector))?.workspace.workspace.id, "/move");
    let asked = Cell::new(0);
    let reply = client.with_daemon(|address| {
        asked.set(asked.get() + 1);
        client.ask_at::<WorkspaceReply>(address, "POST", &target, &Move { path: path.clone() })
    });
    let reply = match reply {
        // The first daemon moved it and ended before it replied.
        Err(e) if e.code() == Code::WorkspaceNotFound && asked.get() > 1 => {
            client.ask("GET", &by_id(&path, ""), &())?
        }
        other => other?,
    };
    out.print(&reply, |reply| {
        let workspace = &reply.workspace.workspace;
        format!("moved to {} as {}\n", named(workspace), workspace.id)
    })
}

/// The fields of a workspace that a list shows, borrowed: there may be ten thousand workspaces.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Row<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    path: Cow<'a, str>,
    workspace_type: Kind,
    base_url: Option<String>,
    directory: Option<String>,
    #[serde(default)]
    missing: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rows<'a> {
    active_id: String,
    #[serde(borrow)]
    workspaces: Vec<Row<'a>>,
}

/// Adds a remote workspace.
pub fn add_remote(client: &Client, out: &mut Output, body: &AddRemote) -> Result<()> {
    print_added(out, &client.ask("POST", "/workspaces/remote", body)?)
}

/// The list of workspaces as JSON, from the daemon, or from the state file when no daemon answers at once.
pub fn read_list(client: &Client) -> Result<Vec<u8>> {
    match client.read_soon("/workspaces")? {
        Some(list) => Ok(list),
        None => {
            let state = State::read(&client.data_dir.state())?;
            let workspaces = Listed::all(&state.workspaces);
            to_json(&WorkspaceList { ok: true, active_id: state.active_id, workspaces })
        }
    }
}

/// Lists the workspaces.
pub fn list(client: &Client, out: &mut Output, quiet: bool, names: bool) -> Result<()> {
    let list = read_list(client)?;
    if out.is_json() {
        out.write(&list)?;
        return out.write(b"\n");
    }
    let Rows { active_id, workspaces } = decode(&list)?;
    if quiet || names {
        let field = |row: &Row<'_>| format!("{}\n", clean(if names { &row.name } else { &row.id }));
        return out.write(workspaces.iter().map(field).collect::<String>().as_bytes());
    }
    if workspaces.is_empty() {
        note("no workspaces yet: add one with `openwork workspace add <path>`\n");
        return Ok(());
    }
    let rows = workspaces.iter().map(|row| {
        let mark = if row.id == active_id { "*" } else { "" };
        let mut place = location(&row.workspace_type, &row.path, row.base_url.as_deref(), row.directory.as_deref());
        if row.missing {
            place += " (missing)";
        }
        [mark.into(), Cow::from(&*row.name), Cow::from(&*row.id), place]
    });
    out.write(table(once(["", "NAME", "ID", "WHERE"].map(Cow::from)).chain(rows)).as_bytes())
}

/// Shows a workspace.
pub fn info(client: &Client, out: &mut Output, selector: Option<&OsStr>) -> Result<()> {
    let reply = read_one(client, &text_selector(client, selector)?)?;
    out.print(&reply, |reply| {
        let workspace = &reply.workspace.workspace;
        let date = |ms: Option<u64>| ms.filter(|ms| *ms > 0).map_or_else(|| "unknown".to_owned(), timestamp);
        let row = |name: &'static str, value: String| [Cow::from(name), value.into()];
        let is_active = reply.active_id == workspace.id;
        let missing = if reply.workspace.missing { " (missing)" } else { "" };
        table([
            row("id", workspace.id.clone()),
            row("name", workspace.name.clone()),
            row("type", workspace.workspace_type.name().to_owned()),
            row("where", workspace.location() + missing),
            row("active", if is_active { "yes".to_owned() } else { "no".to_owned() }),
            row("created", date(workspace.created_at)),
            row("last used", date(workspace.last_used_at)),
        ])
    })
}

/// Adds the workspaces of another program's registry.
pub fn import(client: &Client, out: &mut Output, file: &Path) -> Result<()> {
    let import = import_file(client, file)?;
    out.print(&import, |import| {
        let line = |one: &Imported| {
            let what = match (&one.workspace, &one.error) {
                (Some(workspace), _) => named(workspace),
                (None, Some(error)) => clean(&error.message).into_owned(),
                (None, None) => String::new(),
            };
            format!("{} {what}\n", one.outcome.name())
        };
        import.workspaces.iter().map(line).collect()
    })
}

/// Reads one workspace from the daemon, or from the state file when no daemon answers at once.
pub fn read_one(client: &Client, selector: &str) -> Result<WorkspaceReply> {
    match client.read_soon(&format!("/workspaces/{}", percent_encode(selector.as_bytes())))? {
        Some(reply) => decode(&reply),
        None => {
            let state = State::read(&client.data_dir.state())?;
            let workspace = Listed::new(state.find(selector)?);
            Ok(WorkspaceReply { ok: true, active_id: state.active_id.clone(), workspace, created: None })
        }
    }
}

/// The selector in `OPENWORK_WORKSPACE`, if any.
pub fn from_environment() -> Option<OsString> {
    std::env::var_os(WORKSPACE_VARIABLE).filter(|value| !value.is_empty())
}

/// A selector in the form for the daemon: a path becomes absolute, `-` becomes an id, and none becomes
/// `OPENWORK_WORKSPACE`, else the active workspace.
pub fn text_selector(client: &Client, selector: Option<&OsStr>) -> Result<String> {
    let Some(selector) = selector.map(OsStr::to_owned).or_else(from_environment) else {
        return Ok("@active".to_owned());
    };
    let not_found = |selector: &OsStr| Error::no_workspace(selector.to_string_lossy());
    if selector == "-" {
        let state = State::read(&client.data_dir.state())?;
        return Ok(state.find("-")?.id.clone());
    }
    let is_path = looks_like_path(&String::from_utf8_lossy(selector.as_bytes())) && !is_stored_name(client, &selector);
    let selector = if is_path { paths::absolute(Path::new(&selector))?.into_os_string() } else { selector };
    match selector.to_str() {
        // An empty selector is likely an unset variable in a script.
        None | Some("") => Err(not_found(&selector)),
        Some(text) => Ok(text.to_owned()),
    }
}

/// The same for commands that default to the working directory: without a selector and without
/// `OPENWORK_WORKSPACE`, the workspace that contains the working directory comes before the active one.
pub fn selector_here(client: &Client, selector: Option<&OsStr>) -> Result<OsString> {
    let is_given = selector.is_some() || from_environment().is_some();
    let here = || {
        let directory = paths::absolute(Path::new(".")).ok()?.into_os_string().into_string().ok()?;
        State::read(&client.data_dir.state()).ok()?.find(&directory).ok().map(|workspace| workspace.id.clone())
    };
    match here().filter(|_| !is_given) {
        Some(id) => Ok(id.into()),
        None => text_selector(client, selector).map(OsString::from),
    }
}

/// Whether the selector is a stored name that looks like a path; state files of other programs can have some.
fn is_stored_name(client: &Client, selector: &OsStr) -> bool {
    if selector.as_bytes().starts_with(b"/") || matches!(selector.as_bytes(), b"." | b"..") {
        return false;
    }
    let state = State::read(&client.data_dir.state());
    state.is_ok_and(|state| state.workspaces.iter().any(|workspace| selector == OsStr::new(&workspace.name)))
}

/// A selector as a segment of a request's path.
pub fn encoded(client: &Client, selector: Option<&OsStr>) -> Result<String> {
    Ok(percent_encode(text_selector(client, selector)?.as_bytes()))
}

/// The workspace that a selector means. Changes are requested by its id: a request is repeated when the
/// daemon ends before it replies, and by then the selector could mean another workspace.
pub fn resolve(client: &Client, selector: Option<&OsStr>) -> Result<WorkspaceReply> {
    client.ask("GET", &target(client, selector, "")?, &())
}

/// The target of a change of one workspace.
pub fn by_id(id: &str, tail: &str) -> String {
    format!("/workspaces/{}{tail}", percent_encode(id.as_bytes()))
}

/// The target of a request about one workspace.
pub fn target(client: &Client, selector: Option<&OsStr>, tail: &str) -> Result<String> {
    Ok(format!("/workspaces/{}{tail}", encoded(client, selector)?))
}
