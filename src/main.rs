//! openwork keeps one `opencode serve` alive and routes its calls to many workspaces by
//! directory: a command line, and a daemon in the background.
//!
//! The modules; calls go down this list, never up or across:
//!
//! ```text
//! main         parse, run, report, exit status
//! args/        tables of commands and options; argv and environment to a Command
//! cli/         one function per command; writes no state, except to repair it
//!   client     finds, starts and asks the daemon
//!   daemon     start, stop, restart, status
//!   doctor     finds problems and says what to do
//!   workspace  the registry, and which workspace a selector means
//!   passthrough: OpenCode's own calls and clients: api, env, attach, run
//!   http       HTTP as api passes it through
//!   session    OpenCode's sessions, and the wait for their end
//!   import     takes over the workspaces of another program
//!   output     one value, printed for people or as JSON
//!   complete, manual, service: what packages ship, from the tables of args
//! daemon/      the background process
//!   gate        the public port: limits and policy, connections that serve one request after another
//!   connections limits the connections, and chooses those to close when slots run short
//!   head        the head of a request, parsed or refused
//!   reply       the replies that the daemon writes itself
//!   router      /w/<ws>/… and /api/…: checks credentials, finds the directory
//!   exchange    one routed request: copies bytes both ways
//!   control     the control plane behind the gate: tiny_http on a socket in the data directory
//!   api         its routes, one handler each
//!   crew        threads that wait for work and do it themselves, in turns
//!   supervisor  the one thread that owns opencode; its policy only decides
//!   engine      opencode itself: command line and protocol; v1 and v2 where the lines differ
//!   instances   loaded instances, their eviction, and fences around workspaces that kill opencode
//!   sessions    lists running sessions, and waits for their end
//!   events      publishes the daemon's events
//!   notify      notifies the service manager
//!   handover    restart in place: the process becomes the next daemon
//! state/       the state file, and the credentials
//!   records    its records of processes, binaries and ports
//!   store      the state in memory and on disk
//! repair       saves the readable parts of a broken state file
//! workspace    workspaces: ids, names, paths, URLs
//! wire         the types of the HTTP interface and of --json
//! agent        HTTP calls to a proven listener
//! line         the two lines of opencode, 1.x and 2.x, and their clients
//! service      the service of the user that plain opencode 2.x runs
//! framing      body framing, reply heads, percent coding
//! nearest      the known word that is nearest to an unknown one
//! timed        a deadline for a socket
//! system/      everything specific to Linux: processes, sockets, waiting, limits, hung mounts
//! options, lock, log, paths, error
//! ```
//!
//! `cli` and `daemon` share only the modules below both.

mod agent;
mod args;
mod cli;
mod daemon;
mod error;
mod framing;
mod line;
mod lock;
mod log;
mod nearest;
mod options;
mod paths;
mod repair;
mod service;
mod state;
mod system;
mod timed;
mod wire;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use daemon::Start;

fn main() -> ExitCode {
    let mut argv: Vec<OsString> = std::env::args_os().skip(1).collect();
    let start = match argv.first().and_then(|first| first.to_str()) {
        Some(daemon::engine::LAUNCH_COMMAND) => return daemon::engine::exec_once_recorded(&argv[1..]).into(),
        Some(cli::COMPLETE_COMMAND) => return cli::complete(&argv[1..]).into(),
        Some(cli::DETACHED_COMMAND) => Start::Detached,
        Some(daemon::handover::COMMAND) => Start::Successor,
        _ => return cli::main(&argv, Start::Foreground).into(),
    };
    argv[0] = "daemon".into();
    cli::main(&argv, start).into()
}
