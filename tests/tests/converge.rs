//! Guests that write faster than the link sends, the limits that hold for them, and what is told of it.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Destination, Guest};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qmp::{Qmp, is_end};
use ferry_tests::verdict::{Heartbeat, Transcript, field};
use ferry_tests::{needs, proxy};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Writes 64 MiB at 200 MB/s, which a link of 40 MB/s cannot keep up with.
fn fast_guest() -> Guest {
    Guest::new("work=dirty fill=random fill_pct=50 ws_mb=64 rate_mbps=200", 192)
}

const CAP: u64 = 40_000_000;

fn start(parameters: Value, auto_converge: bool) -> (Vmm, Destination, Qmp) {
    let source = ferry::run(&fast_guest()).unwrap();
    let destination = ferry::receive().unwrap();
    source.wait_line("^HB n=3 ").unwrap();
    let mut qmp = source.qmp().unwrap();
    let capabilities = json!([
        {"capability": "events", "state": true},
        {"capability": "auto-converge", "state": auto_converge},
    ]);
    qmp.execute("migrate-set-capabilities", json!({"capabilities": capabilities})).unwrap();
    qmp.execute("migrate-set-parameters", parameters).unwrap();
    qmp.execute("migrate", json!({"uri": destination.address})).unwrap();
    (source, destination, qmp)
}

/// Left out while the guest is not throttled, as in QEMU.
fn throttle_of(info: &Value) -> u64 {
    info["cpu-throttle-percentage"].as_u64().unwrap_or(0)
}

/// The guest writes at its own pace again: some heartbeat says so.
fn assert_at_full_speed(vmm: &Vmm) {
    let deadline = Instant::now() + SOON;
    let mut from = vmm.serial().count();
    loop {
        let beat = vmm.serial().wait_from(from, "^HB ", SOON).unwrap();
        from = beat.index + 1;
        let rate = field(&beat.text, "ws_mbps").unwrap();
        if rate > 130 {
            return;
        }
        assert!(Instant::now() < deadline, "the guest stays slow: {}", beat.text);
    }
}

#[test]
#[needs(kvm)]
fn a_guest_that_is_too_fast_is_slowed_down_moves_and_runs_freely_there() {
    let source = ferry::run(&fast_guest()).unwrap();
    let mut destination = ferry::receive().unwrap();
    let settled = source.wait_line("^HB n=5 ").unwrap();
    let first = Heartbeat::parse(&settled.text).unwrap().number;
    let options =
        ["--auto-converge", "--max-bandwidth", "40M", "--downtime-limit", "100ms", "--keep-source"];
    let ended = ferry::migrate_well(&source, &destination.address, &options).unwrap();
    let rounds = ended.summary["x-rounds"].as_array().unwrap();
    assert!(rounds.iter().any(|round| throttle_of(round) >= 20), "{rounds:?}");
    let downtime_us = ended.summary["x-downtime-us"].as_u64().unwrap();
    assert!(downtime_us < 130_000, "{}", ended.summary);
    // The parts are the whole.
    let parts = ended.summary["x-downtime-parts"].as_object().unwrap();
    let sum: u64 = parts.values().map(|part| part.as_u64().unwrap()).sum();
    let rounded_off = parts.len() as u64;
    assert!((sum..=sum + rounded_off).contains(&downtime_us), "{parts:?} of {downtime_us} µs");
    let there = destination.vmm.qmp().unwrap().execute("query-migrate", json!({})).unwrap();
    assert!(there["x-downtime-parts"]["resume"].as_u64().unwrap() > 0, "{there}");
    assert_eq!(there["socket-address"][0]["type"], "inet", "{there}");
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
    assert_at_full_speed(&destination.vmm);
    // Slow, but never standing still, up to the pause itself. A loaded host adds gaps of its own, so it
    // is the usual heartbeat that counts.
    let beats = Transcript::of([source.serial()]).heartbeats();
    let mut gaps: Vec<_> =
        beats.iter().filter(|beat| beat.number > first).map(|beat| beat.max_gap_us).collect();
    gaps.sort_unstable();
    let usual = gaps[gaps.len() / 2];
    assert!(usual < 20_000, "gaps of {usual} µs while it was slowed down: {gaps:?}");
}

