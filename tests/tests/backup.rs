//! Backups of disks that a guest writes to: jobs over the control socket, and what the images hold afterwards.
//!
//! What a disk held at the moment of a backup is known by a copy of its image, made while the guest is stopped; the
//! backup begins before it runs again, and is made while it writes.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::Guest;
use ferry_tests::hanging::HangingImage;
use ferry_tests::hosts::{Hosts, started};
use ferry_tests::image::{SmallFileSystem, assert_same_as};
use ferry_tests::jobs::{Images, busy, full, job_event, refused, run};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qmp::Qmp;
use ferry_tests::{disk, needs};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;
const DISK: u64 = 16 * MIB;

fn backup(target: &Path, more: Value) -> Value {
    full(target, &more)
}

fn action(target: &Path, more: Value) -> Value {
    json!({"type": "drive-backup", "data": backup(target, more)})
}

/// The status changes and events of the job `id` up to `last`.
fn job_events(qmp: &mut Qmp, id: &str, last: &str) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let (name, event) = job_event(qmp, Some(id));
        if name == "COMPLETED" {
            assert_eq!(event["data"]["type"], "backup");
        }
        let is_last = name == last;
        seen.push(name);
        if is_last {
            return seen;
        }
    }
}

const GOOD: [&str; 7] =
    ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"];

fn let_write(vmm: &Vmm) {
    for _ in 0..3 {
        vmm.wait_next_line("^HB ").unwrap();
    }
}

/// Stops the guest, copies its image, calls `begin`, and resumes it.
fn at_a_known_moment(qmp: &mut Qmp, image: &Path, copy: &Path, begin: impl FnOnce(&mut Qmp)) {
    run(qmp, "stop", json!({}));
    std::fs::copy(image, copy).unwrap();
    begin(qmp);
    run(qmp, "cont", json!({}));
}

/// Ends the VMM, which keeps others from opening its images.
fn quit(vmm: &mut Vmm) {
    run(&mut vmm.qmp().unwrap(), "quit", json!({}));
    vmm.process.wait(SOON).unwrap();
}

fn create(path: &Path, backing: Option<(&Path, &str)>) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some((backing, format)) = backing {
        command.arg("-b").arg(backing).args(["-F", format]);
    }
    let size = if backing.is_some() { Vec::new() } else { vec![DISK.to_string()] };
    assert!(command.arg(path).args(size).status().unwrap().success());
}

fn bitmap(qmp: &mut Qmp) -> Value {
    let blocks = qmp.execute("query-block", json!({})).unwrap();
    blocks[0]["inserted"]["dirty-bitmaps"][0].clone()
}

fn add_bitmap(qmp: &mut Qmp) {
    run(qmp, "block-dirty-bitmap-add", json!({"node": "root", "name": "b"}));
}

#[test]
#[needs(kvm, qemu_img)]
fn a_full_backup_is_equal_to_the_disk_of_the_moment_at_which_it_began() {
    for format in ["raw", "qcow2"] {
        let images = Images::of(DISK);
        let image = images.blank("root");
        let mut vmm = started(&busy(&image));
        let mut qmp = vmm.qmp().unwrap();
        let (copy, known) = (images.at("copy"), images.at("known"));
        // Slow at first: the guest overwrites most of what is not saved yet.
        let slow = json!({"format": format, "speed": 4 * MIB, "job-id": "b1"});
        at_a_known_moment(&mut qmp, &image, &known, |qmp| {
            run(qmp, "drive-backup", backup(&copy, slow));
        });
        let_write(&vmm);
        let shown = qmp.execute("query-block-jobs", json!({})).unwrap();
        assert_eq!((&shown[0]["type"], &shown[0]["device"]), (&json!("backup"), &json!("b1")));
        run(&mut qmp, "block-job-set-speed", json!({"device": "b1", "speed": 0}));
        assert_eq!(job_events(&mut qmp, "b1", "null"), GOOD, "{format}");
        assert_same_as((&known, "raw"), (&copy, format));
        let check = vmm.check().unwrap();
        assert!(check.count > 0 && check.corrupt == 0, "{check:?}");
        assert_eq!(qmp.execute("query-jobs", json!({})).unwrap(), json!([]));
    }
}

