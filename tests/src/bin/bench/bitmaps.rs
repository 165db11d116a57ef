//! What dirty bitmaps cost a move: the same guest with eight of a disk of 1 TiB and without. And what they cost
//! a write, a scan and a merge, which the example `bitmaps` of `devices` says.

use crate::alone::run;
use crate::engine::example;
use crate::memory;
use crate::moves::{How, final_info};
use crate::rows::Program;
use anyhow::{Context, Result, bail};
use devices::block::BlockNode;
use devices::block::bitmaps::{BitmapName, NewBitmap};
use devices::block::raw::{Cache, RawFile};
use ferry_tests::ferry::{self, Guest};
use ferry_tests::process::SOON;
use ferry_tests::verdict::{Heartbeat, Transcript};
use serde_json::json;
use std::path::Path;
use std::time::Instant;

const DISK_BYTES: u64 = 1 << 40;
const GRANULARITY: u64 = 64 << 10;
const COUNT: u32 = 8;
/// One granule in a thousand is dirty, all over the disk: no part of the contents is clean.
const DIRTY_EVERY: u64 = 1000 * GRANULARITY;
const MEMORY_MB: u64 = 256;

/// The largest gap in milliseconds, with bitmaps; first column: without.
pub fn gap(program: Program) -> Result<f64> {
    Ok(moved(program == Program::Ferry)?.0)
}

/// Milliseconds until all has arrived, with bitmaps; first column: without.
pub fn total(program: Program) -> Result<f64> {
    Ok(moved(program == Program::Ferry)?.1)
}

/// How much longer a write of 4 KiB to the page cache takes with so many bitmaps than with none.
pub fn write(bitmaps: u32) -> Result<f64> {
    let text = example("bitmaps", &[])?;
    let line = after(&text, &format!("pwrite of 4096 bytes, {bitmaps} bitmaps: "))?;
    let (_, ratio) = line.split_once("ratio ").context("a ratio")?;
    ratio.parse().with_context(|| line.to_owned())
}

/// Milliseconds of a scan of a bitmap of 1 TiB with granules of 64 KiB, a thousandth of them dirty.
pub fn scan() -> Result<f64> {
    milliseconds(after(&example("bitmaps", &[])?, "scan, 0.1 % dirty, scattered: ")?)
}

/// Milliseconds of the dearest merge of two of them.
pub fn merge() -> Result<f64> {
    milliseconds(after(&example("bitmaps", &[])?, "merge in place, all dirty into a clean one: ")?)
}

fn after<'t>(text: &'t str, name: &str) -> Result<&'t str> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.with_context(|| format!("no {name:?} in {text:?}"))
}

/// Reads what `Debug` of a `Duration` writes.
fn milliseconds(text: &str) -> Result<f64> {
    // A second too ends in an s: it comes last.
    for (unit, factor) in [("ns", 1e-6), ("µs", 1e-3), ("ms", 1.0), ("s", 1e3)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Ok(number.parse::<f64>().with_context(|| text.to_owned())? * factor);
        }
    }
    bail!("{text:?} is no time")
}

fn add_bitmaps(image: &Path) -> Result<()> {
    let backend = RawFile::open(image, false, Cache::Writeback)?;
    let node = std::sync::Arc::new(BlockNode::new("root", Box::new(backend)));
    node.lock()?;
    node.load_bitmaps()?;
    for number in 0..COUNT {
        let name = BitmapName::new(format!("b{number}"))?;
        let (persistent, recording) = (true, true);
        node.bitmaps().add(NewBitmap { name, granularity: GRANULARITY, persistent, recording })?;
    }
    for at in (0..DISK_BYTES).step_by(usize::try_from(DIRTY_EVERY)?) {
        // Takes no space.
        node.discard(at, 512)?;
    }
    node.close_bitmaps()?;
    node.unlock();
    Ok(())
}

/// Largest gap and total time of a move on shared storage.
fn moved(with_bitmaps: bool) -> Result<(f64, f64)> {
    memory::warm(2 * MEMORY_MB);
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("image");
    std::fs::File::create(&image)?.set_len(DISK_BYTES)?;
    if with_bitmaps {
        add_bitmaps(&image)?;
    }
    let guest = Guest::new("work=spin fill=random fill_pct=75", MEMORY_MB).disk("root", &image);
    let source = run(Program::Ferry, &guest)?;
    let give = format!("root={}", image.display());
    let destination = ferry::receive_at("tcp:127.0.0.1:0", &["--disk", &give])?;
    source.wait_line("READY ")?;
    source.wait_line("^HB n=5 ")?;
    let mut qmp = source.qmp()?;
    qmp.want_migration_events()?;
    let on = json!([{"capability": "dirty-bitmaps", "state": true}]);
    qmp.execute("migrate-set-capabilities", json!({"capabilities": on}))?;
    let settled = source.wait_next_line("^HB ")?;
    let before = Heartbeat::parse(&settled.text).context("a heartbeat")?.number;
    let began = Instant::now();
    qmp.execute("migrate", json!({"uri": destination.address}))?;
    let patience = How::fast(0).patience;
    let status = qmp.wait_migration(&["completed", "failed", "cancelled"], patience)?;
    let took = began.elapsed();
    let info = final_info(&mut qmp)?;
    let arrived = info["x-postcopy"]["total"].is_u64() && info["x-incomplete"].is_null();
    if status != "completed" || arrived != with_bitmaps {
        bail!("the migration is {status}: {info}");
    }
    let first = destination.vmm.wait_line("^HB ")?;
    destination.vmm.serial().wait_from(first.index + 1, "^HB ", SOON)?;
    let life = Transcript::of([source.serial(), destination.vmm.serial()]);
    life.judge()?;
    Ok((life.largest_gap_us(before + 1)? as f64 / 1e3, took.as_secs_f64() * 1e3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_read_as_they_are_written() {
        for nanos in [7, 1500, 2_345_678, 3_000_000_000] {
            let time = Duration::from_nanos(nanos);
            let read = milliseconds(&format!("{time:?}")).unwrap();
            assert!((read - time.as_secs_f64() * 1e3).abs() < 1e-9, "{time:?} is read as {read}");
        }
        assert!(milliseconds("soon").is_err());
    }
}
