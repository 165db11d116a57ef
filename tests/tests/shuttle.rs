//! `ferry run --migrate-every`: what the user holds on to keeps working across the moves.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::image::{self, Pattern, SmallFileSystem};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::verdict::Transcript;
use ferry_tests::{bitmaps, disk, needs};
use serde_json::json;
use std::path::Path;
use std::time::{Duration, Instant};

fn shuttle(guest: &Guest, more: &[&str]) -> Vmm {
    ferry::run_with(guest, &[&["--migrate-every", "200ms"], more].concat()).unwrap()
}

/// The last line's number of moves.
fn moves(vmm: &Vmm) -> u32 {
    let said = vmm.process.err.text();
    let line = said.lines().find(|line| line.contains("ferry: moved ")).expect("a last line");
    assert!(!line.contains("failed"), "{said}");
    line.split(' ').nth(2).unwrap().parse().unwrap()
}

/// Waits for move `number`, of which `-v` tells.
fn wait_for_move(vmm: &Vmm, number: u32) {
    vmm.process.err.wait_for(&format!(r"\bmove {number}: "), SOON).unwrap();
}

/// How many moves `-v` has told of.
fn moves_so_far(vmm: &Vmm) -> u32 {
    let told = vmm.process.err.text();
    (1..).find(|number| !told.contains(&format!("move {number}: "))).map_or(0, |next: u32| next - 1)
}

fn children(parent: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{parent}/task")).unwrap();
    threads
        .filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<_>>())
        .collect()
}

#[test]
#[needs(kvm)]
fn serial_line_input_and_exit_code_survive_the_moves() {
    let mut vmm = shuttle(&Guest::new("work=dirty ws_mb=8 rate_mbps=50", 64), &[]);
    vmm.wait_line("^HB n=15 ").unwrap();
    assert_eq!(vmm.check().unwrap().corrupt, 0);
    vmm.wait_next_line("^HB ").unwrap();
    vmm.wait_next_line("^HB ").unwrap();
    assert_eq!(vmm.check().unwrap().corrupt, 0);
    // Every heartbeat is there, once and in order, whichever process printed it.
    Transcript::of([vmm.serial()]).judge().unwrap();
    vmm.process.type_in("q").unwrap();
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 1, "the guest wrote 0 to the debug-exit port");
    assert!(moves(&vmm) >= 3, "{}", vmm.process.err.text());
}

#[test]
#[needs(kvm)]
fn the_control_socket_stays_connected_while_the_guest_moves_with_its_disk() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    disk::create(&image, 1 << 20).unwrap();
    let guest = Guest::new("work=disk", 64).disk("root", &image);
    let mut vmm = shuttle(&guest, &["--name", "vm1", "-v"]);
    vmm.wait_line("^HB n=1 ").unwrap();
    let mut qmp = vmm.qmp().unwrap();
    for number in [1, 2, 4] {
        wait_for_move(&vmm, number);
        assert_eq!(qmp.run_state().unwrap(), "running");
        assert_eq!(qmp.execute("query-name", json!({})).unwrap()["name"], "vm1");
        assert_eq!(qmp.execute("query-block", json!({})).unwrap()[0]["device"], "root");
    }
    let refused = qmp.execute("migrate", json!({"uri": "tcp:127.0.0.1:1"})).unwrap_err();
    assert!(refused.to_string().contains("--migrate-every"), "{refused}");
    qmp.execute("system_reset", json!({})).unwrap();
    let from = vmm.serial().count();
    vmm.serial().wait_from(from, "^HB n=1 ", SOON).unwrap();
    assert_eq!(vmm.check().unwrap().corrupt, 0);
    qmp.execute("quit", json!({})).unwrap();
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 0);
    assert!(moves(&vmm) >= 4);
}

#[test]
#[needs(kvm)]
fn dirty_bitmaps_go_along_and_lose_nothing() {
    const BYTES: u64 = 2 << 20;
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    disk::create(&image, BYTES).unwrap();
    let mut vmm = shuttle(&Guest::new("work=disk disk_mb=1", 64).disk("root", &image), &["-v"]);
    vmm.wait_line("^HB n=1 ").unwrap();
    let mut qmp = vmm.qmp().unwrap();
    qmp.execute("stop", json!({})).unwrap();
    let before = std::fs::read(&image).unwrap();
    bitmaps::add(&mut qmp, "all", 512, false);
    bitmaps::add(&mut qmp, "coarse", 65_536, false);
    let moved = moves_so_far(&vmm);
    qmp.execute("cont", json!({})).unwrap();
    wait_for_move(&vmm, moved + 3);
    vmm.wait_next_line("^HB ").unwrap();
    qmp.execute("stop", json!({})).unwrap();
    let written = bitmaps::changed(&image, &before);
    assert!(!written.is_empty(), "the guest has written nothing");
    for name in ["all", "coarse"] {
        bitmaps::assert_has(&mut qmp, name, &written, BYTES);
        assert_eq!(bitmaps::bitmap(&mut qmp, name)["recording"], true);
    }
    qmp.execute("cont", json!({})).unwrap();
    vmm.process.type_in("q").unwrap();
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 1, "the guest's own code");
}

