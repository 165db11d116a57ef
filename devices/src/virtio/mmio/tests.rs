//! Registers, queues and records of the transport, with a disk behind it.

use super::*;
use crate::block::memory::MemoryDisk;
use crate::hostile::{any_changes, any_json, change};
use crate::ram::{GuestAddress, PAGE_SIZE};
use crate::state::Persist;
use crate::virtio::blk_request::F_FLUSH;
use crate::virtio::driver::*;
use proptest::prelude::*;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestMemoryBackend};

#[test]
fn a_driver_finds_a_block_device_of_the_right_size() {
    let mut driver = Driver::new();
    assert_eq!([driver.get(0), driver.get(4), driver.get(8)], [MAGIC, 2, 2]);
    assert_eq!(driver.get(0x100), 128, "sectors");
    driver.set(0x30, 1);
    assert_eq!(driver.get(0x34), 0, "there is no second queue");
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
    source.drain();
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
    driver.reset();
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
        driver.drain();
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
    driver.drain();
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
    driver.drain();
    let now = driver.transport.save_record("disk0");
    let mut old = now.clone();
    old.version = 1;
    let mut state: serde_json::Value = old.state.decode().unwrap();
    let queues = state.as_object_mut().unwrap().remove("queues").unwrap();
    state["queue"] = queues[0].clone();
    old.state = state.into();
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
    let mut drain = source.transport.begin_drain();
    for queue in 0..3 {
        source.select(queue);
        source.submit(4, 0, 0, true);
    }
    script.hold(false);
    assert!(drain.wait_until(Instant::now() + Duration::from_secs(30)));
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
    driver.drain();
    assert_eq!(driver.used(), 0);
    driver.set(0x70, 0);
    assert_eq!(driver.get(0x70), 0);
}

#[test]
fn whatever_the_device_writes_is_marked_for_migration() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1);
    driver.submit(0, 0, 1024, false);
    driver.ram.iter().for_each(|region| region.get_mmap().bitmap().reset());
    driver.set(0x50, 0);
    driver.wait();
    driver.drain();
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
        driver.drain();
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
        let driver = &mut driver;
        scope.spawn(move || {
            driver.drain();
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
    driver.drain();
    driver.transport.resume();
    driver.reset();
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
            driver.drain();
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
        driver.drain();
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
        driver.drain();
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
        driver.drain();
        let mut record = driver.transport.save_record("disk0");
        match other {
            Some(other) => record.state = other.into(),
            None => change(&mut record.state, &changes),
        }
        if driver.transport.restore_record(record).is_ok() {
            driver.transport.resume();
            driver.set(0x50, 0);
            driver.drain();
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
        driver.drain();
        let record = driver.transport.save_record("disk0");
        let mut destination = Driver::with(driver.ram.clone(), driver.node.clone(), 0);
        prop_assert!(destination.transport.restore_record(record).is_ok());
        destination.transport.resume();
        destination.reset();
    }
}
