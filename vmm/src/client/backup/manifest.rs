//! A folder of backups and its `manifest.json`, which says what is in it.
//!
//! The manifest is replaced as a whole, so that it is never half written. What it does not name does not belong to
//! it: a file that a killed backup has left is overwritten by the next one.

use crate::config::is_id;
use devices::block::qcow2::MAX_DEPTH;
use migration::bytes::random;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

const NAME: &str = "manifest.json";
/// Locked while a backup is made.
const LOCK: &str = ".lock";
const VERSION: u32 = 1;
/// Longest manifest that is read.
const MAX_BYTES: u64 = 64 << 20;
/// Most files that lie on each other: the next backup is a full one.
pub const MAX_CHAIN: usize = MAX_DEPTH;

/// A folder that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("cannot use {path}")]
    Folder {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("another `ferry backup` is using {0}: wait for it")]
    InUse(PathBuf),
    #[error("{0} has no backup: it has no manifest.json")]
    None(PathBuf),
    #[error("{path} is damaged: {why}")]
    Damaged { path: PathBuf, why: String },
}

/// Whether a file stands for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It does.
    Full,
    /// It needs its backing file.
    Incremental,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
        }
    }
}

/// One image of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// Its name in the folder.
    pub file: String,
    pub kind: Kind,
    /// The file below it.
    pub backing: Option<String>,
    /// Its length.
    pub bytes: u64,
    /// Of the file, as `sha256sum` prints it.
    pub sha256: String,
    /// When the backup was complete, in seconds since 1970, UTC.
    pub time: u64,
}

/// A disk's images, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDisk {
    /// The disk's size in bytes.
    pub size: u64,
    /// The bitmap that records what is written since the last one.
    pub bitmap: String,
    pub files: Vec<Saved>,
}

impl SavedDisk {
    /// The newest image and those below it, newest first; an error names what is wrong.
    pub fn chain(&self) -> Result<Vec<&Saved>, String> {
        let mut all = Vec::new();
        let mut next = self.files.last();
        while let Some(saved) = next {
            all.push(saved);
            let Some(backing) = &saved.backing else { return Ok(all) };
            // Older ones only: this ends.
            let at = self.files.iter().position(|other| other.file == saved.file).unwrap_or(0);
            next = self.files[..at].iter().find(|other| other.file == *backing);
            if next.is_none() {
                return Err(format!(
                    "{} needs {backing}, which is not listed before it",
                    saved.file
                ));
            }
        }
        Ok(all)
    }
}

/// What is in a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub version: u32,
    /// Tells the bitmaps of this folder from those of others.
    pub id: String,
    /// How many backups there have been.
    pub runs: u64,
    /// By the disk's name.
    pub disks: BTreeMap<String, SavedDisk>,
}

impl Manifest {
    /// What the names of its jobs begin with.
    pub fn job_prefix(&self) -> String {
        format!("ferry-backup-{}-", self.id)
    }

    /// What the names of its bitmaps begin with.
    pub fn bitmap_prefix(&self) -> String {
        self.job_prefix()
    }

    fn check(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("its version is {}, this ferry knows {VERSION}", self.version));
        }
        if self.id.is_empty()
            || self.id.len() > 16
            || !self.id.bytes().all(|b| b.is_ascii_hexdigit())
        {
            return Err(format!("its id {:?} is not one of ours", self.id));
        }
        for (disk, saved) in &self.disks {
            if !is_id(disk) {
                return Err(format!("{disk:?} cannot be the name of a disk"));
            }
            let names = saved
                .files
                .iter()
                .flat_map(|file| std::iter::once(&file.file).chain(&file.backing));
            // None of them leads out of the folder.
            if let Some(bad) = names.into_iter().find(|name| !is_file_name(name)) {
                return Err(format!("{bad:?} cannot be the name of a file in it"));
            }
        }
        Ok(())
    }
}

/// Whether `name` can be that of an image here: a disk's, with a number.
fn is_file_name(name: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    !name.is_empty() && name.len() <= 128 && name.chars().all(fine) && !name.starts_with('.')
}

/// A folder of backups.
#[derive(Debug)]
pub struct Folder {
    /// Absolute: the VMM has another working directory.
    path: PathBuf,
    /// Held while it is written to.
    _lock: Option<File>,
}

impl Folder {
    /// Opens it to read.
    pub fn open(path: &Path) -> Result<Self, ManifestError> {
        let failed = |source| ManifestError::Folder { path: path.to_owned(), source };
        let absolute = path.canonicalize().map_err(failed)?;
        if absolute.to_str().is_none() {
            // QMP has no other strings.
            return Err(failed(io::Error::other("its absolute path is not UTF-8")));
        }
        Ok(Self { path: absolute, _lock: None })
    }

