//! Receives the pages of one data channel straight into guest RAM. Runs on the channel's thread
//! (`receivers`). Checks each frame against the machine's layout before it writes a byte of guest RAM.

use super::decode::Decoding;
use super::dirty::PageBitmap;
use super::frame::{
    FRAME_HEADER_BYTES, FrameHeader, Packing, RUN_BYTES, Run, RunKind, decode_table,
};
use super::page::{PAGE_BYTES, bytes_of};
use super::shard::Tally;
use crate::guest::IncomingRam;
use crate::stats::Counters;
use crate::transport::{Channel, PageSlice};
use crate::wire::section::RamSetup;
use crate::wire::{Decoder, WireError};
use devices::ram::{GuestAddress, PAGE_SIZE, PageIndex};
use std::io;
use std::sync::Arc;
use vm_memory::{Bytes, GuestMemoryBackend};

const ZEROES: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// A received frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrived {
    /// Pages, now in place.
    Pages,
    /// A mark, to be answered.
    Mark(u64),
    /// The last frame, unless the source calls its stop off.
    End,
}

/// RAM at the destination, for one data channel.
pub struct PageReceiver {
    ram: IncomingRam,
    /// Pages ever written here. The others are still zero.
    written: PageBitmap,
    /// Pages received in any form: a delta needs a base.
    known: PageBitmap,
    decoding: Decoding,
    tally: Tally,
    counters: Arc<Counters>,
    table: Vec<u8>,
    runs: Vec<(Run, GuestAddress)>,
}

impl PageReceiver {
    /// Checks the announced size against the machine's.
    pub fn start(
        ram: IncomingRam,
        setup: RamSetup,
        counters: Arc<Counters>,
    ) -> Result<Self, WireError> {
        let expected = ram.layout.page_count();
        if setup.page_count != expected || u64::from(setup.page_bytes) != PAGE_SIZE {
            let reason = format!(
                "{} pages of {} bytes, the machine has {expected} of {PAGE_SIZE}",
                setup.page_count, setup.page_bytes
            );
            return Err(WireError::Malformed { what: "RAM setup", reason });
        }
        let (table, runs) = (Vec::new(), Vec::new());
        let (written, known) = (PageBitmap::new(expected), PageBitmap::new(expected));
        let (decoding, tally) = (Decoding::default(), Tally::default());
        Ok(Self { ram, written, known, decoding, tally, counters, table, runs })
    }

    /// Receives one frame.
    pub fn receive(&mut self, channel: &Channel) -> Result<Arrived, WireError> {
        let mut header = [0; FRAME_HEADER_BYTES];
        let before = channel.moved_bytes();
        channel.read_when_it_comes(&mut header)?;
        self.tally.frames += 1;
        let arrived = match FrameHeader::decode(&header)? {
            FrameHeader::Pages { run_count, raw_pages, packing } => {
                self.pages(channel, run_count, raw_pages, packing)?;
                Arrived::Pages
            }
            FrameHeader::Mark => {
                let mut number = [0; 8];
                channel.read_exact(&mut number)?;
                Arrived::Mark(Decoder::new("mark", &number).u64()?)
            }
            FrameHeader::End => Arrived::End,
        };
        let bytes = channel.moved_bytes() - before;
        self.counters.update(|stats| stats.transferred_bytes += bytes);
        Ok(arrived)
    }

