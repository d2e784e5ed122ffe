//! Checks of processes: the daemon, opencode, other processes at their ports, and other opencodes over the
//! same data.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Findings, Patient};
use crate::cli::client::decode;
use crate::cli::output::duration;
use crate::cli::{self, VERSION};
use crate::error::Error;
use crate::line::{Line, migration};
use crate::log::now_ms;
use crate::options::{DEFAULT_PORT, MARKER};
use crate::paths::find_opencode;
use crate::service;
use crate::state::BinaryRecord;
use crate::system::process;
use crate::system::socket;
use crate::wire::{Health, Phase};

const DAEMON: &str = "daemon";
const PORTS: &str = "ports";
const OPENCODE: &str = "opencode";
const ENVIRONMENT: &str = "environment";
const OTHERS: &str = "others";

/// The consequence of two servers over the same data.
const TWO_SERVERS: &str = "neither knows what runs in the other: `openwork attach` and `openwork run` use openwork's";
/// What to do about the server of plain opencode 2.x.
const SHARE: &str = "neither knows what runs in the other: `openwork daemon restart --all --shared` has one for both";
/// From this many restarts after failures on, opencode has a problem.
const MANY_RESTARTS: u64 = 3;
/// Variables, besides the keys of model providers, that change opencode's behaviour or the place of its data.
const PASSED_ON: [&str; 10] = [
    "OPENCODE_CONFIG",
    "OPENCODE_CONFIG_DIR",
    "OPENCODE_CONFIG_CONTENT",
    "OPENCODE_DB",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "http_proxy",
    "https_proxy",
];
/// The variables that make clients use a proxy.
const PROXIES: [&str; 6] = ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"];

/// A running daemon.
pub struct Running {
    /// Process id.
    pub pid: u32,
    port: u16,
    health: Health,
    /// The environment of the daemon.
    environment: BTreeMap<OsString, OsString>,
    arguments: Vec<OsString>,
}

/// Checks whether a daemon runs and answers within the limit.
pub fn daemon(findings: &mut Findings, patient: &Patient<'_>, limit: Duration) -> Option<Running> {
    let soon = patient.client.until(patient.client.deadline.min(Instant::now() + limit));
    let found = soon.find().and_then(|address| {
        let health = if address.is_some() { soon.read_bytes("/health")? } else { None };
        address.zip(health).map(|(address, health)| Ok((address, decode::<Health>(&health)?))).transpose()
    });
    let (address, health) = match found {
        Ok(Some(found)) => found,
        Ok(None) => {
            orphan(findings, patient);
            return None;
        }
        Err(e) => {
            findings.failed(DAEMON, &e);
            return None;
        }
    };
    let up = duration(now_ms().saturating_sub(health.daemon.started_at));
    findings.ok(DAEMON, format!("{}, pid {}, {}, up {up}", health.cli_version, address.pid, health.daemon.base_url));
    if health.cli_version != VERSION {
        let message = format!("the daemon is openwork {}, this is {VERSION}", health.cli_version);
        findings.warning(DAEMON, message, "`openwork daemon restart` starts this version; opencode keeps running");
    }
    Some(Running {
        pid: address.pid,
        port: address.port,
        health,
        environment: process::environment(address.pid).unwrap_or_default(),
        arguments: process::arguments(address.pid).unwrap_or_default(),
    })
}

/// Checks, without a daemon, whether the opencode of a killed daemon still runs.
fn orphan(findings: &mut Findings, patient: &Patient<'_>) {
    match cli::daemon::orphan(&patient.state) {
        Some(pid) => {
            let message = format!("not running, but its opencode (pid {pid}) is still running");
            findings.warning(DAEMON, message, "the next command starts a daemon, which takes that opencode over");
        }
        None => findings.ok(DAEMON, "not running; the first command that needs it starts it"),
    }
}

