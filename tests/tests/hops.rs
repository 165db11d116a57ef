//! One guest moved many times, there and back, until any small loss would have shown.

use ferry_tests::ferry::{self, Guest};
use ferry_tests::lines::Lines;
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::verdict::Transcript;
use ferry_tests::{disk, skip};

/// Moves the guest `hops` times, then has it check everything and judges its whole life.
fn hop(guest: &Guest, more: &[&str], hops: usize) -> Vmm {
    let mut here = ferry::run(guest).unwrap();
    here.wait_line("READY ").unwrap();
    let mut lives: Vec<Lines> = Vec::new();
    for _ in 0..hops {
        let there = ferry::receive_at("tcp:127.0.0.1:0", more).unwrap();
        ferry::migrate_well(&here, &there.address, &["--downtime-limit", "50ms"]).unwrap();
        let mut left = std::mem::replace(&mut here, there.vmm);
        assert_eq!(left.process.exit_code(SOON).unwrap(), 0, "the source quits after a move");
        lives.push(left.serial().clone());
    }
    let check = here.check().unwrap();
    assert_eq!(check.corrupt, 0, "{}", here.serial().tail());
    lives.push(here.serial().clone());
    Transcript::of(&lives).judge().unwrap();
    here
}

#[test]
fn two_hundred_hops_lose_nothing_of_memory_registers_and_clocks() {
    if skip::kvm_is_missing() {
        return;
    }
    let guest = Guest::new("work=dirty fill=random fill_pct=50 ws_mb=8 rate_mbps=50 hb_ms=50", 64);
    hop(&guest, &[], 200);
}

#[test]
fn twenty_hops_lose_nothing_of_a_disk() {
    if skip::kvm_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    disk::create(&image, 2 << 20).unwrap();
    let guest = Guest::new("work=disk hb_ms=50", 64).disk("disk0", &image);
    let given = format!("disk0={}", image.display());
    let mut last = hop(&guest, &["--disk", &given], 20);
    last.process.kill().unwrap();
    disk::verify(&image).unwrap();
}

#[test]
fn a_sleeping_guest_is_woken_by_its_timer_after_every_hop() {
    if skip::kvm_is_missing() {
        return;
    }
    for timer in ["deadline", "oneshot"] {
        hop(&Guest::new(&format!("work=idle hb_ms=20 timer={timer}"), 64), &[], 10);
    }
}
