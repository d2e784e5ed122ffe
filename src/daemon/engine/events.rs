//! The parsed events of opencode, independent of its line.

/// What an event shows about an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// The instance is active by itself.
    Alive,
    /// A client uses the instance.
    Used,
    /// The instance was disposed.
    Disposed,
}

/// The instance that an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InstanceRef {
    /// The instance of this directory.
    Directory(String),
    /// The instance of this session's directory.
    Session(String),
}

/// An event about an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceEvent {
    /// What the event shows.
    pub sign: Sign,
    /// The instance.
    pub instance: InstanceRef,
    /// A session that was created in this directory, or moved to it.
    pub session: Option<String>,
}

/// An event about the turns of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TurnEvent {
    /// The instance of the session.
    pub instance: InstanceRef,
    /// The id of the session; some errors have none.
    pub session: Option<String>,
    /// The step.
    pub step: Step,
}

/// A step in the turns of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A turn runs. 2.x reports that once, 1.x repeatedly.
    Runs,
    /// No turn runs.
    Idle,
    /// A turn failed or was aborted.
    Failed {
        /// OpenCode's name for the kind of error.
        name: String,
        /// A message for people; may be empty.
        message: String,
    },
    /// The session has a new title, or none.
    Titled(Option<String>),
    /// The session was deleted.
    Deleted,
}
