//! Mirror: keeps a second disk equal to one that the guest writes to, until the device is switched over to it, or it
//! is left as a copy of one moment.
//!
//! ```text
//! guest's write ─▶ BlockNode ─▶ dirty granules ─▶ claims ─▶ Copier ─▶ target      copy-mode background
//!                          └──▶ filter: claim, write to both ──────▶ target      copy-mode write-blocking
//! ```
//! Granules are cleared, then read: a write in between marks them again. No granule is in flight twice. *In sync*
//! means that nothing is dirty or in flight and that the target has been flushed since. The guest's requests are
//! drained only for what is dirty at the very end.

mod active;

use super::{Cancel, CopyMode, Finished, Job, Rate, Work};
use crate::block::backend::{BlockBackend, ByteRange, Content};
use crate::block::copy::{
    Claim, Claims, Copied, Copier, CopyError, MAX_OPERATION_BYTES, MAX_OPERATIONS, Pair,
};
use crate::block::gate::Drained;
use crate::block::nbd::client::NbdControl;
use crate::block::{BlockNode, Tracking, holes};
use active::Active;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// Default of `granularity`, and its limits: 512 bytes to 64 MiB.
pub const DEFAULT_GRANULARITY: u64 = 64 << 10;
/// Default of `buf-size`.
pub const DEFAULT_BUF_SIZE: u64 = 16 << 20;
/// How often an idle job looks whether the guest has written.
const IDLE: Duration = Duration::from_millis(100);
/// Pause after an error that is ignored, so that a broken disk does not keep a processor busy.
const BACKOFF: Duration = Duration::from_millis(100);
/// So much is copied until the target is flushed beside the copying, so that little is left for the flush before the job
/// is ready. Only until then: afterwards there is little to copy.
const FLUSH_EVERY: u64 = 64 << 20;
/// So little may be dirty when the guest's requests are drained.
const LAST_BYTES: u64 = 16 << 20;
/// Longest wait for the guest's requests in flight before they go on.
const DRAIN: Duration = Duration::from_secs(10);
/// Longest time for what is left then. A target that takes longer hangs, and the guest is not to hang with it.
const LAST_COPY: Duration = Duration::from_secs(10);
/// Longest wait for operations in flight when the job ends. A disk that takes longer hangs.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// What is copied at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// Everything.
    Full,
    /// What the image holds itself, not its backing files.
    Top,
    /// Nothing: only what is written from now on.
    None,
}

/// Opens the target once more, when the source is not locked any more.
pub type Reopen = Box<dyn FnOnce() -> Result<Arc<dyn BlockBackend>, String> + Send>;

/// What is mirrored, and how.
pub struct MirrorOptions {
    /// The disk and its copy.
    pub pair: Pair,
    /// What is copied at first.
    pub sync: Sync,
    /// Bytes that one dirty bit stands for.
    pub granularity: u64,
    /// Most bytes in flight; at least `granularity`.
    pub buf_size: u64,
    /// Whether the target reads as zeroes, or as the same backing file.
    pub target_is_blank: bool,
    /// For a target that has the source as its backing file, and is opened without it until then: it is written in
    /// whole clusters, since what it does not hold of one would read as zeroes.
    pub reopen: Option<Reopen>,
    /// Of a target on an NBD server.
    pub remote: Option<NbdControl>,
}

/// A mirror that cannot be started. QEMU's words where QEMU has the rule.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    #[error("Source and target image have different sizes")]
    Sizes,
    #[error("Can't mirror node into itself")]
    Same,
    #[error("Parameter 'granularity' expects a value in range [512B, 64MB]")]
    GranularityRange,
    #[error("Parameter 'granularity' expects a power of 2")]
    Granularity,
    #[error("the target {location} is read-only")]
    ReadOnly { location: String },
    #[error("disk {id}: out of memory for its dirty bitmap")]
    NoMemory { id: String },
}

enum Event {
    Copied(Copied),
    /// A user wants something, or a mirrored write has failed.
    Wake,
}

