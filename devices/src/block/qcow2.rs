//! qcow2 images, with backing files, through the `imago` crate.
//!
//! Formats are never probed: the user declares the image as qcow2, and the image's header records the
//! format of its backing file. The backing chain is opened read-only.
//!
//! Metadata is cached while the image is locked, and only then: locking reads it, unlocking drops it. So two
//! processes can share an image whose lock moves with the right to run, and neither sees stale tables or
//! writes any. QEMU calls that activating and inactivating an image.

mod chain;

use super::aligned::AlignedBuffer;
pub use super::backend::Backing;
use super::backend::{
    BackingChain, BlockBackend, Content, Extent, LockError, write_zeroes_as_data,
};
use super::ofd_lock::Operation;
use super::raw::{Cache, OpenError, hold_partial, lock_file, make_direct, unlock_file};
use super::{Format, SECTOR_BYTES};
use crate::lock;
use chain::Chain;
pub use chain::{BackingChoice, MAX_DEPTH};
use imago::file::File as ImagoFile;
use imago::format::drivers::FormatDriverInstance;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatCreateBuilder, ShallowMapping, StorageOpenOptions};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// An image whose metadata is loaded. Write-locked for operations that may invalidate mappings in use:
/// discards.
type Image = RwLock<FormatAccess<ImagoFile>>;

/// An open qcow2 image.
pub struct Qcow2File {
    /// `None` while it is not locked.
    image: Mutex<Option<Arc<Image>>>,
    /// The image's open file description, which holds the lock.
    file: Arc<File>,
    /// The image's name.
    path: PathBuf,
    /// Where it was opened: a new image has another name until it is complete.
    at: PathBuf,
    len_bytes: u64,
    cluster_bytes: u64,
    read_only: bool,
    cache: Cache,
    /// What the user said about its backing file.
    choice: BackingChoice,
    /// Its backing chain.
    chain: Option<Arc<Chain>>,
}

impl std::fmt::Debug for Qcow2File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2File").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Opens a regular file or block device; anything else may hang or has no size.
fn open_file(path: &Path, write: bool, cache: Cache) -> io::Result<File> {
    let direct = if cache == Cache::None { libc::O_DIRECT } else { 0 };
    let mut options = OpenOptions::new();
    // A FIFO would otherwise be waited for.
    options.read(true).write(write).custom_flags(libc::O_NONBLOCK | direct);
    let file = options.open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(refused("it is neither a regular file nor a block device".into()));
    }
    Ok(file)
}

fn storage(file: File, path: &Path, write: bool, cache: Cache) -> io::Result<ImagoFile> {
    let options = StorageOpenOptions::new().filename(path).write(write);
    ImagoFile::from_open_file(file, options.direct(cache == Cache::None))
}

/// Size of the image's clusters, from its header (qcow2 specification, "Header": bytes 20 to 23). `imago` has
/// checked the header, but does not tell.
fn cluster_bytes(file: &File) -> io::Result<u64> {
    let mut header = AlignedBuffer::new(512);
    file.read_exact_at(&mut header, 0)?;
    let bits = header.get(20..24).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
    let fine = bits.filter(|bits| (9..=21).contains(bits));
    fine.map(|bits| 1 << bits).ok_or_else(|| refused("its clusters have an impossible size".into()))
}

