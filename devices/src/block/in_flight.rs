//! Tracks the accesses in flight to a disk and marks writes in its dirty bitmaps when they end.
//!
//! Owned by a [`super::BlockNode`]. An [`InFlightGuard`] lives as long as an access; its drop marks every
//! bitmap that is attached *then*. So a copy that starts during a write sees either the written bytes or, a
//! moment later, the mark.

use super::backend::ByteRange;
use super::bitmap::DirtyBitmap;
use crate::lock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// A node's accesses in flight, and the bitmaps that its writes mark.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    count: AtomicU64,
    /// Number of drains; the end of an access takes the lock only if there are some.
    awaited: AtomicU64,
    bitmaps: RwLock<Vec<Arc<DirtyBitmap>>>,
    ended: (Mutex<()>, Condvar),
}

impl InFlight {
    /// Begins an access; `written` is the range that it may change, whether or not it succeeds.
    pub fn begin(self: &Arc<Self>, written: Option<ByteRange>) -> InFlightGuard {
        self.count.fetch_add(1, Ordering::SeqCst);
        InFlightGuard { node: self.clone(), written }
    }

    /// Attaches `bitmap`: every write that ends from now on marks it.
    pub fn add(&self, bitmap: Arc<DirtyBitmap>) {
        self.bitmaps.write().unwrap_or_else(PoisonError::into_inner).push(bitmap);
    }

    /// Detaches `bitmap`.
    pub fn remove(&self, bitmap: &Arc<DirtyBitmap>) {
        let mut bitmaps = self.bitmaps.write().unwrap_or_else(PoisonError::into_inner);
        bitmaps.retain(|other| !Arc::ptr_eq(other, bitmap));
    }

    /// Waits until nothing is in flight. The caller ensures that no new access begins.
    pub fn drain(&self) {
        self.drain_or_give_up(|| None);
    }

    /// Like [`InFlight::drain`], at most until `deadline`. Returns false on timeout.
    pub fn drain_until(&self, deadline: Instant) -> bool {
        self.drain_or_give_up(|| Some(deadline.saturating_duration_since(Instant::now())))
    }

    /// Waits for at most `patience`; `None` means forever.
    fn drain_or_give_up(&self, patience: impl Fn() -> Option<Duration>) -> bool {
        let is_over = || self.count.load(Ordering::SeqCst) == 0;
        let mut guard = lock(&self.ended.0);
        self.awaited.fetch_add(1, Ordering::SeqCst);
        while !is_over() {
            guard = match patience() {
                None => self.ended.1.wait(guard).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => break,
                Some(left) => {
                    let waited = self.ended.1.wait_timeout(guard, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        self.awaited.fetch_sub(1, Ordering::SeqCst);
        is_over()
    }
}

/// An access in flight; dropping it ends the access.
#[derive(Debug)]
pub(super) struct InFlightGuard {
    node: Arc<InFlight>,
    written: Option<ByteRange>,
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        if let Some(range) = self.written {
            let bitmaps = self.node.bitmaps.read().unwrap_or_else(PoisonError::into_inner);
            bitmaps.iter().for_each(|bitmap| bitmap.mark(range));
        }
        if self.node.count.fetch_sub(1, Ordering::SeqCst) == 1
            && self.node.awaited.load(Ordering::SeqCst) > 0
        {
            // Lock and unlock: a drain either waits by now or has yet to check the counter.
            drop(lock(&self.node.ended.0));
            self.node.ended.1.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap() -> Arc<DirtyBitmap> {
        Arc::new(DirtyBitmap::new(1 << 20, 512).unwrap())
    }

    #[test]
    fn a_write_marks_the_bitmaps_that_are_there_when_it_ends() {
        let (node, early, late) = (Arc::<InFlight>::default(), bitmap(), bitmap());
        node.add(early.clone());
        let written = Some(ByteRange { offset_bytes: 512, len_bytes: 512 });
        let write = node.begin(written);
        let read = node.begin(None);
        node.remove(&early);
        node.add(late.clone());
        assert_eq!(late.marked_bytes(), 0);
        drop((write, read));
        assert_eq!((early.marked_bytes(), late.marked_bytes()), (0, 512));
        assert!(late.is_marked(512));
    }

    #[test]
    fn draining_waits_for_the_last_access() {
        let node = Arc::<InFlight>::default();
        node.drain();
        let guards = [node.begin(None), node.begin(None)];
        let (sender, drained) = std::sync::mpsc::channel();
        let waiting = node.clone();
        let thread = std::thread::spawn(move || {
            waiting.drain();
            sender.send(()).unwrap();
        });
        for guard in guards {
            assert!(drained.try_recv().is_err());
            assert!(!node.drain_until(Instant::now() + Duration::from_millis(1)));
            drop(guard);
        }
        drained.recv_timeout(std::time::Duration::from_secs(30)).unwrap();
        thread.join().unwrap();
        assert!(node.drain_until(Instant::now()), "nothing is in flight, even at the deadline");
    }
}
