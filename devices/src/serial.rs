//! COM1: a 16550 over vm-superio, with an eventfd that says when its input FIFO has room again.
//!
//! The registers are served on the vCPU's thread, input is brought by whoever reads the console.
//! Opening and reading the console's other end is the caller's; so is choosing an output that does
//! not block for ever, such as [`crate::patient::PatientWriter`].

use crate::bus::BusDevice;
use crate::irq::IrqLine;
use crate::state::Persist;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::sync::Arc;
use vm_superio::serial::{SerialEvents, SerialState as Registers};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Bytes that the input FIFO holds.
const FIFO_BYTES: usize = 64;
/// Modem control register, and its loopback bit: while that is set no input is taken.
const MCR_OFFSET: u64 = 4;
const MCR_LOOP: u8 = 1 << 4;

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.raise()
    }
}

struct RoomAgain(Arc<EventFd>);

impl SerialEvents for RoomAgain {
    fn buffer_read(&self) {
        // A full counter means that the reader has yet to look.
        let _ = self.0.write(1);
    }
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        let _ = self.0.write(1);
    }
}

/// The output; a failing one must never stop the guest.
struct Output {
    writer: Box<dyn Write + Send>,
    lost_bytes: u64,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.writer.write_all(bytes) {
            if self.lost_bytes == 0 {
                log::error!("serial output is being lost: {error}");
            }
            self.lost_bytes += u64::try_from(bytes.len()).unwrap_or(0);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // A failure to flush was or will be reported by a write.
        let _ = self.writer.flush();
        Ok(())
    }
}

/// COM1.
pub struct SerialConsole {
    serial: Serial<Line, RoomAgain, Output>,
    irq: Arc<dyn IrqLine>,
    room: Arc<EventFd>,
}

impl SerialConsole {
    /// A console that raises `irq` and writes to `output`.
    ///
    /// # Errors
    /// If the host gives no eventfd.
    pub fn new(irq: Arc<dyn IrqLine>, output: Box<dyn Write + Send>) -> io::Result<Self> {
        let room = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let output = Output { writer: output, lost_bytes: 0 };
        let events = RoomAgain(room.clone());
        Ok(Self { serial: Serial::with_events(Line(irq.clone()), events, output), irq, room })
    }

    /// Signalled whenever the guest has taken input.
    pub fn room_event(&self) -> &EventFd {
        &self.room
    }

    /// Bytes of input that fit now.
    pub fn input_room(&self) -> usize {
        let looped = self.serial.state().modem_control & MCR_LOOP != 0;
        if looped { 0 } else { self.serial.fifo_capacity() }
    }

    /// Bytes that the guest wrote and the output did not take.
    pub fn lost_output_bytes(&self) -> u64 {
        self.serial.writer().lost_bytes
    }

    /// Gives the guest input; returns how many bytes fitted.
    pub fn enqueue_input(&mut self, bytes: &[u8]) -> usize {
        let bytes = bytes.get(..self.input_room().min(bytes.len())).unwrap_or_default();
        match self.serial.enqueue_raw_bytes(bytes) {
            Ok(count) => count,
            Err(error) => {
                // The bytes are in the FIFO; only the interrupt could not be raised.
                log::warn!("serial input: {error:?}");
                bytes.len()
            }
        }
    }

    /// Raises the interrupt again after a pause or restore: one in flight may have been lost, and one
    /// too many does no harm.
    pub fn resume(&mut self) {
        let pending = self.serial.state().interrupt_identification & 1 == 0;
        if pending && let Err(error) = self.irq.raise() {
            log::warn!("serial interrupt: {error}");
        }
    }
}

impl BusDevice for SerialConsole {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([byte, ..], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.serial.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let ([byte], Ok(register)) = (data, u8::try_from(offset)) else { return };
        if let Err(error) = self.serial.write(register, *byte) {
            log::debug!("serial write: {error:?}");
        }
        if offset == MCR_OFFSET && byte & MCR_LOOP == 0 {
            // Input that was turned away in loopback mode may come again; nothing else says so.
            let _ = self.room.write(1);
        }
    }
}

/// All registers and the input FIFO.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    divisor_low: u8,
    divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input_fifo: Vec<u8>,
}

impl Persist for SerialConsole {
    const KIND: &'static str = "serial";
    const VERSION: u16 = 1;
    type State = SerialState;

    fn save(&self) -> SerialState {
        let state = self.serial.state();
        SerialState {
            divisor_low: state.baud_divisor_low,
            divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input_fifo: state.in_buffer,
        }
    }