/// Checks the ports of the options, and the port that the next daemon would use.
pub fn ports(findings: &mut Findings, patient: &Patient<'_>, running: Option<&Running>) {
    let asked = patient.options.port;
    match (running, asked) {
        (Some(running), Some(port)) if port != running.port => {
            let message = format!(
                "--daemon-port (OPENWORK_DAEMON_PORT) asks for {port}, and the daemon listens on {}",
                running.port
            );
            findings.warning(PORTS, message, "`openwork daemon restart` applies it");
        }
        (Some(_), _) => {}
        (None, asked) => {
            let last = Some(patient.state.ports.daemon).filter(|port| *port != 0);
            let port = asked.or(last).unwrap_or(DEFAULT_PORT);
            let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
            // An unresponsive daemon that holds its lock holds its port, too.
            if !findings.has(DAEMON, super::Verdict::Wrong) {
                daemon_port(findings, address, asked.is_some());
            }
        }
    }
    let is_running = running.is_some_and(|running| running.health.opencode.is_some());
    if let (Some(port), false) = (patient.options.engine.port, is_running) {
        let address = SocketAddrV4::new(patient.options.engine.host.unwrap_or(Ipv4Addr::LOCALHOST), port);
        if let Some(holder) = listener(address) {
            let hint = "choose another --opencode-port (OPENWORK_OPENCODE_PORT), or leave it out to get a free one";
            findings.wrong(PORTS, format!("{address}, where opencode is to listen, is held by {holder}"), hint);
        }
    }
}

/// The port that the next daemon wants.
fn daemon_port(findings: &mut Findings, address: SocketAddrV4, is_asked_for: bool) {
    if socket::is_held_by_service_manager(address).unwrap_or(false) {
        return findings.ok(PORTS, format!("systemd listens on {address} and starts the daemon"));
    }
    match (listener(address), is_asked_for) {
        (None, _) => findings.ok(PORTS, format!("{address} is free")),
        (Some(holder), true) => {
            let hint = "choose another --daemon-port (OPENWORK_DAEMON_PORT), or leave it out to get a free one";
            findings.wrong(PORTS, format!("{address}, where the daemon is to listen, is held by {holder}"), hint);
        }
        (Some(holder), false) => {
            let hint =
                "the next daemon takes a free port; clients with the old address need the new one (`openwork env`)";
            findings.warning(PORTS, format!("{address} is held by {holder}"), hint);
        }
    }
}

/// A description of the process that listens on an address.
fn listener(address: SocketAddrV4) -> Option<String> {
    socket::listening_inode(address).ok()??;
    let pid = process::all_of_ours().find(|pid| matches!(socket::listening_itself(*pid, address), Ok(Some(_))));
    Some(match pid {
        Some(pid) => described(pid),
        None => "a process of another user".to_owned(),
    })
}

/// A description of a process: its program, pid and working directory.
fn described(pid: u32) -> String {
    let arguments = process::arguments(pid).unwrap_or_default();
    let name = arguments.first().map_or_else(|| "a process".to_owned(), |program| base(program));
    match process::working_directory(pid) {
        Some(directory) => format!("{name} (pid {pid}, in {})", directory.display()),
        None => format!("{name} (pid {pid})"),
    }
}

fn base(program: &OsStr) -> String {
    Path::new(program).file_name().unwrap_or(program).to_string_lossy().into_owned()
}

/// Checks opencode: its program, its version and its supervision.
pub fn opencode(findings: &mut Findings, patient: &Patient<'_>, running: Option<&Running>) {
    let known = patient.state.binaries.as_ref().and_then(|binaries| binaries.opencode.as_ref());
    let mine = find_opencode(patient.options.engine.binary.as_deref());
    let installed = mine.as_ref().ok().and_then(|(path, metadata)| installed_version(path, metadata, known));
    match (running, &mine) {
        (Some(running), _) => {
            supervision(findings, running);
            if let Some(known) = known {
                another_program(findings, running, known, mine.as_ref().ok().map(|(path, _)| &**path));
            }
        }
        (None, Ok((path, _))) => match installed.as_deref() {
            Some(version) if Line::of(version).is_none() => {
                let (path, version) = (path.clone(), version.to_owned());
                let e = Error::OpencodeUnsupported { path, version, shared: false };
                findings.failed(OPENCODE, &e);
            }
            Some(version) => findings.ok(OPENCODE, format!("{version}, {}", path.display())),
            None => findings.ok(OPENCODE, format!("{}; its first start tells its version", path.display())),
        },
        (None, Err(e)) => findings.failed(OPENCODE, e),
    }
    // The line that used the data last, and the line that will use it next.
    let before = known.and_then(|known| Line::of(known.actual_version.as_deref()?));
    let next = installed.as_deref().and_then(Line::of);
    if let Some(warning) = next.and_then(|next| migration(before, next)) {
        let hint = match next {
            Some(Line::V1) => "name an opencode of 2.x with --opencode-bin to see those sessions again",
            Some(Line::V2) | None => "to stay with 1.x, name one with --opencode-bin before the next start",
        };
        findings.warning(OPENCODE, warning, hint);
    }
}

