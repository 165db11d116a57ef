//! A raw image: the file's bytes are the disk's. The format is never guessed: what is opened here was
//! called raw by the user.

use super::SECTOR_BYTES;
use super::backend::{BlockBackend, LockError};
use super::ofd_lock::{self, Operation};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// An image that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host refuses.
    #[error("cannot open disk image {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not a file or block device.
    #[error("disk image {path} is neither a file nor a block device")]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Not whole sectors.
    #[error(
        "disk image {path} has {len_bytes} bytes, not a multiple of {SECTOR_BYTES}: \
         enlarge it with `truncate -s %{SECTOR_BYTES}`"
    )]
    OddSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        len_bytes: u64,
    },
    /// Nothing in it.
    #[error("disk image {path} is empty: give it a size with `truncate -s SIZE`")]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// An open raw image.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    path: PathBuf,
    len_bytes: u64,
    read_only: bool,
}

impl RawFile {
    /// Opens the image without locking it.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let path = path.to_owned();
        let failed = |source| OpenError::Open { path: path.clone(), source };
        let kind = std::fs::metadata(&path).map_err(failed)?.file_type();
        if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
            return Err(OpenError::NotAFile { path });
        }
        let mut file =
            OpenOptions::new().read(true).write(!read_only).open(&path).map_err(failed)?;
        // A block device has no length in its metadata, but an end to seek to.
        let len_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if len_bytes == 0 {
            return Err(OpenError::Empty { path });
        }
        if !len_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(OpenError::OddSize { path, len_bytes });
        }
        Ok(Self { file, path, len_bytes, read_only })
    }
}

impl BlockBackend for RawFile {
    fn location(&self) -> String {
        self.path.display().to_string()
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset_bytes)
    }

    fn write_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.file.write_all_at(buffer, offset_bytes)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn lock(&self) -> Result<(), LockError> {
        let operation = if self.read_only { Operation::Shared } else { Operation::Exclusive };
        ofd_lock::change(&self.file, operation).map_err(|source| {
            let location = self.location();
            match source.kind() {
                io::ErrorKind::WouldBlock => LockError::Held { location },
                _ => LockError::Refused { location, source },
            }
        })
    }

    fn unlock(&self) {
        if let Err(error) = ofd_lock::change(&self.file, Operation::Unlock) {
            log::error!("cannot unlock {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn image(len: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![0; len]).unwrap();
        file
    }

    #[test]
    fn one_writer_or_many_readers_hold_an_image() {
        let file = image(512);
        let writer = RawFile::open(file.path(), false).unwrap();
        let other = RawFile::open(file.path(), false).unwrap();
        let readers = [(); 2].map(|()| RawFile::open(file.path(), true).unwrap());
        writer.lock().unwrap();
        writer.lock().unwrap();
        let error = other.lock().unwrap_err().to_string();
        assert!(error.contains("in use by another virtual machine"), "{error}");
        assert!(readers[0].lock().is_err());
        writer.unlock();
        assert!(readers.iter().all(|reader| reader.lock().is_ok()));
        assert!(other.lock().is_err());
    }

    #[test]
    fn a_lock_goes_with_its_file() {
        let file = image(512);
        RawFile::open(file.path(), false).unwrap().lock().unwrap();
        assert!(RawFile::open(file.path(), false).unwrap().lock().is_ok());
    }

    #[test]
    fn images_that_cannot_be_disks_are_refused_with_a_remedy() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(
            RawFile::open(&directory.path().join("none"), false),
            Err(OpenError::Open { .. })
        ));
        assert!(matches!(RawFile::open(directory.path(), true), Err(OpenError::NotAFile { .. })));
        let odd = RawFile::open(image(700).path(), false).unwrap_err().to_string();
        assert!(odd.contains("700 bytes") && odd.contains("truncate"), "{odd}");
        assert!(matches!(RawFile::open(image(0).path(), false), Err(OpenError::Empty { .. })));
    }
}
