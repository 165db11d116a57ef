//! `ferry migrate` as its user sees it: what it changes, what it says, and what it leaves behind.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::needs;
use ferry_tests::process::{Process, SOON, Vmm};
use serde_json::{Value, json};
use std::process::Command;

/// A guest whose RAM takes seconds at 30 MB/s.
fn source() -> Vmm {
    let source = ferry::run(&Guest::new("work=dirty ws_mb=8 rate_mbps=50", 128)).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    source
}

fn settings(source: &Vmm) -> (Value, Value) {
    let mut qmp = source.qmp().unwrap();
    let of = |qmp: &mut ferry_tests::qmp::Qmp, query| qmp.execute(query, json!({})).unwrap();
    (of(&mut qmp, "query-migrate-parameters"), of(&mut qmp, "query-migrate-capabilities"))
}

const SLOW: [&str; 4] = ["--max-bandwidth", "30M", "--downtime-limit", "1ms"];

#[test]
#[needs(kvm)]
fn options_belong_to_one_migration() {
    let source = source();
    let before = settings(&source);
    let destination = ferry::receive().unwrap();
    let options = [&SLOW[..], &["--xbzrle", "--auto-converge", "--compress", "zlib:1"]].concat();
    let mut migration = ferry::start_migrate(&source, &destination.address, &options).unwrap();
    migration.client.out.wait_for("\"active\"", SOON).unwrap();
    let during = settings(&source);
    assert_eq!(during.0["max-bandwidth"], 30 << 20);
    assert_eq!(during.0["multifd-compression"], "zlib");

    // A second one is refused, has its own exit code, and changes nothing of the first.
    let second = ["--max-bandwidth", "1M", "--downtime-limit", "7ms"];
    let refused = ferry::migrate(&source, &destination.address, &second).unwrap();
    assert_eq!(refused.code, 5, "{}", refused.errors);
    assert!(refused.errors.contains("in progress"), "{}", refused.errors);
    assert_eq!(settings(&source), during);

    // What a client of the control socket changes while it runs holds for it, and stays.
    let mut qmp = source.qmp().unwrap();
    qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 20 << 20})).unwrap();
    assert_eq!(settings(&source).0["max-bandwidth"], 20 << 20);
    migration.client.signal(libc::SIGINT).unwrap();
    assert_eq!(migration.end(SOON).unwrap().code, 1);
    let (mut parameters, capabilities) = settings(&source);
    assert_eq!(parameters["max-bandwidth"], 20 << 20);
    parameters["max-bandwidth"] = before.0["max-bandwidth"].clone();
    assert_eq!((parameters, capabilities), before);

    // A plain retry uses none of what the first one was told.
    qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 0})).unwrap();
    let destination = ferry::receive().unwrap();
    let moved = ferry::migrate_well(&source, &destination.address, &[]).unwrap();
    assert!(moved.summary.get("xbzrle-cache").is_none(), "{}", moved.summary);
}

#[test]
#[needs(kvm)]
fn a_client_follows_its_own_migration() {
    let source = source();
    let mut qmp = source.qmp().unwrap();
    qmp.want_migration_events().unwrap();
    let status = |id: &str| {
        let mut asker = source.qmp().unwrap();
        asker.execute("query-migrate", json!({"x-id": id})).unwrap()["status"].clone()
    };
    let slow = json!({"max-bandwidth": 30 << 20, "downtime-limit": 1});
    for id in ["one", "two"] {
        let destination = ferry::receive().unwrap();
        let uri = &destination.address;
        qmp.execute("migrate", json!({"uri": uri, "x-id": id, "x-parameters": slow})).unwrap();
        qmp.wait_migration(&["active"], SOON).unwrap();
        if id == "one" {
            qmp.execute("migrate_cancel", json!({})).unwrap();
            qmp.wait_migration(&["cancelled"], SOON).unwrap();
            let ended =
                |event: &Value| event["event"] == "x-migration" && event["data"]["ended"] == true;
            assert_eq!(qmp.wait_event_where(SOON, ended).unwrap()["data"]["x-id"], "one");
        }
        assert_eq!(status("one"), "cancelled");
        if id == "two" {
            assert_eq!(status("two"), "active");
            assert_eq!(qmp.execute("query-migrate", json!({})).unwrap()["x-id"], "two");
        }
    }
    let refused = qmp.refused("query-migrate", json!({"x-id": "three"})).unwrap();
    assert!(refused.description.contains("three"), "{refused}");
    for bad in [
        json!({"uri": "unix:/x", "x-id": ""}),
        json!({"uri": "unix:/x", "x-parameters": {"colour": 1}}),
        json!({"uri": "unix:/x", "x-parameters": {"multifd-channels": 99}}),
        json!({"uri": "unix:/x", "x-capabilities": [{"capability": "events", "state": true}]}),
    ] {
        qmp.refused("migrate", bad).unwrap();
    }
}

#[test]
#[needs(kvm)]
fn a_source_whose_client_was_killed_ends_by_itself_unless_it_shall_stay() {
    for keep in [false, true] {
        let mut source = source();
        let mut destination = ferry::receive().unwrap();
        let keeping: &[&str] = if keep { &["--keep-source"] } else { &[] };
        let options = [&["--max-bandwidth", "30M"], keeping].concat();
        let mut migration = ferry::start_migrate(&source, &destination.address, &options).unwrap();
        migration.client.out.wait_for("\"active\"", SOON).unwrap();
        migration.client.kill().unwrap();
        destination.vmm.wait_line("^HB ").unwrap();
        if keep {
            let mut qmp = source.qmp().unwrap();
            assert_eq!(qmp.migration_end().unwrap()["status"], "completed");
            assert_eq!(qmp.run_state().unwrap(), "postmigrate");
        } else {
            assert_eq!(source.process.exit_code(SOON).unwrap(), 0);
            assert!(source.process.err.text().contains("the guest has moved"));
        }
        ferry::verify_at(&mut destination.vmm, &[source.serial()]).unwrap();
    }
}

#[test]
#[needs(kvm)]
fn a_person_sees_a_progress_bar_and_a_summary() {
    let source = source();
    let destination = ferry::receive().unwrap();
    let (ferry, socket) = (ferry::binary(), source.socket());
    let command = format!(
        "'{}' migrate '{}' '{}' --max-bandwidth 30M",
        ferry.display(),
        socket.display(),
        destination.address
    );
    // On a terminal of its own.
    let mut terminal = Command::new("script");
    terminal.args(["--quiet", "--flush", "--return", "--command", &command, "/dev/null"]);
    let mut person = Process::start(&mut terminal).unwrap();
    assert_eq!(person.exit_code(SOON).unwrap(), 0, "{}", person.out.text());
    let seen = person.out.text();
    for word in ["% round ", " · sent ", " · remaining ", "Gb/s", "migrated in ", "downtime "] {
        assert!(seen.contains(word), "{word:?} is missing: {seen}");
    }
    destination.vmm.wait_line("^HB ").unwrap();
}
