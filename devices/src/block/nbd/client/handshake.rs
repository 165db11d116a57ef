//! The handshake: from a connected socket to an export that takes requests. Its caller sets the deadline; what
//! the server sends is bounded by [`MAX_OPTION_BYTES`] and [`MOST_REPLIES`].
//!
//! ```text
//! greeting ─▶ STRUCTURED_REPLY ─▶ SET_META_CONTEXT base:allocation (if structured) ─▶ GO with block sizes
//! ```
//! The first two may be refused; then reads are simple, and all counts as allocated.

use super::failure::OpenReason;
use super::wire::{Limit, Reader, Wire};
use crate::block::SECTOR_BYTES;
use crate::block::nbd::protocol::{
    BASE_ALLOCATION, BlockSizes, CLIENT_FIXED_NEWSTYLE, CLIENT_NO_ZEROES, FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES, Fields, Greeting, Info, InfoRequest, MAX_OPTION_BYTES, MAX_PAYLOAD_BYTES,
    MetaContext, MetaRequest, OptionHeader, OptionReply, info, option, reply, transmission_flag,
};

/// Replies to one option that are accepted. Real servers send a handful.
const MOST_REPLIES: usize = 64;
/// What a server supports that says nothing about it (`doc/proto.md`, "Block size constraints").
const DEFAULT_SIZES: BlockSizes = BlockSizes { min: 1, preferred: 4096, max: MAX_PAYLOAD_BYTES };
/// A long write is made as several requests of this size, all in flight at once. A server's buffer for one then
/// stays in the processor's cache, and below the size from which its `malloc` maps each anew: with `qemu-nbd`, writes
/// of 1 MiB are half as fast. A whole number of clusters of qcow2.
const WRITE_PIECE_BYTES: u32 = 128 << 10;
/// Largest request without data. Of no server is known that it would refuse it.
const MAX_RANGE_BYTES: u32 = 1 << 30;
/// Offsets of files are signed.
const MAX_DISK_BYTES: u64 = i64::MAX as u64;

/// What a server says about an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Export {
    pub len_bytes: u64,
    /// [`transmission_flag`]s.
    pub flags: u16,
    /// Largest payload that may be sent or asked for, in whole sectors.
    pub max_data_bytes: u32,
    /// Payload of each request of a long write.
    pub write_piece_bytes: u32,
    /// Largest range of a request without payload, in whole sectors.
    pub max_range_bytes: u32,
    /// Whether replies to reads come in chunks.
    pub structured: bool,
    /// The server's number for `base:allocation`, if it can be asked.
    pub allocation: Option<u32>,
}

impl Export {
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Negotiates the use of the export called `name`.
pub(super) fn negotiate(
    wire: &Wire,
    reader: &mut Reader,
    name: &str,
    limit: Limit,
) -> Result<Export, OpenReason> {
    let mut talk = Talk { wire, reader, limit };
    let mut greeting = [0; Greeting::BYTES];
    talk.receive(&mut greeting)?;
    let greeting = Greeting::decode(&greeting)?;
    if greeting.flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(OpenReason::NoFixedNewstyle);
    }
    let no_zeroes = match greeting.flags & FLAG_NO_ZEROES {
        0 => 0,
        _ => CLIENT_NO_ZEROES,
    };
    talk.send(&encode_client_flags(CLIENT_FIXED_NEWSTYLE | no_zeroes))?;
    let structured = talk.structured_replies()?;
    let allocation = if structured { talk.allocation_context(name)? } else { None };
    let (len_bytes, flags, sizes) = talk.go(name)?;
    check_size(len_bytes)?;
    if u64::from(sizes.min) > SECTOR_BYTES {
        return Err(OpenReason::LargeBlocks { min: sizes.min });
    }
    let sector = u32::try_from(SECTOR_BYTES).expect("it is small");
    let max = sizes.max - sizes.max % sector;
    if max == 0 {
        return Err(OpenReason::SmallRequests { max: sizes.max });
    }
    let (max_data_bytes, max_range_bytes) = (max.min(MAX_PAYLOAD_BYTES), max.min(MAX_RANGE_BYTES));
    let write_piece_bytes = sizes.preferred.max(WRITE_PIECE_BYTES).min(max_data_bytes);
    Ok(Export {
        len_bytes,
        flags,
        max_data_bytes,
        write_piece_bytes,
        max_range_bytes,
        structured,
        allocation,
    })
}

#[expect(clippy::big_endian_bytes, reason = "the protocol's order")]
fn encode_client_flags(flags: u32) -> [u8; 4] {
    flags.to_be_bytes()
}

fn check_size(len_bytes: u64) -> Result<(), OpenReason> {
    match len_bytes {
        0 => Err(OpenReason::Empty),
        _ if len_bytes > MAX_DISK_BYTES => Err(OpenReason::Huge { len_bytes }),
        _ if !len_bytes.is_multiple_of(SECTOR_BYTES) => Err(OpenReason::OddSize { len_bytes }),
        _ => Ok(()),
    }
}

