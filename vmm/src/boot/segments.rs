//! The parts of a kernel file that are loaded into RAM: checked all together, then copied. Used by every
//! loader that takes a kernel apart itself.

use super::layout::HIGH_RAM_START;
use super::payload::{BootFile, MAX_KERNEL_BYTES};
use super::{BootError, low_ram_end, write_file};
use devices::ram::{GuestRam, RamLayout};
use std::ops::Range;

/// A part of the file and its load address; the memory after it, up to `mem_bytes`, is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub offset: u64,
    pub file_bytes: u64,
    /// Physical.
    pub address: u64,
    /// At least `file_bytes`.
    pub mem_bytes: u64,
}

impl Segment {
    /// The one segment of a file of `file_len` bytes whose header, at `header_at` of it, says where it goes
    /// (Multiboot's address fields). 0 for `load_end` is the file's end, for `bss_end` no memory behind it.
    pub fn flat(
        file_len: u64,
        header_at: u64,
        header_address: u64,
        load: u64,
        load_end: u64,
        bss_end: u64,
    ) -> Result<Self, &'static str> {
        let before = header_address.checked_sub(load);
        let offset = before
            .and_then(|before| header_at.checked_sub(before))
            .ok_or("load address lies before the start of the file")?;
        let file_bytes = match load_end {
            0 => file_len.saturating_sub(offset),
            end => end.checked_sub(load).ok_or("load end lies before its start")?,
        };
        let mem_bytes = bss_end.saturating_sub(load).max(file_bytes);
        Ok(Self { offset, file_bytes, address: load, mem_bytes })
    }

    /// The guest memory that it occupies.
    pub fn range(&self) -> Range<u64> {
        self.address..self.address.saturating_add(self.mem_bytes)
    }
}

/// Memory that a boot protocol needs for itself.
#[derive(Debug, Clone)]
pub(super) struct Reserved {
    /// What lies there, in messages.
    pub what: &'static str,
    pub range: Range<u64>,
}

/// Where segments may lie.
#[derive(Debug, Clone, Copy)]
pub(super) enum Room {
    /// In the first block of RAM: the protocol's addresses have 32 bits.
    Below4Gib,
    /// Anywhere in RAM.
    AllRam,
}

pub(super) fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// Checks that the file has all segments, and that RAM has room for them beside what is `reserved`. Returns
/// their end, at least 1 MiB.
pub(super) fn check(
    file: &BootFile,
    segments: &[Segment],
    layout: &RamLayout,
    room: Room,
    reserved: &[Reserved],
) -> Result<u64, BootError> {
    let name = || file.name().to_owned();
    let unloadable = |reason: String| BootError::Unloadable { file: name(), reason };
    if segments.is_empty() {
        return Err(unloadable("it has no loadable segment".into()));
    }
    // Several headers may refer to the same bytes.
    let sum = segments.iter().fold(0, |sum: u64, one| sum.saturating_add(one.file_bytes));
    if sum > MAX_KERNEL_BYTES {
        let most = MAX_KERNEL_BYTES;
        return Err(unloadable(format!(
            "its segments have more than the {most} bytes that are possible"
        )));
    }
    let below_4_gib = low_ram_end(layout)?;
    let mut kernel_end = HIGH_RAM_START;
    for (index, segment) in segments.iter().enumerate() {
        let in_file = segment.offset.checked_add(segment.file_bytes);
        if in_file.is_none_or(|end| end > file.len_bytes()) {
            let what = format!("segment {index}");
            return Err(BootError::Truncated { file: name(), what });
        }
        let Range { start, end } = segment.range();
        let fits = match room {
            Room::Below4Gib => end <= below_4_gib,
            Room::AllRam => layout.blocks().iter().any(|block| {
                start >= block.base.0 && end <= block.base.0.saturating_add(block.len_bytes())
            }),
        };
        if !fits {
            let ram_bytes = layout.size_bytes();
            return Err(BootError::DoesNotFit { file: name(), start, end, ram_bytes });
        }
        if let Some(Reserved { what, range }) =
            reserved.iter().find(|reserved| overlap(&reserved.range, &(start..end)))
        {
            let (from, to) = (range.start, range.end);
            return Err(unloadable(format!(
                "segment {index} needs {start:#x} to {end:#x}, which overlaps {what} at {from:#x} to {to:#x}"
            )));
        }
        kernel_end = kernel_end.max(end);
    }
    Ok(kernel_end)
}

/// Copies checked segments into RAM, which is zeroed already: what follows their bytes needs no clearing.
pub(super) fn load(
    file: &BootFile,
    segments: &[Segment],
    ram: &GuestRam,
    go_on: &dyn Fn() -> bool,
) -> Result<(), BootError> {
    segments.iter().try_for_each(|segment| {
        write_file(file, segment.offset, segment.file_bytes, ram, segment.address, go_on)
    })
}

/// The lowest place within `room` for `len_bytes`, on an 8-byte boundary, that is not `taken`.
pub(super) fn find_gap(room: Range<u64>, len_bytes: u64, taken: &[Range<u64>]) -> Option<u64> {
    let mut start = room.start;
    loop {
        start = start.checked_next_multiple_of(8)?;
        let end = start.checked_add(len_bytes).filter(|end| *end <= room.end)?;
        match taken.iter().find(|other| overlap(other, &(start..end))) {
            None => return Some(start),
            // Ends behind `start`, so the search goes on.
            Some(other) => start = other.end,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_lowest_gap_is_found() {
        assert_eq!(find_gap(0x100..0x200, 0x100, &[]), Some(0x100));
        assert_eq!(find_gap(0x100..0x200, 0x101, &[]), None);
        assert_eq!(find_gap(0x100..0x200, 0x10, &[0..0x103, 0x120..0x130]), Some(0x108));
        assert_eq!(find_gap(0x100..0x200, 0x20, &[0..0x103, 0x120..0x130]), Some(0x130));
        assert_eq!(find_gap(0x100..0x200, 0x10, std::slice::from_ref(&(0..u64::MAX))), None);
    }

    proptest! {
        #[test]
        fn a_gap_overlaps_nothing(
            starts in prop::collection::vec((0u64..500, 1u64..100), 0..8),
            len_bytes in 1u64..100,
        ) {
            let taken: Vec<_> = starts.iter().map(|(start, len)| *start..start + len).collect();
            if let Some(start) = find_gap(0..600, len_bytes, &taken) {
                let found = start..start + len_bytes;
                prop_assert!(found.end <= 600 && taken.iter().all(|other| !overlap(other, &found)));
            }
        }
    }
}
