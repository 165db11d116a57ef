//! One process of the shuttle's: how it is started, spoken to and heard to its end.

use super::{ChildId, Message};
use crate::client::{ClientError, QmpClient};
use crate::config::{BootFiles, RunConfig};
use crate::console::ConsoleInput;
use crate::event_loop::Mailbox;
use crate::supervisor::exit_code;
use devices::block::raw::Cache;
use devices::transmitter::Transmitter;
use serde_json::json;
use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long a child may take to say that it is there.
const START_PATIENCE: Duration = Duration::from_secs(20);

/// A conversation with a child.
pub(super) struct Connection {
    /// Asks it.
    pub client: QmpClient,
    /// Takes the guest's input.
    pub input: Arc<Mutex<Input>>,
}

/// A child process.
pub(super) struct Child {
    id: ChildId,
    control: PathBuf,
    address: PathBuf,
    output: Option<ChildStdout>,
    /// Its first line on standard error, or the end of it.
    first_line: Option<Receiver<()>>,
    ended: Receiver<u8>,
    /// Received from there.
    code: Cell<Option<u8>>,
}

impl Child {
    /// The process that boots the guest.
    pub fn boot(config: &RunConfig, folder: &Path, mailbox: &Mailbox<Message>) -> io::Result<Self> {
        let mut command = ferry("run")?;
        boot_files(&mut command, &config.boot);
        command.arg("--cmdline").arg(&config.cmdline);
        command.arg(format!("--memory={}B", config.memory_bytes));
        command.arg(format!("--cpus={}", config.cpus));
        command.arg(if config.acpi { "--acpi=on" } else { "--acpi=off" });
        if config.rng {
            command.arg("--rng");
        }
        for (_, disk) in &config.disks {
            command.args(["--disk", &disk.text]);
        }
        if let Some(name) = &config.name {
            command.args(["--name", name]);
        }
        Self::start(1, command, config, folder, mailbox)
    }

    /// A process that waits for the guest.
    pub fn receive(
        id: ChildId,
        config: &RunConfig,
        folder: &Path,
        mailbox: &Mailbox<Message>,
    ) -> io::Result<Self> {
        let mut command = ferry("receive")?;
        command.arg(format!("unix:{}", address(folder, id).display()));
        boot_files(&mut command, &config.boot);
        for (id, disk) in &config.disks {
            let cache = match disk.cache {
                Cache::Writeback => "writeback",
                Cache::None => "none",
            };
            command.arg("--disk").arg(format!("{id}={},cache={cache}", disk.path.display()));
        }
        Self::start(id, command, config, folder, mailbox)
    }

    fn start(
        id: ChildId,
        mut command: Command,
        config: &RunConfig,
        folder: &Path,
        mailbox: &Mailbox<Message>,
    ) -> io::Result<Self> {
        let control = folder.join(format!("control-{id}"));
        command.arg("--qmp").arg(format!("unix:{}", control.display()));
        command.args(["--serial=stdio", "--with-parent"]);
        if config.host.no_reboot {
            command.arg("--no-reboot");
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn()?;
        let missing = || io::Error::other("a child process without pipes");
        let errors = process.stderr.take().ok_or_else(missing)?;
        let output = process.stdout.take();
        let (ending, ended) = channel();
        let to_us = mailbox.clone();
        thread("wait", move || {
            let code = process.wait().ok().and_then(|status| status.code());
            // Killed by a signal: the guest is gone all the same.
            let code = code.and_then(|code| u8::try_from(code).ok());
            let code = code.unwrap_or(exit_code::GUEST_FAILED);
            let _ = ending.send(code);
            to_us.post(Message::Ended(id, code));
        })?;
        let (telling, first_line) = channel();
        thread("errors", move || pass_errors(errors, &telling))?;
        let address = address(folder, id);
        Ok(Self {
            id,
            control,
            address,
            output,
            first_line: Some(first_line),
            ended,
            code: Cell::new(None),
        })
    }

    /// Its number.
    pub fn id(&self) -> ChildId {
        self.id
    }

    /// Where it waits for the guest.
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// Its control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// What the guest says; once.
    pub fn take_output(&mut self) -> Option<ChildStdout> {
        self.output.take()
    }

    /// Gives what waits until it listens, or has ended; once. A child that does neither in time is found
    /// out by whoever connects.
    pub fn take_readiness(&mut self) -> impl FnOnce() + Send + 'static {
        let first_line = self.first_line.take();
        move || {
            let _ = first_line.map(|first_line| first_line.recv_timeout(START_PATIENCE));
        }
    }

