//! What goes wrong while disks travel: the guest runs on at the source, whole, and the destination is left
//! with nothing, or with a file whose name says that it is half an image.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::hosts::{Hosts, assert_failed, assert_goes_on, moving, started, text};
use ferry_tests::image::{LoopDevice, Pattern, SmallFileSystem, assert_same, fill, overlay};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qmp::Qmp;
use ferry_tests::{disk, needs, proxy};
use serde_json::{Value, json};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

#[test]
#[needs(kvm)]
fn what_cannot_work_is_refused_by_name_before_anything_travels_and_leaves_nothing() {
    let hosts = Hosts::new();
    let mut source = hosts.busy();
    let (folder, taken) = (hosts.at("b", ""), hosts.at("b", "taken"));
    std::fs::write(&taken, [7; 4096]).unwrap();
    let give = |path: &Path| vec!["--disk".to_owned(), format!("root={}", text(path))];
    let own = [give(&hosts.at("a", "root")), vec!["--overwrite".to_owned()]].concat();
    let directory = |path: &str| vec!["--disk-dir".to_owned(), path.to_owned()];
    for (receive, migrate, expected) in [
        (directory(text(&folder)), "nonesuch=full", "no disk \"nonesuch\", it has: root"),
        (vec![], "full", "--disk root=PATH"),
        (directory("/nonexistent/folder"), "full", "/nonexistent/folder/root.img"),
        (directory("/proc"), "full", "/proc/root.img"),
        (give(&taken), "full", "give --overwrite"),
        (give(&folder), "full", "neither a file nor a block device"),
        (own, "full", "in use by another"),
    ] {
        let receive: Vec<_> = receive.iter().map(String::as_str).collect();
        let destination = ferry::receive_at("tcp:127.0.0.1:0", &receive).unwrap();
        let ended = ferry::migrate(&source, &destination.address, &["--disks", migrate]).unwrap();
        assert_failed(&ended, expected);
        if migrate == "full" {
            // Refused as soon as the other side had heard of the machine: no disk was even counted.
            assert_eq!(ended.summary["ram"]["transferred"], 0, "{expected}: {}", ended.summary);
            assert!(ended.summary.get("disk").is_none(), "{expected}: {}", ended.summary);
        } else {
            assert!(ended.summary.is_null(), "{expected}: {}", ended.summary);
        }
        assert_eq!(hosts.files("b"), ["taken"], "{expected}");
    }
    assert_eq!(std::fs::read(&taken).unwrap(), [7; 4096]);
    assert_goes_on(&mut source);
}

#[test]
#[needs(kvm, mounts)]
fn a_disk_that_fills_up_fails_the_migration_and_the_guest_runs_on() {
    let hosts = Hosts::new();
    let small = SmallFileSystem::mount(&hosts.at("b", ""), 16 << 20).unwrap();
    let mut source = hosts.busy();
    // Known before anything travels…
    let destination = hosts.receive();
    let ended = ferry::migrate(&source, &destination.address, &["--disks", "full"]).unwrap();
    assert_failed(&ended, "bytes free, the guest's disks need");
    assert_eq!(hosts.files("b"), [""; 0]);
    assert_goes_on(&mut source);
    drop((source, small));
    // …or only when somebody else takes the space meanwhile.
    let small = SmallFileSystem::mount(&hosts.at("b", ""), 64 << 20).unwrap();
    let mut source = hosts.busy();
    let destination = hosts.receive();
    let slow = ["--disks", "full", "--max-bandwidth", "8M"];
    let migration = moving(&source, &destination.address, &slow);
    fill(&hosts.at("b", "greedy"), 0, 56 << 20, Pattern::Random).unwrap();
    let ended = migration.end(SOON).unwrap();
    assert_failed(&ended, "disk root: writing ");
    assert!(ended.errors.contains("os error 28"), "{}", ended.errors);
    assert_goes_on(&mut source);
    assert_eq!(hosts.files("b"), ["greedy"]);
    drop(small);
}

