use super::*;
use crate::block::backend::ByteRange;
use crate::block::bitmap::{Chunk, Content, DEFAULT_GRANULE_BYTES};
use crate::block::memory::MemoryDisk;
use proptest::prelude::*;
use std::sync::atomic::AtomicU64;

const MIB: u64 = 1 << 20;

fn disk(len_bytes: u64) -> Arc<BlockNode> {
    Arc::new(BlockNode::new("d", Box::new(MemoryDisk::without_storage(len_bytes))))
}

fn name(name: &str) -> BitmapName {
    BitmapName::new(name).unwrap()
}

fn new(text: &str, granularity: u64) -> NewBitmap {
    NewBitmap { name: name(text), granularity, persistent: false, recording: true }
}

fn write(node: &BlockNode, offset_bytes: u64) {
    node.write_at(&[0; 512], offset_bytes).unwrap();
}

/// Name, marked bytes and flags.
fn shown(node: &BlockNode) -> Vec<String> {
    let flag = |set, text| if set { text } else { "" };
    let show = |info: BitmapInfo| {
        let busy = flag(info.busy, " busy");
        let recording = flag(info.recording, " recording");
        format!("{} {}{recording}{busy}", info.name, info.count_bytes)
    };
    node.bitmaps().info().into_iter().map(show).collect()
}

fn source(text: &str) -> MergeSource {
    MergeSource { node: None, name: name(text) }
}

#[test]
fn who_asks_what_there_is_does_not_wait_for_a_change() {
    let node = disk(MIB);
    node.bitmaps().add(new("a", 512)).unwrap();
    write(&node, 0);
    let turn = lock(&node.bitmaps().turn);
    assert_eq!(shown(&node), ["a 512 recording"]);
    assert!(node.bitmaps().sha256(&name("a")).is_ok());
    drop(turn);
}

#[test]
fn bitmaps_record_what_is_written_in_their_own_granules_while_they_are_enabled() {
    let (node, coarse) = (disk(MIB), DEFAULT_GRANULE_BYTES);
    let bitmaps = node.bitmaps();
    bitmaps.add(new("fine", 512)).unwrap();
    bitmaps.add(new("coarse", coarse)).unwrap();
    bitmaps.add(NewBitmap { recording: false, ..new("off", coarse) }).unwrap();
    write(&node, 65_536);
    node.discard(131_072, 512).unwrap();
    assert_eq!(shown(&node), ["fine 1024 recording", "coarse 131072 recording", "off 0"]);
    bitmaps.disable(&name("fine")).unwrap();
    bitmaps.enable(&name("off")).unwrap();
    node.write_zeroes(0, 512, true).unwrap();
    assert_eq!(shown(&node), ["fine 1024", "coarse 196608 recording", "off 65536 recording"]);
    bitmaps.clear(&name("coarse")).unwrap();
    bitmaps.remove(&name("off")).unwrap();
    write(&node, 0);
    assert_eq!(shown(&node), ["fine 1024", "coarse 65536 recording"]);
    // Neither is what comes from a migration a write of the guest.
    node.fill_at(&[0; 512], 524_288).unwrap();
    bitmaps.merge(&name("fine"), vec![source("coarse"), source("fine")]).unwrap();
    assert_eq!(shown(&node), ["fine 66560", "coarse 65536 recording"]);
    assert_eq!(bitmaps.sha256(&name("fine")).unwrap().len(), 64);
    assert_eq!(node.writes.list().len(), 1);
}