/// The version of a program: the recorded one, else from npm's description of the package.
fn installed_version(path: &Path, metadata: &Metadata, known: Option<&BinaryRecord>) -> Option<String> {
    let record = BinaryRecord::of(path, metadata);
    let remembered = known.filter(|known| known.is_same_file(&record)).and_then(|known| known.actual_version.clone());
    remembered.or_else(|| packaged_version(path))
}

/// Checks the supervision of opencode.
fn supervision(findings: &mut Findings, running: &Running) {
    let engine = &running.health.engine;
    let version = engine.version.as_deref().unwrap_or("version unknown");
    let why = engine.last_error.as_ref().map_or_else(String::new, |error| format!(": {}", error.message));
    let is = |phase: Phase| engine.phase == phase.name();
    match &running.health.opencode {
        _ if is(Phase::Failed) => {
            let hint = engine.last_error.as_ref().and_then(|error| error.hint.clone());
            let hint =
                hint.unwrap_or_else(|| "`openwork logs` says why; `openwork daemon start` tries again".to_owned());
            findings.wrong(OPENCODE, format!("it has been given up{why}"), hint);
        }
        _ if is(Phase::Waiting) => {
            findings.warning(
                OPENCODE,
                format!("it has ended and is started again soon{why}"),
                "`openwork logs` says why",
            );
        }
        Some(info) if is(Phase::Ready) => {
            let up = duration(now_ms().saturating_sub(info.started_at));
            findings.ok(OPENCODE, format!("{version}, pid {}, {}, up {up}", info.pid, info.base_url));
        }
        Some(_) | None => findings.ok(OPENCODE, format!("{version}, {}", engine.phase)),
    }
    if engine.restarts >= MANY_RESTARTS {
        let message = format!("it has ended {} times by itself since the daemon started", engine.restarts);
        findings.warning(OPENCODE, message, "`openwork logs` has its last output");
    }
}

/// Checks whether the program of the daemon's opencode was replaced, or differs from that of this shell.
fn another_program(findings: &mut Findings, running: &Running, known: &BinaryRecord, mine: Option<&Path>) {
    let path = Path::new(&known.path);
    match fs::metadata(path) {
        Err(_) => {
            let hint = "`openwork daemon restart --all --when-idle` starts the opencode of this shell";
            return findings.warning(OPENCODE, format!("{} has gone since it was started", path.display()), hint);
        }
        Ok(metadata) if !BinaryRecord::of(path, &metadata).is_same_file(known) => {
            let hint = "`openwork daemon restart --all --when-idle` starts the new one";
            return findings.warning(OPENCODE, format!("{} was replaced since it was started", path.display()), hint);
        }
        Ok(_) => {}
    }
    let is_named = running.arguments.iter().any(|argument| argument.to_string_lossy().starts_with("--opencode-bin"))
        || running.environment.contains_key(OsStr::new("OPENWORK_OPENCODE_BIN"));
    let resolved = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if let Some(mine) = mine.filter(|mine| !is_named && resolved(path) != resolved(mine)) {
        let message = format!("the daemon runs {}, and this shell would start {}", path.display(), mine.display());
        findings.warning(OPENCODE, message, "`openwork daemon restart --all --when-idle` starts that of this shell");
    }
}

/// The version in npm's description of the package beside the program. Running opencode for its version would
/// create directories.
fn packaged_version(path: &Path) -> Option<String> {
    let resolved = fs::canonicalize(path).ok()?;
    let text = fs::read(resolved.parent()?.parent()?.join("package.json")).ok()?;
    let package: Value = serde_json::from_slice(&text).ok()?;
    let is_opencode = package["name"].as_str().is_some_and(|name| name.contains("opencode"));
    package["version"].as_str().filter(|_| is_opencode).map(str::to_owned)
}

