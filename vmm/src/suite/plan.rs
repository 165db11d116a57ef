//! From the command line, and a file of tests, to what is run: a guest for each test, or why it is not run.

use super::unittests::{self, UnitTest};
use super::verdict::{Expected, PASSED};
use super::words;
use crate::cli::TestArgs;
use crate::config::{RunConfig, RunOptions, SerialConfig, parse_duration};
use crate::exit_code;
use crate::machine::description::MAX_CPUS;
use crate::qemu::{self, Prepared, Request};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a test may take if nothing is said: as in kvm-unit-tests.
const TIMEOUT: Duration = Duration::from_secs(90);
/// Largest file of tests, and of a `check`.
const MAX_FILE_BYTES: u64 = 4 << 20;
const MAX_CHECK_BYTES: u64 = 64 << 10;
/// Architecture of all tests here.
const ARCH: &str = "x86_64";
/// Of tests that are run only if asked for.
const NODEFAULT: &str = "nodefault";
/// Of tests that end with a panic of the guest.
const PANIC: &str = "panic";
/// Of tests that wait until they are migrated, which their own runner does.
const MIGRATION: &str = "migration";

/// A test.
pub(super) struct Case {
    /// Its name, of its own.
    pub name: String,
    /// What to do.
    pub plan: Plan,
    /// What it should end with.
    pub expected: Expected,
    /// Exit codes of a pass.
    pub pass: Vec<u8>,
}

/// What to do with a test.
pub(super) enum Plan {
    /// Run it.
    Run(Box<Prepared>),
    /// Skip it, for this reason.
    Skip(String),
    /// It cannot be run, for this reason.
    Error(String),
}

/// The tests that are asked for.
///
/// # Errors
/// Every problem, by option.
pub(super) fn cases(args: &TestArgs) -> Result<Vec<Case>, Vec<String>> {
    check_options(&args.options)?;
    let mut cases = match &args.config {
        Some(path) => of_file(args, path)?,
        None => of_kernels(args)?,
    };
    make_names_unique(&mut cases);
    let mut problems = Vec::new();
    for given in &args.expected {
        let mut found = false;
        for case in cases.iter_mut().filter(|case| case.name == given.name) {
            (case.expected, found) = (given.expected, true);
        }
        if !found {
            problems.push(format!("--expected: there is no test {:?}", given.name));
        }
    }
    if cases.is_empty() && problems.is_empty() {
        problems.push("there is no test to run".to_owned());
    }
    if problems.is_empty() { Ok(cases) } else { Err(problems) }
}

