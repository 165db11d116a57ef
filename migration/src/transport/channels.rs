//! What the engine speaks through: [`Channel`] moves all bytes or says why not, [`Main`] moves frames.
//!
//! **No wait without an end.** A call ends when the peer has not moved one byte for the transport's
//! patience, when its deadline is over, when the migration is cancelled, or when another channel of
//! it fails (a *trip*). On the main connection each side says something at least every second, so a
//! peer that is busy elsewhere (writing pages slowly, building its machine) does not look dead.

use super::{PageSlice, TICK, Transport};
use crate::cancel::CancelToken;
use crate::wire::{self, Frame, HEADER_BYTES, Hello, Kind, WireError};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A side that has had nothing to say on the main connection for this long says that it is alive.
pub const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long a side that ends the migration tries to tell the other why.
const FAREWELL: Duration = Duration::from_millis(500);

/// Decides how much may be sent now.
pub trait Throttle {
    /// How many of `wanted` bytes may be sent now; waits until there are some.
    fn allow(&mut self, wanted: usize) -> Result<usize, WireError>;
    /// So many have been sent.
    fn sent(&mut self, bytes: usize);
}

/// One connection, as far as bytes go.
pub struct Channel {
    transport: Arc<dyn Transport>,
    cancel: CancelToken,
    tripped: AtomicBool,
    /// Bytes moved either way: tells another thread that this channel gets on.
    moved: AtomicU64,
}

/// One wait for the peer.
struct Wait {
    moved: Instant,
    deadline: Option<(&'static str, Instant, Duration)>,
    /// A farewell is said, and heard, after a cancel too.
    heeds_cancel: bool,
}

impl Wait {
    fn patient() -> Self {
        Self { moved: Instant::now(), deadline: None, heeds_cancel: true }
    }

    fn until(what: &'static str, longest: Duration) -> Self {
        let deadline = Some((what, Instant::now() + longest, longest));
        Self { moved: Instant::now(), deadline, heeds_cancel: true }
    }

    fn farewell() -> Self {
        Self { heeds_cancel: false, ..Self::until("a farewell", FAREWELL) }
    }
}

impl Channel {
    /// A channel over `transport`; `cancel` ends its waits.
    pub fn new(transport: Arc<dyn Transport>, cancel: CancelToken) -> Self {
        Self { transport, cancel, tripped: AtomicBool::new(false), moved: AtomicU64::new(0) }
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

    /// Ends waits, for a failure that another channel has met.
    pub fn trip(&self) {
        self.tripped.store(true, Ordering::Release);
    }

    /// Takes note of one call's result: `None` to try again.
    fn step(&self, wait: &mut Wait, result: io::Result<usize>) -> Result<Option<usize>, WireError> {
        let now = Instant::now();
        // What has been read is kept, whatever else happens: it may be half a frame.
        if let Ok(moved @ 1..) = result {
            wait.moved = now;
            self.moved.fetch_add(moved as u64, Ordering::Relaxed);
            return Ok(Some(moved));
        }
        if wait.heeds_cancel && (self.cancel.is_cancelled() || self.tripped.load(Ordering::Acquire))
        {
            return Err(WireError::Interrupted);
        }
        if let Some((what, end, longest)) = wait.deadline
            && now >= end
        {
            return Err(WireError::Late { what, seconds: longest.as_secs() });
        }
        match result {
            Ok(_) => Err(WireError::Lost(io::ErrorKind::UnexpectedEof.into())),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let patience = self.transport.patience();
                if now.duration_since(wait.moved) >= patience {
                    return Err(WireError::Stalled { seconds: patience.as_secs() });
                }
                Ok(None)
            }
            Err(error) => Err(WireError::Lost(error)),
        }
    }

