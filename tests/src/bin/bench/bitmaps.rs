//! What dirty bitmaps cost a move: the same guest with eight of a disk of 1 TiB and without.

use crate::alone::run;
use crate::memory;
use crate::moves::{How, final_info, total_ms};
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
    qmp.execute("migrate", json!({"uri": destination.address}))?;
    let patience = How::fast(0).patience;
    let status = qmp.wait_migration(&["completed", "failed", "cancelled"], patience)?;
    let info = final_info(&mut qmp)?;
    let arrived = info["x-postcopy"]["total"].is_u64() && info["x-incomplete"].is_null();
    if status != "completed" || arrived != with_bitmaps {
        bail!("the migration is {status}: {info}");
    }
    let first = destination.vmm.wait_line("^HB ")?;
    destination.vmm.serial().wait_from(first.index + 1, "^HB ", SOON)?;
    let life = Transcript::of([source.serial(), destination.vmm.serial()]);
    life.judge()?;
    Ok((life.largest_gap_us(before + 1)? as f64 / 1e3, total_ms(&info)?))
}
