//! RAM at the source, as a participant: passes over the dirty pages, distributed over the shards. Called
//! by the source's driver on the `mig-out` thread. Encoding and sending are `shard`'s business, estimates
//! [`Pace`]'s.

use super::dirty::PageBitmap;
use super::pace::Pace;
use super::populated::Populated;
use super::shard::{Common, Job, Shard, Tally};
use super::shards::Shards;
use crate::control::Limit;
use crate::error::ParticipantError;
use crate::guest::DirtySource;
use crate::participant::{
    Budget, Outcome, Outgoing, OutgoingContext, Pass, Pending, Precision, Step,
};
use crate::wire::section::{RamEnd, RamSetup, Stage};
use crate::wire::{Hello, Role, WireError};
use devices::ram::{GuestRam, PAGE_SIZE, PageIndex, RamLayout};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Dirty pages cleared in the log by one call: 16 MiB per channel. A compromise between few calls and a
/// short time from clear to copy: a page written in between is sent twice.
const CLEAR_PAGES: u64 = 4096;
/// Most words of the bitmap that one clear spans.
const CLEAR_WORDS: usize = 4096;
/// How long a live destination may take to answer a mark, as a multiple of its patience: a minute. The
/// time for data still in flight is added.
const MARK_PATIENCE: u32 = 6;

/// Name of RAM's sections.
pub const SECTION: &str = "ram";

/// A source's RAM.
pub struct SourceRam {
    pub ram: GuestRam,
    /// Maps page indices to guest addresses.
    pub layout: RamLayout,
    pub dirty: Box<dyn DirtySource>,
}

/// Exists from the setup on.
struct Started {
    context: OutgoingContext,
    shards: Shards,
    pace: Pace,
}

/// A pass in progress.
struct InPass {
    began: Instant,
    sent_bytes: u64,
    /// Next word of the bitmap.
    cursor: usize,
}

/// RAM at the source.
pub struct RamOutgoing {
    ram: SourceRam,
    channels: u16,
    started: Option<Started>,
    pending: PageBitmap,
    /// Pages sent so far, in any form.
    pages: Arc<AtomicU64>,
    /// In the first pass: finds pages that were never touched.
    populated: Option<Populated>,
    pass: Option<InPass>,
    /// Ends sent. More than one if a stop was called off.
    ends: u32,
}

impl RamOutgoing {
    /// RAM to send on `channels` data channels.
    pub fn new(ram: SourceRam, channels: u16) -> Self {
        let pending = PageBitmap::new(ram.layout.page_count());
        Self {
            ram,
            channels,
            started: None,
            pending,
            pages: Arc::default(),
            populated: None,
            pass: None,
            ends: 0,
        }
    }

    fn pending_bytes(&self) -> u64 {
        self.pending.count() * PAGE_SIZE
    }

    fn shard_count(&self) -> usize {
        self.channels.into()
    }

    /// Merges the dirty log into the pending pages; returns how long that took.
    fn harvest(&mut self) -> Result<Duration, ParticipantError> {
        let began = Instant::now();
        self.ram.dirty.drain_into(self.pending.words_mut())?;
        Ok(began.elapsed())
    }

    fn begin_pass(&mut self, first: bool) -> Result<(), ParticipantError> {
        let Started { pace, .. } =
            self.started.as_mut().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        pace.begin_pass(&self.pending, first, self.pages.load(Ordering::Relaxed));
        let sent_bytes = self.pending_bytes();
        self.pass = Some(InPass { began: Instant::now(), sent_bytes, cursor: 0 });
        Ok(())
    }

    /// All pages of the pass were sent: waits until they are in place, then reads the dirty log.
    fn end_pass(&mut self, number: u64, pass: &InPass) -> Result<Step, ParticipantError> {
        self.populated = None;
        let started = self.started.as_mut().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        started.shards.mark(number)?;
        let marked = Instant::now();
        started.await_marks(number, self.channels)?;
        started.context.speed.round_trip_took(marked.elapsed());
        started.pace.end_sample(self.pages.load(Ordering::Relaxed));
        // The last harvest before the driver decides.
        let took = self.harvest()?;
        let Some(Started { pace, .. }) = &mut self.started else {
            return Err(ParticipantError::not_set_up(SECTION));
        };
        pace.end_pass(&self.pending, took, pass.began.elapsed());
        let send_time = pace.send_time(pass.sent_bytes);
        Ok(Step::Done(Pass { sent_bytes: pass.sent_bytes, send_time }))
    }

    /// The next words, from `start` on, to clear in one call.
    fn next_chunk(&self, start: usize) -> Option<Range<usize>> {
        let words = self.pending.words();
        let first = start + words.get(start..)?.iter().position(|word| *word != 0)?;
        let most = CLEAR_PAGES * self.shard_count() as u64;
        let mut pages = 0;
        let mut end = first;
        while end < words.len() && end - first < CLEAR_WORDS && pages < most {
            pages += u64::from(words[end].count_ones());
            end += 1;
        }
        Some(first..end)
    }

    /// Turns the pending pages of `chunk` into a job.
    fn take(&mut self, chunk: Range<usize>) -> Job {
        let first_word = chunk.start;
        let words = &mut self.pending.words_mut()[chunk];
        let dirty = words.to_vec();
        words.fill(0);
        Job { first_word, dirty, touched: None, last: false }
    }

