//! A disk: the single entry point of every read and write, by the guest, a migration or a job.
//!
//! [`BlockNode`] names a disk and checks every range; a [`backend`] stores the bytes: [`raw`] in a plain
//! file, [`qcow2`] in an image with mapping tables and perhaps a backing file, [`memory`] in tests.
//! Accesses that a node has admitted may bypass the backend through [`uring`] if the storage is a plain
//! file. Image locks follow the right to run the guest, so locking is separate from opening.
//!
//! To learn what is written from now on, have the node [`BlockNode::track`] it in a [`bitmap`]: every
//! write, write-zeroes and discard marks its range when it ends, even if it fails. Bitmaps that a user
//! names are in [`bitmaps`].
//!
//! A node outlives its storage: [`BlockNode::exchange`] gives it another one, in a drained section of its
//! [`gate`].

pub mod aligned;
pub mod backend;
pub mod bitmap;
pub mod bitmaps;
pub mod copy;
mod exchange;
pub mod failure;
pub mod filter;
pub mod gate;
pub mod holes;
pub mod job;
pub mod memory;
pub mod nbd;
mod ofd_lock;
pub mod qcow2;
pub mod raw;
mod stats;
pub mod uring;
mod write_back;
mod writes;

use crate::log_limit::LogLimit;
use backend::{BackingChain, BlockBackend, ByteRange, Extent, LockError};
use bitmap::DirtyBitmap;
use bitmaps::Bitmaps;
pub use exchange::ExchangeError;
use failure::{Action, ErrorPolicy, Failure, Failures, Kept};
use filter::{Change, Filters, WriteFilter};
use gate::{Drained, Gate, Pass};
use qcow2::BackingChoice;
use raw::{Cache, OpenError, RawFile};
use serde::{Deserialize, Serialize};
use stats::Counters;
pub use stats::NodeStats;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};
use writes::{WriteGuard, Writes};

/// The unit by which guests address disks.
pub const SECTOR_BYTES: u64 = 512;

/// Image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The file's bytes are the disk's.
    #[default]
    Raw,
    /// qcow2, with its own mapping tables.
    Qcow2,
}

impl Format {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => Err(format!("format {other:?} is neither raw nor qcow2")),
        }
    }
}

/// Opens the image of a disk, without locking it. Only a qcow2 image has a backing file.
pub fn open_image(
    path: &Path,
    format: Format,
    read_only: bool,
    cache: Cache,
    backing: BackingChoice,
) -> Result<Box<dyn BlockBackend>, OpenError> {
    Ok(match format {
        Format::Raw => Box::new(RawFile::open(path, read_only, cache)?),
        Format::Qcow2 => Box::new(qcow2::Qcow2File::open(path, read_only, cache, backing)?),
    })
}

/// How long a request that cannot be put back waits for admission.
const ADMISSION: Duration = Duration::from_secs(30);

/// An access that a node has admitted, to be made directly on its file. Must live until it is complete.
#[derive(Debug)]
pub struct Access {
    file: Arc<File>,
    /// Memory alignment that the file needs.
    alignment: usize,
    /// Marks what a write has written when it ends.
    guard: Option<WriteGuard>,
    /// Dropped last: what was written is marked before a drained section goes on.
    pass: Option<Pass>,
}

impl Access {
    /// It is not made directly after all.
    pub fn into_pass(self) -> Option<Pass> {
        self.pass
    }

    /// It failed, and is kept for a retry: it is in flight no more. Ask [`BlockNode::access`] for another one then.
    pub fn end(&mut self) {
        (self.guard, self.pass) = (None, None);
    }

    /// An access that belongs to no node.
    #[cfg(test)]
    fn to(file: Arc<File>, alignment: usize) -> Self {
        Self { file, alignment, guard: None, pass: None }
    }
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
    /// Exchanged in a drained section only.
    backend: RwLock<Arc<dyn BlockBackend>>,
    gate: Arc<Gate>,
    filters: Filters,
    len_bytes: u64,
    read_only: bool,
    writes: Arc<Writes>,
    bitmaps: Arc<Bitmaps>,
    counters: Counters,
    failures: Failures,
    /// Limits what is logged about failed requests: a dying disk fails every one. It outlives the workers,
    /// which a guest can replace at will.
    pub(crate) error_lines: LogLimit,
}

