//! The thread that serves one virtqueue. It waits for notifications and parks for a pause. Owned by `mmio`;
//! a `QueueProcessor` does the device's work.
//!
//! ```text
//!           resume                         park (answered when no request is in flight)
//!  parked ─────────▶ serving, or waiting ─────────▶ parked
//! ```
//! A worker owns its queue. Before it reports that it has parked, it waits until no request is in flight,
//! completes them and publishes its position in the rings: a parked worker accesses no RAM. To park it, set
//! `yielding` first: requests that were not started stay in the ring, so a guest that keeps submitting
//! cannot delay a pause or a reset.
//!
//! A worker ends in the background. An idle one is [retired](Worker::retire) at once, without waiting for
//! its thread to be scheduled: it never accesses RAM or notifications again. One with a request in flight
//! ends when the disk completes that, which may be never.

use super::latch::{Latch, SetOnDrop};
use super::{BrokenQueue, QueueHost, QueueProcessor};
use crate::ram::GuestRam;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

enum Command {
    /// Dropping it is the reply.
    Park(SetOnDrop),
    Resume,
}

/// Callbacks of a worker into its transport.
pub trait QueueSignals: Send + Sync {
    /// Raise the used buffer interrupt.
    fn used(&self);
    /// Whether the device still serves its queues: no queue is broken.
    fn is_live(&self) -> bool;
    /// The queue is broken: from now on the device serves none.
    fn broken(&self, reason: &BrokenQueue);
}

/// A worker's position in its queue's rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub next_avail: u16,
    pub next_used: u16,
}

impl Position {
    pub fn of(queue: &Queue) -> Self {
        Self { next_avail: queue.next_avail(), next_used: queue.next_used() }
    }
}

/// Pause between two attempts to wait for the requests in flight.
const DRAIN_RETRY: Duration = Duration::from_millis(10);

/// The worker uses neither RAM nor notifications.
const IDLE: u8 = 0;
/// The worker serves requests.
const BUSY: u8 = 1;
/// The worker must never become busy again.
const RETIRED: u8 = 2;

/// State shared by a worker's thread and its owner.
struct Common {
    /// The worker must park or end soon.
    yielding: AtomicBool,
    /// The worker must end and may not write RAM any more.
    ending: AtomicBool,
    /// `IDLE`, `BUSY` or `RETIRED`. The thread switches between the first two; the owner may retire an idle
    /// one.
    duty: AtomicU8,
    /// [`Position`], exact while the worker is idle.
    next_avail: AtomicU16,
    next_used: AtomicU16,
}

impl Common {
    /// Called before the thread uses RAM. False if it is retired.
    fn begin(&self) -> bool {
        let began = self.duty.compare_exchange(IDLE, BUSY, Ordering::SeqCst, Ordering::SeqCst);
        began.is_ok() || began == Err(BUSY)
    }

    /// Called when nothing is in flight: publishes the position.
    fn rest(&self, queue: &Queue) {
        self.publish(Position::of(queue));
        self.duty.store(IDLE, Ordering::SeqCst);
    }

    fn publish(&self, position: Position) {
        self.next_avail.store(position.next_avail, Ordering::SeqCst);
        self.next_used.store(position.next_used, Ordering::SeqCst);
    }
}

/// A running worker. Dropping it ends the thread in the background, after the requests in flight: a hanging
/// disk blocks only that thread.
pub(super) struct Worker {
    commands: Option<Sender<Command>>,
    wake: Arc<EventFd>,
    common: Arc<Common>,
    ended: Arc<Latch>,
}

