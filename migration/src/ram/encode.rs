//! A shard's encoders: turns copies of pages into deltas, compressed runs or raw pages. Called by `shard`
//! while an encoder is worth trying; otherwise pages go straight from guest RAM. Owns the caches, the
//! compressor, and the decision whether to use them; sends nothing.
//!
//! ```text
//! guest RAM ─copy▶ page ─▶ zero? ─▶ known by copy or digest? changed in few places? ─▶ delta
//!                                            └─▶ staged ─▶ compresses? ─▶ packed
//!                                                                 └─▶ raw
//! ```
//!
//! **Copies and digests share XBZRLE's memory.** A working set that fits is kept as copies, with deltas
//! exact to the byte. Once copies run out of room, digests get a growing share of the memory, up to three
//! quarters: a digest takes an eighth of the space, but only resolves lines.

use super::adaptive::{Adaptive, Trial};
use super::cache::PageCache;
use super::compress::{Compressor, Method, MethodError};
use super::digest::{DigestCache, Digester, encode_lines};
use super::error::{RamError, WantError};
use super::frame::{MAX_DELTA_BYTES, Packing};
use super::page::{PAGE_BYTES, Page};
use super::xbzrle::{Encoded, Encoder as Xbzrle};
use crate::bytes::is_zero;
use crate::stats::{CompressionStats, XbzrleStats};
use crate::wire::Encoder;
use devices::ram::PageIndex;
use std::time::{Duration, Instant};

/// Staged pages are sent once there are this many: compressed in one piece, and still in the CPU cache.
const STAGED_PAGES: usize = 128;
/// Deltas are sent once there are this many bytes.
const DELTA_BYTES: usize = 256 << 10;
/// A longer delta saves too little.
const MAX_USEFUL_DELTA: usize = PAGE_BYTES - PAGE_BYTES / 8;

const _: () = assert!(DELTA_BYTES + MAX_USEFUL_DELTA + 2 <= MAX_DELTA_BYTES);

/// Which encoders to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Bytes of this shard's XBZRLE cache; `None` if XBZRLE is off.
    pub cache_bytes: Option<usize>,
    pub method: Option<Method>,
}

/// What became of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Zero,
    /// Its delta is in [`Encoding::deltas`].
    Delta,
    /// It is in [`Encoding::staged`].
    Staged,
    /// The destination has this version: send nothing.
    Unchanged,
}

const ZEROES: Page = [0; PAGE_BYTES];

/// Digests get memory in steps of this size, or of this part of a large cache: each step looks at every copy.
const DIGEST_STEP_BYTES: usize = 1 << 20;
const DIGEST_STEPS: usize = 64;

struct Deltas {
    copies: PageCache,
    digests: DigestCache,
    /// Copies and digests together.
    cache_bytes: usize,
    digester: Digester,
    encoder: Xbzrle,
    worth: Adaptive,
    /// Since the encoder was last judged.
    trial: Trial,
    /// Of the batch being encoded: pages taken, and those of them that deltas were tried on.
    taken_pages: u32,
    tried_pages: u32,
}

impl Deltas {
    fn new(cache_bytes: usize, digester: Digester) -> Self {
        Self {
            copies: PageCache::new(cache_bytes),
            digests: DigestCache::new(0),
            cache_bytes,
            digester,
            encoder: Xbzrle::default(),
            worth: Adaptive::default(),
            trial: Trial::default(),
            taken_pages: 0,
            tried_pages: 0,
        }
    }

    fn resize(&mut self, cache_bytes: usize) {
        if self.cache_bytes != cache_bytes {
            self.cache_bytes = cache_bytes;
            self.share(self.digests.capacity_bytes().min(Self::most_digest_bytes(cache_bytes)));
        }
    }

    fn most_digest_bytes(cache_bytes: usize) -> usize {
        cache_bytes / 4 * 3
    }

