//! A driver's side of the transport and of virtio-blk: registers, rings in guest RAM, requests.
#![allow(clippy::little_endian_bytes, reason = "a driver's registers")]

use super::*;
use crate::block::BlockNode;
use crate::block::memory::{MemoryDisk, Script};
use crate::hostile::{any_changes, any_json, change};
use crate::irq::CountingIrq;
use crate::ram::{GuestAddress, PAGE_SIZE};
use crate::virtio::blk::Block;
use proptest::prelude::*;
use std::time::{Duration, Instant};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x8000;
/// Each queue has its own of the above.
const QUEUE_SPAN: u64 = 0x1_0000;
/// What our own guest kernel accepts.
const F_FLUSH: u64 = 1 << 9;

struct Driver {
    ram: GuestRam,
    transport: MmioTransport,
    irq: Arc<CountingIrq>,
    node: Arc<BlockNode>,
    queue_count: u16,
    /// The queue that requests go to, and how many have gone there.
    queue: u16,
    avail: u16,
    /// The same of the queues that are not in use now.
    avail_of: [u16; 16],
}

impl Driver {
    fn new() -> Self {
        Self::of(MemoryDisk::new(64 << 10)).0
    }

    fn of(disk: MemoryDisk) -> (Self, Arc<Script>) {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let script = disk.script();
        let node = Arc::new(BlockNode::new("disk0", Box::new(disk)));
        (Self::with(ram, node, 0), script)
    }

    fn with(ram: GuestRam, node: Arc<BlockNode>, avail: u16) -> Self {
        Self::with_queues(ram, node, avail, 1)
    }

    fn with_queues(ram: GuestRam, node: Arc<BlockNode>, avail: u16, queue_count: u16) -> Self {
        let irq = Arc::new(CountingIrq::default());
        let device = Box::new(Block::new(node.clone(), queue_count));
        let transport = MmioTransport::new(ram.clone(), device, irq.clone()).unwrap();
        Self { ram, transport, irq, node, queue_count, queue: 0, avail, avail_of: [0; 16] }
    }

    fn several(queue_count: u16) -> (Self, Arc<Script>) {
        let (one, script) = Self::of(MemoryDisk::new(64 << 10));
        (Self::with_queues(one.ram, one.node, 0, queue_count), script)
    }

    /// From now on requests go to `queue`.
    fn select(&mut self, queue: u16) {
        self.avail_of[usize::from(self.queue)] = self.avail;
        self.queue = queue;
        self.avail = self.avail_of[usize::from(queue)];
    }

