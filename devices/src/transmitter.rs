//! COM1's transmitter: a bounded buffer between the vCPU that writes bytes and the console's thread that
//! sends them, so that a stalled reader never blocks a vCPU.
//!
//! ```text
//! vCPU: SerialConsole::write -> push -> [ unsent, at most BUFFER_BYTES ] -> begin_write, end_write: console thread
//!                                 |                                                     |
//!                             observer                                    room again: THRE interrupt
//! ```
//!
//! When the buffer is full, the transmitter is not ready: a polling guest waits, and can be stopped, saved
//! and migrated meanwhile. Unsent bytes are part of the device's state. The right to send them moves with
//! the right to run the guest: a [held](Transmitter::hold) transmitter passes nothing to the console. The
//! buffer belongs to the console and outlives the machines that are attached to it in turn.

use crate::irq::IrqLine;
use crate::log_limit::LogLimit;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Capacity of the buffer.
pub const BUFFER_BYTES: usize = 64 << 10;
/// Bytes that a driver may write once THRE is set: a 16550's FIFO.
pub const FIFO_BYTES: usize = 16;
/// How long [`Transmitter::hold`] waits for a write in progress: it is part of a migration's downtime. Only a
/// file on a slow disk takes longer, and bytes passed to it count as sent.
const WRITE_PATIENCE: Duration = Duration::from_millis(5);

static LOST: LogLimit = LogLimit::new();
static IRQ_FAILED: LogLimit = LogLimit::new();

/// Raises COM1's interrupt.
pub(crate) fn raise(irq: &dyn IrqLine) {
    if let Err(error) = irq.raise()
        && let Some(suppressed) = IRQ_FAILED.allow()
    {
        log::warn!("serial interrupt: {error}{suppressed}");
    }
}

/// Called on the vCPU's thread with all output as it is written; must not block.
pub type Observer = Box<dyn FnMut(&[u8]) + Send>;

/// The output buffer and the interrupt that signals room.
pub struct Transmitter {
    state: Mutex<State>,
    /// Signalled when a write ends or there is room.
    changed: Condvar,
    /// Wakes the console's thread.
    wake: EventFd,
    observer: Mutex<Option<Observer>>,
}

#[derive(Default)]
struct State {
    /// Oldest first; the first `in_flight` of them are being written.
    unsent: VecDeque<u8>,
    in_flight: usize,
    /// The console's thread is asleep and must be woken for the next byte.
    asleep: bool,
    held: bool,
    /// The reader currently accepts nothing.
    stuck: bool,
    /// There is no reader: output is dropped.
    discarding: bool,
    closed: bool,
    /// The guest may have seen the transmitter not ready.
    full: bool,
    irq: Option<Arc<dyn IrqLine>>,
    /// IER's THRI bit.
    interrupt_enabled: bool,
    /// The transmitter became ready, and the guest has not read that from IIR yet.
    interrupt_pending: bool,
}

impl State {
    fn is_ready(&self) -> bool {
        self.unsent.len() + FIFO_BYTES <= BUFFER_BYTES
    }

    /// Drops the bytes that are not being written.
    fn drop_waiting(&mut self) {
        self.unsent.truncate(self.in_flight);
    }

    /// Marks the transmitter ready; returns the interrupt to raise after unlocking.
    fn become_ready(&mut self) -> Option<Arc<dyn IrqLine>> {
        self.full = false;
        let was_pending = std::mem::replace(&mut self.interrupt_pending, true);
        if was_pending || !self.interrupt_enabled {
            return None;
        }
        self.irq.clone()
    }

    /// After bytes were removed: like [`Self::become_ready`] if the transmitter was not ready before.
    fn after_sending(&mut self) -> Option<Arc<dyn IrqLine>> {
        if self.full && self.is_ready() { self.become_ready() } else { None }
    }
}

impl Transmitter {
    /// An empty transmitter without a device.
    ///
    /// # Errors
    /// If an eventfd cannot be created.
    pub fn new(observer: Option<Observer>) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            observer: Mutex::new(observer),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        crate::lock(&self.state)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, limit: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    fn observe(&self, bytes: &[u8]) {
        if let Some(observer) = &mut *crate::lock(&self.observer) {
            observer(bytes);
        }
    }

