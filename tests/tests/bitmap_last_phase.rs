//! The last phase of a move, in which the guest runs at the destination and its dirty bitmaps are on their way: cut
//! short, it costs bitmaps and nothing else.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use devices::block::bitmaps::{BitmapName, NewBitmap};
use ferry_tests::bitmaps::{bitmap, bitmap_now, bitmaps_now, file_of, named, with_bitmaps};
use ferry_tests::ferry::{self, Guest};
use ferry_tests::hosts::started;
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qmp::Qmp;
use ferry_tests::verdict::Heartbeat;
use ferry_tests::{disk, needs};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;

/// A guest on a disk with two bitmaps. The contents of `large` are 2 MiB, no part of which is clean: they take
/// seconds over a slow link.
fn with_a_large_bitmap(folder: &Path, work: &str) -> (Vmm, ferry::Destination) {
    let image = folder.join("root");
    disk::create(&image, 8 << 30).unwrap();
    with_bitmaps(&image, |node| {
        for (name, granularity) in [("small", 64 << 20), ("large", 512)] {
            let name = BitmapName::new(name).unwrap();
            let new = NewBitmap { name, granularity, persistent: true, recording: true };
            node.bitmaps().add(new).unwrap();
        }
        for at in (0..8 << 30).step_by(256 << 20) {
            node.write_at(&[0; 512], at).unwrap();
        }
    });
    let source = started(&Guest::new(work, 64).disk("root", &image));
    let give = format!("root={}", image.display());
    (source, ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give]).unwrap())
}

/// Starts a move and waits until the guest has moved, its small bitmap has arrived and the large one is on its way.
fn in_last_phase(source: &Vmm, destination: &ferry::Destination) -> (ferry::Migration, Qmp) {
    let (migration, mut qmp) = at_its_beginning(source, destination);
    let mut there = destination.vmm.qmp().unwrap();
    while bitmap_now(&mut there, "small")["busy"] == true {
        destination.vmm.wait_next_line("^HB ").unwrap();
    }
    assert_eq!(bitmap_now(&mut there, "large")["busy"], true);
    let info = qmp.execute("query-migrate", json!({})).unwrap();
    assert_eq!(info["status"], "postcopy-active");
    (migration, qmp)
}

/// Starts a move and waits until the guest has moved.
fn at_its_beginning(source: &Vmm, destination: &ferry::Destination) -> (ferry::Migration, Qmp) {
    let mut qmp = source.qmp().unwrap();
    qmp.want_migration_events().unwrap();
    let slow = ["--max-bandwidth", "400K", "--disks", "none"];
    let migration = ferry::start_migrate(source, &destination.address, &slow).unwrap();
    qmp.wait_migration(&["postcopy-active"], SOON * 2).unwrap();
    let info = qmp.execute("query-migrate", json!({})).unwrap();
    assert_eq!(info["status"], "postcopy-active");
    assert!(
        info["downtime"].is_u64() && info["x-postcopy"]["total"].as_u64().unwrap() > 0,
        "{info}"
    );
    (migration, qmp)
}

/// Starts a move and waits until everything has arrived.
fn over(source: &Vmm, destination: &ferry::Destination) -> (ferry::Migration, Qmp) {
    let (migration, mut qmp) = in_last_phase(source, destination);
    let fast = json!({"max-bandwidth": 1_u64 << 30});
    assert_eq!(qmp.execute("migrate-set-parameters", fast).unwrap(), json!({}));
    let info = destination.vmm.qmp().unwrap().migration_end().unwrap();
    assert!(info["status"] == "completed" && info["x-incomplete"].is_null(), "{info}");
    (migration, qmp)
}

/// That the guest runs there, and which bitmaps have arrived.
fn arrived(destination: &ferry::Destination, source: &Vmm) -> Vec<String> {
    let mut qmp = destination.vmm.qmp().unwrap();
    let info = qmp.migration_end().unwrap();
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(qmp.run_state().unwrap(), "running");
    destination.vmm.wait_next_line("^HB ").unwrap();
    assert!(!source.serial().text().is_empty());
    let found = bitmaps_now(&mut qmp);
    let is_good = |bitmap: &Value| bitmap["busy"] == false && bitmap["inconsistent"].is_null();
    assert!(found.iter().all(is_good), "{found:?}");
    let missing = info["x-incomplete"].as_str().unwrap_or_default();
    let names: Vec<_> =
        found.iter().map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect();
    for name in ["small", "large"] {
        let is_missing = missing.contains(&format!("root/{name}"));
        assert_eq!(is_missing, !names.contains(&name.to_owned()), "{name}: {missing:?}");
    }
    names
}

