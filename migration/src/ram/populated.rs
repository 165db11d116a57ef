//! Finds the pages of RAM that were never touched. Called by `outgoing` in the first pass. Guest RAM is
//! anonymous memory: a page neither present nor swapped out reads as zero, and reading it would allocate it.

use devices::ram::{GuestRam, PAGE_SIZE, PageIndex, RamLayout};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::GuestMemoryBackend;

/// Bits of a `/proc/self/pagemap` entry (Linux, `Documentation/admin-guide/mm/pagemap.rst`): present,
/// swapped. Both read as zero only for a page that was never written.
const TOUCHED: u64 = 0b11 << 62;
const ENTRY_BYTES: u64 = 8;

/// Looks pages up in `/proc/self/pagemap`.
#[derive(Debug)]
pub struct Populated {
    pagemap: Option<File>,
    entries: Vec<u8>,
}

impl Populated {
    /// If the kernel does not allow it, every page counts as touched.
    pub fn open() -> Self {
        let pagemap = File::open("/proc/self/pagemap");
        if let Err(error) = &pagemap {
            log::debug!("cannot open /proc/self/pagemap, every page counts as touched: {error}");
        }
        Self { pagemap: pagemap.ok(), entries: Vec::new() }
    }

    /// Clears the bits of never touched pages in `mask`, whose bit 0 is page `first`, a multiple of 64. Bits
    /// past the end of RAM are clear already.
    pub fn keep_touched(
        &mut self,
        ram: &GuestRam,
        layout: &RamLayout,
        first: PageIndex,
        mask: &mut [u64],
    ) {
        let Some(pagemap) = &self.pagemap else { return };
        let end = first.0 + mask.len() as u64 * 64;
        for block in layout.blocks() {
            let from = first.0.max(block.first_page.0);
            let to = end.min(block.first_page.0 + block.page_count);
            if from >= to {
                continue;
            }
            // In shared memory a page may have content without being mapped here.
            let private = ram.find_region(block.base).is_some_and(|region| {
                let mapping = region.get_mmap();
                mapping.file_offset().is_none() && mapping.flags() & libc::MAP_SHARED == 0
            });
            let Ok(host) = ram.get_host_address(block.base) else { return };
            if !private {
                continue;
            }
            let host_page = host as u64 / PAGE_SIZE + (from - block.first_page.0);
            let len = usize::try_from((to - from) * ENTRY_BYTES);
            let skipped = usize::try_from((from - first.0) / 64);
            // On failure every page of the mask counts as touched.
            let (Ok(len), Ok(skipped)) = (len, skipped) else { return };
            self.entries.resize(len, 0);
            if let Err(error) = pagemap.read_exact_at(&mut self.entries, host_page * ENTRY_BYTES) {
                log::debug!(
                    "cannot read /proc/self/pagemap, every page counts as touched: {error}"
                );
                self.pagemap = None;
                return;
            }
            // Blocks hold whole words.
            let words = mask.iter_mut().skip(skipped);
            for (word, entries) in words.zip(self.entries.chunks(64 * 8)) {
                let mut touched = 0;
                for (entry, bit) in entries.as_chunks::<8>().0.iter().zip(0..64) {
                    #[expect(clippy::host_endian_bytes, reason = "the kernel's own words")]
                    let entry = u64::from_ne_bytes(*entry);
                    touched |= u64::from(entry & TOUCHED != 0) << bit;
                }
                *word &= touched;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::ram::GuestAddress;
    use vm_memory::Bytes;

    #[test]
    fn only_pages_that_were_written_count() {
        let layout = RamLayout::for_size(8 << 20).unwrap();
        let ram = GuestRam::from_ranges(&layout.ranges()).unwrap();
        ram.write_obj(1u8, GuestAddress(5 * PAGE_SIZE)).unwrap();
        let mut mask = vec![u64::MAX; 32];
        Populated::open().keep_touched(&ram, &layout, PageIndex(0), &mut mask);
        assert_eq!(mask[0] >> 5 & 1, 1);
        // A huge page may have come with it, but never all four of them.
        let count: u32 = mask.iter().map(|word| word.count_ones()).sum();
        assert!(count <= 512, "{count}");
    }
}