#[test]
#[needs(kvm, qemu_img)]
fn a_chain_of_three_is_equal_to_the_disk_at_each_moment() {
    let images = Images::of(DISK);
    let image = images.blank("root");
    // It rewrites a part of the disk only.
    let guest = Guest::new("work=disk hb_ms=20 disk_mb=4", 64).disk("root", &image);
    let mut vmm = started(&guest);
    let mut qmp = vmm.qmp().unwrap();
    add_bitmap(&mut qmp);
    let mut below: Option<PathBuf> = None;
    let mut known = Vec::new();
    for turn in 0..3 {
        let (copy, moment) =
            (images.at(&format!("copy{turn}")), images.at(&format!("known{turn}")));
        create(&copy, below.as_deref().map(|below| (below, "qcow2")));
        let (sync, mode) =
            if turn == 0 { ("full", json!("on-success")) } else { ("incremental", json!(null)) };
        let mut more = json!({"sync": sync, "bitmap": "b", "mode": "existing", "format": "qcow2"});
        if !mode.is_null() {
            more["bitmap-mode"] = mode;
        }
        at_a_known_moment(&mut qmp, &image, &moment, |qmp| {
            run(qmp, "drive-backup", backup(&copy, more));
        });
        assert_eq!(job_events(&mut qmp, "root", "null"), GOOD);
        let_write(&vmm);
        (below, known) = (Some(copy.clone()), [known, vec![(copy, moment)]].concat());
    }
    for (copy, moment) in &known {
        assert_same_as((moment, "raw"), (copy, "qcow2"));
    }
    // An increment holds what the guest rewrites, not the disk.
    let bytes = |path: &Path| std::fs::metadata(path).unwrap().len();
    assert!(bytes(&known[2].0) < 6 * MIB, "{}", bytes(&known[2].0));
    assert_eq!(vmm.check().unwrap().corrupt, 0);
}

#[test]
#[needs(kvm, qemu_img)]
fn two_disks_and_their_bitmaps_are_saved_at_one_moment_or_not_at_all() {
    let images = Images::of(DISK);
    let (image, data) = (images.blank("root"), images.blank("data"));
    std::fs::write(&data, vec![7; 3 << 20]).unwrap();
    disk::create(&images.at("small"), MIB).unwrap();
    let mut vmm = started(&busy(&image).disk("data", &data));
    let mut qmp = vmm.qmp().unwrap();
    let add = json!({"type": "block-dirty-bitmap-add", "data": {"node": "root", "name": "b"}});
    let (one, other) = (images.at("one"), images.at("other"));
    let second = json!({"device": "data", "format": "qcow2", "job-id": "b2"});
    let small = json!({"device": "data", "job-id": "b2", "mode": "existing", "format": "raw"});
    let first = json!({"job-id": "b1", "format": "raw"});
    let all = |actions: Value| json!({"actions": actions});
    let bad = all(json!([add, action(&one, first.clone()), action(&images.at("small"), small)]));
    assert!(refused(&mut qmp, "transaction", bad).contains("different sizes"));
    assert_eq!(qmp.execute("query-jobs", json!({})).unwrap(), json!([]));
    assert_eq!(bitmap(&mut qmp), Value::Null);
    let grouped = json!({
        "actions": [action(&one, first.clone())], "properties": {"completion-mode": "grouped"},
    });
    assert!(refused(&mut qmp, "transaction", grouped).contains("completion-mode"));
    let known = images.at("known");
    at_a_known_moment(&mut qmp, &image, &known, |qmp| {
        run(qmp, "transaction", all(json!([add, action(&one, first), action(&other, second)])));
    });
    for id in ["b1", "b2"] {
        // Those of the other job come in between.
        let seen = job_events(&mut qmp, id, "null");
        assert!(GOOD.ends_with(&seen.iter().map(String::as_str).collect::<Vec<_>>()), "{seen:?}");
        if id == "b1" {
            assert_same_as((&known, "raw"), (&one, "raw"));
            break;
        }
    }
    while qmp.execute("query-jobs", json!({})).unwrap() != json!([]) {
        qmp.wait_event("JOB_STATUS_CHANGE", SOON).unwrap();
    }
    // The bitmap records from that moment on.
    let_write(&vmm);
    assert!(bitmap(&mut qmp)["count"].as_u64().unwrap() > 0);
    quit(&mut vmm);
    assert_same_as((&data, "raw"), (&other, "qcow2"));
}

