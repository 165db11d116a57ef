//! One data channel's share of the pages: finds out what they hold, puts frames together, sends them.
//! Driven by [`super::lanes`], on a thread of its own or on the caller's. A page always takes the same
//! shard, so its versions never overtake each other.

use super::dirty::Words;
use super::frame::{Batch, RunKind, encode_end, encode_mark};
use super::scan::Scan;
use super::zero::PAGE_BYTES;
use crate::source::SourceError;
use crate::stats::Counters;
use crate::transport::{Channel, Throttle};
use crate::wire::Encoder;
use crate::wire::section::RamTotals;
use devices::ram::{GuestRam, PAGE_SIZE, RamLayout};
use std::sync::Arc;
use vm_memory::GuestMemoryBackend;

/// Some words of the dirty bitmap, whose pages are clear in the log and are to be sent.
#[derive(Debug, Clone)]
pub struct Job {
    /// Where the words begin in the bitmap.
    pub first_word: usize,
    /// The pages to send.
    pub dirty: Vec<u64>,
    /// Those among them that may hold something; the others were never touched. None if all may.
    pub touched: Option<Vec<u64>>,
}

impl Job {
    /// The share of the stripes for which `is_ours`; none if it is empty. `stripe_words` long each.
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
        Some(Self { first_word: self.first_word, dirty, touched })
    }
}

/// What a shard is told.
#[derive(Debug)]
pub enum Order {
    /// To send pages.
    Pages(Job),
    /// To send a mark, which the destination echoes when everything before it is in place.
    Mark(u64),
    /// To end its channel.
    End,
}

/// Frames and pages that a channel has carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Frames, with marks and the end.
    pub frames: u64,
    /// Pages.
    pub pages: RamTotals,
}

/// The RAM that is read, and where what is done with it is counted.
#[derive(Clone)]
pub struct Common {
    /// The mapping.
    pub ram: GuestRam,
    /// How it is numbered.
    pub layout: RamLayout,
    /// What has been done.
    pub counters: Arc<Counters>,
}

/// A shard.
pub struct Shard {
    common: Common,
    channel: Arc<Channel>,
    throttle: Box<dyn Throttle + Send>,
    batch: Batch,
    head: Encoder,
    tally: Tally,
}

fn unreadable(error: impl std::fmt::Display) -> SourceError {
    SourceError::Ram(error.to_string())
}

impl Shard {
    /// Sends on `channel`, as fast as `throttle` lets it.
    pub fn new(common: Common, channel: Arc<Channel>, throttle: Box<dyn Throttle + Send>) -> Self {
        let (batch, head) = (Batch::default(), Encoder::default());
        Self { common, channel, throttle, batch, head, tally: Tally::default() }
    }

    /// Its channel.
    pub fn channel(&self) -> &Arc<Channel> {
        &self.channel
    }

    /// What it has sent.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Does what it is told, to its end.
    pub fn obey(&mut self, order: &Order) -> Result<(), SourceError> {
        match order {
            Order::Pages(job) => self.send_pages(job),
            Order::Mark(number) => {
                encode_mark(&mut self.head, *number);
                self.send_head()
            }
            Order::End => {
                encode_end(&mut self.head);
                self.send_head()
            }
        }
    }

    fn send_head(&mut self) -> Result<(), SourceError> {
        self.channel.write_pages(self.head.bytes(), &[], &mut *self.throttle)?;
        self.tally.frames += 1;
        let sent = self.head.bytes().len() as u64;
        self.common.counters.update(|stats| stats.transferred_bytes += sent);
        Ok(())
    }

    fn send_pages(&mut self, job: &Job) -> Result<(), SourceError> {
        let Common { ram, layout, counters } = &self.common;
        let dirty = Words { first_word: job.first_word, words: &job.dirty };
        let words = job.touched.as_ref().unwrap_or(&job.dirty);
        let touched = Words { first_word: job.first_word, words };
        let mut scan = Scan::new(ram, layout, dirty, touched);
        let batch = &mut self.batch;
        batch.clear();
        while scan.fill(batch).map_err(unreadable)? {
            batch.encode_head(&mut self.head);
            let mut pages = Vec::with_capacity(batch.runs().len());
            for run in batch.runs().iter().filter(|run| run.kind == RunKind::Raw) {
                let address = layout
                    .run_address(run.first, run.page_count.into())
                    .ok_or_else(|| unreadable("a run past its end"))?;
                let bytes = usize::try_from(run.page_count).unwrap_or(0) * PAGE_BYTES;
                pages.push(ram.get_slice(address, bytes).map_err(unreadable)?);
            }
            self.channel.write_pages(self.head.bytes(), &pages, &mut *self.throttle)?;
            self.tally.frames += 1;
            let (raw, zero) = (u64::from(batch.raw_pages()), batch.zero_pages());
            self.tally.pages.raw_pages += raw;
            self.tally.pages.zero_pages += zero;
            let sent = self.head.bytes().len() as u64 + raw * PAGE_SIZE;
            counters.update(|stats| {
                stats.transferred_bytes += sent;
                stats.remaining_bytes =
                    stats.remaining_bytes.saturating_sub((raw + zero) * PAGE_SIZE);
                stats.normal_pages += raw;
                stats.zero_pages += zero;
            });
            batch.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shares_are_disjoint_and_whole(
            dirty in prop::collection::vec(any::<u64>(), 1..40),
            first_word in 0usize..100, lanes in 1usize..17,
        ) {
            let touched = Some(dirty.iter().map(|word| word & 0xff00).collect());
            let job = Job { first_word, dirty, touched };
            let mut sum = vec![0; job.dirty.len()];
            let mut touched_sum = vec![0; job.dirty.len()];
            for lane in 0..lanes {
                let Some(share) = job.share(8, |stripe| stripe % lanes == lane) else { continue };
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
