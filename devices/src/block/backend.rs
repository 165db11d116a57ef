//! What stores a disk's bytes.

use super::aligned::AlignedBuffer;
use std::fs::File;
use std::io;
use std::sync::Arc;

/// Some bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRange {
    /// Where they start.
    pub offset_bytes: u64,
    /// How many.
    pub len_bytes: u64,
}

impl ByteRange {
    /// Where they end.
    pub fn end(self) -> u64 {
        self.offset_bytes.saturating_add(self.len_bytes)
    }
}

/// What stands behind a part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Bytes of its own.
    Data,
    /// Nothing: it reads as zeroes.
    Zero,
    /// Whatever the backing file has there.
    Backing,
}

/// A part of a disk with one kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// How far it reaches, from where was asked; not zero.
    pub len_bytes: u64,
    /// What stands behind it.
    pub content: Content,
}

/// Asked now and then by what takes long: whether to go on.
pub type GoOn<'a> = &'a (dyn Fn() -> bool + Sync);

/// A lock that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("{location} is in use by another virtual machine: stop that one first")]
    Held { location: String },
    #[error("cannot lock {location}")]
    Refused {
        location: String,
        #[source]
        source: io::Error,
    },
}

/// Zeroes are written in pieces of this size.
const ZEROES_BYTES: u64 = 1 << 20;

/// Makes bytes zero where there is no better way than to write them.
pub(super) fn write_zeroes_as_data(
    backend: &dyn BlockBackend,
    offset_bytes: u64,
    len_bytes: u64,
) -> io::Result<()> {
    let piece = usize::try_from(len_bytes.min(ZEROES_BYTES)).map_err(io::Error::other)?;
    let zeroes = AlignedBuffer::new(piece);
    let (mut offset, mut left) = (offset_bytes, len_bytes);
    while left > 0 {
        let len = left.min(zeroes.len() as u64);
        let part = usize::try_from(len).ok().and_then(|len| zeroes.get(..len));
        backend.write_at(part.unwrap_or(&zeroes), offset)?;
        (offset, left) = (offset + len, left - len);
    }
    Ok(())
}

/// The files that an image stands on, to be told from others.
pub trait BackingChain {
    /// What the user calls them, from the top on.
    fn files(&self) -> Vec<String>;
    /// Size of the first as a disk.
    fn len_bytes(&self) -> u64;
    /// About how much space all take on the host.
    fn allocated_bytes(&self) -> io::Result<u64>;
    /// Which they are: the SHA-256 of all bytes that can be read of them, in hexadecimal digits. Reads
    /// all, unless `go_on` says no in between; remembers the answer while the image is locked.
    fn digest(&self, go_on: GoOn<'_>) -> io::Result<String>;
}

/// Storage of one disk. Called from several threads at once.
pub trait BlockBackend: Send + Sync {
    /// What the user calls it.
    fn location(&self) -> String;
    /// What its format is called.
    fn format(&self) -> &'static str;
    /// What it stands on, if it does.
    fn backing(&self) -> Option<&dyn BackingChain>;
    /// Whether it bypasses the host's page cache.
    fn is_direct(&self) -> bool;
    /// Size; a multiple of a sector.
    fn len_bytes(&self) -> u64;
    /// Whether writes are refused.
    fn read_only(&self) -> bool;
    /// Fills `buffer` from `offset_bytes` on; both in whole sectors.
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()>;
    /// Writes `buffer` at `offset_bytes`; both in whole sectors.
    fn write_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()>;
    /// The guest has no use for these bytes any more: frees their space where that is possible. They
    /// may read as anything that they were, or as zeroes.
    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()>;
    /// Makes these bytes zero, and frees their space if `may_unmap` and that is possible.
    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()>;
    /// What stands behind `offset_bytes`, which lies on the disk, and how far. What was never written,
    /// or was freed, need not be read to be copied. Bytes may be said to be data that are zeroes.
    fn extent_at(&self, offset_bytes: u64) -> io::Result<Extent>;
    /// About how much space it takes on the host.
    fn allocated_bytes(&self) -> io::Result<u64>;
    /// The file whose bytes are the disk's, if there is one, and the alignment of memory that it
    /// needs: whoever has it may read, write and sync it directly.
    fn plain_file(&self) -> Option<(Arc<File>, usize)>;
    /// Has every acknowledged write in the file, though not on stable storage: whoever opens it next
    /// sees it.
    fn write_back(&self) -> io::Result<()>;
    /// Makes every acknowledged write durable.
    fn flush(&self) -> io::Result<()>;
    /// Takes the lock that goes with the right to run.
    fn lock(&self) -> Result<(), LockError>;
    /// Lets go of the lock.
    fn unlock(&self);
}
