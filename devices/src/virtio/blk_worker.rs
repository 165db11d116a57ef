//! Serves a virtio-blk queue: descriptor chain -> [`Request`] -> [`BlockNode`] -> used.
//!
//! **A pause waits for a bounded number of bytes**, whatever the guest has asked for. Requests go into the
//! [`Ring`] up to `MAX_BYTES_IN_FLIGHT`; a longer one is in flight alone, in pieces; one that cannot use
//! the ring is also served in pieces, one at a time. A request that must yield between two pieces is *put
//! back*: the queue returns to its entry in the available ring. It is served again from its start, here
//! when the guest resumes, or at the migration's destination. That is correct because
//! - no later entry has been taken from the ring: none is taken while it is served;
//! - it has not been answered, so its buffers are still the device's, and the guest assumes nothing
//!   about what it reads, or about the part of the disk that it writes;
//! - reads, writes, discards and zeroes come to the same when they are made twice, and whatever was
//!   written has been marked dirty, in RAM or on the disk.
//!
//! A request that was kept after an error is no longer the last one taken: it is kept once more.

use super::blk_request::{
    DISCARD_LIMITS, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, ID_BYTES, RANGE_BYTES, RANGE_F_UNMAP,
    RangeLimits, Request, S_IOERR, S_OK, S_UNSUPP, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT,
    T_WRITE_ZEROES, Ticket, WRITE_ZEROES_LIMITS,
};
use super::chains::{give_back, take_all};
use super::{BrokenQueue, QueueHost, QueueProcessor};
use crate::block::aligned::AlignedBuffer;
use crate::block::failure::{Action, Kept};
use crate::block::uring::{Completion, End, Operation, Ring, Transfer};
use crate::block::{Access, AccessKind, BlockNode, SECTOR_BYTES};
use crate::log_limit::LogLimit;
use crate::ram::GuestRam;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::sync::Arc;
use virtio_queue::{Queue, QueueOwnedT};
use vm_memory::Bytes;

/// Data moves through a buffer of this size, which fits in a core's second-level cache.
const BUFFER_BYTES: usize = 128 << 10;
/// Discards and zeroes are made in pieces that end at multiples of this: a multiple of an image's
/// clusters, and little enough to be written where there is no quicker way to make zeroes.
const RANGE_PIECE_BYTES: u64 = 4 << 20;

