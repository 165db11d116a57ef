//! Measures RAM's progress: bandwidth, the guest's dirty rate, and the time to send the rest. Fed by
//! `outgoing` as it sends; the driver decides by it.

use super::dirty::PageBitmap;
use super::watch::{Counts, Watch};
use crate::pace::cap::Sent;
use crate::pace::{Cap, LinkSpeed, Sample, Speed};
use crate::params::{Compression, SharedParams};
use crate::participant::{Cost, Pending, Rates};
use crate::policy::{self, Dirtying, Look};
use crate::units::saturating_u64;
use devices::ram::PAGE_SIZE;
use std::sync::Arc;
use std::time::Duration;

/// Most bytes in the socket buffers of all channels, on both sides.
const MAX_IN_FLIGHT_BYTES: u64 = 64 << 20;
/// Upper bound of the time to drain them, however slow the link.
const MAX_IN_FLIGHT_TIME: Duration = Duration::from_secs(600);
/// Looks at the dirty log may take one part in this many of the time.
const LOOK_SHARE: u32 = 50;

/// The progress of RAM in one migration.
pub(super) struct Pace {
    params: SharedParams,
    cap: Cap,
    link: Arc<LinkSpeed>,
    speed: Speed,
    dirtying: Dirtying,
    watch: Watch,
    counts: Counts,
    first_pass: bool,
    /// The guest was throttled in this pass.
    rate_changed: bool,
    pass_bytes: u64,
    /// Dirty rate over the whole last pass.
    seen_per_sec: u64,
    /// Start of the current sample, and the bytes and pages sent by then.
    sample: (Duration, Sent, u64),
    last_look: Duration,
    /// Duration of the last look; large guests have large logs.
    look_time: Duration,
    /// Typical duration of a harvest.
    harvest: Duration,
}

impl Pace {
    pub(super) fn new(params: SharedParams, cap: Cap, link: Arc<LinkSpeed>) -> Self {
        Self {
            params,
            cap,
            link,
            speed: Speed::default(),
            dirtying: Dirtying::default(),
            watch: Watch::default(),
            counts: Counts::default(),
            first_pass: true,
            rate_changed: false,
            pass_bytes: 0,
            seen_per_sec: 0,
            sample: (Duration::ZERO, Sent::default(), 0),
            last_look: Duration::ZERO,
            look_time: Duration::ZERO,
            harvest: Duration::ZERO,
        }
    }

    /// Starts a pass over `pending`; `pages` have been sent so far.
    pub(super) fn begin_pass(&mut self, pending: &PageBitmap, first: bool, pages: u64) {
        self.watch.begin(pending);
        self.counts = Counts::default();
        self.rate_changed = false;
        (self.first_pass, self.pass_bytes) = (first, pending.count() * PAGE_SIZE);
        let now = self.cap.now();
        self.last_look = now;
        self.sample = (now, self.cap.sent_so_far(), pages);
        self.dirtying.begin(now, (!first).then_some(self.pass_bytes));
    }

    /// Whether a look is due, given one every `interval`.
    pub(super) fn look_is_due(&self, interval: Duration) -> bool {
        let interval = interval.max(self.look_time * LOOK_SHARE);
        self.cap.now().saturating_sub(self.last_look) >= interval
    }

    /// Records a harvest in the middle of a pass: `pending` holds the dirty pages, the words before `cursor`
    /// were sent, harvesting took `duration`.
    pub(super) fn look(&mut self, pending: &PageBitmap, cursor: usize, duration: Duration) {
        self.look_time = duration;
        self.count(pending, cursor);
    }

    /// Records the harvest at the end of a pass that began `took` ago. A harvest longer than usual counts
    /// little: the host may have been busy.
    pub(super) fn end_pass(&mut self, pending: &PageBitmap, duration: Duration, took: Duration) {
        self.harvest = match self.harvest {
            Duration::ZERO => duration,
            usual if duration < usual => duration,
            usual => usual + (duration - usual) / 8,
        };
        self.count(pending, usize::MAX);
        self.seen_per_sec = policy::per_second(pending.count() * PAGE_SIZE, took);
    }

