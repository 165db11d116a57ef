//! The main thread's event loop: messages from other threads, the control socket, signals and `--timeout`.
//! Its [`Handler`] is the supervisor, which owns a machine, or the shuttle, which owns child processes.

use crate::control::{ClientId, ControlError, ControlServer, Event, Incoming, QmpResult};
use crate::exit_code::Exit;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::cell::RefCell;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

const TOKEN_MAILBOX: u32 = 0;
const TOKEN_CONTROL: u32 = 1;
const TOKEN_SIGNAL: u32 = 2;
const TOKEN_TIMEOUT: u32 = 3;
const TOKEN_ALARM: u32 = 4;
const TOKEN_CLIENTS: u32 = 16;

/// The sending half of an event loop's messages; cheap to clone.
pub struct Mailbox<M> {
    sender: Sender<M>,
    wake: Arc<EventFd>,
}

impl<M> Clone for Mailbox<M> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), wake: self.wake.clone() }
    }
}

impl<M> Mailbox<M> {
    /// Posts a message; ignored if the event loop has ended.
    pub fn post(&self, message: M) {
        if self.sender.send(message).is_ok() {
            // Fails only if the counter is full, and then the loop is awake.
            let _ = self.wake.write(1);
        }
    }
}

/// A mailbox and its receiving end.
fn mailbox<M>() -> io::Result<(Mailbox<M>, Receiver<M>)> {
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let (sender, inbox) = channel();
    Ok((Mailbox { sender, wake }, inbox))
}

/// A mailbox without an event loop.
#[cfg(test)]
pub fn mailbox_for_test<M>() -> (Mailbox<M>, Receiver<M>) {
    mailbox().unwrap()
}

/// Handles the events of an [`EventLoop`].
pub trait Handler {
    /// Messages from other threads.
    type Message;
    /// The event loop, owned by the handler.
    fn event_loop(&mut self) -> &mut EventLoop<Self::Message>;
    /// A thread has posted a message.
    fn on_message(&mut self, message: Self::Message);
    /// A client has sent a request; reply through [`EventLoop::reply`], now or later.
    fn on_request(&mut self, request: Incoming);
    /// A client of the control socket has gone.
    fn on_client_gone(&mut self, _: ClientId) {}
    /// SIGINT or SIGTERM has arrived.
    fn on_signal(&mut self);
    /// `--timeout` has passed.
    fn on_timeout(&mut self);
    /// The time set with [`EventLoop::set_alarm`] has passed.
    fn on_alarm(&mut self) {}
    /// The process is about to end.
    fn shut_down(&mut self);
}

/// The state of an event loop.
pub struct EventLoop<M> {
    mailbox: Mailbox<M>,
    inbox: Receiver<M>,
    control: Option<ControlServer>,
    signals: UnixStream,
    timeout: Option<TimerFd>,
    alarm: TimerFd,
    clients: Vec<(ClientId, RawFd, bool)>,
    exit: Option<Exit>,
}

impl<M> EventLoop<M> {
    /// Binds the control socket, installs the signal handlers and starts the timeout.
    pub fn open(control: Option<&Path>, timeout: Option<Duration>) -> Result<Self, EventLoopError> {
        let control = control.map(ControlServer::bind).transpose()?;
        let (mailbox, inbox) = mailbox()?;
        let (signals, signalled) = UnixStream::pair()?;
        for signal in [SIGINT, SIGTERM] {
            signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
        }
        let timeout = timeout.map(timer).transpose()?;
        let alarm = TimerFd::new().map_err(io::Error::from)?;
        let clients = Vec::new();
        Ok(Self { mailbox, inbox, control, signals, timeout, alarm, clients, exit: None })
    }

    /// The mailbox for other threads.
    pub fn mailbox(&self) -> &Mailbox<M> {
        &self.mailbox
    }

    /// Sends an event to every client.
    pub fn broadcast(&mut self, event: &Event) {
        if let Some(control) = &mut self.control {
            control.broadcast(event);
        }
    }

    /// Replies to a request.
    pub fn reply(&mut self, request: &Incoming, result: QmpResult) {
        if let Some(control) = &mut self.control {
            control.reply(request.client, request.id.clone(), result);
        }
    }

    /// Calls [`Handler::on_alarm`] once, after `duration`.
    pub fn set_alarm(&mut self, duration: Duration) {
        // Zero would disarm it.
        let duration = duration.max(Duration::from_nanos(1));
        if let Err(error) = self.alarm.reset(duration, None) {
            log::error!("cannot set the alarm: {error}");
        }
    }

    /// Ends the loop, unless it is ending already.
    pub fn end(&mut self, exit: Exit) {
        self.exit.get_or_insert(exit);
    }

    fn read_mail(&self) -> Option<M> {
        self.inbox.try_recv().ok()
    }

