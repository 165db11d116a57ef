//! Receives the boot files of an incoming guest. Files that this host already has are reused; each of the
//! others goes to an unlinked file, on disk and not in RAM, which disappears with the process.
//!
//! ```text
//! new(announced, known) -> missing() -> write(file, offset, bytes)… -> finish() -> BootPayload
//! ```
//! A file arrives in order, from its first byte to its last, so its digest is complete with its last byte,
//! and nothing is ever written past the announced length. Called by `boot::transfer`.

use super::{
    BootFile, BootPayload, FileIdentity, PayloadError, PayloadFile, check_identities, from_source,
};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// File systems that live in RAM, by the `f_type` of statfs(2).
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// A payload that is being received.
pub struct PayloadStore {
    identities: Vec<FileIdentity>,
    slots: Vec<Slot>,
}

/// The source of a file's content.
enum Slot {
    /// This host already has it.
    Here(Arc<BootFile>),
    /// It is received from the peer.
    Arriving(Arriving),
    /// Same content as an earlier file of the payload.
    SameAs(usize),
}

struct Arriving {
    file: File,
    hash: Sha256,
    received_bytes: u64,
}

impl PayloadStore {
    /// Checks the announced files, looks them up in `known` payloads, and reserves space for the rest in
    /// `$TMPDIR`, `/var/tmp` or `/tmp`. Nothing is written before all checks have passed and the space is reserved.
    pub fn new(
        identities: Vec<FileIdentity>,
        known: &[&BootPayload],
        go_on: &dyn Fn() -> bool,
    ) -> Result<Self, PayloadError> {
        Self::with_place(identities, known, &Place::of_host(), go_on)
    }

    fn with_place(
        identities: Vec<FileIdentity>,
        known: &[&BootPayload],
        place: &Place<'_>,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Self, PayloadError> {
        check_identities(&identities)?;
        let mut slots: Vec<Option<Slot>> = Vec::with_capacity(identities.len());
        for (index, identity) in identities.iter().enumerate() {
            let same = |other: &FileIdentity| {
                (other.len_bytes, other.sha256) == (identity.len_bytes, identity.sha256)
            };
            let earlier = identities[..index].iter().position(same);
            slots.push(match earlier {
                Some(earlier) => Some(Slot::SameAs(earlier)),
                None => find(identity, known, go_on)?.map(Slot::Here),
            });
        }
        let missing = identities.iter().zip(&slots).filter(|(_, slot)| slot.is_none());
        let needed_bytes = missing.map(|(identity, _)| identity.len_bytes).sum();
        let mut folder: Option<PathBuf> = None;
        let mut filled = Vec::with_capacity(slots.len());
        for (identity, slot) in identities.iter().zip(slots) {
            let create = || {
                let folder = match &folder {
                    Some(folder) => folder,
                    None => &*folder.insert(place.folder(needed_bytes)?),
                };
                Arriving::create(folder, identity).map(Slot::Arriving)
            };
            filled.push(slot.map_or_else(create, Ok)?);
        }
        Ok(Self { identities, slots: filled })
    }

    /// Indices of the announced files that must be sent.
    pub fn missing(&self) -> Vec<usize> {
        let arriving = |slot: &Slot| matches!(slot, Slot::Arriving(_));
        let slots = self.slots.iter().enumerate();
        slots.filter(|(_, slot)| arriving(slot)).map(|(index, _)| index).collect()
    }

    /// Writes the next piece of a [missing](Self::missing) file. `offset_bytes` must be the end of the
    /// previous piece.
    pub fn write(
        &mut self,
        index: usize,
        offset_bytes: u64,
        bytes: &[u8],
    ) -> Result<(), PayloadError> {
        let (Some(identity), Some(slot)) = (self.identities.get(index), self.slots.get_mut(index))
        else {
            return Err(PayloadError::List { reason: format!("file {index} was not announced") });
        };
        let file = || from_source(identity.role);
        let wrong = |reason: String| PayloadError::Arrived { file: file(), reason };
        let Slot::Arriving(arriving) = slot else {
            return Err(wrong("it is here already, and was not asked for".into()));
        };
        let (received, len_bytes) = (arriving.received_bytes, identity.len_bytes);
        if offset_bytes != received {
            return Err(wrong(format!(
                "a piece for offset {offset_bytes}, but {received} bytes have arrived"
            )));
        }
        let end = offset_bytes.checked_add(bytes.len() as u64).filter(|end| *end <= len_bytes);
        let Some(end) = end else {
            return Err(wrong(format!(
                "{} bytes at offset {offset_bytes} reach past its length of {len_bytes}",
                bytes.len()
            )));
        };
        arriving
            .file
            .write_all_at(bytes, offset_bytes)
            .map_err(|source| PayloadError::Write { file: file(), source })?;
        arriving.hash.update(bytes);
        arriving.received_bytes = end;
        Ok(())
    }

