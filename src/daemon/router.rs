//! The routes to opencode: `/w/<ws>/…`, a stable base URL per workspace, and `/api/…`, for clients of 2.x
//! that drop the path of a base URL. This module checks credentials, finds the workspace and directory of a
//! request, and decides whether to send it again; [`super::exchange`] copies the bytes.
//!
//! Invariants: a request passes only with opencode's own credentials, checked here, or with a ticket that
//! opencode checks; a client without either learns nothing about workspaces; a request below `/w/` reaches
//! the directory of its workspace, or the directory of the session that it names; a request below `/api/`
//! reaches the directory that it chooses; a request that may change anything is sent at most once.
//!
//! Source of the format: RFC 9110 (7.6 on intermediaries, 9.2.2 on repeating requests).

use std::borrow::Cow;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::engine::{self, DIRECTORY_HEADER, Endpoint, LOCATION_PARAMETER, Subject, TOKEN_PARAMETER};
use super::exchange::{Answer, Client, Exchange, is_hop_by_hop, push_header};
use super::head::{Framing, HEAD_TIME, Head};
use super::instances::Use;
use super::{Daemon, api};
use crate::error::{Error, Result};
use crate::framing::{Body, is_named, percent_decode, percent_encode};
use crate::line::Line;
use crate::service;
use crate::system::wait::{self, Flag};
use crate::timed::Timed;
use crate::wire::TIMEOUT_HEADER;
use crate::workspace::Workspace;

/// A request longer than this counts as use of the workspace at its end, too.
const LONG: Duration = Duration::from_secs(1);
/// How long opencode may take to accept a ticket. Every refusal takes this long, so that its time does not
/// reveal whether a workspace exists.
const TICKET_TIME: Duration = HEAD_TIME;

/// The time limit for the directory of a session: opencode reads one row of its database.
const SESSION_LIMIT: Duration = Duration::from_secs(5);
/// The longest body of a request that creates or imports a session. It is read into memory, to set the
/// directory. An import has a whole conversation with its images. Bytes.
const SESSION_BODY_LIMIT: usize = 64 * 1024 * 1024;
/// The size of a single read of such a body. Bytes.
const READ_SIZE: usize = 64 * 1024;

/// The size of most heads for opencode. Bytes.
const TYPICAL_HEAD: usize = 1024;

/// The path prefix of requests to a workspace.
const PREFIX: &str = "/w/";
/// The path prefix of requests that choose their own directory.
const ROOT_PREFIX: &str = "/api/";

/// Whether a request at this path is routed.
pub fn is_routed(path: &str) -> bool {
    path.starts_with(PREFIX) || path.starts_with(ROOT_PREFIX)
}

/// The parts of the target of a routed request.
struct Target<'a> {
    /// Percent-decoded.
    selector: String,
    /// Not decoded; at least `/`.
    path: &'a str,
    /// Not decoded.
    query: Option<&'a str>,
}

/// The state of the connections after a request was routed.
pub struct Routed {
    /// The connection to opencode, unless it went back to the pool. The caller closes it after the client's
    /// connection, so that the client sees the end first.
    pub upstream: Option<TcpStream>,
    /// The client's connection can serve another request.
    pub keeps: bool,
}

/// Routes a request. Returns after the end of the reply or stream.
///
/// # Errors
/// The error to reply with. After the beginning of a reply was passed on, there is none: the connection just
/// ends.
pub fn route(daemon: &Daemon, client: &Client<'_>, stop: &Flag) -> Result<Routed> {
    match has_credentials(daemon, client.request)? {
        true => {
            client.connection.prove();
            match client.request.path().starts_with(PREFIX) {
                true => route_to_workspace(daemon, client, stop),
                false => route_anywhere(daemon, client, stop),
            }
        }
        // Checked first: an error about the target would reveal workspaces to strangers.
        false => route_ticket(daemon, client, stop),
    }
}