#[test]
#[needs(kvm, qemu_img)]
fn only_what_an_image_holds_itself_is_saved_on_the_same_backing_file() {
    let images = Images::of(DISK);
    let (base, image) = (images.blank("base"), images.at("root"));
    std::fs::write(&base, vec![9; 12 << 20]).unwrap();
    std::fs::OpenOptions::new().write(true).open(&base).unwrap().set_len(DISK).unwrap();
    create(&image, Some((&base, "raw")));
    let mut guest = Guest::new("work=disk hb_ms=20 disk_mb=2", 64).disk("root", &image);
    guest.disks[0].push_str(",format=qcow2");
    let mut vmm = started(&guest);
    let mut qmp = vmm.qmp().unwrap();
    // Both at one moment, while the guest writes.
    let (top, full) = (images.at("top"), images.at("full"));
    let actions = json!([
        action(&top, json!({"sync": "top", "job-id": "b1"})),
        action(&full, json!({"format": "raw", "job-id": "b2"})),
    ]);
    run(&mut qmp, "transaction", json!({"actions": actions}));
    while qmp.execute("query-jobs", json!({})).unwrap() != json!([]) {
        qmp.wait_event("JOB_STATUS_CHANGE", SOON).unwrap();
    }
    let_write(&vmm);
    quit(&mut vmm);
    assert_same_as((&full, "raw"), (&top, "qcow2"));
    assert!(std::fs::metadata(&top).unwrap().len() < 4 * MIB);
}

#[test]
#[needs(kvm, qemu_img)]
fn what_the_guest_overwrites_is_saved_on_top_of_the_disk_itself_until_a_cancel() {
    let images = Images::of(DISK);
    let image = images.blank("root");
    let mut vmm = started(&busy(&image));
    let mut qmp = vmm.qmp().unwrap();
    let (copy, known) = (images.at("copy"), images.at("known"));
    at_a_known_moment(&mut qmp, &image, &known, |qmp| {
        run(qmp, "drive-backup", backup(&copy, json!({"sync": "none", "format": "qcow2"})));
    });
    let_write(&vmm);
    run(&mut qmp, "stop", json!({}));
    let shown = qmp.execute("query-block-jobs", json!({})).unwrap();
    assert!(shown[0]["offset"].as_u64().unwrap() > 0, "{shown}");
    run(&mut qmp, "block-job-cancel", json!({"device": "root"}));
    assert!(job_events(&mut qmp, "root", "null").contains(&"CANCELLED".to_owned()));
    quit(&mut vmm);
    assert!(std::fs::read(&known).unwrap() != std::fs::read(&image).unwrap());
    assert_same_as((&known, "raw"), (&copy, "qcow2"));
}

#[test]
#[needs(kvm, fuse)]
fn a_target_that_hangs_keeps_neither_the_guest_nor_the_end_of_the_job() {
    let hosts = Hosts::new();
    let images = Images::of(DISK);
    let image = images.blank("root");
    let target = HangingImage::for_test(&hosts, "copy", usize::try_from(DISK).unwrap());
    // It rewrites less than may wait in memory.
    let guest = Guest::new("work=disk hb_ms=20 disk_mb=4", 64).disk("root", &image);
    let mut vmm = started(&guest);
    let mut qmp = vmm.qmp().unwrap();
    let to = json!({"mode": "existing", "format": "raw", "sync": "none"});
    // It is open, and nothing has been written to it yet.
    run(&mut qmp, "stop", json!({}));
    run(&mut qmp, "drive-backup", backup(&target.path(), to));
    target.hang();
    run(&mut qmp, "cont", json!({}));
    let_write(&vmm);
    target.wait_until_asked();
    let_write(&vmm);
    run(&mut qmp, "block-job-cancel", json!({"device": "root"}));
    let seen = job_events(&mut qmp, "root", "null");
    assert!(seen.contains(&"CANCELLED".to_owned()), "{seen:?}");
    let_write(&vmm);
    assert_eq!(vmm.check().unwrap().corrupt, 0);
    target.go_on();
}