fn refused(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Qcow2File {
    /// Opens the image and its backing chain, without locking: nothing but the headers is read, and nothing
    /// written. It can be used once it is locked.
    pub fn open(
        path: &Path,
        read_only: bool,
        cache: Cache,
        choice: BackingChoice,
    ) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open { path: path.to_owned(), source };
        let file = open_file(path, !read_only, cache).map_err(failed)?;
        Self::assemble(file, path, path, read_only, cache, choice)
    }

    /// Creates a blank image of `len_bytes`, with backing file `backing` if given, in the file `partial`;
    /// see [`super::raw::RawFile::create`].
    pub fn create(
        partial: &Path,
        path: &Path,
        len_bytes: u64,
        cache: Cache,
        backing: Option<&Backing>,
    ) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Create { path: path.to_owned(), len_bytes, source };
        let recorded = backing.map(|backing| {
            let name = std::path::absolute(&backing.path)?.into_os_string().into_string();
            let name = name.map_err(|_| refused("a backing file's name is not UTF-8".into()))?;
            Ok((name, backing.format))
        });
        let recorded = recorded.transpose().map_err(failed)?;
        Self::create_above(partial, path, len_bytes, cache, recorded)
    }

    /// The same, with the backing file `name` in the same folder: they can be moved together.
    pub fn create_beside(
        path: &Path,
        len_bytes: u64,
        name: &str,
        format: Format,
    ) -> Result<Self, OpenError> {
        let recorded = Some((name.to_owned(), format));
        Self::create_above(path, path, len_bytes, Cache::Writeback, recorded)
    }

    /// Creates an image whose header records a backing file.
    fn create_above(
        partial: &Path,
        path: &Path,
        len_bytes: u64,
        cache: Cache,
        recorded: Option<(String, Format)>,
    ) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Create { path: path.to_owned(), len_bytes, source };
        let file = hold_partial(partial, path, len_bytes)?;
        let made = (|| {
            file.set_len(0)?;
            let image = storage(file.try_clone()?, partial, true, Cache::Writeback)?;
            let mut builder = Qcow2::<ImagoFile>::create_builder(image).size(len_bytes);
            if let Some((name, format)) = recorded {
                builder = builder.backing(name, format.name().to_owned());
            }
            builder.create()
        })();
        made.map_err(failed)
            .and_then(|()| {
                if cache == Cache::None {
                    make_direct(&file, path)?;
                }
                Self::assemble(file, partial, path, false, cache, BackingChoice::Recorded)
            })
            .inspect_err(|_| drop(std::fs::remove_file(partial)))
    }

    fn assemble(
        file: File,
        at: &Path,
        path: &Path,
        read_only: bool,
        cache: Cache,
        choice: BackingChoice,
    ) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open { path: path.to_owned(), source };
        let same = file.try_clone().map_err(failed)?;
        let header = storage(same, at, false, cache).and_then(|it| Qcow2::open_image(it, false));
        let header = header.map_err(failed)?;
        let backing = choice.of(&header, at).map_err(failed)?;
        let len_bytes = header.size();
        if len_bytes == 0 {
            return Err(OpenError::Empty { path: path.to_owned() });
        }
        if !len_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(OpenError::OddSize { path: path.to_owned(), len_bytes });
        }
        let chain = backing.map(Chain::open).transpose().map_err(failed)?.map(Arc::new);
        let cluster_bytes = cluster_bytes(&file).map_err(failed)?;
        let (image, path, at) = (Mutex::new(None), path.to_owned(), at.to_owned());
        let file = Arc::new(file);
        Ok(Self {
            image,
            file,
            path,
            at,
            len_bytes,
            cluster_bytes,
            read_only,
            cache,
            choice,
            chain,
        })
    }

    /// Reads the metadata of the image, which is locked.
    fn load(&self) -> io::Result<FormatAccess<ImagoFile>> {
        let storage = storage(self.file.try_clone()?, &self.at, !self.read_only, self.cache)?;
        let mut image = Qcow2::open_image(storage, !self.read_only)?;
        let backing = self.choice.of(&image, &self.at)?;
        if image.size() != self.len_bytes
            || backing.as_ref() != self.chain.as_deref().map(Chain::topmost)
        {
            return Err(refused("its size or backing file has changed since it was opened".into()));
        }
        image.set_data_file(None);
        image.set_backing(self.chain.as_deref().map(Chain::reader).transpose()?);
        Ok(FormatAccess::new(image))
    }

    fn try_lock(&self) -> Result<(), LockError> {
        let operation = if self.read_only { Operation::Shared } else { Operation::Exclusive };
        lock_file(&self.file, &self.path, operation)?;
        self.chain.as_deref().map_or(Ok(()), Chain::lock)?;
        let mut image = lock(&self.image);
        if image.is_none() {
            let location = self.path.display().to_string();
            let loaded = self.load();
            let loaded = loaded.map_err(|source| LockError::Unreadable { location, source })?;
            *image = Some(Arc::new(RwLock::new(loaded)));
        }
        Ok(())
    }

    /// The image, if it is locked. Whoever still uses it after an unlock keeps nobody waiting.
    fn loaded(&self) -> Option<Arc<Image>> {
        lock(&self.image).clone()
    }

    /// Calls `work` with the image.
    ///
    /// # Errors
    /// That of `work`, or if the image is not locked.
    fn with<T>(
        &self,
        work: impl FnOnce(&FormatAccess<ImagoFile>) -> io::Result<T>,
    ) -> io::Result<T> {
        let image = self.loaded().ok_or_else(not_locked)?;
        work(&image.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The same, for what has nothing to do while the image is not locked: unlocking has flushed it.
    fn if_loaded(
        &self,
        work: impl FnOnce(&FormatAccess<ImagoFile>) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(image) = self.loaded() else { return Ok(()) };
        work(&image.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The same as [`Qcow2File::with`], while nobody else uses it.
    fn alone<T>(
        &self,
        work: impl FnOnce(&mut FormatAccess<ImagoFile>) -> io::Result<T>,
    ) -> io::Result<T> {
        let image = self.loaded().ok_or_else(not_locked)?;
        work(&mut image.write().unwrap_or_else(PoisonError::into_inner))
    }
}

fn not_locked() -> io::Error {
    io::Error::other("the image is not locked: it may be in use elsewhere")
}

impl BlockBackend for Qcow2File {
    fn location(&self) -> String {
        self.path.display().to_string()
    }

    fn format(&self) -> &'static str {
        Format::Qcow2.name()
    }

    fn image_file(&self) -> Option<(Arc<File>, PathBuf)> {
        let regular = self.file.metadata().is_ok_and(|metadata| metadata.is_file());
        regular.then(|| (self.file.clone(), self.path.clone()))
    }

    fn cluster_bytes(&self) -> Option<u64> {
        Some(self.cluster_bytes)
    }

    fn is_direct(&self) -> bool {
        self.cache == Cache::None
    }

    fn backing(&self) -> Option<Arc<dyn BackingChain>> {
        self.chain.clone().map(|chain| chain as Arc<dyn BackingChain>)
    }

    fn overrules_backing(&self) -> bool {
        self.choice != BackingChoice::Recorded
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.with(|image| image.read(buffer, offset_bytes))
    }

    fn write_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.with(|image| image.write(buffer, offset_bytes))
    }

    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        // To zeroes: uncovering the backing file would show stale data.
        match self.alone(|image| image.discard_to_zero(offset_bytes, len_bytes)) {
            // Version 2 images cannot. Discards are advisory.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()> {
        let zeroed = if may_unmap {
            self.alone(|image| image.discard_to_zero(offset_bytes, len_bytes))
        } else {
            self.with(|image| image.write_zeroes(offset_bytes, len_bytes))
        };
        match zeroed {
            // Version 2 images have no zero clusters.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                write_zeroes_as_data(self, offset_bytes, len_bytes)
            }
            result => result,
        }
    }

    fn extent_at(&self, offset_bytes: u64) -> io::Result<Extent> {
        let rest = self.len_bytes.saturating_sub(offset_bytes);
        let (content, len_bytes) = self.with(|image| {
            let (mapping, len_bytes) = image.get_shallow_mapping(offset_bytes, rest)?;
            Ok(match mapping {
                ShallowMapping::Indirect { .. } => (Content::Backing, len_bytes),
                ShallowMapping::Zero { .. } => (Content::Zero, len_bytes),
                ShallowMapping::Eof { .. } => (Content::Zero, rest),
                _ => (Content::Data, len_bytes),
            })
        })?;
        Ok(Extent { len_bytes: len_bytes.clamp(1, rest.max(1)), content })
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks().saturating_mul(512))
    }

    fn plain_file(&self) -> Option<(Arc<File>, usize)> {
        None
    }

    fn write_back(&self) -> io::Result<()> {
        self.if_loaded(|image| image.flush())
    }

    fn flush(&self) -> io::Result<()> {
        self.if_loaded(|image| {
            image.flush()?;
            image.sync()
        })
    }

    fn lock(&self) -> Result<(), LockError> {
        self.try_lock().inspect_err(|_| self.unlock())
    }

    fn unlock(&self) {
        let image = lock(&self.image).take();
        // The caller has written it back; this is for one that gave up.
        match image.as_ref().map(|image| image.try_write()) {
            Some(Ok(image)) => {
                if let Err(error) = image.flush() {
                    log::error!("{}: {error}", self.path.display());
                }
            }
            // A reader of a cancelled copy, for example, whose storage hangs. It reads what it likes.
            Some(Err(_)) => log::warn!("{}: unlocked while it is being read", self.path.display()),
            None => {}
        }
        unlock_file(&self.file, &self.path);
        if let Some(chain) = &self.chain {
            chain.unlock();
        }
    }
}

#[cfg(test)]
mod tests;
