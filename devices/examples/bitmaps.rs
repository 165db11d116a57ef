//! What dirty bitmaps cost: a guest's write, a scan, a merge, a bitmap in pieces.
//!
//! ```text
//! cargo run --release -p devices --example bitmaps
//! ```
//! Writes of a sector and of a page go to a file in the page cache, at random places, in turns with 0, 1 and 4
//! bitmaps, so that all meet the same noise; the best of many short passes counts. The rest is about a disk of
//! 1 TiB with granules of 64 KiB, of which a thousandth is dirty.

use devices::block::BlockNode;
use devices::block::backend::ByteRange;
use devices::block::bitmap::{Content, DEFAULT_GRANULE_BYTES, DirtyBitmap};
use devices::block::bitmaps::{BitmapName, MergeSource, NewBitmap};
use devices::block::memory::MemoryDisk;
use devices::block::raw::{Cache, RawFile};
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

const FILE_BYTES: u64 = 64 << 20;
const TIB: u64 = 1 << 40;
const PASSES: usize = 400;
const WRITES: u32 = 2000;

fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

fn new(at: usize) -> NewBitmap {
    let name = BitmapName::new(format!("b{at}")).expect("well-formed");
    let granularity = DEFAULT_GRANULE_BYTES;
    NewBitmap { name, granularity, persistent: false, recording: true }
}

fn add(node: &BlockNode, count: usize) {
    for at in 0..count {
        node.bitmaps().add(new(at)).expect("it fits");
    }
}

/// Nanoseconds of a write with each number of bitmaps.
fn writes(what: &str, nodes: &[(usize, BlockNode)], len: usize, disk_bytes: u64) {
    let buffer = vec![1; len];
    let mut best = vec![Duration::MAX; nodes.len()];
    let mut random = 0x9e37_79b9_7f4a_7c15;
    for _ in 0..PASSES {
        for ((_, node), best) in nodes.iter().zip(&mut best) {
            let began = Instant::now();
            for _ in 0..WRITES {
                let at = next(&mut random) % (disk_bytes / len as u64) * len as u64;
                node.write_at(&buffer, at).expect("the file is writable");
            }
            *best = (*best).min(began.elapsed());
        }
    }
    let nanos: Vec<_> =
        best.iter().map(|best| best.as_nanos() as f64 / f64::from(WRITES)).collect();
    for ((count, _), ns) in nodes.iter().zip(&nanos) {
        println!("{what}, {count} bitmaps: {ns:7.1} ns, ratio {:.3}", ns / nanos[0]);
    }
}

fn best(mut work: impl FnMut()) -> Duration {
    let time = |_| {
        let began = Instant::now();
        work();
        began.elapsed()
    };
    (0..20).map(time).min().unwrap_or_default()
}

fn main() {
    let folder = tempfile::tempdir().expect("a folder for the image");
    let path = folder.path().join("image");
    let image = std::fs::File::create(&path).expect("a file for the image");
    std::io::copy(&mut std::io::repeat(0).take(FILE_BYTES), &mut &image).expect("space for it");
    for len in [512, 4096] {
        let nodes = [0, 1, 4].map(|count| {
            let file = RawFile::open(&path, false, Cache::Writeback).expect("it exists");
            let node = BlockNode::new("d", Box::new(file));
            add(&node, count);
            (count, node)
        });
        writes(&format!("pwrite of {len:4} bytes"), &nodes, len, FILE_BYTES);
    }
    let nodes = [0, 1, 4].map(|count| {
        let node = BlockNode::new("d", Box::new(MemoryDisk::new(1 << 20)));
        add(&node, count);
        (count, node)
    });
    writes("copy of 512 bytes", &nodes, 512, 1 << 20);

    let node = Arc::new(BlockNode::new("d", Box::new(MemoryDisk::without_storage(TIB))));
    let bitmaps: Vec<_> = (0..8).map(|_| DirtyBitmap::new(TIB, DEFAULT_GRANULE_BYTES)).collect();
    let bitmaps: Vec<DirtyBitmap> = bitmaps.into_iter().map(|it| it.expect("it fits")).collect();
    let mut random = 88_172_645_463_325_252;
    for bitmap in &bitmaps {
        for _ in 0..TIB / DEFAULT_GRANULE_BYTES / 1000 {
            bitmap.mark(ByteRange { offset_bytes: next(&mut random) % TIB, len_bytes: 1 });
        }
    }
    let bytes = |bitmap: &DirtyBitmap| bitmap.runs().map(|run| run.len_bytes).sum::<u64>();
    let mut found = 0;
    let scan = best(|| found = bytes(&bitmaps[0]));
    assert_eq!(found, bitmaps[0].marked_bytes());
    println!("scan, 0.1 % dirty, scattered: {scan:?}");
    println!("count: {:?}", best(|| assert!(bitmaps[0].marked_bytes() > 0)));
    let merge = best(|| bitmaps[0].merge_from(&bitmaps[1]));
    println!("merge in place, 0.1 % dirty: {merge:?}");
    let full = DirtyBitmap::new(TIB, DEFAULT_GRANULE_BYTES).expect("it fits");
    full.mark_all();
    let target = DirtyBitmap::new(TIB, DEFAULT_GRANULE_BYTES).expect("it fits");
    let mut merge = Duration::MAX;
    for _ in 0..20 {
        target.clear_within(ByteRange { offset_bytes: 0, len_bytes: TIB });
        let began = Instant::now();
        target.merge_from(&full);
        merge = merge.min(began.elapsed());
    }
    println!("merge in place, all dirty into a clean one: {merge:?}");
    add(&node, 2);
    for at in 0..2 {
        let held = node.bitmaps().hold(&new(at).name).expect("it was added");
        held.mark_all();
    }
    let merge = best(|| {
        let sources = vec![MergeSource { node: None, name: new(1).name }];
        node.bitmaps().merge(&new(0).name, sources).expect("both were added");
    });
    println!("block-dirty-bitmap-merge, all dirty, as a transaction: {merge:?}");
    let coarse = DirtyBitmap::new(TIB, 1 << 20).expect("it fits");
    println!(
        "merge into 1 MiB granules, 0.1 % dirty: {:?}",
        best(|| coarse.merge_from(&bitmaps[2]))
    );
    let (mut data, mut chunks) = (0, 0);
    let out = best(|| {
        (data, chunks) = (0, 0);
        for chunk in bitmaps.iter().flat_map(DirtyBitmap::chunks) {
            chunks += 1;
            data += match chunk.content {
                Content::Data(bytes) => bytes.len(),
                Content::Zero(_) => 0,
            };
        }
    });
    println!("8 bitmaps to {chunks} chunks, {data} bytes: {out:?}");
    let chunks: Vec<_> = bitmaps[3].chunks().collect();
    let back = best(|| {
        let arrived = DirtyBitmap::new(TIB, DEFAULT_GRANULE_BYTES).expect("it fits");
        chunks.iter().for_each(|chunk| drop(arrived.load_chunk(chunk)));
        assert_eq!(arrived.marked_granules(), bitmaps[3].marked_granules());
    });
    println!("chunks of one to a new bitmap: {back:?}");
    println!("SHA-256 of one: {:?}", best(|| assert_eq!(bitmaps[3].sha256().len(), 64)));
    let clean = DirtyBitmap::new(16 * TIB, DEFAULT_GRANULE_BYTES).expect("it fits");
    println!(
        "chunks of a clean one of 16 TiB: {:?}",
        best(|| assert_eq!(clean.chunks().count(), 1))
    );
}
