//! The "ram" half of a source: rounds over the dirty pages, sent on the data channel.

use super::dirty::PageBitmap;
use super::frame::{Batch, RunKind, encode_end, encode_mark};
use super::populated::Populated;
use super::scan::Scan;
use super::zero::PAGE_BYTES;
use crate::guest::DirtySource;
use crate::source::SourceError;
use crate::stats::Counters;
use crate::transport::{Channel, Throttle};
use crate::wire::Encoder;
use crate::wire::section::{RamSetup, RamTotals};
use devices::ram::{GuestRam, PAGE_SIZE, PageIndex, RamLayout};
use std::ops::Range;
use std::sync::Arc;
use vm_memory::GuestMemoryBackend;

/// Dirty pages that are cleared in the log in one call: 16 MiB. Few calls, yet not long between the
/// clear and the copy, because what is written in between is sent twice.
const CLEAR_PAGES: u64 = 4096;
/// Most words of the bitmap that one clear spans: a sparse round needs few calls too.
const CLEAR_WORDS: usize = 4096;

/// A source's RAM.
pub struct SourceRam {
    /// The mapping.
    pub ram: GuestRam,
    /// How it is numbered.
    pub layout: RamLayout,
    /// Who wrote what.
    pub dirty: Box<dyn DirtySource>,
}

/// The "ram" half of a source.
pub struct RamOutgoing {
    ram: SourceRam,
    pending: PageBitmap,
    /// In the first round: tells never touched pages from the others.
    populated: Option<Populated>,
    /// Pages of the chunk at hand that may hold something.
    touched: PageBitmap,
    counters: Arc<Counters>,
    batch: Batch,
    head: Encoder,
    totals: RamTotals,
    frames: u64,
}

fn unreadable(error: impl std::fmt::Display) -> SourceError {
    SourceError::Ram(error.to_string())
}

impl RamOutgoing {
    /// Starts tracking; every page is dirty.
    pub fn setup(mut ram: SourceRam, counters: Arc<Counters>) -> Result<Self, SourceError> {
        let page_count = ram.layout.page_count();
        let mut pending = PageBitmap::new(page_count);
        pending.set_all();
        let started = ram.dirty.start().map_err(SourceError::Guest);
        // From here on dropping it stops the tracking, also if it started only in part.
        let outgoing = Self {
            ram,
            pending,
            populated: Some(Populated::open()),
            touched: PageBitmap::new(page_count),
            counters,
            batch: Batch::default(),
            head: Encoder::default(),
            totals: RamTotals::default(),
            frames: 0,
        };
        started.map(|()| outgoing)
    }

    /// What the destination is told about this RAM.
    pub fn announcement(&self) -> RamSetup {
        let page_count = self.ram.layout.page_count();
        RamSetup { page_count, page_bytes: 4096, data_channels: 1 }
    }

    /// Pages that are known to be dirty.
    pub fn pending(&self) -> &PageBitmap {
        &self.pending
    }

    /// Bytes that are known to be dirty.
    pub fn pending_bytes(&self) -> u64 {
        self.pending.count() * PAGE_SIZE
    }

    /// Merges what was written since the last look.
    pub fn harvest(&mut self) -> Result<(), SourceError> {
        self.ram.dirty.drain_into(self.pending.words_mut()).map_err(SourceError::Guest)
    }

    /// Sends every pending page once, while the guest runs. Between chunks `between` is told which word
    /// of the bitmap comes next, and may harvest.
    pub fn iterate(
        &mut self,
        channel: &Channel,
        throttle: &mut dyn Throttle,
        between: &mut dyn FnMut(&mut Self, usize) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        let mut start = 0;
        while let Some(chunk) = self.next_chunk(start) {
            start = chunk.end;
            self.clear(chunk.clone())?;
            self.send_words(chunk, channel, throttle)?;
            between(self, start)?;
        }
        self.populated = None;
        Ok(())
    }

    /// Sends every pending page, while the guest is stopped. The log is left as it is: nothing is
    /// written any more, and if this fails, the next migration begins with every page dirty.
    pub fn complete(
        &mut self,
        channel: &Channel,
        throttle: &mut dyn Throttle,
    ) -> Result<(), SourceError> {
        let all = 0..self.pending.words().len();
        self.touched.set_all();
        self.send_words(all, channel, throttle)?;
        encode_end(&mut self.head);
        self.send_head(channel, throttle)
    }

