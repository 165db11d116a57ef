//! Small writes that only copy to the host's page cache are made at once by the worker. Through the ring they take
//! longer: ext4 refuses to write without waiting (`EOPNOTSUPP` for `IOCB_NOWAIT`), as others do whenever a file's time
//! of modification changes, and then each is handed to a thread of the kernel, which writes one after the other.
//!
//! What such a write may wait for (memory, or the disk when too much is dirty) holds up the requests behind it. So one
//! that took long sends those that follow through the ring for a while.

use std::time::{Duration, Instant};

/// A longer write is worth a thread of its own.
const MOST_BYTES: usize = 64 << 10;
/// A write that took longer was no mere copy.
const COPIED_WITHIN: Duration = Duration::from_millis(1);
/// How long writes then go through the ring.
const PAUSE: Duration = Duration::from_millis(100);

/// Whether writes are made at once.
#[derive(Debug, Default)]
pub(super) struct AtOnce {
    not_before: Option<Instant>,
}

impl AtOnce {
    /// Whether a write of so many bytes to the page cache is to be made at once.
    pub fn is_for(&self, len_bytes: usize, now: Instant) -> bool {
        len_bytes <= MOST_BYTES && self.not_before.is_none_or(|instant| instant <= now)
    }

    /// Notes how long one took.
    pub fn took(&mut self, since: Instant, now: Instant) {
        if now.saturating_duration_since(since) > COPIED_WITHIN {
            self.not_before = Some(now + PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_writes_go_through_the_ring() {
        let now = Instant::now();
        assert!(AtOnce::default().is_for(MOST_BYTES, now));
        assert!(!AtOnce::default().is_for(MOST_BYTES + 1, now));
    }

    #[test]
    fn one_that_took_long_sends_those_that_follow_through_the_ring_for_a_while() {
        let mut at_once = AtOnce::default();
        let began = Instant::now();
        at_once.took(began, began + COPIED_WITHIN);
        assert!(at_once.is_for(512, began + COPIED_WITHIN));
        let ended = began + COPIED_WITHIN * 2;
        at_once.took(began, ended);
        assert!(!at_once.is_for(512, ended));
        assert!(at_once.is_for(512, ended + PAUSE));
    }
}
