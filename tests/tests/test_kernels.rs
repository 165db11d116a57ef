//! What test kernels expect of their machine: fw_cfg, the test device, pvpanic, the debug console, and every way to end;
//! each as the guest stays and as it moves all the time.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::hosts::moving;
use ferry_tests::image::{Pattern, fill};
use ferry_tests::needs;
use ferry_tests::process::{SOON, Vmm};
use serde_json::json;
use std::fmt::Display;
use std::path::Path;
use std::process::Command;

/// Once as it stays, once as it moves.
const WAYS: [&[&str]; 2] = [&[], &["--migrate-every", "20ms"]];

fn guest(work: impl Display) -> Guest {
    let mut guest = Guest::new(&format!("do={work}"), 64);
    guest.kernel = guest_images::TEST_DEVICES.into();
    guest
}

fn run(guest: &Guest, more: &[&str]) -> Vmm {
    ferry::run_with(guest, more).unwrap()
}

/// Waits for the end; checks the exit code and that the last line says `why`.
#[track_caller]
fn assert_ended(vmm: &mut Vmm, code: i32, why: &str) {
    let found = vmm.process.exit_code(SOON).unwrap();
    let errors = vmm.process.err.text();
    let last = errors.lines().last().unwrap_or_default();
    assert!(found == code && last.contains(why), "{found}: {errors}\n{}", vmm.serial().text());
    assert!(!errors.contains("failed"), "{errors}");
    if errors.contains("--migrate-every") || errors.contains("ferry: moved ") {
        assert!(!errors.contains("moved 0 times"), "it has not moved: {errors}");
    }
}

#[test]
#[needs(kvm)]
fn a_kernel_reads_cpus_ram_a_file_and_its_initrd_through_fw_cfg() {
    let folder = tempfile::tempdir().unwrap();
    let initrd = folder.path().join("initrd");
    let bytes: Vec<u8> = (0..20_000_u32).map(|at| (at % 253) as u8).collect();
    std::fs::write(&initrd, &bytes).unwrap();
    let sum =
        bytes.iter().fold(0, |sum: u32, byte| sum.rotate_left(1).wrapping_add((*byte).into()));
    let file = folder.path().join("file");
    std::fs::write(&file, "hello, fw_cfg").unwrap();
    let from_file = format!("name=opt/test,file={}", file.display());
    let items = [from_file.as_str(), "opt/test,string=hello,, fw_cfg"];
    for ((way, item), work) in WAYS.into_iter().zip(items).flat_map(|way| [(way, 'f'), (way, 'd')])
    {
        let mut guest = guest(work).cpus(3);
        guest.initrd = Some(initrd.clone());
        let more = ["--fw-cfg", "name=opt/a,string=other", "--fw-cfg", item];
        let mut vmm = run(&guest, &[way, &more].concat());
        assert_ended(&mut vmm, 1, "wrote 0");
        let file = if work == 'f' { " file=hello, fw_cfg" } else { "" };
        let expected =
            format!("FWCFG cpus=00000003 ram=04000000{file} initrd=00004e20 sum={sum:08x}");
        assert_eq!(vmm.serial().text().trim_end(), expected, "{way:?}");
    }
}

#[test]
#[needs(kvm)]
fn a_kernel_takes_edges_and_levels_that_it_raises_through_the_test_device() {
    for way in WAYS {
        let mut vmm = run(&guest('i'), &[way, &["--testdev"]].concat());
        assert_ended(&mut vmm, 1, "wrote 0");
        // 300 = 0x12c rounds; one edge more that was held, and one and four levels.
        assert_eq!(vmm.serial().text().trim_end(), "IRQ edges=0000012d levels=00000131", "{way:?}");
    }
}

#[test]
#[needs(kvm)]
fn a_multiboot_kernel_finds_the_8259s_as_a_bios_leaves_them() {
    for way in WAYS {
        let mut vmm = run(&guest('v'), &[way, &["--testdev"]].concat());
        assert_ended(&mut vmm, 1, "wrote 0");
    }
}

#[test]
#[needs(kvm)]
fn a_kernel_starts_the_cpus_that_fw_cfg_counts_in_real_mode() {
    for (way, cpus) in WAYS.into_iter().flat_map(|way| [(way, 1), (way, 4), (way, 7)]) {
        let mut vmm = run(&guest('s').cpus(cpus), way);
        assert_ended(&mut vmm, 1, "wrote 0");
        let others = cpus - 1;
        assert_eq!(vmm.serial().text().trim_end(), format!("CPUS others={others:08x}"), "{way:?}");
    }
}

#[test]
#[needs(kvm)]
fn a_kernel_goes_to_real_mode_takes_interrupts_there_and_comes_back() {
    for way in WAYS {
        let mut vmm = run(&guest('a'), &[way, &["--testdev"]].concat());
        assert_ended(&mut vmm, 1, "wrote 0");
        let expected = "REAL ints=00000001 keyboards=00000001 divides=00000001";
        assert_eq!(vmm.serial().text().trim_end(), expected, "{way:?}");
    }
}

