//! What options of `ferry run` do to the machine, as its guest sees it here and where it moves to.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::process::{Process, SOON};
use ferry_tests::{bare, disk, needs};
use std::process::Command;

/// What a guest loads AL with, booted with these options: before a move, after one, and after a reset there.
fn found(look: &[u8], disk: Option<&str>, options: &[&str]) -> [i32; 3] {
    let folder = tempfile::tempdir().unwrap();
    let code = [&bare::SAY, &bare::WAIT_FOR_A_KEY[..], look, &bare::END];
    let mut guest =
        Guest { kernel: bare::kernel(folder.path(), &code).unwrap(), ..Guest::new("", 64) };
    let image = folder.path().join("disk.img");
    disk::create(&image, 1 << 20).unwrap();
    guest.disks.extend(disk.map(|disk| format!("path={},id=root{disk}", image.display())));
    let give = format!("root={}", image.display());
    let give = if disk.is_some() { vec!["--disk", &give] } else { Vec::new() };
    [0, 1, 2].map(|case| {
        let mut vmm = ferry::run_with(&guest, options).unwrap();
        vmm.wait_line("^!").unwrap();
        if case > 0 {
            let destination = ferry::receive_at("tcp:127.0.0.1:0", &give).unwrap();
            ferry::migrate_well(&vmm, &destination.address, &[]).unwrap();
            vmm = destination.vmm;
        }
        if case > 1 {
            vmm.qmp().unwrap().execute("system_reset", serde_json::json!({})).unwrap();
            vmm.wait_line("^!").unwrap();
        }
        vmm.process.type_in("x").unwrap();
        // An exit code of a guest is twice its value and one.
        vmm.process.exit_code(SOON).unwrap() >> 1
    })
}

#[test]
#[needs(kvm)]
fn a_source_of_random_bytes_is_there_if_it_was_asked_for() {
    // Kinds of virtio devices: 2 is a disk, 4 is a source of entropy.
    let kind = bare::kind_of_first_device();
    assert_eq!(found(&kind, None, &["--rng"]), [4; 3]);
    assert_eq!(found(&kind, Some(""), &["--rng"]), [2; 3], "it follows the disks");
    assert!(!found(&kind, None, &[]).contains(&4));
}

#[test]
#[needs(kvm)]
fn acpi_tables_are_there_unless_they_are_not_wanted() {
    assert_eq!(found(&bare::HAS_ACPI, None, &[]), [1; 3]);
    assert_eq!(found(&bare::HAS_ACPI, None, &["--acpi", "on"]), [1; 3]);
    assert_eq!(found(&bare::HAS_ACPI, None, &["--acpi", "off"]), [0; 3]);
    let (code, said) = ferry::end_of(["run", "--kernel", "/dev/null", "--acpi", "maybe"]).unwrap();
    assert!(code == 2 && said.contains("--acpi"), "{code}: {said}");
}

#[test]
#[needs(kvm)]
fn a_disk_has_as_many_queues_as_were_asked_for() {
    for (option, last) in [("", 0), (",queues=1", 0), (",queues=4", 3), (",queues=16", 15)] {
        let has = |number| found(&bare::first_device_has_queue(number), Some(option), &[]);
        assert_eq!(has(last), [1; 3], "{option}");
        assert_eq!(has(last + 1), [0; 3], "{option}");
    }
    for bad in ["0", "17", "many"] {
        let disk = format!("path=/nonexistent,queues={bad}");
        let (code, said) =
            ferry::end_of(["run", "--kernel", "/dev/null", "--disk", &disk]).unwrap();
        assert!(code == 2 && said.contains("queues"), "{bad}: {code}: {said}");
    }
}

#[test]
#[needs(kvm)]
fn ctrl_a_x_on_a_terminal_ends_it_and_reaches_no_guest() {
    let on_terminal = |more: &str| {
        let command = format!(
            "'{}' run --kernel '{}' --memory 64M --cmdline work=idle {more}",
            ferry::binary().display(),
            guest_images::KERNEL
        );
        let mut terminal = Command::new("script");
        terminal.args(["--quiet", "--flush", "--return", "--command", &command, "/dev/null"]);
        let person = Process::start(&mut terminal).unwrap();
        person.out.wait_for("^HB n=1 ", SOON).unwrap();
        person
    };
    for (more, code) in [("", 0), ("--expect never", 4)] {
        let mut person = on_terminal(more);
        // Neither of them alone; and Ctrl-C is the guest's.
        person.type_in("x\x03").unwrap();
        person.out.wait_next("^HB ", SOON).unwrap();
        // Ctrl-A twice is one for the guest, and an x behind it is only an x.
        person.type_in("\x01\x01x").unwrap();
        person.out.wait_next("^HB ", SOON).unwrap();
        person.out.wait_next("^HB ", SOON).unwrap();
        person.type_in("\x01x").unwrap();
        assert_eq!(person.exit_code(SOON).unwrap(), code, "{}", person.out.text());
        assert!(person.out.text().contains("Ctrl-A x"), "{}", person.out.text());
    }
    // Without a terminal it is input like any other.
    let mut vmm = ferry::run(&Guest::new("work=idle", 64)).unwrap();
    vmm.wait_line("^HB n=1 ").unwrap();
    vmm.process.type_in("\x01x").unwrap();
    vmm.wait_next_line("^HB ").unwrap();
    assert_eq!(vmm.check().unwrap().corrupt, 0);
}
