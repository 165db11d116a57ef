//! Whatever dies or stalls, and whenever: at most one guest runs, it is whole, and its user is told.
//!
//! The moments are random, anew in every run, and a failure prints its own. Half of them are counted
//! from the start of the migration, over its whole length; the others from the pause, around which a
//! mistake would cost most.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Destination, Guest};
use ferry_tests::hosts::{Hosts, text};
use ferry_tests::pair::Pair;
use ferry_tests::process::SOON;
use ferry_tests::qmp::{ENDS, Qmp, is_end};
use ferry_tests::verdict::Transcript;
use ferry_tests::{disk, needs, seccomp};
use serde_json::{Value, json};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

fn guest() -> Guest {
    Guest::new("work=dirty fill=random fill_pct=50 ws_mb=8 rate_mbps=100 hb_ms=20", 64)
}

fn random_below(limit: u64) -> u64 {
    RandomState::new().build_hasher().finish() % limit
}

/// When something happens to one side.
#[derive(Debug, Clone, Copy)]
enum Moment {
    AfterStart(Duration),
    AfterPause(Duration),
}

impl Moment {
    /// `count` moments for a migration that takes `total` if left alone.
    fn several(count: usize, total: Duration) -> Vec<Self> {
        let micros = u64::try_from(total.as_micros()).unwrap();
        let any = |index| match index % 2 {
            0 => Self::AfterStart(Duration::from_micros(random_below(micros * 5 / 4))),
            _ => Self::AfterPause(Duration::from_micros(random_below(3000))),
        };
        (0..count).map(any).collect()
    }

    /// Waits for it; the migration has just been started. `false` if it ended before.
    fn wait(self, qmp: &mut Qmp) -> bool {
        let after = match self {
            Self::AfterStart(after) => after,
            Self::AfterPause(after) => {
                let pause =
                    |event: &Value| event["event"] == "STOP" || is_end(&event["data"]["status"]);
                if qmp.wait_event_where(SOON, pause).unwrap()["event"] != "STOP" {
                    return false;
                }
                after
            }
        };
        let start = Instant::now();
        // A moment is a point in time, not an event; and microseconds are too short to sleep.
        while start.elapsed() < after {
            std::hint::spin_loop();
        }
        true
    }
}

/// How a migration ended, as the source says: its status, and whether more is known.
fn outcome(pair: &mut Pair) -> (Value, Value) {
    let info = pair.qmp.migration_end().unwrap();
    (info["status"].clone(), info["x-outcome"].clone())
}

/// How long the migration takes when nothing happens to it.
fn undisturbed(guest: &Guest) -> Duration {
    let mut pair = Pair::new(guest).unwrap();
    let start = Instant::now();
    pair.start().unwrap();
    assert_eq!(outcome(&mut pair).0, "completed");
    start.elapsed()
}

#[test]
#[needs(kvm)]
fn a_destination_killed_at_any_moment_never_costs_the_guest() {
    let mut outcomes = [0; 3];
    for moment in Moment::several(30, undisturbed(&guest())) {
        eprintln!("killing the destination at {moment:?}");
        let mut pair = Pair::new(&guest()).unwrap();
        pair.start().unwrap();
        moment.wait(&mut pair.qmp);
        pair.destination.vmm.process.kill().unwrap();
        let (status, outcome) = outcome(&mut pair);
        if status == "completed" {
            // It was killed after the guest had moved: a crash like any other.
            outcomes[0] += 1;
            assert_eq!(pair.qmp.run_state().unwrap(), "postmigrate");
        } else if outcome == "unknown" {
            outcomes[1] += 1;
            assert_eq!(pair.qmp.run_state().unwrap(), "postmigrate");
            pair.qmp.refused("cont", json!({})).unwrap();
            // Its operator has made sure that it does not run there.
            let silent = pair.destination.vmm.serial().text().is_empty();
            pair.qmp.execute("cont", json!({"x-force": true})).unwrap();
            pair.source.wait_next_line("^HB ").unwrap();
            assert_eq!(pair.source.check().unwrap().corrupt, 0);
            if silent {
                pair.check_stayed().unwrap();
            }
        } else {
            outcomes[2] += 1;
            assert_eq!(status, "failed");
            pair.check_stayed().unwrap();
            // And it can still move.
            pair.move_after_all().unwrap();
        }
    }
    let [moved, unknown, stayed] = outcomes;
    eprintln!("moved {moved}, unknown {unknown}, stayed {stayed}");
    assert!(stayed > 0, "no moment was early enough to test anything");
}

