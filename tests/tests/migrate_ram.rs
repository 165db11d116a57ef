//! Memory moves whole: every fill, several vCPUs, both kinds of address, paused, capped, cancelled.

use ferry_tests::ferry::{self, Guest};
use ferry_tests::process::SOON;
use ferry_tests::skip;
use serde_json::json;

/// Moves a guest once and has it check itself.
fn move_once(guest: &Guest, address: &str, more: &[&str]) -> serde_json::Value {
    let source = ferry::run(guest).unwrap();
    source.wait_line("READY ").unwrap();
    let mut destination = ferry::receive_at(address, &[]).unwrap();
    let ended = ferry::migrate_well(&source, &destination.address, more).unwrap();
    let (check, _) = ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
    assert_eq!(check.corrupt, 0);
    ended.summary
}

#[test]
fn every_kind_of_memory_arrives_whole() {
    if skip::kvm_is_missing() {
        return;
    }
    for fill in ["random", "text", "zero"] {
        let cmdline = format!("work=dirty fill={fill} ws_mb=16 rate_mbps=100 pattern=rand");
        move_once(&Guest::new(&cmdline, 128), "tcp:127.0.0.1:0", &[]);
    }
}

#[test]
fn guests_with_several_vcpus_arrive_whole() {
    if skip::kvm_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for cpus in [1, 2, 4] {
        let address = format!("unix:{}", folder.path().join(format!("m{cpus}")).display());
        let guest = Guest::new("work=dirty ws_mb=8 rate_mbps=40", 128).cpus(cpus);
        move_once(&guest, &address, &["--downtime-limit", "100ms"]);
    }
}

#[test]
fn an_untouched_guest_sends_almost_nothing() {
    if skip::kvm_is_missing() {
        return;
    }
    let summary = move_once(&Guest::new("work=idle", 1024), "tcp:127.0.0.1:0", &[]);
    let sent = summary["ram"]["transferred"].as_u64().unwrap();
    assert!(sent < 32 << 20, "{sent} bytes of a guest that touched a few MiB");
}

#[test]
fn a_paused_guest_arrives_paused_and_can_be_resumed_there() {
    if skip::kvm_is_missing() {
        return;
    }
    let source = ferry::run(&Guest::new("work=dirty ws_mb=8 rate_mbps=40", 64)).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    source.qmp().unwrap().execute("stop", json!({})).unwrap();
    let mut destination = ferry::receive().unwrap();
    ferry::migrate_well(&source, &destination.address, &[]).unwrap();
    let mut qmp = destination.vmm.qmp().unwrap();
    assert_eq!(qmp.execute("query-status", json!({})).unwrap()["status"], "paused");
    qmp.execute("cont", json!({})).unwrap();
    let (check, _) = ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
    assert_eq!(check.corrupt, 0);
}

#[test]
fn a_cancelled_migration_leaves_the_guest_where_it_was() {
    if skip::kvm_is_missing() {
        return;
    }
    let mut source = ferry::run(&Guest::new("work=dirty ws_mb=64 rate_mbps=100", 256)).unwrap();
    source.wait_line("READY ").unwrap();
    let mut destination = ferry::receive().unwrap();
    // Slow enough that the cancel always comes first.
    let capped = ["--max-bandwidth", "20M"];
    let migration = ferry::start_migrate(&source, &destination.address, &capped).unwrap();
    let mut qmp = source.qmp().unwrap();
    while qmp.execute("query-migrate", json!({})).unwrap()["status"] != "active" {}
    let second = qmp.execute("migrate", json!({"uri": "tcp:127.0.0.1:1"})).unwrap_err();
    assert!(second.to_string().contains("migration process in progress"), "{second}");
    assert!(qmp.execute("system_reset", json!({})).is_err(), "it would disturb the migration");
    qmp.execute("migrate_cancel", json!({})).unwrap();
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 1);
    assert_eq!(ended.summary["status"], "cancelled");
    assert_eq!(destination.vmm.process.exit_code(SOON).unwrap(), 1);
    source.wait_next_line("^HB ").unwrap();
    assert_eq!(source.check().unwrap().corrupt, 0);
    let again = ferry::receive().unwrap();
    ferry::migrate_well(&source, &again.address, &[]).unwrap();
}