    // The device's side.

    /// Attaches a device; its output is held until [`Self::release`].
    pub(crate) fn attach(&self, irq: Arc<dyn IrqLine>) {
        let mut state = self.state();
        state.irq = Some(irq);
        state.held = true;
        state.interrupt_enabled = false;
        state.interrupt_pending = false;
    }

    /// Detaches the device with this interrupt, unless another has replaced it. Unsent output is still
    /// sent, unless it is held: then it belongs to the machine that got the guest.
    pub(crate) fn detach(&self, irq: &Arc<dyn IrqLine>) {
        let mut state = self.state();
        if !state.irq.as_ref().is_some_and(|attached| Arc::ptr_eq(attached, irq)) {
            return;
        }
        state.irq = None;
        if state.held {
            state.drop_waiting();
        }
    }

    /// Whether the guest may write [`FIFO_BYTES`] now.
    pub fn is_ready(&self) -> bool {
        self.state().is_ready()
    }

    /// Accepts a byte from the guest. Without room it is lost, as on hardware.
    pub(crate) fn push(&self, byte: u8) {
        let mut state = self.state();
        if state.unsent.len() >= BUFFER_BYTES {
            drop(state);
            if let Some(suppressed) = LOST.allow() {
                log::warn!(
                    "serial: the guest writes while the transmitter is not ready{suppressed}"
                );
            }
            return;
        }
        if !state.discarding {
            state.unsent.push_back(byte);
        }
        let wakes = self.wakes(&mut state);
        let irq = if state.is_ready() {
            state.become_ready()
        } else {
            state.full = true;
            state.interrupt_pending = false;
            None
        };
        drop(state);
        if wakes {
            self.wake();
        }
        irq.iter().for_each(|irq| raise(&**irq));
        self.observe(&[byte]);
    }

    /// As [`Self::push`], for a device beside the attached one: it has no interrupt and cannot wait.
    pub(crate) fn push_beside(&self, byte: u8) {
        let mut state = self.state();
        if state.unsent.len() >= BUFFER_BYTES {
            drop(state);
            if let Some(suppressed) = LOST.allow() {
                log::warn!("debug console: the guest writes faster than its reader{suppressed}");
            }
            return;
        }
        if !state.discarding {
            state.unsent.push_back(byte);
        }
        let wakes = self.wakes(&mut state);
        // So that the attached device hears when there is room again.
        state.full |= !state.is_ready();
        drop(state);
        if wakes {
            self.wake();
        }
        self.observe(&[byte]);
    }

    /// Whether the console's thread must be woken.
    fn wakes(&self, state: &mut State) -> bool {
        !state.unsent.is_empty() && !state.held && std::mem::take(&mut state.asleep)
    }

    /// Sets IER's THRI bit; setting it while the transmitter is ready raises an interrupt.
    pub(crate) fn enable_interrupt(&self, enabled: bool) {
        let mut state = self.state();
        state.interrupt_enabled = enabled;
        if !enabled || !state.is_ready() {
            return;
        }
        state.interrupt_pending = false;
        let irq = state.become_ready();
        drop(state);
        irq.iter().for_each(|irq| raise(&**irq));
    }

    /// Whether IIR has to report an empty transmitter.
    pub(crate) fn is_interrupting(&self) -> bool {
        let state = self.state();
        state.interrupt_enabled && state.interrupt_pending
    }

    /// The guest has read the interrupt from IIR, which clears it.
    pub(crate) fn acknowledge_interrupt(&self) {
        self.state().interrupt_pending = false;
    }

    /// Whether the interrupt is pending, enabled or not; for the record.
    pub(crate) fn interrupt_pending(&self) -> bool {
        self.state().interrupt_pending
    }

    /// Bytes that are neither sent nor being written. Stable while the transmitter is held.
    pub fn unsent(&self) -> Vec<u8> {
        let state = self.state();
        state.unsent.iter().skip(state.in_flight).copied().collect()
    }

