//! Serves requests of the block device synchronously, in pieces, through the worker's buffer: those that
//! cannot use the ring, and those that are no reads, writes or flushes. Every request is checked here.

use super::super::QueueHost;
use super::super::blk_request::{
    DISCARD_LIMITS, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, ID_BYTES, RANGE_BYTES, RANGE_F_UNMAP,
    RangeLimits, Request, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES,
    WRITE_ZEROES_LIMITS,
};
use super::{Failed, Processor};
use crate::block::SECTOR_BYTES;
use crate::block::gate::Pass;
use crate::ram::GuestRam;

/// Discards and zeroes are made in pieces that end at multiples of this: a multiple of an image's
/// clusters, and little enough to be written where there is no quicker way to make zeroes.
const RANGE_PIECE_BYTES: u64 = 4 << 20;

/// One range of a discard or write-zeroes request, checked.
struct ZeroRange {
    offset_bytes: u64,
    len_bytes: u64,
    unmap: bool,
}

/// Splits a range at multiples of [`RANGE_PIECE_BYTES`].
fn pieces(range: &ZeroRange) -> impl Iterator<Item = (u64, u64)> {
    let end = range.offset_bytes.saturating_add(range.len_bytes);
    let mut at = range.offset_bytes;
    std::iter::from_fn(move || {
        let start = at;
        at = end.min((start / RANGE_PIECE_BYTES + 1).saturating_mul(RANGE_PIECE_BYTES));
        (start < end).then(|| (start, at - start))
    })
}

impl Processor {
    /// Between two pieces of a request: fails if the worker must yield.
    fn check_yield(&self, host: &dyn QueueHost) -> Result<(), Failed> {
        if self.must_yield(host) { Err(Failed::Interrupted) } else { Ok(()) }
    }

    fn accepted(&self, feature: u64) -> bool {
        self.driver_features & feature != 0
    }

    pub(super) fn execute(
        &mut self,
        ram: &GuestRam,
        host: &dyn QueueHost,
        pass: &Pass,
        request: &mut Request,
    ) -> Result<(), Failed> {
        match request.ticket.kind {
            T_IN => self.read(ram, host, pass, request),
            T_OUT => self.write(ram, host, pass, request),
            T_FLUSH => Ok(self.node.flush()?),
            T_GET_ID => {
                let mut id = [0u8; ID_BYTES];
                id.iter_mut().zip(self.node.id().bytes()).for_each(|(to, from)| *to = from);
                let len = request.to_guest.len().min(ID_BYTES);
                let id = &id[..len];
                request.to_guest.write(ram, id).ok_or(Failed::Guest("no room for an id"))
            }
            T_DISCARD if self.accepted(F_DISCARD) => {
                let ranges = self.ranges(ram, request, DISCARD_LIMITS)?;
                for (offset_bytes, len_bytes) in ranges.iter().flat_map(pieces) {
                    self.check_yield(host)?;
                    self.node.discard_range(pass, offset_bytes, len_bytes)?;
                }
                self.finish_write()
            }
            T_WRITE_ZEROES if self.accepted(F_WRITE_ZEROES) => {
                for range in self.ranges(ram, request, WRITE_ZEROES_LIMITS)? {
                    for (offset_bytes, len_bytes) in pieces(&range) {
                        self.check_yield(host)?;
                        self.node.zero(pass, offset_bytes, len_bytes, range.unmap)?;
                    }
                }
                self.finish_write()
            }
            _ => Err(Failed::Unsupported("of a type that was not offered")),
        }
    }

