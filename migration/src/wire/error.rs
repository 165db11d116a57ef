//! What is wrong with a connection, or with what came over it.

use super::{Role, VERSION};
use std::io;
use std::time::Duration;

/// What is wrong with a connection, or with what came over it.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The peer sent or accepted no byte for too long.
    #[error("peer stalled for {seconds} s")]
    Stalled { seconds: u64 },
    /// The peer is alive but makes no progress.
    #[error("{what} did not come within {}", in_words(*within))]
    Late {
        /// What was waited for.
        what: &'static str,
        within: Duration,
    },
    /// Interrupted by a cancel, or by another failure in this migration.
    #[error("interrupted")]
    Interrupted,
    /// The connection broke.
    #[error("connection lost")]
    Lost(#[source] io::Error),
    /// A data channel failed.
    #[error("data channel {index}")]
    Data {
        index: u16,
        #[source]
        source: Box<WireError>,
    },
    /// Not our protocol.
    #[error("the other side is not Ferry")]
    NotFerry,
    #[error(
        "the other side speaks stream version {theirs}, this one {VERSION}: use the same Ferry on \
         both"
    )]
    Version { theirs: u16 },
    /// A length past its maximum.
    #[error("{what} of {found} bytes, at most {most} are possible")]
    TooLong { what: &'static str, found: u64, most: u64 },
    /// A frame out of order.
    #[error("unexpected {found} where {expected} belongs")]
    Unexpected { found: String, expected: &'static str },
    /// An invalid payload.
    #[error("malformed {what}: {reason}")]
    Malformed { what: &'static str, reason: String },
    #[error("the destination refuses: {0}")]
    Refused(String),
    #[error("the source has ended the migration: {0}")]
    Aborted(String),
}

fn in_words(duration: Duration) -> String {
    match duration.subsec_nanos() {
        0 => format!("{} s", duration.as_secs()),
        _ => format!("{} ms", duration.as_millis()),
    }
}

impl WireError {
    /// Adds the index of the data channel, unless the failure came from elsewhere.
    #[must_use]
    pub fn on_data_channel(self, index: u16) -> Self {
        match self {
            Self::Interrupted | Self::Refused(_) | Self::Aborted(_) | Self::Data { .. } => self,
            error => Self::Data { index, source: Box::new(error) },
        }
    }

    /// As [`WireError::on_data_channel`], if `role` is a data channel.
    #[must_use]
    pub fn on_channel(self, role: Role) -> Self {
        match role {
            Role::Data { index } => self.on_data_channel(index),
            Role::Control | Role::Disks => self,
        }
    }

    /// Whether a connection broke.
    pub fn is_lost(&self) -> bool {
        match self {
            Self::Data { source, .. } => source.is_lost(),
            error => matches!(error, Self::Lost(_)),
        }
    }

    /// Whether a connection broke or the peer stalled.
    pub fn is_broken(&self) -> bool {
        match self {
            Self::Data { source, .. } => source.is_broken(),
            error => matches!(error, Self::Lost(_) | Self::Stalled { .. }),
        }
    }
}
