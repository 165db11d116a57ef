//! A child process of the shuttle: starts it, connects to it and waits for its end.

use super::child_config::{ChildConfig, Part};
use super::{ChildId, FIRST, Message, User};
use crate::client::{ClientError, QmpClient};
use crate::console::ConsoleInput;
use crate::control::Incoming;
use crate::event_loop::Mailbox;
use crate::exit_code::{self, Exit};
use crate::log_queue::say_line;
use devices::transmitter::Transmitter;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long a child may take to become ready.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// How long the last line of a child that has ended may take to arrive, on a host with other work, too.
const LAST_LINE_PATIENCE: Duration = Duration::from_secs(10);

/// The connections to a child.
pub(super) struct Connection {
    /// Requests for the `ask` thread, which posts [`Message::Answered`].
    requests: Sender<Box<Incoming>>,
    /// For the guest's input.
    pub input: Arc<Mutex<Input>>,
}

impl Connection {
    /// Forwards a request; returns it if the child is gone.
    pub fn ask(&self, request: Box<Incoming>) -> Result<(), Box<Incoming>> {
        self.requests.send(request).map_err(|error| error.0)
    }
}

/// A child process.
pub(super) struct Child {
    id: ChildId,
    control: PathBuf,
    address: PathBuf,
    output: Option<ChildStdout>,
    /// Signalled by its first line on standard error, or its end.
    first_line: Option<Receiver<()>>,
    ended: Receiver<Exit>,
    /// Receives from the field above.
    exit: RefCell<Option<Exit>>,
    process: OwnedFd,
}

