//! HTTP calls with ureq to a proven listener: to opencode, and from the command line to the daemon.
//!
//! Invariant: no byte is sent before the connection is proven. The code that makes a [`Listener`] has checked
//! that the right process holds the listening socket. While that socket listens, no other can listen at the
//! address; so if it still listens after the connect, the connection leads to it.
//!
//! One request per connection, no proxies, no redirects; an error status is a reply like any other.

use std::io;
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ureq::config::Config;
use ureq::http::{Request, Response, Uri};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{ConnectionDetails, Connector, NextTimeout, TcpConnector, Transport};
use ureq::{Agent, Body};

use crate::system::{socket, wait};

/// What a call reads at once; also the longest head of a reply. ureq fills a buffer with zeros before its
/// use, which takes 0.1 ms for its default of 128 KiB. Bytes.
const INPUT_BUFFER: usize = 32 * 1024;
/// What a call writes at once; also the longest line of a request, which has a path of 4,096 bytes at most,
/// percent-encoded. Bytes.
const OUTPUT_BUFFER: usize = 16 * 1024;

/// A listening socket on loopback, known to be held by the right process.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Where it listens.
    pub address: SocketAddrV4,
    /// The inode of the socket.
    pub socket: u32,
    /// The process that holds the socket, or the leader of that process's group.
    pub process: Arc<OwnedFd>,
}

impl Listener {
    /// A proven connection, for use without ureq.
    ///
    /// # Errors
    /// `TimedOut` at the deadline; `ConnectionRefused` when the listener has gone; those of the
    /// operating system.
    pub fn connect(&self, deadline: Instant) -> io::Result<TcpStream> {
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let stream = TcpStream::connect_timeout(&self.address.into(), rest)?;
        self.prove()?;
        // Requests and events are small and latency matters.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    /// Checks that a connection made just now leads to this listener.
    ///
    /// # Errors
    /// `ConnectionRefused` when it does not; those of the operating system.
    fn prove(&self) -> io::Result<()> {
        let refused = |why| Err(io::Error::new(io::ErrorKind::ConnectionRefused, why));
        if wait::has_ended(&self.process) {
            return refused("the process has ended");
        }
        match socket::listening_inode(self.address)? {
            Some(inode) if inode == self.socket => Ok(()),
            _ => refused("it no longer listens"),
        }
    }

    /// An agent all of whose connections lead to this listener.
    pub fn agent(&self) -> Agent {
        let config = Config::builder()
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections(0)
            .input_buffer_size(INPUT_BUFFER)
            .output_buffer_size(OUTPUT_BUFFER)
            .http_status_as_error(false)
            .build();
        Agent::with_parts(config, ().chain(TcpConnector::default()).chain(Proof(self.clone())), Fixed(self.address))
    }
}

/// How long a call may take.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// The deadline for the whole reply.
    Whole(Instant),
    /// The deadline for the head of the reply; the body is a stream without one.
    Head(Instant),
}

/// Makes a call and reads the head of the reply. `target` is in origin form, encoded.
///
/// # Errors
/// Those of ureq; see [`is_timeout`].
pub fn call(
    agent: &Agent,
    address: SocketAddrV4,
    (method, target): (&str, &str),
    headers: &[(&str, &str)],
    body: Option<&[u8]>,
    limit: Limit,
) -> Result<Response<Body>, ureq::Error> {
    let mut request = Request::builder().method(method).uri(format!("http://{address}{target}"));
    // Each connection serves one request.
    for (name, value) in headers.iter().chain(&[("Connection", "close")]) {
        request = request.header(*name, *value);
    }
    // ureq would take zero as no limit.
    let rest = |at: Instant| Some(at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
    macro_rules! run {
        ($body:expr) => {{
            let request = agent.configure_request(request.body($body)?);
            agent.run(match limit {
                Limit::Whole(at) => request.timeout_global(rest(at)).build(),
                Limit::Head(at) => request
                    .timeout_connect(rest(at))
                    .timeout_send_request(rest(at))
                    .timeout_recv_response(rest(at))
                    .build(),
            })
        }};
    }
    match body {
        Some(body) => run!(body),
        None => run!(()),
    }
}

/// Whether a call timed out.
pub fn is_timeout(e: &ureq::Error) -> bool {
    match e {
        ureq::Error::Timeout(_) => true,
        ureq::Error::Io(e) => matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock),
        _ => false,
    }
}

