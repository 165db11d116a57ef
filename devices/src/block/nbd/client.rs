//! A disk on an NBD server: a backend like a file, for a job's target or a disk of its own.
//!
//! ```text
//! NbdClient      BlockBackend: splits requests, keeps the last block status     this file
//!  └ Shared      the session now, reconnecting, interrupting                     shared.rs
//!     └ Session  1 or more connections, made and lost together                      session.rs
//!        └ Connection   requests in flight, replies by cookie                    connection.rs, reply.rs
//!           └ Wire      bytes, deadlines                                         wire.rs; handshake.rs
//! ```
//! It has no thread: who waits for a reply reads for all. Nothing waits for ever, whatever the server does:
//!
//! | what | bound |
//! |---|---|
//! | connect and handshake | [`NbdOptions::connect_timeout`] |
//! | a connection with requests in flight that makes no progress | [`NbdOptions::stall_timeout`] |
//! | requests after a connection was lost | fail at once with its cause; one attempt per [`NbdOptions::reconnect_interval`] |
//! | all of it | [`NbdControl::interrupt`] |

mod connection;
mod extents;
mod failure;
mod handshake;
mod reply;
mod session;
mod shared;
mod unflushed;
mod wire;

pub use failure::{NbdIoError, NbdOpenError, OpenReason};

use super::address::NbdAddress;
use super::protocol::{command, command_flag, errno, transmission_flag};
use crate::block::backend::{
    BackingChain, BlockBackend, ByteRange, Content, Extent, LockError, write_zeroes_as_data,
};
use crate::block::bitmap::DirtyBitmap;
use connection::Order;
use extents::ExtentCache;
use failure::{RequestError, ServerError};
use reply::Answer;
use session::Session;
use shared::Shared;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How to use an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdOptions {
    /// For connecting and the handshake together.
    pub connect_timeout: Duration,
    /// A connection with requests in flight is lost once the server has made no progress for this long.
    pub stall_timeout: Duration,
    /// Least time between two attempts to connect again.
    pub reconnect_interval: Duration,
    /// Connections at most, to a server that says that it can share them. `None` is what pays: one to a Unix
    /// socket, where further ones only take turns, and two over TCP, where sending costs most.
    pub max_connections: Option<usize>,
    /// Whether writes are refused even if the server takes them.
    pub read_only: bool,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            reconnect_interval: Duration::from_secs(1),
            max_connections: None,
            read_only: false,
        }
    }
}

/// An export of an NBD server, in use. Dropping it takes leave of the server, without waiting for it.
#[derive(Debug)]
pub struct NbdClient {
    shared: Arc<Shared>,
    extents: ExtentCache,
}

/// What a job keeps of its target, to control it from another thread. Does not keep the connection open.
#[derive(Debug, Clone)]
pub struct NbdControl(Arc<Shared>);

impl NbdControl {
    /// Fails every request, those that wait and those to come, at once and for good: the job that made them is
    /// being cancelled. What the server makes of requests in flight is unknown.
    pub fn interrupt(&self) {
        self.0.interrupt();
    }

    /// Whether requests reach the server, as far as is known.
    pub fn is_connected(&self) -> bool {
        self.0.is_connected()
    }

    /// What was written but not flushed when a connection was lost, if anything: the server may have died, and
    /// that with it. Until it is taken, every flush fails. The caller must write these ranges again.
    pub fn take_lost_writes(&self) -> Option<DirtyBitmap> {
        self.0.lost_writes.take()
    }
}

impl NbdClient {
    /// Connects to an export.
    ///
    /// # Errors
    /// Within [`NbdOptions::connect_timeout`]; also if the export cannot be a disk: its size is not in whole
    /// sectors, or it takes no accesses as small as a sector.
    pub fn open(address: &NbdAddress, options: NbdOptions) -> Result<Self, NbdOpenError> {
        let shared = Arc::new(Shared::open(address, options)?);
        Ok(Self { shared, extents: ExtentCache::default() })
    }

    /// A handle to control it from elsewhere.
    pub fn control(&self) -> NbdControl {
        NbdControl(self.shared.clone())
    }

    /// The export's address.
    pub fn address(&self) -> &NbdAddress {
        &self.shared.address
    }

    /// Connections in use; 0 if it is not connected.
    pub fn connection_count(&self) -> usize {
        self.shared.connection_count()
    }

