//! Copies between scripted disks.

use super::*;
use crate::block::memory::{MemoryDisk, Script};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

const LEN: u64 = 4 << 20;

fn pair() -> (Pair, Arc<Script>, Arc<Script>) {
    let (one, other) = (MemoryDisk::new(LEN), MemoryDisk::new(LEN));
    let scripts = (one.script(), other.script());
    let source = Arc::new(BlockNode::new("disk", Box::new(one)));
    let target = Arc::new(BlockNode::new("copy", Box::new(other)));
    (Pair { source, target, unmap: true }, scripts.0, scripts.1)
}

fn whole() -> ByteRange {
    ByteRange { offset_bytes: 0, len_bytes: LEN }
}

fn content(node: &BlockNode) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(LEN).unwrap()];
    node.copy_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn data_is_written_and_holes_become_zeroes() {
    let (pair, read, _) = pair();
    pair.source.fill_at(&[7; 8192], 1 << 20).unwrap();
    pair.target.fill_at(&[1; 4096], 0).unwrap();
    pair.target.fill_at(&[1; 4096], LEN - 4096).unwrap();
    let before = read.accesses().len();
    pair.copy(whole(), &mut [0; 4096]).unwrap();
    assert!(content(&pair.source) == content(&pair.target));
    // Only what is there is read.
    assert_eq!(read.accesses()[before..].iter().filter(|range| range.len_bytes == 4096).count(), 2);
    assert_eq!(pair.source.stats().reads, 0, "not the guest's");
}

#[test]
fn storage_that_does_not_say_what_it_holds_is_read() {
    let (pair, script, _) = pair();
    pair.source.fill_at(&[7; 512], LEN - 512).unwrap();
    script.hide_extents(true);
    pair.copy(whole(), &mut [0; 1 << 20]).unwrap();
    assert!(content(&pair.source) == content(&pair.target));
}

#[test]
fn the_disk_that_failed_is_named() {
    let (pair, source, target) = pair();
    pair.source.fill_at(&[7; 512], 0).unwrap();
    source.fail(true);
    let error = pair.copy(whole(), &mut [0; 4096]).unwrap_err();
    assert_eq!((error.side(), error.is_no_space()), (Side::Source, false));
    source.fail(false);
    target.fail(true);
    let error = pair.copy(whole(), &mut [0; 4096]).unwrap_err();
    assert_eq!(error.side(), Side::Target);
    assert!(error.to_string().contains("writing 4096 bytes at 0"), "{error}");
    assert_eq!(pair.flush().unwrap_err().side(), Side::Target);
}

#[test]
fn operations_are_made_side_by_side_and_a_hanging_one_keeps_nobody() {
    let (pair, _, target) = pair();
    let claims = Arc::<Claims>::default();
    let (tell, told) = channel();
    let mut copier = Copier::new(pair, "copy", move |done| drop(tell.send(done)));
    target.hold(true);
    for at in [0, 1 << 20, 2 << 20] {
        let range = ByteRange { offset_bytes: at, len_bytes: 1 << 20 };
        copier.start(claims.try_claim(range).unwrap()).unwrap();
    }
    target.wait_until_held_by(3);
    assert_eq!(copier.in_flight(), 3);
    target.hold(false);
    for _ in 0..3 {
        told.recv_timeout(Duration::from_secs(30)).unwrap().result.unwrap();
        copier.ended();
    }
    copier.flush().unwrap();
    let flushed = told.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(flushed.claim.is_none() && flushed.result.is_ok());
    copier.ended();
    assert_eq!(target.flush_count(), 1);
    target.hold(true);
    copier.flush().unwrap();
    target.wait_until_held();
    drop(copier);
    assert_eq!(told.recv_timeout(Duration::ZERO).unwrap_err(), RecvTimeoutError::Timeout);
    target.hold(false);
}