/// Why a request did not succeed.
#[derive(Debug)]
enum Failed {
    /// The request is invalid: `S_IOERR`.
    Guest(&'static str),
    /// The request is not supported: `S_UNSUPP`.
    Unsupported(&'static str),
    /// The disk failed: `S_IOERR`.
    Host(io::Error),
    /// It had to yield between two pieces: not completed, served again later.
    Interrupted,
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

/// A failed request that is retried when the guest resumes.
#[derive(Debug)]
enum Held {
    /// The part that is still to be done.
    Transfer(Ticket, Transfer),
    Request(Request),
}

/// One range of a discard or write-zeroes request, checked.
struct ZeroRange {
    offset_bytes: u64,
    len_bytes: u64,
    unmap: bool,
}

/// Serves one queue: through a [`Ring`] where possible, otherwise request by request through a buffer.
pub(super) struct Processor {
    node: Arc<BlockNode>,
    buffer: AlignedBuffer,
    /// `None` if io_uring is not available.
    ring: Option<Ring<Ticket>>,
    driver_features: u64,
    held: Vec<(Held, Kept)>,
    /// Length of the next request, which did not fit in the ring and was put back.
    next_bytes: usize,
    bad_request: LogLimit,
}

impl QueueProcessor for Processor {
    fn process(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
    ) -> Result<(), BrokenQueue> {
        loop {
            self.take_back(ram, queue, host, Long::Continue)?;
            if !self.takes_more() {
                return Ok(());
            }
            self.next_bytes = 0;
            self.try_again(ram, queue, host)?;
            take_all(ram, queue, host, |queue, host, chain| {
                let request = Request::parse(ram, chain)?;
                if self.serve(ram, queue, host, request)?.is_some() {
                    queue.go_to_previous_position();
                    return Ok(ControlFlow::Break(()));
                }
                Ok(if self.takes_more() {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                })
            })?;
            let full = !self.has_room() || self.next_bytes > 0;
            self.submit()?;
            self.take_back(ram, queue, host, Long::Continue)?;
            // A request that did not fit may be in the available ring without another notification.
            if !full || host.must_yield() || self.node.is_stopped() {
                return Ok(());
            }
        }
    }

    fn drain(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
    ) -> Result<(), BrokenQueue> {
        let mut result = Ok(());
        while let Some(ring) = &mut self.ring
            && ring.in_flight() > 0
        {
            let waited = ring.wait().map_err(broken_ring);
            // All must end, even if the queue is broken.
            result = result.and(self.take_back(ram, queue, host, Long::Stop));
            // What has completed is seen nevertheless.
            waited?;
        }
        result
    }

    fn completions(&self) -> Option<RawFd> {
        self.ring.as_ref().map(Ring::descriptor)
    }

    fn in_flight(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.in_flight() > 0)
    }
}

/// What to do with a request of more than `MAX_BYTES_IN_FLIGHT` when a piece of it is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Long {
    /// Submit the next piece, unless the host must yield.
    Continue,
    /// Put the request back.
    Stop,
}

/// Between two pieces of a request: fails if the worker must yield.
fn check_yield(host: &dyn QueueHost) -> Result<(), Failed> {
    if host.must_yield() { Err(Failed::Interrupted) } else { Ok(()) }
}

/// Splits a range at multiples of [`RANGE_PIECE_BYTES`].
fn pieces(range: &ZeroRange) -> impl Iterator<Item = (u64, u64)> {
    let end = range.offset_bytes.saturating_add(range.len_bytes);
    let mut at = range.offset_bytes;
    std::iter::from_fn(move || {
        let start = at;
        at = end.min((start / RANGE_PIECE_BYTES + 1).saturating_mul(RANGE_PIECE_BYTES));
        (start < end).then(|| (start, at - start))
    })
}

/// Bytes of a request's buffers that its transfer has not written.
fn unwritten(ticket: &Ticket, transfer: &Transfer) -> usize {
    match &transfer.operation {
        Operation::Read(segments) => segments.len(),
        Operation::Write { .. } | Operation::Flush => ticket.room,
    }
}

/// Returns the buffers of a transfer to its request.
fn take_buffers(request: &mut Request, operation: Operation) {
    match operation {
        Operation::Read(room) => request.to_guest = room,
        Operation::Write { data, .. } => request.from_guest = data,
        Operation::Flush => {}
    }
}

fn broken_ring(error: io::Error) -> BrokenQueue {
    BrokenQueue(format!("io_uring: {error}"))
}

impl Processor {
    pub(super) fn new(
        node: Arc<BlockNode>,
        driver_features: u64,
        ram: &GuestRam,
        depth: u16,
    ) -> Self {
        let plain = node.access(AccessKind::Read, 0, 0).is_ok_and(|access| access.is_some());
        let ring = plain.then(|| Ring::new(ram.clone(), depth)).transpose();
        let ring = ring.unwrap_or_else(|error| {
            // A guest can trigger this with every start of the device.
            static NO_RING: LogLimit = LogLimit::new();
            if let Some(suppressed) = NO_RING.allow() {
                let id = node.id();
                log::info!("disk {id}: io_uring is not available ({error}); requests are served one by one{suppressed}");
            }
            None
        });
        Self {
            node,
            buffer: AlignedBuffer::new(BUFFER_BYTES),
            ring,
            driver_features,
            held: Vec::new(),
            next_bytes: 0,
            bad_request: LogLimit::new(),
        }
    }

    /// Whether there is room and no error has stopped the guest.
    fn takes_more(&self) -> bool {
        self.has_room() && self.has_room_for(self.next_bytes) && !self.node.is_stopped()
    }

    /// Starts a request, or serves it synchronously. Returns it if there is no room or if it had to yield.
    fn serve(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
        request: Request,
    ) -> Result<Option<Request>, BrokenQueue> {
        let bytes = request.from_guest.len().max(request.to_guest.len());
        if !self.has_room_for(bytes) {
            self.next_bytes = bytes;
            return Ok(Some(request));
        }
        let Some(mut request) = self.start(request) else { return Ok(None) };
        // Serving consumes the request.
        let whole = request.clone();
        let result = self.execute(ram, host, &mut request);
        if let Err(Failed::Interrupted) = result {
            return Ok(Some(whole));
        }
        match self.decide(&request.ticket, result) {
            None => self.hold(Held::Request(whole)),
            Some(result) => {
                let left = request.to_guest.len();
                self.answer(ram, queue, host, request.ticket, left, result)?;
            }
        }
        Ok(None)
    }

    /// Keeps a failed request for a retry.
    fn hold(&mut self, mut held: Held) {
        let (Held::Transfer(ticket, _) | Held::Request(Request { ticket, .. })) = &mut held;
        ticket.was_kept = true;
        self.held.push((held, self.node.keep_failed()));
    }

