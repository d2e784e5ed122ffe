//! The user's own service, which plain opencode 2.x runs: beside openwork's opencode, or shared.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{
    Host, SESSION, Signal, Stranger, basic, copy_program, fake_opencode, is_alive, kill, stat_field, wait_for,
    wait_gone,
};

/// A host whose daemons share the service.
fn sharing() -> Host {
    let mut host = Host::new();
    host.set("OPENWORK_SHARED", "1");
    host
}

/// The file of the registration.
fn registration(host: &Host) -> PathBuf {
    host.home().join(".local/state/opencode/service.json")
}

/// The registered service: its pid and its URL.
fn registered(host: &Host) -> (u32, String) {
    let text = fs::read_to_string(registration(host)).expect("a registration");
    let registered: Value = serde_json::from_str(&text).unwrap();
    (registered["pid"].as_u64().unwrap() as u32, registered["url"].as_str().unwrap().to_owned())
}

/// Registers a process as the service.
fn register(host: &Host, url: &str, pid: u32, mode: u32) {
    let path = registration(host);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let registration = json!({"id": "x", "version": "2.3.2", "url": url, "pid": pid, "password": "of the service"});
    let new = path.with_extension("new");
    fs::write(&new, registration.to_string()).unwrap();
    fs::set_permissions(&new, Permissions::from_mode(mode)).unwrap();
    fs::rename(new, path).unwrap();
}

/// The user runs `opencode service start`, `restart` or `stop`.
fn opencode_service(host: &Host, verb: &str) {
    let mut command = Command::new(host.get("OPENWORK_OPENCODE_BIN"));
    command.args(["service", verb]).env_clear();
    command.envs(["PATH", "HOME", "FAKE_OPENCODE_DIR", "FAKE_VERSION"].map(|name| (name, host.get(name))));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    assert!(command.status().unwrap().success(), "opencode service {verb}");
}

/// The commands that the service got, in order.
fn orders(host: &Host) -> Vec<String> {
    let verb = |line: &String| serde_json::from_str::<Value>(line).unwrap()["argv"][0].as_str().unwrap().to_owned();
    host.recorded("services").iter().map(verb).collect()
}

/// The pid of the daemon's opencode, if it is ready.
fn ready_pid(host: &Host) -> Option<u32> {
    let health = host.health();
    (health["ok"] == true).then(|| health["opencode"]["pid"].as_u64().unwrap() as u32)
}

// --- Beside openwork's own ---

#[test]
fn foreign_service_is_announced_once_and_shown() {
    let mut host = Host::new();
    host.set("OPENWORK_TEST_PACE", "20");
    let started = host.openwork(["daemon", "start"]).ok();
    assert!(!started.stderr.contains("plain `opencode`"), "{started:?}");
    assert_eq!(
        (&host.health()["engine"]["shared"], &host.health()["engine"]["service"]),
        (&json!(false), &Value::Null)
    );

    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", socket.local_addr().unwrap());
    // A registration that others could have written, or that names another process, does not count.
    register(&host, &url, std::process::id(), 0o644);
    assert!(!host.openwork(["status"]).ok().stdout.contains("plain `opencode`"));
    register(&host, &url, host.daemon_pid(), 0o600);
    assert!(!host.openwork(["status"]).ok().stdout.contains("plain `opencode`"));
    register(&host, &url, std::process::id(), 0o600);
    wait_for("the service to be seen", || host.health()["engine"]["service"] == json!(url));
    for times in [1, 0] {
        let told = host.openwork(["workspace", "add", host.project("a").to_str().unwrap()]).ok();
        assert_eq!(told.stderr.matches(&format!("a server of its own on {url}")).count(), times, "{told:?}");
        assert_eq!(told.stderr.matches("--shared").count(), times, "{told:?}");
    }
    let status = host.openwork(["status"]).ok().stdout;
    assert!(status.contains(&format!("a server of its own on {url}")) && status.contains("--shared"), "{status}");
    let doctor = host.openwork(["doctor"]).output().stdout;
    assert!(doctor.contains("a server of its own") && doctor.contains("daemon restart --all --shared"), "{doctor}");
    drop(socket);
    wait_for("its end to be seen", || host.health()["engine"]["service"] == Value::Null);
}