    fn share(&mut self, digest_bytes: usize) {
        self.digests.resize(digest_bytes);
        self.copies.resize(self.cache_bytes - digest_bytes);
    }

    /// Drops all versions: they are no longer the destination's.
    fn forget_all(&mut self) {
        self.copies = PageCache::new(self.cache_bytes);
        self.digests = DigestCache::new(0);
    }

    fn advance(&mut self) {
        self.copies.advance();
        self.digests.advance();
    }

    /// Records that `page` was sent as zero. If it is new here, only where there is room: its next version
    /// may well be sparse, but costs no more than a page.
    fn zero(&mut self, page: PageIndex, last: bool) {
        if last {
            return;
        }
        if let Some(digest) = self.digests.lookup(page) {
            *digest = *self.digester.zero();
        } else if !self.copies.insert(page, &ZEROES) {
            self.digests.insert(page, self.digester.zero());
        }
    }

    /// Encodes `new` against the destination's version, or returns `None` if that is unknown. Then `new` is
    /// remembered, if there is room. With `last`, the guest being stopped, nothing is remembered; if the
    /// stop is called off, [`Deltas::forget_all`] has to follow.
    fn encode(
        &mut self,
        page: PageIndex,
        new: &Page,
        into: &mut [u8],
        last: bool,
    ) -> Option<Encoded> {
        if let Some(old) = self.copies.lookup(page) {
            let encoded = self.encoder.encode(old, new, into);
            if !last {
                *old = *new;
            }
            return Some(encoded);
        }
        if let Some(old) = self.digests.lookup(page) {
            let digest = self.digester.digest(new);
            let encoded = encode_lines(old, &digest, new, into);
            if !last {
                *old = digest;
            }
            return Some(encoded);
        }
        if last {
            return None;
        }
        if !self.copies.insert(page, new) {
            let digest = self.digester.digest(new);
            if !self.digests.insert(page, &digest) {
                let step = DIGEST_STEP_BYTES.max(self.cache_bytes / DIGEST_STEPS);
                let more = self.digests.capacity_bytes() + step;
                if more <= Self::most_digest_bytes(self.cache_bytes) {
                    self.share(more);
                    self.digests.insert(page, &digest);
                }
            }
        }
        None
    }
}

struct Packer {
    method: Method,
    compressor: Compressor,
    worth: Adaptive,
    packed: Vec<u8>,
    /// Moving average of a page's packed size.
    page_bytes: Option<usize>,
}

/// A shard's encoders.
#[derive(Default)]
pub struct Encoding {
    deltas: Option<Deltas>,
    packer: Option<Packer>,
    /// Pages without a delta, one after the other, with room for one more.
    staged: Vec<u8>,
    staged_pages: usize,
    /// Lengths and deltas, as sent.
    delta_part: Encoder,
    delta: Vec<u8>,
    /// Since the last [`Encoding::take_stats`].
    stats: (XbzrleStats, CompressionStats),
}

impl Encoding {
    /// Changes which encoders to use. Cheap if nothing changes.
    pub fn want(&mut self, wanted: Wanted) -> Result<(), WantError> {
        match wanted.cache_bytes {
            None => self.deltas = None,
            Some(bytes) => match &mut self.deltas {
                Some(deltas) => deltas.resize(bytes),
                None => {
                    let digester = Digester::random().map_err(WantError::NoRandomness)?;
                    self.deltas = Some(Deltas::new(bytes, digester));
                }
            },
        }
        if self.packer.as_ref().map(|packer| packer.method) != wanted.method {
            let packer = wanted.method.map(|method| -> Result<_, MethodError> {
                let compressor = Compressor::new(method)?;
                let (worth, packed) = (Adaptive::default(), Vec::new());
                Ok(Packer { method, compressor, worth, packed, page_bytes: None })
            });
            self.packer = packer.transpose()?;
        }
        Ok(())
    }