#[test]
#[needs(kvm)]
fn throttling_ends_with_a_cancel_and_does_not_hold_up_a_stop() {
    // Nothing but 99 %, and a limit that cannot be kept.
    let parameters = json!({
        "max-bandwidth": CAP, "downtime-limit": 0, "cpu-throttle-initial": 99,
    });
    let (source, destination, mut qmp) = start(parameters, true);
    let info = qmp.wait_info(|info| throttle_of(info) > 0 || is_end(&info["status"])).unwrap();
    assert_eq!((&info["status"], throttle_of(&info)), (&json!("active"), 99), "{info}");
    // What is left takes a minute: a guest that hardly writes any more cannot escape meanwhile.
    qmp.execute("migrate-set-parameters", json!({"max-bandwidth": CAP / 40})).unwrap();
    for _ in 0..10 {
        let began = Instant::now();
        qmp.execute("stop", json!({})).unwrap();
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        qmp.execute("cont", json!({})).unwrap();
    }
    let info = qmp.execute("query-migrate", json!({})).unwrap();
    assert_eq!((&info["status"], throttle_of(&info)), (&json!("active"), 99), "{info}");
    qmp.execute("migrate_cancel", json!({})).unwrap();
    let info = qmp.migration_end().unwrap();
    assert_eq!((&info["status"], throttle_of(&info)), (&json!("cancelled"), 0), "{info}");
    assert_at_full_speed(&source);
    assert_eq!(destination.vmm.serial().text(), "", "no guest ran there");
}

#[test]
#[needs(kvm)]
fn throttling_ends_when_the_destination_dies() {
    let parameters = json!({"max-bandwidth": CAP, "downtime-limit": 1, "max-cpu-throttle": 50});
    let (source, mut destination, mut qmp) = start(parameters, true);
    qmp.wait_info(|info| throttle_of(info) > 0).unwrap();
    destination.vmm.process.kill().unwrap();
    let info = qmp.wait_info(|info| info["status"] == "failed").unwrap();
    assert_eq!(throttle_of(&info), 0, "{info}");
    assert_at_full_speed(&source);
    Transcript::of([source.serial()]).judge().unwrap();
}

#[test]
#[needs(kvm)]
fn a_guest_that_cannot_be_moved_is_not_stopped_and_its_user_is_told() {
    let limit_ms = 50;
    let parameters = json!({"max-bandwidth": CAP, "downtime-limit": limit_ms});
    let (source, mut destination, mut qmp) = start(parameters, false);
    let event = qmp.wait_event("x-migration-not-converging", SOON).unwrap();
    let facts = &event["data"];
    assert!(facts["expected-downtime"].as_u64().unwrap() > limit_ms, "{event}");
    assert_eq!(facts["downtime-limit"], limit_ms, "{event}");
    assert!(facts["bytes-per-second"].as_u64().unwrap() <= CAP, "{event}");
    let info = qmp.execute("query-migrate", json!({})).unwrap();
    assert_eq!(info["status"], "active");
    assert!(info["expected-downtime"].as_u64().unwrap() > limit_ms, "{info}");
    assert!(info["x-not-converging"].is_object(), "{info}");
    // It goes on for as long as it is let, and the guest runs all the time.
    let round = info["ram"]["dirty-sync-count"].as_u64().unwrap();
    let later = |info: &Value| info["ram"]["dirty-sync-count"].as_u64().unwrap() >= round + 2;
    assert_eq!(qmp.wait_info(later).unwrap()["status"], "active");
    assert_at_full_speed(&source);
    // With the cap lifted it is faster than the guest, and keeps the limit.
    qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 0})).unwrap();
    let info =
        qmp.wait_info(|info| info["status"] != "active" && info["status"] != "device").unwrap();
    assert_eq!(info["status"], "completed", "{info}");
    let downtime_us = info["x-downtime-us"].as_u64().unwrap();
    assert!(downtime_us <= limit_ms * 1000 * 13 / 10, "{info}");
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn ferry_migrate_says_what_would_help() {
    let source = ferry::run(&fast_guest()).unwrap();
    let destination = ferry::receive().unwrap();
    source.wait_line("^HB n=3 ").unwrap();
    let options = ["--max-bandwidth", "40M", "--downtime-limit", "30ms"];
    let mut migration = ferry::start_migrate(&source, &destination.address, &options).unwrap();
    let said = migration.client.err.wait_for("does not converge", SOON).unwrap().text;
    for hint in ["--auto-converge", "--max-bandwidth", "--downtime-limit"] {
        assert!(said.contains(hint), "{hint}: {said}");
    }
    migration.client.signal(libc::SIGINT).unwrap();
    assert_eq!(migration.end(SOON).unwrap().code, 1);
}

