//! The disks at the source, as a participant: passes over the dirty chunks, read by a few threads and
//! sent in order.
//!
//! Called by the source's driver on the `mig-out` thread; the reader threads live for one pass. The
//! driver decides when to make a pass and when to stop the guest for the last one.

use super::frame::{
    BlockSetup, BlockTotals, Chunk, DiskSetup, DiskTotals, Frame, HEADER_BYTES, runs,
};
use super::scan::{Scan, TrackedDisk, Work};
use super::stats::DiskProgress;
use super::{
    BlockError, CHUNK, CHUNK_BYTES, GRANULE, GRANULE_BYTES, ReadError, SourceDisk, SourceDisks,
    Tuning,
};
use crate::bytes::is_zero;
use crate::error::ParticipantError;
use crate::participant::{
    Budget, Cost, Outcome, Outgoing, OutgoingContext, Pass, Pending, Precision, Step,
};
use crate::policy;
use crate::stats::Counters;
use crate::transport::{Channel, Throttle};
use crate::wire::hello::DISKS;
use crate::wire::section::Stage;
use crate::wire::{Role, WireError};
use devices::block::aligned::AlignedBuffer;
use std::io;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Where the payload starts in a buffer: aligned for direct I/O, with room for the header before it.
const PAYLOAD_AT: usize = 4096;
/// Up to this many chunks are read and sent on the calling thread: spawning threads would take longer.
const INLINE_CHUNKS: usize = 2;
/// A pass must send this much before its bandwidth counts as measured.
const MEASURABLE_BYTES: u64 = 4 << 20;

/// A chunk that has been read.
struct Filled {
    buffer: AlignedBuffer,
    payload_bytes: usize,
    chunk: Chunk,
    totals: DiskTotals,
}

/// Name of the disks' sections.
pub const SECTION: &str = "block";

/// Exists from the setup on.
struct Started {
    context: OutgoingContext,
    channel: Arc<Channel>,
    disks: Vec<TrackedDisk>,
}

/// The disks at the source.
pub struct DisksOutgoing {
    leaving: Vec<SourceDisk>,
    tuning: Tuning,
    started: Option<Started>,
    /// Buffers to reuse.
    spare: Mutex<Vec<AlignedBuffer>>,
    totals: BlockTotals,
    passes: u64,
    /// Of the last pass that was long enough to measure.
    bytes_per_sec: Option<u64>,
    /// The destination's shortest flush at the end of a pass.
    flush: Option<Duration>,
}

fn not_set_up() -> ParticipantError {
    let (found, expected) = ("disks".to_owned(), "a participant that was set up");
    WireError::Unexpected { found, expected }.into()
}

impl DisksOutgoing {
    pub fn new(leaving: SourceDisks) -> Self {
        let count = leaving.disks.len();
        Self {
            leaving: leaving.disks,
            tuning: leaving.tuning.clamped(),
            started: None,
            spare: Mutex::default(),
            totals: BlockTotals { ends: 0, frames: 0, disks: vec![DiskTotals::default(); count] },
            passes: 0,
            bytes_per_sec: None,
            flush: None,
        }
    }

    fn started(&self) -> Result<&Started, ParticipantError> {
        self.started.as_ref().ok_or_else(not_set_up)
    }

    /// The announcement to the destination.
    fn announcement(&self) -> BlockSetup {
        let disk = |disk: &SourceDisk| DiskSetup {
            name: disk.node.id().to_owned(),
            len_bytes: disk.node.len_bytes(),
            only_top: disk.only_top,
        };
        BlockSetup { disks: self.leaving.iter().map(disk).collect() }
    }

    /// Expected bandwidth of a pass. A measured pass covers both the disk, which is often the slower one,
    /// and the link.
    fn rate(&self, context: &OutgoingContext) -> u64 {
        match (self.bytes_per_sec, context.params.get().max_bandwidth) {
            (None, _) => context.speed.bytes_per_sec(),
            (Some(rate), 0) => rate,
            (Some(rate), cap) => rate.min(cap),
        }
    }

    fn update_remaining(&self) -> Result<(), ParticipantError> {
        let Started { disks, context, .. } = self.started()?;
        let remaining: Vec<_> = disks.iter().map(|disk| disk.dirty.marked_bytes()).collect();
        context.counters.update(|stats| {
            let disks = &mut stats.disk.get_or_insert_default().disks;
            disks.iter_mut().zip(remaining).for_each(|(disk, left)| disk.remaining_bytes = left);
        });
        Ok(())
    }

    fn send_header(&mut self, frame: Frame) -> Result<(), ParticipantError> {
        let Started { context, channel, .. } = self.started()?;
        channel.write_pages(&frame.encode(0), &[], &mut context.cap.clone())?;
        context.counters.update(|stats| {
            stats.disk.get_or_insert_default().transferred_bytes += HEADER_BYTES as u64;
        });
        self.totals.frames += 1;
        Ok(())
    }

