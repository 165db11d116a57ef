//! What the threads of the destination's disks share: images, buffers, the queue of received chunks, and the
//! gate where the channels meet at a mark. Owned by [`super::chunk_receiver`], whose threads fill the queue.
//! A few threads unpack and write (`mig-write-N`), and one flushes in the background, so that little is left
//! to flush at a mark.

use super::frame::{BlockTotals, Chunk, Frame, runs};
use super::packing::Unpacker;
use super::{CHUNK, CHUNK_BYTES, GRANULE, GRANULE_BYTES, IncomingDisk, LoadError};
use crate::control::KEEP_ALIVE;
use crate::ram::frame::Packing;
use crate::transport::{Channel, TICK};
use crate::wire::WireError;
use devices::block::aligned::AlignedBuffer;
use devices::block::backend::ByteRange;
use devices::block::bitmap::DirtyBitmap;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Threads that write.
pub(super) const WRITERS: usize = 4;
/// Chunks received and not yet written: enough to keep the writers busy. And one for each channel.
const BUFFERS: usize = 16;
/// A background flush starts after this many bytes were written.
const FLUSH_BYTES: u64 = 32 << 20;

/// A disk and what was received of it.
pub(super) struct Image {
    pub(super) disk: IncomingDisk,
    /// Granules ever written here. The rest of the image is still blank.
    pub(super) written: DirtyBitmap,
    /// Chunks received in this pass.
    pub(super) seen: DirtyBitmap,
}

/// A chunk to write.
pub(super) struct Job {
    pub(super) chunk: Chunk,
    pub(super) buffer: AlignedBuffer,
    /// As received.
    pub(super) payload_bytes: usize,
    /// Unpacked.
    pub(super) data_bytes: usize,
}

/// What comes on every channel before any of them goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Border {
    Mark(u64),
    End,
}

/// What all channels find behind a border.
#[derive(Debug, Clone, Copy)]
pub(super) struct Crossed {
    /// How long flushing took after the last write.
    pub(super) flush: Duration,
    /// Nothing more is to be received.
    pub(super) over: bool,
}

/// The channels that wait at a border.
#[derive(Default)]
struct Gate {
    border: Option<Border>,
    waiting: usize,
    /// Borders crossed so far.
    crossings: u64,
    last: Option<Crossed>,
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
    gate: Gate,
    totals: BlockTotals,
    error: Option<LoadError>,
    stop: bool,
}

/// Shared by the threads.
pub(super) struct Shared<'r> {
    pub(super) images: &'r [Image],
    pub(super) channels: &'r [Arc<Channel>],
    state: Mutex<State>,
    changed: Condvar,
}

/// Stops the threads when dropped.
pub(super) struct StopOnDrop<'s>(pub(super) &'s Shared<'s>);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.lock().stop = true;
        self.0.changed.notify_all();
    }
}

