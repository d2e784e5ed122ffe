//! The records of the state file about processes, binaries and ports. Fields of other versions
//! survive in `extra`.

use std::fs::{self, Metadata};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::line::Line;
use crate::system::process::{self, Identity};

/// The daemon that runs, or ran.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DaemonRecord {
    /// Process id.
    pub pid: u32,
    /// The port of its listening socket.
    pub port: u16,
    /// `http://127.0.0.1:<port>`.
    pub base_url: String,
    /// Unix milliseconds.
    pub started_at: u64,
    /// Whether the user's own service is its opencode (`--shared`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The running opencode, with the proof that it is ours. Written before the process can do anything.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EngineRecord {
    /// Process id; it leads its process group.
    pub pid: u32,
    /// The port of its listening socket.
    pub port: u16,
    /// `http://<address>:<port>`, an address of 127.0.0.0/8.
    pub base_url: String,
    /// Unix milliseconds.
    pub started_at: u64,
    /// A random marker, in its environment as `OPENWORK_ENGINE`.
    #[serde(default)]
    pub engine_id: String,
    /// Start time of the process in clock ticks since boot, `/proc/<pid>/stat` field 22.
    #[serde(default)]
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id` when it was started.
    #[serde(default)]
    pub boot_id: String,
    /// Its version, which determines the protocol. Absent in files of openwork 0.1, which ran 1.x.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Directories whose instances are known to be loaded; written with a delay.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub instances: Vec<String>,
    /// Those of `instances` that never belonged to a workspace; absent in files of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strangers: Option<Vec<String>>,
    /// The registration file, if it is the user's own service: it then has no engine id and no other proof that
    /// it is ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl EngineRecord {
    /// The processes whose memory is opencode's: the process with all that it has started.
    pub fn processes(&self) -> Vec<u32> {
        match self.service {
            Some(_) => process::descendants(self.pid),
            None => process::marked(&self.engine_id),
        }
    }

    /// The identity that proves a process to be this one.
    pub fn identity(&self) -> Identity {
        Identity {
            pid: self.pid,
            start_ticks: self.start_ticks,
            boot_id: self.boot_id.clone(),
            engine_id: self.engine_id.clone(),
        }
    }

    /// The line, and so the protocol, of this opencode.
    pub fn line(&self) -> Line {
        self.version.as_deref().and_then(Line::of).unwrap_or(Line::V1)
    }

    /// The address that opencode listens on. A base URL without an address of 127.0.0.0/8 (other programs
    /// write `localhost`) means 127.0.0.1.
    pub fn address(&self) -> SocketAddrV4 {
        let given = self.base_url.strip_prefix("http://").and_then(|rest| rest.parse::<SocketAddrV4>().ok());
        let ip = given.map(|address| *address.ip()).filter(Ipv4Addr::is_loopback);
        SocketAddrV4::new(ip.unwrap_or(Ipv4Addr::LOCALHOST), self.port)
    }
}

/// A binary and its remembered version: asking for it takes half a second. The other fields tell the file
/// from a later one; size and modification time alone cannot, since npm dates every file 1985.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BinaryRecord {
    /// Where it is.
    #[serde(default)]
    pub path: String,
    /// The version that it reported.
    #[serde(default)]
    pub actual_version: Option<String>,
    /// Always `external`: openwork ships no opencode.
    #[serde(default)]
    pub source: Option<String>,
    /// The size when the version was determined. Bytes.
    #[serde(default)]
    pub size: Option<u64>,
    /// The modification time at that moment: Unix seconds with nine decimal places.
    #[serde(default)]
    pub modified: Option<String>,
    /// The path with links resolved, at that moment.
    #[serde(default)]
    pub resolved: Option<String>,
    /// The inode at that moment.
    #[serde(default)]
    pub inode: Option<u64>,
    /// The change time (ctime) at that moment, in the format of [`BinaryRecord::modified`]. No program can set
    /// it.
    #[serde(default)]
    pub changed: Option<String>,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl BinaryRecord {
    /// The record of a binary whose version is not known yet.
    pub fn of(path: &Path, metadata: &Metadata) -> BinaryRecord {
        let time = |seconds: i64, nanoseconds: i64| Some(format!("{seconds}.{nanoseconds:09}"));
        BinaryRecord {
            path: path.to_string_lossy().into_owned(),
            actual_version: None,
            source: Some("external".to_owned()),
            size: Some(metadata.len()),
            modified: time(metadata.mtime(), metadata.mtime_nsec()),
            resolved: fs::canonicalize(path).ok().map(|path| path.to_string_lossy().into_owned()),
            inode: Some(metadata.ino()),
            changed: time(metadata.ctime(), metadata.ctime_nsec()),
            extra: Map::new(),
        }
    }

    /// Whether both records are about the same unchanged file. A record of openwork 0.1 matches none.
    pub fn is_same_file(&self, other: &BinaryRecord) -> bool {
        self.is_about_a_file() && self.file() == other.file()
    }

    /// Whether the record tells one file from another; that of openwork 0.1 does not.
    pub fn is_about_a_file(&self) -> bool {
        self.file().is_some()
    }

    /// What tells one file from another.
    fn file(&self) -> Option<(&str, u64, &str, &str, u64, &str)> {
        let BinaryRecord { path, size, modified, resolved, inode, changed, .. } = self;
        Some((path, (*size)?, modified.as_deref()?, resolved.as_deref()?, (*inode)?, changed.as_deref()?))
    }
}

/// A fenced workspace: loading it ended opencode twice.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FenceRecord {
    /// The directory of the workspace.
    pub directory: String,
    /// The version of opencode that ended; another version lifts the fence.
    #[serde(default)]
    pub version: String,
    /// The last output of opencode before its end.
    #[serde(default)]
    pub output: String,
    /// Unix milliseconds.
    #[serde(default)]
    pub fenced_at: u64,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The known binaries.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Binaries {
    /// The opencode last started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opencode: Option<BinaryRecord>,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The ports last used, so that addresses stay stable; 0 when there is none yet.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ports {
    /// The daemon's.
    #[serde(default)]
    pub daemon: u16,
    /// opencode's.
    #[serde(default)]
    pub opencode: u16,
    /// The address in 127.0.0.0/8 that opencode listened on; absent in files of openwork 0.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opencode_host: Option<String>,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Ports {
    /// The address that opencode last listened on. `None` in files of openwork 0.1, which used
    /// 127.0.0.1:6175, where any web page can find it.
    pub fn opencode_address(&self) -> Option<SocketAddrV4> {
        let ip = self.opencode_host.as_ref()?.parse::<Ipv4Addr>().ok().filter(Ipv4Addr::is_loopback)?;
        (self.opencode != 0).then(|| SocketAddrV4::new(ip, self.opencode))
    }

    /// Keeps the address for the next start.
    pub fn keep_opencode_address(&mut self, address: SocketAddrV4) {
        self.opencode = address.port();
        self.opencode_host = Some(address.ip().to_string());
    }
}
