//! The round loop, while the guest runs: send what is dirty, wait until it is in place, look what has
//! become dirty meanwhile, let `policy` decide.

use super::{Freight, Link, MigrationEvent, Source, SourceError};
use crate::cancel::CancelToken;
use crate::pace::{Allowance, TokenBucket};
use crate::params::SharedParams;
use crate::policy::{self, Decision, Round};
use crate::transport::Throttle;
use crate::transport::channels::payload_of;
use crate::wire::{Decoder, Kind, WireError};
use devices::ram::PAGE_SIZE;
use std::time::{Duration, Instant};

impl Source<'_> {
    /// Rounds, until the rest fits into the pause.
    pub(super) fn precopy(
        &mut self,
        link: &Link,
        freight: &mut Freight,
        pace: &mut Pace,
    ) -> Result<(), SourceError> {
        let mut polished = 0;
        if self.counters.snapshot().rounds == 0
            && let Some(disks) = &mut freight.disks
        {
            // Disks take longest, so they go first: RAM that was sent before would have to go again.
            disks.iterate(pace)?;
        }
        loop {
            let number = self.counters.snapshot().rounds + 1;
            self.begin_pass(number);
            let harvested = Instant::now();
            let disk_bytes = freight.iterate_disks(pace)?;
            pace.begin_round();
            let ram = &mut freight.ram;
            ram.iterate(&link.data, pace)?;
            ram.mark(number, &link.data, pace)?;
            let ram_bytes = pace.end_round(|| await_mark(link, number))?;
            // The last look before the decision: a round over a clean guest ends here at once.
            ram.harvest()?;
            let ram_left = ram.pending_bytes();
            let duration = harvested.elapsed();
            pace.fixed = freight.fixed_downtime();
            let sent_bytes = ram_bytes + freight.as_pages(disk_bytes, pace.bandwidth());
            let dirtied_bytes = freight.pending_bytes(pace.bandwidth());
            let round = Round { sent_bytes, duration, dirtied_bytes };
            let (bandwidth, fixed) = (pace.bandwidth(), pace.fixed);
            let limit = self.params.get().downtime_limit.saturating_sub(pace.margin);
            let expected = pace.expected_downtime(round.dirtied_bytes);
            self.record(round, ram_left, bandwidth, expected);
            log::debug!("round {number}: {round:?}, {bandwidth} bytes/s, {expected:?} to stop");
            match policy::decide(round, bandwidth, fixed, limit, polished) {
                Decision::Stop => {
                    pace.predicted = expected;
                    return Ok(());
                }
                Decision::Again { polishing } => polished += u32::from(polishing),
            }
        }
    }

    pub(super) fn begin_pass(&mut self, number: u64) {
        self.counters.update(|stats| stats.rounds = number);
        (self.events)(MigrationEvent::Pass(number));
    }

    fn record(&self, round: Round, ram_left: u64, bandwidth: u64, expected: Duration) {
        let dirtied_per_sec = policy::per_second(ram_left, round.duration);
        self.counters.update(|stats| {
            stats.bytes_per_sec = bandwidth;
            stats.dirty_pages_rate = dirtied_per_sec / PAGE_SIZE;
            stats.remaining_bytes = ram_left;
            stats.expected_downtime = Some(expected);
            stats.history.push(round);
        });
    }
}

/// Waits until the destination has all pages before mark `number` in place.
fn await_mark(link: &Link, number: u64) -> Result<(), SourceError> {
    let what = "the echo of a mark";
    let payload = payload_of(link.main.receive()?, Kind::Mark, what)?;
    let mut decoder = Decoder::new(what, &payload);
    let echoed = decoder.u64()?;
    decoder.finish()?;
    if echoed != number {
        return Err(
            WireError::Unexpected { found: format!("mark {echoed}"), expected: what }.into()
        );
    }
    Ok(())
}