impl<'r> Shared<'r> {
    pub(super) fn new(
        images: &'r [Image],
        channels: &'r [Arc<Channel>],
        totals: BlockTotals,
    ) -> Self {
        let unflushed = vec![0; images.len()];
        let state = Mutex::new(State { unflushed, totals, ..Default::default() });
        Self { images, channels, state, changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        devices::lock(&self.state)
    }

    fn wait<'s>(&self, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for<'s>(
        &self,
        state: MutexGuard<'s, State>,
        longest: Duration,
    ) -> MutexGuard<'s, State> {
        self.changed.wait_timeout(state, longest).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Whether waiting is in vain: another thread failed, or the migration is over.
    fn check(&self, state: &State) -> Result<(), LoadError> {
        if state.error.is_some() || self.channels.iter().any(|one| one.is_interrupted()) {
            return Err(WireError::Interrupted.into());
        }
        Ok(())
    }

    /// Records the first failure and wakes all threads.
    pub(super) fn fail(&self, error: LoadError) {
        let mut state = self.lock();
        state.error.get_or_insert(error);
        state.stop = true;
        self.changed.notify_all();
        drop(state);
        self.channels.iter().for_each(|channel| channel.trip());
    }

    /// The first failure.
    pub(super) fn error(&self) -> Option<LoadError> {
        self.lock().error.take()
    }

    /// A buffer that no writer uses. Waits for one.
    pub(super) fn free_buffer(&self) -> Result<AlignedBuffer, LoadError> {
        let mut state = self.lock();
        loop {
            self.check(&state)?;
            if let Some(buffer) = state.spare.pop() {
                return Ok(buffer);
            }
            if state.buffers < BUFFERS + self.channels.len() {
                state.buffers += 1;
                return Ok(AlignedBuffer::new(CHUNK));
            }
            // A write may hang.
            state = self.wait_for(state, TICK);
        }
    }

    /// Has a chunk written, and counts it.
    pub(super) fn write(&self, job: Job, zero_bytes: u64) {
        let mut state = self.lock();
        state.totals.frames += 1;
        if let Some(totals) = state.totals.disks.get_mut(usize::from(job.chunk.disk)) {
            totals.data_bytes += job.data_bytes as u64;
            totals.zero_bytes += zero_bytes;
        }
        state.busy += 1;
        state.jobs.push_back(job);
        self.changed.notify_all();
    }

    /// Channel `index` has come to `border`: waits until all have, and everything before it is on stable
    /// storage. The last one does the work: it reports to `has_come` at once, to `settled` when all is on
    /// stable storage, and asks `is_over` whether an end is the last one. Until a mark is answered, the first
    /// channel gets keep-alives.
    pub(super) fn cross(
        &self,
        index: usize,
        border: Border,
        has_come: &dyn Fn(&BlockTotals),
        settled: &dyn Fn(),
        is_over: &dyn Fn(&BlockTotals) -> bool,
    ) -> Result<Crossed, LoadError> {
        let mut state = self.lock();
        state.totals.frames += 1;
        let expected = *state.gate.border.get_or_insert(border);
        if expected != border {
            let found = format!("{border:?} on disk channel {index} and {expected:?} on another");
            let expected = "the same on all channels of the disks";
            return Err(WireError::Unexpected { found, expected }.into());
        }
        state.gate.waiting += 1;
        let crossings = state.gate.crossings;
        if state.gate.waiting < self.channels.len() {
            while state.gate.crossings == crossings {
                self.check(&state)?;
                state = self.wait_for(state, TICK);
            }
            let last = state.gate.last;
            return last.ok_or_else(|| WireError::Interrupted.into());
        }
        if border == Border::End {
            state.totals.ends += 1;
        }
        has_come(&state.totals);
        let (mut state, flush) = self.flush_all(state, border)?;
        // Each chunk may come once per pass.
        for image in self.images {
            let len_bytes = image.disk.node.len_bytes();
            image.seen.clear_within(ByteRange { offset_bytes: 0, len_bytes });
        }
        settled();
        let over = border == Border::End && is_over(&state.totals);
        let crossed = Crossed { flush, over };
        let crossings = crossings + 1;
        state.gate = Gate { crossings, last: Some(crossed), ..Default::default() };
        self.changed.notify_all();
        Ok(crossed)
    }

    /// Waits until everything is written and on stable storage. Returns how long flushing took after the
    /// last write. At a mark it sends a keep-alive every second meanwhile.
    fn flush_all<'s>(
        &'s self,
        mut state: MutexGuard<'s, State>,
        border: Border,
    ) -> Result<(MutexGuard<'s, State>, Duration), LoadError> {
        let (mut written, mut last_sent) = (None, Instant::now());
        loop {
            self.check(&state)?;
            if state.busy == 0 {
                let since = *written.get_or_insert_with(Instant::now);
                if !state.flushing && state.unflushed.iter().all(|bytes| *bytes == 0) {
                    state.flush_all = false;
                    return Ok((state, since.elapsed()));
                }
                state.flush_all = true;
                self.changed.notify_all();
            }
            let next = KEEP_ALIVE.saturating_sub(last_sent.elapsed());
            state = self.wait_for(state, next.min(TICK));
            if last_sent.elapsed() >= KEEP_ALIVE {
                last_sent = Instant::now();
                // Its own thread waits for this one.
                if let (Border::Mark(_), Some(first)) = (border, self.channels.first()) {
                    drop(state);
                    first.write_all(&Frame::Alive.encode(0))?;
                    state = self.lock();
                }
            }
        }
    }

    /// Body of a writing thread.
    pub(super) fn write_jobs(&self) {
        let mut unpacker = Unpacker::default();
        let mut state = self.lock();
        loop {
            let Some(job) = state.jobs.pop_front() else {
                if state.stop {
                    return;
                }
                state = self.wait(state);
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
            let image = self.images.get(index).ok_or_else(no_disk);
            match image.and_then(|image| image.write(&job, &mut unpacker)) {
                Err(error) => return self.fail(error),
                Ok(bytes) => {
                    state = self.lock();
                    state.busy -= 1;
                    state.spare.push(job.buffer);
                    if let Some(sum) = state.unflushed.get_mut(index) {
                        *sum += bytes;
                    }
                    self.changed.notify_all();
                }
            }
        }
    }

    /// Body of the flushing thread.
    pub(super) fn flush_jobs(&self) {
        let mut state = self.lock();
        loop {
            if state.stop {
                return;
            }
            let least = if state.flush_all { 1 } else { FLUSH_BYTES };
            let Some(index) = state.unflushed.iter().position(|bytes| *bytes >= least) else {
                state = self.wait(state);
                continue;
            };
            state.unflushed[index] = 0;
            state.flushing = true;
            drop(state);
            if let Some(Image { disk, .. }) = self.images.get(index)
                && let Err(source) = disk.node.sync()
            {
                let disk = disk.node.id().to_owned();
                return self.fail(LoadError::Flush { disk, source });
            }
            state = self.lock();
            state.flushing = false;
            self.changed.notify_all();
        }
    }
}

impl Image {
    /// Writes a chunk; returns the number of bytes written.
    fn write(&self, job: &Job, unpacker: &mut Unpacker) -> Result<u64, LoadError> {
        let Chunk { index, data, zero, packing, .. } = job.chunk;
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
        let mut payload: &[u8] = job.buffer.get(..job.payload_bytes).unwrap_or_default();
        if packing != Packing::None {
            let unpacked = unpacker.unpack(packing, payload, job.data_bytes);
            payload = unpacked.map_err(|error| error.of_chunk(node.id(), index))?;
        }
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
                node.fill_zeroes(offset_bytes, len_bytes, true).map_err(failed(range))?;
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
