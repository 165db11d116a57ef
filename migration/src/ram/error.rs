//! What may go wrong with RAM at the source, besides connections and the machine.

use super::compress::MethodError;
use crate::error::ParticipantError;
use std::io;

/// Why an encoder cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum WantError {
    /// A compressor.
    #[error(transparent)]
    Method(#[from] MethodError),
    /// XBZRLE's digests need a secret key.
    #[error("no random numbers for XBZRLE")]
    NoRandomness(#[source] io::Error),
}

/// Why RAM cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// Guest RAM cannot be read.
    #[error("guest RAM: {0}")]
    Unreadable(String),
    /// Pages cannot be made smaller as wanted.
    #[error(transparent)]
    Encoding(#[from] WantError),
    /// A thread has panicked.
    #[error("a thread that sends pages has failed by itself, which is a mistake in this program")]
    SenderEnded,
}

impl From<RamError> for ParticipantError {
    fn from(error: RamError) -> Self {
        Self::own(error)
    }
}
