//! Requests as a driver makes them, good and hostile.

use super::{Processor, Request, Ticket};
use crate::block::failure::{Action, ErrorPolicy, OnError};
use crate::block::memory::MemoryDisk;
use crate::block::{BlockNode, NodeStats};
use crate::bus::BusDevice;
use crate::ram::GuestAddress;
use crate::segments::Segments;
use crate::state::Persist;
use crate::virtio::blk_request::{F_DISCARD, F_FLUSH, F_WRITE_ZEROES, T_DISCARD, T_WRITE_ZEROES};
use crate::virtio::driver::*;
use crate::virtio::{F_EVENT_IDX, F_VERSION_1};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::Bytes;

#[test]
fn what_is_written_is_read_back() {
    let mut driver = Driver::new();
    driver.start(F_VERSION_1);
    driver.ram.write_slice(&[0x5a; 1024], GuestAddress(DATA)).unwrap();
    driver.submit(1, 3, 1024, true);
    assert_eq!(driver.wait(), 0);
    // The interrupt follows the used index.
    let deadline = Instant::now() + Duration::from_secs(30);
    while driver.irq.count() == 0 {
        assert!(Instant::now() < deadline, "no interrupt");
        std::thread::yield_now();
    }
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
fn a_request_is_counted_once_through_the_ring_and_past_it() {
    // Whether the disk has a file that the ring may use, and where the data lies.
    for (with_file, data) in [(true, DATA), (true, DATA + 8), (false, DATA)] {
        let mut disk = MemoryDisk::new(64 << 10);
        if with_file {
            let file = tempfile::tempfile().unwrap();
            file.set_len(64 << 10).unwrap();
            disk = disk.with_direct_file(file, 512);
        }
        let mut driver = Driver::of(disk).0;
        driver.start(F_VERSION_1 | F_FLUSH);
        for (kind, len, flags) in [(0, 512, 3), (1, 1024, 1), (4, 0, 0)] {
            driver.submit(kind, 0, len, false);
            if len > 0 {
                driver.descriptor(1, data, len, flags, 2);
            }
            driver.set(0x50, 0);
            assert_eq!(driver.wait(), 0);
        }
        let (reads, read_bytes, writes, written_bytes, flushes) = (1, 512, 1, 1024, 1);
        let expected =
            NodeStats { reads, read_bytes, writes, written_bytes, flushes, ..Default::default() };
        assert_eq!(driver.node.stats(), expected, "with a file: {with_file}, data at {data:#x}");
    }
}

#[test]
fn a_request_is_counted_once_where_there_is_no_ring() {
    let disk = MemoryDisk::new(64 << 10).with_file(tempfile::tempfile().unwrap());
    let driver = Driver::of(disk).0;
    let mut to_guest = Segments::default();
    assert!(to_guest.push(&driver.ram, GuestAddress(DATA), 512));
    let status = GuestAddress(STATUS);
    let ticket = Ticket { head: 0, kind: 0, sector: 0, status, room: 512, was_kept: false };
    let request = Request { ticket, from_guest: Segments::default(), to_guest };
    let mut processor = Processor::new(driver.node.clone(), F_VERSION_1, &driver.ram, 16).unwrap();
    processor.ring = None;
    let pass = driver.node.gate().enter().unwrap();
    let (mut request, pass) = processor.start(request, pass).unwrap();
    processor.execute(&driver.ram, &CalmHost, &pass, &mut request).unwrap();
    let stats = driver.node.stats();
    assert_eq!((stats.reads, stats.read_bytes), (1, 512));
}

#[test]
fn a_disk_that_became_another_is_refused() {
    let (mut source, _) = Driver::of(MemoryDisk::new(64 << 10));
    source.start(F_VERSION_1);
    source.drain();
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
fn a_reset_does_not_let_a_failing_disk_log_more() {
    let (mut driver, script) = Driver::of(MemoryDisk::new(64 << 10));
    script.fail(true);
    for _ in 0..crate::log_limit::LINES {
        driver.ram.write_obj(0u32, GuestAddress(AVAIL)).unwrap();
        driver.ram.write_obj(0u32, GuestAddress(USED)).unwrap();
        driver.avail = 0;
        driver.start(F_VERSION_1);
        driver.submit(0, 0, 512, true);
        assert_eq!(driver.wait(), 1);
        driver.reset();
    }
    assert_eq!(driver.node.error_lines.allow(), None);
}

#[test]
fn a_failed_request_is_kept_while_the_guest_is_stopped_and_tried_again() {
    let disk = MemoryDisk::new(64 << 10);
    let script = disk.script();
    let policy = ErrorPolicy { on_read: OnError::Ignore, on_write: OnError::Stop };
    let node = Arc::new(BlockNode::new("disk0", Box::new(disk)).with_policy(policy));
    let (sender, failures) = std::sync::mpsc::channel();
    node.on_failure(move |failure| sender.send(failure).unwrap());
    let mut driver = Driver::with(Driver::new().ram, node, 0);
    driver.start(F_VERSION_1 | F_FLUSH);
    script.fail(true);
    driver.submit(0, 0, 512, true);
    assert_eq!(driver.wait(), 0, "a failed read is passed over");
    assert_eq!(failures.recv().unwrap().action, Action::Ignore);
    driver.ram.write_slice(&[0x5a; 512], GuestAddress(DATA)).unwrap();
    driver.submit(1, 3, 512, true);
    assert_eq!(failures.recv().unwrap().action, Action::Stop);
    // As the VMM does: it stops the guest, and goes on, for nothing at first.
    for disk_works in [false, true] {
        driver.drain();
        assert_ne!(driver.used(), driver.avail, "the request is kept");
        script.fail(!disk_works);
        driver.node.retry_failed();
        // It may be stopped again before it has come to that.
        assert!(driver.node.has_kept_requests() && !driver.node.is_stopped());
        driver.transport.resume();
        if !disk_works {
            assert_eq!(failures.recv().unwrap().action, Action::Stop);
        }
    }
    assert_eq!(driver.wait(), 0);
    driver.drain();
    assert!(!driver.node.has_kept_requests());
    let mut back = [0; 512];
    driver.node.read_at(&mut back, 3 * 512).unwrap();
    assert_eq!(back, [0x5a; 512]);
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