    /// Retries the requests that were kept, once the guest has resumed.
    fn try_again(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
    ) -> Result<(), BrokenQueue> {
        for (held, kept) in std::mem::take(&mut self.held) {
            match held {
                held if !self.takes_more() => self.held.push((held, kept)),
                Held::Request(request) => {
                    let again = self.serve(ram, queue, host, request)?.map(Held::Request);
                    self.held.extend(again.map(|held| (held, kept)));
                }
                Held::Transfer(ticket, transfer) => {
                    let refused = match &mut self.ring {
                        Some(ring) => ring.push(transfer, ticket).err(),
                        None => Some((transfer, ticket)),
                    };
                    let Some((transfer, ticket)) = refused else { continue };
                    let again = if self.in_flight() {
                        Some(Held::Transfer(ticket, transfer))
                    } else {
                        // There is room: it is its buffers that the ring refuses, and always will.
                        self.serve_rest(ram, queue, host, ticket, transfer)?.map(Held::Request)
                    };
                    self.held.extend(again.map(|held| (held, kept)));
                }
            }
        }
        Ok(())
    }

    /// Serves the rest of a short transfer synchronously. Returns it if it had to yield.
    fn serve_rest(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
        mut ticket: Ticket,
        transfer: Transfer,
    ) -> Result<Option<Request>, BrokenQueue> {
        if !transfer.offset_bytes.is_multiple_of(SECTOR_BYTES) {
            let (left, error) = (unwritten(&ticket, &transfer), io::ErrorKind::UnexpectedEof);
            let failed = Err(Failed::Host(error.into()));
            self.answer(ram, queue, host, ticket, left, failed)?;
            return Ok(None);
        }
        ticket.sector = transfer.offset_bytes / SECTOR_BYTES;
        let (from_guest, to_guest) = Default::default();
        let mut request = Request { ticket, from_guest, to_guest };
        take_buffers(&mut request, transfer.operation);
        self.serve(ram, queue, host, request)
    }

    /// The result to report to the guest; `None` if the request is kept.
    fn decide(&self, ticket: &Ticket, result: Result<(), Failed>) -> Option<Result<(), Failed>> {
        let Err(Failed::Host(error)) = &result else { return Some(result) };
        match self.node.decide(matches!(ticket.kind, T_IN | T_GET_ID), error) {
            Action::Report => Some(result),
            Action::Ignore => Some(Ok(())),
            Action::Stop => None,
        }
    }

    fn has_room(&self) -> bool {
        self.ring.as_ref().is_none_or(Ring::has_room)
    }

    fn has_room_for(&self, bytes: usize) -> bool {
        self.ring.as_ref().is_none_or(|ring| ring.has_room_for(bytes))
    }

    /// Submits a request to the ring, or returns it to be served synchronously, which also reports invalid
    /// ones.
    fn start(&mut self, mut request: Request) -> Option<Request> {
        let Ok(Some((access, offset_bytes))) = self.admit(&request) else { return Some(request) };
        let Some(ring) = &mut self.ring else { return Some(request) };
        let (kind, operation) = match request.ticket.kind {
            T_IN => (AccessKind::Read, Operation::Read(std::mem::take(&mut request.to_guest))),
            T_OUT => {
                let data = std::mem::take(&mut request.from_guest);
                // A driver without flush considers every completed write durable.
                let durable = self.driver_features & F_FLUSH == 0;
                (AccessKind::Write, Operation::Write { data, durable })
            }
            _ => (AccessKind::Flush, Operation::Flush),
        };
        let len_bytes = operation.bytes_left() as u64;
        let transfer = Transfer { access, operation, offset_bytes };
        let Err((transfer, _)) = ring.push(transfer, request.ticket) else {
            self.node.count(kind, len_bytes);
            return None;
        };
        take_buffers(&mut request, transfer.operation);
        Some(request)
    }

    /// Whether a request may use the ring, and its offset in the file.
    fn admit(&self, request: &Request) -> Result<Option<(Access, u64)>, Failed> {
        if self.ring.is_none() {
            return Ok(None);
        }
        let (kind, offset, len) = match request.ticket.kind {
            T_IN => (AccessKind::Read, self.check_read(request)?, request.to_guest.len()),
            T_OUT => (AccessKind::Write, self.check_write(request)?, request.from_guest.len()),
            T_FLUSH => (AccessKind::Flush, 0, 0),
            _ => return Ok(None),
        };
        let access = self.node.access(kind, offset, len as u64)?;
        Ok(access.map(|access| (access, offset)))
    }

