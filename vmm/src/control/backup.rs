//! Arguments of `drive-backup` and `blockdev-backup`, alone or as actions of a transaction. Used by `command`; the
//! supervisor executes them.

use super::arguments::{Arguments, Kind, Member, missing, needed, optional};
use super::job::{COPY_TO, ON_ERROR, TargetSpec, copy_to, job_options, text};
use super::message::QmpError;
use devices::block::bitmaps::BitmapName;
use devices::block::job::JobOptions;
use devices::block::job::backup::{BackupSync, BitmapMode};

/// QEMU's `MirrorSyncMode`, as backups know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncMode {
    Full,
    Top,
    None,
    /// `bitmap` with the mode `on-success`.
    Incremental,
    Bitmap,
}

/// `drive-backup` or `blockdev-backup`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupSpec {
    /// The disk.
    pub device: String,
    pub target: TargetSpec,
    pub sync: SyncMode,
    pub bitmap: Option<BitmapName>,
    pub bitmap_mode: Option<BitmapMode>,
    pub job: JobOptions,
}

/// The bitmap of a backup, and what becomes of it.
pub type BitmapUse = Option<(BitmapName, BitmapMode)>;

const SYNC: Kind = Kind::Choice {
    name: "x-BackupSyncMode",
    values: &["incremental", "bitmap", "top", "none", "full"],
};
const BITMAP_MODE: Kind =
    Kind::Choice { name: "BitmapSyncMode", values: &["on-success", "never", "always"] };

/// What `drive-backup` takes.
pub const DRIVE_BACKUP: &[Member] = &[
    optional("job-id", Kind::Text),
    needed("device", Kind::Text),
    needed("target", Kind::Text),
    needed("sync", SYNC),
    COPY_TO[0],
    COPY_TO[1],
    optional("bitmap", Kind::Text),
    optional("bitmap-mode", BITMAP_MODE),
    optional("compress", Kind::Flag),
    optional("speed", Kind::Whole),
    optional("on-source-error", ON_ERROR),
    optional("on-target-error", ON_ERROR),
    optional("auto-finalize", Kind::Flag),
    optional("auto-dismiss", Kind::Flag),
    optional("filter-node-name", Kind::Text),
];

/// What `blockdev-backup` takes.
pub const BLOCKDEV_BACKUP: &[Member] = &[
    optional("job-id", Kind::Text),
    needed("device", Kind::Text),
    needed("target", Kind::Text),
    needed("sync", SYNC),
    optional("bitmap", Kind::Text),
    optional("bitmap-mode", BITMAP_MODE),
    optional("compress", Kind::Flag),
    optional("speed", Kind::Whole),
    optional("on-source-error", ON_ERROR),
    optional("on-target-error", ON_ERROR),
    optional("auto-finalize", Kind::Flag),
    optional("auto-dismiss", Kind::Flag),
    optional("filter-node-name", Kind::Text),
];

/// Reads `drive-backup`.
pub fn drive_backup(arguments: &mut Arguments) -> Result<BackupSpec, QmpError> {
    let target = copy_to(arguments)?;
    backup(arguments, target)
}

/// Reads `blockdev-backup`.
pub fn blockdev_backup(arguments: &mut Arguments) -> Result<BackupSpec, QmpError> {
    let target = TargetSpec::Node(text(arguments, "target")?);
    backup(arguments, target)
}

fn backup(arguments: &mut Arguments, target: TargetSpec) -> Result<BackupSpec, QmpError> {
    let device = text(arguments, "device")?;
    // The filter has no node of its own here.
    arguments.text("filter-node-name");
    if arguments.flag("compress") == Some(true) {
        return Err(QmpError::generic("Parameter 'compress' is not supported: give false"));
    }
    let sync = match arguments.text("sync").ok_or_else(|| missing("sync"))?.as_str() {
        "full" => SyncMode::Full,
        "top" => SyncMode::Top,
        "incremental" => SyncMode::Incremental,
        "bitmap" => SyncMode::Bitmap,
        _ => SyncMode::None,
    };
    let bitmap = arguments.text("bitmap").map(|name| BitmapName::new(&name)).transpose();
    let bitmap_mode = arguments.text("bitmap-mode").map(|mode| match mode.as_str() {
        "never" => BitmapMode::Never,
        "always" => BitmapMode::Always,
        _ => BitmapMode::OnSuccess,
    });
    Ok(BackupSpec {
        job: job_options(arguments, &device)?,
        bitmap: bitmap.map_err(|error| QmpError::generic(error.to_string()))?,
        bitmap_mode,
        device,
        target,
        sync,
    })
}

