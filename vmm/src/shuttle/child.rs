//! One process of the shuttle's: how it is started, spoken to and heard to its end.

use super::{ChildId, Message};
use crate::client::{ClientError, QmpClient};
use crate::config::{BootFiles, RunConfig};
use crate::console::ConsoleInput;
use crate::desk::Mailbox;
use crate::supervisor::exit_code;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long a child may take to say that it is there.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// Pieces of input on their way to a child.
const INPUT_PIECES: usize = 16;

/// A child process.
pub(super) struct Child {
    id: ChildId,
    control: PathBuf,
    address: PathBuf,
    output: Option<ChildStdout>,
    input: Arc<Mutex<Input>>,
    /// Its first line on standard error, or the end of it.
    first_line: Option<Receiver<()>>,
    ended: Receiver<u8>,
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
            command.arg("--disk").arg(format!("{id}={}", disk.path.display()));
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
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn()?;
        let missing = || io::Error::other("a child process without pipes");
        let input = process.stdin.take().ok_or_else(missing)?;
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
        let input = Arc::new(Mutex::new(Input::start(input)?));
        let address = address(folder, id);
        Ok(Self { id, control, address, output, input, first_line: Some(first_line), ended })
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

    /// Where the guest's input goes.
    pub fn input(&self) -> Arc<Mutex<Input>> {
        self.input.clone()
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
    pub fn connect(&self, mailbox: &Mailbox<Message>) -> Result<QmpClient, ClientError> {
        let mut listener = self.first_client()?;
        let client = QmpClient::connect(&self.control.to_string_lossy())?;
        let (id, to_us) = (self.id, mailbox.clone());
        let started = thread("events", move || {
            while let Ok(event) = listener.event() {
                to_us.post(Message::Event(id, event));
            }
        });
        started.map(|()| client).map_err(ClientError::Lost)
    }

    /// `ferry run` says nothing when it listens: it is there when it answers, or when it has ended.
    fn first_client(&self) -> Result<QmpClient, ClientError> {
        let path = self.control.to_string_lossy();
        loop {
            match QmpClient::connect(&path) {
                Err(ClientError::Connect { .. }) => {}
                result => return result,
            }
            if self.ended.recv_timeout(Duration::from_millis(1)).is_ok() {
                return Err(ClientError::Lost(io::ErrorKind::ConnectionAborted.into()));
            }
        }
    }

    /// Waits for its end.
    pub fn exit_code(&self) -> u8 {
        self.ended.recv_timeout(START_PATIENCE).unwrap_or(exit_code::GUEST_FAILED)
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

/// Input on its way to a child: a thread writes it, so that nobody waits for a child that does not read.
pub(super) struct Input {
    pieces: SyncSender<Vec<u8>>,
    room: Arc<EventFd>,
}

impl Input {
    fn start(mut pipe: ChildStdin) -> io::Result<Self> {
        let room = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let (pieces, queue) = sync_channel::<Vec<u8>>(INPUT_PIECES);
        let taken = room.clone();
        thread("input", move || {
            for piece in queue {
                let _ = taken.write(1);
                if pipe.write_all(&piece).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { pieces, room })
    }
}

impl ConsoleInput for Input {
    fn enqueue(&mut self, bytes: &[u8]) -> usize {
        match self.pieces.try_send(bytes.to_vec()) {
            Err(TrySendError::Full(_)) => 0,
            // A child that is gone takes no more; what it is sent is lost with it.
            Ok(()) | Err(TrySendError::Disconnected(_)) => bytes.len(),
        }
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
    pub fn start(
        mut console: Box<dyn Write + Send>,
        mailbox: Mailbox<Message>,
    ) -> io::Result<Self> {
        let (sender, queue) = channel::<(ChildId, ChildStdout)>();
        thread("pump", move || {
            let mut buffer = [0; 4096];
            for (id, mut output) in queue {
                loop {
                    match output.read(&mut buffer) {
                        Ok(0) => break,
                        // Whoever does not read the console loses output, as without a shuttle.
                        Ok(count) => drop(console.write_all(&buffer[..count])),
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
