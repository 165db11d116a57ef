//! The bandwidth cap, shared by all channels of a migration: one bucket, and counters of bytes sent and
//! time spent waiting for the cap. Each sending thread has its own [`Cap`]. While there is no cap, no send
//! takes a lock.

use super::{Allowance, TokenBucket};
use crate::cancel::CancelToken;
use crate::params::SharedParams;
use crate::transport::Throttle;
use crate::units::nanos;
use crate::wire::WireError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
    held: Duration,
    /// Waits up to here are counted. Those of several channels overlap.
    held_until: Duration,
}

impl State {
    fn held(&mut self, from: Duration, until: Duration) {
        self.held += until.saturating_sub(from.max(self.held_until));
        self.held_until = self.held_until.max(until);
    }
}

struct Shared {
    params: SharedParams,
    cancel: CancelToken,
    origin: Instant,
    sent_bytes: AtomicU64,
    writing_nanos: AtomicU64,
    /// Whether the bucket is in use.
    capped: AtomicBool,
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
        let shared = Arc::new(Shared {
            params,
            cancel,
            origin: Instant::now(),
            sent_bytes: AtomicU64::new(0),
            writing_nanos: AtomicU64::new(0),
            capped: AtomicBool::new(false),
            state: Mutex::default(),
        });
        Self { shared, reserved: 0, allowed_at: Duration::ZERO }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        devices::lock(&self.shared.state)
    }

    /// What all senders have sent so far.
    pub fn sent_so_far(&self) -> Sent {
        Sent {
            bytes: self.shared.sent_bytes.load(Ordering::Relaxed),
            held: self.state().held,
            writing: Duration::from_nanos(self.shared.writing_nanos.load(Ordering::Relaxed)),
        }
    }

    /// Time since the cap was created: the clock of its measurements.
    pub fn now(&self) -> Duration {
        self.shared.origin.elapsed()
    }
}

impl Cap {
    /// What the bucket gives at `now` under a cap of `rate` bytes per second. Takes it out.
    fn draw(&mut self, now: Duration, rate: u64, wanted: usize) -> Allowance {
        // Refund a reservation of which nothing was sent.
        let unsent = std::mem::take(&mut self.reserved);
        let mut state = self.state();
        if !self.shared.capped.swap(true, Ordering::Relaxed) {
            // No time without a cap counts.
            state.bucket = TokenBucket::new(now);
        }
        state.bucket.refund(unsent);
        let allowance = state.bucket.allow(now, rate, wanted);
        if let Allowance::Bytes(bytes) = allowance {
            state.bucket.spend(bytes);
            drop(state);
            self.reserved = bytes;
        }
        allowance
    }

    /// Returns what is reserved beyond `sent` bytes.
    fn refund(&mut self, sent: usize) {
        let unsent = std::mem::take(&mut self.reserved).saturating_sub(sent);
        if unsent > 0 {
            self.state().bucket.refund(unsent);
        }
    }
}

impl Throttle for Cap {
    fn allow(&mut self, wanted: usize) -> Result<usize, WireError> {
        loop {
            if self.shared.cancel.is_cancelled() {
                return Err(WireError::Interrupted);
            }
            let rate = self.shared.params.max_bandwidth();
            let now = self.now();
            self.allowed_at = now;
            if rate == 0 {
                self.reserved = 0;
                if self.shared.capped.load(Ordering::Relaxed) {
                    self.shared.capped.store(false, Ordering::Relaxed);
                }
                return Ok(wanted);
            }
            match self.draw(now, rate, wanted) {
                Allowance::Bytes(bytes) => return Ok(bytes),
                Allowance::Wait(duration) => {
                    self.shared.cancel.wait(duration.min(MAX_WAIT));
                    let until = self.now();
                    self.state().held(now, until);
                }
            }
        }
    }

    fn sent(&mut self, bytes: usize) {
        self.refund(bytes);
        let writing = self.now().saturating_sub(self.allowed_at);
        self.shared.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.shared.writing_nanos.fetch_add(nanos(writing), Ordering::Relaxed);
    }
}

impl Drop for Cap {
    fn drop(&mut self) {
        self.refund(0);
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
    fn without_a_cap_no_send_takes_a_lock_and_a_later_cap_gives_no_credit() {
        let params = SharedParams::new(Params { max_bandwidth: 1_000_000, ..Params::default() });
        let cap = Cap::new(params.clone(), CancelToken::new());
        let first = cap.clone().allow(1 << 20).unwrap();
        assert!(first <= 10_000, "{first}");
        params.set(Params::default());
        let mut sender = cap.clone();
        let locked = cap.state();
        assert_eq!(sender.allow(1 << 20).unwrap(), 1 << 20);
        sender.sent(1 << 20);
        drop(locked);
        assert_eq!(cap.sent_so_far().bytes, 1 << 20);
        // What the bucket would have collected meanwhile is not there.
        std::thread::sleep(Duration::from_millis(40));
        params.set(Params { max_bandwidth: 1_000_000, ..Params::default() });
        let before = cap.now();
        let allowed = sender.allow(1 << 20).unwrap();
        assert!(cap.now() - before >= Duration::from_millis(9), "{allowed} bytes at once");
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
