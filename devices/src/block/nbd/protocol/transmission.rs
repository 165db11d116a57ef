//! Requests and replies after the handshake. See [`super`].
#![expect(clippy::big_endian_bytes, reason = "the codec")]

use super::{Fields, Filler, MAX_STRING_BYTES, ProtocolError, cut};
use std::io;

/// Magic number of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic number of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic number of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Commands.
pub mod command {
    /// Reads.
    pub const READ: u16 = 0;
    /// Writes the data that follows.
    pub const WRITE: u16 = 1;
    /// Ends the connection; there is no reply.
    pub const DISCONNECT: u16 = 2;
    /// Makes every acknowledged write durable.
    pub const FLUSH: u16 = 3;
    /// Discards.
    pub const TRIM: u16 = 4;
    /// Reads ahead.
    pub const CACHE: u16 = 5;
    /// Zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Asks for the selected metadata.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a command.
pub mod command_flag {
    /// The reply comes when the write is durable.
    pub const FUA: u16 = 1 << 0;
    /// `WRITE_ZEROES` does not free space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// `READ` gets at most one content chunk.
    pub const DF: u16 = 1 << 2;
    /// `BLOCK_STATUS` gets one extent for each context.
    pub const REQ_ONE: u16 = 1 << 3;
    /// `WRITE_ZEROES` fails rather than be as slow as a write.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Flag of a chunk: the reply ends with it.
pub const CHUNK_DONE: u16 = 1 << 0;

/// Kinds of chunks.
pub mod chunk {
    /// No payload; the reply ends.
    pub const NONE: u16 = 0;
    /// Offset (8 bytes) and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset (8 bytes) and length (4) of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Context (4 bytes), then extents: [`super::Extent`].
    pub const BLOCK_STATUS: u16 = 5;
    /// Set in every error.
    pub const IS_ERROR: u16 = 1 << 15;
    /// [`super::ErrorPayload`].
    pub const ERROR: u16 = IS_ERROR + 1;
    /// [`super::ErrorPayload`], then the offset (8 bytes) at which it occurred.
    pub const ERROR_OFFSET: u16 = IS_ERROR + 2;
}

/// Flags of extents of `base:allocation`.
pub mod state {
    /// It takes no space.
    pub const HOLE: u32 = 1 << 0;
    /// It reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
    /// Of `qemu:dirty-bitmap:NAME`: it is dirty.
    pub const DIRTY: u32 = 1 << 0;
}

/// Error numbers: Linux's, and only these.
pub mod errno {
    /// Not permitted: a write to a read-only export.
    pub const EPERM: u32 = 1;
    /// I/O error; also everything that has no number of its own.
    pub const EIO: u32 = 5;
    /// Out of memory.
    pub const ENOMEM: u32 = 12;
    /// Invalid request.
    pub const EINVAL: u32 = 22;
    /// No space left; also a write past the end.
    pub const ENOSPC: u32 = 28;
    /// Too large for one reply.
    pub const EOVERFLOW: u32 = 75;
    /// Not supported, `FAST_ZERO` only.
    pub const ENOTSUP: u32 = 95;
    /// The server is about to end.
    pub const ESHUTDOWN: u32 = 108;
}

/// The protocol's number for an error of the host.
pub fn errno_of(error: &io::Error) -> u32 {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES | libc::EROFS) => errno::EPERM,
        Some(libc::ENOMEM) => errno::ENOMEM,
        Some(libc::EINVAL) => errno::EINVAL,
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => errno::ENOSPC,
        Some(libc::EOVERFLOW) => errno::EOVERFLOW,
        Some(libc::ESHUTDOWN) => errno::ESHUTDOWN,
        Some(libc::EOPNOTSUPP) => errno::ENOTSUP,
        Some(_) => errno::EIO,
        None => match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => errno::EPERM,
            io::ErrorKind::InvalidInput => errno::EINVAL,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => errno::ENOSPC,
            io::ErrorKind::OutOfMemory => errno::ENOMEM,
            io::ErrorKind::Unsupported => errno::ENOTSUP,
            _ => errno::EIO,
        },
    }
}

