//! `ferry test`: results, reports, limits and the end of many guests.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use ferry_tests::process::{Process, SOON};
use ferry_tests::{bare, ferry, needs};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Goes on where it is: `jmp $`.
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `jmp` back over itself and [`bare::SAY`].
const AGAIN: [u8; 2] = [0xeb, 0xf4];

/// A folder with kernels that end in different ways, or not at all.
struct Kernels(TempDir);

impl Kernels {
    fn new() -> Self {
        let kernels = Self(tempfile::tempdir().unwrap());
        let code = |value: u8| [&[0xb0, value][..], &bare::END].concat();
        for (name, code) in [
            ("good", code(0)),
            ("bad", code(1)),
            ("absent", code(77)),
            ("crash", bare::CRASH.to_vec()),
            ("endless", SPIN.to_vec()),
            ("flood", AGAIN.to_vec()),
        ] {
            let kernel = bare::kernel(kernels.folder(), &[&bare::SAY, &code]).unwrap();
            fs::rename(kernel, kernels.path(name)).unwrap();
        }
        kernels
    }

    fn folder(&self) -> &Path {
        self.0.path()
    }

    /// Of a kernel.
    fn path(&self, name: &str) -> PathBuf {
        self.folder().join(format!("{name}.flat"))
    }

    /// `ferry test` of these kernels.
    fn command(&self, names: &[&str], more: &[&str]) -> Command {
        let mut command = ferry::command(["test"]);
        command.args(names.iter().map(|name| self.path(name))).args(more);
        command
    }

    fn run(&self, names: &[&str], more: &[&str]) -> Ended {
        end(&mut self.command(names, more))
    }

    /// `ferry test` of a file of tests.
    fn run_file(&self, text: &str, more: &[&str]) -> Ended {
        let path = self.folder().join("unittests.cfg");
        fs::write(&path, text).unwrap();
        end(ferry::command(["test", "--config"]).arg(path).args(more))
    }
}

struct Ended {
    code: i32,
    out: String,
    errors: String,
}

fn end(command: &mut Command) -> Ended {
    let mut process = Process::start(command).unwrap();
    process.close_input();
    let code = process.exit_code(SOON).unwrap();
    Ended { code, out: process.out.text(), errors: process.err.text() }
}

#[test]
#[needs(kvm)]
fn each_test_has_a_line_and_only_expected_results_are_success() {
    let kernels = Kernels::new();
    let ended = kernels.run(&["good", "bad", "absent", "crash"], &["--jobs", "1"]);
    assert_eq!(ended.code, 1, "{}", ended.errors);
    let lines: Vec<_> = ended.out.lines().collect();
    for (line, (word, why)) in lines.iter().filter(|line| !line.starts_with(' ')).zip([
        ("PASS  good ", "ms"),
        ("FAIL  bad ", "exit 3: the guest wrote 1"),
        ("SKIP  absent ", "exit 155: the guest wrote 77"),
        ("FAIL  crash ", "exit 134: the guest crashed: triple fault"),
        ("4 tests: 1 passed, 2 not as expected, 1 skipped in ", "ms"),
    ]) {
        assert!(line.starts_with(word) && line.contains(why), "{line}");
    }
    // What a failed test said last.
    assert!(lines.contains(&"      | !"), "{}", ended.out);

    let expected =
        ["--expected", "bad=fail", "--expected", "crash=134", "--expected", "absent=skip"];
    let ended = kernels.run(&["good", "bad", "absent", "crash"], &expected);
    assert_eq!(ended.code, 0, "{}", ended.out);
    assert!(ended.out.contains("XFAIL bad ") && ended.out.contains("2 failed as expected"));
    // A pass that is not expected is no success, nor is another failure.
    let ended = kernels.run(&["good"], &["--expected", "good=fail"]);
    assert!(ended.code == 1 && ended.out.starts_with("XPASS good "), "{}", ended.out);
    assert_eq!(kernels.run(&["bad"], &["--expected", "bad=134"]).code, 1);
    // Output decides, if that is said.
    assert_eq!(kernels.run(&["endless"], &["--expect", "!"]).code, 0);
    assert_eq!(kernels.run(&["bad"], &["--pass", "3,5"]).code, 0);
    assert_eq!(kernels.run(&["nothing"], &[]).code, 1, "no such kernel");
}