    fn error(&self, session: &Arc<Session>, order: &Order<'_>, error: RequestError) -> io::Error {
        match error {
            RequestError::Refused(refusal) => {
                NbdIoError::refused(&self.shared.address, describe(order), refusal)
            }
            RequestError::Lost(cause) => {
                self.shared.note_lost(session, &cause);
                NbdIoError::lost(&self.shared.address, &cause)
            }
        }
    }

    /// The session to make a request of this range with.
    fn session(&self, offset: u64, len: u64) -> io::Result<Arc<Session>> {
        if offset.checked_add(len).is_none_or(|end| end > self.len_bytes()) {
            let address = self.location();
            let error = NbdIoError::Range { address, offset, len };
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        self.shared.session()
    }

    /// The same for a request that changes the disk.
    fn session_to_change(&self, offset: u64, len: u64) -> io::Result<Arc<Session>> {
        if self.read_only() {
            let error = NbdIoError::ReadOnly { address: self.location() };
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, error));
        }
        self.session(offset, len)
    }

    /// Makes a request that changes the disk.
    fn change(&self, session: &Arc<Session>, order: &Order<'_>) -> Result<(), RequestError> {
        let result = session.perform(*order, Answer::Done);
        let range = ByteRange { offset_bytes: order.offset, len_bytes: order.len.into() };
        self.note_change(session, range, result.is_ok());
        result
    }

    fn note_change(&self, session: &Session, range: ByteRange, is_acknowledged: bool) {
        self.extents.forget();
        if is_acknowledged && session.export.has(transmission_flag::SEND_FLUSH) {
            session.unflushed.add(range);
            self.shared.settle(session);
        }
    }
}

fn describe(order: &Order<'_>) -> String {
    let what = match order.command {
        command::READ => "a read",
        command::WRITE => "a write",
        command::TRIM => "a trim",
        command::WRITE_ZEROES => "a write of zeroes",
        command::BLOCK_STATUS => "to tell the block status",
        _ => return "a flush".into(),
    };
    format!("{what} of {} bytes at {}", order.len, order.offset)
}

/// A range in pieces of at most `most` bytes, cut at multiples of it: offset and length of each.
fn pieces(offset: u64, len: u64, most: u32) -> impl Iterator<Item = (u64, u32)> + Clone {
    let (end, most_bytes) = (offset + len, u64::from(most));
    let next = move |start: &u64| Some((start / most_bytes + 1) * most_bytes);
    let starts = std::iter::successors(Some(offset), next).take_while(move |start| *start < end);
    starts.map(move |start| {
        let stop = ((start / most_bytes + 1) * most_bytes).min(end);
        (start, u32::try_from(stop - start).unwrap_or(most))
    })
}

/// Bytes of one write that are in flight at once.
const MOST_IN_FLIGHT: usize = 32 << 20;

/// Whether it can be done in another way.
fn is_unsupported(error: &RequestError) -> bool {
    matches!(error, RequestError::Refused(ServerError { errno: errno::ENOTSUP, .. }))
}

impl BlockBackend for NbdClient {
    fn location(&self) -> String {
        self.shared.address.to_string()
    }

