//! Threads that a job leaves behind if they hang. Nobody waits for one.

use super::MAX_OPERATIONS;
use crate::block::aligned::AlignedBuffer;
use crate::lock;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A thread's own buffer, made when it is first needed.
pub type Buffer = Option<AlignedBuffer>;

type Each<W> = Arc<dyn Fn(W, &mut Buffer) + Send + Sync>;

/// Does pieces of work in the background, up to [`MAX_OPERATIONS`] at a time.
pub struct Pool<W> {
    each: Each<W>,
    to_do: Arc<Mutex<Receiver<W>>>,
    /// Until it is dropped.
    work: Option<Sender<W>>,
    /// Spawned as they are needed.
    threads: Vec<JoinHandle<()>>,
    in_flight: usize,
    name: String,
}

impl<W: Send + 'static> Pool<W> {
    /// Calls `each` with each piece of work on a thread, which is called after `name`. It must not panic, and tell
    /// when it has done.
    pub fn new(
        name: impl Into<String>,
        each: impl Fn(W, &mut Buffer) + Send + Sync + 'static,
    ) -> Self {
        let (work, to_do) = channel();
        let (to_do, name) = (Arc::new(Mutex::new(to_do)), name.into());
        let each = Arc::new(each);
        Self { each, to_do, work: Some(work), threads: Vec::new(), in_flight: 0, name }
    }

    /// Pieces of work that are not done.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Hands out a piece of work.
    ///
    /// # Errors
    /// If there is no thread for it; it is given back.
    pub fn start(&mut self, work: W) -> Result<(), (W, io::Error)> {
        if let Err(error) = self.have_thread() {
            return Err((work, error));
        }
        let gone = || io::Error::other("nobody does the work, which is a bug");
        let sent = self.work.as_ref().map(|sender| sender.send(work));
        match sent {
            Some(Ok(())) => self.in_flight += 1,
            Some(Err(back)) => return Err((back.0, gone())),
            None => {}
        }
        Ok(())
    }

    /// That one more piece of work finds a thread.
    fn have_thread(&mut self) -> io::Result<()> {
        if self.threads.len() >= (self.in_flight + 1).min(MAX_OPERATIONS) {
            return Ok(());
        }
        let (to_do, each) = (self.to_do.clone(), self.each.clone());
        let thread = std::thread::Builder::new()
            .name(self.name.clone())
            .stack_size(128 << 10)
            .spawn(move || work_all(&to_do, &*each));
        match thread {
            Ok(thread) => self.threads.push(thread),
            // Those that are here do it.
            Err(_) if !self.threads.is_empty() => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Call it for each piece that is done.
    pub fn ended(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }
}

/// Body of a thread. Ends when nobody hands out work any more.
fn work_all<W>(to_do: &Mutex<Receiver<W>>, each: &dyn Fn(W, &mut Buffer)) {
    let mut buffer = None;
    loop {
        // One thread waits for work, the others for their turn to wait.
        let next = lock(to_do).recv();
        let Ok(work) = next else { return };
        each(work, &mut buffer);
    }
}

impl<W> Drop for Pool<W> {
    fn drop(&mut self) {
        self.work = None;
        // Otherwise one may hang: its thread ends after it, if it ever does.
        if self.in_flight == 0 {
            for thread in self.threads.drain(..) {
                // Panics were reported.
                let _ = thread.join();
            }
        }
    }
}
