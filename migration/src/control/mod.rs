//! The control connection: frames both ways, one reader, one place that knows why a migration ends.
//!
//! ```text
//! transport ─▶ mig-control (the only reader) ─▶ Inbox: stream | marks | farewell ─▶ waiting threads
//! transport ◀─ Outbox ◀─ any thread; mig-pulse: keep-alives while nothing else is sent
//! ```
//! **Every wait is an inbox, a limit and the cancel token**, checked whether or not bytes arrive: a peer
//! that sends keep-alives, or a byte now and then, cannot extend a deadline.
//!
//! **Proof of life counts for all connections.** Any byte received here proves that the peer is alive; data
//! channels check [`Liveness`] before they report a slow peer as dead.
//!
//! **One place for the cause.** A participant's thread reports a failure with [`Control::fail`], which ends
//! every wait; [`Control::cause_of`] then gives the driver the root cause, whichever thread met it first.

mod inbox;
mod outbox;

pub use inbox::{Farewell, Limit};

use crate::cancel::{CancelToken, Registration};
use crate::error::ParticipantError;
use crate::transport::{Liveness, TICK, Transport};
use crate::wire::{self, Frame, HEADER_BYTES, Kind, WireError};
use inbox::Inbox;
use outbox::Outbox;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A side that has sent nothing for this long sends a keep-alive.
pub const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long a side that ends the migration tries to send the reason, and to receive the peer's.
const FAREWELL: Duration = Duration::from_millis(500);

struct Shared {
    transport: Arc<dyn Transport>,
    cancel: CancelToken,
    inbox: Inbox,
    outbox: Outbox,
    liveness: Arc<Liveness>,
}

/// The control connection of one migration. Clones are one connection.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

/// The threads of a control connection. Dropping it ends the connection, then them.
pub struct ControlThreads {
    control: Control,
    stop_pulse: Arc<(Mutex<bool>, Condvar)>,
    threads: Vec<JoinHandle<()>>,
    _wake: Registration,
}

impl Control {
    /// Starts the reader and the keep-alives on `transport`, after Hello in both directions. `cancel` ends
    /// every wait.
    pub fn start(
        transport: Arc<dyn Transport>,
        cancel: CancelToken,
    ) -> io::Result<(Self, ControlThreads)> {
        let shared = Arc::new(Shared {
            transport,
            cancel: cancel.clone(),
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            liveness: Arc::default(),
        });
        let control = Self(shared.clone());
        let wake = cancel.on_cancel(move || shared.inbox.wake());
        let mut threads = ControlThreads {
            control: control.clone(),
            stop_pulse: Arc::default(),
            threads: Vec::with_capacity(2),
            _wake: wake,
        };
        let reading = control.clone();
        threads.spawn("mig-control", move || reading.read_all())?;
        let (beating, stop) = (control.clone(), threads.stop_pulse.clone());
        threads.spawn("mig-pulse", move || beating.pulse(&stop))?;
        Ok((control, threads))
    }

    /// When the peer was last heard.
    pub fn liveness(&self) -> &Arc<Liveness> {
        &self.0.liveness
    }

    /// How long the peer may be silent.
    pub fn patience(&self) -> Duration {
        self.0.transport.patience()
    }