/// Options of `ferry run` that are not for many guests at once.
fn check_options(options: &RunOptions) -> Result<(), Vec<String>> {
    let refused = [
        ("--kernel", options.kernel.is_some(), "give kernels without an option"),
        ("--name", options.name.is_some(), "tests have names of their own"),
        ("--paused", options.paused, "nobody would let them run"),
        ("--serial", options.host.serial.is_some(), "give --log-dir"),
        ("--qmp", options.host.qmp.is_some(), "give `ferry run` to a test that is to be looked at"),
    ];
    let problems = refused.iter().filter(|(_, is_given, _)| *is_given);
    let problems: Vec<_> = problems.map(|(option, _, why)| format!("{option}: {why}")).collect();
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

fn pass_codes(args: &TestArgs) -> Vec<u8> {
    match (args.pass.as_slice(), &args.options.host.expect) {
        ([], None) => vec![PASSED],
        ([], Some(_)) => vec![PASSED, exit_code::OK],
        (codes, _) => codes.to_vec(),
    }
}

/// What all tests' processes have in common.
fn as_test(mut config: RunConfig, timeout: Option<Duration>) -> RunConfig {
    config.host.serial = SerialConfig::Stdio;
    config.host.no_reboot = true;
    config.host.with_parent = true;
    config.host.quiet = false;
    config.host.timeout = timeout;
    config
}

fn of_kernels(args: &TestArgs) -> Result<Vec<Case>, Vec<String>> {
    let general = args.options.clone().or_environment()?;
    let case = |path: &String| {
        let kernel = PathBuf::from(path);
        let stem = kernel.file_stem().map_or_else(|| path.into(), |stem| stem.to_string_lossy());
        let name = stem.into_owned();
        let config = RunOptions { kernel: Some(kernel), ..general.clone() }.validate()?;
        let timeout = config.host.timeout.unwrap_or(TIMEOUT);
        let config = as_test(config, Some(timeout));
        let plan = Plan::Run(Box::new(Prepared { config, overlays: None }));
        Ok(Case { name, plan, expected: Expected::Pass, pass: pass_codes(args) })
    };
    args.names.iter().map(case).collect()
}

fn of_file(args: &TestArgs, path: &Path) -> Result<Vec<Case>, Vec<String>> {
    let wrong = |why: String| vec![format!("--config {}: {why}", path.display())];
    let text = read(path, MAX_FILE_BYTES).map_err(wrong)?;
    let tests = unittests::parse(&text).map_err(wrong)?;
    for name in &args.names {
        if !tests.iter().any(|test| test.name == *name) {
            return Err(wrong(format!("there is no test {name:?}")));
        }
    }
    // A problem of all tests is one of the command line.
    let probe = RunOptions { kernel: Some(path.to_owned()), ..args.options.clone() };
    probe.or_environment()?.validate()?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let wanted = tests.into_iter().filter(|test| is_wanted(args, test));
    Ok(wanted.map(|test| of_test(args, folder, test)).collect())
}

fn is_wanted(args: &TestArgs, test: &UnitTest) -> bool {
    let named = args.names.is_empty() || args.names.contains(&test.name);
    let in_group = args.groups.is_empty() || test.groups.iter().any(|it| args.groups.contains(it));
    named && in_group
}

fn of_test(args: &TestArgs, folder: &Path, test: UnitTest) -> Case {
    let mut pass = pass_codes(args);
    if test.groups.iter().any(|group| group == PANIC) {
        pass = vec![exit_code::CRASHED];
    }
    let plan = match reason_to_skip(args, &test) {
        Some(reason) => Plan::Skip(reason),
        None => plan_of(args, folder, &test),
    };
    Case { name: test.name, plan, expected: test.expected.unwrap_or_default(), pass }
}

fn reason_to_skip(args: &TestArgs, test: &UnitTest) -> Option<String> {
    let is_in = |group: &str| test.groups.iter().any(|it| it == group);
    let asked_for = args.all || !args.names.is_empty() || !args.groups.is_empty();
    if is_in(NODEFAULT) && !asked_for {
        return Some("it is run only if it is asked for".to_owned());
    }
    if !test.arch.is_empty() && test.arch != ARCH {
        return Some(format!("{} only", test.arch));
    }
    if !test.accel.is_empty() && test.accel.split(',').next() != Some("kvm") {
        return Some(format!("{} only", test.accel));
    }
    if is_in(MIGRATION) {
        return Some(
            "it waits for a migration by its own runner; give others --migrate-every".into(),
        );
    }
    test.checks.iter().find_map(|check| match check.split_once('=') {
        None => Some(format!("check {check:?} is not PATH=VALUE")),
        Some((path, value)) => match read(Path::new(path), MAX_CHECK_BYTES) {
            Ok(found) if found.trim_end() == value => None,
            Ok(_) => Some(format!("{path} is not {value}")),
            Err(error) => Some(format!("{path}: {error}")),
        },
    })
}

fn plan_of(args: &TestArgs, folder: &Path, test: &UnitTest) -> Plan {
    if test.file.is_empty() {
        return Plan::Error("it has no file".to_owned());
    }
    // The options have been looked at with those of all tests.
    let general = args.options.host.timeout.as_deref().map(parse_duration);
    let timeout = match test.timeout.map_or_else(|| general.unwrap_or(Ok(TIMEOUT)), Ok) {
        Ok(timeout) => Some(timeout).filter(|timeout| !timeout.is_zero()),
        Err(error) => return Plan::Error(format!("--timeout: {error}")),
    };
    let line = match command_line(folder, test) {
        Ok(line) => line,
        Err(reason) => return Plan::Skip(reason),
    };
    let translated = match qemu::translate(&line) {
        Ok(Request::Run(translated)) => translated,
        Ok(Request::Print(_)) => return Plan::Skip("its options ask for help".to_owned()),
        Err(problems) => return Plan::Skip(problems.join("; ")),
    };
    for remark in &translated.remarks {
        log::info!("test {}: {remark}", test.name);
    }
    match translated.over(args.options.clone()).prepare() {
        Ok(Prepared { config, overlays }) => {
            let config = as_test(config, timeout);
            Plan::Run(Box::new(Prepared { config, overlays }))
        }
        Err(exit) if exit.code == exit_code::USAGE => Plan::Skip(exit.why),
        Err(exit) => Plan::Error(exit.why),
    }
}

/// The command line that kvm-unit-tests' `x86/run` would have.
fn command_line(folder: &Path, test: &UnitTest) -> Result<Vec<OsString>, String> {
    const MACHINE: [&str; 13] = [
        "-nodefaults",
        "-no-reboot",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-machine",
        "accel=kvm",
        "-device",
        "pc-testdev",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "-smp",
    ];
    let split = |key: &str, text: &str| {
        words::split(text, max_smp()).map_err(|why| format!("{key}: {why}"))
    };
    let mut line: Vec<OsString> = MACHINE.map(OsString::from).to_vec();
    let smp = if test.smp.is_empty() { "1" } else { &test.smp };
    line.push(split("smp", smp)?.concat().into());
    line.extend(split("extra_params", &test.params)?.into_iter().map(OsString::from));
    if !test.test_args.is_empty() {
        line.push("-append".into());
        line.push(split("test_args", &test.test_args)?.join(" ").into());
    }
    line.push("-kernel".into());
    line.push(folder.join(&test.file).into_os_string());
    Ok(line)
}

/// The processors of this host, as many as a guest may have.
fn max_smp() -> u8 {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    u8::try_from(count).map_or(MAX_CPUS, |count| count.min(MAX_CPUS))
}

/// Reads a small regular file, or one of /proc or /sys.
fn read(path: &Path, most: u64) -> Result<String, String> {
    let read = || {
        if !path.metadata()?.is_file() {
            return Err(std::io::Error::other("it is not a file"));
        }
        let mut text = String::new();
        File::open(path)?.take(most + 1).read_to_string(&mut text)?;
        Ok(text)
    };
    match read() {
        Ok(text) if text.len() as u64 <= most => Ok(text),
        Ok(_) => Err(format!("it has more than {most} bytes")),
        Err(error) => Err(error.to_string()),
    }
}

/// Adds numbers to names that come twice.
fn make_names_unique(cases: &mut [Case]) {
    let mut taken: HashSet<String> = HashSet::new();
    for case in cases {
        let mut name = case.name.clone();
        let mut number = 2u32;
        while !taken.insert(name.clone()) {
            name = format!("{}-{number}", case.name);
            number += 1;
        }
        case.name = name;
    }
}

#[cfg(test)]
mod tests;
