//! Backup: saves a disk as it was when the job began, while the guest writes to it.
//!
//! ```text
//! guest's write ─▶ filter: read the old data ─▶ Saved ──┐ then the write goes on
//!                                                       ├─▶ threads ─▶ target
//! background: claim ─▶ thread: read the old data ───────┘
//! ```
//! `to_read` has a bit for each cluster whose old data is still only on the disk. Whoever reads a cluster has claimed
//! it, and clears the bit once the data is in memory: so a guest's write waits for at most one read of the old data,
//! never for the target, unless that falls far behind. All clusters are marked at the start; a cluster that need not
//! be copied is cleared later by [`Search`], as long as its bit says that it has not been written since.
//!
//! No guest's write fails because of a backup: what goes wrong ends the job, or pauses it, as its policy says.

mod before_write;
mod begin;
mod ledger;
mod saved;
mod search;

use super::{Finished, Job, Rate, Work};
use crate::block::aligned::AlignedBuffer;
use crate::block::backend::ByteRange;
use crate::block::bitmap::DirtyBitmap;
use crate::block::bitmaps::{BitmapName, Frozen};
use crate::block::copy::{
    Buffer, Claim, Claims, CopyError, MAX_OPERATION_BYTES, MAX_OPERATIONS, Pair, Pool,
    operation_buffer, unless_panicking,
};
use crate::block::filter::WriteFilter;
use before_write::BeforeWrite;
pub use begin::{BackupError, BeginError, Step, begin};
use saved::Saved;
use search::Search;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// Smallest unit that is copied, as in QEMU; larger where the target has larger clusters.
pub const MIN_CLUSTER_BYTES: u64 = 64 << 10;
/// How often an idle job looks around.
const IDLE: Duration = Duration::from_millis(100);
/// Pause after an error that is ignored, so that a broken disk does not keep a processor busy.
const BACKOFF: Duration = Duration::from_millis(100);
/// Longest wait for operations in flight when the job ends. A disk that takes longer hangs.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// What is saved. QEMU's `incremental` is `Bitmap` with [`BitmapMode::OnSuccess`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupSync {
    /// Everything.
    Full,
    /// What the image holds itself, not its backing files.
    Top,
    /// What is marked in a bitmap.
    Bitmap,
    /// Nothing but what the guest overwrites, until the job is cancelled.
    None,
}

/// What becomes of the bitmap at the end. QEMU's `BitmapSyncMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapMode {
    /// Cleared if the job succeeds.
    OnSuccess,
    /// Not changed.
    Never,
    /// Cleared of what was saved, even if the job fails.
    Always,
}

/// What is saved, and how.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// The disk and its backup.
    pub pair: Pair,
    /// What is saved.
    pub sync: BackupSync,
    /// The bitmap: which is used for [`BackupSync::Bitmap`], and otherwise only changed at the end.
    pub bitmap: Option<(BitmapName, BitmapMode)>,
    /// Whether the target reads as zeroes where nothing is written to it.
    pub target_is_blank: bool,
    /// Whether the target is the job's own: it is unlocked when the job ends.
    pub owns_target: bool,
}

/// What a thread of the pool does.
enum Operation {
    /// Reads and writes a range.
    Copy(Claim),
    /// Writes what has been read.
    Write(Saved),
    Flush,
}

enum Event {
    /// The guest overwrites this.
    Saved(Saved),
    /// A range could not be read; it is still to be read.
    Unread(CopyError),
    /// Old data has been written, or not.
    Written(Saved, Result<(), CopyError>),
    Flushed(Result<(), CopyError>),
    /// A user wants something, or the filter has given up.
    Wake,
}

/// A backup's work, from the moment that it saves.
pub struct Backup {
    options: BackupOptions,
    frozen: Option<Frozen>,
    to_read: Arc<DirtyBitmap>,
    claims: Arc<Claims>,
    filter: Arc<BeforeWrite>,
    search: Search,
    pool: Pool<Operation>,
    tell: Sender<Event>,
    events: Receiver<Event>,
    /// What has been read and is not written yet, since the target has failed or is busy.
    unwritten: VecDeque<Saved>,
    /// Where the next range is looked for.
    cursor: u64,
    done_bytes: u64,
    rate: Rate,
    speed: u64,
    /// No operation begins before.
    not_before: Instant,
    flushing: bool,
    flushed: bool,
    failed: Option<CopyError>,
    has_ended: bool,
}