/// Routes a request with opencode's credentials to the workspace in its path.
fn route_to_workspace(daemon: &Daemon, client: &Client<'_>, stop: &Flag) -> Result<Routed> {
    let request = client.request;
    let Target { selector, path, query } = split(request.target)?;
    let workspace = find(daemon, &selector)?;
    let directory = workspace.local_path()?;
    let subject = |line| engine::subject(line, request.method, path);
    let expected = daemon.instances.line().map(|line| (line, subject(line)));
    // A request for a fenced workspace starts neither opencode nor an instance.
    if matches!(expected, Some((_, Subject::Instance))) {
        daemon.instances.check_fence(&workspace)?;
    }
    let deadline = Instant::now() + api::timeout(request.only(TIMEOUT_HEADER)?)?;
    let endpoint = daemon.supervisor.endpoint(deadline)?;
    let mut keeps = client.keeps;
    let expected = expected.filter(|(line, _)| *line == endpoint.line);
    let (used, loads, body) = match expected.map_or_else(|| subject(endpoint.line), |(_, subject)| subject) {
        Subject::Instance => (Some(workspace.clone()), true, None),
        Subject::Process => (Some(workspace.clone()), false, None),
        Subject::Creation => {
            let (body, ends_whole) = read_body(client, deadline)?;
            keeps &= ends_whole;
            (Some(workspace.clone()), false, Some(engine::relocate(&body, &workspace.path)?))
        }
        Subject::Session { id, loads } => (workspace_of(daemon, &endpoint, &id), loads, None),
    };
    let client = &Client { keeps, ..*client };
    let target = |line| target(line, path, query, directory);
    forward(
        daemon,
        client,
        stop,
        &Forwarding { target: &target, directory: Some(directory), body, used, loads },
        deadline,
    )
}

/// Routes a request with opencode's credentials that chooses its own directory. It counts as use of the
/// workspace at exactly that directory, if there is one.
fn route_anywhere(daemon: &Daemon, client: &Client<'_>, stop: &Flag) -> Result<Routed> {
    let request = client.request;
    let deadline = Instant::now() + api::timeout(request.only(TIMEOUT_HEADER)?)?;
    let endpoint = daemon.supervisor.endpoint(deadline)?;
    if endpoint.line == Line::V1 {
        // Clients of 1.x keep the path of a base URL; `/api/` of 1.x is an early form of the 2.x protocol.
        return Err(Error::NotFound(request.path().to_owned()));
    }
    let (used, loads) = match engine::subject(endpoint.line, request.method, request.path()) {
        Subject::Instance => (chosen(request).and_then(|directory| workspace_at(daemon, &directory)), true),
        // The body has the directory, but is not read here; opencode's event will report it.
        Subject::Process | Subject::Creation => (None, false),
        Subject::Session { id, loads } => (workspace_of(daemon, &endpoint, &id), loads),
    };
    let target = |_| request.target.to_owned();
    forward(daemon, client, stop, &Forwarding { target: &target, directory: None, body: None, used, loads }, deadline)
}

/// How to send a request to opencode.
struct Forwarding<'a> {
    /// The target for opencode.
    target: &'a dyn Fn(Line) -> String,
    /// The directory to set; `None` keeps the client's choice.
    directory: Option<&'a Path>,
    /// A new body that replaces the client's, which was read already.
    body: Option<Vec<u8>>,
    /// The workspace that the request counts as use of.
    used: Option<Arc<Workspace>>,
    /// The request loads the instance of that workspace.
    loads: bool,
}

