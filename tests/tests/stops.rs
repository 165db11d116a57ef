//! Stops that would take too long, because of a disk or of the link: the guest runs on, its user is told
//! what is at fault, and it moves as soon as it can. What the guest itself saw decides.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Destination, Guest};
use ferry_tests::hanging::HangingImage;
use ferry_tests::hosts::{Hosts, assert_goes_on, started, text};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::proxy::{self, Proxy};
use ferry_tests::qmp::Qmp;
use ferry_tests::verdict::Transcript;
use ferry_tests::{needs, skip};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_millis(20);
const DISK_BYTES: usize = 1 << 20;
/// What a loaded host may add to a gap of the guest's.
const NOISE: Duration = Duration::from_millis(150);
/// How often a stop may fit by good luck, between two requests.
const LUCKY: u32 = 6;

/// A destination that uses the same image.
fn sharing(path: &Path) -> Destination {
    let disk = format!("root={}", text(path));
    ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &disk]).unwrap()
}

/// A client that hears of a migration's steps.
fn listener(source: &Vmm) -> Qmp {
    let mut qmp = source.qmp().unwrap();
    qmp.want_migration_events().unwrap();
    qmp
}

fn start_moving(qmp: &mut Qmp, address: &str, parameters: Value) {
    qmp.execute("migrate-set-parameters", parameters).unwrap();
    qmp.execute("migrate", json!({"uri": address})).unwrap();
}

fn limited(limit: Duration) -> Value {
    json!({"downtime-limit": u64::try_from(limit.as_millis()).unwrap()})
}

fn has_ended(info: &Value) -> bool {
    matches!(info["status"].as_str(), Some("completed" | "failed" | "cancelled"))
}

/// Left out until there was one.
fn called_off(info: &Value) -> u64 {
    info["x-called-off-switches"].as_u64().unwrap_or(0)
}

/// The number of the last heartbeat.
fn last_beat(vmm: &Vmm) -> u64 {
    Transcript::of([vmm.serial()]).heartbeats().last().unwrap().number
}

/// The guest's largest gap in heartbeats after number `after`, up to now.
fn gap_after(vmm: &Vmm, after: u64) -> Duration {
    // What comes next may have been said before; the one after that tells of the time between.
    for _ in 0..2 {
        vmm.wait_next_line("^HB ").unwrap();
    }
    let gap_us = Transcript::of([vmm.serial()]).largest_gap_us(after + 1).unwrap();
    Duration::from_micros(gap_us)
}

/// A migration of a guest and its disk, whose writes are slow, under [`LIMIT`].
struct Slow {
    image: HangingImage,
    source: Vmm,
    destination: Destination,
    qmp: Qmp,
    /// The last heartbeat before the disk was slow.
    first: u64,
}

/// The disk travels: a shared one would have to be flushed, and its flush would wait for its writes.
fn move_off_slow_disk(hosts: &Hosts, name: &str, write: Duration) -> Slow {
    let image = HangingImage::for_test(hosts, name, DISK_BYTES);
    let source = started(&Guest::new("work=disk", 64).disk("root", &image.path()));
    let first = last_beat(&source);
    image.writes_take(write);
    image.wait_for_writes(2);
    let destination = hosts.receive_on("b", &["--overwrite"]);
    let mut qmp = listener(&source);
    qmp.execute("migrate-set-parameters", limited(LIMIT)).unwrap();
    qmp.execute("migrate", json!({"uri": destination.address, "blk": true})).unwrap();
    Slow { image, source, destination, qmp, first }
}

impl Slow {
    /// Checks the guest's whole life when it has moved; returns the largest gap that it saw.
    fn verify(mut self) -> Duration {
        let arrived = ferry::verify_at(&mut self.destination.vmm, &[self.source.serial()]);
        let (_, beats) = arrived.unwrap();
        let later = beats.iter().filter(|beat| beat.number > self.first);
        Duration::from_micros(later.map(|beat| beat.max_gap_us).max().unwrap())
    }
}

