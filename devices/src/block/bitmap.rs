//! A disk's dirty bitmap: one bit per granule, set by writers and taken by copiers, concurrently and
//! without a lock.
//!
//! [`super::BlockNode`] marks it after every write; block migration takes it word by word. A reader
//! that clears a bit before it reads misses nothing: what was written before the clear is in what it
//! reads, and what is written later marks the bit again.
//!
//! ```text
//! summary  one bit per word: clear only if the word is zero, so that a scan skips 64 words at a time
//! words    one bit per granule
//! count    marked granules: changed by what each atomic operation on a word has flipped
//! ```
//! **Order of the two levels.** A mark sets its bits in the word, then in the summary. A take clears the
//! summary's bit, then the word. So a mark that has returned is found by every later take; the summary may
//! have a bit too many, which the next scan clears.

mod chunks;
mod merge;

use super::backend::ByteRange;
pub use chunks::{CHUNK_BYTES, Chunk, ChunkError, Content};
use std::sync::atomic::{AtomicU64, Ordering};
use zerocopy::FromZeros;

/// Default granule.
pub const DEFAULT_GRANULE_BYTES: u64 = 64 << 10;
/// Smallest granule: a sector.
pub const MIN_GRANULE_BYTES: u64 = 512;
/// Largest granule of a named bitmap: more would be no help to a backup.
pub const MAX_GRANULE_BYTES: u64 = 64 << 20;
const BITS: u64 = 64;

/// One bit per granule of a disk.
#[derive(Debug)]
pub struct DirtyBitmap {
    len_bytes: u64,
    granule_shift: u32,
    words: Box<[AtomicU64]>,
    summary: Box<[AtomicU64]>,
    /// Marked granules, modulo 2⁶⁴: a take may subtract what a concurrent mark is about to add.
    count: AtomicU64,
}

fn index(word: u64) -> usize {
    usize::try_from(word).expect("64-bit host")
}

/// Zeroed pages take no memory until they are written: a disk may be large and mostly unused.
fn zeroed(words: u64) -> Option<Box<[AtomicU64]>> {
    <[AtomicU64]>::new_box_zeroed_with_elems(usize::try_from(words).ok()?).ok()
}

/// The bits of word `word` that belong to granules `first..end`.
fn mask_of(word: u64, first: u64, end: u64) -> u64 {
    let low = first.saturating_sub(word * BITS).min(BITS);
    let high = end.saturating_sub(word * BITS).min(BITS);
    if low >= high {
        return 0;
    }
    (u64::MAX >> (BITS - (high - low))) << low
}

/// Visits the words of `words` that hold bits `first..end`, each with the mask of those bits.
fn each_word(words: &[AtomicU64], first: u64, end: u64, mut visit: impl FnMut(&AtomicU64, u64)) {
    let mut word = first / BITS;
    while word * BITS < end {
        if let Some(place) = words.get(index(word)) {
            visit(place, mask_of(word, first, end));
        }
        word += 1;
    }
}

impl DirtyBitmap {
    /// A clean bitmap for a disk of `len_bytes`. `None` if the granule is no power of two, or smaller
    /// than a sector, or if there is no memory for it.
    pub fn new(len_bytes: u64, granule_bytes: u64) -> Option<Self> {
        if !granule_bytes.is_power_of_two() || granule_bytes < MIN_GRANULE_BYTES {
            return None;
        }
        let count = len_bytes.div_ceil(granule_bytes).div_ceil(BITS);
        let (words, summary) = (zeroed(count)?, zeroed(count.div_ceil(BITS))?);
        let granule_shift = granule_bytes.trailing_zeros();
        Some(Self { len_bytes, granule_shift, words, summary, count: AtomicU64::new(0) })
    }

    /// Bytes that one bit stands for; the last granule may be shorter.
    pub fn granule_bytes(&self) -> u64 {
        1 << self.granule_shift
    }

    /// Size of the disk that it is for.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Memory that it may take once much of it is marked.
    pub fn memory_bytes(len_bytes: u64, granule_bytes: u64) -> u64 {
        let words = len_bytes.div_ceil(granule_bytes).div_ceil(BITS);
        (words + words.div_ceil(BITS)) * 8
    }

    /// Number of words: 64 granules each.
    pub fn word_count(&self) -> u64 {
        self.words.len() as u64
    }

    fn granules(&self) -> u64 {
        self.len_bytes.div_ceil(self.granule_bytes())
    }

