//! Disks that travel with their guest, between real processes: what the host finds in the images, and
//! what the guest finds in its disk.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Ended, Guest};
use ferry_tests::image::{
    Pattern, allocated, assert_same, assert_same_as, fill, overlay, qemu_img,
};
use ferry_tests::lines::Lines;
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::verdict::Transcript;
use ferry_tests::{disk, skip};
use serde_json::json;
use std::path::{Path, PathBuf};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Stops the guest at the destination, then compares the images.
fn assert_images_same(destination: &Vmm, pairs: &[(&Path, &Path)]) {
    let mut qmp = destination.qmp().unwrap();
    qmp.execute("stop", json!({})).unwrap();
    for (from, to) in pairs {
        assert_same(from, to);
    }
    qmp.execute("cont", json!({})).unwrap();
}

/// A folder per host.
struct Hosts {
    folder: tempfile::TempDir,
}

impl Hosts {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("a")).unwrap();
        std::fs::create_dir(folder.path().join("b")).unwrap();
        Self { folder }
    }

    fn at(&self, host: &str, name: &str) -> PathBuf {
        self.folder.path().join(host).join(name)
    }

    /// What lies in a host's folder.
    fn files(&self, host: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path().join(host)).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[test]
fn three_disks_arrive_whole_and_sparse_with_an_idle_guest() {
    if skip::kvm_is_missing() {
        return;
    }
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
    let source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=1 ").unwrap();
    let folder = hosts.at("b", "");
    let mut destination =
        ferry::receive_at("tcp:127.0.0.1:0", &["--disk-dir", text(&folder)]).unwrap();
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
fn a_guest_that_writes_its_disk_takes_it_along() {
    if skip::kvm_is_missing() {
        return;
    }
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
fn at_the_handover_both_images_are_the_same_although_the_guest_wrote() {
    if skip::kvm_is_missing() {
        return;
    }
    let hosts = Hosts::new();
    let (here, there) = (hosts.at("a", "x"), hosts.at("b", "root.img"));
    disk::create(&here, 16 << 20).unwrap();
    let guest = Guest::new("work=disk", 64).disk("root", &here);
    let source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
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
fn there_and_back_20_times_with_memory_and_disk_under_load() {
    if skip::kvm_is_missing() {
        return;
    }
    let hosts = Hosts::new();
    disk::create(&hosts.at("a", "root.img"), 16 << 20).unwrap();
    // The disk's guest also rewrites its RAM: generations, rings and buffers.
    let guest = Guest::new("work=disk hb_ms=20", 64).disk("root", &hosts.at("a", "root.img"));
    let mut host = ferry::run(&guest).unwrap();
    host.wait_line("^HB n=2 ").unwrap();
    let mut serials: Vec<Lines> = Vec::new();
    for hop in 0..20 {
        let (from, to) = if hop % 2 == 0 { ("a", "b") } else { ("b", "a") };
        let folder = hosts.at(to, "");
        let options = ["--disk-dir", text(&folder), "--overwrite"];
        let destination = ferry::receive_at("tcp:127.0.0.1:0", &options).unwrap();
        ferry::migrate_well(&host, &destination.address, &["--disks", "full"])
            .unwrap_or_else(|error| panic!("hop {hop} from {from}: {error:#}"));
        serials.push(host.serial().clone());
        host = destination.vmm;
    }
    let from = host.serial().count();
    host.serial().wait_from(from + 2, "^HB ", SOON).unwrap();
    assert_eq!(host.check().unwrap().corrupt, 0);
    serials.push(host.serial().clone());
    let beats = Transcript::of(&serials).judge().unwrap();
    host.qmp().unwrap().execute("stop", json!({})).unwrap();
    let written = disk::verify(&hosts.at("a", "root.img")).unwrap();
    assert!(written >= beats[beats.len() - 1].generation, "acknowledged writes are lost");
    assert_eq!(
        (hosts.files("a"), hosts.files("b")),
        (vec!["root.img".into()], vec!["root.img".into()])
    );
}

/// The guest goes on here, whole, after a migration that did not happen.
fn assert_goes_on(source: &mut Vmm) {
    assert_eq!(source.qmp().unwrap().run_state().unwrap(), "running");
    source.wait_next_line("^HB ").unwrap();
    source.wait_next_line("^HB ").unwrap();
    assert_eq!(source.check().unwrap().corrupt, 0);
    Transcript::of([source.serial()]).judge().unwrap();
}

/// A guest with a busy disk of 24 MiB on host a.
fn busy(hosts: &Hosts) -> Vmm {
    let path = hosts.at("a", "root");
    disk::create(&path, 24 << 20).unwrap();
    let source = ferry::run(&Guest::new("work=disk", 64).disk("root", &path)).unwrap();
    source.wait_line("^HB n=1 ").unwrap();
    source
}

fn assert_failed(ended: &Ended, expected: &str) {
    assert_eq!(ended.code, 1, "{expected}: {}", ended.summary);
    assert!(ended.errors.contains(expected), "{:?} lacks {expected:?}", ended.errors);
}

#[test]
fn what_cannot_work_is_refused_by_name_before_anything_travels_and_leaves_nothing() {
    if skip::kvm_is_missing() {
        return;
    }
    let hosts = Hosts::new();
    let mut source = busy(&hosts);
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
        assert!(ended.summary["disk"]["transferred"].as_u64().unwrap_or(0) == 0, "{expected}");
        assert_eq!(hosts.files("b"), ["taken"], "{expected}");
    }
    assert_eq!(std::fs::read(&taken).unwrap(), [7; 4096]);
    assert_goes_on(&mut source);
}

#[test]
fn a_disk_that_fills_up_fails_the_migration_and_the_guest_runs_on() {
    if skip::kvm_is_missing() {
        return;
    }
    let hosts = Hosts::new();
    let Some(small) = ferry_tests::image::SmallFileSystem::mount(&hosts.at("b", ""), 16 << 20)
    else {
        return skip::skip("no right to mount a small file system");
    };
    let path = hosts.at("a", "root");
    disk::create(&path, 24 << 20).unwrap();
    let mut source = ferry::run(&Guest::new("work=disk", 64).disk("root", &path)).unwrap();
    source.wait_line("^HB n=1 ").unwrap();
    let folder = hosts.at("b", "");
    let options = ["--disk-dir", text(&folder)];
    // Known before anything travels…
    let destination = ferry::receive_at("tcp:127.0.0.1:0", &options).unwrap();
    let ended = ferry::migrate(&source, &destination.address, &["--disks", "full"]).unwrap();
    assert_failed(&ended, "bytes free, the guest's disks need");
    assert_eq!(hosts.files("b"), [""; 0]);
    assert_goes_on(&mut source);
    drop((source, small));
    // …or only when somebody else takes the space meanwhile.
    let small = ferry_tests::image::SmallFileSystem::mount(&hosts.at("b", ""), 64 << 20).unwrap();
    let mut source = busy(&hosts);
    let destination = ferry::receive_at("tcp:127.0.0.1:0", &options).unwrap();
    let slow = ["--disks", "full", "--max-bandwidth", "8M"];
    let migration = ferry::start_migrate(&source, &destination.address, &slow).unwrap();
    migration.client.out.wait_for("\"active\"", SOON).unwrap();
    fill(&hosts.at("b", "greedy"), 0, 56 << 20, Pattern::Random).unwrap();
    let ended = migration.end(SOON).unwrap();
    assert_failed(&ended, "disk root: writing ");
    assert!(ended.errors.contains("os error 28"), "{}", ended.errors);
    assert_goes_on(&mut source);
    assert_eq!(hosts.files("b"), ["greedy"]);
    drop(small);
}

#[test]
fn a_disk_that_shrinks_or_is_replaced_while_it_moves() {
    if skip::kvm_is_missing() {
        return;
    }
    let hosts = Hosts::new();
    let path = hosts.at("a", "data");
    disk::create(&path, 64 << 20).unwrap();
    fill(&path, 0, 64 << 20, Pattern::Random).unwrap();
    let guest = Guest::new("work=idle", 64).disk("data", &path);
    let source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=1 ").unwrap();
    let folder = hosts.at("b", "");
    let receive = || ferry::receive_at("tcp:127.0.0.1:0", &["--disk-dir", text(&folder)]).unwrap();
    let slow = ["--disks", "full", "--max-bandwidth", "20M"];
    // Truncated: what is gone cannot be read.
    let mut destination = receive();
    let migration = ferry::start_migrate(&source, &destination.address, &slow).unwrap();
    migration.client.out.wait_for("\"active\"", SOON).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(32 << 20).unwrap();
    assert_failed(&migration.end(SOON).unwrap(), "disk data: reading ");
    assert_ne!(destination.vmm.process.exit_code(SOON).unwrap(), 0);
    assert_eq!(hosts.files("b"), [""; 0]);
    assert_eq!(source.qmp().unwrap().run_state().unwrap(), "running");
    // Grown, then replaced by another file of its name: the guest's disk is still the one it opened.
    file.set_len(64 << 20).unwrap();
    fill(&path, 32 << 20, 32 << 20, Pattern::Random).unwrap();
    let mut destination = receive();
    let migration = ferry::start_migrate(&source, &destination.address, &slow).unwrap();
    migration.client.out.wait_for("\"active\"", SOON).unwrap();
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
fn a_read_only_disk_travels_and_stays_read_only() {
    if skip::kvm_is_missing() {
        return;
    }
    let hosts = Hosts::new();
    let path = hosts.at("a", "cd");
    disk::create(&path, 4 << 20).unwrap();
    fill(&path, 0, 4 << 20, Pattern::Random).unwrap();
    let mut guest = Guest::new("work=idle", 64).disk("cd", &path);
    guest.disks[0].push_str(",readonly=on");
    let source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=1 ").unwrap();
    let folder = hosts.at("b", "");
    let mut destination =
        ferry::receive_at("tcp:127.0.0.1:0", &["--disk-dir", text(&folder)]).unwrap();
    ferry::migrate_well(&source, &destination.address, &["--disks", "full"]).unwrap();
    assert_same(&path, &hosts.at("b", "cd.img"));
    let blocks = destination.vmm.qmp().unwrap().execute("query-block", json!({})).unwrap();
    assert_eq!(blocks[0]["inserted"]["ro"], true, "{blocks}");
    assert_eq!(blocks[0]["inserted"]["file"], text(&hosts.at("b", "cd.img")), "{blocks}");
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
fn a_cancel_while_disks_travel_leaves_nothing_and_a_retry_moves_them() {
    if skip::kvm_is_missing() {
        return;
    }
    let hosts = Hosts::new();
    let mut source = busy(&hosts);
    let folder = hosts.at("b", "");
    let receive = || ferry::receive_at("tcp:127.0.0.1:0", &["--disk-dir", text(&folder)]).unwrap();
    let destination = receive();
    let slow = ["--disks", "full", "--max-bandwidth", "8M"];
    let mut migration = ferry::start_migrate(&source, &destination.address, &slow).unwrap();
    migration.client.out.wait_for("\"active\"", SOON).unwrap();
    assert_eq!(hosts.files("b"), ["root.img.partial"]);
    migration.client.signal(libc::SIGINT).unwrap();
    let ended = migration.end(SOON).unwrap();
    assert_eq!((ended.code, ended.summary["status"].as_str()), (1, Some("cancelled")));
    assert_goes_on(&mut source);
    let mut vmm = destination.vmm;
    assert_ne!(vmm.process.exit_code(SOON).unwrap(), 0);
    assert_eq!(hosts.files("b"), [""; 0]);
    let mut destination = receive();
    let fast = ["--disks", "full", "--max-bandwidth", "0"];
    ferry::migrate_well(&source, &destination.address, &fast).unwrap();
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
fn either_side_may_be_killed_in_the_middle() {
    if skip::kvm_is_missing() {
        return;
    }
    let hosts = Hosts::new();
    let mut source = busy(&hosts);
    let folder = hosts.at("b", "");
    let receive = || ferry::receive_at("tcp:127.0.0.1:0", &["--disk-dir", text(&folder)]).unwrap();
    let slow = ["--disks", "full", "--max-bandwidth", "8M"];
    let mut destination = receive();
    let migration = ferry::start_migrate(&source, &destination.address, &slow).unwrap();
    migration.client.out.wait_for("\"active\"", SOON).unwrap();
    destination.vmm.process.kill().unwrap();
    assert_failed(&migration.end(SOON).unwrap(), "connection lost");
    assert_goes_on(&mut source);
    // Its name says what it is, and the next attempt takes it over.
    assert_eq!(hosts.files("b"), ["root.img.partial"]);
    let destination = receive();
    let migration = ferry::start_migrate(&source, &destination.address, &slow).unwrap();
    migration.client.out.wait_for("\"active\"", SOON).unwrap();
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
fn some_disks_travel_and_others_stay() {
    if skip::kvm_is_missing() {
        return;
    }
    let hosts = Hosts::new();
    let (shared, own) = (hosts.at("a", "shared"), hosts.at("a", "own"));
    disk::create(&shared, 8 << 20).unwrap();
    disk::create(&own, 4 << 20).unwrap();
    fill(&own, 0, 4 << 20, Pattern::Random).unwrap();
    // The first disk is the one that the guest writes.
    let guest = Guest::new("work=disk", 64).disk("shared", &shared).disk("own", &own);
    let source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    let (folder, give) = (hosts.at("b", ""), format!("shared={}", text(&shared)));
    let options = ["--disk-dir", text(&folder), "--disk", &give];
    let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &options).unwrap();
    ferry::migrate_well(&source, &destination.address, &["--disks", "none,own=full"]).unwrap();
    assert_eq!(hosts.files("b"), ["own.img"]);
    assert_images_same(&destination.vmm, &[(&own, &hosts.at("b", "own.img"))]);
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
fn a_cap_holds_and_progress_is_told_per_disk() {
    if skip::kvm_is_missing() {
        return;
    }
    let hosts = Hosts::new();
    let path = hosts.at("a", "data");
    disk::create(&path, 40 << 20).unwrap();
    fill(&path, 0, 40 << 20, Pattern::Random).unwrap();
    let source = ferry::run(&Guest::new("work=idle", 64).disk("data", &path)).unwrap();
    source.wait_line("^HB n=1 ").unwrap();
    let folder = hosts.at("b", "");
    let mut destination =
        ferry::receive_at("tcp:127.0.0.1:0", &["--disk-dir", text(&folder)]).unwrap();
    let options = ["--disks", "full", "--max-bandwidth", "20M"];
    let migration = ferry::start_migrate(&source, &destination.address, &options).unwrap();
    migration.client.out.wait_for("\"active\"", SOON).unwrap();
    let mut qmp = source.qmp().unwrap();
    let mut last = 0;
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
        // A tenth of a second; there is none when the guest has moved.
        if source.wait_next_line("^HB ").is_err() {
            break;
        }
    }
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 0, "{}", ended.errors);
    assert!(last > 30, "progress was seen up to {last} percent only");
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
    let source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    source
}

#[test]
fn disks_change_their_format_on_the_way() {
    if skip::kvm_is_missing() || qemu_img().is_none() {
        return;
    }
    for (from, to) in [("raw", "qcow2"), ("qcow2", "raw"), ("qcow2", "qcow2")] {
        let hosts = Hosts::new();
        let (base, top) = overlay_on_base(&hosts);
        let here = if from == "raw" { base } else { top };
        let source = busy_on(&here, &format!(",format={from}"));
        let there = hosts.at("b", "x");
        let give = format!("root={},format={to}", text(&there));
        let options = ["--disk", give.as_str(), "--paused"];
        let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &options).unwrap();
        ferry::migrate_well(&source, &destination.address, &["--disks", "full"]).unwrap();
        assert_same_as((&here, from), (&there, to));
        destination.vmm.qmp().unwrap().execute("cont", json!({})).unwrap();
        ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
        let nodes =
            destination.vmm.qmp().unwrap().execute("query-named-block-nodes", json!({})).unwrap();
        assert_eq!(nodes[0]["drv"], to, "{nodes}");
    }
}

#[test]
fn only_what_lies_above_the_same_backing_file_travels() {
    if skip::kvm_is_missing() || qemu_img().is_none() {
        return;
    }
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
    // Shared it cannot be.
    let destination = ferry::receive().unwrap();
    assert_failed(&ferry::migrate(&source, &destination.address, &[]).unwrap(), "is qcow2");
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
fn a_guest_whose_disk_is_full_is_stopped_told_of_and_goes_on_when_there_is_room() {
    if skip::kvm_is_missing() {
        return;
    }
    let hosts = Hosts::new();
    let Some(small) = ferry_tests::image::SmallFileSystem::mount(&hosts.at("a", ""), 16 << 20)
    else {
        return skip::skip("no right to mount a small file system");
    };
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
