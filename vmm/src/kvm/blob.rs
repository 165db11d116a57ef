//! KVM structures as hex strings, for saved state whose layout only the kernel defines.

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::ops::RangeInclusive;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A plain kernel structure, serialised as the hex digits of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob<T>(pub T);

impl<T: IntoBytes + Immutable> Serialize for Blob<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&to_hex(self.0.as_bytes()))
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Blob<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let size = size_of::<T>();
        let bytes = deserializer.deserialize_str(Hex(size..=size))?;
        // Cannot fail: the length was checked.
        T::read_from_bytes(&bytes)
            .map(Self)
            .map_err(|_| D::Error::invalid_length(bytes.len(), &"T"))
    }
}

/// At most `MAX` bytes as hex digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bytes<const MAX: usize>(pub Vec<u8>);

impl<const MAX: usize> Serialize for Bytes<MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&to_hex(&self.0))
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for Bytes<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Hex(0..=MAX)).map(Self)
    }
}

/// Reads hex digits of so many bytes.
struct Hex(RangeInclusive<usize>);

impl Visitor<'_> for Hex {
    type Value = Vec<u8>;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (least, most) = (self.0.start(), self.0.end());
        match least == most {
            true => write!(to, "{most} bytes in hex"),
            false => write!(to, "{least} to {most} bytes in hex"),
        }
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<u8>, E> {
        let bytes = text.len() / 2;
        if !self.0.contains(&bytes) {
            return Err(E::invalid_length(bytes, &self));
        }
        from_hex(text).ok_or_else(|| E::custom("malformed hex digits"))
    }
}

fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let nibble = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    pairs.iter().map(|[high, low]| Some(nibble(*high)? << 4 | nibble(*low)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive_a_round_trip() {
        let all = Bytes::<256>((0..=255).collect());
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(serde_json::from_str::<Bytes<256>>(&text).unwrap(), all);
    }

    #[test]
    fn wrong_digits_and_lengths_are_refused() {
        for bad in ["\"0\"", "\"0g\"", "\"é\"", "7"] {
            assert!(serde_json::from_str::<Bytes<9>>(bad).is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<Blob<u32>>("\"00112233\"").is_ok());
        let error = serde_json::from_str::<Blob<u32>>("\"001122\"").unwrap_err();
        assert!(error.to_string().contains("length 3, expected 4 bytes in hex"), "{error}");
        let error = serde_json::from_str::<Bytes<2>>("\"001122\"").unwrap_err();
        assert!(error.to_string().contains("length 3, expected 0 to 2 bytes in hex"), "{error}");
    }
}
