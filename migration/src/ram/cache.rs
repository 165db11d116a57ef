//! Remembers the versions of pages that the destination has: whole pages, or their digests. One of each
//! per shard, used by `encode`, which looks a page up before sending it and stores what it sent. Holds
//! values and ages; deltas are `xbzrle`'s business.
//!
//! A page used in this generation or the last one is never evicted: with a working set larger than the
//! cache, each page would otherwise evict the next one needed, and no lookup would ever hit. The cache is
//! fully associative, so neither the distribution over shards nor the layout of the working set causes
//! conflicts.

use super::page::Page;
use devices::ram::PageIndex;
use std::cmp::Reverse;
use std::collections::{HashMap, TryReserveError};
use std::hash::{BuildHasher, Hasher, RandomState};

/// Memory is allocated on demand, in pieces of this many pages.
const PIECE_PAGES: usize = 256;
/// Generations during which a used page cannot be evicted.
const PROTECTED_GENERATIONS: u64 = 2;

/// Copies of pages, with ages.
pub type PageCache = Cache<Page>;

/// A value for each of some pages, with ages.
#[derive(Debug)]
pub struct Cache<T> {
    /// Most pages to hold.
    capacity: usize,
    /// Index of each page's entry, and of its value in the pieces.
    places: HashMap<PageIndex, usize, PageHash>,
    entries: Vec<Entry>,
    /// Places without a page.
    free: Vec<usize>,
    pieces: Vec<Box<[T]>>,
    generation: u64,
    /// Clock hand: the next entry to consider for eviction.
    hand: usize,
    /// Entries not yet considered in this generation. Pages do not age within one, so each is considered
    /// only once.
    unseen: usize,
    /// Reserves a piece's memory; a test's fails.
    reserve: fn(&mut Vec<T>, usize) -> Result<(), TryReserveError>,
}

/// Hashes page numbers by multiplications with random factors. The guest chooses which pages it writes, and
/// so the keys; it knows neither the factors nor how long a look-up takes.
#[derive(Debug, Clone, Copy)]
struct PageHash {
    factors: [u64; 2],
}

impl Default for PageHash {
    fn default() -> Self {
        let random = RandomState::new();
        // Odd, so that no two page numbers become one.
        Self { factors: [0u64, 1].map(|number| random.hash_one(number) | 1) }
    }
}

impl BuildHasher for PageHash {
    type Hasher = PageHasher;

    fn build_hasher(&self) -> PageHasher {
        PageHasher { factors: self.factors, hash: 0 }
    }
}

struct PageHasher {
    factors: [u64; 2],
    hash: u64,
}

impl Hasher for PageHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        // Twice: equal steps would come out of one multiplication as equal steps.
        self.hash = self.factors.iter().fold(self.hash ^ number, |hash, factor| {
            let product = u128::from(hash) * u128::from(*factor);
            (product >> 64) as u64 ^ hash.wrapping_mul(*factor)
        });
    }

    fn finish(&self) -> u64 {
        self.hash
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    page: PageIndex,
    /// Generation of the last use.
    generation: u64,
}

impl<T: Copy> Default for Cache<T> {
    fn default() -> Self {
        Self::new(0)
    }
}

impl<T: Copy> Cache<T> {
    /// Bytes per page.
    pub const VALUE_BYTES: usize = size_of::<T>();

    /// A cache of at most `bytes` of values, allocated on demand.
    pub fn new(bytes: usize) -> Self {
        Self {
            capacity: bytes / Self::VALUE_BYTES,
            places: HashMap::default(),
            entries: Vec::new(),
            free: Vec::new(),
            pieces: Vec::new(),
            generation: 0,
            hand: 0,
            unseen: 0,
            reserve: Vec::try_reserve_exact,
        }
    }

    /// Most bytes of values.
    pub fn capacity_bytes(&self) -> usize {
        self.capacity * Self::VALUE_BYTES
    }

    /// Pages held.
    pub fn page_count(&self) -> usize {
        self.places.len()
    }

    /// Bytes allocated for values.
    pub fn memory_bytes(&self) -> usize {
        self.pieces.len() * PIECE_PAGES * Self::VALUE_BYTES
    }

    /// Starts a new generation: all pages age.
    pub fn advance(&mut self) {
        self.generation += 1;
        self.unseen = self.entries.len();
    }