/// Sends a request to opencode, and passes the reply back.
fn forward(
    daemon: &Daemon,
    client: &Client<'_>,
    stop: &Flag,
    forwarding: &Forwarding<'_>,
    mut deadline: Instant,
) -> Result<Routed> {
    let request = client.request;
    let begun = Instant::now();
    let timeout = request.only(TIMEOUT_HEADER)?;
    let touch = || {
        if let Some(workspace) = &forwarding.used {
            daemon.store.touch(&workspace.id);
        }
    };
    let entered = match &forwarding.used {
        Some(workspace) => Some(daemon.instances.enter(workspace, deadline)?),
        None => None,
    };
    // Without a limit from the client, a reply may take as long as a turn of the agent. If opencode hangs,
    // the supervisor ends it, which ends the wait.
    let patience = timeout.map(|_| deadline);
    let is_upgrade = is_upgrade(request)?;
    // The client's body was read already; its replacement is sent with the head.
    let without_body = Head { framing: Framing::Length(0), ..*request };
    let bodiless = Client { request: &without_body, rest: &[], ..*client };
    let client = if forwarding.body.is_some() { &bodiless } else { client };
    let mut tries = 0;
    let routed = loop {
        // opencode may be closing an idle connection, so only a request that may be sent again uses one.
        let (endpoint, upstream) = connect(daemon, tries == 0 && is_safe(request), deadline)?;
        // False when opencode ended while the request waited for its turn: it was not sent yet.
        if let Some(entered) = entered.as_ref().filter(|_| forwarding.loads) {
            if !entered.loads(endpoint.generation, deadline)? {
                continue;
            }
        }
        tries += 1;
        let target = (forwarding.target)(endpoint.line);
        let new = Rewritten {
            target: &target,
            directory: forwarding.directory,
            authorization: Some(&*endpoint.authorization),
            body: forwarding.body.as_deref(),
        };
        let head = rewrite(request, &new, &endpoint.host, is_upgrade);
        let mut exchange = Exchange::new(client, &upstream, head, is_upgrade)?;
        exchange.send();
        // Only now: opencode works meanwhile.
        touch();
        match exchange.wait_for_reply(patience, stop) {
            Ok(Answer::Reply | Answer::Tunnel) => {
                entered.iter().for_each(Use::replied);
                let kept = exchange.pass_on(stop);
                let upstream = match kept.upstream {
                    true => {
                        endpoint.keep(upstream);
                        None
                    }
                    false => Some(upstream),
                };
                break Routed { upstream, keeps: kept.client };
            }
            Ok(Answer::ClientGone) => break Routed { upstream: Some(upstream), keeps: false },
            Err(Error::OpencodeFault(why)) => {
                // A request that crashed opencode by loading its instance would crash the next opencode too.
                let blamed = entered.as_ref().and_then(|entered| entered.blame(&daemon.supervisor, &endpoint));
                let error = blamed.unwrap_or(Error::OpencodeFault(why));
                if !may_send_again(request, &error, tries) {
                    return Err(error);
                }
                deadline = next_deadline(timeout, deadline, Instant::now())?;
                daemon.supervisor.successor(&endpoint, deadline)?;
            }
            Err(e) => return Err(e),
        }
    };
    // The end of a stream counts as use of the workspace, like its beginning.
    if begun.elapsed() > LONG {
        touch();
    }
    Ok(routed)
}

/// The workspace at exactly this directory.
fn workspace_at(daemon: &Daemon, directory: &str) -> Option<Arc<Workspace>> {
    daemon.store.snapshot().local_at(directory).cloned()
}

/// The workspace of a session; `None` when opencode does not know the session, in which case its own reply
/// says so.
fn workspace_of(daemon: &Daemon, endpoint: &Endpoint, session: &str) -> Option<Arc<Workspace>> {
    let deadline = Instant::now() + SESSION_LIMIT;
    let directory = daemon.instances.session_directory(endpoint, session, deadline).ok().flatten()?;
    workspace_at(daemon, &directory)
}

/// The directory that a request of 2.x chooses.
fn chosen(request: &Head<'_>) -> Option<String> {
    let given = |value: Vec<u8>| String::from_utf8(value).ok().filter(|value| !value.is_empty());
    let query = request.target.split_once('?').map_or("", |(_, query)| query);
    let mut parameters = query.split('&').map(|parameter| parameter.split_once('=').unwrap_or((parameter, "")));
    let parameter = parameters.find(|(name, _)| parameter_name(name) == LOCATION_PARAMETER);
    let parameter = parameter.and_then(|(_, value)| given(percent_decode(&value.replace('+', " "))?));
    parameter.or_else(|| given(percent_decode(request.only(DIRECTORY_HEADER).ok().flatten()?)?))
}

