//! Dirty bitmaps that migrate with their guest's disks.
//!
//! ```text
//! source                                         destination
//! Setup: names, granularity, flags ────────────▶ bitmaps of these names exist and record (empty, busy)
//! End ─────────────────────────────────────────▶
//!   ── Go: the guest runs there, and marks what it writes ──
//! Postcopy: chunks of each bitmap, in order… ──▶ ORed into what the guest has marked
//! Postcopy: complete, with the count ──────────▶ a bitmap like any other; or dropped, if the count differs
//! ```
//! **No downtime.** The contents are not needed to run, so they go after the handover. A bitmap that does not
//! arrive whole does not arrive at all: it is dropped and reported, and neither the guest nor another bitmap
//! notices.
//!
//! **Which bitmaps.** All of them if the user wants [`Capability`](crate::wire::hello::BITMAPS), under names
//! that a [`mapping`] may change on either side; those that it does not name stay behind.

pub mod frame;
pub mod incoming;
pub mod mapping;
pub mod outgoing;

use crate::error::ParticipantError;
use devices::block::bitmaps::BitmapError;

/// Name of the bitmaps' sections.
pub const SECTION: &str = "dirty-bitmap";
/// Most bitmaps of a migration.
pub const MAX_BITMAPS: u16 = 4096;

/// Failures of bitmaps, connections aside.
#[derive(Debug, thiserror::Error)]
pub enum BitmapsError {
    /// At either side, before the switch.
    #[error("disk {disk}")]
    Bitmap {
        disk: String,
        #[source]
        source: BitmapError,
    },
    #[error("{found} dirty bitmaps are to move, at most {MAX_BITMAPS} can")]
    TooMany { found: usize },
    /// The destination.
    #[error("dirty bitmap {name:?} is for disk {disk:?}, which is not here")]
    NoDisk { disk: String, name: String },
    #[error("dirty bitmap {name:?} is for a disk of {theirs} bytes, disk {disk} has {ours}")]
    OtherSize { disk: String, name: String, theirs: u64, ours: u64 },
}

impl From<BitmapsError> for ParticipantError {
    fn from(error: BitmapsError) -> Self {
        Self::own(error)
    }
}
