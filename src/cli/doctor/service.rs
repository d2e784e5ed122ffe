//! Checks of the unit for systemd: whether it is installed, what it would run, and whether it runs the daemon.

use std::fs;
use std::path::{Path, PathBuf};

use super::Findings;
use crate::paths::{self, DataDir};
use crate::system::process;

const SERVICE: &str = "service";
/// The name that the documentation gives the unit.
const UNIT: &str = "openwork.service";
/// See [`UNIT`].
const SOCKET_UNIT: &str = "openwork.socket";

/// Checks the unit of this user.
pub fn unit(findings: &mut Findings, data_dir: &DataDir, daemon: Option<u32>) {
    let places = places();
    let Some(path) = places.iter().map(|place| place.join(UNIT)).find(|path| fs::symlink_metadata(path).is_ok()) else {
        return findings.ok(SERVICE, "no systemd unit is installed; commands start the daemon");
    };
    let shown = path.display();
    if fs::canonicalize(&path).is_ok_and(|target| target == Path::new("/dev/null")) {
        return findings.ok(SERVICE, format!("{shown} is masked; commands start the daemon"));
    }
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) => {
            let hint = "install it again: `openwork service print` writes one";
            return findings.wrong(SERVICE, format!("cannot read {shown}: {e}"), hint);
        }
    };
    let again = format!("write it again: `openwork service print > {shown}`, then `systemctl --user daemon-reload`");
    let command = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap_or_default();
    let words = words(command);
    let Some(program) = words.first().map(Path::new) else {
        return findings.wrong(SERVICE, format!("{shown} starts nothing"), again);
    };
    if !program.is_file() {
        return findings.wrong(SERVICE, format!("{shown} starts {}, which does not exist", program.display()), again);
    }
    let resolved = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let ourselves = std::env::current_exe().map(|path| resolved(&path)).unwrap_or_default();
    if resolved(program) != ourselves {
        findings.warning(SERVICE, format!("{shown} starts another openwork: {}", program.display()), again.clone());
    }
    let named = words.iter().find_map(|word| word.strip_prefix("--data-dir="));
    let default = DataDir::resolve(None, std::env::var_os("XDG_DATA_HOME").as_deref().map(Path::new));
    let theirs = named.map(PathBuf::from).or_else(|| default.ok().map(|default| default.path().to_owned()));
    if theirs.is_some_and(|theirs| resolved(&theirs) != resolved(data_dir.path())) {
        let message = format!("{shown} is for another data directory than {}", data_dir.path().display());
        findings.warning(SERVICE, message, again);
    }
    let is_enabled = |unit: &str, target: &str| {
        places.iter().any(|place| fs::symlink_metadata(place.join(format!("{target}.wants")).join(unit)).is_ok())
    };
    let enabled = is_enabled(UNIT, "default.target") || is_enabled(SOCKET_UNIT, "sockets.target");
    match (enabled, daemon) {
        (true, Some(pid)) if !process::is_of_unit(pid, UNIT) => {
            let message = format!("{shown} is enabled, and the daemon that runs was started by a command");
            findings.warning(SERVICE, message, "at the next login systemd starts it; until then nothing restarts it");
        }
        (true, _) => findings.ok(SERVICE, format!("{shown} is enabled")),
        (false, _) => findings.ok(SERVICE, format!("{shown} is installed and not enabled; commands start the daemon")),
    }
}

/// The directories of a user's units, by precedence (systemd.unit(5), "User Unit Search Path").
fn places() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = paths::home().ok();
    let config = variable("XDG_CONFIG_HOME").or_else(|| Some(home.as_ref()?.join(".config")));
    let data = variable("XDG_DATA_HOME").or_else(|| Some(home.as_ref()?.join(".local/share")));
    let own = [config.map(|path| path.join("systemd/user")), Some("/etc/systemd/user".into())];
    let rest = [data.map(|path| path.join("systemd/user")), Some("/usr/local/lib/systemd/user".into())];
    own.into_iter().chain(rest).flatten().chain([PathBuf::from("/usr/lib/systemd/user")]).collect()
}

/// The words of a command line in a unit (systemd.service(5), "Command lines"), as far as
/// `openwork service print` uses them: quotes, and doubled `%` and `$`.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut rest = line.trim().chars();
    while let Some(c) = rest.next() {
        match c {
            '"' | '\'' if quote == Some(c) => quote = None,
            '"' | '\'' if quote.is_none() => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            ' ' if quote.is_none() => words.extend(word.take()),
            '\\' | '%' | '$' => word.get_or_insert_default().extend(rest.next()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::words;

    #[test]
    fn unit_command_line_is_parsed_like_systemd() {
        assert_eq!(words("/usr/bin/openwork daemon"), ["/usr/bin/openwork", "daemon"]);
        assert_eq!(
            words(r#""/a b/o%%p" daemon "--data-dir=/x \"$$y\"""#),
            ["/a b/o%p", "daemon", r#"--data-dir=/x "$y""#]
        );
        assert_eq!(words(""), [""; 0]);
    }
}
