//! Figures of disks that travel with their guest: Ferry's `--disks full` and QEMU's `migrate` with `blk`.

use crate::alone::run;
use crate::memory;
use crate::moves::final_info;
use crate::rows::Program;
use anyhow::{Context, Result, bail};
use ferry_tests::disk;
use ferry_tests::ferry::{self, Guest};
use ferry_tests::image::{Pattern, compare, fill};
use ferry_tests::process::SOON;
use ferry_tests::verdict::{Heartbeat, Transcript};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const GIB: u64 = 1 << 30;
/// Of the guests.
const MEMORY_MB: u64 = 128;
/// With more QEMU loses data nearly always.
const LIMIT_MS: u64 = 30;

/// Images are made once; both programs move the same.
fn image(name: &'static str, bytes: u64, data: u64, pattern: Pattern) -> Result<PathBuf> {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = match FOLDER.get() {
        Some(folder) => folder,
        None => {
            let made = tempfile::tempdir()?;
            FOLDER.get_or_init(|| made)
        }
    };
    let path = folder.path().join(name);
    if !path.exists() {
        disk::create(&path, bytes)?;
        fill(&path, 0, data, pattern)?;
        std::fs::File::open(&path)?.sync_all()?;
    }
    Ok(path)
}

struct Moved {
    /// By this program's clock.
    took: Duration,
    largest_gap_us: u64,
}

/// Boots a guest with the disk at `path`, moves both to a file in `folder`, and hears the guest there.
fn moved(
    program: Program,
    work: &str,
    (path, folder): (&Path, TempDir),
    cache: &str,
    parameters: Value,
) -> Result<Moved> {
    memory::warm(2 * MEMORY_MB + (path.metadata()?.len() >> 20));
    let there = folder.path().join("there.img");
    let with_disk = |path: &Path| {
        let mut guest = Guest::new(work, MEMORY_MB).disk("disk", path);
        guest.disks[0].push_str(&format!(",cache={cache}"));
        guest
    };
    let source = run(program, &with_disk(path))?;
    let (destination, address) = match program {
        Program::Ferry => {
            let give = format!("disk={},cache={cache}", there.display());
            let destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give])?;
            (destination.vmm, destination.address)
        }
        Program::Qemu | Program::Newer => {
            disk::create(&there, path.metadata()?.len())?;
            program.qemu()?.receive(&with_disk(&there), |_| Ok(()))?
        }
    };
    source.wait_line("^HB n=5 ")?;
    let mut qmp = source.qmp()?;
    qmp.want_migration_events()?;
    // Ferry always has one; QEMU waits for its destination only with one.
    let on = json!([{"capability": "return-path", "state": true}]);
    qmp.execute("migrate-set-capabilities", json!({"capabilities": on}))?;
    qmp.execute("migrate-set-parameters", parameters)?;
    let settled = source.wait_next_line("^HB ")?;
    let before = Heartbeat::parse(&settled.text).context("a heartbeat")?.number;
    let began = Instant::now();
    qmp.execute("migrate", json!({"uri": address, "blk": true}))?;
    let ends = ["completed", "failed", "cancelled"];
    let status = qmp.wait_migration(&ends, Duration::from_secs(120))?;
    let took = began.elapsed();
    let info = final_info(&mut qmp)?;
    if status != "completed" {
        bail!("the migration is {status}: {info}");
    }
    let first = destination.wait_line("^HB ")?;
    destination.serial().wait_from(first.index + 1, "^HB ", SOON)?;
    let life = Transcript::of([source.serial(), destination.serial()]);
    if program == Program::Ferry {
        life.judge()?;
    }
    // A disk that did not arrive is no figure. Only a guest that does not write can be judged so.
    if work == "work=idle" {
        destination.qmp()?.execute("stop", json!({}))?;
        compare(path, &there).with_context(|| format!("the image that arrived, after {info}"))?;
    }
    Ok(Moved { took, largest_gap_us: life.largest_gap_us(before + 1)? })
}

