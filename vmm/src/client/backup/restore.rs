//! `ferry backup --restore`: writes the newest state of a disk to an image. Needs no VMM and no other program.

use super::Error;
use super::manifest::{Folder, SavedDisk};
use super::verify::check_newest;
use devices::block::Format;
use devices::block::aligned::AlignedBuffer;
use devices::block::backend::{BlockBackend, Content};
use devices::block::copy::{MAX_OPERATION_BYTES, operation_buffer};
use devices::block::qcow2::{BackingChoice, Qcow2File};
use devices::block::raw::{Cache, RawFile};
use indicatif::HumanBytes;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

/// What reads as zeroes in pieces of this size is not written.
const ZEROES: usize = 64 << 10;

/// `DISK=IMAGE[,format=raw|qcow2]`
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    disk: String,
    image: PathBuf,
    format: Format,
}

impl Wanted {
    fn parse(text: &str) -> Result<Self, String> {
        let expected = || format!("{text:?} is not DISK=IMAGE[,format=raw|qcow2]");
        let (disk, rest) = text.split_once('=').ok_or_else(expected)?;
        let (image, format) = match rest.rsplit_once(",format=") {
            Some((image, format)) => (image, format.parse()?),
            None => (rest, Format::Raw),
        };
        if disk.is_empty() || image.is_empty() {
            return Err(expected());
        }
        Ok(Self { disk: disk.to_owned(), image: image.into(), format })
    }
}

/// Restores disks, one after the other.
pub fn run(path: &Path, images: &[&str], overwrite: bool) -> Result<(), Error> {
    let folder = Folder::open(path)?;
    let manifest = folder.read()?;
    let wanted = images.iter().map(|text| Wanted::parse(text));
    let wanted = wanted.collect::<Result<Vec<_>, _>>().map_err(Error::Unusable)?;
    for Wanted { disk, image, .. } in &wanted {
        if !manifest.disks.contains_key(disk) {
            let has: Vec<_> = manifest.disks.keys().map(String::as_str).collect();
            let has = has.join(", ");
            let why = format!("there is no backup of a disk {disk:?}, only of: {has}");
            return Err(Error::Unusable(why));
        }
        if !overwrite && image.symlink_metadata().is_ok() {
            let why = format!("{} is there already: give --overwrite", image.display());
            return Err(Error::Unusable(why));
        }
    }
    for wanted in &wanted {
        let saved = &manifest.disks[&wanted.disk];
        restore(&folder, saved, wanted)?;
        println!(
            "{}: {} restored to {}",
            wanted.disk,
            HumanBytes(saved.size),
            wanted.image.display()
        );
    }
    Ok(())
}

fn restore(folder: &Folder, saved: &SavedDisk, wanted: &Wanted) -> Result<(), Error> {
    let unusable = |why| Error::Unusable(format!("disk {}: {why}", wanted.disk));
    check_newest(folder, saved).map_err(unusable)?;
    let newest = saved.files.last().ok_or_else(|| unusable("it has no backup yet".into()))?;
    let from = Qcow2File::open(
        &folder.path(&newest.file),
        true,
        Cache::Writeback,
        BackingChoice::Recorded,
    )?;
    from.lock()?;
    // An image with the final name is complete.
    let mut partial = OsString::from(&wanted.image);
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let len = from.len_bytes();
    let to: Box<dyn BlockBackend> = match wanted.format {
        Format::Raw => Box::new(RawFile::create(&partial, &wanted.image, len, Cache::Writeback)?),
        Format::Qcow2 => {
            Box::new(Qcow2File::create(&partial, &wanted.image, len, Cache::Writeback, None)?)
        }
    };
    let written = to.lock().map_err(Error::from).and_then(|()| {
        let copied = copy(&from, to.as_ref()).and_then(|()| to.flush());
        let copied = copied.and_then(|()| std::fs::rename(&partial, &wanted.image));
        copied.map_err(|source| Error::File { path: wanted.image.clone(), source })
    });
    to.unlock();
    from.unlock();
    written.inspect_err(|_| drop(std::fs::remove_file(&partial)))
}

/// Copies a disk to a blank one.
fn copy(from: &Qcow2File, to: &dyn BlockBackend) -> io::Result<()> {
    let mut buffer = operation_buffer();
    let mut at = 0;
    while at < from.len_bytes() {
        let extent = from.extent_at(at)?;
        let most = MAX_OPERATION_BYTES.min(from.len_bytes() - at);
        if extent.content == Content::Zero {
            at += extent.len_bytes.max(1);
            continue;
        }
        let len = extent.len_bytes.clamp(1, most);
        copy_piece(from, to, &mut buffer, at, len)?;
        at += len;
    }
    Ok(())
}

fn copy_piece(
    from: &Qcow2File,
    to: &dyn BlockBackend,
    buffer: &mut AlignedBuffer,
    offset_bytes: u64,
    len_bytes: u64,
) -> io::Result<()> {
    let len = usize::try_from(len_bytes).map_err(io::Error::other)?;
    let bytes = &mut buffer[..len];
    from.read_at(bytes, offset_bytes)?;
    let mut at = offset_bytes;
    for piece in bytes.chunks(ZEROES) {
        if piece.iter().any(|byte| *byte != 0) {
            to.write_at(piece, at)?;
        }
        at += piece.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_restored_where_is_said_in_one_word() {
        let of = |text| Wanted::parse(text);
        let raw = Wanted { disk: "root".into(), image: "/a=b".into(), format: Format::Raw };
        assert_eq!(of("root=/a=b"), Ok(raw));
        assert_eq!(of("root=x,format=qcow2").unwrap().format, Format::Qcow2);
        for bad in ["root", "root=", "=x", "root=x,format=vmdk"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
