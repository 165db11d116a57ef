//! A connection as bytes: buffered reads with a deadline, and gathered writes that raise no SIGPIPE.

use socket2::Socket;
use std::io::{self, BufRead, BufReader, ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Some dozens of requests. Larger reads bypass the buffer.
const BUFFER_BYTES: usize = 2048;

/// Ends a connection: whoever waits for it wakes up.
pub fn disconnect(socket: &Socket) {
    // Fails only if the other side has done so.
    let _ = socket.shutdown(Shutdown::Both);
}

/// A connection.
#[derive(Debug)]
pub struct Stream {
    /// What the client sends.
    pub input: Input,
    /// What it is sent.
    pub output: Output,
}

/// One direction of it.
#[derive(Debug)]
pub struct Input(BufReader<Incoming>);

/// The other one.
#[derive(Debug)]
pub struct Output {
    socket: Arc<Socket>,
    deadline: Option<Instant>,
}

#[derive(Debug)]
struct Incoming {
    socket: Arc<Socket>,
    deadline: Option<Instant>,
}

/// What is left until `deadline`; not zero, which a socket takes for endless.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(too_late()) } else { Ok(left) }
}

fn too_late() -> io::Error {
    io::Error::new(ErrorKind::TimedOut, "the handshake has taken too long")
}

/// A socket's word for a timeout.
fn timed(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::WouldBlock { too_late() } else { error }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.deadline {
            self.socket.set_read_timeout(Some(left(deadline)?))?;
        }
        (&*self.socket).read(buffer).map_err(timed)
    }
}

impl Stream {
    /// A connection on which everything must be done by `deadline`.
    pub fn new(socket: Arc<Socket>, deadline: Instant) -> Self {
        let deadline = Some(deadline);
        let incoming = Incoming { socket: socket.clone(), deadline };
        let input = Input(BufReader::with_capacity(BUFFER_BYTES, incoming));
        Self { input, output: Output { socket, deadline } }
    }

    /// From now on, it may take any time.
    pub fn no_deadline(&mut self) -> io::Result<()> {
        self.input.0.get_mut().deadline = None;
        self.output.deadline = None;
        self.output.socket.set_read_timeout(None)?;
        self.output.socket.set_write_timeout(None)
    }
}

impl Input {
    /// Whether the client has closed its side before another byte.
    pub fn at_end(&mut self) -> io::Result<bool> {
        loop {
            match self.0.fill_buf() {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result.map(<[u8]>::is_empty),
            }
        }
    }

    /// Whether more has arrived already.
    pub fn has_more(&self) -> bool {
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        let peek = || self.0.get_ref().socket.recv_with_flags(&mut [MaybeUninit::uninit()], flags);
        !self.0.buffer().is_empty() || peek().is_ok_and(|count| count > 0)
    }

    /// Fills `buffer`.
    pub fn receive(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact(buffer)
    }

    /// Receives `N` bytes.
    pub fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.receive(&mut bytes)?;
        Ok(bytes)
    }
}

impl Output {
    /// Sends `head`, then `data`; in one call if the socket takes that much.
    pub fn send(&self, head: &[u8], data: &[u8]) -> io::Result<()> {
        let mut slices = &mut [IoSlice::new(head), IoSlice::new(data)][..];
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            if let Some(deadline) = self.deadline {
                self.socket.set_write_timeout(Some(left(deadline)?))?;
            }
            match self.socket.send_vectored_with_flags(slices, libc::MSG_NOSIGNAL) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(sent) => IoSlice::advance_slices(&mut slices, sent),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(timed(error)),
            }
        }
        Ok(())
    }
}
