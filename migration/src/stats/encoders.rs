//! What became of pages that encoders were tried on, and the rates over the last period: QEMU's
//! `xbzrle-cache` and `compression`. Counted by shards, kept in [`super::StatsSnapshot`].

use super::StatsSnapshot;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const PAGE: u64 = devices::ram::PAGE_SIZE;
/// QEMU's: rates are those of the last period of this length at least.
const PERIOD: Duration = Duration::from_secs(1);

/// Pages that XBZRLE was tried on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct XbzrleStats {
    /// Size of the caches, in bytes; 0 if XBZRLE is off.
    pub cache_size: u64,
    /// Channels on which it rests now, because it does not pay.
    pub resting_channels: u16,
    /// Pages sent as deltas.
    pub pages: u64,
    /// Bytes of the deltas.
    pub bytes: u64,
    /// Cache misses.
    pub misses: u64,
    /// Pages whose delta would have saved too little, or less than compression.
    pub overflows: u64,
    /// Pages written without a change; not sent.
    pub unchanged: u64,
}

impl XbzrleStats {
    /// Adds newer counts; what is no count stays.
    pub(crate) fn add(&mut self, more: Self) {
        self.pages += more.pages;
        self.bytes += more.bytes;
        self.misses += more.misses;
        self.overflows += more.overflows;
        self.unchanged += more.unchanged;
    }

    /// The counts since `before`.
    fn since(self, before: Self) -> Self {
        Self {
            pages: self.pages - before.pages,
            bytes: self.bytes - before.bytes,
            misses: self.misses - before.misses,
            overflows: self.overflows - before.overflows,
            unchanged: self.unchanged - before.unchanged,
            ..self
        }
    }

    /// Bytes of the pages found in the cache by those sent for them, as in QEMU: a page whose delta is too
    /// long counts as a page. 0 if nothing was sent.
    fn encoding_rate(&self) -> f64 {
        let found = self.pages + self.overflows + self.unchanged;
        ratio(found * PAGE, self.bytes + self.overflows * PAGE)
    }

    /// As QEMU's `xbzrle-cache`, with the rates of `last`.
    pub(super) fn to_json(self, last: &Period) -> Value {
        json!({
            "cache-size": self.cache_size,
            "bytes": self.bytes,
            "pages": self.pages,
            "cache-miss": self.misses,
            "cache-miss-rate": last.cache_miss_rate(),
            "encoding-rate": last.xbzrle.encoding_rate(),
            "overflow": self.overflows,
            "x-resting-channels": self.resting_channels,
        })
    }
}

/// Compressed pages. They also count as normal pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CompressionStats {
    /// Whether compression is on.
    pub enabled: bool,
    /// Channels on which it rests now, because it does not pay.
    pub resting_channels: u16,
    pub pages: u64,
    /// Bytes of those, compressed.
    pub bytes: u64,
}

impl CompressionStats {
    /// Adds newer counts; what is no count stays.
    pub(crate) fn add(&mut self, more: Self) {
        self.pages += more.pages;
        self.bytes += more.bytes;
    }

    fn since(self, before: Self) -> Self {
        Self { pages: self.pages - before.pages, bytes: self.bytes - before.bytes, ..self }
    }

    fn rate(&self) -> f64 {
        ratio(self.pages * PAGE, self.bytes)
    }

    /// As QEMU's `compression`, with the rate of `last`.
    pub(super) fn to_json(self, last: &Period) -> Value {
        json!({
            "pages": self.pages,
            // Pages sent uncompressed because all threads were busy: each waits for its own.
            "busy": 0,
            "busy-rate": 0.0,
            "compressed-size": self.bytes,
            "compression-rate": last.compression.rate(),
            "x-resting-channels": self.resting_channels,
        })
    }
}

fn ratio(of: u64, to: u64) -> f64 {
    if to == 0 { 0.0 } else { of as f64 / to as f64 }
}