// --- Shared ---

#[test]
fn running_service_is_used_and_outlives_the_daemon() {
    let mut host = sharing();
    let (a, b) = (host.project("a"), host.project("b"));
    opencode_service(&host, "start");
    let (service, url) = registered(&host);
    // The service must not inherit the shell's variables about another server.
    host.set("OPENWORK_ENGINE", "of an agent");
    host.openwork(["daemon", "start"]).ok();
    host.add(&a);
    host.add(&b);
    let health = host.health();
    assert_eq!((ready_pid(&host), &health["opencode"]["baseUrl"]), (Some(service), &json!(url)));
    assert_eq!((&health["engine"]["shared"], &health["engine"]["service"]), (&json!(true), &Value::Null));
    // The wall-clock time of its start, although openwork did not start it.
    let [opencode, daemon] = ["opencode", "daemon"].map(|one| health[one]["startedAt"].as_u64().unwrap());
    assert!(opencode.abs_diff(daemon) < 600_000, "{health}");
    let status = host.openwork(["status"]).ok().stdout;
    assert!(status.contains("the server that plain `opencode` uses too"), "{status}");
    assert_eq!((orders(&host), host.starts().len()), (vec!["start".to_owned()], 1));

    // Clients and routed calls use the password of the service.
    host.openwork(["workspace", "path", "a"]).ok();
    assert_eq!(host.routed("GET", "/w/a/api/location").send().json()["directory"], json!(a));
    let at_root = format!("/api/location?location%5Bdirectory%5D={}", b.display());
    assert_eq!(host.routed("GET", &at_root).send().json()["directory"], json!(b));
    host.openwork(["workspace", "switch", "b"]).ok();
    assert_eq!(host.routed("GET", "/w/@active/api/location").send().json()["directory"], json!(b));
    let of_openwork = basic("opencode", &host.password());
    host.http("GET", "/w/a/api/location").header("Authorization", of_openwork).fails(401, "unauthorized");
    assert_eq!(host.openwork(["api", "a", "/api/location"]).json()["body"]["directory"], json!(a));
    let password = host.recorded("passwords").pop().unwrap();
    let env = host.openwork(["env", "a"]).secret().ok().stdout;
    assert!(env.contains(&format!("export OPENCODE_PASSWORD='{password}'\n")));
    host.openwork(["run", "-w", "a", "hello"]).ok();
    let client: Value = serde_json::from_str(&host.recorded("clients")[0]).unwrap();
    let environment = host.environment(client["pid"].as_u64().unwrap() as u32);
    assert!(environment.contains(&format!("OPENCODE_PASSWORD={password}")));

    // The service outlives a restart, a kill and a stop of the daemon.
    host.openwork(["daemon", "restart"]).ok();
    assert_eq!(ready_pid(&host), Some(service));
    let daemon = host.daemon_pid();
    kill(daemon, Signal::KILL);
    wait_gone(daemon);
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(ready_pid(&host), Some(service));
    host.busy(&[&a]);
    let stopped = host.openwork(["daemon", "stop"]).ok();
    assert!(stopped.stdout.contains("the shared opencode keeps running"), "{stopped:?}");
    assert!(!stopped.stdout.contains("ended the running turn"), "{stopped:?}");
    assert!(is_alive(service));
    assert_eq!(host.processes(), [service]);
    assert_eq!((host.recorded("signals"), orders(&host)), (vec![], vec!["start".to_owned()]));

    // `--all` stops the service.
    host.openwork(["daemon", "start"]).ok();
    let stopped = host.openwork(["daemon", "stop", "--all"]).json();
    assert_eq!(stopped["sessions"][0]["workspace"]["name"], "a");
    assert!(!is_alive(service) && host.processes().is_empty());
    assert_eq!(orders(&host), ["start", "stop"]);
}

