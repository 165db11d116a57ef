//! The speed limit of a job. Pure: the caller brings the clock.

use std::time::{Duration, Instant};

/// What may be caught up on after a late wake-up: a longer stall is not followed by a burst.
const SLACK: Duration = Duration::from_millis(100);
/// A job looks for other things at least so often.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// Spreads bytes over time.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// When everything so far would have been done at the limit.
    due: Instant,
}

impl Rate {
    /// Nothing has been done at `now`.
    pub fn new(now: Instant) -> Self {
        Self { due: now }
    }

    /// How long to wait at `now` before the next operation.
    pub fn wait(&self, now: Instant) -> Duration {
        self.due.saturating_duration_since(now).min(LONGEST_WAIT)
    }

    /// An operation of `bytes` begins at `now`, under a limit of `bytes_per_sec`; 0 for none.
    pub fn spend(&mut self, now: Instant, bytes: u64, bytes_per_sec: u64) {
        let earliest = now.checked_sub(SLACK).unwrap_or(now);
        let Some(seconds) = bytes.checked_div(bytes_per_sec) else {
            self.due = now;
            return;
        };
        let nanos = u128::from(bytes % bytes_per_sec) * 1_000_000_000 / u128::from(bytes_per_sec);
        let time = Duration::new(seconds, u32::try_from(nanos).unwrap_or(0));
        // Far in the future is far enough: a higher limit must take effect.
        self.due = self.due.max(earliest) + time.min(Duration::from_secs(3600));
    }

    /// The limit has changed: what is owed under the old one is forgiven.
    pub fn reset(&mut self, now: Instant) {
        self.due = self.due.min(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_kept_over_time_and_no_limit_never_waits() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        let mut now = start;
        for _ in 0..100 {
            now += rate.wait(now);
            if rate.wait(now).is_zero() {
                rate.spend(now, 10_000, 1_000_000);
            }
        }
        let took = now - start;
        assert!(
            (Duration::from_millis(980)..Duration::from_millis(1010)).contains(&took),
            "{took:?}"
        );
        rate.spend(now, u64::MAX, 0);
        assert!(rate.wait(now).is_zero());
    }

    #[test]
    fn a_stall_is_not_followed_by_a_burst_and_a_raised_limit_counts_at_once() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        let late = start + Duration::from_secs(100);
        // A tenth of a second may be caught up on.
        rate.spend(late, 100_000, 1_000_000);
        assert!(rate.wait(late).is_zero());
        rate.spend(late, 1, 1_000_000);
        assert!(!rate.wait(late).is_zero());
        rate.spend(late, u64::MAX, 1);
        assert_eq!(rate.wait(late), LONGEST_WAIT);
        rate.reset(late);
        assert!(rate.wait(late).is_zero());
    }
}
