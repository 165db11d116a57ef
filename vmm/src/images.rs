//! Images of an arriving guest: where its disks lie on this host is decided here, never by the stream.
//! Called by the supervisor when the machine's description has come.
//!
//! A disk that travels is written into `NAME.partial`, locked from the start, and gets its name when the
//! guest is about to run here: an image that was there before stays whole until then, and a failed or
//! cancelled migration leaves nothing. A process that is killed leaves a file whose name says what it is,
//! which the next attempt takes over.

use crate::config::{ReceiveConfig, ReceiveDisk, is_id};
use crate::machine::MachineError;
use crate::machine::description::{BackingDescription, DiskDescription, Travels};
use devices::block::backend::BackingIdentity;
use devices::block::backend::{BlockBackend, LockError};
use devices::block::failure::ErrorPolicy;
use devices::block::qcow2::{Backing, Qcow2File};
use devices::block::raw::{Cache, HeldFile, OpenError, RawFile};
use devices::block::{BlockNode, Format, open_image};
use migration::block::IncomingDisk;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An image that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A name that could be a path.
    #[error("the stream names a disk {id:?}: a name may have letters, digits, _ - .")]
    BadName {
        /// The name.
        id: String,
    },
    /// There is one.
    #[error("{path} holds an image already: give --overwrite to replace it")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// What is there cannot be an image.
    #[error("{path} is neither a file nor a block device")]
    NotAnImage {
        /// The file.
        path: PathBuf,
    },
    /// A block device has its own size.
    #[error("the guest knows this disk with {len_bytes} bytes, {path} has {found}")]
    WrongSize {
        /// The device.
        path: PathBuf,
        /// The disk's size.
        len_bytes: u64,
        /// The device's.
        found: u64,
    },
    /// Half of it is missing.
    #[error(
        "only what lies above its backing file {name:?} travels: give that too, with --disk \
         {id}=PATH,format=qcow2,backing=BASE,backing-format=raw|qcow2, or move it with --disks full"
    )]
    BackingNotGiven {
        /// The disk.
        id: String,
        /// What the source calls it.
        name: String,
    },
    /// Another one.
    #[error(
        "its backing file differs: {theirs:?} at the source has {their_len} bytes and checksum \
         {their_sum}, {path} here has {len} bytes and checksum {sum}"
    )]
    BackingDiffers {
        /// The source's name for it.
        theirs: String,
        /// Its size.
        their_len: u64,
        /// Its checksum.
        their_sum: String,
        /// The file here.
        path: PathBuf,
        /// Its size.
        len: u64,
        /// Its checksum.
        sum: String,
    },
    /// It would show other bytes.
    #[error("all of this disk travels: it cannot stand on backing file {path} here")]
    BackingUnwanted {
        /// The file.
        path: PathBuf,
    },
    /// No room.
    #[error("{path} has {free} bytes free, the guest's disks need {needed}")]
    NoSpace {
        /// The folder.
        path: PathBuf,
        /// What there is.
        free: u64,
        /// What they take.
        needed: u64,
    },
    /// Its metadata would be read while the source still writes it.
    #[error("a qcow2 image cannot be shared: move it with --disks full or top")]
    Shared,
    /// Two disks in one file.
    #[error("{path} is given for two disks")]
    Twice {
        /// The file.
        path: PathBuf,
    },
    /// The host refuses.
    #[error("cannot create disk image {path}")]
    Create {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image refuses.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Somebody uses it.
    #[error(transparent)]
    Lock(#[from] LockError),
}

/// An image whose guest does not run yet. Removed when dropped, unless it was settled.
#[derive(Debug)]
struct Partial {
    partial: PathBuf,
    path: PathBuf,
    named: bool,
    settled: bool,
    /// What it will replace: nobody else shall begin to use that.
    _replaced: Option<HeldFile>,
}

impl Partial {
    fn give_name(&mut self) -> io::Result<()> {
        std::fs::rename(&self.partial, &self.path)?;
        self.named = true;
        Ok(())
    }

    fn take_name(&mut self) {
        if std::mem::take(&mut self.named)
            && let Err(error) = std::fs::rename(&self.path, &self.partial)
        {
            log::error!("cannot rename {} back: {error}", self.path.display());
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let path = if self.named { &self.path } else { &self.partial };
        if !self.settled
            && let Err(error) = std::fs::remove_file(path)
        {
            log::warn!("cannot remove {}: {error}", path.display());
        }
    }
}

/// All disks of an arriving guest. Dropping it before [`Images::settle`] removes those that were made.
#[derive(Default)]
pub struct Images {
    /// In the order of the description.
    pub nodes: Vec<Arc<BlockNode>>,
    arriving: Vec<IncomingDisk>,
    partials: Vec<Partial>,
}

fn failed(id: &str, source: impl Into<ImageError>) -> MachineError {
    MachineError::Disk { id: id.to_owned(), source: Box::new(source.into()) }
}

impl Images {
    /// Opens the images of the disks that stay where they are, and makes those of the disks that travel.
    pub fn prepare(
        disks: &[DiskDescription],
        config: &ReceiveConfig,
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
                    if *format == Format::Qcow2 && !disk.read_only {
                        return Err(failed(id, ImageError::Shared));
                    }
                    let backend = open_image(path, *format, disk.read_only, *cache);
                    let backend = backend.map_err(|error| failed(id, error))?;
                    Arc::new(BlockNode::new(id, backend).with_policy(place.errors))
                }
                Some(travels) => {
                    let made =
                        images.make(disk.len_bytes, &place, config.overwrite).and_then(|backend| {
                            let found = backend.backing_identity();
                            let found = found.map_err(|source| ImageError::Create {
                                path: place.path.clone(),
                                source,
                            })?;
                            check_backing(id, travels, &place, found)?;
                            space.take(&place.path, travels.data_bytes)?;
                            Ok(backend)
                        });
                    let backend = made.map_err(|error| failed(id, error))?;
                    let node = BlockNode::new(id, backend).with_policy(place.errors);
                    let node = if disk.read_only { node.into_read_only() } else { node };
                    let node = Arc::new(node);
                    let only_top = travels.backing.is_some();
                    images.arriving.push(IncomingDisk { node: node.clone(), only_top });
                    node
                }
            };
            images.nodes.push(node);
        }
        Ok(images)
    }

    /// Those that travel.
    pub fn arriving(&self) -> Vec<IncomingDisk> {
        self.arriving.clone()
    }

    /// A blank image of this size.
    fn make(
        &mut self,
        len_bytes: u64,
        place: &Place,
        overwrite: bool,
    ) -> Result<Box<dyn BlockBackend>, ImageError> {
        let backing = place.backing.as_ref();
        let path = match std::fs::canonicalize(&place.path) {
            Ok(path) => path,
            Err(error) if error.kind() == io::ErrorKind::NotFound => place.path.clone(),
            Err(source) => return Err(ImageError::Create { path: place.path.clone(), source }),
        };
        if self.partials.iter().any(|other| other.path == path) {
            return Err(ImageError::Twice { path });
        }
        let replaced = match std::fs::metadata(&path) {
            Err(_) => None,
            Ok(there) if there.file_type().is_block_device() && place.format == Format::Raw => {
                if !overwrite {
                    return Err(ImageError::Exists { path });
                }
                return open_device(&path, len_bytes, place.cache);
            }
            Ok(there) if !there.is_file() => return Err(ImageError::NotAnImage { path }),
            Ok(there) if there.len() > 0 && !overwrite => return Err(ImageError::Exists { path }),
            Ok(_) => Some(HeldFile::hold(&path)?),
        };
        let mut name = path.file_name().map(OsString::from).unwrap_or_default();
        name.push(".partial");
        let partial = path.with_file_name(name);
        let backend: Box<dyn BlockBackend> = match place.format {
            Format::Raw => Box::new(RawFile::create(&partial, &path, len_bytes, place.cache)?),
            Format::Qcow2 => {
                Box::new(Qcow2File::create(&partial, &path, len_bytes, place.cache, backing)?)
            }
        };
        self.partials.push(Partial {
            partial,
            path,
            named: false,
            settled: false,
            _replaced: replaced,
        });
        Ok(backend)
    }

    /// Gives the images their names: the guest is about to run here. If that fails none has one.
    pub fn keep(&mut self) -> Result<(), MachineError> {
        for index in 0..self.partials.len() {
            if let Some(Err(source)) = self.partials.get_mut(index).map(Partial::give_name) {
                let path = self.partials.get(index).map(|one| one.path.clone()).unwrap_or_default();
                self.partials.iter_mut().for_each(Partial::take_name);
                return Err(failed("images", ImageError::Create { path, source }));
            }
        }
        Ok(())
    }

    /// The guest runs: the images stay. Makes their names durable.
    pub fn settle(&mut self) {
        for mut partial in std::mem::take(&mut self.partials) {
            partial.settled = true;
            let folder = partial.path.parent().unwrap_or(Path::new("."));
            if let Err(error) = File::open(folder).and_then(|folder| folder.sync_all()) {
                log::warn!("cannot flush {}: {error}", folder.display());
            }
        }
        self.arriving.clear();
    }
}

