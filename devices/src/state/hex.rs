//! Bytes as hex digits in JSON, with a maximum that is checked before they are decoded.

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::ops::RangeInclusive;

/// At most `MAX` bytes as hex digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HexBytes<const MAX: usize>(pub Vec<u8>);

impl<const MAX: usize> Serialize for HexBytes<MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&to_hex(&self.0))
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for HexBytes<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Hex(0..=MAX)).map(Self)
    }
}

/// Reads hex digits of so many bytes.
pub struct Hex(pub RangeInclusive<usize>);

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

/// The hex digits of `bytes`.
pub fn to_hex(bytes: &[u8]) -> String {
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
        let all = HexBytes::<256>((0..=255).collect());
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(serde_json::from_str::<HexBytes<256>>(&text).unwrap(), all);
    }

    #[test]
    fn wrong_digits_and_too_many_are_refused() {
        for bad in ["\"0\"", "\"0g\"", "\"é\"", "7"] {
            assert!(serde_json::from_str::<HexBytes<9>>(bad).is_err(), "{bad}");
        }
        let error = serde_json::from_str::<HexBytes<2>>("\"001122\"").unwrap_err();
        assert!(error.to_string().contains("length 3, expected 0 to 2 bytes in hex"), "{error}");
    }
}
