//! What other threads tell the supervisor.

use super::MachineId;
use super::guest::GuestRequest;
use super::jobs::JobId;
use super::tasks::{Done, TaskId};
use crate::console::ConsoleEvent;
use crate::event_loop;
use crate::machine::vcpus::VcpuEnd;
use devices::block::failure::Failure;
use devices::reset::GuestExit;
use migration::source::{MigrationEvent, SourceOutcome};

/// Where they post it.
pub type Mailbox = event_loop::Mailbox<Message>;

/// What other threads tell the supervisor.
pub enum Message {
    /// The guest reset, powered off or wrote the debug-exit port.
    GuestExit(MachineId, GuestExit),
    /// A vCPU cannot go on.
    VcpuEnd(MachineId, VcpuEnd),
    /// Serial output matched, or the user pressed Ctrl-A x.
    Console(ConsoleEvent),
    /// A request of the guest's to a disk has failed.
    DiskFailed(Failure),
    /// A migration thread needs the guest.
    Guest(GuestRequest),
    /// A task has ended.
    TaskEnded(TaskId, Done),
    /// A migration has come further.
    Migration(MigrationEvent),
    /// The outgoing migration has ended.
    OutgoingEnded(JobId, SourceOutcome),
    /// The incoming migration has ended; the text says why it failed.
    IncomingEnded(JobId, Result<(), String>),
}