    /// Byte offset of `sector`, if `len` bytes from there lie on the disk.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failed> {
        let offset = sector.checked_mul(SECTOR_BYTES);
        let end = offset.and_then(|offset| offset.checked_add(len));
        match (offset, end) {
            (Some(offset), Some(end))
                if end <= self.node.len_bytes() && len.is_multiple_of(SECTOR_BYTES) =>
            {
                Ok(offset)
            }
            _ => Err(Failed::Guest("past the end of the disk, or not whole sectors")),
        }
    }

    /// Checks a read; returns its offset.
    pub(super) fn check_read(&self, request: &Request) -> Result<u64, Failed> {
        if !request.from_guest.is_empty() {
            return Err(Failed::Guest("a read with data to write"));
        }
        self.offset(request.ticket.sector, request.to_guest.len() as u64)
    }

    fn read(
        &mut self,
        ram: &GuestRam,
        host: &dyn QueueHost,
        pass: &Pass,
        request: &mut Request,
    ) -> Result<(), Failed> {
        let mut offset = self.check_read(request)?;
        let room = &mut request.to_guest;
        while !room.is_empty() {
            self.check_yield(host)?;
            let len = room.len().min(self.buffer.len());
            let (piece, _) = self.buffer.split_at_mut(len);
            self.node.read(pass, piece, offset)?;
            if host.is_ending() {
                return Err(Failed::Interrupted);
            }
            room.write(ram, piece).ok_or(Failed::Guest("no room for what was read"))?;
            offset += len as u64;
        }
        Ok(())
    }

    /// Checks a write; returns its offset.
    pub(super) fn check_write(&self, request: &Request) -> Result<u64, Failed> {
        if !request.to_guest.is_empty() {
            return Err(Failed::Guest("a write with room to read"));
        }
        self.check_writable()?;
        self.offset(request.ticket.sector, request.from_guest.len() as u64)
    }

    fn write(
        &mut self,
        ram: &GuestRam,
        host: &dyn QueueHost,
        pass: &Pass,
        request: &mut Request,
    ) -> Result<(), Failed> {
        let mut offset = self.check_write(request)?;
        let data = &mut request.from_guest;
        while !data.is_empty() {
            self.check_yield(host)?;
            let len = data.len().min(self.buffer.len());
            let (piece, _) = self.buffer.split_at_mut(len);
            data.read(ram, piece).ok_or(Failed::Guest("not all data is there"))?;
            self.node.write(pass, piece, offset)?;
            offset += len as u64;
        }
        self.finish_write()
    }

    fn check_writable(&self) -> Result<(), Failed> {
        if self.node.read_only() {
            return Err(Failed::Guest("a write to a read-only disk"));
        }
        Ok(())
    }

    /// A driver without flush considers every completed write durable (5.2.6.2).
    fn finish_write(&self) -> Result<(), Failed> {
        if !self.accepted(F_FLUSH) {
            self.node.flush()?;
        }
        Ok(())
    }

    /// The ranges of a discard or write-zeroes request. All are checked before the first is touched.
    #[expect(clippy::little_endian_bytes, reason = "the ranges are little-endian")]
    fn ranges(
        &self,
        ram: &GuestRam,
        request: &mut Request,
        limits: RangeLimits,
    ) -> Result<Vec<ZeroRange>, Failed> {
        if !request.to_guest.is_empty() {
            return Err(Failed::Guest("a discard or write-zeroes with room to read"));
        }
        self.check_writable()?;
        let len = request.from_guest.len();
        let count = len / RANGE_BYTES;
        let most = limits.ranges as usize;
        if count == 0 || count > most || !len.is_multiple_of(RANGE_BYTES) {
            return Err(Failed::Guest("no ranges, too many, or not whole ones"));
        }
        let mut ranges = Vec::with_capacity(count);
        for _ in 0..count {
            let mut bytes = [0u8; RANGE_BYTES];
            let read = request.from_guest.read(ram, &mut bytes);
            read.ok_or(Failed::Guest("not all ranges are there"))?;
            let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            let known = if request.ticket.kind == T_WRITE_ZEROES { RANGE_F_UNMAP } else { 0 };
            if flags & !known != 0 {
                return Err(Failed::Unsupported("with an unknown flag"));
            }
            if sectors > limits.sectors {
                return Err(Failed::Guest("a range that is too long"));
            }
            let len_bytes = u64::from(sectors) * SECTOR_BYTES;
            let offset_bytes = self.offset(u64::from_le_bytes(sector), len_bytes)?;
            ranges.push(ZeroRange { offset_bytes, len_bytes, unmap: flags & RANGE_F_UNMAP != 0 });
        }
        Ok(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_multiples_of_a_piece() {
        let cut = |offset_bytes, len_bytes| {
            pieces(&ZeroRange { offset_bytes, len_bytes, unmap: false }).collect::<Vec<_>>()
        };
        const PIECE: u64 = RANGE_PIECE_BYTES;
        assert_eq!(cut(512, 0), []);
        assert_eq!(cut(0, PIECE), [(0, PIECE)]);
        assert_eq!(cut(PIECE - 512, 1024), [(PIECE - 512, 512), (PIECE, 512)]);
        assert_eq!(cut(512, 2 * PIECE).iter().map(|(_, len)| len).sum::<u64>(), 2 * PIECE);
    }
}