/// Keeps a bitmap attached to a node; dropping it detaches that.
#[derive(Debug)]
pub struct Tracking {
    bitmap: Arc<DirtyBitmap>,
    writes: Arc<Writes>,
}

impl Tracking {
    /// The bitmap.
    pub fn shared(&self) -> Arc<DirtyBitmap> {
        self.bitmap.clone()
    }

    /// Writes do not mark it any more: something else does.
    pub fn detach(&self) {
        self.writes.remove(&self.bitmap);
    }
}

impl std::ops::Deref for Tracking {
    type Target = DirtyBitmap;

    fn deref(&self) -> &DirtyBitmap {
        &self.bitmap
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        self.writes.remove(&self.bitmap);
    }
}

impl std::fmt::Debug for BlockNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockNode").field("id", &self.id).field("len", &self.len_bytes).finish()
    }
}

impl BlockNode {
    /// A disk `id` stored in `backend`.
    pub fn new(id: impl Into<String>, backend: Box<dyn BlockBackend>) -> Self {
        let (len_bytes, read_only) = (backend.len_bytes(), backend.read_only());
        let (id, writes, counters) = (id.into(), Arc::<Writes>::default(), Counters::default());
        let (failures, error_lines, filters) = Default::default();
        let bitmaps = Arc::new(Bitmaps::new(&id, backend.as_ref(), writes.clone()));
        let (backend, gate) = (RwLock::new(backend.into()), Arc::default());
        Self {
            id,
            backend,
            gate,
            filters,
            len_bytes,
            read_only,
            writes,
            bitmaps,
            counters,
            failures,
            error_lines,
        }
    }

    /// The same disk, read-only for the guest.
    #[must_use]
    pub fn into_read_only(self) -> Self {
        self.bitmaps.set_read_only();
        Self { read_only: true, ..self }
    }

    /// What is done about its failed requests.
    pub fn policy(&self) -> ErrorPolicy {
        self.failures.policy
    }

    /// The same disk with an error policy.
    #[must_use]
    pub fn with_policy(mut self, policy: ErrorPolicy) -> Self {
        self.failures.policy = policy;
        self
    }

    /// Calls `tell` for every request that fails from now on.
    pub fn on_failure(&self, tell: impl Fn(Failure) + Send + Sync + 'static) {
        self.failures.set_tell(Arc::new(tell));
    }

    /// Reports a failed request of the guest and returns what to do about it.
    pub fn decide(&self, is_read: bool, error: &io::Error) -> Action {
        self.failures.decide(&self.id, is_read, error)
    }

    /// Whether an error has stopped the guest, until [`BlockNode::retry_failed`].
    pub fn is_stopped(&self) -> bool {
        self.failures.is_stopped()
    }

    /// Whether failed requests are kept for a retry. After the guest has resumed they stay kept until the
    /// retry.
    pub fn has_kept_requests(&self) -> bool {
        self.failures.has_kept_requests()
    }

    /// Counts a failed request as kept until the result is dropped.
    pub fn keep_failed(&self) -> Kept {
        self.failures.keep_failed()
    }

    /// The guest resumes: failed requests may be retried.
    pub fn retry_failed(&self) {
        self.failures.retry_failed();
    }

    /// Its storage now.
    fn backend(&self) -> Arc<dyn BlockBackend> {
        self.backend.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Its storage, to be that of another disk.
    pub fn storage(&self) -> Arc<dyn BlockBackend> {
        self.backend()
    }

    /// Admits requests.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// The disk's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Path of its storage, as the user gave it.
    pub fn location(&self) -> String {
        self.backend().location()
    }

    /// Name of its format.
    pub fn format(&self) -> &'static str {
        self.backend().format()
    }

    /// Its backing chain, if any.
    pub fn backing(&self) -> Option<Arc<dyn BackingChain>> {
        self.backend().backing()
    }

    /// Whether its backing chain is another one than the image records.
    pub fn overrules_backing(&self) -> bool {
        self.backend().overrules_backing()
    }

    /// Bytes of a cluster of its storage, if it has clusters.
    pub fn cluster_bytes(&self) -> Option<u64> {
        self.backend().cluster_bytes()
    }

    /// Whether it bypasses the host's page cache.
    pub fn is_direct(&self) -> bool {
        self.backend().is_direct()
    }

