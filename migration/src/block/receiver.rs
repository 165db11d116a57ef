//! The threads that receive disks (`mig-disks` and its own), and the driver's handle to them. Owned by `incoming`; the
//! frames are `chunk_receiver`'s business.

use super::chunk_receiver::ChunkReceiver;
use super::frame::BlockTotals;
use crate::control::Control;
use crate::error::{Panicked, ParticipantError};
use crate::transport::{Channel, TICK};
use crate::wire::WireError;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

#[derive(Default)]
struct State {
    /// Totals at the last end, with everything before it on stable storage.
    flushed: Option<BlockTotals>,
    failed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The running receiver. Dropping it shuts the channels down and joins its threads.
pub(super) struct Receiver {
    shared: Arc<Shared>,
    channels: Arc<[Arc<Channel>]>,
    control: Control,
    /// Ends received. What precedes them may still be being written and flushed.
    ended: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl Receiver {
    /// Starts receiving from `channels`. Failures are reported to `control`.
    pub(super) fn start(
        chunks: ChunkReceiver,
        channels: Vec<Channel>,
        control: &Control,
    ) -> Result<Self, ParticipantError> {
        let channels: Arc<[_]> = channels.into_iter().map(Arc::new).collect();
        let (shared, ended) = (Arc::<Shared>::default(), chunks.ended());
        let (ours, from, report) = (shared.clone(), channels.clone(), control.clone());
        let thread = std::thread::Builder::new()
            .name("mig-disks".into())
            .stack_size(256 << 10)
            .spawn(move || {
                let at_end = |totals: &BlockTotals| {
                    devices::lock(&ours.state).flushed = Some(totals.clone());
                    ours.changed.notify_all();
                    ControlFlow::Continue(())
                };
                let receiving = AssertUnwindSafe(|| chunks.receive_all(&from, &at_end));
                let received = catch_unwind(receiving);
                let panicked = |_| Err(Panicked("receives disks").into());
                if let Err(error) = received.unwrap_or_else(panicked) {
                    report.fail(error.into());
                    devices::lock(&ours.state).failed = true;
                    ours.changed.notify_all();
                    // The source sees a closed connection and finds the reason on the control connection.
                    from.iter().for_each(|channel| channel.transport().shutdown());
                }
            })
            .map_err(ParticipantError::Thread)?;
        let control = control.clone();
        Ok(Self { shared, channels, control, ended, thread: Some(thread) })
    }

    /// Waits until everything up to end `number` is on stable storage. Fails as stalled if bytes are still
    /// missing and none arrive.
    pub(super) fn await_end(&self, number: u32) -> Result<BlockTotals, WireError> {
        let moved_bytes = || self.channels.iter().map(|one| one.moved_bytes()).sum::<u64>();
        let (mut moved, mut since) = (moved_bytes(), Instant::now());
        let mut state = devices::lock(&self.shared.state);
        loop {
            if state.failed || self.control.is_cancelled() {
                return Err(WireError::Interrupted);
            }
            if let Some(totals) = state.flushed.as_ref().filter(|totals| totals.ends >= number) {
                return Ok(totals.clone());
            }
            if self.control.is_lost() {
                return Err(WireError::Lost(std::io::ErrorKind::BrokenPipe.into()));
            }
            let waited = self.shared.changed.wait_timeout(state, TICK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            let now = moved_bytes();
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
        for channel in self.channels.iter() {
            channel.transport().shutdown();
            // It may wait for another channel.
            channel.trip();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that receives disks panicked");
        }
    }
}
