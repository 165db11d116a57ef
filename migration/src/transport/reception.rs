//! Accepts a listener's connections and sorts them by their Hello. Called by the destination: once for the
//! control connection of a migration, then once per channel.
//!
//! Anything may connect: a port scanner, a browser, a silent client. So Hellos are read concurrently and
//! without blocking; a client that is not Ferry, or too slow, is dropped with a log message, and the wait
//! goes on.

use super::TICK;
use super::socket::{Listener, SocketTransport};
use crate::cancel::CancelToken;
use crate::wire::{self, HEADER_BYTES, Hello, Kind, MigrationId, Role, WireError};
use socket2::Socket;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How long a new connection, of which nothing is known, may take for its Hello.
const STRANGER_PATIENCE: Duration = Duration::from_secs(5);
/// Most connections without a Hello; beyond that the oldest is dropped.
const MAX_GREETING: usize = 16;

/// A connection whose Hello is incomplete.
struct Greeting {
    socket: Socket,
    from: String,
    bytes: Vec<u8>,
    since: Instant,
}

/// Progress of a Hello.
enum Progress {
    Incomplete,
    Greeted(Hello),
}

impl Greeting {
    /// Reads what is available, and not a byte past the Hello.
    fn advance(&mut self) -> Result<Progress, WireError> {
        loop {
            let mut wanted = HEADER_BYTES;
            if let Some(header) = self.bytes.first_chunk() {
                match wire::decode_header(header) {
                    Ok((Kind::Hello, len)) => {
                        wanted += usize::try_from(len).map_err(|_| WireError::NotFerry)?;
                    }
                    _ => return Err(WireError::NotFerry),
                }
                if self.bytes.len() == wanted {
                    return Hello::decode(&self.bytes[HEADER_BYTES..]).map(Progress::Greeted);
                }
            }
            let have = self.bytes.len();
            self.bytes.resize(wanted, 0);
            let result = (&self.socket).read(&mut self.bytes[have..]);
            self.bytes.truncate(have + result.as_ref().map_or(0, |count| *count));
            match result {
                Ok(0) => return Err(WireError::Lost(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Progress::Incomplete);
                }
                Err(error) => return Err(WireError::Lost(error)),
            }
        }
    }
}

/// Whether the migration that a channel belongs to has ended.
pub type HasEnded<'e> = &'e dyn Fn() -> bool;

/// Sorts a listener's connections.
pub struct Reception<'a> {
    listener: &'a Listener,
    cancel: &'a CancelToken,
    epoll: Epoll,
    greetings: Vec<Greeting>,
}

fn watch(epoll: &Epoll, fd: i32) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))
}

