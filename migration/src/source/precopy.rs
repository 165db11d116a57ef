//! The passes, while the guest runs: send what is dirty, wait until it is in place, read the dirty logs,
//! let `policy` decide. Long passes are sampled midway, so that a guest that writes too fast is throttled,
//! and the user warned, before they end.

use super::session::Session;
use super::{MigrationEvent, Source, SourceError};
use crate::guest::PartTime;
use crate::participant::{Budget, Pending, Precision, Rates, Step};
use crate::policy::{self, Convergence, Decision, Round};
use crate::stats::encoders::Periods;
use crate::stats::{NotConverging, Period, RoundRecord, StatsSnapshot};
use crate::units::{nanos, saturating_u64};
use devices::ram::PAGE_SIZE;
use std::time::{Duration, Instant};

/// Interval of dirty log samples in the middle of a pass.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Interval of passes during a backoff, which keep the remainder small.
const IDLE_PASS: Duration = Duration::from_millis(100);
/// Time limit of flushing shared disks ahead of a stop. A disk that takes longer has a long queue or
/// hangs; the guest runs meanwhile.
const FLUSH_AHEAD: Duration = Duration::from_secs(2);
/// After a longer flush the guest has dirtied too much meanwhile to be stopped at once.
const SHORT_FLUSH: Duration = Duration::from_millis(5);
/// Most repeated flushes: on some disks every flush takes longer.
const MAX_FLUSHES: u32 = 2;

/// State after a pass.
pub(super) struct Look {
    round: Round,
    rates: Option<Rates>,
    /// The pause, if the guest were stopped now.
    pub(super) expected: Duration,
    dirty_bytes: u64,
}

