//! Deals pages to the shards, one per data channel. A single shard works on the caller's thread: a
//! hand-over to another would cost it time in the pause, and gain nothing. Several have threads of
//! their own, each with a short queue, so that little time passes between clearing a page in the log
//! and reading it.

use super::shard::{Job, Order, Shard, Tally};
use crate::source::SourceError;
use crate::transport::{Channel, Main};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Words of the dirty bitmap that take the same lane: 2 MiB of RAM, a huge page.
const STRIPE_WORDS: usize = 8;
/// Orders that wait for a busy shard.
const QUEUE: usize = 1;

enum Lane {
    Here(Box<Shard>),
    Thread(Worker),
}

struct Worker {
    channel: Arc<Channel>,
    /// None once it has been told to end.
    orders: Option<SyncSender<Order>>,
    /// None once it has been joined.
    thread: Option<JoinHandle<Result<Tally, SourceError>>>,
}

/// The shards of a source. Dropping them ends their channels.
pub struct Lanes(Vec<Lane>);

impl Lanes {
    /// One lane per shard; `main` is woken if one fails on its own.
    pub fn start(mut shards: Vec<Shard>, main: &Arc<Main>) -> Result<Self, SourceError> {
        if shards.len() == 1 {
            return Ok(Self(shards.drain(..).map(|shard| Lane::Here(Box::new(shard))).collect()));
        }
        let mut lanes = Self(Vec::with_capacity(shards.len()));
        for (index, mut shard) in (0u16..).zip(shards) {
            let (orders, inbox) = sync_channel(QUEUE);
            let (channel, main) = (shard.channel().clone(), main.clone());
            let thread = std::thread::Builder::new()
                .name(format!("mig-send-{index}"))
                .stack_size(256 << 10)
                .spawn(move || {
                    let result =
                        obey_all(&mut shard, &inbox).map_err(|error| on_channel(index, error));
                    if result.is_err() {
                        // Whoever waits for an echo that will not come finds the reason here.
                        main.channel().trip();
                    }
                    result
                })
                .map_err(SourceError::Thread)?;
            let worker = Worker { channel, orders: Some(orders), thread: Some(thread) };
            lanes.0.push(Lane::Thread(worker));
        }
        Ok(lanes)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Has every page of `job` sent by the shard that it belongs to.
    pub fn deal(&mut self, job: Job) -> Result<(), SourceError> {
        let count = self.0.len();
        if let [lane] = &mut self.0[..] {
            return lane.order(Order::Pages(job));
        }
        for (index, lane) in self.0.iter_mut().enumerate() {
            if let Some(share) = job.share(STRIPE_WORDS, |stripe| stripe % count == index) {
                lane.order(Order::Pages(share))?;
            }
        }
        Ok(())
    }

    /// Has a mark sent on every channel.
    pub fn mark(&mut self, number: u64) -> Result<(), SourceError> {
        self.0.iter_mut().try_for_each(|lane| lane.order(Order::Mark(number)))
    }

    /// Ends every channel, and says what each has carried.
    pub fn end(&mut self) -> Result<Vec<Tally>, SourceError> {
        self.0.iter_mut().try_for_each(|lane| lane.order(Order::End))?;
        self.0.iter_mut().map(Lane::join).collect()
    }

    /// Why a shard has failed, if one has: what ended a wait on the main connection.
    pub fn failure(&mut self) -> Option<SourceError> {
        let workers = self.0.iter_mut().filter_map(|lane| match lane {
            Lane::Here(_) => None,
            Lane::Thread(worker) => Some(worker),
        });
        workers.filter(|worker| worker.has_ended()).find_map(|worker| worker.join().err())
    }
}

fn obey_all(shard: &mut Shard, inbox: &Receiver<Order>) -> Result<Tally, SourceError> {
    // Without an end the migration is over, for a reason that others know.
    while let Ok(order) = inbox.recv() {
        shard.obey(&order)?;
        if matches!(order, Order::End) {
            break;
        }
    }
    Ok(shard.tally())
}

impl Lane {
    fn order(&mut self, order: Order) -> Result<(), SourceError> {
        match self {
            Self::Here(shard) => shard.obey(&order).map_err(|error| on_channel(0, error)),
            Self::Thread(worker) => match &worker.orders {
                Some(orders) if orders.send(order).is_ok() => Ok(()),
                _ => Err(worker.join().err().unwrap_or_else(gone)),
            },
        }
    }

    fn join(&mut self) -> Result<Tally, SourceError> {
        match self {
            Self::Here(shard) => Ok(shard.tally()),
            Self::Thread(worker) => worker.join(),
        }
    }
}

fn on_channel(index: u16, error: SourceError) -> SourceError {
    match error {
        SourceError::Wire(error) => error.on_data_channel(index).into(),
        error => error,
    }
}

fn gone() -> SourceError {
    SourceError::Thread(io::Error::other("a thread that sends pages has ended"))
}

impl Worker {
    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }

    fn join(&mut self) -> Result<Tally, SourceError> {
        self.orders = None;
        let thread = self.thread.take().ok_or_else(gone)?;
        thread.join().unwrap_or_else(|_| Err(gone()))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.channel.transport().shutdown();
            if let Err(error) = self.join() {
                log::debug!("a shard has ended: {error}");
            }
        }
    }
}