/// Opens a block device of just this size and makes it blank.
fn open_device(
    path: &Path,
    len_bytes: u64,
    cache: Cache,
) -> Result<Box<dyn BlockBackend>, ImageError> {
    let device = RawFile::open(path, false, cache)?;
    device.lock()?;
    let found = device.len_bytes();
    if found != len_bytes {
        return Err(ImageError::WrongSize { path: path.to_owned(), len_bytes, found });
    }
    let blank = device.write_zeroes(0, len_bytes, true);
    blank.map_err(|source| ImageError::Create { path: path.to_owned(), source })?;
    Ok(Box::new(device))
}

/// Where a disk goes.
struct Place {
    path: PathBuf,
    cache: Cache,
    format: Format,
    backing: Option<Backing>,
    errors: ErrorPolicy,
}

/// Whether an image stands on what the source's stands on.
fn check_backing(
    id: &str,
    travels: &Travels,
    place: &Place,
    found: Option<BackingIdentity>,
) -> Result<(), ImageError> {
    match (&travels.backing, &place.backing, found) {
        (None, None, _) => Ok(()),
        (None, Some(backing), _) => Err(ImageError::BackingUnwanted { path: backing.path.clone() }),
        (Some(theirs), Some(backing), Some(found)) => {
            let BackingDescription { name, len_bytes, checksum } = theirs;
            if (found.len_bytes, &found.checksum) == (*len_bytes, checksum) {
                return Ok(());
            }
            Err(ImageError::BackingDiffers {
                theirs: name.clone(),
                their_len: *len_bytes,
                their_sum: checksum.clone(),
                path: backing.path.clone(),
                len: found.len_bytes,
                sum: found.checksum,
            })
        }
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

/// What the images of each file system will take.
#[derive(Default)]
struct Space(HashMap<u64, u64>);

impl Space {
    fn take(&mut self, path: &Path, bytes: u64) -> Result<(), ImageError> {
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
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
mod tests {
    use super::*;
    use crate::machine::description::Travels;

    fn disk(id: &str, len_bytes: u64, data_bytes: u64) -> DiskDescription {
        let travels = Some(Travels { backing: None, data_bytes });
        DiskDescription { id: id.into(), len_bytes, read_only: false, queues: 1, travels }
    }

    fn config(more: &[&str]) -> ReceiveConfig {
        use clap::Parser;
        let arguments = ["ferry", "receive", "unix:/x"].iter().chain(more);
        match crate::cli::Cli::parse_from(arguments).command {
            crate::cli::Command::Receive(args) => args.into_config().unwrap(),
            _ => unreachable!(),
        }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn images_get_their_names_at_the_end_or_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let disks = [disk("root", 3 << 20, 0), disk("data", 512, 0)];
        let config = config(&["--disk-dir", path]);
        let images = Images::prepare(&disks, &config).unwrap();
        assert_eq!(names(folder.path()), ["data.img.partial", "root.img.partial"]);
        assert_eq!(images.arriving().len(), 2);
        // Nobody else writes there meanwhile.
        let other = Images::prepare(&disks, &config).err().unwrap();
        assert!(crate::error::chain(&other).contains("in use by another"), "{other:?}");
        drop(images);
        assert_eq!(names(folder.path()), [""; 0]);
        let mut images = Images::prepare(&disks, &config).unwrap();
        images.keep().unwrap();
        assert_eq!(names(folder.path()), ["data.img", "root.img"]);
        drop(images);
        assert_eq!(names(folder.path()), [""; 0], "the guest did not start after all");
        let mut images = Images::prepare(&disks, &config).unwrap();
        images.nodes[0].fill_at(&[1; 512], 512).unwrap();
        images.keep().unwrap();
        images.settle();
        assert!(images.nodes[0].location().ends_with("/root.img"));
        drop(images);
        assert_eq!(names(folder.path()), ["data.img", "root.img"]);
        let meta = std::fs::metadata(folder.path().join("root.img")).unwrap();
        assert_eq!(meta.len(), 3 << 20);
        assert!(meta.blocks() * 512 <= 64 << 10, "it is sparse");
    }

    #[test]
    fn an_image_that_is_there_is_replaced_only_on_request_and_only_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.img");
        std::fs::write(&path, vec![7; 1024]).unwrap();
        let give = format!("root={}", path.display());
        let disks = [disk("root", 512, 0)];
        let error = Images::prepare(&disks, &config(&["--disk", &give])).err().unwrap();
        assert!(crate::error::chain(&error).contains("--overwrite"), "{error:?}");
        let config = config(&["--disk", &give, "--overwrite"]);
        drop(Images::prepare(&disks, &config).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 1024], "it stays until then");
        // What another machine uses is not replaced.
        let used = RawFile::open(&path, false, Cache::Writeback).unwrap();
        used.lock().unwrap();
        let error = Images::prepare(&disks, &config).err().unwrap();
        assert!(crate::error::chain(&error).contains("in use by another"), "{error:?}");
        drop(used);
        let mut images = Images::prepare(&disks, &config).unwrap();
        images.keep().unwrap();
        images.settle();
        drop(images);
        assert_eq!(std::fs::read(&path).unwrap(), vec![0; 512]);
        assert_eq!(names(folder.path()), ["x.img"]);
        // A file without content is nobody's image.
        std::fs::write(&path, "").unwrap();
        assert!(Images::prepare(&disks, &self::config(&["--disk", &give])).is_ok());
    }

    #[test]
    fn what_cannot_be_made_is_refused_by_name_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let refuse = |disks: &[DiskDescription], more: &[&str], expected: &str| {
            let error = Images::prepare(disks, &config(more)).err().unwrap();
            let text = crate::error::chain(&error);
            assert!(text.contains(expected), "{text:?} lacks {expected:?}");
        };
        for trick in ["../root", "/etc/x", "..", "", "a/b", "a\0b", ".hidden"] {
            refuse(&[disk(trick, 512, 0)], &["--disk-dir", path], "the stream names a disk");
        }
        refuse(&[disk("root", 512, 0)], &[], "--disk root=PATH");
        let missing = folder.path().join("none/at/all");
        refuse(&[disk("root", 512, 0)], &["--disk-dir", missing.to_str().unwrap()], "none/at/all");
        refuse(&[disk("root", 512, 0)], &["--disk-dir", "/proc"], "/proc/root.img");
        refuse(
            &[disk("a", 512, 0), disk("b", 512, u64::MAX / 2)],
            &["--disk-dir", path],
            "bytes free",
        );
        let same = [format!("a={path}/x"), format!("b={path}/x")];
        let same = ["--disk", &same[0], "--disk", &same[1]];
        refuse(&[disk("a", 512, 0), disk("b", 512, 0)], &same, "given for two disks");
        let is_folder = format!("root={path}");
        refuse(
            &[disk("root", 512, 0)],
            &["--disk", &is_folder],
            "neither a file nor a block device",
        );
        refuse(&[disk("root", 1 << 62, 0)], &["--disk-dir", path], "root.img");
        assert_eq!(names(folder.path()), [""; 0]);
    }
}
