//! The zero test for pages of guest RAM: memory speed for zero pages, one cache line for most others.
//! Called by `scan` for every page to send. The vector kernels are in `simd`.

use super::simd;
use crate::transport::PageSlice;
use vm_memory::VolatileMemory;
use vm_memory::volatile_memory::Error as VolatileMemoryError;

const LINE_BYTES: usize = 64;

/// Whether every byte of `page` is zero. The guest may write it concurrently; see [`crate::ram`].
pub fn is_zero(page: &PageSlice<'_>) -> bool {
    // Most non-zero pages differ in their first line.
    let head = page.get_ref::<[u64; 8]>(0).map(|head| head.load());
    if head.is_ok_and(|head| head != [0; 8]) {
        return false;
    }
    simd::is_zero(page).unwrap_or_else(|| is_zero_portable(page).unwrap_or(false))
}

/// For processors without vector kernels, and the reference for tests.
pub(super) fn is_zero_portable(page: &PageSlice<'_>) -> Result<bool, VolatileMemoryError> {
    for offset in (0..page.len()).step_by(LINE_BYTES) {
        if page.get_ref::<[u64; 8]>(offset)?.load() != [0; 8] {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::super::page::PAGE_BYTES;
    use super::*;
    use devices::ram::{GuestAddress, GuestRam};
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn every_kernel_finds_any_single_bit() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 3 * PAGE_BYTES)]).unwrap();
        let page = ram.get_slice(GuestAddress(4096), PAGE_BYTES).unwrap();
        // What lies around the page is none of its business.
        ram.write_slice(&[0xff; PAGE_BYTES], GuestAddress(0)).unwrap();
        ram.write_slice(&[0xff; PAGE_BYTES], GuestAddress(8192)).unwrap();
        let all = |page: &PageSlice<'_>| {
            let mut verdicts: Vec<_> = simd::all_kernels(page).collect();
            verdicts.push(is_zero_portable(page).unwrap());
            verdicts.push(is_zero(page));
            verdicts
        };
        assert!(all(&page).iter().all(|zero| *zero));
        for offset in 0..PAGE_BYTES {
            let at = GuestAddress(4096 + offset as u64);
            ram.write_obj(1u8 << (offset % 8), at).unwrap();
            assert!(all(&page).iter().all(|zero| !*zero), "byte {offset}");
            ram.write_obj(0u8, at).unwrap();
        }
    }
}