    /// Whether deltas are worth trying. Not in the first round, which has no older versions.
    pub fn tries_deltas(&self, first_round: bool) -> bool {
        !first_round && self.deltas.as_ref().is_some_and(|deltas| deltas.worth.worth_trying())
    }

    /// Whether deltas and compression rest, because they do not pay.
    pub fn rests(&self) -> (bool, bool) {
        let deltas = self.deltas.as_ref().is_some_and(|deltas| !deltas.worth.worth_trying());
        (deltas, self.packer.is_some() && !self.tries_packing())
    }

    /// Whether compression is worth trying.
    pub fn tries_packing(&self) -> bool {
        self.packer.as_ref().is_some_and(|packer| packer.worth.worth_trying())
    }

    /// Records `bytes` of pages sent straight from guest RAM.
    pub fn passed(&mut self, bytes: u64, first_round: bool) {
        if let Some(packer) = &mut self.packer {
            packer.worth.passed(bytes);
        }
        self.passed_deltas(bytes, first_round);
    }

    /// Records `bytes` of pages sent without a delta.
    pub fn passed_deltas(&mut self, bytes: u64, first_round: bool) {
        if let (Some(deltas), false) = (&mut self.deltas, first_round) {
            deltas.worth.passed(bytes);
        }
    }

    /// Drops the destination's versions: what was sent last was not remembered.
    pub fn forget(&mut self) {
        if let Some(deltas) = &mut self.deltas {
            deltas.forget_all();
        }
    }

    /// Ends a round: cached pages age.
    pub fn end_round(&mut self) {
        if let Some(deltas) = &mut self.deltas {
            deltas.advance();
        }
    }

    /// The buffer for a copy of the next page.
    pub fn next_page(&mut self) -> &mut Page {
        let start = self.staged_pages * PAGE_BYTES;
        if self.staged.len() < start + PAGE_BYTES {
            self.staged.resize((self.staged_pages + 1).next_power_of_two() * PAGE_BYTES, 0);
        }
        self.staged[start..].first_chunk_mut().expect("room was made for a page")
    }

    /// Encodes the page copied to [`Encoding::next_page`]. With `deltas` it is compared with the
    /// destination's version, and remembered unless it is the `last` one.
    ///
    /// # Errors
    /// If no page was copied.
    pub fn take(&mut self, page: PageIndex, deltas: bool, last: bool) -> Result<Fate, RamError> {
        let start = self.staged_pages * PAGE_BYTES;
        let Some(new) = self.staged.get(start..).and_then(<[u8]>::first_chunk) else {
            return Err(RamError::Unreadable(format!("page {} was not copied", page.0)));
        };
        let zero = is_zero(new);
        if let (Some(state), true) = (&mut self.deltas, deltas) {
            let stats = &mut self.stats.0;
            state.taken_pages += 1;
            if zero {
                state.zero(page, last);
                return Ok(Fate::Zero);
            }
            self.delta.resize(MAX_USEFUL_DELTA, 0);
            let Some(encoded) = state.encode(page, new, &mut self.delta, last) else {
                stats.misses += 1;
                self.staged_pages += 1;
                return Ok(Fate::Staged);
            };
            // Misses do not count: they fill the cache for the next round.
            state.tried_pages += 1;
            state.trial.raw_bytes += PAGE_BYTES as u64;
            // Prefer compression if pages pack to less than this delta.
            let longest = self.packer.as_ref().filter(|packer| packer.worth.worth_trying());
            let longest = longest.and_then(|packer| packer.page_bytes).unwrap_or(MAX_USEFUL_DELTA);
            match encoded {
                Encoded::Unchanged => {
                    stats.unchanged += 1;
                    return Ok(Fate::Unchanged);
                }
                Encoded::Bytes(len) if len <= longest => {
                    let too_long = |_| RamError::Unreadable(format!("a delta of {len} bytes"));
                    self.delta_part.u16(u16::try_from(len).map_err(too_long)?);
                    self.delta_part.raw(&self.delta[..len]);
                    stats.pages += 1;
                    stats.bytes += len as u64;
                    state.trial.sent_bytes += len as u64;
                    return Ok(Fate::Delta);
                }
                Encoded::Bytes(_) | Encoded::Overflow => {
                    stats.overflows += 1;
                    state.trial.sent_bytes += PAGE_BYTES as u64;
                }
            }
        } else if zero {
            return Ok(Fate::Zero);
        }
        self.staged_pages += 1;
        Ok(Fate::Staged)
    }

