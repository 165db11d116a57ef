//! The threads that read disks at the source (`mig-read-N`): they get chunks to read, and give them back
//! filled, and compressed where that pays. Owned by `outgoing`, from its setup to its cleanup.
//!
//! A read takes as long as its disk hangs. So nobody waits for a thread: the driver waits for the next event
//! and watches for a cancel. A thread whose read hangs at the end of the migration is left behind; it owns
//! all that it touches, and its result is discarded.

use super::frame::{Chunk, DiskTotals, Frame, HEADER_BYTES, runs};
use super::packing::{Packer, Pays};
use super::scan::Work;
use super::{BlockError, CHUNK, CHUNK_BYTES, GRANULE, GRANULE_BYTES, ReadError};
use crate::bytes::is_zero;
use crate::control::Control;
use crate::error::{Panicked, ParticipantError};
use crate::ram::frame::Packing;
use crate::transport::TICK;
use crate::wire::WireError;
use devices::block::BlockNode;
use devices::block::aligned::AlignedBuffer;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Where the payload starts in a buffer: aligned for direct I/O, with room for the header before it.
const PAYLOAD_AT: usize = 4096;

/// A frame's memory.
enum Buffer {
    /// With the payload at [`PAYLOAD_AT`].
    Raw { buffer: AlignedBuffer, payload_bytes: usize },
    /// Header and compressed payload.
    Packed(Vec<u8>),
}

/// A chunk that has been read.
pub(super) struct Filled {
    buffer: Buffer,
    pub(super) chunk: Chunk,
    pub(super) totals: DiskTotals,
}

impl Filled {
    /// The whole frame, header included.
    pub(super) fn frame(&self) -> Option<&[u8]> {
        match &self.buffer {
            Buffer::Raw { buffer, payload_bytes } => {
                buffer.get(PAYLOAD_AT - HEADER_BYTES..PAYLOAD_AT + payload_bytes)
            }
            Buffer::Packed(frame) => Some(frame),
        }
    }
}

/// What a thread tells the driver.
pub(super) enum Event {
    /// A chunk was read.
    Filled(Result<Filled, ParticipantError>),
    /// A chunk was sent, by a thread of [`super::senders`].
    Sent(Result<Filled, ParticipantError>),
}

/// Buffers to reuse.
#[derive(Default)]
struct Spare {
    raw: Vec<AlignedBuffer>,
    packed: Vec<Vec<u8>>,
}

/// What a thread needs.
#[derive(Clone)]
struct Shared {
    nodes: Arc<[Arc<BlockNode>]>,
    work: Arc<Mutex<Receiver<Work>>>,
    spare: Arc<Mutex<Spare>>,
    pays: Arc<Pays>,
    events: Sender<Event>,
}

/// The reading threads. Dropping it ends them, and joins them unless a read is in progress.
pub(super) struct Readers {
    shared: Shared,
    /// Until it is dropped.
    work: Option<Sender<Work>>,
    events: Receiver<Event>,
    /// Spawned as they are needed.
    threads: Vec<JoinHandle<()>>,
    most_threads: usize,
    /// Chunks handed out and not yet filled.
    reading: usize,
}

impl Readers {
    /// For these disks, with so many reads in flight at most.
    pub(super) fn new(nodes: Arc<[Arc<BlockNode>]>, most_threads: usize, pays: Arc<Pays>) -> Self {
        let (work, to_do) = channel();
        let (tell, events) = channel();
        let (to_do, spare) = (Arc::new(Mutex::new(to_do)), Arc::default());
        let shared = Shared { nodes, work: to_do, spare, pays, events: tell };
        let (work, threads) = (Some(work), Vec::new());
        Self { shared, work, events, threads, most_threads, reading: 0 }
    }

    /// Where other threads' events go, to be returned by [`Readers::next`].
    pub(super) fn events(&self) -> &Sender<Event> {
        &self.shared.events
    }