    /// The destination's version of `page`, if known. Counts as a use. A caller that sends a newer version
    /// stores it here.
    pub fn lookup(&mut self, page: PageIndex) -> Option<&mut T> {
        let place = *self.places.get(&page)?;
        self.entries[place].generation = self.generation;
        Some(self.at(place))
    }

    /// Records that the destination has `value` for `page`. Returns false if `page` is not cached and no
    /// entry may be evicted. Where this host has no memory for more, the cache stays as large as it is.
    pub fn insert(&mut self, page: PageIndex, value: &T) -> bool {
        if let Some(known) = self.lookup(page) {
            *known = *value;
            return true;
        }
        let entry = Entry { page, generation: self.generation };
        let place = if let Some(place) = self.free.pop() {
            self.entries[place] = entry;
            place
        } else if self.entries.len() < self.capacity && self.has_memory_for_one_more(value) {
            self.entries.push(entry);
            self.entries.len() - 1
        } else {
            let Some(place) = self.evict() else { return false };
            self.entries[place] = entry;
            place
        };
        self.places.insert(page, place);
        *self.at(place) = *value;
        true
    }

    /// Allocates what a further entry needs. If that fails, says so and gives up growing.
    fn has_memory_for_one_more(&mut self, value: &T) -> bool {
        let mut grow = || {
            self.entries.try_reserve(1)?;
            self.places.try_reserve(1)?;
            if self.entries.len() / PIECE_PAGES == self.pieces.len() {
                let mut piece = Vec::new();
                (self.reserve)(&mut piece, PIECE_PAGES)?;
                piece.resize(PIECE_PAGES, *value);
                self.pieces.push(piece.into_boxed_slice());
            }
            Ok::<_, TryReserveError>(())
        };
        let Err(error) = grow() else { return true };
        self.capacity = self.entries.len();
        let bytes = self.capacity_bytes();
        log::warn!(
            "the XBZRLE cache stays at {bytes} bytes, this host has no memory for more: {error}"
        );
        false
    }

    /// Drops `page`: the destination's version is no longer known.
    pub fn forget(&mut self, page: PageIndex) {
        self.free.extend(self.places.remove(&page));
    }

    /// Changes the size. When shrinking, the most recently used pages stay, and unused memory is freed.
    pub fn resize(&mut self, bytes: usize) {
        self.capacity = bytes / Self::VALUE_BYTES;
        self.hand = 0;
        self.unseen = self.entries.len();
        if self.entries.len() <= self.capacity {
            return;
        }
        let end = self.capacity;
        let mut kept: Vec<usize> = self.places.values().copied().collect();
        if kept.len() > end {
            // Only which pages are the oldest matters, not their order.
            kept.select_nth_unstable_by_key(end, |place| Reverse(self.entries[*place].generation));
            for place in kept.drain(end..) {
                self.places.remove(&self.entries[place].page);
            }
        }
        // Pages past the new end move into free places before it.
        let mut holes = vec![true; end];
        kept.iter().filter(|place| **place < end).for_each(|place| holes[*place] = false);
        self.free = (0..end).filter(|place| holes[*place]).collect();
        for from in kept.into_iter().filter(|place| *place >= end) {
            // There are at most as many as free places.
            let Some(to) = self.free.pop() else { break };
            let (entry, value) = (self.entries[from], *self.at(from));
            self.entries[to] = entry;
            *self.at(to) = value;
            self.places.insert(entry.page, to);
        }
        self.entries.truncate(end);
        self.pieces.truncate(end.div_ceil(PIECE_PAGES));
        self.unseen = self.entries.len();
        // Not at every step of a cache that shrinks by and by: it moves all that is left.
        if self.entries.capacity() / 2 > self.entries.len() {
            self.entries.shrink_to_fit();
            self.places.shrink_to_fit();
        }
    }

    /// Evicts a page that was not used lately and returns its place.
    fn evict(&mut self) -> Option<usize> {
        while self.unseen > 0 {
            self.unseen -= 1;
            let place = self.hand;
            self.hand = (place + 1) % self.entries.len();
            let entry = self.entries[place];
            if entry.generation + PROTECTED_GENERATIONS <= self.generation {
                self.places.remove(&entry.page);
                return Some(place);
            }
        }
        None
    }

    fn at(&mut self, place: usize) -> &mut T {
        &mut self.pieces[place / PIECE_PAGES][place % PIECE_PAGES]
    }
}

