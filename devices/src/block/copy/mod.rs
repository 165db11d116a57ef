//! Copies ranges of a running disk to another one. Knows no wire and no job: [`super::job`] decides what is copied
//! and when.
//!
//! ```text
//! job ─▶ start(claim) ─▶ copying threads: what is there? data: read, write · zeroes: zeroes ─▶ Copied ─▶ job
//! ```
//! Operations take as long as their disks hang, so nobody waits for a thread: a job waits for the next event, and a
//! thread that hangs when the copier is dropped is left behind. It owns all that it touches.

mod claims;
mod pool;

use super::BlockNode;
use super::aligned::AlignedBuffer;
use super::backend::{ByteRange, Content};
pub use claims::{Claim, Claims};
pub use pool::{Buffer, Pool};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// Most bytes of one operation.
pub const MAX_OPERATION_BYTES: u64 = 1 << 20;
/// Where the host's processor copies, a piece is read and written before it leaves the processor's cache: with 256 KiB
/// a copy between two cached files takes a third of the processor time that it takes with 1 MiB.
const CACHED_PIECE_BYTES: usize = 256 << 10;
/// Most operations in flight.
pub const MAX_OPERATIONS: usize = 16;

/// Which disk has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The disk that is copied.
    Source,
    /// The copy.
    Target,
}

/// A range that could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("reading {} bytes at {} of {disk} failed", .range.len_bytes, .range.offset_bytes)]
    Read {
        disk: String,
        range: ByteRange,
        #[source]
        source: io::Error,
    },
    #[error("writing {} bytes at {} of {disk} failed", .range.len_bytes, .range.offset_bytes)]
    Write {
        disk: String,
        range: ByteRange,
        #[source]
        source: io::Error,
    },
    #[error("flushing {disk} failed")]
    Flush {
        disk: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "{disk} takes longer than {limit:?} for what was left when the guest's requests were held"
    )]
    Slow { disk: String, limit: Duration },
    #[error("a thread that copies {disk} has panicked, which is a bug")]
    Panicked { disk: String },
}

impl CopyError {
    /// Which disk has failed.
    pub fn side(&self) -> Side {
        match self {
            Self::Read { .. } | Self::Panicked { .. } => Side::Source,
            Self::Write { .. } | Self::Flush { .. } | Self::Slow { .. } => Side::Target,
        }
    }

