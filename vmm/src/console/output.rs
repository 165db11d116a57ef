//! The console's `console-out` thread: writes buffered output in chunks as large as possible.
//!
//! It waits for the reader in `poll`, never in `write`, so that pausing or migrating the guest and ending
//! the process do not depend on the reader. The exception is a file on a hung disk: then the process ends
//! without joining the thread.

use devices::log_limit::LogLimit;
use devices::transmitter::Transmitter;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, fstat};
use rustix::time::Timespec;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// How long a closing console waits for its reader to take pending output.
pub const CLOSE_PATIENCE: Duration = Duration::from_millis(500);
/// A little longer, so that the thread can end by itself.
const JOIN_PATIENCE: Duration = Duration::from_millis(600);
/// A guest writes single bytes. The first is sent at once, the following ones are batched for this long:
/// otherwise each would wake this thread and its reader.
const GATHER: Duration = Duration::from_micros(500);
/// A shared descriptor must not be made non-blocking. Once `poll` reports it writable, it accepts this many
/// bytes without blocking: `PIPE_BUF` for a pipe; sockets accept more.
const PIECE_BYTES: usize = 4096;
/// A terminal guarantees less.
const TERMINAL_PIECE_BYTES: usize = 256;

static FAILED: LogLimit = LogLimit::new();

/// The destination of output.
pub(super) enum Sink {
    /// An open file, terminal or pipe.
    File {
        file: File,
        /// Maximum size of a write that does not block after `poll`.
        piece_bytes: Option<usize>,
    },
    /// A socket's client; non-blocking.
    Client(UnixStream),
}

enum Written {
    Bytes(usize),
    /// The reader accepts nothing now.
    Full,
    Failed(io::Error),
}

impl Sink {
    /// A sink for `file`: reopened non-blocking if possible. Its own file description may be shared with
    /// other processes, which would see the flag.
    pub fn file(file: File) -> io::Result<Self> {
        let piece_bytes = match FileType::from_raw_mode(fstat(&file)?.st_mode) {
            FileType::RegularFile | FileType::Directory => None,
            FileType::Fifo | FileType::CharacterDevice => {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
                let reopened =
                    std::fs::OpenOptions::new().write(true).custom_flags(flags).open(path);
                if let Ok(file) = reopened {
                    return Ok(Self::File { file, piece_bytes: None });
                }
                let terminal = std::io::IsTerminal::is_terminal(&file);
                Some(if terminal { TERMINAL_PIECE_BYTES } else { PIECE_BYTES })
            }
            _ => Some(PIECE_BYTES),
        };
        Ok(Self::File { file, piece_bytes })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::File { file, .. } => file.as_fd(),
            Self::Client(client) => client.as_fd(),
        }
    }

    fn write(&self, bytes: &[u8]) -> Written {
        let result = match self {
            Self::File { file, piece_bytes: None } => (&*file).write(bytes),
            Self::File { file, piece_bytes: Some(most) } => {
                if !is_ready(self.fd()) {
                    return Written::Full;
                }
                (&*file).write(bytes.get(..*most).unwrap_or(bytes))
            }
            Self::Client(client) => (&*client).write(bytes),
        };
        match result {
            Ok(0) => Written::Failed(ErrorKind::WriteZero.into()),
            Ok(count) => Written::Bytes(count),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                Written::Full
            }
            Err(error) => Written::Failed(error),
        }
    }
}

/// An error or hangup counts as ready: the write reports it.
fn is_ready(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|count| count > 0)
}

/// The thread and its shared state.
pub(super) struct Output {
    shared: Arc<Shared>,
    /// The thread, and a channel that closes when it ends.
    thread: Option<(JoinHandle<()>, Receiver<()>)>,
}

struct Shared {
    transmitter: Arc<Transmitter>,
    sink: Mutex<Option<Arc<Sink>>>,
    /// Set when the console closes: the deadline for pending output.
    closing: Mutex<Option<Instant>>,
}

impl Output {
    /// Output without a sink or a thread.
    pub fn discard(transmitter: Arc<Transmitter>) -> Self {
        transmitter.set_discarding(true);
        let (sink, closing) = (Mutex::new(None), Mutex::new(None));
        Self { shared: Arc::new(Shared { transmitter, sink, closing }), thread: None }
    }

    /// Output to `sink`, or without a sink until [`Clients::set`].
    ///
    /// # Errors
    /// If no thread can be spawned.
    pub fn start(transmitter: Arc<Transmitter>, sink: Option<Sink>) -> io::Result<Self> {
        transmitter.set_discarding(sink.is_none());
        let (sink, closing) = (Mutex::new(sink.map(Arc::new)), Mutex::new(None));
        let shared = Arc::new(Shared { transmitter, sink, closing });
        let (ending, ended) = channel::<()>();
        let run = {
            let shared = shared.clone();
            move || {
                if let Err(error) = shared.run() {
                    log::error!("serial output ends: {error}");
                    shared.transmitter.set_discarding(true);
                }
                drop(ending);
            }
        };
        let thread = std::thread::Builder::new().name("console-out".into()).stack_size(256 << 10);
        Ok(Self { shared, thread: Some((thread.spawn(run)?, ended)) })
    }

