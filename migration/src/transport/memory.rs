//! A connection within a process that can be cut at any byte, for tests.

use super::Transport;
use devices::ram::{GuestAddress, GuestRam};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vm_memory::Bytes;

#[derive(Default)]
struct Link {
    /// Bytes under way, to each end.
    queues: [VecDeque<u8>; 2],
    closed: bool,
    /// Bytes that still pass before the link is cut.
    passes: Option<u64>,
    exchanged: u64,
}

type Shared = Arc<(Mutex<Link>, Condvar)>;

/// One end of a pair.
pub struct MemoryTransport {
    link: Shared,
    end: usize,
    patience: Duration,
}

/// A look at the pair from outside.
pub struct MemoryLink(Shared);

/// A connected pair; with `cut_after`, the link is lost once that many bytes have been written by both
/// ends together.
pub fn pair(cut_after: Option<u64>) -> (MemoryTransport, MemoryTransport, MemoryLink) {
    let link: Shared = Arc::default();
    lock(&link).passes = cut_after;
    let end = |end| MemoryTransport { link: link.clone(), end, patience: super::PATIENCE };
    (end(0), end(1), MemoryLink(link.clone()))
}

impl MemoryLink {
    /// Bytes written by both ends.
    pub fn bytes_exchanged(&self) -> u64 {
        lock(&self.0).exchanged
    }
}

fn lock(link: &Shared) -> MutexGuard<'_, Link> {
    link.0.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Transport for MemoryTransport {
    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut link = lock(&self.link);
        for byte in buffer {
            *byte = loop {
                if let Some(byte) = link.queues[self.end].pop_front() {
                    break byte;
                }
                if link.closed {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let waited = self.link.1.wait_timeout(link, self.patience);
                let (next, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                link = next;
                if timeout.timed_out() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            };
        }
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut link = lock(&self.link);
        for byte in bytes {
            if link.passes == Some(0) {
                link.closed = true;
            }
            if link.closed {
                self.link.1.notify_all();
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            link.passes = link.passes.map(|passes| passes - 1);
            link.exchanged += 1;
            link.queues[1 - self.end].push_back(*byte);
        }
        self.link.1.notify_all();
        Ok(())
    }

    fn read_pages(&mut self, ram: &GuestRam, address: GuestAddress, len: usize) -> io::Result<()> {
        let mut copy = vec![0; len];
        self.read_exact(&mut copy)?;
        ram.write_slice(&copy, address).map_err(io::Error::other)
    }

    fn write_pages(&mut self, ram: &GuestRam, address: GuestAddress, len: usize) -> io::Result<()> {
        let mut copy = vec![0; len];
        ram.read_slice(&mut copy, address).map_err(io::Error::other)?;
        self.write_all(&copy)
    }

    fn patience(&self) -> Duration {
        self.patience
    }

    fn set_patience(&mut self, patience: Duration) -> io::Result<()> {
        self.patience = patience;
        Ok(())
    }

    fn stopper(&self) -> io::Result<Box<dyn Fn() + Send + Sync>> {
        let link = self.link.clone();
        Ok(Box::new(move || {
            lock(&link).closed = true;
            link.1.notify_all();
        }))
    }
}

impl Drop for MemoryTransport {
    fn drop(&mut self) {
        lock(&self.link).closed = true;
        self.link.1.notify_all();
    }
}