    /// The granules that `range` touches.
    fn touched(&self, range: ByteRange) -> (u64, u64) {
        let end = range.end().min(self.len_bytes);
        let first = range.offset_bytes.min(end) >> self.granule_shift;
        if range.offset_bytes >= end {
            return (first, first);
        }
        (first, end.div_ceil(self.granule_bytes()))
    }

    /// Marks every granule that `range` touches. Returns how many of them were clean.
    pub fn mark(&self, range: ByteRange) -> u64 {
        let (first, end) = self.touched(range);
        let mut newly = 0;
        each_word(&self.words, first, end, |word, mask| {
            let before = word.fetch_or(mask, Ordering::SeqCst);
            newly += u64::from((mask & !before).count_ones());
        });
        // Even if all were marked: who marked them may not have come this far yet.
        each_word(&self.summary, first / BITS, end.div_ceil(BITS), |word, mask| {
            // Usually set, and shared by many writers: do not dirty its cache line.
            if word.load(Ordering::SeqCst) & mask != mask {
                word.fetch_or(mask, Ordering::SeqCst);
            }
        });
        if newly > 0 {
            self.count.fetch_add(newly, Ordering::SeqCst);
        }
        newly
    }

    /// Marks everything.
    pub fn mark_all(&self) {
        self.mark(ByteRange { offset_bytes: 0, len_bytes: self.len_bytes });
    }

    /// Clears the granules that lie wholly within `range`, or reach from it to the disk's end.
    pub fn clear_within(&self, range: ByteRange) {
        let first = range.offset_bytes.div_ceil(self.granule_bytes());
        let end = match range.end() {
            end if end >= self.len_bytes => self.granules(),
            end => end >> self.granule_shift,
        };
        let mut cleared = 0;
        each_word(&self.words, first, end.max(first), |word, mask| {
            // Most words are clean: leave their pages untouched.
            if word.load(Ordering::SeqCst) & mask != 0 {
                let before = word.fetch_and(!mask, Ordering::SeqCst);
                cleared += u64::from((mask & before).count_ones());
            }
        });
        self.count.fetch_sub(cleared, Ordering::SeqCst);
    }

    /// Clears the first word from `from` on that is not zero. Returns its index and what it was: bit `n` is
    /// granule `64 * word + n`.
    pub fn take_next(&self, from: u64) -> Option<(u64, u64)> {
        let mut from = from;
        loop {
            let word = self.next_in_summary(from)?;
            from = word + 1;
            let (summary, bit) = (self.summary.get(index(word / BITS))?, 1 << (word % BITS));
            summary.fetch_and(!bit, Ordering::SeqCst);
            let bits = self.words.get(index(word))?.swap(0, Ordering::SeqCst);
            if bits != 0 {
                self.count.fetch_sub(bits.count_ones().into(), Ordering::SeqCst);
                return Some((word, bits));
            }
        }
    }

    /// The first word from `from` on that the summary names.
    fn next_in_summary(&self, from: u64) -> Option<u64> {
        let mut at = from / BITS;
        let mut mask = u64::MAX << (from % BITS);
        loop {
            let named = self.summary.get(index(at))?.load(Ordering::SeqCst) & mask;
            if named != 0 {
                return Some(at * BITS + u64::from(named.trailing_zeros()));
            }
            (at, mask) = (at + 1, u64::MAX);
        }
    }

    /// Whether the granule that holds `offset_bytes` is marked.
    pub fn is_marked(&self, offset_bytes: u64) -> bool {
        let granule = offset_bytes >> self.granule_shift;
        let word = self.words.get(index(granule / BITS));
        word.is_some_and(|word| word.load(Ordering::SeqCst) >> (granule % BITS) & 1 == 1)
    }

    /// Whether a granule that `range` touches is marked.
    pub fn is_any_marked(&self, range: ByteRange) -> bool {
        let (first, end) = self.touched(range);
        let mut any = 0;
        each_word(&self.words, first, end, |word, mask| any |= word.load(Ordering::SeqCst) & mask);
        any != 0
    }

    /// The whole granules that `range` touches, up to the disk's end.
    pub fn granules_of(&self, range: ByteRange) -> ByteRange {
        let (first, end) = self.touched(range);
        let (offset_bytes, end) = (first << self.granule_shift, end << self.granule_shift);
        ByteRange { offset_bytes, len_bytes: end.min(self.len_bytes).saturating_sub(offset_bytes) }
    }

