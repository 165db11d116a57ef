//! Marks writes to a disk in its dirty bitmaps when they end.
//!
//! Owned by a [`super::BlockNode`]. A [`WriteGuard`] lives as long as a write; its drop marks every bitmap that
//! is attached *then*. So a copy that starts during a write sees either the written bytes or, a moment later,
//! the mark.

use super::backend::ByteRange;
use super::bitmap::DirtyBitmap;
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};

/// The bitmaps that a node's writes mark.
#[derive(Debug, Default)]
pub(super) struct Writes {
    bitmaps: RwLock<Vec<Arc<DirtyBitmap>>>,
}

impl Writes {
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

impl Drop for WriteGuard {
    fn drop(&mut self) {
        let bitmaps = self.node.bitmaps.read().unwrap_or_else(PoisonError::into_inner);
        for bitmap in bitmaps.iter() {
            bitmap.mark(self.range);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap() -> Arc<DirtyBitmap> {
        Arc::new(DirtyBitmap::new(1 << 20, 512).unwrap())
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
