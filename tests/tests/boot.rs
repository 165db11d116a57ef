//! `ferry run` from start to exit code, and clear errors for what cannot boot.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use anyhow::Result;
use ferry_tests::ferry::{self, Guest};
use ferry_tests::process::{Process, SOON};
use ferry_tests::{disk, needs};
use serde_json::json;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

fn run_to_end(cmdline: &str, more: &[&str]) -> Result<(i32, String)> {
    let kernel = ["run", "--kernel", guest_images::KERNEL, "--memory", "64M"];
    ferry::end_of([&kernel[..], &["--cmdline", cmdline], more].concat())
}

/// Runs to the end; checks the exit code and that the message has all of `words`.
#[track_caller]
fn assert_ends(arguments: &[&str], code: i32, words: &[&str]) {
    let (found, text) = ferry::end_of(arguments).unwrap();
    assert_eq!(found, code, "{arguments:?} said: {text}");
    for word in words {
        assert!(text.contains(word), "{arguments:?} does not say {word:?}: {text}");
    }
}

/// A copy of the guest kernel that a test may replace, in a folder of its own.
fn copied_kernel() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    std::fs::copy(guest_images::KERNEL, &kernel).unwrap();
    (folder, kernel)
}

#[test]
#[needs(kvm)]
fn the_exit_code_is_the_guests() {
    let (code, text) = run_to_end("work=hello", &[]).unwrap();
    assert_eq!(code, 0, "{text}");
    assert!(text.starts_with("FERRY hello from the guest"), "{text}");
    for value in [0, 1, 3, 16] {
        let (code, text) = run_to_end(&format!("work=hello code={value}"), &[]).unwrap();
        assert_eq!(code, value << 1 | 1, "{text}");
    }
}

#[test]
#[needs(kvm)]
fn the_guests_self_test_notices_flipped_bits() {
    let (code, text) = run_to_end("work=selftest", &[]).unwrap();
    assert_eq!(code, 1, "code 0 through the debug port: {text}");
    // Three fills, three kinds of rewriting, six bits.
    let bits = text.lines().filter(|line| line.contains("flipped bit detected at page ")).count();
    assert_eq!(bits, 54, "{text}");
    for word in ["flipped bit detected in a sector", "lost registers detected"] {
        assert!(text.contains(&format!("SELFTEST {word}")), "{word}: {text}");
    }
    assert!(!text.contains("failed"), "{text}");
}

#[test]
#[needs(kvm)]
fn a_timeout_ends_with_124_and_a_match_with_0() {
    assert_eq!(run_to_end("work=idle", &["--timeout", "300ms"]).unwrap().0, 124);
    let (code, text) =
        run_to_end("work=idle", &["--expect", "HB n=2 ", "--timeout", "30s"]).unwrap();
    assert_eq!(code, 0, "{text}");
    let (code, text) = run_to_end("work=hello", &["--expect", "no such line"]).unwrap();
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("--expect never matched"), "{text}");
}

#[test]
#[needs(kvm)]
fn many_cpus_and_memory_past_the_hole_below_4_gib_work() {
    for (guest, megabytes) in [
        (Guest::new("work=dirty ws_mb=1 rate_mbps=1 fill_pct=10", 64).cpus(8), 64),
        // Only touched pages cost memory; the guest's table of pages is larger than what it fills.
        (Guest::new("work=dirty fill_pct=1 ws_mb=1 rate_mbps=1", 5120), 5120),
        // It writes all over its RAM, a thirteenth of which lies above the hole.
        (ferry::writes_past_the_hole(), 3328),
    ] {
        let mut vmm = ferry::run(&guest).unwrap();
        let ready = vmm.wait_line("^READY ").unwrap().text;
        let found = ferry_tests::verdict::field(&ready, "ram_mb").unwrap();
        assert!((megabytes - 2..=megabytes).contains(&found), "{ready}");
        if guest.memory_mb == 3328 {
            ferry::wait_for_writes_past_the_hole(&vmm).unwrap();
        }
        vmm.wait_line("^HB n=2 ").unwrap();
        assert_eq!(vmm.check().unwrap().corrupt, 0);
    }
}