#[test]
fn what_cannot_be_done_is_refused_in_qemus_words() {
    let node = disk(MIB);
    let bitmaps = node.bitmaps();
    bitmaps.add(new("b", 512)).unwrap();
    for (bad, why) in [
        (new("b", 512), "Bitmap already exists: b"),
        (new("c", 0), "Granularity must be power of 2 and at least 512"),
        (new("c", 256), "Granularity must be power of 2 and at least 512"),
        (new("c", 65_537), "Granularity must be power of 2 and at least 512"),
        (new("c", 128 * MIB), "Granularity must be at most 67108864"),
        (
            NewBitmap { persistent: true, ..new("c", 512) },
            "Can't make bitmap 'c' persistent in 'd': its image is not a regular file",
        ),
    ] {
        assert_eq!(bitmaps.add(bad).unwrap_err().to_string(), why);
    }
    bitmaps.add(new("largest", MAX_GRANULE_BYTES)).unwrap();
    bitmaps.remove(&name("largest")).unwrap();
    let missing = "Dirty bitmap 'c' not found";
    assert_eq!(bitmaps.remove(&name("c")).unwrap_err().to_string(), missing);
    assert_eq!(bitmaps.sha256(&name("c")).unwrap_err().to_string(), missing);
    assert_eq!(bitmaps.hold(&name("c")).unwrap_err().to_string(), missing);
    assert_eq!(bitmaps.merge(&name("b"), vec![source("c")]).unwrap_err().to_string(), missing);
    let other = disk(2 * MIB);
    other.bitmaps().add(new("b", 512)).unwrap();
    let elsewhere = MergeSource { node: Some(other), name: name("b") };
    assert_eq!(
        bitmaps.merge(&name("b"), vec![elsewhere]).unwrap_err().to_string(),
        "Bitmaps are of different sizes (destination size is 1048576, source size is 2097152) and can't be \
         merged"
    );
}

#[test]
fn the_number_of_bitmaps_and_their_memory_are_bounded() {
    let huge = disk(16 << 40);
    let error = huge.bitmaps().add(new("b", 512)).unwrap_err();
    assert!(matches!(error, BitmapError::TooLarge { .. }), "{error}");
    assert!(error.to_string().ends_with("use a larger granularity"), "{error}");
    // 512 MiB and a little each.
    huge.bitmaps().add(new("b", 4096)).unwrap();
    assert!(matches!(huge.bitmaps().add(new("c", 4096)), Err(BitmapError::TooLarge { .. })));
    let arriving = huge.bitmaps().arrive(&new("c", 4096));
    assert!(matches!(arriving, Err(BitmapError::TooLarge { .. })));
    let node = disk(MIB);
    for at in 0..MAX_BITMAPS {
        node.bitmaps().add(new(&at.to_string(), 65_536)).unwrap();
    }
    let error = node.bitmaps().add(new("b", 65_536)).unwrap_err();
    assert_eq!(error.to_string(), "Bitmap 'b': a disk has at most 1024 bitmaps");
}

/// Everything that changes or uses a bitmap.
fn all_actions(text: &str) -> Vec<Action> {
    let sources = vec![source(text)];
    vec![
        Action::Clear(name(text)),
        Action::Enable(name(text)),
        Action::Disable(name(text)),
        Action::Merge { target: name(text), sources: vec![] },
        Action::Merge { target: name("other"), sources },
    ]
}

#[test]
fn a_busy_bitmap_cannot_be_changed_and_goes_on_recording() {
    let node = disk(MIB);
    node.bitmaps().add(new("b", 512)).unwrap();
    node.bitmaps().add(new("other", 512)).unwrap();
    let held = node.bitmaps().hold(&name("b")).unwrap();
    let mut actions = all_actions("b");
    actions.push(Action::Remove(name("b")));
    for action in actions {
        let (at, error) = execute(&[(node.clone(), action)]).unwrap_err();
        assert_eq!((at, error.hint()), (0, None));
        assert_eq!(
            error.to_string(),
            "Bitmap 'b' is currently in use by another operation and cannot be used"
        );
    }
    assert!(matches!(node.bitmaps().hold(&name("b")), Err(BitmapError::Busy { .. })));
    write(&node, 0);
    assert_eq!(held.marked_bytes(), 512);
    assert_eq!(shown(&node), ["b 512 recording busy", "other 512 recording"]);
    assert_eq!(held.info(), node.bitmaps().info()[0]);
    drop(held);
    node.bitmaps().clear(&name("b")).unwrap();
    // One that has left is gone.
    let held = node.bitmaps().hold(&name("b")).unwrap();
    held.leave();
    assert_eq!(shown(&node), ["other 512 recording"]);
    assert_eq!(node.writes.list().len(), 1);
}

