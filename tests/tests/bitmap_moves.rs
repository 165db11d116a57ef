//! Dirty bitmaps that move with their guest: bit for bit, under the names and with the flags that a mapping gives.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use devices::block::bitmaps::BitmapInfo;
use ferry_tests::bitmaps::{
    add, add_persistent, assert_has, bitmap, bitmap_now, bitmaps, bitmaps_now, expected, named,
    with_bitmaps,
};
use ferry_tests::ferry::{self, Guest};
use ferry_tests::hosts::{assert_failed, assert_goes_on, moving, started};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qmp::Qmp;
use ferry_tests::steps::{STEPPING, touched};
use ferry_tests::{disk, frames, needs, steps};
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

/// The destination has locked the shared disk and read its bitmaps when the source runs the guest again.
#[test]
#[needs(kvm)]
fn a_stop_that_is_called_off_costs_no_bitmap() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = 32 * MIB;
    let image = blank(folder.path(), "0", bytes);
    let mut vmm = stepper(&image);
    let mut qmp = vmm.qmp().unwrap();
    add(&mut qmp, "plain", 512, false);
    add_persistent(&mut qmp, "kept", 4096);
    // Does not travel: the destination finds it beside the image.
    add_persistent(&mut qmp, "stays", 4096);
    let travels = ["plain", "kept"].map(|name| json!({"name": name, "alias": name}));
    let mapping = json!([{"node-name": "root", "alias": "root", "bitmaps": travels}]);
    run(&mut qmp, "migrate-set-parameters", json!({"block-bitmap-mapping": mapping}));
    steps::go(&mut vmm).unwrap();
    steps::wait_for(&vmm, 20).unwrap();
    let give = format!("root={}", image.display());
    let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
    let (back, ready) = frames::holding(|kind| kind == frames::kind::READY);
    let proxy = frames::between(&destination.address, frames::unchanged, back).unwrap();
    let migration = moving(&vmm, &proxy, &["--disks", "none"]);
    ready.wait().unwrap();
    // The guest runs on at the source, and writes.
    let taken = steps::last_told(&vmm).unwrap();
    steps::wait_for(&vmm, taken + 50).unwrap();
    drop(ready);
    let ended = migration.end(SOON * 2).unwrap();
    assert_eq!(ended.code, 0, "{}", ended.errors);
    vmm.process.wait(SOON).unwrap();
    let called_off = ended.summary["x-called-off-switches"].as_u64().unwrap();
    assert!(called_off > 0, "{}", ended.summary);
    let at_end = steps::last_told(&vmm).unwrap();
    steps::wait_for(&destination.vmm, at_end + 20).unwrap();
    let after = steps::hold(&mut destination.vmm).unwrap();
    let mut qmp = destination.vmm.qmp().unwrap();
    for name in ["plain", "kept", "stays"] {
        assert_eq!(bitmap(&mut qmp, name)["inconsistent"], Value::Null);
        assert_has(&mut qmp, name, &touched(0..after, bytes), bytes);
    }
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

/// `name` of disk `root` moves as itself, and is persistent at the other end or not.
fn transformed(name: &str, persistent: bool) -> Value {
    json!({"name": name, "alias": name, "transform": {"persistent": persistent}})
}

fn map(qmp: &mut Qmp, bitmaps: Value) {
    let mapping = json!([{"node-name": "root", "alias": "root", "bitmaps": bitmaps}]);
    run(qmp, "migrate-set-parameters", json!({"block-bitmap-mapping": mapping}));
}

