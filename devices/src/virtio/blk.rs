//! virtio-blk (virtio 1.2, 5.2): descriptor chain -> typed request -> [`BlockNode`] -> used.

use super::{BrokenQueue, QueueHost, QueueProcessor, VirtioDevice};
use crate::block::{BlockNode, SECTOR_BYTES};
use crate::ram::GuestRam;
use crate::state::{DeviceRecord, Persist, RestoreError};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::sync::Arc;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader, Writer};

const DEVICE_ID: u32 = 2;
const QUEUE_SIZE: u16 = 256;
/// Most queues of a disk.
pub const MAX_QUEUES: u16 = 16;
/// A chain has a header and a status besides its segments.
const SEG_MAX: u32 = 254;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const ID_BYTES: usize = 20;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// Data moves through a buffer of this size: the kernel cannot be given guest memory without unsafe
/// code, and one buffer in the second-level cache costs little.
const BUFFER_BYTES: usize = 128 << 10;

/// A virtio-blk device.
pub struct Block {
    node: Arc<BlockNode>,
    queue_count: u16,
}

impl Block {
    /// A device that shows `node` through `queue_count` queues, 1 to [`MAX_QUEUES`].
    pub fn new(node: Arc<BlockNode>, queue_count: u16) -> Self {
        Self { node, queue_count: queue_count.clamp(1, MAX_QUEUES) }
    }

    /// The configuration space up to `num_queues`; what follows reads as zero.
    #[expect(clippy::little_endian_bytes, reason = "virtio configuration is little-endian")]
    fn config(&self) -> [u8; 36] {
        let mut config = [0; 36];
        config[..8].copy_from_slice(&(self.node.len_bytes() / SECTOR_BYTES).to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&512u32.to_le_bytes());
        config[34..36].copy_from_slice(&self.queue_count.to_le_bytes());
        config
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        let read_only = if self.node.read_only() { F_RO } else { 0 };
        let several_queues = if self.queue_count > 1 { F_MQ } else { 0 };
        F_SEG_MAX | F_BLK_SIZE | F_FLUSH | read_only | several_queues
    }

    fn queue_count(&self) -> u16 {
        self.queue_count
    }

    fn queue_max_size(&self) -> u16 {
        QUEUE_SIZE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(config.iter().skip(start)) {
            *byte = *value;
        }
    }

    fn processor(&self, _queue: u16, driver_features: u64) -> Box<dyn QueueProcessor> {
        Box::new(Processor {
            node: self.node.clone(),
            buffer: vec![0; BUFFER_BYTES],
            write_through: driver_features & F_FLUSH == 0,
            host_errors: 0,
        })
    }

