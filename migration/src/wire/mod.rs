//! The grammar of the stream. The control connection carries frames both ways; data channels carry page
//! frames one way ([`crate::ram::frame`]); the frames of the disks' channel are in
//! [`crate::block::frame`]. Pure: no I/O.
//!
//! ```text
//! source ─▶ destination                     destination ─▶ source
//! control  Hello                            Hello
//! data     Hello                            Hello              (each data channel)
//! disks    Hello                            Hello              (if disks migrate)
//! control  Machine                          Accepted | Refused
//! control  Section(NAME, Setup)             Section(NAME, Setup), if NAME's Setup is answered
//! control  Section(NAME, Part)…                                any number, while the guest runs
//! disks    chunks… Mark                     Alive… Flushed     all once, then what became dirty
//! data     Pages… Mark(n)                   control: Mark(n)   once per round
//!   ── the guest is paused: attempt k ──
//! control  Section(device, Full)
//! disks    chunks… End
//! data     Pages… End
//! control  Section(NAME, End)… · Eof(k)     Ready(k) | Refused
//!   ── or the stop is called off: CalledOff, the guest runs on, rounds go on, attempt k + 1 comes ──
//! control  Go                               Running | Declined | Refused
//!   ── only if a participant has something that could wait: the guest runs there ──
//! control  Section(NAME, Postcopy)… · AllSent    Complete
//!          KeepAlive, Abort at any time     KeepAlive, Refused at any time
//!
//! frame  kind u8 · 0 u8 · 0 u16 · payload bytes u32 · payload        all integers little-endian
//! ```
//!
//! **Why this order in the pause.** Device records go first: the destination restores vCPUs while the last
//! pages are sent, and what saving the devices wrote into RAM (queue rings) is found by the last harvest of
//! the dirty log, which follows. Disk locks are released before `Eof`, because the destination takes them
//! before it sends `Ready`; and `Ready` precedes `Go`, because nothing may fail after `Go`.
//!
//! **Why attempts are numbered.** A `Ready` in flight when its stop is called off must not be taken for
//! that of the next attempt.
//!
//! **Why marks.** The source waits for the answer to a mark at the end of each round. So the measured
//! bandwidth is what the destination has really received, and the pause never begins with megabytes still
//! in socket buffers.

mod codec;
mod error;
pub mod hello;
pub mod section;

pub use codec::{Decoder, Encoder};
pub use error::WireError;
pub use hello::{Hello, MigrationId, Role, VERSION};

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 8;
/// Longest machine description.
pub const MAX_MACHINE_BYTES: u32 = 1 << 20;
/// Longest section.
pub const MAX_SECTION_BYTES: u32 = 16 << 20;
/// Longest reason for a refusal or an end.
pub const MAX_REASON_BYTES: u32 = 4 << 10;
const EOF_BYTES: u32 = 1 + 4;

/// What a frame of the control connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The first frame on every connection.
    Hello = 1,
    /// The machine description, JSON.
    Machine,
    /// A part of a participant's state.
    Section,
    /// Everything is sent.
    Eof,
    /// The right to run.
    Go,
    /// No content: the sender is alive.
    KeepAlive,
    /// The source gives up; with the reason.
    Abort,
    /// The machine is built.
    Accepted,
    /// All page frames before mark `n` are in place.
    Mark,
    /// Everything is loaded; nothing can fail any more.
    Ready,
    /// The guest runs at the destination.
    Running,
    /// The destination fails, with the reason, and will never run the guest.
    Refused,
    /// `Go` arrived, but the guest does not start: the right to run goes back, with the reason.
    Declined,
    /// The stop took too long: the guest runs on at the source, and another attempt follows.
    CalledOff,
    /// Everything that could wait for the handover is sent, too.
    AllSent,
    /// It has arrived; with what has not, as text, if there is such.
    Complete,
}

