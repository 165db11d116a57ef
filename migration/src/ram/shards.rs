//! The shards of a source, one per data channel: passes pages and marks on to them. Called by
//! `outgoing`. A single shard works on the caller's thread: passing its pages to another thread would
//! lengthen the pause and gain nothing. Several shards have a thread each, with a short queue, so that
//! little time passes between clearing a page in the dirty log and reading it.

use super::error::RamError;
use super::shard::{Command, Job, Shard, Tally};
use crate::control::Control;
use crate::error::ParticipantError;
use crate::transport::Channel;
use crate::wire::WireError;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

/// Words of the dirty bitmap that go to the same shard: 2 MiB of RAM, a huge page.
const STRIPE_WORDS: usize = 8;
/// Commands queued for a busy shard.
const QUEUE: usize = 1;

enum Handle {
    Inline(Box<Shard>),
    Thread(Worker),
}

struct Worker {
    channel: Arc<Channel>,
    /// `None` once the thread is being ended.
    commands: Option<SyncSender<Command>>,
    /// What the channel has carried, sent at each end.
    tallies: Receiver<Tally>,
    thread: Option<JoinHandle<()>>,
}

/// The shards of a source. Dropping them ends their channels.
pub struct Shards {
    shards: Vec<Handle>,
}

impl Shards {
    /// Starts the shards. One that fails on its own thread reports to `control`, which ends every wait.
    pub fn start(mut shards: Vec<Shard>, control: &Control) -> Result<Self, ParticipantError> {
        if shards.len() == 1 {
            let shards = shards.drain(..).map(|shard| Handle::Inline(Box::new(shard))).collect();
            return Ok(Self { shards });
        }
        let mut all = Self { shards: Vec::with_capacity(shards.len()) };
        for (index, mut shard) in (0u16..).zip(shards) {
            let (commands, queue) = sync_channel(QUEUE);
            let (report, tallies) = channel();
            let (channel, control) = (shard.channel().clone(), control.clone());
            let thread = std::thread::Builder::new()
                .name(format!("mig-send-{index}"))
                .stack_size(256 << 10)
                .spawn(move || {
                    let work = AssertUnwindSafe(|| run(&mut shard, &queue, &report));
                    // A panic is reported like an error, so that no thread waits for this one.
                    let panicked = |_| Err(ParticipantError::own(RamError::SenderEnded));
                    if let Err(error) = catch_unwind(work).unwrap_or_else(panicked) {
                        // Before the queue is closed, which is only the consequence.
                        control.fail(on_channel(index, error));
                    }
                    drop(queue);
                })
                .map_err(ParticipantError::Thread)?;
            let (commands, thread) = (Some(commands), Some(thread));
            all.shards.push(Handle::Thread(Worker { channel, commands, tallies, thread }));
        }
        Ok(all)
    }

    /// Sends every page of `job` through the shard that it belongs to.
    pub fn dispatch(&mut self, job: Job) -> Result<(), ParticipantError> {
        let count = self.shards.len();
        if let [shard] = &mut self.shards[..] {
            return shard.command(Command::Pages(job));
        }
        for (index, shard) in self.shards.iter_mut().enumerate() {
            if let Some(share) = job.share(STRIPE_WORDS, |stripe| stripe % count == index) {
                shard.command(Command::Pages(share))?;
            }
        }
        Ok(())
    }

    /// Sends a mark on every channel.
    pub fn mark(&mut self, number: u64) -> Result<(), ParticipantError> {
        self.shards.iter_mut().try_for_each(|shard| shard.command(Command::Mark(number)))
    }

    /// Drops what every shard knows of the page versions at the destination.
    pub fn forget(&mut self) -> Result<(), ParticipantError> {
        self.shards.iter_mut().try_for_each(|shard| shard.command(Command::Forget))
    }

    /// Sends an end on every channel: nothing more follows while the guest is stopped. Returns what each
    /// channel has carried so far.
    pub fn end(&mut self) -> Result<Vec<Tally>, ParticipantError> {
        self.shards.iter_mut().try_for_each(|shard| shard.command(Command::End))?;
        self.shards.iter_mut().map(Handle::tally).collect()
    }
}

fn run(
    shard: &mut Shard,
    queue: &Receiver<Command>,
    report: &Sender<Tally>,
) -> Result<(), ParticipantError> {
    // The queue closes when the migration ends, for a reason that is recorded elsewhere.
    while let Ok(command) = queue.recv() {
        shard.execute(&command)?;
        if matches!(command, Command::End) && report.send(shard.tally()).is_err() {
            break;
        }
    }
    Ok(())
}

impl Handle {
    fn command(&mut self, command: Command) -> Result<(), ParticipantError> {
        match self {
            Self::Inline(shard) => shard.execute(&command).map_err(|error| on_channel(0, error)),
            Self::Thread(Worker { commands: Some(commands), .. }) => {
                commands.send(command).map_err(|_| WireError::Interrupted.into())
            }
            Self::Thread(_) => Err(WireError::Interrupted.into()),
        }
    }

    fn tally(&mut self) -> Result<Tally, ParticipantError> {
        match self {
            Self::Inline(shard) => Ok(shard.tally()),
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
        self.commands = None;
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

    /// Fails or panics instead of allowing a write.
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
    fn a_shard_that_fails_or_panics_wakes_the_waiting_driver_and_reports_why() {
        for (panics, expected) in
            [(false, "data channel 1"), (true, "a thread that sends pages panicked")]
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
            let mut shards = Shards::start(shards, &control).unwrap();
            shards.mark(1).unwrap();
            was_asked.recv().unwrap();
            let woken = control.next(&Limit::alive("anything")).unwrap_err();
            assert!(matches!(woken, WireError::Interrupted), "{woken}");
            let error = control.cause_of(woken.into()).to_string();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }
}
