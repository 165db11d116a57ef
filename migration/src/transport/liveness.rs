//! What is known of the peer's life: when something was last heard on the control connection.

use crate::units::micros;
use crate::wire::WireError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A peer that lives may take so many times the patience without moving a byte on one connection: its
/// storage may have a hiccup. After that it makes no progress and is given up.
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
    /// Something came from the peer.
    pub fn heard(&self) {
        self.heard_us.store(micros(self.origin.elapsed()), Ordering::Relaxed);
    }

    /// How long nothing has come.
    pub fn silence(&self) -> Duration {
        let heard = Duration::from_micros(self.heard_us.load(Ordering::Relaxed));
        self.origin.elapsed().saturating_sub(heard)
    }

    /// For a connection that has moved nothing since `moved`: an error once the peer is silent
    /// everywhere for `patience`, or lives but moves nothing here for several times that.
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
