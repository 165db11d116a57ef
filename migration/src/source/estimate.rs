//! Estimates the downtime of a stop, part by part, from measured passes and stops, called-off stops
//! included. Used only by the driver, to decide when to stop the guest.

use crate::guest::PartTime;
use crate::participant::{Cost, Pending};
use std::time::{Duration, Instant};

/// Initial values, until a stop was measured.
const STOPPING: Duration = Duration::from_micros(200);
const DEVICE_STATE: Duration = Duration::from_micros(400);
const RESUMING: Duration = Duration::from_micros(400);
/// Draining and flushing count as fixed cost up to this: a lower limit must not prevent a migration.
const NEGLIGIBLE: Duration = Duration::from_millis(2);
/// Backoff after a called-off stop; doubled after each further one in a row.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// A part that is measured only by stops.
#[derive(Debug, Clone)]
struct Learned {
    part: String,
    time: Duration,
    /// Independent of how much is left to send.
    fixed: bool,
}

impl Learned {
    fn new(part: &str, time: Duration, fixed: bool) -> Self {
        Self { part: part.to_owned(), time, fixed }
    }

    /// A longer time counts at once, a shorter one gradually: underestimates are expensive.
    fn learn(&mut self, took: Duration) {
        self.time = match self.time.checked_sub(took) {
            None => took,
            Some(less) => self.time - less / 4,
        };
    }
}

/// The parts of the pause.
#[derive(Debug)]
pub(super) struct Estimate {
    stopping: Learned,
    drain: Learned,
    flush: Learned,
    device_state: Learned,
    resuming: Learned,
    round_trips: Duration,
    /// Of the participants, as of the last pass.
    costs: Vec<Cost>,
    /// By how much stops exceeded their prediction; decays with every pass.
    margin: Duration,
    /// Called-off stops in a row, and the end of the backoff.
    called_off: u32,
    backoff_until: Option<Instant>,
}

impl Estimate {
    pub(super) fn new() -> Self {
        Self {
            stopping: Learned::new("stopping vCPUs", STOPPING, true),
            drain: Learned::new("draining disks", Duration::ZERO, false),
            flush: Learned::new("flushing disks", Duration::ZERO, false),
            device_state: Learned::new("saving device state", DEVICE_STATE, true),
            resuming: Learned::new("resuming at the destination", RESUMING, true),
            round_trips: Duration::ZERO,
            costs: Vec::new(),
            margin: Duration::ZERO,
            called_off: 0,
            backoff_until: None,
        }
    }