#[test]
#[needs(kvm, prove)]
fn the_tap_report_is_read_by_perls_harness() {
    let kernels = Kernels::new();
    let verdict = |names: &[&str], more: &[&str]| {
        let ended = kernels.run(names, &[&["--tap"], more].concat());
        let file = kernels.folder().join("report.tap");
        fs::write(&file, &ended.out).unwrap();
        let read = end(Command::new("prove").args(["-v", "-e", "cat"]).arg(&file));
        (ended.code, read)
    };
    let (code, read) = verdict(&["good", "bad", "absent", "crash"], &[]);
    assert!(code == 1 && read.code != 0, "{}", read.out);
    assert!(read.out.contains("Failed 2/4 subtests") && read.out.contains("less 1 skipped"));
    let (code, read) = verdict(&["good", "bad", "absent"], &["--expected", "bad=fail"]);
    assert!(code == 0 && read.code == 0 && read.out.contains("Result: PASS"), "{}", read.out);
}

/// Reads a JUnit file: of the suite its attributes, of each test its name, the kind of its result and its output.
fn junit(path: &Path) -> Value {
    const READ: &str = "
import json, sys, xml.etree.ElementTree as tree
suite = tree.parse(sys.argv[1]).getroot().find('testsuite')
tests = {case.get('name'): [[child.tag for child in case], case.findtext('system-out'), float(case.get('time'))]
         for case in suite}
print(json.dumps({'suite': suite.attrib, 'tests': tests}))";
    let read = end(Command::new("python3").args(["-c", READ]).arg(path));
    assert_eq!(read.code, 0, "{}", read.errors);
    serde_json::from_str(&read.out).unwrap()
}

#[test]
#[needs(kvm)]
fn the_junit_report_is_read_by_an_xml_parser() {
    let kernels = Kernels::new();
    let file = kernels.folder().join("report.xml");
    let more = ["--junit", file.to_str().unwrap(), "--expected", "crash=fail"];
    let ended = kernels.run(&["good", "bad", "absent", "crash", "nothing"], &more);
    assert_eq!(ended.code, 1);
    let report = junit(&file);
    for (key, value) in
        [("tests", "5"), ("failures", "1"), ("errors", "1"), ("skipped", "1"), ("name", "ferry")]
    {
        assert_eq!(report["suite"][key], value, "{key}: {report}");
    }
    let tests = &report["tests"];
    for (name, kinds, output) in [
        ("good", &["system-out"][..], "!\n"),
        ("bad", &["failure", "system-out"], "!\n"),
        ("absent", &["skipped", "system-out"], "!\n"),
        ("crash", &["system-out"], "!\n"),
    ] {
        assert_eq!(tests[name][0], serde_json::json!(kinds), "{name}: {report}");
        assert_eq!(tests[name][1], output, "{name}");
        assert!(tests[name][2].as_f64().unwrap() > 0.0, "{name} took no time");
    }
    assert_eq!(tests["nothing"][0][0], "error");
    let missing = kernels.folder().join("nowhere/report.xml");
    let ended = kernels.run(&["good"], &["--junit", missing.to_str().unwrap()]);
    assert!(ended.code == 1 && ended.errors.contains("--junit"), "{}", ended.errors);
}