    /// Completes the requests that have ended.
    fn take_back(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
        long: Long,
    ) -> Result<(), BrokenQueue> {
        let mut result = Ok(());
        loop {
            let interrupt = long == Long::Stop || host.must_yield();
            let next = self.ring.as_mut().and_then(|ring| ring.next_completion(interrupt));
            let Some(Completion { token: ticket, transfer, end }) = next else { break };
            let ended = match end {
                End::Done => Ok(()),
                End::Failed(error) => Err(Failed::Host(error)),
                End::Interrupted if ticket.was_kept => {
                    self.hold(Held::Transfer(ticket, transfer));
                    continue;
                }
                End::Interrupted => {
                    queue.go_to_previous_position();
                    continue;
                }
            };
            let Some(ended) = self.decide(&ticket, ended) else {
                self.hold(Held::Transfer(ticket, transfer));
                continue;
            };
            let left = unwritten(&ticket, &transfer);
            let answered = self.answer(ram, queue, host, ticket, left, ended);
            result = result.and(answered);
        }
        // Continue short transfers.
        result.and(self.submit())
    }

    fn submit(&mut self) -> Result<(), BrokenQueue> {
        self.ring.as_mut().map_or(Ok(()), Ring::submit).map_err(broken_ring)
    }

    /// Writes the status and returns the chain to the driver; `left` bytes of its buffers were not written.
    fn answer(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
        ticket: Ticket,
        left: usize,
        result: Result<(), Failed>,
    ) -> Result<(), BrokenQueue> {
        if host.is_ending() {
            return Ok(());
        }
        let status = self.status(&ticket, result);
        ram.write_obj(status, ticket.status).map_err(|error| BrokenQueue(error.to_string()))?;
        give_back(ram, queue, host, ticket.head, ticket.room.saturating_sub(left) + 1)
    }

    fn accepted(&self, feature: u64) -> bool {
        self.driver_features & feature != 0
    }

    fn execute(
        &mut self,
        ram: &GuestRam,
        host: &dyn QueueHost,
        request: &mut Request,
    ) -> Result<(), Failed> {
        match request.ticket.kind {
            T_IN => self.read(ram, host, request),
            T_OUT => self.write(ram, host, request),
            T_FLUSH => Ok(self.node.flush()?),
            T_GET_ID => {
                let mut id = [0u8; ID_BYTES];
                id.iter_mut().zip(self.node.id().bytes()).for_each(|(to, from)| *to = from);
                let len = request.to_guest.len().min(ID_BYTES);
                let id = &id[..len];
                request.to_guest.write(ram, id).ok_or(Failed::Guest("no room for an id"))
            }
            T_DISCARD if self.accepted(F_DISCARD) => {
                let ranges = self.ranges(ram, request, DISCARD_LIMITS)?;
                for (offset_bytes, len_bytes) in ranges.iter().flat_map(pieces) {
                    check_yield(host)?;
                    self.node.discard(offset_bytes, len_bytes)?;
                }
                self.finish_write()
            }
            T_WRITE_ZEROES if self.accepted(F_WRITE_ZEROES) => {
                for range in self.ranges(ram, request, WRITE_ZEROES_LIMITS)? {
                    for (offset_bytes, len_bytes) in pieces(&range) {
                        check_yield(host)?;
                        self.node.write_zeroes(offset_bytes, len_bytes, range.unmap)?;
                    }
                }
                self.finish_write()
            }
            _ => Err(Failed::Unsupported("of a type that was not offered")),
        }
    }

    /// The status byte; logs why a request failed.
    fn status(&self, ticket: &Ticket, result: Result<(), Failed>) -> u8 {
        let (id, sector) = (self.node.id(), ticket.sector);
        match result {
            Ok(()) => S_OK,
            Err(Failed::Guest(mistake)) => {
                self.say_bad(ticket, mistake);
                S_IOERR
            }
            Err(Failed::Unsupported(what)) => {
                self.say_bad(ticket, what);
                S_UNSUPP
            }
            // Put back, not completed.
            Err(Failed::Interrupted) => S_IOERR,
            Err(Failed::Host(error)) => {
                if let Some(suppressed) = self.node.error_lines.allow() {
                    log::error!("disk {id}: request at sector {sector}: {error}{suppressed}");
                }
                S_IOERR
            }
        }
    }

    /// Logs an invalid request.
    fn say_bad(&self, ticket: &Ticket, mistake: &str) {
        if log::log_enabled!(log::Level::Debug)
            && let Some(suppressed) = self.bad_request.allow()
        {
            let (id, kind, sector) = (self.node.id(), ticket.kind, ticket.sector);
            log::debug!("disk {id}: request {kind} at sector {sector}: {mistake}{suppressed}");
        }
    }

