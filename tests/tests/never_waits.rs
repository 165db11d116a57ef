//! The control socket, signals and `--timeout` while a disk hangs: a query is answered at once, what was
//! asked for ends with an error that names the disk, and the process ends when it is told to.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::hanging::HangingImage;
use ferry_tests::hosts::{Hosts, assert_goes_on, started, text};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qmp::Qmp;
use ferry_tests::{disk, needs, skip};
use serde_json::json;
use std::time::{Duration, Instant};

/// What the control socket promises is 50 ms; a loaded host is given more.
const AT_ONCE: Duration = Duration::from_millis(500);
/// What the process promises is 2 s.
const ENDS_WITHIN: Duration = Duration::from_secs(4);
const DISK_BYTES: usize = 8 << 20;
const QUERIES: [&str; 5] =
    ["query-status", "query-block", "query-blockstats", "query-migrate", "query-cpus-fast"];

fn guest_on(image: &HangingImage) -> Guest {
    Guest::new("work=disk", 64).disk("root", &image.path())
}

/// Asks every query several times, and says how long the longest took.
fn assert_answers(qmp: &mut Qmp, when: &str) {
    let mut longest = Duration::ZERO;
    for _ in 0..20 {
        for query in QUERIES {
            let asked = Instant::now();
            qmp.execute(query, json!({})).unwrap();
            longest = longest.max(asked.elapsed());
        }
    }
    skip::say(&format!("{when}: the longest of 100 queries took {longest:?}"));
    assert!(longest < AT_ONCE, "{when}: {longest:?}");
}

fn assert_ends(vmm: &mut Vmm, expected_code: i32, when: &str) {
    let told = Instant::now();
    let code = vmm.process.exit_code(SOON).unwrap();
    let took = told.elapsed();
    skip::say(&format!("{when}: ended after {took:?}"));
    assert!(took < ENDS_WITHIN, "{when}: {took:?}");
    assert_eq!(code, expected_code, "{when}: {}", vmm.process.err.tail());
}

#[test]
#[needs(kvm, fuse)]
fn a_stop_on_a_disk_that_hangs_stops_the_vcpus_names_the_disk_and_can_be_undone() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", DISK_BYTES);
    let mut vmm = started(&guest_on(&image));
    let (mut user, mut other) = (vmm.qmp().unwrap(), vmm.qmp().unwrap());
    image.hang();
    image.wait_until_asked();
    user.ask("stop", json!({})).unwrap();
    other.wait_event("STOP", SOON).unwrap();
    assert_eq!(other.run_state().unwrap(), "paused");
    assert_answers(&mut other, "while the guest is being stopped");
    let refusal = user.answer().unwrap_err().to_string();
    assert!(refusal.contains("disk `root`"), "{refusal}");
    // It goes on as if it had not been stopped, also before its requests have ended.
    user.execute("cont", json!({})).unwrap();
    other.wait_event("RESUME", SOON).unwrap();
    assert_eq!(other.run_state().unwrap(), "running");
    image.go_on();
    assert_goes_on(&mut vmm);
    // With a disk that answers a stop is what it was.
    user.execute("stop", json!({})).unwrap();
    assert_eq!(other.run_state().unwrap(), "paused");
    disk::verify(&image.path()).unwrap();
}

#[test]
#[needs(kvm, fuse)]
fn what_a_client_asks_after_a_request_that_waits_is_answered_in_order() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", DISK_BYTES);
    let vmm = started(&guest_on(&image));
    let (mut user, mut other) = (vmm.qmp().unwrap(), vmm.qmp().unwrap());
    image.hang();
    image.wait_until_asked();
    user.ask("stop", json!({})).unwrap();
    user.ask("query-status", json!({})).unwrap();
    other.wait_event("STOP", SOON).unwrap();
    other.execute("cont", json!({})).unwrap();
    image.go_on();
    // The answer to its last command comes after the one before; its state is of then.
    assert_eq!(user.answer().unwrap()["status"], "running");
}

#[test]
#[needs(kvm, fuse)]
fn the_process_ends_when_told_to_whatever_its_disk_does() {
    let hosts = Hosts::new();
    for (index, how) in
        ["quit", "SIGTERM", "quit while it stops", "a second signal"].iter().enumerate()
    {
        let image = HangingImage::for_test(&hosts, &format!("disk{index}"), DISK_BYTES);
        let mut vmm = started(&guest_on(&image));
        let mut qmp = vmm.qmp().unwrap();
        image.hang();
        image.wait_until_asked();
        let code = match *how {
            "quit" => {
                qmp.execute("quit", json!({})).unwrap();
                0
            }
            "quit while it stops" => {
                qmp.ask("stop", json!({})).unwrap();
                // Not behind the stop.
                qmp.execute("quit", json!({})).unwrap();
                0
            }
            "SIGTERM" => {
                vmm.process.signal(libc::SIGTERM).unwrap();
                130
            }
            _ => {
                vmm.process.signal(libc::SIGTERM).unwrap();
                qmp.wait_event("SHUTDOWN", SOON).unwrap();
                vmm.process.signal(libc::SIGTERM).unwrap();
                130
            }
        };
        assert_ends(&mut vmm, code, how);
        let said = vmm.process.err.text();
        assert!(said.contains("disk `root`") || *how == "a second signal", "{how}: {said}");
    }
}

