//! Dirty bitmaps move with their guest: whole, or not at all.

use super::fake::*;
use crate::bitmap::frame::{Announced, Piece, encode_setup};
use crate::bitmap::mapping::{MappedBitmap, MappedNode, Mapping};
use crate::error::chain;
use crate::source::SourceOutcome;
use crate::wire::section::Stage;
use devices::block::BlockNode;
use devices::block::bitmap::{Chunk, Content};
use devices::block::bitmaps::{BitmapInfo, BitmapName};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

const K64: u64 = 64 << 10;

fn name(text: &str) -> BitmapName {
    BitmapName::new(text).unwrap()
}

fn info(node: &BlockNode, wanted: &str) -> Option<BitmapInfo> {
    node.bitmaps().info().into_iter().find(|info| info.name.as_str() == wanted)
}

fn move_with(bitmaps: &FakeBitmaps) -> End {
    migrate(&Scenario { bitmaps: Some(bitmaps.clone()), ..Default::default() })
}

#[test]
fn bitmaps_arrive_with_what_was_written_here_and_there() {
    let bitmaps = FakeBitmaps::new()
        .with("fine", 512, true)
        .with("coarse", K64, true)
        .with("off", K64, false);
    let before = ["fine", "coarse", "off"].map(|name| info(&bitmaps.source, name).unwrap());
    let end = move_with(&bitmaps);
    end.assert_moved();
    assert_eq!(bitmaps.source.bitmaps().info(), [], "they have left");
    for old in before {
        let new = info(&bitmaps.destination, old.name.as_str()).unwrap();
        let granules = if old.recording { 4096_u64.div_ceil(old.granularity) } else { 0 };
        assert_eq!(new.count_bytes, old.count_bytes + granules * old.granularity, "{new:?}");
        assert_eq!(BitmapInfo { count_bytes: old.count_bytes, ..new.clone() }, old);
        assert!(!new.busy);
        // Bit for bit.
        let held = bitmaps.destination.bitmaps().hold(&new.name).unwrap();
        for offset in [0, 3 << 20, (1 << 30) + 512, LEN_BYTES - 512] {
            assert!(held.is_marked(offset), "{new:?} at {offset}");
        }
        assert_eq!(held.is_marked(WRITTEN_THERE), old.recording);
    }
    let (here, there) = (end.counters.snapshot(), end.destination_counters.snapshot());
    assert_eq!(here.postcopy_bytes, there.postcopy_bytes);
    assert_eq!((here.postcopy_left, there.postcopy_left), (0, 0));
    // 3 GiB in sectors are 768 KiB of bitmap; all but a few chunks are clean.
    assert!(here.postcopy_total > 768 << 10 && here.postcopy_bytes < 512 << 10, "{here:?}");
}

#[test]
fn a_failed_move_leaves_bitmaps_as_they_were() {
    let bitmaps = FakeBitmaps::new().with("daily", K64, true);
    let before = info(&bitmaps.source, "daily").unwrap();
    let scenario =
        Scenario { bitmaps: Some(bitmaps.clone()), fail: Fail::Run, ..Default::default() };
    let end = migrate(&scenario);
    assert!(matches!(end.source, SourceOutcome::Failed(_)), "{:?}", end.source);
    assert_eq!(info(&bitmaps.source, "daily"), Some(before), "not busy, and still here");
    assert_eq!(bitmaps.destination.bitmaps().info(), []);
}

/// A bitmap that is there already, busy, inconsistent, unknown, of another disk: before the switch, by name.
#[test]
fn bitmaps_that_cannot_move_are_refused_by_name() {
    let refused = |bitmaps: &FakeBitmaps| {
        let end = move_with(bitmaps);
        end.assert_back_at_source("refused");
        let SourceOutcome::Failed(error) = &end.source else { panic!("{:?}", end.source) };
        chain(error)
    };
    let bitmaps = FakeBitmaps::new().with("daily", K64, true);
    let _busy = bitmaps.source.bitmaps().hold(&name("daily")).unwrap();
    assert!(refused(&bitmaps).contains("disk root: Bitmap 'daily' is currently in use"));

    let mut bitmaps = FakeBitmaps::new().with("daily", K64, true);
    bitmaps.moving[0].name = name("weekly");
    assert!(refused(&bitmaps).contains("disk root: Dirty bitmap 'weekly' not found"));

    let bitmaps = FakeBitmaps::new().with("daily", K64, true);
    let there = FakeBitmaps::new().with("daily", K64, true);
    let bitmaps = FakeBitmaps { destination: there.source, ..bitmaps };
    assert!(refused(&bitmaps).contains("disk root: Bitmap already exists: daily"));
    assert!(!info(&bitmaps.source, "daily").unwrap().busy);

    let mut bitmaps = FakeBitmaps::new().with("daily", K64, true);
    bitmaps.moving[0].disk_alias = "other".into();
    assert!(refused(&bitmaps).contains("\"daily\" is for disk \"other\", which is not here"));
}

