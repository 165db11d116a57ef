//! The last block status that a server has sent, as extents of a disk, so that a scan need not ask for each.

use crate::block::SECTOR_BYTES;
use crate::block::backend::{Content, Extent};
use crate::block::nbd::protocol::{self as nbd, state};
use crate::lock;
use std::sync::Mutex;

/// Extents that are known until the disk is written to.
#[derive(Debug, Default)]
pub(super) struct ExtentCache(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Counts writes: an answer to a question asked before one is out of date.
    generation: u64,
    start: u64,
    /// Each one's end and content, ascending; the first begins at `start`.
    ends: Vec<(u64, Content)>,
}

impl Known {
    fn find(&self, offset: u64) -> Option<Extent> {
        if offset < self.start {
            return None;
        }
        let (end, content) = self.ends.get(self.ends.partition_point(|(end, _)| *end <= offset))?;
        Some(Extent { len_bytes: end - offset, content: *content })
    }
}

impl ExtentCache {
    /// The extent at `offset`, if it is known; otherwise the generation in which the caller asks for it.
    pub fn find(&self, offset: u64) -> Result<Extent, u64> {
        let known = lock(&self.0);
        known.find(offset).ok_or(known.generation)
    }

    /// Keeps the extents that a server was asked for in `generation`, from `start` on, of a disk of `len_bytes`.
    /// Returns the one at `start`.
    pub fn learn(
        &self,
        generation: u64,
        start: u64,
        len_bytes: u64,
        list: &[nbd::Extent],
    ) -> Extent {
        let ends = in_sectors(start, len_bytes, list);
        let learnt = Known { generation, start, ends };
        let extent = learnt.find(start).unwrap_or(Extent {
            len_bytes: SECTOR_BYTES.min(len_bytes - start),
            content: Content::Data,
        });
        let mut known = lock(&self.0);
        if known.generation == generation {
            *known = learnt;
        }
        extent
    }

    /// The disk has been written to.
    pub fn forget(&self) {
        let mut known = lock(&self.0);
        known.generation += 1;
        known.ends = Vec::new();
    }
}

/// Whole sectors: one that is only partly zero is data.
fn in_sectors(start: u64, len_bytes: u64, list: &[nbd::Extent]) -> Vec<(u64, Content)> {
    let (mut at, mut ends) = (start, Vec::<(u64, Content)>::new());
    for extent in list {
        at = at.saturating_add(extent.len.into()).min(len_bytes);
        // A hole that need not read as zeroes is data: it must be copied to be the same on both sides.
        let (content, end) = match extent.flags & state::ZERO {
            0 => (Content::Data, at.next_multiple_of(SECTOR_BYTES).min(len_bytes)),
            _ => (Content::Zero, at - at % SECTOR_BYTES),
        };
        match ends.last_mut() {
            Some((last, _)) if end <= *last => {}
            Some((last, same)) if *same == content => *last = end,
            None if end <= start => {}
            _ => ends.push((end, content)),
        }
    }
    ends
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "offsets in a small disk")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn zero(len: u32) -> nbd::Extent {
        nbd::Extent { len, flags: state::HOLE | state::ZERO }
    }

    fn data(len: u32) -> nbd::Extent {
        nbd::Extent { len, flags: 0 }
    }

    #[test]
    fn an_answer_that_a_write_has_overtaken_is_not_kept() {
        let cache = ExtentCache::default();
        let generation = cache.find(0).unwrap_err();
        let list = [zero(4096), data(4096), data(512)];
        let first = cache.learn(generation, 0, 1 << 20, &list);
        assert_eq!(first, Extent { len_bytes: 4096, content: Content::Zero });
        assert_eq!(cache.find(5120), Ok(Extent { len_bytes: 3584, content: Content::Data }));
        let asked = cache.find(8704).unwrap_err();
        cache.forget();
        cache.learn(asked, 8704, 1 << 20, &list);
        assert!(cache.find(0).is_err() && cache.find(8704).is_err());
    }

    proptest! {
        #[test]
        fn what_is_not_wholly_zero_is_data(lens in prop::collection::vec((1u32..3000, any::<bool>()), 1..20)) {
            let list: Vec<_> = lens.iter().map(|(len, is_zero)| if *is_zero { zero(*len) } else { data(*len) }).collect();
            let (start, end) = (1024u64, 16384u64);
            let cache = ExtentCache::default();
            let first = cache.learn(0, start, end, &list);
            prop_assert!(first.len_bytes > 0 && start + first.len_bytes <= end);
            // Byte by byte, beyond the answer nothing is known to be zero.
            let bytes = lens.iter().flat_map(|(len, is_zero)| (0..*len).map(|_| *is_zero));
            let mut is_zero: Vec<bool> = bytes.take((end - start) as usize).collect();
            is_zero.resize((end - start) as usize, false);
            let mut at = start;
            while let Ok(Extent { len_bytes, content }) = cache.find(at) {
                prop_assert!(len_bytes > 0 && len_bytes % SECTOR_BYTES == 0);
                for sector in is_zero[(at - start) as usize..][..len_bytes as usize].chunks(512) {
                    prop_assert_eq!(content == Content::Zero, sector.iter().all(|zero| *zero));
                }
                at += len_bytes;
            }
        }
    }
}
