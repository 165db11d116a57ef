//! A connection that is slower than others, or stands still.

use crate::transport::memory::MemoryTransport;
use crate::transport::{PageSlice, TICK, Transport};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

/// A connection whose other end reads little: at its own pace, or up to where it stands still.
pub struct Narrow {
    pub inner: MemoryTransport,
    /// Bytes that are still taken.
    pub room: AtomicU64,
    /// Calls that still take their time.
    pub slow_reads: AtomicU64,
}

impl Transport for Narrow {
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let slow = |left: u64| left.checked_sub(1);
        if self.slow_reads.fetch_update(SeqCst, SeqCst, slow).is_err() {
            return self.inner.receive(into);
        }
        // Being slow is what it is for.
        std::thread::sleep(Duration::from_millis(1));
        let few = into.len().min(400);
        self.inner.receive(&mut into[..few])
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.room.load(SeqCst);
        let fits = bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        if fits == 0 {
            std::thread::sleep(TICK.min(self.inner.patience()));
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = self.inner.send(&bytes[..fits])?;
        self.room.fetch_sub(count as u64, SeqCst);
        Ok(count)
    }

    fn receive_pages(&self, pages: &[PageSlice<'_>]) -> io::Result<usize> {
        let Some(first) = pages.first() else { return Ok(0) };
        let mut copy = vec![0; first.len()];
        let count = self.receive(&mut copy)?;
        first.copy_from(&copy[..count]);
        Ok(count)
    }

    fn send_pages(&self, head: &[u8], pages: &[PageSlice<'_>]) -> io::Result<usize> {
        match pages.first() {
            Some(first) if head.is_empty() => {
                let mut copy = vec![0; first.len()];
                first.copy_to(&mut copy);
                self.send(&copy)
            }
            _ => self.send(head),
        }
    }

    fn patience(&self) -> Duration {
        self.inner.patience()
    }

    fn shutdown(&self) {
        self.inner.shutdown();
    }
}
