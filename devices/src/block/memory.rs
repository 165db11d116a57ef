//! A scripted disk in memory, for tests: accesses are recorded and can be made to fail or to block.

use super::backend::{BackingChain, BlockBackend, ByteRange, Content, Extent, LockError};
use crate::lock;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// A disk in memory.
#[derive(Debug)]
pub struct MemoryDisk {
    bytes: Mutex<Vec<u8>>,
    len_bytes: u64,
    read_only: bool,
    script: Arc<Script>,
    /// And the memory alignment that it needs.
    file: Option<(Arc<File>, usize)>,
    /// What it pretends to be stored in.
    image: Option<(Arc<File>, PathBuf)>,
}

/// Controls a disk's accesses; the test keeps it when the disk has moved into its node.
#[derive(Debug, Default)]
pub struct Script {
    state: Mutex<ScriptState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ScriptState {
    failing: bool,
    hides_extents: bool,
    held: bool,
    /// Number of accesses let through while others are held.
    let_through: usize,
    waiting: usize,
    flush_count: usize,
    accesses: Vec<ByteRange>,
}

impl Script {
    /// Makes every access fail, or succeed again.
    pub fn fail(&self, failing: bool) {
        lock(&self.state).failing = failing;
    }

    /// Whether asking for extents fails.
    pub fn hide_extents(&self, hidden: bool) {
        lock(&self.state).hides_extents = hidden;
    }

    /// Makes every access block, or releases them all.
    pub fn hold(&self, held: bool) {
        lock(&self.state).held = held;
        self.changed.notify_all();
    }

    /// Blocks every access after the next `count`.
    pub fn hold_after(&self, count: usize) {
        let mut state = lock(&self.state);
        (state.held, state.let_through) = (true, count);
    }

    /// Reads, writes, discards and zeroes so far, in order.
    pub fn accesses(&self) -> Vec<ByteRange> {
        lock(&self.state).accesses.clone()
    }

    /// Waits until an access is held.
    pub fn wait_until_held(&self) {
        self.wait_until_held_by(1);
    }

    /// Waits until `count` accesses are held.
    ///
    /// # Panics
    /// If they are not within half a minute.
    pub fn wait_until_held_by(&self, count: usize) {
        let (state, limit) = (lock(&self.state), Duration::from_secs(30));
        let is_missing = |state: &mut ScriptState| state.waiting < count;
        let waited = self.changed.wait_timeout_while(state, limit, is_missing);
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        let held = state.waiting;
        drop(state);
        assert!(!timeout.timed_out(), "{held} of {count} accesses are held");
    }

    /// Accesses that are held now.
    pub fn held(&self) -> usize {
        lock(&self.state).waiting
    }

    /// Flushes so far.
    pub fn flush_count(&self) -> usize {
        lock(&self.state).flush_count
    }

    fn access(&self, range: Option<ByteRange>) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.waiting += 1;
        self.changed.notify_all();
        if state.held && state.let_through > 0 {
            state.let_through -= 1;
        } else {
            let waited = self.changed.wait_while(state, |state| state.held);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        if state.failing {
            return Err(io::Error::other("scripted fault"));
        }
        state.accesses.extend(range);
        Ok(())
    }
}

impl MemoryDisk {
    /// A writable disk of zeroes.
    ///
    /// # Panics
    /// If the host cannot address `len_bytes`.
    pub fn new(len_bytes: u64) -> Self {
        let len = usize::try_from(len_bytes).expect("a test's disk fits in memory");
        let bytes = Mutex::new(vec![0; len]);
        Self { bytes, len_bytes, read_only: false, script: Arc::default(), file: None, image: None }
    }

    /// A writable disk of any size that stores nothing: it reads as zeroes.
    pub fn without_storage(len_bytes: u64) -> Self {
        Self { len_bytes, ..Self::new(0) }
    }

    /// The same disk, whose reads, writes and flushes may go directly to `file`, past the script.
    #[must_use]
    pub fn with_file(self, file: File) -> Self {
        self.with_direct_file(file, 1)
    }

