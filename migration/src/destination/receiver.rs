//! The threads that receive page frames, one per data channel, and what the main thread sees of them.

use super::DestinationError;
use crate::ram::incoming::{Arrived, RamIncoming};
use crate::ram::shard::Tally;
use crate::transport::{Channel, Main, TICK};
use crate::wire::{Encoder, Kind, WireError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// What a channel has carried, once it has ended.
type Ended = Option<Result<Tally, WireError>>;

struct Shared {
    /// By channel.
    ended: Mutex<Vec<Ended>>,
    changed: Condvar,
}

impl Shared {
    fn ended(&self) -> MutexGuard<'_, Vec<Ended>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
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

fn take_error(ended: &mut [Ended]) -> Option<WireError> {
    let failed = ended.iter_mut().find(|ended| matches!(ended, Some(Err(_))))?;
    failed.take().and_then(Result::err)
}

impl Receivers {
    /// Starts receiving from all channels. If one fails, waits on `main` end.
    pub(super) fn start(
        channels: Vec<(RamIncoming, Channel)>,
        main: &Arc<Main>,
    ) -> Result<Self, DestinationError> {
        let ended = channels.iter().map(|_| None).collect();
        let shared = Arc::new(Shared { ended: Mutex::new(ended), changed: Condvar::new() });
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
                let result = receive_all(index, &mut ram, &data, &main);
                let failed = result.is_err();
                if let Some(ended) = shared.ended().get_mut(usize::from(index)) {
                    *ended = Some(result);
                }
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
        take_error(&mut self.shared.ended())
    }

    /// Waits for the end of every channel; it is a stall if no byte comes for the link's patience.
    pub(super) fn finish(&self) -> Result<Vec<Tally>, WireError> {
        let moved_bytes = || self.receivers.iter().map(|one| one.data.moved_bytes()).sum::<u64>();
        let (mut moved, mut since) = (moved_bytes(), Instant::now());
        let mut ended = self.shared.ended();
        loop {
            if let Some(error) = take_error(&mut ended) {
                return Err(error);
            }
            let tallies = ended.iter().map(|ended| ended.as_ref()?.as_ref().ok().copied());
            if let Some(tallies) = tallies.collect() {
                return Ok(tallies);
            }
            let waited = self.shared.changed.wait_timeout(ended, TICK);
            ended = waited.unwrap_or_else(PoisonError::into_inner).0;
            let Some(Receiver { data, .. }) = self.receivers.first() else { continue };
            if data.is_cancelled() {
                return Err(WireError::Interrupted);
            }
            let (now, patience) = (moved_bytes(), data.transport().patience());
            if now != moved {
                (moved, since) = (now, Instant::now());
            } else if since.elapsed() >= patience && ended.iter().any(Option::is_none) {
                return Err(WireError::Stalled { seconds: patience.as_secs() });
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
