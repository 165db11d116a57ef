//! One data channel's share of RAM: classifies pages, builds frames, sends them. Driven by
//! [`super::shards`], on its own thread or on the caller's. A page always goes to the same shard, so its
//! versions never overtake each other.

use super::dirty::Words;
use super::encode::{Encoding, Fate, Wanted};
use super::error::RamError;
use super::frame::{Batch, Packing, RunKind, encode_end, encode_mark};
use super::page::bytes_of;
use super::scan::Scan;
use crate::error::ParticipantError;
use crate::pace::Throughput;
use crate::params::SharedParams;
use crate::stats::{Counters, StatsSnapshot};
use crate::transport::{Channel, PageSlice, Throttle};
use crate::wire::Encoder;
use crate::wire::section::RamTotals;
use devices::ram::{GuestRam, PAGE_SIZE, PageIndex, RamLayout};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use vm_memory::{Bytes, GuestMemoryBackend};

/// Pages to send: some words of the dirty bitmap, already cleared in the log.
#[derive(Debug, Clone)]
pub struct Job {
    /// Index of the first word in the bitmap.
    pub first_word: usize,
    /// The pages to send.
    pub dirty: Vec<u64>,
    /// Pages that may have content; the others were never touched. `None` if all may.
    pub touched: Option<Vec<u64>>,
    /// The guest is stopped: no later version follows.
    pub last: bool,
}

impl Job {
    /// The part in stripes for which `is_ours`, `stripe_words` long each. `None` if that is empty.
    pub fn share(&self, stripe_words: usize, is_ours: impl Fn(usize) -> bool) -> Option<Self> {
        let keep = |words: &[u64]| -> Vec<u64> {
            let kept = words.iter().enumerate().map(|(index, word)| {
                if is_ours((self.first_word + index) / stripe_words) { *word } else { 0 }
            });
            kept.collect()
        };
        let dirty = keep(&self.dirty);
        if dirty.iter().all(|word| *word == 0) {
            return None;
        }
        let touched = self.touched.as_deref().map(keep);
        Some(Self { first_word: self.first_word, dirty, touched, last: self.last })
    }
}

/// A command to a shard.
#[derive(Debug)]
pub enum Command {
    /// Send pages.
    Pages(Job),
    /// Send a mark; the destination answers it when everything before it is in place.
    Mark(u64),
    /// Send an end: nothing more follows while the guest is stopped.
    End,
    /// Drop the destination's page versions: the stop was called off.
    Forget,
}

/// Frames and pages carried by a channel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// All frames, marks and ends included.
    pub frames: u64,
    pub pages: RamTotals,
}

/// Shared by the shards of a migration.
#[derive(Clone)]
pub struct Common {
    pub ram: GuestRam,
    pub layout: RamLayout,
    /// Selects the encoders; read for each job.
    pub params: SharedParams,
    pub counters: Arc<Counters>,
    /// Pages sent or found unchanged: the measure of progress.
    pub pages: Arc<AtomicU64>,
    /// Number of shards.
    pub shards: u16,
}

pub struct Shard {
    common: Common,
    sender: ChannelSender,
    batch: Batch,
    encoding: Encoding,
    /// Whether deltas and compression rest, as last counted.
    rests: (bool, bool),
}

fn unreadable(error: impl std::fmt::Display) -> ParticipantError {
    RamError::Unreadable(error.to_string()).into()
}

impl Shard {
    /// Sends on `channel`, as fast as `throttle` allows.
    pub fn new(common: Common, channel: Arc<Channel>, throttle: Box<dyn Throttle + Send>) -> Self {
        let (batch, encoding) = (Batch::default(), Encoding::default());
        let sender = ChannelSender::new(channel, throttle);
        Self { common, sender, batch, encoding, rests: (false, false) }
    }

    pub fn channel(&self) -> &Arc<Channel> {
        &self.sender.channel
    }

    /// What it has sent so far.
    pub fn tally(&self) -> Tally {
        self.sender.tally
    }

    /// Executes a command and returns when it is done.
    pub fn execute(&mut self, command: &Command) -> Result<(), ParticipantError> {
        let mut head = std::mem::take(&mut self.sender.head);
        let result = match command {
            Command::Pages(job) => self.send_pages(job, &mut head),
            Command::Mark(number) => {
                self.encoding.end_round();
                encode_mark(&mut head, *number);
                self.send_head(&head)
            }
            Command::End => {
                encode_end(&mut head);
                self.send_head(&head)
            }
            Command::Forget => {
                self.encoding.forget();
                Ok(())
            }
        };
        self.sender.head = head;
        result
    }

