//! The interface of a disk's storage, implemented by `raw`, `qcow2` and `memory`, called by
//! [`super::BlockNode`] only.

use super::Format;
use super::aligned::AlignedBuffer;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// A range of bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRange {
    /// Where they start.
    pub offset_bytes: u64,
    /// How many.
    pub len_bytes: u64,
}

impl ByteRange {
    /// End of the range, exclusive.
    pub fn end(self) -> u64 {
        self.offset_bytes.saturating_add(self.len_bytes)
    }
}

/// What an extent of a disk contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Allocated data.
    Data,
    /// Unallocated or zero: it reads as zeroes.
    Zero,
    /// Unallocated here: it reads from the backing file.
    Backing,
}

/// An extent of a disk with one kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length from the offset asked about; not zero.
    pub len_bytes: u64,
    /// What it contains.
    pub content: Content,
}

/// Polled by long operations: `false` cancels.
pub type GoOn<'a> = &'a (dyn Fn() -> bool + Sync);

/// An image that cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("{location} is in use by another virtual machine: stop that one first")]
    Held { location: String },
    /// It is locked, but its metadata cannot be used.
    #[error("cannot use {location}")]
    Unreadable {
        location: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot lock {location}")]
    Refused {
        location: String,
        #[source]
        source: io::Error,
    },
}

/// Size of a single write of zeroes.
const ZEROES_BYTES: u64 = 1 << 20;

/// Zeroes a range by writing, for storage without a better way.
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
        let part = usize::try_from(len).map_err(io::Error::other)?;
        backend.write_at(&zeroes[..part], offset)?;
        (offset, left) = (offset + len, left - len);
    }
    Ok(())
}

/// A backing file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backing {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
}

/// The backing files of an image.
pub trait BackingChain: Send + Sync {
    /// Their paths, topmost first; at least one.
    fn files(&self) -> Vec<String>;
    /// Size of the topmost as a disk.
    fn len_bytes(&self) -> u64;
    /// The topmost, with its format.
    fn top(&self) -> Backing;
    /// Estimated space that all take on the host.
    fn allocated_bytes(&self) -> io::Result<u64>;
    /// SHA-256 of the content of the chain, in hexadecimal digits. Reads all of it unless `go_on` returns
    /// false; the result is cached while the image is locked.
    fn digest(&self, go_on: GoOn<'_>) -> io::Result<String>;
}

/// The storage of one disk. Called from several threads at once.
pub trait BlockBackend: Send + Sync {
    /// Its path as the user gave it.
    fn location(&self) -> String;
    /// Name of its format.
    fn format(&self) -> &'static str;
    /// Its backing chain, if any.
    fn backing(&self) -> Option<Arc<dyn BackingChain>>;
    /// Whether its backing chain is another one than the image records: who opens the image elsewhere
    /// would see other content.
    fn overrules_backing(&self) -> bool {
        false
    }
    /// The regular file that holds the image, and its path as the user gave it; `None` for other storage.
    fn image_file(&self) -> Option<(Arc<File>, PathBuf)> {
        None
    }
    /// Bytes of a cluster, the unit in which it allocates space; `None` if that is a detail of the file system.
    fn cluster_bytes(&self) -> Option<u64> {
        None
    }
    /// Whether it bypasses the host's page cache.
    fn is_direct(&self) -> bool;
    /// Size in bytes; a multiple of a sector.
    fn len_bytes(&self) -> u64;
    /// Whether writes are refused.
    fn read_only(&self) -> bool;
    /// Fills `buffer` from `offset_bytes` on; both in whole sectors.
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()>;
    /// Writes `buffer` at `offset_bytes`; both in whole sectors.
    fn write_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()>;
    /// Says that a range has been written and is not expected to change soon: it may start on its way to stable storage.
    /// A hint, for which nobody waits.
    fn start_write_back(&self, range: ByteRange) {
        let _ = range;
    }
    /// Discards a range: frees its space where possible. Afterwards it reads as its old content or as
    /// zeroes.
    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()>;
    /// Zeroes a range, and frees its space if `may_unmap` and that is possible.
    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()>;
    /// The extent at `offset_bytes`, which must lie on the disk. Unallocated extents need not be read to be
    /// copied. Zeroes may be reported as data.
    fn extent_at(&self, offset_bytes: u64) -> io::Result<Extent>;
    /// Estimated space that it takes on the host, in bytes.
    fn allocated_bytes(&self) -> io::Result<u64>;
    /// The file that holds the disk's bytes one to one, if there is one, and the memory alignment that it
    /// needs. The caller may read, write and sync it directly.
    fn plain_file(&self) -> Option<(Arc<File>, usize)>;
    /// Writes cached metadata to the file, though not to stable storage: another process that opens it next
    /// sees every acknowledged write.
    fn write_back(&self) -> io::Result<()>;
    /// Makes every acknowledged write durable.
    fn flush(&self) -> io::Result<()>;
    /// Locks the image; the lock moves with the right to run.
    fn lock(&self) -> Result<(), LockError>;
    /// Releases the lock.
    fn unlock(&self);
}
