//! Copies ranges of a running disk to another one. Knows no wire and no job: [`super::job`] decides what is copied
//! and when.
//!
//! ```text
//! job ─▶ start(claim) ─▶ copying threads: what is there? data: read, write · zeroes: zeroes ─▶ Copied ─▶ job
//! ```
//! Operations take as long as their disks hang, so nobody waits for a thread: a job waits for the next event, and a
//! thread that hangs when the copier is dropped is left behind. It owns all that it touches.

mod claims;

use super::BlockNode;
use super::aligned::AlignedBuffer;
use super::backend::{ByteRange, Content};
use crate::lock;
pub use claims::{Claim, Claims};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Most bytes of one operation.
pub const MAX_OPERATION_BYTES: u64 = 1 << 20;
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
    #[error("a thread that copies {disk} has panicked, which is a bug")]
    Panicked { disk: String },
}

impl CopyError {
    /// Which disk has failed.
    pub fn side(&self) -> Side {
        match self {
            Self::Read { .. } | Self::Panicked { .. } => Side::Source,
            Self::Write { .. } | Self::Flush { .. } => Side::Target,
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
    /// Copies `range` through `buffer`: what reads as zeroes becomes zeroes without being written, where the storage
    /// knows it.
    pub fn copy(&self, range: ByteRange, buffer: &mut [u8]) -> Result<(), CopyError> {
        let mut at = range.offset_bytes;
        while at < range.end() {
            let rest = range.end() - at;
            // Storage that does not say what it holds is read.
            let extent = self.source.extent_at(at).ok();
            let (content, len) = extent
                .map_or((Content::Data, rest), |it| (it.content, it.len_bytes.clamp(1, rest)));
            // Where a hole ends need not be where a sector does.
            let len = if len < rest { (len / 512 * 512).max(512).min(rest) } else { len };
            let part = ByteRange { offset_bytes: at, len_bytes: len };
            match content {
                Content::Zero => self.zero(part)?,
                Content::Data | Content::Backing => self.copy_data(part, buffer)?,
            }
            at += len;
        }
        Ok(())
    }

    fn copy_data(&self, range: ByteRange, buffer: &mut [u8]) -> Result<(), CopyError> {
        let mut at = range.offset_bytes;
        while at < range.end() {
            let left = usize::try_from(range.end() - at).unwrap_or(usize::MAX);
            let len = left.min(buffer.len());
            let (piece, _) = buffer.split_at_mut(len);
            let part = ByteRange { offset_bytes: at, len_bytes: len as u64 };
            self.source.copy_at(piece, at).map_err(|source| self.read_failed(part, source))?;
            self.write(part, piece)?;
            at += len as u64;
        }
        Ok(())
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

type Tell = Arc<dyn Fn(Copied) + Send + Sync>;

/// What a thread needs.
#[derive(Clone)]
struct Shared {
    pair: Pair,
    work: Arc<Mutex<Receiver<Option<Claim>>>>,
    tell: Tell,
}

/// Copies in the background, up to [`MAX_OPERATIONS`] ranges of up to [`MAX_OPERATION_BYTES`] at a time.
pub struct Copier {
    shared: Shared,
    /// Until it is dropped.
    work: Option<Sender<Option<Claim>>>,
    /// Spawned as they are needed.
    threads: Vec<JoinHandle<()>>,
    in_flight: usize,
    name: String,
}

impl Copier {
    /// Calls `tell` when an operation has ended, on the thread that made it. Threads are called after `name`.
    pub fn new(
        pair: Pair,
        name: impl Into<String>,
        tell: impl Fn(Copied) + Send + Sync + 'static,
    ) -> Self {
        let (work, to_do) = channel();
        let shared = Shared { pair, work: Arc::new(Mutex::new(to_do)), tell: Arc::new(tell) };
        Self { shared, work: Some(work), threads: Vec::new(), in_flight: 0, name: name.into() }
    }

    /// Operations in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Starts to copy a range.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub fn start(&mut self, claim: Claim) -> io::Result<()> {
        self.hand_out(Some(claim))
    }

    /// Starts a flush of the copy, which counts as an operation.
    ///
    /// # Errors
    /// If there is no thread for it.
    pub fn flush(&mut self) -> io::Result<()> {
        self.hand_out(None)
    }

    fn hand_out(&mut self, operation: Option<Claim>) -> io::Result<()> {
        if self.threads.len() < (self.in_flight + 1).min(MAX_OPERATIONS) {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new()
                .name(self.name.clone())
                .stack_size(128 << 10)
                .spawn(move || shared.copy_all());
            match thread {
                Ok(thread) => self.threads.push(thread),
                // Those that are here do it.
                Err(_) if !self.threads.is_empty() => {}
                Err(error) => return Err(error),
            }
        }
        if self.work.as_ref().is_some_and(|work| work.send(operation).is_ok()) {
            self.in_flight += 1;
        }
        Ok(())
    }

    /// Call it for each operation of which it was told.
    pub fn ended(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        self.work = None;
        // Otherwise one may hang: its thread ends after it, if it ever does.
        if self.in_flight == 0 {
            for thread in self.threads.drain(..) {
                // Panics were reported.
                let _ = thread.join();
            }
        }
    }
}

impl Shared {
    /// Body of a thread. Ends when nobody hands out work any more.
    fn copy_all(&self) {
        let mut buffer = None;
        loop {
            // One thread waits for work, the others for their turn to wait.
            let next = lock(&self.work).recv();
            let Ok(claim) = next else { return };
            let buffer = buffer.get_or_insert_with(|| {
                AlignedBuffer::new(usize::try_from(MAX_OPERATION_BYTES).unwrap_or(1 << 20))
            });
            let copy = AssertUnwindSafe(|| match &claim {
                Some(claim) => self.pair.copy(claim.range(), buffer),
                None => self.pair.flush(),
            });
            let panicked = |_| Err(CopyError::Panicked { disk: self.pair.source.location() });
            let result = catch_unwind(copy).unwrap_or_else(panicked);
            (self.tell)(Copied { claim, result });
        }
    }
}

#[cfg(test)]
mod tests;
