//! Sends dirty pages: bits -> runs -> zero or raw -> batches on the connection.

use super::bitmap::PageBitmap;
use super::populated::Populated;
use crate::guest::DirtySource;
use crate::source::SourceError;
use crate::stats::Counters;
use crate::transport::Transport;
use crate::wire::{self, Encoder, Kind, MAX_RAW_PAGES, MAX_RUNS, RUN_BYTES, WireError};
use devices::ram::{GuestRam, PAGE_SIZE, PageIndex, RamLayout};
use std::sync::Arc;
use vm_memory::Bytes;

const PAGE_BYTES: usize = 4096;
/// Words of the bitmap whose pages are cleared in KVM's log in one call: 64 MiB of RAM. Few calls, but
/// never long between the clear and the copy.
const CLEAR_WORDS: usize = 256;
/// Raw pages after which a batch is sent: half a second-level cache, so that what the zero test read
/// is still there when the kernel copies it.
const BATCH_PAGES: u64 = 128;

/// A source's RAM.
pub struct SourceRam {
    /// The mapping.
    pub ram: GuestRam,
    /// How it is numbered.
    pub layout: RamLayout,
    /// Who wrote what.
    pub dirty: Box<dyn DirtySource>,
}

/// A run of pages in a batch.
struct Run {
    first: PageIndex,
    page_count: u64,
    raw: bool,
}

/// The "ram" half of a source.
pub struct RamOutgoing {
    ram: SourceRam,
    pending: PageBitmap,
    /// In the first round: tells never touched pages from the others.
    populated: Option<Populated>,
    /// Pending pages of the words at hand that may hold something.
    touched: PageBitmap,
    counters: Arc<Counters>,
    batch: Vec<Run>,
    batch_raw_pages: u64,
    head: Encoder,
    raw_pages: u64,
    zero_pages: u64,
}

impl RamOutgoing {
    /// Starts tracking; every page is dirty.
    pub fn start(mut ram: SourceRam, counters: Arc<Counters>) -> Result<Self, SourceError> {
        ram.dirty.start().map_err(SourceError::Guest)?;
        let mut pending = PageBitmap::new(ram.layout.page_count());
        pending.set_all();
        let touched = PageBitmap::new(ram.layout.page_count());
        Ok(Self {
            ram,
            pending,
            populated: Some(Populated::open()),
            touched,
            counters,
            batch: Vec::with_capacity(MAX_RUNS as usize),
            batch_raw_pages: 0,
            head: Encoder::default(),
            raw_pages: 0,
            zero_pages: 0,
        })
    }

    /// Announces RAM's size.
    pub fn announce(&self, transport: &mut dyn Transport) -> Result<(), WireError> {
        let mut payload = Encoder::default();
        payload.u64(self.ram.layout.page_count()).u32(4096);
        wire::send(transport, Kind::RamSetup, payload.bytes()).map(drop)
    }

    /// Bytes that are known to be dirty.
    pub fn pending_bytes(&self) -> u64 {
        self.pending.count() * PAGE_SIZE
    }

    /// Merges what was written since the last look.
    pub fn sync(&mut self) -> Result<(), SourceError> {
        self.ram.dirty.drain_into(self.pending.words_mut()).map_err(SourceError::Guest)
    }

    /// Sends every pending page once. `pace` is called with the bytes just sent.
    pub fn send_pending(
        &mut self,
        transport: &mut dyn Transport,
        pace: &mut dyn FnMut(u64) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        let word_count = self.pending.words().len();
        for start in (0..word_count).step_by(CLEAR_WORDS) {
            let range = start..(start + CLEAR_WORDS).min(word_count);
            let mut mask = self.pending.words()[range.clone()].to_vec();
            if mask.iter().all(|word| *word == 0) {
                continue;
            }
            let first = PageIndex(start as u64 * 64);
            self.ram.dirty.clear(first, &mask).map_err(SourceError::Guest)?;
            // After the clear: a page that is touched only now is in the log again.
            if let Some(populated) = &mut self.populated {
                populated.keep_touched(&self.ram.ram, &self.ram.layout, first, &mut mask);
            }
            self.touched.words_mut()[range.clone()].copy_from_slice(&mask);
            let runs: Vec<_> = self.pending.runs(range.clone()).collect();
            self.pending.words_mut()[range].fill(0);
            for (first, page_count) in runs {
                self.send_run(first, page_count, transport, pace)?;
            }
            let remaining = self.pending_bytes();
            self.counters.update(|stats| stats.remaining_bytes = remaining);
        }
        self.send_batch(transport, pace)?;
        self.populated = None;
        Ok(())
    }

