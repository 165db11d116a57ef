//! Dirty bitmaps that move with their guest: bit for bit, and not at all if the last phase is cut short.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use devices::block::bitmaps::{BitmapInfo, BitmapName, NewBitmap};
use ferry_tests::bitmaps::{
    add, add_persistent, assert_has, bitmap, bitmaps, expected, named, with_bitmaps,
};
use ferry_tests::ferry::{self, Guest};
use ferry_tests::hosts::{moving, started};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qmp::Qmp;
use ferry_tests::steps::{STEPPING, touched};
use ferry_tests::{disk, needs, steps};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 16 * MIB + 512;

fn blank(folder: &Path, name: &str, bytes: u64) -> PathBuf {
    let path = folder.join(name);
    disk::create(&path, bytes).unwrap();
    path
}

/// A guest that goes on writing the first 4 MiB of its disk `root`, and nothing else.
fn writer(image: &Path) -> Guest {
    Guest::new("work=disk disk_mb=4 hb_ms=20", 64).disk("root", image)
}

fn run(qmp: &mut Qmp, command: &str, arguments: Value) {
    assert_eq!(qmp.execute(command, arguments).unwrap(), json!({}), "{command}");
}

/// Moves it to a new process; the disk goes to `to`, or is shared if that is where it is.
fn hop(vmm: &mut Vmm, image: &mut PathBuf, to: &Path, channels: &str) {
    let give = format!("root={}", to.display());
    let destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
    let disks = if to == image.as_path() { "none" } else { "full" };
    let options = ["--channels", channels, "--disks", disks];
    let ended = ferry::migrate_well(vmm, &destination.address, &options).unwrap();
    assert_eq!(ended.summary["status"], "completed");
    assert!(ended.summary["x-postcopy"]["total"].as_u64().unwrap() > 0, "{}", ended.summary);
    assert_eq!(ended.summary.get("x-incomplete"), None, "{}", ended.summary);
    vmm.process.wait(SOON).unwrap();
    *vmm = destination.vmm;
    *image = to.to_owned();
    vmm.wait_line("^HB ").unwrap();
}

/// A guest that takes steps on its disk `root`, held, on a blank image.
fn stepper(image: &Path) -> Vmm {
    started(&Guest::new(STEPPING, 64).disk("root", image))
}

/// The bitmaps that an image nobody has open keeps in its file.
fn kept(image: &Path) -> Vec<BitmapInfo> {
    with_bitmaps(image, |node| node.bitmaps().info())
}

