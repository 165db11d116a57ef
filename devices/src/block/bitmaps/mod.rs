//! Named dirty bitmaps of a disk, as backup programs use them; QEMU's block-dirty-bitmap.
//!
//! Each [`BlockNode`] owns [`Bitmaps`]. A bitmap is a [`DirtyBitmap`] like that of a migration, and is marked
//! on the same path: one that records is in the node's [`Writes`], a disabled one is not and costs a write
//! nothing.
//!
//! ```text
//! QMP ─▶ add, clear, … ─▶ transaction ─▶ Bitmaps ◀─ hold, arrive ◀─ migration
//!                                          │  └──▶ file: IMAGE.bitmaps
//!                      guest's write ─▶ Writes
//! ```
//! Flags are QEMU's. *Recording*: writes mark it. *Busy*: an operation uses it ([`Held`], [`Frozen`], [`Arriving`]),
//! and nobody else may change, merge or remove it. *Persistent*: it is kept in a file beside the image.
//! *Inconsistent*: it has missed writes, and can only be removed.

mod file;
mod frozen;
mod name;
mod store;
mod transaction;
mod travel;

use super::BlockNode;
use super::backend::BlockBackend;
use super::bitmap::{DirtyBitmap, MAX_GRANULE_BYTES, MIN_GRANULE_BYTES};
use super::writes::Writes;
use crate::lock;
pub use file::Damage;
pub use frozen::Frozen;
pub use name::{BitmapName, MAX_NAME_BYTES, NameError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use store::Custody;
pub use store::StoreError;
pub use transaction::{Action, MergeSource, execute};
pub use travel::{Arriving, Held};

/// Most named bitmaps of a disk.
pub const MAX_BITMAPS: usize = 1024;
/// Most memory for the named bitmaps of a disk, if all of it were marked. A clear or merge takes as much
/// again as the bitmap for a moment.
pub const MAX_MEMORY_BYTES: u64 = 1 << 30;

/// Why something cannot be done with a bitmap. QEMU's words where QEMU has the rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BitmapError {
    #[error("Bitmap already exists: {name}")]
    Exists { name: BitmapName },
    #[error("Dirty bitmap '{name}' not found")]
    NotFound { name: BitmapName },
    #[error("Bitmap '{name}' is currently in use by another operation and cannot be used")]
    Busy { name: BitmapName },
    /// QEMU adds a hint: [`BitmapError::hint`].
    #[error("Bitmap '{name}' is inconsistent and cannot be used")]
    Inconsistent { name: BitmapName },
    /// A persistent bitmap of a read-only disk, whose file is not written.
    #[error("Bitmap '{name}' is readonly and cannot be modified")]
    ReadOnly { name: BitmapName },
    /// A persistent bitmap of a disk that is closed, or another process's by now.
    #[error(
        "Bitmap '{name}' cannot be modified: its disk has been given up, and the bitmap with it"
    )]
    GivenUp { name: BitmapName },
    #[error("Granularity must be power of 2 and at least {MIN_GRANULE_BYTES}")]
    Granularity,
    #[error("Granularity must be at most {MAX_GRANULE_BYTES}")]
    Coarse,
    #[error("Bitmap '{name}': a disk has at most {MAX_BITMAPS} bitmaps")]
    TooMany { name: BitmapName },
    #[error(
        "Bitmap '{name}' would need {bytes} bytes of memory, and all bitmaps of the disk together more \
         than {MAX_MEMORY_BYTES}: use a larger granularity"
    )]
    TooLarge { name: BitmapName, bytes: u64 },
    #[error("Bitmap '{name}': out of memory")]
    NoMemory { name: BitmapName },
    #[error(
        "Bitmaps are of different sizes (destination size is {target}, source size is {from}) and can't be \
         merged"
    )]
    Sizes { target: u64, from: u64 },
    #[error("Can't make bitmap '{name}' persistent in '{disk}': {why}")]
    NotStorable { name: BitmapName, disk: String, why: &'static str },
}

impl BitmapError {
    /// What to do about it, as QEMU hints at it.
    pub fn hint(&self) -> Option<&'static str> {
        let inconsistent = matches!(self, Self::Inconsistent { .. });
        inconsistent.then_some("Try block-dirty-bitmap-remove to delete this bitmap from disk")
    }
}

/// What is known of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: BitmapName,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// Bytes that are marked.
    pub count_bytes: u64,
    /// Whether writes mark it.
    pub recording: bool,
    /// Whether an operation uses it.
    pub busy: bool,
    /// Whether it is kept beside the image.
    pub persistent: bool,
    /// Whether it has missed writes and can only be removed.
    pub inconsistent: bool,
}