    /// Size in bytes; a multiple of [`SECTOR_BYTES`].
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Tracks writes from now on, in granules of `granule_bytes`; a write already in flight is marked when
    /// it ends. `None` if the granule is invalid.
    pub fn track(&self, granule_bytes: u64) -> Option<Tracking> {
        let bitmap = Arc::new(DirtyBitmap::new(self.len_bytes, granule_bytes)?);
        self.writes.add(bitmap.clone());
        Some(Tracking { bitmap, writes: self.writes.clone() })
    }

    /// The guest's I/O so far.
    pub fn stats(&self) -> NodeStats {
        let Counters { reads, writes, discards, flushes } = &self.counters;
        let ((read_bytes, reads), (written_bytes, writes)) = (reads.get(), writes.get());
        let ((discarded_bytes, discards), (_, flushes)) = (discards.get(), flushes.get());
        NodeStats { read_bytes, reads, written_bytes, writes, flushes, discarded_bytes, discards }
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

    /// Lets an access be made directly on the file, if it may. Otherwise it must go through this node with the
    /// pass that is returned, which also tells what is wrong with it. Call [`BlockNode::count`] when it has begun.
    pub fn access(
        &self,
        pass: Pass,
        kind: AccessKind,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Access, Pass> {
        let range = ByteRange { offset_bytes, len_bytes };
        let checked = match kind {
            AccessKind::Write => self.check_write(offset_bytes, len_bytes),
            AccessKind::Read | AccessKind::Flush => self.check(offset_bytes, len_bytes),
        };
        if checked.is_err() {
            return Err(pass);
        }
        let plain = {
            let backend = self.backend.read().unwrap_or_else(PoisonError::into_inner);
            backend.plain_file()
        };
        let Some((file, alignment)) = plain else { return Err(pass) };
        if kind == AccessKind::Write && !self.filters.let_pass(range) {
            return Err(pass);
        }
        let guard = (kind == AccessKind::Write).then(|| self.writes.begin(range));
        Ok(Access { file, alignment, guard, pass: Some(pass) })
    }

    /// Whether accesses may be made directly on the file, at the moment.
    pub fn is_plain(&self) -> bool {
        self.backend().plain_file().is_some()
    }

    /// Whether [`BlockNode::is_plain`] holds, and the file is written by way of the host's page cache.
    pub fn is_cached_file(&self) -> bool {
        let backend = self.backend();
        !backend.is_direct() && backend.plain_file().is_some()
    }

    /// Counts an admitted access in the statistics. One that is made through this node instead is counted
    /// there.
    pub fn count(&self, kind: AccessKind, len_bytes: u64) {
        let Counters { reads, writes, flushes, .. } = &self.counters;
        match kind {
            AccessKind::Read => reads.add(len_bytes),
            AccessKind::Write => writes.add(len_bytes),
            AccessKind::Flush => flushes.add(0),
        }
    }

    /// Waits for admission: for who cannot put a request back.
    fn admitted(&self) -> io::Result<Pass> {
        self.gate.enter_by(Instant::now() + ADMISSION)
    }

    /// Fills `buffer` from `offset_bytes` on; both in whole sectors.
    pub fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.read(&self.admitted()?, buffer, offset_bytes)
    }

    /// [`BlockNode::read_at`], for a request that has been admitted.
    pub fn read(&self, _: &Pass, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.check(offset_bytes, buffer.len() as u64)?;
        self.counters.reads.add(buffer.len() as u64);
        self.backend().read_at(buffer, offset_bytes)
    }

    /// Like [`BlockNode::read_at`], for a copy of the disk: not counted as the guest's.
    pub fn copy_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.check(offset_bytes, buffer.len() as u64)?;
        self.backend().read_at(buffer, offset_bytes)
    }

