//! Messages from other threads to the supervisor.

use super::guest::request::GuestRequest;
use super::tasks::{Done, TaskId};
use crate::console::ConsoleEvent;
use crate::event_loop;
use crate::machine::vcpus::VcpuEnd;
use devices::block::failure::Failure;
use devices::block::job::JobEvent;
use devices::reset::GuestExit;
use migration::source::{MigrationEvent, SourceOutcome};

/// Identifies a machine; each reset creates a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineId(pub(super) u64);

/// Identifies one of this process's migrations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JobId(pub(super) u64);

/// The supervisor's mailbox.
pub type Mailbox = event_loop::Mailbox<Message>;

/// Messages from other threads to the supervisor.
pub enum Message {
    /// The guest reset, powered off, wrote the debug-exit port or has panicked.
    GuestExit(MachineId, GuestExit),
    /// The guest has crashed and goes on, in a kernel for such a case.
    CrashLoaded(MachineId),
    /// A vCPU cannot continue.
    VcpuEnd(MachineId, VcpuEnd),
    /// Serial output matched, or the user pressed Ctrl-A x.
    Console(ConsoleEvent),
    /// A disk request of the guest has failed.
    DiskFailed(Failure),
    /// The last client of this export, which has been removed, is gone.
    ExportDeleted(String),
    /// A request of a migration thread.
    Guest(GuestRequest),
    /// A task has ended.
    TaskEnded(TaskId, Done),
    /// Progress of a migration.
    Migration(MigrationEvent),
    /// Something has happened to a block job.
    BlockJob(JobEvent),
    /// The outgoing migration has ended.
    OutgoingEnded(JobId, SourceOutcome),
    /// The thread of a migration panicked.
    MigrationPanicked(JobId),
    /// The incoming migration has ended; the text says why it failed.
    IncomingEnded(JobId, Result<(), String>),
}
