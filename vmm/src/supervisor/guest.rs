//! The machine as migration threads see it. What takes time they do themselves, on the disks and images
//! that they hold; for the rest each call becomes a message to the supervisor, which alone touches the
//! machine, and waits for its answer.
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

/// How the supervisor answers. If it drops this without an answer the process is about to end.
pub type Reply<T> = Sender<Result<T, GuestError>>;

/// What a migration thread asks of the supervisor. Nothing of it takes long.
pub enum GuestRequest {
    /// Source: stop vCPUs and have devices begin no request. The migration's thread waits for those in
    /// flight, and asks for one of the next two.
    BeginPause(Reply<Drains>),
    /// Source: no request is in flight, so the guest is paused.
    FinishPause(Reply<Stopped>),
    /// Source: requests are in flight still, so the guest runs on.
    CallOffPause(Reply<()>),
    /// Source: all records.
    SaveRecords(Reply<Vec<DeviceRecord>>),
    /// Source: undo the pause. The disks' locks have been retaken, or the text says why not.
    Resume(Stopped, Result<(), String>, Reply<()>),
    /// Source: slow the guest down, or let it go.
    Throttle(u8, Reply<()>),
    /// Source: the permit is spent.
    Surrendered(Reply<()>),
    /// Destination: have this done on a thread that is as important as the vCPUs that it starts.
    Build(Box<dyn FnOnce() + Send>),
    /// Destination: take the machine that has been built.
    Install(Box<Machine>, Reply<()>),
    /// Destination: load all records.
    LoadRecords(Vec<DeviceRecord>, Reply<()>),
    /// Destination: run, or stay paused; what the guest boots from when it is reset, if that has arrived.
    Run(RunPermit, bool, Option<Arc<BootPayload>>, Reply<()>),
    /// Destination: the migration failed, give the machine back.
    Uninstall(Reply<Option<Box<Machine>>>),
}

/// Asks the supervisor, and waits for its answer.
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
