//! Connections between source and destination. From the bottom up:
//!
//! ```text
//! Transport            some bytes at a time: socket.rs, memory.rs (tests); vectored.rs for guest pages
//! channel::Channel     all bytes or an error: partial transfers, stalls, deadlines, cancel
//! unix                 listening on Unix sockets
//! reception            a listener's connections, sorted by their Hello
//! ```
//! Frames, keep-alives and the cause of a failure are [`crate::control`]'s business.

pub mod address;
pub mod channel;
pub mod liveness;
pub mod memory;
pub mod reception;
pub mod socket;
pub mod unix;
pub mod vectored;

pub use address::Address;
pub use channel::{Channel, Throttle};
pub use liveness::Liveness;
pub use socket::{Listener, Peer, SocketTransport};
pub use vectored::PageSlice;

use std::io;
use std::time::Duration;

/// How long a peer may stall before the migration fails.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// A call that moves nothing for this long returns, so that a cancel and a stall are noticed.
pub const TICK: Duration = Duration::from_millis(50);

/// One connection. All calls take `&self`: one thread may read while another writes. A call moves at
/// least one byte, or fails with `WouldBlock` after [`TICK`]; reading 0 bytes is the end.
pub trait Transport: Send + Sync {
    /// Reads some bytes.
    fn receive(&self, into: &mut [u8]) -> io::Result<usize>;
    /// Writes some bytes.
    fn send(&self, bytes: &[u8]) -> io::Result<usize>;
    /// Reads some bytes straight into guest RAM, in the order of `pages`.
    fn receive_pages(&self, pages: &[PageSlice<'_>]) -> io::Result<usize>;
    /// Writes some bytes of `head`, then of guest RAM in the order of `pages`.
    fn send_pages(&self, head: &[u8], pages: &[PageSlice<'_>]) -> io::Result<usize>;
    /// How long the peer may stall.
    fn patience(&self) -> Duration;
    /// Ends the connection both ways, from any thread: blocked calls return at once.
    fn shutdown(&self);
}
