//! The "block" half of a source: passes over the dirty chunks, read by a few threads, sent in turn.
//!
//! Called by the source's driver on the `mig-out` thread; its readers live for one pass. It leaves to
//! the driver when a pass is made, and when the guest is stopped for the last one.

use super::frame::{
    BlockSetup, BlockTotals, Chunk, DiskSetup, DiskTotals, Frame, HEADER_BYTES, runs,
};
use super::scan::{Scan, TrackedDisk, Work};
use super::stats::DiskProgress;
use super::{CHUNK, CHUNK_BYTES, GRANULE, GRANULE_BYTES, ReadError, SourceDisks, Tuning, is_zero};
use crate::policy;
use crate::source::SourceError;
use crate::stats::Counters;
use crate::transport::{Channel, Throttle};
use crate::wire::WireError;
use devices::block::aligned::AlignedBuffer;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Where the payload starts in a buffer: aligned for direct I/O, with room for the header before it.
const PAYLOAD_AT: usize = 4096;
/// So few chunks are read and sent one after the other: a thread takes longer to start.
const FEW_CHUNKS: usize = 2;
/// A pass must move this much before its bandwidth says anything.
const MEASURABLE_BYTES: u64 = 4 << 20;

/// A chunk that has been read.
struct Filled {
    buffer: AlignedBuffer,
    payload_bytes: usize,
    chunk: Chunk,
    totals: DiskTotals,
}

