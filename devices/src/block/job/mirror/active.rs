//! `copy-mode` `write-blocking`: every write of the guest is made to both disks before the guest hears of it, so that
//! nothing becomes dirty.

use crate::block::backend::ByteRange;
use crate::block::bitmap::DirtyBitmap;
use crate::block::copy::{Claim, Claims, CopyError, Pair};
use crate::block::filter::{Change, FilteredWrite, WriteFilter};
use crate::lock;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// The filter of a mirrored disk.
pub(super) struct Active {
    pair: Pair,
    claims: Arc<Claims>,
    dirty: Arc<DirtyBitmap>,
    /// Whether the target takes whole granules only.
    whole_granules: bool,
    /// The job has ended.
    ended: AtomicBool,
    failed: Mutex<Option<CopyError>>,
    /// Since [`Active::has_written`] was called last.
    written: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Active {
    /// Calls `wake` when there is a failure to take.
    pub fn new(
        pair: Pair,
        claims: Arc<Claims>,
        dirty: Arc<DirtyBitmap>,
        whole_granules: bool,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let (ended, written) = (AtomicBool::new(false), AtomicBool::new(false));
        let (failed, wake) = (Mutex::default(), Box::new(wake));
        Self { pair, claims, dirty, whole_granules, ended, failed, written, wake }
    }

    /// The job ends: writes are made to the disk alone.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Whether the target was written to since the last call.
    pub fn has_written(&self) -> bool {
        self.written.swap(false, Ordering::SeqCst)
    }

    /// The first failure that nobody has taken.
    pub fn take_failure(&self) -> Option<CopyError> {
        lock(&self.failed).take()
    }

    /// The whole granules around `range`: what is copied in the background.
    fn granules(&self, range: ByteRange) -> ByteRange {
        let granule = self.dirty.granule_bytes();
        let start = range.offset_bytes / granule * granule;
        let end = range.end().next_multiple_of(granule).min(self.dirty.len_bytes());
        ByteRange { offset_bytes: start, len_bytes: end.saturating_sub(start) }
    }
}

impl WriteFilter for Active {
    fn lets_pass(&self, _: ByteRange) -> bool {
        self.has_ended()
    }

    fn begin(&self, range: ByteRange) -> io::Result<Box<dyn FilteredWrite + '_>> {
        // Held until both disks have it: of two writes to one place the same one is last on both.
        let claim = self.claims.claim(self.granules(range), &|| !self.has_ended());
        Ok(Box::new(ActiveWrite { active: self, claim, range }))
    }
}

struct ActiveWrite<'a> {
    active: &'a Active,
    /// `None` if the job has ended.
    claim: Option<Claim>,
    range: ByteRange,
}

impl FilteredWrite for ActiveWrite<'_> {
    fn end(self: Box<Self>, change: Change<'_>, written: &io::Result<()>) {
        let Active { pair, dirty, failed, written: wrote, wake, .. } = self.active;
        let copied = match change {
            // What the disk holds now is not known: it is read.
            _ if written.is_err() || self.claim.is_none() => None,
            _ if self.active.whole_granules && self.active.granules(self.range) != self.range => {
                None
            }
            Change::Discard => None,
            Change::Data(bytes) => Some(pair.write(self.range, bytes)),
            Change::Zeroes { .. } => Some(pair.zero(self.range)),
        };
        match copied {
            Some(Ok(())) => {
                wrote.store(true, Ordering::SeqCst);
                dirty.clear_within(self.range);
            }
            None => {
                dirty.mark(self.range);
                wake();
            }
            Some(Err(error)) => {
                dirty.mark(self.range);
                lock(failed).get_or_insert(error);
                wake();
            }
        }
    }
}
