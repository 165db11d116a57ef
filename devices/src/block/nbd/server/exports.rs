//! What is exported, and which connections use it.
//!
//! An export that is removed is found by no new client. It stays in the table, *shutting down*, while clients are
//! left; the last one to leave takes it out and frees its bitmaps. Choosing an export and removing it exclude each
//! other, so that no client is overlooked.

use super::stream::disconnect;
use crate::block::BlockNode;
use crate::block::bitmaps::{BitmapError, BitmapName, Held};
use crate::block::nbd::protocol::{
    BASE_ALLOCATION, MAX_STRING_BYTES, QEMU_DIRTY_BITMAP, transmission_flag as flag,
};
use crate::lock;
use socket2::Socket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Most exports of a server.
pub const MAX_EXPORTS: usize = 256;
/// Most bitmaps of an export.
pub const MAX_EXPORT_BITMAPS: usize = 64;

/// Why something cannot be exported, or not be removed. QEMU's words where QEMU has the rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    #[error("NBD server not running")]
    NotRunning,
    #[error("Block export id '{id}' is already in use")]
    IdInUse { id: String },
    #[error("NBD server already has export named '{name}'")]
    NameInUse { name: String },
    #[error("{what} '{start}…' too long: at most {MAX_STRING_BYTES} bytes")]
    TooLong {
        what: &'static str,
        /// As much of it as a message can take.
        start: String,
    },
    #[error("{what} must not contain NUL")]
    Nul { what: &'static str },
    #[error("Cannot export read-only node as writable")]
    ReadOnly,
    #[error("Bitmap '{name}' is not found")]
    NoBitmap { name: BitmapName },
    #[error("Enabled bitmap '{name}' incompatible with readonly export")]
    EnabledBitmap { name: BitmapName },
    #[error("Bitmap '{name}' is named twice")]
    BitmapTwice { name: BitmapName },
    #[error("An export has at most {MAX_EXPORT_BITMAPS} bitmaps, not {count}")]
    TooManyBitmaps { count: usize },
    #[error("An NBD server has at most {MAX_EXPORTS} exports")]
    TooMany,
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    #[error("Export '{id}' is not found")]
    NotFound { id: String },
    /// QEMU adds a hint: [`ExportError::hint`].
    #[error("export '{id}' still in use")]
    InUse { id: String },
}

impl ExportError {
    /// What to do about it, as QEMU hints at it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::InUse { .. } => Some("Use mode='hard' to force client disconnect"),
            Self::Bitmap(error) => error.hint(),
            _ => None,
        }
    }
}

/// A disk to be exported.
#[derive(Debug, Clone)]
pub struct Export {
    /// Names it among all exports, whatever serves them.
    pub id: String,
    /// Names it for clients.
    pub name: String,
    /// For people who look at the list of exports; may be empty.
    pub description: String,
    /// The disk.
    pub node: Arc<BlockNode>,
    /// Whether clients may write.
    pub writable: bool,
    /// Bitmaps of the disk that clients may read, each as the context `qemu:dirty-bitmap:NAME`.
    pub bitmaps: Vec<BitmapName>,
}

/// Whether an export is removed while clients use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RemoveMode {
    /// No: that is an error.
    #[default]
    Safe,
    /// Yes: they are disconnected.
    Hard,
}

/// What is known of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its id.
    pub id: String,
    /// Its name for clients.
    pub name: String,
    /// Id of its disk.
    pub node: String,
    /// Whether clients may write.
    pub writable: bool,
    /// Whether it has been removed and its last client is not gone yet.
    pub shutting_down: bool,
    /// Clients that use it.
    pub clients: usize,
}

/// A disk that is exported.
#[derive(Debug)]
pub struct Exported {
    pub id: String,
    pub name: String,
    pub description: String,
    pub node: Arc<BlockNode>,
    pub writable: bool,
    pub bitmaps: Vec<Held>,
    ending: AtomicBool,
}

/// What a handshake tells of an export. No part of that: a client that is slow to hear it does not keep an export
/// that has been removed, or its bitmaps.
#[derive(Debug, Clone)]
pub struct Facts {
    pub name: String,
    pub description: String,
    pub len_bytes: u64,
    pub writable: bool,
    /// With their names.
    pub contexts: Vec<(Context, String)>,
}

/// A metadata context of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`
    Allocation,
    /// `qemu:dirty-bitmap:NAME`, by its index in [`Exported::bitmaps`].
    Bitmap(usize),
}

impl Exported {
    fn new(export: Export) -> Result<Self, ExportError> {
        let Export { id, name, description, node, writable, bitmaps } = export;
        check_text("export name", &name)?;
        check_text("description", &description)?;
        if writable && node.read_only() {
            return Err(ExportError::ReadOnly);
        }
        if bitmaps.len() > MAX_EXPORT_BITMAPS {
            return Err(ExportError::TooManyBitmaps { count: bitmaps.len() });
        }
        let mut held: Vec<Held> = Vec::with_capacity(bitmaps.len());
        for bitmap in bitmaps {
            if held.iter().any(|other| *other.name() == bitmap) {
                return Err(ExportError::BitmapTwice { name: bitmap });
            }
            let bitmap = match node.bitmaps().hold(&bitmap) {
                Err(BitmapError::NotFound { name }) => return Err(ExportError::NoBitmap { name }),
                result => result?,
            };
            // What the guest writes would change it under a client that reads it.
            if !writable && !node.read_only() && bitmap.info().recording {
                return Err(ExportError::EnabledBitmap { name: bitmap.name().clone() });
            }
            held.push(bitmap);
        }
        let ending = AtomicBool::new(false);
        Ok(Self { id, name, description, node, writable, bitmaps: held, ending })
    }