    /// Updates the costs after a pass.
    pub(super) fn weigh<'p>(
        &mut self,
        pending: impl Iterator<Item = &'p Pending>,
        round_trip: Duration,
    ) {
        self.costs = pending.flat_map(|pending| pending.costs.iter().cloned()).collect();
        // `Eof` out and `Ready` back, then `Go` out and the guest runs.
        self.round_trips = round_trip * 2;
    }

    /// Decays the margin after a pass.
    pub(super) fn decay_margin(&mut self) {
        self.margin -= self.margin / 4;
    }

    fn learned(&self) -> [&Learned; 5] {
        [&self.stopping, &self.drain, &self.flush, &self.device_state, &self.resuming]
    }

    /// The estimated downtime.
    pub(super) fn total(&self) -> Duration {
        let learned: Duration = self.learned().iter().map(|learned| learned.time).sum();
        let costs: Duration = self.costs.iter().map(|cost| cost.time).sum();
        learned + costs + self.round_trips + self.margin
    }

    /// The rest of a pause, once vCPUs have stopped and the dirty log was read.
    pub(super) fn left_after_stop(&self) -> Duration {
        self.total().saturating_sub(self.stopping.time + self.drain.time + self.margin)
    }

    /// The part that takes longest.
    pub(super) fn largest(&self) -> PartTime {
        let [first, others @ ..] = self.learned().map(|one| (one.part.as_str(), one.time));
        let costs = self.costs.iter().map(|cost| (cost.part, cost.time));
        let longer =
            |one: (_, Duration), other: (_, Duration)| if other.1 < one.1 { one } else { other };
        let (part, time) = others.into_iter().chain(costs).fold(first, longer);
        PartTime::new(part, time)
    }

    /// The fixed part of the pause, independent of what is left to send.
    pub(super) fn floor(&self) -> Duration {
        let part = |time: Duration, fixed| if fixed { time } else { time.min(NEGLIGIBLE) };
        let learned = self.learned().iter().map(|learned| part(learned.time, learned.fixed)).sum();
        let fixed = self.costs.iter().filter(|cost| cost.fixed).map(|cost| cost.time);
        fixed.sum::<Duration>() + self.round_trips + learned
    }

    /// The part that makes a stop exceed `longest` however little is left to send: a disk that is slow to
    /// drain or to flush.
    pub(super) fn obstacle(&self, longest: Duration) -> Option<PartTime> {
        let learned = [&self.drain, &self.flush].into_iter();
        let worst = learned.max_by_key(|learned| learned.time)?;
        let rest = self.floor() - worst.time.min(NEGLIGIBLE);
        (worst.time > NEGLIGIBLE && rest + worst.time > longest)
            .then(|| PartTime::new(worst.part.clone(), worst.time))
    }

    /// Whether a stop would fit if disks took no time to flush.
    pub(super) fn flush_blocks(&self, longest: Duration) -> bool {
        let total = self.total();
        total > longest && total - self.flush.time <= longest
    }

    // What stops have measured.

    /// Records the time to stop vCPUs and drain disks; `drains` has the longest first.
    pub(super) fn stopped_in(&mut self, whole: Duration, drains: &[PartTime]) {
        let longest = drains.first();
        self.stopping.learn(whole.saturating_sub(longest.map_or(Duration::ZERO, |one| one.took)));
        if let Some(longest) = longest {
            self.drained_in(longest);
        }
    }

    /// Records how long a disk took to drain, or was waited for.
    pub(super) fn drained_in(&mut self, drain: &PartTime) {
        if drain.took >= self.drain.time {
            self.drain.part.clone_from(&drain.part);
        }
        self.drain.learn(drain.took);
    }

    /// Records a flush of shared disks. The last one counts: the flush ahead of a stop leaves equally little
    /// to do each time.
    pub(super) fn flushed_in(&mut self, flush: &PartTime) {
        self.flush.part.clone_from(&flush.part);
        self.flush.time = flush.took;
    }

    /// Records the time to save and send device state.
    pub(super) fn saved_in(&mut self, took: Duration) {
        self.device_state.learn(took);
    }

    /// Records the time from the last byte to `Ready`, mostly spent by the destination.
    pub(super) fn ready_in(&mut self, took: Duration) {
        self.resuming.learn(took.saturating_sub(self.round_trips / 2));
    }

    /// `Ready` did not come in so long: the next stop may take longer.
    pub(super) fn not_ready_in(&mut self, waited: Duration) {
        let time = self.resuming.time;
        self.resuming.learn(waited.max(time * 2));
    }

    /// Records a stop called off because it would have taken `expected` instead of `predicted`.
    pub(super) fn was_called_off(
        &mut self,
        expected: Duration,
        predicted: Duration,
        limit: Duration,
    ) {
        self.margin = (self.margin + expected.saturating_sub(predicted)).min(limit / 2);
        let rest = FIRST_BACKOFF * 2u32.saturating_pow(self.called_off.min(16));
        self.called_off = self.called_off.saturating_add(1);
        self.backoff_until = Some(Instant::now() + rest.min(MAX_BACKOFF));
    }

    /// Time left until the next stop may be tried. Then the parts measured only by stops are capped, so
    /// that one is tried although the obstacle may persist: only a stop can tell.
    pub(super) fn backoff(&mut self, limit: Duration) -> Option<Duration> {
        let left = self.backoff_until?.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            return Some(left);
        }
        self.backoff_until = None;
        for learned in [&mut self.stopping, &mut self.drain, &mut self.flush] {
            learned.time = learned.time.min(limit / 4);
        }
        None
    }

    /// Stops that were called off in a row.
    pub(super) fn called_off(&self) -> u32 {
        self.called_off
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(20);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_slow_drain_is_learned_at_once_named_and_tried_again_after_a_rest() {
        let mut estimate = Estimate::new();
        assert_eq!(estimate.obstacle(LIMIT), None);
        let drain = PartTime::new("draining disk `root`", ms(30));
        estimate.drained_in(&drain);
        estimate.was_called_off(ms(30), ms(1), LIMIT);
        assert_eq!(estimate.obstacle(LIMIT), Some(drain));
        assert!(estimate.total() > LIMIT && estimate.floor() < LIMIT);
        assert!(estimate.backoff(LIMIT).is_some_and(|rest| rest <= FIRST_BACKOFF));
        estimate.backoff_until = Some(Instant::now());
        assert_eq!(estimate.backoff(LIMIT), None);
        assert_eq!(estimate.obstacle(LIMIT), None, "only another stop can tell");
    }

    #[test]
    fn rests_grow_and_have_an_end() {
        let mut estimate = Estimate::new();
        let mut rests = Vec::new();
        for _ in 0..20 {
            let began = Instant::now();
            estimate.was_called_off(ms(30), ms(1), LIMIT);
            rests.push(estimate.backoff_until.unwrap() - began);
        }
        assert!(rests[0] < ms(200) && rests[2] >= ms(400), "{rests:?}");
        assert!(rests.iter().all(|rest| *rest < MAX_BACKOFF + ms(1000)), "{rests:?}");
    }

    #[test]
    fn what_surprised_one_stop_counts_less_with_every_pass() {
        let mut estimate = Estimate::new();
        estimate.was_called_off(ms(500), ms(1), LIMIT);
        let before = estimate.total();
        (0..20).for_each(|_| estimate.decay_margin());
        assert!(before - estimate.total() > LIMIT / 2 - ms(1), "{:?}", estimate.margin);
    }

    #[test]
    fn a_short_measurement_lowers_a_part_little_by_little() {
        let mut part = Learned::new("x", ms(8), true);
        part.learn(ms(4));
        assert_eq!(part.time, ms(7));
        part.learn(ms(9));
        assert_eq!(part.time, ms(9));
    }
}
