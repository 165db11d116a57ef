//! Whole migrations between real processes, verified by the guest.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qmp::Qmp;
use ferry_tests::traveller::{Traveller, Way};
use ferry_tests::verdict::Transcript;
use ferry_tests::{disk, needs, seccomp};
use serde_json::json;
use std::process::Command;
use std::time::{Duration, Instant};

/// Boots `guest`, moves it over `address`, and has it verified at the destination.
fn move_and_verify(guest: &Guest, address: &str, options: &[&str]) {
    let mut traveller = Traveller::start(guest).unwrap();
    let hop = traveller.hop(Way { address, migrate: options, ..Way::default() }).unwrap();
    let summary = hop.ended.summary;
    assert_eq!(summary["status"], "completed");
    assert!(summary["ram"]["total"].as_u64().unwrap() >= guest.memory_mb << 20);
    traveller.verify().unwrap();
    // A CPU that wakes once per heartbeat may miss one by a hair; one that died misses all.
    traveller.vmm.wait_line(&format!("^HB .* alive={} ", guest.cpus)).unwrap();
}

#[test]
#[needs(kvm)]
fn sleeping_and_spinning_guests_move_over_tcp_and_unix() {
    let folder = tempfile::tempdir().unwrap();
    for (index, work) in ["work=idle", "work=spin fill=random"].iter().enumerate() {
        let guest = Guest::new(work, 128);
        move_and_verify(&guest, "tcp:127.0.0.1:0", &[]);
        let path = folder.path().join(format!("migrate-{index}"));
        move_and_verify(&guest, &format!("unix:{}", path.display()), &[]);
    }
}

#[test]
#[needs(kvm)]
fn every_kind_of_page_arrives_while_it_is_written() {
    for fill in ["random", "text", "zero"] {
        for pattern in ["seq", "rand"] {
            let work = format!("work=dirty fill={fill} ws_mb=32 rate_mbps=100 pattern={pattern}");
            move_and_verify(
                &Guest::new(&work, 128),
                "tcp:127.0.0.1:0",
                &["--downtime-limit", "50ms"],
            );
        }
    }
}

/// `KVM_ENABLE_CAP` of a VM, by which KVM is asked for a dirty log that is cleared by hand.
const KVM_ENABLE_CAP: u32 = 0x4068_aea3;

#[test]
#[needs(kvm)]
fn a_kvm_whose_dirty_log_is_cleared_when_it_is_read_loses_no_page() {
    for channels in ["1", "4"] {
        let work = "work=dirty fill=random ws_mb=32 rate_mbps=200 pattern=rand";
        let guest = Guest::new(work, 128);
        let lacks_it = |command: &mut Command| seccomp::refuse_ioctl(command, KVM_ENABLE_CAP);
        let vmm = ferry::run_prepared(&guest, &["-vv"], lacks_it).unwrap();
        vmm.process.err.wait_for("dirty log mode Manual refused", SOON).unwrap();
        vmm.wait_line("^HB n=2 ").unwrap();
        let mut traveller = Traveller::from(vmm);
        let migrate = ["--channels", channels, "--downtime-limit", "50ms"];
        let hop = traveller.hop(Way { migrate: &migrate, ..Way::default() }).unwrap();
        let rounds = hop.ended.summary["ram"]["dirty-sync-count"].as_u64().unwrap();
        assert!(rounds > 1, "no round has read the log: {}", hop.ended.summary);
        traveller.verify().unwrap();
    }
}

#[test]
#[needs(kvm)]
fn guests_with_1_2_and_4_cpus_move() {
    for cpus in [1, 2, 4] {
        for work in ["work=idle", "work=dirty fill=random ws_mb=16 rate_mbps=50 pattern=rand"] {
            move_and_verify(&Guest::new(work, 128).cpus(cpus), "tcp:127.0.0.1:0", &[]);
        }
    }
}

