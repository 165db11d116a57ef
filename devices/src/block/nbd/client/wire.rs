//! One socket of the client: whole messages or an error, in bounded time, interruptible. The handshake has a
//! deadline; afterwards the connection fails once it has made no progress for a while. Knows no message.

use crate::block::nbd::address::{NbdAddress, NbdServer};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::{self, IoSlice, Read};
use std::net::{Shutdown, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Enough to keep the server busy while a sender is descheduled. A hint, which the kernel caps. Not set for TCP,
/// whose buffers grow by themselves, and further.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;
/// What counts as progress of a long message: less in a whole stall timeout is a server that has us wait.
const PROGRESS_BYTES: u64 = 256 << 10;
/// Read ahead at most: headers of several replies.
const READ_AHEAD_BYTES: usize = 4096;
/// Addresses of one host that are tried.
const MOST_PLACES: usize = 16;
/// A blocking connect to a Unix socket looks for an interrupt this often.
const CONNECT_SLICE: Duration = Duration::from_millis(100);

/// Why waiting ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum WaitError {
    #[error("it was interrupted")]
    Interrupted,
    #[error("the server has made no progress for {0:?}")]
    Stalled(Duration),
    #[error("the server did not answer in time")]
    Deadline,
    #[error("the server has closed the connection")]
    Closed,
}

impl From<WaitError> for io::Error {
    fn from(error: WaitError) -> Self {
        let kind = match error {
            WaitError::Interrupted => io::ErrorKind::ConnectionAborted,
            WaitError::Stalled(_) | WaitError::Deadline => io::ErrorKind::TimedOut,
            WaitError::Closed => io::ErrorKind::UnexpectedEof,
        };
        Self::new(kind, error)
    }
}

/// Ends every wait of a client, for good.
#[derive(Debug)]
pub(super) struct Stop(OwnedFd);

impl Stop {
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Never read again, so that it stays readable.
    pub fn set(&self) {
        // Fails only if the counter is about to overflow, so it is set already.
        let _ = rustix::io::write(&self.0, &[1; 8]);
    }

    fn check(&self) -> io::Result<()> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        match poll(&mut fds, Some(&Timespec::default())) {
            Ok(0) => Ok(()),
            _ => Err(WaitError::Interrupted.into()),
        }
    }
}

/// How long to wait.
#[derive(Debug, Clone, Copy)]
pub(super) enum Limit {
    /// Until then.
    Until(Instant),
    /// As long as the connection makes progress.
    Progress,
}

/// A connected socket.
#[derive(Debug)]
pub(super) struct Wire {
    socket: Socket,
    is_tcp: bool,
    stop: Arc<Stop>,
    stall: Duration,
    began: Instant,
    /// Of the last progress, since `began`.
    progress_ms: AtomicU64,
    moved_bytes: AtomicU64,
}

/// Time left until `at`; `None` if it has passed.
fn left_until(at: Instant) -> Option<Duration> {
    at.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
}

impl Wire {
    /// Connects to the first of `places` that accepts until `until`.
    pub fn connect(
        places: &[SockAddr],
        stop: &Arc<Stop>,
        stall: Duration,
        until: Instant,
    ) -> io::Result<(Self, SockAddr)> {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        let mut count = u32::try_from(places.len()).unwrap_or(u32::MAX);
        for place in places {
            // One that does not answer leaves time for the others.
            let left = left_until(until).ok_or(WaitError::Deadline)?;
            match connect_to(place, stop, Instant::now() + left / count.max(1)) {
                Ok(socket) => {
                    let (stop, began) = (stop.clone(), Instant::now());
                    let is_tcp = place.domain() != Domain::UNIX;
                    let (progress_ms, moved_bytes) = (AtomicU64::new(0), AtomicU64::new(0));
                    let wire =
                        Self { socket, is_tcp, stop, stall, began, progress_ms, moved_bytes };
                    return Ok((wire, place.clone()));
                }
                Err(error) => last = error,
            }
            stop.check()?;
            count -= 1;
        }
        Err(last)
    }

    /// The connection has made progress now.
    pub fn touch(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.progress_ms.fetch_max(now, Ordering::Relaxed);
    }

    fn moved(&self, bytes: usize) {
        let before = self.moved_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if before / PROGRESS_BYTES != (before + bytes as u64) / PROGRESS_BYTES {
            self.touch();
        }
    }

    fn left(&self, limit: Limit) -> Result<Duration, WaitError> {
        match limit {
            Limit::Until(at) => left_until(at).ok_or(WaitError::Deadline),
            Limit::Progress => {
                let progress = Duration::from_millis(self.progress_ms.load(Ordering::Relaxed));
                left_until(self.began + progress + self.stall).ok_or(WaitError::Stalled(self.stall))
            }
        }
    }

    fn wait(&self, events: PollFlags, limit: Limit) -> io::Result<()> {
        wait(&self.socket, &self.stop, events, || self.left(limit))
    }