    fn restore(&mut self, state: SerialState) -> Result<(), String> {
        if state.input_fifo.len() > FIFO_BYTES {
            let len = state.input_fifo.len();
            return Err(format!("{len} bytes in an input FIFO of {FIFO_BYTES}"));
        }
        let registers = Registers {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input_fifo,
        };
        // vm-superio makes a device from a state only by value: the output moves over.
        let nowhere = Output { writer: Box::new(io::sink()), lost_bytes: 0 };
        let output = std::mem::replace(self.serial.writer_mut(), nowhere);
        let events = RoomAgain(self.room.clone());
        match Serial::from_state(&registers, Line(self.irq.clone()), events, output) {
            Ok(serial) => {
                self.serial = serial;
                Ok(())
            }
            Err(error) => Err(format!("{error:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hostile::{any_changes, any_json, change};
    use crate::irq::CountingIrq;
    use proptest::prelude::*;
    use std::sync::Mutex;

    fn console() -> (SerialConsole, Arc<CountingIrq>) {
        let irq = Arc::new(CountingIrq::default());
        (SerialConsole::new(irq.clone(), Box::new(io::sink())).unwrap(), irq)
    }

    fn read(console: &mut SerialConsole, offset: u64) -> u8 {
        let mut byte = [0];
        console.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn input_and_registers_survive_a_move() {
        let (mut source, _) = console();
        source.write(1, &[1]);
        source.write(7, &[0x5a]);
        assert_eq!(source.enqueue_input(b"hi"), 2);
        let (mut destination, irq) = console();
        destination.restore_record(source.save_record("")).unwrap();
        destination.resume();
        assert!(irq.count() > 0, "the interrupt in flight is raised again");
        assert_eq!(read(&mut destination, 7), 0x5a);
        assert_eq!([read(&mut destination, 0), read(&mut destination, 0)], *b"hi");
    }

    #[test]
    fn a_full_fifo_takes_no_more_and_says_when_it_has_room() {
        let (mut console, _) = console();
        assert_eq!(console.enqueue_input(&[7; 100]), FIFO_BYTES);
        assert_eq!(console.enqueue_input(&[7]), 0);
        let _ = console.room_event().read();
        read(&mut console, 0);
        assert!(console.room_event().read().is_ok());
        assert_eq!(console.enqueue_input(&[7]), 1);
    }

    #[test]
    fn an_overfull_fifo_in_a_record_is_refused() {
        let (mut console, _) = console();
        let mut state = console.save();
        state.input_fifo = vec![0; FIFO_BYTES + 1];
        assert!(console.restore(state).is_err());
    }

    #[test]
    fn output_that_fails_does_not_stop_the_guest() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let irq = Arc::new(CountingIrq::default());
        let mut console = SerialConsole::new(irq, Box::new(Full)).unwrap();
        console.write(0, b"x");
        console.write(0, b"y");
        assert_eq!(read(&mut console, 5) & 0x20, 0x20, "the transmitter is empty again");
        assert_eq!(console.lost_output_bytes(), 2);
    }

    #[test]
    fn output_goes_on_to_the_same_place_after_a_restore() {
        #[derive(Clone, Default)]
        struct Log(Arc<Mutex<Vec<u8>>>);
        impl Write for Log {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                crate::lock(&self.0).extend(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let log = Log::default();
        let irq = Arc::new(CountingIrq::default());
        let mut destination = SerialConsole::new(irq, Box::new(log.clone())).unwrap();
        destination.restore(console().0.save()).unwrap();
        destination.write(0, b"x");
        assert_eq!(*crate::lock(&log.0), b"x");
    }

    #[test]
    fn input_waits_for_the_end_of_loopback_mode() {
        let (mut console, _) = console();
        console.write(MCR_OFFSET, &[MCR_LOOP]);
        assert_eq!((console.input_room(), console.enqueue_input(b"hi")), (0, 0));
        assert!(console.room_event().read().is_err());
        console.write(MCR_OFFSET, &[0]);
        assert!(console.room_event().read().is_ok(), "whoever has input is told to try again");
        assert_eq!(console.enqueue_input(b"hi"), 2);
    }

    proptest! {
        #[test]
        fn any_access_is_survived_and_what_it_leaves_moves(
            accesses in prop::collection::vec((0u64..10, any::<u8>(), 0..3), 0..200)
        ) {
            let (mut source, _) = console();
            for (offset, value, kind) in accesses {
                match kind {
                    0 => source.write(offset, &[value]),
                    1 => drop(source.enqueue_input(&vec![value; value.into()])),
                    _ => drop(read(&mut source, offset)),
                }
            }
            let (mut destination, _) = console();
            destination.restore_record(source.save_record("")).unwrap();
            destination.resume();
            prop_assert_eq!(destination.save(), source.save());
        }

        #[test]
        fn any_record_is_survived(changes in any_changes(), other in prop::option::of(any_json())) {
            let (mut console, _) = console();
            console.enqueue_input(b"hi");
            let mut record = console.save_record("");
            match other {
                Some(other) => record.state = other,
                None => change(&mut record.state, &changes),
            }
            if console.restore_record(record).is_ok() {
                console.resume();
            }
            for register in 0..8 {
                read(&mut console, register);
                console.write(register, &[0xff]);
            }
        }
    }
}
