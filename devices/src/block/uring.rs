//! Asynchronous accesses to a disk's file through io_uring, straight from and to guest RAM.
//!
//! Owned by one queue's worker; [`super::BlockNode::access`] decides which accesses may use it. RAM that a
//! read has filled is marked dirty before its completion is reported, so a migration never misses data that
//! the guest has seen. Unsafe code: guest RAM is passed to the kernel as addresses and must stay mapped
//! until the access completes.
#![allow(unsafe_code)]

use super::{Access, AccessKind};
use crate::ram::GuestRam;
use crate::segments::{Segment, Segments};
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;
use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

/// The kernel's limit of vectors per access (`IOV_MAX`).
const MOST_PIECES: usize = 1024;
/// Limit of bytes in flight: a pause has to wait for them. It allows 32 accesses of 1 MiB, more than it
/// takes to keep a disk busy. A longer access is in flight alone.
pub const MAX_BYTES_IN_FLIGHT: usize = 32 << 20;
/// Limit of bytes submitted at once for one access; the rest follows. Large enough not to slow down
/// sequential access, small enough that a long access stops soon. A multiple of every alignment that a file
/// may require.
pub const MAX_BYTES_AT_ONCE: usize = 4 << 20;

/// An operation on a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Reads into the pieces of RAM.
    Read(Segments),
    /// Writes the pieces of RAM.
    Write {
        /// What to write.
        data: Segments,
        /// Whether completion means that the data is durable (`RWF_DSYNC`).
        durable: bool,
    },
    /// Makes every completed write durable.
    Flush,
}

impl Operation {
    /// As the node knows it.
    pub fn kind(&self) -> AccessKind {
        match self {
            Self::Read(_) => AccessKind::Read,
            Self::Write { .. } => AccessKind::Write,
            Self::Flush => AccessKind::Flush,
        }
    }

    /// Bytes not transferred yet.
    pub fn bytes_left(&self) -> usize {
        match self {
            Self::Read(segments) | Self::Write { data: segments, .. } => segments.len(),
            Self::Flush => 0,
        }
    }
}

/// One access, submitted or about to be.
#[derive(Debug)]
pub struct Transfer {
    /// The admitted access.
    pub access: Access,
    /// What.
    pub operation: Operation,
    /// Position in the file.
    pub offset_bytes: u64,
}

/// The kernel's view of a transfer's memory: `count` vectors, at most [`MOST_PIECES`].
#[derive(Debug, Default)]
struct Pieces {
    vectors: Vec<libc::iovec>,
    count: u32,
}

// SAFETY: the addresses point into guest RAM, which is mapped for the whole process; `Ring` keeps it.
unsafe impl Send for Pieces {}

#[derive(Debug)]
struct Slot<T> {
    transfer: Transfer,
    /// The vectors that the kernel reads; must not move before completion.
    pieces: Pieces,
    /// Its length when it was pushed, which counts as in flight until completion.
    bytes: usize,
    token: T,
}

/// A completed access.
#[derive(Debug)]
pub struct Completion<T> {
    /// The caller's note.
    pub token: T,
    /// The part that was not transferred.
    pub transfer: Transfer,
    /// How it ended.
    pub end: End,
}

/// How an access ended.
#[derive(Debug)]
pub enum End {
    /// Completely.
    Done,
    /// The disk failed.
    Failed(io::Error),
    /// Interrupted before its end; nothing of it is in flight any more.
    Interrupted,
}

/// The kernel copies page cache hits during submission, one read after another. Of several reads at least
/// this long, every other one is forced to a kernel worker (`IOSQE_ASYNC`): on two processors that made
/// sequential reads of 1 MiB 1.5 times as fast.
const MUCH_TO_COPY: usize = 512 << 10;

/// Accesses in flight; `T` is the caller's note of what each is for.
pub struct Ring<T> {
    uring: IoUring,
    ram: GuestRam,
    /// By `user_data` of their entries.
    slots: Vec<Option<Slot<T>>>,
    free: Vec<usize>,
    in_flight: usize,
    bytes_in_flight: usize,
    depth: usize,
}

impl<T> std::fmt::Debug for Ring<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

impl<T> Ring<T> {
    /// A ring for `depth` accesses. Fails if io_uring is missing or not permitted.
    pub fn new(ram: GuestRam, depth: u16) -> io::Result<Self> {
        // The completion queue has twice as many entries, so it never overflows.
        let uring = IoUring::new(depth.into())?;
        Ok(Self {
            uring,
            ram,
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            bytes_in_flight: 0,
            depth: depth.into(),
        })
    }

    /// Readable while there are completions.
    pub fn descriptor(&self) -> RawFd {
        self.uring.as_raw_fd()
    }