    /// Clears the log for the pending pages of `chunk`, then looks up which were ever touched.
    fn clear(&mut self, chunk: Range<usize>) -> Result<Job, ParticipantError> {
        let first = PageIndex(chunk.start as u64 * 64);
        let mut job = self.take(chunk);
        self.ram.dirty.clear(first, &job.dirty)?;
        // After the clear: a page first touched now is in the log again.
        if let Some(populated) = &mut self.populated {
            let mut touched = job.dirty.clone();
            populated.keep_touched(&self.ram.ram, &self.ram.layout, first, &mut touched);
            job.touched = Some(touched);
        }
        Ok(job)
    }
}

impl Started {
    /// Waits until mark `number` has been answered on every channel.
    fn await_marks(&self, number: u64, channels: u16) -> Result<(), ParticipantError> {
        let longest = self.context.control.patience() * MARK_PATIENCE + self.pace.time_in_flight();
        let mut missing: BTreeSet<u16> = (0..channels).collect();
        while !missing.is_empty() {
            let what = "the destination's answer to the marks of this round";
            let (echoed, channel) =
                self.context.control.next_mark(&Limit::within(what, longest))?;
            if echoed != number || !missing.remove(&channel) {
                let found = format!("mark {echoed} of channel {channel}");
                return Err(
                    WireError::Unexpected { found, expected: "the answer to a mark" }.into()
                );
            }
        }
        Ok(())
    }
}

impl Outgoing for RamOutgoing {
    fn section(&self) -> &'static str {
        SECTION
    }

    fn capability(&self) -> Option<&'static str> {
        None
    }

    fn options(&self) -> &'static [&'static str] {
        &[]
    }

    fn roles(&self, _: &Hello) -> Vec<Role> {
        (0..self.channels).map(|index| Role::Data { index }).collect()
    }

    fn setup(&mut self, context: OutgoingContext) -> Result<(), ParticipantError> {
        let common = Common {
            ram: self.ram.ram.clone(),
            layout: self.ram.layout.clone(),
            params: context.params.clone(),
            counters: context.counters.clone(),
            pages: self.pages.clone(),
            shards: self.channels,
        };
        let all = context.channels.iter().map(|channel| {
            Shard::new(common.clone(), channel.clone(), Box::new(context.cap.clone()))
        });
        let shards = Shards::start(all.collect(), &context.control)?;
        let pace = Pace::new(context.params.clone(), context.cap.clone(), context.speed.clone());
        let setup = RamSetup {
            page_count: self.ram.layout.page_count(),
            page_bytes: 4096,
            data_channels: self.channels,
        };
        self.pending.set_all();
        self.populated = Some(Populated::open());
        let total = self.pending_bytes();
        let multifd = context.params.get().multifd;
        context.counters.update(|stats| {
            stats.multifd = multifd;
            stats.total_bytes = total;
            stats.remaining_bytes = total;
        });
        let started = self.started.insert(Started { context, shards, pace });
        self.ram.dirty.start()?;
        started.context.send(SECTION, Stage::Setup, &setup.encode())?;
        Ok(())
    }

    fn iterate(&mut self, number: u64, budget: Budget) -> Result<Step, ParticipantError> {
        if self.pass.is_none() {
            self.begin_pass(number == 1)?;
        }
        let Some(mut pass) = self.pass.take() else {
            return Err(ParticipantError::not_set_up(SECTION));
        };
        while let Some(chunk) = self.next_chunk(pass.cursor) {
            pass.cursor = chunk.end;
            let job = self.clear(chunk)?;
            let started =
                self.started.as_mut().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
            started.shards.dispatch(job)?;
            if started.pace.look_is_due(budget.time) {
                let took = self.harvest()?;
                let Some(Started { pace, context, .. }) = &mut self.started else {
                    return Err(ParticipantError::not_set_up(SECTION));
                };
                pace.look(&self.pending, pass.cursor, took);
                pace.end_sample(self.pages.load(Ordering::Relaxed));
                let left = pace.left_bytes();
                context.counters.update(|stats| stats.remaining_bytes = left);
                self.pass = Some(pass);
                return Ok(Step::More);
            }
        }
        self.end_pass(number, &pass)
    }

    fn pending(&mut self, precision: Precision) -> Result<Pending, ParticipantError> {
        if precision == Precision::Exact {
            self.harvest()?;
        }
        let bytes = self.pending_bytes();
        let Started { pace, .. } =
            self.started.as_ref().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        Ok(pace.pending(bytes, self.pass.is_some()))
    }

    fn rate_has_changed(&mut self) {
        if let Some(Started { pace, .. }) = &mut self.started {
            pace.rate_has_changed();
        }
    }

    /// Does not clear the log: if the stop is called off, the harvested pages are still in it, and later
    /// writes join them.
    fn complete(&mut self) -> Result<(), ParticipantError> {
        self.harvest()?;
        let pending = self.pending_bytes();
        let job = self.take(0..self.pending.words().len());
        let Started { shards, context, .. } =
            self.started.as_mut().ok_or_else(|| ParticipantError::not_set_up(SECTION))?;
        context.counters.update(|stats| stats.remaining_bytes = pending);
        shards.dispatch(Job { last: true, ..job })?;
        let tallies = shards.end()?;
        self.ends += 1;
        let end = RamEnd {
            number: self.ends,
            totals: tallies.iter().map(|tally: &Tally| tally.pages).sum(),
            frames: tallies.iter().map(|tally| tally.frames).collect(),
        };
        context.push(SECTION, Stage::End, &end.encode()?)?;
        Ok(())
    }

    fn called_off(&mut self) -> Result<(), ParticipantError> {
        self.started.as_mut().ok_or_else(|| ParticipantError::not_set_up(SECTION))?.shards.forget()
    }

    fn cleanup(&mut self, _: Outcome) {
        // The shards first: stopping dirty tracking may be slow.
        self.started = None;
        self.ram.dirty.stop();
    }
}