#[test]
fn a_mapping_decides_what_bitmaps_become() {
    let mut bitmaps = FakeBitmaps::new().with("daily", K64, true);
    (bitmaps.moving[0].disk_alias, bitmaps.moving[0].alias) = ("d".into(), "1".into());
    let mapped = MappedBitmap { name: "renamed".into(), alias: "1".into(), persistent: None };
    let node = MappedNode { node_name: "root".into(), alias: "d".into(), bitmaps: vec![mapped] };
    bitmaps.mapping = Some(Arc::new(Mapping::new(vec![node]).unwrap()));
    move_with(&bitmaps).assert_moved();
    assert!(info(&bitmaps.destination, "renamed").unwrap().count_bytes > 0);
    assert_eq!(info(&bitmaps.destination, "daily"), None);

    let mut bitmaps = FakeBitmaps::new().with("daily", K64, true);
    bitmaps.mapping = Some(Arc::default());
    let end = move_with(&bitmaps);
    assert!(matches!(&end.source, SourceOutcome::Failed(error) if chain(error).contains("daily")));
}

/// The link is cut at every frame of the last phase: a bitmap is whole or not there.
#[test]
fn a_link_cut_in_the_last_phase_leaves_no_bitmap_half_true() {
    let bitmaps = || FakeBitmaps::new().with("one", 1 << 20, true).with("two", 4 << 20, true);
    let whole = move_with(&bitmaps()).bytes_exchanged;
    let none = migrate(&Scenario::default()).bytes_exchanged;
    let (mut cut_short, mut kept) = (0, 0);
    for cut in (none..=whole).step_by(7) {
        let bitmaps = bitmaps();
        let scenario =
            Scenario { bitmaps: Some(bitmaps.clone()), cut_after: Some(cut), ..Default::default() };
        let end = migrate(&scenario);
        let case = format!("cut after {cut}: {:?}", end.source);
        assert!(end.running_guests() <= 1, "{case}");
        let there = bitmaps.destination.bitmaps().info();
        if !end.destination_machine.running.load(SeqCst) {
            assert_eq!(there, [], "{case}");
            continue;
        }
        for info in &there {
            assert!(!info.busy, "{case}");
            let held = bitmaps.destination.bitmaps().hold(&info.name).unwrap();
            for offset in [0, 3 << 20, (1 << 30) + 512, LEN_BYTES - 512, WRITTEN_THERE] {
                assert!(held.is_marked(offset), "{case}: {info:?} at {offset}");
            }
        }
        match &end.source {
            SourceOutcome::Completed => assert_eq!(there.len(), 2, "{case}"),
            SourceOutcome::Incomplete(_) | SourceOutcome::Unknown(_) => {
                cut_short += usize::from(there.len() < 2);
                kept += usize::from(there.len() == 1);
                let missing = end.destination_counters.snapshot().incomplete;
                assert_eq!(missing.is_some(), there.len() < 2, "{case}: {missing:?}");
            }
            other => panic!("{case}: {other:?}"),
        }
    }
    assert!(cut_short > 10 && kept > 0, "{cut_short} cut short, {kept} with one of two");
}