    /// Restores a record's bytes and interrupt. The device must be attached and held.
    pub(crate) fn restore(
        &self,
        unsent: Vec<u8>,
        interrupt_enabled: bool,
        interrupt_pending: bool,
    ) -> Result<(), String> {
        if unsent.len() > BUFFER_BYTES {
            let len = unsent.len();
            return Err(format!("{len} unsent bytes in a transmitter of {BUFFER_BYTES}"));
        }
        let mut state = self.state();
        if state.in_flight > 0 {
            return Err("the console is still writing another guest's output".into());
        }
        state.unsent = unsent.into();
        state.full = !state.is_ready();
        state.interrupt_enabled = interrupt_enabled;
        state.interrupt_pending = interrupt_pending;
        Ok(())
    }

    /// Holds unsent output: on return no write is in progress that could still send part of what
    /// [`Self::unsent`] returns.
    pub fn hold(&self) {
        self.hold_within(WRITE_PATIENCE);
    }

    fn hold_within(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut state = self.state();
        state.held = true;
        while state.in_flight > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                log::warn!("serial: a write is slow; its bytes count as sent");
                return;
            }
            state = self.wait(state, left);
        }
    }

    /// Releases unsent output to the console.
    pub fn release(&self) {
        let mut state = self.state();
        state.held = false;
        if state.discarding {
            state.drop_waiting();
        }
        drop(state);
        self.wake();
    }

    /// Waits until everything is sent, the reader stalls, or `limit` has passed.
    pub fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = self.state();
        // The reader may accept more now: have the console's thread try again.
        state.stuck = false;
        while !state.unsent.is_empty() && !state.held && !state.stuck && !state.closed {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.wake();
            state = self.wait(state, left);
        }
    }

    /// Appends `bytes` from a producer other than a guest; blocks until there is room.
    ///
    /// # Errors
    /// `BrokenPipe` once the console is closed.
    pub fn write_waiting(&self, mut bytes: &[u8]) -> io::Result<()> {
        // The timeout is a safety net: closing wakes this wait.
        const LOOK: Duration = Duration::from_secs(1);
        while !bytes.is_empty() {
            let mut state = self.state();
            while state.unsent.len() >= BUFFER_BYTES && !state.closed {
                state = self.wait(state, LOOK);
            }
            if state.closed {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let (now, later) = bytes.split_at(bytes.len().min(BUFFER_BYTES - state.unsent.len()));
            if !state.discarding {
                state.unsent.extend(now);
            }
            let wakes = self.wakes(&mut state);
            drop(state);
            if wakes {
                self.wake();
            }
            self.observe(now);
            bytes = later;
        }
        Ok(())
    }

    // The console's side.

    /// Readable when the console's thread has something to do.
    pub fn wake_event(&self) -> &EventFd {
        &self.wake
    }

    /// Wakes the console's thread.
    pub fn wake(&self) {
        // Fails only if the counter is full, and then the thread is awake anyway.
        let _ = self.wake.write(1);
    }

    /// Sets whether output is dropped for lack of a reader. Starting to drop discards pending output.
    pub fn set_discarding(&self, discarding: bool) {
        let mut state = self.state();
        state.discarding = discarding;
        state.stuck = false;
        // Held output belongs to the machine that gets the guest.
        if discarding && !state.held {
            state.drop_waiting();
        }
        self.tell(state);
    }

    /// Copies pending output into `bytes` for a write; `false` if there is none, and then the next byte
    /// signals [`Self::wake_event`]. Each `true` must be followed by [`Self::end_write`].
    pub fn begin_write(&self, bytes: &mut Vec<u8>) -> bool {
        bytes.clear();
        let mut state = self.state();
        if state.unsent.is_empty() || state.held {
            state.asleep = true;
            return false;
        }
        let (first, second) = state.unsent.as_slices();
        bytes.extend_from_slice(first);
        bytes.extend_from_slice(second);
        state.in_flight = bytes.len();
        true
    }

    /// Ends a write of the first `written` bytes; 0 means that the reader accepts none now.
    pub fn end_write(&self, written: usize) {
        let mut state = self.state();
        let gone = written.min(state.unsent.len());
        state.unsent.drain(..gone);
        state.in_flight = 0;
        state.stuck = written == 0;
        if state.discarding && !state.held {
            state.unsent.clear();
        }
        self.tell(state);
    }

    /// Signals the guest and all waiters that the buffer changed.
    fn tell(&self, mut state: MutexGuard<'_, State>) {
        let irq = state.after_sending();
        drop(state);
        irq.iter().for_each(|irq| raise(&**irq));
        self.changed.notify_all();
    }

    /// Closes the console's side: producers get an error.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn with(bytes: &[u8]) -> Arc<Transmitter> {
        let transmitter = Arc::new(Transmitter::new(None).unwrap());
        bytes.iter().for_each(|byte| transmitter.push(*byte));
        transmitter
    }

    #[test]
    fn a_thread_that_found_nothing_is_woken_by_the_next_byte_only() {
        let transmitter = with(b"");
        let mut bytes = Vec::new();
        assert!(!transmitter.begin_write(&mut bytes));
        transmitter.push(b'a');
        assert_eq!(transmitter.wake_event().read().unwrap(), 1);
        transmitter.push(b'b');
        assert!(transmitter.wake_event().read().is_err(), "it is awake");
        assert!(transmitter.begin_write(&mut bytes));
        assert_eq!(bytes, b"ab");
    }

    #[test]
    fn holding_waits_for_the_write_under_way_and_keeps_what_it_left() {
        let transmitter = with(b"abc");
        let mut bytes = Vec::new();
        assert!(transmitter.begin_write(&mut bytes));
        let (telling, told) = channel();
        let holding = transmitter.clone();
        let thread = std::thread::spawn(move || {
            telling.send(()).unwrap();
            holding.hold_within(Duration::from_secs(30));
            holding.unsent()
        });
        told.recv().unwrap();
        transmitter.end_write(2);
        assert_eq!(thread.join().unwrap(), b"c");
    }

    #[test]
    fn a_write_that_hangs_does_not_hold_up_a_hold_and_its_bytes_count_as_sent() {
        let transmitter = with(b"abc");
        assert!(transmitter.begin_write(&mut Vec::new()));
        transmitter.push(b'd');
        let began = Instant::now();
        transmitter.hold();
        assert!(began.elapsed() >= WRITE_PATIENCE);
        assert_eq!(transmitter.unsent(), b"d");
        transmitter.end_write(3);
        assert_eq!(transmitter.unsent(), b"d");
    }

    #[test]
    fn a_flush_ends_when_the_reader_takes_no_more() {
        let transmitter = with(b"abc");
        let flushing = transmitter.clone();
        let thread = std::thread::spawn(move || flushing.flush(Duration::from_secs(60)));
        let mut bytes = Vec::new();
        while transmitter.wake_event().read().is_err() {
            std::thread::yield_now();
        }
        assert!(transmitter.begin_write(&mut bytes));
        transmitter.end_write(0);
        thread.join().unwrap();
        assert_eq!(transmitter.unsent(), b"abc");
    }

    #[test]
    fn without_a_reader_output_is_observed_and_dropped() {
        let (telling, told) = channel();
        let observer: Observer = Box::new(move |bytes| telling.send(bytes.to_vec()).unwrap());
        let transmitter = Transmitter::new(Some(observer)).unwrap();
        transmitter.push(b'a');
        transmitter.set_discarding(true);
        transmitter.push(b'b');
        assert_eq!(transmitter.unsent(), b"");
        transmitter.set_discarding(false);
        transmitter.push(b'c');
        assert_eq!(transmitter.unsent(), b"c");
        assert_eq!(told.try_iter().collect::<Vec<_>>().concat(), b"abc");
    }

    #[test]
    fn a_producer_that_is_no_guest_waits_for_room_until_the_console_closes() {
        let transmitter = with(&[7; BUFFER_BYTES]);
        let writing = transmitter.clone();
        let thread = std::thread::spawn(move || {
            writing.write_waiting(&[8; 100]).unwrap();
            writing.write_waiting(&[9; BUFFER_BYTES]).unwrap_err().kind()
        });
        let mut bytes = Vec::new();
        assert!(transmitter.begin_write(&mut bytes));
        transmitter.end_write(100);
        let mut state = transmitter.state();
        while !(state.unsent.len() == BUFFER_BYTES && state.unsent.back() == Some(&8)) {
            drop(state);
            std::thread::yield_now();
            state = transmitter.state();
        }
        drop(state);
        transmitter.close();
        assert_eq!(thread.join().unwrap(), io::ErrorKind::BrokenPipe);
    }
}
