//! Frames of the disks' channels, and the two sections about them on the control connection. Pure: no I/O.
//!
//! ```text
//! header   kind u8 · packing u8 · disk u16 · payload bytes u32 · chunk u64 · data u64 · zero u64
//!  chunk   1       disk and chunk; bit n of `data`: granule n follows, bit n of `zero`: it is all zeroes;
//!                  packing 0: as it is, 1 zlib, 2 zstd: all its granules compressed as one piece
//!  mark    2       on every channel; chunk = number: answer when everything before it, on all channels, is
//!                  on stable storage
//!  end     3       on every channel; nothing more will come, unless the stop is called off
//!  flushed 4       answers a mark, on every channel; chunk = number, data = microseconds spent flushing
//!  alive   5       keep-alive on the first channel while the destination flushes
//!
//! Section "block"
//!  Setup   chunk bytes u32 · granule bytes u32 · disks u16, each: name str8 · bytes u64 · only top u8
//!  End     ends u32 · frames u64 · disks u16, each: data bytes u64 · zero bytes u64
//!          more than one end if a stop was called off; frames of all channels; bytes before they are packed
//! ```
//! The last granule of a disk may be shorter; the payload is as long as its granules together, or shorter if
//! it is packed. Packing is only used if both sides have the capability `disk-packing`.

use super::{CHUNK_BYTES, GRANULE_BYTES, MAX_DISKS};
use crate::ram::frame::Packing;
use crate::units::micros;
use crate::wire::{Decoder, Encoder, WireError};
use std::time::Duration;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 32;

/// Longest name of a disk: its length is one byte on the wire.
pub const MAX_NAME_BYTES: u64 = u8::MAX as u64;
/// [`CHUNK_BYTES`] and [`GRANULE_BYTES`], as announced.
const SIZES: [u32; 2] = [1 << 20, 1 << 14];
const _: () = assert!(SIZES[0] as u64 == CHUNK_BYTES && SIZES[1] as u64 == GRANULE_BYTES);

fn count_of<T>(disks: &[T]) -> Result<u16, WireError> {
    let found = disks.len() as u64;
    let count = u16::try_from(found).ok().filter(|count| *count <= MAX_DISKS);
    count.ok_or(WireError::TooLong { what: "list of disks", found, most: MAX_DISKS.into() })
}

/// Which granules of one chunk of one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Index of the disk in the announcement.
    pub disk: u16,
    /// Index of the chunk on the disk.
    pub index: u64,
    /// Granules in the payload.
    pub data: u64,
    /// Granules that are all zeroes.
    pub zero: u64,
    /// How the payload is compressed.
    pub packing: Packing,
}

/// A frame, without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// Part of a disk.
    Chunk(Chunk),
    /// Ends pass `n`.
    Mark(u64),
    /// Nothing more will come.
    End,
    /// Everything before mark `n` is on stable storage; flushing took this long.
    Flushed(u64, Duration),
    /// Keep-alive while flushing.
    Alive,
}

/// Bytes covered by the granules in `mask` of chunk `index`.
pub fn bytes_of(index: u64, mask: u64, disk_bytes: u64) -> u64 {
    let whole = u64::from(mask.count_ones()) * GRANULE_BYTES;
    let start = index * CHUNK_BYTES;
    let left = disk_bytes.saturating_sub(start).min(CHUNK_BYTES);
    let last = left.div_ceil(GRANULE_BYTES).max(1) - 1;
    if mask >> last & 1 == 1 { whole + left - (last + 1) * GRANULE_BYTES } else { whole }
}

/// The granules of chunk `index` that lie within a disk of `disk_bytes`.
pub fn granules_of(index: u64, disk_bytes: u64) -> u64 {
    let start = index.saturating_mul(CHUNK_BYTES);
    let left = disk_bytes.saturating_sub(start).min(CHUNK_BYTES);
    match left.div_ceil(GRANULE_BYTES) {
        0 => 0,
        count => u64::MAX >> (64 - count),
    }
}

/// Runs of granules in `mask`: first and count.
pub fn runs(mut mask: u64) -> impl Iterator<Item = (u32, u32)> {
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let first = mask.trailing_zeros();
        let count = (mask >> first).trailing_ones();
        let run = u64::MAX >> (64 - count) << first;
        mask &= !run;
        Some((first, count))
    })
}

