//! The way of a disk's bytes.
//!
//! ```text
//! guest's write ─▶ BlockNode ─▶ DirtyBitmap ─▶ scan: chunks ─▶ outgoing: read, zero? ─▶ connection
//!                      allocation status ──────────┘                                        │
//! image at the destination ◀── written by several threads, flushed at every mark ◀── incoming
//! ```
//!
//! **Chunks and granules.** Work is dealt in chunks of 1 MiB; a chunk is one word of the bitmap, 64
//! granules of 16 KiB, and carries only those granules that are dirty. Small granules matter for guests
//! that write here and there: each write costs one granule of the link.
//!
//! **Clear before the read, mark after the write.** A chunk's bits are cleared, then its granules are
//! read. What the guest writes meanwhile marks them again, and they are sent again. The last pass is made
//! with the guest stopped and its requests settled.
//!
//! **A connection of its own.** Megabytes of disk on the main connection would hold up what has to be
//! heard at once: that the other side lives, that it refuses, that the user cancels. RAM and disks still
//! share one cap and one decision, because they take turns: first all of the disks once, then rounds of
//! RAM and of what has become dirty on either, until the rest of both fits into the pause.
//!
//! **Order.** Several threads read and write, so chunks overtake each other, but never themselves: a pass
//! holds a chunk once, and the next pass begins when the destination has echoed the mark that ends this
//! one, with all before it in place and on stable storage. The pause then finds little to flush.

pub mod chunk_receiver;
pub mod frame;
pub mod incoming;
pub mod outgoing;
mod receiver;
pub mod scan;
pub mod stats;

use crate::error::ParticipantError;
use crate::wire::WireError;
use devices::block::BlockNode;
use std::io;
use std::sync::Arc;

/// What one thread reads, one frame carries and one thread writes, at most.
pub const CHUNK_BYTES: u64 = CHUNK as u64;
/// What is dirty or clean: one bit of a chunk's word.
pub const GRANULE_BYTES: u64 = GRANULE as u64;
const CHUNK: usize = 1 << 20;
const GRANULE: usize = CHUNK / 64;
/// Most disks of a migration.
pub const MAX_DISKS: u16 = 64;

/// A disk that leaves with its guest.
#[derive(Debug, Clone)]
pub struct SourceDisk {
    /// The disk.
    pub node: Arc<BlockNode>,
    /// Only what lies above its backing file, which the destination has too.
    pub only_top: bool,
}

/// A disk that arrives: as large as the source's, and as if never written.
#[derive(Debug, Clone)]
pub struct IncomingDisk {
    /// The disk.
    pub node: Arc<BlockNode>,
    /// It stands on the backing file that the source's stands on.
    pub only_top: bool,
}

/// How much is under way at the source at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Most reads in flight.
    pub reads: usize,
    /// Most chunks that have been read and not been sent.
    pub buffers: usize,
}

impl Tuning {
    /// Most reads in flight that may be asked for.
    pub const MAX_READS: usize = 16;
    /// Most waiting chunks that may be asked for.
    pub const MAX_BUFFERS: usize = 512;

    /// Within its limits.
    pub fn clamped(self) -> Self {
        Self {
            reads: self.reads.clamp(1, Self::MAX_READS),
            buffers: self.buffers.clamp(1, Self::MAX_BUFFERS),
        }
    }
}

impl Default for Tuning {
    fn default() -> Self {
        // Enough to keep a fast disk busy. More buffers only hold what the link has not taken yet.
        Self { reads: 8, buffers: 16 }
    }
}

/// The disks that leave, and how.
#[derive(Debug, Clone, Default)]
pub struct SourceDisks {
    /// The disks; none if they are shared.
    pub disks: Vec<SourceDisk>,
    /// How much is under way.
    pub tuning: Tuning,
}

/// A disk that cannot be read at the source.
#[derive(Debug, thiserror::Error)]
#[error("disk {disk}: reading {len_bytes} bytes at {offset_bytes} failed")]
pub struct ReadError {
    /// Which disk.
    pub disk: String,
    /// Where.
    pub offset_bytes: u64,
    /// How much.
    pub len_bytes: u64,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// What may go wrong with disks at the source, besides connections.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// A disk cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Writes to it cannot be told apart from what was sent.
    #[error("disk {disk}: its writes cannot be tracked")]
    NotTracked {
        /// Which disk.
        disk: String,
    },
}

impl From<BlockError> for ParticipantError {
    fn from(error: BlockError) -> Self {
        Self::own(error)
    }
}

/// A disk that cannot be taken in at the destination.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// What came makes no sense, or nothing comes any more.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The image does not take it.
    #[error("disk {disk}: writing {len_bytes} bytes at {offset_bytes} failed")]
    Write {
        /// Which disk.
        disk: String,
        /// Where.
        offset_bytes: u64,
        /// How much.
        len_bytes: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The image cannot be made durable.
    #[error("disk {disk}: flushing failed")]
    Flush {
        /// Which disk.
        disk: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The host has no more threads.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

impl From<LoadError> for ParticipantError {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Wire(error) => error.into(),
            LoadError::Thread(error) => Self::Thread(error),
            error => Self::own(error),
        }
    }
}
