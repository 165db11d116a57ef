//! A disk in memory whose next accesses can be told to fail, for tests.

use super::backend::{BlockBackend, LockError};
use crate::lock;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// A disk in memory.
#[derive(Debug)]
pub struct MemoryDisk {
    bytes: Mutex<Vec<u8>>,
    len_bytes: u64,
    fail: AtomicBool,
}

impl MemoryDisk {
    /// A disk of zeroes.
    ///
    /// # Panics
    /// If the host cannot address `len_bytes`.
    pub fn new(len_bytes: u64) -> Self {
        let len = usize::try_from(len_bytes).expect("a test's disk fits in memory");
        Self { bytes: Mutex::new(vec![0; len]), len_bytes, fail: AtomicBool::new(false) }
    }

    /// Makes every access fail, or work again.
    pub fn fail(&self, fail: bool) {
        self.fail.store(fail, Ordering::SeqCst);
    }

    fn check(&self) -> io::Result<()> {
        if self.fail.load(Ordering::SeqCst) {
            return Err(io::Error::other("scripted fault"));
        }
        Ok(())
    }

    fn range(offset_bytes: u64, len: usize) -> io::Result<std::ops::Range<usize>> {
        let start = usize::try_from(offset_bytes).map_err(io::Error::other)?;
        Ok(start..start.saturating_add(len))
    }
}

impl BlockBackend for MemoryDisk {
    fn location(&self) -> String {
        "memory".into()
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.check()?;
        let bytes = lock(&self.bytes);
        let range = Self::range(offset_bytes, buffer.len())?;
        let source = bytes.get(range).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(source);
        Ok(())
    }

    fn write_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.check()?;
        let mut bytes = lock(&self.bytes);
        let range = Self::range(offset_bytes, buffer.len())?;
        let target = bytes.get_mut(range).ok_or(io::ErrorKind::UnexpectedEof)?;
        target.copy_from_slice(buffer);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.check()
    }

    fn lock(&self) -> Result<(), LockError> {
        Ok(())
    }

    fn unlock(&self) {}
}
