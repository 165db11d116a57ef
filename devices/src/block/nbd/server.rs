//! The export server: serves running disks to NBD clients. Owned by who offers the disks; knows no socket paths.
//!
//! ```text
//! listener ─▶ nbd-accept ─▶ nbd-client-N: handshake ─▶ transmission ─▶ BlockNode
//!                                              └── Exports: who serves what to whom
//! ```
//! Blocking sockets and a few threads for each connection. A client costs at most [`transmission::MAX_WORKERS`] of
//! them, each with [`transmission::PIECE_BYTES`] of memory, and a descriptor, whatever it sends or fails to read; [`Limits`] says how many there may
//! be and how long they may take to choose an export. A thread that waits for a client is woken by shutting its
//! socket down; one that waits for the disk ends when the disk answers.
//!
//! Nobody is authenticated: a unix socket's mode or the address decides who may connect.

mod exports;
mod handshake;
mod request;
mod status;
mod stream;
mod transmission;

use crate::lock;
use exports::Exports;
pub use exports::{Export, ExportError, ExportInfo, MAX_EXPORT_BITMAPS, MAX_EXPORTS, RemoveMode};
use handshake::Outcome;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Socket, TcpKeepalive};
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use stream::Stream;

/// Connections, if nothing else is said; QEMU's number.
pub const DEFAULT_MAX_CONNECTIONS: usize = 100;
/// Time for a handshake, if nothing else is said; QEMU's.
pub const DEFAULT_HANDSHAKE: Duration = Duration::from_secs(10);
/// Stack of a connection's thread. Its data is on the heap.
const STACK_BYTES: usize = 256 << 10;
/// Pause after a failed accept: the process may be out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Buffer that a unix socket gets if the host allows: two pieces, so that the disk is read while a client takes
/// the last one.
const SOCKET_BUFFER_BYTES: usize = 2 * transmission::PIECE_BYTES;
/// After this silence, a TCP client is asked whether it is alive.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Bounds of what clients may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most connections at once; further ones are closed at once.
    pub max_connections: usize,
    /// For everything until a client has chosen an export, in total.
    pub handshake: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_connections: DEFAULT_MAX_CONNECTIONS, handshake: DEFAULT_HANDSHAKE }
    }
}

/// Where clients connect.
#[derive(Debug)]
pub enum Listener {
    /// By a path.
    Unix(UnixListener),
    /// By an address.
    Tcp(TcpListener),
}

impl Listener {
    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }

    /// The next connection, ready for blocking use.
    fn accept(&self) -> io::Result<Socket> {
        let socket = match self {
            Self::Unix(listener) => {
                let socket = Socket::from(OwnedFd::from(listener.accept()?.0));
                // The host may allow less.
                let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
                let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
                socket
            }
            Self::Tcp(listener) => {
                let socket = Socket::from(listener.accept()?.0);
                socket.set_tcp_nodelay(true)?;
                socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))?;
                socket
            }
        };
        socket.set_nonblocking(false)?;
        Ok(socket)
    }
}

/// Called with the id of an export whose last client is gone after its removal.
pub type OnDeleted = Arc<dyn Fn(&str) + Send + Sync>;

/// What the threads of a server share.
struct Shared {
    exports: Exports,
    limits: Limits,
    on_deleted: OnDeleted,
    closing: AtomicBool,
    connections: Mutex<HashMap<u64, Arc<Socket>>>,
    /// A connection has ended.
    ended: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// A running server. Dropping it closes it and waits until all of its threads have ended.
#[derive(Debug)]
pub struct NbdServer {
    shared: Arc<Shared>,
    /// The accepting thread waits for its other end.
    wake: UnixStream,
    accepting: Mutex<Option<JoinHandle<()>>>,
}

impl NbdServer {
    /// Serves clients of `listener`, without any export yet. Calls `on_deleted` on any thread, which it must not
    /// hold up, and not while [`NbdServer::remove`] runs on it.
    ///
    /// # Errors
    /// If the host has no descriptor or thread left.
    pub fn start(listener: Listener, limits: Limits, on_deleted: OnDeleted) -> io::Result<Self> {
        listener.set_nonblocking()?;
        let (wake, woken) = UnixStream::pair()?;
        let shared = Arc::new(Shared {
            exports: Exports::default(),
            limits,
            on_deleted,
            closing: AtomicBool::new(false),
            connections: Mutex::default(),
            ended: Condvar::new(),
        });
        let serving = shared.clone();
        let thread = std::thread::Builder::new().name("nbd-accept".into()).stack_size(STACK_BYTES);
        let accepting = thread.spawn(move || accept_all(&listener, &woken, &serving))?;
        Ok(Self { shared, wake, accepting: Mutex::new(Some(accepting)) })
    }

    /// Offers a disk. Its bitmaps are busy until it is removed and its last client is gone.
    pub fn add(&self, export: Export) -> Result<(), ExportError> {
        if self.shared.closing.load(Ordering::SeqCst) {
            return Err(ExportError::NotRunning);
        }
        self.shared.exports.add(export)
    }

