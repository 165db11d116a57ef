//! The thread that receives disks, and what the main thread sees of it.

use super::chunk_receiver::ChunkReceiver;
use super::frame::BlockTotals;
use crate::control::Control;
use crate::error::ParticipantError;
use crate::transport::{Channel, TICK};
use crate::wire::WireError;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

#[derive(Default)]
struct State {
    /// What had come at the last end, with all of it on stable storage.
    flushed: Option<BlockTotals>,
    failed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The disks' connection at work. Dropping it ends the connection and its threads.
pub(super) struct Receiver {
    shared: Arc<Shared>,
    channel: Arc<Channel>,
    control: Control,
    /// Ends that have come: images are being written and flushed.
    ended: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl Receiver {
    /// Starts receiving from `channel`. If that fails it says so to `control`.
    pub(super) fn start(
        chunks: ChunkReceiver,
        channel: Channel,
        control: &Control,
    ) -> Result<Self, ParticipantError> {
        let (shared, channel) = (Arc::<Shared>::default(), Arc::new(channel));
        let ended = chunks.ended();
        let (ours, from, told) = (shared.clone(), channel.clone(), control.clone());
        let thread = std::thread::Builder::new()
            .name("mig-disks".into())
            .stack_size(256 << 10)
            .spawn(move || {
                let mut at_end = |totals: &BlockTotals| {
                    devices::lock(&ours.state).flushed = Some(totals.clone());
                    ours.changed.notify_all();
                    ControlFlow::Continue(())
                };
                if let Err(error) = chunks.receive_all(&from, &mut at_end) {
                    told.fail(error.into());
                    devices::lock(&ours.state).failed = true;
                    ours.changed.notify_all();
                    // The source meets a closed connection, and looks for the reason on the control one.
                    from.transport().shutdown();
                }
            })
            .map_err(ParticipantError::Thread)?;
        let control = control.clone();
        Ok(Self { shared, channel, control, ended, thread: Some(thread) })
    }

    /// Waits until all up to end `number` has come and is on stable storage. It is a stall if something is
    /// still to come and does not.
    pub(super) fn await_end(&self, number: u32) -> Result<BlockTotals, WireError> {
        let (mut moved, mut since) = (self.channel.moved_bytes(), Instant::now());
        let mut state = devices::lock(&self.shared.state);
        loop {
            if state.failed || self.control.is_cancelled() {
                return Err(WireError::Interrupted);
            }
            if let Some(totals) = state.flushed.as_ref().filter(|totals| totals.ends >= number) {
                return Ok(totals.clone());
            }
            let waited = self.shared.changed.wait_timeout(state, TICK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            let now = self.channel.moved_bytes();
            if now != moved || self.ended.load(Ordering::Acquire) >= number {
                (moved, since) = (now, Instant::now());
            } else {
                self.control.liveness().check(since, self.control.patience())?;
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.channel.transport().shutdown();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that receives disks panicked");
        }
    }
}
