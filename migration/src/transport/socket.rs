//! TCP and Unix sockets, blocking, with a deadline on every wait.

use super::{Address, PATIENCE, Transport};
use crate::cancel::CancelToken;
use devices::ram::{GuestAddress, GuestRam};
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{Shutdown, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::Duration;
use vm_memory::{GuestMemoryBackend, ReadVolatile, VolatileMemoryError, WriteVolatile};

/// Enough for a few milliseconds at ten gigabits.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// A connected socket. `std::net::TcpStream` serves for both families: it is what vm-memory can read
/// into and write from guest RAM, and it only ever passes the descriptor on.
pub struct SocketTransport {
    stream: std::net::TcpStream,
    patience: Duration,
}

impl SocketTransport {
    fn new(socket: Socket, address: &Address) -> io::Result<Self> {
        // Buffers are a wish: the kernel caps them.
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
        if matches!(address, Address::Tcp(_)) {
            socket.set_tcp_nodelay(true)?;
        }
        let mut transport = Self { stream: socket.into(), patience: PATIENCE };
        transport.set_patience(PATIENCE)?;
        Ok(transport)
    }

    /// Connects.
    pub fn connect(address: &Address) -> io::Result<Self> {
        let connect = |domain, to: &SockAddr| {
            let socket = Socket::new(domain, Type::STREAM, None)?;
            // Before connecting: the TCP window's scale is agreed on then.
            let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
            socket.connect_timeout(to, CONNECT_PATIENCE)?;
            Self::new(socket, address)
        };
        match address {
            Address::Unix(path) => connect(Domain::UNIX, &SockAddr::unix(path)?),
            Address::Tcp(host_port) => {
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                for to in host_port.to_socket_addrs()? {
                    match connect(Domain::for_address(to), &to.into()) {
                        Ok(transport) => return Ok(transport),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }
}

fn volatile_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        error => io::Error::other(error),
    }
}

impl Transport for SocketTransport {
    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(buffer)
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    fn read_pages(&mut self, ram: &GuestRam, address: GuestAddress, len: usize) -> io::Result<()> {
        let mut slice = ram.get_slice(address, len).map_err(io::Error::other)?;
        self.stream.read_exact_volatile(&mut slice).map_err(volatile_error)
    }

    fn write_pages(&mut self, ram: &GuestRam, address: GuestAddress, len: usize) -> io::Result<()> {
        let slice = ram.get_slice(address, len).map_err(io::Error::other)?;
        self.stream.write_all_volatile(&slice).map_err(volatile_error)
    }

    fn patience(&self) -> Duration {
        self.patience
    }

    fn set_patience(&mut self, patience: Duration) -> io::Result<()> {
        self.patience = patience;
        self.stream.set_read_timeout(Some(patience))?;
        self.stream.set_write_timeout(Some(patience))
    }

    fn stopper(&self) -> io::Result<Box<dyn Fn() + Send + Sync>> {
        let stream = self.stream.try_clone()?;
        Ok(Box::new(move || {
            // Fails only if the peer is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }))
    }
}

/// A destination's listening socket.
pub struct Listener {
    socket: Socket,
    address: Address,
    /// Removed with the listener.
    path: Option<PathBuf>,
}

impl Listener {
    /// Listens at `address` and nowhere else.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let listen = |domain, at: &SockAddr| {
            let socket = Socket::new(domain, Type::STREAM, None)?;
            if domain != Domain::UNIX {
                socket.set_reuse_address(true)?;
            }
            let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
            socket.bind(at)?;
            socket.listen(8)?;
            Ok::<_, io::Error>(socket)
        };
        match address {
            Address::Unix(path) => {
                remove_stale(path)?;
                let socket = listen(Domain::UNIX, &SockAddr::unix(path)?)?;
                Ok(Self { socket, address: address.clone(), path: Some(path.clone()) })
            }
            Address::Tcp(host_port) => {
                let at =
                    host_port.to_socket_addrs()?.next().ok_or(io::ErrorKind::AddrNotAvailable)?;
                let socket = listen(Domain::for_address(at), &at.into())?;
                let bound = socket.local_addr()?.as_socket().unwrap_or(at);
                Ok(Self { socket, address: Address::Tcp(bound.to_string()), path: None })
            }
        }
    }

    /// Where it listens, with the port that was chosen.
    pub fn local_address(&self) -> &Address {
        &self.address
    }

    /// Waits for a connection, until cancelled.
    pub fn accept(&self, cancel: &CancelToken) -> io::Result<SocketTransport> {
        let socket = self.socket.try_clone()?;
        // Shutting a listening socket down wakes its accept.
        cancel.on_cancel(Box::new(move || drop(socket.shutdown(Shutdown::Both))));
        let (connection, _) = self.socket.accept()?;
        SocketTransport::new(connection, &self.address)
    }
}

/// Removes a socket that a dead process left behind; anything else stays.
fn remove_stale(path: &PathBuf) -> io::Result<()> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket {
        match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
            }
            _ => return Err(io::ErrorKind::AddrInUse.into()),
        }
    }
    Ok(())
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}