    /// QEMU calls an export `nbd`, and the format in it, which is what is asked for here, `raw`.
    fn format(&self) -> &'static str {
        "raw"
    }

    fn backing(&self) -> Option<Arc<dyn BackingChain>> {
        None
    }

    /// Whether the server does is not known; there is no cache on this side.
    fn is_direct(&self) -> bool {
        false
    }

    fn len_bytes(&self) -> u64 {
        self.shared.export.len_bytes
    }

    fn read_only(&self) -> bool {
        self.shared.is_read_only()
    }

    fn read_at(&self, mut buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let session = self.session(offset_bytes, buffer.len() as u64)?;
        let most = session.export.max_data_bytes;
        for (offset, len) in pieces(offset_bytes, buffer.len() as u64, most) {
            let (now, later) = buffer.split_at_mut(len as usize);
            let order = Order { command: command::READ, flags: 0, offset, len, data: &[] };
            let read = session.perform(order, Answer::Data { offset, buffer: now });
            read.map_err(|error| self.error(&session, &order, error))?;
            buffer = later;
        }
        Ok(())
    }

    fn write_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()> {
        let session = self.session_to_change(offset_bytes, buffer.len() as u64)?;
        let mut start = offset_bytes;
        for part in buffer.chunks(MOST_IN_FLIGHT) {
            let range = ByteRange { offset_bytes: start, len_bytes: part.len() as u64 };
            let pieces = pieces(start, range.len_bytes, session.export.write_piece_bytes);
            let orders = pieces.scan(part, |left, (offset, len)| {
                let (data, later) = left.split_at(len as usize);
                *left = later;
                Some(Order { command: command::WRITE, flags: 0, offset, len, data })
            });
            let written = session.perform_all(orders);
            self.note_change(&session, range, written.is_ok());
            written.map_err(|(order, error)| self.error(&session, &order, error))?;
            start = range.end();
        }
        Ok(())
    }

    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        let session = self.session_to_change(offset_bytes, len_bytes)?;
        // Advisory: a server that cannot does not.
        if !session.export.has(transmission_flag::SEND_TRIM) {
            return Ok(());
        }
        for (offset, len) in pieces(offset_bytes, len_bytes, session.export.max_range_bytes) {
            let order = Order { command: command::TRIM, flags: 0, offset, len, data: &[] };
            match self.change(&session, &order) {
                Err(error) if is_unsupported(&error) => return Ok(()),
                trimmed => trimmed.map_err(|error| self.error(&session, &order, error))?,
            }
        }
        Ok(())
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()> {
        let session = self.session_to_change(offset_bytes, len_bytes)?;
        if !session.export.has(transmission_flag::SEND_WRITE_ZEROES) {
            return write_zeroes_as_data(self, offset_bytes, len_bytes);
        }
        let flags = if may_unmap { 0 } else { command_flag::NO_HOLE };
        for (offset, len) in pieces(offset_bytes, len_bytes, session.export.max_range_bytes) {
            let order = Order { command: command::WRITE_ZEROES, flags, offset, len, data: &[] };
            match self.change(&session, &order) {
                Err(error) if is_unsupported(&error) => {
                    write_zeroes_as_data(self, offset, len.into())?;
                }
                zeroed => zeroed.map_err(|error| self.error(&session, &order, error))?,
            }
        }
        Ok(())
    }

    /// One answer of the server is kept until the next write through this backend.
    fn extent_at(&self, offset_bytes: u64) -> io::Result<Extent> {
        let session = self.session(offset_bytes, 1)?;
        let rest = self.len_bytes() - offset_bytes;
        let Some(context) = session.export.allocation else {
            return Ok(Extent { len_bytes: rest, content: Content::Data });
        };
        let generation = match self.extents.find(offset_bytes) {
            Ok(extent) => return Ok(extent),
            Err(generation) => generation,
        };
        let most = session.export.max_range_bytes;
        let len = u32::try_from(rest).unwrap_or(most).min(most);
        let command = command::BLOCK_STATUS;
        let order = Order { command, flags: 0, offset: offset_bytes, len, data: &[] };
        let mut list = Vec::new();
        let told = session.perform(order, Answer::Status { context, extents: &mut list });
        told.map_err(|error| self.error(&session, &order, error))?;
        Ok(self.extents.learn(generation, offset_bytes, self.len_bytes(), &list))
    }

    /// What the server allocates is not known.
    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.len_bytes())
    }

    fn plain_file(&self) -> Option<(Arc<File>, usize)> {
        None
    }

    /// There is no cache on this side.
    fn write_back(&self) -> io::Result<()> {
        Ok(())
    }

    /// A flush on one connection covers what was acknowledged on all of them: there are several only where the
    /// server says so. One that knows no flush has nothing to flush.
    ///
    /// # Errors
    /// Also if a connection was lost before earlier writes were flushed: see [`NbdControl::take_lost_writes`].
    fn flush(&self) -> io::Result<()> {
        let session = self.session(0, 0)?;
        self.shared.check_lost_writes()?;
        if !session.export.has(transmission_flag::SEND_FLUSH) {
            return Ok(());
        }
        let unflushed = session.unflushed.take();
        let order = Order { command: command::FLUSH, flags: 0, offset: 0, len: 0, data: &[] };
        session.perform(order, Answer::Done).map_err(|error| {
            session.unflushed.add_all(unflushed);
            self.shared.settle(&session);
            self.error(&session, &order, error)
        })
    }

    /// The image is the server's, and so is its lock: NBD has no request for either.
    fn lock(&self) -> Result<(), LockError> {
        Ok(())
    }

    /// See [`NbdClient::lock`].
    fn unlock(&self) {}
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        self.shared.close();
    }
}

#[cfg(test)]
mod tests;
