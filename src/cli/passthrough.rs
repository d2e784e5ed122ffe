//! OpenCode's own calls and clients: `api`, `attach`, `run`, and `env` for other clients. All use the
//! workspace's URL at the daemon, which outlives every opencode.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Serialize;
use serde_json::Value;

use super::client::{Address, Client, failure};
use super::daemon::{last_line, note_migration};
use super::output::{Output, Waiting, clean, note};
use super::workspace::{WORKSPACE_VARIABLE, encoded, named, selector_here, target};
use crate::args::{Api, Data, Shell};
use crate::error::{Error, ErrorBody, Result};
use crate::framing::basic;
use crate::line::{Line, V1_PASSWORD, V1_USERNAME, V2_PASSWORD, V2_USERNAME, parse_version};
use crate::paths::find_opencode;
use crate::service::{self, Registration};
use crate::state::{Auth, BinaryRecord, State};
use crate::wire::{Health, Start, WorkspaceReply, from_json};
use crate::workspace::Workspace;

/// The size of the chunks in which bodies are copied. Bytes.
const CHUNK: usize = 64 * 1024;
/// The largest body that `--json` puts into an object. Bytes.
const JSON_BODY_LIMIT: usize = 256 * 1024 * 1024;

/// The hosts that clients must reach without a proxy.
const NO_PROXY_HOSTS: &str = "127.0.0.1,localhost,127.0.0.0/8";
/// The variables that `env` sets, except those about proxies.
const VARIABLES: [&str; 6] =
    ["OPENCODE_BASE_URL", V1_USERNAME, V1_PASSWORD, V2_PASSWORD, WORKSPACE_VARIABLE, "OPENWORK_DIRECTORY"];

/// opencode's credentials: those that the daemon has stored, or, if the daemon shares the user's own service,
/// those of the service.
fn credentials(client: &Client) -> Result<Auth> {
    let state = || State::read(&client.data_dir.state());
    // The registration file of the shared service; none while the daemon knows no service.
    let registration = |state: State| state.opencode.and_then(|opencode| opencode.service);
    let known = state()?;
    let has_own = known.opencode.as_ref().is_some_and(|opencode| opencode.service.is_none());
    if known.daemon.as_ref().is_some_and(|daemon| daemon.shared) && !has_own {
        let read = |path: Option<String>| path.map_or(Ok(None), |path| service::read(Path::new(&path)));
        let mut registered = read(registration(known))?;
        if registered.is_none() {
            // The service registers its password when it starts.
            let _: Health = client.ask("POST", "/start", &())?;
            registered = read(registration(state()?))?;
        }
        let gone = || Error::OpencodeUnavailable("its service has ended, or is registered no more".to_owned());
        let Registration { password, .. } = registered.ok_or_else(gone)?;
        return Ok(Auth {
            opencode_username: V2_USERNAME.to_owned(),
            opencode_password: password,
            extra: serde_json::Map::new(),
        });
    }
    let path = client.data_dir.auth();
    Auth::read(&path)?.ok_or_else(|| Error::Internal(format!("{} is not there", path.display())))
}

/// A reply as one JSON object.
#[derive(Serialize)]
struct Reply {
    ok: bool,
    status: u16,
    body: Value,
}

