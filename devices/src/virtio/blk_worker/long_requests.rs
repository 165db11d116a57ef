//! Tests with requests of more bytes than a pause should wait for. They count bytes, not time.

use super::*;
use crate::block::backend::ByteRange;
use crate::block::memory::{MemoryDisk, Script};
use crate::block::uring::tests::ring_or_skip;
use crate::block::uring::{MAX_BYTES_AT_ONCE, MAX_BYTES_IN_FLIGHT};
use crate::ram::GuestAddress;
use crate::state::Persist;
use crate::virtio::blk_request::{F_DISCARD, F_WRITE_ZEROES, T_DISCARD, T_WRITE_ZEROES};
use crate::virtio::driver::{Driver, LONG_HEADERS, USED};
use crate::virtio::{F_INDIRECT, F_VERSION_1};
use std::fs::File;
use std::io::{PipeWriter, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

const MIB: u32 = 1 << 20;
/// 64 MiB of data for long requests.
const LONG_DATA: u64 = 4 << 20;
const RAM_BYTES: usize = 68 << 20;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap()
}

fn driver(disk: MemoryDisk) -> (Driver, Arc<Script>) {
    let script = disk.script();
    let node = Arc::new(BlockNode::new("disk0", Box::new(disk)));
    let mut driver = Driver::with(ram(), node, 0);
    driver.start(F_VERSION_1 | F_FLUSH | F_INDIRECT | F_DISCARD | F_WRITE_ZEROES);
    (driver, script)
}

/// A disk backed by a pipe: a read completes when the test writes to that. `None` where io_uring is not
/// available.
fn piped() -> Option<(Driver, PipeWriter)> {
    ring_or_skip::<Ticket>(ram(), 1)?;
    let (reader, writer) = std::io::pipe().unwrap();
    let file = File::from(OwnedFd::from(reader));
    let (driver, _) = driver(MemoryDisk::without_storage(8 << 30).with_file(file));
    Some((driver, writer))
}

/// Migrates the device: restores the record of `driver`, which is parked and ends.
fn moved(driver: Driver) -> Driver {
    let record = driver.transport.save_record("disk0");
    let (ram, node) = (driver.ram.clone(), driver.node.clone());
    let mut destination = Driver::with(ram, node, driver.avail);
    destination.transport.restore_record(record).unwrap();
    destination
}

fn pieces_of(len_bytes: u64, of_bytes: u64) -> Vec<ByteRange> {
    let offsets = (0..len_bytes).step_by(usize::try_from(of_bytes).unwrap());
    offsets.map(|offset_bytes| ByteRange { offset_bytes, len_bytes: of_bytes }).collect()
}

#[test]
fn a_pause_waits_for_one_piece_of_a_request_of_gigabytes() {
    for kind in [T_IN, T_OUT] {
        let (mut driver, script) = driver(MemoryDisk::without_storage(8 << 30));
        script.hold(true);
        let buffers = [(LONG_DATA, 64 * MIB); 63];
        driver.submit_long(0, kind, 0, &buffers, true);
        script.wait_until_held();
        let mut drain = driver.transport.begin_drain();
        script.hold(false);
        assert!(drain.wait_until(soon()));
        assert_eq!(script.accesses(), pieces_of(128 << 10, 128 << 10), "request of type {kind}");
        assert_eq!((driver.used(), driver.long_status(0)), (0, 0xaa), "it has no answer");
    }
}

#[test]
fn an_interrupted_write_is_made_again_from_its_start_and_answered_once() {
    for moves in [false, true] {
        let (mut driver, script) = driver(MemoryDisk::new(4 << 20));
        let data: Vec<u8> =
            (0..1 << 20).map(|at: u32| u8::try_from(at / 512 % 251).unwrap()).collect();
        driver.ram.write_slice(&data, GuestAddress(LONG_DATA)).unwrap();
        script.hold_after(2);
        driver.submit_long(0, T_OUT, 0, &[(LONG_DATA, MIB)], false);
        driver.submit_long(1, T_FLUSH, 0, &[], true);
        while script.accesses().len() < 2 {
            std::thread::yield_now();
        }
        script.wait_until_held();
        let mut drain = driver.transport.begin_drain();
        script.hold(false);
        assert!(drain.wait_until(soon()));
        assert_eq!(script.accesses().len(), 3, "the piece in flight ends, no other begins");
        assert_eq!((driver.used(), script.flush_count()), (0, 0));
        let mut here = if moves { moved(driver) } else { driver };
        here.transport.resume();
        here.wait_for_used(2);
        here.drain();
        assert_eq!([here.long_status(0), here.long_status(1)], [0, 0]);
        assert_eq!(script.accesses()[3..], pieces_of(1 << 20, 128 << 10));
        let mut back = vec![0; 1 << 20];
        here.node.copy_at(&mut back, 0).unwrap();
        assert!(back == data, "moves: {moves}");
        // In the order of the ring: head and length of each.
        let used = |at: u64| here.ram.read_obj::<u32>(GuestAddress(USED + 4 + 4 * at)).unwrap();
        assert_eq!([used(0), used(2)], [0, 1], "in the order in which they were made");
    }
}

