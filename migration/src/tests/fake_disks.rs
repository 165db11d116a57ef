//! Disks in memory at both ends, and guests that write theirs while they move.

use crate::block::{IncomingDisk, SourceDisk, SourceDisks, Tuning};
use devices::block::BlockNode;
use devices::block::backend::{BackingChain, BlockBackend, Content, Extent, LockError};
use devices::block::memory::{MemoryDisk, Script};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

#[derive(Clone)]
pub struct FakeDisk {
    pub here: Arc<BlockNode>,
    pub there: Arc<BlockNode>,
    pub here_script: Arc<Script>,
    pub there_script: Arc<Script>,
}

#[derive(Clone, Default)]
pub struct FakeDisks {
    pub disks: Vec<FakeDisk>,
    pub tuning: Tuning,
    /// Whether the guest writes them while it runs.
    pub busy: bool,
}

/// A disk that panics in whatever `panics` names: "read", "write" or "flush".
#[derive(Debug)]
pub struct PanickingDisk {
    inner: MemoryDisk,
    panics: &'static str,
}

impl PanickingDisk {
    pub fn node(id: &str, len_bytes: u64, panics: &'static str) -> Arc<BlockNode> {
        let inner = MemoryDisk::new(len_bytes);
        Arc::new(BlockNode::new(id, Box::new(Self { inner, panics })))
    }

    fn enter(&self, what: &str) {
        assert!(self.panics != what, "scripted panic");
    }
}

impl BlockBackend for PanickingDisk {
    fn location(&self) -> String {
        self.inner.location()
    }

    fn format(&self) -> &'static str {
        self.inner.format()
    }

    fn backing(&self) -> Option<Arc<dyn BackingChain>> {
        None
    }

    fn is_direct(&self) -> bool {
        false
    }

    fn len_bytes(&self) -> u64 {
        self.inner.len_bytes()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.enter("read");
        self.inner.read_at(buffer, offset_bytes)
    }

    fn write_at(&self, buffer: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.enter("write");
        self.inner.write_at(buffer, offset_bytes)
    }

    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        self.inner.discard(offset_bytes, len_bytes)
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()> {
        self.inner.write_zeroes(offset_bytes, len_bytes, may_unmap)
    }

    fn extent_at(&self, offset_bytes: u64) -> io::Result<Extent> {
        let len_bytes = self.inner.len_bytes() - offset_bytes;
        Ok(Extent { len_bytes, content: Content::Data })
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.inner.allocated_bytes()
    }

    fn plain_file(&self) -> Option<(Arc<File>, usize)> {
        None
    }

    fn write_back(&self) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.enter("flush");
        self.inner.flush()
    }

    fn lock(&self) -> Result<(), LockError> {
        Ok(())
    }

    fn unlock(&self) {}
}

fn node(id: &str, len_bytes: u64) -> (Arc<BlockNode>, Arc<Script>) {
    let disk = MemoryDisk::new(len_bytes);
    let script = disk.script();
    (Arc::new(BlockNode::new(id, Box::new(disk))), script)
}

impl FakeDisks {
    /// Disks `d0`, `d1`… of these sizes.
    pub fn new(sizes: &[u64]) -> Self {
        let disk = |(number, len): (usize, &u64)| {
            let id = format!("d{number}");
            let ((here, here_script), (there, there_script)) = (node(&id, *len), node(&id, *len));
            FakeDisk { here, there, here_script, there_script }
        };
        let disks = sizes.iter().enumerate().map(disk).collect();
        Self { disks, ..Default::default() }
    }

    pub fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    pub fn outgoing(&self) -> SourceDisks {
        let disk = |disk: &FakeDisk| SourceDisk { node: disk.here.clone(), only_top: false };
        SourceDisks { disks: self.disks.iter().map(disk).collect(), tuning: self.tuning }
    }

    pub fn incoming(&self) -> Vec<IncomingDisk> {
        let disk = |disk: &FakeDisk| IncomingDisk { node: disk.there.clone(), only_top: false };
        self.disks.iter().map(disk).collect()
    }

    /// Fills the disks with bytes that tell their place.
    pub fn fill(&self) {
        for (number, disk) in (1u8..).zip(&self.disks) {
            for sector in 0..disk.here.len_bytes() / 512 {
                let byte = u8::try_from(sector % 250).unwrap().wrapping_add(number);
                disk.here.write_at(&[byte; 512], sector * 512).unwrap();
            }
        }
    }

    pub fn assert_same(&self) {
        for disk in &self.disks {
            let len = usize::try_from(disk.here.len_bytes()).unwrap();
            let mut bytes = [vec![0; len], vec![0; len]];
            disk.here.copy_at(&mut bytes[0], 0).unwrap();
            disk.there.copy_at(&mut bytes[1], 0).unwrap();
            let [here, there] = bytes;
            let differs = here.chunks(512).zip(there.chunks(512)).position(|(a, b)| a != b);
            assert_eq!(differs, None, "a sector of {} differs", disk.here.id());
        }
    }

    pub fn start_writers(&self) -> DiskWriters {
        let nodes = self.disks.iter().filter(|_| self.busy).map(|disk| disk.here.clone());
        DiskWriters(nodes.map(DiskWriter::start).collect())
    }
}

/// Writes, zeroes and discards here and there.
struct DiskWriter {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl DiskWriter {
    fn start(node: Arc<BlockNode>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let sectors = node.len_bytes() / 512;
            let (mut random, mut number) = (1u64, 0u64);
            while !stopped.load(SeqCst) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let first = (random >> 8) % sectors;
                let count = (random % 9 + 1).min(sectors - first);
                let (offset, len) = (first * 512, usize::try_from(count * 512).unwrap());
                let byte = u8::try_from(number % 251).unwrap();
                match number % 8 {
                    0 => node.write_zeroes(offset, count * 512, true),
                    1 => node.discard(offset, count * 512),
                    _ => node.write_at(&vec![byte; len], offset),
                }
                .unwrap();
                number += 1;
                // A guest's disk is not as fast as memory.
                std::thread::sleep(Duration::from_micros(100));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

#[derive(Default)]
pub struct DiskWriters(Vec<DiskWriter>);

impl DiskWriters {
    pub fn stop(&mut self) {
        for writer in &mut self.0 {
            writer.stop.store(true, SeqCst);
            if let Some(thread) = writer.thread.take() {
                thread.join().unwrap();
            }
        }
    }
}

impl Drop for DiskWriters {
    fn drop(&mut self) {
        self.stop();
    }
}
