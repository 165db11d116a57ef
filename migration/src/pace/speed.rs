//! How fast a migration gets on, measured over its last seconds. Pure: the caller brings the figures.

use crate::units::micros;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What is older does not count, once there is enough that is younger.
const WINDOW: Duration = Duration::from_secs(3);
/// Fewer bytes than this are mostly journeys, and tell nothing about the link…
const MEASURABLE_BYTES: u64 = 4 << 20;
/// …unless the link took this long to accept them.
const MEASURABLE_TIME: Duration = Duration::from_secs(1);
/// Until something was measured: a guess that any link of today keeps.
const ASSUMED_BYTES_PER_SEC: u64 = 100 << 20;
/// A page of guest RAM costs no less than this on the wire: a part in so many.
const MAX_SHRINK: u64 = 50;

/// What happened between two looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Bytes on the wire.
    pub sent_bytes: u64,
    /// How long it took, without the time for which the cap held it up.
    pub busy: Duration,
    /// How long of it the link took to accept them; added up over all channels.
    pub writing: Duration,
    /// The guest RAM that these bytes stand for. None in the first round, whose pages (many were never
    /// touched) are not like those that come again.
    pub guest_bytes: Option<u64>,
}

/// What is known of the link, told by who measures it to who needs it.
#[derive(Debug)]
pub struct LinkSpeed {
    bytes_per_sec: AtomicU64,
    /// Microseconds of the shortest round trip.
    round_trip_us: AtomicU64,
}

impl LinkSpeed {
    /// A link over which a greeting and its answer took `round_trip`.
    pub fn new(round_trip: Duration) -> Self {
        let speed = Self {
            bytes_per_sec: AtomicU64::new(ASSUMED_BYTES_PER_SEC),
            round_trip_us: AtomicU64::new(u64::MAX),
        };
        speed.round_trip_took(round_trip);
        speed
    }

    /// Takes note of a measurement.
    pub fn set(&self, bytes_per_sec: u64) {
        self.bytes_per_sec.store(bytes_per_sec, Ordering::Relaxed);
    }

    /// Bytes per second, as last measured.
    pub fn bytes_per_sec(&self) -> u64 {
        self.bytes_per_sec.load(Ordering::Relaxed)
    }

    /// A round trip took so long, at most: the first may have been long because a thread had to start.
    pub fn round_trip_took(&self, duration: Duration) {
        self.round_trip_us.fetch_min(micros(duration), Ordering::Relaxed);
    }

    /// The shortest round trip.
    pub fn round_trip(&self) -> Duration {
        Duration::from_micros(self.round_trip_us.load(Ordering::Relaxed))
    }
}

/// The last seconds.
#[derive(Debug, Default)]
pub struct Speed {
    samples: VecDeque<(Duration, Sample)>,
    measured: Option<u64>,
}

impl Speed {
    /// Adds what has happened until `now`.
    pub fn add(&mut self, now: Duration, sample: Sample) {
        self.samples.push_back((now, sample));
        while let Some((at, oldest)) = self.samples.front()
            && now.saturating_sub(*at) > WINDOW
            && self.sent_bytes() - oldest.sent_bytes >= MEASURABLE_BYTES
        {
            self.samples.pop_front();
        }
        let busy: Duration = self.samples.iter().map(|(_, sample)| sample.busy).sum();
        // A long search for something to send says nothing about the link.
        let writing: Duration = self.samples.iter().map(|(_, sample)| sample.writing).sum();
        let sent = self.sent_bytes();
        if sent >= MEASURABLE_BYTES || writing >= MEASURABLE_TIME {
            self.measured = Some(crate::policy::per_second(sent, busy));
        }
        // Rounds of a few pages each would pile up for as long as they are too few to measure.
        if self.samples.len() > 256 {
            self.samples.pop_front();
        }
    }

    fn sent_bytes(&self) -> u64 {
        self.samples.iter().map(|(_, sample)| sample.sent_bytes).sum()
    }

    /// What the link moves, in bytes per second.
    pub fn bytes_per_sec(&self) -> u64 {
        self.measured.unwrap_or(ASSUMED_BYTES_PER_SEC)
    }

    /// What `guest_bytes` of dirty RAM are likely to be on the wire: less, if pages have lately been
    /// zero or shrunk.
    pub fn on_the_wire(&self, guest_bytes: u64) -> u64 {
        let counted = |sample: &Sample| sample.guest_bytes.filter(|bytes| *bytes > 0);
        let (mut sent, mut guest) = (0u64, 0u64);
        for (_, sample) in &self.samples {
            if let Some(bytes) = counted(sample) {
                (sent, guest) = (sent + sample.sent_bytes, guest + bytes);
            }
        }
        // Few pages may be all zero by chance.
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