/// The "block" half of a source.
pub struct DisksOutgoing {
    disks: Vec<TrackedDisk>,
    tuning: Tuning,
    channel: Arc<Channel>,
    counters: Arc<Counters>,
    /// Buffers of earlier chunks.
    spare: Mutex<Vec<AlignedBuffer>>,
    totals: BlockTotals,
    passes: u64,
    /// Of the last pass that was long enough to tell.
    bytes_per_sec: Option<u64>,
    /// The shortest that the destination took to flush a pass.
    flush: Option<Duration>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DisksOutgoing {
    /// Starts tracking; everything that was ever written is dirty.
    pub fn setup(
        leaving: SourceDisks,
        channel: Arc<Channel>,
        counters: Arc<Counters>,
    ) -> Result<Self, SourceError> {
        let mut disks = Vec::with_capacity(leaving.disks.len());
        for disk in leaving.disks {
            disks.extend(TrackedDisk::start(disk));
        }
        for disk in &disks {
            disk.skip_unwritten()?;
        }
        let progress = |disk: &TrackedDisk| {
            let total_bytes = disk.dirty.marked_bytes();
            let name = disk.disk.node.id().to_owned();
            let sent = DiskTotals::default();
            DiskProgress { name, total_bytes, remaining_bytes: total_bytes, sent }
        };
        let progress: Vec<_> = disks.iter().map(progress).collect();
        let totals = BlockTotals { frames: 0, disks: vec![DiskTotals::default(); disks.len()] };
        counters.update(|stats| stats.disk.get_or_insert_default().disks = progress);
        Ok(Self {
            disks,
            tuning: leaving.tuning.clamped(),
            channel,
            counters,
            spare: Mutex::default(),
            totals,
            passes: 0,
            bytes_per_sec: None,
            flush: None,
        })
    }

    /// What the destination is told about these disks.
    pub fn announcement(&self) -> BlockSetup {
        let disk = |tracked: &TrackedDisk| DiskSetup {
            name: tracked.disk.node.id().to_owned(),
            len_bytes: tracked.disk.node.len_bytes(),
            only_top: tracked.disk.only_top,
        };
        BlockSetup { disks: self.disks.iter().map(disk).collect() }
    }

    /// Bytes that are dirty now.
    pub fn pending_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.dirty.marked_bytes()).sum()
    }

    /// What the destination needs for its last flush, however little there is to flush.
    pub fn flush_time(&self) -> Duration {
        self.flush.unwrap_or_default()
    }

    /// How fast disks are read, sent, written and flushed, once that was measured.
    pub fn bytes_per_sec(&self) -> Option<u64> {
        self.bytes_per_sec
    }

    /// Sends every chunk that is dirty, once, while the guest runs, and waits until the destination has
    /// it on stable storage. Returns the bytes sent.
    pub fn iterate(&mut self, throttle: &mut dyn Throttle) -> Result<u64, SourceError> {
        let began = Instant::now();
        let sent = self.send_dirty(throttle)?;
        if sent > 0 {
            self.passes += 1;
            self.send_header(Frame::Mark(self.passes), throttle)?;
            let flush = self.await_settled(self.passes)?;
            self.flush = Some(self.flush.map_or(flush, |shortest| shortest.min(flush)));
        }
        let (passes, rate) = (self.passes, policy::per_second(sent, began.elapsed()));
        log::debug!(
            "disks: pass {passes}: {sent} bytes, {rate} per second, flush {:?}",
            self.flush
        );
        self.tell_remaining();
        if sent >= MEASURABLE_BYTES {
            self.bytes_per_sec = Some(rate);
        }
        let rate = self.bytes_per_sec.unwrap_or(0);
        self.counters.update(|stats| {
            let disk = stats.disk.get_or_insert_default();
            (disk.passes, disk.bytes_per_sec) = (passes, rate);
        });
        Ok(sent)
    }

    /// Sends the rest, while the guest is stopped, and the end. Bits are taken as in every pass: if the
    /// migration fails now, the next one begins with everything dirty.
    pub fn complete(&mut self, throttle: &mut dyn Throttle) -> Result<(), SourceError> {
        for disk in &self.disks {
            disk.disk.node.drain();
        }
        self.send_dirty(throttle)?;
        self.send_header(Frame::End, throttle)?;
        self.tell_remaining();
        Ok(())
    }

    /// What was sent.
    pub fn totals(&self) -> &BlockTotals {
        &self.totals
    }

    fn tell_remaining(&self) {
        let remaining: Vec<_> = self.disks.iter().map(|disk| disk.dirty.marked_bytes()).collect();
        self.counters.update(|stats| {
            let disks = &mut stats.disk.get_or_insert_default().disks;
            disks.iter_mut().zip(remaining).for_each(|(disk, left)| disk.remaining_bytes = left);
        });
    }

    fn send_header(
        &mut self,
        frame: Frame,
        throttle: &mut dyn Throttle,
    ) -> Result<(), SourceError> {
        self.channel.write_pages(&frame.encode(0), &[], throttle)?;
        self.totals.frames += 1;
        self.counters.update(|stats| {
            stats.disk.get_or_insert_default().transferred_bytes += HEADER_BYTES as u64;
        });
        Ok(())
    }

    /// Waits for the echo of mark `number`; returns how long flushing took.
    fn await_settled(&self, number: u64) -> Result<Duration, SourceError> {
        loop {
            let mut header = [0; HEADER_BYTES];
            self.channel.read_exact(&mut header)?;
            match Frame::decode(&header)?.0 {
                Frame::Alive => {}
                Frame::Settled(settled, flush) if settled == number => return Ok(flush),
                other => {
                    let (found, expected) = (format!("{other:?}"), "the echo of a disks' mark");
                    return Err(WireError::Unexpected { found, expected }.into());
                }
            }
        }
    }

    /// Sends what is dirty; returns the bytes sent.
    fn send_dirty(&mut self, throttle: &mut dyn Throttle) -> Result<u64, SourceError> {
        let Self { disks, tuning, channel, counters, spare, totals, .. } = self;
        let (disks, spare): (&[TrackedDisk], &Mutex<_>) = (disks, spare);
        let mut scan = Scan::new(disks);
        let mut sent = 0;
        let mut send = |filled: Filled| -> Result<(), SourceError> {
            sent += send_one(&filled, channel, counters, totals, throttle)?;
            lock(spare).push(filled.buffer);
            Ok(())
        };
        let chunks = scan.count(FEW_CHUNKS.max(tuning.reads) + 1);
        if chunks <= FEW_CHUNKS {
            while let Some(work) = scan.take() {
                send(read(disks, work, spare)?)?;
            }
            return Ok(sent);
        }
        let scan = Mutex::new(scan);
        let take = || lock(&scan).take();
        std::thread::scope(|scope| {
            // Dropping the receiving end, on any way out, ends the readers.
            let (to_send, filled) = sync_channel(tuning.buffers);
            for number in 0..tuning.reads.min(chunks) {
                let (to_send, take) = (to_send.clone(), &take);
                std::thread::Builder::new()
                    .name(format!("mig-read-{number}"))
                    .stack_size(128 << 10)
                    .spawn_scoped(scope, move || {
                        while let Some(work) = take() {
                            let filled = read(disks, work, spare);
                            let failed = filled.is_err();
                            if to_send.send(filled).is_err() || failed {
                                return;
                            }
                        }
                    })
                    .map_err(SourceError::Thread)?;
            }
            drop(to_send);
            filled.into_iter().try_for_each(|filled| send(filled?))
        })?;
        Ok(sent)
    }
}