#[test]
fn service_is_started_on_demand_by_its_own_command() {
    let host = sharing();
    let a = host.project("a");
    host.add(&a);
    wait_for("the look for it", || host.phase() == "waiting");
    let status = host.openwork(["status"]).ok().stdout;
    assert!(status.contains("plain `opencode` has no server now"), "{status}");
    assert_eq!((orders(&host), host.health()["opencode"].clone()), (vec![], Value::Null));
    assert_eq!(host.openwork(["instance", "list"]).json()["instances"][0]["state"], "cold");
    assert_eq!(host.openwork(["wait", "--all"]).ok().stdout, "no session is running\n");

    host.openwork(["api", "a", "/api/location"]).ok();
    let (service, _) = registered(&host);
    assert_eq!((ready_pid(&host), orders(&host)), (Some(service), vec!["start".to_owned()]));
    assert_eq!(stat_field(service, SESSION), u64::from(service), "in a session of its own");
    for variable in host.environment(service) {
        let name = variable.split('=').next().unwrap();
        assert!(!["OPENWORK_ENGINE", "OPENCODE_PASSWORD", "OPENCODE_SERVER_PASSWORD"].contains(&name), "{variable}");
    }
    // The user stops the service: it stays down until a request needs it.
    opencode_service(&host, "stop");
    wait_for("its end to be seen", || host.phase() == "waiting");
    let again = host.routed("GET", "/w/a/api/location").send();
    assert_eq!(again.json()["directory"], json!(a), "with the password that was its last");
    assert_eq!(orders(&host), ["start", "stop", "start"]);
    // The service is killed.
    let (service, _) = registered(&host);
    kill(service, Signal::KILL);
    wait_gone(service);
    host.openwork(["workspace", "path", "a"]).ok();
    assert_eq!(orders(&host), ["start", "stop", "start", "start"]);
}

#[test]
fn replaced_service_is_found_again() {
    let host = sharing();
    let a = host.project("a");
    host.openwork(["daemon", "start"]).ok();
    host.add(&a);
    let (first, first_url) = registered(&host);
    let before = host.credentials();
    opencode_service(&host, "restart");
    let (second, second_url) = registered(&host);
    assert!(first != second && first_url != second_url);
    // The password of the new service is accepted at once, even before the daemon has found the service.
    let location = host.routed("GET", "/w/a/api/location").send();
    assert_eq!((location.status, &location.json()["directory"]), (200, &json!(a)));
    wait_for("it to be found", || ready_pid(&host) == Some(second));
    host.http("GET", "/w/a/api/location").header("Authorization", before).fails(401, "unauthorized");
    // Also without a request.
    opencode_service(&host, "restart");
    let (third, _) = registered(&host);
    wait_for("it to be found", || ready_pid(&host) == Some(third));
    let asked = orders(&host).iter().filter(|verb| *verb == "start").count();
    assert!(asked <= 2, "{:?}", orders(&host));
    assert_eq!(host.openwork(["workspace", "path", "a"]).json()["path"]["directory"], json!(a));
}

#[test]
fn hung_service_is_restarted_by_its_own_command() {
    let mut host = sharing();
    host.set("OPENWORK_TEST_PACE", "20");
    host.openwork(["daemon", "start"]).ok();
    let (first, _) = registered(&host);
    host.hang(true);
    wait_for("it to be restarted", || orders(&host).last().is_some_and(|verb| verb == "restart"));
    host.hang(false);
    wait_for("the next one to be ready", || ready_pid(&host).is_some_and(|pid| pid != first));
    // The only signal comes from the service's own command.
    assert_eq!((host.recorded("signals").len(), orders(&host)), (1, vec!["start".to_owned(), "restart".to_owned()]));
}

