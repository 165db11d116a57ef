//! A token that ends a migration early and wakes every thread that waits for the peer.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

type Stopper = Box<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct State {
    cancelled: bool,
    stopper: Option<Stopper>,
}

/// Cheap to clone; all clones are one token.
#[derive(Clone, Default)]
pub struct CancelToken(Arc<(Mutex<State>, Condvar)>);

impl CancelToken {
    /// A token that nobody has cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancels: blocked reads and writes of the connection fail at once, waits end.
    pub fn cancel(&self) {
        let mut state = self.state();
        state.cancelled = true;
        if let Some(stop) = &state.stopper {
            stop();
        }
        self.0.1.notify_all();
    }

    /// Whether [`CancelToken::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.state().cancelled
    }

    /// Has `stop` called when the token is cancelled, or now if it is already.
    pub(crate) fn on_cancel(&self, stop: Stopper) {
        let mut state = self.state();
        if state.cancelled {
            stop();
        }
        state.stopper = Some(stop);
    }

    /// From here on cancelling does nothing; false if it is too late.
    pub(crate) fn disarm(&self) -> bool {
        let mut state = self.state();
        state.stopper = None;
        !state.cancelled
    }

    /// Waits for `duration`, or until cancelled.
    pub(crate) fn wait(&self, duration: Duration) {
        let end = Instant::now() + duration;
        let mut state = self.state();
        while !state.cancelled {
            let now = Instant::now();
            if now >= end {
                return;
            }
            let waited = self.0.1.wait_timeout(state, end - now);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
