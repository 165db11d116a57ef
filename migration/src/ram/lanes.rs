//! Deals pages to the shards, one per data channel. A single shard works on the caller's thread: a
//! hand-over to another would cost it time in the pause, and gain nothing. Several have threads of
//! their own, each with a short queue, so that little time passes between clearing a page in the log
//! and reading it.

use super::error::RamError;
use super::shard::{Job, Order, Shard, Tally};
use crate::control::Control;
use crate::error::ParticipantError;
use crate::transport::Channel;
use crate::wire::WireError;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

/// Words of the dirty bitmap that take the same shard: 2 MiB of RAM, a huge page.
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
    /// What it has carried, at each end.
    tallies: Receiver<Tally>,
    thread: Option<JoinHandle<()>>,
}

/// The shards of a source. Dropping them ends their channels.
pub struct Lanes {
    lanes: Vec<Lane>,
}

impl Lanes {
    /// One lane per shard. A shard that fails on its own thread says so to `control`, which ends every
    /// wait.
    pub fn start(mut shards: Vec<Shard>, control: &Control) -> Result<Self, ParticipantError> {
        if shards.len() == 1 {
            let lanes = shards.drain(..).map(|shard| Lane::Here(Box::new(shard))).collect();
            return Ok(Self { lanes });
        }
        let mut all = Self { lanes: Vec::with_capacity(shards.len()) };
        for (index, mut shard) in (0u16..).zip(shards) {
            let (orders, inbox) = sync_channel(QUEUE);
            let (tell, tallies) = channel();
            let (channel, control) = (shard.channel().clone(), control.clone());
            let thread = std::thread::Builder::new()
                .name(format!("mig-send-{index}"))
                .stack_size(256 << 10)
                .spawn(move || {
                    let work = AssertUnwindSafe(|| obey_all(&mut shard, &inbox, &tell));
                    // A panic is told like an error: nobody is to wait for what does not come.
                    let panicked = |_| Err(ParticipantError::own(RamError::SenderEnded));
                    if let Err(error) = catch_unwind(work).unwrap_or_else(panicked) {
                        // Before anybody meets the closed queue.
                        control.fail(on_channel(index, error));
                    }
                    drop(inbox);
                })
                .map_err(ParticipantError::Thread)?;
            let (orders, thread) = (Some(orders), Some(thread));
            all.lanes.push(Lane::Thread(Worker { channel, orders, tallies, thread }));
        }
        Ok(all)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.lanes.len()
    }

    /// Has every page of `job` sent by the shard that it belongs to.
    pub fn deal(&mut self, job: Job) -> Result<(), ParticipantError> {
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
    pub fn mark(&mut self, number: u64) -> Result<(), ParticipantError> {
        self.lanes.iter_mut().try_for_each(|lane| lane.order(Order::Mark(number)))
    }

    /// Has every shard forget which versions of pages the destination has.
    pub fn forget(&mut self) -> Result<(), ParticipantError> {
        self.lanes.iter_mut().try_for_each(|lane| lane.order(Order::Forget))
    }

    /// Says on every channel that nothing more is sent with the guest stopped, and what each has carried
    /// so far.
    pub fn end(&mut self) -> Result<Vec<Tally>, ParticipantError> {
        self.lanes.iter_mut().try_for_each(|lane| lane.order(Order::End))?;
        self.lanes.iter_mut().map(Lane::tally).collect()
    }
}

fn obey_all(
    shard: &mut Shard,
    inbox: &Receiver<Order>,
    tell: &Sender<Tally>,
) -> Result<(), ParticipantError> {
    // Without a next order the migration is over, for a reason that others know.
    while let Ok(order) = inbox.recv() {
        shard.obey(&order)?;
        if matches!(order, Order::End) && tell.send(shard.tally()).is_err() {
            break;
        }
    }
    Ok(())
}

impl Lane {
    fn order(&mut self, order: Order) -> Result<(), ParticipantError> {
        match self {
            Self::Here(shard) => shard.obey(&order).map_err(|error| on_channel(0, error)),
            Self::Thread(Worker { orders: Some(orders), .. }) => {
                orders.send(order).map_err(|_| WireError::Interrupted.into())
            }
            Self::Thread(_) => Err(WireError::Interrupted.into()),
        }
    }

    fn tally(&mut self) -> Result<Tally, ParticipantError> {
        match self {
            Self::Here(shard) => Ok(shard.tally()),
            Self::Thread(worker) => {
                worker.tallies.recv().map_err(|_| WireError::Interrupted.into())
            }
        }
    }
}

fn on_channel(index: u16, error: ParticipantError) -> ParticipantError {
    match error {
        ParticipantError::Wire(error) => error.on_data_channel(index).into(),
        error => error,
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.channel.transport().shutdown();
        self.orders = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a thread that sends pages panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::shard::Common;
    use super::*;
    use crate::cancel::CancelToken;
    use crate::control::Limit;
    use crate::params::SharedParams;
    use crate::transport::Throttle;
    use crate::transport::memory::MemoryLink;
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
            let (control, _threads) = Control::start(Arc::new(ours), cancel.clone()).unwrap();
            let layout = RamLayout::for_size(2 << 20).unwrap();
            let ram = GuestRam::from_ranges(&layout.ranges()).unwrap();
            let (params, counters) = (SharedParams::default(), Arc::default());
            let common = Common { ram, layout, params, counters, pages: Arc::default(), shards: 2 };
            let (asked, was_asked) = std::sync::mpsc::channel();
            let mut others = Vec::new();
            let mut shard = |throttle| {
                let (ours, theirs) = link.connect();
                others.push(theirs);
                Shard::new(common.clone(), Arc::new(channel(ours)), throttle)
            };
            let cap = crate::pace::Cap::new(SharedParams::default(), cancel.clone());
            let shards = vec![shard(Box::new(cap)), shard(Box::new(Refusing { panics, asked }))];
            let mut lanes = Lanes::start(shards, &control).unwrap();
            lanes.mark(1).unwrap();
            was_asked.recv().unwrap();
            let woken = control.next(&Limit::alive("anything")).unwrap_err();
            assert!(matches!(woken, WireError::Interrupted), "{woken}");
            let error = control.cause_of(woken.into()).to_string();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }
}
