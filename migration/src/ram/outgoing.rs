//! The "ram" half of a source: rounds over the dirty pages, dealt to the data channels.

use super::dirty::PageBitmap;
use super::lanes::Lanes;
use super::populated::Populated;
use super::shard::{Job, Tally};
use crate::guest::DirtySource;
use crate::source::SourceError;
use crate::wire::section::RamSetup;
use devices::ram::{GuestRam, PAGE_SIZE, PageIndex, RamLayout};
use std::ops::Range;

/// Dirty pages that are cleared in the log in one call: 16 MiB per channel. Few calls, yet not long
/// between the clear and the copy, because what is written in between is sent twice.
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
    /// First, so that it ends before tracking does: the end of that takes its time.
    lanes: Lanes,
    ram: SourceRam,
    pending: PageBitmap,
    /// In the first round: tells never touched pages from the others.
    populated: Option<Populated>,
}

impl RamOutgoing {
    /// Starts tracking; every page is dirty. `lanes` send what has to be sent.
    pub fn setup(mut ram: SourceRam, lanes: Lanes) -> Result<Self, SourceError> {
        let mut pending = PageBitmap::new(ram.layout.page_count());
        pending.set_all();
        let started = ram.dirty.start().map_err(SourceError::Guest);
        // From here on dropping it stops the tracking, also if it started only in part.
        let outgoing = Self { lanes, ram, pending, populated: Some(Populated::open()) };
        started.map(|()| outgoing)
    }

    /// What the destination is told about this RAM.
    pub fn announcement(&self) -> RamSetup {
        let page_count = self.ram.layout.page_count();
        let data_channels = u16::try_from(self.lanes.count()).unwrap_or(u16::MAX);
        RamSetup { page_count, page_bytes: 4096, data_channels }
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

    /// Has every pending page sent once, while the guest runs. Between chunks `between` is told which
    /// word of the bitmap comes next, and may harvest.
    pub fn iterate(
        &mut self,
        between: &mut dyn FnMut(&mut Self, usize) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        let mut start = 0;
        while let Some(chunk) = self.next_chunk(start) {
            start = chunk.end;
            let job = self.clear(chunk)?;
            self.lanes.deal(job)?;
            between(self, start)?;
        }
        self.populated = None;
        Ok(())
    }

    /// Sends every pending page, while the guest is stopped, and ends the channels; says what each has
    /// carried. The log is left as it is: nothing is written any more, and if this fails, the next
    /// migration begins with every page dirty.
    pub fn complete(&mut self) -> Result<Vec<Tally>, SourceError> {
        let job = self.take(0..self.pending.words().len());
        self.lanes.deal(job)?;
        self.lanes.end()
    }

    /// Has a mark sent on every channel, which the destination echoes when everything before it is in
    /// place.
    pub fn mark(&mut self, number: u64) -> Result<(), SourceError> {
        self.lanes.mark(number)
    }

    /// The error that ended a wait with `error`: that of a channel, if it was one.
    pub fn explain(&mut self, error: SourceError) -> SourceError {
        self.lanes.failure().unwrap_or(error)
    }

    /// The next words, from `start` on, whose pages are cleared together.
    fn next_chunk(&self, start: usize) -> Option<Range<usize>> {
        let words = self.pending.words();
        let first = start + words.get(start..)?.iter().position(|word| *word != 0)?;
        let most = CLEAR_PAGES * self.lanes.count() as u64;
        let mut pages = 0;
        let mut end = first;
        while end < words.len() && end - first < CLEAR_WORDS && pages < most {
            pages += u64::from(words[end].count_ones());
            end += 1;
        }
        Some(first..end)
    }

    /// Takes the pending pages of `chunk` on as a job.
    fn take(&mut self, chunk: Range<usize>) -> Job {
        let first_word = chunk.start;
        let words = &mut self.pending.words_mut()[chunk];
        let dirty = words.to_vec();
        words.fill(0);
        Job { first_word, dirty, touched: None }
    }

    /// Clears the log for the pending pages of `chunk`, then finds out which may hold something.
    fn clear(&mut self, chunk: Range<usize>) -> Result<Job, SourceError> {
        let first = PageIndex(chunk.start as u64 * 64);
        let mut job = self.take(chunk);
        self.ram.dirty.clear(first, &job.dirty).map_err(SourceError::Guest)?;
        // After the clear: a page that is touched only now is in the log again.
        if let Some(populated) = &mut self.populated {
            let mut touched = job.dirty.clone();
            populated.keep_touched(&self.ram.ram, &self.ram.layout, first, &mut touched);
            job.touched = Some(touched);
        }
        Ok(job)
    }
}

impl Drop for RamOutgoing {
    fn drop(&mut self) {
        self.ram.dirty.stop();
    }
}
