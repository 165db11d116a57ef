//! A disk: the single door for every read and write, whoever makes it.
//!
//! [`BlockNode`] names a disk and checks every range; a [`backend`] stores the bytes: [`raw`] in a
//! file, [`memory`] in tests. Where the storage is a plain file, [`uring`] may make the accesses that
//! the node has admitted. Locks follow the right to run, so taking them is separate from opening.

pub mod aligned;
pub mod backend;
pub mod memory;
mod ofd_lock;
pub mod raw;
pub mod uring;

use backend::{BlockBackend, LockError};
use std::fs::File;
use std::io;
use std::sync::Arc;

/// Bytes of the unit that guests address disks by.
pub const SECTOR_BYTES: u64 = 512;

/// An access that a node has admitted, to be made directly on its file. Kept until it is complete.
#[derive(Debug)]
pub struct Access {
    file: Arc<File>,
    /// Of the memory that the file's data may come from and go to.
    alignment: usize,
}

/// Kind of an [`Access`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessKind {
    /// Of bytes.
    Read,
    /// Of bytes.
    Write,
    /// Of everything.
    Flush,
}

/// A named disk.
pub struct BlockNode {
    id: String,
    backend: Box<dyn BlockBackend>,
    len_bytes: u64,
    read_only: bool,
}

impl std::fmt::Debug for BlockNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockNode").field("id", &self.id).field("len", &self.len_bytes).finish()
    }
}

impl BlockNode {
    /// Names `backend`.
    pub fn new(id: impl Into<String>, backend: Box<dyn BlockBackend>) -> Self {
        let (len_bytes, read_only) = (backend.len_bytes(), backend.read_only());
        Self { id: id.into(), backend, len_bytes, read_only }
    }

    /// The disk's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the user calls its storage: a path.
    pub fn location(&self) -> String {
        self.backend.location()
    }

    /// Size; a multiple of [`SECTOR_BYTES`].
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    fn check(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        let end = offset_bytes.checked_add(len_bytes);
        if end.is_none_or(|end| end > self.len_bytes) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "access past the disk's end"));
        }
        Ok(())
    }

    fn check_write(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the disk is read-only"));
        }
        self.check(offset_bytes, len_bytes)
    }

    /// Checks an access, and admits it if it may be made directly on a file; `None` if it has to go
    /// through this node.
    pub fn access(
        &self,
        kind: AccessKind,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> io::Result<Option<Access>> {
        match kind {
            AccessKind::Write => self.check_write(offset_bytes, len_bytes)?,
            AccessKind::Read | AccessKind::Flush => self.check(offset_bytes, len_bytes)?,
        }
        Ok(self.backend.plain_file().map(|(file, alignment)| Access { file, alignment }))
    }

    /// Fills `buffer` from `offset_bytes` on; both in whole sectors.
    pub fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.check(offset_bytes, buffer.len() as u64)?;
        self.backend.read_at(buffer, offset_bytes)
    }

    /// Writes `buffer` at `offset_bytes`; both in whole sectors.
    pub fn write_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.check_write(offset_bytes, buffer.len() as u64)?;
        self.backend.write_at(buffer, offset_bytes)
    }

    /// Frees the space of bytes that the guest does not need any more. Advice: they may stay.
    pub fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        self.check_write(offset_bytes, len_bytes)?;
        if len_bytes == 0 {
            return Ok(());
        }
        self.backend.discard(offset_bytes, len_bytes)
    }

    /// Makes bytes zero, and frees their space if `may_unmap` and that is possible.
    pub fn write_zeroes(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        self.check_write(offset_bytes, len_bytes)?;
        if len_bytes == 0 {
            return Ok(());
        }
        self.backend.write_zeroes(offset_bytes, len_bytes, may_unmap)
    }

    /// Makes every acknowledged write durable.
    pub fn flush(&self) -> io::Result<()> {
        self.backend.flush()
    }

    /// Takes the lock: exclusive for a disk opened for writing, shared for a read-only one. Taking it
    /// again is no error.
    pub fn lock(&self) -> Result<(), LockError> {
        self.backend.lock()
    }

    /// Lets go of the lock.
    pub fn unlock(&self) {
        self.backend.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::memory::MemoryDisk;
    use super::*;

    #[test]
    fn accesses_past_the_end_are_refused() {
        let node = BlockNode::new("d", Box::new(MemoryDisk::new(1024)));
        assert!(node.read_at(&mut [0; 512], 512).is_ok());
        assert!(node.read_at(&mut [0; 512], 513).is_err());
        assert!(node.write_at(&[0; 1], 1024).is_err());
        assert!(node.write_at(&[0; 8], u64::MAX - 3).is_err());
        assert!(node.discard(512, 512).is_ok() && node.discard(1024, 0).is_ok());
        assert!(node.discard(512, 1024).is_err());
        assert!(node.write_zeroes(u64::MAX - 3, 8, true).is_err());
    }

    #[test]
    fn a_read_only_disk_takes_no_writes_of_any_kind() {
        let node = BlockNode::new("d", Box::new(MemoryDisk::new(1024).into_read_only()));
        assert!(node.write_at(&[0; 1], 0).is_err());
        assert!(node.discard(0, 512).is_err());
        assert!(node.write_zeroes(0, 512, false).is_err());
        assert!(node.access(AccessKind::Write, 0, 512).is_err());
        assert!(node.access(AccessKind::Read, 0, 512).unwrap().is_none(), "there is no file");
        assert!(node.access(AccessKind::Read, 512, 1024).is_err());
    }
}
