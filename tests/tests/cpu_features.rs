//! A guest that was told of a CPU feature which the destination's host lacks.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::{frames, needs};
use serde_json::Value;

/// Gives the guest a feature that only Xeon Phi has ever had, and no host that runs this: avx512er.
fn add_feature(machine: &[u8]) -> Vec<u8> {
    let mut description: Value = serde_json::from_slice(machine).unwrap();
    let entries = description["machine"]["cpuid"].as_array_mut().unwrap();
    let leaf_7 = |entry: &&mut Value| entry.as_str().unwrap().starts_with("0700000000000000");
    let entry = entries.iter_mut().find(leaf_7).expect("leaf 7");
    let mut hex = entry.as_str().unwrap().to_owned();
    // function, index, flags, eax, then ebx: four bytes each, two digits a byte. Bit 27 is in the last.
    let byte = u8::from_str_radix(&hex[38..40], 16).unwrap() | 1 << 3;
    hex.replace_range(38..40, &format!("{byte:02x}"));
    *entry = hex.into();
    serde_json::to_vec(&description).unwrap()
}

/// The machine description, changed.
fn meddle(kind: u8, payload: Vec<u8>) -> Option<Vec<u8>> {
    Some(if kind == frames::kind::MACHINE { add_feature(&payload) } else { payload })
}

#[test]
#[needs(kvm)]
fn a_missing_cpu_feature_is_refused_by_name_before_any_page() {
    let mut source = ferry::run(&Guest::new("work=dirty ws_mb=8 rate_mbps=50", 64)).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    let mut destination = ferry::receive().unwrap();
    let meddled = frames::between(&destination.address, meddle, frames::unchanged).unwrap();
    let ended = ferry::migrate(&source, &meddled, &[]).unwrap();
    assert_eq!(ended.code, 1, "{}", ended.errors);
    let said = ended.summary["error-desc"].as_str().unwrap();
    let expected = "this host's CPU lacks features that the guest uses: avx512er";
    assert!(said.ends_with(expected), "{said}");
    assert_eq!(ended.summary["ram"]["normal"], 0, "{}", ended.summary);
    assert_ne!(destination.vmm.process.exit_code(ferry_tests::process::SOON).unwrap(), 0);
    source.wait_next_line("^HB ").unwrap();
    assert_eq!(source.check().unwrap().corrupt, 0, "the guest goes on at the source");
}
