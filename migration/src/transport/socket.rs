//! TCP and Unix sockets: blocking, but no call blocks longer than a tick.

use super::unix::{SocketFile, listen_unix};
use super::{Address, PATIENCE, PageSlice, TICK, Transport, vectored};
use crate::cancel::CancelToken;
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::{self, Read};
use std::net::{Shutdown, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// Enough to keep both sides busy while the other is descheduled. A hint, which the kernel caps.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 8;

/// A connected socket.
#[derive(Debug)]
pub struct SocketTransport {
    socket: Socket,
    patience: Duration,
}

impl SocketTransport {
    pub(super) fn new(socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
        if !socket.local_addr()?.is_unix() {
            socket.set_tcp_nodelay(true)?;
        }
        socket.set_read_timeout(Some(TICK))?;
        socket.set_write_timeout(Some(TICK))?;
        Ok(Self { socket, patience: PATIENCE })
    }

    /// Connects once; see [`Peer`].
    pub fn connect(address: &Address, cancel: &CancelToken) -> io::Result<Self> {
        Peer::resolve(address)?.connect(cancel)
    }

    /// Changes how long the peer may stall.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }
}

/// The destination of several connections, resolved once: a name may stand for several hosts, and all
/// connections of a migration must go to the same one.
#[derive(Debug)]
pub struct Peer(Vec<SockAddr>);

impl Peer {
    /// Resolves `address`. A host name may take as long as the resolver does.
    pub fn resolve(address: &Address) -> io::Result<Self> {
        Ok(Self(match address {
            Address::Unix(path) => vec![SockAddr::unix(path)?],
            Address::Tcp(host_port) => host_port.to_socket_addrs()?.map(SockAddr::from).collect(),
        }))
    }

    /// Connects to the first address that accepts, and from then on to that one only. Cancellable.
    pub fn connect(&mut self, cancel: &CancelToken) -> io::Result<SocketTransport> {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for to in &self.0 {
            match connect_to(to.domain(), to, cancel) {
                Ok(transport) => {
                    self.0 = vec![to.clone()];
                    return Ok(transport);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

fn connect_to(domain: Domain, to: &SockAddr, cancel: &CancelToken) -> io::Result<SocketTransport> {
    let socket = Socket::new(domain, Type::STREAM, None)?;
    // Before connecting: the TCP window scale is negotiated then.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let waiting = socket.try_clone()?;
    // Shutting down a connecting socket makes it fail at once.
    let _wake = cancel.on_cancel(move || drop(waiting.shutdown(Shutdown::Both)));
    if cancel.is_cancelled() {
        return Err(io::ErrorKind::Interrupted.into());
    }
    socket.connect_timeout(to, CONNECT_PATIENCE)?;
    SocketTransport::new(socket)
}

impl Transport for SocketTransport {
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        (&self.socket).read(into)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.send_with_flags(bytes, libc::MSG_NOSIGNAL)
    }

    fn receive_pages(&self, pages: &[PageSlice<'_>]) -> io::Result<usize> {
        vectored::receive(self.socket.as_fd(), pages)
    }

    fn send_pages(&self, head: &[u8], pages: &[PageSlice<'_>]) -> io::Result<usize> {
        vectored::send(self.socket.as_fd(), head, pages)
    }

    fn patience(&self) -> Duration {
        self.patience
    }

    fn shutdown(&self) {
        // Fails only if the peer is gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// A destination's listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Address,
    /// Removed with the listener.
    file: Option<Arc<SocketFile>>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            file.remove();
        }
    }
}

impl Listener {
    /// Listens at `address` and nowhere else.
    pub fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let (listener, file) = listen_unix(path).map_err(io::Error::other)?;
                listener.set_nonblocking(true)?;
                let socket = Socket::from(OwnedFd::from(listener));
                Ok(Self { socket, address: address.clone(), file: Some(Arc::new(file)) })
            }
            Address::Tcp(host_port) => {
                let mut all = host_port.to_socket_addrs()?;
                let at = all.next().ok_or(io::ErrorKind::AddrNotAvailable)?;
                let socket = Socket::new(Domain::for_address(at), Type::STREAM, None)?;
                socket.set_reuse_address(true)?;
                // Inherited by connections, whose window scale is negotiated before `accept`.
                let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
                socket.bind(&at.into())?;
                socket.listen(BACKLOG)?;
                socket.set_nonblocking(true)?;
                let bound = socket.local_addr()?.as_socket().unwrap_or(at);
                Ok(Self { socket, address: Address::Tcp(bound.to_string()), file: None })
            }
        }
    }

    /// Where it listens, with the port that was chosen.
    pub fn local_address(&self) -> &Address {
        &self.address
    }

    /// The path of a Unix socket, for an owner who ends before the thread that has the listener.
    pub fn file(&self) -> Option<Arc<SocketFile>> {
        self.file.clone()
    }

    /// Accepts a pending connection, in non-blocking mode; `WouldBlock` if there is none.
    pub(super) fn accept_waiting(&self) -> io::Result<(Socket, String)> {
        let (socket, from) = self.socket.accept()?;
        socket.set_nonblocking(true)?;
        let from = from.as_socket().map_or_else(|| "a local process".into(), |at| at.to_string());
        Ok((socket, from))
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn all_connections_go_to_the_host_that_accepted_the_first_one() {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (closed, first, second) = (listen(), listen(), listen());
        let address = |listener: &TcpListener| SockAddr::from(listener.local_addr().unwrap());
        let mut peer = Peer(vec![address(&closed), address(&first), address(&second)]);
        drop(closed);
        let cancel = CancelToken::new();
        peer.connect(&cancel).unwrap();
        first.accept().unwrap();
        drop(first);
        // Not to the other host, which knows nothing of this migration.
        peer.connect(&cancel).unwrap_err();
        second.set_nonblocking(true).unwrap();
        assert_eq!(second.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
