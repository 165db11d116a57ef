//! One boot file: opened once, never reopened by path, read at offsets in bounded pieces, and identified by
//! its SHA-256. A modification after opening is detected and is an error. Called by [`super::BootPayload`]
//! and, through [`Reader`] or in pieces, by the loaders.

use super::{PayloadError, Role};
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::OnceLock;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// Files are read and hashed in pieces of this size; a read can be cancelled between pieces.
pub(super) const PIECE_BYTES: usize = 256 << 10;

/// Length and time of the last write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    len_bytes: u64,
    modified: (i64, i64),
}

impl Stamp {
    // Not ctime: renaming another file over this one changes that, too, but not the open file.
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        Ok(Self { len_bytes: metadata.len(), modified })
    }
}

/// An open boot file. Reads are positioned, so threads can share it.
#[derive(Debug)]
pub struct BootFile {
    /// Its name in messages.
    name: String,
    file: File,
    stamp: Stamp,
    sha256: OnceLock<[u8; 32]>,
}

impl BootFile {
    /// Opens the file at `path`. Never waits, as opening a FIFO would.
    pub fn open(role: Role, path: &Path) -> Result<Self, PayloadError> {
        let (label, expected) = match role {
            Role::Kernel => ("kernel", "a kernel"),
            Role::Initrd => ("--initrd", "an initrd"),
            Role::Module => ("--initrd", "a module"),
        };
        let name = format!("{label} {}", path.display());
        let open_error = |source| PayloadError::Open { file: name.clone(), source };
        let mut options = OpenOptions::new();
        // A terminal must not become our controlling terminal.
        options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let file = options.open(path).map_err(open_error)?;
        let kind = file.metadata().map_err(open_error)?.file_type();
        if !kind.is_file() {
            let kind = match () {
                () if kind.is_dir() => "a folder",
                () if kind.is_fifo() => "a FIFO",
                () if kind.is_block_device() || kind.is_char_device() => "a device",
                () => "a special file",
            };
            return Err(PayloadError::NotRegular { file: name, expected, kind });
        }
        let stamp = Stamp::of(&file).map_err(open_error)?;
        Ok(Self { name, file, stamp, sha256: OnceLock::new() })
    }

    /// A complete copy with its verified digest.
    pub(super) fn arrived(
        name: String,
        file: File,
        sha256: [u8; 32],
    ) -> Result<Self, PayloadError> {
        let stamp =
            Stamp::of(&file).map_err(|source| PayloadError::Read { file: name.clone(), source })?;
        Ok(Self { name, file, stamp, sha256: OnceLock::from(sha256) })
    }

    /// Its name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Length when it was opened.
    pub fn len_bytes(&self) -> u64 {
        self.stamp.len_bytes
    }

    /// Fails if the file has been written, truncated or extended since it was opened.
    pub fn check_unchanged(&self) -> Result<(), PayloadError> {
        let now = Stamp::of(&self.file).map_err(|source| self.read_error(source))?;
        if now != self.stamp {
            return Err(PayloadError::Changed { file: self.name.clone() });
        }
        Ok(())
    }

    /// Fills `buffer` from `offset_bytes`. Reading past the length at opening is
    /// [`io::ErrorKind::UnexpectedEof`], even if the file has grown.
    pub fn read_at(&self, offset_bytes: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset_bytes.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.len_bytes()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.file.read_exact_at(buffer, offset_bytes)
    }

    /// SHA-256 of the content, cached. `go_on` is polled between pieces and cancels with false.
    pub fn sha256(&self, go_on: &dyn Fn() -> bool) -> Result<[u8; 32], PayloadError> {
        self.check_unchanged()?;
        if let Some(digest) = self.sha256.get() {
            return Ok(*digest);
        }
        let mut hash = Sha256::new();
        let read = self.in_pieces(0, self.len_bytes(), go_on, |_, piece| {
            hash.update(piece);
            Ok::<(), PayloadError>(())
        });
        // "Has changed" is a better error than an unexpected end.
        if !matches!(read, Err(PayloadError::Cancelled)) {
            self.check_unchanged()?;
        }
        read?;
        Ok(*self.sha256.get_or_init(|| hash.finalize().into()))
    }