    /// Whether there is no space left.
    pub fn is_no_space(&self) -> bool {
        let (Self::Read { source, .. } | Self::Write { source, .. } | Self::Flush { source, .. }) =
            self
        else {
            return false;
        };
        matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// Two disks of the same size.
#[derive(Debug, Clone)]
pub struct Pair {
    /// What is copied.
    pub source: Arc<BlockNode>,
    /// Where to.
    pub target: Arc<BlockNode>,
    /// Whether space of the copy that would hold zeroes may be freed.
    pub unmap: bool,
}

impl Pair {
    /// The parts of `range` by what the disk holds there, in whole sectors. Storage that does not say it holds data.
    pub fn parts(&self, range: ByteRange) -> impl Iterator<Item = (Content, ByteRange)> {
        let mut at = range.offset_bytes;
        std::iter::from_fn(move || {
            let rest = range.end().checked_sub(at).filter(|rest| *rest > 0)?;
            let extent = self.source.extent_at(at).ok();
            let (content, len) = extent
                .map_or((Content::Data, rest), |it| (it.content, it.len_bytes.clamp(1, rest)));
            // Where a hole ends need not be where a sector does.
            let len = if len < rest { (len / 512 * 512).max(512).min(rest) } else { len };
            let part = ByteRange { offset_bytes: at, len_bytes: len };
            at += len;
            Some((content, part))
        })
    }

    /// Copies `range` through `buffer`: what reads as zeroes becomes zeroes without being written, where the storage
    /// knows it.
    pub fn copy(&self, range: ByteRange, buffer: &mut [u8]) -> Result<(), CopyError> {
        for (content, part) in self.parts(range) {
            match content {
                Content::Zero => self.zero(part)?,
                Content::Data | Content::Backing => self.copy_data(part, buffer)?,
            }
        }
        Ok(())
    }

    fn copy_data(&self, range: ByteRange, buffer: &mut [u8]) -> Result<(), CopyError> {
        let mut at = range.offset_bytes;
        let most = match self.source.is_direct() && self.target.is_direct() {
            true => buffer.len(),
            false => buffer.len().min(CACHED_PIECE_BYTES),
        };
        while at < range.end() {
            let left = usize::try_from(range.end() - at).unwrap_or(usize::MAX);
            let len = left.min(most);
            let (piece, _) = buffer.split_at_mut(len);
            let part = ByteRange { offset_bytes: at, len_bytes: len as u64 };
            self.read(part, piece)?;
            self.write(part, piece)?;
            // Storage that writes while the next piece is read has little left to flush.
            self.target.start_write_back(part);
            at += len as u64;
        }
        Ok(())
    }

    /// Reads `bytes` from the disk.
    pub fn read(&self, range: ByteRange, bytes: &mut [u8]) -> Result<(), CopyError> {
        let read = self.source.copy_at(bytes, range.offset_bytes);
        read.map_err(|source| self.read_failed(range, source))
    }

    /// Writes `bytes` to the copy.
    pub fn write(&self, range: ByteRange, bytes: &[u8]) -> Result<(), CopyError> {
        let written = self.target.fill_at(bytes, range.offset_bytes);
        written.map_err(|source| self.write_failed(range, source))
    }

    /// Makes a range of the copy zero.
    pub fn zero(&self, range: ByteRange) -> Result<(), CopyError> {
        let ByteRange { offset_bytes, len_bytes } = range;
        let zeroed = self.target.fill_zeroes(offset_bytes, len_bytes, self.unmap);
        zeroed.map_err(|source| self.write_failed(range, source))
    }

    /// Makes the copy durable.
    pub fn flush(&self) -> Result<(), CopyError> {
        let disk = self.target.location();
        self.target.sync().map_err(|source| CopyError::Flush { disk, source })
    }

    fn read_failed(&self, range: ByteRange, source: io::Error) -> CopyError {
        CopyError::Read { disk: self.source.location(), range, source }
    }

    fn write_failed(&self, range: ByteRange, source: io::Error) -> CopyError {
        CopyError::Write { disk: self.target.location(), range, source }
    }
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Copied {
    /// The range that was copied, still claimed; `None` for a flush of the copy.
    pub claim: Option<Claim>,
    /// How it ended.
    pub result: Result<(), CopyError>,
}

/// Copies in the background, up to [`MAX_OPERATIONS`] ranges of up to [`MAX_OPERATION_BYTES`] at a time.
pub struct Copier(Pool<Option<Claim>>);

impl Copier {
    /// Calls `tell` when an operation has ended, on the thread that made it. Threads are called after `name`.
    pub fn new(
        pair: Pair,
        name: impl Into<String>,
        tell: impl Fn(Copied) + Send + Sync + 'static,
    ) -> Self {
        Self(Pool::new(name, move |claim: Option<Claim>, buffer: &mut Buffer| {
            let buffer = buffer.get_or_insert_with(operation_buffer);
            let result = unless_panicking(&pair, || match &claim {
                Some(claim) => pair.copy(claim.range(), buffer),
                None => pair.flush(),
            });
            tell(Copied { claim, result });
        }))
    }

    /// Operations in flight.
    pub fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    /// Starts to copy a range.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub fn start(&mut self, claim: Claim) -> io::Result<()> {
        self.0.start(Some(claim)).map_err(|(_, error)| error)
    }

    /// Starts a flush of the copy, which counts as an operation.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub fn flush(&mut self) -> io::Result<()> {
        self.0.start(None).map_err(|(_, error)| error)
    }

    /// Call it for each operation of which it was told.
    pub fn ended(&mut self) {
        self.0.ended();
    }
}

/// A buffer for the largest operation.
pub fn operation_buffer() -> AlignedBuffer {
    AlignedBuffer::new(usize::try_from(MAX_OPERATION_BYTES).unwrap_or(1 << 20))
}

/// Does `work` on a pair of disks; a panic is an error.
pub fn unless_panicking<T>(
    pair: &Pair,
    work: impl FnOnce() -> Result<T, CopyError>,
) -> Result<T, CopyError> {
    let panicked = |_| Err(CopyError::Panicked { disk: pair.source.location() });
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(panicked)
}

#[cfg(test)]
mod tests;
