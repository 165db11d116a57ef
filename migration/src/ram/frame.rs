//! Frames of the data channels, byte by byte. Pure: no I/O, no guest memory.
//!
//! ```text
//! frame   kind u8 (1 pages, 2 mark, 3 end) · method u8 · run count u16 · raw pages u32       8 bytes
//! pages   run table · raw part, if there are raw pages · delta part, if there are delta runs
//! run     first page u64 · page count u32 · kind u8 (0 zero, 1 raw, 2 delta) · 0 u8 · 0 u16  16 bytes
//! raw     the pages of all raw runs, in the order of the table            method 0
//!         byte count u32 · the same pages, compressed as one piece        method 1 zlib, 2 zstd
//! delta   byte count u32 · for each page of all delta runs: length u16 · XBZRLE delta
//! mark    number u64                    answered on the control connection once everything before it is in place
//! end     nothing                       the last frame of the channel
//! ```
//! All integers little-endian. A run lies wholly in one block of RAM.

use crate::wire::{Decoder, Encoder, WireError};
use devices::ram::{GuestAddress, PageIndex, RamLayout};

/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 8;
/// Bytes of one run in a frame's table.
pub const RUN_BYTES: usize = 16;
/// Most runs of a frame.
pub const MAX_RUNS: usize = 512;
/// Most raw pages of a frame: 4 MiB.
pub const MAX_RAW_PAGES: u32 = 1024;
/// Longest delta part of a frame, without its byte count.
pub const MAX_DELTA_BYTES: usize = 1 << 20;
const WHAT: &str = "page frame";

/// How the pages of a run are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RunKind {
    /// Zero pages: no payload.
    Zero = 0,
    /// Uncompressed, or packed.
    Raw = 1,
    /// XBZRLE deltas against the destination's version.
    Delta = 2,
}

/// How the raw pages of a frame are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Packing {
    None = 0,
    Zlib = 1,
    Zstd = 2,
}

/// Consecutive pages that are sent the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub first: PageIndex,
    pub page_count: u32,
    pub kind: RunKind,
}

/// A frame under construction.
#[derive(Debug, Default)]
pub struct Batch {
    runs: Vec<Run>,
    raw_pages: u32,
    delta_pages: u32,
    zero_pages: u64,
}

impl Batch {
    /// Appends pages of one block, all of one kind, growing the last run where they continue it.
    /// The caller checks [`Batch::has_room`] first.
    pub fn push(&mut self, first: PageIndex, page_count: u32, kind: RunKind, layout: &RamLayout) {
        match kind {
            RunKind::Zero => self.zero_pages += u64::from(page_count),
            RunKind::Raw => self.raw_pages += page_count,
            RunKind::Delta => self.delta_pages += page_count,
        }
        if let Some(last) = self.runs.last_mut()
            && last.kind == kind
            && last.first.0 + u64::from(last.page_count) == first.0
            && let Some(sum) = last.page_count.checked_add(page_count)
            // A run never spans two blocks.
            && layout.run_address(last.first, sum.into()).is_some()
        {
            last.page_count = sum;
            return;
        }
        self.runs.push(Run { first, page_count, kind });
    }

    /// Whether another run can be appended, with raw pages up to `most_raw` in all.
    pub fn has_room(&self, most_raw: u32) -> bool {
        self.runs.len() < MAX_RUNS && self.raw_pages < most_raw
    }

    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Raw pages of all runs.
    pub fn raw_pages(&self) -> u32 {
        self.raw_pages
    }

    /// Zero pages of all runs.
    pub fn zero_pages(&self) -> u64 {
        self.zero_pages
    }

    /// Delta pages of all runs.
    pub fn delta_pages(&self) -> u32 {
        self.delta_pages
    }

    /// Encodes header and run table. The raw pages follow, packed as `packing` says.
    ///
    /// # Errors
    /// [`WireError::TooLong`] for more than [`MAX_RUNS`] runs.
    pub fn encode_head(&self, packing: Packing, encoder: &mut Encoder) -> Result<(), WireError> {
        let found = self.runs.len();
        let run_count = u16::try_from(found).ok().filter(|_| found <= MAX_RUNS);
        let (found, most) = (found as u64, MAX_RUNS as u64);
        let run_count = run_count.ok_or(WireError::TooLong { what: "run table", found, most })?;
        encoder.clear().u8(1).u8(packing as u8).u16(run_count).u32(self.raw_pages);
        for run in &self.runs {
            encoder.u64(run.first.0).u32(run.page_count).u8(run.kind as u8).u8(0).u16(0);
        }
        Ok(())
    }

    /// Empties it, keeping the memory.
    pub fn clear(&mut self) {
        self.runs.clear();
        (self.raw_pages, self.delta_pages, self.zero_pages) = (0, 0, 0);
    }
}

pub fn encode_mark(encoder: &mut Encoder, number: u64) {
    encoder.clear().u8(2).u8(0).u16(0).u32(0).u64(number);
}

/// Encodes an end.
pub fn encode_end(encoder: &mut Encoder) {
    encoder.clear().u8(3).u8(0).u16(0).u32(0);
}

/// A frame's header, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameHeader {
    Pages {
        /// Runs in the table; at most [`MAX_RUNS`].
        run_count: usize,
        /// Raw pages after the table; at most [`MAX_RAW_PAGES`].
        raw_pages: u32,
        packing: Packing,
    },
    /// A mark; its number follows.
    Mark,
    /// The last frame.
    End,
}

