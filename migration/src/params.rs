//! Capabilities and parameters of a migration, with QEMU's names and defaults, validated once.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Parameters a user may set before or during a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    /// Cap on what is sent, in bytes per second; 0 for none. QEMU's `max-bandwidth`.
    pub max_bandwidth: u64,
    /// Longest pause to aim for. QEMU's `downtime-limit`.
    pub downtime_limit: Duration,
}

impl Default for Params {
    fn default() -> Self {
        // QEMU caps at 128 MiB/s by default; a migration tool should use the link it is given.
        Self { max_bandwidth: 0, downtime_limit: Duration::from_millis(300) }
    }
}

/// QEMU's limit on `downtime-limit`: 2000 seconds.
pub const MAX_DOWNTIME_LIMIT: Duration = Duration::from_secs(2000);

/// A parameter out of range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParamsError {
    /// `downtime-limit` past [`MAX_DOWNTIME_LIMIT`].
    #[error(
        "Parameter 'downtime-limit' expects an integer in the range of 0 to 2000000 milliseconds"
    )]
    DowntimeLimit,
}

impl Params {
    /// Checks every range.
    pub fn validate(&self) -> Result<(), ParamsError> {
        if self.downtime_limit > MAX_DOWNTIME_LIMIT {
            return Err(ParamsError::DowntimeLimit);
        }
        Ok(())
    }
}

/// Parameters shared with a running migration, which reads them anew in every step.
#[derive(Debug, Clone, Default)]
pub struct SharedParams(Arc<Mutex<Params>>);

impl SharedParams {
    /// Shares `params`.
    pub fn new(params: Params) -> Self {
        Self(Arc::new(Mutex::new(params)))
    }

    /// The values now.
    pub fn get(&self) -> Params {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the values; a running migration notices at its next step.
    pub fn set(&self, params: Params) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = params;
    }
}