    /// Waits for the answer to mark `number`; returns how long flushing took.
    fn await_flushed(&self, number: u64) -> Result<Duration, ParticipantError> {
        loop {
            let mut header = [0; HEADER_BYTES];
            self.started()?.channel.read_while_alive(&mut header)?;
            match Frame::decode(&header)?.0 {
                Frame::Alive => {}
                Frame::Flushed(flushed, flush) if flushed == number => return Ok(flush),
                other => {
                    let (found, expected) =
                        (format!("{other:?}"), "the answer to a mark of the disks");
                    return Err(WireError::Unexpected { found, expected }.into());
                }
            }
        }
    }

    /// Sends all dirty chunks; returns the bytes sent.
    fn send_dirty(&mut self) -> Result<u64, ParticipantError> {
        let Self { started, tuning, spare, totals, .. } = self;
        let Started { disks, context, channel } = started.as_ref().ok_or_else(not_set_up)?;
        let (disks, spare): (&[TrackedDisk], &Mutex<_>) = (disks, spare);
        let mut throttle = context.cap.clone();
        let mut scan = Scan::new(disks);
        let mut sent = 0;
        let mut send = |filled: Filled| -> Result<(), ParticipantError> {
            sent += send_one(&filled, channel, &context.counters, totals, &mut throttle)?;
            devices::lock(spare).push(filled.buffer);
            Ok(())
        };
        let chunks = scan.count(INLINE_CHUNKS.max(tuning.reads) + 1);
        if chunks <= INLINE_CHUNKS {
            while let Some(work) = scan.take() {
                send(read(disks, work, spare)?)?;
            }
            return Ok(sent);
        }
        let scan = Mutex::new(scan);
        let take = || devices::lock(&scan).take();
        std::thread::scope(|scope| {
            // Dropping the receiving end, on every exit, ends the readers.
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
                    .map_err(ParticipantError::Thread)?;
            }
            drop(to_send);
            filled.into_iter().try_for_each(|filled| send(filled?))
        })?;
        Ok(sent)
    }
}

impl Outgoing for DisksOutgoing {
    fn section(&self) -> &'static str {
        SECTION
    }

    fn capability(&self) -> Option<&'static str> {
        Some(DISKS)
    }

    fn roles(&self) -> Vec<Role> {
        vec![Role::Disks]
    }

    /// Starts tracking; everything ever written is dirty.
    fn setup(&mut self, mut context: OutgoingContext) -> Result<(), ParticipantError> {
        let channel = context.channels.pop().ok_or_else(not_set_up)?;
        let disks = self.leaving.iter().cloned().map(TrackedDisk::start);
        let disks = disks.collect::<Result<Vec<_>, _>>()?;
        let Started { context, disks, .. } =
            self.started.insert(Started { context, channel, disks });
        for disk in disks.iter() {
            disk.skip_unwritten(&|| !context.cancel.is_cancelled())?;
        }
        let progress = |disk: &TrackedDisk| {
            let total_bytes = disk.dirty.marked_bytes();
            let name = disk.disk.node.id().to_owned();
            let sent = DiskTotals::default();
            DiskProgress { name, total_bytes, remaining_bytes: total_bytes, sent }
        };
        let progress: Vec<_> = disks.iter().map(progress).collect();
        context.counters.update(|stats| stats.disk.get_or_insert_default().disks = progress);
        let setup = self.announcement().encode()?;
        self.started()?.context.send(SECTION, Stage::Setup, &setup)?;
        Ok(())
    }

    /// Sends every dirty chunk once, and waits until the destination has them on stable storage.
    fn iterate(&mut self, _: u64, _: Budget) -> Result<Step, ParticipantError> {
        let began = Instant::now();
        let sent = self.send_dirty()?;
        if sent > 0 {
            self.passes += 1;
            self.send_header(Frame::Mark(self.passes))?;
            let flush = self.await_flushed(self.passes)?;
            self.flush = Some(self.flush.map_or(flush, |shortest| shortest.min(flush)));
        }
        let (passes, rate) = (self.passes, policy::per_second(sent, began.elapsed()));
        log::debug!(
            "disks: pass {passes}: {sent} bytes, {rate} per second, flush {:?}",
            self.flush
        );
        self.update_remaining()?;
        if sent >= MEASURABLE_BYTES {
            self.bytes_per_sec = Some(rate);
        }
        // For reports: 0 until a pass was long enough to measure.
        let measured = self.bytes_per_sec.unwrap_or(0);
        let context = &self.started()?.context;
        context.counters.update(|stats| {
            let disk = stats.disk.get_or_insert_default();
            (disk.passes, disk.bytes_per_sec) = (passes, measured);
        });
        let send_time = policy::send_time(sent, self.rate(context));
        Ok(Step::Done(Pass { sent_bytes: sent, send_time }))
    }

    fn pending(&mut self, _: Precision) -> Result<Pending, ParticipantError> {
        let Started { disks, context, .. } = self.started()?;
        let left = disks.iter().map(|disk| disk.dirty.marked_bytes()).sum();
        let send_time = policy::send_time(left, self.rate(context));
        // Nothing to write means nothing to flush. Before the first pass no flush has been measured.
        let measured = self.flush.filter(|_| left > 0);
        let flush = measured.unwrap_or(Duration::ZERO);
        let cost = |part, time| Cost { part, time, fixed: false };
        Ok(Pending {
            must_precopy_bytes: left,
            send_time,
            costs: vec![
                cost("sending disks", send_time),
                cost("flushing disks at the destination", flush),
            ],
            rates: None,
        })
    }

    fn rate_has_changed(&mut self) {}

    /// Clears bits as in every pass: if the migration fails now, the next one starts with everything
    /// dirty; if the stop is called off, later writes are marked.
    fn complete(&mut self) -> Result<(), ParticipantError> {
        // The guest's requests have ended: its stop has waited for them.
        self.send_dirty()?;
        self.send_header(Frame::End)?;
        self.totals.ends += 1;
        self.started()?.context.push(SECTION, Stage::End, &self.totals.encode()?)?;
        Ok(())
    }

    fn called_off(&mut self) -> Result<(), ParticipantError> {
        Ok(())
    }

    fn cleanup(&mut self, _: Outcome) {
        self.started = None;
    }
}

