//! The bitmaps at the destination, as a participant.

use super::frame::{Announced, Piece, decode_setup};
use super::mapping::Mapping;
use super::{BitmapsError, SECTION};
use crate::error::ParticipantError;
use crate::participant::{Incoming, IncomingContext, Outcome};
use crate::stats::Counters;
use crate::wire::section::Stage;
use crate::wire::{Role, WireError};
use devices::block::BlockNode;
use devices::block::bitmaps::{Arriving, BitmapName, NewBitmap};
use std::sync::Arc;

/// How far a bitmap has come.
enum State {
    Arriving {
        bitmap: Arriving,
        /// Where the next chunk belongs.
        at_bytes: u64,
        granules: u64,
    },
    Complete,
    /// It was dropped, for this reason. The rest of it is skipped.
    Dropped(String),
}

struct Expected {
    /// "disk/bitmap", for users.
    name: String,
    state: State,
}

/// The bitmaps at the destination.
pub struct BitmapsIncoming {
    nodes: Vec<Arc<BlockNode>>,
    mapping: Option<Arc<Mapping>>,
    expected: Vec<Expected>,
    counters: Option<Arc<Counters>>,
    ended: bool,
}

impl BitmapsIncoming {
    /// For these disks.
    pub fn new(nodes: Vec<Arc<BlockNode>>, mapping: Option<Arc<Mapping>>) -> Self {
        Self { nodes, mapping, expected: Vec::new(), counters: None, ended: false }
    }

    /// Adds an announced bitmap, which marks what the guest writes from its first instruction here.
    fn announced(&self, announced: Announced) -> Result<Expected, ParticipantError> {
        let Announced { disk, name, recording, persistent, granularity, len_bytes } = announced;
        let here = match &self.mapping {
            None => Some((disk.clone(), name.clone(), None)),
            Some(mapping) => mapping.here(&disk, &name),
        };
        let unmapped = || BitmapsError::NoDisk { disk: disk.clone(), name: name.clone() };
        let (disk, name, transform) = here.ok_or_else(unmapped)?;
        let Some(node) = self.nodes.iter().find(|node| node.id() == disk) else {
            return Err(BitmapsError::NoDisk { disk, name }.into());
        };
        if node.len_bytes() != len_bytes {
            let (theirs, ours) = (len_bytes, node.len_bytes());
            return Err(BitmapsError::OtherSize { disk, name, theirs, ours }.into());
        }
        let what = "dirty-bitmap setup";
        let name = BitmapName::new(name)
            .map_err(|error| WireError::Malformed { what, reason: error.to_string() })?;
        let persistent = transform.unwrap_or(persistent);
        let new = NewBitmap { name: name.clone(), granularity, persistent, recording };
        let bitmap = node.bitmaps().arrive(&new);
        let bitmap =
            bitmap.map_err(|source| BitmapsError::Bitmap { disk: disk.clone(), source })?;
        let state = State::Arriving { bitmap, at_bytes: 0, granules: 0 };
        Ok(Expected { name: format!("{disk}/{name}"), state })
    }

    fn load_piece(&mut self, piece: Piece) -> Result<(), ParticipantError> {
        let unexpected = |found| {
            ParticipantError::from(WireError::Unexpected { found, expected: "a piece of a bitmap" })
        };
        let number = piece.bitmap();
        let Some(expected) = self.expected.get_mut(usize::from(number)) else {
            return Err(unexpected(format!("bitmap number {number}")));
        };
        expected.state = match std::mem::replace(&mut expected.state, State::Complete) {
            State::Complete => {
                return Err(unexpected(format!("more of bitmap {} after its end", expected.name)));
            }
            State::Dropped(why) => State::Dropped(why),
            State::Arriving { bitmap, at_bytes, granules } => {
                advance(bitmap, at_bytes, granules, &piece).unwrap_or_else(|why| {
                    log::warn!("dirty bitmap {} is dropped: {why}", expected.name);
                    State::Dropped(why)
                })
            }
        };
        Ok(())
    }
}

/// Takes the next piece of a bitmap; if it is bad, drops the bitmap and says why.
fn advance(bitmap: Arriving, at_bytes: u64, granules: u64, piece: &Piece) -> Result<State, String> {
    match piece {
        Piece::Chunk { chunk, .. } if chunk.offset_bytes != at_bytes => {
            Err(format!("a chunk at {} came where one at {at_bytes} belongs", chunk.offset_bytes))
        }
        Piece::Chunk { chunk, .. } => {
            let marked = bitmap.load(chunk).map_err(|error| error.to_string())?;
            let (at_bytes, granules) = (at_bytes + chunk.len_bytes(), granules + marked);
            Ok(State::Arriving { bitmap, at_bytes, granules })
        }
        Piece::Complete { granules: sent, .. } => {
            let all = bitmap.serialized_bytes();
            if (at_bytes, granules) != (all, *sent) {
                return Err(format!(
                    "{at_bytes} of {all} bytes and {granules} of {sent} marks have come"
                ));
            }
            bitmap.finish();
            Ok(State::Complete)
        }
    }
}

impl Incoming for BitmapsIncoming {
    fn section(&self) -> &'static str {
        SECTION
    }

    fn owns(&self, _: Role) -> bool {
        false
    }

    fn needs_connection(&self) -> bool {
        false
    }

    fn setup(&mut self, context: IncomingContext, body: &[u8]) -> Result<(), ParticipantError> {
        let counters = self.counters.insert(context.counters).clone();
        let mut total = 0;
        for announced in decode_setup(body)? {
            let expected = self.announced(announced)?;
            if let State::Arriving { bitmap, .. } = &expected.state {
                total += bitmap.serialized_bytes();
            }
            self.expected.push(expected);
        }
        counters.update(|stats| (stats.postcopy_total, stats.postcopy_left) = (total, total));
        Ok(())
    }

    fn load(&mut self, stage: Stage, body: &[u8]) -> Result<(), ParticipantError> {
        match stage {
            Stage::End if body.is_empty() => {
                self.ended = true;
                Ok(())
            }
            Stage::Postcopy => {
                let piece = Piece::decode(body)?;
                if let Some(counters) = &self.counters {
                    let loaded = match &piece {
                        Piece::Chunk { chunk, .. } => chunk.len_bytes(),
                        Piece::Complete { .. } => 0,
                    };
                    counters.update(|stats| {
                        stats.postcopy_bytes += body.len() as u64;
                        stats.postcopy_left = stats.postcopy_left.saturating_sub(loaded);
                    });
                }
                self.load_piece(piece)
            }
            stage => {
                let found = format!("{stage:?} with {} bytes", body.len());
                Err(WireError::Unexpected { found, expected: "the end of the bitmaps' setup" }
                    .into())
            }
        }
    }

    fn finish(&mut self) -> Result<(), ParticipantError> {
        if self.ended { Ok(()) } else { Err(ParticipantError::not_set_up(SECTION)) }
    }

    fn called_off(&mut self) -> Result<(), ParticipantError> {
        self.ended = false;
        Ok(())
    }

    fn can_postcopy(&self) -> bool {
        !self.expected.is_empty()
    }

    fn missing(&mut self) -> Vec<String> {
        let missing = self.expected.iter().filter_map(|expected| match &expected.state {
            State::Complete => None,
            State::Arriving { .. } => Some(format!("dirty bitmap {}", expected.name)),
            State::Dropped(why) => Some(format!("dirty bitmap {} ({why})", expected.name)),
        });
        missing.collect()
    }

    fn cleanup(&mut self, _: Outcome) {
        // Dropping what is unfinished removes it.
        self.expected.clear();
    }
}