/// The host's error for the protocol's number. A number that the protocol does not have is an I/O error.
pub fn error_of(errno: u32) -> io::Error {
    let known = [
        (errno::EPERM, libc::EPERM),
        (errno::ENOMEM, libc::ENOMEM),
        (errno::EINVAL, libc::EINVAL),
        (errno::ENOSPC, libc::ENOSPC),
        (errno::EOVERFLOW, libc::EOVERFLOW),
        (errno::ENOTSUP, libc::EOPNOTSUPP),
        (errno::ESHUTDOWN, libc::ESHUTDOWN),
    ];
    let host =
        known.iter().find(|(number, _)| *number == errno).map_or(libc::EIO, |(_, host)| *host);
    io::Error::from_raw_os_error(host)
}

/// A request's header. The data of a write follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// [`command_flag`]s.
    pub flags: u16,
    /// One of [`command`], or unknown.
    pub command: u16,
    /// The client's name for the request; replies repeat it.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub len: u32,
}

impl Request {
    /// Length of its encoding.
    pub const BYTES: usize = 28;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let Self { flags, command, cookie, offset, len } = self;
        let filler = Filler::new().u32(REQUEST_MAGIC).u16(flags).u16(command);
        filler.u64(cookie).u64(offset).u32(len).done()
    }

    /// As it was received.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("a request", bytes);
        fields.magic32(REQUEST_MAGIC)?;
        let (flags, command, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
        Ok(Self { flags, command, cookie, offset: fields.u64()?, len: fields.u32()? })
    }
}

/// A reply that is not structured. The data of a successful read follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0, or one of [`errno`].
    pub error: u32,
    /// That of the request.
    pub cookie: u64,
}

impl SimpleReply {
    /// Length of its encoding.
    pub const BYTES: usize = 16;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::BYTES] {
        Filler::new().u32(SIMPLE_REPLY_MAGIC).u32(self.error).u64(self.cookie).done()
    }

    /// As it was received.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("a reply", bytes);
        fields.magic32(SIMPLE_REPLY_MAGIC)?;
        Ok(Self { error: fields.u32()?, cookie: fields.u64()? })
    }
}

/// What precedes a chunk's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// [`CHUNK_DONE`] or none.
    pub flags: u16,
    /// One of [`chunk`], or unknown.
    pub kind: u16,
    /// That of the request.
    pub cookie: u64,
    /// Length of the payload in bytes.
    pub len: u32,
}

impl ChunkHeader {
    /// Length of its encoding.
    pub const BYTES: usize = 20;

    /// Whether the reply ends with it.
    pub fn is_last(self) -> bool {
        self.flags & CHUNK_DONE != 0
    }

    /// Whether the request has failed.
    pub fn is_error(self) -> bool {
        self.kind & chunk::IS_ERROR != 0
    }

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let Self { flags, kind, cookie, len } = self;
        Filler::new().u32(CHUNK_MAGIC).u16(flags).u16(kind).u64(cookie).u32(len).done()
    }

    /// As it was received.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("a chunk of a reply", bytes);
        fields.magic32(CHUNK_MAGIC)?;
        let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
        Ok(Self { flags, kind, cookie, len: fields.u32()? })
    }
}

/// The header of a reply, whichever kind it is: a client that has negotiated structured replies gets both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// All of it, apart from a read's data.
    Simple(SimpleReply),
    /// The rest of a [`ChunkHeader`] follows: it takes all [`ChunkHeader::BYTES`].
    Chunk,
}

impl ReplyHeader {
    /// Tells them apart by their first [`SimpleReply::BYTES`] bytes.
    pub fn decode(bytes: &[u8; SimpleReply::BYTES]) -> Result<Self, ProtocolError> {
        match Fields::new("a reply", bytes).u32()? {
            CHUNK_MAGIC => Ok(Self::Chunk),
            _ => SimpleReply::decode(bytes).map(Self::Simple),
        }
    }
}

