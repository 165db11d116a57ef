//! virtio-blk requests as they stand in a queue (virtio 1.2, 5.2.6): types, features and limits that
//! [`super::blk`] offers and [`super::blk_worker`] keeps to, and the parsing of a descriptor chain.

use super::BrokenQueue;
use crate::ram::{GuestAddress, GuestRam};
use crate::segments::Segments;
use virtio_queue::DescriptorChain;

pub(super) const F_FLUSH: u64 = 1 << 9;
pub(super) const F_DISCARD: u64 = 1 << 13;
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;

pub(super) const T_IN: u32 = 0;
pub(super) const T_OUT: u32 = 1;
pub(super) const T_FLUSH: u32 = 4;
pub(super) const T_GET_ID: u32 = 8;
pub(super) const T_DISCARD: u32 = 11;
pub(super) const T_WRITE_ZEROES: u32 = 13;
pub(super) const ID_BYTES: usize = 20;

/// `struct virtio_blk_discard_write_zeroes`: sector u64, num_sectors u32, flags u32.
pub(super) const RANGE_BYTES: usize = 16;
pub(super) const RANGE_F_UNMAP: u32 = 1;

pub(super) const S_OK: u8 = 0;
pub(super) const S_IOERR: u8 = 1;
pub(super) const S_UNSUPP: u8 = 2;

/// Limits of one discard or write-zeroes request.
#[derive(Debug, Clone, Copy)]
pub(super) struct RangeLimits {
    /// Maximum sectors per range.
    pub sectors: u32,
    /// Maximum ranges per request.
    pub ranges: u32,
}

/// A request is executed in pieces and a pause waits for one piece only, but the queue serves nothing else
/// meanwhile, so no request may take long. Punching holes is quick…
pub(super) const DISCARD_LIMITS: RangeLimits =
    RangeLimits { sectors: (64 << 20) / 512, ranges: 16 };
/// …but zeroes may have to be written.
pub(super) const WRITE_ZEROES_LIMITS: RangeLimits =
    RangeLimits { sectors: (16 << 20) / 512, ranges: 1 };

/// Identifies a request and where its status goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket {
    pub head: u16,
    pub kind: u32,
    pub sector: u64,
    pub status: GuestAddress,
    /// Bytes that the device may write, without the status.
    pub room: usize,
    /// It was kept after an error: later entries of the ring have been taken since.
    pub was_kept: bool,
}

/// A parsed descriptor chain. Its buffers lie in RAM; nothing else was checked.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub ticket: Ticket,
    pub from_guest: Segments,
    pub to_guest: Segments,
}

impl Request {
    /// Parses a chain. One that cannot be completed (no header, no room for a status, buffers outside RAM)
    /// breaks the queue.
    #[expect(clippy::little_endian_bytes, reason = "the request header is little-endian")]
    pub(super) fn parse(
        ram: &GuestRam,
        chain: DescriptorChain<&GuestRam>,
    ) -> Result<Self, BrokenQueue> {
        let broken = |what: &str| BrokenQueue(format!("request {what}"));
        let head = chain.head_index();
        let (mut from_guest, mut to_guest) = (Segments::default(), Segments::default());
        for descriptor in chain {
            let side = if descriptor.is_write_only() { &mut to_guest } else { &mut from_guest };
            let len = descriptor.len() as usize;
            if !side.push(ram, descriptor.addr(), len) {
                return Err(broken("with a buffer outside RAM"));
            }
        }
        let mut header = [0u8; 16];
        from_guest.read(ram, &mut header).ok_or_else(|| broken("without a header"))?;
        // The status is the last device-writable byte.
        let status = to_guest.take_last_byte().ok_or_else(|| broken("without a status byte"))?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let ticket = Ticket {
            head,
            kind: u32::from_le_bytes([t0, t1, t2, t3]),
            sector: u64::from_le_bytes(sector),
            status,
            room: to_guest.len(),
            was_kept: false,
        };
        Ok(Self { ticket, from_guest, to_guest })
    }
}
