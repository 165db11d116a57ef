//! A guest boots again wherever it is: it keeps what it boots from, however often it has moved and
//! whatever has become of the files.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Destination, Guest};
use ferry_tests::hosts::{assert_goes_on, text};
use ferry_tests::image::{Pattern, fill};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::traveller::{Traveller, Way};
use ferry_tests::{disk, needs, proxy, skip};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What makes a kernel's transfer stand out among the other bytes of a migration.
const PADDING_BYTES: u64 = 16 << 20;

/// A copy of the guest's kernel, with `padding_bytes` behind it that no loader looks at.
fn kernel_at(path: &Path, padding_bytes: u64) {
    std::fs::copy(guest_images::KERNEL, path).unwrap();
    let bytes = std::fs::metadata(path).unwrap().len();
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(bytes + padding_bytes)
        .unwrap();
    fill(path, bytes, padding_bytes, Pattern::Random).unwrap();
}

fn idle_guest(kernel: &Path) -> Guest {
    Guest { kernel: kernel.to_owned(), ..Guest::new("work=idle", 64) }
}

/// How a guest comes to be reset.
#[derive(Debug, Clone, Copy)]
enum By {
    User,
    Guest,
}

/// Resets the guest; it boots, and works.
#[track_caller]
fn reset(vmm: &mut Vmm, by: By) {
    let mut qmp = vmm.qmp().unwrap();
    let from = vmm.serial().count();
    match by {
        By::User => drop(qmp.execute("system_reset", json!({})).unwrap()),
        By::Guest => vmm.process.type_in("r").unwrap(),
    }
    let event = qmp.wait_event("RESET", SOON).unwrap();
    assert_eq!(event["data"]["guest"], matches!(by, By::Guest), "{event}");
    // A line of the old guest may have been cut off.
    vmm.serial().wait_from(from, "FERRY guest work=", SOON).unwrap();
    vmm.serial().wait_from(from, "^HB n=1 ", SOON).unwrap();
    assert_eq!(vmm.check().unwrap().corrupt, 0);
    assert_eq!(qmp.run_state().unwrap(), "running");
}

/// Moves the guest to a fresh process, where it goes on.
#[track_caller]
fn hop(guest: &mut Traveller, receive: &[&str]) {
    guest.hop(Way { receive, ..Way::default() }).unwrap();
    guest.vmm.wait_line("^HB ").unwrap();
}

#[test]
#[needs(kvm)]
fn a_guest_that_has_moved_is_reset_by_its_user_and_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    for (hops, what_becomes) in [(1, "deleted"), (3, "replaced"), (3, "deleted")] {
        let kernel = folder.path().join("kernel");
        kernel_at(&kernel, 0);
        let mut guest = Traveller::start(&idle_guest(&kernel)).unwrap();
        match what_becomes {
            "deleted" => std::fs::remove_file(&kernel).unwrap(),
            _ => {
                let other = folder.path().join("other");
                std::fs::write(&other, "not a kernel").unwrap();
                std::fs::rename(&other, &kernel).unwrap();
            }
        }
        for _ in 0..hops {
            hop(&mut guest, &[]);
        }
        for by in [By::User, By::Guest, By::User] {
            reset(&mut guest.vmm, by);
        }
        // The machine that was booted here moves as the first one did.
        hop(&mut guest, &[]);
        for by in [By::Guest, By::User] {
            reset(&mut guest.vmm, by);
        }
    }
}

#[test]
#[needs(kvm)]
fn an_initrd_moves_with_the_guest_and_is_there_for_its_reset() {
    let folder = tempfile::tempdir().unwrap();
    let [kernel, initrd] = ["kernel", "initrd"].map(|name| folder.path().join(name));
    kernel_at(&kernel, 0);
    std::fs::File::create(&initrd).unwrap();
    fill(&initrd, 0, 3_000_001, Pattern::Random).unwrap();
    let guest = Guest { initrd: Some(initrd.clone()), ..idle_guest(&kernel) };
    let mut guest = Traveller::start(&guest).unwrap();
    std::fs::remove_file(&kernel).unwrap();
    std::fs::remove_file(&initrd).unwrap();
    for by in [By::Guest, By::User] {
        hop(&mut guest, &[]);
        let deleted = deleted_files(&guest.vmm);
        assert!(deleted.contains(&3_000_001), "{deleted:?}");
        reset(&mut guest.vmm, by);
    }
}

