//! The table of exit codes, row by row: the code, and the last line on standard error.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::ferry::{self, Guest};
use ferry_tests::process::{Process, SOON, Vmm};
use ferry_tests::{bare, disk, needs};
use std::os::unix::process::CommandExt;
use std::time::Duration;

const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");

/// Checks how a process has ended: its code, and that the last line on standard error has all of `words`.
#[track_caller]
fn assert_ended(process: &mut Process, code: i32, words: &[&str]) {
    let found = process.exit_code(SOON).unwrap();
    let errors = process.err.text();
    let last = errors.lines().last().unwrap_or_default();
    assert!(last.starts_with(&format!("ferry: exit {code}: ")), "{errors}");
    for word in words {
        assert!(last.contains(word), "no {word:?} in {last:?}");
    }
    assert_eq!(found, code, "{errors}");
}

fn run(work: &str, more: &[&str]) -> Vmm {
    ferry::run_with(&Guest::new(work, 64), more).unwrap()
}

#[test]
#[needs(kvm)]
fn what_the_guest_ends_with() {
    for way in [&[][..], &["--migrate-every", "100ms"]] {
        assert_ended(&mut run("work=hello", way).process, 0, &["powered off"]);
        let mut wrote = run("work=hello code=0", way);
        assert_ended(&mut wrote.process, 1, &["wrote 0 to the debug-exit port"]);
        let expect = ["--expect", "never said"];
        let mut unmatched = run("work=hello", &[way, &expect].concat());
        assert_ended(
            &mut unmatched.process,
            4,
            &["--expect never matched", "hello from the guest"],
        );
        let mut unmatched = run("work=hello code=0", &[way, &expect].concat());
        assert_ended(&mut unmatched.process, 4, &["--expect never matched", "wrote 0"]);
        let mut matched = run("work=idle", &[way, &["--expect", "HB n=2 "]].concat());
        assert_ended(&mut matched.process, 0, &["--expect matched"]);
        let mut slow = run("work=idle", &[way, &["--timeout", "1s"]].concat());
        assert_ended(&mut slow.process, 124, &["--timeout", "last serial output", "HB n="]);
    }
    let mut reset = run("work=hello code=reset", &["--no-reboot"]);
    assert_ended(&mut reset.process, 0, &["--no-reboot"]);
}

#[test]
#[needs(kvm)]
fn a_timeout_says_where_each_vcpu_was() {
    let guest = Guest::new("work=spin", 64).cpus(2);
    let mut vmm = ferry::run_with(&guest, &["--timeout", "1s"]).unwrap();
    assert_ended(&mut vmm.process, 124, &["vCPU 0 at rip 0x", "vCPU 1 at rip 0x"]);
}

#[test]
#[needs(kvm)]
fn a_crash_is_134_and_says_where() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::new("", 64);
    guest.kernel = bare::kernel(folder.path(), &[&bare::SAY[..7], &bare::CRASH]).unwrap();
    for more in [&[][..], &["--expect", "never said"], &["--migrate-every", "1s"]] {
        let mut vmm = ferry::run_with(&guest, more).unwrap();
        let words = ["the guest crashed", "vCPU 0 at rip 0x", r#"last serial output "!""#];
        assert_ended(&mut vmm.process, 134, &words);
        assert!(!vmm.process.err.text().contains("cr3="), "registers are for -v");
    }
    let mut vmm = ferry::run_with(&guest, &["-v"]).unwrap();
    assert_ended(&mut vmm.process, 134, &[]);
    for word in ["rip=", "cr3=", "idt="] {
        assert!(vmm.process.err.text().contains(word), "{}", vmm.process.err.text());
    }
}

#[test]
#[needs(kvm)]
fn what_a_user_ends_it_with() {
    for way in [&[][..], &["--migrate-every", "100ms"]] {
        for signal in [libc::SIGTERM, libc::SIGINT] {
            let mut vmm = run("work=idle", way);
            vmm.wait_line("^HB n=2 ").unwrap();
            vmm.process.signal(signal).unwrap();
            assert_ended(&mut vmm.process, 130, &["SIGTERM"]);
        }
        for (expect, code) in [(&[][..], 0), (&["--expect", "never said"], 4)] {
            let mut vmm = run("work=idle", &[way, expect].concat());
            vmm.wait_line("^HB n=2 ").unwrap();
            vmm.qmp().unwrap().execute("quit", serde_json::json!({})).unwrap();
            assert_ended(&mut vmm.process, code, &["ended by `quit`"]);
        }
    }
}

