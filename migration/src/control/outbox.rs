//! The sending half of the control connection: a buffer of unsent bytes, shared by all sending threads. A
//! partly written frame is completed by the next writer.

use crate::transport::Transport;
use crate::wire::{self, Kind};
use std::io;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Result of a write.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Everything up to the requested byte is out.
    Done,
    Wrote,
}

struct State {
    /// Whole frames, except that the first may be partly written.
    unsent: Vec<u8>,
    /// Bytes ever pushed, the unsent ones included.
    pushed: u64,
    last_sent: Instant,
}

pub(super) struct Outbox(Mutex<State>);

impl Default for Outbox {
    fn default() -> Self {
        Self(Mutex::new(State { unsent: Vec::new(), pushed: 0, last_sent: Instant::now() }))
    }
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        devices::lock(&self.0)
    }

    /// Adds whole frames; returns the total number of bytes after which they are out.
    pub(super) fn push(&self, bytes: &[u8]) -> u64 {
        let mut state = self.lock();
        state.unsent.extend_from_slice(bytes);
        state.pushed += bytes.len() as u64;
        state.pushed
    }

    /// Bytes that were ever pushed.
    pub(super) fn pushed(&self) -> u64 {
        self.lock().pushed
    }

    /// Time since the last write.
    pub(super) fn quiet(&self) -> Duration {
        self.lock().last_sent.elapsed()
    }

    /// Makes one call of the transport, unless everything up to `number` is out.
    pub(super) fn write_some(
        &self,
        transport: &dyn Transport,
        number: u64,
    ) -> io::Result<Progress> {
        let mut state = self.lock();
        let sent = state.pushed - state.unsent.len() as u64;
        if sent >= number {
            return Ok(Progress::Done);
        }
        let count = transport.send(&state.unsent)?;
        state.last_sent = Instant::now();
        let count = count.min(state.unsent.len());
        state.unsent.drain(..count);
        let sent = state.pushed - state.unsent.len() as u64;
        Ok(if sent >= number { Progress::Done } else { Progress::Wrote })
    }

    /// Sends a keep-alive, or some unsent bytes, which serve as one.
    pub(super) fn keep_alive(&self, transport: &dyn Transport) -> io::Result<()> {
        let number = {
            let mut state = self.lock();
            if state.unsent.is_empty() {
                state.unsent.extend_from_slice(&wire::header(Kind::KeepAlive, 0));
                state.pushed += wire::HEADER_BYTES as u64;
            }
            state.pushed
        };
        self.write_some(transport, number).map(drop)
    }
}