    /// Checks that each file is complete and matches its digest.
    pub fn finish(self) -> Result<BootPayload, PayloadError> {
        let mut files: Vec<PayloadFile> = Vec::with_capacity(self.slots.len());
        for (FileIdentity { len_bytes, sha256, role, arguments }, slot) in
            self.identities.into_iter().zip(self.slots)
        {
            let name = from_source(role);
            let file = match slot {
                Slot::Here(file) => file,
                // An earlier file, so it is already in the list.
                Slot::SameAs(earlier) => match files.get(earlier) {
                    Some(earlier) => earlier.file.clone(),
                    None => {
                        return Err(PayloadError::List { reason: format!("no file {earlier}") });
                    }
                },
                Slot::Arriving(Arriving { file, hash, received_bytes }) => {
                    if received_bytes != len_bytes {
                        let reason =
                            format!("{received_bytes} bytes have arrived, {len_bytes} were due");
                        return Err(PayloadError::Arrived { file: name, reason });
                    }
                    if <[u8; 32]>::from(hash.finalize()) != sha256 {
                        let reason = "what has arrived does not have the announced SHA-256".into();
                        return Err(PayloadError::Arrived { file: name, reason });
                    }
                    Arc::new(BootFile::arrived(name, file, sha256)?)
                }
            };
            files.push(PayloadFile { role, arguments, file });
        }
        BootPayload::new(files)
    }
}

/// Looks up a file in the known payloads. One that has changed since it was opened does not count.
fn find(
    identity: &FileIdentity,
    known: &[&BootPayload],
    go_on: &dyn Fn() -> bool,
) -> Result<Option<Arc<BootFile>>, PayloadError> {
    for payload in known {
        match payload.find(identity, go_on) {
            Ok(None) => {}
            Err(PayloadError::Cancelled) => return Err(PayloadError::Cancelled),
            Err(error) => log::warn!("{}; it will be sent", crate::error::chain(&error)),
            Ok(found) => return Ok(found),
        }
    }
    Ok(None)
}

impl Arriving {
    /// An unlinked file with space for `len_bytes`, reserved if the file system supports that.
    fn create(folder: &Path, identity: &FileIdentity) -> Result<Self, PayloadError> {
        let len_bytes = identity.len_bytes;
        let create_error =
            |source| PayloadError::Create { folder: folder.display().to_string(), source };
        // O_TMPFILE, or created and unlinked where that is not supported.
        let file = tempfile::tempfile_in(folder).map_err(create_error)?;
        if len_bytes > 0 {
            // Keeps its length at what has arrived.
            let flags = rustix::fs::FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&file, flags, 0, len_bytes) {
                Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
                Err(error) => return Err(create_error(error.into())),
            }
        }
        Ok(Self { file, hash: Sha256::new(), received_bytes: 0 })
    }
}

/// Candidate folders for the copies.
struct Place<'a> {
    /// Folders in order of preference.
    candidates: Vec<PathBuf>,
    /// Whether a folder's file system lives in RAM.
    is_in_ram: &'a dyn Fn(&Path) -> io::Result<bool>,
    /// Free bytes of a folder's file system.
    free_bytes: &'a dyn Fn(&Path) -> io::Result<u64>,
}

impl Place<'_> {
    fn of_host() -> Self {
        let chosen = std::env::var_os("TMPDIR").filter(|path| !path.is_empty());
        let usual = ["/var/tmp", "/tmp"].map(PathBuf::from);
        let candidates = chosen.map(PathBuf::from).into_iter().chain(usual).collect();
        Self { candidates, is_in_ram: &is_in_ram, free_bytes: &free_bytes }
    }

    /// The first folder on disk with room for `needed_bytes`; one in RAM only if no folder is on disk.
    fn folder(&self, needed_bytes: u64) -> Result<PathBuf, PayloadError> {
        let mut in_ram = None;
        let mut refused = None;
        for folder in &self.candidates {
            let name = || folder.display().to_string();
            match (self.free_bytes)(folder).and_then(|free| Ok((free, (self.is_in_ram)(folder)?))) {
                Ok((free_bytes, _)) if free_bytes < needed_bytes => {
                    refused =
                        Some(PayloadError::NoSpace { folder: name(), needed_bytes, free_bytes });
                }
                Ok((_, false)) => return Ok(folder.clone()),
                Ok((_, true)) => in_ram = Some(folder.clone()),
                Err(source) => refused = Some(PayloadError::Create { folder: name(), source }),
            }
        }
        match (in_ram, refused) {
            (Some(folder), _) => {
                let name = folder.display();
                log::warn!(
                    "{name} is in RAM: boot files kept there take {needed_bytes} bytes of it"
                );
                Ok(folder)
            }
            (None, Some(error)) => Err(error),
            (None, None) => Err(PayloadError::List { reason: "no folder to keep them in".into() }),
        }
    }
}

fn is_in_ram(folder: &Path) -> io::Result<bool> {
    let kind = rustix::fs::statfs(folder)?.f_type;
    Ok([TMPFS_MAGIC, RAMFS_MAGIC].contains(&kind))
}

fn free_bytes(folder: &Path) -> io::Result<u64> {
    let space = rustix::fs::statvfs(folder)?;
    if space.f_blocks == 0 {
        // ramfs has no limit of its own.
        return Ok(u64::MAX);
    }
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

#[cfg(test)]
mod tests;