    /// Where something of the selected queue lies.
    fn at(&self, address: u64) -> GuestAddress {
        GuestAddress(address + u64::from(self.queue) * QUEUE_SPAN)
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn start(&mut self, features: u64) {
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

    fn descriptor(&self, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.at(DESC + index * 16);
        self.ram.write_obj(address, at).unwrap();
        self.ram.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        self.ram.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        self.ram.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Makes a request of header, data and status available; `notify` tells the device.
    fn submit(&mut self, kind: u32, sector: u64, len: u32, notify: bool) {
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

    fn publish(&mut self, head: u16, notify: bool) {
        let slot = self.at(AVAIL + 4 + u64::from(self.avail % 16) * 2);
        self.ram.write_obj(head, slot).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.ram.write_obj(self.avail, self.at(AVAIL + 2)).unwrap();
        if notify {
            self.set(0x50, self.queue.into());
        }
    }

    /// Whether the device's own writes marked the page of `address`.
    fn marked(&self, address: u64) -> bool {
        let region = self.ram.find_region(GuestAddress(0)).unwrap();
        region.bitmap().dirty_at(usize::try_from(address).unwrap())
    }

    fn used(&self) -> u16 {
        self.ram.read_obj(self.at(USED + 2)).unwrap()
    }

    /// Waits for the device to answer, and returns the status.
    fn wait(&self) -> u8 {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.used() != self.avail {
            let status = self.transport.status();
            assert!(Instant::now() < deadline, "no answer at status {status:#x}");
            std::thread::yield_now();
        }
        self.ram.read_obj(self.at(STATUS)).unwrap()
    }

    fn wait_for_needs_reset(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.get(0x70) & STATUS_NEEDS_RESET == 0 {
            assert!(Instant::now() < deadline, "the device does not complain");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_driver_finds_a_block_device_of_the_right_size() {
    let mut driver = Driver::new();
    assert_eq!([driver.get(0), driver.get(4), driver.get(8)], [MAGIC, 2, 2]);
    assert_eq!(driver.get(0x100), 128, "sectors");
    driver.set(0x30, 1);
    assert_eq!(driver.get(0x34), 0, "there is no second queue");
}

#[test]
fn what_is_written_is_read_back() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1);
    driver.ram.write_slice(&[0x5a; 1024], GuestAddress(DATA)).unwrap();
    driver.submit(1, 3, 1024, true);
    assert_eq!(driver.wait(), 0);
    assert!(driver.irq.count() > 0);
    driver.ram.write_slice(&[0; 1024], GuestAddress(DATA)).unwrap();
    driver.submit(0, 4, 512, true);
    assert_eq!(driver.wait(), 0);
    let mut back = [0; 512];
    driver.ram.read_slice(&mut back, GuestAddress(DATA)).unwrap();
    assert_eq!(back, [0x5a; 512]);
}

#[test]
fn flush_id_and_unknown_requests_are_answered() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1 | F_EVENT_IDX);
    driver.submit(4, 0, 0, true);
    assert_eq!(driver.wait(), 0);
    driver.submit(8, 0, 20, true);
    assert_eq!(driver.wait(), 0);
    assert_eq!(driver.ram.read_obj::<[u8; 5]>(GuestAddress(DATA)).unwrap(), *b"disk0");
    driver.submit(99, 0, 0, true);
    assert_eq!(driver.wait(), 2);
}

#[test]
fn requests_past_the_end_fail_and_the_device_goes_on() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1);
    for (sector, len) in [(128, 512), (u64::MAX, 512), (u64::MAX / 512, 512), (127, 1024), (0, 100)]
    {
        driver.submit(0, sector, len, true);
        assert_eq!(driver.wait(), 1, "sector {sector}, {len} bytes");
    }
    driver.submit(0, 127, 512, true);
    assert_eq!(driver.wait(), 0);
}

#[test]
fn an_indirect_chain_is_followed() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1 | F_INDIRECT);
    driver.submit(4, 0, 0, false);
    // Move the table elsewhere and point one indirect descriptor at it.
    let mut table = [0u8; 48];
    driver.ram.read_slice(&mut table, GuestAddress(DESC)).unwrap();
    driver.ram.write_slice(&table, GuestAddress(0x9000)).unwrap();
    driver.descriptor(0, 0x9000, 48, 4, 0);
    driver.set(0x50, 0);
    assert_eq!(driver.wait(), 0);
}

#[test]
fn a_request_in_the_ring_is_served_after_a_move() {
    let mut source = Driver::new();
    source.start(F_VERSION_1 | F_EVENT_IDX);
    source.submit(4, 0, 0, true);
    source.wait();
    source.transport.drain();
    source.ram.write_slice(&[7; 512], GuestAddress(DATA)).unwrap();
    source.submit(1, 0, 512, true);
    let record = source.transport.save_record("disk0");
    let mut destination = Driver::with(source.ram.clone(), source.node.clone(), source.avail);
    destination.transport.restore_record(record).unwrap();
    assert_ne!(destination.used(), destination.avail, "nothing happens before the resume");
    destination.transport.resume();
    assert_eq!(destination.wait(), 0);
    let mut sector = [0; 512];
    destination.node.read_at(&mut sector, 0).unwrap();
    assert_eq!(sector, [7; 512]);
}

#[test]
fn a_reset_device_can_be_started_again() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1);
    driver.submit(4, 0, 0, true);
    driver.wait();
    driver.set(0x70, 0);
    assert_eq!((driver.get(0x70), driver.get(0x44)), (0, 0));
    driver.ram.write_obj(0u32, GuestAddress(AVAIL)).unwrap();
    driver.ram.write_obj(0u32, GuestAddress(USED)).unwrap();
    driver.avail = 0;
    driver.start(F_VERSION_1);
    driver.submit(4, 0, 0, true);
    assert_eq!(driver.wait(), 0);
}

