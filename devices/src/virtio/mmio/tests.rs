//! A driver's side of the transport and of virtio-blk: registers, rings in guest RAM, requests.
#![allow(clippy::little_endian_bytes, reason = "a driver's registers")]

use super::*;
use crate::block::BlockNode;
use crate::block::memory::MemoryDisk;
use crate::irq::CountingIrq;
use crate::ram::GuestAddress;
use crate::virtio::blk::Block;
use proptest::prelude::*;
use std::time::{Duration, Instant};
use vm_memory::Bytes;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x8000;

struct Driver {
    ram: GuestRam,
    transport: MmioTransport,
    irq: Arc<CountingIrq>,
    node: Arc<BlockNode>,
    avail: u16,
}

impl Driver {
    fn new() -> Self {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let node = Arc::new(BlockNode::new("disk0", Box::new(MemoryDisk::new(64 << 10))));
        Self::with(ram, node, 0)
    }

    fn with(ram: GuestRam, node: Arc<BlockNode>, avail: u16) -> Self {
        let irq = Arc::new(CountingIrq::default());
        let device = Box::new(Block::new(node.clone()));
        let transport = MmioTransport::new(ram.clone(), device, irq.clone()).unwrap();
        Self { ram, transport, irq, node, avail }
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
        self.set(0x30, 0);
        self.set(0x38, 16);
        for (register, address) in [(0x80, DESC), (0x90, AVAIL), (0xa0, USED)] {
            self.set(register, u32::try_from(address).unwrap());
        }
        self.set(0x44, 1);
        self.set(0x70, 15);
    }

    fn descriptor(&self, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(DESC + index * 16);
        self.ram.write_obj(address, at).unwrap();
        self.ram.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        self.ram.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        self.ram.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Makes a request of header, data and status available; `notify` tells the device.
    fn submit(&mut self, kind: u32, sector: u64, len: u32, notify: bool) {
        self.ram.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.ram.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.ram.write_obj(0xaau8, GuestAddress(STATUS)).unwrap();
        let device_writes = if kind == 1 { 0 } else { 2 };
        self.descriptor(0, HEADER, 16, 1, 1);
        if len > 0 {
            self.descriptor(1, DATA, len, 1 | device_writes, 2);
        } else {
            self.descriptor(0, HEADER, 16, 1, 2);
        }
        self.descriptor(2, STATUS, 1, 2, 0);
        self.publish(0, notify);
    }

    fn publish(&mut self, head: u16, notify: bool) {
        let slot = AVAIL + 4 + u64::from(self.avail % 16) * 2;
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.ram.write_obj(self.avail, GuestAddress(AVAIL + 2)).unwrap();
        if notify {
            self.set(0x50, 0);
        }
    }

    fn used(&self) -> u16 {
        self.ram.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    /// Waits for the device to answer, and returns the status.
    fn wait(&self) -> u8 {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.used() != self.avail {
            assert!(Instant::now() < deadline, "no answer");
            std::thread::yield_now();
        }
        self.ram.read_obj(GuestAddress(STATUS)).unwrap()
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
    assert!(refused(&|state| state.queue.size = 3));
    assert!(refused(&|state| state.queue.desc_table = 1));
}

proptest! {
    #[test]
    fn any_register_access_is_survived(
        accesses in prop::collection::vec((0u64..0x200, any::<u32>(), any::<bool>()), 0..60)
    ) {
        let mut driver = Driver::new();
        for (offset, value, write) in accesses {
            if write { driver.set(offset, value) } else { let _ = driver.get(offset); }
        }
        driver.transport.drain();
        let state = driver.transport.save();
        // Whatever a guest can program can also be moved, or is refused.
        let _ = Driver::new().transport.restore(state);
    }
}
