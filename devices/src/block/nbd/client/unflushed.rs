//! What has been written and not flushed. A server that dies may take it along, so it must not be taken for
//! written once another one answers in its place.

use crate::block::backend::ByteRange;
use crate::block::bitmap::DirtyBitmap;
use crate::lock;
use std::sync::Mutex;

/// Granule of a small disk.
const GRANULE_BYTES: u64 = 64 << 10;
/// Granules at most: a bitmap of 1 MiB.
const MOST_GRANULES: u64 = 8 << 20;

/// A set of ranges of a disk, in granules.
#[derive(Debug)]
pub(super) struct Unflushed {
    len_bytes: u64,
    /// `None` while it is empty.
    written: Mutex<Option<DirtyBitmap>>,
}

impl Unflushed {
    pub fn new(len_bytes: u64) -> Self {
        Self { len_bytes, written: Mutex::default() }
    }

    /// Adds `range`.
    pub fn add(&self, range: ByteRange) {
        // Marked under the lock: one that is taken is complete.
        lock(&self.written).get_or_insert_with(|| blank(self.len_bytes)).mark(range);
    }

    /// Removes and returns all of it: the caller adds it again if the flush fails.
    pub fn take(&self) -> Option<DirtyBitmap> {
        lock(&self.written).take()
    }

    /// Adds what was taken from here, or from another one of the same disk.
    pub fn add_all(&self, taken: Option<DirtyBitmap>) {
        let Some(taken) = taken else { return };
        match &mut *lock(&self.written) {
            Some(written) => written.merge_from(&taken),
            none => *none = Some(taken),
        }
    }

    pub fn is_empty(&self) -> bool {
        lock(&self.written).as_ref().is_none_or(|bitmap| bitmap.marked_granules() == 0)
    }
}

fn blank(len_bytes: u64) -> DirtyBitmap {
    let granule = len_bytes.div_ceil(MOST_GRANULES).next_power_of_two().max(GRANULE_BYTES);
    DirtyBitmap::new(len_bytes, granule).expect("a power of two, and a MiB")
}
