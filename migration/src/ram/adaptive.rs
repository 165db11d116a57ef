//! Decides whether to try an encoder on the next pages. One instance per shard and encoder (XBZRLE,
//! compression). `encode` asks before it encodes, and afterwards reports the encoded size and the time
//! spent. Pure: no clocks, no guest data.
//!
//! An encoder wins if it takes less time than the link would have taken for the bytes it saves. One
//! that loses over a window of bytes rests while a number of bytes are sent without it, then gets a
//! short trial; each lost trial doubles the rest.

use std::time::Duration;

/// Bytes of pages after which an encoder is judged: normally, and in a trial after a rest.
const WINDOW_BYTES: u64 = 1 << 20;
const TRIAL_BYTES: u64 = 256 << 10;
/// The first rest, and the longest one: at a gigabyte a second, a trial every quarter of a second.
const FIRST_REST_BYTES: u64 = 4 << 20;
const MAX_REST_BYTES: u64 = 256 << 20;
/// While the link's bandwidth is unknown, an encoder must save one byte in this many.
const BLIND_SAVING: u64 = 8;

/// What an encoder made of some pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Trial {
    /// Bytes of the pages.
    pub raw_bytes: u64,
    /// Bytes sent for them, encoded or, where that failed, raw.
    pub sent_bytes: u64,
    /// How long the encoder took, successful or not.
    pub cost: Duration,
}

/// Whether an encoder is worth trying.
#[derive(Debug)]
pub struct Adaptive {
    state: State,
    /// How long the next rest is.
    rest_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// In use or on trial; judged after `left_bytes` more.
    Trying { sum: Trial, left_bytes: u64 },
    /// Not used for `left_bytes` more.
    Resting { left_bytes: u64 },
}

impl Default for Adaptive {
    fn default() -> Self {
        Self { state: State::trying(WINDOW_BYTES), rest_bytes: FIRST_REST_BYTES }
    }
}

impl State {
    fn trying(left_bytes: u64) -> Self {
        Self::Trying { sum: Trial::default(), left_bytes }
    }
}

impl Adaptive {
    /// Whether to try the encoder on the next pages.
    pub fn worth_trying(&self) -> bool {
        matches!(self.state, State::Trying { .. })
    }

    /// Records a use of the encoder. `link_bytes_per_sec` is the measured throughput of the shard's
    /// channel, bandwidth cap and peer included; 0 if unknown. Pages that the encoder never saw, such as
    /// cache misses, do not count.
    pub fn tried(&mut self, trial: Trial, link_bytes_per_sec: u64) {
        let State::Trying { sum, left_bytes } = &mut self.state else { return };
        sum.raw_bytes = sum.raw_bytes.saturating_add(trial.raw_bytes);
        sum.sent_bytes = sum.sent_bytes.saturating_add(trial.sent_bytes);
        sum.cost = sum.cost.saturating_add(trial.cost);
        *left_bytes = left_bytes.saturating_sub(trial.raw_bytes);
        if *left_bytes > 0 {
            return;
        }
        if wins(sum, link_bytes_per_sec) {
            self.rest_bytes = FIRST_REST_BYTES;
            self.state = State::trying(WINDOW_BYTES);
        } else {
            self.state = State::Resting { left_bytes: self.rest_bytes };
            self.rest_bytes = (self.rest_bytes * 2).min(MAX_REST_BYTES);
        }
    }

    /// Records pages of `raw_bytes` sent without the encoder.
    pub fn passed(&mut self, raw_bytes: u64) {
        let State::Resting { left_bytes } = &mut self.state else { return };
        *left_bytes = left_bytes.saturating_sub(raw_bytes);
        if *left_bytes == 0 {
            self.state = State::trying(TRIAL_BYTES);
        }
    }
}

