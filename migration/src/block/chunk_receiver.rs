//! Receives chunks on the disks' channel and writes them into images. Checks each one against the
//! announcement before it writes a byte.
//!
//! One thread receives ([`ChunkReceiver::receive_all`], run by [`super::receiver`]), a few write, and one
//! flushes in the background, so that little is left to flush at a mark.

use super::frame::{
    BlockSetup, BlockTotals, Chunk, DiskSetup, DiskTotals, Frame, HEADER_BYTES, bytes_of,
    granules_of, runs,
};
use super::stats::DiskProgress;
use super::{CHUNK, CHUNK_BYTES, GRANULE, GRANULE_BYTES, IncomingDisk, LoadError};
use crate::control::KEEP_ALIVE;
use crate::error::Panicked;
use crate::stats::Counters;
use crate::transport::{Channel, TICK};
use crate::wire::WireError;
use devices::block::aligned::AlignedBuffer;
use devices::block::backend::ByteRange;
use devices::block::bitmap::DirtyBitmap;
use std::collections::VecDeque;
use std::io;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const WRITERS: usize = 4;
/// Chunks received and not yet written: enough to keep the writers busy.
const BUFFERS: usize = 16;
/// A background flush starts after this many bytes were written.
const FLUSH_BYTES: u64 = 32 << 20;

/// A disk and what was received of it.
struct Arriving {
    disk: IncomingDisk,
    /// Granules ever written here. The rest of the image is still blank.
    written: DirtyBitmap,
    /// Chunks received in this pass.
    seen: DirtyBitmap,
}

struct Job {
    chunk: Chunk,
    buffer: AlignedBuffer,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Jobs queued or being written.
    busy: usize,
    spare: Vec<AlignedBuffer>,
    buffers: usize,
    /// Written to each disk since its last flush began.
    unflushed: Vec<u64>,
    flushing: bool,
    /// Flush everything now, however little it is.
    flush_all: bool,
    error: Option<LoadError>,
    stop: bool,
}

/// Shared by the threads.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        devices::lock(&self.state)
    }

    fn wait<'s>(&self, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stops the threads when dropped.
struct StopOnDrop<'s>(&'s Shared);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.lock().stop = true;
        self.0.changed.notify_all();
    }
}

/// The disks of an incoming guest.
pub struct ChunkReceiver {
    disks: Vec<Arriving>,
    counters: Arc<Counters>,
    totals: BlockTotals,
    /// Ends received from the source.
    ended: Arc<AtomicU32>,
}

impl ChunkReceiver {
    /// Checks the source's announcement against the prepared disks.
    pub fn start(
        disks: Vec<IncomingDisk>,
        setup: &BlockSetup,
        counters: Arc<Counters>,
    ) -> Result<Self, WireError> {
        let here: Vec<_> = disks
            .iter()
            .map(|disk| DiskSetup {
                name: disk.node.id().to_owned(),
                len_bytes: disk.node.len_bytes(),
                only_top: disk.only_top,
            })
            .collect();
        if here != setup.disks {
            let reason = format!("the source announces {:?}, prepared are {here:?}", setup.disks);
            return Err(WireError::Malformed { what: "setup of the disks", reason });
        }
        let arriving = disks.into_iter().map(|disk| {
            let (id, len) = (disk.node.id().to_owned(), disk.node.len_bytes());
            let bitmap = |granule_bytes| {
                DirtyBitmap::new(len, granule_bytes).ok_or_else(|| {
                    let reason = format!("disk {id} of {len} bytes");
                    WireError::Malformed { what: "setup of the disks", reason }
                })
            };
            let (written, seen) = (bitmap(GRANULE_BYTES)?, bitmap(CHUNK_BYTES)?);
            Ok::<_, WireError>(Arriving { disk, written, seen })
        });
        let disks = arriving.collect::<Result<Vec<_>, _>>()?;
        let progress = |disk: &DiskSetup| DiskProgress {
            name: disk.name.clone(),
            total_bytes: disk.len_bytes,
            // Ranges that the source never wrote do not come: the rest is there at the end.
            remaining_bytes: disk.len_bytes,
            ..Default::default()
        };
        let progress: Vec<_> = setup.disks.iter().map(progress).collect();
        counters.update(|stats| stats.disk.get_or_insert_default().disks = progress);
        let totals =
            BlockTotals { ends: 0, frames: 0, disks: vec![DiskTotals::default(); disks.len()] };
        Ok(Self { disks, counters, totals, ended: Arc::default() })
    }