/// Makes a call; the body of the reply goes to standard output as it arrives.
///
/// # Errors
/// Those of the daemon; [`Error::Refused`], with exit status 1, for a status of 400 or more.
pub fn api(client: &Client, out: &mut Output, call: &Api, timeout_given: bool) -> Result<()> {
    client.ensure()?;
    let target = format!("/w/{}{}", encoded(client, call.selector.as_deref())?, call.path);
    let auth = credentials(client)?;
    let authorization = basic(&auth.opencode_username, &auth.opencode_password);
    let mut body = call.data.as_ref().map(open_body).transpose()?;
    let length = body.as_ref().and_then(|body| body.length).map(|length| length.to_string());
    let mut headers = vec![("Authorization", authorization.as_str())];
    headers.extend(call.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    let given = |name: &str| call.headers.iter().any(|(given, _)| given.eq_ignore_ascii_case(name));
    if !given("accept") {
        headers.push(("Accept", "*/*"));
    }
    match (&body, &length) {
        (None, _) if call.method != "GET" && call.method != "HEAD" => headers.push(("Content-Length", "0")),
        (None, _) => {}
        (Some(_), Some(length)) => headers.push(("Content-Length", length)),
        (Some(_), None) => headers.push(("Transfer-Encoding", "chunked")),
    }
    if body.is_some() && !given("content-type") {
        headers.push(("Content-Type", "application/json"));
    }
    let waiting = Waiting::new("opencode");
    // Some calls are answered only after a turn of the agent, which may take hours.
    let deadline = timeout_given.then_some(client.deadline);
    let mut response = match &mut body {
        // If the daemon was just ending, a GET or HEAD may be repeated.
        None if matches!(call.method.as_str(), "GET" | "HEAD") => client
            .with_daemon(|address| client.open(address, &call.method, &target, &headers, deadline, |_| Ok(Ok(()))))?,
        None => client.open(&client.reach()?, &call.method, &target, &headers, deadline, |_| Ok(Ok(())))?,
        Some(body) => client
            .open(&client.reach()?, &call.method, &target, &headers, deadline, |stream| send_body(body, stream))?,
    };
    drop(waiting);
    response.socket_mut().deadline = deadline;
    let (status, ours) = (response.status, response.error_code.take());
    let lost = |e: io::Error| match e.kind() {
        io::ErrorKind::TimedOut => Error::OpencodeTimeout("did not end its reply"),
        _ => Error::OpencodeFault(format!("the reply broke off: {e}")),
    };
    if out.is_json() || ours.is_some() {
        let bytes = response.bytes(JSON_BODY_LIMIT).map_err(lost)?;
        match ours {
            // The reply to a HEAD has no body.
            Some(code) if call.method == "HEAD" => {
                let message = format!("the daemon refuses a HEAD with {code}");
                return Err(Error::reported(ErrorBody { code, message, hint: None }, status));
            }
            Some(_) => return Err(failure(status, &bytes)),
            None => {}
        }
        let body = from_json(&bytes).unwrap_or_else(|_| String::from_utf8_lossy(&bytes).into_owned().into());
        out.print(&Reply { ok: status < 400, status, body }, |_| String::new())?;
    } else {
        if call.include {
            let head = std::mem::take(&mut response.head);
            out.write(&head)?;
        }
        let mut buffer = vec![0; CHUNK];
        let mut last = b'\n';
        while !out.is_closed() {
            match response.read(&mut buffer).map_err(lost)? {
                0 => break,
                count => {
                    last = buffer[count - 1];
                    out.write(&buffer[..count])?;
                }
            }
        }
        // On a terminal, the next prompt must start on a new line.
        if last != b'\n' && io::stdout().is_terminal() {
            out.write(b"\n")?;
        }
    }
    match status {
        ..400 => Ok(()),
        _ => Err(Error::Refused { status, json: out.is_json() }),
    }
}

/// The body of a request.
struct Body {
    reader: Box<dyn Read>,
    /// In bytes, if known.
    length: Option<u64>,
}

fn open_body(data: &Data) -> Result<Body> {
    Ok(match data {
        Data::Text(text) => {
            let bytes = text.as_bytes().to_vec();
            let length = bytes.len() as u64;
            Body { reader: Box::new(io::Cursor::new(bytes)), length: Some(length) }
        }
        Data::File(path) => {
            let failed = |e| Error::usage(format!("cannot read the body from {}: {e}", path.display()));
            let file = File::open(path).map_err(failed)?;
            let kind = file.metadata().map_err(failed)?.file_type();
            if kind.is_dir() {
                return Err(failed(io::ErrorKind::IsADirectory.into()));
            }
            if !kind.is_file() {
                return Ok(Body { reader: Box::new(file), length: None });
            }
            // Determine the length by reading: files in /proc and /sys report a wrong one, and a file may
            // grow meanwhile. A large file is sent in chunks as it is read.
            let mut bytes = Vec::new();
            (&file).take(CHUNK as u64).read_to_end(&mut bytes).map_err(failed)?;
            match bytes.len() {
                CHUNK => Body { reader: Box::new(io::Cursor::new(bytes).chain(file)), length: None },
                length => Body { reader: Box::new(io::Cursor::new(bytes)), length: Some(length as u64) },
            }
        }
        Data::Stdin => Body { reader: Box::new(io::stdin()), length: None },
    })
}

/// Sends the body, in chunks when its length is unknown. The inner result is that of the connection.
///
/// # Errors
/// When the body cannot be read.
fn send_body(body: &mut Body, stream: &mut impl Write) -> Result<io::Result<()>> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = body.reader.read(&mut buffer);
        let count = read.map_err(|e| Error::usage(format!("cannot read the body: {e}")))?;
        let written = match (body.length, count) {
            (Some(_), 0) => return Ok(Ok(())),
            (None, 0) => return Ok(stream.write_all(b"0\r\n\r\n")),
            (Some(_), _) => stream.write_all(&buffer[..count]),
            (None, _) => write!(stream, "{count:x}\r\n")
                .and_then(|()| stream.write_all(&buffer[..count]))
                .and_then(|()| stream.write_all(b"\r\n")),
        };
        if written.is_err() {
            return Ok(written);
        }
    }
}