    fn read(&self, mut into: &mut [u8], wait: &mut Wait) -> Result<(), WireError> {
        while !into.is_empty() {
            let result = self.transport.receive(into);
            if let Some(count) = self.step(wait, result)? {
                into = &mut into[count..];
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

    /// Fills `into`, however long the first byte takes to come: another channel judges meanwhile
    /// whether the peer is alive.
    pub fn read_when_it_comes(&self, into: &mut [u8]) -> Result<(), WireError> {
        let count = loop {
            let mut wait = Wait::patient();
            let result = self.transport.receive(into);
            let idle = matches!(&result, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
            match self.step(&mut wait, result) {
                Err(WireError::Stalled { .. }) if idle => {}
                Ok(None) => {}
                Ok(Some(count)) => break count,
                Err(error) => return Err(error),
            }
        };
        self.read_exact(&mut into[count..])
    }

    /// Fills guest RAM, in the order of `pages`.
    pub fn read_pages(&self, pages: &[PageSlice<'_>]) -> Result<(), WireError> {
        let mut wait = Wait::patient();
        let mut rest = Vec::new();
        let (mut left, mut done) = (pages, 0);
        while !left.is_empty() {
            let result = self.transport.receive_pages(left);
            if let Some(count) = self.step(&mut wait, result)? {
                done += count;
                // Most calls move everything; only then is there nothing to cut.
                rest = window(pages, done, usize::MAX)?;
                left = &rest;
            }
        }
        drop(rest);
        Ok(())
    }

    /// Sends `head`, then guest RAM in the order of `pages`, as fast as `throttle` lets it.
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

/// The main connection: frames both ways. Frames may be sent by several threads.
pub struct Main {
    channel: Channel,
    /// When something was last sent. Held while a frame is written: the lock *is* the sending half.
    last_sent: Mutex<Instant>,
    /// The pulse could not be sent.
    lost: AtomicBool,
}

impl Main {
    /// Frames over `channel`.
    pub fn new(channel: Channel) -> Self {
        Self { channel, last_sent: Mutex::new(Instant::now()), lost: AtomicBool::new(false) }
    }

    /// The channel underneath.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Whether the other side does not hear any more that this one lives: for who is busy with something
    /// else. Who reads or writes meets the error itself.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    fn sending(&self) -> MutexGuard<'_, Instant> {
        self.last_sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends frames, in one write.
    pub fn send_all(&self, frames: &[(Kind, &[u8])]) -> Result<(), WireError> {
        let mut bytes = Vec::new();
        for (kind, payload) in frames {
            wire::append_frame(&mut bytes, *kind, payload)?;
        }
        let mut last_sent = self.sending();
        self.channel.write(&bytes, &mut Wait::patient())?;
        *last_sent = Instant::now();
        Ok(())
    }

    /// Sends one frame.
    pub fn send(&self, kind: Kind, payload: &[u8]) -> Result<(), WireError> {
        self.send_all(&[(kind, payload)])
    }

    /// Tells the peer why this ends. It may be gone already; a cancel does not prevent it.
    pub fn say_farewell(&self, kind: Kind, reason: &str) {
        let mut bytes = Vec::new();
        let sent = wire::append_frame(&mut bytes, kind, wire::fit_reason(reason).as_bytes())
            .and_then(|()| {
                let _sending = self.sending();
                self.channel.write(&bytes, &mut Wait::farewell())
            });
        if let Err(error) = sent {
            log::debug!("the other side does not hear why the migration ends: {error}");
        }
    }

    /// Reads on until the peer says why it ends (`Some`), or closes, or half a second is over.
    pub fn hear_farewell(&self) -> Option<Frame> {
        let mut wait = Wait::farewell();
        loop {
            let frame = self.receive_any(&mut wait).ok()?;
            if matches!(frame.kind, Kind::Refused | Kind::Abort | Kind::Declined) {
                return Some(frame);
            }
        }
    }

    fn receive_any(&self, wait: &mut Wait) -> Result<Frame, WireError> {
        let mut header = [0; HEADER_BYTES];
        self.channel.read(&mut header, wait)?;
        let (kind, len) = wire::decode_header(&header)?;
        let mut payload = vec![0; usize::try_from(len).unwrap_or(0)];
        self.channel.read(&mut payload, wait)?;
        Ok(Frame { kind, payload })
    }

    fn receive_next(&self, mut wait: Wait) -> Result<Frame, WireError> {
        loop {
            let frame = self.receive_any(&mut wait)?;
            match frame.kind {
                Kind::KeepAlive => {}
                Kind::Refused => return Err(WireError::Refused(frame.reason())),
                Kind::Abort => return Err(WireError::Aborted(frame.reason())),
                _ => return Ok(frame),
            }
        }
    }

    /// Receives the next frame that is not a keep-alive, as long as the peer shows that it is alive.
    /// That the peer ends it becomes an error.
    pub fn receive(&self) -> Result<Frame, WireError> {
        self.receive_next(Wait::patient())
    }

    /// Receives the next frame within `longest`; `what` names it if it is late.
    pub fn receive_within(
        &self,
        what: &'static str,
        longest: Duration,
    ) -> Result<Frame, WireError> {
        self.receive_next(Wait::until(what, longest))
    }
}

/// The payload of a frame that has to be of `kind`; `what` says what is expected.
pub fn payload_of(frame: Frame, kind: Kind, what: &'static str) -> Result<Vec<u8>, WireError> {
    if frame.kind == kind {
        return Ok(frame.payload);
    }
    Err(WireError::Unexpected { found: format!("{:?}", frame.kind), expected: what })
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
    let mut payload = vec![0; usize::try_from(len).unwrap_or(0)];
    match kind {
        Kind::Hello | Kind::Refused => channel.read(&mut payload, &mut wait)?,
        _ => return Err(WireError::NotFerry),
    }
    if kind == Kind::Refused {
        return Err(WireError::Refused(Frame { kind, payload }.reason()));
    }
    Hello::decode(&payload)
}

/// Says every second that this side is alive, from a thread of its own: the others may be busy with
/// pages, or wait for a machine. Dropping it ends the thread.
pub struct Pulse {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Starts it.
    pub fn start(main: Arc<Main>) -> io::Result<Self> {
        let stop: Arc<(Mutex<bool>, Condvar)> = Arc::default();
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("mig-pulse".into())
            .stack_size(64 << 10)
            .spawn(move || {
                let mut wait = KEEP_ALIVE;
                loop {
                    let guard = stopped.0.lock().unwrap_or_else(PoisonError::into_inner);
                    let waited = stopped.1.wait_timeout_while(guard, wait, |stop| !*stop);
                    let (stop, _) = waited.unwrap_or_else(PoisonError::into_inner);
                    if *stop {
                        return;
                    }
                    drop(stop);
                    let quiet = main.sending().elapsed();
                    wait = KEEP_ALIVE.saturating_sub(quiet).max(TICK);
                    if quiet >= KEEP_ALIVE && main.send(Kind::KeepAlive, &[]).is_err() {
                        // Whoever uses the connection next meets the error too.
                        main.lost.store(true, Ordering::Release);
                        return;
                    }
                }
            })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // It panics only with a bug of ours, which is logged where it happens.
            let _ = thread.join();
        }
    }
}