#[test]
#[needs(kvm)]
fn what_the_test_device_keeps_moves_with_the_guest() {
    for way in WAYS {
        let mut vmm = run(&guest('m'), &[way, &["--testdev"]].concat());
        assert_ended(&mut vmm, 1, "wrote 0");
    }
    // Without it, nothing is there.
    let mut vmm = run(&guest('m'), &[]);
    assert_ended(&mut vmm, 255, "wrote 127");
}

#[test]
#[needs(kvm)]
fn every_way_to_end_has_its_code() {
    let at = ["--debug-exit", "iobase=0x501,iosize=2"];
    for way in WAYS {
        let mut elsewhere = run(&guest('e'), &[way, &at].concat());
        assert_ended(&mut elsewhere, 11, "wrote 5 to the debug-exit port");
        let mut powered_off = run(&guest('o'), way);
        assert_ended(&mut powered_off, 0, "powered off");
        let mut reset = run(&guest('r'), &[way, &["--no-reboot"]].concat());
        assert_ended(&mut reset, 0, "asked for a reset");
        let mut fault = run(&guest('t'), way);
        assert_ended(&mut fault, 134, "the guest crashed");
        let mut panicked = run(&guest('p'), way);
        assert_ended(&mut panicked, 134, "the guest panicked");
    }
    for way in WAYS {
        let mut spins = run(&guest("qo"), &[way, &["--timeout", "300ms"]].concat());
        assert_ended(&mut spins, 124, "--timeout has passed");
        let mut unmatched = run(&guest('o'), &[way, &["--expect", "never said"]].concat());
        assert_ended(&mut unmatched, 4, "--expect never matched");
    }
    let off = run(&guest('e'), &["--debug-exit", "off", "--timeout", "1s"]);
    assert_ended(&mut { off }, 124, "--timeout");
}

#[test]
#[needs(kvm)]
fn a_panic_is_an_event_and_a_crash_that_goes_on_another() {
    for way in WAYS {
        let mut vmm = run(&guest("qc"), way);
        let mut qmp = vmm.qmp().unwrap();
        vmm.process.type_in("x").unwrap();
        let event = qmp.wait_event("GUEST_CRASHLOADED", SOON).unwrap();
        assert_eq!(event["data"], json!({"action": "run"}));
        assert_ended(&mut vmm, 1, "wrote 0");
        let mut vmm = run(&guest("qp"), way);
        let mut qmp = vmm.qmp().unwrap();
        vmm.process.type_in("x").unwrap();
        let event = qmp.wait_event("GUEST_PANICKED", SOON).unwrap();
        assert_eq!(event["data"], json!({"action": "poweroff"}));
        let event = qmp.wait_event("SHUTDOWN", SOON).unwrap();
        assert_eq!(event["data"], json!({"guest": true, "reason": "guest-panic"}));
        assert_ended(&mut vmm, 134, "the guest panicked");
    }
}

#[test]
#[needs(kvm)]
fn a_guest_has_its_own_verdict_at_whatever_moment_of_a_move_it_ends() {
    let every = ["--migrate-every", "1ms"];
    for moment in 0..60 {
        let mut vmm = run(&guest(format_args!("x{moment:02}")), &every);
        let found = vmm.process.exit_code(SOON).unwrap();
        assert_eq!(found, 2 * moment + 1, "{}", vmm.process.err.text());
        let errors = vmm.process.err.text();
        assert!(!errors.contains("failed"), "{errors}");
    }
}

#[test]
#[needs(kvm)]
fn a_guest_that_ends_while_it_moves_to_another_host_ends_at_its_source() {
    let folder = tempfile::tempdir().unwrap();
    let module = folder.path().join("module");
    fill(&module, 0, 16 << 20, Pattern::Random).unwrap();
    for (work, code, why) in [
        ("qx07", 15, "the guest wrote 7 to the debug-exit port"),
        ("qo", 0, "the guest powered off"),
        ("qt", 134, "the guest crashed"),
        ("qp", 134, "the guest panicked"),
    ] {
        let mut guest = guest(work);
        guest.initrd = Some(module.clone());
        let mut source = run(&guest, &[]);
        let mut destination = ferry::receive().unwrap();
        // Its control socket may not be there yet.
        drop(source.qmp().unwrap());
        // Sixteen seconds.
        let migration = moving(&source, &destination.address, &["--max-bandwidth", "1M"]);
        source.process.type_in("x").unwrap();
        assert_ended(&mut source, code, why);
        let ended = migration.end(SOON).unwrap();
        assert_eq!(ended.code, 1, "{}", ended.errors);
        assert_eq!(destination.vmm.process.exit_code(SOON).unwrap(), 126);
        let said = destination.vmm.process.err.text();
        // It may see that a connection for pages has gone before it is told why.
        let ending = format!("its process ends with code {code}: {why}");
        let is_told = said.contains(&ending) || said.contains("connection lost");
        assert!(said.contains("did not arrive") && is_told, "{said}");
    }
}