#[test]
#[needs(kvm)]
fn a_guest_with_a_disk_is_reset_after_a_move_and_keeps_its_disk() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk");
    disk::create(&image, 4 << 20).unwrap();
    let guest = Guest::new("work=disk", 64).disk("root", &image);
    let mut guest = Traveller::start(&guest).unwrap();
    let there = format!("root={}", text(&image));
    for _ in 0..2 {
        hop(&mut guest, &["--disk", &there]);
        for by in [By::User, By::Guest] {
            reset(&mut guest.vmm, by);
        }
    }
    guest.vmm.qmp().unwrap().execute("stop", json!({})).unwrap();
    disk::verify(&image).unwrap();
}

#[test]
#[needs(kvm)]
fn a_paused_guest_is_reset_after_a_move_and_stays_paused() {
    let source = ferry::run(&Guest::new("work=idle", 64)).unwrap();
    source.wait_line("^HB ").unwrap();
    source.qmp().unwrap().execute("stop", json!({})).unwrap();
    let Destination { vmm, address } = ferry::receive().unwrap();
    ferry::migrate_well(&source, &address, &[]).unwrap();
    let mut qmp = vmm.qmp().unwrap();
    qmp.execute("system_reset", json!({})).unwrap();
    assert_eq!(qmp.run_state().unwrap(), "paused");
    assert!(!vmm.serial().text().contains("FERRY"), "{}", vmm.serial().text());
    qmp.execute("cont", json!({})).unwrap();
    vmm.wait_line("FERRY guest work=").unwrap();
    vmm.wait_line("^HB n=1 ").unwrap();
}

#[test]
#[needs(kvm)]
fn a_multiboot_guest_gets_its_command_line_and_modules_again_after_moves() {
    let folder = tempfile::tempdir().unwrap();
    let [kernel, first, second] =
        ["kernel", "first", "second"].map(|name| folder.path().join(name));
    std::fs::copy(guest_images::MULTIBOOT_ELF, &kernel).unwrap();
    std::fs::write(&first, "one").unwrap();
    std::fs::write(&second, "two").unwrap();
    let modules = format!("{} a b,{}", text(&first), text(&second));
    let guest = Guest {
        kernel: kernel.clone(),
        initrd: Some(PathBuf::from(modules)),
        ..Guest::new("wait", 64)
    };
    let mut guest = Traveller::from(ferry::run(&guest).unwrap());
    guest.vmm.wait_line("^WAITING").unwrap();
    // The first line begins with the kernel's name, so that is all of what the guest was told.
    let told = guest.vmm.serial().text();
    assert!(told.contains(&format!("MODULE {} a b HOLDS one", text(&first))), "{told}");
    std::fs::remove_file(&kernel).unwrap();
    std::fs::remove_file(&first).unwrap();
    std::fs::remove_file(&second).unwrap();
    for hops in 1..=3 {
        guest.hop(Way::default()).unwrap();
        let vmm = &mut guest.vmm;
        for by in [By::User, By::Guest] {
            let from = vmm.serial().text().len();
            let line = vmm.serial().count();
            match by {
                By::User => drop(vmm.qmp().unwrap().execute("system_reset", json!({})).unwrap()),
                By::Guest => vmm.process.type_in("r").unwrap(),
            }
            vmm.serial().wait_from(line, "^WAITING", SOON).unwrap();
            assert_eq!(vmm.serial().text()[from..], told, "after {hops} moves, {by:?}");
        }
    }
    guest.vmm.process.type_in("q").unwrap();
    let code = guest.vmm.process.exit_code(SOON).unwrap();
    assert_eq!(code, 2 << 1 | 1, "as many as there are modules");
}

