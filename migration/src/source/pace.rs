//! What a source knows of its own progress: how much is sent per second, how fast the guest writes, how
//! long it would be stopped. Fed by the round loop; `policy` decides with it.

use crate::cancel::CancelToken;
use crate::pace::cap::Sent;
use crate::pace::{Cap, Speed, Stretch};
use crate::params::SharedParams;
use crate::policy::{self, Dirtying, Look, Outlook, Round};
use crate::ram::dirty::PageBitmap;
use crate::ram::watch::{Counts, Watch};
use devices::ram::PAGE_SIZE;
use std::time::Duration;

/// Between two looks at the dirty log in the middle of a round.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// What the sockets of all channels hold at most, on both sides.
const MOST_UNDER_WAY: u64 = 64 << 20;
/// However slow a link is.
const LONGEST_UNDER_WAY: Duration = Duration::from_secs(600);
/// A look may take this part of the time between two.
const LOOK_SHARE: u32 = 50;

/// The progress of one migration.
pub(super) struct Pace {
    params: SharedParams,
    cap: Cap,
    speed: Speed,
    dirtying: Dirtying,
    watch: Watch,
    counts: Counts,
    /// Whether there is an end in sight.
    pub(super) outlook: Outlook,
    first_round: bool,
    /// In this round the guest was slowed down.
    rate_changed: bool,
    round_bytes: u64,
    /// When the stretch at hand began, and what had been sent then: bytes and pages.
    stretch: (Duration, Sent, u64),
    last_look: Duration,
    look_interval: Duration,
    /// What the pause costs however little there is to send, besides looks at the dirty log.
    fixed: Duration,
    /// What a look costs as a rule.
    harvest: Duration,
    /// How long the rest of the disks takes, and their last flush.
    disks: (Duration, Duration),
    /// The pause that the last decision promised.
    pub(super) predicted: Duration,
    /// How much longer the pause would have been than predicted, when it was called off: so much less
    /// than the limit the next decision has to promise.
    margin: Duration,
}

impl Pace {
    pub(super) fn new(params: SharedParams, cancel: CancelToken, fixed: Duration) -> Self {
        Self {
            cap: Cap::new(params.clone(), cancel),
            params,
            speed: Speed::default(),
            dirtying: Dirtying::default(),
            watch: Watch::default(),
            counts: Counts::default(),
            outlook: Outlook::default(),
            first_round: true,
            rate_changed: false,
            round_bytes: 0,
            stretch: (Duration::ZERO, Sent::default(), 0),
            last_look: Duration::ZERO,
            look_interval: LOOK_INTERVAL,
            fixed,
            harvest: Duration::ZERO,
            disks: (Duration::ZERO, Duration::ZERO),
            predicted: fixed,
            margin: Duration::ZERO,
        }
    }

    /// The cap, for a thread that sends.
    pub(super) fn cap(&self) -> Cap {
        self.cap.clone()
    }

    /// How long the guest should be stopped at most, by the next prediction.
    pub(super) fn limit(&self) -> Duration {
        self.params.get().downtime_limit.saturating_sub(self.margin)
    }

    /// How long the guest may be stopped, since some of it cannot be had shorter.
    pub(super) fn longest(&self) -> Duration {
        policy::longest(self.fixed(), self.limit())
    }

    /// What the pause costs however little there is to send: the dirty log is looked at twice in it, and
    /// the images at the destination are flushed.
    pub(super) fn fixed(&self) -> Duration {
        self.fixed + self.harvest * 2 + self.disks.1
    }

    /// So much is left of the disks, which go at `bytes_per_sec` if that is known; their flush takes
    /// `flush`.
    pub(super) fn disks_left(&mut self, bytes: u64, bytes_per_sec: Option<u64>, flush: Duration) {
        let rate = self.disks_per_sec(bytes_per_sec);
        self.disks = (policy::expected_downtime(bytes, rate, Duration::ZERO), flush);
    }

    /// A disk is often slower than the link; and what was measured has gone over the link.
    fn disks_per_sec(&self, measured: Option<u64>) -> u64 {
        match (measured, self.params.get().max_bandwidth) {
            (None, _) => self.bandwidth(),
            (Some(rate), 0) => rate,
            (Some(rate), cap) => rate.min(cap),
        }
    }