#[test]
fn a_hostile_ring_makes_the_device_need_a_reset() {
    // A chain that loops, one without status, one outside RAM, and more entries than the ring has.
    let hostile: [fn(&mut Driver); 4] = [
        |driver| {
            driver.descriptor(0, HEADER, 16, 1, 0);
            driver.publish(0, true);
        },
        |driver| {
            driver.descriptor(0, HEADER, 16, 0, 0);
            driver.publish(0, true);
        },
        |driver| {
            driver.descriptor(0, u64::MAX - 8, 16, 1, 1);
            driver.descriptor(1, STATUS, 1, 2, 0);
            driver.publish(0, true);
        },
        |driver| {
            driver.ram.write_obj(999u16, GuestAddress(AVAIL + 2)).unwrap();
            driver.set(0x50, 0);
        },
    ];
    for attack in hostile {
        let mut driver = Driver::new();
        driver.start(F_VERSION_1);
        attack(&mut driver);
        driver.wait_for_needs_reset();
        driver.transport.drain();
    }
}

#[test]
fn rings_outside_ram_make_the_device_need_a_reset() {
    let mut driver = Driver::new();
    driver.set(0x70, 1);
    driver.set(0x70, 3);
    driver.set(0x24, 1);
    driver.set(0x20, 1);
    driver.set(0x70, 11);
    driver.set(0x38, 16);
    driver.set(0x84, 0xffff);
    driver.set(0x44, 1);
    driver.set(0x70, 15);
    driver.wait_for_needs_reset();
}

#[test]
fn status_out_of_order_and_unknown_features_are_refused() {
    let mut driver = Driver::new();
    driver.set(0x70, 4);
    assert_eq!(driver.get(0x70), 0);
    driver.set(0x70, 3);
    driver.set(0x20, 1 << 31);
    driver.set(0x70, 11);
    assert_eq!(driver.get(0x70), 3, "FEATURES_OK stays clear");
}

#[test]
fn records_of_impossible_devices_are_refused() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1);
    driver.transport.drain();
    let good = driver.transport.save();
    let refused = |change: &dyn Fn(&mut MmioState)| {
        let mut state = good.clone();
        change(&mut state);
        Driver::new().transport.restore(state).is_err()
    };
    assert!(refused(&|state| state.device_id = 1));
    assert!(refused(&|state| state.driver_features |= 1 << 60));
    assert!(refused(&|state| state.queues[0].size = 3));
    assert!(refused(&|state| state.queues[0].desc_table = 1));
    assert!(refused(&|state| state.queues[0].used_ring = 1 << 40), "outside RAM");
    assert!(refused(&|state| state.queues.clear()), "no queue");
    assert!(refused(&|state| state.queues.push(state.queues[0].clone())), "one too many");
    assert!(refused(&|state| state.status = 4), "DRIVER_OK before all others");
    assert!(refused(&|state| state.status |= 0x100));
    assert!(refused(&|state| state.driver_features = 0), "no VERSION_1");
    assert!(refused(&|state| state.device.kind = "virtio-net".into()));
    assert!(Driver::new().transport.restore(good.clone()).is_ok());
}

#[test]
fn a_record_of_version_1_has_its_one_queue() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1);
    driver.submit(4, 0, 0, true);
    driver.wait();
    driver.transport.drain();
    let now = driver.transport.save_record("disk0");
    let mut old = now.clone();
    old.version = 1;
    let state = old.state.as_object_mut().unwrap();
    let queues = state.remove("queues").unwrap();
    state.insert("queue".into(), queues[0].clone());
    let mut destination = Driver::with(driver.ram.clone(), driver.node.clone(), driver.avail);
    destination.transport.restore_record(old).unwrap();
    assert_eq!(destination.transport.save_record("disk0"), now);
}

