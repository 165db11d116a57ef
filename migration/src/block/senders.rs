//! Sends chunks on the disks' channels: on the caller's thread if there is one channel, otherwise on a
//! thread per channel (`mig-disk-N`), each of which takes the next chunk when it is free. Owned by `outgoing`,
//! which hears of every chunk that was sent.

use super::frame::{Frame, HEADER_BYTES};
use super::packing::Pays;
use super::readers::{Event, Filled};
use crate::error::{Panicked, ParticipantError};
use crate::pace::{Cap, Throughput};
use crate::transport::{Channel, Throttle};
use crate::wire::{Role, WireError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Sends on one channel.
struct ChunkSender {
    index: u16,
    channel: Arc<Channel>,
    cap: Cap,
    link: Arc<Link>,
}

/// What all channels get through, for the threads that compress.
struct Link {
    channels: Mutex<Vec<Throughput>>,
    pays: Arc<Pays>,
}

impl Link {
    fn add(&self, index: u16, bytes: u64, took: Duration) {
        let mut channels = devices::lock(&self.channels);
        if let Some(throughput) = channels.get_mut(usize::from(index)) {
            throughput.add(bytes, took);
        }
        let sum = channels.iter().map(Throughput::bytes_per_sec).fold(0, u64::saturating_add);
        self.pays.link_is(sum);
    }
}

impl ChunkSender {
    fn write(&mut self, bytes: &[u8]) -> Result<(), ParticipantError> {
        let began = Instant::now();
        let throttle: &mut dyn Throttle = &mut self.cap;
        let written = self.channel.write_pages(bytes, &[], throttle);
        let role = Role::Disks { index: self.index };
        written.map_err(|error| error.on_channel(role))?;
        self.link.add(self.index, bytes.len() as u64, began.elapsed());
        Ok(())
    }

    fn send(&mut self, filled: &Filled) -> Result<(), ParticipantError> {
        let impossible = || WireError::Unexpected {
            found: format!("{:?} longer than its buffer", filled.chunk),
            expected: "a chunk of a disk",
        };
        self.write(filled.frame().ok_or_else(impossible)?)
    }
}

/// The channels of the disks at the source. Dropping it ends them, if they have threads.
pub(super) struct Senders {
    channels: Vec<Arc<Channel>>,
    cap: Cap,
    work: Work,
}

enum Work {
    Inline(ChunkSender),
    Threads {
        /// Until it is dropped.
        queue: Option<Sender<Filled>>,
        threads: Vec<JoinHandle<()>>,
    },
}

impl Senders {
    /// Starts the threads, which report to `events`.
    pub(super) fn start(
        channels: Vec<Arc<Channel>>,
        cap: &Cap,
        pays: Arc<Pays>,
        events: &Sender<Event>,
    ) -> Result<Self, ParticipantError> {
        let throughputs = Mutex::new(vec![Throughput::default(); channels.len()]);
        let link = Arc::new(Link { channels: throughputs, pays });
        let sender = |(index, channel): (u16, &Arc<Channel>)| ChunkSender {
            index,
            channel: channel.clone(),
            cap: cap.clone(),
            link: link.clone(),
        };
        let mut senders: Vec<ChunkSender> = (0..).zip(&channels).map(sender).collect();
        if senders.len() == 1
            && let Some(sender) = senders.pop()
        {
            return Ok(Self { channels, cap: cap.clone(), work: Work::Inline(sender) });
        }
        let (queue, to_do) = channel();
        let to_do = Arc::new(Mutex::new(to_do));
        // Dropped on an error, which ends those that were started.
        let threads = Vec::with_capacity(senders.len());
        let work = Work::Threads { queue: Some(queue), threads };
        let mut all = Self { channels, cap: cap.clone(), work };
        for sender in senders {
            let (to_do, events) = (to_do.clone(), events.clone());
            let thread = std::thread::Builder::new()
                .name(format!("mig-disk-{}", sender.index))
                .stack_size(128 << 10)
                .spawn(move || send_all(sender, &to_do, &events))
                .map_err(ParticipantError::Thread)?;
            if let Work::Threads { threads, .. } = &mut all.work {
                threads.push(thread);
            }
        }
        Ok(all)
    }

    /// Sends a chunk. Returns it if it was sent at once; otherwise [`Event::Sent`] will.
    pub(super) fn send(&mut self, filled: Filled) -> Result<Option<Filled>, ParticipantError> {
        match &mut self.work {
            Work::Inline(sender) => sender.send(&filled).map(|()| Some(filled)),
            Work::Threads { queue, .. } => {
                let queued = queue.as_ref().is_some_and(|queue| queue.send(filled).is_ok());
                if queued { Ok(None) } else { Err(WireError::Interrupted.into()) }
            }
        }
    }

    /// Sends `frame` on every channel, when all chunks were sent. Returns the number of frames.
    pub(super) fn tell_all(&mut self, frame: Frame) -> Result<u64, ParticipantError> {
        for (index, channel) in (0..).zip(&self.channels) {
            let sent = channel.write_pages(&frame.encode(0), &[], &mut self.cap);
            sent.map_err(|error| error.on_channel(Role::Disks { index }))?;
        }
        Ok(self.channels.len() as u64)
    }

    /// Waits for the answers to mark `number`; returns how long flushing took.
    pub(super) fn await_flushed(&self, number: u64) -> Result<Duration, ParticipantError> {
        let mut longest = Duration::ZERO;
        for (index, channel) in (0..).zip(&self.channels) {
            let flush = answer_to(channel, number);
            longest = longest.max(flush.map_err(|error| error.on_channel(Role::Disks { index }))?);
        }
        Ok(longest)
    }
}

fn answer_to(channel: &Channel, number: u64) -> Result<Duration, WireError> {
    loop {
        let mut header = [0; HEADER_BYTES];
        channel.read_while_alive(&mut header)?;
        match Frame::decode(&header)?.0 {
            Frame::Alive => {}
            Frame::Flushed(flushed, flush) if flushed == number => return Ok(flush),
            other => {
                let (found, expected) = (format!("{other:?}"), "the answer to a mark of the disks");
                return Err(WireError::Unexpected { found, expected });
            }
        }
    }
}

/// Body of a thread.
fn send_all(mut sender: ChunkSender, to_do: &Mutex<Receiver<Filled>>, events: &Sender<Event>) {
    loop {
        // One thread waits for a chunk, the others for their turn to wait.
        let Ok(filled) = devices::lock(to_do).recv() else { return };
        let sent = catch_unwind(AssertUnwindSafe(|| sender.send(&filled)));
        let sent = sent.unwrap_or_else(|_| Err(Panicked("sends disks").into()));
        if events.send(Event::Sent(sent.map(|()| filled))).is_err() {
            return;
        }
    }
}

impl Drop for Senders {
    fn drop(&mut self) {
        let Work::Threads { queue, threads } = &mut self.work else { return };
        *queue = None;
        self.channels.iter().for_each(|channel| channel.transport().shutdown());
        for thread in threads.drain(..) {
            // Panics were reported.
            let _ = thread.join();
        }
    }
}