    fn pages(
        &mut self,
        channel: &Channel,
        run_count: usize,
        raw_pages: u32,
        packing: Packing,
    ) -> Result<(), WireError> {
        self.table.resize(run_count * RUN_BYTES, 0);
        channel.read_exact(&mut self.table)?;
        decode_table(&self.table, raw_pages, &self.ram.layout, &mut self.runs)?;
        let (mut raw, mut zero_pages, mut delta_pages) = (Vec::<PageSlice<'_>>::new(), 0, 0);
        for (run, address) in &self.runs {
            let page_count = u64::from(run.page_count);
            match run.kind {
                RunKind::Raw => {
                    let bytes = bytes_of(run.page_count);
                    raw.push(self.ram.ram.get_slice(*address, bytes).map_err(failed)?);
                }
                RunKind::Zero => {
                    zero_pages += page_count;
                    let go_on = || !channel.is_cancelled();
                    clear_written(&self.ram, &mut self.written, run, &go_on)?;
                }
                RunKind::Delta => delta_pages += page_count,
            }
            if run.kind != RunKind::Delta {
                self.known.insert_run(run.first, page_count);
            }
        }
        match packing {
            Packing::None if raw.is_empty() => {}
            Packing::None => channel.read_pages(&raw)?,
            Packing::Zlib | Packing::Zstd => {
                let mut pages = self.decoding.packed(channel, packing, raw_pages)?;
                for slice in raw {
                    let (run, rest) = pages.split_at(slice.len());
                    slice.copy_from(run);
                    pages = rest;
                }
            }
        }
        // Last: what the frame zeroes as well has content now.
        for (run, _) in self.runs.iter().filter(|(run, _)| run.kind == RunKind::Raw) {
            self.written.insert_run(run.first, run.page_count.into());
        }
        if delta_pages > 0 {
            self.apply_deltas(channel)?;
        }
        self.tally.pages.raw_pages += u64::from(raw_pages);
        self.tally.pages.zero_pages += zero_pages;
        self.tally.pages.delta_pages += delta_pages;
        self.counters.update(|stats| {
            stats.normal_pages += u64::from(raw_pages);
            stats.zero_pages += zero_pages;
            stats.xbzrle.pages += delta_pages;
        });
        Ok(())
    }

    /// Receives deltas and applies them to their pages.
    fn apply_deltas(&mut self, channel: &Channel) -> Result<(), WireError> {
        let mut deltas = self.decoding.deltas(channel)?;
        for (run, _) in self.runs.iter().filter(|(run, _)| run.kind == RunKind::Delta) {
            for index in (run.first.0..run.first.0 + u64::from(run.page_count)).map(PageIndex) {
                if !self.known.contains(index) {
                    let reason = format!("a delta for page {}, which was never received", index.0);
                    return Err(WireError::Malformed { what: "page frame", reason });
                }
                let at = self.ram.layout.address_of(index).ok_or_else(|| outside(index))?;
                deltas.apply(&self.ram.ram.get_slice(at, PAGE_BYTES).map_err(failed)?)?;
            }
            self.written.insert_run(run.first, run.page_count.into());
        }
        deltas.finish()
    }

    /// Frames and pages received.
    pub fn tally(&self) -> Tally {
        self.tally
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> WireError {
    WireError::Lost(io::Error::other(error))
}

fn outside(page: PageIndex) -> WireError {
    let reason = format!("page {} is outside the guest's RAM", page.0);
    WireError::Malformed { what: "page frame", reason }
}

/// Pages that are zeroed between two looks at a cancel.
const ZEROED_AT_ONCE: usize = 512;

/// Zeroes the pages of `run` that have content. They have none then: a peer has no more zeroed than it has sent,
/// however often it asks.
fn clear_written(
    ram: &IncomingRam,
    written: &mut PageBitmap,
    run: &Run,
    go_on: &dyn Fn() -> bool,
) -> Result<(), WireError> {
    let end = run.first.0 + u64::from(run.page_count);
    for first in (run.first.0..end).step_by(ZEROED_AT_ONCE).map(PageIndex) {
        if !go_on() {
            return Err(WireError::Interrupted);
        }
        let count = (ZEROED_AT_ONCE as u64).min(end - first.0);
        for (first, count) in written.runs_among(first, count) {
            for page in (first.0..first.0 + count).map(PageIndex) {
                let at = ram.layout.address_of(page).ok_or_else(|| outside(page))?;
                ram.ram.write_slice(&ZEROES, at).map_err(failed)?;
            }
        }
        written.remove_run(first, count);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::frame::Run;
    use devices::ram::{GuestRam, RamLayout};
    use std::cell::Cell;
    use vm_memory::GuestMemoryBackend;

    #[test]
    fn zeroing_is_bounded_by_what_was_written_and_ends_with_a_cancel() {
        let layout = RamLayout::for_size(16 << 20).unwrap();
        let all = GuestRam::from_ranges(&[(vm_memory::GuestAddress(0), 16 << 20)]).unwrap();
        let mut written = PageBitmap::new(layout.page_count());
        written.insert_run(PageIndex(3), 2000);
        let ram = IncomingRam { ram: all, layout };
        let page_count = u32::try_from(ram.layout.page_count()).unwrap();
        let run = Run { first: PageIndex(0), page_count, kind: RunKind::Zero };
        let looks = Cell::new(0);
        let twice = || {
            looks.set(looks.get() + 1);
            looks.get() <= 2
        };
        let stopped = clear_written(&ram, &mut written, &run, &twice);
        assert!(matches!(stopped, Err(WireError::Interrupted)));
        // Two pieces of 512 pages are done, of which three pages were clean.
        assert_eq!(written.count(), 2000 - (2 * ZEROED_AT_ONCE as u64 - 3));
        clear_written(&ram, &mut written, &run, &|| true).unwrap();
        assert_eq!(written.count(), 0);
        // Nothing is left to be done, whatever is in memory.
        let at = ram.layout.address_of(PageIndex(5)).unwrap();
        ram.ram.write_slice(&[7; 4096], at).unwrap();
        clear_written(&ram, &mut written, &run, &|| true).unwrap();
        let mut page = [0; 4096];
        ram.ram.read_slice(&mut page, at).unwrap();
        assert!(ram.ram.num_regions() == 1 && page == [7; 4096]);
    }
}