    /// Whether the migration is cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancel.is_cancelled()
    }

    /// Why it is, if somebody has said so.
    pub fn cancel_reason(&self) -> Option<String> {
        self.0.cancel.reason()
    }

    /// Whether the connection broke, the peer ended the migration, or was silent for too long. For callers
    /// in long work that does not wait here, such as building a machine.
    pub fn is_lost(&self) -> bool {
        self.0.inbox.has_ended() || self.0.liveness.silence() >= self.patience()
    }

    // Sending.

    /// Sends frames, in one write if possible.
    pub fn send_all(&self, frames: &[(Kind, &[u8])]) -> Result<(), WireError> {
        let mut bytes = Vec::new();
        for (kind, payload) in frames {
            wire::append_frame(&mut bytes, *kind, payload)?;
        }
        let number = self.0.outbox.push(&bytes);
        self.flush(number, None, true)
    }

    /// Sends one frame.
    pub fn send(&self, kind: Kind, payload: &[u8]) -> Result<(), WireError> {
        self.send_all(&[(kind, payload)])
    }

    /// Queues a frame to go out with the next frame that is sent.
    pub fn push(&self, kind: Kind, payload: &[u8]) -> Result<(), WireError> {
        let mut bytes = Vec::new();
        wire::append_frame(&mut bytes, kind, payload)?;
        self.0.outbox.push(&bytes);
        Ok(())
    }

    /// Writes what was pushed, until it is out.
    pub fn flush_pushed(&self) -> Result<(), WireError> {
        let number = self.0.outbox.pushed();
        self.flush(number, None, true)
    }

    /// Pushes a frame and tries once to write it: for who must not be held up. If another thread is writing
    /// at this moment, that one sends the frame too.
    pub fn try_send(&self, kind: Kind, payload: &[u8]) -> Result<(), WireError> {
        self.push(kind, payload)?;
        let number = self.0.outbox.pushed();
        match self.0.outbox.try_write_some(self.0.transport.as_ref(), number) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(WireError::Lost(error)),
            _ => Ok(()),
        }
    }

    /// Writes until everything pushed up to `number` is out. A peer that does not read blocks only those
    /// who wait for their own bytes to be out.
    fn flush(
        &self,
        number: u64,
        until: Option<Instant>,
        cancellable: bool,
    ) -> Result<(), WireError> {
        let Shared { transport, cancel, inbox, outbox, liveness } = &*self.0;
        let mut moved = Instant::now();
        loop {
            match outbox.write_some(transport.as_ref(), number) {
                Ok(outbox::Progress::Done) => return Ok(()),
                Ok(outbox::Progress::Wrote) => moved = Instant::now(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(WireError::Lost(error)),
            }
            if cancellable && (cancel.is_cancelled() || inbox.has_failed()) {
                return Err(WireError::Interrupted);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Err(WireError::Late { what: "room in the connection", within: FAREWELL });
            }
            liveness.check(moved, transport.patience())?;
        }
    }

    /// Sends the reason why the migration ends. Best effort: the peer may be gone. Not cancellable.
    pub fn say_farewell(&self, kind: Kind, reason: &str) {
        let mut bytes = Vec::new();
        let sent = wire::append_frame(&mut bytes, kind, wire::fit_reason(reason).as_bytes());
        let sent = sent.and_then(|()| {
            let number = self.0.outbox.push(&bytes);
            self.flush(number, Some(Instant::now() + FAREWELL), false)
        });
        if let Err(error) = sent {
            log::debug!("cannot tell the other side why the migration ends: {error}");
        }
    }

    // Waiting.

    fn wait<T>(
        &self,
        limit: &Limit,
        pick: impl FnMut(&mut inbox::State) -> Option<Result<T, WireError>>,
    ) -> Result<T, WireError> {
        let Shared { cancel, inbox, liveness, .. } = &*self.0;
        inbox.wait(limit, cancel, liveness, self.patience(), pick)
    }

    /// The next frame in order. The answer to a mark is an error meanwhile.
    pub fn next(&self, limit: &Limit) -> Result<Frame, WireError> {
        self.wait(limit, |state| {
            if let Some(frame) = state.next_frame() {
                return Some(Ok(frame));
            }
            let (number, channel) = state.next_mark()?;
            let found = format!("mark {number} of channel {channel}");
            Some(Err(WireError::Unexpected { found, expected: limit.what }))
        })
    }

    /// The payload of the next frame, which must be of `kind`.
    pub fn expect(&self, kind: Kind, limit: &Limit) -> Result<Vec<u8>, WireError> {
        let frame = self.next(limit)?;
        if frame.kind == kind {
            return Ok(frame.payload);
        }
        Err(WireError::Unexpected { found: frame.describe(), expected: limit.what })
    }

    /// The next answer to a mark: number and channel. Any other frame is an error meanwhile.
    pub fn next_mark(&self, limit: &Limit) -> Result<(u64, u16), WireError> {
        self.wait(limit, |state| {
            if let Some(mark) = state.next_mark() {
                return Some(Ok(mark));
            }
            let found = state.next_frame()?.describe();
            Some(Err(WireError::Unexpected { found, expected: "the answer to a mark" }))
        })
    }

    /// Waits up to half a second for the peer's reason or its close. Not cancellable: the peer's reason
    /// explains a failure better than the failure itself.
    pub fn hear_farewell(&self) -> Option<Farewell> {
        self.0.inbox.farewell_within(FAREWELL)
    }

    /// Drops `Ready` of attempts up to this one, which may still be in flight.
    pub fn ignore_ready_up_to(&self, attempt: u32) {
        self.0.inbox.ignore_ready_up_to(attempt);
    }

    /// Whether the next frame in order has arrived and is of `kind`.
    pub fn is_next(&self, kind: Kind) -> bool {
        self.0.inbox.is_next(kind)
    }

    /// Waits up to half a second for the peer to close, which it does after releasing its disks.
    pub fn await_close(&self) {
        self.0.inbox.await_end(FAREWELL);
    }

    /// Ends the connection.
    pub fn hang_up(&self) {
        self.0.transport.shutdown();
    }

    // Why it ends.

    /// Reports the failure of a thread: ends every wait. Keeps the first reason, except that a broken
    /// connection replaces an interrupted wait, and any other reason both: those are likely its consequences.
    pub fn fail(&self, error: ParticipantError) {
        self.0.inbox.fail(error);
    }

    /// Root cause on this side of the caller's error `met`: another thread's failure, if `met` is only a
    /// consequence.
    pub fn own_cause(&self, met: ParticipantError) -> ParticipantError {
        match (met, self.0.inbox.take_failure()) {
            (met, None) => met,
            (met, Some(noted)) if met.is_interrupted() => noted,
            // The source may have given up because of what failed here.
            (met, Some(noted)) if (met.is_broken() || is_abort(&met)) && !noted.is_broken() => {
                noted
            }
            (met, Some(_)) => met,
        }
    }

    /// The root cause of the caller's error `met`: [this side's](Self::own_cause), or the peer's reason, if
    /// that is only a consequence. Waits up to half a second for the peer, and only if a connection broke.
    pub fn cause_of(&self, met: ParticipantError) -> ParticipantError {
        let met = self.own_cause(met);
        if self.is_cancelled() || !met.is_broken() {
            return met;
        }
        self.hear_farewell().map_or(met, |last| WireError::from(last).into())
    }

    // The threads.

    /// Reads until the connection ends.
    fn read_all(&self) {
        let Shared { inbox, liveness, .. } = &*self.0;
        loop {
            match self.read_frame() {
                Ok(Frame { kind: Kind::KeepAlive, .. }) => {}
                Ok(frame) => {
                    // While the inbox is full the peer cannot send: that is not silence, for a while.
                    let since = Instant::now();
                    if !inbox.deliver(frame, || liveness.excuse(since, self.patience())) {
                        return;
                    }
                }
                Err(error) => return inbox.end(error),
            }
        }
    }

    fn read_frame(&self) -> Result<Frame, WireError> {
        let mut header = [0; HEADER_BYTES];
        self.read(&mut header)?;
        let (kind, len) = wire::decode_header(&header)?;
        let len = usize::try_from(len).map_err(|_| WireError::Malformed {
            what: "frame header",
            reason: format!("{len} bytes"),
        })?;
        let mut payload = vec![0; len];
        self.read(&mut payload)?;
        Ok(Frame { kind, payload })
    }

    fn read(&self, mut into: &mut [u8]) -> Result<(), WireError> {
        while !into.is_empty() {
            match self.0.transport.receive(into) {
                Ok(0) => return Err(WireError::Lost(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => {
                    self.0.liveness.heard();
                    into = &mut into[count..];
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(WireError::Lost(error)),
            }
        }
        Ok(())
    }

    /// Sends a keep-alive after each second without other frames. If the peer does not read, nothing is
    /// added to the unsent bytes, and the thread carries on.
    fn pulse(&self, stop: &(Mutex<bool>, Condvar)) {
        let mut wait = KEEP_ALIVE;
        loop {
            let guard = devices::lock(&stop.0);
            let waited = stop.1.wait_timeout_while(guard, wait, |stop| !*stop);
            if *waited.unwrap_or_else(PoisonError::into_inner).0 || self.0.inbox.has_ended() {
                return;
            }
            let quiet = self.0.outbox.quiet();
            if quiet < KEEP_ALIVE {
                wait = (KEEP_ALIVE - quiet).max(TICK);
                continue;
            }
            wait = KEEP_ALIVE;
            match self.0.outbox.keep_alive(self.0.transport.as_ref()) {
                Err(error)
                    if !matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) =>
                {
                    return;
                }
                _ => {}
            }
        }
    }
}

fn is_abort(error: &ParticipantError) -> bool {
    matches!(error, ParticipantError::Wire(WireError::Aborted(_)))
}

impl ControlThreads {
    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread =
            std::thread::Builder::new().name(name.into()).stack_size(64 << 10).spawn(work)?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for ControlThreads {
    fn drop(&mut self) {
        *devices::lock(&self.stop_pulse.0) = true;
        self.stop_pulse.1.notify_all();
        self.control.0.transport.shutdown();
        self.control.0.inbox.close();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of the control connection panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests;
