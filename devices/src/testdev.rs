//! QEMU's pc-testdev (QEMU, `hw/misc/pc-testdev.c`), for kernels that test a KVM or an emulator:
//!
//! ```text
//! port 0xe0 to 0xe3       32 bits of storage, for accesses of any width
//! port 0xe4               QEMU unmaps and maps the page of this address, so that KVM must look it up again
//! port 0x2000 + GSI       interrupt line: any byte but 0 raises its level, 0 lowers it
//! memory at 0xff000000    64 KiB of storage behind MMIO exits
//! ```
//! Each part is a device with a record of its own. The page flush is accepted and does nothing: other threads of this
//! process use the guest's RAM, too, so it stays mapped, and a guest cannot tell but by the time that it takes.

use crate::bus::BusDevice;
use crate::log_limit::LogLimit;
use crate::state::{HexBytes, Persist};
use serde::{Deserialize, Serialize};
use std::io;

/// Interrupt lines: the pins of an IOAPIC.
pub const LINES: u32 = 24;
/// Bytes of storage behind MMIO.
pub const MEMORY_BYTES: usize = 64 << 10;

static LINE_FAILED: LogLimit = LogLimit::new();

/// The storage at port 0xe0, and the page flush behind it.
#[derive(Debug, Default)]
pub struct TestRegister {
    bytes: [u8; Self::BYTES],
}

/// What [`TestRegister`] saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TestRegisterState {
    /// The storage, by port.
    pub bytes: [u8; TestRegister::BYTES],
}

impl TestRegister {
    const BYTES: usize = 4;
    /// Its ports and those of the page flush.
    pub const PORTS: u16 = 8;
}

impl BusDevice for TestRegister {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        load(&self.bytes, offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        store(&mut self.bytes, offset, data);
    }
}

/// Reads storage from `offset` on; zeroes behind its end.
fn load(bytes: &[u8], offset: u64, data: &mut [u8]) {
    let stored = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
    let stored = stored.unwrap_or_default().iter().chain(std::iter::repeat(&0));
    data.iter_mut().zip(stored).for_each(|(to, from)| *to = *from);
}

/// Writes storage from `offset` on, up to its end.
fn store(bytes: &mut [u8], offset: u64, data: &[u8]) {
    let stored = usize::try_from(offset).ok().and_then(|offset| bytes.get_mut(offset..));
    stored.unwrap_or_default().iter_mut().zip(data).for_each(|(to, from)| *to = *from);
}

impl Persist for TestRegister {
    const KIND: &'static str = "testdev-register";
    const VERSION: u16 = 1;
    type State = TestRegisterState;

    fn save(&self) -> TestRegisterState {
        TestRegisterState { bytes: self.bytes }
    }

    fn restore(&mut self, state: TestRegisterState) -> Result<(), String> {
        self.bytes = state.bytes;
        Ok(())
    }
}

/// Interrupt lines with a level.
pub trait Levels: Send {
    /// Raises or lowers the line of `gsi`.
    ///
    /// # Errors
    /// If that is not possible.
    fn set(&self, gsi: u32, high: bool) -> io::Result<()>;
}

/// The interrupt lines at port 0x2000.
pub struct TestLines {
    levels: Box<dyn Levels>,
    /// A bit for each line that is high.
    high: u32,
}

/// What [`TestLines`] saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TestLinesState {
    /// A bit for each line that is high.
    pub high: u32,
}

impl TestLines {
    /// Lines that are all low.
    pub fn new(levels: Box<dyn Levels>) -> Self {
        Self { levels, high: 0 }
    }

    /// Raises those of the high lines again that have a bit in `of`, after a restore: a saved interrupt controller
    /// does not remember which device holds a line. An edge must not be repeated, so `of` has the level-triggered
    /// ones alone.
    pub fn raise_again(&self, of: u32) {
        let again = self.high & of;
        (0..LINES).filter(|gsi| again >> gsi & 1 == 1).for_each(|gsi| self.set(gsi, true));
    }

    fn set(&self, gsi: u32, high: bool) {
        if let Err(error) = self.levels.set(gsi, high)
            && let Some(suppressed) = LINE_FAILED.allow()
        {
            log::warn!("test device: interrupt line {gsi}: {error}{suppressed}");
        }
    }
}

impl BusDevice for TestLines {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let ([value], Ok(gsi)) = (data, u32::try_from(offset)) else { return };
        if gsi >= LINES {
            return;
        }
        let (bit, high) = (1 << gsi, *value != 0);
        // A level that is there already is no new edge.
        if (self.high & bit != 0) != high {
            self.high ^= bit;
            self.set(gsi, high);
        }
    }
}

impl Persist for TestLines {
    const KIND: &'static str = "testdev-lines";
    const VERSION: u16 = 1;
    type State = TestLinesState;

    fn save(&self) -> TestLinesState {
        TestLinesState { high: self.high }
    }

    fn restore(&mut self, state: TestLinesState) -> Result<(), String> {
        if state.high >> LINES != 0 {
            return Err(format!("high lines {:#x}, of {LINES}", state.high));
        }
        self.high = state.high;
        Ok(())
    }
}