impl Backup {
    /// Not attached yet.
    fn new(options: BackupOptions, to_read: Arc<DirtyBitmap>) -> Self {
        let (tell, events) = channel();
        let claims = Arc::<Claims>::default();
        let filter = {
            let tell = tell.clone();
            // Nobody listens any more when the job has ended.
            let tell = move |event| drop(tell.send(event));
            BeforeWrite::new(&options, claims.clone(), to_read.clone(), tell)
        };
        let filter = Arc::new(filter);
        let pool = pool(&options, filter.clone(), to_read.clone(), tell.clone());
        let search = Search::new(&options);
        let now = Instant::now();
        Self {
            options,
            frozen: None,
            to_read,
            claims,
            filter,
            search,
            pool,
            tell,
            events,
            unwritten: VecDeque::new(),
            cursor: 0,
            done_bytes: 0,
            rate: Rate::new(now),
            speed: 0,
            not_before: now,
            flushing: false,
            flushed: false,
            failed: None,
            has_ended: false,
        }
    }

    /// The disk's id.
    pub fn device(&self) -> &str {
        self.options.pair.source.id()
    }

    /// The target's name.
    pub fn target(&self) -> &str {
        self.options.pair.target.id()
    }

    fn copies_in_background(&self) -> bool {
        self.options.sync != BackupSync::None
    }

    fn show(&self, job: &Job) {
        let left = if self.copies_in_background() { self.to_read.marked_bytes() } else { 0 };
        job.show_progress(self.done_bytes, left + self.filter.held_bytes());
        job.show_busy(self.pool.in_flight() > 0);
    }

    /// The next clusters to read, claimed.
    fn next(&mut self) -> Option<Claim> {
        if !self.copies_in_background() {
            return None;
        }
        let granule = self.to_read.granule_bytes();
        let end = self.search.searched_bytes(&self.to_read);
        // From the cursor to the end, then from the start.
        for from in [self.cursor, 0] {
            let mut at = from;
            while let Some(mut run) = self.to_read.next_run(at, MAX_OPERATION_BYTES) {
                if run.offset_bytes >= end {
                    break;
                }
                run.len_bytes = run.len_bytes.min(end - run.offset_bytes);
                let Some(claim) = self.claims.try_claim(run) else {
                    at = run.offset_bytes + granule;
                    continue;
                };
                // Before it was claimed, the guest may have overwritten it: what is on the disk now is not the old
                // data, which is in memory.
                // The last cluster may be shorter than the others.
                let still = self.to_read.next_run(run.offset_bytes, MAX_OPERATION_BYTES);
                let is_whole = |it: ByteRange| {
                    it.offset_bytes == run.offset_bytes && it.len_bytes >= run.len_bytes
                };
                if still.is_some_and(is_whole) {
                    self.cursor = run.end();
                    return Some(claim);
                }
            }
        }
        None
    }

    fn hand_out(&mut self, job: &Job, operation: Operation) {
        let Err((operation, source)) = self.pool.start(operation) else { return };
        match operation {
            Operation::Write(saved) => self.unwritten.push_front(saved),
            Operation::Flush => self.flushing = false,
            Operation::Copy(_) => {}
        }
        // No thread for it: treated as a failure of the target.
        let disk = self.options.pair.target.location();
        self.on_error(job, CopyError::Flush { disk, source });
    }