#[test]
fn idle_instances_are_evicted_and_memory_is_limited_in_a_shared_service() {
    let mut host = sharing();
    host.set("OPENWORK_TEST_PACE", "20");
    host.set("OPENWORK_IDLE_TTL", "1s");
    host.set("OPENWORK_MAX_MEMORY", "60M");
    let (a, b) = (host.project("a"), host.project("b"));
    host.openwork(["daemon", "start"]).ok();
    host.add(&a);
    host.add(&b);
    let mut events = host.http("GET", "/events").events();
    host.busy(&[&a]);
    host.openwork(["workspace", "path", "a"]).ok();
    host.openwork(["workspace", "path", "b"]).ok();
    wait_for("the idle one to be disposed", || host.instance(&b) == ["load", "dispose"]);
    assert_eq!(host.instance(&a), ["load"]);
    assert!(host.openwork(["instance", "list"]).json()["memory"].as_u64().is_some_and(|bytes| bytes > 0));

    // The service is too large from its next start on, and is restarted as soon as no session runs.
    host.behave("FAKE_MEMORY=80000000");
    opencode_service(&host, "restart");
    let (large, _) = registered(&host);
    events.find(|event| event["type"] == "engine.oversize").expect("a warning");
    assert_eq!(orders(&host), ["start", "restart"]);
    host.behave("");
    host.busy(&[]);
    events.find(|event| event["type"] == "engine.recycled").expect("a restart");
    wait_for("the next one to be ready", || ready_pid(&host).is_some_and(|pid| pid != large));
    assert_eq!(orders(&host), ["start", "restart", "restart"]);
    assert_eq!(host.recorded("leaks"), [""; 0]);
}

#[test]
fn daemon_switches_to_the_service_and_back() {
    let mut host = Host::new();
    host.openwork(["daemon", "start"]).ok();
    let own = host.opencode_pid();
    opencode_service(&host, "start");
    let (service, _) = registered(&host);
    // Without `--all`, openwork's opencode keeps running, and so do its turns.
    let told = host.openwork(["daemon", "restart", "--shared"]).ok();
    assert!(told.stderr.contains("daemon restart --all"), "{told:?}");
    assert_eq!((ready_pid(&host), &host.health()["engine"]["shared"]), (Some(own), &json!(false)));
    assert_eq!(host.routed("GET", "/api/info").send().status, 200, "by the password of openwork's own");
    host.openwork(["daemon", "restart", "--all", "--shared"]).ok();
    assert_eq!((ready_pid(&host), is_alive(own)), (Some(service), false));
    // A service that is no longer shared keeps running.
    host.openwork(["daemon", "restart", "--all"]).ok();
    let own = ready_pid(&host).unwrap();
    assert!(own != service && is_alive(service));
    assert_eq!((orders(&host), host.recorded("signals").len()), (vec!["start".to_owned()], 1));
    assert_eq!(host.routed("GET", "/api/info").send().status, 200);

    // `--all` restarts a shared service.
    host.set("OPENWORK_SHARED", "true");
    host.openwork(["daemon", "restart", "--all"]).ok();
    host.openwork(["daemon", "restart", "--all"]).ok();
    assert!(!is_alive(service));
    assert_eq!(orders(&host), ["start", "stop", "start"]);
    host.openwork(["daemon", "stop", "--all"]).ok();
}

#[test]
fn opencode_1_x_has_no_service_to_share() {
    let host = sharing();
    host.behave("FAKE_VERSION=1.18.33");
    let error = host.openwork(["daemon", "start"]).fails(5, "opencode_unsupported");
    assert!(error["message"].as_str().unwrap().contains("1.18.33"), "{error}");
    assert!(error["message"].as_str().unwrap().contains("--shared needs 2.x"), "{error}");
    assert!(error["hint"].as_str().unwrap().contains("OPENWORK_SHARED"), "{error}");
    assert!(host.starts().is_empty());
}

