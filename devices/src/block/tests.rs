//! What a node lets through, marks and counts.

use super::memory::MemoryDisk;
use super::*;

#[test]
fn accesses_past_the_end_are_refused() {
    let node = BlockNode::new("d", Box::new(MemoryDisk::new(1024)));
    assert!(node.read_at(&mut [0; 512], 512).is_ok());
    assert!(node.read_at(&mut [0; 512], 513).is_err());
    assert!(node.write_at(&[0; 1], 1024).is_err());
    assert!(node.write_at(&[0; 8], u64::MAX - 3).is_err());
    assert!(node.discard(512, 512).is_ok() && node.discard(1024, 0).is_ok());
    assert!(node.discard(512, 1024).is_err());
    assert!(node.write_zeroes(u64::MAX - 3, 8, true).is_err());
}

#[test]
fn a_read_only_disk_takes_no_writes_of_any_kind() {
    let node = BlockNode::new("d", Box::new(MemoryDisk::new(1024).into_read_only()));
    assert!(node.write_at(&[0; 1], 0).is_err());
    assert!(node.discard(0, 512).is_err());
    assert!(node.write_zeroes(0, 512, false).is_err());
    let access = |kind, at, len| node.access(node.gate().enter().unwrap(), kind, at, len);
    assert!(access(AccessKind::Write, 0, 512).is_err());
    assert!(access(AccessKind::Read, 0, 512).is_err(), "there is no file");
}

#[test]
fn whatever_changes_a_disk_marks_it_also_when_it_fails() {
    let disk = MemoryDisk::new(64 << 10);
    let script = disk.script();
    let node = BlockNode::new("d", Box::new(disk));
    assert!(node.track(1000).is_none());
    let tracking = node.track(512).unwrap();
    node.read_at(&mut [0; 512], 0).unwrap();
    node.fill_at(&[1; 512], 0).unwrap();
    assert_eq!(tracking.marked_bytes(), 0);
    node.write_at(&[1; 512], 512).unwrap();
    node.discard(1024, 512).unwrap();
    node.write_zeroes(2048, 512, false).unwrap();
    script.fail(true);
    assert!(node.write_at(&[1; 512], 4096).is_err());
    let starts: Vec<_> = tracking.runs().map(|run| (run.offset_bytes, run.len_bytes)).collect();
    assert_eq!(starts, [(512, 1024), (2048, 512), (4096, 512)]);
    let other = node.track(512).unwrap();
    drop(tracking);
    assert!(node.write_at(&[1; 512], 0).is_err());
    assert!(other.is_marked(0));
    let stats = node.stats();
    assert_eq!((stats.reads, stats.read_bytes), (1, 512));
    assert_eq!((stats.writes, stats.written_bytes), (4, 2048));
    assert_eq!((stats.discards, stats.discarded_bytes, stats.flushes), (1, 512, 0));
}

#[test]
fn a_write_past_the_node_marks_when_it_ends() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(64 << 10).unwrap();
    let raw = raw::RawFile::open(file.path(), false, raw::Cache::Writeback).unwrap();
    let node = BlockNode::new("d", Box::new(raw));
    let access = |kind, at, len| node.access(node.gate().enter().unwrap(), kind, at, len);
    assert!(access(AccessKind::Read, 64 << 10, 512).is_err());
    let write = access(AccessKind::Write, 1024, 512).unwrap();
    let tracking = node.track(512).unwrap();
    let read = access(AccessKind::Read, 0, 512).unwrap();
    assert_eq!(tracking.marked_bytes(), 0);
    drop((write, read));
    assert!(tracking.is_marked(1024));
    assert_eq!(tracking.marked_bytes(), 512);
}

#[test]
fn what_arrives_fills_a_read_only_disk_too() {
    let node = BlockNode::new("d", Box::new(MemoryDisk::new(1024))).into_read_only();
    assert!(node.read_only() && node.write_at(&[1; 512], 0).is_err());
    node.fill_at(&[7; 512], 512).unwrap();
    node.fill_zeroes(512, 256, true).unwrap();
    let mut back = [1; 512];
    node.copy_at(&mut back, 512).unwrap();
    assert_eq!((back[255], back[256]), (0, 7));
    assert!(node.fill_at(&[7; 512], 1024).is_err() && node.fill_zeroes(1000, 100, true).is_err());
    assert_eq!(node.stats(), NodeStats::default());
}
