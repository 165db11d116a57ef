//! QEMU's fw_cfg (QEMU, `docs/specs/fw_cfg.rst`): numbered items that firmware and test kernels read about
//! their machine. Read-only. What the items hold is [`Items`]; here is how a guest reads them:
//!
//! ```text
//! port      access          what it does
//! 0x510     write 16 bits   selects an item and starts at its first byte
//! 0x510/1   read 8 bits     the item's next byte; zeroes behind its end
//! 0x514     read            "QEMU CFG"
//! 0x514     write 32 bits   high half of the address of a control block, big-endian
//! 0x518     write 32 bits   its low half: the operation is done before the instruction ends
//!
//! control block, big-endian:  control u32 | length u32 | address u64
//!           control: 1 error | 2 read | 4 skip | 8 select the item of the upper 16 bits | 16 write
//! ```
//! A finished operation leaves 0 or the error bit in `control`. Writes are refused so, and what reaches outside of
//! RAM, over the control block, or further than [`MAX_DMA_BYTES`].
//!
//! The guest's RAM, CPUs, command line and the user's files follow from the machine description. Of the boot files
//! the numbers travel in the record, and their bytes with the boot payload ([`FwCfg::set_boot_files`]).

mod item;
mod items;

pub use item::{
    E820_FILE, MAX_NAME_BYTES, MAX_USER_BYTES, MAX_USER_ITEMS, USER_PREFIX, UserItem,
    check_lengths, check_name, check_names,
};
pub use items::{BootContent, BootData, BootFiles, BootSizes, Facts, Items, MemoryRange};

use crate::bus::BusDevice;
use crate::log_limit::LogLimit;
use crate::ram::{GuestAddress, GuestRam};
use crate::state::Persist;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestMemoryBackend};

/// Ports of the device: two, two that are not used, and eight.
pub const PORTS: u16 = 12;
/// Most bytes of one operation, which is done on the vCPU's thread.
pub const MAX_DMA_BYTES: u32 = 64 << 20;
/// Bytes that are copied at a time.
const PIECE_BYTES: usize = 64 << 10;

/// Offset of the selector; the data register is behind it.
const SELECTOR: u64 = 0;
/// Offset of the DMA address, and its length.
const DMA: u64 = 4;
const DMA_BYTES: u64 = 8;
/// What the DMA address reads as.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

const CONTROL_ERROR: u32 = 1;
const CONTROL_READ: u32 = 1 << 1;
const CONTROL_SKIP: u32 = 1 << 2;
const CONTROL_SELECT: u32 = 1 << 3;
const CONTROL_WRITE: u32 = 1 << 4;
const CONTROL_BLOCK_BYTES: usize = 16;

static LOST: LogLimit = LogLimit::new();

/// The device.
pub struct FwCfg {
    ram: GuestRam,
    items: Items,
    selected: u16,
    /// The next byte of the item.
    offset: u32,
    /// The half of a DMA address that the guest has written.
    dma_high: u32,
}

/// What [`FwCfg`] saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FwCfgState {
    /// The selected item.
    pub selected: u16,
    /// The next byte of it.
    pub offset: u32,
    /// The high half of a DMA address, if the low one has not been written yet.
    pub dma_high: u32,
    /// The numbers of the files that the guest was booted from.
    pub boot: BootSizes,
}

impl FwCfg {
    /// A device with these items for a guest with this RAM.
    pub fn new(ram: GuestRam, items: Items) -> Self {
        Self { ram, items, selected: 0, offset: 0, dma_high: 0 }
    }

    /// The guest is booted from these files.
    pub fn set_boot(&mut self, sizes: BootSizes, files: BootFiles) {
        self.items.set_boot_sizes(sizes);
        self.set_boot_files(files);
    }

    /// Gives it the files that the guest was booted from, after a move. Those of other lengths are not the
    /// guest's, and are ignored: then its items read as zeroes.
    pub fn set_boot_files(&mut self, files: BootFiles) {
        self.items.set_boot_files(files);
    }

    fn select(&mut self, key: u16) {
        (self.selected, self.offset) = (key, 0);
    }

    /// Copies the item's next bytes, zeroes behind its end.
    fn next_bytes(&mut self, into: &mut [u8]) {
        self.items.read(self.selected, self.offset, into);
        self.skip(into.len());
    }

