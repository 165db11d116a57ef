//! One guest, there and back again: small losses add up where one move would hide them.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use anyhow::{Context, Result, ensure};
use ferry_tests::ferry::{self, Guest};
use ferry_tests::process::Vmm;
use ferry_tests::verdict::{Check, Heartbeat, Transcript};
use ferry_tests::{disk, skip};
use std::path::Path;

/// Moves `host`'s guest `count` times, each time to a fresh process, and judges its whole life.
fn hop(mut host: Vmm, count: u32, disk: Option<&Path>) -> Result<(Vmm, Vec<Heartbeat>)> {
    let give = disk.map(|path| format!("disk0={}", path.display()));
    let options: Vec<&str> = give.iter().flat_map(|give| ["--disk", give.as_str()]).collect();
    let mut serials = Vec::new();
    for number in 0..count {
        let destination = ferry::receive_at("tcp:127.0.0.1:0", &options)?;
        ferry::migrate_well(&host, &destination.address, &[])
            .with_context(|| format!("hop {number}"))?;
        serials.push(host.serial().clone());
        host = destination.vmm;
    }
    // Heartbeats are rarer than hops; a few more show that it lives.
    let from = host.serial().count();
    host.serial().wait_from(from + 2, "^HB ", ferry_tests::process::SOON)?;
    let check: Check = host.check()?;
    ensure!(check.corrupt == 0, "{check:?}");
    serials.push(host.serial().clone());
    let life = Transcript::of(&serials);
    let beats = life.judge()?;
    Ok((host, beats))
}

#[test]
fn a_guest_survives_200_hops_with_memory_registers_and_clocks() {
    if skip::kvm_is_missing() {
        return;
    }
    // Heartbeats often, so that hops fall into sending them too.
    let work = "work=dirty fill=random fill_pct=50 ws_mb=4 rate_mbps=40 pattern=rand hb_ms=20";
    let guest = Guest::new(work, 64).cpus(2);
    let host = ferry::run(&guest).unwrap();
    host.wait_line("^HB n=2 ").unwrap();
    let started = std::time::Instant::now();
    let (_host, beats) = hop(host, 200, None).unwrap();
    let wall_us = started.elapsed().as_micros();
    // The guest's clock ran all the time, and no faster than the host's.
    let guest_us = u128::from(beats[beats.len() - 1].time_us - beats[2].time_us);
    assert!(guest_us < wall_us * 11 / 10 + 500_000, "{guest_us} µs in {wall_us} µs");
    assert!(guest_us > wall_us * 9 / 10 - 500_000, "{guest_us} µs in {wall_us} µs");
    for pair in beats.windows(2) {
        let (kvmclock, tsc) = (
            pair[1].kvmclock_us.unwrap_or(0) as i64 - pair[0].kvmclock_us.unwrap_or(0) as i64,
            pair[1].time_us as i64 - pair[0].time_us as i64,
        );
        let agree = pair[0].kvmclock_us.is_none_or(|us| us == 0) || (kvmclock - tsc).abs() < 20_000;
        assert!(agree, "kvmclock and TSC part ways:\n{:?}\n{:?}", pair[0], pair[1]);
    }
}

#[test]
fn a_disk_survives_60_hops_under_writes() {
    if skip::kvm_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    disk::create(&image, 4 << 20).unwrap();
    let guest = Guest::new("work=disk hb_ms=20", 64).disk("disk0", &image);
    let host = ferry::run(&guest).unwrap();
    host.wait_line("^HB n=2 ").unwrap();
    let (host, beats) = hop(host, 60, Some(&image)).unwrap();
    host.qmp().unwrap().execute("stop", serde_json::json!({})).unwrap();
    let generations = disk::verify(&image).unwrap();
    assert!(generations >= beats[beats.len() - 1].generation, "the host lacks acknowledged writes");
}

#[test]
fn sleepers_wake_on_time_through_60_hops() {
    if skip::kvm_is_missing() {
        return;
    }
    for timer in ["deadline", "oneshot"] {
        let guest = Guest::new(&format!("work=idle hb_ms=10 timer={timer}"), 64).cpus(2);
        let host = ferry::run(&guest).unwrap();
        host.wait_line("^HB n=2 ").unwrap();
        hop(host, 30, None).unwrap();
    }
}