/// The local workspace that a selector means, and the daemon that serves its URL.
fn workspace(client: &Client, selector: Option<&OsStr>) -> Result<(Address, Workspace)> {
    let target = target(client, selector, "")?;
    let (address, reply) = client
        .with_daemon(|address| Ok((address.clone(), client.ask_at::<WorkspaceReply>(address, "GET", &target, &())?)))?;
    let workspace = Workspace::clone(&reply.workspace.workspace);
    workspace.local_path()?;
    match reply.workspace.missing {
        true => Err(workspace.gone()),
        false => Ok((address, workspace)),
    }
}

/// The environment for an OpenCode client.
fn variables(client: &Client, address: &Address, workspace: &Workspace) -> Result<BTreeMap<&'static str, String>> {
    let auth = credentials(client)?;
    // Without NO_PROXY the client would send the password to a proxy.
    let mut no_proxy: Vec<String> = Vec::new();
    let given = ["NO_PROXY", "no_proxy"].iter().filter_map(std::env::var_os);
    for hosts in given.chain([NO_PROXY_HOSTS.into()]) {
        for host in hosts.to_string_lossy().split(',').map(str::trim).filter(|host| !host.is_empty()) {
            if !no_proxy.iter().any(|given| given == host) {
                no_proxy.push(host.to_owned());
            }
        }
    }
    let no_proxy = no_proxy.join(",");
    Ok(BTreeMap::from([
        ("OPENCODE_BASE_URL", base_url(address, workspace)),
        (V1_USERNAME, auth.opencode_username),
        (V1_PASSWORD, auth.opencode_password.clone()),
        (V2_PASSWORD, auth.opencode_password),
        (WORKSPACE_VARIABLE, workspace.id.clone()),
        ("OPENWORK_DIRECTORY", workspace.path.clone()),
        ("NO_PROXY", no_proxy.clone()),
        ("no_proxy", no_proxy),
    ]))
}

fn base_url(address: &Address, workspace: &Workspace) -> String {
    format!("http://127.0.0.1:{}/w/{}", address.port, workspace.id)
}

