//! A token that ends a migration early and wakes every thread that waits for the peer.
//!
//! The VMM calls [`CancelToken::cancel`]; the engine registers wake-ups, and disarms the token at the
//! point of no return, atomically with the check whether it was cancelled.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

type Wake = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct State {
    disarmed: bool,
    /// Why it was cancelled, for the peer.
    reason: Option<String>,
    /// A cancel comes at the last moment.
    #[cfg(test)]
    cancelled_at_disarm: bool,
    wakes: Vec<(u64, Wake)>,
    next_id: u64,
}

#[derive(Default)]
struct Inner {
    /// Written under the lock; read without it around every read and write of a connection.
    cancelled: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

/// Cheap to clone; all clones are one token. Serves one migration.
#[derive(Clone, Default)]
pub struct CancelToken(Arc<Inner>);

/// Keeps a wake-up registered until dropped.
#[must_use = "dropping it ends the registration"]
pub(crate) struct Registration {
    token: CancelToken,
    id: u64,
}

impl CancelToken {
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        devices::lock(&self.0.state)
    }

    /// Cancels: blocked reads and writes fail, waits end. Has no effect and returns false once the token is
    /// disarmed.
    pub fn cancel(&self) -> bool {
        self.cancel_because(None)
    }

    /// Cancels as [`CancelToken::cancel`], and the peer is told why. The first reason stays.
    pub fn cancel_because(&self, reason: Option<&str>) -> bool {
        let mut state = self.state();
        if state.disarmed {
            return false;
        }
        if let Some(reason) = reason {
            state.reason.get_or_insert_with(|| reason.to_owned());
        }
        self.0.cancelled.store(true, Ordering::Release);
        let wakes = std::mem::take(&mut state.wakes);
        drop(state);
        self.0.changed.notify_all();
        for (_, wake) in wakes {
            wake();
        }
        true
    }

    /// Whether [`CancelToken::cancel`] was called in time.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// Why it was cancelled, if somebody has said so.
    pub(crate) fn reason(&self) -> Option<String> {
        self.state().reason.clone()
    }

    /// Registers `wake`, called when the token is cancelled, or now if it already is.
    pub(crate) fn on_cancel(&self, wake: impl Fn() + Send + Sync + 'static) -> Registration {
        let mut state = self.state();
        let id = state.next_id;
        state.next_id += 1;
        if self.is_cancelled() {
            drop(state);
            wake();
        } else {
            state.wakes.push((id, Arc::new(wake)));
        }
        Registration { token: self.clone(), id }
    }

    /// Makes later cancels ineffective. Returns false if the token is already cancelled.
    pub(crate) fn disarm(&self) -> bool {
        #[cfg(test)]
        if self.state().cancelled_at_disarm {
            self.cancel();
        }
        let mut state = self.state();
        if self.is_cancelled() {
            return false;
        }
        state.disarmed = true;
        true
    }

    /// Cancels as the owner is about to disarm it: the last moment at which that has an effect.
    #[cfg(test)]
    pub(crate) fn cancel_at_disarm(&self) {
        self.state().cancelled_at_disarm = true;
    }

    /// Waits for `duration`, or until cancelled.
    pub(crate) fn wait(&self, duration: Duration) {
        let end = Instant::now() + duration;
        let mut state = self.state();
        while !self.is_cancelled() {
            let now = Instant::now();
            if now >= end {
                return;
            }
            let waited = self.0.changed.wait_timeout(state, end - now);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.token.state().wakes.retain(|(id, _)| *id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flag() -> (Arc<AtomicBool>, impl Fn() + Send + Sync + 'static) {
        let flag = Arc::new(AtomicBool::new(false));
        let set = flag.clone();
        (flag, move || set.store(true, Ordering::SeqCst))
    }

    #[test]
    fn the_first_reason_stays_and_none_is_taken_once_it_is_too_late() {
        let token = CancelToken::new();
        assert!(token.cancel() && token.reason().is_none());
        assert!(token.cancel_because(Some("first")) && token.cancel_because(Some("second")));
        assert_eq!(token.reason().unwrap(), "first");
        let token = CancelToken::new();
        assert!(token.disarm() && !token.cancel_because(Some("late")));
        assert_eq!(token.reason(), None);
    }

    #[test]
    fn cancelling_wakes_early_and_late_registrations() {
        let token = CancelToken::new();
        let (early, wake) = flag();
        let _early = token.on_cancel(wake);
        let (gone, wake) = flag();
        drop(token.on_cancel(wake));
        assert!(token.cancel() && token.is_cancelled());
        let (late, wake) = flag();
        let _late = token.on_cancel(wake);
        assert!(early.load(Ordering::SeqCst) && late.load(Ordering::SeqCst));
        assert!(!gone.load(Ordering::SeqCst));
        assert!(!token.disarm(), "too late to disarm");
        token.wait(Duration::from_secs(3600));
    }

    #[test]
    fn a_disarmed_token_cannot_be_cancelled() {
        let token = CancelToken::new();
        assert!(token.disarm());
        assert!(!token.cancel());
        assert!(!token.is_cancelled());
    }
}
