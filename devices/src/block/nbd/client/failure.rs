//! What can go wrong with an export: opening it, one request, the connection.

use crate::block::SECTOR_BYTES;
use crate::block::nbd::address::NbdAddress;
use crate::block::nbd::protocol::{ProtocolError, errno, error_of, option, reply};
use std::error::Error;
use std::io;
use std::sync::Arc;

/// An export that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {address}")]
pub struct NbdOpenError {
    /// The export.
    pub address: NbdAddress,
    /// Why not.
    #[source]
    pub reason: OpenReason,
}

/// Why an export cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenReason {
    #[error("cannot connect to the server")]
    Connect(#[source] io::Error),
    #[error("the handshake broke off")]
    Handshake(#[source] io::Error),
    #[error("the server does not speak NBD as it should")]
    Protocol(#[from] ProtocolError),
    #[error("the server does not know the fixed newstyle handshake: use one made after 2010")]
    NoFixedNewstyle,
    #[error("the server does not know {}: use one made after 2017", option_name(.0))]
    NoSuchOption(u32),
    #[error("the server has no export {export:?}{}", said(.message))]
    NoSuchExport { export: String, message: String },
    #[error("the server wants TLS, which is not supported{}", said(.message))]
    TlsRequired { message: String },
    #[error("the server refuses {}: {}{}", option_name(.option), refusal_name(.kind), said(.message))]
    Refused { option: u32, kind: u32, message: String },
    #[error("the server answers {} with a reply to {}", option_name(.asked), option_name(.answered))]
    OtherOption { asked: u32, answered: u32 },
    #[error("the server answers {} with the unknown kind {kind}", option_name(.option))]
    UnknownKind { option: u32, kind: u32 },
    #[error("the server answers {} with {len} bytes; at most {most} are accepted", option_name(.option))]
    TooLong { option: u32, len: u32, most: u32 },
    #[error("the server answers {} without end", option_name(.option))]
    Endless { option: u32 },
    #[error("the server does not say how large the export is")]
    NoSize,
    #[error("the export is empty")]
    Empty,
    #[error("the export has {len_bytes} bytes, not a multiple of {SECTOR_BYTES}")]
    OddSize { len_bytes: u64 },
    #[error("the export has {len_bytes} bytes, more than any disk")]
    Huge { len_bytes: u64 },
    #[error(
        "the server takes only accesses of whole blocks of {min} bytes, but a guest's sectors have \
         {SECTOR_BYTES}: export the image without such blocks (qemu-nbd without --cache=none, say)"
    )]
    LargeBlocks { min: u32 },
    #[error("the server takes at most {max} bytes at a time, less than a sector of {SECTOR_BYTES}")]
    SmallRequests { max: u32 },
    #[error("the export has {now} bytes now, and had {before}")]
    Resized { before: u64, now: u64 },
    #[error("the export is read-only now")]
    ReadOnlyNow,
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" (it says {message:?})") }
}

fn option_name(number: &u32) -> String {
    match *number {
        option::GO => "NBD_OPT_GO".into(),
        option::STRUCTURED_REPLY => "NBD_OPT_STRUCTURED_REPLY".into(),
        option::SET_META_CONTEXT => "NBD_OPT_SET_META_CONTEXT".into(),
        other => format!("option {other}"),
    }
}

fn refusal_name(kind: &u32) -> String {
    match *kind {
        reply::ERR_UNSUP => "it does not know that".into(),
        reply::ERR_POLICY => "not allowed".into(),
        reply::ERR_INVALID => "invalid".into(),
        reply::ERR_PLATFORM => "not on its platform".into(),
        reply::ERR_SHUTDOWN => "it is shutting down".into(),
        reply::ERR_BLOCK_SIZE_REQD => "it wants its block sizes honoured".into(),
        reply::ERR_TOO_BIG => "too big".into(),
        other => format!("error {:#x}", other),
    }
}

/// All of an error's causes in a line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Why a connection was lost: every later request fails with it.
#[derive(Debug, Clone)]
pub(super) struct Cause {
    pub kind: io::ErrorKind,
    pub text: Arc<str>,
}

impl Cause {
    pub fn of(error: &io::Error) -> Self {
        // The text of an operating system's error says it all; another's may be in its sources.
        let text = match error.get_ref() {
            Some(inner) => chain(inner),
            None => error.to_string(),
        };
        Self { kind: error.kind(), text: text.into() }
    }

    pub fn interrupted() -> Self {
        Self { kind: io::ErrorKind::ConnectionAborted, text: "it was interrupted".into() }
    }

    pub fn of_protocol(error: &(dyn Error + 'static)) -> Self {
        let text = format!("the server does not speak NBD as it should: {}", chain(error));
        Self { kind: io::ErrorKind::InvalidData, text: text.into() }
    }
}

/// A request that the server has refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServerError {
    pub errno: u32,
    pub message: String,
    pub offset: Option<u64>,
}

/// A request that has failed.
#[derive(Debug)]
pub(super) enum RequestError {
    Refused(ServerError),
    Lost(Cause),
}

/// An I/O error of an export, inside an [`io::Error`] of the right kind.
#[derive(Debug, thiserror::Error)]
pub enum NbdIoError {
    #[error("{address}: the server refuses {what}: {error}{}", said(.message))]
    Refused {
        address: String,
        /// The access.
        what: String,
        /// Its error number, as the host has it.
        error: io::Error,
        /// The server's own words, if any.
        message: String,
    },
    #[error("{address}: the connection was lost: {cause}")]
    Lost { address: String, cause: Arc<str> },
    #[error("{address}: the connection was lost ({cause}), and cannot be made again: {now}")]
    LostForNow { address: String, cause: Arc<str>, now: Arc<str> },
    #[error(
        "{address}: the connection was lost before what had been written was flushed; it must be written again"
    )]
    Unflushed { address: String },
    #[error("{address}: the export is read-only, or is used as such")]
    ReadOnly { address: String },
    #[error("{address}: the export has no such range: {len} bytes at {offset}")]
    Range { address: String, offset: u64, len: u64 },
}

impl NbdIoError {
    pub(super) fn refused(address: &NbdAddress, what: String, refusal: ServerError) -> io::Error {
        let error = error_of(refusal.errno);
        let kind = match refusal.errno {
            errno::ESHUTDOWN => io::ErrorKind::ConnectionAborted,
            _ => error.kind(),
        };
        let at = refusal.offset.map(|offset| format!(" (at {offset})")).unwrap_or_default();
        let (address, what) = (address.to_string(), what + &at);
        io::Error::new(kind, Self::Refused { address, what, error, message: refusal.message })
    }

    pub(super) fn lost(address: &NbdAddress, cause: &Cause) -> io::Error {
        let text = Self::Lost { address: address.to_string(), cause: cause.text.clone() };
        io::Error::new(cause.kind, text)
    }
}
