//! What may go wrong in a participant, and errors in words. Each participant has an enum of its own,
//! which travels in [`ParticipantError::Own`]: nothing here, and no driver, knows them.

use crate::guest::GuestError;
use crate::wire::WireError;
use std::error::Error;
use std::fmt::Write;
use std::io;

/// Why a participant has failed.
#[derive(Debug, thiserror::Error)]
pub enum ParticipantError {
    /// A connection, or what came over it.
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The host has no more threads.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// Its own reason.
    #[error(transparent)]
    Own(Box<dyn Error + Send + Sync>),
}

impl ParticipantError {
    /// A participant's own reason.
    pub fn own(error: impl Error + Send + Sync + 'static) -> Self {
        Self::Own(Box::new(error))
    }

    /// Whether a connection broke, or the peer stands still: seldom the reason, mostly what another
    /// failure led to.
    pub fn is_broken(&self) -> bool {
        matches!(self, Self::Wire(error) if error.is_broken())
    }

    /// Whether a wait was ended by a cancel, or by a failure elsewhere in this migration.
    pub fn is_interrupted(&self) -> bool {
        matches!(self, Self::Wire(WireError::Interrupted))
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
