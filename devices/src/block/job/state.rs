//! The states of a job, which lead to which, and what a user may ask for in each: QEMU's `JobStatus` and `JobVerb`
//! (qapi/job.json).

/// QEMU's `JobStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobStatus {
    Created,
    Running,
    /// Rests before it is ready.
    Paused,
    /// The copy is in sync, and kept so.
    Ready,
    /// Rests when it was ready.
    Standby,
    /// Its work is done; others of its transaction may not be.
    Waiting,
    /// It can be finalized.
    Pending,
    Aborting,
    /// Nothing of it runs any more.
    Concluded,
    /// It is gone.
    Null,
}

/// QEMU's `JobVerb`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Cancel,
    Pause,
    Resume,
    SetSpeed,
    Complete,
    Finalize,
    Dismiss,
    Change,
}

impl JobStatus {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether a user may ask for `verb`.
    pub(super) fn accepts(self, verb: Verb) -> bool {
        use JobStatus::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        let works = matches!(self, Created | Running | Paused | Ready | Standby);
        match verb {
            Verb::Cancel => works || matches!(self, Waiting | Pending),
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => works,
            Verb::Complete => self == Ready,
            Verb::Finalize => self == Pending,
            Verb::Dismiss => self == Concluded,
        }
    }

    /// Whether `next` may follow.
    pub(super) fn leads_to(self, next: Self) -> bool {
        use JobStatus::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
        };
        match self {
            Created => matches!(next, Running | Aborting),
            Running => matches!(next, Paused | Ready | Waiting | Aborting),
            Paused => matches!(next, Running | Aborting),
            Ready => matches!(next, Standby | Waiting | Aborting),
            Standby => matches!(next, Ready | Aborting),
            Waiting => matches!(next, Pending | Aborting),
            Pending => matches!(next, Concluded | Aborting),
            Aborting => next == Concluded,
            Concluded => next == Null,
            Null => false,
        }
    }
}

impl Verb {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
            Self::Change => "change",
        }
    }
}
