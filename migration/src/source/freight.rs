//! What travels: RAM, and disks if they do. One estimate for both, so that the guest is stopped when the
//! rest of both fits into the pause. Owned by the driver; `precopy` and `stop` send from it.

use super::SourceError;
use crate::block::outgoing::DisksOutgoing;
use crate::ram::outgoing::RamOutgoing;
use crate::transport::Throttle;
use std::time::Duration;

/// What travels.
pub(super) struct Freight {
    pub(super) ram: RamOutgoing,
    pub(super) disks: Option<DisksOutgoing>,
    /// What the pause costs without disks, however little there is to send.
    fixed: Duration,
}

impl Freight {
    pub(super) fn new(ram: RamOutgoing, disks: Option<DisksOutgoing>, fixed: Duration) -> Self {
        Self { ram, disks, fixed }
    }

    /// Sends what is dirty of the disks, once; returns the bytes sent.
    pub(super) fn iterate_disks(
        &mut self,
        throttle: &mut dyn Throttle,
    ) -> Result<u64, SourceError> {
        self.disks.as_mut().map_or(Ok(0), |disks| disks.iterate(throttle))
    }

    /// What the pause costs, however little there is to send: also the last flush of the images.
    pub(super) fn fixed_downtime(&self) -> Duration {
        self.fixed + self.disks.as_ref().map_or(Duration::ZERO, DisksOutgoing::flush_time)
    }

    /// Bytes of RAM that take as long to send as `disk_bytes` of disks do, at `bytes_per_sec` for RAM: a
    /// disk is often slower than the link.
    pub(super) fn as_pages(&self, disk_bytes: u64, bytes_per_sec: u64) -> u64 {
        let disk_rate = self.disks.as_ref().and_then(DisksOutgoing::bytes_per_sec);
        let Some(slower) = disk_rate.filter(|rate| *rate < bytes_per_sec) else {
            return disk_bytes;
        };
        let bytes = u128::from(disk_bytes) * u128::from(bytes_per_sec) / u128::from(slower.max(1));
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// Bytes that are known to be left, in terms of RAM.
    pub(super) fn pending_bytes(&self, bytes_per_sec: u64) -> u64 {
        let disks = self.disks.as_ref().map_or(0, DisksOutgoing::pending_bytes);
        self.ram.pending_bytes().saturating_add(self.as_pages(disks, bytes_per_sec))
    }
}