    /// Records that the batch encoded so far took `time`. Deltas are charged for the pages that they were
    /// tried on, at what a page took on average: a clock read per page would cost as much as a short delta.
    pub fn took(&mut self, time: Duration) {
        let Some(state) = &mut self.deltas else { return };
        let (taken, tried) = (state.taken_pages, state.tried_pages);
        (state.taken_pages, state.tried_pages) = (0, 0);
        state.trial.cost += time * tried / taken.max(1);
    }

    /// Whether to send what was encoded so far.
    pub fn is_full(&self) -> bool {
        self.staged_pages >= STAGED_PAGES || self.delta_part.bytes().len() >= DELTA_BYTES
    }

    pub fn staged(&self) -> &[u8] {
        &self.staged[..self.staged_pages * PAGE_BYTES]
    }

    /// The deltas and their lengths.
    pub fn deltas(&self) -> &[u8] {
        self.delta_part.bytes()
    }

    /// Compresses the staged pages, if a compressor is in use and worth trying.
    pub fn pack(&mut self, link_bytes_per_sec: u64) -> Option<(Packing, &[u8])> {
        let staged = &self.staged[..self.staged_pages * PAGE_BYTES];
        let packer = self.packer.as_mut().filter(|_| !staged.is_empty())?;
        let raw_bytes = staged.len() as u64;
        if !packer.worth.worth_trying() {
            packer.worth.passed(raw_bytes);
            return None;
        }
        packer.packed.clear();
        let began = Instant::now();
        let packed = packer.compressor.compress(staged, &mut packer.packed);
        let sent = if packed { packer.packed.len() } else { staged.len() };
        let sent_bytes = sent as u64;
        packer
            .worth
            .tried(Trial { raw_bytes, sent_bytes, cost: began.elapsed() }, link_bytes_per_sec);
        let page_bytes = sent / self.staged_pages;
        let before = packer.page_bytes.unwrap_or(page_bytes);
        packer.page_bytes = Some((before * 3 + page_bytes) / 4);
        if !packed {
            return None;
        }
        self.stats.1.pages += self.staged_pages as u64;
        self.stats.1.bytes += sent_bytes;
        let packing = match packer.method {
            Method::Zlib { .. } => Packing::Zlib,
            Method::Zstd { .. } => Packing::Zstd,
        };
        Some((packing, &packer.packed))
    }

    /// Drops what has been sent.
    pub fn clear(&mut self) {
        self.staged_pages = 0;
        self.delta_part.clear();
    }

    /// Judges whether deltas pay at the channel's throughput.
    pub fn judge_deltas(&mut self, link_bytes_per_sec: u64) {
        let Some(deltas) = &mut self.deltas else { return };
        deltas.worth.tried(std::mem::take(&mut deltas.trial), link_bytes_per_sec);
        if !deltas.worth.worth_trying() {
            // While deltas rest, pages are sent without updating the cache, which would go stale.
            deltas.forget_all();
        }
    }

