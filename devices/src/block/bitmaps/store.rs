//! When persistent bitmaps are read and written: [`file`] says how.
//!
//! ```text
//! lock ─▶ load: bitmaps are here, the file says "in use" ─▶ … save … ─▶ close: the file has them ─▶ unlock
//!                    ▲                                          │  ▲          │
//!                    │   removed ahead: all leave, no file ◀────┘  └──────────┘ called off: still locked
//!                    └──────────── mark ◀────────┘
//! ```
//! If all of them leave with the guest, the file goes shortly before the guest stops, as storage may take its
//! time for that. A crash from then on loses the bitmaps instead of making them inconsistent.
//!
//! They follow the right to write to the image: a shared image's leave with its lock, unless they travel with
//! the guest. A file that says "in use" when it is loaded was left by a crash, and an image that has changed
//! since its bitmaps were stored was written by somebody else: in both cases they have missed writes, and
//! become inconsistent.
//!
//! A read-only disk's bitmaps are loaded, and nothing is written.

use super::file::{self, Damage, Identity};
use super::{BitmapError, Bitmaps, Entry};
use crate::block::BlockNode;
use crate::lock;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Appended to the name of the image.
const SUFFIX: &str = ".bitmaps";

/// Persistent bitmaps that cannot be loaded or stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "the bitmaps in {path} cannot be used: delete it to run without them; the next backup must then be a \
         full one"
    )]
    Unusable {
        path: PathBuf,
        #[source]
        source: Damage,
    },
    /// A bitmap of that name has arrived with the guest, or there are too many together.
    #[error("the bitmaps in {path} do not fit those that are here already")]
    Conflict {
        path: PathBuf,
        #[source]
        source: BitmapError,
    },
    #[error("cannot mark the bitmaps in {path} as in use")]
    Mark {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot store bitmaps in {path}; they will be inconsistent at the next start: {lost}")]
    Store {
        path: PathBuf,
        /// Their names.
        lost: String,
        #[source]
        source: io::Error,
    },
}

/// Who is responsible for the file beside the image.
#[derive(Debug, Default)]
pub(super) enum Custody {
    /// Not looked at yet.
    #[default]
    None,
    /// We are, and the file says so, or there is nothing to say.
    Ours,
    /// We are, and the file does not say so: it was removed ahead of a stop, or stored in one that was called
    /// off. It does no harm: once the guest has written, the image is another one than the file's.
    Unmarked,
    /// We have been, until the image was this one.
    Past(Identity),
}

impl Bitmaps {
    /// Whether closing the disk has bitmaps to store.
    pub fn has_persistent(&self) -> bool {
        lock(&self.entries).iter().any(|entry| entry.persistent)
    }

    /// Whether closing the disk stores bitmaps that stay here, or has to remove a file of those that leave.
    pub fn close_takes_time(&self) -> bool {
        let entries = lock(&self.entries);
        let mut persistent = entries.iter().filter(|entry| entry.persistent).peekable();
        if persistent.peek().is_none() || self.is_read_only() {
            return false;
        }
        // Locked while the file is written: that takes time as well.
        let removed = self.custody.try_lock().is_ok_and(|it| matches!(*it, Custody::Unmarked));
        !removed || persistent.any(|entry| !entry.in_transit)
    }

    fn persistent(&self) -> Vec<Entry> {
        lock(&self.entries).iter().filter(|entry| entry.persistent).cloned().collect()
    }

    /// Adds what was in the file, if still nobody objects.
    fn install(&self, loaded: Vec<Entry>) -> Result<(), BitmapError> {
        let _turn = lock(&self.turn);
        let mut entries = lock(&self.entries);
        for entry in &loaded {
            if entries.iter().any(|other| other.name == entry.name) {
                return Err(BitmapError::Exists { name: entry.name.clone() });
            }
        }
        for entry in loaded {
            if entry.recording {
                self.writes.add(entry.bitmap.clone());
            }
            entries.push(entry);
        }
        Ok(())
    }

    /// All of them have missed writes.
    fn spoil(&self) {
        let _turn = lock(&self.turn);
        for entry in lock(&self.entries).iter_mut() {
            self.writes.remove(&entry.bitmap);
            (entry.inconsistent, entry.recording) = (true, false);
        }
    }

    fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::SeqCst)
    }

    /// Reads the bitmaps of `image`. Those that have missed writes are inconsistent.
    fn read(&self, path: &Path, image: Identity) -> Result<Vec<Entry>, StoreError> {
        let others = lock(&self.entries).clone();
        let found = match file::read(path, self, &others) {
            Ok(found) => found,
            // It is right in itself, as it has been loaded without the others.
            Err(Damage::Bitmap(source))
                if !others.is_empty() && file::read(path, self, &[]).is_ok() =>
            {
                return Err(StoreError::Conflict { path: path.to_owned(), source });
            }
            Err(source) => return Err(StoreError::Unusable { path: path.to_owned(), source }),
        };
        let Some(mut found) = found else { return Ok(Vec::new()) };
        let why = match &found {
            it if it.in_use => Some("it was not stored when the disk was closed"),
            it if it.image != image => Some("the image was changed or replaced by another program"),
            _ => None,
        };
        for entry in &mut found.entries {
            if let Some(why) = why {
                log::warn!("bitmap {} of disk {} is inconsistent: {why}", entry.name, self.id);
                entry.inconsistent = true;
            }
            if entry.inconsistent {
                entry.recording = false;
                let blank = self.blank(&entry.name, entry.bitmap.granule_bytes());
                let path = path.to_owned();
                entry.bitmap = blank.map_err(|source| StoreError::Conflict { path, source })?;
            }
        }
        Ok(found.entries)
    }
}

impl BlockNode {
    /// The image, and the path of the file beside it.
    fn bitmap_file(&self) -> Option<(&File, PathBuf)> {
        let (image, path) = self.backend.image_file()?;
        Some((image, file::with_suffix(path, SUFFIX)))
    }

    /// Loads persistent bitmaps, and marks them as in use unless the disk is read-only. Call it when the image
    /// has just been locked, before anything writes to it. Loading twice is not an error.
    ///
    /// After [`BlockNode::close_bitmaps`] those in memory are used again, if nobody else has written to the
    /// image meanwhile. If the file cannot be marked then, that is logged only, so that the guest can run: once
    /// it has written, the image is another one than the file's.
    pub fn load_bitmaps(&self) -> Result<(), StoreError> {
        let Some((image, path)) = self.bitmap_file() else { return Ok(()) };
        let bitmaps = &self.bitmaps;
        let mut custody = lock(&bitmaps.custody);
        let unmarked = |source| StoreError::Mark { path: path.clone(), source };
        let now = Identity::of(image).map_err(unmarked)?;
        let loaded = match *custody {
            Custody::Ours | Custody::Unmarked => return Ok(()),
            Custody::None => bitmaps.read(&path, now)?,
            Custody::Past(then) => {
                if then != now && !bitmaps.info().is_empty() {
                    log::warn!(
                        "bitmaps of disk {} are inconsistent: its image was changed by another program",
                        bitmaps.id
                    );
                    bitmaps.spoil();
                }
                Vec::new()
            }
        };
        if !bitmaps.is_read_only() {
            match self.write_mark(&path, loaded.clone(), now) {
                Err(error) if matches!(*custody, Custody::Past(_)) => {
                    log::error!("{}: {error}", unmarked(io::ErrorKind::Other.into()));
                }
                marked => marked.map_err(unmarked)?,
            }
        }
        bitmaps.install(loaded).map_err(|source| StoreError::Conflict { path, source })?;
        let unmarked = bitmaps.persistent().iter().any(|entry| entry.in_transit);
        *custody = if unmarked { Custody::Unmarked } else { Custody::Ours };
        Ok(())
    }

    /// Has the file say that the bitmaps are in use, and `loaded` as well.
    fn write_mark(&self, path: &Path, loaded: Vec<Entry>, now: Identity) -> io::Result<()> {
        // Those that arrive are stored when they are whole: this may be in the pause of a move.
        let mut all = self.bitmaps.persistent();
        all.retain(|entry| !entry.in_transit);
        all.extend(loaded);
        if all.is_empty() {
            return Ok(());
        }
        file::write(path, self.len_bytes, &all, now, true, false)
    }