    /// Opens it, or creates it, and keeps others from writing to it.
    pub fn open_to_write(path: &Path) -> Result<Self, ManifestError> {
        let failed = |source| ManifestError::Folder { path: path.to_owned(), source };
        match std::fs::create_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(error));
            }
            _ => {}
        }
        let folder = Self::open(path)?;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        let lock = options.open(folder.path(LOCK)).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _lock: Some(lock), ..folder }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(ManifestError::InUse(path.to_owned())),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Reads the manifest.
    pub fn read(&self) -> Result<Manifest, ManifestError> {
        let path = self.path(NAME);
        let failed = |source| ManifestError::Folder { path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ManifestError::None(self.path.clone()));
            }
            Err(error) => return Err(failed(error)),
        };
        let mut text = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
        let damaged = |why: String| ManifestError::Damaged { path: path.clone(), why };
        if text.len() as u64 > MAX_BYTES {
            return Err(damaged(format!("it is longer than {MAX_BYTES} bytes")));
        }
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    /// Reads the manifest, or writes one without backups.
    pub fn read_or_begin(&self) -> Result<Manifest, ManifestError> {
        match self.read() {
            Err(ManifestError::None(_)) => {
                let failed = |source| ManifestError::Folder { path: self.path.clone(), source };
                let id = random::<4>().map_err(|error| failed(io::Error::other(error)))?;
                let id = id.iter().map(|byte| format!("{byte:02x}")).collect();
                let manifest = Manifest { version: VERSION, id, runs: 0, disks: BTreeMap::new() };
                self.write(&manifest)?;
                Ok(manifest)
            }
            read => read,
        }
    }

    /// Replaces the manifest; durable, and all or nothing.
    pub fn write(&self, manifest: &Manifest) -> Result<(), ManifestError> {
        let write = || {
            let (next, path) = (self.path(&format!("{NAME}.new")), self.path(NAME));
            let mut text = serde_json::to_vec_pretty(manifest)?;
            text.push(b'\n');
            let mut file = File::create(&next)?;
            file.write_all(&text)?;
            file.sync_all()?;
            std::fs::rename(&next, &path)?;
            File::open(&self.path)?.sync_all()
        };
        write().map_err(|source| ManifestError::Folder { path: self.path(NAME), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(file: &str, backing: Option<&str>) -> Saved {
        Saved {
            file: file.into(),
            kind: if backing.is_some() { Kind::Incremental } else { Kind::Full },
            backing: backing.map(str::to_owned),
            bytes: 1,
            sha256: String::new(),
            time: 0,
        }
    }

    #[test]
    fn a_manifest_is_replaced_as_a_whole_and_two_writers_exclude_each_other() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("backups");
        assert!(matches!(Folder::open(&path), Err(ManifestError::Folder { .. })));
        let folder = Folder::open_to_write(&path).unwrap();
        assert!(matches!(folder.read(), Err(ManifestError::None(_))));
        assert!(matches!(Folder::open_to_write(&path), Err(ManifestError::InUse(_))));
        let mut manifest = folder.read_or_begin().unwrap();
        let mut disk = SavedDisk::default();
        disk.files.push(saved("root-0.qcow2", None));
        manifest.disks.insert("root".into(), disk);
        folder.write(&manifest).unwrap();
        assert_eq!(Folder::open(&path).unwrap().read().unwrap(), manifest);
        drop(folder);
        assert_eq!(Folder::open_to_write(&path).unwrap().read_or_begin().unwrap(), manifest);
    }

    #[test]
    fn the_chain_of_the_newest_image_leads_back_to_a_full_one() {
        let mut disk = SavedDisk::default();
        assert_eq!(disk.chain(), Ok(Vec::new()));
        disk.files = vec![
            saved("r-0", None),
            saved("r-1", Some("r-0")),
            saved("r-2", None),
            saved("r-3", Some("r-2")),
            saved("r-4", Some("r-3")),
        ];
        let names = |disk: &SavedDisk| {
            disk.chain().map(|all| all.iter().map(|it| it.file.clone()).collect::<Vec<_>>())
        };
        assert_eq!(names(&disk).unwrap(), ["r-4", "r-3", "r-2"]);
        // Neither a missing file nor a circle.
        disk.files[3].backing = Some("r-9".into());
        assert!(names(&disk).unwrap_err().contains("r-3 needs r-9"));
        disk.files[3].backing = Some("r-4".into());
        assert!(names(&disk).unwrap_err().contains("r-3 needs r-4"));
    }

    #[test]
    fn what_others_have_written_is_not_trusted() {
        let temp = tempfile::tempdir().unwrap();
        let folder = Folder::open_to_write(temp.path()).unwrap();
        let good = serde_json::to_value(folder.read_or_begin().unwrap()).unwrap();
        let refuse = |text: String| {
            std::fs::write(folder.path(NAME), text).unwrap();
            folder.read().unwrap_err().to_string()
        };
        assert!(refuse("{".into()).contains("damaged"));
        let file = |name: &str| {
            let file = serde_json::to_value(saved(name, None)).unwrap();
            serde_json::json!({"size": 1, "bitmap": "b", "files": [file]})
        };
        for (member, value, why) in [
            ("version", 2.into(), "version is 2"),
            ("id", "../x".into(), "not one of ours"),
            ("more", 1.into(), "unknown field"),
            ("disks", serde_json::json!({"a/b": file("a")}), "name of a disk"),
            ("disks", serde_json::json!({"a": file("../a")}), "name of a file"),
            ("disks", serde_json::json!({"a": file("..")}), "name of a file"),
        ] {
            let mut bad = good.clone();
            bad[member] = value;
            let refusal = refuse(bad.to_string());
            assert!(refusal.contains(why), "{refusal}");
        }
    }
}
