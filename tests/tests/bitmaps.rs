//! Named dirty bitmaps, over the control socket of a guest that writes: what they have is compared with what
//! has changed in the image.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::bitmaps::{add, assert_has, bitmap, bitmaps, changed, expected, named, sha256};
use ferry_tests::ferry::{self, Guest};
use ferry_tests::hosts::{started, text};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qmp::{Qmp, run_python};
use ferry_tests::{disk, needs};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const SECTOR: u64 = disk::SECTOR_BYTES;
const MIB: u64 = 1 << 20;

/// A folder with disk images.
struct Images(tempfile::TempDir);

impl Images {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn blank(&self, id: &str, bytes: u64) -> PathBuf {
        let path = self.0.path().join(id);
        disk::create(&path, bytes).unwrap();
        path
    }
}

/// A guest that has written all of its disk `root` and goes on writing.
fn busy(image: &Path) -> Guest {
    Guest::new("work=disk hb_ms=20", 64).disk("root", image)
}

fn run(qmp: &mut Qmp, command: &str, arguments: Value) {
    assert_eq!(qmp.execute(command, arguments).unwrap(), json!({}), "{command}");
}

fn refused(qmp: &mut Qmp, command: &str, arguments: Value) -> String {
    let refusal = qmp.refused(command, arguments).unwrap();
    assert_eq!(refusal.class, "GenericError", "{refusal}");
    refusal.description
}

/// Lets the guest write for a while, and stops it.
fn let_write(vmm: &Vmm, qmp: &mut Qmp) {
    run(qmp, "cont", json!({}));
    for _ in 0..3 {
        vmm.wait_next_line("^HB ").unwrap();
    }
    run(qmp, "stop", json!({}));
}

#[test]
#[needs(kvm)]
fn bitmaps_have_exactly_what_the_guest_has_written() {
    let images = Images::new();
    // Its last granule is short.
    let bytes = 32 * MIB + 512;
    let image = images.blank("root", bytes);
    let vmm = started(&busy(&image));
    let mut qmp = vmm.qmp().unwrap();
    run(&mut qmp, "stop", json!({}));
    let before = std::fs::read(&image).unwrap();
    add(&mut qmp, "fine", 512, false);
    add(&mut qmp, "middle", 4096, true);
    run(&mut qmp, "block-dirty-bitmap-add", named("default"));
    assert_eq!(
        bitmap(&mut qmp, "default"),
        json!({
            "name": "default", "count": 0, "granularity": 65_536,
            "recording": true, "busy": false, "persistent": false,
        })
    );
    assert_eq!(bitmap(&mut qmp, "middle")["recording"], false);
    let_write(&vmm, &mut qmp);
    let first = changed(&image, &before);
    assert!(!first.is_empty(), "the guest has written nothing");
    let none = BTreeSet::new();
    for (name, sectors) in [("fine", &first), ("default", &first), ("middle", &none)] {
        assert_has(&mut qmp, name, sectors, bytes);
    }

    // At one moment one stops and its successor starts: no write is in both, or in neither.
    let between = std::fs::read(&image).unwrap();
    let action = |verb: &str, data: Value| json!({"type": format!("block-dirty-bitmap-{verb}"), "data": data});
    let actions = json!([action("disable", named("fine")), action("enable", named("middle"))]);
    run(&mut qmp, "transaction", json!({"actions": actions}));
    let_write(&vmm, &mut qmp);
    let (second, all) = (changed(&image, &between), changed(&image, &before));
    for (name, sectors) in [("fine", &first), ("middle", &second), ("default", &all)] {
        assert_has(&mut qmp, name, sectors, bytes);
    }

    let merge = json!({"node": "root", "target": "middle", "bitmaps": ["fine"]});
    run(&mut qmp, "block-dirty-bitmap-merge", merge);
    // Every sector that is written again differs from what it was at first.
    assert_has(&mut qmp, "middle", &all, bytes);
    assert_has(&mut qmp, "fine", &first, bytes);
    run(&mut qmp, "block-dirty-bitmap-clear", named("fine"));
    assert_has(&mut qmp, "fine", &none, bytes);
    run(&mut qmp, "block-dirty-bitmap-enable", named("fine"));
    assert_eq!(bitmap(&mut qmp, "fine")["recording"], true);
    for name in ["fine", "middle", "default"] {
        run(&mut qmp, "block-dirty-bitmap-remove", named(name));
    }
    assert_eq!(bitmaps(&mut qmp, "root"), Value::Null);
}

