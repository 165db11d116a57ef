//! The control connection: frames both ways, one reader, one place that knows why a migration ends.
//!
//! ```text
//! transport ─▶ mig-control (reads, always) ─▶ Inbox: stream | marks | farewell ─▶ whoever waits
//! transport ◀─ Outbox ◀─ any thread; mig-pulse: a keep-alive when there was nothing to say
//! ```
//! **Every wait is an inbox, a limit and the cancel token**, looked at whether or not bytes arrive: a
//! peer that sends keep-alives, or a byte now and then, puts no deadline off.
//!
//! **Proof of life counts for all connections.** Whatever is heard here says that the peer lives; the data
//! connections ask [`Liveness`] before they call a peer that takes its time a dead one.
//!
//! **One place for the cause.** A thread of a participant that fails says so with [`Control::fail`],
//! which ends every wait; [`Control::cause_of`] then tells the driver the reason, whoever met it first.

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

/// A side that has had nothing to say for this long says that it is alive.
pub const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long a side that ends the migration tries to tell the other why, and to hear it.
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
    /// Starts reading from `transport`, on which both sides have said Hello, and saying that this side
    /// lives. `cancel` ends every wait.
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

    /// What is known of the peer's life.
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

    /// Whether the connection has broken, the peer has ended the migration, or is silent for too long:
    /// for who is busy with something long, such as building a machine.
    pub fn is_lost(&self) -> bool {
        self.0.inbox.has_ended() || self.0.liveness.silence() >= self.patience()
    }

    // Sending.

    /// Sends frames, in one write if the connection takes them.
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

    /// Has a frame go out before the next that is sent, in the same write.
    pub fn push(&self, kind: Kind, payload: &[u8]) -> Result<(), WireError> {
        let mut bytes = Vec::new();
        wire::append_frame(&mut bytes, kind, payload)?;
        self.0.outbox.push(&bytes);
        Ok(())
    }

    /// Writes until all that was pushed up to `number` is out. Nobody holds the outbox for longer than
    /// one call of the transport, so a peer that does not read holds up only who has something to say.
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

    /// Tells the peer why this ends. It may be gone already; a cancel does not prevent it.
    pub fn say_farewell(&self, kind: Kind, reason: &str) {
        let mut bytes = Vec::new();
        let sent = wire::append_frame(&mut bytes, kind, wire::fit_reason(reason).as_bytes());
        let sent = sent.and_then(|()| {
            let number = self.0.outbox.push(&bytes);
            self.flush(number, Some(Instant::now() + FAREWELL), false)
        });
        if let Err(error) = sent {
            log::debug!("the other side does not hear why the migration ends: {error}");
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

    /// The next frame in the order of sending. The echo of a mark is out of place meanwhile.
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

    /// The payload of the next frame, which has to be of `kind`.
    pub fn expect(&self, kind: Kind, limit: &Limit) -> Result<Vec<u8>, WireError> {
        let frame = self.next(limit)?;
        if frame.kind == kind {
            return Ok(frame.payload);
        }
        Err(WireError::Unexpected { found: frame.describe(), expected: limit.what })
    }

    /// The next echo of a mark: its number and its channel. Any other frame is out of place meanwhile.
    pub fn next_mark(&self, limit: &Limit) -> Result<(u64, u16), WireError> {
        self.wait(limit, |state| {
            if let Some(mark) = state.next_mark() {
                return Some(Ok(mark));
            }
            let found = state.next_frame()?.describe();
            Some(Err(WireError::Unexpected { found, expected: "the echo of a mark" }))
        })
    }

    /// Waits until the peer says why it ends, closes, or half a second is over. A cancel does not end
    /// this wait: what the peer says explains a failure better than the failure does.
    pub fn hear_farewell(&self) -> Option<Farewell> {
        self.0.inbox.farewell_within(FAREWELL)
    }

    /// From now on the destination's `Ready` of attempts up to this one, which may be under way, counts for
    /// nothing.
    pub fn ignore_ready_up_to(&self, attempt: u32) {
        self.0.inbox.ignore_ready_up_to(attempt);
    }

    /// Whether the next frame in order is one of `kind`, and has come already.
    pub fn is_next(&self, kind: Kind) -> bool {
        self.0.inbox.is_next(kind)
    }

    /// Waits until the peer closes, or half a second is over: it has let go of what it held then.
    pub fn await_close(&self) {
        self.0.inbox.await_end(FAREWELL);
    }

    // Why it ends.

    /// A thread of this migration has failed: ends every wait. The first reason is kept, but a broken
    /// connection gives way to any other, which it may be a consequence of.
    pub fn fail(&self, error: ParticipantError) {
        self.0.inbox.fail(error);
    }

    /// Why this side ends the migration, of which the caller has met `met`: what another of its threads has
    /// failed of, if `met` is only the consequence.
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

    /// Why the migration ends, of which the caller has met `met`: its [own cause](Self::own_cause), or what
    /// the peer says, if that is only the consequence. Waits for the peer's word at most half a second,
    /// and only if a connection has broken.
    pub fn cause_of(&self, met: ParticipantError) -> ParticipantError {
        let met = self.own_cause(met);
        let ended = is_abort(&met);
        if self.is_cancelled() || !met.is_broken() && !ended {
            return met;
        }
        match self.hear_farewell() {
            Some(last) if !ended => WireError::from(last).into(),
            _ => met,
        }
    }

    // The threads.

    /// Reads until the connection ends.
    fn read_all(&self) {
        let Shared { inbox, liveness, .. } = &*self.0;
        loop {
            match self.read_frame() {
                Ok(Frame { kind: Kind::KeepAlive, .. }) => {}
                Ok(frame) => {
                    // A peer that sends more than is looked at waits; that is no silence of its.
                    if !inbox.deliver(frame, || liveness.heard()) {
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

    /// Says every second that this side is alive. A peer that does not read for a while has that in its
    /// buffers: nothing is added to what is still unsent, and no silence of its ends this thread.
    fn pulse(&self, stop: &(Mutex<bool>, Condvar)) {
        let mut wait = KEEP_ALIVE;
        loop {
            let guard = stop.0.lock().unwrap_or_else(PoisonError::into_inner);
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
        *self.stop_pulse.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
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