#[test]
fn queues_are_programmed_one_by_one_and_there_are_no_more_than_that() {
    let (mut driver, _) = Driver::several(3);
    assert_ne!(driver.get(0x10) & 1 << 12, 0, "VIRTIO_BLK_F_MQ");
    assert_eq!(driver.get(0x120) >> 16, 3, "num_queues");
    for (queue, max_size) in [(0, 256), (2, 256), (3, 0), (u32::MAX, 0)] {
        driver.set(0x30, queue);
        assert_eq!(driver.get(0x34), max_size, "queue {queue}");
        driver.set(0x44, 1);
        assert_eq!(driver.get(0x44), u32::from(max_size > 0), "queue {queue}");
    }
    let ready = |state: MmioState| state.queues.iter().map(|queue| queue.ready).collect::<Vec<_>>();
    assert_eq!(ready(driver.transport.save()), [true, false, true]);
}

#[test]
fn impossible_queue_sizes_are_refused() {
    let mut driver = Driver::new();
    for (asked, size) in [(8, 8), (0, 8), (3, 8), (512, 8), (65536, 8), (0x1_0010, 8), (256, 256)] {
        driver.set(0x38, asked);
        assert_eq!(driver.transport.save().queues[0].size, size, "after {asked}");
    }
}

#[test]
fn every_queue_is_served() {
    let (mut driver, _) = Driver::several(4);
    driver.start(F_VERSION_1);
    for queue in [3, 1, 2, 0, 3] {
        driver.select(queue);
        driver.submit(4, 0, 0, true);
        assert_eq!(driver.wait(), 0, "queue {queue}");
    }
    driver.set(0x50, 4);
    driver.set(0x50, u32::MAX);
    assert_eq!(driver.get(0x70), 15, "a queue that is not there can be notified");
}

#[test]
fn a_driver_may_leave_queues_alone() {
    let (mut driver, _) = Driver::several(4);
    driver.queue_count = 1;
    driver.start(F_VERSION_1);
    driver.set(0x50, 3);
    driver.submit(4, 0, 0, true);
    assert_eq!(driver.wait(), 0);
}

#[test]
fn all_queues_are_drained_together_and_move_together() {
    let (mut source, script) = Driver::several(3);
    source.start(F_VERSION_1 | F_FLUSH);
    script.hold(true);
    for queue in 0..3 {
        source.select(queue);
        source.submit(4, 0, 0, true);
    }
    script.wait_until_held_by(3);
    let drain = source.transport.begin_drain();
    for queue in 0..3 {
        source.select(queue);
        source.submit(4, 0, 0, true);
    }
    script.hold(false);
    drain.wait();
    for queue in 0..3 {
        source.select(queue);
        assert_eq!(source.used(), 1, "one was in flight, the other stays in the ring");
    }
    let record = source.transport.save_record("disk0");
    let mut one = Driver::with(source.ram.clone(), source.node.clone(), 0);
    let error = one.transport.restore_record(record.clone()).unwrap_err().to_string();
    assert!(error.contains("1 virtqueues here and 3 there"), "{error}");
    let mut destination = Driver::with_queues(source.ram.clone(), source.node.clone(), 2, 3);
    destination.avail_of = [2; 16];
    destination.transport.restore_record(record).unwrap();
    destination.transport.resume();
    for queue in 0..3 {
        destination.select(queue);
        assert_eq!(destination.wait(), 0);
    }
    assert_eq!(script.flush_count(), 6);
}

#[test]
fn one_broken_queue_stops_the_whole_device() {
    let (mut driver, _) = Driver::several(2);
    driver.start(F_VERSION_1);
    driver.select(1);
    driver.descriptor(0, HEADER, 16, 0, 0);
    driver.publish(0, true);
    driver.wait_for_needs_reset();
    driver.select(0);
    driver.submit(4, 0, 0, true);
    driver.transport.drain();
    assert_eq!(driver.used(), 0);
    driver.set(0x70, 0);
    assert_eq!(driver.get(0x70), 0);
}

#[test]
fn a_disk_that_became_another_is_refused() {
    let (mut source, _) = Driver::of(MemoryDisk::new(64 << 10));
    source.start(F_VERSION_1);
    source.transport.drain();
    let others = [MemoryDisk::new(32 << 10), MemoryDisk::new(64 << 10).into_read_only()];
    for other in others {
        let (mut destination, _) = Driver::of(other);
        let record = source.transport.save_record("disk0");
        let error = destination.transport.restore_record(record).unwrap_err().to_string();
        assert!(error.contains("writable with 128 sectors"), "{error}");
    }
}

