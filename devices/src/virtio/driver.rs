//! A virtio-mmio and virtio-blk driver for tests: registers, rings in guest RAM, requests.
#![allow(clippy::little_endian_bytes, reason = "a driver's registers")]

use super::blk::Block;
use super::mmio::MmioTransport;
use super::{QueueHost, VirtioDevice};
use crate::block::BlockNode;
use crate::block::memory::{MemoryDisk, Script};
use crate::bus::BusDevice;
use crate::irq::CountingIrq;
use crate::ram::{GuestAddress, GuestRam};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

pub(crate) const DESC: u64 = 0x1000;
pub(crate) const AVAIL: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;
pub(crate) const HEADER: u64 = 0x4000;
pub(crate) const DATA: u64 = 0x5000;
pub(crate) const STATUS: u64 = 0x8000;
/// Headers and statuses of requests with indirect tables, 32 bytes each.
pub(crate) const LONG_HEADERS: u64 = 0xa000;
/// Indirect tables of up to 2048 descriptors.
const LONG_TABLES: u64 = 0x10_0000;
const LONG_TABLE_SPAN: u64 = 0x8000;
/// Each queue has its own set of the above.
pub(crate) const QUEUE_SPAN: u64 = 0x1_0000;

/// The worker's side for a processor without a worker, which is never asked to yield.
pub(crate) struct CalmHost;

impl QueueHost for CalmHost {
    fn interrupt(&mut self) {}

    fn must_yield(&self) -> bool {
        false
    }

    fn is_ending(&self) -> bool {
        false
    }
}

/// A driver of one device, with queues of 16 entries.
pub(crate) struct Driver<N = Arc<BlockNode>> {
    pub(crate) ram: GuestRam,
    pub(crate) transport: MmioTransport,
    pub(crate) irq: Arc<CountingIrq>,
    /// The device's disk.
    pub(crate) node: N,
    pub(crate) queue_count: u16,
    /// The current queue, and the number of requests sent to it.
    pub(crate) queue: u16,
    pub(crate) avail: u16,
    /// Request counts of the other queues.
    pub(crate) avail_of: [u16; 16],
}

impl Driver {
    pub(crate) fn new() -> Self {
        Self::of(MemoryDisk::new(64 << 10)).0
    }

    pub(crate) fn of(disk: MemoryDisk) -> (Self, Arc<Script>) {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let script = disk.script();
        let node = Arc::new(BlockNode::new("disk0", Box::new(disk)));
        (Self::with(ram, node, 0), script)
    }

    pub(crate) fn with(ram: GuestRam, node: Arc<BlockNode>, avail: u16) -> Self {
        Self::with_queues(ram, node, avail, 1)
    }

    pub(crate) fn with_queues(
        ram: GuestRam,
        node: Arc<BlockNode>,
        avail: u16,
        queue_count: u16,
    ) -> Self {
        let device = Box::new(Block::new(node.clone(), queue_count));
        Self { avail, ..Driver::of_device(ram, device, node) }
    }

    pub(crate) fn several(queue_count: u16) -> (Self, Arc<Script>) {
        let (one, script) = Self::of(MemoryDisk::new(64 << 10));
        (Self::with_queues(one.ram, one.node, 0, queue_count), script)
    }
}

impl<N> Driver<N> {
    pub(crate) fn of_device(ram: GuestRam, device: Box<dyn VirtioDevice>, node: N) -> Self {
        let irq = Arc::new(CountingIrq::default());
        let queue_count = device.queue_count();
        let transport = MmioTransport::new(ram.clone(), device, irq.clone()).unwrap();
        Self { ram, transport, irq, node, queue_count, queue: 0, avail: 0, avail_of: [0; 16] }
    }

    /// The status register.
    pub(crate) fn status(&self) -> u32 {
        self.transport.status()
    }

    /// Selects the queue for the following requests.
    pub(crate) fn select(&mut self, queue: u16) {
        self.avail_of[usize::from(self.queue)] = self.avail;
        self.queue = queue;
        self.avail = self.avail_of[usize::from(queue)];
    }

    /// Address of a structure of the current queue.
    pub(crate) fn at(&self, address: u64) -> GuestAddress {
        GuestAddress(address + u64::from(self.queue) * QUEUE_SPAN)
    }

    pub(crate) fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn start(&mut self, features: u64) {
        self.set(0x70, 1);
        self.set(0x70, 3);
        for half in [0, 1] {
            self.set(0x24, half);
            self.set(0x20, u32::try_from(features >> (32 * half) & 0xffff_ffff).unwrap());
        }
        self.set(0x70, 11);
        assert_eq!(self.get(0x70), 11, "features accepted");
        for queue in 0..self.queue_count {
            self.select(queue);
            self.set(0x30, queue.into());
            self.set(0x38, 16);
            for (register, address) in [(0x80, DESC), (0x90, AVAIL), (0xa0, USED)] {
                self.set(register, u32::try_from(self.at(address).0).unwrap());
            }
            self.set(0x44, 1);
        }
        self.select(0);
        self.set(0x70, 15);
    }

