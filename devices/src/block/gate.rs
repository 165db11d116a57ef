//! Admits requests to a disk, and keeps them out while its storage is exchanged. Owned by a
//! [`super::BlockNode`]; QEMU calls the time in which it is closed a drained section.
//!
//! ```text
//! worker ─▶ enter: Pass ─▶ request in flight ─▶ drop             closed: no Pass; be woken when it opens
//! job    ─▶ close: Drained ─▶ wait until nothing is in flight ─▶ exchange ─▶ drop: open
//! ```
//! Nobody waits inside: a worker that gets no pass puts its request back and goes on when it is woken, so a pause
//! never waits for a job. Whoever cannot put a request back waits in [`Gate::enter_by`], with a deadline.

use crate::lock;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

/// Counts requests in flight.
#[derive(Debug, Default)]
pub struct Gate {
    in_flight: AtomicUsize,
    /// Drained sections that have begun and not ended.
    closed: AtomicUsize,
    /// Written when the gate opens. Also the lock of `changed`.
    sleepers: Mutex<Vec<Arc<EventFd>>>,
    /// Nothing is in flight any more, or the gate has opened.
    changed: Condvar,
}

/// A request in flight, from its admission to its drop.
#[derive(Debug)]
pub struct Pass(Arc<Gate>);

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A drained section: no request is admitted while it lives.
#[derive(Debug)]
pub struct Drained(Arc<Gate>);

impl Gate {
    /// Admits a request, unless the gate is closed.
    pub fn enter(self: &Arc<Self>) -> Option<Pass> {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        // Counted before the look: who closes it sees this one, or this one sees that it is closed.
        if self.is_closed() {
            self.leave();
            return None;
        }
        Some(Pass(self.clone()))
    }

    /// Waits for admission until `deadline`.
    ///
    /// # Errors
    /// `TimedOut` if the gate is closed for so long.
    pub fn enter_by(self: &Arc<Self>, deadline: Instant) -> io::Result<Pass> {
        loop {
            if let Some(pass) = self.enter() {
                return Ok(pass);
            }
            let sleepers = lock(&self.sleepers);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let why = "the disk's storage is being exchanged, and that takes too long";
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            let waited = self.changed.wait_timeout_while(sleepers, left, |_| self.is_closed());
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Whether requests are kept out.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst) > 0
    }

    /// Has `event` written when the gate opens. False if it is open: nothing will be written.
    pub fn wake(&self, event: &Arc<EventFd>) -> bool {
        let mut sleepers = lock(&self.sleepers);
        let closed = self.is_closed();
        if closed {
            sleepers.push(event.clone());
        }
        closed
    }

    /// Begins a drained section.
    pub fn close(self: &Arc<Self>) -> Drained {
        self.closed.fetch_add(1, Ordering::SeqCst);
        Drained(self.clone())
    }

    fn leave(&self) {
        if self.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 && self.is_closed() {
            let _sleepers = lock(&self.sleepers);
            self.changed.notify_all();
        }
    }
}

impl Drained {
    /// Whether it is a section of `gate`.
    pub fn is_of(&self, gate: &Arc<Gate>) -> bool {
        Arc::ptr_eq(&self.0, gate)
    }

    /// Waits until no request is in flight, at most until `deadline`. False on timeout.
    pub fn wait_until(&self, deadline: Instant) -> bool {
        let sleepers = lock(&self.0.sleepers);
        let left = deadline.saturating_duration_since(Instant::now());
        let in_flight = |_: &mut _| self.0.in_flight.load(Ordering::SeqCst) > 0;
        let waited = self.0.changed.wait_timeout_while(sleepers, left, in_flight);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        let mut sleepers = lock(&self.0.sleepers);
        if self.0.closed.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        for event in sleepers.drain(..) {
            // A full counter means that it is awake.
            let _ = event.write(1);
        }
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[test]
    fn a_section_waits_for_requests_in_flight_and_admits_none() {
        let gate = Arc::<Gate>::default();
        let pass = gate.enter().unwrap();
        let section = gate.close();
        assert!(gate.enter().is_none());
        assert!(!section.wait_until(Instant::now()), "one is in flight");
        let ends = std::thread::spawn(move || drop(pass));
        assert!(section.wait_until(soon()));
        ends.join().unwrap();
        let another = gate.close();
        drop(section);
        assert!(gate.enter().is_none(), "the other section goes on");
        drop(another);
        assert!(gate.enter().is_some());
    }

    #[test]
    fn who_was_refused_is_woken_once_when_it_opens() {
        let gate = Arc::<Gate>::default();
        let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        assert!(!gate.wake(&event), "it is open");
        let section = gate.close();
        assert!(gate.wake(&event));
        assert!(event.read().is_err());
        drop(section);
        assert_eq!(event.read().unwrap(), 1);
        drop(gate.close());
        assert!(event.read().is_err(), "it has not asked again");
    }

    #[test]
    fn who_cannot_put_a_request_back_waits_with_a_deadline() {
        let gate = Arc::<Gate>::default();
        let section = gate.close();
        let error = gate.enter_by(Instant::now() + Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let waits = std::thread::spawn({
            let gate = gate.clone();
            move || gate.enter_by(soon()).is_ok()
        });
        drop(section);
        assert!(waits.join().unwrap());
        drop(gate.enter_by(Instant::now()).unwrap());
        assert!(gate.close().wait_until(Instant::now()), "every pass was given back");
    }

    #[test]
    fn no_request_is_in_flight_in_a_section_however_threads_interleave() {
        let gate = Arc::<Gate>::default();
        let inside = Arc::new(AtomicUsize::new(0));
        let done = Arc::new(AtomicUsize::new(0));
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let (gate, inside, done) = (gate.clone(), inside.clone(), done.clone());
                std::thread::spawn(move || {
                    while done.load(Ordering::SeqCst) == 0 {
                        let Some(_pass) = gate.enter() else { continue };
                        inside.fetch_add(1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        for _ in 0..2000 {
            let section = gate.close();
            assert!(section.wait_until(soon()));
            assert_eq!(inside.load(Ordering::SeqCst), 0);
        }
        done.store(1, Ordering::SeqCst);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    }
}
