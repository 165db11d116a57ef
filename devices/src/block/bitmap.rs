//! A disk's dirty bitmap: one bit per granule, set by writers and taken by copiers, concurrently and
//! without a lock.
//!
//! [`super::BlockNode`] marks it after every write; block migration takes it word by word. A reader
//! that clears a bit before it reads misses nothing: what was written before the clear is in what it
//! reads, and what is written later marks the bit again.

use super::backend::ByteRange;
use std::sync::atomic::{AtomicU64, Ordering};
use zerocopy::FromZeros;

/// Default granule.
pub const DEFAULT_GRANULE_BYTES: u64 = 64 << 10;
/// Smallest granule: a sector.
const MIN_GRANULE_BYTES: u64 = 512;
const BITS: u64 = 64;

/// One bit per granule of a disk.
#[derive(Debug)]
pub struct DirtyBitmap {
    len_bytes: u64,
    granule_shift: u32,
    words: Box<[AtomicU64]>,
}

fn index(word: u64) -> usize {
    usize::try_from(word).expect("64-bit host")
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

impl DirtyBitmap {
    /// A clean bitmap for a disk of `len_bytes`. `None` if the granule is no power of two, or smaller
    /// than a sector, or if there is no memory for it.
    pub fn new(len_bytes: u64, granule_bytes: u64) -> Option<Self> {
        if !granule_bytes.is_power_of_two() || granule_bytes < MIN_GRANULE_BYTES {
            return None;
        }
        let words = len_bytes.div_ceil(granule_bytes).div_ceil(BITS);
        // Zeroed pages take no memory until they are written: a disk may be large and mostly unused.
        let words = <[AtomicU64]>::new_box_zeroed_with_elems(usize::try_from(words).ok()?).ok()?;
        Some(Self { len_bytes, granule_shift: granule_bytes.trailing_zeros(), words })
    }

    /// Bytes that one bit stands for; the last granule may be shorter.
    pub fn granule_bytes(&self) -> u64 {
        1 << self.granule_shift
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

    fn each_word(&self, first: u64, end: u64, mut visit: impl FnMut(&AtomicU64, u64)) {
        let mut word = first / BITS;
        while word * BITS < end {
            if let Some(place) = self.words.get(index(word)) {
                visit(place, mask_of(word, first, end));
            }
            word += 1;
        }
    }

    /// Marks every granule that `range` touches.
    pub fn mark(&self, range: ByteRange) {
        let (first, end) = self.touched(range);
        self.each_word(first, end, |word, mask| {
            word.fetch_or(mask, Ordering::SeqCst);
        });
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
        self.each_word(first, end.max(first), |word, mask| {
            word.fetch_and(!mask, Ordering::SeqCst);
        });
    }

    /// Clears word `word` and returns what it was. Bit `n` is granule `64 * word + n`.
    pub fn take_word(&self, word: u64) -> u64 {
        match self.words.get(index(word)) {
            // Most words are clean in a round: do not dirty their cache line.
            Some(word) if word.load(Ordering::SeqCst) != 0 => word.swap(0, Ordering::SeqCst),
            _ => 0,
        }
    }

    /// Whether the granule that holds `offset_bytes` is marked.
    pub fn is_marked(&self, offset_bytes: u64) -> bool {
        let granule = offset_bytes >> self.granule_shift;
        let word = self.words.get(index(granule / BITS));
        word.is_some_and(|word| word.load(Ordering::SeqCst) >> (granule % BITS) & 1 == 1)
    }

    /// Total length of all marked granules, in bytes.
    pub fn marked_bytes(&self) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Relaxed).count_ones());
        let granules: u64 = self.words.iter().map(ones).sum();
        let whole = granules << self.granule_shift;
        let last = self.granules().saturating_sub(1) << self.granule_shift;
        let short = self.granule_bytes() - (self.len_bytes - last.min(self.len_bytes));
        if granules > 0 && self.is_marked(last) { whole - short } else { whole }
    }

    /// Runs of marked granules, as byte ranges in ascending order. Marks set meanwhile may be missed.
    pub fn runs(&self) -> impl Iterator<Item = ByteRange> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.find(at, true)?;
            let end = self.find(first, false).unwrap_or_else(|| self.granules());
            at = end;
            let offset_bytes = first << self.granule_shift;
            let end = (end << self.granule_shift).min(self.len_bytes);
            Some(ByteRange { offset_bytes, len_bytes: end - offset_bytes })
        })
    }

    /// The first granule from `from` on whose bit equals `marked`.
    fn find(&self, from: u64, marked: bool) -> Option<u64> {
        let end = self.granules();
        let mut word = from / BITS;
        while word * BITS < end {
            let bits = self.words.get(index(word))?.load(Ordering::SeqCst);
            let wanted = (if marked { bits } else { !bits }) & mask_of(word, from, end);
            if wanted != 0 {
                return Some(word * BITS + u64::from(wanted.trailing_zeros()));
            }
            word += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(offset_bytes: u64, len_bytes: u64) -> ByteRange {
        ByteRange { offset_bytes, len_bytes }
    }

    /// One flag per granule.
    struct Naive {
        flags: Vec<bool>,
        granule: u64,
        len: u64,
    }

    impl Naive {
        fn span(&self, granule: usize) -> (u64, u64) {
            let start = granule as u64 * self.granule;
            (start, (start + self.granule).min(self.len))
        }

        fn mark(&mut self, range: ByteRange) {
            for granule in 0..self.flags.len() {
                let (start, end) = self.span(granule);
                if range.len_bytes > 0 && range.offset_bytes < end && range.end() > start {
                    self.flags[granule] = true;
                }
            }
        }

        fn clear_within(&mut self, range: ByteRange) {
            for granule in 0..self.flags.len() {
                let (start, end) = self.span(granule);
                if range.offset_bytes <= start && range.end() >= end {
                    self.flags[granule] = false;
                }
            }
        }

        fn runs(&self) -> Vec<ByteRange> {
            let mut runs: Vec<ByteRange> = Vec::new();
            for granule in (0..self.flags.len()).filter(|granule| self.flags[*granule]) {
                let (start, end) = self.span(granule);
                match runs.last_mut().filter(|run| run.end() == start) {
                    Some(run) => run.len_bytes += end - start,
                    None => runs.push(range(start, end - start)),
                }
            }
            runs
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Mark(ByteRange),
        Clear(ByteRange),
        Take(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let ranges = (0u64..300_000, 0u64..100_000).prop_map(|(at, len)| range(at, len));
        let step = (0..5, ranges, 0u64..10).prop_map(|(kind, range, word)| match kind {
            0..3 => Step::Mark(range),
            3 => Step::Clear(range),
            _ => Step::Take(word),
        });
        prop::collection::vec(step, 0..40)
    }

    proptest! {
        #[test]
        fn it_does_what_flags_one_by_one_would_do(
            steps in steps(), sectors in 1u64..600, shift in 9u32..17,
        ) {
            let (len, granule) = (sectors * 512, 1 << shift);
            let bitmap = DirtyBitmap::new(len, granule).unwrap();
            let count = usize::try_from(len.div_ceil(granule)).unwrap();
            let mut naive = Naive { flags: vec![false; count], granule, len };
            for step in steps {
                match step {
                    Step::Mark(range) => (bitmap.mark(range), naive.mark(range)).1,
                    Step::Clear(range) => {
                        bitmap.clear_within(range);
                        naive.clear_within(range);
                    }
                    Step::Take(word) => {
                        let bits = bitmap.take_word(word);
                        let first = usize::try_from(word * 64).unwrap();
                        for bit in 0..64 {
                            let flag = naive.flags.get_mut(first + bit);
                            let was = flag.is_some_and(std::mem::take);
                            prop_assert_eq!(bits >> bit & 1 == 1, was);
                        }
                    }
                }
                prop_assert_eq!(bitmap.runs().collect::<Vec<_>>(), naive.runs());
                let bytes: u64 = naive.runs().iter().map(|run| run.len_bytes).sum();
                prop_assert_eq!(bitmap.marked_bytes(), bytes);
                for granule in 0..count {
                    let marked = bitmap.is_marked(naive.span(granule).0);
                    prop_assert_eq!(marked, naive.flags[granule]);
                }
            }
        }
    }

    #[test]
    fn a_granule_is_a_power_of_two_of_at_least_a_sector() {
        for bad in [0, 1, 256, 513, 65_535] {
            assert!(DirtyBitmap::new(1 << 20, bad).is_none(), "{bad}");
        }
        let bitmap = DirtyBitmap::new(1 << 20, DEFAULT_GRANULE_BYTES).unwrap();
        assert_eq!((bitmap.granule_bytes(), bitmap.word_count()), (65_536, 1));
    }

    #[test]
    fn a_large_disk_takes_memory_only_for_what_is_marked() {
        let resident = || -> u64 {
            let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
            pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
        };
        let before = resident();
        let bitmap = DirtyBitmap::new(16 << 40, 512).unwrap();
        bitmap.mark(range(8 << 40, 1 << 20));
        assert_eq!((bitmap.word_count(), bitmap.is_marked(8 << 40)), (1 << 29, true));
        let grown = resident().saturating_sub(before);
        assert!(grown < 1 << 30, "{grown} bytes for a bitmap of 4 GiB");
    }

    #[test]
    fn nothing_past_the_end_is_ever_marked() {
        let bitmap = DirtyBitmap::new(3 * 65_536 + 512, 65_536).unwrap();
        bitmap.mark_all();
        bitmap.mark(range(u64::MAX - 5, 100));
        assert_eq!(bitmap.marked_bytes(), 3 * 65_536 + 512);
        assert_eq!((bitmap.take_word(0), bitmap.take_word(7)), (0b1111, 0));
        assert_eq!(bitmap.marked_bytes(), 0);
    }
}