#[test]
fn a_read_only_disk_says_so_and_takes_no_writes() {
    let (mut driver, _) = Driver::of(MemoryDisk::new(64 << 10).into_read_only());
    assert_ne!(driver.get(0x10) & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    driver.start(F_VERSION_1);
    driver.submit(1, 0, 512, true);
    assert_eq!(driver.wait(), 1);
    driver.submit(0, 0, 512, true);
    assert_eq!(driver.wait(), 0);
}

#[test]
fn a_failing_disk_fails_requests_and_recovers() {
    let (mut driver, script) = Driver::of(MemoryDisk::new(64 << 10));
    driver.start(F_VERSION_1 | F_FLUSH);
    script.fail(true);
    for (kind, len) in [(0, 512), (1, 512), (4, 0)] {
        driver.submit(kind, 0, len, true);
        assert_eq!(driver.wait(), 1, "request of type {kind}");
    }
    script.fail(false);
    driver.submit(0, 0, 512, true);
    assert_eq!(driver.wait(), 0);
}

#[test]
fn writes_are_durable_at_once_for_a_driver_that_cannot_flush() {
    for (features, flush_count) in [(F_VERSION_1, 1), (F_VERSION_1 | F_FLUSH, 0)] {
        let (mut driver, script) = Driver::of(MemoryDisk::new(64 << 10));
        driver.start(features);
        driver.submit(1, 0, 512, true);
        assert_eq!(driver.wait(), 0);
        assert_eq!(script.flush_count(), flush_count);
    }
}

const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Sectors of the disk that are zero, of eight that are not at first.
fn zero_sectors(driver: &Driver) -> Vec<u64> {
    let mut sector = [0; 512];
    let is_zero = |index: &u64| {
        driver.node.read_at(&mut sector, index * 512).unwrap();
        sector == [0; 512]
    };
    (0..8).filter(is_zero).collect()
}

impl Driver {
    /// Submits ranges `(sector, sectors, flags)` and returns the status.
    fn submit_ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        self.node.write_at(&[0x77; 8 * 512], 0).unwrap();
        for (at, (sector, sectors, flags)) in (0..).step_by(16).zip(ranges) {
            self.ram.write_obj(*sector, self.at(DATA + at)).unwrap();
            self.ram.write_obj(*sectors, self.at(DATA + at + 8)).unwrap();
            self.ram.write_obj(*flags, self.at(DATA + at + 12)).unwrap();
        }
        let len = u32::try_from(ranges.len() * 16).unwrap();
        self.submit(kind, 0, len, false);
        self.descriptor(1, self.at(DATA).0, len, 1, 2);
        self.set(0x50, 0);
        self.wait()
    }
}

#[test]
fn discards_and_zeroes_reach_the_ranges_and_no_others() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1 | F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
    assert_eq!(driver.submit_ranges(T_DISCARD, &[(1, 2, 0), (6, 1, 0)]), 0);
    assert_eq!(zero_sectors(&driver), [1, 2, 6]);
    for flags in [0, 1] {
        assert_eq!(driver.submit_ranges(T_WRITE_ZEROES, &[(2, 3, flags)]), 0);
        assert_eq!(zero_sectors(&driver), [2, 3, 4]);
    }
    assert_eq!(driver.submit_ranges(T_DISCARD, &[(3, 0, 0)]), 0, "nothing is easily discarded");
    assert_eq!(zero_sectors(&driver), [0; 0]);
}