#[test]
#[needs(kvm)]
fn a_disk_that_shrinks_or_is_replaced_while_it_moves() {
    let hosts = Hosts::new();
    let path = hosts.random("data", 64 << 20);
    let guest = Guest::new("work=idle", 64).disk("data", &path);
    let source = started(&guest);
    let slow = ["--disks", "full", "--max-bandwidth", "20M"];
    // Truncated: what is gone cannot be read.
    let mut destination = hosts.receive();
    let migration = moving(&source, &destination.address, &slow);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(32 << 20).unwrap();
    assert_failed(&migration.end(SOON).unwrap(), "disk data: reading ");
    assert_ne!(destination.vmm.process.exit_code(SOON).unwrap(), 0);
    assert_eq!(hosts.files("b"), [""; 0]);
    assert_eq!(source.qmp().unwrap().run_state().unwrap(), "running");
    // Grown, then replaced by another file of its name: the guest's disk is still the one it opened.
    file.set_len(64 << 20).unwrap();
    fill(&path, 32 << 20, 32 << 20, Pattern::Random).unwrap();
    let mut destination = hosts.receive();
    let migration = moving(&source, &destination.address, &slow);
    file.set_len(65 << 20).unwrap();
    let old = hosts.at("a", "old");
    std::fs::rename(&path, &old).unwrap();
    disk::create(&path, 64 << 20).unwrap();
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 0, "{}", ended.errors);
    file.set_len(64 << 20).unwrap();
    assert_same(&old, &hosts.at("b", "data.img"));
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn a_cancel_while_disks_travel_leaves_nothing_and_a_retry_moves_them() {
    let hosts = Hosts::new();
    let mut source = hosts.busy();
    let destination = hosts.receive();
    let slow = ["--disks", "full", "--max-bandwidth", "8M"];
    let mut migration = moving(&source, &destination.address, &slow);
    assert_eq!(hosts.files("b"), ["root.img.partial"]);
    migration.client.signal(libc::SIGINT).unwrap();
    let ended = migration.end(SOON).unwrap();
    assert_eq!((ended.code, ended.summary["status"].as_str()), (1, Some("cancelled")));
    assert_goes_on(&mut source);
    let mut vmm = destination.vmm;
    assert_ne!(vmm.process.exit_code(SOON).unwrap(), 0);
    assert_eq!(hosts.files("b"), [""; 0]);
    let mut destination = hosts.receive();
    let fast = ["--disks", "full", "--max-bandwidth", "0"];
    ferry::migrate_well(&source, &destination.address, &fast).unwrap();
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn either_side_may_be_killed_in_the_middle() {
    let hosts = Hosts::new();
    let mut source = hosts.busy();
    let slow = ["--disks", "full", "--max-bandwidth", "8M"];
    let mut destination = hosts.receive();
    let migration = moving(&source, &destination.address, &slow);
    destination.vmm.process.kill().unwrap();
    assert_failed(&migration.end(SOON).unwrap(), "connection lost");
    assert_goes_on(&mut source);
    // Its name says what it is, and the next attempt takes it over.
    assert_eq!(hosts.files("b"), ["root.img.partial"]);
    let destination = hosts.receive();
    let migration = moving(&source, &destination.address, &slow);
    source.process.kill().unwrap();
    let mut vmm = destination.vmm;
    assert_ne!(vmm.process.exit_code(SOON).unwrap(), 0);
    assert_eq!(hosts.files("b"), [""; 0]);
    assert_eq!(vmm.serial().text(), "", "no guest ran there");
    drop(migration);
    // The image at the source is whole: what is in each sector is its own.
    disk::verify(&hosts.at("a", "root")).unwrap();
}

#[test]
#[needs(kvm, mounts)]
fn a_guest_whose_disk_is_full_is_stopped_told_of_and_goes_on_when_there_is_room() {
    let hosts = Hosts::new();
    let small = SmallFileSystem::mount(&hosts.at("a", ""), 16 << 20).unwrap();
    let (path, filler) = (hosts.at("a", "root"), hosts.at("a", "filler"));
    fill(&filler, 0, 12 << 20, Pattern::Random).unwrap();
    disk::create(&path, 8 << 20).unwrap();
    let mut guest = Guest::new("work=disk", 64).disk("root", &path);
    guest.disks[0].push_str(",werror=enospc");
    let mut vmm = ferry::run(&guest).unwrap();
    let mut qmp = vmm.qmp().unwrap();
    let stopped = |event: &serde_json::Value| event["event"] == "STOP";
    let told = |event: &serde_json::Value| {
        event["event"] == "BLOCK_IO_ERROR"
            && (event["data"]["action"].as_str(), event["data"]["nospace"].as_bool())
                == (Some("stop"), Some(true))
    };
    qmp.wait_event_where(SOON, told).unwrap();
    qmp.wait_event_where(SOON, stopped).unwrap();
    vmm.process.err.wait_for("disk root: No space left", SOON).unwrap();
    assert_eq!(qmp.run_state().unwrap(), "io-error");
    let blocks = qmp.execute("query-block", json!({})).unwrap();
    assert_eq!(blocks[0]["io-status"], "failed", "{blocks}");
    // It cannot move like that, and going on is for nothing.
    let refusal = qmp.refused("migrate", json!({"uri": "tcp:127.0.0.1:9"})).unwrap();
    assert!(refusal.description.contains("io-error"), "{refusal}");
    qmp.execute("cont", json!({})).unwrap();
    qmp.wait_event_where(SOON, told).unwrap();
    qmp.wait_event_where(SOON, stopped).unwrap();
    std::fs::remove_file(&filler).unwrap();
    qmp.execute("cont", json!({})).unwrap();
    vmm.wait_line("^HB n=2 ").unwrap();
    assert_eq!(vmm.check().unwrap().corrupt, 0);
    drop(vmm);
    drop(small);
}

/// When the link is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// While everything is sent for the first time.
    Bulk,
    /// While what has become dirty is sent again.
    Dirty,
    /// While the guest is stopped.
    Final,
}

