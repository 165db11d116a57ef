//! One deadline for the pause: when it passes, the guest runs on, whatever the driver is blocked in.
//!
//! During the pause a [`StopClock`] owns the stopped guest. The driver borrows it for short, bounded work; a
//! thread spawned before the pause resumes it at the deadline, even if the driver is blocked in a write. The
//! right to run is in one place at any time: the clock, the driver that took it for the handover, or,
//! after a resume, the guest.

use crate::control::Control;
use crate::error::chain;
use crate::guest::{GuestError, PartTime, PausedGuest};
use crate::priority;
use crate::wire::{Kind, WireError};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

enum Held<'g> {
    /// Not stopped yet.
    Running,
    Paused(PausedGuest<'g>),
    /// Resumed at the deadline; the error, if any, until it is taken.
    Resumed(Option<GuestError>),
    /// Taken by the driver.
    Taken,
}

struct State<'g> {
    held: Held<'g>,
    /// How long the guest may be stopped, and, once it is, until when.
    longest: Duration,
    deadline: Instant,
    /// The current part of the pause, and its start.
    part: (String, Instant),
    /// Ends the watching thread.
    done: bool,
    /// The end of the stream is on its way: the destination may take the disks' locks.
    ended: bool,
    /// The destination was told that the stop is called off.
    told: bool,
}

/// Holds the stopped guest until its deadline.
pub(super) struct StopClock<'g> {
    control: Control,
    state: Mutex<State<'g>>,
    changed: Condvar,
}

/// The deadline has passed, and the guest was resumed.
#[derive(Debug)]
pub(super) struct Overran {
    /// The part of the pause that was in progress.
    pub(super) part: PartTime,
    /// Why the guest does not run, if it does not.
    pub(super) not_resumed: Option<GuestError>,
}

