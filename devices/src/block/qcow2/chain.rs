//! The backing chain of a qcow2 image: the files below it, opened read-only, and the digest of their
//! content.
//!
//! Owned by a [`super::Qcow2File`], which reads through them.

use super::{open_file, refused, storage};
use crate::block::Format;
use crate::block::backend::{Backing, BackingChain, GoOn, LockError};
use crate::block::ofd_lock::Operation;
use crate::block::raw::{Cache, lock_file, unlock_file};
use crate::lock;
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Longest chain of backing files.
pub const MAX_DEPTH: usize = 16;
/// Bytes hashed at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Which backing file an image has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackingChoice {
    /// The one that its header records, if any.
    #[default]
    Recorded,
    /// None, whatever its header records: what it does not hold itself reads as zeroes.
    None,
    /// This one, whatever its header records.
    Given(Backing),
}

impl BackingChoice {
    pub(super) fn of(&self, image: &Qcow2<ImagoFile>, path: &Path) -> io::Result<Option<Backing>> {
        refuse_data_file(image)?;
        match self {
            Self::Recorded => recorded_backing(image, path),
            Self::None => Ok(None),
            Self::Given(backing) => Ok(Some(backing.clone())),
        }
    }
}

/// The files below an image.
pub(super) struct Chain {
    top: Backing,
    /// Topmost first.
    files: Vec<(PathBuf, File)>,
    len_bytes: u64,
    /// The cached digest: nobody writes the files while they are locked.
    digest: Mutex<Option<String>>,
}

fn refuse_data_file(image: &Qcow2<ImagoFile>) -> io::Result<()> {
    if image.requires_external_data_file() {
        return Err(refused("it keeps its data in another file, which is not supported".into()));
    }
    Ok(())
}

/// The backing file that an image's header records.
fn recorded_backing(image: &Qcow2<ImagoFile>, path: &Path) -> io::Result<Option<Backing>> {
    let Some(name) = image.implicit_backing_file() else { return Ok(None) };
    let Some(format) = image.implicit_backing_format() else {
        return Err(refused(format!(
            "its backing file {name:?} has no format recorded: give backing={name},backing-format=FORMAT, \
             or `qemu-img rebase -u -b {name} -F FORMAT`"
        )));
    };
    let format = format.parse().map_err(refused)?;
    // Relative names start at the image's directory.
    let path = path.parent().unwrap_or(Path::new("")).join(name);
    Ok(Some(Backing { path, format }))
}

/// Opens a backing file and all below it, and appends them to `chain`. Files that `chain` already has from
/// `depth` on are not opened again: a path may lead elsewhere by now.
fn open_backing(
    backing: &Backing,
    chain: &mut Vec<(PathBuf, File)>,
    depth: usize,
) -> io::Result<FormatAccess<ImagoFile>> {
    let named = |error: io::Error| {
        io::Error::new(error.kind(), format!("backing file {}: {error}", backing.path.display()))
    };
    if depth >= MAX_DEPTH {
        return Err(named(refused(format!("more than {MAX_DEPTH} lie on each other"))));
    }
    let storage = match chain.get(depth) {
        Some((_, file)) => file
            .try_clone()
            .and_then(|file| storage(file, &backing.path, false, Cache::Writeback))
            .map_err(named)?,
        None => {
            let file = open_file(&backing.path, false, Cache::Writeback).map_err(named)?;
            let same = file.try_clone().map_err(named)?;
            chain.push((backing.path.clone(), file));
            storage(same, &backing.path, false, Cache::Writeback).map_err(named)?
        }
    };
    match backing.format {
        Format::Raw => {
            let raw = Raw::builder(storage).open(DenyImplicitOpenGate::default());
            Ok(FormatAccess::new(raw.map_err(named)?))
        }
        Format::Qcow2 => {
            let mut image = Qcow2::open_image(storage, false).map_err(named)?;
            let below = BackingChoice::Recorded.of(&image, &backing.path).map_err(named)?;
            image.set_data_file(None);
            image.set_backing(
                below.map(|below| open_backing(&below, chain, depth + 1)).transpose()?,
            );
            Ok(FormatAccess::new(image))
        }
    }
}

impl Chain {
    /// Opens a backing file and all below it.
    pub fn open(top: Backing) -> io::Result<Self> {
        let mut files = Vec::new();
        let len_bytes = open_backing(&top, &mut files, 0)?.size();
        Ok(Self { top, files, len_bytes, digest: Mutex::default() })
    }

    /// The topmost file.
    pub fn topmost(&self) -> &Backing {
        &self.top
    }

    /// A reader of the files as they are now, which are locked.
    pub fn reader(&self) -> io::Result<FormatAccess<ImagoFile>> {
        let same = |(path, file): &(PathBuf, File)| Ok((path.clone(), file.try_clone()?));
        let mut files = self.files.iter().map(same).collect::<io::Result<Vec<_>>>()?;
        let reader = open_backing(&self.top, &mut files, 0)?;
        if files.len() != self.files.len() || reader.size() != self.len_bytes {
            return Err(refused("a backing file has changed since it was opened".into()));
        }
        Ok(reader)
    }

    /// Shared: several images may use a backing file, but nobody may write it.
    pub fn lock(&self) -> Result<(), LockError> {
        self.files.iter().try_for_each(|(path, file)| lock_file(file, path, Operation::Shared))
    }

    /// Releases the locks.
    pub fn unlock(&self) {
        *lock(&self.digest) = None;
        self.files.iter().for_each(|(path, file)| unlock_file(file, path));
    }
}

impl BackingChain for Chain {
    fn files(&self) -> Vec<String> {
        self.files.iter().map(|(path, _)| path.display().to_string()).collect()
    }

    fn top(&self) -> Backing {
        self.top.clone()
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        let blocks = self.files.iter().map(|(_, file)| Ok(file.metadata()?.blocks()));
        Ok(blocks.sum::<io::Result<u64>>()?.saturating_mul(512))
    }

    fn digest(&self, go_on: GoOn<'_>) -> io::Result<String> {
        if let Some(known) = lock(&self.digest).clone() {
            return Ok(known);
        }
        let reader = self.reader()?;
        let (mut sum, mut at) = (Sha256::new(), 0);
        let mut piece = vec![0; PIECE_BYTES];
        while at < self.len_bytes {
            if !go_on() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let left = usize::try_from(self.len_bytes - at).unwrap_or(PIECE_BYTES);
            let piece = &mut piece[..left.min(PIECE_BYTES)];
            reader.read(&mut *piece, at)?;
            sum.update(&*piece);
            at += piece.len() as u64;
        }
        let digest: String = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        *lock(&self.digest) = Some(digest.clone());
        Ok(digest)
    }
}