#[test]
#[needs(kvm)]
fn what_is_written_discarded_and_zeroed_before_during_and_after_a_move_is_marked() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = 32 * MIB + 512;
    let mut vmm = stepper(&blank(folder.path(), "0", bytes));
    let mut qmp = vmm.qmp().unwrap();
    for (name, granularity) in
        [("fine", 512), ("middle", 4096), ("coarse", 65_536), ("before", 512)]
    {
        add(&mut qmp, name, granularity, false);
    }
    steps::go(&mut vmm).unwrap();
    steps::wait_for(&vmm, 100).unwrap();
    let before = steps::hold(&mut vmm).unwrap();
    let sectors = touched(0..before, bytes);
    for name in ["fine", "middle", "coarse", "before"] {
        assert_has(&mut qmp, name, &sectors, bytes);
    }
    run(&mut qmp, "block-dirty-bitmap-disable", named("before"));
    steps::go(&mut vmm).unwrap();
    let give = format!("root={}", folder.path().join("1").display());
    let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
    // The disk is at the destination in part while the guest takes some steps.
    let slow = ["--disks", "full", "--max-bandwidth", "2M"];
    let migration = moving(&vmm, &destination.address, &slow);
    let at_start = steps::last_told(&vmm).unwrap();
    steps::wait_for(&vmm, at_start + 100).unwrap();
    run(&mut qmp, "migrate-set-parameters", json!({"max-bandwidth": 1_u64 << 30}));
    let ended = migration.end(SOON * 2).unwrap();
    assert_eq!(ended.code, 0, "{}", ended.errors);
    vmm.process.wait(SOON).unwrap();
    let at_end = steps::last_told(&vmm).unwrap();
    assert!(at_end >= at_start + 100, "{at_start} to {at_end} during the move");
    steps::wait_for(&destination.vmm, at_end + 100).unwrap();
    let after = steps::hold(&mut destination.vmm).unwrap();
    let mut qmp = destination.vmm.qmp().unwrap();
    let all = touched(0..after, bytes);
    for name in ["fine", "middle", "coarse"] {
        assert_has(&mut qmp, name, &all, bytes);
    }
    assert_has(&mut qmp, "before", &sectors, bytes);
    ferry::verify_at(&mut destination.vmm, &[vmm.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn ten_moves_lose_no_bit_and_add_none_over_one_channel() {
    ten_moves("1");
}

#[test]
#[needs(kvm)]
fn ten_moves_lose_no_bit_and_add_none_over_four_channels() {
    ten_moves("4");
}

fn ten_moves(channels: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut image = blank(folder.path(), "0", DISK_BYTES);
    let mut vmm = stepper(&image);
    let mut qmp = vmm.qmp().unwrap();
    for (name, granularity) in
        [("fine", 512), ("coarse", 65_536), ("huge", 64 << 20), ("off", 4096)]
    {
        add(&mut qmp, name, granularity, false);
    }
    add_persistent(&mut qmp, "kept", 4096);
    steps::go(&mut vmm).unwrap();
    steps::wait_for(&vmm, 20).unwrap();
    let first = steps::hold(&mut vmm).unwrap();
    run(&mut qmp, "block-dirty-bitmap-disable", named("off"));
    steps::go(&mut vmm).unwrap();
    let mut late = 0;
    for number in 1..=10 {
        // Every third time the disk stays where it is.
        let to =
            if number % 3 == 0 { image.clone() } else { folder.path().join(number.to_string()) };
        let (from, taken) = (image.clone(), steps::last_told(&vmm).unwrap());
        hop(&mut vmm, &mut image, &to, channels);
        if from != to {
            assert_eq!(kept(&from), [], "it has left, and the old disk must not say otherwise");
        }
        steps::wait_for(&vmm, taken + 20).unwrap();
        if number == 5 {
            late = steps::hold(&mut vmm).unwrap();
            add(&mut vmm.qmp().unwrap(), "late", 512, false);
            steps::go(&mut vmm).unwrap();
        }
    }
    let last = steps::hold(&mut vmm).unwrap();
    let all = touched(0..last, DISK_BYTES);
    let mut qmp = vmm.qmp().unwrap();
    for name in ["fine", "coarse", "huge", "kept"] {
        assert_has(&mut qmp, name, &all, DISK_BYTES);
        let shown = bitmap(&mut qmp, name);
        assert_eq!(
            (&shown["recording"], &shown["persistent"]),
            (&json!(true), &json!(name == "kept"))
        );
    }
    assert_has(&mut qmp, "late", &touched(late..last, DISK_BYTES), DISK_BYTES);
    assert_has(&mut qmp, "off", &touched(0..first, DISK_BYTES), DISK_BYTES);
    assert_eq!(bitmap(&mut qmp, "off")["recording"], false);
    let busy = |bitmap: &Value| bitmap["busy"] == true;
    assert!(!bitmaps(&mut qmp, "root").as_array().unwrap().iter().any(busy));
    assert_eq!(vmm.check().unwrap().corrupt, 0);
    // The file beside the last image has the one that is persistent, bit for bit.
    run(&mut qmp, "quit", json!({}));
    vmm.process.wait(SOON).unwrap();
    let (count, digest) = expected(&all, 4096, DISK_BYTES);
    let kept = kept(&image);
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!((kept[0].name.as_str(), kept[0].count_bytes), ("kept", count));
    assert!(kept[0].recording && !kept[0].inconsistent, "{kept:?}");
    let stored = with_bitmaps(&image, |node| node.bitmaps().sha256(&kept[0].name));
    assert_eq!(stored.unwrap(), digest);
}

/// A guest on a disk with two bitmaps. The contents of `large` are 2 MiB, no part of which is clean: they take
/// seconds over a slow link.
fn with_a_large_bitmap(folder: &Path) -> (Vmm, ferry::Destination) {
    let image = blank(folder, "root", 8 << 30);
    with_bitmaps(&image, |node| {
        for (name, granularity) in [("small", 64 << 20), ("large", 512)] {
            let name = BitmapName::new(name).unwrap();
            let new = NewBitmap { name, granularity, persistent: true, recording: true };
            node.bitmaps().add(new).unwrap();
        }
        for at in (0..8 << 30).step_by(256 << 20) {
            node.write_at(&[0; 512], at).unwrap();
        }
    });
    let source = started(&Guest::new("work=idle", 64).disk("root", &image));
    let give = format!("root={}", image.display());
    (source, ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap())
}

/// Starts a move and waits until the guest has moved and the bitmaps are on their way.
fn in_last_phase(source: &Vmm, address: &str) -> (ferry::Migration, Qmp) {
    let mut qmp = source.qmp().unwrap();
    qmp.want_migration_events().unwrap();
    let slow = ["--max-bandwidth", "400K", "--disks", "none"];
    let migration = ferry::start_migrate(source, address, &slow).unwrap();
    qmp.wait_migration(&["postcopy-active"], SOON * 2).unwrap();
    let info = qmp.execute("query-migrate", json!({})).unwrap();
    assert_eq!(info["status"], "postcopy-active");
    assert!(
        info["downtime"].is_u64() && info["x-postcopy"]["total"].as_u64().unwrap() > 0,
        "{info}"
    );
    (migration, qmp)
}

/// That the guest runs there, and which bitmaps have arrived.
fn arrived(destination: &ferry::Destination, source: &Vmm) -> Vec<String> {
    let mut qmp = destination.vmm.qmp().unwrap();
    let info = qmp.migration_end().unwrap();
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(qmp.run_state().unwrap(), "running");
    destination.vmm.wait_next_line("^HB ").unwrap();
    assert!(!source.serial().text().is_empty());
    let found = bitmaps(&mut qmp, "root");
    let found = found.as_array().into_iter().flatten();
    assert!(
        found.clone().all(|bitmap| bitmap["busy"] == false && bitmap["inconsistent"].is_null())
    );
    let missing = info["x-incomplete"].as_str().unwrap_or_default();
    let names: Vec<_> = found.map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect();
    for name in ["small", "large"] {
        let named = missing.contains(&format!("root/{name}"));
        assert_eq!(named, !names.contains(&name.to_owned()), "{name}: {missing:?}");
    }
    names
}

/// Kill either side, or give up: the guest runs at the destination or is the operator's, and no bitmap is half
/// true.
#[test]
#[needs(kvm)]
fn the_last_phase_cut_short_costs_bitmaps_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    // The source is killed.
    let (mut source, destination) = with_a_large_bitmap(folder.path());
    let (migration, _) = in_last_phase(&source, &destination.address);
    source.process.kill().unwrap();
    assert_eq!(migration.end(SOON).unwrap().code, 4, "its control socket has gone");
    assert_eq!(arrived(&destination, &source), ["small"]);
    drop(destination);

    // The destination is: the guest is gone with it, and does not come back by itself.
    let folder = tempfile::tempdir().unwrap();
    let (source, mut destination) = with_a_large_bitmap(folder.path());
    let (migration, mut qmp) = in_last_phase(&source, &destination.address);
    destination.vmm.process.kill().unwrap();
    let info = qmp.migration_end().unwrap();
    assert_eq!(info["status"], "completed", "{info}");
    assert!(info["x-incomplete"].is_string(), "{info}");
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 6, "{}", ended.errors);
    assert!(ended.errors.contains("not everything has arrived"), "{}", ended.errors);

    // A cancel comes too late; what is left can be given up.
    let folder = tempfile::tempdir().unwrap();
    let (source, destination) = with_a_large_bitmap(folder.path());
    let (migration, mut qmp) = in_last_phase(&source, &destination.address);
    let refusal = qmp.refused("migrate_cancel", json!({})).unwrap();
    assert!(refusal.description.contains("cannot be cancelled any more"), "{refusal}");
    run(&mut qmp, "x-migrate-give-up", json!({}));
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 6, "{}", ended.errors);
    assert!(ended.errors.contains("given up at the source"), "{}", ended.errors);
    assert_eq!(arrived(&destination, &source), ["small"]);

    // Left alone, all is there.
    let folder = tempfile::tempdir().unwrap();
    let (source, destination) = with_a_large_bitmap(folder.path());
    let (migration, _qmp) = in_last_phase(&source, &destination.address);
    // The guest has run there for seconds when the last bitmap is complete.
    destination.vmm.wait_line("^HB ").unwrap();
    let ended = migration.end(SOON * 2).unwrap();
    assert_eq!(ended.code, 0, "{}", ended.errors);
    assert_eq!(arrived(&destination, &source), ["small", "large"]);
    let mut qmp = destination.vmm.qmp().unwrap();
    assert_eq!(bitmap(&mut qmp, "large")["count"], 32 * 512);
}

