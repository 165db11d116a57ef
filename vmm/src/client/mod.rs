//! A blocking QMP client for control sockets.

pub mod backup;
mod bitmap;
pub mod ctl;
mod job;
pub mod migrate;
mod request;

use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Timeout of a reply: longer than the slowest command, a reset, may take.
const PATIENCE: Duration = Duration::from_secs(40);

/// A figure of an answer. QMP leaves out what does not apply yet or at all, which counts as 0.
fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// Events that a client keeps.
const MAX_EVENTS: usize = 64;

/// A failed request over a control socket.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot connect to control socket {path}: is a ferry running with --qmp unix:{path}?")]
    Connect {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("the control socket was closed")]
    Lost(#[source] io::Error),
    #[error("no answer on the control socket in time")]
    Timeout,
    #[error("the control socket does not speak QMP: {0:?}")]
    NotQmp(String),
    /// The command failed; QMP's `desc`, and a hint if there is one.
    #[error("{0}")]
    Refused(String),
}

/// A connection in command mode.
pub struct QmpClient {
    stream: BufReader<UnixStream>,
    patience: Duration,
    /// A line whose end has not arrived yet.
    line: Vec<u8>,
    /// Events that came while a reply was waited for; the oldest are dropped.
    events: VecDeque<Value>,
    /// The id of the last request: a reply to an earlier one may come after it was given up.
    last_id: u64,
}

impl QmpClient {
    /// Connects to `path`, with or without `unix:` before it.
    pub fn connect(path: &str) -> Result<Self, ClientError> {
        Self::connect_with(path, PATIENCE)
    }

    /// The same; each reply may take `patience`.
    pub fn connect_with(path: &str, patience: Duration) -> Result<Self, ClientError> {
        let path = path.strip_prefix("unix:").unwrap_or(path);
        let connect = || {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(patience))?;
            stream.set_write_timeout(Some(patience))?;
            Ok(stream)
        };
        let stream =
            connect().map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let (line, events) = (Vec::new(), VecDeque::new());
        let stream = BufReader::new(stream);
        let mut client = Self { stream, patience, line, events, last_id: 0 };
        let greeting = client.read()?;
        if greeting.get("QMP").is_none() {
            return Err(ClientError::NotQmp(greeting.to_string()));
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    fn read(&mut self) -> Result<Value, ClientError> {
        use io::ErrorKind::{TimedOut, WouldBlock};
        match self.stream.read_until(b'\n', &mut self.line) {
            Ok(_) if self.line.last() != Some(&b'\n') => {
                Err(ClientError::Lost(io::ErrorKind::UnexpectedEof.into()))
            }
            Ok(_) => {
                let line = std::mem::take(&mut self.line);
                serde_json::from_slice(&line)
                    .map_err(|_| ClientError::NotQmp(String::from_utf8_lossy(&line).into_owned()))
            }
            Err(error) if matches!(error.kind(), WouldBlock | TimedOut) => {
                Err(ClientError::Timeout)
            }
            Err(error) => Err(ClientError::Lost(error)),
        }
    }

    fn wait_at_most(&self, patience: Option<Duration>) -> Result<(), ClientError> {
        self.stream.get_ref().set_read_timeout(patience).map_err(ClientError::Lost)
    }

    /// Waits for the next event: for `patience`, or however long. `None` if there was none.
    pub fn event(&mut self, patience: Option<Duration>) -> Result<Option<Value>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        self.wait_at_most(patience)?;
        let event = loop {
            match self.read() {
                Ok(message) if message.get("event").is_some() => break Ok(Some(message)),
                Ok(_) => {}
                Err(ClientError::Timeout) => break Ok(None),
                Err(error) => break Err(error),
            }
        };
        self.wait_at_most(Some(self.patience))?;
        event
    }

    /// Sends a command and waits for its reply; keeps events for [`QmpClient::event`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        self.last_id += 1;
        let request = json!({"execute": command, "arguments": arguments, "id": self.last_id});
        let mut line = request.to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).map_err(ClientError::Lost)?;
        loop {
            let mut answer = self.read()?;
            if answer.get("event").is_some() {
                if self.events.len() == MAX_EVENTS {
                    self.events.pop_front();
                }
                self.events.push_back(answer);
                continue;
            }
            if answer.get("id").is_some_and(|id| *id != self.last_id) {
                continue;
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let text = |name| error.get(name).and_then(Value::as_str);
                let mut desc = text("desc").unwrap_or("unknown error").to_owned();
                if let Some(hint) = text("x-hint") {
                    desc.push_str(". ");
                    desc.push_str(hint);
                }
                return Err(ClientError::Refused(desc));
            }
        }
    }
}
