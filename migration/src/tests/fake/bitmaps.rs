//! A disk that both sides have, with dirty bitmaps that move.

use crate::bitmap::incoming::BitmapsIncoming;
use crate::bitmap::mapping::Mapping;
use crate::bitmap::outgoing::{BitmapsOutgoing, SourceBitmap};
use crate::participant::{Incoming, Outgoing};
use devices::block::BlockNode;
use devices::block::bitmaps::{BitmapName, NewBitmap};
use devices::block::memory::MemoryDisk;
use std::sync::Arc;

/// Of the disk: the last granule of a bitmap is short.
pub const LEN_BYTES: u64 = (3 << 30) + 512;
/// Where the guest writes as soon as it runs at the destination.
pub const WRITTEN_THERE: u64 = 2 << 30;

#[derive(Clone)]
pub struct FakeBitmaps {
    pub source: Arc<BlockNode>,
    pub destination: Arc<BlockNode>,
    /// Those that move. None: whoever speaks for the source announces them.
    pub moving: Vec<SourceBitmap>,
    pub mapping: Option<Arc<Mapping>>,
}

impl FakeBitmaps {
    pub fn new() -> Self {
        let node =
            || Arc::new(BlockNode::new("root", Box::new(MemoryDisk::without_storage(LEN_BYTES))));
        Self { source: node(), destination: node(), moving: Vec::new(), mapping: None }
    }

    /// Adds a bitmap at the source, which moves.
    pub fn with(mut self, name: &str, granularity: u64, recording: bool) -> Self {
        let name = BitmapName::new(name).unwrap();
        let new = NewBitmap { name: name.clone(), granularity, persistent: false, recording: true };
        self.source.bitmaps().add(new).unwrap();
        // Some of it was written, at odd places and at the end.
        for offset in [0, 3 << 20, (1 << 30) + 512, LEN_BYTES - 512] {
            self.source.discard(offset, 512).unwrap();
        }
        if !recording {
            self.source.bitmaps().disable(&name).unwrap();
        }
        let (disk_alias, alias) = ("root".to_owned(), name.as_str().to_owned());
        let node = self.source.clone();
        self.moving.push(SourceBitmap { node, name, disk_alias, alias, persistent: None });
        self
    }

    pub fn outgoing(&self) -> Option<Box<dyn Outgoing>> {
        let moving = self.moving.clone();
        (!moving.is_empty()).then(|| Box::new(BitmapsOutgoing::new(moving)) as Box<dyn Outgoing>)
    }

    pub fn incoming(&self) -> Box<dyn Incoming> {
        Box::new(BitmapsIncoming::new(vec![self.destination.clone()], self.mapping.clone()))
    }

    /// The guest's first instruction at the destination is a write.
    pub fn guest_runs_there(&self) {
        self.destination.discard(WRITTEN_THERE, 4096).unwrap();
    }
}