#[test]
#[needs(kvm)]
fn memory_past_the_hole_below_4_gib_moves() {
    let guest = Guest::new("work=dirty fill=random fill_pct=3 ws_mb=16 rate_mbps=50", 5120);
    move_and_verify(&guest, "tcp:127.0.0.1:0", &[]);
    // That one fills its RAM from below; this one has content above the hole too, and checks it there.
    let source = ferry::run(&ferry::writes_past_the_hole()).unwrap();
    ferry::wait_for_writes_past_the_hole(&source).unwrap();
    let mut destination = ferry::receive().unwrap();
    let ended = ferry::migrate_well(&source, &destination.address, &[]).unwrap();
    assert!(ended.summary["ram"]["normal"].as_u64().unwrap() > 2000, "{}", ended.summary);
    let (check, _) = ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
    assert!(check.count > (3 << 30) / 4096 + 60_000, "{check:?}");
}

#[test]
#[needs(kvm)]
fn a_bandwidth_cap_holds_and_can_be_lifted_on_the_way() {
    let guest = Guest::new("work=dirty fill=random fill_pct=75 sleep=1", 128);
    let source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    let mut destination = ferry::receive().unwrap();
    let options = ["--max-bandwidth", "20M"];
    let migration = ferry::start_migrate(&source, &destination.address, &options).unwrap();
    migration.client.out.wait_for("\"active\"", SOON).unwrap();
    let mut qmp = source.qmp().unwrap();
    // Some 96 MiB at 20 MiB/s: after a second it cannot be near its end.
    source.wait_next_line("^HB ").unwrap();
    let from = source.serial().count();
    source.serial().wait_from(from + 8, "^HB ", SOON).unwrap();
    let info = qmp.execute("query-migrate", json!({})).unwrap();
    assert_eq!(info["status"], "active", "{info}");
    let (sent, elapsed_ms) =
        (info["ram"]["transferred"].as_u64().unwrap(), info["total-time"].as_u64().unwrap());
    let rate = sent * 1000 / elapsed_ms.max(1);
    assert!(rate < 30 << 20, "{rate} bytes/s despite a cap of 20 MiB/s: {info}");
    qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 0})).unwrap();
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 0, "{}", ended.errors);
    assert!(ended.summary["total-time"].as_u64().unwrap() < 4500, "{}", ended.summary);
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn a_paused_guest_arrives_paused_and_so_does_one_for_which_that_was_asked() {
    let guest = Guest::new("work=dirty ws_mb=8 rate_mbps=50", 64);
    for (stop_first, options) in [(true, &[][..]), (false, &["--paused"][..])] {
        let mut traveller = Traveller::start(&guest).unwrap();
        let mut stopped = stop_first.then(|| {
            traveller.vmm.qmp().unwrap().execute("stop", json!({})).unwrap();
            Instant::now()
        });
        let before = traveller.transcript().heartbeats().last().unwrap().number;
        traveller.hop(Way { receive: options, ..Way::default() }).unwrap();
        let stopped = stopped.get_or_insert_with(Instant::now);
        let mut qmp = traveller.vmm.qmp().unwrap();
        while stopped.elapsed() < Duration::from_millis(300) {
            assert_eq!(qmp.run_state().unwrap(), "paused");
        }
        let paused_us = u64::try_from(stopped.elapsed().as_micros()).unwrap();
        qmp.execute("cont", json!({})).unwrap();
        traveller.verify().unwrap();
        // What waited in its transmitter is sent at any time; it is its own clock that says that it did
        // nothing meanwhile. This one it has begun after the check, so after the pause.
        traveller.vmm.wait_next_line("^HB ").unwrap();
        let gap_us = traveller.transcript().largest_gap_us(before + 1).unwrap();
        let measured_by_both = paused_us * 98 / 100;
        assert!(
            gap_us > measured_by_both,
            "paused for {paused_us} µs, the guest missed {gap_us} µs at most"
        );
    }
}

