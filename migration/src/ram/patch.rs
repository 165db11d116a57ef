//! Writes pieces of a page straight into guest RAM. Called by `decode`, for the runs of a delta: marking the
//! page for each of them and copying through vm-memory would take longer than the runs themselves. One of the
//! crate's exceptions from the ban on unsafe code.
#![expect(unsafe_code, reason = "plain stores to guest RAM, marked once a page")]

use super::page::PAGE_BYTES;
use crate::transport::PageSlice;
use vm_memory::bitmap::Bitmap;
use vm_memory::volatile_memory::PtrGuardMut;

/// A page of guest RAM that is written in pieces.
pub struct PageWriter {
    page: PtrGuardMut,
}

impl PageWriter {
    /// Writes to `page`, and marks it as written; `None` if it is no whole page. `page` outlives the call of
    /// `write` that gets the writer, and so the writer.
    pub fn with<T>(page: &PageSlice<'_>, write: impl FnOnce(&Self) -> T) -> Option<T> {
        if page.len() != PAGE_BYTES {
            return None;
        }
        page.bitmap().mark_dirty(0, PAGE_BYTES);
        Some(write(&Self { page: page.ptr_guard_mut() }))
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Panics
    /// If they go past the end of the page.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset <= PAGE_BYTES && bytes.len() <= PAGE_BYTES - offset, "a run past the page");
        let len = bytes.len();
        // SAFETY: the target lies within the page, by the assertion, which `with` keeps mapped. `bytes` is
        // borrowed, and Rust holds no reference into guest RAM, so they do not overlap. A peer that
        // sends one page on two channels gets a mixture of both, as with any other write to guest RAM.
        unsafe {
            let (to, from) = (self.page.as_ptr().add(offset), bytes.as_ptr());
            match len {
                // Most runs are short: moves that overlap in the middle, and no call.
                1 => *to = *from,
                2..4 => ends::<2>(from, to, len),
                4..8 => ends::<4>(from, to, len),
                8..=16 => ends::<8>(from, to, len),
                _ => std::ptr::copy_nonoverlapping(from, to, len),
            }
        }
    }
}

/// Copies the first `N` bytes of `len`, and the last.
///
/// # Safety
/// As for copying `len` bytes, which are at least `N` and at most twice as many.
#[inline(always)]
unsafe fn ends<const N: usize>(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: both lie within the `len` bytes, which the caller vouches for.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, N);
        std::ptr::copy_nonoverlapping(from.add(len - N), to.add(len - N), N);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::ram::{GuestAddress, GuestRam};
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn pieces_are_written_where_they_belong_and_the_page_is_marked() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 3 * PAGE_BYTES)]).unwrap();
        let page = ram.get_slice(GuestAddress(4096), PAGE_BYTES).unwrap();
        let mut expected = vec![0; 3 * PAGE_BYTES];
        PageWriter::with(&page, |page| {
            // Every length that is copied in a way of its own, up to the last byte.
            let mut offset = 0;
            for len in (0..40).chain([PAGE_BYTES - 40 * 41 / 2]) {
                let bytes: Vec<u8> = (1..=len).map(|at| u8::try_from(at % 255).unwrap()).collect();
                page.write(offset, &bytes);
                expected[4096 + offset..][..len].copy_from_slice(&bytes);
                offset += len + 1;
            }
            assert_eq!(offset, 4097);
        })
        .unwrap();
        let mut all = vec![0; 3 * PAGE_BYTES];
        ram.read_slice(&mut all, GuestAddress(0)).unwrap();
        assert!(all == expected);
        let marked = |at| ram.get_slice(GuestAddress(at), PAGE_BYTES).unwrap().bitmap().dirty_at(0);
        assert_eq!([0, 4096, 8192].map(marked), [false, true, false]);
    }

    #[test]
    #[should_panic(expected = "past the page")]
    fn a_piece_that_goes_past_the_page_is_a_bug() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 2 * PAGE_BYTES)]).unwrap();
        let page = ram.get_slice(GuestAddress(0), PAGE_BYTES).unwrap();
        PageWriter::with(&page, |page| page.write(4095, &[1, 2]));
    }

    #[test]
    fn half_a_page_is_none() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), PAGE_BYTES)]).unwrap();
        let half = ram.get_slice(GuestAddress(0), PAGE_BYTES / 2).unwrap();
        assert!(PageWriter::with(&half, |_| ()).is_none());
    }
}