impl Source<'_> {
    /// Passes, until the rest fits into the pause.
    pub(super) fn precopy(&mut self, session: &mut Session) -> Result<(), SourceError> {
        let mut polished = 0;
        loop {
            session.pass += 1;
            self.begin_pass(session.pass);
            if session.pass == 1 {
                session.periods = Periods::new(Instant::now(), self.counters.figures());
            }
            let look = self.pass(session)?;
            let limit = self.params.get().downtime_limit;
            session.estimate.decay_margin();
            let floor = session.estimate.floor();
            let longest = policy::longest(floor, limit);
            let decision = policy::decide(look.round, look.expected, floor, limit, polished);
            let backoff = session.estimate.backoff(limit);
            match decision {
                Decision::Stop if backoff.is_none() => {
                    session.predicted = look.expected;
                    if self.flush_ahead(session, longest)? {
                        session.flushes = 0;
                        return Ok(());
                    }
                }
                Decision::Stop => {}
                Decision::Again { polishing } => {
                    polished += u32::from(polishing && backoff.is_none());
                    if session.estimate.flush_blocks(longest) {
                        // It can be measured again without a stop; and it is not the guest's fault.
                        self.flush_ahead(session, longest)?;
                    } else if session.estimate.obstacle(longest).is_none() {
                        self.after_pass(session, &look, polishing);
                    }
                }
            }
            // The first flush finds what was written for as long as nobody flushed.
            let measured = session.flushes != 1;
            let obstacle = session.estimate.obstacle(longest).filter(|_| measured);
            if obstacle.is_none() && session.estimate.called_off() == 0 {
                session.blocked_by = None;
            }
            // Passes over a quiet guest take no time: do not spin.
            let idle = backoff.or_else(|| obstacle.as_ref().map(|_| IDLE_PASS));
            if let Some(part) = obstacle {
                self.report_blocked(session, &look, part);
            }
            if let Some(idle) = idle {
                self.cancel.wait(idle.min(IDLE_PASS));
            }
        }
    }

    fn begin_pass(&mut self, number: u64) {
        let params = self.params.get();
        self.counters.update(|stats| {
            stats.rounds = number;
            stats.xbzrle.cache_size = if params.xbzrle { params.xbzrle_cache_size } else { 0 };
            stats.compression.enabled = params.method().is_some();
        });
        (self.events)(MigrationEvent::Pass(number));
    }

    /// One pass over everything that travels.
    fn pass(&mut self, session: &mut Session) -> Result<Look, SourceError> {
        let began = Instant::now();
        let before = self.counters.figures();
        let mut send_time = Duration::ZERO;
        for index in 0..session.participants.len() {
            loop {
                let budget = Budget { time: LOOK_INTERVAL };
                match session.participants[index].iterate(session.pass, budget)? {
                    Step::Done(pass) => {
                        send_time += pass.send_time;
                        break;
                    }
                    Step::More => {
                        let pending = session.participants[index].pending(Precision::Estimate)?;
                        self.end_period(session);
                        self.after_look(session, &pending);
                    }
                }
            }
        }
        let look = self.weigh(session, Precision::Estimate, send_time)?;
        session.rates = look.rates.or(session.rates);
        self.record(session, &look, began.elapsed(), &before);
        Ok(look)
    }

    /// What is left to send, and the estimated downtime of a stop now.
    pub(super) fn weigh(
        &mut self,
        session: &mut Session,
        precision: Precision,
        sent: Duration,
    ) -> Result<Look, SourceError> {
        let pending: Result<Vec<Pending>, _> =
            session.participants.iter_mut().map(|one| one.pending(precision)).collect();
        let pending = pending?;
        session.estimate.weigh(pending.iter(), session.link.round_trip());
        let left: Duration = pending.iter().map(|pending| pending.send_time).sum();
        Ok(Look {
            round: Round { sent, left },
            rates: pending.iter().find_map(|pending| pending.rates),
            expected: session.estimate.total(),
            dirty_bytes: pending
                .iter()
                .filter(|one| one.rates.is_some())
                .map(|one| one.must_precopy_bytes)
                .sum(),
        })
    }

    /// Updates the rates, if a period has ended.
    fn end_period(&self, session: &mut Session) {
        if let Some(period) = session.periods.look(Instant::now(), self.counters.figures()) {
            self.counters.update(|stats| stats.period = period);
        }
    }

    fn record(
        &self,
        session: &mut Session,
        look: &Look,
        duration: Duration,
        before: &StatsSnapshot,
    ) {
        self.end_period(session);
        let after = self.counters.figures();
        // For reports: 0 where nothing was measured yet.
        let rates = look.rates.unwrap_or_default();
        let record = RoundRecord {
            number: session.pass,
            period: Period::between(before, &after, duration),
            sent_bytes: after.transferred_bytes - before.transferred_bytes,
            zero_pages: after.zero_pages - before.zero_pages,
            normal_pages: after.normal_pages - before.normal_pages,
            dirtied_pages: look.dirty_bytes / PAGE_SIZE,
            dirty_pages_rate: rates.dirtied.map_or(rates.seen, |rate| rate.max(rates.seen))
                / PAGE_SIZE,
            bytes_per_sec: session.link.bytes_per_sec(),
            throttle_percent: self.throttle.percent,
            expected_downtime: look.expected,
        };
        log::debug!("{record:?}");
        self.counters.update(|stats| {
            stats.bytes_per_sec = record.bytes_per_sec;
            stats.dirty_pages_rate = record.dirty_pages_rate;
            stats.remaining_bytes = look.dirty_bytes;
            stats.expected_downtime = Some(record.expected_downtime);
            stats.history.push(record);
        });
    }

    /// In the middle of a pass.
    fn after_look(&mut self, session: &mut Session, pending: &Pending) {
        let expected = session.estimate.floor() + pending.send_time;
        let Some(rates) = pending.rates else {
            self.counters.update(|stats| {
                // A lower bound too: what comes later in this pass does not count. In the first pass it falls.
                let known = stats.expected_downtime.filter(|_| session.pass > 1);
                stats.expected_downtime = Some(known.map_or(expected, |known| known.max(expected)));
            });
            return;
        };
        let Some(dirtied) = rates.dirtied else { return };
        self.counters.update(|stats| {
            stats.bytes_per_sec = session.link.bytes_per_sec();
            stats.dirty_pages_rate = dirtied / PAGE_SIZE;
            // A lower bound.
            stats.expected_downtime =
                Some(stats.expected_downtime.map_or(expected, |before| before.max(expected)));
        });
        let longest = policy::longest(session.estimate.floor(), self.params.get().downtime_limit);
        // In the first pass the working set is unknown, and a pass that only shortens an acceptable pause
        // is no reason to throttle.
        let matters = rates.pass_time.is_some_and(|time| time > longest);
        if matters && self.slow_down(session, dirtied, rates.sent) {
            return;
        }
        // In the first pass it is unknown how far pages shrink.
        if !rates.may_shrink
            && self.cannot_slow_down()
            && expected > longest
            && session.convergence.look(dirtied, rates.sent)
        {
            self.report_not_converging(session, Some(rates), expected, None);
        }
    }

    /// After a pass whose rest exceeds the limit, or `fits` and is only being shortened. Takes the decision
    /// from the caller: two differing decisions could go on forever.
    fn after_pass(&mut self, session: &mut Session, look: &Look, fits: bool) {
        let Look { round, rates, expected, .. } = look;
        // Without a measurement every rate is none or 0, and proves nothing.
        let rates_or_none = rates.unwrap_or_default();
        let proved = proved_by(*round, rates_or_none);
        let slowed =
            !fits && rates.is_some() && self.slow_down(session, proved, rates_or_none.sent);
        if slowed || !self.cannot_slow_down() {
            session.convergence = Convergence::default();
        } else if session.blocked_by.is_none()
            && session.convergence.round(round.sent, round.left, fits)
        {
            let rates = Rates { dirtied: rates_or_none.dirtied.max(Some(proved)), ..rates_or_none };
            self.report_not_converging(session, Some(rates), *expected, None);
        }
        // A report of a part that keeps stops from fitting stands until one fits.
        if !session.convergence.is_reported() && session.blocked_by.is_none() {
            self.counters.update(|stats| stats.not_converging = None);
        }
    }

    /// Throttles the guest if it writes too fast and auto-converge is on. Returns whether it did.
    fn slow_down(&mut self, session: &mut Session, dirtied: u64, sent: u64) -> bool {
        let params = self.params.get();
        let now = self.throttle.percent;
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
            session.participants.iter_mut().for_each(|one| one.rate_has_changed());
        }
        next > now
    }

    /// Whether throttling is off or at its maximum.
    fn cannot_slow_down(&self) -> bool {
        let params = self.params.get();
        !params.auto_converge || self.throttle.percent >= params.throttle.max
    }

    /// Flushes shared disks while the guest runs, to leave less to flush in the pause. Returns false if that
    /// took so long that another pass is needed, or that a stop would exceed its limit.
    fn flush_ahead(
        &mut self,
        session: &mut Session,
        longest: Duration,
    ) -> Result<bool, SourceError> {
        let flush = self.guest.flush_ahead(Instant::now() + FLUSH_AHEAD.max(longest))?;
        session.estimate.flushed_in(&flush);
        session.flushes += 1;
        let short = flush.took <= SHORT_FLUSH || session.flushes > MAX_FLUSHES;
        Ok(flush.ended && short && session.estimate.total() <= longest.max(session.predicted))
    }

    /// Reports a slow disk that makes every stop exceed the limit.
    fn report_blocked(&mut self, session: &mut Session, look: &Look, part: PartTime) {
        if session.blocked_by.as_ref() == Some(&part.part) {
            return;
        }
        session.blocked_by = Some(part.part.clone());
        self.report_not_converging(session, look.rates, look.expected, Some(part));
    }

    pub(super) fn report_not_converging(
        &mut self,
        session: &Session,
        rates: Option<Rates>,
        expected: Duration,
        part: Option<PartTime>,
    ) {
        // For reports: 0 where nothing was measured yet.
        let rates = rates.unwrap_or_default();
        let facts = NotConverging {
            dirty_bytes_per_sec: rates.dirtied.unwrap_or(rates.seen),
            bytes_per_sec: rates.sent,
            expected_downtime: expected,
            downtime_limit: self.params.get().downtime_limit,
            throttle_percent: self.throttle.percent,
            called_off: session.estimate.called_off(),
            part,
        };
        log::warn!("the migration does not converge: {facts}");
        self.counters.update(|stats| stats.not_converging = Some(facts.clone()));
        (self.events)(MigrationEvent::NotConverging(facts));
    }
}

/// The dirty rate proved by a finished pass, in bytes per second.
fn proved_by(round: Round, rates: Rates) -> u64 {
    let part = u128::from(nanos(round.left)) * u128::from(rates.sent);
    let part = part / u128::from(nanos(round.sent).max(1));
    let seen = saturating_u64(part);
    match rates.dirtied {
        // Writes from before the throttling prove nothing.
        Some(dirtied) => dirtied.min(seen),
        None if rates.rate_changed => 0,
        None => seen,
    }
}
