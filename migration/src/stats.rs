//! Statistics of a migration: counters written by its threads, and QEMU's `MigrationInfo` built from them.
//! They outlive the migration. For reports only: no decision reads them.

pub mod encoders;

pub use encoders::{CompressionStats, Period, XbzrleStats};

use crate::block::stats::DiskStats;
use crate::error::Panicked;
use crate::guest::PartTime;
use crate::units::{micros, millis};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// QEMU's migration status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MigrationStatus {
    /// No migration yet.
    #[default]
    None,
    /// Connecting and building the destination's machine.
    Setup,
    /// The guest runs; rounds are being sent.
    Active,
    /// The guest is stopped for the last step.
    Device,
    /// The guest runs at the destination; what could wait is being sent.
    PostcopyActive,
    /// A cancel is in progress.
    Cancelling,
    /// Cancelled; the guest runs at the source.
    Cancelled,
    /// Moved.
    Completed,
    /// Failed; the guest runs at the source, or the outcome is unknown.
    Failed,
}

impl MigrationStatus {
    /// Whether the migration has ended, successfully or not.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Cancelled | Self::Completed | Self::Failed)
    }

    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::Device => "device",
            Self::PostcopyActive => "postcopy-active",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }
}

/// One finished round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoundRecord {
    /// Which, counted from 1.
    pub number: u64,
    /// How long it took, and what became of its pages.
    pub period: Period,
    /// Bytes sent, with all headers.
    pub sent_bytes: u64,
    /// Zero pages among what was sent.
    pub zero_pages: u64,
    /// Pages sent raw or compressed.
    pub normal_pages: u64,
    /// Pages that the guest dirtied meanwhile: what the next round has to send.
    pub dirtied_pages: u64,
    /// Pages that it would dirty per second if all were clean.
    pub dirty_pages_rate: u64,
    /// Bandwidth over the last seconds.
    pub bytes_per_sec: u64,
    /// Throttle at the end of the round.
    pub throttle_percent: u8,
    /// Expected downtime of a stop at the end of the round.
    pub expected_downtime: Duration,
}

/// The rounds of a migration; if there are many, the first and the last ones.
#[derive(Debug, Clone, Default)]
pub struct History {
    first: Vec<RoundRecord>,
    last: VecDeque<RoundRecord>,
}

impl History {
    /// Rounds kept from the start, and of the latest.
    const KEPT: (usize, usize) = (16, 48);

    /// Adds a round.
    pub fn push(&mut self, round: RoundRecord) {
        if self.first.len() < Self::KEPT.0 {
            return self.first.push(round);
        }
        if self.last.len() == Self::KEPT.1 {
            self.last.pop_front();
        }
        self.last.push_back(round);
    }

    /// The rounds, in order.
    pub fn iter(&self) -> impl Iterator<Item = &RoundRecord> {
        self.first.iter().chain(&self.last)
    }
}

/// Breakdown of the downtime, as seen by the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DowntimeParts {
    /// Stopping vCPUs and draining devices.
    pub pause: Duration,
    /// Reading the dirty log.
    pub final_harvest: Duration,
    /// Saving and sending device state.
    pub device_state: Duration,
    /// Sending the last pages, flushing disks and releasing their locks.
    pub final_send: Duration,
    /// Waiting until everything is in place at the destination.
    pub ready: Duration,
    /// Handing over the right to run, without `resume`.
    pub handover: Duration,
    /// Starting the guest, as reported by the destination.
    pub resume: Duration,
}

/// Report of a migration that does not converge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotConverging {
    /// Bytes of RAM that the guest dirties per second.
    pub dirty_bytes_per_sec: u64,
    /// Bytes of RAM that are sent per second.
    pub bytes_per_sec: u64,
    /// Expected downtime of a stop now.
    pub expected_downtime: Duration,
    pub downtime_limit: Duration,
    /// Current throttle.
    pub throttle_percent: u8,
    /// Called-off stops in a row.
    pub called_off: u32,
    /// The part of the pause that takes too long; `None` if the guest writes too fast.
    pub part: Option<PartTime>,
}

impl NotConverging {
    /// As in the event `x-migration-not-converging` and in `x-not-converging` of `query-migrate`.
    pub fn to_json(&self) -> Value {
        let mut json = json!({
            "dirty-bytes-per-second": self.dirty_bytes_per_sec,
            "bytes-per-second": self.bytes_per_sec,
            "expected-downtime": millis(self.expected_downtime),
            "downtime-limit": millis(self.downtime_limit),
            "cpu-throttle-percentage": self.throttle_percent,
            "called-off-switches": self.called_off,
            "desc": self.to_string(),
        });
        if let Some(part) = &self.part {
            let (name, time) = (&part.part, micros(part.took));
            json["part"] = json!({"name": name, "time-us": time, "ended": part.ended});
        }
        json
    }
}

