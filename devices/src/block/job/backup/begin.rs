//! The moment that is saved: several disks, and changes of their bitmaps, at once; all or none.
//!
//! ```text
//! check ─▶ close all gates ─▶ wait until nothing is in flight ─▶ bitmaps, filters ─▶ open
//! ```

use super::{Backup, BackupOptions, BackupSync, BitmapMode, MIN_CLUSTER_BYTES};
use crate::block::BlockNode;
use crate::block::bitmap::{DirtyBitmap, MAX_GRANULE_BYTES};
use crate::block::bitmaps::{Action, BitmapError, execute};
use crate::block::copy::Pair;
use crate::block::gate::Drained;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest wait for the guest's requests in flight; new ones wait as long.
const DRAIN: Duration = Duration::from_secs(5);

/// A part of a transaction.
#[derive(Debug, Clone)]
pub enum Step {
    /// Changes a bitmap.
    Bitmap(Arc<BlockNode>, Action),
    /// Begins a backup.
    Backup(BackupOptions),
}

/// A backup that cannot begin. QEMU's words where QEMU has the rule.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("Source and target cannot be the same")]
    Same,
    #[error("Source and target image have different sizes")]
    Sizes,
    #[error("the target {location} is read-only")]
    ReadOnly { location: String },
    #[error("must provide a valid bitmap name for 'bitmap' sync mode")]
    NoBitmap,
    #[error("disk {id}: out of memory for the bitmap of what is to be saved")]
    NoMemory { id: String },
}

/// Why a transaction has not happened.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    #[error(
        "disk {id}: its requests in flight have not ended within {} s: try again",
        DRAIN.as_secs()
    )]
    Drain { id: String },
}

/// Bytes of the clusters in which a backup to `target` is made.
fn cluster_bytes(target: &BlockNode) -> u64 {
    target.cluster_bytes().unwrap_or(0).clamp(MIN_CLUSTER_BYTES, MAX_GRANULE_BYTES)
}

fn prepare(options: &BackupOptions) -> Result<Backup, BackupError> {
    let Pair { source, target, .. } = &options.pair;
    if Arc::ptr_eq(source, target) {
        return Err(BackupError::Same);
    }
    if source.len_bytes() != target.len_bytes() {
        return Err(BackupError::Sizes);
    }
    if target.read_only() {
        return Err(BackupError::ReadOnly { location: target.location() });
    }
    if options.sync == BackupSync::Bitmap && options.bitmap.is_none() {
        return Err(BackupError::NoBitmap);
    }
    let no_memory = || BackupError::NoMemory { id: source.id().to_owned() };
    let to_read = DirtyBitmap::new(source.len_bytes(), cluster_bytes(target));
    let to_read = to_read.ok_or_else(no_memory)?;
    to_read.mark_all();
    Ok(Backup::new(options.clone(), Arc::new(to_read)))
}

/// Closes the gates of all disks that are saved, and waits until nothing is in flight on any of them.
fn drain(backups: &[Backup]) -> Result<Vec<(Arc<BlockNode>, Drained)>, BeginError> {
    let mut sections: Vec<(Arc<BlockNode>, Drained)> = Vec::new();
    for backup in backups {
        let source = &backup.options.pair.source;
        if !sections.iter().any(|(other, _)| Arc::ptr_eq(other, source)) {
            sections.push((source.clone(), source.gate().close()));
        }
    }
    let deadline = Instant::now() + DRAIN;
    for (node, section) in &sections {
        if !section.wait_until(deadline) {
            return Err(BeginError::Drain { id: node.id().to_owned() });
        }
    }
    Ok(sections)
}

/// What happens to bitmaps, in order.
fn bitmap_actions(steps: &[Step]) -> Vec<(Arc<BlockNode>, Action)> {
    let action = |step: &Step| match step {
        Step::Bitmap(node, action) => Some((node.clone(), action.clone())),
        Step::Backup(options) => {
            let (name, mode) = options.bitmap.clone()?;
            let freeze = Action::Freeze { name, may_clear: mode != BitmapMode::Never };
            Some((options.pair.source.clone(), freeze))
        }
    };
    steps.iter().filter_map(action).collect()
}

/// Takes all `steps` at one moment, in their order, or none of them. Waits for the guest's requests in flight. From
/// then on the old data of each disk is kept; have each backup run as a job, or drop it.
pub fn begin(steps: &[Step]) -> Result<Vec<Backup>, BeginError> {
    let options = steps.iter().filter_map(|step| match step {
        Step::Backup(options) => Some(options),
        Step::Bitmap(..) => None,
    });
    let mut backups = options.map(prepare).collect::<Result<Vec<_>, _>>()?;
    let actions = bitmap_actions(steps);
    let sections = drain(&backups)?;
    let frozen = execute(&actions).map_err(|(_, error)| error)?;
    let mut frozen = frozen.into_iter();
    for backup in &mut backups {
        if backup.options.bitmap.is_some() {
            backup.frozen = frozen.next();
        }
        let source = &backup.options.pair.source;
        if let Some((_, section)) = sections.iter().find(|(node, _)| Arc::ptr_eq(node, source)) {
            source.attach(section, backup.filter.clone());
        }
    }
    Ok(backups)
}
