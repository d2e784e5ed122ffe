//! The credentials of opencode, in their own file, and random bytes.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::file::{read_whole, read_whole_unchanged, write_whole};
use crate::error::{Error, Result};
use crate::paths::DataDir;
use crate::wire::from_json;

/// The hint about an invalid credentials file.
const AUTH_HINT: &str =
    "nothing was changed; restore the file, or end opencode and remove it: the next daemon makes a new password";

/// The variables that give a daemon its credentials for opencode, as for OpenWork's own orchestrator.
pub const USERNAME_VARIABLE: &str = "OPENWORK_OPENCODE_USERNAME";
/// See [`USERNAME_VARIABLE`].
pub const PASSWORD_VARIABLE: &str = "OPENWORK_OPENCODE_PASSWORD";

/// The credentials of opencode, generated once and kept.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Auth {
    /// The user name of the Basic credentials.
    pub opencode_username: String,
    /// The password: 32 random bytes as hex.
    pub opencode_password: String,
    /// Fields of other versions.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Auth {
    /// Reads the credentials, and creates them when there are none. A user name or password in the
    /// environment permanently replaces the stored one: commands read the file.
    ///
    /// # Errors
    /// `state_corrupt` when the file is invalid: a new password would lock us out of an opencode that runs
    /// with the old one. `usage` when credentials in the environment cannot be sent over HTTP.
    pub fn load_or_create(data_dir: &DataDir) -> Result<Auth> {
        let path = data_dir.auth();
        let (auth, is_stored) = Auth::load(&path)?;
        if !is_stored {
            write_whole(&path, &auth)?;
        }
        Ok(auth)
    }

    /// Checks that a daemon with this process's environment could load its credentials; changes nothing.
    ///
    /// # Errors
    /// As for [`Auth::load_or_create`].
    pub fn check_loading(data_dir: &DataDir) -> Result<()> {
        Auth::load(&data_dir.auth()).map(drop)
    }

    /// The credentials, and whether they are stored already.
    fn load(path: &Path) -> Result<(Auth, bool)> {
        let (username, password) = (variable(USERNAME_VARIABLE)?, variable(PASSWORD_VARIABLE)?);
        let stored = Auth::read(path)?;
        let is_stored = stored.is_some() && username.is_none() && password.is_none();
        let mut auth = match stored {
            Some(auth) => auth,
            None => {
                let opencode_password = random_hex::<32>()?;
                Auth { opencode_username: "opencode".to_owned(), opencode_password, extra: Map::new() }
            }
        };
        auth.opencode_username = username.unwrap_or(auth.opencode_username);
        auth.opencode_password = password.unwrap_or(auth.opencode_password);
        auth.check().map_err(|why| Error::usage(format!("{USERNAME_VARIABLE}, {PASSWORD_VARIABLE}: {why}")))?;
        Ok((auth, is_stored))
    }

    /// Checks that opencode can use these credentials and HTTP can carry them.
    fn check(&self) -> std::result::Result<(), &'static str> {
        let (name, password) = (&self.opencode_username, &self.opencode_password);
        // Without a password any local process could make opencode run anything.
        if name.is_empty() || password.is_empty() {
            return Err("the user name or the password is empty");
        }
        if name.contains(|c: char| c == ':' || c.is_control()) || password.contains(char::is_control) {
            return Err("the user name or the password has a character that cannot be sent");
        }
        Ok(())
    }

    /// Reads the credentials; none when there is no file.
    ///
    /// # Errors
    /// `state_corrupt`, as for [`Auth::load_or_create`].
    pub fn read(path: &Path) -> Result<Option<Auth>> {
        read_whole(path, AUTH_HINT)?.map(|(bytes, _)| Auth::parse(path, &bytes)).transpose()
    }

    /// The same, without changing the mode of the file.
    ///
    /// # Errors
    /// As [`Auth::read`].
    pub fn read_unchanged(path: &Path) -> Result<Option<Auth>> {
        read_whole_unchanged(path, AUTH_HINT)?.map(|(bytes, _)| Auth::parse(path, &bytes)).transpose()
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Auth> {
        let corrupt = |why: String| Error::StateCorrupt { path: path.to_owned(), why, hint: AUTH_HINT };
        let auth: Auth = from_json(bytes).map_err(|e| corrupt(format!("not a credentials file: {e}")))?;
        auth.check().map_err(|why| corrupt(why.to_owned()))?;
        Ok(auth)
    }
}

/// An environment variable, if it is set and not empty.
fn variable(name: &str) -> Result<Option<String>> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty());
    value.map(|value| value.into_string().map_err(|_| Error::usage(format!("{name} is not UTF-8")))).transpose()
}

/// Random bytes from the kernel.
pub fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let source = Path::new("/dev/urandom");
    let mut bytes = [0; N];
    File::open(source).and_then(|mut file| file.read_exact(&mut bytes)).map_err(|e| Error::io("read", source, e))?;
    Ok(bytes)
}

/// Random bytes as hex.
pub fn random_hex<const N: usize>() -> Result<String> {
    Ok(random_bytes::<N>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}
