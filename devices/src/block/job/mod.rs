//! Long work on disks that a user starts, watches and steers: QEMU's block jobs. [`Job`] is what all have in common:
//! states, speed, pause, errors, the way they end. [`mirror`] and [`backup`] are two.
//!
//! ```text
//!  created ─▶ running ◀──▶ paused      waiting ─▶ pending ─▶ concluded ─▶ null
//!                │                        ▲                      ▲
//!                ▼                        │                      │
//!              ready ◀──▶ standby ────────┘   any ─▶ aborting ───┘
//! ```
//! A job has a thread of its own, which does the work and makes the transitions; a user's command only notes what is
//! wanted and wakes it. What happens is told as [`JobEvent`]s, in order, by the thread or by who starts it.

pub mod backup;
pub mod mirror;
mod rate;
mod state;
mod work;

use crate::block::copy::Side;
use crate::block::failure::OnError;
use crate::lock;
pub use rate::Rate;
pub use state::{JobStatus, Verb};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
pub use work::{Finished, Work};

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobKind {
    /// Keeps a copy of a disk up to date.
    Mirror,
    /// Saves a disk as it was when the job began.
    Backup,
}

impl JobKind {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mirror => "mirror",
            Self::Backup => "backup",
        }
    }
}

/// Whether a mirrored write waits for the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CopyMode {
    /// No: it is copied later.
    #[default]
    Background,
    /// Yes: once in sync, the copy stays so.
    WriteBlocking,
}

/// Whether the copied or written disk fails for lack of space, or otherwise, since it was last resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoStatus {
    #[default]
    Ok,
    Failed,
    NoSpace,
}

impl IoStatus {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}

/// How a job is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobOptions {
    /// Its id.
    pub id: String,
    /// Most bytes per second; 0 for no limit.
    pub speed: u64,
    /// Whether it finishes without being told.
    pub auto_finalize: bool,
    /// Whether it disappears when it has ended.
    pub auto_dismiss: bool,
    /// What to do about an error of the copied disk.
    pub on_source_error: OnError,
    /// What to do about an error of the copy.
    pub on_target_error: OnError,
}

/// A job to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewJob {
    pub kind: JobKind,
    pub options: JobOptions,
    /// The disk that it works on.
    pub device: String,
    /// The name of the node that it writes to.
    pub target: Option<String>,
    /// Of a mirror.
    pub copy_mode: CopyMode,
}

/// What a user sees of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobInfo {
    pub id: String,
    pub kind: JobKind,
    pub status: JobStatus,
    /// Bytes to do in all, which grow when the guest writes.
    pub len_bytes: u64,
    /// Bytes done.
    pub offset_bytes: u64,
    /// Whether it works at the moment.
    pub busy: bool,
    /// Whether it is paused, or told to.
    pub paused: bool,
    /// Whether the copy is in sync.
    pub ready: bool,
    pub speed: u64,
    pub io_status: IoStatus,
    pub auto_finalize: bool,
    pub auto_dismiss: bool,
    /// Why it has failed.
    pub error: Option<String>,
    /// Whether every write waits for the copy, and that is in sync. `None` for other jobs than mirrors.
    pub actively_synced: Option<bool>,
}

/// What happens to a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobEvent {
    /// Its status has changed.
    Status { id: String, status: JobStatus },
    /// The copy is in sync.
    Ready(JobInfo),
    /// It waits for [`Job::finalize`].
    Pending(JobInfo),
    /// It has ended by itself, or failed.
    Completed(JobInfo),
    /// It was cancelled.
    Cancelled(JobInfo),
    /// An access has failed.
    Error { id: String, side: Side, action: &'static str },
}

/// Why a command to a job is refused. QEMU's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    #[error("Job '{id}' in state '{}' cannot accept command verb '{}'", .status.name(), .verb.name())]
    Verb { id: String, status: JobStatus, verb: Verb },
    #[error("Job is already paused")]
    AlreadyPaused,
    #[error("Can't resume a job that was not paused")]
    NotPaused,
    #[error("The active block job '{id}' cannot be completed")]
    NotReady { id: String },
    #[error("Job '{id}' of type {} cannot change its copy mode", .kind.name())]
    NoCopyMode { id: String, kind: JobKind },
    #[error("Change to copy mode 'background' is not implemented")]
    NotBackground,
}

/// What a user has asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Wanted {
    paused: bool,
    complete: bool,
    cancel: Option<Cancel>,
    finalize: bool,
    /// How often the copy was asked to be durable.
    syncs: u64,
}