impl fmt::Display for NotConverging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limit = millis(self.downtime_limit);
        match &self.part {
            Some(part) => write!(f, "{part}, the downtime limit is {limit} ms"),
            None => write!(
                f,
                "the guest dirties {} bytes per second, {} are sent; it would be stopped for {} ms, \
                 the downtime limit is {limit} ms",
                self.dirty_bytes_per_sec,
                self.bytes_per_sec,
                millis(self.expected_downtime)
            ),
        }
    }
}

/// A copy of all counters.
#[derive(Debug, Clone, Default)]
pub struct StatsSnapshot {
    pub status: MigrationStatus,
    /// RAM size.
    pub total_bytes: u64,
    /// Bytes sent or received, with all headers.
    pub transferred_bytes: u64,
    /// Of those, bytes on the control connection.
    pub control_bytes: u64,
    /// Whether several data channels are enabled.
    pub multifd: bool,
    /// RAM still to send in this round.
    pub remaining_bytes: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Pages sent as they are.
    pub normal_pages: u64,
    pub xbzrle: XbzrleStats,
    pub compression: CompressionStats,
    /// What rates are of: the last second or more, or what there was of the first one.
    pub period: Period,
    /// Rounds begun.
    pub rounds: u64,
    /// Pages that the guest dirties per second.
    pub dirty_pages_rate: u64,
    /// Measured bandwidth.
    pub bytes_per_sec: u64,
    /// Bytes sent before and during the pause.
    pub precopy_bytes: u64,
    /// Bytes sent while the guest was stopped.
    pub downtime_bytes: u64,
    pub started: Option<Instant>,
    /// Total time, once it has ended.
    pub total_time: Option<Duration>,
    /// Time until the first page.
    pub setup_time: Option<Duration>,
    /// Downtime as seen by the source.
    pub downtime: Option<Duration>,
    /// Expected downtime of a stop now.
    pub expected_downtime: Option<Duration>,
    pub error: Option<String>,
    /// The answer to `Go` was lost: the guest may run at the destination.
    pub outcome_unknown: bool,
    /// The guest has moved; of what could wait this has not arrived.
    pub incomplete: Option<String>,
    /// Bytes sent or received after the handover.
    pub postcopy_bytes: u64,
    /// Of what could wait: all of it, and what is left; in bytes of its owner.
    pub postcopy_total: u64,
    pub postcopy_left: u64,
    /// Called-off stops.
    pub called_off: u64,
    /// Current throttle of the guest.
    pub throttle_percent: u8,
    /// Set while the migration does not converge.
    pub not_converging: Option<NotConverging>,
    /// Finished rounds.
    pub history: History,
    /// The disks, if any migrate.
    pub disk: Option<DiskStats>,
    pub downtime_parts: Option<DowntimeParts>,
    /// Where a destination listens.
    pub address: Option<Value>,
}

fn megabits(bytes_per_sec: u64) -> f64 {
    bytes_per_sec as f64 * 8.0 / 1e6
}

impl RoundRecord {
    fn to_json(self) -> Value {
        let mut json = json!({
            "round": self.number,
            "duration-us": micros(self.period.duration),
            "bytes": self.sent_bytes,
            "duplicate": self.zero_pages,
            "normal": self.normal_pages,
            "dirtied-pages": self.dirtied_pages,
            "dirty-pages-rate": self.dirty_pages_rate,
            "mbps": megabits(self.bytes_per_sec),
            "cpu-throttle-percentage": self.throttle_percent,
            "expected-downtime-us": micros(self.expected_downtime),
        });
        if let (Value::Object(all), Value::Object(more)) = (&mut json, self.period.to_json()) {
            all.extend(more);
        }
        json
    }
}

impl DowntimeParts {
    fn to_json(self) -> Value {
        json!({
            "pause": micros(self.pause),
            "final-harvest": micros(self.final_harvest),
            "device-state": micros(self.device_state),
            "final-send": micros(self.final_send),
            "ready": micros(self.ready),
            "handover": micros(self.handover),
            "resume": micros(self.resume),
        })
    }
}

impl StatsSnapshot {
    /// Pages of any kind that were sent, or found to be unchanged.
    pub fn pages_sent(&self) -> u64 {
        self.zero_pages + self.normal_pages + self.xbzrle.pages + self.xbzrle.unchanged
    }

