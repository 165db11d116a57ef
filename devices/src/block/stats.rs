//! What the guest has read and written of a disk.

use std::sync::atomic::{AtomicU64, Ordering};

/// A disk's I/O counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeStats {
    /// Bytes read.
    pub read_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Bytes written, zeroes included.
    pub written_bytes: u64,
    /// Writes, zeroes included.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discarded bytes.
    pub discarded_bytes: u64,
    /// Discards.
    pub discards: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counter {
    bytes: AtomicU64,
    operations: AtomicU64,
}

impl Counter {
    pub fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.operations.fetch_add(1, Ordering::Relaxed);
    }

    pub fn get(&self) -> (u64, u64) {
        (self.bytes.load(Ordering::Relaxed), self.operations.load(Ordering::Relaxed))
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub reads: Counter,
    pub writes: Counter,
    pub discards: Counter,
    pub flushes: Counter,
}
