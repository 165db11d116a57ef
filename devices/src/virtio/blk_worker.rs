//! Serves a virtio-blk queue: descriptor chain -> [`Request`] -> [`BlockNode`] -> used. Requests that cannot
//! use the ring are in [`execute`], and small writes to the page cache, which do not need it ([`at_once`]).
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
//!
//! In the same way a request yields to a drained section of the disk, and the gate wakes the worker when it opens.

use super::blk_request::{
    F_FLUSH, Request, S_IOERR, S_OK, S_UNSUPP, T_FLUSH, T_GET_ID, T_IN, T_OUT, Ticket,
};
use super::chains::{give_back, take_all};
use super::{BrokenQueue, QueueHost, QueueProcessor};
use crate::block::aligned::AlignedBuffer;
use crate::block::failure::{Action, Kept};
use crate::block::gate::Pass;
use crate::block::uring::{Completion, End, Operation, Ring, Transfer};
use crate::block::{Access, AccessKind, BlockNode, SECTOR_BYTES};
use crate::log_limit::LogLimit;
use crate::ram::GuestRam;
use at_once::AtOnce;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;
use virtio_queue::{Queue, QueueOwnedT};
use vm_memory::Bytes;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

mod at_once;
mod execute;

/// Data moves through a buffer of this size, which fits in a core's second-level cache.
const BUFFER_BYTES: usize = 128 << 10;

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

/// Serves one queue: through a [`Ring`] where possible, otherwise request by request through a buffer.
pub(super) struct Processor {
    node: Arc<BlockNode>,
    buffer: AlignedBuffer,
    /// `None` if io_uring is not available.
    ring: Option<Ring<Ticket>>,
    at_once: AtOnce,
    driver_features: u64,
    held: Vec<(Held, Kept)>,
    /// Length of the next request, which did not fit in the ring and was put back.
    next_bytes: usize,
    /// Written when the disk's gate opens, if it was found closed.
    opened: Arc<EventFd>,
    /// Whether that is waited for.
    kept_out: bool,
    bad_request: LogLimit,
}