    fn send_run(
        &mut self,
        first: PageIndex,
        page_count: u64,
        transport: &mut dyn Transport,
        pace: &mut dyn FnMut(u64) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        for page in (first.0..first.0 + page_count).map(PageIndex) {
            let zero = !self.touched.contains(page) || self.is_zero(page)?;
            self.add(page, !zero);
            if self.batch_raw_pages >= BATCH_PAGES || self.batch.len() >= MAX_RUNS as usize - 1 {
                self.send_batch(transport, pace)?;
            }
        }
        Ok(())
    }

    /// Appends a page to the last run where it continues it.
    fn add(&mut self, page: PageIndex, raw: bool) {
        self.batch_raw_pages += u64::from(raw);
        let continues = |run: &&mut Run| {
            run.raw == raw
                && run.first.0 + run.page_count == page.0
                && run.page_count < u64::from(u32::MAX)
                // A run never crosses from one block of RAM to the next.
                && self.ram.layout.block_of(page).is_some_and(|block| block.first_page != page)
        };
        match self.batch.last_mut().filter(continues) {
            Some(run) => run.page_count += 1,
            None => self.batch.push(Run { first: page, page_count: 1, raw }),
        }
    }

    fn is_zero(&self, page: PageIndex) -> Result<bool, SourceError> {
        let address = self
            .ram
            .layout
            .address_of(page)
            .ok_or_else(|| SourceError::Ram(format!("no page {}", page.0)))?;
        let failed = |error: vm_memory::GuestMemoryError| SourceError::Ram(error.to_string());
        // Most pages that are not zero say so at their very start.
        let head: [u64; 8] = self.ram.ram.read_obj(address).map_err(failed)?;
        if head != [0; 8] {
            return Ok(false);
        }
        let mut copy = [0u8; PAGE_BYTES];
        self.ram.ram.read_slice(&mut copy, address).map_err(failed)?;
        Ok(copy.as_chunks::<64>().0.iter().all(|line| *line == [0; 64]))
    }

    fn send_batch(
        &mut self,
        transport: &mut dyn Transport,
        pace: &mut dyn FnMut(u64) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let raw_pages = u32::try_from(self.batch_raw_pages).unwrap_or(MAX_RAW_PAGES);
        let run_count = u32::try_from(self.batch.len()).unwrap_or(MAX_RUNS);
        let payload = 8 + run_count * RUN_BYTES + raw_pages * 4096;
        self.head.clear();
        self.head.raw(&wire::header(Kind::RamBatch, payload)).u32(run_count).u32(raw_pages);
        for run in &self.batch {
            let page_count = u32::try_from(run.page_count).unwrap_or(0);
            self.head.u64(run.first.0).u32(page_count).u32(run.raw.into());
        }
        let lost = |error, transport: &mut dyn Transport| WireError::from_io(error, transport);
        transport.write_all(self.head.bytes()).map_err(|error| lost(error, transport))?;
        for run in self.batch.iter().filter(|run| run.raw) {
            let address = self.ram.layout.run_address(run.first, run.page_count);
            let address = address.ok_or_else(|| SourceError::Ram("run past RAM".into()))?;
            let len = usize::try_from(run.page_count).unwrap_or(0) * PAGE_BYTES;
            transport
                .write_pages(&self.ram.ram, address, len)
                .map_err(|error| lost(error, transport))?;
        }
        let sent = self.head.bytes().len() as u64 + u64::from(raw_pages) * PAGE_SIZE;
        let zero: u64 = self.batch.iter().filter(|run| !run.raw).map(|run| run.page_count).sum();
        self.raw_pages += u64::from(raw_pages);
        self.zero_pages += zero;
        self.counters.update(|stats| {
            stats.transferred_bytes += sent;
            stats.normal_pages += u64::from(raw_pages);
            stats.zero_pages += zero;
        });
        self.batch.clear();
        self.batch_raw_pages = 0;
        pace(sent)
    }

    /// Says how many pages there were.
    pub fn end(&self, transport: &mut dyn Transport) -> Result<(), WireError> {
        let mut payload = Encoder::default();
        payload.u64(self.raw_pages).u64(self.zero_pages);
        wire::send(transport, Kind::RamEnd, payload.bytes()).map(drop)
    }
}

impl Drop for RamOutgoing {
    fn drop(&mut self) {
        self.ram.dirty.stop();
    }
}
