//! Ports through which a guest ends or restarts itself: the keyboard controller's reset line, system control
//! port A, QEMU's isa-debug-exit, and the PM1a control register. Only system control port A has state worth saving.

use crate::bus::BusDevice;
use crate::state::Persist;
use serde::{Deserialize, Serialize};

/// How the guest asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestExit {
    /// Restart.
    Reset,
    /// End.
    PowerOff,
    /// End with a code: the VMM exits with `(value << 1) | 1`.
    DebugExit(u32),
    /// The guest has panicked, and says so.
    Panicked,
}

/// Called on the vCPU's thread when the guest asks to end.
pub type ExitSink = Box<dyn Fn(GuestExit) + Send>;

/// Keyboard controller at ports 0x60 to 0x64; of its commands only the CPU reset.
pub struct I8042(ExitSink);

impl I8042 {
    const COMMAND_OFFSET: u64 = 4;
    /// Pulses the CPU's reset line.
    pub const COMMAND_RESET_CPU: u8 = 0xfe;

    /// A controller that reports to `sink`.
    pub fn new(sink: ExitSink) -> Self {
        Self(sink)
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        // Status: both buffers empty, so that a guest never waits before its reset command.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == Self::COMMAND_OFFSET && data.first() == Some(&Self::COMMAND_RESET_CPU) {
            (self.0)(GuestExit::Reset);
        }
    }
}

/// System control port A, 0x92: resets the CPU, and keeps the A20 gate's bit. The gate is always open.
pub struct FastReset {
    sink: ExitSink,
    value: u8,
}

/// What [`FastReset`] saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FastResetState {
    /// What the port reads as.
    pub value: u8,
}

impl FastReset {
    const RESET: u8 = 1;
    const A20: u8 = 1 << 1;

    /// A port that reports to `sink`, as a BIOS leaves it: with A20 on.
    pub fn new(sink: ExitSink) -> Self {
        Self { sink, value: Self::A20 }
    }
}

impl BusDevice for FastReset {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(self.value);
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        let [value] = *data else { return };
        self.value = value & !Self::RESET;
        if value & Self::RESET != 0 {
            (self.sink)(GuestExit::Reset);
        }
    }
}

impl Persist for FastReset {
    const KIND: &'static str = "fast-reset";
    const VERSION: u16 = 1;
    type State = FastResetState;

    fn save(&self) -> FastResetState {
        FastResetState { value: self.value }
    }

    fn restore(&mut self, state: FastResetState) -> Result<(), String> {
        self.value = state.value & !Self::RESET;
        Ok(())
    }
}

/// isa-debug-exit.
pub struct DebugExitPort(ExitSink);

impl DebugExitPort {
    /// A port that reports to `sink`.
    pub fn new(sink: ExitSink) -> Self {
        Self(sink)
    }
}

impl BusDevice for DebugExitPort {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        // As in QEMU, every one of its ports does.
        let value = data.iter().rev().fold(0u32, |value, byte| value << 8 | u32::from(*byte));
        (self.0)(GuestExit::DebugExit(value));
    }
}

/// PM1a control register (ACPI 6.5, 4.8.3.2.1): SLP_EN with the sleep type of S5 powers off.
pub struct PowerPort(ExitSink);

impl PowerPort {
    const SLP_EN: u16 = 1 << 13;
    /// Sleep types that mean S5: ours and QEMU's is 0; Bochs and many test kernels write 5.
    const SLP_TYP_S5: [u16; 2] = [0, 5];

    /// A register that reports to `sink`.
    pub fn new(sink: ExitSink) -> Self {
        Self(sink)
    }
}

impl BusDevice for PowerPort {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let [low, high] = *data else { return };
        let value = u16::from(high) << 8 | u16::from(low);
        let sleep_type = value >> 10 & 7;
        if offset == 0 && value & Self::SLP_EN != 0 && Self::SLP_TYP_S5.contains(&sleep_type) {
            (self.0)(GuestExit::PowerOff);
        }
    }
}

/// Sleep control and status registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7), a byte each.
pub struct SleepControl(ExitSink);

impl SleepControl {
    /// What the `\_S5` object tells the guest to write as its sleep type.
    pub const SLP_TYP_S5: u8 = 5;
    const SLP_EN: u8 = 1 << 5;
    const SLP_TYP_SHIFT: u8 = 2;

    /// Registers that report to `sink`.
    pub fn new(sink: ExitSink) -> Self {
        Self(sink)
    }
}

impl BusDevice for SleepControl {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 && data == [Self::SLP_EN | Self::SLP_TYP_S5 << Self::SLP_TYP_SHIFT] {
            (self.0)(GuestExit::PowerOff);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    fn sink() -> (ExitSink, Receiver<GuestExit>) {
        let (sender, receiver) = channel();
        (Box::new(move |exit| sender.send(exit).unwrap()), receiver)
    }

    #[test]
    fn only_the_reset_command_resets() {
        let (sink, exits) = sink();
        let mut i8042 = I8042::new(sink);
        i8042.write(0, &[0xfe]);
        i8042.write(4, &[0xd1]);
        assert!(exits.try_recv().is_err());
        i8042.write(4, &[0xfe]);
        assert_eq!(exits.try_recv(), Ok(GuestExit::Reset));
    }

    #[test]
    fn debug_exit_takes_any_width_at_any_of_its_ports() {
        let (sink, exits) = sink();
        let mut port = DebugExitPort::new(sink);
        port.write(0, &[3]);
        port.write(0, &[1, 2, 0, 0]);
        port.write(3, &[9]);
        assert_eq!(exits.try_recv(), Ok(GuestExit::DebugExit(3)));
        assert_eq!(exits.try_recv(), Ok(GuestExit::DebugExit(0x201)));
        assert_eq!(exits.try_recv(), Ok(GuestExit::DebugExit(9)));
    }

    #[test]
    fn system_control_port_a_resets_and_keeps_the_gates_bit() {
        let (sink, exits) = sink();
        let mut port = FastReset::new(sink);
        let mut byte = [0];
        port.read(0, &mut byte);
        assert_eq!(byte, [2], "A20 is on");
        port.write(0, &[0x0c]);
        port.write(0, &[1, 1]);
        assert!(exits.try_recv().is_err(), "no reset bit, then a word");
        let record = port.save_record("");
        port.write(0, &[3]);
        assert_eq!(exits.try_recv(), Ok(GuestExit::Reset));
        port.restore_record(record).unwrap();
        port.read(0, &mut byte);
        assert_eq!(byte, [0x0c]);
    }

    #[test]
    fn power_off_needs_sleep_enable_and_s5() {
        let (sink, exits) = sink();
        let mut port = PowerPort::new(sink);
        port.write(0, &[0, 0x14]);
        port.write(0, &[0, 0x24]);
        assert!(exits.try_recv().is_err(), "no SLP_EN, then S1");
        port.write(0, &[0, 0x20]);
        port.write(0, &[0, 0x34]);
        assert_eq!(exits.try_iter().count(), 2);
    }

    #[test]
    fn the_sleep_register_knows_s5_alone() {
        let (sink, exits) = sink();
        let mut sleep = SleepControl::new(sink);
        sleep.write(0, &[0x14]);
        sleep.write(0, &[0x20]);
        sleep.write(1, &[0x34]);
        sleep.write(0, &[0x34, 0]);
        assert!(exits.try_recv().is_err(), "no enable bit, S0, the status register, two bytes");
        sleep.write(0, &[0x34]);
        assert_eq!(exits.try_recv(), Ok(GuestExit::PowerOff));
    }
}
