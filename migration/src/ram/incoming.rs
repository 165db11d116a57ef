//! Receives pages straight into guest RAM. Nothing that arrives is trusted.

use super::bitmap::PageBitmap;
use crate::guest::IncomingRam;
use crate::stats::Counters;
use crate::transport::Transport;
use crate::wire::{self, Decoder, Header, MAX_RAW_PAGES, MAX_RUNS, RUN_BYTES, WireError};
use devices::ram::{GuestAddress, PAGE_SIZE, PageIndex};
use std::sync::Arc;
use vm_memory::Bytes;

const PAGE_BYTES: usize = 4096;
const ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// The "ram" half of a destination.
pub struct RamIncoming {
    ram: IncomingRam,
    /// Pages that were ever written here: the others are zero already.
    received: PageBitmap,
    raw_pages: u64,
    zero_pages: u64,
    counters: Arc<Counters>,
}

fn malformed(reason: String) -> WireError {
    WireError::Malformed { what: "batch of pages", reason }
}

impl RamIncoming {
    /// Checks the announced size against the machine's.
    pub fn start(
        ram: IncomingRam,
        setup: &[u8],
        counters: Arc<Counters>,
    ) -> Result<Self, WireError> {
        let mut decoder = Decoder::new("RAM setup", setup);
        let (pages, page_bytes) = (decoder.u64()?, decoder.u32()?);
        let expected = ram.layout.page_count();
        if pages != expected || u64::from(page_bytes) != PAGE_SIZE {
            let reason = format!("{pages} pages of {page_bytes} bytes, the machine has {expected}");
            return Err(WireError::Malformed { what: "RAM setup", reason });
        }
        counters.update(|stats| stats.total_bytes = expected * PAGE_SIZE);
        let received = PageBitmap::new(expected);
        Ok(Self { ram, received, raw_pages: 0, zero_pages: 0, counters })
    }

    /// Receives one batch.
    pub fn batch(
        &mut self,
        header: Header,
        transport: &mut dyn Transport,
    ) -> Result<(), WireError> {
        let lost = |error, transport: &mut dyn Transport| WireError::from_io(error, transport);
        let mut counts = [0; 8];
        if header.len < 8 {
            return Err(malformed(format!("{} bytes", header.len)));
        }
        transport.read_exact(&mut counts).map_err(|error| lost(error, transport))?;
        let mut decoder = Decoder::new("batch of pages", &counts);
        let (run_count, raw_pages) = (decoder.u32()?, decoder.u32()?);
        let fits = run_count <= MAX_RUNS
            && raw_pages <= MAX_RAW_PAGES
            && header.len == 8 + run_count * RUN_BYTES + raw_pages * 4096;
        if !fits {
            let len = header.len;
            return Err(malformed(format!("{run_count} runs, {raw_pages} pages in {len} bytes")));
        }
        let mut table = vec![0; usize::try_from(run_count * RUN_BYTES).unwrap_or(0)];
        transport.read_exact(&mut table).map_err(|error| lost(error, transport))?;
        let mut decoder = Decoder::new("batch of pages", &table);
        let mut raw_left = u64::from(raw_pages);
        let mut zero_pages = 0;
        for _ in 0..run_count {
            let (first, count) = (PageIndex(decoder.u64()?), u64::from(decoder.u32()?));
            let address = self.ram.layout.run_address(first, count).ok_or_else(|| {
                malformed(format!("pages {}+{count} are outside the guest's RAM", first.0))
            })?;
            match decoder.u32()? {
                0 => {
                    self.zero(first, count)?;
                    zero_pages += count;
                }
                1 => {
                    raw_left = raw_left
                        .checked_sub(count)
                        .ok_or_else(|| malformed("more raw pages than announced".into()))?;
                    let len = usize::try_from(count).unwrap_or(0) * PAGE_BYTES;
                    transport
                        .read_pages(&self.ram.ram, address, len)
                        .map_err(|error| lost(error, transport))?;
                    for page in first.0..first.0 + count {
                        self.received.insert(PageIndex(page));
                    }
                }
                kind => return Err(malformed(format!("run of unknown kind {kind}"))),
            }
        }
        if raw_left != 0 {
            return Err(malformed(format!("{raw_left} raw pages belong to no run")));
        }
        self.raw_pages += u64::from(raw_pages);
        self.zero_pages += zero_pages;
        self.counters.update(|stats| {
            stats.transferred_bytes += u64::from(header.len) + 8;
            stats.normal_pages += u64::from(raw_pages);
            stats.zero_pages += zero_pages;
        });
        Ok(())
    }

    /// Pages that were never written are left alone: that keeps them out of memory.
    fn zero(&mut self, first: PageIndex, count: u64) -> Result<(), WireError> {
        for page in (first.0..first.0 + count).map(PageIndex) {
            if !self.received.contains(page) {
                continue;
            }
            let address = self.ram.layout.address_of(page).unwrap_or(GuestAddress(0));
            self.ram
                .ram
                .write_slice(&ZERO_PAGE, address)
                .map_err(|error| malformed(error.to_string()))?;
        }
        Ok(())
    }

    /// Compares counts with what the source says it sent.
    pub fn end(&self, payload: &[u8]) -> Result<(), WireError> {
        let mut decoder = Decoder::new("RAM end", payload);
        let theirs = (decoder.u64()?, decoder.u64()?);
        let ours = (self.raw_pages, self.zero_pages);
        if theirs != ours {
            let reason = format!("source sent {theirs:?} raw and zero pages, {ours:?} arrived");
            return Err(wire::WireError::Malformed { what: "RAM end", reason });
        }
        Ok(())
    }
}