#[test]
#[needs(kvm)]
fn a_shuttled_guest_is_reset_between_its_moves() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    kernel_at(&kernel, 0);
    let options = ["--migrate-every", "200ms", "-v"];
    let mut vmm = ferry::run_with(&idle_guest(&kernel), &options).unwrap();
    vmm.wait_line("^HB ").unwrap();
    std::fs::remove_file(&kernel).unwrap();
    for (number, by) in [(1, By::User), (3, By::Guest), (5, By::User)] {
        vmm.process.err.wait_for(&format!(r"\bmove {number}: "), SOON).unwrap();
        reset(&mut vmm, by);
    }
    vmm.process.err.wait_for(r"\bmove 6: ", SOON).unwrap();
    vmm.process.type_in("q").unwrap();
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 1);
    assert!(!vmm.process.err.text().contains("failed"), "{}", vmm.process.err.text());
}

/// Moves the guest through a link that counts; returns the destination and the bytes that it was sent.
fn counted_hop(source: &Vmm, options: &[&str]) -> (Vmm, u64) {
    let Destination { vmm, address } = ferry::receive_at("tcp:127.0.0.1:0", options).unwrap();
    let proxy = proxy::start(&address).unwrap();
    let ended = ferry::migrate_well(source, proxy.address(), &["--keep-source"]).unwrap();
    vmm.wait_line("^HB ").unwrap();
    let bytes: u64 = proxy.bytes_per(Duration::from_secs(3600)).iter().sum();
    // The statistics know of it.
    let said = ended.summary["ram"]["transferred"].as_u64().unwrap();
    assert!(said.abs_diff(bytes) < PADDING_BYTES / 4, "{bytes} of {}", ended.summary);
    (vmm, bytes)
}

#[test]
#[needs(kvm)]
fn a_kernel_that_the_destination_has_is_not_sent_and_another_of_its_size_does_not_count() {
    let folder = tempfile::tempdir().unwrap();
    let [kernel, same, other] = ["kernel", "same", "other"].map(|name| folder.path().join(name));
    kernel_at(&kernel, PADDING_BYTES);
    std::fs::copy(&kernel, &same).unwrap();
    // Our own kernel and random bytes: it would even boot.
    kernel_at(&other, PADDING_BYTES);
    let start = || {
        let vmm = ferry::run(&idle_guest(&kernel)).unwrap();
        vmm.wait_line("^HB ").unwrap();
        vmm
    };
    let (mut with_same, few) = counted_hop(&start(), &["--kernel", text(&same)]);
    let (mut with_other, many) = counted_hop(&start(), &["--kernel", text(&other)]);
    let (mut with_none, all) = counted_hop(&start(), &[]);
    skip::say(&format!(
        "bytes sent to a destination with the kernel: {few}; with another of its size: {many}; with none: {all}"
    ));
    assert!(few < PADDING_BYTES / 2, "{few}");
    assert!(many > PADDING_BYTES && all > PADDING_BYTES, "{many}, {all}");
    std::fs::remove_file(&kernel).unwrap();
    for vmm in [&mut with_same, &mut with_other, &mut with_none] {
        reset(vmm, By::User);
    }
    // What has arrived is sent on.
    let (mut next, bytes) = counted_hop(&with_other, &[]);
    assert!(bytes > PADDING_BYTES, "{bytes}");
    reset(&mut next, By::Guest);
}

/// Kilobytes, from a process's `/proc/PID/status`.
fn status_kb(vmm: &Vmm, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vmm.process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
}

/// The sizes of files that a process has open, and that have no name any more.
fn deleted_files(vmm: &Vmm) -> Vec<u64> {
    let folder = format!("/proc/{}/fd", vmm.process.id());
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut sizes: Vec<u64> = entries
        .filter(|path| {
            // A descriptor may have been closed since it was listed.
            let target = std::fs::read_link(path).unwrap_or_default();
            target.is_absolute() && target.to_string_lossy().ends_with("(deleted)")
        })
        .filter_map(|path| std::fs::metadata(path).ok())
        .filter(std::fs::Metadata::is_file)
        .map(|metadata| metadata.len())
        .collect();
    sizes.sort_unstable();
    sizes
}

