//! The running sessions and their directories, requested from opencode without loading an instance, and
//! cached.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use super::Instances;
use crate::daemon::engine::{CallResult, Endpoint, Running};
use crate::line::Line;

/// The most sessions whose directories are cached, at some hundred bytes each.
const SESSIONS: usize = 4096;

impl Instances {
    /// The ids of the sessions that run in an instance. 1.x loads the instance.
    ///
    /// # Errors
    /// Those of the calls: a failure never counts as no sessions.
    pub fn running(&self, endpoint: &Endpoint, directory: &str, deadline: Instant) -> CallResult<Vec<String>> {
        match endpoint.running(Path::new(directory), deadline)? {
            Running::Here(sessions) => Ok(sessions),
            Running::Anywhere(sessions) => {
                let mut here = Vec::new();
                for id in sessions {
                    if self.session_directory(endpoint, &id, deadline)?.as_deref() == Some(directory) {
                        here.push(id);
                    }
                }
                Ok(here)
            }
        }
    }

    /// The directory and id of each running session, in one directory or in all. Loads no instance.
    ///
    /// # Errors
    /// Those of the calls: a failure never counts as no sessions.
    pub fn all_running(
        &self,
        endpoint: &Endpoint,
        only: Option<&str>,
        deadline: Instant,
    ) -> CallResult<Vec<(String, String)>> {
        let mut running = Vec::new();
        match endpoint.line {
            // Sessions run only in loaded instances.
            Line::V1 => {
                for directory in self.loaded().into_iter().filter(|directory| only.is_none_or(|only| only == directory))
                {
                    let ids = self.running(endpoint, &directory, deadline)?;
                    running.extend(ids.into_iter().map(|id| (directory.clone(), id)));
                }
            }
            // One call covers all directories, including those whose instance was disposed.
            Line::V2 => {
                let (Running::Here(ids) | Running::Anywhere(ids)) = endpoint.running(Path::new("/"), deadline)?;
                for id in ids {
                    let directory = self.session_directory(endpoint, &id, deadline)?;
                    let directory = directory.filter(|directory| only.is_none_or(|only| only == directory));
                    running.extend(directory.map(|directory| (directory, id)));
                }
            }
        }
        Ok(running)
    }

    /// Whether any session runs. 1.x is asked about each of these loaded instances.
    ///
    /// # Errors
    /// Those of the calls: a failure never counts as no sessions.
    pub fn any_running(&self, endpoint: &Endpoint, loaded: &[String], deadline: Instant) -> CallResult<bool> {
        match endpoint.line {
            Line::V1 => {}
            // One call covers all directories.
            Line::V2 => return Ok(!endpoint.running(Path::new("/"), deadline)?.is_empty()),
        }
        for directory in loaded {
            if !endpoint.running(Path::new(directory), deadline)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The directory of a session, from the cache or from opencode; `None` when opencode has no such session.
    ///
    /// # Errors
    /// Those of the call.
    pub fn session_directory(&self, endpoint: &Endpoint, id: &str, deadline: Instant) -> CallResult<Option<String>> {
        if let Some(directory) = self.sessions().get(id) {
            return Ok(Some(directory.clone()));
        }
        let directory = endpoint.session_directory(id, deadline)?;
        if let Some(directory) = &directory {
            self.remember_session(id, directory);
        }
        Ok(directory)
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn remember_session(&self, id: &str, directory: &str) {
        let mut sessions = self.sessions();
        // opencode can be asked again for each.
        if sessions.len() >= SESSIONS {
            sessions.clear();
        }
        sessions.insert(id.to_owned(), directory.to_owned());
    }
}
