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
    /// A channel of the disks failed.
    #[error("disk channel {index}")]
    Disks {
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
        self.on_channel(Role::Data { index })
    }

    /// Adds the name of the channel, unless that is the control connection or the failure came from
    /// elsewhere.
    #[must_use]
    pub fn on_channel(self, role: Role) -> Self {
        match (self, role) {
            (
                error @ (Self::Interrupted
                | Self::Refused(_)
                | Self::Aborted(_)
                | Self::Data { .. }
                | Self::Disks { .. }),
                _,
            )
            | (error, Role::Control) => error,
            (error, Role::Data { index }) => Self::Data { index, source: Box::new(error) },
            (error, Role::Disks { index }) => Self::Disks { index, source: Box::new(error) },
        }
    }

    /// Whether a connection broke.
    pub fn is_lost(&self) -> bool {
        match self {
            Self::Data { source, .. } | Self::Disks { source, .. } => source.is_lost(),
            error => matches!(error, Self::Lost(_)),
        }
    }

    /// Whether a connection broke or the peer stalled.
    pub fn is_broken(&self) -> bool {
        match self {
            Self::Data { source, .. } | Self::Disks { source, .. } => source.is_broken(),
            error => matches!(error, Self::Lost(_) | Self::Stalled { .. }),
        }
    }
}
