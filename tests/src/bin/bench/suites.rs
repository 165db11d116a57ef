//! Test kernels from the start of their process to its end: one, and many after each other.

use crate::rows::Program;
use anyhow::{Context, Result, ensure};
use ferry_tests::{bare, ferry, qemu};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use tempfile::TempDir;

/// The machine that a suite's runner has QEMU start, which boots by way of a BIOS.
pub const USUAL: &str = "pc";
/// The machine with which QEMU starts a kernel fastest.
pub const FASTEST: &str = "microvm";
/// Tests of a suite, under Ferry and under QEMU, each of which may take seconds there.
const FERRY_TESTS: usize = 40;
const QEMU_TESTS: usize = 3;
/// The exit code of a test that has passed.
const PASSED: i32 = 1;

/// A kernel that ends at once with 0, in a folder of its own.
fn trivial() -> Result<(TempDir, PathBuf)> {
    let folder = tempfile::tempdir()?;
    let kernel = bare::kernel(folder.path(), &[&[0xb0, 0], &bare::END])?;
    Ok((folder, kernel))
}

/// Milliseconds until `command` has ended, with `code`.
fn milliseconds(command: &mut Command, code: i32) -> Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let started = Instant::now();
    let status = command.status().with_context(|| format!("{command:?}"))?;
    let time = started.elapsed();
    ensure!(status.code() == Some(code), "{command:?}: {status}");
    Ok(time.as_secs_f64() * 1e3)
}

/// The same command line under each program.
fn command(program: Program, kernel: &Path, machine: &str) -> Result<Command> {
    if program == Program::Ferry {
        let mut command = ferry::command(["qemu"]);
        command.args(qemu::test_arguments(kernel, machine, "host"));
        return Ok(command);
    }
    Ok(program.qemu()?.test(kernel, machine))
}

/// Milliseconds of one test.
pub fn one(program: Program, machine: &str) -> Result<f64> {
    let (_folder, kernel) = trivial()?;
    milliseconds(&mut command(program, &kernel, machine)?, PASSED)
}

/// Milliseconds of a test among many, one at a time: `ferry test`, or one QEMU after another.
pub fn per_test(program: Program, machine: &str) -> Result<f64> {
    let (_folder, kernel) = trivial()?;
    if program == Program::Ferry {
        let mut suite = ferry::command(["test", "--jobs", "1", "--memory", "128M"]);
        suite.args(std::iter::repeat_n(&kernel, FERRY_TESTS));
        return Ok(milliseconds(&mut suite, 0)? / FERRY_TESTS as f64);
    }
    let times = (0..QEMU_TESTS).map(|_| one(program, machine)).sum::<Result<f64>>()?;
    Ok(times / QEMU_TESTS as f64)
}