#[test]
fn limits_of_discards_and_zeroes_are_told_and_kept() {
    let mut driver = Driver::of(MemoryDisk::new(128 << 20)).0;
    driver.start(F_VERSION_1 | F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
    let limits = [0x124, 0x128, 0x130, 0x134].map(|offset| driver.get(offset));
    let [discard_sectors, discard_ranges, zeroes_sectors, zeroes_ranges] = limits;
    let mut may_unmap = [0];
    driver.transport.read(0x138, &mut may_unmap);
    assert_eq!((driver.get(0x12c), may_unmap), (8, [1]), "alignment, write_zeroes_may_unmap");
    for (kind, sectors, ranges) in [
        (T_DISCARD, discard_sectors, discard_ranges),
        (T_WRITE_ZEROES, zeroes_sectors, zeroes_ranges),
    ] {
        assert_eq!(driver.submit_ranges(kind, &[(0, sectors, 0)]), 0);
        assert_eq!(driver.submit_ranges(kind, &[(0, sectors + 1, 0)]), 1, "too long");
        let most = usize::try_from(ranges).unwrap();
        assert_eq!(driver.submit_ranges(kind, &vec![(0, 1, 0); most]), 0);
        assert_eq!(driver.submit_ranges(kind, &vec![(0, 1, 0); most + 1]), 1, "too many");
    }
}

#[test]
fn a_hostile_range_fails_the_request_and_touches_nothing() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1 | F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
    for (kind, range, status) in [
        (T_DISCARD, (0, 1, 1), 2), // unmap is for write-zeroes only
        (T_DISCARD, (0, 1, 2), 2),
        (T_WRITE_ZEROES, (0, 1, 2), 2),
        (T_WRITE_ZEROES, (0, 1, u32::MAX), 2),
        (T_DISCARD, (128, 1, 0), 1),
        (T_DISCARD, (127, 2, 0), 1),
        (T_DISCARD, (0, u32::MAX, 0), 1),
        (T_WRITE_ZEROES, (u64::MAX, 1, 0), 1),
        (T_WRITE_ZEROES, (u64::MAX / 512, 2, 0), 1),
    ] {
        assert_eq!(driver.submit_ranges(kind, &[range]), status, "request {kind} of {range:?}");
        assert_eq!(zero_sectors(&driver), [0; 0]);
    }
    assert_eq!(driver.submit_ranges(T_DISCARD, &[(0, 1, 0), (128, 1, 0)]), 1);
    assert_eq!(zero_sectors(&driver), [0; 0], "the first range is good, the second is not");
    assert_eq!(driver.submit_ranges(T_DISCARD, &[]), 1);
    // Half a range, and a range that the device may write.
    for (len, flags) in [(24, 1), (16, 3)] {
        driver.submit(T_DISCARD, 0, 16, false);
        driver.descriptor(1, DATA, len, flags, 2);
        driver.set(0x50, 0);
        assert_eq!(driver.wait(), 1);
    }
}

#[test]
fn discards_and_zeroes_need_their_features_and_a_writable_disk() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1 | F_FLUSH);
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        assert_eq!(driver.submit_ranges(kind, &[(0, 1, 0)]), 2);
    }
    let (mut driver, _) = Driver::of(MemoryDisk::new(64 << 10).into_read_only());
    assert_eq!(driver.get(0x10) & 3 << 13, 0);
    driver.set(0x70, 1);
}

#[test]
fn a_failing_disk_fails_discards_and_zeroes() {
    let (mut driver, script) = Driver::of(MemoryDisk::new(64 << 10));
    driver.start(F_VERSION_1 | F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        driver.submit_ranges(kind, &[(0, 1, 0)]);
        script.fail(true);
        driver.publish(0, true);
        assert_eq!(driver.wait(), 1);
        script.fail(false);
    }
}

#[test]
fn a_request_may_be_cut_into_any_descriptors() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1);
    driver.node.write_at(&[0x42; 512], 512).unwrap();
    driver.ram.write_obj(0u32, GuestAddress(HEADER)).unwrap();
    driver.ram.write_obj(1u64, GuestAddress(HEADER + 8)).unwrap();
    // The header in two, an empty descriptor anywhere, and data and status in one.
    let chain = [
        (HEADER, 5, 0),
        (HEADER + 5, 11, 0),
        (u64::MAX, 0, 2),
        (DATA, 500, 2),
        (DATA + 600, 13, 2),
    ];
    for (index, (address, len, write)) in (0..).zip(chain) {
        let next = if index < 4 { 1 } else { 0 };
        driver.descriptor(index, address, len, write | next, u16::try_from(index).unwrap() + 1);
    }
    driver.ram.write_obj(0xaau8, GuestAddress(DATA + 612)).unwrap();
    driver.publish(0, true);
    driver.wait();
    assert_eq!(driver.ram.read_obj::<u8>(GuestAddress(DATA + 612)).unwrap(), 0, "status");
    assert_eq!(driver.ram.read_obj::<[u8; 12]>(GuestAddress(DATA + 600)).unwrap(), [0x42; 12]);
    assert_eq!(driver.ram.read_obj::<u32>(GuestAddress(USED + 8)).unwrap(), 513, "used length");
}

