//! A guest that was told of a CPU feature which the destination's host lacks.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::skip;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

const HEADER_BYTES: usize = 8;
const MACHINE: u8 = 2;

/// One frame of the control connection: its header with the length at the end, and what it carries.
fn frame(from: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
    let mut header = [0; HEADER_BYTES];
    from.read_exact(&mut header)?;
    let len = header[4..].iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    let mut payload = vec![0; len];
    from.read_exact(&mut payload)?;
    Ok((header[0], payload))
}

#[expect(clippy::little_endian_bytes, reason = "a codec of frame headers")]
fn send(to: &mut TcpStream, kind: u8, payload: &[u8]) -> std::io::Result<()> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
    bytes.extend(payload);
    to.write_all(&bytes)
}

/// Gives the guest every feature bit of CPUID leaf 7, as if its source had them all.
fn add_features(machine: &[u8]) -> Vec<u8> {
    let mut description: Value = serde_json::from_slice(machine).unwrap();
    let entries = description["machine"]["cpuid"].as_array_mut().unwrap();
    let leaf_7 = |entry: &&mut Value| entry.as_str().unwrap().starts_with("0700000000000000");
    let entry = entries.iter_mut().find(leaf_7).expect("leaf 7");
    let mut hex = entry.as_str().unwrap().to_owned();
    // function, index, flags, eax, then ebx: four bytes each, two digits a byte.
    hex.replace_range(32..40, "ffffffff");
    *entry = hex.into();
    serde_json::to_vec(&description).unwrap()
}

/// Between a source and `address`: passes everything on, but for the machine description.
fn meddle(address: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = format!("tcp:{}", listener.local_addr().unwrap());
    let there = address.strip_prefix("tcp:").unwrap().to_owned();
    std::thread::spawn(move || {
        for source in listener.incoming().take(2) {
            let (mut source, mut destination) =
                (source.unwrap(), TcpStream::connect(&there).unwrap());
            let (mut back_from, mut back_to) =
                (destination.try_clone().unwrap(), source.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
            std::thread::spawn(move || {
                while let Ok((kind, payload)) = frame(&mut source) {
                    let changed = if kind == MACHINE { add_features(&payload) } else { payload };
                    if send(&mut destination, kind, &changed).is_err() {
                        break;
                    }
                }
            });
        }
    });
    here
}

#[test]
fn a_missing_cpu_feature_is_refused_by_name_before_any_page() {
    if skip::kvm_is_missing() {
        return;
    }
    let mut source = ferry::run(&Guest::new("work=dirty ws_mb=8 rate_mbps=50", 64)).unwrap();
    source.wait_line("^HB n=2 ").unwrap();
    let mut destination = ferry::receive().unwrap();
    let ended = ferry::migrate(&source, &meddle(&destination.address), &[]).unwrap();
    assert_eq!(ended.code, 1, "{}", ended.errors);
    let said = ended.summary["error-desc"].as_str().unwrap_or_default();
    assert!(said.contains("CPU") && said.contains("7"), "{said}");
    assert_eq!(ended.summary["ram"]["normal"].as_u64().unwrap_or(0), 0, "{}", ended.summary);
    assert_ne!(destination.vmm.process.exit_code(ferry_tests::process::SOON).unwrap(), 0);
    source.wait_next_line("^HB ").unwrap();
    assert_eq!(source.check().unwrap().corrupt, 0, "the guest goes on at the source");
}
