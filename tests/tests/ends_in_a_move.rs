//! What ends while a guest moves: the guest itself, its process, and the last words between the two sides.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Destination, Guest, Migration};
use ferry_tests::frames::{self, kind};
use ferry_tests::hosts::{Hosts, assert_goes_on, moving, started};
use ferry_tests::image::{Pattern, fill};
use ferry_tests::pair::Pair;
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::verdict::Transcript;
use ferry_tests::{bare, needs};
use serde_json::json;

/// A guest that dirties its memory faster than it may be sent: it moves until somebody ends that.
fn endless() -> (Vmm, Destination, Migration) {
    let source = started(&Guest::new("work=dirty ws_mb=8 rate_mbps=50", 64));
    let destination = ferry::receive().unwrap();
    let slow = ["--max-bandwidth", "20M", "--downtime-limit", "1ms"];
    let migration = moving(&source, &destination.address, &slow);
    (source, destination, migration)
}

/// The client has lost its source, and cannot know; the destination ends without a guest.
#[track_caller]
fn assert_nobody_arrives(migration: Migration, mut destination: Destination) {
    let ended = migration.end(SOON).unwrap();
    // The process may end before its client has heard that the migration has.
    let words: &[&str] = match ended.code {
        1 => &["cancelled", "the guest is at the source and does not run"],
        4 => &["the control socket was closed", "look at both sides"],
        code => panic!("{code}: {} {}", ended.errors, ended.summary),
    };
    for word in words {
        assert!(ended.errors.contains(word), "no {word:?}: {}", ended.errors);
    }
    assert_eq!(destination.vmm.process.exit_code(SOON).unwrap(), 126);
    let said = destination.vmm.process.err.text();
    assert!(said.contains("did not arrive"), "{said}");
    assert_eq!(destination.vmm.serial().text(), "", "no guest ran there");
}

#[test]
#[needs(kvm)]
fn a_guest_that_powers_off_while_it_moves_ends_at_the_source() {
    let (mut source, destination, migration) = endless();
    source.process.type_in("p").unwrap();
    assert_eq!(source.process.exit_code(SOON).unwrap(), 0, "{}", source.process.err.tail());
    let said = source.process.err.text();
    assert!(said.contains("exit 0: the guest powered off"), "{said}");
    assert_nobody_arrives(migration, destination);
}

#[test]
#[needs(kvm)]
fn a_guest_that_ends_with_a_code_while_it_moves_ends_at_the_source_with_it() {
    let (mut source, destination, migration) = endless();
    source.process.type_in("q").unwrap();
    assert_eq!(source.process.exit_code(SOON).unwrap(), 1, "{}", source.process.err.tail());
    assert_nobody_arrives(migration, destination);
}

#[test]
#[needs(kvm)]
fn a_guest_that_crashes_while_it_moves_has_crashed_at_the_source() {
    let folder = tempfile::tempdir().unwrap();
    let code = [&bare::SAY, &bare::WAIT_FOR_A_KEY[..], &bare::CRASH];
    let module = folder.path().join("module");
    fill(&module, 0, 16 << 20, Pattern::Random).unwrap();
    let mut guest =
        Guest { kernel: bare::kernel(folder.path(), &code).unwrap(), ..Guest::new("", 64) };
    guest.initrd = Some(module);
    let mut source = ferry::run(&guest).unwrap();
    source.wait_line("^!").unwrap();
    let destination = ferry::receive().unwrap();
    // Sixteen seconds.
    let migration = moving(&source, &destination.address, &["--max-bandwidth", "1M"]);
    source.process.type_in("x").unwrap();
    assert_eq!(source.process.exit_code(SOON).unwrap(), 134, "{}", source.process.err.tail());
    assert!(source.process.err.text().contains("exit 134: the guest crashed"));
    assert_nobody_arrives(migration, destination);
}

#[test]
#[needs(kvm)]
fn a_user_that_ends_the_source_while_its_guest_moves_ends_the_guest() {
    let (mut source, destination, migration) = endless();
    source.qmp().unwrap().execute("quit", json!({})).unwrap();
    assert_eq!(source.process.exit_code(SOON).unwrap(), 0, "{}", source.process.err.tail());
    assert_nobody_arrives(migration, destination);
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let (mut source, destination, migration) = endless();
        source.process.signal(signal).unwrap();
        assert_eq!(source.process.exit_code(SOON).unwrap(), 130, "{}", source.process.err.tail());
        assert_nobody_arrives(migration, destination);
    }
}

#[test]
#[needs(kvm)]
fn a_user_that_ends_the_destination_while_a_guest_moves_there_leaves_it_at_the_source() {
    for signal in [None, Some(libc::SIGTERM)] {
        let (mut source, mut destination, migration) = endless();
        let vmm = &mut destination.vmm;
        match signal {
            Some(signal) => vmm.process.signal(signal).unwrap(),
            None => drop(vmm.qmp().unwrap().execute("quit", json!({})).unwrap()),
        }
        let code = vmm.process.exit_code(SOON).unwrap();
        assert_eq!(code, if signal.is_some() { 130 } else { 0 }, "{}", vmm.process.err.tail());
        let ended = migration.end(SOON).unwrap();
        assert_eq!(ended.code, 1, "{}", ended.errors);
        assert!(ended.errors.contains("the guest runs on at the source"), "{}", ended.errors);
        assert_goes_on(&mut source);
    }
}

