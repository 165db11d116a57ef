//! What a migration has done so far: counters written by its threads, read by anyone, and QEMU's
//! `MigrationInfo` made of them. They outlive the migration.

use crate::block::stats::DiskStats;
use crate::policy::Round;
use serde_json::{Value, json};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// QEMU's migration status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MigrationStatus {
    /// No migration yet.
    #[default]
    None,
    /// Connecting and building the destination's machine.
    Setup,
    /// The guest runs, RAM travels.
    Active,
    /// The guest is stopped for the last step.
    Device,
    /// A cancel is under way.
    Cancelling,
    /// Cancelled; the guest runs at the source.
    Cancelled,
    /// Moved.
    Completed,
    /// Failed; the guest runs at the source, or the outcome is unknown.
    Failed,
}

impl MigrationStatus {
    /// Whether the migration has ended, one way or another.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Cancelled | Self::Completed | Self::Failed)
    }

    /// QEMU's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::Device => "device",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }
}

/// A copy of all counters.
#[derive(Debug, Clone, Default)]
pub struct StatsSnapshot {
    /// Where the migration stands.
    pub status: MigrationStatus,
    /// RAM size.
    pub total_bytes: u64,
    /// Bytes sent or received, with all headers.
    pub transferred_bytes: u64,
    /// RAM still to send in this round.
    pub remaining_bytes: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Pages sent as they are.
    pub normal_pages: u64,
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
    /// When it began, and how long it took.
    pub started: Option<Instant>,
    /// Total time, once it has ended.
    pub total_time: Option<Duration>,
    /// Time until the first page.
    pub setup_time: Option<Duration>,
    /// How long the guest was stopped, as the source saw it.
    pub downtime: Option<Duration>,
    /// How long it would be stopped if the last step came now.
    pub expected_downtime: Option<Duration>,
    /// Why it failed.
    pub error: Option<String>,
    /// The answer to `Go` was lost: the guest may run at the destination.
    pub outcome_unknown: bool,
    /// Pauses that were called off because they would have been too long.
    pub called_off: u64,
    /// Finished rounds.
    pub history: Vec<Round>,
    /// The disks, if any travel.
    pub disk: Option<DiskStats>,
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl StatsSnapshot {
    /// As `query-migrate` answers: QEMU's `MigrationInfo`. Downtime has a fraction in
    /// `x-downtime-us`.
    pub fn to_json(&self) -> Value {
        if self.status == MigrationStatus::None {
            return json!({});
        }
        let page = devices::ram::PAGE_SIZE;
        let mut info = json!({
            "status": self.status.name(),
            "ram": {
                "transferred": self.transferred_bytes,
                "remaining": self.remaining_bytes,
                "total": self.total_bytes,
                "duplicate": self.zero_pages,
                "skipped": 0,
                "normal": self.normal_pages,
                "normal-bytes": self.normal_pages * page,
                "dirty-pages-rate": self.dirty_pages_rate,
                "mbps": self.bytes_per_sec as f64 * 8.0 / 1e6,
                "dirty-sync-count": self.rounds,
                "postcopy-requests": 0,
                "page-size": page,
                "multifd-bytes": 0,
                "pages-per-second": self.bytes_per_sec / page,
                "precopy-bytes": self.precopy_bytes,
                "downtime-bytes": self.downtime_bytes,
                "postcopy-bytes": 0,
            },
        });
        let mut put = |key: &str, value: Value| info[key] = value;
        let elapsed = self.total_time.or_else(|| self.started.map(|started| started.elapsed()));
        put("total-time", millis(elapsed.unwrap_or_default()).into());
        if let Some(setup) = self.setup_time {
            put("setup-time", millis(setup).into());
        }
        if let Some(downtime) = self.downtime {
            put("downtime", millis(downtime).into());
            put("x-downtime-us", u64::try_from(downtime.as_micros()).unwrap_or(u64::MAX).into());
        }
        if let (Some(expected), None) = (self.expected_downtime, self.total_time) {
            put("expected-downtime", millis(expected).into());
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the counters.
    pub(crate) fn update(&self, change: impl FnOnce(&mut StatsSnapshot)) {
        change(&mut self.lock());
    }

    /// The counters now.
    pub fn snapshot(&self) -> StatsSnapshot {
        self.lock().clone()
    }

    /// A cancel was asked for.
    pub fn cancelling(&self) {
        use MigrationStatus::{Active, Device, Setup};
        self.update(|stats| {
            // One that has ended stays as it ended.
            if matches!(stats.status, Setup | Active | Device) {
                stats.status = MigrationStatus::Cancelling;
            }
        });
    }
}
