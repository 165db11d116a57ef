//! One guest, there and back again: small losses add up where one move would hide them.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::Guest;
use ferry_tests::process::Vmm;
use ferry_tests::traveller::{Traveller, Way};
use ferry_tests::verdict::Heartbeat;
use ferry_tests::{disk, needs, skip};
use std::time::Instant;

#[test]
#[needs(kvm)]
fn a_guest_survives_200_hops_with_memory_registers_and_clocks() {
    // Heartbeats often, so that hops fall into sending them too.
    let work = "work=dirty fill=random fill_pct=50 ws_mb=4 rate_mbps=40 pattern=rand hb_ms=20";
    let guest = Guest::new(work, 64).cpus(2);
    let mut guest = Traveller::start(&guest).unwrap();
    let first = next_beat(&guest.vmm);
    guest.hop_often(200, Way::default()).unwrap();
    let (_, beats) = guest.verify().unwrap();
    let last = next_beat(&guest.vmm);
    // The guest's clock ran all the time, and no faster than the host's.
    let wall_us = i64::try_from((last.1 - first.1).as_micros()).unwrap();
    let guest_us = last.0.time_us as i64 - first.0.time_us as i64;
    let (drift_us, kvmclock_us) = (
        guest_us - wall_us,
        last.0.kvmclock_us.unwrap() as i64 - first.0.kvmclock_us.unwrap() as i64,
    );
    skip::say(&format!(
        "200 hops: the host's clock went on by {wall_us} µs, the guest's TSC by {drift_us} µs more, its kvmclock by {} µs more",
        kvmclock_us - wall_us
    ));
    assert!(drift_us.abs() < DRIFT_US, "{guest_us} µs in {wall_us} µs");
    let no_kvmclock = first.0.kvmclock_us == Some(0);
    let drift_us = kvmclock_us - wall_us;
    assert!(no_kvmclock || drift_us.abs() < DRIFT_US, "{kvmclock_us} µs in {wall_us} µs");
    for pair in beats.windows(2) {
        let (kvmclock, tsc) = (
            pair[1].kvmclock_us.unwrap() as i64 - pair[0].kvmclock_us.unwrap() as i64,
            pair[1].time_us as i64 - pair[0].time_us as i64,
        );
        let agree = no_kvmclock || (kvmclock - tsc).abs() < 20_000;
        assert!(agree, "kvmclock and TSC part ways:\n{:?}\n{:?}", pair[0], pair[1]);
    }
}

/// How far the guest's clocks may be from the host's after all hops: a quarter of a millisecond a hop. The
/// reading of a heartbeat at either end may be late by some of it, as nothing is lost for good by that.
const DRIFT_US: i64 = 50_000;

/// The next heartbeat, and when it came.
fn next_beat(vmm: &Vmm) -> (Heartbeat, Instant) {
    // Of several, so that one which was read late does not count: it is the smallest delay that is near.
    let beats = (0..10).map(|_| {
        let line = vmm.wait_next_line("^HB ").unwrap();
        (Heartbeat::parse(&line.text).unwrap(), Instant::now())
    });
    let beats: Vec<_> = beats.collect();
    let since = |beat: &(Heartbeat, Instant)| {
        i64::try_from((beat.1 - beats[0].1).as_micros()).unwrap() - beat.0.time_us as i64
    };
    *beats.iter().min_by_key(|beat| since(beat)).unwrap()
}

#[test]
#[needs(kvm)]
fn a_disk_survives_60_hops_under_writes() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    disk::create(&image, 4 << 20).unwrap();
    let guest = Guest::new("work=disk hb_ms=20", 64).disk("disk0", &image);
    let mut guest = Traveller::start(&guest).unwrap();
    let give = format!("disk0={}", image.display());
    guest.hop_often(60, Way { receive: &["--disk", &give], ..Way::default() }).unwrap();
    let (_, beats) = guest.verify().unwrap();
    guest.vmm.qmp().unwrap().execute("stop", serde_json::json!({})).unwrap();
    let generations = disk::verify(&image).unwrap();
    assert!(generations >= beats[beats.len() - 1].generation, "the host lacks acknowledged writes");
}

#[test]
#[needs(kvm)]
fn sleepers_wake_on_time_through_60_hops() {
    for timer in ["deadline", "oneshot"] {
        let guest = Guest::new(&format!("work=idle hb_ms=10 timer={timer}"), 64).cpus(2);
        let mut guest = Traveller::start(&guest).unwrap();
        guest.hop_often(30, Way::default()).unwrap();
        guest.verify().unwrap();
    }
}
