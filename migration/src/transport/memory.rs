//! In-process connections for tests. A fuse cuts all of them after a number of bytes, counted over all in
//! the order of writing; each connection may also have its own fuse.

use super::{PATIENCE, PageSlice, TICK, Transport};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Default)]
struct State {
    /// Bytes in flight: per connection, to each end.
    queues: Vec<[VecDeque<u8>; 2]>,
    closed: Vec<bool>,
    /// Bytes left on each connection's own fuse.
    fuses: Vec<Option<u64>>,
    /// Bytes left on the common fuse.
    passes: Option<u64>,
    exchanged: u64,
}

/// A network of connections with one fuse.
#[derive(Clone)]
pub struct MemoryLink {
    shared: Arc<(Mutex<State>, Condvar)>,
    patience: Duration,
}

/// One end of a connection.
pub struct MemoryTransport {
    link: MemoryLink,
    connection: usize,
    end: usize,
}

impl MemoryLink {
    /// A network that is cut after `cut_after` bytes, if given.
    pub fn new(cut_after: Option<u64>) -> Self {
        let link = Self { shared: Arc::default(), patience: PATIENCE };
        link.state().passes = cut_after;
        link
    }

    /// How long the ends of connections made from now on wait for each other.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// A new connection: its two ends.
    pub fn connect(&self) -> (MemoryTransport, MemoryTransport) {
        self.connect_for(None)
    }

    /// A new connection that alone is cut after `bytes`, if given.
    pub fn connect_for(&self, bytes: Option<u64>) -> (MemoryTransport, MemoryTransport) {
        let mut state = self.state();
        state.queues.push(Default::default());
        state.closed.push(false);
        state.fuses.push(bytes);
        let connection = state.queues.len() - 1;
        let end = |end| MemoryTransport { link: self.clone(), connection, end };
        (end(0), end(1))
    }

    /// Bytes written so far.
    pub fn bytes_exchanged(&self) -> u64 {
        self.state().exchanged
    }

    fn state(&self) -> MutexGuard<'_, State> {
        devices::lock(&self.shared.0)
    }
}

impl Transport for MemoryTransport {
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let end = Instant::now() + TICK.min(self.link.patience);
        let mut state = self.link.state();
        loop {
            let queue = &mut state.queues[self.connection][self.end];
            if !queue.is_empty() {
                let count = into.len().min(queue.len());
                into[..count]
                    .iter_mut()
                    .zip(queue.drain(..count))
                    .for_each(|(to, from)| *to = from);
                return Ok(count);
            }
            if state.closed[self.connection] {
                return Ok(0);
            }
            // Other connections wake this one too, which must not extend the wait.
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let waited = self.link.shared.1.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.link.state();
        // A fuse longer than any slice lets all of it pass.
        let upto = |fuse: Option<u64>| {
            fuse.map_or(bytes.len(), |left| usize::try_from(left).unwrap_or(usize::MAX))
        };
        let own = state.fuses[self.connection];
        let (all, alone) = (upto(state.passes), upto(own));
        let passing = bytes.len().min(all).min(alone);
        if all == 0 && !bytes.is_empty() {
            state.closed.fill(true);
        }
        if alone == 0 && !bytes.is_empty() {
            state.closed[self.connection] = true;
        }
        self.link.shared.1.notify_all();
        if state.closed[self.connection] {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        state.passes = state.passes.map(|passes| passes - passing as u64);
        state.fuses[self.connection] = own.map(|left| left - passing as u64);
        state.exchanged += passing as u64;
        state.queues[self.connection][1 - self.end].extend(&bytes[..passing]);
        Ok(passing)
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
                let mut copy = vec![0u8; first.len()];
                first.copy_to(&mut copy);
                self.send(&copy)
            }
            _ => self.send(head),
        }
    }

    fn patience(&self) -> Duration {
        self.link.patience
    }

    fn shutdown(&self) {
        self.link.state().closed[self.connection] = true;
        self.link.shared.1.notify_all();
    }
}

impl Drop for MemoryTransport {
    fn drop(&mut self) {
        self.shutdown();
    }
}
