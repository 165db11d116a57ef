//! What a machine is connected to: the consoles, its disks, and the mailbox that hears of their events.

use super::messages::{Mailbox, Message};
use crate::machine::{Backends, GuestEvents};
use devices::block::BlockNode;
use devices::debug_console::DebugOutput;
use devices::transmitter::Transmitter;
use std::sync::Arc;

/// A machine's backends without its disks.
pub struct BackendParts {
    pub(super) serial_output: Arc<Transmitter>,
    pub(super) debug_output: DebugOutput,
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
        let Self { serial_output, debug_output, events, mailbox: _ } = self;
        Backends { disks, serial_output, debug_output, events }
    }
}