impl Worker {
    /// Starts a worker for `queue`, serving or parked.
    pub fn start(
        name: String,
        ram: GuestRam,
        queue: Queue,
        notify: EventFd,
        processor: Box<dyn QueueProcessor>,
        signals: Arc<dyn QueueSignals>,
        parked: bool,
    ) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let common = Arc::new(Common {
            yielding: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            duty: AtomicU8::new(IDLE),
            next_avail: AtomicU16::new(0),
            next_used: AtomicU16::new(0),
        });
        common.publish(Position::of(&queue));
        let (commands, inbox) = channel();
        let epoll = Epoll::new()?;
        let events = [notify.as_raw_fd(), wake.as_raw_fd()];
        for fd in events.into_iter().chain(processor.wakers()) {
            let interest = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, fd, interest)?;
        }
        let ended = Arc::<Latch>::default();
        let at_end = SetOnDrop(ended.clone());
        let serving = Serving {
            ram,
            queue,
            notify,
            wake: wake.clone(),
            common: common.clone(),
            epoll,
            inbox,
            processor,
            signals,
        };
        std::thread::Builder::new()
            // The name contains the disk's id, chosen by a user or a stream; a NUL byte would panic.
            .name(name.replace('\0', ""))
            .stack_size(256 << 10)
            .spawn(move || {
                // The latch is set when the processor is gone: the local declared last is dropped first.
                let _at_end = at_end;
                let mut serving = serving;
                serving.run(parked);
            })?;
        Ok(Self { commands: Some(commands), wake, common, ended })
    }

    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands
            && commands.send(command).is_ok()
        {
            // A full counter means that the thread is awake.
            let _ = self.wake.write(1);
        }
    }

    /// Tells the thread to start no request until [`Worker::resume`]; does not wait for those in flight.
    /// The latch is set when there are none, or when the thread has ended.
    pub fn park(&self) -> Arc<Latch> {
        let parked = Arc::<Latch>::default();
        self.common.yielding.store(true, Ordering::SeqCst);
        self.send(Command::Park(SetOnDrop(parked.clone())));
        parked
    }

    /// Resumes serving, starting with what is available. A thread that is still parking finishes that
    /// first.
    pub fn resume(&self) {
        self.common.yielding.store(false, Ordering::SeqCst);
        self.send(Command::Resume);
    }

    /// Position in the rings: exact while it is parked.
    pub fn position(&self) -> Position {
        Position {
            next_avail: self.common.next_avail.load(Ordering::SeqCst),
            next_used: self.common.next_used.load(Ordering::SeqCst),
        }
    }

    /// Tells the thread to end; it starts no request and completes none. `None` if it uses neither RAM nor
    /// notifications any more; otherwise the latch that is set when that is so.
    pub fn retire(&self) -> Option<Arc<Latch>> {
        self.common.ending.store(true, Ordering::SeqCst);
        self.common.yielding.store(true, Ordering::SeqCst);
        let (duty, order) = (&self.common.duty, Ordering::SeqCst);
        let was = duty.compare_exchange(IDLE, RETIRED, order, order).unwrap_or_else(|was| was);
        (was == BUSY).then(|| self.ended.clone())
    }

    /// Set when the thread has released everything.
    pub fn ended(&self) -> Arc<Latch> {
        self.ended.clone()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.retire();
        self.commands = None;
        let _ = self.wake.write(1);
    }
}

struct Serving {
    ram: GuestRam,
    queue: Queue,
    notify: EventFd,
    wake: Arc<EventFd>,
    common: Arc<Common>,
    epoll: Epoll,
    inbox: Receiver<Command>,
    processor: Box<dyn QueueProcessor>,
    signals: Arc<dyn QueueSignals>,
}

impl Serving {
    fn run(&mut self, parked: bool) {
        if parked && self.parked().is_none() {
            return;
        }
        // Only a busy worker reads notifications: a retired one would consume its successor's.
        while self.common.begin() {
            let _ = self.notify.read();
            let _ = self.wake.read();
            if self.commands().is_none() {
                return;
            }
            self.serve();
            if !self.processor.in_flight() {
                self.common.rest(&self.queue);
            }
            if self.wait().is_none() {
                return;
            }
        }
    }

    fn serve(&mut self) {
        if self.signals.is_live() {
            let mut host = Host { signals: self.signals.as_ref(), common: &self.common };
            let served = self.processor.process(&self.ram, &mut self.queue, &mut host);
            if let Err(reason) = served {
                self.broken(&reason);
            }
        }
        if !self.signals.is_live() {
            self.drain();
        }
    }