    /// Number of accesses in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether there is a free slot.
    pub fn has_room(&self) -> bool {
        self.in_flight < self.depth && self.bytes_in_flight < MAX_BYTES_IN_FLIGHT
    }

    /// Whether an access of `bytes` bytes may be pushed: all in flight stay below [`MAX_BYTES_IN_FLIGHT`],
    /// or nothing is in flight.
    pub fn has_room_for(&self, bytes: usize) -> bool {
        let fits = bytes <= MAX_BYTES_IN_FLIGHT.saturating_sub(self.bytes_in_flight);
        self.in_flight == 0 || self.has_room() && fits
    }

    /// Queues an access, which [`Ring::submit`] starts. Returns it if there is no room, or if its pieces
    /// are too many or misaligned.
    pub fn push(&mut self, transfer: Transfer, token: T) -> Result<(), (Transfer, T)> {
        let bytes = transfer.operation.bytes_left();
        if !self.has_room_for(bytes) {
            return Err((transfer, token));
        }
        let Some(pieces) = self.pieces_of(&transfer) else { return Err((transfer, token)) };
        let slot = Some(Slot { transfer, pieces, bytes, token });
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.slots.push(None);
                self.slots.len() - 1
            }
        };
        self.slots[index] = slot;
        self.in_flight += 1;
        self.bytes_in_flight += bytes;
        self.enqueue(index);
        Ok(())
    }

    /// The first [`MAX_BYTES_AT_ONCE`] bytes as vectors; `None` if they are too many or misaligned.
    fn pieces_of(&self, transfer: &Transfer) -> Option<Pieces> {
        let segments = match &transfer.operation {
            Operation::Read(segments) | Operation::Write { data: segments, .. } => segments,
            Operation::Flush => return Some(Pieces::default()),
        };
        if segments.is_empty() || segments.pieces().len() > MOST_PIECES {
            return None;
        }
        let mut pieces = Vec::with_capacity(segments.pieces().len());
        for Segment { address, len } in segments.pieces() {
            // A piece that crosses two regions of RAM is several mappings here.
            for slice in self.ram.get_slices(address, len) {
                let slice = slice.ok()?;
                let start = slice.ptr_guard_mut().as_ptr();
                let aligned = |number: usize| number.is_multiple_of(transfer.access.alignment);
                if !aligned(start.addr()) || !aligned(slice.len()) {
                    return None;
                }
                pieces.push(libc::iovec { iov_base: start.cast(), iov_len: slice.len() });
            }
        }
        if pieces.len() > MOST_PIECES {
            return None;
        }
        let mut left = MAX_BYTES_AT_ONCE;
        for piece in &mut pieces {
            piece.iov_len = piece.iov_len.min(left);
            left -= piece.iov_len;
        }
        pieces.retain(|piece| piece.iov_len > 0);
        let count = u32::try_from(pieces.len()).ok()?;
        Some(Pieces { vectors: pieces, count })
    }

    /// Queues the rest of a slot's transfer. The queue has an entry for each slot, so it is never full.
    fn enqueue(&mut self, index: usize) {
        let slot = self.slots[index].as_ref().expect("a transfer to queue");
        let fd = Fd(slot.transfer.access.file.as_raw_fd());
        let Pieces { vectors: pieces, count } = &slot.pieces;
        let (count, offset) = (*count, slot.transfer.offset_bytes);
        let entry: squeue::Entry = match &slot.transfer.operation {
            Operation::Read(_) => {
                opcode::Readv::new(fd, pieces.as_ptr(), count).offset(offset).build()
            }
            Operation::Write { durable, .. } => {
                let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                let write = opcode::Writev::new(fd, pieces.as_ptr(), count).offset(offset);
                write.rw_flags(flags).build()
            }
            Operation::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        };
        let mut entry = entry.user_data(index as u64);
        let cached = slot.transfer.access.alignment == 1;
        let is_read = matches!(slot.transfer.operation, Operation::Read(_));
        let bytes: usize = pieces.iter().map(|piece| piece.iov_len).sum();
        let behind_another = self.uring.submission().len() % 2 == 1;
        if cached && is_read && bytes >= MUCH_TO_COPY && behind_another {
            entry = entry.flags(squeue::Flags::ASYNC);
        }
        // SAFETY: the addresses lie in `self.ram`, checked by `get_slices`; the list of them, the RAM
        // and the open file stay with the slot until its completion has been seen. `Drop` waits for
        // that.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        pushed.expect("an entry for each slot");
    }

    /// Submits everything that was pushed.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.uring.submission().is_empty() {
            self.enter(0)?;
        }
        Ok(())
    }

    /// Submits everything that was pushed and waits for a completion.
    pub fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        if self.in_flight > 0 && self.uring.completion().is_empty() {
            self.enter(1)?;
        }
        Ok(())
    }

    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        match self.uring.submit_and_wait(wanted) {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                // The kernel is temporarily short of memory.
                std::thread::yield_now();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the next completed access. A short transfer is continued: call [`Ring::submit`] after the
    /// last. With `interrupt`, an access longer than [`MAX_BYTES_IN_FLIGHT`] is not continued and ends as
    /// interrupted.
    pub fn next_completion(&mut self, interrupt: bool) -> Option<Completion<T>> {
        let stops = |bytes| interrupt && bytes > MAX_BYTES_IN_FLIGHT;
        self.next_completion_but(stops)
    }

    /// Accesses whose length satisfies `stops` are not continued.
    fn next_completion_but(&mut self, stops: impl Fn(usize) -> bool) -> Option<Completion<T>> {
        loop {
            let entry = self.uring.completion().next()?;
            let Ok(index) = usize::try_from(entry.user_data()) else { continue };
            let Some(mut slot) = self.slots.get_mut(index).and_then(Option::take) else { continue };
            let end = match self.account(&mut slot.transfer, entry.result()) {
                Progress::Done => End::Done,
                Progress::Failed(error) => End::Failed(error),
                Progress::Continue if stops(slot.bytes) => End::Interrupted,
                Progress::Continue => match self.pieces_of(&slot.transfer) {
                    Some(pieces) => {
                        slot.pieces = pieces;
                        self.slots[index] = Some(slot);
                        self.enqueue(index);
                        continue;
                    }
                    // A short direct transfer that ended at an unaligned position.
                    None => End::Failed(io::ErrorKind::UnexpectedEof.into()),
                },
            };
            self.free.push(index);
            self.in_flight -= 1;
            self.bytes_in_flight -= slot.bytes;
            return Some(Completion { token: slot.token, transfer: slot.transfer, end });
        }
    }

    /// Marks the RAM that was written and removes what was transferred.
    fn account(&self, transfer: &mut Transfer, result: i32) -> Progress {
        let done = match usize::try_from(result) {
            Ok(done) => done,
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => return Progress::Continue,
            Err(_) => {
                // The kernel may have written some of it nevertheless.
                return match self.mark_rest(transfer) {
                    Ok(()) => Progress::Failed(io::Error::from_raw_os_error(-result)),
                    Err(error) => Progress::Failed(error),
                };
            }
        };
        let (segments, reading) = match &mut transfer.operation {
            Operation::Flush => return Progress::Done,
            Operation::Read(segments) => (segments, true),
            Operation::Write { data, .. } => (data, false),
        };
        let mut left = done;
        while let Some(piece) = segments.take_front(left) {
            left -= piece.len;
            if reading && let Err(error) = self.mark(piece) {
                return Progress::Failed(error);
            }
        }
        transfer.offset_bytes += (done - left) as u64;
        match (segments.is_empty(), done) {
            (true, _) => Progress::Done,
            (false, 0) => match self.mark_rest(transfer) {
                Ok(()) => Progress::Failed(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => Progress::Failed(error),
            },
            (false, _) => Progress::Continue,
        }
    }

    fn mark_rest(&self, transfer: &Transfer) -> io::Result<()> {
        match &transfer.operation {
            Operation::Read(segments) => segments.pieces().try_for_each(|piece| self.mark(piece)),
            Operation::Write { .. } | Operation::Flush => Ok(()),
        }
    }

    /// Marks RAM dirty. A segment lies in RAM, so an error is a bug: the guest must not take data for
    /// read whose page would not be migrated.
    fn mark(&self, piece: Segment) -> io::Result<()> {
        for slice in self.ram.get_slices(piece.address, piece.len) {
            let slice = slice.map_err(io::Error::other)?;
            slice.bitmap().mark_dirty(0, slice.len());
        }
        Ok(())
    }
}

enum Progress {
    Done,
    Continue,
    Failed(io::Error),
}

impl<T> Drop for Ring<T> {
    /// Waits until the kernel accesses no RAM any more.
    fn drop(&mut self) {
        let mut failed = false;
        while self.in_flight > 0 {
            if let Err(error) = self.wait() {
                if !std::mem::replace(&mut failed, true) {
                    log::error!("io_uring: waiting for {} accesses: {error}", self.in_flight);
                }
                // They complete nevertheless, and a completion is seen without a wait.
                std::thread::sleep(Duration::from_millis(10));
            }
            // Short transfers are not continued.
            while self.next_completion_but(|_| true).is_some() {}
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
