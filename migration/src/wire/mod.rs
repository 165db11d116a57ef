//! The stream: frames of a kind and a bounded length, in both directions.
//!
//! ```text
//! frame    kind u8 · 0 u8 · 0 u16 · payload length u32 · payload      (little-endian)
//! Hello    magic "FERRYMIG" · version u16            both directions, first
//! Machine  JSON MachineDescription
//! RamSetup page count u64 · page size u32
//! RamBatch run count u32 · raw page count u32 · runs · raw pages
//!   run    first page u64 · page count u32 · kind u32 (0 zero, 1 raw)
//! Devices  JSON array of DeviceRecord
//! RamEnd   raw pages u64 · zero pages u64            all that was sent since RamSetup
//! Eof      guest runs u8
//! Go, KeepAlive, Accepted, Ready, Running: empty
//! Refused  reason, UTF-8
//! ```
//! A destination takes the frames in the order of the drawing in the crate's documentation and
//! refuses any other by name.

use crate::transport::Transport;
use std::io;

mod codec;
pub use codec::{Decoder, Encoder};

/// First bytes of either side.
pub const MAGIC: &[u8; 8] = b"FERRYMIG";
/// Version of the stream.
pub const VERSION: u16 = 1;
const HEADER_BYTES: usize = 8;
const MAX_MACHINE_BYTES: u32 = 1 << 20;
const MAX_DEVICES_BYTES: u32 = 16 << 20;
const MAX_REASON_BYTES: u32 = 4 << 10;
/// Most runs of a batch.
pub const MAX_RUNS: u32 = 4096;
/// Most raw pages of a batch.
pub const MAX_RAW_PAGES: u32 = 4096;
/// Bytes of one run in a batch's table.
pub const RUN_BYTES: u32 = 16;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Magic and version.
    Hello = 1,
    /// The machine description.
    Machine,
    /// RAM's size.
    RamSetup,
    /// Runs of pages.
    RamBatch,
    /// Device records.
    Devices,
    /// Counts of all pages.
    RamEnd,
    /// All is sent.
    Eof,
    /// The right to run.
    Go,
    /// Nothing to say, but alive.
    KeepAlive,
    /// The machine is built.
    Accepted,
    /// All is loaded.
    Ready,
    /// The guest runs here.
    Running,
    /// No, and why.
    Refused,
}

impl Kind {
    const ALL: [Self; 13] = [
        Self::Hello,
        Self::Machine,
        Self::RamSetup,
        Self::RamBatch,
        Self::Devices,
        Self::RamEnd,
        Self::Eof,
        Self::Go,
        Self::KeepAlive,
        Self::Accepted,
        Self::Ready,
        Self::Running,
        Self::Refused,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// Most bytes of a payload, checked before any is allocated.
    fn max_bytes(self) -> u32 {
        match self {
            Self::Hello => 10,
            Self::Machine => MAX_MACHINE_BYTES,
            Self::RamSetup => 12,
            Self::RamBatch => 8 + MAX_RUNS * RUN_BYTES + MAX_RAW_PAGES * 4096,
            Self::Devices => MAX_DEVICES_BYTES,
            Self::RamEnd => 16,
            Self::Eof => 1,
            Self::Refused => MAX_REASON_BYTES,
            Self::Go | Self::KeepAlive | Self::Accepted | Self::Ready | Self::Running => 0,
        }
    }
}

/// What is wrong with a connection or what came over it.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The peer sent no byte, or took none, for too long.
    #[error("the other side has not moved for {seconds} s")]
    Stalled {
        /// How long.
        seconds: u64,
    },
    /// The connection broke.
    #[error("connection lost")]
    Lost(#[source] io::Error),
    /// Not our protocol.
    #[error("the other side is not Ferry")]
    NotFerry,
    /// Another version of it.
    #[error(
        "the other side speaks stream version {theirs}, this one {VERSION}: use the same Ferry"
    )]
    Version {
        /// Its version.
        theirs: u16,
    },
    /// A length past its maximum.
    #[error("{what} of {found} bytes, at most {most} are possible")]
    TooLong {
        /// Which part.
        what: &'static str,
        /// Its length.
        found: u64,
        /// What is possible.
        most: u64,
    },
    /// A frame that does not belong here.
    #[error("unexpected {found} where {expected} belongs")]
    Unexpected {
        /// What came.
        found: String,
        /// What should have come.
        expected: &'static str,
    },
    /// A payload that makes no sense.
    #[error("malformed {what}: {reason}")]
    Malformed {
        /// Which part.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The other side refuses.
    #[error("the other side refuses: {0}")]
    Refused(String),
}

impl WireError {
    /// Names the cause of an I/O error; a timeout is a stall.
    pub(crate) fn from_io(error: io::Error, transport: &dyn Transport) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Self::Stalled { seconds: transport.patience().as_secs() }
            }
            _ => Self::Lost(error),
        }
    }
}