    /// A handle that changes the client.
    pub fn clients(&self) -> Clients {
        Clients(self.shared.clone())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        *devices::lock(&self.shared.closing) = Some(Instant::now() + CLOSE_PATIENCE);
        self.shared.transmitter.wake();
        if let Some((thread, ended)) = self.thread.take() {
            // Nothing is ever sent: the channel closes with the thread.
            if ended.recv_timeout(JOIN_PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                log::warn!("serial output: a write hangs; the guest's last output is lost");
            } else if thread.join().is_err() {
                log::error!("the console-out thread panicked");
            }
        }
        self.shared.transmitter.close();
    }
}

/// Sets the client that gets the output.
pub(super) struct Clients(Arc<Shared>);

impl Clients {
    /// Sends output to `client` from now on.
    pub fn set(&self, client: UnixStream) {
        *devices::lock(&self.0.sink) = Some(Arc::new(Sink::Client(client)));
        self.0.transmitter.set_discarding(false);
    }

    /// The client has left: drops its pending output.
    pub fn clear(&self) {
        *devices::lock(&self.0.sink) = None;
        self.0.transmitter.set_discarding(true);
        self.0.transmitter.wake();
    }
}

impl Shared {
    fn run(&self) -> io::Result<()> {
        let epoll = Epoll::new()?;
        let wake = self.transmitter.wake_event().as_raw_fd();
        epoll.ctl(ControlOperation::Add, wake, EpollEvent::new(EventSet::IN, 0))?;
        let mut bytes = Vec::new();
        loop {
            let deadline = *devices::lock(&self.closing);
            let sink = devices::lock(&self.sink).clone();
            if !self.transmitter.begin_write(&mut bytes) {
                if deadline.is_some() {
                    return Ok(());
                }
                self.wait(&epoll, None, None)?;
                continue;
            }
            let Some(sink) = sink else {
                self.transmitter.end_write(bytes.len());
                continue;
            };
            match sink.write(&bytes) {
                Written::Bytes(count) => {
                    self.transmitter.end_write(count);
                    if count == bytes.len() && deadline.is_none() {
                        self.wait(&epoll, None, Some(GATHER))?;
                    }
                }
                Written::Full => {
                    self.transmitter.end_write(0);
                    let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
                    if left == Some(Duration::ZERO) {
                        return Ok(());
                    }
                    self.wait(&epoll, Some(sink.fd()), left)?;
                }
                Written::Failed(error) => {
                    self.transmitter.end_write(bytes.len());
                    self.failed(&sink, &error);
                }
            }
        }
    }