    /// The first bytes, at most `max_bytes`.
    pub(in crate::boot) fn head(&self, max_bytes: u64) -> Result<Vec<u8>, PayloadError> {
        self.bytes(0, self.len_bytes().min(max_bytes))
    }

    /// `len_bytes` from `offset_bytes`; the caller has bounded them.
    pub(in crate::boot) fn bytes(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Vec<u8>, PayloadError> {
        let len =
            usize::try_from(len_bytes).map_err(|error| self.read_error(io::Error::other(error)))?;
        let mut bytes = vec![0; len];
        self.read_at(offset_bytes, &mut bytes).map_err(|source| self.read_error(source))?;
        Ok(bytes)
    }

    /// Passes `len_bytes` from `offset_bytes` to `take` in pieces, each with its offset from the first.
    pub(in crate::boot) fn in_pieces<E: From<PayloadError>>(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        go_on: &dyn Fn() -> bool,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = Vec::new();
        let mut done: u64 = 0;
        while done < len_bytes {
            if !go_on() {
                return Err(PayloadError::Cancelled.into());
            }
            let left = len_bytes - done;
            let count = usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            buffer.resize(count, 0);
            self.read_at(offset_bytes + done, &mut buffer)
                .map_err(|source| self.read_error(source))?;
            take(done, &buffer)?;
            done += count as u64;
        }
        Ok(())
    }

    /// A reader with its own cursor, at the start.
    pub(in crate::boot) fn reader<'a>(&'a self, go_on: &'a dyn Fn() -> bool) -> Reader<'a> {
        Reader { file: self, at: 0, go_on, buffer: Vec::new(), failed: None }
    }

    fn read_error(&self, source: io::Error) -> PayloadError {
        PayloadError::Read { file: self.name.clone(), source }
    }
}

/// Reads a boot file for linux-loader, which needs a stream.
pub(in crate::boot) struct Reader<'a> {
    file: &'a BootFile,
    at: u64,
    go_on: &'a dyn Fn() -> bool,
    buffer: Vec<u8>,
    /// The error of a failed read, which linux-loader's errors do not contain.
    failed: Option<PayloadError>,
}

impl Reader<'_> {
    /// The error of a failed read, if there was one.
    pub fn into_failure(self) -> Option<PayloadError> {
        self.failed
    }

    fn fail(&mut self, error: PayloadError) -> io::Error {
        let text = error.to_string();
        self.failed = Some(error);
        io::Error::other(text)
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !(self.go_on)() {
            return Err(self.fail(PayloadError::Cancelled));
        }
        let left = self.file.len_bytes().saturating_sub(self.at);
        let most = buffer.len().min(PIECE_BYTES);
        let count = usize::try_from(left).map_or(most, |left| left.min(most));
        if count == 0 {
            return Ok(0);
        }
        if let Err(source) = self.file.read_at(self.at, &mut buffer[..count]) {
            return Err(self.fail(self.file.read_error(source)));
        }
        self.at += count as u64;
        Ok(count)
    }
}

impl ReadVolatile for Reader<'_> {
    // Through a buffer that stays in the CPU cache: pread straight into guest memory would need unsafe
    // code, to save some 0.1 ms per MiB. Fills all of `to` unless the file ends: vm-memory's
    // `read_exact_volatile_from` calls this once and takes less for a failure.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        to: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut done = 0;
        while done < to.len() {
            buffer.resize((to.len() - done).min(PIECE_BYTES), 0);
            let count = self.read(&mut buffer).map_err(VolatileMemoryError::IOError)?;
            if count == 0 {
                break;
            }
            to.subslice(done, count)?.copy_from(&buffer[..count]);
            done += count;
        }
        self.buffer = buffer;
        Ok(done)
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(distance) => self.file.len_bytes().checked_add_signed(distance),
            SeekFrom::Current(distance) => self.at.checked_add_signed(distance),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