fn without_go(kind: u8, payload: Vec<u8>) -> Option<Vec<u8>> {
    (kind != kind::GO).then_some(payload)
}

fn without_running(kind: u8, payload: Vec<u8>) -> Option<Vec<u8>> {
    (kind != kind::RUNNING).then_some(payload)
}

/// Moves the guest over a link that breaks in the handover: the client cannot know, and says so.
fn lost(pair: &Pair, forth: frames::Change, back: frames::Change) {
    let link = frames::between(&pair.destination.address, forth, back).unwrap();
    let ended = ferry::migrate(&pair.source, &link, &[]).unwrap();
    assert_eq!(ended.code, 4, "{} {}", ended.errors, ended.summary);
    assert_eq!(ended.summary["x-outcome"], "unknown", "{}", ended.summary);
    assert!(ended.errors.contains("cont --force"), "{}", ended.errors);
}

/// `ferry ctl SOCKET cont`, with or without force.
fn cont(vmm: &Vmm, force: &[&str]) -> (i32, String) {
    let socket = vmm.socket().to_str().unwrap();
    ferry::end_of([&["ctl", socket, "cont"], force].concat()).unwrap()
}

#[test]
#[needs(kvm)]
fn a_lost_right_to_run_leaves_the_guest_to_who_forces_it() {
    let mut pair = Pair::new(&Guest::new("work=dirty ws_mb=8 rate_mbps=50", 64)).unwrap();
    lost(&pair, without_go, frames::unchanged);
    assert_eq!(pair.qmp.run_state().unwrap(), "postmigrate");
    // It never runs there…
    assert_eq!(pair.destination.vmm.process.exit_code(SOON).unwrap(), 126);
    assert_eq!(pair.destination.vmm.serial().text(), "");
    // …nor here, but for somebody who has made sure of that.
    let (code, said) = cont(&pair.source, &[]);
    assert_ne!(code, 0, "{said}");
    assert_eq!(pair.qmp.run_state().unwrap(), "postmigrate");
    let (code, said) = cont(&pair.source, &["--force"]);
    assert_eq!(code, 0, "{said}");
    pair.check_stayed().unwrap();
    // And it moves after all.
    pair.move_after_all().unwrap();
}

#[test]
#[needs(kvm)]
fn a_lost_answer_leaves_the_guest_at_the_destination_and_paused_at_the_source() {
    let mut pair = Pair::new(&Guest::new("work=dirty ws_mb=8 rate_mbps=50", 64)).unwrap();
    lost(&pair, frames::unchanged, without_running);
    assert_eq!(pair.qmp.run_state().unwrap(), "postmigrate");
    let (code, said) = cont(&pair.source, &[]);
    assert_ne!(code, 0, "{said}");
    pair.check_moved().unwrap();
    assert_eq!(pair.qmp.run_state().unwrap(), "postmigrate");
    assert_eq!(pair.destination.vmm.qmp().unwrap().run_state().unwrap(), "running");
}

#[test]
#[needs(kvm)]
fn a_destination_that_cannot_run_the_guest_in_the_end_gives_it_back() {
    let hosts = Hosts::new();
    let mut source = hosts.busy();
    let mut destination = hosts.receive();
    let slow = ["--disks", "full", "--max-bandwidth", "16M"];
    let migration = moving(&source, &destination.address, &slow);
    // Somebody else makes a file of the image's name, which is taken only when the guest is to run.
    let theirs = hosts.at("b", "root.img");
    std::fs::write(&theirs, "theirs").unwrap();
    let mut qmp = source.qmp().unwrap();
    qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 0})).unwrap();
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 1, "{} {}", ended.errors, ended.summary);
    for word in ["root.img", "the guest runs on at the source"] {
        assert!(ended.errors.contains(word), "no {word:?}: {}", ended.errors);
    }
    assert_ne!(destination.vmm.process.exit_code(SOON).unwrap(), 0);
    assert_eq!(destination.vmm.serial().text(), "", "no guest ran there");
    assert_eq!(std::fs::read(&theirs).unwrap(), b"theirs");
    assert_eq!(hosts.files("b"), ["root.img"]);
    assert_goes_on(&mut source);
    std::fs::remove_file(&theirs).unwrap();
    let mut destination = hosts.receive();
    let fast = ["--disks", "full", "--max-bandwidth", "0"];
    ferry::migrate_well(&source, &destination.address, &fast).unwrap();
    let (_, beats) = ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
    assert!(beats.len() > Transcript::of([source.serial()]).heartbeats().len());
}