    /// Bandwidth: as last measured while running, afterwards the average since the setup.
    fn overall_bytes_per_sec(&self) -> u64 {
        match (self.total_time, self.setup_time) {
            (Some(total), Some(setup)) if self.status == MigrationStatus::Completed => {
                crate::policy::per_second(self.transferred_bytes, total.saturating_sub(setup))
            }
            _ => self.bytes_per_sec,
        }
    }

    /// Pages per second: of the last period while running, afterwards the average since the setup.
    fn overall_pages_per_sec(&self) -> u64 {
        match (self.total_time, self.setup_time) {
            (Some(total), Some(setup)) if self.status == MigrationStatus::Completed => {
                crate::policy::per_second(self.pages_sent(), total.saturating_sub(setup))
            }
            _ => self.period.pages_per_sec(),
        }
    }

    /// As `query-migrate` answers: QEMU's `MigrationInfo`. Downtime has a fraction in
    /// `x-downtime-us`.
    pub fn to_json(&self) -> Value {
        if self.status == MigrationStatus::None {
            let waiting = |address: &Value| json!({"socket-address": [address]});
            return self.address.as_ref().map_or_else(|| json!({}), waiting);
        }
        let page = devices::ram::PAGE_SIZE;
        let bytes_per_sec = self.overall_bytes_per_sec();
        let data_bytes = self.transferred_bytes.saturating_sub(self.control_bytes);
        let multifd_bytes = if self.multifd { data_bytes } else { 0 };
        let mut info = json!({
            "status": self.status.name(),
            "ram": {
                "transferred": self.transferred_bytes,
                "remaining": self.remaining_bytes,
                "total": self.total_bytes,
                "duplicate": self.zero_pages,
                "skipped": self.xbzrle.unchanged,
                "normal": self.normal_pages,
                "normal-bytes": self.normal_pages * page,
                "dirty-pages-rate": self.dirty_pages_rate,
                "x-dirty-bytes-rate": self.dirty_pages_rate * page,
                "mbps": megabits(bytes_per_sec),
                "dirty-sync-count": self.rounds,
                "postcopy-requests": 0,
                "page-size": page,
                "multifd-bytes": multifd_bytes,
                "pages-per-second": self.overall_pages_per_sec(),
                "precopy-bytes": self.precopy_bytes,
                "downtime-bytes": self.downtime_bytes,
                "postcopy-bytes": self.postcopy_bytes,
                "dirty-sync-missed-zero-copy": 0,
            },
        });
        let mut put = |key: &str, value: Value| info[key] = value;
        let elapsed = self.total_time.or_else(|| self.started.map(|started| started.elapsed()));
        put("total-time", elapsed.map_or(0, millis).into());
        if let Some(setup) = self.setup_time {
            put("setup-time", millis(setup).into());
        }
        if let Some(downtime) = self.downtime {
            put("downtime", millis(downtime).into());
            put("x-downtime-us", micros(downtime).into());
        }
        if let Some(missing) = &self.incomplete {
            put("x-incomplete", missing.as_str().into());
        }
        if self.postcopy_total > 0 {
            let (total, left) = (self.postcopy_total, self.postcopy_left);
            put("x-postcopy", json!({"total": total, "remaining": left}));
        }
        if self.xbzrle.cache_size > 0 {
            put("xbzrle-cache", self.xbzrle.to_json(&self.period));
        }
        if self.compression.enabled || self.compression.pages > 0 {
            put("compression", self.compression.to_json(&self.period));
        }
        if let Some(parts) = self.downtime_parts {
            put("x-downtime-parts", parts.to_json());
        }
        if let (Some(expected), None) = (self.expected_downtime, self.total_time) {
            put("expected-downtime", millis(expected).into());
        }
        if self.throttle_percent > 0 {
            put("cpu-throttle-percentage", self.throttle_percent.into());
        }
        if let (Some(report), None) = (&self.not_converging, self.total_time) {
            put("x-not-converging", report.to_json());
        }
        if let Some(address) = &self.address {
            put("socket-address", json!([address]));
        }
        let rounds: Vec<_> = self.history.iter().map(|round| round.to_json()).collect();
        if !rounds.is_empty() {
            put("x-rounds", rounds.into());
        }
        if let Some(error) = &self.error {
            put("error-desc", error.as_str().into());
        }
        if let Some(disk) = &self.disk {
            put("disk", disk.to_json());
        }
        if self.called_off > 0 {
            put("x-called-off-switches", self.called_off.into());
        }
        // Not a status of its own: clients written for QEMU wait for `completed`, `failed` or `cancelled`, and
        // would wait forever.
        if self.outcome_unknown {
            put("x-outcome", "unknown".into());
        }
        info
    }
}