    /// Waits until woken, `fd` is writable, or the limit has passed.
    fn wait(
        &self,
        epoll: &Epoll,
        fd: Option<BorrowedFd<'_>>,
        limit: Option<Duration>,
    ) -> io::Result<()> {
        let limit_ms = match limit {
            // Rounded up: a limit of less than a millisecond must not become a busy loop.
            Some(limit) => i32::try_from(limit.as_millis() + 1).unwrap_or(i32::MAX),
            None => -1,
        };
        if let Some(fd) = fd {
            let interest = EpollEvent::new(EventSet::OUT, 0);
            match epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), interest) {
                // Always ready.
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => return Ok(()),
                result => result?,
            }
        }
        let result = epoll.wait(limit_ms, &mut [EpollEvent::default(); 2]);
        if let Some(fd) = fd {
            epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default())?;
        }
        match result {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            // Fails if something else ended the wait.
            _ => drop(self.transmitter.wake_event().read()),
        }
        Ok(())
    }

    fn failed(&self, sink: &Arc<Sink>, error: &io::Error) {
        if let Sink::Client(client) = &**sink {
            // This wakes its reading side, too.
            let _ = client.shutdown(std::net::Shutdown::Both);
            let mut current = devices::lock(&self.sink);
            if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, sink)) {
                *current = None;
                self.transmitter.set_discarding(true);
            }
            log::debug!("serial client: {error}");
        } else if let Some(suppressed) = FAILED.allow() {
            log::error!("serial output is being lost: {error}{suppressed}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeReader, Read};
    use std::os::fd::OwnedFd;

    /// Longer than anything here takes on a loaded host.
    const SOON: Duration = Duration::from_secs(30);

    fn to_pipe() -> (Arc<Transmitter>, Output, PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let sink = Sink::file(File::from(OwnedFd::from(writer))).unwrap();
        let transmitter = Arc::new(Transmitter::new(None).unwrap());
        (transmitter.clone(), Output::start(transmitter, Some(sink)).unwrap(), reader)
    }

    #[test]
    fn a_shared_pipe_is_not_made_non_blocking_for_the_others() {
        let (reader, writer) = io::pipe().unwrap();
        let file = File::from(OwnedFd::from(writer));
        let others = file.try_clone().unwrap();
        let sink = Sink::file(file).unwrap();
        let flags = |fd: BorrowedFd<'_>| rustix::fs::fcntl_getfl(fd).unwrap();
        assert!(!flags(others.as_fd()).contains(rustix::fs::OFlags::NONBLOCK));
        assert!(flags(sink.fd()).contains(rustix::fs::OFlags::NONBLOCK));
        drop(reader);
    }

    #[test]
    fn a_descriptor_that_must_stay_blocking_is_written_in_pieces_that_fit() {
        let (mut reader, writer) = io::pipe().unwrap();
        let file = File::from(OwnedFd::from(writer));
        let sink = Sink::File { file, piece_bytes: Some(PIECE_BYTES) };
        let mut written = 0;
        while let Written::Bytes(count) = sink.write(&[7; 3 * PIECE_BYTES]) {
            written += count;
        }
        assert!(matches!(sink.write(&[7]), Written::Full));
        let mut read = vec![0; written];
        reader.read_exact(&mut read).unwrap();
        assert!(matches!(sink.write(&[7]), Written::Bytes(1)));
        drop(reader);
        assert!(matches!(sink.write(&[7]), Written::Failed(_)));
    }

    #[test]
    fn a_reader_that_hangs_does_not_keep_the_console_open() {
        let (transmitter, output, mut reader) = to_pipe();
        let long = vec![7; 100_000];
        transmitter.write_waiting(&long).unwrap();
        let began = Instant::now();
        drop(output);
        assert!(began.elapsed() >= CLOSE_PATIENCE, "it may yet read");
        assert!(began.elapsed() < SOON);
        assert!(transmitter.write_waiting(&[7]).is_err());
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert!(!read.is_empty() && read.len() < long.len(), "{}", read.len());
    }

    #[test]
    fn a_slow_reader_gets_all_of_it_while_the_console_closes() {
        let (transmitter, output, mut reader) = to_pipe();
        let said: Vec<u8> =
            (0..100_000u32).map(|number| u8::try_from(number % 251).unwrap()).collect();
        transmitter.write_waiting(&said).unwrap();
        let thread = std::thread::spawn(move || {
            let mut heard = Vec::new();
            reader.read_to_end(&mut heard).unwrap();
            heard
        });
        drop(output);
        assert!(thread.join().unwrap() == said);
    }

    #[test]
    fn a_reader_that_has_gone_costs_only_its_bytes() {
        let (transmitter, output, reader) = to_pipe();
        drop(reader);
        for _ in 0..10 {
            // Would block forever if the bytes were kept.
            transmitter.write_waiting(&[7; 60_000]).unwrap();
        }
        transmitter.flush(SOON);
        assert_eq!(transmitter.unsent(), b"");
        drop(output);
    }

    #[test]
    fn what_a_client_left_unread_is_not_the_next_ones() {
        let transmitter = Arc::new(Transmitter::new(None).unwrap());
        let output = Output::start(transmitter.clone(), None).unwrap();
        let clients = output.clients();
        transmitter.write_waiting(b"nobody").unwrap();
        let connect = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            clients.set(ours);
            theirs
        };
        let first = connect();
        // More than socket and buffer hold: the first client leaves while this blocks.
        let writing = transmitter.clone();
        let thread = std::thread::spawn(move || writing.write_waiting(&[7; 1 << 20]).unwrap());
        first.set_read_timeout(Some(SOON)).unwrap();
        (&first).read_exact(&mut [0]).unwrap();
        drop(first);
        // The writing side noticed by itself, or was woken by the reading side.
        clients.clear();
        thread.join().unwrap();
        transmitter.flush(SOON);
        let mut second = connect();
        transmitter.write_waiting(b"second").unwrap();
        drop(output);
        clients.clear();
        let mut heard = String::new();
        second.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "second");
    }

    #[test]
    fn a_file_gets_all_before_the_console_is_closed() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let transmitter = Arc::new(Transmitter::new(None).unwrap());
        let sink = Sink::file(file.reopen().unwrap()).unwrap();
        let output = Output::start(transmitter.clone(), Some(sink)).unwrap();
        transmitter.write_waiting(&[b'x'; 300_000]).unwrap();
        drop(output);
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text.len(), 300_000);
    }
}