/// Reads the whole body of a request; the flag tells whether no bytes followed it.
///
/// # Errors
/// `too_large`; `unsupported_media_type` for a compressed body; `bad_request` when it is malformed, or
/// incomplete at the deadline.
fn read_body(client: &Client<'_>, deadline: Instant) -> Result<(Vec<u8>, bool)> {
    let request = client.request;
    if let Some(coding) = request.only("content-encoding")?.filter(|coding| !coding.eq_ignore_ascii_case("identity")) {
        return Err(Error::UnsupportedMediaType(format!("application/json with content-encoding {coding}")));
    }
    let check_length = |length: u64| match length > SESSION_BODY_LIMIT as u64 {
        true => Err(Error::TooLarge { what: "body", limit: SESSION_BODY_LIMIT, status: 413 }),
        false => Ok(()),
    };
    let mut framed = match request.framing {
        Framing::Length(length) => {
            check_length(length)?;
            Body::length(length)
        }
        Framing::Chunked => Body::chunked(),
    };
    let malformed = |e: io::Error| Error::BadRequest(format!("the body is malformed: {e}"));
    let mut stream = Timed::new(client.stream(), Some(deadline));
    if request.only("expect")?.is_some_and(|value| value.eq_ignore_ascii_case("100-continue")) {
        let _ = stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
    }
    let mut body = Vec::new();
    let mut take = |framed: &mut Body, mut bytes: &[u8]| {
        while !bytes.is_empty() && !framed.is_done() {
            let (count, is_content) = framed.step(bytes).map_err(malformed)?;
            if is_content {
                body.extend_from_slice(&bytes[..count]);
            }
            bytes = &bytes[count..];
        }
        check_length(body.len() as u64).map(|()| bytes.is_empty())
    };
    let mut ends_whole = take(&mut framed, client.rest)?;
    let mut buffer = vec![0; READ_SIZE];
    while !framed.is_done() {
        match stream.read(&mut buffer) {
            Ok(0) => return Err(Error::BadRequest("the body ended early".to_owned())),
            Ok(count) => ends_whole = take(&mut framed, &buffer[..count])?,
            Err(e) => return Err(Error::BadRequest(format!("cannot read the body: {e}"))),
        }
    }
    Ok((body, ends_whole))
}

/// Whether to send a request again, to the same opencode or its successor, after the connection ended
/// without a reply: once, and only if the request changes nothing.
fn may_send_again(request: &Head<'_>, error: &Error, tries: u32) -> bool {
    matches!(error, Error::OpencodeFault(_)) && is_safe(request) && tries == 1
}

/// Whether a request changes nothing, and has no body (RFC 9110, 9.2.2).
fn is_safe(request: &Head<'_>) -> bool {
    matches!(request.method, "GET" | "HEAD") && request.framing == Framing::Length(0)
}

/// The deadline of the wait for the next opencode. A limit from the client covers the whole request; without
/// one, the default limit starts again.
fn next_deadline(timeout: Option<&str>, deadline: Instant, now: Instant) -> Result<Instant> {
    match timeout {
        Some(_) => Ok(deadline),
        None => Ok(now + api::timeout(None)?),
    }
}

/// Routes the WebSocket of a terminal, opened with a ticket by a web page that cannot set a header. Only
/// opencode can check the ticket. Until it accepts, the request starts and loads nothing and does not count
/// as use, and its connection is among the first to be closed when slots run short.
///
/// # Errors
/// `unauthorized`, the same for an unknown workspace and a bad ticket, after the same time.
fn route_ticket(daemon: &Daemon, client: &Client<'_>, stop: &Flag) -> Result<Routed> {
    let request = client.request;
    let Some(target) = ticket_target(request) else { return Err(Error::Unauthorized) };
    let deadline = Instant::now() + TICKET_TIME;
    if let Some(upstream) = try_ticket(daemon, client, &target, deadline, stop)? {
        return Ok(Routed { upstream: Some(upstream), keeps: false });
    }
    wait::pause(stop, client.stream(), deadline);
    Err(Error::Unauthorized)
}

/// The target of a request that may use a ticket instead of credentials: it opens a WebSocket and has no body.
fn ticket_target<'a>(request: &Head<'a>) -> Option<Target<'a>> {
    let is_websocket = is_upgrade(request).ok()? && request.has_token("upgrade", "websocket");
    let is_bare_get = request.method == "GET" && request.framing == Framing::Length(0);
    let target = match request.path().starts_with(PREFIX) {
        true => split(request.target).ok()?,
        // At the root, the directory selects the workspace.
        false => {
            let (path, query) = cut(request.target);
            Target { selector: chosen(request)?, path, query }
        }
    };
    let has_ticket = engine::takes_ticket(target.path, target.query.unwrap_or_default());
    (is_websocket && is_bare_get && has_ticket).then_some(target)
}