/// Kill either side, or give up: the guest runs at the destination or is the operator's, and no bitmap is half
/// true.
#[test]
#[needs(kvm)]
fn the_last_phase_cut_short_costs_bitmaps_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    // The source is killed.
    let (mut source, destination) = with_a_large_bitmap(folder.path(), "work=idle");
    let (migration, _) = in_last_phase(&source, &destination);
    source.process.kill().unwrap();
    assert_eq!(migration.end(SOON).unwrap().code, 4, "its control socket has gone");
    assert_eq!(arrived(&destination, &source), ["small"]);
    drop(destination);

    // The destination is: the guest is gone with it, and does not come back by itself.
    let folder = tempfile::tempdir().unwrap();
    let (source, mut destination) = with_a_large_bitmap(folder.path(), "work=idle");
    let (migration, mut qmp) = in_last_phase(&source, &destination);
    destination.vmm.process.kill().unwrap();
    let info = qmp.migration_end().unwrap();
    assert_eq!(info["status"], "completed", "{info}");
    assert!(info["x-incomplete"].is_string(), "{info}");
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 6, "{}", ended.errors);
    assert!(ended.errors.contains("not everything has arrived"), "{}", ended.errors);

    // A cancel comes too late; what is left can be given up.
    let folder = tempfile::tempdir().unwrap();
    let (source, destination) = with_a_large_bitmap(folder.path(), "work=idle");
    let (migration, mut qmp) = in_last_phase(&source, &destination);
    let refusal = qmp.refused("migrate_cancel", json!({})).unwrap();
    assert!(refusal.description.contains("cannot be cancelled any more"), "{refusal}");
    assert_eq!(qmp.execute("x-migrate-give-up", json!({})).unwrap(), json!({}));
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 6, "{}", ended.errors);
    assert!(ended.errors.contains("given up at the source"), "{}", ended.errors);
    assert_eq!(arrived(&destination, &source), ["small"]);

    // Left alone, all is there.
    let folder = tempfile::tempdir().unwrap();
    let (source, destination) = with_a_large_bitmap(folder.path(), "work=idle");
    let (migration, _qmp) = in_last_phase(&source, &destination);
    // The guest has run there for seconds when the last bitmap is complete.
    destination.vmm.wait_line("^HB ").unwrap();
    let ended = migration.end(SOON * 2).unwrap();
    assert_eq!(ended.code, 0, "{}", ended.errors);
    assert_eq!(arrived(&destination, &source), ["small", "large"]);
    let mut qmp = destination.vmm.qmp().unwrap();
    assert_eq!(bitmap(&mut qmp, "large")["count"], 32 * 512);
}

#[test]
#[needs(kvm)]
fn ctrl_c_twice_in_the_last_phase_gives_up_what_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let (source, destination) = with_a_large_bitmap(folder.path(), "work=idle");
    let (mut migration, mut qmp) = in_last_phase(&source, &destination);
    migration.client.signal(libc::SIGINT).unwrap();
    let said = migration.client.err.wait_for("Ctrl-C again", SOON).unwrap();
    assert!(said.text.contains("cannot be cancelled any more"), "{}", said.text);
    // Nothing is given up yet.
    let info = qmp.execute("query-migrate", json!({})).unwrap();
    assert_eq!(info["status"], "postcopy-active", "{info}");
    migration.client.signal(libc::SIGINT).unwrap();
    let ended = migration.end(SOON).unwrap();
    assert_eq!(ended.code, 6, "{}", ended.errors);
    assert!(ended.errors.contains("given up at the source"), "{}", ended.errors);
    assert_eq!(arrived(&destination, &source), ["small"]);
}

/// That the guest has written to its disk since it came here.
fn wait_for_writes(destination: &Vmm) {
    let generation = |from: usize| {
        let line = destination.serial().wait_from(from, "^HB .* ram_gen=", SOON).unwrap();
        (Heartbeat::parse(&line.text).unwrap().generation, line.index + 1)
    };
    let (first, mut from) = generation(0);
    loop {
        let (now, next) = generation(from);
        if now > first {
            return;
        }
        from = next;
    }
}

/// Whoever dies in the last phase, or soon after it: what the file beside the image shows afterwards as good has missed no write.
#[test]
#[needs(kvm)]
fn a_crash_in_the_last_phase_or_after_it_leaves_no_bitmap_that_only_looks_right() {
    let writes = "work=disk disk_mb=4 hb_ms=20";
    type Until = fn(&Vmm, &ferry::Destination) -> (ferry::Migration, Qmp);
    let untils: [(Until, i32); 3] = [(at_its_beginning, 6), (in_last_phase, 6), (over, 0)];
    for (until, code) in untils {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("root");
        let (mut source, mut destination) = with_a_large_bitmap(folder.path(), writes);
        let (migration, _qmp) = until(&source, &destination);
        wait_for_writes(&destination.vmm);
        if code == 0 {
            // The file names them as soon as they are whole, which nobody waits for.
            let limit = Instant::now() + SOON;
            while !file_of(&image).exists() {
                assert!(Instant::now() < limit, "a crash will not be noticed");
                std::thread::yield_now();
            }
        }
        destination.vmm.process.kill().unwrap();
        assert_eq!(migration.end(SOON).unwrap().code, code);
        source.process.wait(SOON).unwrap();
        let left = with_bitmaps(&image, |node| node.bitmaps().info());
        assert!(left.iter().all(|info| info.inconsistent), "{left:?}");
        assert!(code != 0 || left.len() == 2, "{left:?}");
        // A guest starts on it, and whoever finds such bitmaps can remove them.
        let vmm = started(&Guest::new(writes, 64).disk("root", &image));
        let mut qmp = vmm.qmp().unwrap();
        for info in &left {
            qmp.execute("block-dirty-bitmap-remove", named(info.name.as_str())).unwrap();
        }
        assert_eq!(bitmaps_now(&mut qmp), [Value::Null; 0]);
    }

    // The source dies: what has arrived is good when the destination has ended, and the rest is gone.
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("root");
    let (mut source, mut destination) = with_a_large_bitmap(folder.path(), writes);
    let (_migration, _qmp) = in_last_phase(&source, &destination);
    source.process.kill().unwrap();
    assert_eq!(arrived(&destination, &source), ["small"]);
    wait_for_writes(&destination.vmm);
    destination.vmm.qmp().unwrap().execute("quit", json!({})).unwrap();
    destination.vmm.process.wait(SOON).unwrap();
    assert!(file_of(&image).exists());
    let left = with_bitmaps(&image, |node| node.bitmaps().info());
    let [small] = &left[..] else { panic!("{left:?}") };
    assert!(small.name.as_str() == "small" && !small.inconsistent, "{small:?}");
    assert_eq!(small.count_bytes, 32 * (64 << 20), "all that was marked before, and after, once");
}
