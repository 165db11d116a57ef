//! Receives chunks on the disks' channels, a thread for each, and has them written into images
//! ([`super::writers`]). Checks each one against the announcement before a byte is written.

use super::frame::{
    BlockSetup, BlockTotals, Chunk, DiskSetup, DiskTotals, Frame, HEADER_BYTES, bytes_of,
    granules_of,
};
use super::stats::DiskProgress;
use super::writers::{Border, Crossed, Image, Job, Shared, StopOnDrop, WRITERS};
use super::{CHUNK_BYTES, GRANULE_BYTES, IncomingDisk, LoadError};
use crate::error::Panicked;
use crate::ram::frame::Packing;
use crate::stats::Counters;
use crate::transport::Channel;
use crate::wire::{Role, WireError};
use devices::block::backend::ByteRange;
use devices::block::bitmap::DirtyBitmap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{Scope, ScopedJoinHandle};

/// Asked at each end, with everything on stable storage and the totals so far, whether more may come because
/// the source calls its stop off.
pub type AtEnd<'e> = &'e (dyn Fn(&BlockTotals) -> ControlFlow<()> + Sync);

/// The disks of an incoming guest.
pub struct ChunkReceiver {
    images: Vec<Image>,
    counters: Arc<Counters>,
    /// Ends received from the source.
    ended: Arc<AtomicU32>,
}

impl ChunkReceiver {
    /// Checks the source's announcement against the prepared disks.
    pub fn start(
        disks: Vec<IncomingDisk>,
        setup: &BlockSetup,
        counters: Arc<Counters>,
    ) -> Result<Self, WireError> {
        let here: Vec<_> = disks
            .iter()
            .map(|disk| DiskSetup {
                name: disk.node.id().to_owned(),
                len_bytes: disk.node.len_bytes(),
                only_top: disk.only_top,
            })
            .collect();
        if here != setup.disks {
            let reason = format!("the source announces {:?}, prepared are {here:?}", setup.disks);
            return Err(WireError::Malformed { what: "setup of the disks", reason });
        }
        let images = disks.into_iter().map(|disk| {
            let (id, len) = (disk.node.id().to_owned(), disk.node.len_bytes());
            let bitmap = |granule_bytes| {
                DirtyBitmap::new(len, granule_bytes).ok_or_else(|| {
                    let reason = format!("disk {id} of {len} bytes");
                    WireError::Malformed { what: "setup of the disks", reason }
                })
            };
            let (written, seen) = (bitmap(GRANULE_BYTES)?, bitmap(CHUNK_BYTES)?);
            Ok::<_, WireError>(Image { disk, written, seen })
        });
        let images = images.collect::<Result<Vec<_>, _>>()?;
        let progress = |disk: &DiskSetup| DiskProgress {
            name: disk.name.clone(),
            total_bytes: disk.len_bytes,
            // Until the source says how much comes. Holes do not.
            remaining_bytes: disk.len_bytes,
            ..Default::default()
        };
        let progress: Vec<_> = setup.disks.iter().map(progress).collect();
        counters.update(|stats| stats.disk.get_or_insert_default().disks = progress);
        Ok(Self { images, counters, ended: Arc::default() })
    }

    /// Counts received ends. After an end, only writes and flushes are outstanding.
    pub fn ended(&self) -> Arc<AtomicU32> {
        self.ended.clone()
    }

    /// Receives frames from all channels until `at_end` breaks.
    pub fn receive_all(
        self,
        channels: &[Arc<Channel>],
        at_end: AtEnd<'_>,
    ) -> Result<(), LoadError> {
        let Self { images, counters, ended } = self;
        let disks = vec![DiskTotals::default(); images.len()];
        let totals = BlockTotals { ends: 0, frames: 0, disks };
        let shared = &Shared::new(&images, channels, totals);
        let receive = |index, channel: &Arc<Channel>| {
            let (counters, ended) = (&counters, &ended);
            let mut receiving = Receiving { shared, index, channel, counters, ended, at_end };
            let received = catch_unwind(AssertUnwindSafe(|| receiving.run()));
            match received.unwrap_or_else(|_| Err(Panicked("receives disks").into())) {
                Err(LoadError::Wire(error)) => {
                    shared.fail(error.on_channel(Role::Disks { index }).into());
                }
                Err(error) => shared.fail(error),
                Ok(()) => {}
            }
        };
        std::thread::scope(|scope| {
            // On every exit, panics included: the scope joins the threads.
            let _stop = StopOnDrop(shared);
            for number in 0..WRITERS {
                let name = format!("mig-write-{number}");
                spawn(scope, shared, name, || shared.write_jobs())?;
            }
            spawn(scope, shared, "mig-flush".into(), || shared.flush_jobs())?;
            let receive = &receive;
            let mut others = Vec::with_capacity(channels.len());
            for (index, channel) in (0..).zip(channels).skip(1) {
                let name = format!("mig-disks-{index}");
                match spawn(scope, shared, name, move || receive(index, channel)) {
                    Ok(thread) => others.push(thread),
                    Err(error) => shared.fail(error),
                }
            }
            if let Some(first) = channels.first() {
                receive(0, first);
            }
            for thread in others {
                // Panics were reported.
                let _ = thread.join();
            }
            // The first failure, not its consequence.
            shared.error().map_or(Ok(()), Err)
        })
    }
}

