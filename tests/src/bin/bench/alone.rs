//! Figures of guests that stay where they are.

use crate::rows::Program;
use anyhow::{Context, Result, bail};
use ferry_tests::ferry::{self, Guest};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::{linux, qemu};
use std::io::Read;

/// Where stock Linux runs: here, or both VMMs in one emulated machine.
pub fn linux_boot(program: Program) -> Result<f64> {
    let contender = match program {
        Program::Ferry => linux::boot::Contender { name: "ferry", run: ferry::run },
        Program::Qemu | Program::Newer => {
            linux::boot::Contender { name: "qemu", run: |guest| qemu::qemu().run(guest) }
        }
    };
    linux::boot::seconds(&contender, || arguments_for("linux-boot", std::env::args().skip(1)))
}

/// What makes this program measure one row only, as often and under the same programs.
fn arguments_for(row: &str, mut given: impl Iterator<Item = String>) -> Vec<String> {
    let mut arguments = vec!["--row".to_owned(), row.to_owned()];
    while let Some(argument) = given.next() {
        match argument.as_str() {
            "--row" => drop(given.next()),
            // Nobody reads its table.
            "--markdown" => {}
            _ => {
                arguments.push(argument);
                arguments.extend(given.next());
            }
        }
    }
    arguments
}

/// Boots `guest` under `program`.
pub fn run(program: Program, guest: &Guest) -> Result<Vmm> {
    match program {
        Program::Ferry => ferry::run(guest),
        Program::Qemu | Program::Newer => program.qemu()?.run(guest),
    }
}

/// Milliseconds from the start of the process to the guest's first byte.
pub fn first_byte(program: Program) -> Result<f64> {
    let vmm = run(program, &Guest::new("work=hello", 128))?;
    let first = vmm.serial().wait_first_byte(SOON)?;
    Ok((first - vmm.process.started()).as_secs_f64() * 1e3)
}

/// Proportional memory of the process without the guest's RAM, which is its one mapping of that size.
pub fn memory(program: Program) -> Result<f64> {
    let guest = Guest::new("work=idle", 128);
    let vmm = run(program, &guest)?;
    vmm.wait_line("^HB n=3 ")?;
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vmm.process.id()))?;
    let kib = |line: &str, key: &str| {
        line.strip_prefix(key)?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    };
    let (mut size, mut total, mut ram, mut ram_size) = (0, 0, 0, 0);
    for line in smaps.lines() {
        if let Some(value) = kib(line, "Size:") {
            size = value;
        }
        if let Some(value) = kib(line, "Pss:") {
            total += value;
            if size >= guest.memory_mb << 10 && size > ram_size {
                (ram, ram_size) = (value, size);
            }
        }
    }
    if ram_size == 0 {
        bail!("no mapping is as large as the guest's RAM");
    }
    Ok((total - ram) as f64 * 1024.0 / 1e6)
}

/// GB/s and thousands of reads per second, as the guest measures them, from a disk of random bytes in
/// the page cache.
pub fn disk_reads(program: Program, how: &str) -> Result<(f64, f64)> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.img");
    let random = std::fs::File::open("/dev/urandom")?;
    std::io::copy(&mut random.take(256 << 20), &mut std::fs::File::create(&image)?)?;
    let guest = Guest::new(&format!("work=diskread {how}"), 256).disk("disk", &image);
    let vmm = run(program, &guest)?;
    let line = vmm.wait_line("^DISKREAD ")?.text;
    let field = |name: &str| -> Result<f64> {
        let value = line.split(' ').find_map(|word| word.strip_prefix(name));
        Ok(value.with_context(|| format!("no {name} in {line:?}"))?.parse()?)
    };
    Ok((field("kbps=")? / 1e6, field("iops=")? / 1e3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_elsewhere_gets_the_arguments_that_matter_to_it() {
        let given = ["--markdown", "--row", "gap", "--runs", "3", "--row", "linux-boot"];
        let arguments = arguments_for("linux-boot", given.map(str::to_owned).into_iter());
        assert_eq!(arguments, ["--row", "linux-boot", "--runs", "3"]);
    }
}
