//! `/w/<ws>/…`: a stable base URL of OpenCode per workspace. This page decides who may pass, which
//! workspace and directory a request is for, and whether it is sent again; [`super::exchange`]
//! carries it.
//!
//! Invariants: a request is passed on only with opencode's own credentials, checked here, or with a
//! ticket that opencode checks; whoever has neither learns nothing about workspaces; a request
//! reaches exactly the directory of its workspace; a request that may change something is sent at
//! most once.
//!
//! Source of the format: RFC 9110 (7.6 on intermediaries, 9.2.2 on repeating requests).

use std::net::{SocketAddrV4, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connections::Connection;
use super::engine::{self, CallError, DIRECTORY_HEADER, Endpoint, TOKEN_PARAMETER};
use super::exchange::{Answer, Exchange, is_hop_by_hop, push_header};
use super::gate::HEAD_TIME;
use super::head::{Framing, Head};
use super::{Daemon, api};
use crate::error::{Error, Result};
use crate::framing::{percent_decode, percent_encode};
use crate::system::wait::{self, Flag};
use crate::wire::TIMEOUT_HEADER;
use crate::workspace::Workspace;

/// A request that takes longer than this is use of the workspace also when it ends.
const LONG: Duration = Duration::from_secs(1);
/// How long opencode may take to accept a ticket, and how long the refusal of one takes in any case:
/// its time shall not tell whether there is such a workspace.
const TICKET_TIME: Duration = HEAD_TIME;

/// The path prefix of routed requests.
pub const PREFIX: &str = "/w/";

/// A client whose request is to be routed.
pub struct Client<'a> {
    /// Its connection.
    pub connection: &'a Connection,
    /// Its request.
    pub request: &'a Head<'a>,
    /// The bytes that have come after the head.
    pub rest: &'a [u8],
    /// The allowed origin, if a web page asks.
    pub origin: Option<&'a str>,
}

impl Client<'_> {
    /// The client's socket.
    pub fn stream(&self) -> &TcpStream {
        &self.connection.stream
    }
}

/// The parts of the target of a routed request.
struct Target<'a> {
    /// Decoded.
    selector: String,
    /// As it is spelled; at least `/`.
    path: &'a str,
    /// As it is spelled.
    query: Option<&'a str>,
}

/// Routes a request. Returns when the reply, or the stream, has ended. The caller closes the
/// connection to opencode after the client's: the client is to see the end first.
///
/// # Errors
/// The error to reply with, as long as the client has no part of a reply. After that the connection
/// just ends.
pub fn route(daemon: &Daemon, client: &Client<'_>, stop: &Flag) -> Result<TcpStream> {
    match has_credentials(daemon, client.request)? {
        true => route_known(daemon, client, stop),
        // Before anything else is looked at: an error about the target would tell a stranger
        // something.
        false => route_ticket(daemon, client, stop),
    }
}