#[test]
#[needs(kvm)]
fn a_test_that_never_ends_or_never_stops_printing_is_bounded() {
    let kernels = Kernels::new();
    let (logs, file) = (kernels.folder().join("logs"), kernels.folder().join("report.xml"));
    let mut more = vec!["--timeout", "2s", "--log-dir", logs.to_str().unwrap()];
    more.extend(["--junit", file.to_str().unwrap()]);
    for every in [&[][..], &["--migrate-every", "50ms"]] {
        let ended = kernels.run(&["endless", "flood", "good"], &[&more, every].concat());
        assert_eq!(ended.code, 1);
        for name in ["endless", "flood"] {
            let start = format!("FAIL  {name} ");
            let line = ended.out.lines().find(|line| line.starts_with(&start)).unwrap();
            assert!(line.contains("exit 124: --timeout has passed"), "{line}");
        }
        assert!(ended.out.contains("3 tests: 1 passed, 2 not as expected"), "{}", ended.out);
        let shown = ended.out.lines().filter(|line| *line == "      | !").count();
        assert!(shown <= 11, "{shown} lines of what they printed");
        // All of it is in the file, the end in the report.
        let kept = fs::metadata(logs.join("flood.log")).unwrap().len();
        assert!(fs::read_to_string(logs.join("good.log")).unwrap().starts_with("!\n"));
        let output = junit(&file)["tests"]["flood"][1].as_str().unwrap().len();
        // How far it comes in its time is the host's affair.
        assert!(output > 0 && output <= 64 << 10, "{output} bytes");
        assert!(kept >= output as u64, "{kept} bytes are kept, {output} reported");
    }
}

#[test]
#[needs(kvm)]
fn a_file_of_kvm_unit_tests_is_run_as_its_own_runner_does() {
    let kernels = Kernels::new();
    let kernel = |path: &str, name: &str| fs::copy(path, kernels.folder().join(name)).unwrap();
    kernel(guest_images::TEST_DEVICES, "devices.flat");
    kernel(guest_images::KERNEL, "own.elf");
    let text = "
# Comments, and keys of others.
[storage]
file = devices.flat
smp = 2
extra_params = -append 'do=m' -cpu max
groups = quick

[hello]
file = own.elf
smp = 2
test_args = \"work=hello code=0\"
qemu_params = \"\"\"-m 256 \\
  -no-user-config\"\"\"
kvmtool_params = --nothing
groups = quick slow

[broken]
file = bad.flat
expected = fail

[panic]
file = devices.flat
extra_params = -append do=p -device pvpanic
groups = panic

[late]
file = endless.flat
timeout = 1s
expected = 124

[old]
file = good.flat
arch = i386

[manual]
file = bad.flat
groups = nodefault

[device]
file = good.flat
extra_params = -device edu
";
    for every in [&[][..], &["--migrate-every", "20ms"]] {
        let ended = kernels.run_file(text, &[&["--jobs", "3"], every].concat());
        assert_eq!(ended.code, 0, "{}{}", ended.out, ended.errors);
        let lines: Vec<_> = ended.out.lines().collect();
        for (start, words) in [
            ("PASS  storage ", ""),
            ("PASS  hello ", ""),
            ("XFAIL broken ", "exit 3"),
            ("PASS  panic ", ""),
            ("XFAIL late ", "exit 124"),
            ("SKIP  old: ", "i386 only"),
            ("SKIP  manual: ", "asked for"),
            ("SKIP  device: ", "-device edu"),
            ("8 tests: 3 passed, 2 failed as expected, 3 skipped in ", ""),
        ] {
            let found = lines.iter().find(|line| line.starts_with(start));
            let found = found.unwrap_or_else(|| panic!("no {start:?} in {}", ended.out));
            assert!(found.contains(words), "{found}");
        }
        let storage = lines.iter().find(|line| line.contains("storage")).unwrap();
        assert_eq!(storage.contains(" migrations"), !every.is_empty(), "{storage}");
    }
    let ended = kernels.run_file(text, &["storage", "manual"]);
    assert!(ended.code == 1 && ended.out.contains("2 tests: 1 passed, 1 not as expected"));
    let ended = kernels.run_file(text, &["--groups", "slow"]);
    assert!(ended.code == 0 && ended.out.contains("1 tests: 1 passed"), "{}", ended.out);
}

