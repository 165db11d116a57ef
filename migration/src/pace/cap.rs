//! The bandwidth cap, shared by all channels of a migration: one bucket, and counters of bytes sent and
//! time spent waiting for the cap. Each sending thread has its own [`Cap`].

use super::{Allowance, TokenBucket};
use crate::cancel::CancelToken;
use crate::params::SharedParams;
use crate::transport::Throttle;
use crate::wire::WireError;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Longest single wait for tokens, so that a raised cap takes effect.
const MAX_WAIT: Duration = Duration::from_millis(100);

/// Bytes sent so far, and time spent on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// Bytes on the wire.
    pub bytes: u64,
    /// Time during which at least one channel waited for the cap.
    pub held: Duration,
    /// Time spent in writes, summed over all channels.
    pub writing: Duration,
}

#[derive(Default)]
struct State {
    bucket: TokenBucket,
    sent: Sent,
    /// Waits up to here are counted. Those of several channels overlap.
    held_until: Duration,
}

impl State {
    fn held(&mut self, from: Duration, until: Duration) {
        self.sent.held += until.saturating_sub(from.max(self.held_until));
        self.held_until = self.held_until.max(until);
    }
}

struct Shared {
    params: SharedParams,
    cancel: CancelToken,
    origin: Instant,
    state: Mutex<State>,
}

/// One sender's access to the cap. Clones share the cap and may be used by other threads.
pub struct Cap {
    shared: Arc<Shared>,
    /// Taken from the bucket and not yet sent, so that two senders do not get the same tokens.
    reserved: usize,
    /// When they were taken.
    allowed_at: Duration,
}

impl Clone for Cap {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), reserved: 0, allowed_at: Duration::ZERO }
    }
}

impl Cap {
    /// Enforces `max-bandwidth` of `params`, which may change at any time.
    pub fn new(params: SharedParams, cancel: CancelToken) -> Self {
        let (origin, state) = (Instant::now(), Mutex::default());
        let shared = Arc::new(Shared { params, cancel, origin, state });
        Self { shared, reserved: 0, allowed_at: Duration::ZERO }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        devices::lock(&self.shared.state)
    }

    /// What all senders have sent so far.
    pub fn sent_so_far(&self) -> Sent {
        self.state().sent
    }

    /// Time since the cap was created: the clock of its measurements.
    pub fn now(&self) -> Duration {
        self.shared.origin.elapsed()
    }
}

impl Throttle for Cap {
    fn allow(&mut self, wanted: usize) -> Result<usize, WireError> {
        loop {
            if self.shared.cancel.is_cancelled() {
                return Err(WireError::Interrupted);
            }
            let rate = self.shared.params.get().max_bandwidth;
            let now = self.now();
            // Refund a reservation of which nothing was sent.
            let unsent = std::mem::take(&mut self.reserved);
            let allowance = {
                let mut state = self.state();
                state.bucket.refund(unsent);
                let allowance = state.bucket.allow(now, rate, wanted);
                if let Allowance::Bytes(bytes) = allowance {
                    state.bucket.spend(bytes);
                }
                allowance
            };
            match allowance {
                Allowance::Bytes(bytes) => {
                    (self.reserved, self.allowed_at) = (bytes, now);
                    return Ok(bytes);
                }
                Allowance::Wait(duration) => {
                    self.shared.cancel.wait(duration.min(MAX_WAIT));
                    let until = self.now();
                    self.state().held(now, until);
                }
            }
        }
    }

    fn sent(&mut self, bytes: usize) {
        let unsent = std::mem::take(&mut self.reserved).saturating_sub(bytes);
        let writing = self.now().saturating_sub(self.allowed_at);
        let mut state = self.state();
        state.bucket.refund(unsent);
        state.sent.bytes += bytes as u64;
        state.sent.writing += writing;
    }
}

impl Drop for Cap {
    fn drop(&mut self) {
        let unsent = std::mem::take(&mut self.reserved);
        self.state().bucket.refund(unsent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Params;

    /// What four senders get through in half a second, as a part of what they may.
    fn share_sent(rate: u64) -> f64 {
        let params = SharedParams::new(Params { max_bandwidth: rate, ..Params::default() });
        let cap = Cap::new(params, CancelToken::new());
        let start = Instant::now();
        let senders: Vec<_> = (0..4)
            .map(|_| {
                let mut cap = cap.clone();
                std::thread::spawn(move || {
                    while start.elapsed() < Duration::from_millis(500) {
                        let bytes = cap.allow(1 << 20).unwrap();
                        // The socket takes half of it.
                        cap.sent(bytes / 2);
                    }
                })
            })
            .collect();
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        let (sent, seconds) = (cap.sent_so_far(), start.elapsed().as_secs_f64());
        assert!(sent.held.as_secs_f64() <= seconds, "waits that overlap count once: {sent:?}");
        sent.bytes as f64 / (rate as f64 * seconds)
    }

    #[test]
    fn several_senders_share_one_cap() {
        let mut shares = Vec::new();
        // Never more; and on a host that is busy elsewhere less, but not every time.
        for _ in 0..4 {
            let share = share_sent(20_000_000);
            assert!(share <= 1.07, "{share} of what is allowed");
            if share >= 0.8 {
                return;
            }
            shares.push(share);
        }
        panic!("only {shares:?} of what is allowed");
    }

    #[test]
    fn a_cancel_ends_a_wait_for_the_cap() {
        let cancel = CancelToken::new();
        let params = SharedParams::new(Params { max_bandwidth: 1, ..Params::default() });
        let mut cap = Cap::new(params, cancel.clone());
        let waiting = std::thread::spawn(move || cap.allow(1 << 20).and_then(|_| cap.allow(1)));
        cancel.cancel();
        assert!(matches!(waiting.join().unwrap(), Err(WireError::Interrupted)));
    }
}
