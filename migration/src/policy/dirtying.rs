//! Estimates the guest's dirty rate from samples of the dirty log in the middle of a round. Pure.
//!
//! The log records that a page was written, not how often, and nothing about pages that are dirty already.
//! After a long round, with the whole working set dirty, dirtied bytes per time are far below the rate at
//! which the guest would dirty clean pages, and throttling by that figure would take many rounds. So newly
//! dirtied bytes are related to the bytes that were clean.

use crate::units::saturating_u64;
use std::time::Duration;

/// A sample of the dirty log; all counts since the start of the round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Look {
    /// Time on the caller's clock.
    pub at: Duration,
    /// Bytes of pages of this round that were sent.
    pub sent_bytes: u64,
    /// Of those, bytes that are dirty again.
    pub again_bytes: u64,
    /// Dirty bytes that were clean at the start of the round.
    pub fresh_bytes: u64,
}

/// At least one part in this many of the working set is taken as clean.
const MIN_CLEAN: u64 = 8;
/// Samples closer together than this are skipped.
const CLOSE: Duration = Duration::from_millis(20);
/// Fewer samples give no estimate: a guest that writes sequentially either hits the pages just sent or does
/// not.
const MIN_LOOKS: u32 = 2;

/// The estimator of one round.
#[derive(Debug, Default)]
pub struct Dirtying {
    last: Look,
    /// Bytes dirty at the start of the round. `None` in the first round, in which everything is, whether in
    /// use or not.
    set_bytes: Option<u64>,
    since: Since,
}

/// Sums since the start of the round, or since the guest was throttled.
#[derive(Debug, Default)]
struct Since {
    looks: u32,
    elapsed: Duration,
    again_bytes: u64,
    fresh_bytes: u64,
    /// Integral of the clean bytes over time, in byte nanoseconds.
    clean: u128,
}

impl Dirtying {
    /// Starts a round.
    pub fn begin(&mut self, at: Duration, set_bytes: Option<u64>) {
        *self = Self { last: Look { at, ..Look::default() }, set_bytes, since: Since::default() };
    }

    /// Adds a sample.
    pub fn look(&mut self, look: Look) {
        let elapsed = look.at.saturating_sub(self.last.at);
        if elapsed < CLOSE {
            return;
        }
        let last = std::mem::replace(&mut self.last, look);
        let clean = |look: &Look| look.sent_bytes.saturating_sub(look.again_bytes);
        let clean_bytes = clean(&last) / 2 + clean(&look) / 2;
        let since = &mut self.since;
        since.looks += 1;
        since.elapsed += elapsed;
        since.again_bytes += look.again_bytes.saturating_sub(last.again_bytes);
        since.fresh_bytes += look.fresh_bytes.saturating_sub(last.fresh_bytes);
        since.clean += u128::from(clean_bytes) * elapsed.as_nanos();
    }

    /// Restarts the estimate: the guest's throttle was changed.
    pub fn forget_rate(&mut self) {
        self.since = Since::default();
    }

