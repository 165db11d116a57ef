//! Finds what need not be saved, while the guest writes.
//!
//! A cluster whose bit is set has not been written since the moment that is saved. So what its storage says now was
//! true then, and clearing the bit is right; clearing one that has been cleared meanwhile changes nothing.

use super::{BackupOptions, BackupSync};
use crate::block::BlockNode;
use crate::block::backend::{ByteRange, Content};
use crate::block::bitmap::DirtyBitmap;
use crate::block::bitmaps::Frozen;
use std::time::{Duration, Instant};

/// How long one step may take: other things wait.
const STEP: Duration = Duration::from_millis(10);

/// What is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Skipped {
    /// Extents with this content.
    Extents(Content),
    /// What is not marked in the bitmap.
    Clean,
}

/// A search from the disk's start to its end.
pub(super) struct Search {
    /// `None` when it is done.
    skipped: Option<Skipped>,
    at: u64,
}

impl Search {
    pub fn new(options: &BackupOptions) -> Self {
        let skipped = match options.sync {
            BackupSync::Full if options.target_is_blank => Some(Skipped::Extents(Content::Zero)),
            BackupSync::Top => Some(Skipped::Extents(Content::Backing)),
            BackupSync::Bitmap => Some(Skipped::Clean),
            BackupSync::Full | BackupSync::None => None,
        };
        Self { skipped, at: 0 }
    }

    /// Whether all that is marked is to be saved.
    pub fn is_done(&self) -> bool {
        self.skipped.is_none()
    }

    /// Up to where all that is marked is to be saved, in whole granules of `to_read`.
    pub fn searched_bytes(&self, to_read: &DirtyBitmap) -> u64 {
        match self.skipped {
            None => to_read.len_bytes(),
            Some(_) => self.at / to_read.granule_bytes() * to_read.granule_bytes(),
        }
    }

    /// Searches on for a moment. A large image may have millions of extents.
    pub fn go_on(&mut self, source: &BlockNode, to_read: &DirtyBitmap, frozen: Option<&Frozen>) {
        let until = Instant::now() + STEP;
        match self.skipped {
            None => {}
            Some(Skipped::Clean) => {
                if let Some(frozen) = frozen {
                    clear_what_is_clean(to_read, frozen.marks());
                }
                self.skipped = None;
            }
            Some(Skipped::Extents(content)) => {
                while self.skipped.is_some() && Instant::now() < until {
                    self.look(source, to_read, content);
                }
            }
        }
    }

    /// Looks at one extent.
    fn look(&mut self, source: &BlockNode, to_read: &DirtyBitmap, skipped: Content) {
        let left = source.len_bytes().saturating_sub(self.at);
        if left == 0 {
            self.skipped = None;
            return;
        }
        match source.extent_at(self.at) {
            Ok(extent) => {
                // Clamped, so that the search ends whatever the backend returns.
                let len_bytes = extent.len_bytes.clamp(1, left);
                if extent.content == skipped {
                    to_read.clear_within(ByteRange { offset_bytes: self.at, len_bytes });
                }
                self.at += len_bytes;
            }
            Err(error) => {
                log::warn!("disk {}: its holes are copied as data: {error}", source.id());
                self.skipped = None;
            }
        }
    }
}

fn clear_what_is_clean(to_read: &DirtyBitmap, marks: &DirtyBitmap) {
    let mut at = 0;
    let end = ByteRange { offset_bytes: marks.len_bytes(), len_bytes: 0 };
    for run in marks.runs().chain([end]) {
        to_read.clear_within(ByteRange {
            offset_bytes: at,
            len_bytes: run.offset_bytes.saturating_sub(at),
        });
        at = run.end();
    }
}
