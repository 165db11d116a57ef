//! Vector kernels behind safe functions, chosen at run time by what the processor has. Called by
//! `zero` and `xbzrle`. One of the crate's exceptions from the ban on unsafe code.
#![expect(unsafe_code, reason = "vector loads from guest RAM, stores to where a bit count says")]

use super::page::{PAGE_BYTES, Page};
use crate::transport::PageSlice;

/// Bytes of a page whose bits make a word.
const WORD_BYTES: usize = 64;
const PAGE_WORDS: usize = PAGE_BYTES / WORD_BYTES;
/// Where the last run ends if it goes to the end of the page.
const PAGE_END: u16 = 4096;
/// What the kernels store past the last edge: a vector of offsets.
const EDGE_SLACK: usize = 32;
/// Pairs that the short-run kernel encodes at once, and how long their runs may be.
const PAIRS_AT_ONCE: usize = 8;
const SHORT_RUN: i32 = 5;

/// The vector instructions to use. A value exists only if the processor has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel(Level);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// With the byte and word instructions and VBMI2: Ice Lake, Zen 4 and later.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Kernel {
    /// All that this processor has, the best one first.
    pub fn all() -> Vec<Self> {
        let mut kernels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f")
                && std::arch::is_x86_feature_detected!("avx512bw")
                && std::arch::is_x86_feature_detected!("avx512vl")
                && std::arch::is_x86_feature_detected!("avx512vbmi2")
                && std::arch::is_x86_feature_detected!("bmi1")
                && std::arch::is_x86_feature_detected!("popcnt")
            {
                kernels.push(Self(Level::Avx512));
            }
            if std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("bmi1")
                && std::arch::is_x86_feature_detected!("popcnt")
            {
                kernels.push(Self(Level::Avx2));
            }
        }
        kernels.push(Self(Level::Portable));
        kernels
    }

    /// The best one that this processor has.
    pub fn best() -> Self {
        Self::all()[0]
    }

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }
}

/// Where two pages differ. Reused from page to page, so that no comparison allocates.
#[derive(Debug)]
pub struct Changes {
    /// A zero word, for the one before the first; then a bit per byte: first whether it differs, then
    /// whether that is otherwise for the byte before it.
    bits: [u64; 1 + PAGE_WORDS],
    /// A zero, then where runs of changed bytes begin and end, in turn. All are within a page. Room
    /// for a vector past the last one that there can be.
    edges: Box<[u16; 1 + PAGE_BYTES + 1 + EDGE_SLACK]>,
    runs: usize,
}

impl Default for Changes {
    fn default() -> Self {
        let edges = Box::new([0; 1 + PAGE_BYTES + 1 + EDGE_SLACK]);
        Self { bits: [0; 1 + PAGE_WORDS], edges, runs: 0 }
    }
}

impl Changes {
    /// How many runs of changed bytes there are.
    pub fn runs(&self) -> usize {
        self.runs
    }