    fn send_head(&mut self, head: &Encoder) -> Result<(), ParticipantError> {
        let sent = self.sender.write(head.bytes(), &[])?;
        self.common.counters.update(|stats| stats.transferred_bytes += sent);
        Ok(())
    }

    fn send_pages(&mut self, job: &Job, head: &mut Encoder) -> Result<(), ParticipantError> {
        let params = self.common.params.get();
        let share = params.xbzrle_cache_size / u64::from(self.common.shards.max(1));
        // More than the address space is as good as all of it.
        let cache_bytes = params.xbzrle.then(|| usize::try_from(share).unwrap_or(usize::MAX));
        let wanted = Wanted { cache_bytes, method: params.method() };
        self.encoding.want(wanted).map_err(RamError::Encoding)?;
        let first_round = job.touched.is_some();
        let deltas = self.encoding.tries_deltas(first_round);
        let packing = self.encoding.tries_packing();
        let before = self.sender.tally.pages.raw_pages;
        if deltas || packing {
            self.send_encoded(job, deltas, head)?;
        } else {
            self.send_straight(job, head)?;
        }
        let raw_bytes = (self.sender.tally.pages.raw_pages - before) * PAGE_SIZE;
        match (deltas, packing) {
            (true, _) => self.encoding.judge_deltas(self.sender.bytes_per_sec()),
            // Constant compression must not keep deltas from another trial.
            (false, true) => self.encoding.passed_deltas(raw_bytes, first_round),
            (false, false) => self.encoding.passed(raw_bytes, first_round),
        }
        self.count_rests();
        Ok(())
    }

    /// Counts this channel among those on which an encoder rests, or no more.
    fn count_rests(&mut self) {
        let (before, now) = (self.rests, self.encoding.rests());
        if before == now {
            return;
        }
        self.rests = now;
        let count = |channels: &mut u16, before: bool, now: bool| {
            *channels = (*channels + u16::from(now)).saturating_sub(u16::from(before));
        };
        self.common.counters.update(|stats| {
            count(&mut stats.xbzrle.resting_channels, before.0, now.0);
            count(&mut stats.compression.resting_channels, before.1, now.1);
        });
    }

    /// Sends pages straight from guest RAM.
    fn send_straight(&mut self, job: &Job, head: &mut Encoder) -> Result<(), ParticipantError> {
        let Common { ram, layout, counters, pages, .. } = &self.common;
        let mut scan = Scan::new(ram, layout, job.dirty(), job.touched());
        let batch = &mut self.batch;
        batch.clear();
        while scan.fill(batch).map_err(unreadable)? {
            batch.encode_head(Packing::None, head)?;
            let slices = raw_slices(batch, ram, layout)?;
            let sent = self.sender.write_batch(batch, head, &slices)?;
            counters.update(|stats| count(stats, batch, sent));
            pages_done(pages, batch, 0);
            batch.clear();
        }
        Ok(())
    }

    /// Copies pages, encodes them and sends the result.
    fn send_encoded(
        &mut self,
        job: &Job,
        deltas: bool,
        head: &mut Encoder,
    ) -> Result<(), ParticipantError> {
        let (dirty, touched) = (job.dirty(), job.touched());
        self.batch.clear();
        let mut began = Instant::now();
        for (first, page_count) in dirty.runs() {
            for page in (first.0..first.0 + page_count).map(PageIndex) {
                let fate = if touched.contains(page) {
                    let address = self.common.layout.address_of(page);
                    let address = address.ok_or_else(|| unreadable("a page past its end"))?;
                    let copy = self.encoding.next_page();
                    self.common.ram.read_slice(copy, address).map_err(unreadable)?;
                    self.encoding.take(page, deltas, job.last)?
                } else {
                    Fate::Zero
                };
                let kind = match fate {
                    Fate::Zero => RunKind::Zero,
                    Fate::Staged => RunKind::Raw,
                    Fate::Delta => RunKind::Delta,
                    Fate::Unchanged => continue,
                };
                self.batch.push(page, 1, kind, &self.common.layout);
                if self.encoding.is_full() || !self.batch.has_room(u32::MAX) {
                    self.encoding.took(began.elapsed());
                    self.flush(deltas, head)?;
                    began = Instant::now();
                }
            }
        }
        self.encoding.took(began.elapsed());
        self.flush(deltas, head)
    }

