//! The bodies of the sections. Pure: no I/O.
//!
//! ```text
//! Setup     count u16 · each: disk str8 · name str8 · flags u8 (1 recording, 2 persistent)
//!           · granularity shift u8 · bytes of the disk u64
//! End       empty
//! Postcopy  1 · bitmap u16 · offset u64 · words                a chunk
//!           2 · bitmap u16 · offset u64 · length u64           a chunk that is clean
//!           3 · bitmap u16 · marked granules in all u64        the end of a bitmap
//! ```
//! Disks and bitmaps have the names that the source gives them on the wire. Offsets and lengths are in bytes
//! of the bitmap.

use super::MAX_BITMAPS;
use crate::wire::{Decoder, Encoder, WireError};
use devices::block::bitmap::{Chunk, Content};

const RECORDING: u8 = 1;
const PERSISTENT: u8 = 2;
const DATA: u8 = 1;
const ZERO: u8 = 2;
const COMPLETE: u8 = 3;

/// Announces a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announced {
    /// Its disk.
    pub disk: String,
    pub name: String,
    pub recording: bool,
    pub persistent: bool,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// Of the disk.
    pub len_bytes: u64,
}

/// Body of the setup. Names are at most 255 bytes long, and there are at most [`MAX_BITMAPS`].
pub fn encode_setup(all: &[Announced]) -> Vec<u8> {
    let mut encoder = Encoder::default();
    encoder.u16(u16::try_from(all.len()).unwrap_or(u16::MAX));
    for one in all {
        let recording = if one.recording { RECORDING } else { 0 };
        let persistent = if one.persistent { PERSISTENT } else { 0 };
        let shift = u8::try_from(one.granularity.trailing_zeros()).unwrap_or(u8::MAX);
        encoder.str8(&one.disk).str8(&one.name);
        encoder.u8(recording | persistent).u8(shift).u64(one.len_bytes);
    }
    encoder.bytes().to_vec()
}

/// Reads the body of a setup.
pub fn decode_setup(body: &[u8]) -> Result<Vec<Announced>, WireError> {
    let mut decoder = Decoder::new("dirty-bitmap setup", body);
    let count = decoder.u16()?;
    if count == 0 || count > MAX_BITMAPS {
        return Err(decoder.malformed(format!("{count} bitmaps, 1 to {MAX_BITMAPS} are possible")));
    }
    let mut all = Vec::new();
    for _ in 0..count {
        let (disk, name) = (decoder.str8()?.to_owned(), decoder.str8()?.to_owned());
        let (flags, shift, len_bytes) = (decoder.u8()?, decoder.u8()?, decoder.u64()?);
        if flags & !(RECORDING | PERSISTENT) != 0 {
            return Err(decoder.malformed(format!("bitmap {name:?} has unknown flags {flags:#x}")));
        }
        let granularity = 1u64.checked_shl(shift.into()).ok_or_else(|| {
            decoder.malformed(format!("bitmap {name:?} has a granularity of 2^{shift} bytes"))
        })?;
        let (recording, persistent) = (flags & RECORDING != 0, flags & PERSISTENT != 0);
        all.push(Announced { disk, name, recording, persistent, granularity, len_bytes });
    }
    decoder.finish()?;
    Ok(all)
}

/// What comes after the handover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Part of a bitmap's contents.
    Chunk { bitmap: u16, chunk: Chunk },
    /// The bitmap's contents are complete.
    Complete {
        bitmap: u16,
        /// How many granules all its chunks have marked.
        granules: u64,
    },
}

impl Piece {
    /// Which bitmap it belongs to, in the order of the setup.
    pub fn bitmap(&self) -> u16 {
        match self {
            Self::Chunk { bitmap, .. } | Self::Complete { bitmap, .. } => *bitmap,
        }
    }

    /// The body of a section.
    pub fn encode(&self) -> Vec<u8> {
        let mut encoder = Encoder::default();
        match self {
            Self::Chunk { bitmap, chunk: Chunk { offset_bytes, content } } => match content {
                Content::Data(words) => encoder.u8(DATA).u16(*bitmap).u64(*offset_bytes).raw(words),
                Content::Zero(len) => encoder.u8(ZERO).u16(*bitmap).u64(*offset_bytes).u64(*len),
            },
            Self::Complete { bitmap, granules } => encoder.u8(COMPLETE).u16(*bitmap).u64(*granules),
        };
        encoder.bytes().to_vec()
    }

    /// Reads the body of a section.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut decoder = Decoder::new("piece of a dirty bitmap", body);
        let (kind, bitmap) = (decoder.u8()?, decoder.u16()?);
        let number = decoder.u64()?;
        let content = match kind {
            DATA => Content::Data(decoder.rest().to_vec()),
            ZERO => {
                let len = decoder.u64()?;
                decoder.finish()?;
                Content::Zero(len)
            }
            COMPLETE => {
                decoder.finish()?;
                return Ok(Self::Complete { bitmap, granules: number });
            }
            other => return Err(decoder.malformed(format!("unknown kind {other}"))),
        };
        Ok(Self::Chunk { bitmap, chunk: Chunk { offset_bytes: number, content } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn announced() -> impl Strategy<Value = Announced> {
        let names = ("[a-z0-9é]{0,100}", "\\PC{0,60}");
        (names, any::<(bool, bool)>(), 0u32..64, any::<u64>()).prop_map(
            |((disk, name), (recording, persistent), shift, len_bytes)| {
                let granularity = 1 << shift;
                Announced { disk, name, recording, persistent, granularity, len_bytes }
            },
        )
    }

    fn piece() -> impl Strategy<Value = Piece> {
        let chunk = |content| {
            (any::<u16>(), any::<u64>(), content).prop_map(|(bitmap, offset_bytes, content)| {
                Piece::Chunk { bitmap, chunk: Chunk { offset_bytes, content } }
            })
        };
        let content = prop_oneof![
            any::<u64>().prop_map(Content::Zero),
            prop::collection::vec(any::<u8>(), 0..100).prop_map(Content::Data),
        ];
        let complete =
            any::<(u16, u64)>().prop_map(|(bitmap, granules)| Piece::Complete { bitmap, granules });
        prop_oneof![chunk(content), complete]
    }

    proptest! {
        #[test]
        fn what_is_announced_reads_back(all in prop::collection::vec(announced(), 1..20)) {
            prop_assert_eq!(decode_setup(&encode_setup(&all)).unwrap(), all);
        }

        #[test]
        fn pieces_read_back(piece in piece()) {
            prop_assert_eq!(Piece::decode(&piece.encode()).unwrap(), piece);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = (decode_setup(&bytes), Piece::decode(&bytes));
        }
    }

    #[test]
    fn what_is_reserved_or_too_much_is_refused_by_name() {
        let one = Announced {
            disk: "root".into(),
            name: "daily".into(),
            recording: true,
            persistent: true,
            granularity: 1 << 16,
            len_bytes: 1 << 30,
        };
        let good = encode_setup(std::slice::from_ref(&one));
        let flags = 2 + 5 + 6;
        let error = |at: usize, byte: u8| {
            let mut body = good.clone();
            body[at] = byte;
            decode_setup(&body).unwrap_err().to_string()
        };
        assert!(error(flags, 4).contains("bitmap \"daily\" has unknown flags 0x4"));
        assert!(error(flags + 1, 64).contains("a granularity of 2^64 bytes"));
        assert!(error(0, 0).contains("0 bitmaps"));
        assert!(error(1, 0x10).contains("4097 bitmaps, 1 to 4096 are possible"));
        assert!(decode_setup(&good[..good.len() - 1]).is_err());
    }
}