#[cfg(test)]
mod tests {
    use super::super::page::PAGE_BYTES;
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn page(byte: u8) -> Page {
        [byte; PAGE_BYTES]
    }

    #[test]
    fn memory_is_taken_when_it_is_needed_and_given_back() {
        let mut cache = PageCache::new(1 << 30);
        assert_eq!((cache.capacity_bytes(), cache.memory_bytes()), (1 << 30, 0));
        for index in 0..300 {
            assert!(cache.insert(PageIndex(index), &page(1)));
        }
        assert_eq!(cache.memory_bytes(), 2 << 20);
        cache.resize(100 * PAGE_BYTES + 5);
        assert_eq!((cache.page_count(), cache.memory_bytes()), (100, 1 << 20));
        cache.resize(0);
        assert_eq!((cache.page_count(), cache.memory_bytes()), (0, 0));
        assert!(!cache.insert(PageIndex(1), &page(1)));
        cache.advance();
        assert!(!cache.insert(PageIndex(1), &page(1)));
        assert!(cache.lookup(PageIndex(1)).is_none());
        cache.resize(PAGE_BYTES);
        assert!(cache.insert(PageIndex(1), &page(7)));
        assert_eq!(cache.lookup(PageIndex(1)), Some(&mut page(7)));
    }

    #[test]
    fn a_host_without_memory_for_more_leaves_the_cache_as_large_as_it_is() {
        let mut cache = PageCache::new(1 << 30);
        for index in 0..300 {
            assert!(cache.insert(PageIndex(index), &page(1)));
        }
        // More than any host has.
        cache.reserve = |piece, _| piece.try_reserve_exact(usize::MAX);
        // As far as the memory reaches that it has.
        for index in 300..512 {
            assert!(cache.insert(PageIndex(index), &page(1)));
        }
        assert!(!cache.insert(PageIndex(512), &page(2)));
        let full = (512, 512 * PAGE_BYTES, 512 * PAGE_BYTES);
        let size =
            |cache: &PageCache| (cache.page_count(), cache.capacity_bytes(), cache.memory_bytes());
        assert_eq!(size(&cache), full);
        for index in 0..512 {
            assert_eq!(cache.lookup(PageIndex(index)), Some(&mut page(1)), "{index}");
        }
        // It goes on with what it has, and does not try again by itself…
        cache.reserve = Vec::try_reserve_exact;
        cache.advance();
        cache.advance();
        assert!(cache.insert(PageIndex(512), &page(2)));
        assert_eq!(cache.lookup(PageIndex(512)), Some(&mut page(2)));
        assert_eq!(size(&cache), full);
        // …but when it is told to.
        cache.resize(1 << 30);
        assert!(cache.insert(PageIndex(513), &page(3)));
        assert_eq!((cache.page_count(), cache.memory_bytes()), (513, 3 << 20));
    }

    #[test]
    fn a_page_that_was_used_lately_stays() {
        let mut cache = PageCache::new(2 * PAGE_BYTES);
        assert!(cache.insert(PageIndex(1), &page(1)));
        assert!(cache.insert(PageIndex(2), &page(2)));
        assert!(!cache.insert(PageIndex(3), &page(3)));
        cache.advance();
        assert!(!cache.insert(PageIndex(3), &page(3)));
        assert!(cache.lookup(PageIndex(1)).is_some());
        cache.advance();
        // Page 2 is two generations old, page 1 one.
        assert!(cache.insert(PageIndex(3), &page(3)));
        assert!(!cache.insert(PageIndex(4), &page(4)));
        assert!(cache.lookup(PageIndex(2)).is_none());
        assert_eq!(cache.lookup(PageIndex(1)), Some(&mut page(1)));
        assert_eq!(cache.lookup(PageIndex(3)), Some(&mut page(3)));
    }

    #[test]
    fn a_working_set_larger_than_the_cache_still_hits() {
        let mut cache = PageCache::new(64 * PAGE_BYTES);
        let mut hits = 0;
        for _ in 0..10 {
            for index in 0..96 {
                match cache.lookup(PageIndex(index)) {
                    Some(_) => hits += 1,
                    None => _ = cache.insert(PageIndex(index), &page(0)),
                }
            }
            cache.advance();
        }
        assert_eq!(hits, 9 * 64);
    }