/// Lets opencode check a ticket; if it accepts, serves the terminal to its end. `None` when there is no such
/// instance, or opencode does not accept the ticket in time.
///
/// # Errors
/// Failures that do not depend on the ticket.
fn try_ticket(
    daemon: &Daemon,
    client: &Client<'_>,
    Target { selector, path, query }: &Target<'_>,
    deadline: Instant,
    stop: &Flag,
) -> Result<Option<TcpStream>> {
    let state = daemon.store.snapshot();
    let is_at_root = !client.request.path().starts_with(PREFIX);
    // Only an id, since names and paths can be guessed. At the root, opencode's protocol requires the path.
    let found = if is_at_root { state.local_at(selector) } else { state.get(selector) };
    let Some(workspace) = found else { return Ok(None) };
    let (Ok(directory), Some(endpoint)) = (workspace.local_path(), daemon.supervisor.ready_now()) else {
        return Ok(None);
    };
    let is_loaded = daemon.instances.is_loaded_in(endpoint.generation, &workspace.path);
    if !is_loaded || (is_at_root && endpoint.line == Line::V1) {
        return Ok(None);
    }
    let Ok(upstream) = endpoint.connect(deadline) else { return Ok(None) };
    let target = target(endpoint.line, path, *query, directory);
    let new = Rewritten { target: &target, directory: Some(directory), authorization: None, body: None };
    let head = rewrite(client.request, &new, &endpoint.host, true);
    let mut exchange = Exchange::new(client, &upstream, head, true)?;
    exchange.send();
    // Any other reply could reveal something to a stranger.
    if !matches!(exchange.wait_for_reply(Some(deadline), stop), Ok(Answer::Tunnel)) {
        return Ok(None);
    }
    client.connection.prove();
    // opencode accepted the ticket, so it came from a user with credentials.
    let _entered = daemon.instances.enter(workspace, deadline)?;
    exchange.pass_on(stop);
    Ok(Some(upstream))
}

/// Whether a request has opencode's credentials, in its header or its query.
///
/// # Errors
/// `bad_request` for two `Authorization` headers.
fn has_credentials(daemon: &Daemon, request: &Head<'_>) -> Result<bool> {
    let given = match request.only("authorization")? {
        // The scheme is compared without case (RFC 9110, 11.1).
        Some(header) => match header.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("basic") => Some(Cow::from(token.trim_ascii())),
            Some(_) | None => None,
        },
        None => token_parameter(request.target).map(Cow::from),
    };
    let Some(given) = given else { return Ok(false) };
    let is = |given: &str, header: &str| header.strip_prefix("Basic ").is_some_and(|token| is_same(given, token));
    if let Some(authorization) = daemon.supervisor.shared() {
        // A new service with another password may have replaced the one that the daemon last found.
        let is_last = authorization.is_some_and(|last| is(&given, &last));
        return Ok(is_last || service::authorization().is_some_and(|registered| is(&given, &registered)));
    }
    let [configured, fixed] = &daemon.authorizations;
    // While opencode may be 2.x: its clients use only the fixed user name.
    let takes_fixed = daemon.instances.line() != Some(Line::V1);
    Ok(is(&given, configured) | (is(&given, fixed) && takes_fixed))
}

/// The credentials in the query, for web pages that cannot set a header.
fn token_parameter(target: &str) -> Option<String> {
    let (_, query) = target.split_once('?')?;
    let mut parameters = query.split('&').filter_map(|parameter| parameter.split_once('='));
    let (_, value) = parameters.find(|(name, _)| *name == TOKEN_PARAMETER)?;
    String::from_utf8(percent_decode(value)?).ok()
}

/// Compares in a time that does not depend on the position of the difference.
fn is_same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

/// Whether a request asks for a protocol upgrade.
fn is_upgrade(request: &Head<'_>) -> Result<bool> {
    Ok(request.has_token("connection", "upgrade") && request.only("upgrade")?.is_some())
}

/// The local workspace of a selector. Its directory must exist: opencode would answer even for a missing one.
fn find(daemon: &Daemon, selector: &str) -> Result<Arc<Workspace>> {
    let workspace = daemon.store.snapshot().find(selector)?.clone();
    match workspace.local_path()?.is_dir() {
        true => Ok(workspace),
        false => Err(workspace.gone()),
    }
}

