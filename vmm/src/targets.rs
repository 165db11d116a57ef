//! What block jobs copy to: new images, existing ones and block devices. Called by tasks of the supervisor, since
//! storage may hang.

use crate::control::job::NodeSpec;
use devices::block::backend::{BlockBackend, LockError};
use devices::block::job::mirror::{Reopen, Sync};
use devices::block::nbd::address::{AddressError, NbdAddress};
use devices::block::nbd::client::{NbdClient, NbdControl, NbdOpenError, NbdOptions};
use devices::block::qcow2::{Backing, BackingChoice, Qcow2File};
use devices::block::raw::{Cache, OpenError, RawFile};
use devices::block::{BlockNode, Format, open_image};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why there is no target.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error("{location} is the image of {node}: a disk cannot be copied to itself")]
    InUse { location: String, node: String },
    #[error("node '{0}' needs a file with its filename, or an NBD server")]
    NoLocation(String),
    #[error("{location} is neither a regular file nor a block device")]
    NotAnImage { location: String },
    #[error("{location} is a block device: use mode=existing")]
    Device { location: String },
    #[error("Backing file not supported for file format 'raw': use format=qcow2, or sync=full")]
    NoBacking,
    #[error(
        "sync=none needs mode=existing, or format=qcow2 for a target that has the disk as its backing file"
    )]
    NothingBelow,
    #[error(
        "cannot use {location}: an NBD server has raw disks, its exports' formats are its own business"
    )]
    NbdFormat { location: String },
    #[error("cannot use {location}")]
    NbdAddress {
        location: String,
        #[source]
        source: AddressError,
    },
    #[error(transparent)]
    Nbd(#[from] NbdOpenError),
    #[error("cannot look at {location}")]
    Unreachable {
        location: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Locked(#[from] LockError),
}

/// An open target.
#[derive(Clone)]
pub struct Target {
    pub node: Arc<BlockNode>,
    /// Whether it reads as zeroes, or as its backing file.
    pub is_blank: bool,
    /// How it is opened when the source is not locked any more.
    pub reopen: Option<ReopenAt>,
    /// If it is on an NBD server.
    pub remote: Option<NbdControl>,
}

/// A target that has the source as its backing file.
#[derive(Debug, Clone)]
pub struct ReopenAt {
    path: PathBuf,
    cache: Cache,
}

impl ReopenAt {
    /// Opens it with its backing chain, and locks it.
    pub fn into_work(self) -> Reopen {
        Box::new(move || {
            let Self { path, cache } = &self;
            let open = || -> Result<Arc<dyn BlockBackend>, TargetError> {
                let image = Qcow2File::open(path, false, *cache, BackingChoice::Recorded)?;
                image.lock()?;
                Ok(Arc::new(image))
            };
            open().map_err(|error| crate::error::chain(&error))
        })
    }
}

/// The target of `drive-mirror`.
pub struct NewTarget {
    pub location: String,
    pub format: Format,
    /// Whether it is there already, and stays as it is.
    pub existing: bool,
    pub sync: Sync,
    pub source: Arc<BlockNode>,
    /// Whether it bypasses the host's page cache.
    pub direct: bool,
}

/// Creates or opens the target of a job, and locks it. None of `open` may have the same image.
pub fn create(new: &NewTarget, open: &[Arc<BlockNode>]) -> Result<Target, TargetError> {
    let NewTarget { location, format, existing, sync, source, direct } = new;
    if NbdAddress::is_meant_by(location) {
        return connect(location, location, false);
    }
    let cache = if *direct { Cache::None } else { Cache::Writeback };
    let path = path_of(location);
    let there = look(location, &path)?;
    check_free(location, there.as_ref(), open)?;
    if *existing {
        return lock(open_image(&path, *format, false, cache, BackingChoice::Recorded)?, location);
    }
    if there.is_some_and(|there| there.file_type().is_block_device()) {
        return Err(TargetError::Device { location: location.clone() });
    }
    let len_bytes = source.len_bytes();
    let backing = match (sync, format, source.backing()) {
        (Sync::Full, _, _) | (Sync::Top, _, None) => None,
        (Sync::None, Format::Raw, _) => return Err(TargetError::NothingBelow),
        (Sync::Top, Format::Raw, Some(_)) => return Err(TargetError::NoBacking),
        (Sync::Top, Format::Qcow2, Some(chain)) => Some(chain.top()),
        (Sync::None, Format::Qcow2, _) => {
            let below = if source.format() == "qcow2" { Format::Qcow2 } else { Format::Raw };
            Some(Backing { path: source.location().into(), format: below })
        }
    };
    // The file is locked before it is emptied.
    let image: Box<dyn BlockBackend> = match format {
        Format::Raw => Box::new(RawFile::create(&path, &path, len_bytes, cache)?),
        Format::Qcow2 => {
            let made = Qcow2File::create(&path, &path, len_bytes, cache, backing.as_ref())?;
            if *sync == Sync::None {
                // Its backing file is locked as long as it is the guest's disk.
                drop(made);
                let image = Qcow2File::open(&path, false, cache, BackingChoice::None)?;
                let reopen = Some(ReopenAt { path, cache });
                return Ok(Target { reopen, ..lock(Box::new(image), location)? });
            }
            Box::new(made)
        }
    };
    Ok(Target { is_blank: true, ..lock(image, location)? })
}

/// Opens a node of `blockdev-add`, and locks it.
pub fn open(spec: &NodeSpec, open: &[Arc<BlockNode>]) -> Result<Target, TargetError> {
    let NodeSpec { name, location, format, read_only, cache } = spec;
    let location = location.as_deref().ok_or_else(|| TargetError::NoLocation(name.clone()))?;
    if NbdAddress::is_meant_by(location) {
        return match format {
            Format::Raw => connect(name, location, *read_only),
            Format::Qcow2 => Err(TargetError::NbdFormat { location: location.to_owned() }),
        };
    }
    let path = path_of(location);
    check_free(location, look(location, &path)?.as_ref(), open)?;
    lock(open_image(&path, *format, *read_only, *cache, BackingChoice::Recorded)?, name)
}

/// Connects to an NBD server. Bounded in time by the client.
fn connect(name: &str, location: &str, read_only: bool) -> Result<Target, TargetError> {
    let address: NbdAddress = location.parse().map_err(|source| {
        let location = location.to_owned();
        TargetError::NbdAddress { location, source }
    })?;
    let client = NbdClient::open(&address, NbdOptions { read_only, ..NbdOptions::default() })?;
    let remote = Some(client.control());
    Ok(Target { remote, ..lock(Box::new(client), name)? })
}

fn lock(image: Box<dyn BlockBackend>, name: &str) -> Result<Target, TargetError> {
    image.lock()?;
    let node = Arc::new(BlockNode::new(name, image));
    Ok(Target { node, is_blank: false, reopen: None, remote: None })
}

/// The file that `location` names, without symlinks: a file that is locked before it is emptied must be the one.
fn path_of(location: &str) -> PathBuf {
    let path = PathBuf::from(location.strip_prefix("file:").unwrap_or(location));
    path.canonicalize().unwrap_or(path)
}

/// What is at `path`, through symlinks.
fn look(location: &str, path: &Path) -> Result<Option<Metadata>, TargetError> {
    let there = match std::fs::metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(TargetError::Unreachable { location: location.to_owned(), source });
        }
    };
    let kind = there.file_type();
    match kind.is_file() || kind.is_block_device() {
        true => Ok(Some(there)),
        false => Err(TargetError::NotAnImage { location: location.to_owned() }),
    }
}

/// That none of `open` is the same file, under whatever name.
fn check_free(
    location: &str,
    there: Option<&Metadata>,
    open: &[Arc<BlockNode>],
) -> Result<(), TargetError> {
    let Some(there) = there else { return Ok(()) };
    let device = there.file_type().is_block_device();
    for node in open {
        let Ok(other) = std::fs::metadata(node.location()) else { continue };
        let same = match device {
            true => other.file_type().is_block_device() && other.rdev() == there.rdev(),
            false => (other.dev(), other.ino()) == (there.dev(), there.ino()),
        };
        if same {
            let (location, node) = (location.to_owned(), node.id().to_owned());
            return Err(TargetError::InUse { location, node });
        }
    }
    Ok(())
}