/// Waits until the migration has come so far.
fn wait_for(phase: Phase, source: &Vmm, qmp: &mut Qmp) {
    // Both are there once the disks are set up.
    let number = |info: &Value, key: &str| match info.get("disk") {
        Some(disk) => disk[key].as_u64().unwrap(),
        None => 0,
    };
    if phase == Phase::Final {
        qmp.wait_event("STOP", SOON).unwrap();
        return;
    }
    loop {
        let info = qmp.execute("query-migrate", json!({})).unwrap();
        assert_eq!(info["status"], "active", "{phase:?}: {info}");
        let passes = number(&info, "dirty-sync-count");
        if number(&info, "transferred") > 0 && (phase == Phase::Bulk || passes >= 2) {
            return;
        }
        source.wait_next_line("^HB ").unwrap();
    }
}

#[test]
#[needs(kvm)]
fn a_link_that_breaks_in_any_phase_leaves_the_guest_at_the_source() {
    let hosts = Hosts::new();
    let path = hosts.blank("root", 4 << 20);
    let work = "work=disk ws_mb=2 ram_mbps=20 hb_ms=20";
    let mut source = started(&Guest::new(work, 64).disk("root", &path));
    // The connections in order: control, pages, disks.
    type Cut = fn(&proxy::Proxy);
    let cuts: [(&str, Cut); 4] = [
        ("reset", proxy::Proxy::reset),
        ("closed", |proxy| proxy.cut(|_| true)),
        ("the disks' closed", |proxy| proxy.cut(|index| index == 2)),
        ("the control connection closed", |proxy| proxy.cut(|index| index == 0)),
    ];
    for phase in [Phase::Bulk, Phase::Dirty, Phase::Final] {
        for (how, cut) in cuts {
            let mut destination = hosts.receive();
            let proxy = proxy::start(&destination.address).unwrap();
            // It never fits, or always; and then its last pass takes a second.
            let limit = if phase == Phase::Final { "10s" } else { "1ms" };
            let options = ["--disks", "full", "--max-bandwidth", "4M", "--downtime-limit", limit];
            let mut qmp = source.qmp().unwrap();
            let migration = moving(&source, proxy.address(), &options);
            wait_for(phase, &source, &mut qmp);
            cut(&proxy);
            let ended = migration.end(SOON).unwrap();
            assert_eq!(ended.code, 1, "{phase:?}, {how}: {} {}", ended.errors, ended.summary);
            assert!(ended.errors.contains("connection"), "{phase:?}, {how}: {}", ended.errors);
            assert_goes_on(&mut source);
            assert_ne!(destination.vmm.process.exit_code(SOON).unwrap(), 0);
            assert_eq!(destination.vmm.serial().text(), "", "no guest ran there");
            let left = hosts.files("b");
            let nothing_or_partial = left.iter().all(|name| name == "root.img.partial");
            assert!(nothing_or_partial, "{phase:?}, {how}: {left:?}");
        }
    }
    let mut destination = hosts.receive();
    let fast = ["--disks", "full", "--max-bandwidth", "0", "--downtime-limit", "300ms"];
    ferry::migrate_well(&source, &destination.address, &fast).unwrap();
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
    destination.vmm.qmp().unwrap().execute("stop", json!({})).unwrap();
    disk::verify(&hosts.at("b", "root.img")).unwrap();
}

