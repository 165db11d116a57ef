//! Enforces `max-bandwidth` with a token bucket. Pure: the caller brings the clock. [`cap`] shares it
//! between the sending threads, [`speed`] measures the bandwidth, [`throughput`] a sender's share of it.
//!
//! The cap also applies during the pause: the link is shared with other traffic, and the expected downtime
//! accounts for it.

pub mod cap;
pub mod speed;
pub mod throughput;

pub use cap::Cap;
pub use speed::{LinkSpeed, Sample, Speed};
pub use throughput::Throughput;

use crate::units::saturating_u64;
use std::time::Duration;

/// One allowance is at most what the cap permits in this time.
const SLICE: Duration = Duration::from_millis(10);
/// Depth of the bucket: what a late wake-up may catch up on. A longer stall is not followed by a burst.
const DEPTH: Duration = Duration::from_millis(30);
const NANOS: u128 = 1_000_000_000;

/// What the bucket permits now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowance {
    /// Send at most this many bytes.
    Bytes(usize),
    /// Ask again after this time.
    Wait(Duration),
}

/// A token bucket. Tokens are bytes times 10⁹, so that nothing is lost to rounding.
#[derive(Debug, Default)]
pub struct TokenBucket {
    tokens: u128,
    /// When tokens were last added, on the caller's clock.
    filled: Duration,
}

impl TokenBucket {
    /// Starts empty at `now`.
    pub fn new(now: Duration) -> Self {
        Self { tokens: 0, filled: now }
    }

    /// How many of `wanted` bytes may be sent at `now` under a cap of `rate` bytes per second; 0 means no
    /// cap.
    pub fn allow(&mut self, now: Duration, rate: u64, wanted: usize) -> Allowance {
        if rate == 0 {
            *self = Self::new(now);
            return Allowance::Bytes(wanted);
        }
        let rate = u128::from(rate);
        let elapsed = now.saturating_sub(self.filled).as_nanos();
        // Threads may arrive out of clock order: no time counts twice.
        self.filled = self.filled.max(now);
        // At least one byte, or a very low cap would never let it pass.
        let depth = (DEPTH.as_nanos() * rate).max(NANOS);
        self.tokens = (self.tokens + elapsed * rate).min(depth);
        let slice = (SLICE.as_nanos() * rate / NANOS).clamp(1, wanted.max(1) as u128);
        let needed = slice * NANOS;
        if self.tokens >= needed {
            return Allowance::Bytes(usize::try_from(slice).unwrap_or(wanted));
        }
        let nanos = (needed - self.tokens).div_ceil(rate);
        Allowance::Wait(Duration::from_nanos(saturating_u64(nanos)))
    }

    /// Spends tokens for `bytes` sent.
    pub fn spend(&mut self, bytes: usize) {
        self.tokens = self.tokens.saturating_sub(bytes as u128 * NANOS);
    }

    /// Returns tokens for `bytes` that were not sent after all.
    pub fn refund(&mut self, bytes: usize) {
        self.tokens += bytes as u128 * NANOS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sends all it may for `span`, each wake-up late by `late`; returns bytes, and the most within
    /// any 50 ms.
    fn sent_in(rate: u64, span: Duration, late: Duration, batch: usize) -> (u64, u64) {
        let start = Duration::from_secs(1000);
        let mut now = start;
        let mut bucket = TokenBucket::new(now);
        let mut history = std::collections::VecDeque::new();
        let (mut total, mut recent, mut most) = (0u64, 0u64, 0);
        while now < start + span {
            match bucket.allow(now, rate, batch) {
                Allowance::Wait(wait) => {
                    assert!(wait <= Duration::from_millis(11) || rate < 100, "{wait:?}");
                    now += wait + late;
                }
                Allowance::Bytes(bytes) => {
                    bucket.spend(bytes);
                    total += bytes as u64;
                    recent += bytes as u64;
                    history.push_back((now, bytes as u64));
                    now += Duration::from_micros(1);
                }
            }
            while let Some((then, bytes)) = history.front().copied()
                && now - then > Duration::from_millis(50)
            {
                recent -= bytes;
                history.pop_front();
            }
            most = most.max(recent);
        }
        (total, most)
    }

    proptest! {
        #[test]
        fn the_cap_is_exact_within_three_percent(
            rate in 1_000_000u64..3_000_000_000, late_us in 0u64..5_000, batch in 1_000usize..2_000_000,
        ) {
            let late = Duration::from_micros(late_us);
            let (total, most) = sent_in(rate, Duration::from_secs(1), late, batch);
            // A batch that is smaller than a late wake-up's worth cannot fill the cap; real ones can.
            prop_assert!(total as f64 <= rate as f64 * 1.03, "{} of {}", total, rate);
            if batch as u64 >= rate / 100 {
                prop_assert!(total as f64 >= rate as f64 * 0.97, "{} of {}", total, rate);
            }
            prop_assert!(most <= rate / 10, "{} within 50 ms at {}", most, rate);
        }
    }

    #[test]
    fn a_stall_is_not_made_good_by_a_burst() {
        let mut bucket = TokenBucket::new(Duration::ZERO);
        let late = Duration::from_secs(100);
        let mut burst = 0;
        while let Allowance::Bytes(bytes) = bucket.allow(late, 1_000_000, 1 << 20) {
            bucket.spend(bytes);
            burst += bytes;
        }
        assert_eq!(burst, 30_000);
    }

    #[test]
    fn time_that_two_threads_tell_in_the_wrong_order_counts_once() {
        let mut bucket = TokenBucket::new(Duration::ZERO);
        let mut sent = 0;
        for millis in 1..=1000 {
            let now = Duration::from_millis(millis);
            for told in [now, now.saturating_sub(Duration::from_micros(900)), now] {
                while let Allowance::Bytes(bytes) = bucket.allow(told, 10_000_000, 5_000) {
                    bucket.spend(bytes);
                    sent += bytes;
                }
            }
        }
        assert!((9_900_000..=10_000_000).contains(&sent), "{sent} bytes in a second");
    }

    #[test]
    fn the_lowest_cap_lets_a_byte_through() {
        let mut bucket = TokenBucket::new(Duration::ZERO);
        assert!(matches!(bucket.allow(Duration::ZERO, 1, 4096), Allowance::Wait(_)));
        assert_eq!(bucket.allow(Duration::from_secs(1), 1, 4096), Allowance::Bytes(1));
    }

    #[test]
    fn no_cap_is_no_cap() {
        let mut bucket = TokenBucket::new(Duration::ZERO);
        assert_eq!(bucket.allow(Duration::ZERO, 0, 1 << 20), Allowance::Bytes(1 << 20));
    }
}