    /// Sends what is encoded so far.
    fn flush(&mut self, deltas: bool, head: &mut Encoder) -> Result<(), ParticipantError> {
        let Common { ram, layout, counters, pages, .. } = &self.common;
        let batch = &mut self.batch;
        let mut straight = Vec::new();
        if !batch.is_empty() {
            match self.encoding.pack(self.sender.bytes_per_sec()) {
                Some((packing, packed)) => {
                    batch.encode_head(packing, head)?;
                    head.u32(u32::try_from(packed.len()).map_err(unreadable)?).raw(packed);
                }
                None => {
                    batch.encode_head(Packing::None, head)?;
                    if deltas {
                        // Later deltas refer to this very copy.
                        head.raw(self.encoding.staged());
                    } else {
                        straight = raw_slices(batch, ram, layout)?;
                    }
                }
            }
            if batch.delta_pages() > 0 {
                let part = self.encoding.deltas();
                head.u32(u32::try_from(part.len()).map_err(unreadable)?).raw(part);
            }
        }
        let sent =
            if batch.is_empty() { 0 } else { self.sender.write_batch(batch, head, &straight)? };
        self.encoding.clear();
        let (xbzrle, compression) = self.encoding.take_stats();
        counters.update(|stats| {
            count(stats, batch, sent);
            stats.remaining_bytes =
                stats.remaining_bytes.saturating_sub(xbzrle.unchanged * PAGE_SIZE);
            stats.xbzrle.add(xbzrle);
            stats.compression.add(compression);
        });
        pages_done(pages, batch, xbzrle.unchanged);
        batch.clear();
        Ok(())
    }
}

impl Job {
    fn dirty(&self) -> Words<'_> {
        Words { first_word: self.first_word, words: &self.dirty }
    }

    fn touched(&self) -> Words<'_> {
        let words = self.touched.as_ref().unwrap_or(&self.dirty);
        Words { first_word: self.first_word, words }
    }
}

/// The raw pages of `batch`, in guest RAM.
fn raw_slices<'r>(
    batch: &Batch,
    ram: &'r GuestRam,
    layout: &RamLayout,
) -> Result<Vec<PageSlice<'r>>, ParticipantError> {
    let raw = batch.runs().iter().filter(|run| run.kind == RunKind::Raw);
    let slices = raw.map(|run| {
        let address = layout
            .run_address(run.first, run.page_count.into())
            .ok_or_else(|| unreadable("a run past its end"))?;
        let bytes = bytes_of(run.page_count);
        ram.get_slice(address, bytes).map_err(unreadable)
    });
    slices.collect()
}

fn pages_of(batch: &Batch) -> u64 {
    u64::from(batch.raw_pages()) + batch.zero_pages() + u64::from(batch.delta_pages())
}

fn pages_done(done: &AtomicU64, batch: &Batch, unchanged: u64) {
    done.fetch_add(pages_of(batch) + unchanged, Ordering::Relaxed);
}

/// Adds a sent batch to the counters.
fn count(stats: &mut StatsSnapshot, batch: &Batch, sent: u64) {
    stats.transferred_bytes += sent;
    stats.remaining_bytes = stats.remaining_bytes.saturating_sub(pages_of(batch) * PAGE_SIZE);
    stats.normal_pages += u64::from(batch.raw_pages());
    stats.zero_pages += batch.zero_pages();
}

/// Sends frames on the channel and measures its throughput.
struct ChannelSender {
    channel: Arc<Channel>,
    throttle: Box<dyn Throttle + Send>,
    /// Reused for its memory.
    head: Encoder,
    tally: Tally,
    throughput: Throughput,
}

impl ChannelSender {
    fn new(channel: Arc<Channel>, throttle: Box<dyn Throttle + Send>) -> Self {
        Self {
            channel,
            throttle,
            head: Encoder::default(),
            tally: Tally::default(),
            throughput: Throughput::default(),
        }
    }

