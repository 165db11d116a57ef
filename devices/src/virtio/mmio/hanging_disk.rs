//! Tests with a hanging disk: no vCPU waits for it, a drain waits only until its deadline, and everything
//! continues when the disk recovers.

use super::*;
use crate::block::memory::{MemoryDisk, Script};
use crate::ram::GuestAddress;
use crate::state::Persist;
use crate::virtio::blk_request::{F_FLUSH, T_FLUSH, T_OUT};
use crate::virtio::driver::*;
use std::sync::mpsc;
use vm_memory::Bytes;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// A device with a request that hangs until the script releases it.
fn hanging() -> (Driver, Arc<Script>) {
    let (mut driver, script) = Driver::of(MemoryDisk::new(64 << 10));
    driver.start(F_VERSION_1 | F_FLUSH);
    script.hold(true);
    driver.submit(T_FLUSH, 0, 0, true);
    script.wait_until_held();
    (driver, script)
}

/// Runs `act`, which must return while the disk hangs.
fn at_once<T: Send>(
    driver: &mut Driver,
    script: &Script,
    act: impl FnOnce(&mut Driver) -> T + Send,
) -> T {
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || drop(sender.send(act(driver))));
        let result = receiver.recv_timeout(Duration::from_secs(10));
        if result.is_err() {
            script.hold(false);
        }
        result.expect("a vCPU waits for the disk")
    })
}

#[test]
fn every_register_can_be_read_and_written_while_the_disk_hangs() {
    let (mut driver, script) = hanging();
    let (ready, status) = at_once(&mut driver, &script, |driver| {
        for offset in (0..0x200).step_by(4) {
            driver.get(offset);
            if offset != 0x70 {
                driver.set(offset, 0);
            }
        }
        (driver.get(0x44), driver.get(0x70))
    });
    assert_eq!((ready, status), (1, 15), "a live queue cannot be changed");
    script.hold(false);
    assert_eq!(driver.wait(), 0);
}

#[test]
fn a_reset_returns_while_the_disk_hangs_and_is_complete_when_it_wakes_up() {
    let (mut driver, script) = hanging();
    let status = at_once(&mut driver, &script, |driver| {
        driver.set(0x70, 0);
        driver.get(0x70)
    });
    assert_eq!(status, 15, "the rings are in use");
    // Programming is ignored now, and the driver can tell.
    driver.set(0x70, 1);
    driver.set(0x44, 0);
    driver.set(0x70, 0);
    assert_eq!((driver.get(0x70), driver.get(0x44)), (15, 1));
    let used = driver.used();
    script.hold(false);
    driver.wait_for_reset();
    assert_eq!(driver.get(0x44), 0);
    assert_eq!(driver.used(), used, "after a reset nothing is answered");
    assert_eq!(driver.ram.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 0xaa);
    driver.ram.write_obj(0u32, GuestAddress(AVAIL)).unwrap();
    driver.avail = 0;
    driver.start(F_VERSION_1 | F_FLUSH);
    driver.submit(T_FLUSH, 0, 0, true);
    assert_eq!(driver.wait(), 0);
}

#[test]
fn a_reset_without_requests_in_flight_needs_no_thread_to_be_complete() {
    let (mut driver, script) = Driver::of(MemoryDisk::new(64 << 10));
    // Linux's virtio-mmio driver does not check that its reset is complete.
    for round in 0..200 {
        driver.ram.write_obj(0u32, GuestAddress(AVAIL)).unwrap();
        driver.ram.write_obj(0u32, GuestAddress(USED)).unwrap();
        driver.avail = 0;
        driver.start(F_VERSION_1 | F_FLUSH);
        driver.submit(T_FLUSH, 0, 0, true);
        assert_eq!(driver.wait(), 0);
        if round % 2 == 0 {
            driver.reset();
            continue;
        }
        // Parked: no request is in flight, so the reset does not need its thread.
        driver.drain();
        assert!(driver.transport.workers().all(|worker| worker.retire().is_none()));
        driver.set(0x70, 0);
        assert_eq!((driver.get(0x70), driver.get(0x44)), (0, 0));
        driver.transport.resume();
    }
    assert_eq!(script.flush_count(), 200, "no notification went to a worker of an earlier life");
}

#[test]
fn a_drain_waits_for_a_reset_that_is_under_way_and_what_is_saved_is_a_reset_device() {
    let (mut driver, script) = hanging();
    driver.set(0x70, 0);
    let mut drain = driver.transport.begin_drain();
    assert!(!drain.wait_until(Instant::now() + Duration::from_millis(10)));
    assert_eq!(drain.took(), None);
    script.hold(false);
    assert!(drain.wait_until(soon()));
    assert!(drain.took().unwrap() >= Duration::from_millis(10));
    let record = driver.transport.save_record("disk0");
    let mut destination = Driver::new();
    destination.transport.restore_record(record.clone()).unwrap();
    assert_eq!(destination.transport.save_record("disk0"), record);
    assert_eq!((destination.get(0x70), driver.get(0x70)), (0, 0));
    driver.transport.resume();
    driver.ram.write_obj(0u32, GuestAddress(AVAIL)).unwrap();
    driver.avail = 0;
    driver.start(F_VERSION_1);
    driver.submit(T_FLUSH, 0, 0, true);
    assert_eq!(driver.wait(), 0);
}