    /// Starts what may be started at `now`: what the guest waits for first, even when the job `rests`.
    fn start_operations(&mut self, job: &Job, rests: bool, now: Instant) {
        let speed = job.speed();
        if self.speed != speed {
            self.speed = speed;
            self.rate.reset(now);
        }
        while self.pool.in_flight() < MAX_OPERATIONS && now >= self.not_before {
            if let Some(saved) = self.unwritten.pop_front() {
                self.hand_out(job, Operation::Write(saved));
                continue;
            }
            if rests || !self.rate.wait(now).is_zero() {
                break;
            }
            let Some(claim) = self.next() else { break };
            self.rate.spend(now, claim.range().len_bytes, speed);
            self.hand_out(job, Operation::Copy(claim));
        }
        let is_saved = self.copies_in_background() && self.is_all_written();
        if is_saved && !rests && !self.flushing && !self.flushed && now >= self.not_before {
            self.flushing = true;
            self.hand_out(job, Operation::Flush);
        }
    }

    /// Whether the target has all that is to be saved.
    fn is_all_written(&self) -> bool {
        self.search.is_done()
            && self.to_read.marked_granules() == 0
            // In this order: the guest's old data is held before its bits are cleared.
            && self.filter.held_bytes() == 0
            && self.pool.in_flight() == 0
    }

    /// Waits for the next event, at most for `time`, and takes all that have come.
    fn take_events(&mut self, job: &Job, time: Duration) {
        let mut next = self.events.recv_timeout(time).ok();
        while let Some(event) = next {
            self.on_event(job, event);
            next = self.events.try_recv().ok();
        }
        if let Some(error) = self.filter.take_failure() {
            self.fail(job, error);
        }
    }

    fn on_event(&mut self, job: &Job, event: Event) {
        match event {
            Event::Wake => {}
            Event::Saved(saved) => self.unwritten.push_back(saved),
            Event::Unread(error) => {
                self.pool.ended();
                self.on_error(job, error);
            }
            Event::Written(saved, Ok(())) => {
                self.pool.ended();
                self.done_bytes += saved.range().len_bytes;
            }
            Event::Written(saved, Err(error)) => {
                self.pool.ended();
                // Only here is the old data left.
                self.unwritten.push_front(saved);
                self.on_error(job, error);
            }
            Event::Flushed(result) => {
                self.pool.ended();
                self.flushing = false;
                self.flushed = result.is_ok();
                if let Err(error) = result {
                    self.on_error(job, error);
                }
            }
        }
    }

    fn on_error(&mut self, job: &Job, error: CopyError) {
        if self.has_ended {
            return;
        }
        log::warn!("job {}: {}", job.id(), super::chain(&error));
        self.not_before = Instant::now() + BACKOFF;
        if !job.goes_on_after(&error) {
            self.failed.get_or_insert(error);
        }
    }

    /// The moment cannot be saved any more, whatever the policy is.
    fn fail(&mut self, job: &Job, error: CopyError) {
        job.report(&error);
        self.failed.get_or_insert(error);
    }

    /// One turn. Returns how long there is nothing to do, unless an event comes.
    fn turn(&mut self, job: &Job) -> Duration {
        let rests = job.must_rest(self.pool.in_flight());
        let now = Instant::now();
        if !rests && !self.search.is_done() {
            self.search.go_on(&self.options.pair.source, &self.to_read, self.frozen.as_ref());
        }
        // What an error has stopped waits until it is resumed.
        if !job.is_stopped() {
            self.start_operations(job, rests, now);
        }
        self.show(job);
        if rests {
            return Duration::from_secs(1);
        }
        if !self.search.is_done() {
            return Duration::ZERO;
        }
        let limit = self.rate.wait(now).max(self.not_before.saturating_duration_since(now));
        if limit.is_zero() || self.pool.in_flight() >= MAX_OPERATIONS { IDLE } else { limit }
    }

    fn work(&mut self, job: &Job) -> Result<Finished, CopyError> {
        loop {
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            if job.cancelled().is_some() {
                return Ok(Finished::Cancelled);
            }
            if self.flushed {
                return Ok(Finished::Done);
            }
            let time = self.turn(job);
            self.take_events(job, time);
            self.show(job);
        }
    }

    /// The end of all saving: writes of the guest go on, and nothing is written to the target any more.
    fn end(&mut self, job: Option<&Job>) {
        if std::mem::replace(&mut self.has_ended, true) {
            return;
        }
        self.filter.end();
        let filter: Arc<dyn WriteFilter> = self.filter.clone();
        self.options.pair.source.detach(&filter);
        if let Some(job) = job {
            self.settle(job);
        }
        self.forget_unwritten();
        match self.pool.in_flight() {
            0 if self.options.owns_target => self.options.pair.target.unlock(),
            0 => {}
            // Nobody knows what they have done.
            _ => self.to_read.mark_all(),
        }
    }

