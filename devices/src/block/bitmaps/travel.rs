//! Bitmaps in use by an operation: one that leaves with a migration or is read by a backup, one that arrives.
//!
//! Both are busy as long as their value lives, and are put right when it is dropped, however the operation ends.
//!
//! **No successor.** QEMU has a second bitmap record the guest's writes at the destination until all of the
//! contents have arrived, then merges both. Here the contents are ORed, atomically, into the bitmap that writes
//! mark already: a bit that is set by either stays set, and nothing is left to be merged.

use super::{BitmapError, BitmapInfo, BitmapName, Bitmaps, Entry, NewBitmap, Transit, position};
use crate::block::bitmap::{Chunk, ChunkError, DirtyBitmap};
use crate::lock;
use std::sync::Arc;

/// A busy bitmap. Writes go on marking it if it records.
#[derive(Debug)]
pub struct Held {
    pub(super) bitmaps: Arc<Bitmaps>,
    pub(super) name: BitmapName,
    pub(super) bitmap: Arc<DirtyBitmap>,
}

impl std::ops::Deref for Held {
    type Target = DirtyBitmap;

    fn deref(&self) -> &DirtyBitmap {
        &self.bitmap
    }
}

impl Bitmaps {
    /// Changes the entry of `bitmap`, or removes it if `change` returns false. Nothing if it is gone.
    pub(super) fn change(
        &self,
        bitmap: &Arc<DirtyBitmap>,
        change: impl FnOnce(&mut Entry) -> bool,
    ) {
        let _turn = lock(&self.turn);
        let mut entries = lock(&self.entries);
        let Some(at) = entries.iter().position(|entry| Arc::ptr_eq(&entry.bitmap, bitmap)) else {
            return;
        };
        if !change(&mut entries[at]) {
            entries.remove(at);
            self.writes.remove(bitmap);
        }
    }

    /// Uses a bitmap for an operation; it is busy until the result is dropped.
    ///
    /// # Errors
    /// If there is none, or it is busy or inconsistent.
    pub fn hold(self: &Arc<Self>, name: &BitmapName) -> Result<Held, BitmapError> {
        let _turn = lock(&self.turn);
        let mut entries = lock(&self.entries);
        let at = position(&entries, name)?;
        entries[at].check_usable()?;
        entries[at].busy = true;
        Ok(Held { bitmaps: self.clone(), name: name.clone(), bitmap: entries[at].bitmap.clone() })
    }

    /// Adds a bitmap whose contents arrive later. Writes that end from now on mark it if it is `recording`. Until
    /// all is there, closing the disk does not store it.
    ///
    /// # Errors
    /// As for [`Bitmaps::add`].
    pub fn arrive(self: &Arc<Self>, new: &NewBitmap) -> Result<Arriving, BitmapError> {
        let _turn = lock(&self.turn);
        let mut entries = lock(&self.entries);
        self.check_storable(new)?;
        let entry = Entry { busy: true, transit: Transit::Arriving, ..self.make(&entries, new)? };
        let bitmap = entry.bitmap.clone();
        if entry.recording {
            self.writes.add(bitmap.clone());
        }
        entries.push(entry);
        Ok(Arriving {
            held: Held { bitmaps: self.clone(), name: new.name.clone(), bitmap },
            finished: false,
        })
    }
}

impl Held {
    /// Its name.
    pub fn name(&self) -> &BitmapName {
        &self.name
    }

    /// What is known of it.
    pub fn info(&self) -> BitmapInfo {
        let entries = lock(&self.bitmaps.entries);
        let at = entries.iter().position(|entry| Arc::ptr_eq(&entry.bitmap, &self.bitmap));
        entries[at.expect("only its holder removes it")].info()
    }

    /// It is about to leave with the guest: unless this is dropped first, it is not stored when the disk is given
    /// up for that.
    pub fn will_leave(&self) {
        self.bitmaps.change(&self.bitmap, |entry| {
            entry.transit = Transit::Leaving;
            true
        });
    }

    /// It has left with the guest: removes it here.
    pub fn leave(self) {
        self.bitmaps.change(&self.bitmap, |_| false);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.bitmaps.change(&self.bitmap, |entry| {
            (entry.busy, entry.transit) = (false, Transit::None);
            true
        });
    }
}

/// A bitmap whose contents arrive. Dropping it unfinished removes the bitmap.
#[derive(Debug)]
pub struct Arriving {
    held: Held,
    finished: bool,
}

impl Arriving {
    /// Its name.
    pub fn name(&self) -> &BitmapName {
        self.held.name()
    }

    /// What is known of it.
    pub fn info(&self) -> BitmapInfo {
        self.held.info()
    }

    /// Length of its contents, as chunks count it.
    pub fn serialized_bytes(&self) -> u64 {
        self.held.bitmap.serialized_bytes()
    }

    /// Marks what `chunk` has marked, and returns how many granules that are. A bad chunk changes nothing.
    pub fn load(&self, chunk: &Chunk) -> Result<u64, ChunkError> {
        self.held.bitmap.load_chunk(chunk)
    }

    /// All contents have arrived: it becomes a bitmap like any other.
    pub fn finish(mut self) -> BitmapInfo {
        self.finished = true;
        BitmapInfo { busy: false, ..self.info() }
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if !self.finished {
            let Held { bitmaps, bitmap, .. } = &self.held;
            bitmaps.change(bitmap, |_| false);
        }
    }
}