impl QueueProcessor for Processor {
    fn process(
        &mut self,
        ram: &GuestRam,
        queue: &mut Queue,
        host: &mut dyn QueueHost,
    ) -> Result<(), BrokenQueue> {
        if self.kept_out {
            // Fails if something else woke the worker.
            self.kept_out = self.opened.read().is_err();
        }
        loop {
            self.take_back(ram, queue, host, Long::Continue)?;
            if self.is_kept_out() {
                return self.submit();
            }
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
            let more = full || self.node.gate().is_closed();
            if !more || host.must_yield() || self.node.is_stopped() {
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

    fn wakers(&self) -> Vec<RawFd> {
        let ring = self.ring.as_ref().map(Ring::descriptor);
        ring.into_iter().chain([self.opened.as_raw_fd()]).collect()
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
    ) -> io::Result<Self> {
        let opened = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let ring = node.is_plain().then(|| Ring::new(ram.clone(), depth)).transpose();
        let ring = ring.unwrap_or_else(|error| {
            // A guest can trigger this with every start of the device.
            static NO_RING: LogLimit = LogLimit::new();
            if let Some(suppressed) = NO_RING.allow() {
                let id = node.id();
                log::info!("disk {id}: io_uring is not available ({error}); requests are served one by one{suppressed}");
            }
            None
        });
        Ok(Self {
            node,
            buffer: AlignedBuffer::new(BUFFER_BYTES),
            ring,
            at_once: AtOnce::default(),
            driver_features,
            held: Vec::new(),
            next_bytes: 0,
            opened,
            kept_out: false,
            bad_request: LogLimit::new(),
        })
    }

    /// Whether there is room, the disk admits requests and no error has stopped the guest.
    fn takes_more(&self) -> bool {
        self.has_room()
            && self.has_room_for(self.next_bytes)
            && !self.node.is_stopped()
            && !self.node.gate().is_closed()
    }

    /// Whether the disk's gate is closed. Then `opened` will be written when it opens.
    fn is_kept_out(&mut self) -> bool {
        self.kept_out = self.kept_out || self.node.gate().wake(&self.opened);
        self.kept_out
    }

    /// Whether a request must end between two pieces.
    fn must_yield(&self, host: &dyn QueueHost) -> bool {
        host.must_yield() || self.node.gate().is_closed()
    }

    /// Starts a request, or serves it synchronously. Returns it if there is no room, if the disk does not admit it
    /// or if it had to yield.
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
        let Some(pass) = self.node.gate().enter() else { return Ok(Some(request)) };
        let at_once = self.is_for_at_once(&request).then(Instant::now);
        let at_once = at_once.filter(|now| self.at_once.is_for(bytes, *now));
        let Some((mut request, pass)) = (match at_once {
            Some(_) => Some((request, pass)),
            None => self.start(request, pass),
        }) else {
            return Ok(None);
        };
        // Serving consumes the request.
        let whole = request.clone();
        let result = self.execute(ram, host, &pass, &mut request);
        if let Some(began) = at_once {
            self.at_once.took(began, Instant::now());
        }
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
        if let Held::Transfer(_, transfer) = &mut held {
            // It may have written a part, and the process may end before it is retried.
            transfer.access.end();
        }
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
                Held::Transfer(ticket, mut transfer) => {
                    let (operation, offset) = (&transfer.operation, transfer.offset_bytes);
                    let (kind, left) = (operation.kind(), operation.bytes_left() as u64);
                    let Some(pass) = self.node.gate().enter() else {
                        self.held.push((Held::Transfer(ticket, transfer), kept));
                        continue;
                    };
                    let access = self.node.access(pass, kind, offset, left).ok();
                    let refused = match (&mut self.ring, access) {
                        (Some(ring), Some(access)) => {
                            transfer.access = access;
                            ring.push(transfer, ticket).err()
                        }
                        // The storage may be another one by now.
                        (_, _) => Some((transfer, ticket)),
                    };
                    let Some((mut transfer, ticket)) = refused else { continue };
                    transfer.access.end();
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

    /// Whether a request is a write that completes in the host's page cache.
    fn is_for_at_once(&self, request: &Request) -> bool {
        request.ticket.kind == T_OUT
            && self.ring.is_some()
            // Without flush it would have to be durable, too.
            && self.driver_features & F_FLUSH != 0
            && self.node.is_cached_file()
    }

    /// Submits a request to the ring, or returns it with its pass to be served synchronously, which also reports
    /// invalid ones.
    fn start(&mut self, mut request: Request, pass: Pass) -> Option<(Request, Pass)> {
        let (access, offset_bytes) = match self.admit(&request, pass) {
            Ok(admitted) => admitted,
            Err(pass) => return Some((request, pass)),
        };
        let Some(ring) = &mut self.ring else {
            return access.into_pass().map(|pass| (request, pass));
        };
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
        let Transfer { access, operation, .. } = transfer;
        take_buffers(&mut request, operation);
        access.into_pass().map(|pass| (request, pass))
    }

    /// The access of a request that may use the ring, and its offset in the file; otherwise its pass.
    fn admit(&self, request: &Request, pass: Pass) -> Result<(Access, u64), Pass> {
        if self.ring.is_none() {
            return Err(pass);
        }
        let (kind, offset, len) = match request.ticket.kind {
            T_IN => (AccessKind::Read, self.check_read(request), request.to_guest.len()),
            T_OUT => (AccessKind::Write, self.check_write(request), request.from_guest.len()),
            T_FLUSH => (AccessKind::Flush, Ok(0), 0),
            _ => return Err(pass),
        };
        let Ok(offset) = offset else { return Err(pass) };
        self.node.access(pass, kind, offset, len as u64).map(|access| (access, offset))
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
            let interrupt = long == Long::Stop || self.must_yield(host);
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
}

#[cfg(test)]
mod drained;
#[cfg(test)]
mod long_requests;
#[cfg(test)]
mod tests;