impl FrameHeader {
    /// Reads a header.
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, WireError> {
        let mut decoder = Decoder::new(WHAT, bytes);
        let (kind, method) = (decoder.u8()?, decoder.u8()?);
        let packing = match method {
            0 => Packing::None,
            1 => Packing::Zlib,
            2 => Packing::Zstd,
            _ => {
                return Err(decoder.malformed(format!("pages packed with unknown method {method}")));
            }
        };
        let (run_count, raw_pages) = (usize::from(decoder.u16()?), decoder.u32()?);
        match (kind, packing, run_count, raw_pages) {
            (1, Packing::None, 1..=MAX_RUNS, 0..=MAX_RAW_PAGES)
            | (1, _, 1..=MAX_RUNS, 1..=MAX_RAW_PAGES) => {
                Ok(Self::Pages { run_count, raw_pages, packing })
            }
            (2, Packing::None, 0, 0) => Ok(Self::Mark),
            (3, Packing::None, 0, 0) => Ok(Self::End),
            (1, ..) => Err(decoder.malformed(format!("{run_count} runs of {raw_pages} raw pages"))),
            _ => Err(decoder.malformed(format!("header {bytes:02x?}"))),
        }
    }
}

/// Reads a table into `runs`, each with its guest address. Every run lies in RAM, and the raw ones
/// have `raw_pages` pages together.
pub fn decode_table(
    table: &[u8],
    raw_pages: u32,
    layout: &RamLayout,
    runs: &mut Vec<(Run, GuestAddress)>,
) -> Result<(), WireError> {
    runs.clear();
    let (mut raw_left, mut zero_left) = (raw_pages, layout.page_count());
    for bytes in table.chunks(RUN_BYTES) {
        let mut decoder = Decoder::new(WHAT, bytes);
        let (first, page_count) = (PageIndex(decoder.u64()?), decoder.u32()?);
        let kind = match (decoder.u8()?, decoder.u8()?, decoder.u16()?) {
            (0, 0, 0) => RunKind::Zero,
            (1, 0, 0) => RunKind::Raw,
            (2, 0, 0) => RunKind::Delta,
            (kind, ..) => return Err(decoder.malformed(format!("run of unknown kind {kind}"))),
        };
        let address = layout.run_address(first, page_count.into()).ok_or_else(|| {
            decoder.malformed(format!("pages {}+{page_count} are outside the guest's RAM", first.0))
        })?;
        if kind == RunKind::Raw {
            let left = raw_left.checked_sub(page_count);
            raw_left = left.ok_or_else(|| decoder.malformed("more raw pages than announced"))?;
        }
        if kind == RunKind::Zero {
            // A frame of a few KiB could have all of RAM cleared hundreds of times.
            let left = zero_left.checked_sub(page_count.into());
            zero_left = left.ok_or_else(|| decoder.malformed("more zero pages than RAM has"))?;
        }
        runs.push((Run { first, page_count, kind }, address));
    }
    if raw_left != 0 {
        let decoder = Decoder::new(WHAT, &[]);
        return Err(decoder.malformed(format!("{raw_left} raw pages belong to no run")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout() -> RamLayout {
        RamLayout::for_size((3 << 30) + (4 << 20)).unwrap()
    }

    proptest! {
        #[test]
        fn a_batch_reads_back_as_pushed(
            pushed in prop::collection::vec((0u64..787_000, 1u32..3, 0u8..3), 1..200),
        ) {
            let layout = layout();
            let mut batch = Batch::default();
            let mut naive = Vec::new();
            for (first, page_count, kind) in pushed {
                let kind = [RunKind::Zero, RunKind::Raw, RunKind::Delta][usize::from(kind)];
                if layout.run_address(PageIndex(first), page_count.into()).is_none() {
                    continue;
                }
                batch.push(PageIndex(first), page_count, kind, &layout);
                naive.extend((first..first + u64::from(page_count)).map(|page| (page, kind)));
            }
            prop_assume!(!batch.is_empty());
            let mut head = Encoder::default();
            batch.encode_head(Packing::None, &mut head).unwrap();
            let (header, table) = head.bytes().split_first_chunk().unwrap();
            let header = FrameHeader::decode(header).unwrap();
            let raw_pages = batch.raw_pages();
            let (run_count, packing) = (batch.runs().len(), Packing::None);
            prop_assert_eq!(header, FrameHeader::Pages { run_count, raw_pages, packing });
            let mut runs = Vec::new();
            decode_table(table, raw_pages, &layout, &mut runs).unwrap();
            let pages: Vec<_> = runs
                .iter()
                .flat_map(|(run, _)| {
                    (run.first.0..run.first.0 + u64::from(run.page_count)).map(|page| (page, run.kind))
                })
                .collect();
            prop_assert_eq!(pages, naive);
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            header in any::<[u8; 8]>(),
            table in prop::collection::vec(any::<u8>(), 0..80),
            raw_pages in 0u32..5,
        ) {
            let _ = FrameHeader::decode(&header);
            let _ = decode_table(&table, raw_pages, &layout(), &mut Vec::new());
        }
    }

    #[test]
    fn a_run_stops_at_the_hole() {
        let layout = layout();
        let last_low = PageIndex((3 << 30) / 4096 - 1);
        let mut batch = Batch::default();
        batch.push(last_low, 1, RunKind::Raw, &layout);
        batch.push(PageIndex(last_low.0 + 1), 1, RunKind::Raw, &layout);
        assert_eq!(batch.runs().len(), 2);
    }

    #[test]
    fn impossible_headers_are_refused() {
        for header in [
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 0, 1, 2, 0, 0, 0, 0],
            [1, 0, 1, 0, 1, 4, 0, 0],
            [1, 3, 1, 0, 1, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [2, 1, 0, 0, 0, 0, 0, 0],
            [2, 0, 1, 0, 0, 0, 0, 0],
            [4, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert!(FrameHeader::decode(&header).is_err(), "{header:?}");
        }
    }
}