/// What was sent in some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Period {
    pub duration: Duration,
    /// Pages of any kind that were sent, or found to be unchanged.
    pub pages: u64,
    pub xbzrle: XbzrleStats,
    pub compression: CompressionStats,
}

impl Period {
    /// What was sent in `duration`, between two copies of the counters.
    pub fn between(before: &StatsSnapshot, after: &StatsSnapshot, duration: Duration) -> Self {
        Self {
            duration,
            pages: after.pages_sent() - before.pages_sent(),
            xbzrle: after.xbzrle.since(before.xbzrle),
            compression: after.compression.since(before.compression),
        }
    }

    /// The part of all pages that XBZRLE looked for in vain, as in QEMU.
    fn cache_miss_rate(&self) -> f64 {
        ratio(self.xbzrle.misses, self.pages)
    }

    pub(super) fn pages_per_sec(&self) -> u64 {
        crate::policy::per_second(self.pages, self.duration)
    }

    /// For `x-rounds`.
    pub(super) fn to_json(self) -> Value {
        let (xbzrle, compression) = (self.xbzrle, self.compression);
        json!({
            "pages": self.pages,
            "compressed": compression.pages,
            "compression-rate": compression.rate(),
            "compression-resting-channels": compression.resting_channels,
            "xbzrle": xbzrle.pages,
            "skipped": xbzrle.unchanged,
            "cache-miss-rate": self.cache_miss_rate(),
            "encoding-rate": xbzrle.encoding_rate(),
            "xbzrle-resting-channels": xbzrle.resting_channels,
        })
    }
}

/// Divides a migration into periods.
pub(crate) struct Periods {
    began: Instant,
    before: StatsSnapshot,
    /// Until the first one has ended, what there is of it is better than nothing.
    first: bool,
}

impl Periods {
    /// The first begins at `now`, where the counters are `figures`.
    pub(crate) fn new(now: Instant, figures: StatsSnapshot) -> Self {
        Self { began: now, before: figures, first: true }
    }

    /// The period to report, with the counters at `figures` at `now`; `None` if the last one is still the one.
    pub(crate) fn look(&mut self, now: Instant, figures: StatsSnapshot) -> Option<Period> {
        let duration = now.saturating_duration_since(self.began);
        let period = Period::between(&self.before, &figures, duration);
        if duration >= PERIOD {
            (self.began, self.before, self.first) = (now, figures, false);
            return Some(period);
        }
        self.first.then_some(period)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_the_last_second_and_have_qemus_meaning() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let figures =
            |normal_pages, xbzrle| StatsSnapshot { normal_pages, xbzrle, ..Default::default() };
        let mut periods = Periods::new(start, StatsSnapshot::default());
        // Misses while the cache fills: of 100 pages all.
        let filling = XbzrleStats { misses: 100, ..Default::default() };
        let period = periods.look(at(500), figures(100, filling)).unwrap();
        assert_eq!((period.cache_miss_rate(), period.pages_per_sec()), (1.0, 200));
        assert_eq!(period.xbzrle.encoding_rate(), 0.0);
        periods.look(at(1000), figures(100, filling)).unwrap();
        // Then one of 100 is missing, 50 are deltas of 64 bytes, 40 have not changed, 9 have too much.
        let hits = XbzrleStats {
            misses: 101,
            pages: 50,
            bytes: 3200,
            overflows: 9,
            unchanged: 40,
            ..filling
        };
        let now = figures(110, hits);
        assert_eq!(periods.look(at(1500), now.clone()), None, "half a second says nothing");
        let period = periods.look(at(2000), now).unwrap();
        assert_eq!(period.cache_miss_rate(), 0.01);
        let expected = 99.0 * 4096.0 / (3200.0 + 9.0 * 4096.0);
        assert!((period.xbzrle.encoding_rate() - expected).abs() < 1e-9);
        let json = hits.to_json(&period);
        assert_eq!((&json["cache-miss-rate"], &json["cache-miss"]), (&0.01.into(), &101.into()));
    }
}