#[test]
#[needs(kvm)]
fn options_come_from_a_file_and_the_command_line_wins() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("vm.toml");
    let kernel = guest_images::KERNEL;
    let text = format!("kernel = {kernel:?}\nmemory = \"64M\"\ncmdline = \"work=hello code=5\"\n");
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    assert_ends(&["run", "--config", config], 11, &["ram_mb=6"]);
    assert_ends(&["run", "--config", config, "--cmdline", "work=hello code=6"], 13, &[]);
}

#[test]
#[needs(kvm)]
fn serial_output_goes_where_it_was_told_to() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("serial.log");
    let to_file = format!("file={}", log.display());
    let (code, text) = run_to_end("work=hello", &["--serial", &to_file]).unwrap();
    let ended = "ferry: exit 0: the guest powered off\n";
    assert_eq!((code, text.as_str()), (0, ended));
    assert!(std::fs::read_to_string(&log).unwrap().starts_with("FERRY hello"));
    assert_eq!(run_to_end("work=hello", &["--serial", "null"]).unwrap(), (0, ended.into()));

    let socket = folder.path().join("serial");
    let to_socket = format!("socket={}", socket.display());
    let vmm = ferry::run_with(&Guest::new("work=idle", 64), &["--serial", &to_socket]).unwrap();
    vmm.qmp().unwrap();
    let mut client = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    let lines = ferry_tests::lines::Lines::collect(client.try_clone().unwrap());
    lines.wait_for("^HB n=", SOON).unwrap();
    std::io::Write::write_all(&mut client, b"c").unwrap();
    lines.wait_for("^CHECK ", SOON).unwrap();
}

/// The guest's kernel with one change.
fn changed_kernel(path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut bytes = std::fs::read(guest_images::KERNEL).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

fn number(bytes: &[u8]) -> usize {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

/// Where the program header of the loaded segment is in the file.
fn load_header(bytes: &[u8]) -> usize {
    let first = number(&bytes[32..40]);
    let headers = (0..number(&bytes[56..58])).map(|index| first + index * 56);
    headers.into_iter().find(|at| number(&bytes[*at..*at + 4]) == 1).unwrap()
}

#[test]
#[needs(kvm)]
fn a_triple_fault_is_a_failure_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = changed_kernel(&folder.path().join("kernel"), |bytes| {
        let header = load_header(bytes);
        let offset = number(&bytes[header + 8..header + 16]);
        let address = number(&bytes[header + 24..header + 32]);
        let entry = offset + number(&bytes[24..32]) - address;
        bytes[entry..entry + 2].copy_from_slice(&[0x0f, 0x0b]);
    });
    let words = ["exit 134: the guest crashed: ", "vCPU 0 at rip 0x", "no serial output"];
    assert_ends(&["run", "--kernel", &kernel, "--timeout", "20s"], 134, &words);
    assert_ends(
        &["run", "-v", "--kernel", &kernel, "--timeout", "20s"],
        134,
        &["rip=", "cr3=", "idt="],
    );
}

#[test]
#[needs(kvm)]
fn kernels_that_cannot_boot_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let refused = |kernel: &str, words: &[&str]| {
        assert_ends(&["run", "--kernel", kernel], 126, &[&[kernel], words].concat());
    };
    refused("/nonexistent/kernel", &["No such file"]);
    for (name, bytes) in [("empty", &b""[..]), ("text", b"not a kernel\n")] {
        std::fs::write(path(name), bytes).unwrap();
        refused(path(name).to_str().unwrap(), &["not a kernel"]);
    }
    refused(&changed_kernel(&path("cut"), |bytes| bytes.truncate(8192)), &["truncated"]);
    let huge = changed_kernel(&path("huge"), |bytes| {
        let size = load_header(bytes) + 40;
        bytes[size..size + 8].copy_from_slice(&[0, 0, 0, 0x40, 0, 0, 0, 0]);
    });
    refused(&huge, &["memory"]);
    // A folder, and one whose headers are noise.
    refused(folder.path().to_str().unwrap(), &[]);
    let noise = changed_kernel(&path("noise"), |bytes| bytes[24..64].fill(0xff));
    refused(&noise, &[]);
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    let kernel = guest_images::KERNEL;
    assert_ends(&["run"], 2, &["--kernel"]);
    assert_ends(&["run", "--frobnicate"], 2, &["--frobnicate"]);
    assert_ends(&["run", "--kernel", kernel, "--memory", "1M"], 2, &["--memory", "too little"]);
    assert_ends(&["run", "--kernel", kernel, "--memory", "lots"], 2, &["--memory", "lots"]);
    assert_ends(&["run", "--kernel", kernel, "--cpus", "255"], 2, &["--cpus"]);
    assert_ends(&["run", "--kernel", kernel, "--cpus", "0"], 2, &["--cpus"]);
    assert_ends(&["run", "--kernel", kernel, "--expect", "("], 2, &["--expect"]);
    assert_ends(&["run", "--kernel", kernel, "--qmp", "tcp:1"], 2, &["--qmp"]);
    assert_ends(&["run", "--config", "/nonexistent.toml"], 2, &["/nonexistent.toml"]);
    assert_ends(&["receive", "carrier-pigeon:3"], 2, &["carrier-pigeon"]);
    // All problems at once.
    assert_ends(
        &["run", "--cpus", "255", "--memory", "1M"],
        2,
        &["--kernel", "--cpus", "--memory"],
    );
}

