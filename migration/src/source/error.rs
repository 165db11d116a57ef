//! How a migration ends at the source, and why.

use crate::error::ParticipantError;
use crate::guest::GuestError;
use crate::wire::WireError;
use std::io;

/// Why a migration failed.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("cannot connect to {address}: is `ferry receive` running there?")]
    Connect {
        address: String,
        #[source]
        source: io::Error,
    },
    /// The connection or the other side.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A connection broke without a reason from the peer.
    #[error("the destination has gone away, or the link to it is cut")]
    Gone(#[source] WireError),
    /// This side's machine.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// A participant's own reason.
    #[error(transparent)]
    Participant(Box<dyn std::error::Error + Send + Sync>),
    /// The destination does not support a participant.
    #[error("the destination does not support {section:?}: use the same Ferry on both sides")]
    Unsupported {
        /// The participant's section.
        section: &'static str,
    },
    /// The user cancelled.
    #[error("the migration was cancelled")]
    Cancelled,
    /// Device state that cannot be encoded.
    #[error("cannot encode {what}")]
    Encode {
        what: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("cannot spawn a thread")]
    Thread(#[source] io::Error),
    /// The destination could not start the guest and gave the right to run back.
    #[error("the destination could not start the guest, which goes on here: {reason}")]
    Declined {
        /// The destination's error message.
        reason: String,
    },
    /// The migration failed, and then the guest could not go on here either.
    #[error("{cause}; then the guest could not be resumed here, and stays paused")]
    NotResumed {
        /// Why the migration failed.
        cause: String,
        /// Why the guest stays paused.
        #[source]
        source: GuestError,
    },
}

impl From<ParticipantError> for SourceError {
    fn from(error: ParticipantError) -> Self {
        match error {
            ParticipantError::Wire(error) => Self::Wire(error),
            ParticipantError::Guest(error) => Self::Guest(error),
            ParticipantError::Thread(error) => Self::Thread(error),
            ParticipantError::Own(error) => Self::Participant(error),
        }
    }
}

impl SourceError {
    /// Turns a broken connection without a reason from the peer into [`SourceError::Gone`].
    pub(super) fn unexplained(self) -> Self {
        match self {
            Self::Wire(broken) if broken.is_lost() => Self::Gone(broken),
            error => error,
        }
    }
}

/// How a migration ended.
#[derive(Debug)]
pub enum SourceOutcome {
    /// The guest runs at the destination, and everything is there.
    Completed,
    /// The guest runs at the destination, but of what could wait this has not arrived, or why it is not known.
    Incomplete(String),
    /// Cancelled; the guest goes on here.
    Cancelled,
    /// Failed; the guest goes on here, or the error says why it cannot.
    Failed(SourceError),
    /// The answer to `Go` was lost: the guest is stopped here and may run there. A person decides.
    Unknown(SourceError),
}
