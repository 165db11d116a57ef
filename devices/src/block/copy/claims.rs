//! Ranges of a disk that are being copied or written: no two operations work on one byte at a time, so the copy
//! ends up with what was written last.

use super::super::backend::ByteRange;
use crate::lock;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How long a waiter sleeps before it asks again whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The claimed ranges of one disk.
#[derive(Debug, Default)]
pub struct Claims {
    ranges: Mutex<Vec<ByteRange>>,
    freed: Condvar,
}

/// A claimed range, until it is dropped.
#[derive(Debug)]
pub struct Claim {
    claims: Arc<Claims>,
    range: ByteRange,
}

impl Claim {
    /// What is claimed.
    pub fn range(&self) -> ByteRange {
        self.range
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut ranges = lock(&self.claims.ranges);
        if let Some(at) = ranges.iter().position(|range| *range == self.range) {
            ranges.swap_remove(at);
        }
        self.claims.freed.notify_all();
    }
}

fn overlap(one: ByteRange, other: ByteRange) -> bool {
    one.offset_bytes < other.end() && other.offset_bytes < one.end()
}

impl Claims {
    /// Claims `range` if nobody has a part of it.
    pub fn try_claim(self: &Arc<Self>, range: ByteRange) -> Option<Claim> {
        let mut ranges = lock(&self.ranges);
        if ranges.iter().any(|other| overlap(*other, range)) {
            return None;
        }
        ranges.push(range);
        Some(Claim { claims: self.clone(), range })
    }

    /// Waits until it can claim `range`. `None` if it is not `wanted` any more.
    pub fn claim(self: &Arc<Self>, range: ByteRange, wanted: &dyn Fn() -> bool) -> Option<Claim> {
        let mut ranges = lock(&self.ranges);
        while ranges.iter().any(|other| overlap(*other, range)) {
            if !wanted() {
                return None;
            }
            let waited = self.freed.wait_timeout(ranges, LOOK_EVERY);
            ranges = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        ranges.push(range);
        Some(Claim { claims: self.clone(), range })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset_bytes: u64, len_bytes: u64) -> ByteRange {
        ByteRange { offset_bytes, len_bytes }
    }

    #[test]
    fn what_overlaps_waits_and_what_only_touches_does_not() {
        let claims = Arc::<Claims>::default();
        let middle = claims.try_claim(range(512, 1024)).unwrap();
        assert!(claims.try_claim(range(1024, 512)).is_none());
        assert!(claims.try_claim(range(0, 4096)).is_none());
        let (before, after) = (claims.try_claim(range(0, 512)), claims.try_claim(range(1536, 512)));
        assert!(before.is_some() && after.is_some());
        assert!(claims.claim(range(512, 512), &|| false).is_none(), "not wanted any more");
        let waits = std::thread::spawn({
            let claims = claims.clone();
            move || claims.claim(range(1024, 512), &|| true).map(|claim| claim.range())
        });
        drop(middle);
        assert_eq!(waits.join().unwrap(), Some(range(1024, 512)));
        assert!(claims.try_claim(range(512, 1024)).is_some(), "each is given back");
    }
}