#[test]
#[needs(kvm)]
fn the_source_stays_only_if_it_is_asked_to_and_never_runs_again_by_itself() {
    let guest = Guest::new("work=idle", 64);
    let mut source = ferry::run(&guest).unwrap();
    source.wait_line("^HB ").unwrap();
    let destination = ferry::receive().unwrap();
    ferry::migrate_well(&source, &destination.address, &["--keep-source"]).unwrap();
    let mut qmp = source.qmp().unwrap();
    assert_eq!(qmp.run_state().unwrap(), "postmigrate");
    for command in ["cont", "system_reset"] {
        assert_eq!(qmp.refused(command, json!({})).unwrap().class, "GenericError", "{command}");
    }
    let refusal = qmp.refused("stop", json!({})).unwrap();
    let reason = "The guest has been handed over: stop it at the destination";
    assert_eq!(refusal.description, reason);
    let again = qmp.refused("migrate", json!({"uri": destination.address})).unwrap();
    assert_eq!(again.class, "GenericError");
    let said = source.serial().text();
    destination.vmm.wait_line("^HB ").unwrap();
    assert_eq!(source.serial().text(), said, "the source went on");
    qmp.execute("quit", json!({})).unwrap();
    assert_eq!(source.process.exit_code(SOON).unwrap(), 0);

    // Without the option the process ends.
    let mut source = destination.vmm;
    let destination = ferry::receive().unwrap();
    ferry::migrate_well(&source, &destination.address, &[]).unwrap();
    assert_eq!(source.process.exit_code(SOON).unwrap(), 0);
}

/// The guest goes on here, whole, after a migration that did not happen.
fn assert_goes_on(source: &mut Vmm) {
    assert_eq!(source.qmp().unwrap().run_state().unwrap(), "running");
    source.wait_next_line("^HB ").unwrap();
    source.wait_next_line("^HB ").unwrap();
    assert_eq!(source.check().unwrap().corrupt, 0);
    Transcript::of([source.serial()]).judge().unwrap();
}

#[test]
#[needs(kvm)]
fn cancel_in_each_phase_leaves_the_guest_at_the_source_and_a_retry_succeeds() {
    // Dirties faster than it may be sent, so that rounds go on until somebody cancels.
    let guest = Guest::new("work=dirty ws_mb=32 rate_mbps=200 pattern=rand", 128);
    let mut source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    for phase in ["at once", "first round", "later round", "two cancels"] {
        let mut destination = ferry::receive().unwrap();
        let mut qmp = source.qmp().unwrap();
        qmp.want_migration_events().unwrap();
        let parameters = json!({"max-bandwidth": 60_000_000, "downtime-limit": 1});
        qmp.execute("migrate-set-parameters", parameters).unwrap();
        qmp.execute("migrate", json!({"uri": destination.address})).unwrap();
        match phase {
            "first round" => drop(qmp.wait_migration(&["active"], SOON).unwrap()),
            "later round" => {
                let later = |event: &serde_json::Value| {
                    event["event"] == "MIGRATION_PASS" && event["data"]["pass"].as_u64() >= Some(3)
                };
                qmp.wait_event_where(SOON, later).unwrap();
            }
            _ => {}
        }
        qmp.execute("migrate_cancel", json!({})).unwrap();
        if phase == "two cancels" {
            qmp.execute("migrate_cancel", json!({})).unwrap();
        }
        let ends = ["cancelled", "failed", "completed"];
        assert_eq!(qmp.wait_migration(&ends, SOON).unwrap(), "cancelled", "{phase}");
        assert_eq!(qmp.execute("query-migrate", json!({})).unwrap()["status"], "cancelled");
        assert_goes_on(&mut source);
        // Cancelled before it had introduced itself, the source was nobody: the wait goes on.
        if phase.ends_with("round") {
            let code = destination.vmm.process.exit_code(SOON).unwrap();
            assert_ne!(code, 0, "{phase}: the destination has no guest");
        }
        assert_eq!(destination.vmm.serial().text(), "", "{phase}: two guests");
    }
    // Nothing that the failed attempts harvested is lost.
    let mut destination = ferry::receive().unwrap();
    let options = ["--max-bandwidth", "0", "--downtime-limit", "300ms"];
    ferry::migrate_well(&source, &destination.address, &options).unwrap();
    ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
}

