//! The boot payload: kernel and initrd (or modules), needed again when the guest is reset.
//!
//! ```text
//! source                                     destination
//! Setup: each file's role, size, SHA-256 ──▶ has it? (--kernel, an earlier hop)
//!                                        ◀── Setup: which files are wanted
//! Part: a piece of a wanted file… ─────────▶ into an unlinked file
//!                                        ◀── Part: everything is written
//! End ─────────────────────────────────────▶ digests match
//! ```
//! It is sent on the control connection while the guest runs, in pieces short enough not to delay other
//! frames. The VMM implements [`BootSource`] and [`BootSink`], which know the files. The command line is
//! part of the machine description.

pub mod frame;
pub mod incoming;
pub mod outgoing;

use crate::destination::GoOn;
use crate::guest::GuestError;
use std::io;

/// Name of the payload's sections.
pub const SECTION: &str = "boot";
/// Most files of a payload.
pub const MAX_FILES: u8 = 64;
/// Most bytes of a piece.
pub const PIECE_BYTES: u32 = 256 << 10;
/// Longest argument string of a file.
pub const MAX_ARGUMENT_BYTES: u16 = u16::MAX;

/// What a boot file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FileRole {
    /// The kernel; there is exactly one, and it is the first.
    Kernel = 1,
    /// The initial ramdisk.
    Initrd,
    /// A Multiboot module.
    Module,
}

/// Identity of a boot file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub role: FileRole,
    pub len_bytes: u64,
    pub sha256: [u8; 32],
    /// Arguments passed to the guest with the file. Never opened as a path.
    pub arguments: String,
}

/// A source's boot files.
pub trait BootSource: Send {
    /// Their identities. May read all of them; gives up once `go_on` returns false.
    fn identities(&mut self, go_on: GoOn<'_>) -> Result<Vec<Identity>, GuestError>;
    /// Fills `into` from `offset_bytes` of file number `file` on.
    fn read_at(&self, file: usize, offset_bytes: u64, into: &mut [u8]) -> io::Result<()>;
}

/// Where a destination puts boot files.
pub trait BootSink: Send {
    /// Checks the announcement and returns the indices of the missing files. May read the files it has;
    /// gives up once `go_on` returns false.
    fn announce(
        &mut self,
        identities: Vec<Identity>,
        go_on: GoOn<'_>,
    ) -> Result<Vec<usize>, GuestError>;
    /// Writes the next piece of a missing file. Pieces come in order.
    fn write(&mut self, file: usize, offset_bytes: u64, bytes: &[u8]) -> Result<(), GuestError>;
    /// All pieces were written: verifies every file's digest.
    fn finish(&mut self) -> Result<(), GuestError>;
}
