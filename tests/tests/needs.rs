//! What becomes of a test that its host cannot run.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::needs;
use ferry_tests::process::{Process, SOON};
use std::path::Path;
use std::process::Command;

#[test]
#[needs(kvm)]
fn only_with_kvm() {
    assert!(Path::new("/dev/kvm").exists());
}

/// Runs [`only_with_kvm`] where there is none; returns the test runner's exit code, and what it said past
/// what it prints of tests.
fn without_kvm(skips: &Path, strict: Option<(&str, &str)>) -> (i32, String) {
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", r#"mount -t tmpfs none /dev && exec "$@""#, "sh"]);
    command.arg(std::env::current_exe().unwrap()).args(["--exact", "only_with_kvm"]);
    command.env("FERRY_SKIP_FILE", skips).env_remove("CI").env_remove("FERRY_REQUIRE_KVM");
    command.envs(strict);
    let mut process = Process::start(&mut command).unwrap();
    (process.exit_code(SOON).unwrap(), process.err.text())
}

#[test]
#[needs(own_dev)]
fn a_test_whose_need_is_not_met_is_counted_and_fails_where_that_would_hide_something() {
    let folder = tempfile::tempdir().unwrap();
    let skips = folder.path().join("skips");
    let (code, said) = without_kvm(&skips, None);
    assert_eq!(code, 0);
    let counted = std::fs::read_to_string(&skips).unwrap();
    assert!(said.contains(&counted), "{said}");
    assert!(counted.starts_with("SKIPPED only_with_kvm: no guest can run here"), "{counted}");
    for strict in [("CI", "true"), ("FERRY_REQUIRE_KVM", "1")] {
        assert_ne!(without_kvm(&skips, Some(strict)).0, 0, "{strict:?}");
    }
    assert_eq!(std::fs::read_to_string(&skips).unwrap(), counted, "a failure is no skip");
}
