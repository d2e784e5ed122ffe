//! Checks of the disk: the data directory and its files, and the directories of workspaces.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use super::Findings;
use crate::cli::output::megabytes;
use crate::cli::workspace::{WORKSPACE_VARIABLE, from_environment};
use crate::log;
use crate::paths::{self, DataDir};
use crate::state::{Auth, State};
use crate::system::disk;
use crate::system::filesystem::{Filesystem, may_change};
use crate::workspace::looks_like_path;

/// The name of the check of the data directory. If that fails, its files are not checked.
pub const DATA: &str = "data";
const STATE: &str = "state";
const LOGS: &str = "logs";
const WORKSPACES: &str = "workspaces";

/// How long the directories of all workspaces may take: those on a mount that hangs are a finding.
const WORKSPACES_LIMIT: Duration = Duration::from_secs(1);
/// Less free space than this is a warning: two logs grow to 11 MB each, and a state file is written beside
/// the old one. Bytes.
const LOW_SPACE: u64 = 64 * 1024 * 1024;
/// How many names a finding lists.
const SHOWN_NAMES: usize = 5;

/// Looks at the data directory itself.
pub fn data_directory(findings: &mut Findings, data_dir: &DataDir) {
    let path = data_dir.path();
    let shown = path.display();
    if let Err(e) = data_dir.check_owner() {
        let hint = "run openwork as the owner of the directory, or name another --data-dir";
        return findings.wrong(DATA, e.to_string(), hint);
    }
    if path.components().any(|part| part.as_os_str() == ".openwork") {
        let hint = "name another --data-dir: OpenWork's desktop app stops the daemon that it finds there";
        return findings.wrong(DATA, format!("{shown} is the place of OpenWork's desktop app"), hint);
    }
    let metadata = match fs::metadata(path) {
        Err(e) if paths::is_absent(&e) => return missing(findings, path),
        Err(e) => return findings.wrong(DATA, format!("cannot examine {shown}: {e}"), "name another --data-dir"),
        Ok(metadata) if !metadata.is_dir() => {
            return findings.wrong(DATA, format!("{shown} is not a directory"), "name another --data-dir");
        }
        Ok(metadata) => metadata,
    };
    if let Err(e) = may_change(path) {
        let hint = "openwork writes there: make the directory writable for this user, or name another --data-dir";
        return findings.wrong(DATA, format!("cannot write in {shown}: {e}"), hint);
    }
    let mode = metadata.mode() & 0o7777;
    if mode != 0o700 {
        let hint = format!("chmod 700 {shown} (the next daemon does it too)");
        findings.warning(DATA, format!("{shown} has mode {mode:o}: other users can look into it"), hint);
    }
    match Filesystem::of(path) {
        Ok(filesystem) => room(findings, path, &filesystem),
        Err(e) => findings.warning(DATA, format!("cannot examine the file system of {shown}: {e}"), "check the disk"),
    }
    strangers(findings, data_dir);
}

/// A data directory that is not there yet; whether it can be made.
fn missing(findings: &mut Findings, path: &Path) {
    let shown = path.display();
    let above = path.ancestors().skip(1).find(|above| above.exists()).unwrap_or(Path::new("/"));
    match may_change(above) {
        Ok(()) => findings.ok(DATA, format!("{shown}, which the first daemon creates")),
        Err(e) => {
            let hint = "make it writable for this user, or name another --data-dir";
            findings.wrong(DATA, format!("cannot create {shown} in {}: {e}", above.display()), hint);
        }
    }
}

/// What the file system has left, and whether it is one to rely on.
fn room(findings: &mut Findings, path: &Path, filesystem: &Filesystem) {
    let shown = path.display();
    let Filesystem { remote, available, has_inodes } = *filesystem;
    if let Some(name) = remote {
        let message = format!("{shown} lies on {name}: only one machine may use it, and locks are the server's affair");
        findings.warning(DATA, message, "name a local --data-dir where that is possible");
    }
    let hint = "nothing is written until there is room again, and the registry cannot change";
    match (available, has_inodes) {
        (0, _) => findings.wrong(DATA, format!("no space is left for {shown}"), hint),
        (_, false) => findings.wrong(DATA, format!("no inode is left for {shown}"), hint),
        (..LOW_SPACE, true) => {
            let message = format!("only {} are left for {shown}", megabytes(available));
            findings.warning(DATA, message, "make room on the disk");
        }
        (_, true) => findings.ok(DATA, format!("{shown}, {} free", megabytes(available))),
    }
}

/// Files in the data directory that are not ours to use: those of another user (after sudo, say), links,
/// and files that others can read.
fn strangers(findings: &mut Findings, data_dir: &DataDir) {
    for path in data_dir.files() {
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        let shown = path.display();
        if metadata.is_symlink() {
            let hint = "openwork follows no link in its data directory: put the file itself there";
            findings.wrong(DATA, format!("{shown} is a symbolic link"), hint);
        } else if metadata.uid() != rustix::process::geteuid().as_raw() {
            let message = format!("{shown} belongs to another user (uid {})", metadata.uid());
            findings.wrong(DATA, message, format!("chown it to this user (`sudo openwork` may have made it): {shown}"));
        } else if metadata.mode() & 0o077 != 0 {
            let message = format!("{shown} has mode {:o}: other users can read it", metadata.mode() & 0o7777);
            findings.warning(DATA, message, format!("chmod 600 {shown} (the next daemon does it too)"));
        }
    }
}