#[test]
fn an_inconsistent_bitmap_can_only_be_removed() {
    let node = disk(MIB);
    node.bitmaps().add(NewBitmap { recording: false, ..new("b", 512) }).unwrap();
    node.bitmaps().add(new("other", 512)).unwrap();
    lock(&node.bitmaps().entries)[0].inconsistent = true;
    for action in all_actions("b") {
        let (_, error) = execute(&[(node.clone(), action)]).unwrap_err();
        assert_eq!(error.to_string(), "Bitmap 'b' is inconsistent and cannot be used");
        assert!(error.hint().is_some());
    }
    assert!(matches!(node.bitmaps().hold(&name("b")), Err(BitmapError::Inconsistent { .. })));
    node.bitmaps().remove(&name("b")).unwrap();
    assert_eq!(shown(&node), ["other 0 recording"]);
}

#[test]
fn one_that_arrives_records_at_once_and_is_dropped_if_it_stays_unfinished() {
    let node = disk(MIB);
    let granule = 512 * 8;
    let arriving = node.bitmaps().arrive(&new("b", granule)).unwrap();
    assert_eq!(shown(&node), ["b 0 recording busy"]);
    assert!(matches!(node.bitmaps().add(new("b", 512)), Err(BitmapError::Exists { .. })));
    assert!(matches!(node.bitmaps().remove(&name("b")), Err(BitmapError::Busy { .. })));
    write(&node, 0);
    let data = |byte: u8| Content::Data(vec![byte, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(arriving.load(&Chunk { offset_bytes: 8, content: data(6) }), Ok(2));
    assert!(arriving.load(&Chunk { offset_bytes: 32, content: data(1) }).is_err());
    assert_eq!(arriving.load(&Chunk { offset_bytes: 0, content: data(1) }), Ok(1));
    assert_eq!(arriving.finish().count_bytes, 3 * granule);
    assert_eq!(shown(&node), [format!("b {} recording", 3 * granule)]);
    let off = NewBitmap { recording: false, ..new("off", 512) };
    let arriving = node.bitmaps().arrive(&off).unwrap();
    write(&node, 0);
    assert_eq!(arriving.info().count_bytes, 0);
    drop(arriving);
    drop(node.bitmaps().arrive(&new("c", 512)).unwrap());
    assert_eq!(shown(&node), [format!("b {} recording", 3 * granule)]);
    assert_eq!(node.writes.list().len(), 1);
}

#[test]
fn a_transaction_sees_its_own_changes_and_is_all_or_none() {
    let (a, b) = (disk(MIB), disk(MIB));
    a.bitmaps().add(new("old", 512)).unwrap();
    write(&a, 0);
    let target = name("new");
    let sources = vec![MergeSource { node: Some(a.clone()), name: name("old") }];
    let mut actions = vec![
        (b.clone(), Action::Add(NewBitmap { recording: false, ..new("new", 1024) })),
        (b.clone(), Action::Merge { target, sources }),
        (a.clone(), Action::Clear(name("old"))),
        (a.clone(), Action::Remove(name("old"))),
        (a.clone(), Action::Add(new("old", 4096))),
        (b.clone(), Action::Enable(name("new"))),
        (b.clone(), Action::Enable(name("missing"))),
    ];
    let (at, error) = execute(&actions).unwrap_err();
    assert_eq!((at, error), (6, BitmapError::NotFound { name: name("missing") }));
    assert_eq!((shown(&a), shown(&b)), (vec!["old 512 recording".into()], vec![]));
    actions.pop();
    execute(&actions).unwrap();
    assert_eq!(shown(&a), ["old 0 recording"]);
    assert_eq!(shown(&b), ["new 1024 recording"]);
    write(&a, 0);
    write(&b, 4096);
    assert_eq!(
        (shown(&a), shown(&b)),
        (vec!["old 4096 recording".into()], vec!["new 2048 recording".into()])
    );
    execute(&[]).unwrap();
}

mod frozen;
mod random;
mod store;