/// A new bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewBitmap {
    /// Its name.
    pub name: BitmapName,
    /// Bytes that one bit stands for; usually [`super::bitmap::DEFAULT_GRANULE_BYTES`].
    pub granularity: u64,
    /// Whether it is kept beside the image.
    pub persistent: bool,
    /// Whether writes mark it.
    pub recording: bool,
}

/// A bitmap and its flags. A copy shares the marks.
#[derive(Debug, Clone)]
struct Entry {
    name: BitmapName,
    bitmap: Arc<DirtyBitmap>,
    recording: bool,
    busy: bool,
    transit: Transit,
    persistent: bool,
    inconsistent: bool,
    /// It is from the file that was beside the image when that was locked.
    loaded: bool,
    /// Its marks when a job began that uses them; `bitmap` has those since then.
    frozen: Option<Arc<DirtyBitmap>>,
}

/// Whether a migration has the bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Transit {
    #[default]
    None,
    /// It goes with the guest: not to be stored when the disk is given up for that.
    Leaving,
    /// It is not whole yet: not to be stored.
    Arriving,
}

impl Entry {
    fn info(&self) -> BitmapInfo {
        let Self { name, recording, busy, persistent, inconsistent, .. } = self.clone();
        let bitmap = self.shown();
        let (granularity, count_bytes) = (bitmap.granule_bytes(), bitmap.marked_bytes());
        BitmapInfo { name, granularity, count_bytes, recording, busy, persistent, inconsistent }
    }

    /// The marks that a user sees: those that a job uses, if it is frozen.
    fn shown(&self) -> &Arc<DirtyBitmap> {
        self.frozen.as_ref().unwrap_or(&self.bitmap)
    }

    /// That no other operation uses it and that it has missed nothing.
    fn check_usable(&self) -> Result<(), BitmapError> {
        let name = || self.name.clone();
        match self {
            Self { busy: true, .. } => Err(BitmapError::Busy { name: name() }),
            Self { inconsistent: true, .. } => Err(BitmapError::Inconsistent { name: name() }),
            _ => Ok(()),
        }
    }
}

/// The named bitmaps of a disk.
#[derive(Debug)]
pub struct Bitmaps {
    /// The disk's.
    id: String,
    len_bytes: u64,
    read_only: AtomicBool,
    /// Whether its image is a regular file, with room for another beside it.
    storable: AtomicBool,
    writes: Arc<Writes>,
    /// Whose turn it is to change `entries`. A merge may hold it for long.
    turn: Mutex<()>,
    /// In the order in which they were added; those that record are in `writes`. Only who has the turn changes
    /// it. Locked for moments: who asks what there is never waits for a merge.
    entries: Mutex<Vec<Entry>>,
    /// Locked while the file is read or written.
    custody: Mutex<Custody>,
    /// Persistent ones are being stored, or have been: a change would be lost. Set by who has the turn.
    given_up: AtomicBool,
}

fn position(entries: &[Entry], name: &BitmapName) -> Result<usize, BitmapError> {
    let found = entries.iter().position(|entry| entry.name == *name);
    found.ok_or_else(|| BitmapError::NotFound { name: name.clone() })
}

impl Bitmaps {
    /// None yet.
    pub(super) fn new(id: &str, backend: &dyn BlockBackend, writes: Arc<Writes>) -> Self {
        let storable = backend.image_file().is_some();
        Self {
            id: id.to_owned(),
            len_bytes: backend.len_bytes(),
            read_only: backend.read_only().into(),
            storable: storable.into(),
            writes,
            turn: Mutex::default(),
            entries: Mutex::default(),
            custody: Mutex::default(),
            given_up: AtomicBool::new(false),
        }
    }

    /// The guest cannot write to the disk, nor do we to the file.
    pub(super) fn set_read_only(&self) {
        self.read_only.store(true, Ordering::SeqCst);
    }

    /// Checks that `new` may join `entries`, and makes it. It is not attached yet.
    fn make(&self, entries: &[Entry], new: &NewBitmap) -> Result<Entry, BitmapError> {
        let NewBitmap { name, granularity, persistent, recording } = new.clone();
        if !granularity.is_power_of_two() || granularity < MIN_GRANULE_BYTES {
            return Err(BitmapError::Granularity);
        }
        if granularity > MAX_GRANULE_BYTES {
            return Err(BitmapError::Coarse);
        }
        if entries.iter().any(|entry| entry.name == name) {
            return Err(BitmapError::Exists { name });
        }
        if entries.len() >= MAX_BITMAPS {
            return Err(BitmapError::TooMany { name });
        }
        let memory = |granule| DirtyBitmap::memory_bytes(self.len_bytes, granule);
        let bytes = memory(granularity);
        let others = entries.iter().map(|entry| memory(entry.bitmap.granule_bytes()));
        if others.sum::<u64>().saturating_add(bytes) > MAX_MEMORY_BYTES {
            return Err(BitmapError::TooLarge { name, bytes });
        }
        let bitmap = self.blank(&name, granularity)?;
        Ok(Entry {
            name,
            bitmap,
            recording,
            busy: false,
            transit: Transit::None,
            persistent,
            inconsistent: false,
            loaded: false,
            frozen: None,
        })
    }