    /// Counts received ends. After an end, only writes and flushes are outstanding.
    pub fn ended(&self) -> Arc<AtomicU32> {
        self.ended.clone()
    }

    /// Receives frames until `at_end` breaks. At each end, with everything on stable storage, `at_end` gets
    /// the totals so far; it continues if more may come because the source calls its stop off.
    pub fn receive_all(
        mut self,
        channel: &Channel,
        at_end: &mut dyn FnMut(&BlockTotals) -> ControlFlow<()>,
    ) -> Result<(), LoadError> {
        let unflushed = vec![0; self.disks.len()];
        let state = State { unflushed, ..Default::default() };
        let shared = Shared { state: Mutex::new(state), changed: Condvar::new() };
        let Self { disks, counters, totals, ended } = &mut self;
        let disks: &[Arriving] = disks;
        std::thread::scope(|scope| {
            let spawn = |name: String, work: fn(&[Arriving], &Shared, &Channel)| {
                let shared = &shared;
                std::thread::Builder::new()
                    .name(name)
                    .stack_size(128 << 10)
                    .spawn_scoped(scope, move || {
                        let work = AssertUnwindSafe(|| work(disks, shared, channel));
                        if catch_unwind(work).is_err() {
                            fail(shared, channel, Panicked("writes disks").into());
                        }
                    })
                    .map(drop)
                    .map_err(LoadError::Thread)
            };
            let started = (0..WRITERS)
                .try_for_each(|number| spawn(format!("mig-write-{number}"), write_jobs))
                .and_then(|()| spawn("mig-flush".into(), flush_jobs));
            // On every exit, panics included: the scope joins the threads.
            let _stop = StopOnDrop(&shared);
            let mut receiving =
                Receiving { disks, shared: &shared, channel, counters, totals, ended };
            let result = started.and_then(|()| receiving.run(at_end));
            // The first failure, not its consequence.
            shared.lock().error.take().map_or(result, Err)
        })
    }
}

/// State of the receiving thread.
struct Receiving<'r> {
    disks: &'r [Arriving],
    shared: &'r Shared,
    channel: &'r Channel,
    counters: &'r Counters,
    totals: &'r mut BlockTotals,
    ended: &'r AtomicU32,
}