#[test]
#[needs(kvm)]
fn a_transaction_is_done_on_all_disks_or_on_none() {
    let images = Images::new();
    let guest = busy(&images.blank("root", MIB)).disk("data", &images.blank("data", MIB));
    let guest = guest.disk("small", &images.blank("small", 512));
    let vmm = started(&guest);
    let mut qmp = vmm.qmp().unwrap();
    add(&mut qmp, "b", 512, false);
    let_write(&vmm, &mut qmp);
    let action = |verb: &str, node: &str, name: &str| {
        let data = json!({"node": node, "name": name});
        json!({"type": format!("block-dirty-bitmap-{verb}"), "data": data})
    };
    let merge = |node: &str, target: &str, bitmaps: Value| {
        let data = json!({"node": node, "target": target, "bitmaps": bitmaps});
        json!({"type": "block-dirty-bitmap-merge", "data": data})
    };
    let from_root = json!([{"node": "root", "name": "b"}]);
    let shown = |qmp: &mut Qmp| ["root", "data", "small"].map(|id| bitmaps(qmp, id));
    let before = (shown(&mut qmp), sha256(&mut qmp, "b"));
    assert!(before.0[0][0]["count"].as_u64() > Some(0), "{before:?}");
    for (last, refusal) in [
        (action("remove", "root", "nope"), "Dirty bitmap 'nope' not found"),
        (action("add", "data", "b"), "Bitmap already exists: b"),
        (action("clear", "nope", "b"), "Node 'nope' not found"),
        (action("add", "nope", "b"), "Cannot find device='nope' nor node-name='nope'"),
        (merge("data", "b", json!(["nope"])), "Dirty bitmap 'nope' not found"),
        (merge("data", "b", json!([{"node": "nope", "name": "b"}])), "Node 'nope' not found"),
        (
            merge("small", "s", from_root.clone()),
            "Bitmaps are of different sizes (destination size is 512, source size is 1048576) and \
             can't be merged",
        ),
    ] {
        let actions = json!([
            action("add", "data", "b"),
            merge("data", "b", from_root.clone()),
            action("add", "small", "s"),
            action("clear", "root", "b"),
            action("disable", "root", "b"),
            last,
        ]);
        let arguments = json!({"actions": actions});
        assert_eq!(refused(&mut qmp, "transaction", arguments), refusal, "{actions}");
        assert_eq!((shown(&mut qmp), sha256(&mut qmp, "b")), before, "{actions}");
    }
    let actions = json!([
        action("add", "data", "b"),
        merge("data", "b", from_root),
        action("clear", "root", "b"),
        action("add", "root", "c"),
        action("remove", "root", "c"),
    ]);
    let properties = json!({"completion-mode": "individual"});
    run(&mut qmp, "transaction", json!({"actions": actions, "properties": properties}));
    let [root, data, small] = shown(&mut qmp);
    assert_eq!((root[0]["count"].as_u64(), root.as_array().unwrap().len()), (Some(0), 1));
    assert!(data[0]["count"].as_u64() > Some(0), "{data}");
    assert_eq!(small, Value::Null);
    run(&mut qmp, "transaction", json!({"actions": []}));
}