/// A round must move this much before its bandwidth counts: less is mostly journeys.
const MEASURABLE_BYTES: u64 = 4 << 20;
/// Until something was measured: a guess that any link of today keeps.
const ASSUMED_BYTES_PER_SEC: u64 = 100 << 20;
/// Longest wait for tokens at once, so that a raised cap is noticed.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// Keeps to the cap and measures the bandwidth.
pub(super) struct Pace {
    params: SharedParams,
    cancel: CancelToken,
    origin: Instant,
    bucket: TokenBucket,
    round_began: Instant,
    round_sent: u64,
    /// How long the cap held this round up.
    round_held: Duration,
    measured: u64,
    /// What the pause costs however little there is to send.
    pub(super) fixed: Duration,
    /// The pause that the last decision promised.
    predicted: Duration,
    /// How much longer the pause would have been than predicted, when it was called off: so much less
    /// than the limit the next decision has to promise.
    margin: Duration,
}

impl Pace {
    pub(super) fn new(params: SharedParams, cancel: CancelToken, fixed: Duration) -> Self {
        let now = Instant::now();
        Self {
            params,
            cancel,
            origin: now,
            bucket: TokenBucket::default(),
            round_began: now,
            round_sent: 0,
            round_held: Duration::ZERO,
            measured: ASSUMED_BYTES_PER_SEC,
            fixed,
            predicted: fixed,
            margin: Duration::ZERO,
        }
    }

    /// How long the guest would be stopped if `pending_bytes` were left.
    pub(super) fn expected_downtime(&self, pending_bytes: u64) -> Duration {
        policy::expected_downtime(pending_bytes, self.bandwidth(), self.fixed)
    }

    /// With the guest stopped for `stopped` already and `pending_bytes` left: whether the limit can still
    /// be kept. If not, the next prediction is taken with more caution.
    pub(super) fn keeps_limit(&mut self, stopped: Duration, pending_bytes: u64) -> bool {
        let expected = stopped + self.expected_downtime(pending_bytes);
        let limit = self.params.get().downtime_limit;
        if policy::may_go_on(expected, limit, self.predicted) {
            return true;
        }
        self.margin = (self.margin + expected.saturating_sub(self.predicted)).min(limit / 2);
        false
    }

    pub(super) fn begin_round(&mut self) {
        (self.round_began, self.round_sent) = (Instant::now(), 0);
        self.round_held = Duration::ZERO;
    }

    /// Waits with `settled` until all has arrived, then takes the measure. Returns what was sent.
    fn end_round(
        &mut self,
        settled: impl FnOnce() -> Result<(), SourceError>,
    ) -> Result<u64, SourceError> {
        settled()?;
        if self.round_sent >= MEASURABLE_BYTES {
            let busy = self.round_began.elapsed().saturating_sub(self.round_held);
            self.measured = policy::per_second(self.round_sent, busy);
        }
        Ok(self.round_sent)
    }

    /// What the link moves; under a cap never more than the cap.
    pub(super) fn bandwidth(&self) -> u64 {
        match self.params.get().max_bandwidth {
            0 => self.measured,
            cap => self.measured.min(cap),
        }
    }
}

impl Throttle for Pace {
    fn allow(&mut self, wanted: usize) -> Result<usize, WireError> {
        loop {
            if self.cancel.is_cancelled() {
                return Err(WireError::Interrupted);
            }
            let cap = self.params.get().max_bandwidth;
            let now = Instant::now();
            match self.bucket.allow(now.duration_since(self.origin), cap, wanted) {
                Allowance::Bytes(bytes) => return Ok(bytes),
                Allowance::Wait(duration) => {
                    self.cancel.wait(duration.min(LONGEST_WAIT));
                    self.round_held += now.elapsed();
                }
            }
        }
    }

    fn sent(&mut self, bytes: usize) {
        self.round_sent += bytes as u64;
        self.bucket.spend(bytes);
    }
}