#[test]
#[needs(kvm, fuse)]
fn a_disk_whose_requests_outlast_the_limit_is_named_and_its_guest_is_left_alone() {
    let hosts = Hosts::new();
    // So long that a request which has just begun is the rule.
    let write = Duration::from_millis(300);
    for attempt in 1..=LUCKY {
        let mut slow = move_off_slow_disk(&hosts, &format!("disk{attempt}"), write);
        let told = slow.qmp.wait_event_where(SOON, |event| {
            event["event"] == "x-migration-not-converging" || has_ended(&event["data"])
        });
        let told = told.unwrap();
        if told["event"] == "MIGRATION" {
            assert_eq!(told["data"]["status"], "completed", "{told}");
            continue;
        }
        let part = told["data"]["part"]["name"].as_str().unwrap();
        let desc = told["data"]["desc"].as_str().unwrap();
        assert!(part.contains("disk `root`"), "{told}");
        assert!(desc.contains("disk `root`") && desc.contains("20 ms"), "{told}");
        slow.image.wait_for_writes(10);
        let info = slow.qmp.execute("query-migrate", json!({})).unwrap();
        if has_ended(&info) {
            continue;
        }
        assert_eq!(info["x-not-converging"]["part"]["name"], part, "{info}");
        let tried = called_off(&info);
        slow.qmp.execute("migrate-set-parameters", limited(Duration::from_secs(3))).unwrap();
        let end = slow.qmp.migration_end().unwrap();
        assert_eq!(end["status"], "completed", "{end}");
        let gap = slow.verify();
        let downtime = Duration::from_micros(end["x-downtime-us"].as_u64().unwrap());
        skip::say(&format!(
            "writes of 300 ms, limit 20 ms: {desc:?}; {tried} stops called off in 3 s; with a limit of 3 s \
             moved with a downtime of {downtime:?}; the guest's largest gap {gap:?}"
        ));
        assert!((1..=8).contains(&tried), "{end}");
        assert!(gap < write + downtime.max(LIMIT) + NOISE, "{gap:?}");
        return;
    }
    panic!("the guest moved {LUCKY} times within {LIMIT:?}, with requests of {write:?}");
}

#[test]
#[needs(kvm, fuse)]
fn a_disk_that_is_a_little_too_slow_never_keeps_its_guest_stopped() {
    let hosts = Hosts::new();
    let write = Duration::from_millis(30);
    let mut slow = move_off_slow_disk(&hosts, "disk", write);
    let began = Instant::now();
    // One of its stops falls into the end of a request, or it is allowed more.
    let by_itself = Duration::from_secs(4);
    let moved = slow.qmp.wait_event_where(by_itself, |event| has_ended(&event["data"])).is_ok();
    let info = slow.qmp.execute("query-migrate", json!({})).unwrap();
    let (tried, at_first) = (called_off(&info), began.elapsed());
    slow.qmp.execute("migrate-set-parameters", limited(Duration::from_secs(1))).unwrap();
    let end = slow.qmp.migration_end().unwrap();
    assert_eq!(end["status"], "completed", "{end}");
    let gap = slow.verify();
    let downtime = Duration::from_micros(end["x-downtime-us"].as_u64().unwrap());
    skip::say(&format!(
        "writes of 30 ms, limit 20 ms: moved by itself: {moved}, {tried} stops called off in {at_first:?}; downtime \
         {downtime:?}, the guest's largest gap {gap:?}"
    ));
    assert!(tried <= 8, "{end}");
    assert!(gap < write + downtime.max(LIMIT) + NOISE, "{gap:?}");
}

#[test]
#[needs(kvm, fuse)]
fn a_shared_disk_with_much_to_flush_is_flushed_before_the_pause() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", DISK_BYTES);
    let source = started(&Guest::new("work=idle", 64).disk("root", &image.path()));
    let mut destination = sharing(&image.path());
    let flush = Duration::from_secs(2);
    image.next_flush_takes(flush);
    let mut qmp = listener(&source);
    let began = Instant::now();
    start_moving(&mut qmp, &destination.address, limited(LIMIT));
    let end = qmp.migration_end().unwrap();
    let took = began.elapsed();
    assert_eq!(end["status"], "completed", "{end}");
    let (_, beats) = ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
    let gap = Duration::from_micros(beats.iter().map(|beat| beat.max_gap_us).max().unwrap());
    let downtime = Duration::from_micros(end["x-downtime-us"].as_u64().unwrap());
    skip::say(&format!(
        "a flush of 2 s, limit 20 ms: moved in {took:?}, downtime {downtime:?}, the guest's largest gap {gap:?}, {} \
         flushes, {} stops called off",
        image.flushes(),
        called_off(&end)
    ));
    assert!(took >= flush, "{took:?}: the flush was not waited for");
    assert!(downtime < LIMIT + NOISE && gap < LIMIT + NOISE, "{downtime:?}, {gap:?}");
}

