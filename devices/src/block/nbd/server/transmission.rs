//! A connection after its handshake: requests that are received one after the other and served several at a time.
//!
//! ```text
//! socket ─▶ Mutex<Inbox> ─▶ worker 1 … [`MAX_WORKERS`] ─▶ BlockNode ─▶ Mutex<Output> ─▶ socket
//! ```
//! A worker takes the inbox, receives a request with its data, gives the inbox to the next worker, and serves it;
//! there is no queue. So a client that waits for every reply has one worker, and one that sends ahead keeps the disk
//! busy. Replies come in any order, as the protocol allows. Both locks are held while the socket is waited for, by
//! who speaks for the connection at that moment: shutting the socket down wakes them.
//!
//! Data passes in pieces of [`PIECE_BYTES`] between socket and disk: a large read is sent while it is read, a large
//! write is written while it is received, and neither takes more memory than a small one. A write of one piece or
//! less reaches the disk whole or not at all, however its connection ends; of a longer one, pieces that have
//! arrived may have been written, each marked in the disk's bitmaps like any write.

use super::STACK_BYTES;
use super::handshake::Chosen;
pub use super::request::PIECE_BYTES;
use super::request::{Client, Received, Worker};
use super::stream::{Input, Stream};
use crate::lock;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Scope;

/// Most requests of a connection that are served at a time.
pub const MAX_WORKERS: usize = 4;

/// A connection that uses an export.
pub struct Session {
    client: Client,
    inbox: Mutex<Inbox>,
    /// Workers that wait for the inbox.
    waiting: AtomicUsize,
}

/// Where requests come from.
struct Inbox {
    input: Input,
    workers: usize,
    /// No further request is received.
    ended: bool,
    /// Why, if the client is at fault or cannot be reached.
    error: Option<io::Error>,
}

impl Session {
    /// Serves what a client has chosen.
    pub fn new(stream: Stream, chosen: Chosen) -> Self {
        let Chosen { export, structured, contexts } = chosen;
        let Stream { input, output } = stream;
        let inbox = Mutex::new(Inbox { input, workers: 1, ended: false, error: None });
        let client = Client::new(export, structured, contexts, output);
        Self { client, inbox, waiting: AtomicUsize::new(0) }
    }

    /// Serves requests until the client leaves or the export is removed, and those that it has sent before are done.
    ///
    /// # Errors
    /// If the client breaks the protocol or cannot be reached.
    pub fn serve(self, disconnect: &(dyn Fn() + Sync)) -> io::Result<()> {
        std::thread::scope(|scope| self.work(scope, disconnect));
        lock(&self.inbox).error.take().map_or(Ok(()), Err)
    }

    /// A worker's life.
    fn work<'s>(&'s self, scope: &'s Scope<'s, '_>, disconnect: &'s (dyn Fn() + Sync)) {
        let mut worker = Worker::new(&self.client);
        while let Some(received) = self.receive(&mut worker, scope, disconnect) {
            if let Err(error) = worker.serve(received) {
                // Wakes whoever has the inbox.
                disconnect();
                let mut inbox = lock(&self.inbox);
                inbox.ended = true;
                inbox.error.get_or_insert(error);
            }
        }
    }

    /// The next request, and another worker for the one after it if that is there already and no worker is free.
    fn receive<'s>(
        &'s self,
        worker: &mut Worker<'s>,
        scope: &'s Scope<'s, '_>,
        disconnect: &'s (dyn Fn() + Sync),
    ) -> Option<Received> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut inbox = lock(&self.inbox);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        if inbox.ended {
            return None;
        }
        let received = worker.receive(&mut inbox.input);
        inbox.ended = !matches!(received, Ok(Some(_)));
        let received = match received {
            Ok(received) => received?,
            Err(error) => {
                inbox.error.get_or_insert(error);
                return None;
            }
        };
        let is_alone = self.waiting.load(Ordering::SeqCst) == 0;
        if is_alone && inbox.workers < MAX_WORKERS && inbox.input.has_more() {
            let builder = std::thread::Builder::new().name("nbd-worker".into());
            let work = move || self.work(scope, disconnect);
            // Without it, the others go on.
            if builder.stack_size(STACK_BYTES).spawn_scoped(scope, work).is_ok() {
                inbox.workers += 1;
            }
        }
        Some(received)
    }
}