#[test]
#[needs(kvm)]
fn what_cannot_be_run() {
    let ended = |arguments: &[&str], code: i32, words: &[&str]| {
        let mut process = Process::start(&mut ferry::command(arguments)).unwrap();
        assert_ended(&mut process, code, words);
    };
    ended(&["run", "--frobnicate"], 2, &[]);
    ended(&["run", "--kernel", guest_images::KERNEL, "--cpus", "255"], 2, &[]);
    ended(&["run", "--kernel", "/nonexistent"], 126, &["/nonexistent", "No such file"]);
    ended(&["run", "--kernel", "/dev/null", "--migrate-every", "1s"], 126, &["/dev/null"]);
    let disk = ["run", "--kernel", guest_images::KERNEL, "--disk", "path=/nonexistent.img"];
    ended(&disk, 126, &["/nonexistent.img"]);
    ended(&["receive", "unix:/nonexistent/socket"], 126, &["/nonexistent/socket"]);
    // A guest whose disk the destination does not have.
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    disk::create(&image, 1 << 20).unwrap();
    let source = ferry::run(&Guest::new("work=idle", 64).disk("root", &image)).unwrap();
    source.wait_line("^HB ").unwrap();
    let mut destination = ferry::receive().unwrap();
    assert_eq!(ferry::migrate(&source, &destination.address, &[]).unwrap().code, 1);
    assert_ended(&mut destination.vmm.process, 126, &["did not arrive", "root"]);
}

#[test]
fn the_readme_and_the_help_have_the_same_table() {
    let readme = std::fs::read_to_string(README).unwrap();
    let (code, help) = ferry::end_of(["run", "--help"]).unwrap();
    assert_eq!(code, 0);
    for code in [0, 2, 4, 124, 126, 130, 134] {
        assert!(readme.contains(&format!("\n| {code} | ")), "the README lacks {code}");
        assert!(help.contains(&format!("\n  {code} ")), "--help lacks {code}: {help}");
    }
}

/// Starts `ferry` with `arguments`, interrupts it so long after that, and returns its code: 130 whether it
/// ended by the signal or because of it.
fn interrupted(arguments: &[&str], after: Duration) -> i32 {
    let mut command = ferry::command(arguments);
    // What a shell starts in the background ignores it, and hands that on.
    // SAFETY: one system call without memory, which is safe between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::signal(libc::SIGINT, libc::SIG_DFL) {
            libc::SIG_ERR => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut process = Process::start(&mut command).unwrap();
    // A moment is a point in time, not an event.
    while process.started().elapsed() < after {
        std::hint::spin_loop();
    }
    process.signal(libc::SIGINT).unwrap();
    process.exit_code(SOON).unwrap_or_else(|error| panic!("{arguments:?}, {after:?}: {error:#}"))
}

#[test]
#[needs(kvm)]
fn an_interrupt_ends_it_at_any_moment_of_its_start() {
    let folder = tempfile::tempdir().unwrap();
    let at = |kind: &str, name: &str| format!("{kind}={}", folder.path().join(name).display());
    let (log, socket) = (at("file", "log"), at("socket", "serial"));
    let address = format!("unix:{}", folder.path().join("incoming").display());
    // One that never says anything.
    let silent = bare::kernel(folder.path(), &[&[0xeb, 0xfe]]).unwrap();
    let run = ["run", "--memory", "64M", "--kernel", silent.to_str().unwrap()];
    for more in [
        &["--serial", "null"][..],
        &["--serial", &log],
        &["--serial", &socket],
        &["--migrate-every", "1h"],
        &["receive", &address],
    ] {
        let arguments = if more[0] == "receive" { more.to_vec() } else { [&run, more].concat() };
        // Spread over the start of the process, of KVM and of the guest.
        let moments = [0, 300, 600, 1000, 1500, 2000, 3000, 5000, 8000, 15_000, 30_000, 100_000];
        for after in moments.map(Duration::from_micros) {
            assert_eq!(interrupted(&arguments, after), 130, "{arguments:?}, {after:?}");
        }
    }
    // It runs, and nothing has been said.
    let silent = Guest { kernel: silent, ..Guest::new("", 64) };
    let mut vmm = ferry::run(&silent).unwrap();
    while vmm.qmp().unwrap().run_state().unwrap() != "running" {}
    vmm.process.signal(libc::SIGINT).unwrap();
    assert_ended(&mut vmm.process, 130, &["SIGINT or SIGTERM"]);
    assert_eq!(vmm.serial().text(), "");
}
