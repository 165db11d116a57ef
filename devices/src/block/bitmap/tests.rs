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
    let ones: u32 = bitmap.words.iter().map(|word| word.load(Ordering::SeqCst).count_ones()).sum();
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

/// A bitmap with the flags of every granule.
fn both(len: u64, granule: u64, marks: &[ByteRange]) -> (DirtyBitmap, Naive) {
    let count = usize::try_from(len.div_ceil(granule)).unwrap();
    let mut naive = Naive { flags: vec![false; count], granule, len };
    let bitmap = DirtyBitmap::new(len, granule).unwrap();
    for mark in marks {
        bitmap.mark(*mark);
        naive.mark(*mark);
    }
    (bitmap, naive)
}

fn marks() -> impl Strategy<Value = Vec<ByteRange>> {
    // The first sectors, and the last of an odd size.
    let at = prop_oneof![0u64..400_000, 39_000_000..40_000_000u64];
    prop::collection::vec((at, 0u64..70_000).prop_map(|(at, len)| range(at, len)), 0..12)
}

proptest! {
    #[test]
    fn a_merge_marks_what_a_granule_of_the_other_touches(
        here in marks(), there in marks(), shifts in (9u32..17, 9u32..17), equal in any::<bool>(),
        sectors in prop_oneof![1u64..800, 77_000..78_125u64],
    ) {
        let (len, to, from) = (sectors * 512, 1 << shifts.0, 1 << shifts.1);
        let (target, mut expected) = both(len, to, &here);
        let (source, naive) = both(len, if equal { to } else { from }, &there);
        naive.runs().iter().for_each(|run| expected.mark(*run));
        target.merge_from(&source);
        prop_assert_eq!(target.runs().collect::<Vec<_>>(), expected.runs());
        prop_assert_eq!(target.marked_granules(), expected.count());
        prop_assert_eq!(source.runs().collect::<Vec<_>>(), naive.runs());
        let copy = target.copy().unwrap();
        prop_assert_eq!(copy.runs().collect::<Vec<_>>(), expected.runs());
        prop_assert_eq!(copy.marked_granules(), expected.count());
    }

    #[test]
    fn chunks_carry_all_of_it_in_any_order(
        marks in marks(), before in marks(), sectors in prop_oneof![1u64..800, 77_000..78_125u64],
        shift in 9u32..14, seed in any::<usize>(),
    ) {
        let (len, granule) = (sectors * 512, 1 << shift);
        let (source, _) = both(len, granule, &marks);
        let (target, mut expected) = both(len, granule, &before);
        marks.iter().for_each(|mark| expected.mark(*mark));
        let mut chunks: Vec<_> = source.chunks().collect();
        let mut at = 0;
        for chunk in &chunks {
            prop_assert_eq!(chunk.offset_bytes, at);
            prop_assert!(chunk.len_bytes() > 0);
            at += chunk.len_bytes();
        }
        prop_assert_eq!(at, source.serialized_bytes());
        let first = seed % chunks.len();
        chunks.rotate_left(first);
        let carried: u64 = chunks.iter().map(|chunk| target.load_chunk(chunk).unwrap()).sum();
        prop_assert_eq!(carried, source.marked_granules());
        prop_assert_eq!(target.runs().collect::<Vec<_>>(), expected.runs());
        prop_assert_eq!(target.marked_granules(), expected.count());
        if before.is_empty() {
            prop_assert_eq!(target.sha256(), source.sha256());
        }
    }

    #[test]
    fn no_chunk_whatsoever_does_harm(
        offset_bytes in prop_oneof![0u64..100, any::<u64>()],
        data in prop::collection::vec(any::<u8>(), 0..100), zero in prop::option::of(any::<u64>()),
    ) {
        // 100 granules: 36 bits of the second word.
        let bitmap = DirtyBitmap::new(100 * 512, 512).unwrap();
        let content = zero.map_or(Content::Data(data), Content::Zero);
        match bitmap.load_chunk(&Chunk { offset_bytes, content }) {
            Ok(carried) => prop_assert_eq!(bitmap.marked_granules(), carried),
            Err(_) => prop_assert_eq!(bitmap.runs().count(), 0),
        }
        prop_assert!(bitmap.runs().all(|run| run.end() <= bitmap.len_bytes()));
    }
}

#[test]
fn a_bad_chunk_is_refused_with_its_reason_and_marks_nothing() {
    let bitmap = DirtyBitmap::new(100 * 512, 512).unwrap();
    let data =
        |offset_bytes, len: usize| Chunk { offset_bytes, content: Content::Data(vec![1; len]) };
    let zero = |offset_bytes, len| Chunk { offset_bytes, content: Content::Zero(len) };
    for (bad, why) in [
        (data(4, 8), ChunkError::Misaligned { offset_bytes: 4, len_bytes: 8 }),
        (data(0, 9), ChunkError::Misaligned { offset_bytes: 0, len_bytes: 9 }),
        (zero(0, 12), ChunkError::Misaligned { offset_bytes: 0, len_bytes: 12 }),
        (data(8, 16), ChunkError::Outside { offset_bytes: 8, len_bytes: 16, bitmap_bytes: 16 }),
        (zero(16, 8), ChunkError::Outside { offset_bytes: 16, len_bytes: 8, bitmap_bytes: 16 }),
        (
            zero(8, u64::MAX - 7),
            ChunkError::Outside { offset_bytes: 8, len_bytes: u64::MAX - 7, bitmap_bytes: 16 },
        ),
        (data(0, 16), ChunkError::PastEnd { offset_bytes: 0 }),
    ] {
        assert_eq!(bitmap.load_chunk(&bad), Err(why), "{bad:?}");
    }
    let large = DirtyBitmap::new(1 << 40, 65_536).unwrap();
    let len = usize::try_from(CHUNK_BYTES + 8).unwrap();
    let why = ChunkError::TooLong { len_bytes: CHUNK_BYTES + 8 };
    assert_eq!(large.load_chunk(&data(0, len)), Err(why));
    assert_eq!((bitmap.marked_granules(), large.marked_granules()), (0, 0));
}

#[test]
fn a_clean_bitmap_of_a_large_disk_is_a_single_chunk() {
    let bitmap = DirtyBitmap::new(16 << 40, 65_536).unwrap();
    let zeroes = |offset_bytes, len| Chunk { offset_bytes, content: Content::Zero(len) };
    let all = 32 << 20;
    assert_eq!(bitmap.chunks().collect::<Vec<_>>(), [zeroes(0, all)]);
    // Marked and taken: the summary may still name it.
    bitmap.mark(range(8 << 40, 1));
    let chunks: Vec<_> = bitmap.chunks().collect();
    assert_eq!(chunks.len(), 3);
    assert_eq!((&chunks[0], chunks[1].len_bytes()), (&zeroes(0, all / 2), CHUNK_BYTES));
    let rest = all / 2 + CHUNK_BYTES;
    assert_eq!(chunks[2], zeroes(rest, all - rest));
    bitmap.clear_within(range(0, 16 << 40));
    assert_eq!(bitmap.chunks().collect::<Vec<_>>(), [zeroes(0, all)]);
}

#[test]
fn the_digest_is_that_of_the_words_as_little_endian_bytes() {
    let bitmap = DirtyBitmap::new(65 * 512, 512).unwrap();
    bitmap.mark(range(512, 512));
    bitmap.mark(range(64 * 512, 512));
    // printf '\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0' | sha256sum
    assert_eq!(bitmap.sha256(), "66c313335fc249aefd7420b063da1bbd123fa61351b9517955aa2623eba94038");
}