/// The storage behind MMIO.
#[derive(Debug)]
pub struct TestMemory {
    bytes: Box<[u8]>,
}

/// What [`TestMemory`] saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TestMemoryState {
    /// The storage up to its last byte that is not 0.
    pub bytes: HexBytes<MEMORY_BYTES>,
}

impl Default for TestMemory {
    fn default() -> Self {
        Self { bytes: vec![0; MEMORY_BYTES].into() }
    }
}

impl BusDevice for TestMemory {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        load(&self.bytes, offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        store(&mut self.bytes, offset, data);
    }
}

impl Persist for TestMemory {
    const KIND: &'static str = "testdev-memory";
    const VERSION: u16 = 1;
    type State = TestMemoryState;

    fn save(&self) -> TestMemoryState {
        let end = self.bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        TestMemoryState { bytes: HexBytes(self.bytes[..end].to_vec()) }
    }

    fn restore(&mut self, state: TestMemoryState) -> Result<(), String> {
        let HexBytes(bytes) = state.bytes;
        self.bytes.fill(0);
        // The type bounds its length.
        self.bytes.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    #[test]
    fn the_register_takes_every_width_at_every_byte() {
        let mut register = TestRegister::default();
        register.write(0, &[1, 2, 3, 4]);
        register.write(1, &[0xaa, 0xbb]);
        register.write(3, &[0xcc]);
        let mut word = [0; 4];
        register.read(0, &mut word);
        assert_eq!(word, [1, 0xaa, 0xbb, 0xcc]);
        let mut two = [0; 2];
        register.read(2, &mut two);
        assert_eq!(two, [0xbb, 0xcc]);
        // Over its end, into the page flush and with the widest access.
        register.write(3, &[5; 8]);
        register.write(4, &[6; 4]);
        register.write(u64::MAX, &[7]);
        let mut eight = [0xff; 8];
        register.read(2, &mut eight);
        assert_eq!(eight, [0xbb, 5, 0, 0, 0, 0, 0, 0]);
        let mut there = TestRegister::default();
        there.restore_record(register.save_record("")).unwrap();
        assert_eq!(there.bytes, [1, 0xaa, 0xbb, 5]);
    }

    struct Told(Sender<(u32, bool)>);

    impl Levels for Told {
        fn set(&self, gsi: u32, high: bool) -> io::Result<()> {
            self.0.send((gsi, high)).unwrap();
            if gsi == 9 { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
        }
    }

    fn lines() -> (TestLines, Receiver<(u32, bool)>) {
        let (sender, told) = channel();
        (TestLines::new(Box::new(Told(sender))), told)
    }

    #[test]
    fn a_line_follows_the_byte_and_a_level_is_told_once() {
        let (mut lines, told) = lines();
        for (gsi, value) in [(14, 1), (14, 0x80), (5, 1), (14, 0), (14, 0), (9, 1)] {
            lines.write(gsi, &[value]);
        }
        // Neither of these is a line.
        lines.write(24, &[1]);
        lines.write(u64::MAX, &[1]);
        lines.write(3, &[1, 1]);
        let all: Vec<_> = told.try_iter().collect();
        assert_eq!(all, [(14, true), (5, true), (14, false), (9, true)]);
        assert_eq!(lines.save().high, 1 << 5 | 1 << 9);
    }

    #[test]
    fn after_a_move_only_level_triggered_lines_are_raised_again() {
        let (mut source, _told) = lines();
        for gsi in [5, 14, 23] {
            source.write(gsi, &[1]);
        }
        let (mut here, told) = lines();
        here.restore_record(source.save_record("")).unwrap();
        assert_eq!(told.try_iter().count(), 0, "the interrupt controllers come first");
        here.raise_again(1 << 14 | 1 << 7);
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [(14, true)]);
        // The edges are high all the same: they can be lowered.
        here.write(5, &[0]);
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [(5, false)]);
        let error = here.restore(TestLinesState { high: 1 << 24 }).unwrap_err();
        assert!(error.contains("0x1000000"), "{error}");
    }

    #[test]
    fn the_memory_moves_whole_and_small_if_it_is_empty() {
        let mut memory = TestMemory::default();
        assert_eq!(memory.save().bytes.0.len(), 0);
        memory.write(0xfff8, &[1, 2, 3, 4, 5, 6, 7, 8]);
        memory.write(0xffff, &[9; 8]);
        memory.write(u64::MAX, &[9]);
        let mut there = TestMemory::default();
        there.write(0, &[0xff]);
        there.restore_record(memory.save_record("")).unwrap();
        let mut data = [0xff; 8];
        there.read(0xfffa, &mut data);
        assert_eq!(data, [3, 4, 5, 6, 7, 9, 0, 0]);
        there.read(0, &mut data);
        assert_eq!(data, [0; 8]);
        let long = format!("{{\"bytes\":\"{}\"}}", "00".repeat(MEMORY_BYTES + 1));
        assert!(serde_json::from_str::<TestMemoryState>(&long).is_err());
    }
}
