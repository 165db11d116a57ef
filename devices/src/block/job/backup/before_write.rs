//! The filter of a disk that is backed up: before the guest overwrites a cluster whose old data is still only on the
//! disk, it takes that into memory.
//!
//! Memory is bounded: if the target falls [`super::ledger::MAX_GUEST_BYTES`] behind, writes wait until there is room. A target that
//! makes them wait for longer than [`LONGEST_HOLD`] ends the backup, not the guest.

use super::ledger::Ledger;
use super::saved::Saved;
use super::{BackupOptions, BackupSync, Event};
use crate::block::aligned::AlignedBuffer;
use crate::block::backend::ByteRange;
use crate::block::bitmap::DirtyBitmap;
use crate::block::copy::{Claims, CopyError, MAX_OPERATION_BYTES, Pair};
use crate::block::filter::{Change, FilteredWrite, WriteFilter};
use crate::lock;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Longest time for which a write waits without any progress.
const LONGEST_HOLD: Duration = Duration::from_secs(30);

/// The filter.
pub(super) struct BeforeWrite {
    pair: Pair,
    claims: Arc<Claims>,
    to_read: Arc<DirtyBitmap>,
    /// Whether zeroes need not be written to the target.
    is_blank: bool,
    ledger: Arc<Ledger>,
    /// The job has ended: writes go on at once.
    ended: AtomicBool,
    failed: Mutex<Option<CopyError>>,
    tell: Box<dyn Fn(Event) + Send + Sync>,
}

impl BeforeWrite {
    /// Hands old data to the job by `tell`.
    pub fn new(
        options: &BackupOptions,
        claims: Arc<Claims>,
        to_read: Arc<DirtyBitmap>,
        tell: impl Fn(Event) + Send + Sync + 'static,
    ) -> Self {
        Self {
            pair: options.pair.clone(),
            claims,
            to_read,
            is_blank: options.sync == BackupSync::Full && options.target_is_blank,
            ledger: Arc::default(),
            ended: AtomicBool::new(false),
            failed: Mutex::default(),
            tell: Box::new(tell),
        }
    }

    /// Old data in memory, in bytes.
    pub fn held_bytes(&self) -> u64 {
        self.ledger.held_bytes()
    }

    /// The job ends: writes go on at once.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.ledger.look();
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// The first failure, if nobody has taken it.
    pub fn take_failure(&self) -> Option<CopyError> {
        lock(&self.failed).take()
    }

    /// Reads a claimed range in the background, into a buffer that is large enough.
    pub fn read_ahead(&self, range: ByteRange, buffer: AlignedBuffer) -> Result<Saved, CopyError> {
        let holding = self.ledger.add(range.len_bytes);
        Saved::read(&self.pair, range, buffer, self.is_blank, holding)
    }

    /// Old data is lost: the backup cannot be completed, and the guest goes on.
    fn fail(&self, error: CopyError) {
        if !self.has_ended() {
            lock(&self.failed).get_or_insert(error);
            self.end();
            (self.tell)(Event::Wake);
        }
    }

    fn fail_for_time(&self, range: ByteRange) {
        let why = "the guest's writes would have to wait for it for too long";
        let source = io::Error::new(io::ErrorKind::TimedOut, why);
        self.fail(CopyError::Write { disk: self.pair.target.location(), range, source });
    }

    /// Takes the old data of a run of clusters into memory. The first `run` of those that are to be read.
    fn save(&self, run: ByteRange) {
        let deadline = Instant::now() + LONGEST_HOLD;
        let wanted = || !self.has_ended() && Instant::now() < deadline;
        // Who has a part of it reads it, and then it need not be read here.
        let Some(_claim) = self.claims.claim(run, &wanted) else { return self.fail_for_time(run) };
        while let Some(part) = self.next_within(run, run.offset_bytes) {
            let Some(holding) = self.ledger.add_of_guest(part.len_bytes, &wanted) else {
                return self.fail_for_time(part);
            };
            let buffer = AlignedBuffer::new(usize::try_from(part.len_bytes).unwrap_or(0));
            match Saved::read(&self.pair, part, buffer, self.is_blank, holding) {
                Ok(saved) => {
                    self.to_read.clear_within(part);
                    (self.tell)(Event::Saved(saved));
                }
                Err(error) => return self.fail(error),
            }
        }
    }

    /// The first run of clusters from `from` on that are to be read, within `clusters`.
    fn next_within(&self, clusters: ByteRange, from: u64) -> Option<ByteRange> {
        let run = self.to_read.next_run(from, MAX_OPERATION_BYTES)?;
        let end = run.end().min(clusters.end());
        let len_bytes = end.checked_sub(run.offset_bytes).filter(|len| *len > 0)?;
        Some(ByteRange { len_bytes, ..run })
    }
}

impl WriteFilter for BeforeWrite {
    fn lets_pass(&self, range: ByteRange) -> bool {
        self.has_ended() || !self.to_read.is_any_marked(range)
    }

    fn begin(&self, range: ByteRange) -> io::Result<Box<dyn FilteredWrite + '_>> {
        let clusters = self.to_read.granules_of(range);
        let mut at = clusters.offset_bytes;
        while !self.has_ended()
            && let Some(run) = self.next_within(clusters, at)
        {
            self.save(run);
            at = run.end();
        }
        Ok(Box::new(Passed))
    }
}

/// A write of which nothing more is wanted.
struct Passed;

impl FilteredWrite for Passed {
    fn end(self: Box<Self>, _: Change<'_>, _: &io::Result<()>) {}
}
