//! The thread that receives page frames, one per data channel, and what the main thread sees of it.

use super::DestinationError;
use crate::ram::incoming::{Arrived, RamIncoming};
use crate::transport::{Channel, Main, TICK};
use crate::wire::section::RamTotals;
use crate::wire::{Encoder, Kind, WireError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// Frames and pages of a channel that has ended.
type Ended = Result<(u64, RamTotals), WireError>;

#[derive(Default)]
struct Shared {
    ended: Mutex<Option<Ended>>,
    changed: Condvar,
}

/// A data channel at work. Dropping it ends the channel and its thread.
pub(super) struct Receiver {
    shared: Arc<Shared>,
    data: Arc<Channel>,
    thread: Option<JoinHandle<()>>,
}

impl Receiver {
    /// Starts receiving from `data`. If that fails, waits on `main` end.
    pub(super) fn start(
        mut ram: RamIncoming,
        data: Channel,
        main: Arc<Main>,
    ) -> Result<Self, DestinationError> {
        let shared = Arc::<Shared>::default();
        let data = Arc::new(data);
        let (ours, channel) = (shared.clone(), data.clone());
        let thread = std::thread::Builder::new()
            .name("mig-recv-0".into())
            .stack_size(256 << 10)
            .spawn(move || {
                let result = receive_all(&mut ram, &channel, &main);
                let failed = result.is_err();
                *ours.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
                ours.changed.notify_all();
                if failed {
                    // The source meets a closed channel, and looks for the reason on the main one.
                    channel.transport().shutdown();
                    main.channel().trip();
                }
            })
            .map_err(DestinationError::Thread)?;
        Ok(Self { shared, data, thread: Some(thread) })
    }

    /// Why receiving has failed, if it has.
    pub(super) fn take_error(&self) -> Option<WireError> {
        let mut ended = self.shared.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*ended, Some(Err(_))) {
            return ended.take().and_then(Result::err);
        }
        None
    }

    /// Waits for the end of the channel; it is a stall if no byte comes for the link's patience.
    pub(super) fn finish(&self) -> Ended {
        let patience = self.data.transport().patience();
        let (mut moved, mut since) = (self.data.moved_bytes(), Instant::now());
        let mut ended = self.shared.ended.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(result) = ended.take() {
                return result;
            }
            let waited = self.shared.changed.wait_timeout(ended, TICK);
            ended = waited.unwrap_or_else(PoisonError::into_inner).0;
            if self.data.is_cancelled() {
                return Err(WireError::Interrupted);
            }
            let now = self.data.moved_bytes();
            if now != moved {
                (moved, since) = (now, Instant::now());
            } else if since.elapsed() >= patience && ended.is_none() {
                return Err(WireError::Stalled { seconds: patience.as_secs() });
            }
        }
    }
}

fn receive_all(ram: &mut RamIncoming, data: &Channel, main: &Main) -> Ended {
    loop {
        match ram.receive(data)? {
            Arrived::Pages => {}
            Arrived::Mark(number) => {
                main.send(Kind::Mark, Encoder::default().u64(number).bytes())?;
            }
            Arrived::End => return Ok(ram.totals()),
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.data.transport().shutdown();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that receives pages panicked");
        }
    }
}
