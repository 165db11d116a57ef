//! What travels: RAM, and disks if they do. Weighed together, so that the guest is stopped when the rest
//! of both fits into the pause. Owned by the driver; `precopy` and `stop` send from it.

use super::SourceError;
use super::pace::Pace;
use crate::block::outgoing::DisksOutgoing;
use crate::policy::Round;
use crate::ram::outgoing::RamOutgoing;

/// What travels.
pub(super) struct Freight {
    pub(super) ram: RamOutgoing,
    pub(super) disks: Option<DisksOutgoing>,
}

impl Freight {
    /// Sends what is dirty of the disks, once; returns the bytes sent.
    pub(super) fn iterate_disks(&mut self, pace: &Pace) -> Result<u64, SourceError> {
        self.disks.as_mut().map_or(Ok(0), |disks| disks.iterate(&mut pace.cap()))
    }

    /// Tells `pace` what is left of the disks.
    pub(super) fn weigh_disks(&self, pace: &mut Pace) {
        let Some(disks) = &self.disks else { return };
        let left = disks.pending_bytes();
        // Without a write there is nothing to flush either.
        let flush = if left > 0 { disks.flush_time() } else { Default::default() };
        pace.disks_left(left, disks.bytes_per_sec(), flush);
    }

    /// A round of RAM, with the pass over the disks before it, in bytes of RAM that take as long.
    pub(super) fn with_disks(&self, ram: Round, disk_bytes: u64, pace: &Pace) -> Round {
        let Some(disks) = &self.disks else { return ram };
        let as_ram = |bytes| pace.as_ram(bytes, disks.bytes_per_sec());
        Round {
            sent_bytes: ram.sent_bytes.saturating_add(as_ram(disk_bytes)),
            dirtied_bytes: ram.dirtied_bytes.saturating_add(as_ram(disks.pending_bytes())),
        }
    }
}