#[test]
#[needs(kvm)]
fn a_mapping_makes_bitmaps_persistent_or_not_at_either_end() {
    let folder = tempfile::tempdir().unwrap();
    let images = ["0", "1", "2"].map(|name| folder.path().join(name));
    let mut vmm = stepper(&blank(folder.path(), "0", DISK_BYTES));
    let mut qmp = vmm.qmp().unwrap();
    add(&mut qmp, "becomes", 512, false);
    add_persistent(&mut qmp, "ceases", 512);
    add_persistent(&mut qmp, "stays", 512);
    map(
        &mut qmp,
        json!([
            transformed("becomes", true),
            transformed("ceases", false),
            {"name": "stays", "alias": "stays"},
        ]),
    );
    let persistent = |qmp: &mut Qmp| {
        ["becomes", "ceases", "stays"].map(|name| bitmap(qmp, name)["persistent"] == true)
    };
    assert_eq!(persistent(&mut qmp), [false, true, true]);
    steps::go(&mut vmm).unwrap();
    steps::wait_for(&vmm, 20).unwrap();
    let mut image = images[0].clone();
    hop(&mut vmm, &mut image, &images[1], "1");
    assert_eq!(kept(&images[0]), []);
    steps::hold(&mut vmm).unwrap();
    assert_eq!(persistent(&mut vmm.qmp().unwrap()), [true, false, true]);
    steps::go(&mut vmm).unwrap();

    // What arrives is for the destination to say, too.
    let give = format!("root={}", images[2].display());
    let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
    let mut qmp = destination.vmm.qmp().unwrap();
    let both = json!([
        {"name": "becomes", "alias": "becomes"},
        transformed("ceases", true),
        transformed("stays", false),
    ]);
    map(&mut qmp, both);
    ferry::migrate_well(&vmm, &destination.address, &["--disks", "full"]).unwrap();
    vmm.process.wait(SOON).unwrap();
    assert_eq!(kept(&images[1]), []);
    let told = steps::last_told(&vmm).unwrap();
    steps::wait_for(&destination.vmm, told + 20).unwrap();
    let all = touched(0..steps::hold(&mut destination.vmm).unwrap(), DISK_BYTES);
    assert_eq!(persistent(&mut qmp), [true, true, false]);
    for name in ["becomes", "ceases", "stays"] {
        assert_has(&mut qmp, name, &all, DISK_BYTES);
    }
    run(&mut qmp, "quit", json!({}));
    destination.vmm.process.wait(SOON).unwrap();
    let (count, digest) = expected(&all, 512, DISK_BYTES);
    let mut kept = kept(&images[2]);
    kept.sort_by(|a, b| a.name.as_str().cmp(b.name.as_str()));
    let names: Vec<_> = kept.iter().map(|info| info.name.as_str()).collect();
    assert_eq!(names, ["becomes", "ceases"]);
    for info in &kept {
        assert!(info.count_bytes == count && !info.inconsistent, "{info:?}");
        let stored = with_bitmaps(&images[2], |node| node.bitmaps().sha256(&info.name));
        assert_eq!(stored.unwrap(), digest);
    }
}

#[test]
#[needs(kvm)]
fn an_inconsistent_bitmap_is_refused_by_name_and_can_stay_behind_or_be_removed() {
    let folder = tempfile::tempdir().unwrap();
    let image = blank(folder.path(), "0", DISK_BYTES);
    let mut crashed = started(&writer(&image));
    let mut qmp = crashed.qmp().unwrap();
    add_persistent(&mut qmp, "lost", 512);
    run(&mut qmp, "x-block-dirty-bitmap-store", json!({"node": "root"}));
    crashed.process.kill().unwrap();
    let mut source = started(&writer(&image));
    let mut qmp = source.qmp().unwrap();
    assert_eq!(bitmap_now(&mut qmp, "lost")["inconsistent"], true);
    add(&mut qmp, "good", 512, false);
    let target = folder.path().join("1");
    let give = format!("root={}", target.display());
    let receive = || ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
    let refused = ferry::migrate(&source, &receive().address, &["--disks", "full"]).unwrap();
    assert_failed(&refused, "Bitmap 'lost' is inconsistent");
    assert_goes_on(&mut source);
    assert_eq!(bitmap_now(&mut qmp, "lost")["inconsistent"], true);
    assert_eq!(bitmap_now(&mut qmp, "good")["busy"], false, "the refusal left it to others");
    let names = |vmm: &Vmm| -> Vec<Value> {
        let all = bitmaps_now(&mut vmm.qmp().unwrap());
        all.iter().map(|bitmap| bitmap["name"].clone()).collect()
    };

    // One that is not mapped stays behind, whatever it is.
    map(&mut qmp, json!([{"name": "good", "alias": "good"}]));
    let destination = receive();
    ferry::migrate_well(&source, &destination.address, &["--disks", "full"]).unwrap();
    source.process.wait(SOON).unwrap();
    assert_eq!(names(&destination.vmm), ["good"]);
    drop(destination);
    let left = kept(&image);
    assert!(left.len() == 1 && left[0].inconsistent, "{left:?}");

    // Without it the others move as ever.
    std::fs::remove_file(&target).unwrap();
    let source = started(&writer(&image));
    let mut qmp = source.qmp().unwrap();
    add(&mut qmp, "good", 512, false);
    run(&mut qmp, "block-dirty-bitmap-remove", named("lost"));
    let destination = receive();
    ferry::migrate_well(&source, &destination.address, &["--disks", "full"]).unwrap();
    assert_eq!(names(&destination.vmm), ["good"]);
}
