//! A [`Channel`] wraps a transport: it moves all bytes or returns an error.
//!
//! **No unbounded wait.** A call fails when the peer is silent on all connections, or is alive but makes no
//! progress here ([`Liveness`]); when its deadline passes, even if a byte arrives now and then; when the
//! migration is cancelled; or when the channel is *tripped* because another thread failed.

use super::{Liveness, PageSlice, Transport};
use crate::cancel::CancelToken;
use crate::wire::{self, Frame, HEADER_BYTES, Hello, Kind, WireError};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a peer may take for its Hello, and a source to open a channel.
pub const GREETING_PATIENCE: Duration = Duration::from_secs(10);

/// Decides how much may be sent now.
pub trait Throttle {
    /// How many of `wanted` bytes may be sent now; waits until there are some.
    fn allow(&mut self, wanted: usize) -> Result<usize, WireError>;
    /// Records that `bytes` were sent.
    fn sent(&mut self, bytes: usize);
}

/// A connection with stall detection, deadlines and cancel.
pub struct Channel {
    transport: Arc<dyn Transport>,
    cancel: CancelToken,
    tripped: AtomicBool,
    /// Bytes moved either way, so that another thread can see progress.
    moved: AtomicU64,
    /// Shared with the control connection, except during Hello.
    liveness: Arc<Liveness>,
}

/// One wait for the peer.
struct Wait {
    moved: Instant,
    deadline: Option<(&'static str, Instant, Duration)>,
}

impl Wait {
    fn patient() -> Self {
        Self { moved: Instant::now(), deadline: None }
    }

    fn until(what: &'static str, longest: Duration) -> Self {
        let deadline = Some((what, Instant::now() + longest, longest));
        Self { moved: Instant::now(), deadline }
    }

    fn check_deadline(&self) -> Result<Option<usize>, WireError> {
        match self.deadline {
            Some((what, end, within)) if Instant::now() >= end => {
                Err(WireError::Late { what, within })
            }
            _ => Ok(None),
        }
    }
}

impl Channel {
    /// A channel over `transport`; `cancel` ends its waits.
    pub fn new(transport: Arc<dyn Transport>, cancel: CancelToken) -> Self {
        let (tripped, moved) = (AtomicBool::new(false), AtomicU64::new(0));
        Self { transport, cancel, tripped, moved, liveness: Arc::default() }
    }

    /// The same channel, with liveness shared with the control connection.
    #[must_use]
    pub fn with_liveness(self, liveness: Arc<Liveness>) -> Self {
        Self { liveness, ..self }
    }

