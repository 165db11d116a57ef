//! The sending half of the control connection: unsent bytes, shared by all sending threads. A partly
//! written frame is completed by the next writer.
//!
//! Two locks: the queue's is never held across a call of the transport, so that nobody who only queues a
//! frame waits for a peer that does not read.

use crate::transport::Transport;
use crate::wire::{self, Kind};
use std::io;
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

/// Result of a write.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Everything up to the requested byte is out.
    Done,
    Wrote,
}

struct Queue {
    /// Whole frames that no writer has taken yet.
    waiting: Vec<u8>,
    /// Bytes ever pushed, and ever sent.
    pushed: u64,
    sent: u64,
    last_sent: Instant,
    /// Some of it must not wait for the next frame: whoever is writing writes once more.
    urgent: bool,
}

/// Taken from the queue and not yet sent: whole frames, except that the first may be partly written.
#[derive(Default)]
struct Writer(Vec<u8>);

pub(super) struct Outbox {
    queue: Mutex<Queue>,
    /// Locked for one call of the transport at a time.
    writer: Mutex<Writer>,
}

impl Default for Outbox {
    fn default() -> Self {
        let (waiting, last_sent) = (Vec::new(), Instant::now());
        let queue = Mutex::new(Queue { waiting, pushed: 0, sent: 0, last_sent, urgent: false });
        Self { queue, writer: Mutex::default() }
    }
}

impl Outbox {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        devices::lock(&self.queue)
    }

    /// Adds whole frames; returns the total number of bytes after which they are out.
    pub(super) fn push(&self, bytes: &[u8]) -> u64 {
        let mut queue = self.queue();
        queue.waiting.extend_from_slice(bytes);
        queue.pushed += bytes.len() as u64;
        queue.pushed
    }

    /// Bytes that were ever pushed.
    pub(super) fn pushed(&self) -> u64 {
        self.queue().pushed
    }

    /// Whether everything is out.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        let queue = self.queue();
        queue.sent == queue.pushed
    }

    /// Time since the last write.
    pub(super) fn quiet(&self) -> Duration {
        self.queue().last_sent.elapsed()
    }

    /// Makes one call of the transport, unless everything up to `number` is out; and another one if
    /// [`Outbox::try_write_some`] found this one in progress.
    pub(super) fn write_some(
        &self,
        transport: &dyn Transport,
        number: u64,
    ) -> io::Result<Progress> {
        let progress = self.write(&mut devices::lock(&self.writer), transport, number);
        self.write_urgent(transport);
        progress
    }

    /// The same, unless another thread is writing, which then writes what was pushed here.
    pub(super) fn try_write_some(&self, transport: &dyn Transport, number: u64) -> io::Result<()> {
        // Before the lock is tried: whoever holds it looks after releasing it.
        self.queue().urgent = true;
        let Some(mut writer) = self.try_writer() else { return Ok(()) };
        let written = self.write(&mut writer, transport, number).map(drop);
        drop(writer);
        self.write_urgent(transport);
        written
    }

    /// Writes what [`Outbox::try_write_some`] could not while this thread was writing.
    fn write_urgent(&self, transport: &dyn Transport) {
        while self.queue().urgent {
            // Whoever is writing by now looks in turn.
            let Some(mut writer) = self.try_writer() else { return };
            self.queue().urgent = false;
            let pushed = self.pushed();
            // If the connection is broken, the next writer meets that too.
            let _ = self.write(&mut writer, transport, pushed);
        }
    }

    fn try_writer(&self) -> Option<MutexGuard<'_, Writer>> {
        match self.writer.try_lock() {
            Ok(writer) => Some(writer),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn write(
        &self,
        Writer(unsent): &mut Writer,
        transport: &dyn Transport,
        number: u64,
    ) -> io::Result<Progress> {
        {
            let mut queue = self.queue();
            if queue.sent >= number {
                return Ok(Progress::Done);
            }
            unsent.append(&mut queue.waiting);
            queue.urgent = false;
        }
        let count = transport.send(unsent)?.min(unsent.len());
        unsent.drain(..count);
        let mut queue = self.queue();
        queue.last_sent = Instant::now();
        queue.sent += count as u64;
        Ok(if queue.sent >= number { Progress::Done } else { Progress::Wrote })
    }

    /// Sends a keep-alive, or some unsent bytes, which serve as one.
    pub(super) fn keep_alive(&self, transport: &dyn Transport) -> io::Result<()> {
        let number = {
            let mut queue = self.queue();
            if queue.sent == queue.pushed {
                queue.waiting.extend_from_slice(&wire::header(Kind::KeepAlive, 0));
                queue.pushed += wire::HEADER_BYTES as u64;
            }
            queue.pushed
        };
        self.write_some(transport, number).map(drop)
    }
}
