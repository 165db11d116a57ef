//! One deadline for the pause: whoever is blocked when it passes, the guest runs on.
//!
//! While the rest is sent the stopped guest lies in a [`StopClock`]. The driver borrows it for what is
//! short and bounded; a thread that was started before the pause resumes it at the deadline, although the
//! driver may be blocked in a write for much longer. The right to run is in one place at any time: with
//! the clock, with the driver who took it to hand it over, or, after a resume, with the guest.

use crate::guest::{GuestError, PartTime, PausedGuest};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

enum Held<'g> {
    /// Not stopped yet.
    Running,
    Paused(PausedGuest<'g>),
    /// At the deadline; how that went until somebody has asked.
    Resumed(Option<GuestError>),
    /// The driver has it, or is done with it.
    Taken,
}

struct State<'g> {
    held: Held<'g>,
    /// How long the guest may be stopped, and from its stop on until when.
    longest: Duration,
    deadline: Instant,
    /// What the driver is at, and since when.
    part: (String, Instant),
    /// Nobody watches any more.
    done: bool,
}

/// Holds the stopped guest until its deadline.
pub(super) struct StopClock<'g> {
    state: Mutex<State<'g>>,
    changed: Condvar,
}

/// The deadline has passed, and the guest was resumed.
#[derive(Debug)]
pub(super) struct Overran {
    /// The part of the pause that was under way.
    pub(super) part: PartTime,
    /// Why the guest does not run, if it does not.
    pub(super) not_resumed: Option<GuestError>,
}

impl<'g> StopClock<'g> {
    pub(super) fn new(longest: Duration) -> Self {
        let (now, part) = (Instant::now(), String::new());
        let deadline = now + longest;
        let state =
            State { held: Held::Running, longest, deadline, part: (part, now), done: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The guest is about to be stopped; returns the deadline.
    pub(super) fn start(&self) -> Instant {
        let mut state = self.lock();
        state.deadline = Instant::now() + state.longest;
        state.deadline
    }

    fn lock(&self) -> MutexGuard<'_, State<'g>> {
        devices::lock(&self.state)
    }

    /// The guest has stopped.
    pub(super) fn hold(&self, guest: PausedGuest<'g>) {
        self.lock().held = Held::Paused(guest);
        self.changed.notify_all();
    }

    /// When the guest has to run again, here or there.
    pub(super) fn deadline(&self) -> Instant {
        self.lock().deadline
    }

    /// The next part of the pause begins.
    pub(super) fn enter(&self, part: &str) {
        self.lock().part = (part.to_owned(), Instant::now());
    }

    /// Does something with the stopped guest that is short, or keeps to the deadline itself.
    pub(super) fn with<T>(
        &self,
        work: impl FnOnce(&mut PausedGuest<'g>) -> T,
    ) -> Result<T, Overran> {
        let mut state = self.lock();
        match &mut state.held {
            Held::Paused(guest) => Ok(work(guest)),
            _ => Err(state.overran()),
        }
    }

    /// Takes the stopped guest out: from here on the deadline does nothing.
    pub(super) fn take(&self) -> Result<PausedGuest<'g>, Overran> {
        let mut state = self.lock();
        match std::mem::replace(&mut state.held, Held::Taken) {
            Held::Paused(guest) => {
                self.changed.notify_all();
                Ok(guest)
            }
            other => {
                state.held = other;
                Err(state.overran())
            }
        }
    }

    /// Resumes the guest now, unless that was done at the deadline; says how it went.
    pub(super) fn resume(&self) -> Result<(), GuestError> {
        match self.take() {
            Ok(guest) => guest.resume(),
            Err(Overran { not_resumed: Some(error), .. }) => Err(error),
            Err(_) => Ok(()),
        }
    }

    /// Runs on a thread of its own until the guest is taken or the deadline has passed.
    pub(super) fn watch(&self) {
        let mut state = self.lock();
        while !state.done {
            match state.held {
                Held::Taken | Held::Resumed(_) => return,
                Held::Running => {
                    let waited = self.changed.wait(state);
                    state = waited.unwrap_or_else(PoisonError::into_inner);
                }
                Held::Paused(_) => {
                    let left = state.deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        if let Held::Paused(guest) =
                            std::mem::replace(&mut state.held, Held::Resumed(None))
                        {
                            state.held = Held::Resumed(guest.resume().err());
                        }
                        return;
                    }
                    let waited = self.changed.wait_timeout(state, left);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }
}

impl State<'_> {
    fn overran(&mut self) -> Overran {
        let not_resumed = match &mut self.held {
            Held::Resumed(error) => error.take(),
            _ => None,
        };
        let (part, since) = &self.part;
        let took = since.elapsed();
        Overran { part: PartTime::not_ended(part.clone(), took), not_resumed }
    }
}

/// Ends the watching thread, on every way out. After a panic the clock is dropped next, and a stopped guest
/// that is dropped runs on.
pub(super) struct EndWatch<'c, 'g>(pub(super) &'c StopClock<'g>);

impl Drop for EndWatch<'_, '_> {
    fn drop(&mut self) {
        self.0.lock().done = true;
        self.0.changed.notify_all();
    }
}
