//! A raw image: the file's bytes are the disk's. The format is never probed: the user declares it.

use super::SECTOR_BYTES;
use super::aligned::AlignedBuffer;
use super::backend::{
    BackingChain, BlockBackend, ByteRange, Content, Extent, LockError, write_zeroes_as_data,
};
use super::ofd_lock::{self, Operation};
use super::write_back;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

/// An image that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot open disk image {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("disk image {path} is neither a file nor a block device")]
    NotAFile { path: PathBuf },
    #[error(
        "disk image {path} has {len_bytes} bytes, not a multiple of {SECTOR_BYTES}: \
         enlarge it with `truncate -s %{SECTOR_BYTES}`"
    )]
    OddSize { path: PathBuf, len_bytes: u64 },
    #[error("disk image {path} cannot bypass the host's page cache ({why}): use cache=writeback")]
    NoDirectIo {
        path: PathBuf,
        why: &'static str,
        #[source]
        source: io::Error,
    },
    /// Out of space, or no permission.
    #[error("cannot create disk image {path} of {len_bytes} bytes")]
    Create {
        path: PathBuf,
        len_bytes: u64,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Locked(#[from] LockError),
    #[error("disk image {path} is empty: give it a size with `truncate -s SIZE`")]
    Empty { path: PathBuf },
}

/// Whether the host's page cache is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Yes; the guest's flushes make writes durable.
    #[default]
    Writeback,
    /// No: `O_DIRECT`.
    None,
}

impl FromStr for Cache {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "writeback" => Ok(Self::Writeback),
            "none" => Ok(Self::None),
            other => Err(format!("cache {other:?} is neither writeback nor none")),
        }
    }
}

/// An open raw image.
#[derive(Debug)]
pub struct RawFile {
    file: Arc<File>,
    path: PathBuf,
    len_bytes: u64,
    read_only: bool,
    cache: Cache,
}

impl RawFile {
    /// Opens the image without locking it.
    pub fn open(path: &Path, read_only: bool, cache: Cache) -> Result<Self, OpenError> {
        let path = path.to_owned();
        let failed = |source| OpenError::Open { path: path.clone(), source };
        let kind = std::fs::metadata(&path).map_err(failed)?.file_type();
        if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
            return Err(OpenError::NotAFile { path });
        }
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only);
        if cache == Cache::None {
            options.custom_flags(libc::O_DIRECT);
        }
        let mut file = match options.open(&path) {
            Ok(file) => file,
            Err(source) if cache == Cache::None => return Err(no_direct_io(&path, source)),
            Err(source) => return Err(failed(source)),
        };
        // The metadata of a block device has no length: seek to its end.
        let len_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if len_bytes == 0 {
            return Err(OpenError::Empty { path });
        }
        if !len_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(OpenError::OddSize { path, len_bytes });
        }
        if cache == Cache::None {
            probe_direct_io(&file, &path, len_bytes)?;
        }
        let file = Arc::new(file);
        Ok(Self { file, path, len_bytes, read_only, cache })
    }

    /// Creates a blank, locked image of `len_bytes` in the file `partial`, or takes over what an earlier
    /// attempt left there. Messages call it `path`, the name that it gets once it is complete.
    pub fn create(
        partial: &Path,
        path: &Path,
        len_bytes: u64,
        cache: Cache,
    ) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Create { path: path.to_owned(), len_bytes, source };
        let made = RawFile {
            file: Arc::new(hold_partial(partial, path, len_bytes)?),
            path: path.to_owned(),
            len_bytes,
            read_only: false,
            cache: Cache::Writeback,
        };
        let sized = made.file.set_len(0).and_then(|()| made.file.set_len(len_bytes));
        let created = sized.map_err(failed).and_then(|()| match cache {
            Cache::Writeback => Ok(made),
            // Probing needs a file that is not empty.
            Cache::None => {
                make_direct(&made.file, path)?;
                probe_direct_io(&made.file, path, len_bytes)?;
                Ok(Self { cache, ..made })
            }
        });
        created.inspect_err(|_| drop(std::fs::remove_file(partial)))
    }

    /// The file's current length; the disk keeps the length from opening.
    fn current_len(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        Ok(if metadata.is_file() { metadata.len() } else { self.len_bytes })
    }

    /// Whether `buffer` is misaligned for direct I/O.
    fn must_bounce(&self, buffer: &[u8]) -> bool {
        self.cache == Cache::None && !buffer.as_ptr().addr().is_multiple_of(DIRECT_ALIGNMENT)
    }
}

