//! Deals pages to the shards, one per data channel. A single shard works on the caller's thread: a
//! hand-over to another would cost it time in the pause, and gain nothing. Several have threads of
//! their own, each with a short queue, so that little time passes between clearing a page in the log
//! and reading it.

use super::shard::{Job, Order, Shard, Tally};
use crate::source::SourceError;
use crate::transport::{Channel, Main};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
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
    /// None once it has been joined. It ends with a tally, or leaves word in `failed`.
    thread: Option<JoinHandle<Option<Tally>>>,
    failed: Arc<Failed>,
}

/// Why the first shard that failed has failed: the others may have ended because of it. Noted before
/// anybody is woken, so that whoever is finds it.
#[derive(Default)]
struct Failed(Mutex<Option<SourceError>>);

impl Failed {
    fn note(&self, error: SourceError) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn take(&self) -> Option<SourceError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The shards of a source. Dropping them ends their channels.
pub struct Lanes {
    lanes: Vec<Lane>,
    failed: Arc<Failed>,
}

impl Lanes {
    /// One lane per shard; `main` is woken if one fails on its own.
    pub fn start(mut shards: Vec<Shard>, main: &Arc<Main>) -> Result<Self, SourceError> {
        let failed = Arc::<Failed>::default();
        if shards.len() == 1 {
            let lanes = shards.drain(..).map(|shard| Lane::Here(Box::new(shard))).collect();
            return Ok(Self { lanes, failed });
        }
        let mut all = Self { lanes: Vec::with_capacity(shards.len()), failed };
        for (index, mut shard) in (0u16..).zip(shards) {
            let (orders, inbox) = sync_channel(QUEUE);
            let (channel, main) = (shard.channel().clone(), main.clone());
            let failed = all.failed.clone();
            let thread = std::thread::Builder::new()
                .name(format!("mig-send-{index}"))
                .stack_size(256 << 10)
                .spawn(move || {
                    let work = AssertUnwindSafe(|| obey_all(&mut shard, &inbox));
                    // A panic is told like an error: nobody is to wait for what does not come.
                    let result = catch_unwind(work).unwrap_or_else(|_| Err(gone()));
                    result
                        .map_err(|error| {
                            failed.note(on_channel(index, error));
                            // Whoever waits for an echo that will not come finds the reason there.
                            main.channel().trip();
                        })
                        .ok()
                })
                .map_err(SourceError::Thread)?;
            let (orders, thread, failed) = (Some(orders), Some(thread), all.failed.clone());
            all.lanes.push(Lane::Thread(Worker { channel, orders, thread, failed }));
        }
        Ok(all)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.lanes.len()
    }

    /// Has every page of `job` sent by the shard that it belongs to.
    pub fn deal(&mut self, job: Job) -> Result<(), SourceError> {
        let count = self.lanes.len();
        if let [lane] = &mut self.lanes[..] {
            return lane.order(Order::Pages(job));
        }
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            if let Some(share) = job.share(STRIPE_WORDS, |stripe| stripe % count == index) {
                lane.order(Order::Pages(share))?;
            }
        }
        Ok(())
    }

    /// Has a mark sent on every channel.
    pub fn mark(&mut self, number: u64) -> Result<(), SourceError> {
        self.lanes.iter_mut().try_for_each(|lane| lane.order(Order::Mark(number)))
    }

    /// Ends every channel, and says what each has carried.
    pub fn end(&mut self) -> Result<Vec<Tally>, SourceError> {
        self.lanes.iter_mut().try_for_each(|lane| lane.order(Order::End))?;
        self.lanes.iter_mut().map(Lane::join).collect()
    }

    /// Why a shard has failed, if one has: what ended a wait on the main connection.
    pub fn failure(&mut self) -> Option<SourceError> {
        self.failed.take()
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
    SourceError::SenderEnded
}

impl Worker {
    fn join(&mut self) -> Result<Tally, SourceError> {
        self.orders = None;
        let thread = self.thread.take().ok_or_else(gone)?;
        let tally = thread.join().ok().flatten();
        tally.ok_or_else(|| self.failed.take().unwrap_or_else(gone))
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

#[cfg(test)]
mod tests {
    use super::super::shard::Common;
    use super::*;
    use crate::cancel::CancelToken;
    use crate::params::SharedParams;
    use crate::transport::Throttle;
    use crate::transport::memory::MemoryLink;
    use crate::wire::WireError;
    use devices::ram::{GuestRam, RamLayout};
    use std::sync::mpsc::Sender;

    /// Lets nothing through: it fails, or panics.
    struct Refusing {
        panics: bool,
        asked: Sender<()>,
    }

    impl Throttle for Refusing {
        fn allow(&mut self, _: usize) -> Result<usize, WireError> {
            self.asked.send(()).unwrap();
            assert!(!self.panics, "scripted panic");
            Err(WireError::Stalled { seconds: 7 })
        }

        fn sent(&mut self, _: usize) {}
    }

    #[test]
    fn a_shard_that_fails_or_panics_wakes_who_waits_and_has_left_word() {
        for (panics, expected) in
            [(false, "data channel 1"), (true, "a thread that sends pages has failed by itself")]
        {
            let (link, cancel) = (MemoryLink::new(None), CancelToken::new());
            let channel = |transport| Channel::new(Arc::new(transport), cancel.clone());
            let (ours, _theirs) = link.connect();
            let main = Arc::new(Main::new(channel(ours)));
            let layout = RamLayout::for_size(2 << 20).unwrap();
            let ram = GuestRam::from_ranges(&layout.ranges()).unwrap();
            let (params, counters) = (SharedParams::default(), Arc::default());
            let common = Common { ram, layout, params, counters, shards: 2 };
            let (asked, was_asked) = std::sync::mpsc::channel();
            let mut others = Vec::new();
            let mut shard = |throttle| {
                let (ours, theirs) = link.connect();
                others.push(theirs);
                Shard::new(common.clone(), Arc::new(channel(ours)), throttle)
            };
            let cap = crate::pace::Cap::new(SharedParams::default(), cancel.clone());
            let shards = vec![shard(Box::new(cap)), shard(Box::new(Refusing { panics, asked }))];
            let mut lanes = Lanes::start(shards, &main).unwrap();
            lanes.mark(1).unwrap();
            was_asked.recv().unwrap();
            assert!(matches!(main.receive(), Err(WireError::Interrupted)));
            let error = lanes.failure().expect("who was woken finds the reason").to_string();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }
}
