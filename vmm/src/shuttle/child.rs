//! A child process of the shuttle: starts it, connects to it and waits for its end.

use super::{ChildId, Message};
use crate::client::{ClientError, QmpClient};
use crate::config::RunConfig;
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

/// How long a child may take to become ready.
const START_PATIENCE: Duration = Duration::from_secs(20);

/// The connections to a child.
pub(super) struct Connection {
    /// For requests.
    pub client: QmpClient,
    /// For the guest's input.
    pub input: Arc<Mutex<Input>>,
}

/// A child process.
pub(super) struct Child {
    id: ChildId,
    control: PathBuf,
    address: PathBuf,
    output: Option<ChildStdout>,
    /// Signalled by its first line on standard error, or its end.
    first_line: Option<Receiver<()>>,
    ended: Receiver<u8>,
    /// Receives from the field above.
    code: Cell<Option<u8>>,
}

impl Child {
    /// Starts the process that boots the guest.
    pub fn boot(config: &RunConfig, folder: &Path, mailbox: &Mailbox<Message>) -> io::Result<Self> {
        let mut command = ferry("run")?;
        command.arg("--kernel").arg(&config.boot.kernel);
        if let Some(initrd) = &config.boot.initrd {
            command.arg("--initrd").arg(initrd);
        }
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

    /// Starts a process that receives the guest. What the guest boots from comes with it: by now the files may
    /// be gone, or be others.
    pub fn receive(
        id: ChildId,
        config: &RunConfig,
        folder: &Path,
        mailbox: &Mailbox<Message>,
    ) -> io::Result<Self> {
        let mut command = ferry("receive")?;
        command.arg(format!("unix:{}", address(folder, id).display()));
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
            // Killed by a signal: the guest is gone, too.
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

    /// Its id.
    pub fn id(&self) -> ChildId {
        self.id
    }

    /// Its migration address.
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// Its control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// The guest's output; can be taken once.
    pub fn take_output(&mut self) -> Option<ChildStdout> {
        self.output.take()
    }

    /// Returns a wait for the child to listen or to end; can be taken once. If the child does neither in
    /// time, connecting fails.
    pub fn take_readiness(&mut self) -> impl FnOnce() + Send + 'static {
        let first_line = self.first_line.take();
        move || {
            let _ = first_line.map(|first_line| first_line.recv_timeout(START_PATIENCE));
        }
    }

    /// Connects to its control socket and subscribes to its events.
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

    /// `ferry run` prints nothing when it listens: poll until it answers or has ended.
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

    /// Waits for its end; posts its exit code.
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
    // Not by path: the file may have been replaced since this process started.
    let mut command = Command::new("/proc/self/exe");
    command.arg(verb);
    Ok(command)
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = std::thread::Builder::new().name(name.to_owned()).stack_size(256 << 10);
    builder.spawn(work).map(drop)
}

/// Forwards a child's messages, except that it listens.
fn pass_errors(errors: ChildStderr, first: &Sender<()>) {
    for line in BufReader::new(errors).lines().map_while(Result::ok) {
        if line.starts_with("ferry: listening on ") {
            let _ = first.send(());
        } else {
            eprintln!("{line}");
        }
    }
}

/// Forwards input over the control socket, whose reply tells how much the guest's serial port has taken.
/// The rest stays in the console, so a move loses nothing.
pub(super) struct Input {
    client: QmpClient,
    room: Arc<EventFd>,
}

/// Retry interval while the guest's serial port is full.
const ROOM_INTERVAL: Duration = Duration::from_millis(10);

impl Input {
    fn new(client: QmpClient) -> io::Result<Self> {
        Ok(Self { client, room: Arc::new(EventFd::new(EFD_NONBLOCK)?) })
    }
}

impl ConsoleInput for Input {
    fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let data: String = bytes.iter().copied().map(char::from).collect();
        // A child that has ended takes nothing: the next one gets the input.
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
            // QMP has no event for room in the port.
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

/// Forwards the children's output, one child after another, each to its end: output from before a move
/// precedes output from after it.
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
                        // While the console's reader stalls, the child blocks, and so does its guest.
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

    /// Forwards the output of child `id` after that of earlier children.
    pub fn follow(&self, id: ChildId, output: Option<ChildStdout>) {
        if let Some(output) = output {
            // Fails only if the pump, and so the console, has ended.
            let _ = self.0.send((id, output));
        }
    }
}
