//! COM1's other end: where the guest's output goes, and where its input comes from.
//!
//! Output is written by the vCPU that made it, so a log file is complete whenever the guest is
//! stopped. Input is read by the `io` thread, which stops reading while the guest's FIFO is full.
//! On a terminal, Ctrl-A x ends the VMM, as in QEMU; raw mode is undone when the console is dropped.

use crate::config::SerialConfig;
use crate::supervisor::exit_code;
use devices::patient::PatientWriter;
use devices::serial::SerialConsole;
use regex_lite::Regex;
use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::terminal::Terminal;

/// Longest piece of output without a newline that `--expect` looks at.
const EXPECT_LINE_BYTES: usize = 16 << 10;
/// Up to here `--expect` looks at a line at each byte; a longer one it looks at when it is complete.
const PROMPT_BYTES: usize = 200;
/// Whoever does not read the output for this long loses some of it, a socket's client its connection
/// too, so that none can stop the guest.
const READER_PATIENCE: Duration = Duration::from_millis(500);
const ESCAPE: u8 = 1; // Ctrl-A

/// A console that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The log file cannot be written.
    #[error("cannot write serial log {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be listened on.
    #[error("cannot listen on serial socket {path}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The host has no more threads or descriptors.
    #[error("cannot start the serial console")]
    Start(#[source] io::Error),
}

/// What the console tells its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConsoleEvent {
    /// The output matched `--expect`.
    Expected,
    /// Ctrl-A x.
    Quit,
}

/// Called from the vCPU or `io` thread.
pub type ConsoleSink = Arc<dyn Fn(ConsoleEvent) + Send + Sync>;

/// An open console. It outlives the machines that are attached to it one after another.
pub struct Console {
    output: Arc<Mutex<Output>>,
    attached: Arc<Attached>,
    thread: Option<JoinHandle<()>>,
    raw_terminal: bool,
    socket_path: Option<PathBuf>,
}

/// Takes what is typed.
pub trait ConsoleInput: Send {
    /// Takes as much of `bytes` as there is room for; returns how much.
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

enum Sink {
    Null,
    File(PatientWriter),
    Client(Option<UnixStream>),
}

struct Output {
    sink: Sink,
    expect: Option<Expect>,
}

struct Expect {
    pattern: Regex,
    line: Vec<u8>,
    matched: bool,
    tell: ConsoleSink,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Input {
    None,
    /// A duplicate of standard input, read without the standard library's buffer: what that holds
    /// would not be seen by epoll.
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
        let (sink, input) = match config {
            SerialConfig::Null => (Sink::Null, Input::None),
            SerialConfig::Stdio => {
                let stdin =
                    io::stdin().as_fd().try_clone_to_owned().map_err(ConsoleError::Start)?;
                let stdout =
                    io::stdout().as_fd().try_clone_to_owned().map_err(ConsoleError::Start)?;
                let stdout = PatientWriter::new(File::from(stdout), READER_PATIENCE)
                    .map_err(ConsoleError::Start)?;
                (Sink::File(stdout), Input::Stdin(File::from(stdin)))
            }
            SerialConfig::File(path) => {
                let file = File::create(path)
                    .and_then(|file| PatientWriter::new(file, READER_PATIENCE))
                    .map_err(|source| ConsoleError::File { path: path.clone(), source })?;
                (Sink::File(file), Input::None)
            }
            SerialConfig::Socket(path) => {
                let failed = |source| ConsoleError::Socket { path: path.clone(), source };
                let listener = listen(path).map_err(failed)?;
                (Sink::Client(None), Input::Listener(listener))
            }
        };
        let expect = expect.map(|pattern| Expect {
            pattern,
            line: Vec::new(),
            matched: false,
            tell: tell.clone(),
        });
        let socket_path = match config {
            SerialConfig::Socket(path) => Some(path.clone()),
            _ => None,
        };
        let mut console = Self {
            output: Arc::new(Mutex::new(Output { sink, expect })),
            attached: Arc::new(Attached {
                input: Mutex::new(None),
                changed: EventFd::new(EFD_NONBLOCK).map_err(ConsoleError::Start)?,
                closing: false.into(),
            }),
            thread: None,
            raw_terminal: false,
            socket_path,
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
                output: console.output.clone(),
                attached: console.attached.clone(),
                escape: console.raw_terminal.then_some(false),
                tell,
                input_ended: false,
            };
            let run = move || {
                if let Err(error) = reader.run() {
                    log::error!("serial input ends: {error}");
                }
            };
            let thread = std::thread::Builder::new().name("io".into()).stack_size(256 << 10);
            console.thread = Some(thread.spawn(run).map_err(ConsoleError::Start)?);
        }
        Ok(console)
    }

    /// Takes a guest's output.
    pub fn writer(&self) -> Box<dyn Write + Send> {
        Box::new(Writer(self.output.clone()))
    }

