//! What the events of opencode say, whatever its line.

/// What an event of opencode says of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// It does something by itself.
    Alive,
    /// Somebody uses it.
    Used,
    /// It has been disposed.
    Disposed,
}

/// Which instance an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// That of this directory.
    Directory(String),
    /// That of the directory of this session.
    Session(String),
}

/// An event of opencode, as far as instances are concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// What it says.
    pub sign: Sign,
    /// Of which instance.
    pub place: Place,
    /// A session that is in this directory from now on.
    pub session: Option<String>,
}

/// What an event says of the turns of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Where the session is.
    pub place: Place,
    /// Its id; an error can be about none.
    pub session: Option<String>,
    /// What is said.
    pub step: Step,
}

/// What is said of the turns of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A turn runs. Said once in 2.x, and again and again in 1.x.
    Runs,
    /// No turn runs.
    Idle,
    /// Something went wrong in a turn. An abort is among that.
    Failed {
        /// OpenCode's name of the kind of error.
        name: String,
        /// For a person; may be empty.
        message: String,
    },
    /// The session has this title; none when it has none.
    Titled(Option<String>),
    /// The session is no more.
    Deleted,
}
