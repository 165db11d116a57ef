//! `ferry run`, `ferry receive`, `ferry migrate` and `ferry ctl` as a test says them.

use crate::lines::Lines;
use crate::process::{Process, SOON, Vmm};
use crate::verdict::{Check, Heartbeat, Transcript};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

/// The program under test: `FERRY_BIN`, or the `ferry` beside this program's own folder.
///
/// # Panics
/// If there is none, or if it is older than its sources: a test of yesterday's program proves nothing.
pub fn binary() -> PathBuf {
    static BESIDE: OnceLock<PathBuf> = OnceLock::new();
    match std::env::var_os("FERRY_BIN") {
        Some(path) => path.into(),
        None => BESIDE.get_or_init(binary_beside).clone(),
    }
}

fn binary_beside() -> PathBuf {
    let own = std::env::current_exe().expect("the test's own path");
    let profile = own.ancestors().skip(1).find(|folder| !folder.ends_with("deps"));
    let path = profile.expect("the test has a folder").join("ferry");
    let remedy = "`cargo build --package vmm`, or set FERRY_BIN";
    let Ok(built) = path.metadata().and_then(|file| file.modified()) else {
        panic!("{} is missing: {remedy}", path.display());
    };
    let workspace =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a member of a workspace");
    for member in ["vmm/src", "devices/src", "migration/src"] {
        let changed = newest_source(&workspace.join(member)).expect("the sources can be read");
        assert!(changed <= built, "{} is older than {member}: {remedy}", path.display());
    }
    path
}

/// When a file in `folder`, or below it, was last written.
fn newest_source(folder: &Path) -> Result<SystemTime> {
    let mut newest = SystemTime::UNIX_EPOCH;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let written = if entry.file_type()?.is_dir() {
            newest_source(&entry.path())?
        } else {
            entry.metadata()?.modified()?
        };
        newest = newest.max(written);
    }
    Ok(newest)
}

/// A guest to boot, under either VMM.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The kernel; ours, unless changed.
    pub kernel: PathBuf,
    /// An initial ramdisk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// RAM.
    pub memory_mb: u64,
    /// vCPUs, for the machine; the command line has them too.
    pub cpus: u8,
    /// `--disk` values.
    pub disks: Vec<String>,
}

impl Guest {
    /// One vCPU, no disk.
    pub fn new(cmdline: &str, memory_mb: u64) -> Self {
        let kernel = guest_images::KERNEL.into();
        Self {
            kernel,
            initrd: None,
            cmdline: cmdline.into(),
            memory_mb,
            cpus: 1,
            disks: Vec::new(),
        }
    }

    /// With this many vCPUs, all of which work.
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.cmdline.push_str(&format!(" cpus={cpus}"));
        self.cpus = cpus;
        self
    }

    /// With a disk.
    pub fn disk(mut self, id: &str, path: &Path) -> Self {
        self.disks.push(format!("path={},id={id}", path.display()));
        self
    }
}

/// One with 256 MiB above the hole at 3 GiB, that rewrites pages at random all over its RAM.
pub fn writes_past_the_hole() -> Guest {
    let work = "work=dirty fill=zero fill_pct=100 ws_mb=4096 rate_mbps=40 pattern=rand";
    Guest::new(work, 3328)
}

/// Waits until it has written some hundred pages above the hole: every thirteenth is.
pub fn wait_for_writes_past_the_hole(vmm: &Vmm) -> Result<()> {
    let mut from = 0;
    loop {
        let line = vmm.serial().wait_from(from, "^HB ", SOON)?;
        let beat = Heartbeat::parse(&line.text).context("a heartbeat")?;
        if beat.generation > 2600 {
            return Ok(());
        }
        from = line.index + 1;
    }
}

/// `ferry` with `arguments`, to be completed by the caller.
pub fn command<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(binary());
    command.args(arguments);
    command
}

/// Runs `ferry` to its end; returns the exit code and what it printed, both pipes.
pub fn end_of<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Result<(i32, String)> {
    let mut process = Process::start(&mut command(arguments))?;
    process.close_input();
    let code = process.exit_code(SOON)?;
    Ok((code, process.out.text() + &process.err.text()))
}

fn start_prepared(
    verb: &str,
    arguments: &[&str],
    prepare: impl FnOnce(&mut Command),
) -> Result<Vmm> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("qmp");
    let mut command = command([verb]);
    command.arg("--qmp").arg(format!("unix:{}", socket.display())).args(arguments);
    prepare(&mut command);
    Ok(Vmm::new(Process::start(&mut command)?, socket, folder))
}

/// Boots `guest` under Ferry; serial on the process's pipes, a control socket in its own folder.
pub fn run(guest: &Guest) -> Result<Vmm> {
    run_with(guest, &[])
}

/// As [`run`], with more options.
pub fn run_with(guest: &Guest, more: &[&str]) -> Result<Vmm> {
    run_prepared(guest, more, |_| {})
}