impl Child {
    /// Starts child `id`, which gets the user's configuration whole.
    pub fn start(
        id: ChildId,
        user: &User,
        folder: &Path,
        mailbox: &Mailbox<Message>,
    ) -> io::Result<Self> {
        let control = folder.join(format!("control-{id}"));
        let address = folder.join(format!("migrate-{id}"));
        let given = ChildConfig {
            verbose: user.verbose,
            part: match id {
                FIRST => Part::Boot { control: control.clone() },
                _ => Part::Receive { address: address.clone(), control: control.clone() },
            },
            config: user.config.clone(),
        };
        // Not by path: the file may have been replaced since this process started.
        let mut command = Command::new("/proc/self/exe");
        command.arg("child");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn()?;
        let pid = Pid::from_child(&process);
        // Not reaped yet, so the id is still its own.
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from);
        let pidfd = pidfd.inspect_err(|_| {
            // Nobody else would end it, or wait for it.
            let _ = process.kill().and_then(|()| process.wait());
        })?;
        let missing = || io::Error::other("a child process without pipes");
        let errors = process.stderr.take().ok_or_else(missing)?;
        let input = process.stdin.take().ok_or_else(missing)?;
        let output = process.stdout.take();
        let (ending, ended) = channel();
        let to_us = mailbox.clone();
        let (telling, first_line) = channel();
        let (last_telling, last_line) = channel();
        thread("errors", move || {
            // Fails if nobody waits for it any more.
            let _ = last_telling.send(pass_errors(errors, &telling));
        })?;
        // On its own thread: it may be more than a pipe holds. Closing the pipe is its end.
        thread("config", move || {
            if let Err(error) = given.write(input) {
                // The child says what is wrong with it.
                log::debug!("child {id} did not take its configuration: {error}");
            }
        })?;
        thread("wait", move || {
            let status = process.wait();
            let said = last_line.recv_timeout(LAST_LINE_PATIENCE).ok().flatten();
            let exit = match status {
                Ok(status) => {
                    match (status.code().and_then(|code| u8::try_from(code).ok()), said) {
                        (Some(code), Some(exit)) if exit.code == code => exit,
                        // Killed by a signal: the guest is gone, too.
                        _ => Exit::new(
                            exit_code::CANNOT_RUN,
                            format!("the process that ran the guest has ended: {status}"),
                        ),
                    }
                }
                Err(error) => Exit::new(
                    exit_code::CANNOT_RUN,
                    format!("the process that ran the guest is lost: {error}"),
                ),
            };
            let _ = ending.send(exit.clone());
            to_us.post(Message::Ended(id, exit));
        })?;
        Ok(Self {
            id,
            control,
            address,
            output,
            first_line: Some(first_line),
            ended,
            exit: RefCell::new(None),
            process: pidfd,
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

    /// Waits for the child that boots the guest to be ready, and posts its events.
    pub fn listen(&self, mailbox: &Mailbox<Message>) {
        listen(self.id, self.first_client(), mailbox);
    }

    /// Connects to its control socket.
    pub fn connect(&self, mailbox: &Mailbox<Message>) -> Result<Connection, ClientError> {
        let path = self.control.to_string_lossy();
        let mut client = QmpClient::connect(&path)?;
        let input = Input::new(QmpClient::connect(&path)?).map_err(ClientError::Lost)?;
        let (requests, asked) = channel::<Box<Incoming>>();
        let (id, to_us) = (self.id, mailbox.clone());
        let started = thread("ask", move || {
            for request in asked {
                let arguments = Value::Object(request.request.arguments.clone());
                let result = client.execute(&request.request.execute, arguments);
                to_us.post(Message::Answered(id, request, result));
            }
        });
        started.map_err(ClientError::Lost)?;
        Ok(Connection { requests, input: Arc::new(Mutex::new(input)) })
    }

    /// `ferry run` prints nothing when it listens: poll until it answers, has ended or takes too long.
    fn first_client(&self) -> Result<QmpClient, ClientError> {
        let path = self.control.to_string_lossy();
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            match QmpClient::connect(&path) {
                Err(ClientError::Connect { .. }) if Instant::now() < deadline => {}
                result => return result,
            }
            if self.ended_within(Duration::from_millis(1)).is_some() {
                return Err(ClientError::Lost(io::ErrorKind::ConnectionAborted.into()));
            }
        }
    }

    /// Waits for its end; returns how it ended.
    pub fn ended_within(&self, patience: Duration) -> Option<Exit> {
        let mut exit = self.exit.borrow_mut();
        if exit.is_none() {
            *exit = self.ended.recv_timeout(patience).ok();
        }
        exit.clone()
    }

    /// Tells it to quit and lets it flush its disks. If it takes too long, it dies with this process.
    pub fn quit(&self, patience: Duration) {
        let client = QmpClient::connect_with(&self.control.to_string_lossy(), patience);
        // Fails if it has just ended.
        if client.is_ok_and(|mut client| client.execute("quit", json!({})).is_ok()) {
            self.ended_within(patience);
        }
    }

    /// Kills it: it has no guest, and would wait for one for ever.
    pub fn kill(&self) {
        // Fails if it has ended by itself.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }
}

/// Posts the events that a client of child `id` hears, and then that those were all: so the last ones are not lost
/// when the child ends.
pub(super) fn listen(
    id: ChildId,
    client: Result<QmpClient, ClientError>,
    mailbox: &Mailbox<Message>,
) {
    let to_us = mailbox.clone();
    let started = thread("events", move || {
        if let Ok(mut client) = client {
            while let Ok(Some(event)) = client.event(None) {
                to_us.post(Message::Event(id, event));
            }
        }
        to_us.post(Message::Silent(id));
    });
    if let Err(error) = started {
        log::error!("cannot start a thread, so events of the guest are lost: {error}");
        mailbox.post(Message::Silent(id));
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = std::thread::Builder::new().name(name.to_owned()).stack_size(256 << 10);
    builder.spawn(work).map(drop)
}

/// Forwards a child's messages, except that it listens, and how it ended, which it returns.
fn pass_errors(errors: ChildStderr, first: &Sender<()>) -> Option<Exit> {
    let mut exit = None;
    for line in BufReader::new(errors).lines().map_while(Result::ok) {
        if line.starts_with("ferry: listening on ") {
            let _ = first.send(());
        } else if let Some(last) = Exit::parse(&line) {
            exit = Some(last);
        } else {
            say_line(&line);
        }
    }
    exit
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
