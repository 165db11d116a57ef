//! The round loop, while the guest runs: send what is dirty, wait until it is in place, look what has
//! become dirty meanwhile, let `policy` decide. Long rounds are looked at on their way, so that a guest
//! that writes too fast is slowed down, and its user told, before they end.

use super::pace::Pace;
use super::{Freight, Link, MigrationEvent, Source, SourceError};
use crate::params::Compression;
use crate::policy::{self, Decision, Outlook, Round};
use crate::ram::outgoing::RamOutgoing;
use crate::stats::{NotConverging, RoundRecord, StatsSnapshot};
use crate::transport::channels::payload_of;
use crate::wire::{Decoder, Kind, WireError};
use devices::ram::PAGE_SIZE;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// How long a destination that says it is alive may take to put the last pages of a round in place, in
/// times that it may stand still: a minute. What is still under way then comes on top.
const ECHO_PATIENCE: u32 = 6;

impl Source<'_> {
    /// Rounds, until the rest fits into the pause.
    pub(super) fn precopy(
        &mut self,
        link: &Link,
        freight: &mut Freight,
        pace: &mut Pace,
    ) -> Result<(), SourceError> {
        let mut polished = 0;
        loop {
            let number = self.counters.rounds() + 1;
            self.begin_pass(number);
            // Disks take longest, so they go first: RAM that was sent before would have to go again.
            let disk_bytes = freight.iterate_disks(pace)?;
            let (round, dirtied_per_sec) = self.round(number, link, &mut freight.ram, pace)?;
            freight.weigh_disks(pace);
            let both = freight.with_disks(round, disk_bytes, pace);
            let coming = policy::written_until_stopped(dirtied_per_sec);
            let expected = pace.expected_downtime(round.dirtied_bytes + coming);
            match policy::decide(both, expected, pace.fixed(), pace.limit(), polished) {
                Decision::Stop => {
                    pace.predicted = expected;
                    return Ok(());
                }
                Decision::Again { polishing } => {
                    polished += u32::from(polishing);
                    self.after_round(both, expected, polishing, pace);
                }
            }
        }
    }

    pub(super) fn begin_pass(&mut self, number: u64) {
        let params = self.params.get();
        self.counters.update(|stats| {
            stats.rounds = number;
            stats.xbzrle.cache_size = if params.xbzrle { params.xbzrle_cache_size } else { 0 };
        });
        (self.events)(MigrationEvent::Pass(number));
    }

    /// One round. Returns also how many bytes per second the guest dirties, by what it has shown.
    fn round(
        &mut self,
        number: u64,
        link: &Link,
        ram: &mut RamOutgoing,
        pace: &mut Pace,
    ) -> Result<(Round, u64), SourceError> {
        let began = Instant::now();
        let before = self.counters.figures();
        let sent_bytes = ram.pending_bytes();
        pace.begin_round(ram.pending(), number == 1);
        ram.iterate(&mut |ram, cursor| {
            if pace.look_is_due() {
                let looked = Instant::now();
                ram.harvest()?;
                pace.look(ram.pending(), cursor);
                pace.looked_for(looked.elapsed());
                self.after_look(pace);
            }
            Ok(())
        })?;
        ram.mark(number)?;
        let marked = Instant::now();
        let longest = link.patience(ECHO_PATIENCE) + pace.time_under_way();
        await_marks(link, number, longest).map_err(|error| ram.explain(error))?;
        pace.echoed_in(marked.elapsed());
        pace.end_stretch(self.counters.figures().pages_sent());
        // The last look before the decision: a round over a clean guest ends here at once.
        let looked = Instant::now();
        ram.harvest()?;
        pace.harvested_in(looked.elapsed());
        pace.look(ram.pending(), usize::MAX);
        let round = Round { sent_bytes, dirtied_bytes: ram.pending_bytes() };
        let duration = began.elapsed();
        // The one is right for a long round over few pages, the other for a guest that writes new ones.
        let seen = policy::per_second(round.dirtied_bytes, duration);
        let dirtied_per_sec = pace.dirtied_per_sec().unwrap_or(0).max(seen);
        self.record(round, number, duration, dirtied_per_sec, &before, pace);
        Ok((round, dirtied_per_sec))
    }

    fn record(
        &self,
        round: Round,
        number: u64,
        duration: Duration,
        dirtied_per_sec: u64,
        before: &StatsSnapshot,
        pace: &Pace,
    ) {
        let after = self.counters.figures();
        let record = RoundRecord {
            number,
            duration,
            sent_bytes: after.transferred_bytes - before.transferred_bytes,
            zero_pages: after.zero_pages - before.zero_pages,
            normal_pages: after.normal_pages - before.normal_pages,
            compressed_pages: after.compression.pages - before.compression.pages,
            xbzrle_pages: after.xbzrle.pages - before.xbzrle.pages,
            unchanged_pages: after.xbzrle.unchanged - before.xbzrle.unchanged,
            dirtied_pages: round.dirtied_bytes / PAGE_SIZE,
            dirty_pages_rate: dirtied_per_sec / PAGE_SIZE,
            bytes_per_sec: pace.bandwidth(),
            throttle_percent: after.throttle_percent,
            expected_downtime: pace.expected_downtime(round.dirtied_bytes),
        };
        log::debug!("{record:?}");
        self.counters.update(|stats| {
            stats.bytes_per_sec = record.bytes_per_sec;
            stats.dirty_pages_rate = record.dirty_pages_rate;
            stats.remaining_bytes = round.dirtied_bytes;
            stats.expected_downtime = Some(record.expected_downtime);
            stats.history.push(record);
        });
    }

    /// In the middle of a round.
    fn after_look(&mut self, pace: &mut Pace) {
        pace.end_stretch(self.counters.figures().pages_sent());
        let sent = pace.guest_bytes_per_sec();
        let (dirty_bytes, left_bytes) = pace.dirty_bytes();
        let (bandwidth, expected) = (pace.bandwidth(), pace.expected_downtime(dirty_bytes));
        let Some(dirtied) = pace.dirtied_per_sec() else { return };
        self.counters.update(|stats| {
            stats.bytes_per_sec = bandwidth;
            stats.dirty_pages_rate = dirtied / PAGE_SIZE;
            stats.remaining_bytes = left_bytes;
            // So much at least will be left.
            stats.expected_downtime =
                Some(expected.max(stats.expected_downtime.unwrap_or_default()));
        });
        // While the first round still meets pages for the first time, nobody knows which are in use; and
        // a round that only shortens an acceptable pause is no reason to slow the guest down.
        if pace.round_matters() && self.slow_down(dirtied, sent, pace) {
            return;
        }
        // How far pages shrink is not known in the first round.
        let params = self.params.get();
        let may_shrink = params.xbzrle || params.compression != Compression::None;
        if may_shrink && pace.is_first_round() {
            return;
        }
        if self.cannot_slow_down() && expected > pace.longest() && pace.outlook.look(dirtied, sent)
        {
            self.say_not_converging(dirtied, expected, pace);
        }
    }

    /// After a round whose rest does not fit the limit, or `fits` and is only to be made shorter. Whoever
    /// decided that says it here: with two opinions a guest could be sent for ever.
    fn after_round(&mut self, round: Round, expected: Duration, fits: bool, pace: &mut Pace) {
        let sent = pace.guest_bytes_per_sec();
        let dirtied = pace.proved_by(round);
        let slowed = !fits && self.slow_down(dirtied, sent, pace);
        if slowed || !self.cannot_slow_down() {
            pace.outlook = Outlook::default();
        } else if pace.outlook.round(round.sent_bytes, round.dirtied_bytes, fits) {
            self.say_not_converging(dirtied, expected, pace);
        }
        if !pace.outlook.is_hopeless() {
            self.counters.update(|stats| stats.not_converging = None);
        }
    }

    /// Slows the guest down if it writes too fast and that is wanted. Returns whether it did.
    fn slow_down(&mut self, dirtied: u64, sent: u64, pace: &mut Pace) -> bool {
        let params = self.params.get();
        let now = self.counters.throttle_percent();
        let next = if params.auto_converge {
            policy::throttle(now, dirtied, sent, &params.throttle)
        } else {
            0
        };
        if next != now {
            log::info!(
                "the guest dirties {dirtied} bytes/s, {sent} are sent: throttled by {next} %"
            );
            self.set_throttle(next);
            pace.rate_has_changed();
        }
        next > now
    }

    /// Whether nothing more will be done about a guest that writes too fast.
    fn cannot_slow_down(&self) -> bool {
        let params = self.params.get();
        !params.auto_converge || self.counters.throttle_percent() >= params.throttle.max
    }

    fn say_not_converging(&mut self, dirtied: u64, expected: Duration, pace: &Pace) {
        let facts = NotConverging {
            dirty_bytes_per_sec: pace.dirtied_per_sec().map_or(dirtied, |rate| rate.max(dirtied)),
            bytes_per_sec: pace.guest_bytes_per_sec(),
            expected_downtime: expected,
            downtime_limit: self.params.get().downtime_limit,
            throttle_percent: self.counters.throttle_percent(),
        };
        log::warn!("no end in sight: {facts:?}");
        self.counters.update(|stats| stats.not_converging = Some(facts));
        (self.events)(MigrationEvent::NotConverging(facts));
    }
}

/// Waits until the destination has all pages before mark `number` in place, on every channel; `longest`
/// is how long each channel may keep it waiting.
fn await_marks(link: &Link, number: u64, longest: Duration) -> Result<(), SourceError> {
    let what = "the echo of a mark";
    let late = "the destination's word that it has the pages of this round";
    let mut missing: BTreeSet<u16> = (0..).take(link.data.len()).collect();
    while !missing.is_empty() {
        let payload = payload_of(link.main.receive_within(late, longest)?, Kind::Mark, what)?;
        let mut decoder = Decoder::new(what, &payload);
        let (echoed, channel) = (decoder.u64()?, decoder.u16()?);
        decoder.finish()?;
        if echoed != number || !missing.remove(&channel) {
            let found = format!("mark {echoed} of channel {channel}");
            return Err(WireError::Unexpected { found, expected: what }.into());
        }
    }
    Ok(())
}
