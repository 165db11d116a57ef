//! Disks that migrate with their guest. One picture of the data path:
//!
//! ```text
//! guest's write ─▶ BlockNode ─▶ DirtyBitmap ─▶ scan: chunks ─▶ readers: read, zero? pack ─▶ senders ─▶ channels
//!                      allocation status ──────────┘                                                    │
//! image at the destination ◀── writers: unpack, write; flush at every mark ◀── chunk_receiver, one per channel
//! ```
//!
//! **Chunks and granules.** The unit of work is a chunk of 1 MiB: one word of the bitmap, 64 granules of
//! 16 KiB. A chunk carries only its dirty granules. Small granules suit random writes: each write costs
//! one granule on the link.
//!
//! **Clear before the read, mark after the write.** A chunk's bits are cleared, then its granules are
//! read. A concurrent guest write marks them again, and they are sent again. The last pass runs with the
//! guest stopped and its requests drained.
//!
//! **Channels of their own**, as many as RAM has. Megabytes of disk on the control connection would delay
//! keep-alives, refusals and cancels. RAM and disks still share one bandwidth cap and one decision, because
//! they take turns: first all disks once, then rounds of RAM and of dirty chunks, until the rest of both fits
//! into the pause.
//!
//! **Order.** Several threads read, send and write, and a chunk takes whatever channel is free, so chunks may
//! overtake each other, but two versions of one chunk may not: a pass sends a chunk at most once and ends
//! with a mark on every channel, and the destination reads past a mark only when it has come on all channels
//! and everything before it is on stable storage. The next pass begins with its answers. The pause finds
//! little to flush.
//!
//! **Compression** happens in the threads that read and in those that write, a chunk at a time, and rests as
//! it does for RAM where it does not pay.

pub mod chunk_receiver;
pub mod frame;
mod holes;
pub mod incoming;
pub mod outgoing;
mod packing;
mod readers;
mod receiver;
pub mod scan;
mod senders;
pub mod stats;
mod writers;

use crate::error::{Panicked, ParticipantError};
use crate::ram::compress::{DecompressError, MethodError};
use crate::wire::WireError;
use devices::block::BlockNode;
use std::io;
use std::sync::Arc;

/// Most bytes of one read, one frame and one write.
pub const CHUNK_BYTES: u64 = CHUNK as u64;
/// Bytes tracked by one bit of a chunk's word.
pub const GRANULE_BYTES: u64 = GRANULE as u64;
const CHUNK: usize = 1 << 20;
const GRANULE: usize = CHUNK / 64;
/// Most disks of a migration.
pub const MAX_DISKS: u16 = 64;

/// A disk of an outgoing guest.
#[derive(Debug, Clone)]
pub struct SourceDisk {
    pub node: Arc<BlockNode>,
    /// Send only the top layer; the destination has the same backing file.
    pub only_top: bool,
}

/// A disk of an incoming guest: as large as the source's, and blank.
#[derive(Debug, Clone)]
pub struct IncomingDisk {
    pub node: Arc<BlockNode>,
    /// Only the top layer comes; the image has the same backing file as the source's.
    pub only_top: bool,
}

/// How much the source reads ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Most reads in flight.
    pub reads: usize,
    /// Most chunks read and not yet sent.
    pub buffers: usize,
}

impl Tuning {
    /// Upper limit of `reads`.
    pub const MAX_READS: usize = 16;
    /// Upper limit of `buffers`.
    pub const MAX_BUFFERS: usize = 512;

    /// The same, within the limits.
    pub fn clamped(self) -> Self {
        Self {
            reads: self.reads.clamp(1, Self::MAX_READS),
            buffers: self.buffers.clamp(1, Self::MAX_BUFFERS),
        }
    }
}

impl Default for Tuning {
    fn default() -> Self {
        // Enough to keep a fast disk busy. More buffers only queue up in front of the link.
        Self { reads: 8, buffers: 16 }
    }
}

/// The disks of an outgoing guest, and how to read them.
#[derive(Debug, Clone, Default)]
pub struct SourceDisks {
    /// Empty if all disks are shared.
    pub disks: Vec<SourceDisk>,
    pub tuning: Tuning,
}

/// Reading a disk failed at the source.
#[derive(Debug, thiserror::Error)]
#[error("disk {disk}: reading {len_bytes} bytes at {offset_bytes} failed")]
pub struct ReadError {
    pub disk: String,
    pub offset_bytes: u64,
    pub len_bytes: u64,
    #[source]
    pub source: io::Error,
}

/// Disk failures at the source, connections aside.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error(transparent)]
    Read(#[from] ReadError),
    /// No dirty bitmap could be attached.
    #[error("disk {disk}: its writes cannot be tracked")]
    NotTracked { disk: String },
    #[error("chunks of disks cannot be compressed")]
    Packing(#[from] MethodError),
}

impl From<BlockError> for ParticipantError {
    fn from(error: BlockError) -> Self {
        Self::own(error)
    }
}

/// Disk failures at the destination.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A bad frame, or a connection failure.
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("disk {disk}: writing {len_bytes} bytes at {offset_bytes} failed")]
    Write {
        disk: String,
        offset_bytes: u64,
        len_bytes: u64,
        #[source]
        source: io::Error,
    },
    #[error("disk {disk}: chunk {chunk} cannot be unpacked")]
    Unpack {
        disk: String,
        /// Index of the chunk on the disk.
        chunk: u64,
        #[source]
        source: DecompressError,
    },
    #[error("chunks of disks cannot be unpacked")]
    Unpacker(#[from] MethodError),
    #[error("disk {disk}: flushing failed")]
    Flush {
        disk: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot spawn a thread")]
    Thread(#[source] io::Error),
    #[error(transparent)]
    Panicked(#[from] Panicked),
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
