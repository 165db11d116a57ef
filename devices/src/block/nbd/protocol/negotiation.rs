//! The handshake: greeting, options and their replies. See [`super`].
#![expect(clippy::big_endian_bytes, reason = "the codec")]

use super::{Fields, Filler, MAX_STRING_BYTES, ProtocolError, cut, put_sized_string};

/// First magic number of a server: `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic number of a server, and that of an option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic number of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flag of the server: it knows options. The client answers with the same bit.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag of the server: the reply to `EXPORT_NAME` need not end with 124 zeroes. The client answers with
/// the same bit if it wants none.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client flag: [`FLAG_FIXED_NEWSTYLE`].
pub const CLIENT_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag: [`FLAG_NO_ZEROES`].
pub const CLIENT_NO_ZEROES: u32 = 1 << 1;
/// Zeroes at the end of the reply to `EXPORT_NAME`.
pub const EXPORT_NAME_ZEROES: usize = 124;

/// Options.
pub mod option {
    /// Use an export, without a way to refuse.
    pub const EXPORT_NAME: u32 = 1;
    /// End.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// TLS from here on.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export, and use it.
    pub const GO: u32 = 7;
    /// Reply to reads in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List an export's metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts of an export.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Headers with lengths of 64 bits.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Kinds of replies to options. An error's data is a message for people.
pub mod reply {
    /// The option is done.
    pub const ACK: u32 = 1;
    /// An export: [`super::ServerEntry`].
    pub const SERVER: u32 = 2;
    /// [`super::Info`].
    pub const INFO: u32 = 3;
    /// [`super::MetaContext`].
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR: u32 = 1 << 31;
    /// The server does not know the option.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// The server may not.
    pub const ERR_POLICY: u32 = ERROR + 2;
    /// The option's data is invalid.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// The server's platform cannot.
    pub const ERR_PLATFORM: u32 = ERROR + 4;
    /// Only with TLS.
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// The server is about to end.
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    /// The client must ask for the block sizes, and honour them.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR + 8;
    /// More than the server accepts.
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
}

/// Transmission flags of an export.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes fail.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` is known.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The command flag `FUA` is known.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Its medium rotates.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// `TRIM` is known.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` and the command flag `NO_HOLE` are known.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The command flag `DF` is known.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection is one of all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `RESIZE` is known.
    pub const SEND_RESIZE: u16 = 1 << 9;
    /// `CACHE` is known.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The command flag `FAST_ZERO` is known.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Kinds of [`Info`].
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Sizes of requests.
    pub const BLOCK_SIZE: u16 = 3;
}

/// The allocation context of the protocol itself: [`super::state`] has its flags.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// QEMU's namespace of contexts; a dirty bitmap is `qemu:dirty-bitmap:NAME`, and bit 0 of its status means dirty.
pub const QEMU_DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// What a server says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// Handshake flags.
    pub flags: u16,
}

impl Greeting {
    /// Length of its encoding.
    pub const BYTES: usize = 18;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::BYTES] {
        Filler::new().u64(GREETING_MAGIC).u64(OPTION_MAGIC).u16(self.flags).done()
    }

    /// As it was received.
    ///
    /// # Errors
    /// Also if the server speaks an older protocol: its second magic number differs.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("the server's greeting", bytes);
        fields.magic64(GREETING_MAGIC)?;
        fields.magic64(OPTION_MAGIC)?;
        Ok(Self { flags: fields.u16()? })
    }
}

/// What precedes an option's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// One of [`option`], or unknown.
    pub option: u32,
    /// Length of its data in bytes.
    pub len: u32,
}

impl OptionHeader {
    /// Length of its encoding.
    pub const BYTES: usize = 16;

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::BYTES] {
        Filler::new().u64(OPTION_MAGIC).u32(self.option).u32(self.len).done()
    }

    /// As it was received.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("an option", bytes);
        fields.magic64(OPTION_MAGIC)?;
        Ok(Self { option: fields.u32()?, len: fields.u32()? })
    }
}

/// What precedes the data of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReply {
    /// The option.
    pub option: u32,
    /// One of [`reply`], or unknown.
    pub kind: u32,
    /// Length of its data in bytes.
    pub len: u32,
}

impl OptionReply {
    /// Length of its encoding.
    pub const BYTES: usize = 20;

    /// Whether the option failed.
    pub fn is_error(self) -> bool {
        self.kind & reply::ERROR != 0
    }

    /// As it is sent.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let Self { option, kind, len } = self;
        Filler::new().u64(OPTION_REPLY_MAGIC).u32(option).u32(kind).u32(len).done()
    }

    /// As it was received.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("a reply to an option", bytes);
        fields.magic64(OPTION_REPLY_MAGIC)?;
        Ok(Self { option: fields.u32()?, kind: fields.u32()?, len: fields.u32()? })
    }
}

/// Data of `INFO` and `GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest {
    /// The export's name; empty for the default one.
    pub export: String,
    /// Kinds of [`info`] wanted; the server sends [`info::EXPORT`] in any case.
    pub wanted: Vec<u16>,
}

