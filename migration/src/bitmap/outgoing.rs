//! The bitmaps at the source, as a participant.

use super::frame::{Announced, Piece, encode_setup};
use super::{BitmapsError, MAX_BITMAPS, SECTION};
use crate::error::ParticipantError;
use crate::participant::{
    Budget, Outcome, Outgoing, OutgoingContext, Pass, Pending, Precision, Step,
};
use crate::transport::Throttle;
use crate::wire::hello::BITMAPS;
use crate::wire::section::Stage;
use crate::wire::{Hello, Role};
use devices::block::BlockNode;
use devices::block::bitmap::Content;
use devices::block::bitmaps::{BitmapInfo, BitmapName, Held};
use std::sync::Arc;

/// A bitmap of an outgoing guest.
#[derive(Debug, Clone)]
pub struct SourceBitmap {
    pub node: Arc<BlockNode>,
    pub name: BitmapName,
    /// Names of both on the wire.
    pub disk_alias: String,
    pub alias: String,
    /// Whether it is to be persistent there; `None`: as it is here.
    pub persistent: Option<bool>,
}

/// The bitmaps at the source. They are busy from the setup until the migration has ended.
pub struct BitmapsOutgoing {
    bitmaps: Vec<SourceBitmap>,
    held: Vec<Held>,
    context: Option<OutgoingContext>,
}

impl BitmapsOutgoing {
    /// Without bitmaps there is no such participant.
    pub fn new(bitmaps: Vec<SourceBitmap>) -> Self {
        Self { bitmaps, held: Vec::new(), context: None }
    }

    fn context(&self) -> Result<&OutgoingContext, ParticipantError> {
        self.context.as_ref().ok_or_else(|| ParticipantError::not_set_up(SECTION))
    }

    fn announcement(&self) -> Vec<u8> {
        let pairs = self.bitmaps.iter().zip(&self.held);
        let all: Vec<_> = pairs
            .map(|(bitmap, held)| {
                let BitmapInfo { granularity, recording, persistent, .. } = held.info();
                Announced {
                    disk: bitmap.disk_alias.clone(),
                    name: bitmap.alias.clone(),
                    recording,
                    persistent: bitmap.persistent.unwrap_or(persistent),
                    granularity,
                    len_bytes: bitmap.node.len_bytes(),
                }
            })
            .collect();
        encode_setup(&all)
    }

    fn total_bytes(&self) -> u64 {
        self.held.iter().map(|held| held.serialized_bytes()).sum()
    }

    /// All of `bytes` is left to be sent.
    fn show_left(&self, bytes: u64) -> Result<(), ParticipantError> {
        self.context()?.counters.update(|stats| {
            (stats.postcopy_total, stats.postcopy_left) = (bytes, bytes);
        });
        Ok(())
    }

    fn send(&self, piece: &Piece, left: u64) -> Result<(), ParticipantError> {
        let context = self.context()?;
        let body = piece.encode();
        let mut cap = context.cap.clone();
        let mut unsent = body.len();
        while unsent > 0 {
            let allowed = cap.allow(unsent)?;
            cap.sent(allowed);
            unsent -= allowed.min(unsent);
        }
        context.send(SECTION, Stage::Postcopy, &body)?;
        context.counters.update(|stats| {
            stats.postcopy_left = left;
            stats.postcopy_bytes += body.len() as u64;
            stats.transferred_bytes += body.len() as u64;
            stats.control_bytes += body.len() as u64;
        });
        Ok(())
    }
}

/// Marks in a chunk, word by word.
#[expect(clippy::host_endian_bytes, reason = "a count has no order")]
fn marked(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let words = words.iter().map(|word| u64::from(u64::from_ne_bytes(*word).count_ones()));
    words.sum::<u64>() + rest.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>()
}

impl Outgoing for BitmapsOutgoing {
    fn section(&self) -> &'static str {
        SECTION
    }

    fn capability(&self) -> Option<&'static str> {
        Some(BITMAPS)
    }

    fn options(&self) -> &'static [&'static str] {
        &[]
    }

    fn roles(&self, _: &Hello) -> Vec<Role> {
        Vec::new()
    }

    fn setup(&mut self, context: OutgoingContext) -> Result<(), ParticipantError> {
        if self.bitmaps.len() > usize::from(MAX_BITMAPS) {
            return Err(BitmapsError::TooMany { found: self.bitmaps.len() }.into());
        }
        for bitmap in &self.bitmaps {
            let held = bitmap.node.bitmaps().hold(&bitmap.name).map_err(|source| {
                BitmapsError::Bitmap { disk: bitmap.node.id().to_owned(), source }
            })?;
            // Closing the disk at the switch does not store it here, unless it stays after all.
            held.will_leave();
            self.held.push(held);
        }
        context.send(SECTION, Stage::Setup, &self.announcement())?;
        self.context = Some(context);
        Ok(())
    }

    fn iterate(&mut self, _: u64, _: Budget) -> Result<Step, ParticipantError> {
        Ok(Step::Done(Pass::default()))
    }

    fn pending(&mut self, _: Precision) -> Result<Pending, ParticipantError> {
        Ok(Pending::default())
    }

    fn rate_has_changed(&mut self) {}

    fn complete(&mut self) -> Result<(), ParticipantError> {
        // Known before anybody hears that this phase has begun.
        self.show_left(self.total_bytes())?;
        Ok(self.context()?.push(SECTION, Stage::End, &[])?)
    }

    fn called_off(&mut self) -> Result<(), ParticipantError> {
        self.show_left(0)
    }

    fn can_postcopy(&self) -> bool {
        !self.bitmaps.is_empty()
    }

    fn postcopy(&mut self) -> Result<(), ParticipantError> {
        let mut left = self.total_bytes();
        // The guest does not run here any more: nothing changes them.
        for (bitmap, held) in (0u16..).zip(&self.held) {
            if held.info().inconsistent {
                // It has missed writes, in a stop that was called off. The destination misses it and says so.
                log::warn!("dirty bitmap {} is inconsistent and not sent", held.name());
                continue;
            }
            let mut granules = 0;
            for chunk in held.chunks() {
                if let Content::Data(bytes) = &chunk.content {
                    granules += marked(bytes);
                }
                left = left.saturating_sub(chunk.len_bytes());
                self.send(&Piece::Chunk { bitmap, chunk }, left)?;
            }
            self.send(&Piece::Complete { bitmap, granules }, left)?;
        }
        Ok(())
    }

    fn cleanup(&mut self, outcome: Outcome) {
        for held in self.held.drain(..) {
            // Also if it has not arrived: it would miss what the guest writes there.
            if outcome == Outcome::Moved {
                held.leave();
            }
        }
    }
}
