//! Sections: named, versioned payloads of frames on the control connection. A bad one cannot desynchronise
//! its neighbours, and an unknown one is refused by name. Pure: no I/O.
//!
//! ```text
//! Section   stage u8 · version u16 · name str8 · body
//! ram       Setup  page count u64 · page bytes u32 · data channels u16
//!           End    ends u32 · raw, zero, delta pages u64 · data channels u16 · frames u64 per channel
//!                  all that was sent since Setup; more than one end if a stop was called off
//! device    Full   JSON array of DeviceRecord: at most 64, each with a state of at most 512 KiB
//! block     Setup, End: see `block::frame`; boot: see `boot::frame`
//! Eof       guest runs u8 · attempt u32
//! Ready     attempt u32
//! ```

use super::{Decoder, Encoder, WireError};
use std::iter::Sum;

/// When a section comes in the lifecycle of its participant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// The announcement; from the destination, which part of it is wanted.
    Setup = 1,
    /// Data, while the guest runs.
    Part = 2,
    /// The end of the data.
    End = 3,
    /// Everything in one section.
    Full = 4,
    /// Data that could wait: the guest runs at the destination.
    Postcopy = 5,
}

/// A section, its body not yet read.
#[derive(Debug, PartialEq, Eq)]
pub struct Section<'a> {
    /// When it comes.
    pub stage: Stage,
    /// Version of the body's layout.
    pub version: u16,
    /// Name of the participant.
    pub name: &'a str,
    /// In the participant's own layout.
    pub body: &'a [u8],
}

/// Version of the bodies that this build writes and reads.
pub const BODY_VERSION: u16 = 1;

impl<'a> Section<'a> {
    /// Stage and name, for error messages.
    pub fn describe(&self) -> String {
        format!("{:?} of section {:?}", self.stage, self.name)
    }

    /// The payload of a Section frame.
    pub fn encode(stage: Stage, name: &str, body: &[u8]) -> Vec<u8> {
        let mut encoder = Encoder::default();
        encoder.u8(stage as u8).u16(BODY_VERSION).str8(name).raw(body);
        encoder.bytes().to_vec()
    }

    /// Reads the payload of a Section frame.
    pub fn decode(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut decoder = Decoder::new("section", payload);
        let stage = match decoder.u8()? {
            1 => Stage::Setup,
            2 => Stage::Part,
            3 => Stage::End,
            4 => Stage::Full,
            5 => Stage::Postcopy,
            other => return Err(decoder.malformed(format!("unknown stage {other}"))),
        };
        let version = decoder.u16()?;
        let name = decoder.str8()?;
        Ok(Self { stage, version, name, body: decoder.rest() })
    }
}

/// Announces RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamSetup {
    /// Pages in all blocks.
    pub page_count: u64,
    /// Bytes in a page.
    pub page_bytes: u32,
    /// Number of data channels.
    pub data_channels: u16,
}

impl RamSetup {
    /// Encodes the section's body.
    pub fn encode(self) -> Vec<u8> {
        let mut encoder = Encoder::default();
        encoder.u64(self.page_count).u32(self.page_bytes).u16(self.data_channels);
        encoder.bytes().to_vec()
    }

    /// Decodes a section's body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut decoder = Decoder::new("RAM setup", body);
        let setup = Self {
            page_count: decoder.u64()?,
            page_bytes: decoder.u32()?,
            data_channels: decoder.u16()?,
        };
        decoder.finish()?;
        Ok(setup)
    }
}

/// Pages sent. Each side keeps its own count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RamTotals {
    /// Pages sent raw or compressed.
    pub raw_pages: u64,
    /// Pages of zeroes.
    pub zero_pages: u64,
    /// Pages sent as deltas.
    pub delta_pages: u64,
}

impl Sum for RamTotals {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            raw_pages: sum.raw_pages + one.raw_pages,
            zero_pages: sum.zero_pages + one.zero_pages,
            delta_pages: sum.delta_pages + one.delta_pages,
        })
    }
}

