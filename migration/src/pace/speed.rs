//! Measures a migration's bandwidth over the last seconds. Pure: the caller brings the figures.

use crate::units::micros;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Older samples do not count once there are enough newer ones.
const WINDOW: Duration = Duration::from_secs(3);
/// Fewer bytes are dominated by round trips and say nothing about the link…
const MEASURABLE_BYTES: u64 = 4 << 20;
/// …unless the link took this long to accept them.
const MEASURABLE_TIME: Duration = Duration::from_secs(1);
/// Assumed until measured: any current link achieves it.
const ASSUMED_BYTES_PER_SEC: u64 = 100 << 20;
/// Pages are assumed to shrink by no more than this factor.
const MAX_SHRINK: u64 = 50;

/// What was sent in an interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Bytes on the wire.
    pub sent_bytes: u64,
    /// Its duration, without waits for the cap.
    pub busy: Duration,
    /// Time spent in writes, summed over all channels.
    pub writing: Duration,
    /// Guest RAM sent with these bytes. `None` in the first round: its pages, many never touched, are not
    /// representative.
    pub guest_bytes: Option<u64>,
}

/// The link's measured bandwidth and round trip time, shared by all participants.
#[derive(Debug)]
pub struct LinkSpeed {
    bytes_per_sec: AtomicU64,
    /// Shortest round trip.
    round_trip_us: AtomicU64,
}

impl LinkSpeed {
    /// A link whose Hello took `round_trip`.
    pub fn new(round_trip: Duration) -> Self {
        let speed = Self {
            bytes_per_sec: AtomicU64::new(ASSUMED_BYTES_PER_SEC),
            round_trip_us: AtomicU64::new(u64::MAX),
        };
        speed.round_trip_took(round_trip);
        speed
    }

    /// Records a bandwidth measurement.
    pub fn set(&self, bytes_per_sec: u64) {
        self.bytes_per_sec.store(bytes_per_sec, Ordering::Relaxed);
    }

    /// Bytes per second, as last measured.
    pub fn bytes_per_sec(&self) -> u64 {
        self.bytes_per_sec.load(Ordering::Relaxed)
    }

    /// Records a round trip. The shortest one counts: others include the peer's delays.
    pub fn round_trip_took(&self, duration: Duration) {
        self.round_trip_us.fetch_min(micros(duration), Ordering::Relaxed);
    }

    /// The shortest round trip.
    pub fn round_trip(&self) -> Duration {
        Duration::from_micros(self.round_trip_us.load(Ordering::Relaxed))
    }
}

/// Samples of the last seconds.
#[derive(Debug, Default)]
pub struct Speed {
    samples: VecDeque<(Duration, Sample)>,
    measured: Option<u64>,
}

impl Speed {
    /// Adds the sample that ended at `now`.
    pub fn add(&mut self, now: Duration, sample: Sample) {
        self.samples.push_back((now, sample));
        while let Some((at, oldest)) = self.samples.front()
            && now.saturating_sub(*at) > WINDOW
            && self.sent_bytes() - oldest.sent_bytes >= MEASURABLE_BYTES
        {
            self.samples.pop_front();
        }
        let busy: Duration = self.samples.iter().map(|(_, sample)| sample.busy).sum();
        // Time spent looking for dirty pages says nothing about the link.
        let writing: Duration = self.samples.iter().map(|(_, sample)| sample.writing).sum();
        let sent = self.sent_bytes();
        if sent >= MEASURABLE_BYTES || writing >= MEASURABLE_TIME {
            self.measured = Some(crate::policy::per_second(sent, busy));
        }
        // Bounds the memory of many tiny rounds, which never become measurable.
        if self.samples.len() > 256 {
            self.samples.pop_front();
        }
    }

    fn sent_bytes(&self) -> u64 {
        self.samples.iter().map(|(_, sample)| sample.sent_bytes).sum()
    }

    /// The measured bandwidth.
    pub fn bytes_per_sec(&self) -> u64 {
        self.measured.unwrap_or(ASSUMED_BYTES_PER_SEC)
    }

    /// Expected size of `guest_bytes` of dirty RAM on the wire: less if recent pages were zero, compressed or
    /// deltas.
    pub fn on_the_wire(&self, guest_bytes: u64) -> u64 {
        let counted = |sample: &Sample| sample.guest_bytes.filter(|bytes| *bytes > 0);
        let (mut sent, mut guest) = (0u64, 0u64);
        for (_, sample) in &self.samples {
            if let Some(bytes) = counted(sample) {
                (sent, guest) = (sent + sample.sent_bytes, guest + bytes);
            }
        }
        // A small sample may be all zero by chance.
        if guest < MEASURABLE_BYTES {
            return guest_bytes;
        }
        let sent = sent.clamp(guest / MAX_SHRINK, guest);
        let bytes = u128::from(guest_bytes) * u128::from(sent) / u128::from(guest);
        u64::try_from(bytes).unwrap_or(guest_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;
    const NOTHING: Sample =
        Sample { sent_bytes: 0, busy: Duration::ZERO, writing: Duration::ZERO, guest_bytes: None };

    fn add(speed: &mut Speed, second: u64, mb: u64, guest_mb: Option<u64>) {
        let guest_bytes = guest_mb.map(|mb| mb * MB);
        let (busy, writing) = (Duration::from_secs(1), Duration::from_secs(1));
        let sample = Sample { sent_bytes: mb * MB, busy, writing, guest_bytes };
        speed.add(Duration::from_secs(second), sample);
    }

    #[test]
    fn only_the_last_seconds_count() {
        let mut speed = Speed::default();
        for second in 0..10 {
            add(&mut speed, second, 1000, None);
        }
        assert_eq!(speed.bytes_per_sec(), 1000 * MB);
        for second in 10..14 {
            add(&mut speed, second, 100, None);
        }
        assert_eq!(speed.bytes_per_sec(), 100 * MB);
    }

    #[test]
    fn a_slow_link_is_measured_too_and_a_quiet_guest_tells_nothing() {
        let mut speed = Speed::default();
        assert_eq!(speed.bytes_per_sec(), ASSUMED_BYTES_PER_SEC);
        let quiet = Sample { sent_bytes: 100, busy: Duration::from_secs(2), ..NOTHING };
        speed.add(Duration::from_secs(2), quiet);
        assert_eq!(speed.bytes_per_sec(), ASSUMED_BYTES_PER_SEC);
        add(&mut speed, 3, 1, None);
        assert!(speed.bytes_per_sec() < MB, "{}", speed.bytes_per_sec());
    }

    #[test]
    fn pages_that_shrink_make_the_rest_shorter_but_not_nothing() {
        let mut speed = Speed::default();
        add(&mut speed, 1, 100, None);
        assert_eq!(speed.on_the_wire(10 * MB), 10 * MB);
        add(&mut speed, 2, 25, Some(100));
        assert_eq!(speed.on_the_wire(10 * MB), 10 * MB / 4);
        for second in 10..14 {
            add(&mut speed, second, 0, Some(1000));
        }
        assert!(speed.on_the_wire(100 * MB) >= 2 * MB);
        let mut speed = Speed::default();
        add(&mut speed, 1, 11, Some(10));
        assert_eq!(speed.on_the_wire(10 * MB), 10 * MB, "never more than the pages");
    }

    #[test]
    fn endless_small_rounds_take_no_memory() {
        let mut speed = Speed::default();
        for number in 0..10_000 {
            let sample = Sample { sent_bytes: 1, guest_bytes: Some(1), ..NOTHING };
            speed.add(Duration::from_micros(number), sample);
        }
        assert!(speed.samples.len() <= 256);
    }
}