/// Starts a thread. If it panics, the others end.
fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    shared: &'scope Shared<'_>,
    name: String,
    work: impl FnOnce() + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, ()>, LoadError> {
    let work = move || {
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            shared.fail(Panicked("writes disks").into());
        }
    };
    let thread = std::thread::Builder::new().name(name).stack_size(128 << 10);
    thread.spawn_scoped(scope, work).map_err(LoadError::Thread)
}

/// State of a receiving thread.
struct Receiving<'r> {
    shared: &'r Shared<'r>,
    /// Index of its channel.
    index: u16,
    channel: &'r Channel,
    counters: &'r Counters,
    ended: &'r AtomicU32,
    at_end: AtEnd<'r>,
}

impl Receiving<'_> {
    fn run(&mut self) -> Result<(), LoadError> {
        loop {
            let mut header = [0; HEADER_BYTES];
            self.channel.read_when_it_comes(&mut header)?;
            let (frame, payload_bytes) = Frame::decode(&header)?;
            match frame {
                Frame::Chunk(chunk) => self.chunk(chunk, payload_bytes)?,
                Frame::Mark(number) => {
                    let Crossed { flush, .. } = self.cross(Border::Mark(number))?;
                    self.channel.write_all(&Frame::Flushed(number, flush).encode(0))?;
                }
                Frame::End => {
                    if self.cross(Border::End)?.over {
                        return Ok(());
                    }
                }
                Frame::Flushed(..) | Frame::Alive => {
                    let (found, expected) = (format!("{frame:?}"), "a chunk of a disk");
                    return Err(WireError::Unexpected { found, expected }.into());
                }
            }
        }
    }

    fn cross(&self, border: Border) -> Result<Crossed, LoadError> {
        let has_come = |totals: &BlockTotals| self.ended.store(totals.ends, Ordering::Release);
        let at_end = |totals: &BlockTotals| (self.at_end)(totals).is_break();
        let passes = u64::from(border != Border::End);
        let settled = || {
            self.counters.update(|stats| {
                let stats = stats.disk.get_or_insert_default();
                stats.passes += passes;
                // All chunks have come once.
                stats.disks.iter_mut().for_each(|disk| disk.remaining_bytes = 0);
            });
        };
        self.shared.cross(usize::from(self.index), border, &has_come, &settled, &at_end)
    }

    fn chunk(&mut self, chunk: Chunk, payload_bytes: u32) -> Result<(), LoadError> {
        let malformed = |reason: String| WireError::Malformed { what: "disk frame", reason };
        let index = usize::from(chunk.disk);
        let Some(image) = self.shared.images.get(index) else {
            return Err(malformed(format!("no disk number {index}")).into());
        };
        let (id, len_bytes) = (image.disk.node.id(), image.disk.node.len_bytes());
        if (chunk.data | chunk.zero) & !granules_of(chunk.index, len_bytes) != 0 {
            let reason = format!("chunk {} of disk {id} lies past its end", chunk.index);
            return Err(malformed(reason).into());
        }
        let place = ByteRange { offset_bytes: chunk.index * CHUNK_BYTES, len_bytes: 1 };
        // Marked in the same step: it may come on two channels at once.
        if image.seen.mark(place) == 0 {
            let reason = format!("chunk {} of disk {id} comes twice in one pass", chunk.index);
            return Err(malformed(reason).into());
        }
        let data_bytes = bytes_of(chunk.index, chunk.data, len_bytes);
        let fits = match chunk.packing {
            Packing::None => u64::from(payload_bytes) == data_bytes,
            Packing::Zlib | Packing::Zstd => u64::from(payload_bytes) < data_bytes,
        };
        if !fits {
            let packed = if chunk.packing == Packing::None { "" } else { " packed" };
            let reason = format!("{payload_bytes}{packed} bytes for {data_bytes} of disk {id}");
            return Err(malformed(reason).into());
        }
        let mut buffer = self.shared.free_buffer()?;
        let too_long = || malformed(format!("{data_bytes} bytes of disk {id} in a chunk"));
        let to_usize = |bytes: u64| usize::try_from(bytes).map_err(|_| too_long());
        let (data_bytes, payload_bytes) = (to_usize(data_bytes)?, to_usize(payload_bytes.into())?);
        self.channel.read_exact(buffer.get_mut(..payload_bytes).ok_or_else(too_long)?)?;
        let zero_bytes = bytes_of(chunk.index, chunk.zero, len_bytes);
        self.counters.update(|stats| {
            let disk = stats.disk.get_or_insert_default();
            let wire_bytes = (HEADER_BYTES + payload_bytes) as u64;
            let totals = DiskTotals { data_bytes: data_bytes as u64, zero_bytes };
            disk.count_chunk(index, chunk.packing, wire_bytes, totals);
        });
        self.shared.write(Job { chunk, buffer, payload_bytes, data_bytes }, zero_bytes);
        Ok(())
    }
}
