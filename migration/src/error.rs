//! Failures of participants, and error chains as text. Each participant has its own error enum, wrapped
//! in [`ParticipantError::Own`]; neither this file nor the drivers know it.

use crate::guest::GuestError;
use crate::wire::WireError;
use std::error::Error;
use std::fmt::Write;
use std::io;

/// The failure of a participant.
#[derive(Debug, thiserror::Error)]
pub enum ParticipantError {
    /// A connection or its data.
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("cannot spawn a thread")]
    Thread(#[source] io::Error),
    /// The participant's own error.
    #[error(transparent)]
    Own(Box<dyn Error + Send + Sync>),
}

impl ParticipantError {
    /// Wraps a participant's own error.
    pub fn own(error: impl Error + Send + Sync + 'static) -> Self {
        Self::Own(Box::new(error))
    }

    /// A participant was called before its setup, or without what that needs.
    pub fn not_set_up(section: &'static str) -> Self {
        let (found, expected) = (format!("section {section:?}"), "a participant that was set up");
        WireError::Unexpected { found, expected }.into()
    }

    /// Whether a connection broke or the peer stalled: usually a consequence of another failure.
    pub fn is_broken(&self) -> bool {
        matches!(self, Self::Wire(error) if error.is_broken())
    }

    /// Whether a wait was ended by a cancel, or by another failure in this migration.
    pub fn is_interrupted(&self) -> bool {
        matches!(self, Self::Wire(WireError::Interrupted))
    }
}

/// A thread panicked, which is our own bug: the migration fails, and the guest runs on.
#[derive(Debug, thiserror::Error)]
#[error("the thread that {0} panicked")]
pub struct Panicked(pub &'static str);

impl From<Panicked> for ParticipantError {
    fn from(panicked: Panicked) -> Self {
        Self::own(panicked)
    }
}

/// The error and its causes, joined with `: `.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}