/// Enough for attempts in quick succession.
const HOLD_TRIES: u32 = 100;

/// Opens and locks the file for an image of `len_bytes`; creates it if it does not exist.
pub(super) fn hold_partial(partial: &Path, path: &Path, len_bytes: u64) -> Result<File, OpenError> {
    if len_bytes == 0 || !len_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(OpenError::OddSize { path: path.to_owned(), len_bytes });
    }
    let failed = |source| OpenError::Create { path: path.to_owned(), len_bytes, source };
    let mut options = OpenOptions::new();
    // Does not follow a symlink, and does not truncate before the file is locked.
    options.read(true).write(true).create(true).truncate(false);
    options.custom_flags(libc::O_NOFOLLOW);
    for _ in 0..HOLD_TRIES {
        let file = options.open(partial).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(OpenError::NotAFile { path: partial.to_owned() });
        }
        lock_file(&file, path, Operation::Exclusive)?;
        // An attempt that just ended may have removed or renamed it meanwhile.
        if is_at(&file, partial).map_err(failed)? {
            return Ok(file);
        }
    }
    Err(failed(io::Error::other(format!("{} keeps being replaced", partial.display()))))
}

/// Whether `path` still names this open file.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (own.dev(), own.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// A locked file with any content.
#[derive(Debug)]
pub struct HeldFile(File);

impl HeldFile {
    /// Locks `path` as its only user.
    pub fn hold(path: &Path) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open { path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        lock_file(&file, path, Operation::Exclusive)?;
        Ok(Self(file))
    }

    /// Whether `path` still names it.
    pub fn is_at(&self, path: &Path) -> io::Result<bool> {
        is_at(&self.0, path)
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.0.metadata()?.len() == 0)
    }
}

pub(super) fn lock_file(file: &File, path: &Path, operation: Operation) -> Result<(), LockError> {
    ofd_lock::change(file, operation).map_err(|source| {
        let location = path.display().to_string();
        match source.kind() {
            io::ErrorKind::WouldBlock => LockError::Held { location },
            _ => LockError::Refused { location, source },
        }
    })
}

pub(super) fn unlock_file(file: &File, path: &Path) {
    if let Err(error) = ofd_lock::change(file, Operation::Unlock) {
        log::error!("cannot unlock {}: {error}", path.display());
    }
}

/// Direct I/O needs memory aligned to at least a sector, as [`probe_direct_io`] verified.
const DIRECT_ALIGNMENT: usize = 512;

/// Reads one sector into a buffer with the smallest alignment that we use.
fn probe_direct_io(file: &File, path: &Path, len_bytes: u64) -> Result<(), OpenError> {
    let mut buffer = AlignedBuffer::new(2 * DIRECT_ALIGNMENT);
    let (_, sector) = buffer.split_at_mut(DIRECT_ALIGNMENT);
    let probed = file.read_exact_at(sector, (len_bytes - SECTOR_BYTES).min(SECTOR_BYTES));
    probed.map_err(|source| match is_invalid(&source) {
        true => {
            let why = "it needs accesses of more than 512 bytes";
            OpenError::NoDirectIo { path: path.to_owned(), why, source }
        }
        false => OpenError::Open { path: path.to_owned(), source },
    })
}

/// Sets `O_DIRECT` on an open file. Reopening would drop the lock for a moment.
pub(super) fn make_direct(file: &File, path: &Path) -> Result<(), OpenError> {
    let flags = rustix::fs::fcntl_getfl(file);
    let set = flags.and_then(|flags| rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT));
    set.map_err(|errno| no_direct_io(path, errno.into()))
}

fn no_direct_io(path: &Path, source: io::Error) -> OpenError {
    let path = path.to_owned();
    if is_invalid(&source) {
        let why = "its file system refuses O_DIRECT";
        return OpenError::NoDirectIo { path, why, source };
    }
    OpenError::Open { path, source }
}

