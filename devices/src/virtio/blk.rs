//! virtio-blk (virtio 1.2, 5.2): features, configuration space and record. Requests are served by
//! [`super::blk_worker`], their format is in [`super::blk_request`].

use super::blk_request::{DISCARD_LIMITS, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, WRITE_ZEROES_LIMITS};
use super::blk_worker::Processor;
use super::{QueueProcessor, VirtioDevice};
use crate::block::{BlockNode, SECTOR_BYTES};
use crate::ram::GuestRam;
use crate::state::{DeviceRecord, Persist, RestoreError};
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;

const DEVICE_ID: u32 = 2;
const QUEUE_SIZE: u16 = 256;
/// Maximum number of queues of a disk.
pub const MAX_QUEUES: u16 = 16;
/// A chain has a header and a status besides its segments.
const SEG_MAX: u32 = 254;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_MQ: u64 = 1 << 12;

/// A usual file system block: smaller or unaligned holes free nothing.
const DISCARD_ALIGNMENT_SECTORS: u32 = 4096 / 512;

/// A virtio-blk device.
pub struct Block {
    node: Arc<BlockNode>,
    queue_count: u16,
}

impl Block {
    /// A device for `node` with `queue_count` queues, 1 to [`MAX_QUEUES`].
    pub fn new(node: Arc<BlockNode>, queue_count: u16) -> Self {
        Self { node, queue_count: queue_count.clamp(1, MAX_QUEUES) }
    }

    /// The configuration space up to `write_zeroes_may_unmap`; what follows reads as zero.
    #[expect(clippy::little_endian_bytes, reason = "virtio configuration is little-endian")]
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let capacity = self.node.len_bytes() / SECTOR_BYTES;
        config[..8].copy_from_slice(&capacity.to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&512u32.to_le_bytes());
        config[34..36].copy_from_slice(&self.queue_count.to_le_bytes());
        config[36..40].copy_from_slice(&DISCARD_LIMITS.sectors.to_le_bytes());
        config[40..44].copy_from_slice(&DISCARD_LIMITS.ranges.to_le_bytes());
        config[44..48].copy_from_slice(&DISCARD_ALIGNMENT_SECTORS.to_le_bytes());
        config[48..52].copy_from_slice(&WRITE_ZEROES_LIMITS.sectors.to_le_bytes());
        config[52..56].copy_from_slice(&WRITE_ZEROES_LIMITS.ranges.to_le_bytes());
        config[56] = 1; // write_zeroes_may_unmap
        config
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        let access = if self.node.read_only() { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
        let several_queues = if self.queue_count > 1 { F_MQ } else { 0 };
        F_SEG_MAX | F_BLK_SIZE | F_FLUSH | access | several_queues
    }

    fn queue_count(&self) -> u16 {
        self.queue_count
    }

    fn queue_max_size(&self) -> u16 {
        QUEUE_SIZE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        // An offset that does not fit is past the end, where the space reads as zero.
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(config.iter().skip(start)) {
            *byte = *value;
        }
    }

    fn processor(
        &self,
        _queue: u16,
        driver_features: u64,
        ram: &GuestRam,
    ) -> io::Result<Box<dyn QueueProcessor>> {
        let node = self.node.clone();
        Ok(Box::new(Processor::new(node, driver_features, ram, QUEUE_SIZE)?))
    }

    fn thread_name(&self, queue: u16) -> String {
        match self.queue_count {
            1 => format!("blk-{}", self.node.id()),
            // The kernel truncates names to 15 bytes: the number comes first.
            _ => format!("blk{queue}-{}", self.node.id()),
        }
    }

    fn save(&self) -> DeviceRecord {
        self.save_record(self.node.id())
    }

    fn restore(&mut self, record: DeviceRecord) -> Result<(), RestoreError> {
        self.restore_record(record)
    }
}

/// What the guest has seen of the disk and relies on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    capacity_sectors: u64,
    read_only: bool,
}

impl Persist for Block {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u16 = 1;
    type State = BlockState;

    fn save(&self) -> BlockState {
        BlockState {
            capacity_sectors: self.node.len_bytes() / SECTOR_BYTES,
            read_only: self.node.read_only(),
        }
    }

    fn restore(&mut self, state: BlockState) -> Result<(), String> {
        let here = Persist::save(self);
        if here == state {
            return Ok(());
        }
        let describe = |state: &BlockState| {
            let access = if state.read_only { "read-only" } else { "writable" };
            format!("{access} with {} sectors", state.capacity_sectors)
        };
        Err(format!(
            "the guest knows this disk as {}, here it is {}",
            describe(&state),
            describe(&here)
        ))
    }
}