    /// Whether it has been removed: no request is begun any more.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// What a handshake tells of it.
    pub fn facts(&self) -> Facts {
        let (name, description) = (self.name.clone(), self.description.clone());
        let bitmaps = self.bitmaps.iter().enumerate().map(|(at, bitmap)| {
            (Context::Bitmap(at), format!("{QEMU_DIRTY_BITMAP}{}", bitmap.name()))
        });
        let allocation = (Context::Allocation, BASE_ALLOCATION.to_owned());
        let contexts = std::iter::once(allocation).chain(bitmaps).collect();
        let (len_bytes, writable) = (self.node.len_bytes(), self.writable);
        Facts { name, description, len_bytes, writable, contexts }
    }
}

impl Facts {
    /// Its transmission flags. A flush of the node is one for all connections.
    pub fn flags(&self, structured: bool) -> u16 {
        let flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN;
        let access = match self.writable {
            true => flag::SEND_TRIM | flag::SEND_WRITE_ZEROES,
            false => flag::READ_ONLY,
        };
        flags | access | if structured { flag::SEND_DF } else { 0 }
    }
}

fn check_text(what: &'static str, text: &str) -> Result<(), ExportError> {
    if text.contains('\0') {
        return Err(ExportError::Nul { what });
    }
    if text.len() > MAX_STRING_BYTES {
        return Err(ExportError::TooLong { what, start: text.chars().take(32).collect() });
    }
    Ok(())
}

#[derive(Debug)]
struct Entry {
    export: Arc<Exported>,
    clients: Vec<(u64, Arc<Socket>)>,
}

/// All exports, in the order in which they were added. Locked for moments.
#[derive(Debug, Default)]
pub struct Exports(Mutex<Vec<Entry>>);

impl Exports {
    /// Adds an export.
    pub fn add(&self, export: Export) -> Result<(), ExportError> {
        // Holding a bitmap may take a moment, so not under the lock.
        check_new(&lock(&self.0), &export.id, &export.name)?;
        let export = Arc::new(Exported::new(export)?);
        let mut entries = lock(&self.0);
        check_new(&entries, &export.id, &export.name)?;
        entries.push(Entry { export, clients: Vec::new() });
        Ok(())
    }

    /// Removes an export and disconnects its clients. Returns it if it has none.
    pub fn remove(&self, id: &str, mode: RemoveMode) -> Result<Option<Arc<Exported>>, ExportError> {
        let mut entries = lock(&self.0);
        let found = entries.iter().position(|entry| entry.export.id == id);
        let at = found.ok_or_else(|| ExportError::NotFound { id: id.to_owned() })?;
        let Entry { export, clients } = &entries[at];
        if clients.is_empty() {
            return Ok(Some(entries.remove(at).export));
        }
        if mode == RemoveMode::Safe && !export.is_ending() {
            return Err(ExportError::InUse { id: id.to_owned() });
        }
        export.ending.store(true, Ordering::SeqCst);
        clients.iter().for_each(|(_, socket)| disconnect(socket));
        Ok(None)
    }

    /// What is known of the export of this name.
    pub fn find(&self, name: &str) -> Option<Facts> {
        lock(&self.0).iter().find(|entry| entry.serves(name)).map(|entry| entry.export.facts())
    }

    /// The export of this name, from now on used by `client`.
    pub fn enter(&self, name: &str, client: u64, socket: &Arc<Socket>) -> Option<Arc<Exported>> {
        let mut entries = lock(&self.0);
        let entry = entries.iter_mut().find(|entry| entry.serves(name))?;
        entry.clients.push((client, socket.clone()));
        Some(entry.export.clone())
    }

    /// `client` does not use the export any more. Returns it if it has been removed and this was the last one.
    pub fn leave(&self, id: &str, client: u64) -> Option<Arc<Exported>> {
        let mut entries = lock(&self.0);
        let at = entries.iter().position(|entry| entry.export.id == id)?;
        let Entry { export, clients } = &mut entries[at];
        clients.retain(|(other, _)| *other != client);
        let over = clients.is_empty() && export.is_ending();
        over.then(|| entries.remove(at).export)
    }

    /// Names and descriptions for clients.
    pub fn list(&self) -> Vec<(String, String)> {
        let entries = lock(&self.0);
        let open = entries.iter().map(|entry| &entry.export).filter(|export| !export.is_ending());
        open.map(|export| (export.name.clone(), export.description.clone())).collect()
    }

    /// What is known of each.
    pub fn info(&self) -> Vec<ExportInfo> {
        let info = |Entry { export, clients }: &Entry| ExportInfo {
            id: export.id.clone(),
            name: export.name.clone(),
            node: export.node.id().to_owned(),
            writable: export.writable,
            shutting_down: export.is_ending(),
            clients: clients.len(),
        };
        lock(&self.0).iter().map(info).collect()
    }
}

impl Entry {
    fn serves(&self, name: &str) -> bool {
        self.export.name == name && !self.export.is_ending()
    }
}

fn check_new(entries: &[Entry], id: &str, name: &str) -> Result<(), ExportError> {
    if entries.iter().any(|entry| entry.export.id == id) {
        return Err(ExportError::IdInUse { id: id.to_owned() });
    }
    if entries.iter().any(|entry| entry.serves(name)) {
        return Err(ExportError::NameInUse { name: name.to_owned() });
    }
    if entries.len() >= MAX_EXPORTS {
        return Err(ExportError::TooMany);
    }
    Ok(())
}
