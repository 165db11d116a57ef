//! What a job does with each write of a disk: copy the old data first (backup), or write to a second disk as well
//! (mirror with `copy-mode` `write-blocking`). QEMU inserts a filter node for that.
//!
//! Attached to a [`super::BlockNode`] in a drained section. While a filter wants a write, that does not bypass the
//! node through io_uring.

use super::backend::ByteRange;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

/// How a write changes the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change<'a> {
    /// To these bytes.
    Data(&'a [u8]),
    /// To zeroes, and frees the space if it may.
    Zeroes { may_unmap: bool },
    /// To its old content or zeroes.
    Discard,
}

/// Sees the writes of a disk. Called by several threads at once.
pub trait WriteFilter: Send + Sync {
    /// Whether nothing is to be done for a write of `range`, now or later.
    fn lets_pass(&self, range: ByteRange) -> bool;
    /// A write of `range` is about to begin. It is not made on an error, which the guest gets.
    fn begin(&self, range: ByteRange) -> io::Result<Box<dyn FilteredWrite + '_>>;
}

/// A write that a filter has let begin.
pub trait FilteredWrite {
    /// The write has ended. It may have changed the disk even if it has failed.
    fn end(self: Box<Self>, change: Change<'_>, written: &io::Result<()>);
}

/// The filters of a node.
#[derive(Default)]
pub(super) struct Filters(RwLock<Arc<[Arc<dyn WriteFilter>]>>);

impl Filters {
    /// Those that are attached now.
    fn list(&self) -> Arc<[Arc<dyn WriteFilter>]> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<dyn WriteFilter>>)) {
        let mut list = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = list.to_vec();
        change(&mut changed);
        *list = changed.into();
    }

    pub fn add(&self, filter: Arc<dyn WriteFilter>) {
        self.change(|list| list.push(filter));
    }

    pub fn remove(&self, filter: &Arc<dyn WriteFilter>) {
        self.change(|list| list.retain(|other| !Arc::ptr_eq(other, filter)));
    }

    /// Whether no filter wants a write of `range`.
    pub fn let_pass(&self, range: ByteRange) -> bool {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .all(|filter| filter.lets_pass(range))
    }

    /// Makes a write of `range` by `write`, as the filters want it.
    pub fn around(
        &self,
        range: ByteRange,
        change: Change<'_>,
        write: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let list = self.list();
        let mut begun = Vec::with_capacity(list.len());
        for filter in list.iter() {
            begun.push(filter.begin(range)?);
        }
        let written = write();
        for filtered in begun.into_iter().rev() {
            filtered.end(change, &written);
        }
        written
    }
}
