//! Counts the old data that is in memory, and bounds how much of it is there because the guest overwrites it.

use crate::lock;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How often a waiting write looks whether it must still wait.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Most old data that waits for the target because the guest overwrites it.
pub(super) const MAX_GUEST_BYTES: u64 = 16 << 20;
/// How much old data is in memory, in bytes.
#[derive(Debug, Default)]
struct Held {
    of_guest: u64,
    all: u64,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    held: Mutex<Held>,
    freed: Condvar,
}

/// Counts old data in memory until it is dropped.
#[derive(Debug)]
pub(super) struct Holding {
    ledger: Arc<Ledger>,
    len_bytes: u64,
    of_guest: bool,
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut held = lock(&self.ledger.held);
        held.all -= self.len_bytes;
        if self.of_guest {
            held.of_guest -= self.len_bytes;
        }
        self.ledger.freed.notify_all();
    }
}

impl Ledger {
    /// Old data in memory, in bytes.
    pub fn held_bytes(&self) -> u64 {
        lock(&self.held).all
    }

    /// Has waiting writes look at once whether they must still wait.
    pub fn look(&self) {
        self.freed.notify_all();
    }

    /// Counts what is read in the background.
    pub fn add(self: &Arc<Self>, len_bytes: u64) -> Holding {
        lock(&self.held).all += len_bytes;
        Holding { ledger: self.clone(), len_bytes, of_guest: false }
    }

    /// Counts what the guest overwrites, when there is room for it. `None` if it is not `wanted` any more.
    pub fn add_of_guest(
        self: &Arc<Self>,
        len_bytes: u64,
        wanted: &dyn Fn() -> bool,
    ) -> Option<Holding> {
        let mut held = lock(&self.held);
        while held.of_guest > 0 && held.of_guest + len_bytes > MAX_GUEST_BYTES {
            if !wanted() {
                return None;
            }
            let waited = self.freed.wait_timeout(held, LOOK_EVERY);
            held = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        held.of_guest += len_bytes;
        held.all += len_bytes;
        Some(Holding { ledger: self.clone(), len_bytes, of_guest: true })
    }
}