#[test]
#[needs(kvm)]
fn a_hop_loses_no_option_of_a_disk() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, odd) = (folder.path().join("plain"), folder.path().join("odd"));
    for path in [&plain, &odd] {
        disk::create(path, 1 << 20).unwrap();
    }
    let mut guest = Guest::new("work=disk", 64).disk("plain", &plain);
    let options = "queues=2,cache=none,werror=stop,rerror=ignore";
    guest.disks.push(format!("path={},id=odd,{options}", odd.display()));
    let mut vmm = shuttle(&guest, &["-v"]);
    let known = |vmm: &Vmm| {
        let mut disks = vmm.qmp().unwrap().execute("query-block", json!({})).unwrap();
        for disk in disks.as_array_mut().unwrap() {
            // Grows as the guest writes.
            disk["inserted"]["image"].as_object_mut().unwrap().remove("actual-size");
        }
        disks
    };
    vmm.wait_line("^HB n=1 ").unwrap();
    let before = known(&vmm);
    let odd = &before[1];
    assert_eq!(
        (&odd["device"], &odd["inserted"]["cache"]["direct"]),
        (&json!("odd"), &json!(true))
    );
    assert_eq!((&odd["x-werror"], &odd["x-rerror"]), (&json!("stop"), &json!("ignore")));
    for number in [1, 2] {
        wait_for_move(&vmm, number);
        assert_eq!(known(&vmm), before, "after move {number}");
    }
    vmm.process.type_in("q").unwrap();
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 1, "the guest's own code");
}

#[test]
#[needs(kvm)]
fn timeout_and_expect_are_the_shuttles_own() {
    let guest = Guest::new("work=idle", 64);
    let mut vmm = shuttle(&guest, &["--timeout", "2s"]);
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 124);
    assert!(moves(&vmm) >= 2);
    let mut vmm = shuttle(&guest, &["--expect", "^HB n=9 "]);
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 0);
    assert!(vmm.serial().text().contains("HB n=9 "), "the log is complete");
    let mut vmm = shuttle(&Guest::new("work=hello", 64), &["--expect", "never said"]);
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 4);
    let mut vmm = shuttle(&Guest::new("work=hello code=7", 64), &[]);
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 15);
}

#[test]
#[needs(kvm)]
fn a_killed_shuttle_leaves_no_guest_behind() {
    let mut vmm = shuttle(&Guest::new("work=idle", 64), &[]);
    vmm.wait_line("^HB n=5 ").unwrap();
    let orphans = children(vmm.process.id());
    assert!(!orphans.is_empty());
    vmm.process.kill().unwrap();
    let end = Instant::now() + SOON;
    for orphan in orphans {
        // Who adopts it does not tell us of its end.
        while Path::new(&format!("/proc/{orphan}/exe")).exists() {
            assert!(Instant::now() < end, "process {orphan} goes on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
#[needs(kvm)]
fn a_guest_that_cannot_boot_is_reported_as_without_moves() {
    let usage = ["run", "--kernel", "/dev/null", "--migrate-every", "often"];
    let (code, said) = ferry::end_of(usage).unwrap();
    assert!(code == 2 && said.contains("--migrate-every"), "{said}");
    let arguments = ["run", "--kernel", "/dev/null", "--migrate-every", "1s"];
    let (code, said) = ferry::end_of(arguments).unwrap();
    assert_eq!(code, 126, "{said}");
    assert!(said.contains("/dev/null is not a kernel"), "{said}");
}

#[test]
#[needs(kvm, mounts)]
fn moves_that_are_refused_leave_no_process_and_the_guests_end_is_still_heard() {
    let folder = tempfile::tempdir().unwrap();
    let _small = SmallFileSystem::mount(folder.path(), 16 << 20).unwrap();
    let (path, filler) = (folder.path().join("root"), folder.path().join("filler"));
    image::fill(&filler, 0, 12 << 20, Pattern::Random).unwrap();
    disk::create(&path, 8 << 20).unwrap();
    let mut guest = Guest::new("work=disk", 64).disk("root", &path);
    // A guest that an error has stopped does not move.
    guest.disks[0].push_str(",werror=enospc");
    let mut vmm = ferry::run_with(&guest, &["--migrate-every", "50ms"]).unwrap();
    for _ in 0..5 {
        let said = vmm.process.err.count();
        vmm.process.err.wait_from(said, "move [0-9]+ failed: ", SOON).unwrap();
    }
    // The guest's, one that waits for it, and one that is being killed.
    let processes = children(vmm.process.id());
    assert!(processes.len() <= 3, "{processes:?}");
    std::fs::remove_file(&filler).unwrap();
    vmm.qmp().unwrap().execute("cont", json!({})).unwrap();
    vmm.wait_line("^HB n=2 ").unwrap();
    assert_eq!(vmm.check().unwrap().corrupt, 0);
    vmm.process.type_in("q").unwrap();
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 1, "the guest's own code");
}

#[test]
#[needs(kvm, qemu_img)]
fn a_qcow2_image_moves_with_its_guest_and_nothing_is_allocated_twice() {
    let folder = tempfile::tempdir().unwrap();
    let (base, path) = (folder.path().join("base"), folder.path().join("disk.qcow2"));
    disk::create(&base, 4 << 20).unwrap();
    image::overlay(&path, &base).unwrap();
    let mut guest = Guest::new("work=disk", 64);
    guest.disks.push(format!("path={},id=root,format=qcow2", path.display()));
    let mut vmm = ferry::run_with(&guest, &["--migrate-every", "50ms", "-v"]).unwrap();
    wait_for_move(&vmm, 12);
    assert_eq!(vmm.check().unwrap().corrupt, 0);
    // A reset and its boot change no process, and the image stays with the guest.
    vmm.qmp().unwrap().execute("system_reset", json!({})).unwrap();
    let from = vmm.serial().count();
    vmm.serial().wait_from(from, "^HB n=1 ", SOON).unwrap();
    vmm.process.type_in("q").unwrap();
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 1, "the guest's own code");
    assert!(moves(&vmm) >= 12);
    // `qemu-img check` finds no leak and no error.
    image::assert_same_as((&path, "qcow2"), (&path, "qcow2"));
}