impl<'a> Reception<'a> {
    /// Accepts connections on `listener`, until `cancel`.
    pub fn open(listener: &'a Listener, cancel: &'a CancelToken) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        watch(&epoll, listener.raw_fd())?;
        Ok(Self { listener, cancel, epoll, greetings: Vec::new() })
    }

    /// Waits for the control connection of a migration.
    pub fn control(&mut self) -> Result<(SocketTransport, Hello), WireError> {
        self.next(None, "a source", &|| false, |hello| match hello.role {
            Role::Control => hello.check_channels(),
            Role::Data { .. } | Role::Disks { .. } => Err("no such migration".to_owned()),
        })
    }

    /// Waits for disk channel `index` of migration `id`, unless that has ended.
    pub fn disks(
        &mut self,
        id: MigrationId,
        index: u16,
        longest: Duration,
        has_ended: HasEnded<'_>,
    ) -> Result<SocketTransport, WireError> {
        let belongs = |hello: &Hello| match hello.role {
            Role::Control => Err("another migration is arriving here".to_owned()),
            Role::Data { .. } | Role::Disks { .. } if hello.id != id => {
                Err("no such migration".to_owned())
            }
            Role::Data { .. } => Err("no further data channel is expected".to_owned()),
            Role::Disks { index: other } if other != index => {
                Err(format!("disk channel {other} where {index} is expected"))
            }
            Role::Disks { .. } => Ok(()),
        };
        let end = Some((Instant::now() + longest, longest));
        let found = self.next(end, "the connection of the disks", has_ended, belongs);
        found.map(|(transport, _)| transport)
    }

    /// Waits for data channel `index` of migration `id`, unless that has ended.
    pub fn data(
        &mut self,
        id: MigrationId,
        index: u16,
        longest: Duration,
        has_ended: HasEnded<'_>,
    ) -> Result<SocketTransport, WireError> {
        let belongs = |hello: &Hello| match hello.role {
            Role::Control => Err("another migration is arriving here".to_owned()),
            Role::Data { .. } | Role::Disks { .. } if hello.id != id => {
                Err("no such migration".to_owned())
            }
            Role::Disks { .. } => Err("the disks' channels are not expected yet".to_owned()),
            Role::Data { index: other } if other != index => {
                Err(format!("data channel {other} where {index} is expected"))
            }
            Role::Data { .. } => Ok(()),
        };
        let end = Some((Instant::now() + longest, longest));
        let found = self.next(end, "the data connection", has_ended, belongs);
        found.map(|(transport, _)| transport)
    }

    /// Waits for a connection that `fits`; others are refused with the reason. With an `end`, asks every
    /// tick whether the migration `has_ended`.
    fn next(
        &mut self,
        end: Option<(Instant, Duration)>,
        what: &'static str,
        has_ended: HasEnded<'_>,
        fits: impl Fn(&Hello) -> Result<(), String>,
    ) -> Result<(SocketTransport, Hello), WireError> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(WireError::Lost)?);
        watch(&self.epoll, wake.as_raw_fd()).map_err(WireError::Lost)?;
        let waker = wake.clone();
        let _wake = self.cancel.on_cancel(move || drop(waker.write(1)));
        loop {
            if self.cancel.is_cancelled() {
                return Err(WireError::Interrupted);
            }
            self.accept_all()?;
            if let Some(found) = self.advance_all(&fits) {
                return Ok(found);
            }
            if has_ended() {
                return Err(WireError::Lost(io::ErrorKind::BrokenPipe.into()));
            }
            let now = Instant::now();
            if let Some((end, longest)) = end
                && now >= end
            {
                return Err(WireError::Late { what, within: longest });
            }
            let oldest = self.greetings.iter().map(|one| one.since + STRANGER_PATIENCE).min();
            let next_look = end.map(|(end, _)| end.min(now + TICK));
            let until = [oldest, next_look].into_iter().flatten().min();
            // Rounded up, so that the deadline has passed on wake-up.
            let timeout = until.map_or(-1, |until| {
                let millis = until.saturating_duration_since(now).as_millis() + 1;
                i32::try_from(millis).unwrap_or(i32::MAX)
            });
            match self.epoll.wait(timeout, &mut [EpollEvent::default(); MAX_GREETING + 2]) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(WireError::Lost(error));
                }
                _ => {}
            }
        }
    }

    fn accept_all(&mut self) -> Result<(), WireError> {
        loop {
            match self.listener.accept_waiting() {
                Ok((socket, from)) => {
                    log::debug!("{from} has connected");
                    if self.greetings.len() == MAX_GREETING {
                        let oldest = self.greetings.remove(0);
                        log::warn!("{}: dropped, too many other connections", oldest.from);
                    }
                    watch(&self.epoll, socket.as_raw_fd()).map_err(WireError::Lost)?;
                    let since = Instant::now();
                    self.greetings.push(Greeting { socket, from, bytes: Vec::new(), since });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // The peer closed before we accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(WireError::Lost(error)),
            }
        }
    }

    /// Reads from all connections; returns the first with a fitting Hello.
    fn advance_all(
        &mut self,
        fits: &impl Fn(&Hello) -> Result<(), String>,
    ) -> Option<(SocketTransport, Hello)> {
        let mut index = 0;
        while let Some(greeting) = self.greetings.get_mut(index) {
            let progress = match greeting.advance() {
                Ok(Progress::Incomplete) if greeting.since.elapsed() < STRANGER_PATIENCE => {
                    index += 1;
                    continue;
                }
                Ok(Progress::Incomplete) => {
                    Err(WireError::Late { what: "the greeting", within: STRANGER_PATIENCE })
                }
                Ok(Progress::Greeted(hello)) => Ok(hello),
                Err(error) => Err(error),
            };
            let Greeting { socket, from, .. } = self.greetings.remove(index);
            // Off the list, out of the epoll set: the socket may stay open.
            let _ =
                self.epoll.ctl(ControlOperation::Delete, socket.as_raw_fd(), EpollEvent::default());
            match progress {
                Ok(hello) => match (fits(&hello), SocketTransport::new(socket)) {
                    (Ok(()), Ok(transport)) => return Some((transport, hello)),
                    (Err(reason), Ok(transport)) => {
                        log::warn!("{from}: dropped, {reason}");
                        answer(&transport, Kind::Refused, reason.as_bytes());
                    }
                    (_, Err(error)) => log::warn!("{from}: dropped, {error}"),
                },
                Err(error) => {
                    log::warn!("{from}: dropped, {error}");
                    // Another version of Ferry can read the start of our Hello and report the mismatch.
                    if let (WireError::Version { .. }, Ok(transport)) =
                        (error, SocketTransport::new(socket))
                    {
                        let ours = Hello::new(Role::Control, MigrationId([0; 16]), 0);
                        answer(&transport, Kind::Hello, &ours.encode());
                    }
                }
            }
        }
        None
    }
}