    /// Where the run before run `run` ended (0 if it is the first), where this one begins and ends.
    pub fn run(&self, run: usize) -> [u16; 3] {
        debug_assert!(run < self.runs);
        let at = &self.edges[2 * run..2 * run + 3];
        [at[0], at[1], at[2]]
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{
        Changes, EDGE_SLACK, PAGE_BYTES, PAGE_WORDS, PAIRS_AT_ONCE, Page, SHORT_RUN, WORD_BYTES,
        offset,
    };
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,bmi1,popcnt")]
    pub fn changes_avx512(old: &Page, new: &Page, changes: &mut Changes) -> usize {
        let bits = &mut changes.bits;
        for word in 0..PAGE_WORDS {
            // SAFETY: the page is `PAGE_WORDS` vectors of `WORD_BYTES` long.
            let (old, new) = unsafe {
                let at = word * WORD_BYTES;
                (
                    _mm512_loadu_si512(old.as_ptr().add(at).cast()),
                    _mm512_loadu_si512(new.as_ptr().add(at).cast()),
                )
            };
            bits[1 + word] = _mm512_cmpneq_epi8_mask(old, new);
        }
        // From the end, as each vector reads the word before it.
        let mut words = 0;
        for vector in (0..PAGE_WORDS / 8).rev() {
            // SAFETY: both loads and the store are eight words among the 1 + `PAGE_WORDS`.
            let some = unsafe {
                let at = bits.as_mut_ptr().add(vector * 8);
                let before = _mm512_loadu_si512(at.cast());
                let these = _mm512_loadu_si512(at.add(1).cast());
                let turns = _mm512_xor_si512(these, _mm512_shldi_epi64::<1>(these, before));
                _mm512_storeu_si512(at.add(1).cast(), turns);
                _mm512_test_epi64_mask(turns, turns)
            };
            words = words << 8 | u64::from(some);
        }
        let mut ascending = [0; WORD_BYTES];
        (0u8..).zip(&mut ascending).for_each(|(lane, at)| *at = lane);
        // SAFETY: the array is one vector long.
        let ascending = unsafe { _mm512_loadu_si512(ascending.as_ptr().cast()) };
        let mut len = 1;
        while words != 0 {
            let word = words.trailing_zeros() as usize;
            words &= words - 1;
            let turns = bits[1 + word];
            let offsets = _mm512_maskz_compress_epi8(turns, ascending);
            let base = _mm512_set1_epi16(offset(word, 0).cast_signed());
            let low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(offsets));
            let end = len + turns.count_ones() as usize;
            // SAFETY: at most one edge per byte of the page precedes, and there is room for a vector
            // after that many.
            unsafe {
                let to = changes.edges.as_mut_ptr().add(len);
                _mm512_storeu_si512(to.cast(), _mm512_add_epi16(low, base));
            }
            if end - len > 32 {
                let high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64::<1>(offsets));
                // SAFETY: as above: 32 edges more precede, which this word has.
                unsafe {
                    let to = changes.edges.as_mut_ptr().add(len + 32);
                    _mm512_storeu_si512(to.cast(), _mm512_add_epi16(high, base));
                }
            }
            len = end;
        }
        len
    }

    #[target_feature(enable = "avx2,bmi1,popcnt")]
    pub fn changes_avx2(old: &Page, new: &Page, changes: &mut Changes) -> usize {
        /// Edges stored at once: usually all of a word's, so that the loop's end is no surprise.
        const BATCH: usize = 12;
        const { assert!(BATCH <= EDGE_SLACK) };
        for (word, bits) in changes.bits[1..].iter_mut().enumerate() {
            let mut same = 0;
            for half in [0, 32] {
                // SAFETY: the page is `PAGE_WORDS` times two vectors of 32 bytes long.
                let (old, new) = unsafe {
                    let at = word * WORD_BYTES + half;
                    (
                        _mm256_loadu_si256(old.as_ptr().add(at).cast()),
                        _mm256_loadu_si256(new.as_ptr().add(at).cast()),
                    )
                };
                let mask = _mm256_movemask_epi8(_mm256_cmpeq_epi8(old, new));
                same |= u64::from(mask.cast_unsigned()) << half;
            }
            *bits = !same;
        }
        let mut words = super::turns(&mut changes.bits);
        let mut len = 1;
        while words != 0 {
            let word = words.trailing_zeros() as usize;
            words &= words - 1;
            let mut turns = changes.bits[1 + word];
            let end = len + turns.count_ones() as usize;
            while turns != 0 {
                for slot in 0..BATCH {
                    // SAFETY: at most one edge per byte of the page precedes, and there is room for
                    // a batch after that many.
                    unsafe {
                        let to = changes.edges.as_mut_ptr().add(len + slot);
                        // In the slots that are left over, the next word's first byte.
                        to.write(offset(word, turns.trailing_zeros()));
                    }
                    turns &= turns.wrapping_sub(1);
                }
                len += BATCH;
            }
            len = end;
        }
        len
    }

    /// Encodes runs from `run` on, `PAIRS_AT_ONCE` at a time, as long as they are short and far from
    /// both ends. Every pair becomes the eight bytes of a lane: two of its first count, one of its
    /// second, five from the page; then those that mean nothing are squeezed out.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
    pub fn short_runs_avx512(
        changes: &Changes,
        mut run: usize,
        new: &Page,
        into: &mut [u8],
        mut len: usize,
    ) -> (usize, usize) {
        let first_count = _mm512_set1_epi64(0x007f);
        let rest_of_it = _mm512_set1_epi64(0x3f80);
        let second_count = _mm512_set1_epi64(0x00ff_0000);
        while changes.runs.saturating_sub(run) >= PAIRS_AT_ONCE
            && into.len().saturating_sub(len) >= 8 * PAIRS_AT_ONCE
        {
            let last = changes.edges[2 * (run + PAIRS_AT_ONCE) - 1];
            if usize::from(last) > PAGE_BYTES - 8 {
                break;
            }
            // SAFETY: these are the edges of runs that exist, with the zero or the edge before them.
            let (before, these) = unsafe {
                let at = changes.edges.as_ptr().add(2 * run);
                (_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(1).cast()))
            };
            // Each lane: unchanged bytes in the low half, changed ones in the high half.
            let counts = _mm256_sub_epi16(these, before);
            let changed = _mm256_srli_epi32::<16>(counts);
            if _mm256_cmpgt_epu32_mask(changed, _mm256_set1_epi32(SHORT_RUN)) != 0 {
                break;
            }
            let starts = _mm256_and_si256(these, _mm256_set1_epi32(0xffff));
            // SAFETY: the eight bytes from each start on lie within the page, as the last start's do
            // and they ascend.
            let bytes = unsafe { _mm512_i32gather_epi64::<1>(starts, new.as_ptr().cast()) };
            let counts = _mm512_cvtepu32_epi64(counts);
            let long = _mm512_test_epi64_mask(counts, rest_of_it);
            let high = _mm512_slli_epi64::<1>(_mm512_and_si512(counts, rest_of_it));
            let low = _mm512_and_si512(counts, _mm512_or_si512(first_count, second_count));
            let head = _mm512_or_si512(low, high);
            let head = _mm512_mask_or_epi64(head, long, head, _mm512_set1_epi64(0x80));
            let lanes = _mm512_or_si512(head, _mm512_slli_epi64::<24>(bytes));
            // One bit per byte to keep: 0b101 for the counts, 0b010 for a long one, and the bytes.
            let kept = _mm512_sllv_epi64(_mm512_set1_epi64(8), _mm512_cvtepu32_epi64(changed));
            let kept = _mm512_sub_epi64(kept, _mm512_set1_epi64(3));
            let kept = _mm512_mask_or_epi64(kept, long, kept, _mm512_set1_epi64(2));
            let kept = _mm_cvtsi128_si64(_mm512_cvtepi64_epi8(kept)).cast_unsigned();
            // SAFETY: `into` has room for a vector at `len`.
            unsafe {
                let to = into.as_mut_ptr().add(len);
                _mm512_storeu_si512(to.cast(), _mm512_maskz_compress_epi8(kept, lanes));
            }
            len += kept.count_ones() as usize;
            run += PAIRS_AT_ONCE;
        }
        (run, len)
    }

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