/// No cap that matters.
fn fast(limit_ms: u64) -> Value {
    json!({"max-bandwidth": 10_000_000_000u64, "downtime-limit": limit_ms})
}

fn gb_per_sec(bytes: u64, moved: &Moved) -> f64 {
    bytes as f64 / 1e9 / moved.took.as_secs_f64()
}

/// QEMU's block migration loses data now and then, which is no figure to compare with: it may try again.
fn whole(program: Program, once: impl Fn() -> Result<f64>) -> Result<f64> {
    const TRIES: usize = 5;
    let mut result = once();
    for _ in 1..TRIES {
        match &result {
            Err(error) if program != Program::Ferry => eprintln!("    not counted: {error:#}"),
            _ => break,
        }
        result = once();
    }
    result
}

/// An image of 1 GiB of random bytes.
pub fn random_gib() -> Result<PathBuf> {
    image("random.img", GIB, GIB, Pattern::Random)
}

/// GB of disk per second.
pub fn full(program: Program, cache: &str) -> Result<f64> {
    let path = image("random.img", GIB, GIB, Pattern::Random)?;
    whole(program, || {
        let places = (path.as_path(), tempfile::tempdir()?);
        let moved = moved(program, "work=idle", places, cache, fast(LIMIT_MS))?;
        Ok(gb_per_sec(GIB, &moved))
    })
}

/// The same, compared with `cp` and a flush of the same file.
pub fn against_cp(program: Program) -> Result<f64> {
    if program == Program::Ferry {
        return full(program, "writeback");
    }
    let path = image("random.img", GIB, GIB, Pattern::Random)?;
    let folder = tempfile::tempdir()?;
    let copy = folder.path().join("copy.img");
    let began = Instant::now();
    let status = Command::new("cp").args([&path, &copy]).status()?;
    if !status.success() {
        bail!("cp: {status}");
    }
    std::fs::File::open(&copy)?.sync_all()?;
    Ok(GIB as f64 / 1e9 / began.elapsed().as_secs_f64())
}

/// GB per second of a disk that is mostly holes.
pub fn sparse(program: Program) -> Result<f64> {
    let path = image("sparse.img", 8 * GIB, GIB / 4, Pattern::Random)?;
    whole(program, || {
        let places = (path.as_path(), tempfile::tempdir()?);
        let moved = moved(program, "work=idle", places, "writeback", fast(LIMIT_MS))?;
        Ok(gb_per_sec(8 * GIB, &moved))
    })
}

/// Milliseconds: the largest gap of a guest that writes its disk.
pub fn gap_writing(program: Program) -> Result<f64> {
    let path = image("busy.img", GIB, GIB, Pattern::Random)?;
    // Two hosts do not share a disk: here the guest would wait for the destination's writes.
    let places = (path.as_path(), TempDir::new_in("/dev/shm")?);
    let moved =
        moved(program, "work=disk disk_mb=256 rate_mbps=50", places, "writeback", fast(20))?;
    Ok(moved.largest_gap_us as f64 / 1e3)
}

/// Seconds that 512 MiB of text take over a link of 1 Gb/s with zstd at level 1; on the other side, Ferry
/// without compression: QEMU does not compress disks.
pub fn text(program: Program) -> Result<f64> {
    let path = image("text.img", GIB / 2, GIB / 2, Pattern::Text)?;
    let compression = match program {
        Program::Ferry => "zstd",
        Program::Qemu | Program::Newer => "none",
    };
    let parameters = json!({
        "max-bandwidth": crate::engine::GIGABIT,
        "downtime-limit": 300,
        "multifd-compression": compression,
        "multifd-zstd-level": 1,
    });
    let places = (path.as_path(), tempfile::tempdir()?);
    let moved = moved(Program::Ferry, "work=idle", places, "writeback", parameters)?;
    Ok(moved.took.as_secs_f64())
}