    /// Sends all of `head`, then all of `data`, without copying either. One thread at a time.
    pub fn send(&self, head: &[u8], data: &[u8], limit: Limit) -> io::Result<()> {
        let (total, mut sent) = (head.len() + data.len(), 0);
        while sent < total {
            match self
                .send_some(&head[sent.min(head.len())..], &data[sent.saturating_sub(head.len())..])
            {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => {
                    sent += len;
                    self.moved(len);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::OUT, limit)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn send_some(&self, head: &[u8], data: &[u8]) -> io::Result<usize> {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        self.socket.send_vectored_with_flags(&[IoSlice::new(head), IoSlice::new(data)], flags)
    }

    /// Sends `bytes` if the socket takes them at once.
    pub fn send_now(&self, bytes: &[u8]) {
        // Whether it arrives or not, the connection is closed next.
        let _ = self.send_some(bytes, &[]);
    }

    /// Receives at least one byte. One thread at a time.
    fn receive(&self, into: &mut [u8], limit: Limit) -> io::Result<usize> {
        loop {
            match (&self.socket).read(into) {
                Ok(0) => return Err(WaitError::Closed.into()),
                Ok(len) => {
                    self.moved(len);
                    return Ok(len);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.acknowledge();
                    self.wait(PollFlags::IN, limit)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Acknowledges now what has been received. A server that has not turned off Nagle's algorithm, like `qemu-nbd`,
    /// keeps further short replies until then, and nothing that this side sends may carry the acknowledgement: the
    /// kernel would wait for that for 40 ms.
    fn acknowledge(&self) {
        if self.is_tcp {
            // It is only slower without.
            let _ = self.socket.set_tcp_quickack(true);
        }
    }

    /// Ends the connection both ways, from any thread: whoever waits for it wakes.
    pub fn shutdown(&self) {
        // Fails only if the peer is gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// The reading side, with what was read ahead.
#[derive(Debug)]
pub(super) struct Reader {
    ahead: Box<[u8; READ_AHEAD_BYTES]>,
    start: usize,
    end: usize,
}

impl Reader {
    pub fn new() -> Self {
        Self { ahead: Box::new([0; READ_AHEAD_BYTES]), start: 0, end: 0 }
    }

    /// Fills `into`. What is long goes straight there.
    pub fn exact(&mut self, wire: &Wire, mut into: &mut [u8], limit: Limit) -> io::Result<()> {
        while !into.is_empty() {
            if self.start == self.end {
                if into.len() >= READ_AHEAD_BYTES {
                    let len = wire.receive(into, limit)?;
                    into = &mut into[len..];
                    continue;
                }
                self.start = 0;
                self.end = 0;
                self.end = wire.receive(&mut self.ahead[..], limit)?;
            }
            let len = into.len().min(self.end - self.start);
            let (now, later) = into.split_at_mut(len);
            now.copy_from_slice(&self.ahead[self.start..self.start + len]);
            self.start += len;
            into = later;
        }
        Ok(())
    }
}

fn connect_to(place: &SockAddr, stop: &Stop, until: Instant) -> io::Result<Socket> {
    let socket = Socket::new(place.domain(), Type::STREAM, None)?;
    if place.domain() == Domain::UNIX {
        connect_to_unix(&socket, place, stop, until)?;
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
        socket.set_nonblocking(true)?;
        return Ok(socket);
    }
    socket.set_tcp_nodelay(true)?;
    socket.set_nonblocking(true)?;
    match socket.connect(place) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        done => return done.map(|()| socket),
    }
    wait(&socket, stop, PollFlags::OUT, || left_until(until).ok_or(WaitError::Deadline))?;
    match socket.take_error()? {
        None => Ok(socket),
        Some(error) => Err(error),
    }
}

/// With the queue of its listener full, connecting to a Unix socket waits, and `poll` does not know for what.
fn connect_to_unix(
    socket: &Socket,
    place: &SockAddr,
    stop: &Stop,
    until: Instant,
) -> io::Result<()> {
    loop {
        let left = left_until(until).ok_or(WaitError::Deadline)?;
        socket.set_write_timeout(Some(left.clamp(Duration::from_millis(1), CONNECT_SLICE)))?;
        match socket.connect(place) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stop.check()?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => stop.check()?,
            done => return done,
        }
    }
}

/// Waits until the socket is ready for `events`, for as long as `left` says.
fn wait(
    socket: &Socket,
    stop: &Stop,
    events: PollFlags,
    left: impl Fn() -> Result<Duration, WaitError>,
) -> io::Result<()> {
    loop {
        let timeout = Timespec::try_from(left()?).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(socket, events), PollFd::new(&stop.0, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            // Another thread may have made progress meanwhile.
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) if !fds[1].revents().is_empty() => return Err(WaitError::Interrupted.into()),
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The places at which `address` may be, until `until`.
///
/// The host's resolver cannot be interrupted, so it has a thread of its own, which ends when the resolver gives
/// up; an IP address needs none.
pub(super) fn resolve(address: &NbdAddress, until: Instant) -> io::Result<Vec<SockAddr>> {
    let (host, port) = match address.server() {
        NbdServer::Unix(path) => return Ok(vec![SockAddr::unix(path)?]),
        NbdServer::Tcp { host, port } => (host.clone(), *port),
    };
    if let Ok(ip) = host.parse() {
        return Ok(vec![SocketAddr::new(ip, port).into()]);
    }
    let (sender, found) = mpsc::channel();
    std::thread::Builder::new().name("nbd-resolve".into()).spawn(move || {
        let places = (host.as_str(), port).to_socket_addrs();
        // Nobody waits any more if it took too long.
        let _ = sender.send(places.map(|all| all.take(MOST_PLACES).map(SockAddr::from).collect()));
    })?;
    let left = left_until(until).ok_or(WaitError::Deadline)?;
    found.recv_timeout(left).map_err(|_| io::Error::from(WaitError::Deadline))?
}
