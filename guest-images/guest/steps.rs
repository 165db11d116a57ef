//! `disk` with `steps=1`: which sectors each request touches, and how. It follows from the request's number alone, so
//! that the host can tell what a guest has touched that says how far it is. The crate's own code has this file, too.

use core::ops::Range;

/// Each request stays in a slot of its own until all slots have had one.
const SLOT_SECTORS: u64 = 16;
/// Between the slots of two requests: a prime, so that all have their turn.
const STRIDE: u64 = 1021;
/// A request's most sectors.
const MOST_SECTORS: u64 = 8;

/// What a request does to its sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Writes the next generation.
    Write,
    /// Discards them.
    Discard,
    /// Makes zeroes of them.
    Zeroes {
        /// Their space may be freed.
        unmap: bool,
    },
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What it does.
    pub kind: Kind,
    /// To which.
    pub sectors: Range<u64>,
}

impl Step {
    /// Request `number`, from 0, on a disk of so many sectors. `None`: the disk is too small for one.
    pub fn new(number: u64, disk_sectors: u64) -> Option<Self> {
        let slots = disk_sectors / SLOT_SECTORS;
        let (pass, at) = (number.checked_div(slots)?, number.checked_rem(slots)?);
        // A slot has another kind each time.
        let kind = match (at + pass) % 3 {
            0 => Kind::Write,
            1 => Kind::Discard,
            _ => Kind::Zeroes { unmap: at % 2 == 0 },
        };
        let (skipped, len) = (at / MOST_SECTORS % (MOST_SECTORS + 1), 1 + at % MOST_SECTORS);
        let first = at * STRIDE % slots * SLOT_SECTORS + skipped;
        Some(Self { kind, sectors: first..first + len })
    }
}