/// As [`run_with`], in a process that `prepare` has changed before it starts.
pub fn run_prepared(
    guest: &Guest,
    more: &[&str],
    prepare: impl FnOnce(&mut Command),
) -> Result<Vmm> {
    let (memory, cpus) = (format!("{}M", guest.memory_mb), guest.cpus.to_string());
    let path = |path: &PathBuf| path.to_str().context("a path is not UTF-8").map(str::to_owned);
    let (kernel, initrd) = (path(&guest.kernel)?, guest.initrd.as_ref().map(path).transpose()?);
    let kernel = ["--kernel", &kernel, "--cmdline", &guest.cmdline];
    let mut arguments = [&kernel[..], &["--memory", &memory, "--cpus", &cpus], more].concat();
    arguments.extend(initrd.iter().flat_map(|initrd| ["--initrd", initrd.as_str()]));
    arguments.extend(guest.disks.iter().flat_map(|disk| ["--disk", disk.as_str()]));
    start_prepared("run", &arguments, prepare)
}

/// A process that waits for a guest, and where.
pub struct Destination {
    /// The process.
    pub vmm: Vmm,
    /// Its address, to migrate to.
    pub address: String,
}

/// Waits for a guest on a free TCP port of the loopback.
pub fn receive() -> Result<Destination> {
    receive_at("tcp:127.0.0.1:0", &[])
}

/// Waits for a guest; a TCP port of 0 is any free one.
pub fn receive_at(address: &str, more: &[&str]) -> Result<Destination> {
    receive_prepared(address, more, |_| {})
}

/// As [`receive_at`], in a process that `prepare` has changed before it starts.
pub fn receive_prepared(
    address: &str,
    more: &[&str],
    prepare: impl FnOnce(&mut Command),
) -> Result<Destination> {
    // More vCPUs than processors are usual here.
    let arguments = [&[address, "--max-cpus=16"], more].concat();
    let vmm = start_prepared("receive", &arguments, prepare)?;
    let said = vmm.process.err.wait_for("listening on ", SOON)?;
    let address = said.text.split("listening on ").nth(1).and_then(|rest| rest.split(' ').next());
    let address = address.context("no address announced")?.trim_end_matches([',', ';']).to_owned();
    Ok(Destination { vmm, address })
}

/// `ferry migrate --json` on its way.
pub struct Migration {
    /// The client process.
    pub client: Process,
}

/// How a `ferry migrate` ended.
#[derive(Debug)]
pub struct Ended {
    /// 0 moved, 1 failed or cancelled, 4 unknown.
    pub code: i32,
    /// The last JSON line.
    pub summary: Value,
    /// Every JSON line.
    pub steps: Vec<Value>,
    /// What it said to people.
    pub errors: String,
}

/// Starts to move the guest of `source`.
pub fn start_migrate(source: &Vmm, address: &str, more: &[&str]) -> Result<Migration> {
    let mut command = command([OsStr::new("migrate"), source.socket().as_os_str()]);
    command.args([address, "--json"]).args(more);
    Ok(Migration { client: Process::start(&mut command)? })
}

impl Migration {
    /// Waits for the end.
    pub fn end(mut self, limit: Duration) -> Result<Ended> {
        let code = self.client.exit_code(limit)?;
        let parse = |line: &String| serde_json::from_str::<Value>(line);
        let steps: Vec<Value> = self
            .client
            .out
            .from(0)
            .iter()
            .map(parse)
            .collect::<Result<_, _>>()
            .with_context(|| format!("not JSON lines: {}", self.client.out.tail()))?;
        let summary = steps.last().cloned().unwrap_or(Value::Null);
        Ok(Ended { code, summary, steps, errors: self.client.err.text() })
    }
}

/// Moves the guest of `source`, to the end.
pub fn migrate(source: &Vmm, address: &str, more: &[&str]) -> Result<Ended> {
    start_migrate(source, address, more)?.end(Duration::from_secs(120))
}

/// As [`migrate`], and it must succeed.
pub fn migrate_well(source: &Vmm, address: &str, more: &[&str]) -> Result<Ended> {
    let ended = migrate(source, address, more)?;
    if ended.code != 0 {
        bail!(
            "the migration failed with {}: {} {}\nsource: {}",
            ended.code,
            ended.errors,
            ended.summary,
            source.process.err.tail()
        );
    }
    Ok(ended)
}

/// After a move: waits for two heartbeats at the destination, asks for a full check there, and judges
/// the guest's whole life over `earlier` and the destination.
pub fn verify_at(destination: &mut Vmm, earlier: &[&Lines]) -> Result<(Check, Vec<Heartbeat>)> {
    let first = destination.wait_line("^HB ")?;
    destination.serial().wait_from(first.index + 1, "^HB ", SOON)?;
    let check = destination.check()?;
    ensure!(check.corrupt == 0, "the guest found corruption: {check:?}");
    let life = Transcript::of(earlier.iter().copied().chain([destination.serial()]));
    Ok((check, life.judge()?))
}