/// Prints the environment for an OpenCode client as commands for a shell.
///
/// # Errors
/// As for a command about a workspace; `workspace_is_remote`, `path_not_found`.
pub fn env(client: &Client, out: &mut Output, selector: Option<&OsStr>, shell: Shell) -> Result<()> {
    #[derive(Serialize)]
    struct Env {
        ok: bool,
        #[serde(flatten)]
        fields: BTreeMap<&'static str, String>,
        /// The same, for programs that put all of them into an environment.
        variables: BTreeMap<&'static str, String>,
    }
    let (address, workspace) = workspace(client, selector)?;
    let variables = variables(client, &address, &workspace)?;
    let env = Env { ok: true, fields: variables.clone(), variables };
    out.print(&env, |env| {
        let line = |(name, value): (&&str, &String)| match shell {
            Shell::Sh => format!("export {name}='{}'\n", value.replace('\'', "'\\''")),
            Shell::Fish => format!("set -gx {name} '{}'\n", value.replace('\\', "\\\\").replace('\'', "\\'")),
        };
        env.variables.iter().map(line).collect()
    })
}

/// Prints commands for a shell that unset the variables of `env`. If `NO_PROXY` has more hosts than `env`
/// adds, it is the user's and stays.
///
/// # Errors
/// When the output cannot be written.
pub fn env_unset(out: &mut Output, shell: Shell) -> Result<()> {
    #[derive(Serialize)]
    struct Unset {
        ok: bool,
        unset: Vec<&'static str>,
    }
    let is_ours = |name: &&str| std::env::var(name).is_ok_and(|hosts| hosts == NO_PROXY_HOSTS);
    let unset = VARIABLES.into_iter().chain(["NO_PROXY", "no_proxy"].into_iter().filter(is_ours)).collect();
    out.print(&Unset { ok: true, unset }, |env| {
        let line = |name: &&str| match shell {
            Shell::Sh => format!("unset {name}\n"),
            Shell::Fish => format!("set -e {name}\n"),
        };
        env.unset.iter().map(line).collect()
    })
}

/// Becomes opencode's terminal interface; returns only on failure.
pub fn attach(client: &Client, selector: Option<&OsStr>, args: &[OsString]) -> Error {
    match check_terminal(args) {
        Ok(()) => become_opencode(client, selector, Line::attach, args, ""),
        Err(e) => e,
    }
}

/// Requires a terminal: opencode's interface in a file or a pipe could not be quit.
///
/// # Errors
/// `usage`.
pub fn check_terminal(args: &[OsString]) -> Result<()> {
    let missing = match (io::stdin().is_terminal(), io::stdout().is_terminal()) {
        (true, true) => return Ok(()),
        (false, _) => "standard input",
        (true, false) => "standard output",
    };
    if asks_for_help(args) {
        return Ok(());
    }
    Err(Error::Usage {
        message: format!("OpenCode's interface needs a terminal, and {missing} is none"),
        hint: Some("`openwork run MESSAGE` and `openwork api` work without one".to_owned()),
    })
}

/// Becomes `opencode run`; returns only on failure.
pub fn run(client: &Client, selector: Option<&OsStr>, args: &[OsString]) -> Error {
    // opencode goes on with a turn after its client has ended, and openwork is gone by then.
    let on_interrupt =
        "after Ctrl-C the turn goes on: `openwork session list` shows it, `openwork session abort <id>` ends it\n";
    let advice = match (asks_for_help(args), selector) {
        (true, _) => String::new(),
        (false, None) => prompt_begins_with_workspace(client, args).unwrap_or_default() + on_interrupt,
        (false, Some(_)) => on_interrupt.to_owned(),
    };
    become_opencode(client, selector, Line::run, args, &advice)
}

/// A hint for `run web "hi"`: the name of a workspace is part of the prompt there.
fn prompt_begins_with_workspace(client: &Client, args: &[OsString]) -> Option<String> {
    let [first, _, ..] = args else { return None };
    let state = State::read(&client.data_dir.state()).ok()?;
    let is_named = state.workspaces.iter().any(|workspace| *first == *workspace.name);
    let first = clean(first.to_str().filter(|_| is_named)?);
    Some(format!("{first} is part of the prompt; `openwork run -w {first} …` runs in the workspace {first}\n"))
}