    /// The guest is about to leave: if all persistent bitmaps leave with it, removes their file while the guest
    /// runs, so that [`BlockNode::close_bitmaps`] has nothing to do. If they stay after all, call
    /// [`BlockNode::mark_bitmaps`].
    pub fn remove_bitmaps_ahead(&self) -> io::Result<()> {
        let Some((_, path)) = self.bitmap_file() else { return Ok(()) };
        let mut custody = lock(&self.bitmaps.custody);
        let entries = self.bitmaps.persistent();
        let leave = !entries.is_empty() && entries.iter().all(|entry| entry.in_transit);
        if leave && matches!(*custody, Custody::Ours) && !self.bitmaps.is_read_only() {
            file::remove(&path)?;
            *custody = Custody::Unmarked;
        }
        Ok(())
    }

    /// If the file does not say that the bitmaps are in use, it does so again. The disk is still locked, or
    /// nothing is done.
    ///
    /// # Errors
    /// If it cannot be written; the bitmaps in memory are as good as before.
    pub fn mark_bitmaps(&self) -> Result<(), StoreError> {
        let Some((image, path)) = self.bitmap_file() else { return Ok(()) };
        let mut custody = lock(&self.bitmaps.custody);
        if matches!(*custody, Custody::Unmarked) {
            let marked =
                Identity::of(image).and_then(|now| self.write_mark(&path, Vec::new(), now));
            marked.map_err(|source| StoreError::Mark { path, source })?;
            *custody = Custody::Ours;
        }
        Ok(())
    }

    /// A stop in which [`BlockNode::close_bitmaps_unless`] was called is called off, and the disk is still
    /// locked: those in memory are used again. Does no I/O; one that is not done yet learns it by its flag.
    pub fn keep_bitmaps(&self) {
        if let Ok(mut custody) = self.bitmaps.custody.try_lock()
            && matches!(*custody, Custody::Past(_))
        {
            *custody = Custody::Unmarked;
        }
    }

    /// Stores persistent bitmaps now, while they are in use: a crash still makes them inconsistent.
    pub fn save_bitmaps(&self) -> Result<(), StoreError> {
        self.store_bitmaps(true, &AtomicBool::new(false))
    }

    /// Stores persistent bitmaps and gives them back. Call it when nobody writes to the disk any more, before
    /// the image is unlocked. Those that leave with the guest, or have not arrived whole, are not stored. Nothing happens if they have not
    /// been loaded, or are closed already.
    pub fn close_bitmaps(&self) -> Result<(), StoreError> {
        self.close_bitmaps_unless(&AtomicBool::new(false))
    }

    /// As [`BlockNode::close_bitmaps`], on a thread of its own: if `called_off` is set before it is done, the
    /// guest runs, and the bitmaps are still in use. Who sets it calls [`BlockNode::keep_bitmaps`] next.
    pub fn close_bitmaps_unless(&self, called_off: &AtomicBool) -> Result<(), StoreError> {
        self.store_bitmaps(false, called_off)
    }

    fn store_bitmaps(&self, in_use: bool, called_off: &AtomicBool) -> Result<(), StoreError> {
        let Some((image, path)) = self.bitmap_file() else { return Ok(()) };
        let bitmaps = &self.bitmaps;
        let mut custody = lock(&bitmaps.custody);
        if !matches!(*custody, Custody::Ours | Custody::Unmarked)
            || called_off.load(Ordering::SeqCst)
        {
            return Ok(());
        }
        let mut entries = bitmaps.persistent();
        if !in_use {
            entries.retain(|entry| !entry.in_transit);
        }
        let stored = (|| {
            if bitmaps.is_read_only() {
                return Identity::of(image);
            }
            if entries.is_empty() {
                file::remove(&path)?;
                return Identity::of(image);
            }
            if !in_use {
                // Bitmaps must not survive a crash of the host that the writes do not.
                self.backend.flush()?;
            }
            let now = Identity::of(image)?;
            file::write(&path, self.len_bytes, &entries, now, in_use, true)?;
            Ok(now)
        })();
        let now = stored.map_err(|source| {
            let lost: Vec<_> = entries.iter().map(|entry| entry.name.as_str()).collect();
            StoreError::Store { path, lost: lost.join(", "), source }
        })?;
        *custody = match in_use {
            true => Custody::Ours,
            false if called_off.load(Ordering::SeqCst) => Custody::Unmarked,
            false => Custody::Past(now),
        };
        drop(custody);
        // Set after the look above, by somebody who did not get the lock.
        if !in_use && called_off.load(Ordering::SeqCst) {
            self.keep_bitmaps();
        }
        Ok(())
    }
}