    /// The transport, to shut it down from elsewhere.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// Bytes moved either way so far.
    pub fn moved_bytes(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// Whether the migration is cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// Whether waits are in vain: the migration is cancelled, or another thread failed.
    pub fn is_interrupted(&self) -> bool {
        self.is_cancelled() || self.tripped.load(Ordering::Acquire)
    }

    /// Interrupts waits, because another thread failed.
    pub fn trip(&self) {
        self.tripped.store(true, Ordering::Release);
    }

    /// Evaluates the result of a transport call: `None` means retry.
    fn step(&self, wait: &mut Wait, result: io::Result<usize>) -> Result<Option<usize>, WireError> {
        if let Ok(count @ 1..) = result {
            wait.moved = Instant::now();
            self.moved.fetch_add(count as u64, Ordering::Relaxed);
        }
        if self.is_interrupted() {
            return Err(WireError::Interrupted);
        }
        match result {
            Ok(0) => Err(WireError::Lost(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => wait.check_deadline(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.liveness.check(wait.moved, self.transport.patience())?;
                wait.check_deadline()
            }
            Err(error) => Err(WireError::Lost(error)),
        }
    }

    fn read(&self, mut into: &mut [u8], wait: &mut Wait) -> Result<(), WireError> {
        while !into.is_empty() {
            let result = self.transport.receive(into);
            if let Some(count) = self.step(wait, result)? {
                self.liveness.heard();
                into = &mut into[count..];
                if !into.is_empty() {
                    // A byte now and then must not extend the deadline.
                    wait.check_deadline()?;
                }
            }
        }
        Ok(())
    }

    fn write(&self, mut bytes: &[u8], wait: &mut Wait) -> Result<(), WireError> {
        while !bytes.is_empty() {
            let result = self.transport.send(bytes);
            if let Some(count) = self.step(wait, result)? {
                bytes = &bytes[count..];
            }
        }
        Ok(())
    }

    /// Sends `bytes`.
    pub fn write_all(&self, bytes: &[u8]) -> Result<(), WireError> {
        self.write(bytes, &mut Wait::patient())
    }

    /// Fills `into`.
    pub fn read_exact(&self, into: &mut [u8]) -> Result<(), WireError> {
        self.read(into, &mut Wait::patient())
    }

    /// Fills `into`, however long the first byte takes: meanwhile the control connection checks whether the
    /// peer is alive.
    pub fn read_when_it_comes(&self, into: &mut [u8]) -> Result<(), WireError> {
        let count = loop {
            let mut wait = Wait::patient();
            let result = self.transport.receive(into);
            if matches!(&result, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
                if self.is_interrupted() {
                    return Err(WireError::Interrupted);
                }
                continue;
            }
            if let Some(count) = self.step(&mut wait, result)? {
                self.liveness.heard();
                break count;
            }
        };
        self.read_exact(&mut into[count..])
    }

    /// Fills `into`, waiting as long as the peer is alive: it may have much to flush before it answers.
    pub fn read_while_alive(&self, mut into: &mut [u8]) -> Result<(), WireError> {
        while !into.is_empty() {
            let mut wait = Wait::patient();
            let result = self.transport.receive(into);
            let idle = matches!(&result, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
            if let Some(count) = self.step(&mut wait, result)? {
                self.liveness.heard();
                into = &mut into[count..];
            } else if idle && self.liveness.silence() >= self.transport.patience() {
                return Err(WireError::Stalled { seconds: self.transport.patience().as_secs() });
            }
        }
        Ok(())
    }

    /// Fills guest RAM, in the order of `pages`.
    pub fn read_pages(&self, pages: &[PageSlice<'_>]) -> Result<(), WireError> {
        let mut wait = Wait::patient();
        let mut rest = Vec::new();
        let (mut left, mut done) = (pages, 0);
        while !left.is_empty() {
            let result = self.transport.receive_pages(left);
            if let Some(count) = self.step(&mut wait, result)? {
                self.liveness.heard();
                done += count;
                // Usually empty: most calls move everything.
                rest = window(pages, done, usize::MAX)?;
                left = &rest;
            }
        }
        drop(rest);
        Ok(())
    }

    /// Sends `head`, then guest RAM in the order of `pages`, as fast as `throttle` allows.
    pub fn write_pages(
        &self,
        head: &[u8],
        pages: &[PageSlice<'_>],
        throttle: &mut dyn Throttle,
    ) -> Result<(), WireError> {
        let total = head.len() + pages.iter().map(VolatileLen::len_bytes).sum::<usize>();
        let mut wait = Wait::patient();
        let mut done = 0;
        while done < total {
            let most = throttle.allow(total - done)?;
            // Nothing once all of the head is out.
            let head_left = head.get(done..).unwrap_or_default();
            let head_now = &head_left[..head_left.len().min(most)];
            let result = if done == 0 && most == total {
                self.transport.send_pages(head, pages)
            } else {
                let from = done.saturating_sub(head.len());
                let pages_now = window(pages, from, most - head_now.len())?;
                self.transport.send_pages(head_now, &pages_now)
            };
            if let Some(count) = self.step(&mut wait, result)? {
                done += count;
                throttle.sent(count);
            }
        }
        Ok(())
    }
}

trait VolatileLen {
    fn len_bytes(&self) -> usize;
}

impl VolatileLen for PageSlice<'_> {
    fn len_bytes(&self) -> usize {
        self.len()
    }
}

/// The bytes `from..from + most` of `pages` laid end to end.
fn window<'a>(
    pages: &[PageSlice<'a>],
    mut from: usize,
    mut most: usize,
) -> Result<Vec<PageSlice<'a>>, WireError> {
    let mut window = Vec::new();
    for page in pages {
        if from >= page.len() {
            from -= page.len();
            continue;
        }
        let count = (page.len() - from).min(most);
        if count == 0 {
            break;
        }
        let piece =
            page.subslice(from, count).map_err(io::Error::other).map_err(WireError::Lost)?;
        window.push(piece);
        (from, most) = (0, most - count);
    }
    Ok(window)
}

/// Sends a Hello on a connection that has not been used yet.
pub fn send_hello(channel: &Channel, hello: &Hello) -> Result<(), WireError> {
    let mut bytes = Vec::new();
    wire::append_frame(&mut bytes, Kind::Hello, &hello.encode())?;
    channel.write(&bytes, &mut Wait::patient())
}

/// Receives the peer's Hello, its first frame.
pub fn receive_hello(channel: &Channel, longest: Duration) -> Result<Hello, WireError> {
    let mut wait = Wait::until("the greeting", longest);
    let mut header = [0; HEADER_BYTES];
    channel.read(&mut header, &mut wait)?;
    let (kind, len) = wire::decode_header(&header).map_err(|_| WireError::NotFerry)?;
    let len = usize::try_from(len).map_err(|_| WireError::NotFerry)?;
    let mut payload = vec![0; len];
    match kind {
        Kind::Hello | Kind::Refused => channel.read(&mut payload, &mut wait)?,
        _ => return Err(WireError::NotFerry),
    }
    if kind == Kind::Refused {
        return Err(WireError::Refused(Frame { kind, payload }.reason()));
    }
    Hello::decode(&payload)
}
