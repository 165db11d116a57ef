//! Progress of the disks: `disk` of `query-migrate`, shaped like `ram`, with an entry per disk. Written
//! by `outgoing` and `chunk_receiver`, kept in [`crate::stats::StatsSnapshot`]. For reports only.

use super::frame::{DiskTotals, HEADER_BYTES};
use crate::ram::frame::Packing;
use serde_json::{Value, json};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskProgress {
    pub name: String,
    /// How much of the image was searched for holes. `None` at the destination.
    pub searched_bytes: Option<u64>,
    /// Bytes to send. Unallocated ranges do not count once they are known.
    pub total_bytes: u64,
    /// Bytes still to send.
    pub remaining_bytes: u64,
    pub sent: DiskTotals,
    /// Bytes on the wire, for the chunks of this disk.
    pub transferred_bytes: u64,
    /// The files that are read, the image first. Empty at the destination.
    pub files: Vec<String>,
}

impl DiskProgress {
    fn percent(&self) -> u64 {
        let done = self.total_bytes.saturating_sub(self.remaining_bytes);
        (done * 100).checked_div(self.total_bytes).unwrap_or(100)
    }

    fn to_json(&self) -> Value {
        let mut json = json!({
            "device": self.name,
            "total": self.total_bytes,
            "remaining": self.remaining_bytes,
            "normal-bytes": self.sent.data_bytes,
            "zero-bytes": self.sent.zero_bytes,
            "transferred": self.transferred_bytes,
            "percent": self.percent(),
            "files": self.files,
        });
        if let Some(searched) = self.searched_bytes {
            json["searched"] = searched.into();
        }
        json
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskStats {
    pub disks: Vec<DiskProgress>,
    /// Bytes on the wire.
    pub transferred_bytes: u64,
    /// Finished passes.
    pub passes: u64,
    /// Bandwidth of the last pass that was long enough to measure; 0 before there was one.
    pub bytes_per_sec: u64,
    pub packed: PackedStats,
}

/// Compressed chunks. Their bytes also count as normal bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PackedStats {
    pub chunks: u64,
    /// Their bytes before compression, and after it.
    pub data_bytes: u64,
    pub packed_bytes: u64,
}

impl DiskStats {
    /// Adds a chunk of disk `index`: `wire_bytes` with its header, for `sent` bytes of the disk.
    pub(super) fn count_chunk(
        &mut self,
        index: usize,
        packing: Packing,
        wire_bytes: u64,
        sent: DiskTotals,
    ) {
        self.transferred_bytes += wire_bytes;
        if packing != Packing::None {
            self.packed.chunks += 1;
            self.packed.data_bytes += sent.data_bytes;
            self.packed.packed_bytes += wire_bytes.saturating_sub(HEADER_BYTES as u64);
        }
        if let Some(disk) = self.disks.get_mut(index) {
            disk.transferred_bytes += wire_bytes;
            disk.sent.data_bytes += sent.data_bytes;
            disk.sent.zero_bytes += sent.zero_bytes;
            let now = sent.data_bytes + sent.zero_bytes;
            disk.remaining_bytes = disk.remaining_bytes.saturating_sub(now);
        }
    }

    /// Takes the source's word for how much will come of each disk. Some of it may have come already.
    pub(super) fn announced(&mut self, data: &[u64]) {
        for (disk, bytes) in self.disks.iter_mut().zip(data) {
            disk.total_bytes = *bytes;
            let come = disk.sent.data_bytes + disk.sent.zero_bytes;
            // Later passes send what was written meanwhile.
            let first_pass = self.passes == 0;
            disk.remaining_bytes = if first_pass { bytes.saturating_sub(come) } else { 0 };
        }
    }

    fn sum(&self, of: impl Fn(&DiskProgress) -> u64) -> u64 {
        self.disks.iter().map(of).sum()
    }

    /// Still to send.
    pub fn remaining_bytes(&self) -> u64 {
        self.sum(|disk| disk.remaining_bytes)
    }

    /// For `query-migrate`.
    pub fn to_json(&self) -> Value {
        let normal = self.sum(|disk| disk.sent.data_bytes);
        let granule = super::GRANULE_BYTES;
        let mut all = json!({
            "transferred": self.transferred_bytes,
            "remaining": self.remaining_bytes(),
            "total": self.sum(|disk| disk.total_bytes),
            "duplicate": self.sum(|disk| disk.sent.zero_bytes) / granule,
            "skipped": 0,
            "normal": normal / granule,
            "normal-bytes": normal,
            "dirty-pages-rate": 0,
            "mbps": self.bytes_per_sec as f64 * 8.0 / 1e6,
            "dirty-sync-count": self.passes,
            "postcopy-requests": 0,
            "page-size": granule,
            "x-disks": self.disks.iter().map(DiskProgress::to_json).collect::<Vec<_>>(),
        });
        if self.packed.chunks > 0 {
            all["x-compression"] = self.packed.to_json();
        }
        all
    }
}

impl PackedStats {
    /// As QEMU's `compression` of RAM, as far as applicable.
    fn to_json(self) -> Value {
        json!({
            "chunks": self.chunks,
            "compressed-size": self.packed_bytes,
            "compression-rate": self.data_bytes as f64 / self.packed_bytes.max(1) as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_do_not_count_once_the_source_has_said_how_much_comes() {
        let one =
            |len| DiskProgress { total_bytes: len, remaining_bytes: len, ..Default::default() };
        let mut stats = DiskStats { disks: vec![one(8000), one(10)], ..Default::default() };
        let come = |data_bytes, zero_bytes| DiskTotals { data_bytes, zero_bytes };
        // Chunks have channels of their own: they may come first.
        stats.count_chunk(0, Packing::None, 132, come(60, 40));
        stats.announced(&[400, 0]);
        let percent = |stats: &DiskStats| stats.disks.iter().map(DiskProgress::percent).collect();
        let seen: Vec<u64> = percent(&stats);
        assert_eq!(seen, [25, 100]);
        stats.count_chunk(0, Packing::None, 232, come(200, 0));
        let seen: Vec<u64> = percent(&stats);
        assert_eq!(seen, [75, 100]);
        assert_eq!(stats.to_json()["total"], 400);
        stats.passes = 1;
        stats.announced(&[400, 10]);
        assert_eq!(stats.remaining_bytes(), 0, "all has come once");
    }
}