/// One side of the handshake.
struct Talk<'a> {
    wire: &'a Wire,
    reader: &'a mut Reader,
    limit: Limit,
}

impl Talk<'_> {
    fn send(&self, bytes: &[u8]) -> Result<(), OpenReason> {
        self.wire.send(bytes, &[], self.limit).map_err(OpenReason::Handshake)
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<(), OpenReason> {
        self.reader.exact(self.wire, into, self.limit).map_err(OpenReason::Handshake)
    }

    fn ask(&self, option: u32, data: &[u8]) -> Result<(), OpenReason> {
        let len = u32::try_from(data.len()).expect("a few strings");
        self.send(&[&OptionHeader { option, len }.encode()[..], data].concat())
    }

    /// The next reply to `option`: its kind and data.
    fn reply(&mut self, option: u32) -> Result<(u32, Vec<u8>), OpenReason> {
        let mut header = [0; OptionReply::BYTES];
        self.receive(&mut header)?;
        let header = OptionReply::decode(&header)?;
        if header.option != option {
            return Err(OpenReason::OtherOption { asked: option, answered: header.option });
        }
        if header.len > MAX_OPTION_BYTES {
            return Err(OpenReason::TooLong { option, len: header.len, most: MAX_OPTION_BYTES });
        }
        let mut data = vec![0; header.len as usize];
        self.receive(&mut data)?;
        Ok((header.kind, data))
    }

    /// Replies to `option` until it is acknowledged: each is given to `take`, which returns whether it knows its
    /// kind. An error is returned as such.
    fn replies(
        &mut self,
        option: u32,
        mut take: impl FnMut(u32, &[u8]) -> Result<bool, OpenReason>,
    ) -> Result<Option<(u32, String)>, OpenReason> {
        for _ in 0..MOST_REPLIES {
            match self.reply(option)? {
                (reply::ACK, _) => return Ok(None),
                (kind, message) if kind & reply::ERROR != 0 => {
                    // A message for people: what it is worth is not worth a failure of its own.
                    let message = Fields::new("a message", &message).rest_as_string();
                    return Ok(Some((kind, message.unwrap_or_default())));
                }
                (kind, data) if !take(kind, &data)? => {
                    return Err(OpenReason::UnknownKind { option, kind });
                }
                _ => {}
            }
        }
        Err(OpenReason::Endless { option })
    }

    fn structured_replies(&mut self) -> Result<bool, OpenReason> {
        self.ask(option::STRUCTURED_REPLY, &[])?;
        let refused = self.replies(option::STRUCTURED_REPLY, |_, _| Ok(false))?;
        match refused {
            None => Ok(true),
            Some((reply::ERR_TLS_REQD, message)) => Err(OpenReason::TlsRequired { message }),
            Some(_) => Ok(false),
        }
    }

    fn allocation_context(&mut self, name: &str) -> Result<Option<u32>, OpenReason> {
        let request = MetaRequest { export: name.into(), queries: vec![BASE_ALLOCATION.into()] };
        self.ask(option::SET_META_CONTEXT, &request.encode())?;
        let mut found = None;
        let refused = self.replies(option::SET_META_CONTEXT, |kind, data| {
            if kind != reply::META_CONTEXT {
                return Ok(false);
            }
            let context = MetaContext::decode(data)?;
            // Others were not asked for.
            if context.name == BASE_ALLOCATION {
                found = Some(context.id);
            }
            Ok(true)
        })?;
        // Whatever is wrong with the export, GO says it better.
        Ok(found.filter(|_| refused.is_none()))
    }

    fn go(&mut self, name: &str) -> Result<(u64, u16, BlockSizes), OpenReason> {
        let request = InfoRequest { export: name.into(), wanted: vec![info::BLOCK_SIZE] };
        self.ask(option::GO, &request.encode())?;
        let (mut export, mut sizes) = (None, DEFAULT_SIZES);
        let refused = self.replies(option::GO, |kind, data| {
            if kind != reply::INFO {
                return Ok(false);
            }
            match Info::decode(data)? {
                Info::Export { len_bytes, flags } => export = Some((len_bytes, flags)),
                Info::BlockSize(found) => sizes = found,
                Info::Name(_) | Info::Description(_) | Info::Other(_) => {}
            }
            Ok(true)
        })?;
        match refused {
            None => {}
            Some((reply::ERR_UNSUP, _)) => return Err(OpenReason::NoSuchOption(option::GO)),
            Some((reply::ERR_UNKNOWN, message)) => {
                return Err(OpenReason::NoSuchExport { export: name.into(), message });
            }
            Some((reply::ERR_TLS_REQD, message)) => {
                return Err(OpenReason::TlsRequired { message });
            }
            Some((kind, message)) => {
                return Err(OpenReason::Refused { option: option::GO, kind, message });
            }
        }
        let (len_bytes, flags) = export.ok_or(OpenReason::NoSize)?;
        // Without it the others mean nothing.
        let meaningless = flags & transmission_flag::HAS_FLAGS == 0;
        let flags = if meaningless { flags & transmission_flag::READ_ONLY } else { flags };
        Ok((len_bytes, flags, sizes))
    }
}