    /// Bytes of RAM that take as long to send as `bytes` of disks do.
    pub(super) fn as_ram(&self, bytes: u64, bytes_per_sec: Option<u64>) -> u64 {
        let slower = u128::from(self.disks_per_sec(bytes_per_sec).max(1));
        let bytes = u128::from(bytes) * u128::from(self.guest_bytes_per_sec()) / slower;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// The look after a round took so long. Large guests have large logs; and the host may have been busy
    /// elsewhere, so that a longer one counts little.
    pub(super) fn harvested_in(&mut self, duration: Duration) {
        self.harvest = match self.harvest {
            Duration::ZERO => duration,
            usual if duration < usual => duration,
            usual => usual + (duration - usual) / 8,
        };
    }

    /// A mark came back after this time: so long, at most, is a journey there and back. The greeting's may
    /// have been long because a thread had to start first.
    pub(super) fn echoed_in(&mut self, duration: Duration) {
        self.fixed = self.fixed.min(policy::fixed_downtime(duration));
    }

    /// How long the guest would be stopped if `pending_bytes` were left.
    pub(super) fn expected_downtime(&self, pending_bytes: u64) -> Duration {
        let bytes = self.speed.on_the_wire(pending_bytes);
        policy::expected_downtime(bytes, self.bandwidth(), self.fixed()) + self.disks.0
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

    /// A round begins that will send `pending`.
    pub(super) fn begin_round(&mut self, pending: &PageBitmap, first: bool) {
        self.watch.begin(pending);
        self.counts = Counts::default();
        self.rate_changed = false;
        (self.first_round, self.round_bytes) = (first, pending.count() * PAGE_SIZE);
        let now = self.cap.now();
        self.last_look = now;
        (self.stretch.0, self.stretch.1) = (now, self.cap.sent_so_far());
        self.dirtying.begin(now, (!first).then_some(self.round_bytes));
    }

    /// Whether it is time for a look.
    pub(super) fn look_is_due(&self) -> bool {
        self.cap.now().saturating_sub(self.last_look) >= self.look_interval
    }

    /// A look in the middle of a round took so long.
    pub(super) fn looked_for(&mut self, duration: Duration) {
        self.look_interval = LOOK_INTERVAL.max(duration * LOOK_SHARE);
    }

    /// The dirty log was harvested into `pending` when the words before `cursor` had been sent.
    pub(super) fn look(&mut self, pending: &PageBitmap, cursor: usize) {
        self.last_look = self.cap.now();
        self.counts = self.watch.count(pending, cursor);
        self.dirtying.look(Look {
            at: self.last_look,
            sent_bytes: self.counts.sent * PAGE_SIZE,
            again_bytes: self.counts.again * PAGE_SIZE,
            fresh_bytes: self.counts.fresh * PAGE_SIZE,
        });
    }

    /// What is known to be dirty for the next round, and what this one has still to send, in bytes.
    pub(super) fn dirty_bytes(&self) -> (u64, u64) {
        ((self.counts.again + self.counts.fresh) * PAGE_SIZE, self.counts.left * PAGE_SIZE)
    }

    /// Takes the measure of what was sent since the last time; `pages` have been sent so far.
    pub(super) fn end_stretch(&mut self, pages: u64) {
        let (now, sent) = (self.cap.now(), self.cap.sent_so_far());
        let (began, before, pages_before) =
            std::mem::replace(&mut self.stretch, (now, sent, pages));
        let held = sent.held.saturating_sub(before.held);
        let guest_bytes = pages.saturating_sub(pages_before) * PAGE_SIZE;
        self.speed.add(
            now,
            Stretch {
                sent_bytes: sent.bytes - before.bytes,
                busy: now.saturating_sub(began).saturating_sub(held),
                writing: sent.writing.saturating_sub(before.writing),
                guest_bytes: (!self.first_round).then_some(guest_bytes),
            },
        );
    }

    /// What the link moves; under a cap never more than the cap.
    pub(super) fn bandwidth(&self) -> u64 {
        let measured = self.speed.bytes_per_sec();
        match self.params.get().max_bandwidth {
            0 => measured,
            cap => measured.min(cap),
        }
    }

    /// How long what sockets may still hold of a round is under way, at the least. On a slow link it is
    /// long after everything has been written.
    pub(super) fn time_under_way(&self) -> Duration {
        let most = self.cap.sent_so_far().bytes.min(MOST_UNDER_WAY);
        policy::expected_downtime(most, self.bandwidth(), Duration::ZERO).min(LONGEST_UNDER_WAY)
    }

    /// The same as guest RAM: more, if pages shrink on their way.
    pub(super) fn guest_bytes_per_sec(&self) -> u64 {
        const SAMPLE: u64 = 1 << 30;
        let wire = self.speed.on_the_wire(SAMPLE).max(1);
        let rate = u128::from(self.bandwidth()) * u128::from(SAMPLE) / u128::from(wire);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }

    /// Bytes per second that the guest would dirty if all were clean, if that is known.
    pub(super) fn dirtied_per_sec(&self) -> Option<u64> {
        self.dirtying.bytes_per_sec()
    }

    /// How fast the guest has proved to write in `round`, which is over, in bytes of RAM per second.
    pub(super) fn proved_by(&self, round: Round) -> u64 {
        let part = u128::from(round.dirtied_bytes) * u128::from(self.guest_bytes_per_sec());
        let part = part / u128::from(round.sent_bytes.max(1));
        let seen = u64::try_from(part).unwrap_or(u64::MAX);
        match self.dirtied_per_sec() {
            // What it has dirtied before it was slowed down proves nothing any more.
            Some(dirtied) => dirtied.min(seen),
            None if self.rate_changed => 0,
            None => seen,
        }
    }

    /// The guest writes faster or slower from now on.
    pub(super) fn rate_has_changed(&mut self) {
        self.rate_changed = true;
        self.dirtying.forget_rate();
    }

    /// Whether this is the first round, in which every page is sent whether it is in use or not.
    pub(super) fn is_first_round(&self) -> bool {
        self.first_round
    }

    /// Whether what becomes dirty in this round tells what is to be done about the guest.
    pub(super) fn round_matters(&self) -> bool {
        !self.first_round && self.expected_downtime(self.round_bytes) > self.longest()
    }
}