/// How a job is cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancel {
    /// A copy in sync stays a consistent copy.
    Soft,
    /// At once.
    Force,
}

struct State {
    info: JobInfo,
    wanted: Wanted,
    copy_mode: CopyMode,
    /// An error has paused it.
    stopped: bool,
    /// The latest of [`Wanted::syncs`] that is done.
    synced: u64,
}

/// Wakes a job's thread.
type Wake = Box<dyn Fn() + Send + Sync>;
type Tell = Box<dyn Fn(JobEvent) + Send + Sync>;

/// One job, as its owner and its thread share it.
pub struct Job {
    options: JobOptions,
    /// The disk that it works on.
    device: String,
    /// The node that it writes to.
    target: Option<String>,
    /// The device has the target's storage now.
    switched: AtomicBool,
    state: Mutex<State>,
    /// Something is wanted, or the state has changed.
    changed: Condvar,
    wake: Mutex<Option<Wake>>,
    tell: Tell,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("id", &self.options.id).finish_non_exhaustive()
    }
}

impl Job {
    /// Starts a job, and tells `first` that it runs; `tell` hears of what happens after that, on
    /// other threads.
    ///
    /// # Errors
    /// If there is no thread for it: nothing has happened then.
    pub fn start(
        new: NewJob,
        first: &mut dyn FnMut(JobEvent),
        tell: impl Fn(JobEvent) + Send + Sync + 'static,
        mut work: impl Work + 'static,
    ) -> io::Result<Arc<Self>> {
        let NewJob { kind, options, device, target, copy_mode } = new;
        let info = JobInfo {
            id: options.id.clone(),
            kind,
            status: JobStatus::Created,
            len_bytes: 0,
            offset_bytes: 0,
            busy: true,
            paused: false,
            ready: false,
            speed: options.speed,
            io_status: IoStatus::Ok,
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            error: None,
            actively_synced: (kind == JobKind::Mirror).then_some(false),
        };
        let wanted = Wanted::default();
        let state = State { info, wanted, copy_mode, stopped: false, synced: 0 };
        let job = Arc::new(Self {
            options,
            device,
            target,
            switched: AtomicBool::new(false),
            state: Mutex::new(state),
            changed: Condvar::new(),
            wake: Mutex::default(),
            tell: Box::new(tell),
        });
        // It begins when that it runs has been told, whatever the scheduler does.
        let (go, begin) = std::sync::mpsc::channel();
        let on_thread = job.clone();
        std::thread::Builder::new()
            .name(format!("{}-{}", kind.name(), job.options.id).replace('\0', ""))
            .stack_size(256 << 10)
            .spawn(move || {
                if begin.recv().is_ok() {
                    on_thread.run(&mut work);
                }
            })?;
        lock(&job.state).info.status = JobStatus::Running;
        for status in [JobStatus::Created, JobStatus::Running] {
            first(JobEvent::Status { id: job.id().to_owned(), status });
        }
        let _ = go.send(());
        Ok(job)
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.options.id
    }

    /// The disk that it works on.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The name of the node that it writes to.
    pub fn target(&self) -> Option<&str> {
        self.target.as_deref()
    }

    /// Whether the device has the target's storage now.
    pub fn has_switched(&self) -> bool {
        self.switched.load(Ordering::SeqCst)
    }

    /// Whether a user has told it to complete.
    pub fn is_told_to_complete(&self) -> bool {
        lock(&self.state).wanted.complete
    }

    /// Whether nothing of it runs any more.
    pub fn has_ended(&self) -> bool {
        matches!(lock(&self.state).info.status, JobStatus::Concluded | JobStatus::Null)
    }

    /// What a user sees of it.
    pub fn info(&self) -> JobInfo {
        lock(&self.state).info.clone()
    }

    /// Whether nothing of it is left to see.
    pub fn is_gone(&self) -> bool {
        lock(&self.state).info.status == JobStatus::Null
    }

    fn check(&self, state: &State, verb: Verb) -> Result<(), JobError> {
        let status = state.info.status;
        if status.accepts(verb) {
            return Ok(());
        }
        Err(JobError::Verb { id: self.id().to_owned(), status, verb })
    }

    /// Notes what a user wants and wakes the thread.
    fn want(
        &self,
        verb: Verb,
        note: impl FnOnce(&mut State) -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        let mut state = lock(&self.state);
        self.check(&state, verb)?;
        note(&mut state)?;
        self.changed.notify_all();
        drop(state);
        self.wake_up();
        Ok(())
    }

