//! `ferry qemu`: QEMU's command line, by `qemu_runner.bash`, which knows nothing of Ferry, and option by option.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::process::{Process, SOON, Vmm};
use ferry_tests::{bare, disk, ferry, needs};
use serde_json::json;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

const RUNNER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qemu_runner.bash");
/// Where all lines begin that run a guest and take its exit code.
const GUEST: [&str; 10] = [
    "qemu",
    "-nodefaults",
    "-no-reboot",
    "-display",
    "none",
    "-serial",
    "stdio",
    "-enable-kvm",
    "-device",
    "isa-debug-exit,iobase=0xf4,iosize=0x4",
];
/// What makes it migrate, in the environment.
const MIGRATE_EVERY: &str = "FERRY_MIGRATE_EVERY";

/// What the runner says of each test, in order, and what the guests printed.
fn results(runner: &mut Command, tests: &[&str]) -> (Vec<String>, String) {
    let mut process = Process::start(runner).unwrap();
    process.type_in(&format!("{}\n", tests.join("\n"))).unwrap();
    process.close_input();
    let code = process.exit_code(SOON).unwrap();
    assert_eq!(code, 0, "{}", process.err.text());
    (process.out.from(0), process.err.text())
}

/// `ferry qemu` with a guest's options and `more`.
fn qemu(more: &[&str]) -> Command {
    ferry::command(GUEST.iter().chain(more))
}

/// Runs a command to its end: the exit code, standard output and error.
fn end(command: &mut Command) -> (i32, String, String) {
    let mut process = Process::start(command).unwrap();
    process.close_input();
    let code = process.exit_code(SOON).unwrap();
    (code, process.out.text(), process.err.text())
}

#[test]
#[needs(kvm)]
fn a_runner_for_qemu_runs_its_tests_under_ferry_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    symlink(ferry::binary(), folder.path().join("qemu-system-x86_64")).unwrap();
    let path = std::env::var("PATH").unwrap();
    let devices = guest_images::TEST_DEVICES;
    let (multiboot, own) = (guest_images::MULTIBOOT_FLAT, guest_images::KERNEL);
    let tests = [
        format!("storage 20s {devices} -append 'do=m' -smp 2"),
        format!("module 20s {multiboot} -initrd {RUNNER}"),
        format!("hello 20s {own} -append 'work=hello code=0' -smp 2 -m 256M -cpu max"),
        format!("broken 20s {own} -append 'work=hello code=1'"),
        format!("crash 20s {devices} -append 'do=t'"),
        format!("off 20s {devices} -append 'do=o'"),
        format!("endless 1s {own} -append 'work=idle'"),
        format!("device 20s {devices} -device edu"),
        format!("split 20s {devices} -machine kernel_irqchip=split"),
    ];
    let tests: Vec<_> = tests.iter().map(String::as_str).collect();
    for every in ["", "20ms"] {
        let mut runner = Command::new("bash");
        runner.arg(RUNNER).env_remove("QEMU").env(MIGRATE_EVERY, every);
        runner.env("PATH", format!("{}:{path}", folder.path().display()));
        let (results, guests) = results(&mut runner, &tests);
        let expected = [
            "storage: PASS",
            "module: FAIL exit 3",
            "hello: PASS",
            "broken: FAIL exit 3",
            "crash: FAIL aborted",
            "off: FAIL exit 0",
            "endless: FAIL timeout",
        ];
        assert_eq!(results[..expected.len()], expected, "{every:?}: {guests}");
        let skipped = &results[expected.len()..];
        for (result, words) in skipped.iter().zip(["-device edu", "kernel_irqchip=split"]) {
            assert!(result.contains(": SKIP ") && result.contains(words), "{result}");
        }
        assert!(guests.contains("FERRY hello from the guest cpus=2 ram_mb=256"), "{guests}");
        assert!(guests.contains("HB n="), "{guests}");
    }
}

#[test]
#[needs(kvm)]
fn the_environment_makes_it_migrate_and_only_v_says_so() {
    let guest = ["-kernel", guest_images::TEST_DEVICES, "-append", "do=m", "-device", "pc-testdev"];
    for every in [None, Some("20ms")] {
        let run = |more: &[&str]| {
            let mut command = qemu(&[&guest, more].concat());
            command.envs(every.map(|every| (MIGRATE_EVERY, every)));
            end(&mut command)
        };
        assert_eq!(run(&[]), (1, String::new(), String::new()), "{every:?}");
        let (code, _, errors) = run(&["-v"]);
        assert_eq!(code, 1);
        let moved = errors.contains("moved ") && !errors.contains("moved 0 times");
        assert_eq!(moved, every.is_some(), "{errors}");
    }
    let (code, _, errors) = end(qemu(&guest).env(MIGRATE_EVERY, "often"));
    assert!(code == 2 && errors.contains("FERRY_MIGRATE_EVERY") && errors.contains("often"));
    // It is `ferry run`'s, too, whose option wins.
    let run = ["run", "--testdev", "--kernel", guest_images::TEST_DEVICES, "--cmdline", "do=m"];
    let (code, _, errors) = end(ferry::command(run).env(MIGRATE_EVERY, "20ms"));
    assert!(code == 1 && errors.contains("ferry: moved "), "{code}: {errors}");
    let (code, _, errors) =
        end(ferry::command(run).args(["--migrate-every", "1h"]).env(MIGRATE_EVERY, "20ms"));
    assert!(code == 1 && errors.contains("ferry: moved 0 times"), "{code}: {errors}");
}