    /// Connects to its control socket, and hears its events from now on.
    pub fn connect(&self, mailbox: &Mailbox<Message>) -> Result<Connection, ClientError> {
        let mut listener = self.first_client()?;
        let path = self.control.to_string_lossy();
        let client = QmpClient::connect(&path)?;
        let input = Input::new(QmpClient::connect(&path)?).map_err(ClientError::Lost)?;
        let (id, to_us) = (self.id, mailbox.clone());
        let started = thread("events", move || {
            while let Ok(event) = listener.event() {
                to_us.post(Message::Event(id, event));
            }
        });
        started.map_err(ClientError::Lost)?;
        Ok(Connection { client, input: Arc::new(Mutex::new(input)) })
    }

    /// `ferry run` says nothing when it listens: it is there when it answers, or when it has ended.
    fn first_client(&self) -> Result<QmpClient, ClientError> {
        let path = self.control.to_string_lossy();
        loop {
            match QmpClient::connect(&path) {
                Err(ClientError::Connect { .. }) => {}
                result => return result,
            }
            if self.ended_within(Duration::from_millis(1)).is_some() {
                return Err(ClientError::Lost(io::ErrorKind::ConnectionAborted.into()));
            }
        }
    }

    /// Waits for its end, and gives its exit code.
    pub fn ended_within(&self, patience: Duration) -> Option<u8> {
        if self.code.get().is_none() {
            self.code.set(self.ended.recv_timeout(patience).ok());
        }
        self.code.get()
    }
}

fn address(folder: &Path, id: ChildId) -> PathBuf {
    folder.join(format!("migrate-{id}"))
}

fn ferry(verb: &str) -> io::Result<Command> {
    // Not by path: the file may have been replaced since this process was started.
    let mut command = Command::new("/proc/self/exe");
    command.arg(verb);
    Ok(command)
}

fn boot_files(command: &mut Command, files: &BootFiles) {
    command.arg("--kernel").arg(&files.kernel);
    if let Some(initrd) = &files.initrd {
        command.arg("--initrd").arg(initrd);
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = std::thread::Builder::new().name(name.to_owned()).stack_size(256 << 10);
    builder.spawn(work).map(drop)
}

/// Passes a child's complaints on; that it listens is not one.
fn pass_errors(errors: ChildStderr, first: &Sender<()>) {
    for line in BufReader::new(errors).lines().map_while(Result::ok) {
        if line.starts_with("ferry: listening on ") {
            let _ = first.send(());
        } else {
            eprintln!("{line}");
        }
    }
}

/// Input on its way to the guest: over the control socket, because that says how much the guest's serial
/// port has taken. The rest stays with the console, and a move loses nothing of it.
pub(super) struct Input {
    client: QmpClient,
    room: Arc<EventFd>,
}

/// When to ask again a guest whose serial port is full.
const ROOM_INTERVAL: Duration = Duration::from_millis(10);

impl Input {
    fn new(client: QmpClient) -> io::Result<Self> {
        Ok(Self { client, room: Arc::new(EventFd::new(EFD_NONBLOCK)?) })
    }
}

impl ConsoleInput for Input {
    fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let data: String = bytes.iter().copied().map(char::from).collect();
        // A child that is gone takes nothing: the next one will.
        let Ok(answer) = self.client.execute("x-console-input", json!({"data": data})) else {
            return 0;
        };
        let Some(taken) = answer["taken"].as_u64() else {
            log::error!("x-console-input: the answer lacks `taken`: {answer}");
            return 0;
        };
        // Saturates: at most all bytes were taken.
        let taken = usize::try_from(taken).map_or(bytes.len(), |taken| taken.min(bytes.len()));
        if taken < bytes.len() {
            let room = self.room.clone();
            // Room in the port is no event of the control socket's.
            let waker = thread("room", move || {
                std::thread::sleep(ROOM_INTERVAL);
                let _ = room.write(1);
            });
            if let Err(error) = waker {
                log::warn!("typed input waits for more input: {error}");
            }
        }
        taken
    }

    fn room_event(&self) -> &EventFd {
        &self.room
    }
}

/// Passes the children's output on, one child after another, each to its end: what the guest said before
/// a move comes before what it said after it.
pub(super) struct Pump(Sender<(ChildId, ChildStdout)>);

impl Pump {
    /// Starts writing to `console`.
    pub fn start(console: Arc<Transmitter>, mailbox: Mailbox<Message>) -> io::Result<Self> {
        let (sender, queue) = channel::<(ChildId, ChildStdout)>();
        thread("pump", move || {
            let mut buffer = [0; 4096];
            for (id, mut output) in queue {
                loop {
                    match output.read(&mut buffer) {
                        Ok(0) => break,
                        // While nobody reads the console the child waits, and its guest with it.
                        Ok(count) => {
                            if console.write_waiting(&buffer[..count]).is_err() {
                                return;
                            }
                        }
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
                mailbox.post(Message::Drained(id));
            }
        })?;
        Ok(Self(sender))
    }

    /// After the others, passes on what child `id` says.
    pub fn follow(&self, id: ChildId, output: Option<ChildStdout>) {
        if let Some(output) = output {
            // An error means that the pump has ended, and with it the console.
            let _ = self.0.send((id, output));
        }
    }
}