/// Header of a received frame; its payload is still in the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Its length.
    pub len: u32,
}

/// The bytes of a frame's header.
pub fn header(kind: Kind, len: u32) -> [u8; HEADER_BYTES] {
    let mut encoder = Encoder::default();
    encoder.u8(kind as u8).u8(0).u16(0).u32(len);
    let mut bytes = [0; HEADER_BYTES];
    bytes.copy_from_slice(encoder.bytes());
    bytes
}

/// Sends one frame; returns its length with the header.
pub fn send(transport: &mut dyn Transport, kind: Kind, payload: &[u8]) -> Result<u64, WireError> {
    let most = kind.max_bytes();
    let len =
        u32::try_from(payload.len()).ok().filter(|len| *len <= most).ok_or(WireError::TooLong {
            what: "frame",
            found: payload.len() as u64,
            most: most.into(),
        })?;
    let mut bytes = header(kind, len).to_vec();
    bytes.extend_from_slice(payload);
    transport.write_all(&bytes).map_err(|error| WireError::from_io(error, transport))?;
    Ok(bytes.len() as u64)
}

/// Receives a header, checked.
pub fn receive_header(transport: &mut dyn Transport) -> Result<Header, WireError> {
    let mut bytes = [0; HEADER_BYTES];
    transport.read_exact(&mut bytes).map_err(|error| WireError::from_io(error, transport))?;
    let mut decoder = Decoder::new("frame header", &bytes);
    let (kind, zeroes) = (decoder.u8()?, (decoder.u8()?, decoder.u16()?));
    let len = decoder.u32()?;
    let kind = Kind::from_byte(kind).filter(|_| zeroes == (0, 0)).ok_or_else(|| {
        WireError::Malformed { what: "frame header", reason: format!("{bytes:02x?}") }
    })?;
    if len > kind.max_bytes() {
        let (found, most) = (len.into(), kind.max_bytes().into());
        return Err(WireError::TooLong { what: "frame", found, most });
    }
    Ok(Header { kind, len })
}

/// Receives the payload that `header` announces.
pub fn receive_payload(
    transport: &mut dyn Transport,
    header: Header,
) -> Result<Vec<u8>, WireError> {
    let mut payload = vec![0; usize::try_from(header.len).unwrap_or(0)];
    transport.read_exact(&mut payload).map_err(|error| WireError::from_io(error, transport))?;
    Ok(payload)
}

/// Receives a frame of `kind`, past any number of keep-alives; a refusal becomes an error.
pub fn expect(
    transport: &mut dyn Transport,
    kind: Kind,
    expected: &'static str,
) -> Result<Vec<u8>, WireError> {
    loop {
        let header = receive_header(transport)?;
        match header.kind {
            Kind::KeepAlive => {}
            Kind::Refused => {
                let reason = receive_payload(transport, header)?;
                return Err(WireError::Refused(String::from_utf8_lossy(&reason).into_owned()));
            }
            found if found == kind => return receive_payload(transport, header),
            found => {
                return Err(WireError::Unexpected { found: format!("{found:?}"), expected });
            }
        }
    }
}

/// Sends our Hello.
pub fn send_hello(transport: &mut dyn Transport) -> Result<(), WireError> {
    let mut payload = Encoder::default();
    payload.raw(MAGIC).u16(VERSION);
    send(transport, Kind::Hello, payload.bytes()).map(drop)
}

/// Receives and checks the other side's Hello.
pub fn expect_hello(transport: &mut dyn Transport) -> Result<(), WireError> {
    let header = receive_header(transport).map_err(|error| match error {
        WireError::Malformed { .. } | WireError::TooLong { .. } => WireError::NotFerry,
        error => error,
    })?;
    if header.kind == Kind::Refused {
        let reason = receive_payload(transport, header)?;
        return Err(WireError::Refused(String::from_utf8_lossy(&reason).into_owned()));
    }
    if header.kind != Kind::Hello {
        return Err(WireError::NotFerry);
    }
    let payload = receive_payload(transport, header)?;
    let mut decoder = Decoder::new("hello", &payload);
    if decoder.raw(MAGIC.len()).ok() != Some(MAGIC) {
        return Err(WireError::NotFerry);
    }
    match decoder.u16().map_err(|_| WireError::NotFerry)? {
        VERSION => Ok(()),
        theirs => Err(WireError::Version { theirs }),
    }
}

/// Tells the other side why not; it may be gone already.
pub fn refuse(transport: &mut dyn Transport, reason: &str) {
    let most = usize::try_from(MAX_REASON_BYTES).unwrap_or(0);
    let end = (0..=reason.len().min(most)).rev().find(|at| reason.is_char_boundary(*at));
    let reason = reason.get(..end.unwrap_or(0)).unwrap_or_default();
    if let Err(error) = send(transport, Kind::Refused, reason.as_bytes()) {
        log::debug!("the refusal does not reach the other side: {error}");
    }
}
