//! Salvages a broken state file.
//!
//! Every JSON object in the bytes that has the fields of a workspace is taken as a workspace, wherever it
//! is: a file that was cut short or has garbage in the middle still contains the other entries. A copy of
//! the original is kept beside the state file, and is made before anything else is written.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::paths::open_private;
use crate::state::{EngineRecord, State, keep_beside, write_whole};
use crate::workspace::{Place, Workspace, is_id};

/// The result of `state repair`.
#[derive(Debug, Serialize)]
pub struct Repair {
    /// Always true.
    pub ok: bool,
    /// False when the file was fine.
    pub repaired: bool,
    /// The path of the copy of the original.
    pub original: Option<String>,
    /// Why the original could not be read.
    pub problem: Option<String>,
    /// The workspaces in the repaired file.
    pub workspaces: Vec<Arc<Workspace>>,
    /// Entries that looked like a workspace and could not be salvaged, with the reason.
    pub refused: Vec<String>,
}

/// Repairs a state file. The caller holds `daemon.lock`.
///
/// # Errors
/// `state_too_new` for the file of a newer version, which is not broken; `state_write_failed`, and then
/// the original is unchanged.
pub fn repair(path: &Path) -> Result<Repair> {
    let problem = match State::read(path) {
        Ok(state) => {
            let workspaces = state.workspaces;
            return Ok(Repair {
                ok: true,
                repaired: false,
                original: None,
                problem: None,
                workspaces,
                refused: Vec::new(),
            });
        }
        Err(Error::StateCorrupt { why, .. }) => why,
        Err(other) => return Err(other),
    };
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink()) {
        let what = "the state file is a symbolic link, which is not followed; put the file itself here".to_owned();
        return Err(Error::PermissionDenied { what, path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    let read = open_private(path, OpenOptions::new().read(true)).and_then(|mut file| file.read_to_end(&mut bytes));
    let (state, refused) = match read {
        Ok(_) => salvage(&bytes),
        // A directory or a device contains nothing to salvage.
        Err(e) if e.kind() != io::ErrorKind::PermissionDenied => (State::default(), Vec::new()),
        Err(e) => return Err(Error::io("read", path, e)),
    };
    // A regular file also stays under its own name until the new file replaces it.
    let original = Some(keep_beside(path, "corrupt")?.to_string_lossy().into_owned());
    write_whole(path, &state)?;
    let workspaces = state.workspaces;
    Ok(Repair { ok: true, repaired: true, original, problem: Some(problem), workspaces, refused })
}

fn salvage(bytes: &[u8]) -> (State, Vec<String>) {
    let (mut state, mut refused) = (State::default(), Vec::new());
    let mut at = 0;
    while let Some(brace) = bytes[at..].iter().position(|byte| *byte == b'{') {
        at += brace;
        let mut values = serde_json::Deserializer::from_slice(&bytes[at..]).into_iter::<Map<String, Value>>();
        let length = match values.next() {
            Some(Ok(object)) if is_workspace(&object) => {
                match workspace(object, |name| state.free_name(name)) {
                    Ok(found) if state.get(&found.id).is_none() => state.workspaces.push(Arc::new(found)),
                    Ok(found) => refused.push(format!("{}: a duplicate", found.id)),
                    Err(why) => refused.push(why),
                }
                values.byte_offset()
            }
            // The record that proves that a running opencode is ours.
            Some(Ok(object)) if object.contains_key("engineId") => {
                state.opencode = serde_json::from_value::<EngineRecord>(object.into()).ok();
                values.byte_offset()
            }
            // Some other object, such as the whole file: look inside it.
            _ => 1,
        };
        at += length;
    }
    // If the file is valid JSON, its other fields are kept too.
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(mut whole)) => {
            state.binaries = whole.remove("binaries").and_then(|binaries| serde_json::from_value(binaries).ok());
            // Our own fields are searched for below, at any depth.
            let ours = serde_json::to_value(State::default()).unwrap_or_default();
            state.extra = whole.into_iter().filter(|(name, _)| ours.get(name).is_none()).collect();
        }
        Ok(_) => {}
        Err(_) => refused.push("fields other than the workspaces: only the original has them".to_owned()),
    }
    for id in ids(bytes) {
        if state.get(&id).is_none() && !refused.iter().any(|refused| refused.contains(&id)) {
            refused.push(format!("{id}: its entry cannot be read"));
        }
    }
    // The addresses that clients have stored stay valid.
    state.ports = value_after(bytes, "ports").unwrap_or_default();
    for (name, id) in [("activeId", &mut state.active_id), ("previousId", &mut state.previous_id)] {
        let found: String = value_after(bytes, name).unwrap_or_default();
        if state.workspaces.iter().any(|workspace| workspace.id == found) {
            *id = found;
        }
    }
    (state, refused)
}

fn is_workspace(object: &Map<String, Value>) -> bool {
    let has_text = |name: &str| object.get(name).is_some_and(Value::is_string);
    object.contains_key("workspaceType") || (has_text("id") && (has_text("path") || has_text("baseUrl")))
}