/// Ends RAM: totals since the setup.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RamEnd {
    /// Which end of the data channels this is, counted from 1.
    pub number: u32,
    /// Pages on all channels.
    pub totals: RamTotals,
    /// Frames per data channel, the last one included.
    pub frames: Vec<u64>,
}

impl RamEnd {
    /// Encodes the section's body.
    ///
    /// # Errors
    /// [`WireError::TooLong`] for more than [`MAX_DATA_CHANNELS`] channels.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let found = self.frames.len() as u64;
        let (what, most) = ("list of data channels", MAX_DATA_CHANNELS);
        let channels = u16::try_from(found).ok().filter(|channels| *channels <= most);
        let channels = channels.ok_or(WireError::TooLong { what, found, most: most.into() })?;
        let mut encoder = Encoder::default();
        let RamTotals { raw_pages, zero_pages, delta_pages } = self.totals;
        encoder.u32(self.number).u64(raw_pages).u64(zero_pages).u64(delta_pages);
        encoder.u16(channels);
        for frames in &self.frames {
            encoder.u64(*frames);
        }
        Ok(encoder.bytes().to_vec())
    }

    /// Decodes a section's body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut decoder = Decoder::new("RAM end", body);
        let number = decoder.u32()?;
        let totals = RamTotals {
            raw_pages: decoder.u64()?,
            zero_pages: decoder.u64()?,
            delta_pages: decoder.u64()?,
        };
        let channels = decoder.u16()?;
        if channels > MAX_DATA_CHANNELS {
            return Err(decoder.malformed(format!("{channels} data channels")));
        }
        let frames = (0..channels).map(|_| decoder.u64()).collect::<Result<_, _>>()?;
        decoder.finish()?;
        Ok(Self { number, totals, frames })
    }
}

/// Most data channels of a migration.
pub const MAX_DATA_CHANNELS: u16 = 16;

/// Ends what is sent with the guest stopped: whether the guest ran, and which attempt this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Eof {
    /// False for a guest that its user had paused.
    pub running: bool,
    /// Counted from 1; more than one if a stop was called off.
    pub attempt: u32,
}

impl Eof {
    /// The payload of an Eof frame.
    pub fn encode(self) -> Vec<u8> {
        let mut encoder = Encoder::default();
        encoder.u8(self.running.into()).u32(self.attempt);
        encoder.bytes().to_vec()
    }

    /// Reads the payload of an Eof frame.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut decoder = Decoder::new("end of the stream", payload);
        let running = match decoder.u8()? {
            0 => false,
            1 => true,
            other => return Err(decoder.malformed(format!("run state {other}"))),
        };
        let attempt = decoder.u32()?;
        decoder.finish()?;
        Ok(Self { running, attempt })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn everything_reads_back_as_written(
            numbers in any::<(u64, u32, u16)>(),
            body in prop::collection::vec(any::<u8>(), 0..50),
            name in "[a-z]{0,255}",
            frames in prop::collection::vec(any::<u64>(), 0..=16),
        ) {
            let payload = Section::encode(Stage::Full, &name, &body);
            let section = Section { stage: Stage::Full, version: 1, name: &name, body: &body };
            prop_assert_eq!(Section::decode(&payload).unwrap(), section);
            let (page_count, page_bytes, data_channels) = numbers;
            let setup = RamSetup { page_count, page_bytes, data_channels };
            prop_assert_eq!(RamSetup::decode(&setup.encode()).unwrap(), setup);
            let totals = RamTotals { raw_pages: page_count, zero_pages: 3, delta_pages: 4 };
            let end = RamEnd { number: 2, totals, frames };
            prop_assert_eq!(RamEnd::decode(&end.encode().unwrap()).unwrap(), end);
            let eof = Eof { running: page_bytes & 1 == 1, attempt: page_bytes };
            prop_assert_eq!(Eof::decode(&eof.encode()).unwrap(), eof);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = (Section::decode(&bytes), RamSetup::decode(&bytes));
            let _ = (RamEnd::decode(&bytes), Eof::decode(&bytes));
        }
    }
}