    /// Writes `buffer` at `offset_bytes`; both in whole sectors.
    pub fn write_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.write(&self.admitted()?, buffer, offset_bytes)
    }

    /// [`BlockNode::write_at`], for a request that has been admitted.
    pub fn write(&self, _: &Pass, buffer: &[u8], offset_bytes: u64) -> io::Result<()> {
        let range = ByteRange { offset_bytes, len_bytes: buffer.len() as u64 };
        self.check_write(range.offset_bytes, range.len_bytes)?;
        self.counters.writes.add(range.len_bytes);
        self.change(range, Change::Data(buffer), |backend| backend.write_at(buffer, offset_bytes))
    }

    /// Changes a range, which the bitmaps and filters see.
    fn change(
        &self,
        range: ByteRange,
        change: Change<'_>,
        write: impl FnOnce(&dyn BlockBackend) -> io::Result<()>,
    ) -> io::Result<()> {
        self.filters.around(range, change, || {
            let _guard = self.writes.begin(range);
            write(self.backend().as_ref())
        })
    }

    /// Like [`BlockNode::write_at`], for data that arrives before the guest: allowed on a read-only disk,
    /// too.
    pub fn fill_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.check(offset_bytes, buffer.len() as u64)?;
        let filled = self.backend().write_at(buffer, offset_bytes);
        self.writes.note_fill();
        filled
    }

    /// See [`BlockBackend::start_write_back`].
    pub fn start_write_back(&self, range: ByteRange) {
        self.backend().start_write_back(range);
    }

    /// Like [`BlockNode::fill_at`] with zeroes; without allocating space if it `may_unmap` and that is possible.
    pub fn fill_zeroes(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        self.check(offset_bytes, len_bytes)?;
        if len_bytes == 0 {
            return Ok(());
        }
        let filled = self.backend().write_zeroes(offset_bytes, len_bytes, may_unmap);
        self.writes.note_fill();
        filled
    }

    /// The extent at `offset_bytes`.
    pub fn extent_at(&self, offset_bytes: u64) -> io::Result<Extent> {
        self.check(offset_bytes, 1)?;
        self.backend().extent_at(offset_bytes)
    }

    /// Estimated space that it takes on the host, in bytes.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.backend().allocated_bytes()
    }

    /// Discards a range that the guest does not need any more. Advisory: the data may stay.
    pub fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        self.discard_range(&self.admitted()?, offset_bytes, len_bytes)
    }

    /// [`BlockNode::discard`], for a request that has been admitted.
    pub fn discard_range(&self, _: &Pass, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        self.check_write(offset_bytes, len_bytes)?;
        if len_bytes == 0 {
            return Ok(());
        }
        self.counters.discards.add(len_bytes);
        let range = ByteRange { offset_bytes, len_bytes };
        self.change(range, Change::Discard, |backend| backend.discard(offset_bytes, len_bytes))
    }

    /// Zeroes a range, and frees its space if `may_unmap` and that is possible.
    pub fn write_zeroes(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        self.zero(&self.admitted()?, offset_bytes, len_bytes, may_unmap)
    }

    /// [`BlockNode::write_zeroes`], for a request that has been admitted.
    pub fn zero(
        &self,
        _: &Pass,
        offset_bytes: u64,
        len_bytes: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        self.check_write(offset_bytes, len_bytes)?;
        if len_bytes == 0 {
            return Ok(());
        }
        self.counters.writes.add(len_bytes);
        let range = ByteRange { offset_bytes, len_bytes };
        self.change(range, Change::Zeroes { may_unmap }, |backend| {
            backend.write_zeroes(offset_bytes, len_bytes, may_unmap)
        })
    }

    /// Shows every write that begins from now on to `filter`. `section` is of this node.
    pub fn attach(&self, section: &Drained, filter: Arc<dyn WriteFilter>) {
        debug_assert!(section.is_of(&self.gate), "{}: not drained", self.id);
        self.filters.add(filter);
    }

    /// Ends [`BlockNode::attach`], from the next write on.
    pub fn detach(&self, filter: &Arc<dyn WriteFilter>) {
        self.filters.remove(filter);
    }

    /// Makes every acknowledged write durable.
    pub fn flush(&self) -> io::Result<()> {
        self.counters.flushes.add(0);
        self.sync()
    }

    /// Writes cached metadata to the file, though not to stable storage: another process sees every
    /// acknowledged write once the lock is released.
    pub fn write_back(&self) -> io::Result<()> {
        self.backend().write_back()
    }

    /// Like [`BlockNode::flush`], for a copy of the disk: not counted as the guest's.
    pub fn sync(&self) -> io::Result<()> {
        self.writes.sync(|| self.backend().flush())
    }

    /// Whether [`BlockNode::sync`] has something to do: a write has ended since it last succeeded.
    pub fn has_unsynced_writes(&self) -> bool {
        self.writes.has_unsynced()
    }

    /// Takes the lock: exclusive for a disk opened for writing, shared for a read-only one. Locking twice
    /// is not an error.
    pub fn lock(&self) -> Result<(), LockError> {
        self.backend().lock()
    }

    /// Releases the lock.
    pub fn unlock(&self) {
        self.backend().unlock();
    }
}

#[cfg(test)]
mod tests;