    fn accept(&mut self, ops: &mut EventOps<'_>) {
        let Some(control) = &mut self.control else { return };
        match control.accept() {
            Ok(Some(id)) => {
                if let Some(fd) = control.client_fd(id) {
                    let token = TOKEN_CLIENTS + id.0;
                    let _ = ops.add(Events::with_data_raw(fd, token, EventSet::IN));
                    self.clients.push((id, fd, false));
                }
            }
            Ok(None) => {}
            Err(error) => log::warn!("control client: {error}"),
        }
    }

    fn requests(&mut self, id: ClientId, events: EventSet) -> Vec<Incoming> {
        let Some(control) = &mut self.control else { return Vec::new() };
        if events.contains(EventSet::OUT) {
            control.on_writable(id);
        }
        if events.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
            return control.on_readable(id);
        }
        Vec::new()
    }

    /// Whether a client is connected.
    pub fn has_client(&self, id: ClientId) -> bool {
        self.control.as_ref().is_some_and(|control| control.client_fd(id).is_some())
    }

    /// Updates the watched descriptors to match the connected clients; returns those that have gone.
    fn watch_clients(&mut self, ops: &mut EventOps<'_>) -> Vec<ClientId> {
        let mut gone = Vec::new();
        let Some(control) = &mut self.control else { return gone };
        self.clients.retain_mut(|(id, fd, writing)| {
            if control.client_fd(*id) != Some(*fd) {
                // Adding it may have failed.
                let _ = ops.remove(Events::empty_raw(*fd));
                gone.push(*id);
                return false;
            }
            let wants = control.wants_write(*id);
            if std::mem::replace(writing, wants) != wants {
                let interest = if wants { EventSet::IN | EventSet::OUT } else { EventSet::IN };
                let token = TOKEN_CLIENTS + id.0;
                let _ = ops.modify(Events::with_data_raw(*fd, token, interest));
            }
            true
        });
        control.close_gone();
        gone
    }
}

/// An event loop that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum EventLoopError {
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A descriptor could not be created.
    #[error("cannot start the event loop")]
    Start(#[from] io::Error),
}

fn timer(duration: Duration) -> io::Result<TimerFd> {
    let mut timer = TimerFd::new()?;
    // Zero would disarm it.
    timer.reset(duration.max(Duration::from_nanos(1)), None)?;
    Ok(timer)
}

/// Runs the event loop until the handler ends it.
pub fn serve<C: Handler + 'static>(handler: C) -> Result<Exit, EventLoopError> {
    let failed = |error: event_manager::Error| EventLoopError::Start(io::Error::other(error));
    let mut manager = EventManager::new().map_err(failed)?;
    let subscriber = Rc::new(RefCell::new(Subscriber(handler)));
    manager.add_subscriber(subscriber.clone());
    loop {
        let exit = subscriber.borrow_mut().0.event_loop().exit.take();
        if let Some(exit) = exit {
            subscriber.borrow_mut().0.shut_down();
            return Ok(exit);
        }
        manager.run().map_err(failed)?;
    }
}

struct Subscriber<C>(C);

impl<C: Handler> MutEventSubscriber for Subscriber<C> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let event_loop = self.0.event_loop();
        let mut add = |fd: RawFd, token: u32| {
            if let Err(error) = ops.add(Events::with_data_raw(fd, token, EventSet::IN)) {
                log::error!("event loop: {error}");
            }
        };
        add(event_loop.mailbox.wake.as_raw_fd(), TOKEN_MAILBOX);
        add(event_loop.signals.as_raw_fd(), TOKEN_SIGNAL);
        if let Some(timeout) = &event_loop.timeout {
            add(timeout.as_raw_fd(), TOKEN_TIMEOUT);
        }
        add(event_loop.alarm.as_raw_fd(), TOKEN_ALARM);
        if let Some(control) = &event_loop.control {
            add(control.fd(), TOKEN_CONTROL);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let handler = &mut self.0;
        match events.data() {
            TOKEN_MAILBOX => {
                // Read first: a later message wakes the loop again.
                let _ = handler.event_loop().mailbox.wake.read();
                while let Some(message) = handler.event_loop().read_mail() {
                    handler.on_message(message);
                }
            }
            TOKEN_SIGNAL => {
                // One byte per signal; how many does not matter.
                let _ = (&handler.event_loop().signals).read(&mut [0; 16]);
                handler.on_signal();
            }
            TOKEN_TIMEOUT => {
                // Clears the expiry, so that the timer is not readable any more.
                let _ = handler.event_loop().timeout.as_mut().map(TimerFd::wait);
                handler.on_timeout();
            }
            TOKEN_ALARM => {
                // Clears the expiry, so that the timer is not readable any more.
                let _ = handler.event_loop().alarm.wait();
                handler.on_alarm();
            }
            TOKEN_CONTROL => handler.event_loop().accept(ops),
            token => {
                if let Some(id) = token.checked_sub(TOKEN_CLIENTS) {
                    for request in handler.event_loop().requests(ClientId(id), events.event_set()) {
                        handler.on_request(request);
                    }
                }
            }
        }
        for id in handler.event_loop().watch_clients(ops) {
            handler.on_client_gone(id);
        }
    }
}