#[test]
#[needs(kvm)]
fn a_guest_that_resets_while_it_moves_stays() {
    let hosts = Hosts::new();
    let path = hosts.blank("root", 4 << 20);
    let mut source = started(&Guest::new("work=disk ws_mb=2", 64).disk("root", &path));
    let destination = hosts.receive();
    let options = ["--disks", "full", "--max-bandwidth", "4M"];
    let migration = moving(&source, &destination.address, &options);
    let from = source.serial().count();
    source.process.type_in("r").unwrap();
    source.serial().wait_from(from, "^HB n=1 ", SOON).unwrap();
    assert_eq!(migration.end(SOON).unwrap().summary["status"], "cancelled");
    source.process.err.wait_for("reset while it moved", SOON).unwrap();
    source.wait_next_line("^HB ").unwrap();
    assert_eq!(source.check().unwrap().corrupt, 0);
    assert_eq!(hosts.files("b"), [""; 0]);
    // What it is now moves.
    let mut destination = hosts.receive();
    let fast = ["--disks", "full", "--max-bandwidth", "0"];
    ferry::migrate_well(&source, &destination.address, &fast).unwrap();
    destination.vmm.wait_line("^HB ").unwrap();
    assert_eq!(destination.vmm.check().unwrap().corrupt, 0);
}

#[test]
#[needs(kvm, qemu_img)]
fn a_backing_file_that_differs_in_one_byte_is_refused() {
    let hosts = Hosts::new();
    // So large that samples would leave most of it out.
    let (base, top) = (hosts.random("base", 64 << 20), hosts.at("a", "top"));
    overlay(&top, &base).unwrap();
    let mut guest = Guest::new("work=disk disk_mb=4", 64).disk("root", &top);
    guest.disks[0].push_str(",format=qcow2");
    let mut source = started(&guest);
    let there = hosts.at("b", "base");
    std::fs::copy(&base, &there).unwrap();
    fill(&there, (33 << 20) + 6789, 1, Pattern::Random).unwrap();
    fill(&there, (44 << 20) + 6789, 8, Pattern::Random).unwrap();
    let give = format!(
        "root={},format=qcow2,backing={},backing-format=raw",
        text(&hosts.at("b", "x")),
        text(&there)
    );
    let destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
    let ended = ferry::migrate(&source, &destination.address, &["--disks", "top"]).unwrap();
    assert_failed(&ended, "its backing file differs");
    // The identity is one that the user can see.
    for path in [&base, &there] {
        let said = std::process::Command::new("sha256sum").arg(path).output().unwrap();
        let sum = String::from_utf8(said.stdout).unwrap().split(' ').next().unwrap().to_owned();
        assert!(ended.errors.contains(&sum), "{:?} lacks {sum}", ended.errors);
    }
    assert_eq!(hosts.files("b"), ["base"]);
    assert_goes_on(&mut source);
}

