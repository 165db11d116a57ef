//! Finds the holes of all disks ahead of the first pass, and shows how far it has come. Called once by
//! `outgoing`, in its setup; [`super::scan`] looks at a single disk.

use super::frame::DiskTotals;
use super::scan::TrackedDisk;
use super::stats::DiskProgress;
use crate::stats::Counters;
use devices::block::backend::GoOn;
use std::time::{Duration, Instant};

/// How often progress is shown.
pub(super) const SHOWN_EVERY: Duration = Duration::from_millis(200);

/// Clears what need not be sent of each disk. Returns early once `go_on` returns false.
pub(super) fn find(disks: &[TrackedDisk], counters: &Counters, shown_every: Duration, go_on: GoOn) {
    let progress: Vec<_> = disks.iter().map(progress).collect();
    counters.update(|stats| stats.disk.get_or_insert_default().disks = progress);
    for (index, disk) in disks.iter().enumerate() {
        let show = |searched| {
            let left = disk.dirty.marked_bytes();
            counters.update(|stats| {
                let disks = &mut stats.disk.get_or_insert_default().disks;
                if let Some(shown) = disks.get_mut(index) {
                    (shown.total_bytes, shown.remaining_bytes) = (left, left);
                    shown.searched_bytes = Some(searched);
                }
            });
        };
        let (mut shown, mut come_to) = (Instant::now(), 0);
        disk.skip_unwritten(go_on, &mut |searched| {
            come_to = searched;
            if shown.elapsed() >= shown_every {
                shown = Instant::now();
                show(searched);
            }
        });
        show(come_to);
    }
}

/// Of a disk of which nothing is known yet.
fn progress(disk: &TrackedDisk) -> DiskProgress {
    let (node, left) = (&disk.disk.node, disk.dirty.marked_bytes());
    let below = node.backing().filter(|_| !disk.disk.only_top);
    let files = below.map_or_else(Vec::new, |chain| chain.files());
    DiskProgress {
        name: node.id().to_owned(),
        searched_bytes: Some(0),
        total_bytes: left,
        remaining_bytes: left,
        sent: DiskTotals::default(),
        transferred_bytes: 0,
        files: std::iter::once(node.location()).chain(files).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{CHUNK_BYTES, SourceDisk};
    use devices::block::BlockNode;
    use devices::block::memory::MemoryDisk;
    use std::sync::{Arc, Mutex};

    fn disks() -> Vec<TrackedDisk> {
        let disk = |id| {
            let node = Arc::new(BlockNode::new(id, Box::new(MemoryDisk::new(6 * CHUNK_BYTES))));
            for at in [1, 4] {
                node.write_at(&[1; 512], at * CHUNK_BYTES).unwrap();
            }
            TrackedDisk::start(SourceDisk { node, only_top: false }).unwrap()
        };
        ["d0", "d1"].map(disk).into()
    }

    /// Total, remaining and searched bytes of each disk, in chunks.
    fn seen(counters: &Counters) -> Vec<[u64; 3]> {
        let chunks = |bytes: u64| bytes / CHUNK_BYTES;
        let one = |disk: &DiskProgress| {
            let searched = disk.searched_bytes.expect("the source says it");
            [disk.total_bytes, disk.remaining_bytes, searched].map(chunks)
        };
        counters.snapshot().disk.map_or_else(Vec::new, |disk| disk.disks.iter().map(one).collect())
    }

    #[test]
    fn progress_is_there_from_the_start_and_shrinks_with_every_hole() {
        let (disks, counters) = (disks(), Counters::new());
        let looks = Mutex::new(Vec::new());
        find(&disks, &counters, Duration::ZERO, &|| {
            looks.lock().unwrap().push(seen(&counters));
            true
        });
        let looks = looks.into_inner().unwrap();
        assert_eq!(looks[0], [[6, 6, 0], [6, 6, 0]], "before the first extent");
        let first = |look: &Vec<[u64; 3]>| look[0];
        assert!(looks.iter().map(first).is_sorted_by(|a, b| a[0] >= b[0] && a[2] <= b[2]));
        assert!(looks.iter().any(|look| look[0][2] == 4 && look[1] == [6, 6, 0]), "{looks:?}");
        assert_eq!(seen(&counters), [[0, 0, 6], [0, 0, 6]], "a granule is less than a chunk");
    }

    #[test]
    fn nobody_waits_for_the_rest_after_a_cancel() {
        let (disks, counters) = (disks(), Counters::new());
        let calls = Mutex::new(0);
        find(&disks, &counters, Duration::ZERO, &|| {
            let mut calls = calls.lock().unwrap();
            *calls += 1;
            *calls <= 2
        });
        assert!(*calls.lock().unwrap() <= 5, "each loop is asked once more at most");
        assert_eq!(seen(&counters), [[5, 5, 1], [6, 6, 0]]);
    }
}