impl Frame {
    /// The header; `payload_bytes` follow it.
    pub fn encode(self, payload_bytes: u32) -> [u8; HEADER_BYTES] {
        let (mut packing, mut disk) = (Packing::None, 0);
        let (kind, chunk, data, zero) = match self {
            Self::Chunk(chunk) => {
                (packing, disk) = (chunk.packing, chunk.disk);
                (1, chunk.index, chunk.data, chunk.zero)
            }
            Self::Mark(number) => (2, number, 0, 0),
            Self::End => (3, 0, 0, 0),
            Self::Flushed(number, flush) => (4, number, micros(flush), 0),
            Self::Alive => (5, 0, 0, 0),
        };
        let mut encoder = Encoder::default();
        encoder
            .u8(kind)
            .u8(packing as u8)
            .u16(disk)
            .u32(payload_bytes)
            .u64(chunk)
            .u64(data)
            .u64(zero);
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(encoder.bytes());
        bytes
    }

    /// Reads a header. Checks that a chunk has granules, none of them twice, and no more payload than they
    /// can hold; less, if it is packed.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<(Self, u32), WireError> {
        let mut decoder = Decoder::new("disk frame", bytes);
        let (kind, packing, disk) = (decoder.u8()?, decoder.u8()?, decoder.u16()?);
        let (payload, chunk) = (decoder.u32()?, decoder.u64()?);
        let (data, zero) = (decoder.u64()?, decoder.u64()?);
        let plain = (disk, payload, data, zero) == (0, 0, 0, 0);
        let packing = match (kind, packing) {
            (_, 0) => Packing::None,
            (1, 1) => Packing::Zlib,
            (1, 2) => Packing::Zstd,
            _ => return Err(decoder.malformed(format!("header {bytes:02x?}"))),
        };
        let frame = match kind {
            1 => Self::Chunk(Chunk { disk, index: chunk, data, zero, packing }),
            2 if plain => Self::Mark(chunk),
            3 if plain && chunk == 0 => Self::End,
            4 if (disk, payload, zero) == (0, 0, 0) => {
                Self::Flushed(chunk, Duration::from_micros(data))
            }
            5 if plain && chunk == 0 => Self::Alive,
            _ => return Err(decoder.malformed(format!("header {bytes:02x?}"))),
        };
        if let Self::Chunk(chunk) = frame {
            if chunk.data & chunk.zero != 0 || chunk.data | chunk.zero == 0 {
                return Err(decoder.malformed("a chunk with no granules, or with one twice"));
            }
            let most = u64::from(chunk.data.count_ones()) * GRANULE_BYTES;
            let fits = match chunk.packing {
                Packing::None => u64::from(payload) <= most,
                Packing::Zlib | Packing::Zstd => (1..most).contains(&u64::from(payload)),
            };
            if !fits {
                return Err(decoder.malformed(format!("{payload} bytes for its granules")));
            }
        }
        Ok((frame, payload))
    }
}

/// A disk, as announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSetup {
    pub name: String,
    pub len_bytes: u64,
    /// Send only the top layer, without the backing file.
    pub only_top: bool,
}

/// Announces the disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockSetup {
    /// By index.
    pub disks: Vec<DiskSetup>,
}