impl Kind {
    const ALL: [Self; 16] = [
        Self::Hello,
        Self::Machine,
        Self::Section,
        Self::Eof,
        Self::Go,
        Self::KeepAlive,
        Self::Abort,
        Self::Accepted,
        Self::Mark,
        Self::Ready,
        Self::Running,
        Self::Refused,
        Self::Declined,
        Self::CalledOff,
        Self::AllSent,
        Self::Complete,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// Most bytes of a payload, checked before any is allocated.
    pub fn max_bytes(self) -> u32 {
        match self {
            Self::Hello => hello::MAX_HELLO_BYTES,
            Self::Machine => MAX_MACHINE_BYTES,
            Self::Section => MAX_SECTION_BYTES,
            Self::Eof => EOF_BYTES,
            // Of the attempt.
            Self::Ready => 4,
            // Its number, and the channel.
            Self::Mark => 10,
            Self::Abort | Self::Refused | Self::Declined | Self::Complete => MAX_REASON_BYTES,
            Self::Go | Self::KeepAlive | Self::Accepted | Self::CalledOff | Self::AllSent => 0,
            // Microseconds that it took to start the guest, or nothing.
            Self::Running => 8,
        }
    }
}

/// A frame of the control connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    pub payload: Vec<u8>,
}

impl Frame {
    /// Its kind, for error messages.
    pub fn describe(&self) -> String {
        format!("{:?}", self.kind)
    }

    /// The payload as text, for reasons.
    pub fn reason(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }
}

/// Appends a frame to `bytes`. Fails if it is too long.
pub fn append_frame(bytes: &mut Vec<u8>, kind: Kind, payload: &[u8]) -> Result<(), WireError> {
    let most = kind.max_bytes();
    let len = u32::try_from(payload.len()).ok().filter(|len| *len <= most);
    let too_long =
        WireError::TooLong { what: "frame", found: payload.len() as u64, most: most.into() };
    bytes.extend_from_slice(&header(kind, len.ok_or(too_long)?));
    bytes.extend_from_slice(payload);
    Ok(())
}

/// A frame's header.
pub fn header(kind: Kind, len: u32) -> [u8; HEADER_BYTES] {
    let mut encoder = Encoder::default();
    encoder.u8(kind as u8).u8(0).u16(0).u32(len);
    let mut bytes = [0; HEADER_BYTES];
    bytes.copy_from_slice(encoder.bytes());
    bytes
}

/// Reads a header: the kind, and a length within the kind's bounds.
pub fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Result<(Kind, u32), WireError> {
    let mut decoder = Decoder::new("frame header", bytes);
    let (kind, zeroes) = (decoder.u8()?, (decoder.u8()?, decoder.u16()?));
    let len = decoder.u32()?;
    let kind = Kind::from_byte(kind)
        .filter(|_| zeroes == (0, 0))
        .ok_or_else(|| decoder.malformed(format!("{bytes:02x?}")))?;
    if len > kind.max_bytes() {
        let (found, most) = (len.into(), kind.max_bytes().into());
        return Err(WireError::TooLong { what: "frame", found, most });
    }
    Ok((kind, len))
}

/// Shortens a reason to what a frame may carry.
pub fn fit_reason(reason: &str) -> &str {
    let most = reason.len().min(MAX_REASON_BYTES as usize);
    // Offset 0 is always a boundary.
    let end = (0..=most).rev().find(|at| reason.is_char_boundary(*at));
    &reason[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_reads_back_or_is_refused(bytes in any::<[u8; HEADER_BYTES]>()) {
            if let Ok((kind, len)) = decode_header(&bytes) {
                prop_assert!(len <= kind.max_bytes());
                prop_assert_eq!(header(kind, len), bytes);
            }
        }
    }

    #[test]
    fn every_kind_reads_back() {
        for kind in Kind::ALL {
            assert_eq!(decode_header(&header(kind, 0)).unwrap(), (kind, 0));
            let len = kind.max_bytes() + 1;
            assert!(matches!(decode_header(&header(kind, len)), Err(WireError::TooLong { .. })));
        }
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let reason = "ä".repeat(3000);
        assert_eq!(fit_reason(&reason).len(), 4096);
        assert_eq!(fit_reason(&format!("x{reason}")).len(), 4095);
    }
}