#[test]
fn data_in_the_wrong_direction_fails_the_request() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1);
    for (kind, flags) in [(0, 1), (1, 3)] {
        driver.submit(kind, 0, 512, false);
        driver.descriptor(1, DATA, 512, flags, 2);
        driver.set(0x50, 0);
        assert_eq!(driver.wait(), 1, "request of type {kind}");
    }
}

#[test]
fn whatever_the_device_writes_is_marked_for_migration() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1);
    driver.submit(0, 0, 1024, false);
    driver.ram.iter().for_each(|region| region.get_mmap().bitmap().reset());
    driver.set(0x50, 0);
    driver.wait();
    driver.transport.drain();
    for (page, marked) in [(USED, true), (DATA, true), (STATUS, true)] {
        assert_eq!(driver.marked(page), marked, "page {:#x}", page / PAGE_SIZE);
    }
    for page in [DESC, AVAIL, HEADER, DATA + PAGE_SIZE] {
        assert!(!driver.marked(page), "page {:#x} was only read", page / PAGE_SIZE);
    }
}

#[test]
fn with_event_index_no_interrupt_comes_before_the_driver_wants_it() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1 | F_EVENT_IDX);
    // used_event, behind the available ring's 16 entries: after the third completion.
    driver.ram.write_obj(2u16, GuestAddress(AVAIL + 4 + 2 * 16)).unwrap();
    for expected in [0, 0, 1] {
        driver.submit(4, 0, 0, true);
        driver.wait();
        driver.transport.drain();
        assert_eq!(driver.irq.count(), expected);
        driver.transport.resume();
    }
}

#[test]
fn a_drain_waits_for_the_request_in_flight_and_leaves_the_rest() {
    let (mut driver, script) = Driver::of(MemoryDisk::new(64 << 10));
    driver.start(F_VERSION_1 | F_FLUSH);
    script.hold(true);
    driver.submit(4, 0, 0, false);
    driver.publish(0, true);
    script.wait_until_held();
    let (sender, drained) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let transport = &mut driver.transport;
        scope.spawn(move || {
            transport.drain();
            sender.send(()).unwrap();
        });
        assert!(drained.recv_timeout(Duration::from_millis(50)).is_err(), "one is in flight");
        script.hold(false);
        drained.recv_timeout(Duration::from_secs(10)).unwrap();
    });
    assert_eq!(driver.used(), 1, "the second stays in the ring");
    driver.transport.resume();
    driver.wait();
    assert_eq!(script.flush_count(), 2);
}

#[test]
fn requests_that_arrive_while_the_worker_finds_none_are_served() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1 | F_FLUSH);
    for _ in 0..20_000 {
        // Once more than needed: the worker looks again when it has served the request.
        driver.submit(4, 0, 0, true);
        driver.set(0x50, 0);
        assert_eq!(driver.wait(), 0);
    }
}

#[test]
fn a_guest_that_never_stops_asking_cannot_hold_up_a_reset() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1);
    driver.submit(4, 0, 0, true);
    let (ram, mut avail) = (driver.ram.clone(), driver.avail);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let flood = std::thread::spawn(move || {
        while !stopped.load(Ordering::SeqCst) {
            let used: u16 = ram.read_obj(GuestAddress(USED + 2)).unwrap();
            if avail.wrapping_sub(used) < 8 {
                avail = avail.wrapping_add(1);
                ram.write_obj(avail, GuestAddress(AVAIL + 2)).unwrap();
            }
        }
    });
    driver.transport.drain();
    driver.transport.resume();
    driver.set(0x70, 0);
    assert_eq!(driver.get(0x70), 0);
    stop.store(true, Ordering::SeqCst);
    flood.join().unwrap();
}

#[test]
fn draining_an_idle_device_is_quick() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1);
    let mut times: Vec<Duration> = (0..101)
        .map(|_| {
            let start = Instant::now();
            driver.transport.drain();
            let time = start.elapsed();
            driver.transport.resume();
            time
        })
        .collect();
    times.sort();
    // Microseconds where the host is idle; the bound leaves room for a busy one.
    assert!(times[50] < Duration::from_millis(2), "median {:?}", times[50]);
    println!("drain: median {:?}, worst {:?}", times[50], times[100]);
}

