//! Picks the chunks to send next: walks the bitmaps of all disks, one chunk of each in turn, and clears
//! the bits it returns. Called by `outgoing`. Reads no data, only allocation status.

use super::frame::granules_of;
use super::{BlockError, GRANULE_BYTES, SourceDisk};
use devices::block::backend::{Content, GoOn};
use devices::block::{Tracking, holes};

/// A disk and its dirty bitmap.
#[derive(Debug)]
pub struct TrackedDisk {
    pub disk: SourceDisk,
    /// Granules written or never sent.
    pub dirty: Tracking,
}

impl TrackedDisk {
    /// Tracks `disk`; all of it is dirty.
    pub fn start(disk: SourceDisk) -> Result<Self, BlockError> {
        let untracked = || BlockError::NotTracked { disk: disk.node.id().to_owned() };
        let dirty = disk.node.track(GRANULE_BYTES).ok_or_else(untracked)?;
        dirty.mark_all();
        Ok(Self { disk, dirty })
    }

    /// Clears the bits of ranges that the destination's blank disk holds already: see [`holes::clear`].
    pub fn skip_unwritten(&self, go_on: GoOn<'_>, searched: &mut dyn FnMut(u64)) {
        let skipped = if self.disk.only_top { Content::Backing } else { Content::Zero };
        holes::clear(&self.disk.node, &self.dirty, skipped, go_on, searched);
    }
}

/// A chunk to read. The bits of its granules are cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Index of the disk.
    pub disk: usize,
    /// Index of the chunk.
    pub index: u64,
    pub granules: u64,
}

/// One pass over all disks.
#[derive(Debug, Default)]
pub struct Scan {
    /// Next chunk of each disk.
    next: Vec<u64>,
    turn: usize,
}

impl Scan {
    /// Takes the next dirty chunk, from each disk in turn, from the start of every disk on. They are the same
    /// in every call.
    pub fn take(&mut self, disks: &[TrackedDisk]) -> Option<Work> {
        self.next.resize(disks.len(), 0);
        for _ in 0..disks.len() {
            let disk = self.turn;
            self.turn = (self.turn + 1) % disks.len();
            if let Some(work) = self.take_of(disks, disk) {
                return Some(work);
            }
        }
        None
    }

    fn take_of(&mut self, disks: &[TrackedDisk], disk: usize) -> Option<Work> {
        let tracked = disks.get(disk)?;
        let next = self.next.get_mut(disk)?;
        while let Some((index, taken)) = tracked.dirty.take_next(*next) {
            *next = index + 1;
            let granules = taken & granules_of(index, tracked.disk.node.len_bytes());
            if granules != 0 {
                return Some(Work { disk, index, granules });
            }
        }
        *next = tracked.dirty.word_count();
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::CHUNK_BYTES;
    use devices::block::BlockNode;
    use devices::block::memory::MemoryDisk;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    fn tracked(len_bytes: u64) -> TrackedDisk {
        let node = Arc::new(BlockNode::new("d", Box::new(MemoryDisk::new(len_bytes))));
        TrackedDisk::start(SourceDisk { node, only_top: false }).unwrap()
    }

    #[test]
    fn only_what_was_written_is_sent_first_then_only_what_is_written_again() {
        let disk = tracked(10 * CHUNK_BYTES + 512);
        disk.disk.node.write_at(&[1; 512], 2 * CHUNK_BYTES + GRANULE_BYTES).unwrap();
        disk.disk.node.write_at(&[1; 512], 10 * CHUNK_BYTES).unwrap();
        disk.skip_unwritten(&|| true, &mut |_| {});
        let disks = [disk];
        let mut scan = Scan::default();
        assert_eq!(scan.take(&disks), Some(Work { disk: 0, index: 2, granules: 2 }));
        // Behind the scan: it waits for the next pass.
        disks[0].disk.node.write_at(&[2; 512], 0).unwrap();
        assert_eq!(scan.take(&disks), Some(Work { disk: 0, index: 10, granules: 1 }));
        assert_eq!(scan.take(&disks), None);
        assert_eq!(disks[0].dirty.marked_bytes(), GRANULE_BYTES);
        assert_eq!(Scan::default().take(&disks), Some(Work { disk: 0, index: 0, granules: 1 }));
    }

    #[test]
    fn a_disk_that_does_not_say_what_it_holds_is_sent_whole() {
        let memory = MemoryDisk::new(3 * CHUNK_BYTES);
        let script = memory.script();
        let node = Arc::new(BlockNode::new("d", Box::new(memory)));
        let disk = TrackedDisk::start(SourceDisk { node, only_top: false }).unwrap();
        script.hide_extents(true);
        disk.skip_unwritten(&|| true, &mut |_| {});
        assert_eq!(disk.dirty.marked_bytes(), 3 * CHUNK_BYTES);
        script.hide_extents(false);
        disk.skip_unwritten(&|| true, &mut |_| {});
        assert_eq!(disk.dirty.marked_bytes(), 0);
    }

    #[test]
    fn holes_that_are_filled_meanwhile_are_looked_at_again_until_nobody_waits_any_more() {
        let disk = tracked(10 * CHUNK_BYTES);
        let (calls, node) = (AtomicUsize::new(0), disk.disk.node.clone());
        let go_on = || match calls.fetch_add(1, SeqCst) {
            // The disk is one hole. It gets data between its clearing and the second look.
            1 => {
                node.write_at(&[1; 512], 2 * CHUNK_BYTES).unwrap();
                node.write_at(&[1; 512], 5 * CHUNK_BYTES).unwrap();
                true
            }
            call => call < 2,
        };
        let mut searched = Vec::new();
        disk.skip_unwritten(&go_on, &mut |at| searched.push(at));
        assert_eq!(calls.load(SeqCst), 3, "asked before each extent");
        assert_eq!(disk.dirty.marked_bytes(), 8 * CHUNK_BYTES, "the second look ended early");
        assert_eq!(searched, [10 * CHUNK_BYTES]);
    }

    #[test]
    fn disks_take_turns_until_each_is_done() {
        let disks = [tracked(3 * CHUNK_BYTES), tracked(512), tracked(2 * CHUNK_BYTES)];
        let mut scan = Scan::default();
        let order: Vec<_> =
            std::iter::from_fn(|| scan.take(&disks)).map(|work| work.disk).collect();
        assert_eq!(order, [0, 1, 2, 0, 2, 0]);
    }
}
