//! Gives a disk another storage while requests run: they are drained for that, and its bitmaps come along.

use super::BlockNode;
use super::backend::BlockBackend;
use super::gate::Drained;
use std::sync::{Arc, PoisonError};

/// Why a disk cannot have another storage.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    #[error("disk {id}: its requests are not drained, which is a bug")]
    NotDrained { id: String },
    #[error("{location} has {is} bytes, but disk {id} has {needed}: give it the same size")]
    Size { id: String, location: String, is: u64, needed: u64 },
    #[error("{location} is read-only, but disk {id} is not")]
    ReadOnly { id: String, location: String },
}

impl BlockNode {
    /// Gives the disk another storage, which is locked and holds the same data. `section` is of its
    /// [`BlockNode::gate`], and nothing is in flight. Its bitmaps come along; the old storage is written back and
    /// unlocked, with the persistent ones beside it.
    ///
    /// # Errors
    /// If the storage is of another size, or read-only for a disk that is not. Nothing has changed then.
    pub fn exchange(
        &self,
        section: &Drained,
        backend: Arc<dyn BlockBackend>,
    ) -> Result<(), ExchangeError> {
        self.check_exchange(section, backend.as_ref())?;
        if let Err(error) = self.close_bitmaps() {
            // What is beside the old image says that it is in use: nobody believes it.
            log::warn!("disk {}: {error}", self.id);
        }
        let old = {
            let mut current = self.backend.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *current, backend)
        };
        if let Err(error) = old.write_back() {
            log::warn!("disk {}: cannot write back {}: {error}", self.id, old.location());
        }
        old.unlock();
        // Whether the new one is on stable storage is not known here.
        self.writes.note_fill();
        self.adopt_bitmaps();
        Ok(())
    }

    fn check_exchange(
        &self,
        section: &Drained,
        backend: &dyn BlockBackend,
    ) -> Result<(), ExchangeError> {
        let (id, location) = (|| self.id.clone(), || backend.location());
        if !section.is_of(&self.gate) {
            return Err(ExchangeError::NotDrained { id: id() });
        }
        if backend.len_bytes() != self.len_bytes {
            let (is, needed) = (backend.len_bytes(), self.len_bytes);
            return Err(ExchangeError::Size { id: id(), location: location(), is, needed });
        }
        if backend.read_only() && !self.read_only {
            return Err(ExchangeError::ReadOnly { id: id(), location: location() });
        }
        Ok(())
    }
}
