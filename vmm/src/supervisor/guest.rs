//! The migration threads' interface to the machine. They do slow work themselves, on the disks and images
//! that they hold; every other call is a message to the supervisor, the only owner of the machine, and
//! waits for its reply.
//!
//! [`leaving`] serves an outgoing migration, [`arriving`] an incoming one.

pub mod arriving;
pub mod leaving;

use super::messages::{Mailbox, Message};
use crate::boot::payload::BootPayload;
use crate::machine::Machine;
use crate::machine::drain::Drains;
use devices::state::DeviceRecord;
use migration::guest::{GuestError, RunPermit, Stopped};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

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

/// Sends a request to the supervisor and waits for the reply.
fn ask<T>(
    mailbox: &Mailbox,
    request: impl FnOnce(Reply<T>) -> GuestRequest,
) -> Result<T, GuestError> {
    let (reply, answer) = channel();
    mailbox.post(Message::Guest(request(reply)));
    answer.recv().map_err(|_| shutting_down())?
}

fn shutting_down() -> GuestError {
    GuestError::new("the virtual machine is shutting down")
}
