//! Decisions of a migration, computed from numbers: stop the guest now, or send another round? Throttle
//! it? Pure. Called by the source after each round and, for [`throttling`], in the middle of long ones. The
//! bandwidth cap is enforced by [`crate::pace`].

pub mod dirtying;
pub mod throttling;

pub use dirtying::{Dirtying, Look};
pub use throttling::{Convergence, throttle};

use crate::units::saturating_u64;
use std::time::Duration;

/// One finished round, in times rather than bytes: participants have different bandwidths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// To send what it sent.
    pub sent: Duration,
    /// To send what was dirtied meanwhile: the next round.
    pub left: Duration,
}

/// Typical time from the decision until no vCPU runs.
const STOPPING: Duration = Duration::from_millis(1);
/// A remainder shorter than this is not worth another round.
const FLOOR: Duration = Duration::from_micros(500);
/// Allowance for a busy host, where the limit cannot be met anyway.
const GRACE: Duration = Duration::from_millis(5);
/// Most rounds to shorten an already acceptable pause.
const MAX_POLISHING_ROUNDS: u32 = 10;

/// Time to send `bytes` at `bytes_per_sec`.
pub fn send_time(bytes: u64, bytes_per_sec: u64) -> Duration {
    // u128: bytes times nanoseconds overflow 64 bits at 18 GB.
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(bytes_per_sec.max(1));
    // Saturates at half of the range, 292 years, so that two such times can be added.
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX / 2))
}

/// Bytes that a guest with this dirty rate still writes between the decision and its stop.
pub fn written_until_stopped(dirtied_per_sec: u64) -> u64 {
    dirtied_per_sec / 1000 * u64::try_from(STOPPING.as_millis()).unwrap_or(1)
}