    fn write(&mut self, head: &[u8], pages: &[PageSlice<'_>]) -> Result<u64, ParticipantError> {
        let began = Instant::now();
        self.channel.write_pages(head, pages, &mut *self.throttle)?;
        let took = began.elapsed();
        let bytes = head.len() as u64 + pages.iter().map(|page| page.len() as u64).sum::<u64>();
        self.throughput.add(bytes, took);
        self.tally.frames += 1;
        Ok(bytes)
    }

    fn write_batch(
        &mut self,
        batch: &Batch,
        head: &Encoder,
        pages: &[PageSlice<'_>],
    ) -> Result<u64, ParticipantError> {
        let sent = self.write(head.bytes(), pages)?;
        let totals = &mut self.tally.pages;
        totals.raw_pages += u64::from(batch.raw_pages());
        totals.delta_pages += u64::from(batch.delta_pages());
        totals.zero_pages += batch.zero_pages();
        Ok(sent)
    }

    /// Throughput of the channel; 0 if unknown.
    fn bytes_per_sec(&self) -> u64 {
        self.throughput.bytes_per_sec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cancel::CancelToken;
    use crate::pace::Cap;
    use crate::params::{Compression, Params};
    use crate::transport::memory::MemoryLink;
    use devices::ram::GuestAddress;
    use proptest::prelude::*;

    #[test]
    fn deltas_that_rest_get_another_look_also_while_pages_are_compressed() {
        const RAM_BYTES: u64 = 8 << 20;
        let layout = RamLayout::for_size(RAM_BYTES).unwrap();
        let ram = GuestRam::from_ranges(&layout.ranges()).unwrap();
        let params = SharedParams::new(Params {
            xbzrle: true,
            compression: Compression::Zstd,
            // So slow that either is worth its time.
            max_bandwidth: 1_000_000,
            ..Params::default()
        });
        let (link, cancel) = (MemoryLink::new(None), CancelToken::new());
        // Kept: what is sent stays under way.
        let (ours, _theirs) = link.connect();
        let channel = Arc::new(Channel::new(Arc::new(ours), cancel.clone()));
        let counters = Arc::<Counters>::default();
        let common = Common {
            ram: ram.clone(),
            layout,
            params: params.clone(),
            counters,
            pages: Arc::default(),
            shards: 1,
        };
        let mut shard = Shard::new(common.clone(), channel, Box::new(Cap::new(params, cancel)));
        let words = usize::try_from(RAM_BYTES / PAGE_SIZE / 64).unwrap();
        let job = Job { first_word: 0, dirty: vec![u64::MAX; words], touched: None, last: false };
        let mut send = || {
            let before = common.counters.snapshot();
            shard.execute(&Command::Pages(job.clone())).unwrap();
            shard.execute(&Command::Mark(1)).unwrap();
            let after = common.counters.snapshot();
            let xbzrle = (before.xbzrle, after.xbzrle);
            (xbzrle.1.overflows - xbzrle.0.overflows, xbzrle.1.pages - xbzrle.0.pages)
        };
        let page_starts = || (0..RAM_BYTES / PAGE_SIZE).map(|page| GuestAddress(page * PAGE_SIZE));
        // All of every page changes, which compresses well: deltas have nothing to give.
        for version in 0..2 {
            for start in page_starts() {
                let text = format!("page at {:#x} in version {version}; ", start.0);
                let text: Vec<u8> = text.bytes().cycle().take(bytes_of(1)).collect();
                ram.write_slice(&text, start).unwrap();
            }
            send();
        }
        assert_eq!(common.counters.snapshot().xbzrle.resting_channels, 1);
        assert_eq!(send(), (0, 0), "deltas rest");
        // From now on a guest that changes eight bytes of each.
        let seen = (0u64..6).any(|version| {
            page_starts().for_each(|start| ram.write_obj(version, start).unwrap());
            let (_, deltas) = send();
            deltas > 0
        });
        assert!(seen, "deltas are never looked at again");
        assert_eq!(common.counters.snapshot().xbzrle.resting_channels, 0);
        assert!(common.counters.snapshot().compression.pages > 0);
    }

    proptest! {
        #[test]
        fn shares_are_disjoint_and_whole(
            dirty in prop::collection::vec(any::<u64>(), 1..40),
            first_word in 0usize..100, shards in 1usize..17,
        ) {
            let touched = Some(dirty.iter().map(|word| word & 0xff00).collect());
            let job = Job { first_word, dirty, touched, last: false };
            let mut sum = vec![0; job.dirty.len()];
            let mut touched_sum = vec![0; job.dirty.len()];
            for shard in 0..shards {
                let Some(share) = job.share(8, |stripe| stripe % shards == shard) else { continue };
                prop_assert_eq!(share.first_word, first_word);
                for (index, word) in share.dirty.iter().enumerate() {
                    prop_assert_eq!(sum[index] & word, 0);
                    sum[index] |= word;
                    touched_sum[index] |= share.touched.as_ref().unwrap()[index];
                }
            }
            prop_assert_eq!(&sum, &job.dirty);
            prop_assert_eq!(&touched_sum, job.touched.as_ref().unwrap());
        }
    }
}