    #[test]
    fn shrinking_keeps_the_pages_used_last() {
        let mut cache = PageCache::new(10 * PAGE_BYTES);
        for index in 0..10u8 {
            cache.insert(PageIndex(index.into()), &page(index));
        }
        cache.advance();
        for index in [1, 5, 8, 9] {
            cache.lookup(PageIndex(index));
        }
        cache.resize(4 * PAGE_BYTES);
        for index in 0..10u8 {
            let expected = [1, 5, 8, 9].contains(&index).then(|| page(index));
            assert_eq!(cache.lookup(PageIndex(index.into())).copied(), expected, "{index}");
        }
    }

    #[test]
    fn page_numbers_of_any_stride_are_spread() {
        for shift in [0, 3, 9, 18, 32] {
            let hash = PageHash::default();
            let hashes = (0..4096u64).map(|number| hash.hash_one(PageIndex(number << shift)));
            // A map of 8192 buckets picks one by the low bits, and compares the high ones first.
            let buckets: HashSet<_> = hashes.clone().map(|hash| hash % 8192).collect();
            let tags: HashSet<_> = hashes.map(|hash| hash >> 57).collect();
            // Of random numbers 3223 would differ, on average.
            assert!(buckets.len() > 2000 && tags.len() > 64, "{shift}: {}", buckets.len());
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Lookup(u64),
        Insert(u64, u8),
        Forget(u64),
        Advance,
        Resize(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (0..40u64).prop_map(Step::Lookup),
            16 => (0..40u64, any::<u8>()).prop_map(|(page, byte)| Step::Insert(page, byte)),
            3 => (0..40u64).prop_map(Step::Forget),
            3 => Just(Step::Advance),
            1 => (0..30usize).prop_map(Step::Resize),
        ]
    }

    proptest! {
        /// The model knows content and age of every page, and takes the cache's word only for which
        /// of several old pages was evicted.
        #[test]
        fn it_behaves_like_a_plain_table(steps in prop::collection::vec(step(), 0..400)) {
            let (mut capacity, mut generation) = (8usize, 0u64);
            let mut cache = PageCache::new(capacity * PAGE_BYTES);
            let mut model: HashMap<u64, (u8, u64)> = HashMap::new();
            for step in steps {
                match step {
                    Step::Lookup(index) => {
                        let found = cache.lookup(PageIndex(index)).copied();
                        prop_assert!(found == model.get(&index).map(|known| page(known.0)));
                        model.entry(index).and_modify(|known| known.1 = generation);
                    }
                    Step::Insert(index, byte) => {
                        let room = model.len() < capacity;
                        let old = model.values().any(|known| known.1 + 2 <= generation);
                        let fits = model.contains_key(&index) || room || (capacity > 0 && old);
                        prop_assert_eq!(cache.insert(PageIndex(index), &page(byte)), fits);
                        if fits {
                            model.insert(index, (byte, generation));
                        }
                        if model.len() > capacity {
                            let mut gone = model.keys().copied().filter(|index| {
                                !cache.places.contains_key(&PageIndex(*index))
                            });
                            let victim = gone.next().unwrap();
                            prop_assert!(gone.next().is_none());
                            prop_assert!(model[&victim].1 + 2 <= generation);
                            model.remove(&victim);
                        }
                    }
                    Step::Forget(index) => {
                        cache.forget(PageIndex(index));
                        model.remove(&index);
                    }
                    Step::Advance => {
                        cache.advance();
                        generation += 1;
                    }
                    Step::Resize(pages) => {
                        cache.resize(pages * PAGE_BYTES);
                        capacity = pages;
                        let before = model.clone();
                        model.retain(|index, _| cache.places.contains_key(&PageIndex(*index)));
                        prop_assert_eq!(model.len(), before.len().min(capacity));
                        let oldest = model.values().map(|known| known.1).min();
                        let gone = before.iter().filter(|(index, _)| !model.contains_key(index));
                        let youngest_gone = gone.map(|(_, known)| known.1).max();
                        prop_assert!(capacity == 0 || youngest_gone <= oldest || youngest_gone.is_none());
                    }
                }
                prop_assert_eq!(cache.page_count(), model.len());
            }
            for (index, (byte, _)) in model {
                prop_assert!(cache.lookup(PageIndex(index)).copied() == Some(page(byte)));
            }
        }
    }
}