/// Reads a chunk's granules into one buffer and drops the zero ones.
fn read(
    disks: &[TrackedDisk],
    work: Work,
    spare: &Mutex<Vec<AlignedBuffer>>,
) -> Result<Filled, ParticipantError> {
    let spare = devices::lock(spare).pop();
    let mut buffer = spare.unwrap_or_else(|| AlignedBuffer::new(PAYLOAD_AT + CHUNK));
    let (head, payload) = buffer.split_at_mut(PAYLOAD_AT);
    // `work` comes from a scan over these disks.
    let Some(TrackedDisk { disk, .. }) = disks.get(work.disk) else {
        let found = format!("disk number {}", work.disk);
        return Err(WireError::Unexpected { found, expected: "an announced disk" }.into());
    };
    let len_bytes = disk.node.len_bytes();
    let (mut read, mut kept) = (0, 0);
    let (mut data, mut totals) = (0u64, DiskTotals::default());
    for (first, count) in runs(work.granules) {
        let offset = work.index * CHUNK_BYTES + u64::from(first) * GRANULE_BYTES;
        let wanted = (u64::from(count) * GRANULE_BYTES).min(len_bytes - offset);
        let failed = |source| {
            BlockError::Read(ReadError {
                disk: disk.node.id().to_owned(),
                offset_bytes: offset,
                len_bytes: wanted,
                source,
            })
        };
        let too_long = || failed(io::ErrorKind::InvalidInput.into());
        let len = usize::try_from(wanted).map_err(|_| too_long())?;
        let (_, room) = payload.split_at_mut(read);
        let room = room.get_mut(..len).ok_or_else(too_long)?;
        disk.node.copy_at(room, offset).map_err(failed)?;
        // Data moves up over zero granules. Most chunks have none, and nothing moves.
        let mut at = 0;
        for granule in first..first + count {
            let size = GRANULE.min(len - at);
            let start = read + at;
            if is_zero(payload.get(start..start + size).ok_or_else(too_long)?) {
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
    let impossible = |found: String| WireError::Unexpected { found, expected: "a chunk's header" };
    let number = u16::try_from(work.disk).map_err(|_| impossible(format!("disk {}", work.disk)))?;
    let chunk = Chunk { disk: number, index: work.index, data, zero: work.granules & !data };
    let kept_bytes = u32::try_from(kept).map_err(|_| impossible(format!("{kept} bytes")))?;
    let place = head.last_chunk_mut::<HEADER_BYTES>();
    *place.ok_or_else(|| impossible("no room".into()))? = Frame::Chunk(chunk).encode(kept_bytes);
    Ok(Filled { buffer, payload_bytes: kept, chunk, totals })
}

fn send_one(
    filled: &Filled,
    channel: &Channel,
    counters: &Counters,
    totals: &mut BlockTotals,
    throttle: &mut dyn Throttle,
) -> Result<u64, ParticipantError> {
    let frame = PAYLOAD_AT - HEADER_BYTES..PAYLOAD_AT + filled.payload_bytes;
    let impossible = || WireError::Unexpected {
        found: format!("{} bytes", filled.payload_bytes),
        expected: "a chunk of a disk",
    };
    let bytes = filled.buffer.get(frame).ok_or_else(impossible)?;
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