#[test]
#[needs(kvm)]
fn a_guest_that_has_moved_to_another_host_ends_there_with_its_own_verdict() {
    for (work, code, why) in [
        ("qm", 1, "the guest wrote 0 to the debug-exit port"),
        ("qi", 1, "the guest wrote 0 to the debug-exit port"),
        ("qv", 1, "the guest wrote 0 to the debug-exit port"),
        ("qa", 1, "the guest wrote 0 to the debug-exit port"),
        ("qo", 0, "the guest powered off"),
        ("qr", 0, "the guest asked for a reset"),
        ("qt", 134, "the guest crashed"),
        ("qp", 134, "the guest panicked"),
    ] {
        let source = run(&guest(work), &["--testdev"]);
        let mut destination = ferry::receive_at("tcp:127.0.0.1:0", &["--no-reboot"]).unwrap();
        // Its control socket may not be there yet.
        drop(source.qmp().unwrap());
        ferry::migrate_well(&source, &destination.address, &[]).unwrap();
        destination.vmm.process.type_in("x").unwrap();
        assert_ended(&mut destination.vmm, code, why);
    }
}

fn lines_of_the_debug_console() -> String {
    let letter = |number: u32, at: u32| char::from(b'a' + (number >> (4 * at) & 15) as u8);
    (0..2048).flat_map(|n| [letter(n, 3), letter(n, 2), letter(n, 1), letter(n, 0), '\n']).collect()
}

#[test]
#[needs(kvm)]
fn the_debug_console_loses_nothing_and_repeats_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let to_file = format!("file={}", log.display());
    for way in WAYS {
        std::fs::write(&log, "of an earlier guest").unwrap();
        let mut vmm = run(&guest('b'), &[way, &["--debugcon", &to_file]].concat());
        assert_ended(&mut vmm, 1, "wrote 0");
        assert!(read(&log) == lines_of_the_debug_console(), "{way:?}: {}", read(&log));
        let mut vmm = run(&guest('b'), &[way, &["--debugcon", "stdio"]].concat());
        assert_ended(&mut vmm, 1, "wrote 0");
        assert!(vmm.serial().text() == lines_of_the_debug_console(), "{way:?}");
    }
    let mut vmm = run(&guest('b'), &["--debugcon", "null"]);
    assert_ended(&mut vmm, 1, "wrote 0");
    assert_eq!(vmm.serial().text(), "");
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
#[needs(kvm)]
fn a_missing_device_is_named_once_for_who_asks() {
    let mut vmm = run(&guest('n'), &["-v"]);
    assert_ended(&mut vmm, 1, "wrote 0");
    let errors = vmm.process.err.text();
    for place in ["reads port 0x70,", "writes port 0x80,", "reads 0xfed000f0,"] {
        assert_eq!(errors.matches(place).count(), 1, "{place}: {errors}");
    }
    let mut vmm = run(&guest('n'), &[]);
    assert_ended(&mut vmm, 1, "wrote 0");
    assert!(!vmm.process.err.text().contains("no device"));
}

#[test]
#[needs(kvm)]
fn what_cannot_be_is_refused_by_option() {
    let refused = |more: &[&str], code: i32, words: &str| {
        let mut vmm = run(&guest('f'), more);
        assert_eq!(vmm.process.exit_code(SOON).unwrap(), code);
        let errors = vmm.process.err.text();
        assert!(errors.contains(words), "{errors}");
    };
    refused(&["--debug-exit", "iobase=0x3f8,iosize=1"], 2, "serial port");
    refused(&["--debugcon", "stdio", "--serial", "null"], 2, "--serial stdio");
    let twice = ["--fw-cfg", "opt/a,string=1", "--fw-cfg", "opt/a,string=2"];
    refused(&twice, 2, "given twice");
    for way in WAYS {
        refused(&[way, &["--fw-cfg", "opt/a,file=/nonexistent"]].concat(), 126, "/nonexistent");
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (fifo, large) = (at("fifo"), at("large"));
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    std::fs::write(&large, vec![0; (256 << 10) + 1]).unwrap();
    let file = |path: &str| format!("name=opt/a,file={path}");
    refused(&["--fw-cfg", &file(&fifo)], 126, "not a regular file");
    refused(&["--fw-cfg", &file(&large)], 126, "more than 262144 bytes");
    let long = format!("name=opt/{},string=1", "a".repeat(52));
    refused(&["--fw-cfg", &long], 2, "at most 55");
    // QEMU warns of such a name, too.
    refused(&["--fw-cfg", "a,string=1"], 255, "does not begin with \"opt/\"");
}