/// A mirror's work.
pub struct Mirror {
    options: MirrorOptions,
    dirty: Tracking,
    claims: Arc<Claims>,
    copier: Copier,
    tell: Sender<Event>,
    events: Receiver<Event>,
    /// Where the next operation is looked for.
    cursor: u64,
    bytes_in_flight: u64,
    done_bytes: u64,
    rate: Rate,
    speed: u64,
    /// No operation begins before.
    not_before: Instant,
    /// Nothing else is in flight until the target is flushed.
    flushing: bool,
    /// A flush beside the copying is in flight.
    flushing_beside: bool,
    /// Copied since the last flush began.
    unflushed_bytes: u64,
    was_ready: bool,
    /// The target has been flushed, and nothing was written to it since.
    flushed: bool,
    active: Option<Arc<Active>>,
    failed: Option<CopyError>,
}

impl Mirror {
    /// Begins to track writes of the source.
    pub fn new(mut options: MirrorOptions) -> Result<Self, MirrorError> {
        let Pair { source, target, .. } = &options.pair;
        if Arc::ptr_eq(source, target) {
            return Err(MirrorError::Same);
        }
        if source.len_bytes() != target.len_bytes() {
            return Err(MirrorError::Sizes);
        }
        if target.read_only() {
            return Err(MirrorError::ReadOnly { location: target.location() });
        }
        let granularity = options.granularity;
        if !(512..=64 << 20).contains(&granularity) {
            return Err(MirrorError::GranularityRange);
        }
        if !granularity.is_power_of_two() {
            return Err(MirrorError::Granularity);
        }
        let granularity = match options.reopen {
            Some(_) => granularity.max(target.cluster_bytes().unwrap_or(0)),
            None => granularity,
        };
        options.buf_size = options.buf_size.max(granularity);
        let no_memory = || MirrorError::NoMemory { id: source.id().to_owned() };
        let dirty = source.track(granularity).ok_or_else(no_memory)?;
        let (tell, events) = channel();
        let copied = tell.clone();
        let name = format!("copy-{}", source.id()).replace('\0', "");
        let copier = Copier::new(options.pair.clone(), name, move |done| {
            // Nobody listens any more when the job has ended.
            let _ = copied.send(Event::Copied(done));
        });
        let now = Instant::now();
        Ok(Self {
            options,
            dirty,
            claims: Arc::default(),
            copier,
            tell,
            events,
            cursor: 0,
            bytes_in_flight: 0,
            done_bytes: 0,
            rate: Rate::new(now),
            speed: 0,
            not_before: now,
            flushing: false,
            flushing_beside: false,
            unflushed_bytes: 0,
            was_ready: false,
            flushed: false,
            active: None,
            failed: None,
        })
    }

    fn source(&self) -> &Arc<BlockNode> {
        &self.options.pair.source
    }

    fn remaining_bytes(&self) -> u64 {
        self.dirty.marked_bytes() + self.bytes_in_flight
    }

    fn show(&self, job: &Job) {
        job.show_progress(self.done_bytes, self.remaining_bytes());
        job.show_busy(self.copier.in_flight() > 0);
    }

    /// Marks what is to be copied at first.
    fn mark_first(&self, job: &Job) {
        let skipped = match self.options.sync {
            Sync::None => return,
            Sync::Top => Some(Content::Backing),
            Sync::Full => self.options.target_is_blank.then_some(Content::Zero),
        };
        self.dirty.mark_all();
        if let Some(skipped) = skipped {
            let go_on = || job.cancelled().is_none();
            holes::clear(self.source(), &self.dirty, skipped, &go_on, &mut |_| {});
        }
    }

    /// The next granules to copy, claimed and cleared.
    fn next(&mut self) -> Option<Claim> {
        let granule = self.dirty.granule_bytes();
        let most = MAX_OPERATION_BYTES.min(self.options.buf_size).max(granule);
        // From the cursor to the end, then from the start.
        for from in [self.cursor, 0] {
            let mut at = from;
            while let Some(run) = self.dirty.next_run(at, most) {
                let fits = self.bytes_in_flight == 0
                    || self.bytes_in_flight + run.len_bytes <= self.options.buf_size;
                if !fits {
                    return None;
                }
                if let Some(claim) = self.claims.try_claim(run) {
                    self.dirty.clear_within(run);
                    self.cursor = run.end();
                    return Some(claim);
                }
                at = run.offset_bytes + granule;
            }
        }
        None
    }