#[test]
#[needs(kvm)]
fn what_cannot_be_done_is_refused_and_changes_nothing() {
    let images = Images::new();
    let vmm = started(&busy(&images.blank("root", MIB)));
    let mut qmp = vmm.qmp().unwrap();
    add(&mut qmp, "b", 512, true);
    let before = bitmaps(&mut qmp, "root");
    let long = "n".repeat(256);
    let with = |name: &str, member: &str, value: Value| {
        let mut arguments = named(name);
        arguments[member] = value;
        arguments
    };
    let elsewhere = |name: &str| with(name, "node", "nope".into());
    let power = "Granularity must be power of 2 and at least 512";
    let (at_most, empty) = ("Granularity must be at most 67108864", "Bitmap name cannot be empty");
    for (verb, arguments, refusal) in [
        ("add", named(""), empty),
        ("add", named(&long), "Bitmap name too long: 256 bytes, at most 255"),
        ("add", named("a\u{7}"), "Bitmap name \"a\\u{7}\" has a control character"),
        ("add", named("b"), "Bitmap already exists: b"),
        ("add", with("c", "granularity", 0.into()), power),
        ("add", with("c", "granularity", 256.into()), power),
        ("add", with("c", "granularity", 1000.into()), power),
        ("add", with("c", "granularity", u64::MAX.into()), power),
        ("add", with("c", "granularity", (128 * MIB).into()), at_most),
        (
            "add",
            with("c", "granularity", (-512).into()),
            "Invalid parameter type for 'granularity', expected: integer",
        ),
        ("add", elsewhere("c"), "Cannot find device='nope' nor node-name='nope'"),
        ("add", json!({"node": "root"}), "Parameter 'name' is missing"),
        ("remove", named("nope"), "Dirty bitmap 'nope' not found"),
        ("remove", elsewhere("b"), "Node 'nope' not found"),
        ("clear", named(""), empty),
        ("clear", named("nope"), "Dirty bitmap 'nope' not found"),
        ("enable", named("nope"), "Dirty bitmap 'nope' not found"),
        ("disable", named("nope"), "Dirty bitmap 'nope' not found"),
        (
            "merge",
            json!({"node": "root", "target": "nope", "bitmaps": ["b"]}),
            "Dirty bitmap 'nope' not found",
        ),
        (
            "merge",
            json!({"node": "root", "target": "b", "bitmaps": ["b", 1]}),
            "Invalid parameter type for 'bitmaps', expected: BlockDirtyBitmapOrStr",
        ),
    ] {
        let command = format!("block-dirty-bitmap-{verb}");
        assert_eq!(refused(&mut qmp, &command, arguments.clone()), refusal, "{verb} {arguments}");
    }
    let digest = "x-debug-block-dirty-bitmap-sha256";
    assert_eq!(refused(&mut qmp, digest, named("nope")), "Dirty bitmap 'nope' not found");
    assert_eq!(refused(&mut qmp, digest, elsewhere("b")), "Node 'nope' not found");
    let unknown = json!({"actions": [{"type": "abort", "data": {}}]});
    let text = refused(&mut qmp, "transaction", unknown);
    assert!(text.starts_with("Parameter 'type' does not accept value 'abort'"), "{text}");
    assert_eq!(bitmaps(&mut qmp, "root"), before);
}

#[test]
#[needs(kvm)]
fn a_reset_keeps_the_bitmaps_and_writes_before_and_after_it_are_in_them() {
    let images = Images::new();
    let bytes = 8 * MIB;
    let image = images.blank("root", bytes);
    let mut guest = busy(&image);
    guest.cmdline.push_str(" disk_mb=4");
    let vmm = started(&guest);
    let mut qmp = vmm.qmp().unwrap();
    run(&mut qmp, "stop", json!({}));
    let before = std::fs::read(&image).unwrap();
    add(&mut qmp, "on", 512, false);
    let_write(&vmm, &mut qmp);
    // Not what the first guest has written.
    add(&mut qmp, "late", 4096, false);
    let first = changed(&image, &before);
    assert!(!first.is_empty(), "the guest has written nothing");
    assert_has(&mut qmp, "on", &first, bytes);
    // A guest that is paused is reset paused: nothing is written yet.
    run(&mut qmp, "system_reset", json!({}));
    qmp.wait_event("RESET", SOON).unwrap();
    assert_has(&mut qmp, "on", &first, bytes);
    assert_has(&mut qmp, "late", &BTreeSet::new(), bytes);
    assert_eq!(bitmap(&mut qmp, "on")["recording"], true);
    // It boots again and writes its part of the disk first of all.
    let from = vmm.serial().count();
    run(&mut qmp, "cont", json!({}));
    vmm.serial().wait_from(from, "^HB n=2 ", SOON).unwrap();
    run(&mut qmp, "stop", json!({}));
    let all: BTreeSet<u64> = (0..4 * MIB / SECTOR).collect();
    assert_has(&mut qmp, "on", &all, bytes);
    assert_has(&mut qmp, "late", &all, bytes);
    // Another one, while it runs and writes.
    run(&mut qmp, "block-dirty-bitmap-clear", named("late"));
    run(&mut qmp, "block-dirty-bitmap-disable", named("on"));
    run(&mut qmp, "cont", json!({}));
    let from = vmm.serial().count();
    run(&mut qmp, "system_reset", json!({}));
    vmm.serial().wait_from(from, "^HB n=2 ", SOON).unwrap();
    run(&mut qmp, "stop", json!({}));
    assert_has(&mut qmp, "late", &all, bytes);
}

