//! Whatever dies, and whenever: one guest runs, and its user is told.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::process::SOON;
use ferry_tests::{disk, skip};
use serde_json::json;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

fn guest() -> Guest {
    Guest::new("work=dirty fill=random fill_pct=50 ws_mb=16 rate_mbps=100", 128)
}

/// Moments after the start of a migration that takes about 60 ms: set-up, the first round, later
/// rounds, the switch, and after it.
const MOMENTS_MS: [u64; 8] = [0, 5, 15, 30, 40, 50, 60, 80];

#[test]
fn a_destination_killed_at_any_moment_never_costs_the_guest() {
    if skip::kvm_is_missing() {
        return;
    }
    for moment in MOMENTS_MS {
        let mut source = ferry::run(&guest()).unwrap();
        source.wait_line("READY ").unwrap();
        let mut destination = ferry::receive().unwrap();
        let migration =
            ferry::start_migrate(&source, &destination.address, &["--keep-source"]).unwrap();
        // The moment itself is what is tested; there is no event that marks it.
        std::thread::sleep(Duration::from_millis(moment));
        destination.vmm.process.kill().unwrap();
        let ended = migration.end(SOON).unwrap();
        let status = source.qmp().unwrap().execute("query-status", json!({})).unwrap();
        match ended.code {
            1 => {
                assert_eq!(status["running"], true, "killed after {moment} ms: {status}");
                source.wait_next_line("^HB ").unwrap();
                assert_eq!(source.check().unwrap().corrupt, 0, "killed after {moment} ms");
            }
            0 | 4 => assert_eq!(status["running"], false, "killed after {moment} ms: {status}"),
            code => panic!("exit code {code}, killed after {moment} ms: {}", ended.errors),
        }
    }
}

#[test]
fn a_source_killed_at_any_moment_never_leaves_half_a_guest() {
    if skip::kvm_is_missing() {
        return;
    }
    for moment in MOMENTS_MS {
        let mut source = ferry::run(&guest()).unwrap();
        source.wait_line("READY ").unwrap();
        let mut destination = ferry::receive().unwrap();
        let migration = ferry::start_migrate(&source, &destination.address, &[]).unwrap();
        std::thread::sleep(Duration::from_millis(moment));
        source.process.kill().unwrap();
        let ended = migration.end(SOON).unwrap();
        // Either the guest has arrived whole, or the destination says why not and ends, or no source
        // ever introduced itself and it still waits.
        if destination.vmm.wait_next_line("^HB ").is_ok() {
            assert_eq!(destination.vmm.check().unwrap().corrupt, 0, "killed after {moment} ms");
        } else {
            assert_ne!(ended.code, 0, "killed after {moment} ms: {}", ended.errors);
        }
    }
}

#[test]
fn a_destination_that_is_none_or_not_ferry_is_named() {
    if skip::kvm_is_missing() {
        return;
    }
    let mut source = ferry::run(&guest()).unwrap();
    source.wait_line("READY ").unwrap();
    let refused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let ended = ferry::migrate(&source, &format!("tcp:{refused}"), &[]).unwrap();
    assert_eq!(ended.code, 1);
    assert!(ended.errors.contains("is `ferry receive` running there?"), "{}", ended.errors);
    let liar = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", liar.local_addr().unwrap());
    let answering = std::thread::spawn(move || {
        let (mut stream, _) = liar.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        stream
    });
    let ended = ferry::migrate(&source, &address, &[]).unwrap();
    assert_eq!(ended.code, 1);
    assert!(ended.errors.contains("not Ferry"), "{}", ended.errors);
    drop(answering.join().unwrap());
    source.wait_next_line("^HB ").unwrap();
    assert_eq!(source.check().unwrap().corrupt, 0);
}

#[test]
fn a_destination_survives_peers_that_are_not_ferry() {
    if skip::kvm_is_missing() {
        return;
    }
    let destination = ferry::receive().unwrap();
    let to = destination.address.strip_prefix("tcp:").unwrap();
    for noise in [&b"GET / HTTP/1.0\r\n\r\n"[..], &[0xff; 4096], b""] {
        // The destination may hang up before all is written.
        let _ = TcpStream::connect(to).unwrap().write_all(noise);
    }
    let source = ferry::run(&guest()).unwrap();
    source.wait_line("READY ").unwrap();
    ferry::migrate_well(&source, &destination.address, &[]).unwrap();
    destination.vmm.wait_line("^HB ").unwrap();
}

#[test]
fn a_disk_that_the_destination_lacks_is_named_and_the_lock_stays() {
    if skip::kvm_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    disk::create(&image, 1 << 20).unwrap();
    let mut source = ferry::run(&Guest::new("work=disk", 64).disk("root", &image)).unwrap();
    source.wait_line("READY ").unwrap();
    let destination = ferry::receive().unwrap();
    let ended = ferry::migrate(&source, &destination.address, &[]).unwrap();
    assert_eq!(ended.code, 1);
    assert!(ended.errors.contains("--disk root=PATH"), "{}", ended.errors);
    assert_eq!(source.check().unwrap().corrupt, 0);
    let path = format!("path={}", image.display());
    let second = ["run", "--kernel", guest_images::KERNEL, "--disk", &path];
    let (code, text) = ferry::end_of(second).unwrap();
    assert_eq!(code, 1);
    assert!(text.contains("in use by another virtual machine"), "{text}");
}