    /// Starts what may be started at `now`.
    fn start_operations(&mut self, limited: bool, now: Instant, speed: u64) -> io::Result<()> {
        if self.speed != speed {
            self.speed = speed;
            self.rate.reset(now);
        }
        while self.copier.in_flight() < MAX_OPERATIONS && now >= self.not_before && !self.flushing {
            if limited && !self.rate.wait(now).is_zero() {
                break;
            }
            let Some(claim) = self.next() else { break };
            let ByteRange { len_bytes, .. } = claim.range();
            self.rate.spend(now, len_bytes, if limited { speed } else { 0 });
            let range = claim.range();
            if let Err(error) = self.copier.start(claim) {
                self.dirty.mark(range);
                return Err(error);
            }
            self.bytes_in_flight += len_bytes;
            self.flushed = false;
        }
        Ok(())
    }

    /// Waits for the next event, at most for `time`, and takes all that have come.
    fn take_events(&mut self, job: &Job, time: Duration) {
        let mut next = self.events.recv_timeout(time).ok();
        while let Some(event) = next {
            if let Event::Copied(copied) = event {
                self.on_copied(job, copied);
            }
            next = self.events.try_recv().ok();
        }
        if let Some(error) = self.active.as_ref().and_then(|active| active.take_failure()) {
            self.on_error(job, error);
        }
    }

    fn on_copied(&mut self, job: &Job, copied: Copied) {
        self.copier.ended();
        let Some(claim) = copied.claim else {
            // One beside the copying leaves what was copied meanwhile.
            let was_last = std::mem::take(&mut self.flushing);
            self.flushing_beside = false;
            // A flush after a loss fails, and that is no error: what was lost is written again.
            let lost = self.take_lost_writes(job);
            self.flushed = was_last && copied.result.is_ok() && !lost;
            if let Some(error) = copied.result.err().filter(|_| !lost) {
                self.on_error(job, error);
            }
            return;
        };
        let range = claim.range();
        self.bytes_in_flight -= range.len_bytes;
        match copied.result {
            Ok(()) => {
                self.done_bytes += range.len_bytes;
                self.unflushed_bytes += range.len_bytes;
            }
            Err(error) => {
                self.dirty.mark(range);
                self.on_error(job, error);
            }
        }
    }

    /// Marks what a server that was lost had not made durable. Returns whether there is something.
    fn take_lost_writes(&mut self, job: &Job) -> bool {
        let lost = self.options.remote.as_ref().and_then(NbdControl::take_lost_writes);
        let Some(lost) = lost else { return false };
        log::warn!(
            "job {}: {} bytes are written again after a loss",
            job.id(),
            lost.marked_bytes()
        );
        for range in lost.runs() {
            self.dirty.mark(range);
        }
        job.lose_sync();
        true
    }

    fn on_error(&mut self, job: &Job, error: CopyError) {
        log::warn!("job {}: {}", job.id(), super::chain(&error));
        job.lose_sync();
        self.not_before = Instant::now() + BACKOFF;
        if !job.goes_on_after(&error) {
            self.failed.get_or_insert(error);
        }
    }

    /// No thread for an operation: treated as a failure of the target.
    fn no_thread(&mut self, job: &Job, source: io::Error) {
        let disk = self.options.pair.target.location();
        let range = ByteRange { offset_bytes: 0, len_bytes: 0 };
        self.on_error(job, CopyError::Write { disk, range, source });
    }

    /// Whether nothing was written to the target since it was flushed.
    fn is_flushed(&mut self) -> bool {
        if self.active.as_ref().is_some_and(|active| active.has_written()) {
            self.flushed = false;
        }
        self.flushed
    }