/// Routes a request that has opencode's credentials.
fn route_known(daemon: &Daemon, client: &Client<'_>, stop: &Flag) -> Result<TcpStream> {
    let request = client.request;
    let Target { selector, path, query } = split(request.target)?;
    let workspace = find(daemon, &selector)?;
    let directory = workspace.local_path()?;
    let target = target(path, query, directory);
    let timeout = request.only(TIMEOUT_HEADER)?;
    let begun = Instant::now();
    let mut deadline = begun + api::timeout(timeout)?;
    let loads = engine::loads_instance(path);
    if loads {
        daemon.instances.check_fence(&workspace)?;
    }
    let entered = daemon.instances.enter(&workspace, deadline)?;
    daemon.store.touch(&workspace.id);
    // Without a limit of the client's own, a reply may take as long as a turn of the agent. Should
    // opencode hang, the supervisor ends it, and that ends the wait.
    let patience = timeout.map(|_| deadline);
    let is_upgrade = is_upgrade(request)?;
    let mut tries = 0;
    let upstream = loop {
        let (endpoint, upstream) = connect(daemon, deadline)?;
        // False when opencode has ended while the request waited for its turn: nothing was sent.
        if loads && !entered.loads(endpoint.generation, deadline)? {
            continue;
        }
        tries += 1;
        let authorization = Some(&*daemon.authorization);
        let head = rewrite(request, &target, directory, endpoint.listener.address, authorization, is_upgrade);
        let mut exchange = Exchange::new(client, &upstream, head, is_upgrade)?;
        match exchange.wait_for_reply(patience, stop) {
            Ok(Answer::Reply | Answer::Tunnel) => {
                entered.replied();
                exchange.pass_on(stop);
                break upstream;
            }
            Ok(Answer::ClientGone) => break upstream,
            Err(Error::OpencodeFault(why)) => {
                // A request that ends opencode by loading its instance would end the next one too.
                let error = entered.blame(&daemon.supervisor, &endpoint).unwrap_or(Error::OpencodeFault(why));
                if !may_send_again(request, &error, tries) {
                    return Err(error);
                }
                deadline = next_deadline(timeout, deadline, Instant::now())?;
                daemon.supervisor.successor(&endpoint, deadline)?;
            }
            Err(e) => return Err(e),
        }
    };
    // The end of a stream is use of the workspace as much as its beginning.
    if begun.elapsed() > LONG {
        daemon.store.touch(&workspace.id);
    }
    Ok(upstream)
}

/// Whether a request whose opencode ended without a reply is sent to the next one: once, and only if
/// it changes nothing (RFC 9110, 9.2.2).
fn may_send_again(request: &Head<'_>, error: &Error, tries: u32) -> bool {
    let is_safe = matches!(request.method, "GET" | "HEAD") && request.framing == Framing::Length(0);
    matches!(error, Error::OpencodeFault(_)) && is_safe && tries == 1
}

/// The deadline for the wait for another opencode. The client's own limit, if there is one, is for the
/// whole request; without one the wait begins anew, however old the request is.
fn next_deadline(timeout: Option<&str>, deadline: Instant, now: Instant) -> Result<Instant> {
    match timeout {
        Some(_) => Ok(deadline),
        None => Ok(now + api::timeout(None)?),
    }
}

/// Routes the WebSocket of a terminal, opened with a ticket by a web page that can set no header.
/// Only opencode knows whether the ticket is good, so until it accepts the request counts for
/// nothing: it wakes, loads and touches nothing, and its connection goes first when slots are short.
///
/// # Errors
/// `unauthorized`, the same for an unknown workspace and a bad ticket, after the same time.
fn route_ticket(daemon: &Daemon, client: &Client<'_>, stop: &Flag) -> Result<TcpStream> {
    let request = client.request;
    let Some(target) = ticket_target(request) else { return Err(Error::Unauthorized) };
    let deadline = Instant::now() + TICKET_TIME;
    client.connection.set_unproven(true);
    if let Some(upstream) = try_ticket(daemon, client, &target, deadline, stop)? {
        return Ok(upstream);
    }
    wait::pause(stop, client.stream(), deadline);
    Err(Error::Unauthorized)
}

/// The target of a request that a ticket may take the place of credentials for: it opens a WebSocket
/// and has no body.
fn ticket_target<'a>(request: &Head<'a>) -> Option<Target<'a>> {
    let is_websocket = is_upgrade(request).ok()? && request.has_token("upgrade", "websocket");
    let is_bare_get = request.method == "GET" && request.framing == Framing::Length(0);
    let target = split(request.target).ok()?;
    let has_ticket = engine::takes_ticket(target.path, target.query.unwrap_or_default());
    (is_websocket && is_bare_get && has_ticket).then_some(target)
}