#[test]
#[needs(kvm, fuse)]
fn a_shared_disk_that_always_takes_long_to_flush_is_named_and_its_guest_is_not_stopped() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", DISK_BYTES);
    let source = started(&Guest::new("work=idle", 64).disk("root", &image.path()));
    let first = last_beat(&source);
    let mut destination = sharing(&image.path());
    image.flushes_take(Duration::from_secs(2));
    let mut qmp = listener(&source);
    start_moving(&mut qmp, &destination.address, limited(LIMIT));
    let told = qmp.wait_event("x-migration-not-converging", SOON).unwrap();
    assert!(told["data"]["part"]["name"].as_str().unwrap().contains("disk `root`"), "{told}");
    let flushes = image.flushes();
    while image.flushes() < flushes + 2 {
        source.wait_next_line("^HB ").unwrap();
    }
    let gap = gap_after(&source, first);
    let info = qmp.execute("query-migrate", json!({})).unwrap();
    assert_eq!(info["status"], "active", "{info}");
    assert_eq!(called_off(&info), 0, "it is measured without stopping the guest: {info}");
    qmp.execute("migrate-set-parameters", limited(Duration::from_secs(6))).unwrap();
    let end = qmp.migration_end().unwrap();
    skip::say(&format!(
        "each flush 2 s, limit 20 ms: {}; the guest's largest gap {gap:?}; with a limit of 6 s a downtime of {} us",
        told["data"]["desc"], end["x-downtime-us"]
    ));
    assert_eq!(end["status"], "completed", "{end}");
    assert!(gap < LIMIT + NOISE, "{gap:?}");
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm, fuse)]
fn ferry_migrate_says_which_disk_takes_too_long_and_what_helps() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", DISK_BYTES);
    let mut source = started(&Guest::new("work=idle", 64).disk("root", &image.path()));
    let destination = sharing(&image.path());
    image.flushes_take(Duration::from_millis(300));
    let options = ["--downtime-limit", "20ms"];
    let mut migration = ferry::start_migrate(&source, &destination.address, &options).unwrap();
    let said = migration.client.err.wait_for("does not converge", SOON).unwrap().text;
    skip::say(&said);
    assert!(said.contains("flushing disk `root` takes "), "{said}");
    assert!(
        said.contains("the downtime limit is 20 ms: raise it with a --downtime-limit"),
        "{said}"
    );
    migration.client.signal(libc::SIGINT).unwrap();
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 1, "{}", ended.summary);
    assert_eq!(ended.errors.matches("does not converge").count(), 1, "{}", ended.errors);
    assert_goes_on(&mut source);
}

/// A guest whose stop takes some 500 ms, of the [`LINK_LIMIT`] that it may take, as its last 8 MB go over a link
/// of 16 MB/s; the link changes in the middle of that.
fn stopped_over(change: impl FnOnce(&Proxy)) -> (Vmm, Destination, Proxy, Qmp, u64) {
    let guest = Guest::new("work=dirty fill=random fill_pct=30 ws_mb=8 rate_mbps=400 hb_ms=20", 64);
    let source = started(&guest);
    let first = last_beat(&source);
    let destination = ferry::receive().unwrap();
    let proxy = proxy::start(&destination.address).unwrap();
    let mut qmp = listener(&source);
    let mut parameters = limited(LINK_LIMIT);
    parameters["max-bandwidth"] = json!(16_000_000);
    start_moving(&mut qmp, proxy.address(), parameters);
    qmp.wait_event("STOP", SOON).unwrap();
    change(&proxy);
    (source, destination, proxy, qmp, first)
}

const LINK_LIMIT: Duration = Duration::from_secs(1);

#[test]
#[needs(kvm)]
fn a_link_that_becomes_slow_in_the_pause_does_not_keep_the_guest_stopped() {
    let (source, mut destination, proxy, mut qmp, first) =
        stopped_over(|proxy| proxy.limit(Some(200_000)));
    qmp.wait_event("RESUME", SOON).unwrap();
    let gap = gap_after(&source, first);
    proxy.limit(None);
    let end = qmp.migration_end().unwrap();
    assert_eq!(end["status"], "completed", "{end}");
    let tried = called_off(&end);
    skip::say(&format!(
        "a link that becomes slow in the pause, limit 1 s: the guest's largest gap {gap:?}, {tried} stops called \
         off, then moved with a downtime of {} us",
        end["x-downtime-us"]
    ));
    assert!(gap < LINK_LIMIT + NOISE, "{gap:?}");
    assert!((1..=4).contains(&tried), "{end}");
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn a_link_that_dies_in_the_pause_does_not_keep_the_guest_stopped() {
    let (mut source, mut destination, proxy, mut qmp, first) =
        stopped_over(|proxy| proxy.limit(Some(0)));
    let stopped = Instant::now();
    qmp.wait_event("RESUME", SOON).unwrap();
    let resumed = stopped.elapsed();
    let gap = gap_after(&source, first);
    let end = qmp.migration_end().unwrap();
    skip::say(&format!(
        "a link that dies in the pause, limit 1 s: resumed after {resumed:?}, the guest's largest gap {gap:?}; given \
         up after {:?}: {}",
        stopped.elapsed(),
        end["error-desc"]
    ));
    assert_eq!(end["status"], "failed", "{end}");
    assert!(gap < LINK_LIMIT + NOISE, "{gap:?}");
    assert_goes_on(&mut source);
    proxy.limit(None);
    assert_ne!(destination.vmm.process.exit_code(SOON).unwrap(), 0);
    assert_eq!(destination.vmm.serial().text(), "", "no guest ran there");
}
