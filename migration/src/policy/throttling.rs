//! How far to throttle a guest that writes too fast, and when to report that the migration does not
//! converge. Pure.

use crate::params::ThrottleParams;
use crate::units::saturating_u64;
use std::time::Duration;

/// Most steps per decision: its figures are estimates, corrected by the next sample.
const MAX_STEPS: u64 = 4;

/// The new throttle in percent, given the current one `now` and the bytes dirtied and sent per second.
/// Never less than `now`, within the limits: the migration would fall back.
///
/// QEMU takes one step at a time, each after a round or two. Here the number of steps is computed, assuming
/// that the dirty rate is proportional to the run time left to the guest. The last step overshoots only a
/// little: going from 90 to 99 % would leave the guest a tenth of its run time.
pub fn throttle(now: u8, dirtied: u64, sent: u64, params: &ThrottleParams) -> u8 {
    let (now, dirtied, sent) = (u64::from(now.min(99)), u128::from(dirtied), u128::from(sent));
    let wanted = sent * u128::from(params.trigger_threshold);
    let most = u64::from(params.max);
    if dirtied * 100 <= wanted {
        return percent(now.min(most));
    }
    // The run time left to the guest, in percent, rounded down.
    let may_run = u128::from(100 - now) * wanted / (dirtied * 100);
    let needed = 100 - saturating_u64(may_run.min(100));
    let (initial, increment) = (u64::from(params.initial), u64::from(params.increment));
    let first = if now < initial { initial } else { now + increment };
    if params.tailslow {
        return percent(first.min(needed.max(now + 1)).min(most));
    }
    let more_steps = needed.saturating_sub(first).div_ceil(increment.max(1)).min(MAX_STEPS - 1);
    let enough = (needed + (100 - needed) / 4).max(now + 1).max(initial);
    percent((first + more_steps * increment).min(enough).min(most))
}

fn percent(value: u64) -> u8 {
    // At most 99 by the callers' bounds.
    u8::try_from(value).unwrap_or(99)
}

/// Consecutive bad samples before non-convergence is reported.
const LOOKS: u32 = 2;

/// Detects a migration that does not converge.
#[derive(Debug, Default)]
pub struct Convergence {
    bad_looks: u32,
    reported: bool,
}

impl Convergence {
    /// After a sample in the middle of a round. Returns true when non-convergence has to be reported: once,
    /// until the migration converges again.
    pub fn look(&mut self, dirtied_per_sec: u64, sent_per_sec: u64) -> bool {
        self.bad_looks = if dirtied_per_sec > sent_per_sec { self.bad_looks + 1 } else { 0 };
        self.bad_looks >= LOOKS && !std::mem::replace(&mut self.reported, true)
    }

    /// After a round that took `sent` to send and leaves another of `left`, within the limit if `fits`.
    /// Returns true as [`Convergence::look`] does.
    pub fn round(&mut self, sent: Duration, left: Duration, fits: bool) -> bool {
        if fits || left < sent / 10 * 7 {
            *self = Self::default();
            return false;
        }
        left >= sent / 10 * 9 && !std::mem::replace(&mut self.reported, true)
    }

    /// Whether non-convergence has been reported.
    pub fn is_reported(&self) -> bool {
        self.reported
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MB: u64 = 1_000_000;

    fn params() -> ThrottleParams {
        ThrottleParams::default()
    }

    #[test]
    fn a_guest_below_the_threshold_is_left_alone() {
        assert_eq!(throttle(0, 50 * MB, 100 * MB, &params()), 0);
        assert_eq!(throttle(30, 0, 100 * MB, &params()), 30);
        assert_eq!(throttle(0, 51 * MB, 100 * MB, &params()), 20);
        assert_eq!(throttle(0, 0, 0, &params()), 0);
    }

    #[test]
    fn steps_are_taken_together_when_they_are_needed() {
        assert_eq!(throttle(0, 500 * MB, 125 * MB, &params()), 50, "four steps at most");
        assert_eq!(throttle(50, 250 * MB, 125 * MB, &params()), 90);
        assert_eq!(throttle(90, 100 * MB, 125 * MB, &params()), 95, "94 would just do");
        let one = ThrottleParams { increment: 1, ..params() };
        assert_eq!(throttle(40, 150 * MB, 125 * MB, &one), 44);
    }

    #[test]
    fn the_limits_hold() {
        let gentle = ThrottleParams { max: 35, ..params() };
        assert_eq!(throttle(0, 5000 * MB, MB, &gentle), 35);
        assert_eq!(throttle(80, MB, 1000 * MB, &gentle), 35, "the maximum was lowered");
        let slow = ThrottleParams { tailslow: true, ..params() };
        assert_eq!(throttle(0, 5000 * MB, MB, &slow), 20);
        assert_eq!(throttle(20, 5000 * MB, MB, &slow), 30);
        assert_eq!(
            throttle(50, 52 * MB, 100 * MB, &slow),
            52,
            "the last step is as small as it may be"
        );
    }

    /// Rounds until a guest of `rate` fits, with a throttle that acts as well as it says, or None.
    fn rounds_until_it_fits(rate: u64, bandwidth: u64, params: &ThrottleParams) -> Option<u32> {
        let mut now = 0;
        for round in 0..40 {
            let dirtied = rate * u64::from(100 - now) / 100;
            if dirtied * 100 <= bandwidth * u64::from(params.trigger_threshold) {
                return Some(round);
            }
            let next = throttle(now, dirtied, bandwidth, params);
            assert!(next > now || now >= params.max, "{now} -> {next} at {dirtied} of {bandwidth}");
            now = next;
        }
        None
    }

    proptest! {
        #[test]
        fn a_guest_that_can_be_slowed_enough_is_within_a_few_looks(
            rate_mb in 1u64..4000, bandwidth_mb in 1u64..4000, threshold in 1u8..=100,
        ) {
            let params = ThrottleParams { trigger_threshold: threshold, ..params() };
            let possible = rate_mb * MB / 100 * 100 <= bandwidth_mb * MB * u64::from(threshold);
            let rounds = rounds_until_it_fits(rate_mb * MB, bandwidth_mb * MB, &params);
            prop_assert!(!possible || rounds.is_some_and(|rounds| rounds <= 4), "{:?}", rounds);
        }

        #[test]
        fn it_never_leaves_its_range(
            now in 0u8..=99, dirtied: u64, sent: u64, threshold in 1u8..=100,
            initial in 1u8..=99, increment in 1u8..=99, more in 0u8..=98, tailslow: bool,
        ) {
            let max = (initial + more).min(99);
            let params =
                ThrottleParams { trigger_threshold: threshold, initial, increment, tailslow, max };
            let next = throttle(now, dirtied, sent, &params);
            prop_assert!(next <= max, "{} of at most {}", next, max);
            prop_assert!(next >= now.min(max), "{} -> {}", now, next);
        }
    }

    #[test]
    fn a_reported_migration_says_so_once_until_there_is_hope() {
        let mut convergence = Convergence::default();
        let [sent, same, half] = [1000, 950, 500].map(Duration::from_millis);
        assert!(!convergence.look(200, 100), "one look may be wrong");
        assert!(convergence.look(200, 100));
        assert!(!convergence.look(200, 100) && convergence.is_reported(), "said already");
        assert!(!convergence.round(sent, same, false), "said already");
        assert!(!convergence.round(sent, half, false) && !convergence.is_reported(), "it shrinks");
        assert!(convergence.round(sent, same, false), "and again");
        assert!(!convergence.round(sent, same, true), "what fits the limit need not shrink");
    }
}
