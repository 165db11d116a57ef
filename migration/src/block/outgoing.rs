//! The disks at the source, as a participant: passes over the dirty chunks, which a few threads read
//! ([`super::readers`]) and this one sends.
//!
//! Called by the source's driver on the `mig-out` thread. The driver decides when to make a pass and when to
//! stop the guest for the last one.

use super::frame::{BlockSetup, BlockTotals, DiskSetup, DiskTotals, Frame, HEADER_BYTES};
use super::readers::{Filled, Readers};
use super::scan::{Scan, TrackedDisk};
use super::stats::DiskProgress;
use super::{SourceDisk, SourceDisks, Tuning};
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
use devices::block::backend::BackingChain;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A pass must send this much before its bandwidth counts as measured.
const MEASURABLE_BYTES: u64 = 4 << 20;

/// How often the bandwidth of a pass is shown while it runs.
const SHOWN_EVERY: Duration = Duration::from_millis(200);

/// Name of the disks' sections.
pub const SECTION: &str = "block";

/// Exists from the setup on.
struct Started {
    context: OutgoingContext,
    channel: Arc<Channel>,
    disks: Vec<TrackedDisk>,
    readers: Readers,
}

/// The disks at the source.
pub struct DisksOutgoing {
    leaving: Vec<SourceDisk>,
    tuning: Tuning,
    started: Option<Started>,
    totals: BlockTotals,
    passes: u64,
    /// Of the last pass that was long enough to measure.
    bytes_per_sec: Option<u64>,
    /// The destination's shortest flush at the end of a pass.
    flush: Option<Duration>,
}

impl DisksOutgoing {
    pub fn new(leaving: SourceDisks) -> Self {
        let count = leaving.disks.len();
        Self {
            leaving: leaving.disks,
            tuning: leaving.tuning.clamped(),
            started: None,
            totals: BlockTotals { ends: 0, frames: 0, disks: vec![DiskTotals::default(); count] },
            passes: 0,
            bytes_per_sec: None,
            flush: None,
        }
    }

    fn started(&self) -> Result<&Started, ParticipantError> {
        self.started.as_ref().ok_or_else(|| ParticipantError::not_set_up(SECTION))
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
        let Self { started, tuning, totals, .. } = self;
        let Started { disks, context, channel, readers } =
            started.as_mut().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        let mut throttle = context.cap.clone();
        let mut scan = Scan::new(disks);
        let (mut sent, began) = (0, Instant::now());
        let mut shown = began;
        loop {
            while readers.ahead() < tuning.reads + tuning.buffers
                && let Some(work) = scan.take()
            {
                readers.hand_out(work)?;
            }
            if readers.ahead() == 0 {
                return Ok(sent);
            }
            let filled = readers.next(&context.control)?;
            sent += send_one(&filled, channel, &context.counters, totals, &mut throttle)?;
            readers.reuse(filled);
            if shown.elapsed() >= SHOWN_EVERY {
                shown = Instant::now();
                let rate = policy::per_second(sent, began.elapsed());
                context.counters.update(|stats| {
                    stats.disk.get_or_insert_default().bytes_per_sec = rate;
                });
            }
        }
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
        let channel =
            context.channels.pop().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        let disks = self.leaving.iter().cloned().map(TrackedDisk::start);
        let disks = disks.collect::<Result<Vec<_>, _>>()?;
        let nodes = self.leaving.iter().map(|disk| disk.node.clone()).collect();
        let readers = Readers::new(nodes, self.tuning.reads);
        let Started { context, disks, .. } =
            self.started.insert(Started { context, channel, disks, readers });
        for disk in disks.iter() {
            disk.skip_unwritten(&|| !context.cancel.is_cancelled());
        }
        let progress = |disk: &TrackedDisk| {
            let total_bytes = disk.dirty.marked_bytes();
            let name = disk.disk.node.id().to_owned();
            let sent = DiskTotals::default();
            let node = &disk.disk.node;
            let below = node.backing().filter(|_| !disk.disk.only_top);
            let files = below.map_or_else(Vec::new, BackingChain::files);
            let files = std::iter::once(node.location()).chain(files).collect();
            DiskProgress { name, total_bytes, remaining_bytes: total_bytes, sent, files }
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

fn send_one(
    filled: &Filled,
    channel: &Channel,
    counters: &Counters,
    totals: &mut BlockTotals,
    throttle: &mut dyn Throttle,
) -> Result<u64, ParticipantError> {
    let impossible = || WireError::Unexpected {
        found: format!("{:?} longer than its buffer", filled.chunk),
        expected: "a chunk of a disk",
    };
    let bytes = filled.frame().ok_or_else(impossible)?;
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