/// Asks opencode whether a ticket is good; if so, serves the terminal to its end. `None` when there
/// is no such instance, or opencode does not accept the ticket in time.
///
/// # Errors
/// When the terminal cannot be served for a reason that a good ticket has nothing to do with.
fn try_ticket(
    daemon: &Daemon,
    client: &Client<'_>,
    Target { selector, path, query }: &Target<'_>,
    deadline: Instant,
    stop: &Flag,
) -> Result<Option<TcpStream>> {
    let state = daemon.store.snapshot();
    // Only an id: names and paths can be guessed.
    let Some(workspace) = state.workspaces.iter().find(|workspace| workspace.id == *selector) else { return Ok(None) };
    let (Ok(directory), Some(endpoint)) = (workspace.local_path(), daemon.supervisor.ready_now()) else {
        return Ok(None);
    };
    if !daemon.instances.is_loaded_in(endpoint.generation, &workspace.path) {
        return Ok(None);
    }
    let Ok(upstream) = connect_to(&endpoint, deadline) else { return Ok(None) };
    let head =
        rewrite(client.request, &target(path, *query, directory), directory, endpoint.listener.address, None, true);
    let mut exchange = Exchange::new(client, &upstream, head, true)?;
    // Any other reply than the tunnel would tell a stranger something.
    if !matches!(exchange.wait_for_reply(Some(deadline), stop), Ok(Answer::Tunnel)) {
        return Ok(None);
    }
    client.connection.set_unproven(false);
    // The ticket was good, so a user with credentials has asked for this terminal.
    let _entered = daemon.instances.enter(workspace, deadline)?;
    exchange.pass_on(stop);
    Ok(Some(upstream))
}

/// Whether a request has opencode's credentials, in its header or its query.
///
/// # Errors
/// `bad_request` when it has two of them.
fn has_credentials(daemon: &Daemon, request: &Head<'_>) -> Result<bool> {
    let given = match request.only("authorization")? {
        // The scheme is compared without case (RFC 9110, 11.1).
        Some(header) => match header.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("basic") => Some(token.trim_ascii().to_owned()),
            Some(_) | None => None,
        },
        None => token_parameter(request.target),
    };
    let expected = daemon.authorization.trim_start_matches("Basic ");
    Ok(given.is_some_and(|given| is_same(given.as_bytes(), expected.as_bytes())))
}

/// The credentials in the query, for web pages that can set no header.
fn token_parameter(target: &str) -> Option<String> {
    let (_, query) = target.split_once('?')?;
    let mut parameters = query.split('&').filter_map(|parameter| parameter.split_once('='));
    let (_, value) = parameters.find(|(name, _)| *name == TOKEN_PARAMETER)?;
    String::from_utf8(percent_decode(value)?).ok()
}

/// Compares in a time that does not depend on where the difference is.
fn is_same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

/// Whether a request asks for another protocol.
fn is_upgrade(request: &Head<'_>) -> Result<bool> {
    Ok(request.has_token("connection", "upgrade") && request.only("upgrade")?.is_some())
}

/// The local workspace that is meant, if its directory exists: opencode would answer for a directory
/// that does not.
fn find(daemon: &Daemon, selector: &str) -> Result<Arc<Workspace>> {
    let workspace = daemon.store.snapshot().find(selector)?.clone();
    let directory = workspace.local_path()?;
    match directory.is_dir() {
        true => Ok(workspace),
        false => Err(Error::PathNotFound(directory.to_owned())),
    }
}

/// Takes the target of a routed request apart.
///
/// # Errors
/// `bad_request` for a selector that is not percent-encoded UTF-8, `workspace_not_found` for `-`,
/// which only a command line knows.
fn split(target: &str) -> Result<Target<'_>> {
    let rest = target.strip_prefix(PREFIX).unwrap_or_default();
    let (selector, rest) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let decoded = percent_decode(selector).and_then(|bytes| String::from_utf8(bytes).ok());
    let selector =
        decoded.ok_or_else(|| Error::BadRequest(format!("{selector:?} in the path is not percent-encoded UTF-8")))?;
    if selector == "-" {
        return Err(Error::WorkspaceNotFound(selector));
    }
    let (path, query) = rest.split_once('?').map_or((rest, None), |(path, query)| (path, Some(query)));
    Ok(Target { selector, path: if path.is_empty() { "/" } else { path }, query })
}

