//! `-snapshot`: what a guest writes goes to a temporary qcow2 image above the disk's own, and is gone with it.

use crate::config::DiskConfig;
use devices::block::qcow2::{Backing, BackingChoice, Qcow2File};
use devices::block::raw::{Cache, OpenError};
use devices::block::{Format, open_image};
use std::io;
use tempfile::TempDir;

/// Temporary images, in a folder that is removed when this is dropped.
#[derive(Debug)]
pub struct Overlays {
    _folder: TempDir,
}

/// A disk cannot get a temporary image.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    #[error("-snapshot: cannot make a folder for temporary images; TMPDIR says where")]
    Folder(#[source] io::Error),
    #[error("-snapshot")]
    Image(#[from] OpenError),
}

/// Replaces the images of these disks, by index, by temporary ones above them.
pub(super) fn cover(
    disks: &mut [(String, DiskConfig)],
    which: &[usize],
) -> Result<Option<Overlays>, OverlayError> {
    if which.is_empty() {
        return Ok(None);
    }
    let folder = tempfile::Builder::new().prefix("ferry-snapshot-").tempdir();
    let folder = folder.map_err(OverlayError::Folder)?;
    let covered = disks.iter_mut().enumerate().filter(|(index, _)| which.contains(index));
    for (_, (id, disk)) in covered {
        let base =
            open_image(&disk.path, disk.format, true, Cache::Writeback, disk.backing.clone())?;
        let path = folder.path().join(format!("{id}.qcow2"));
        let backing = Backing { path: disk.path.clone(), format: disk.format };
        let len_bytes = base.len_bytes();
        Qcow2File::create(&path, &path, len_bytes, Cache::Writeback, Some(&backing))?;
        // A folder for temporary files may be one of memory, which has no direct access.
        (disk.path, disk.format, disk.cache) = (path, Format::Qcow2, Cache::Writeback);
        disk.backing = BackingChoice::Recorded;
    }
    Ok(Some(Overlays { _folder: folder }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::block::backend::BlockBackend;

    #[test]
    fn writes_go_to_an_image_that_vanishes() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        std::fs::write(&image, [7; 1 << 16]).unwrap();
        let disk: DiskConfig = format!("path={},cache=none", image.display()).parse().unwrap();
        let mut disks = [("kept".to_owned(), disk.clone()), ("root".to_owned(), disk)];
        assert!(cover(&mut disks, &[]).unwrap().is_none());
        let overlays = cover(&mut disks, &[1]).unwrap();
        assert_eq!(disks[0].1.path, image);
        let path = disks[1].1.path.clone();
        assert_eq!(disks[1].1.cache, Cache::Writeback);
        let open = Qcow2File::open(&path, false, Cache::Writeback, BackingChoice::Recorded);
        let overlay = open.unwrap();
        overlay.lock().unwrap();
        let mut bytes = [0; 1024];
        overlay.read_at(&mut bytes, 4096).unwrap();
        assert_eq!(bytes, [7; 1024]);
        overlay.write_at(&[8; 1024], 4096).unwrap();
        overlay.flush().unwrap();
        overlay.unlock();
        assert_eq!(std::fs::read(&image).unwrap(), [7; 1 << 16]);
        drop(overlays);
        assert!(!path.exists() && !path.parent().unwrap().exists());
    }

    #[test]
    fn an_image_that_is_not_there_is_named() {
        let mut disks = [("d".to_owned(), "path=/nonexistent".parse().unwrap())];
        let error = crate::error::chain(&cover(&mut disks, &[0]).unwrap_err());
        assert!(error.contains("/nonexistent"), "{error}");
    }
}
