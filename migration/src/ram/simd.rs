//! Vector kernels behind safe functions, chosen at run time by what the processor has. Called by
//! `zero`. One of the crate's exceptions from the ban on unsafe code.
#![expect(unsafe_code, reason = "vector loads from guest RAM")]

use super::zero::PAGE_BYTES;
use crate::transport::PageSlice;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::PAGE_BYTES;
    use std::arch::x86_64::*;

    /// # Safety
    /// The processor has AVX-512F, and `PAGE_BYTES` from `page` on are mapped.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn is_zero_avx512(page: *const u8) -> bool {
        for offset in (0..PAGE_BYTES).step_by(256) {
            // SAFETY: the four loads lie within the page, which the caller vouches for.
            let all = unsafe {
                let at = page.add(offset).cast::<__m512i>();
                let low = _mm512_or_si512(_mm512_loadu_si512(at), _mm512_loadu_si512(at.add(1)));
                let high =
                    _mm512_or_si512(_mm512_loadu_si512(at.add(2)), _mm512_loadu_si512(at.add(3)));
                _mm512_or_si512(low, high)
            };
            if _mm512_test_epi64_mask(all, all) != 0 {
                return false;
            }
        }
        true
    }

    /// # Safety
    /// The processor has AVX2, and `PAGE_BYTES` from `page` on are mapped.
    #[target_feature(enable = "avx2")]
    pub unsafe fn is_zero_avx2(page: *const u8) -> bool {
        for offset in (0..PAGE_BYTES).step_by(128) {
            // SAFETY: the four loads lie within the page, which the caller vouches for.
            let all = unsafe {
                let at = page.add(offset).cast::<__m256i>();
                let low = _mm256_or_si256(_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1)));
                let high =
                    _mm256_or_si256(_mm256_loadu_si256(at.add(2)), _mm256_loadu_si256(at.add(3)));
                _mm256_or_si256(low, high)
            };
            if _mm256_testz_si256(all, all) == 0 {
                return false;
            }
        }
        true
    }
}

/// Whether `page` is zero, by the widest kernel that the processor has; `None` if it has none or
/// `page` is not a whole page.
pub fn is_zero(page: &PageSlice<'_>) -> Option<bool> {
    if page.len() != PAGE_BYTES {
        return None;
    }
    #[cfg(target_arch = "x86_64")]
    {
        let guard = page.ptr_guard();
        // The answer is cached by the standard library: one load and one test.
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512F; `page` borrows a mapping and is a whole page long.
            // The guest may write it meanwhile: any mixture of old and new bytes will do.
            return Some(unsafe { x86::is_zero_avx512(guard.as_ptr()) });
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: as above, with AVX2.
            return Some(unsafe { x86::is_zero_avx2(guard.as_ptr()) });
        }
    }
    None
}

/// What each kernel that this processor has says of `page`, a whole page.
#[cfg(test)]
pub(super) fn all_kernels(page: &PageSlice<'_>) -> impl Iterator<Item = bool> {
    assert_eq!(page.len(), PAGE_BYTES);
    let mut verdicts = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let guard = page.ptr_guard();
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: as in `is_zero`.
            verdicts.push(unsafe { x86::is_zero_avx512(guard.as_ptr()) });
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: as in `is_zero`.
            verdicts.push(unsafe { x86::is_zero_avx2(guard.as_ptr()) });
        }
    }
    verdicts.into_iter()
}