impl BlockSetup {
    /// Encodes the section's body.
    ///
    /// # Errors
    /// [`WireError::TooLong`] for too many disks, or a name of more than [`MAX_NAME_BYTES`].
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut encoder = Encoder::default();
        let [chunk, granule] = SIZES;
        encoder.u32(chunk).u32(granule).u16(count_of(&self.disks)?);
        for disk in &self.disks {
            let found = disk.name.len() as u64;
            if found > MAX_NAME_BYTES {
                return Err(WireError::TooLong { what: "disk name", found, most: MAX_NAME_BYTES });
            }
            encoder.str8(&disk.name).u64(disk.len_bytes).u8(disk.only_top.into());
        }
        Ok(encoder.bytes().to_vec())
    }

    /// Decodes a section's body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut decoder = Decoder::new("setup of the disks", body);
        let (chunk, granule, count) = (decoder.u32()?, decoder.u32()?, decoder.u16()?);
        if (u64::from(chunk), u64::from(granule)) != (CHUNK_BYTES, GRANULE_BYTES) {
            return Err(decoder.malformed(format!("chunks of {chunk} with granules of {granule}")));
        }
        if count == 0 || count > MAX_DISKS {
            return Err(decoder.malformed(format!("{count} disks, 1 to {MAX_DISKS} are possible")));
        }
        let mut disks = Vec::new();
        for _ in 0..count {
            let (name, len_bytes) = (decoder.str8()?.to_owned(), decoder.u64()?);
            let only_top = match decoder.u8()? {
                0 => false,
                1 => true,
                other => return Err(decoder.malformed(format!("disk {name:?}: mode {other}"))),
            };
            disks.push(DiskSetup { name, len_bytes, only_top });
        }
        decoder.finish()?;
        Ok(Self { disks })
    }
}

/// Bytes that the first pass sends of each disk: holes do not count. For reports. Follows the setup, if both
/// sides can do `disk-data`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskData(pub Vec<u64>);

impl DiskData {
    /// Encodes the section's body.
    ///
    /// # Errors
    /// [`WireError::TooLong`] for too many disks.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut encoder = Encoder::default();
        encoder.u16(count_of(&self.0)?);
        for bytes in &self.0 {
            encoder.u64(*bytes);
        }
        Ok(encoder.bytes().to_vec())
    }

    /// Decodes a section's body, for disks of these lengths.
    pub fn decode(body: &[u8], lens: &[u64]) -> Result<Self, WireError> {
        let mut decoder = Decoder::new("data of the disks", body);
        let count = usize::from(decoder.u16()?);
        if count != lens.len() {
            return Err(decoder.malformed(format!("{count} disks instead of {}", lens.len())));
        }
        let mut data = Vec::new();
        for len in lens {
            let bytes = decoder.u64()?;
            if bytes > *len {
                return Err(decoder.malformed(format!("{bytes} bytes in a disk of {len}")));
            }
            data.push(bytes);
        }
        decoder.finish()?;
        Ok(Self(data))
    }
}

/// Bytes sent of one disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskTotals {
    /// Bytes sent as data.
    pub data_bytes: u64,
    /// Bytes of zeroes.
    pub zero_bytes: u64,
}

/// Bytes sent of all disks. Each side keeps its own count.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockTotals {
    /// Ends sent so far.
    pub ends: u32,
    /// Frames of any kind, the last included.
    pub frames: u64,
    pub disks: Vec<DiskTotals>,
}