#[test]
fn sharing_is_a_flag_or_a_variable() {
    let mut host = Host::new();
    host.exercises(["option --shared", "variable OPENWORK_SHARED"]);
    for (value, is_given) in [("1", true), ("true", true), ("0", false), ("false", false), ("", false)] {
        host.set("OPENWORK_SHARED", value);
        let unit = host.openwork(["service", "print"]).ok().stdout;
        assert_eq!(unit.contains(" --shared "), is_given, "{value:?}: {unit}");
    }
    assert!(host.openwork(["service", "print", "--shared"]).ok().stdout.contains(" --shared "));
    host.set("OPENWORK_SHARED", "yes");
    let error = host.openwork(["daemon", "start"]).fails(2, "usage");
    assert!(error["message"].as_str().unwrap().contains("OPENWORK_SHARED"), "{error}");
    host.unset("OPENWORK_SHARED");
    host.openwork(["daemon", "stop", "--keep-opencode", "--all"]).fails(2, "usage");
}

// --- Services that are not trusted ---

/// A socket that must not get a byte.
struct Impostor(TcpListener);

impl Impostor {
    fn new() -> Impostor {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        Impostor(socket)
    }

    fn url(&self) -> String {
        format!("http://{}", self.0.local_addr().unwrap())
    }

    fn port(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    #[track_caller]
    fn got_nothing(&self) {
        let error = self.0.accept().map(|_| ()).expect_err("a connection to an impostor");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }
}

/// Checks that starting the daemon fails, with this reason.
fn refused(host: &Host, why: &str) {
    let error = host.openwork(["daemon", "start"]).output();
    assert_eq!(error.status.code(), Some(5), "{error:?}");
    assert!(error.stderr.contains(why), "{error:?}");
    host.openwork(["daemon", "stop"]).ok();
}

#[test]
fn registration_writable_by_others_is_not_trusted() {
    let host = sharing();
    let impostor = Impostor::new();
    for mode in [0o644, 0o660, 0o602] {
        register(&host, &impostor.url(), std::process::id(), mode);
        refused(&host, "is open to other users");
    }
    register(&host, &impostor.url(), std::process::id(), 0o600);
    let elsewhere = host.path("elsewhere.json");
    fs::rename(registration(&host), &elsewhere).unwrap();
    symlink(&elsewhere, registration(&host)).unwrap();
    refused(&host, "cannot be read");
    impostor.got_nothing();
    assert!(host.starts().is_empty() && orders(&host).is_empty());
}

#[test]
fn service_may_register_late_but_must_register() {
    let host = sharing();
    host.behave("FAKE_SERVICE_LATE=0.5");
    host.openwork(["daemon", "start"]).ok();
    assert_eq!(ready_pid(&host), Some(registered(&host).0));
    host.openwork(["daemon", "stop", "--all"]).ok();
    host.behave("FAKE_SERVICE_LATE=never");
    refused(&host, "names no running service of this user");
    assert_eq!(host.starts().len(), 1);
}

#[test]
fn stop_does_not_wait_for_the_start_of_a_service() {
    let host = sharing();
    let hold = host.path("fake/hold-service");
    fs::write(&hold, "").unwrap();
    let starting = host.openwork(["daemon", "start", "--json"]).spawn();
    wait_for("the service to be ordered", || orders(&host) == ["start"]);
    host.openwork(["daemon", "stop"]).ok();
    assert_eq!(starting.wait().object()["error"]["code"], "opencode_unavailable");
    // The command belongs to the user like the service, and keeps running.
    fs::remove_file(&hold).unwrap();
    wait_for("the service to register", || registration(&host).exists());
    opencode_service(&host, "stop");
}

#[test]
fn service_that_cannot_be_stopped_is_reported() {
    let host = sharing();
    host.openwork(["daemon", "start"]).ok();
    let (service, _) = registered(&host);
    host.behave("FAKE_SERVICE_FAILS=1");
    host.openwork(["daemon", "stop", "--all"]).output();
    let log = fs::read_to_string(host.file("daemon.log")).unwrap();
    assert!(log.contains("service stop` ended with") && log.contains("no service today"), "{log}");
    assert!(is_alive(service), "openwork itself signals no service");
    host.behave("");
    opencode_service(&host, "stop");
    wait_gone(service);
}

#[test]
fn registration_naming_another_process_is_not_trusted() {
    let host = sharing();
    host.behave("FAKE_SERVICE_FAILS=1");
    let impostor = Impostor::new();
    let other = Stranger::idle();
    // A process of ours that does not hold the socket, and a pid without a process.
    for pid in [other.pid(), u32::MAX] {
        register(&host, &impostor.url(), pid, 0o600);
        refused(&host, "no service today");
    }
    // It is not even reported as a service beside openwork's own opencode.
    let own = host.openwork(["daemon", "start"]).env("OPENWORK_SHARED", "0").ok();
    assert!(!own.stderr.contains("a server of its own"), "{own:?}");
    assert_eq!(host.health()["engine"]["service"], Value::Null);
    impostor.got_nothing();
    assert!(is_alive(other.pid()), "it is nobody's to end");
    // A service outside loopback.
    host.openwork(["daemon", "stop"]).ok();
    register(&host, &format!("http://0.0.0.0:{}", impostor.port().port()), std::process::id(), 0o600);
    refused(&host, "on 127.0.0.1 only");
    impostor.got_nothing();
}

mod as_root {
    use super::*;
    use crate::support::NOBODY;
    use std::os::unix::fs::chown;
    use std::os::unix::process::CommandExt;