    /// That it can be persistent, if it shall be.
    fn check_storable(&self, new: &NewBitmap) -> Result<(), BitmapError> {
        let why = match self {
            _ if !new.persistent => return Ok(()),
            _ if !self.storable.load(Ordering::SeqCst) => "its image is not a regular file",
            _ if self.read_only.load(Ordering::SeqCst) => "the disk is read-only",
            _ if self.given_up.load(Ordering::SeqCst) => "the disk has been given up",
            _ => return Ok(()),
        };
        Err(BitmapError::NotStorable { name: new.name.clone(), disk: self.id.clone(), why })
    }

    fn blank(&self, name: &BitmapName, granularity: u64) -> Result<Arc<DirtyBitmap>, BitmapError> {
        let bitmap = DirtyBitmap::new(self.len_bytes, granularity).map(Arc::new);
        bitmap.ok_or_else(|| BitmapError::NoMemory { name: name.clone() })
    }

    /// That the bitmap may be changed.
    fn check_changeable(&self, entry: &Entry) -> Result<(), BitmapError> {
        entry.check_usable()?;
        self.check_writable(entry)
    }

    fn check_writable(&self, entry: &Entry) -> Result<(), BitmapError> {
        if self.read_only.load(Ordering::SeqCst) && entry.persistent {
            return Err(BitmapError::ReadOnly { name: entry.name.clone() });
        }
        if self.given_up.load(Ordering::SeqCst) && entry.persistent {
            return Err(BitmapError::GivenUp { name: entry.name.clone() });
        }
        Ok(())
    }

    /// All of them, in the order in which they were added. At once, whatever is done with them meanwhile.
    pub fn info(&self) -> Vec<BitmapInfo> {
        lock(&self.entries).iter().map(Entry::info).collect()
    }

    /// SHA-256 of a bitmap's content: see [`DirtyBitmap::sha256`].
    pub fn sha256(&self, name: &BitmapName) -> Result<String, BitmapError> {
        let bitmap = {
            let entries = lock(&self.entries);
            let at = position(&entries, name)?;
            entries[at].shown().clone()
        };
        Ok(bitmap.sha256())
    }

    fn one(self: &Arc<Self>, action: &Action) -> Result<(), BitmapError> {
        transaction::run(&[(self, action)]).map(drop).map_err(|(_, error)| error)
    }

    /// Adds a bitmap. It is clean, and writes that end from now on mark it if it is `recording`.
    pub fn add(self: &Arc<Self>, new: NewBitmap) -> Result<(), BitmapError> {
        self.one(&Action::Add(new))
    }

    /// Removes a bitmap; from its file when that is written next.
    pub fn remove(self: &Arc<Self>, name: &BitmapName) -> Result<(), BitmapError> {
        self.one(&Action::Remove(name.clone()))
    }

    /// Clears a bitmap.
    pub fn clear(self: &Arc<Self>, name: &BitmapName) -> Result<(), BitmapError> {
        self.one(&Action::Clear(name.clone()))
    }

    /// Has writes mark a bitmap from now on.
    pub fn enable(self: &Arc<Self>, name: &BitmapName) -> Result<(), BitmapError> {
        self.one(&Action::Enable(name.clone()))
    }

    /// Has writes mark a bitmap no more.
    pub fn disable(self: &Arc<Self>, name: &BitmapName) -> Result<(), BitmapError> {
        self.one(&Action::Disable(name.clone()))
    }

    /// Marks in `target` what is marked in `sources`, all or none.
    pub fn merge(
        self: &Arc<Self>,
        target: &BitmapName,
        sources: Vec<MergeSource>,
    ) -> Result<(), BitmapError> {
        self.one(&Action::Merge { target: target.clone(), sources })
    }
}

impl BlockNode {
    /// Its named bitmaps.
    pub fn bitmaps(&self) -> &Arc<Bitmaps> {
        &self.bitmaps
    }
}

#[cfg(test)]
mod tests;