/// The files in the data directory: what the state file has, an empty registry where it cannot be read.
pub fn contents(findings: &mut Findings, data_dir: &DataDir) -> State {
    let state = match State::read_unchanged(&data_dir.state()) {
        Ok(Some(state)) => {
            findings.ok(STATE, format!("{} can be read", data_dir.state().display()));
            state
        }
        Ok(None) => State::default(),
        Err(e) => {
            findings.failed(STATE, &e);
            State::default()
        }
    };
    if let Err(e) = Auth::read_unchanged(&data_dir.auth()) {
        findings.failed(STATE, &e);
    }
    for path in [data_dir.daemon_log(), data_dir.opencode_log()] {
        let Ok(metadata) = fs::metadata(&path) else { continue };
        // A daemon cuts a log above the limit with each probe of opencode.
        if metadata.len() > 2 * log::LIMIT {
            let message = format!("{} has {}", path.display(), megabytes(metadata.len()));
            findings.warning(LOGS, message, "a running daemon cuts it within seconds; `openwork logs` shows its end");
        }
    }
    state
}

/// The directories of local workspaces, fences, and what the environment names.
pub fn workspaces(findings: &mut Findings, state: &State) {
    let local: Vec<_> = state.workspaces.iter().filter(|workspace| workspace.is_local()).cloned().collect();
    let checked = disk::all(WORKSPACES_LIMIT, local.clone(), |w| Path::new(&w.path), Path::is_dir);
    let which = |wanted: Option<bool>| {
        let found = local.iter().zip(&checked).filter(move |(_, is_there)| **is_there == wanted);
        found.map(|(workspace, _)| workspace.name.as_str()).collect::<Vec<_>>()
    };
    let (gone, hanging) = (which(Some(false)), which(None));
    let names = |names: &[&str]| {
        let rest = names.len().saturating_sub(SHOWN_NAMES);
        let shown = names[..names.len() - rest].join(", ");
        if rest == 0 { shown } else { format!("{shown} and {rest} more") }
    };
    if !gone.is_empty() {
        let message = format!("missing directories: {}", names(&gone));
        let hint = "`openwork workspace move <ws> <path>` follows one that was moved; `openwork workspace remove \
                    --missing` takes all of them out of the registry";
        findings.warning(WORKSPACES, message, hint);
    }
    if !hanging.is_empty() {
        let message = format!("the file system does not respond for {}", names(&hanging));
        findings.warning(WORKSPACES, message, "check the mount");
    }
    let fenced: Vec<&str> = state.fences.iter().map(|fence| fence.directory.as_str()).collect();
    if !fenced.is_empty() {
        let message = format!("fenced, since loading it ended opencode twice: {}", names(&fenced));
        findings.wrong(WORKSPACES, message, "mend the cause (`openwork logs`), then `openwork instance reset <ws>`");
    }
    let variable = from_environment().and_then(|value| value.into_string().ok());
    if let Some(selector) = variable {
        let absolute = || paths::absolute(Path::new(&selector)).ok()?.into_os_string().into_string().ok();
        let wanted = if looks_like_path(&selector) { absolute() } else { Some(selector.clone()) };
        if let Err(e) = state.find(&wanted.unwrap_or_else(|| selector.clone())) {
            let hint = format!("unset {WORKSPACE_VARIABLE}, or set it to one of `openwork workspace list`");
            findings.warning(WORKSPACES, format!("{WORKSPACE_VARIABLE}: {e}"), hint);
        }
    }
    if !state.active_id.is_empty() && state.active().is_none() {
        let message = format!("the active workspace {} is not in the registry", state.active_id);
        findings.warning(WORKSPACES, message, "choose one with `openwork workspace switch <ws>`");
    }
    if gone.is_empty() && hanging.is_empty() {
        let count = state.workspaces.len();
        findings.ok(
            WORKSPACES,
            match count {
                0 => "none yet: `openwork workspace add <path>`".to_owned(),
                1 => "1".to_owned(),
                _ => count.to_string(),
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn full_disk_is_reported_by_its_free_space() {
        let verdict = |available, has_inodes, remote| {
            let mut findings = Findings::default();
            room(&mut findings, Path::new("/data"), &Filesystem { remote, available, has_inodes });
            findings.0.iter().map(|finding| finding.verdict).collect::<Vec<_>>()
        };
        assert_eq!(verdict(1 << 40, true, None), [Verdict::Ok]);
        assert_eq!(verdict(LOW_SPACE - 1, true, None), [Verdict::Warning]);
        assert_eq!(verdict(0, true, None), [Verdict::Wrong]);
        assert_eq!(verdict(1 << 40, false, None), [Verdict::Wrong]);
        assert_eq!(verdict(1 << 40, true, Some("NFS")), [Verdict::Warning, Verdict::Ok]);
    }
}