#[test]
#[needs(kvm)]
fn disks_that_cannot_be_used_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let refused = |path: &Path, words: &[&str]| {
        let disk = format!("path={}", path.display());
        let arguments = ["run", "--kernel", guest_images::KERNEL, "--disk", &disk];
        assert_ends(&arguments, 126, &[&[path.to_str().unwrap()], words].concat());
    };
    refused(Path::new("/nonexistent/disk.img"), &["No such file"]);
    disk::create(&image, 1000).unwrap();
    refused(&image, &["512"]);
    refused(folder.path(), &[]);

    disk::create(&image, 1 << 20).unwrap();
    let guest = Guest::new("work=idle", 64).disk("a", &image);
    let first = ferry::run(&guest).unwrap();
    first.wait_line("^HB ").unwrap();
    refused(&image, &["in use by another"]);
    drop(first);
    // Readers share; a writer is kept out.
    let mut shared = Guest::new("work=idle", 64);
    shared.disks.push(format!("path={},id=a,readonly=on", image.display()));
    let one = ferry::run(&shared).unwrap();
    let other = ferry::run(&shared).unwrap();
    one.wait_line("^HB ").unwrap();
    other.wait_line("^HB ").unwrap();
    refused(&image, &["in use by another"]);
}

#[test]
#[needs(kvm)]
fn a_control_socket_in_use_is_left_alone() {
    let first = ferry::run(&Guest::new("work=idle", 64)).unwrap();
    first.wait_line("^HB ").unwrap();
    let socket = format!("unix:{}", first.socket().display());
    let kernel = guest_images::KERNEL;
    assert_ends(&["run", "--kernel", kernel, "--qmp", &socket], 126, &["in use"]);
    assert_eq!(first.qmp().unwrap().run_state().unwrap(), "running");
    // One that a killed process left behind is not in use.
    let folder = tempfile::tempdir().unwrap();
    let stale = folder.path().join("qmp");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let socket = format!("unix:{}", stale.display());
    let (code, text) = run_to_end("work=hello", &["--qmp", &socket]).unwrap();
    assert_eq!(code, 0, "{text}");
}

#[test]
#[needs(own_dev)]
fn a_host_without_kvm_gets_advice_and_code_126() {
    let in_bare_dev = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", r#"mount -t tmpfs none /dev && exec "$@""#, "sh"]);
        command.arg(ferry::binary()).args(arguments);
        let mut process = Process::start(&mut command).unwrap();
        (process.exit_code(SOON).unwrap(), process.out.text() + &process.err.text())
    };
    let (code, text) = in_bare_dev(&["run", "--kernel", guest_images::KERNEL]);
    assert_eq!(code, 126, "{text}");
    assert!(text.contains("/dev/kvm does not exist"), "{text}");
    let (code, text) = in_bare_dev(&["doctor"]);
    assert_eq!(code, 126, "{text}");
    assert!(text.contains("FAIL"), "{text}");
}