#[test]
fn what_would_change_a_test_is_refused_by_name_and_all_of_it_at_once() {
    let more = ["-bios", "b.bin", "-cdrom", "c.iso", "-device", "e1000", "-frobnicate", "-hda"];
    let (code, out, errors) = end(&mut qemu(&more));
    assert_eq!((code, out.as_str()), (2, ""));
    for word in ["-bios b.bin", "-cdrom c.iso", "e1000", "-frobnicate", "-hda", "-kernel"] {
        assert!(errors.contains(word), "no {word}: {errors}");
    }
    assert_eq!(errors.lines().count(), 1, "{errors}");
    let (code, _, errors) =
        end(&mut qemu(&["-kernel", "k", "-netdev", "user,id=n", "-vga", "std"]));
    assert!(code == 2 && errors.contains("-netdev user,id=n") && errors.contains("-vga std"));
}

#[test]
#[needs(kvm)]
fn what_changes_nothing_is_ignored_and_said_with_v_only() {
    let ignored = ["-rtc", "base=utc,driftfix=slew", "-boot", "order=c", "-M", "q35,usb=off"];
    let folder = tempfile::tempdir().unwrap();
    let kernel = bare::kernel(folder.path(), &[&[0xb0, 0], &bare::END]).unwrap();
    let line = [&["-kernel", kernel.to_str().unwrap()], &ignored[..]].concat();
    assert_eq!(end(&mut qemu(&line)), (1, String::new(), String::new()));
    // Before the verb, where other commands have it, and among QEMU's options.
    let before = ["-v"].iter().chain(&GUEST).chain(&line);
    let commands = [ferry::command(before), qemu(&[&line, &["-v"][..]].concat())];
    for mut command in commands {
        let (code, _, errors) = end(&mut command);
        assert_eq!(code, 1);
        for word in ["-rtc driftfix=slew", "-boot order=c", "-machine q35", "usb=off"] {
            assert!(errors.contains(word), "no {word}: {errors}");
        }
    }
}

#[test]
fn a_link_answers_as_qemu_does() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["qemu-system-x86_64", "qemu-kvm"] {
        let link = folder.path().join(name);
        symlink(ferry::binary(), &link).unwrap();
        let (code, out, _) = end(Command::new(&link).arg("-version"));
        assert!(code == 0 && out.starts_with("QEMU emulator version 7.2"), "{out}");
        let (code, out, _) = end(Command::new(&link).args(["-device", "help"]));
        assert!(code == 0 && out.contains("name \"isa-debug-exit\", bus ISA"), "{out}");
        let (code, _, errors) = end(Command::new(&link).arg("run"));
        assert!(code == 2 && errors.contains("\"run\""), "{errors}");
    }
    let (code, out, _) = end(&mut ferry::command(["qemu", "--help"]));
    assert!(code == 0 && out.contains(MIGRATE_EVERY) && out.contains("-kernel …"), "{out}");
}

/// Starts the guest that writes to its disk with QEMU's options, until it has written all of it.
fn start_writer(folder: &Path, disk: &[&str], every: &str) -> Vmm {
    let socket = folder.join("qmp");
    let control = format!("unix:{},server=on,wait=off", socket.display());
    let mut command = qemu(disk);
    command.args(["-kernel", guest_images::KERNEL, "-append", "work=disk disk_mb=4"]);
    command.args(["-m", "128", "-monitor", "none", "-qmp", &control, "-S"]);
    command.env(MIGRATE_EVERY, every);
    let process = Process::start(&mut command).unwrap();
    let vmm = Vmm::new(process, socket, tempfile::tempdir().unwrap());
    let mut qmp = vmm.qmp().unwrap();
    // -S: it waits for that.
    let status = qmp.execute("query-status", json!({})).unwrap();
    assert_eq!(status["running"], json!(false));
    qmp.execute("cont", json!({})).unwrap();
    vmm.wait_line("^READY work=disk ").unwrap();
    vmm
}

#[test]
#[needs(kvm)]
fn disks_are_drives_and_nodes_and_a_snapshot_leaves_them_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let file = image.display();
    let drive = format!("file={file},format=raw,if=none,id=d0,cache=none");
    let node = format!("driver=file,filename={file},node-name=f0");
    let ways = [
        vec!["-drive", &drive, "-device", "virtio-blk-device,drive=d0,serial=root", "-snapshot"],
        vec!["-drive", &drive, "-device", "virtio-blk-pci,drive=d0,serial=root"],
        vec![
            "-blockdev",
            &node,
            "-blockdev",
            "driver=raw,file=f0,node-name=n0",
            "-device",
            "virtio-blk-device,drive=n0,serial=root",
        ],
    ];
    for (disk, every) in ways.iter().flat_map(|disk| [(disk, ""), (disk, "50ms")]) {
        disk::create(&image, 8 << 20).unwrap();
        let before = std::fs::read(&image).unwrap();
        let mut vmm = start_writer(folder.path(), disk, every);
        vmm.process.type_in("q").unwrap();
        assert_eq!(vmm.process.exit_code(SOON).unwrap(), 1, "{}", vmm.process.err.text());
        let written = std::fs::read(&image).unwrap() != before;
        assert_eq!(written, !disk.contains(&"-snapshot"), "{disk:?} {every}");
    }
}
