//! Disks that travel with their guest, between real processes: what the host finds in the images, and
//! what the guest finds in its disk.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::hosts::{Hosts, assert_failed, assert_goes_on, moving, started, text};
use ferry_tests::image::{Pattern, allocated, assert_same, assert_same_as, fill, overlay};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::traveller::{Traveller, Way};
use ferry_tests::verdict::field;
use ferry_tests::{disk, needs};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Stops the guest at the destination, then compares the images.
fn assert_images_same(destination: &Vmm, pairs: &[(&Path, &Path)]) {
    let mut qmp = destination.qmp().unwrap();
    qmp.execute("stop", json!({})).unwrap();
    for (from, to) in pairs {
        assert_same(from, to);
    }
    qmp.execute("cont", json!({})).unwrap();
}

#[test]
#[needs(kvm)]
fn three_disks_arrive_whole_and_sparse_with_an_idle_guest() {
    let hosts = Hosts::new();
    let sizes = [("root", (32 << 20) + 512), ("data", 512), ("big", 1 << 30)];
    let mut guest = Guest::new("work=idle", 64);
    for (id, size) in sizes {
        let path = hosts.at("a", id);
        disk::create(&path, size).unwrap();
        guest = guest.disk(id, &path);
    }
    fill(&hosts.at("a", "root"), 0, (32 << 20) + 512, Pattern::Random).unwrap();
    fill(&hosts.at("a", "data"), 0, 512, Pattern::Random).unwrap();
    fill(&hosts.at("a", "big"), 100 << 20, 4 << 20, Pattern::Random).unwrap();
    // Zeroes that take space here need none there.
    fill(&hosts.at("a", "big"), 300 << 20, 8 << 20, Pattern::Zero).unwrap();
    let source = started(&guest);
    let mut destination = hosts.receive();
    let ended = ferry::migrate_well(&source, &destination.address, &["--disks", "full"]).unwrap();
    let there = |id: &str| hosts.at("b", &format!("{id}.img"));
    for (id, _) in sizes {
        assert_same(&hosts.at("a", id), &there(id));
    }
    let big = allocated(&there("big")).unwrap();
    assert!((4 << 20..6 << 20).contains(&big), "{big} bytes for 4 MiB of data");
    let disk_info = &ended.summary["disk"];
    assert_eq!(disk_info["remaining"], 0, "{}", ended.summary);
    let sent = disk_info["transferred"].as_u64().unwrap();
    assert!((36 << 20..38 << 20).contains(&sent), "{sent} bytes sent for 36 MiB of data");
    assert_eq!(disk_info["x-disks"].as_array().unwrap().len(), 3);
    assert_eq!(hosts.files("b"), ["big.img", "data.img", "root.img"]);
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn a_guest_that_writes_its_disk_takes_it_along() {
    for cache in ["writeback", "none"] {
        let hosts = Hosts::new();
        let (here, there) = (hosts.at("a", "x"), hosts.at("b", "y"));
        disk::create(&here, 24 << 20).unwrap();
        let mut guest = Guest::new("work=disk", 64).disk("root", &here);
        guest.disks[0].push_str(&format!(",cache={cache}"));
        let source = ferry::run(&guest).unwrap();
        source.wait_line("^HB n=2 ").unwrap();
        let give = format!("root={},format=raw,cache={cache}", text(&there));
        let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
        let options = ["--disks", "full", "--keep-source", "--downtime-limit", "100ms"];
        ferry::migrate_well(&source, &destination.address, &options).unwrap();
        ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
        destination.vmm.qmp().unwrap().execute("stop", json!({})).unwrap();
        let (old, new) = (disk::verify(&here).unwrap(), disk::verify(&there).unwrap());
        assert!(new > old, "the guest has written {new} sectors there, {old} before");
        assert_eq!(hosts.files("b"), ["y"]);
    }
}

#[test]
#[needs(kvm)]
fn at_the_handover_both_images_are_the_same_although_the_guest_wrote() {
    let hosts = Hosts::new();
    let (here, there) = (hosts.at("a", "x"), hosts.at("b", "root.img"));
    disk::create(&here, 16 << 20).unwrap();
    let guest = Guest::new("work=disk", 64).disk("root", &here);
    let source = started(&guest);
    let folder = hosts.at("b", "");
    // Paused on arrival: not one write comes between the handover and the comparison.
    let options = ["--disk-dir", text(&folder), "--paused"];
    let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &options).unwrap();
    ferry::migrate_well(&source, &destination.address, &["--disks", "root=full"]).unwrap();
    assert_same(&here, &there);
    destination.vmm.qmp().unwrap().execute("cont", json!({})).unwrap();
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn there_and_back_20_times_with_memory_and_disk_under_load() {
    let hosts = Hosts::new();
    disk::create(&hosts.at("a", "root.img"), 16 << 20).unwrap();
    let work = "work=disk hb_ms=20 ws_mb=12 ram_mbps=60";
    let guest = Guest::new(work, 64).disk("root", &hosts.at("a", "root.img"));
    let mut guest = Traveller::start(&guest).unwrap();
    let [there, back] = ["b", "a"].map(|to| hosts.at(to, ""));
    for folder in [&there, &back].into_iter().cycle().take(20) {
        let receive = ["--disk-dir", text(folder), "--overwrite"];
        let way = Way { receive: &receive, migrate: &["--disks", "full"], ..Way::default() };
        guest.hop(way).unwrap();
    }
    let (_, beats) = guest.verify().unwrap();
    let beat = guest.vmm.wait_next_line("^HB ").unwrap();
    let rewritten = field(&beat.text, "ram_gen").unwrap();
    assert!(rewritten > 3072, "only {rewritten} pages were rewritten meanwhile");
    guest.vmm.qmp().unwrap().execute("stop", json!({})).unwrap();
    let written = disk::verify(&hosts.at("a", "root.img")).unwrap();
    assert!(written >= beats[beats.len() - 1].generation, "acknowledged writes are lost");
    assert_eq!(
        (hosts.files("a"), hosts.files("b")),
        (vec!["root.img".into()], vec!["root.img".into()])
    );
}

#[test]
#[needs(kvm)]
fn a_read_only_disk_travels_and_stays_read_only() {
    let hosts = Hosts::new();
    let path = hosts.random("cd", 4 << 20);
    let mut guest = Guest::new("work=idle", 64).disk("cd", &path);
    guest.disks[0].push_str(",readonly=on");
    let source = started(&guest);
    let mut destination = hosts.receive();
    ferry::migrate_well(&source, &destination.address, &["--disks", "full"]).unwrap();
    assert_same(&path, &hosts.at("b", "cd.img"));
    let blocks = destination.vmm.qmp().unwrap().execute("query-block", json!({})).unwrap();
    assert_eq!(blocks[0]["inserted"]["ro"], true, "{blocks}");
    assert_eq!(blocks[0]["inserted"]["file"], text(&hosts.at("b", "cd.img")), "{blocks}");
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn some_disks_travel_and_others_stay() {
    let hosts = Hosts::new();
    let (shared, own) = (hosts.at("a", "shared"), hosts.at("a", "own"));
    disk::create(&shared, 8 << 20).unwrap();
    disk::create(&own, 4 << 20).unwrap();
    fill(&own, 0, 4 << 20, Pattern::Random).unwrap();
    // The first disk is the one that the guest writes.
    let guest = Guest::new("work=disk", 64).disk("shared", &shared).disk("own", &own);
    let source = started(&guest);
    let (folder, give) = (hosts.at("b", ""), format!("shared={}", text(&shared)));
    let options = ["--disk-dir", text(&folder), "--disk", &give];
    let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &options).unwrap();
    ferry::migrate_well(&source, &destination.address, &["--disks", "none,own=full"]).unwrap();
    assert_eq!(hosts.files("b"), ["own.img"]);
    assert_images_same(&destination.vmm, &[(&own, &hosts.at("b", "own.img"))]);
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn a_cap_holds_and_progress_is_told_per_disk() {
    let hosts = Hosts::new();
    let path = hosts.random("data", 40 << 20);
    // The rest is a hole.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(400 << 20).unwrap();
    let source = started(&Guest::new("work=idle", 64).disk("data", &path));
    let mut destination = hosts.receive();
    let options = ["--disks", "full", "--max-bandwidth", "20M"];
    let migration = moving(&source, &destination.address, &options);
    let (mut qmp, mut there) = (source.qmp().unwrap(), destination.vmm.qmp().unwrap());
    let (mut last, mut last_there, mut rates) = (0, 0, 0);
    // 40 MiB at 20 MiB/s: progress can be watched.
    while let Ok(info) = qmp.execute("query-migrate", json!({})) {
        if info["status"] != "active" {
            break;
        }
        let one = &info["disk"]["x-disks"][0];
        assert_eq!(one["device"], "data", "{info}");
        let percent = one["percent"].as_u64().unwrap();
        assert!((last..=100).contains(&percent), "{percent} after {last}");
        last = percent;
        assert_eq!(one["searched"], 400 << 20, "{info}");
        if info["disk"]["dirty-sync-count"] == 0 && info["ram"]["mbps"].as_f64() > Some(0.0) {
            assert!(info["expected-downtime"].as_u64() > Some(0), "{info}");
            rates += 1;
        }
        let info = there.execute("query-migrate", json!({})).unwrap();
        let one = &info["disk"]["x-disks"][0];
        if one["percent"].as_u64().is_some_and(|percent| percent < 100) {
            last_there = last_there.max(one["percent"].as_u64().unwrap());
            assert_eq!(one["total"], 40 << 20, "{info}");
        }
        // A tenth of a second; there is none when the guest has moved.
        if source.wait_next_line("^HB ").is_err() {
            break;
        }
    }
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 0, "{}", ended.errors);
    assert!(last > 30, "progress was seen up to {last} percent only");
    assert!(last_there > 30, "at the destination up to {last_there} percent only");
    assert!(rates > 3, "the rate was seen {rates} times while the disk travelled");
    let bytes = ended.summary["disk"]["transferred"].as_f64().unwrap()
        + ended.summary["ram"]["transferred"].as_f64().unwrap();
    let seconds = ended.summary["total-time"].as_f64().unwrap() / 1e3;
    let rate = bytes / seconds / f64::from(1 << 20);
    assert!(rate < 21.0, "{rate} MiB/s despite a cap of 20: {}", ended.summary);
    assert!(rate > 14.0, "{rate} MiB/s only: {}", ended.summary);
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

/// An overlay on a raw base of random bytes, made by `qemu-img`.
fn overlay_on_base(hosts: &Hosts) -> (PathBuf, PathBuf) {
    let (base, top) = (hosts.at("a", "base"), hosts.at("a", "top"));
    disk::create(&base, 16 << 20).unwrap();
    fill(&base, 0, 16 << 20, Pattern::Random).unwrap();
    overlay(&top, &base).unwrap();
    (base, top)
}

fn busy_on(path: &Path, more: &str) -> Vmm {
    let mut guest = Guest::new("work=disk disk_mb=4", 64).disk("root", path);
    guest.disks[0].push_str(more);
    started(&guest)
}

#[test]
#[needs(kvm, qemu_img)]
fn disks_change_their_format_on_the_way() {
    for (from, to) in [("raw", "qcow2"), ("qcow2", "raw"), ("qcow2", "qcow2")] {
        let hosts = Hosts::new();
        let (base, top) = overlay_on_base(&hosts);
        let here = if from == "raw" { base.clone() } else { top };
        let source = busy_on(&here, &format!(",format={from}"));
        let there = hosts.at("b", "x");
        let give = format!("root={},format={to}", text(&there));
        let options = ["--disk", give.as_str(), "--paused"];
        let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &options).unwrap();
        // The source lives, and has written back all that its image's map has to say.
        let options = ["--disks", "full", "--keep-source"];
        let ended = ferry::migrate_well(&source, &destination.address, &options).unwrap();
        let files = &ended.summary["disk"]["x-disks"][0]["files"];
        let chain = if from == "raw" { vec![text(&here)] } else { vec![text(&here), text(&base)] };
        assert_eq!(*files, json!(chain), "all files that were read");
        assert_same_as((&here, from), (&there, to));
        destination.vmm.qmp().unwrap().execute("cont", json!({})).unwrap();
        ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
        let nodes =
            destination.vmm.qmp().unwrap().execute("query-named-block-nodes", json!({})).unwrap();
        assert_eq!(nodes[0]["drv"], to, "{nodes}");
    }
}

#[test]
#[needs(kvm, qemu_img)]
fn only_what_lies_above_the_same_backing_file_travels() {
    let hosts = Hosts::new();
    let (base, top) = overlay_on_base(&hosts);
    let mut source = busy_on(&top, ",format=qcow2");
    let (base_there, there) = (hosts.at("b", "base"), hosts.at("b", "x"));
    std::fs::copy(&base, &base_there).unwrap();
    let give = |base: &Path| {
        format!("root={},format=qcow2,backing={},backing-format=raw", text(&there), text(base))
    };
    // Not given, and another one.
    let other = hosts.at("b", "other");
    std::fs::copy(&base, &other).unwrap();
    fill(&other, 1 << 20, 1 << 20, Pattern::Random).unwrap();
    let plain = format!("root={},format=qcow2", text(&there));
    for (give, expected) in [
        (plain, "only what lies above its backing file"),
        (give(&other), "its backing file differs"),
    ] {
        let destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
        let ended = ferry::migrate(&source, &destination.address, &["--disks", "top"]).unwrap();
        assert_failed(&ended, expected);
        assert_eq!(hosts.files("b"), ["base", "other"]);
    }
    assert_goes_on(&mut source);
    let options = ["--disk", &give(&base_there), "--paused"];
    let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &options).unwrap();
    let ended = ferry::migrate_well(&source, &destination.address, &["--disks", "top"]).unwrap();
    let sent = ended.summary["disk"]["x-disks"][0]["total"].as_u64().unwrap();
    assert!(sent <= 5 << 20, "{sent} bytes for a top of 4 MiB: {}", ended.summary);
    let base_unlocked = "backing.driver=raw,backing.file.driver=file,backing.file.locking=off";
    let format = format!("qcow2,{base_unlocked},backing.file.filename={}", text(&base_there));
    assert_same_as((&top, "qcow2"), (&there, &format));
    destination.vmm.qmp().unwrap().execute("cont", json!({})).unwrap();
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
    let blocks = destination.vmm.qmp().unwrap().execute("query-block", json!({})).unwrap();
    assert_eq!(blocks[0]["inserted"]["backing_file"], text(&base_there), "{blocks}");
}

#[test]
#[needs(kvm, qemu_img)]
fn a_shared_disk_whose_backing_file_was_overruled_does_not_move() {
    let hosts = Hosts::new();
    let (_, top) = overlay_on_base(&hosts);
    // The destination would open the recorded one.
    let path = format!("path={},id=root,format=qcow2,backing=none", text(&top));
    let mut guest = Guest::new("work=idle", 64);
    guest.disks.push(path.clone());
    let mut source = ferry::run(&guest).unwrap();
    source.wait_line("^HB ").unwrap();
    let destination = ferry::receive().unwrap();
    let ended = ferry::migrate(&source, &destination.address, &[]).unwrap();
    assert_failed(&ended, "another backing file");
    assert_goes_on(&mut source);
    let often = ["run", "--kernel", guest_images::KERNEL, "--disk", &path, "--migrate-every", "1s"];
    let (code, said) = ferry::end_of(often).unwrap();
    assert!(code == 2 && said.contains("backing"), "{code}: {said}");
}