    /// Statistics since the last call, for the counters.
    pub fn take_stats(&mut self) -> (XbzrleStats, CompressionStats) {
        std::mem::take(&mut self.stats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(cache_bytes: Option<usize>, method: Option<Method>) -> Encoding {
        let mut encoding = Encoding::default();
        encoding.want(Wanted { cache_bytes, method }).unwrap();
        encoding
    }

    fn take(encoding: &mut Encoding, page: u64, bytes: &Page) -> Fate {
        *encoding.next_page() = *bytes;
        encoding.take(PageIndex(page), true, false).unwrap()
    }

    #[test]
    fn a_page_comes_whole_then_as_what_has_changed_then_not_at_all() {
        let mut encoding = wanted(Some(1 << 20), None);
        let mut page = [7; PAGE_BYTES];
        assert_eq!(take(&mut encoding, 5, &page), Fate::Staged);
        assert_eq!(encoding.staged(), page);
        encoding.clear();
        page[100] = 8;
        assert_eq!(take(&mut encoding, 5, &page), Fate::Delta);
        assert!(encoding.staged().is_empty() && encoding.deltas().len() < 10);
        encoding.clear();
        assert_eq!(take(&mut encoding, 5, &page), Fate::Unchanged);
        assert_eq!(take(&mut encoding, 5, &[0; PAGE_BYTES]), Fate::Zero);
        // What is zero there is known to be zero.
        page = [0; PAGE_BYTES];
        page[9] = 1;
        assert_eq!(take(&mut encoding, 5, &page), Fate::Delta);
        let (xbzrle, _) = encoding.take_stats();
        assert_eq!((xbzrle.pages, xbzrle.misses, xbzrle.unchanged), (2, 1, 1));
        // Also where it is all that is known of it.
        assert_eq!(take(&mut encoding, 6, &[0; PAGE_BYTES]), Fate::Zero);
        assert_eq!(take(&mut encoding, 6, &page), Fate::Delta);
    }

    #[test]
    fn a_new_zero_page_without_a_place_for_a_copy_is_known_by_its_digest() {
        let mut encoding = wanted(Some(4 << 20), None);
        let mut page = [7; PAGE_BYTES];
        // More than the cache holds as copies, so that digests have a place.
        for index in 0..1500 {
            take(&mut encoding, index, &page);
            encoding.clear();
        }
        assert_eq!(take(&mut encoding, 5000, &[0; PAGE_BYTES]), Fate::Zero);
        page = [0; PAGE_BYTES];
        page[9] = 1;
        assert_eq!(take(&mut encoding, 5000, &page), Fate::Delta);
    }

    #[test]
    fn deltas_are_charged_for_the_pages_that_they_were_tried_on() {
        let mut encoding = wanted(Some(1 << 20), None);
        for page in [1, 2, 3, 1] {
            take(&mut encoding, page, &[1; PAGE_BYTES]);
        }
        encoding.took(Duration::from_micros(400));
        let cost = |encoding: &Encoding| encoding.deltas.as_ref().unwrap().trial.cost;
        assert_eq!(cost(&encoding), Duration::from_micros(100), "one of four");
        encoding.took(Duration::from_secs(1));
        assert_eq!(cost(&encoding), Duration::from_micros(100), "nothing was tried since");
    }

    #[test]
    fn a_page_that_has_changed_everywhere_is_staged_and_remembered() {
        let mut encoding = wanted(Some(1 << 20), None);
        take(&mut encoding, 1, &[1; PAGE_BYTES]);
        encoding.clear();
        assert_eq!(take(&mut encoding, 1, &[2; PAGE_BYTES]), Fate::Staged);
        assert_eq!(encoding.staged(), [2; PAGE_BYTES]);
        assert_eq!(take(&mut encoding, 1, &[2; PAGE_BYTES]), Fate::Unchanged);
        assert_eq!(encoding.take_stats().0.overflows, 1);
    }

    #[test]
    fn a_working_set_larger_than_the_cache_is_known_by_lines() {
        // 4 MiB of memory for 16 MiB of pages.
        let mut encoding = wanted(Some(4 << 20), None);
        let mut page = [7; PAGE_BYTES];
        let mut deltas = 0;
        for round in 0..4u8 {
            page[300] = round;
            deltas = 0;
            for index in 0..4096 {
                match take(&mut encoding, index, &page) {
                    Fate::Delta => deltas += 1,
                    Fate::Staged => {}
                    fate => panic!("page {index} is {fate:?}"),
                }
                encoding.clear();
            }
            encoding.end_round();
        }
        assert_eq!(deltas, 4096);
        let state = encoding.deltas.as_ref().unwrap();
        assert!(state.copies.capacity_bytes() + state.digests.capacity_bytes() <= 4 << 20);
        assert!(state.copies.capacity_bytes() >= 1 << 20);
        encoding.want(Wanted { cache_bytes: Some(1 << 20), method: None }).unwrap();
        let state = encoding.deltas.as_ref().unwrap();
        assert!(state.copies.capacity_bytes() + state.digests.capacity_bytes() <= 1 << 20);
    }

    #[test]
    fn deltas_that_lose_rest_and_begin_anew_without_old_versions() {
        let mut encoding = wanted(Some(1 << 20), None);
        let mut fill = 1;
        while encoding.tries_deltas(false) {
            for page in 0..100 {
                take(&mut encoding, page, &[fill; PAGE_BYTES]);
                encoding.clear();
            }
            fill += 1;
            encoding.judge_deltas(1_000_000_000);
            assert!(fill < 200, "nothing is saved, and still it is tried");
        }
        assert!(!encoding.tries_deltas(true));
        encoding.passed(1 << 40, true);
        assert!(!encoding.tries_deltas(false), "the first round does not count");
        encoding.passed(1 << 40, false);
        assert!(encoding.tries_deltas(false));
        // An older version than the destination's would make a wrong page of a right delta.
        assert_eq!(take(&mut encoding, 3, &[fill; PAGE_BYTES]), Fate::Staged);
    }

    #[test]
    fn text_is_packed_and_noise_is_not() {
        let mut encoding = wanted(None, Some(Method::Zstd { level: 1 }));
        let text: Vec<u8> =
            b"all work and no play ".iter().copied().cycle().take(PAGE_BYTES).collect();
        assert_eq!(take(&mut encoding, 1, text[..].first_chunk().unwrap()), Fate::Staged);
        let (packing, packed) = encoding.pack(0).unwrap();
        assert!(packing == Packing::Zstd && packed.len() < 1000);
        encoding.clear();
        let mut state = 1u64;
        let mut noise = [0; PAGE_BYTES];
        noise.fill_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        });
        take(&mut encoding, 1, &noise);
        assert_eq!(encoding.pack(0), None);
    }

