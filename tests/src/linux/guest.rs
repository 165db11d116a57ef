//! A Linux guest in tests' words: what `guest-init.sh` prints, its disk, and whether it is content.

use super::{Assets, program};
use crate::ferry::{self, Guest};
use crate::lines::Found;
use crate::process::Process;
use crate::traveller::{Traveller, Way};
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// Longest time to wait for a line: under emulation a guest takes its time to boot.
pub const LIMIT: Duration = Duration::from_secs(150);
/// Said on every machine with several CPUs that does not promise a constant TSC.
const NO_CONSTANT_TSC: &str = "tsc: Marking TSC unstable due to TSCs unsynchronized";
const DISK_MB: u64 = 48;
const MEMORY_MB: u64 = 256;

/// An ext4 file system in an image of its own, with a file whose checksum the guest verifies.
pub struct Disk {
    folder: TempDir,
}

impl Disk {
    /// Makes one.
    pub fn new() -> Result<Self> {
        let disk = Self { folder: tempfile::tempdir()? };
        let contents = disk.folder.path().join("contents");
        std::fs::create_dir(&contents)?;
        std::fs::copy(ferry::binary(), contents.join("seed"))?;
        let mut command = Command::new("sha256sum");
        let sum = command.arg("seed").current_dir(&contents).output()?;
        std::fs::write(contents.join("seed.sha256"), &sum.stdout)?;
        crate::disk::create(&disk.path(), DISK_MB << 20)?;
        let mut command = Command::new(program("mke2fs")?);
        command.args(["-q", "-t", "ext4", "-d"]).arg(&contents).arg(disk.path());
        ensure!(command.status()?.success(), "{command:?} failed");
        Ok(disk)
    }

    /// The image.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    /// Where a copy of it can be.
    pub fn copy_path(&self) -> PathBuf {
        self.folder.path().join("copy.img")
    }

    /// Whether its file system is whole and was unmounted.
    pub fn check(&self) -> Result<()> {
        Self::check_at(&self.path())
    }

    /// The same of an image at `path`.
    pub fn check_at(path: &Path) -> Result<()> {
        let mut process = Process::start(Command::new(program("e2fsck")?).arg("-fn").arg(path))?;
        let code = process.exit_code(LIMIT)?;
        let said = process.out.text() + &process.err.text();
        ensure!(code == 0, "the file system is damaged: {said}");
        ensure!(!said.contains("recover"), "the file system was not unmounted: {said}");
        Ok(())
    }
}

/// A guest that does `work` with `disk`.
pub fn guest(assets: &Assets, work: &str, cpus: u8, disk: &Disk) -> Guest {
    let cmdline = format!("console=ttyS0 quiet panic=-1 work={work} {}", assets.cmdline);
    let mut guest = Guest::new(&cmdline, MEMORY_MB).cpus(cpus).disk("root", &disk.path());
    guest.kernel = assets.kernel();
    guest.initrd = Some(assets.initrd());
    guest
}

/// One guest, wherever it runs, and its disk.
pub struct Life {
    /// The guest.
    pub guest: Traveller,
    disk: PathBuf,
}

impl Life {
    /// Boots `guest`.
    pub fn begin(guest: &Guest, disk: &Disk, more: &[&str]) -> Result<Self> {
        Ok(Self { guest: ferry::run_with(guest, more)?.into(), disk: disk.path() })
    }

    /// Waits for a line from the process that has the guest now.
    pub fn wait_line(&self, pattern: &str) -> Result<Found> {
        self.wait_line_from(0, pattern)
    }

    /// The same, from line `from` of that process on.
    pub fn wait_line_from(&self, from: usize, pattern: &str) -> Result<Found> {
        let vmm = &self.guest.vmm;
        let found = vmm.serial().wait_from(from, pattern, LIMIT);
        found.with_context(|| format!("errors of ferry:\n{}", vmm.process.err.tail()))
    }

    /// Moves the guest to a new process; returns the downtime and the whole time in ms.
    pub fn hop(&mut self) -> Result<(u64, u64)> {
        let folder = tempfile::tempdir()?;
        let address = format!("unix:{}", folder.path().join("migration").display());
        let disk = format!("root={}", self.disk.display());
        let way = Way { address: &address, receive: &["--disk", &disk], migrate: &[] };
        let ended = self.guest.hop(way)?.ended;
        let number = |key: &str| {
            ended.summary[key].as_u64().with_context(|| format!("no {key}: {}", ended.summary))
        };
        Ok((number("downtime")?, number("total-time")?))
    }

    /// Waits for its end, which must be a good one; returns all that it has printed.
    pub fn end(&mut self) -> Result<String> {
        let code = self.guest.vmm.process.exit_code(LIMIT);
        let transcript = self.guest.transcript();
        let text = transcript.text();
        let code = code.with_context(|| format!("the guest does not end: {text}"))?;
        ensure!(code == 0, "ferry ended with {code}: {} {text}", self.guest.vmm.process.err.tail());
        judge(text)?;
        Ok(text.to_owned())
    }
}

/// Value of `key=…` in the last line that begins with `word`.
pub fn value<'a>(text: &'a str, word: &str, key: &str) -> Result<&'a str> {
    let line = text.lines().rfind(|line| line.split(' ').next() == Some(word));
    line.and_then(|line| {
        line.split_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix('='))
    })
    .with_context(|| format!("no {key} in a line {word}: {text}"))
}

/// Whether the guest found everything in order.
fn judge(text: &str) -> Result<()> {
    let host = host_messages();
    for line in text.lines() {
        if line.starts_with("WRONG") {
            bail!("the guest says: {line}\n{text}");
        }
        if let Some(complaint) = line.strip_prefix("COMPLAINT ") {
            // What the kernel dislikes about the host's CPU, it says on the host as well.
            let message = without_time(complaint);
            if message != NO_CONSTANT_TSC && !host.iter().any(|said| said == message) {
                bail!("the guest's kernel complains: {complaint}\n{text}");
            }
        }
    }
    Ok(())
}

fn without_time(line: &str) -> &str {
    line.split_once("] ").map_or(line, |(_, message)| message).trim_end()
}

/// The host's kernel log, or nothing if it is not ours to read.
fn host_messages() -> Vec<String> {
    let output = Command::new("dmesg").output();
    // Then every complaint counts.
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.unwrap_or_default().lines().map(|line| without_time(line).to_owned()).collect()
}