#[test]
#[needs(kvm)]
fn ctrl_c_cancels_cleanly() {
    let guest = Guest::new("work=dirty ws_mb=32 rate_mbps=200", 128);
    let mut source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    let destination = ferry::receive().unwrap();
    let options = ["--max-bandwidth", "30M", "--downtime-limit", "1ms"];
    let mut migration = ferry::start_migrate(&source, &destination.address, &options).unwrap();
    migration.client.out.wait_for("\"active\"", SOON).unwrap();
    migration.client.signal(libc::SIGINT).unwrap();
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 1, "{}", ended.errors);
    assert_eq!(ended.summary["status"], "cancelled");
    assert_goes_on(&mut source);
}

#[test]
#[needs(kvm)]
fn commands_that_would_disturb_a_migration_are_refused() {
    let guest = Guest::new("work=dirty ws_mb=32 rate_mbps=200", 128);
    let mut source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    let destination = ferry::receive().unwrap();
    let mut qmp = source.qmp().unwrap();
    qmp.want_migration_events().unwrap();
    let parameters = json!({"max-bandwidth": 30_000_000, "downtime-limit": 1});
    qmp.execute("migrate-set-parameters", parameters).unwrap();
    qmp.execute("migrate", json!({"uri": destination.address})).unwrap();
    qmp.wait_migration(&["active"], SOON).unwrap();
    for (command, arguments) in [
        ("migrate", json!({"uri": destination.address})),
        ("system_reset", json!({})),
        ("migrate-set-capabilities", json!({"capabilities": []})),
    ] {
        let refusal = qmp.refused(command, arguments).unwrap();
        assert!(refusal.description.contains("migration process in progress"), "{refusal}");
    }
    qmp.execute("migrate_cancel", json!({})).unwrap();
    qmp.wait_migration(&["cancelled"], SOON).unwrap();
    assert_goes_on(&mut source);
}

#[test]
#[needs(kvm)]
fn a_guest_that_writes_its_disk_moves_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    disk::create(&image, 8 << 20).unwrap();
    let path = image.to_str().unwrap();
    let guest = Guest::new("work=disk", 64).disk("root", &image);
    let mut traveller = Traveller::start(&guest).unwrap();
    traveller.vmm.wait_line("^READY work=disk .*id=root").unwrap();
    let give = format!("root={path}");
    let way = Way { receive: &["--disk", &give], migrate: &["--keep-source"], ..Way::default() };
    let mut sources = Vec::new();
    for _ in 0..3 {
        sources.push(traveller.hop(way).unwrap().source);
        traveller.verify().unwrap();
        // The lock went with the guest: the old process is still there, and a third one is kept out.
        let kernel = guest_images::KERNEL;
        let third = ["run", "--kernel", kernel, "--disk", &format!("path={path}")];
        let (code, text) = ferry::end_of(third).unwrap();
        assert_eq!(code, 126, "{text}");
        assert!(text.contains("in use by another"), "{text}");
    }
    traveller.vmm.qmp().unwrap().execute("stop", json!({})).unwrap();
    let before = disk::verify(&image).unwrap();
    let written = traveller.transcript().heartbeats().last().unwrap().generation;
    assert!(before >= written, "the host sees {before} of at least {written} acknowledged writes");
}

#[test]
#[needs(kvm)]
fn a_disk_that_the_destination_may_not_open_is_refused_before_any_page() {
    let folder = tempfile::tempdir().unwrap();
    let (image, other) = (folder.path().join("disk.img"), folder.path().join("other.img"));
    disk::create(&image, 1 << 20).unwrap();
    disk::create(&other, 2 << 20).unwrap();
    let guest = Guest::new("work=disk", 64).disk("root", &image);
    let mut source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=1 ").unwrap();
    for options in [
        vec![],
        vec![format!("wrong={}", image.display())],
        vec!["root=/nonexistent".into()],
        vec![format!("root={}", other.display())],
    ] {
        let options: Vec<_> = options.iter().flat_map(|disk| ["--disk", disk]).collect();
        let destination = ferry::receive_at("tcp:127.0.0.1:0", &options).unwrap();
        let ended = ferry::migrate(&source, &destination.address, &[]).unwrap();
        assert_eq!(ended.code, 1, "{options:?}: {}", ended.errors);
        let named =
            ["root", "/nonexistent", "other.img"].iter().any(|name| ended.errors.contains(name));
        assert!(named, "{options:?}: {}", ended.errors);
        let sent = ended.summary["ram"]["transferred"].as_u64().unwrap();
        assert!(sent < 1 << 20, "{options:?}: refused after {sent} bytes");
        assert_goes_on(&mut source);
    }
}