fn is_invalid(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

impl RawFile {
    /// Changes the allocation of a range; `false` if the file system does not support it.
    fn allocate(&self, mode: fn() -> FallocateMode, offset: u64, len: u64) -> io::Result<bool> {
        loop {
            let Err(error) = fallocate(self.file.as_ref(), mode(), true, offset, len) else {
                return Ok(true);
            };
            match error.errno() {
                libc::EINTR => {}
                // EINVAL: a block device with larger sectors than the guest's.
                libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL => return Ok(false),
                other => return Err(io::Error::from_raw_os_error(other)),
            }
        }
    }
}

impl BlockBackend for RawFile {
    fn location(&self) -> String {
        self.path.display().to_string()
    }

    fn format(&self) -> &'static str {
        "raw"
    }

    fn backing(&self) -> Option<Arc<dyn BackingChain>> {
        None
    }

    fn image_file(&self) -> Option<(Arc<File>, PathBuf)> {
        let regular = self.file.metadata().is_ok_and(|metadata| metadata.is_file());
        regular.then(|| (self.file.clone(), self.path.clone()))
    }

    fn is_direct(&self) -> bool {
        self.cache == Cache::None
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        if self.must_bounce(buffer) {
            let mut aligned = AlignedBuffer::new(buffer.len());
            self.file.read_exact_at(&mut aligned, offset_bytes)?;
            buffer.copy_from_slice(&aligned);
            return Ok(());
        }
        self.file.read_exact_at(buffer, offset_bytes)
    }

    fn write_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()> {
        if self.must_bounce(buffer) {
            let mut aligned = AlignedBuffer::new(buffer.len());
            aligned.copy_from_slice(buffer);
            return self.file.write_all_at(&aligned, offset_bytes);
        }
        self.file.write_all_at(buffer, offset_bytes)
    }

    fn start_write_back(&self, range: ByteRange) {
        if self.cache != Cache::None {
            write_back::start(&self.file, range);
        }
    }

    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        // Advisory: storage without holes ignores it.
        self.allocate(|| FallocateMode::PunchHole, offset_bytes, len_bytes).map(drop)
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()> {
        let zeroed = may_unmap
            && self.allocate(|| FallocateMode::PunchHole, offset_bytes, len_bytes)?
            || self.allocate(|| FallocateMode::ZeroRange, offset_bytes, len_bytes)?;
        if zeroed { Ok(()) } else { write_zeroes_as_data(self, offset_bytes, len_bytes) }
    }

    fn extent_at(&self, offset_bytes: u64) -> io::Result<Extent> {
        let rest = self.len_bytes.saturating_sub(offset_bytes);
        let extent = |end: u64, content| {
            // If the file has shrunk meanwhile, the read reports it.
            let len_bytes = end.saturating_sub(offset_bytes).clamp(1, rest.max(1));
            Ok(Extent { len_bytes, content })
        };
        let seek = |to| rustix::fs::seek(&self.file, to);
        match seek(rustix::fs::SeekFrom::Data(offset_bytes)) {
            Ok(data) if data > offset_bytes => extent(data, Content::Zero),
            Ok(_) => match seek(rustix::fs::SeekFrom::Hole(offset_bytes)) {
                Ok(hole) => extent(hole, Content::Data),
                Err(error) => Err(error.into()),
            },
            // No data from here on, or past the end of a file that has shrunk.
            Err(rustix::io::Errno::NXIO) if self.current_len()? >= self.len_bytes => {
                extent(self.len_bytes, Content::Zero)
            }
            // Block devices and some file systems do not support it.
            Err(
                rustix::io::Errno::NXIO | rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP,
            ) => extent(self.len_bytes, Content::Data),
            Err(error) => Err(error.into()),
        }
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        // `st_blocks` includes the file system's metadata, and is 0 for a block device.
        let blocks = metadata.blocks().saturating_mul(512);
        Ok(if metadata.is_file() { blocks.min(self.len_bytes) } else { self.len_bytes })
    }

    fn plain_file(&self) -> Option<(Arc<File>, usize)> {
        let alignment = match self.cache {
            Cache::Writeback => 1,
            Cache::None => DIRECT_ALIGNMENT,
        };
        Some((self.file.clone(), alignment))
    }

    fn write_back(&self) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn lock(&self) -> Result<(), LockError> {
        let operation = if self.read_only { Operation::Shared } else { Operation::Exclusive };
        lock_file(&self.file, &self.path, operation)
    }

    fn unlock(&self) {
        unlock_file(&self.file, &self.path);
    }
}

#[cfg(test)]
mod tests;
