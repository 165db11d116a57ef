//! `-drive`, `-blockdev` and virtio-blk devices: what becomes a disk.

use super::draft::{Draft, FileNode, Image, Images};
use super::lists::List;
use crate::config::DiskConfig;
use devices::block::Format;
use devices::block::failure::ErrorPolicy;
use devices::block::qcow2::BackingChoice;
use devices::block::raw::Cache;
use devices::virtio::blk::MAX_QUEUES;
use std::path::PathBuf;

/// What says how QEMU accesses an image, and changes nothing for the guest.
const ACCESS: [&str; 10] = [
    "aio",
    "discard",
    "auto-read-only",
    "cache.no-flush",
    "locking",
    "l2-cache-size",
    "cache-size",
    "pass-discard-request",
    "force-share",
    "detect-zeroes",
];
/// The same of virtio-blk devices.
const HARMLESS: [&str; 8] = [
    "bootindex",
    "share-rw",
    "config-wce",
    "write-cache",
    "scsi",
    "event_idx",
    "indirect_desc",
    "queue-size",
];

/// `-drive file=FILE,format=FORMAT,if=virtio|none,…`
pub(super) fn drive(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, None)?;
    let interface = list.take("if");
    let interface = interface.as_deref().unwrap_or("ide");
    if !matches!(interface, "virtio" | "none") {
        return Err(match interface {
            "pflash" => "if=pflash: Ferry has no firmware and boots -kernel".to_owned(),
            _ => format!("if={interface}: Ferry's disks are virtio ones: if=virtio"),
        });
    }
    if let Some(media) = list.take("media").filter(|media| media != "disk") {
        return Err(format!("media={media}: Ferry has disks only"));
    }
    let image = Image {
        id: list.take("id"),
        path: list.need("file")?.into(),
        format: format(list.take("format"))?,
        read_only: read_only(&mut list)?,
        cache: cache(&mut list)?,
        errors: errors(&mut list)?,
        snapshot: list.switch("snapshot")? == Some(true),
    };
    list.drop(&["index", "bus", "unit"]);
    access(draft, "-drive", &mut list);
    list.done()?;
    if interface == "none" {
        draft.images.named.push(image);
    } else {
        draft.images.used.push((image, 1));
    }
    Ok(())
}

/// `-blockdev driver=DRIVER,node-name=NAME,…`: a file, or an image in one.
pub(super) fn blockdev(draft: &mut Draft, value: &str) -> Result<(), String> {
    let mut list = List::parse(value, Some("driver"))?;
    let (driver, name) = (list.need("driver")?, list.need("node-name")?);
    let read_only = read_only(&mut list)?;
    let cache = direct(&mut list, "cache.direct")?;
    match driver.as_str() {
        "file" | "host_device" => {
            let path: PathBuf = list.need("filename")?.into();
            access(draft, "-blockdev", &mut list);
            list.done()?;
            draft.images.files.push(FileNode { name: name.clone(), path, read_only, cache });
        }
        "raw" | "qcow2" => {
            let file = list.take("file");
            let files = &draft.images.files;
            let (path, file_read_only, file_cache) = match file {
                Some(reference) => {
                    let found = files.iter().find(|node| node.name == reference);
                    let node = found.ok_or_else(|| format!("file={reference}: no such node"))?;
                    (node.path.clone(), node.read_only, node.cache)
                }
                None => {
                    list.drop(&["file.driver", "file.node-name", "file.aio", "file.locking"]);
                    list.drop(&["file.auto-read-only", "file.discard", "file.cache.no-flush"]);
                    let path = list.need("file.filename")?.into();
                    let read_only = list.switch("file.read-only")? == Some(true);
                    (path, read_only, direct(&mut list, "file.cache.direct")?)
                }
            };
            access(draft, "-blockdev", &mut list);
            list.done()?;
            let cache = if file_cache == Cache::None { file_cache } else { cache };
            let read_only = read_only || file_read_only;
            let (format, errors) = (format(Some(driver))?, ErrorPolicy::default());
            let id = Some(name);
            let image = Image { id, path, format, read_only, cache, errors, snapshot: false };
            draft.images.named.push(image);
        }
        other => return Err(format!("driver={other}: Ferry has raw and qcow2, in files")),
    }
    Ok(())
}

