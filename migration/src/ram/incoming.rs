//! Receives pages straight into guest RAM. Runs on a data channel's own thread; what arrives is
//! checked against the machine's layout before a byte of guest RAM is touched.

use super::dirty::PageBitmap;
use super::frame::{FRAME_HEADER_BYTES, FrameHeader, RUN_BYTES, Run, RunKind, decode_table};
use super::shard::Tally;
use super::zero::PAGE_BYTES;
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

/// What a data channel has said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrived {
    /// Pages, which are in place now.
    Pages,
    /// A mark, to be echoed.
    Mark(u64),
    /// Nothing more will come.
    End,
}

/// The "ram" half of a destination, for one data channel.
pub struct RamIncoming {
    ram: IncomingRam,
    /// Pages that were ever written here: the others are zero already.
    written: PageBitmap,
    tally: Tally,
    counters: Arc<Counters>,
    table: Vec<u8>,
    runs: Vec<(Run, GuestAddress)>,
}

impl RamIncoming {
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
        let (written, tally) = (PageBitmap::new(expected), Tally::default());
        Ok(Self { ram, written, tally, counters, table, runs })
    }

    /// Receives one frame.
    pub fn receive(&mut self, channel: &Channel) -> Result<Arrived, WireError> {
        let mut header = [0; FRAME_HEADER_BYTES];
        channel.read_when_it_comes(&mut header)?;
        self.tally.frames += 1;
        match FrameHeader::decode(&header)? {
            FrameHeader::Pages { run_count, raw_pages } => {
                self.pages(channel, run_count, raw_pages)?;
                Ok(Arrived::Pages)
            }
            FrameHeader::Mark => {
                let mut number = [0; 8];
                channel.read_exact(&mut number)?;
                Ok(Arrived::Mark(Decoder::new("mark", &number).u64()?))
            }
            FrameHeader::End => Ok(Arrived::End),
        }
    }

    fn pages(
        &mut self,
        channel: &Channel,
        run_count: usize,
        raw_pages: u32,
    ) -> Result<(), WireError> {
        self.table.resize(run_count * RUN_BYTES, 0);
        channel.read_exact(&mut self.table)?;
        decode_table(&self.table, raw_pages, &self.ram.layout, &mut self.runs)?;
        let failed = |error| WireError::Lost(io::Error::other(error));
        let (mut pages, mut zero_pages): (Vec<PageSlice<'_>>, u64) = (Vec::new(), 0);
        for (run, address) in &self.runs {
            match run.kind {
                RunKind::Raw => {
                    let bytes = usize::try_from(run.page_count).unwrap_or(0) * PAGE_BYTES;
                    pages.push(self.ram.ram.get_slice(*address, bytes).map_err(failed)?);
                    self.written.insert_run(run.first, run.page_count.into());
                }
                RunKind::Zero => {
                    zero_pages += u64::from(run.page_count);
                    for (first, count) in self.written.runs_among(run.first, run.page_count.into())
                    {
                        for page in (first.0..first.0 + count).map(PageIndex) {
                            // Within `run`, which lies in RAM.
                            let Some(at) = self.ram.layout.address_of(page) else { continue };
                            self.ram.ram.write_slice(&ZEROES, at).map_err(failed)?;
                        }
                    }
                }
            }
        }
        if !pages.is_empty() {
            channel.read_pages(&pages)?;
        }
        self.tally.pages.raw_pages += u64::from(raw_pages);
        self.tally.pages.zero_pages += zero_pages;
        let bytes = FRAME_HEADER_BYTES + self.table.len();
        self.counters.update(|stats| {
            stats.transferred_bytes += bytes as u64 + u64::from(raw_pages) * PAGE_SIZE;
            stats.normal_pages += u64::from(raw_pages);
            stats.zero_pages += zero_pages;
        });
        Ok(())
    }

    /// Frames and pages that have come.
    pub fn tally(&self) -> Tally {
        self.tally
    }
}