/// Bytes per 100 ms on the receiving side, of a guest that sleeps, under a cap for all channels together.
fn arrivals(cap: u64, channels: &str) -> Vec<u64> {
    let guest = Guest::new("work=dirty fill=random fill_pct=75 sleep=1", 256);
    let source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    let destination = ferry::receive().unwrap();
    let proxy = proxy::start(&destination.address).unwrap();
    let options = ["--max-bandwidth", &cap.to_string(), "--channels", channels];
    ferry::migrate_well(&source, proxy.address(), &options).unwrap();
    proxy.bytes_per(Duration::from_millis(100))
}

#[test]
#[needs(kvm)]
fn a_cap_is_exact_over_any_second() {
    ["1", "4"].into_iter().for_each(assert_cap_is_exact);
}

fn assert_cap_is_exact(channels: &str) {
    let cap = 50_000_000;
    let mut found = Vec::new();
    // A host that is busy elsewhere delays the counting as well.
    for _ in 0..4 {
        let bins = arrivals(cap, channels);
        // The first and the last tenth of a second are not whole.
        let whole = &bins[1..bins.len() - 2];
        assert!(whole.len() > 20, "{bins:?}");
        let seconds: Vec<u64> = whole.windows(10).map(|second| second.iter().sum()).collect();
        // Delays move bytes from one second to the next, and add none.
        let (sent, most) = (whole.iter().sum::<u64>(), cap * whole.len() as u64 / 10);
        assert!(sent * 100 <= most * 103, "{channels}: {sent} bytes, the cap allows {most}");
        let extremes = (seconds.iter().min().unwrap(), seconds.iter().max().unwrap());
        println!("{extremes:?} bytes in the slowest and the fastest second, the cap is {cap}");
        let exact = |bytes: &u64| (bytes.abs_diff(cap)) * 100 <= cap * 3;
        if seconds.iter().all(exact) {
            return;
        }
        found.push(seconds);
    }
    panic!("{channels}: not within 3 % of {cap} bytes in every second: {found:?}");
}

#[test]
#[needs(kvm)]
fn the_dirty_rate_is_measured_and_never_during_a_migration() {
    let guest = Guest::new("work=dirty fill=random fill_pct=50 ws_mb=32 rate_mbps=100", 128);
    let source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=3 ").unwrap();
    let mut qmp = source.qmp().unwrap();
    let query = |qmp: &mut Qmp| qmp.execute("query-dirty-rate", json!({})).unwrap();
    assert_eq!(query(&mut qmp)["status"], "unstarted");
    let briefly = json!({"calc-time": 200, "calc-time-unit": "millisecond"});
    let measured_from = source.serial().count();
    qmp.execute("calc-dirty-rate", briefly.clone()).unwrap();
    let refused = qmp.refused("calc-dirty-rate", briefly).unwrap();
    assert!(refused.description.contains("being measured"), "{refused}");
    let deadline = Instant::now() + SOON;
    let answer = loop {
        let answer = query(&mut qmp);
        if answer["status"] != "measuring" {
            break answer;
        }
        assert!(Instant::now() < deadline, "{answer}");
        let _ = qmp.wait_event_where(Duration::from_millis(20), |_| true);
    };
    assert_eq!(answer["status"], "measured", "{answer}");
    // 20 MB in 200 ms, were it alone on its host; it cannot be more, but for work that was late.
    let rate = answer["dirty-rate"].as_u64().unwrap();
    assert!((10..=120).contains(&rate), "{answer}");
    source.wait_next_line("^HB ").unwrap();
    let beats = source.serial().from(measured_from);
    let own = beats.iter().filter_map(|line| field(line, "ws_mbps")).min().unwrap();
    // In MiB, and a heartbeat at either end lies partly outside.
    assert!(rate * 105 / 100 + 1 >= own * 7 / 10, "the guest writes {own} MB/s: {answer}");

    // A migration comes first.
    qmp.execute("calc-dirty-rate", json!({"calc-time": 60})).unwrap();
    let destination = ferry::receive().unwrap();
    qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 5_000_000})).unwrap();
    qmp.execute("migrate", json!({"uri": destination.address})).unwrap();
    assert_eq!(query(&mut qmp)["status"], "unstarted");
    let refused = qmp.refused("calc-dirty-rate", json!({"calc-time": 1})).unwrap();
    assert!(refused.description.contains("migration process in progress"), "{refused}");
    // Afterwards it may be measured again.
    qmp.execute("migrate_cancel", json!({})).unwrap();
    assert_eq!(qmp.migration_end().unwrap()["status"], "cancelled");
    qmp.execute("calc-dirty-rate", json!({"calc-time": 1})).unwrap();
    assert_eq!(query(&mut qmp)["status"], "measuring");
}