/// Compares the environment of this shell with that of the running opencode.
pub fn environment(findings: &mut Findings, patient: &Patient<'_>, running: Option<&Running>) {
    proxies(findings);
    if std::env::var_os("XDG_DATA_HOME").is_some_and(|value| !value.is_empty() && !Path::new(&value).is_absolute()) {
        let hint = "make it an absolute path, as the XDG specification demands, or unset it";
        findings.warning(ENVIRONMENT, "XDG_DATA_HOME is relative, and openwork ignores it", hint);
    }
    let Some(running) = running else { return };
    let of_opencode = patient.state.opencode.as_ref().and_then(|record| process::environment(record.pid));
    let theirs = of_opencode.as_ref().unwrap_or(&running.environment);
    let is_about_opencode = |name: &str| name.ends_with("_API_KEY") || PASSED_ON.contains(&name);
    let different: Vec<String> = std::env::vars_os()
        .filter(|(name, value)| name.to_str().is_some_and(is_about_opencode) && theirs.get(name) != Some(value))
        .map(|(name, _)| name.to_string_lossy().into_owned())
        .collect();
    let hint = "opencode has the environment of the shell that started the daemon: `openwork daemon restart --all --when-idle` \
                starts it with this one";
    if !different.is_empty() {
        let message = format!("opencode was started without, or with another value of, {}", different.join(", "));
        findings.warning(ENVIRONMENT, message, hint);
    }
    let missing = missing_directories(theirs);
    if !missing.is_empty() {
        let message = format!("the PATH of opencode, and so of the agent and its tools, lacks {}", missing.join(", "));
        findings.warning(ENVIRONMENT, message, hint);
    }
    if different.is_empty() && missing.is_empty() {
        let place = running.environment.get(OsStr::new("PWD"));
        let place =
            place.map_or_else(String::new, |place| format!("; the daemon was started in {}", place.to_string_lossy()));
        findings.ok(ENVIRONMENT, format!("opencode has what this shell has{place}"));
    }
}

/// The existing directories of this shell's PATH that are missing in another environment's PATH.
fn missing_directories(theirs: &BTreeMap<OsString, OsString>) -> Vec<String> {
    let split =
        |path: Option<&OsString>| path.map(std::env::split_paths).into_iter().flatten().collect::<Vec<PathBuf>>();
    let theirs = split(theirs.get(OsStr::new("PATH")));
    let mine = split(std::env::var_os("PATH").as_ref());
    let missing = mine.iter().filter(|directory| !theirs.contains(directory) && directory.is_dir());
    missing.map(|directory| directory.display().to_string()).collect()
}

/// A proxy that clients would use even for addresses of this machine.
fn proxies(findings: &mut Findings) {
    let is_set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let Some(proxy) = PROXIES.iter().find(|name| is_set(name)) else { return };
    let hosts = ["no_proxy", "NO_PROXY"].map(|name| std::env::var(name).unwrap_or_default()).join(",");
    let is_spared = hosts.split(',').map(str::trim).any(|host| ["127.0.0.1", "127.0.0.0/8", "*"].contains(&host));
    if !is_spared {
        let message = format!("{proxy} is set, and NO_PROXY does not spare 127.0.0.1");
        let hint = "openwork asks no proxy; an OpenCode client of your own would send it the password: start the client \
                    with `openwork attach` or `run`, or set NO_PROXY=127.0.0.1 (`openwork env` does)";
        findings.warning(ENVIRONMENT, message, hint);
    }
}

/// The place of the data of an opencode with this environment: its database, or the directory of that.
fn data_of(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    if let Some(database) = set("OPENCODE_DB") {
        return Some(database.into());
    }
    let base = set("XDG_DATA_HOME").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(set("HOME")?).join(".local/share")))?;
    Some(base.join("opencode"))
}

/// Looks for other opencodes of this user: those over the same data, and processes that earlier ones of ours
/// have left.
pub fn others(findings: &mut Findings, patient: &Patient<'_>, running: Option<&Running>) {
    let record = patient.state.opencode.as_ref();
    let engine = record.map(|record| record.engine_id.as_str()).unwrap_or_default();
    let of_opencode = record.filter(|_| running.is_some()).and_then(|record| process::environment(record.pid));
    let data = match &of_opencode {
        Some(environment) => data_of(&|name| environment.get(OsStr::new(name)).cloned()),
        None => data_of(&|name| std::env::var_os(name)),
    };
    let our_directory = fs::canonicalize(patient.client.data_dir.opencode_cwd()).ok();
    let mut seen: Vec<u32> = Vec::new();
    let service = own_service(findings, patient, running);
    seen.extend(service);
    for pid in process::all_of_ours().filter(|pid| Some(*pid) != service) {
        let Some(arguments) = process::arguments(pid).filter(|arguments| is_opencode(arguments)) else { continue };
        let Some(environment) = process::environment(pid) else { continue };
        let marker = environment.get(OsStr::new(MARKER)).map(|marker| marker.to_string_lossy().into_owned());
        let is_in_ours = || our_directory.is_some() && process::working_directory(pid) == our_directory;
        match marker {
            Some(marker) if marker == engine => {}
            // Its marker and its working directory show that a daemon over this data directory started it.
            Some(_) if is_in_ours() => {
                let message = format!("{} was left by an earlier daemon over this data directory", described(pid));
                findings.warning(OTHERS, message, "nothing uses it any more: end it by hand");
                seen.push(pid);
            }
            // A process of the agent, or the opencode of another data directory, which has its own doctor.
            Some(_) => {}
            None if !has_server(&arguments) || data.is_none() => {}
            None if data_of(&|name| environment.get(OsStr::new(name)).cloned()) != data => {}
            None => {
                // npm's wrapper and the program that it starts are one opencode.
                if !process::parent(pid).is_some_and(|parent| seen.contains(&parent)) {
                    beside(findings, pid);
                }
                seen.push(pid);
            }
        }
    }
    if seen.is_empty() {
        findings.ok(OTHERS, "no other opencode works over the same data");
    }
}