#[test]
fn a_drain_has_a_deadline_and_says_afterwards_how_long_it_took() {
    let (mut driver, script) = hanging();
    let start = Instant::now();
    let mut drain = driver.transport.begin_drain();
    for _ in 0..3 {
        assert!(!drain.wait_until(Instant::now() + Duration::from_millis(5)));
    }
    assert_eq!(drain.took(), None);
    let nothing_in_flight = Driver::new().transport.begin_drain();
    assert_eq!(nothing_in_flight.took(), Some(Duration::ZERO), "there is no worker");
    script.hold(false);
    // Nobody waits for it. The worker records when it parked.
    while drain.took().is_none() {
        assert!(start.elapsed() < Duration::from_secs(30));
        std::thread::yield_now();
    }
    let took = drain.took().unwrap();
    assert!(took >= Duration::from_millis(15) && took <= start.elapsed());
    assert!(drain.wait_until(start), "it has ended, whatever the deadline");
    assert_eq!(drain.took(), Some(took));
    assert_eq!(driver.used(), 1);
}

#[test]
fn a_guest_goes_on_although_its_drain_has_not_ended() {
    let (mut driver, script) = hanging();
    let mut first = driver.transport.begin_drain();
    assert!(!first.wait_until(Instant::now()));
    // Two drains: one is queried later, the other dropped.
    driver.transport.resume();
    drop(driver.transport.begin_drain());
    driver.transport.resume();
    driver.publish(0, true);
    script.hold(false);
    assert_eq!(driver.wait(), 0);
    assert_eq!(script.flush_count(), 2);
    assert!(first.wait_until(soon()) && first.took().is_some());
    driver.drain();
    driver.submit(T_FLUSH, 0, 0, true);
    assert_eq!(driver.used(), 2, "it is parked all the same");
    driver.transport.resume();
    assert_eq!(driver.wait(), 0);
}

#[test]
fn a_device_can_be_dropped_while_its_disk_hangs() {
    let (driver, script) = hanging();
    let Driver { transport, node, .. } = driver;
    let (sender, dropped) = mpsc::channel();
    std::thread::spawn(move || {
        drop(transport);
        sender.send(()).unwrap();
    });
    dropped.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(Arc::strong_count(&node) > 1, "the thread keeps what it uses");
    script.hold(false);
    let deadline = soon();
    while Arc::strong_count(&node) > 1 {
        assert!(Instant::now() < deadline, "the thread does not end");
        std::thread::yield_now();
    }
}

#[test]
fn a_record_can_be_restored_again_before_the_device_runs() {
    let (mut source, script) = Driver::of(MemoryDisk::new(64 << 10));
    source.start(F_VERSION_1 | F_EVENT_IDX);
    source.drain();
    let early = source.transport.save_record("disk0");
    source.transport.resume();
    source.submit(T_FLUSH, 0, 0, true);
    source.wait();
    source.drain();
    source.ram.write_slice(&[7; 512], GuestAddress(DATA)).unwrap();
    source.submit(T_OUT, 0, 512, true);
    let late = source.transport.save_record("disk0");
    let mut destination = Driver::with(source.ram.clone(), source.node.clone(), source.avail);
    for record in [&early, &late, &early, &late] {
        destination.transport.restore_record(record.clone()).unwrap();
        assert_eq!(destination.transport.save_record("disk0"), *record);
    }
    let accesses = script.accesses().len();
    destination.transport.resume();
    assert_eq!(destination.wait(), 0);
    destination.drain();
    assert_eq!(destination.used(), 2, "one was answered at the source");
    assert_eq!(script.accesses().len() - accesses, 1, "by one worker, once");
}

#[test]
fn what_a_guest_can_make_go_wrong_at_will_is_not_logged_at_will() {
    let mut driver = Driver::new();
    for _ in 0..=crate::log_limit::LINES {
        driver.ram.write_obj(0u32, GuestAddress(AVAIL)).unwrap();
        driver.avail = 0;
        driver.start(F_VERSION_1);
        driver.ram.write_obj(999u16, GuestAddress(AVAIL + 2)).unwrap();
        driver.set(0x50, 0);
        driver.wait_for_needs_reset();
        driver.reset();
    }
    assert_eq!(driver.transport.shared.limits.broken_queue.allow(), None);
}

#[test]
fn ring_addresses_that_are_not_aligned_are_ignored() {
    let mut driver = Driver::new();
    for (register, good, bad) in [(0x80, 0x1000, 0x1008), (0x90, 0x2002, 0x2001), (0xa0, 4, 2)] {
        for (value, high) in [(good, 7), (bad, 7), (good, 7)] {
            driver.set(register, value);
            driver.set(register + 4, high);
            let queue = &driver.transport.queues[0].config;
            let address = match register {
                0x80 => queue.desc_table(),
                0x90 => queue.avail_ring(),
                _ => queue.used_ring(),
            };
            assert_eq!(address, 7 << 32 | u64::from(good), "register {register:#x}");
        }
    }
}
