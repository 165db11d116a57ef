//! The disks at the source, as a participant: passes over the dirty chunks, which a few threads read
//! ([`super::readers`]) and this one, or a thread per channel, sends ([`super::senders`]).
//!
//! Called by the source's driver on the `mig-out` thread. The driver decides when to make a pass and when to
//! stop the guest for the last one.

use super::frame::{
    BlockSetup, BlockTotals, DiskData, DiskSetup, DiskTotals, Frame, HEADER_BYTES, bytes_of,
};
use super::holes::{self, SHOWN_EVERY};
use super::packing::Pays;
use super::readers::{Event, Filled, Readers};
use super::scan::{Scan, TrackedDisk};
use super::senders::Senders;
use super::{SourceDisk, SourceDisks, Tuning};
use crate::error::ParticipantError;
use crate::participant::{
    Budget, Cost, Outcome, Outgoing, OutgoingContext, Pass, Pending, Precision, Step,
};
use crate::policy;
use crate::stats::Counters;
use crate::units::saturating_u64;
use crate::wire::hello::{DISK_CHANNELS, DISK_DATA, DISK_PACKING, DISKS};
use crate::wire::section::Stage;
use crate::wire::{Hello, Role};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A pass must send this much before its bandwidth counts as measured.
const MEASURABLE_BYTES: u64 = 4 << 20;

/// Name of the disks' sections.
pub const SECTION: &str = "block";

/// Exists from the setup on.
struct Started {
    context: OutgoingContext,
    disks: Vec<TrackedDisk>,
    readers: Readers,
    senders: Senders,
}

/// What was sent in a pass.
#[derive(Debug, Clone, Copy, Default)]
struct Sent {
    /// Bytes on the wire.
    wire: u64,
    /// What they would have been without compression.
    unpacked: u64,
}

/// A pass that goes on.
struct InPass {
    began: Instant,
    scan: Scan,
    /// Chunks handed out and not yet sent.
    ahead: usize,
    /// What they hold.
    ahead_bytes: u64,
    sent: Sent,
}

impl InPass {
    fn begin() -> Self {
        Self {
            began: Instant::now(),
            scan: Scan::default(),
            ahead: 0,
            ahead_bytes: 0,
            sent: Sent::default(),
        }
    }

    /// Its bandwidth so far, if it was long enough to measure.
    fn measured(&self) -> Option<Measured> {
        let took = self.began.elapsed();
        (self.sent.unpacked >= MEASURABLE_BYTES).then(|| Measured {
            wire_per_sec: policy::per_second(self.sent.wire, took),
            unpacked_per_sec: policy::per_second(self.sent.unpacked, took),
        })
    }
}

/// Bandwidth of a pass: of the disks, which are often the slower part, and the link together.
#[derive(Debug, Clone, Copy)]
struct Measured {
    wire_per_sec: u64,
    /// Before compression.
    unpacked_per_sec: u64,
}

impl Measured {
    /// Expected under a cap; 0 for none.
    fn under(self, cap: u64) -> u64 {
        if cap == 0 || cap >= self.wire_per_sec {
            return self.unpacked_per_sec;
        }
        let capped = u128::from(self.unpacked_per_sec) * u128::from(cap);
        saturating_u64(capped / u128::from(self.wire_per_sec.max(1)))
    }
}

/// The disks at the source.
pub struct DisksOutgoing {
    leaving: Vec<SourceDisk>,
    tuning: Tuning,
    /// As many as RAM has.
    channels: u16,
    started: Option<Started>,
    totals: BlockTotals,
    /// Finished passes.
    passes: u64,
    pass: Option<InPass>,
    /// Of the last pass that was long enough to measure.
    measured: Option<Measured>,
    /// The destination's shortest flush at the end of a pass.
    flush: Option<Duration>,
}

