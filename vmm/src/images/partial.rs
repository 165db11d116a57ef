//! A file or device that is being written as a disk of an incoming guest: its name until the guest runs,
//! and its removal if the migration fails. Owned by [`super::Images`].

use super::ImageError;
use devices::block::raw::HeldFile;
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// The current name of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    /// `NAME.partial`.
    Partial,
    /// The final name.
    Own,
    /// The final name; the replaced image is now `NAME.partial`.
    Swapped,
}

/// An image whose guest does not run yet. Removed when dropped, unless committed.
#[derive(Debug)]
pub(super) struct Partial {
    pub partial: PathBuf,
    pub path: PathBuf,
    name: Name,
    committed: bool,
    overwrite: bool,
    /// The image to replace, locked so that nobody else starts to use it.
    replaced: Option<HeldFile>,
}

impl Partial {
    /// The file `partial`, to be renamed to `path` in place of `replaced`.
    pub fn new(
        partial: PathBuf,
        path: PathBuf,
        overwrite: bool,
        replaced: Option<HeldFile>,
    ) -> Self {
        Self { partial, path, name: Name::Partial, committed: false, overwrite, replaced }
    }

    /// Exchanges names with the image to replace, which is kept until the guest runs. A file created there
    /// meanwhile is not touched.
    pub fn rename_into_place(&mut self) -> Result<(), ImageError> {
        let path = || self.path.clone();
        let failed = |source: io::Error| ImageError::Create { path: path(), source };
        let (flags, name) = match &self.replaced {
            None => (RenameFlags::NOREPLACE, Name::Own),
            Some(held) if !held.is_at(&self.path).map_err(failed)? => {
                return Err(ImageError::Changed { path: path() });
            }
            Some(held) if !self.overwrite && !held.is_empty().map_err(failed)? => {
                return Err(ImageError::Exists { path: path() });
            }
            Some(_) => (RenameFlags::EXCHANGE, Name::Swapped),
        };
        match rustix::fs::renameat_with(CWD, &self.partial, CWD, &self.path, flags) {
            Ok(()) => self.name = name,
            Err(Errno::EXIST) => return Err(ImageError::Exists { path: path() }),
            // Not every file system supports these flags.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                if self.replaced.is_none() && std::fs::symlink_metadata(&self.path).is_ok() {
                    return Err(ImageError::Exists { path: path() });
                }
                std::fs::rename(&self.partial, &self.path).map_err(failed)?;
                self.name = Name::Own;
            }
            Err(error) => return Err(failed(error.into())),
        }
        Ok(())
    }

    pub fn rename_back(&mut self) {
        let flags = match self.name {
            Name::Partial => return,
            Name::Own => RenameFlags::NOREPLACE,
            Name::Swapped => RenameFlags::EXCHANGE,
        };
        match rustix::fs::renameat_with(CWD, &self.path, CWD, &self.partial, flags) {
            Ok(()) => self.name = Name::Partial,
            Err(error) => log::error!("cannot rename {} back: {error}", self.path.display()),
        }
    }

    /// Keeps the image.
    pub fn commit(&mut self) {
        self.committed = true;
    }

    /// Removes the replaced image; returns whether the image was committed.
    pub fn remove_replaced(&self) -> bool {
        if self.committed && self.name == Name::Swapped {
            remove(&self.partial);
        }
        self.committed
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        match self.name {
            _ if self.committed => {}
            // Another process may use the partial name by now.
            Name::Own => remove(&self.path),
            Name::Partial | Name::Swapped => {
                self.rename_back();
                // Otherwise the partial name is the replaced image's.
                if self.name == Name::Partial {
                    remove(&self.partial);
                }
            }
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        log::warn!("cannot remove {}: {error}", path.display());
    }
}

/// A block device that a guest's disk is written to. It cannot be removed if the migration fails.
#[derive(Debug)]
pub(super) struct Device {
    path: PathBuf,
    committed: bool,
    /// Prevents mounting.
    _exclusive: File,
}

impl Device {
    /// It cannot be mounted while `exclusive` is open.
    pub fn new(path: &Path, exclusive: File) -> Self {
        Self { path: path.to_owned(), committed: false, _exclusive: exclusive }
    }

    /// Keeps the content: the guest runs on it.
    pub fn commit(&mut self) {
        self.committed = true;
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !self.committed {
            let path = self.path.display();
            eprintln!("ferry: {path} was being overwritten and holds no whole disk");
        }
    }
}
