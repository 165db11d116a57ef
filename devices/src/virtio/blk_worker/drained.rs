//! Drained sections of a disk that a guest uses, and the exchange of its storage.

use crate::block::memory::MemoryDisk;
use crate::block::raw::{Cache, RawFile};
use crate::block::{BlockNode, ExchangeError};
use crate::ram::{GuestAddress, GuestRam};
use crate::virtio::F_VERSION_1;
use crate::virtio::blk_request::F_FLUSH;
use crate::virtio::driver::*;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::NamedTempFile;
use vm_memory::Bytes;

const DISK_BYTES: u64 = 64 << 10;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(DISK_BYTES).unwrap();
    file
}

fn open(image: &NamedTempFile) -> RawFile {
    RawFile::open(image.path(), false, Cache::Writeback).unwrap()
}

fn driver_of(image: &NamedTempFile) -> Driver {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
    Driver::with(ram, Arc::new(BlockNode::new("disk0", Box::new(open(image)))), 0)
}

#[test]
fn requests_wait_in_their_ring_for_the_end_of_a_section() {
    for (in_memory, features) in [(true, F_FLUSH), (false, 0), (false, F_FLUSH)] {
        let image = image();
        let mut driver = if in_memory { Driver::new() } else { driver_of(&image) };
        driver.start(F_VERSION_1 | features);
        let section = driver.node.gate().close();
        assert!(section.wait_until(soon()));
        driver.submit(1, 0, 512, true);
        // A pause does not wait for the section.
        driver.drain();
        driver.transport.resume();
        assert_eq!(driver.used(), 0);
        drop(section);
        assert_eq!(driver.wait(), 0, "in memory: {in_memory}");
        // And once more: the worker has to be woken each time.
        let section = driver.node.gate().close();
        driver.submit(1, 0, 512, true);
        assert!(section.wait_until(soon()));
        drop(section);
        assert_eq!(driver.wait(), 0, "in memory: {in_memory}");
    }
}

#[test]
fn a_section_begins_when_the_request_in_flight_has_ended() {
    let (mut driver, script) = Driver::of(MemoryDisk::new(DISK_BYTES));
    driver.start(F_VERSION_1);
    script.hold(true);
    driver.submit(1, 0, 512, true);
    script.wait_until_held();
    let section = driver.node.gate().close();
    assert!(!section.wait_until(Instant::now()));
    script.hold(false);
    assert!(section.wait_until(soon()));
    assert_eq!(driver.wait(), 0);
}

/// A driver that cannot flush writes through the ring, any other at once.
#[test]
fn each_write_is_in_the_storage_that_the_disk_had_when_it_was_made() {
    for features in [0, F_FLUSH] {
        let images: Vec<_> = (0..8).map(|_| image()).collect();
        let mut driver = driver_of(&images[0]);
        driver.start(F_VERSION_1 | features);
        for (turn, image) in (0u8..).zip(&images) {
            if turn > 0 {
                let section = driver.node.gate().close();
                assert!(section.wait_until(soon()));
                driver.node.exchange(&section, Arc::new(open(image))).unwrap();
            }
            driver.ram.write_slice(&[turn + 1; 512], GuestAddress(DATA)).unwrap();
            driver.submit(1, u64::from(turn), 512, true);
            assert_eq!(driver.wait(), 0);
        }
        for (turn, image) in (0u8..).zip(&images) {
            let mut bytes = Vec::new();
            image.reopen().unwrap().read_to_end(&mut bytes).unwrap();
            let at = usize::from(turn) * 512;
            assert!(bytes[at..at + 512].iter().all(|byte| *byte == turn + 1));
            assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 512, "storage {turn}");
        }
    }
}

#[test]
fn storage_that_does_not_fit_is_refused() {
    let node = BlockNode::new("d", Box::new(MemoryDisk::new(1024)));
    let section = node.gate().close();
    let exchange = |disk: MemoryDisk| node.exchange(&section, Arc::new(disk)).map(drop);
    assert!(matches!(exchange(MemoryDisk::new(512)), Err(ExchangeError::Size { .. })));
    let read_only = MemoryDisk::new(1024).into_read_only();
    assert!(matches!(exchange(read_only), Err(ExchangeError::ReadOnly { .. })));
    assert!(exchange(MemoryDisk::new(1024)).is_ok());
    let other = BlockNode::new("e", Box::new(MemoryDisk::new(1024)));
    let refused = other.exchange(&section, Arc::new(MemoryDisk::new(1024)));
    assert!(matches!(refused, Err(ExchangeError::NotDrained { .. })));
}
