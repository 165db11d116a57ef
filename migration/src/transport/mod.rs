//! A connection between source and destination: bytes, and whole runs of guest pages.

pub mod address;
pub mod memory;
pub mod socket;

pub use address::Address;
pub use socket::Listener;

use devices::ram::{GuestAddress, GuestRam};
use std::io;
use std::time::Duration;

/// One connection. Reads and writes wait at most [`Transport::patience`] for the peer to move.
pub trait Transport: Send {
    /// Fills `buffer`.
    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()>;
    /// Sends all of `bytes`.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Fills `len` bytes of guest RAM from `address` on, without a copy in between.
    fn read_pages(&mut self, ram: &GuestRam, address: GuestAddress, len: usize) -> io::Result<()>;
    /// Sends `len` bytes of guest RAM from `address` on; the only copy is the kernel's.
    fn write_pages(&mut self, ram: &GuestRam, address: GuestAddress, len: usize) -> io::Result<()>;
    /// How long the peer may stand still.
    fn patience(&self) -> Duration;
    /// Changes how long the peer may stand still.
    fn set_patience(&mut self, patience: Duration) -> io::Result<()>;
    /// Ends the connection from any thread: blocked calls fail at once.
    fn stopper(&self) -> io::Result<Box<dyn Fn() + Send + Sync>>;
}

/// How long a peer may stand still before the migration fails.
pub const PATIENCE: Duration = Duration::from_secs(10);