impl<'g> StopClock<'g> {
    pub(super) fn new(longest: Duration, control: Control) -> Self {
        let (now, part) = (Instant::now(), String::new());
        let deadline = now + longest;
        let state = State {
            held: Held::Running,
            longest,
            deadline,
            part: (part, now),
            done: false,
            ended: false,
            told: false,
        };
        Self { control, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Starts the clock, just before the pause; returns the deadline.
    pub(super) fn start(&self) -> Instant {
        let mut state = self.lock();
        state.deadline = Instant::now() + state.longest;
        state.deadline
    }

    fn lock(&self) -> MutexGuard<'_, State<'g>> {
        devices::lock(&self.state)
    }

    /// Takes the stopped guest.
    pub(super) fn hold(&self, guest: PausedGuest<'g>) {
        let mut state = self.lock();
        state.held = Held::Paused(guest);
        // The watcher sleeps until the deadline anyway: waking it costs time in the pause.
        if state.deadline <= Instant::now() {
            self.changed.notify_all();
        }
    }

    /// When the guest has to run again, on either side.
    pub(super) fn deadline(&self) -> Instant {
        self.lock().deadline
    }

    /// Starts the next part of the pause. Fails if the deadline passed in the last one, which is then the
    /// one that took too long.
    pub(super) fn enter(&self, part: &str) -> Result<(), Overran> {
        let mut state = self.lock();
        if let Held::Resumed(_) = state.held {
            return Err(state.overran());
        }
        state.part = (part.to_owned(), Instant::now());
        Ok(())
    }

    /// Runs `work` on the stopped guest. `work` is short or observes the deadline itself.
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

    /// Sends the end of the stream, unless the deadline has passed. After it nothing more is sent before
    /// `Go`, so whoever resumes the guest can tell the destination that the stop is called off.
    pub(super) fn end_stream(&self, payload: &[u8]) -> Result<Result<(), WireError>, Overran> {
        let mut state = self.lock();
        if !matches!(state.held, Held::Paused(_)) {
            return Err(state.overran());
        }
        // In order with what a resume pushes; written without the lock.
        let pushed = self.control.push(Kind::Eof, payload);
        state.ended = true;
        drop(state);
        Ok(pushed.and_then(|()| self.control.flush_pushed()))
    }

    /// Whether the destination was told that the stop is called off.
    pub(super) fn has_told(&self) -> bool {
        self.lock().told
    }

    /// Takes the stopped guest out, if `allowed`; the deadline no longer applies then. `None` if it is not
    /// allowed. Not asked once the deadline has resumed the guest: a cancel is not lost to a stop that has
    /// already been called off.
    pub(super) fn take_if(
        &self,
        allowed: impl FnOnce() -> bool,
    ) -> Result<Option<PausedGuest<'g>>, Overran> {
        let mut state = self.lock();
        match std::mem::replace(&mut state.held, Held::Taken) {
            // The watcher is not woken: it ends with the attempt.
            Held::Paused(guest) if allowed() => Ok(Some(guest)),
            guest @ Held::Paused(_) => {
                state.held = guest;
                Ok(None)
            }
            other => {
                state.held = other;
                Err(state.overran())
            }
        }
    }

    /// Resumes the guest, unless the deadline did; returns the result either way.
    pub(super) fn resume(&self) -> Result<(), GuestError> {
        match self.take_if(|| true) {
            Ok(Some(guest)) => {
                self.lock().call_off(&self.control);
                guest.resume()
            }
            Err(Overran { not_resumed: Some(error), .. }) => Err(error),
            _ => Ok(()),
        }
    }

    /// Body of the watching thread: returns when the guest is taken or the deadline has passed.
    pub(super) fn watch(&self) {
        priority::be_on_time();
        let mut state = self.lock();
        while !state.done {
            let left = state.deadline.saturating_duration_since(Instant::now());
            match state.held {
                Held::Taken | Held::Resumed(_) => return,
                Held::Running | Held::Paused(_) if !left.is_zero() => {
                    let waited = self.changed.wait_timeout(state, left);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                // Not paused yet, which has a limit of its own.
                Held::Running => {
                    let waited = self.changed.wait(state);
                    state = waited.unwrap_or_else(PoisonError::into_inner);
                }
                Held::Paused(_) => {
                    state.call_off(&self.control);
                    if let Held::Paused(guest) =
                        std::mem::replace(&mut state.held, Held::Resumed(None))
                    {
                        state.held = Held::Resumed(guest.resume().err());
                    }
                    return;
                }
            }
        }
    }
}

impl State<'_> {
    /// Before the guest is resumed: the destination may hold the locks of its disks by now, and lets go of
    /// them when it hears this.
    fn call_off(&mut self, control: &Control) {
        if !self.ended || std::mem::replace(&mut self.told, true) {
            return;
        }
        if let Err(error) = control.try_send(Kind::CalledOff, &[]) {
            log::debug!("the destination does not hear of a stop called off: {}", chain(&error));
        }
    }

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

/// Ends the watching thread when dropped. After a panic the clock is dropped next, which resumes a stopped
/// guest.
pub(super) struct EndWatch<'c, 'g>(pub(super) &'c StopClock<'g>);

impl Drop for EndWatch<'_, '_> {
    fn drop(&mut self) {
        self.0.lock().done = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cancel::CancelToken;
    use crate::guest::{GuestControl, RunPermit, Stopped};
    use crate::transport::memory::MemoryLink;
    use devices::state::DeviceRecord;
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// A guest that takes its time to run again, until the test says so.
    struct SlowToResume {
        resuming: Sender<()>,
        resumed: Receiver<()>,
    }

    impl GuestControl for SlowToResume {
        fn flush_ahead(&mut self, _: Instant) -> Result<PartTime, GuestError> {
            unreachable!("it is not flushed")
        }

        fn pause(&mut self, _: Instant) -> Result<Stopped, GuestError> {
            let permit = RunPermit::cold_boot();
            Ok(Stopped { permit, was_running: true, drains: Vec::new() })
        }

        fn save_records(&mut self) -> Result<Vec<DeviceRecord>, GuestError> {
            unreachable!("it is not saved")
        }

        fn release_disks(&mut self, _: Instant) -> Result<PartTime, GuestError> {
            unreachable!("it has no disks")
        }

        fn resume(&mut self, _: Stopped) -> Result<(), GuestError> {
            self.resuming.send(()).unwrap();
            self.resumed.recv().unwrap();
            Ok(())
        }

        fn surrendered(&mut self) {
            unreachable!("it stays here")
        }

        fn throttle(&mut self, _: u8) -> Result<(), GuestError> {
            unreachable!("it is not throttled")
        }
    }

    fn control() -> (Control, crate::control::ControlThreads, impl Sized) {
        let (ours, theirs) = MemoryLink::new(None).connect();
        let (control, threads) = Control::start(Arc::new(ours), CancelToken::new()).unwrap();
        (control, threads, theirs)
    }

    #[test]
    fn a_cancel_while_the_deadline_resumes_the_guest_is_not_lost() {
        let (control, _threads, _peer) = control();
        let (tell_resuming, resuming) = channel();
        let (go_on, resumed) = channel();
        let mut guest = SlowToResume { resuming: tell_resuming, resumed };
        let clock = StopClock::new(Duration::ZERO, control);
        let cancel = CancelToken::new();
        std::thread::scope(|scope| {
            clock.hold(PausedGuest::pause(&mut guest, clock.start()).unwrap());
            scope.spawn(|| clock.watch());
            resuming.recv().unwrap();
            let (tell_taking, taking) = channel();
            let (clock, cancel) = (&clock, &cancel);
            let taker = scope.spawn(move || {
                tell_taking.send(()).unwrap();
                clock.take_if(|| cancel.disarm()).map(|guest| guest.is_some())
            });
            taking.recv().unwrap();
            // It waits for the guest by now, most likely.
            std::thread::park_timeout(Duration::from_millis(50));
            let cancelled = cancel.cancel();
            go_on.send(()).unwrap();
            assert!(taker.join().unwrap().is_err(), "the deadline took the guest");
            assert!(cancelled, "the cancel was lost");
        });
    }

    #[test]
    fn a_guest_that_may_not_be_taken_stays_stopped_until_it_is_resumed() {
        let (control, _threads, _peer) = control();
        let (tell_resuming, resuming) = channel();
        let (go_on, resumed) = channel();
        go_on.send(()).unwrap();
        let mut guest = SlowToResume { resuming: tell_resuming, resumed };
        let clock = StopClock::new(Duration::from_secs(60), control);
        clock.hold(PausedGuest::pause(&mut guest, clock.start()).unwrap());
        assert!(clock.take_if(|| false).unwrap().is_none());
        assert!(resuming.try_recv().is_err(), "still stopped");
        clock.resume().unwrap();
        resuming.try_recv().expect("it runs");
    }

    #[test]
    fn the_next_part_does_not_begin_once_the_guest_runs_again() {
        let (control, _threads, _peer) = control();
        let (tell_resuming, _resuming) = channel();
        let (go_on, resumed) = channel();
        go_on.send(()).unwrap();
        let mut guest = SlowToResume { resuming: tell_resuming, resumed };
        let clock = StopClock::new(Duration::ZERO, control);
        clock.enter("the first").unwrap();
        clock.hold(PausedGuest::pause(&mut guest, clock.start()).unwrap());
        clock.watch();
        let overran = clock.enter("the second").unwrap_err();
        assert_eq!(overran.part.part, "the first");
        let overran = clock.with(|_| ()).unwrap_err();
        assert_eq!(overran.part.part, "the first");
    }
}