#[test]
fn a_bad_line_of_a_file_is_named_by_its_number_and_nothing_is_run() {
    let kernels = Kernels::new();
    let good = "[good]\nfile = good.flat\n";
    for (line, words) in [
        ("nonsense", "nonsense"),
        ("timeout = soon", "soon"),
        ("expected = perhaps", "perhaps"),
        ("extra_params = \"\"\"-m 1", "extra_params"),
        ("extra_params = -append \"a b", "quote"),
    ] {
        let ended = kernels.run_file(&format!("{good}{line}\n"), &[]);
        assert_eq!((ended.code, ended.out.as_str()), (2, ""), "{line}");
        for word in ["unittests.cfg", "line 3", words] {
            assert!(ended.errors.contains(word), "no {word}: {}", ended.errors);
        }
    }
    let ended = kernels.run_file(good, &["other"]);
    assert!(ended.code == 2 && ended.errors.contains("\"other\""), "{}", ended.errors);
    let ended = kernels.run(&[], &[]);
    assert!(ended.code == 2 && ended.errors.contains("no test"), "{}", ended.errors);
    let ended = kernels.run(&["good"], &["--qmp", "unix:/q"]);
    assert!(ended.code == 2 && ended.errors.contains("--qmp"), "{}", ended.errors);
}

/// Ids of the processes that a process has started, and of theirs: tests, and guests of their shuttles.
fn descendants(of: u32) -> BTreeSet<u32> {
    let parent = |id: u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        if fields.next()? == "Z" { None } else { fields.next()?.parse().ok() }
    };
    let ids = fs::read_dir("/proc").unwrap().flatten();
    let ids: Vec<u32> = ids.filter_map(|it| it.file_name().to_str()?.parse().ok()).collect();
    let parents: Vec<_> = ids.into_iter().filter_map(|id| Some((id, parent(id)?))).collect();
    let mut found = BTreeSet::from([of]);
    loop {
        let count = found.len();
        found.extend(
            parents
                .iter()
                .filter(|(_, it)| found.contains(it))
                .map(|(id, _)| *id)
                .collect::<Vec<_>>(),
        );
        if found.len() == count {
            found.remove(&of);
            return found;
        }
    }
}

#[test]
#[needs(kvm)]
fn an_interrupt_ends_all_guests_and_reports_what_had_ended() {
    let kernels = Kernels::new();
    let file = kernels.folder().join("report.xml");
    let names = ["good", "endless", "endless", "endless"];
    for (signal, every) in [
        (libc::SIGINT, &[][..]),
        (libc::SIGTERM, &["--migrate-every", "30ms"]),
        (libc::SIGKILL, &[]),
    ] {
        let more = ["--jobs", "2", "--tap", "--junit", file.to_str().unwrap()];
        let mut command = kernels.command(&names, &[&more, every].concat());
        // What a shell starts in the background ignores it, and hands that on.
        // SAFETY: one system call without memory, which is safe between fork and exec.
        unsafe {
            command.pre_exec(|| match libc::signal(libc::SIGINT, libc::SIG_DFL) {
                libc::SIG_ERR => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        let mut process = Process::start(&mut command).unwrap();
        process.out.wait_for("^ok 1 - good", SOON).unwrap();
        let mut guests = descendants(process.id());
        while guests.len() < 2 {
            assert!(process.is_running());
            guests = descendants(process.id());
        }
        process.signal(signal).unwrap();
        let code = process.exit_code(SOON).unwrap();
        // Output is at its end, so nobody has the pipes any more; they may be gone a moment later.
        let is_there = |id: &u32| {
            let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            line.windows(5).any(|part| part == b"child")
        };
        let started = std::time::Instant::now();
        while guests.iter().any(is_there) {
            assert!(started.elapsed() < SOON, "{guests:?} are left");
            std::hint::spin_loop();
        }
        if signal == libc::SIGKILL {
            assert_eq!(code, 128 + libc::SIGKILL);
            continue;
        }
        assert_eq!(code, 130, "{}", process.err.text());
        let report = process.out.text();
        assert!(report.contains("Bail out!") && report.contains("1 passed, 3 not run"), "{report}");
        assert_eq!(junit(&file)["suite"]["skipped"], "3");
    }
}
