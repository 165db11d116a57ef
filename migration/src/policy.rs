//! Decisions of a migration, from numbers alone: stop the guest now? how long to wait for the cap?

use std::time::Duration;

/// One finished round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Round {
    /// Bytes sent.
    pub sent_bytes: u64,
    /// How long it took.
    pub duration: Duration,
    /// Bytes that the guest dirtied meanwhile, which are the next round.
    pub dirtied_bytes: u64,
}

/// What the stopped phase costs besides bytes: pausing, saving, two journeys, resuming.
pub const FIXED_DOWNTIME: Duration = Duration::from_millis(1);
/// A remainder that takes no longer than this is not worth another round.
const FLOOR: Duration = Duration::from_micros(500);
/// Rounds that shorten an already acceptable pause.
const MAX_POLISHING_ROUNDS: u32 = 8;

/// How long the guest would be stopped if `pending_bytes` were sent at `bytes_per_sec` now.
pub fn expected_downtime(pending_bytes: u64, bytes_per_sec: u64) -> Duration {
    if pending_bytes == 0 {
        return FIXED_DOWNTIME;
    }
    // u128: bytes times nanoseconds overflow 64 bits at 18 GB.
    let nanos = u128::from(pending_bytes) * 1_000_000_000 / u128::from(bytes_per_sec.max(1));
    FIXED_DOWNTIME + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX / 2))
}

/// What `bytes` in `duration` are in a second.
pub fn per_second(bytes: u64, duration: Duration) -> u64 {
    let rate = u128::from(bytes) * 1_000_000_000 / duration.as_nanos().max(1000);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Stop the guest and send the rest.
    Stop,
    /// Send another round; `polishing` if the limit is kept already.
    Again {
        /// Whether the limit is kept already.
        polishing: bool,
    },
}

/// Decides after `last`, with `polished` rounds already spent on shortening an acceptable pause. A
/// pause within the limit is shortened further while each round removes at least 30 % of it: that
/// costs milliseconds of total time and saves the guest most of its gap.
pub fn decide(last: Round, bytes_per_sec: u64, limit: Duration, polished: u32) -> Decision {
    let expected = expected_downtime(last.dirtied_bytes, bytes_per_sec);
    if expected > limit.max(FIXED_DOWNTIME) {
        return Decision::Again { polishing: false };
    }
    let shrinks = last.dirtied_bytes < last.sent_bytes / 10 * 7;
    if shrinks && expected > FIXED_DOWNTIME + FLOOR && polished < MAX_POLISHING_ROUNDS {
        return Decision::Again { polishing: true };
    }
    Decision::Stop
}

/// How far ahead of `bytes_per_sec` a sender is that sent `sent_bytes` in `elapsed`; 0 is no cap.
pub fn ahead_of_cap(sent_bytes: u64, elapsed: Duration, bytes_per_sec: u64) -> Duration {
    if bytes_per_sec == 0 {
        return Duration::ZERO;
    }
    let due = u128::from(sent_bytes) * 1_000_000_000 / u128::from(bytes_per_sec);
    Duration::from_nanos(u64::try_from(due).unwrap_or(u64::MAX)).saturating_sub(elapsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    fn round(sent_mb: u64, dirtied_mb: u64) -> Round {
        Round {
            sent_bytes: sent_mb * MB,
            duration: Duration::from_millis(sent_mb),
            dirtied_bytes: dirtied_mb * MB,
        }
    }

    #[test]
    fn a_quiet_guest_is_stopped_at_once() {
        let limit = Duration::from_millis(20);
        assert_eq!(decide(round(1000, 0), 1000 * MB, limit, 0), Decision::Stop);
    }

    #[test]
    fn a_remainder_over_the_limit_takes_another_round() {
        let again = Decision::Again { polishing: false };
        assert_eq!(decide(round(1000, 30), 1000 * MB, Duration::from_millis(20), 0), again);
    }

    #[test]
    fn an_acceptable_pause_is_shortened_while_that_works() {
        let limit = Duration::from_millis(20);
        let polish = Decision::Again { polishing: true };
        assert_eq!(decide(round(60, 15), 1000 * MB, limit, 0), polish);
        assert_eq!(decide(round(16, 15), 1000 * MB, limit, 0), Decision::Stop, "no longer shrinks");
        assert_eq!(decide(round(60, 15), 1000 * MB, limit, 8), Decision::Stop, "enough");
    }

    #[test]
    fn a_limit_of_zero_still_ends_with_a_clean_guest() {
        assert_eq!(decide(round(1, 0), MB, Duration::ZERO, 0), Decision::Stop);
    }

    #[test]
    fn the_cap_is_kept_on_average() {
        let second = Duration::from_secs(1);
        assert_eq!(ahead_of_cap(100 * MB, second, 100 * MB), Duration::ZERO);
        assert_eq!(ahead_of_cap(150 * MB, second, 100 * MB), Duration::from_millis(500));
        assert_eq!(ahead_of_cap(u64::MAX, second, 0), Duration::ZERO);
    }
}
