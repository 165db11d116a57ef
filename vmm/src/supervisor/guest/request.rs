//! What a migration thread asks of the supervisor.

use crate::boot::payload::BootPayload;
use crate::machine::Machine;
use crate::machine::drain::Drains;
use devices::state::DeviceRecord;
use migration::guest::{GuestError, RunPermit, Stopped};
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// The supervisor's reply. Dropped without one if the process is about to end.
pub type Reply<T> = Sender<Result<T, GuestError>>;

/// Requests of a migration thread to the supervisor. All are quick.
pub enum GuestRequest {
    /// Source: stop vCPUs and start no new device requests. The migration thread waits for those in flight,
    /// then sends one of the next two.
    BeginPause(Reply<Drains>),
    /// Source: no request is in flight, so the guest is paused.
    FinishPause(Reply<Stopped>),
    /// Source: requests are still in flight, so resume the guest.
    CallOffPause(Reply<()>),
    /// Source: save all records.
    SaveRecords(Reply<Vec<DeviceRecord>>),
    /// Source: undo the pause. The disks are locked again, or the text says why not.
    Resume(Stopped, Result<(), String>, Reply<()>),
    /// Source: set the CPU throttle.
    Throttle(u8, Reply<()>),
    /// Source: the permit is spent.
    Surrendered(Reply<()>),
    /// Destination: run this on a thread with the vCPUs' priority, because vCPU threads inherit it.
    Build(Box<dyn FnOnce() + Send>),
    /// Destination: take over the machine that was built.
    Install(Box<Machine>, Reply<()>),
    /// Destination: load all records.
    LoadRecords(Vec<DeviceRecord>, Reply<()>),
    /// Destination: run, or stay paused. Carries the boot payload, if that was received.
    Run(RunPermit, bool, Option<Arc<BootPayload>>, Reply<()>),
    /// Destination: the migration failed, return the machine.
    Uninstall(Reply<Option<Box<Machine>>>),
}
