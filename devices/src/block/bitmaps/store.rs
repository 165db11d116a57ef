//! When persistent bitmaps are read and written: [`file`] says how.
//!
//! ```text
//! lock ─▶ load: bitmaps are here ─▶ mark: the file says "in use" ─▶ … save … ─▶ close: the file has them ─▶ unlock
//! ```
//! In the pause of a move nothing waits for storage if it need not. The destination only loads, and marks once the
//! guest runs there; until then it can give the image back as it was. If all bitmaps leave with the guest, the
//! source removes the file shortly before the pause: a crash from then on loses them instead of making them
//! inconsistent.
//!
//! They follow the right to write to the image: a shared image's leave with its lock, unless they travel with
//! the guest. A file that says "in use" when it is loaded was left by a crash, and an image that has changed
//! since its bitmaps were stored was written by somebody else: in both cases they have missed writes, and
//! become inconsistent.
//!
//! A read-only disk's bitmaps are loaded, and nothing is written.

use super::file::{self, Damage, Identity};
use super::{BitmapError, Bitmaps, Entry, Transit};
use crate::block::BlockNode;
use crate::lock;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
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
    /// We are, and the file does not say so yet, or any more. Once the guest has written, the image is another one
    /// than the file's.
    Unmarked,
    /// We have been, until the image was this one.
    Past(Identity),
}

/// For whom a disk is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// The destination, to which bitmaps leave with the guest.
    Destination,
    /// Whoever opens the image next.
    Anyone,
}

impl Bitmaps {
    /// Whether closing the disk has bitmaps to store.
    pub fn has_persistent(&self) -> bool {
        lock(&self.entries).iter().any(|entry| entry.persistent)
    }

    /// Whether giving the disk up for a migration takes more than a moment: bitmaps that stay have to be stored, or
    /// the file of those that leave be removed.
    pub fn leaving_takes_time(&self) -> bool {
        let entries = lock(&self.entries);
        let mut persistent = entries.iter().filter(|entry| entry.persistent).peekable();
        if persistent.peek().is_none() || self.is_read_only() {
            return false;
        }
        // Locked while the file is written: that takes time as well.
        let removed = self.custody.try_lock().is_ok_and(|it| matches!(*it, Custody::Unmarked));
        !removed || persistent.any(|entry| entry.transit != Transit::Leaving)
    }

    fn persistent(&self) -> Vec<Entry> {
        lock(&self.entries).iter().filter(|entry| entry.persistent).cloned().collect()
    }