    /// Ends an export: new clients do not find it, and those that use it are disconnected. It stays in
    /// [`NbdServer::exports`] until the last of them is gone, which takes as long as the disk needs for what is in
    /// flight; then `on_deleted` is called.
    ///
    /// # Errors
    /// If there is no such export, or it has clients and `mode` is safe.
    pub fn remove(&self, id: &str, mode: RemoveMode) -> Result<(), ExportError> {
        if let Some(gone) = self.shared.exports.remove(id, mode)? {
            drop(gone);
            (self.shared.on_deleted)(id);
        }
        Ok(())
    }

    /// Ends every export, however many clients they have.
    pub fn remove_all(&self) {
        for ExportInfo { id, .. } in self.exports() {
            // It may be gone meanwhile.
            let _ = self.remove(&id, RemoveMode::Hard);
        }
    }

    /// What is exported, in the order in which it was added.
    pub fn exports(&self) -> Vec<ExportInfo> {
        self.shared.exports.info()
    }

    /// Connections now, also those that have not chosen an export yet.
    pub fn connections(&self) -> usize {
        lock(&self.shared.connections).len()
    }

    /// Stops listening and ends all exports and connections. Does not wait for requests in flight:
    /// [`NbdServer::wait_closed`] does.
    pub fn close(&self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        // Fails only if it has been done before.
        let _ = self.wake.shutdown(Shutdown::Both);
        if let Some(thread) = lock(&self.accepting).take() {
            // It waits for nothing else. It has told of its panic itself.
            let _ = thread.join();
        }
        self.remove_all();
        for socket in lock(&self.shared.connections).values() {
            stream::disconnect(socket);
        }
    }

    /// Waits until a closed server has no connections any more, so that nothing is read or written for it; until
    /// `deadline` at most. Returns whether it has none.
    pub fn wait_closed(&self, deadline: Instant) -> bool {
        let (limit, ended) =
            (deadline.saturating_duration_since(Instant::now()), &self.shared.ended);
        let connections = lock(&self.shared.connections);
        let waited = ended.wait_timeout_while(connections, limit, |open| !open.is_empty());
        waited.unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.close();
        let connections = lock(&self.shared.connections);
        let gone = self.shared.ended.wait_while(connections, |open| !open.is_empty());
        drop(gone.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Accepts connections until the other end of `wake` is shut down.
fn accept_all(listener: &Listener, wake: &UnixStream, shared: &Arc<Shared>) {
    let mut next_id = 0;
    while !shared.closing.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok(socket) => {
                next_id += 1;
                admit(socket, next_id, shared);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                wait(&[listener.fd(), wake.as_fd()], None);
            }
            Err(error) => {
                log::debug!("NBD server: cannot accept a connection: {error}");
                wait(&[wake.as_fd()], Some(ACCEPT_PAUSE));
            }
        }
    }
}

/// Waits until one of `fds` is readable.
fn wait(fds: &[BorrowedFd<'_>], limit: Option<Duration>) {
    let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    // Interrupted or not, the caller looks again.
    let _ = poll(&mut fds, limit.as_ref());
}

/// Serves a connection on a thread of its own, or closes it if there are too many.
fn admit(socket: Socket, id: u64, shared: &Arc<Shared>) {
    let socket = Arc::new(socket);
    {
        let mut connections = lock(&shared.connections);
        // Closing disconnects those that it finds here.
        let closing = shared.closing.load(Ordering::SeqCst);
        if closing || connections.len() >= shared.limits.max_connections {
            return;
        }
        connections.insert(id, socket.clone());
    }
    let connection = Connection { shared: shared.clone(), id, uses: OnceLock::new() };
    let thread = std::thread::Builder::new().name(format!("nbd-client-{id}"));
    let spawned = thread.stack_size(STACK_BYTES).spawn(move || {
        if let Err(error) = connection.serve(socket) {
            log::debug!("NBD client {}: {error}", connection.id);
        }
    });
    if let Err(error) = spawned {
        log::debug!("NBD server: cannot start a thread for a connection: {error}");
    }
}

/// A connection; dropping it ends that.
struct Connection {
    shared: Arc<Shared>,
    id: u64,
    /// Id of the export that it uses.
    uses: OnceLock<String>,
}

impl Connection {
    fn serve(&self, socket: Arc<Socket>) -> io::Result<()> {
        let deadline = Instant::now() + self.shared.limits.handshake;
        let mut stream = Stream::new(socket.clone(), deadline);
        let exports = &self.shared.exports;
        let enter = |name: &str| {
            let export = exports.enter(name, self.id, &socket)?;
            // Once: the handshake is over then.
            self.uses.get_or_init(|| export.id.clone());
            Some(export)
        };
        match handshake::run(&mut stream, exports, enter)? {
            Outcome::Aborted => Ok(()),
            Outcome::Chosen(chosen) => {
                stream.no_deadline()?;
                let disconnect = || stream::disconnect(&socket);
                transmission::Session::new(stream, chosen).serve(&disconnect)
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Whoever used the export for it has let go of that.
        if let Some(id) = self.uses.get()
            && let Some(gone) = self.shared.exports.leave(id, self.id)
        {
            drop(gone);
            (self.shared.on_deleted)(id);
        }
        let mut connections = lock(&self.shared.connections);
        if let Some(socket) = connections.remove(&self.id) {
            stream::disconnect(&socket);
        }
        self.shared.ended.notify_all();
    }
}

#[cfg(test)]
mod tests;