#[test]
#[needs(kvm)]
fn statistics_survive_completion_on_both_sides() {
    let guest = Guest::new("work=dirty fill=text ws_mb=8 rate_mbps=50 change_pct=5", 128);
    let source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    let destination = ferry::receive().unwrap();
    let options =
        ["--keep-source", "--channels", "3", "--xbzrle", "--compress", "zstd", "--max-bandwidth"];
    let options = [&options[..], &["20M"]].concat();
    let ended = ferry::migrate_well(&source, &destination.address, &options).unwrap();
    let ask = |qmp: &mut Qmp| qmp.execute("query-migrate", json!({})).unwrap();
    let (mut here, mut there) = (source.qmp().unwrap(), destination.vmm.qmp().unwrap());
    let sent = ask(&mut here);
    assert_eq!(sent, ended.summary);
    // Rounds, deltas and packing are the source's affair; what has come, both know.
    for key in ["setup-time", "total-time", "x-downtime-us", "x-rounds", "xbzrle-cache"] {
        assert!(!sent[key].is_null(), "{key}: {sent}");
    }
    there.wait_info(|info| info["status"] == "completed").unwrap();
    let came = ask(&mut there);
    for key in ["normal", "duplicate", "total", "normal-bytes", "page-size", "multifd-bytes"] {
        assert_eq!(sent["ram"][key], came["ram"][key], "{key}: {sent} and {came}");
    }
    let multifd = sent["ram"]["multifd-bytes"].as_u64().unwrap();
    let transferred = sent["ram"]["transferred"].as_u64().unwrap();
    assert!(multifd > 1 << 20 && multifd < transferred, "{sent}");
    assert!(came["x-downtime-parts"]["resume"].as_u64() > Some(0), "{came}");
    // A look does not use them up, and neither does what the guest does afterwards.
    destination.vmm.wait_line("^HB ").unwrap();
    assert_eq!((ask(&mut here), ask(&mut there)), (sent, came));
}

#[test]
#[needs(kvm)]
fn json_steps_end_with_a_summary_in_qemus_names() {
    let guest = Guest::new("work=dirty fill=random ws_mb=16 rate_mbps=100", 128);
    let source = ferry::run(&guest).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    let destination = ferry::receive().unwrap();
    let options = ["--max-bandwidth", "400M"];
    let migration = ferry::start_migrate(&source, &destination.address, &options).unwrap();
    let ended = migration.end(Duration::from_secs(60)).unwrap();
    assert_eq!(ended.code, 0, "{}", ended.errors);
    assert!(ended.steps.len() > 1);
    let ram = &ended.summary["ram"];
    for key in ["transferred", "total", "duplicate", "normal", "dirty-sync-count", "page-size"] {
        assert!(ram[key].is_number(), "{key}: {}", ended.summary);
    }
    for key in ["total-time", "downtime", "setup-time"] {
        assert!(ended.summary[key].is_number(), "{key}: {}", ended.summary);
    }
}

#[test]
#[needs(kvm)]
fn a_guest_that_is_larger_than_allowed_is_refused_before_anything_is_built() {
    let mut source = ferry::run(&Guest::new("work=idle", 128)).unwrap();
    source.wait_line("^HB ").unwrap();
    let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &["--max-memory", "127M"]).unwrap();
    let ended = ferry::migrate(&source, &destination.address, &[]).unwrap();
    assert_eq!(ended.code, 1);
    for word in ["128 MiB", "127 MiB", "--max-memory"] {
        assert!(ended.errors.contains(word), "{}", ended.errors);
    }
    assert_eq!(destination.vmm.process.exit_code(SOON).unwrap(), 126);
    assert_goes_on(&mut source);
}
