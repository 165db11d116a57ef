//! What NBD puts on the wire, for client and server: numbers, and values that are encoded and decoded. Reads
//! no socket. Everything is big-endian.
//!
//! Source: `doc/proto.md` of the NetworkBlockDevice project, whose names the constants have. There is only the
//! *fixed newstyle* handshake:
//!
//! ```text
//! server ─▶ Greeting      magic, magic, flags                            18 bytes
//! client ─▶ client flags                                                  4 bytes
//! client ─▶ OptionHeader  magic, option, length; then its data           16 bytes + data   ┐ repeated until
//! server ─▶ OptionReply   magic, option, kind, length; then its data     20 bytes + data   ┘ GO is acknowledged
//! client ─▶ Request       magic, flags, command, cookie, offset, length  28 bytes; a write's data
//! server ─▶ SimpleReply   magic, error, cookie                           16 bytes; a read's data
//!      or ─▶ Chunk        magic, flags, kind, cookie, length             20 bytes + payload, one or more
//! ```
//! [`negotiation`] has the upper half, [`transmission`] the lower. A decoder checks magics and that every length
//! lies within what it was given; what a value means is for its user to judge.
#![expect(clippy::big_endian_bytes, reason = "the codec")]

pub mod negotiation;
pub mod transmission;

pub use negotiation::*;
pub use transmission::*;

/// TCP port that IANA has assigned to NBD.
pub const PORT: u16 = 10809;
/// Longest string: names of exports and contexts, descriptions, error messages.
pub const MAX_STRING_BYTES: usize = 4096;
/// Longest data of an option or of its reply that we accept. Real ones take a few strings.
pub const MAX_OPTION_BYTES: u32 = 64 << 10;
/// Largest payload that every implementation accepts, if nothing else is said; that of a request or reply.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;

/// Bytes that are not what the protocol has in their place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error("{what} begins with {found:#x}, not with its magic number")]
    Magic {
        /// What should begin there.
        what: &'static str,
        found: u64,
    },
    #[error("{what} is cut short")]
    Short { what: &'static str },
    #[error("{what} is longer than its fields")]
    Long { what: &'static str },
    #[error("{what} has {count}; at most {most} are accepted")]
    TooMany { what: &'static str, count: u64, most: u64 },
    #[error("{what} is no valid UTF-8")]
    Text { what: &'static str },
    #[error("{what} has a field with the invalid value {found}")]
    Value { what: &'static str, found: u64 },
}

/// Takes fields from the front of bytes.
#[derive(Debug)]
pub struct Fields<'a> {
    what: &'static str,
    left: &'a [u8],
}

impl<'a> Fields<'a> {
    /// The fields of `what`, as errors call it.
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, left: bytes }
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], ProtocolError> {
        let (taken, left) =
            self.left.split_at_checked(len).ok_or(ProtocolError::Short { what: self.what })?;
        self.left = left;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let taken = self.left.split_first_chunk();
        let (taken, left) = taken.ok_or(ProtocolError::Short { what: self.what })?;
        self.left = left;
        Ok(*taken)
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> Result<u16, ProtocolError> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> Result<u32, ProtocolError> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> Result<u64, ProtocolError> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next `len_bytes` bytes as a string.
    pub fn string(&mut self, len_bytes: u32) -> Result<String, ProtocolError> {
        let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
        if len > MAX_STRING_BYTES {
            let (count, most) = (u64::from(len_bytes), MAX_STRING_BYTES as u64);
            return Err(ProtocolError::TooMany { what: self.what, count, most });
        }
        let text = std::str::from_utf8(self.bytes(len)?);
        text.map(str::to_owned).map_err(|_| ProtocolError::Text { what: self.what })
    }

    /// A string after its length of 32 bits.
    pub fn sized_string(&mut self) -> Result<String, ProtocolError> {
        let len = self.u32()?;
        self.string(len)
    }

    /// All the rest as a string.
    pub fn rest_as_string(&mut self) -> Result<String, ProtocolError> {
        let len = u32::try_from(self.left.len()).unwrap_or(u32::MAX);
        self.string(len)
    }

    /// Bytes that are left.
    pub fn left(&self) -> usize {
        self.left.len()
    }

    /// That nothing is left.
    pub fn end(self) -> Result<(), ProtocolError> {
        if self.left.is_empty() { Ok(()) } else { Err(ProtocolError::Long { what: self.what }) }
    }

    fn magic32(&mut self, magic: u32) -> Result<(), ProtocolError> {
        let found = self.u32()?;
        let right = found == magic;
        right.then_some(()).ok_or(ProtocolError::Magic { what: self.what, found: found.into() })
    }

    fn magic64(&mut self, magic: u64) -> Result<(), ProtocolError> {
        let found = self.u64()?;
        (found == magic).then_some(()).ok_or(ProtocolError::Magic { what: self.what, found })
    }
}

/// Writes fields into an array. A value that does not fill it exactly is a mistake in this module.
struct Filler<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Filler<N> {
    fn new() -> Self {
        Self { bytes: [0; N], at: 0 }
    }

    fn put(mut self, field: &[u8]) -> Self {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
        self
    }

    fn u16(self, field: u16) -> Self {
        self.put(&field.to_be_bytes())
    }

    fn u32(self, field: u32) -> Self {
        self.put(&field.to_be_bytes())
    }

    fn u64(self, field: u64) -> Self {
        self.put(&field.to_be_bytes())
    }

    fn done(self) -> [u8; N] {
        debug_assert_eq!(self.at, N);
        self.bytes
    }
}

/// Appends a string after its length of 32 bits. Longer ones than [`MAX_STRING_BYTES`] are cut.
fn put_sized_string(bytes: &mut Vec<u8>, text: &str) {
    let text = cut(text);
    let len = u32::try_from(text.len()).expect("it has been cut");
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

/// As much of `text` as a string may have.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_STRING_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests;
