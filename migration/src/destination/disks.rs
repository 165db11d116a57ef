//! The thread that receives disks, and what the main thread sees of it.

use super::DestinationError;
use crate::block::LoadError;
use crate::block::frame::BlockTotals;
use crate::block::incoming::DisksIncoming;
use crate::transport::{Channel, Main, TICK};
use crate::wire::WireError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

type Ended = Result<BlockTotals, LoadError>;

#[derive(Default)]
struct Shared {
    ended: Mutex<Option<Ended>>,
    changed: Condvar,
}

/// The disks' connection at work. Dropping it ends the connection and its threads.
pub(super) struct DisksReceiver {
    shared: Arc<Shared>,
    channel: Arc<Channel>,
    /// Nothing more will come: images are written and flushed.
    all_here: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl From<LoadError> for DestinationError {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Wire(error) => error.into(),
            LoadError::Thread(error) => Self::Thread(error),
            error => Self::Disk(error),
        }
    }
}

impl DisksReceiver {
    /// Starts receiving from `channel`. If that fails, waits on `main` end.
    pub(super) fn start(
        disks: DisksIncoming,
        channel: Channel,
        main: Arc<Main>,
    ) -> Result<Self, DestinationError> {
        let (shared, channel) = (Arc::<Shared>::default(), Arc::new(channel));
        let all_here = disks.ended();
        let (ours, from) = (shared.clone(), channel.clone());
        let thread = std::thread::Builder::new()
            .name("mig-disks".into())
            .stack_size(256 << 10)
            .spawn(move || {
                let result = disks.receive_all(&from);
                let failed = result.is_err();
                *ours.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
                ours.changed.notify_all();
                if failed {
                    // The source meets a closed connection, and looks for the reason on the main one.
                    from.transport().shutdown();
                    main.channel().trip();
                }
            })
            .map_err(DestinationError::Thread)?;
        Ok(Self { shared, channel, all_here, thread: Some(thread) })
    }

    /// Why receiving has failed, if it has.
    pub(super) fn take_error(&self) -> Option<DestinationError> {
        let mut ended = self.shared.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*ended, Some(Err(_))) {
            return ended.take().and_then(Result::err).map(DestinationError::from);
        }
        None
    }

    /// Waits until all has come and is on stable storage. It is a stall if something is still to come and
    /// does not for the link's patience.
    pub(super) fn finish(&self) -> Result<BlockTotals, DestinationError> {
        let patience = self.channel.transport().patience();
        let (mut moved, mut since) = (self.channel.moved_bytes(), Instant::now());
        let mut ended = self.shared.ended.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(result) = ended.take() {
                return Ok(result?);
            }
            let waited = self.shared.changed.wait_timeout(ended, TICK);
            ended = waited.unwrap_or_else(PoisonError::into_inner).0;
            if self.channel.is_cancelled() {
                return Err(WireError::Interrupted.into());
            }
            let now = self.channel.moved_bytes();
            if now != moved || self.all_here.load(Ordering::Acquire) {
                (moved, since) = (now, Instant::now());
            } else if since.elapsed() >= patience && ended.is_none() {
                return Err(WireError::Stalled { seconds: patience.as_secs() }.into());
            }
        }
    }
}

impl Drop for DisksReceiver {
    fn drop(&mut self) {
        self.channel.transport().shutdown();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that receives disks panicked");
        }
    }
}