/// Reads a chunk's granules side by side, and takes those out that are zero.
fn read(
    disks: &[TrackedDisk],
    work: Work,
    spare: &Mutex<Vec<AlignedBuffer>>,
) -> Result<Filled, SourceError> {
    let spare = lock(spare).pop();
    let mut buffer = spare.unwrap_or_else(|| AlignedBuffer::new(PAYLOAD_AT + CHUNK));
    let (head, payload) = buffer.split_at_mut(PAYLOAD_AT);
    // `work` comes from a scan over these disks.
    let Some(TrackedDisk { disk, .. }) = disks.get(work.disk) else {
        let found = format!("disk number {}", work.disk);
        return Err(WireError::Unexpected { found, expected: "a disk that travels" }.into());
    };
    let len_bytes = disk.node.len_bytes();
    let (mut read, mut kept) = (0, 0);
    let (mut data, mut totals) = (0u64, DiskTotals::default());
    for (first, count) in runs(work.granules) {
        let offset = work.index * CHUNK_BYTES + u64::from(first) * GRANULE_BYTES;
        let wanted = (u64::from(count) * GRANULE_BYTES).min(len_bytes - offset);
        let len = usize::try_from(wanted).unwrap_or(0);
        let (_, room) = payload.split_at_mut(read);
        let room = room.get_mut(..len).unwrap_or_default();
        disk.node.copy_at(room, offset).map_err(|source| ReadError {
            disk: disk.node.id().to_owned(),
            offset_bytes: offset,
            len_bytes: wanted,
            source,
        })?;
        // What is not zero moves up to where zeroes were; most chunks have none, and nothing moves.
        let mut at = 0;
        for granule in first..first + count {
            let size = GRANULE.min(len - at);
            let start = read + at;
            if is_zero(payload.get(start..start + size).unwrap_or_default()) {
                totals.zero_bytes += size as u64;
            } else {
                if kept != start {
                    payload.copy_within(start..start + size, kept);
                }
                kept += size;
                data |= 1 << granule;
                totals.data_bytes += size as u64;
            }
            at += size;
        }
        read += len;
    }
    let number = u16::try_from(work.disk).unwrap_or(u16::MAX);
    let chunk = Chunk { disk: number, index: work.index, data, zero: work.granules & !data };
    let header = Frame::Chunk(chunk).encode(u32::try_from(kept).unwrap_or(u32::MAX));
    if let Some(place) = head.last_chunk_mut::<HEADER_BYTES>() {
        *place = header;
    }
    Ok(Filled { buffer, payload_bytes: kept, chunk, totals })
}

fn send_one(
    filled: &Filled,
    channel: &Channel,
    counters: &Counters,
    totals: &mut BlockTotals,
    throttle: &mut dyn Throttle,
) -> Result<u64, SourceError> {
    let frame = PAYLOAD_AT - HEADER_BYTES..PAYLOAD_AT + filled.payload_bytes;
    let bytes = filled.buffer.get(frame).unwrap_or_default();
    channel.write_pages(bytes, &[], throttle)?;
    totals.frames += 1;
    let index = usize::from(filled.chunk.disk);
    let add = |sum: &mut DiskTotals| {
        sum.data_bytes += filled.totals.data_bytes;
        sum.zero_bytes += filled.totals.zero_bytes;
    };
    totals.disks.get_mut(index).map(add);
    counters.update(|stats| {
        let disk = stats.disk.get_or_insert_default();
        disk.transferred_bytes += bytes.len() as u64;
        if let Some(disk) = disk.disks.get_mut(index) {
            add(&mut disk.sent);
            let sent = filled.totals.data_bytes + filled.totals.zero_bytes;
            disk.remaining_bytes = disk.remaining_bytes.saturating_sub(sent);
        }
    });
    Ok(bytes.len() as u64)
}
