//! Unpacks compressed pages and applies deltas. Called by `page_receiver`, one instance per data channel.
//! Trusts nothing that arrives.

use super::compress::{Decompressor, Method};
use super::frame::{MAX_DELTA_BYTES, Packing};
use super::page::bytes_of;
use super::patch::PageWriter;
use super::xbzrle;
use crate::transport::{Channel, PageSlice};
use crate::wire::{Decoder, WireError};

const WHAT: &str = "page frame";

/// A channel's decoders and their buffers.
#[derive(Debug, Default)]
pub struct Decoding {
    zlib: Option<Decompressor>,
    zstd: Option<Decompressor>,
    arrived: Vec<u8>,
    pages: Vec<u8>,
}

fn malformed(reason: String) -> WireError {
    WireError::Malformed { what: WHAT, reason }
}

impl Decoding {
    /// Receives a byte count of at most `most`, then that many bytes.
    fn part(&mut self, channel: &Channel, most: usize, name: &str) -> Result<&[u8], WireError> {
        let mut count = [0; 4];
        channel.read_exact(&mut count)?;
        let bytes = Decoder::new(WHAT, &count).u32()?;
        let len = usize::try_from(bytes).ok().filter(|len| *len <= most);
        let len = len.ok_or_else(|| {
            malformed(format!("{bytes} bytes of {name}, at most {most} are possible"))
        })?;
        self.arrived.resize(len, 0);
        channel.read_exact(&mut self.arrived)?;
        Ok(&self.arrived)
    }

    /// Receives `raw_pages` packed pages.
    pub fn packed(
        &mut self,
        channel: &Channel,
        packing: Packing,
        raw_pages: u32,
    ) -> Result<&[u8], WireError> {
        let bytes = bytes_of(raw_pages);
        self.part(channel, bytes, "packed pages")?;
        let (slot, method) = match packing {
            Packing::Zstd => (&mut self.zstd, Method::Zstd { level: 1 }),
            Packing::Zlib | Packing::None => (&mut self.zlib, Method::Zlib { level: 1 }),
        };
        let unpacker = match slot {
            Some(unpacker) => unpacker,
            None => {
                let new =
                    Decompressor::new(method).map_err(|error| malformed(error.to_string()))?;
                slot.insert(new)
            }
        };
        self.pages.resize(bytes, 0);
        let unpacked = unpacker.decompress(&self.arrived, &mut self.pages);
        unpacked.map_err(|error| malformed(error.to_string()))?;
        Ok(&self.pages)
    }

    /// Receives the deltas of a frame's pages.
    pub fn deltas(&mut self, channel: &Channel) -> Result<Deltas<'_>, WireError> {
        let part = self.part(channel, MAX_DELTA_BYTES, "deltas")?;
        Ok(Deltas(Decoder::new(WHAT, part)))
    }
}

/// Deltas, one after the other.
#[derive(Debug)]
pub struct Deltas<'a>(Decoder<'a>);

impl Deltas<'_> {
    /// Applies the next one to `page` of guest RAM, which nobody else writes. Only what has changed is
    /// touched: of most pages that is little. After an error the page is a mixture of both versions.
    pub fn apply(&mut self, page: &PageSlice<'_>) -> Result<(), WireError> {
        let len = self.0.u16()?;
        let delta = self.0.raw(usize::from(len))?;
        let runs = PageWriter::with(page, |page| {
            xbzrle::changed_runs(delta, |offset, bytes| page.write(offset, bytes))
        });
        let whole = runs.ok_or_else(|| malformed("a delta for a part of a page".into()))?;
        whole.map_err(|error| malformed(error.to_string()))
    }

    /// Checks that none is left.
    pub fn finish(self) -> Result<(), WireError> {
        self.0.finish()
    }
}