/// Counters of one migration. Written once per batch of pages, so a lock is cheap enough.
#[derive(Debug, Default)]
pub struct Counters(Mutex<StatsSnapshot>);

impl Counters {
    /// All zero.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, StatsSnapshot> {
        devices::lock(&self.0)
    }

    /// Updates the counters.
    pub(crate) fn update(&self, change: impl FnOnce(&mut StatsSnapshot)) {
        change(&mut self.lock());
    }

    /// The counters now.
    pub fn snapshot(&self) -> StatsSnapshot {
        self.lock().clone()
    }

    /// The plain figures, without history and reports.
    pub(crate) fn figures(&self) -> StatsSnapshot {
        let stats = self.lock();
        StatsSnapshot {
            transferred_bytes: stats.transferred_bytes,
            zero_pages: stats.zero_pages,
            normal_pages: stats.normal_pages,
            xbzrle: stats.xbzrle,
            compression: stats.compression,
            throttle_percent: stats.throttle_percent,
            ..StatsSnapshot::default()
        }
    }

    /// The migration's thread panicked; `unknown` if the right to run was spent already.
    pub fn panicked(&self, unknown: bool) {
        self.update(|stats| {
            stats.status = MigrationStatus::Failed;
            stats.total_time = stats.started.map(|started| started.elapsed());
            stats.error = Some(Panicked("migrates the guest").to_string());
            stats.outcome_unknown = unknown;
        });
    }

    /// Records that a destination listens at `address`, QEMU's `SocketAddress`.
    pub fn listening(&self, address: Value) {
        self.update(|stats| stats.address = Some(address));
    }

    /// Records that a cancel was requested.
    pub fn cancelling(&self) {
        use MigrationStatus::{Active, Device, Setup};
        self.update(|stats| {
            // A final status stays.
            if matches!(stats.status, Setup | Active | Device) {
                stats.status = MigrationStatus::Cancelling;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_history_keeps_its_beginning_and_its_end() {
        let mut history = History::default();
        for number in 1..=1000 {
            history.push(RoundRecord { number, ..Default::default() });
        }
        let numbers: Vec<_> = history.iter().map(|round| round.number).collect();
        let expected: Vec<_> = (1..=16).chain(953..=1000).collect();
        assert_eq!(numbers, expected);
    }

    #[test]
    fn what_progress_is_measured_by_knows_every_kind_of_page() {
        let counters = Counters::new();
        let xbzrle = XbzrleStats { pages: 4, unchanged: 8, ..Default::default() };
        counters
            .update(|stats| (stats.zero_pages, stats.normal_pages, stats.xbzrle) = (1, 2, xbzrle));
        assert_eq!(counters.figures().pages_sent(), 15);
    }

    #[test]
    fn what_has_ended_keeps_its_figures_and_not_its_prospects() {
        let counters = Counters::new();
        assert_eq!(counters.snapshot().to_json(), json!({}));
        let facts = NotConverging {
            dirty_bytes_per_sec: 2,
            bytes_per_sec: 1,
            expected_downtime: Duration::from_millis(500),
            downtime_limit: Duration::from_millis(300),
            throttle_percent: 0,
            called_off: 3,
            part: Some(PartTime::new("draining disk `root`", Duration::from_millis(500))),
        };
        counters.update(|stats| {
            stats.status = MigrationStatus::Active;
            stats.throttle_percent = 40;
            stats.not_converging = Some(facts.clone());
            stats.expected_downtime = Some(facts.expected_downtime);
            stats.history.push(RoundRecord { number: 1, ..Default::default() });
            stats.setup_time = Some(Duration::from_millis(100));
        });
        let info = counters.snapshot().to_json();
        assert_eq!(info["cpu-throttle-percentage"], 40);
        assert_eq!(info["expected-downtime"], 500);
        assert_eq!(info["x-not-converging"]["expected-downtime"], 500);
        counters.update(|stats| {
            stats.status = MigrationStatus::Completed;
            stats.throttle_percent = 0;
            stats.transferred_bytes = 125_000_000;
            stats.zero_pages = 70;
            stats.total_time = Some(Duration::from_millis(1100));
            stats.downtime_parts = Some(DowntimeParts::default());
        });
        let info = counters.snapshot().to_json();
        for gone in ["cpu-throttle-percentage", "expected-downtime", "x-not-converging"] {
            assert!(info.get(gone).is_none(), "{gone}: {info}");
        }
        assert_eq!(info["ram"]["mbps"], 1000.0);
        assert_eq!(info["ram"]["pages-per-second"], 70, "not what the bandwidth suggests");
        assert_eq!(info["x-rounds"][0]["round"], 1);
        assert_eq!(info["x-downtime-parts"]["pause"], 0);
    }
}