/// Finds where `new` differs from `old`.
pub fn find_changes(kernel: Kernel, old: &Page, new: &Page, changes: &mut Changes) {
    let mut len = match kernel.0 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: there is such a kernel only if the processor has its instructions.
        Level::Avx512 => unsafe { x86::changes_avx512(old, new, changes) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { x86::changes_avx2(old, new, changes) },
        Level::Portable => changes_portable(old, new, changes),
    };
    if len.is_multiple_of(2) {
        changes.edges[len] = PAGE_END;
        len += 1;
    }
    changes.runs = len / 2;
}

/// Encodes short runs of `changes`, which are those of `new`, for as long as the kernel can, from run
/// `run` on to byte `len` of `into` on; returns both as they are then. Bytes beyond may change.
pub fn short_runs(
    kernel: Kernel,
    changes: &Changes,
    run: usize,
    new: &Page,
    into: &mut [u8],
    len: usize,
) -> (usize, usize) {
    match kernel.0 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: there is such a kernel only if the processor has its instructions.
        Level::Avx512 => unsafe { x86::short_runs_avx512(changes, run, new, into, len) },
        _ => (run, len),
    }
}

/// The byte that a bit of a word stands for.
#[expect(clippy::cast_possible_truncation, reason = "at most the length of a page")]
fn offset(word: usize, bit: u32) -> u16 {
    (word * WORD_BYTES) as u16 + bit as u16
}

#[expect(clippy::little_endian_bytes, reason = "a byte's place in the page gives its bit's place")]
fn changes_portable(old: &Page, new: &Page, changes: &mut Changes) -> usize {
    let pairs = old.as_chunks::<WORD_BYTES>().0.iter().zip(new.as_chunks::<WORD_BYTES>().0);
    for (bits, (old, new)) in changes.bits[1..].iter_mut().zip(pairs) {
        let eights = old.as_chunks::<8>().0.iter().zip(new.as_chunks::<8>().0);
        *bits = eights.rev().fold(0, |bits, (old, new)| {
            bits << 8 | non_zero_bytes(u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new))
        });
    }
    let mut words = turns(&mut changes.bits);
    let mut len = 1;
    while words != 0 {
        let word = words.trailing_zeros() as usize;
        words &= words - 1;
        let mut turns = changes.bits[1 + word];
        while turns != 0 {
            changes.edges[len] = offset(word, turns.trailing_zeros());
            len += 1;
            turns &= turns - 1;
        }
    }
    len
}

/// One bit for every byte of `word` that is not zero.
fn non_zero_bytes(word: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    // The top bit of every byte: whether any of the others is set, or it was itself.
    let tops = (((word & LOW) + LOW) | word) & !LOW;
    // One multiplication moves the eight of them next to each other, to the top of the word.
    (tops >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
}

/// Keeps the bits that differ from the bit before them, and returns the set of words that have any, so
/// that the caller's loop count is known in advance.
fn turns(bits: &mut [u64; 1 + PAGE_WORDS]) -> u64 {
    let mut words = 0;
    for word in (0..PAGE_WORDS).rev() {
        bits[1 + word] ^= bits[1 + word] << 1 | bits[word] >> 63;
        words = words << 1 | u64::from(bits[1 + word] != 0);
    }
    words
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

/// The verdict of every available kernel on `page`, a whole page.
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