    /// The same, to be stored: whole, whatever a job has frozen.
    fn persistent_to_store(&self) -> Vec<Entry> {
        self.persistent().into_iter().map(Entry::thawed).collect()
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
            entry.loaded = true;
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
    fn bitmap_file(&self) -> Option<(Arc<File>, PathBuf)> {
        let backend = self.backend();
        let (image, path) = backend.image_file()?;
        // Beside the image, not beside a symlink to it, so that everybody finds it.
        let path = path.canonicalize().unwrap_or(path);
        Some((image, file::with_suffix(&path, SUFFIX)))
    }

    /// The image has just been created: a file that is beside it, or where it will be renamed to, is of another
    /// one, and is not looked at. [`BlockNode::mark_bitmaps`] removes it.
    pub fn image_is_new(&self) {
        *lock(&self.bitmaps.custody) = Custody::Unmarked;
    }

    /// The disk has another image, which is locked: from now on the bitmaps are kept beside that. Where there is no
    /// place for them, persistent ones become temporary.
    pub(in crate::block) fn adopt_bitmaps(&self) {
        let bitmaps = &self.bitmaps;
        let mut custody = lock(&bitmaps.custody);
        let storable = self.backend().image_file().is_some();
        bitmaps.storable.store(storable, Ordering::SeqCst);
        if matches!(*custody, Custody::None) {
            return;
        }
        *custody = Custody::Unmarked;
        bitmaps.given_up.store(false, Ordering::SeqCst);
        if !storable {
            let _turn = lock(&bitmaps.turn);
            for entry in lock(&bitmaps.entries).iter_mut().filter(|entry| entry.persistent) {
                log::warn!(
                    "bitmap {} of disk {} is not persistent any more: the disk's image is not a regular file",
                    entry.name,
                    self.id
                );
                entry.persistent = false;
            }
        }
        drop(custody);
        self.mark_or_remove_bitmaps();
    }

    /// Loads persistent bitmaps. Call it when the image has just been locked; before anything writes to it, if there
    /// is time for that, [`BlockNode::mark_bitmaps`]. Writes nothing. Loading twice is not an error.
    ///
    /// After [`BlockNode::close_bitmaps`] those in memory are used again, if nobody else has written to the
    /// image meanwhile; then returns true.
    pub fn load_bitmaps(&self) -> Result<bool, StoreError> {
        let bitmaps = &self.bitmaps;
        let mut custody = lock(&bitmaps.custody);
        let then = match *custody {
            Custody::Ours | Custody::Unmarked => return Ok(false),
            Custody::None => None,
            Custody::Past(then) => Some(then),
        };
        let Some((image, path)) = self.bitmap_file() else { return Ok(false) };
        let unmarked = |source| StoreError::Mark { path: path.clone(), source };
        let now = Identity::of(&image).map_err(unmarked)?;
        match then {
            None => {
                let loaded = bitmaps.read(&path, now)?;
                let installed = bitmaps.install(loaded);
                installed.map_err(|source| StoreError::Conflict { path, source })?;
            }
            Some(then) if then != now && !bitmaps.info().is_empty() => {
                log::warn!(
                    "bitmaps of disk {} are inconsistent: its image was changed by another program",
                    bitmaps.id
                );
                bitmaps.spoil();
            }
            Some(_) => {}
        }
        *custody = Custody::Unmarked;
        bitmaps.given_up.store(false, Ordering::SeqCst);
        Ok(then.is_some())
    }

    /// Forgets what [`BlockNode::load_bitmaps`] has loaded, as if it had not been called. For who has locked the image
    /// and gives it back without having written to it.
    pub fn forget_bitmaps(&self) {
        let bitmaps = &self.bitmaps;
        let mut custody = lock(&bitmaps.custody);
        let _turn = lock(&bitmaps.turn);
        lock(&bitmaps.entries).retain(|entry| {
            if entry.loaded {
                bitmaps.writes.remove(&entry.bitmap);
            }
            !entry.loaded
        });
        *custody = Custody::None;
    }

    /// Has the file say that the bitmaps are in use, if it does not: they will have missed writes if they are not
    /// stored. Without bitmaps, there is no file. Nothing happens if they are not loaded, or are given up.
    ///
    /// # Errors
    /// If it cannot be written; the bitmaps in memory are as good as before.
    pub fn mark_bitmaps(&self) -> Result<(), StoreError> {
        self.mark(&mut lock(&self.bitmaps.custody))
    }

    fn mark(&self, custody: &mut Custody) -> Result<(), StoreError> {
        let bitmaps = &self.bitmaps;
        if !matches!(*custody, Custody::Unmarked) || bitmaps.is_read_only() {
            return Ok(());
        }
        let Some((image, path)) = self.bitmap_file() else { return Ok(()) };
        let (moving, here): (Vec<_>, Vec<_>) =
            bitmaps.persistent().into_iter().partition(|entry| entry.transit != Transit::None);
        let marked = match here.is_empty() {
            true => file::remove(&path),
            false => Identity::of(&image).and_then(|now| {
                let how = (true, false);
                file::write(&path, self.len_bytes, &here, now, how, &|| true)
            }),
        };
        marked.map_err(|source| StoreError::Mark { path, source })?;
        // Those that arrive are marked when they are whole.
        if moving.is_empty() {
            *custody = Custody::Ours;
        }
        Ok(())
    }

    /// As [`BlockNode::mark_bitmaps`], when persistent bitmaps have been added: the file shall name them as well.
    pub fn mark_added_bitmaps(&self) -> Result<(), StoreError> {
        let mut custody = lock(&self.bitmaps.custody);
        if matches!(*custody, Custody::Ours) {
            *custody = Custody::Unmarked;
        }
        self.mark(&mut custody)
    }

    /// As [`BlockNode::mark_bitmaps`], for a guest that runs in any case: what cannot be marked is removed, so that
    /// nobody believes it.
    pub fn mark_or_remove_bitmaps(&self) {
        // Held to the end: nobody stores them or gives the disk up in between.
        let mut custody = lock(&self.bitmaps.custody);
        let Err(error) = self.mark(&mut custody) else { return };
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
        log::error!("disk {}: {error}{}", self.id, cause.as_deref().unwrap_or(""));
        if let Some((_, path)) = self.bitmap_file()
            && let Err(error) = file::remove(&path)
        {
            log::error!("cannot remove {}: {error}", path.display());
        }
    }

    /// The guest is about to leave: if all persistent bitmaps leave with it, removes their file while the guest
    /// runs, so that [`BlockNode::leave_bitmaps`] has nothing to do. If they stay after all, call
    /// [`BlockNode::mark_bitmaps`].
    pub fn remove_bitmaps_ahead(&self) -> io::Result<()> {
        let Some((_, path)) = self.bitmap_file() else { return Ok(()) };
        let mut custody = lock(&self.bitmaps.custody);
        let entries = self.bitmaps.persistent();
        let leave =
            !entries.is_empty() && entries.iter().all(|entry| entry.transit == Transit::Leaving);
        if leave && matches!(*custody, Custody::Ours) && !self.bitmaps.is_read_only() {
            file::remove(&path)?;
            *custody = Custody::Unmarked;
        }
        Ok(())
    }

    /// A stop in which [`BlockNode::leave_bitmaps`] was called is called off, and the disk is still locked: those
    /// in memory are used again. Does no I/O; a call that is not done yet learns it by its flag.
    pub fn keep_bitmaps(&self) {
        if let Ok(mut custody) = self.bitmaps.custody.try_lock()
            && matches!(*custody, Custody::Past(_))
        {
            *custody = Custody::Unmarked;
            self.bitmaps.given_up.store(false, Ordering::SeqCst);
        }
    }

    /// Stores persistent bitmaps now, while they are in use: a crash still makes them inconsistent.
    pub fn save_bitmaps(&self) -> Result<(), StoreError> {
        let bitmaps = &self.bitmaps;
        let mut custody = lock(&bitmaps.custody);
        if !matches!(*custody, Custody::Ours | Custody::Unmarked) || bitmaps.is_read_only() {
            return Ok(());
        }
        let Some((image, path)) = self.bitmap_file() else { return Ok(()) };
        let all = {
            let _turn = lock(&bitmaps.turn);
            bitmaps.persistent_to_store()
        };
        let (arriving, entries): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|entry| entry.transit == Transit::Arriving);
        let stored = match entries.is_empty() {
            true => file::remove(&path),
            false => Identity::of(&image).and_then(|now| {
                file::write(&path, self.len_bytes, &entries, now, (true, true), &|| true)
            }),
        };
        stored.map_err(|source| cannot_store(path, &entries, source))?;
        // Those that arrive are marked when they are whole.
        *custody = if arriving.is_empty() { Custody::Ours } else { Custody::Unmarked };
        Ok(())
    }