fn access(draft: &mut Draft, option: &str, list: &mut List) {
    for key in ACCESS {
        if let Some(value) = list.take(key) {
            draft.remark(format!("{option} {key}={value}: ignored"));
        }
    }
}

fn format(text: Option<String>) -> Result<Format, String> {
    let text = text.ok_or("give format=raw or format=qcow2: Ferry does not guess it")?;
    text.parse()
}

fn read_only(list: &mut List) -> Result<bool, String> {
    let (one, other) = (list.switch("readonly")?, list.switch("read-only")?);
    Ok(one.or(other) == Some(true))
}

fn direct(list: &mut List, key: &str) -> Result<Cache, String> {
    Ok(if list.switch(key)? == Some(true) { Cache::None } else { Cache::Writeback })
}

fn cache(list: &mut List) -> Result<Cache, String> {
    match list.take("cache").as_deref() {
        // Ferry flushes when the guest asks for it.
        Some("writeback" | "unsafe") => Ok(Cache::Writeback),
        Some("none") => Ok(Cache::None),
        Some(other) => Err(format!("cache={other}: Ferry has writeback and none")),
        None => direct(list, "cache.direct"),
    }
}

fn errors(list: &mut List) -> Result<ErrorPolicy, String> {
    let mut errors = ErrorPolicy::default();
    if let Some(text) = list.take("rerror") {
        errors.on_read = text.parse()?;
    }
    if let Some(text) = list.take("werror") {
        errors.on_write = text.parse()?;
    }
    Ok(errors)
}

/// A virtio-blk device: takes the image that it names.
pub(super) fn virtio_blk(draft: &mut Draft, list: &mut List) -> Result<(), String> {
    let name = list.need("drive")?;
    let named = &mut draft.images.named;
    let at = named.iter().position(|image| image.id.as_deref() == Some(&name));
    let at =
        at.ok_or_else(|| format!("drive={name}: no -drive if=none or -blockdev of this name"))?;
    let mut image = named.remove(at);
    if let Some(serial) = list.take("serial") {
        image.id = Some(serial);
    }
    let errors = self::errors(list)?;
    if errors != ErrorPolicy::default() {
        image.errors = errors;
    }
    let queues = list.number("num-queues")?.unwrap_or(1);
    let fine = u16::try_from(queues).ok().filter(|queues| (1..=MAX_QUEUES).contains(queues));
    let queues = fine.ok_or_else(|| format!("num-queues={queues}: 1 to {MAX_QUEUES}"))?;
    for key in HARMLESS {
        if let Some(value) = list.take(key) {
            draft.remark(format!("-device virtio-blk {key}={value}: ignored"));
        }
    }
    draft.images.used.push((image, queues));
    Ok(())
}

/// Makes disks of the images that are used; returns which of them are not written to.
pub(super) fn finish(draft: &mut Draft, problems: &mut Vec<String>) -> Vec<usize> {
    let Images { named, files: _, used } = std::mem::take(&mut draft.images);
    for image in named {
        let id = image.id.unwrap_or_else(|| image.path.display().to_string());
        problems
            .push(format!("-drive {id}: no device uses it: -device virtio-blk-device,drive={id}"));
    }
    let mut snapshots = Vec::new();
    for (index, (image, queues)) in used.into_iter().enumerate() {
        if (image.snapshot || draft.is_snapshot()) && !image.read_only {
            snapshots.push(index);
        }
        draft.options.disk.push(DiskConfig {
            path: image.path,
            id: image.id,
            format: image.format,
            backing: BackingChoice::Recorded,
            read_only: image.read_only,
            errors: image.errors,
            queues,
            cache: image.cache,
        });
    }
    snapshots
}