#[test]
#[needs(kvm)]
fn a_source_killed_at_any_moment_never_leaves_half_a_guest() {
    for moment in Moment::several(30, undisturbed(&guest())) {
        eprintln!("killing the source at {moment:?}");
        let mut pair = Pair::new(&guest()).unwrap();
        pair.start().unwrap();
        moment.wait(&mut pair.qmp);
        pair.source.process.kill().unwrap();
        // The guest has arrived whole, or never will.
        let serial = pair.destination.vmm.serial();
        if serial.wait_for("^HB ", Duration::from_secs(2)).is_ok() {
            pair.check_moved().unwrap();
        } else {
            assert_ends_or_takes_another(&mut pair.destination);
        }
    }
}

/// A destination to which no guest has come ends; or no source ever introduced itself and it waits on, for
/// which silence is the only sign.
fn assert_ends_or_takes_another(destination: &mut Destination) {
    assert_eq!(destination.vmm.serial().text(), "");
    if destination.vmm.process.wait(Duration::from_secs(1)).is_ok() {
        return assert_eq!(destination.vmm.process.exit_code(SOON).unwrap(), 126);
    }
    assert_eq!(destination.vmm.qmp().unwrap().run_state().unwrap(), "inmigrate");
    // One that hangs would say the same: this one takes the next guest.
    let next = ferry::run(&guest()).unwrap();
    next.wait_line("^HB n=1 ").unwrap();
    ferry::migrate_well(&next, &destination.address, &[]).unwrap();
    ferry::verify_at(&mut destination.vmm, &[next.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn a_destination_that_stalls_costs_time_but_never_makes_two_guests() {
    // A sleeping guest, so that several pairs can wait for the same deadline side by side.
    let guest = Guest::new("work=dirty fill=random fill_pct=50 sleep=1 hb_ms=20", 64);
    let total = undisturbed(&guest);
    let mut stalled = Vec::new();
    for moment in Moment::several(10, total) {
        let mut pair = Pair::new(&guest).unwrap();
        pair.start().unwrap();
        moment.wait(&mut pair.qmp);
        pair.destination.vmm.process.signal(libc::SIGSTOP).unwrap();
        stalled.push((moment, pair));
    }
    for (moment, mut pair) in stalled {
        eprintln!("the destination stalled at {moment:?}");
        let (status, outcome) = outcome(&mut pair);
        let running = pair.qmp.run_state().unwrap() == "running";
        // It wakes up long after the source has given up on it.
        pair.destination.vmm.process.signal(libc::SIGCONT).unwrap();
        if status == "completed" || (outcome == "unknown" && !running) {
            // `Go` has left: the guest can only run there.
            assert!(!running);
            if pair.destination.vmm.wait_line("^HB ").is_ok() {
                pair.check_moved().unwrap();
            } else {
                assert_eq!(outcome, "unknown");
                assert_ends_or_takes_another(&mut pair.destination);
            }
        } else {
            assert_eq!(status, "failed");
            assert!(running);
            pair.check_stayed().unwrap();
            assert_ends_or_takes_another(&mut pair.destination);
        }
    }
}

#[test]
#[needs(kvm)]
fn a_destination_that_dies_is_said_to_be_gone_and_the_guest_to_run_on() {
    for channels in ["1", "3"] {
        let mut pair = Pair::new(&guest()).unwrap();
        let options = ["--max-bandwidth", "20M", "--channels", channels];
        let address = pair.destination.address.clone();
        let migration = ferry::start_migrate(&pair.source, &address, &options).unwrap();
        pair.qmp.wait_event("MIGRATION_PASS", SOON).unwrap();
        pair.destination.vmm.process.kill().unwrap();
        let ended = migration.end(SOON).unwrap();
        assert_eq!(ended.code, 1);
        for said in ["the destination has gone away", "the guest runs on at the source"] {
            assert!(ended.errors.contains(said), "{channels}: {}", ended.errors);
        }
        pair.check_stayed().unwrap();
    }
}

#[test]
#[needs(kvm)]
fn a_stalled_migration_can_be_cancelled() {
    let mut pair = Pair::new(&guest()).unwrap();
    let slow = json!({"max-bandwidth": 20_000_000});
    pair.qmp.execute("migrate-set-parameters", slow).unwrap();
    pair.start().unwrap();
    pair.qmp.wait_migration(&["active"], SOON).unwrap();
    pair.destination.vmm.process.signal(libc::SIGSTOP).unwrap();
    pair.source.wait_next_line("^HB ").unwrap();
    let asked = Instant::now();
    pair.qmp.execute("migrate_cancel", json!({})).unwrap();
    assert_eq!(pair.qmp.wait_migration(&ENDS, SOON).unwrap(), "cancelled");
    assert!(asked.elapsed() < Duration::from_secs(3), "a cancel took {:?}", asked.elapsed());
    pair.destination.vmm.process.signal(libc::SIGCONT).unwrap();
    assert_eq!(pair.destination.vmm.process.exit_code(SOON).unwrap(), 126);
    pair.check_stayed().unwrap();
}

#[test]
#[needs(kvm)]
fn a_destination_that_is_none_or_not_ferry_is_named() {
    let mut source = ferry::run(&guest()).unwrap();
    source.wait_line("^READY ").unwrap();
    let refused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let ended = ferry::migrate(&source, &format!("tcp:{refused}"), &[]).unwrap();
    assert_eq!(ended.code, 1);
    assert!(ended.errors.contains("is `ferry receive` running there?"), "{}", ended.errors);

    let noise: Vec<u8> = (0..65536).map(|_| random_below(256).try_into().unwrap()).collect();
    for answer in
        [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], &[0; 4096], &[0xff; 65536], &noise, b""]
    {
        let liar = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", liar.local_addr().unwrap());
        let answer = answer.to_vec();
        let answering = std::thread::spawn(move || {
            let (mut stream, _) = liar.accept().unwrap();
            // The source may hang up before all is written.
            let _ = stream.write_all(&answer);
            if answer.is_empty() { None } else { Some(stream) }
        });
        let ended = ferry::migrate(&source, &address, &[]).unwrap();
        assert_eq!(ended.code, 1);
        assert!(ended.errors.contains("migration failed"), "{}", ended.errors);
        drop(answering.join().unwrap());
        source.wait_next_line("^HB ").unwrap();
    }
    assert_eq!(source.check().unwrap().corrupt, 0);
    Transcript::of([source.serial()]).judge().unwrap();
}

#[test]
#[needs(kvm)]
fn a_destination_survives_peers_that_are_not_ferry() {
    let mut destination = ferry::receive().unwrap();
    let to = destination.address.strip_prefix("tcp:").unwrap();
    let noise: Vec<u8> = (0..65536).map(|_| random_below(256).try_into().unwrap()).collect();
    for bytes in [&b"GET / HTTP/1.0\r\n\r\n"[..], &[0xff; 4096], &[0; 4096], &noise, b""] {
        // The destination may hang up before all is written.
        let _ = TcpStream::connect(to).unwrap().write_all(bytes);
    }
    let source = ferry::run(&guest()).unwrap();
    source.wait_line("^HB n=1 ").unwrap();
    ferry::migrate_well(&source, &destination.address, &[]).unwrap();
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn a_disk_that_the_destination_lacks_is_named_and_the_lock_stays() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    disk::create(&image, 1 << 20).unwrap();
    let mut source = ferry::run(&Guest::new("work=disk", 64).disk("root", &image)).unwrap();
    source.wait_line("^READY ").unwrap();
    let destination = ferry::receive().unwrap();
    let ended = ferry::migrate(&source, &destination.address, &[]).unwrap();
    assert_eq!(ended.code, 1);
    assert!(ended.errors.contains("--disk root=PATH"), "{}", ended.errors);
    assert_eq!(source.check().unwrap().corrupt, 0);
    assert_locked(&image);
}

/// Another VMM cannot have the image.
fn assert_locked(image: &std::path::Path) {
    let path = format!("path={}", image.display());
    let second = ["run", "--kernel", guest_images::KERNEL, "--disk", &path];
    let (code, text) = ferry::end_of(second).unwrap();
    assert_eq!(code, 126, "{text}");
    assert!(text.contains("in use by another virtual machine"), "{text}");
}

#[test]
#[needs(kvm)]
fn the_lock_comes_back_when_the_last_step_fails() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let guest = Guest::new("work=disk hb_ms=20", 64).disk("root", &image);
    let fresh = || {
        disk::create(&image, 2 << 20).unwrap();
        let source = ferry::run(&guest).unwrap();
        source.wait_line("^HB n=1 ").unwrap();
        source
    };
    let mut source = fresh();
    let (give, mut came_back) = (format!("root={}", image.display()), 0);
    for attempt in 0..12 {
        let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
        let mut qmp = source.qmp().unwrap();
        qmp.want_migration_events().unwrap();
        qmp.execute("migrate", json!({"uri": destination.address})).unwrap();
        let moment = Moment::AfterPause(Duration::from_micros(random_below(2000)));
        moment.wait(&mut qmp);
        destination.vmm.process.kill().unwrap();
        let info = qmp.migration_end().unwrap();
        eprintln!("attempt {attempt}, killed at {moment:?}: {info}");
        if info["status"] == "failed" && info["x-outcome"] != "unknown" {
            assert_eq!(qmp.run_state().unwrap(), "running");
        } else {
            // Only a dead process can have it: its operator takes it back, and the lock with it.
            qmp.execute("cont", json!({"x-force": true})).unwrap();
            if !destination.vmm.serial().text().is_empty() {
                // It had run and written there, so going back in time would show in the disk.
                source.process.kill().unwrap();
                source = fresh();
                continue;
            }
        }
        came_back += 1;
        assert_locked(&image);
        source.wait_next_line("^HB ").unwrap();
        assert_eq!(source.check().unwrap().corrupt, 0);
    }
    assert!(came_back > 0, "no destination was killed early enough to test anything");
}

#[test]
#[needs(kvm)]
fn the_source_hears_that_the_guest_runs_before_a_replaced_image_is_removed() {
    let hosts = Hosts::new();
    let mut source = hosts.busy();
    let replaced = hosts.at("b", "root.img");
    disk::create(&replaced, 24 << 20).unwrap();
    let folder = hosts.at("b", "");
    let options = ["--disk-dir", text(&folder), "--overwrite"];
    let mut destination =
        ferry::receive_prepared("tcp:127.0.0.1:0", &options, seccomp::hang_unlinks).unwrap();
    let migration = ferry::start_migrate(&source, &destination.address, &["--disks", "full"]);
    let ended = migration.unwrap().end(SOON).unwrap();
    assert_eq!(ended.code, 0, "{} {}", ended.errors, ended.summary);
    assert_eq!(source.process.exit_code(SOON).unwrap(), 0, "nothing keeps it");
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
    assert_eq!(destination.vmm.qmp().unwrap().run_state().unwrap(), "running");
    // The old image under the other name: its removal has not ended.
    assert_eq!(hosts.files("b"), ["root.img", "root.img.partial"]);
    let said = destination.vmm.process.err.text();
    assert!(!said.contains("cannot remove"), "it failed instead: {said}");
}