    /// Like [`MemoryDisk::with_file`], from memory with this alignment only.
    #[must_use]
    pub fn with_direct_file(self, file: File, alignment: usize) -> Self {
        Self { file: Some((Arc::new(file), alignment)), ..self }
    }

    /// The same disk, which passes for one that is stored in the file at `path`: its bitmaps are kept beside that.
    pub fn with_image(self, path: &Path) -> io::Result<Self> {
        Ok(Self { image: Some((Arc::new(File::open(path)?), path.to_owned())), ..self })
    }

    /// The same disk, refusing writes.
    pub fn into_read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// The script that controls its accesses.
    pub fn script(&self) -> Arc<Script> {
        self.script.clone()
    }

    fn range(offset_bytes: u64, len: usize) -> io::Result<std::ops::Range<usize>> {
        let start = usize::try_from(offset_bytes).map_err(io::Error::other)?;
        Ok(start..start.saturating_add(len))
    }

    /// Waits until the script allows the access, then passes the bytes to `change`, if they are stored.
    fn access(
        &self,
        offset_bytes: u64,
        len: usize,
        change: impl FnOnce(&mut [u8]),
    ) -> io::Result<()> {
        let len_bytes = u64::try_from(len).map_err(io::Error::other)?;
        self.script.access(Some(ByteRange { offset_bytes, len_bytes }))?;
        let mut bytes = lock(&self.bytes);
        if bytes.is_empty() {
            change(&mut vec![0; len]);
            return Ok(());
        }
        let range = Self::range(offset_bytes, len)?;
        change(bytes.get_mut(range).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl BlockBackend for MemoryDisk {
    fn location(&self) -> String {
        "memory".into()
    }

    fn format(&self) -> &'static str {
        "memory"
    }

    fn backing(&self) -> Option<Arc<dyn BackingChain>> {
        None
    }

    fn is_direct(&self) -> bool {
        self.file.as_ref().is_some_and(|(_, alignment)| *alignment > 1)
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.access(offset_bytes, buffer.len(), |bytes| buffer.copy_from_slice(bytes))
    }

    fn write_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.access(offset_bytes, buffer.len(), |bytes| bytes.copy_from_slice(buffer))
    }

    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        self.write_zeroes(offset_bytes, len_bytes, true)
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, _may_unmap: bool) -> io::Result<()> {
        let len = usize::try_from(len_bytes).map_err(io::Error::other)?;
        self.access(offset_bytes, len, |bytes| bytes.fill(0))
    }

    fn extent_at(&self, offset_bytes: u64) -> io::Result<Extent> {
        // Page-sized blocks, like a file system's.
        const BLOCK: u64 = 4096;
        if lock(&self.script.state).hides_extents {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let bytes = lock(&self.bytes);
        let zero = |at: u64| {
            let end = (at / BLOCK + 1) * BLOCK;
            let len = usize::try_from(end.min(self.len_bytes) - at).map_err(io::Error::other)?;
            let block = bytes.get(Self::range(at, len)?).ok_or(io::ErrorKind::UnexpectedEof)?;
            Ok::<_, io::Error>((block.iter().all(|byte| *byte == 0), at + len as u64))
        };
        let (is_zero, mut end) = zero(offset_bytes)?;
        while end < self.len_bytes {
            let (next_is_zero, next_end) = zero(end)?;
            if next_is_zero != is_zero {
                break;
            }
            end = next_end;
        }
        let content = if is_zero { Content::Zero } else { Content::Data };
        Ok(Extent { len_bytes: end - offset_bytes, content })
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.len_bytes)
    }

    fn image_file(&self) -> Option<(Arc<File>, PathBuf)> {
        self.image.clone()
    }

    fn plain_file(&self) -> Option<(Arc<File>, usize)> {
        self.file.clone()
    }

    fn write_back(&self) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.script.access(None)?;
        lock(&self.script.state).flush_count += 1;
        Ok(())
    }

    fn lock(&self) -> Result<(), LockError> {
        Ok(())
    }

    fn unlock(&self) {}
}