#[test]
#[needs(kvm)]
fn a_cancelled_backup_leaves_the_guest_and_the_bitmap_as_they_were() {
    let images = Images::of(DISK);
    let image = images.blank("root");
    let mut vmm = started(&busy(&image));
    let mut qmp = vmm.qmp().unwrap();
    add_bitmap(&mut qmp);
    let_write(&vmm);
    let slow = json!({
        "format": "raw", "speed": 1, "bitmap": "b", "bitmap-mode": "on-success", "job-id": "c",
    });
    run(&mut qmp, "drive-backup", backup(&images.at("copy"), slow.clone()));
    let held = bitmap(&mut qmp);
    assert_eq!((&held["busy"], &held["recording"]), (&json!(true), &json!(true)));
    let named = json!({"node": "root", "name": "b"});
    let refusal = refused(&mut qmp, "block-dirty-bitmap-clear", named.clone());
    assert!(refusal.contains("currently in use by another operation"), "{refusal}");
    let again = json!({"bitmap": "b", "sync": "incremental", "job-id": "d", "format": "raw"});
    let refusal = refused(&mut qmp, "drive-backup", backup(&images.at("other"), again));
    assert!(refusal.contains("currently in use by another operation"), "{refusal}");
    let migrate = json!({"uri": "unix:/nowhere"});
    let refusal = refused(&mut qmp, "migrate", migrate);
    assert!(refusal.contains("is being backed up by job 'c'"), "{refusal}");
    run(&mut qmp, "block-job-cancel", json!({"device": "c"}));
    let seen = job_events(&mut qmp, "c", "null");
    let end = ["created", "running", "aborting", "CANCELLED", "concluded", "null"];
    assert_eq!(seen, end);
    let after = bitmap(&mut qmp);
    assert_eq!(after["busy"], false);
    assert!(after["count"].as_u64() >= held["count"].as_u64(), "{held} {after}");
    run(&mut qmp, "block-dirty-bitmap-clear", named);
    assert_eq!(vmm.check().unwrap().corrupt, 0);
}

#[test]
#[needs(kvm, mounts)]
fn a_target_on_a_full_file_system_fails_or_stops_the_job_and_not_the_guest() {
    let images = Images::of(DISK);
    let image = images.blank("root");
    let small = images.at("small");
    std::fs::create_dir(&small).unwrap();
    let _mounted = SmallFileSystem::mount(&small, 4 * MIB).unwrap();
    let mut vmm = started(&busy(&image));
    let mut qmp = vmm.qmp().unwrap();
    let target = small.join("copy");
    run(&mut qmp, "drive-backup", backup(&target, json!({"format": "raw"})));
    let seen = job_events(&mut qmp, "root", "null");
    assert!(seen.contains(&"ERROR".to_owned()), "{seen:?}");
    assert!(seen.ends_with(&["aborting", "COMPLETED", "concluded", "null"].map(String::from)));
    let_write(&vmm);
    let stops = json!({"format": "raw", "on-target-error": "enospc", "job-id": "s"});
    run(&mut qmp, "drive-backup", backup(&target, stops));
    let seen = job_events(&mut qmp, "s", "paused");
    assert!(seen.contains(&"ERROR".to_owned()), "{seen:?}");
    let shown = qmp.execute("query-block-jobs", json!({})).unwrap();
    assert_eq!((&shown[0]["io-status"], &shown[0]["paused"]), (&json!("nospace"), &json!(true)));
    run(&mut qmp, "block-job-cancel", json!({"device": "s"}));
    job_events(&mut qmp, "s", "null");
    let check = vmm.check().unwrap();
    assert!(check.count > 0 && check.corrupt == 0, "{check:?}");
}