#[test]
#[needs(kvm)]
fn a_mapping_renames_what_it_names_and_leaves_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let image = blank(folder.path(), "0", DISK_BYTES);
    let source = started(&writer(&image));
    let give = format!("root={}", folder.path().join("1").display());
    let destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
    let (mut here, mut there) = (source.qmp().unwrap(), destination.vmm.qmp().unwrap());
    for name in ["daily", "weekly"] {
        add(&mut here, name, 65_536, false);
    }
    let set = |qmp: &mut Qmp, name: &str, alias: &str| {
        let bitmaps = json!([{"name": name, "alias": alias}]);
        let mapping = json!([{"node-name": "root", "alias": "disk", "bitmaps": bitmaps}]);
        run(qmp, "migrate-set-parameters", json!({"block-bitmap-mapping": mapping}));
        let shown = qmp.execute("query-migrate-parameters", json!({})).unwrap();
        assert_eq!(shown["block-bitmap-mapping"], mapping);
    };
    set(&mut here, "daily", "d");
    set(&mut there, "arrived", "other");
    let refused = ferry::migrate(&source, &destination.address, &["--disks", "full"]).unwrap();
    assert_eq!(refused.code, 1);
    assert!(refused.errors.contains("\"d\""), "{}", refused.errors);
    source.wait_next_line("^HB ").unwrap();
    let twice = json!([{"node-name": "root", "alias": "x", "bitmaps": []},
        {"node-name": "root", "alias": "y", "bitmaps": []}]);
    let refusal = here.refused("migrate-set-parameters", json!({"block-bitmap-mapping": twice}));
    assert_eq!(refusal.unwrap().description, "The node name 'root' is mapped twice");

    let destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
    let mut there = destination.vmm.qmp().unwrap();
    set(&mut there, "arrived", "d");
    ferry::migrate_well(&source, &destination.address, &["--disks", "full"]).unwrap();
    let names: Vec<_> = bitmaps(&mut there, "root").as_array().unwrap().clone();
    assert_eq!((names.len(), &names[0]["name"]), (1, &json!("arrived")));
}