    fn count(&mut self, pending: &PageBitmap, cursor: usize) {
        self.last_look = self.cap.now();
        self.counts = self.watch.count(pending, cursor);
        self.dirtying.look(Look {
            at: self.last_look,
            sent_bytes: self.counts.sent * PAGE_SIZE,
            again_bytes: self.counts.again * PAGE_SIZE,
            fresh_bytes: self.counts.fresh * PAGE_SIZE,
        });
    }

    /// Bytes of this pass still to send, as of the last look.
    pub(super) fn left_bytes(&self) -> u64 {
        self.counts.left * PAGE_SIZE
    }

    /// Ends a bandwidth sample and starts the next; `pages` have been sent so far.
    pub(super) fn end_sample(&mut self, pages: u64) {
        let (now, sent) = (self.cap.now(), self.cap.sent_so_far());
        let (began, before, pages_before) = std::mem::replace(&mut self.sample, (now, sent, pages));
        let held = sent.held.saturating_sub(before.held);
        let guest_bytes = pages.saturating_sub(pages_before) * PAGE_SIZE;
        self.speed.add(
            now,
            Sample {
                sent_bytes: sent.bytes - before.bytes,
                busy: now.saturating_sub(began).saturating_sub(held),
                writing: sent.writing.saturating_sub(before.writing),
                guest_bytes: (!self.first_pass).then_some(guest_bytes),
            },
        );
        self.link.set(self.bandwidth());
    }

    /// Bandwidth of the link, limited by the cap.
    pub(super) fn bandwidth(&self) -> u64 {
        let measured = self.speed.bytes_per_sec();
        match self.params.get().max_bandwidth {
            0 => measured,
            cap => measured.min(cap),
        }
    }

    /// How long sending `bytes` of dirty RAM takes.
    pub(super) fn send_time(&self, bytes: u64) -> Duration {
        policy::send_time(self.speed.on_the_wire(bytes), self.bandwidth())
    }

    /// How long data in socket buffers may still be in flight. On a slow link that is long after the last
    /// write.
    pub(super) fn time_in_flight(&self) -> Duration {
        let most = self.cap.sent_so_far().bytes.min(MAX_IN_FLIGHT_BYTES);
        policy::send_time(most, self.bandwidth()).min(MAX_IN_FLIGHT_TIME)
    }

    /// Bytes of guest RAM sent per second: more than the bandwidth if pages shrink.
    fn guest_bytes_per_sec(&self) -> u64 {
        const SAMPLE: u64 = 1 << 30;
        let wire = self.speed.on_the_wire(SAMPLE).max(1);
        let rate = u128::from(self.bandwidth()) * u128::from(SAMPLE) / u128::from(wire);
        saturating_u64(rate)
    }

    /// The guest's throttle was changed.
    pub(super) fn rate_has_changed(&mut self) {
        self.rate_changed = true;
        self.dirtying.forget_rate();
    }

    /// Estimates what is left to send. In the middle of a pass that is what the next one has to send.
    pub(super) fn pending(&self, pending_bytes: u64, in_pass: bool) -> Pending {
        let must_precopy_bytes = match in_pass {
            true => (self.counts.again + self.counts.fresh) * PAGE_SIZE,
            false => pending_bytes,
        };
        let dirtied = self.dirtying.bytes_per_sec();
        // The first is right for a long pass over few pages, the second for writes to new pages.
        let per_sec = dirtied.map_or(self.seen_per_sec, |rate| rate.max(self.seen_per_sec));
        let coming = if in_pass { 0 } else { policy::written_until_stopped(per_sec) };
        let params = self.params.get();
        let shrinks = params.xbzrle || params.compression != Compression::None;
        let cost = |part, time, fixed| Cost { part, time, fixed };
        Pending {
            must_precopy_bytes,
            send_time: self.send_time(must_precopy_bytes),
            costs: vec![
                cost("sending RAM", self.send_time(must_precopy_bytes + coming), false),
                // The log is read twice in the pause.
                cost("reading the dirty log", self.harvest * 2, true),
            ],
            rates: Some(Rates {
                dirtied,
                seen: self.seen_per_sec,
                rate_changed: self.rate_changed,
                sent: self.guest_bytes_per_sec(),
                pass_time: (!self.first_pass).then(|| self.send_time(self.pass_bytes)),
                may_shrink: self.first_pass && shrinks,
            }),
        }
    }
}