#[test]
#[needs(other_users)]
fn a_user_without_permission_gets_advice_and_code_126() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let (program, kernel) = (folder.path().join("ferry"), folder.path().join("kernel"));
    std::fs::copy(ferry::binary(), &program).unwrap();
    std::fs::copy(guest_images::KERNEL, &kernel).unwrap();
    // Whatever this host lets its users do: a /dev of our own, in which KVM is root's.
    let as_nobody = r#"mount -t tmpfs none /dev && mknod -m 600 /dev/kvm c 10 232 &&
        exec setpriv --reuid 65534 --clear-groups "$@""#;
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", as_nobody, "sh"]).arg(program).arg("run").arg("--kernel");
    let mut process = Process::start(command.arg(kernel)).unwrap();
    let (code, text) = (process.exit_code(SOON).unwrap(), process.err.text());
    assert_eq!(code, 126, "{text}");
    assert!(text.contains("no permission"), "{text}");
}

#[test]
#[needs(kvm)]
fn doctor_names_what_it_looked_at() {
    assert_ends(&["doctor"], 0, &["KVM", "dirty log", "huge pages"]);
}

#[test]
#[needs(kvm)]
fn multiboot_kernels_get_command_line_and_modules() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    std::fs::write(&first, "one").unwrap();
    std::fs::write(&second, "two").unwrap();
    let modules = format!("{} a b,{}", first.display(), second.display());
    for kernel in [guest_images::MULTIBOOT_ELF, guest_images::MULTIBOOT_FLAT] {
        let arguments =
            ["run", "--kernel", kernel, "--initrd", &modules, "--cmdline", "test=all", "-v"];
        let (code, said) = ferry::end_of(arguments).unwrap();
        assert_eq!(code, 2 << 1 | 1, "{said}");
        assert!(said.contains(&format!("CMDLINE {kernel} test=all\n")), "{said}");
        assert!(said.contains(&format!("MODULE {} a b HOLDS one\n", first.display())), "{said}");
        assert!(said.contains(&format!("MODULE {} HOLDS two\n", second.display())), "{said}");
        assert!(said.contains("Multiboot kernel ("), "-v says what was detected: {said}");
    }
}

#[test]
#[needs(kvm)]
fn an_elf_without_a_pvh_note_is_entered_as_linux_is() {
    let folder = tempfile::tempdir().unwrap();
    let initrd = folder.path().join("initrd");
    std::fs::write(&initrd, "files").unwrap();
    let (kernel, initrd) = (guest_images::VMLINUX, initrd.to_str().unwrap());
    let arguments =
        ["run", "--kernel", kernel, "--initrd", initrd, "--cmdline", "root=/dev/vda ro", "-v"];
    let (code, said) = ferry::end_of(arguments).unwrap();
    assert_eq!(code, 5 << 1 | 1, "{said}");
    assert!(said.contains("CMDLINE root=/dev/vda ro\n"), "{said}");
    assert!(said.contains("INITRD files\n"), "{said}");
}

#[test]
#[needs(kvm)]
fn a_ramdisk_that_does_not_fit_is_refused_with_the_sizes() {
    let folder = tempfile::tempdir().unwrap();
    let initrd = folder.path().join("initrd");
    std::fs::File::create(&initrd).unwrap().set_len(64 << 20).unwrap();
    let initrd = initrd.to_str().unwrap();
    let kernel = guest_images::KERNEL;
    let arguments = ["run", "--kernel", kernel, "--memory", "32M", "--initrd", initrd];
    assert_ends(&arguments, 126, &["does not fit", "67108864 bytes", "--memory"]);
    let arguments = ["run", "--kernel", kernel, "--initrd", "/nonexistent"];
    assert_ends(&arguments, 126, &["/nonexistent"]);
    let long = "x".repeat(4000);
    assert_ends(&["run", "--kernel", kernel, "--cmdline", &long], 126, &["--cmdline", "2047"]);
}