impl InfoRequest {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_sized_string(&mut bytes, &self.export);
        let wanted = &self.wanted[..self.wanted.len().min(usize::from(u16::MAX))];
        let count = u16::try_from(wanted.len()).expect("it has been cut");
        bytes.extend_from_slice(&count.to_be_bytes());
        wanted.iter().for_each(|kind| bytes.extend_from_slice(&kind.to_be_bytes()));
        bytes
    }

    /// As it was received.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("an option's data", bytes);
        let export = fields.sized_string()?;
        let count = fields.u16()?;
        if fields.left() != 2 * usize::from(count) {
            return Err(ProtocolError::Value { what: "an option's data", found: count.into() });
        }
        let wanted = (0..count).map(|_| fields.u16()).collect::<Result<_, _>>()?;
        Ok(Self { export, wanted })
    }
}

/// Data of a reply of kind [`reply::INFO`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info {
    /// Its size in bytes and its transmission flags.
    Export { len_bytes: u64, flags: u16 },
    /// Its canonical name.
    Name(String),
    /// Its description.
    Description(String),
    /// What requests it accepts.
    BlockSize(BlockSizes),
    /// Of an unknown kind, to be ignored.
    Other(u16),
}

/// Sizes of requests, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it; a power of two up to 64 KiB.
    pub min: u32,
    /// What performs well; a power of two.
    pub preferred: u32,
    /// Largest payload.
    pub max: u32,
}

impl Info {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let text = |kind: u16, text: &str| [&kind.to_be_bytes()[..], cut(text).as_bytes()].concat();
        match self {
            Self::Export { len_bytes, flags } => {
                Filler::<12>::new().u16(info::EXPORT).u64(*len_bytes).u16(*flags).done().to_vec()
            }
            Self::Name(name) => text(info::NAME, name),
            Self::Description(description) => text(info::DESCRIPTION, description),
            Self::BlockSize(BlockSizes { min, preferred, max }) => {
                let filler = Filler::<14>::new().u16(info::BLOCK_SIZE);
                filler.u32(*min).u32(*preferred).u32(*max).done().to_vec()
            }
            Self::Other(kind) => kind.to_be_bytes().to_vec(),
        }
    }

    /// As it was received.
    ///
    /// # Errors
    /// Also if the block sizes are not as [`BlockSizes`] says.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("a reply to an option", bytes);
        let info = match fields.u16()? {
            info::EXPORT => Self::Export { len_bytes: fields.u64()?, flags: fields.u16()? },
            info::NAME => Self::Name(fields.rest_as_string()?),
            info::DESCRIPTION => Self::Description(fields.rest_as_string()?),
            info::BLOCK_SIZE => {
                let (min, preferred, max) = (fields.u32()?, fields.u32()?, fields.u32()?);
                let fits = min.is_power_of_two() && min <= 64 << 10;
                if !fits || !preferred.is_power_of_two() || preferred < min || max < min {
                    let found = min.into();
                    return Err(ProtocolError::Value { what: "the export's block sizes", found });
                }
                Self::BlockSize(BlockSizes { min, preferred, max })
            }
            other => return Ok(Self::Other(other)),
        };
        fields.end()?;
        Ok(info)
    }
}

/// Data of a reply of kind [`reply::SERVER`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerEntry {
    /// The export's name.
    pub name: String,
    /// For people; empty if there is none.
    pub description: String,
}

impl ServerEntry {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_sized_string(&mut bytes, &self.name);
        bytes.extend_from_slice(cut(&self.description).as_bytes());
        bytes
    }

    /// As it was received.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("an entry of the list of exports", bytes);
        Ok(Self { name: fields.sized_string()?, description: fields.rest_as_string()? })
    }
}

/// Data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaRequest {
    /// The export's name.
    pub export: String,
    /// Names of contexts; when listing, also a namespace with its colon. None at all lists every context.
    pub queries: Vec<String>,
}

/// Most queries that are accepted.
pub const MAX_META_QUERIES: u32 = 256;

impl MetaRequest {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_sized_string(&mut bytes, &self.export);
        let count = u32::try_from(self.queries.len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&count.to_be_bytes());
        self.queries.iter().for_each(|query| put_sized_string(&mut bytes, query));
        bytes
    }

    /// As it was received.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let what = "a request of metadata contexts";
        let mut fields = Fields::new(what, bytes);
        let (export, count) = (fields.sized_string()?, fields.u32()?);
        if count > MAX_META_QUERIES {
            let (count, most) = (count.into(), MAX_META_QUERIES.into());
            return Err(ProtocolError::TooMany { what, count, most });
        }
        let queries = (0..count).map(|_| fields.sized_string()).collect::<Result<_, _>>()?;
        fields.end()?;
        Ok(Self { export, queries })
    }
}

/// Data of a reply of kind [`reply::META_CONTEXT`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaContext {
    /// Names it in block status; 0 in a list.
    pub id: u32,
    /// Its name.
    pub name: String,
}

impl MetaContext {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        [&self.id.to_be_bytes()[..], cut(&self.name).as_bytes()].concat()
    }

    /// As it was received.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("a metadata context", bytes);
        Ok(Self { id: fields.u32()?, name: fields.rest_as_string()? })
    }
}

/// The reply to `EXPORT_NAME`: size in bytes and transmission flags, without the zeroes that may follow.
pub fn encode_export_name_reply(len_bytes: u64, flags: u16) -> [u8; 10] {
    Filler::new().u64(len_bytes).u16(flags).done()
}

// A name and its length fit into what an option may have.
const _: () = assert!(MAX_STRING_BYTES * 2 + 16 < super::MAX_OPTION_BYTES as usize);
