//! The boot payload: kernel and initrd (or modules), which a guest needs again when it is reset.
//!
//! ```text
//! source                                     destination
//! Setup: each file's role, size, SHA-256 ──▶ has it? (--kernel, an earlier hop)
//!                                        ◀── Setup: which files are wanted
//! Part: a piece of a wanted file… ─────────▶ into an unlinked file
//!                                        ◀── Part: all of it is there
//! End ─────────────────────────────────────▶ digests agree
//! ```
//! It travels on the control connection, while the guest runs, in pieces short enough for what has to be
//! heard at once. What the files are and where they lie is the business of a [`BootSource`] and a
//! [`BootSink`], which the VMM has. The command line is part of the machine's description.

pub mod frame;
pub mod incoming;
pub mod outgoing;

use crate::destination::GoOn;
use crate::guest::GuestError;
use std::io;

/// Names the payload's sections.
pub const SECTION: &str = "boot";
/// Most files of a payload.
pub const MAX_FILES: u8 = 64;
/// Bytes of a piece.
pub const PIECE_BYTES: u32 = 256 << 10;
/// Longest argument string of a file: what Multiboot modules' strings have room for.
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

/// What a boot file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// What it is for.
    pub role: FileRole,
    /// Its size.
    pub len_bytes: u64,
    /// Of its content.
    pub sha256: [u8; 32],
    /// What the guest is told about it. Never a path to be opened.
    pub arguments: String,
}

/// A source's boot files.
pub trait BootSource: Send {
    /// What they are. May read all of them, unless `go_on` says no.
    fn identities(&mut self, go_on: GoOn<'_>) -> Result<Vec<Identity>, GuestError>;
    /// Fills `into` from `offset_bytes` of file number `file` on.
    fn read_at(&self, file: usize, offset_bytes: u64, into: &mut [u8]) -> io::Result<()>;
}

/// Where a destination puts boot files.
pub trait BootSink: Send {
    /// Checks what is announced, and returns the numbers of the files that are not here. May read files
    /// that are, unless `go_on` says no.
    fn announce(
        &mut self,
        identities: Vec<Identity>,
        go_on: GoOn<'_>,
    ) -> Result<Vec<usize>, GuestError>;
    /// The next piece of a file that is missing; pieces come in order.
    fn write(&mut self, file: usize, offset_bytes: u64, bytes: &[u8]) -> Result<(), GuestError>;
    /// All pieces have come: checks that every file is what was announced.
    fn finish(&mut self) -> Result<(), GuestError>;
}