/// A source that announces and sends what it likes.
fn lie(
    change: impl FnOnce(&mut Vec<Announced>, &mut Vec<(&'static str, Stage, Vec<u8>)>),
) -> (End, FakeBitmaps) {
    let bitmaps = FakeBitmaps::new();
    let one = |name: &str| Announced {
        disk: "root".into(),
        name: name.into(),
        recording: true,
        persistent: false,
        granularity: 1 << 20,
        len_bytes: LEN_BYTES,
    };
    // 3073 granules: 49 words.
    let zero = |bitmap| piece(Piece::Chunk { bitmap, chunk: chunk(0, Content::Zero(49 * 8)) });
    let complete = |bitmap| piece(Piece::Complete { bitmap, granules: 0 });
    let mut setup = vec![one("bad"), one("good")];
    let mut after = vec![zero(0), complete(0), zero(1), complete(1)];
    change(&mut setup, &mut after);
    let words = Words { section: "dirty-bitmap", setup: encode_setup(&setup), after };
    let scenario =
        Scenario { bitmaps: Some(bitmaps.clone()), late: Some(words), ..Default::default() };
    (migrate(&scenario), bitmaps)
}

fn piece(piece: Piece) -> (&'static str, Stage, Vec<u8>) {
    ("dirty-bitmap", Stage::Postcopy, piece.encode())
}

fn chunk(offset_bytes: u64, content: Content) -> Chunk {
    Chunk { offset_bytes, content }
}

#[test]
fn announcements_that_do_not_fit_are_refused_before_the_switch() {
    type Change = fn(&mut Vec<Announced>);
    let lies: [(&str, Change); 6] = [
        ("Granularity must be", |all| all[0].granularity = 256),
        ("Granularity must be", |all| all[0].granularity = 1 << 40),
        ("for a disk of 512 bytes, disk root has", |all| all[1].len_bytes = 512),
        ("Bitmap already exists: good", |all| all[0].name = "good".into()),
        ("malformed dirty-bitmap setup", |all| all[0].name = String::new()),
        ("is for disk \"elsewhere\"", |all| all[1].disk = "elsewhere".into()),
    ];
    for (expected, change) in lies {
        let (end, bitmaps) = lie(|setup, _| change(setup));
        end.assert_back_at_source(expected);
        let SourceOutcome::Failed(error) = &end.source else { panic!("{:?}", end.source) };
        assert!(chain(error).contains(expected), "{expected}: {}", chain(error));
        assert_eq!(bitmaps.destination.bitmaps().info(), []);
    }
    let (end, _) = lie(|setup, _| {
        let first = setup[0].clone();
        setup.extend((0..5000).map(|n| Announced { name: n.to_string(), ..first.clone() }));
    });
    assert!(
        matches!(&end.source, SourceOutcome::Failed(error) if chain(error).contains("5002 bitmaps"))
    );
}

/// A bad chunk costs its own bitmap.
#[test]
fn a_bad_chunk_drops_its_bitmap_and_no_other() {
    let all = |n: usize| vec![0xff; n];
    let lies: [(&str, Vec<Piece>); 6] = [
        ("a chunk at 8 came where one at 0", vec![data(0, 8, vec![0; 8])]),
        ("past the end of the disk", vec![data(0, 0, all(49 * 8))]),
        ("not in a bitmap of", vec![data(0, 0, vec![0; 50 * 8])]),
        ("does not consist of words", vec![data(0, 0, vec![0; 13])]),
        ("0 of 392 bytes", vec![Piece::Complete { bitmap: 0, granules: 0 }]),
        ("392 of 392 bytes and 1 of 2 marks", {
            let mut words = vec![0; 49 * 8];
            words[0] = 1;
            vec![data(0, 0, words), Piece::Complete { bitmap: 0, granules: 2 }]
        }),
    ];
    for (expected, pieces) in lies {
        let (end, bitmaps) = lie(|_, after| {
            // What follows of it is skipped.
            after.splice(0..0, pieces.into_iter().map(piece));
        });
        let SourceOutcome::Incomplete(why) = &end.source else {
            panic!("{expected}: {:?}", end.source)
        };
        assert!(
            why.contains("dirty bitmap root/bad (") && why.contains(expected),
            "{expected}: {why}"
        );
        assert!(!why.contains("root/good"), "{why}");
        assert!(end.destination_machine.running.load(SeqCst) && end.running_guests() == 1);
        assert_eq!(info(&bitmaps.destination, "bad"), None);
        let good = info(&bitmaps.destination, "good").unwrap();
        assert_eq!((good.busy, good.count_bytes), (false, 1 << 20), "what the guest wrote there");
    }
}

fn data(bitmap: u16, offset: u64, words: Vec<u8>) -> Piece {
    Piece::Chunk { bitmap, chunk: chunk(offset, Content::Data(words)) }
}

/// Nothing more is believed of a source that sends what cannot be: what is complete stays, the rest is dropped.
#[test]
fn contents_of_nothing_end_the_phase() {
    let (end, bitmaps) =
        lie(|_, after| after.insert(2, piece(Piece::Complete { bitmap: 0, granules: 0 })));
    let SourceOutcome::Incomplete(why) = &end.source else { panic!("{:?}", end.source) };
    assert!(why.contains("more of bitmap root/bad after its end"), "{why}");
    assert!(info(&bitmaps.destination, "bad").is_some_and(|info| !info.busy));
    assert_eq!(info(&bitmaps.destination, "good"), None);

    let (end, bitmaps) = lie(|_, after| after.insert(0, piece(data(7, 0, vec![0; 8]))));
    let SourceOutcome::Incomplete(why) = &end.source else { panic!("{:?}", end.source) };
    assert!(why.contains("unexpected bitmap number 7"), "{why}");
    assert_eq!(bitmaps.destination.bitmaps().info(), []);
    assert!(end.destination_machine.running.load(SeqCst));
}