    fn thread_name(&self, queue: u16) -> String {
        match self.queue_count {
            1 => format!("blk-{}", self.node.id()),
            // The kernel keeps 15 bytes of a name: the number goes first.
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

/// What a guest has seen of the disk and will go on to rely on.
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

struct Processor {
    node: Arc<BlockNode>,
    buffer: Vec<u8>,
    /// A driver that cannot ask for a flush takes every completed write for durable (5.2.6.2).
    write_through: bool,
    host_errors: u64,
}

/// A request that ends with `S_IOERR`, and whose fault it is.
enum Failed {
    Guest(&'static str),
    Host(io::Error),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

impl QueueProcessor for Processor {
    fn process(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
    ) -> Result<(), BrokenQueue> {
        let broken = |error: virtio_queue::Error| BrokenQueue(error.to_string());
        // Whether the driver was seen to have made something available that we have not looked at.
        let mut announced = false;
        loop {
            queue.disable_notification(ram).map_err(broken)?;
            let mut served = false;
            loop {
                if host.must_yield() {
                    // Notifications may stay off: whoever resumes the worker makes it look again.
                    return Ok(());
                }
                let next = queue.iter(ram).map_err(broken)?.next();
                let Some(chain) = next else { break };
                served = true;
                let head = chain.head_index();
                let written = self.serve(ram, chain)?;
                queue.add_used(ram, head, written).map_err(broken)?;
                if queue.needs_notification(ram).map_err(broken)? {
                    host.interrupt();
                }
            }
            if announced && !served {
                // More was announced than can be read: without this a guest could make us spin.
                return Err(BrokenQueue("an available entry cannot be read".into()));
            }
            announced = queue.enable_notification(ram).map_err(broken)?;
            if !announced {
                return Ok(());
            }
        }
    }
}

impl Processor {
    /// Serves one request; returns the bytes written into the guest's buffers. A chain that cannot
    /// even be answered (no header, no room for a status) breaks the queue.
    fn serve(
        &mut self,
        ram: &GuestRam,
        chain: DescriptorChain<&GuestRam>,
    ) -> Result<u32, BrokenQueue> {
        let broken = |what: &str| BrokenQueue(format!("request without {what}"));
        let mut reader =
            chain.clone().reader(ram).map_err(|error| BrokenQueue(error.to_string()))?;
        let mut writer = chain.writer(ram).map_err(|error| BrokenQueue(error.to_string()))?;
        let mut header = [0u8; 16];
        reader.read_exact(&mut header).map_err(|_| broken("a header"))?;
        let data_room =
            writer.available_bytes().checked_sub(1).ok_or_else(|| broken("a status byte"))?;
        let mut status_writer =
            writer.split_at(data_room).map_err(|error| BrokenQueue(error.to_string()))?;
        let status = self.execute(&header, &mut reader, &mut writer);
        // The status byte is the last of the device-writable part, after all data room.
        status_writer.write_all(&[status]).map_err(|_| broken("a writable status"))?;
        Ok(u32::try_from(writer.bytes_written() + 1).unwrap_or(u32::MAX))
    }

    #[expect(clippy::little_endian_bytes, reason = "the request header is little-endian")]
    fn execute(
        &mut self,
        header: &[u8; 16],
        reader: &mut Reader<'_, impl vm_memory::bitmap::BitmapSlice>,
        writer: &mut Writer<'_, impl vm_memory::bitmap::BitmapSlice>,
    ) -> u8 {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *header;
        let sector = u64::from_le_bytes(sector);
        let result = match u32::from_le_bytes([t0, t1, t2, t3]) {
            T_IN if reader.available_bytes() > 0 => Err(Failed::Guest("a read with data to write")),
            T_IN => self.read(sector, writer),
            T_OUT if writer.available_bytes() > 0 => {
                Err(Failed::Guest("a write with room to read"))
            }
            T_OUT => self.write(sector, reader),
            T_FLUSH => self.node.flush().map_err(Failed::Host),
            T_GET_ID => {
                let mut id = [0u8; ID_BYTES];
                id.iter_mut().zip(self.node.id().bytes()).for_each(|(to, from)| *to = from);
                let len = writer.available_bytes().min(ID_BYTES);
                writer.write_all(id.get(..len).unwrap_or_default()).map_err(Failed::Host)
            }
            _ => return S_UNSUPP,
        };
        match result {
            Ok(()) => S_OK,
            Err(Failed::Guest(mistake)) => {
                log::debug!("disk {}: request at sector {sector}: {mistake}", self.node.id());
                S_IOERR
            }
            Err(Failed::Host(error)) => {
                self.host_errors += 1;
                // A dying disk fails every request; ever rarer lines say so without filling the log.
                if self.host_errors.is_power_of_two() {
                    let (id, count) = (self.node.id(), self.host_errors);
                    log::error!("disk {id}: request at sector {sector}: {error} (error {count})");
                }
                S_IOERR
            }
        }
    }

    fn range(&self, sector: u64, len: usize) -> Result<u64, Failed> {
        let len = u64::try_from(len).unwrap_or(u64::MAX);
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

    fn read(
        &mut self,
        sector: u64,
        writer: &mut Writer<'_, impl vm_memory::bitmap::BitmapSlice>,
    ) -> Result<(), Failed> {
        let mut offset = self.range(sector, writer.available_bytes())?;
        while writer.available_bytes() > 0 {
            let len = writer.available_bytes().min(self.buffer.len());
            let (piece, _) = self.buffer.split_at_mut(len);
            self.node.read_at(piece, offset)?;
            writer.write_all(piece)?;
            offset += len as u64;
        }
        Ok(())
    }

    fn write(
        &mut self,
        sector: u64,
        reader: &mut Reader<'_, impl vm_memory::bitmap::BitmapSlice>,
    ) -> Result<(), Failed> {
        if self.node.read_only() {
            return Err(Failed::Guest("a write to a read-only disk"));
        }
        let mut offset = self.range(sector, reader.available_bytes())?;
        while reader.available_bytes() > 0 {
            let len = reader.available_bytes().min(self.buffer.len());
            let (piece, _) = self.buffer.split_at_mut(len);
            reader.read_exact(piece)?;
            self.node.write_at(piece, offset)?;
            offset += len as u64;
        }
        if self.write_through {
            self.node.flush()?;
        }
        Ok(())
    }
}