    /// What is in memory only will not be saved.
    fn forget_unwritten(&mut self) {
        for saved in self.unwritten.drain(..) {
            self.to_read.mark(saved.range());
        }
    }

    /// Waits for what is in flight, unless it hangs.
    fn settle(&mut self, job: &Job) {
        let deadline = Instant::now() + LAST_WAIT;
        self.forget_unwritten();
        while self.pool.in_flight() > 0 || self.filter.held_bytes() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                log::warn!("job {}: an operation hangs, and is left behind", job.id());
                return;
            }
            self.take_events(job, left.min(IDLE));
            self.forget_unwritten();
        }
    }

    /// Gives the bitmap back.
    fn end_bitmap(&mut self, has_succeeded: bool) {
        let Some(frozen) = self.frozen.take() else { return };
        let mode = self.options.bitmap.as_ref().map(|(_, mode)| *mode);
        match mode {
            Some(BitmapMode::OnSuccess | BitmapMode::Always) if has_succeeded => frozen.clear(),
            Some(BitmapMode::Always) => frozen.keep_only(self.to_read.clone()),
            _ => drop(frozen),
        }
    }
}

/// The threads that read and write.
fn pool(
    options: &BackupOptions,
    filter: Arc<BeforeWrite>,
    to_read: Arc<DirtyBitmap>,
    tell: Sender<Event>,
) -> Pool<Operation> {
    let name = format!("save-{}", options.pair.source.id()).replace('\0', "");
    let pair = options.pair.clone();
    Pool::new(name, move |operation, buffer: &mut Buffer| {
        let event = match operation {
            Operation::Flush => Event::Flushed(unless_panicking(&pair, || pair.flush())),
            Operation::Write(saved) => write(&pair, saved, buffer),
            Operation::Copy(claim) => {
                let range = claim.range();
                // One cluster may be larger than an operation otherwise is.
                let needed = usize::try_from(range.len_bytes).unwrap_or(usize::MAX);
                let own = buffer.take().filter(|own| own.len() >= needed);
                let own = own.unwrap_or_else(|| match range.len_bytes > MAX_OPERATION_BYTES {
                    true => AlignedBuffer::new(needed),
                    false => operation_buffer(),
                });
                match unless_panicking(&pair, || filter.read_ahead(range, own)) {
                    Err(error) => Event::Unread(error),
                    Ok(saved) => {
                        // The guest may overwrite it now.
                        to_read.clear_within(range);
                        drop(claim);
                        write(&pair, saved, buffer)
                    }
                }
            }
        };
        let _ = tell.send(event);
    })
}

/// Writes old data; the thread gets its buffer back if that is not needed any more.
fn write(pair: &Pair, mut saved: Saved, buffer: &mut Buffer) -> Event {
    let written = unless_panicking(pair, || saved.write(pair));
    if written.is_ok() && buffer.is_none() {
        *buffer = saved.take_operation_buffer();
    }
    Event::Written(saved, written)
}

impl Work for Backup {
    fn run(&mut self, job: &Arc<Job>) -> Result<Finished, CopyError> {
        let wake = self.tell.clone();
        job.on_wake(move || drop(wake.send(Event::Wake)));
        let ended = self.work(job);
        self.end(Some(job));
        if !matches!(ended, Ok(Finished::Done)) {
            self.end_bitmap(false);
        }
        ended
    }

    fn commit(&mut self, _: &Arc<Job>) -> Result<(), String> {
        self.end_bitmap(true);
        Ok(())
    }

    fn abort(&mut self, _: &Arc<Job>) {
        self.end_bitmap(false);
    }
}

impl Drop for Backup {
    /// One that was never started, or whose thread has panicked.
    fn drop(&mut self) {
        self.end(None);
        self.end_bitmap(false);
    }
}

#[cfg(test)]
mod tests;
