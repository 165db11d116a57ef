//! Bitmaps that a backup uses.

use super::*;

fn freeze(node: &Arc<BlockNode>, text: &str) -> Result<Frozen, BitmapError> {
    let action = Action::Freeze { name: name(text), may_clear: true };
    let frozen = execute(&[(node.clone(), action)]).map_err(|(_, error)| error)?;
    Ok(frozen.into_iter().next().unwrap())
}

/// A disk whose bitmap `a` has one mark from before it was frozen, and one from after.
fn frozen() -> (Arc<BlockNode>, Frozen) {
    let node = disk(MIB);
    node.bitmaps().add(new("a", 512)).unwrap();
    write(&node, 0);
    let frozen = freeze(&node, "a").unwrap();
    write(&node, 4096);
    (node, frozen)
}

#[test]
fn a_frozen_bitmap_shows_the_marks_that_the_job_uses_and_nobody_else_may_change_it() {
    let (node, frozen) = frozen();
    assert_eq!(shown(&node), ["a 512 recording busy"]);
    assert!(frozen.marks().is_marked(0) && !frozen.marks().is_marked(4096));
    let busy = BitmapError::Busy { name: name("a") };
    assert_eq!(freeze(&node, "a").unwrap_err(), busy);
    assert_eq!(node.bitmaps().clear(&name("a")), Err(busy.clone()));
    assert_eq!(node.bitmaps().remove(&name("a")), Err(busy));
    // A transaction that fails at it leaves it as it is.
    write(&node, 8192);
    frozen.clear();
    assert_eq!(shown(&node), ["a 1024 recording"]);
}

#[test]
fn a_job_that_succeeds_clears_what_was_marked_before_it_and_nothing_else() {
    let (node, frozen) = frozen();
    frozen.clear();
    assert_eq!(shown(&node), ["a 512 recording"]);
    write(&node, 512);
    assert_eq!(shown(&node), ["a 1024 recording"]);
}

#[test]
fn a_job_that_fails_gives_the_marks_back_or_only_those_that_it_has_not_used() {
    let (node, frozen) = frozen();
    drop(frozen);
    assert_eq!(shown(&node), ["a 1024 recording"]);
    let frozen = freeze(&node, "a").unwrap();
    let left = DirtyBitmap::new(MIB, 512).unwrap();
    left.mark(ByteRange { offset_bytes: 4096, len_bytes: 512 });
    write(&node, 8192);
    frozen.keep_only(Arc::new(left));
    assert_eq!(shown(&node), ["a 1024 recording"]);
}

#[test]
fn a_disabled_bitmap_can_be_frozen_and_stays_disabled() {
    let node = disk(MIB);
    node.bitmaps().add(new("a", 512)).unwrap();
    write(&node, 0);
    node.bitmaps().disable(&name("a")).unwrap();
    let frozen = freeze(&node, "a").unwrap();
    write(&node, 4096);
    assert_eq!(shown(&node), ["a 512 busy"]);
    frozen.clear();
    assert_eq!(shown(&node), ["a 0"]);
}

#[test]
fn what_a_transaction_freezes_is_what_its_earlier_actions_have_made() {
    let node = disk(MIB);
    node.bitmaps().add(new("a", 512)).unwrap();
    write(&node, 0);
    let all = [
        Action::Add(new("b", 1024)),
        Action::Merge { target: name("b"), sources: vec![source("a")] },
        Action::Freeze { name: name("b"), may_clear: false },
        Action::Clear(name("a")),
    ];
    let run = |actions: &[Action]| {
        execute(&actions.iter().map(|action| (node.clone(), action.clone())).collect::<Vec<_>>())
    };
    let frozen = run(&all).unwrap();
    assert_eq!((frozen.len(), frozen[0].marks().marked_bytes()), (1, 1024));
    write(&node, 2048);
    assert_eq!(shown(&node), ["a 512 recording", "b 1024 recording busy"]);
    drop(frozen);
    assert_eq!(shown(&node), ["a 512 recording", "b 2048 recording"]);
    // After a freeze, it is busy; then nothing at all happens.
    let (at, error) =
        run(&[Action::Freeze { name: name("a"), may_clear: true }, Action::Clear(name("a"))])
            .unwrap_err();
    assert_eq!((at, error), (1, BitmapError::Busy { name: name("a") }));
    write(&node, 0);
    assert_eq!(shown(&node), ["a 1024 recording", "b 2048 recording"]);
}

#[test]
fn one_of_a_read_only_disk_can_be_frozen_only_to_stay_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::write(&image, [0; 512]).unwrap();
    let open = |read_only: bool| {
        let disk = MemoryDisk::without_storage(MIB).with_image(&image).unwrap();
        let node = BlockNode::new("d", Box::new(disk));
        let node = Arc::new(if read_only { node.into_read_only() } else { node });
        node.load_bitmaps().unwrap();
        node
    };
    let node = open(false);
    node.bitmaps().add(NewBitmap { persistent: true, ..new("a", 512) }).unwrap();
    write(&node, 0);
    // Also while a job uses it, both its old marks and its new ones are stored.
    let frozen = freeze(&node, "a").unwrap();
    write(&node, 4096);
    node.close_bitmaps().unwrap();
    drop((frozen, node));
    let node = open(true);
    assert_eq!(shown(&node), ["a 1024 recording"]);
    assert_eq!(freeze(&node, "a").unwrap_err(), BitmapError::ReadOnly { name: name("a") });
    let only_read = Action::Freeze { name: name("a"), may_clear: false };
    let frozen = execute(&[(node.clone(), only_read)]).unwrap();
    assert_eq!(frozen[0].marks().marked_bytes(), 1024);
    drop(frozen);
    assert_eq!(shown(&node), ["a 1024 recording"]);
}
