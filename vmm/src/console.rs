//! The host side of COM1: output to a file, socket or terminal, and input from there. Opened by the
//! supervisor.
//!
//! Output is buffered in a bounded [`Transmitter`] for the `console-out` thread ([`output`]); [`watch`]
//! sees it as the guest writes it. The `io` thread reads input and pauses while the guest's FIFO is full.
//! On a terminal, Ctrl-A x ends the VMM, as in QEMU; dropping the console restores the terminal's mode.

mod debug;
mod expect;
mod output;
mod watch;

use crate::config::SerialConfig;
use crate::exit_code::{self, Exit};
pub use debug::DebugBackend;
use devices::lock;
use devices::serial::SerialConsole;
use devices::transmitter::Transmitter;
use expect::Expect;
use migration::transport::unix::{ListenError, SocketFile, listen_unix};
use output::{Clients, Output, Sink};
use regex_lite::Regex;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::terminal::Terminal;
use watch::Watch;

const ESCAPE: u8 = 1; // Ctrl-A
/// How long a closing console waits for its `io` thread. It waits itself only while it passes input on.
const JOIN_PATIENCE: Duration = Duration::from_millis(500);

/// A console that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    #[error("cannot write {what} {path}")]
    File {
        /// Which log.
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A FIFO that nobody reads.
    #[error("{what} {path} is a FIFO that nobody reads: start its reader first")]
    NoReader { what: &'static str, path: PathBuf },
    #[error("cannot listen on serial socket {path}")]
    Socket {
        path: PathBuf,
        #[source]
        source: ListenError,
    },
    /// No thread or descriptor could be created.
    #[error("cannot start the serial console")]
    Start(#[source] io::Error),
}

/// Events for the console's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConsoleEvent {
    /// The output matched `--expect`.
    Expected,
    /// Ctrl-A x.
    Quit,
}

/// Called from the vCPU or `io` thread.
pub type ConsoleSink = Arc<dyn Fn(ConsoleEvent) + Send + Sync>;

/// An open console. It outlives the machines that are attached to it in turn.
pub struct Console {
    transmitter: Arc<Transmitter>,
    watch: Arc<Mutex<Watch>>,
    /// Dropped, and so closed, before input: no need to wait for a client that is leaving.
    output: Option<Output>,
    attached: Arc<Attached>,
    /// The `io` thread, and a channel that closes when it ends.
    thread: Option<(JoinHandle<()>, Receiver<()>)>,
    raw_terminal: bool,
    /// Removed when the console is dropped.
    _socket: Option<SocketFile>,
}

/// The consumer of console input.
pub trait ConsoleInput: Send {
    /// Accepts as much of `bytes` as fits; returns how much.
    fn enqueue(&mut self, bytes: &[u8]) -> usize;
    /// Readable when there is room again.
    fn room_event(&self) -> &EventFd;
}

impl ConsoleInput for SerialConsole {
    fn enqueue(&mut self, bytes: &[u8]) -> usize {
        self.enqueue_input(bytes)
    }

    fn room_event(&self) -> &EventFd {
        self.room_event()
    }
}

struct Attached {
    input: Mutex<Option<Arc<Mutex<dyn ConsoleInput>>>>,
    /// The attachment changed, or the console closes.
    changed: EventFd,
    closing: std::sync::atomic::AtomicBool,
}

enum Input {
    None,
    /// A duplicate of standard input, without the standard library's buffer, whose content epoll would not
    /// see.
    Stdin(File),
    Listener(UnixListener),
}

impl Console {
    /// Opens what `config` names.
    pub fn open(
        config: &SerialConfig,
        expect: Option<Regex>,
        tell: ConsoleSink,
    ) -> Result<Self, ConsoleError> {
        let mut socket = None;
        let (sink, input) = match config {
            SerialConfig::Null => (None, Input::None),
            SerialConfig::Stdio => {
                let stdin = io::stdin().as_fd().try_clone_to_owned();
                let stdout = io::stdout().as_fd().try_clone_to_owned();
                let stdin = File::from(stdin.map_err(ConsoleError::Start)?);
                let stdout = File::from(stdout.map_err(ConsoleError::Start)?);
                (Some(Sink::file(stdout).map_err(ConsoleError::Start)?), Input::Stdin(stdin))
            }
            SerialConfig::File(path) => {
                let what = "serial log";
                let failed = |source| ConsoleError::File { what, path: path.clone(), source };
                let log = Log { what, path, continues: false };
                (Some(Sink::file(open_log(log)?).map_err(failed)?), Input::None)
            }
            SerialConfig::Socket(path) => {
                let (listener, file) = listen_unix(path)
                    .map_err(|source| ConsoleError::Socket { path: path.clone(), source })?;
                socket = Some(file);
                (None, Input::Listener(listener))
            }
        };
        let expect = expect.map(|pattern| Expect::new(pattern, tell.clone()));
        let watch = Arc::new(Mutex::new(Watch::new(expect)));
        let watching = watch.clone();
        let observer = Box::new(move |bytes: &[u8]| lock(&watching).look(bytes));
        let transmitter = Arc::new(Transmitter::new(Some(observer)).map_err(ConsoleError::Start)?);
        let output = match config {
            SerialConfig::Null => Output::discard(transmitter.clone()),
            _ => Output::start(transmitter.clone(), sink).map_err(ConsoleError::Start)?,
        };
        let clients = output.clients();
        let mut console = Self {
            transmitter,
            watch,
            output: Some(output),
            attached: Arc::new(Attached {
                input: Mutex::new(None),
                changed: EventFd::new(EFD_NONBLOCK).map_err(ConsoleError::Start)?,
                closing: false.into(),
            }),
            thread: None,
            raw_terminal: false,
            _socket: socket,
        };
        if matches!(input, Input::Stdin(_)) && io::stdin().is_terminal() {
            io::stdin().lock().set_raw_mode().map_err(|error| ConsoleError::Start(error.into()))?;
            console.raw_terminal = true;
        }
        if !matches!(input, Input::None) {
            let mut reader = Reader {
                input,
                client: None,
                pending: Vec::new(),
                clients,
                attached: console.attached.clone(),
                escape: console.raw_terminal.then_some(false),
                tell,
                input_ended: false,
            };
            let (ending, ended) = channel::<()>();
            let run = move || {
                if let Err(error) = reader.run() {
                    log::error!("serial input ends: {error}");
                }
                drop(ending);
            };
            let thread = std::thread::Builder::new().name("io".into()).stack_size(256 << 10);
            console.thread = Some((thread.spawn(run).map_err(ConsoleError::Start)?, ended));
        }
        Ok(console)
    }

    /// The transmitter for a guest's output.
    pub fn output(&self) -> Arc<Transmitter> {
        self.transmitter.clone()
    }

    /// Attaches `input` as the consumer.
    pub fn attach(&self, input: Arc<Mutex<dyn ConsoleInput>>) {
        *lock(&self.attached.input) = Some(input);
        // Fails only if the eventfd is readable already.
        let _ = self.attached.changed.write(1);
    }

    /// Detaches the consumer; input is kept until another is attached.
    pub fn detach(&self) {
        *lock(&self.attached.input) = None;
        let _ = self.attached.changed.write(1);
    }

    /// The end of a guest that has ended, or was told to: a failure if `--expect` has not matched.
    pub fn unless_expecting(&self, exit: Exit) -> Exit {
        if !lock(&self.watch).still_expects() {
            return exit;
        }
        Exit::new(exit_code::UNMATCHED, format!("--expect never matched; {}", exit.why))
    }

    /// What the guest wrote last, in words.
    pub fn last_output(&self) -> String {
        lock(&self.watch).last_output()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.output = None;
        self.attached.closing.store(true, std::sync::atomic::Ordering::Release);
        let _ = self.attached.changed.write(1);
        if let Some((thread, ended)) = self.thread.take() {
            // Nothing is ever sent: the channel closes with the thread.
            if ended.recv_timeout(JOIN_PATIENCE) == Err(RecvTimeoutError::Timeout) {
                log::warn!("serial input: the guest's process does not take it");
            } else if thread.join().is_err() {
                log::error!("the io thread panicked");
            }
        }
        if self.raw_terminal {
            let _ = io::stdin().lock().set_canon_mode();
        }
    }
}

/// The `io` thread.
struct Reader {
    input: Input,
    client: Option<UnixStream>,
    /// Read but not yet taken by the guest.
    pending: Vec<u8>,
    clients: Clients,
    attached: Arc<Attached>,
    /// Whether the last byte was Ctrl-A, on a terminal.
    escape: Option<bool>,
    tell: ConsoleSink,
    input_ended: bool,
}

impl Reader {
    fn run(&mut self) -> io::Result<()> {
        loop {
            if self.attached.closing.load(std::sync::atomic::Ordering::Acquire) {
                return Ok(());
            }
            self.deliver();
            let attached = lock(&self.attached.input).clone();
            let room =
                attached.as_ref().and_then(|input| lock(input).room_event().try_clone().ok());
            let source = self.source();
            let epoll = Epoll::new()?;
            let watch = |fd: RawFd, interest: EventSet| {
                let data =
                    u64::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
                epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(interest, data))
            };
            watch(self.attached.changed.as_raw_fd(), EventSet::IN)?;
            if let Some(room) = &room {
                watch(room.as_raw_fd(), EventSet::IN)?;
            }
            if let Some((fd, interest)) = source
                && let Err(error) = watch(fd, interest)
            {
                // A regular file as standard input is always ready, and epoll refuses it.
                if error.raw_os_error() != Some(libc::EPERM) {
                    return Err(error);
                }
                self.read_source();
                continue;
            }
            let mut events = [EpollEvent::default(); 4];
            let count = match epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            };
            for event in events.iter().take(count) {
                let fd = event.fd();
                if fd == self.attached.changed.as_raw_fd() {
                    let _ = self.attached.changed.read();
                } else if room.as_ref().is_some_and(|room| room.as_raw_fd() == fd) {
                    let _ = room.as_ref().map(EventFd::read);
                } else {
                    self.read_source();
                }
            }
        }
    }

    /// The descriptor to poll. While the guest has not taken the last input, no more is read, but a client
    /// that leaves makes room for the next one.
    fn source(&self) -> Option<(RawFd, EventSet)> {
        let taken = self.pending.is_empty();
        match (&self.client, &self.input) {
            (Some(client), _) if taken => Some((client.as_raw_fd(), EventSet::IN)),
            (Some(client), _) => Some((client.as_raw_fd(), EventSet::HANG_UP)),
            (None, Input::Listener(listener)) => Some((listener.as_raw_fd(), EventSet::IN)),
            (None, Input::Stdin(stdin)) if !self.input_ended && taken => {
                Some((stdin.as_raw_fd(), EventSet::IN))
            }
            (None, _) => None,
        }
    }

    fn read_source(&mut self) {
        if !self.pending.is_empty() && self.client.take().is_some() {
            return self.clients.clear();
        }
        let mut buffer = [0u8; 256];
        let result = match (&mut self.client, &mut self.input) {
            (Some(client), _) => client.read(&mut buffer),
            (None, Input::Listener(listener)) => {
                match listener.accept().and_then(|(client, _)| prepare_client(client)) {
                    Ok((for_input, for_output)) => {
                        self.client = Some(for_input);
                        self.clients.set(for_output);
                    }
                    Err(error) => log::warn!("serial client refused: {error}"),
                }
                return;
            }
            (None, Input::Stdin(stdin)) => stdin.read(&mut buffer),
            (None, Input::None) => return,
        };
        match result {
            Ok(count) if count > 0 => self.take(&buffer[..count]),
            Err(error)
                if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            // End of input, or a broken client.
            _ if self.client.take().is_some() => self.clients.clear(),
            _ => self.input_ended = true,
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match self.escape {
                Some(false) if *byte == ESCAPE => self.escape = Some(true),
                Some(true) => {
                    self.escape = Some(false);
                    match byte {
                        b'x' | b'X' => (self.tell)(ConsoleEvent::Quit),
                        // Ctrl-A Ctrl-A sends one.
                        _ => self.pending.push(*byte),
                    }
                }
                _ => self.pending.push(*byte),
            }
        }
    }

    /// Passes on what fits into the guest's FIFO.
    fn deliver(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        // Not locked while the input is passed on, which may take long.
        let attached = lock(&self.attached.input).clone();
        if let Some(input) = attached {
            let taken = lock(&input).enqueue(&self.pending);
            self.pending.drain(..taken.min(self.pending.len()));
        }
    }
}

/// Opens or creates a log for writing, without waiting for anything: the standard library would wait for the
/// reader of a FIFO, and try again after every signal.
/// A file for output.
struct Log<'a> {
    /// What it is, in messages.
    what: &'static str,
    path: &'a Path,
    /// Keeps what is in it, and goes on behind that.
    continues: bool,
}

fn open_log(Log { what, path, continues }: Log<'_>) -> Result<File, ConsoleError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(!continues).append(continues);
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options.open(path).map_err(|source| {
        let is_fifo = || std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENXIO) if is_fifo() => ConsoleError::NoReader { what, path },
            _ => ConsoleError::File { what, path, source },
        }
    })
}

fn prepare_client(client: UnixStream) -> io::Result<(UnixStream, UnixStream)> {
    client.set_nonblocking(true)?;
    let for_output = client.try_clone()?;
    Ok((client, for_output))
}
