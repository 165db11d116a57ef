//! Little-endian integers and short strings, to and from bytes: the only file with byte-order calls.
#![expect(clippy::little_endian_bytes, reason = "the codec")]

use super::WireError;

/// Builds a payload.
#[derive(Debug, Default)]
pub struct Encoder(Vec<u8>);

impl Encoder {
    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.raw(&[value])
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// One byte of length, then the text, cut after 255 bytes. For names of ours and for those whose length
    /// the caller has checked.
    pub fn str8(&mut self, text: &str) -> &mut Self {
        let bytes = text.as_bytes();
        let len = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
        self.u8(len).raw(&bytes[..usize::from(len)])
    }

    /// Bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// The payload so far.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Empties it, keeping the memory.
    pub fn clear(&mut self) -> &mut Self {
        self.0.clear();
        self
    }
}

/// Parses a payload. Allocates nothing.
#[derive(Debug)]
pub struct Decoder<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// `what` names the payload in errors.
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    /// An error about this payload.
    pub fn malformed(&self, reason: impl Into<String>) -> WireError {
        WireError::Malformed { what: self.what, reason: reason.into() }
    }

    /// The next `len` bytes.
    pub fn raw(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let split = self.rest.split_at_checked(len);
        let (bytes, rest) = split.ok_or_else(|| self.malformed("it is too short"))?;
        self.rest = rest;
        Ok(bytes)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.raw(N)?);
        Ok(array)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        self.array().map(u8::from_le_bytes)
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// One byte of length, then that much UTF-8.
    pub fn str8(&mut self) -> Result<&'a str, WireError> {
        let len = usize::from(self.u8()?);
        let bytes = self.raw(len)?;
        std::str::from_utf8(bytes).map_err(|_| self.malformed("a name is not UTF-8"))
    }

    /// All that is left.
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Checks that nothing is left.
    pub fn finish(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(self.malformed(format!("{extra} bytes too many"))),
        }
    }
}