/// The rate of `bytes` in `duration`, per second; saturates.
pub fn per_second(bytes: u64, duration: Duration) -> u64 {
    let rate = u128::from(bytes) * 1_000_000_000 / duration.as_nanos().max(1000);
    saturating_u64(rate)
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

/// The longest accepted pause. If the fixed part alone exceeds the limit, no number of rounds would help: a
/// quarter and [`GRACE`] are added to the fixed part instead.
pub fn longest(fixed: Duration, limit: Duration) -> Duration {
    if fixed < limit { limit } else { fixed + fixed / 4 + GRACE }
}

/// Decides after `last`, with an expected downtime of `expected` (of which `fixed` does not depend on what
/// is left), and `polished` rounds already spent on shortening an acceptable pause. A
/// pause within the limit is shortened further while each round removes at least 30 % of it: that
/// costs milliseconds of total time and saves the guest most of its gap. A guest that dirties faster
/// than the link sends never gets there; its rounds go on, with the expected downtime reported.
pub fn decide(
    last: Round,
    expected: Duration,
    fixed: Duration,
    limit: Duration,
    polished: u32,
) -> Decision {
    if expected > longest(fixed, limit) {
        return Decision::Again { polishing: false };
    }
    let shrinks = last.left < last.sent / 10 * 7;
    if shrinks && expected > fixed + FLOOR && polished < MAX_POLISHING_ROUNDS {
        return Decision::Again { polishing: true };
    }
    Decision::Stop
}

/// How long a stop may last before the guest is resumed. Where the fixed part exceeds the limit, that is
/// a little more than `predicted`.
pub fn stop_within(longest: Duration, predicted: Duration) -> Duration {
    if predicted <= longest { longest } else { predicted + predicted / 4 + FLOOR }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MB: u64 = 1_000_000;
    const FIXED: Duration = Duration::from_millis(1);

    /// As long as sending takes, and what is fixed.
    fn expected_downtime(bytes: u64, bytes_per_sec: u64, fixed: Duration) -> Duration {
        fixed + send_time(bytes, bytes_per_sec)
    }

    fn after(sent_mb: u64, dirtied_mb: u64, limit: Duration, polished: u32) -> Decision {
        let expected = expected_downtime(dirtied_mb * MB, 1000 * MB, FIXED);
        decide(round(sent_mb, dirtied_mb), expected, FIXED, limit, polished)
    }

    fn round(sent_mb: u64, dirtied_mb: u64) -> Round {
        timed(sent_mb * MB, dirtied_mb * MB, 1000 * MB)
    }

    fn timed(sent_bytes: u64, left_bytes: u64, bytes_per_sec: u64) -> Round {
        let [sent, left] = [sent_bytes, left_bytes].map(|bytes| send_time(bytes, bytes_per_sec));
        Round { sent, left }
    }

    #[test]
    fn a_quiet_guest_is_stopped_at_once() {
        let limit = Duration::from_millis(20);
        assert_eq!(after(1000, 0, limit, 0), Decision::Stop);
    }

    #[test]
    fn a_remainder_over_the_limit_takes_another_round() {
        let again = Decision::Again { polishing: false };
        let limit = Duration::from_millis(20);
        assert_eq!(after(1000, 30, limit, 0), again);
    }

    #[test]
    fn an_acceptable_pause_is_shortened_while_that_works() {
        let limit = Duration::from_millis(20);
        let polish = Decision::Again { polishing: true };
        assert_eq!(after(60, 15, limit, 0), polish);
        let stop = Decision::Stop;
        assert_eq!(after(16, 15, limit, 0), stop, "no longer shrinks");
        assert_eq!(after(60, 15, limit, 10), stop, "enough");
    }

    #[test]
    fn a_fast_guest_writes_on_until_it_is_stopped() {
        assert_eq!(written_until_stopped(500 * MB), MB / 2);
        assert_eq!(written_until_stopped(0), 0);
    }

    #[test]
    fn a_stop_lasts_as_long_as_the_limit_or_a_little_longer_than_promised() {
        let [limit, predicted] = [20, 15].map(Duration::from_millis);
        assert_eq!(stop_within(limit, predicted), limit);
        let predicted = Duration::from_millis(40);
        assert!(stop_within(limit, predicted) > predicted, "no limit could be kept");
        assert!(stop_within(limit, predicted) < predicted * 2);
    }

    #[test]
    fn a_limit_of_zero_still_ends_with_a_clean_guest() {
        assert_eq!(after(1, 0, Duration::ZERO, 0), Decision::Stop);
    }

    #[test]
    fn a_link_too_slow_for_the_limit_still_moves_a_busy_guest() {
        let (fixed, limit) = (Duration::from_millis(100), Duration::from_millis(20));
        let after = |mb: u64| {
            let expected = expected_downtime(mb * MB, 1000 * MB, fixed);
            decide(round(mb, mb), expected, fixed, limit, 0)
        };
        assert_eq!(after(20), Decision::Stop);
        assert_eq!(after(31), Decision::Again { polishing: false });
    }

    /// A guest that dirties `rate` bytes per second of `set` bytes, over a link of `bandwidth`.
    fn rounds_to_stop(rate: u64, set: u64, bandwidth: u64, limit: Duration) -> Option<(u32, u64)> {
        let (mut pending, mut polished) = (1000 * MB, 0);
        for number in 1..200 {
            let duration = expected_downtime(pending, bandwidth, Duration::ZERO);
            let dirtied = u128::from(rate) * duration.as_nanos() / 1_000_000_000;
            let dirtied = u64::try_from(dirtied).unwrap().min(set);
            let last = timed(pending, dirtied, bandwidth);
            pending = dirtied;
            let expected = expected_downtime(dirtied, bandwidth, FIXED);
            match decide(last, expected, FIXED, limit, polished) {
                Decision::Stop => return Some((number, pending)),
                Decision::Again { polishing } => polished += u32::from(polishing),
            }
        }
        None
    }

    proptest! {
        #[test]
        fn a_stop_always_fits_the_limit(
            sent in any::<u32>(), dirtied in any::<u32>(), bandwidth in 1u64..10_000_000_000,
            fixed_us in 0u64..100_000, limit_us in 0u64..2_000_000, polished in 0u32..12,
        ) {
            let fixed = Duration::from_micros(fixed_us);
            let limit = Duration::from_micros(limit_us);
            let last = timed(sent.into(), dirtied.into(), bandwidth);
            let expected = expected_downtime(dirtied.into(), bandwidth, fixed);
            if decide(last, expected, fixed, limit, polished) == Decision::Stop {
                prop_assert!(expected <= limit.max(fixed + fixed / 4 + GRACE));
                prop_assert!(fixed >= limit || expected <= limit);
            }
        }

        #[test]
        fn a_guest_slower_than_the_link_always_gets_there(
            percent in 0u64..90, set_mb in 0u64..900, limit_ms in 5u64..300,
        ) {
            let rate = 2000 * MB / 100 * percent;
            let limit = Duration::from_millis(limit_ms);
            let end = rounds_to_stop(rate, set_mb * MB, 2000 * MB, limit);
            prop_assert!(end.is_some_and(|(rounds, _)| rounds < 100), "{:?}", end);
        }
    }

    #[test]
    fn a_busy_guest_ends_with_far_less_than_the_limit_allows() {
        let limit = Duration::from_millis(20);
        let (_, pending) = rounds_to_stop(500 * MB, 256 * MB, 1900 * MB, limit).unwrap();
        let gap = expected_downtime(pending, 1900 * MB, FIXED);
        assert!(gap < Duration::from_millis(3), "{gap:?}");
    }

    #[test]
    fn a_guest_faster_than_the_link_is_never_stopped_for_too_long() {
        let limit = Duration::from_millis(20);
        assert_eq!(rounds_to_stop(3000 * MB, 900 * MB, 1900 * MB, limit), None);
    }
}
