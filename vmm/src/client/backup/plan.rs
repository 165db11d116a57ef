//! What is saved of each disk, and how: a full backup, unless an incremental one gives the right image.

use super::Error;
use super::manifest::{Folder, MAX_CHAIN, Manifest, SavedDisk};
use crate::cli::BackupArgs;
use crate::client::QmpClient;
use devices::block::Format;
use devices::block::qcow2::Qcow2File;
use serde_json::{Value, json};

/// Bytes that one bit of our bitmaps stands for.
const GRANULARITY: u64 = 64 << 10;

/// The backup of one disk.
#[derive(Debug)]
pub struct Plan {
    pub disk: String,
    pub size: u64,
    pub job: String,
    /// The image's name in the folder.
    pub file: String,
    /// The image that it lies on; `None` for a full backup.
    pub backing: Option<String>,
    /// Why it is a full one, although there are earlier ones.
    pub why_full: Option<String>,
    /// Records what is written since the backup before.
    since: Option<String>,
    /// Records what is written from this one on.
    pub bitmap: String,
    pub bitmap_prefix: String,
    /// Whether the new bitmap is kept beside the image.
    pub persistent: bool,
}

/// Plans the backups of the disks that are wanted.
pub fn plan(
    client: &mut QmpClient,
    folder: &Folder,
    manifest: &Manifest,
    args: &BackupArgs,
) -> Result<Vec<Plan>, Error> {
    let blocks = client.execute("query-block", json!({}))?;
    let blocks = blocks.as_array().cloned().unwrap_or_default();
    let is_writable = |block: &&Value| block["inserted"]["ro"] == false;
    let id = |block: &Value| block["device"].as_str().unwrap_or_default().to_owned();
    let writable: Vec<_> = blocks.iter().filter(is_writable).collect();
    if let Some(unknown) =
        args.disks.iter().find(|disk| !writable.iter().any(|it| id(it) == **disk))
    {
        return Err(Error::UnknownDisk(unknown.clone()));
    }
    let wanted = |block: &&&Value| args.disks.is_empty() || args.disks.contains(&id(block));
    let plans: Vec<_> = writable
        .iter()
        .filter(wanted)
        .enumerate()
        .map(|(at, block)| of_disk(at, &id(block), &block["inserted"], folder, manifest, args.full))
        .collect();
    if plans.is_empty() { Err(Error::NoDisks) } else { Ok(plans) }
}

fn of_disk(
    at: usize,
    disk: &str,
    inserted: &Value,
    folder: &Folder,
    manifest: &Manifest,
    full: bool,
) -> Plan {
    let size = inserted["image"]["virtual-size"].as_u64().unwrap_or_default();
    let before = manifest.disks.get(disk).filter(|before| !before.files.is_empty());
    let base = before.map(|before| {
        if full {
            return Err("--full is given".to_owned());
        }
        check_base(before, folder, size, &inserted["dirty-bitmaps"])
    });
    let (backing, why_full) = match base {
        None => (None, None),
        Some(Ok(file)) => (Some(file), None),
        Some(Err(why)) => (None, Some(why)),
    };
    let since = before.filter(|_| backing.is_some()).map(|before| before.bitmap.clone());
    Plan {
        disk: disk.to_owned(),
        size,
        job: format!("{}{at}", manifest.job_prefix()),
        file: format!("{disk}-{}.qcow2", next_number(before)),
        backing,
        why_full,
        since,
        bitmap: format!("{}{}", manifest.bitmap_prefix(), manifest.runs),
        bitmap_prefix: manifest.bitmap_prefix(),
        persistent: true,
    }
}

/// One more than the last file's, whose names end in `-NUMBER.qcow2`.
fn next_number(before: Option<&SavedDisk>) -> u64 {
    let number = |file: &str| file.strip_suffix(".qcow2")?.rsplit_once('-')?.1.parse::<u64>().ok();
    let files = before.map(|before| before.files.as_slice()).unwrap_or_default();
    let last = files.iter().filter_map(|saved| number(&saved.file)).max();
    last.map_or(0, |last| last.saturating_add(1))
}

/// The file that an incremental backup can lie on, or why there must be a full one.
fn check_base(
    before: &SavedDisk,
    folder: &Folder,
    size: u64,
    bitmaps: &Value,
) -> Result<String, String> {
    if before.size != size {
        return Err(format!("its size was {} bytes, and is {size} now", before.size));
    }
    let mut all = bitmaps.as_array().into_iter().flatten();
    let Some(bitmap) = all.find(|bitmap| bitmap["name"] == before.bitmap.as_str()) else {
        return Err(format!("it has no bitmap {} since the last backup", before.bitmap));
    };
    if bitmap["inconsistent"] == true {
        return Err(format!("its bitmap {} has missed writes", before.bitmap));
    }
    if bitmap["recording"] != true {
        return Err(format!("its bitmap {} is disabled", before.bitmap));
    }
    let chain = before.chain()?;
    if chain.len() >= MAX_CHAIN {
        return Err(format!("{} backups lie on each other already", chain.len()));
    }
    for saved in &chain {
        let there = std::fs::metadata(folder.path(&saved.file)).map(|there| there.len());
        match there {
            Ok(bytes) if bytes == saved.bytes => {}
            Ok(bytes) => {
                return Err(format!("{} has {bytes} bytes instead of {}", saved.file, saved.bytes));
            }
            Err(error) => return Err(format!("{}: {error}", saved.file)),
        }
    }
    let newest = chain.first().map(|saved| saved.file.clone());
    newest.ok_or_else(|| "there is none before it".to_owned())
}

impl Plan {
    /// Says why it is a full backup, if that is not to be expected.
    pub fn say_why(&self) {
        if let Some(why) = &self.why_full {
            eprintln!("ferry: disk {}: a full backup: {why}", self.disk);
        }
    }

    /// Whether one of our bitmaps is from a backup that was killed.
    pub fn is_stray(&self, bitmap: &str) -> bool {
        self.since.as_deref() != Some(bitmap)
    }

    /// Creates an incremental image; a full one is the VMM's to create.
    pub fn create(&self, folder: &Folder) -> Result<(), Error> {
        let Some(backing) = &self.backing else { return Ok(()) };
        let path = folder.path(&self.file);
        Qcow2File::create_beside(&path, self.size, backing, Format::Qcow2)?;
        Ok(())
    }

    /// Its part of the transaction: a new bitmap, and the backup.
    pub fn actions(&self, folder: &Folder, speed: Option<u64>) -> [Value; 2] {
        let bitmap = json!({
            "node": self.disk,
            "name": self.bitmap,
            "granularity": GRANULARITY,
            "persistent": self.persistent,
        });
        let mut backup = json!({
            "job-id": self.job,
            "device": self.disk,
            "target": folder.path(&self.file),
            "format": "qcow2",
            "speed": speed.unwrap_or(0),
            "auto-dismiss": false,
        });
        match &self.since {
            // Its bitmap is needed until the manifest names the new file.
            Some(since) => {
                backup["sync"] = "bitmap".into();
                backup["bitmap"] = since.as_str().into();
                backup["bitmap-mode"] = "never".into();
                backup["mode"] = "existing".into();
            }
            None => {
                backup["sync"] = "full".into();
                backup["mode"] = "absolute-paths".into();
            }
        }
        [
            json!({"type": "block-dirty-bitmap-add", "data": bitmap}),
            json!({"type": "drive-backup", "data": backup}),
        ]
    }
}
