//! What ends while a guest moves: the guest itself, its process, and the last words between the two sides.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Destination, Guest, Migration};
use ferry_tests::frames::{self, Change, Held, kind};
use ferry_tests::hanging::HangingImage;
use ferry_tests::hosts::{Hosts, assert_goes_on, moving, started};
use ferry_tests::image::{Pattern, fill};
use ferry_tests::pair::Pair;
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::verdict::Transcript;
use ferry_tests::{bare, bitmaps, disk, needs};
use serde_json::json;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A guest that dirties its memory faster than it may be sent: it moves until somebody ends that.
fn endless() -> (Vmm, Destination, Migration) {
    let source = started(&Guest::new("work=dirty ws_mb=8 rate_mbps=50", 64));
    let destination = ferry::receive().unwrap();
    let slow = ["--max-bandwidth", "20M", "--downtime-limit", "1ms"];
    let migration = moving(&source, &destination.address, &slow);
    (source, destination, migration)
}

/// Who ended it.
#[derive(Clone, Copy, PartialEq)]
enum By {
    Guest,
    User,
}

/// The client says that the guest has not moved, or that it cannot know since a user has ended its source; the
/// destination ends without a guest.
#[track_caller]
fn assert_nobody_arrives(by: By, migration: Migration, mut destination: Destination) {
    let ended = migration.end(SOON).unwrap();
    // The client may hear of the guest's end or of the migration's first, or of neither before the process ends.
    let words: &[&str] = match ended.code {
        1 if by == By::Guest && !ended.errors.contains("cancelled") => {
            &["migration failed: the guest has ended at the source"]
        }
        1 => &["cancelled", "the guest is at the source and does not run"],
        4 if by == By::User => &["the control socket was closed", "look at both sides"],
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
    assert_nobody_arrives(By::Guest, migration, destination);
}

#[test]
#[needs(kvm)]
fn a_guest_that_ends_with_a_code_while_it_moves_ends_at_the_source_with_it() {
    let (mut source, destination, migration) = endless();
    source.process.type_in("q").unwrap();
    assert_eq!(source.process.exit_code(SOON).unwrap(), 1, "{}", source.process.err.tail());
    assert_nobody_arrives(By::Guest, migration, destination);
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
    assert_nobody_arrives(By::Guest, migration, destination);
}

#[test]
#[needs(kvm)]
fn a_user_that_ends_the_source_while_its_guest_moves_ends_the_guest() {
    let (mut source, destination, migration) = endless();
    source.qmp().unwrap().execute("quit", json!({})).unwrap();
    assert_eq!(source.process.exit_code(SOON).unwrap(), 0, "{}", source.process.err.tail());
    assert_nobody_arrives(By::User, migration, destination);
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let (mut source, destination, migration) = endless();
        source.process.signal(signal).unwrap();
        assert_eq!(source.process.exit_code(SOON).unwrap(), 130, "{}", source.process.err.tail());
        assert_nobody_arrives(By::User, migration, destination);
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
fn lost(pair: &Pair, forth: impl Change, back: impl Change) {
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

/// A guest on the move, whose destination's frame of that kind is on its way to the source.
fn held_at(kind: u8) -> (Pair, Held) {
    let mut pair = Pair::new(&Guest::new("work=dirty ws_mb=8 rate_mbps=50", 64)).unwrap();
    let (back, held) = frames::holding(move |it| it == kind);
    let link = frames::between(&pair.destination.address, frames::unchanged, back).unwrap();
    // Longer than this takes, and than a peer may be silent.
    pair.qmp.execute("migrate-set-parameters", json!({"downtime-limit": 20_000})).unwrap();
    pair.start_by(&link).unwrap();
    held.wait().unwrap();
    (pair, held)
}

#[test]
#[needs(kvm)]
fn a_stop_in_the_pause_is_refused_once_the_guest_has_moved_and_holds_if_it_stays() {
    for moves in [true, false] {
        let (mut pair, held) = held_at(kind::READY);
        let mut other = pair.source.qmp().unwrap();
        other.ask("stop", json!({})).unwrap();
        // It waits: what becomes of the guest is open.
        assert_eq!(pair.qmp.run_state().unwrap(), "finish-migrate");
        if moves {
            drop(held);
            let refusal = other.answer().unwrap_err().to_string();
            assert!(refusal.contains("handed over: stop it at the destination"), "{refusal}");
            assert_eq!(pair.qmp.migration_end().unwrap()["status"], "completed");
            pair.check_moved().unwrap();
            continue;
        }
        held.cut();
        assert_eq!(other.answer().unwrap(), json!({}));
        assert_eq!(pair.qmp.migration_end().unwrap()["status"], "failed");
        assert_eq!(pair.qmp.run_state().unwrap(), "paused");
        // What it had said before may still be on its way: the answer has come after that.
        let said = pair.source.serial().count();
        let beat = pair.source.serial().wait_from(said, "^HB ", Duration::from_millis(500));
        assert!(beat.is_err(), "it runs on: {beat:?}");
        pair.qmp.execute("cont", json!({})).unwrap();
        pair.check_stayed().unwrap();
    }
}

#[test]
#[needs(kvm)]
fn a_cancel_while_the_destination_is_ready_leaves_the_guest_at_the_source() {
    let (mut pair, held) = held_at(kind::READY);
    pair.qmp.execute("migrate_cancel", json!({})).unwrap();
    drop(held);
    assert_eq!(pair.qmp.migration_end().unwrap()["status"], "cancelled");
    pair.check_stayed().unwrap();
    assert_eq!(pair.destination.vmm.process.exit_code(SOON).unwrap(), 126);
    pair.move_after_all().unwrap();
}

#[test]
#[needs(kvm)]
fn a_source_that_is_told_to_end_in_the_handover_says_where_the_guest_may_be() {
    let (mut pair, held) = held_at(kind::RUNNING);
    assert_eq!(pair.qmp.run_state().unwrap(), "postmigrate");
    pair.qmp.execute("quit", json!({})).unwrap();
    assert_eq!(pair.source.process.exit_code(SOON).unwrap(), 0);
    let said = pair.source.process.err.from(0);
    let expected = "ferry: exit 0: ended by `quit`; the guest was being handed over: it may run at the \
                    destination";
    assert_eq!(said.last().unwrap(), expected, "{said:?}");
    drop(held);
    pair.check_moved().unwrap();
}

/// A guest with a dirty bitmap, which runs at the destination while that is on its way: nothing that follows
/// `Go` has come yet.
fn in_last_phase(folder: &Path, address: &str) -> (Vmm, Destination, Migration, Held) {
    let image = folder.join("root.img");
    disk::create(&image, 1 << 20).unwrap();
    let source = started(&Guest::new("work=idle", 64).disk("root", &image));
    bitmaps::add(&mut source.qmp().unwrap(), "daily", 65_536, false);
    let give = format!("root={}", image.display());
    let destination = ferry::receive_at(address, &["--disk", &give]).unwrap();
    let has_gone = AtomicBool::new(false);
    let (forth, held) = frames::holding(move |kind| {
        // The one that comes next.
        has_gone.fetch_or(kind == kind::GO, Ordering::SeqCst)
    });
    let link = frames::between(&destination.address, forth, frames::unchanged).unwrap();
    let migration = ferry::start_migrate(&source, &link, &[]).unwrap();
    held.wait().unwrap();
    let mut qmp = destination.vmm.qmp().unwrap();
    qmp.wait_info(|info| info["status"] == "postcopy-active").unwrap();
    assert_eq!(qmp.run_state().unwrap(), "running");
    (source, destination, migration, held)
}

/// The second signal ends it at once, whatever is left to do.
fn signal_twice(vmm: &mut Vmm) {
    let mut qmp = vmm.qmp().unwrap();
    vmm.process.signal(libc::SIGTERM).unwrap();
    // It may have ended by now, if nothing was left.
    let _ = qmp.wait_event("SHUTDOWN", SOON);
    vmm.process.signal(libc::SIGTERM).unwrap();
}

#[test]
#[needs(kvm, fuse)]
fn the_socket_at_which_a_guest_is_received_goes_before_what_a_hung_disk_holds_up() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", 1 << 20);
    let own = hosts.blank("root", 1 << 20);
    let source = started(&Guest::new("work=idle", 64).disk("root", &own));
    let socket = hosts.at("b", "incoming");
    let give = format!("root={}", image.path().display());
    image.hang();
    let address = format!("unix:{}", socket.display());
    let mut destination = ferry::receive_at(&address, &["--disk", &give]).unwrap();
    let migration = ferry::start_migrate(&source, &address, &[]).unwrap();
    image.wait_until_asked();
    signal_twice(&mut destination.vmm);
    assert_eq!(destination.vmm.process.exit_code(SOON).unwrap(), 130);
    assert!(!socket.exists());
    assert_eq!(migration.end(SOON).unwrap().code, 1);
}

#[test]
#[needs(kvm)]
fn the_socket_at_which_a_guest_is_received_goes_however_that_ends() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("incoming");
    let address = format!("unix:{}", socket.display());
    let end = |vmm: &mut Vmm, how: &str| {
        assert!(socket.exists(), "{how}");
        match how {
            "quit" => drop(vmm.qmp().unwrap().execute("quit", json!({})).unwrap()),
            "SIGTERM" => vmm.process.signal(libc::SIGTERM).unwrap(),
            _ => signal_twice(vmm),
        }
        vmm.process.wait(SOON).unwrap();
        assert!(!socket.exists(), "{how}");
    };
    const WAYS: [&str; 3] = ["quit", "SIGTERM", "two signals"];
    for how in WAYS {
        // Nobody has come.
        end(&mut ferry::receive_at(&address, &[]).unwrap().vmm, how);
        // A guest is arriving.
        let source = started(&Guest::new("work=dirty ws_mb=8 rate_mbps=50", 64));
        let mut destination = ferry::receive_at(&address, &[]).unwrap();
        let slow = ["--max-bandwidth", "20M", "--downtime-limit", "1ms"];
        let migration = moving(&source, &address, &slow);
        end(&mut destination.vmm, how);
        assert_eq!(migration.end(SOON).unwrap().code, 1, "{how}");
        // It is here, and not all that belongs to it.
        let folder = tempfile::tempdir().unwrap();
        let (source, mut destination, migration, held) = in_last_phase(folder.path(), &address);
        end(&mut destination.vmm, how);
        drop((held, source, migration));
    }
    // The source goes.
    let mut source = started(&Guest::new("work=dirty ws_mb=8 rate_mbps=50", 64));
    let mut destination = ferry::receive_at(&address, &[]).unwrap();
    let _migration = moving(&source, &address, &["--max-bandwidth", "20M"]);
    source.process.kill().unwrap();
    assert_eq!(destination.vmm.process.exit_code(SOON).unwrap(), 126);
    assert!(!socket.exists());
    // The guest is here: another may come, to another process.
    let source = started(&Guest::new("work=idle", 64));
    let mut destination = ferry::receive_at(&address, &[]).unwrap();
    ferry::migrate_well(&source, &address, &[]).unwrap();
    destination.vmm.qmp().unwrap().migration_end().unwrap();
    let next = ferry::receive_at(&address, &[]).unwrap();
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
    destination.vmm.process.signal(libc::SIGTERM).unwrap();
    destination.vmm.process.wait(SOON).unwrap();
    assert!(socket.exists(), "it is the other's now");
    drop(next);
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
