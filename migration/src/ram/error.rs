//! Failures of RAM at the source, connections and the machine aside.

use super::compress::MethodError;
use crate::error::ParticipantError;
use std::io;

/// Creating an encoder failed.
#[derive(Debug, thiserror::Error)]
pub enum WantError {
    #[error(transparent)]
    Method(#[from] MethodError),
    /// XBZRLE's digests need a secret key.
    #[error("no random numbers for XBZRLE")]
    NoRandomness(#[source] io::Error),
}

/// Sending RAM failed.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    #[error("guest RAM: {0}")]
    Unreadable(String),
    #[error(transparent)]
    Encoding(#[from] WantError),
    /// A sending thread panicked.
    #[error("a thread that sends pages panicked, which is a bug in Ferry")]
    SenderEnded,
}

impl From<RamError> for ParticipantError {
    fn from(error: RamError) -> Self {
        Self::own(error)
    }
}