#[test]
#[needs(kvm)]
fn nodes_can_be_backed_up_to() {
    let images = Images::of(DISK);
    let (image, copy) = (images.blank("root"), images.blank("copy"));
    let vmm = started(&busy(&image));
    let mut qmp = vmm.qmp().unwrap();
    let file = json!({"driver": "file", "filename": copy});
    let node = json!({"driver": "raw", "node-name": "there", "file": file});
    run(&mut qmp, "blockdev-add", node);
    let to = |id: &str| json!({"device": "root", "target": "there", "sync": "full", "job-id": id, "speed": 1});
    run(&mut qmp, "blockdev-backup", to("a"));
    assert!(refused(&mut qmp, "blockdev-backup", to("b")).contains("is busy"));
    let twice = json!({"actions": [
        {"type": "blockdev-backup", "data": to("a")},
    ]});
    assert!(refused(&mut qmp, "transaction", twice).contains("already in use"));
    let delete = json!({"node-name": "there"});
    assert!(refused(&mut qmp, "blockdev-del", delete.clone()).contains("in use by block job a"));
    run(&mut qmp, "job-cancel", json!({"id": "a"}));
    job_events(&mut qmp, "a", "null");
    let mut fast = to("c");
    fast["speed"] = 0.into();
    run(&mut qmp, "blockdev-backup", fast);
    assert_eq!(job_events(&mut qmp, "c", "null"), GOOD);
    run(&mut qmp, "blockdev-del", delete);
    disk::verify(&copy).unwrap();
}

#[test]
#[needs(kvm)]
fn what_cannot_be_backed_up_is_refused_by_name() {
    let images = Images::of(DISK);
    let (image, locked) = (images.blank("root"), images.blank("locked"));
    let mut guest = busy(&image).disk("locked", &locked);
    guest.disks[1].push_str(",readonly=on");
    let vmm = started(&guest);
    let mut qmp = vmm.qmp().unwrap();
    let (hard, soft) = (images.at("hard"), images.at("soft"));
    std::fs::hard_link(&image, &hard).unwrap();
    std::os::unix::fs::symlink(&image, &soft).unwrap();
    disk::create(&images.at("small"), DISK - MIB).unwrap();
    for target in [&image, &hard, &soft] {
        let refusal = refused(&mut qmp, "drive-backup", backup(target, json!({})));
        assert!(refusal.contains("cannot be copied to itself"), "{refusal}");
    }
    let persistent = json!({"node": "locked", "name": "p", "persistent": true});
    let refusal = refused(&mut qmp, "block-dirty-bitmap-add", persistent);
    assert!(refusal.contains("read-only"), "{refusal}");
    let to = |more: Value| backup(&images.at("x"), more);
    for (arguments, expected) in [
        (backup(&images.at("small"), json!({"mode": "existing"})), "different sizes"),
        (backup(&images.at("nowhere"), json!({"mode": "existing"})), "cannot open disk image"),
        (to(json!({"granularity": 65_536})), "'granularity' is unexpected"),
        (to(json!({"compress": true})), "'compress' is not supported"),
        (to(json!({"speed": -1})), "speed"),
        (to(json!({"job-id": "1 2"})), "Invalid job ID"),
        (to(json!({"device": "nope"})), "Cannot find device='nope'"),
        (to(json!({"sync": "incremental"})), "must provide a valid bitmap name"),
        (to(json!({"sync": "incremental", "bitmap": "nope"})), "'nope' not found"),
        (to(json!({"sync": "incremental", "bitmap": "b", "bitmap-mode": "never"})), "on-success"),
        (to(json!({"sync": "full", "bitmap": "b"})), "Bitmap sync mode must be given"),
        (to(json!({"sync": "none", "format": "raw"})), "sync=none needs"),
    ] {
        let refusal = refused(&mut qmp, "drive-backup", arguments.clone());
        assert!(refusal.contains(expected), "{arguments}: {refusal}");
    }
    assert_eq!(qmp.execute("query-jobs", json!({})).unwrap(), json!([]));
    // A read-only disk can be saved all the same.
    run(&mut qmp, "drive-backup", to(json!({"device": "locked"})));
    assert_eq!(job_events(&mut qmp, "locked", "null"), GOOD);
    let_write(&vmm);
}