/// One short frame into the empty buffer of a new connection, as far as it goes.
fn answer(transport: &dyn super::Transport, kind: Kind, payload: &[u8]) {
    let mut bytes = Vec::new();
    if wire::append_frame(&mut bytes, kind, payload).is_ok() {
        let _ = transport.send(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Address;
    use super::*;
    use std::io::Write;

    /// A connection that says `bytes`.
    fn say(at: &Address, bytes: &[u8]) -> Socket {
        let socket = match at {
            Address::Tcp(at) => {
                let at: std::net::SocketAddr = at.parse().unwrap();
                let socket =
                    Socket::new(socket2::Domain::for_address(at), socket2::Type::STREAM, None);
                let socket = socket.unwrap();
                socket.connect(&at.into()).unwrap();
                socket
            }
            Address::Unix(path) => {
                let socket = Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None);
                let socket = socket.unwrap();
                socket.connect(&socket2::SockAddr::unix(path).unwrap()).unwrap();
                socket
            }
        };
        (&socket).write_all(bytes).unwrap();
        socket
    }

    #[test]
    fn a_connection_cut_at_any_byte_of_its_greeting_leaves_the_next_one_its_chance() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("incoming");
        let hello =
            |byte: u8| Hello::new(Role::Control, MigrationId([byte; 16]), 2).wanting("disks");
        let bytes = |byte: u8| {
            let mut bytes = Vec::new();
            wire::append_frame(&mut bytes, Kind::Hello, &hello(byte).encode()).unwrap();
            bytes
        };
        let (cut, whole) = (bytes(1), bytes(2));
        for at in ["tcp:127.0.0.1:0".to_owned(), format!("unix:{}", path.display())] {
            let listener = Listener::bind(&at.parse().unwrap()).unwrap();
            let address = listener.local_address();
            for count in 0..cut.len() {
                let cancel = CancelToken::new();
                let mut reception = Reception::open(&listener, &cancel).unwrap();
                let received = std::thread::scope(|scope| {
                    let receiving = scope.spawn(|| reception.control());
                    // One that ends, and one that is torn off.
                    drop(say(address, &cut[..count]));
                    let torn = say(address, &cut[..count]);
                    torn.set_linger(Some(Duration::ZERO)).unwrap();
                    drop(torn);
                    let _next = say(address, &whole);
                    receiving.join().unwrap()
                });
                let (_, received) = received.unwrap_or_else(|error| panic!("{count}: {error}"));
                assert_eq!(received, hello(2), "after {count} bytes");
            }
        }
    }
}