#[test]
#[needs(kvm, fuse)]
fn a_timeout_ends_the_process_whatever_its_disk_does() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", DISK_BYTES);
    let mut vmm = ferry::run_with(&guest_on(&image), &["--timeout", "5s"]).unwrap();
    vmm.wait_line("^HB ").unwrap();
    image.hang();
    vmm.process.err.wait_for("--timeout has passed", SOON).unwrap();
    assert_ends(&mut vmm, 124, "--timeout");
}

#[test]
#[needs(kvm, fuse)]
fn a_guest_whose_disk_hangs_from_the_start_can_be_asked_and_ended() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", DISK_BYTES);
    image.hang();
    let mut vmm = ferry::run(&guest_on(&image)).unwrap();
    let mut qmp = vmm.qmp().unwrap();
    image.wait_until_asked();
    assert_eq!(qmp.run_state().unwrap(), "prelaunch");
    assert_answers(&mut qmp, "while the disk is opened");
    qmp.execute("quit", json!({})).unwrap();
    assert_ends(&mut vmm, 0, "quit while the disk is opened");
}

#[test]
#[needs(kvm, fuse)]
fn a_migration_that_cannot_pause_the_guest_lets_it_run_and_can_be_cancelled() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", DISK_BYTES);
    let mut source = started(&guest_on(&image));
    let elsewhere = hosts.blank("other", DISK_BYTES as u64);
    let give = format!("root={}", text(&elsewhere));
    let destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap();
    // The other asks nothing that takes events from it.
    let (mut qmp, mut other) = (source.qmp().unwrap(), source.qmp().unwrap());
    image.hang();
    image.wait_until_asked();
    let limit = json!({"downtime-limit": 20});
    qmp.execute("migrate-set-parameters", limit).unwrap();
    qmp.execute("migrate", json!({"uri": destination.address})).unwrap();
    qmp.wait_info(|info| info["status"] != "setup").unwrap();
    assert_answers(&mut qmp, "while a migration tries to pause");
    qmp.execute("migrate_cancel", json!({})).unwrap();
    let ended = qmp.migration_end().unwrap();
    assert_ne!(ended["status"], "completed", "{ended}");
    // What came before the answer has been read with it.
    assert_eq!(other.run_state().unwrap(), "running");
    // Clients hear of a pause when it has worked.
    assert!(other.wait_event("STOP", Duration::from_millis(1)).is_err());
    image.go_on();
    assert_goes_on(&mut source);
}

#[test]
#[needs(kvm, fuse)]
fn an_arriving_guest_whose_disk_hangs_can_be_asked_cancelled_and_ended() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", DISK_BYTES);
    let own = hosts.blank("root", DISK_BYTES as u64);
    let mut source = started(&Guest::new("work=disk", 64).disk("root", &own));
    let give = format!("root={}", text(&image.path()));
    image.hang();
    for how in ["quit", "SIGTERM", "--timeout", "the source gives up"] {
        let mut options = vec!["--disk", give.as_str()];
        if how == "--timeout" {
            options.extend(["--timeout", "3s"]);
        }
        let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &options).unwrap();
        let mut qmp = destination.vmm.qmp().unwrap();
        let mut migration = ferry::start_migrate(&source, &destination.address, &[]).unwrap();
        image.wait_until_asked();
        if how != "--timeout" {
            assert_answers(&mut qmp, "while a machine is built for a guest that arrives");
            assert_eq!(qmp.run_state().unwrap(), "inmigrate");
        }
        let code = match how {
            "quit" => {
                qmp.execute("quit", json!({})).unwrap();
                0
            }
            "SIGTERM" => {
                destination.vmm.process.signal(libc::SIGTERM).unwrap();
                130
            }
            "--timeout" => {
                qmp.wait_event("SHUTDOWN", SOON).unwrap();
                124
            }
            _ => {
                migration.client.signal(libc::SIGINT).unwrap();
                126
            }
        };
        assert_ends(&mut destination.vmm, code, &format!("{how} while a guest arrives"));
        assert_eq!(migration.end(SOON).unwrap().code, 1, "{how}");
        assert_goes_on(&mut source);
    }
}

#[test]
#[needs(kvm, fuse)]
fn a_reset_waits_for_a_disk_that_hangs_and_the_guest_goes_on_if_that_takes_too_long() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", DISK_BYTES);
    let mut vmm = started(&guest_on(&image));
    let (mut user, mut other) = (vmm.qmp().unwrap(), vmm.qmp().unwrap());
    image.hang();
    image.wait_until_asked();
    user.ask("system_reset", json!({})).unwrap();
    assert_answers(&mut other, "while the guest is being reset");
    let refusal = user.answer().unwrap_err().to_string();
    assert!(refusal.contains("disk `root`"), "{refusal}");
    assert_eq!(other.run_state().unwrap(), "running");
    image.go_on();
    assert_goes_on(&mut vmm);
    // It can be done now.
    user.execute("system_reset", json!({})).unwrap();
    other.wait_event("RESET", SOON).unwrap();
    let from = vmm.serial().count();
    vmm.serial().wait_from(from, "^HB n=1 ", SOON).unwrap();
}