    /// Stores persistent bitmaps and gives them back. Call it when nobody writes to the disk any more, before
    /// the image is unlocked. Those that have not arrived whole are not stored; those that were to leave are, as the
    /// guest ends here. Nothing happens if they have not been loaded, or are closed already.
    pub fn close_bitmaps(&self) -> Result<(), StoreError> {
        self.give_up_bitmaps(Next::Anyone, &AtomicBool::new(false))
    }

    /// As [`BlockNode::close_bitmaps`], but those that leave with the guest are not stored. If `called_off` is set
    /// before it is done, the guest runs, and the bitmaps are still in use. Who sets it calls
    /// [`BlockNode::keep_bitmaps`] next.
    pub fn leave_bitmaps(&self, called_off: &AtomicBool) -> Result<(), StoreError> {
        self.give_up_bitmaps(Next::Destination, called_off)
    }

    fn give_up_bitmaps(&self, next: Next, called_off: &AtomicBool) -> Result<(), StoreError> {
        let wanted = || !called_off.load(Ordering::SeqCst);
        let bitmaps = &self.bitmaps;
        let mut custody = lock(&bitmaps.custody);
        if !matches!(*custody, Custody::Ours | Custody::Unmarked) || !wanted() {
            return Ok(());
        }
        let Some((image, path)) = self.bitmap_file() else { return Ok(()) };
        let stays = |entry: &Entry| match entry.transit {
            Transit::None => true,
            Transit::Leaving => next == Next::Anyone,
            Transit::Arriving => false,
        };
        let mut entries = bitmaps.persistent();
        entries.retain(stays);
        if !entries.is_empty() {
            // What a transaction has done to them, and what was written meanwhile, is in them then. None follows.
            let _turn = lock(&bitmaps.turn);
            bitmaps.given_up.store(true, Ordering::SeqCst);
            entries = bitmaps.persistent_to_store();
            entries.retain(stays);
        }
        let stored = (|| {
            if bitmaps.is_read_only() {
                return Identity::of(&image);
            }
            if entries.is_empty() {
                file::remove(&path)?;
                return Identity::of(&image);
            }
            // Bitmaps must not survive a crash of the host that the writes do not.
            self.sync()?;
            let now = Identity::of(&image)?;
            file::write(&path, self.len_bytes, &entries, now, (false, true), &wanted)?;
            Ok(now)
        })();
        let given_up = |is| bitmaps.given_up.store(is, Ordering::SeqCst);
        match stored {
            Ok(now) if wanted() => {
                *custody = Custody::Past(now);
                given_up(true);
            }
            Ok(_) => {
                *custody = Custody::Unmarked;
                given_up(false);
            }
            Err(source) => {
                given_up(false);
                return Err(cannot_store(path, &entries, source));
            }
        }
        drop(custody);
        // Set after the look above, by somebody who did not get the lock.
        if !wanted() {
            self.keep_bitmaps();
        }
        Ok(())
    }
}

fn cannot_store(path: PathBuf, entries: &[Entry], source: io::Error) -> StoreError {
    let lost: Vec<_> = entries.iter().map(|entry| entry.name.as_str()).collect();
    StoreError::Store { path, lost: lost.join(", "), source }
}