proptest! {
    #[test]
    fn any_register_access_is_survived(
        accesses in prop::collection::vec((0u64..0x200, any::<u32>(), any::<bool>()), 0..60)
    ) {
        let (mut driver, _) = Driver::several(2);
        for (offset, value, write) in accesses {
            if write { driver.set(offset, value) } else { let _ = driver.get(offset); }
        }
        driver.transport.drain();
        let record = driver.transport.save_record("disk0");
        // Whatever a guest can program can also be moved: it cannot pin itself to its host.
        let (mut destination, _) = Driver::several(2);
        prop_assert!(destination.transport.restore_record(record.clone()).is_ok());
        prop_assert_eq!(destination.transport.save_record("disk0"), record);
    }

    #[test]
    fn any_programming_of_a_started_device_can_be_moved(
        accesses in prop::collection::vec(
            (prop::sample::select(vec![0x14u64, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70,
                0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4]),
             prop_oneof![0u32..16, any::<u32>(), Just(0xfff0), Just(4096), Just(0x8f)]), 0..30),
        started in any::<bool>()
    ) {
        let (mut driver, _) = Driver::several(3);
        if started {
            driver.start(F_VERSION_1 | F_EVENT_IDX);
        }
        for (offset, value) in accesses {
            driver.set(offset, value);
        }
        driver.transport.drain();
        let record = driver.transport.save_record("disk0");
        let (ram, node) = (driver.ram.clone(), driver.node.clone());
        let mut destination = Driver::with_queues(ram, node, 0, 3);
        prop_assert!(destination.transport.restore_record(record.clone()).is_ok());
        prop_assert_eq!(destination.transport.save_record("disk0"), record);
    }

    #[test]
    fn any_record_is_survived(changes in any_changes(), other in prop::option::of(any_json())) {
        let mut driver = Driver::new();
        driver.start(F_VERSION_1);
        driver.transport.drain();
        let mut record = driver.transport.save_record("disk0");
        match other {
            Some(other) => record.state = other,
            None => change(&mut record.state, &changes),
        }
        if driver.transport.restore_record(record).is_ok() {
            driver.transport.resume();
            driver.set(0x50, 0);
            driver.transport.drain();
        }
        driver.set(0x70, 0);
        prop_assert_eq!(driver.get(0x70), 0);
    }

    #[test]
    fn any_ring_is_survived(
        descriptors in prop::collection::vec(
            (prop_oneof![0u64..0x10000, any::<u64>(), (1u64 << 21) - 64..1 << 21],
             prop_oneof![0u32..0x2000, any::<u32>()], 0u16..8, 0u16..20), 16),
        heads in prop::collection::vec(0u16..20, 16),
        bytes in prop::collection::vec(any::<u8>(), 64),
        avail in prop_oneof![0u16..17, any::<u16>()],
        features in prop::sample::select(vec![0, F_EVENT_IDX, F_INDIRECT, F_EVENT_IDX | F_INDIRECT]),
    ) {
        let mut driver = Driver::new();
        driver.start(F_VERSION_1 | features);
        driver.ram.write_slice(&bytes, GuestAddress(HEADER)).unwrap();
        for (index, (address, len, flags, next)) in (0..).zip(descriptors) {
            driver.descriptor(index, address, len, flags, next);
        }
        for (index, head) in (0..).zip(heads) {
            driver.ram.write_obj(head, GuestAddress(AVAIL + 4 + 2 * index)).unwrap();
        }
        driver.ram.write_obj(avail, GuestAddress(AVAIL + 2)).unwrap();
        driver.set(0x50, 0);
        driver.transport.drain();
        let record = driver.transport.save_record("disk0");
        let mut destination = Driver::with(driver.ram.clone(), driver.node.clone(), 0);
        prop_assert!(destination.transport.restore_record(record).is_ok());
        destination.transport.resume();
        destination.set(0x70, 0);
        prop_assert_eq!(destination.get(0x70), 0, "it can be reset");
    }
}