impl Receiving<'_> {
    fn run(
        &mut self,
        at_end: &mut dyn FnMut(&BlockTotals) -> ControlFlow<()>,
    ) -> Result<(), LoadError> {
        loop {
            let mut header = [0; HEADER_BYTES];
            self.channel.read_when_it_comes(&mut header)?;
            self.totals.frames += 1;
            let (frame, payload_bytes) = Frame::decode(&header)?;
            match frame {
                Frame::Chunk(chunk) => self.chunk(chunk, payload_bytes)?,
                Frame::Mark(number) => {
                    let flush = self.flush_all(true)?;
                    self.begin_pass();
                    self.channel.write_all(&Frame::Flushed(number, flush).encode(0))?;
                    self.all_has_come(1);
                }
                Frame::End => {
                    self.totals.ends += 1;
                    self.ended.store(self.totals.ends, Ordering::Release);
                    self.flush_all(false)?;
                    self.begin_pass();
                    self.all_has_come(0);
                    if at_end(self.totals).is_break() {
                        return Ok(());
                    }
                }
                Frame::Flushed(..) | Frame::Alive => {
                    let (found, expected) = (format!("{frame:?}"), "a chunk of a disk");
                    return Err(WireError::Unexpected { found, expected }.into());
                }
            }
        }
    }

    /// All chunks have come once, with `passes` more.
    fn all_has_come(&self, passes: u64) {
        self.counters.update(|stats| {
            let stats = stats.disk.get_or_insert_default();
            stats.passes += passes;
            stats.disks.iter_mut().for_each(|disk| disk.remaining_bytes = 0);
        });
    }

    /// Each chunk may come once per pass.
    fn begin_pass(&self) {
        for arriving in self.disks {
            let len_bytes = arriving.disk.node.len_bytes();
            arriving.seen.clear_within(ByteRange { offset_bytes: 0, len_bytes });
        }
    }

    fn chunk(&mut self, chunk: Chunk, payload_bytes: u32) -> Result<(), LoadError> {
        let malformed = |reason: String| WireError::Malformed { what: "disk frame", reason };
        let index = usize::from(chunk.disk);
        let Some(arriving) = self.disks.get(index) else {
            return Err(malformed(format!("no disk number {index}")).into());
        };
        let (id, len_bytes) = (arriving.disk.node.id(), arriving.disk.node.len_bytes());
        if (chunk.data | chunk.zero) & !granules_of(chunk.index, len_bytes) != 0 {
            let reason = format!("chunk {} of disk {id} lies past its end", chunk.index);
            return Err(malformed(reason).into());
        }
        let offset_bytes = chunk.index * CHUNK_BYTES;
        if arriving.seen.is_marked(offset_bytes) {
            let reason = format!("chunk {} of disk {id} comes twice in one pass", chunk.index);
            return Err(malformed(reason).into());
        }
        arriving.seen.mark(ByteRange { offset_bytes, len_bytes: 1 });
        let data_bytes = bytes_of(chunk.index, chunk.data, len_bytes);
        if u64::from(payload_bytes) != data_bytes {
            let reason = format!("{payload_bytes} bytes for {data_bytes} of disk {id}");
            return Err(malformed(reason).into());
        }
        let mut buffer = self.free_buffer()?;
        let payload = usize::try_from(data_bytes).ok().and_then(|len| buffer.get_mut(..len));
        let too_long = || malformed(format!("{data_bytes} bytes of disk {id} in a chunk"));
        self.channel.read_exact(payload.ok_or_else(too_long)?)?;
        let zero_bytes = bytes_of(chunk.index, chunk.zero, len_bytes);
        let Some(totals) = self.totals.disks.get_mut(index) else {
            return Err(malformed(format!("no disk number {index}")).into());
        };
        totals.data_bytes += data_bytes;
        totals.zero_bytes += zero_bytes;
        let totals = *totals;
        self.counters.update(|stats| {
            let disk = stats.disk.get_or_insert_default();
            disk.transferred_bytes += HEADER_BYTES as u64 + data_bytes;
            if let Some(disk) = disk.disks.get_mut(index) {
                disk.sent = totals;
                let now = data_bytes + zero_bytes;
                disk.remaining_bytes = disk.remaining_bytes.saturating_sub(now);
            }
        });
        let mut state = self.shared.lock();
        state.busy += 1;
        state.jobs.push_back(Job { chunk, buffer });
        self.shared.changed.notify_all();
        Ok(())
    }

    /// A buffer that no writer uses. Waits for one.
    fn free_buffer(&self) -> Result<AlignedBuffer, LoadError> {
        let mut state = self.shared.lock();
        loop {
            if state.error.is_some() || self.channel.is_cancelled() {
                return Err(WireError::Interrupted.into());
            }
            if let Some(buffer) = state.spare.pop() {
                return Ok(buffer);
            }
            if state.buffers < BUFFERS {
                state.buffers += 1;
                return Ok(AlignedBuffer::new(CHUNK));
            }
            // A write may hang.
            let waited = self.shared.changed.wait_timeout(state, TICK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until everything is written and on stable storage. Returns how long flushing took after the
    /// last write. With `keep_alive` it sends a keep-alive every second meanwhile.
    fn flush_all(&self, keep_alive: bool) -> Result<Duration, LoadError> {
        let mut state = self.shared.lock();
        let (mut written, mut last_sent) = (None, Instant::now());
        loop {
            if state.error.is_some() {
                return Err(WireError::Interrupted.into());
            }
            if state.busy == 0 {
                written.get_or_insert_with(Instant::now);
                if !state.flushing && state.unflushed.iter().all(|bytes| *bytes == 0) {
                    state.flush_all = false;
                    return Ok(written.map_or(Duration::ZERO, |since| since.elapsed()));
                }
                state.flush_all = true;
                self.shared.changed.notify_all();
            }
            let wait = KEEP_ALIVE.saturating_sub(last_sent.elapsed());
            let waited = self.shared.changed.wait_timeout(state, wait);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if self.channel.is_cancelled() {
                return Err(WireError::Interrupted.into());
            }
            if last_sent.elapsed() >= KEEP_ALIVE {
                last_sent = Instant::now();
                if keep_alive {
                    drop(state);
                    self.channel.write_all(&Frame::Alive.encode(0))?;
                    state = self.shared.lock();
                }
            }
        }
    }
}

/// Records the first failure and wakes the receiving thread.
fn fail(shared: &Shared, channel: &Channel, error: LoadError) {
    let mut state = shared.lock();
    state.error.get_or_insert(error);
    state.stop = true;
    shared.changed.notify_all();
    channel.trip();
}

/// Body of a writing thread.
fn write_jobs(disks: &[Arriving], shared: &Shared, channel: &Channel) {
    let mut state = shared.lock();
    loop {
        let Some(job) = state.jobs.pop_front() else {
            if state.stop {
                return;
            }
            state = shared.wait(state);
            continue;
        };
        drop(state);
        let index = usize::from(job.chunk.disk);
        let no_disk = || {
            LoadError::from(WireError::Unexpected {
                found: format!("disk number {index}"),
                expected: "an announced disk",
            })
        };
        let result = disks.get(index).ok_or_else(no_disk).and_then(|arriving| arriving.write(&job));
        match result {
            Err(error) => return fail(shared, channel, error),
            Ok(bytes) => {
                state = shared.lock();
                state.busy -= 1;
                state.spare.push(job.buffer);
                if let Some(sum) = state.unflushed.get_mut(index) {
                    *sum += bytes;
                }
                shared.changed.notify_all();
            }
        }
    }
}

/// Body of the flushing thread.
fn flush_jobs(disks: &[Arriving], shared: &Shared, channel: &Channel) {
    let mut state = shared.lock();
    loop {
        if state.stop {
            return;
        }
        let least = if state.flush_all { 1 } else { FLUSH_BYTES };
        let Some(index) = state.unflushed.iter().position(|bytes| *bytes >= least) else {
            state = shared.wait(state);
            continue;
        };
        state.unflushed[index] = 0;
        state.flushing = true;
        drop(state);
        if let Some(Arriving { disk, .. }) = disks.get(index)
            && let Err(source) = disk.node.sync()
        {
            let disk = disk.node.id().to_owned();
            return fail(shared, channel, LoadError::Flush { disk, source });
        }
        state = shared.lock();
        state.flushing = false;
        shared.changed.notify_all();
    }
}

impl Arriving {
    /// Writes a chunk; returns the number of bytes written.
    fn write(&self, job: &Job) -> Result<u64, LoadError> {
        let Chunk { index, data, zero, .. } = job.chunk;
        let node = &self.disk.node;
        let range_of = |(first, count): (u32, u32)| {
            let offset_bytes = index * CHUNK_BYTES + u64::from(first) * GRANULE_BYTES;
            let len_bytes = (u64::from(count) * GRANULE_BYTES).min(node.len_bytes() - offset_bytes);
            ByteRange { offset_bytes, len_bytes }
        };
        let failed = |range: ByteRange| {
            move |source| LoadError::Write {
                disk: node.id().to_owned(),
                offset_bytes: range.offset_bytes,
                len_bytes: range.len_bytes,
                source,
            }
        };
        let mut payload: &[u8] = &job.buffer;
        let mut bytes = 0;
        for range in runs(data).map(range_of) {
            let cut = usize::try_from(range.len_bytes).ok();
            let cut = cut.and_then(|len| payload.split_at_checked(len));
            let too_short = || failed(range)(io::ErrorKind::UnexpectedEof.into());
            let (now, rest) = cut.ok_or_else(too_short)?;
            payload = rest;
            node.fill_at(now, range.offset_bytes).map_err(failed(range))?;
            self.written.mark(range);
            bytes += range.len_bytes;
        }
        for range in runs(zero).map(range_of) {
            if self.disk.only_top || self.was_written(range) {
                let ByteRange { offset_bytes, len_bytes } = range;
                node.fill_zeroes(offset_bytes, len_bytes).map_err(failed(range))?;
                bytes += len_bytes;
            }
        }
        Ok(bytes)
    }

    fn was_written(&self, range: ByteRange) -> bool {
        let granules = (range.offset_bytes..range.end()).step_by(GRANULE);
        granules.into_iter().any(|at| self.written.is_marked(at))
    }
}
