//! The threads that receive page frames, one per data channel, and what the main thread sees of them.

use super::DestinationError;
use crate::ram::incoming::{Arrived, RamIncoming};
use crate::ram::shard::Tally;
use crate::transport::{Channel, Main, TICK};
use crate::wire::{Encoder, Kind, WireError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

#[derive(Default)]
struct State {
    /// What each channel has carried, once it has ended.
    ended: Vec<Option<Tally>>,
    /// Why the first that failed has failed: the others may have ended because of it.
    failed: Option<WireError>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Receiver {
    data: Arc<Channel>,
    thread: Option<JoinHandle<()>>,
}

/// The data channels at work. Dropping it ends them and their threads.
pub(super) struct Receivers {
    shared: Arc<Shared>,
    receivers: Vec<Receiver>,
}

impl Receivers {
    /// Starts receiving from all channels. If one fails, waits on `main` end.
    pub(super) fn start(
        channels: Vec<(RamIncoming, Channel)>,
        main: &Arc<Main>,
    ) -> Result<Self, DestinationError> {
        let state = State { ended: vec![None; channels.len()], failed: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let mut all = Self { shared, receivers: Vec::with_capacity(channels.len()) };
        for (index, (ram, data)) in (0u16..).zip(channels) {
            let data = Arc::new(data);
            let thread = all.start_one(index, ram, data.clone(), main.clone())?;
            all.receivers.push(Receiver { data, thread: Some(thread) });
        }
        Ok(all)
    }

    fn start_one(
        &self,
        index: u16,
        mut ram: RamIncoming,
        data: Arc<Channel>,
        main: Arc<Main>,
    ) -> Result<JoinHandle<()>, DestinationError> {
        let shared = self.shared.clone();
        std::thread::Builder::new()
            .name(format!("mig-recv-{index}"))
            .stack_size(256 << 10)
            .spawn(move || {
                let result = receive_all(index, &mut ram, &data, &main)
                    .map_err(|error| error.on_data_channel(index));
                let failed = result.is_err();
                let mut state = shared.state();
                match result {
                    Ok(tally) => state.ended[usize::from(index)] = Some(tally),
                    Err(error) => drop(state.failed.get_or_insert(error)),
                }
                drop(state);
                shared.changed.notify_all();
                if failed {
                    // The source meets a closed channel, and looks for the reason on the main one.
                    data.transport().shutdown();
                    main.channel().trip();
                }
            })
            .map_err(DestinationError::Thread)
    }

    /// Why receiving has failed, if it has.
    pub(super) fn take_error(&self) -> Option<WireError> {
        self.shared.state().failed.take()
    }

    /// Waits for the end of every channel; it is a stall if no byte comes for the link's patience.
    pub(super) fn finish(&self) -> Result<Vec<Tally>, WireError> {
        let moved_bytes = || self.receivers.iter().map(|one| one.data.moved_bytes()).sum::<u64>();
        let (mut moved, mut since) = (moved_bytes(), Instant::now());
        let mut state = self.shared.state();
        loop {
            if let Some(error) = state.failed.take() {
                return Err(error);
            }
            if let Some(tallies) = state.ended.iter().copied().collect() {
                return Ok(tallies);
            }
            let waited = self.shared.changed.wait_timeout(state, TICK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            let Some(Receiver { data, .. }) = self.receivers.first() else { continue };
            if data.is_cancelled() {
                return Err(WireError::Interrupted);
            }
            let (now, patience) = (moved_bytes(), data.transport().patience());
            if now != moved {
                (moved, since) = (now, Instant::now());
            } else if since.elapsed() >= patience {
                let silent = state.ended.iter().position(Option::is_none);
                let silent = silent.and_then(|index| u16::try_from(index).ok()).unwrap_or(0);
                let stalled = WireError::Stalled { seconds: patience.as_secs() };
                return Err(stalled.on_data_channel(silent));
            }
        }
    }
}

fn receive_all(
    index: u16,
    ram: &mut RamIncoming,
    data: &Channel,
    main: &Main,
) -> Result<Tally, WireError> {
    loop {
        match ram.receive(data)? {
            Arrived::Pages => {}
            Arrived::Mark(number) => {
                main.send(Kind::Mark, Encoder::default().u64(number).u16(index).bytes())?;
            }
            Arrived::End => return Ok(ram.tally()),
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