    fn wake_up(&self) {
        if let Some(wake) = &*lock(&self.wake) {
            wake();
        }
    }

    /// `set-speed`
    pub fn set_speed(&self, bytes_per_sec: u64) -> Result<(), JobError> {
        self.want(Verb::SetSpeed, |state| {
            state.info.speed = bytes_per_sec;
            Ok(())
        })
    }

    /// `pause`
    pub fn pause(&self) -> Result<(), JobError> {
        self.want(Verb::Pause, |state| {
            if std::mem::replace(&mut state.wanted.paused, true) {
                return Err(JobError::AlreadyPaused);
            }
            state.info.paused = true;
            Ok(())
        })
    }

    /// `resume`; also after an error has paused it.
    pub fn resume(&self) -> Result<(), JobError> {
        self.want(Verb::Resume, |state| {
            if !state.wanted.paused && !state.stopped {
                return Err(JobError::NotPaused);
            }
            (state.wanted.paused, state.stopped, state.info.paused) = (false, false, false);
            state.info.io_status = IoStatus::Ok;
            Ok(())
        })
    }

    /// `cancel`. One that is told to complete, and then is cancelled by force, does not complete.
    pub fn cancel(&self, how: Cancel) -> Result<(), JobError> {
        self.want(Verb::Cancel, |state| {
            if state.wanted.cancel != Some(Cancel::Force) {
                state.wanted.cancel = Some(how);
            }
            Ok(())
        })
    }

    /// `complete`
    pub fn complete(&self) -> Result<(), JobError> {
        self.want(Verb::Complete, |state| {
            if !state.info.ready {
                return Err(JobError::NotReady { id: self.id().to_owned() });
            }
            state.wanted.complete = true;
            Ok(())
        })
    }

    /// Waits until the copy has all that was written before this call, on stable storage. False if it has not by
    /// `deadline`, is not in sync or has ended.
    pub fn sync_by(&self, deadline: Instant) -> bool {
        let number = {
            let mut state = lock(&self.state);
            state.wanted.syncs += 1;
            self.changed.notify_all();
            state.wanted.syncs
        };
        self.wake_up();
        let state = lock(&self.state);
        let left = deadline.saturating_duration_since(Instant::now());
        let waits = |state: &mut State| {
            let works = matches!(state.info.status, JobStatus::Ready | JobStatus::Standby);
            state.synced < number && state.info.ready && works
        };
        let waited = self.changed.wait_timeout_while(state, left, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0.synced >= number
    }

    /// `finalize`
    pub fn finalize(&self) -> Result<(), JobError> {
        self.want(Verb::Finalize, |state| {
            state.wanted.finalize = true;
            Ok(())
        })
    }

    /// `dismiss`: what has ended is not shown any more.
    pub fn dismiss(&self) -> Result<(), JobError> {
        self.check(&lock(&self.state), Verb::Dismiss)?;
        self.become_status(JobStatus::Null);
        Ok(())
    }

    /// `block-job-change` of a mirror. QEMU 9 knows one direction, and so do we.
    pub fn set_copy_mode(&self, mode: CopyMode) -> Result<(), JobError> {
        let kind = lock(&self.state).info.kind;
        if kind != JobKind::Mirror {
            return Err(JobError::NoCopyMode { id: self.id().to_owned(), kind });
        }
        self.want(Verb::Change, |state| match (state.copy_mode, mode) {
            (CopyMode::WriteBlocking, CopyMode::Background) => Err(JobError::NotBackground),
            (_, mode) => {
                state.copy_mode = mode;
                Ok(())
            }
        })
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        change(&mut state);
        self.changed.notify_all();
    }

    fn become_status(&self, status: JobStatus) {
        let changed = {
            let mut state = lock(&self.state);
            let old = std::mem::replace(&mut state.info.status, status);
            debug_assert!(old == status || old.leads_to(status), "{old:?} -> {status:?}");
            self.changed.notify_all();
            old != status
        };
        if changed {
            (self.tell)(JobEvent::Status { id: self.id().to_owned(), status });
        }
    }

    /// Waits until its status is one of those that `wanted` accepts, for tests and for who waits for its end.
    pub fn wait_until(&self, timeout: Duration, wanted: impl Fn(&JobInfo) -> bool) -> bool {
        let state = lock(&self.state);
        let waited = self.changed.wait_timeout_while(state, timeout, |state| !wanted(&state.info));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
