//! What a machine is connected to: the console, its disks, and the mailbox that hears of their events.

use super::messages::{Mailbox, Message};
use crate::machine::{Backends, GuestEvents};
use devices::block::BlockNode;
use devices::transmitter::Transmitter;
use std::sync::Arc;

/// A machine's backends without its disks.
pub struct BackendParts {
    pub(super) serial_output: Arc<Transmitter>,
    pub(super) events: GuestEvents,
    pub(super) mailbox: Mailbox,
}

impl BackendParts {
    /// Adds the disks and subscribes to their failures.
    pub(super) fn with(self, disks: Vec<Arc<BlockNode>>) -> Backends {
        for disk in &disks {
            let to_us = self.mailbox.clone();
            disk.on_failure(move |failure| to_us.post(Message::DiskFailed(failure)));
        }
        Backends { disks, serial_output: self.serial_output, events: self.events }
    }
}