/// A guest on host a with an idle disk of 8 MiB.
fn idle(path: &Path) -> Vmm {
    started(&Guest::new("work=idle", 64).disk("data", path))
}

#[test]
#[needs(kvm, loop_devices)]
fn disks_move_to_block_devices_and_back() {
    let hosts = Hosts::new();
    let path = hosts.random("data", 8 << 20);
    for (name, bytes) in [("right", 8 << 20), ("small", 4 << 20), ("large", 16 << 20)] {
        fill(&hosts.at("b", name), 0, bytes, Pattern::Random).unwrap();
    }
    let attach = |name: &str| LoopDevice::attach(&hosts.at("b", name)).unwrap();
    let [right, small, large] = ["right", "small", "large"].map(attach);
    let source = idle(&path);
    let receive = |device: &LoopDevice, more: &[&str]| {
        let give = format!("data={}", device.path());
        ferry::receive_at("tcp:127.0.0.1:0", &[&["--disk", &give], more].concat()).unwrap()
    };
    let overwrite = ["--overwrite"];
    let wrong = "the guest knows this disk with 8388608 bytes";
    for (device, more, expected) in [
        (&right, &[][..], "give --overwrite"),
        (&small, &overwrite[..], wrong),
        (&large, &overwrite[..], wrong),
    ] {
        let destination = receive(device, more);
        let ended = ferry::migrate(&source, &destination.address, &["--disks", "full"]).unwrap();
        assert_failed(&ended, expected);
    }
    // Somebody has it to themselves, as a mount has.
    let mut exclusive = std::fs::OpenOptions::new();
    let exclusive = exclusive.read(true).custom_flags(libc::O_EXCL).open(right.path()).unwrap();
    let destination = receive(&right, &overwrite);
    let ended = ferry::migrate(&source, &destination.address, &["--disks", "full"]).unwrap();
    assert_failed(&ended, "busy");
    drop(exclusive);
    // A device cannot be taken away when the migration fails: that is said.
    let mut destination = receive(&right, &overwrite);
    let slow = ["--disks", "full", "--max-bandwidth", "2M"];
    let mut migration = moving(&source, &destination.address, &slow);
    migration.client.signal(libc::SIGINT).unwrap();
    assert_eq!(migration.end(SOON).unwrap().code, 1);
    destination.vmm.process.err.wait_for("holds no whole disk", SOON).unwrap();
    assert_ne!(destination.vmm.process.exit_code(SOON).unwrap(), 0);
    let there = receive(&right, &overwrite);
    let fast = ["--disks", "full", "--max-bandwidth", "0"];
    ferry::migrate_well(&source, &there.address, &fast).unwrap();
    there.vmm.wait_line("^HB ").unwrap();
    assert_same(&path, &hosts.at("b", "right"));
    // From a device into a file: its size is found.
    let back = hosts.receive_on("a", &[]);
    ferry::migrate_well(&there.vmm, &back.address, &["--disks", "full"]).unwrap();
    back.vmm.wait_line("^HB ").unwrap();
    assert_same(&path, &hosts.at("a", "data.img"));
    for (name, bytes) in [("right", 8 << 20), ("small", 4 << 20), ("large", 16 << 20)] {
        assert_eq!(std::fs::metadata(hosts.at("b", name)).unwrap().len(), bytes, "{name}");
    }
}

#[test]
#[needs(kvm)]
fn disks_that_are_named_but_not_there_are_refused() {
    let source = started(&Guest::new("work=idle", 64));
    let options = ["--disks", "full,nosuch=none"];
    let ended = ferry::migrate(&source, "tcp:127.0.0.1:9", &options).unwrap();
    assert_failed(&ended, "The guest has no disk \"nosuch\", it has no disks");
}
