//! Pages and blocks of guest RAM, and their guest-physical layout.
//!
//! RAM is numbered twice. A [`GuestAddress`] is where the guest finds a byte; a [`PageIndex`] counts
//! RAM pages one block after another, without the hole below 4 GiB, and is what bitmaps, the stream
//! and statistics use. [`RamLayout`] translates. Allocation of the memory itself is the caller's.

use serde::{Deserialize, Serialize};
pub use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

/// Bytes in a page, the unit of dirty tracking and migration.
pub const PAGE_SIZE: u64 = 4096;
/// `log2(PAGE_SIZE)`.
pub const PAGE_SHIFT: u32 = 12;
/// RAM never occupies guest-physical addresses from here to [`HOLE_END`]: devices live there.
pub const HOLE_START: u64 = 0xc000_0000;
/// First address above the hole: 4 GiB.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// RAM sizes are multiples of this, so that blocks align with 64-page bitmap words and huge pages.
pub const RAM_ALIGNMENT: u64 = 2 << 20;
/// Largest RAM of a guest; bounds what a stream may ask a destination to allocate.
pub const MAX_RAM: u64 = 1 << 42;

/// Guest RAM. Writes made through it by devices mark themselves in the region's bitmap.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// Number of a RAM page, counted over all blocks without holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageIndex(pub u64);

/// A contiguous block of RAM: one KVM memory slot, one mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamBlock {
    /// Guest address of the first byte.
    pub base: GuestAddress,
    /// Number of the first page.
    pub first_page: PageIndex,
    /// Pages in this block; a multiple of 64.
    pub page_count: u64,
}

impl RamBlock {
    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.page_count * PAGE_SIZE
    }
}

/// A RAM size that cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RamLayoutError {
    /// Zero, or beyond [`MAX_RAM`].
    #[error("memory size of {size_bytes} bytes is out of range (1 byte to {MAX_RAM})")]
    OutOfRange { size_bytes: u64 },
    /// Not a multiple of [`RAM_ALIGNMENT`].
    #[error("memory size of {size_bytes} bytes is not a multiple of 2 MiB")]
    Unaligned { size_bytes: u64 },
}

/// Where RAM lies: up to 3 GiB below the hole, the rest from 4 GiB on. A pure function of the size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    blocks: Vec<RamBlock>,
}

impl RamLayout {
    /// Lays out `size_bytes` of RAM.
    pub fn for_size(size_bytes: u64) -> Result<Self, RamLayoutError> {
        if size_bytes == 0 || size_bytes > MAX_RAM {
            return Err(RamLayoutError::OutOfRange { size_bytes });
        }
        if !size_bytes.is_multiple_of(RAM_ALIGNMENT) {
            return Err(RamLayoutError::Unaligned { size_bytes });
        }
        let low_bytes = size_bytes.min(HOLE_START);
        let mut blocks = vec![RamBlock {
            base: GuestAddress(0),
            first_page: PageIndex(0),
            page_count: low_bytes / PAGE_SIZE,
        }];
        if size_bytes > low_bytes {
            blocks.push(RamBlock {
                base: GuestAddress(HOLE_END),
                first_page: PageIndex(low_bytes / PAGE_SIZE),
                page_count: (size_bytes - low_bytes) / PAGE_SIZE,
            });
        }
        Ok(Self { blocks })
    }

    /// The blocks, by ascending address and page number.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Pages in all blocks.
    pub fn page_count(&self) -> u64 {
        self.blocks.iter().map(|block| block.page_count).sum()
    }

    /// Bytes in all blocks.
    pub fn size_bytes(&self) -> u64 {
        self.page_count() * PAGE_SIZE
    }

    /// `(base, length)` of each block, as `GuestMemoryMmap::from_ranges` takes them.
    ///
    /// # Panics
    /// Never on a 64-bit host: a block's length fits in `usize`.
    pub fn ranges(&self) -> Vec<(GuestAddress, usize)> {
        let len = |block: &RamBlock| usize::try_from(block.len_bytes()).expect("64-bit host");
        self.blocks.iter().map(|block| (block.base, len(block))).collect()
    }

    /// The block that holds `page`, if there is one.
    pub fn block_of(&self, page: PageIndex) -> Option<&RamBlock> {
        self.blocks.iter().find(|block| {
            page.0.checked_sub(block.first_page.0).is_some_and(|offset| offset < block.page_count)
        })
    }

    /// Guest address of the first byte of `page`, or `None` past the end of RAM.
    pub fn address_of(&self, page: PageIndex) -> Option<GuestAddress> {
        let block = self.block_of(page)?;
        Some(GuestAddress(block.base.0 + (page.0 - block.first_page.0) * PAGE_SIZE))
    }

    /// The address of a run of `page_count` pages, or `None` unless it lies wholly in one block.
    pub fn run_address(&self, first: PageIndex, page_count: u64) -> Option<GuestAddress> {
        let block = self.block_of(first)?;
        let offset = first.0 - block.first_page.0;
        let fits = page_count > 0 && page_count <= block.page_count - offset;
        fits.then(|| GuestAddress(block.base.0 + offset * PAGE_SIZE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_below_the_hole_is_one_block() {
        let layout = RamLayout::for_size(128 << 20).unwrap();
        assert_eq!(layout.ranges(), [(GuestAddress(0), 128 << 20)]);
    }

    #[test]
    fn ram_past_three_gib_continues_at_four() {
        let layout = RamLayout::for_size(5 << 30).unwrap();
        assert_eq!(layout.ranges(), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
        let last_low = PageIndex((3 << 30) / PAGE_SIZE - 1);
        assert_eq!(layout.address_of(last_low), Some(GuestAddress(0xbfff_f000)));
        assert_eq!(layout.address_of(PageIndex(last_low.0 + 1)), Some(GuestAddress(4 << 30)));
        assert_eq!(layout.run_address(last_low, 2), None, "a run never crosses the hole");
        assert_eq!(layout.address_of(PageIndex(layout.page_count())), None);
    }

    #[test]
    fn odd_sizes_are_refused() {
        assert!(matches!(RamLayout::for_size(0), Err(RamLayoutError::OutOfRange { .. })));
        assert!(matches!(RamLayout::for_size(4096), Err(RamLayoutError::Unaligned { .. })));
        assert!(matches!(RamLayout::for_size(u64::MAX), Err(RamLayoutError::OutOfRange { .. })));
    }
}
