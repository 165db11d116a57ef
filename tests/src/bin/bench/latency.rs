//! What the guest's writes take while its disk is copied. The guest writes 4 KiB in eight requests at a fixed rate, and
//! says how long half and 99 of 100 of these took.

use crate::memory;
use crate::mirrors::{guest, mirror, ready, written_before};
use crate::rows::Program;
use anyhow::{Context, Result};
use ferry_tests::process::{SOON, Vmm};
use ferry_tests::qmp::Qmp;
use ferry_tests::verdict::field;
use serde_json::json;
use std::path::Path;

/// In megabytes per second: far less than any disk takes.
const WORK: &str = "work=disk disk_mb=64 rate_mbps=4 hb_ms=1000";
/// A job that is not told to be slow would be over before there is anything to see.
const SPEED: u64 = 100_000_000;
/// Heartbeats that count, of a second each.
const COUNTED: usize = 6;

/// What copies the disk meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// Nothing.
    None,
    /// A mirror that is not ready yet.
    Background,
    /// A mirror that is ready, with `copy-mode` `write-blocking`.
    WriteBlocking,
    /// A backup.
    Backup,
}

/// Which of the guest's figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of100 {
    /// The median.
    P50,
    /// What 99 of 100 take at most.
    P99,
}

fn start(qmp: &mut Qmp, job: Job, copy: &Path) -> Result<()> {
    let target = copy.display().to_string();
    match job {
        Job::None => Ok(()),
        Job::Background => mirror(qmp, &target, json!({"speed": SPEED})),
        Job::WriteBlocking => {
            mirror(qmp, &target, json!({"copy-mode": "write-blocking"}))?;
            ready(qmp)
        }
        Job::Backup => {
            let backup = json!({
                "device": "disk", "job-id": "b", "target": target, "format": "raw", "sync": "full",
                "mode": "existing", "speed": SPEED,
            });
            qmp.execute("drive-backup", backup).map(drop)
        }
    }
}

/// The median over some heartbeats.
fn heard(vmm: &Vmm, key: &str) -> Result<f64> {
    // One that had begun before the job is not its.
    let mut last = vmm.wait_next_line("^HB ")?;
    let mut figures = Vec::with_capacity(COUNTED);
    for _ in 0..COUNTED {
        last = vmm.serial().wait_from(last.index + 1, "^HB ", SOON)?;
        figures.push(field(&last.text, key).with_context(|| format!("no {key}: {}", last.text))?);
    }
    figures.sort_unstable();
    Ok(figures[COUNTED / 2] as f64)
}

/// Microseconds.
pub fn of_writes(program: Program, job: Job, of_100: Of100) -> Result<f64> {
    let folder = tempfile::tempdir()?;
    let (image, copy) = (folder.path().join("disk.img"), folder.path().join("copy.img"));
    written_before(&image)?;
    written_before(&copy)?;
    memory::warm(128);
    let vmm = guest(program, WORK, &image, "writeback")?;
    vmm.wait_line("^HB n=2 ")?;
    let mut qmp = vmm.qmp()?;
    start(&mut qmp, job, &copy)?;
    let key = match of_100 {
        Of100::P50 => "write_p50_us",
        Of100::P99 => "write_p99_us",
    };
    let figure = heard(&vmm, key)?;
    let jobs = qmp.execute("query-block-jobs", json!({}))?;
    let count = jobs.as_array().map_or(0, Vec::len);
    anyhow::ensure!((count == 1) == (job != Job::None), "the job did not last: {jobs}");
    Ok(figure)
}
