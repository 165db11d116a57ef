//! Bodies of the sections "boot", byte by byte. Pure: no I/O.
//!
//! ```text
//! Setup ─▶  files u8, each: role u8 · bytes u64 · sha256, 32 bytes · arguments: bytes u16, text
//!       ◀─  wanted files u8, each: number u8
//! Part  ─▶  file u8 · offset u64 · bytes
//!       ◀─  bytes written u64
//! End   ─▶  bytes sent u64
//! ```

use super::{FileRole, Identity, MAX_ARGUMENT_BYTES, MAX_FILES, PIECE_BYTES};
use crate::wire::{Decoder, Encoder, WireError};

/// Encodes the announcement of boot files.
pub fn encode_setup(identities: &[Identity]) -> Result<Vec<u8>, WireError> {
    let mut encoder = Encoder::default();
    let too_many = |found: usize, what, most: u64| {
        let found = found as u64;
        WireError::TooLong { what, found, most }
    };
    let count = u8::try_from(identities.len()).ok().filter(|count| *count <= MAX_FILES);
    let files = || too_many(identities.len(), "list of boot files", MAX_FILES.into());
    encoder.u8(count.ok_or_else(files)?);
    for identity in identities {
        let arguments = identity.arguments.as_bytes();
        let len = u16::try_from(arguments.len())
            .map_err(|_| too_many(arguments.len(), "argument string", MAX_ARGUMENT_BYTES.into()))?;
        encoder.u8(identity.role as u8).u64(identity.len_bytes).raw(&identity.sha256);
        encoder.u16(len).raw(arguments);
    }
    Ok(encoder.bytes().to_vec())
}

/// Decodes the announcement.
pub fn decode_setup(body: &[u8]) -> Result<Vec<Identity>, WireError> {
    let mut decoder = Decoder::new("boot setup", body);
    let count = decoder.u8()?;
    if count > MAX_FILES {
        return Err(decoder.malformed(format!("{count} files")));
    }
    let mut identities = Vec::with_capacity(count.into());
    for _ in 0..count {
        let role = match decoder.u8()? {
            1 => FileRole::Kernel,
            2 => FileRole::Initrd,
            3 => FileRole::Module,
            other => return Err(decoder.malformed(format!("unknown role {other}"))),
        };
        let (len_bytes, sha256) = (decoder.u64()?, decoder.array()?);
        let len = decoder.u16()?;
        let arguments = decoder.raw(len.into())?;
        let arguments = std::str::from_utf8(arguments)
            .map_err(|_| decoder.malformed("arguments are not UTF-8"))?
            .to_owned();
        identities.push(Identity { role, len_bytes, sha256, arguments });
    }
    decoder.finish()?;
    Ok(identities)
}

/// Encodes the list of wanted files.
pub fn encode_wanted(wanted: &[usize]) -> Result<Vec<u8>, WireError> {
    let mut encoder = Encoder::default();
    let numbers: Result<Vec<u8>, _> = wanted.iter().map(|file| u8::try_from(*file)).collect();
    let most = u64::from(MAX_FILES);
    let too_many =
        || WireError::TooLong { what: "list of wanted files", found: wanted.len() as u64, most };
    let numbers = numbers.map_err(|_| too_many())?;
    encoder.u8(u8::try_from(numbers.len()).map_err(|_| too_many())?).raw(&numbers);
    Ok(encoder.bytes().to_vec())
}

/// Decodes which of `count` files are wanted, each at most once.
pub fn decode_wanted(body: &[u8], count: usize) -> Result<Vec<usize>, WireError> {
    let mut decoder = Decoder::new("wanted boot files", body);
    let len = decoder.u8()?;
    let mut wanted: Vec<usize> = Vec::new();
    for _ in 0..len {
        let file = usize::from(decoder.u8()?);
        if file >= count || wanted.contains(&file) {
            return Err(decoder.malformed(format!("file {file} of {count}, or twice")));
        }
        wanted.push(file);
    }
    decoder.finish()?;
    Ok(wanted)
}

/// A piece of a file.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    pub file: u8,
    /// Offset of the piece in the file.
    pub offset_bytes: u64,
    pub bytes: &'a [u8],
}

impl<'a> Piece<'a> {
    /// Encodes the section's body.
    pub fn encode(&self) -> Vec<u8> {
        let mut encoder = Encoder::default();
        encoder.u8(self.file).u64(self.offset_bytes).raw(self.bytes);
        encoder.bytes().to_vec()
    }

    /// Decodes a section's body.
    pub fn decode(body: &'a [u8]) -> Result<Self, WireError> {
        let mut decoder = Decoder::new("boot piece", body);
        let (file, offset_bytes) = (decoder.u8()?, decoder.u64()?);
        let bytes = decoder.rest();
        let (found, most) = (bytes.len() as u64, u64::from(PIECE_BYTES));
        if found > most {
            return Err(WireError::TooLong { what: "boot piece", found, most });
        }
        Ok(Self { file, offset_bytes, bytes })
    }
}

/// Encodes a byte count: written so far, or sent in all.
pub fn encode_bytes(bytes: u64) -> Vec<u8> {
    Encoder::default().u64(bytes).bytes().to_vec()
}

/// Decodes a byte count.
pub fn decode_bytes(body: &[u8]) -> Result<u64, WireError> {
    let mut decoder = Decoder::new("number of boot bytes", body);
    let bytes = decoder.u64()?;
    decoder.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn identity() -> impl Strategy<Value = Identity> {
        let role =
            prop_oneof![Just(FileRole::Kernel), Just(FileRole::Initrd), Just(FileRole::Module)];
        (role, any::<u64>(), any::<[u8; 32]>(), ".{0,40}").prop_map(
            |(role, len_bytes, sha256, arguments)| Identity { role, len_bytes, sha256, arguments },
        )
    }

    proptest! {
        #[test]
        fn everything_reads_back_as_written(
            identities in prop::collection::vec(identity(), 0..=64),
            bytes in prop::collection::vec(any::<u8>(), 0..100),
            numbers in any::<(u8, u64)>(),
        ) {
            let setup = encode_setup(&identities).unwrap();
            prop_assert_eq!(decode_setup(&setup).unwrap(), identities.clone());
            let wanted: Vec<usize> = (0..identities.len()).step_by(2).collect();
            let body = encode_wanted(&wanted).unwrap();
            prop_assert_eq!(decode_wanted(&body, identities.len()).unwrap(), wanted);
            let piece = Piece { file: numbers.0, offset_bytes: numbers.1, bytes: &bytes };
            let body = piece.encode();
            prop_assert_eq!(Piece::decode(&body).unwrap(), piece);
            prop_assert_eq!(decode_bytes(&encode_bytes(numbers.1)).unwrap(), numbers.1);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = (decode_setup(&bytes), decode_wanted(&bytes, 3));
            let _ = (Piece::decode(&bytes), decode_bytes(&bytes));
        }
    }
}