    /// Sends input to `input` from now on.
    pub fn attach(&self, input: Arc<Mutex<dyn ConsoleInput>>) {
        *lock(&self.attached.input) = Some(input);
        // An eventfd fails to count only when it is already readable.
        let _ = self.attached.changed.write(1);
    }

    /// Keeps input until something is attached again.
    pub fn detach(&self) {
        *lock(&self.attached.input) = None;
        let _ = self.attached.changed.write(1);
    }

    /// The exit code of a guest that has ended with `code`: if it never said what `--expect` wants, it has
    /// failed.
    pub fn code_unless_expecting(&self, code: u8) -> u8 {
        if lock(&self.output).expect.as_ref().is_none_or(|expect| expect.matched) {
            return code;
        }
        eprintln!("ferry: the guest has ended and --expect never matched");
        exit_code::GUEST_FAILED
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.attached.closing.store(true, std::sync::atomic::Ordering::Release);
        let _ = self.attached.changed.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the io thread panicked");
        }
        if self.raw_terminal {
            let _ = io::stdin().lock().set_canon_mode();
        }
        if let Some(path) = &self.socket_path {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Binds a socket, replacing one that a dead process left behind.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(io::Error::new(
                    ErrorKind::AddrInUse,
                    "another process listens on it; choose another path",
                ));
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        result => result,
    }
}

struct Writer(Arc<Mutex<Output>>);

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = lock(&self.0);
        // Written before it is looked at: a match ends the process, and the log is complete then. What
        // the reader does not take was said all the same.
        let written = output.write(bytes);
        if let Some(expect) = &mut output.expect {
            expect.look(bytes);
        }
        written.map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // Nothing is buffered on the way.
        Ok(())
    }
}

impl Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.sink {
            Sink::Null => Ok(()),
            Sink::File(file) => file.write_all(bytes),
            Sink::Client(client) => {
                if let Some(stream) = client
                    && let Err(error) = stream.write_all(bytes)
                {
                    log::warn!("dropping the serial client: {error}");
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                    *client = None;
                }
                Ok(())
            }
        }
    }
}

impl Expect {
    fn look(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if self.matched {
                return;
            }
            if *byte == b'\n' {
                self.compare();
                self.line.clear();
                continue;
            }
            if self.line.len() == EXPECT_LINE_BYTES {
                self.line.drain(..EXPECT_LINE_BYTES / 2);
            }
            self.line.push(*byte);
        }
        // A prompt has no newline, but it is short.
        if !self.matched && self.line.len() <= PROMPT_BYTES {
            self.compare();
        }
    }

    fn compare(&mut self) {
        if self.pattern.is_match(&String::from_utf8_lossy(&self.line)) {
            self.matched = true;
            (self.tell)(ConsoleEvent::Expected);
        }
    }
}

/// The `io` thread.
struct Reader {
    input: Input,
    client: Option<UnixStream>,
    /// Read but not yet taken by the guest.
    pending: Vec<u8>,
    output: Arc<Mutex<Output>>,
    attached: Arc<Attached>,
    /// On a terminal: whether the last byte was Ctrl-A.
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
            let watch = |fd: RawFd| {
                let event = EpollEvent::new(EventSet::IN, u64::try_from(fd).unwrap_or(0));
                epoll.ctl(ControlOperation::Add, fd, event)
            };
            watch(self.attached.changed.as_raw_fd())?;
            if let Some(room) = &room {
                watch(room.as_raw_fd())?;
            }
            if let Some(fd) = source
                && let Err(error) = watch(fd)
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

    /// What to wait for: nothing while the guest has yet to take what was read.
    fn source(&self) -> Option<RawFd> {
        if !self.pending.is_empty() {
            return None;
        }
        match (&self.client, &self.input) {
            (Some(client), _) => Some(client.as_raw_fd()),
            (None, Input::Listener(listener)) => Some(listener.as_raw_fd()),
            (None, Input::Stdin(stdin)) if !self.input_ended => Some(stdin.as_raw_fd()),
            (None, _) => None,
        }
    }

    fn read_source(&mut self) {
        let mut buffer = [0u8; 256];
        let result = match (&mut self.client, &mut self.input) {
            (Some(client), _) => client.read(&mut buffer),
            (None, Input::Listener(listener)) => {
                match listener.accept().and_then(|(client, _)| prepare_client(client)) {
                    Ok((for_input, for_output)) => {
                        self.client = Some(for_input);
                        lock(&self.output).sink = Sink::Client(Some(for_output));
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
            _ if self.client.take().is_some() => {
                lock(&self.output).sink = Sink::Client(None);
            }
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

    /// Gives the guest what fits into its FIFO.
    fn deliver(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        if let Some(input) = lock(&self.attached.input).clone() {
            let taken = lock(&input).enqueue(&self.pending);
            self.pending.drain(..taken.min(self.pending.len()));
        }
    }
}

fn prepare_client(client: UnixStream) -> io::Result<(UnixStream, UnixStream)> {
    client.set_write_timeout(Some(READER_PATIENCE))?;
    let for_output = client.try_clone()?;
    Ok((client, for_output))
}