#[test]
#[needs(kvm)]
fn the_copy_at_the_destination_is_an_unlinked_file_and_not_memory() {
    let folder = tempfile::tempdir().unwrap();
    let [large, small] = ["large", "small"].map(|name| folder.path().join(name));
    kernel_at(&large, 64 << 20);
    kernel_at(&small, 0);
    let arrived = |kernel: &Path| {
        let mut guest = Traveller::start(&idle_guest(kernel)).unwrap();
        hop(&mut guest, &[]);
        guest.vmm
    };
    let (mut with_large, mut with_small) = (arrived(&large), arrived(&small));
    let bytes = std::fs::metadata(&large).unwrap().len();
    for when in ["after the move", "after a reset"] {
        assert!(deleted_files(&with_large).contains(&bytes), "{:?}", deleted_files(&with_large));
        let (more, less) = (status_kb(&with_large, "RssAnon"), status_kb(&with_small, "RssAnon"));
        skip::say(&format!(
            "{when}: RssAnon {more} kB with 64 MiB of boot files, {less} kB with none"
        ));
        assert!(more < less + (8 << 10), "{when}: {more} kB and {less} kB");
        reset(&mut with_large, By::User);
        reset(&mut with_small, By::User);
    }
}

#[test]
#[needs(kvm)]
fn a_reset_that_cannot_be_done_is_an_error_and_the_old_machine_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    kernel_at(&kernel, 0);
    let mut vmm = ferry::run(&idle_guest(&kernel)).unwrap();
    vmm.wait_line("^HB ").unwrap();
    // Written over in place: this is no longer what the guest was booted from.
    let bytes = std::fs::read(&kernel).unwrap();
    std::fs::write(&kernel, b"not a kernel").unwrap();
    let mut qmp = vmm.qmp().unwrap();
    let refusal = qmp.refused("system_reset", json!({})).unwrap();
    assert!(refusal.description.contains(text(&kernel)), "{refusal}");
    assert_goes_on(&mut vmm);
    // The same by a guest that has moved, and whose destination used a file of its own.
    std::fs::write(&kernel, &bytes).unwrap();
    let mut guest = Traveller::start(&idle_guest(&kernel)).unwrap();
    let own = folder.path().join("own");
    std::fs::copy(&kernel, &own).unwrap();
    hop(&mut guest, &["--kernel", text(&own)]);
    let mut there = guest.vmm;
    std::fs::write(&own, b"not a kernel").unwrap();
    let mut qmp = there.qmp().unwrap();
    let refusal = qmp.refused("system_reset", json!({})).unwrap();
    assert!(refusal.description.contains("cannot reset the guest"), "{refusal}");
    assert!(refusal.description.contains(text(&own)), "{refusal}");
    assert_eq!(qmp.run_state().unwrap(), "running");
    there.wait_next_line("^HB ").unwrap();
    // A paused one stays paused.
    qmp.execute("stop", json!({})).unwrap();
    qmp.refused("system_reset", json!({})).unwrap();
    assert_eq!(qmp.run_state().unwrap(), "paused");
    qmp.execute("cont", json!({})).unwrap();
    there.wait_next_line("^HB ").unwrap();
    assert_eq!(there.check().unwrap().corrupt, 0);
    // A guest that asks for it itself cannot go on.
    there.process.type_in("r").unwrap();
    assert_ne!(there.process.exit_code(SOON).unwrap(), 0);
    assert!(there.process.err.text().contains(text(&own)), "{}", there.process.err.tail());
}

#[test]
#[needs(kvm)]
fn a_kernel_that_was_overwritten_in_place_stays_behind_and_the_source_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    kernel_at(&kernel, 0);
    let mut guest = Traveller::start(&idle_guest(&kernel)).unwrap();
    // The same bytes, by the same name: who wrote them need not have been done yet.
    std::fs::write(&kernel, std::fs::read(&kernel).unwrap()).unwrap();
    let source = guest.hop(Way::default()).unwrap().source;
    let said = source.process.err.text();
    let warning = "the guest moves without its boot files and cannot be reset there";
    assert!(said.contains(warning) && said.contains("has changed on disk"), "{said}");
    let refused = guest.vmm.qmp().unwrap().execute("system_reset", json!({})).unwrap_err();
    assert!(refused.to_string().contains("kernel"), "{refused}");
    guest.verify().unwrap();
}
