//! Images of an incoming guest. Paths are chosen here and by the user, never by the stream. Called by the
//! migration's thread when it has received the machine description; may block on storage.
//!
//! A migrated disk is written to `NAME.partial`, locked from the start, and renamed when the guest is about
//! to run here: an existing image stays intact until then, and a failed or cancelled migration leaves
//! nothing behind. A killed process leaves the partial file, which the next attempt takes over.

mod partial;

use crate::config::{ReceiveConfig, ReceiveDisk, is_id};
use crate::machine::MachineError;
use crate::machine::description::{BackingDescription, DiskDescription, Travels};
use devices::block::backend::{BlockBackend, GoOn, LockError};
use devices::block::failure::ErrorPolicy;
use devices::block::qcow2::{Backing, BackingChoice, Qcow2File};
use devices::block::raw::{Cache, HeldFile, OpenError, RawFile};
use devices::block::{BlockNode, Format, open_image};
use migration::block::IncomingDisk;
use partial::{Device, Partial};
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An image that cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("the stream names a disk {id:?}: a name may have letters, digits, _ - .")]
    BadName { id: String },
    #[error("{path} holds an image already: give --overwrite to replace it")]
    Exists { path: PathBuf },
    /// The image to replace is not the same file any more.
    #[error("{path} is not the file any more that was there when the guest began to arrive")]
    Changed { path: PathBuf },
    #[error("{path} is neither a file nor a block device")]
    NotAnImage { path: PathBuf },
    #[error("the guest knows this disk with {len_bytes} bytes, {path} has {found}")]
    WrongSize { path: PathBuf, len_bytes: u64, found: u64 },
    #[error(
        "only what lies above its backing file {name:?} travels: give that too, with --disk \
         {id}=PATH,format=qcow2,backing=BASE,backing-format=raw|qcow2, or move it with --disks full"
    )]
    BackingNotGiven { id: String, name: String },
    #[error(
        "its backing file differs: {theirs:?} at the source has {their_len} bytes, {path} here has \
         {len}"
    )]
    BackingSizeDiffers { theirs: String, their_len: u64, path: String, len: u64 },
    #[error(
        "its backing file differs: the content of {theirs:?} at the source has SHA-256 {their_sum}, \
         of {path} here {sum}"
    )]
    BackingDiffers { theirs: String, their_sum: String, path: String, sum: String },
    #[error("cannot read backing file {path}")]
    BackingUnreadable {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("the whole disk is migrated: it cannot have backing file {path} here")]
    BackingUnwanted { path: PathBuf },
    #[error("{path} has {free} bytes free, the guest's disks need {needed}")]
    NoSpace { path: PathBuf, free: u64, needed: u64 },
    #[error("{path} is given for two disks")]
    Twice { path: PathBuf },
    #[error("cannot create disk image {path}")]
    Create {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Lock(#[from] LockError),
}

/// A backing file to compare with the source's.
pub struct BackingCheck {
    node: Arc<BlockNode>,
    theirs: BackingDescription,
}

impl BackingCheck {
    /// Compares the digest of the whole file: samples could miss a difference, and the guest would run on a
    /// corrupt disk. Reads all of it unless `go_on` returns false.
    pub fn check(&self, go_on: GoOn<'_>) -> Result<(), MachineError> {
        let id = self.node.id();
        let Some(chain) = self.node.backing() else { return Ok(()) };
        let Some(path) = chain.files().into_iter().next() else {
            let (path, source) = (self.theirs.name.clone(), io::ErrorKind::NotFound.into());
            return Err(failed(id, ImageError::BackingUnreadable { path, source }));
        };
        let sum = match chain.digest(go_on) {
            Ok(sum) => sum,
            Err(source) => return Err(failed(id, ImageError::BackingUnreadable { path, source })),
        };
        log::info!("disk {id}: backing file {path} has SHA-256 {sum}");
        if sum == self.theirs.sha256 {
            return Ok(());
        }
        let (theirs, their_sum) = (self.theirs.name.clone(), self.theirs.sha256.clone());
        Err(failed(id, ImageError::BackingDiffers { theirs, their_sum, path, sum }))
    }
}

/// All disks of an incoming guest. Dropping it before [`Images::commit`] removes the images that it
/// created.
#[derive(Default)]
pub struct Images {
    // First: files must be removed before `nodes` releases their locks, so that nobody takes over a file
    // that is about to go.
    partials: Vec<Partial>,
    devices: Vec<Device>,
    /// In the order of the description.
    pub nodes: Vec<Arc<BlockNode>>,
    arriving: Vec<IncomingDisk>,
    /// Backing files that are still to be compared.
    pub backings: Vec<BackingCheck>,
}

fn failed(id: &str, source: impl Into<ImageError>) -> MachineError {
    MachineError::Disk { id: id.to_owned(), source: Box::new(source.into()) }
}

impl Images {
    /// Opens the images of shared disks and creates those of migrated disks. Polls `go_on`, which cancels
    /// with false.
    pub fn prepare(
        disks: &[DiskDescription],
        config: &ReceiveConfig,
        go_on: GoOn<'_>,
    ) -> Result<Self, MachineError> {
        let mut images = Self::default();
        let mut space = Space::default();
        for disk in disks {
            let id = disk.id.as_str();
            if !is_id(id) {
                return Err(failed(id, ImageError::BadName { id: id.to_owned() }));
            }
            let place = place_of(disk, config)?;
            let node = match &disk.travels {
                None => {
                    let Place { path, format, cache, .. } = &place;
                    let given = place.backing.clone().map(BackingChoice::Given);
                    // Not given: the recorded one.
                    let backing = given.unwrap_or_default();
                    let backend = open_image(path, *format, disk.read_only, *cache, backing);
                    let backend = backend.map_err(|error| failed(id, error))?;
                    Arc::new(BlockNode::new(id, backend).with_policy(place.errors))
                }
                Some(travels) => {
                    let made = images.make(disk.len_bytes, &place, config.overwrite, go_on);
                    let made = made.and_then(|(backend, folder)| {
                        check_backing(id, travels, &place, backend.as_ref())?;
                        folder.map_or(Ok(()), |folder| space.take(&folder, travels.data_bytes))?;
                        Ok(backend)
                    });
                    let backend = made.map_err(|error| failed(id, error))?;
                    let node = BlockNode::new(id, backend).with_policy(place.errors);
                    let node = if disk.read_only { node.into_read_only() } else { node };
                    node.image_is_new();
                    let node = Arc::new(node);
                    let only_top = travels.backing.is_some();
                    images.arriving.push(IncomingDisk { node: node.clone(), only_top });
                    images.backings.extend(
                        travels
                            .backing
                            .clone()
                            .map(|theirs| BackingCheck { node: node.clone(), theirs }),
                    );
                    node
                }
            };
            images.nodes.push(node);
        }
        Ok(images)
    }

    /// The migrated disks.
    pub fn arriving(&self) -> Vec<IncomingDisk> {
        self.arriving.clone()
    }

    /// Creates a blank image, locked with its backing chain; returns it with the folder whose space it
    /// uses.
    fn make(
        &mut self,
        len_bytes: u64,
        place: &Place,
        overwrite: bool,
        go_on: GoOn<'_>,
    ) -> Result<(Box<dyn BlockBackend>, Option<PathBuf>), ImageError> {
        let backing = place.backing.as_ref();
        let path = match std::fs::canonicalize(&place.path) {
            Ok(path) => path,
            Err(error) if error.kind() == io::ErrorKind::NotFound => place.path.clone(),
            Err(source) => return Err(ImageError::Create { path: place.path.clone(), source }),
        };
        // `/` or a path that ends in `..`.
        let Some(name) = path.file_name() else { return Err(ImageError::NotAnImage { path }) };
        let mut name = OsString::from(name);
        name.push(".partial");
        let partial = path.with_file_name(name);
        let one_of = |other: &Partial| {
            [&path, &partial].iter().any(|it| [&other.path, &other.partial].contains(it))
        };
        if self.partials.iter().any(one_of) {
            return Err(ImageError::Twice { path });
        }
        let replaced = match std::fs::metadata(&path) {
            Err(_) => None,
            Ok(there) if there.file_type().is_block_device() && place.format == Format::Raw => {
                if !overwrite {
                    return Err(ImageError::Exists { path });
                }
                return Ok((self.open_device(&path, len_bytes, place.cache, go_on)?, None));
            }
            Ok(there) if !there.is_file() => return Err(ImageError::NotAnImage { path }),
            Ok(there) if there.len() > 0 && !overwrite => return Err(ImageError::Exists { path }),
            Ok(_) => Some(HeldFile::hold(&path)?),
        };
        let folder = Some(folder_of(&path).to_owned());
        let backend: Box<dyn BlockBackend> = match place.format {
            Format::Raw => Box::new(RawFile::create(&partial, &path, len_bytes, place.cache)?),
            Format::Qcow2 => {
                Box::new(Qcow2File::create(&partial, &path, len_bytes, place.cache, backing)?)
            }
        };
        self.partials.push(Partial::new(partial, path, overwrite, replaced));
        // Also locks the backing chain.
        backend.lock()?;
        Ok((backend, folder))
    }

    /// Opens a block device of exactly this size and zeroes it.
    fn open_device(
        &mut self,
        path: &Path,
        len_bytes: u64,
        cache: Cache,
        go_on: GoOn<'_>,
    ) -> Result<Box<dyn BlockBackend>, ImageError> {
        let failed = |source| ImageError::Create { path: path.to_owned(), source };
        let device = RawFile::open(path, false, cache)?;
        device.lock()?;
        let found = device.len_bytes();
        if found != len_bytes {
            return Err(ImageError::WrongSize { path: path.to_owned(), len_bytes, found });
        }
        // Fails if it is mounted.
        let mut exclusive = OpenOptions::new();
        exclusive.write(true).custom_flags(libc::O_EXCL);
        let exclusive = exclusive.open(path).map_err(failed)?;
        self.devices.push(Device::new(path, exclusive));
        blank(&device, go_on).map_err(failed)?;
        Ok(Box::new(device))
    }

    /// Renames all images to their final names, or none: the guest is about to run here.
    pub fn rename_into_place(&mut self) -> Result<(), MachineError> {
        for index in 0..self.partials.len() {
            if let Some(Err(error)) = self.partials.get_mut(index).map(Partial::rename_into_place) {
                self.partials.iter_mut().for_each(Partial::rename_back);
                return Err(failed("images", error));
            }
        }
        Ok(())
    }

    /// Keeps the images: the guest runs. Does no I/O.
    pub fn commit(&mut self) {
        self.partials.iter_mut().for_each(Partial::commit);
        self.devices.iter_mut().for_each(Device::commit);
    }

    /// After [`Images::commit`]: removes replaced images and makes the renames durable. The guest does not
    /// wait for this.
    pub fn clean_up(&mut self) {
        for partial in std::mem::take(&mut self.partials) {
            if !partial.remove_replaced() {
                continue;
            }
            let folder = folder_of(&partial.path);
            if let Err(error) = File::open(folder).and_then(|folder| folder.sync_all()) {
                log::warn!("cannot flush {}: {error}", folder.display());
            }
        }
    }
}

/// First piece to zero between two polls of `go_on`. A device without discard gets zeroes written: the
/// whole device may take hours, this piece at most about a second.
const BLANK_BYTES: u64 = 16 << 20;
/// Devices with discard are fast, so pieces grow up to this size.
const MOST_BLANK_BYTES: u64 = 4 << 30;
/// The piece size doubles if a piece took at most this long.
const QUICKLY: Duration = Duration::from_millis(100);

/// Zeroes the whole device unless `go_on` returns false.
fn blank(device: &dyn BlockBackend, go_on: GoOn<'_>) -> io::Result<()> {
    let (mut offset_bytes, mut piece_bytes) = (0, BLANK_BYTES);
    while offset_bytes < device.len_bytes() {
        if !go_on() {
            let text = "zeroing was cancelled";
            return Err(io::Error::new(io::ErrorKind::Interrupted, text));
        }
        let began = Instant::now();
        let len_bytes = (device.len_bytes() - offset_bytes).min(piece_bytes);
        device.write_zeroes(offset_bytes, len_bytes, true)?;
        offset_bytes += len_bytes;
        piece_bytes = match began.elapsed() <= QUICKLY {
            true => (piece_bytes * 2).min(MOST_BLANK_BYTES),
            false => BLANK_BYTES,
        };
    }
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Image options of one disk.
struct Place {
    path: PathBuf,
    cache: Cache,
    format: Format,
    backing: Option<Backing>,
    errors: ErrorPolicy,
}

/// Checks presence and size of a backing file against the source's.
fn check_backing(
    id: &str,
    travels: &Travels,
    place: &Place,
    backend: &dyn BlockBackend,
) -> Result<(), ImageError> {
    match (&travels.backing, &place.backing, backend.backing().map(|chain| chain.len_bytes())) {
        (None, None, _) => Ok(()),
        (None, Some(backing), _) => Err(ImageError::BackingUnwanted { path: backing.path.clone() }),
        (Some(theirs), Some(_), Some(len)) if len == theirs.len_bytes => Ok(()),
        (Some(theirs), Some(backing), Some(len)) => Err(ImageError::BackingSizeDiffers {
            theirs: theirs.name.clone(),
            their_len: theirs.len_bytes,
            path: backing.path.display().to_string(),
            len,
        }),
        (Some(theirs), ..) => {
            let (id, name) = (id.to_owned(), theirs.name.clone());
            Err(ImageError::BackingNotGiven { id, name })
        }
    }
}

fn place_of(disk: &DiskDescription, config: &ReceiveConfig) -> Result<Place, MachineError> {
    if let Some(given) = config.disks.iter().find(|given| given.id == disk.id) {
        let given = given.clone();
        let ReceiveDisk { path, cache, format, backing, errors, .. } = given;
        return Ok(Place { path, cache, format, backing, errors });
    }
    match (&config.disk_dir, &disk.travels) {
        (Some(folder), Some(_)) => {
            let path = folder.join(format!("{}.img", disk.id));
            Ok(Place {
                path,
                cache: Cache::default(),
                format: Format::Raw,
                backing: None,
                errors: ErrorPolicy::default(),
            })
        }
        _ => Err(MachineError::DiskNotGiven { id: disk.id.clone(), len_bytes: disk.len_bytes }),
    }
}

/// Space needed so far, by file system.
#[derive(Default)]
struct Space(HashMap<u64, u64>);

impl Space {
    fn take(&mut self, folder: &Path, bytes: u64) -> Result<(), ImageError> {
        let asked = || {
            let device = std::fs::metadata(folder)?.dev();
            let there = rustix::fs::statvfs(folder)?;
            Ok::<_, io::Error>((device, there.f_bavail.saturating_mul(there.f_frsize)))
        };
        let (device, free) =
            asked().map_err(|source| ImageError::Create { path: folder.to_owned(), source })?;
        let needed = self.0.entry(device).or_default();
        *needed = needed.saturating_add(bytes);
        if *needed > free {
            let path = folder.to_owned();
            return Err(ImageError::NoSpace { path, free, needed: *needed });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