    /// Has a chunk read.
    pub(super) fn hand_out(&mut self, work: Work) -> Result<(), ParticipantError> {
        // Cannot fail: the receiving end is in `shared`.
        if self.work.as_ref().is_some_and(|to| to.send(work).is_ok()) {
            self.reading += 1;
        }
        if self.threads.len() < self.reading.min(self.most_threads) {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("mig-read-{}", self.threads.len()))
                .stack_size(128 << 10)
                .spawn(move || shared.read_all())
                .map_err(ParticipantError::Thread)?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Waits for the next event, of any chunk. Gives up when the migration is cancelled or the peer is
    /// gone: the disk may hang. After an error there is no further pass.
    pub(super) fn next(&mut self, control: &Control) -> Result<Event, ParticipantError> {
        loop {
            if let Ok(event) = self.events.recv_timeout(TICK) {
                if matches!(event, Event::Filled(_)) {
                    self.reading -= 1;
                }
                return Ok(event);
            }
            if control.is_cancelled() {
                return Err(WireError::Interrupted.into());
            }
            if control.is_lost() {
                return Err(WireError::Lost(io::ErrorKind::BrokenPipe.into()).into());
            }
        }
    }

    /// Takes a chunk's buffer back.
    pub(super) fn reuse(&self, sent: Filled) {
        let mut spare = devices::lock(&self.shared.spare);
        match sent.buffer {
            Buffer::Raw { buffer, .. } => spare.raw.push(buffer),
            Buffer::Packed(frame) => spare.packed.push(frame),
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.work = None;
        // Otherwise a read may hang: the thread ends after it, if it ever does.
        if self.reading == 0 {
            for thread in self.threads.drain(..) {
                // Panics were reported.
                let _ = thread.join();
            }
        }
    }
}

impl Shared {
    /// Body of a thread. Ends when nobody hands out work or wants its result any more.
    fn read_all(&self) {
        let mut packer = Packer::default();
        loop {
            // One thread waits for work, the others for their turn to wait.
            let Ok(work) = devices::lock(&self.work).recv() else { return };
            let filled = catch_unwind(AssertUnwindSafe(|| self.read(work, &mut packer)));
            let filled = filled.unwrap_or_else(|_| Err(Panicked("reads disks").into()));
            if self.events.send(Event::Filled(filled)).is_err() {
                return;
            }
        }
    }

    /// Reads a chunk's granules into one buffer, drops the zero ones and compresses the others.
    fn read(&self, work: Work, packer: &mut Packer) -> Result<Filled, ParticipantError> {
        let spare = devices::lock(&self.spare).raw.pop();
        let mut buffer = spare.unwrap_or_else(|| AlignedBuffer::new(PAYLOAD_AT + CHUNK));
        let (head, payload) = buffer.split_at_mut(PAYLOAD_AT);
        // `work` comes from a scan over these disks.
        let Some(node) = self.nodes.get(work.disk) else {
            let found = format!("disk number {}", work.disk);
            return Err(WireError::Unexpected { found, expected: "an announced disk" }.into());
        };
        let len_bytes = node.len_bytes();
        let (mut read, mut kept) = (0, 0);
        let (mut data, mut totals) = (0u64, DiskTotals::default());
        for (first, count) in runs(work.granules) {
            let offset = work.index * CHUNK_BYTES + u64::from(first) * GRANULE_BYTES;
            let wanted = (u64::from(count) * GRANULE_BYTES).min(len_bytes - offset);
            let failed = |source| {
                BlockError::Read(ReadError {
                    disk: node.id().to_owned(),
                    offset_bytes: offset,
                    len_bytes: wanted,
                    source,
                })
            };
            let too_long = || failed(io::ErrorKind::InvalidInput.into());
            let len = usize::try_from(wanted).map_err(|_| too_long())?;
            let (_, room) = payload.split_at_mut(read);
            let room = room.get_mut(..len).ok_or_else(too_long)?;
            node.copy_at(room, offset).map_err(failed)?;
            // Data moves up over zero granules. Most chunks have none, and nothing moves.
            let mut at = 0;
            for granule in first..first + count {
                let size = GRANULE.min(len - at);
                let start = read + at;
                if is_zero(payload.get(start..start + size).ok_or_else(too_long)?) {
                    totals.zero_bytes += size as u64;
                } else {
                    if kept != start {
                        payload.copy_within(start..start + size, kept);
                    }
                    kept += size;
                    data |= 1 << granule;
                    totals.data_bytes += size as u64;
                }
                at += size;
            }
            read += len;
        }
        let impossible =
            |found: String| WireError::Unexpected { found, expected: "a chunk's header" };
        let number = u16::try_from(work.disk);
        let number = number.map_err(|_| impossible(format!("disk {}", work.disk)))?;
        let (index, zero) = (work.index, work.granules & !data);
        let chunk = |packing| Chunk { disk: number, index, data, zero, packing };
        let header = |packing, len: usize| -> Result<_, WireError> {
            let len = u32::try_from(len).map_err(|_| impossible(format!("{len} bytes")))?;
            Ok(Frame::Chunk(chunk(packing)).encode(len))
        };
        let payload = payload.get(..kept).ok_or_else(|| impossible(format!("{kept} bytes")))?;
        let mut packed = devices::lock(&self.spare).packed.pop().unwrap_or_default();
        packed.clear();
        packed.resize(HEADER_BYTES, 0);
        let packing = packer.pack(payload, &mut packed, &self.pays)?;
        let no_room = || impossible("no room".into());
        if packing == Packing::None {
            devices::lock(&self.spare).packed.push(packed);
            *head.last_chunk_mut().ok_or_else(no_room)? = header(packing, kept)?;
            let buffer = Buffer::Raw { buffer, payload_bytes: kept };
            return Ok(Filled { buffer, chunk: chunk(packing), totals });
        }
        let len = packed.len() - HEADER_BYTES;
        *packed.first_chunk_mut().ok_or_else(no_room)? = header(packing, len)?;
        devices::lock(&self.spare).raw.push(buffer);
        Ok(Filled { buffer: Buffer::Packed(packed), chunk: chunk(packing), totals })
    }
}