fn name_of(mode: BitmapMode) -> &'static str {
    match mode {
        BitmapMode::OnSuccess => "on-success",
        BitmapMode::Never => "never",
        BitmapMode::Always => "always",
    }
}

impl BackupSpec {
    /// What is saved, and what becomes of the bitmap: QEMU's rules, in its words.
    pub fn resolve(&self) -> Result<(BackupSync, BitmapUse), QmpError> {
        let refused = |desc: &str| Err(QmpError::generic(desc));
        let (sync, name) = match self.sync {
            SyncMode::Full => (BackupSync::Full, "full"),
            SyncMode::Top => (BackupSync::Top, "top"),
            SyncMode::None => (BackupSync::None, "none"),
            SyncMode::Incremental => (BackupSync::Bitmap, "incremental"),
            SyncMode::Bitmap => (BackupSync::Bitmap, "bitmap"),
        };
        let Some(bitmap) = &self.bitmap else {
            return match (sync, self.bitmap_mode) {
                (BackupSync::Bitmap, _) => {
                    refused(&format!("must provide a valid bitmap name for '{name}' sync mode"))
                }
                (_, Some(_)) => refused("Cannot specify bitmap sync mode without a bitmap"),
                (sync, None) => Ok((sync, None)),
            };
        };
        let mode = match (self.sync, self.bitmap_mode) {
            (SyncMode::Incremental, None | Some(BitmapMode::OnSuccess)) => BitmapMode::OnSuccess,
            (SyncMode::Incremental, Some(_)) => {
                return refused(
                    "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
                );
            }
            (_, None) => {
                return refused("Bitmap sync mode must be given when providing a bitmap");
            }
            (_, Some(mode)) => mode,
        };
        match (sync, mode) {
            (BackupSync::None, _) => {
                refused("sync mode 'none' does not produce meaningful bitmap outputs")
            }
            (BackupSync::Full | BackupSync::Top, BitmapMode::Never) => refused(&format!(
                "Bitmap sync mode '{}' has no meaningful effect when combined with sync mode '{name}'",
                name_of(mode)
            )),
            _ => Ok((sync, Some((bitmap.clone(), mode)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(more: Value) -> Result<(BackupSync, BitmapUse), String> {
        let mut all = json!({"device": "root", "target": "/x"});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let arguments = Arguments::new(DRIVE_BACKUP, all.as_object().unwrap().clone());
        let spec = arguments.and_then(|mut arguments| {
            let spec = drive_backup(&mut arguments);
            assert!(spec.is_err() || arguments.are_read());
            spec
        });
        spec.and_then(|spec| spec.resolve()).map_err(|error| error.desc)
    }

    #[test]
    fn modes_and_bitmaps_are_combined_as_in_qemu() {
        let used = |sync, mode| Ok((sync, Some((BitmapName::new("b").unwrap(), mode))));
        let with = |sync: &str, mode: &str| {
            read(json!({"sync": sync, "bitmap": "b", "bitmap-mode": mode}))
        };
        assert_eq!(read(json!({"sync": "full"})), Ok((BackupSync::Full, None)));
        assert_eq!(
            read(json!({"sync": "incremental", "bitmap": "b"})),
            used(BackupSync::Bitmap, BitmapMode::OnSuccess)
        );
        assert_eq!(with("bitmap", "never"), used(BackupSync::Bitmap, BitmapMode::Never));
        assert_eq!(with("top", "always"), used(BackupSync::Top, BitmapMode::Always));
        for (arguments, expected) in [
            (json!({"sync": "incremental"}), "valid bitmap name for 'incremental'"),
            (json!({"sync": "bitmap"}), "valid bitmap name for 'bitmap'"),
            (json!({"sync": "bitmap", "bitmap": "b"}), "must be given"),
            (json!({"sync": "full", "bitmap-mode": "never"}), "without a bitmap"),
            (json!({"sync": "full", "bitmap": ""}), "name"),
            (json!({"sync": "full", "compress": true}), "'compress' is not supported"),
            (json!({"sync": "half"}), "does not accept value"),
            (json!({"sync": "full", "granularity": 512}), "'granularity' is unexpected"),
            (json!({"sync": "full", "speed": -1}), "'speed'"),
        ] {
            let refusal = read(arguments.clone()).unwrap_err();
            assert!(refusal.contains(expected), "{arguments}: {refusal}");
        }
        for (sync, mode, expected) in [
            ("incremental", "never", "must be 'on-success'"),
            ("none", "always", "meaningful bitmap outputs"),
            ("full", "never", "no meaningful effect when combined with sync mode 'full'"),
        ] {
            let refusal = with(sync, mode).unwrap_err();
            assert!(refusal.contains(expected), "{refusal}");
        }
    }
}