    #[test]
    fn a_page_that_packs_to_less_than_its_delta_is_packed() {
        let mut encoding = wanted(Some(1 << 20), Some(Method::Zstd { level: 1 }));
        let mut deltas = 0;
        for round in 1..20u8 {
            let mut page = [b'a'; PAGE_BYTES];
            page[..2000].fill(round);
            deltas += usize::from(take(&mut encoding, 1, &page) == Fate::Delta);
            encoding.pack(0);
            encoding.clear();
        }
        assert!(deltas < 10, "{deltas} deltas of 2000 bytes");
        let mut page = [b'a'; PAGE_BYTES];
        page[..2000].fill(19);
        page[3000] = 0;
        assert_eq!(take(&mut encoding, 1, &page), Fate::Delta, "one byte is still less");
    }

    #[test]
    fn what_is_wanted_may_change_at_any_time() {
        let mut encoding = wanted(Some(1 << 20), None);
        take(&mut encoding, 1, &[1; PAGE_BYTES]);
        encoding.want(Wanted { cache_bytes: None, method: None }).unwrap();
        assert!(!encoding.tries_deltas(false) && !encoding.tries_packing());
        encoding.want(Wanted { cache_bytes: Some(1 << 20), method: None }).unwrap();
        assert_eq!(take(&mut encoding, 1, &[1; PAGE_BYTES]), Fate::Staged, "it has forgotten");
        let method = Some(Method::Zlib { level: 99 });
        assert!(encoding.want(Wanted { cache_bytes: None, method }).is_err());
    }
}
