//! Scatter-gather list: the pieces of guest RAM that one request reads or writes, in order. Built from a
//! descriptor chain and checked once to lie in RAM, which never shrinks.

use crate::ram::{GuestAddress, GuestRam};
use std::collections::VecDeque;
use vm_memory::{Address, Bytes, GuestMemoryBackend, GuestMemoryError};

/// One piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub address: GuestAddress,
    /// Its length; not zero.
    pub len: usize,
}

/// The pieces of one direction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Segments {
    pieces: VecDeque<Segment>,
    len: usize,
}

impl Segments {
    /// Adds a piece; returns false if it lies outside RAM. An empty one is ignored wherever it lies.
    #[must_use = "a piece outside RAM is not added"]
    pub fn push(&mut self, ram: &GuestRam, address: GuestAddress, len: usize) -> bool {
        if len == 0 {
            return true;
        }
        let Some(total) = self.len.checked_add(len) else { return false };
        if address.checked_add(len as u64).is_none() || !ram.check_range(address, len) {
            return false;
        }
        self.pieces.push_back(Segment { address, len });
        self.len = total;
        true
    }

    /// The pieces that are left.
    pub fn pieces(&self) -> impl ExactSizeIterator<Item = Segment> {
        self.pieces.iter().copied()
    }

    /// Bytes that are left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes up to `most` bytes from the front, as far as they lie in one piece.
    pub fn take_front(&mut self, most: usize) -> Option<Segment> {
        let front = self.pieces.front_mut()?;
        let taken = Segment { address: front.address, len: front.len.min(most) };
        front.address = front.address.unchecked_add(taken.len as u64);
        front.len -= taken.len;
        if front.len == 0 {
            self.pieces.pop_front();
        }
        self.len -= taken.len;
        (taken.len > 0).then_some(taken)
    }

    /// Takes the last byte.
    pub fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let back = self.pieces.back_mut()?;
        back.len -= 1;
        self.len -= 1;
        let address = back.address.unchecked_add(back.len as u64);
        if back.len == 0 {
            self.pieces.pop_back();
        }
        Some(address)
    }

    /// Fills `buffer` from the front and consumes that much. `None` if there is less.
    pub fn read(&mut self, ram: &GuestRam, buffer: &mut [u8]) -> Option<()> {
        self.walk(buffer.len(), |piece, at| {
            let end = at + piece.len;
            ram.read_slice(&mut buffer[at..end], piece.address)
        })
    }

    /// Writes `data` to the front and consumes that much. `None` if there is less room.
    pub fn write(&mut self, ram: &GuestRam, data: &[u8]) -> Option<()> {
        self.walk(data.len(), |piece, at| {
            let end = at + piece.len;
            ram.write_slice(&data[at..end], piece.address)
        })
    }

    fn walk(
        &mut self,
        len: usize,
        mut visit: impl FnMut(Segment, usize) -> Result<(), GuestMemoryError>,
    ) -> Option<()> {
        if len > self.len {
            return None;
        }
        let mut at = 0;
        while at < len {
            let piece = self.take_front(len - at)?;
            visit(piece, at).ok()?;
            at += piece.len;
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 20), 1 << 20)])
            .unwrap()
    }

    #[test]
    fn pieces_outside_ram_are_refused_and_empty_ones_ignored() {
        let (ram, mut segments) = (ram(), Segments::default());
        for (address, len) in
            [(2 << 20, 1), ((2 << 20) - 1, 2), (u64::MAX, 1), (u64::MAX - 7, 16), (0, usize::MAX)]
        {
            assert!(!segments.push(&ram, GuestAddress(address), len), "{len} at {address:#x}");
        }
        assert!(segments.push(&ram, GuestAddress(u64::MAX), 0));
        assert!(segments.is_empty());
        assert_eq!((segments.take_front(1), segments.take_last_byte()), (None, None));
        assert!(segments.push(&ram, GuestAddress((1 << 20) - 4), 8), "two regions side by side");
        assert_eq!(segments.len(), 8);
    }

    #[test]
    fn data_crosses_pieces_and_regions() {
        let (ram, mut segments) = (ram(), Segments::default());
        for (address, len) in [(0x100, 3), ((1 << 20) - 2, 4), (0x50, 1)] {
            assert!(segments.push(&ram, GuestAddress(address), len));
        }
        let mut copy = segments.clone();
        assert_eq!(copy.write(&ram, b"012345678"), None, "one byte too much");
        assert_eq!(copy.write(&ram, b"01234567"), Some(()));
        assert!(copy.is_empty() && copy.pieces().len() == 0);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(1 << 20)).unwrap(), b'5');
        assert_eq!(segments.take_last_byte(), Some(GuestAddress(0x50)));
        assert_eq!(segments.take_last_byte(), Some(GuestAddress((1 << 20) + 1)));
        let mut back = [0; 4];
        assert_eq!(segments.read(&ram, &mut back), Some(()));
        assert_eq!((&back, segments.len()), (b"0123", 2));
        assert_eq!(segments.read(&ram, &mut [0; 3]), None);
        assert_eq!(segments.read(&ram, &mut []), Some(()));
    }
}
