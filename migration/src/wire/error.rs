//! What is wrong with a connection, or with what came over it.

use super::VERSION;
use std::io;

/// What is wrong with a connection, or with what came over it.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The peer sent no byte, or took none, for too long.
    #[error("peer stalled for {seconds} s")]
    Stalled {
        /// How long.
        seconds: u64,
    },
    /// The peer is alive but does not get on.
    #[error("{what} did not come within {seconds} s")]
    Late {
        /// What was waited for.
        what: &'static str,
        /// How long.
        seconds: u64,
    },
    /// Woken by a cancel, or by a failure on another channel of this migration.
    #[error("interrupted")]
    Interrupted,
    /// The connection broke.
    #[error("connection lost")]
    Lost(#[source] io::Error),
    /// Not our protocol.
    #[error("the other side is not Ferry")]
    NotFerry,
    /// Another version of it.
    #[error(
        "the other side speaks stream version {theirs}, this one {VERSION}: use the same Ferry on \
         both"
    )]
    Version {
        /// Its version.
        theirs: u16,
    },
    /// A length past its maximum.
    #[error("{what} of {found} bytes, at most {most} are possible")]
    TooLong {
        /// Which part.
        what: &'static str,
        /// Its length.
        found: u64,
        /// What is possible.
        most: u64,
    },
    /// A frame that does not belong here.
    #[error("unexpected {found} where {expected} belongs")]
    Unexpected {
        /// What came.
        found: String,
        /// What should have come.
        expected: &'static str,
    },
    /// A payload that makes no sense.
    #[error("malformed {what}: {reason}")]
    Malformed {
        /// Which part.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The destination refuses.
    #[error("the destination refuses: {0}")]
    Refused(String),
    /// The source has given up.
    #[error("the source has ended the migration: {0}")]
    Aborted(String),
}
