//! A moment that one thread reaches and others wait for, each with a deadline of its own.

use crate::lock;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

/// When something happened, once it has.
#[derive(Debug, Default)]
pub(super) struct Moment {
    at: Mutex<Option<Instant>>,
    reached: Condvar,
}

impl Moment {
    /// When it was reached; `None` if it has not been.
    pub fn get(&self) -> Option<Instant> {
        *lock(&self.at)
    }

    /// Waits until it is reached, at most until `deadline`. Returns when it was reached, or `None` if
    /// it was not in time.
    pub fn wait_until(&self, deadline: Instant) -> Option<Instant> {
        let mut at = lock(&self.at);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if at.is_some() || left.is_zero() {
                return *at;
            }
            let waited = self.reached.wait_timeout(at, left);
            (at, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until it is reached.
    pub fn wait(&self) {
        let at = lock(&self.at);
        let waited = self.reached.wait_while(at, |at| at.is_none());
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Dropping this reaches the moment. However the thread that holds it ends, nobody waits for it in vain.
#[derive(Debug)]
pub(super) struct ReachedOnDrop(pub Arc<Moment>);

impl Drop for ReachedOnDrop {
    fn drop(&mut self) {
        lock(&self.0.at).get_or_insert_with(Instant::now);
        self.0.reached.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_deadline_that_has_passed_is_no_wait_and_what_was_reached_stays() {
        let moment = Arc::<Moment>::default();
        let start = Instant::now();
        assert_eq!(moment.wait_until(start), None);
        drop(ReachedOnDrop(moment.clone()));
        let at = moment.get().unwrap();
        assert!(at >= start);
        drop(ReachedOnDrop(moment.clone()));
        assert_eq!(moment.wait_until(start), Some(at), "the first time counts");
        moment.wait();
    }

    #[test]
    fn a_thread_that_panics_reaches_it() {
        let moment = Arc::<Moment>::default();
        let held = ReachedOnDrop(moment.clone());
        let thread = std::thread::spawn(move || {
            let _held = held;
            panic!("on purpose");
        });
        assert!(moment.wait_until(Instant::now() + Duration::from_secs(10)).is_some());
        assert!(thread.join().is_err());
    }
}