    pub(crate) fn descriptor(&self, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.at(DESC + index * 16);
        self.ram.write_obj(address, at).unwrap();
        self.ram.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        self.ram.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        self.ram.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Makes a request of header, data and status available; `notify` tells the device.
    pub(crate) fn submit(&mut self, kind: u32, sector: u64, len: u32, notify: bool) {
        self.ram.write_obj(kind, self.at(HEADER)).unwrap();
        self.ram.write_obj(sector, self.at(HEADER + 8)).unwrap();
        self.ram.write_obj(0xaau8, self.at(STATUS)).unwrap();
        let device_writes = if kind == 1 { 0 } else { 2 };
        self.descriptor(0, self.at(HEADER).0, 16, 1, 1);
        if len > 0 {
            self.descriptor(1, self.at(DATA).0, len, 1 | device_writes, 2);
        } else {
            self.descriptor(0, self.at(HEADER).0, 16, 1, 2);
        }
        self.descriptor(2, self.at(STATUS).0, 1, 2, 0);
        self.publish(0, notify);
    }

    /// Makes a request whose data lies in `buffers`, (address, length), available as entry `head`: its
    /// descriptors are in a table of their own. `notify` tells the device.
    pub(crate) fn submit_long(
        &mut self,
        head: u16,
        kind: u32,
        sector: u64,
        buffers: &[(u64, u32)],
        notify: bool,
    ) {
        let header = self.at(LONG_HEADERS + u64::from(head) * 32);
        let table = GuestAddress(LONG_TABLES + u64::from(head) * LONG_TABLE_SPAN);
        self.ram.write_obj(kind, header).unwrap();
        self.ram.write_obj(sector, GuestAddress(header.0 + 8)).unwrap();
        self.ram.write_obj(0xaau8, self.long_status_at(head)).unwrap();
        let data_flags = if kind == 1 { 1u16 } else { 3 };
        let mut chain = vec![(header.0, 16, 1u16)];
        chain.extend(buffers.iter().map(|(address, len)| (*address, *len, data_flags)));
        chain.push((self.long_status_at(head).0, 1, 2));
        assert!(chain.len() as u64 * 16 <= LONG_TABLE_SPAN);
        for (index, (address, len, flags)) in (0..).zip(&chain) {
            let at = table.0 + 16 * index;
            self.ram.write_obj(*address, GuestAddress(at)).unwrap();
            self.ram.write_obj(*len, GuestAddress(at + 8)).unwrap();
            self.ram.write_obj(*flags, GuestAddress(at + 12)).unwrap();
            let next = u16::try_from(index + 1).unwrap();
            self.ram.write_obj(next, GuestAddress(at + 14)).unwrap();
        }
        let len = u32::try_from(chain.len() * 16).unwrap();
        self.descriptor(head.into(), table.0, len, 4, 0);
        self.publish(head, notify);
    }

    fn long_status_at(&self, head: u16) -> GuestAddress {
        self.at(LONG_HEADERS + u64::from(head) * 32 + 16)
    }

    /// Status of such a request; 0xaa until it is complete.
    pub(crate) fn long_status(&self, head: u16) -> u8 {
        self.ram.read_obj(self.long_status_at(head)).unwrap()
    }

    /// Waits until the device has completed `count` requests.
    pub(crate) fn wait_for_used(&self, count: u16) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.used() != count {
            assert!(Instant::now() < deadline, "{} of {count} answers", self.used());
            std::thread::yield_now();
        }
    }

    /// Stops serving and waits until no request is in flight.
    pub(crate) fn drain(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        assert!(self.transport.begin_drain().wait_until(deadline), "requests do not end");
    }

    /// Resets the device and waits until that is complete, as the specification requires.
    pub(crate) fn reset(&mut self) {
        self.set(0x70, 0);
        self.wait_for_reset();
    }

    /// Waits until a reset is complete.
    pub(crate) fn wait_for_reset(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.get(0x70) != 0 {
            assert!(Instant::now() < deadline, "the reset does not end");
            std::thread::yield_now();
        }
    }

    pub(crate) fn publish(&mut self, head: u16, notify: bool) {
        let slot = self.at(AVAIL + 4 + u64::from(self.avail % 16) * 2);
        self.ram.write_obj(head, slot).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.ram.write_obj(self.avail, self.at(AVAIL + 2)).unwrap();
        if notify {
            self.set(0x50, self.queue.into());
        }
    }

    /// Whether the device's own writes marked the page of `address`.
    pub(crate) fn marked(&self, address: u64) -> bool {
        let region = self.ram.find_region(GuestAddress(0)).unwrap();
        region.bitmap().dirty_at(usize::try_from(address).unwrap())
    }

    pub(crate) fn used(&self) -> u16 {
        self.ram.read_obj(self.at(USED + 2)).unwrap()
    }

    /// Waits for completion; returns the status.
    pub(crate) fn wait(&self) -> u8 {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.used() != self.avail {
            let status = self.status();
            assert!(Instant::now() < deadline, "no answer at status {status:#x}");
            std::thread::yield_now();
        }
        self.ram.read_obj(self.at(STATUS)).unwrap()
    }

    pub(crate) fn wait_for_needs_reset(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.status() & 0x40 == 0 {
            assert!(Instant::now() < deadline, "the device does not complain");
            std::thread::yield_now();
        }
    }
}