/// Splits the target of a routed request.
///
/// # Errors
/// `bad_request` for a selector that is not percent-encoded UTF-8; `workspace_not_found` for `-`, which only
/// the command line supports.
fn split(target: &str) -> Result<Target<'_>> {
    let rest = target.strip_prefix(PREFIX).unwrap_or_default();
    let (selector, rest) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let decoded = percent_decode(selector).and_then(|bytes| String::from_utf8(bytes).ok());
    let selector =
        decoded.ok_or_else(|| Error::BadRequest(format!("{selector:?} in the path is not percent-encoded UTF-8")))?;
    if selector == "-" {
        return Err(Error::no_workspace(selector));
    }
    let (path, query) = cut(rest);
    Ok(Target { selector, path: if path.is_empty() { "/" } else { path }, query })
}

/// Splits a target into path and query.
fn cut(target: &str) -> (&str, Option<&str>) {
    target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)))
}

/// The name of a query parameter, decoded.
fn parameter_name(parameter: &str) -> Vec<u8> {
    let name = parameter.split('=').next().unwrap_or_default().replace('+', " ");
    percent_decode(&name).unwrap_or_default()
}

/// The target for opencode: unchanged except for the parameters that choose a location, which would take
/// precedence over the header. Where `directory` is also a filter, it becomes the workspace's directory.
fn target(line: Line, path: &str, query: Option<&str>, directory: &Path) -> String {
    let mut target = path.to_owned();
    let mut push = |parameter: &str| {
        target.push(if target.len() == path.len() { '?' } else { '&' });
        target.push_str(parameter);
    };
    let mut filters = false;
    for parameter in query.into_iter().flat_map(|query| query.split('&')) {
        let name = parameter_name(parameter);
        filters |= name == b"directory";
        if !engine::chooses_location(&name) {
            push(parameter);
        }
    }
    if filters {
        engine::directory_filter(line, path, directory).iter().for_each(|filter| push(filter));
    }
    engine::location_parameter(line, path, directory).iter().for_each(|location| push(location));
    target
}

/// Connects to opencode, and starts it if it is down. Nothing was sent yet, so a failure may be retried.
/// `reuses` allows an idle connection that has carried a request before.
fn connect(daemon: &Daemon, reuses: bool, deadline: Instant) -> Result<(Arc<Endpoint>, TcpStream)> {
    daemon.supervisor.call(deadline, |endpoint| {
        let kept = if reuses { endpoint.kept() } else { None };
        let stream = kept.map_or_else(|| endpoint.connect(deadline), Ok)?;
        Ok((endpoint.clone(), stream))
    })
}

/// The parts of a request to replace.
struct Rewritten<'a> {
    target: &'a str,
    /// Replaces the client's choice of a location.
    directory: Option<&'a Path>,
    /// Replaces the client's credentials.
    authorization: Option<&'a str>,
    /// Replaces the client's body.
    body: Option<&'a [u8]>,
}

