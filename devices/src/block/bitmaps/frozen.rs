//! A bitmap in use by a backup: its marks at one moment, while writes go on marking another one in its place.
//!
//! ```text
//! freeze ─▶ the entry has a new, clean bitmap, which writes mark; the job has the old marks
//!   end: clear      the old marks are dropped: what was written since the freeze stays marked
//!        keep_only  what the job has not done is ORed into the new bitmap
//!        drop       all old marks are: as if it had never been frozen
//! ```
//! The new bitmap stays in any case, so that no write waits or is missed. Whoever stores the bitmap meanwhile stores
//! the old and the new marks.

use super::{BitmapName, Bitmaps, Entry, Held};
use crate::block::bitmap::DirtyBitmap;
use std::sync::Arc;

/// A frozen bitmap, which is busy. Dropping it gives the bitmap its marks back.
#[derive(Debug)]
pub struct Frozen {
    /// The bitmap that writes mark. Dropped last.
    held: Held,
    /// Those of the moment at which it was frozen.
    marks: Arc<DirtyBitmap>,
    /// What goes back.
    back: Option<Arc<DirtyBitmap>>,
}

impl Entry {
    /// The entry as if it were not frozen, to be stored.
    pub(super) fn thawed(self) -> Self {
        let Some(frozen) = &self.frozen else { return self };
        match self.bitmap.copy().map(Arc::new) {
            Some(bitmap) => {
                bitmap.merge_from(frozen);
                Self { bitmap, frozen: None, ..self }
            }
            // There is no memory: too much is marked, then.
            None => {
                self.bitmap.merge_from(frozen);
                Self { frozen: None, ..self }
            }
        }
    }
}

impl Frozen {
    /// Of an entry that has just been frozen.
    pub(super) fn of(bitmaps: Arc<Bitmaps>, entry: Entry) -> Option<Self> {
        let Entry { name, bitmap, frozen, .. } = entry;
        let marks = frozen?;
        Some(Self { held: Held { bitmaps, name, bitmap }, back: Some(marks.clone()), marks })
    }

    /// Its name.
    pub fn name(&self) -> &BitmapName {
        self.held.name()
    }

    /// What was marked when it was frozen.
    pub fn marks(&self) -> &Arc<DirtyBitmap> {
        &self.marks
    }

    /// The job has used all of the marks: only what was written since stays marked.
    pub fn clear(mut self) {
        self.back = None;
    }

    /// The job has used the marks, except for `left`.
    pub fn keep_only(mut self, left: Arc<DirtyBitmap>) {
        self.back = Some(left);
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let Held { bitmaps, bitmap, .. } = &self.held;
        if let Some(back) = &self.back {
            bitmap.merge_from(back);
        }
        bitmaps.change(bitmap, |entry| {
            entry.frozen = None;
            true
        });
    }
}
