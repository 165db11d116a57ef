//! COM1: a 16550, with an eventfd that says when its input FIFO has room again.
//!
//! Register accesses run on the vCPU's thread; the console's reader supplies input, output goes through a
//! [`Transmitter`]. Opening and serving the host side of the console is the caller's job.
//!
//! vm-superio's model does not fit: it writes each byte on the vCPU's thread, is always ready for the next,
//! and keeps its interrupt state private.

use crate::bus::BusDevice;
use crate::irq::IrqLine;
use crate::state::{Persist, at_most};
use crate::transmitter::{self, BUFFER_BYTES, Transmitter};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Bytes that the input FIFO holds.
const FIFO_BYTES: usize = 64;

/// How long a pause waits for the console's thread to write pending output.
const PAUSE_PATIENCE: Duration = Duration::from_millis(50);

/// Receiver buffer when read, transmitter holding register when written; low divisor byte under DLAB.
const DATA: u64 = 0;
/// Interrupt enable register; high divisor byte under DLAB.
const IER: u64 = 1;
const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IER_VALID: u8 = 0x0f;
/// Interrupt identification register; writing goes to the FIFO control register, which is ignored.
const IIR: u64 = 2;
const IIR_NONE: u8 = 1 << 0;
const IIR_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IIR_RECEIVED: u8 = 1 << 2;
/// FIFOs are enabled: what tells a 16550A from older models.
const IIR_FIFO: u8 = 0b11 << 6;
/// Line control register, and its divisor latch access bit.
const LCR: u64 = 3;
const LCR_DLAB: u8 = 1 << 7;
const LCR_8_BITS: u8 = 0b11;
/// Modem control register, and its loopback bit: while that is set no input is taken.
const MCR: u64 = 4;
const MCR_LOOP: u8 = 1 << 4;
const MCR_OUT2: u8 = 1 << 3;
/// Line status register.
const LSR: u64 = 5;
const LSR_DATA_READY: u8 = 1 << 0;
/// The transmitter takes [`crate::transmitter::FIFO_BYTES`] (THRE). TEMT comes with it, although bytes may be
/// buffered: a driver that waits for it would wait for the console's reader.
const LSR_TRANSMITTER_READY: u8 = 1 << 5 | 1 << 6;
/// Modem status register: carrier, ready and clear to send; in loopback mode MCR's outputs.
const MSR: u64 = 6;
const MSR_CONNECTED: u8 = 1 << 7 | 1 << 5 | 1 << 4;
const MSR_LOW: u8 = 0x0f;
/// Scratch register.
const SCR: u64 = 7;
/// The divisor for 9600 bits per second.
const DEFAULT_DIVISOR: [u8; 2] = [12, 0];

/// Registers that only the device changes.
struct Registers {
    divisor: [u8; 2],
    ier: u8,
    lcr: u8,
    mcr: u8,
    msr: u8,
    scratch: u8,
}

impl Default for Registers {
    fn default() -> Self {
        let [ier, scratch] = [0; 2];
        let divisor = DEFAULT_DIVISOR;
        Self { divisor, ier, lcr: LCR_8_BITS, mcr: MCR_OUT2, msr: MSR_CONNECTED, scratch }
    }
}

/// COM1.
pub struct SerialConsole {
    registers: Registers,
    input: VecDeque<u8>,
    transmitter: Arc<Transmitter>,
    attached: AtomicBool,
    irq: Arc<dyn IrqLine>,
    room: Arc<EventFd>,
}

impl SerialConsole {
    /// A console that raises `irq` and sends through `transmitter`. Output is held until
    /// [`Self::release_output`]: another machine may be using the transmitter until then.
    ///
    /// # Errors
    /// If an eventfd cannot be created.
    pub fn new(irq: Arc<dyn IrqLine>, transmitter: Arc<Transmitter>) -> io::Result<Self> {
        let room = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (registers, attached) = (Registers::default(), AtomicBool::new(false));
        Ok(Self { registers, input: VecDeque::new(), transmitter, attached, irq, room })
    }

