//! A latch: set once by one thread; others wait for it, each with its own deadline. Used by `worker` and
//! `mmio` for the end of a worker or its requests.

use crate::lock;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

/// The time at which it was set, if it was.
#[derive(Debug, Default)]
pub(super) struct Latch {
    at: Mutex<Option<Instant>>,
    set: Condvar,
}

impl Latch {
    /// When it was set, if it was.
    pub fn get(&self) -> Option<Instant> {
        *lock(&self.at)
    }

    /// Waits until it is set, at most until `deadline`. Returns the time at which it was set, or `None` on
    /// timeout.
    pub fn wait_until(&self, deadline: Instant) -> Option<Instant> {
        let mut at = lock(&self.at);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if at.is_some() || left.is_zero() {
                return *at;
            }
            let waited = self.set.wait_timeout(at, left);
            (at, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Sets the latch when dropped, so that waiters are released however the holding thread ends.
#[derive(Debug)]
pub(super) struct SetOnDrop(pub Arc<Latch>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        lock(&self.0.at).get_or_insert_with(Instant::now);
        self.0.set.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_deadline_that_has_passed_is_no_wait_and_what_was_reached_stays() {
        let latch = Arc::<Latch>::default();
        let start = Instant::now();
        assert_eq!(latch.wait_until(start), None);
        drop(SetOnDrop(latch.clone()));
        let at = latch.get().unwrap();
        assert!(at >= start);
        drop(SetOnDrop(latch.clone()));
        assert_eq!(latch.wait_until(start), Some(at), "the first time counts");
    }

    #[test]
    fn a_thread_that_panics_reaches_it() {
        let latch = Arc::<Latch>::default();
        let held = SetOnDrop(latch.clone());
        let thread = std::thread::spawn(move || {
            let _held = held;
            panic!("on purpose");
        });
        assert!(latch.wait_until(Instant::now() + Duration::from_secs(10)).is_some());
        assert!(thread.join().is_err());
    }
}