fn wins(sum: &Trial, link_bytes_per_sec: u64) -> bool {
    let saved_bytes = sum.raw_bytes.saturating_sub(sum.sent_bytes);
    if link_bytes_per_sec == 0 {
        return saved_bytes >= sum.raw_bytes / BLIND_SAVING;
    }
    // u128: bytes times nanoseconds overflow 64 bits.
    let saved_nanos = u128::from(saved_bytes) * 1_000_000_000 / u128::from(link_bytes_per_sec);
    saved_nanos > sum.cost.as_nanos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RUN: u64 = 256 << 10;
    const GIGABIT: u64 = 125_000_000;

    /// A run that shrinks to `percent` of its size in the time that `rate` bytes a second allow.
    fn trial(percent: u64, rate: u64) -> Trial {
        let cost = Duration::from_nanos(RUN * 1_000_000_000 / rate);
        Trial { raw_bytes: RUN, sent_bytes: RUN * percent / 100, cost }
    }

    /// Bytes sent raw until the encoder is tried again.
    fn rest(adaptive: &mut Adaptive) -> u64 {
        let mut bytes = 0;
        while !adaptive.worth_trying() {
            adaptive.passed(RUN);
            bytes += RUN;
        }
        bytes
    }

    fn work(adaptive: &mut Adaptive, trial: Trial, link: u64) -> u64 {
        let mut bytes = 0;
        while adaptive.worth_trying() && bytes < 100 * WINDOW_BYTES {
            adaptive.tried(trial, link);
            bytes += RUN;
        }
        bytes
    }

    #[test]
    fn an_encoder_that_wins_goes_on() {
        let mut adaptive = Adaptive::default();
        // 4 GB/s of XBZRLE, or 250 MB/s of compression to a third, before a gigabit.
        assert_eq!(work(&mut adaptive, trial(5, 4_000_000_000), GIGABIT), 100 * WINDOW_BYTES);
        assert_eq!(work(&mut adaptive, trial(33, 250_000_000), GIGABIT), 100 * WINDOW_BYTES);
    }

    #[test]
    fn an_encoder_that_is_slower_than_the_link_rests() {
        // The same compression before a memory-fast socket, and one that saves nothing at all.
        for (trial, link) in [
            (trial(33, 250_000_000), 2_000_000_000),
            (trial(100, 4_000_000_000), GIGABIT),
            (trial(110, 4_000_000_000), GIGABIT),
            (trial(95, 4_000_000_000), 0),
        ] {
            let mut adaptive = Adaptive::default();
            assert_eq!(work(&mut adaptive, trial, link), WINDOW_BYTES);
            assert_eq!(rest(&mut adaptive), FIRST_REST_BYTES);
        }
    }

    #[test]
    fn rests_get_longer_up_to_a_limit_and_short_again_after_a_win() {
        let mut adaptive = Adaptive::default();
        let (loser, winner) = (trial(100, 1_000_000_000), trial(10, 1_000_000_000));
        work(&mut adaptive, loser, GIGABIT);
        let mut expected = FIRST_REST_BYTES;
        for _ in 0..10 {
            assert_eq!(rest(&mut adaptive), expected);
            assert_eq!(work(&mut adaptive, loser, GIGABIT), TRIAL_BYTES);
            expected = (expected * 2).min(MAX_REST_BYTES);
        }
        assert_eq!(rest(&mut adaptive), MAX_REST_BYTES);
        adaptive.tried(winner, GIGABIT);
        assert_eq!(work(&mut adaptive, loser, GIGABIT), WINDOW_BYTES);
        assert_eq!(rest(&mut adaptive), FIRST_REST_BYTES);
    }

    #[test]
    fn a_loser_costs_less_than_a_fiftieth_in_the_long_run() {
        let mut adaptive = Adaptive::default();
        let (mut tried, mut passed) = (0, 0);
        while tried + passed < 8 << 30 {
            tried += work(&mut adaptive, trial(100, 1_000_000_000), GIGABIT);
            passed += rest(&mut adaptive);
        }
        assert!(tried * 50 < passed, "{tried} of {passed}");
    }

    proptest! {
        #[test]
        fn it_never_gets_stuck_or_overflows(
            steps in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()), 0..50),
        ) {
            let mut adaptive = Adaptive::default();
            for (raw_bytes, sent_bytes, nanos, link) in steps {
                adaptive.tried(Trial { raw_bytes, sent_bytes, cost: Duration::from_nanos(nanos) }, link);
                adaptive.passed(raw_bytes);
            }
            prop_assert!(rest(&mut adaptive) <= MAX_REST_BYTES);
        }
    }
}