    fn attach(&self) {
        if !self.attached.swap(true, Ordering::AcqRel) {
            self.transmitter.attach(self.irq.clone());
        }
    }

    /// Signalled whenever the guest has taken input.
    pub fn room_event(&self) -> &EventFd {
        &self.room
    }

    /// Sends what the reader takes without blocking, so that a log is complete; call when the guest is
    /// stopped. The rest is sent later or becomes part of the record.
    pub fn pause(&self) {
        self.transmitter.flush(PAUSE_PATIENCE);
    }

    /// Holds unsent output, which will be saved and sent by another machine.
    pub fn hold_output(&self) {
        self.transmitter.hold();
    }

    /// Releases unsent output: this process runs the guest.
    pub fn release_output(&self) {
        self.attach();
        self.transmitter.release();
    }

    fn loops(&self) -> bool {
        self.registers.mcr & MCR_LOOP != 0
    }

    /// Bytes of input that fit now.
    pub fn input_room(&self) -> usize {
        if self.loops() { 0 } else { FIFO_BYTES - self.input.len() }
    }

    /// Queues input for the guest; returns how many bytes fitted.
    pub fn enqueue_input(&mut self, bytes: &[u8]) -> usize {
        let bytes = &bytes[..self.input_room().min(bytes.len())];
        self.receive(bytes);
        bytes.len()
    }

    fn receive(&mut self, bytes: &[u8]) {
        self.input.extend(bytes);
        if !bytes.is_empty() && self.registers.ier & IER_RECEIVED != 0 {
            self.raise();
        }
    }

    fn raise(&self) {
        transmitter::raise(&*self.irq);
    }

    fn has_received_interrupt(&self) -> bool {
        self.registers.ier & IER_RECEIVED != 0 && !self.input.is_empty()
    }

    /// Raises a pending interrupt again after a pause or restore: one in flight may have been lost, and a
    /// spurious one does no harm.
    pub fn resume(&mut self) {
        if self.has_received_interrupt() || self.transmitter.is_interrupting() {
            self.raise();
        }
    }

    fn signal_room(&self) {
        // Fails only if the counter is full: then the reader is being woken already.
        let _ = self.room.write(1);
    }

    fn read_register(&mut self, offset: u64) -> u8 {
        let dlab = self.registers.lcr & LCR_DLAB != 0;
        match offset {
            DATA if dlab => self.registers.divisor[0],
            IER if dlab => self.registers.divisor[1],
            DATA => {
                let byte = self.input.pop_front();
                self.signal_room();
                // An empty receive buffer reads as 0.
                byte.unwrap_or(0)
            }
            IER => self.registers.ier,
            IIR => {
                if self.has_received_interrupt() {
                    return IIR_FIFO | IIR_RECEIVED;
                }
                if self.transmitter.is_interrupting() {
                    // Reading IIR acknowledges this interrupt only.
                    self.transmitter.acknowledge_interrupt();
                    return IIR_FIFO | IIR_TRANSMITTER_EMPTY;
                }
                IIR_FIFO | IIR_NONE
            }
            LCR => self.registers.lcr,
            MCR => self.registers.mcr,
            LSR => self.line_status(),
            MSR if self.loops() => {
                // DTR, RTS, OUT1 and OUT2 come back as DSR, CTS, RI and DCD.
                let mcr = self.registers.mcr;
                let swapped = (mcr & 1) << 1 | (mcr & 2) >> 1 | mcr & 0b1100;
                self.registers.msr & MSR_LOW | swapped << 4
            }
            MSR => self.registers.msr,
            SCR => self.registers.scratch,
            _ => 0,
        }
    }

