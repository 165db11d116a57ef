//! A small control-socket client: requests, replies, events. Works with Ferry and with QEMU.

use crate::needs::qmp_python;
use crate::process::{Process, SOON};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The statuses with which a migration ends.
pub const ENDS: [&str; 3] = ["completed", "failed", "cancelled"];

/// Whether `status`, as `query-migrate` and events have it, is that of a migration that has ended.
pub fn is_end(status: &Value) -> bool {
    ENDS.iter().any(|end| status == end)
}

/// How long any one reply may take.
const REPLY_LIMIT: Duration = Duration::from_secs(30);

/// A refusal by the other side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// QMP's class, such as `GenericError`.
    pub class: String,
    /// For people.
    pub description: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.class, self.description)
    }
}

impl std::error::Error for Refusal {}

/// Runs `script`, a file in `tests/tests` that drives control sockets with Python's `qemu.qmp`, to its end.
/// For tests that need [`qemu_qmp`](crate::needs).
pub fn run_python(script: &str, arguments: &[&str]) -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = here.join("tests").join(script);
    let mut python = Process::start(Command::new(qmp_python()).arg(script).args(arguments))?;
    let code = python.exit_code(SOON)?;
    ensure!(code == 0, "{}{}", python.out.text(), python.err.text());
    Ok(())
}

/// A connected client in command mode.
pub struct Qmp {
    stream: UnixStream,
    unread: Vec<u8>,
    events: VecDeque<Value>,
    next_id: u64,
    greeting: Value,
}

impl Qmp {
    /// Connects without negotiation: what a test of bad clients starts from.
    pub fn connect_raw(path: &Path, limit: Duration) -> Result<UnixStream> {
        let deadline = Instant::now() + limit;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Ok(stream),
                // A starting process makes its socket when it is ready; nothing announces that.
                Err(error) if Instant::now() < deadline => match error.kind() {
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                        std::thread::sleep(Duration::from_micros(500));
                    }
                    _ => return Err(error.into()),
                },
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("no control socket {}", path.display()));
                }
            }
        }
    }

    /// Connects and negotiates, within `limit`.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let stream = Self::connect_raw(path, limit)?;
        let mut client = Self {
            stream,
            unread: Vec::new(),
            events: VecDeque::new(),
            next_id: 0,
            greeting: Value::Null,
        };
        client.greeting = client.read_message(Instant::now() + limit)?.context("no greeting")?;
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// What the server said first.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// One message, or `None` when time is up.
    fn read_message(&mut self, deadline: Instant) -> Result<Option<Value>> {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 16 << 10];
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the control socket was closed"),
                Ok(len) => self.unread.extend_from_slice(&buffer[..len]),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                    _ => return Err(error.into()),
                },
            }
        }
    }

    /// Sends a command without waiting for its answer, for [`Qmp::answer`].
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<()> {
        self.next_id += 1;
        let request = json!({"execute": command, "arguments": arguments, "id": self.next_id});
        self.stream.write_all(format!("{request}\n").as_bytes())?;
        Ok(())
    }

    /// Sends a command and returns its answer: the value, or the refusal as a [`Refusal`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.ask(command, arguments)?;
        self.answer()
    }

    /// The answer to the last command: the value, or the refusal as a [`Refusal`].
    pub fn answer(&mut self) -> Result<Value> {
        let deadline = Instant::now() + REPLY_LIMIT;
        loop {
            let Some(mut message) = self.read_message(deadline)? else {
                bail!("no answer within {REPLY_LIMIT:?}");
            };
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if message["id"] == self.next_id {
                if let Some(error) = message.get("error") {
                    let text = |key: &str| error[key].as_str().unwrap_or("?").to_owned();
                    return Err(Refusal { class: text("class"), description: text("desc") }.into());
                }
                return Ok(message["return"].take());
            }
        }
    }

    /// Sends a command that must be refused, and returns the refusal.
    pub fn refused(&mut self, command: &str, arguments: Value) -> Result<Refusal> {
        match self.execute(command, arguments) {
            Ok(value) => bail!("{command} was not refused: {value}"),
            Err(error) => error.downcast::<Refusal>(),
        }
    }

    /// Waits for an event of that name, the ones already here included; earlier others are dropped.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        self.wait_event_where(limit, |event| event["event"] == name)
            .with_context(|| format!("waiting for the event {name}"))
    }

    /// Waits for an event that `wanted` accepts; earlier others are dropped.
    pub fn wait_event_where(
        &mut self,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return Ok(event);
                }
            }
            match self.read_message(deadline)? {
                Some(message) => self.events.push_back(message),
                None => bail!("no such event within {limit:?}"),
            }
        }
    }

    /// Waits until a migration reaches one of `statuses`; needs the capability `events`.
    pub fn wait_migration(&mut self, statuses: &[&str], limit: Duration) -> Result<String> {
        let event = self.wait_event_where(limit, |event| {
            event["event"] == "MIGRATION"
                && event["data"]["status"].as_str().is_some_and(|status| statuses.contains(&status))
        });
        let event = event.with_context(|| format!("waiting for a migration to be {statuses:?}"))?;
        Ok(event["data"]["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits until `query-migrate` is as wanted; there is no event for most of what it says.
    pub fn wait_info(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + SOON;
        loop {
            let info = self.execute("query-migrate", json!({}))?;
            if wanted(&info) {
                return Ok(info);
            }
            ensure!(Instant::now() < deadline, "query-migrate stays as it is: {info}");
            // Woken by the next event, whatever it is, or in a moment.
            let _ = self.wait_event_where(Duration::from_millis(20), |_| true);
        }
    }

    /// Waits until the migration has ended, and says how; its events may have been taken by other waits.
    pub fn migration_end(&mut self) -> Result<Value> {
        self.wait_info(|info| is_end(&info["status"]))
    }

    /// Switches migration events on.
    pub fn want_migration_events(&mut self) -> Result<()> {
        let events = json!({"capabilities": [{"capability": "events", "state": true}]});
        self.execute("migrate-set-capabilities", events).map(drop)
    }

    /// The run state, `query-status`'s `status`.
    pub fn run_state(&mut self) -> Result<String> {
        let status = self.execute("query-status", json!({}))?;
        Ok(status["status"].as_str().context("no status")?.to_owned())
    }
}
