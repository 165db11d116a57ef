//! The threads that receive pages (`mig-recv-N`), one per data channel, and the driver's handle to them.
//! Owned by `incoming`; a frame is `page_receiver`'s business.

use super::page_receiver::{Arrived, PageReceiver};
use super::shard::Tally;
use crate::control::Control;
use crate::error::{Panicked, ParticipantError};
use crate::transport::{Channel, TICK};
use crate::wire::{Encoder, Kind, WireError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

#[derive(Default)]
struct State {
    /// Ends received on each channel, and its tally at the last one.
    ended: Vec<(u32, Tally)>,
    failed: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        devices::lock(&self.state)
    }
}

struct Receiver {
    data: Arc<Channel>,
    thread: Option<JoinHandle<()>>,
}

/// The running receivers. Dropping it shuts the channels down and joins the threads.
pub(super) struct Receivers {
    shared: Arc<Shared>,
    control: Control,
    receivers: Vec<Receiver>,
}

impl Receivers {
    /// Starts receiving from all channels. Failures are reported to `control`.
    pub(super) fn start(
        channels: Vec<(PageReceiver, Channel)>,
        control: &Control,
    ) -> Result<Self, ParticipantError> {
        let state = State { ended: vec![Default::default(); channels.len()], failed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let receivers = Vec::with_capacity(channels.len());
        let mut all = Self { shared, control: control.clone(), receivers };
        for (index, (pages, data)) in (0u16..).zip(channels) {
            let data = Arc::new(data);
            let thread = all.start_one(index, pages, data.clone())?;
            all.receivers.push(Receiver { data, thread: Some(thread) });
        }
        Ok(all)
    }

    fn start_one(
        &self,
        index: u16,
        mut pages: PageReceiver,
        data: Arc<Channel>,
    ) -> Result<JoinHandle<()>, ParticipantError> {
        let (shared, control) = (self.shared.clone(), self.control.clone());
        std::thread::Builder::new()
            .name(format!("mig-recv-{index}"))
            .stack_size(256 << 10)
            .spawn(move || {
                let receiving =
                    AssertUnwindSafe(|| receive_all(index, &mut pages, &data, &control, &shared));
                control.fail(match catch_unwind(receiving) {
                    Ok(Err(error)) => error.on_data_channel(index).into(),
                    Err(_) => Panicked("receives pages").into(),
                });
                shared.state().failed = true;
                shared.changed.notify_all();
                // The source sees a closed channel and finds the reason on the control connection.
                data.transport().shutdown();
            })
            .map_err(ParticipantError::Thread)
    }

    /// Waits for end `number` of every channel. Fails as stalled if no byte arrives while the source is
    /// silent, or alive without progress for too long.
    pub(super) fn await_end(&self, number: u32) -> Result<Vec<Tally>, WireError> {
        let moved_bytes = || self.receivers.iter().map(|one| one.data.moved_bytes()).sum::<u64>();
        let (mut moved, mut since) = (moved_bytes(), Instant::now());
        let mut state = self.shared.state();
        loop {
            if state.failed || self.control.is_cancelled() {
                return Err(WireError::Interrupted);
            }
            if state.ended.iter().all(|(ends, _)| *ends >= number) {
                return Ok(state.ended.iter().map(|(_, tally)| *tally).collect());
            }
            if self.control.is_lost() {
                let silence = self.control.liveness().silence();
                if silence < self.control.patience() {
                    return Err(WireError::Lost(std::io::ErrorKind::BrokenPipe.into()));
                }
            }
            let waited = self.shared.changed.wait_timeout(state, TICK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            let now = moved_bytes();
            if now != moved {
                (moved, since) = (now, Instant::now());
            } else if let Err(stalled) =
                self.control.liveness().check(since, self.control.patience())
            {
                let silent = (0u16..).zip(&state.ended).find(|(_, (ends, _))| *ends < number);
                return Err(match silent {
                    Some((index, _)) => stalled.on_data_channel(index),
                    None => stalled,
                });
            }
        }
    }
}

fn receive_all(
    index: u16,
    pages: &mut PageReceiver,
    data: &Channel,
    control: &Control,
    shared: &Shared,
) -> Result<std::convert::Infallible, WireError> {
    loop {
        match pages.receive(data)? {
            Arrived::Pages => {}
            Arrived::Mark(number) => {
                control.send(Kind::Mark, Encoder::default().u64(number).u16(index).bytes())?;
            }
            Arrived::End => {
                if let Some(ended) = shared.state().ended.get_mut(usize::from(index)) {
                    *ended = (ended.0.saturating_add(1), pages.tally());
                }
                shared.changed.notify_all();
            }
        }
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        self.receivers.iter().for_each(|receiver| receiver.data.transport().shutdown());
        for receiver in &mut self.receivers {
            if let Some(thread) = receiver.thread.take()
                && thread.join().is_err()
            {
                log::error!("a thread that receives pages panicked");
            }
        }
    }
}