/// Whether reading a body timed out.
pub fn is_io_timeout(e: &io::Error) -> bool {
    let inner = e.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>());
    e.kind() == io::ErrorKind::TimedOut || inner.is_some_and(is_timeout)
}

/// Proves each connection before the first byte; chained behind ureq's TCP connector.
#[derive(Debug)]
struct Proof(Listener);

impl<In: Transport> Connector<In> for Proof {
    type Out = In;

    fn connect(&self, _: &ConnectionDetails<'_>, chained: Option<In>) -> Result<Option<In>, ureq::Error> {
        self.0.prove()?;
        Ok(chained)
    }
}

/// Resolves every name to one address, without a lookup.
#[derive(Debug)]
struct Fixed(SocketAddrV4);

impl Resolver for Fixed {
    fn resolve(&self, _: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        // `from_fn` fills the slots, but the list is still empty.
        let mut addresses = ResolvedSocketAddrs::from_fn(|_| SocketAddr::V4(self.0));
        addresses.push(SocketAddr::V4(self.0));
        Ok(addresses)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use super::*;
    use crate::system::process;

    fn listener(socket: &TcpListener) -> Listener {
        let SocketAddr::V4(address) = socket.local_addr().unwrap() else { panic!("not IPv4") };
        let inode = socket::listening_inode(address).unwrap().unwrap();
        Listener { address, socket: inode, process: Arc::new(process::open(std::process::id()).unwrap().unwrap()) }
    }

    fn soon() -> Limit {
        Limit::Whole(Instant::now() + Duration::from_secs(10))
    }

    #[test]
    fn reply_with_an_error_status_is_read() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let listener = listener(&socket);
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = socket.accept().unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n{}") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    request.push(byte[0]);
                }
                let request = String::from_utf8(request).unwrap().to_ascii_lowercase();
                assert!(request.starts_with("post /x?y=%2f http/1.1\r\n") && request.contains("content-length: 2\r\n"));
                stream.write_all(b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nno").unwrap();
            });
            let headers = [("Content-Type", "application/json")];
            let target = ("POST", "/x?y=%2F");
            let mut reply = call(&listener.agent(), listener.address, target, &headers, Some(b"{}"), soon()).unwrap();
            assert_eq!(reply.status().as_u16(), 503);
            assert_eq!(reply.body_mut().read_to_vec().unwrap(), b"no");
        });
    }

    #[test]
    fn impostor_at_the_address_gets_no_byte() {
        let before = TcpListener::bind("127.0.0.1:0").unwrap();
        let listener = listener(&before);
        drop(before);
        let impostor = TcpListener::bind(listener.address).unwrap();
        let headers = [("Authorization", "Basic secret")];
        for body in [None, Some(&b"secret"[..])] {
            let method = if body.is_some() { "POST" } else { "GET" };
            let error = call(&listener.agent(), listener.address, (method, "/"), &headers, body, soon()).unwrap_err();
            assert!(matches!(&error, ureq::Error::Io(e) if e.kind() == io::ErrorKind::ConnectionRefused), "{error}");
            let (mut stream, _) = impostor.accept().unwrap();
            assert_eq!(stream.read(&mut [0; 64]).unwrap(), 0, "bytes for an impostor");
        }
        let error = listener.connect(Instant::now() + Duration::from_secs(10)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn silent_listener_times_out() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let listener = listener(&socket);
        for limit in [Limit::Whole, Limit::Head] {
            let limit = limit(Instant::now() + Duration::from_millis(50));
            let error = call(&listener.agent(), listener.address, ("GET", "/"), &[], None, limit).unwrap_err();
            assert!(is_timeout(&error), "{error}");
        }
    }
}
