//! What a failing disk does to its guest, as `rerror` and `werror` say: the guest hears of it, or does not, or
//! stops until the disk works again.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::hanging::HangingImage;
use ferry_tests::hosts::Hosts;
use ferry_tests::needs;
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qmp::Qmp;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A guest whose disk lies on `image`, with an error policy.
fn guest(work: &str, image: &HangingImage, policy: &str) -> Vmm {
    let mut guest = Guest::new(work, 64).disk("root", &image.path());
    guest.disks[0].push_str(policy);
    ferry::run(&guest).unwrap()
}

/// Waits until it is told of a failure, and what was done about it.
fn assert_told(qmp: &mut Qmp, operation: &str, action: &str) {
    let event = qmp.wait_event("BLOCK_IO_ERROR", SOON).unwrap();
    let data = &event["data"];
    assert_eq!(
        (&data["device"], &data["operation"], &data["action"], &data["nospace"]),
        (&json!("root"), &json!(operation), &json!(action), &json!(false)),
        "{event}"
    );
}

fn io_status(qmp: &mut Qmp) -> Value {
    qmp.execute("query-block", json!({})).unwrap()[0]["io-status"].clone()
}

/// Exit code of a guest that has heard of an error.
const HEARD: i32 = 0x78 << 1 | 1;
const BYTES: usize = 8 << 20;
/// Reads only what nobody has read or written before, so that each asks the storage.
const READS: &str = "work=diskread run_ms=300";

#[test]
#[needs(kvm, fuse)]
fn a_guest_hears_of_writes_that_fail() {
    let hosts = Hosts::new();
    for (name, policy) in
        [("a", ""), ("b", ",werror=report"), ("c", ",rerror=stop"), ("d", ",werror=enospc")]
    {
        let image = HangingImage::for_test(&hosts, name, BYTES);
        let mut vmm = guest("work=disk", &image, policy);
        vmm.wait_line("^HB n=1 ").unwrap();
        let mut qmp = vmm.qmp().unwrap();
        image.fail_writes(true);
        assert_told(&mut qmp, "write", "report");
        vmm.wait_line("DISK-ERROR write sector=[0-9]+ status=1").unwrap();
        assert_eq!(vmm.process.exit_code(SOON).unwrap(), HEARD, "{policy}");
    }
}

#[test]
#[needs(kvm, fuse)]
fn a_guest_whose_write_errors_are_ignored_believes_that_they_worked() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", BYTES);
    let vmm = guest("work=disk", &image, ",werror=ignore");
    vmm.wait_line("^HB n=1 ").unwrap();
    let mut qmp = vmm.qmp().unwrap();
    image.fail_writes(true);
    assert_told(&mut qmp, "write", "ignore");
    // It finds what was there before where it wrote.
    vmm.wait_line("CORRUPT sector=").unwrap();
    vmm.wait_next_line("^HB ").unwrap();
    assert_eq!(qmp.run_state().unwrap(), "running");
    assert!(!vmm.serial().text().contains("DISK-ERROR"), "{}", vmm.serial().tail());
}

#[test]
#[needs(kvm, fuse)]
fn a_guest_whose_write_fails_is_stopped_and_the_write_is_repeated() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", BYTES);
    let mut vmm = guest("work=disk", &image, ",werror=stop");
    vmm.wait_line("^HB n=1 ").unwrap();
    let mut qmp = vmm.qmp().unwrap();
    image.fail_writes(true);
    assert_told(&mut qmp, "write", "stop");
    qmp.wait_event("STOP", SOON).unwrap();
    assert_eq!(qmp.run_state().unwrap(), "io-error");
    assert_eq!(io_status(&mut qmp), "failed");
    // For nothing.
    qmp.execute("cont", json!({})).unwrap();
    assert_told(&mut qmp, "write", "stop");
    qmp.wait_event("STOP", SOON).unwrap();
    image.fail_writes(false);
    // A write that had failed by then may be heard of after `cont`, and stops the guest once more.
    let (from, end) = (vmm.serial().count(), Instant::now() + SOON);
    while vmm.serial().wait_from(from, "^HB ", Duration::from_millis(100)).is_err() {
        assert!(Instant::now() < end, "{}", vmm.process.err.tail());
        if qmp.run_state().unwrap() == "io-error" {
            qmp.execute("cont", json!({})).unwrap();
        }
    }
    vmm.wait_next_line("^HB ").unwrap();
    assert_eq!((qmp.run_state().unwrap().as_str(), io_status(&mut qmp)), ("running", json!("ok")));
    assert_eq!(vmm.check().unwrap().corrupt, 0);
    assert!(!vmm.serial().text().contains("DISK-ERROR"), "{}", vmm.serial().tail());
}

#[test]
#[needs(kvm, fuse)]
fn a_guest_hears_of_reads_that_fail() {
    let hosts = Hosts::new();
    for (name, policy) in [("a", ""), ("b", ",rerror=report"), ("c", ",werror=stop")] {
        let image = HangingImage::for_test(&hosts, name, BYTES);
        image.fail_reads(true);
        let mut vmm = guest(READS, &image, policy);
        vmm.wait_line("DISK-ERROR read sector=[0-9]+ status=1").unwrap();
        assert_eq!(vmm.process.exit_code(SOON).unwrap(), HEARD, "{policy}");
    }
}

#[test]
#[needs(kvm, fuse)]
fn a_guest_whose_read_errors_are_ignored_goes_on() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", BYTES);
    image.fail_reads(true);
    let mut vmm = guest(READS, &image, ",rerror=ignore");
    assert_told(&mut vmm.qmp().unwrap(), "read", "ignore");
    vmm.wait_line("^DISKREAD requests=[1-9]").unwrap();
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 1);
    assert!(!vmm.serial().text().contains("DISK-ERROR"), "{}", vmm.serial().tail());
}

#[test]
#[needs(kvm, fuse)]
fn a_guest_whose_read_fails_is_stopped_and_the_read_is_repeated() {
    let hosts = Hosts::new();
    let image = HangingImage::for_test(&hosts, "disk", BYTES);
    image.fail_reads(true);
    let mut vmm = guest("work=diskread run_ms=60000", &image, ",rerror=stop");
    let mut qmp = vmm.qmp().unwrap();
    qmp.wait_info(|_| true).unwrap();
    while qmp.run_state().unwrap() != "io-error" {
        // It may have stopped before this client came.
        let _ = qmp.wait_event("STOP", SOON).unwrap();
    }
    assert_eq!(io_status(&mut qmp), "failed");
    // For nothing.
    qmp.execute("cont", json!({})).unwrap();
    assert_told(&mut qmp, "read", "stop");
    qmp.wait_event("STOP", SOON).unwrap();
    image.fail_reads(false);
    qmp.execute("cont", json!({})).unwrap();
    assert_eq!((qmp.run_state().unwrap().as_str(), io_status(&mut qmp)), ("running", json!("ok")));
    assert!(!vmm.serial().text().contains("DISK-ERROR"), "{}", vmm.serial().tail());
    // One read at a time: another one that fails proves that this one was repeated.
    image.fail_reads(true);
    assert_told(&mut qmp, "read", "stop");
    qmp.execute("quit", json!({})).unwrap();
    assert_eq!(vmm.process.exit_code(SOON).unwrap(), 0);
}
