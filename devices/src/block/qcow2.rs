//! qcow2 images, with backing files, through the `imago` crate.
//!
//! Formats are never probed: the user declares the image as qcow2, and the image's header records the
//! format of its backing file. The backing chain is opened read-only. Metadata is cached from opening on,
//! so an image has one user at a time: it can be migrated, not shared.

mod chain;

use super::backend::{
    BackingChain, BlockBackend, Content, Extent, LockError, write_zeroes_as_data,
};
use super::ofd_lock::Operation;
use super::raw::{Cache, OpenError, hold_partial, lock_file, make_direct, unlock_file};
use super::{Format, SECTOR_BYTES};
pub use chain::Backing;
use chain::{Chain, recorded_backing};
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatCreateBuilder, ShallowMapping, StorageOpenOptions};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// An open qcow2 image.
pub struct Qcow2File {
    /// Write-locked for operations that may invalidate mappings in use: discards.
    image: RwLock<FormatAccess<ImagoFile>>,
    /// The image's open file description, which holds the lock.
    file: File,
    path: PathBuf,
    len_bytes: u64,
    read_only: bool,
    cache: Cache,
    /// Its backing chain.
    chain: Option<Chain>,
}

impl std::fmt::Debug for Qcow2File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2File").field("path", &self.path).finish_non_exhaustive()
    }
}

fn open_file(path: &Path, write: bool, cache: Cache) -> io::Result<(File, ImagoFile)> {
    let mut options = OpenOptions::new();
    options.read(true).write(write);
    if cache == Cache::None {
        options.custom_flags(libc::O_DIRECT);
    }
    let file = options.open(path)?;
    Ok((file.try_clone()?, storage(file, path, write, cache)?))
}

fn storage(file: File, path: &Path, write: bool, cache: Cache) -> io::Result<ImagoFile> {
    let options = StorageOpenOptions::new().filename(path).write(write);
    ImagoFile::from_open_file(file, options.direct(cache == Cache::None))
}

fn refused(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Qcow2File {
    /// Opens the image and the backing chain that it records, without locking.
    pub fn open(path: &Path, read_only: bool, cache: Cache) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open { path: path.to_owned(), source };
        let (file, storage) = open_file(path, !read_only, cache).map_err(failed)?;
        Self::assemble(file, storage, path, path, read_only, cache)
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
        let file = hold_partial(partial, path, len_bytes)?;
        let made = (|| {
            file.set_len(0)?;
            let image = storage(file.try_clone()?, partial, true, Cache::Writeback)?;
            let mut builder = Qcow2::<ImagoFile>::create_builder(image).size(len_bytes);
            if let Some(backing) = backing {
                let name = std::path::absolute(&backing.path)?;
                let name = name.into_os_string().into_string();
                let name =
                    name.map_err(|_| refused("a backing file's name is not UTF-8".into()))?;
                builder = builder.backing(name, backing.format.name().to_owned());
            }
            builder.create()
        })();
        made.map_err(failed)
            .and_then(|()| {
                if cache == Cache::None {
                    make_direct(&file, path)?;
                }
                let same = file.try_clone().map_err(failed)?;
                let image = storage(same, partial, true, cache).map_err(failed)?;
                Self::assemble(file, image, partial, path, false, cache)
            })
            .inspect_err(|_| drop(std::fs::remove_file(partial)))
    }

    fn assemble(
        file: File,
        storage: ImagoFile,
        at: &Path,
        path: &Path,
        read_only: bool,
        cache: Cache,
    ) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open { path: path.to_owned(), source };
        let mut image = Qcow2::open_image(storage, !read_only).map_err(failed)?;
        let below = recorded_backing(&image, at).map_err(failed)?;
        let (chain, below) = match below.as_ref().map(Chain::open).transpose().map_err(failed)? {
            Some((chain, below)) => (Some(chain), Some(below)),
            None => (None, None),
        };
        image.set_data_file(None);
        image.set_backing(below);
        let image = FormatAccess::new(image);
        let len_bytes = image.size();
        if len_bytes == 0 {
            return Err(OpenError::Empty { path: path.to_owned() });
        }
        if !len_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(OpenError::OddSize { path: path.to_owned(), len_bytes });
        }
        let (image, path) = (RwLock::new(image), path.to_owned());
        Ok(Self { image, file, path, len_bytes, read_only, cache, chain })
    }

    fn image(&self) -> RwLockReadGuard<'_, FormatAccess<ImagoFile>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn image_alone(&self) -> RwLockWriteGuard<'_, FormatAccess<ImagoFile>> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockBackend for Qcow2File {
    fn location(&self) -> String {
        self.path.display().to_string()
    }

    fn format(&self) -> &'static str {
        Format::Qcow2.name()
    }

    fn is_direct(&self) -> bool {
        self.cache == Cache::None
    }

    fn backing(&self) -> Option<&dyn BackingChain> {
        self.chain.as_ref().map(|chain| chain as &dyn BackingChain)
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.image().read(buffer, offset_bytes)
    }

    fn write_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.image().write(buffer, offset_bytes)
    }

    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        // To zeroes: uncovering the backing file would show stale data.
        match self.image_alone().discard_to_zero(offset_bytes, len_bytes) {
            // Version 2 images cannot. Discards are advisory.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()> {
        let zeroed = if may_unmap {
            self.image_alone().discard_to_zero(offset_bytes, len_bytes)
        } else {
            self.image().write_zeroes(offset_bytes, len_bytes)
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
        let image = self.image();
        let (mapping, len_bytes) = image.get_shallow_mapping(offset_bytes, rest)?;
        let content = match mapping {
            ShallowMapping::Indirect { .. } => Content::Backing,
            ShallowMapping::Zero { .. } => Content::Zero,
            ShallowMapping::Eof { .. } => {
                return Ok(Extent { len_bytes: rest, content: Content::Zero });
            }
            _ => Content::Data,
        };
        Ok(Extent { len_bytes: len_bytes.clamp(1, rest.max(1)), content })
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks().saturating_mul(512))
    }

    fn plain_file(&self) -> Option<(Arc<File>, usize)> {
        None
    }

    fn write_back(&self) -> io::Result<()> {
        self.image().flush()
    }

    fn flush(&self) -> io::Result<()> {
        let image = self.image();
        image.flush()?;
        image.sync()
    }

    fn lock(&self) -> Result<(), LockError> {
        let operation = if self.read_only { Operation::Shared } else { Operation::Exclusive };
        lock_file(&self.file, &self.path, operation)?;
        if let Some(Err(error)) = self.chain.as_ref().map(Chain::lock) {
            self.unlock();
            return Err(error);
        }
        Ok(())
    }

    fn unlock(&self) {
        unlock_file(&self.file, &self.path);
        if let Some(chain) = &self.chain {
            chain.unlock();
        }
    }
}

#[cfg(test)]
mod tests;
