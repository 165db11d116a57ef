//! The size of a page and a private copy of one. Used by everything in [`crate::ram`]; imports nothing
//! of it.

/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;

/// A private copy of a page: the guest does not write it while we read it.
pub type Page = [u8; PAGE_BYTES];

/// Bytes in `page_count` pages. Exact: Ferry runs on 64-bit hosts only.
pub const fn bytes_of(page_count: u32) -> usize {
    page_count as usize * PAGE_BYTES
}