    /// Sends a mark, which the destination echoes when everything before it is in place.
    pub fn mark(
        &mut self,
        number: u64,
        channel: &Channel,
        throttle: &mut dyn Throttle,
    ) -> Result<(), SourceError> {
        encode_mark(&mut self.head, number);
        self.send_head(channel, throttle)
    }

    fn send_head(
        &mut self,
        channel: &Channel,
        throttle: &mut dyn Throttle,
    ) -> Result<(), SourceError> {
        channel.write_pages(self.head.bytes(), &[], throttle)?;
        self.frames += 1;
        let sent = self.head.bytes().len() as u64;
        self.counters.update(|stats| stats.transferred_bytes += sent);
        Ok(())
    }

    /// The next words, from `start` on, whose pages are cleared together.
    fn next_chunk(&self, start: usize) -> Option<Range<usize>> {
        let words = self.pending.words();
        let first = start + words.get(start..)?.iter().position(|word| *word != 0)?;
        let mut pages = 0;
        let mut end = first;
        while end < words.len() && end - first < CLEAR_WORDS && pages < CLEAR_PAGES {
            pages += u64::from(words[end].count_ones());
            end += 1;
        }
        Some(first..end)
    }

    /// Clears the log for the pending pages of `chunk`, then finds out which may hold something.
    fn clear(&mut self, chunk: Range<usize>) -> Result<(), SourceError> {
        let first = PageIndex(chunk.start as u64 * 64);
        let pending = &self.pending.words()[chunk.clone()];
        self.ram.dirty.clear(first, pending).map_err(SourceError::Guest)?;
        let touched = &mut self.touched.words_mut()[chunk];
        touched.copy_from_slice(pending);
        // After the clear: a page that is touched only now is in the log again.
        if let Some(populated) = &mut self.populated {
            populated.keep_touched(&self.ram.ram, &self.ram.layout, first, touched);
        }
        Ok(())
    }

    /// Sends the pending pages of `words`, whose log is clear.
    fn send_words(
        &mut self,
        words: Range<usize>,
        channel: &Channel,
        throttle: &mut dyn Throttle,
    ) -> Result<(), SourceError> {
        let SourceRam { ram, layout, .. } = &self.ram;
        let mut scan = Scan::new(ram, layout, &self.pending, &self.touched, words.clone());
        let batch = &mut self.batch;
        batch.clear();
        while scan.fill(batch).map_err(unreadable)? {
            batch.encode_head(&mut self.head);
            let mut pages = Vec::with_capacity(batch.runs().len());
            for run in batch.runs().iter().filter(|run| run.kind == RunKind::Raw) {
                let address = layout
                    .run_address(run.first, run.page_count.into())
                    .ok_or_else(|| unreadable("a run past its end"))?;
                let bytes = usize::try_from(run.page_count).unwrap_or(0) * PAGE_BYTES;
                pages.push(ram.get_slice(address, bytes).map_err(unreadable)?);
            }
            channel.write_pages(self.head.bytes(), &pages, throttle)?;
            self.frames += 1;
            let (raw, zero) = (u64::from(batch.raw_pages()), batch.zero_pages());
            self.totals.raw_pages += raw;
            self.totals.zero_pages += zero;
            let sent = self.head.bytes().len() as u64 + raw * PAGE_SIZE;
            self.counters.update(|stats| {
                stats.transferred_bytes += sent;
                stats.remaining_bytes =
                    stats.remaining_bytes.saturating_sub((raw + zero) * PAGE_SIZE);
                stats.normal_pages += raw;
                stats.zero_pages += zero;
            });
            batch.clear();
        }
        self.pending.words_mut()[words].fill(0);
        Ok(())
    }

    /// Frames and pages that were sent.
    pub fn totals(&self) -> (u64, RamTotals) {
        (self.frames, self.totals)
    }
}

impl Drop for RamOutgoing {
    fn drop(&mut self) {
        self.ram.dirty.stop();
    }
}