/// The target for opencode: as it is spelled, without the parameters that choose a place, which would
/// win over the header. Where `directory` is also a filter, it becomes the workspace's directory.
fn target(path: &str, query: Option<&str>, directory: &Path) -> String {
    let mut target = path.to_owned();
    let Some(query) = query else { return target };
    let name = |parameter: &str| {
        let name = parameter.split('=').next().unwrap_or_default().replace('+', " ");
        percent_decode(&name).unwrap_or_default()
    };
    let (places, mut kept): (Vec<&str>, Vec<&str>) =
        query.split('&').partition(|parameter| engine::chooses_place(&name(parameter)));
    let filter = engine::directory_filter(path, directory);
    if places.iter().any(|parameter| name(parameter) == b"directory") {
        kept.extend(filter.as_deref());
    }
    if !kept.is_empty() {
        target.push('?');
        target.push_str(&kept.join("&"));
    }
    target
}

/// Connects to opencode, which is woken if it is down. Nothing has been sent before, so a failure
/// may be repeated.
fn connect(daemon: &Daemon, deadline: Instant) -> Result<(Endpoint, TcpStream)> {
    daemon.supervisor.call(deadline, |endpoint| Ok((endpoint.clone(), connect_to(endpoint, deadline)?)))
}

/// A proven connection for an exchange.
fn connect_to(endpoint: &Endpoint, deadline: Instant) -> std::result::Result<TcpStream, CallError> {
    let stream = endpoint.connect(deadline)?;
    stream.set_nonblocking(true).map_err(|e| CallError::Gone(e.to_string()))?;
    Ok(stream)
}

/// The head for opencode. `authorization` takes the place of the client's spelling of it.
fn rewrite(
    request: &Head<'_>,
    target: &str,
    directory: &Path,
    address: SocketAddrV4,
    authorization: Option<&str>,
    is_upgrade: bool,
) -> Vec<u8> {
    let mut head = format!("{} {target} HTTP/1.{}\r\nHost: {address}\r\n", request.method, request.version);
    head.push_str(if is_upgrade { "Connection: Upgrade\r\n" } else { "Connection: close\r\n" });
    if let Some(authorization) = authorization {
        head.push_str(&format!("Authorization: {authorization}\r\n"));
    }
    let encoded = percent_encode(directory.as_os_str().as_encoded_bytes());
    head.push_str(&format!("{DIRECTORY_HEADER}: {encoded}\r\n"));
    let mut head = head.into_bytes();
    let is_one_of =
        |names: &[&str], header: &httparse::Header<'_>| names.iter().any(|name| header.name.eq_ignore_ascii_case(name));
    for header in request.headers {
        let is_replaced =
            is_one_of(&["host", "authorization", TIMEOUT_HEADER], header) || is_one_of(&engine::PLACE_HEADERS, header);
        let keeps_upgrade = is_upgrade && is_one_of(&["upgrade"], header);
        // opencode needs the framing of the body, even if a client calls it a matter of its connection.
        let is_framing = is_one_of(&["content-length", "transfer-encoding"], header);
        let is_named = request.has_token("connection", header.name) && !is_framing;
        if keeps_upgrade || !(is_replaced || is_hop_by_hop(header.name) || is_named) {
            push_header(&mut head, header);
        }
    }
    head.extend_from_slice(b"\r\n");
    head
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::{Duration, Instant};

    use super::{Target, next_deadline, split, target};

    #[test]
    fn an_old_request_waits_for_the_next_opencode_as_long_as_a_new_one() {
        let begun = Instant::now();
        let (deadline, now) = (begun + Duration::from_secs(30), begun + Duration::from_secs(3600));
        assert_eq!(next_deadline(None, deadline, now).unwrap(), now + Duration::from_secs(30));
        assert_eq!(next_deadline(Some("30"), deadline, now).unwrap(), deadline);
    }

    #[test]
    fn only_the_place_is_taken_out_of_a_target() {
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
            let target = target(path, query, Path::new("/home/me"));
            assert_eq!((found.as_str(), target.as_str()), (selector, passed), "{given}");
        }
        for bad in ["/w/%zz/x", "/w/%ff/x", "/w/-/x"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}
