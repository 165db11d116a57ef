//! How other threads reach the supervisor: a channel, and an eventfd that wakes its event loop.

use super::guest::GuestRequest;
use super::jobs::JobId;
use crate::console::ConsoleEvent;
use crate::machine::vcpus::VcpuEnd;
use devices::reset::GuestExit;
use migration::source::{MigrationEvent, SourceOutcome};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What other threads tell the supervisor.
pub enum Message {
    /// The guest reset, powered off or wrote the debug-exit port.
    GuestExit(GuestExit),
    /// A vCPU cannot go on.
    VcpuEnd(VcpuEnd),
    /// Serial output matched, or the user pressed Ctrl-A x.
    Console(ConsoleEvent),
    /// A migration thread needs the guest.
    Guest(GuestRequest),
    /// A migration has come further.
    Migration(MigrationEvent),
    /// The outgoing migration has ended.
    OutgoingEnded(JobId, SourceOutcome),
    /// The incoming migration has ended; the text says why it failed.
    IncomingEnded(JobId, Result<(), String>),
}

/// The sending half; cheap to clone.
#[derive(Clone)]
pub struct Mailbox {
    sender: Sender<Message>,
    wake: Arc<EventFd>,
}

impl Mailbox {
    /// A mailbox and where its messages come out.
    pub fn new() -> io::Result<(Self, Receiver<Message>, Arc<EventFd>)> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (sender, receiver) = channel();
        Ok((Self { sender, wake: wake.clone() }, receiver, wake))
    }

    /// Posts a message. A supervisor that has gone needs none.
    pub fn post(&self, message: Message) {
        if self.sender.send(message).is_ok() {
            // Fails only when the counter is full, and then the supervisor is awake anyway.
            let _ = self.wake.write(1);
        }
    }
}