    fn line_status(&self) -> u8 {
        let received = if self.input.is_empty() { 0 } else { LSR_DATA_READY };
        let ready = self.loops() || self.transmitter.is_ready();
        received | if ready { LSR_TRANSMITTER_READY } else { 0 }
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        let dlab = self.registers.lcr & LCR_DLAB != 0;
        match offset {
            DATA if dlab => self.registers.divisor[0] = value,
            IER if dlab => self.registers.divisor[1] = value,
            // A byte that does not fit is lost, as on hardware.
            DATA if self.loops() && self.input.len() >= FIFO_BYTES => {}
            DATA if self.loops() => self.receive(&[value]),
            DATA => self.transmitter.push(value),
            IER => {
                self.registers.ier = value & IER_VALID;
                self.transmitter.enable_interrupt(value & IER_TRANSMITTER_EMPTY != 0);
                // Input may have arrived while the interrupt was disabled.
                if self.has_received_interrupt() {
                    self.raise();
                }
            }
            LCR => self.registers.lcr = value,
            MCR => {
                self.registers.mcr = value;
                if value & MCR_LOOP == 0 {
                    // Input was refused in loopback mode: signal that there is room.
                    self.signal_room();
                }
            }
            SCR => self.registers.scratch = value,
            _ => {}
        }
    }
}

impl Drop for SerialConsole {
    fn drop(&mut self) {
        self.transmitter.detach(&self.irq);
    }
}

impl BusDevice for SerialConsole {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte, ..] = data {
            *byte = self.read_register(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            self.write_register(offset, *byte);
        }
    }
}

/// All registers, the input FIFO and unsent output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    divisor_low: u8,
    divisor_high: u8,
    interrupt_enable: u8,
    /// Pending interrupts, enabled or not: bit 1 transmitter empty, bit 2 data received; 1 if none.
    interrupt_identification: u8,
    line_control: u8,
    /// Derived from the other fields; kept for older versions.
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    #[serde(deserialize_with = "at_most::<_, _, FIFO_BYTES>")]
    input_fifo: Vec<u8>,
    /// Added within version 1; absent means that everything was sent. Omitted when empty, so that older
    /// builds accept the record.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "at_most::<_, _, BUFFER_BYTES>"
    )]
    unsent: Vec<u8>,
}

impl Persist for SerialConsole {
    const KIND: &'static str = "serial";
    const VERSION: u16 = 1;
    type State = SerialState;

    fn save(&self) -> SerialState {
        let Registers { divisor: [divisor_low, divisor_high], ier, lcr, mcr, msr, scratch } =
            self.registers;
        let received = if self.has_received_interrupt() { IIR_RECEIVED } else { 0 };
        let empty = if self.transmitter.interrupt_pending() { IIR_TRANSMITTER_EMPTY } else { 0 };
        let pending = received | empty;
        SerialState {
            divisor_low,
            divisor_high,
            interrupt_enable: ier,
            interrupt_identification: if pending == 0 { IIR_NONE } else { pending },
            line_control: lcr,
            line_status: self.line_status(),
            modem_control: mcr,
            modem_status: msr,
            scratch,
            input_fifo: self.input.iter().copied().collect(),
            unsent: self.transmitter.unsent(),
        }
    }

    fn restore(&mut self, state: SerialState) -> Result<(), String> {
        if state.input_fifo.len() > FIFO_BYTES {
            let len = state.input_fifo.len();
            return Err(format!("{len} bytes in an input FIFO of {FIFO_BYTES}"));
        }
        let ier = state.interrupt_enable & IER_VALID;
        self.attach();
        self.transmitter.restore(
            state.unsent,
            ier & IER_TRANSMITTER_EMPTY != 0,
            state.interrupt_identification & IIR_TRANSMITTER_EMPTY != 0,
        )?;
        self.registers = Registers {
            divisor: [state.divisor_low, state.divisor_high],
            ier,
            lcr: state.line_control,
            mcr: state.modem_control,
            msr: state.modem_status,
            scratch: state.scratch,
        };
        self.input = state.input_fifo.into();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