/// The head for opencode, followed by a replaced body.
fn rewrite(request: &Head<'_>, new: &Rewritten<'_>, host: &str, is_upgrade: bool) -> Vec<u8> {
    let Rewritten { target, directory, authorization, body } = *new;
    let mut head = Vec::with_capacity(TYPICAL_HEAD);
    let version = if request.version == 0 { " HTTP/1.0" } else { " HTTP/1.1" };
    let connection = match (is_upgrade, request.version) {
        (true, _) => "Upgrade",
        (false, 0) => "close",
        (false, _) => "keep-alive",
    };
    for part in [request.method, " ", target, version, "\r\n"] {
        head.extend_from_slice(part.as_bytes());
    }
    let mut push = |name, value: &[u8]| push_header(&mut head, &httparse::Header { name, value });
    push("Host", host.as_bytes());
    push("Connection", connection.as_bytes());
    if let Some(authorization) = authorization {
        push("Authorization", authorization.as_bytes());
    }
    if let Some(directory) = directory {
        push(DIRECTORY_HEADER, percent_encode(directory.as_os_str().as_encoded_bytes()).as_bytes());
    }
    if let Some(body) = body {
        push("Content-Type", b"application/json");
        push("Content-Length", body.len().to_string().as_bytes());
    }
    let listed: Vec<_> = request.tokens("connection").collect();
    for header in request.headers {
        let is_one_of = |names: &[&str]| names.iter().any(|name| is_named(header, name));
        let chooses_location = directory.is_some() && is_one_of(&engine::LOCATION_HEADERS);
        // opencode needs the framing of the body, even if the client lists it in `Connection`.
        let is_framing = is_one_of(&["content-length", "transfer-encoding"]);
        let is_of_body = is_framing || is_one_of(&["content-type", "content-encoding", "expect"]);
        let is_replaced =
            is_one_of(&["host", "authorization", TIMEOUT_HEADER]) || chooses_location || (body.is_some() && is_of_body);
        let keeps_upgrade = is_upgrade && is_one_of(&["upgrade"]);
        let is_listed = !is_framing && listed.iter().any(|name| name.eq_ignore_ascii_case(header.name.as_bytes()));
        if keeps_upgrade || !(is_replaced || is_hop_by_hop(header) || is_listed) {
            push_header(&mut head, header);
        }
    }
    head.extend_from_slice(b"\r\n");
    head.extend_from_slice(body.unwrap_or_default());
    head
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::{Duration, Instant};

    use super::{Target, next_deadline, split, target};
    use crate::line::Line;

    #[test]
    fn default_wait_restarts_for_the_next_opencode() {
        let begun = Instant::now();
        let (deadline, now) = (begun + Duration::from_secs(30), begun + Duration::from_secs(3600));
        assert_eq!(next_deadline(None, deadline, now).unwrap(), now + Duration::from_secs(30));
        assert_eq!(next_deadline(Some("30"), deadline, now).unwrap(), deadline);
    }

    #[test]
    fn only_the_location_is_rewritten_in_a_target() {
        for (given, selector, passed) in [
            ("/w/a", "a", "/"),
            ("/w/a?x=1", "a", "/?x=1"),
            ("/w/a/session?limit=2", "a", "/session?limit=2"),
            ("/w/a/s?directory=/x", "a", "/s"),
            ("/w/a/s?a=%20&directory=%2Fx&b", "a", "/s?a=%20&b"),
            ("/w/a/s?%64irectory=/x&location%5Bdirectory%5D=/y&q=directory", "a", "/s?q=directory"),
            ("/w/a/s?workspace=wrk_1&location[workspace]=wrk_2&work%73pace=wrk_3&workspaces=1", "a", "/s?workspaces=1"),
            ("/w/a/s?Directory=/x&WORKSPACE=wrk_1&directory[]=/x&location=%7B%7D&directory", "a", "/s"),
            (
                "/w/a/s?direct%6frys=1&mydirectory=2&path=3&project=4",
                "a",
                "/s?direct%6frys=1&mydirectory=2&path=3&project=4",
            ),
            ("/w/a/session?directory=/x&limit=2", "a", "/session?limit=2&directory=%252Fhome%252Fme"),
            ("/w/a/session/?directory=/x", "a", "/session/?directory=%252Fhome%252Fme"),
            ("/w/a//%53ession?directory=/x", "a", "//%53ession?directory=%252Fhome%252Fme"),
            ("/w/a/../b//c/%2e%2e", "a", "/../b//c/%2e%2e"),
            ("/w/%2Fhome%2Fme/x", "/home/me", "/x"),
            ("/w//x", "", "/x"),
        ] {
            let Target { selector: found, path, query } = split(given).unwrap();
            let target = target(Line::V1, path, query, Path::new("/home/me"));
            assert_eq!((found.as_str(), target.as_str()), (selector, passed), "{given}");
        }
        for (given, passed) in [
            ("/w/a/", "/"),
            ("/w/a/api/agent", "/api/agent?location%5Bdirectory%5D=%2Fhome%2Fme"),
            ("/w/a/api/agent?location[directory]=/x&a=1", "/api/agent?a=1&location%5Bdirectory%5D=%2Fhome%2Fme"),
            (
                "/w/a/api/session?directory=/x&limit=2",
                "/api/session?limit=2&directory=%2Fhome%2Fme&location%5Bdirectory%5D=%2Fhome%2Fme",
            ),
        ] {
            let Target { path, query, .. } = split(given).unwrap();
            assert_eq!(target(Line::V2, path, query, Path::new("/home/me")), passed, "{given}");
        }
        for bad in ["/w/%zz/x", "/w/%ff/x", "/w/-/x"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}