/// The server that plain opencode 2.x runs beside ours: its process, if there is one.
fn own_service(findings: &mut Findings, patient: &Patient<'_>, running: Option<&Running>) -> Option<u32> {
    let registration = match service::read(&service::path().ok()?) {
        Ok(registration) => registration?,
        Err(e) => {
            let hint = "a plain `opencode` of 2.x writes it anew when it starts its server";
            findings.warning(OTHERS, e.to_string(), hint);
            return None;
        }
    };
    let service = service::prove(registration).ok()??.registration;
    let process = format!("{} on {}", described(service.pid), service.url);
    match running.map_or(patient.options.engine.shared, |running| running.health.engine.shared) {
        true => findings.ok(OTHERS, format!("plain `opencode` and openwork share one server: {process}")),
        false => {
            findings.warning(OTHERS, format!("plain `opencode` has a server of its own: {process}"), SHARE);
        }
    }
    Some(service.pid)
}

/// An opencode with a server of its own over the same data.
fn beside(findings: &mut Findings, pid: u32) {
    let message = format!("another opencode with a server of its own works over the same data: {}", described(pid));
    findings.warning(OTHERS, message, TWO_SERVERS);
}

/// Whether a command line runs opencode, perhaps through an interpreter.
fn is_opencode(arguments: &[OsString]) -> bool {
    let is_it = |argument: Option<&OsString>| {
        argument
            .is_some_and(|argument| ["opencode", "opencode.exe", ".opencode", "opencode2"].contains(&&*base(argument)))
    };
    let is_interpreter = || arguments.first().is_some_and(|program| ["node", "bun"].contains(&&*base(program)));
    is_it(arguments.first()) || (is_interpreter() && is_it(arguments.get(1)))
}

/// Whether an opencode with this command line contains a server; a client of another server does not.
fn has_server(arguments: &[OsString]) -> bool {
    let is_client = |argument: &OsString| {
        let text = argument.to_string_lossy();
        text == "attach"
            || ["--attach", "--server"]
                .iter()
                .any(|option| text == *option || text.strip_prefix(option).is_some_and(|rest| rest.starts_with('=')))
    };
    !arguments.iter().skip(1).any(is_client)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn opencode_is_recognised_by_its_command_line() {
        for (text, opencode, server) in [
            ("opencode", true, true),
            ("/usr/bin/opencode serve --port 1", true, true),
            ("node /usr/lib/node_modules/.bin/opencode run hi", true, true),
            ("opencode attach http://127.0.0.1:1", true, false),
            ("opencode run --attach http://127.0.0.1:1 hi", true, false),
            ("opencode --server=http://127.0.0.1:1", true, false),
            ("vim opencode", false, true),
            ("/home/me/opencode/node", false, true),
        ] {
            assert_eq!((is_opencode(&line(text)), has_server(&line(text))), (opencode, server), "{text}");
        }
    }

    #[test]
    fn data_of_opencode_follows_its_environment() {
        let data = |variables: &[(&str, &str)]| {
            let find = |name: &str| variables.iter().find(|(given, _)| *given == name).map(|(_, value)| value.into());
            data_of(&find)
        };
        assert_eq!(data(&[("HOME", "/h")]), Some("/h/.local/share/opencode".into()));
        assert_eq!(data(&[("HOME", "/h"), ("XDG_DATA_HOME", "/x")]), Some("/x/opencode".into()));
        assert_eq!(data(&[("HOME", "/h"), ("OPENCODE_DB", "/d.db")]), Some("/d.db".into()));
        assert_eq!(data(&[("XDG_DATA_HOME", "")]), None);
    }
}
