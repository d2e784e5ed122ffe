//! The arguments and options given to a command.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::PathBuf;

use super::options::{OPTIONS, OptionRow};
use super::values;
use crate::error::{Error, Result};
use crate::options::{DEFAULT_IDLE_TTL, EngineOptions, Options, SHARED};

/// A parsed command line, with the environment for options that it does not set.
pub struct Given<'e> {
    /// The arguments of the command.
    pub words: VecDeque<OsString>,
    /// The arguments for opencode, for commands that pass them on.
    pub trailing: Vec<OsString>,
    /// The given options, each with its values in order.
    pub options: Vec<(&'static OptionRow, Vec<OsString>)>,
    /// The long names of the options that were last given by their short names.
    pub shortened: Vec<&'static str>,
    /// Looks up a variable of the environment.
    pub env: &'e dyn Fn(&str) -> Option<OsString>,
}

impl Given<'_> {
    /// Whether a flag was given.
    pub fn has(&self, name: &str) -> bool {
        self.options().any(|row| row.name == name)
    }

    /// An option by the name that the user typed, for messages: the short one, or this long one.
    pub fn typed(&self, name: &'static str) -> &'static str {
        let row = OPTIONS.iter().find(|row| row.name == name).filter(|_| self.shortened.contains(&name));
        row.and_then(|row| row.short).unwrap_or(name)
    }

    /// The options that were given.
    pub fn options(&self) -> impl Iterator<Item = &'static OptionRow> {
        self.options.iter().map(|(row, _)| *row)
    }

    /// The values of a repeatable option, in order.
    pub fn values(&self, name: &str) -> Vec<OsString> {
        self.options.iter().find(|(row, _)| row.name == name).map_or_else(Vec::new, |(_, values)| values.clone())
    }

    /// The value of an option: the last one given, else its environment variable.
    pub fn value(&self, name: &str) -> Option<OsString> {
        self.values(name).pop().or_else(|| self.variable(name))
    }

    /// The value of the variable that an option has in the environment.
    fn variable(&self, name: &str) -> Option<OsString> {
        (self.env)(OPTIONS.iter().find(|row| row.name == name)?.env?)
    }

    /// Takes the next argument, which the table of commands guarantees.
    pub fn next(&mut self) -> OsString {
        self.words.pop_front().unwrap_or_default()
    }

    /// Takes the next argument, if there is one.
    pub fn optional(&mut self) -> Option<OsString> {
        self.words.pop_front()
    }

    /// The value of `--name`; the daemon checks whether it is a valid name.
    pub fn name(&self) -> Result<Option<String>> {
        self.value("--name").map(values::name).transpose()
    }

    /// The arguments for opencode.
    pub fn take_trailing(&mut self) -> Vec<OsString> {
        std::mem::take(&mut self.trailing)
    }

    /// The options of a daemon.
    ///
    /// # Errors
    /// `usage`.
    pub fn daemon_options(&self) -> Result<Options> {
        if let Some(host) = self.value("--daemon-host") {
            if host != "127.0.0.1" && host != "localhost" {
                return Err(values::not_loopback("--daemon-host", "127.0.0.1", &host));
            }
        }
        let port = |name| self.value(name).map(|port| values::port(name, &port)).transpose();
        let binary = self.value("--opencode-bin").map(PathBuf::from);
        if binary.as_ref().is_some_and(|binary| binary.as_os_str().is_empty()) {
            return Err(Error::usage("--opencode-bin needs a value (FILE)"));
        }
        let host = self.value("--opencode-host").map(|host| values::opencode_host(&host)).transpose()?;
        let idle_ttl = match self.value("--idle-ttl") {
            Some(text) => values::duration("--idle-ttl", &text)?,
            None => DEFAULT_IDLE_TTL,
        };
        let variable = self.variable(SHARED).map(|value| values::switch(SHARED, &value)).transpose()?;
        let shared = self.has(SHARED) || variable.unwrap_or_default();
        let max_memory = self.value("--max-memory").map(|size| values::bytes("--max-memory", &size)).transpose()?;
        Ok(Options {
            port: port("--daemon-port")?,
            engine: EngineOptions { binary, port: port("--opencode-port")?, host, max_memory, shared },
            idle_ttl: Some(idle_ttl).filter(|ttl| !ttl.is_zero()),
            origins: self
                .values("--cors")
                .into_iter()
                .filter(|o| o != values::ANY_ORIGIN)
                .map(values::origin)
                .collect::<Result<_>>()?,
        })
    }
}