#[test]
#[needs(kvm)]
fn a_large_bitmap_holds_nobody_up() {
    const AT_ONCE: Duration = Duration::from_millis(500);
    let images = Images::new();
    let image = images.blank("root", 1 << 40);
    let vmm = ferry::run(&Guest::new("work=idle", 64).disk("root", &image)).unwrap();
    let mut qmp = vmm.qmp().unwrap();
    let mut other = vmm.qmp().unwrap();
    // The machine may not be built yet: this waits for its disks.
    add(&mut qmp, "early", 1 << 20, false);
    // 256 MiB of bits, which take no memory yet.
    let began = Instant::now();
    add(&mut qmp, "large", 512, false);
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
    qmp.ask("x-debug-block-dirty-bitmap-sha256", named("large")).unwrap();
    // Meanwhile others are answered.
    for command in ["query-status", "query-block", "query-named-block-nodes"] {
        let began = Instant::now();
        other.execute(command, json!({})).unwrap();
        assert!(began.elapsed() < AT_ONCE, "{command}: {:?}", began.elapsed());
    }
    let began = Instant::now();
    add(&mut other, "more", 1024, false);
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
    let digest = qmp.answer().unwrap();
    assert_eq!(digest["sha256"].as_str().unwrap().len(), 64);
    let too_large = json!({"node": "root", "name": "c", "granularity": 512});
    for name in ["a", "b"] {
        add(&mut qmp, name, 512, true);
    }
    // The disk has 1 GiB for all of them.
    let text = refused(&mut qmp, "block-dirty-bitmap-add", too_large);
    assert!(text.contains("use a larger granularity"), "{text}");
    for name in ["early", "large", "more", "a", "b"] {
        run(&mut qmp, "block-dirty-bitmap-remove", named(name));
    }
}

#[test]
#[needs(kvm)]
fn a_person_adds_merges_and_lists_bitmaps() {
    let images = Images::new();
    let vmm = started(&busy(&images.blank("root", MIB)));
    let socket = text(vmm.socket()).to_owned();
    let bitmap = |words: &str| {
        let words = ["ctl", &socket, "bitmap"].into_iter().chain(words.split(' '));
        ferry::end_of(words).unwrap()
    };
    assert_eq!(bitmap("list").1.lines().count(), 1);
    assert_eq!(bitmap("add root b0 --granularity 4K").0, 0);
    assert_eq!(bitmap("add root b1 --granularity 1M --disabled").0, 0);
    vmm.wait_next_line("^HB ").unwrap();
    vmm.wait_next_line("^HB ").unwrap();
    assert_eq!(bitmap("merge root b1 b0").0, 0);
    assert_eq!(bitmap("disable root b0").0, 0);
    let (code, list) = bitmap("list");
    assert_eq!(code, 0, "{list}");
    let lines: Vec<Vec<&str>> =
        list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!((lines[1][..3].to_vec(), lines[1][4]), (vec!["root", "b0", "4K"], "disabled"));
    assert_eq!(lines[2], ["root", "b1", "1M", "1048576", "disabled"], "{list}");
    let (code, digest) = bitmap("sha256 root b1");
    let whole: BTreeSet<u64> = (0..MIB / SECTOR).collect();
    assert_eq!((code, digest.trim()), (0, expected(&whole, MIB, MIB).1.as_str()));
    assert_eq!(bitmap("clear root b0").0, 0);
    assert_eq!(bitmap("enable root b0").0, 0);
    for name in ["b0", "b1"] {
        assert_eq!(bitmap(&format!("remove root {name}")).0, 0);
    }
    let (code, text) = bitmap("remove root b0");
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("Dirty bitmap 'b0' not found"), "{text}");
    let (code, text) = bitmap("add root");
    assert_eq!(code, 2, "{text}");
    let (code, text) = bitmap("--help");
    assert!(code == 0 && text.contains("merge") && text.contains("sha256"), "{code} {text}");
}

#[test]
#[needs(kvm, qemu_qmp)]
fn the_python_client_qemu_qmp_adds_merges_moves_and_reads_bitmaps() {
    let images = Images::new();
    let vmm = started(&busy(&images.blank("root", 32 * MIB)));
    let give = format!("root={}", images.0.path().join("copy").display());
    let destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
    let sockets = [text(vmm.socket()), text(destination.vmm.socket())];
    let arguments = [sockets[0], sockets[1], &destination.address];
    run_python("bitmaps_client.py", &arguments).unwrap();
}