impl DisksOutgoing {
    /// Disks to send on `channels` channels: as many as RAM has, if the destination can receive disks so.
    pub fn new(leaving: SourceDisks, channels: u16) -> Self {
        let count = leaving.disks.len();
        Self {
            leaving: leaving.disks,
            tuning: leaving.tuning.clamped(),
            channels,
            started: None,
            totals: BlockTotals { ends: 0, frames: 0, disks: vec![DiskTotals::default(); count] },
            passes: 0,
            pass: None,
            measured: None,
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

    /// Expected bandwidth of a pass, in bytes of the disks.
    fn rate(&self, context: &OutgoingContext) -> u64 {
        let measured = self.measured.or_else(|| self.pass.as_ref().and_then(InPass::measured));
        match measured {
            None => context.speed.bytes_per_sec(),
            Some(measured) => measured.under(context.params.get().max_bandwidth),
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

    /// Sends `frame` on every channel.
    fn tell_all(&mut self, frame: Frame) -> Result<(), ParticipantError> {
        let Some(Started { context, senders, .. }) = &mut self.started else {
            return Err(ParticipantError::not_set_up(SECTION));
        };
        let frames = senders.tell_all(frame)?;
        context.counters.update(|stats| {
            stats.disk.get_or_insert_default().transferred_bytes += frames * HEADER_BYTES as u64;
        });
        self.totals.frames += frames;
        Ok(())
    }

    /// Sends dirty chunks until the pass is over, or `time` is. Returns whether it is over.
    fn send_dirty(&mut self, pass: &mut InPass, time: Duration) -> Result<bool, ParticipantError> {
        let Self { started, tuning, totals, .. } = self;
        let Started { disks, context, readers, senders } =
            started.as_mut().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        let entered = Instant::now();
        loop {
            while pass.ahead < tuning.reads + tuning.buffers
                && let Some(work) = pass.scan.take(disks)
            {
                let len_bytes = disks.get(work.disk).map_or(0, |one| one.disk.node.len_bytes());
                pass.ahead_bytes += bytes_of(work.index, work.granules, len_bytes);
                readers.hand_out(work)?;
                pass.ahead += 1;
            }
            if pass.ahead == 0 {
                return Ok(true);
            }
            let done = match readers.next(&context.control)? {
                Event::Filled(filled) => senders.send(filled?)?,
                Event::Sent(chunk) => Some(chunk?),
            };
            if let Some(chunk) = done {
                pass.ahead -= 1;
                pass.ahead_bytes -= chunk.totals.data_bytes + chunk.totals.zero_bytes;
                count(&chunk, &context.counters, totals, &mut pass.sent);
                readers.reuse(chunk);
            }
            if entered.elapsed() >= time {
                return Ok(false);
            }
        }
    }

    /// Shows the bandwidth of a pass that goes on. In the first one it is all that is known of the link.
    fn show_rate(&self, pass: &InPass) -> Result<(), ParticipantError> {
        let rate = policy::per_second(pass.sent.wire, pass.began.elapsed());
        self.started()?.context.counters.update(|stats| {
            stats.disk.get_or_insert_default().bytes_per_sec = rate;
            if self.passes == 0 {
                stats.bytes_per_sec = rate;
            }
        });
        Ok(())
    }
}

impl Outgoing for DisksOutgoing {
    fn section(&self) -> &'static str {
        SECTION
    }

    fn capability(&self) -> Option<&'static str> {
        Some(DISKS)
    }

    fn options(&self) -> &'static [&'static str] {
        &[DISK_CHANNELS, DISK_PACKING, DISK_DATA]
    }

    fn roles(&self, agreed: &Hello) -> Vec<Role> {
        let channels = if agreed.has(DISK_CHANNELS) { self.channels } else { 1 };
        (0..channels).map(|index| Role::Disks { index }).collect()
    }

    /// Starts tracking; everything ever written is dirty.
    fn setup(&mut self, context: OutgoingContext) -> Result<(), ParticipantError> {
        let can_unpack = context.agreed.has(DISK_PACKING);
        if !can_unpack && context.params.get().method().is_some() {
            log::warn!("the destination cannot unpack disks: they are sent uncompressed");
        }
        let pays = Arc::new(Pays::new(can_unpack.then(|| context.params.clone())));
        let disks = self.leaving.iter().cloned().map(TrackedDisk::start);
        let disks = disks.collect::<Result<Vec<_>, _>>()?;
        let nodes = self.leaving.iter().map(|disk| disk.node.clone()).collect();
        let readers = Readers::new(nodes, self.tuning.reads, pays.clone());
        let channels = context.channels.clone();
        let senders = Senders::start(channels, &context.cap, pays, readers.events())?;
        let Started { context, disks, .. } =
            self.started.insert(Started { context, disks, readers, senders });
        holes::find(disks, &context.counters, SHOWN_EVERY, &|| !context.cancel.is_cancelled());
        let setup = self.announcement().encode()?;
        let Started { context, disks, .. } = self.started()?;
        context.send(SECTION, Stage::Setup, &setup)?;
        if context.agreed.has(DISK_DATA) {
            let data = DiskData(disks.iter().map(|disk| disk.dirty.marked_bytes()).collect());
            context.send(SECTION, Stage::Part, &data.encode()?)?;
        }
        Ok(())
    }

    /// Sends every dirty chunk once, and waits until the destination has them on stable storage.
    fn iterate(&mut self, _: u64, budget: Budget) -> Result<Step, ParticipantError> {
        let mut pass = self.pass.take().unwrap_or_else(InPass::begin);
        if !self.send_dirty(&mut pass, budget.time)? {
            self.show_rate(&pass)?;
            self.pass = Some(pass);
            return Ok(Step::More);
        }
        let sent = pass.sent;
        if sent.wire > 0 {
            self.passes += 1;
            self.tell_all(Frame::Mark(self.passes))?;
            let flush = self.started()?.senders.await_flushed(self.passes)?;
            self.flush = Some(self.flush.map_or(flush, |shortest| shortest.min(flush)));
        }
        let (passes, took) = (self.passes, pass.began.elapsed());
        log::debug!("disks: pass {passes}: {sent:?} in {took:?}, flush {:?}", self.flush);
        self.update_remaining()?;
        self.measured = pass.measured().or(self.measured);
        // For reports: 0 until a pass was long enough to measure.
        let measured = self.measured.map_or(0, |measured| measured.wire_per_sec);
        let context = &self.started()?.context;
        context.counters.update(|stats| {
            let disk = stats.disk.get_or_insert_default();
            (disk.passes, disk.bytes_per_sec) = (passes, measured);
        });
        let send_time = policy::send_time(sent.unpacked, self.rate(context));
        Ok(Step::Done(Pass { sent_bytes: sent.unpacked, send_time }))
    }

    fn pending(&mut self, _: Precision) -> Result<Pending, ParticipantError> {
        let Started { disks, context, .. } = self.started()?;
        // Taken from the bitmaps, and not sent yet.
        let ahead = self.pass.as_ref().map_or(0, |pass| pass.ahead_bytes);
        let left = disks.iter().map(|disk| disk.dirty.marked_bytes()).sum::<u64>() + ahead;
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
        self.send_dirty(&mut InPass::begin(), Duration::MAX)?;
        self.tell_all(Frame::End)?;
        self.totals.ends += 1;
        self.started()?.context.push(SECTION, Stage::End, &self.totals.encode()?)?;
        Ok(())
    }

    fn called_off(&mut self) -> Result<(), ParticipantError> {
        Ok(())
    }

    fn cleanup(&mut self, _: Outcome) {
        (self.started, self.pass) = (None, None);
    }
}

/// Adds a chunk that was sent to all counts.
fn count(chunk: &Filled, counters: &Counters, totals: &mut BlockTotals, sent: &mut Sent) {
    let wire = chunk.frame().map_or(0, <[u8]>::len) as u64;
    sent.wire += wire;
    sent.unpacked += HEADER_BYTES as u64 + chunk.totals.data_bytes;
    totals.frames += 1;
    let index = usize::from(chunk.chunk.disk);
    let add = |sum: &mut DiskTotals| {
        sum.data_bytes += chunk.totals.data_bytes;
        sum.zero_bytes += chunk.totals.zero_bytes;
    };
    totals.disks.get_mut(index).map(add);
    counters.update(|stats| {
        let disk = stats.disk.get_or_insert_default();
        disk.count_chunk(index, chunk.chunk.packing, wire, chunk.totals);
    });
}