    /// Bytes per second that the guest would dirty if its pages were clean; `None` before there were enough
    /// samples.
    pub fn bytes_per_sec(&self) -> Option<u64> {
        let Since { looks, elapsed, again_bytes, fresh_bytes, clean } = &self.since;
        if *looks < MIN_LOOKS {
            return None;
        }
        let set = self.set_bytes.unwrap_or(self.last.sent_bytes).max(self.last.again_bytes);
        let clean_bytes = saturating_u64(clean / elapsed.as_nanos().max(1));
        let clean_bytes = clean_bytes.max(set / MIN_CLEAN).max(1);
        // u128: bytes times bytes.
        let of_the_set = u128::from(*again_bytes) * u128::from(set) / u128::from(clean_bytes);
        let bytes = saturating_u64(of_the_set).saturating_add(*fresh_bytes);
        Some(super::per_second(bytes, *elapsed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// A guest that writes the pages of `set_mb` at random at `rate_mb`, sent at `bandwidth_mb`, looked
    /// at every `look_ms`. Returns the estimates.
    fn estimates(
        set_mb: u64,
        rate_mb: u64,
        bandwidth_mb: u64,
        look_ms: u64,
        first: bool,
    ) -> Vec<f64> {
        const PAGE: f64 = 1.0 / 256.0;
        let (mut dirtying, mut found) = (Dirtying::default(), Vec::new());
        let set_bytes = if first { None } else { Some(set_mb * MB) };
        dirtying.begin(Duration::ZERO, set_bytes);
        let hazard = rate_mb as f64 / set_mb as f64;
        let seconds = set_mb as f64 / bandwidth_mb as f64;
        let mut time = 0.0;
        while time < seconds {
            time = f64::min(time + look_ms as f64 / 1000.0, seconds);
            let sent = bandwidth_mb as f64 * time;
            let mut again = 0.0;
            let mut at = 0.0;
            while at < sent {
                again += PAGE * (1.0 - (-hazard * (time - at / bandwidth_mb as f64)).exp());
                at += PAGE;
            }
            #[expect(clippy::cast_possible_truncation, reason = "a few hundred MB")]
            let bytes = |mb: f64| (mb * MB as f64) as u64;
            let (sent_bytes, again_bytes) = (bytes(sent), bytes(again));
            let at = Duration::from_secs_f64(time);
            dirtying.look(Look { at, sent_bytes, again_bytes, fresh_bytes: 0 });
            found.extend(dirtying.bytes_per_sec().map(|rate| rate as f64 / MB as f64));
        }
        found
    }

    #[test]
    fn the_rate_is_found_although_the_working_set_is_dirty_as_a_whole() {
        for rate in [50, 125, 300] {
            let found = estimates(268, rate, 125, 250, false);
            assert!(found.len() > 5);
            for estimate in &found[1..] {
                let ratio = estimate / rate as f64;
                assert!((0.75..1.25).contains(&ratio), "{estimate} of {rate}: {found:?}");
            }
        }
        // Where nearly all is dirty again, at least that is seen.
        let found = estimates(268, 2000, 125, 250, false);
        assert!(found.iter().all(|estimate| *estimate > 400.0), "{found:?}");
    }

    /// A guest that writes its pages in turn meets what was sent, in one piece, now and then.
    #[test]
    fn a_guest_that_writes_page_after_page_does_not_hide() {
        let (set, rate, bandwidth) = (268.0, 500.0, 125.0);
        for start in [0.0, 60.0, 130.0, 200.0] {
            let mut dirtying = Dirtying::default();
            dirtying.begin(Duration::ZERO, Some(268 * MB));
            let mut found = Vec::new();
            for tick in 1..=8 {
                let time = f64::from(tick) * 0.25;
                // A megabyte is dirty again if it was written after it was sent.
                let again = (0..268).map(f64::from).filter(|at| {
                    let sent = at / bandwidth;
                    let position = |time: f64| (start + rate * time - at) / set;
                    sent < time && position(time).floor() > position(sent).floor()
                });
                let bytes = |mb: f64| Duration::from_secs_f64(mb).as_secs() * MB;
                dirtying.look(Look {
                    at: Duration::from_secs_f64(time),
                    sent_bytes: bytes(bandwidth * time),
                    again_bytes: again.count() as u64 * MB,
                    fresh_bytes: 0,
                });
                found.extend(dirtying.bytes_per_sec().map(|rate| rate / MB));
            }
            assert!(found[1..].iter().all(|rate| (200..1500).contains(rate)), "{start}: {found:?}");
        }
    }

    #[test]
    fn in_the_first_round_it_is_not_overestimated() {
        // Only what was sent so far is known to be in use.
        for estimate in estimates(268, 500, 125, 250, true) {
            assert!(estimate < 600.0, "{estimate}");
        }
    }

    #[test]
    fn what_is_new_is_added() {
        let mut dirtying = Dirtying::default();
        dirtying.begin(Duration::ZERO, Some(100 * MB));
        let at = Duration::from_secs(1);
        let look = Look { at, sent_bytes: 50 * MB, again_bytes: 0, fresh_bytes: 30 * MB };
        dirtying.look(look);
        dirtying.look(Look { at: at + Duration::from_micros(1), ..look });
        assert_eq!(dirtying.bytes_per_sec(), None, "one look is not enough");
        dirtying.look(Look { at: at * 2, fresh_bytes: 40 * MB, ..look });
        assert_eq!(dirtying.bytes_per_sec(), Some(20 * MB));
        dirtying.forget_rate();
        assert_eq!(dirtying.bytes_per_sec(), None);
    }
}
