//! When the peer was last heard. Written by every reader of a migration's connections, checked by every
//! wait.

use crate::units::micros;
use crate::wire::WireError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A live peer may make no progress on one connection for this many times the patience, for example during
/// a storage hiccup.
const ALIVE_TIMES: u32 = 6;

/// When the peer was last heard. Shared by all connections of a migration.
#[derive(Debug)]
pub struct Liveness {
    origin: Instant,
    /// Microseconds after `origin`.
    heard_us: AtomicU64,
}

impl Default for Liveness {
    fn default() -> Self {
        Self { origin: Instant::now(), heard_us: AtomicU64::new(0) }
    }
}

impl Liveness {
    /// Records that something was received.
    pub fn heard(&self) {
        self.heard_us.store(micros(self.origin.elapsed()), Ordering::Relaxed);
    }

    /// This side has received nothing since `since` because it does not read: for a while that is not the
    /// peer's silence, as in [`Liveness::check`].
    pub fn excuse(&self, since: Instant, patience: Duration) {
        if since.elapsed() < patience * ALIVE_TIMES {
            self.heard();
        }
    }

    /// Time since something was received.
    pub fn silence(&self) -> Duration {
        let heard = Duration::from_micros(self.heard_us.load(Ordering::Relaxed));
        self.origin.elapsed().saturating_sub(heard)
    }

    /// Checks a connection that has been idle since `moved`. Fails once the peer was silent everywhere for
    /// `patience`, or is alive but idle here for [`ALIVE_TIMES`] as long.
    pub fn check(&self, moved: Instant, patience: Duration) -> Result<(), WireError> {
        let still = moved.elapsed();
        if still < patience {
            return Ok(());
        }
        if self.silence() >= patience || still >= patience * ALIVE_TIMES {
            return Err(WireError::Stalled { seconds: still.as_secs() });
        }
        Ok(())
    }
}