    /// Number of marked granules, without a scan. While others mark and take, what they are about to add
    /// may be missing; it is never more than there are granules.
    pub fn marked_granules(&self) -> u64 {
        let count = self.count.load(Ordering::SeqCst);
        // Past the middle it is below zero.
        if count.cast_signed() < 0 { 0 } else { count.min(self.granules()) }
    }

    /// Total length of all marked granules, in bytes. As cheap as [`DirtyBitmap::marked_granules`].
    pub fn marked_bytes(&self) -> u64 {
        let granules = self.marked_granules();
        let whole = granules << self.granule_shift;
        let last = self.granules().saturating_sub(1) << self.granule_shift;
        let short = self.granule_bytes() - (self.len_bytes - last.min(self.len_bytes));
        if granules > 0 && self.is_marked(last) { whole - short } else { whole }
    }

    /// The first word from `from` on that is not zero, without clearing it.
    fn next_dirty_word(&self, from: u64) -> Option<(u64, u64)> {
        let mut from = from;
        loop {
            let word = self.next_in_summary(from)?;
            let bits = self.words.get(index(word))?.load(Ordering::SeqCst);
            if bits != 0 {
                return Some((word, bits));
            }
            from = word + 1;
        }
    }

    /// Runs of marked granules, as byte ranges in ascending order. Marks set meanwhile may be missed.
    pub fn runs(&self) -> impl Iterator<Item = ByteRange> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.next_marked(at)?;
            let end = self.next_clean(first);
            at = end;
            let offset_bytes = first << self.granule_shift;
            let end = (end << self.granule_shift).min(self.len_bytes);
            Some(ByteRange { offset_bytes, len_bytes: end - offset_bytes })
        })
    }

    /// The first run of marked granules that ends after `from_bytes`, of at most `most_bytes`: whole granules, at
    /// least one.
    pub fn next_run(&self, from_bytes: u64, most_bytes: u64) -> Option<ByteRange> {
        let first = self.next_marked(from_bytes >> self.granule_shift)?;
        let most = (most_bytes >> self.granule_shift).max(1);
        let end = self.next_clean_before(first, first.saturating_add(most));
        let offset_bytes = first << self.granule_shift;
        let end = (end << self.granule_shift).min(self.len_bytes);
        Some(ByteRange { offset_bytes, len_bytes: end.saturating_sub(offset_bytes) })
    }

    /// Whether `offset_bytes`, which must lie on the disk, is marked, and for how many bytes from there on the same
    /// holds. As for [`DirtyBitmap::runs`], marks set meanwhile may be missed.
    pub fn run_at(&self, offset_bytes: u64) -> (bool, u64) {
        let granule = offset_bytes >> self.granule_shift;
        let marked = self.next_marked(granule);
        let (is_marked, end) = match marked {
            Some(first) if first == granule => (true, self.next_clean(granule)),
            first => (false, first.unwrap_or(self.granules())),
        };
        // A mark may be set at `granule` after it was found clean, or cleared after it was found marked.
        let end = (end.max(granule + 1) << self.granule_shift).min(self.len_bytes);
        (is_marked, end.saturating_sub(offset_bytes))
    }

    /// The first marked granule from `from` on.
    fn next_marked(&self, from: u64) -> Option<u64> {
        let (word, mask) = (from / BITS, u64::MAX << (from % BITS));
        // What is left of a word in which a run has ended.
        let rest = self.words.get(index(word))?.load(Ordering::SeqCst) & mask;
        let (word, marked) = match rest {
            0 => self.next_dirty_word(word + 1)?,
            rest => (word, rest),
        };
        Some(word * BITS + u64::from(marked.trailing_zeros()))
    }

    /// The first granule from `from` on that is not marked, or their number.
    fn next_clean(&self, from: u64) -> u64 {
        self.next_clean_before(from, self.granules())
    }

    /// The first granule from `from` on that is not marked, or `end`.
    fn next_clean_before(&self, from: u64, end: u64) -> u64 {
        let end = end.min(self.granules());
        let mut word = from / BITS;
        while word * BITS < end
            && let Some(bits) = self.words.get(index(word))
        {
            let clean = !bits.load(Ordering::SeqCst) & mask_of(word, from, end);
            if clean != 0 {
                return word * BITS + u64::from(clean.trailing_zeros());
            }
            word += 1;
        }
        end
    }
}

#[cfg(test)]
mod tests;