    /// A host of an unprivileged user; we are root here.
    fn of_nobody() -> Host {
        let mut host = Host::unprivileged();
        host.set("OPENWORK_SHARED", "1");
        host
    }

    #[test]
    #[ignore = "needs root, to be another user"]
    fn registration_of_another_user_is_not_trusted() {
        let host = of_nobody();
        let impostor = Impostor::new();
        // A file of root in the home directory of the user.
        register(&host, &impostor.url(), std::process::id(), 0o600);
        for directory in [".local", ".local/state", ".local/state/opencode"] {
            chown(host.home().join(directory), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        refused(&host, "cannot be read");
        // A readable file of another user.
        fs::set_permissions(registration(&host), Permissions::from_mode(0o644)).unwrap();
        refused(&host, "belongs to another user");
        impostor.got_nothing();
        assert!(host.starts().is_empty() && orders(&host).is_empty());
    }

    #[test]
    #[ignore = "needs root, to be another user"]
    fn registration_naming_a_process_of_another_user_is_not_trusted() {
        // Root may inspect any process, but this one belongs to another user.
        let host = sharing();
        host.behave("FAKE_SERVICE_FAILS=1");
        let theirs = host.path("theirs");
        copy_program(fake_opencode(), &theirs);
        for path in [host.path("."), theirs.clone()] {
            fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
        }
        let port = crate::support::free_port();
        let mut other = Command::new(&theirs);
        other.args(["serve", "--hostname", "127.0.0.1", "--port", &port.to_string()]).env_clear();
        other.env("FAKE_VERSION", "2.3.2").env("HOME", "/").uid(NOBODY).gid(NOBODY).current_dir("/");
        let other = Stranger::new(other.stdin(Stdio::null()).stdout(Stdio::null()));
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        wait_for("the other user's server", || std::net::TcpStream::connect(address).is_ok());
        register(&host, &format!("http://{address}"), other.pid(), 0o600);
        assert_eq!(fs::metadata(registration(&host)).unwrap().permissions().mode() & 0o777, 0o600);
        refused(&host, "no service today");
        let log = fs::read_to_string(host.file("daemon.log")).unwrap();
        assert!(!log.contains("found the opencode service"), "{log}");
    }
}