    /// Byte offset of `sector`, if `len` bytes from there lie on the disk.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failed> {
        let offset = sector.checked_mul(SECTOR_BYTES);
        let end = offset.and_then(|offset| offset.checked_add(len));
        match (offset, end) {
            (Some(offset), Some(end))
                if end <= self.node.len_bytes() && len.is_multiple_of(SECTOR_BYTES) =>
            {
                Ok(offset)
            }
            _ => Err(Failed::Guest("past the end of the disk, or not whole sectors")),
        }
    }

    /// Checks a read; returns its offset.
    fn check_read(&self, request: &Request) -> Result<u64, Failed> {
        if !request.from_guest.is_empty() {
            return Err(Failed::Guest("a read with data to write"));
        }
        self.offset(request.ticket.sector, request.to_guest.len() as u64)
    }

    fn read(
        &mut self,
        ram: &GuestRam,
        host: &dyn QueueHost,
        request: &mut Request,
    ) -> Result<(), Failed> {
        let mut offset = self.check_read(request)?;
        let room = &mut request.to_guest;
        while !room.is_empty() {
            check_yield(host)?;
            let len = room.len().min(self.buffer.len());
            let (piece, _) = self.buffer.split_at_mut(len);
            self.node.read_at(piece, offset)?;
            if host.is_ending() {
                return Err(Failed::Interrupted);
            }
            room.write(ram, piece).ok_or(Failed::Guest("no room for what was read"))?;
            offset += len as u64;
        }
        Ok(())
    }

    /// Checks a write; returns its offset.
    fn check_write(&self, request: &Request) -> Result<u64, Failed> {
        if !request.to_guest.is_empty() {
            return Err(Failed::Guest("a write with room to read"));
        }
        self.check_writable()?;
        self.offset(request.ticket.sector, request.from_guest.len() as u64)
    }

    fn write(
        &mut self,
        ram: &GuestRam,
        host: &dyn QueueHost,
        request: &mut Request,
    ) -> Result<(), Failed> {
        let mut offset = self.check_write(request)?;
        let data = &mut request.from_guest;
        while !data.is_empty() {
            check_yield(host)?;
            let len = data.len().min(self.buffer.len());
            let (piece, _) = self.buffer.split_at_mut(len);
            data.read(ram, piece).ok_or(Failed::Guest("not all data is there"))?;
            self.node.write_at(piece, offset)?;
            offset += len as u64;
        }
        self.finish_write()
    }

    fn check_writable(&self) -> Result<(), Failed> {
        if self.node.read_only() {
            return Err(Failed::Guest("a write to a read-only disk"));
        }
        Ok(())
    }

    /// A driver without flush considers every completed write durable (5.2.6.2).
    fn finish_write(&self) -> Result<(), Failed> {
        if !self.accepted(F_FLUSH) {
            self.node.flush()?;
        }
        Ok(())
    }

    /// The ranges of a discard or write-zeroes request. All are checked before the first is touched.
    #[expect(clippy::little_endian_bytes, reason = "the ranges are little-endian")]
    fn ranges(
        &self,
        ram: &GuestRam,
        request: &mut Request,
        limits: RangeLimits,
    ) -> Result<Vec<ZeroRange>, Failed> {
        if !request.to_guest.is_empty() {
            return Err(Failed::Guest("a discard or write-zeroes with room to read"));
        }
        self.check_writable()?;
        let len = request.from_guest.len();
        let count = len / RANGE_BYTES;
        let most = limits.ranges as usize;
        if count == 0 || count > most || !len.is_multiple_of(RANGE_BYTES) {
            return Err(Failed::Guest("no ranges, too many, or not whole ones"));
        }
        let mut ranges = Vec::with_capacity(count);
        for _ in 0..count {
            let mut bytes = [0u8; RANGE_BYTES];
            let read = request.from_guest.read(ram, &mut bytes);
            read.ok_or(Failed::Guest("not all ranges are there"))?;
            let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            let known = if request.ticket.kind == T_WRITE_ZEROES { RANGE_F_UNMAP } else { 0 };
            if flags & !known != 0 {
                return Err(Failed::Unsupported("with an unknown flag"));
            }
            if sectors > limits.sectors {
                return Err(Failed::Guest("a range that is too long"));
            }
            let len_bytes = u64::from(sectors) * SECTOR_BYTES;
            let offset_bytes = self.offset(u64::from_le_bytes(sector), len_bytes)?;
            ranges.push(ZeroRange { offset_bytes, len_bytes, unmap: flags & RANGE_F_UNMAP != 0 });
        }
        Ok(ranges)
    }
}

#[cfg(test)]
mod long_requests;
#[cfg(test)]
mod tests;
