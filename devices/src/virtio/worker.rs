//! The thread that serves one virtqueue: waits for notifications, parks for a pause.
//!
//! ```text
//!           resume                         park (answered when no request is in flight)
//!  parked ─────────▶ serving, or waiting ─────────▶ parked
//! ```
//! Before it answers that it has parked, the thread waits until no request is in flight and gives all
//! of them back, so that a parked worker touches no RAM. Whoever wants it to park raises `yielding`
//! first: the requests that have not been started stay in the ring, and a guest that never stops
//! asking cannot hold up a pause or a reset.

use super::{BrokenQueue, QueueHost, QueueProcessor};
use crate::lock;
use crate::ram::GuestRam;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use virtio_queue::Queue;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

enum Command {
    Park(Sender<()>),
    Resume,
}

/// What a worker tells its transport.
pub trait QueueSignals: Send + Sync {
    /// The driver wants to hear of used buffers.
    fn used(&self);
    /// Whether the device still serves its queues: none of them is broken.
    fn is_live(&self) -> bool;
    /// The queue cannot be served, and so no other of the device is, from now on.
    fn broken(&self, reason: &BrokenQueue);
}

/// A running worker. Dropping it ends the thread after the requests in flight.
pub struct Worker {
    commands: Option<Sender<Command>>,
    wake: Arc<EventFd>,
    yielding: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts serving `queue`, or starts parked.
    pub fn start(
        name: String,
        ram: GuestRam,
        queue: Arc<Mutex<Queue>>,
        notify: EventFd,
        processor: Box<dyn QueueProcessor>,
        signals: Arc<dyn QueueSignals>,
        parked: bool,
    ) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let yielding = Arc::new(AtomicBool::new(false));
        let (commands, inbox) = channel();
        let epoll = Epoll::new()?;
        let events = [Some(notify.as_raw_fd()), Some(wake.as_raw_fd()), processor.completions()];
        for fd in events.into_iter().flatten() {
            let interest = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, fd, interest)?;
        }
        let mut serving = Serving {
            ram,
            queue,
            notify,
            wake: wake.clone(),
            yielding: yielding.clone(),
            epoll,
            inbox,
            processor,
            signals,
        };
        let thread = std::thread::Builder::new()
            // The name holds the disk's, which a user or a stream chose; a zero byte would panic.
            .name(name.replace('\0', ""))
            .stack_size(256 << 10)
            .spawn(move || serving.run(parked))?;
        Ok(Self { commands: Some(commands), wake, yielding, thread: Some(thread) })
    }

    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands
            && commands.send(command).is_ok()
        {
            // A full counter means that the thread is awake.
            let _ = self.wake.write(1);
        }
    }

    /// Tells the thread to start no request until [`Worker::resume`]; does not wait for the one in
    /// flight.
    pub fn park(&self) -> Parking {
        let (done, parked) = channel();
        self.yielding.store(true, Ordering::SeqCst);
        self.send(Command::Park(done));
        Parking(parked)
    }

    /// Tells the thread that it will end soon; dropping the worker ends it.
    pub fn end(&self) {
        self.yielding.store(true, Ordering::SeqCst);
    }

    /// Serves again, whatever is available first.
    pub fn resume(&self) {
        self.yielding.store(false, Ordering::SeqCst);
        self.send(Command::Resume);
    }
}

/// A worker that has been told to park.
pub struct Parking(Receiver<()>);

impl Parking {
    /// Waits until no request is in flight.
    pub fn wait(self) {
        // An error means that the thread has ended, which is as good as parked.
        let _ = self.0.recv();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
        self.commands = None;
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a queue worker panicked");
        }
    }
}

struct Serving {
    ram: GuestRam,
    queue: Arc<Mutex<Queue>>,
    notify: EventFd,
    wake: Arc<EventFd>,
    yielding: Arc<AtomicBool>,
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
        loop {
            self.serve();
            if self.wait().is_none() || self.commands().is_none() {
                return;
            }
        }
    }

    fn serve(&mut self) {
        if self.signals.is_live() {
            let mut host = Host { signals: self.signals.as_ref(), yielding: &self.yielding };
            let served = self.processor.process(&self.ram, &mut lock(&self.queue), &mut host);
            if let Err(reason) = served {
                self.signals.broken(&reason);
            }
        }
        if !self.signals.is_live() {
            self.settle();
        }
    }

    /// Waits until no request is in flight.
    fn settle(&mut self) {
        let mut host = Host { signals: self.signals.as_ref(), yielding: &self.yielding };
        let settled = self.processor.settle(&self.ram, &mut lock(&self.queue), &mut host);
        if let Err(reason) = settled
            && self.signals.is_live()
        {
            self.signals.broken(&reason);
        }
    }

    /// Waits for a notification, a completion or a command.
    fn wait(&self) -> Option<()> {
        let mut events = [EpollEvent::default(); 3];
        loop {
            match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    log::error!("queue worker: {error}");
                    return None;
                }
                Ok(_) => break,
            }
        }
        // Counters are read to zero; what arrives later wakes again.
        let _ = self.notify.read();
        let _ = self.wake.read();
        Some(())
    }

    fn commands(&mut self) -> Option<()> {
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Resume) => {}
                Ok(Command::Park(done)) => {
                    self.settle();
                    let _ = done.send(());
                    self.parked()?;
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
                Command::Park(done) => drop(done.send(())),
            }
        }
    }
}

struct Host<'a> {
    signals: &'a dyn QueueSignals,
    yielding: &'a AtomicBool,
}

impl QueueHost for Host<'_> {
    fn interrupt(&mut self) {
        self.signals.used();
    }

    fn must_yield(&self) -> bool {
        self.yielding.load(Ordering::SeqCst)
    }
}