    /// Waits for what is in flight. False if something hangs.
    fn settle(&mut self, job: &Job, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.copier.in_flight() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                log::warn!("job {}: an operation hangs, and is left behind", job.id());
                return false;
            }
            self.take_events(job, left.min(IDLE));
        }
        true
    }

    /// Whether nothing is dirty or in flight.
    fn is_clean(&self) -> bool {
        self.copier.in_flight() == 0 && self.dirty.marked_granules() == 0
    }

    /// Copies until the copy is equal to the disk, whose requests are drained, and durable. False if that fails and
    /// the job goes on, or is cancelled: the guest's requests must not wait for a repair.
    fn finish_drained(&mut self, job: &Job) -> Result<bool, CopyError> {
        let began = Instant::now();
        while !(self.is_clean() && self.is_flushed()) {
            if began.elapsed() >= LAST_COPY {
                let disk = self.options.pair.target.location();
                return Err(CopyError::Slow { disk, limit: LAST_COPY });
            }
            if job.cancelled() == Some(Cancel::Force) || !job.info().ready {
                return Ok(false);
            }
            if let Err(error) = self.start_operations(false, Instant::now(), 0) {
                self.no_thread(job, error);
            }
            if self.is_clean() && !self.flushed && !self.flushing {
                self.start_flush(job);
            }
            self.take_events(job, IDLE);
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
        }
        Ok(true)
    }

    /// The flush that has to find all: nothing else is in flight.
    fn start_flush(&mut self, job: &Job) {
        // What is written meanwhile needs another one.
        self.is_flushed();
        match self.copier.flush() {
            Ok(()) => self.flushing = true,
            Err(error) => self.no_thread(job, error),
        }
    }

    /// A flush beside the copying, if there is much to flush.
    fn flush_beside(&mut self, job: &Job) {
        if self.unflushed_bytes < FLUSH_EVERY || self.flushing_beside || self.is_clean() {
            return;
        }
        self.unflushed_bytes = 0;
        match self.copier.flush() {
            Ok(()) => self.flushing_beside = true,
            Err(error) => self.no_thread(job, error),
        }
    }

    /// Drains the guest's requests. `None` if that takes too long or the job is cancelled by force.
    fn drain(&mut self, job: &Job) -> Option<Drained> {
        let deadline = Instant::now() + DRAIN;
        let section = self.source().gate().close();
        while !section.wait_until(Instant::now() + IDLE) {
            self.take_events(job, Duration::ZERO);
            if Instant::now() >= deadline || job.cancelled() == Some(Cancel::Force) {
                return None;
            }
        }
        Some(section)
    }

    /// Has writes wait for the copy from now on.
    fn activate(&mut self, job: &Arc<Job>) {
        let Some(section) = self.drain(job) else { return };
        let tell = self.tell.clone();
        let active = Arc::new(Active::new(
            self.options.pair.clone(),
            self.claims.clone(),
            self.dirty.shared(),
            self.options.reopen.is_some(),
            move || drop(tell.send(Event::Wake)),
        ));
        // Every write is one that the filter sees, or has marked its granules by now.
        self.source().attach(&section, active.clone());
        self.dirty.detach();
        self.active = Some(active);
    }

    /// One turn of a job that has nothing to end for.
    fn turn(&mut self, job: &Arc<Job>) {
        if job.copy_mode() == CopyMode::WriteBlocking && self.active.is_none() {
            self.activate(job);
        }
        let ready = job.info().ready;
        let now = Instant::now();
        // Asked before the look at what is dirty: what was written before is seen.
        let sync = job.wanted_sync();
        if let Err(error) = self.start_operations(!ready, now, job.speed()) {
            self.no_thread(job, error);
        }
        if !ready {
            self.flush_beside(job);
        }
        if self.is_clean() && !self.flushing && self.failed.is_none() {
            let flushed = self.is_flushed();
            if !ready && flushed {
                job.become_ready();
                self.show(job);
            } else if let Some(number) = sync.filter(|_| flushed) {
                job.note_sync(number);
            } else if (!ready || sync.is_some()) && now >= self.not_before {
                self.start_flush(job);
            }
            if ready && self.active.is_some() && job.info().actively_synced == Some(false) {
                job.become_actively_synced();
            }
        }
        self.show(job);
        let waits = !self.is_clean() || self.flushing;
        let limit = self.rate.wait(now).max(self.not_before.saturating_duration_since(now));
        let time = match waits && !limit.is_zero() && self.copier.in_flight() < MAX_OPERATIONS {
            true => limit.min(IDLE),
            false => IDLE,
        };
        self.take_events(job, time);
        self.show(job);
    }

    fn work(&mut self, job: &Arc<Job>) -> Result<Finished, CopyError> {
        self.mark_first(job);
        self.show(job);
        loop {
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            let ready = job.info().ready;
            self.was_ready |= ready;
            match job.cancelled() {
                Some(Cancel::Soft) if self.was_ready => {
                    if self.leave(job)? {
                        return Ok(Finished::Left);
                    }
                    continue;
                }
                Some(_) => return Ok(Finished::Cancelled),
                None => {}
            }
            if job.must_rest(self.copier.in_flight()) {
                self.take_events(job, Duration::ZERO);
                if self.copier.in_flight() > 0 {
                    self.take_events(job, IDLE);
                } else {
                    self.show(job);
                    job.rest(Duration::from_secs(1));
                }
                continue;
            }
            if job.is_told_to_complete() && ready && self.remaining_bytes() <= LAST_BYTES {
                return Ok(Finished::Done);
            }
            self.turn(job);
        }
    }

    /// Makes the target a copy of one moment. False if the guest writes too much, or its requests do not end.
    fn leave(&mut self, job: &Arc<Job>) -> Result<bool, CopyError> {
        if self.remaining_bytes() > LAST_BYTES || !job.info().ready {
            self.turn(job);
            return Ok(false);
        }
        let Some(_section) = self.drain(job) else { return Ok(false) };
        self.finish_drained(job)
    }

    /// Switches the device over to the target.
    fn switch(&mut self, job: &Arc<Job>) -> Result<(), String> {
        loop {
            if job.cancelled() == Some(Cancel::Force) {
                return Err("it was cancelled".into());
            }
            if !job.info().ready {
                return Err("the copy is not in sync any more".into());
            }
            if self.remaining_bytes() > LAST_BYTES {
                self.turn(job);
                if let Some(error) = self.failed.take() {
                    return Err(super::chain(&error));
                }
                continue;
            }
            let Some(section) = self.drain(job) else { continue };
            if !self.finish_drained(job).map_err(|error| super::chain(&error))? {
                continue;
            }
            // Whatever the guest writes from now on is no work of this job.
            self.show(job);
            let new = match self.options.reopen.take() {
                None => self.options.pair.target.storage(),
                Some(reopen) => {
                    self.options.pair.target.unlock();
                    self.source().unlock();
                    reopen().inspect_err(|_| self.lock_again())?
                }
            };
            let exchanged = self.source().exchange(&section, new);
            exchanged.map_err(|error| super::chain(&error))?;
            job.note_switch();
            return Ok(());
        }
    }

    /// The device stays with the source after all.
    fn lock_again(&self) {
        if let Err(error) = self.source().lock() {
            log::error!("disk {}: {error}", self.source().id());
        }
    }

    /// The end of all writes to the target.
    fn end(&mut self, job: &Job) {
        if let Some(remote) =
            self.options.remote.take_if(|_| job.cancelled() == Some(Cancel::Force))
        {
            remote.interrupt();
        }
        if let Some(active) = self.active.take() {
            active.end();
            let filter: Arc<dyn crate::block::filter::WriteFilter> = active;
            self.source().detach(&filter);
        }
        if !self.settle(job, LAST_WAIT)
            && let Some(remote) = &self.options.remote
        {
            remote.interrupt();
        }
    }
}

impl Work for Mirror {
    fn run(&mut self, job: &Arc<Job>) -> Result<Finished, CopyError> {
        let wake = self.tell.clone();
        job.on_wake(move || drop(wake.send(Event::Wake)));
        let ended = self.work(job);
        if !matches!(ended, Ok(Finished::Done)) {
            self.end(job);
        }
        ended
    }

    fn commit(&mut self, job: &Arc<Job>) -> Result<(), String> {
        let switched = self.switch(job);
        self.end(job);
        switched
    }

    fn abort(&mut self, job: &Arc<Job>) {
        self.end(job);
    }
}

#[cfg(test)]
mod tests;
