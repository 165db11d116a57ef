//! Marks writes to a disk in its dirty bitmaps when they end.
//!
//! Owned by a [`super::BlockNode`]. A [`WriteGuard`] lives as long as a write; its drop marks every bitmap that
//! is attached *then*. So a copy that starts during a write sees either the written bytes or, a moment later,
//! the mark.

use super::backend::ByteRange;
use super::bitmap::DirtyBitmap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};

/// The bitmaps that a node's writes mark, and which writes are durable.
#[derive(Debug)]
pub(super) struct Writes {
    bitmaps: RwLock<Vec<Arc<DirtyBitmap>>>,
    /// How many have ended. Begins with those of whoever had the image before.
    ended: AtomicU64,
    /// How many of them were durable when a sync last succeeded.
    synced: AtomicU64,
}

impl Default for Writes {
    fn default() -> Self {
        Self { bitmaps: RwLock::default(), ended: AtomicU64::new(1), synced: AtomicU64::new(0) }
    }
}

impl Writes {
    /// Runs `sync`, which makes all durable that has ended by now.
    pub fn sync(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let ended = self.ended.load(Ordering::Acquire);
        sync()?;
        self.synced.fetch_max(ended, Ordering::Release);
        Ok(())
    }

    /// Whether a write has ended that no successful sync has found. One in flight does not count yet.
    pub fn has_unsynced(&self) -> bool {
        self.synced.load(Ordering::Acquire) < self.ended.load(Ordering::Acquire)
    }

    /// Something was written that is no write of the guest.
    pub fn note_fill(&self) {
        self.ended.fetch_add(1, Ordering::Release);
    }

    /// Begins a write of `range`, which it may change whether or not it succeeds.
    pub fn begin(self: &Arc<Self>, range: ByteRange) -> WriteGuard {
        WriteGuard { node: self.clone(), range }
    }

    /// The bitmaps that are attached. No write ends while the result lives: use it for a moment only.
    pub fn list(&self) -> RwLockWriteGuard<'_, Vec<Arc<DirtyBitmap>>> {
        self.bitmaps.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attaches `bitmap`: every write that ends from now on marks it.
    pub fn add(&self, bitmap: Arc<DirtyBitmap>) {
        self.list().push(bitmap);
    }

    /// Detaches `bitmap`.
    pub fn remove(&self, bitmap: &Arc<DirtyBitmap>) {
        self.list().retain(|other| !Arc::ptr_eq(other, bitmap));
    }

    /// Attaches `arrivals` in the place of `gone`: every write marks either.
    pub fn exchange(&self, gone: &Arc<DirtyBitmap>, arrivals: &[Arc<DirtyBitmap>]) {
        let mut list = self.list();
        list.retain(|other| !Arc::ptr_eq(other, gone));
        list.extend(arrivals.iter().cloned());
    }
}

/// A write in flight; dropping it ends the write.
#[derive(Debug)]
pub(super) struct WriteGuard {
    node: Arc<Writes>,
    range: ByteRange,
}

impl WriteGuard {
    /// Marks the range.
    pub fn mark(&self) {
        let bitmaps = self.node.bitmaps.read().unwrap_or_else(PoisonError::into_inner);
        for bitmap in bitmaps.iter() {
            bitmap.mark(self.range);
        }
        self.node.ended.fetch_add(1, Ordering::Release);
    }
}

impl Drop for WriteGuard {
    fn drop(&mut self) {
        self.mark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap() -> Arc<DirtyBitmap> {
        Arc::new(DirtyBitmap::new(1 << 20, 512).unwrap())
    }

    #[test]
    fn a_write_is_unsynced_until_a_sync_that_began_after_it_succeeds() {
        let writes = Arc::<Writes>::default();
        assert!(writes.has_unsynced(), "nobody knows what came before");
        let write = || writes.begin(ByteRange { offset_bytes: 0, len_bytes: 512 });
        writes.sync(|| Ok(())).unwrap();
        assert!(!writes.has_unsynced());
        let early = write();
        writes.sync(|| Ok(())).unwrap();
        assert!(!writes.has_unsynced(), "it has not ended");
        drop(early);
        assert!(writes.has_unsynced());
        writes.sync(|| Err(io::ErrorKind::Other.into())).unwrap_err();
        assert!(writes.has_unsynced());
        let meanwhile = || {
            drop(write());
            Ok(())
        };
        writes.sync(meanwhile).unwrap();
        assert!(writes.has_unsynced());
        writes.sync(|| Ok(())).unwrap();
        assert!(!writes.has_unsynced());
    }

    #[test]
    fn a_write_marks_the_bitmaps_that_are_there_when_it_ends() {
        let (node, early, late) = (Arc::<Writes>::default(), bitmap(), bitmap());
        node.add(early.clone());
        let write = node.begin(ByteRange { offset_bytes: 512, len_bytes: 512 });
        node.remove(&early);
        node.add(late.clone());
        assert_eq!(late.marked_bytes(), 0);
        drop(write);
        assert_eq!((early.marked_bytes(), late.marked_bytes()), (0, 512));
        assert!(late.is_marked(512));
    }
}
