//! Dispatches an access to the device at its address. There is one bus for port I/O and one for MMIO; they
//! are filled when the machine is built and immutable while it runs, so that vCPUs look up without a lock.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// A device that the guest reaches by address.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes at `offset` from the device's base.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` from the device's base.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A range that cannot be registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Empty, or past the end of the address space.
    #[error("bus range {base:#x}+{len:#x} is empty or wraps around")]
    Range { base: u64, len: u64 },
    /// Another device is there.
    #[error("bus range {base:#x}+{len:#x} overlaps another device")]
    Overlap { base: u64, len: u64 },
}

struct Slot {
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Address ranges and their devices.
#[derive(Default)]
pub struct Bus {
    slots: BTreeMap<u64, Slot>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + len`.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let end = base.checked_add(len).filter(|_| len > 0).ok_or(BusError::Range { base, len })?;
        let below = self.slots.range(..end).next_back();
        if below.is_some_and(|(start, slot)| start + slot.len > base) {
            return Err(BusError::Overlap { base, len });
        }
        self.slots.insert(base, Slot { len, device });
        Ok(())
    }

    /// The device at `address`, the offset there, and how many bytes from there on are its own.
    fn find(&self, address: u64) -> Option<(&Slot, u64, usize)> {
        let (base, slot) = self.slots.range(..=address).next_back()?;
        let offset = address - base;
        let left = slot.len.checked_sub(offset).filter(|left| *left > 0)?;
        Some((slot, offset, usize::try_from(left).unwrap_or(usize::MAX)))
    }

    /// Reads; returns false if no device is at `address`. Bytes that no device has are ones; an access over a
    /// device's end reaches it with its own bytes, and the next device with the others.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((slot, offset, own)) = self.find(address) else { return false };
        let (own, others) = data.split_at_mut(own.min(data.len()));
        crate::lock(&slot.device).read(offset, own);
        if !others.is_empty() {
            self.read(address.saturating_add(own.len() as u64), others);
        }
        true
    }

    /// Writes, as [`Self::read`]; returns false if no device is at `address`.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((slot, offset, own)) = self.find(address) else { return false };
        let (own, others) = data.split_at(own.min(data.len()));
        crate::lock(&slot.device).write(offset, own);
        if !others.is_empty() {
            self.write(address.saturating_add(own.len() as u64), others);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u64);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&mut self, offset: u64, _: &[u8]) {
            self.0 = offset;
        }
    }

    fn echo() -> Arc<Mutex<Echo>> {
        Arc::new(Mutex::new(Echo(0)))
    }

    #[test]
    fn an_access_reaches_its_device_by_offset() {
        let mut bus = Bus::new();
        bus.insert(0x100, 8, echo()).unwrap();
        let mut byte = [0];
        assert!(bus.read(0x107, &mut byte));
        assert_eq!(byte, [7]);
    }

    #[test]
    fn an_access_that_nobody_owns_reads_as_ones() {
        let mut bus = Bus::new();
        bus.insert(0x100, 8, echo()).unwrap();
        let mut word = [0; 4];
        assert!(!bus.read(0x108, &mut word));
        assert_eq!(word, [0xff; 4]);
        assert!(!bus.read(0xfe, &mut word), "it starts before the device");
        assert_eq!(word, [0xff; 4]);
        assert!(!bus.write(0xff, &[0]));
        assert!(!bus.write(u64::MAX, &[0; 8]));
    }

    #[test]
    fn an_access_over_the_end_of_a_device_is_cut_there() {
        let mut bus = Bus::new();
        let (first, second) = (echo(), echo());
        bus.insert(0x100, 8, first.clone()).unwrap();
        bus.insert(0x108, 1, second.clone()).unwrap();
        let mut word = [0; 4];
        assert!(bus.read(0x106, &mut word));
        assert_eq!(word, [6, 6, 0, 0xff]);
        assert!(bus.write(0x107, &[1, 2, 3, 4]));
        assert_eq!((crate::lock(&first).0, crate::lock(&second).0), (7, 0));
        bus.insert(u64::MAX - 1, 1, echo()).unwrap();
        assert!(bus.write(u64::MAX - 1, &[0; 8]));
    }

    #[test]
    fn ranges_must_not_overlap_wrap_or_be_empty() {
        let mut bus = Bus::new();
        bus.insert(0x100, 8, echo()).unwrap();
        for base in [0xf9, 0x100, 0x107] {
            assert!(matches!(bus.insert(base, 8, echo()), Err(BusError::Overlap { .. })));
        }
        assert!(bus.insert(0x108, 8, echo()).is_ok());
        assert!(matches!(bus.insert(0x200, 0, echo()), Err(BusError::Range { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, echo()), Err(BusError::Range { .. })));
    }
}