    /// The offset stops at the largest one: no item is as long.
    fn skip(&mut self, bytes: usize) {
        self.offset = self.offset.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    #[expect(clippy::big_endian_bytes, reason = "the control block is big-endian")]
    fn operate(&mut self, block: u64) {
        let mut bytes = [0; CONTROL_BLOCK_BYTES];
        if self.ram.read_slice(&mut bytes, GuestAddress(block)).is_err() {
            return lost(block);
        }
        let [control, length, high, low] =
            [0, 4, 8, 12].map(|at| u32::from_be_bytes([0, 1, 2, 3].map(|byte| bytes[at + byte])));
        let address = u64::from(high) << 32 | u64::from(low);
        if control & CONTROL_SELECT != 0 {
            // The item is in the upper half.
            self.select(u16::try_from(control >> 16).unwrap_or(u16::MAX));
        }
        let done = match control {
            _ if control & CONTROL_READ != 0 => self.copy_out(block, address, length),
            _ if control & CONTROL_WRITE != 0 => false,
            _ if control & CONTROL_SKIP != 0 => {
                self.offset = self.offset.saturating_add(length);
                true
            }
            _ => true,
        };
        let answer = if done { 0 } else { CONTROL_ERROR };
        if self.ram.write_slice(&answer.to_be_bytes(), GuestAddress(block)).is_err() {
            lost(block);
        }
    }

    /// Copies the item's next bytes into RAM; false if they may not go there.
    fn copy_out(&mut self, block: u64, address: u64, length: u32) -> bool {
        let Ok(len) = usize::try_from(length) else { return false };
        let Some(end) = address.checked_add(u64::from(length)) else { return false };
        let overlaps = address < block.saturating_add(CONTROL_BLOCK_BYTES as u64) && block < end;
        if length > MAX_DMA_BYTES || overlaps {
            return false;
        }
        if len > 0 && !self.ram.check_range(GuestAddress(address), len) {
            return false;
        }
        let mut piece = vec![0; len.min(PIECE_BYTES)];
        let mut at = address;
        while at < end {
            let count = usize::try_from(end - at).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            let piece = &mut piece[..count];
            self.next_bytes(piece);
            if self.ram.write_slice(piece, GuestAddress(at)).is_err() {
                return false;
            }
            at += count as u64;
        }
        true
    }
}

fn lost(block: u64) {
    if let Some(suppressed) = LOST.allow() {
        log::warn!("fw_cfg: a control block at {block:#x}, outside of RAM{suppressed}");
    }
}

impl BusDevice for FwCfg {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data) {
            (SELECTOR | 1, [byte]) => {
                let mut next = [0];
                self.next_bytes(&mut next);
                [*byte] = next;
            }
            (offset, data) => {
                let at = offset.checked_sub(DMA).and_then(|at| usize::try_from(at).ok());
                let signature = at.and_then(|at| DMA_SIGNATURE.get(at..)).unwrap_or_default();
                data.fill(0);
                data.iter_mut().zip(signature).for_each(|(to, from)| *to = *from);
            }
        }
    }

    #[expect(clippy::big_endian_bytes, reason = "the DMA address is big-endian")]
    fn write(&mut self, offset: u64, data: &[u8]) {
        const LOW: u64 = DMA + DMA_BYTES / 2;
        match (offset, data) {
            (SELECTOR, [low, high]) => self.select(u16::from(*high) << 8 | u16::from(*low)),
            (DMA | LOW, &[a, b, c, d]) => {
                let half = u32::from_be_bytes([a, b, c, d]);
                if offset == DMA {
                    self.dma_high = half;
                } else {
                    let high = std::mem::take(&mut self.dma_high);
                    self.operate(u64::from(high) << 32 | u64::from(half));
                }
            }
            // Nothing is writable, and other widths do nothing, as in QEMU.
            _ => {}
        }
    }
}

impl Persist for FwCfg {
    const KIND: &'static str = "fw-cfg";
    const VERSION: u16 = 1;
    type State = FwCfgState;

    fn save(&self) -> FwCfgState {
        let Self { ram: _, items, selected, offset, dma_high } = self;
        let (selected, offset, dma_high) = (*selected, *offset, *dma_high);
        FwCfgState { selected, offset, dma_high, boot: items.boot_sizes() }
    }

    fn restore(&mut self, state: FwCfgState) -> Result<(), String> {
        let FwCfgState { selected, offset, dma_high, boot } = state;
        (self.selected, self.offset, self.dma_high) = (selected, offset, dma_high);
        self.items.set_boot_sizes(boot);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