/// Whether opencode shall only print its help or its version.
fn asks_for_help(args: &[OsString]) -> bool {
    args.iter().any(|argument| ["--help", "-h", "--version", "-v"].iter().any(|option| argument == option))
}

/// The line of the running opencode. The client must be of the same line, since the lines have different
/// protocols.
///
/// # Errors
/// When a program of the other line has replaced the running one.
fn running_line(health: &Health, record: &BinaryRecord) -> Result<Line> {
    let running = health.engine.version.as_deref().unwrap_or_default();
    let line = Line::of(running).unwrap_or(Line::V1);
    let path = Path::new(&record.path);
    if !std::fs::metadata(path).is_ok_and(|metadata| !BinaryRecord::of(path, &metadata).is_same_file(record)) {
        return Ok(line);
    }
    // This takes a second, but is needed only between an upgrade and the next start.
    let output = Command::new(path).arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output();
    let output = output.map_err(|e| Error::io("run", path, e))?.stdout;
    let output = String::from_utf8_lossy(&output);
    match parse_version(&output) {
        Some(version) if Line::of(version) != Some(line) => Err(Error::OpencodeUnavailable(format!(
            "{} is version {version} now, and {running} is still running: `openwork daemon restart --all`",
            path.display()
        ))),
        Some(_) | None => Ok(line),
    }
}

fn become_opencode(
    client: &Client,
    selector: Option<&OsStr>,
    before: impl FnOnce(Line, OsString, OsString) -> Vec<OsString>,
    args: &[OsString],
    advice: &str,
) -> Error {
    let prepare = || {
        let line_before = last_line(client);
        let here = selector_here(client, selector)?;
        let (address, workspace) = workspace(client, Some(&here))?;
        // The default workspace may not be the one that the user expects.
        if io::stderr().is_terminal() {
            let place = if selector.is_none() { format!("{}\n", named(&workspace)) } else { String::new() };
            note(&(place + advice));
        }
        let waiting = Waiting::new("opencode");
        // The state file names the program once opencode is ready.
        let wanted = Start { workspace: Some(workspace.id.clone()) };
        let health: Health = client.ask_at(&address, "POST", "/start", &wanted)?;
        drop(waiting);
        note_migration(line_before, &health);
        let variables = variables(client, &address, &workspace)?;
        let binaries = State::read(&client.data_dir.state())?.binaries.unwrap_or_default();
        let binary = binaries.opencode;
        let binary = binary.ok_or_else(|| Error::OpencodeNotFound("the state file does not name it".to_owned()))?;
        let line = running_line(&health, &binary)?;
        Ok((address, workspace, variables, PathBuf::from(binary.path), line))
    };
    let (address, workspace, variables, binary, line) = match prepare() {
        Ok(prepared) => prepared,
        Err(e) => return e,
    };
    let mut arguments = before(line, base_url(&address, &workspace).into(), OsStr::new(&workspace.path).to_owned());
    arguments.extend(args.iter().cloned());
    let become_program = |program: &Path| {
        let mut command = Command::new(program);
        command.args(&arguments).envs(&variables);
        if line == Line::V2 {
            // 2.x takes the directory from `PWD`, else from the working directory; it has no option for it.
            command.current_dir(&workspace.path).env("PWD", &workspace.path);
        }
        command.exec()
    };
    let error = become_program(&binary);
    if error.kind() != io::ErrorKind::NotFound {
        return Error::io("run", &binary, error);
    }
    // Removed or moved since the daemon found it, by an upgrade for example.
    let given = client.autostart.as_ref().and_then(|options| options.engine.binary.as_deref());
    match find_opencode(given) {
        Ok((found, _)) => {
            let error = become_program(&found);
            Error::io("run", &found, error)
        }
        Err(_) => {
            let place = binary.display();
            Error::OpencodeNotFound(format!("{place}, which the daemon runs, is gone, and this shell has no other"))
        }
    }
}
