//! The inner side of a job: what its work uses of it, and how its thread takes it through its states. [`super`] is the
//! side that a user steers.

use super::{Cancel, CopyMode, IoStatus, Job, JobEvent, JobStatus, State, chain};
use crate::block::copy::{CopyError, Side};
use crate::block::failure::OnError;
use crate::lock;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

/// What a job does on its thread.
pub trait Work: Send {
    /// Works until it is finished, cancelled or fails. Returns once nothing of it is in flight, unless a disk hangs.
    fn run(&mut self, job: &Arc<Job>) -> Result<Finished, CopyError>;
    /// It has finished and been told to finalize: makes the result permanent.
    fn commit(&mut self, job: &Arc<Job>) -> Result<(), String>;
    /// It has finished, but was cancelled instead of told to finalize: gives up the result.
    fn abort(&mut self, job: &Arc<Job>);
}

/// How a job's work has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finished {
    /// It is to be committed.
    Done,
    /// It was cancelled when its result was whole, which stays.
    Left,
    /// It was cancelled.
    Cancelled,
}

/// What a job's work uses of it.
impl Job {
    /// Calls `wake` when a user wants something.
    pub(in crate::block) fn on_wake(&self, wake: impl Fn() + Send + Sync + 'static) {
        *lock(&self.wake) = Some(Box::new(wake));
    }

    /// How it is cancelled, if it is.
    pub(in crate::block) fn cancelled(&self) -> Option<Cancel> {
        lock(&self.state).wanted.cancel
    }

    /// Most bytes per second.
    pub(in crate::block) fn speed(&self) -> u64 {
        lock(&self.state).info.speed
    }

    pub(in crate::block) fn copy_mode(&self) -> CopyMode {
        lock(&self.state).copy_mode
    }

    /// Shows progress.
    pub(in crate::block) fn show_progress(&self, offset_bytes: u64, remaining_bytes: u64) {
        self.update(|state| {
            state.info.offset_bytes = offset_bytes;
            state.info.len_bytes = offset_bytes + remaining_bytes;
        });
    }

    /// Shows whether it works at the moment.
    pub(in crate::block) fn show_busy(&self, busy: bool) {
        self.update(|state| state.info.busy = busy);
    }

    /// Whether it is to rest. Its status says so once nothing is `in_flight`: what fails late would otherwise pause it
    /// again after it was resumed.
    pub(in crate::block) fn must_rest(&self, in_flight: usize) -> bool {
        let (rests, status) = {
            let state = lock(&self.state);
            let cancelled = state.wanted.cancel.is_some();
            ((state.wanted.paused || state.stopped) && !cancelled, state.info.status)
        };
        match (rests, status) {
            (true, JobStatus::Running) if in_flight == 0 => self.become_status(JobStatus::Paused),
            (true, JobStatus::Ready) if in_flight == 0 => self.become_status(JobStatus::Standby),
            (false, JobStatus::Paused) => self.become_status(JobStatus::Running),
            (false, JobStatus::Standby) => self.become_status(JobStatus::Ready),
            _ => {}
        }
        rests
    }

    /// The copy is in sync: tells it the first time.
    pub(in crate::block) fn become_ready(&self) {
        let first = {
            let mut state = lock(&self.state);
            state.info.ready = true;
            self.changed.notify_all();
            state.info.status == JobStatus::Running
        };
        if first {
            self.become_status(JobStatus::Ready);
            (self.tell)(JobEvent::Ready(self.info()));
        }
    }

    /// The number of the last request that the copy be durable, unless that is done.
    pub(in crate::block) fn wanted_sync(&self) -> Option<u64> {
        let state = lock(&self.state);
        (state.wanted.syncs > state.synced).then_some(state.wanted.syncs)
    }

    /// The copy has all that was written before request `number`.
    pub(in crate::block) fn note_sync(&self, number: u64) {
        self.update(|state| state.synced = number);
    }

    /// The copy is not in sync any more.
    pub(in crate::block) fn lose_sync(&self) {
        self.update(|state| {
            state.info.ready = false;
            if let Some(synced) = &mut state.info.actively_synced {
                *synced = false;
            }
        });
    }

    /// Every write waits for the copy, which is in sync.
    pub(in crate::block) fn become_actively_synced(&self) {
        self.update(|state| state.info.actively_synced = Some(true));
    }

    /// Whether an error has paused it.
    pub(in crate::block) fn is_stopped(&self) -> bool {
        lock(&self.state).stopped
    }