/// Encodes a chunk's header and an [`chunk::OFFSET_DATA`] payload's offset: the data follows. `len` is that of the
/// data, and at most [`super::MAX_PAYLOAD_BYTES`].
pub fn encode_data_chunk(flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let header = ChunkHeader { flags, kind: chunk::OFFSET_DATA, cookie, len: len + 8 };
    Filler::new().put(&header.encode()).u64(offset).done()
}

/// Encodes a whole chunk of kind [`chunk::OFFSET_HOLE`].
pub fn encode_hole_chunk(flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; 32] {
    let header = ChunkHeader { flags, kind: chunk::OFFSET_HOLE, cookie, len: 12 };
    Filler::new().put(&header.encode()).u64(offset).u32(len).done()
}

/// Offset and length of the payload of a chunk of kind [`chunk::OFFSET_HOLE`].
pub fn decode_hole(payload: &[u8]) -> Result<(u64, u32), ProtocolError> {
    let mut fields = Fields::new("a hole", payload);
    let hole = (fields.u64()?, fields.u32()?);
    fields.end()?;
    Ok(hole)
}

/// An extent of a metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// In bytes; not 0.
    pub len: u32,
    /// The context's flags.
    pub flags: u32,
}

/// Payload of a chunk of kind [`chunk::BLOCK_STATUS`].
pub fn encode_status(context: u32, extents: &[Extent]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4 + extents.len() * 8);
    bytes.extend_from_slice(&context.to_be_bytes());
    for Extent { len, flags } in extents {
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(&flags.to_be_bytes());
    }
    bytes
}

/// Context and extents of a payload of kind [`chunk::BLOCK_STATUS`].
///
/// # Errors
/// Also if there is no extent, or an empty one.
pub fn decode_status(payload: &[u8]) -> Result<(u32, Vec<Extent>), ProtocolError> {
    let what = "a block status";
    let mut fields = Fields::new(what, payload);
    let context = fields.u32()?;
    let mut extents = Vec::with_capacity(fields.left() / 8);
    while fields.left() > 0 || extents.is_empty() {
        let extent = Extent { len: fields.u32()?, flags: fields.u32()? };
        if extent.len == 0 {
            return Err(ProtocolError::Value { what, found: 0 });
        }
        extents.push(extent);
    }
    Ok((context, extents))
}

/// Payload of a chunk that is an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorPayload {
    /// One of [`errno`].
    pub errno: u32,
    /// For people; may be empty.
    pub message: String,
    /// Where it occurred, of kind [`chunk::ERROR_OFFSET`] only.
    pub offset: Option<u64>,
}

impl ErrorPayload {
    /// The kind of its chunk.
    pub fn kind(&self) -> u16 {
        if self.offset.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR }
    }

    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let message = cut(&self.message);
        let len = u16::try_from(message.len()).expect("it has been cut");
        let mut bytes = Vec::with_capacity(message.len() + 14);
        bytes.extend_from_slice(&self.errno.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(message.as_bytes());
        self.offset.iter().for_each(|offset| bytes.extend_from_slice(&offset.to_be_bytes()));
        bytes
    }

    /// As it was received in a chunk of `kind`. What an unknown kind has beyond the message is ignored.
    ///
    /// # Errors
    /// Also if the error number is 0.
    pub fn decode(kind: u16, payload: &[u8]) -> Result<Self, ProtocolError> {
        let what = "an error";
        let mut fields = Fields::new(what, payload);
        let errno = fields.u32()?;
        if errno == 0 {
            return Err(ProtocolError::Value { what, found: 0 });
        }
        let len = fields.u16()?;
        let message = fields.string(len.into())?;
        let offset = (kind == chunk::ERROR_OFFSET).then(|| fields.u64()).transpose()?;
        if kind == chunk::ERROR || kind == chunk::ERROR_OFFSET {
            fields.end()?;
        }
        Ok(Self { errno, message, offset })
    }
}

const _: () = assert!(MAX_STRING_BYTES <= u16::MAX as usize);