#[test]
fn discards_and_zeroes_stop_between_their_pieces_and_are_made_again() {
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        let (mut driver, script) = driver(MemoryDisk::without_storage(1 << 30));
        // 15 MiB from 1 MiB on, so that the first piece is the rest of a multiple.
        let range = LONG_DATA;
        driver.ram.write_obj(2048u64, GuestAddress(range)).unwrap();
        driver.ram.write_obj(15 * 2048u32, GuestAddress(range + 8)).unwrap();
        script.hold_after(1);
        driver.submit_long(0, T_OUT, 0, &[(range, 16)], false);
        let header = driver.at(LONG_HEADERS);
        driver.ram.write_obj(kind, header).unwrap();
        driver.set(0x50, 0);
        while script.accesses().is_empty() {
            std::thread::yield_now();
        }
        script.wait_until_held();
        let mut drain = driver.transport.begin_drain();
        script.hold(false);
        assert!(drain.wait_until(soon()));
        let range = |start: u64, end: u64| ByteRange {
            offset_bytes: start << 20,
            len_bytes: (end - start) << 20,
        };
        let whole = [range(1, 4), range(4, 8), range(8, 12), range(12, 16)];
        assert_eq!(script.accesses(), whole[..2], "request of type {kind}");
        let mut driver = moved(driver);
        driver.transport.resume();
        driver.wait_for_used(1);
        assert_eq!(driver.long_status(0), 0);
        assert_eq!(script.accesses()[2..], whole);
    }
}

#[test]
fn a_request_kept_after_an_error_is_kept_again_when_it_must_yield() {
    use crate::block::failure::{ErrorPolicy, OnError};
    let disk = MemoryDisk::new(4 << 20);
    let script = disk.script();
    let policy = ErrorPolicy { on_read: OnError::Stop, on_write: OnError::Stop };
    let node = Arc::new(BlockNode::new("disk0", Box::new(disk)).with_policy(policy));
    let (sender, failures) = std::sync::mpsc::channel();
    node.on_failure(move |failure| sender.send(failure).unwrap());
    let mut driver = Driver::with(ram(), node, 0);
    driver.start(F_VERSION_1 | F_FLUSH | F_INDIRECT);
    script.fail(true);
    driver.submit_long(0, T_OUT, 0, &[(LONG_DATA, MIB)], true);
    failures.recv().unwrap();
    driver.drain();
    script.fail(false);
    script.hold(true);
    driver.node.retry_failed();
    driver.transport.resume();
    script.wait_until_held();
    let mut drain = driver.transport.begin_drain();
    script.hold(false);
    assert!(drain.wait_until(soon()));
    assert_eq!(script.accesses().len(), 1);
    assert!(driver.node.has_kept_requests(), "it is this process's alone");
    driver.transport.resume();
    driver.wait_for_used(1);
    driver.drain();
    assert!(!driver.node.has_kept_requests());
    assert_eq!(driver.long_status(0), 0);
}

#[test]
fn the_rest_of_a_kept_request_is_served_or_fails_if_the_ring_refuses_its_buffers() {
    use crate::block::failure::{ErrorPolicy, OnError};
    // What the disk reads before it fails, and the status in the end.
    for (len, status) in [(512, S_OK), (100, S_IOERR)] {
        if ring_or_skip::<Ticket>(ram(), 1).is_none() {
            return;
        }
        let (reader, mut writer) = std::io::pipe().unwrap();
        // A short read leaves an address that is not aligned.
        let disk = MemoryDisk::new(64 << 10).with_direct_file(OwnedFd::from(reader).into(), 4096);
        let policy = ErrorPolicy { on_read: OnError::Stop, on_write: OnError::Stop };
        let node = Arc::new(BlockNode::new("disk0", Box::new(disk)).with_policy(policy));
        node.fill_at(&[7; 64 << 10], 0).unwrap();
        let (sender, failures) = std::sync::mpsc::channel();
        node.on_failure(move |failure| sender.send(failure).unwrap());
        let mut driver = Driver::with(ram(), node, 0);
        driver.start(F_VERSION_1 | F_FLUSH | F_INDIRECT);
        writer.write_all(&vec![1; len]).unwrap();
        driver.submit_long(0, T_IN, 0, &[(LONG_DATA, 4096)], true);
        failures.recv_timeout(Duration::from_secs(30)).unwrap();
        driver.drain();
        assert!(driver.node.has_kept_requests());
        driver.node.retry_failed();
        driver.transport.resume();
        driver.wait_for_used(1);
        assert_eq!(driver.long_status(0), status, "after {len} bytes");
        driver.drain();
        assert!(!driver.node.has_kept_requests());
        let at =
            |at: usize| driver.ram.read_obj::<u8>(GuestAddress(LONG_DATA + at as u64)).unwrap();
        let rest = if status == S_OK { 7 } else { 0 };
        assert_eq!([at(len - 1), at(len), at(4095)], [1, rest, rest], "after {len} bytes");
    }
}

