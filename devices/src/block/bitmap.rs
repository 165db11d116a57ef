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

    /// The first marked granule from `from` on.
    fn next_marked(&self, from: u64) -> Option<u64> {
        let (mut word, mut mask) = (from / BITS, u64::MAX << (from % BITS));
        loop {
            let named = self.next_in_summary(word)?;
            if named != word {
                mask = u64::MAX;
            }
            let marked = self.words.get(index(named))?.load(Ordering::SeqCst) & mask;
            if marked != 0 {
                return Some(named * BITS + u64::from(marked.trailing_zeros()));
            }
            (word, mask) = (named + 1, u64::MAX);
        }
    }

    /// The first granule from `from` on that is not marked, or their number.
    fn next_clean(&self, from: u64) -> u64 {
        let end = self.granules();
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

        fn count(&self) -> u64 {
            self.flags.iter().filter(|flag| **flag).count() as u64
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
        /// The first dirty word from here on.
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
                    Step::Mark(range) => {
                        let before = naive.count();
                        naive.mark(range);
                        prop_assert_eq!(bitmap.mark(range), naive.count() - before);
                    }
                    Step::Clear(range) => {
                        bitmap.clear_within(range);
                        naive.clear_within(range);
                    }
                    Step::Take(from) => {
                        let first_word = usize::try_from(from).unwrap();
                        let mut words = naive.flags.chunks_mut(64).enumerate().skip(first_word);
                        let dirty = words.find(|(_, flags)| flags.contains(&true));
                        let dirty = dirty.map(|(word, flags)| {
                            let bit = |(at, flag): (usize, &mut bool)| u64::from(std::mem::take(flag)) << at;
                            (word as u64, flags.iter_mut().enumerate().map(bit).sum())
                        });
                        prop_assert_eq!(bitmap.take_next(from), dirty);
                    }
                }
                prop_assert_eq!(bitmap.runs().collect::<Vec<_>>(), naive.runs());
                let bytes: u64 = naive.runs().iter().map(|run| run.len_bytes).sum();
                prop_assert_eq!(bitmap.marked_bytes(), bytes);
                prop_assert_eq!(bitmap.marked_granules(), naive.count());
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
        assert_eq!((bitmap.take_next(0), bitmap.take_next(0)), (Some((0, 0b1111)), None));
        assert_eq!(bitmap.take_next(u64::MAX), None);
        assert_eq!(bitmap.marked_bytes(), 0);
    }

    #[test]
    fn many_that_mark_and_take_at_once_lose_nothing_and_the_count_is_exact() {
        use std::sync::atomic::AtomicBool;
        const LEN: u64 = 64 << 20;
        const GRANULE: u64 = 4096;
        let bitmap = DirtyBitmap::new(LEN, GRANULE).unwrap();
        let stop = AtomicBool::new(false);
        // How often each granule was found clean by a mark, or dirty by a take.
        let balance: Vec<AtomicU64> =
            std::iter::repeat_with(AtomicU64::default).take(index(LEN / GRANULE)).collect();
        std::thread::scope(|scope| {
            let (bitmap, stop, balance) = (&bitmap, &stop, &balance);
            for seed in 1..=3u64 {
                scope.spawn(move || {
                    let mut random = seed;
                    for _ in 0..60_000 {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        // A few hot words, so that threads meet there.
                        let granule = (random >> 20) % 150;
                        let granule = if random % 4 == 0 { granule * 109 } else { granule };
                        let newly = bitmap.mark(range(granule * GRANULE, 1));
                        balance[index(granule)].fetch_add(newly, Ordering::SeqCst);
                    }
                    stop.store(true, Ordering::SeqCst);
                });
            }
            for _ in 0..2 {
                scope.spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        let mut at = 0;
                        while let Some((word, bits)) = bitmap.take_next(at) {
                            for bit in (0..BITS).filter(|bit| bits >> bit & 1 == 1) {
                                balance[index(word * BITS + bit)].fetch_sub(1, Ordering::SeqCst);
                            }
                            at = word + 1;
                        }
                        let marked = bitmap.marked_granules();
                        assert!(marked <= LEN / GRANULE, "{marked} granules");
                        assert!(bitmap.marked_bytes() <= LEN);
                    }
                });
            }
        });
        let ones: u32 =
            bitmap.words.iter().map(|word| word.load(Ordering::SeqCst).count_ones()).sum();
        assert_eq!(bitmap.marked_granules(), u64::from(ones));
        for (granule, balance) in (0u64..).zip(&balance) {
            let marked = u64::from(bitmap.is_marked(granule * GRANULE));
            assert_eq!(balance.load(Ordering::SeqCst), marked, "granule {granule}");
        }
        // Every mark is found, through the summary.
        let mut found = 0;
        while let Some((_, bits)) = bitmap.take_next(0) {
            found += bits.count_ones();
        }
        assert_eq!((found, bitmap.marked_granules()), (ones, 0));
    }

    #[test]
    fn a_terabyte_with_a_thousandth_dirty_is_scanned_in_a_moment() {
        const TIB: u64 = 1 << 40;
        const GRANULE: u64 = 16 << 10;
        let bitmap = DirtyBitmap::new(TIB, GRANULE).unwrap();
        let scan = || {
            let (mut at, mut found) = (0, 0u64);
            while let Some((word, bits)) = bitmap.take_next(at) {
                found += u64::from(bits.count_ones());
                at = word + 1;
            }
            found
        };
        // The shortest of some times to look at all that is marked, and to take it.
        let best = |spread: u64| {
            let mut best = [std::time::Duration::MAX; 2];
            for _ in 0..10 {
                // Runs of `spread` granules, every thousandth of the disk's.
                for first in (0..TIB / GRANULE).step_by(index(1000 * spread)) {
                    bitmap.mark(range(first * GRANULE, spread * GRANULE));
                }
                let marked = bitmap.marked_granules();
                let began = std::time::Instant::now();
                let bytes: u64 = bitmap.runs().map(|run| run.len_bytes).sum();
                let looked = began.elapsed();
                assert_eq!((bytes, scan()), (marked * GRANULE, marked));
                best = [best[0].min(looked), best[1].min(began.elapsed() - looked)];
            }
            best
        };
        let (runs, single) = (best(64), best(1));
        let began = std::time::Instant::now();
        assert_eq!(scan(), 0);
        let clean = began.elapsed();
        println!(
            "0.1 % dirty, looked at and taken: {runs:?} in runs of 1 MiB, {single:?} alone; clean {clean:?}"
        );
        // Generous, for a build without optimization on a busy machine; without a summary it would be more.
        assert!(clean < std::time::Duration::from_millis(5), "{clean:?}");
    }
}