impl BlockTotals {
    /// Encodes the section's body.
    ///
    /// # Errors
    /// [`WireError::TooLong`] for too many disks.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut encoder = Encoder::default();
        encoder.u32(self.ends).u64(self.frames).u16(count_of(&self.disks)?);
        for disk in &self.disks {
            encoder.u64(disk.data_bytes).u64(disk.zero_bytes);
        }
        Ok(encoder.bytes().to_vec())
    }

    /// Decodes a section's body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut decoder = Decoder::new("end of the disks", body);
        let (ends, frames, count) = (decoder.u32()?, decoder.u64()?, decoder.u16()?);
        if count > MAX_DISKS {
            return Err(decoder.malformed(format!("{count} disks")));
        }
        let mut disks = Vec::new();
        for _ in 0..count {
            disks.push(DiskTotals { data_bytes: decoder.u64()?, zero_bytes: decoder.u64()? });
        }
        decoder.finish()?;
        Ok(Self { ends, frames, disks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> impl Strategy<Value = (Frame, u32)> {
        let packing = prop::sample::select(vec![Packing::None, Packing::Zlib, Packing::Zstd]);
        let chunk = (any::<(u16, u64, u64, u64)>(), any::<u32>(), packing).prop_map(
            |((disk, index, data, zero), payload, packing)| {
                let (data, zero) = (data | 1, zero & !(data | 1));
                let most = data.count_ones() * u32::try_from(GRANULE_BYTES).unwrap();
                let chunk = Frame::Chunk(Chunk { disk, index, data, zero, packing });
                match packing {
                    Packing::None => (chunk, payload % (most + 1)),
                    Packing::Zlib | Packing::Zstd => (chunk, 1 + payload % (most - 1)),
                }
            },
        );
        let flushed = any::<(u64, u32)>().prop_map(|(number, micros)| {
            (Frame::Flushed(number, Duration::from_micros(micros.into())), 0)
        });
        prop_oneof![
            chunk,
            any::<u64>().prop_map(|number| (Frame::Mark(number), 0)),
            Just((Frame::End, 0)),
            Just((Frame::Alive, 0)),
            flushed
        ]
    }

    proptest! {
        #[test]
        fn frames_read_back_as_written(frame in frames()) {
            prop_assert_eq!(Frame::decode(&frame.0.encode(frame.1)).unwrap(), frame);
        }

        #[test]
        fn arbitrary_headers_never_panic(bytes in any::<[u8; HEADER_BYTES]>(), kind in 0u8..7) {
            let mut bytes = bytes;
            bytes[0] = kind;
            let _ = Frame::decode(&bytes);
            bytes[1] = 0;
            if let Ok((frame, payload)) = Frame::decode(&bytes) {
                prop_assert_eq!(frame.encode(payload), bytes);
            }
        }

        #[test]
        fn sections_read_back_and_arbitrary_ones_never_panic(
            names in prop::collection::vec(("[a-z]{0,60}", any::<u64>(), any::<bool>()), 1..=64),
            frames in any::<u64>(),
            bytes in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let disks: Vec<_> = names
                .into_iter()
                .map(|(name, len_bytes, only_top)| DiskSetup { name, len_bytes, only_top })
                .collect();
            let one = |disk: &DiskSetup| DiskTotals { data_bytes: disk.len_bytes, zero_bytes: 7 };
            let totals = BlockTotals { ends: 1, frames, disks: disks.iter().map(one).collect() };
            let lens: Vec<_> = disks.iter().map(|disk| disk.len_bytes).collect();
            let data = DiskData(lens.iter().map(|len| len / 3).collect());
            prop_assert_eq!(DiskData::decode(&data.encode().unwrap(), &lens).unwrap(), data);
            let _ = DiskData::decode(&bytes, &lens);
            let setup = BlockSetup { disks };
            prop_assert_eq!(BlockSetup::decode(&setup.encode().unwrap()).unwrap(), setup);
            prop_assert_eq!(BlockTotals::decode(&totals.encode().unwrap()).unwrap(), totals);
            let _ = (BlockSetup::decode(&bytes), BlockTotals::decode(&bytes));
        }

        #[test]
        fn data_is_never_more_than_its_disk(lens in prop::collection::vec(0..u64::MAX, 1..4)) {
            let last = lens.len() - 1;
            let mut data = lens.clone();
            prop_assert!(DiskData::decode(&DiskData(data.clone()).encode().unwrap(), &lens).is_ok());
            prop_assert!(DiskData::decode(&DiskData(data.clone()).encode().unwrap(), &lens[1..]).is_err());
            data[last] += 1;
            prop_assert!(DiskData::decode(&DiskData(data).encode().unwrap(), &lens).is_err());
        }

        #[test]
        fn runs_are_the_bits_of_a_mask(mask in any::<u64>()) {
            let mut back = 0u64;
            let mut end = 0;
            for (first, count) in runs(mask) {
                prop_assert!(count > 0 && (first > end || back == 0));
                for bit in first..first + count {
                    back |= 1 << bit;
                }
                end = first + count;
            }
            prop_assert_eq!(back, mask);
        }

        #[test]
        fn granules_of_all_chunks_are_the_disk(sectors in 1u64..20_000) {
            let len = sectors * 512;
            let sum: u64 = (0..len.div_ceil(CHUNK_BYTES))
                .map(|index| bytes_of(index, granules_of(index, len), len))
                .sum();
            prop_assert_eq!(sum, len);
            prop_assert_eq!(granules_of(len.div_ceil(CHUNK_BYTES), len), 0);
            prop_assert_eq!(granules_of(u64::MAX, len), 0);
        }
    }
}