    /// Tells a failed access after which the job cannot go on, whatever its policy is.
    pub(in crate::block) fn report(&self, error: &CopyError) {
        let (id, side) = (self.id().to_owned(), error.side());
        (self.tell)(JobEvent::Error { id, side, action: "report" });
    }

    /// Decides about a failed access, and tells it. Returns whether the job goes on; it may be paused then.
    pub(in crate::block) fn goes_on_after(&self, error: &CopyError) -> bool {
        let (side, no_space) = (error.side(), error.is_no_space());
        let policy = match side {
            Side::Source => self.options.on_source_error,
            Side::Target => self.options.on_target_error,
        };
        let panicked = matches!(error, CopyError::Panicked { .. });
        // A job that ends waits for no repair.
        let ends = self.cancelled().is_some();
        let action = match policy {
            _ if panicked || ends => "report",
            OnError::Ignore => "ignore",
            OnError::Stop => "stop",
            OnError::Enospc if no_space => "stop",
            OnError::Report | OnError::Enospc => "report",
        };
        if action == "stop" {
            self.update(|state| {
                (state.stopped, state.info.paused) = (true, true);
                // The first one counts, until it is resumed.
                if state.info.io_status == IoStatus::Ok {
                    let status = if no_space { IoStatus::NoSpace } else { IoStatus::Failed };
                    state.info.io_status = status;
                }
            });
        }
        (self.tell)(JobEvent::Error { id: self.id().to_owned(), side, action });
        action != "report"
    }

    /// The device has the target's storage.
    pub(in crate::block) fn note_switch(&self) {
        self.switched.store(true, Ordering::SeqCst);
    }

    /// Waits until something is wanted of it, at most for `time`.
    pub(in crate::block) fn rest(&self, time: Duration) {
        let state = lock(&self.state);
        let wanted = state.wanted;
        let same = |state: &mut State| state.wanted == wanted;
        let waited = self.changed.wait_timeout_while(state, time, same);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Body of its thread.
    pub(super) fn run(self: &Arc<Self>, work: &mut impl Work) {
        let ran = catch_unwind(AssertUnwindSafe(|| work.run(self)));
        let panicked = || "its thread has panicked, which is a bug".to_owned();
        let ended = match ran {
            Ok(Ok(finished)) => Ok(finished),
            Ok(Err(error)) => Err(chain(&error)),
            Err(_) => Err(panicked()),
        };
        let ended = ended.and_then(|finished| match finished {
            Finished::Cancelled => Ok(Finished::Cancelled),
            Finished::Left => {
                self.await_finalize(Some(Cancel::Soft));
                Ok(Finished::Left)
            }
            Finished::Done => {
                if self.await_finalize(None).is_some() {
                    let aborted = catch_unwind(AssertUnwindSafe(|| work.abort(self)));
                    return aborted.map(|()| Finished::Cancelled).map_err(|_| panicked());
                }
                let committed = catch_unwind(AssertUnwindSafe(|| work.commit(self)));
                committed.unwrap_or_else(|_| Err(panicked())).map(|()| Finished::Done)
            }
        });
        *lock(&self.wake) = None;
        self.update(|state| state.info.busy = false);
        match ended {
            Ok(Finished::Cancelled) => {
                self.become_status(JobStatus::Aborting);
                (self.tell)(JobEvent::Cancelled(self.info()));
            }
            Ok(_) => (self.tell)(JobEvent::Completed(self.info())),
            Err(error) => {
                self.update(|state| state.info.error = Some(error));
                self.become_status(JobStatus::Aborting);
                (self.tell)(JobEvent::Completed(self.info()));
            }
        }
        self.become_status(JobStatus::Concluded);
        if self.options.auto_dismiss {
            self.become_status(JobStatus::Null);
        }
    }

    /// Waits until it may be finalized, or is cancelled otherwise than it `was`; returns how it is cancelled, if it is.
    fn await_finalize(&self, was: Option<Cancel>) -> Option<Cancel> {
        self.become_status(JobStatus::Waiting);
        self.become_status(JobStatus::Pending);
        if !self.options.auto_finalize {
            (self.tell)(JobEvent::Pending(self.info()));
        }
        let mut state: MutexGuard<'_, State> = lock(&self.state);
        while !self.options.auto_finalize && !state.wanted.finalize && state.wanted.cancel == was {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.wanted.cancel
    }
}