    /// Waits until no request is in flight. If the host fails to wait, tries again: RAM that the kernel may
    /// still write must not be saved, nor given back to the guest.
    fn drain(&mut self) {
        loop {
            let mut host = Host { signals: self.signals.as_ref(), common: &self.common };
            if let Err(reason) = self.processor.drain(&self.ram, &mut self.queue, &mut host) {
                self.broken(&reason);
            }
            if !self.processor.in_flight() {
                return;
            }
            std::thread::sleep(DRAIN_RETRY);
        }
    }

    fn broken(&self, reason: &BrokenQueue) {
        // Do not report errors of a queue that was reset.
        if self.signals.is_live() && !self.common.ending.load(Ordering::SeqCst) {
            self.signals.broken(reason);
        }
    }

    /// Waits for a notification, a completion or a command.
    fn wait(&self) -> Option<()> {
        let mut events = [EpollEvent::default(); 4];
        loop {
            match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    log::error!("queue worker: {error}");
                    return None;
                }
                Ok(_) => return Some(()),
            }
        }
    }

    fn commands(&mut self) -> Option<()> {
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Resume) => {}
                Ok(Command::Park(parked)) => {
                    self.drain();
                    self.common.rest(&self.queue);
                    drop(parked);
                    self.parked()?;
                    if !self.common.begin() {
                        return None;
                    }
                }
                Err(TryRecvError::Empty) => return Some(()),
                Err(TryRecvError::Disconnected) => return None,
            }
        }
    }

    fn parked(&mut self) -> Option<()> {
        loop {
            match self.inbox.recv().ok()? {
                Command::Resume => return Some(()),
                Command::Park(parked) => drop(parked),
            }
        }
    }
}

struct Host<'a> {
    signals: &'a dyn QueueSignals,
    common: &'a Common,
}

impl QueueHost for Host<'_> {
    fn interrupt(&mut self) {
        self.signals.used();
    }

    fn must_yield(&self) -> bool {
        self.common.yielding.load(Ordering::SeqCst)
    }

    fn is_ending(&self) -> bool {
        self.common.ending.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::GuestAddress;
    use std::sync::atomic::AtomicUsize;
    use std::time::Instant;

    /// A processor with one request in flight, which the host cannot wait for at first.
    struct Stuck {
        /// How often the wait will still fail.
        failures: Arc<AtomicUsize>,
    }

    impl QueueProcessor for Stuck {
        fn process(
            &mut self,
            _ram: &GuestRam,
            _queue: &mut Queue,
            _host: &mut dyn QueueHost,
        ) -> Result<(), BrokenQueue> {
            Ok(())
        }

        fn drain(
            &mut self,
            _ram: &GuestRam,
            _queue: &mut Queue,
            _host: &mut dyn QueueHost,
        ) -> Result<(), BrokenQueue> {
            let less = |left: usize| left.checked_sub(1);
            match self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less) {
                Ok(1) | Err(_) => Ok(()),
                Ok(_) => Err(BrokenQueue("scripted fault".into())),
            }
        }

        fn wakers(&self) -> Vec<std::os::fd::RawFd> {
            Vec::new()
        }

        fn in_flight(&self) -> bool {
            self.failures.load(Ordering::SeqCst) > 0
        }
    }

    struct Silent;

    impl QueueSignals for Silent {
        fn used(&self) {}

        fn is_live(&self) -> bool {
            true
        }

        fn broken(&self, _reason: &BrokenQueue) {}
    }

    #[test]
    fn a_worker_is_not_parked_while_a_request_that_it_cannot_wait_for_is_in_flight() {
        let failures = Arc::new(AtomicUsize::new(3));
        let worker = Worker::start(
            "stuck".into(),
            GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap(),
            Queue::new(16).unwrap(),
            EventFd::new(EFD_NONBLOCK).unwrap(),
            Box::new(Stuck { failures: failures.clone() }),
            Arc::new(Silent),
            false,
        );
        let worker = worker.unwrap();
        let parked = worker.park();
        assert!(parked.wait_until(Instant::now() + Duration::from_secs(30)).is_some());
        assert_eq!(failures.load(Ordering::SeqCst), 0, "it is still in flight");
        assert!(worker.retire().is_none());
    }
}