#[test]
fn a_request_longer_than_may_be_in_flight_goes_through_the_ring_in_pieces_that_stop() {
    for moves in [false, true] {
        let Some((mut driver, mut disk)) = piped() else { return };
        let len = MAX_BYTES_IN_FLIGHT + MAX_BYTES_AT_ONCE;
        driver.submit_long(0, T_IN, 0, &[(LONG_DATA, u32::try_from(len).unwrap())], false);
        driver.submit_long(1, T_IN, 0, &[(LONG_DATA + (len as u64), 512)], true);
        // More than the pipe holds: part of it has been read, and the device asks for more.
        disk.write_all(&vec![1; 1 << 20]).unwrap();
        let mut drain = driver.transport.begin_drain();
        // Completes the piece in flight. If there is none, the bytes stay in the pipe.
        let (go_on, wait) = std::sync::mpsc::channel();
        let feeding = std::thread::spawn(move || {
            disk.write_all(&[1; 512]).unwrap();
            wait.recv().unwrap();
            // Ends with an error when the disk is gone.
            while disk.write_all(&[2; 64 << 10]).is_ok() {}
        });
        assert!(drain.wait_until(soon()), "it asks for more than the piece in flight");
        assert_eq!((driver.used(), driver.long_status(0)), (0, 0xaa), "it has no answer");
        let mut here = if moves { moved(driver) } else { driver };
        here.transport.resume();
        go_on.send(()).unwrap();
        here.wait_for_used(2);
        assert_eq!([here.long_status(0), here.long_status(1)], [0, 0]);
        let at = |at: usize| here.ram.read_obj::<u8>(GuestAddress(LONG_DATA + at as u64)).unwrap();
        assert_eq!([at(len - 1), at(len)], [2, 2], "moves: {moves}");
        let used = here.ram.read_obj::<u32>(GuestAddress(USED + 8)).unwrap();
        assert_eq!(used as usize, len + 1, "all of it, once");
        drop(here);
        feeding.join().unwrap();
    }
}

#[test]
fn requests_in_flight_are_bounded_by_their_bytes_and_those_that_do_not_fit_are_served_later() {
    let Some((mut driver, mut disk)) = piped() else { return };
    let len = u32::try_from(MAX_BYTES_IN_FLIGHT / 4).unwrap();
    for head in 0..7 {
        let at = LONG_DATA + u64::from(head) * u64::from(len);
        driver.submit_long(head, T_IN, 0, &[(at, len)], false);
    }
    // One in the middle that does not fit beside any other, and one behind it.
    driver.submit_long(7, T_IN, 0, &[(LONG_DATA, 40 * MIB)], false);
    driver.submit_long(8, T_IN, 0, &[(LONG_DATA, 512)], true);
    // More than the pipe holds, so the device has taken all that it can.
    disk.write_all(&[1; 256 << 10]).unwrap();
    let mut drain = driver.transport.begin_drain();
    // As many bytes as may be in flight, and no more.
    disk.write_all(&vec![1; MAX_BYTES_IN_FLIGHT - (256 << 10)]).unwrap();
    assert!(drain.wait_until(soon()), "a pause waits for more than may be in flight");
    assert_eq!(driver.used(), 4);
    driver.transport.resume();
    let feeding = std::thread::spawn(move || while disk.write_all(&[1; 64 << 10]).is_ok() {});
    driver.wait_for_used(9);
    assert!((0..9).all(|head| driver.long_status(head) == 0));
    drop(driver);
    feeding.join().unwrap();
}

#[test]
fn a_request_that_did_not_fit_is_served_although_the_others_have_ended_meanwhile() {
    // Writes to it complete during submission.
    let file = File::create("/dev/null").unwrap();
    let (mut driver, _) = driver(MemoryDisk::without_storage(64 << 20).with_file(file));
    // Seven that fit, and one that does not.
    for round in 0..8u16 {
        for index in 0..8u16 {
            let len = if index < 7 { 4 * MIB } else { 8 * MIB };
            let is_last = index == 7;
            driver.submit_long(index, T_OUT, 0, &[(LONG_DATA, len)], is_last);
        }
        driver.wait_for_used(8 * (round + 1));
        assert!((0..8).all(|head| driver.long_status(head) == 0));
    }
}
