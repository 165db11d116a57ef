//! Run states, with QEMU's names, and the legal transitions.
//!
//! ```text
//! prelaunch ─▶ running ⇄ paused            inmigrate ─▶ running | paused
//!                │  ▲       │  ▲
//!                ▼  │       ▼  │
//!             finish-migrate ──┘─▶ postmigrate ─▶ running (declined, or claimed by an operator)
//! any ─▶ shutdown | internal-error | io-error
//! ```

use serde::Serialize;

/// The machine's run state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Built, not yet started.
    Prelaunch,
    /// vCPUs run.
    Running,
    /// Stopped by the user.
    Paused,
    /// A guest is arriving.
    Inmigrate,
    /// Stopped for the last stage of a migration.
    FinishMigrate,
    /// The guest has been migrated, or may have been.
    Postmigrate,
    /// The guest powered off.
    Shutdown,
    /// The guest crashed or KVM cannot continue.
    InternalError,
    /// Stopped by a disk error, or because disks cannot be locked.
    IoError,
}

impl RunState {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Inmigrate => "inmigrate",
            Self::FinishMigrate => "finish-migrate",
            Self::Postmigrate => "postmigrate",
            Self::Shutdown => "shutdown",
            Self::InternalError => "internal-error",
            Self::IoError => "io-error",
        }
    }

    /// Whether the machine may go from `self` to `next`.
    pub fn may_become(self, next: Self) -> bool {
        use RunState::*;
        match next {
            Shutdown | InternalError => true,
            Prelaunch | Inmigrate => false,
            Running => {
                matches!(
                    self,
                    Prelaunch | Paused | Inmigrate | FinishMigrate | Postmigrate | IoError
                )
            }
            Paused => matches!(self, Prelaunch | Running | Inmigrate | FinishMigrate | Postmigrate),
            FinishMigrate => matches!(self, Running | Paused),
            Postmigrate => matches!(self, FinishMigrate),
            IoError => matches!(self, Running | Paused | FinishMigrate | Postmigrate),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::RunState::*;

    #[test]
    fn a_guest_that_left_does_not_arrive_again() {
        assert!(!Postmigrate.may_become(Inmigrate));
        assert!(!Postmigrate.may_become(FinishMigrate));
        assert!(Postmigrate.may_become(Running), "declined, or claimed by an operator");
    }

    #[test]
    fn nothing_runs_again_after_the_end() {
        assert!(!Shutdown.may_become(Running));
        assert!(!InternalError.may_become(Paused));
    }
}
