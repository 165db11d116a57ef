//! Turns dirty bits into batches: bits → runs → zero or raw. Called by `shard`. Reads guest RAM, sends
//! nothing.

use super::dirty::{Runs, Words};
use super::frame::{Batch, RunKind};
use super::page::{PAGE_BYTES, bytes_of};
use super::zero::is_zero;
use crate::transport::PageSlice;
use devices::ram::{GuestRam, PageIndex, RamLayout};
use vm_memory::{GuestMemoryBackend, GuestMemoryError};

/// Raw pages of a full batch: 1 MiB, small enough that pages are still in the CPU cache when they are sent.
const BATCH_RAW_PAGES: u32 = 256;

/// Iterates over the dirty pages of some words of a bitmap.
pub struct Scan<'a> {
    ram: &'a GuestRam,
    layout: &'a RamLayout,
    /// Pages that may have content. The others read as zero.
    touched: Words<'a>,
    runs: Runs<'a>,
    /// Rest of the current run.
    rest: (PageIndex, u64),
}

impl<'a> Scan<'a> {
    /// Iterates over the pages in `dirty`. Those not in `touched` are zero.
    pub fn new(
        ram: &'a GuestRam,
        layout: &'a RamLayout,
        dirty: Words<'a>,
        touched: Words<'a>,
    ) -> Self {
        Self { ram, layout, touched, runs: dirty.runs(), rest: (PageIndex(0), 0) }
    }

    /// Fills the empty `batch`. Returns false once nothing is left.
    pub fn fill(&mut self, batch: &mut Batch) -> Result<bool, GuestMemoryError> {
        while batch.has_room(BATCH_RAW_PAGES) {
            let (first, left) = self.rest;
            if left == 0 {
                match self.runs.next() {
                    Some(run) => self.rest = run,
                    None => break,
                }
                continue;
            }
            let (page_count, kind) = self.classify(first, left, batch)?;
            batch.push(first, page_count, kind, self.layout);
            self.rest = (PageIndex(first.0 + u64::from(page_count)), left - u64::from(page_count));
        }
        Ok(!batch.is_empty())
    }

    /// The number of pages from `first` on, at most `left`, that are of one kind, and the kind.
    fn classify(
        &self,
        first: PageIndex,
        left: u64,
        batch: &Batch,
    ) -> Result<(u32, RunKind), GuestMemoryError> {
        // The next run of pages that may have content.
        let touched = self.touched.runs_among(first, left).next();
        let (start, len) = touched.unwrap_or((PageIndex(first.0 + left), 0));
        let outside = || GuestMemoryError::IOError(std::io::ErrorKind::Other.into());
        let block = self.layout.block_of(first).ok_or_else(outside)?;
        let in_block = block.first_page.0 + block.page_count - first.0;
        // A longer run continues in the next one.
        let short = |count: u64| u32::try_from(count.min(in_block)).unwrap_or(u32::MAX);
        if start != first {
            return Ok((short(start.0 - first.0), RunKind::Zero));
        }
        let most = short(len.min(u64::from(BATCH_RAW_PAGES - batch.raw_pages())));
        let bytes = bytes_of(most);
        let address = self.layout.run_address(first, most.into());
        let address = address.ok_or_else(outside)?;
        let slice = self.ram.get_slice(address, bytes)?;
        let zero = self.zero_at(&slice, 0)?;
        let mut page_count = 1;
        while page_count < most && self.zero_at(&slice, page_count)? == zero {
            page_count += 1;
        }
        Ok((page_count, if zero { RunKind::Zero } else { RunKind::Raw }))
    }

    fn zero_at(&self, run: &PageSlice<'_>, index: u32) -> Result<bool, GuestMemoryError> {
        let offset = bytes_of(index);
        let page = run.subslice(offset, PAGE_BYTES).map_err(GuestMemoryError::from)?;
        Ok(is_zero(&page))
    }
}

#[cfg(test)]
mod tests {
    use super::super::dirty::PageBitmap;
    use super::*;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    proptest! {
        #[test]
        fn every_dirty_page_comes_once_and_as_what_it_is(
            dirty in prop::collection::vec(any::<u64>(), 8),
            content in prop::collection::vec(any::<u64>(), 8),
        ) {
            let layout = RamLayout::for_size(2 << 20).unwrap();
            let ram = GuestRam::from_ranges(&layout.ranges()).unwrap();
            let (mut bits, mut touched) = (PageBitmap::new(512), PageBitmap::new(512));
            bits.words_mut().copy_from_slice(&dirty);
            touched.words_mut().copy_from_slice(&content);
            for page in (0..512).filter(|page| touched.contains(PageIndex(*page))) {
                // Every other touched page is zero all the same.
                ram.write_obj((page % 2) as u8, layout.address_of(PageIndex(page)).unwrap()).unwrap();
            }
            let words = |bits| Words { first_word: 0, words: bits };
            let mut scan = Scan::new(&ram, &layout, words(bits.words()), words(touched.words()));
            let mut batch = Batch::default();
            let mut seen = PageBitmap::new(512);
            while scan.fill(&mut batch).unwrap() {
                for run in batch.runs() {
                    for page in run.first.0..run.first.0 + u64::from(run.page_count) {
                        prop_assert!(!seen.contains(PageIndex(page)), "page {} twice", page);
                        let raw = touched.contains(PageIndex(page)) && page % 2 == 1;
                        prop_assert_eq!(run.kind == RunKind::Raw, raw, "page {}", page);
                        seen.insert_run(PageIndex(page), 1);
                    }
                }
                batch.clear();
            }
            prop_assert_eq!(seen.words(), bits.words());
        }
    }
}