/// Makes a workspace of an object. Optional fields with invalid values are dropped.
fn workspace(
    mut object: Map<String, Value>,
    free_name: impl FnOnce(String) -> String,
) -> std::result::Result<Workspace, String> {
    let text = |object: &Map<String, Value>, name: &str| object.get(name).and_then(Value::as_str).map(str::to_owned);
    for time in ["createdAt", "lastUsedAt"] {
        if object.get(time).is_some_and(|value| !value.is_u64()) {
            object.remove(time);
        }
    }
    let place = match (text(&object, "baseUrl"), text(&object, "path")) {
        (Some(base_url), _) if !base_url.is_empty() => {
            Place::Remote { base_url, directory: text(&object, "directory").filter(|directory| !directory.is_empty()) }
        }
        (_, Some(path)) if !path.is_empty() => Place::Local(path),
        _ => {
            return Err(format!(
                "{}: neither path nor baseUrl",
                text(&object, "id").unwrap_or_else(|| "no id".to_owned())
            ));
        }
    };
    let (id, name) = (text(&object, "id"), text(&object, "name"));
    object.insert("id".to_owned(), id.filter(|id| !id.is_empty()).unwrap_or_else(|| place.id()).into());
    object.insert("name".to_owned(), name.unwrap_or_else(|| free_name(place.derived_name())).into());
    let described = object.get("id").cloned().unwrap_or_default();
    serde_json::from_value(object.into()).map_err(|e| format!("{described}: {e}"))
}

/// The values of all fields with this name, at any depth.
fn values_after<T: DeserializeOwned>(bytes: &[u8], name: &str) -> impl Iterator<Item = T> {
    let field = format!("\"{name}\"");
    (0..bytes.len()).filter_map(move |at| {
        let rest = bytes[at..].strip_prefix(field.as_bytes())?.trim_ascii_start().strip_prefix(b":")?;
        serde_json::Deserializer::from_slice(rest).into_iter::<T>().next()?.ok()
    })
}

/// The value of the first field with this name.
fn value_after<T: DeserializeOwned>(bytes: &[u8], name: &str) -> Option<T> {
    values_after(bytes, name).next()
}

/// The ids of workspaces anywhere in the bytes.
fn ids(bytes: &[u8]) -> impl Iterator<Item = String> {
    values_after::<String>(bytes, "id").filter(|id| is_id(id))
}

#[cfg(test)]
mod tests {
    use super::salvage;

    const WHOLE: &str = r#"{"version":1,"daemon":null,
        "opencode":{"pid":7,"port":8,"baseUrl":"b","startedAt":9,"engineId":"e","startTicks":1,"bootId":"x"},
        "activeId":"ws-2","workspaces":[
        {"id":"ws-1","name":"a","path":"/a","workspaceType":"local","createdAt":0,"lastUsedAt":0,"other":{"x":[1]}},
        {"id":"ws-2","name":"b","path":"","workspaceType":"remote","baseUrl":"https://b"}]}"#;

    #[test]
    fn truncated_file_keeps_its_complete_workspaces() {
        for cut in 0..WHOLE.len() {
            let (state, refused) = salvage(&WHOLE.as_bytes()[..cut]);
            let ends = WHOLE.match_indices("}\n").chain(WHOLE.match_indices("},\n")).count();
            assert!(ends > 0, "the text has another form now");
            assert!(refused.len() == 1 && refused[0].starts_with("fields other"), "cut at {cut}: {refused:?}");
            for (id, last) in [("ws-1", "\"other\":{\"x\":[1]}}"), ("ws-2", "\"https://b\"}")] {
                let end = WHOLE.find(last).unwrap() + last.len();
                assert_eq!(state.get(id).is_some(), cut >= end, "{id}, cut at {cut}");
            }
        }
    }

    #[test]
    fn garbage_between_workspaces_is_skipped() {
        let garbled = WHOLE.replace("\"workspaces\":[", "\0\u{7f}workspaces=<<<{{{[").replace("},\n", "}}}]] \n");
        let (state, refused) = salvage(garbled.as_bytes());
        assert_eq!(state.workspaces.len(), 2, "{refused:?}");
        assert_eq!(state.active_id, "ws-2");
        assert_eq!(state.opencode.unwrap().engine_id, "e");
        assert_eq!(state.workspaces[0].extra["other"]["x"][0], 1);
    }

    #[test]
    fn lost_workspaces_are_named() {
        let entry = r#"{"id":"ws-0123456789ab","name":"a","path":"/a"}"#;
        for broken in [
            entry.replace("\"a\",", "\"a\""),
            entry.replace("\"a\"", "\"\\ud83d\""),
            entry.replace(",\"path", ""),
            entry[..40].to_owned(),
        ] {
            let (state, refused) = salvage(format!("{{\"workspaces\":[{broken}").as_bytes());
            assert!(state.workspaces.is_empty(), "{broken}");
            assert!(refused.iter().any(|refused| refused.starts_with("ws-0123456789ab: ")), "{broken}: {refused:?}");
        }
    }

    #[test]
    fn other_fields_are_kept() {
        let (state, refused) = salvage(
            br#"{"version":1,"activeId":null,"future":{"a":1},"binaries":{"opencode":{"path":"/o","x":2}},"workspaces":[
                {"id":"ws-1","name":null,"path":"/x/b"},{"id":"ws-2","name":null,"path":"/y/b"}]}"#,
        );
        assert_eq!(refused, [""; 0]);
        assert_eq!(state.extra["future"]["a"], 1);
        assert_eq!(state.binaries.unwrap().opencode.unwrap().extra["x"], 2);
        assert_eq!((&*state.workspaces[0].name, &*state.workspaces[1].name), ("b", "b-2"));
    }

    #[test]
    fn broken_fields_cost_no_workspace() {
        let (state, refused) = salvage(
            br#"[{"id":"ws-1","name":3,"path":"/a/b","createdAt":"x"},{"path":"/c","workspaceType":"local"},
                 {"id":"ws-1","path":"/d"},{"id":"ws-3","workspaceType":"local"},{"id":"ws-4","path":"/e","workspaceType":7}]"#,
        );
        let names: Vec<&str> = state.workspaces.iter().map(|w| w.name.as_str()).collect();
        assert_eq!(names, ["b", "c"]);
        assert_eq!(refused.len(), 3, "{refused:?}");
    }
}