#[test]
#[needs(kvm)]
fn no_reboot_ends_a_guest_that_resets() {
    let (code, said) = run_to_end("work=hello code=reset", &["--no-reboot"]).unwrap();
    assert_eq!((code, said.matches("FERRY hello").count()), (0, 1), "{said}");
    let mut vmm = ferry::run(&Guest::new("work=hello code=reset", 64)).unwrap();
    vmm.wait_line("FERRY hello").unwrap();
    vmm.wait_next_line("FERRY hello").unwrap();
    vmm.process.kill().unwrap();

    let vmm = ferry::run_with(&Guest::new("work=idle", 64), &["--no-reboot"]).unwrap();
    vmm.wait_line("^HB ").unwrap();
    // What the host asks for is done all the same.
    let mut qmp = vmm.qmp().unwrap();
    qmp.execute("system_reset", json!({})).unwrap();
    qmp.wait_event("RESET", SOON).unwrap();
    qmp.execute("system_powerdown", json!({})).unwrap();
    qmp.wait_event("POWERDOWN", SOON).unwrap();
    assert_eq!(qmp.run_state().unwrap(), "running", "this guest does not listen to the button");
}

#[test]
#[needs(kvm)]
fn a_reset_boots_the_kernel_that_was_there_at_the_start() {
    let (folder, kernel) = copied_kernel();
    let mut guest = Guest::new("work=idle", 64);
    guest.kernel = kernel.clone();
    let mut vmm = ferry::run(&guest).unwrap();
    vmm.wait_line("^HB n=0 ").unwrap();
    let new = folder.path().join("new");
    std::fs::write(&new, "not a kernel\n").unwrap();
    std::fs::rename(&new, &kernel).unwrap();
    let mut qmp = vmm.qmp().unwrap();
    for _ in 0..2 {
        let from = vmm.serial().count();
        qmp.execute("system_reset", json!({})).unwrap();
        qmp.wait_event("RESET", SOON).unwrap();
        vmm.serial().wait_from(from, "^HB n=0 ", SOON).unwrap();
    }
    vmm.process.kill().unwrap();
}

#[test]
#[needs(kvm)]
fn a_guest_that_has_moved_resets_into_the_kernel_that_its_destination_opened() {
    let (_folder, kernel) = copied_kernel();
    let source = ferry::run(&Guest::new("work=idle", 64)).unwrap();
    source.wait_line("^HB n=0 ").unwrap();
    let with_kernel = ["--kernel", kernel.to_str().unwrap()];
    let destination = ferry::receive_at("tcp:127.0.0.1:0", &with_kernel).unwrap();
    std::fs::remove_file(&kernel).unwrap();
    ferry::migrate_well(&source, &destination.address, &[]).unwrap();
    let vmm = &destination.vmm;
    vmm.wait_line("^HB ").unwrap();
    let from = vmm.serial().count();
    vmm.qmp().unwrap().execute("system_reset", json!({})).unwrap();
    vmm.serial().wait_from(from, "^HB n=0 ", SOON).unwrap();
}

#[test]
#[needs(kvm)]
fn a_kernel_that_is_written_while_its_guest_runs_is_named_at_a_reset() {
    let (_folder, kernel) = copied_kernel();
    let mut guest = Guest::new("work=idle", 64);
    guest.kernel = kernel.clone();
    let mut vmm = ferry::run(&guest).unwrap();
    vmm.wait_line("^HB n=0 ").unwrap();
    // The same file, not another one of its name.
    std::fs::OpenOptions::new().write(true).open(&kernel).unwrap().set_len(8192).unwrap();
    let refusal = vmm.qmp().unwrap().refused("system_reset", json!({})).unwrap().description;
    assert!(refusal.contains("has changed on disk"), "{refusal}");
    assert!(refusal.contains(kernel.to_str().unwrap()), "{refusal}");
    vmm.process.kill().unwrap();
}

#[test]
#[needs(kvm)]
fn a_boot_file_that_is_a_fifo_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let (fifo, kernel) = (fifo.to_str().unwrap(), guest_images::KERNEL);
    let words = [fifo, "a FIFO"];
    assert_ends(&["run", "--kernel", fifo], 126, &words);
    assert_ends(&["run", "--kernel", kernel, "--initrd", fifo], 126, &words);
    let receive = ["receive", "tcp:127.0.0.1:0"];
    assert_ends(&[&receive[..], &["--kernel", fifo]].concat(), 126, &words);
    assert_ends(&[&receive[..], &["--kernel", kernel, "--initrd", fifo]].concat(), 126, &words);
}
